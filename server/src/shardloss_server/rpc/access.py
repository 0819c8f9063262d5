"""Access control behind the gate: no byte of a call's message is read before its caller is known.

The interceptor runs once a call's metadata has arrived. A refusal is a streaming handler, which does not request a
message. A caller that is identified by certificate gets a streaming handler, too, since only a handler sees the
certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from shardloss.errors import InvalidArgument, PermissionDenied, Unauthenticated

from shardloss_server.access.gate import ANYONE, Caller, caller_by_certificate, caller_by_token, refuse_lower
from shardloss_server.access.grants import Grants
from shardloss_server.access.token_files import watched_grants
from shardloss_server.access.watched import Unreadable
from shardloss_server.config import CannotServe, Security
from shardloss_server.rpc.call import NO_MESSAGE, CallLog
from shardloss_server.rpc.roles import is_open, needed_role

AUTHORIZATION = "authorization"
NAMES = ("x509_common_name", "x509_subject_alternative_name")
Handler = Any  # grpc.RpcMethodHandler, whose attributes the stubs do not declare


class Access(grpc.ServerInterceptor):
    """An interceptor that refuses calls without credentials for the role that their method declares.

    Without a tokens file, every client that can connect is admin: on this machine, or by mutual TLS.
    """

    def __init__(self, security: Security, call_log: CallLog) -> None:
        """Read the tokens file; raises CannotServe if that fails."""
        try:
            self._grants = None if security.tokens_file is None else watched_grants(security.tokens_file)
        except Unreadable as error:
            raise CannotServe(str(error)) from None
        self._call_log = call_log
        self._is_mutual = security.tls_client_ca_file is not None

    def expiries(self) -> list[tuple[tuple[str, ...], float]]:
        """Return the expiry time of each token that expires, by name, in seconds since 1970."""
        tokens = () if self._grants is None else self._grants.value().tokens
        return [((token.name,), token.expires.timestamp()) for token in tokens if token.expires is not None]

    def intercept_service(self, continuation: Callable[[Any], Handler], handler_call_details: Any) -> Handler:
        """Return the method's handler, or one that refuses the call."""
        path = handler_call_details.method
        if is_open(path):
            return continuation(handler_call_details)
        grants = ANY if self._grants is None else self._grants.value()
        values = [value for key, value in handler_call_details.invocation_metadata if key == AUTHORIZATION]
        if self._is_mutual and grants.certificates and not values:
            return by_certificate(continuation(handler_call_details), grants, path, self._call_log)
        try:
            caller = ANYONE if self._grants is None else self._caller(values, grants)
            handler = continuation(handler_call_details)
            if handler is not None:  # else gRPC reports that the method does not exist
                refuse_lower(caller, needed_role(path), path)
        except (Unauthenticated, PermissionDenied) as error:
            return self._call_log.refusing(path, error)
        return handler

    def _caller(self, values: list[str], grants: Grants) -> Caller:
        """Return the caller by token; an unknown token is looked up again in the latest file, which may be newer."""
        try:
            return caller_by_token(values, grants)
        except Unauthenticated:
            if not values or self._grants is None or (latest := self._grants.latest()) is grants:
                raise
            return caller_by_token(values, latest)


ANY = Grants()


def by_certificate(handler: Handler, grants: Grants, path: str, call_log: CallLog) -> Handler:
    """Return a handler that checks the client's certificate before it requests the message."""
    if handler is None:
        return None
    behaviour = next(
        found
        for found in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
        if found is not None
    )

    def checked(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        refuse_by_certificate(context, grants, path, call_log)
        if handler.request_streaming:
            return behaviour(messages, context)
        message = next(messages, None)
        if message is None:
            call_log.refuse(path, context, InvalidArgument(NO_MESSAGE))
        return behaviour(message, context)

    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(checked, handler.request_deserializer, handler.response_serializer)


def refuse_by_certificate(context: grpc.ServicerContext, grants: Grants, path: str, call_log: CallLog) -> None:
    """End the call if the client's certificate does not permit it."""
    peer: Any = context.auth_context()
    names = {name.decode("utf-8", "replace") for key in NAMES for name in peer.get(key, ())}
    try:
        caller: Caller = caller_by_certificate(names, grants)
        refuse_lower(caller, needed_role(path), path)
    except (Unauthenticated, PermissionDenied) as error:
        call_log.refuse(path, context, error)
