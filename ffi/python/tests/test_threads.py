"""Many threads on the same nodes."""

from __future__ import annotations

import threading
import time
import unittest
from typing import Callable, List

from support import LAYERS, PAGES, TIMEOUT, Case, crossdock, same_pages

THREADS = 8
ROOMS = 25


def run_threads(bodies: List[Callable[[], None]]) -> None:
    """Runs them all, and raises what one of them raised."""
    errors: List[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


class Threads(Case):
    def setUp(self) -> None:
        self.connected()

    def test_submit_and_wait(self) -> None:
        own = PAGES // THREADS

        def body(thread: int) -> None:
            pages = list(range(thread * own, (thread + 1) * own))
            for at in range(ROOMS):
                room = thread * 1000 + at
                with self.decode.node.receive(self.peer, room, 16 * own, pages) as receiving:
                    with self.prefill.node.send(room, 16 * own, pages) as sending:
                        sending.send(range(LAYERS))
                        sending.finish(b"%d" % room)
                        end = receiving.wait(TIMEOUT).check()
                        assert end.aux == b"%d" % room, end
                        sending.wait(TIMEOUT).check()
                    receiving.wait_pages(TIMEOUT)

        run_threads([lambda thread=thread: body(thread) for thread in range(THREADS)])  # type: ignore[misc]
        self.assertTrue(same_pages(self.prefill, range(PAGES), self.decode, range(PAGES), 16 * PAGES))
        self.assertEqual(self.decode.node.stats().delivered, THREADS * ROOMS)
        self.assertEqual(self.decode.pool.stats().free, PAGES)

    def test_errors_are_those_of_the_thread(self) -> None:
        taken = self.decode.node.receive(self.peer, 1, 16, [0])

        def body(thread: int) -> None:
            for _ in range(200):
                kinds = (
                    (crossdock.PageInUse, [0]),
                    (crossdock.PageOutOfRange, [PAGES + thread]),
                    (crossdock.DuplicatePage, [5, 5]),
                )
                kind, pages = kinds[thread % 3]
                try:
                    self.decode.node.receive(self.peer, 2, 16 * len(pages), pages)
                except kind as error:
                    assert thread % 3 != 1 or str(PAGES + thread) in str(error), error
                else:
                    raise AssertionError("it was taken")

        run_threads([lambda thread=thread: body(thread) for thread in range(THREADS)])  # type: ignore[misc]
        taken.close()

    def test_closed_while_others_wait(self) -> None:
        rooms = [self.decode.node.receive(self.peer, room, 16, [room]) for room in range(THREADS)]
        outcomes: List[crossdock.Outcome] = []
        stopped: List[crossdock.Stopped] = []

        def wait_for_events() -> None:
            try:
                while True:
                    self.decode.node.wait()
            except crossdock.Stopped as error:
                stopped.append(error)

        def close() -> None:
            time.sleep(0.05)
            self.decode.node.close()

        waits = [lambda room=room: outcomes.append(room.wait(TIMEOUT).outcome) for room in rooms]  # type: ignore[misc]
        run_threads([*waits, wait_for_events, wait_for_events, close, close])
        self.assertEqual(outcomes, [crossdock.Outcome.PEER_LOST] * THREADS)
        self.assertEqual(len(stopped), 2)
        for room in rooms:
            room.close()

    def test_one_room_closed_by_all(self) -> None:
        room = self.decode.node.receive(self.peer, 1, 16, [1])
        run_threads([room.close] * THREADS)
        with self.assertRaises(crossdock.BadHandle):
            room.poll()


if __name__ == "__main__":
    unittest.main()
