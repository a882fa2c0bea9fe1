"""Take pictures of the built pages, for people who look at their pages: phone and desktop, light and dark.

python tools/screenshots.py FOLDER [PAGE …] [--full]

python tools/screenshots.py shots                                    all pages, as far as the window shows them
python tools/screenshots.py shots notebooks/01_forward_process.html --full     one page, from top to bottom
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import browser
import check_site


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures and print their paths; 1 when there is no book, no browser or no such page."""
    parser = argparse.ArgumentParser(description="Take pictures of the built pages, phone and desktop, light and dark.")
    parser.add_argument("folder", type=Path, help="where the pictures go; made if it is not there")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="such as book/index.html; all if none is named")
    parser.add_argument("--full", action="store_true", help="the whole page, not only what the window shows")
    parser.add_argument("--site", type=Path, default=check_site.BUILT, help="the built book")
    options = parser.parse_args(arguments)

    try:
        known = check_site.page_names(options.site)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    if unknown := [page for page in options.pages if page not in known]:
        print(f"no page {unknown[0]!r} in {options.site}; there are:", *known, sep="\n  ", file=sys.stderr)
        return 1
    if (program := browser.find()) is None:
        print(browser.MISSING, file=sys.stderr)
        return 1

    options.folder.mkdir(parents=True, exist_ok=True)
    with browser.serve(options.site) as home, browser.launch(program) as running:
        for size in browser.SIZES:
            context = browser.new_context(running, size)
            page = context.pages[0]
            for name in options.pages or known:
                browser.visit(page, home + name)
                for scheme in browser.SCHEMES:
                    browser.use_scheme(page, scheme)
                    stem = name.removesuffix(".html").replace("/", "-")
                    picture = options.folder / f"{stem}-{size}-{scheme}.png"
                    page.screenshot(path=picture, full_page=options.full)
                    print(picture)
            context.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
