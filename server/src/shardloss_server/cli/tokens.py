"""The commands `tokens create`, `init`, `list` and `revoke`, which manage the tokens of a server in files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from shardloss_server.access import token_files
from shardloss_server.access.grants import ROLES, BadTokens, Token, lasting
from shardloss_server.cli.output import Output, OutputOption, fail, show
from shardloss_server.settings import ALL

app = typer.Typer(no_args_is_help=True, help="Manage bearer tokens and their roles (docs/security.md).")
MOST_DAYS = 365_000  # a thousand years: dates end with the year 9999
TokensFile = Annotated[
    Path, typer.Option("--tokens-file", envvar=ALL["tokens_file"].variable, help=ALL["tokens_file"].meaning)
]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Unique name of the token in the log and in `tokens list`.")],
    role: Annotated[str, typer.Option(help=f"One of {', '.join(ROLES)}; each includes the ones before it.")],
    tokens_file: TokensFile,
    out: Annotated[Path, typer.Option(help="File to write the token to, for its client; must not exist.")],
    expires_days: Annotated[
        float | None, typer.Option(max=MOST_DAYS, help="Days until the token expires. Default: it never does.")
    ] = None,
) -> None:
    """Create a random token in a file of its own, and add its digest to the tokens file, which is created if absent."""
    with failing():
        if role not in ROLES:
            raise BadTokens(f"--role {role} must be one of {', '.join(ROLES)}")
        if expires_days is not None and not expires_days > 0:
            raise BadTokens(f"--expires-days {expires_days} must be above 0: the token would be refused from the start")
        expires = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
        token_files.create(tokens_file, out, name, ROLES[role], expires)
    typer.echo(f"token {name} ({role}, {until(expires)}) is in {out}; a server that reads {tokens_file} accepts it now")


@app.command()
def init(
    folder: Annotated[
        Path, typer.Option("--dir", help="Folder for tokens.toml and one ROLE.token per role; created if absent.")
    ],
) -> None:
    """Create one token per role, if the folder has no tokens.toml yet; a repeat changes nothing."""
    with failing():
        made = token_files.init(folder)
    typer.echo(
        f"created {', '.join(str(path) for path in made)}" if made else f"{folder} already has tokens: nothing to do"
    )


@app.command("list")
def list_tokens(tokens_file: TokensFile, output: OutputOption = Output.TEXT) -> None:
    """List the names, roles and expiry times in a tokens file; the tokens themselves are not in it."""
    with failing(output):
        tokens = token_files.read_grants(tokens_file).tokens
    if output is Output.JSON:
        typer.echo(json.dumps([as_json(token) for token in tokens], indent=1))
        return
    table = Table("name", "role", "expires")
    for token in tokens:
        table.add_row(token.name, token.role.word, until(token.expires))
    show(table)


@app.command()
def revoke(
    name: Annotated[str, typer.Option(help="The token's name.")],
    tokens_file: TokensFile,
) -> None:
    """Remove a token from a tokens file; a server that reads the file refuses the token within a second."""
    with failing():
        token_files.revoke(tokens_file, name)
    typer.echo(f"token {name} is revoked")


@contextmanager
def failing(output: Output = Output.TEXT) -> Iterator[None]:
    """Print an error of a tokens file in one line, and exit with status 1."""
    try:
        yield
    except BadTokens as error:
        fail(output, "BAD_TOKENS", str(error))
        raise typer.Exit(1) from None


def as_json(token: Token) -> dict[str, str | bool | None]:
    """Return a token as `--output json` shows it."""
    return {
        "name": token.name,
        "role": token.role.word,
        "expires": token.expires.isoformat() if token.expires else None,
        "expired": token.is_expired(datetime.now(UTC)),
    }


def until(expires: datetime | None) -> str:
    """Return the time until which a token is valid, as text."""
    if expires is None:
        return "for ever"
    when, left_s = f"{expires:%Y-%m-%d %H:%M} UTC", (expires - datetime.now(UTC)).total_seconds()
    return f"until {when}, in {lasting(left_s)}" if left_s > 0 else f"expired {when}, {lasting(left_s)} ago"
