"""When a room's end is told to the scheduler."""

from __future__ import annotations

import time
from typing import Optional

from ..kinds import By
from ..room import End

# The reason comes over another connection than the room's end.
_REASON_SECONDS = 1.0


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
