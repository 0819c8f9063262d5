"""Encoding of errors as google.rpc.Status with one ErrorInfo and no other internal details."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from shardloss.errors import DOMAIN, ShardlossError, TransientError

DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE_BYTES = 512  # it is sent three times, once percent-encoded; gRPC drops a status above about 8 kB
MAX_VALUE_BYTES = 128


def cut(text: str, num_bytes: int) -> str:
    """Return the longest prefix of a text that takes at most num_bytes bytes of UTF-8."""
    return text.encode("utf-8", "replace")[:num_bytes].decode("utf-8", "ignore")


def status_of(error: ShardlossError) -> status_pb2.Status:
    """Return the google.rpc.Status of an error; it takes less than 4 kB."""
    message = cut(error.message, MAX_MESSAGE_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=message)
    metadata = {name: cut(value, MAX_VALUE_BYTES) for name, value in error.details.items()}
    details: list[error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo | error_details_pb2.BadRequest] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=cut(error.field, MAX_VALUE_BYTES), description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, TransientError) and error.retry_after_s:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(retry)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def fail(context: grpc.ServicerContext, error: ShardlossError, *metadata: tuple[str, str]) -> None:
    """End a call with an error's status, next to other trailing metadata; always raises, as grpc's abort does."""
    status = status_of(error)
    context.set_trailing_metadata((*metadata, (DETAILS_KEY, status.SerializeToString())))
    context.abort(getattr(grpc.StatusCode, error.status), status.message)
