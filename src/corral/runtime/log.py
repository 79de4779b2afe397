"""The daemon's log: one event a line, key=value for people or JSON for machines; never longer than 8 KiB a line."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

MAX_LINE = 8192


class Secret(str):
    """A string that prints itself as ``***``: keys and tokens are wrapped in it before they come near a log."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    __str__ = __repr__


def _bounded(_logger: Any, _method: str, event: Any) -> Any:
    return event if not isinstance(event, str) or len(event) <= MAX_LINE else event[: MAX_LINE - 1] + "…"


def setup(*, json: bool = False, verbose: bool = False) -> None:
    """Log to stderr. Call once, in a composition root."""
    render: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if json else structlog.processors.StackInfoRenderer(),
            render,
            _bounded,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
