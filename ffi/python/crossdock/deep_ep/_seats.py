"""One group of the ranks for each shape of calls, its slots, and the handles of what was dispatched there."""

from __future__ import annotations

import weakref
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy

from ..errors import BadArgument, OutOfOrder
from ..experts import Group, LatencyOutputs, Route, Rows, Slot, ThroughputOutputs

# Of one shape of calls. A handle whose slot was taken for another dispatch is dispatched anew when it is combined.
SLOTS = 8
_PROBE_BYTES = 16

Move = Tuple[slice, slice]


class Seat(NamedTuple):
    """A slot of a shape's group."""

    number: int
    slot: Slot


class Place:
    """Which seat holds a handle's dispatch. The seat knows this and not the handle, which may go meanwhile."""

    __slots__ = ("seat", "ranges", "moves", "aside")

    def __init__(self) -> None:
        self.seat: Optional[Seat] = None
        # Where the rows of each source lie in what the handle's dispatch gave.
        self.ranges: Any = None
        # Latency mode: from there to where they lie in the seat, if a rank was masked before it was made anew.
        self.moves: Optional[List[Move]] = None
        # Results of a combine without a copy, while they have to move.
        self.aside: Any = None


class Packed(NamedTuple):
    """Outputs of the latency mode, as arrays."""

    outputs: LatencyOutputs
    values: Any
    scales: Any
    sources: Any


class Handle(tuple):  # type: ignore[type-arg]
    """What DeepEP's callers read of a handle, and what its combine needs."""

    shape: Shape
    route: Route
    place: Place
    tokens: int
    rows: int
    # Of the latency mode: what was chosen, and where rows came.
    choices: Any
    outputs: Optional[LatencyOutputs]

    @classmethod
    def of(cls, fields: Sequence[Any], shape: Shape, route: Route, tokens: int, rows: int = 0) -> Handle:
        made = cls(fields)
        made.shape, made.route, made.place = shape, route, Place()
        made.tokens, made.rows = tokens, rows
        made.choices = made.outputs = None
        return made

    @property
    def seat(self) -> Optional[Seat]:
        return self.place.seat

    def seated(self) -> Seat:
        """Where its dispatch is; it is made anew where another has taken its slot."""
        return self.place.seat or self.shape.dispatch_again(self)


def handle_of(given: Any, is_latency: bool) -> Handle:
    if not isinstance(given, Handle) or (given.outputs is not None) != is_latency:
        mode = "low_latency_dispatch" if is_latency else "dispatch"
        raise BadArgument(f"this {type(given).__name__} is no handle of {mode}", "give the one that it gave", 3)
    return given


