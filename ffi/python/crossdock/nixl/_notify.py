"""Notifications: small messages from agent to agent, over TCP beside the data.

The endpoint carries no messages, and an inbox in memory that peers write would need what writes by address do not give:
whoever sends would have to be known before, agree with the others on the next free place, and see that it was emptied.
A receiver often does not know its senders. TCP has order, back-pressure and an end that both sides see. On top of it:

- **After the data.** A message that belongs to a transfer is queued when all its bytes are there.
- **Exactly once.** Messages are numbered and kept until the receiver has said that they are in its inbox. After a
  broken connection it says which number it had last, and the rest is sent again.
- **Restarts.** Each agent draws 16 random bytes, and a sender says whom it means: another agent at the same address
  refuses. Whoever finds nobody or another one there need not try again.
- **Full inbox.** It takes `INBOX_MESSAGES` messages and `INBOX_BYTES`; then connections are not read, TCP holds the
  senders back, and their messages end with an error at their deadlines.
- **Networks.** Connections are tried again until a message's deadline, at most each second. One whose connection broke
  between its arrival and the acknowledgement may be there although its sender was told that it failed: no protocol can
  rule that out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future
from typing import Any, Awaitable, Callable, Deque, Dict, List, NamedTuple, Optional

from . import _frames
from ._bindings import (
    nixlBackendError,
    nixlCancelledError,
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlRemoteDisconnectError,
)
from ._frames import MESSAGE_BYTES, Codes, Stranger

_log = logging.getLogger("crossdock.nixl")

INBOX_MESSAGES = 1 << 16
INBOX_BYTES = 64 << 20
OUTBOX_MESSAGES = 1 << 14
OUTBOX_BYTES = 64 << 20
CONNECTIONS = 4096
HANDSHAKE_SECONDS = 5.0
RETRY_SECONDS = (0.05, 1.0)
IDLE_SECONDS = 60.0


class Peer(NamedTuple):
    """Whom a message is for."""

    name: str
    incarnation: bytes
    address: str


class Ticket:
    """A message that was queued. `outcome` is `None`, `True` when it is in the peer's inbox, or why it is not."""

    __slots__ = ("number", "message", "deadline", "is_reported", "is_written", "outcome", "timer")

    def __init__(self, message: bytes, deadline: float, is_reported: bool) -> None:
        self.number = 0
        self.message = message
        self.deadline = deadline
        # Whether somebody will ask for the outcome.
        self.is_reported = is_reported
        # To the connection that is there.
        self.is_written = False
        self.outcome: Any = None
        self.timer: Optional[asyncio.TimerHandle] = None


