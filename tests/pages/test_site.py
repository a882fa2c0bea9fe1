"""The built pages pass every check of tools/check_site.py, and each check can fail: proved on planted faults."""

from __future__ import annotations

import json
import re
from pathlib import Path

import check_site
import pytest
from check_site import Site

GOOD = """<!doctype html><html lang="en"><head><title>Good</title><link rel="stylesheet" href="_static/s.css">
<link rel="canonical" href="https://example.org/"><style>p {{ color: red }}</style></head><body>
<article><h1 id="top">Good <a href="#top">#</a></h1><h2>Part</h2><h3>Piece</h3><h2>Part</h2>
<p>Costs $5 and $6 <a href="https://example.org">elsewhere</a> <a href="other.html#there">there</a>
<code>{{eq}} $$ ** ```</code> <span class="math">\\(x\\)</span></p><img src="i.png" alt="A line that rises">
<details><summary>More</summary><p>text</p></details>{extra}</article></body></html>"""


def plant(folder: Path, extra: str = "", page: str | None = None, name: str = "page.html") -> Site:
    """A small site without faults but those that `extra` (put at the end of the article) or `page` brings."""
    (folder / "_static").mkdir()
    (folder / "_static" / "s.css").write_text("p { background: url(i.png) } @import 'more.css';")
    (folder / "i.png").write_bytes(b"picture")
    (folder / "other.html").write_text(GOOD.format(extra='<p id="there"></p>').replace("other.html#there", "page.html"))
    (folder / "page.html").write_text(GOOD.format(extra=""))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(GOOD.format(extra=extra) if page is None else page, encoding="utf-8")
    return Site.read(folder)


@pytest.fixture(scope="module")
def book() -> Site:
    """The built book."""
    try:
        return Site.read(check_site.BUILT)
    except FileNotFoundError:
        pytest.fail("The book is not built: run make book.", pytrace=False)


@pytest.mark.parametrize("check", check_site.CHECKS, ids=lambda check: check.__name__)
def test_book(book: Site, check: check_site.Check) -> None:
    """The built book has no problem."""
    if problems := check(book):
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.parametrize("check", check_site.CHECKS, ids=lambda check: check.__name__)
def test_good_site_passes(tmp_path: Path, check: check_site.Check) -> None:
    """A site without faults passes: no check complains about what is right."""
    assert check(plant(tmp_path)) == []


@pytest.mark.parametrize(
    ("check", "extra", "said"),
    [
        ("links", '<a href="gone.html">x</a>', "no file for gone.html"),
        ("links", '<a href="other.html#gone">x</a>', "no anchor for other.html#gone"),
        ("links", '<a href="#gone">x</a>', "no anchor for #gone"),
        ("links", '<a href="../secret.txt">x</a>', "leads out of the book"),
        ("links", '<a href="_static/">x</a>', "is a folder"),
        ("links", '<img src="gone.png" alt="Gone">', "no file for gone.png"),
        ("links", '<meta http-equiv="Refresh" content="0; url=gone.html">', "no file for gone.html"),
        ("other_hosts", '<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ("other_hosts", '<script src="//cdn.example/x.js"></script>', "loads //cdn.example/x.js"),
        ("other_hosts", '<link rel="stylesheet" href="https://cdn.example/x.css">', "x.css"),
        ("other_hosts", '<link rel="preconnect" href="https://fonts.example">', "fonts.example"),
        ("other_hosts", '<img alt="A curve" src="https://cdn.example/x.png">', "x.png"),
        ("other_hosts", '<img alt="A curve" src="i.png" srcset="i.png 1x, https://cdn.example/2.png 2x">', "2.png"),
        ("other_hosts", '<iframe src="https://video.example"></iframe>', "video.example"),
        ("other_hosts", "<style>@import 'https://cdn.example/a.css';</style>", "a.css"),
        ("other_hosts", "<style>p { background: url(https://cdn.example/b.png) }</style>", "b.png"),
        ("other_hosts", '<p style="background: url(//cdn.example/c.png)">', "c.png"),
        ("alternatives", '<img src="i.png">', "has no alt"),
        ("alternatives", '<img src="i.png" alt="../_images/0f3a.png">', "name of a file"),
        ("duplicate_ids", '<p id="top">', "id 'top' is there 2 times"),
        ("summaries", "<details><p>x</p></details>", "without <summary>"),
        ("summaries", "<details>x</details>", "without <summary>"),
        ("summaries", "<details><p>x</p><summary>Late</summary></details>", "without <summary>"),
        ("summaries", "<details><summary><i></i></summary></details>", "<summary> without text"),
        ("raw_markup", "<p>see {eq}<code>eq-x</code></p>", "a role"),
        ("raw_markup", "<p>{measured}`a:b`</p>", "a role"),
        ("raw_markup", "<p>{cite:t}`a`</p>", "a role"),
        ("raw_markup", "<p>$$ x $$</p>", "display mathematics"),
        ("raw_markup", "<p>\\begin{align} x</p>", "display mathematics"),
        ("raw_markup", "<p>where $x_t$ is</p>", "inline mathematics"),
        ("raw_markup", "<p>where \\(x_t\\) is</p>", "inline mathematics"),
        ("raw_markup", "<p>**Pitfall.** x</p>", "bold type"),
        ("raw_markup", "<p>[text](page.md)</p>", "a link"),
        ("raw_markup", "<p>```{note}</p>", "a fence"),
        ("raw_markup", "<p>by (eq-forward-sample) we</p>", "a target"),
        ("headings", "<h4>Too deep</h4>", "<h4> follows <h2>"),
        ("headings", "<h1>Second</h1>", "has 2"),
    ],
)
def test_planted_fault(tmp_path: Path, check: str, extra: str, said: str) -> None:
    """Each kind of fault is reported, on its page."""
    problems = getattr(check_site, check)(plant(tmp_path, extra))
    assert len(problems) >= 1 and all(problem.startswith("page.html: ") for problem in problems)
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("<title>Good</title>", "", "no <title>"),
        ("<title>Good</title>", "<title> </title>", "no <title>"),
        ("<title>Good</title>", "<title>About \\(x\\)</title>", "raw mathematics"),
        (' lang="en"', "", "no lang"),
    ],
)
def test_title_and_language_find_faults(tmp_path: Path, before: str, after: str, said: str) -> None:
    """A page without title or language is reported."""
    (problem,) = check_site.title_and_language(plant(tmp_path, page=GOOD.format(extra="").replace(before, after)))
    assert said in problem


