"""What the sides tell each other over SGLang's control sockets, late, twice, for another use of a number, or by a
stranger. As test_sglang."""

from __future__ import annotations

import json
import sys
import unittest
from typing import Any, List

from engines.sglang import why_not
from engines.sglang_engine import Engines, Request
from engines.sglang_rank import BOOTSTRAPPING, WAITING, Rank

REASON = why_not()
if REASON and __name__ != "__main__":
    print(f"test_sglang_messages: skipped: {REASON}", file=sys.stderr)


def setUpModule() -> None:
    if REASON:
        raise unittest.SkipTest(REASON)


def frames_of(tag: str, **fields: Any) -> List[str]:
    return [f"CROSSDOCK_{tag}", json.dumps(fields)]


class Messages(Engines):
    wanted = {
        "prefill": dict(role="prefill"),
        "decode": dict(role="decode"),
        "pair": dict(role="decode", tp=2),
    }

    def decode_of(self, request: Request) -> dict[str, Any]:
        """How the decode rank names itself."""
        manager = request.decode[0]
        return dict(
            endpoint=manager.ask("manager", name="local_ip"), dst_port=manager.ask("manager", name="rank_port")
        )

    def aborted(self, request: Request, use_count: int, reason: str = "because") -> None:
        frames = frames_of(
            "ABORTED", room=request.room, use_count=use_count, reason=reason, **self.decode_of(request)
        )
        request.prefill[0].ask("tell", to="_decode_has_aborted", frames=frames)

    def failed(self, request: Request, use_count: int) -> None:
        frames = frames_of("FAILED", room=request.room, use_count=use_count, rank=0, reason="because")
        request.decode[0].ask("tell", to="_prefill_has_failed", frames=frames)

    def test_of_another_use_of_the_number(self) -> None:
        first = self.request("prefill", "decode", 3)
        first.run()
        second = self.request("prefill", "decode", 3, room=first.room)
        second.create()
        self.aborted(second, 0)
        second.handshake()
        second.grant()
        self.aborted(second, 0)
        self.failed(second, 0)
        second.admit()
        second.send(0, 2)
        self.aborted(second, 0)
        self.failed(second, 0)
        self.failed(second, 7)
        second.send(2, 3)
        second.finished()
        # Nothing of what comes after the end opens it anew.
        ranks = [*second.prefill, *second.decode]
        before = [rank.ask("manager", name="failure_records") for rank in ranks]
        self.aborted(second, 1)
        self.failed(second, 1)
        self.assertEqual([rank.ask("manager", name="failure_records") for rank in ranks], before)
        self.assertEqual([rank.ask("manager", name="request_status") for rank in ranks], [0, 0])

    def test_of_this_use(self) -> None:
        for by in ("prefill", "decode"):
            with self.subTest(by):
                request = self.request("prefill", "decode", 3).opened()
                request.send(0, 2)
                if by == "prefill":
                    self.failed(request, 0)
                    self.assertEqual(request.failure(request.decode[0]), "the prefill side: because")
                else:
                    self.aborted(request, 0)
                    self.assertEqual(request.failure(request.prefill[0]), "the decode side: because")
                request.released()
                request.prefill[0].call(request.room, "clear")
                # Into the same pages: what came of the first may be anything.
                self.request("prefill", "decode", 3, target=request.target).run()

    def test_aborted_before_the_request_has_come(self) -> None:
        request = self.request("prefill", "decode", 3)
        request.create_decode()
        request.handshake()
        request.grant()
        request.decode[0].call(request.room, "abort")
        request.released()
        # Another message follows on the same connection, so the first one has come when the second one has.
        after = self.request("prefill", "decode", 3, target=request.target)
        after.run()
        request.create_prefill()
        self.assertEqual(request.failure(request.prefill[0]), "the decode side: Aborted by AbortReq.")
        request.prefill[0].call(request.room, "clear")
        self.request("prefill", "decode", 3, room=request.room, target=request.target).run()

    def test_one_rank_of_two_never_comes_as_far(self) -> None:
        """Both count the uses of the number alike all the same."""
        request = self.request("prefill", "pair", 3)
        request.create()
        one, other = request.decode
        one.call(request.room, "abort")
        other.call(request.room, "init", 0)
        request.expect(other, WAITING)
        other.call(request.room, "abort")
        request.released()
        request.prefill[0].call(request.room, "abort")
        request.prefill[0].call(request.room, "clear")
        self.request("prefill", "pair", 3, room=request.room, target=request.target).run([2, 1])

    def test_another_engine_uses_the_number_again(self) -> None:
        """It counts from 0 as the first one did, and comes before its request does."""
        first = self.request("prefill", "decode", 3)
        first.run([2, 1])
        second = self.request("prefill", "pair", 3, room=first.room)
        second.create_decode()
        second.handshake()
        second.grant()
        second.create_prefill()
        second.admit()
        second.send_chunks([1, 2])
        second.finished()

    def test_rooms_that_nobody_serves(self) -> None:
        """The prefill side keeps the latest ones, so many."""
        prefill: Rank = self.engines["prefill"].ranks[0]
        waiting = [prefill.ask("manager", name=name) for name in ("transfer_infos", "request_status")]
        self.assertEqual(waiting, [0, 0])
        limits = dict(MOST_UNCLAIMED=2)
        prefill.ask("tell", to="_decode_has_aborted", limits=limits, frames=self.stranger(1))
        for at in range(2, 6):
            prefill.ask("tell", to="_decode_has_opened", frames=self.stranger(at, "OPENED"))
        self.assertEqual(prefill.ask("manager", name="_unclaimed"), 2)
        self.assertEqual(prefill.ask("manager", name="transfer_infos"), 2)
        self.assertEqual(prefill.ask("manager", name="request_status"), 2)
        # One that was dropped, and one that was not.
        for room, status in ((2, BOOTSTRAPPING), (5, WAITING)):
            prefill.ask("new", room=room, address=prefill.address)
            self.assertEqual(int(prefill.call(room, "poll")), status)
            prefill.call(room, "abort")
            prefill.call(room, "clear")
        self.request("prefill", "decode", 2).run()

    def stranger(self, room: int, tag: str = "ABORTED") -> List[str]:
        usual = dict(room=room, use_count=0, endpoint="127.0.0.1", dst_port=9)
        if tag == "ABORTED":
            return frames_of(tag, reason="", **usual)
        more = dict(rank=0, is_dummy=False, required_dst_info_num=1, pages=1, decode_prefix_len=0)
        return frames_of(tag, **usual, **more)

    def test_what_makes_no_sense(self) -> None:
        import zmq

        request = self.request("prefill", "decode", 2)
        request.create()
        context = zmq.Context()
        self.addCleanup(context.destroy, 0)
        opened = json.loads(self.stranger(request.room, "OPENED")[1])
        wrong = [
            [],
            None,
            7,
            {},
            {**opened, "room": -1},
            {**opened, "room": 2**64},
            {**opened, "room": "7"},
            {**opened, "is_dummy": 1},
            {**opened, "pages": True},
            {**opened, "pages": 1.5},
            {**opened, "endpoint": None},
            {**opened, "more": 1},
        ]
        for rank in (*request.prefill, *request.decode):
            socket = context.socket(zmq.PUSH)
            port = rank.ask("manager", name="rank_port")
            socket.connect(f"tcp://127.0.0.1:{port}")
            for frames in (
                [b""],
                [b"", b""],
                [b"ABORT", b"x"],
                [b"7", b"0", b"0"],
                [b"\xff" * 5000],
                [b"x"] * 1000,
                [b"CROSSDOCK_OPENED"],
                [b"CROSSDOCK_OPENED", b"{"],
                [b"CROSSDOCK_OPENED", b"\xff"],
                [b"CROSSDOCK_OPENED", b"[" * 100000],
                [b"CROSSDOCK_FAILED", b"{}"],
                [b"CROSSDOCK_OPENED", json.dumps(opened).encode(), b""],
                *([b"CROSSDOCK_OPENED", json.dumps(one).encode()] for one in wrong),
            ):
                socket.send_multipart(frames)
        request.handshake()
        request.grant()
        request.admit()
        request.send_chunks([1, 1])
        request.finished()

    def test_a_room_that_a_stranger_opens(self) -> None:
        """With numbers that no rank would tell: the request fails with words, and no more."""
        prefill: Rank = self.engines["prefill"].ranks[0]
        for room, wrong, words in (
            (70, dict(pages=2**63), "expects"),
            (71, dict(rank=2**40), "rank|fit|range|argument"),
            (72, dict(use_count=2**63), "use_count"),
        ):
            with self.subTest(**wrong):
                told = {**json.loads(self.stranger(room, "OPENED")[1]), **wrong}
                prefill.ask("tell", to="_decode_has_opened", frames=frames_of("OPENED", **told))
                prefill.ask("new", room=room, address=prefill.address)
                self.assertEqual(prefill.wait(room, WAITING), WAITING)
                prefill.call(room, "init", 1, 0)
                self.assertEqual(prefill.wait(room), 0)
                self.assertRegex(prefill.ask("failure", room=room)["reason"], words)
        self.request("prefill", "decode", 2).run()


if __name__ == "__main__":
    unittest.main()
