"""Aborts on either side at every stage, killed and halted processes, peers that do not fit, over `crossdock.sglang`.

As test_sglang: SGLang's own modules, a process for each rank, host memory. After every fault a request moves through
the same pages.
"""

from __future__ import annotations

import os
import signal
import unittest
from typing import Any, Callable, List, Tuple

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_engine import Engine, Engines, Request
from engines.sglang_rank import FAILED, SUCCESS, RankError, pages

setUpModule = set_up(__name__, why_not())


def step(request: Request, name: str) -> None:
    if name == "some":
        request.send(0, 2)
    elif name == "all":
        request.send(2, 4)
    else:
        getattr(request, name)()


STEPS = ["create", "handshake", "grant", "admit", "some", "all"]


class Aborts(Engines):
    wanted = {
        "prefill": dict(role="prefill"),
        "decode": dict(role="decode"),
        "pair": dict(role="decode", tp=2),
        "two": dict(role="prefill", tp=2, kind="heads"),
        "heads": dict(role="decode", kind="heads"),
    }

    def check_stages(self, decode: str, abort: Callable[[Request], Tuple[List[Any], List[Any]]], words: str) -> None:
        """At each stage: those that abort know it as SGLang tells it, the others are told why, nothing is left, and the
        same pages and the same number serve the next request."""
        for stage in range(1, len(STEPS)):
            with self.subTest(STEPS[stage - 1]):
                request = self.request("prefill", decode, 4)
                for name in STEPS[:stage]:
                    step(request, name)
                here, there = abort(request)
                for rank in here:
                    self.assertEqual(request.failure(rank), "Aborted by AbortReq.")
                # Who has not told the other side of the request is told when it does.
                if stage >= STEPS.index("grant"):
                    if stage == STEPS.index("grant"):
                        request.grant()
                    for rank in there:
                        self.assertRegex(request.failure(rank), words)
                else:
                    for rank in there:
                        rank.call(request.room, "abort")
                request.released()
                for rank in [*here, *there]:
                    rank.call(request.room, "clear")
                    self.assertEqual(rank.ask("manager", name="request_status"), 0, rank.options)
                self.request("prefill", decode, 4, room=request.room, target=request.target).run([1, 3])

    def test_by_the_decode_side(self) -> None:
        def abort(request: Request) -> Tuple[List[Any], List[Any]]:
            for rank in request.decode:
                rank.call(request.room, "abort")
            return request.decode, request.prefill

        for decode in ("decode", "pair"):
            with self.subTest(decode):
                self.check_stages(decode, abort, "^the decode side: Aborted by AbortReq.$")

    def test_by_the_prefill_side(self) -> None:
        def abort(request: Request) -> Tuple[List[Any], List[Any]]:
            request.prefill[0].call(request.room, "abort")
            return request.prefill, request.decode

        for decode in ("decode", "pair"):
            with self.subTest(decode):
                self.check_stages(decode, abort, "^the prefill side: Aborted by AbortReq.$")

    def test_after_all_is_sent(self) -> None:
        """It may have been delivered before: then it is, on both sides."""
        for by in ("prefill", "decode"):
            with self.subTest(by):
                request = self.request("prefill", "decode", 4).opened()
                request.send_chunks([4])
                getattr(request, by)[0].call(request.room, "abort")
                outcomes = [rank.wait(request.room, SUCCESS) for rank in (*request.prefill, *request.decode)]
                self.assertIn(FAILED, outcomes)
                request.released()
                request.prefill[0].call(request.room, "clear")
                self.request("prefill", "decode", 4, target=request.target, room=request.room).run()

    def test_one_rank_of_two(self) -> None:
        """The decode engine's other rank is told by its own room."""
        request = self.request("prefill", "pair", 4).opened()
        request.send(0, 2)
        one, other = request.decode
        one.call(request.room, "abort")
        self.assertEqual(request.failure(one), "Aborted by AbortReq.")
        self.assertIn("the decode side: Aborted", request.failure(request.prefill[0]))
        request.prefill[0].call(request.room, "clear")
        told = "the prefill side: another rank of the decode side: Aborted by AbortReq."
        self.assertEqual(request.failure(other), told)
        request.released()
        self.request("prefill", "pair", 4, target=request.target).run()

    def test_one_prefill_rank_of_two(self) -> None:
        """The other one learns why by way of the decode side."""
        request = self.request("two", "heads", 4).opened()
        request.send(0, 2)
        one, other = request.prefill
        one.call(request.room, "abort")
        (decode,) = request.decode
        self.assertEqual(request.failure(decode), "the prefill side: Aborted by AbortReq.")
        self.assertEqual(request.failure(other), "the decode side: the prefill side: Aborted by AbortReq.")
        request.released()
        one.call(request.room, "clear")
        self.request("two", "heads", 4, target=request.target).run([1, 3])

    def test_what_comes_late_opens_nothing(self) -> None:
        request = self.request("prefill", "decode", 4)
        request.create()
        request.handshake()
        (prefill,), (decode,) = request.prefill, request.decode
        prefill.call(request.room, "abort")
        prefill.call(request.room, "clear")
        request.grant()
        self.assertEqual(request.failure(decode), "the prefill side: Aborted by AbortReq.")
        self.assertEqual(prefill.ask("manager", name="request_status"), 0)
        self.assertEqual(prefill.ask("manager", name="transfer_infos"), 0)
        request.released()

    def test_pages_that_are_in_use(self) -> None:
        """An allocator that hands pages out twice is told so, before a peer could write them."""
        first = self.request("prefill", "decode", 4).opened()
        second = self.request("prefill", "decode", 4, target=first.target)
        second.create()
        second.handshake()
        second.grant()
        self.assertIn("page", second.failure(second.decode[0]))
        second.prefill[0].call(second.room, "abort")
        second.clear()
        first.send_chunks([4])
        first.finished()

    def test_pages_and_rows_that_are_not_there(self) -> None:
        request = self.request("prefill", "decode", 2, target=[0, 48])
        request.create()
        request.handshake()
        request.grant()
        self.assertRegex(request.failure(request.decode[0]), "48")
        request.prefill[0].call(request.room, "abort")
        request.clear()
        request = self.request("prefill", "decode", 2).opened()
        request.prefill[0].call(request.room, "send", pages([0, 99]))
        self.assertRegex(request.failure(request.prefill[0]), "99")
        self.assertIn("99", request.failure(request.decode[0]))
        request.released()
        request = self.request("prefill", "decode", 2)
        request.rows = (99, 0)
        request.opened()
        request.send(0, 2)
        self.assertIn("metadata row 99", request.failure(request.prefill[0]))
        self.assertIn("metadata row 99", request.failure(request.decode[0]))
        request.released()
        self.request("prefill", "decode", 2, target=request.target).run()


