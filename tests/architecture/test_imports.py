"""The architecture: imports between packages point in one direction, and each library stays in its package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLIENT, SERVER = ROOT / "client/src/shardloss", ROOT / "server/src/shardloss_server"

# A package may import itself and the packages after it. `evaluation` is a peer of `frontend` that may import it.
ORDER = ["__main__", "cli", "rpc", "evaluation", "frontend", "cluster", "shard", "numerics", "placement", "access"]
EVERYWHERE = {"config", "logs", "machine", "metrics", "settings", "tracing"}
ONLY_IN = {
    "ray": ("cluster/ray_group.py", "cluster/embedded_ray.py"),
    "grpc": "rpc/",
    "google.protobuf": "rpc/",
}


def imports_of(path: Path) -> Iterator[str]:
    """Return every module that a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    """Return the package of a server file."""
    parts = path.relative_to(SERVER).with_suffix("").parts
    return parts[0]


SERVER_FILES = sorted(SERVER.rglob("*.py"))
CLIENT_FILES = sorted(path for path in CLIENT.rglob("*.py") if "v1/" not in str(path.relative_to(CLIENT)) + "/")


def test_a_server_room_imports_only_rooms_to_its_right() -> None:
    """The order is __main__ -> cli -> rpc -> evaluation -> frontend -> cluster -> shard -> numerics, placement."""
    for path in SERVER_FILES:
        room = room_of(path)
        for module in imports_of(path):
            target = module.split(".")[1] if module.startswith("shardloss_server.") else None
            if target in ORDER and room in ORDER:
                assert ORDER.index(target) >= ORDER.index(room), f"{path} imports {module}"


def test_ray_grpc_and_protobuf_stay_in_their_files() -> None:
    """Only two modules of cluster import ray; only the package rpc imports grpc and protobuf."""
    for path in SERVER_FILES:
        name = str(path.relative_to(SERVER))
        for module in imports_of(path):
            for library, files in ONLY_IN.items():
                if module == library or module.startswith(library + "."):
                    assert name.startswith(files), f"{name} imports {module}"


def test_pure_rooms_know_no_files_clock_or_processes() -> None:
    """The packages numerics, shard and placement import no modules for files, clocks, threads or processes."""
    for path in SERVER_FILES:
        if room_of(path) in ("numerics", "shard", "placement"):
            found = {module.split(".")[0] for module in imports_of(path)}
            assert not found & {"os", "time", "pathlib", "random", "threading", "subprocess", "socket"}, path


def test_the_client_never_imports_the_server_or_ray() -> None:
    """A trainer's machine needs neither ray nor the server package."""
    for path in CLIENT_FILES:
        for module in imports_of(path):
            assert module.split(".")[0] not in ("ray", "shardloss_server"), f"{path} imports {module}"


def test_sampling_knows_numpy_and_the_errors_alone() -> None:
    """The samplers import only numpy and shardloss.errors, so they run without a connection, torch or ray."""
    for path in sorted((CLIENT / "sampling").glob("*.py")):
        own = tuple(module for module in imports_of(path) if module.split(".")[0] not in sys.stdlib_module_names)
        assert all(module.startswith(("numpy", "shardloss.errors", "shardloss.sampling")) for module in own), path


def test_every_room_is_in_the_order() -> None:
    """Every package of the server has a position in the import order."""
    rooms = {room_of(path) for path in SERVER_FILES} - {"__init__"}
    assert rooms <= set(ORDER) | EVERYWHERE


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "torch", "shardloss_server"}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Block())
import shardloss, shardloss.sampling
assert "torch" not in sys.modules
print(len(shardloss.__all__))
"""


def test_the_client_imports_without_torch_and_ray() -> None:
    """The client can be imported on a machine without ray, torch and the server package."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
