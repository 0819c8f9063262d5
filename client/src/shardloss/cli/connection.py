"""The connection options that all commands share: addresses, credentials and timeout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import shardloss
from shardloss import LossClient
from shardloss.client import WAIT_S

PANEL = "Connection"
Address = Annotated[
    str, typer.Option(envvar="SHARDLOSS_ADDRESS", rich_help_panel=PANEL, help="The server: HOST:PORT or unix:PATH.")
]
AdminAddress = Annotated[
    str,
    typer.Option(envvar="SHARDLOSS_ADMIN_ADDRESS", rich_help_panel=PANEL, help="The server's admin port: HOST:PORT."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(envvar="SHARDLOSS_TOKEN_FILE", rich_help_panel=PANEL, help="File that contains only the token."),
]
Tls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="SHARDLOSS_TLS",
        rich_help_panel=PANEL,
        help="Use TLS with the system's root certificates. --ca-file also turns TLS on.",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        envvar="SHARDLOSS_CA_FILE",
        rich_help_panel=PANEL,
        help="PEM file of the CA that signed the server's certificate. Turns TLS on.",
    ),
]
ClientCertFile = Annotated[
    Path | None,
    typer.Option(
        envvar="SHARDLOSS_CLIENT_CERT_FILE",
        rich_help_panel=PANEL,
        help="PEM file of this client's certificate, for mutual TLS.",
    ),
]
ClientKeyFile = Annotated[
    Path | None,
    typer.Option(
        envvar="SHARDLOSS_CLIENT_KEY_FILE", rich_help_panel=PANEL, help="PEM file of the client certificate's key."
    ),
]
AllowPlaintextToken = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext-token",
        envvar="SHARDLOSS_ALLOW_PLAINTEXT_TOKEN",
        rich_help_panel=PANEL,
        help="Send the token to another machine without TLS. Others on the network may read it.",
    ),
]
TimeoutS = Annotated[float, typer.Option(min=0.1, rich_help_panel=PANEL, help="Timeout of a request in seconds.")]

WaitS = Annotated[
    float, typer.Option(min=0.1, rich_help_panel=PANEL, help="Seconds to wait for a server that is still starting.")
]


@dataclass(frozen=True, slots=True)
class Connection:
    """The connection options of one command."""

    address: Address = "127.0.0.1:7070"
    admin_address: AdminAddress = "127.0.0.1:7071"
    token_file: TokenFile = None
    tls: Tls = False
    ca_file: CaFile = None
    client_cert_file: ClientCertFile = None
    client_key_file: ClientKeyFile = None
    allow_plaintext_token: AllowPlaintextToken = False
    timeout_s: TimeoutS = 60.0
    wait_s: WaitS = WAIT_S

    def connect(self, *, admin: bool = False, timeout_s: float | None = None) -> LossClient:
        """Return a client of the data port, or of the admin port.

        Raises:
            ShardlossError: the same errors as `shardloss.connect`.
        """
        address = self.admin_address if admin else self.address
        return shardloss.connect(
            address,
            timeout_s=timeout_s or self.timeout_s,
            wait_s=self.wait_s,
            token_file=self.token_file,
            tls=self.tls,
            ca_file=self.ca_file,
            client_cert_file=self.client_cert_file,
            client_key_file=self.client_key_file,
            allow_plaintext_token=self.allow_plaintext_token,
        )
