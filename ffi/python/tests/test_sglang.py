"""SGLang's schedulers' calls over `crossdock.sglang`: every form of cache and of parallelism that is supported, every
byte.

SGLang's own modules (CommonKVManager and what belongs to it, the bootstrap server) come from an installed sglang or its
wheel, see engines/sglang.py. Each rank is a process, over host memory. Of the real engine are not exercised: the
scheduler and its queues, the model and its caches on a GPU, torch.distributed's groups.
"""

from __future__ import annotations

import json
import random
import unittest
import urllib.error
import urllib.request
from typing import Any

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_engine import Engines
from engines.sglang_rank import SUCCESS, TRANSFERRING, WAITING, pages

setUpModule = set_up(__name__, why_not())


class Latents(Engines):
    """MLA: one rank of the prefill side brings all."""

    wanted = {
        "one": dict(role="prefill"),
        "two": dict(role="prefill", tp=2),
        "decode": dict(role="decode"),
        "pair": dict(role="decode", tp=2),
    }

    def test_chunks(self) -> None:
        for chunks in ([1], [9], [4, 4, 1], [1] * 7):
            with self.subTest(chunks):
                self.request("one", "decode", sum(chunks)).run(chunks)

    def test_other_numbers_of_ranks(self) -> None:
        for prefill, decode in (("one", "pair"), ("two", "decode"), ("two", "pair")):
            # Two rooms: where several ranks could bring it, they take turns.
            for room in (2**62 + 4, 2**62 + 5):
                with self.subTest(prefill=prefill, decode=decode, room=room):
                    self.request(prefill, decode, 5, room=room).run([3, 2])

    def test_a_prefix_that_is_there(self) -> None:
        self.request("one", "decode", 4, prefix=8).run([2, 2])

    def test_nothing_but_metadata(self) -> None:
        """The decode side has all pages already."""
        request = self.request("one", "decode", 0, prefix=16)
        request.run([0])

    def test_a_number_that_is_used_again(self) -> None:
        for _ in range(3):
            self.request("one", "decode", 3, room=77).run([2, 1])

    def test_status_only_goes_up(self) -> None:
        request = self.request("one", "decode", 6)
        request.create()
        (prefill,), (decode,) = request.prefill, request.decode
        self.assertEqual([int(rank.call(request.room, "poll")) for rank in (prefill, decode)], [1, 1])
        request.handshake()
        request.grant()
        request.admit()
        self.assertEqual(int(decode.call(request.room, "poll")), WAITING)
        request.send(0, 2)
        self.assertEqual(int(prefill.call(request.room, "poll")), TRANSFERRING)
        self.assertEqual(decode.wait(request.room, TRANSFERRING), TRANSFERRING)
        request.send(2, 6)
        request.finished()
        # It is told still, and the cleared room is not there any more.
        for rank in (prefill, decode):
            self.assertEqual(int(rank.call(request.room, "poll")), SUCCESS)
            self.assertEqual(rank.ask("manager", name="request_status"), 0)

    def test_what_was_moved(self) -> None:
        request = self.request("one", "decode", 5)
        request.run([3, 2])
        nbytes, seconds = request.prefill[0].call(request.room, "get_transfer_metric")
        self.assertEqual(nbytes, 5 * 3 * 4 * 32)
        self.assertGreater(seconds, 0)

    def test_many_at_once(self) -> None:
        free = random.Random(3).sample(range(48), 48)
        requests = [self.request("one", "decode", 3, target=free[3 * at : 3 * at + 3]) for at in range(16)]
        # Each has a metadata row of its own: there are as many.
        for at, request in enumerate(requests):
            request.rows = (at, at)
        for step in ("create", "handshake", "grant", "admit"):
            for request in requests:
                getattr(request, step)()
        for begin in range(3):
            for request in random.Random(begin).sample(requests, len(requests)):
                request.send(begin, begin + 1)
        # Who has not been checked yet would differ from what is expected.
        for request in requests:
            for rank in request.decode:
                request.expect(rank, SUCCESS)
                rank.ask("expect", sources=request.source, targets=request.target, aux=request.rows)
        for request in requests:
            request.finished()

    def test_more_pages_than_the_decode_side_has(self) -> None:
        """As SGLang's other backends: they are not sent."""
        request = self.request("one", "decode", 4)
        request.create()
        request.handshake()
        request.grant()
        request.count, request.source = 6, request.source + [0, 1]
        request.admit()
        request.send(0, 5)
        request.send(5, 6)
        request.source = request.source[:4]
        request.finished()


class Heads(Engines):
    """GQA: ranks share the heads; and pipeline stages, which share the layers."""

    wanted = {
        "one": dict(role="prefill", kind="heads"),
        "two": dict(role="prefill", kind="heads", tp=2),
        "stages": dict(role="prefill", kind="heads", pp=2),
        "decode": dict(role="decode", kind="heads"),
        "pair": dict(role="decode", kind="heads", tp=2),
        "decode stages": dict(role="decode", kind="heads", pp=2),
    }

    def test_ranks_to_ranks(self) -> None:
        for prefill in ("one", "two", "stages"):
            for decode in ("decode", "pair"):
                for chunks in ([1], [4, 4, 1]):
                    with self.subTest(prefill=prefill, decode=decode, chunks=chunks):
                        self.request(prefill, decode, sum(chunks)).run(chunks)

    def test_stages_to_stages(self) -> None:
        for chunks in ([1], [4, 4, 1]):
            with self.subTest(chunks):
                self.request("stages", "decode stages", sum(chunks)).run(chunks)


