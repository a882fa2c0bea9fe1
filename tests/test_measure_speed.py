"""The page "What made it fast": its tables are those that were measured, and its sentences what they say."""

from __future__ import annotations

from typing import Any

import measure_speed
import pytest
from measure_speed import PAGE, PARTS, blocks, read_results

from diffbook import bench

RESULTS = read_results()


def row(part: str, library: str) -> dict[str, Any]:
    found: dict[str, Any] = RESULTS[part]["contestants"][library]
    return found


def test_the_tables_are_what_was_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks(RESULTS).items():
        assert f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->" in page, "run tools/measure_speed.py --page"


def test_everything_was_measured_on_one_machine_with_one_thread() -> None:
    assert set(PARTS) <= set(RESULTS)
    abouts = [RESULTS[part]["about"] for part in ("float32", "bfloat16", "compiled")]
    assert {(a["threads"], a["batch"], a["device"], a["torch"]) for a in abouts} == {(1, 64, "cpu", abouts[0]["torch"])}
    assert all(a["rounds"] >= 5 for a in abouts)
    assert not any(RESULTS[part]["missing"] for part in ("float32", "bfloat16", "compiled"))
    assert [(a["precision"], a["compiled"]) for a in abouts] == [
        ("float32", False),
        ("bfloat16", False),
        ("float32", True),
    ]


def test_the_work_is_the_same() -> None:
    ours = row("float32", "diffbook")
    for name in bench.CONTESTANTS:
        for what in ("parameters", "megaflops_per_image"):
            assert row("float32", name)[what] == pytest.approx(ours[what], rel=bench.TOLERANCE)
    assert row("float32", "diffusers")["parameters"] == ours["parameters"]


def test_what_the_page_says_is_what_was_measured() -> None:
    """No library is faster in training; nor does a step of it need less memory; nor is a sampler's step cheaper."""
    for name in ("diffusers", "denoising-diffusion-pytorch"):
        assert row("float32", name)["training_ratio"]["median"] >= 1.0
        assert row("float32", name)["call_ratio"]["median"] >= 1.0
        assert row("float32", name)["peak_mebibytes"] >= row("float32", "diffbook")["peak_mebibytes"]
    assert row("float32", "denoising-diffusion-pytorch")["training_ratio"]["median"] >= 1.6
    assert all(found["ratio"]["median"] >= 1.0 for found in RESULTS["overhead"].values())
    assert 0.3 < row("float32", "diffbook")["share_of_peak"] < 1


def test_tables_are_written_from_the_numbers() -> None:
    gain = {"median": 1.234, "low": 1.0, "high": 2.0}
    rows = {name: {"about": f"the trick {name}", "gain": gain} for name in reversed(measure_speed.TRICKS)}
    assert measure_speed.tricks(rows).endswith("| the trick compile | ×1.23 (1.00–2.00) |")
    assert set(RESULTS["tricks"]) == set(measure_speed.TRICKS)
    assert measure_speed.machine()
