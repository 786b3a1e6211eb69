"""`Buffer` with DeepEP's call shapes, over crossdock's expert groups, on CPU tensors.

A program that says `from deep_ep import Buffer` runs with `from crossdock.deep_ep import Buffer`. Tensors are PyTorch's, or
NumPy's arrays, of which 16-bit integers stand for bfloat16 and 8-bit ones for FP8; what comes back is of the kind that was
given. `group` is a process group of `torch.distributed`, or any object with `rank()`, `size()` and `all_gather(object)`, which
gives every rank's object by rank; `comm` an mpi4py communicator.

What is different: nothing here takes sizes from `num_nvl_bytes` and `num_rdma_bytes`: memory is taken where rows arrive.
Ranks meet once for each shape (experts, choices, channels, and the token limit) at the first call that has it, so that call is
collective, as all are. The normal mode takes at most `Buffer.max_tokens_per_rank` tokens of a rank in one call. There are no
streams: every call is over when it returns, but for the hooks of the latency mode, and events say so. A hook is to be called
before the next eight calls of its shape. A masked rank cannot be taken back. The environment may set `CROSSDOCK_KEY`, which all ranks share, and `CROSSDOCK_BIND`, the address that
the other ranks reach (`127.0.0.1` without it).
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy

from .errors import BadArgument, OutOfOrder
from .experts import Group, LatencyOutputs, Report, Route, Rows, ScaleRule, Slot, ThroughputOutputs

# Of one shape of calls. A handle whose slot was taken for another dispatch is dispatched anew when it is combined.
_SLOTS = 8
_BLOCK_CHANNELS = 128


class EventHandle:
    """An event that has happened."""

    def current_stream_wait(self) -> None:
        pass


class EventOverlap:
    """What DeepEP gives for a call that may go on; here it is over."""

    def __init__(self, event: Optional[EventHandle] = None, extra_tensors: Optional[Tuple[Any, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._hooks: List[Callable[[], None]] = []

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None, "the call was made without async_finish"
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait()


class Config:
    """DeepEP's tuning of its kernels, which means nothing here."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        if num_sms % 2:
            raise BadArgument(f"num_sms is {num_sms}, which is odd", "", 3)
        self.num_sms = num_sms
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_max_nvl_chunked_recv_tokens * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_max_rdma_chunked_recv_tokens * hidden_bytes * num_ranks if num_ranks > 8 else 0


class _Seat(NamedTuple):
    """A slot of a shape's group, and what is received there."""

    number: int
    slot: Slot


class _Shape:
    """One group of the ranks, for calls of one shape."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.seats = [_Seat(number, group.slot(number)) for number in range(_SLOTS)]
        # By seat: the handle whose dispatch it holds.
        self.holders: List[Optional[_Handle]] = [None] * _SLOTS
        # Seats whose combine waits for its hook.
        self.combining: Set[int] = set()
        self._next = 0
        self._throughput: Dict[Rows, ThroughputOutputs] = {}
        self._latency: Dict[Tuple[Rows, int], LatencyOutputs] = {}
        self._turns: Dict[Rows, int] = {}
        self._probe: Optional[Tuple[ThroughputOutputs, LatencyOutputs]] = None

    def take(self) -> _Seat:
        """The next seat round and round, which is the same on all ranks; who has it is dispatched anew when it is combined."""
        number = self._next
        self._next = (number + 1) % _SLOTS
        if number in self.combining:
            raise OutOfOrder("the hook of a combine was never called", "call each hook before the next calls", 22)
        self.leave(number)
        self.seats[number].slot.abandon()
        return self.seats[number]

    def dispatch(self, seat: _Seat, *rows: Any, **options: Any) -> None:
        """A call that fails here was none: the other ranks wait for it still, in this seat."""
        try:
            seat.slot.dispatch(*rows, **options)
        except Exception:
            self._next = seat.number
            raise

    def leave(self, number: int) -> None:
        holder, self.holders[number] = self.holders[number], None
        if holder is not None:
            holder.seat = None

    def throughput(self, form: Rows) -> ThroughputOutputs:
        if form not in self._throughput:
            self._throughput[form] = self.group.throughput_outputs(form)
        return self._throughput[form]

    def latency(self, form: Rows) -> LatencyOutputs:
        """Each the one after the next: what a call gave is there until the second call after it."""
        turn = self._turns[form] = 1 - self._turns.get(form, 1)
        if (form, turn) not in self._latency:
            self._latency[form, turn] = self.group.latency_outputs(form, scales_by_column=form != Rows.BF16)
        return self._latency[form, turn]

    def dispatch_again(self, handle: _Handle, is_latency: bool) -> _Seat:
        """The same route once more, with rows as short as they can be: for a combine without a dispatch before it."""
        seat = self.take()
        if self._probe is None:
            form = Rows.OPAQUE
            self._probe = (
                self.group.throughput_outputs(form, row_bytes=_PROBE_BYTES),
                self.group.latency_outputs(form, row_bytes=_PROBE_BYTES),
            )
        rows = bytes(max(1, handle.tokens) * _PROBE_BYTES)
        self.dispatch(seat, rows, count=handle.tokens, form=Rows.OPAQUE, row_bytes=_PROBE_BYTES, route=handle.route)
        seat.slot.receive(self._probe[1] if is_latency else self._probe[0])
        self.sit(seat, handle)
        return seat

    def sit(self, seat: _Seat, handle: _Handle) -> None:
        self.holders[seat.number] = handle
        handle.seat = seat


_PROBE_BYTES = 16


class _Handle(tuple):  # type: ignore[type-arg]
    """What DeepEP's callers read of a handle, and what its combine needs."""

    shape: _Shape
    route: Route
    seat: Optional[_Seat]
    tokens: int
    rows: int
    outputs: Optional[LatencyOutputs]


