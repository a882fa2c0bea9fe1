"""Look the pinned versions up among the published advisories, by pip-audit: what `make audit` does.

    python tools/audit.py [FILE ...]

The files are lists of ``name==version``, constraints.txt if none is named. Exit status: 0, every version was looked up
and none is known to be vulnerable; 1, some are; 2, they could not all be looked up, so nothing is known.

pip-audit alone succeeds, with the words "No known vulnerabilities found", where its source of advisories does not know
the packages. So here nothing may be skipped, and a version that is known to be vulnerable has to be found as such.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
KNOWN = "flask==0.5"  # its advisories are from 2018 and 2019, and no package here needs it


class AuditError(Exception):
    """The advisories could not be looked up; the message says why."""


@dataclass(frozen=True, order=True)
class Advisory:
    """One known vulnerability of one version."""

    package: str
    version: str
    name: str
    fixed_in: tuple[str, ...]


def canonical(name: str) -> str:
    """A package's name in the one form that indexes use."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> list[str]:
    """The lines ``name==version`` of a file.

    Raises:
        AuditError: there are none, or another line is in it.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    other = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!-]+", line)]
    if other or not lines:
        raise AuditError(f"{path} is no list of name==version: {other[0] if other else 'it is empty'}")
    return lines


def ask(lines: Iterable[str]) -> str:
    """What pip-audit reports of these versions, as JSON.

    Raises:
        AuditError: it reported nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        done = subprocess.run([*COMMAND, "-r", str(path)], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if not done.stdout.strip():
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise AuditError(f"pip-audit failed with status {done.returncode}: {said[-1]}")
    return done.stdout


def advisories(report: str, lines: Sequence[str]) -> list[Advisory]:
    """The advisories in pip-audit's report of these versions and of ``KNOWN``, without those of the latter.

    Raises:
        AuditError: the report lacks a version, or says that one was skipped; or it knows nothing of ``KNOWN``.
    """
    try:
        found = {canonical(entry["name"]): entry for entry in json.loads(report)["dependencies"]}
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(f"pip-audit's report could not be read ({type(error).__name__}: {error})") from error
    missing, result = [], []
    for line in [*lines, KNOWN]:
        name, _, version = line.partition("==")
        entry = found.get(canonical(name), {})
        if "vulns" not in entry:
            missing.append(f"{line} ({entry.get('skip_reason', 'not in the report')})")
            continue
        known = [Advisory(name, version, v["id"], tuple(v.get("fix_versions", ()))) for v in entry["vulns"]]
        if line == KNOWN and not known:
            raise AuditError(f"the source of advisories knows none of {KNOWN}, which has some: it is empty or cut off")
        result += known if line != KNOWN else []
    if missing:
        raise AuditError(f"{len(missing)} of {len(lines) + 1} versions were not looked up: {'; '.join(missing[:3])}")
    return sorted(result)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look pinned versions up among the published advisories.")
    parser.add_argument("files", nargs="*", type=Path, help="lists of name==version (default: constraints.txt)")
    options = parser.parse_args(arguments)
    vulnerable = 0
    for path in options.files or [ROOT / "constraints.txt"]:
        try:
            lines = pins(path)
            found = advisories(ask([*lines, KNOWN]), lines)
        except (AuditError, OSError) as error:
            print(f"NOT AUDITED: {error}", file=sys.stderr)
            return 2
        for advisory in found:
            fixed = f"fixed in {', '.join(advisory.fixed_in)}" if advisory.fixed_in else "not fixed yet"
            print(f"{advisory.package} {advisory.version}: {advisory.name}, {fixed}")
        print(f"{path.name}: {len(lines)} versions looked up, {len(found)} known vulnerabilities")
        vulnerable += len(found)
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