def test_first_heading_comes_first(tmp_path: Path) -> None:
    """A page that starts below the first level, or has no heading, is reported."""
    page = GOOD.format(extra="").replace("<h1", "<h2").replace("</h1", "</h2")
    assert check_site.headings(plant(tmp_path, page=page)) == [
        "page.html: wants one <h1>, before all other headings; has 0"
    ]


def test_style_sheet_from_elsewhere(tmp_path: Path) -> None:
    """What a style sheet loads from another host is reported."""
    site = plant(tmp_path)
    (tmp_path / "_static" / "s.css").write_text(
        "@import url('https://cdn.example/a.css'); p { src: url(data:x) } q { src: url(//cdn.example/f.woff2) }"
    )
    assert check_site.other_hosts(site) == [
        "_static/s.css: loads https://cdn.example/a.css",
        "_static/s.css: loads //cdn.example/f.woff2",
    ]


def test_weight_counts_each_image_once(tmp_path: Path) -> None:
    """A page is weighed with its images, an image that is there twice once."""
    site = plant(tmp_path, '<img src="big.png" alt="A"><img src="big.png" alt="A">')
    (tmp_path / "big.png").write_bytes(bytes(check_site.BUDGET // 2))
    assert check_site.weight(site) == []
    (tmp_path / "big.png").write_bytes(bytes(check_site.BUDGET))
    (problem,) = check_site.weight(site)
    assert problem.startswith("page.html: 3.00 MiB with its images")


def test_notebook_is_offered(tmp_path: Path) -> None:
    """A page of a notebook must offer it, the file must be there, and it must be a notebook."""
    page = GOOD.format(extra='<a href="01_x.ipynb">.ipynb</a>')
    site = plant(tmp_path, page=page, name="notebooks/01_x.html")
    file = tmp_path / "notebooks" / "01_x.ipynb"
    assert "no such file" in check_site.downloads(site)[0]
    file.write_text("not a notebook")
    assert "is not a notebook" in check_site.downloads(site)[0]
    file.write_text(json.dumps({"cells": [{"cell_type": "markdown"}]}))
    assert check_site.downloads(site) == []
    (tmp_path / "notebooks" / "01_x.html").write_text(page.replace("01_x.ipynb", "02_y.ipynb"))
    assert "does not offer 01_x.ipynb" in check_site.downloads(Site.read(tmp_path))[0]


def test_cells_make_a_notebook_page(tmp_path: Path) -> None:
    """A page with cells has to offer its notebook, wherever it lies."""
    (problem,) = check_site.downloads(plant(tmp_path, '<div class="cell docutils container"></div>'))
    assert problem == "page.html: does not offer page.ipynb for download"


def test_redirects_are_no_pages(tmp_path: Path) -> None:
    """A page that only sends on is not among the pages to look at, and needs no heading."""
    page = '<html lang="en"><meta http-equiv="Refresh" content="0; url=other.html"><title>Book</title></html>'
    site = plant(tmp_path, page=page)
    assert [problem for check in check_site.CHECKS for problem in check(site)] == []
    assert check_site.page_names(tmp_path) == ["other.html"]


def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints every problem and the number of them, and fails when there is one or no book."""
    assert check_site.main([str(tmp_path)]) == 1
    assert "run make book" in capsys.readouterr().err
    plant(tmp_path)
    assert check_site.main([str(tmp_path)]) == 0
    assert re.fullmatch(r"2 pages, \d+ links, 0 problems\n", capsys.readouterr().out)
    (tmp_path / "i.png").unlink()
    assert check_site.main([str(tmp_path)]) == 1
    assert "page.html: no file for i.png" in capsys.readouterr().out
