"""Another rival, run on a node of `benchmarks.netns`: the shape has its "module", and "inside", the command prefix."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Replace this process with the rival, run on its node."""
    shape = json.loads(sys.argv[1])
    inside, module = shape.pop("inside"), shape.pop("module")
    here = ["env", f"--chdir={os.getcwd()}"]  # in another mount namespace the directory would be its root
    command = [*inside, *here, sys.executable, "-m", f"benchmarks.rivals.{module}", json.dumps(shape)]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
