"""The platform's log in a simulation: no part of the story, except errors that are not ours."""

from __future__ import annotations

import sys
from typing import Any

import structlog

from corral.errors import CorralError


class Quiet:
    """While entered nothing is logged; yields the list of errors whose cause is an exception nobody expected."""

    def __init__(self) -> None:
        self._errors: list[str] = []
        self._before: dict[str, Any] = {}

    def __enter__(self) -> list[str]:
        self._before = structlog.get_config()
        structlog.configure(processors=[self._keep], cache_logger_on_first_use=False)
        return self._errors

    def __exit__(self, *_: object) -> None:
        structlog.configure(**self._before)

    def _keep(self, _logger: Any, method: str, event: Any) -> Any:
        cause = event.get("exc_info")
        if cause is True:
            cause = sys.exc_info()[1]
        if method in ("error", "exception") and isinstance(cause, Exception) and not isinstance(cause, CorralError):
            self._errors.append(f"{event.get('event')}: {cause!r}")
        raise structlog.DropEvent
