"""The command `health`: a health probe for containers and scripts that have no probe of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SERVING = "SERVING"


def health(
    address: Annotated[str, typer.Option(help="host:port of the server's admin port.")] = "127.0.0.1:7071",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds within which the server must answer.")] = 3.0,
    ca_file: Annotated[
        Path | None, typer.Option(help="For TLS: PEM file with the CA that signed the server's certificate.")
    ] = None,
    client_cert_file: Annotated[
        Path | None, typer.Option(help="For mutual TLS: PEM file with the client's certificate.")
    ] = None,
    client_key_file: Annotated[
        Path | None, typer.Option(help="For mutual TLS: PEM file with the client's private key.")
    ] = None,
) -> None:
    """Check that a server is serving; the exit status is 0 if it is, and 1 if not."""
    from shardloss.credentials import Credentials
    from shardloss.errors import InvalidArgument

    from shardloss_server.rpc.probe import health_of

    files = {"ca_file": ca_file, "client_cert_file": client_cert_file, "client_key_file": client_key_file}
    credentials = Credentials(**files)  # type: ignore[arg-type]
    try:
        credentials.check(address)
        found = health_of(address, timeout_s, credentials)
    except InvalidArgument as error:
        found = error.message
    typer.echo(f"{address}: {found}", err=found != SERVING)
    if found != SERVING:
        raise typer.Exit(1)
