"""SGLang's own Mooncake manager, sender, receiver and bootstrap server, unmodified, over `crossdock.mooncake`.

They come from an installed sglang or its wheel, see engines/sglang.py. Each rank is a process, over host memory. Of the
real engine are not exercised: the scheduler and its queues, the model and its caches on a GPU, torch.distributed's
groups, staging buffers, context parallelism.
"""

from __future__ import annotations

import unittest
from typing import Any, Dict

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_engine import Engine, Engines, Request
from engines.sglang_rank import FAILED

setUpModule = set_up(__name__, why_not())


def engines(**options: Any) -> Dict[str, Dict[str, Any]]:
    usual = dict(backend="mooncake", **options)
    return {
        "one": dict(role="prefill", **usual),
        "two": dict(role="prefill", tp=2, **usual),
        "decode": dict(role="decode", **usual),
        "pair": dict(role="decode", tp=2, **usual),
    }


class Latents(Engines):
    wanted = engines()

    def test_ranks_to_ranks(self) -> None:
        for prefill in ("one", "two"):
            for decode in ("decode", "pair"):
                for chunks in ([1], [4, 4, 1]):
                    with self.subTest(prefill=prefill, decode=decode, chunks=chunks):
                        self.request(prefill, decode, sum(chunks)).run(chunks)

    def test_chunks(self) -> None:
        for chunks in ([9], [1] * 7):
            with self.subTest(chunks):
                self.request("one", "decode", sum(chunks)).run(chunks)

    def test_a_prefix_that_is_there(self) -> None:
        self.request("one", "decode", 5, prefix=8).run([3, 2])

    def test_nothing_but_metadata(self) -> None:
        self.request("one", "decode", 0, prefix=16).run([0])

    def test_aborted(self) -> None:
        for by in ("decode", "prefill"):
            with self.subTest(by):
                request = self.request("one", "decode", 6).opened()
                request.send(0, 2)
                (prefill,), (decode,) = request.prefill, request.decode
                (prefill if by == "prefill" else decode).call(request.room, "abort")
                if by == "prefill":
                    # SGLang's Mooncake backend does not tell the decode side.
                    decode.call(request.room, "abort")
                for rank in (prefill, decode):
                    self.assertEqual(rank.wait(request.room), FAILED)
                self.assertEqual(decode.ask("failure", room=request.room)["reason"], "Aborted by AbortReq.")
                # What is sent now goes nowhere.
                request.send(2, 6)
                self.assertEqual(prefill.ask("failure", room=request.room)["kind"], "KVTransferError")
                request.clear()
                self.request("one", "decode", 6, target=request.target).run([2, 4])

    def test_memory_is_unregistered_and_registered_again(self) -> None:
        (rank,) = self.engines["one"].ranks
        for name in ("deregister_buffer_to_engine", "register_buffer_to_engine"):
            self.assertIsNone(rank.ask("manager", name=name, args=[]))
        self.request("one", "decode", 3).run()


class Heads(Engines):
    wanted = engines(kind="heads")

    def test_ranks_to_ranks(self) -> None:
        for prefill in ("one", "two"):
            for decode in ("decode", "pair"):
                for chunks in ([1], [4, 4, 1]):
                    with self.subTest(prefill=prefill, decode=decode, chunks=chunks):
                        self.request(prefill, decode, sum(chunks)).run(chunks)


class State(Engines):
    STATES = [dict(type="mamba", rows=6, bytes=96, tensors=4), dict(type="swa", rows=10, bytes=256, tensors=2)]
    USUAL = dict(backend="mooncake", kind="heads", states=STATES)
    wanted = {"prefill": dict(role="prefill", **USUAL), "decode": dict(role="decode", **USUAL)}

    def test_it_comes_with_the_last_chunk(self) -> None:
        for states in ([([2], [5]), ([4, 1, 7], [0, 9, 3])], [([0], [0]), ([8], [1])]):
            with self.subTest(states):
                self.request("prefill", "decode", 5, states=states).run([2, 3])


class Window(Engines):
    """Pages of a sliding window whose heads the ranks share."""

    wanted = engines(kind="heads", states=[dict(type="swa", rows=10, bytes=40, heads=True, tensors=6)])

    def test_ranks_to_ranks(self) -> None:
        for prefill in ("one", "two"):
            for decode in ("decode", "pair"):
                with self.subTest(prefill=prefill, decode=decode):
                    self.request(prefill, decode, 5, states=[([4, 1, 7], [0, 9, 3])]).run([2, 3])


class Lost(unittest.TestCase):
    def start(self, role: str) -> Engine:
        engine = Engine(role, backend="mooncake", env={"MC_TRANSFER_TIMEOUT": "5"})
        self.addCleanup(engine.close)
        engine.ready()
        return engine

    def test_decode_is_killed(self) -> None:
        """The transfer answers an error, and the sender fails. The next decode engine is served."""
        prefill, decode = self.start("prefill"), self.start("decode")
        request = Request(prefill, decode, 4).opened()
        request.send(0, 2)
        decode.ranks[0].kill()
        request.send(2, 4)
        self.assertEqual(prefill.ranks[0].wait(request.room), FAILED)
        self.assertIn("Failed to send kv chunk", prefill.ranks[0].ask("failure", room=request.room)["reason"])
        Request(prefill, self.start("decode"), 4).run([2, 2])


if __name__ == "__main__":
    unittest.main()
