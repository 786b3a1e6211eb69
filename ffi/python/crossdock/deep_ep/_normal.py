"""The normal mode: rows go once to each rank that has an expert for them."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy

from ..errors import BadArgument
from ..experts import Rows, ThroughputOutputs
from ._events import Config, EventOverlap, Misused, asserted, event_of
from ._ranks import Ranks
from ._seats import Handle, ranges_of
from ._tensors import INDICES, Kind, bytes_of, has_extents, kind_of, numbers_of


class Normal(Ranks):
    max_tokens_per_rank = 4096
    """In one call of the normal mode. Set it before the first, alike on all ranks."""

    num_sms = 20

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Any, Any, Any, Any, EventOverlap]:
        """Tokens by rank, tokens by node (None in one of up to 8 ranks), choices by expert, `[tokens, ranks]` whether a
        token goes to a rank."""
        kind, ranks = kind_of(topk_idx), self.group_size
        chosen = numbers_of("topk_idx", topk_idx, (-1, -1), *INDICES).astype(numpy.int64)
        self._shared_out(num_experts)
        if chosen.size and chosen.max() >= num_experts:
            raise BadArgument(f"expert {chosen.max()} of {num_experts} was chosen", "", 3)
        there = numpy.zeros((len(chosen), ranks + 1), bool)
        goes_to = numpy.where(chosen < 0, ranks, chosen // (num_experts // ranks))
        there[numpy.arange(len(chosen))[:, None], goes_to] = True
        is_token_in_rank = numpy.ascontiguousarray(there[:, :ranks])
        per_expert = numpy.bincount(chosen[chosen >= 0], minlength=num_experts).astype(numpy.int32)
        per_rank = is_token_in_rank.sum(0).astype(numpy.int32)
        per_node = None
        if ranks > 8:
            nodes = is_token_in_rank.reshape(len(chosen), ranks // 8, 8).any(2)
            per_node = kind.tensor(nodes.sum(0).astype(numpy.int32))
        told = (kind.tensor(per_rank), per_node, kind.tensor(per_expert), kind.tensor(is_token_in_rank))
        return (*told, event_of(async_finish))

    def dispatch(
        self,
        x: Any,
        handle: Optional[Any] = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Any, Any, Any, Any, Any, EventOverlap]:
        """Sends each token to the ranks of its experts, or of `is_token_in_rank`; with a handle, where its dispatch
        went."""
        values, scales = x if isinstance(x, tuple) else (x, None)
        kind = kind_of(values)
        has_extents("x", values, (-1, -1))
        tokens, hidden = values.shape
        form, arguments = _form(kind, values, scales)
        if handle is not None:
            asserted(topk_idx is None and topk_weights is None, "a handle says where tokens go")
            received = self._dispatch_again(kind, values, scales, form, arguments, handle)
            return received, None, None, None, None, event_of(async_finish)

        asserted(is_token_in_rank is not None, "the layout is not given: call get_dispatch_layout")
        asserted((topk_idx is None) == (topk_weights is None), "choices and weights come together")
        asserted(topk_idx is not None or num_worst_tokens == 0, "num_worst_tokens needs choices")
        asserted(expert_alignment > 0, f"expert_alignment is {expert_alignment}")
        if tokens > self.max_tokens_per_rank:
            advice = "raise Buffer.max_tokens_per_rank on all ranks before the first call"
            raise BadArgument(f"{tokens} tokens; a call takes {self.max_tokens_per_rank}", advice, 3)
        is_in = numbers_of("is_token_in_rank", is_token_in_rank, (tokens, self.group_size), "bool")
        told = None
        if num_tokens_per_expert is not None:
            told = numbers_of("num_tokens_per_expert", num_tokens_per_expert, (-1,), *INDICES)
            self._shared_out(len(told))
        weights = None
        if topk_idx is None:
            # Each rank stands for an expert of its own.
            experts = top_k = self.group_size
            choices = numpy.where(is_in, numpy.arange(self.group_size), -1)
        elif told is None:
            raise Misused("the layout is not given: call get_dispatch_layout", "", 3)
        else:
            choices = numbers_of("topk_idx", topk_idx, (tokens, -1), *INDICES)
            experts, top_k = len(told), choices.shape[1]
            weights = numbers_of("topk_weights", topk_weights, (tokens, top_k), "float32")
            weights = numpy.ascontiguousarray(weights)
        shape = self._shape(self.max_tokens_per_rank, experts, top_k, hidden, 0)
        seat = shape.take()
        per_expert: List[int] = []
        if topk_idx is None and told is not None:
            sums = shape.sums_told(seat, told)
            per_expert = [-(-count // expert_alignment) * expert_alignment for count in sums]
        choices = numpy.ascontiguousarray(choices, numpy.int64)
        outputs, route = shape.exchange(seat, form, **arguments, choices=choices, weights=weights, count=tokens)
        count = outputs.count
        rows = num_worst_tokens or count
        if rows < count:
            raise BadArgument(f"{count} rows came, more than num_worst_tokens, {num_worst_tokens}", "", 3)
        received = _received(kind, outputs, rows, values, scales, form)
        recv_idx = recv_weights = None
        if topk_idx is not None:
            recv_idx = numpy.full((rows, top_k), -1, numpy.int64)
            recv_idx[:count] = numpy.asarray(outputs.experts)[: count * top_k].reshape(count, top_k)
            recv_weights = numpy.zeros((rows, top_k), numpy.float32)
            recv_weights[:count] = numpy.asarray(outputs.weights)[: count * top_k].reshape(count, top_k)
            recv_idx, recv_weights = kind.indices(recv_idx, topk_idx), kind.tensor(recv_weights)
            per_expert = [] if num_worst_tokens else outputs.counts(expert_alignment)
        made = Handle.of(self._told(kind, outputs, is_token_in_rank), shape, route, tokens, count)
        shape.sit(seat, made)
        made.place.ranges = ranges_of(outputs, self.group_size)
        return received, recv_idx, recv_weights, per_expert, made, event_of(async_finish)

    def _dispatch_again(
        self, kind: Kind, values: Any, scales: Any, form: Rows, arguments: Dict[str, Any], given: Any
    ) -> Any:
        handle = self._handle(given, False)
        shape = handle.shape
        has_extents("x", values, (handle.tokens, shape.group.info.hidden))
        seat = shape.take()
        outputs, _ = shape.exchange(seat, form, **arguments, count=handle.tokens, route=handle.route)
        if handle.seat is not None:
            shape.leave(handle.seat.number)
        shape.sit(seat, handle)
        handle.rows, handle.place.ranges = outputs.count, ranges_of(outputs, self.group_size)
        return _received(kind, outputs, outputs.count, values, scales, form)

    def internode_dispatch(
        self,
        x: Any,
        handle: Optional[Any] = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Any, Any, Any, Any, Any, EventOverlap]:
        """As `dispatch`, which serves any number of ranks."""
        layout = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
        chosen = (topk_idx, topk_weights, expert_alignment)
        events = (previous_event, async_finish, allocate_on_comm_stream)
        return self.dispatch(x, handle, *layout, *chosen, 0, config, *events)

    def combine(
        self,
        x: Any,
        handle: Any,
        topk_weights: Any = None,
        bias: Any = None,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Any, Any, EventOverlap]:
        """Brings the rows of a dispatch back, `[rows, hidden]` in bfloat16, and sums those of each token."""
        kind, handle = kind_of(x), self._handle(handle, False)
        info = handle.shape.group.info
        hidden, tokens = info.hidden, handle.tokens
        # All that can be refused is refused before the other ranks hear of this call.
        has_extents("x", x, (-1, hidden))
        rows = len(x)
        if rows < handle.rows:
            raise BadArgument(f"{rows} rows, and {handle.rows} were received", "", 3)
        sent = kind.bits(x, 2)[: handle.rows]
        weights = back = None
        if topk_weights is not None:
            weights = numbers_of("topk_weights", topk_weights, (-1, info.top_k), "float32")
            if len(weights) < handle.rows:
                raise BadArgument(f"weights of {len(weights)} rows, and {handle.rows} were received", "", 3)
            weights = numpy.ascontiguousarray(weights[: handle.rows])
            back = numpy.zeros((tokens, info.top_k), numpy.float32)
        biases = []
        for one in bias if isinstance(bias, tuple) else (bias,):
            if one is not None:
                has_extents("bias", one, (tokens, hidden))
                biases.append(kind_of(one).bits(one, 2))
        asserted(len(biases) <= 2, f"{len(biases)} biases: there are at most two")
        seat = handle.seated()
        # The view has no name: a failure's traceback would keep it, and with it the group of a destroyed buffer.
        numpy.asarray(seat.slot.results()).reshape(-1, hidden)[:] = sent
        seat.slot.combine(weights)
        combined = numpy.zeros((tokens, hidden), numpy.uint16)
        seat.slot.finish(combined, back, biases)
        handle.shape.leave(seat.number)
        return kind.like(combined, x), None if back is None else kind.tensor(back), event_of(async_finish)

    internode_combine = combine

    def _shared_out(self, experts: int) -> None:
        ranks = self.group_size
        asserted(experts > 0 and experts % ranks == 0, f"{experts} experts on {ranks} ranks: give each as many")
        asserted(ranks <= 8 or ranks % 8 == 0, f"{ranks} ranks, which are no whole nodes of 8")

    def _told(self, kind: Kind, outputs: ThroughputOutputs, is_token_in_rank: Any) -> Tuple[Any, ...]:
        """What callers read of a handle, at its place: where each source's rows end, and which of its tokens each row
        is. What only DeepEP's own kernels read of it is all zeros."""
        tokens, ranks, channels = len(is_token_in_rank), self.group_size, self.num_sms // 2
        ends = numpy.array(outputs.ranges(), numpy.int32).reshape(ranks, 2)[:, 1]

        def zeros(*extents: int, form: Any = numpy.int32) -> Any:
            return kind.tensor(numpy.zeros(extents, form))

        if ranks <= 8:
            prefix = numpy.zeros((ranks, ranks), numpy.int32)
            prefix[:, self.rank] = ends
            sources = kind.tensor(numpy.asarray(outputs.tokens)[: outputs.count].astype(numpy.int32))
            matrices = (kind.tensor(prefix), zeros(ranks, channels), zeros(ranks, channels))
            return (*matrices, sources, is_token_in_rank, zeros(tokens, ranks))
        nodes = ranks // 8
        node_ends, rank_ends = (kind.tensor(numpy.ascontiguousarray(one)) for one in (ends[7::8], ends))
        senders = (is_token_in_rank, zeros(nodes, channels), zeros(ranks, channels))
        receivers = (zeros(nodes, channels), node_ends, zeros(ranks, channels), rank_ends)
        rows = (zeros(outputs.count, 8, form=numpy.uint8), zeros(tokens, nodes), zeros(outputs.count, 8))
        return (*senders, *receivers, *rows)


