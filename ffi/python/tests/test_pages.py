"""Pages between two nodes of one process, byte by byte."""

from __future__ import annotations

import array
import time
import unittest
from typing import Any, List

from support import LAYERS, PAGES, PAGE_TOKENS, TIMEOUT, Case, Worker, crossdock, numpy, page_numbers, same_pages, torch

TOKENS = 100


class Pages(Case):
    def setUp(self) -> None:
        self.connected()
        self.count = self.decode.layout.pages_for(TOKENS)
        self.sources, self.targets = page_numbers(1, self.count), page_numbers(2, self.count)

    def push(self, room: int, sources: Any, targets: Any) -> None:
        with self.decode.node.receive(self.peer, room, TOKENS, targets) as receiving:
            with self.prefill.node.send(room, TOKENS, sources) as sending:
                sending.send(range(LAYERS))
                sending.finish()
                sending.wait(TIMEOUT).check()
            receiving.wait(TIMEOUT).check()
            receiving.wait_pages(TIMEOUT)

    def test_pushed_layer_by_layer(self) -> None:
        receiving = self.decode.node.receive(self.peer, 7, TOKENS, self.targets, tag="request 7")
        self.assertIsNone(receiving.poll())
        sending = self.prefill.node.send(7, TOKENS, self.sources)
        for layer in range(LAYERS):
            sending.send(layer, range(0, 60))
        for layer in range(LAYERS):
            sending.send(layer, range(60, TOKENS))
        sending.finish(b"first token")
        end = receiving.wait(TIMEOUT)
        self.assertEqual((end.outcome, end.by, end.stage), (crossdock.Outcome.DELIVERED, None, None))
        self.assertEqual(end.aux, b"first token")
        self.assertTrue(end.is_delivered)
        self.assertIn("prefill", end.message)
        self.assertIs(receiving.end, end)
        self.assertIs(receiving.wait(0), end)
        self.assertEqual(receiving.tag, "request 7")
        receiving.wait_pages(TIMEOUT)
        self.assertEqual(sending.wait(TIMEOUT).aux, b"")
        self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))
        self.assertEqual(self.decode.pool.stats().free, PAGES)
        sending.close()
        receiving.close()

    def test_pulled(self) -> None:
        aux = array.array("f", [0.25, 0.5])
        with self.prefill.node.serve(8, TOKENS, self.sources, aux=aux) as serving:
            with self.decode.node.fetch(self.peer, 8, TOKENS, self.targets) as fetching:
                self.assertEqual(fetching.wait(TIMEOUT).check().aux, aux.tobytes())
                fetching.wait_pages(TIMEOUT)
            serving.wait(TIMEOUT).check()
        self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))

    def test_a_prefix_is_not_sent(self) -> None:
        before = bytes(self.decode.page(0, self.targets[0]))
        skipped = 2 * PAGE_TOKENS
        with self.decode.node.receive(self.peer, 9, TOKENS, self.targets[2:], skip_tokens=skipped) as receiving:
            with self.prefill.node.send(9, TOKENS, self.sources) as sending:
                sending.send(range(LAYERS))
                sending.finish()
                receiving.wait(TIMEOUT).check()
                receiving.wait_pages(TIMEOUT)
        rest = TOKENS - skipped
        self.assertTrue(same_pages(self.prefill, self.sources[2:], self.decode, self.targets[2:], rest))
        self.assertEqual(bytes(self.decode.page(0, self.targets[0])), before)

    def test_a_peer_is_named_by_its_number(self) -> None:
        # The decode side has dialed, and the prefill side asks for pages the other way round.
        with self.prefill.node.peer_by_number(self.decode.node.number) as peer:
            with self.decode.node.serve(10, TOKENS, self.targets) as serving:
                with self.prefill.node.fetch(crossdock.Source(peer), 10, TOKENS, self.sources) as fetching:
                    fetching.wait(TIMEOUT).check()
                    fetching.wait_pages(TIMEOUT)
                serving.wait(TIMEOUT).check()
            with self.assertRaises(crossdock.WrongKind):
                peer.wait(TIMEOUT)
        self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))

    def test_page_numbers_of_each_kind(self) -> None:
        for at, form in enumerate("iIlLqQ"):
            with self.subTest(form):
                self.push(100 + at, array.array(form, self.sources), memoryview(array.array(form, self.targets)))
                self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))
        self.push(110, tuple(self.sources), iter(self.targets))
        self.push(111, range(self.count), range(self.count, 2 * self.count))
        self.assertTrue(
            same_pages(self.prefill, range(self.count), self.decode, range(self.count, 2 * self.count), TOKENS)
        )

    def test_page_numbers_with_gaps_between_them_are_copied(self) -> None:
        spread: List[int] = []
        for number in self.targets:
            spread += [number, -1]
        self.push(120, self.sources, memoryview(array.array("q", spread))[::2])
        self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))

    def test_page_numbers_that_are_none(self) -> None:
        receive = self.decode.node.receive
        for refused in (
            b"bytes",
            array.array("h", [1]),
            array.array("d", [1.0]),
            memoryview(bytes(8)).cast("B", (2, 4)),
            7,
        ):
            with self.subTest(repr(refused)), self.assertRaises(TypeError):
                receive(self.peer, 130, TOKENS, refused)
        with self.assertRaises(crossdock.PageOutOfRange):
            receive(self.peer, 131, TOKENS, [-1] + self.targets[1:])
        with self.assertRaises(crossdock.PageOutOfRange) as caught:
            receive(self.peer, 132, TOKENS, [PAGES] + self.targets[1:])
        self.assertIsInstance(caught.exception, crossdock.PageError)
        with self.assertRaises(crossdock.DuplicatePage):
            receive(self.peer, 133, TOKENS, [3] * self.count)
        self.assertEqual(self.decode.pool.stats().free, PAGES)

    @unittest.skipUnless(numpy, "NumPy is not installed")
    def test_page_numbers_of_numpy(self) -> None:
        for at, form in enumerate(("int32", "uint32", "int64", "uint64")):
            with self.subTest(form):
                self.push(140 + at, numpy.array(self.sources, form), numpy.array(self.targets, form))
                self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))
        table = numpy.zeros((PAGES, 2), "int32")
        table[: self.count, 1] = self.targets
        self.push(150, self.sources, table[: self.count, 1])
        self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))
        for refused in (
            numpy.array(self.targets, ">i4"),
            numpy.array(self.targets, "int16"),
            table,
            table.astype("f4")[:, 0],
        ):
            with self.subTest(refused.dtype.str), self.assertRaises(TypeError):
                self.decode.node.receive(self.peer, 151, TOKENS, refused)
        read_only = numpy.array(self.targets)
        read_only.flags.writeable = False
        self.push(152, self.sources, read_only)

    @unittest.skipUnless(numpy, "NumPy is not installed")
    def test_page_numbers_by_dlpack(self) -> None:
        class Tensor:
            """As PyTorch's: no buffer."""

            def __init__(self, numbers: Any) -> None:
                self.numbers = numbers

            def __dlpack__(self, **options: Any) -> Any:
                return self.numbers.__dlpack__(**options)

            def __dlpack_device__(self) -> Any:
                return self.numbers.__dlpack_device__()

        for at, form in enumerate(("int32", "uint32", "int64", "uint64")):
            with self.subTest(form):
                self.push(160 + at, Tensor(numpy.array(self.sources, form)), Tensor(numpy.array(self.targets, form)))
                self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))
        for refused in (
            numpy.zeros(8, "f4"),
            numpy.zeros(8, "i2"),
            numpy.zeros((2, 4), "i4"),
            numpy.zeros(8, "i4")[::2],
        ):
            with self.subTest(refused.dtype.str), self.assertRaises(TypeError):
                self.decode.node.receive(self.peer, 170, TOKENS, Tensor(refused))

    @unittest.skipUnless(torch, "PyTorch is not installed")
    def test_page_numbers_of_torch(self) -> None:
        for at, form in enumerate((torch.int32, torch.int64)):
            with self.subTest(str(form)):
                self.push(180 + at, torch.tensor(self.sources, dtype=form), torch.tensor(self.targets, dtype=form))
                self.assertTrue(same_pages(self.prefill, self.sources, self.decode, self.targets, TOKENS))

    def test_numbers_that_do_not_fit(self) -> None:
        for wrong in (dict(room=-1), dict(room=2**64), dict(tokens=2**32), dict(tokens="100"), dict(use_count=-1)):
            options = {"room": 190, "tokens": TOKENS, **wrong}
            with self.subTest(wrong), self.assertRaises(crossdock.BadArgument) as caught:
                self.decode.node.receive(self.peer, pages=self.targets, **options)
            self.assertIn(next(iter(wrong)), str(caught.exception))
            with self.assertRaises(ValueError):
                self.prefill.node.send(pages=self.sources, **options)
        with self.assertRaises(ValueError):
            self.decode.node.receive(self.peer, 191, TOKENS, self.targets, deadline=-1.0)
        with self.assertRaises(ValueError):
            self.decode.node.receive(self.peer, 191, TOKENS, self.targets, layers=range(0, 4, 2))
        with self.assertRaises(ValueError):
            self.decode.node.receive(self.peer, 191, TOKENS, self.targets, more_pages=[[1]])

    def test_pages_are_taken_by_their_numbers_when_no_room_has_them(self) -> None:
        pool = self.prefill.pool
        with self.prefill.node.serve(210, TOKENS, self.sources):
            with self.assertRaises(crossdock.PageInUse):
                pool.adopt(self.sources)
            # Others are free.
            others = [page for page in range(PAGES) if page not in list(self.sources)][:2]
            with pool.adopt(others) as pages:
                self.assertEqual(list(pages.ids), others)
                with self.assertRaises(crossdock.PageInUse):
                    pool.adopt(others[:1])
        deadline = time.monotonic() + TIMEOUT
        while pool.stats().free != PAGES and time.monotonic() < deadline:
            time.sleep(0.001)
        with pool.adopt(self.sources) as pages:
            with self.prefill.node.serve(211, TOKENS, pages):
                self.assertEqual(len(pages), self.count)
        with self.assertRaises(crossdock.PageOutOfRange):
            pool.adopt([PAGES])
        with crossdock.Pool(PAGES, allocates=True) as allocating, self.assertRaises(crossdock.WrongKind):
            allocating.adopt([0])

    def test_pages_of_a_pool_that_allocates(self) -> None:
        allocating = crossdock.Pool(PAGES, allocates=True, low_watermark=60, high_watermark=62)
        with Worker("allocating", pools=[allocating]) as decode:
            peer = decode.node.connect(self.prefill.node.address)
            pages = allocating.take(self.count)
            targets = pages.ids
            self.assertEqual(len(pages), self.count)
            self.assertEqual((allocating.stats().owned, allocating.stats().under_pressure), (self.count, True))
            with decode.node.receive(peer, 200, TOKENS, pages) as receiving:
                with self.assertRaises(crossdock.Error):
                    len(pages)
                with self.prefill.node.send(200, TOKENS, self.sources) as sending:
                    sending.send(range(LAYERS))
                    sending.finish()
                    receiving.wait(TIMEOUT).check()
                    receiving.wait_pages(TIMEOUT)
                with receiving.take_pages() as home:
                    self.assertEqual(home.ids, targets)
                    # They are lent to as many rooms as send them.
                    with decode.node.serve(201, TOKENS, home), decode.node.serve(202, TOKENS, home):
                        self.assertEqual(len(home), self.count)
                with self.assertRaises(crossdock.Finished):
                    receiving.take_pages()
            self.assertTrue(same_pages(self.prefill, self.sources, decode, targets, TOKENS))
            with self.assertRaises(crossdock.Exhausted):
                allocating.take(PAGES + 1)
            with self.assertRaises(crossdock.WrongKind):
                decode.node.receive(peer, 203, TOKENS, self.targets)
            peer.close()


if __name__ == "__main__":
    unittest.main()
