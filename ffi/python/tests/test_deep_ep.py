"""DeepEP's call shapes on NumPy's arrays, by ranks that are threads, and on PyTorch's tensors where that is.

What DeepEP's own tests ask is in the table of test_torch_deep_ep.py. Here: both modes in all forms, 16 ranks, which are
two nodes, scales of any strides and packed ones, masks, communicators of mpi4py.
"""

from __future__ import annotations

import unittest
from typing import Any

from support import numpy, torch
from thread_ranks import EXPERTS, HIDDEN, RANKS, TOP_K, Communicator, choices_of, layout_of, on_every_rank
from thread_ranks import to_bf16, to_f32

from crossdock.errors import BadArgument


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
            options = dict(topk_idx=chosen, topk_weights=weights, expert_alignment=8, async_finish=True)
            out = buffer.dispatch(x, **layout, **options)
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
            out = buffer.dispatch(x, num_tokens_per_rank=is_in.sum(0), is_token_in_rank=is_in)
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
        ranks, here = buffer.group_size, EXPERTS // buffer.group_size
        tokens, most = 9 - rank, 16
        chosen = choices_of(rank, tokens)
        x = to_bf16(numpy.full((tokens, HIDDEN), rank + 1))
        x[:, 0] = to_bf16(numpy.arange(tokens) * 2)
        stats, costs = numpy.zeros(here, numpy.int32), numpy.zeros(ranks, numpy.int64)
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
                self.assertEqual(scales.shape, (here, ranks * most, 1))
                exponents = numpy.ascontiguousarray(scales).view(numpy.uint8)[:, :, :2].astype(numpy.float64) - 127
                scales = 2.0**exponents
            self.assertEqual(scales.shape, (here, ranks * most, 2))
            with numpy.errstate(all="ignore"):
                values = from_e4m3(rows) * numpy.repeat(scales, 128, axis=2)
        self.assertTrue((stats == counts).all())
        source_info, layout = handle[0], handle[1]
        for expert in range(here):
            begin = 0
            for source in range(ranks):
                theirs = choices_of(source, 9 - source)
                theirs = numpy.flatnonzero((theirs == here * rank + expert).any(1))
                told = layout[expert, source]
                self.assertEqual((told >> 32, told & 0xFFFFFFFF), (begin, len(theirs)))
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

    def test_sixteen_ranks_are_two_nodes(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            chosen = choices_of(rank, 6)
            x = to_bf16(numpy.full((6, HIDDEN), rank))
            layout = layout_of(buffer, chosen)
            is_in = layout["is_token_in_rank"]
            nodes = is_in.reshape(6, 2, 8).any(2).sum(0)
            self.assertEqual(layout["num_tokens_per_rdma_rank"].tolist(), nodes.tolist())
            weights = numpy.ones((6, TOP_K), numpy.float32)
            options = dict(topk_idx=chosen, topk_weights=weights, config=buffer.get_dispatch_config(16))
            recv_x, _, _, _, handle, _ = buffer.internode_dispatch(x, **layout, **options)
            self.assertEqual(len(handle), 10)
            # One expert a rank: a choice of it is a row.
            sent = [int((choices_of(source, 6) == rank).sum()) for source in range(16)]
            self.assertEqual(handle[-4].tolist(), numpy.cumsum(sent).tolist())
            self.assertEqual(handle[4].tolist(), numpy.cumsum(sent)[[7, 15]].tolist())
            self.assertEqual(len(handle[-3]), len(recv_x))
            self.assertTrue((to_f32(recv_x[:, 0]) == numpy.repeat(numpy.arange(16), sent)).all())
            combined, _, _ = buffer.internode_combine(recv_x, handle, config=buffer.get_combine_config(16))
            self.assertTrue((to_f32(combined) == to_f32(x) * is_in.sum(1, keepdims=True)).all())

        on_every_rank(work, ranks=16)

    def test_scales_that_are_packed_by_four(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            chosen, random = choices_of(rank, 7), numpy.random.default_rng(rank)
            values = random.integers(0, 120, (7, 1024)).astype(numpy.uint8)
            layout, weights = layout_of(buffer, chosen), numpy.ones((7, TOP_K), numpy.float32)
            mine = layout["is_token_in_rank"][:, rank]
            wide = random.integers(0, 2**31, (14, 4)).astype(numpy.int32)
            # In one piece, by columns, and with gaps both ways.
            for scales in (wide[:7, :2].copy(), numpy.asfortranarray(wide[:7, 2:]), wide[::2, ::2]):
                (recv, told), _, _, _, handle, _ = buffer.dispatch(
                    (values, scales), **layout, topk_idx=chosen, topk_weights=weights
                )
                self.assertEqual((told.dtype, told.shape), (numpy.int32, (len(recv), 2)))
                end = handle[0][rank, rank]
                self.assertTrue((recv[end - mine.sum() : end] == values[mine]).all())
                self.assertTrue((told[end - mine.sum() : end] == scales[mine]).all())
            for wrong in (wide[:7, :3], wide[:6, :2], wide[:7, :2].astype(numpy.int64), wide[:7, 1::-1]):
                with self.assertRaises(BadArgument):
                    buffer.dispatch((values, wrong), **layout, topk_idx=chosen, topk_weights=weights)

        on_every_rank(work, ranks=2)

    def test_a_communicator_of_mpi4py(self) -> None:
        from crossdock.deep_ep import Buffer

        def work(buffer: Any, rank: int) -> None:
            comm = Communicator(buffer.group)
            with_comm = Buffer(None, comm=comm, low_latency_mode=True, explicitly_destroy=True)
            self.assertEqual((with_comm.rank, with_comm.group_size), (rank, 2))
            self.low_latency(with_comm, rank, "no", True)
            comm.allgather("over")
            with_comm.destroy()

        on_every_rank(work, ranks=2)

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
            usual = getattr(torch, "float8_e4m3fn", torch.uint8)
            self.assertEqual((rows.dtype, scales.dtype), (usual, torch.float32))

        on_every_rank(work, low_latency_mode=True)


if __name__ == "__main__":
    unittest.main()
