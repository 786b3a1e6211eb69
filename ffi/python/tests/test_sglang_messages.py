"""What the sides tell each other over SGLang's control sockets, late, twice, for another use of a number, or by a
stranger. As test_sglang."""

from __future__ import annotations

import json
import unittest
from typing import Any, List, Tuple

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_engine import Engines, Request
from engines.sglang_rank import BOOTSTRAPPING, FAILED, TIMEOUT, WAITING, Rank

setUpModule = set_up(__name__, why_not())


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

    def listener(self) -> Tuple[Any, int]:
        """Where a stranger is told how it went."""
        import zmq

        context = zmq.Context()
        self.addCleanup(context.destroy, 0)
        socket = context.socket(zmq.PULL)
        self.addCleanup(socket.close, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT * 1000))
        return socket, socket.bind_to_random_port("tcp://127.0.0.1")

    def refused(self, socket: Any) -> Tuple[int, str]:
        tag, told = socket.recv_multipart()
        self.assertEqual(tag, b"CROSSDOCK_FAILED")
        return json.loads(told)["use_count"], json.loads(told)["reason"]

    def test_an_engine_that_is_gone_has_opened_it(self) -> None:
        """With any count of its own: the one that opens it later is served, and the first one told."""
        prefill: Rank = self.engines["prefill"].ranks[0]
        for decode, gone in (
            ("decode", dict(use_count=5)),
            ("decode", dict(use_count=0)),
            ("decode", dict(use_count=0, rank=1)),
            ("decode", dict(use_count=3, rank=1, required_dst_info_num=2)),
            ("pair", dict(use_count=5)),
            ("pair", dict(use_count=0)),
        ):
            for is_begun in (False, True):
                with self.subTest(decode, gone=gone, is_begun=is_begun):
                    socket, port = self.listener()
                    request = self.request("prefill", decode, 3)
                    if is_begun:
                        request.create_prefill()
                    opened = json.loads(self.stranger(request.room, "OPENED")[1])
                    frames = frames_of("OPENED", **{**opened, "dst_port": port, **gone})
                    prefill.ask("tell", to="_decode_has_opened", frames=frames)
                    request.create_decode()
                    request.handshake()
                    request.grant()
                    used = (gone["use_count"], "another request uses the number of this one")
                    self.assertEqual(self.refused(socket), used)
                    if not is_begun:
                        request.create_prefill()
                    request.admit()
                    request.send_chunks([1, 2])
                    request.finished()

    def test_another_engine_opens_what_is_served(self) -> None:
        """It is refused, and what moves is not disturbed; nor is it by what this engine aborts."""
        request = self.request("prefill", "decode", 3).opened()
        request.send(0, 2)
        opened = json.loads(self.stranger(request.room, "OPENED")[1])
        for wrong in (dict(use_count=9), dict(use_count=0), dict(use_count=0, rank=3, required_dst_info_num=2)):
            socket, port = self.listener()
            frames = frames_of("OPENED", **{**opened, "dst_port": port, **wrong})
            request.prefill[0].ask("tell", to="_decode_has_opened", frames=frames)
            told = (wrong["use_count"], "another request uses the number of this one")
            self.assertEqual(self.refused(socket), told)
        aborted = json.loads(self.stranger(request.room)[1])
        frames = frames_of("ABORTED", **{**aborted, "use_count": 9})
        request.prefill[0].ask("tell", to="_decode_has_aborted", frames=frames)
        request.send(2, 3)
        request.finished()

    def test_an_earlier_use_by_the_same_engine(self) -> None:
        """Comes late: it is answered."""
        request = self.request("prefill", "decode", 3)
        request.create_prefill()
        socket, port = self.listener()
        opened = {**json.loads(self.stranger(request.room, "OPENED")[1]), "dst_port": port}
        for use_count in (4, 3):
            frames = frames_of("OPENED", **{**opened, "use_count": use_count})
            request.prefill[0].ask("tell", to="_decode_has_opened", frames=frames)
        self.assertEqual(self.refused(socket), (3, "the number was used again"))
        request.prefill[0].call(request.room, "abort")

    def test_an_abort_of_long_ago(self) -> None:
        """Says nothing about a request that has its number."""
        prefill: Rank = self.engines["prefill"].ranks[0]
        for seconds, status in ((30.0, FAILED), (0.0, BOOTSTRAPPING)):
            with self.subTest(seconds=seconds):
                request = self.request("prefill", "decode", 2)
                limits = dict(_OVER_SECONDS=seconds)
                prefill.ask("tell", to="_decode_has_aborted", limits=limits, frames=self.stranger(request.room))
                request.create_prefill()
                self.assertEqual(int(prefill.call(request.room, "poll")), status)
                prefill.call(request.room, "abort")
        late = self.request("prefill", "decode", 2)
        prefill.ask("tell", to="_decode_has_aborted", frames=self.stranger(late.room))
        prefill.ask("tell", to="_decode_has_aborted", limits=dict(_OVER_SECONDS=30.0), frames=self.stranger(0))
        late.run()

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
            self.addCleanup(socket.close, 0)
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
