"""DeepEP's call shapes: what is refused, and that the other ranks do not notice; hooks, events, sizes, the end."""

from __future__ import annotations

import os
import unittest
from typing import Any, Callable, List, Tuple
from unittest import mock

from support import numpy, torch
from thread_ranks import ENVIRONMENT, EXPERTS, HIDDEN, TOP_K, Ranks, choices_of, layout_of, on_every_rank
from thread_ranks import to_bf16, to_f32

from crossdock.errors import BadArgument, BadHandle, GroupLost, OutOfOrder, Unsupported
from crossdock.experts import Group


def given_of(rank: int, tokens: int) -> Tuple[Any, Any, Any]:
    """Rows, choices, weights."""
    ones = numpy.ones((tokens, TOP_K), numpy.float32)
    return to_bf16(numpy.ones((tokens, HIDDEN))), choices_of(rank, tokens), ones


@unittest.skipIf(numpy is None, "NumPy is not installed")
class Faults(unittest.TestCase):
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

    def test_what_one_rank_is_refused_the_others_do_not_notice(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            x, chosen, weights = given_of(rank, 5)
            layout = layout_of(buffer, chosen)
            given = dict(layout, topk_idx=chosen, topk_weights=weights)
            dispatch, combine = buffer.dispatch, buffer.combine
            low_dispatch, low_combine = buffer.low_latency_dispatch, buffer.low_latency_combine
            beyond = numpy.where(numpy.arange(TOP_K) == 1, EXPERTS, chosen)
            wide = to_bf16(numpy.ones((5, 2 * HIDDEN)))

            def refused(**calls: Callable[[], object]) -> None:
                for name, call in calls.items() if rank == 1 else ():
                    with self.subTest(name), self.assertRaises(BadArgument):
                        call()

            refused(
                layout_of_one_more=lambda: buffer.get_dispatch_layout(beyond, EXPERTS),
                layout_of_unlike_ranks=lambda: buffer.get_dispatch_layout(chosen, EXPERTS + 1),
                layout_of_floats=lambda: buffer.get_dispatch_layout(weights, EXPERTS),
                an_expert_too_many=lambda: dispatch(x, **dict(given, topk_idx=beyond)),
                below_none=lambda: dispatch(x, **dict(given, topk_idx=chosen - 7)),
                other_tokens=lambda: dispatch(x, **dict(given, topk_idx=choices_of(rank, 6))),
                wide_weights=lambda: dispatch(x, **dict(given, topk_weights=weights.astype(numpy.float64))),
                no_weights=lambda: dispatch(x, **dict(given, topk_weights=None)),
                one_dimension=lambda: dispatch(x[0], **given),
                a_list=lambda: dispatch(x.tolist(), **given),
                floats=lambda: dispatch(x.astype(numpy.float32), **given),
                halves=lambda: dispatch(x.view(numpy.float16), **given),
                other_ranks=lambda: dispatch(x, **dict(given, is_token_in_rank=layout["is_token_in_rank"][:, :1])),
                no_alignment=lambda: dispatch(x, **given, expert_alignment=0),
                worst_without_choices=lambda: dispatch(x, **layout, num_worst_tokens=10),
            )
            recv_x, _, recv_weights, _, handle, _ = dispatch(x, **given)
            results = to_bf16(numpy.ones((len(recv_x), HIDDEN)))
            refused(
                handle_of_wide_rows=lambda: dispatch(wide, handle=handle),
                handle_of_fewer=lambda: dispatch(x[:4], handle=handle),
                handle_and_choices=lambda: dispatch(x, handle=handle, topk_idx=chosen, topk_weights=weights),
                no_handle=lambda: combine(results, tuple(handle)),
                wide_results=lambda: combine(to_bf16(numpy.ones((len(recv_x), 2 * HIDDEN))), handle),
                too_few=lambda: combine(results[1:], handle),
                weights_of_others=lambda: combine(results, handle, recv_weights[:, 1:].copy()),
                short_bias=lambda: combine(results, handle, bias=results[:1]),
                three_biases=lambda: combine(results, handle, bias=(x, x, x)),
            )
            combined, _, _ = combine(results, handle, bias=(x, x))
            self.assertTrue((to_f32(combined) == 2 + layout["is_token_in_rank"].sum(1, keepdims=True)).all())
            received, counts, low, _, hook = low_dispatch(x, chosen, 16, EXPERTS, use_fp8=False, return_recv_hook=True)
            if rank == 1:
                for early in (
                    lambda: low_combine(received, chosen, weights, low),
                    lambda: buffer.get_next_low_latency_combine_buffer(low),
                ):
                    with self.assertRaises(OutOfOrder):
                        early()
            hook()
            other = numpy.where(chosen >= 0, (chosen + 1) % EXPERTS, chosen)
            out = to_bf16(numpy.zeros((5, HIDDEN)))
            refused(
                short_stats=lambda: low_dispatch(x, chosen, 16, EXPERTS, numpy.zeros(3, numpy.int32)),
                narrow_costs=lambda: low_dispatch(x, chosen, 16, EXPERTS, None, numpy.zeros(2, numpy.int32)),
                both_ends=lambda: low_dispatch(x, chosen, 16, EXPERTS, async_finish=True, return_recv_hook=True),
                packed_alone=lambda: low_dispatch(x, chosen, 16, EXPERTS, use_ue8m0=True),
                other_choices=lambda: low_combine(received, other, weights, low),
                fewer_choices=lambda: low_combine(received, chosen[:4], weights[:4], low),
                of_the_normal_mode=lambda: low_combine(received, chosen, weights, handle),
                in_the_normal_mode=lambda: combine(results, low),
                part_of_the_results=lambda: low_combine(received[:1], chosen, weights, low),
                out_with_gaps=lambda: low_combine(received, chosen, weights, low, out=wide[:, ::2]),
                out_of_others=lambda: low_combine(received, chosen, weights, low, out=out[:3]),
                out_of_floats=lambda: low_combine(received, chosen, weights, low, out=out.astype(numpy.float32)),
                costs_of_others=lambda: low_combine(
                    received, chosen, weights, low, combine_wait_recv_cost_stats=numpy.zeros(5, numpy.int64)
                ),
                no_such_rank=lambda: buffer.low_latency_update_mask_buffer(2, True),
                itself=lambda: buffer.low_latency_update_mask_buffer(rank, True),
                other_status=lambda: buffer.low_latency_query_mask_buffer(numpy.zeros(3, numpy.int32)),
            )
            combined, _, _ = low_combine(received, chosen, weights, low, out=out)
            self.assertTrue((to_f32(combined) == (chosen >= 0).sum(1, keepdims=True)).all())

        on_every_rank(work, ranks=2, low_latency_mode=True, enable_shrink=True)

    def test_choices_that_are_taken_back(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            x, chosen, weights = given_of(rank, 8)
            received, _, handle, _, _ = buffer.low_latency_dispatch(x, chosen, 16, EXPERTS, use_fp8=False)
            kept = numpy.where(numpy.arange(TOP_K) % 2, chosen, -1)
            combined, _, _ = buffer.low_latency_combine(received, kept, weights, handle)
            self.assertTrue((to_f32(combined) == (kept >= 0).sum(1, keepdims=True)).all())
            # What the caller does with its choices afterwards is not looked at.
            before = chosen.copy()
            chosen[:] = 0
            combined, _, _ = buffer.low_latency_combine(received, before, weights, handle)
            self.assertTrue((to_f32(combined) == (before >= 0).sum(1, keepdims=True)).all())

        on_every_rank(work, ranks=2, low_latency_mode=True)

    def test_the_hook_of_a_combine_is_called_before_its_slot_comes_again(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            x, chosen, weights = given_of(rank, 2)
            args = (x, chosen, 16, EXPERTS)
            received, _, handle, _, _ = buffer.low_latency_dispatch(*args, use_fp8=False)
            combined, _, hook = buffer.low_latency_combine(received, chosen, weights, handle, return_recv_hook=True)
            for _ in range(7):
                buffer.low_latency_dispatch(*args)
            for _ in range(2):
                with self.assertRaisesRegex(OutOfOrder, "call each hook"):
                    buffer.low_latency_dispatch(*args)
            hook()
            hook()
            self.assertTrue((to_f32(combined) == (chosen >= 0).sum(1, keepdims=True)).all())
            buffer.low_latency_dispatch(*args)

        on_every_rank(work, ranks=2, low_latency_mode=True)

    def test_the_end_of_a_buffer(self) -> None:
        from crossdock.deep_ep import Buffer

        def work(buffer: Any, rank: int) -> None:
            x, chosen, weights = given_of(rank, 3)
            given = dict(layout_of(buffer, chosen), topk_idx=chosen, topk_weights=weights)
            recv_x, _, _, _, handle, _ = buffer.dispatch(x, **given)
            other = Buffer(buffer.group, explicitly_destroy=True)
            with self.assertRaisesRegex(BadArgument, "another buffer"):
                other.combine(recv_x, handle)
            with self.assertRaisesRegex(AssertionError, "low_latency_mode"):
                other.low_latency_dispatch(x, chosen, 16, EXPERTS)
            other.destroy()
            for call in (lambda: other.combine(recv_x, handle), lambda: other.dispatch(x, **given)):
                with self.assertRaisesRegex(BadHandle, "destroyed"):
                    call()
            self.assertIsNone(other.runtime)
            with self.assertRaises(AssertionError):
                Buffer(buffer.group).destroy()
            combined, _, _ = buffer.combine(recv_x, handle)
            self.assertTrue((to_f32(combined) == given["is_token_in_rank"].sum(1, keepdims=True)).all())

        on_every_rank(work, ranks=2)

    def test_what_was_handed_out_stays_after_the_end(self) -> None:
        kept: List[Any] = []

        def work(buffer: Any, rank: int) -> None:
            for kind in (numpy, torch) if torch else (numpy,):
                chosen = choices_of(rank, 3) if kind is numpy else torch.from_numpy(choices_of(rank, 3))
                ones = to_bf16(numpy.ones((3, HIDDEN))) if kind is numpy else torch.ones(3, HIDDEN).bfloat16()
                received, counts, handle, *_ = buffer.low_latency_dispatch(ones, chosen, 16, EXPERTS, use_fp8=False)
                kept.extend([received, counts, buffer.get_next_low_latency_combine_buffer(handle)])

        on_every_rank(work, ranks=2, low_latency_mode=True)
        while kept:
            kept[-1][:] = 7
            self.assertTrue((kept.pop() == 7).all())

    def test_where_nothing_shrinks_a_rank_that_leaves_is_missed(self) -> None:
        def work(buffer: Any, rank: int) -> None:
            x, chosen, weights = given_of(rank, 5)
            given = dict(layout_of(buffer, chosen), topk_idx=chosen, topk_weights=weights)

            def dispatched() -> Callable[[], Any]:
                """Its combine; of the latency mode the send half, which gives the other."""
                if is_normal:
                    received, _, _, _, handle, _ = buffer.dispatch(x, **given)
                    return lambda: buffer.combine(received, handle)
                received, _, handle, _, _ = buffer.low_latency_dispatch(x, chosen, 16, EXPERTS, use_fp8=False)
                return lambda: buffer.low_latency_combine(received, chosen, weights, handle, return_recv_hook=True)[2]

            first = dispatched()()
            if not is_normal:
                first()
            begun = [] if stage == "dispatch" else [dispatched(), dispatched()]
            if rank == 3:
                buffer.destroy()
            buffer.group.all_gather("left")
            if not is_normal and rank != 3:
                begun = [combine() for combine in begun]
            buffer.group.all_gather("begun")
            # Of two that had begun the second is not summed without it either, when the first has told that it is dead.
            for call in [*begun, dispatched, dispatched] if rank != 3 else []:
                with self.subTest(stage=stage, is_normal=is_normal, **options), self.assertRaises(GroupLost):
                    call()

        for is_normal, shrinks in ((False, False), (True, False), (True, True)):
            options = dict(low_latency_mode=True, enable_shrink=shrinks)
            for stage in ("dispatch", "combine"):
                on_every_rank(work, **options)

    def test_where_the_ranks_meet(self) -> None:
        from crossdock.deep_ep import Buffer

        def work(buffer: Any, rank: int) -> None:
            x, chosen, _ = given_of(rank, 3)
            gather, told = buffer.group.all_gather, []
            buffer.group.all_gather = lambda address: told.append(address) or gather(address)
            buffer.low_latency_dispatch(x, chosen, 16, EXPERTS)
            self.assertRegex(told[0], r"^127\.0\.0\.2:\d+$")

        with mock.patch.dict(ENVIRONMENT, CROSSDOCK_HOST="127.0.0.2"):
            on_every_rank(work, ranks=2, low_latency_mode=True)
        group = Ranks(1).of(0)
        with mock.patch.dict(os.environ, ENVIRONMENT, CROSSDOCK_HOST="a-name"):
            with self.assertRaisesRegex(BadArgument, "CROSSDOCK_HOST"):
                Buffer(group)
        with mock.patch.dict(os.environ, ENVIRONMENT, CROSSDOCK_KEY=""):
            with self.assertLogs("crossdock", "WARNING") as logged:
                Buffer(group)
        self.assertIn("CROSSDOCK_KEY is not set", logged.output[0])

    def test_events_and_sizes(self) -> None:
        from crossdock.deep_ep import Buffer, Config, EventHandle, EventOverlap
        from crossdock.deep_ep._seats import SLOTS

        heard: List[int] = []
        event = EventOverlap(EventHandle(), (1, 2))
        event.register_hook_after_wait(lambda: heard.append(1))
        with event:
            self.assertEqual(heard, [])
        event.current_stream_wait()
        self.assertEqual((heard, event.extra_tensors), ([1], (1, 2)))
        with event(release_handle=True) as same:
            self.assertIs(same, event)
        self.assertEqual((event.event, event.extra_tensors), (None, None))
        with event:
            pass
        with self.assertRaises(AssertionError):
            event.current_stream_wait()
        Buffer.capture().current_stream_wait()
        usual = Buffer.num_sms
        self.addCleanup(Buffer.set_num_sms, usual)
        Buffer.set_num_sms(24)
        with self.assertRaises(AssertionError):
            Buffer.set_num_sms(25)
        self.assertEqual(Buffer.get_dispatch_config(16).num_sms, 24)
        for config in (Config(24, 8, 100), Buffer.get_combine_config(8)):
            for ranks, has_nodes in ((8, False), (16, True)):
                within, between = (
                    call(250, ranks) for call in (config.get_nvl_buffer_size_hint, config.get_rdma_buffer_size_hint)
                )
                self.assertEqual((within % 128, between % 128, between > 0), (0, 0, has_nodes))
                self.assertGreaterEqual(within, 100 * 250 * ranks)
        sizes = [Buffer.get_low_latency_rdma_size_hint(tokens, 7168, 8, 256) for tokens in (64, 128)]
        self.assertEqual([size % 128 for size in sizes], [0, 0])
        # At least the rows of a dispatch in BF16, and those that come back.
        self.assertGreater(sizes[1], 8 * 128 * 7168 * 2)
        self.assertLess(sizes[0], sizes[1])
        needed = dict(experts=256, top_k=8, hidden=7168, slots=SLOTS)
        self.assertGreaterEqual(sizes[1], Group.needed_bytes(max_tokens=[128] * 8, **needed))

        def work(buffer: Any, rank: int) -> None:
            for call in (buffer.get_comm_stream, lambda: buffer.get_local_buffer_tensor(numpy.uint8)):
                with self.assertRaises(Unsupported):
                    call()

        on_every_rank(work, ranks=1)


if __name__ == "__main__":
    unittest.main()
