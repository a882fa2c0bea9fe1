"""The repository as a whole: what its files say of each other, what it may hold, and how its set-up fails."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import check_notebooks
import freeze
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import diffbook

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE))
TEXT = {".bib", ".cfg", ".cff", ".css", ".html", ".ipynb", ".js", ".json", ".md", ".mjs", ".py", ".sh", ".svg", ".toml"}
TEXT |= {"", ".txt", ".yml"}
MIB = 2**20
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


def files() -> list[Path]:
    """The files of the repository: those in git, and those that git would add."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone, so there is no list of its files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(*groups: str) -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    lists = [PROJECT["dependencies"] if group == "dependencies" else extras[group] for group in groups]
    return [Requirement(line) for lines in lists for line in lines]


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^=;\s]+", line) for line in lines)
    return {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}


# versions and requirements


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert str(citation["version"]) == PROJECT["version"] == diffbook.__version__


def test_constraints_lie_within_the_ranges() -> None:
    pinned = pins("constraints.txt")
    for needed in requirements("dependencies", "book", "gpu", "test"):
        assert canonicalize_name(needed.name) in pinned, needed.name
        assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), needed


def test_tools_of_the_book_are_pinned_exactly() -> None:
    loose = {"ipykernel", "jupyterlab", "jupytext", "nbclient", "nbdime", "nbformat", "psutil"}
    for needed in requirements("book"):
        exact = [s.operator for s in needed.specifier] == ["=="]
        assert exact != (needed.name in loose), needed


def test_lowest_versions_are_the_lower_bounds() -> None:
    lowest = pins("constraints-lowest.txt")
    bounded = {canonicalize_name(r.name): r for r in requirements("dependencies", "test")}
    assert {canonicalize_name(r.name) for r in requirements("dependencies")} <= set(lowest)
    for name, version in lowest.items():
        bounds = [Version(s.version) for s in bounded[name].specifier if s.operator == ">="]
        assert bounds == [version], f"{name}: {bounds} in pyproject.toml, {version} in constraints-lowest.txt"


def test_readme_names_the_oldest_torch_and_python() -> None:
    torch = next(r for r in requirements("dependencies") if r.name == "torch")
    assert f"PyTorch {str(torch.specifier).removeprefix('>=')}" in read("README.md")
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in read("README.md")
    assert f"Python {python} or newer" in read("tools/make_env.sh")
    major, minor = python.split(".")
    assert f"sys.version_info < ({major}, {minor})" in read("tools/make_env.sh")


def test_dependencies_are_what_the_package_imports() -> None:
    imported = {name for path in (ROOT / "src" / "diffbook").rglob("*.py") for name in imports(path)} - {"diffbook"}
    distributions = {"sklearn": "scikit-learn", "IPython": "ipython", "PIL": "pillow"}
    distributions |= {name.replace("-", "_"): name for name in ("denoising-diffusion-pytorch", "ema-pytorch")}
    optional = {r.name for r in requirements("gpu", "bench", "hub")} - {"tensorboard"}  # which torch imports, not we
    named = {r.name for r in requirements("dependencies")} | optional
    assert {distributions.get(name, name) for name in imported} == named


