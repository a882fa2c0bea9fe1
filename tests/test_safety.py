"""Nothing that the project reads can run a program, write beside its place, or come unchecked over the network.

By the syntax trees of all Python in the package, the tools, the book's extensions and the notebooks; a line of a
notebook for IPython or a shell (``%``, ``!``) is no Python, and has no tree. What these rules forbid is the known ways.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tools", "book/_ext")

RUN_WHAT_THEY_READ = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
FORBIDDEN_CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "runs text",
    "__import__": "imports by name",
    "torch.load": "unpickles; safetensors holds weights",
    "torch.hub.load": "runs a stranger's program",
    "torch.hub.load_state_dict_from_url": "unpickles",
    "hub.load_state_dict_from_url": "unpickles",
    "pd.read_pickle": "unpickles",
    "yaml.load": "makes objects; use yaml.safe_load",
    "yaml.full_load": "makes objects; use yaml.safe_load",
    "yaml.unsafe_load": "makes objects; use yaml.safe_load",
    "os.system": "gives a line to a shell",
    "os.popen": "gives a line to a shell",
    "subprocess.getoutput": "gives a line to a shell",
    "subprocess.getstatusoutput": "gives a line to a shell",
    "shutil.unpack_archive": "lets an archive say where its files go",
    "urllib.request.urlopen": "fetches without a checksum; use diffbook.data",
    "urllib.request.urlretrieve": "fetches without a checksum; use diffbook.data",
    "urlopen": "fetches without a checksum; use diffbook.data",
    "urlretrieve": "fetches without a checksum; use diffbook.data",
    "requests.get": "fetches without a checksum; use diffbook.data",
    "download_url": "fetches without a sha256; use diffbook.data",
    "tempfile.mktemp": "names a file that another may make first",
}
FORBIDDEN_METHODS = {
    "extractall": "lets an archive say where its files go",
    "extract": "lets an archive say where its files go",
}
# Their classes in torchvision and functions in scikit-learn unpickle what they fetch.
UNPICKLING_DATA = ("CIFAR", "fetch_")


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name with attributes; "" of another expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def dangers(tree: ast.AST) -> Iterator[str]:
    """What a program does that no program here may do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"imports {a.name}" for a in node.names if RUN_WHAT_THEY_READ & set(a.name.split(".")))
        elif isinstance(node, ast.ImportFrom):
            parts = {*(node.module or "").split("."), *(a.name for a in node.names)}
            yield from (f"imports {name}" for name in sorted(RUN_WHAT_THEY_READ & parts))
        elif isinstance(node, ast.Call):
            yield from _of_a_call(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            address = node.value.partition("http://")[2]
            if address and not address.startswith(("www.w3.org/", "localhost", "127.0.0.1")):
                yield f"names an address without https: http://{address[:40]}"


def _of_a_call(node: ast.Call) -> Iterator[str]:
    name = dotted(node.func)
    last = node.func.attr if isinstance(node.func, ast.Attribute) else name
    if name in FORBIDDEN_CALLS:
        yield f"calls {name}, which {FORBIDDEN_CALLS[name]}"
    if isinstance(node.func, ast.Attribute) and last in FORBIDDEN_METHODS:
        yield f"calls {last}, which {FORBIDDEN_METHODS[last]}"
    if last.startswith(UNPICKLING_DATA):
        yield f"calls {last}, which unpickles what it fetches"
    values = {keyword.arg: getattr(keyword.value, "value", keyword.value) for keyword in node.keywords}
    for keyword, harmless in {
        "shell": False,
        "allow_pickle": False,
        "trust_remote_code": False,
        "verify": True,
    }.items():
        if values.get(keyword, harmless) is not harmless:
            yield f"calls {name} with {keyword}={values[keyword]}"
    if last == "download_url_to_file" and "hash_prefix" not in values:
        yield f"calls {name} without a checksum"


def programs() -> dict[str, str]:
    """Everything that is run, by its place: files, and the cells of the notebooks."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in [*paths, ROOT / "conftest.py"]
    }
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        found |= {f"notebooks/{path.name}, code cell {i + 1}": source for i, source in enumerate(code)}
    return found


def test_nothing_runs_what_it_reads() -> None:
    found = programs()
    assert len(found) > 100
    assert [(place, danger) for place, source in found.items() for danger in dangers(ast.parse(source))] == []


@pytest.mark.parametrize(
    "source, word",
    [
        ("import pickle", "pickle"),
        ("import six.moves.cPickle as p", "cPickle"),
        ("from multiprocessing.reduction import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("torch.load(path)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("np.load(path, allow_pickle=wanted)", "allow_pickle"),
        ("torch.hub.load('a/b', 'c')", "stranger"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("yaml.load(text)", "safe_load"),
        ("subprocess.run(line, shell=True)", "shell"),
        ("os.system(line)", "shell"),
        ("tar.extractall(folder)", "archive"),
        ("tarfile.open(path).extract(member)", "archive"),
        ("archives[0].extractall(folder, filter='data')", "archive"),
        ("urllib.request.urlopen(address)", "checksum"),
        ("torch.hub.download_url_to_file(address, path)", "without a checksum"),
        ("datasets.CIFAR10(root)", "unpickles"),
        ("fetch_openml('mnist')", "unpickles"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust_remote_code"),
        ("get(address, verify=False)", "verify"),
        ("x = 'http://example.org/a'", "without https"),
    ],
)
def test_the_rules_find_what_they_forbid(source: str, word: str) -> None:
    (found,) = dangers(ast.parse(source))
    assert word in found


@pytest.mark.parametrize(
    "source",
    [
        "network.eval()",
        "re.compile('a')",
        "np.load(path, allow_pickle=False)",
        "subprocess.run([sys.executable, '-m', 'pip'], shell=False)",
        "archive.extractfile(member)",
        "torch.hub.download_url_to_file(address, path, hash_prefix=sha256)",
        "x = 'http://www.w3.org/2000/svg'",
        "ast.literal_eval(text)",
    ],
)
def test_the_rules_let_the_rest_pass(source: str) -> None:
    assert list(dangers(ast.parse(source))) == []


WITHOUT_NETWORK = """
import sys
import diffbook.data

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        print(event, arguments[:2], file=sys.stderr)
        raise SystemExit(3)

sys.addaudithook(watch)
from diffbook.cli import main

for line in sys.stdin.read().splitlines():
    status = main(line.split())
    if status:
        sys.exit(status)
"""


def without_network(lines: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder)}
    command = [sys.executable, "-c", WITHOUT_NETWORK]
    return subprocess.run(command, input="\n".join(lines), env=environment, capture_output=True, text=True, cwd=folder)


def test_the_package_needs_no_network_and_tells_nobody(tmp_path: Path) -> None:
    """Commands in a process that ends at the first attempt to connect, or to ask for the address of a host."""
    commands = [
        "recipes",
        "data fashion-subset",
        "sample fashion-cpu --number 1 --steps 1",
        "train fashion-smoke --images 32",
        f"export {tmp_path / 'cache' / 'diffbook' / 'runs' / 'fashion-smoke'} --to exported",
    ]
    done = without_network(commands, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fashion-cpu.png").exists() and list((tmp_path / "exported").glob("*.safetensors"))


def test_an_attempt_to_connect_would_be_noticed(tmp_path: Path) -> None:
    done = without_network(["data cifar10"], tmp_path)
    assert done.returncode == 3 and "www.cs.toronto.edu" in done.stderr
