"""Small repairs of the built pages, each held by the accessibility test; and the links to the repository.

The repository's address has one source, ``Repository`` under ``[project.urls]`` in pyproject.toml. Where it is known,
the pages get a repository button and launch buttons; where it is not, they get none rather than dead ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment


def repair(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    if "generate_toctree_html" in context:
        context["generate_toctree_html"] = name_the_toggles(context["generate_toctree_html"])
    body = context.get("body")
    if not body:
        return
    # docutils gives citation lists a role whose children do not have the matching one
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    body = body.replace(' role="doc-biblioentry"', "").replace(' role="doc-backlink"', "")
    # a hidden code cell is announced by its visible text, "Show code cell source"
    body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    context["body"] = body


def name_the_toggles(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Say what each arrow in the sidebar opens: the theme gives it a picture and no name."""

    def named(*arguments: Any, **options: Any) -> Any:
        menu = generate(*arguments, **options)
        for summary in menu.select("details > summary") if hasattr(menu, "select") else []:
            summary["aria-label"] = f"Pages below {summary.find_parent('li').find('a').get_text(strip=True)}"
        return menu

    return named


def number_chapter_zero(app: Sphinx, env: BuildEnvironment) -> None:
    """Chapter 00 stands before the numbered part: its equations are (0.1), (0.2), … as those of chapter 1 are (1.1)."""
    for page in env.found_docs:
        if page.startswith("notebooks/00_"):
            numbers = env.toc_fignumbers.get(page, {}).get("displaymath", {})
            numbers.update({key: (0, i) for i, key in enumerate(numbers, start=1)})


def repository(app: Sphinx, config: Config) -> None:
    path = Path(app.srcdir) / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"] if path.is_file() else {}
    address = project.get("urls", {}).get("Repository", "")
    options = config.html_theme_options
    options["repository_url"] = address
    options["repository_branch"] = "main"  # the theme takes master for granted
    options["use_repository_button"] = bool(address)
    options["use_issues_button"] = bool(address)
    options["launch_buttons"] = (
        {
            "notebook_interface": "jupyterlab",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        }
        if address
        else {}
    )


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("config-inited", repository, priority=900)  # after Jupyter Book has set its own
    app.connect("env-check-consistency", number_chapter_zero)
    app.connect("html-page-context", repair, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
