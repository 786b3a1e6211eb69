"""The connector for vLLM where requests fail, are given up, or do not fit."""

from __future__ import annotations

import unittest
from typing import Any, Dict
from unittest import mock

from support import crossdock, torch

from engines.vllm_case import Engine, Engines, Shape, following, prompt_of

LOG = "crossdock.vllm"


class Faults(Engines):
    def is_over(self) -> bool:
        return self.prefill.is_idle() and self.decode.is_idle()

    def failed(self, name: str, params: Dict[str, Any], why: str) -> None:
        """The request is over with an error, for this reason, and nothing is written."""
        prompt = prompt_of(1, params["crossdock"]["tokens"])
        with self.assertLogs(LOG, "ERROR") as logs:
            self.decode.add(name, prompt, params)
            self.until(lambda: name in self.decode.over and self.decode.is_idle())
        self.assertEqual(self.decode.over[name], "error")
        self.assertIn(why, "\n".join(logs.output))
        # Each of its blocks was reported.
        self.assertEqual(self.decode.bad, set(self.decode.fetches[name].blocks))
        self.assertTrue(self.decode.is_untouched())

    def test_a_lease_that_ends(self) -> None:
        self.prefill = self.engine("kv_producer", lease_seconds=0.1)
        self.decode = self.engine("kv_consumer")
        params = self.prefilled("one", prompt_of(1, 20))
        self.until(self.prefill.is_idle, self.prefill)
        self.failed("one", params, "deadline of the peer")

    def test_a_load_that_fails_is_computed_again(self) -> None:
        self.prefill = self.engine("kv_producer", lease_seconds=0.1)
        self.decode = self.engine("kv_consumer", policy="recompute")
        prompt = prompt_of(1, 20)
        # Of which a prefix stays here.
        self.decoded("a prefix", prompt[:9], None)
        params = self.prefilled("one", prompt)
        self.until(self.prefill.is_idle, self.prefill)
        self.decoded("one", prompt, params)
        self.assertEqual(self.decode.computed["one"], 20 - 8 + 2)
        self.until(self.is_over)

    def test_caches_of_different_forms(self) -> None:
        latent, heads = Shape(is_mla=True, heads=1), Shape()
        for theirs, mine, why in (
            (heads, Shape(block_tokens=8), "block_tokens is 4 on the prefill side, and 8 here"),
            (heads, Shape(dtype=torch.float16), "dtype is 'auto torch.uint8' on the prefill side, and 'auto torch.fl"),
            (heads, Shape(heads=2), "kv_heads is 4 on the prefill side, and 2 here"),
            (heads, Shape(layers=2), "cache is '3 tensors of torch.uint8, each block in 3 pieces of 512 bytes"),
            (heads, Shape(order="LBHNC"), "its dimensions in the order 2, 1, 3'"),
            (heads, Shape(order="LHBNC"), "in 12 pieces of 128 bytes"),
            (heads, Shape(head_bytes=8), "in 3 pieces of 256 bytes"),
            (latent, heads, "kv_heads is 1 on the prefill side, and 4 here"),
        ):
            with self.subTest(why):
                self.prefill = self.engine("kv_producer", theirs, lease_seconds=0.2)
                self.decode = self.engine("kv_consumer", mine)
                self.failed("one", self.prefilled("one", prompt_of(1, 21)), why)
                self.until(self.is_over)

    def test_what_the_nodes_find_out(self) -> None:
        """Forms that the schedulers do not tell from each other."""
        self.prefill = self.engine("kv_producer", lease_seconds=0.5)
        with mock.patch("crossdock.vllm._strips._fingerprint", return_value="layers of other names"):
            self.decode = self.engine("kv_consumer", load_seconds=60)
        self.failed("one", self.prefilled("one", prompt_of(1, 21)), "the two caches do not fit together")
        self.until(self.is_over)

    def test_ranks_that_do_not_fit(self) -> None:
        split = Shape(order="LBHNC")
        for prefill, decode, theirs, mine, why in (
            (1, 2, {}, {}, "serves 1 ranks (its decode_tp), and this side has 2"),
            (2, 1, {"heterogeneous_tp": True, "decode_tp": 1}, {}, "heterogeneous_tp is True on the prefill side"),
            (1, 2, {"heterogeneous_tp": True}, {"heterogeneous_tp": True}, "serves 1 ranks (its decode_tp)"),
        ):
            with self.subTest(why):
                self.prefill = self.engine("kv_producer", split, prefill, lease_seconds=0.2, **theirs)
                self.decode = self.engine("kv_consumer", split, decode, **mine)
                self.failed("one", self.prefilled("one", prompt_of(1, 21)), why)
                self.until(self.is_over)

    def test_another_key(self) -> None:
        self.prefill = self.engine("kv_producer", lease_seconds=0.2)
        with mock.patch.dict("os.environ", {"CROSSDOCK_KEY": "the key of somebody else"}):
            self.decode = self.engine("kv_consumer", load_seconds=1)
        self.failed("one", self.prefilled("one", prompt_of(1, 21)), "refused")
        self.until(self.is_over)

    def test_caches_that_are_registered_late(self) -> None:
        self.prefill = self.engine("kv_producer", is_late=True)
        self.decode = self.engine("kv_consumer", policy="recompute", is_late=True)
        prompt = prompt_of(1, 21)
        with self.assertLogs(LOG, "ERROR") as logs:
            self.prefill.add("early", prompt, {"do_remote_decode": True})
            self.until(lambda: "early" in self.prefill.over, self.prefill)
        self.assertIn("have not told their addresses", "\n".join(logs.output))
        self.assertNotIn("early", self.prefill.params)
        self.prefill.register()
        params = self.prefilled("one", prompt)
        with self.assertLogs(LOG, "ERROR") as logs:
            self.decoded("one", prompt, params)
        self.assertIn("have not told their addresses", "\n".join(logs.output))
        self.assertEqual(self.decode.computed["one"], 21 + 2)
        self.decode.register()
        with self.assertRaises(crossdock.Busy):
            self.decode.register()
        other = prompt_of(2, 21)
        self.hand_over_of_late("two", other)

    def hand_over_of_late(self, name: str, prompt: Any) -> None:
        self.decoded(name, prompt, self.prefilled(name, prompt))
        self.assertEqual(self.decode.computed[name], 3)

    def test_aborted_before_there_are_blocks(self) -> None:
        self.pair(lease_seconds=3600, load_seconds=3600)
        self.decode.add("one", prompt_of(1, 20), self.prefilled("one", prompt_of(1, 20)))
        self.decode.abort("one")
        self.until(self.is_over)
        self.assertTrue(self.decode.is_untouched())

    def test_refused_by_the_decode_side(self) -> None:
        """vLLM tells of it by a request with another prompt, that is aborted at once."""
        heads, latent = Shape(order="LBHNC"), Shape(is_mla=True, heads=1)
        for shape, prefill, decode in ((heads, 1, 1), (heads, 1, 2), (heads, 2, 1), (latent, 1, 2), (latent, 2, 1)):
            with self.subTest(prefill=prefill, decode=decode, is_mla=shape.is_mla):
                usual = dict(heterogeneous_tp=True, lease_seconds=3600, load_seconds=3600)
                self.prefill = self.engine("kv_producer", shape, prefill, decode_tp=decode, **usual)
                self.decode = self.engine("kv_consumer", shape, decode, **usual)
                self.decode.add("one", [0], self.prefilled("one", prompt_of(1, 20)))
                self.decode.abort("one")
                self.until(self.is_over)

    def test_aborted_while_blocks_are_on_their_way(self) -> None:
        self.pair(lease_seconds=3600, load_seconds=3600)
        params = self.prefilled("one", prompt_of(1, 20))
        self.decode.add("one", prompt_of(1, 20), params)
        # The prefill side does not serve it before its next step.
        self.decode.step()
        free = self.decode.free_blocks
        self.decode.abort("one")
        self.assertEqual(self.decode.free_blocks, free)
        self.assertIn("one", self.decode.scheduler.requests)
        self.until(self.decode.is_idle, self.decode)
        self.assertEqual(self.decode.bad, set())
        # It is told all the same.
        self.until(self.is_over)

    def test_aborted_while_both_sides_are_at_it(self) -> None:
        self.pair(Shape(blocks=256), lease_seconds=3600, load_seconds=3600)
        for turn in range(10):
            name, prompt = f"request {turn}", prompt_of(turn, 90)
            params = self.prefilled(name, prompt)
            self.prefill.step()
            self.decode.add(name, prompt, params)
            self.decode.step()
            self.decode.abort(name)
        # Whether they were aborted or delivered: no lease has to end first.
        self.until(self.is_over)

    def test_aborted_by_the_prefill_side(self) -> None:
        self.pair(lease_seconds=3600)
        # Before it is computed: nothing is handed over.
        self.prefill.add("early", prompt_of(1, 90), {"do_remote_decode": True})
        self.prefill.step()
        self.prefill.abort("early")
        self.until(self.prefill.is_idle, self.prefill)
        self.assertNotIn("early", self.prefill.params)
        # Afterwards: it is over there, and its blocks are kept.
        params = self.prefilled("late", prompt_of(1, 20))
        self.prefill.abort("late")
        for _ in range(3):
            self.prefill.step()
        self.assertFalse(self.prefill.is_idle())
        self.decoded("late", prompt_of(1, 20), params)
        self.until(self.is_over)

    def test_params_that_make_no_sense(self) -> None:
        self.pair(lease_seconds=0.2)
        good = self.prefilled("good", prompt_of(1, 10))
        told = good["crossdock"]
        changes: Any = [{"crossdock": None}, {"crossdock": {}}, {"crossdock": "all"}]
        for name, value in (
            ("room", 0),
            ("room", 2**53),
            ("room", "7"),
            ("room", True),
            ("addresses", []),
            ("addresses", ["example.org:80"]),
            ("addresses", ["127.0.0.1:0"]),
            ("addresses", ["127.0.0.1:80"] * 1025),
            ("addresses", "127.0.0.1:80"),
            ("tokens", 11),
            ("tokens", -1),
            ("decode_tp", 0),
            ("form", None),
            ("form", {"block_tokens": []}),
            ("form", {str(at): at for at in range(33)}),
        ):
            changes.append({"crossdock": {**told, name: value}})
        for at, change in enumerate(changes):
            with self.subTest(change), self.assertLogs(LOG, "ERROR"):
                self.decoded(f"request {at}", prompt_of(1, 10), {**good, **change})
        for at, params in enumerate(({}, {"do_remote_prefill": False}, {"do_remote_decode": False})):
            self.decoded(f"without {at}", prompt_of(1, 10), params)
        with self.assertLogs(LOG, "ERROR") as logs:
            self.decode.add("blocks", prompt_of(2, 10), {**good, "crossdock": {**told, "blocks": 2}})
            self.until(lambda: "blocks" in self.decode.over)
        self.assertIn("10 tokens come in 2 blocks of 4", "\n".join(logs.output))
        # Rooms that nobody serves, at an address where nobody is.
        self.decode.add("nobody", [0], {**good, "crossdock": {**told, "addresses": ["127.0.0.1:9"]}})
        self.decode.abort("nobody")
        self.until(self.is_over)

    def test_the_same_params_twice(self) -> None:
        """As for several answers to one prompt, or from a router that tries again: the first one fetches, and
        the others are computed here."""
        self.pair(lease_seconds=3600, load_seconds=3600)
        prompt = prompt_of(1, 20)
        params = self.prefilled("one", prompt)
        with self.assertLogs(LOG, "WARNING") as logs:
            for name in ("first", "second"):
                self.decode.add(name, prompt, params, most=3)
            self.until(lambda: len(self.decode.over) == 2 and self.is_over())
            # Later, and under the name of the first one.
            for name in ("third", "first"):
                self.decode.over.pop(name, None)
                self.decode.tokens.pop(name, None)
                self.decoded(name, prompt, params)
        self.assertEqual(self.decode.over, dict.fromkeys(("first", "second", "third"), "length"))
        for name in ("first", "second", "third"):
            self.assertEqual(self.decode.tokens[name], following(prompt, 3))
        self.assertEqual(len([line for line in logs.output if "another request has fetched" in line]), 3)
        self.assertEqual((list(self.decode.fetches), self.decode.bad), (["first"], set()))
        self.until(self.is_over)

    def test_the_same_params_once_given_up(self) -> None:
        self.pair(lease_seconds=3600, load_seconds=3600)
        prompt = prompt_of(1, 20)
        # Before the other one asks for it: that one is computed here.
        params = self.prefilled("one", prompt)
        self.decode.add("refused", [0], params)
        self.decode.abort("refused")
        self.decoded("first", prompt, params)
        self.assertEqual(self.decode.computed["first"], 20 + 2)
        # While another one fetches it: that one is not disturbed.
        prompt = prompt_of(2, 20)
        params = self.prefilled("two", prompt)
        self.decode.add("second", prompt, params, most=3)
        self.decode.step()
        self.decode.add("refused too", [0], params)
        self.decode.abort("refused too")
        self.until(lambda: "second" in self.decode.over and self.is_over())
        self.assertEqual(self.decode.tokens["second"], following(prompt, 3))
        self.assertEqual(self.decode.computed["second"], 3)
        self.assertNotIn("refused too", self.decode.fetches)

    def test_many_params(self) -> None:
        """No more of them are remembered than a limit, and the latest ones are."""
        self.pair()
        with mock.patch("crossdock.vllm._scheduler._MOST_ROOMS", 2):
            for turn in range(4):
                params = self.prefilled(f"request {turn}", prompt_of(turn, 5))
                self.decoded(f"request {turn}", prompt_of(turn, 5), params)
            self.assertEqual(len(self.decode.scheduler.get_kv_connector()._scheduling._rooms), 2)
            self.decoded("again", prompt_of(3, 5), params)
        self.assertEqual(len(self.decode.fetches), 4)
        self.until(self.is_over)

    def test_many_that_are_given_up(self) -> None:
        """No more than a limit are told of it at a time; the others' leases end."""
        self.pair(lease_seconds=0.3)
        with mock.patch("crossdock.vllm._worker._MOST_LETTING", 2):
            for turn in range(5):
                self.decode.add(f"request {turn}", [0], self.prefilled(f"request {turn}", prompt_of(turn, 5)))
                self.decode.abort(f"request {turn}")
            with self.assertLogs(LOG, "WARNING") as logs:
                self.decode.step()
            self.assertEqual(len([line for line in logs.output if "is not told that it is over" in line]), 3)
        self.until(self.is_over)

    def test_a_shutdown_while_blocks_are_on_their_way(self) -> None:
        self.pair()
        self.decode.add("one", prompt_of(1, 20), self.prefilled("one", prompt_of(1, 20)))
        self.decode.step()
        self.decode.close()
        self.prefill.step()
        self.prefill.close()

    def test_a_restart(self) -> None:
        """Another prefill engine takes the place of one that has said goodbye."""
        self.pair(load_seconds=1)
        prompt = prompt_of(1, 20)
        lost = self.prefilled("lost", prompt)
        self.prefill.close()
        self.prefill = self.engine("kv_producer")
        self.failed("lost", lost, "session")
        self.decoded("again", prompt, self.prefilled("again", prompt))
        self.assertEqual(self.decode.computed["again"], 3)
        self.assertEqual(self.decode.tokens["again"], following(prompt, 3))
        self.until(self.is_over)

    def test_sides(self) -> None:
        made: Engine = self.engine("kv_both")
        with self.assertRaises(RuntimeError):
            made.workers[0].get_num_new_matched_tokens(None, 0)
        with self.assertRaises(RuntimeError):
            made.scheduler.get_kv_connector().register_kv_caches({})
        told = made.workers[0].get_handshake_metadata()
        for handshakes in ({}, {(0, 1): told}, {(0, 0): told, (0, 1): told}):
            with self.assertRaises(RuntimeError):
                made.scheduler.get_kv_connector().set_xfer_handshake_metadata_pp_aware(handshakes)
        with self.assertRaises(ValueError):
            made.scheduler.get_kv_connector().set_xfer_handshake_metadata_pp_aware({(1, 0): told})


if __name__ == "__main__":
    unittest.main()
