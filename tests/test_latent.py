"""Latent diffusion: words, attention to a caption, and the two models put together."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffbook import cli
from diffbook.autoencoder import SpatialVAE, fit_scale
from diffbook.cli import main
from diffbook.data import IMAGE_SETS, emoji64, emoji_rows, fashion_subset
from diffbook.evaluation import draw_images, psnr
from diffbook.latent import (
    Attention,
    CaptionEncoder,
    CaptionUNet,
    LatentDiffusion,
    UnknownWordWarning,
    Vocabulary,
    emoji_vocabulary,
    from_latents,
    to_latents,
)
from diffbook.recipes import Compression, Diffusion, find_recipe, stream
from diffbook.sampling import as_eps, dpmpp_2m_sample, guided, trailing_timesteps
from diffbook.schedule import cosine_schedule
from diffbook.training import train, training_set
from diffbook.weights import latent_diffusion, load_autoencoder, load_model

WORDS = Vocabulary(["noto", "red", "heart", "dark", "skin", "woman"], length=4)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """The module with all parameters moved: last layers start at zero, which would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def network() -> CaptionUNet:
    torch.manual_seed(1)
    model = stirred(CaptionUNet((4, 2, 4), WORDS.null, WORDS.length, widths=[16, 24], blocks=1, heads=2, text=8))
    assert isinstance(model, CaptionUNet)
    return model


def autoencoder() -> SpatialVAE:
    torch.manual_seed(2)
    model = stirred(SpatialVAE(3, 16, [8, 8, 8], blocks=1, latent=4, patch=2))
    assert isinstance(model, SpatialVAE)
    return model


