"""Measure speed beside other libraries, and what each trick brings, for the page "What made it fast".

    python tools/measure_speed.py [--only PART ...] [--rounds N] [--page]

The parts are those of PARTS; each is one interleaved run of `diffbook bench`, and replaces what was stored of it. Run
it on a machine that does nothing else; denoising-diffusion-pytorch comes with the extra `bench`. Results go to
book/speed.json, and from there into book/what-made-it-fast.md (--page writes only that). A quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffbook import bench
from diffbook.weights import write_atomically

BOOK = Path(__file__).resolve().parents[1] / "book"
RESULTS, PAGE = BOOK / "speed.json", BOOK / "what-made-it-fast.md"
TRICKS = ("channels_last", "attention", "optimizer", "average", "resident", "bfloat16", "compile")
PARTS: dict[str, Callable[[torch.device, int], Any]] = {
    "float32": lambda device, rounds: bench.compare(device, rounds),
    "bfloat16": lambda device, rounds: bench.compare(device, rounds, bfloat16=True),
    "compiled": lambda device, rounds: bench.compare(device, rounds, compiled=True),
    "overhead": lambda device, rounds: bench.overhead(device, rounds),
    "tricks": lambda device, rounds: bench.tricks(device, rounds),
}


def read_results() -> dict[str, Any]:
    """What is stored; empty if the file is not there yet."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def machine() -> str:
    """The processor, as it calls itself, and what it can do in bfloat16."""
    found = re.search(r"model name\s*: (.+)", _text("/proc/cpuinfo"))
    names = {"amx_bf16": "AMX with bfloat16", "avx512_bf16": "AVX-512 with bfloat16"}
    names |= {"avx512f": "AVX-512", "avx2": "AVX2"}
    flags = set(re.findall(rf"\b(?:{'|'.join(names)})\b", _text("/proc/cpuinfo")))
    best = next((about for flag, about in names.items() if flag in flags), platform.machine())
    return f"{found[1] if found else platform.processor()}, {best}"


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def times(ratio: dict[str, float]) -> str:
    """A ratio for the page, with its middle half."""
    return f"×{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def peers(part: dict[str, Any]) -> str:
    """Training and calls beside the other libraries, one row each."""
    rows = []
    for name in bench.CONTESTANTS:
        row, own = part["contestants"][name], name == "diffbook"
        ratios = ["", ""] if own else [times(row["training_ratio"]), times(row["call_ratio"])]
        rows.append([name, f"{row['training']:.0f}", *ratios, str(row["peak_mebibytes"] or "?")])
    head = ["library", "images/s", "ours, training", "ours, calls", "MiB"]
    columns = 4 if part["about"]["compiled"] else 5  # memory is not measured there
    return "\n".join(f"| {' | '.join(row[:columns])} |" for row in [head, ["---"] * 5, *rows])


def overheads(rows: dict[str, Any]) -> str:
    lines = []
    for name in ("DDPM", "DDIM", "DPM-Solver++(2M)"):
        row = rows[name]
        lines.append(f"| {name} | {row['diffbook']:.3f} | {row['diffusers']:.3f} | {times(row['ratio'])} |")
    return "| sampler | ours, ms | diffusers, ms | ours |\n|---|---|---|---|\n" + "\n".join(lines)


def tricks(rows: dict[str, Any]) -> str:
    lines = [f"| {rows[name]['about']} | {times(rows[name]['gain'])} |" for name in TRICKS]
    return "| trick | faster by |\n|---|---|\n" + "\n".join(lines)


def share(results: dict[str, Any]) -> str:
    part = results["float32"]
    row, about = part["contestants"]["diffbook"], part["about"]
    return (
        f"On {results['machine']}, one thread, PyTorch {about['torch']}: batches of {about['batch']}, "
        f"medians of {about['rounds']} rounds. A product of two large matrices in float32 reaches there\n"
        f"{part['peak_gigaflops']:.0f} GFLOP/s; our training step {row['gigaflops']:.0f}, {row['share_of_peak']:.0%}."
    )


def blocks(results: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks of the page."""
    return {
        "machine": share(results),
        "float32": peers(results["float32"]),
        "bfloat16": peers(results["bfloat16"]),
        "compiled": peers(results["compiled"]),
        "overhead": overheads(results["overhead"]),
        "tricks": tricks(results["tricks"]),
    }


def write_page() -> None:
    """Put what is stored between the marks of the page."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks(read_results()).items():
        marked = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        page = marked.sub(lambda _, n=name, t=text: f"<!-- {n} -->\n\n{t}\n\n<!-- /{n} -->", page)  # type: ignore[misc]
    write_atomically(PAGE, page.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure speed beside other libraries, and what each trick brings.")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    torch.set_num_threads(1)  # two threads of one core would measure their quarrel
    missing = bench.present()[1]
    if missing and not options.page:
        parser.error(f'{", ".join(missing)} missing: pip install -e ".[bench]"')
    for name in [] if options.page else options.only:
        print(f"== {name}", flush=True)
        part = PARTS[name](torch.device(options.device), options.rounds)
        results = read_results() | {name: part, "machine": machine()}
        write_atomically(RESULTS, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
        print(bench.table({name: part} if name in ("overhead", "tricks") else part), flush=True)
    write_page()


if __name__ == "__main__":
    main()
