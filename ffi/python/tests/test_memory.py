"""Memory that was allocated here, and arrays of others."""

from __future__ import annotations

import array
import gc
import mmap
import unittest
import weakref
from typing import Any, Dict

from support import LAYERS, TIMEOUT, Worker, crossdock, numpy, page_numbers, same_pages, small_layout, torch

from crossdock import Memory, MemoryKind

NBYTES = small_layout().region_bytes()


class Allocated(unittest.TestCase):
    def test_zeroed_and_shared(self) -> None:
        with Memory(NBYTES, name="test", huge_pages="try") as memory:
            self.assertEqual((memory.nbytes, len(memory), memory.kind), (NBYTES, NBYTES, MemoryKind.SHARED))
            self.assertGreaterEqual(memory.fd, 0)
            self.assertFalse(any(memory.view))
            memory.view[3] = 7
            self.assertEqual(memory.view[3], 7)
        with self.assertRaises(crossdock.BadHandle):
            memory.view.release()
        memory.close()

    def test_a_view_keeps_it_mapped(self) -> None:
        memory = Memory(NBYTES)
        view = memory.view
        memory.close()
        view[NBYTES - 1] = 9
        del memory
        gc.collect()
        self.assertEqual(view[NBYTES - 1], 9)

    @unittest.skipUnless(numpy, "NumPy is not installed")
    def test_numpy_sees_the_same_bytes(self) -> None:
        memory = Memory(NBYTES)
        seen = numpy.asarray(memory)
        self.assertEqual((seen.dtype, seen.shape, seen.ctypes.data), (numpy.uint8, (NBYTES,), memory.address))
        cache = numpy.frombuffer(memory.view, "u2").reshape(LAYERS, -1)
        cache[1, 5] = 0x1234
        memory.close()
        del memory
        gc.collect()
        self.assertEqual(seen.view("u2").reshape(LAYERS, -1)[1, 5], 0x1234)

    def test_what_cannot_be_allocated(self) -> None:
        with self.assertRaises(crossdock.Error):
            Memory(1 << 60)
        with self.assertRaises(crossdock.BadArgument):
            Memory(NBYTES, huge_pages="perhaps")
        with self.assertRaises(crossdock.BadArgument):
            Memory(NBYTES, name="a\0b")


class Interface:
    """Something with an array interface alone."""

    def __init__(self, name: str, **fields: Any) -> None:
        setattr(self, name, {"version": 3, "typestr": "|u1", **fields})


