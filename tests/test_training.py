"""The training loop: what it computes, and that nothing is ever lost."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffbook import training
from diffbook.data import fashion_subset
from diffbook.diffusion import q_sample, v_target
from diffbook.processes import Processes
from diffbook.recipes import RECIPES, Classification, Diffusion, recipe_from_json, stream
from diffbook.runs import TrainingError, read_log
from diffbook.training import image_order, train
from diffbook.weights import WeightsError, checkpoints, load_model, read_tensors, write_atomically, write_tensors

SMOKE = replace(RECIPES["fashion-smoke"], images=256, ema=0.9)


def tensors_of(folder):
    return read_tensors(checkpoints(folder)[-1])[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def take(n, *arguments, **keywords):
    steps = train(*arguments, **keywords)
    taken = [next(steps) for _ in range(n)]
    steps.close()
    return taken


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of 8 steps that was never interrupted, and its steps."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, list(train(SMOKE, folder))


def test_records(whole):
    folder, steps = whole
    assert [step.images for step in steps] == list(range(32, 257, 32))
    assert all(math.isfinite(step.loss) and step.gradient_norm > 0 for step in steps)
    assert [step.lr for step in steps] == [SMOKE.learning_rate(n) for n in range(0, 256, 32)]
    log = read_log(folder / "log.jsonl")
    assert [line["images"] for line in log] == [256] and log[0]["cpu_seconds"] > 0 < log[0]["seconds"]
    assert list(train(SMOKE, folder)) == []  # finished: nothing more to do


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path, whole, dropout):
    recipe = replace(SMOKE, options=SMOKE.options | {"dropout": dropout})
    folder, steps = whole
    if dropout:
        folder = tmp_path / "whole"
        steps = list(train(recipe, folder))
    resumed = []
    for n in (1, 3):
        resumed += take(n, recipe, tmp_path / "run")
        torch.manual_seed(n)  # what others draw in between changes nothing
        torch.rand(n)
    resumed += list(train(recipe, tmp_path / "run"))
    assert [step.loss for step in resumed] == [step.loss for step in steps]
    assert equal(tensors_of(tmp_path / "run"), tensors_of(folder))
    assert {"ema.stem.weight", "network.stem.weight", "optimizer.stem.weight.exp_avg"} <= tensors_of(folder).keys()


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(2, SMOKE, tmp_path)
    assert torch.equal(torch.rand(3), expected)


SCRIPT = """
import sys, torch
from dataclasses import replace
from diffbook.recipes import RECIPES
from diffbook.training import train
recipe = replace(RECIPES["fashion-smoke"], images=256, ema=0.9)
torch.set_num_threads(int(sys.argv[2]))
for step in train(recipe, sys.argv[1], save_every=0):
    print(step.images, flush=True)
"""


def test_killed_at_any_moment_and_resumed(tmp_path, whole):
    """SIGKILL after some steps: no handler runs. At most the step after the last checkpoint is lost."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 96:
                process.kill()
                break
    assert process.wait() == -signal.SIGKILL
    done = int(checkpoints(tmp_path)[-1].stem.removeprefix("checkpoint-"))
    assert 96 <= done < 256
    assert next(iter(train(SMOKE, tmp_path))).images == done + 32
    list(train(SMOKE, tmp_path))
    assert equal(tensors_of(tmp_path), tensors_of(whole[0]))


def test_each_epoch_sees_every_image_once_in_another_order():
    orders = image_order(0, 0, 30, 10).reshape(3, 10)
    assert orders.sort(dim=1).values.tolist() == [list(range(10))] * 3
    assert len({tuple(order) for order in orders.tolist()}) == 3
    parts = [image_order(0, start, 6, 10) for start in range(0, 30, 6)]
    assert torch.equal(torch.cat(parts), orders.flatten())
    assert not torch.equal(image_order(1, 0, 30, 10), orders.flatten())


def test_streams_depend_on_every_argument():
    def first(*key):
        return torch.rand(2, generator=stream(*key)).tolist()

    assert first(0, "noise", 1) == first(0, "noise", 1)
    keys = [(0, "noise", 1), (1, "noise", 1), (0, "epoch", 1), (0, "noise", 2)]
    assert len({tuple(first(*key)) for key in keys}) == 4


def test_learning_rate_is_warm_up_then_half_a_cosine():
    recipe = replace(SMOKE, lr=2.0, images=1000, warmup=100, batch=10)
    assert recipe.learning_rate(0) == pytest.approx(2 * 10 / 110)
    assert recipe.learning_rate(90) == pytest.approx(2 * 100 / 110)
    assert recipe.learning_rate(100) == 2
    assert recipe.learning_rate(550) == pytest.approx(1)
    assert recipe.learning_rate(1000) == pytest.approx(0) == recipe.learning_rate(2000)


