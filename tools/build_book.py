"""Build the static book into _build/html from the stored outputs of the notebooks.

    python tools/build_book.py

Nothing is executed, every warning is an error, and only what has changed is built again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"


def main() -> int:
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(ROOT)]
    options = ["-n", "-W", "--keep-going", "-q"]
    done = subprocess.run([*command, *options], cwd=ROOT, stdin=subprocess.DEVNULL)
    if done.returncode != 0 or not (HTML / "index.html").is_file():
        print("The book was not built: each line above that says WARNING or ERROR is a fault to mend.", file=sys.stderr)
        return 1
    print(f"The book lies in {HTML / 'index.html'}\nOpen it in a browser: {(HTML / 'index.html').as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
