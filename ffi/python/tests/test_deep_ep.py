"""DeepEP's call shapes: what its own tests ask of them, on NumPy's arrays, and on PyTorch's tensors where that is."""

import threading
import unittest
from typing import Any, Callable, List

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]
try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

from crossdock.errors import BadArgument, OutOfOrder

RANKS, EXPERTS, TOP_K, HIDDEN = 4, 16, 4, 256


class Ranks:
    """Ranks that are threads, as a group that can all-gather."""

    def __init__(self, ranks: int) -> None:
        self.told: List[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def of(self, rank: int) -> "Rank":
        return Rank(self, rank)


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self._rank = ranks, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self.ranks.told)

    def all_gather(self, told: Any) -> List[Any]:
        self.ranks.told[self._rank] = told
        self.ranks.barrier.wait()
        heard = list(self.ranks.told)
        self.ranks.barrier.wait()
        return heard


def on_every_rank(work: Callable[[Any, int], None], ranks: int = RANKS, **options: Any) -> None:
    from crossdock.deep_ep import Buffer

    group, failed = Ranks(ranks), []

    def run(rank: int) -> None:
        try:
            buffer = Buffer(group.of(rank), explicitly_destroy=True, **options)
            work(buffer, rank)
            group.barrier.wait()
            buffer.destroy()
        except BaseException as error:
            failed.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error


def to_bf16(values: Any) -> Any:
    """Bits; exact for the small integers that are used here."""
    return (numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)


