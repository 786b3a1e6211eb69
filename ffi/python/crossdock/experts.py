"""Tokens to their experts and back.

Order of use: each rank opens a `Group`, the ranks tell each other their addresses and `meet`; `Outputs` are memory for what
arrives. A step in a `Slot` is `dispatch`, `receive`, the experts' work, `combine`, `finish`: the first halves wait for
nobody, the second ones for every rank. Arrays are buffers (NumPy, ctypes, `array`); bfloat16 is given as 16-bit integers.
"""

from __future__ import annotations

import enum
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

from ._abi import OK, BUFFER_TOO_SMALL, check, failure, ffi, forked, lib, made, milliseconds, process
from ._abi import text_or_null, told_text
from .errors import BadArgument, BadHandle
from .kinds import chosen

_from_buffer = ffi.from_buffer


class Rows(enum.IntEnum):
    """The form in which a token's row travels."""

    BF16 = 1
    FP8 = 2
    """e4m3, with an f32 scale for 128 channels."""
    FP8_UE8M0 = 3
    """e4m3, with scales that are powers of two: a byte for 128 channels, four to a word."""
    OPAQUE = 4
    """Rows and scales that mean nothing to the library."""


class ScaleRule(enum.IntEnum):
    """How the scale of 128 channels follows from their largest value."""

    PLAIN = 0
    POWER_OF_TWO = 1


class Lost(enum.IntEnum):
    """What becomes of a token some of whose experts are on masked ranks."""

    DROP = 0
    RENORMALISE = 1
    FAIL = 2


class Report(NamedTuple):
    """What a call cost and what it waited for."""

    wire_bytes: int
    logical_bytes: int
    copied_bytes: int
    seconds: float
    floor_seconds: float
    waited_seconds: float
    masked: int
    lost_tokens: int


def _report(told: Any) -> Report:
    times = (told.time_ns / 1e9, told.floor_ns / 1e9, told.waited_ns / 1e9)
    return Report(told.wire_bytes, told.logical_bytes, told.copied_bytes, *times, told.masked, told.lost_tokens)


def _view(pointer: Any, nbytes: int, form: str, owner: object) -> memoryview:
    """Numbers that C owns; they stay as long as anybody looks at them."""
    kept = ffi.gc(ffi.cast("char *", pointer), lambda _: _keep(owner))
    view: Any = memoryview(ffi.buffer(kept, nbytes)).cast("B")
    typed: memoryview = view.cast(form)
    return typed


def _keep(owner: object) -> None:
    """The owner lives until this is called."""


class _Handle:
    __slots__ = ("_handle", "_pid", "__weakref__")
    _close: Any = None

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._pid = process.pid

    def handle(self) -> int:
        if self._pid != process.pid:
            raise forked(self)
        if not self._handle:
            raise BadHandle(f"the {type(self).__name__} was closed", "use it only until then", 2)
        return self._handle

    def close(self) -> None:
        if self._handle and self._pid == process.pid:
            handle, self._handle = self._handle, 0
            type(self)._close(handle)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Route(_Handle):
    """Where the tokens of a dispatch go: found once, and used for several."""

    __slots__ = ()
    _close = lib.crossdock_route_close

    def __bytes__(self) -> bytes:
        length = ffi.new("size_t *")
        status = lib.crossdock_route_write(self.handle(), ffi.NULL, 0, length)
        if status != BUFFER_TOO_SMALL:
            check(status)
        buffer = ffi.new("uint8_t[]", length[0])
        check(lib.crossdock_route_write(self.handle(), buffer, length[0], length))
        return bytes(ffi.buffer(buffer, length[0]))


class LatencyOutputs(_Handle):
    """What a dispatch gives in the latency mode: for each local expert the rows of the tokens that chose it, from the
    front. The views stay; what they show changes with the next dispatch that is received here."""

    __slots__ = ("experts", "rows", "row_bytes", "scale_bytes", "values", "scales", "tokens", "counts", "totals", "_ranks")
    _close = lib.crossdock_outputs_close

    def __init__(self, handle: int, ranks: int) -> None:
        super().__init__(handle)
        self._ranks = ranks
        info = made("crossdock_latency_outputs")
        check(lib.crossdock_latency_outputs_describe(handle, info))
        places = info.experts * info.rows
        keeper = _Keeper(self)
        self.experts: int = info.experts
        self.rows: int = info.rows
        """That each expert has room for."""
        self.row_bytes: int = info.row_bytes
        self.scale_bytes: int = info.scale_bytes
        self.values = _view(info.values, places * info.row_bytes, "B", keeper)
        """`[experts, rows, row_bytes]`."""
        self.scales = _view(info.scales, places * info.scale_bytes, "B", keeper)
        self.tokens = _view(info.tokens, places * 4, "I", keeper)
        """`[experts, rows]`: which of its source's tokens each row is."""
        self.counts = _view(info.counts, info.experts * 4, "I", keeper)
        """`[experts]`: how many rows came."""
        self.totals = _view(info.totals, info.experts * 8, "Q", keeper)

    def ranges(self) -> List[int]:
        """`[experts, ranks, 2]`: where the rows of each source begin and end among those of an expert."""
        return _ranges(self.handle(), 2 * self.experts * self._ranks)

    def close(self) -> None:
        """The views keep their memory: it is freed when nobody looks any more."""
        self._handle = 0


