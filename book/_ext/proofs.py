"""Every numbered equation carries its proof: the page "Verified equations", and the checks that keep it honest.

An equation that claims something has a label ``eq-…`` and at least one test marked
``@pytest.mark.equation("…")``, the label without ``eq-``. A definition has a label ``def-…`` and needs none. The
build warns, and so fails, on a claim without a test, a test without its equation, a docstring of the package that
names an unknown label, and a label that is neither. Tests and docstrings are read as text: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)
CITED = re.compile(r":eq:`([^`]+)`")


@dataclass(frozen=True)
class Proof:
    """A test that claims to prove an equation."""

    label: str
    path: Path  # of the test file
    name: str  # of the test, with its class
    line: int
    about: str  # first line of its docstring


def collect_proofs(folder: Path) -> list[Proof]:
    """All tests that run with an ``equation`` marker: on the function, a parameter, the class, or in ``pytestmark``."""
    proofs = []
    for path in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        proofs += [Proof(label, path, *rest) for label, *rest in _marked(tree, _labels(_pytestmark(tree)), "")]
    return proofs


def collect_citations(package: Path) -> dict[str, list[str]]:
    """Label → dotted names of the package's objects whose docstrings name it."""
    citations = defaultdict(list)
    for path in sorted(package.rglob("*.py")):
        module = ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        for name, text in _docstrings(ast.parse(path.read_text(encoding="utf-8")), module):
            for label in CITED.findall(text):
                citations[label].append(name)
    return dict(citations)


def _marked(node: ast.AST, inherited: set[str], prefix: str) -> Iterator[tuple[str, str, int, str]]:
    if isinstance(node, ast.Module) and _never_runs(_pytestmark(node)):
        return
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef):
            continue
        marks = [*child.decorator_list, *(_pytestmark(child) if isinstance(child, ast.ClassDef) else [])]
        if _never_runs(marks):
            continue
        labels = inherited | _labels(marks)
        if isinstance(child, ast.ClassDef) and child.name.startswith("Test"):
            yield from _marked(child, labels, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef) and child.name.startswith("test"):
            about = (ast.get_docstring(child) or "").split("\n\n")[0].replace("\n", " ")
            for label in sorted(labels):
                yield label, prefix + child.name, child.lineno, about


def _pytestmark(node: ast.Module | ast.ClassDef) -> list[ast.expr]:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "pytestmark" for t in statement.targets
        ):
            value = statement.value
            return value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
    return []


def _never_runs(marks: list[ast.expr]) -> bool:
    """A test that is skipped, or allowed to fail, proves nothing."""
    names = (ast.unparse(mark.func if isinstance(mark, ast.Call) else mark) for mark in marks)
    return any(name in ("pytest.mark.skip", "pytest.mark.xfail") for name in names)


def _labels(marks: list[ast.expr]) -> set[str]:
    """The labels in the marks, those of single parameters too. What is no literal is in no book, and so reported."""
    return {
        f"eq-{argument.value if isinstance(argument, ast.Constant) else ast.unparse(argument)}"
        for mark in marks
        for call in ast.walk(mark)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.equation"
        for argument in call.args
    }


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        yield name, ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def equations(env: BuildEnvironment) -> dict[str, str]:
    """Label → page of every labelled equation, in the order of the table of contents and of the page."""
    where = {label: page for label, (page, _) in env.get_domain("math").equations.items()}
    pages = [page for page in env.toctree_includes.get(env.config.root_doc, []) if page in env.all_docs]
    pages += sorted(set(where.values()) - set(pages))
    return {
        node["label"]: page
        for page in pages
        if page in where.values()
        for node in env.get_doctree(page).findall(nodes.math_block)
        if node.get("label")
    }


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of every claim without a proof, proof without a claim, and unknown label."""
    root = Path(app.srcdir)
    known = {label: page for label, (page, _) in env.get_domain("math").equations.items()}
    proofs = collect_proofs(root / app.config.proofs_tests)
    proved = {proof.label for proof in proofs}
    for label, page in known.items():
        if not label.startswith(("eq-", "def-")):
            logger.warning("equation label %r: a claim is named eq-…, a definition def-…", label, location=page)
        if label.startswith("eq-") and label not in proved:
            logger.warning(
                "equation %r has no proof: mark a test with @pytest.mark.equation(%r)",
                label,
                label.removeprefix("eq-"),
                location=page,
            )
    for proof in proofs:
        if proof.label not in known:
            logger.warning("%s:%d proves %r, which is not in the book", proof.path, proof.line, proof.label)
        if not proof.about:
            logger.warning("%s:%d: the docstring should say what %s proves", proof.path, proof.line, proof.name)
    for label, names in collect_citations(root / app.config.proofs_package).items():
        if label not in known:
            logger.warning("the docstring of %s names %r, which is not in the book", ", ".join(names), label)


class verified_equations(nodes.General, nodes.Element):
    """Stands for the list until all pages have been read."""


class VerifiedEquations(SphinxDirective):
    """Where the list of all equations and their proofs goes."""

    def run(self) -> list[nodes.Node]:
        self.env.proofs_page = self.env.docname
        return [verified_equations()]


def number(env: BuildEnvironment, page: str, label: str) -> str:
    """The number of an equation as the page shows it."""
    numbers = env.toc_fignumbers.get(page, {}).get("displaymath", {}).get(f"equation-{label}")
    return ".".join(map(str, numbers)) if numbers else str(env.get_domain("math").equations[label][1])


def fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link each equation to its proof, and write the list where its directive stands."""
    env = app.env
    page = getattr(env, "proofs_page", None)
    if page is None:
        return
    if docname != page:
        for node in list(doctree.findall(nodes.math_block)):
            label = node.get("label") or ""
            if label.startswith("eq-"):
                text = nodes.inline(text="proof", classes=[])
                hidden = nodes.inline(text=f" of equation {number(env, docname, label)}", classes=["visually-hidden"])
                link = make_refnode(app.builder, docname, page, f"proof-{label}", [text, hidden])
                node.parent.insert(node.parent.index(node) + 1, nodes.paragraph("", "", link, classes=["proof-link"]))
    for place in list(doctree.findall(verified_equations)):
        place.replace_self(_list_of_equations(app, docname))