def _handle(fields: Sequence[Any], shape: _Shape, route: Route, tokens: int, rows: int) -> _Handle:
    made = _Handle(fields)
    made.shape, made.route, made.seat, made.tokens, made.rows, made.outputs = shape, route, None, tokens, rows, None
    return made


class Buffer:
    """One rank's end of DeepEP's calls. All ranks make the same calls in the same order."""

    num_sms = 20
    max_tokens_per_rank = 4096
    """Of the normal mode, in one call. Set it before the first, alike on all ranks."""

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
    ) -> None:
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric
        if group is None and comm is None:
            raise ValueError("neither a group nor a communicator is given")
        self.group = group
        self._comm = comm
        self.rank: int = comm.Get_rank() if group is None else group.rank()
        self.group_size: int = comm.Get_size() if group is None else group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Any = self
        self._shapes: Dict[Tuple[int, ...], _Shape] = {}

    # Life

    def destroy(self) -> None:
        """Leaves the other ranks."""
        assert self.explicitly_destroy, "the buffer was made without explicitly_destroy"
        shapes, self._shapes, self.runtime = self._shapes, {}, None
        for shape in shapes.values():
            shape.group.close()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """FP8 is possible."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "num_sms is odd"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        limits = [num_max_dispatch_tokens_per_rank] * num_ranks
        return Group.needed_bytes(
            max_tokens=limits, experts=num_experts, top_k=min(8, num_experts), hidden=hidden, slots=2
        )

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in _CONFIGURED_RANKS, f"there is no configuration for {num_ranks} ranks"
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    # The normal mode

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Any, Any, Any, Any, EventOverlap]:
        """Tokens by rank, tokens by node (None in one of up to 8 ranks), choices by expert, whether a token goes to a rank."""
        kind = _kind_of(topk_idx)
        chosen = kind.numbers(topk_idx).astype(numpy.int64)
        ranks = self.group_size
        there = numpy.zeros((len(chosen), ranks + 1), bool)
        there[numpy.arange(len(chosen))[:, None], numpy.where(chosen < 0, ranks, chosen // (num_experts // ranks))] = True
        is_token_in_rank = numpy.ascontiguousarray(there[:, :ranks])
        per_expert = numpy.bincount(chosen[chosen >= 0], minlength=num_experts).astype(numpy.int32)
        per_rank = is_token_in_rank.sum(0).astype(numpy.int32)
        per_node = None
        if ranks > 8:
            nodes = is_token_in_rank.reshape(len(chosen), ranks // 8, 8).any(2)
            per_node = kind.tensor(nodes.sum(0).astype(numpy.int32))
        told = (kind.tensor(per_rank), per_node, kind.tensor(per_expert), kind.tensor(is_token_in_rank))
        return (*told, _event(async_finish))

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
        """Sends each token to the ranks of its experts, or of `is_token_in_rank`; with a handle, where its dispatch went."""
        values, scales = x if isinstance(x, tuple) else (x, None)
        kind = _kind_of(values)
        tokens, hidden = values.shape
        form, arguments = self._form(kind, values, scales)
        if handle is not None:
            assert topk_idx is None and topk_weights is None, "a handle says where tokens go"
            if tokens != handle.tokens:
                raise BadArgument(f"{tokens} tokens, and the handle is of {handle.tokens}", "", 3)
            shape = handle.shape
            seat = shape.take()
            outputs = shape.throughput(form)
            shape.dispatch(seat, **arguments, count=tokens, form=form, route=handle.route)
            seat.slot.receive(outputs)
            if handle.seat is not None:
                shape.leave(handle.seat.number)
            shape.sit(seat, handle)
            received = self._received(kind, outputs, outputs.count, hidden, scales, form)
            return received, None, None, None, None, _event(async_finish)

        assert is_token_in_rank is not None, "the layout is not given: call get_dispatch_layout"
        if tokens > self.max_tokens_per_rank:
            advice = "raise Buffer.max_tokens_per_rank on all ranks before the first call"
            raise BadArgument(f"{tokens} tokens; a call takes {self.max_tokens_per_rank}", advice, 3)
        assert (topk_idx is None) == (topk_weights is None), "choices and weights come together"
        weights = None
        if topk_idx is None:
            # Each rank stands for an expert of its own.
            is_in = kind.numbers(is_token_in_rank).astype(bool)
            experts = top_k = self.group_size
            choices = numpy.where(is_in, numpy.arange(self.group_size), -1)
        else:
            experts, top_k = num_tokens_per_expert.shape[0], topk_idx.shape[1]
            choices = kind.numbers(topk_idx)
            weights = numpy.ascontiguousarray(kind.numbers(topk_weights), numpy.float32)
        shape = self._shape(self.max_tokens_per_rank, experts, top_k, hidden, 0)
        seat = shape.take()
        outputs = shape.throughput(form)
        choices = numpy.ascontiguousarray(choices, numpy.int64)
        shape.dispatch(seat, **arguments, choices=choices, weights=weights, count=tokens, form=form)
        route = seat.slot.route()
        seat.slot.receive(outputs)
        count = outputs.count
        rows = count if num_worst_tokens == 0 else num_worst_tokens
        if rows < count:
            raise BadArgument(f"{count} rows came, more than num_worst_tokens, {num_worst_tokens}", "", 3)
        received = self._received(kind, outputs, rows, hidden, scales, form)
        recv_idx = recv_weights = None
        per_expert: List[int] = []
        if topk_idx is not None:
            recv_idx = numpy.full((rows, top_k), -1, numpy.int64)
            recv_idx[:count] = numpy.asarray(outputs.experts)[: count * top_k].reshape(count, top_k)
            recv_weights = numpy.zeros((rows, top_k), numpy.float32)
            recv_weights[:count] = numpy.asarray(outputs.weights)[: count * top_k].reshape(count, top_k)
            recv_idx, recv_weights = kind.indices(recv_idx, topk_idx), kind.tensor(recv_weights)
            per_expert = [] if num_worst_tokens else outputs.counts(expert_alignment)
        ranges = numpy.array(outputs.ranges(), numpy.int32).reshape(self.group_size, 2)
        prefix = numpy.zeros((self.group_size, self.group_size), numpy.int32)
        prefix[:, self.rank] = ranges[:, 1]
        sources = numpy.asarray(outputs.tokens)[:count].astype(numpy.int32)
        channels = numpy.zeros((self.group_size, self.num_sms // 2), numpy.int32)
        told = (
            kind.tensor(prefix),
            kind.tensor(channels),
            kind.tensor(channels.copy()),
            kind.tensor(sources),
            is_token_in_rank,
            kind.tensor(numpy.zeros((tokens, self.group_size), numpy.int32)),
        )
        made = _handle(told, shape, route, tokens, count)
        shape.sit(seat, made)
        return received, recv_idx, recv_weights, per_expert, made, _event(async_finish)

    internode_dispatch = dispatch

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
        kind, shape = _kind_of(x), handle.shape
        rows, hidden = x.shape
        if rows < handle.rows:
            raise BadArgument(f"{rows} rows, and {handle.rows} were received", "", 3)
        seat = handle.seat or shape.dispatch_again(handle, False)
        results = numpy.asarray(seat.slot.results())
        results[:] = kind.bits(x, 2).reshape(-1)[: handle.rows * hidden]
        top_k = shape.group.info.top_k
        weights = back = None
        if topk_weights is not None:
            weights = numpy.ascontiguousarray(kind.numbers(topk_weights), numpy.float32)[: handle.rows]
            back = numpy.zeros((handle.tokens, top_k), numpy.float32)
        seat.slot.combine(weights)
        biases = [] if bias is None else [bias] if not isinstance(bias, tuple) else [one for one in bias if one is not None]
        combined = numpy.zeros((handle.tokens, hidden), numpy.uint16)
        seat.slot.finish(combined, back, [kind.bits(one, 2) for one in biases])
        shape.leave(seat.number)
        return kind.like(combined, x), None if back is None else kind.tensor(back), _event(async_finish)

    internode_combine = combine

    # The latency mode

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """There is nothing to clean."""

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
    ) -> Tuple[Any, Any, Any, EventOverlap, Optional[Callable[[], None]]]:
        """Sends tokens to their experts; what comes is packed by expert. With `return_recv_hook` it is there when the hook
        has been called."""
        assert not (async_finish and return_recv_hook), "async_finish and return_recv_hook exclude each other"
        assert round_scale or not use_ue8m0, "use_ue8m0 needs round_scale"
        kind = _kind_of(x)
        tokens, hidden = x.shape
        form = Rows.BF16 if not use_fp8 else Rows.FP8_UE8M0 if use_ue8m0 else Rows.FP8
        rule = ScaleRule.POWER_OF_TWO if round_scale else ScaleRule.PLAIN
        shape = self._shape(num_max_dispatch_tokens_per_rank, num_experts, topk_idx.shape[1], hidden, 1)
        seat = shape.take()
        outputs = shape.latency(form)
        choices = numpy.ascontiguousarray(kind.numbers(topk_idx), numpy.int64)
        shape.dispatch(seat, kind.bits(x, 2), choices, count=tokens, form=form, scale_rule=rule)
        route = seat.slot.route()
        experts, rows, ranks = outputs.experts, outputs.rows, self.group_size
        values = numpy.asarray(outputs.values).reshape(experts, rows, outputs.row_bytes)
        counts = numpy.zeros(experts, numpy.int32)
        layout = numpy.zeros((experts, ranks), numpy.int64)
        sources = numpy.asarray(outputs.tokens).view(numpy.int32).reshape(experts, rows)
        if use_fp8:
            words = numpy.asarray(outputs.scales).view(numpy.int32 if use_ue8m0 else numpy.float32)
            scales = words.reshape(experts, outputs.scale_bytes // 4, rows).transpose(0, 2, 1)
            received: Any = (kind.fp8(values, x), kind.tensor(scales))
        else:
            received = kind.like(values.view(numpy.uint16), x)
        told = (
            kind.tensor(sources),
            kind.tensor(layout),
            num_max_dispatch_tokens_per_rank,
            hidden,
            num_experts,
        )
        made = _handle(told, shape, route, tokens, 0)
        made.outputs = outputs
        shape.sit(seat, made)

        def receive() -> None:
            if made.seat is not seat:
                words = "the hook of a dispatch was called too late: its slot is used by a later call"
                raise OutOfOrder(words, f"call it before the next {_SLOTS} calls", 22)
            seat.slot.receive(outputs)
            counts[:] = numpy.asarray(outputs.counts)
            ranges = numpy.array(outputs.ranges(), numpy.int64).reshape(experts, ranks, 2)
            layout[:] = ranges[:, :, 0] << 32 | (ranges[:, :, 1] - ranges[:, :, 0])
            _add(kind, cumulative_local_expert_recv_stats, counts)
            _add(kind, dispatch_wait_recv_cost_stats, _microseconds(seat.slot.waits()))

        recv_count = kind.tensor(counts)
        if return_recv_hook:
            return received, recv_count, made, _event(False), _once(receive)
        receive()
        return received, recv_count, made, _event(async_finish), None

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
    ) -> Tuple[Any, EventOverlap, Optional[Callable[[], None]]]:
        """Brings results back, `[local experts, rows, hidden]` in bfloat16, and sums those of each token by its weights.
        Results travel as they are, whatever `use_logfmt` says."""
        assert not (async_finish and return_recv_hook), "async_finish and return_recv_hook exclude each other"
        kind, shape = _kind_of(topk_weights), handle.shape
        seat = self._seat(handle)
        if not zero_copy:
            seat.slot.copy_results(kind.bits(x, 2))
        weights = numpy.ascontiguousarray(kind.numbers(topk_weights), numpy.float32)
        seat.slot.combine()
        combined = numpy.zeros((handle.tokens, handle[3]), numpy.uint16)
        if out is not None:
            combined = kind.bits(out, 2)
            if not kind.is_contiguous(out):
                raise BadArgument("out does not lie in one piece", "give it contiguous", 3)
        told = kind.like(combined, x) if out is None else out

        def receive() -> None:
            shape.combining.discard(seat.number)
            seat.slot.finish(combined, weights)
            _add(kind, combine_wait_recv_cost_stats, _microseconds(seat.slot.waits()))

        # What is under way is no dispatch any more.
        shape.leave(seat.number)
        shape.combining.add(seat.number)
        if return_recv_hook:
            return told, _event(False), _once(receive)
        receive()
        return told, _event(async_finish), None

    def get_next_low_latency_combine_buffer(self, handle: Any) -> Any:
        """Where results may be written that a combine with `zero_copy` then finds, `[local experts, rows, hidden]`."""
        seat = self._seat(handle)
        whole = numpy.asarray(seat.slot.all_results(handle.outputs))
        return _kind_of(handle[0]).bf16(whole.reshape(handle.outputs.experts, handle.outputs.rows, handle[3]))

    def _seat(self, handle: Any) -> _Seat:
        shape: _Shape = handle.shape
        seat: Optional[_Seat] = handle.seat
        return seat or shape.dispatch_again(handle, True)

    # Masks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Waits for a rank no longer. One that was masked cannot be taken back."""
        assert self.enable_shrink, "the buffer was made without enable_shrink"
        if not mask:
            raise BadArgument("a masked rank cannot be taken back", "make another buffer with it", 3)
        for shape in self._shapes.values():
            shape.group.mark_dead(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Fills an int32 tensor, by rank, with 1 for those that are masked."""
        assert self.enable_shrink, "the buffer was made without enable_shrink"
        masked = {rank for shape in self._shapes.values() for rank in shape.group.masked()}
        told = _kind_of(mask_status).numbers(mask_status)
        told[:] = [int(rank in masked) for rank in range(self.group_size)]

    def low_latency_clean_mask_buffer(self) -> None:
        assert self.enable_shrink, "the buffer was made without enable_shrink"
        if any(shape.group.masked() for shape in self._shapes.values()):
            raise BadArgument("a masked rank cannot be taken back", "make another buffer with it", 3)

    # Within

    def _shape(self, limit: int, experts: int, top_k: int, hidden: int, mode: int) -> _Shape:
        key = (limit, experts, top_k, hidden, mode)
        if key not in self._shapes:
            secret = os.environ.get("CROSSDOCK_KEY")
            host = os.environ.get("CROSSDOCK_BIND", "127.0.0.1")
            group = Group(
                self.rank,
                max_tokens=[limit] * self.group_size,
                experts=experts,
                top_k=top_k,
                hidden=hidden,
                slots=_SLOTS,
                key=secret.encode() if secret else None,
                bind=f"[{host}]:0" if ":" in host else f"{host}:0",
            )
            group.meet(self._all_gather(group.address))
            self._shapes[key] = _Shape(group)
        return self._shapes[key]

    def _all_gather(self, told: Any) -> List[Any]:
        if self.group is None:
            return list(self._comm.allgather(told))
        if hasattr(self.group, "all_gather"):
            return list(self.group.all_gather(told))
        import torch.distributed

        heard: List[Any] = [None] * self.group_size
        torch.distributed.all_gather_object(heard, told, group=self.group)
        return heard

    def _form(self, kind: Any, values: Any, scales: Any) -> Tuple[Rows, Dict[str, Any]]:
        if scales is None:
            return Rows.BF16, {"rows": kind.bits(values, 2)}
        given = kind.numbers(scales)
        form = Rows.FP8 if given.dtype == numpy.float32 else Rows.FP8_UE8M0
        return form, {
            "rows": kind.bits(values, 1),
            "scales": _bytes_of(given),
            "scale_strides": given.strides,
            "scale_element_bytes": 4,
        }

    def _received(
        self, kind: Any, outputs: ThroughputOutputs, rows: int, hidden: int, scales: Any, form: Rows
    ) -> Any:
        """Rows of one's own: outputs are used again."""
        count = outputs.count
        values = numpy.zeros((rows, outputs.row_bytes), numpy.uint8)
        values[:count] = numpy.asarray(outputs.values)[: count * outputs.row_bytes].reshape(count, outputs.row_bytes)
        if scales is None:
            return kind.bf16(values.view(numpy.uint16).reshape(rows, hidden))
        told = numpy.zeros((rows, outputs.scale_bytes), numpy.uint8)
        told[:count] = numpy.asarray(outputs.scales)[: count * outputs.scale_bytes].reshape(count, outputs.scale_bytes)
        words = told.view(numpy.float32 if form == Rows.FP8 else numpy.int32)
        return kind.fp8(values, None), kind.tensor(words)


_CONFIGURED_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


def _event(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)


def _once(receive: Callable[[], None]) -> Callable[[], None]:
    """A hook that does nothing when it is called again."""
    left = [receive]

    def hook() -> None:
        if left:
            left.pop()()

    return hook


def _microseconds(waits: List[float]) -> Any:
    return numpy.array([round(wait * 1e6) for wait in waits], numpy.int64)


def _add(kind: Any, stats: Any, more: Any) -> None:
    if stats is not None:
        numbers = kind.numbers(stats)
        numbers += more.astype(numbers.dtype)


def _bytes_of(array: Any) -> Any:
    """The bytes from an array's first element to its last, whatever lies between."""
    from ._abi import ffi

    if min(array.strides) < 0:
        raise BadArgument("scales that lie backwards", "give them forwards", 3)
    nbytes = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides)) + array.itemsize
    # With the array, so that it stays as long as its bytes are looked at.
    first = ffi.gc(ffi.cast("char *", array.__array_interface__["data"][0]), lambda _, kept=array: None)
    return ffi.buffer(first, nbytes if array.size else 0)


