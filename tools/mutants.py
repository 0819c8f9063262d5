"""Mutation testing: change one operator or constant at a time and see whether the tests notice.

    python tools/mutants.py --packages numerics shard frontend cluster --count 60 --seed 1 --jobs 2

Each mutant is a copy of the checkout with one change. The tests of its package run first, then all others, up to the
first failure. A mutant is killed if a test fails, and also if the tests hang. Results are printed as they come, and
written as JSON with --out. `--only` repeats single mutants, for instance against another revision's tests.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVER = "server/src/shardloss_server"
TIMEOUT_S = 900.0
COPIED = ("client", "server", "tests", "examples", "benchmarks", "proto", "docs", "deploy", "tools")

COMPARISONS = {"Lt": "<=", "LtE": "<", "Gt": ">=", "GtE": ">", "Eq": "!=", "NotEq": "=="}
COMPARISONS |= {"Is": "is not", "IsNot": "is"}
ARITHMETIC = {"Add": "-", "Sub": "+", "Mult": "/", "Div": "*", "FloorDiv": "*", "Mod": "*", "BitAnd": "|"}
CALLS = {"min": "max", "max": "min", "all": "any", "any": "all", "zeros": "ones", "ones": "zeros"}


@dataclass(frozen=True)
class Mutant:
    """One change of one line: the text from start to end, as offsets in the file, becomes `new`."""

    path: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.old!r} -> {self.new!r}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Return every change of a file that the operators above allow."""
    text = path.read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    content = text.encode()
    name = str(path.relative_to(ROOT))

    def offset(line: int, column: int) -> int:
        return starts[line - 1] + column

    def change(line: int, start: int, end: int, new: str) -> Mutant:
        return Mutant(name, line, start, end, content[start:end].decode(), new)

    def between(left: ast.expr, right: ast.expr, new: str) -> Iterator[Mutant]:
        start, end = offset(left.end_lineno or 0, left.end_col_offset or 0), offset(right.lineno, right.col_offset)
        found = re.search(rb"[^\s()#]+(?: not)?", content[start:end])
        if found and b"\n" not in content[start:end]:
            yield change(left.lineno, start + found.start(), start + found.end(), new)

    tree = ast.parse(text)
    defined = [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef | ast.FunctionDef)]
    decorators = {id(node) for each in defined for decorator in each.decorator_list for node in ast.walk(decorator)}
    for node in ast.walk(tree):
        if id(node) in decorators:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            new = COMPARISONS.get(type(node.ops[0]).__name__)
            yield from between(node.left, node.comparators[0], new) if new else ()
        elif isinstance(node, ast.BinOp) and not isinstance(node.left, ast.Constant | ast.JoinedStr):
            new = ARITHMETIC.get(type(node.op).__name__)
            yield from between(node.left, node.right, new) if new else ()
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], "or" if isinstance(node.op, ast.And) else "and")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start = offset(node.lineno, node.col_offset)
            yield change(node.lineno, start, start + 4, "")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            start, end = offset(node.lineno, node.col_offset), offset(node.end_lineno or 0, node.end_col_offset or 0)
            new = str(not node.value) if isinstance(node.value, bool) else repr(node.value + 1)
            yield change(node.lineno, start, end, new)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in CALLS:
                end = offset(node.func.end_lineno or 0, node.func.end_col_offset or 0)
                yield change(node.lineno, end - len(called), end, CALLS[called])


def chosen(packages: list[str], count: int, seed: int) -> list[Mutant]:
    """Return `count` mutants, as many of each package, in the order of the packages."""
    dice, found = random.Random(seed), []
    for place, package in enumerate(packages):
        every = [each for path in sorted((ROOT / SERVER / package).rglob("*.py")) for each in mutants_of(path)]
        found += dice.sample(every, count // len(packages) + (place < count % len(packages)))
    return found


def copy_with(mutant: Mutant, tests: Path, target: Path) -> None:
    """Copy the checkout, with the tests of another checkout if given, and change one place."""
    for name in COPIED:
        source = tests / name if name == "tests" else ROOT / name
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    path = target / mutant.path
    content = path.read_bytes()
    path.write_bytes(content[: mutant.start] + mutant.new.encode() + content[mutant.end :])


def run(mutant: Mutant, tests: Path, stages: list[list[str]]) -> dict[str, object]:
    """Run the tests on one mutant, stage by stage, and return the result."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        target = Path(folder)
        copy_with(mutant, tests, target)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(target / "client/src"), str(target / "server/src")]),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for stage in stages:
            paths = [word for word in stage if not word.startswith("tests/") or (target / word).exists()]
            if not any(word.startswith("tests/") for word in paths):
                continue
            command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "120", *paths]
            given = {"cwd": target, "env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT_S}
            try:
                done = subprocess.run(command, check=False, **given)  # type: ignore[call-overload]
            except subprocess.TimeoutExpired:
                return {**asdict(mutant), "killed": True, "by": "a hang", "seconds": round(time.monotonic() - began)}
            if done.returncode not in (0, 5):
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M) or [done.stdout[-300:] + done.stderr]
                return {**asdict(mutant), "killed": True, "by": failed[0], "seconds": round(time.monotonic() - began)}
    return {**asdict(mutant), "killed": False, "by": None, "seconds": round(time.monotonic() - began)}


def main() -> int:
    """Run the chosen mutants and print how many were killed."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--packages", nargs="+", default=["numerics", "shard", "frontend", "cluster"])
    options.add_argument("--count", type=int, default=60)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--tests", type=Path, default=ROOT, help="a checkout whose tests run instead of this one's")
    options.add_argument("--only", type=int, nargs="+", help="numbers of the mutants to run")
    options.add_argument("--with-ray", action="store_true", help="run the tests of cluster on Ray too")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.packages import PACKAGES

    # What can notice a change of these packages; commands, pages, files and the demo are left out.
    units = [
        f"tests/unit/{name}" for name in ("numerics", "shard", "frontend", "evaluation", "cluster", "sampling", "rpc")
    ]
    hostile = ["tests/hostile/test_bad_input.py", "tests/hostile/test_bad_losses.py", "tests/hostile/test_overload.py"]
    rest = [*units, "tests/conformance", "tests/golden", "tests/statistical", *hostile, "tests/system/test_trainer.py"]

    def stages(mutant: Mutant) -> list[list[str]]:
        package = mutant.path.removeprefix(SERVER + "/").split("/")[0]
        marks = "not slow and not compose and not load"
        local = f"{marks} and not ray"
        first = [f"tests/{path}" for path in PACKAGES[package]]
        with_ray = [["-m", marks, *first]] if given.with_ray and package == "cluster" else []
        return [["-m", local, *first], *with_ray, ["-m", local, *rest]]

    mutants = list(enumerate(chosen(given.packages, given.count, given.seed)))
    mutants = [each for each in mutants if given.only is None or each[0] in given.only]
    results = []
    with ThreadPoolExecutor(given.jobs) as pool:
        running = {
            pool.submit(run, mutant, given.tests, stages(mutant)): (number, mutant) for number, mutant in mutants
        }
        for future in as_completed(running):
            number, mutant = running[future]
            result = future.result()
            results.append({"number": number, **result})
            outcome = "killed" if result["killed"] else "SURVIVED"
            print(f"{number:3} {outcome:8} {result['seconds']:4} s  {mutant}  {result['by'] or ''}"[:250], flush=True)
    num_killed = sum(bool(result["killed"]) for result in results)
    print(f"{num_killed} of {len(results)} mutants killed")
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
