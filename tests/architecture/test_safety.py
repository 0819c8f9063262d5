"""The code never unpickles client data, validates input by assert, or opens files outside the listed modules."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENT, SERVER = ROOT / "client/src/shardloss", ROOT / "server/src/shardloss_server"
FILES = sorted(path for top in (CLIENT, SERVER) for path in top.rglob("*.py") if path.parent.name != "v1")

RUN_CODE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "jsonpickle"}
# Pickles are read only from a link whose peer has proven that it knows the group's key: docs/security.md.
BETWEEN_OUR_PROCESSES = {"cluster/frames.py"}
LOADS = {"torch.load", "torch.jit.load", "torch.package", "eval", "exec", "__import__", "os.system", "os.popen"}
PROCESSES = {"subprocess", "pty", "pexpect"}

# The server packages and modules that may access files: none of them accepts a path from the wire.
FILE_ROOMS = {"cli", "access", "settings.py", "config.py", "metrics.py"}
FILE_MODULES = {
    "machine.py",
    "cluster/embedded_ray.py",
    "cluster/folder.py",
    "cluster/link.py",
    "cluster/ray_group.py",
    "cluster/stats.py",
    "cluster/surroundings.py",
    "rpc/admin.py",
    "rpc/gauges.py",
    "rpc/probe.py",
    "rpc/serve.py",
}
KNOW_FILES = {"pathlib", "os", "shutil", "tempfile", "glob"}
NARROWING = re.compile(r"^(\w[\w.()\[\]]* is not None|isinstance\(.+\))$")


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def modules_of(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, anywhere in the file."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Return (dotted name, call) of every call in a file."""
    return ((ast.unparse(node.func), node) for node in nodes_of(path) if isinstance(node, ast.Call))


def test_nothing_that_runs_code_is_loaded() -> None:
    """The code uses no pickle or similar format, torch.load, object array or eval, and starts no other program."""
    for path in FILES:
        if str(path.relative_to(SERVER if SERVER in path.parents else CLIENT)) in BETWEEN_OUR_PROCESSES:
            continue
        assert not modules_of(path) & (RUN_CODE | PROCESSES), path
        for name, call in calls_of(path):
            assert name not in LOADS, f"{path}:{call.lineno}"
            pickled = [word for word in call.keywords if word.arg == "allow_pickle"]
            assert all(isinstance(word.value, ast.Constant) and word.value.value is False for word in pickled), path


def test_frames_are_read_behind_the_handshake_alone() -> None:
    """Only three modules decode frames, and every module of `cluster` that opens a socket uses `handshake`.

    surroundings.py only connects, to see whether a cluster's head listens; it sends and reads nothing.
    """
    users = {str(path.relative_to(SERVER)) for path in SERVER.rglob("*.py") if "frames.receive(" in path.read_text()}
    assert users == {"cluster/link.py", "cluster/linked_worker.py", "cluster/relay.py"}
    for path in (SERVER / "cluster").glob("*.py"):
        text = path.read_text()
        if path.name == "surroundings.py":
            assert not re.search(r"\.(send|recv)", text)
        elif re.search(r"\.(accept|create_connection|connect)\(", text):
            assert "handshake." in text, f"{path} opens sockets without a handshake"


def test_assert_tells_types_and_guards_nothing() -> None:
    """In code that reads input, an assert only narrows types, because python -O removes it."""
    for path in FILES:
        room = path.relative_to(SERVER).parts[0] if SERVER in path.parents else "client"
        if room in ("client", "rpc", "access", "cli") or "validate" in path.parts:
            for node in nodes_of(path):
                if isinstance(node, ast.Assert):
                    assert NARROWING.match(ast.unparse(node.test)), (
                        f"{path}:{node.lineno} asserts {ast.unparse(node.test)}"
                    )


def test_files_are_known_where_no_name_from_the_wire_comes() -> None:
    """Only the listed packages and modules access files, so a table's name can never become a path."""
    for path in sorted(SERVER.rglob("*.py")):
        name = str(path.relative_to(SERVER))
        if name.split("/", 1)[0] in FILE_ROOMS or name in FILE_MODULES:
            continue
        assert not modules_of(path) & KNOW_FILES, path
        assert not [call.lineno for called, call in calls_of(path) if called == "open"], path


OPTIMIZED = """
assert False  # only -O gets past this
import sys
import numpy as np
import shardloss
from shardloss import errors
from shardloss.v1 import loss_pb2
from tests.hostile.test_bad_input import TABLE
from tests.hostile.world import LIMITS, D, V, World, once, serving

with serving(LIMITS) as server, shardloss.connect(server.address) as client:
    client.create_table("no-bias", num_classes=V, dim=D, bias=False)
    client.create_table("bfloat16", num_classes=V, dim=D, dtype="bfloat16")
    client.create_table("wide", num_classes=LIMITS.max_batch + 3, dim=D)
    world, seen, wrong = World(server, client, "words"), 0, []
    for bad in TABLE[::10]:
        request = bad.request(world)
        bad.spoil(request)
        try:
            once(world.method(request), request)
            wrong.append(f"{bad}: taken")
        except errors.ShardlossError as error:
            seen += 1
            if type(error) is not bad.error or error.field != bad.field:
                wrong.append(f"{bad}: {type(error).__name__} of {error.field}: {error}")
    if world.look() != world.state or world.good_call() != world.answer:
        wrong.append("the table was changed")
print(seen, *wrong, sep="\\n")
sys.exit(bool(wrong))
"""


def test_input_is_refused_alike_without_asserts() -> None:
    """Under python -O, every tenth bad request of the hostile tests is refused with the same error and field."""
    done = subprocess.run(
        [sys.executable, "-O", "-c", OPTIMIZED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 50
