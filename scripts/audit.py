"""Looks up known holes in pinned packages, with pip-audit: `python scripts/audit.py PIP_AUDIT CONSTRAINTS`.

pip-audit asks the package index for its advisories. Where that does not answer, or a mirror that has none answers in
its place, pip-audit passes over every package and says that no hole was found; here it is said that nothing was looked
up. The exit code is 1 if there are holes, else 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def report(name: str, found: str) -> tuple[int, str]:
    """The exit code and what is to be said of pip-audit's JSON on the file `name`."""
    try:
        packages = json.loads(found)["dependencies"]
    except json.JSONDecodeError:
        return 0, f"{name}: not audited, since the package index cannot be reached"
    holes = [
        f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'none'}"
        for package in packages
        for hole in package.get("vulns", ())
    ]
    passed_over = sum("skip_reason" in package for package in packages)
    if packages and passed_over == len(packages):
        return 0, f"{name}: not audited, since the package index that pip uses here knows no advisories"
    rest = f" ({passed_over} are not known to the index)" if passed_over else ""
    heading = f"{name}: {len(holes)} known holes in {len(packages)} packages{rest}"
    return int(bool(holes)), "\n  ".join([heading, *holes])


def main(pip_audit: str, constraints: str) -> int:
    """Audit one file, and print what was found."""
    command = [pip_audit, "--disable-pip", "--no-deps", "-r", constraints, "-f", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    code, said = report(Path(constraints).name, done.stdout)
    print(said)
    return code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
