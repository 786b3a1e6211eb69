"""When a room's end is told to the scheduler."""

from __future__ import annotations

import time
from typing import Any, Optional

from ..kinds import By
from ..room import End
from .hooks import conn

# The reason comes over another connection than the room's end.
_REASON_SECONDS = 1.0


def failure_of(room: int, reason: Optional[str]) -> Any:
    """What `failure_exception` raises, of a request that is cleared; without a reason another rank knows it."""
    return conn.KVTransferError(room, reason or "another rank has failed", is_from_another_rank=reason is None)


class Outcomes:
    """A room that the other side has ended waits a moment for the reason."""

    def __init__(self) -> None:
        self._since: Optional[float] = None

    def is_told(self, end: End) -> bool:
        if end.by != By.PEER:
            return True
        now = time.monotonic()
        if self._since is None:
            self._since = now
        return now - self._since >= _REASON_SECONDS
