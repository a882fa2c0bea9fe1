"""The audit of the pinned versions: with a pip-audit that says what it is told to say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import audit
import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = ["a-package==1.0", "B_package==2.0.post1"]
KNOWN = {"name": "flask", "version": "0.5", "vulns": [{"id": "PYSEC-2018-66", "fix_versions": ["0.12.3"]}]}
CLEAN = [
    {"name": "a-package", "version": "1.0", "vulns": []},
    {"name": "b-package", "version": "2.0.post1", "vulns": []},
]
VULNERABLE = {
    "name": "a-package",
    "version": "1.0",
    "vulns": [
        {"id": "PYSEC-2026-2", "fix_versions": [], "aliases": [], "description": "…"},
        {"id": "PYSEC-2026-1", "fix_versions": ["1.1", "1.2"], "aliases": ["CVE-2026-1"], "description": "…"},
    ],
}


def skipped(name: str) -> dict[str, str]:
    """An entry as pip-audit 2.10 writes it where its source does not know a package, with the exit status 0."""
    return {"name": name, "skip_reason": f"Dependency not found on PyPI and could not be audited: {name} (1.0)"}


@pytest.fixture
def pip_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with what pip-audit is to report, and with its exit status."""

    def play(entries: list[dict[str, Any]] | str, status: int = 0, error: str = "") -> Path:
        report = entries if isinstance(entries, str) else json.dumps({"dependencies": entries, "fixes": []})
        program = tmp_path / "pip_audit.py"
        program.write_text(
            "import sys; from pathlib import Path\n"
            f"Path({str(tmp_path / 'asked')!r}).write_text(Path(sys.argv[sys.argv.index('-r') + 1]).read_text())\n"
            f"print({report!r}); print({error!r}, file=sys.stderr); sys.exit({status})\n"
        )
        monkeypatch.setattr(audit, "COMMAND", [sys.executable, str(program)])
        path = tmp_path / "pins.txt"
        path.write_text("# some words\n" + "".join(f"{line}\n" for line in LINES))
        return path

    return play


def run(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = audit.main([str(path)])
    out, err = capsys.readouterr()
    return status, out, err


def test_all_looked_up_and_clean(pip_audit: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(pip_audit([*CLEAN, KNOWN], status=1), capsys)
    assert (status, err) == (0, "")
    assert out == "pins.txt: 2 versions looked up, 0 known vulnerabilities\n"
    assert (tmp_path / "asked").read_text().splitlines() == [*LINES, audit.KNOWN]


def test_vulnerable_versions_are_named(pip_audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(pip_audit([VULNERABLE, CLEAN[1], KNOWN], status=1), capsys)
    assert status == 1
    assert out.splitlines() == [
        "a-package 1.0: PYSEC-2026-1, fixed in 1.1, 1.2",
        "a-package 1.0: PYSEC-2026-2, not fixed yet",
        "pins.txt: 2 versions looked up, 2 known vulnerabilities",
    ]


@pytest.mark.parametrize(
    "entries, status, error, words",
    [
        ([skipped("a-package"), skipped("b-package"), skipped("flask")], 0, "", "3 of 3 versions were not looked up"),
        ([CLEAN[0], skipped("b-package"), KNOWN], 0, "", r"1 of 3 .*B_package==2.0.post1 \(Dependency not found"),
        ([CLEAN[0], KNOWN], 0, "", r"B_package==2.0.post1 \(not in the report\)"),
        ([*CLEAN, KNOWN | {"vulns": []}], 0, "No known vulnerabilities found", "knows none of flask==0.5"),
        ([VULNERABLE, CLEAN[1], skipped("flask")], 1, "", "1 of 3 versions were not looked up"),
        ("", 1, "first\nERROR: Could not connect", "failed with status 1: ERROR: Could not connect"),
        ("", 0, "", "it said nothing"),
        ("no JSON", 0, "", "could not be read"),
        ('{"other": 1}', 0, "", "could not be read"),
        ("[1]", 0, "", "could not be read"),
    ],
)
def test_what_was_not_looked_up_is_no_success(
    pip_audit: Any, capsys: pytest.CaptureFixture[str], entries: Any, status: int, error: str, words: str
) -> None:
    code, out, err = run(pip_audit(entries, status, error), capsys)
    assert code == 2 and out == ""
    assert re.match(f"NOT AUDITED: .*{words}", err) and err.count("\n") == 1


def test_without_pip_audit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text(LINES[0])
    monkeypatch.setattr(audit, "COMMAND", [sys.executable, "-m", "no_such_module"])
    status, _, err = run(path, capsys)
    assert status == 2 and "No module named no_such_module" in err


@pytest.mark.parametrize("text", ["", "# nothing\n", "a>=1\n", "-r other.txt\n", "a @ https://example.org/a.whl\n"])
def test_only_lists_of_versions_are_read(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "pins.txt"
    path.write_text(text)
    status, _, err = run(path, capsys)
    assert status == 2 and "is no list of name==version" in err


def test_the_project_s_own_list() -> None:
    lines = audit.pins(ROOT / "constraints.txt")
    assert len(lines) > 100
    assert audit.canonical(audit.KNOWN.split("==")[0]) not in {audit.canonical(line.split("==")[0]) for line in lines}
