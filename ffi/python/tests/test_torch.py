"""Tensors of PyTorch as memory and as page numbers."""

from __future__ import annotations

import gc
import unittest
import weakref
from typing import Any

from support import LAYERS, PAGES, TIMEOUT, Case, Worker, crossdock, numpy, page_numbers, same_pages
from support import small_layout, torch

from crossdock import Memory, MemoryKind

NBYTES = small_layout().region_bytes()
TOKENS = 100


def dtypes(*names: str) -> Any:
    """Those that this PyTorch has."""
    return [getattr(torch, name) for name in names if hasattr(torch, name)]


@unittest.skipUnless(torch, "PyTorch is not installed")
class TensorsAsMemory(Case):
    def test_the_bytes_of_a_tensor_of_every_type(self) -> None:
        names = ("uint8", "int8", "bool", "float16", "bfloat16", "float32", "int64", "complex64", "uint16", "uint32")
        for dtype in dtypes(*names, "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
            with self.subTest(str(dtype)):
                block = torch.zeros(4, 64, dtype=torch.uint8).view(dtype)
                with Memory.of(block) as memory:
                    self.assertEqual(memory.kind, MemoryKind.PRIVATE)
                    self.assertEqual(memory.address, block.data_ptr())
                    self.assertEqual(memory.nbytes, block.numel() * block.element_size())
                    memory.view[-1] = 1
                self.assertEqual(block.view(torch.uint8).reshape(-1)[-1].item(), 1)

    def test_pages_move_out_of_a_tensor_and_into_it(self) -> None:
        """A cache as engines have them: one tensor of layers, pages and what a page holds."""
        for dtype in dtypes("bfloat16", "float8_e4m3fn"):
            with self.subTest(str(dtype)):
                block = torch.zeros(NBYTES, dtype=torch.uint8).view(dtype).reshape(LAYERS, PAGES, -1)
                cache = block.view(torch.uint8)
                with Worker("tensor", memory=[Memory.of(block)]) as ours, Worker("other") as other:
                    theirs = torch.frombuffer(other.memory[0].view, dtype=torch.uint8).reshape(cache.shape)
                    for room, (here, there) in enumerate(((ours, other), (other, ours))):
                        cache[:] = torch.randint(0, 256, cache.shape, dtype=torch.uint8)
                        theirs[:] = torch.randint(0, 256, cache.shape, dtype=torch.uint8)
                        source, target = (cache, theirs) if here is ours else (theirs, cache)
                        before = target.clone()
                        self.pushed(here, there, room)
                        sources, targets = page_numbers(1, 6), page_numbers(2, 6)
                        before[:, targets] = source[:, sources]
                        self.assertTrue(torch.equal(target, before))
                    # The one whose memory is the library's goes first: what a connected peer may reach stays busy.
                    other.node.close()

    def pushed(self, here: Worker, there: Worker, room: int) -> None:
        sources = torch.tensor(page_numbers(1, 6), dtype=torch.int32)
        targets = torch.tensor(page_numbers(2, 6))
        peer = there.node.connect(here.node.address)
        with there.node.receive(peer, room, 96, targets) as receiving:
            with here.node.send(room, 96, sources) as sending:
                sending.send(range(LAYERS))
                sending.finish()
                receiving.wait(TIMEOUT).check()
                receiving.wait_pages(TIMEOUT)
        peer.close()

    def test_a_part_of_a_tensor(self) -> None:
        block = torch.zeros(4, NBYTES, dtype=torch.uint8)
        with Memory.of(block[2]) as memory:
            self.assertEqual((memory.address, memory.nbytes), (block.data_ptr() + 2 * NBYTES, NBYTES))
            memory.view[:3] = b"abc"
        self.assertEqual(block[2, :3].tolist(), list(b"abc"))
        self.assertFalse(block[[0, 1, 3]].any())

    def test_the_tensor_lives_as_long_as_its_memory(self) -> None:
        block = torch.zeros(NBYTES, dtype=torch.uint8)
        gone = weakref.ref(block)
        memory = Memory.of(block)
        del block
        gc.collect()
        # Either the tensor or its storage; in any case the bytes.
        memory.view[:] = b"\7" * NBYTES
        self.assertEqual(memory.view[NBYTES - 1], 7)
        memory.close()
        gc.collect()
        self.assertIsNone(gone())

    def test_shared_and_pinned_by_others(self) -> None:
        block = torch.zeros(NBYTES, dtype=torch.uint8).share_memory_()
        with Memory.of(block) as memory:
            memory.view[5] = 9
        self.assertEqual(block[5].item(), 9)
        parameter = torch.nn.Parameter(torch.zeros(64), requires_grad=False)
        with Memory.of(parameter) as memory:
            self.assertEqual(memory.address, parameter.data_ptr())

    def test_pytorch_sees_memory_that_was_allocated_here(self) -> None:
        memory = Memory(NBYTES)
        cache = torch.frombuffer(memory.view, dtype=torch.bfloat16).reshape(LAYERS, -1)
        self.assertEqual(cache.data_ptr(), memory.address)
        cache[1, 5] = 2.0
        at = (cache.shape[1] + 5) * 2
        self.assertEqual(bytes(memory.view[at : at + 2]), b"\x00\x40")
        memory.close()
        del memory
        gc.collect()
        self.assertEqual(cache[1, 5].item(), 2.0)

    def test_tensors_that_are_no_memory(self) -> None:
        whole = torch.zeros(8, 8)
        for name, wrong in (
            ("transposed", whole.t()),
            ("columns", whole[:, :4]),
            ("steps", torch.zeros(64)[::2]),
            ("expanded", torch.zeros(1).expand(64)),
            ("without memory", torch.zeros(64, device="meta")),
            ("sparse", whole.to_sparse()),
            ("of a gradient", torch.zeros(64, requires_grad=True)),
            ("conjugated", torch.zeros(64, dtype=torch.complex64).conj()),
        ):
            with self.subTest(name), self.assertRaises(crossdock.BadArgument) as caught:
                Memory.of(wrong)
            self.assertTrue(caught.exception.advice)
        with self.assertRaises(crossdock.Error):
            Memory.of(torch.zeros(0))
        for dtype in dtypes("float8_e4m3fn"):
            with self.assertRaises(crossdock.BadArgument):
                Memory.of(torch.zeros(8, 8, dtype=torch.uint8).view(dtype).t())


@unittest.skipUnless(torch and numpy, "PyTorch or NumPy is not installed")
class TensorsAsPageNumbers(Case):
    def setUp(self) -> None:
        self.connected()
        self.sources, self.targets = page_numbers(1, 7), page_numbers(2, 7)
        self.rooms = iter(range(100, 200))

    def moves(self, sources: Any, targets: Any) -> None:
        room = next(self.rooms)
        self.decode.fill(room)
        with self.decode.node.receive(self.peer, room, TOKENS, targets) as receiving:
            # The tensor may go: the library has read it.
            del targets
            with self.prefill.node.send(room, TOKENS, sources) as sending:
                del sources
                sending.send(range(LAYERS))
                sending.finish()
                receiving.wait(TIMEOUT).check()
                receiving.wait_pages(TIMEOUT)
        self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))

    def test_every_type_twice(self) -> None:
        """The second time the type is known."""
        for dtype in dtypes("int32", "int64", "uint32", "uint64"):
            for _ in range(2):
                with self.subTest(str(dtype)):
                    numbers = (torch.tensor(self.sources), torch.tensor(self.targets))
                    self.moves(*(one.to(dtype) for one in numbers))

    def test_a_column_of_a_block_table(self) -> None:
        for dtype in (torch.int32, torch.int64):
            table = torch.zeros(7, 3, dtype=dtype)
            table[:, 1], table[:, 2] = torch.tensor(self.sources), torch.tensor(self.targets)
            self.moves(table[:, 1], table[:, 2])
            rows = table.t().contiguous()
            self.moves(rows[1], rows[2])

    def test_beside_other_kinds(self) -> None:
        self.moves(torch.tensor(self.sources), numpy.array(self.targets, numpy.int32))
        self.moves(self.sources, torch.tensor(self.targets, dtype=torch.int32))
        with self.prefill.node.serve(next(self.rooms), 0, torch.zeros(0, dtype=torch.int64)) as serving:
            serving.cancel()

    def test_what_is_refused(self) -> None:
        long = torch.tensor(self.targets)
        for _ in range(2):
            for name, wrong in (
                ("int16", long.to(torch.int16)),
                ("float", long.to(torch.float32)),
                ("bool", long.to(torch.bool)),
                ("two dimensions", long.reshape(7, 1)),
                ("none", torch.tensor(3)),
                ("without memory", long.to("meta")),
            ):
                with self.subTest(name), self.assertRaises((TypeError, ValueError)):
                    self.decode.node.receive(self.peer, 1, TOKENS, wrong)
            # From now on their types are known.
            self.moves(torch.tensor(self.sources), long)
        for wrong in (-1, PAGES):
            with self.subTest(page=wrong), self.assertRaises(crossdock.PageError):
                self.decode.node.receive(self.peer, 1, TOKENS, torch.tensor([*self.targets[:6], wrong]))
        self.assertEqual(self.decode.pool.stats().free, PAGES)


if __name__ == "__main__":
    unittest.main()
