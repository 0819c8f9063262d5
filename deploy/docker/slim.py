"""Delete files that the server never uses from a venv, and print the size of each part: python slim.py VENV."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20
PARTS = {
    "torch: headers, C++ tests, tests": [
        "torch/include", "torch/test", "torch/share", "torch/bin/test_*", "torch/bin/protoc*", "torch/lib/*.a",
    ],
    "ray: Java, C++, the dashboard's page": [
        "ray/jars", "ray/cpp", "ray/dashboard/client", "ray/core/libjemalloc.so",
    ],
    "ray: libraries on top": ["ray/rllib", "ray/llm", "ray/serve", "ray/data", "ray/train", "ray/tune", "ray/air"],
    "build tools": ["setuptools*", "pkg_resources", "_distutils_hack", "distutils-precedence.pth"],
    "tests of all": ["*/**/tests"],
}  # fmt: skip


def found(site: Path, patterns: list[str]) -> Iterator[Path]:
    """Yield the paths that match the patterns, folders before their contents."""
    for pattern in patterns:
        yield from sorted(site.glob(pattern))


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def delete(path: Path) -> int:
    """Delete a file or folder and return the bytes freed; 0 if it was deleted with its parent folder."""
    if not path.exists():
        return 0
    freed = size(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return freed


def main(venv: Path) -> None:
    """Delete every part, and print what was freed.

    Raises:
        SystemExit: a part was not found, so the list of parts is out of date.
    """
    (site,) = venv.glob("lib/python3*/site-packages")
    before = size(venv)
    for name, patterns in PARTS.items():
        freed = sum(delete(path) for path in found(site, patterns))
        if not freed:
            sys.exit(f"{name}: nothing was found below {site}: is the list of parts out of date?")
        print(f"{freed / MIB:7.1f} MiB  {name}")
    print(f"{before / MIB:.1f} MiB before, {size(venv) / MIB:.1f} MiB after")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