def test_ema_follows_the_formula(whole):
    assert SMOKE.ema_decay(0) == 0.1 and SMOKE.ema_decay(32) == 2 / 11 and SMOKE.ema_decay(10**6) == 0.9
    state = training.State(SMOKE, Processes("cpu"))
    data, expected = fashion_subset(), None
    for n in range(4):
        order = image_order(0, state.images, 32, len(data))
        before = [p.clone() for p in state.averaged.parameters()] if expected is None else expected
        training.take_step(state, data.x(order), data.labels[order])
        d = (1 + n) / (10 + n)
        expected = [d * e + (1 - d) * p.detach() for e, p in zip(before, state.network.parameters(), strict=True)]
    assert all(torch.allclose(e, p, atol=1e-6) for e, p in zip(expected, state.averaged.parameters(), strict=True))
    assert not torch.equal(expected[0], next(state.network.parameters()))


class Spy(nn.Module):
    """Returns zeros, so that the loss is the mean square of the target; keeps what it was called with."""

    def forward(self, x, t, y):
        self.x, self.t, self.y = x, t, y
        return torch.zeros_like(x)


def test_loss_is_the_formula_with_stratified_times():
    B, spy = 64, Spy()
    data = fashion_subset()
    x_0, y = data.x(slice(B)), data.labels[:B]
    for predicts in ("v", "eps", "x_0"):
        recipe = replace(SMOKE, predicts=predicts, T=100)
        loss = recipe.loss(spy, x_0, y, stream(0, "noise", 0))
        generator = stream(0, "noise", 0)  # the same draws again
        torch.rand(B, generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        schedule = recipe.noise_schedule()
        target = {"v": v_target(x_0, eps, spy.t, schedule), "eps": eps, "x_0": x_0}[predicts]
        assert torch.equal(spy.x, q_sample(x_0, eps, spy.t, schedule))
        assert torch.allclose(loss, target.square().mean())
    edges = torch.arange(B) * 100 / B
    assert ((spy.t - 1 >= edges.floor()) & (spy.t - 1 <= edges + 100 / B)).all()  # one in each part
    assert spy.t.min() >= 1 and spy.t.max() <= 100


def test_labels_are_dropped_as_often_as_the_recipe_says():
    spy, y = Spy(), torch.arange(20_000) % 10
    SMOKE.loss(spy, torch.zeros(20_000, 1, 1, 1), y, stream(0, "noise", 0))
    dropped = spy.y == 10
    assert abs(dropped.double().mean().item() - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 20_000)
    assert torch.equal(spy.y[~dropped], y[~dropped])


def test_recipes_survive_json_and_are_told_apart():
    for recipe in RECIPES.values():
        assert recipe_from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert isinstance(RECIPES["fashion-cpu"], Diffusion) and isinstance(RECIPES["fashion-classifier"], Classification)
    with pytest.raises(ValueError, match="unknown kind"):
        recipe_from_json({"kind": "os.system"})
    with pytest.raises(ValueError, match="not a recipe of this version"):
        recipe_from_json(SMOKE.to_json() | {"wings": 2})


def test_classifier_trains(tmp_path):
    recipe = replace(RECIPES["fashion-classifier"], data="fashion-subset", images=640, batch=32, warmup=0)
    steps = list(train(recipe, tmp_path))
    assert sum(s.loss for s in steps[-5:]) < 0.8 * sum(s.loss for s in steps[:5])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, bad):
    take(3, SMOKE, tmp_path)
    good = tensors_of(tmp_path)
    loss = Diffusion.loss
    calls = []

    def later_bad(self, *arguments):
        calls.append(1)
        return loss(self, *arguments) * (bad if len(calls) == 2 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Diffusion, "loss", later_bad)
        with pytest.raises(TrainingError, match=r"step 4, after 128 images: the loss is (nan|inf)"):
            list(train(SMOKE, tmp_path))
    assert equal(tensors_of(tmp_path), good) and len(calls) == 2
    assert next(iter(train(SMOKE, tmp_path))).images == 128  # and goes on


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path):
    state = training.State(SMOKE, Processes("cpu"))
    state.network.stem.weight.register_hook(lambda g: g * float("nan"))
    before = {k: v.clone() for k, v in state.network.state_dict().items()}
    with pytest.raises(TrainingError, match="norm of its gradient nan"):
        training.take_step(state, fashion_subset().x(slice(32)), fashion_subset().labels[:32])
    assert equal(before, state.network.state_dict())


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[-500] ^= 1
    path.write_bytes(content)