def _form(kind: Kind, values: Any, scales: Any) -> Tuple[Rows, Dict[str, Any]]:
    """Of rows as they are given: with scales they are FP8. A scale is for 128 channels; integers are four of them."""
    if scales is None:
        return Rows.BF16, {"rows": kind.bits(values, 2)}
    tokens, hidden = values.shape
    given = numbers_of("scales", scales, (tokens, -1), "float32", "int32")
    form, channels = (Rows.FP8, 128) if given.dtype == numpy.float32 else (Rows.FP8_UE8M0, 512)
    has_extents("scales", given, (tokens, -(-hidden // channels)))
    return form, {
        "rows": kind.bits(values, 1),
        "scales": bytes_of(given),
        "scale_strides": given.strides,
        "scale_element_bytes": 4,
    }


def _received(kind: Kind, outputs: ThroughputOutputs, rows: int, sent: Any, scales: Any, form: Rows) -> Any:
    """Rows of one's own: outputs are used again. Those past the count are zeros."""

    def copied(view: Any, row_bytes: int) -> Any:
        count = outputs.count
        found = numpy.empty((rows, row_bytes), numpy.uint8)
        found[:count] = numpy.asarray(view)[: count * row_bytes].reshape(count, row_bytes)
        found[count:] = 0
        return found

    values = copied(outputs.values, outputs.row_bytes)
    if scales is None:
        return kind.bf16(values.view(numpy.uint16).reshape(rows, sent.shape[1]))
    words = copied(outputs.scales, outputs.scale_bytes).view(numpy.float32 if form == Rows.FP8 else numpy.int32)
    return kind.fp8(values, sent), kind.tensor(words)