class ThroughputOutputs(_Handle):
    """What a dispatch gives in the throughput mode: the rows of the tokens that chose any expert here, in the order of
    (source rank, source token). Views as in the latency mode; `count` of their rows are filled."""

    __slots__ = ("count", "rows", "row_bytes", "scale_bytes", "values", "scales", "experts", "weights", "tokens", "_ranks")
    _close = lib.crossdock_outputs_close

    def __init__(self, handle: int, ranks: int, top_k: int) -> None:
        super().__init__(handle)
        self._ranks = ranks
        info = made("crossdock_throughput_outputs")
        check(lib.crossdock_throughput_outputs_describe(handle, info))
        rows: int = info.most_rows
        keeper = _Keeper(self)
        self.count = 0
        """How many rows came."""
        self.rows = rows
        """How many there is room for."""
        self.row_bytes: int = info.row_bytes
        self.scale_bytes: int = info.scale_bytes
        self.values = _view(info.values, rows * info.row_bytes, "B", keeper)
        """`[rows, row_bytes]`."""
        self.scales = _view(info.scales, rows * info.scale_bytes, "B", keeper)
        self.experts = _view(info.experts, rows * top_k * 8, "q", keeper)
        """`[rows, top_k]`: which local expert each choice is, -1 for those elsewhere and for none."""
        self.weights = _view(info.weights, rows * top_k * 4, "f", keeper)
        """`[rows, top_k]`: the weights of this rank's choices; 0 elsewhere."""
        self.tokens = _view(info.tokens, rows * 4, "I", keeper)
        """`[rows]`: which of its source's tokens each row is."""

    def look(self) -> None:
        info = made("crossdock_throughput_outputs")
        check(lib.crossdock_throughput_outputs_describe(self.handle(), info))
        self.count = info.rows

    def ranges(self) -> List[int]:
        """`[ranks, 2]`: where the rows of each source begin and end."""
        return _ranges(self.handle(), 2 * self._ranks)

    def counts(self, alignment: int = 1) -> List[int]:
        """By local expert: how many choices fell on it, rounded up to a multiple of `alignment`."""
        count = ffi.new("size_t *")
        status = lib.crossdock_throughput_outputs_counts(self.handle(), alignment, ffi.NULL, 0, count)
        if status not in (OK, BUFFER_TOO_SMALL):
            raise failure(status)
        counts = ffi.new("uint32_t[]", count[0])
        check(lib.crossdock_throughput_outputs_counts(self.handle(), alignment, counts, count[0], count))
        return list(counts)

    def close(self) -> None:
        """The views keep their memory: it is freed when nobody looks any more."""
        self._handle = 0


class _Keeper:
    """Closes outputs, or a group, when neither they nor a view of their memory is left."""

    __slots__ = ("_close", "_handle", "_pid")

    def __init__(self, owner: _Handle) -> None:
        self._close = type(owner)._close
        self._handle = owner._handle
        self._pid = process.pid

    def __del__(self) -> None:
        if self._pid == process.pid:
            self._close(self._handle)


def _ranges(handle: int, most: int) -> List[int]:
    count = ffi.new("size_t *")
    ranges = ffi.new("uint32_t[]", max(1, most))
    check(lib.crossdock_outputs_ranges(handle, ranges, most, count))
    return list(ranges[0 : count[0]])


