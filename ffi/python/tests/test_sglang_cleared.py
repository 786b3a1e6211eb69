"""What is left of a request that was aborted or cleared, over `crossdock.sglang`: nothing, also where SGLang clears it
twice, or never. As test_sglang."""

from __future__ import annotations

import unittest
from typing import List

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_engine import Engines, Request
from engines.sglang_rank import FAILED, Rank, pages

setUpModule = set_up(__name__, why_not())

STEPS = ["create", "handshake", "grant", "admit"]


def kept(rank: Rank) -> List[int]:
    """How much SGLang and the manager keep of requests."""
    names = ["request_status", "failure_records"]
    is_prefill = rank.options["role"] == "prefill"
    names += ["transfer_infos", "_begun", "_taken", "_unclaimed"] if is_prefill else ["prefill_response_tracker"]
    return [rank.ask("manager", name=name) for name in names]


class Cleared(Engines):
    wanted = {"prefill": dict(role="prefill"), "decode": dict(role="decode")}

    def until(self, count: int) -> Request:
        """As far as so many steps."""
        request = self.request("prefill", "decode", 4)
        for name in STEPS[:count]:
            getattr(request, name)()
        return request

    def test_aborts_that_nobody_clears(self) -> None:
        """As SGLang's prefill scheduler aborts a request that waits."""
        (prefill,), (decode,) = self.engines["prefill"].ranks, self.engines["decode"].ranks
        nothing = kept(prefill)
        self.assertEqual(nothing, [0] * 6)
        for count in range(1, len(STEPS) + 1):
            for times in (1, 2):
                with self.subTest(STEPS[count - 1], times=times):
                    request = self.until(count)
                    for _ in range(times):
                        prefill.call(request.room, "abort")
                    self.assertEqual(kept(prefill), nothing)
                    self.assertEqual(int(prefill.call(request.room, "poll")), FAILED)
                    # The scheduler may ask why, or go on, all the same.
                    prefill.call(request.room, "init", 4, 0)
                    prefill.call(request.room, "send", pages([1]))
                    self.assertEqual(kept(prefill), nothing)
                    self.assertEqual(request.failure(prefill), "Aborted by AbortReq.")
                    if count < 3:
                        decode.call(request.room, "abort")
                    else:
                        self.assertEqual(request.failure(decode), "the prefill side: Aborted by AbortReq.")
                    request.released()
                    self.assertEqual([kept(prefill), kept(decode)], [nothing, [0] * 3])
                    self.request("prefill", "decode", 4, room=request.room, target=request.target).run([1, 3])

    def test_cleared_again_when_the_number_is_used_again(self) -> None:
        """SGLang clears what has failed a second time when its pages are home, hours later maybe."""
        for side in ("prefill", "decode"):
            for way in ("abort", "failure_exception", "clear"):
                with self.subTest(side, way=way):
                    self.check_again(side, way)

    def check_again(self, side: str, way: str) -> None:
        first = self.until(2)
        ranks = [self.engines["prefill"].ranks[0], self.engines["decode"].ranks[0]]
        for rank in ranks:
            rank.call(first.room, "abort")
            rank.ask("failure", room=first.room)
        second = self.request("prefill", "decode", 4, room=first.room)
        for rank in ranks:
            rank.ask("new", room=first.room, name=0, address=first.address)
        here = ranks[side == "decode"]
        if way == "failure_exception":
            self.assertEqual(here.ask("failure", room=first.room)["reason"], "Aborted by AbortReq.")
        else:
            here.call(first.room, way)
        for rank in ranks:
            rank.ask("rename", room=0, name=first.room)
        second.handshake()
        second.grant()
        second.admit()
        second.send_chunks([2, 2])
        second.finished()

    def test_cleared_while_it_moves(self) -> None:
        """The other side is told, and no reason is left for the next request of the number."""
        for side in ("prefill", "decode"):
            with self.subTest(side):
                request = self.until(4)
                request.send(0, 2)
                (prefill,), (decode,) = request.prefill, request.decode
                here, there = (prefill, decode) if side == "prefill" else (decode, prefill)
                here.call(request.room, "clear")
                self.assertEqual(here.ask("manager", name="failure_records"), 0)
                self.assertIn("the request was given up", request.failure(there))
                self.assertEqual(request.failure(here), "the request was given up")
                request.released()
                there.call(request.room, "clear")
                self.request("prefill", "decode", 4, room=request.room, target=request.target).run()


if __name__ == "__main__":
    unittest.main()
