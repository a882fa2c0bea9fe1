"""The tools that maintainers run: executing, measuring, the Colab cell, the constraints, the list of checks."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import checks
import freeze
import measure
import nbformat
import pytest
import run_notebooks
import set_address
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run_notebooks import NotebookError, canonical, execute, prepare_environment, read, write

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "https://github.com/owner/name"


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """What prepare_environment() sets is gone after each test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def stored(path: Path, *sources: str) -> Path:
    """A notebook of these code cells after a first cell of text."""
    head = new_markdown_cell("# Title\n\n<!-- cost -->Unknown.<!-- /cost -->")
    write(new_notebook(cells=[head, *map(new_code_cell, sources)]), path)
    return path


# executing and writing


def test_figures_are_kept_with_few_colours() -> None:
    """Less than half the bytes, hardly another picture, and the same again when done twice."""
    import matplotlib.pyplot as plt
    import numpy as np
    from PIL import Image

    figure, axes = plt.subplots()
    for i in range(12):
        axes.plot(np.sin(np.linspace(0, 6, 50) + i), color=plt.cm.viridis(i / 12))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    small = run_notebooks.few_colours(file.getvalue())
    assert len(small) < len(file.getvalue()) / 2 and run_notebooks.few_colours(small) == small
    old, new = (np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), float) for p in (file.getvalue(), small))
    assert np.sqrt(((old - new) ** 2).mean()) < 2


def test_a_second_run_changes_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = "import matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.show()"
    loop = "import time\n\nfor i in range(5):\n    print(i, flush=True)\n    time.sleep(0.02)"
    path = stored(tmp_path / "a.ipynb", "print(1)\n1 + 1", loop, figure)
    assert run_notebooks.main([str(path)]) == 0
    first = path.read_bytes()
    assert b"image/png" in first
    assert run_notebooks.main([str(path)]) == 0
    assert path.read_bytes() == first
    assert "a.ipynb: unchanged" in capsys.readouterr().out
    assert [len(cell.outputs) for cell in read(path).cells[1:]] == [2, 1, 1]
    assert run_notebooks.main(["--check", str(path)]) == 0


def test_a_failing_cell_is_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored(tmp_path / "a.ipynb", "x = 1", "x / 0")
    before = path.read_bytes()
    assert run_notebooks.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "a.ipynb, cell 2: ZeroDivisionError: division by zero" in said
    assert "x / 0" in said
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("source", "message"),
    [("import time; time.sleep(60)", "no end after 1 s"), ("import os; os._exit(1)", "the kernel died")],
)
def test_a_cell_that_hangs_or_kills_the_kernel_is_named(tmp_path: Path, source: str, message: str) -> None:
    prepare_environment()
    with pytest.raises(NotebookError, match=rf"a\.ipynb, cell 2: {message}"):
        execute(stored(tmp_path / "a.ipynb", "1", source), timeout=1 if "sleep" in source else 60)


def test_a_missing_notebook_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_notebooks.main([str(tmp_path / "b.ipynb")]) == 2
    assert "b.ipynb" in capsys.readouterr().err


