"""Audit every pinned dependency against an advisory service (OSV): `make audit`.

Exit status 0: nothing is known against them, or no service can be reached, which is said aloud. 1: advisories are
listed, or a dependency could not be audited.
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
    """Why a service cannot be asked; None where it answers."""
    request = urllib.request.Request(service, QUESTION, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=REACH_S) as reply:
            reply.read()
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", default=SERVICE, help="where to ask; a mirror of OSV where there is one")
    service = parser.parse_args().service
    why = unreachable(service)
    if why is not None:
        print(f"AUDIT SKIPPED: no advisory service answers at {service} ({why}); nothing was audited")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off"]
    command += ["--vulnerability-service=osv", f"--osv-url={service}", "--strict"]
    for name in PINNED:
        command += ["--requirement", str(ROOT / name)]
    return min(1, subprocess.run(command, check=False, cwd=ROOT).returncode)


if __name__ == "__main__":
    sys.exit(main())
