"""The command line `shardloss` (docs/cli.md): tables, their files, exact evaluation, status and doctor."""

from __future__ import annotations

import sys

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line and exit with its code: 0 done, 1 refused or failed, 2 usage error, 130 interrupted."""
    try:
        from shardloss.cli.app import run
    except ImportError as error:
        if (error.name or "").split(".")[0] not in NEEDED:
            raise
        sys.exit(f"the command line needs the package {error.name}: pip install 'shardloss[cli]'")
    sys.exit(run())