def imports(path: Path) -> set[str]:
    """The modules that a file names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found - sys.stdlib_module_names


def test_tests_for_the_oldest_versions_need_no_tools_of_the_book() -> None:
    """`.venv-lowest` holds the extra test alone: what tests import, and what the tools they import do, is in it."""
    left_out = re.search(r"^NEED_BOOK_TOOLS := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
    assert left_out
    names = left_out[1].replace("\\", "").split()
    assert all((ROOT / "tests" / name).exists() for name in names)
    own = {path.stem: path for folder in ("tools", "tests", "book/_ext") for path in (ROOT / folder).glob("*.py")}
    there = {*freeze.pins("test"), "diffbook"}
    brought = packages_distributions()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.relative_to(ROOT / "tests").parts[0] in names:
            continue
        needed, new = set[str](), imports(path)
        while new:
            needed |= new
            new = {name for module in new & set(own) for name in imports(own[module])} - needed
        for module in sorted(needed - set(own)):
            found = {canonicalize_name(name) for name in brought.get(module, [])}
            assert found & there, f"{path.name} needs {module}: name it in the Makefile's NEED_BOOK_TOOLS"


def test_conda_environment_is_in_step() -> None:
    conda = yaml.safe_load(read("environment.yml"))
    python = next(d for d in conda["dependencies"] if isinstance(d, str) and d.startswith("python="))
    allowed = Requirement("python" + PROJECT["requires-python"]).specifier
    assert allowed.contains(python.removeprefix("python="))
    assert "pip" in conda["dependencies"]
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", "-e .[book,test]"], "everything but Python has one list, pyproject.toml"
    assert {"book", "test"} <= set(PROJECT["optional-dependencies"])
    assert len(conda["dependencies"]) == 3


# documents, make and workflows


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_documents_name_targets_that_exist(name: str) -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", read(name), re.MULTILINE))
    assert named
    assert named <= TARGETS


def test_readme_and_help_list_every_target() -> None:
    listed = set(re.findall(r"^\| `make ([a-z-]+)` \|", read("README.md"), re.MULTILINE))
    assert listed == TARGETS


@posix
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, env=without_make())
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^  make ([a-z-]+) +\S", done.stdout, re.MULTILINE)) == TARGETS


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY.md", "LICENSE"])
def test_documents_name_files_that_exist(name: str) -> None:
    text = read(name).replace("\\", "/")
    folders = r"(?:LICENSES|book|notebooks|src|tests|tools|\.github)/[\w./*-]*+(?!…)"  # an … abbreviates a name
    at_top = r"[A-Z_]+\.md|[a-z-]+\.(?:txt|toml|py|cff)(?!\w)"
    named = set(re.findall(rf"(?<![\w./:-])({folders}|{at_top})", text))
    assert named
    for path in sorted(named):
        assert list(ROOT.glob(path.rstrip("./"))), f"{name} names {path}"


def test_ci_runs_the_tests_and_nothing_else() -> None:
    lines = [line for line in read(".ci/run").splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "exec make test"]
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR or sys.platform == "win32"


def workflows() -> list[Path]:
    return sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_are_there() -> None:
    assert [path.name for path in workflows()] == ["book.yml", "weekly.yml"]


@pytest.mark.parametrize("path", workflows(), ids=lambda path: path.name)
def test_workflow(path: Path) -> None:
    """Actions pinned by commit, least permissions, allowed Pythons, no command that a person could not type."""
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    uses = re.findall(r"uses: (.+)", text)
    assert uses
    for action in uses:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        extra = job.get("permissions", {})
        assert set(extra) <= ({"pages", "id-token"} if name == "publish" else set())
        assert "timeout-minutes" in job
        for step in job["steps"]:
            assert step.get("run", "make test") in {"bash .ci/run", *(f"make {target}" for target in TARGETS)}
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}
    allowed = Requirement("python" + PROJECT["requires-python"]).specifier
    versions = re.findall(r'"(3\.\d+)"', text)
    assert versions and all(allowed.contains(version) for version in versions)


def test_an_action_has_one_version_in_all_workflows() -> None:
    used = {action for path in workflows() for action in re.findall(r"uses: (.+)", path.read_text(encoding="utf-8"))}
    assert len(used) == len({action.partition("@")[0] for action in used}), sorted(used)


def test_strangers_start_only_what_may_read_alone() -> None:
    """A pull request runs with a stranger's code: never where secrets or rights to write are (pull_request_target)."""
    for path in workflows():
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        events, jobs = set(workflow[True]), workflow["jobs"]  # to YAML 1.1 `on` is true
        assert events <= {"push", "pull_request", "schedule", "workflow_dispatch"}, path.name
        for name, job in jobs.items():
            if "permissions" in job and "pull_request" in events:
                assert "github.event_name != 'pull_request'" in jobs[job["needs"]]["if"], name


