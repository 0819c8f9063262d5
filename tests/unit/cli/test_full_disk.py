"""A command that cannot write its output says why in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.is_char_device(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "command",
    [
        "shardloss_server config page",
        "shardloss_server config show",
        "shardloss_server metrics page",
        "shardloss.cli version",
    ],
)
def test_output_to_a_full_disk_fails_in_one_line(command: str) -> None:
    with FULL.open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", *command.split()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "cannot write the output: No space left on device\n")
