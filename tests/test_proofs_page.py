"""What counts as a proof, and that a failed build of the book cannot pass when it is repeated."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "book" / "_ext"), str(ROOT / "tools")]

import build_book  # noqa: E402
import proofs  # noqa: E402


def test_what_never_runs_proves_nothing(tmp_path):
    mark = "@pytest.mark.equation('one')\n"
    (tmp_path / "test_all.py").write_text(
        "import pytest\n"
        f"@pytest.mark.skip(reason='later')\n{mark}def test_skipped(): pass\n"
        f"@pytest.mark.xfail\n{mark}def test_may_fail(): pass\n"
        f"class Other:\n    {mark}    def test_not_collected(self): pass\n"
        f"{mark}class TestSkipped:\n    pytestmark = pytest.mark.skip\n    def test_it(self): pass\n"
        f"{mark}def helper(): pass\n"
        f"@pytest.mark.skipif(False, reason='here it runs')\n{mark}def test_runs(): pass\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.equation('two'))])\n"
        "def test_parameter(x): pass\n"
    )
    (tmp_path / "test_module.py").write_text(
        f"import pytest\npytestmark = pytest.mark.skip\n{mark}def test_it(): pass\n"
    )
    found = {(p.name, p.label) for p in proofs.collect_proofs(tmp_path)}
    assert found == {("test_runs", "eq-one"), ("test_parameter", "eq-two")}


def test_a_failed_build_is_repeated_from_the_start(tmp_path, monkeypatch):
    """Sphinx warns of a page when it reads it: a second build on top of a failed one would pass in silence."""
    monkeypatch.setattr(build_book, "HTML", tmp_path / "_build" / "html")
    codes, left_over = [0, 1, 0, 0], []

    def sphinx(*arguments, **options):
        left_over.append(build_book.HTML.is_dir())
        build_book.HTML.mkdir(parents=True, exist_ok=True)
        (build_book.HTML / "index.html").write_text("a page")
        return subprocess.CompletedProcess(arguments, codes[len(left_over) - 1])

    monkeypatch.setattr(build_book.subprocess, "run", sphinx)
    assert [build_book.main() for _ in codes] == codes
    assert left_over == [False, True, False, True]


def test_a_label_that_is_no_literal_is_reported(tmp_path):
    """It becomes the name of an equation that no book has, of which the build warns."""
    (tmp_path / "test_all.py").write_text("@pytest.mark.equation('one', name)\ndef test_it(): pass\n")
    assert {p.label for p in proofs.collect_proofs(tmp_path)} == {"eq-one", "eq-name"}
