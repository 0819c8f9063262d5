"""The error tree that client and server share, sorted by who must act.

    ShardlossError
    ├── RequestError                the caller must change something
    │   ├── InvalidArgument         INVALID_ARGUMENT    a field is wrong; `field` and `index` name it
    │   ├── LimitExceeded           LIMIT_EXCEEDED      larger than this server accepts
    │   ├── NotSupported            NOT_SUPPORTED       reserved in the contract, not implemented
    │   ├── TableNotFound           TABLE_NOT_FOUND
    │   ├── TableExists             TABLE_EXISTS        with a different spec
    │   ├── SessionExpired          SESSION_EXPIRED     unknown or forgotten
    │   ├── StepReused              STEP_REUSED         the key was used with a different payload
    │   ├── StepTooOld              STEP_TOO_OLD        a later step was applied or given up
    │   ├── TicketUnknown           TICKET_UNKNOWN
    │   ├── TicketExpired           TICKET_EXPIRED
    │   ├── TicketAborted           TICKET_ABORTED
    │   ├── Stale                   STALE               scored too many commits ago
    │   ├── Unauthenticated         UNAUTHENTICATED
    │   ├── PermissionDenied        PERMISSION_DENIED
    │   ├── BadFile                 BAD_FILE            client only: a file is invalid or cannot be written
    │   ├── TableMoved              TABLE_MOVED         client only: the table changed while it was exported
    │   ├── DoubleBackward          DOUBLE_BACKWARD     client only: the loss has no second derivative
    │   └── ClientClosed            CLIENT_CLOSED       client only
    ├── TransientError              the same call may be repeated
    │   ├── Overloaded              OVERLOADED          `retry_after_s` says when
    │   ├── TableUnavailable        TABLE_UNAVAILABLE   shards are being brought to one version
    │   ├── ServerUnavailable       SERVER_UNAVAILABLE  no answer, or shutting down
    │   └── DeadlineExceeded        DEADLINE_EXCEEDED
    └── ServiceError                an operator must investigate
        ├── RowsLost                ROWS_LOST           a worker died with rows of this table
        ├── Internal                INTERNAL
        └── BadReply                BAD_REPLY           client only: the reply violates the contract

The client rebuilds a class from its stable `reason`, never from text. If a status carries no reason, for instance
because a proxy created it, the gRPC status code determines the class.
"""

from __future__ import annotations

from collections.abc import Mapping

DOMAIN = "shardloss"


class ShardlossError(Exception):
    """Root of the error tree.

    `reason` is a stable identifier, `status` the name of the gRPC status code, and `details` strings by name.
    """

    reason = "UNKNOWN"
    status = "UNKNOWN"

    def __init__(self, message: str, /, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, str] = {name: str(value) for name, value in details.items() if value is not None}

    @property
    def field(self) -> str | None:
        """The request field at fault, as named in the contract, or None."""
        return self.details.get("field")

    @property
    def index(self) -> str | None:
        """The first offending index within the field, such as "17" or "17, 0", or None."""
        return self.details.get("index")


class RequestError(ShardlossError):
    """An error that the caller must fix; the same call would fail again."""

    status = "FAILED_PRECONDITION"


class InvalidArgument(RequestError, ValueError):
    """A field is malformed or out of range."""

    reason, status = "INVALID_ARGUMENT", "INVALID_ARGUMENT"


class LimitExceeded(RequestError):
    """The request is larger than a limit that GetServerInfo reports."""

    reason, status = "LIMIT_EXCEEDED", "OUT_OF_RANGE"


class NotSupported(RequestError, NotImplementedError):
    """A reserved field, or an operation that is not supported, was used."""

    reason, status = "NOT_SUPPORTED", "UNIMPLEMENTED"


class TableNotFound(RequestError, LookupError):
    """There is no table of this name."""

    reason, status = "TABLE_NOT_FOUND", "NOT_FOUND"


class TableExists(RequestError):
    """A table of this name exists with a different spec."""

    reason, status = "TABLE_EXISTS", "ALREADY_EXISTS"


class SessionExpired(RequestError):
    """The session is unknown or forgotten; start a new one."""

    reason = "SESSION_EXPIRED"


class StepReused(RequestError):
    """The key (session, step, part) was used with a different payload."""

    reason = "STEP_REUSED"


class StepTooOld(RequestError):
    """A later step of the session was applied or given up."""

    reason = "STEP_TOO_OLD"


class TicketUnknown(RequestError, LookupError):
    """There is no such ticket in this session and step."""

    reason, status = "TICKET_UNKNOWN", "NOT_FOUND"


class TicketExpired(RequestError):
    """The ticket was open for longer than the server keeps tickets."""

    reason = "TICKET_EXPIRED"


class TicketAborted(RequestError):
    """The ticket was given up and can no longer be committed."""

    reason, status = "TICKET_ABORTED", "ABORTED"


class Stale(RequestError):
    """A part was scored more commits ago than is allowed."""

    reason = "STALE"


class Unauthenticated(RequestError):
    """The call carries no valid credentials."""

    reason, status = "UNAUTHENTICATED", "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The credentials do not allow this call."""

    reason, status = "PERMISSION_DENIED", "PERMISSION_DENIED"


class BadFile(RequestError, ValueError):
    """A file is invalid or cannot be written; the message names the file and the tensor."""

    reason = "BAD_FILE"


class TableMoved(RequestError):
    """Another trainer changed the table while it was exported, so the exported rows are of several versions."""

    reason = "TABLE_MOVED"