class _NumpyKind:
    """Arrays of NumPy: bfloat16 as 16-bit integers or ml_dtypes', FP8 as 8-bit ones or ml_dtypes'."""

    @staticmethod
    def numbers(tensor: Any) -> Any:
        return numpy.asarray(tensor)

    @staticmethod
    def bits(tensor: Any, nbytes: int) -> Any:
        array = numpy.ascontiguousarray(tensor)
        if array.dtype.itemsize != nbytes:
            raise BadArgument(f"elements of {array.dtype} are not of {nbytes} bytes", "", 3)
        return array.view(numpy.uint16 if nbytes == 2 else numpy.uint8)

    @staticmethod
    def is_contiguous(tensor: Any) -> bool:
        return bool(tensor.flags.c_contiguous)

    @staticmethod
    def tensor(array: Any) -> Any:
        return array

    @staticmethod
    def indices(array: Any, like: Any) -> Any:
        return array.astype(like.dtype)

    @staticmethod
    def bf16(array: Any) -> Any:
        return array

    @staticmethod
    def like(array: Any, tensor: Any) -> Any:
        """Bits of bfloat16, as the type of a tensor of such."""
        return array.view(tensor.dtype) if tensor.dtype.itemsize == 2 else array

    @staticmethod
    def fp8(array: Any, tensor: Any) -> Any:
        return array


