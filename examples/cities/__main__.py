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
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="examples.cities", description="Find a city by any spelling of its name.")
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train through a service, evaluate, answer misspelt names")
    train.add_argument(
        "--address",
        default=os.environ.get("SHARDLOSS_ADDRESS"),
        help="train through the service that is there; default: SHARDLOSS_ADDRESS, or else a service of its own",
    )
    train.add_argument("--full", action="store_true", help="evaluate on every held-out name")
    train.add_argument("--small", action="store_true", help="2,000 cities, few steps: a smoke test")
    train.add_argument("--seed", type=at_least(0), default=0)
    train.add_argument("--steps", type=at_least(1), help="steps to train")
    train.add_argument("--train-seconds", type=float, help="train for at most so long")
    train.add_argument("--eval-names", type=at_least(1), help="held-out names to evaluate")
    ask = commands.add_parser("ask", help="the best places of a name, from the model that train left")
    ask.add_argument("name")
    for command in (train, ask):
        command.add_argument("--out", type=Path, default=OUT, help="where files go and come from")
    return top


def at_least(minimum: int) -> Callable[[str], int]:
    """A type of option: whole numbers from minimum on."""

    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of the train command."""
    settings = replace(Settings(), seed=options.seed)
    if options.small:
        settings = small(settings)
    given = {"num_steps": options.steps, "max_train_s": options.train_seconds, "num_eval": options.eval_names}
    settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
    return replace(settings, num_eval=None) if options.full else settings


def terminate(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the program as an exception does, so that the service is stopped."""
    sys.exit(128 + signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 130 after Ctrl-C, with everything it started ended."""
    options = parser().parse_args(arguments)
    console = Console(markup=False, emoji=False)  # names stand as they are written, brackets and colons too
    signal.signal(signal.SIGTERM, terminate)
    try:
        return train(options, console) if options.command == "train" else ask(options, console)
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has ended")
        return INTERRUPTED


def train(options: argparse.Namespace, console: Console) -> int:
    """The train command."""
    from examples.cities import demo, service

    try:
        demo.run(settings_of(options), options.out, console, options.address)
    except (service.ServiceFailed, shardloss.ShardlossError) as error:
        console.print(f"{error}", style="red")
        return 1
    return 0


def ask(options: argparse.Namespace, console: Console) -> int:
    """The ask command."""
    from examples.cities import demo

    if not normalised(options.name):
        console.print('no name was given: make demo-ask NAME="Koeln"')
        return 2
    if not (options.out / demo.MODEL).exists():
        console.print(f"{options.out / demo.MODEL} is not there: run `make demo` first")
        return 1
    demo.answer(options.name, options.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