class Shape:
    """One group of the ranks, for calls of one shape."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.seats = [Seat(number, group.slot(number)) for number in range(SLOTS)]
        # By seat: the place of the handle whose dispatch it holds.
        self.holders: List[Optional[Place]] = [None] * SLOTS
        # Seats whose combine waits for its hook.
        self.combining: Set[int] = set()
        self._next = 0
        self._throughput: Dict[Rows, ThroughputOutputs] = {}
        # Each with what tells whether anybody still looks at its arrays.
        self._latency: Dict[Rows, List[Tuple[LatencyOutputs, List[weakref.ref[Any]]]]] = {}
        self._probe: Optional[Tuple[ThroughputOutputs, LatencyOutputs]] = None
        self._told: Optional[ThroughputOutputs] = None

    # Seats

    def take(self) -> Seat:
        """The next seat round and round, which is the same on all ranks; who has it is dispatched anew when it is
        combined."""
        number = self._next
        if number in self.combining:
            advice = f"call each hook before the next {SLOTS} calls"
            raise OutOfOrder("the hook of a combine was never called", advice, 22)
        self._next = (number + 1) % SLOTS
        self.leave(number)
        self.seats[number].slot.abandon()
        return self.seats[number]

    def dispatch(self, seat: Seat, *rows: Any, **options: Any) -> None:
        """A call that fails here was none: the other ranks wait for it still, in this seat."""
        try:
            seat.slot.dispatch(*rows, **options)
        except Exception:
            self._next = seat.number
            raise

    def exchange(
        self, seat: Seat, form: Rows, *, route: Optional[Route] = None, **sent: Any
    ) -> Tuple[ThroughputOutputs, Route]:
        """Normal mode: a dispatch, what it brings, which is there until the next, and the route that it took."""
        if form not in self._throughput:
            self._throughput[form] = self.group.throughput_outputs(form)
        outputs = self._throughput[form]
        self.dispatch(seat, **sent, form=form, route=route)
        # It is told only until the rows are received.
        taken = seat.slot.route() if route is None else route
        seat.slot.receive(outputs)
        return outputs, taken

    def leave(self, number: int) -> None:
        holder, self.holders[number] = self.holders[number], None
        if holder is not None:
            holder.seat = None

    def sit(self, seat: Seat, handle: Handle) -> None:
        self.holders[seat.number] = place = handle.place
        place.seat, place.moves, place.aside = seat, None, None

    def dispatch_again(self, handle: Handle) -> Seat:
        """The same route once more, with rows as short as they can be: for a combine without a dispatch before it."""
        seat = self.take()
        rows = bytes(max(1, handle.tokens) * _PROBE_BYTES)
        self.dispatch(seat, rows, count=handle.tokens, form=Rows.OPAQUE, row_bytes=_PROBE_BYTES, route=handle.route)
        outputs = self._probes()[handle.outputs is not None]
        seat.slot.receive(outputs)
        self.sit(seat, handle)
        place, ranges = handle.place, ranges_of(outputs, self.group.info.ranks)
        if not numpy.array_equal(place.ranges, ranges):
            place.moves = [
                (slice(*before), slice(*after)) for before, after in zip(place.ranges, ranges) if after[0] < after[1]
            ]
        return seat

    # Calls that bring no rows of the caller's

    def sums_told(self, seat: Seat, per_expert: Any) -> List[int]:
        """By local expert: the sum of what all ranks say of it, each in `per_expert` of all experts. Taken in the seat
        that the next dispatch has."""
        info = self.group.info
        here = len(per_expert) // info.ranks
        # Of opaque rows, which a group's rows have room for.
        words = min((here + 3) // 4 * 4, info.hidden // 2)
        rows = -(-here // words)
        told = numpy.zeros((info.ranks, rows * words), numpy.int32)
        told[:, :here] = numpy.reshape(per_expert, (info.ranks, here))
        choices = numpy.full((info.ranks, rows, info.ranks), -1, numpy.int64)
        choices[numpy.arange(info.ranks), :, numpy.arange(info.ranks)] = numpy.arange(info.ranks)[:, None]
        if self._told is None or self._told.row_bytes != 4 * words:
            self._told = self.group.throughput_outputs(Rows.OPAQUE, row_bytes=4 * words)
        self.dispatch(seat, told, choices, count=info.ranks * rows, form=Rows.OPAQUE, row_bytes=4 * words)
        seat.slot.receive(self._told)
        seat.slot.abandon()
        heard = numpy.asarray(self._told.values)[: self._told.count * 4 * words].view(numpy.int32)
        return [int(count) for count in heard.reshape(-1, rows * words).sum(0)[:here]]

    def wait_for_all(self) -> None:
        """A call in which nobody has tokens."""
        seat = self.take()
        choices = numpy.zeros((0, self.group.info.top_k), numpy.int64)
        self.dispatch(seat, b"", choices, count=0, form=Rows.OPAQUE, row_bytes=_PROBE_BYTES)
        seat.slot.receive(self._probes()[1])

    # Memory for what arrives

    def latency(self, form: Rows) -> Packed:
        """Outputs at which nobody looks: what a call gave stays as long as it is held."""
        all_of_form = self._latency.setdefault(form, [])
        for outputs, watched in all_of_form:
            if all(array() is None for array in watched):
                break
        else:
            outputs, watched = self.group.latency_outputs(form, scales_by_column=form != Rows.BF16), []
            all_of_form.append((outputs, watched))
        # Whatever is made of these holds on to them.
        arrays = [numpy.asarray(view) for view in (outputs.values, outputs.scales, outputs.tokens)]
        watched[:] = [weakref.ref(array) for array in arrays]
        return Packed(outputs, *arrays)

    def _probes(self) -> Tuple[ThroughputOutputs, LatencyOutputs]:
        if self._probe is None:
            form = Rows.OPAQUE
            self._probe = (
                self.group.throughput_outputs(form, row_bytes=_PROBE_BYTES),
                self.group.latency_outputs(form, row_bytes=_PROBE_BYTES),
            )
        return self._probe


def ranges_of(outputs: Any, ranks: int) -> Any:
    """The rows of each source, counted from the first of all: `[experts * ranks, 2]`, or `[ranks, 2]` in the normal
    mode."""
    ranges = numpy.array(outputs.ranges(), numpy.int64).reshape(-1, ranks, 2)
    if isinstance(outputs, LatencyOutputs):
        ranges += (numpy.arange(outputs.experts) * outputs.rows)[:, None, None]
    return ranges.reshape(-1, 2)


def moved(rows: Any, moves: Optional[List[Move]], count: int) -> Any:
    """So many rows, as they lie in the seat."""
    if moves is None:
        return rows
    found = numpy.zeros((count, *rows.shape[1:]), rows.dtype)
    for before, after in moves:
        found[after] = rows[before]
    return found
