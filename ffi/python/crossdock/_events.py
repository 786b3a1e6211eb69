"""What a node tells, and who waits for it: threads, and coroutines of any number of event loops.

The library tells each event once, by one descriptor. Whoever takes events here wakes the coroutines that wait for the
room or the peer; these then ask the room itself, so that none depends on who took its event. Coroutines have one reader
for each loop. A thread that waits does so in the library, and takes the events meanwhile: the readers rest so long.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Tuple, TypeVar, Union

from ._abi import OK, TIMED_OUT, check, failure, ffi, forked, lib, process, waited
from .errors import BadArgument, Stopped
from .kinds import EventKind

_MOST = 64
_node_poll, _node_wait = lib.crossdock_node_poll, lib.crossdock_node_wait

Loop = asyncio.AbstractEventLoop
Waiter = Tuple[Loop, "asyncio.Future[None]"]
Told = TypeVar("Told")
# Not the room itself, which nobody else may hold any more.
News = Tuple[Union[EventKind, int], "weakref.ref[Subject]"]


class Event(NamedTuple):
    """What has happened."""

    kind: Union[EventKind, int]
    """A later library may tell other kinds."""
    subject: Any
    """The room, or the peer."""


class Subject:
    """Something that coroutines wait for."""

    __slots__ = ("_handle", "_waiters", "_is_closed", "__weakref__")

    _handle: int
    _waiters: Optional[List[Waiter]]
    _is_closed: bool


class _Reader:
    """Listens in one loop. It has a descriptor of its own, so that the loop never holds one that the node has closed."""

    def __init__(self, events: Events, loop: Loop, descriptor: int) -> None:
        self.loop = loop
        self.waiting = 0
        self.is_listening = False
        self._events = weakref.ref(events)
        self._descriptor = -1
        self._descriptor = os.dup(descriptor)

    def listen(self) -> None:
        """To be called in its loop, as all but the constructor."""
        if self._descriptor >= 0 and not self.is_listening:
            self.loop.add_reader(self._descriptor, self._is_readable)
            self.is_listening = True

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def rest(self) -> None:
        if self.is_listening:
            self.is_listening = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self._descriptor)

    def close(self) -> None:
        self.rest()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _is_readable(self) -> None:
        events = self._events()
        if events is None:
            self.close()
        else:
            events.readable(self)


class Events(Subject):
    """Of one node."""

    __slots__ = (
        "_pid",
        "lock",
        "_backlog",
        "_readers",
        "_blocked",
        "_buffer",
        "_count",
        "_descriptor",
        "rooms",
        "peers",
    )

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._pid = process.pid
        self._waiters = None
        # Entered again where the collector closes something while it is held.
        self.lock = threading.RLock()
        # What a reader has taken.
        self._backlog: Deque[News] = deque()
        self._readers: Dict[Loop, _Reader] = {}
        # Threads that wait in the library.
        self._blocked = 0
        self._is_closed = False
        self._buffer = ffi.new("crossdock_event[]", _MOST)
        self._count = ffi.new("size_t *")
        self._descriptor = -1
        # By what the library is told as user data; by handle.
        self.rooms: Dict[int, weakref.ref[Subject]] = {}
        self.peers: Dict[int, weakref.ref[Subject]] = {}

    def descriptor(self) -> int:
        """The node's own: readable while there are events that nobody has taken."""
        if self._is_closed:
            raise Stopped("the node is closed", "open a new node", 8)
        if self._descriptor < 0:
            fd = ffi.new("int32_t *")
            check(lib.crossdock_node_event_fd(self._handle, fd))
            self._descriptor = fd[0]
        return self._descriptor

    def take(self, most: int) -> List[Event]:
        """Those that have happened, oldest first."""
        if self._pid != process.pid:
            raise forked(self)
        if most < 1:
            raise BadArgument(f"at most {most} events", "", 3)
        with self.lock:
            if not self._backlog:
                news = self._poll(most, None)
                return _events(news) if news else []
            news = [self._backlog.popleft() for _ in range(min(most, len(self._backlog)))]
            if len(news) < most:
                news += self._poll(most - len(news), None)
            return _events(news)

    def wait(self, most: int, timeout: Optional[float]) -> List[Event]:
        """As `take`, and waits for the first one."""
        with self.lock:
            taken = self.take(most)
            if taken:
                return taken
            self._blocked += 1
        capacity = min(most, _MOST)
        buffer, count = ffi.new("crossdock_event[]", capacity), ffi.new("size_t *")
        told: List[Event] = []
        try:
            while not told:
                waited(
                    self._wait_slice,
                    self._handle,
                    buffer,
                    capacity,
                    count,
                    timeout=timeout,
                    what="nothing has happened",
                )
                with self.lock:
                    told = _events(self._told(buffer, count[0], None))
        finally:
            with self.lock:
                self._blocked -= 1
                if not self._blocked:
                    self._wake_readers()
        return told

    def _wait_slice(self, handle: int, timeout_ms: int, buffer: Any, capacity: int, count: Any) -> int:
        status: int = _node_wait(handle, timeout_ms, buffer, capacity, count)
        if status == TIMED_OUT and self._is_closed:
            raise Stopped("the node was closed", "open a new node", 8)
        return status

    def _poll(self, most: int, here: Optional[Loop]) -> List[News]:
        if self._is_closed:
            raise Stopped("the node is closed", "open a new node", 8)
        status = _node_poll(self._handle, self._buffer, most if most < _MOST else _MOST, self._count)
        if status != OK:
            raise failure(status)
        count = self._count[0]
        return self._told(self._buffer, count, here) if count else []

    def _told(self, buffer: Any, count: int, here: Optional[Loop]) -> List[News]:
        """Under the lock. Wakes who waits for these; those that are closed meanwhile are passed over."""
        told: List[News] = []
        for at in range(count):
            event = buffer[at]
            kind = event.kind
            if kind == EventKind.PEER:
                found = self.peers.get(event.handle)
            else:
                found = self.rooms.get(event.user_data)
            subject = found() if found is not None else None
            if found is not None and subject is not None:
                # The call that opened a room may not have returned yet.
                subject._handle = event.handle
                told.append((EventKind(kind) if kind in _KINDS else kind, found))
                wake(subject, here)
        return told

    async def until(self, subject: Subject, ready: Callable[[], Optional[Told]]) -> Told:
        """What `ready` tells, which is asked whenever the subject has news."""
        if self._pid != process.pid:
            raise forked(self)
        found = ready()
        if found is not None:
            return found
        loop = asyncio.get_running_loop()
        while True:
            waiter = (loop, loop.create_future())
            reader = self._begin(subject, waiter)
            try:
                # What happens from now on is heard.
                found = ready()
                if found is not None:
                    return found
                await waiter[1]
            finally:
                self._end(subject, waiter, reader)

    async def until_some(self, most: int) -> List[Event]:
        """As `wait`, for coroutines."""
        return await self.until(self, lambda: self.take(most) or None)

    def _begin(self, subject: Subject, waiter: Waiter) -> Optional[_Reader]:
        with self.lock:
            if subject._waiters is None:
                subject._waiters = []
            subject._waiters.append(waiter)
            if self._is_closed:
                # Rooms that are still ending are told of by `close`.
                return None
            loop = waiter[0]
            reader = self._readers.get(loop)
            if reader is None:
                self._forget_closed_loops()
                reader = self._readers[loop] = _Reader(self, loop, self.descriptor())
            reader.waiting += 1
            if not self._blocked:
                reader.listen()
            return reader

    def _end(self, subject: Subject, waiter: Waiter, reader: Optional[_Reader]) -> None:
        with self.lock:
            if reader is not None:
                reader.waiting -= 1
            if subject._waiters and waiter in subject._waiters:
                subject._waiters.remove(waiter)

    def readable(self, reader: _Reader) -> None:
        """Called in the reader's loop."""
        with self.lock:
            if self._is_closed or self._blocked or not reader.waiting:
                # Who waits for it elsewhere takes it, or whoever comes next.
                reader.rest()
                return
            self._backlog.extend(self._poll(_MOST, reader.loop))
            if len(self._backlog) > 4 * (len(self.rooms) + _MOST):
                # Nobody takes events here: what is closed has nothing more to tell.
                self._backlog = deque(news for news in self._backlog if _is_open(news))
            if self._backlog:
                wake(self, reader.loop)

    def _wake_readers(self) -> None:
        for reader in list(self._readers.values()):
            if reader.waiting:
                self._call_in(reader, self._listen_again)

    def _listen_again(self, reader: _Reader) -> None:
        with self.lock:
            if not self._is_closed and not self._blocked and reader.waiting:
                reader.listen()

    def _call_in(self, reader: _Reader, act: Callable[[_Reader], None]) -> None:
        try:
            reader.loop.call_soon_threadsafe(act, reader)
        except RuntimeError:
            # The loop is closed, and nobody waits in it.
            self._readers.pop(reader.loop, None)
            reader.close()

    def _forget_closed_loops(self) -> None:
        for loop in [loop for loop in self._readers if loop.is_closed()]:
            self._readers.pop(loop).close()

    def closing(self) -> None:
        """Before the node is closed."""
        with self.lock:
            self._is_closed = True

    def closed(self) -> None:
        """After it was: its rooms have ended, and the readers have nothing more to hear."""
        with self.lock:
            for reader in list(self._readers.values()):
                self._call_in(reader, _Reader.close)
            self._readers.clear()
            for found in list(self.rooms.values()) + list(self.peers.values()):
                subject = found()
                if subject is not None:
                    wake(subject, None)
            wake(self, None)

    def wake_waiters_of(self, subject: Subject) -> None:
        """It was closed: who waits for it finds that out."""
        if subject._waiters:
            with self.lock:
                wake(subject, None)


_KINDS = frozenset(int(kind) for kind in EventKind)


def _is_open(news: News) -> bool:
    subject = news[1]()
    return subject is not None and not subject._is_closed


def _events(news: List[News]) -> List[Event]:
    found = [(kind, subject()) for kind, subject in news]
    return [Event(kind, subject) for kind, subject in found if subject is not None and not subject._is_closed]


def wake(subject: Subject, here: Optional[Loop]) -> None:
    """Under the lock. `here` is the loop that runs this."""
    waiters, subject._waiters = subject._waiters, None
    for loop, future in waiters or ():
        if loop is here:
            _answer(future)
            continue
        try:
            loop.call_soon_threadsafe(_answer, future)
        except RuntimeError:
            # The loop is closed, and nobody waits in it.
            pass


def _answer(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
