"""The page "Full-size training": its tables, its commands, and the recipes for a GPU, a few steps each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import full_size
import pytest
from full_size import CARDS, ON_GPU, PAGE, blocks

from diffbook import training
from diffbook.cli import _parser
from diffbook.data import ImageSet
from diffbook.latent import LatentSet
from diffbook.planning import example
from diffbook.recipes import RECIPES, Compression, Recipe
from diffbook.training import train
from diffbook.weights import checkpoints, load_model, model_card


def test_the_tables_are_those_of_cards_and_recipes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks().items():
        assert f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->" in page, "run tools/full_size.py"
    assert {"fashion-gpu", "emoji-vae-gpu", "emoji-ldm-gpu"} <= set(ON_GPU)


def test_the_page_says_on_what_models_were_trained() -> None:
    """On one core of a CPU, all of them; and each has a word on its quality."""
    cards = {path.stem: model_card(path.stem) for path in CARDS}
    assert len(cards) == 6
    for name, card in cards.items():
        assert card["device"] == "cpu, 1 threads", name
        assert full_size.quality(card), name


@pytest.mark.parametrize("name", ON_GPU)
def test_a_recipe_for_a_gpu_runs_a_few_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe as it is, but for its batch and length, on noise in the shape of its data; stored and read again."""
    recipe = replace(RECIPES[name], batch=2, images=6, warmup=2)
    monkeypatch.setattr(training, "training_set", lambda recipe, device, *rest: noise(recipe, 2 if rest else 8))
    steps = list(train(recipe, tmp_path))
    assert [step.images for step in steps] == [2, 4, 6]
    assert all(step.loss > 0 and step.gradient_norm > 0 for step in steps)
    assert steps[-1].held_out is not None
    network, stored = load_model(tmp_path)
    assert stored == recipe and checkpoints(tmp_path)
    if isinstance(recipe, Compression):
        assert network.scale != 1  # fitted at the end


def noise(recipe: Recipe, number: int) -> ImageSet | LatentSet:
    """A data set of noise."""
    x_0, y = example(recipe, number)
    if getattr(recipe, "autoencoder", ""):
        return LatentSet(x_0, y)
    return ImageSet(((x_0 + 1) * 127.5).round().byte(), y, ("noise",))


def commands() -> Iterator[list[str]]:
    """Every ``diffbook`` command in the page's code, without what starts it."""
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("$r", "fashion-gpu").splitlines():
            if found := re.search(r"(?:diffbook|diffbook\.cli) (.*?)(?:\s*#.*|\s*>.*|; done)?$", line.strip()):
                yield shlex.split(found[1])


def test_every_command_on_the_page_is_one() -> None:
    """They parse, and the recipes in them exist; three of them train what the run book is about."""
    found = list(commands())
    assert len(found) >= 15
    options = [_parser().parse_args(arguments) for arguments in found]
    names = [o.name for o, arguments in zip(options, found, strict=True) if arguments[0] == "train"]
    assert set(names) <= set(RECIPES)
    book = [o for o, a in zip(options, found, strict=True) if a[0] == "train" and o.folder is not None]
    assert [o.name for o in book] == ["fashion-gpu", "emoji-vae-gpu", "emoji-ldm-gpu"]
    assert book[2].autoencoder == str(book[1].folder)  # the latents are those of the autoencoder just trained


def test_half_an_hour_is_enough_for_the_run_book() -> None:
    page = PAGE.read_text(encoding="utf-8")
    limits = [int(n) for n in re.findall(r"timeout (\d+)", page)]
    assert len(limits) == 3 and all(n <= 600 for n in limits) and sum(limits) <= (30 - 3 - 4) * 60