class _TorchKind:
    """Tensors of PyTorch, on the CPU."""

    @staticmethod
    def numbers(tensor: Any) -> Any:
        return tensor.detach().numpy()

    @staticmethod
    def bits(tensor: Any, nbytes: int) -> Any:
        import torch

        whole = tensor.detach().contiguous()
        if whole.element_size() != nbytes:
            raise BadArgument(f"elements of {tensor.dtype} are not of {nbytes} bytes", "", 3)
        return whole.view(torch.int16 if nbytes == 2 else torch.uint8).numpy().view(
            numpy.uint16 if nbytes == 2 else numpy.uint8
        )

    @staticmethod
    def is_contiguous(tensor: Any) -> bool:
        return bool(tensor.is_contiguous())

    @staticmethod
    def tensor(array: Any) -> Any:
        import torch

        return torch.from_numpy(array)

    @staticmethod
    def indices(array: Any, like: Any) -> Any:
        import torch

        return torch.from_numpy(array).to(like.dtype)

    @staticmethod
    def bf16(array: Any) -> Any:
        import torch

        return torch.from_numpy(array.view(numpy.int16)).view(torch.bfloat16)

    @staticmethod
    def like(array: Any, tensor: Any) -> Any:
        return _TorchKind.bf16(array)

    @staticmethod
    def fp8(array: Any, tensor: Any) -> Any:
        import torch

        return torch.from_numpy(array).view(torch.float8_e4m3fn)


def _kind_of(tensor: Any) -> Any:
    if type(tensor).__module__.partition(".")[0] == "torch":
        if tensor.device.type != "cpu":
            raise BadArgument(f"a tensor on {tensor.device}: there is no CUDA backend", "move it to the CPU", 3)
        return _TorchKind
    return _NumpyKind


__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "Report"]
