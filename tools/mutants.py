"""Mutation testing: change one operator or constant at a time and see whether the tests notice.

    python tools/mutants.py --packages numerics shard frontend cluster --count 60 --seed 1 --jobs 2

Each mutant is a copy of the checkout, as it was at the start, with one change. The tests of its package run first, then
the others that can notice it, up to the first failure. A mutant is killed if a test fails or if the tests hang. Results
are printed as they come, and written as JSON with --out; `--only` repeats single mutants. To compare the tests of two
revisions, run the tool in a checkout of each.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
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


def copy_of_checkout(target: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)


def apply(mutant: Mutant, target: Path) -> None:
    """Change one place of a copy."""
    path = target / mutant.path
    content = path.read_bytes()
    assert content[mutant.start : mutant.end].decode() == mutant.old
    path.write_bytes(content[: mutant.start] + mutant.new.encode() + content[mutant.end :])


def outcome_of(command: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a command and return its exit status, None after TIMEOUT_S, and what it printed; nothing of it is left."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "client/src"), str(folder / "server/src")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(mutant: Mutant | None, checkout: Path, stages: list[list[str]]) -> dict[str, object]:
    """Run the tests on one mutant, or on the unchanged checkout, stage by stage, and return the result.

    Raises:
        RuntimeError: pytest itself failed, so nothing is known of the mutant.
    """
    began, killed_by = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as name:
        folder = Path(name) / "checkout"
        shutil.copytree(checkout, folder)
        if mutant is not None:
            apply(mutant, folder)
        for stage in stages:
            if killed_by:
                break
            status, output = outcome_of(
                [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "120", *stage], folder
            )
            if status in (1, 2):  # a failed test; a test file that cannot be imported any more
                killed_by = (re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M) or [output[-300:]])[0]
            elif status is None:
                killed_by = "a hang"
            elif status not in (0, 5):
                raise RuntimeError(f"pytest ended with {status}: {output[-2000:]}")
    found = {} if mutant is None else asdict(mutant)
    return {**found, "killed": bool(killed_by), "by": killed_by, "seconds": round(time.monotonic() - began)}


def main() -> int:
    """Run the chosen mutants and print how many were killed."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--packages", nargs="+", default=["numerics", "shard", "frontend", "cluster"])
    options.add_argument("--count", type=int, default=60)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--only", type=int, nargs="+", help="numbers of the mutants to run")
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.packages import MARKS, PACKAGES, WITH_RAY

    # What can notice a change of these packages; commands, pages, files and the demo are left out.
    packages = ("numerics", "shard", "frontend", "evaluation", "cluster", "sampling", "rpc")
    units = [f"tests/unit/{name}" for name in packages]
    hostile = ["tests/hostile/test_bad_input.py", "tests/hostile/test_bad_losses.py", "tests/hostile/test_overload.py"]
    rest = [*units, "tests/conformance", "tests/golden", "tests/statistical", *hostile, "tests/system/test_trainer.py"]

    local = f"{MARKS} and not ray"

    def stages(mutant: Mutant) -> list[list[str]]:
        package = mutant.path.removeprefix(SERVER + "/").split("/")[0]
        first = [f"tests/{path}" for path in PACKAGES[package]]
        with_ray = [["-m", MARKS, *first]] if package in WITH_RAY else []
        return [["-m", local, *first], *with_ray, ["-m", local, *rest]]

    mutants = list(enumerate(chosen(given.packages, given.count, given.seed)))
    mutants = [each for each in mutants if given.only is None or each[0] in given.only]
    results = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name, ThreadPoolExecutor(given.jobs) as pool:
        checkout = Path(name)
        copy_of_checkout(checkout)
        unchanged = run(None, checkout, [["-m", local, *rest]])
        if unchanged["killed"]:
            sys.exit(f"the tests fail without any change: {unchanged['by']}")
        running = {pool.submit(run, each, checkout, stages(each)): (number, each) for number, each in mutants}
        for future in as_completed(running):
            number, mutant = running[future]
            result = future.result()
            results.append({"number": number, **result})
            outcome = "killed" if result["killed"] else "SURVIVED"
            print(f"{number:3} {outcome:8} {result['seconds']:4} s  {mutant}  {result['by']}"[:250], flush=True)
    num_killed = sum(bool(result["killed"]) for result in results)
    print(f"{num_killed} of {len(results)} mutants killed")
    if given.out:
        given.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
