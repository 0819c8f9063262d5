"""`health`: what a probe asks, for containers and scripts that have no probe of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SERVING = "SERVING"


def health(
    address: Annotated[str, typer.Option(help="Host and port of the server's admin port.")] = "127.0.0.1:7071",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds in which it must answer.")] = 3.0,
    ca_file: Annotated[
        Path | None, typer.Option(help="Where it speaks TLS: PEM of who signed its certificate.")
    ] = None,
    client_cert_file: Annotated[Path | None, typer.Option(help="Under mutual TLS: PEM of our certificate.")] = None,
    client_key_file: Annotated[Path | None, typer.Option(help="Under mutual TLS: PEM of our private key.")] = None,
) -> None:
    """Ask a server whether it serves; ends with 0 where it does, with 1 where not."""
    from shardloss_server.rpc.probe import Identity, health_of

    try:
        found = health_of(address, timeout_s, Identity(ca_file, client_cert_file, client_key_file))
    except OSError as error:
        found = f"a file cannot be read: {error}"
    typer.echo(f"{address}: {found}", err=found != SERVING)
    if found != SERVING:
        raise typer.Exit(1)
