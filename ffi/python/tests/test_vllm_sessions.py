"""The connector for vLLM where two engines fetch from each other, over the same sessions."""

from __future__ import annotations

import dataclasses
import unittest
from typing import Any, Dict, Set
from unittest import mock

from engines.vllm_case import Engine, Engines, following, prompt_of


class Sessions(Engines):
    def both(self) -> None:
        self.one = self.engine("kv_both", load_seconds=60, lease_seconds=3600)
        self.other = self.engine("kv_both", load_seconds=60, lease_seconds=3600)
        # There are sessions both ways.
        self.moved("there", 1, self.one, self.other)
        self.moved("back", 2, self.other, self.one)

    def computed_by(self, engine: Engine, name: str, seed: int) -> Dict[str, Any]:
        engine.add(f"prefill {name}", prompt_of(seed, 20), {"do_remote_decode": True})
        self.until(lambda: f"prefill {name}" in engine.params, engine)
        return engine.params[f"prefill {name}"]

    def moved(self, name: str, seed: int, source: Engine, target: Engine) -> None:
        self.fetched(name, seed, self.computed_by(source, name, seed), source, target)

    def fetched(self, name: str, seed: int, params: Any, source: Engine, target: Engine) -> None:
        target.add(name, prompt_of(seed, 20), params, most=3)
        self.until(lambda: name in target.over and f"prefill {name}" not in source.scheduler.requests, source, target)
        self.assertEqual(target.tokens[name], following(prompt_of(seed, 20), 3))
        self.assertEqual(target.computed[name], 3)

    def peers(self, engine: Engine) -> Set[str]:
        return set(engine.workers[0]._working._peers)

    def address(self, engine: Engine) -> str:
        return str(engine.workers[0]._working._node.address)

    def hurry(self, engine: Engine) -> None:
        """It waits for blocks no longer than a moment."""
        working = engine.workers[0]._working
        working._settings = dataclasses.replace(working._settings, load_seconds=0.3)

    def test_a_load_that_fails_beside_one_that_does_not(self) -> None:
        """One engine's load runs out of time, and what the other one fetches from it goes on."""
        self.both()
        working = self.one.workers[0]._working
        held: Any = []
        params = self.computed_by(self.one, "good", 3)
        # It is on its way as long as this side does not serve it.
        with mock.patch.object(working, "_serve", lambda *told: held.append(told)):
            self.other.add("good", prompt_of(3, 20), params, most=3)
            self.until(lambda: held and "good" in self.other.workers[0]._working._loading, self.one, self.other)
            bad = self.computed_by(self.other, "bad", 4)
            bad["crossdock"]["room"] ^= 1
            self.hurry(self.one)
            self.one.add("bad", prompt_of(4, 20), bad)
            self.until(lambda: "bad" in self.one.over, self.one, self.other)
            self.assertEqual(self.one.over["bad"], "error")
            for _ in range(20):
                self.other.step()
        self.assertIn("good", self.other.workers[0]._working._loading)
        for told in held:
            working._serve(*told)
        self.until(lambda: "good" in self.other.over, self.one, self.other)
        self.assertEqual(self.other.tokens["good"], following(prompt_of(3, 20), 3))
        self.assertEqual((self.other.computed["good"], self.other.bad), (3, set()))

    def test_sessions_that_are_too_many(self) -> None:
        """They are closed when nothing is fetched over them either way."""
        self.both()
        with mock.patch("crossdock.vllm._worker._IDLE_PEERS", 0):
            params = self.computed_by(self.one, "served", 3)
            self.moved("back again", 4, self.other, self.one)
            self.assertEqual(self.peers(self.one), {self.address(self.other)})
            self.fetched("served", 3, params, self.one, self.other)
            self.assertEqual((self.peers(self.one), self.peers(self.other)), (set(), set()))
            # The next request dials anew.
            self.moved("at last", 5, self.other, self.one)
            params = self.computed_by(self.one, "served too", 6)
            # Beyond a limit they are closed in any case.
            with mock.patch("crossdock.vllm._worker._MOST_PEERS", 0):
                self.moved("and after", 7, self.other, self.one)
            self.assertEqual(self.peers(self.one), set())
            self.fetched("served too", 6, params, self.one, self.other)

    def test_sessions_that_are_lost(self) -> None:
        """They are dialed until nothing is served, and no longer."""
        self.both()
        third = self.engine("kv_both")
        self.moved("from it", 3, third, self.one)
        gone = self.address(third)
        params = self.computed_by(self.one, "served", 4)
        lost = self.computed_by(third, "lost", 5)
        third.close()
        self.hurry(self.one)
        self.one.add("lost", prompt_of(5, 20), lost)
        self.until(lambda: "lost" in self.one.over, self.one, self.other)
        self.assertEqual(self.one.over["lost"], "error")
        self.assertEqual(self.peers(self.one), {gone, self.address(self.other)})
        self.fetched("served", 4, params, self.one, self.other)
        self.until(lambda: gone not in self.peers(self.one), self.one)
        self.assertEqual(self.peers(self.one), {self.address(self.other)})


if __name__ == "__main__":
    unittest.main()