def damage_text(path):
    path.write_text("hello")


def damage_empty(path):
    path.write_bytes(b"")


def damage_foreign(path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, path)


def damage_export(path):
    write_tensors(path, {"a": torch.zeros(1)}, {"recipe": SMOKE.to_json()})


def damage_network(path):
    tensors, about = read_tensors(path)
    write_tensors(path, {k: v for k, v in tensors.items() if "middle" not in k}, about)


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_truncate, "is damaged"),
        (damage_flip, "wrong checksum"),
        (damage_text, "is damaged or no safetensors file"),
        (damage_empty, "is damaged or no safetensors file"),
        (damage_foreign, "was not written by diffbook"),
        (damage_export, "no checkpoint of a training run"),
        (damage_network, "does not fit the network"),
    ],
)
def test_damaged_and_foreign_checkpoints(tmp_path, damage, words):
    take(1, SMOKE, tmp_path)
    take(1, SMOKE, tmp_path)
    first, last = checkpoints(tmp_path)
    damage(last)
    content = last.read_bytes()
    with pytest.raises(WeightsError, match=words) as caught:
        next(train(SMOKE, tmp_path))
    assert "\n" not in str(caught.value) and last.read_bytes() == content and first.exists()
    last.unlink()  # what the message says
    assert take(1, SMOKE, tmp_path)[0].images == 64


def test_a_changed_recipe_is_refused_and_named(tmp_path):
    take(1, SMOKE, tmp_path)
    content = checkpoints(tmp_path)[-1].read_bytes()
    with pytest.raises(TrainingError, match=r"another recipe \(lr was 0.002 and is 0.1\)"):
        next(train(replace(SMOKE, lr=0.1), tmp_path))
    assert checkpoints(tmp_path)[-1].read_bytes() == content
    assert take(1, replace(SMOKE, about="other words"), tmp_path)[0].images == 64


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    steps = train(SMOKE, tmp_path)
    next(steps)
    with pytest.raises(TrainingError, match="another run is using"):
        next(train(SMOKE, tmp_path))
    steps.close()
    assert take(1, SMOKE, tmp_path)[0].images == 64


def test_full_disk_while_saving(tmp_path):
    """The system refuses to write more than 100 kB into a file: a checkpoint is larger."""
    take(2, SMOKE, tmp_path)
    good = tensors_of(tmp_path)
    steps = train(SMOKE, tmp_path)
    next(steps)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"could not write .*; what was there before is intact") as caught:
            steps.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and "\n" not in str(caught.value)
    assert equal(tensors_of(tmp_path), good) and not list(tmp_path.glob(".*.tmp"))
    assert take(1, SMOKE, tmp_path)[0].images == 96


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_the_last_checkpoints_are_kept_and_the_log_is_not_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    take(4, SMOKE, tmp_path, save_every=0, keep=2)
    assert [p.stem[-3:] for p in checkpoints(tmp_path)] == ["096", "128"]
    checkpoints(tmp_path)[-1].unlink()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"images": 1')  # cut off
    list(train(SMOKE, tmp_path))
    assert [line["images"] for line in read_log(tmp_path / "log.jsonl")] == list(range(32, 257, 32))
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        next(train(SMOKE, tmp_path, keep=0))


def test_load_model_takes_the_averaged_weights(whole):
    network, recipe = load_model(whole[0])
    stored = tensors_of(whole[0])
    assert recipe == SMOKE and not network.training
    assert all(torch.equal(v, stored[f"ema.{k}"]) for k, v in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="no-such-model is no file or folder, and no model of the package"):
        load_model("no-such-model")


def test_load_model_in_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        load_model(tmp_path)


def test_training_needs_few_packages():
    code = (
        "import sys, diffbook.training, diffbook.evaluation, diffbook.cli; "
        "print([m for m in ('matplotlib', 'sklearn', 'IPython', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
def test_a_few_steps_on_a_gpu(tmp_path):
    recipe = replace(SMOKE, autocast=True)
    take(3, recipe, tmp_path, device="cuda")
    steps = list(train(recipe, tmp_path, device="cuda"))
    assert steps[-1].images == 256 and all(math.isfinite(step.loss) for step in steps)


def test_saving_is_regular(tmp_path):
    steps = train(SMOKE, tmp_path, save_every=0.05)
    next(steps)
    time.sleep(0.1)
    next(steps)
    assert checkpoints(tmp_path)  # while it runs
    steps.close()
