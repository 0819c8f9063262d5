"""Log lines as text or JSON, in one format for everything that this process logs, with the call they belong to.

Every line is logged through the standard library; a line's fields other than the message are passed in `extra`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

# Returns the fields that the current call adds to each line.
CALL: ContextVar[Callable[[], Mapping[str, object]] | None] = ContextVar("call", default=None)


def with_call(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Add the fields of the current call to a line, except those that the line already has."""
    describe = CALL.get()
    return line if describe is None else {**describe(), **line}


def without_others(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Drop the fields that a library such as Ray adds to every record for its own use."""
    return {name: value for name, value in line.items() if not name.startswith("_ray")}


PROCESSORS: tuple[Processor, ...] = (
    structlog.stdlib.ExtraAdder(),
    without_others,
    with_call,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
)


def formatter(log_format: Literal["text", "json"]) -> logging.Formatter:
    """Return a formatter that writes one line per record: text for people, or a JSON object."""
    last: list[Processor]
    if log_format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.EventRenamer("message")]
        last.append(structlog.processors.JSONRenderer(default=str))
    else:
        last = [structlog.dev.ConsoleRenderer(colors=False, timestamp_key="time", pad_event_to=0)]
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=PROCESSORS, processors=[drop, *last])


def configure(log_format: Literal["text", "json"], level: str, stream: TextIO | None = None) -> logging.Handler:
    """Make the root logger write in this format, by default to stderr, and return its handler."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    return handler