class DoubleBackward(RequestError, RuntimeError):
    """The remote loss was differentiated with create_graph=True."""

    reason = "DOUBLE_BACKWARD"


class ClientClosed(RequestError, RuntimeError):
    """The client was closed before this call."""

    reason = "CLIENT_CLOSED"


class TransientError(ShardlossError):
    """A temporary failure; the same call, with the same key, may be repeated."""

    status = "UNAVAILABLE"

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait before repeating the call, as reported by the server; 0 if it reported none."""
        return float(self.details.get("retry_after_s", "0"))


class Overloaded(TransientError):
    """The server is temporarily at its limit of calls, bytes, sessions or tickets."""

    reason, status = "OVERLOADED", "RESOURCE_EXHAUSTED"


class TableUnavailable(TransientError):
    """The table's shards are being brought to one version."""

    reason = "TABLE_UNAVAILABLE"


class ServerUnavailable(TransientError, ConnectionError):
    """The server cannot be reached or is shutting down."""

    reason = "SERVER_UNAVAILABLE"


class DeadlineExceeded(TransientError, TimeoutError):
    """The call ran out of time. It may or may not have taken effect; repeat it with the same key to find out."""

    reason, status = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


class ServiceError(ShardlossError):
    """A failure that an operator must investigate."""

    status = "INTERNAL"


class RowsLost(ServiceError):
    """A worker died with rows of this table: import it again (replace=True), or delete it and create it again."""

    reason, status = "ROWS_LOST", "DATA_LOSS"


class Internal(ServiceError):
    """A bug in the server, whose log contains the request id."""

    reason = "INTERNAL"


class BadReply(ServiceError):
    """The server's reply violates the contract."""

    reason = "BAD_REPLY"


def leaves(root: type[ShardlossError] = ShardlossError) -> list[type[ShardlossError]]:
    """Return every class of the tree that has no subclass."""
    subclasses = root.__subclasses__()
    return [leaf for sub in subclasses for leaf in leaves(sub)] if subclasses else [root]


BY_REASON: Mapping[str, type[ShardlossError]] = {leaf.reason: leaf for leaf in leaves()}

# For statuses without our ErrorInfo, which gRPC itself or a proxy has created.
BY_STATUS: Mapping[str, type[ShardlossError]] = {
    "CANCELLED": ServerUnavailable,  # the client never cancels a call, so the server dropped a stalled one
    "UNKNOWN": BadReply,  # gRPC's own, for a reply without a status
    "INVALID_ARGUMENT": InvalidArgument,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "NOT_FOUND": NotSupported,
    "ALREADY_EXISTS": TableExists,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": Overloaded,
    "FAILED_PRECONDITION": InvalidArgument,
    "ABORTED": ServerUnavailable,
    "OUT_OF_RANGE": LimitExceeded,
    "UNIMPLEMENTED": NotSupported,
    "INTERNAL": Internal,
    "UNAVAILABLE": ServerUnavailable,
    "DATA_LOSS": Internal,
    "UNAUTHENTICATED": Unauthenticated,
}


# An HTTP status in place of a reply: what it means, and the setting of nginx to look at.
BY_HTTP: Mapping[int, tuple[type[ShardlossError], str]] = {
    401: (Unauthenticated, "the proxy demands credentials of its own"),
    403: (PermissionDenied, "the proxy refuses this client or this path"),
    408: (ServerUnavailable, "the request arrived too slowly for the proxy (nginx: client_body_timeout)"),
    413: (LimitExceeded, "the request is larger than the proxy accepts (nginx: client_max_body_size)"),
    429: (ServerUnavailable, "the proxy limits the rate of calls (nginx: limit_req)"),
    502: (ServerUnavailable, "the proxy gets no answer from the server: is it up, and with TLS as the proxy expects?"),
    503: (ServerUnavailable, "the proxy has no server to pass the call to, or limits connections (nginx: limit_conn)"),
    504: (ServerUnavailable, "the server did not answer within the proxy's time limit (nginx: grpc_read_timeout)"),
}


def from_http(status: int, server: str) -> ShardlossError:
    """Return the error for a reply of HTTP, which a proxy or a web server at the server's address made."""
    page = "another site answers: check host, port and path of the address (nginx: server_name, location, grpc_pass)"
    cls, meaning = BY_HTTP.get(status, (BadReply, page))
    repeated = "a repeated call may succeed" if issubclass(cls, TransientError) else "the call is not repeated"
    return cls(f"a proxy or web server answered in place of {server}, with HTTP status {status}: {meaning}; {repeated}")


def explained(status: str, message: str, server: str) -> str:
    """Return the message for a status that gRPC itself made, which names no server and nothing to do."""
    if status == "UNAVAILABLE":
        return f"{server} cannot be reached or ended the connection: {message}"
    if status == "DEADLINE_EXCEEDED":
        return f"{server} did not answer in time ({message})"
    if status == "UNKNOWN":
        return f"what answered is not {server}, or a proxy changed its reply: check the address ({message})"
    if status == "UNIMPLEMENTED":
        return f"{server} is not a shardloss server, or is older than this client: {message}"
    return message


def from_reason(reason: str | None, status: str, message: str, details: Mapping[str, str]) -> ShardlossError:
    """Rebuild an error from a received status; an unknown reason falls back to the status code."""
    cls = BY_REASON.get(reason or "") or BY_STATUS.get(status, Internal)
    return cls(message, **details)
