"""The built pages in a real browser: accessibility, layout, mathematics, search, nothing from another host.

Every page is looked at in a light and a dark system, on a phone and on a desktop. What the helpers of
tools/browser.py can find is proved at the end, on a page with planted faults.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import browser
import check_site
import pytest
from playwright.sync_api import Browser, Page

PROGRAM = browser.find()
if PROGRAM is None:
    pytest.skip(browser.MISSING, allow_module_level=True)

BUILT = check_site.BUILT
FRONT = "index.html"


def built_pages() -> list[str]:
    """All pages; without a book the front page alone, whose tests then say that the book is not built."""
    try:
        return check_site.page_names(BUILT)
    except FileNotFoundError:
        return [FRONT]


PAGES = built_pages()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all tests."""
    assert PROGRAM is not None
    with browser.launch(PROGRAM) as running:
        yield running


@pytest.fixture(scope="module")
def book() -> Path:
    """The folder of the built book."""
    if not (BUILT / FRONT).is_file():
        pytest.fail("The book is not built: run make book.", pytrace=False)
    return BUILT


@pytest.fixture(scope="module")
def home(book: Path) -> Iterator[str]:
    """The address of the built book."""
    with browser.serve(book) as address:
        yield address


@pytest.fixture(scope="module")
def only_page(chromium: Browser) -> Iterator[Page]:
    """One window, used for all pages one after the other."""
    context = browser.new_context(chromium, "phone")
    yield context.pages[0]
    context.close()


@pytest.fixture
def window(only_page: Page, home: str) -> Iterator[tuple[Page, browser.Listener]]:
    """The window, and somebody who listens to what its pages complain about."""
    listener = browser.Listener(home)
    with listener.attached(only_page):
        yield only_page, listener


def report(faults: list[str]) -> None:
    """Fail with all the faults, one a line."""
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


def chapters(book: Path) -> list[check_site.Page]:
    """The pages made from notebooks, in the order of their names."""
    return sorted((page for page in check_site.Site.read(book) if page.is_notebook), key=lambda page: page.name)


SCROLLING = """() => {
    const boxes = [...document.querySelectorAll('.bd-article div.math, .bd-article mjx-container, .bd-article table')];
    const wide = box => box.matches('div.math, [display], table') && box.scrollWidth > box.clientWidth + 1;
    return {
        wide: boxes.filter(wide).length,
        unreachable: boxes.filter(box => wide(box) && box.tabIndex < 0).length,
        needless: boxes.filter(box => !wide(box) && box.tabIndex >= 0).length,
    };
}"""


def test_keyboard_stops_at_what_scrolls_only(window: tuple[Page, browser.Listener], home: str, book: Path) -> None:
    """A wide equation or table takes the focus, in an unfolded hint too; no other one is a stop of the tab key."""
    page, _ = window
    wide = {"phone": 0, "desktop": 0}
    for chapter in chapters(book):
        for size in wide:
            browser.use_size(page, size)
            browser.visit(page, home + chapter.name)
            browser.fold(page, False)
            found = page.evaluate(SCROLLING)
            assert found["unreachable"] == found["needless"] == 0, f"{chapter.name}, {size}: {found}"
            wide[size] += found["wide"]
    assert wide["phone"] > wide["desktop"]  # else there was nothing to look at


@pytest.mark.parametrize("name", PAGES)
def test_page(window: tuple[Page, browser.Listener], home: str, name: str) -> None:
    """No complaint in the console, nothing from elsewhere, mathematics typeset, fits the window, axe finds nothing.

    Read on a phone with everything unfolded, then the window grows to a desktop's, where it is folded up again at the
    end. The page is loaded once, since to typeset a chapter takes as long as to look at it.
    """
    page, listener = window
    browser.use_scheme(page, "light")
    browser.use_size(page, "phone")
    browser.visit(page, home + name)
    faults = [*listener.take(), *browser.mathematics(page)]
    too_wide = browser.overflow(page)
    faults += [f"phone: {fault}" for fault in too_wide]
    unfolded = browser.fold(page, False)
    faults += [f"phone, unfolded: {fault}" for fault in browser.overflow(page) if fault not in too_wide]
    faults += [f"phone: {fault}" for fault in browser.cut_formulas(page)]
    browser.slim(page)
    for size in browser.SIZES:
        if size != "phone":
            browser.use_size(page, size)
            faults += [f"{size}: {fault}" for fault in browser.overflow(page)]
        for scheme in browser.SCHEMES:
            browser.use_scheme(page, scheme)
            if (theme := page.evaluate("document.documentElement.dataset.theme")) != scheme:
                faults.append(f"the page is {theme} where the system is {scheme}")
            faults += [f"{size}, {scheme}: {fault}" for fault in browser.axe_violations(page)]
    if unfolded:
        browser.use_scheme(page, "light")
        browser.fold(page, True)
        faults += [f"desktop, light, folded: {fault}" for fault in browser.axe_violations(page)]
    report(faults + listener.take())


