"""The tests of each package, for `make test-package PACKAGE=name`: what to run while one package is being changed.

python -m tests.packages shard     # runs pytest on the tests of that package
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES: dict[str, tuple[str, ...]] = {
    "numerics": ("unit/numerics", "unit/frontend/test_losses.py", "golden/test_golden.py", "golden/test_nce.py"),
    "shard": ("unit/shard", "unit/numerics", "conformance/test_group.py"),
    "cluster": ("unit/cluster", "conformance/test_group.py", "conformance/test_exactly_once.py"),
    "frontend": ("unit/frontend", "conformance/test_exactly_once.py", "conformance/test_exactly_once_cases.py"),
    "evaluation": ("unit/evaluation", "conformance/test_exact_answers.py", "conformance/test_evaluation.py"),
    "rpc": (
        "unit/rpc",
        "architecture/test_contract.py",
        "hostile/test_raw_bytes.py",
        "hostile/test_stream.py",
        "hostile/test_leaks.py",
        "hostile/test_metrics_port.py",
        "hostile/test_nginx.py",
    ),
    "access": ("unit/access", "hostile/test_authorisation.py", "hostile/test_tls.py"),
    "cli": ("unit/cli", "system/test_cli.py", "architecture/test_names.py"),
    "client": ("unit/client", "system/test_trainer.py", "system/test_trainer_edges.py", "system/test_overlap.py"),
    "compat": (
        "unit/compat",
        "system/test_compat.py",
        "system/test_paddle.py",
        "system/test_tensorflow_forms.py",
        "system/test_tfrs_forms.py",
        "system/test_paddle_forms.py",
        "hostile/test_labels.py",
        "golden/test_functions.py",
    ),
    "files": ("unit/files",),
    "sampling": ("unit/sampling", "statistical", "golden/test_samplers.py"),
    "benchmarks": ("unit/benchmarks",),
    "examples": ("unit/examples", "system/test_cities_demo.py", "system/test_readme.py"),
}
WITH_RAY = ("cluster",)
MARKS = "not slow and not compose and not load"  # as in `make test`


def main(package: str) -> int:
    """Run the tests of a package; return pytest's exit status."""
    if package not in PACKAGES:
        print(f"PACKAGE={package} is not a package; choose one of {', '.join(PACKAGES)}", file=sys.stderr)
        return 2
    marks = MARKS if package in WITH_RAY else f"{MARKS} and not ray"
    return int(pytest.main(["-q", "-m", marks, "--durations=5", *(str(HERE / path) for path in PACKAGES[package])]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or [""]))