def test_each_week_the_limits_of_the_versions_are_tried() -> None:
    workflow = yaml.safe_load(read(".github/workflows/weekly.yml"))
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert sorted(commands) == ["make audit", "make test-lowest", "make test-newest"]


# what the repository holds

BUDGETS = {  # MiB
    "src/diffbook/assets/data/": 12,
    "src/diffbook/assets/weights/": 16,
    "notebooks/": 5,
    "book/_static/vendor/": 3,
    "src/diffbook/assets/results/": 1,
    "": 3,
}


def kind(path: Path) -> str:
    """The budget that a file belongs to."""
    name = path.relative_to(ROOT).as_posix()
    return next(prefix for prefix in BUDGETS if name.startswith(prefix))


def test_size_budgets() -> None:
    used = dict.fromkeys(BUDGETS, 0)
    for path in files():
        used[kind(path)] += path.stat().st_size
    for prefix, limit in BUDGETS.items():
        assert used[prefix] <= limit * MIB, f"{prefix or 'the rest'}: {used[prefix] / MIB:.2f} of {limit} MiB"
    assert sum(BUDGETS.values()) == 40


def test_work_of_others_is_listed_with_its_licence() -> None:
    listed = read("THIRD_PARTY.md")
    for folder in ("book/_static/vendor", "src/diffbook/assets/weights"):
        for path in sorted((ROOT / folder).glob("*/")):
            assert f"{folder}/{path.name}/" in listed
    patterns = re.findall(r"`(src/diffbook/assets/data/[^`]+)`", listed)
    known = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert set((ROOT / "src" / "diffbook" / "assets" / "data").iterdir()) <= known
    linked = set(re.findall(r"\]\(LICENSES/([^)]+)\)", listed))
    assert linked == {path.name for path in (ROOT / "LICENSES").iterdir()}


# Written in two parts, so that this file does not hold them.
FORBIDDEN = [
    first + second
    for first, second in [
        ("TO", "DO"),
        ("FIX", "ME"),
        ("XX", "X"),
        ("NotImplemented", "Error"),
        ("coming", " soon"),
        ("lorem", " ipsum"),
    ]
]


def test_no_unfinished_places() -> None:
    found = []
    words = re.compile("|".join(rf"\b{re.escape(w)}\b" if w.isalpha() else re.escape(w) for w in FORBIDDEN))
    place = re.compile(r"\bplace" + r"holder\b(?!=)")
    for path in files():
        if path.suffix not in TEXT or kind(path) == "book/_static/vendor/" or path.parent.name == "LICENSES":
            continue
        text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", path.read_text(encoding="utf-8"))  # pictures in notebooks
        for pattern in (words, place):
            found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(text)]
    assert found == []


def test_no_secrets() -> None:
    """Of no kind, in no text file; but tests name examples, for the rule that is tested there with planted ones."""
    found = []
    for path in files():
        if path.suffix in TEXT and kind(path) != "book/_static/vendor/" and path.name != "test_notebooks.py":
            text = check_notebooks.without_pictures(path.read_text(encoding="utf-8"))
            found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in check_notebooks.SECRET.finditer(text)]
    assert found == []


def test_what_is_published_names_no_folder_of_a_user() -> None:
    """Pages, notebooks, model cards and results: they are written by programs, which know where they run."""
    private = re.compile(r"(?<![\w.:/])(?:/(?:home|root|Users)/\w|[A-Za-z]:\\+Users)")
    found = []
    for path in files():
        if path.suffix in {".md", ".json", ".ipynb", ".yml"} and kind(path) != "book/_static/vendor/":
            text = check_notebooks.without_pictures(path.read_text(encoding="utf-8"))
            found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in private.finditer(text)]
    assert found == []


