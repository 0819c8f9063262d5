"""The command line of shardloss-server."""

from __future__ import annotations

import sys
from typing import Any

import typer

from shardloss_server import __version__
from shardloss_server.cli import config, metrics, tokens
from shardloss_server.cli.doctor import doctor
from shardloss_server.cli.health import health
from shardloss_server.cli.serve import serve


class Commands(typer.core.TyperGroup):
    """The commands; one that cannot write its output, for instance to a full disk, says why in one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run one command."""
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.filename is not None:  # not of the output
                raise
            print(f"cannot write the output: {error.strerror}", file=sys.stderr)
            sys.exit(1)


app = typer.Typer(
    cls=Commands,
    help="Serve softmax losses over sharded class tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve)
app.command("health")(health)
app.command("doctor")(doctor)
app.add_typer(config.app, name="config")
app.add_typer(metrics.app, name="metrics")
app.add_typer(tokens.app, name="tokens")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


if __name__ == "__main__":
    app()