class TestVocabulary:
    def test_captions_and_back(self) -> None:
        y = WORDS.encode(["noto red heart", "", "Woman"])
        assert y.tolist() == [[0, 1, 2, 6], [6, 6, 6, 6], [5, 6, 6, 6]]
        assert WORDS.decode(y) == ["noto red heart", "", "woman"]

    def test_unknown_and_superfluous_words_are_named(self) -> None:
        with pytest.warns(UnknownWordWarning, match="unknown words are left out: purple, whale"):
            assert WORDS.decode(WORDS.encode(["noto purple heart whale"])) == ["noto heart"]
        with pytest.warns(UnknownWordWarning, match="only 4 words are read, left out are: skin woman"):
            assert WORDS.decode(WORDS.encode(["noto red heart dark skin woman"])) == ["noto red heart dark"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            WORDS.encode(["noto red heart"])

    @pytest.mark.parametrize(("words", "length"), [([], 3), (["a", "a"], 3), (["a"], 0)])
    def test_bad_vocabulary(self, words: list[str], length: int) -> None:
        with pytest.raises(ValueError, match="different words, at least one"):
            Vocabulary(words, length)


def test_attention_is_the_formula() -> None:
    """softmax(Q Kᵀ / √(C / heads)) V for each head, over the entries that the mask allows."""
    torch.manual_seed(3)
    layer = stirred(Attention(6, 5, heads=2))
    assert isinstance(layer, Attention)
    h, context = torch.randn(2, 3, 6), torch.randn(2, 4, 5)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    q, (k, v) = layer.query(h), layer.key_value(context).chunk(2, dim=2)
    heads = []
    for i in (slice(0, 3), slice(3, 6)):
        score = q[:, :, i] @ k[:, :, i].transpose(1, 2) / math.sqrt(3)
        weight = torch.where(mask[:, None], score.exp(), 0.0)
        heads.append(weight / weight.sum(2, keepdim=True) @ v[:, :, i])
    assert torch.allclose(layer(h, context, mask), layer.project(torch.cat(heads, dim=2)), atol=1e-6)
    with pytest.raises(ValueError, match="heads must divide the width 6, got 4"):
        Attention(6, 5, heads=4)


class TestCaptionEncoder:
    def test_padding_changes_nothing_and_words_do(self) -> None:
        torch.manual_seed(4)
        encoder = stirred(CaptionEncoder(WORDS.null, WORDS.length, 8, heads=2))
        features, mask = encoder(WORDS.encode(["noto heart", "noto red", ""]))
        assert features.shape == (3, 5, 8)
        assert mask.tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] + [False] * 4]
        alone = encoder(WORDS.encode(["noto heart"]))[0]
        assert torch.allclose(features[:1], alone, atol=1e-6)
        # a word changes the features of the others (they know their caption), and of the start
        assert (features[0, :2] - features[1, :2]).abs().min(1).values.max() > 1e-4

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (torch.zeros(2, 3, dtype=torch.int64), r"shape \(B, 4\)"),
            (torch.full((1, 4), 7), "lie in 0…6"),
            (torch.full((1, 4), -1), "lie in 0…6"),
        ],
    )
    def test_bad_input(self, y: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CaptionEncoder(WORDS.null, WORDS.length, 8)(y)


class TestCaptionUNet:
    def test_starts_at_zero_and_depends_on_everything(self) -> None:
        z, t = torch.randn(2, 4, 2, 4, generator=torch.Generator().manual_seed(5)), torch.tensor([3, 500])
        fresh = CaptionUNet((4, 2, 4), WORDS.null, WORDS.length, widths=[16, 24], blocks=1, heads=2, text=8)
        assert torch.equal(fresh(z, t), torch.zeros_like(z))
        model, y = network(), WORDS.encode(["noto red heart", "woman"])
        out = model(z, t, y)
        assert out.shape == z.shape
        for other in (model(z + 0.1, t, y), model(z, t + 100, y), model(z, t, y.flip(0)), model(z, t)):
            assert (out - other).abs().flatten(1).max(1).values.min() > 1e-4
        assert torch.equal(model(z, t), model(z, t, WORDS.encode(["", ""])))

    def test_samples_do_not_see_each_other(self) -> None:
        model, y = network(), WORDS.encode(["noto red heart", "woman"])
        z, t = torch.randn(2, 4, 2, 4, generator=torch.Generator().manual_seed(6)), torch.tensor([3, 500])
        assert torch.allclose(model(z, t, y)[1:], model(z[1:], t[1:], y[1:]), atol=1e-5)

    def test_each_place_looks_at_single_words(self) -> None:
        """Order matters although the pooled caption is nearly the same, and only words that are there are looked at."""
        model, t = network(), torch.tensor([9])
        z = torch.randn(1, 4, 2, 4, generator=torch.Generator().manual_seed(7))
        for stage in [*model.down, *model.middle, *model.up]:
            before = model(z, t, WORDS.encode(["noto red heart"]))
            weight = stage.cross.project.weight.data.clone()
            stage.cross.project.weight.data.zero_()
            assert (model(z, t, WORDS.encode(["noto red heart"])) - before).abs().max() > 1e-5
            stage.cross.project.weight.data.copy_(weight)

    def test_guidance_takes_the_null_caption(self) -> None:
        model, y = network(), WORDS.encode(["noto red heart", "woman"])
        z, t = torch.randn(2, 4, 2, 4, generator=torch.Generator().manual_seed(8)), torch.tensor([3, 500])
        c, u = model(z, t, y), model(z, t)
        assert torch.allclose(guided(model, y, 2.5)(z, t), u + 2.5 * (c - u), atol=1e-5)

    def test_bad_input(self) -> None:
        model, z, t = network(), torch.zeros(2, 4, 2, 4), torch.ones(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"shape \(B, 4, 2, 4\) and t \(B,\), got \(2, 4, 4, 2\)"):
            model(z.transpose(2, 3), t)
        with pytest.raises(ValueError, match=r"got \(2, 4, 2, 4\) and \(1,\)"):
            model(z, t[:1])
        with pytest.raises(ValueError, match="a caption for each of the 2 latents, got 1"):
            model(z, t, WORDS.encode(["woman"]))
        with pytest.raises(ValueError, match=r"multiples of 2; got widths \(16, 24\), blocks 1, latent \(4, 3, 4\)"):
            CaptionUNet((4, 3, 4), WORDS.null, WORDS.length, widths=[16, 24], blocks=1)


class TestSpatialVAE:
    def test_shapes_scale_and_round_trip(self) -> None:
        model, x = autoencoder(), torch.rand(3, 3, 16, 16) * 2 - 1
        mean, variance = model.encode(x)
        assert mean.shape == variance.shape == (3, 4, 2, 2) == (3, *model.latent_shape)
        assert (variance > 0).all()
        model.scale.fill_(0.7)
        z = to_latents(model, x)
        assert torch.equal(z, 0.7 * mean)
        assert torch.allclose(from_latents(model, z), model.decode(mean).clamp(-1, 1), atol=1e-5)

    def test_fitted_scale_gives_unit_variance(self) -> None:
        model = autoencoder()
        x = torch.rand(700, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1
        fit_scale(model, lambda part: x[part], len(x), batch=300)
        mean, variance = model.encode(x)
        z = mean + variance.sqrt() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(10))
        assert (model.scale * z).std().item() == pytest.approx(1, abs=0.02)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"\(B, 3, 16, 16\), got \(1, 3, 8, 8\)"):
            autoencoder().encode(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match=r"\(B, 4, 2, 2\), got \(1, 4, 4, 4\)"):
            autoencoder().decode(torch.zeros(1, 4, 4, 4))
        with pytest.raises(ValueError, match="latent must be at least 1, got 0"):
            SpatialVAE(3, 16, [8], latent=0)

    def test_trained_by_its_recipe_the_scale_is_fitted_and_stored(self, tmp_path) -> None:
        recipe = Compression(
            name="small",
            about="",
            network="SpatialVAE",
            options={"channels": 1, "size": 28, "widths": [8, 8], "blocks": 1, "latent": 2, "patch": 2},
            data="fashion-subset",
            images=64,
            batch=32,
            lr=1e-3,
            kl_weight=1e-3,
        )
        for _ in train(recipe, tmp_path):
            pass
        model, _ = load_model(tmp_path)
        assert isinstance(model, SpatialVAE)
        mean, variance = model.encode(fashion_subset().x())
        std = math.sqrt(mean.var().item() + variance.mean().item())
        assert model.scale.item() == pytest.approx(1 / std, rel=1e-3)
        assert model.scale.item() != 1

    def test_loss_of_the_recipe(self) -> None:
        recipe = Compression(
            name="small", about="", network="SpatialVAE", options={}, images=1, batch=1, lr=1.0, kl_weight=0.5
        )
        model, x = autoencoder(), torch.rand(2, 3, 16, 16) * 2 - 1
        mean, variance = model.encode(x)
        y = model.decode(mean + variance.sqrt() * torch.randn(mean.shape, generator=stream(0, "test", 0)))
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum()
        expected = (x - y).abs().mean() + (x - y).square().mean() + 0.5 * kl / x.numel()
        loss = recipe.loss(model, x, torch.zeros(2), stream(0, "test", 0))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


