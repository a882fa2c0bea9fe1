"""The comparison of speed: that the same work is compared, fairly, and that each trick is really switched off."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from diffbook import bench
from diffbook.bench import CONTESTANTS, RECIPE, Diffusers, Ours, check_matched, in_turn, present, ratio, work
from diffbook.cli import main
from diffbook.processes import Processes
from diffbook.training import State

CPU = torch.device("cpu")


def test_the_networks_are_the_same_amount_of_work() -> None:
    here, _ = present()
    costs = {name: work(CONTESTANTS[name](CPU, False).network) for name in here}
    check_matched(costs)
    assert costs["diffusers"][0] == costs["diffbook"][0] == 2_785_249
    assert costs["diffusers"][1] == pytest.approx(costs["diffbook"][1], rel=1e-4)  # the very same architecture


@pytest.mark.parametrize(
    ("cost", "words"), [((120, 50.0), "1.20 times our parameters"), ((100, 40.0), "0.80 times our op")]
)
def test_unequal_work_is_refused(cost: tuple[int, float], words: str) -> None:
    with pytest.raises(ValueError, match=f"not comparable: other has {words}"):
        check_matched({"diffbook": (100, 50.0), "other": cost})
    check_matched({"diffbook": (100, 50.0), "other": (109, 46.0)})


def test_all_have_their_turn_in_every_round_and_the_first_is_not_counted() -> None:
    calls: list[str] = []
    jobs: dict[str, Callable[[], object]] = {name: (lambda name=name: calls.append(name)) for name in "abc"}  # type: ignore[misc]
    seconds = in_turn(jobs, 3, CPU)
    assert ["".join(calls[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "bca", "cab", "abc"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_taken_within_rounds() -> None:
    """Ours is twice as fast in every round, though the machine becomes ten times slower on the way."""
    slow = [1.0, 1.0, 10.0, 10.0, 10.0]
    assert ratio([2 * s for s in slow], slow) == {"median": 2, "low": 2, "high": 2}
    assert ratio([3.0], [2.0]) == {"median": 1.5, "low": 1.5, "high": 1.5}


def test_time_is_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    assert in_turn({"a": lambda: None}, 2, CPU) == {"a": [1.0, 1.0]}


@pytest.mark.parametrize("kind", [Ours, Diffusers])
def test_a_step_trains_and_averages(kind: type[Any]) -> None:
    contestant = kind(CPU, False)
    before = [p.clone() for p in contestant.network.parameters()]
    for _ in range(2):
        contestant.step(bench.images(4, CPU))
    moved = [not torch.equal(a, b) for a, b in zip(before, contestant.network.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    with torch.no_grad():
        predicted = contestant.call(bench.images(2, CPU), torch.tensor([1, 1000]))
    assert predicted.shape == (2, 1, 28, 28)


def test_compare_and_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers belong together; what is not installed is named, and loudly."""
    monkeypatch.setattr(bench, "MODULES", {"diffusers": "diffusers", "denoising-diffusion-pytorch": "no_such_module"})
    monkeypatch.setattr(bench, "peak_memory", lambda name, *_: {"diffbook": 100, "diffusers": None}[name])
    monkeypatch.setattr(bench, "MATRIX", 64)
    assert main(["bench", "--rounds", "2", "--batch", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours, theirs = result["contestants"]["diffbook"], result["contestants"]["diffusers"]
    assert ours["training_ratio"]["median"] == 1 and theirs["training_ratio"]["median"] > 0
    assert ours["gigaflops"] == pytest.approx(ours["training"] * ours["megaflops_per_image"] / 1e3, rel=0.02)
    assert ours["share_of_peak"] == pytest.approx(ours["gigaflops"] / result["peak_gigaflops"], rel=0.02)
    assert ours["peak_mebibytes"] == 100 and result["missing"] == ["denoising-diffusion-pytorch"]
    assert set(result["overhead"]) == {"DDPM", "DDIM", "DPM-Solver++(2M)"}
    assert theirs["peak_mebibytes"] is None
    text = bench.table(result)
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("diff")][:2] == ["100", "?"]
    name = "denoising-diffusion-pytorch"
    assert f"NOT MEASURED: {name} cannot be imported: pip install {name}" in text
    assert f"diffusers {result['overhead']['DDIM']['diffusers']:g}" in text and "medians of 2 rounds" in text


def test_a_library_that_is_there_in_part_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was installed without what it needs."""
    (tmp_path / "half_of_it.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bench, "MODULES", {"diffusers": "diffusers", "denoising-diffusion-pytorch": "half_of_it"})
    assert present() == (["diffbook", "diffusers"], ["denoising-diffusion-pytorch"])


def test_memory_is_unknown_where_nothing_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STATUS", tmp_path / "none")
    assert bench.peak_memory("diffbook", CPU, 2, False) is None


def test_what_the_machine_cannot_do_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_compiler(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand a long trace")

    monkeypatch.setattr(bench, "compile_network", lambda network: setattr(network, "forward", without_compiler))
    assert main(["bench", "--compile", "--rounds", "1", "--batch", "1"]) == 1
    error = capsys.readouterr().err
    assert "this machine cannot do that (no C++ compiler was found); try" in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_peak_memory_grows_with_the_batch() -> None:
    """What is kept for the backward pass: some 8 MiB an image; the weights are there in both."""
    small, large = (bench.peak_memory("diffbook", CPU, batch, False) for batch in (8, 40))
    assert 100 < large - small < 600


def trick(
    change: Callable[[State], Callable[[torch.Tensor], object]],
) -> tuple[State, Callable[[torch.Tensor], object]]:
    torch.manual_seed(0)
    state = State(RECIPE, Processes(CPU))
    return state, change(state)


def kernels(step: Callable[[torch.Tensor], object]) -> set[str]:
    with profile() as recorded:
        step(bench.images(4, CPU))
    return {event.key for event in recorded.key_averages()}


def test_each_trick_is_switched_off() -> None:
    state, step = trick(bench._step_of)
    assert state.network.stem.weight.shape[1] == 1 and state.network.middle[0].conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    names = kernels(step)
    assert {"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_fused_adamw_"} <= names
    state, step = trick(bench._contiguous)
    assert state.network.middle[0].conv1.weight.is_contiguous()
    _, step = trick(bench._attention_as_products)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in kernels(step)
    _, step = trick(bench._optimizer_tensor_by_tensor)
    assert "aten::_fused_adamw_" not in kernels(step)
    state, step = trick(bench._in_bfloat16)
    assert state.autocast and state.network.middle[0].conv1.weight.is_contiguous()  # the faster layout for it on a CPU
    assert "aten::_to_copy" in kernels(step)
    assert Ours(CPU, False).network.middle[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert Ours(CPU, True).network.middle[0].conv1.weight.is_contiguous()


def test_variants_compute_the_same_step() -> None:
    """But for rounding: otherwise the comparison would be of different things."""
    x, results = bench.images(4, CPU), {}
    for change in (
        bench._step_of,
        bench._contiguous,
        bench._attention_as_products,
        bench._optimizer_tensor_by_tensor,
        bench._average_tensor_by_tensor,
    ):
        state, step = trick(change)
        for _ in range(2):
            step(x)
        results[change.__name__] = torch.cat([p.flatten() for p in state.averaged.parameters()])
    first = results.pop("_step_of")
    start = torch.cat([p.flatten() for p in RECIPE.build().parameters()])
    for name, result in results.items():
        # the first steps of AdamW are ± the learning rate where the gradient is next to nothing
        assert (result - first).abs().mean() < 0.02 * (first - start).abs().mean(), name


def test_tricks_are_reported_as_gains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def times(jobs: dict[str, Any], rounds: int, device: torch.device) -> dict[str, list[float]]:
        return {name: [{"all": 1.0, "bfloat16": 0.5, "compile": 2.0}.get(name, 1.25)] * rounds for name in jobs}

    monkeypatch.setattr(bench, "in_turn", times)
    assert main(["bench", "--tricks", "--json"]) == 0
    gains = {name: row["gain"]["median"] for name, row in json.loads(capsys.readouterr().out)["tricks"].items()}
    assert gains["bfloat16"] == 2 and gains["compile"] == 0.5  # with it against without
    assert {gains[n] for n in ("channels_last", "attention", "optimizer", "average", "resident")} == {1.25}
    assert main(["bench", "--rounds", "0"]) == 1
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
