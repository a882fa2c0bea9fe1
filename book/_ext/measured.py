"""The role ``{measured}`notebook:name```: a result that a notebook measured, on another page of the book.

A notebook stores a result with ``diffbook.notebook.record``; the role reads it from the notebook's stored outputs, so
a number on a page is always the number of the last run. An unknown notebook or name is a warning.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole


@lru_cache
def measured(path: Path, modified: float) -> dict[str, str]:
    """Name → value of everything that a notebook recorded; ``modified`` keeps the cache fresh."""
    results = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            found = output.get("metadata", {}).get("measured")
            if found:
                results[found["name"]] = found["value"]
    return results


class Measured(SphinxRole):
    """Inserts the value as text, and makes the page depend on the notebook."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        stem, _, name = self.text.partition(":")
        path = Path(self.env.srcdir) / "notebooks" / f"{stem}.ipynb"
        if not path.is_file():
            return self._problem(f"there is no notebook {path.name}")
        self.env.note_dependency(str(path))
        results = measured(path, path.stat().st_mtime)
        if name not in results:
            return self._problem(f"{path.name} records no result {name!r}; it has: {', '.join(results) or 'none'}")
        return [nodes.inline(text=results[name], classes=["measured"])], []

    def _problem(self, text: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        message = self.inliner.reporter.warning(f"measured: {text}", line=self.lineno)
        return [nodes.problematic(self.rawtext, self.rawtext)], [message]


def setup(app: Sphinx) -> dict[str, object]:
    app.add_role("measured", Measured())
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
