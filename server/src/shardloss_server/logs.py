"""Log lines as text or JSON: all that this process logs comes out alike, with the call that it belongs to.

Every line is logged through the standard library; what a line holds beside its message comes in `extra`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

CALL: ContextVar[Callable[[], Mapping[str, object]] | None] = ContextVar("call", default=None)  # what to add to a line


def with_call(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Add what the present call says of itself, where the line does not say it."""
    describe = CALL.get()
    return line if describe is None else {**describe(), **line}


def without_others(_logger: object, _method: str, line: EventDict) -> EventDict:
    """Leave out what libraries put on every record for themselves, as Ray does."""
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
    """A line a record: for people, or one JSON object."""
    last: list[Processor]
    if log_format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.EventRenamer("message")]
        last.append(structlog.processors.JSONRenderer(default=str))
    else:
        last = [structlog.dev.ConsoleRenderer(colors=False, timestamp_key="time", pad_event_to=0)]
    drop = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=PROCESSORS, processors=[drop, *last])


def configure(log_format: Literal["text", "json"], level: str, stream: TextIO | None = None) -> logging.Handler:
    """Have the root logger write so from now on, to stderr; the handler that does."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(log_format))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    return handler