@pytest.mark.parametrize("size", browser.SIZES)
def test_search_by_keyboard(window: tuple[Page, browser.Listener], book: Path, home: str, size: str) -> None:
    """From the front page, Tab and Enter alone open the search, and a chapter's title finds that chapter."""
    page, listener = window
    browser.use_size(page, size)
    chapter = chapters(book)[-1]
    title = re.sub(r"^[\d.\s]+", "", chapter.title.split("—")[0]).strip()
    browser.visit(page, home + FRONT)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.search-button__button')"):
            break
    else:
        pytest.fail("40 times Tab do not lead to the search button", pytrace=False)
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#pst-search-dialog').open")
    assert page.evaluate("document.activeElement.matches('#pst-search-dialog input[type=search]')")
    faults = [f"search dialog: {fault}" for fault in browser.axe_violations(page)]

    page.keyboard.type(title)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    page.wait_for_selector("#search-results li a")
    # Sphinx writes "Search finished, found …" when all results are there
    page.wait_for_function(
        "!/Searching|Preparing/.test(document.querySelector('#search-results h2')?.textContent ?? '')"
    )
    browser.settle(page)
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href.split(/[?#]/)[0])")
    assert home + chapter.name in found, f"{title!r} does not find {chapter.name}, but {found}"
    faults += [f"search results: {fault}" for fault in [*browser.overflow(page), *browser.axe_violations(page)]]
    report(faults + listener.take())


def test_from_disk(chromium: Browser, book: Path) -> None:
    """The front page and a chapter need no server: opened as files they load everything and typeset mathematics."""
    listener = browser.Listener("file:")
    context = browser.new_context(chromium, "desktop")
    page = context.pages[0]
    chapter = chapters(book)[0]
    with listener.attached(page):
        browser.visit(page, (book / FRONT).as_uri())
        faults = browser.mathematics(page)
        browser.visit(page, chapter.file.as_uri())
        faults += browser.mathematics(page)
        drawn = page.locator("mjx-container").count()
    context.close()
    report(listener.take() + faults)
    assert drawn, f"no mathematics on {chapter.name}"


FAULTY = """<!doctype html><html lang="en"><head><title>Faulty</title>
<style>details p { width: 3000px } .wide { width: 2000px } .pale { color: #bbb; background: #fff }</style>
<script src="http://example.org/script.js"></script><script src="missing.js"></script></head>
<body><main><h1>Faulty</h1><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">
<p class="pale">Too pale</p><p class="wide">Too wide</p><p>Raw \\(x\\)</p>
<span class="math">\\(y\\)</span>
<p><mjx-container><mjx-merror data-mjx-error="Missing brace"></mjx-merror></mjx-container></p>
<p><mjx-container><mjx-math></mjx-math><math><mtext mathcolor="red">\\norn</mtext></math></mjx-container></p>
<details><summary>More</summary><p>Wide</p><button></button></details></main>
<script>console.warn("a warning"); undefined_function();</script></body></html>"""


@pytest.fixture
def faulty(chromium: Browser, tmp_path: Path) -> Iterator[tuple[Page, browser.Listener]]:
    """A page with faults of every kind, and what it complained about while it was opened."""
    (tmp_path / "faulty.html").write_text(FAULTY, encoding="utf-8")
    context = browser.new_context(chromium, "phone")
    with browser.serve(tmp_path) as address:
        listener = browser.Listener(address)
        page = context.pages[0]
        with listener.attached(page):
            browser.visit(page, address + "faulty.html")
            yield page, listener
    context.close()


def test_listener_hears_faults(faulty: tuple[Page, browser.Listener]) -> None:
    """Requests to other hosts, missing files, warnings and broken scripts are all reported, once."""
    _, listener = faulty
    heard = "\n".join(listener.take())
    assert "request to another place: http://example.org/script.js" in heard
    assert "failed: http://example.org/script.js" in heard
    assert re.search(r"404: .*/missing\.js", heard)
    assert "console warning: a warning" in heard
    assert "script error: undefined_function is not defined" in heard
    assert listener.take() == []


def test_mathematics_finds_faults(faulty: tuple[Page, browser.Listener]) -> None:
    """What MathJax has left, could not read or does not know is reported."""
    found = browser.mathematics(faulty[0])
    assert found == [
        "not typeset: \\(y\\)",
        "MathJax error: Missing brace",
        "unknown TeX command: \\norn",
        "raw TeX: Raw \\(x\\)",
        "raw TeX: \\(y\\)",
    ]


def test_overflow_finds_faults(faulty: tuple[Page, browser.Listener]) -> None:
    """A page wider than its window is reported with the element that does it, unfolded parts included."""
    page, _ = faulty
    (found,) = browser.overflow(page)
    assert "p.wide" in found
    page.add_style_tag(content=".wide { width: auto !important }")
    assert browser.overflow(page) == []
    assert browser.fold(page, False) == 1
    assert len(browser.overflow(page)) == 1
    assert browser.fold(page, True) == 1
    assert browser.overflow(page) == []


def test_cut_formulas_finds_faults(faulty: tuple[Page, browser.Listener]) -> None:
    """A formula within a line that is wider than the window is reported, one that fits or is displayed is not."""
    page, _ = faulty
    assert browser.cut_formulas(page) == []
    page.evaluate("""() => {
        for (const [display, width] of [['', 500], ['', 100], ['true', 500]]) {
            const box = document.createElement('mjx-container');
            if (display) box.setAttribute('display', display);
            box.style.cssText = `display: inline-block; width: ${width}px`;
            box.textContent = 'abc';
            document.querySelector('main').append(box);
        }
    }""")
    (found,) = browser.cut_formulas(page)
    assert re.match(r"a formula is cut off by \d+ px in: ", found)


def test_axe_finds_faults(faulty: tuple[Page, browser.Listener]) -> None:
    """axe-core runs: it misses an alternative text, contrast, and, unfolded, the name of a button."""
    page, _ = faulty
    folded = "\n".join(browser.axe_violations(page))
    assert "axe image-alt: img" in folded
    assert "axe color-contrast: .pale" in folded
    assert "button-name" not in folded
    browser.fold(page, False)
    assert "axe button-name: button" in "\n".join(browser.axe_violations(page))


def test_slim_keeps_faults(chromium: Browser) -> None:
    """What `slim` takes away hides no fault: one pale piece of code of each kind and a pale formula are still found."""
    context = browser.new_context(chromium, "desktop")
    page = context.pages[0]
    line = '<span class="k">def</span> <span class="n">pale</span> <span class="k">def</span>'
    page.set_content(
        f"""<html lang="en"><head><title>Code</title><style>.k {{ color: #ccc }} .dark {{ background: #222 }}
        .dark .n {{ color: #444 }} .faint {{ color: #ddd }}</style></head><body><main><h1>Code</h1>
        <div class="highlight"><pre>{line}\n{line}</pre></div>
        <div class="highlight dark"><pre style="color: #fff">{line}\n{line}</pre></div>
        <p class="faint"><mjx-container>
        <mjx-math aria-hidden="true" style="display: inline-block; width: 90px; height: 20px">
        <mjx-mi></mjx-mi></mjx-math></mjx-container></p></main></body></html>"""
    )
    before = browser.axe_violations(page, shown=99)
    browser.slim(page)
    after = browser.axe_violations(page, shown=99)
    width = page.evaluate("document.querySelector('mjx-math').getBoundingClientRect().width")
    context.close()
    assert len(before) == 4 + 2 and all("color-contrast" in fault for fault in before)
    assert len(after) == 3 and all("color-contrast" in fault for fault in after)
    assert any("mjx-math" in fault for fault in after)
    assert width == 90


def test_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CHROME comes first and must be a program; without it a known name on PATH is taken."""
    program = tmp_path / "google-chrome"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CHROME", str(program))
    assert browser.find() == str(program)
    monkeypatch.setenv("CHROME", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        browser.find()
    monkeypatch.delenv("CHROME")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert browser.find() == str(program)
    program.unlink()
    monkeypatch.setattr(browser, "PLACES", ())
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert browser.find() is None
