"""Chromium for the checks of the built pages: find it, start it, serve the book to it, and ask it what is wrong.

Used by tests/pages/test_browser.py and tools/screenshots.py.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    # imported late elsewhere: to find the browser, playwright is not needed
    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Error, Page, Request, Response

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Google\Chrome\Application\chrome.exe",
)
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # no other host can be reached, and a request to one fails at once. (Playwright's own interception of requests
    # would turn the browser's cache off.)
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
AXE_TAGS = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")
MISSING = "no Chromium or Chrome found: run `make browser`"


def find() -> str | None:
    """The program named by the environment variable CHROME, else the Chromium or Chrome of this machine, or None.

    Raises FileNotFoundError when CHROME names nothing that can be run.
    """
    if wanted := os.environ.get("CHROME"):
        if (program := shutil.which(wanted)) is None:
            raise FileNotFoundError(f"CHROME is {wanted!r}, which is no program")
        return program
    local = os.environ.get("LOCALAPPDATA")
    places = [*PLACES, *([str(Path(local, "Google/Chrome/Application/chrome.exe"))] if local else [])]
    return next((program for program in map(shutil.which, (*NAMES, *places)) if program), None)


class _Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # some systems answer with other types, and browsers refuse scripts of a wrong one
    extensions_map = {  # noqa: RUF012
        **SimpleHTTPRequestHandler.extensions_map,
        ".css": "text/css",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".svg": "image/svg+xml",
        ".wasm": "application/wasm",
        ".woff": "font/woff",
        ".woff2": "font/woff2",
    }

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path | str) -> Iterator[str]:
    """Serve a folder on a free port of this machine; yields its address, which ends with a slash."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def launch(program: str) -> Iterator[Browser]:
    """Start the browser, without a window and with a new profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # without the sandbox, which root and most containers cannot have: the pages are our own
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS), chromium_sandbox=False)
        try:
            yield browser
        finally:
            browser.close()


def new_context(browser: Browser, size: str, scheme: str = "light") -> BrowserContext:
    """A window of the size `size` (a key of SIZES) in which nothing moves, so that no check meets a half-way state."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
    context.set_default_timeout(20_000)
    page = context.new_page()
    use_scheme(page, scheme)
    return context


