"""Parts of a batch and several processes: the same gradients as one process with the whole batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffbook import training
from diffbook.data import fashion_subset
from diffbook.processes import Loss, Processes, find_processes, own_rows
from diffbook.recipes import RECIPES, Compression, Recipe
from diffbook.training import State, train
from diffbook.weights import checkpoints, read_tensors

SMOKE = replace(RECIPES["fashion-smoke"], images=256, ema=0.9)
SMALL: dict[str, Recipe] = {
    "diffusion": SMOKE,
    "flipped": replace(SMOKE, flip=True, predicts="eps"),
    "unconditional": replace(
        RECIPES["cifar10-gpu"],
        options={"channels": 1, "widths": [8, 16], "blocks": 1},
        size=28,
        data="fashion-subset",
        batch=32,
        autocast=False,
    ),
    "vae": replace(
        RECIPES["fashion-vae"],
        options=RECIPES["fashion-vae"].options | {"widths": [8, 16], "blocks": 1},
        data="fashion-subset",
    ),
    "compression": Compression(
        name="small",
        about="",
        network="SpatialVAE",
        options={"channels": 1, "size": 28, "widths": [8, 16], "blocks": 1, "latent": 2, "patch": 2},
        data="fashion-subset",
        images=256,
        batch=32,
        lr=1e-3,
        kl_weight=0.1,
    ),
    "classifier": replace(RECIPES["fashion-classifier"], data="fashion-subset", batch=32, warmup=0, images=256),
}


def gradients(recipe: Recipe, processes: Processes | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first batch of a run, with weights that are not the first: there some are zero."""
    state = State(recipe, processes or Processes("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in state.network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    data = fashion_subset()
    loss = training._gradients(state, data.x(slice(recipe.batch)), data.labels[: recipe.batch])
    return loss.item(), {k: p.grad.clone() for k, p in state.network.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Equal but for rounding, each tensor by the size of its largest number."""
    assert a.keys() == b.keys() and len(a) > 5
    size = max(value.abs().max().item() for value in a.values())
    for name, value in a.items():
        assert (value - b[name]).abs().max() < 2e-5 * size, name


@pytest.mark.parametrize("kind", SMALL)
def test_parts_have_the_gradient_of_the_whole(kind: str) -> None:
    loss, whole = gradients(SMALL[kind])
    in_parts, parts = gradients(replace(SMALL[kind], parts=4))
    assert in_parts == pytest.approx(loss, rel=1e-5)
    assert_close(whole, parts)
    assert max(value.abs().max() for value in whole.values()) > 1e-4


def test_every_part_has_noise_of_its_own() -> None:
    """The parts together see what the whole batch sees: no part repeats another's noise or times."""
    data, seen = fashion_subset(), []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append((x, t, y))
            return x

    def call(rows: slice) -> tuple[torch.Tensor, ...]:
        loss = Loss(SMOKE, Spy())
        loss(data.x(slice(32)), data.labels[:32], torch.Generator().manual_seed(0), rows)
        return seen.pop()

    whole, parts = call(slice(0, 32)), [call(rows) for rows in own_rows(32, Processes("cpu"), 4)]
    for i in range(3):
        assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_dropout_differs_between_parts_and_not_between_runs() -> None:
    recipe = replace(SMOKE, options=SMOKE.options | {"dropout": 0.5}, parts=2)
    _, first = gradients(recipe)
    _, again = gradients(recipe)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    state = State(recipe, Processes("cpu"))
    x_0, y = fashion_subset().x(slice(32)), fashion_subset().labels[:32]
    masks: list[torch.Tensor] = []
    dropout = next(m for m in state.network.modules() if isinstance(m, torch.nn.Dropout))
    dropout.register_forward_hook(lambda module, inputs, output: masks.append((output == 0) & (inputs[0] != 0)))
    training._gradients(state, x_0, y)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(("count", "index", "parts"), [(1, 0, 1), (1, 0, 4), (2, 0, 2), (2, 1, 2), (4, 3, 1)])
def test_own_rows(count: int, index: int, parts: int) -> None:
    processes = Processes("cpu")
    processes.count, processes.index = count, index
    rows = own_rows(16, processes, parts)
    share = 16 // count
    assert [i for part in rows for i in range(16)[part]] == list(range(index * share, (index + 1) * share))
    assert len(rows) == parts


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a batch of 32 images cannot be divided into 3 equal parts \(1 processes"):
        State(replace(SMOKE, parts=3), Processes("cpu"))
    matcher = RECIPES["emoji-matcher"]
    with pytest.raises(ValueError, match="emoji-matcher compares each image with all captions of its batch"):
        matcher.loss(matcher.build(), torch.zeros(4, 3, 64, 64), torch.zeros(4, 12), torch.Generator(), slice(0, 2))


def test_several_without_accelerate_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(find_processes("cpu")) is Processes
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"need accelerate: pip install accelerate"):
        find_processes("cpu")


SCRIPT = """
import sys, torch
from pathlib import Path
from test_processes import SMALL, SMOKE, gradients
from diffbook.processes import find_processes
from diffbook.training import train
from diffbook.weights import write_tensors
from dataclasses import replace
torch.set_num_threads(1)
folder, processes = Path(sys.argv[1]), find_processes("cpu")
assert processes.count == 2
for name, recipe in SMALL.items():
    loss, found = gradients(recipe, processes)
    write_tensors(folder / f"{name}-{processes.index}.safetensors", found, {"loss": loss})
for step in train(replace(SMOKE, parts=2), folder / "run", processes=processes):
    if step.images == 96:  # both leave after the same step, and go on
        break
processes.wait()
# the second process is asked to stop: both do
steps = []
for step in train(replace(SMOKE, parts=2), folder / "run", processes=processes):
    steps.append(step.images)
    processes.stop_asked = processes.index == 1 and step.images >= 160
    if step.stop:
        break
processes.stop_asked = False
assert steps == [128, 160, 192], steps
processes.wait()
list(train(replace(SMOKE, parts=2), folder / "run", processes=processes))
processes.wait()
# weights that have drifted apart are noticed when a checkpoint is due
try:
    for step in train(SMOKE, folder / "drifted", processes=processes, save_every=0):
        if processes.index == 1:
            next(iter(step.averaged.parameters())).add_(1.0)
except ValueError as error:
    (folder / f"error-{processes.index}").write_text(str(error))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes with gloo, started by torchrun, left what they computed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--log-dir", str(folder / "logs")]
    done = subprocess.run(
        [sys.executable, *launch, str(folder / "script.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", SMALL)
def test_two_processes_have_the_gradients_of_one(two: Path, kind: str) -> None:
    loss, whole = gradients(SMALL[kind])
    (first, about), (second, other) = (read_tensors(two / f"{kind}-{i}.safetensors") for i in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # both have the mean
    assert (about["loss"] + other["loss"]) / 2 == pytest.approx(loss, rel=1e-5)
    assert about["loss"] != other["loss"]  # each computed another half
    assert_close(whole, first)


def test_two_processes_end_with_the_weights_of_one(two: Path, tmp_path: Path) -> None:
    """Stopped twice on the way, in two parts each; one process's run never was."""
    losses = [step.loss for step in train(SMOKE, tmp_path)]
    one, both = (read_tensors(checkpoints(folder)[-1])[0] for folder in (tmp_path, two / "run"))
    assert one.keys() == both.keys() and losses[0] > 0
    for name, value in one.items():
        assert torch.allclose(value.float(), both[name].float(), atol=3e-4), name
    moved = read_tensors(checkpoints(two / "run")[-1])[0]["network.stem.weight"] - SMOKE.build().stem.weight
    assert moved.abs().max() > 3e-3, "the comparison would notice: weights move further than its tolerance"


def test_processes_that_drift_apart_are_noticed(two: Path) -> None:
    for i in (0, 1):
        assert re.search("after 64 images the processes have different weights", (two / f"error-{i}").read_text())
    assert [path.stem[-3:] for path in checkpoints(two / "drifted")] == ["032"]