class Group(_Handle):
    """One rank of a group of experts. What all ranks agree on is compared when they meet."""

    __slots__ = ("_met", "_keeper")
    _close = lib.crossdock_group_close

    def __init__(
        self,
        rank: int,
        *,
        max_tokens: Sequence[int],
        experts: int,
        top_k: int,
        hidden: int,
        key: Optional[bytes],
        rows: Union[Rows, str] = Rows.BF16,
        row_bytes: int = 0,
        scale_bytes: int = 0,
        slots: int = 1,
        verify: bool = False,
        placement_version: int = 0,
        lost: Union[Lost, str] = Lost.DROP,
        least_ranks: int = 1,
        deadline: Optional[float] = None,
        warm_up: Optional[float] = None,
        bind: Optional[str] = None,
        advertise: Optional[str] = None,
        ports: Optional[str] = None,
        name: Optional[str] = None,
    ) -> None:
        """`max_tokens` are the most tokens that each rank dispatches in one step, by rank; `key` is what all ranks share,
        `None` lets anybody in."""
        super().__init__(0)
        self._met: Any = None
        self._keeper: Optional[_Keeper] = None
        options, kept = _options(
            rank, max_tokens, experts, top_k, hidden, rows, row_bytes, scale_bytes, slots, verify, placement_version
        )
        options.lost = chosen(Lost, "lost", lost)
        options.least_ranks = least_ranks
        options.deadline_ms, options.warm_up_ms = milliseconds(deadline), milliseconds(warm_up)
        options.authentication = (
            lib.CROSSDOCK_AUTHENTICATION_OFF if key is None else lib.CROSSDOCK_AUTHENTICATION_KEY
        )
        if key is not None:
            options.key = secret = ffi.new("uint8_t[]", key)
            options.key_bytes = len(key)
            kept.append(secret)
        for field, text in (("bind", bind), ("advertise", advertise), ("ports", ports), ("name", name)):
            kept.append(text_or_null(text))
            setattr(options, field, kept[-1])
        handle = ffi.new("crossdock_group *")
        check(lib.crossdock_group_open(options, handle))
        self._handle = handle[0]
        self._keeper = _Keeper(self)

    @classmethod
    def in_process(
        cls,
        *,
        max_tokens: Sequence[int],
        experts: int,
        top_k: int,
        hidden: int,
        rows: Union[Rows, str] = Rows.BF16,
        row_bytes: int = 0,
        scale_bytes: int = 0,
        slots: int = 1,
        verify: bool = False,
    ) -> List[Group]:
        """All ranks of a group in this process, which have met: for tests, and for ranks that are threads."""
        options, kept = _options(
            0, max_tokens, experts, top_k, hidden, rows, row_bytes, scale_bytes, slots, verify, 0
        )
        handles = ffi.new("crossdock_group[]", max(1, len(max_tokens)))
        check(lib.crossdock_group_in_process(options, handles))
        del kept
        groups = []
        for handle in handles:
            group = cls.__new__(cls)
            _Handle.__init__(group, handle)
            group._met, group._keeper = None, _Keeper(group)
            groups.append(group)
        return groups

    @property
    def address(self) -> str:
        """What the other ranks dial, `"ip:port"`."""
        return told_text(lib.crossdock_group_address, self.handle())

    def meet(self, addresses: Sequence[str], timeout: float = 60.0) -> None:
        """Meets all other ranks, at the addresses of all ranks, by rank."""
        texts = [ffi.new("char[]", address.encode()) for address in addresses]
        pointers = ffi.new("char *[]", texts)
        check(lib.crossdock_group_meet(self.handle(), pointers, len(texts), milliseconds(timeout)))

    @property
    def info(self) -> Any:
        """What the ranks, which have met, agreed on: `rank`, `ranks`, `experts`, `first_expert`, `local_experts`, `top_k`,
        `hidden`, `slots`, `max_tokens`."""
        if self._met is None:
            info = made("crossdock_group_info")
            check(lib.crossdock_group_describe(self.handle(), info))
            self._met = info
        return self._met

    @staticmethod
    def needed_bytes(
        *, max_tokens: Sequence[int], experts: int, top_k: int, hidden: int, rows: Union[Rows, str] = Rows.BF16, slots: int = 1
    ) -> int:
        """What memory a rank of such a group needs in the worst case, in which every token goes to it."""
        options, kept = _options(0, max_tokens, experts, top_k, hidden, rows, 0, 0, slots, False, 0)
        sizes = made("crossdock_group_sizes")
        check(lib.crossdock_group_needs(options, sizes))
        del kept
        return int(sizes.dispatch_arenas_bytes + sizes.combine_arenas_bytes + sizes.outputs_bytes)

    def masked(self) -> List[int]:
        """The ranks that this one does not wait for any more."""
        ranks = self.info.ranks
        count = ffi.new("size_t *")
        found = ffi.new("uint32_t[]", ranks)
        check(lib.crossdock_group_masked(self.handle(), found, ranks, count))
        return list(found[0 : count[0]])

    def mark_dead(self, rank: int) -> None:
        """Tells this rank that another is dead, so that waits for it end at once; from any thread."""
        check(lib.crossdock_group_mark_dead(self.handle(), rank))

    def close(self) -> None:
        """Leaves the group: the other ranks are told, and wait for this one no longer. Views of results keep their
        memory: where one is left, the others are told when nobody looks any more, and wait until then as for a rank that
        is silent."""
        self._handle, self._keeper = 0, None

    def keeper(self) -> object:
        """For the slots: the memory stays mapped as long as anybody has it."""
        keeper = self._keeper
        # Who finds it closed has no use for the memory.
        self.handle()
        return keeper

    def slot(self, slot: int = 0) -> Slot:
        """One micro-batch's slot: one thread's at a time."""
        return Slot(self, slot)

    def latency_outputs(
        self,
        rows: Union[Rows, str] = Rows.BF16,
        *,
        row_bytes: int = 0,
        scale_bytes: int = 0,
        scales_by_column: bool = False,
    ) -> LatencyOutputs:
        """Memory for what this rank may get in one dispatch of the latency mode."""
        handle = ffi.new("crossdock_outputs *")
        form = chosen(Rows, "rows", rows)
        order = int(scales_by_column)
        check(
            lib.crossdock_latency_outputs_create(self.handle(), form, row_bytes, scale_bytes, order, handle)
        )
        return LatencyOutputs(handle[0], self.info.ranks)

    def throughput_outputs(
        self, rows: Union[Rows, str] = Rows.BF16, *, row_bytes: int = 0, scale_bytes: int = 0
    ) -> ThroughputOutputs:
        """Memory for what this rank may get in one dispatch of the throughput mode."""
        handle = ffi.new("crossdock_outputs *")
        form = chosen(Rows, "rows", rows)
        check(lib.crossdock_throughput_outputs_create(self.handle(), form, row_bytes, scale_bytes, handle))
        return ThroughputOutputs(handle[0], self.info.ranks, self.info.top_k)

    def spread(self, choices: Any) -> Tuple[List[int], List[int], bytes]:
        """Of `[tokens, top_k]` choices: tokens by rank, choices by expert, and `[tokens, ranks]` whether a token goes
        there."""
        info, given = self.info, _numbers("int64_t[]", choices)
        tokens = len(given) // max(1, info.top_k)
        by_rank, by_expert = ffi.new("uint32_t[]", info.ranks), ffi.new("uint32_t[]", info.experts)
        is_in = ffi.new("uint8_t[]", max(1, tokens * info.ranks))
        check(lib.crossdock_spread(self.handle(), given, len(given), by_rank, by_expert, is_in))
        return list(by_rank), list(by_expert), bytes(ffi.buffer(is_in, tokens * info.ranks))

    def read_route(self, told: bytes) -> Route:
        """A route that was kept, of this rank in a group like this."""
        route = ffi.new("crossdock_route *")
        check(lib.crossdock_route_read(self.handle(), told, len(told), route))
        return Route(route[0])


