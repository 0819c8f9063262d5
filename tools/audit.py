"""Audit every pinned dependency against an advisory service (OSV): `make audit`.

The exit status is 0 if no advisory is known, or if the service cannot be reached, which is reported. It is 1 if
advisories are listed, or if a dependency could not be audited.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINNED = ("constraints.txt", "tools/requirements-audit.txt")
SERVICE = "https://api.osv.dev/v1/query"
REACH_S = 10.0
QUESTION = b'{"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "1.0"}'


def unreachable(service: str) -> str | None:
    """Return the reason why a service cannot be queried, or None if it answers."""
    request = urllib.request.Request(service, QUESTION, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REACH_S) as reply:
            reply.read()
    except urllib.error.HTTPError as error:
        return f"it returned status {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None


def main() -> int:
    """Run the audit and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", default=SERVICE, help="URL of the advisory service: OSV or a mirror of it")
    service = parser.parse_args().service
    why = unreachable(service)
    if why is not None:
        print(f"AUDIT SKIPPED: no advisory service answered at {service} ({why}); nothing was audited")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
    command += ["--vulnerability-service=osv", f"--osv-url={service}", "--strict"]
    for name in PINNED:
        command += ["--requirement", str(ROOT / name)]
    return min(1, subprocess.run(command, check=False, cwd=ROOT).returncode)


if __name__ == "__main__":
    sys.exit(main())
