"""What a run will cost: counted where it can be counted, and not far from what is measured."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffbook import planning
from diffbook.cli import main
from diffbook.data import ImageSet
from diffbook.planning import example, megaflops, memory, plan, saved_bytes, seconds_an_image
from diffbook.processes import Processes
from diffbook.recipes import RECIPES, recipe_from_json
from diffbook.training import training_set


@pytest.mark.parametrize("name", RECIPES)
def test_examples_have_the_shape_of_the_data(name: str) -> None:
    recipe = RECIPES[name]
    x_0, y = example(recipe, 3)
    assert x_0.dtype == torch.float32 and len(x_0) == len(y) == 3 and x_0.abs().max() <= 1 < 2 * x_0.std() + 1
    if recipe.data in ("fashion-mnist", "emoji64") and not getattr(recipe, "autoencoder", ""):
        bundled = replace(recipe, data="fashion-subset" if recipe.data == "fashion-mnist" else "emoji64")
        data = training_set(bundled)
        assert isinstance(data, ImageSet)
        assert x_0.shape[1:] == data.x(slice(1)).shape[1:] and y.shape[1:] == data.labels.shape[1:]
        assert y.dtype == data.labels.dtype


def test_operations_are_counted_forward_and_backward() -> None:
    """A single convolution: 2 · 9 · C · C' · H · W forward; twice that backward, without the gradient of the input."""
    recipe = replace(RECIPES["fashion-smoke"], batch=64)
    count = megaflops(recipe)

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    class One(type(recipe)):  # type: ignore[misc]
        def build(self) -> nn.Module:
            return Convolution()

    one = One(**{k: v for k, v in recipe.to_json().items() if k != "kind"})
    forward = 2 * 9 * 28 * 28 / 1e6
    assert megaflops(one) == pytest.approx(2 * forward)  # forward, and the gradient of the weights
    assert count > 100 * forward
    assert megaflops(RECIPES["fashion-cpu"]) > 30 * count


def test_what_is_kept_for_the_backward_pass() -> None:
    x, w = torch.rand(100, 50), torch.rand(50, 10, requires_grad=True)
    assert saved_bytes(lambda: x @ w) == 4 * 100 * 50  # the gradient of w needs x alone
    assert saved_bytes(lambda: (x @ w).square()) == 4 * (100 * 50 + 100 * 10)


PEAK = """
import re, sys, torch
from pathlib import Path
from dataclasses import replace
from diffbook.planning import example
from diffbook.processes import Processes
from diffbook.recipes import RECIPES
from diffbook.training import State, take_step
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
recipe = replace(RECIPES["fashion-cpu"], batch=int(sys.argv[1]), parts=int(sys.argv[2]))
take_step(State(replace(recipe, batch=4, parts=1), Processes("cpu")), *example(recipe, 4))
Path("/proc/self/clear_refs").write_text("5")
before = peak()
state = State(recipe, Processes("cpu"))
for _ in range(2):
    take_step(state, *example(recipe, recipe.batch))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("parts", [1, 4])
def test_the_estimate_of_memory_is_near_the_peak(parts: int) -> None:
    """The peak also has what a step computes on the way, and what the allocator does not give back."""
    command = [sys.executable, "-c", PEAK, "256", str(parts)]
    measured = float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    estimate = memory(replace(RECIPES["fashion-cpu"], batch=256, parts=parts))
    assert 0.6 * estimate < measured < 2 * estimate


def test_memory_follows_batch_parts_processes_and_precision() -> None:
    recipe = replace(RECIPES["fashion-smoke"], batch=64)
    weights = 5 * 4 * sum(p.numel() for p in recipe.build().parameters()) / 2**20
    whole = memory(recipe) - weights
    assert memory(replace(recipe, batch=128)) - weights == pytest.approx(2 * whole)
    assert memory(replace(recipe, parts=4)) - weights == pytest.approx(whole / 4)
    assert memory(recipe, processes=2) - weights == pytest.approx(whole / 2)
    assert memory(replace(recipe, autocast=True)) - weights == pytest.approx(whole / 2)


def test_a_plan_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPES["fashion-smoke"], images=1000)
    monkeypatch.setattr(planning, "seconds_an_image", lambda recipe, device: 0.02)
    processes = Processes("cpu")
    alone = plan(recipe, processes)
    assert alone["images_per_second"] == 50 and alone["hours"] == pytest.approx(20 / 3600, rel=1e-2)
    assert alone["steps"] == 32 and alone["parameters"] == 18_116
    assert alone["gigaflops_per_second"] == pytest.approx(50 * alone["megaflops_per_image"] / 1e3, rel=1e-2)
    processes.count = 2
    both = plan(recipe, processes)
    assert both["images_per_second"] == 100 and both["hours"] == pytest.approx(alone["hours"] / 2, rel=1e-2)


def test_time_is_that_of_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def step(state: object, x_0: torch.Tensor, y: torch.Tensor) -> None:
        calls.append(len(x_0))

    monkeypatch.setattr(planning, "take_step", step)
    recipe = replace(RECIPES["fashion-smoke"], batch=512)
    assert seconds_an_image(recipe) > 0 and calls == [64] * 6  # a batch for a GPU is too much for a CPU
    calls.clear()
    seconds_an_image(replace(recipe, parts=16))
    assert calls == [32] * 6


@pytest.mark.parametrize("name", ["emoji-ldm-gpu", "folder-vae", "cifar10-gpu"])
def test_dry_run_needs_neither_data_nor_autoencoder(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path
) -> None:
    monkeypatch.setattr(planning, "seconds_an_image", lambda recipe, device: 0.1)
    monkeypatch.setattr(planning, "megaflops", lambda recipe: 1.0)
    monkeypatch.setattr(planning, "memory", lambda recipe, processes: 1.0)
    assert main(["train", name, "--dry-run", "--folder", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["name"] == name and result["images_per_second"] == 10
    assert not (tmp_path / "run").exists()


def test_dry_run_is_a_table_a_person_reads(capsys) -> None:
    assert main(["train", "fashion-smoke", "--dry-run", "--images", "3200"]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["steps"] == "100" and float(lines["images_per_second"]) > 0 and float(lines["hours"]) > 0


def test_recipes_of_before_parts_are_still_read() -> None:
    stored = RECIPES["fashion-smoke"].to_json()
    del stored["parts"]
    assert recipe_from_json(stored) == RECIPES["fashion-smoke"]