class Imported(unittest.TestCase):
    def moved(self, ours: Memory) -> None:
        """Moves pages out of the memory and into it."""
        self.assertEqual((ours.kind, ours.nbytes, ours.fd), (MemoryKind.PRIVATE, NBYTES, -1))
        with Worker("prefill", memory=[ours]) as prefill, Worker("decode") as decode:
            prefill.fill(3)
            for here, there in ((prefill, decode), (decode, prefill)):
                peer = there.node.connect(here.node.address)
                with here.node.serve(1, 100, page_numbers(1, 7)) as serving:
                    with there.node.fetch(peer, 1, 100, page_numbers(2, 7)) as fetching:
                        fetching.wait(TIMEOUT).check()
                        fetching.wait_pages(TIMEOUT)
                    serving.wait(TIMEOUT).check()
                peer.close()
                self.assertTrue(same_pages(here, page_numbers(1, 7), there, page_numbers(2, 7), 100))
            decode.node.close()

    def test_bytearray(self) -> None:
        block = bytearray(NBYTES)
        memory = Memory.of(block)
        with self.assertRaises(BufferError):
            block.append(1)
        self.moved(memory)
        self.assertTrue(any(block))
        block.append(1)

    def test_mmap_and_array(self) -> None:
        with mmap.mmap(-1, NBYTES) as block:
            self.moved(Memory.of(block))
        self.moved(Memory.of(array.array("H", bytes(NBYTES))))

    def test_an_address(self) -> None:
        block = bytearray(NBYTES)
        holder = Memory.of(block)
        self.moved(Memory.at(holder.address, NBYTES, owner=block))
        holder.close()

    @unittest.skipUnless(numpy, "NumPy is not installed")
    def test_numpy(self) -> None:
        block = numpy.zeros((LAYERS, NBYTES // LAYERS // 2), "u2")
        self.moved(Memory.of(block))
        self.assertTrue(block.any())

    @unittest.skipUnless(numpy, "NumPy is not installed")
    def test_dlpack(self) -> None:
        class Tensor:
            def __init__(self, block: Any, versions: bool) -> None:
                self.block, self.versions = block, versions

            def __dlpack__(self, **options: Any) -> Any:
                if options and not self.versions:
                    raise TypeError("from before there were versions")
                return self.block.__dlpack__(**options)

            def __dlpack_device__(self) -> Any:
                return self.block.__dlpack_device__()

        for versions in (True, False):
            with self.subTest(versions=versions):
                block = numpy.zeros((4, NBYTES // 16), "f4")
                memory = Memory.of(Tensor(block, versions))
                self.assertEqual(memory.address, block.ctypes.data)
                self.moved(memory)
        with self.assertRaisesRegex(crossdock.BadArgument, "follow each other"):
            Memory.of(Tensor(numpy.zeros((4, 4), "f4")[:, :2], True))
        read_only = numpy.zeros(64, "f4")
        read_only.flags.writeable = False
        with self.assertRaises((crossdock.BadArgument, BufferError)):
            Memory.of(Tensor(read_only, True))

    @unittest.skipUnless(torch, "PyTorch is not installed")
    def test_torch(self) -> None:
        block = torch.zeros(NBYTES // 2, dtype=torch.bfloat16)
        memory = Memory.of(block)
        self.assertEqual(memory.address, block.data_ptr())
        self.moved(memory)

    def test_array_interface(self) -> None:
        holder = Memory.of(bytearray(NBYTES))
        shaped: Dict[str, Any] = dict(shape=(2, NBYTES // 2), data=(holder.address, False))
        self.moved(Memory.of(Interface("__array_interface__", **shaped)))
        self.moved(Memory.of(Interface("__array_interface__", **shaped, strides=(NBYTES // 2, 1))))
        self.moved(Memory.of(Interface("__array_interface__", shape=(NBYTES,), data=bytearray(NBYTES))))
        # A part of another's buffer.
        block = bytearray(100)
        part: Dict[str, Any] = dict(shape=(2, 2), typestr="<u2", data=block, offset=92)
        with Memory.of(Interface("__array_interface__", **part)) as memory:
            memory.view[:] = b"12345678"
        self.assertEqual(bytes(block), bytes(92) + b"12345678")
        for wrong in (dict(offset=93), dict(offset=-1), dict(shape=(51,)), dict(strides=(8, 2)), dict(data=bytes(100))):
            with self.subTest(wrong), self.assertRaises(crossdock.BadArgument):
                Memory.of(Interface("__array_interface__", **{**part, **wrong}))
        for wrong in (dict(strides=(NBYTES, 1)), dict(data=(holder.address, True))):
            with self.subTest(wrong), self.assertRaises(crossdock.BadArgument):
                Memory.of(Interface("__array_interface__", **{**shaped, **wrong}))
        holder.close()

    def test_cuda_is_asked_for_by_number(self) -> None:
        gpu = Interface("__cuda_array_interface__", shape=(64,), data=(0x7F0000000000, False))
        with self.assertRaisesRegex(crossdock.Unsupported, "device 3"):
            Memory.of(gpu, cuda_device=3)
        with self.assertRaises(crossdock.Unsupported):
            Memory.at(0x7F0000000000, 64, cuda_device=0)

    def test_what_is_no_memory(self) -> None:
        with self.assertRaisesRegex(crossdock.BadArgument, "read-only"):
            Memory.of(bytes(64))
        with self.assertRaisesRegex(crossdock.BadArgument, "follow each other"):
            Memory.of(memoryview(bytearray(64))[::2])
        for wrong in (7, "text", None, object()):
            with self.subTest(repr(wrong)), self.assertRaises(TypeError):
                Memory.of(wrong)

    def test_an_array_is_not_given_back_while_a_node_reaches_it(self) -> None:
        block = array.array("B", bytes(NBYTES))
        gone = weakref.ref(block)
        memory = Memory.of(block)
        worker = Worker("worker", memory=[memory])
        del block
        with self.assertRaises(crossdock.Busy) as caught:
            memory.close()
        self.assertTrue(caught.exception.is_retryable)
        worker.views.clear()
        worker.memory.clear()
        # Nobody names it any more; the node does.
        del memory
        gc.collect()
        self.assertIsNotNone(gone())
        worker.close()
        gc.collect()
        self.assertIsNone(gone())


if __name__ == "__main__":
    unittest.main()