def test_check_tells_another_form(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.ipynb", "1")
    path.write_text(path.read_text() + "\n")
    assert run_notebooks.main(["--check", str(path)]) == 1


def test_canonical_form_keeps_what_matters_and_drops_the_rest() -> None:
    kept = {"tags": ["hide-input"], "mystnb": {"image": {"alt": "text"}}, "exercise": "1.2"}
    output = new_output("display_data", data={"text/plain": "1"}, metadata={"measured": {"name": "n", "value": "1"}})
    pieces = [new_output("stream", name="stdout", text=text) for text in ("a", "b\n")]
    cell = new_code_cell("1", outputs=[*pieces, output], metadata=kept | {"execution": {"time": "now"}})
    nb = new_notebook(cells=[cell], metadata={"widgets": {}, "language_info": {"name": "python", "version": "3.11.7"}})
    output["transient"] = {"display_id": "random"}  # as the kernel sends it
    text = canonical(nb)
    assert "random" not in text and "3.11.7" not in text and "now" not in text and "widgets" not in text
    again = nbformat.reads(text, as_version=4)
    assert again.cells[0].metadata == kept
    assert again.cells[0].outputs[0].text == "ab\n"
    assert again.cells[0].outputs[1].metadata == {"measured": {"name": "n", "value": "1"}}
    assert canonical(again) == text
    assert output["transient"], "the notebook that was given has changed"


def test_identifiers_do_not_depend_on_other_cells() -> None:
    cells = [new_markdown_cell("# A title\n\nText"), new_code_cell("a = 1"), new_code_cell("b = 2")]
    cells.append(new_code_cell("check()", metadata={"exercise": "1.2", "tags": ["exercise"]}))
    before = [c.id for c in nbformat.reads(canonical(new_notebook(cells=cells)), as_version=4).cells]
    cells.insert(1, new_code_cell("new = 0"))
    after = [c.id for c in nbformat.reads(canonical(new_notebook(cells=cells)), as_version=4).cells]
    assert [name for name in after if name in before] == before
    assert before[0] == "a-title" and before[-1] == "exercise-1-2"
    twice = new_notebook(cells=[new_code_cell("a = 1"), new_code_cell("a = 1")])
    ids = [c.id for c in nbformat.reads(canonical(twice), as_version=4).cells]
    assert len(set(ids)) == 2


# measuring


def test_measured_seconds_and_memory_are_those_of_the_notebook(tmp_path: Path) -> None:
    """A cell that fills 300 MiB and then frees them, and one that waits two seconds."""
    prepare_environment()
    path = stored(tmp_path / "a.ipynb", "x = bytearray(b'1') * (300 * 2**20)\ndel x", "import time\n\ntime.sleep(2)")
    light = measure.measure(stored(tmp_path / "b.ipynb", "1"))
    heavy = measure.measure(path)
    assert 250 <= int(heavy["peak_mib"]) - int(light["peak_mib"]) <= 350
    assert 30 <= int(light["peak_mib"]) <= 300
    assert 2 <= int(heavy["seconds"]) <= 20


def test_measuring_writes_only_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path / "a.ipynb", "print(1)")
    assert run_notebooks.main([str(path)]) == 0
    before = path.read_text()
    monkeypatch.setattr(measure, "COSTS", tmp_path / "costs.json")
    monkeypatch.setattr(measure, "notebooks", lambda: [path])
    monkeypatch.setattr(measure.read_costs, "__defaults__", (tmp_path / "costs.json",))
    assert measure.main([]) == 0
    cost = measure.read_costs()["a"]
    sentence = measure.cost_line(cost)
    assert path.read_text() == before.replace("<!-- cost -->Unknown.<!-- /cost -->", sentence)
    assert before != path.read_text()


def test_no_markers_is_an_error(tmp_path: Path) -> None:
    nb = new_notebook(cells=[new_markdown_cell("# Title")])
    with pytest.raises(ValueError, match="0 pairs"):
        measure.put_cost_line(nb, {"seconds": 1, "peak_mib": 100, "cores": 2, "torch": "2.9.0"})


@pytest.mark.parametrize(
    ("seconds", "mib", "cores", "text"),
    [
        (12, 610, 2, "Runs in 12 s and needs 0.6 GiB of memory (two cores;"),
        (60, 1500, 1, "Runs in 1 min and needs 1.5 GiB of memory (one core;"),
        (95, 100, 16, "Runs in 1 min 35 s and needs 0.1 GiB of memory (16 cores;"),
    ],
)
def test_sentence(seconds: int, mib: int, cores: int, text: str) -> None:
    line = measure.cost_line({"seconds": seconds, "peak_mib": mib, "cores": cores, "torch": "2.14.1"})
    assert line == f"<!-- cost -->{text} measured by `make measure`).<!-- /cost -->"


