"""The connector for vLLM where leases end: which blocks are kept, for whom, and how long."""

from __future__ import annotations

import functools
import time
import unittest
from types import SimpleNamespace
from typing import Any, Callable, Dict, List
from unittest import mock

from support import TIMEOUT, crossdock

from engines.vllm_case import Engines, Shape, prompt_of
from engines.vllm_engine import config_of, transfer_of

from crossdock.vllm import _worker
from crossdock.vllm._scheduler import Serve
from crossdock.vllm._settings import Settings


class Leases(Engines):
    def test_one_reader_that_stands_still(self) -> None:
        """Its loan is over, and is kept as long as it reads. All others that are over are not, whether or not they
        share blocks with it."""
        large = Shape(layers=8, block_tokens=32, head_bytes=2048, blocks=32)
        self.prefill = self.engine("kv_producer", large, lease_seconds=2, ports="tcp")
        # The reader stops where this test does not drive it.
        driven = functools.partial(crossdock.Node, progress="caller")
        with mock.patch("crossdock.vllm._worker.Node", driven):
            self.decode = self.engine("kv_consumer", large, load_seconds=60, ports="tcp")
        node = self.decode.workers[0]._working._node

        def drive(condition: Callable[[], Any]) -> bool:
            for _ in range(100):
                node.progress()
            return bool(condition())

        def is_over() -> bool:
            return self.prefill.is_idle() and self.decode.is_idle()

        # So that there is a session.
        self.decode.add("first", prompt_of(2, 5), self.prefilled("first", prompt_of(2, 5)))
        self.until(lambda: drive(is_over))
        prompt = prompt_of(1, 220)
        self.decode.add("one", prompt, self.prefilled("one", prompt))
        self.prefill.step()
        self.decode.step()
        ids, layer = self.decode.fetches["one"].blocks, self.decode.caches[0]["model.layers.0.attn"]
        layer[ids] = 0
        begun = time.monotonic()
        while not bool(layer[ids, 0, 0, 0].any()):
            self.assertLess(time.monotonic(), begun + TIMEOUT)
            node.progress()
        others = {"another": prompt_of(3, 40), "a prefix": prompt[:100], "whole blocks": prompt[:64]}
        for name, text in others.items():
            self.prefilled(name, text)
        self.until(lambda: not self.prefill.workers[0]._working._serving, self.prefill)
        self.until(lambda: set(self.prefill.scheduler.requests) == {"one"}, self.prefill)
        for _ in range(100):
            self.prefill.step()
        self.assertEqual(list(self.prefill.workers[0]._working._lingering), ["one"])
        self.assertIn("one", self.prefill.scheduler.requests)
        self.until(lambda: drive(is_over))
        self.assertEqual(self.decode.over["one"], "error")
        self.assertEqual(self.decode.bad, set(ids))


class Loans(Engines):
    """A worker's loans over a pool, of which this test holds blocks in the place of rooms."""

    def setUp(self) -> None:
        super().setUp()
        shape = Shape(blocks=256)
        config = config_of(transfer_of("kv_both"), shape)
        self.working = _worker.Working(Settings.of(config, shape.config(1)), 0)
        self.pool = crossdock.Pool(256)
        self.addCleanup(self.pool.close)
        self.working._pool = self.pool
        self.ends: Dict[str, Any] = {}
        self.node: Any = SimpleNamespace()
        self.working._node, self.working._strips = self.node, 1

    def lend(self, request: str, blocks: List[int]) -> None:
        self.ends[request] = None
        room = SimpleNamespace(poll=lambda: self.ends[request], close=lambda: None)
        self.node.serve = lambda *told, **options: room
        self.working.start({request: Serve(1 + len(self.ends), blocks)}, {})

    def end(self, *requests: str, is_delivered: bool = False) -> None:
        for request in requests:
            self.ends[request] = SimpleNamespace(is_delivered=is_delivered, message="its lease has ended")

    def sent(self) -> List[str]:
        sent, received = self.working.finished(set())
        self.assertEqual(received, set())
        return sorted(sent)

    def is_clean(self) -> bool:
        working = self.working
        counts = bool(working._serving_of.any() or working._lingering_of.any())
        return not working._serving and not working._lingering and not counts and self.pool.stats().owned == 0

    def test_blocks_that_others_are_served_too(self) -> None:
        """A loan that is over is not known to be free as long as each of its blocks is served to somebody else."""
        for request, blocks in (("open", [1, 2, 3]), ("within", [1, 2]), ("beyond", [3, 4])):
            self.lend(request, blocks)
        held = {block: self.pool.adopt([block]) for block in (1, 2, 3, 4)}
        self.end("within", "beyond")
        self.assertEqual(self.sent(), [])
        held[4].close()
        self.assertEqual(self.sent(), ["beyond"])
        self.assertEqual(self.sent(), [])
        # Its blocks are free before it is known to be over: of the other loan they tell nothing yet.
        for block in (1, 2, 3):
            held[block].close()
        self.assertEqual(self.sent(), [])
        self.end("open", is_delivered=True)
        self.assertEqual(self.sent(), ["open", "within"])
        self.assertTrue(self.is_clean())

    def test_blocks_that_are_read_in_other_loans(self) -> None:
        """They tell nothing of a loan of which another block is free."""
        for request, blocks in (("stuck", [1]), ("one", [1, 2]), ("other", [2, 1])):
            self.lend(request, blocks)
        held = self.pool.adopt([1])
        self.end("stuck", "one", "other")
        self.assertEqual(self.sent(), ["one", "other"])
        self.assertEqual(self.sent(), [])
        held.close()
        self.assertEqual(self.sent(), ["stuck"])
        self.assertTrue(self.is_clean())

    def test_many_that_are_read_still(self) -> None:
        """A step asks for a few of them, and each has its turn."""
        for at in range(100):
            self.lend(f"loan {at:02}", [2 * at, 2 * at + 1])
        stuck = range(0, 2 * 2 * _worker._ASKED)
        held = self.pool.adopt(list(stuck))
        self.end(*self.ends)
        pool = mock.Mock(wraps=self.pool)
        self.working._pool = pool
        sent: List[str] = []
        for _ in range(-(-100 // _worker._ASKED)):
            pool.adopt.reset_mock()
            sent += self.sent()
            self.assertLessEqual(pool.adopt.call_count, _worker._ASKED)
        self.assertEqual(sorted(sent), [f"loan {at:02}" for at in range(len(stuck) // 2, 100)])
        held.close()
        while self.working._lingering:
            self.assertNotEqual(self.sent(), [])
        self.assertTrue(self.is_clean())


if __name__ == "__main__":
    unittest.main()
