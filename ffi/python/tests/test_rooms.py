"""How rooms end, what is refused, and what is closed in the wrong order."""

from __future__ import annotations

import array
import gc
import os
import pickle
import tempfile
import time
import unittest
import warnings
from pathlib import Path

from support import KEY, LAYERS, PAGES, TIMEOUT, Case, Worker, crossdock, page_numbers, same_pages, small_layout

from crossdock import By, EventKind, Outcome, Stage

TOKENS = 100


class Ends(Case):
    def setUp(self) -> None:
        self.connected()
        self.pages = page_numbers(1, 7)

    def test_cancelled_here_and_there(self) -> None:
        receiving = self.decode.node.receive(self.peer, 1, TOKENS, self.pages)
        sending = self.prefill.node.send(1, TOKENS, self.pages)
        sending.send(0)
        receiving.cancel()
        end = receiving.wait(TIMEOUT)
        self.assertEqual((end.outcome, end.by), (Outcome.CANCELLED, By.HERE))
        self.assertFalse(end.is_delivered)
        with self.assertRaisesRegex(crossdock.NotDelivered, "cancel"):
            end.check()
        other = sending.wait(TIMEOUT)
        self.assertEqual((other.outcome, other.by), (Outcome.CANCELLED, By.PEER))
        self.assertEqual((other.peer, other.port), (self.decode.node.name, "shm"))
        receiving.wait_pages(TIMEOUT)
        self.assertEqual(self.decode.pool.stats().free, PAGES)
        receiving.close()
        sending.close()

    def test_expired(self) -> None:
        begun = time.monotonic()
        with self.decode.node.receive(self.peer, 2, TOKENS, self.pages, deadline=0.2) as receiving:
            with self.assertRaises(crossdock.TimedOut) as caught:
                receiving.wait(0.01)
            self.assertIsInstance(caught.exception, TimeoutError)
            self.assertIn("room 2", str(caught.exception))
            end = receiving.wait(TIMEOUT)
            # The peer has the same deadline, and may be the first to say so.
            self.assertEqual((end.outcome, end.stage), (Outcome.EXPIRED, Stage.GRANT))
            self.assertIn(end.by, (By.HERE, By.PEER))
            self.assertTrue(end.message and end.advice)
            self.assertLess(time.monotonic() - begun, TIMEOUT / 2)
            receiving.wait_pages(TIMEOUT)
        self.assertEqual(self.decode.pool.stats().free, PAGES)

    def test_a_peer_that_nobody_is(self) -> None:
        with self.decode.node.connect("127.0.0.1:9") as nobody:
            self.assertIsNone(nobody.poll())
            with self.assertRaises(crossdock.TimedOut):
                nobody.wait(0.05)
            with self.decode.node.receive(nobody, 3, TOKENS, self.pages, deadline=0.1) as receiving:
                end = receiving.wait(TIMEOUT)
                self.assertEqual((end.outcome, end.stage), (Outcome.EXPIRED, Stage.SESSION))
                self.assertEqual((end.peer, end.port), ("", ""))
        with self.assertRaises(crossdock.BadArgument):
            self.decode.node.connect("nowhere")

    def test_pages_may_follow_their_room(self) -> None:
        pages, more = array.array("q", [9, 8, 7]), [6, 5, 4, 3]
        with self.decode.node.receive(self.peer, 40, TOKENS, self.pages) as receiving:
            with self.prefill.node.send_ahead(40, TOKENS, pages[:1]) as sending:
                sending.add_pages(pages[1:])
                sending.send(range(LAYERS), range(0, 48))
                with self.assertRaises(crossdock.PageOutOfRange):
                    sending.add_pages([PAGES])
                with self.assertRaisesRegex(crossdock.BadArgument, "pages for pool 0, which has"):
                    sending.add_pages([pages[0]] * PAGES)
                with self.assertRaises(crossdock.BadArgument):
                    sending.add_pages(more, pool=1)
                with self.assertRaises(crossdock.BadArgument):
                    sending.add_pages(more, pool=-1)
                sending.add_pages(more)
                sending.send(range(LAYERS), range(48, TOKENS))
                sending.finish(b"aux")
                self.assertEqual(receiving.wait(TIMEOUT).check().aux, b"aux")
                receiving.wait_pages(TIMEOUT)
                with self.assertRaises(crossdock.errors.Finished):
                    sending.add_pages(more)
        self.assertTrue(same_pages(self.prefill, [*pages, *more], self.decode, self.pages, TOKENS))

    def test_tokens_without_pages_are_refused(self) -> None:
        with self.decode.node.receive(self.peer, 41, TOKENS, self.pages) as receiving:
            with self.prefill.node.send_ahead(41, TOKENS) as sending:
                sending.send(range(LAYERS), range(0, 16))
                end = sending.wait(TIMEOUT)
                self.assertEqual((end.outcome, end.by), (Outcome.REFUSED, crossdock.By.HERE))
                self.assertIn("do not hold", end.message)
                self.assertEqual(receiving.wait(TIMEOUT).outcome, Outcome.REFUSED)
                receiving.wait_pages(TIMEOUT)

    def test_the_node_is_closed_first(self) -> None:
        receiving = self.decode.node.receive(self.peer, 4, TOKENS, self.pages)
        self.decode.node.close()
        self.decode.node.close()
        self.assertEqual(receiving.wait(TIMEOUT).outcome, Outcome.PEER_LOST)
        with self.assertRaises(crossdock.Stopped):
            receiving.cancel()
        for call in (
            lambda: self.decode.node.receive(self.peer, 5, TOKENS, self.pages),
            lambda: self.decode.node.connect("127.0.0.1:9"),
            lambda: self.decode.node.stats(),
        ):
            with self.assertRaises(crossdock.BadHandle):
                call()
        for ask in (self.decode.node.events, lambda: self.decode.node.wait(0.1), self.decode.node.fileno):
            with self.assertRaises(crossdock.Stopped):
                ask()
        self.assertIn("closed", repr(self.decode.node))
        self.peer.close()
        receiving.close()

    def test_everything_is_closed_in_the_wrong_order(self) -> None:
        worker = Worker("wrong")
        peer = worker.node.connect(self.prefill.node.address)
        receiving = worker.node.receive(peer, 6, TOKENS, self.pages)
        for one in (worker.layout, worker.pool, worker.memory[0], peer, worker.node, receiving):
            one.close()
            one.close()
        worker.views[0][0] = 1
        for call in (
            receiving.poll,
            receiving.wait,
            receiving.cancel,
            receiving.wait_pages,
            peer.poll,
            worker.pool.stats,
        ):
            with self.assertRaises(crossdock.BadHandle):
                call()
        with self.assertRaises(crossdock.BadHandle):
            worker.layout.pages_for(1)
        with self.assertRaises(crossdock.BadHandle):
            crossdock.Node("again", small_layout(), worker.memory, crossdock.Pool(PAGES), key=KEY)

    def test_a_room_that_is_dropped_is_cancelled(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            receiving = self.decode.node.receive(self.peer, 7, TOKENS, self.pages)
            self.assertEqual(self.decode.pool.stats().free, PAGES - 7)
            del receiving
            gc.collect()
        self.assertEqual([one.category for one in caught], [ResourceWarning])
        deadline = time.monotonic() + TIMEOUT
        while self.decode.pool.stats().free < PAGES and time.monotonic() < deadline:
            time.sleep(0.005)
        self.assertEqual(self.decode.pool.stats().free, PAGES)

    def test_a_node_that_is_dropped_is_closed(self) -> None:
        layout = small_layout()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            crossdock.Node("dropped", layout, crossdock.Memory(layout.region_bytes()), crossdock.Pool(layout), key=KEY)
            gc.collect()
        self.assertEqual([one.category for one in caught], [ResourceWarning])

    def test_the_order_of_sends(self) -> None:
        with self.prefill.node.send(8, TOKENS, self.pages) as sending:
            with self.assertRaises(crossdock.NotComplete):
                sending.finish()
            with self.assertRaises(crossdock.OutOfOrder):
                sending.send(0, range(10, 20))
            sending.send(0, range(0, 10))
            with self.assertRaises(crossdock.BadArgument):
                sending.send(LAYERS)
            with self.assertRaises(crossdock.BadArgument):
                sending.send(1, range(0, TOKENS + 1))
            for nothing in (range(0), range(4, 0, -1), range(0, 4, 2)):
                with self.assertRaises(ValueError):
                    sending.send(nothing)
            sending.send(0, range(10, TOKENS))
            sending.send(range(1, LAYERS))
            sending.finish(b"done")
            with self.assertRaises(crossdock.Finished):
                sending.finish()

    def test_pages_that_are_in_use(self) -> None:
        with self.decode.node.receive(self.peer, 9, TOKENS, self.pages) as receiving:
            with self.assertRaises(crossdock.PageInUse) as caught:
                self.decode.node.receive(self.peer, 10, TOKENS, self.pages)
            error = caught.exception
            self.assertEqual((error.status_name, error.status), ("CROSSDOCK_PAGE_IN_USE", 16))
            self.assertTrue(error.message and error.advice and not error.is_retryable)
            self.assertIn(error.advice, str(error))
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(again), again.args), (type(error), error.args))
            with self.assertRaises(crossdock.Pending):
                receiving.take_pages()
            with self.assertRaises(crossdock.TimedOut):
                receiving.wait_pages(0)
            self.assertFalse(receiving.is_home)
            self.assertEqual(receiving.arrivals, 0)
            receiving.cancel()
            receiving.wait_pages(TIMEOUT)
            self.assertTrue(receiving.is_home)
        with self.assertRaises(crossdock.BadHandle):
            receiving.is_home

    def test_too_many_rooms(self) -> None:
        with Worker("few", max_rooms=1) as few:
            peer = few.node.connect(self.prefill.node.address)
            peer.wait(TIMEOUT)
            rooms = [few.node.receive(peer, 20 + at, 16, [at]) for at in range(2)]
            outcomes = [Outcome.REFUSED if room.poll() else None for room in rooms]
            self.assertIsNone(outcomes[0])
            self.assertEqual(rooms[1].wait(TIMEOUT).outcome, Outcome.REFUSED)
            self.assertTrue(rooms[1].wait(TIMEOUT).is_retryable)
            peer.close()
            for room in rooms:
                room.close()

    def test_events_are_told_once(self) -> None:
        (event,) = self.decode.node.wait(TIMEOUT)
        self.assertEqual((event.kind, event.subject), (EventKind.PEER, self.peer))
        with self.decode.node.receive(self.peer, 30, TOKENS, self.pages) as receiving:
            self.assertEqual(self.decode.node.events(), [])
            with self.assertRaises(crossdock.TimedOut):
                self.decode.node.wait(0.02)
            receiving.cancel()
            told = []
            while len(told) < 2:
                told += self.decode.node.wait(TIMEOUT, most=1)
            self.assertEqual([event.kind for event in told], [EventKind.ENDED, EventKind.PAGES_HOME])
            self.assertTrue(all(event.subject is receiving for event in told))
            self.assertEqual(self.decode.node.events(), [])
        with self.assertRaises(crossdock.BadArgument):
            self.decode.node.events(0)

    def test_the_descriptor(self) -> None:
        import select

        self.decode.node.wait(TIMEOUT)
        poll = select.poll()
        poll.register(self.decode.node, select.POLLIN)
        self.assertEqual(poll.poll(0), [])
        with self.decode.node.receive(self.peer, 31, TOKENS, self.pages, deadline=0.05):
            self.assertTrue(poll.poll(TIMEOUT * 1000))
            while len(self.decode.node.events()) == 0:
                pass

    def test_stats_and_flight(self) -> None:
        stats = self.decode.node.stats()
        self.assertEqual((stats.sessions, stats.rooms, stats.sessions_begun), (1, 0, 1))
        self.assertEqual(self.decode.node.ports, ["shm", "tcp"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "flight"
            self.decode.node.write_flight(path)
            self.assertGreater(path.stat().st_size, 0)
            with self.assertRaises(crossdock.SystemRefused):
                self.decode.node.write_flight(os.path.join(folder, "no", "folder"))

    def test_what_no_node_is_opened_with(self) -> None:
        layout, pool = small_layout(), crossdock.Pool(PAGES)
        memory = crossdock.Memory(layout.region_bytes())
        for wrong in (
            dict(key=None),
            dict(authentication="off"),
            dict(key=b"short"),
            dict(ports="carrier-pigeon"),
            dict(bind="here"),
            dict(progress="nobody"),
            dict(heartbeat=-1),
            dict(pools=[]),
        ):
            with self.subTest(wrong), self.assertRaises(crossdock.BadArgument):
                crossdock.Node("wrong", layout, memory, **{"key": KEY, "pools": pool, **wrong})
        with self.assertRaises((crossdock.NetworkError, crossdock.PortError)):
            crossdock.Node("wrong", layout, memory, pool, key=KEY, bind="192.0.2.1:0")
        with crossdock.Node(
            "open", layout, memory, pool, authentication="off", number=77, spin=0, ports=["tcp"]
        ) as node:
            self.assertEqual((node.number, node.ports), (77, ["tcp"]))


class Halted(Case):
    def test_pages_that_never_come_home(self) -> None:
        with Worker("prefill", progress="caller") as prefill, Worker("decode") as decode:
            peer = decode.node.connect(prefill.node.address)
            receiving = decode.node.receive(peer, 1, TOKENS, page_numbers(2, 7), deadline=1.0)
            sending = prefill.node.send(1, TOKENS, page_numbers(1, 7))
            sending.send(0)
            deadline = time.monotonic() + 1.0
            while not receiving.arrivals and time.monotonic() < deadline:
                if not prefill.node.progress():
                    prefill.node.park(0.01)
            # From here on nobody drives the peer.
            self.assertEqual(receiving.wait(TIMEOUT).outcome, Outcome.EXPIRED)
            self.assertFalse(receiving.is_home)
            decode.node.close()
            with self.assertRaises(crossdock.Abandoned):
                receiving.wait_pages(TIMEOUT)
            self.assertFalse(receiving.is_home)
            for one in (peer, receiving, sending):
                one.close()


class Driven(Case):
    def test_by_the_caller(self) -> None:
        with Worker("prefill") as prefill, Worker("decode", progress="caller") as decode:
            prefill.fill(1)
            peer = decode.node.connect(prefill.node.address)
            serving = prefill.node.serve(1, TOKENS, page_numbers(1, 7))
            fetching = decode.node.fetch(peer, 1, TOKENS, page_numbers(2, 7))
            deadline = time.monotonic() + TIMEOUT
            told = set()
            while told != {EventKind.PEER, EventKind.ENDED, EventKind.PAGES_HOME} and time.monotonic() < deadline:
                if not decode.node.progress():
                    decode.node.park(0.01)
                told |= {event.kind for event in decode.node.events()}
            self.assertEqual(fetching.wait(0).outcome, Outcome.DELIVERED)
            self.assertTrue(same_pages(prefill, page_numbers(1, 7), decode, page_numbers(2, 7), TOKENS))
            with self.assertRaises(crossdock.WrongKind):
                prefill.node.progress()
            fetching.close()
            serving.close()
            peer.close()


if __name__ == "__main__":
    unittest.main()
