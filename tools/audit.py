"""Ask whether weaknesses are known of the packages in constraints.txt: what `make audit` does.

    python tools/audit.py [FILE]

pip-audit looks every exact version up in the advisory database of the Python Package Index. It lives in an environment
of its own, .venv-audit, so that a tool for security brings nothing into the one that is checked. This is no part of
`make test`: its answer changes without any change here, and it needs the network.

Ends with 0 only if every package was looked up and nothing is known of any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-audit"
TOOL = "pip-audit>=2.7,<3"


def tool() -> Path:
    """The Python that has pip-audit; it is set up when it is not there yet."""
    python = FOLDER / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists() or subprocess.run([python, "-c", "import pip_audit"], capture_output=True).returncode:
        venv.create(FOLDER, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TOOL], check=True)
    return python


def look_up(file: Path) -> list[dict[str, Any]]:
    """What pip-audit says of each package; an empty list if it could say nothing at all."""
    options = [
        "--requirement",
        str(file),
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    done = subprocess.run([tool(), "-m", "pip_audit", *options], stdout=subprocess.PIPE, text=True, check=False)
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        return []
    return found


def verdict(named: list[str], found: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Exit status and lines to print.

    Args:
        named: the packages that should have been looked up.
        found: what was said of them.
    """
    looked_up = {row["name"].lower() for row in found if "vulns" in row}
    skipped = {row["name"].lower(): row["skip_reason"] for row in found if "skip_reason" in row}
    lines = []
    for row in found:
        for weakness in row.get("vulns", []):
            fixed = f"mended in {', '.join(weakness['fix_versions'])}" if weakness.get("fix_versions") else "not mended"
            lines.append(f"KNOWN WEAKNESS: {row['name']} {row['version']}: {weakness['id']}, {fixed}")
    known = len(lines)
    missing = [name for name in named if name.lower() not in looked_up]
    for name in missing:
        lines.append(f"NOT LOOKED UP: {name}: {skipped.get(name.lower(), 'no answer')}")
    lines.append(f"{len(named) - len(missing)} of {len(named)} packages looked up, {known} known weaknesses")
    if missing:
        lines.append("Nothing is known of the rest: ask again from where the advisory database can be reached.")
    return (1 if known or missing else 0), lines


def packages(file: Path) -> list[str]:
    """The packages that a file of exact versions names."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line.split("==")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look up known weaknesses of what constraints.txt names.")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args(arguments)
    status, lines = verdict(packages(options.file), look_up(options.file))
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