def _list_of_equations(app: Sphinx, docname: str) -> list[nodes.Node]:
    env, root = app.env, Path(app.srcdir)
    proofs, citations = defaultdict(list), collect_citations(root / app.config.proofs_package)
    for proof in collect_proofs(root / app.config.proofs_tests):
        proofs[proof.label].append(proof)
    sections: dict[str, nodes.section] = {}
    for label, page in equations(env).items():
        if page not in sections:
            title = nodes.title(
                "", "", make_refnode(app.builder, docname, page, "", nodes.Text(env.titles[page].astext()))
            )
            sections[page] = nodes.section("", title, ids=[nodes.make_id(f"equations-of-{page}")])
        if label.startswith("eq-"):
            sections[page] += _entry(app, docname, page, label, proofs[label], citations.get(label, []))
    return [section for section in sections.values() if len(section) > 1]


def _entry(app: Sphinx, docname: str, page: str, label: str, proofs: list[Proof], names: list[str]) -> nodes.container:
    formula = next(n for n in app.env.get_doctree(page).findall(nodes.math_block) if n.get("label") == label)
    text = f"Equation {number(app.env, page, label)}"
    link = make_refnode(app.builder, docname, page, f"equation-{label}", nodes.strong(text=text))
    entry = nodes.container("", ids=[f"proof-{label}"], classes=["verified-equation"])
    entry += nodes.paragraph("", "", link, nodes.Text(" · "), nodes.literal(text=label))
    entry += nodes.math_block(formula.astext(), formula.astext(), nowrap=False, number=None, label=None)
    tests = nodes.bullet_list()
    for proof in proofs:
        target = app.builder.get_relative_uri(docname, source_page(app, proof.path)) + f"#{proof.name}"
        name = nodes.reference("", "", nodes.literal(text=proof.name), refuri=target, internal=True)
        tests += nodes.list_item("", nodes.paragraph("", "", name, nodes.Text(f": {proof.about}")))
    entry += tests
    objects = app.env.get_domain("py").objects
    links = [
        make_refnode(app.builder, docname, objects[n].docname, objects[n].node_id, nodes.literal(text=n))
        for n in names
        if n in objects
    ]
    if links:
        line = nodes.paragraph("", "", nodes.Text("In the package: "))
        for i, reference in enumerate(links):
            line += [nodes.Text(", ")] * (i > 0) + [reference]
        entry += line
    return entry


def source_page(app: Sphinx, path: Path) -> str:
    """The page that shows a test file."""
    return "proofs/" + path.relative_to(app.srcdir).with_suffix("").as_posix()


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """A page for each test file that proves something, with an anchor at each of its tests."""
    proofs = collect_proofs(Path(app.srcdir) / app.config.proofs_tests)
    if getattr(app.env, "proofs_page", None) is None:
        return
    for path in sorted({proof.path for proof in proofs}):
        name = path.relative_to(app.srcdir).as_posix()
        html = app.builder.highlighter.highlight_block(path.read_text(encoding="utf-8"), "python", linenos=False)
        before, start, code = html.partition("<pre>")
        lines = code.split("\n")
        for proof in {p.name: p for p in proofs if p.path == path}.values():
            lines[proof.line - 1] = f'<span id="{proof.name}"></span>{lines[proof.line - 1]}'
        back = app.builder.get_relative_uri(source_page(app, path), app.env.proofs_page)
        body = f'<h1>{name}</h1><p><a href="{back}">Verified equations</a></p>' + before + start + "\n".join(lines)
        yield source_page(app, path), {"title": name, "body": body}, "page.html"


def load_mathjax(app: Sphinx, env: BuildEnvironment) -> None:
    """The list's formulas come after Sphinx has looked which pages need MathJax."""
    page = getattr(env, "proofs_page", None)
    if page is not None:
        env.get_domain("math").data["has_equations"][page] = True


def outdated(app: Sphinx, env: BuildEnvironment, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The list depends on all pages and tests: write it anew in every build."""
    page = getattr(env, "proofs_page", None)
    return [page] if page in env.found_docs else []


def setup(app: Sphinx) -> dict[str, object]:
    app.setup_extension("mutation")
    app.add_config_value("proofs_tests", "tests", "env")
    app.add_config_value("proofs_package", "src/diffbook", "env")
    app.add_node(verified_equations)
    app.add_directive("verified-equations", VerifiedEquations)
    app.connect("env-get-outdated", outdated)
    app.connect("env-updated", load_mathjax)
    app.connect("env-check-consistency", check)
    app.connect("doctree-resolved", fill)
    app.connect("html-collect-pages", source_pages)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
