"""The matcher of images and captions, its recipe, PSNR, and the results that come with the package."""

import json
import math
from dataclasses import replace

import pytest
import torch

from diffbook.classifier import CaptionMatcher
from diffbook.cli import main
from diffbook.data import emoji64
from diffbook.evaluation import image_features, psnr
from diffbook.latent import emoji_vocabulary
from diffbook.recipes import find_recipe, stream
from diffbook.training import training_set
from diffbook.weights import load_model, measured, measured_pictures


def small() -> CaptionMatcher:
    torch.manual_seed(0)
    return CaptionMatcher(3, 16, [8, 8], features=32, words=5).eval()


def test_features_and_codes_have_one_length() -> None:
    model, x = small(), torch.rand(4, 3, 16, 16) * 2 - 1
    y = torch.tensor([[0, 1, 5], [1, 0, 5], [0, 5, 5], [0, 1, 2]])
    for rows in (model.features(x), model.code(y)):
        assert rows.shape == (4, 32)
        assert torch.allclose(rows.norm(dim=1), torch.full((4,), math.sqrt(32)), atol=1e-4)
    code = model.code(y) / math.sqrt(32)
    assert torch.allclose(code[0], code[1], atol=1e-6)  # the order of the words does not matter
    assert code[0] @ code[3] > code[2] @ code[3] > 0.2  # more words in common
    assert torch.allclose(model(x, y), model.log_scale.exp() * model.features(x) @ model.code(y).T / 32, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), got \(1, 3, 8, 8\)"):
        model.features(torch.zeros(1, 3, 8, 8))


def test_codes_are_not_stored_and_always_the_same() -> None:
    assert "codes" not in small().state_dict()
    assert torch.equal(small().codes, CaptionMatcher(3, 16, [8], features=32, words=5).codes)
    assert (small().codes[5] == 0).all()


def test_loss_is_contrastive_and_shifts_over_white() -> None:
    recipe = replace(find_recipe("emoji-matcher"), shift=0)
    model, x, y = small(), torch.rand(6, 3, 16, 16) * 2 - 1, torch.randint(0, 5, (6, 3))
    p = model(x, y)
    expected = -(p.log_softmax(0).diagonal().mean() + p.log_softmax(1).diagonal().mean()) / 2
    assert recipe.loss(model, x, y, stream(0, "test", 0)).item() == pytest.approx(expected.item(), rel=1e-5)

    class Corner(torch.nn.Module):
        """Remembers what it is shown."""

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.seen = x
            return torch.zeros(len(x), len(y))

    corner, dark = Corner(), torch.full((1, 3, 16, 16), -1.0)
    whites = set()
    for i in range(30):
        replace(recipe, shift=2).loss(corner, dark, y[:1], stream(0, "shift", i))
        white = (corner.seen[0, 0] == 1).sum(0), (corner.seen[0, 0] == 1).sum(1)
        whites.add((int(white[0].min()), int(white[1].min())))
    assert whites == {(i, j) for i in range(3) for j in range(3)}


def test_it_is_trained_on_captions() -> None:
    data = training_set(find_recipe("emoji-matcher"))
    assert emoji_vocabulary().decode(data.labels[:3]) == list(emoji64().captions[:3])


def test_the_matcher_that_comes_with_the_package() -> None:
    """It finds the caption of a picture it has never seen among all that are held out."""
    model, _ = load_model("emoji-matcher")
    assert isinstance(model, CaptionMatcher)
    test = emoji64("test")
    features, y = image_features(model, test.x()), emoji_vocabulary().encode(test.captions)
    best = (features @ model.code(y).T).argmax(1)
    assert (best == torch.arange(len(test))).double().mean() > 0.25


def test_evaluate_command(capsys) -> None:
    assert main(["evaluate", "emoji-matcher", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["captions"] == 556 and found["top_1"]["share"] > 0.4
    assert found["top_1"]["low"] < found["top_1"]["share"] <= found["top_5"]["share"]


def test_psnr() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = x + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert psnr(x, y).tolist() == pytest.approx([20, 40], abs=1e-4)  # 10 log10(4 / 0.04)
    with pytest.raises(ValueError, match="same shape"):
        psnr(x, y[:1])


def test_results_that_come_with_the_package() -> None:
    found = measured("autoencoders")
    assert {row["f"] for row in found["autoencoders"]} == {4, 8, 16}
    pictures = measured_pictures("autoencoders")  # a row of originals, and one for each autoencoder
    assert pictures.shape == (3, 64 * (1 + len(found["autoencoders"])), 8 * 64)
    originals = emoji64("test").x(torch.arange(8) * 556 // 8)
    assert torch.allclose(pictures[:, :64].unflatten(2, (8, 64)).permute(2, 0, 1, 3), originals, atol=0.02)
    with pytest.raises(ValueError, match=r"no results 'nothing'; there are .*autoencoders"):
        measured("nothing")
    with pytest.raises(ValueError, match=r"no pictures 'nothing'; there are .*autoencoders"):
        measured_pictures("nothing")