class OneHead(Engines):
    """Fewer heads than ranks: two ranks keep the same one."""

    wanted = {
        "two": dict(role="prefill", kind="heads", heads=1, tp=2),
        "decode": dict(role="decode", kind="heads", heads=1),
        "pair": dict(role="decode", kind="heads", heads=1, tp=2),
    }

    def test_one_of_them_brings_it(self) -> None:
        for decode in ("decode", "pair"):
            for room in (10, 11):
                with self.subTest(decode=decode, room=room):
                    self.request("two", decode, 4, room=room).run([2, 2])


class FourRanks(Engines):
    """Two heads over four ranks, two of which keep the same one."""

    wanted = {
        "four": dict(role="prefill", kind="heads", heads=2, tp=4),
        "two": dict(role="prefill", kind="heads", heads=2, tp=2),
        "decode": dict(role="decode", kind="heads", heads=2),
        "pair": dict(role="decode", kind="heads", heads=2, tp=2),
        "decode four": dict(role="decode", kind="heads", heads=2, tp=4),
    }

    def test_ranks_to_ranks(self) -> None:
        for prefill in ("four", "two"):
            for decode in ("decode", "pair", "decode four"):
                for room in (20, 21):
                    with self.subTest(prefill=prefill, decode=decode, room=room):
                        self.request(prefill, decode, 4, room=room).run([3, 1])


class State(Engines):
    """Rows of a Mamba state, and pages of a sliding window, beside the tokens."""

    STATES = [dict(type="mamba", rows=6, bytes=96, tensors=4), dict(type="swa", rows=10, bytes=256, tensors=2)]
    wanted = {
        "prefill": dict(role="prefill", states=STATES, kind="heads"),
        "decode": dict(role="decode", states=STATES, kind="heads"),
    }

    def test_it_comes_with_the_last_chunk(self) -> None:
        for states in (
            [([2], [5]), ([4, 1, 7], [0, 9, 3])],
            [([0], [0]), ([], [])],
        ):
            with self.subTest(states):
                self.request("prefill", "decode", 5, states=states).run([2, 3])

    def test_lists_that_do_not_fit(self) -> None:
        request = self.request("prefill", "decode", 2, states=[([1], [2]), ([1, 2], [3, 4])])
        request.opened()
        request.states = [([1], [2]), ([1], [3, 4])]
        request.send(0, 2)
        reasons = [request.failure(rank) for rank in (*request.decode, *request.prefill)]
        self.assertTrue(any("do not fit" in reason for reason in reasons), reasons)
        request.released()
        # Into the same pages: what came of the first may be anything.
        states = [([1], [2]), ([1, 2], [3, 4])]
        self.request("prefill", "decode", 2, states=states, target=request.target).run()

    def test_another_number_of_lists(self) -> None:
        three = [pages([1]), pages([2]), pages([3])]
        request = self.request("prefill", "decode", 2)
        request.create()
        request.handshake()
        request.decode[0].call(request.room, "send_metadata", pages(request.target), 1, three, 0)
        self.assertIn("pages for 4 pools; the layout has 3", request.failure(request.decode[0]))
        self.assertIn("the decode side: pages for 4 pools", request.failure(request.prefill[0]))
        request.clear()
        request = self.request("prefill", "decode", 2, states=[([1], [2]), ([1], [3])]).opened()
        request.prefill[0].call(request.room, "send", pages(request.source), three)
        self.assertIn("pool 3 of 3", request.failure(request.prefill[0]))
        self.assertIn("the prefill side: pages for pool 3 of 3", request.failure(request.decode[0]))
        request.released()
        request.prefill[0].call(request.room, "clear")
        self.request("prefill", "decode", 2, states=[([1], [2]), ([1], [3])], target=request.target).run()


class Replicated(Engines):
    """State that every rank keeps whole, and a draft model's cache, between different numbers of ranks."""

    ROW = [dict(type="request_row", rows=8, bytes=24, tensors=1)]
    INDEX = [dict(type="dsa", rows=48, bytes=64, tensors=3)]
    wanted = {
        "two": dict(role="prefill", kind="heads", tp=2, states=ROW),
        "decode": dict(role="decode", kind="heads", states=ROW),
        "latents": dict(role="prefill", states=INDEX, draft=[128, 64]),
        "pair of latents": dict(role="prefill", tp=2, states=INDEX, draft=[128, 64]),
        "decode latents": dict(role="decode", states=INDEX, draft=[128, 64]),
        "decode pair of latents": dict(role="decode", tp=2, states=INDEX, draft=[128, 64]),
        "without a draft": dict(role="decode", states=INDEX),
    }

    def test_rows_of_requests(self) -> None:
        self.request("two", "decode", 3, states=[([5], [2])]).run([2, 1])

    def test_an_index_and_a_draft(self) -> None:
        for prefill in ("latents", "pair of latents"):
            for decode in ("decode latents", "decode pair of latents"):
                for room in (2**62 + 40, 2**62 + 41):
                    with self.subTest(prefill=prefill, decode=decode, room=room):
                        request = self.request(prefill, decode, 5, room=room)
                        request.states = [(request.source, request.target)]
                        request.run([3, 2])

    def test_a_draft_on_one_side_only(self) -> None:
        request = self.request("latents", "without a draft", 2)
        request.create_decode()
        request.decode[0].call(request.room, "init", 0)
        words = r"a draft model's pages: \[128, 64\] on the prefill side, and \[\] here"
        self.assertRegex(request.failure(request.decode[0]), words)