class Slot:
    """One micro-batch's step: `dispatch`, `receive`, results, `combine`, `finish`."""

    __slots__ = ("_group", "_slot", "_mode")

    def __init__(self, group: Group, slot: int) -> None:
        self._group = group
        self._slot = slot
        self._mode = ""

    def dispatch(
        self,
        rows: Any,
        choices: Any = None,
        weights: Any = None,
        *,
        count: Optional[int] = None,
        form: Union[Rows, str] = Rows.BF16,
        scale_rule: Union[ScaleRule, str] = ScaleRule.PLAIN,
        scales: Any = None,
        scale_strides: Tuple[int, int] = (0, 0),
        scale_element_bytes: int = 0,
        row_bytes: int = 0,
        scale_bytes: int = 0,
        route: Optional[Route] = None,
    ) -> Report:
        """The send half: leaves each token's row where the ranks of its experts find it.

        `rows` is `[count, hidden]` in bfloat16, made FP8 on the way where that is the `form`; with `scales`, or opaque, it has
        the form already, and element e of token t's scales is at `t * scale_strides[0] + e * scale_strides[1]` bytes.
        `choices` is `[count, top_k]` of experts or -1, `weights` as many floats. A `route` replaces the choices.
        """
        info = self._group.info
        told = made("crossdock_tokens")
        told.form = chosen(Rows, "form", form)
        told.is_made = int(scales is not None or told.form == Rows.OPAQUE)
        held = _bytes(rows)
        told.rows = held
        one = row_bytes if told.form == Rows.OPAQUE else info.hidden * (1 if told.is_made else 2)
        if count is None:
            count = len(held) // max(1, one)
        if len(held) < count * one:
            raise BadArgument(f"{len(held)} bytes of rows, and {count} of {one} bytes are to be sent", "", 3)
        told.count = count
        if route is None:
            told.choices = chosen_experts = _numbers("int64_t[]", choices)
            _at_least("choices", chosen_experts, count * info.top_k)
        else:
            told.route = route.handle()
        if weights is not None:
            told.weights = given_weights = _numbers("float[]", weights)
            _at_least("weights", given_weights, count * info.top_k)
        if scales is not None:
            told.scales = given_scales = _bytes(scales)
            told.scales_bytes = len(given_scales)
            told.scale_token_stride, told.scale_element_stride = scale_strides
            told.scale_element_bytes = scale_element_bytes
        told.scale_rule = chosen(ScaleRule, "scale_rule", scale_rule)
        told.row_bytes, told.scale_bytes = row_bytes, scale_bytes
        report = made("crossdock_report")
        check(lib.crossdock_dispatch(self._group.handle(), self._slot, told, report))
        return _report(report)

    def route(self) -> Route:
        """The route of the dispatch that is under way."""
        route = ffi.new("crossdock_route *")
        check(lib.crossdock_route_of_dispatch(self._group.handle(), self._slot, route))
        return Route(route[0])

    def receive(self, outputs: Union[LatencyOutputs, ThroughputOutputs]) -> None:
        """The receive half, in the mode of the outputs, which all ranks choose alike: waits for every rank's rows."""
        if isinstance(outputs, LatencyOutputs):
            check(lib.crossdock_latency_receive(self._group.handle(), self._slot, outputs.handle()))
            self._mode = "latency"
        else:
            check(lib.crossdock_throughput_receive(self._group.handle(), self._slot, outputs.handle()))
            outputs.look()
            self._mode = "throughput"

    def results(self, expert: Optional[int] = None) -> memoryview:
        """Where this rank's results go, `[rows, hidden]` in bfloat16 as 16-bit integers: of a local expert in the latency
        mode, of all rows in the throughput mode. To be written before `combine`: the other ranks read them there. They
        stay mapped as long as the view lives, also when the group is closed."""
        pointer, rows = ffi.new("void **"), ffi.new("size_t *")
        keeper, group = self._group.keeper(), self._group.handle()
        if self._mode == "latency":
            check(lib.crossdock_latency_results(group, self._slot, expert or 0, pointer, rows))
        else:
            check(lib.crossdock_throughput_results(group, self._slot, pointer, rows))
        return _view(pointer[0], rows[0] * self._group.info.hidden * 2, "H", keeper)

    def all_results(self, outputs: LatencyOutputs) -> memoryview:
        """Latency mode: the results of all local experts, `[local experts, rows, hidden]` as the outputs have them. As
        `results`."""
        pointer, keeper = ffi.new("void **"), self._group.keeper()
        check(lib.crossdock_latency_results(self._group.handle(), self._slot, 0, pointer, ffi.NULL))
        nbytes = outputs.experts * outputs.rows * self._group.info.hidden * 2
        return _view(pointer[0], nbytes, "H", keeper)

    def copy_results(self, results: Any) -> None:
        """Latency mode: copies results from `[local experts, rows, hidden]`, as the outputs have them."""
        held = _bytes(results)
        pointer = ffi.cast("void *", held)
        check(lib.crossdock_latency_copy_results(self._group.handle(), self._slot, pointer, len(held) // 2))

    def combine(self, weights: Any = None) -> None:
        """The send half of the combine: says that the results are there. In the throughput mode, `[rows, top_k]` weights
        go back as they are."""
        if self._mode == "latency":
            check(lib.crossdock_latency_combine(self._group.handle(), self._slot))
            return
        given = ffi.NULL if weights is None else _numbers("float[]", weights)
        count = 0 if weights is None else len(given)
        check(lib.crossdock_throughput_combine(self._group.handle(), self._slot, given, count))

    def finish(self, out: Any, weights: Any = None, biases: Sequence[Any] = ()) -> Report:
        """The receive half of the combine: waits for every rank's results, and writes each token's sum to `out`,
        `[tokens, hidden]` in bfloat16.

        Latency mode: `weights` are `[tokens, top_k]`, by which results are weighed. Throughput mode: they get the sums of the
        weights that the ranks gave back, and up to two `biases` as long as `out` are added.
        """
        held = _from_buffer("char[]", _flat(out), require_writable=True)
        report, values = made("crossdock_report"), len(held) // 2
        to = ffi.cast("void *", held)
        group = self._group.handle()
        if self._mode == "latency":
            given = _numbers("float[]", weights)
            check(
                lib.crossdock_latency_finish(group, self._slot, given, len(given), to, values, report)
            )
            return _report(report)
        if len(biases) > 2:
            raise BadArgument(f"{len(biases)} biases: there are at most two", "", 3)
        kept = [_bytes(bias) for bias in biases]
        if any(len(bias) != len(held) for bias in kept):
            raise BadArgument("a bias is not as long as what is combined", "", 3)
        first, second = [ffi.cast("void *", bias) for bias in kept] + [ffi.NULL] * (2 - len(kept))
        back = ffi.NULL if weights is None else _from_buffer("float[]", _flat(weights), require_writable=True)
        count = 0 if weights is None else len(back)
        check(
            lib.crossdock_throughput_finish(group, self._slot, first, second, back, count, to, values, report)
        )
        return _report(report)

    def abandon(self) -> None:
        """Gives up a step: the next dispatch brings it to its end."""
        check(lib.crossdock_slot_abandon(self._group.handle(), self._slot))

    def lost(self) -> List[float]:
        """By token of the last call: the weight of its choices that masked ranks did not answer; empty if nothing was."""
        count = ffi.new("size_t *")
        status = lib.crossdock_slot_lost(self._group.handle(), self._slot, ffi.NULL, 0, count)
        if status not in (OK, BUFFER_TOO_SMALL):
            raise failure(status)
        lost = ffi.new("float[]", max(1, count[0]))
        check(lib.crossdock_slot_lost(self._group.handle(), self._slot, lost, count[0], count))
        return list(lost[0 : count[0]])

    def waits(self) -> List[float]:
        """How long the last call waited for each rank, in seconds."""
        ranks = self._group.info.ranks
        count, waits = ffi.new("size_t *"), ffi.new("uint64_t[]", ranks)
        check(lib.crossdock_slot_waits(self._group.handle(), self._slot, waits, ranks, count))
        return [wait / 1e9 for wait in waits[0 : count[0]]]


def _options(
    rank: int,
    max_tokens: Sequence[int],
    experts: int,
    top_k: int,
    hidden: int,
    rows: Union[Rows, str],
    row_bytes: int,
    scale_bytes: int,
    slots: int,
    verify: bool,
    placement_version: int,
) -> Tuple[Any, List[Any]]:
    options = made("crossdock_group_options")
    limits = ffi.new("uint32_t[]", list(max_tokens))
    options.max_tokens, options.ranks = limits, len(limits)
    options.rank, options.experts, options.top_k, options.hidden = rank, experts, top_k, hidden
    options.rows = chosen(Rows, "rows", rows)
    options.row_bytes, options.scale_bytes = row_bytes, scale_bytes
    options.slots, options.verify, options.placement_version = slots, int(verify), placement_version
    return options, [limits]


def _flat(given: Any) -> memoryview:
    view = memoryview(given)
    if not view.c_contiguous:
        raise BadArgument(f"the values of this {type(given).__name__} do not follow each other", "", 3)
    return view


def _bytes(given: Any) -> Any:
    return _from_buffer("char[]", _flat(given))


def _numbers(form: str, given: Any) -> Any:
    """As C reads them: buffers of such numbers as they are, lists copied."""
    if given is None:
        raise BadArgument(f"{form} is wanted, and nothing given", "", 3)
    try:
        view = memoryview(given)
    except TypeError:
        return ffi.new(form, list(given))
    is_of_form = view.format == "f" if form == "float[]" else view.format in ("q", "l", "Q", "L")
    if not is_of_form or view.itemsize != ffi.sizeof(form[:-2]) or not view.c_contiguous:
        advice = "give them in one piece, as int64 or float32"
        raise BadArgument(f"numbers of {view.itemsize} bytes with format {view.format!r} are no {form}", advice, 3)
    return _from_buffer(form, view)


def _at_least(name: str, given: Any, count: int) -> None:
    if len(given) < count:
        raise BadArgument(f"{len(given)} {name}, and {count} are needed", "", 3)
