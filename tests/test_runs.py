"""The folder of a run: nothing is lost whatever happens, and the best weights are kept."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffbook import runs, training
from diffbook.processes import Processes
from diffbook.recipes import RECIPES, Compression
from diffbook.runs import Best, Log, TrainingError, best_of, read_log
from diffbook.training import train, training_set
from diffbook.weights import WeightsError, checkpoints, load_model, read_tensors

SMOKE = replace(RECIPES["fashion-smoke"], images=256, ema=0.9)

KILLER = '''
"""Run training in a child, kill it at a random moment, twenty times; then let it end. Prints what was seen as JSON."""
import json, os, random, select, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffbook.recipes import RECIPES
from diffbook.runs import read_log
from diffbook.training import train
from diffbook.weights import checkpoints, read_tensors

recipe = replace(RECIPES["fashion-smoke"], images=32 * int(sys.argv[2]), ema=0.9)
folder, rest = Path(sys.argv[1]), random.Random(0)

def child(report):
    for step in train(recipe, folder, save_every=0, keep=2):
        os.write(report, step.images.to_bytes(8, "big"))

next(iter(train(recipe, folder.with_name("warm"))))  # children then have in memory what is loaded once
kills, unfinished, last_seen = 0, 0, 0
while kills < 20:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(write)
        os._exit(0)
    os.close(write)
    if kills % 4:  # three times of four it has made a step; else it may still be reading what is there
        select.select([read], [], [], 60)
    time.sleep(rest.uniform(0, 0.2))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    told = b""
    while part := os.read(read, 1 << 16):
        told += part
    os.close(read)
    killed = os.WIFSIGNALED(status)
    assert killed, "the run is too short for twenty kills"
    kills += 1
    unfinished += len(list(folder.glob(".*.tmp")))
    saved = [int(path.stem.removeprefix("checkpoint-")) for path in checkpoints(folder)]
    told_last = int.from_bytes(told[-8:], "big") if told else last_seen
    last = max(saved, default=0)
    assert last >= told_last >= last_seen, (saved, told_last, last_seen)
    last_seen = told_last
    for path in [*checkpoints(folder), *folder.glob("best.safetensors")]:
        read_tensors(path)  # every file is whole
    if (folder / "log.jsonl").exists():
        read_log(folder / "log.jsonl")
child(os.open(os.devnull, os.O_WRONLY))
print(json.dumps({"kills": kills, "last": last_seen, "unfinished": unfinished}))
'''


def test_killed_twenty_times_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL, also while files are being written: no saved step is lost, and the end is bit for bit the same."""
    steps = 150
    command = [sys.executable, "-c", KILLER, str(tmp_path / "killed"), str(steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["kills"] == 20 and seen["last"] > 32 * 20, seen
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    list(train(replace(SMOKE, images=32 * steps), tmp_path / "whole"))
    torch.set_num_threads(threads)
    names = {"log.jsonl", "held-out.jsonl", "best.safetensors", "lock"}
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        assert {path.name for path in folder.iterdir()} == names | {path.name for path in checkpoints(folder)}
    for name in (checkpoints(tmp_path / "whole")[-1].name, "best.safetensors"):
        a, b = (read_tensors(tmp_path / folder / name)[0] for folder in ("killed", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (read_log(tmp_path / folder / "held-out.jsonl") for folder in ("killed", "whole"))
    assert a == b and len(a) == 3
    logs = [read_log(tmp_path / folder / "log.jsonl") for folder in ("killed", "whole")]
    assert [line["images"] for line in logs[0]] == [line["images"] for line in logs[1]]


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path: Path) -> None:
    tmp_path.joinpath(".checkpoint-000000000032.safetensors.99.tmp").write_text("half")
    list(train(SMOKE, tmp_path))
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    for _ in range(2):
        next(steps := train(SMOKE, tmp_path))
        steps.close()
    first, last = checkpoints(tmp_path)
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=f"delete it; the run then goes on from {first.name}"):
        next(train(SMOKE, tmp_path))
    last.unlink()
    first.write_text("rubbish")
    with pytest.raises(WeightsError) as caught:
        next(train(SMOKE, tmp_path))
    assert "goes on from" not in str(caught.value)  # there is none before


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next(steps := train(SMOKE, tmp_path))
    steps.close()
    content = checkpoints(tmp_path)[-1].read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"could not write \(No space left .*; what was there before is intact"):
            list(train(SMOKE, tmp_path, save_every=0))
    assert checkpoints(tmp_path)[-1].read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"lock", checkpoints(tmp_path)[-1].name}
    assert next(train(SMOKE, tmp_path)).images == 64


def best(folder: Path, **changes: Any) -> Best:
    recipe = replace(SMOKE, **changes)
    return Best(folder, recipe, 0, training_set(recipe, split="test", at_most=100))


