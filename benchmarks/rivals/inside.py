"""Another rival, run on a node of `benchmarks.netns`: the shape holds "module", and "inside", what goes before it."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Become it."""
    shape = json.loads(sys.argv[1])
    inside, module = shape.pop("inside"), shape.pop("module")
    here = ["env", f"--chdir={os.getcwd()}"]  # another mount namespace begins at its root
    command = [*inside, *here, sys.executable, "-m", f"benchmarks.rivals.{module}", json.dumps(shape)]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