def test_text_files_end_with_one_newline() -> None:
    bad = []
    for path in files():
        if path.suffix in TEXT and kind(path) != "book/_static/vendor/" and path.stat().st_size:
            data = path.read_bytes()
            if not data.endswith(b"\n") or data.endswith(b"\n\n") or b"\r" in data:
                bad.append(path.relative_to(ROOT).as_posix())
    assert bad == []


# How the set-up fails: with a Python that plays another one.


def without_make() -> dict[str, str]:
    """The environment without what an outer make, this test run and its Python put there."""
    dropped = ("MAKE", "MFLAGS", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "TORCH_INDEX")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, without .venv, with a `bin` that stands first on PATH."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = without_make()
    environment["PATH"] = f"{clone / 'bin'}{os.pathsep}{environment['PATH']}"
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=clone, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def playing(prelude: str) -> str:
    """A Python that runs its `-c CODE` after another piece of code."""
    return f"""exec "{sys.executable}" -c "$(printf '%s\\n%s' '{prelude}' "$2")"\n"""


OLD = playing('import sys; sys.version_info = (3, 9, 2, "final", 0)')
NO_VENV = playing('import sys; sys.modules["ensurepip"] = None')

needs_make = pytest.mark.skipif(shutil.which("make") is None or sys.platform == "win32", reason="needs make")


@needs_make
def test_old_python(clone: Path) -> None:
    script(clone / "bin" / "python3", OLD)
    for minor in range(11, 15):
        script(clone / "bin" / f"python3.{minor}", "exit 1\n")
    done = make(clone, "book")
    assert done.returncode != 0
    assert "'python3' is Python 3.9.2. This project needs Python 3.11 or newer." in done.stderr
    assert "make PYTHON=python3.12 ..." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (clone / ".venv").exists()


@needs_make
def test_old_python_with_a_newer_one_beside_it(clone: Path) -> None:
    script(clone / "bin" / "python3", OLD)
    script(clone / "bin" / "python3.14", f'exec "{sys.executable}" "$@"\n')
    done = make(clone, "test")
    assert done.returncode != 0
    assert "There is a newer one here: make PYTHON=python3.14 ..." in done.stderr


@needs_make
def test_no_python(clone: Path) -> None:
    done = make(clone, "book", "PYTHON=python-of-nobody")
    assert done.returncode != 0
    assert "There is no 'python-of-nobody' here." in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr


@needs_make
def test_python_without_venv(clone: Path) -> None:
    script(clone / "bin" / "python3", NO_VENV)
    done = make(clone, "env")
    assert done.returncode != 0
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install python{version}-venv (or python3-venv)" in done.stderr
    assert "Traceback" not in done.stderr


FAKE_VENV_PYTHON = """
case "$*" in
    *pip*install*) echo "$@" >> {log}; [ ! -e {fail} ] || exit 1;;
    *) exit 0;;
esac
"""


@needs_make
def test_set_up_installs_once_and_goes_on_after_an_interruption(clone: Path) -> None:
    """With a Python in .venv that writes down what pip is asked for."""
    log, fail = clone / "log", clone / "fail"
    (clone / ".venv" / "bin").mkdir(parents=True)
    script(clone / ".venv" / "bin" / "python", FAKE_VENV_PYTHON.format(log=log, fail=fail))
    packages = clone / ".venv" / "lib" / "python3.11" / "site-packages"
    whole, half = packages / "whole-1.dist-info", packages / "half-1.dist-info"
    for folder in (whole, half):
        folder.mkdir(parents=True)
    (whole / "RECORD").write_text("")

    fail.write_text("")
    assert make(clone, "env").returncode != 0
    assert not (clone / ".venv" / ".installed").exists()
    assert whole.exists() and not half.exists()
    fail.unlink()
    log.unlink()
    done = make(clone, "env")
    assert done.returncode == 0, done.stderr
    asked = log.read_text().splitlines()
    assert "install --quiet --upgrade pip setuptools" in asked[0]
    assert asked[-1].endswith("-c constraints.txt -e .[book,test]")
    assert len(asked) == 2

    log.unlink()
    assert make(clone, "env").returncode == 0
    assert not log.exists(), "nothing had changed, and pip was called again"
    (clone / "constraints.txt").write_text("torch==2.14.1\n")
    assert make(clone, "env", "TORCH_INDEX=https://example.org/cpu").returncode == 0
    asked = log.read_text().splitlines()
    assert len(asked) == 3
    assert "--no-deps --index-url https://example.org/cpu -c constraints.txt torch torchvision" in asked[1]


