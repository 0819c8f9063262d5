"""A connection to a server. Importing this module imports neither torch nor ray."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, TypeVar, cast

from shardloss import allocator, messages, splice, types
from shardloss.channel import Channel
from shardloss.creating import Progress, reported
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
WAIT_S = 3.0  # for a connection
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
    wait_s: float = WAIT_S,
    keep_freed_memory: bool = True,
) -> LossClient:
    """Connect to a server ("host:port", or "unix:/path" on the server's machine) and read its limits.

    timeout_s limits each request with all its retries. A paged call such as `Table.evaluate` sends several requests;
    `create_table` has its own, longer timeout. attempt_timeout_s limits the first try of a short request, so that a
    lost reply is requested again; each later try may take twice as long. wait_s limits the wait for a connection,
    within timeout_s: a larger value waits for a server that is still starting. keep_freed_memory stops glibc, in the
    whole process, from returning large freed blocks to the kernel, which reduces the time of a 2 MB message to a third.

    token, or the content of token_file (a file with nothing but the token, read again when it changes), is sent with
    every call. ca_file (PEM) enables TLS and contains the certificate authorities that may sign the server's
    certificate; tls=True enables TLS with the system's authorities. client_cert_file and client_key_file (PEM) are the
    client's own, for mutual TLS. Without TLS a token is sent only to this machine, unless allow_plaintext_token=True.

    Raises:
        InvalidArgument: the address is malformed, a file cannot be read, or a token would be sent over a network in
            plaintext.
        Unauthenticated, PermissionDenied: the server requires a different token.
        ServerUnavailable: there is no connection within wait_s; the message says what is at the address instead.
        BadReply, NotSupported, DeadlineExceeded: the server at this address is another one, or does not answer.
    """
    if keep_freed_memory:
        allocator.keep_freed_memory()
    credentials = Credentials(token, token_file, tls, ca_file, client_cert_file, client_key_file, allow_plaintext_token)
    return LossClient(
        address, timeout_s=timeout_s, attempt_timeout_s=attempt_timeout_s, wait_s=wait_s, credentials=credentials
    )


class LossClient:
    """A thread-safe connection to a server, usable as a context manager.

    Calls have a deadline, and transient errors are retried. Each process needs its own client, even
    after a fork. A client cannot be copied or pickled, and neither can an object that contains it: a table, lazy
    logits, or a head in torch.save(model).
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 60.0,
        attempt_timeout_s: float = 20.0,
        wait_s: float = WAIT_S,
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
        self._attached: dict[str, dict[str, tuple[str, Any]]] = {}
        self._attaching = threading.Lock()
        self._under_way: set[Future[object]] = set()
        try:
            with self.channel.connecting(min(wait_s, timeout_s)):
                self.info = self.server_info()
            self.channel.max_message_bytes = int(self.info.limits["max_message_bytes"])
        except BaseException:
            self.close()
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupported(
            "a connection, or an object that contains one (a table, a head), cannot be copied or pickled: save "
            "state_dict() of the other modules, and connect again after loading it"
        )

    def __repr__(self) -> str:
        return f"<LossClient {self.address}, server {self.info.version}>"

    def __enter__(self) -> LossClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection after waiting up to timeout_s for commits in progress. Idempotent.

        Open tickets stay on the server until they expire.
        """
        wait(tuple(self._under_way), self.channel.timeout_s)
        self.channel.close()

    def _watch(self, commit: Future[object]) -> None:
        """Make `close` wait for a commit in progress, and log its failure in case the caller never reads the result."""
        self._under_way.add(commit)
        commit.add_done_callback(self._ended)

    def _ended(self, commit: Future[object]) -> None:
        self._under_way.discard(commit)
        error = commit.exception()
        if error is not None:
            log.warning("a commit sent in the background failed with %s: %s", type(error).__name__, error)

    def _attach(self, module: str, table: Table, make: Callable[[], T], retire: Callable[[T], None]) -> T:
        """Return the object that a module of shardloss.compat keeps for a table.

        If there is none, make it, and retire those of other tables that had its name.
        """
        with self._attaching:
            kept = self._attached.setdefault(module, {})
            if table.id not in kept:
                made = make()
                for old in [key for key, (name, _) in kept.items() if name == table.name]:
                    retire(kept.pop(old)[1])
                kept[table.id] = table.name, made
            return cast(T, kept[table.id][1])

    def server_info(self) -> types.ServerInfo:
        """Return the version, features and limits of the server.

        Raises:
            ServerUnavailable, DeadlineExceeded: the server does not answer.
        """
        request = server_pb2.GetServerInfoRequest()
        return messages.server_info(self.channel.unary(self._server.GetServerInfo, request, None))

    def status(self) -> ServerStatus:
        """Return the status of the server, its workers and its tables; the client must be connected to the admin port.

        Raises:
            NotSupported: the client is connected to another port.
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
        progress: Progress | None = None,
    ) -> Table:
        """Create a table of num_classes V rows of dim D, or return the existing table if its spec is equal.

        dtype is the storage dtype of rows: "float32", "float64" or "bfloat16". placement "mod" assigns classes to
        shards in turn (id modulo num_shards), so that all shards share the frequent classes that samplers and labels
        hit; "div" assigns contiguous ranges. num_shards 0 is one shard per worker. initializer None is uniform on
        +-1/sqrt(D); optimizer None is plain SGD. With count_labels the server counts the labels of commits, which the
        learned_unigram sampler and corrected in-batch candidates need. timeout_s includes the initialization of all
        rows, of which progress(done, total) reports the state every half second; other tables can be used meanwhile. If
        it is interrupted, the server deletes what it had of the table.

        Raises:
            TableExists: a table of this name exists, or is being created, with a different spec.
            InvalidArgument, LimitExceeded: the spec is invalid, or too large for a limit or a worker's memory.
            RowsLost: the existing table has lost rows; or a worker died while it filled the new one, which is not kept.
        """
        spec = messages.table_spec(
            name, num_classes, dim, dtype, bias, num_shards, placement, initializer, optimizer, count_labels
        )
        request = table_pb2.CreateTableRequest(spec=spec)
        with reported(progress, lambda: self.table(name).spec):
            reply = self.channel.unary(self.tables.CreateTable, request, timeout_s, whole=True)
        return Table(self, messages.table_info(reply.table))

    def table(self, name: str) -> Table:
        """Return an existing table, given by its name or by `Table.reference`.

        It may still be in creation, or have lost rows: see `table.spec.state`.

        Raises:
            TableNotFound: there is no table of this name.
        """
        request = table_pb2.GetTableRequest(table=name)
        return Table(self, messages.table_info(self.channel.unary(self.tables.GetTable, request, None)))

    def list_tables(self) -> list[types.TableInfo]:
        """Return the spec and current state of all tables, ordered by name."""
        reply = self.channel.unary(self.tables.ListTables, table_pb2.ListTablesRequest(), None)
        return [messages.table_info(table) for table in reply.tables]

    def rename_table(self, name: str, new_name: str, *, replace: bool = False) -> Table:
        """Rename a table atomically; with replace, delete the table that has the new name in the same moment.

        Raises:
            TableNotFound: there is no table of this name.
            TableExists: the new name is taken, and replace is False.
            TransientError: the table may have been renamed.
        """
        request = table_pb2.RenameTableRequest(table=name, new_name=new_name, replace=replace)
        reply = self.channel.unary(self.tables.RenameTable, request, None, whole=True, repeatable=False)
        return Table(self, messages.table_info(reply.table))

    def delete_table(self, name: str) -> None:
        """Delete a table with all its tickets; by `Table.reference`, never a later table of the same name.

        Raises:
            TableNotFound: there is no table of this name.
            TransientError: the table may have been deleted. The call is not retried, because another table may have
                the name by then.
        """
        request = table_pb2.DeleteTableRequest(table=name)
        self.channel.unary(self.tables.DeleteTable, request, None, whole=True, repeatable=False)
