"""A connection to a server. Importing it needs neither torch nor ray."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, TypeVar, cast

from shardloss import allocator, messages, splice, types
from shardloss.channel import Channel
from shardloss.credentials import Credentials, FilePath
from shardloss.errors import NotSupported
from shardloss.status import ServerStatus, server_status
from shardloss.table import Table
from shardloss.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    evaluation_pb2_grpc,
    loss_pb2,
    loss_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    table_pb2,
    table_pb2_grpc,
)

T = TypeVar("T")
log = logging.getLogger(__name__)
FILL_S = 600.0  # deadline of a call that fills a whole table


def connect(
    address: str,
    *,
    token: str | None = None,
    token_file: FilePath | None = None,
    tls: bool = False,
    ca_file: FilePath | None = None,
    client_cert_file: FilePath | None = None,
    client_key_file: FilePath | None = None,
    allow_plaintext_token: bool = False,
    timeout_s: float = 60.0,
    attempt_timeout_s: float = 20.0,
    keep_freed_memory: bool = True,
) -> LossClient:
    """Connect to a server ("host:port", or "unix:/path" on its own machine) and read its limits.

    timeout_s bounds each request with all its retries: a paged call, as `Table.evaluate`, makes several, and
    `create_table` has a longer one of its own. attempt_timeout_s bounds the first try of a short request, so that a
    lost reply is asked for again; each later try may take twice as long. With keep_freed_memory glibc is told, for the
    whole process, not to hand large freed blocks back to the kernel: a message of 2 MB costs a third then.

    token, or token_file (a file that holds it alone and is read again when it changes), goes with every call. ca_file
    (PEM) asks for TLS and says whose certificates a server may show; tls=True asks for it with the system's roots.
    client_cert_file and client_key_file (PEM) are this client's own, for mutual TLS. A token is sent in plaintext to
    this machine alone, unless allow_plaintext_token says otherwise.

    Raises:
        InvalidArgument: a file cannot be read, or a token would go over a network in plaintext.
        Unauthenticated, PermissionDenied: the server wants another token.
        ServerUnavailable, DeadlineExceeded: no server answers there.
    """
    if keep_freed_memory:
        allocator.keep_freed_memory()
    credentials = Credentials(token, token_file, tls, ca_file, client_cert_file, client_key_file, allow_plaintext_token)
    return LossClient(address, timeout_s=timeout_s, attempt_timeout_s=attempt_timeout_s, credentials=credentials)


class LossClient:
    """A connection to a server: thread-safe, a context manager. Calls have a deadline; transient errors are retried.

    It neither copies nor pickles, and so does nothing that holds it: tables, lazy logits, heads in torch.save(model).
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 60.0,
        attempt_timeout_s: float = 20.0,
        credentials: Credentials | None = None,
    ) -> None:
        self.address = address
        self.channel = Channel(address, timeout_s, attempt_timeout_s, credentials)
        self.losses = self.channel.stub(loss_pb2_grpc.LossServiceStub)
        methods = loss_pb2.DESCRIPTOR.services_by_name["LossService"].methods_by_name
        self.send_loss = self.channel.spliced(methods["ComputeLoss"], splice.LOSS_REQUEST, splice.LOSS_REPLY)
        self.stream_loss = self.channel.spliced(methods["StreamLoss"], splice.STREAM_REQUEST, splice.STREAM_REPLY)
        self.tables = self.channel.stub(table_pb2_grpc.TableServiceStub)
        self.questions = self.channel.stub(evaluation_pb2_grpc.EvaluationServiceStub)
        self._server = self.channel.stub(server_pb2_grpc.ServerServiceStub)
        self._attached: dict[tuple[str, str], object] = {}
        self._attaching = threading.Lock()
        self._under_way: set[Future[object]] = set()
        try:
            self.info = self.server_info()
            self.channel.max_message_bytes = int(self.info.limits["max_message_bytes"])
        except BaseException:
            self.close()
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupported(
            "a connection, and what holds it (a table, a head), is not copied or pickled: save state_dict() of the "
            "other modules, and connect where it is loaded"
        )

    def __enter__(self) -> LossClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, once commits under way have ended; open tickets stay until they expire. Idempotent."""
        wait(tuple(self._under_way), self.channel.timeout_s)
        self.channel.close()

    def watch(self, commit: Future[object]) -> None:
        """Have `close` wait for a commit under way, and log where it fails: who started it may never ask."""
        self._under_way.add(commit)
        commit.add_done_callback(self._ended)

    def _ended(self, commit: Future[object]) -> None:
        self._under_way.discard(commit)
        error = commit.exception()
        if error is not None:
            log.warning("a commit that was under way ended with %s: %s", type(error).__name__, error)

    def attached(self, module: str, table: str, make: Callable[[], T], fits: Callable[[T], bool]) -> T:
        """What shardloss.compat keeps with a table: the one that was made before, while it fits."""
        with self._attaching:
            known = self._attached.get((module, table))
            if known is None or not fits(cast(T, known)):
                known = self._attached[module, table] = make()
            return cast(T, known)

    def server_info(self) -> types.ServerInfo:
        """Version, features and limits of the server.

        Raises:
            ServerUnavailable, DeadlineExceeded: it does not answer.
        """
        request = server_pb2.GetServerInfoRequest()
        return messages.server_info(self.channel.unary(self._server.GetServerInfo, request, None))

    def status(self) -> ServerStatus:
        """What the server, its workers and its tables do now; of a client that is connected to the admin port.

        Raises:
            NotSupported: the address is not that of an admin port.
        """
        stub = self.channel.stub(admin_pb2_grpc.AdminServiceStub)
        return server_status(self.channel.unary(stub.GetStatus, admin_pb2.GetStatusRequest(), None))

    def create_table(
        self,
        name: str,
        *,
        num_classes: int,
        dim: int,
        dtype: str = "float32",
        bias: bool = True,
        num_shards: int = 0,
        placement: str = "mod",
        initializer: types.Initializer | None = None,
        optimizer: types.Optimizer | None = None,
        count_labels: bool = False,
        timeout_s: float = FILL_S,
    ) -> Table:
        """Make a table of num_classes V rows of dim D, or take the one that exists with an equal spec.

        dtype is how rows are stored: "float32", "float64" or "bfloat16". placement "mod" deals the
        classes out in turn, so that frequent ones, which samplers and labels hit, are on all shards alike; "div" cuts
        them in ranges. num_shards 0 is one shard a worker. initializer None is uniform on +-1/sqrt(D);
        optimizer None is plain SGD. count_labels counts the labels of commits, for the learned_unigram sampler and
        corrected in-batch candidates. timeout_s is for the whole filling.

        Raises:
            TableExists: the name is taken by another spec.
            InvalidArgument, LimitExceeded: the spec is wrong or too large.
        """
        spec = messages.table_spec(
            name, num_classes, dim, dtype, bias, num_shards, placement, initializer, optimizer, count_labels
        )
        request = table_pb2.CreateTableRequest(spec=spec)
        reply = self.channel.unary(self.tables.CreateTable, request, timeout_s, whole=True)
        return Table(self, messages.table_info(reply.table))

    def table(self, name: str) -> Table:
        """A table that exists.

        Raises:
            TableNotFound: there is none of that name.
        """
        request = table_pb2.GetTableRequest(table=name)
        return Table(self, messages.table_info(self.channel.unary(self.tables.GetTable, request, None)))

    def list_tables(self) -> list[types.TableInfo]:
        """All tables by name, each as it stands now."""
        reply = self.channel.unary(self.tables.ListTables, table_pb2.ListTablesRequest(), None)
        return [messages.table_info(table) for table in reply.tables]

    def rename_table(self, name: str, new_name: str) -> Table:
        """Give a table another name, whole and at once.

        Raises:
            TableNotFound, TableExists: there is none of that name; the new name is taken.
            TransientError: it may have been renamed.
        """
        request = table_pb2.RenameTableRequest(table=name, new_name=new_name)
        reply = self.channel.unary(self.tables.RenameTable, request, None, whole=True, repeatable=False)
        return Table(self, messages.table_info(reply.table))

    def delete_table(self, name: str) -> None:
        """Free a table with all its tickets.

        Raises:
            TableNotFound: there is none of that name.
            TransientError: it may have been deleted; not repeated here, since by then the name may be another table's.
        """
        request = table_pb2.DeleteTableRequest(table=name)
        self.channel.unary(self.tables.DeleteTable, request, None, whole=True, repeatable=False)
