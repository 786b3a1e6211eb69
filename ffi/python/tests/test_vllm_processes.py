"""The connector for vLLM between processes, of which some are stopped or killed."""

from __future__ import annotations

import time
import unittest
from typing import Any, Callable, Dict

from support import TIMEOUT, script_environment

from engines.vllm_case import KEY, Engines, Shape, following, prompt_of
from engines.vllm_process import Process

# So large that a transfer over TCP takes a while.
LARGE = Shape(layers=8, heads=8, block_tokens=32, head_bytes=2048, blocks=9)
LONG = prompt_of(1, 220)


class Processes(Engines):
    def start(self, role: str, shape: Shape, tp: int = 1, **options: Any) -> Process:
        process = Process({**script_environment(), "CROSSDOCK_KEY": KEY}, role, shape, tp, **options)
        self.addCleanup(process.kill)
        return process

    def computed_by(self, process: Process, name: str, prompt: Any) -> Dict[str, Any]:
        """A request that a prefill engine has computed: what the router is told."""
        process.add(name, prompt, {"do_remote_decode": True})
        told = process.heard(name, TIMEOUT)["params"]
        assert isinstance(told, dict)
        return told

    def until_idle(self, process: Process, timeout: float = TIMEOUT) -> None:
        begun = time.monotonic()
        while not process.is_idle(TIMEOUT):
            self.assertLess(time.monotonic(), begun + timeout)
            time.sleep(0.01)

    def step_until(self, condition: Callable[[], Any]) -> None:
        self.until(condition, self.decode)

    def test_ranks_in_processes(self) -> None:
        """Each engine is one process, with all its ranks."""
        heads, latent = Shape(order="LBHNC"), Shape(is_mla=True, heads=1)
        for shape, prefill, decode in ((heads, 1, 1), (heads, 1, 2), (heads, 2, 1), (latent, 2, 1)):
            with self.subTest(prefill=prefill, decode=decode, is_mla=shape.is_mla):
                options = dict(heterogeneous_tp=True, decode_tp=decode)
                source = self.start("kv_producer", shape, prefill, **options)
                target = self.start("kv_consumer", shape, decode, **options)
                prompts = {f"request {turn}": prompt_of(turn, 9 + 11 * turn) for turn in range(3)}
                for name, prompt in prompts.items():
                    target.add(name, prompt, self.computed_by(source, name, prompt), most=4)
                for name, prompt in prompts.items():
                    told = target.heard(name, TIMEOUT)
                    self.assertEqual((told["over"], told["tokens"]), ("length", following(prompt, 4)))
                    # Nothing of the prompt but its last token.
                    self.assertEqual(told["computed"], 4)
                self.until_idle(source)
                self.until_idle(target)
                source.kill()
                target.kill()

    def is_being_written(self) -> bool:
        """Whether some of what is loaded is here, and some is not."""
        layers = self.decode.caches[0]
        first, last = layers["model.layers.0.attn"], layers[f"model.layers.{LARGE.layers - 1}.attn"]
        ids = self.decode.fetches["one"].blocks if "one" in self.decode.fetches else []
        return bool(ids) and bool(first[ids[0], 0, 0, 0]) and not bool(last[ids[-1], -1, 0, 0])

    def test_a_prefill_engine_that_is_killed(self) -> None:
        """While its blocks are read, over TCP. The request is computed here then, and another engine serves the next
        one."""
        self.decode = self.engine("kv_consumer", LARGE, policy="recompute", ports="tcp")
        hits = 0
        for _ in range(2):
            process = self.start("kv_producer", LARGE, ports="tcp")
            params = self.computed_by(process, "one", LONG)
            self.decode.add("one", LONG, params, most=2)
            begun = time.monotonic()
            self.decode.step()
            while not self.is_being_written() and not self.decode.workers[0]._working._loading["one"].room.poll():
                self.assertLess(time.monotonic(), begun + TIMEOUT)
            process.kill()
            self.step_until(lambda: "one" in self.decode.over)
            self.assertEqual(self.decode.tokens.pop("one"), following(LONG, 2))
            self.decode.over.clear()
            if self.decode.bad:
                hits += 1
                self.assertEqual(self.decode.bad, set(self.decode.fetches["one"].blocks))
                break
            self.forget()
        if not hits:
            print("all was read before the prefill engine was killed")
        self.forget()
        process = self.start("kv_producer", LARGE, ports="tcp")
        self.decode.add("again", LONG, self.computed_by(process, "again", LONG), most=2)
        self.step_until(lambda: "again" in self.decode.over)
        self.assertEqual(self.decode.tokens["again"], following(LONG, 2))
        self.assertEqual(self.decode.computed["again"], 2)

    def forget(self) -> None:
        """So that nothing of a prompt is found here."""
        self.assertTrue(self.decode.scheduler.reset_prefix_cache())
        for layers in self.decode.caches:
            for layer in layers.values():
                layer.zero_()
        self.decode.fetches.clear()
        self.decode.bad.clear()

    def test_a_decode_engine_that_is_killed(self) -> None:
        """Its prefill engine holds the blocks until it knows, or until the lease ends, and no longer."""
        self.prefill = self.engine("kv_producer", LARGE, lease_seconds=3, ports="tcp")
        process = self.start("kv_consumer", LARGE, ports="tcp")
        self.assertTrue(process.is_idle(TIMEOUT))
        process.add("before", LONG[:40], self.prefilled("before", LONG[:40]), most=2)
        self.until(self.prefill.is_idle, self.prefill)
        self.assertEqual(process.heard("before", TIMEOUT)["tokens"], following(LONG[:40], 2))
        # While it reads, or before: whatever it is at.
        process.add("one", LONG, self.prefilled("one", LONG), most=2)
        for _ in range(5):
            self.prefill.step()
        process.kill()
        self.until(self.prefill.is_idle, self.prefill)


if __name__ == "__main__":
    unittest.main()
