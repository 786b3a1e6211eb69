"""Hand-overs: pages from a prefill worker's memory into a decode worker's."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Generator, Optional, TypeVar, Union

from ._abi import (
    NULL,
    OK,
    PENDING,
    TIMED_OUT,
    check,
    check_closed,
    failure,
    ffi,
    forked,
    lib,
    made,
    process,
    told_text,
    waited,
)
from ._events import Subject
from ._requests import PageList, list_of
from .errors import BadArgument, NotDelivered
from .kinds import By, Outcome, Stage
from .layout import run_of
from .pool import Pages

if TYPE_CHECKING:
    from .node import Node

_poll, _wait = lib.crossdock_room_poll, lib.crossdock_room_wait
_add_pages = lib.crossdock_room_add_pages
_send_layers, _send_tokens = lib.crossdock_room_send_layers, lib.crossdock_room_send_tokens
_finish, _close, _wait_pages = lib.crossdock_room_finish, lib.crossdock_room_close, lib.crossdock_room_wait_pages
_message, _advice = lib.crossdock_room_message, lib.crossdock_room_advice
_peer, _port = lib.crossdock_room_peer, lib.crossdock_room_port
_ABANDONED: int = lib.CROSSDOCK_ABANDONED

# What the library is told as a room's user data. A room is known by it before it can have an event.
_keys = count(1)

Self = TypeVar("Self", bound="Room")


@dataclass
class End:
    """How a room ended on this side."""

    __slots__ = ("outcome", "by", "stage", "is_retryable", "message", "advice", "aux", "peer", "port")

    outcome: Outcome
    by: Optional[By]
    """Who decided it; `None` where nobody did."""
    stage: Optional[Stage]
    """How far the room had come, where the outcome has one."""
    is_retryable: bool
    """Whether the same request may succeed in another room."""
    message: str
    """In words, with peer and port: for logs."""
    advice: str
    """What a person can do about it."""
    aux: bytes
    """What the prefill side sent beside the pages, of a room that received and was delivered."""
    peer: str
    """The peer's name; empty if the room had come to no session. Of a room between several ranks, that of the peer that its
    end is about."""
    port: str
    """The port between the two sides; empty if the room had come to no session."""

    @property
    def is_delivered(self) -> bool:
        """Whether all bytes are in the decode side's pages."""
        return self.outcome == Outcome.DELIVERED

    def check(self) -> End:
        """This end, if it is delivered; raises `NotDelivered` otherwise."""
        if self.outcome != Outcome.DELIVERED:
            raise NotDelivered(self.message, self.advice, 0, self.is_retryable)
        return self


class Room(Subject):
    """One hand-over, seen from one side. `await room` waits for its end.

    A room is closed when it is not needed any more: at the end of a `with` block, or by `close`. One that has not ended is
    cancelled then, also where the last reference to it is dropped.
    """

    __slots__ = ("_pid", "_node", "_key", "_end", "number", "tag")

    def __init__(self, node: Node, number: int, tag: object) -> None:
        """For the node, which asks the library for it then."""
        self._is_closed = False
        self._pid = process.pid
        self._node = node
        self._end: Optional[End] = None
        self._waiters = None
        self.number = number
        """The router's number for the request."""
        self.tag = tag
        """Whatever the caller gave it."""
        self._key = key = next(_keys)
        self._handle = 0
        node._events.rooms[key] = weakref.ref(self)

    def __repr__(self) -> str:
        state = self._end.outcome.name.lower() if self._end is not None else "closed" if self._is_closed else "open"
        return f"<{type(self).__name__} {self.number} of {self._node.name!r}, {state}>"

    def poll(self) -> Optional[End]:
        """How the room ended, or `None` if it has not."""
        if self._end is not None:
            return self._end
        if self._pid != process.pid:
            raise forked(self)
        status = _poll(self._handle, NULL)
        if status == PENDING:
            return None
        if status != OK:
            raise failure(status)
        return self._ended()

    @property
    def end(self) -> Optional[End]:
        """As `poll`."""
        return self.poll()

    def wait(self, timeout: Optional[float] = None) -> End:
        """How the room ends, within so many seconds; it does by its deadline."""
        if self._end is not None:
            return self._end
        if self._pid != process.pid:
            raise forked(self)
        waited(_wait, self._handle, NULL, timeout=timeout, what=f"room {self.number} has not ended")
        return self._ended()

    def __await__(self) -> Generator[Any, None, End]:
        return self._node._events.until(self, self.poll).__await__()

    def _ended(self) -> End:
        handle, end = self._handle, made("crossdock_end")
        check(_poll(handle, end))
        aux = b""
        if end.aux_bytes:
            buffer = ffi.new("uint8_t[]", end.aux_bytes)
            check(lib.crossdock_room_aux(handle, buffer, end.aux_bytes, NULL))
            aux = bytes(ffi.buffer(buffer))
        self._end = told = End(
            Outcome(end.outcome),
            By(end.by) if end.by else None,
            Stage(end.stage) if end.stage else None,
            bool(end.is_retryable),
            told_text(_message, handle),
            told_text(_advice, handle),
            aux,
            told_text(_peer, handle),
            told_text(_port, handle),
        )
        return told

    def cancel(self) -> None:
        """Ends the room here. Its end is told as ever; pages of a room that receives come home when the peer has
        stopped."""
        if self._pid != process.pid:
            raise forked(self)
        check(lib.crossdock_room_cancel(self._handle))

    def close(self) -> None:
        """Forgets the room; one that has not ended is cancelled. Pages that nobody has taken go back to their pool when
        they come home."""
        if not self._is_closed:
            if self._pid != process.pid:
                raise forked(self)
            self._release()
            self._node._events.wake_waiters_of(self)

    def _release(self) -> None:
        self._is_closed = True
        self._node._events.rooms.pop(self._key, None)
        check_closed(_close(self._handle))

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._is_closed:
            self._node._events.rooms.pop(self._key, None)
        elif self._pid == process.pid:
            if self._end is None and _poll(self._handle, NULL) == PENDING:
                warnings.warn(f"room {self.number} was dropped, and so cancelled", ResourceWarning, source=self)
            self._release()


