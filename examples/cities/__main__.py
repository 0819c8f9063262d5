"""Command line: python -m examples.cities train [--full] | ask NAME."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import shardloss
from rich.console import Console

from examples.cities.names import normalised
from examples.cities.settings import Settings, small

INTERRUPTED = 128 + signal.SIGINT
OUT = Path("build/demo")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the commands and their options."""
    top = argparse.ArgumentParser(prog="examples.cities", description="Find a city by any spelling of its name.")
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train through a service, evaluate, and answer misspelt names")
    train.add_argument(
        "--address",
        default=os.environ.get("SHARDLOSS_ADDRESS"),
        help="address of a running service; default: SHARDLOSS_ADDRESS, or else the demo starts its own service",
    )
    train.add_argument("--full", action="store_true", help="evaluate on every held-out name")
    train.add_argument("--small", action="store_true", help="2,000 cities, few steps: a smoke test")
    train.add_argument("--seed", type=at_least(0), default=0)
    train.add_argument("--steps", type=at_least(1), help="steps to train")
    train.add_argument("--train-seconds", type=float, help="train for at most this many seconds")
    train.add_argument("--eval-names", type=at_least(1), help="held-out names to evaluate")
    ask = commands.add_parser("ask", help="show the best places for a name, using the model that train saved")
    ask.add_argument("name")
    for command in (train, ask):
        command.add_argument("--out", type=Path, default=OUT, help="directory to write files to and read them from")
    return top


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an option type that accepts whole numbers of at least minimum."""

    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of the train command."""
    settings = replace(Settings(), seed=options.seed)
    if options.small:
        settings = small(settings)
    given = {"num_steps": options.steps, "max_train_s": options.train_seconds, "num_eval": options.eval_names}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    return replace(settings, num_eval=None) if options.full else settings


def terminate(_number: int, _frame: FrameType | None) -> None:
    """Handle SIGTERM by raising SystemExit, so that the service is stopped."""
    sys.exit(128 + signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 130 after Ctrl-C, when all processes that it started have ended."""
    options = parser().parse_args(arguments)
    console = Console(markup=False, emoji=False)  # names are printed verbatim, with brackets and colons
    signal.signal(signal.SIGTERM, terminate)
    try:
        return train(options, console) if options.command == "train" else ask(options, console)
    except KeyboardInterrupt:
        console.print("interrupted; all processes that were started have ended")
        return INTERRUPTED


def train(options: argparse.Namespace, console: Console) -> int:
    """Run the train command and return its exit status."""
    from examples.cities import demo, service

    try:
        demo.run(settings_of(options), options.out, console, options.address)
    except (service.ServiceFailed, shardloss.ShardlossError) as error:
        console.print(f"{error}", style="red")
        return 1
    return 0


def ask(options: argparse.Namespace, console: Console) -> int:
    """Run the ask command and return its exit status."""
    from examples.cities import demo

    if not normalised(options.name):
        console.print('no name was given: run make demo-ask NAME="Koeln"')
        return 2
    if not (options.out / demo.MODEL).exists():
        console.print(f"{options.out / demo.MODEL} does not exist: run `make demo` first")
        return 1
    demo.answer(options.name, options.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
