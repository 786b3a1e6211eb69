"""Notifications: order, full inboxes, broken connections, strangers."""

from __future__ import annotations

import logging
import os
import socket
import time
import unittest
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

from support import TIMEOUT, Case, numpy

if numpy is None:
    raise unittest.SkipTest("crossdock.nixl needs NumPy")

from crossdock.nixl import _frames, _notify  # noqa: E402
from crossdock.nixl._bindings import (  # noqa: E402
    nixlCancelledError,
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlRemoteDisconnectError,
)
from crossdock.nixl._notify import Notifier, Peer, Ticket  # noqa: E402

KEY = b"a key of these tests alone"


def setUpModule() -> None:
    logging.getLogger("crossdock.nixl").setLevel(logging.CRITICAL)


def tearDownModule() -> None:
    logging.getLogger("crossdock.nixl").setLevel(logging.NOTSET)


class Notifications(Case):
    def notifier(self, name: str, key: Any = KEY, host: str = "127.0.0.1", **more: Any) -> Notifier:
        made = Notifier(name, os.urandom(16), host, key, **more)
        self.addCleanup(made.close, 0.0)
        return made

    def setUp(self) -> None:
        self.there = self.notifier("there")
        self.peer = Peer("there", self.there.incarnation, self.there.address)
        # Without a key.
        self.open = self.notifier("open", None)

    def until(self, condition: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        while not condition():
            self.assertLess(time.monotonic(), begun + TIMEOUT)
            time.sleep(0.001)
        return condition()

    def outcome(self, ticket: Ticket) -> Any:
        return self.until(lambda: ticket.outcome)

    def taken(self, count: int) -> Dict[str, List[bytes]]:
        """So many messages, as they come."""
        came: Dict[str, List[bytes]] = {}

        def is_all() -> bool:
            for name, messages in self.there.take().items():
                came.setdefault(name, []).extend(messages)
            return sum(map(len, came.values())) >= count

        self.until(is_all)
        return came

    def test_several_senders_each_in_order(self) -> None:
        senders = [self.notifier(f"sender {number}") for number in range(4)]
        for turn in range(200):
            for sender in senders:
                sender.send(self.peer, b"%d" % turn, 10, is_reported=False)
        came = self.taken(800)
        self.assertEqual(sorted(came), [sender.name for sender in senders])
        for messages in came.values():
            self.assertEqual(messages, [b"%d" % turn for turn in range(200)])

    def test_messages_of_any_size(self) -> None:
        here = self.notifier("here")
        messages = [b"", b"\0", os.urandom(_notify.MESSAGE_BYTES), os.urandom(70000), b"last"]
        tickets = [here.send(self.peer, message, 10, is_reported=True) for message in messages]
        self.assertEqual([self.outcome(ticket) for ticket in tickets], [True] * len(messages))
        self.assertEqual(self.there.take(), {"here": messages})
        with self.assertRaises(nixlInvalidParamError):
            here.send(self.peer, bytes(_notify.MESSAGE_BYTES + 1), 10, is_reported=True)

    def test_a_full_inbox_holds_senders_back(self) -> None:
        here, other = self.notifier("here"), self.notifier("other")
        with mock.patch.object(_notify, "INBOX_MESSAGES", 8):
            tickets = [here.send(self.peer, b"%d" % turn, 20, is_reported=True) for turn in range(50)]
            self.outcome(tickets[7])
            late = other.send(self.peer, b"too late", 0.2, is_reported=True)
            self.assertIsInstance(self.outcome(late), nixlRemoteDisconnectError)
            self.assertIn("full", str(late.outcome))
            self.assertIsNone(tickets[8].outcome)
            # The receiver has given it up too.
            self.until(lambda: len(self.there._guests) == 1)
            self.assertEqual(self.taken(50), {"here": [b"%d" % turn for turn in range(50)]})
        self.assertEqual([self.outcome(ticket) for ticket in tickets], [True] * 50)
        # Whoever was too late can send again.
        self.assertIs(self.outcome(other.send(self.peer, b"now", 10, is_reported=True)), True)
        self.assertEqual(self.there.take(), {"other": [b"now"]})

    def test_a_full_outbox_is_told(self) -> None:
        here = self.notifier("here")
        # It takes connections, and says nothing.
        silent = self.entered(socket.create_server(("127.0.0.1", 0)))
        nobody = Peer("nobody", os.urandom(16), "127.0.0.1:%d" % silent.getsockname()[1])
        with mock.patch.object(_notify, "HANDSHAKE_SECONDS", 0.1):
            with mock.patch.object(_notify, "OUTBOX_MESSAGES", 3):
                tickets = [here.send(nobody, b"x", 0.3, is_reported=True) for _ in range(3)]
                with self.assertRaises(nixlNotAllowedError):
                    here.send(nobody, b"x", 0.3, is_reported=True)
            with mock.patch.object(_notify, "OUTBOX_BYTES", 3):
                with self.assertRaises(nixlNotAllowedError):
                    here.send(nobody, b"x", 0.3, is_reported=True)
            for ticket in tickets:
                self.assertIsInstance(self.outcome(ticket), nixlRemoteDisconnectError)
                self.assertIn("does not answer", str(ticket.outcome))
            # It was not to be reached a moment ago.
            with self.assertRaises(nixlRemoteDisconnectError):
                here.send(nobody, b"x", 10, is_reported=False)
            # What was given up is not kept.
            for _ in range(20):
                self.outcome(here.send(nobody, b"x", 0.01, is_reported=True))
            self.assertLessEqual(len(here._out[nobody.incarnation]._unwritten), 1)

    def test_senders_while_a_peer_goes(self) -> None:
        here, made = self.notifier("here"), []
        for turn in range(300):
            made.append(here.send(self.peer, b"x", 20, is_reported=True))
            if turn == 150:
                self.there._loop.call_soon_threadsafe(self.there._over.set)
        outcomes = [self.outcome(ticket) for ticket in made]
        # Those that have come are the first, and each is told something once.
        came = outcomes.count(True)
        self.assertEqual(outcomes[:came], [True] * came)
        self.assertTrue(all(isinstance(outcome, nixlRemoteDisconnectError) for outcome in outcomes[came:]))
        # An acknowledgement may have gone with the peer.
        self.assertGreaterEqual(len(self.there.take().get("here", [])), came)
        self.assertEqual([out.queued for out in here._out.values()], [{}])

    def test_nobody_is_there_any_more(self) -> None:
        gone: List[Peer] = []
        here = self.notifier("here", gone=gone.append)
        self.assertIs(self.outcome(here.send(self.peer, b"x", 10, is_reported=True)), True)
        self.there.close()
        ticket = here.send(self.peer, b"x", 20, is_reported=True)
        self.assertIsInstance(self.outcome(ticket), nixlRemoteDisconnectError)
        # It is found out, and not waited for.
        self.assertIn("nobody listens", str(ticket.outcome))
        self.until(lambda: gone == [self.peer])

    def test_connections_that_break(self) -> None:
        here = self.notifier("here")
        tickets = []
        for turn in range(300):
            tickets.append(here.send(self.peer, b"%d" % turn, 20, is_reported=True))
            if turn % 30 == 29:
                self.outcome(tickets[turn // 2])
                writer = here._out[self.peer.incarnation]._writer
                ends = [] if writer is None else [writer.get_extra_info("socket")]
                for end in ends + list(self.there._guests.values()):
                    try:
                        end.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        # It is gone already.
                        pass
        self.assertEqual([self.outcome(ticket) for ticket in tickets], [True] * 300)
        self.assertEqual(self.there.take(), {"here": [b"%d" % turn for turn in range(300)]})

    def test_another_agent_at_the_address(self) -> None:
        gone: List[Peer] = []
        here = self.notifier("here", gone=gone.append)
        before = Peer("there", os.urandom(16), self.there.address)
        for turn in range(2):
            ticket = here.send(before, b"x", 20, is_reported=True)
            self.assertIsInstance(self.outcome(ticket), nixlRemoteDisconnectError)
            self.assertIn("restarted", str(ticket.outcome))
            self.until(lambda: gone == [before] * (turn + 1))
        with self.assertRaises(nixlRemoteDisconnectError):
            here.send(before, b"x", 20, is_reported=False)
        self.assertEqual(self.there.take(), {})

    def test_other_keys(self) -> None:
        for key in (b"another key, as long", None):
            here = self.notifier("here", key)
            ticket = here.send(self.peer, b"x", 0.3, is_reported=True)
            self.assertIsInstance(self.outcome(ticket), nixlRemoteDisconnectError)
        here = self.notifier("here")
        peer = Peer("open", self.open.incarnation, self.open.address)
        self.assertIsInstance(self.outcome(here.send(peer, b"x", 0.3, is_reported=True)), nixlRemoteDisconnectError)
        plain = self.notifier("plain", None)
        self.assertIs(self.outcome(plain.send(peer, b"x", 10, is_reported=True)), True)
        self.assertEqual((self.there.take(), self.open.take()), ({}, {"plain": [b"x"]}))

    def test_strangers(self) -> None:
        host, _, port = self.there.address.rpartition(":")
        with mock.patch.object(_notify, "HANDSHAKE_SECONDS", 0.2):
            strangers = [socket.create_connection((host, int(port))) for _ in range(20)]
            for number, stranger in enumerate(strangers):
                stranger.settimeout(TIMEOUT)
                if number % 2:
                    stranger.sendall(os.urandom(200 * number))
            for stranger in strangers:
                # All of them are shown out, whether they speak or not.
                try:
                    while stranger.recv(4096):
                        pass
                except ConnectionError:
                    pass
                stranger.close()
        self.until(lambda: not self.there._guests)
        here = self.notifier("here")
        self.assertIs(self.outcome(here.send(self.peer, b"x", 10, is_reported=True)), True)

    def test_senders_that_lie(self) -> None:
        host, _, port = self.open.address.rpartition(":")
        incarnation, hello = os.urandom(16), _frames._HELLO
        name = b"liar"

        def greeting(whom: bytes = self.open.incarnation, length: int = len(name)) -> bytes:
            return b"XDN1" + hello.pack(incarnation, whom, bytes(16), length) + name + bytes(16)

        def frame(number: int, message: bytes = b"x", length: int = -1, left: int = 10000) -> bytes:
            return _frames._FRAME.pack(number, left, len(message) if length < 0 else length) + message + bytes(16)

        begin = 4 + 16 + _frames._WELCOME.size + 16
        said: Dict[str, Tuple[bytes, int]] = {
            "another's name": (b"GET / HTTP/1.1\r\n\r\n" + bytes(100), 20),
            "no name": (greeting(length=0), 20),
            "a name that is too long": (greeting(length=60000) + bytes(60000), 20),
            "a name that is no text": (greeting().replace(name, b"\xff\xfe\xfd\xfc"), begin),
            "means another": (greeting(whom=bytes(16)), begin),
            "too large": (greeting() + frame(1, length=2**32 - 1), begin),
            "half a frame": (greeting() + frame(1, bytes(1000))[:100], begin),
            "a wrong code": (greeting() + frame(1)[:-1] + b"x", begin),
        }
        with mock.patch.object(_frames, "FRAME_SECONDS", 0.2), mock.patch.object(_notify, "HANDSHAKE_SECONDS", 0.2):
            for what, (data, answer) in said.items():
                with self.subTest(what), socket.create_connection((host, int(port))) as end:
                    end.settimeout(TIMEOUT)
                    end.sendall(data)
                    self.assertEqual(len(self.rest(end)), answer)
        self.assertEqual(self.open.take(), {})
        # The same number again, and one that comes too late: taken once, and answered.
        with socket.create_connection((host, int(port))) as end:
            end.settimeout(TIMEOUT)
            end.sendall(
                greeting() + frame(5, b"five") + frame(5, b"again") + frame(4, b"four") + frame(9, b"nine", left=0)
            )
            self.until(lambda: self.open._inbox.last_of(incarnation) == 9)
            self.assertEqual(self.open.take(), {"liar": [b"five", b"nine"]})
            end.shutdown(socket.SHUT_WR)
            self.assertEqual(len(self.rest(end)), begin + 4 * 24)
        # It has come back, and is told where it was.
        with socket.create_connection((host, int(port))) as end:
            end.settimeout(TIMEOUT)
            end.sendall(greeting())
            end.shutdown(socket.SHUT_WR)
            welcome = self.rest(end)[20 : 20 + _frames._WELCOME.size]
            self.assertEqual(_frames._WELCOME.unpack(welcome), (self.open.incarnation, 9))

    def test_receivers_that_lie(self) -> None:
        here = self.notifier("here", None)
        listener = self.entered(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(TIMEOUT)
        incarnation = os.urandom(16)
        peer = Peer("liar", incarnation, "127.0.0.1:%d" % listener.getsockname()[1])
        begin = b"XDN1" + bytes(16)
        welcome = _frames._WELCOME.pack(incarnation, 0) + bytes(16)
        for what, data, why in (
            ("nothing of ours", b"SSH-2.0-OpenSSH_9.2p1 Debian", "no agent"),
            ("another agent", begin + _frames._WELCOME.pack(bytes(16), 0) + bytes(16), "another agent"),
            ("a welcome with another key", begin + welcome[:-1] + b"x", "same key"),
            ("acknowledges with another key", begin + welcome + _frames._ACK.pack(1) + bytes(15) + b"x", "same key"),
        ):
            with self.subTest(what):
                ticket = here.send(peer, b"x", 20, is_reported=True)
                with listener.accept()[0] as end:
                    end.sendall(data)
                    self.assertIsInstance(self.outcome(ticket), nixlRemoteDisconnectError)
                    self.assertIn(why, str(ticket.outcome))
        # It closes: it is tried again until the deadline.
        self.entered(mock.patch.object(_notify, "RETRY_SECONDS", (0.01, 0.02)))
        ticket = here.send(peer, b"x", 20, is_reported=True)
        for data in (b"", begin, begin + welcome, begin + welcome[:20]):
            with listener.accept()[0] as end:
                end.sendall(data)
                end.shutdown(socket.SHUT_WR)
        with listener.accept()[0] as end:
            end.sendall(begin + welcome + _frames.acknowledgement(_frames.Codes(None, b"", b""), 2**64 - 1))
            self.assertIs(self.outcome(ticket), True)

    def rest(self, end: socket.socket) -> bytes:
        """What comes until the other side closes."""
        data = b""
        try:
            while True:
                more = end.recv(4096)
                if not more:
                    return data
                data += more
        except ConnectionError:
            return data

    def test_connections_that_nobody_needs(self) -> None:
        here = self.notifier("here")
        with (
            mock.patch.object(_notify, "IDLE_SECONDS", 0.05),
            mock.patch.object(_notify, "RETRY_SECONDS", (0.01, 0.02)),
        ):
            for turn in range(3):
                self.assertIs(self.outcome(here.send(self.peer, b"%d" % turn, 10, is_reported=True)), True)
                self.until(lambda: not here._out and not self.there._guests)
        # A receiver that was forgotten takes what it is sent later as something new.
        for turn in range(3, 6):
            self.assertIs(self.outcome(here.send(self.peer, b"%d" % turn, 10, is_reported=True)), True)
            here.forget(self.peer)
        self.assertEqual(self.there.take(), {"here": [b"%d" % turn for turn in range(6)]})

    def test_the_end_of_either_side(self) -> None:
        here = self.notifier("here")
        here.send(self.peer, b"before the end", 10, is_reported=False)
        here.close()
        self.assertEqual(self.taken(1), {"here": [b"before the end"]})
        with self.assertRaises(nixlCancelledError):
            here.send(self.peer, b"x", 10, is_reported=True)
        other = self.notifier("other")
        self.outcome(other.send(self.peer, b"x", 10, is_reported=True))
        self.there.close()
        self.assertIsInstance(
            self.outcome(other.send(self.peer, b"x", 0.3, is_reported=True)), nixlRemoteDisconnectError
        )
        ticket = other.send(self.peer, b"x", 20, is_reported=True)
        other.forget(self.peer)
        self.assertIsInstance(self.outcome(ticket), nixlCancelledError)

    def test_ipv6(self) -> None:
        try:
            there = self.notifier("there", host="::1")
        except OSError as error:
            self.skipTest(f"there is no IPv6 here: {error}")
        here = self.notifier("here", host="::1")
        peer = Peer("there", there.incarnation, there.address)
        self.assertIs(self.outcome(here.send(peer, b"x", 10, is_reported=True)), True)


if __name__ == "__main__":
    unittest.main()