class Notifier:
    """An agent's inbox, and what it has to send. One thread moves everything."""

    def __init__(
        self,
        name: str,
        incarnation: bytes,
        host: str,
        key: Optional[bytes],
        gone: Callable[[Peer], None] = lambda peer: None,
    ) -> None:
        """`gone` is told, in the notifier's thread, when nobody or somebody else was found at a peer's address."""
        self.name, self.incarnation, self.key, self.gone = name, incarnation, key, gone
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # Entered again where the collector closes an agent while it is held.
        self.changed = threading.Condition(threading.RLock())
        self._inbox = _Inbox()
        # By whom they are for, as long as there is something to say.
        self._out: Dict[bytes, _Outbox] = {}
        self._last = 0
        # Connections of senders.
        self._guests: Dict[asyncio.Task[None], socket.socket] = {}
        self._is_closed = False
        self._pid = os.getpid()
        begun: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._run, args=(listener, begun), name="crossdock-nixl", daemon=True)
        self._thread.start()
        self._loop = begun.result(HANDSHAKE_SECONDS)

    def send(self, peer: Peer, message: bytes, seconds: float, *, is_reported: bool) -> Ticket:
        """Queues a message. What is not reported is logged if it fails, and refused where the peer was not to be
        reached a moment ago."""
        if len(message) > MESSAGE_BYTES:
            raise nixlInvalidParamError(f"a notification of {len(message)} bytes; {MESSAGE_BYTES} are the most")
        ticket = Ticket(message, time.monotonic() + seconds, is_reported)
        with self.changed:
            if self._is_closed:
                raise nixlCancelledError("the agent was closed")
            out = self._out.get(peer.incarnation)
            if out is None:
                out = self._out[peer.incarnation] = _Outbox(self, peer)
            # Of all messages: for each receiver they grow, also where it was forgotten and is known again.
            self._last += 1
            ticket.number = self._last
            out.admit(ticket)
            self._loop.call_soon_threadsafe(out.begin, ticket)
        return ticket

    def take(self) -> Dict[str, List[bytes]]:
        """All messages that have come, by the names of their senders, in order."""
        with self.changed:
            was_full = self._inbox.is_full()
            taken = self._inbox.take()
            if was_full and not self._is_closed:
                self._loop.call_soon_threadsafe(self._room.set)
        return taken

    def forget(self, peer: Peer) -> None:
        """Ends what is queued for a peer."""
        with self.changed:
            out = self._out.pop(peer.incarnation, None)
            if out is not None and not self._is_closed:
                reason = nixlCancelledError(f"the agent {peer.name!r} was removed")
                self._loop.call_soon_threadsafe(out.close, reason)

    def part(self, out: _Outbox) -> bool:
        """Whether an outbox is not needed any more."""
        with self.changed:
            if out.queued:
                return False
            if self._out.get(out.peer.incarnation) is out:
                del self._out[out.peer.incarnation]
            return True

    def close(self, seconds: float = 1.0) -> None:
        """Waits so long for what is queued, then ends."""
        if self._pid != os.getpid():
            return
        is_mine = threading.current_thread() is self._thread
        with self.changed:
            if not is_mine:
                self.changed.wait_for(lambda: self._is_closed or not self._has_hope(), seconds)
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._over.set)
        if not is_mine:
            self._thread.join(HANDSHAKE_SECONDS)

    def _has_hope(self) -> bool:
        return any(out.queued and not out.failed_at for out in self._out.values())

    # What follows is the thread's.

    def _run(self, listener: socket.socket, begun: Future[asyncio.AbstractEventLoop]) -> None:
        reason: Exception = nixlCancelledError("the agent was closed")
        try:
            asyncio.run(self._serve(listener, begun))
        except Exception as error:
            reason = nixlBackendError(f"notifications have ended: {error}")
            if not begun.done():
                begun.set_exception(reason)
            _log.exception("notifications have ended")
        with self.changed:
            self._is_closed = True
            for out in self._out.values():
                out.give_up(reason)
            self._out.clear()
        listener.close()

    async def _serve(self, listener: socket.socket, begun: Future[asyncio.AbstractEventLoop]) -> None:
        self._room, self._over = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        loop.add_reader(listener, self._accept, loop, listener)
        begun.set_result(loop)
        await self._over.wait()
        loop.remove_reader(listener)
        listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        while tasks:
            # More than once: before Python 3.12 `wait_for` may pass over it.
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=0.1)

    def _accept(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        try:
            end, where = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # There are no descriptors left, say: whoever waits there waits on.
            _log.error("a connection could not be accepted: %s", error)
            loop.remove_reader(listener)
            loop.call_later(RETRY_SECONDS[1], self._accept_again, loop, listener)
            return
        if len(self._guests) >= CONNECTIONS:
            _log.error("a connection of %s is refused: there are %d", where[0], CONNECTIONS)
            end.close()
            return
        end.setblocking(False)
        guest = loop.create_task(self._receive(end, where[0]))
        self._guests[guest] = end
        guest.add_done_callback(self._left)

    def _accept_again(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            loop.add_reader(listener, self._accept, loop, listener)

    def _left(self, guest: asyncio.Task[None]) -> None:
        self._guests.pop(guest).close()

    async def _receive(self, end: socket.socket, where: str) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=end)
            try:
                await self._take_from(reader, writer)
            finally:
                writer.transport.abort()
        except Stranger as error:
            _log.error("notifications from %s are refused: %s", where, error)
        except (OSError, EOFError, asyncio.TimeoutError):
            # The sender is gone, or has given up; if not, it comes again.
            pass

    async def _take_from(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _tune(writer)
        greeting = _frames.admit(reader, writer, self.key, self.incarnation, self._inbox.last_of)
        sender = await asyncio.wait_for(greeting, HANDSHAKE_SECONDS)
        while True:
            number, seconds, message = await _frames.read_frame(reader, writer, sender.codes)
            deadline = time.monotonic() + seconds
            while self._is_full():
                await asyncio.wait_for(self._room.wait(), deadline - time.monotonic())
            with self.changed:
                self._inbox.put(sender.name, sender.incarnation, number, message)
            writer.write(_frames.acknowledgement(sender.codes, number))
            await writer.drain()

    def _is_full(self) -> bool:
        with self.changed:
            is_full = self._inbox.is_full()
            if is_full:
                self._room.clear()
            return is_full


class _Inbox:
    """What has come, until it is taken. All under the notifier's lock."""

    def __init__(self) -> None:
        self._messages: Dict[str, List[bytes]] = {}
        self._count = self._bytes = 0
        # By the sender's incarnation: the last number that is here.
        self._last: OrderedDict[bytes, int] = OrderedDict()

    def is_full(self) -> bool:
        return self._count >= INBOX_MESSAGES or self._bytes >= INBOX_BYTES

    def take(self) -> Dict[str, List[bytes]]:
        taken, self._messages = self._messages, {}
        self._count = self._bytes = 0
        return taken

    def last_of(self, incarnation: bytes) -> int:
        return self._last.get(incarnation, 0)

    def put(self, sender: str, incarnation: bytes, number: int, message: bytes) -> None:
        if number <= self.last_of(incarnation):
            # It was sent again after a broken connection.
            return
        self._last[incarnation] = number
        self._last.move_to_end(incarnation)
        if len(self._last) > CONNECTIONS:
            self._last.popitem(last=False)
        self._messages.setdefault(sender, []).append(message)
        self._count += 1
        self._bytes += len(message)


class _Outbox:
    """What is on its way to one peer. Its task connects when there is something to say, and leaves when there was
    nothing for a while."""

    def __init__(self, notifier: Notifier, peer: Peer) -> None:
        self._notifier, self.peer = notifier, peer
        # These are under the notifier's lock. By number, which is their order.
        self.queued: Dict[int, Ticket] = {}
        self._bytes = 0
        self.failed_at = 0.0
        self._failure = ""
        # These are the thread's.
        self._unwritten: Deque[Ticket] = deque()
        self._news: Optional[asyncio.Event] = None
        self._task: Optional[asyncio.Task[None]] = None
        self._writer: Optional[asyncio.StreamWriter] = None

    def admit(self, ticket: Ticket) -> None:
        """Under the lock."""
        if not ticket.is_reported and self.failed_at and time.monotonic() < self.failed_at + RETRY_SECONDS[1]:
            raise nixlRemoteDisconnectError(f"{self.peer.name!r} at {self.peer.address}: {self._failure}")
        if len(self.queued) >= OUTBOX_MESSAGES or self._bytes + len(ticket.message) > OUTBOX_BYTES:
            raise nixlNotAllowedError(
                f"{len(self.queued)} notifications for {self.peer.name!r} are on their way already"
            )
        self._bytes += len(ticket.message)
        self.queued[ticket.number] = ticket

    def begin(self, ticket: Ticket) -> None:
        if ticket.outcome is not None:
            # It was given up with those before it.
            return
        loop = asyncio.get_running_loop()
        ticket.timer = loop.call_later(max(0.0, ticket.deadline - time.monotonic()), self._expire, ticket)
        # Those that were over before they could be written go: a peer that does not answer would have them pile up.
        while self._unwritten and self._unwritten[0].outcome is not None:
            self._unwritten.popleft()
        self._unwritten.append(ticket)
        if self._news is None:
            self._news = asyncio.Event()
            self._task = loop.create_task(self._run(self._news))
        self._news.set()

    def close(self, reason: Exception) -> None:
        self.give_up(reason)
        if self._task is not None:
            self._task.cancel()

    def give_up(self, reason: Exception) -> None:
        for ticket in list(self.queued.values()):
            self._end(ticket, reason)

    def _end(self, ticket: Ticket, outcome: Any) -> None:
        with self._notifier.changed:
            del self.queued[ticket.number]
            self._bytes -= len(ticket.message)
            ticket.outcome = outcome
            self._notifier.changed.notify_all()
        if ticket.timer is not None:
            ticket.timer.cancel()
        if outcome is not True and not ticket.is_reported:
            _log.error("a notification to %r is lost: %s", self.peer.name, outcome)

    def _expire(self, ticket: Ticket) -> None:
        why = self._failure or "it does not take any: its inbox is full, or it stands still"
        where = f"{self.peer.name!r} at {self.peer.address}"
        self._end(ticket, nixlRemoteDisconnectError(f"the notification did not reach {where} in time: {why}"))
        if ticket.is_written and self._writer is not None:
            # The connection may be a dead one.
            self._writer.transport.abort()

    async def _run(self, news: asyncio.Event) -> None:
        pause = RETRY_SECONDS[0]
        while True:
            news.clear()
            if not self.queued:
                try:
                    # Meanwhile it is remembered whether the peer could be reached.
                    await asyncio.wait_for(news.wait(), RETRY_SECONDS[1])
                except asyncio.TimeoutError:
                    if self._notifier.part(self):
                        return
                continue
            try:
                await self._connected(news)
            except (Stranger, ConnectionRefusedError) as error:
                # An agent listens as long as it lives: where nobody does, it is gone for good.
                why = str(error) if isinstance(error, Stranger) else "nobody listens there any more"
                self._fail(why)
                self.give_up(nixlRemoteDisconnectError(f"{self.peer.name!r} at {self.peer.address}: {why}"))
                self._notifier.gone(self.peer)
            except asyncio.TimeoutError:
                self._fail("it does not answer")
            except (OSError, EOFError) as error:
                if not self.failed_at:
                    # There was a connection, which may be had again at once.
                    pause = RETRY_SECONDS[0]
                number = getattr(error, "errno", None)
                self._fail(os.strerror(number) if number else "it closes the connection; its log may say why")
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS[1])

    async def _connected(self, news: asyncio.Event) -> None:
        host, _, port = self.peer.address.rpartition(":")
        opening = asyncio.open_connection(host.strip("[]"), int(port))
        reader, writer = await asyncio.wait_for(opening, HANDSHAKE_SECONDS)
        try:
            _tune(writer)
            me, whom = self._notifier, self.peer.incarnation
            greeting = _frames.introduce(reader, writer, me.key, me.name, me.incarnation, whom)
            codes, last = await asyncio.wait_for(greeting, HANDSHAKE_SECONDS)
            self._fail("")
            self._arrived(last)
            with me.changed:
                self._writer, self._unwritten = writer, deque(self.queued.values())
            for ticket in self._unwritten:
                ticket.is_written = False
            await _either(self._write(writer, codes, news), self._hear(reader, codes))
        finally:
            self._writer = None
            writer.transport.abort()

    async def _write(self, writer: asyncio.StreamWriter, codes: Codes, news: asyncio.Event) -> None:
        while True:
            news.clear()
            while self._unwritten:
                ticket = self._unwritten.popleft()
                # One may be there twice, where it came while there was no connection.
                if ticket.outcome is None and not ticket.is_written:
                    ticket.is_written = True
                    left = ticket.deadline - time.monotonic()
                    writer.write(_frames.frame(codes, ticket.number, left, ticket.message))
                    # If the peer does not read, the message's deadline ends this.
                    await writer.drain()
            try:
                await asyncio.wait_for(news.wait(), IDLE_SECONDS)
            except asyncio.TimeoutError:
                if not self.queued:
                    return

    async def _hear(self, reader: asyncio.StreamReader, codes: Codes) -> None:
        while True:
            self._arrived(await _frames.read_acknowledgement(reader, codes))

    def _arrived(self, number: int) -> None:
        """All messages until this one."""
        while True:
            with self._notifier.changed:
                first = next(iter(self.queued.values()), None)
            if first is None or first.number > number:
                return
            self._end(first, True)

    def _fail(self, why: str) -> None:
        with self._notifier.changed:
            self._failure, self.failed_at = why, time.monotonic() if why else 0.0
            self._notifier.changed.notify_all()


async def _either(*works: Awaitable[None]) -> None:
    """Until one of them is over; the other is ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _tune(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    # A peer whose machine is gone says nothing.
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
