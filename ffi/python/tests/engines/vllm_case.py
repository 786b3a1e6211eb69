"""What the tests of the connector for vLLM share."""

from __future__ import annotations

import logging
import random
import sys
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Sequence
from unittest import mock

from support import TIMEOUT, Case, numpy, torch

from . import vllm

WITHOUT = vllm.load() if numpy is not None and torch is not None else "crossdock.vllm needs NumPy and PyTorch"
if WITHOUT is not None:
    print(f"{WITHOUT}: the connector is not tested", file=sys.stderr)
    raise unittest.SkipTest(WITHOUT)

from .vllm_engine import Engine, Shape  # noqa: E402

KEY = "a key of these tests alone"


class Engines(Case):
    prefill: Engine
    decode: Engine

    def setUp(self) -> None:
        patch = mock.patch.dict("os.environ", {"CROSSDOCK_KEY": KEY})
        patch.start()
        self.addCleanup(patch.stop)
        # What is meant to fail says so.
        log = logging.getLogger("crossdock.vllm")
        self.addCleanup(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)

    def engine(self, role: str, shape: Optional[Shape] = None, tp: int = 1, **options: Any) -> Engine:
        made = Engine(role, shape or Shape(), tp, **options)
        self.addCleanup(made.close)
        return made

    def pair(self, shape: Optional[Shape] = None, **options: Any) -> None:
        self.prefill = self.engine("kv_producer", shape, **options)
        self.decode = self.engine("kv_consumer", shape, **options)

    def until(self, condition: Callable[[], Any], *engines: Engine) -> None:
        begun = time.monotonic()
        while not condition():
            self.assertLess(time.monotonic(), begun + TIMEOUT)
            for engine in engines or (self.prefill, self.decode):
                engine.step()
            time.sleep(0.001)

    def prefilled(self, name: str, prompt: Sequence[int]) -> Dict[str, Any]:
        """What the router is told of a request that the prefill engine has computed."""
        self.prefill.add(name, prompt, {"do_remote_decode": True})
        self.until(lambda: name in self.prefill.over, self.prefill)
        return self.prefill.params[name]

    def decoded(self, name: str, prompt: Sequence[int], params: Optional[Dict[str, Any]], most: int = 3) -> None:
        """Whether it was computed here or elsewhere: the tokens are the right ones."""
        self.decode.add(name, prompt, params, most=most)
        self.until(lambda: name in self.decode.over)
        self.assertEqual(self.decode.over[name], "length")
        self.assertEqual(self.decode.tokens[name], following(prompt, most))

    def hand_over(self, name: str, prompt: Sequence[int], most: int = 3) -> None:
        self.decoded(name, prompt, self.prefilled(name, prompt), most)
        # The last token of the prompt is computed again, as vLLM does it, and all but the last one that is made.
        self.assertEqual(self.decode.computed[name], most)
        self.assertEqual(self.decode.bad, set())
        self.until(lambda: self.prefill.is_idle() and self.decode.is_idle())


def following(prompt: Sequence[int], count: int) -> List[int]:
    """As the engines' model chooses them."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % 997)
    return tokens[len(prompt) :]


def prompt_of(seed: int, count: int) -> List[int]:
    return random.Random(seed).choices(range(997), k=count)
