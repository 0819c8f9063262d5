"""Where a command connects, and as whom: one set of options for all commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import shardloss
from shardloss import LossClient

PANEL = "Connection"
Address = Annotated[
    str, typer.Option(envvar="SHARDLOSS_ADDRESS", rich_help_panel=PANEL, help="The server: HOST:PORT, or unix:PATH.")
]
AdminAddress = Annotated[
    str, typer.Option(envvar="SHARDLOSS_ADMIN_ADDRESS", rich_help_panel=PANEL, help="Its admin port: HOST:PORT.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(envvar="SHARDLOSS_TOKEN_FILE", rich_help_panel=PANEL, help="File that holds the token alone."),
]
Tls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="SHARDLOSS_TLS",
        rich_help_panel=PANEL,
        help="TLS with the system's roots; --ca-file says it too.",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(envvar="SHARDLOSS_CA_FILE", rich_help_panel=PANEL, help="PEM file of who signed the server: TLS."),
]
ClientCertFile = Annotated[
    Path | None,
    typer.Option(
        envvar="SHARDLOSS_CLIENT_CERT_FILE", rich_help_panel=PANEL, help="PEM certificate of this client: mutual TLS."
    ),
]
ClientKeyFile = Annotated[
    Path | None,
    typer.Option(envvar="SHARDLOSS_CLIENT_KEY_FILE", rich_help_panel=PANEL, help="PEM private key of that."),
]
AllowPlaintextToken = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext-token",
        envvar="SHARDLOSS_ALLOW_PLAINTEXT_TOKEN",
        rich_help_panel=PANEL,
        help="Send the token without TLS off this machine, where others may read it.",
    ),
]
TimeoutS = Annotated[float, typer.Option(min=0.1, rich_help_panel=PANEL, help="Seconds for a request.")]


@dataclass(frozen=True, slots=True)
class Connection:
    """The options of one command."""

    address: Address = "127.0.0.1:7070"
    admin_address: AdminAddress = "127.0.0.1:7071"
    token_file: TokenFile = None
    tls: Tls = False
    ca_file: CaFile = None
    client_cert_file: ClientCertFile = None
    client_key_file: ClientKeyFile = None
    allow_plaintext_token: AllowPlaintextToken = False
    timeout_s: TimeoutS = 60.0

    def connect(self, *, admin: bool = False, timeout_s: float | None = None) -> LossClient:
        """A client of the data port, or of the admin port.

        Raises:
            ShardlossError: as `shardloss.connect`.
        """
        address = self.admin_address if admin else self.address
        return shardloss.connect(
            address,
            timeout_s=timeout_s or self.timeout_s,
            token_file=self.token_file,
            tls=self.tls,
            ca_file=self.ca_file,
            client_cert_file=self.client_cert_file,
            client_key_file=self.client_key_file,
            allow_plaintext_token=self.allow_plaintext_token,
        )
