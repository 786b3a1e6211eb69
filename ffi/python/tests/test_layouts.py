"""Layouts of all kinds, and hand-overs between sides that are spread differently."""

from __future__ import annotations

import unittest
from typing import Dict, List

from support import TIMEOUT, Case, Worker, crossdock, numpy, small_layout

from crossdock import Extent, Layout, LayerBuffer, Parallelism, Part, Parts, Pool, Source, SourceRank

HEADS, HEAD_BYTES, TOKENS, PAGE_TOKENS, PAGES = 4, 32, 37, 4, 24


def heads_layout(**options: object) -> Layout:
    usual: Dict[str, object] = dict(
        model_layers=3,
        kind="heads",
        heads=HEADS,
        head_bytes=HEAD_BYTES,
        dtype="f16",
        page_tokens=PAGE_TOKENS,
        pages=PAGES,
    )
    return Layout("spread", **{**usual, **options})  # type: ignore[arg-type]


class Layouts(Case):
    def test_what_it_comes_to(self) -> None:
        with small_layout(layers=range(1, 3), rank=2) as layout:
            self.assertEqual((layout.layers, layout.rank, layout.pools, layout.regions), (range(1, 3), 2, 1, 1))
            self.assertEqual(
                (layout.page_tokens, layout.pages, layout.token_bytes, layout.page_bytes), (16, 64, 64, 1024)
            )
            self.assertEqual((layout.pages_for(0), layout.pages_for(16), layout.pages_for(17)), (0, 1, 2))
            self.assertEqual((layout.region_bytes(0), layout.region_bytes(1)), (2 * 64 * 1024, 0))
            self.assertEqual(layout.find(2), (0, 64 * 1024, 1024, 1024))
            with self.assertRaises(crossdock.BadArgument):
                layout.find(0)
        with self.assertRaises(crossdock.BadHandle):
            layout.pages_for(1)

    def test_choices_by_name_and_by_number(self) -> None:
        for order in (crossdock.HeadOrder.HEADS_FIRST, "heads_first", 1):
            layout = heads_layout(head_order=order, placement="page_major", dtype=crossdock.Dtype.F16)
            self.assertEqual(layout.find(1, part=1).stride_bytes, 3 * 2 * PAGE_TOKENS * HEADS * HEAD_BYTES)
        for wrong in (dict(kind="mlq"), dict(dtype="f64"), dict(head_order=7), dict(placement=None, dtype=99)):
            with self.subTest(wrong), self.assertRaises(crossdock.BadArgument) as caught:
                heads_layout(**wrong)
            self.assertIn("choose one of", caught.exception.advice)

    def test_what_is_not_sound(self) -> None:
        for wrong in (dict(pages=0), dict(latent_bytes=0, rope_bytes=0), dict(layers=range(3, 9))):
            with self.subTest(wrong), self.assertRaises(crossdock.LayoutError):
                small_layout(**wrong)
        with self.assertRaises(ValueError):
            small_layout(layers=range(0, 4, 2))
        with self.assertRaises(OverflowError):
            small_layout(pages=-1)
        with self.assertRaises(ValueError):
            small_layout().add_part(Part("index", [0, 1], [LayerBuffer(0, 0, 64)], 8))

    def test_a_buffer_for_each_layer(self) -> None:
        page = PAGE_TOKENS * HEADS * HEAD_BYTES
        buffers = [LayerBuffer(region, 64, page) for region in range(6)]
        layout = heads_layout(buffers=buffers)
        self.assertEqual(layout.regions, 6)
        self.assertEqual(layout.region_bytes(5), 64 + PAGES * page)
        self.assertEqual(layout.find(2), (2, 64, page, page))
        self.assertEqual(layout.find(2, part=1), (5, 64, page, page))


