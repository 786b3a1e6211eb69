"""Rooms, peers and events that coroutines wait for, in one event loop and in several."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import unittest
from typing import Any, Coroutine, List, Set, Tuple

from support import LAYERS, PAGES, TIMEOUT, Case, Worker, crossdock, page_numbers, same_pages

from crossdock import EventKind, Outcome

ROOMS = 50


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, TIMEOUT))


class Awaited(Case):
    def setUp(self) -> None:
        self.connected()

    async def hand_over(self, room: int) -> crossdock.End:
        """One page, pushed from both sides in this loop."""
        page = room % PAGES
        with self.decode.node.receive(self.peer, room, 16, [page]) as receiving:
            with self.prefill.node.send(room, 16, [page]) as sending:
                sending.send(range(LAYERS))
                sending.finish(str(room).encode())
                received, sent = await asyncio.gather(receiving, sending)
                assert sent.is_delivered
            await receiving.pages_home()
        return received

    def test_many_rooms_at_once(self) -> None:
        async def main() -> List[crossdock.End]:
            return await asyncio.gather(*(self.hand_over(room) for room in range(ROOMS)))

        ends = run(main())
        self.assertEqual([end.aux for end in ends], [str(room).encode() for room in range(ROOMS)])
        self.assertTrue(same_pages(self.prefill, range(ROOMS), self.decode, range(ROOMS), 16 * ROOMS))

    def test_one_loop_after_another(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for room in range(20):
            self.assertTrue(run(self.hand_over(room)).is_delivered)
        # What a loop had is given back when the next one comes.
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), before + 4)

    def test_several_loops_at_once(self) -> None:
        ends: List[crossdock.End] = []

        def thread(first: int) -> None:
            async def main() -> None:
                for room in range(first, first + 10):
                    ends.append(await self.hand_over(room))

            run(main())

        threads = [threading.Thread(target=thread, args=(10 * at,)) for at in range(4)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(TIMEOUT)
        self.assertEqual(len(ends), 40)
        self.assertTrue(all(end.is_delivered for end in ends))

    def test_loops_and_threads_at_once(self) -> None:
        """Threads that wait for events take those of rooms that coroutines wait for, and the other way round."""
        stop = threading.Event()
        told: List[Tuple[Any, Any]] = []

        def thread() -> None:
            while not stop.is_set():
                try:
                    told.extend((event.kind, event.subject) for event in self.decode.node.wait(0.02))
                except crossdock.TimedOut:
                    pass

        threads = [threading.Thread(target=thread) for _ in range(3)]
        for one in threads:
            one.start()

        async def main() -> List[crossdock.End]:
            return await asyncio.gather(*(self.hand_over(room) for room in range(ROOMS)))

        for _ in range(3):
            ends = run(main())
            self.assertTrue(all(end.is_delivered for end in ends))
        stop.set()
        for one in threads:
            one.join(TIMEOUT)
        self.assertEqual(len(told), len(set(told)))

    def test_each_event_is_told_once(self) -> None:
        async def main() -> List[Tuple[Any, int]]:
            rooms = {self.decode.node.receive(self.peer, room, 16, [room], deadline=0.05) for room in range(ROOMS)}
            told: List[Tuple[Any, int]] = []

            async def listen() -> None:
                while True:
                    for event in await self.decode.node.wait_events(most=3):
                        if event.subject in rooms:
                            told.append((event.kind, event.subject.number))

            listeners = [asyncio.ensure_future(listen()) for _ in range(3)]
            ends = await asyncio.gather(*rooms)
            self.assertTrue(all(end.outcome == Outcome.EXPIRED for end in ends))
            while len(told) < 2 * ROOMS:
                await asyncio.sleep(0.005)
            for listener in listeners:
                listener.cancel()
            for room in rooms:
                room.close()
            return told

        told = run(main())
        wanted: Set[Tuple[Any, int]] = {
            (kind, room) for kind in (EventKind.ENDED, EventKind.PAGES_HOME) for room in range(ROOMS)
        }
        self.assertEqual((len(told), set(told)), (2 * ROOMS, wanted))

    def test_nobody_polls_meanwhile(self) -> None:
        async def main() -> None:
            receiving = self.decode.node.receive(self.peer, 1, 16, [1], deadline=0.5)
            # An event of another room that nobody takes.
            other = self.decode.node.receive(self.peer, 2, 16, [2], deadline=0.05)
            begun = time.thread_time()
            await receiving
            self.assertLess(time.thread_time() - begun, 0.25)
            receiving.close()
            other.close()

        run(main())

    def test_whoever_waits_for_a_room_is_told_its_end(self) -> None:
        async def main() -> None:
            with self.decode.node.receive(self.peer, 1, 16, [1], deadline=0.05) as receiving:
                ends = await asyncio.gather(*(self.end_of(receiving) for _ in range(10)))
                self.assertTrue(all(end is receiving.end for end in ends))
                self.assertIs(await receiving, receiving.end)

        run(main())

    @staticmethod
    async def end_of(room: crossdock.Room) -> crossdock.End:
        return await room

    def test_a_wait_that_is_cancelled_leaves_the_room_alone(self) -> None:
        async def main() -> None:
            receiving = self.decode.node.receive(self.peer, 1, 16, [1])
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(self.end_of(receiving), 0.02)
            self.assertIsNone(receiving.poll())
            sending = self.prefill.node.send(1, 16, [1])
            sending.send(range(LAYERS))
            sending.finish()
            self.assertTrue((await receiving).is_delivered)
            await sending
            receiving.close()
            sending.close()

        run(main())

    def test_what_is_closed_wakes_who_waits_for_it(self) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            receiving = self.decode.node.receive(self.peer, 1, 16, [1])
            loop.call_later(0.02, receiving.close)
            with self.assertRaises(crossdock.BadHandle):
                await receiving
            nobody = self.decode.node.connect("127.0.0.1:9")
            loop.call_later(0.02, nobody.close)
            with self.assertRaises(crossdock.BadHandle):
                await nobody
            self.assertEqual((await self.peer).name, "prefill")

            # The node itself, from another thread.
            self.decode.node.events()
            receiving = self.decode.node.receive(self.peer, 2, 16, [2])
            events = asyncio.ensure_future(self.decode.node.wait_events())
            ends = [asyncio.ensure_future(self.end_of(receiving)) for _ in range(3)]
            await asyncio.sleep(0.02)
            closing = threading.Thread(target=self.decode.node.close)
            closing.start()
            for end in ends:
                self.assertEqual((await end).outcome, Outcome.PEER_LOST)
            with self.assertRaises(crossdock.Stopped):
                await events
                await self.decode.node.wait_events()
            closing.join(TIMEOUT)
            self.assertEqual((await receiving).outcome, Outcome.PEER_LOST)
            receiving.close()

        run(main())

    def test_a_node_that_is_closed_by_its_loop(self) -> None:
        async def main() -> None:
            with Worker("short") as short:
                peer = short.node.connect(self.prefill.node.address)
                await peer
                receiving = short.node.receive(peer, 1, 16, [1], deadline=0.02)
                await receiving
                peer.close()
                receiving.close()

        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            run(main())
        # The other node forgets them a little later.
        deadline = time.monotonic() + TIMEOUT
        while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), before)

    def test_a_loop_that_was_left_half_way(self) -> None:
        loop = asyncio.new_event_loop()
        # It tells of the task that nobody has ended.
        loop.set_exception_handler(lambda loop, context: None)
        receiving = self.decode.node.receive(self.peer, 1, 16, page_numbers(1, 1))
        task = loop.create_task(self.end_of(receiving))
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        loop.close()
        receiving.cancel()
        # Others are woken all the same.
        self.assertEqual(run(self.end_of(receiving)).outcome, Outcome.CANCELLED)
        self.assertTrue(self.decode.node.wait(TIMEOUT))
        receiving.close()


if __name__ == "__main__":
    unittest.main()
