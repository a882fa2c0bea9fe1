"""Measure what each notebook costs, and write it at its head.

    python tools/measure.py [NOTEBOOK ...]

Each notebook runs in a fresh kernel, one after another. Seconds are wall-clock time from the kernel's start to the
end of the last cell. Memory is the largest resident memory of the kernel's process and its children: the peak that
Linux records for the process, and elsewhere (and for children) the largest of samples taken ten times a second.
The numbers go to notebooks/costs.json, and in one sentence into the notebook's first cell, between the markers
``<!-- cost -->`` and ``<!-- /cost -->``. Outputs are left alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from nbformat import NotebookNode
from run_notebooks import ROOT, TIMEOUT, NotebookError, execute, notebooks, prepare_environment, read, write

COSTS = ROOT / "notebooks" / "costs.json"
MARKED = re.compile(r"<!-- cost -->.*?<!-- /cost -->", re.DOTALL)
CORES = {1: "one core", 2: "two cores", 3: "three cores", 4: "four cores"}


class PeakMemory(threading.Thread):
    """Follows a process and its children until :meth:`stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.peak = 0
        self._stop_asked = threading.Event()

    def run(self) -> None:
        self._sample()  # at once: a short notebook's kernel is gone before the first tenth of a second has passed
        while not self._stop_asked.wait(0.1):
            self._sample()

    def _sample(self) -> None:
        try:
            family = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        total = 0
        for member in family:
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:  # a child that has just ended
                continue
        self.peak = max(self.peak, total, self._recorded())

    def _recorded(self) -> int:
        """The peak that Linux keeps for the process; read again and again, for it goes with the process."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:  # another system, or the process has ended
            return 0
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(found[1]) if found else 0

    def stop(self) -> int:
        """End, and return the peak in bytes."""
        self._sample()
        self._stop_asked.set()
        self.join()
        return self.peak


def measure(path: Path, timeout: int = TIMEOUT) -> dict[str, int | str]:
    """Run one notebook and return its entry for costs.json."""
    monitors: list[PeakMemory] = []
    result: dict[str, float] = {}

    def start(pid: int) -> None:
        monitors.append(PeakMemory(pid))
        monitors[0].start()

    def end() -> None:
        result["seconds"] = time.perf_counter() - began
        result["bytes"] = monitors[0].stop()

    began = time.perf_counter()
    execute(path, timeout, on_start=start, on_end=end)
    return {
        "seconds": rounded_seconds(result["seconds"]),
        "peak_mib": 10 * math.ceil(result["bytes"] / 2**20 / 10),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch": importlib.metadata.version("torch").split("+")[0],
    }


def rounded_seconds(seconds: float) -> int:
    """Up to the next second, above half a minute to the next five: no finer than two runs agree."""
    step = 1 if seconds <= 30 else 5
    return max(1, step * math.ceil(seconds / step))


def cost_line(cost: dict[str, int | str]) -> str:
    """The sentence at a notebook's head, markers included."""
    minutes, seconds = divmod(int(cost["seconds"]), 60)
    parts = [f"{minutes} min"] * (minutes > 0) + [f"{seconds} s"] * (seconds > 0 or minutes == 0)
    cores = CORES.get(int(cost["cores"]), f"{cost['cores']} cores")
    memory = int(cost["peak_mib"]) / 1024
    text = f"Runs in {' '.join(parts)} and needs {memory:.1f} GiB of memory ({cores}; measured by `make measure`)."
    return f"<!-- cost -->{text}<!-- /cost -->"


def read_costs(path: Path = COSTS) -> dict[str, dict[str, int | str]]:
    """What is stored, by the notebooks' names; nothing if the file is not there yet."""
    if not path.exists():
        return {}
    costs: dict[str, dict[str, int | str]] = json.loads(path.read_text(encoding="utf-8"))
    return costs


def put_cost_line(notebook: NotebookNode, cost: dict[str, int | str]) -> None:
    """Write the sentence between the markers of the first cell.

    Raises:
        ValueError: if the markers are not there exactly once.
    """
    first = notebook.cells[0]
    first.source, count = MARKED.subn(lambda _: cost_line(cost), first.source)
    if count != 1:
        raise ValueError(f"the first cell has {count} pairs of <!-- cost --><!-- /cost --> markers; it needs one")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what each notebook costs, and write it at its head.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the book if none is named")
    options = parser.parse_args(arguments)
    prepare_environment()
    failed = 0
    for path in options.notebooks or notebooks():
        try:
            nb = read(path)
            cost = measure(path)
            put_cost_line(nb, cost)
        except (NotebookError, ValueError, OSError) as error:
            failed += 1
            print(f"{path.name}: {error}", file=sys.stderr)
            continue
        write(nb, path)
        # an entry of a notebook that is no longer there goes
        known = {p.stem for p in notebooks()}
        costs = {name: entry for name, entry in read_costs().items() if name in known} | {path.stem: cost}
        COSTS.write_text(json.dumps(dict(sorted(costs.items())), indent=1) + "\n", encoding="utf-8")
        print(f"{path.name}: {cost['seconds']} s, {cost['peak_mib']} MiB", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