def test_the_best_weights_are_kept_and_only_replaced_by_better_ones(tmp_path: Path) -> None:
    keeper, data, losses = best(tmp_path), training_set(SMOKE), []
    networks = [SMOKE.build() for _ in range(3)]
    with torch.no_grad():
        networks[0].head[-1].bias.fill_(3.0)  # worse than the first weights, which say 0
        networks[2].head[-1].bias.fill_(5.0)
    for i, network in enumerate(networks):
        losses.append(keeper.measure(network, 32 * (i + 1), data))
    assert losses[1] < losses[0] < losses[2]
    assert best_of(tmp_path) == (64, losses[1])
    kept, recipe = load_model(tmp_path / "best.safetensors")
    assert recipe == SMOKE
    assert all(torch.equal(value, networks[1].state_dict()[name]) for name, value in kept.state_dict().items())
    assert [line["loss"] for line in read_log(tmp_path / "held-out.jsonl")] == pytest.approx(losses, abs=1e-6)
    again = best(tmp_path)  # after a restart from the very beginning
    assert again.smallest == float("inf")
    later = Best(tmp_path, SMOKE, 96, training_set(SMOKE, split="test", at_most=100))
    assert later.smallest == float("inf")  # the log was cut by the restart before


def test_a_resumed_run_knows_its_best(tmp_path: Path) -> None:
    keeper = best(tmp_path)
    loss = keeper.measure(SMOKE.build(), 64, training_set(SMOKE))
    again = Best(tmp_path, SMOKE, 64, keeper.data)
    assert again.smallest == pytest.approx(loss, abs=1e-6)
    assert best_of(tmp_path / "nowhere") is None


def test_held_out_images_are_those_of_the_test_and_their_noise_is_always_the_same(tmp_path: Path) -> None:
    keeper = best(tmp_path)
    test = training_set(SMOKE, split="test")
    assert len(keeper.data) == 100 and torch.equal(keeper.data.x(slice(2)), test.x(torch.tensor([0, len(test) // 100])))
    network = SMOKE.build()
    assert keeper.loss(network) == keeper.loss(network)
    assert best(tmp_path, seed=1).loss(network) != keeper.loss(network)


def test_the_mean_over_batches_counts_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = best(tmp_path, predicts="x_0", label_drop=0.0)
    x_0 = keeper.data.x(slice(None))
    monkeypatch.setattr(runs, "AT_ONCE", 30)  # the last batch has 10

    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    assert keeper.loss(Zero()) == pytest.approx(x_0.square().mean().item(), rel=1e-5)


def test_due_twenty_times_a_run_but_not_more_often_than_every_fifty_steps(tmp_path: Path) -> None:
    keeper = best(tmp_path, images=320_000)
    due = [n for n in range(32, 320_001, 32) if keeper.is_due(n)]
    assert due == list(range(16_000, 320_001, 16_000))
    short = best(tmp_path, images=3200)
    assert [n for n in range(32, 3201, 32) if short.is_due(n)] == [1600, 3200]
    assert [n for n in range(32, 257, 32) if best(tmp_path).is_due(n)] == [256]


def test_the_best_autoencoder_has_its_scale(tmp_path: Path) -> None:
    """What is left to do at the end of a run is done for the best weights too, and the run's own are left alone."""
    recipe = Compression(
        name="small",
        about="",
        network="SpatialVAE",
        options={"channels": 1, "size": 28, "widths": [8, 16], "blocks": 1, "latent": 2, "patch": 2},
        data="fashion-subset",
        images=64,
        batch=32,
        lr=1e-3,
        kl_weight=0.1,
    )
    network = recipe.build()
    Best(tmp_path, recipe, 0, training_set(recipe, split="test", at_most=50)).measure(network, 32, training_set(recipe))
    kept, _ = load_model(tmp_path / "best.safetensors")
    assert kept.scale != 1 and network.scale == 1


def test_without_held_out_images_training_goes_on_and_says_so(tmp_path: Path) -> None:
    recipe = replace(
        RECIPES["fashion-smoke"],
        data="digits",
        size=8,
        options=RECIPES["fashion-smoke"].options | {"widths": [8, 16]},
        images=32,
    )
    with pytest.warns(UserWarning, match="digits have no test set; the best weights are not kept apart"):
        list(train(recipe, tmp_path))
    assert not (tmp_path / "best.safetensors").exists() and checkpoints(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(train(SMOKE, tmp_path / "other"))


def test_a_log_forgets_what_will_be_logged_again(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    for images in (32, 64, 96):
        log.add(images=images, loss=1.5)
    with open(log.path, "a") as file:
        file.write('{"images": 128, "lo')
    Log(log.path, 64).add(images=96, loss=2.5)
    assert read_log(log.path) == [{"images": i, "loss": loss} for i, loss in ((32, 1.5), (64, 1.5), (96, 2.5))]


def test_what_changes_the_rounding_only_may_change_between_sittings(tmp_path: Path) -> None:
    next(steps := train(SMOKE, tmp_path))
    steps.close()
    assert next(train(replace(SMOKE, parts=2, channels_last=False), tmp_path)).images == 64
    with pytest.raises(TrainingError, match="batch was 32 and is 16"):
        next(train(replace(SMOKE, batch=16), tmp_path))


def test_asked_to_stop_the_step_says_so(tmp_path: Path) -> None:
    processes = Processes("cpu")
    steps = train(SMOKE, tmp_path, processes=processes)
    assert not next(steps).stop
    processes.stop_asked = True
    assert next(steps).stop
    steps.close()
    assert [path.stem[-3:] for path in checkpoints(tmp_path)] == ["064"]


def test_an_autoencoder_is_compiled_in_its_two_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe never calls the network as a whole: to compile that would do nothing."""
    compiled: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    vae, unet = RECIPES["emoji-vae"].build(), SMOKE.build()
    training.compile_network(vae)
    training.compile_network(unet)
    assert compiled == [vae.encoder, vae.decoder, unet]
