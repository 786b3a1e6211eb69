"""A rank's node under SGLang: rooms that drain, and requests as long as a cache is. Needs no SGLang."""

from __future__ import annotations

import logging
import os
import time
import unittest
from types import SimpleNamespace
from typing import Any, List
from unittest import mock

from support import KEY, TIMEOUT

from crossdock.errors import Unsupported
from crossdock.sglang.cache import MAX_FRAME_BYTES, Cache, Rank
from crossdock.sglang.worker import Worker

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]

HOST = "127.0.0.1"


class Drained:
    """Stands in for a room that is cleared."""

    asked = 0

    def __init__(self, is_home: bool = False) -> None:
        self.at_home = is_home
        self.is_closed = False

    @property
    def is_home(self) -> bool:
        Drained.asked += 1
        return self.at_home

    def close(self) -> None:
        self.is_closed = True


class Draining(unittest.TestCase):
    def setUp(self) -> None:
        nothing: Any = SimpleNamespace(close=lambda: None)
        self.worker = Worker("draining", nothing, HOST, None)
        self.addCleanup(self.worker.close)
        Drained.asked = 0

    def drain(self, number: int, is_home: bool = False) -> Drained:
        room: Any = Drained(is_home)
        self.worker.drain(number, room)
        return room  # type: ignore[no-any-return]

    def test_each_is_asked_for_itself(self) -> None:
        """A scheduler that holds many requests asks for each in each of its steps: no room is asked for another."""
        count = 300
        rooms = [self.drain(number) for number in range(count)]
        self.assertLessEqual(Drained.asked, 4 * count)
        Drained.asked = 0
        self.assertEqual([self.worker.is_home(number) for number in range(count)], [False] * count)
        self.assertEqual(Drained.asked, count)
        rooms[7].at_home = True
        self.assertTrue(self.worker.is_home(7))
        self.assertTrue(rooms[7].is_closed)
        Drained.asked = 0
        self.assertTrue(self.worker.is_home(7) and self.worker.is_home(count))
        self.assertEqual(Drained.asked, 0)

    def test_a_number_that_was_used_twice(self) -> None:
        first, second = self.drain(1), self.drain(1)
        first.at_home = True
        self.assertFalse(self.worker.is_home(1))
        self.assertEqual((first.is_closed, second.is_closed), (True, False))
        second.at_home = True
        self.assertTrue(self.worker.is_home(1))

    def test_what_nobody_asks_for_is_let_go(self) -> None:
        stuck = self.drain(0)
        rooms = [self.drain(number) for number in range(1, 20)]
        for room in rooms:
            room.at_home = True
        for number in range(20, 40):
            self.assertTrue(self.drain(number, is_home=True).is_closed)
        self.assertTrue(all(room.is_closed for room in rooms))
        self.assertFalse(stuck.is_closed)


def cache_of(memory: Any, pages: int, rank: Rank, **more: Any) -> Cache:
    """Latents of one layer, a token in a page."""
    args = dict(
        kv_data_ptrs=[memory.ctypes.data],
        kv_data_lens=[memory.nbytes],
        kv_item_lens=[memory.nbytes // pages],
        kv_cache_dtype_str="bfloat16",
        page_size=1,
        aux_data_ptrs=[],
        aux_item_lens=[],
        aux_data_lens=[],
    )
    return Cache(SimpleNamespace(**{**args, **more}), rank, is_mla=True)


@unittest.skipIf(numpy is None, "numpy is not installed")
class Long(unittest.TestCase):
    def setUp(self) -> None:
        # Where both sides close at once, one may find the other still there, and warns.
        log = logging.getLogger("crossdock.sglang")
        log.setLevel(logging.ERROR)
        self.addCleanup(log.setLevel, logging.NOTSET)

    def test_a_prompt_of_300_000_pages(self) -> None:
        """Its list is longer than a message may usually be."""
        pages, one = 300_000, Rank(1, 0)
        random = numpy.random.default_rng(3)
        sent = random.integers(0, 256, (pages, 4), "uint8")
        got = numpy.zeros_like(sent)
        workers: List[Worker] = []
        with mock.patch.dict(os.environ, {"CROSSDOCK_KEY": KEY.decode()}):
            for name, memory in (("prefill", sent), ("decode", got)):
                workers.append(Worker(name, cache_of(memory, pages, one), HOST, None))
                self.addCleanup(workers[-1].close)
                workers[-1].open(0, 4, 0)
        prefill, decode = workers
        peer = decode.peer(("anywhere", 0, 0), prefill.node.address)
        sources, targets = (random.permutation(pages).astype("int32") for _ in range(2))
        with decode.node.receive(peer, 1, pages, targets, deadline=TIMEOUT) as receiving:
            with prefill.node.send_ahead(1, pages, ranks=[0], deadline=TIMEOUT) as sending:
                sending.add_pages(sources)
                sending.send(prefill.layers, range(pages))
                sending.finish(b"aux")
                self.assertEqual(receiving.wait(TIMEOUT).check().aux, b"aux")
                sending.wait(TIMEOUT).check()
            deadline = time.monotonic() + TIMEOUT
            while not receiving.is_home and time.monotonic() < deadline:
                time.sleep(0.005)
            self.assertTrue(receiving.is_home)
        self.assertTrue((got[targets] == sent[sources]).all())

    def test_no_cache_is_longer_than_a_message(self) -> None:
        most = (MAX_FRAME_BYTES - 1024) // 4
        memory = numpy.zeros(most + 1, "uint8")
        cache_of(memory[:most], most, Rank(1, 0)).close()
        with self.assertRaisesRegex(Unsupported, f"{most + 1} pages and rows.*page-size"):
            cache_of(memory, most + 1, Rank(1, 0))
        rows = numpy.zeros(1000, "uint8")
        state = dict(
            state_types=["mamba"], state_data_ptrs=[[rows.ctypes.data]], state_data_lens=[[1000]], state_item_lens=[[1]]
        )
        cache_of(memory[: most - 1000], most - 1000, Rank(1, 0), **state).close()
        with self.assertRaisesRegex(Unsupported, f"{most + 1} pages and rows"):
            cache_of(memory[: most - 999], most - 999, Rank(1, 0), **state)
        with self.assertRaisesRegex(Unsupported, "bytes of metadata"):
            aux = dict(aux_data_ptrs=[memory.ctypes.data], aux_item_lens=[MAX_FRAME_BYTES])
            cache_of(memory[:64], 64, Rank(1, 0), **aux, aux_data_lens=[MAX_FRAME_BYTES])


if __name__ == "__main__":
    unittest.main()