class Spread(Case):
    def test_who_brings_what(self) -> None:
        two, one = Parallelism(model_layers=3, tp=2, kv_heads=HEADS), Parallelism(model_layers=3, kv_heads=HEADS)
        self.assertEqual([source.rank for source in two.sources(one, 0)], [0, 1])
        self.assertEqual([one.sources(two, rank) for rank in range(2)], [[SourceRank(0, Parts.ALL)]] * 2)
        self.assertEqual((two.destinations(one, 1), one.destinations(two, 0)), ([0], [0, 1]))
        stages = Parallelism(model_layers=3, kv_heads=HEADS, stage_layers=[2, 1])
        self.assertEqual([source.rank for source in stages.sources(one, 0)], [0, 1])
        # A cache that every rank keeps whole comes from one of them, which the room chooses.
        whole = Parallelism(model_layers=3, tp=4)
        self.assertEqual(
            {whole.sources(Parallelism(model_layers=3), 0, spread_by=room)[0].rank for room in range(4)}, {0, 1, 2, 3}
        )
        many = Parallelism(model_layers=3, tp=128, kv_heads=128)
        self.assertEqual(len(many.sources(Parallelism(model_layers=3, kv_heads=128), 0)), 128)
        with self.assertRaises(crossdock.LayoutError):
            two.sources(one, 7)

    def test_two_ranks_to_one(self) -> None:
        """TP 2 to TP 1: each prefill rank brings its half of the heads."""
        prefill, decode = Parallelism(model_layers=3, tp=2, kv_heads=HEADS), Parallelism(model_layers=3, kv_heads=HEADS)
        usual = dict(
            model_layers=3, kind="heads", heads=HEADS, head_bytes=HEAD_BYTES, dtype="f16", page_tokens=PAGE_TOKENS
        )
        ranks = [
            self.entered(Worker(f"prefill-{rank}", Layout.of_rank(prefill, rank, "spread", **usual, pages=PAGES)))
            for rank in range(2)
        ]
        whole = self.entered(Worker("decode", Layout.of_rank(decode, 0, "spread", **usual, pages=PAGES)))
        pages = {worker: list(range(at, at + 10)) for at, worker in enumerate([*ranks, whole])}
        self.assertEqual([worker.layout.rank for worker in ranks], [0, 1])
        for rank, worker in enumerate(ranks):
            worker.fill(rank)
        peers = [whole.node.connect(worker.node.address) for worker in ranks]
        sources = [Source(peers[rank], rank, parts) for rank, parts in prefill.sources(decode, 0)]
        with whole.node.receive(sources, 5, TOKENS, pages[whole]) as receiving:
            sendings = [
                worker.node.send(5, TOKENS, pages[worker], ranks=prefill.destinations(decode, rank))
                for rank, worker in enumerate(ranks)
            ]
            for sending in sendings:
                sending.send(range(3))
                sending.finish(b"aux")
            self.assertEqual(receiving.wait(TIMEOUT).check().aux, b"aux")
            receiving.wait_pages(TIMEOUT)
            for sending in sendings:
                sending.wait(TIMEOUT).check()
                sending.close()
        half = HEADS // 2 * HEAD_BYTES
        for layer in range(3):
            for part in range(2):
                for token in range(TOKENS):
                    page, at = divmod(token, PAGE_TOKENS)
                    found = whole.page(layer, pages[whole][page], part=part)[2 * half * at : 2 * half * (at + 1)]
                    halves = [
                        bytes(one.page(layer, pages[one][page], part=part)[half * at : half * (at + 1)])
                        for one in ranks
                    ]
                    self.assertEqual(bytes(found), b"".join(halves), (layer, part, token))
        for peer in peers:
            peer.close()


class MorePools(Case):
    """A window and a state beside the tokens, and an index within their pages."""

    WINDOW, STATE_BYTES, INDEX_BYTES = 8, 96, 16

    def worker(self, name: str) -> Worker:
        layout = small_layout(model_layers=2, page_tokens=PAGE_TOKENS, pages=PAGES)
        index = [LayerBuffer(1, 0, PAGE_TOKENS * self.INDEX_BYTES)]
        layout.add_part(Part("index", layers=[1], buffers=index, head_bytes=self.INDEX_BYTES))
        window = Part("window", layers=[0], buffers=[LayerBuffer(2, 0, PAGE_TOKENS * 32)], head_bytes=32)
        layout.add_pool(
            "window", extent=Extent.WINDOW, window=self.WINDOW, page_tokens=PAGE_TOKENS, pages=6, parts=[window]
        )
        state = Part(
            "state", layers=[0, 1], buffers=[LayerBuffer(3, 0, 96), LayerBuffer(4, 0, 96)], head_bytes=self.STATE_BYTES
        )
        layout.add_pool("state", extent="entries", pages=3, parts=[state])
        self.assertEqual((layout.pools, layout.regions), (3, 5))
        return self.entered(Worker(name, layout, pools=[Pool(PAGES), Pool(6), Pool(3)]))

    def test_all_of_them_move(self) -> None:
        prefill, decode = self.worker("prefill"), self.worker("decode")
        prefill.fill(5)
        peer = decode.node.connect(prefill.node.address)
        tokens = 4 * PAGE_TOKENS
        here: List[List[int]] = [[9, 2, 7, 4], [5, 0], [2]]
        there: List[List[int]] = [[1, 3, 5, 8], [1, 4], [0]]
        with prefill.node.serve(3, tokens, here[0], more_pages=here[1:]) as serving:
            with decode.node.fetch(peer, 3, tokens, there[0], more_pages=there[1:]) as fetching:
                fetching.wait(TIMEOUT).check()
                fetching.wait_pages(TIMEOUT)
            serving.wait(TIMEOUT).check()
        # The pool, the part, its layers.
        for pool, part, layers in ((0, 0, [0, 1]), (0, 1, [1]), (1, 0, [0]), (2, 0, [0, 1])):
            for layer in layers:
                for source, target in zip(here[pool], there[pool]):
                    found = decode.page(layer, target, part=part, pool=pool)
                    self.assertEqual(found, prefill.page(layer, source, part=part, pool=pool), (pool, part, layer))
        for missing in ([], [[1]], [[1], [2], [3]]):
            with self.assertRaises(crossdock.BadArgument):
                decode.node.fetch(peer, 4, tokens, there[0], more_pages=missing)
        peer.close()

    @unittest.skipUnless(numpy, "NumPy is not installed")
    def test_lists_of_several_kinds(self) -> None:
        prefill, decode = self.worker("prefill"), self.worker("decode")
        peer = decode.node.connect(prefill.node.address)
        more = [numpy.array([5, 0], "uint32"), numpy.array([2], "int64")]
        with (
            prefill.node.serve(3, 16, range(4), more_pages=more),
            decode.node.fetch(peer, 3, 16, range(4), more_pages=more) as room,
        ):
            room.wait(TIMEOUT).check()
        peer.close()


if __name__ == "__main__":
    unittest.main()