class OverTcp(Engines):
    """As between hosts."""

    USUAL = dict(kind="heads", states=State.STATES[:1], env={"CROSSDOCK_PORTS": "tcp"})
    wanted = {"prefill": dict(role="prefill", **USUAL), "decode": dict(role="decode", **USUAL)}

    def test_tokens_state_and_metadata(self) -> None:
        self.request("prefill", "decode", 9, states=[([2], [5])]).run([4, 4, 1])
        ports = self.engines["decode"].ranks[0].ask("ports")
        self.assertEqual(ports, ["tcp"])


class Window(Engines):
    """Pages of a sliding window whose heads the ranks share, beside those of all tokens."""

    order = "nhd"

    @classmethod
    def setUpClass(cls) -> None:
        states = [
            dict(type="swa", rows=10, bytes=40, heads=True, tensors=6),
            dict(type="request_row", rows=8, bytes=24, tensors=1),
        ]
        env = {"SGLANG_USE_HND_KVCACHE": "1"} if cls.order == "hnd" else {}
        usual = dict(kind="heads", states=states, order=cls.order, env=env)
        cls.wanted = {
            "one": dict(role="prefill", **usual),
            "two": dict(role="prefill", tp=2, **usual),
            "decode": dict(role="decode", **usual),
            "pair": dict(role="decode", tp=2, **usual),
            **cls.wanted,
        }
        super().setUpClass()

    def test_ranks_to_ranks(self) -> None:
        for prefill in ("one", "two"):
            for decode in ("decode", "pair"):
                for states in ([([4, 1, 7], [0, 9, 3]), ([5], [2])], [([], []), ([0], [0])]):
                    with self.subTest(prefill=prefill, decode=decode, states=states):
                        self.request(prefill, decode, 5, states=states).run([2, 3])


class WindowHeadsFirst(Window):
    """SGLang's pools with the heads before the tokens of a page."""

    order = "hnd"
    wanted = {"others": dict(role="decode", kind="heads")}

    def test_not_to_another_order(self) -> None:
        request = self.request("one", "others", 2)
        request.create_decode()
        request.decode[0].call(request.room, "init", 0)
        self.assertIn("order within a page: hnd on the prefill side, and nhd here", request.failure(request.decode[0]))


class DataParallel(Engines):
    """Two prefill engines behind one bootstrap server."""

    wanted = {
        "prefill": dict(role="prefill", dp=2, balance="round_robin"),
        "decode": dict(role="decode"),
    }

    def test_the_rank_is_asked_for(self) -> None:
        for dp_rank in (1, 0):
            request = self.request("prefill", "decode", 3, dp_rank=dp_rank)
            request.create_prefill()
            found = self.engines["decode"].ranks[0].ask("dp_ranks", room=request.room, address=request.address)
            self.assertEqual(found, {str(request.room): dp_rank})
            request.create_decode()
            request.handshake()
            request.grant()
            request.admit()
            request.send_chunks([1, 2])
            request.finished()

    def get(self, path: str) -> Any:
        address = self.engines["prefill"].address
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
            return json.loads(response.read())

    def test_what_the_bootstrap_server_answers(self) -> None:
        route = "/route?prefill_dp_rank={}&prefill_cp_rank={}&target_tp_rank={}&target_pp_rank={}"
        whole = self.get(route.format(-1, -1, -1, -1))
        self.assertEqual((whole["dp_size"], whole["attn_tp_size"], whole["page_size"]), (2, 1, 4))
        # What SGLang's own decode side makes its structure of takes no other names.
        self.assertNotIn("crossdock", whole)
        ranks = [self.get(route.format(dp, 0, 0, 0)) for dp in range(2)]
        self.assertEqual({*ranks[0]}, {"rank_ip", "rank_port", "crossdock"})
        self.assertNotEqual(ranks[0]["crossdock"]["address"], ranks[1]["crossdock"]["address"])
        for wrong, status in ((route.format(2, 0, 0, 0), 404), ("/route?prefill_dp_rank=0", 400)):
            with self.assertRaises(urllib.error.HTTPError) as caught:
                self.get(wrong)
            self.assertEqual(caught.exception.code, status)
            caught.exception.close()


if __name__ == "__main__":
    unittest.main()
