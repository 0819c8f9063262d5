"""The contract, the public names and the error tree are complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import grpc
import pytest
import shardloss
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from shardloss import errors
from shardloss.v1 import admin_pb2, evaluation_pb2, loss_pb2, options_pb2, server_pb2, table_pb2, tensor_pb2

ROOT = Path(__file__).resolve().parents[2]
NAMED = ("message_type", "nested_type", "field", "oneof_decl", "extension", "enum_type", "value", "service", "method")
ONEOF_DECL = descriptor_pb2.DescriptorProto.ONEOF_DECL_FIELD_NUMBER
Place = tuple[int, ...]
MODULES = (admin_pb2, evaluation_pb2, loss_pb2, server_pb2, table_pb2, tensor_pb2)
METHODS = [
    method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_rpc_says_which_role_may_call_it(method: object) -> None:
    """Every method declares a required_role; a method without one could not be called."""
    role = method.GetOptions().Extensions[options_pb2.required_role]
    assert role in (options_pb2.ROLE_READER, options_pb2.ROLE_TRAINER, options_pb2.ROLE_ADMIN)


def test_the_promised_services_and_methods_are_there() -> None:
    """The contract defines exactly these RPCs."""
    found = {f"{method.containing_service.name}.{method.name}" for method in METHODS}
    assert found == {
        *(f"LossService.{name}" for name in ("ComputeLoss", "StreamLoss", "Commit", "Abort", "SampleCandidates")),
        *(f"EvaluationService.{name}" for name in ("Evaluate", "TopK", "Score", "SampleClasses")),
        *(
            f"TableService.{name}"
            for name in (
                "CreateTable",
                "GetTable",
                "ListTables",
                "DeleteTable",
                "RenameTable",
                "ReadRows",
                "WriteRows",
                "WriteClassCounts",
                "ReadClassCounts",
            )
        ),
        "ServerService.GetServerInfo",
        "AdminService.GetStatus",
    }


def named(node: Message, path: Place = (), prefix: str = "") -> Iterator[tuple[str, Place, Message]]:
    """Return (dotted name, place in the source info, descriptor) of everything with a name inside a descriptor."""
    for field, children in node.ListFields():
        if field.name in NAMED:
            for index, child in enumerate(children):
                place = (*path, field.number, index)
                yield prefix + child.name, place, child
                yield from named(child, place, f"{prefix}{child.name}.")


def own_comments(file: descriptor_pb2.FileDescriptorProto, lines: list[str]) -> dict[Place, str]:
    """Return the comment of each place of a file: at the end of its first line, or above it in the same column."""
    found = {}
    for location in file.source_code_info.location:
        line, column = location.span[:2]
        above = location.leading_comments if lines[line - 1].find("//") == column else ""
        beside = location.trailing_comments if "//" in lines[line] else ""
        found[tuple(location.path)] = (above + beside).strip()
    return found


def comments_in(folder: Path, out: Path) -> dict[str, str]:
    """Return the comments in a folder of contracts by dotted name; a member of a oneof may share the oneof's."""
    paths = sorted(str(path) for path in folder.rglob("*.proto"))
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", "--include_source_info"]
    subprocess.run([*protoc, f"--descriptor_set_out={out}", *paths], check=True)
    found = {}
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        comments = own_comments(file, (folder / file.name).read_text().splitlines())
        for name, place, node in named(file):
            if place in comments:  # the oneof that protoc adds for an optional field has no place in the source
                found[name] = comments[place]
                if isinstance(node, descriptor_pb2.FieldDescriptorProto) and node.HasField("oneof_index"):
                    found[name] = found[name] or comments.get((*place[:-2], ONEOF_DECL, node.oneof_index), "")
    return found


@pytest.fixture(scope="module")
def comments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the comments of the contract by dotted name."""
    return comments_in(ROOT / "proto", tmp_path_factory.mktemp("contract") / "contract.pb")


def test_everything_in_the_contract_has_a_comment_of_its_own(comments: dict[str, str]) -> None:
    """Every message, field, oneof, enum, value, service and RPC has its own comment."""
    fields = {f"{message}.{field}" for module in MODULES for message, field in fields_of(module)}
    assert fields <= set(comments)
    assert [name for name, comment in comments.items() if not comment] == []


def fields_of(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Return (message, field) for the fields of a stub's top-level messages."""
    for message in module.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            yield message.name, field.name


def test_a_bare_field_is_found(tmp_path: Path) -> None:
    """A neighbour's comment, one continued from the line before, or a detached one does not count as a field's own."""
    (tmp_path / "a.proto").write_text(BARE)
    found = comments_in(tmp_path, tmp_path / "a.pb")
    bare = {"B", "B.over", "B.run", "B.apart", "B.one_of", "B.member", "E", "E.E_BARE", "B.C.nested"}
    assert {name for name, comment in found.items() if not comment} == bare


BARE = """syntax = "proto3";
// A message.
message A {
  // Above.
  int64 above = 1;
  optional int64 beside = 2;  // Beside.
  oneof commented {           // For all.
    int64 shared = 3;
    int64 own = 4;  // Own.
  }
}
message B {
  int64 long = 1;  // A comment that
                   // runs over.
  int64 over = 2;
  // For the next line alone.
  int64 led = 3;
  int64 run = 4;
  // Apart.

  optional int64 apart = 5;
  oneof one_of {
    int64 member = 6;
  }
  // Inside.
  message C {
    int64 nested = 1;
  }
}
enum E {
  E_BARE = 0;
  E_TOLD = 1;  // Told.
}
"""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_every_rpc_states_its_errors(method: MethodDescriptor, comments: dict[str, str]) -> None:
    """Every RPC's comment lists its errors, or its service's comment lists those of all its RPCs."""
    service = method.containing_service.name
    stated = re.search(r"\bErrors\b", comments[f"{service}.{method.name}"])
    assert stated or "Errors of all" in comments[service]


def test_public_names_are_exactly_all() -> None:
    """__all__ is sorted, importable, and lists exactly the names that the package imports."""
    tree = ast.parse(Path(shardloss.__file__).read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(shardloss.__all__) == imported
    assert list(shardloss.__all__) == sorted(shardloss.__all__)
    assert all(hasattr(shardloss, name) for name in shardloss.__all__)


def test_every_error_has_a_reason_of_its_own_and_a_grpc_status() -> None:
    """The reason alone identifies the class; the rebuilt error keeps its message and details."""
    leaves = errors.leaves()
    assert len({leaf.reason for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert leaf.status in grpc.StatusCode.__members__
        rebuilt = errors.from_reason(leaf.reason, "UNKNOWN", "what", {"field": "hidden"})
        assert type(rebuilt) is leaf
        assert rebuilt.field == "hidden"
        assert str(rebuilt) == "what"


def test_every_grpc_status_becomes_one_of_our_errors() -> None:
    """Every gRPC status code except OK maps to an error of the tree, so users never see a bare grpc.RpcError."""
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert code.name in errors.BY_STATUS
            assert isinstance(errors.from_reason(None, code.name, "x", {}), errors.ShardlossError)


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    """The tree drawn in the module's docstring lists every class with its reason."""
    drawing = errors.__doc__ or ""
    for leaf in errors.leaves():
        assert re.search(rf"{leaf.__name__}\s+{leaf.reason}\b|{leaf.__name__}$", drawing, re.M), leaf.__name__


def test_the_docs_list_every_reason() -> None:
    """docs/errors.md and the code list the same reasons."""
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "docs/errors.md").read_text(), re.M))
    assert listed == {leaf.reason for leaf in errors.leaves()}