class TestLatentDiffusion:
    def whole(self) -> LatentDiffusion:
        model = CaptionUNet((4, 2, 2), WORDS.null, WORDS.length, widths=[16], blocks=1, heads=2, text=8)
        return LatentDiffusion(autoencoder(), stirred(model), cosine_schedule(100), WORDS)  # type: ignore[arg-type]

    def test_pictures_depend_on_caption_seed_and_place_alone(self) -> None:
        model = self.whole()
        x = model.sample(["noto red heart", "woman", "woman"], steps=3, w=2.0)
        assert x.shape == (3, 3, 16, 16) and x.abs().max() <= 1
        assert torch.allclose(x[:1], model.sample(["noto red heart"], steps=3, w=2.0), atol=1e-5)
        assert (x[1] - x[2]).abs().max() > 1e-3
        assert (x[:1] - model.sample(["woman"], steps=3, w=2.0)).abs().max() > 1e-4
        assert (x[:1] - model.sample(["noto red heart"], steps=3, w=2.0, seed=1)).abs().max() > 1e-3

    def test_parts_that_do_not_fit(self) -> None:
        model = self.whole()
        with pytest.raises(ValueError, match="the parts do not fit"):
            LatentDiffusion(model.autoencoder, network(), model.schedule, WORDS)
        with pytest.raises(ValueError, match="words 6 and 1"):
            LatentDiffusion(model.autoencoder, model.network, model.schedule, Vocabulary(["a"], 4))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of short runs on a hundred emoji: an autoencoder, and a diffusion model of its latents."""
    folder = tmp_path_factory.mktemp("emoji")
    few = {split: emoji64(split).part(torch.arange(100)) for split in ("train", "test")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setitem(IMAGE_SETS, "emoji64", lambda split="train": few[split])
        vae = find_recipe("emoji-vae")
        vae = replace(vae, options=vae.options | {"widths": [8, 8, 8], "blocks": 1}, images=64)
        for _ in train(vae, folder / "vae"):
            pass
        ldm = find_recipe("emoji-ldm")
        options = ldm.options | {"widths": [16], "blocks": 1, "text": 8}
        ldm = replace(ldm, options=options, images=256, autoencoder=str(folder / "vae"))
        yield folder, ldm, few


class TestTraining:
    def test_latents_are_those_of_the_autoencoder_and_kept(self, runs) -> None:
        folder, ldm, few = runs
        latents = training_set(ldm)
        autoencoder, _ = load_model(folder / "vae")
        assert torch.allclose(latents.x(slice(5)), to_latents(autoencoder, few["train"].x(slice(5))), atol=1e-5)
        assert emoji_vocabulary().decode(latents.labels[:5]) == list(few["train"].captions[:5])
        (path,) = (folder / "cache" / "diffbook" / "latents").iterdir()
        before = path.stat().st_mtime_ns
        assert torch.equal(training_set(ldm).z, latents.z)
        assert path.stat().st_mtime_ns == before

    def test_run_resumes_bit_for_bit(self, runs) -> None:
        folder, ldm, _ = runs
        for _ in train(ldm, folder / "whole"):
            pass
        for step in train(ldm, folder / "parts"):
            if step.images == 128:
                break
        for _ in train(ldm, folder / "parts"):
            pass
        one, two = (load_model(folder / name)[0].state_dict() for name in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one)

    def test_commands(self, runs, capsys) -> None:
        folder, ldm, _ = runs
        for _ in train(ldm, folder / "whole"):
            pass
        path = folder / "s.png"
        draw = ["sample", str(folder / "whole"), "--number", "4", "--steps", "2", "--to", str(path)]
        captions = ["--caption", "noto red heart", "--caption", "twemoji volcano"]
        assert main([*draw, *captions, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["captions"] == ["noto red heart", "twemoji volcano"]
        with Image.open(path) as picture:
            assert picture.size == (4 * 65 + 1, 65 + 1)
        assert main([*draw, "--label", "1"]) == 1
        assert "use --caption" in capsys.readouterr().err

    def test_evaluate(self, runs, capsys, monkeypatch) -> None:
        folder, ldm, _ = runs
        for _ in train(ldm, folder / "whole"):
            pass
        test = emoji64("test").part(torch.tensor([0, 150, 300, 450, 555]))
        everything, objects = emoji64("train"), {row.object for row in test.rows}
        known = torch.tensor([i for i, row in enumerate(everything.rows) if i % 20 == 0 or row.object in objects])
        sets = {"train": everything.part(known), "test": test}
        monkeypatch.setattr("diffbook.cli.emoji64", sets.__getitem__)
        command = ["evaluate", str(folder / "whole"), "--steps", "2", "--guidance", "2", "--json"]

        def result(*more: str) -> dict:
            assert main([*command, *more]) == 0
            return json.loads(capsys.readouterr().out)

        found = result("--metric", "composition", "--number", "9")
        assert (found["images"], found["captions"], found["distractors"]) == (5, "test", 99)
        rows = {(r["factor"], r["answer"]): r for r in found["results"]}
        assert (
            rows["all", "model"]["captions"]
            == 5
            == rows["style", "model"]["captions"] + rows["tone", "model"]["captions"]
        )
        assert rows["all", "trivial"]["top_1"]["share"] == 0 < rows["all", "trivial"]["top_5"]["share"]
        near = result("--metric", "neighbours", "--number", "3", "--captions", "test")
        assert near["captions"] == "test" and near["images"] == 3
        assert 0 < near["smallest_distance"] <= near["median_distance"]
        distance = result("--number", "40")
        assert distance["captions"] == "train" and distance["guidance"] == 2
        # The matcher reads real pictures, and knows that two steps of a short training make none.
        assert distance["caption_similarity_of_real"] > 0.25 > distance["caption_similarity"] + 0.1
        assert distance["frechet_distance"] > 10
        assert main([*command, "--metric", "bits"]) == 1
        assert "--metric bits: not for a model of captions" in capsys.readouterr().err
        assert main(["evaluate", "fashion-cpu", "--metric", "composition"]) == 1
        assert "fashion-cpu knows no captions" in capsys.readouterr().err

    def test_evaluate_the_autoencoder(self, runs, capsys) -> None:
        folder, _, few = runs
        assert main(["evaluate", str(folder / "vae"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        model, _ = load_model(folder / "vae")
        x = few["test"].x()
        expected = psnr(from_latents(model, to_latents(model, x)), x)
        assert found["psnr"] == pytest.approx(expected.mean().item(), abs=2e-3)
        assert found["psnr_worst"] == pytest.approx(expected.min().item(), abs=2e-3)
        assert found["images"] == 100

    def test_batches_do_not_change_a_picture(self, runs) -> None:
        folder, ldm, _ = runs
        for _ in train(ldm, folder / "whole"):
            pass
        model = latent_diffusion(*load_model(folder / "whole"))
        captions = ["noto red heart", "twemoji volcano", ""]
        x = model.sample(captions, steps=2)
        assert torch.allclose(x, model.sample(captions, steps=2, batch=2), atol=1e-4)

    def test_latents_with_classes_are_drawn_and_decoded(self, runs) -> None:
        folder, ldm, few = runs
        options = {"channels": 4, "widths": [8, 8], "blocks": 1, "attention": [1], "classes": 9}
        names = ("data", "autoencoder", "size", "batch", "lr")
        recipe = Diffusion(
            name="small",
            about="",
            network="LiteUNet",
            options=options,
            images=64,
            **{n: getattr(ldm, n) for n in names},
        )
        data = training_set(recipe)
        assert torch.equal(data.z, training_set(ldm).z)
        assert torch.equal(data.labels, few["train"].labels)
        for _ in train(recipe, folder / "classes"):
            pass
        network, _ = load_model(folder / "classes")
        autoencoder, _ = load_model(folder / "vae")
        y = torch.tensor([0, 3, 9])
        (x,) = draw_images(network, recipe, y, steps=3, sampler="dpmpp", autoencoder=autoencoder)
        schedule, generators = recipe.noise_schedule(), [stream(0, "image", i) for i in range(3)]
        z_T = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators])
        denoiser = as_eps(guided(network, y), schedule, "v")
        z_0 = dpmpp_2m_sample(denoiser, z_T, schedule, trailing_timesteps(1000, 3))  # not clipped
        assert torch.allclose(x, autoencoder.decode(z_0 / autoencoder.scale).clamp(-1, 1), atol=1e-4)

    def test_a_model_is_exported_with_its_autoencoder(self, runs, tmp_path, monkeypatch, capsys) -> None:
        """The folder can be moved, says nothing of the place where the model was trained, and is loaded by its name."""
        folder, ldm, _ = runs
        for _ in train(ldm, folder / "whole"):
            pass
        monkeypatch.chdir(tmp_path)
        for _ in range(2):  # into a folder that has them, too
            assert main(["export", str(folder / "whole"), "--to", "made"]) == 0
        assert json.loads(Path("made/emoji-ldm.json").read_text())["recipe"]["autoencoder"] == "emoji-vae"
        assert not any(str(folder).encode() in path.read_bytes() for path in Path("made").iterdir())
        Path("made").rename("moved")
        network, recipe = load_model("moved")
        assert (recipe.name, recipe.autoencoder) == ("emoji-ldm", "moved/emoji-vae.safetensors")
        model, (own, _) = latent_diffusion(network, recipe), load_model(folder / "vae")
        for stored, parameter in zip(model.autoencoder.parameters(), own.parameters(), strict=True):
            assert torch.equal(stored, parameter.half().float())
        # what another model needs is not overwritten
        assert main(["export", "emoji-vae", "--to", "moved"]) == 0
        assert main(["export", str(folder / "whole"), "--to", "moved"]) == 1
        assert "emoji-vae.safetensors is not the autoencoder of emoji-ldm; choose another" in capsys.readouterr().err
        # two models that do not belong together
        assert main(["export", "fashion-classifier", "--to", "moved"]) == 0
        with pytest.raises(ValueError, match="no checkpoint in moved, nor one model"):
            load_model("moved")

    def test_a_shipped_autoencoder_stays_a_name(self, tmp_path) -> None:
        assert load_model("emoji-ldm")[1].autoencoder == "emoji-vae"
        assert main(["export", "emoji-ldm", "--to", str(tmp_path)]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji-ldm.json", "emoji-ldm.safetensors"]
        assert load_model(tmp_path)[1].autoencoder == "emoji-vae"

    def test_an_autoencoder_of_ones_own_is_named_in_full(self, tmp_path, monkeypatch) -> None:
        """So that the run can be repeated, and used, from another folder."""
        monkeypatch.chdir(tmp_path)
        Path("vae").mkdir()
        for given, named in (("vae", str(tmp_path / "vae")), ("emoji-vae", "emoji-vae"), ("hf:a/b", "hf:a/b")):
            options = cli._parser().parse_args(["train", "emoji-ldm", "--autoencoder", given])
            recipe = cli._recipe_to_train(options)
            assert isinstance(recipe, Diffusion) and recipe.autoencoder == named

    def test_a_missing_autoencoder_is_called_so(self, runs, tmp_path, capsys) -> None:
        folder, ldm, _ = runs
        for _ in train(ldm, folder / "whole"):
            pass
        (folder / "vae").rename(folder / "elsewhere")
        assert main(["export", str(folder / "whole"), "--to", str(tmp_path)]) == 1
        (folder / "elsewhere").rename(folder / "vae")
        assert f"the autoencoder of emoji-ldm: {folder / 'vae'} is no file or folder" in capsys.readouterr().err
        assert not any(tmp_path.iterdir())
        with pytest.raises(ValueError, match="the autoencoder of emoji-ldm: runs/vae is no file or folder"):
            load_autoencoder(replace(find_recipe("emoji-ldm"), autoencoder="runs/vae"))

    def test_captions_are_dropped_as_a_whole(self) -> None:
        ldm = replace(find_recipe("emoji-ldm"), label_drop=0.25)
        y = torch.arange(12).expand(4000, 12)
        dropped = ldm.drop_labels(y, torch.Generator().manual_seed(0))
        null = (dropped == 1798).float().mean(1)
        assert set(null.tolist()) == {0.0, 1.0}
        assert null.mean().item() == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 4000))
        assert torch.equal(dropped[null == 0], y[null == 0])

    def test_the_recipe_knows_the_vocabulary_and_the_latents(self) -> None:
        words, ldm = emoji_vocabulary(), find_recipe("emoji-ldm")
        assert (ldm.options["words"], ldm.options["length"]) == (words.null, words.length)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # every caption is read in full, those of the test as well
            captions = [row.caption for row in emoji_rows("test")]
            assert words.decode(words.encode(captions)) == captions
        vae = find_recipe("emoji-vae").build()
        assert isinstance(vae, SpatialVAE)
        assert list(vae.latent_shape) == ldm.options["latent"]
        sizes = [sum(p.numel() for p in find_recipe(name).build().parameters()) for name in ("emoji-vae", "emoji-ldm")]
        assert 2 * sum(sizes) < 12 * 2**20  # bytes in float16

    def test_another_model_is_no_autoencoder(self, runs) -> None:
        _, ldm, _ = runs
        with pytest.raises(ValueError, match="fashion-classifier is no autoencoder with latents"):
            training_set(replace(ldm, autoencoder="fashion-classifier"))
        with pytest.raises(ValueError, match="'fashion-cpu' makes no latent diffusion model"):
            latent_diffusion(*load_model("fashion-cpu"))
