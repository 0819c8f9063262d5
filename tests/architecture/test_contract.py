"""The contract, the public names and the error tree are whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grpc
import pytest
import shardloss
from shardloss import errors
from shardloss.v1 import evaluation_pb2, loss_pb2, options_pb2, server_pb2, table_pb2, tensor_pb2

ROOT = Path(__file__).resolve().parents[2]
MODULES = (evaluation_pb2, loss_pb2, server_pb2, table_pb2, tensor_pb2)
METHODS = [
    method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_rpc_says_which_role_may_call_it(method: object) -> None:
    """A method without a required_role would be open to anyone, or to no one."""
    role = method.GetOptions().Extensions[options_pb2.required_role]
    assert role in (options_pb2.ROLE_READER, options_pb2.ROLE_TRAINER, options_pb2.ROLE_ADMIN)


def test_the_promised_services_and_methods_are_there() -> None:
    """The contract's RPCs by name."""
    found = {f"{method.containing_service.name}.{method.name}" for method in METHODS}
    assert found == {
        *(f"LossService.{name}" for name in ("ComputeLoss", "StreamLoss", "Commit", "Abort", "SampleCandidates")),
        *(f"EvaluationService.{name}" for name in ("Evaluate", "TopK", "Score")),
        *(
            f"TableService.{name}"
            for name in ("CreateTable", "GetTable", "ListTables", "DeleteTable", "ReadRows", "WriteRows")
        ),
        "ServerService.GetServerInfo",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "proto").rglob("*.proto")), ids=lambda path: path.name)
def test_every_rpc_is_commented(path: Path) -> None:
    """An rpc line is preceded by a comment that states its effect."""
    lines = path.read_text().splitlines()
    for place, line in enumerate(lines):
        if re.match(r"\s*rpc ", line):
            assert lines[place - 1].strip().startswith("//"), f"{path.name}:{place + 1} has no comment"


def test_public_names_are_exactly_all() -> None:
    """__all__ is sorted, importable, and holds every public class and function of the package's face."""
    tree = ast.parse(Path(shardloss.__file__).read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(shardloss.__all__) == imported
    assert list(shardloss.__all__) == sorted(shardloss.__all__)
    assert all(hasattr(shardloss, name) for name in shardloss.__all__)


def test_every_error_has_a_reason_of_its_own_and_a_grpc_status() -> None:
    """The class is rebuilt from its reason alone, message and details included."""
    leaves = errors.leaves()
    assert len({leaf.reason for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert leaf.status in grpc.StatusCode.__members__
        rebuilt = errors.from_reason(leaf.reason, "UNKNOWN", "what", {"field": "hidden"})
        assert type(rebuilt) is leaf
        assert rebuilt.field == "hidden"
        assert str(rebuilt) == "what"


def test_every_grpc_status_becomes_one_of_our_errors() -> None:
    """No status code, known or not, reaches a user as a bare grpc.RpcError."""
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert code.name in errors.BY_STATUS
            assert isinstance(errors.from_reason(None, code.name, "x", {}), errors.ShardlossError)


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    """The drawing names every class with its reason."""
    drawing = errors.__doc__ or ""
    for leaf in errors.leaves():
        assert re.search(rf"{leaf.__name__}\s+{leaf.reason}\b|{leaf.__name__}$", drawing, re.M), leaf.__name__


def test_the_docs_list_every_reason() -> None:
    """docs/errors.md and the code name the same reasons."""
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/errors.md").read_text(), re.M))
    assert listed == {leaf.reason for leaf in errors.leaves()}
