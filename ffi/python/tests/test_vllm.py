"""The connector for vLLM, under vLLM's own scheduler: requests are prefilled by one engine and decoded by another, and
what each step reads of the cache is compared."""

from __future__ import annotations

import random
import time
import unittest
from typing import Any, Dict, List, Tuple

from support import TIMEOUT

from engines.vllm_case import Engine, Engines, Shape, following, prompt_of


class HandOver(Engines):
    def test_in_every_order_of_memory(self) -> None:
        for order in ("LBNHC", "LBHNC", "LHBNC", "BLNHC", "BLHNC", "BHLNC"):
            with self.subTest(order):
                self.pair(Shape(order=order))
                # A last block that is full, and one that is not; a prompt in several chunks.
                for count in (20, 21, 1, 90):
                    self.hand_over(f"{count} tokens", prompt_of(count, count))

    def test_steps_that_overlap(self) -> None:
        """As vLLM schedules if it can: blocks are handed over while the step after them is under way."""
        self.pair(is_async=True)
        prompts = {f"request {at}": prompt_of(at, 5 + 2 * at) for at in range(6)}
        for name, prompt in prompts.items():
            self.decode.add(name, prompt, self.prefilled(name, prompt), most=5)
            self.until(lambda: len(self.decode.scheduler.requests) < 3)
        self.until(lambda: len(self.decode.over) == 6 and self.prefill.is_idle() and self.decode.is_idle())
        for name, prompt in prompts.items():
            self.assertEqual(self.decode.tokens[name], following(prompt, 5))
            # One step more may have been begun than was of use.
            self.assertIn(self.decode.computed[name], (5, 6))

    def test_a_latent(self) -> None:
        for order in ("LBNHC", "BLHNC"):
            with self.subTest(order):
                self.pair(Shape(is_mla=True, heads=1, order=order))
                self.hand_over("one", prompt_of(1, 30))

    def test_tensor_parallel_ranks(self) -> None:
        latent = Shape(is_mla=True, heads=1)
        for shape, prefill, decode in (
            (Shape(order="LBHNC"), 1, 2),
            (Shape(order="LBHNC"), 2, 1),
            (Shape(order="LHBNC"), 4, 2),
            (Shape(order="BLHNC"), 2, 2),
            (latent, 1, 2),
            (latent, 2, 1),
            (latent, 2, 2),
        ):
            with self.subTest(prefill=prefill, decode=decode, is_mla=shape.is_mla):
                usual = dict(heterogeneous_tp=True)
                self.prefill = self.engine("kv_producer", shape, prefill, decode_tp=decode, **usual)
                self.decode = self.engine("kv_consumer", shape, decode, **usual)
                for turn in range(3):
                    self.hand_over(f"request {turn}", prompt_of(turn, 23))

    def test_ranks_that_keep_heads_in_the_same_way(self) -> None:
        """They need no special order of memory."""
        self.prefill, self.decode = self.engine("kv_producer", tp=2), self.engine("kv_consumer", tp=2)
        self.hand_over("one", prompt_of(1, 23))

    def test_caches_of_other_sizes_and_orders(self) -> None:
        """How many blocks there are is each side's own matter, and so is the order of heads that are apart."""
        self.prefill = self.engine("kv_producer", Shape(blocks=12, order="LBHNC"), heterogeneous_tp=True)
        self.decode = self.engine("kv_consumer", Shape(blocks=70, order="LHBNC"), heterogeneous_tp=True)
        self.hand_over("one", prompt_of(1, 40))

    def test_a_prefix_that_is_here_already(self) -> None:
        self.pair()
        prompt = prompt_of(1, 17)
        self.hand_over("first", prompt)
        self.hand_over("second", prompt + prompt_of(2, 10))
        # The first has left four whole blocks, and one that it filled with what it made.
        fetch = self.decode.fetches["second"]
        self.assertEqual((fetch.skipped, len(fetch.blocks)), (4, 3))

    def test_no_blocks_to_load(self) -> None:
        """A request that uses no cache: the prefill engine need not wait for its lease to end."""
        self.pair(lease_seconds=3600)
        prompt = prompt_of(1, 17)
        params = self.prefilled("one", prompt)
        self.decode.add("one", prompt, params, skips_cache=True)
        self.until(lambda: "one" in self.decode.over and self.prefill.is_idle() and self.decode.is_idle())
        self.assertEqual(self.decode.fetches["one"].blocks, [])
        self.assertEqual(self.decode.tokens["one"], following(prompt, 1))

    def test_many_at_once(self) -> None:
        self.pair(Shape(blocks=256))
        prompts = {f"request {at}": prompt_of(at, 3 + at % 14) for at in range(25)}
        for name, prompt in prompts.items():
            self.decode.add(name, prompt, self.prefilled(name, prompt), most=3)
        self.until(lambda: len(self.decode.over) == 25 and self.prefill.is_idle() and self.decode.is_idle())
        for name, prompt in prompts.items():
            self.assertEqual(self.decode.tokens[name], following(prompt, 3))

    def test_preemption(self) -> None:
        """Of requests for which there are too few blocks, one begins anew, and is computed here then."""
        self.prefill, self.decode = self.engine("kv_producer"), self.engine("kv_consumer", Shape(blocks=12))
        prompts = {f"request {at}": prompt_of(at, 12) for at in range(3)}
        for name, prompt in prompts.items():
            self.decode.add(name, prompt, self.prefilled(name, prompt), most=18)
        self.until(lambda: len(self.decode.over) == 3 and self.prefill.is_idle() and self.decode.is_idle())
        for name, prompt in prompts.items():
            self.assertEqual(self.decode.tokens[name], following(prompt, 18))
        self.assertGreater(sum(request.num_preemptions for request in self.decode.requests.values()), 0)

    def test_both_roles_and_too_few_blocks(self) -> None:
        """Requests go both ways and share prefixes; some are aborted, and some come after their blocks are gone. Blocks
        are used again at once, and nothing is ever read that was not written for it."""
        shape = Shape(blocks=24, order="LBHNC")
        for tp in (1, 2):
            with self.subTest(tp=tp):
                usual = dict(policy="recompute", load_seconds=0.5, lease_seconds=0.5, heterogeneous_tp=True)
                one = self.engine("kv_both", shape, 1, decode_tp=tp, **usual)
                other = self.engine("kv_both", shape, tp, decode_tp=1, is_async=True, **usual)
                Exchange(self, [one, other], 30).run()


