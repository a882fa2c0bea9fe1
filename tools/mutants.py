"""Mutation testing: plant a small fault in the mathematical core, many times, and see whether some test notices.

    python tools/mutants.py               plant every fault; an interrupted run goes on where it stopped
    python tools/mutants.py --survivors   only those that no test noticed last time, after tests have been added

mutmut makes the mutants and runs the tests: it imports torch once and forks a process for every mutant. Two things
are added here. mutmut leaves decorated functions alone, which in this package are the tables of a schedule and the
samplers; so it gets a copy in which each decorator is written out, ``f = decorator(f)`` after ``f``, as Python
itself reads it. And it does not know the usual slip in a formula, a function that is lost: √x becomes x.

Left alone by rule: docstrings, type annotations, statements outside of functions, and what the package says in errors
and warnings (``raise`` and ``warnings.warn``). Nor is None put in the place of a value: nearly every test that runs
such a line fails, so these mutants, which are many, would only embellish the number. A mutant is killed when a test
fails, hangs, or cannot even be imported.

The result goes to tests/mutants/results.json, which the page "Verified equations" shows. A survivor is killed by a new
test, or tests/mutants/survivors.toml says why no test can kill it.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import difflib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from mutation import reasons, state_of  # noqa: E402

WORK = ROOT / ".cache" / "mutants"
RESULTS = ROOT / "tests" / "mutants" / "results.json"
REASONS = ROOT / "tests" / "mutants" / "survivors.toml"
MODULES = ("schedule", "gaussian", "diffusion", "sampling", "autoencoder")
# The fast tests that compare with something exact, by file, and which of them to leave out: long chains, of which the
# shorter ones say the same.
TESTS = ["test_schedule.py", "test_gaussian.py", "test_diffusion.py", "test_sampling.py", "test_autoencoder.py"]
TESTS += ["test_latent.py"]
TESTS += [
    "test_unet.py",
    *(f"equations/test_chapter_{chapter}.py" for chapter in ("00", "01", "02", "03", "04", "06", "08", "09")),
]
OF_TEST_UNET = "as_eps or guid"  # as_eps and guided are functions of sampling.py, tested there with a network
OF_TEST_LATENT = "TestSpatialVAE and not by_its_recipe"
SELECTION = "not (TestAgainstDiffusers and 1000) and not order_of_convergence"
SELECTION += f" and (not test_unet or {OF_TEST_UNET}) and (not test_latent or {OF_TEST_LATENT})"
LEAST = 0.95  # of the mutants of each module has to be killed
FUNCTIONS = set(
    "abs clamp cos cumprod exp expm1 log log1p log_ndtr logsumexp mean round softmax sqrt square sum".split()
)
PROCESSES = 2
KILLED = ("killed", "timeout", "segfault")
UNDECIDED = ("not checked", "check was interrupted by user")

CONFIG = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {modules}
also_copy = ["conftest.py"]
pytest_add_cli_args_test_selection = {tests}
# The two plugins collect garbage at the end of each run, which takes longer than the tests of most mutants.
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"]
# torch must be imported, but not have computed anything, when a process forks.
process_isolation = "forkserver"
forkserver_warmup = "import"
preload_modules_file = "preload"
use_git_change_detection = false
"""

# What is imported once. Not the tests: pytest gives some of them other names when they are collected again.
PRELOAD = """\
diffbook.autoencoder
diffbook.sampling
diffusers.schedulers.scheduling_ddim
diffusers.schedulers.scheduling_ddpm
diffusers.schedulers.scheduling_dpmsolver_multistep
scipy.integrate
scipy.stats
sklearn
sympy
"""


