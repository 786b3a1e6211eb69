"""A transfer through its states, and the thread that sees to notifications nobody asks about."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, List, NamedTuple, Optional

from .. import errors
from ..endpoint import Endpoint, Transfer
from ._bindings import (
    nixlCancelledError,
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlNotPostedError,
    nixlRemoteDisconnectError,
    nixlRepostActiveError,
    nixlXferTelemetry,
)
from ._errors import translated
from ._frames import MESSAGE_BYTES
from ._memory import Memories
from ._notify import Notifier, Ticket
from ._remotes import Remote, Remotes

_log = logging.getLogger("crossdock.nixl")

OPERATIONS = ("READ", "WRITE")
# How long the thread waits for one transfer before it looks at the others.
_SLICES = (0.002, 0.02)


class Means(NamedTuple):
    """What all transfers of an agent share."""

    endpoint: Endpoint
    memories: Memories
    remotes: Remotes
    notifier: Notifier
    finisher: Finisher
    seconds: float
    """How long a transfer may take, and a second more for each GiB."""


class Blocks(NamedTuple):
    """`[count]` numbers each."""

    local: Any
    remote: Any
    lengths: Any


class Xfer:
    """One transfer. Its state is moved on by whoever asks, and by the finisher if it has a notification."""

    def __init__(self, means: Means, remote: Remote, operation: str, blocks: Blocks, message: bytes) -> None:
        if operation not in OPERATIONS:
            raise nixlInvalidParamError(f"operation {operation!r}: there are READ and WRITE")
        means.remotes.require_current(remote)
        self._means, self._remote, self._blocks = means, remote, blocks
        self._begin = means.endpoint.read if operation == "READ" else means.endpoint.write
        self._count, self._nbytes = len(blocks.lengths), int(blocks.lengths.sum())
        self._seconds = means.seconds + self._nbytes / 2**30
        self._what = f"{operation} of {self._count} descriptors, agent {remote.peer.name!r} at {remote.address}"
        self._set_message(message)
        self._lock = threading.Lock()
        self._transfer: Optional[Transfer] = None
        # What is being waited for beside the transfer: the notification's arrival.
        self._ticket: Optional[Ticket] = None
        self._state = ""
        self._error: Optional[Exception] = None
        self._posted = self._post_took = self._took = self._settle_by = 0.0

    def _set_message(self, message: bytes) -> None:
        if len(message) > MESSAGE_BYTES:
            raise nixlInvalidParamError(f"a notification of {len(message)} bytes; {MESSAGE_BYTES} are the most")
        self._message = message

    def post(self, message: bytes) -> str:
        with self._lock:
            if self._advance() == "PROC":
                raise nixlRepostActiveError(f"{self._what} is under way: it is posted again when it has ended")
            if self._error is not None:
                raise type(self._error)(f"{self._what} has failed, make it anew: {self._error}")
            self._means.remotes.require_current(self._remote)
            if message:
                self._set_message(message)
            begun = time.monotonic()
            try:
                self._transfer = self._begin(self._remote.address, *self._blocks, deadline=self._seconds)
            except errors.Error as error:
                # Nothing was begun: the same call may be made again.
                raise translated(error) from error
            self._state, self._posted, self._took = "PROC", begun, 0.0
            self._post_took = time.monotonic() - begun
            if self._message:
                self._means.finisher.add(self)
            return self._advance()

    def state(self) -> str:
        with self._lock:
            state = self._advance()
        if not state:
            raise nixlNotPostedError(f"{self._what} was never posted")
        return state

    def wait(self, seconds: float) -> bool:
        """For the finisher: waits for the bytes. Whether they are there, or never will be."""
        transfer = self._transfer
        if transfer is not None:
            try:
                transfer.wait(seconds)
            except errors.TimedOut:
                pass
            except errors.Error:
                # It was closed by whoever asked meanwhile, or has failed, which the next question finds.
                pass
        with self._lock:
            return self._advance() != "PROC" or self._ticket is not None

    def _advance(self) -> str:
        if self._state != "PROC":
            return self._state
        if self._ticket is not None:
            self._hear(self._ticket.outcome)
        elif self._error is None:
            self._look()
        if self._error is not None and self._state == "PROC":
            self._settle()
        return self._state

    def _look(self) -> None:
        assert self._transfer is not None
        try:
            if not self._transfer.poll():
                return
        except errors.Error as error:
            self._fail(translated(error))
            return
        self._took = time.monotonic() - self._posted
        self._transfer.close()
        self._transfer = None
        if not self._message:
            self._state = "DONE"
            return
        try:
            send = self._means.notifier.send
            self._ticket = send(self._remote.peer, self._message, self._seconds, is_reported=True)
        except (nixlCancelledError, nixlNotAllowedError) as error:
            self._fail(type(error)(f"the bytes are there, and the notification is not: {error}"))

    def _hear(self, outcome: Any) -> None:
        if outcome is None:
            return
        self._ticket = None
        if outcome is True:
            self._state = "DONE"
        else:
            self._fail(type(outcome)(f"the bytes are there, and the notification may be not: {outcome}"))

    def _fail(self, error: Exception) -> None:
        self._error = error
        if isinstance(error, nixlRemoteDisconnectError):
            self._means.remotes.lose(self._remote.peer)

    def _settle(self) -> None:
        """`ERR` is told when nothing of the transfer can touch this process's memory any more, because callers use it
        again; of a peer that stands still after as much time again, and then the handle is kept until it is so."""
        now = time.monotonic()
        if not self._settle_by:
            self._settle_by = now + self._seconds
        if not self._is_quiet():
            if now < self._settle_by:
                return
            assert self._error is not None
            self._error = type(self._error)(
                f"{self._error}; the peer may still touch this process's memory, until the handle can be released"
            )
        self._state = "ERR"
        _log.error("%s: %s", self._what, self._error)

    def _is_quiet(self) -> bool:
        if self._transfer is not None:
            try:
                self._transfer.wait_quiet(0)
            except errors.TimedOut:
                return False
            except errors.Error:
                # Nobody will ever know more.
                pass
            self._transfer.close()
            self._transfer = None
        return True

    def release(self) -> None:
        with self._lock:
            state = self._advance()
            if state == "PROC":
                raise nixlNotAllowedError(
                    f"{self._what} is under way and cannot be called back: release it when it has ended"
                )
            if state == "ERR" and not self._is_quiet():
                raise nixlNotAllowedError(
                    f"{self._what} has failed, and the peer may still touch this process's memory"
                )

    def telemetry(self) -> nixlXferTelemetry:
        with self._lock:
            if self._advance() != "DONE":
                raise nixlNotPostedError(f"{self._what} has not ended well")
            start, post, whole = (round(seconds * 1e6) for seconds in (self._posted, self._post_took, self._took))
            return nixlXferTelemetry(start, post, whole, self._nbytes, self._count)


class Finisher:
    """Sends the notifications of transfers whose callers do not ask how far they are."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: List[Xfer] = []
        self._thread: Optional[threading.Thread] = None
        self._is_closed = False

    def add(self, xfer: Xfer) -> None:
        with self._changed:
            self._waiting.append(xfer)
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="crossdock-nixl-finish", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def _run(self) -> None:
        seconds = _SLICES[0]
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
                waiting = list(self._waiting)
            # The first of them is waited for, the others are looked at.
            over = {id(xfer) for at, xfer in enumerate(waiting) if xfer.wait(0 if at else seconds)}
            seconds = _SLICES[0] if over else min(2 * seconds, _SLICES[1])
            with self._changed:
                # One that is over may have been posted again meanwhile, behind those.
                still = [xfer for xfer in waiting if id(xfer) not in over]
                self._waiting = still + self._waiting[len(waiting) :]