def played(clone: Path, venv: str) -> Path:
    """An environment whose Python writes down all that it is asked to run, and runs nothing."""
    (clone / venv / "bin").mkdir(parents=True)
    script(clone / venv / "bin" / "python", f'[ "$1" = -c ] || [ "$3" = --version ] || echo "$@" >> {clone / "log"}\n')
    return clone / "log"


@needs_make
def test_the_oldest_versions_are_tested_by_what_needs_no_tools_of_the_book(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VENV", "PACKAGES", "UPGRADE"):
        monkeypatch.setenv(name, "of the user, for something else")
    shutil.copy(ROOT / "constraints-lowest.txt", clone)
    log = played(clone, ".venv-lowest")
    assert make(clone, "test-lowest").returncode == 0
    _, install, tests = log.read_text().splitlines()
    assert install.endswith("install --quiet -c constraints-lowest.txt -e .[test]")
    assert tests.startswith("-m pytest tests --ignore=tests/pages --ignore=tests/test_book_extensions.py")
    log.unlink()
    assert make(clone, "test-lowest").returncode == 0
    assert log.read_text().splitlines() == [tests], "nothing had changed, and pip was called again"


@needs_make
def test_the_newest_versions_are_looked_for_each_time(clone: Path) -> None:
    log = played(clone, ".venv-newest")
    for _ in range(2):
        done = make(clone, "test-newest", "TORCH_INDEX=https://example.org/cpu")
        assert done.returncode == 0, done.stderr
        pip, torch, install, tests, notebooks = log.read_text().splitlines()
        assert pip.endswith("install --quiet --upgrade pip setuptools")
        newest = "install --quiet --upgrade --upgrade-strategy eager"
        assert f"{newest} --no-deps --index-url https://example.org/cpu -c /dev/null" in torch
        assert install.endswith(f"{newest} -c /dev/null -e .[book,test]")
        assert tests == "-m pytest tests --ignore=tests/pages"
        assert "--nbval-lax" in notebooks and notebooks.endswith(" notebooks") and "sanitize" not in notebooks
        log.unlink()
    assert not (clone / ".venv").exists()


@needs_make
@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_audit_has_its_own_small_environment(clone: Path, status: int) -> None:
    log = played(clone, ".venv-audit")
    with open(clone / ".venv-audit" / "bin" / "python", "a") as file:
        file.write(f'[ "$1" != tools/audit.py ] || exit {status}\n')
    done = make(clone, "audit")
    assert (done.returncode == 0) == (status == 0)
    _, install, audit = log.read_text().splitlines()
    assert re.fullmatch(r"-m pip install --quiet pip-audit==[\d.]+", install)
    assert audit.strip() == "tools/audit.py"
    assert not (clone / ".venv").exists()


@needs_make
def test_an_unusable_environment_is_made_anew(clone: Path) -> None:
    (clone / ".venv" / "bin").mkdir(parents=True)
    script(clone / ".venv" / "bin" / "python", "exit 127\n")
    script(clone / "bin" / "python3", f'[ "$2" = venv ] && echo "$@" >> {clone / "log"}\nexit 0\n')
    make(clone, "env")
    assert (clone / "log").read_text() == "-m venv --clear .venv\n"