def to_mutate(source: str) -> str:
    """The source with its decorators written out, and its messages marked as not to mutate; no line moves."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            after = node.end_lineno or 0  # the line after the function, counted from 0
            if lines[after].strip():
                raise ValueError(f"line {after + 1}: after a decorated function must come an empty line")
            name = node.name
            for decorator in reversed(node.decorator_list):
                name = f"{ast.unparse(decorator)}({name})"
                lines[decorator.lineno - 1] = ""
            lines[after] = " " * node.col_offset + f"{node.name} = {name}"
        elif isinstance(node, ast.Raise) or (isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"):
            for i in range(node.lineno - 1, node.end_lineno or 0):
                lines[i] += "  # pragma: no mutate"
    return "\n".join(lines)


def operators() -> list[Any]:
    """mutmut's kinds of mutation without those that put None somewhere, and ours."""
    import libcst as cst
    from mutmut.mutation.mutators import mutation_operators

    code = cst.Module([]).code_for_node

    def without_none(operator: Any) -> Any:
        return lambda node: (new for new in operator(node) if code(new).count("None") <= code(node).count("None"))

    def drop_function(node: cst.Call) -> Iterator[cst.BaseExpression]:
        owner, _, name = code(node.func).rpartition(".")
        if name in FUNCTIONS and owner in ("", "math", "torch", "torch.special"):
            yield node.args[0].value
        elif name in FUNCTIONS and isinstance(node.func, cst.Attribute):
            yield node.func.value

    return [*((kind, without_none(operator)) for kind, operator in mutation_operators), (cst.Call, drop_function)]


def selected_tests() -> list[str]:
    """The test files that are to notice the mutants."""
    return [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).is_file()]