@dataclass
class Listener:
    """Collects what a page complains about while it is open: console, scripts, requests."""

    home: str
    messages: list[str] = field(default_factory=list)

    @contextmanager
    def attached(self, page: Page) -> Iterator[None]:
        """Hear everything that happens on `page` inside the `with` block."""
        handlers: dict[str, Callable[[Any], None]] = {
            "console": self._console,
            "pageerror": self._script_error,
            "request": self._request,
            "requestfailed": self._failed,
            "response": self._response,
        }
        for event, handler in handlers.items():
            page.on(event, handler)  # type: ignore[call-overload]
        try:
            yield
        finally:
            for event, handler in handlers.items():
                page.remove_listener(event, handler)

    def _script_error(self, error: Error) -> None:
        self.messages.append(f"script error: {error.message}")

    def _failed(self, request: Request) -> None:
        self.messages.append(f"failed: {request.url} ({request.failure})")

    def _response(self, answer: Response) -> None:
        if answer.status >= 400:
            self.messages.append(f"{answer.status}: {answer.url}")

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.messages.append(f"console {message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).scheme not in ("data", "blob") and not request.url.startswith(self.home):
            self.messages.append(f"request to another place: {request.url}")

    def take(self) -> list[str]:
        """What was collected since the last call."""
        taken, self.messages = list(dict.fromkeys(self.messages)), []
        return taken


SETTLED = """async () => {
    await document.fonts.ready;
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
    await Promise.all([...document.images].filter(i => i.loading !== 'lazy').map(i => i.decode().catch(() => {})));
    const drawn = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
    await drawn();
    // a colour that is on its way to another has a contrast of its own
    for (const change of document.getAnimations()) if (change instanceof CSSTransition) change.finish();
    await drawn();
}"""


def settle(page: Page) -> None:
    """Wait until fonts, images and mathematics are there and what was changed is on the screen."""
    page.evaluate(SETTLED)


def visit(page: Page, address: str) -> None:
    """Open a page, or the one it sends on to, and wait until it is complete."""
    page.goto(address, wait_until="load")
    page.wait_for_function("!document.querySelector('meta[http-equiv=refresh i]')")
    page.wait_for_load_state("load")
    settle(page)


def use_scheme(page: Page, scheme: str) -> None:
    """Let the system of the reader be "light" or "dark"; the book's pages follow it."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    settle(page)


def use_size(page: Page, size: str) -> None:
    """Make the window as large as that of a "phone" or a "desktop"."""
    width, height = SIZES[size]
    if page.viewport_size != {"width": width, "height": height}:
        page.set_viewport_size({"width": width, "height": height})
        # the theme waits 0.3 s for further changes before it decides anew which boxes scroll and take the focus
        page.wait_for_timeout(400)
    settle(page)


def fold(page: Page, folded: bool) -> int:
    """Close, or open, everything on the page that can be folded up (hints, solutions, code); returns how many."""
    changed: int = page.evaluate(
        """folded => {
        const details = [...document.querySelectorAll('details')].filter(e => e.open === folded);
        for (const e of details) e.open = !folded;
        // boxes folded by sphinx-togglebutton have a button of their own
        const boxes = [...document.querySelectorAll('.toggle, .admonition.dropdown')].filter(
            e => e.tagName !== 'DETAILS' && e.classList.contains('toggle-hidden') !== folded);
        for (const e of boxes) e.querySelector('button.toggle-button')?.click();
        return details.length + boxes.length;
    }""",
        folded,
    )
    settle(page)
    return changed


def slim(page: Page) -> None:
    """Take away what axe would look at hundreds of times with the same answer: a chapter is done in 2 s, not in 30.

    A formula keeps its box, in which two letters stand for MathJax's drawing; axe does not see the drawing, but it
    sees whether the letters have enough contrast. Of the formulas in running text, and of the coloured pieces of code,
    one in each kind of surroundings stays; the others become empty boxes and plain text.
    """
    page.evaluate("""() => {
        const seen = new Set();
        const isNew = (element, inner) => {
            let kind = inner;
            for (let e = element; e; e = e.parentElement) kind += ` in ${e.tagName}.${e.className}`;
            return !seen.has(kind) && seen.add(kind);
        };

        const formulas = [...document.querySelectorAll('mjx-container')].filter(e => e.querySelector('mjx-math'));
        const boxes = formulas.map(formula => formula.querySelector('mjx-math').getBoundingClientRect());
        formulas.forEach((formula, i) => {
            const drawing = formula.querySelector('mjx-math');
            const spoken = formula.querySelector('mjx-assistive-mml > math');
            const box = {display: 'inline-block', width: `${boxes[i].width}px`, height: `${boxes[i].height}px`};
            const named = formula.closest('a, button, summary, label, h1, h2, h3, h4, h5, h6, th');
            if (named || formula.hasAttribute('display') || isNew(formula, 'formula')) {
                drawing.textContent = 'xx';
                drawing.removeAttribute('aria-hidden');
                Object.assign(drawing.style, box);
                if (spoken) spoken.textContent = 'x';
            } else {
                formula.replaceChildren();
                Object.assign(formula.style, box);
            }
        });

        for (const block of document.querySelectorAll('.highlight pre')) {
            for (const span of block.querySelectorAll('span[class]:not([id]):not([style])')) {
                if (!span.firstElementChild && !isNew(span.parentElement, span.className))
                    span.replaceWith(...span.childNodes);
            }
            block.normalize();
        }
    }""")
    settle(page)


@functools.cache
def _axe() -> str:
    from axe_playwright_python.base import AXE_SCRIPT

    return str(AXE_SCRIPT)


def axe_violations(page: Page, shown: int = 4) -> list[str]:
    """What axe-core finds wrong with the page as it is now: `shown` elements of each rule, and how many more."""
    page.evaluate("script => { if (!window.axe) (0, eval)(script); }", _axe())
    violations = page.evaluate(
        """async tags => (await axe.run(document, {
            runOnly: tags, resultTypes: ['violations'], preload: false, iframes: false,
        })).violations.map(rule => [rule.id, rule.nodes.map(
            node => [node.target.join(' '), node.html.slice(0, 120), node.failureSummary])])""",
        list(AXE_TAGS),
    )
    found = []
    for rule, nodes in violations:
        for target, html, summary in nodes[:shown]:
            found.append(f"axe {rule}: {target} :: {' '.join(html.split())} :: {' '.join(summary.split())}")
        if len(nodes) > shown:
            found.append(f"axe {rule}: {len(nodes) - shown} more elements")
    return found


def overflow(page: Page) -> list[str]:
    """The document is not wider than the window; if it is, which element does it."""
    return list(
        page.evaluate("""() => {
        const root = document.documentElement;
        const excess = () => root.scrollWidth - root.clientWidth;
        const all = excess();
        if (all <= 0) return [];
        // from the body downwards, the child without which the page would be narrower
        const path = [];
        for (let e = document.body; e;) {
            path.push([e.tagName.toLowerCase() + (e.id && `#${e.id}`), ...e.classList].join('.'));
            e = [...e.children].find(child => {
                if (!child.style || child.matches('script, style')) return false;
                const before = child.getAttribute('style');
                child.style.setProperty('display', 'none', 'important');
                const narrower = excess() < all;
                if (before === null) child.removeAttribute('style'); else child.setAttribute('style', before);
                return narrower;
            });
        }
        return [`the page is ${all} px wider than the window: ` + path.slice(-4).join(' > ')];
    }""")
    )


def cut_formulas(page: Page) -> list[str]:
    """No formula within a line reaches beyond the window, where it is cut off; displayed ones can be scrolled."""
    return list(
        page.evaluate("""() => {
        const faults = [];
        // the sidebars, which repeat headings, lie beside a phone's window until they are called
        const text = document.querySelector('.bd-article') || document.body;
        for (const e of text.querySelectorAll('mjx-container:not([display="true"])')) {
            const excess = Math.round(e.getBoundingClientRect().right - document.documentElement.clientWidth);
            const tex = () => (e.parentElement.closest('p, li, td, dd') || e.parentElement).textContent.trim();
            if (excess > 0) faults.push(`a formula is cut off by ${excess} px in: ${tex().slice(0, 60)}`);
        }
        return faults;
    }""")
    )


def mathematics(page: Page) -> list[str]:
    """All mathematics was typeset, without an error and without an unknown command."""
    return list(
        page.evaluate(r"""() => {
        const faults = [];
        for (const e of document.querySelectorAll('.math')) {
            if (!e.querySelector('mjx-container') && !e.closest('mjx-container'))
                faults.push('not typeset: ' + e.textContent.trim().slice(0, 80));
        }
        for (const e of document.querySelectorAll('mjx-merror, merror'))
            faults.push('MathJax error: ' + (e.getAttribute('data-mjx-error') || e.textContent).slice(0, 120));
        // MathJax writes a command that it does not know in red
        for (const e of document.querySelectorAll('mtext[mathcolor="red"]'))
            faults.push('unknown TeX command: ' + e.textContent.slice(0, 40));
        const code = 'pre, code, script, style, textarea, mjx-container, .highlight';
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        for (let n = walker.nextNode(); n; n = walker.nextNode()) {
            if (/\\[([]/.test(n.data) && !n.parentElement.closest(code))
                faults.push('raw TeX: ' + n.data.trim().slice(0, 80));
        }
        return [...new Set(faults)];
    }""")
    )
