"""The book's Sphinx extensions on small books, each with one fault that has to stop the build, and one without."""

import io
import json
import sys
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import proofs  # noqa: E402

CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_parser", "sphinx.ext.mathjax", "sphinx.ext.autodoc", "proofs", "measured", "bookfix"]
myst_enable_extensions = ["dollarmath", "amsmath"]
html_theme = "sphinx_book_theme"
master_doc = "index"
numfig = True
include_patterns = ["*.md"]
proofs_package = "src/pack"
"""

PAGE = """
# A book

```{toctree}
verified
```

$$
a = b
$$ (eq-one)

$$
c := d
$$ (def-two)

The result is {measured}`chapter:ratio`.
"""

TEST = '''
import pytest


@pytest.mark.parametrize("x", [1])
@pytest.mark.equation("one")
def test_one(x):
    """One is proved: exact."""
'''

SOURCE = '''
def compute():
    """Computes :eq:`eq-one` with :eq:`def-two`."""
'''


@pytest.fixture
def book(tmp_path):
    """A small book without a fault."""
    (tmp_path / "conf.py").write_text(CONF.format(ext=str(ROOT / "book" / "_ext")))
    (tmp_path / "index.md").write_text(PAGE)
    (tmp_path / "verified.md").write_text("# Verified\n\n```{verified-equations}\n```\n")
    for folder in ("tests", "src/pack", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tests" / "test_it.py").write_text(TEST)
    (tmp_path / "src" / "pack" / "code.py").write_text(SOURCE)
    output = {"metadata": {"measured": {"name": "ratio", "value": "1.23"}}}
    (tmp_path / "notebooks" / "chapter.ipynb").write_text(json.dumps({"cells": [{"outputs": [output]}]}))
    return tmp_path


def build(book):
    """Build and return the warnings."""
    warnings = io.StringIO()
    with patch_docutils(str(book)), docutils_namespace():
        app = Sphinx(
            *[str(book)] * 2, str(book / "out"), str(book / "trees"), "html", status=io.StringIO(), warning=warnings
        )
        app.build()
    return warnings.getvalue()


def html(book, name):
    return (book / "out" / name).read_text()


def test_a_book_without_fault(book):
    assert build(book) == ""
    pages = ("index.html", "verified.html", "proofs/tests/test_it.html")
    page, verified, source = (html(book, name) for name in pages)
    assert 'href="verified.html#proof-eq-one"' in page and " of equation 1</span>" in page
    assert "proof-def-two" not in page + verified
    assert 'id="proof-eq-one"' in verified and "One is proved: exact." in verified and "a = b" in verified
    assert 'href="proofs/tests/test_it.html#test_one"' in verified and "mathjax" in verified.lower()
    assert '<span id="test_one"></span>' in source and "parametrize" in source
    assert ">1.23<" in page


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        ("tests/test_it.py", '"one"', '"other"', ["equation 'eq-one' has no proof", "proves 'eq-other', which is not"]),
        ("tests/test_it.py", "@pytest.mark.equation", "# @pytest.mark.equation", ["equation 'eq-one' has no proof"]),
        ("tests/test_it.py", '"""One is proved: exact."""', "pass", ["the docstring should say what test_one proves"]),
        ("tests/test_it.py", '"one"', '"one", "three"', ["proves 'eq-three', which is not in the book"]),
        ("index.md", "(eq-one)", "(eq-new)", ["'eq-new' has no proof", "docstring of pack.code.compute names"]),
        ("index.md", "(def-two)", "(two)", ["'two': a claim is named eq-…, a definition def-…"]),
        ("src/pack/code.py", "def-two", "def-three", ["docstring of pack.code.compute names 'def-three'"]),
        ("index.md", "chapter:ratio", "chapter:size", ["records no result 'size'; it has: ratio"]),
        ("index.md", "chapter:ratio", "appendix:ratio", ["there is no notebook appendix.ipynb"]),
    ],
)  # fmt: skip
def test_a_fault_stops_the_build(book, file, old, new, words):
    path = book / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    warnings = build(book)
    assert all(word in warnings for word in words), warnings


def test_a_second_build_is_never_stale(book):
    build(book)
    (book / "tests" / "test_it.py").write_text(TEST.replace("One is proved", "One was proved again"))
    notebook = book / "notebooks" / "chapter.ipynb"
    notebook.write_text(notebook.read_text().replace("1.23", "4.56"))
    assert build(book) == ""
    assert "One was proved again" in html(book, "verified.html") and ">4.56<" in html(book, "index.html")


def test_chapter_zero_is_numbered_from_zero(book):
    (book / "conf.py").write_text((book / "conf.py").read_text().replace('"*.md"', '"*.md", "notebooks/*.md"'))
    (book / "notebooks" / "00_tools.md").write_text("# Tools\n\n$$\na\n$$ (def-a)\n\nSee {eq}`def-a`.\n")
    (book / "index.md").write_text(PAGE.replace("verified\n```", "verified\nnotebooks/00_tools\n```"))
    assert build(book) == ""
    page = html(book, "notebooks/00_tools.html")
    assert '<span class="eqno">(0.1)' in page and ">(0.1)</a>" in page


def test_links_to_the_repository_only_where_its_address_is_known(book):
    def options(project):
        (book / "pyproject.toml").write_text(project)
        with patch_docutils(str(book)), docutils_namespace():
            app = Sphinx(*[str(book)] * 2, str(book / "out"), str(book / "trees"), "html", status=None, warning=None)
        return app.config.html_theme_options

    unknown = options('[project]\nname = "x"\n')
    assert not unknown["use_repository_button"] and not unknown["launch_buttons"] and not unknown["repository_url"]
    known = options('[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/a/b"\n')
    assert known["repository_url"] == "https://github.com/a/b" and "colab_url" in known["launch_buttons"]
    assert known["repository_branch"] == "main"


def test_markers_are_found_wherever_pytest_takes_them(tmp_path):
    (tmp_path / "test_all.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.equation('module')]\n"
        "@pytest.mark.equation('klass')\n"
        "class TestIt:\n"
        "    pytestmark = pytest.mark.equation('inside')\n"
        "    @pytest.mark.equation('first', 'second')\n"
        "    def test_it(self):\n"
        "        'Says it.'\n"
        "def helper(): pass\n"
        "def test_other(): pass\n"
    )
    found = proofs.collect_proofs(tmp_path)
    labels = {p.label.removeprefix("eq-") for p in found if p.name == "TestIt.test_it"}
    assert labels == {"module", "klass", "inside", "first", "second"}
    assert {p.label for p in found if p.name == "test_other"} == {"eq-module"}
    assert {p.name for p in found} == {"TestIt.test_it", "test_other"}
    assert next(p for p in found if p.name == "TestIt.test_it").about == "Says it."


def test_docstrings_of_methods_and_modules_count(tmp_path):
    (tmp_path / "code.py").write_text(
        '"""Module, :eq:`eq-a`."""\nclass C:\n    """:eq:`eq-b`"""\n    def f(self):\n        """:eq:`eq-b`"""\n'
    )
    name = tmp_path.name
    assert proofs.collect_citations(tmp_path) == {
        "eq-a": [f"{name}.code"],
        "eq-b": [f"{name}.code.C", f"{name}.code.C.f"],
    }


@pytest.mark.parametrize(("function", "file"), [("front_strip", "front-strip"), ("captions_strip", "front-captions")])
def test_the_pictures_on_the_front_page_are_what_the_command_makes(function, file):
    """Up to what 50 network calls make of another processor's rounding."""
    from PIL import Image, ImageChops, ImageStat

    sys.path.insert(0, str(ROOT / "tools"))
    import front_strip

    drawn = getattr(front_strip, function)()
    stored = Image.open(front_strip.FOLDER / f"{file}.png").convert(drawn.mode)
    assert max(ImageStat.Stat(ImageChops.difference(stored, drawn)).rms) < 2