class Receiving(Room):
    """A room of the decode side."""

    __slots__ = ()

    def wait_pages(self, timeout: Optional[float] = None) -> None:
        """Waits until nobody else can write the room's pages: until then they must not be used for anything else. With 0
        it only asks. Raises `Abandoned` if they never come home."""
        if self._pid != process.pid:
            raise forked(self)
        what = f"the pages of room {self.number} have not come home"
        waited(_wait_pages, self._handle, timeout=timeout, what=what)

    @property
    def is_home(self) -> bool:
        """Whether nobody else can write the room's pages now. Neither waits nor raises where they are not home: `False`
        also where they never come home, which `wait_pages` tells."""
        if self._pid != process.pid:
            raise forked(self)
        status = _wait_pages(self._handle, 0)
        if status in (TIMED_OUT, _ABANDONED):
            return False
        check(status)
        return True

    async def pages_home(self) -> None:
        """As `wait_pages`, for coroutines."""
        await self._node._events.until(self, self._are_pages_home)

    def _are_pages_home(self) -> Optional[bool]:
        status = _wait_pages(self._handle, 0)
        if status == TIMED_OUT:
            return None
        check(status)
        return True

    def take_pages(self, list_number: int = 0) -> Pages:
        """The pages that were given as `Pages`, once they are home, for the pool of this number: the caller's again."""
        if self._pid != process.pid:
            raise forked(self)
        handle = ffi.new("crossdock_pages *")
        check(lib.crossdock_room_take_pages(self._handle, list_number, handle))
        return Pages(handle[0])

    @property
    def arrivals(self) -> int:
        """How many batches have landed in the current attempt: grows while the room moves."""
        if self._pid != process.pid:
            raise forked(self)
        arrivals = ffi.new("uint64_t *")
        check(lib.crossdock_room_arrivals(self._handle, arrivals))
        return int(arrivals[0])


class Sending(Room):
    """The prefill end of a push."""

    __slots__ = ()

    def add_pages(self, pages: PageList, *, pool: int = 0) -> None:
        """Appends to the pages of a pool, in a room that `Node.send_ahead` has opened: before their tokens are sent. Those of
        other pools than the first one are sent when the room is finished. More than the pool has are refused."""
        if self._pid != process.pid:
            raise forked(self)
        pools = self._node._pools
        if not 0 <= pool < len(pools):
            raise BadArgument(f"pages for pool {pool} of {len(pools)}", "number the pools as the layout does, from 0", 3)
        kept, address = list_of(pools[pool], pages)
        check(_add_pages(self._handle, pool, address))
        del kept

    def send(self, layers: Union[int, range], tokens: Optional[range] = None) -> None:
        """Sends these tokens of these layers, whose pages are filled: each layer's tokens in order, each once. All tokens
        of the request if left out."""
        if self._pid != process.pid:
            raise forked(self)
        first, number = run_of("layers", layers) if isinstance(layers, range) else (layers, 1)
        if tokens is None:
            status = _send_layers(self._handle, first, number)
        else:
            first_token, token_count = run_of("tokens", tokens)
            status = _send_tokens(self._handle, first, number, first_token, token_count)
        if status != OK:
            raise failure(status)

    def finish(self, aux: Any = b"") -> None:
        """Everything has been sent: the peer may rely on the pages once it has them all. `aux` (a buffer) travels with it:
        the first token, its probabilities."""
        if self._pid != process.pid:
            raise forked(self)
        bytes_of_aux = ffi.from_buffer("uint8_t[]", aux)
        check(_finish(self._handle, bytes_of_aux, len(bytes_of_aux)))


class Serving(Room):
    """The prefill end of a pull."""

    __slots__ = ()