def prepare(anew: bool) -> None:
    """Make the copy that mutmut works on; ``anew``: from the start, if code or tests are not those of the last run."""
    code = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "src").rglob("*.py"))]
    tests = ["conftest.py", *selected_tests()]
    inputs = b"".join(name.encode() + (ROOT / name).read_bytes() for name in ["tools/mutants.py", *code, *tests])
    now, stamp = hashlib.sha256(inputs).hexdigest(), WORK / "inputs"
    if anew and not (stamp.is_file() and stamp.read_text() == now):
        shutil.rmtree(WORK, ignore_errors=True)
    if not (WORK / "src").is_dir():
        shutil.copytree(ROOT / "src", WORK / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for module in MODULES:
            path = WORK / "src" / "diffbook" / f"{module}.py"
            shutil.copy(path, WORK)  # as it was
            path.write_text(to_mutate(path.read_text(encoding="utf-8")), encoding="utf-8")
        stamp.write_text(now)
    for name in tests:
        (WORK / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, WORK / name)
    (WORK / "preload").write_text(PRELOAD, encoding="utf-8")
    config = CONFIG.format(
        modules=[f"src/diffbook/{module}.py" for module in MODULES], tests=["-k", SELECTION, *selected_tests()]
    )
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (WORK / "pyproject.toml").write_text(project + config, encoding="utf-8")


def run(names: Sequence[str] = ()) -> None:
    """Let mutmut test the mutants that have no verdict yet, or the named ones; the working directory is WORK."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = False  # whatever the environment says: the tests would be compiled for every mutant
    from mutmut.__main__ import cli
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.runners.harness import BadTestExecutionCommandsException, PytestRunner

    of_mutmut = PytestRunner.run_tests

    def run_tests(self: PytestRunner, *, mutant_name: str | None, tests: Sequence[str]) -> int:
        """A test file may compute while it is imported, and fail; then pytest finds no test of that name in it."""
        try:
            return of_mutmut(self, mutant_name=mutant_name, tests=tests)
        except BadTestExecutionCommandsException:
            files = sorted({test.partition("::")[0] for test in tests})
            return int(of_mutmut(self, mutant_name=mutant_name, tests=["-k", SELECTION, *files]) != 0)

    mutation_operators[:] = operators()  # type: ignore[index]
    PytestRunner.run_tests = run_tests  # type: ignore[method-assign]
    try:
        cli.main(["run", "--max-children", str(PROCESSES), *names], standalone_mode=False)
    except SystemExit:
        sys.exit(
            f'mutmut stopped. Do the tests pass? python -m pytest -x -k "{SELECTION}" {" ".join(selected_tests())}'
        )


def mutants(module: str) -> list[dict[str, Any]]:
    """What became of a module's mutants; the working directory is WORK."""
    from mutmut.mutation.data import MutantLineSpans, SourceFileMutationData
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    path = Path("src") / "diffbook" / f"{module}.py"
    data, spans = SourceFileMutationData(path=path), MutantLineSpans.load(path)
    data.load()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = (Path("mutants") / path).read_text(encoding="utf-8").split("\n")
    found = []
    for key, code in data.exit_code_by_key.items():
        function, owner = orig_function_and_class_names_from_key(key)
        mutant = key.rpartition(".")[2]
        texts = []
        for name in (mutant.rpartition("__mutmut_")[0] + "__mutmut_orig", mutant):
            span = spans.span_by_function_name[name]
            texts.append([line.replace(name, function, 1) for line in lines[span.start - 1 : span.end]])
        at, before, after = difference(*texts)
        scope = tree if owner is None else next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
        node = next(n for n in scope.body if isinstance(n, ast.FunctionDef) and n.name == function)
        found.append(
            {
                "key": key,
                # mutmut takes 255, "the tests could not be run", for a timeout
                "status": "suspicious" if code == 255 else status_by_exit_code[code],
                "function": ".".join(filter(None, (module, owner, function))),
                "line": node.lineno + at,
                "before": before,
                "after": after,
            }
        )
    return found


def difference(old: list[str], new: list[str]) -> tuple[int, str, str]:
    """Where two versions of a function begin to differ, counted from its ``def``, and the lines that do."""
    first = next(i for i, line in enumerate(old) if line.lstrip().startswith("def "))
    changes = [c for c in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if c[0] != "equal"]
    (_, begin, _, begin_new, _), (_, _, end, _, end_new) = changes[0], changes[-1]
    before, after = (" ".join(filter(None, map(str.strip, part))) for part in (old[begin:end], new[begin_new:end_new]))
    return begin - first, before, after


def summary(found: dict[str, list[dict[str, Any]]], seconds: float) -> dict[str, Any]:
    """What the results file holds; the working directory is WORK."""
    return {
        "date": datetime.date.today().isoformat(),
        "minutes": max(1, round(seconds / 60)),
        "processes": PROCESSES,
        "tests": len(json.loads(Path("mutants/mutmut-stats.json").read_text(encoding="utf-8"))["duration_by_test"]),
        "mutmut": version("mutmut"),
        "torch": version("torch").split("+")[0],
        "modules": {
            module: {
                "state": state_of(Path(f"{module}.py")),
                "mutants": len(of_module),
                "killed": sum(m["status"] in KILLED for m in of_module),
            }
            for module, of_module in found.items()
        },
        "survivors": [
            {key: m[key] for key in ("function", "line", "before", "after")}
            for of_module in found.values()
            for m in of_module
            if m["status"] not in KILLED
        ],
    }


def faults(results: dict[str, Any], known: dict[tuple[str, str, str], str]) -> list[str]:
    """What is wrong with the results: survivors without a reason, reasons without a survivor, too low a rate."""
    alive = {(m["function"], m["before"], m["after"]): m["line"] for m in results["survivors"]}
    wrong = [
        f"{name}, line {line}: no test notices, and no reason is given\n    - {before}\n    + {after}"
        for (name, before, after), line in alive.items()
        if (name, before, after) not in known
    ]
    wrong += [
        f"{name}: explained, but not a survivor\n    - {before}\n    + {after}"
        for name, before, after in known
        if (name, before, after) not in alive
    ]
    for module, counts in results["modules"].items():
        if counts["killed"] < LEAST * counts["mutants"]:
            wrong.append(f"{module}: only {counts['killed']} of {counts['mutants']} mutants are killed")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plant faults in the mathematical core and see whether tests notice.")
    parser.add_argument("--survivors", action="store_true", help="only those that no test noticed last time")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    prepare(anew=not options.survivors)
    os.chdir(WORK)
    if options.survivors:
        alive = [m["key"] for module in MODULES for m in mutants(module) if m["status"] not in KILLED]
        if alive:
            run(alive)
        left = [m for module in MODULES for m in mutants(module) if m["status"] not in KILLED]
        for m in left:
            print(f"{m['function']}, line {m['line']}: {m['status']}\n    - {m['before']}\n    + {m['after']}")
        print(f"{len(left)} survivors left of {len(alive)}; {RESULTS.name} is written by the full run alone")
        return 0
    run()
    spent = Path("seconds")  # by runs that were interrupted
    seconds = time.perf_counter() - began + (float(spent.read_text()) if spent.is_file() else 0)
    spent.write_text(str(seconds))
    found = {module: mutants(module) for module in MODULES}
    if any(m["status"] in UNDECIDED for of_module in found.values() for m in of_module):
        print("Not finished; the same command goes on from here.")
        return 1
    broken = [m["key"] for of_module in found.values() for m in of_module if m["status"] == "suspicious"]
    if broken:
        print("The tests could not be run with", *broken, sep="\n    ")
        return 1
    results = summary(found, seconds)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    for module, counts in results["modules"].items():
        print(f"{module:10} {counts['killed']:5} of {counts['mutants']:5} killed")
    wrong = faults(results, reasons(REASONS))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
