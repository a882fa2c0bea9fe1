"""Check the built book without a browser: links, assets, alternatives, ids, headings, downloads, weight.

    python tools/check_site.py [_build/html]

Every check is a function from the site to a list of problems, one line each, so that tests can call it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "_build" / "html"
BUDGET = 3 * 1024 * 1024  # bytes of a page with its images and films

VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"))
# attributes that make the browser fetch something as soon as the page is open; those of a film or picture have weight
MEDIA = {
    ("img", "src"), ("source", "src"), ("video", "src"), ("video", "poster"), ("audio", "src"), ("track", "src"),
    ("input", "src"), ("image", "href"), ("image", "xlink:href"),
}  # fmt: skip
FETCHED = MEDIA | {("script", "src"), ("iframe", "src"), ("embed", "src"), ("object", "data"), ("use", "href")}
# <link> relations that only say what belongs together; every other one fetches or connects
RELATIONS = frozenset(
    ("alternate", "author", "bookmark", "canonical", "help", "index", "license", "next", "prev", "search", "top", "up")
)
CSS_URL = re.compile(r"(?:@import\s+(?:url\()?|url\()\s*[\"']?([^\"')\s;]+)")

# text in which braces, dollars and stars mean what they are
VERBATIM_TAGS = frozenset(("code", "pre", "kbd", "samp", "script", "style", "textarea", "math", "svg"))
VERBATIM_CLASSES = frozenset(("math", "sig", "highlight", "output_area", "tex2jax_process", "mathjax_process"))
RAW = {
    "a role": re.compile(r"\{[a-z][a-z:+_-]+\}"),
    "display mathematics": re.compile(r"\$\$|\\\[|\\begin\{"),
    "inline mathematics": re.compile(r"\$[^\s$](?:[^$\n]*[^\s$])?\$|\\\("),
    "bold type": re.compile(r"\*\*[^\s*]"),
    "a link": re.compile(r"\]\([^)\s]+\)"),
    "a fence": re.compile(r"```|:::"),
    "a target": re.compile(r"\((?:eq|def)-[a-z0-9-]+\)"),
}
IMAGE_FILE = re.compile(r"\.(?:png|svg|jpe?g|gif|webp)$", re.IGNORECASE)


@dataclass
class Element:
    """An open element: what its children have to know of it."""

    tag: str
    classes: frozenset[str]
    children: int = 0


class Page(HTMLParser):
    """What the checks want to know of one page."""

    def __init__(self, file: Path, name: str) -> None:
        super().__init__()
        self.file = file
        self.name = name
        self.ids: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.media: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.headings: list[tuple[int, bool]] = []
        self.summaries: list[str] = []
        self.bare_details = 0
        self.text: list[str] = []
        self.title = ""
        self.lang = ""
        self.redirect: str | None = None
        self.has_cells = False
        self._open: list[Element] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def _inside(self, tag: str, css_class: str | None = None) -> bool:
        return any(e.tag == tag and (css_class is None or css_class in e.classes) for e in self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        classes = frozenset((values.get("class") or "").split())
        parent = self._open[-1] if self._open else None
        if parent is not None:
            if parent.tag == "details" and parent.children == 0 and tag != "summary":
                self.bare_details += 1
            parent.children += 1
        if tag == "summary":
            self.summaries.append(values.get("aria-label") or "")
        if tag not in VOID:
            self._open.append(Element(tag, classes))

        self._references(tag, values)
        if identifier := values.get("id"):
            self.ids.append(identifier)
            self.anchors.add(identifier)
        if tag == "a" and (anchor := values.get("name")):
            self.anchors.add(anchor)
        if tag == "html":
            self.lang = values.get("lang") or ""
        if tag == "img":
            self.images.append(values)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append((int(tag[1]), self._inside("article")))
        if tag == "div" and {"cell", "docutils"} <= classes:
            self.has_cells = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def _references(self, tag: str, values: dict[str, str | None]) -> None:
        for key, value in values.items():
            if not value:
                continue
            if (tag, key) in FETCHED:
                self.assets.append(value)
            if (tag, key) in MEDIA:
                self.media.add(value)
            if key == "srcset":
                candidates = [part.split()[0] for part in value.split(", ") if part.strip()]
                self.assets += candidates
                self.media.update(candidates)
            if key == "style":
                self.assets += CSS_URL.findall(value)
            if tag in ("a", "area") and key in ("href", "xlink:href"):
                self.links.append(value)
        href = values.get("href")
        if tag == "link" and href and not set((values.get("rel") or "").lower().split()) <= RELATIONS:
            self.assets.append(href)
        elif tag == "link" and href:
            self.links.append(href)
        if tag == "meta" and (values.get("http-equiv") or "").lower() == "refresh":
            _, _, target = (values.get("content") or "").partition("=")
            self.redirect = target.strip()
            self.links.append(self.redirect)

    def handle_endtag(self, tag: str) -> None:
        # an element that nobody closed (<p>, <li>) ends with the one around it
        for depth in range(len(self._open) - 1, -1, -1):
            if self._open[depth].tag == tag:
                for element in self._open[depth:]:
                    if element.tag == "details" and element.children == 0:
                        self.bare_details += 1
                del self._open[depth:]
                return

    def handle_data(self, data: str) -> None:
        if self._inside("style"):
            self.assets += CSS_URL.findall(data)
        if self._inside("title") and not self._inside("svg"):
            self.title += data
        if self._inside("summary"):
            self.summaries[-1] += data
        if not any(e.tag in VERBATIM_TAGS or e.classes & VERBATIM_CLASSES for e in self._open):
            self.text.append(data)

    @property
    def is_notebook(self) -> bool:
        """Whether the page was made from a notebook."""
        return self.has_cells or "notebooks" in Path(self.name).parts[:-1]


@dataclass
class Site:
    """The built book, every page read once."""

    root: Path
    pages: dict[Path, Page] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path | str) -> Site:
        """Read all pages below `root`. Raises FileNotFoundError when there is no book."""
        base = Path(root).resolve()
        # _static holds the theme's templates, which are no pages
        files = [f for f in sorted(base.rglob("*.html")) if "_static" not in f.relative_to(base).parts]
        if not files:
            raise FileNotFoundError(f"There is no built book in {root}: run make book.")
        return cls(base, {file: Page(file, file.relative_to(base).as_posix()) for file in files})

    def __iter__(self) -> Iterator[Page]:
        return iter(self.pages.values())

    def target(self, page: Page, reference: str) -> Path | None:
        """The file a reference leads to, or None when it leaves the book (another host, mail, data)."""
        url = urlsplit(reference)
        if url.scheme or url.netloc:
            return None
        return (page.file.parent / unquote(url.path)).resolve() if url.path else page.file


def page_names(root: Path | str = BUILT) -> list[str]:
    """The pages a reader can stay on, as paths below `root`: all but those that only send on to another."""
    return [page.name for page in Site.read(root) if page.redirect is None]


def links(site: Site) -> list[str]:
    """Every link, asset and anchor leads to something inside the book."""
    problems = []
    for page in site:
        for reference in dict.fromkeys(page.links + page.assets):
            target = site.target(page, reference)
            if target is None:
                continue
            anchor = unquote(urlsplit(reference).fragment)
            if not target.is_relative_to(site.root):
                problems.append(f"{page.name}: {reference} leads out of the book")
            elif target.is_dir():
                problems.append(f"{page.name}: {reference} is a folder, which shows no page when read from the disk")
            elif not target.exists():
                problems.append(f"{page.name}: no file for {reference}")
            elif anchor and target in site.pages and anchor not in site.pages[target].anchors:
                problems.append(f"{page.name}: no anchor for {reference}")
    return problems


def other_hosts(site: Site) -> list[str]:
    """Nothing is loaded from another host: no script, style, image, font, frame, nor a connection made in advance."""

    def is_foreign(reference: str) -> bool:
        url = urlsplit(reference)
        return bool(url.netloc) or url.scheme in ("http", "https", "ftp")

    problems = [
        f"{page.name}: loads {reference[:100]}"
        for page in site
        for reference in dict.fromkeys(page.assets)
        if is_foreign(reference)
    ]
    for file in sorted(site.root.rglob("*.css")):
        for reference in CSS_URL.findall(file.read_text(encoding="utf-8", errors="replace")):
            # the address of a resource in the document itself (#id) and data: are no requests
            if is_foreign(reference):
                problems.append(f"{file.relative_to(site.root).as_posix()}: loads {reference[:100]}")
    return problems


def alternatives(site: Site) -> list[str]:
    """Every image has an alternative text, which is not the name of its file."""
    problems = []
    for page in site:
        for image in page.images:
            source = (image.get("src") or "")[:80]
            alt = image.get("alt")
            if alt is None:
                problems.append(f"{page.name}: image {source} has no alt")
            elif IMAGE_FILE.search(alt.strip()):
                problems.append(f"{page.name}: image {source} has the name of a file as its alt: {alt}")
    return problems


def duplicate_ids(site: Site) -> list[str]:
    """No id is there twice on a page."""
    return [
        f"{page.name}: id {identifier!r} is there {count} times"
        for page in site
        for identifier, count in Counter(page.ids).items()
        if count > 1
    ]


def weight(site: Site, budget: int = BUDGET) -> list[str]:
    """No page weighs more than the budget together with its images and films."""
    problems = []
    for page in site:
        files = {site.target(page, reference) for reference in page.media} | {page.file}
        size = sum(file.stat().st_size for file in files if file is not None and file.is_file())
        if size > budget:
            problems.append(f"{page.name}: {size / 2**20:.2f} MiB with its images, over {budget / 2**20:.2f} MiB")
    return problems


def title_and_language(site: Site) -> list[str]:
    """Every page says its title and its language."""
    problems = []
    for page in site:
        if not page.title.strip():
            problems.append(f"{page.name}: no <title>")
        elif "\\(" in page.title or "$" in page.title:
            problems.append(f"{page.name}: raw mathematics in the title: {page.title.strip()}")
        if not page.lang:
            problems.append(f"{page.name}: <html> has no lang")
    return problems


def downloads(site: Site) -> list[str]:
    """Every page made from a notebook offers that notebook, and the file is a notebook."""
    problems = []
    for page in site:
        if not page.is_notebook or page.redirect is not None:
            continue
        wanted = Path(page.name).stem + ".ipynb"
        offered = [t for t in (site.target(page, link) for link in page.links) if t is not None and t.name == wanted]
        if not offered:
            problems.append(f"{page.name}: does not offer {wanted} for download")
        for file in dict.fromkeys(offered):
            if not file.is_file():
                problems.append(f"{page.name}: offers {wanted}, but there is no such file")
                continue
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                content = None
            if not isinstance(content, dict) or not content.get("cells"):
                problems.append(f"{page.name}: the {wanted} it offers is not a notebook")
    return problems


def summaries(site: Site) -> list[str]:
    """Every <details> starts with a <summary> that says something."""
    problems = []
    for page in site:
        if page.bare_details:
            problems.append(f"{page.name}: {page.bare_details} <details> without <summary> as the first thing in it")
        if empty := sum(not summary.strip() for summary in page.summaries):
            problems.append(f"{page.name}: {empty} <summary> without text")
    return problems


def raw_markup(site: Site) -> list[str]:
    """No MyST or TeX is left in the text that should have become something else."""
    problems = []
    for page in site:
        # one line a piece: a pattern must not reach from one element into the next
        text = "\n".join(piece.replace("\n", " ") for piece in page.text)
        for what, pattern in RAW.items():
            for match in pattern.finditer(text):
                around = text[max(0, match.start() - 30) : match.end() + 30].replace("\n", " ").strip()
                problems.append(f"{page.name}: {what} was left as it is in the source: … {around} …")
    return problems


def headings(site: Site) -> list[str]:
    """A page has one first-level heading, the first of all, and no level is skipped on the way down."""
    problems = []
    for page in site:
        if page.redirect is not None:
            continue
        # what stands outside the article belongs to the theme, which hides most of it
        in_article = [level for level, inside in page.headings if inside]
        levels = in_article or [level for level, _ in page.headings]
        if levels[:1] != [1] or levels.count(1) != 1:
            problems.append(f"{page.name}: wants one <h1>, before all other headings; has {levels.count(1)}")
        for before, after in pairwise(levels):
            if after > before + 1:
                problems.append(f"{page.name}: <h{after}> follows <h{before}>")
    return problems


Check = Callable[[Site], list[str]]
CHECKS: tuple[Check, ...] = (
    links,
    other_hosts,
    alternatives,
    duplicate_ids,
    weight,
    title_and_language,
    downloads,
    summaries,
    raw_markup,
    headings,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every problem of the book in the given folder; 1 if there is one."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        site = Site.read(given[0] if given else BUILT)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    problems = [problem for check in CHECKS for problem in check(site)]
    for problem in problems:
        print(problem)
    print(f"{len(site.pages)} pages, {sum(len(page.links) for page in site)} links, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