class Exchange:
    """Requests between two engines, each of which both prefills and decodes."""

    def __init__(self, test: unittest.TestCase, engines: List[Engine], count: int) -> None:
        self._test, self._engines, self._count = test, engines, count
        self._chosen = random.Random(7)
        self._end = time.monotonic() + 3 * TIMEOUT
        self._prompts: Dict[str, List[int]] = {}
        # When, to which engine, what.
        self._late: List[Tuple[float, int, str]] = []
        self._aborted = 0

    def run(self) -> None:
        for turn in range(self._count):
            name, source = f"request {turn}", turn % 2
            self._prompts[name] = prompt_of(turn % 5, self._chosen.randrange(5, 40))
            engine, target = self._engines[source], self._engines[1 - source]
            engine.add(f"prefill {name}", self._prompts[name], {"do_remote_decode": True})
            while f"prefill {name}" not in engine.params or len(target.scheduler.requests) > 3:
                self._step()
            self._late.append((time.monotonic() + self._chosen.choice((0, 0, 0, 0.6)), 1 - source, name))
        while self._late or not all(engine.is_idle() for engine in self._engines):
            self._step()
        ended = 0
        for engine in self._engines:
            for name in self._prompts.keys() & engine.over.keys():
                ended += 1
                self._test.assertEqual(engine.over[name], "length")
                self._test.assertEqual(engine.tokens[name], following(self._prompts[name], 5), name)
        self._test.assertEqual(ended + self._aborted, self._count)

    def _step(self) -> None:
        self._test.assertLess(time.monotonic(), self._end)
        for due in [late for late in self._late if late[0] <= time.monotonic()]:
            self._late.remove(due)
            self._admit(self._engines[due[1]], self._engines[1 - due[1]].params[f"prefill {due[2]}"], due[2])
        for engine in self._engines:
            engine.step()
        time.sleep(0.001)

    def _admit(self, engine: Engine, params: Dict[str, Any], name: str) -> None:
        engine.add(name, self._prompts[name], params, most=5)
        if self._chosen.random() < 0.2:
            # Before, or soon after its blocks are on their way.
            for _ in range(self._chosen.randrange(3)):
                engine.step()
            if name not in engine.over:
                engine.abort(name)
                self._aborted += 1


if __name__ == "__main__":
    unittest.main()