@pytest.mark.parametrize(("measured", "told"), [(0.2, 1), (11.01, 12), (30.0, 30), (30.1, 35), (58.0, 60)])
def test_seconds_are_rounded_up(measured: float, told: int) -> None:
    assert measure.rounded_seconds(measured) == told


# the repository's address


@pytest.mark.parametrize("address", [ADDRESS, ADDRESS + "/", ADDRESS + ".git", f" {ADDRESS} "])
def test_address_has_one_form(address: str) -> None:
    assert set_address.validated(address) == ADDRESS


@pytest.mark.parametrize(
    "address",
    ["", "owner/name", "http://github.com/owner/name", "https://github.com/owner", ADDRESS + '"; x', "https://a b/c/d"],
)
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="no address of a repository"):
        set_address.validated(address)


def test_a_wrong_address_is_one_line_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = set_address.PYPROJECT.read_bytes()
    assert set_address.main(["github.com"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert set_address.PYPROJECT.read_bytes() == before


def test_address_is_stored_and_taken_out_again(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    plain = re.sub(r"\[project\.urls\]\nRepository.*\n\n", "", set_address.PYPROJECT.read_text())
    path.write_text(plain)
    assert set_address.repository_address(path) is None
    set_address.store(ADDRESS, path)
    assert set_address.repository_address(path) == ADDRESS
    rest = tomllib.loads(path.read_text())
    del rest["project"]["urls"]
    assert rest == tomllib.loads(plain)
    set_address.store(ADDRESS + "2", path)
    assert set_address.repository_address(path) == ADDRESS + "2"
    set_address.store(None, path)
    assert path.read_text() == plain


def test_address_reaches_the_notebooks(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.ipynb", "1")
    assert "added" in set_address.update_notebook(path, None)
    assert "google.colab" in read(path).cells[1].source
    assert set_address.update_notebook(path, None) == "unchanged"
    assert set_address.update_notebook(path, ADDRESS) == "written"
    assert [cell.source for cell in read(path).cells[1:]] == [set_address.colab_cell(ADDRESS), "1"]
    assert read(path).cells[1].metadata.tags == ["colab"]


@pytest.mark.parametrize("address", [None, ADDRESS])
def test_colab_cell_is_formatted_as_ruff_wants(address: str | None) -> None:
    command = [sys.executable, "-m", "ruff", "format", "--diff", "--stdin-filename=a.py", "-"]
    cell = set_address.colab_cell(address) + "\n"
    done = subprocess.run(command, cwd=ROOT, input=cell, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# The cell, run where diffbook is missing (-S -I: no site-packages), with what pip would be asked to do.
FAKE = """
import subprocess, sys, types
{colab}
asked = []
subprocess.run = lambda command, **options: asked.append((command, options))
exec({cell!r})
print(asked)
"""


def run_colab_cell(address: str | None, colab: str, *flags: str) -> subprocess.CompletedProcess[str]:
    code = FAKE.format(colab=colab, cell=set_address.colab_cell(address))
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)


ON_COLAB = "sys.modules['google.colab'] = types.ModuleType('google.colab')"


def test_colab_cell_installs_on_colab() -> None:
    done = run_colab_cell(ADDRESS, ON_COLAB, "-S", "-I")
    assert done.returncode == 0, done.stderr
    ((command, options),) = eval(done.stdout)
    assert command[1:] == ["-m", "pip", "install", "--quiet", f"diffbook @ git+{ADDRESS}"]
    assert options == {"check": True}


def test_colab_cell_explains_without_an_address() -> None:
    done = run_colab_cell(None, ON_COLAB, "-S", "-I")
    assert done.returncode == 1
    assert "%pip install git+https://github.com/owner/name" in done.stderr


@pytest.mark.parametrize("address", [None, ADDRESS])
@pytest.mark.parametrize("colab", ["", ON_COLAB], ids=["elsewhere", "on Colab with the package"])
def test_colab_cell_does_nothing_otherwise(address: str | None, colab: str) -> None:
    done = run_colab_cell(address, colab, *([] if colab else ["-S", "-I"]))
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


# the constraints


def test_constraints_are_what_is_needed_and_no_more() -> None:
    pins = freeze.pins()
    assert {"torch", "numpy", "sphinx", "nbval", "pytest"} <= set(pins)
    assert not [name for name in pins if name.startswith(("nvidia", "cuda", "triton", "diffbook"))]


# the list of checks


def test_every_step_runs_and_the_failed_one_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    fail, succeed = ((sys.executable, "-c", f"raise SystemExit({code})") for code in (3, 0))
    steps = [
        checks.Step("first", "fails", (fail, succeed)),
        checks.Step("second", "succeeds", (succeed,)),
    ]
    assert checks.main([], steps) == 1
    out = capfd.readouterr().out
    assert "1 of 2 steps failed: first" in out
    assert "alone: make test ONLY=first" in out
    assert re.search(r"second\s+passed\s+\d+ s", out)
    assert checks.main(["second"], steps) == 0
    assert "Every check passed." in capfd.readouterr().out


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        checks.main(["everything"])
    assert stopped.value.code == 2
    assert "no step 'everything'" in capsys.readouterr().err


def test_a_missing_browser_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pages = checks.Step("pages", "nothing", ((sys.executable, "-c", ""),))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(checks.browser, "find", lambda: None)
    assert checks.main([], [pages]) == 0
    out = capfd.readouterr().out
    assert "NOT CHECKED" in out and "make browser" in out
    monkeypatch.setattr(checks.browser, "find", lambda: "/usr/bin/chromium")
    assert checks.main([], [pages]) == 0
    assert "NOT CHECKED" not in capfd.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_ci_installs_the_browser_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an apt-get that only writes down what it is asked for, and a PATH that has no browser."""
    log = tmp_path / "asked"
    apt = tmp_path / "bin" / "apt-get"
    apt.parent.mkdir()
    apt.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    apt.chmod(0o755)
    for name in ("sh", "id", "sudo"):
        found = shutil.which(name)
        if found:
            (apt.parent / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(apt.parent))
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    if checks.browser.find() is not None or os.getuid() != 0:
        pytest.skip("has a browser outside PATH, or is not root")
    checks.install_browser_in_ci()
    assert "install -q -y --no-install-recommends chromium" in log.read_text()


# diffs of notebooks


@pytest.mark.skipif(shutil.which("git") is None or sys.platform == "win32", reason="needs git and a POSIX shell")
@pytest.mark.parametrize("with_nbdime", [True, False])
def test_git_shows_and_merges_notebooks(tmp_path: Path, with_nbdime: bool) -> None:
    def git(*arguments: str, check: bool = True) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    git("init", "-q", "-b", "main")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "notebook_git.sh", tmp_path / "tools")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    if with_nbdime:
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        wrapper = tmp_path / ".venv" / "bin" / "python"
        wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        wrapper.chmod(0o755)
        (tmp_path / ".gitignore").write_text(".venv\n")
    subprocess.run(["sh", "tools/notebook_git.sh", "setup"], cwd=tmp_path, check=True)

    notebook = stored(tmp_path / "a.ipynb", "first = 1", "second = 2", "third = 3")
    git("add", "-A")
    git("commit", "-qm", "one")
    git("switch", "-qc", "other")
    stored(notebook, "first = 1", "second = 2", "third = 30")
    shown = git("diff", "--ext-diff")
    assert "third = 30" in shown
    assert ("nbdiff" in shown) == with_nbdime
    git("commit", "-qam", "two")
    git("switch", "-q", "main")
    stored(notebook, "first = 10", "second = 2", "third = 3")
    git("commit", "-qam", "three")
    git("merge", "-q", "other", check=False)
    merged = [cell.source for cell in read(notebook).cells[1:]]
    assert merged == ["first = 10", "second = 2", "third = 30"]


def test_set_up_of_diffs_outside_a_repository_does_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    command = ["sh", str(ROOT / "tools" / "notebook_git.sh"), "setup"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")
    assert list(tmp_path.iterdir()) == []
