"""The latency mode: a row for each choice, packed by expert."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

import numpy

from ..errors import OutOfOrder
from ..experts import Rows, ScaleRule
from ._events import EventOverlap, asserted, event_of
from ._ranks import Ranks
from ._seats import SLOTS, Handle, moved, ranges_of
from ._tensors import INDICES, has_extents, kind_of, numbers_of

Hook = Optional[Callable[[], None]]


class Latency(Ranks):
    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """There is nothing to clean; waits for all ranks, as DeepEP does, once they have met."""
        self._is_for_latency()
        for (limit, experts, _, channels, mode), shape in self._shapes.items():
            if (limit, experts, channels, mode) == (num_max_dispatch_tokens_per_rank, num_experts, hidden, 1):
                shape.wait_for_all()

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> Tuple[Any, Any, Any, EventOverlap, Hook]:
        """Sends tokens to their experts; what comes is packed by expert. With `return_recv_hook` it is there when the
        hook has been called."""
        self._is_for_latency()
        asserted(not (async_finish and return_recv_hook), "async_finish and return_recv_hook exclude each other")
        asserted(round_scale or not use_ue8m0, "use_ue8m0 needs round_scale")
        kind, ranks = kind_of(x), self.group_size
        has_extents("x", x, (-1, -1))
        tokens, hidden = x.shape
        sent = kind.bits(x, 2)
        # Of the handle's own: the combine compares them.
        choices = numbers_of("topk_idx", topk_idx, (tokens, -1), *INDICES).astype(numpy.int64, order="C")
        here = num_experts // ranks
        stats = _stats("cumulative_local_expert_recv_stats", cumulative_local_expert_recv_stats, here, *INDICES)
        costs = _stats("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats, ranks, "int64")
        form = Rows.BF16 if not use_fp8 else Rows.FP8_UE8M0 if use_ue8m0 else Rows.FP8
        rule = ScaleRule.POWER_OF_TWO if round_scale else ScaleRule.PLAIN
        shape = self._shape(num_max_dispatch_tokens_per_rank, num_experts, choices.shape[1], hidden, 1)
        seat = shape.take()
        outputs, *arrays = packed = shape.latency(form)
        shape.dispatch(seat, sent, choices, count=tokens, form=form, scale_rule=rule)
        route = seat.slot.route()
        experts, rows = outputs.experts, outputs.rows
        values = packed.values.reshape(experts, rows, outputs.row_bytes)
        counts = numpy.zeros(experts, numpy.int32)
        layout = numpy.zeros((experts, ranks), numpy.int64)
        sources = packed.sources.view(numpy.int32).reshape(experts, rows)
        if use_fp8:
            words = packed.scales.view(numpy.int32 if use_ue8m0 else numpy.float32)
            scales = words.reshape(experts, outputs.scale_bytes // 4, rows).transpose(0, 2, 1)
            received: Any = (kind.fp8(values, x), kind.tensor(scales))
        else:
            received = kind.like(values.view(numpy.uint16), x)
        told = (kind.tensor(sources), kind.tensor(layout), num_max_dispatch_tokens_per_rank, hidden, num_experts)
        made = Handle.of(told, shape, route, tokens)
        made.choices, made.outputs = choices, outputs
        shape.sit(seat, made)

        def receive(held: object = arrays) -> None:
            if made.seat is not seat:
                words = "the hook of a dispatch was called too late: its slot is used by a later call"
                raise OutOfOrder(words, f"call it before the next {SLOTS} calls", 22)
            seat.slot.receive(outputs)
            counts[:] = numpy.asarray(outputs.counts)
            made.place.ranges = ranges_of(outputs, ranks)
            ranges = numpy.array(outputs.ranges(), numpy.int64).reshape(experts, ranks, 2)
            layout[:] = ranges[:, :, 0] << 32 | (ranges[:, :, 1] - ranges[:, :, 0])
            _add(stats, counts)
            _add(costs, _microseconds(seat.slot.waits()))

        recv_count = kind.tensor(counts)
        if return_recv_hook:
            return received, recv_count, made, event_of(False), _once(receive)
        receive()
        return received, recv_count, made, event_of(async_finish), None

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: Any,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Any = None,
        combine_wait_recv_cost_stats: Any = None,
    ) -> Tuple[Any, EventOverlap, Hook]:
        """Brings results back, `[local experts, rows, hidden]` in bfloat16, and sums those of each token by its
        weights. Results travel as they are, whatever `use_logfmt` says. Choices are those of the dispatch; one that is
        -1 here adds nothing."""
        asserted(not (async_finish and return_recv_hook), "async_finish and return_recv_hook exclude each other")
        kind, handle = kind_of(x), self._handle(handle, True)
        shape, outputs, place, tokens, hidden = handle.shape, handle.outputs, handle.place, handle.tokens, handle[3]
        # All that can be refused is refused before the other ranks hear of this call.
        has_extents("x", x, (outputs.experts, outputs.rows, hidden))
        results = kind.bits(x, 2)
        weights = self._weights(handle, topk_idx, topk_weights)
        costs = _stats("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats, self.group_size, "int64")
        if out is None:
            combined = numpy.zeros((tokens, hidden), numpy.uint16)
            told = kind.like(combined, x)
        else:
            has_extents("out", out, (tokens, hidden))
            asserted(kind_of(out).is_contiguous(out), "out does not lie in one piece: give it contiguous")
            combined, told = kind_of(out).bits(out, 2), out
        if place.ranges is None:
            raise OutOfOrder("a combine before the hook of its dispatch was called", "call the hook first", 22)
        if zero_copy:
            if handle.seat is None:
                words = "the results of a combine without a copy are gone: their slot is used by a later call"
                raise OutOfOrder(words, f"ask for the buffer, fill it and combine within {SLOTS} calls", 22)
            results = place.aside
        seat = handle.seated()
        if results is not None:
            if place.moves is not None:
                results = results.reshape(-1, hidden)
                results = moved(results, place.moves, len(results))
            seat.slot.copy_results(results)
        seat.slot.combine()

        def receive() -> None:
            shape.combining.discard(seat.number)
            seat.slot.finish(combined, weights)
            _add(costs, _microseconds(seat.slot.waits()))

        # What is under way is no dispatch any more.
        shape.leave(seat.number)
        shape.combining.add(seat.number)
        if return_recv_hook:
            return told, event_of(False), _once(receive)
        receive()
        return told, event_of(async_finish), None

    def _weights(self, handle: Handle, topk_idx: Any, topk_weights: Any) -> Any:
        """By which results are weighed: 0 for a choice that is taken back."""
        given = numbers_of("topk_idx", topk_idx, handle.choices.shape, *INDICES)
        weights = numbers_of("topk_weights", topk_weights, handle.choices.shape, "float32")
        is_other = given != handle.choices
        if is_other.any():
            asserted(not (given[is_other] >= 0).any(), "topk_idx names experts that the dispatch did not choose there")
            weights = numpy.where(is_other, numpy.float32(0), weights)
        return numpy.ascontiguousarray(weights)

    def get_next_low_latency_combine_buffer(self, handle: Any) -> Any:
        """Where results may be written that a combine with `zero_copy` then finds, `[local experts, rows, hidden]`."""
        handle = self._handle(handle, True)
        if handle.place.ranges is None:
            raise OutOfOrder("results of a dispatch whose hook was not called", "call the hook first", 22)
        seat = handle.seated()
        whole = numpy.asarray(seat.slot.all_results(handle.outputs))
        if handle.place.moves is not None:
            handle.place.aside = whole = numpy.zeros_like(whole)
        return kind_of(handle[0]).bf16(whole.reshape(handle.outputs.experts, handle.outputs.rows, handle[3]))

    def _is_for_latency(self) -> None:
        self._is_open()
        asserted(self.low_latency_mode, "the buffer was made without low_latency_mode")


def _stats(name: str, given: Any, count: int, *dtypes: str) -> Any:
    return None if given is None else numbers_of(name, given, (count,), *dtypes)


def _add(stats: Any, more: Any) -> None:
    if stats is not None:
        stats += more.astype(stats.dtype)


def _once(receive: Callable[[], None]) -> Callable[[], None]:
    """A hook that does nothing when it is called again, unless it failed."""
    left = [receive]

    def hook() -> None:
        if left:
            left[0]()
            left.clear()

    return hook


def _microseconds(waits: List[float]) -> Any:
    return numpy.array([round(wait * 1e6) for wait in waits], numpy.int64)
