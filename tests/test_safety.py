"""What the code may not do, wherever it stands: execute what a file holds, fetch without a check, tell secrets."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import audit
import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("src", "tools", "book/_ext") for path in sorted((ROOT / folder).rglob("*.py"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# modules whose reading executes, and calls that do
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
BARE = {"eval", "exec", "compile", "__import__"}
ALLOWED: dict[tuple[str, str], str] = {}  # file, what it does: why


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a chain of attributes; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and name_of(node.value):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def dangers(source: str) -> Iterator[str]:
    """What in a piece of code could execute what a file or a network holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if (node.module or "").split(".")[0] in MODULES:
                yield node.module or ""
        elif isinstance(node, ast.Call):
            name = name_of(node.func)
            keywords = {k.arg: k.value for k in node.keywords}
            shell = keywords.get("shell")
            if name in CALLS | BARE:
                yield name
            elif isinstance(shell, ast.Constant) and shell.value:
                yield f"{name}(shell=True)"
            elif isinstance(value := keywords.get("allow_pickle"), ast.Constant) and value.value:
                yield f"{name}(allow_pickle=True)"
            elif name.endswith((".extract", ".extractall")):
                yield name  # members of an archive may name places outside it
            elif name.endswith("from_pretrained") and "trust_remote_code" in keywords:
                yield f"{name}(trust_remote_code)"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import numpy as np\nnp.load('x')",
        "f(x, allow_pickle=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "eval(text)",
        "exec(text)",
        "import yaml\nyaml.load(text)",
        "tar.extractall(path)",
        "M.from_pretrained('x', trust_remote_code=True)",
        "import os\nos.system('ls')",
    ],
)
def test_a_danger_is_found(code: str) -> None:
    assert list(dangers(code))


def test_harmless_code_is_let_pass() -> None:
    lines = [
        "import json",
        "re.compile('x')",
        "json.load(f)",
        "model.eval()",
        "subprocess.run(['ls'])",
        "tar.extractfile(n)",
    ]
    assert not list(dangers("\n".join(lines)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_executes_what_it_reads(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = {danger for danger in dangers(path.read_text(encoding="utf-8")) if (name, danger) not in ALLOWED}
    assert not found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_notebook_executes_what_it_reads(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not list(dangers("".join(cell["source"])))


SECRETS = {
    "a key of a cloud": r"\bAKIA[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}",
    "a key of an interface": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password": r"(?i)\b(?:password|passwd|api_key|secret|token)\s*[:=]\s*[\"'][^\"'\s]{8,}[\"']",
    "an address with a password": r"https?://[^/\s:@]+:[^/\s@]+@",
}


def secrets(text: str) -> list[str]:
    text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)  # pictures
    return [what for what, pattern in SECRETS.items() if re.search(pattern, text)]


def test_secrets_are_found() -> None:
    for text in (
        "AKIA" + "A" * 16,
        "ghp_" + "a" * 36,
        "hf_" + "a" * 34,
        "sk-" + "a" * 40,
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        'token = "' + "a" * 12 + '"',
        "https://me:word" + "@example.org",
    ):
        assert len(secrets(text)) == 1, text
    assert not secrets('generator = torch.Generator("cpu"); tokens = "a b"')


def test_no_file_holds_a_secret() -> None:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a clone, so there is no list of its files")
    names = [n for n in done.stdout.split("\0") if n and (ROOT / n).is_file() and "vendor" not in n]
    texts = {n: (ROOT / n).read_bytes() for n in names}
    found = {
        n: secrets(t.decode()) for n, t in texts.items() if b"\0" not in t and (ROOT / n).suffix not in (".png", ".xz")
    }
    assert {name: what for name, what in found.items() if what} == {}


def test_addresses_of_downloads_are_encrypted_and_checked() -> None:
    """Every address that the package fetches from is https, and what comes is compared with a checksum."""
    text = (ROOT / "src" / "diffbook" / "data.py").read_text(encoding="utf-8")
    assert not re.findall(r"http://", text)
    fetches = re.findall(r"(\w*download\w*)\(", text)
    assert set(fetches) <= {"_download", "_download_fashion", "download_url", "_fashion_download"}, set(fetches)


# the audit: with answers of pip-audit in its place

CLEAN = [{"name": "numpy", "version": "2.0", "vulns": []}, {"name": "Torch", "version": "2.9", "vulns": []}]
WEAK = [{"name": "numpy", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]}, CLEAN[1]]


def test_audit_passes_only_if_all_were_looked_up_and_nothing_is_known() -> None:
    assert audit.verdict(["numpy", "torch"], CLEAN) == (0, ["2 of 2 packages looked up, 0 known weaknesses"])
    status, lines = audit.verdict(["numpy", "torch"], WEAK)
    assert status == 1 and lines[0] == "KNOWN WEAKNESS: numpy 2.0: PYSEC-1, mended in 2.1"
    status, lines = audit.verdict(["numpy", "torch", "scipy"], CLEAN)
    assert status == 1 and lines[0] == "NOT LOOKED UP: scipy: no answer" and "2 of 3 packages" in lines[1]
    skipped = [*CLEAN, {"name": "scipy", "skip_reason": "not found"}]
    assert audit.verdict(["numpy", "torch", "scipy"], skipped)[1][0] == "NOT LOOKED UP: scipy: not found"
    status, lines = audit.verdict(["numpy"], [])  # no network: nothing may look as if it were fine
    assert status == 1 and "0 of 1 packages looked up" in lines[1]


def test_audit_reads_what_is_pinned_and_ends_with_the_verdict(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "c.txt"
    file.write_text("# about\nnumpy==2.0\ntorch==2.9\n")
    monkeypatch.setattr(audit, "tool", lambda: Path(sys.executable))
    answer = subprocess.CompletedProcess([], 1, json.dumps({"dependencies": WEAK}))
    monkeypatch.setattr(audit.subprocess, "run", lambda *arguments, **keywords: answer)
    assert audit.main([str(file)]) == 1 and "PYSEC-1" in capsys.readouterr().out
    answer.stdout = "no JSON"
    assert audit.main([str(file)]) == 1 and "0 of 2 packages looked up" in capsys.readouterr().out
    answer.stdout = json.dumps({"dependencies": CLEAN})
    assert audit.main([str(file)]) == 0
    assert len(audit.packages(ROOT / "constraints.txt")) > 100
