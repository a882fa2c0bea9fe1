"""Build the static book into _build/html from the stored outputs of the notebooks.

    python tools/build_book.py

Nothing is executed, and every warning is an error. Only pages that have changed are built again; all of them when
something has changed that Sphinx does not watch: extensions, templates, the configuration, the repository's address.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
# Jupyter Book's own page at the root has neither a language nor a title.
FRONT_DOOR = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="0; url=book/index.html">
<title>Diffusion models, step by step</title>
</head>
<body><main><h1><a href="book/index.html">Diffusion models, step by step</a></h1></main></body>
</html>
"""


def unwatched() -> str:
    """A fingerprint of what all pages depend on without Sphinx knowing."""
    folders = (ROOT / "book" / "_ext", ROOT / "book" / "_templates")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".html")]
    files += [ROOT / name for name in ("_config.yml", "_toc.yml", "pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def main() -> int:
    mark = HTML.parent / "built-with"
    if not mark.is_file() or mark.read_text() != unwatched():
        shutil.rmtree(HTML.parent, ignore_errors=True)
    # Sphinx says what is wrong with a page only when it reads it: after a failed build read all of them again.
    mark.unlink(missing_ok=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT)]
    options = ["-n", "-W", "--keep-going", "-q"]
    done = subprocess.run([*command, *options], cwd=ROOT, stdin=subprocess.DEVNULL)
    if done.returncode != 0 or not (HTML / "index.html").is_file():
        print("The book was not built: each line above that says WARNING or ERROR is a fault to mend.", file=sys.stderr)
        return 1
    mark.write_text(unwatched())
    (HTML / "index.html").write_text(FRONT_DOOR, encoding="utf-8")
    print(f"The book lies in {HTML / 'index.html'}\nOpen it in a browser: {(HTML / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