class Lost(unittest.TestCase):
    """Processes that are killed or stand still."""

    def start(self, **env: str) -> Tuple[Engine, Engine]:
        made = [Engine(role, env=env) for role in ("prefill", "decode")]
        for engine in made:
            self.addCleanup(engine.close)
        for engine in made:
            engine.ready()
        return made[0], made[1]

    def again(self, role: str) -> Engine:
        engine = Engine(role)
        self.addCleanup(engine.close)
        engine.ready()
        return engine

    def test_prefill_is_killed(self) -> None:
        prefill, decode = self.start()
        moving = Request(prefill, decode, 4).opened()
        moving.send(0, 2)
        granted = Request(prefill, decode, 3, target=[page for page in range(7) if page not in moving.target][:3])
        granted.create()
        granted.handshake()
        granted.grant()
        prefill.ranks[0].kill()
        for request in (moving, granted):
            self.assertRegex(request.failure(decode.ranks[0]), "lost|silent|closed|reset")
            request.released()
        self.check_next(self.again("prefill"), decode, moving)

    def test_decode_is_killed(self) -> None:
        prefill, decode = self.start()
        request = Request(prefill, decode, 4).opened()
        request.send(0, 2)
        decode.ranks[0].kill()
        self.assertRegex(request.failure(prefill.ranks[0]), "lost|silent|closed|reset")
        prefill.ranks[0].call(request.room, "clear")
        self.check_next(prefill, self.again("decode"), request)

    def test_prefill_stands_still(self) -> None:
        """Nobody knows whether it writes still: the pages are kept, whatever the scheduler believes."""
        prefill, decode = self.start(SGLANG_DISAGGREGATION_WAITING_TIMEOUT="1")
        (rank,) = decode.ranks
        request = Request(prefill, decode, 4).opened()
        after = Request(prefill, decode, 4, target=request.target)
        after.create()
        after.handshake()
        request.send(0, 2)
        rank.wait(request.room, 3)
        os.kill(prefill.ranks[0].process.pid, signal.SIGSTOP)
        self.assertRegex(request.failure(rank), "deadline|expired|timed out")
        self.assertFalse(rank.ask("is_safe", room=request.room))
        after.grant()
        self.assertRegex(after.failure(rank), "page")
        rank.call(after.room, "clear")
        os.kill(prefill.ranks[0].process.pid, signal.SIGCONT)
        request.released()

    def test_nobody_answers(self) -> None:
        """SGLang's own times: the prefill side is never told of pages, the decode side never sent any."""
        prefill, decode = self.start(
            SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT="1", SGLANG_DISAGGREGATION_WAITING_TIMEOUT="1"
        )
        request = Request(prefill, decode, 2)
        request.create_prefill()
        other = Request(prefill, decode, 2)
        other.create_decode()
        other.handshake()
        other.grant()
        self.assertIn("timed out", request.failure(prefill.ranks[0]))
        self.assertRegex(other.failure(decode.ranks[0]), "timed out|deadline|expired")
        other.released()

    def check_next(self, prefill: Engine, decode: Engine, before: Request) -> None:
        Request(prefill, decode, 4, target=before.target).run([2, 2])


