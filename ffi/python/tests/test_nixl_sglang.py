"""SGLang's own NIXL manager, sender, receiver and bootstrap server, unmodified, over `crossdock.nixl`.

They come from an installed sglang or its wheel, see engines/sglang.py. Each rank is a process, over host memory
(`kv_data_mem_kinds`), for which SGLang has no slices between ranks that split heads differently. Of the real engine are
not exercised: the scheduler and its queues, a model and its caches on a GPU, states, staging buffers, context
parallelism.
"""

from __future__ import annotations

import os
import tempfile
import unittest
from pathlib import Path
from typing import Any, List, Sequence
from unittest import mock

from engines.loading import set_up
from engines.sglang import why_not
from engines.sglang_nursery import Nursery
from engines.sglang_rank import AUX_ROWS, FAILED, SUCCESS, USUAL, WAITING, Rank, free_port, pages, some_pages

pass_over = set_up(__name__, why_not())

# In front of the ranks' PYTHONPATH. An older PyTorch, or its stand-in, has no `get_device_module`.
ALIAS = """
import types
import torch
from crossdock.nixl import install

install()
if not hasattr(torch, "get_device_module"):
    torch.get_device_module = lambda device: types.SimpleNamespace(set_device=lambda number: None)
"""


def setUpModule() -> None:
    pass_over()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    Path(folder.name, "nixl").mkdir()
    Path(folder.name, "nixl", "__init__.py").write_text(ALIAS)
    # These ranks are not forked from where the other tests' are: there `nixl` is nothing.
    path = os.pathsep.join([folder.name, os.environ.get("PYTHONPATH", "")])
    for patch in (mock.patch.object(Nursery, "_made", None), mock.patch.dict(os.environ, PYTHONPATH=path)):
        patch.start()
        unittest.addModuleCleanup(patch.stop)
    unittest.addModuleCleanup(end_nursery)


def end_nursery() -> None:
    process = Nursery.get().process
    process.kill()
    process.wait()


class HandOvers(unittest.TestCase):
    kind: str
    widths: Sequence[int]

    @classmethod
    def setUpClass(cls) -> None:
        cls.port = free_port()
        cls.prefill = cls.rank("prefill", server=True)
        cls.engines = [[cls.rank("decode", tp=tp, tp_rank=rank) for rank in range(tp)] for tp in cls.widths]
        ranks: List[Rank] = sum(cls.engines, [])
        for rank in (cls.prefill, *ranks):
            rank.answer()
        for rank in ranks:
            rank.ask("ensure", address=cls.prefill.address)

    @classmethod
    def rank(cls, role: str, **options: Any) -> Rank:
        buffers = USUAL["layers"] * (1 if cls.kind == "mla" else 2)
        args = dict(kv_data_mem_kinds=["DRAM"] * buffers)
        env = dict(CROSSDOCK_HOST="127.0.0.1", CROSSDOCK_NIXL_TIMEOUT="1")
        made = Rank(role, cls.port, backend="nixl", kind=cls.kind, args=args, env=env, **options)
        cls.addClassCleanup(made.close)
        return made

    def opened(self, room: int, engine: Sequence[Rank], target: Sequence[int], row: int, prefix: int = 0) -> None:
        self.prefill.ask("new", room=room, address=self.prefill.address)
        for rank in engine:
            rank.ask("new", room=room, address=self.prefill.address)
            rank.call(room, "init", 0)
            self.assertEqual(rank.wait(room, WAITING), WAITING)
            rank.call(room, "send_metadata", pages(target), row, None, prefix)
        self.assertEqual(self.prefill.wait(room, WAITING), WAITING)

    def check_hand_over(self, room: int, engine: Sequence[Rank], chunks: Sequence[int]) -> None:
        count, rows = sum(chunks), (room % AUX_ROWS, (room + 7) % AUX_ROWS)
        source, target = some_pages(room, count), some_pages(room + 1, count)
        self.opened(room, engine, target, rows[1])
        self.prefill.call(room, "init", count, rows[0])
        begin = 0
        for pages_of_chunk in chunks:
            self.prefill.call(room, "send", pages(source[begin : begin + pages_of_chunk]))
            begin += pages_of_chunk
        self.assertEqual(self.prefill.wait(room, SUCCESS), SUCCESS)
        self.prefill.call(room, "clear")
        for rank in engine:
            self.assertEqual(rank.wait(room, SUCCESS), SUCCESS)
            rank.call(room, "clear")
            rank.ask("expect", sources=source, targets=target, aux=rows)
            self.assertEqual(rank.ask("wrong"), [], rank.options)

    def check_hand_overs(self) -> None:
        room = 100
        for engine in self.engines:
            for chunks in ([1], [9], [4, 4, 1], [1] * 7):
                with self.subTest(chunks, width=len(engine)):
                    room += 1
                    self.check_hand_over(room, engine, chunks)


class Mla(HandOvers):
    kind, widths = "mla", (1, 2)

    def test_hand_overs(self) -> None:
        self.check_hand_overs()

    def test_aborted(self) -> None:
        (decode,) = self.engines[0]
        target = some_pages(5, 6)
        self.opened(400, [decode], target, 0)
        self.prefill.call(400, "init", 6, 0)
        decode.call(400, "abort")
        self.assertEqual(decode.wait(400), FAILED)
        self.assertEqual(self.prefill.wait(400), FAILED)
        self.check_hand_over(401, [decode], [2, 2])

    def test_a_decode_rank_that_is_killed(self) -> None:
        decode = self.rank("decode")
        decode.answer()
        decode.ask("ensure", address=self.prefill.address)
        self.check_hand_over(500, [decode], [3])
        target = some_pages(7, 6)
        self.opened(501, [decode], target, 0)
        self.prefill.call(501, "init", 6, 0)
        decode.kill()
        self.prefill.call(501, "send", pages(some_pages(6, 6)))
        self.assertEqual(self.prefill.wait(501, SUCCESS), FAILED)
        self.assertIn("NIXL", str(self.prefill.ask("failure", room=501)["reason"]))
        # The others are served as ever.
        self.check_hand_over(502, self.engines[0], [2, 2])


class Heads(HandOvers):
    kind, widths = "heads", (1,)

    def test_hand_overs(self) -> None:
        self.check_hand_overs()


if __name__ == "__main__":
    unittest.main()