def to_f32(bits: Any) -> Any:
    return (numpy.asarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def choices_of(rank: int, tokens: int, seed: int = 0) -> Any:
    random = numpy.random.default_rng(1000 * seed + rank)
    chosen = numpy.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(numpy.int64)
    chosen[random.random((tokens, TOP_K)) < 0.1] = -1
    return chosen


def from_e4m3(values: Any) -> Any:
    bits = values.astype(numpy.int32)
    sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
    small, large = mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return numpy.where(sign, -1, 1) * numpy.where(exponent == 0, small, large)


@unittest.skipIf(numpy is None, "NumPy is not installed")
class DeepEp(unittest.TestCase):
    def test_the_normal_mode_brings_tokens_there_and_back(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            tokens = 20 + rank
            chosen = choices_of(rank, tokens)
            x = to_bf16(numpy.full((tokens, HIDDEN), rank + 1))
            x[:, -1] = to_bf16(numpy.arange(tokens))
            weights = numpy.where(chosen >= 0, (chosen + 1) / 4, 0).astype(numpy.float32)
            per_rank, per_node, per_expert, is_in, event = buffer.get_dispatch_layout(chosen, EXPERTS)
            self.assertIsNone(per_node)
            self.assertIsNone(event.event)
            self.assertEqual(per_expert.sum(), (chosen >= 0).sum())
            self.assertTrue((is_in == (chosen[:, :, None] // 4 == numpy.arange(RANKS)).any(1)).all())
            self.assertTrue((per_rank == is_in.sum(0)).all())
            layout = dict(num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert)
            out = buffer.dispatch(x, **layout, topk_idx=chosen, topk_weights=weights, expert_alignment=8, async_finish=True)
            recv_x, recv_idx, recv_weights, counts, handle, event = out
            event.current_stream_wait()
            ends = handle[0][:, rank]
            self.assertEqual(len(recv_x), ends[-1])
            begins = numpy.concatenate([[0], ends[:-1]])
            for source, (begin, end) in enumerate(zip(begins, ends)):
                theirs = choices_of(source, 20 + source)
                here = (theirs // 4 == rank) & (theirs >= 0)
                self.assertEqual(end - begin, here.any(1).sum())
                self.assertTrue((to_f32(recv_x[begin:end, :-1]) == source + 1).all())
                self.assertTrue((to_f32(recv_x[begin:end, -1]) == numpy.flatnonzero(here.any(1))).all())
                local = numpy.where(here, theirs - 4 * rank, -1)[here.any(1)]
                self.assertTrue((recv_idx[begin:end] == local).all())
            hits = [int((recv_idx == expert).sum()) for expert in range(4)]
            self.assertEqual(counts, [(hit + 7) // 8 * 8 for hit in hits])
            # Each rank gives the rows back as they are: each token's sum counts its ranks.
            combined, back, _ = buffer.combine(recv_x, handle, recv_weights)
            self.assertTrue((to_f32(combined) == to_f32(x) * is_in.sum(1, keepdims=True)).all())
            self.assertTrue(numpy.allclose(back, weights))
            # Once more with the handle: rows alone, and back with a bias.
            again, idx, _, _, _, _ = buffer.dispatch(x, handle=handle)
            self.assertTrue((again == recv_x).all())
            self.assertIsNone(idx)
            bias = to_bf16(numpy.ones((tokens, HIDDEN)))
            combined, _, _ = buffer.combine(again, handle, bias=(bias, bias))
            self.assertTrue((to_f32(combined) == to_f32(x) * is_in.sum(1, keepdims=True) + 2).all())
            # And a combine whose dispatch is long over.
            combined, _, _ = buffer.combine(again, handle)
            self.assertTrue((to_f32(combined) == to_f32(x) * is_in.sum(1, keepdims=True)).all())

        on_every_rank(work)

    def test_rows_that_are_fp8_keep_their_scales_at_any_strides(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            tokens = 12
            chosen = choices_of(rank, tokens)
            values = numpy.random.default_rng(rank).integers(0, 120, (tokens, HIDDEN)).astype(numpy.uint8)
            scales = numpy.asfortranarray(numpy.arange(tokens * 2, dtype=numpy.float32).reshape(tokens, 2) + 100 * rank)
            per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(chosen, EXPERTS)
            layout = dict(num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert)
            weights = numpy.ones((tokens, TOP_K), numpy.float32)
            (recv, recv_scales), _, _, _, handle, _ = buffer.dispatch(
                (values, scales), **layout, topk_idx=chosen, topk_weights=weights, num_worst_tokens=100
            )
            self.assertEqual((recv.shape, recv_scales.shape), ((100, HIDDEN), (100, 2)))
            end = handle[0][-1, rank]
            first = handle[0][rank - 1, rank] if rank else 0
            mine = numpy.flatnonzero(is_in[:, rank])
            self.assertTrue((recv[first : first + len(mine)] == values[mine]).all())
            self.assertTrue((recv_scales[first : first + len(mine)] == scales[mine]).all())
            self.assertTrue((recv[end:] == 0).all())
            buffer.combine(to_bf16(numpy.zeros((100, HIDDEN))), handle)

        on_every_rank(work)

    def test_tokens_go_to_ranks_without_choices(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            x = to_bf16(numpy.full((8, HIDDEN), rank + 1))
            is_in = numpy.arange(8)[:, None] % RANKS == numpy.arange(RANKS)
            out = buffer.dispatch(x, num_tokens_per_rank=is_in.sum(0), is_token_in_rank=is_in, num_tokens_per_expert=None)
            recv_x, recv_idx, recv_weights, counts, handle, _ = out
            self.assertEqual((len(recv_x), recv_idx, recv_weights, counts), (8, None, None, []))
            combined, weights, _ = buffer.combine(recv_x, handle)
            self.assertTrue((combined == x).all())
            self.assertIsNone(weights)

        on_every_rank(work)

    def test_many_dispatches_may_be_under_way(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            begun = []
            for step in range(11):
                chosen = choices_of(rank, 6, seed=step)
                x = to_bf16(numpy.full((6, HIDDEN), step + 1))
                per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(chosen, EXPERTS)
                layout = dict(num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert)
                weights = numpy.ones((6, TOP_K), numpy.float32)
                recv_x, _, _, _, handle, _ = buffer.dispatch(x, **layout, topk_idx=chosen, topk_weights=weights)
                begun.append((x, is_in, recv_x, handle))
            # As a backward pass: the last one first.
            for x, is_in, recv_x, handle in reversed(begun):
                combined, _, _ = buffer.combine(recv_x, handle)
                self.assertTrue((to_f32(combined) == to_f32(x) * is_in.sum(1, keepdims=True)).all())

        on_every_rank(work)

    def low_latency(self, buffer: Any, rank: int, fp8: str, hook: bool) -> None:
        tokens, most = 9 - rank, 16
        chosen = choices_of(rank, tokens)
        x = to_bf16(numpy.full((tokens, HIDDEN), rank + 1))
        x[:, 0] = to_bf16(numpy.arange(tokens) * 2)
        stats, costs = numpy.zeros(4, numpy.int32), numpy.zeros(RANKS, numpy.int64)
        received, counts, handle, event, receive = buffer.low_latency_dispatch(
            x,
            chosen,
            most,
            EXPERTS,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=costs,
            use_fp8=fp8 != "no",
            round_scale=fp8 in ("rounded", "ue8m0"),
            use_ue8m0=fp8 == "ue8m0",
            return_recv_hook=hook,
        )
        self.assertEqual(receive is None, not hook)
        if hook:
            receive()
            receive()
        if fp8 == "no":
            values = to_f32(received)
        else:
            rows, scales = received
            if fp8 == "ue8m0":
                self.assertEqual(scales.shape, (4, RANKS * most, 1))
                exponents = numpy.ascontiguousarray(scales).view(numpy.uint8)[:, :, :2].astype(numpy.float64) - 127
                scales = 2.0**exponents
            self.assertEqual(scales.shape, (4, RANKS * most, 2))
            with numpy.errstate(all="ignore"):
                values = from_e4m3(rows) * numpy.repeat(scales, 128, axis=2)
        self.assertTrue((stats == counts).all())
        source_info, layout = handle[0], handle[1]
        for expert in range(4):
            begin = 0
            for source in range(RANKS):
                theirs = choices_of(source, 9 - source)
                theirs = numpy.flatnonzero((theirs == 4 * rank + expert).any(1))
                self.assertEqual((layout[expert, source] >> 32, layout[expert, source] & 0xFFFFFFFF), (begin, len(theirs)))
                rows = slice(begin, begin + len(theirs))
                self.assertTrue((source_info[expert, rows] == theirs).all())
                self.assertTrue(numpy.allclose(values[expert, rows, 1:], source + 1, rtol=0.07))
                begin += len(theirs)
            self.assertEqual(counts[expert], begin)
        weights = numpy.random.default_rng(rank).random((tokens, TOP_K)).astype(numpy.float32)
        factor = ((chosen >= 0) * weights).sum(1, keepdims=True)
        results = to_bf16(numpy.nan_to_num(numpy.rint(values)))
        for zero_copy in (False, True):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:] = results
            out = to_bf16(numpy.ones((tokens, HIDDEN)))
            combined, _, receive = buffer.low_latency_combine(
                results, chosen, weights, handle, zero_copy=zero_copy, return_recv_hook=hook, out=out
            )
            if hook:
                receive()
            self.assertIs(combined, out)
            self.assertTrue(numpy.allclose(to_f32(combined)[:, 1:], (rank + 1) * factor, rtol=0.02))

    def test_the_latency_mode_in_every_form(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            self.assertGreater(buffer.get_low_latency_rdma_size_hint(16, HIDDEN, RANKS, EXPERTS), 0)
            buffer.clean_low_latency_buffer(16, HIDDEN, EXPERTS)
            for fp8 in ("no", "plain", "rounded"):
                for hook in (False, True):
                    self.low_latency(buffer, rank, fp8, hook)

        on_every_rank(work, low_latency_mode=True)

    def test_the_latency_mode_with_packed_scales(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            self.low_latency(buffer, rank, "ue8m0", True)

        on_every_rank(work, low_latency_mode=True)

    def test_an_expert_that_nobody_chose_has_its_place(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            # The last expert of each rank alone.
            chosen = numpy.full((5, TOP_K), -1, numpy.int64)
            chosen[:, 0] = 4 * ((numpy.arange(5) + rank) % RANKS) + 3
            x = to_bf16(numpy.full((5, HIDDEN), rank + 1))
            received, counts, handle, _, _ = buffer.low_latency_dispatch(x, chosen, 16, EXPERTS, use_fp8=False)
            self.assertEqual(counts[:3].tolist(), [0, 0, 0])
            buffer.get_next_low_latency_combine_buffer(handle)[:] = received
            weights = numpy.full((5, TOP_K), 2, numpy.float32)
            with self.assertRaisesRegex(BadArgument, "one piece"):
                out = to_bf16(numpy.zeros((5, 2 * HIDDEN)))[:, ::2]
                buffer.low_latency_combine(received, chosen, weights, handle, zero_copy=True, out=out)

        on_every_rank(work, low_latency_mode=True)

    def test_a_hook_that_comes_too_late_says_so(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            x, chosen = to_bf16(numpy.zeros((2, HIDDEN))), choices_of(rank, 2)
            hooks = []
            for _ in range(9):
                begun = buffer.low_latency_dispatch(x, chosen, 16, EXPERTS, use_fp8=False, return_recv_hook=True)
                hooks.append(begun[4])
            with self.assertRaises(OutOfOrder):
                hooks[0]()
            hooks[8]()

        on_every_rank(work, low_latency_mode=True)

    def test_a_masked_rank_is_told(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            self.low_latency(buffer, rank, "no", False)
            status = numpy.zeros(RANKS, numpy.int32)
            buffer.low_latency_query_mask_buffer(status)
            self.assertEqual(status.tolist(), [0] * RANKS)
            buffer.low_latency_clean_mask_buffer()
            with self.assertRaises(BadArgument):
                buffer.low_latency_update_mask_buffer(1, False)

        on_every_rank(work, low_latency_mode=True, enable_shrink=True)

    def test_what_makes_no_sense_is_refused(self) -> None:
        from crossdock.deep_ep import Buffer, Config

        with self.assertRaises(ValueError):
            Buffer(None)
        with self.assertRaises(BadArgument):
            Config(3)
        with self.assertRaises(AssertionError):
            Buffer.get_dispatch_config(7)
        self.assertGreater(Config(20, 6, 256).get_nvl_buffer_size_hint(HIDDEN * 2, 8), 0)

        def work(buffer: Any, rank: int) -> None:
            x = to_bf16(numpy.zeros((5, HIDDEN)))
            with self.assertRaisesRegex(BadArgument, "max_tokens_per_rank"):
                big = to_bf16(numpy.zeros((5000, HIDDEN)))
                buffer.dispatch(big, is_token_in_rank=numpy.ones((5000, 1), bool), num_tokens_per_expert=None)
            with self.assertRaises(AssertionError):
                buffer.dispatch(x)

        on_every_rank(work, ranks=1)

    @unittest.skipIf(torch is None, "PyTorch is not installed")
    def test_tensors_of_pytorch(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            chosen = torch.from_numpy(choices_of(rank, 8))
            x = torch.full((8, HIDDEN), float(rank + 1), dtype=torch.bfloat16)
            per_rank, _, per_expert, is_in, _ = buffer.get_dispatch_layout(chosen, EXPERTS)
            layout = dict(num_tokens_per_rank=per_rank, is_token_in_rank=is_in, num_tokens_per_expert=per_expert)
            weights = torch.ones((8, TOP_K))
            recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(x, **layout, topk_idx=chosen, topk_weights=weights)
            combined, _, _ = buffer.combine(recv_x, handle, recv_weights)
            self.assertTrue(torch.equal(combined, x * is_in.sum(1, keepdim=True)))
            (rows, scales), counts, handle, _, _ = buffer.low_latency_dispatch(x, chosen, 16, EXPERTS)
            self.assertEqual((rows.dtype, scales.dtype), (torch.float8_e4m3fn, torch.float32))

        on_every_rank(work, low_latency_mode=True)


if __name__ == "__main__":
    unittest.main()