class Misfits(Engines):
    """Sides that cannot serve each other say why."""

    wanted = {
        "prefill": dict(role="prefill"),
        "mooncake": dict(role="prefill", backend="mooncake"),
        "dtype": dict(role="decode", dtype="float16"),
        "page": dict(role="decode", page_tokens=8),
        "layers": dict(role="decode", layers=4),
        "bytes": dict(role="decode", head_bytes=64),
        "mamba": dict(role="prefill", kind="heads", states=[dict(type="mamba", rows=6, bytes=96)]),
        "half of mamba": dict(role="decode", kind="heads", tp=2, states=[dict(type="mamba", rows=6, bytes=48)]),
        "no mamba": dict(role="decode", kind="heads"),
    }

    def test_what_sglang_compares(self) -> None:
        for name, words in (("dtype", "dtype mismatch.*bfloat16.*float16"), ("page", "Page size mismatch")):
            with self.subTest(name), self.assertRaisesRegex(RankError, words):
                self.engines[name].meet(self.engines["prefill"].address)

    def test_what_crossdock_compares(self) -> None:
        for name, words in (
            ("layers", "3 layers on the prefill side, and 4 here"),
            ("bytes", "pages of 128 bytes on the prefill side, and of 256 here"),
        ):
            with self.subTest(name):
                self.check_refused("prefill", name, words)

    def test_another_backend(self) -> None:
        self.check_refused("mooncake", "layers", "tells nothing of crossdock")

    def test_state_that_ranks_split(self) -> None:
        self.check_refused(
            "mamba", "half of mamba", "state: [['mamba', [96, 96]]] on the prefill side, and [['mamba', [48, 48]]] here"
        )
        self.check_refused("mamba", "no mamba", "state: [['mamba', [96, 96]]] on the prefill side, and [] here")

    def check_refused(self, prefill: str, decode: str, words: str) -> None:
        request = self.request(prefill, decode, 2)
        request.create_decode()
        for rank in request.decode:
            rank.call(request.room, "init", 0)
            self.assertIn(words, request.failure(rank))

    def test_no_server_starts_with_what_is_not_supported(self) -> None:
        for options, words in (
            (dict(args={"is_hybrid_mla_backend": True}), "is_hybrid_mla_backend"),
            (dict(args={"mla_compression_ratios": [4, 128]}), "mla_compression_ratios"),
            (dict(args={"host_kv_data_ptrs": [1]}), "host_kv_data_ptrs"),
            (dict(args={"num_draft_entries": 3}), "3 buffers \\(3 of a draft model"),
            (dict(args={"kv_item_lens": [128, 128, 64]}), "pages of \\[64, 128\\] bytes"),
            (dict(args={"kv_data_lens": [6144, 6144, 6143]}), "in 6143 bytes"),
            (dict(kind="heads", args={"kv_data_ptrs": [64], "kv_data_lens": [64], "kv_item_lens": [64]}), "1 buffers"),
            (dict(states=[dict(type="dsa_tail", rows=4, bytes=64)]), "dsa_tail"),
            (dict(parallel={"attn_cp_size": 2}), "context parallelism"),
            (dict(parallel={"attn_dcp_size": 2}), "decode context parallelism"),
            (dict(env={"SGLANG_DISAGG_STAGING_BUFFER": "1"}), "STAGING_BUFFER"),
            (dict(env={"SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE": "0"}), "DEFERRED_DECODE_KV_RELEASE"),
            (dict(env={"SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "30"}), "after 30.*RELEASE_TIMEOUT="),
            (dict(env={"SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "nan"}), "after nan seconds"),
            (dict(role="prefill", env={"SGLANG_RUST_SERVER": "1"}), "SGLANG_RUST_SERVER"),
            (dict(role="prefill", pp=2, draft=[64]), "draft model.*pipeline"),
            (dict(args={"kv_data_ptrs": [8 << 40] * 3}), "GPU memory"),
        ):
            with self.subTest(words):
                engine = Engine(**{"role": "decode", **options})
                self.addCleanup(engine.close)
                with self.assertRaisesRegex(RankError, f"Unsupported.*{words}"):
                    engine.ready()


if __name__ == "__main__":
    unittest.main()
