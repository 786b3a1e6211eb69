"""Which memory is registered, and descriptors that lie in it, as arrays."""

from __future__ import annotations

from typing import Any, Tuple

import numpy

from ._bindings import nixlInvalidParamError, nixlNotFoundError

Array = numpy.ndarray[Any, Any]


class Regions:
    """Registered memory, by address; no two overlap."""

    def __init__(self, rows: Array) -> None:
        """`rows` are `[count, 3]`: address, bytes, device. Of memory that lies in other memory the latter counts."""
        order = numpy.lexsort((numpy.iinfo(numpy.uint64).max - rows[:, 1], rows[:, 0]))
        rows = rows[order]
        if len(rows):
            ends = numpy.maximum.accumulate(rows[:, 0] + rows[:, 1])
            is_outer = numpy.ones(len(rows), bool)
            is_outer[1:] = rows[1:, 0] + rows[1:, 1] > ends[:-1]
            rows = rows[is_outer]
        self.rows = rows
        self._ends = rows[:, 0] + rows[:, 1]

    def require(self, begins: Array, lasts: Array, devices: Array, whose: str) -> None:
        """Raises unless each stretch, from `begins` to before `lasts`, lies in one memory."""
        if not len(begins):
            return
        at = numpy.searchsorted(self.rows[:, 0], begins, "right").astype(numpy.int64) - 1
        is_in = at >= 0
        if is_in.any():
            is_in &= (lasts >= begins) & (lasts <= self._ends[at]) & (devices == self.rows[at, 2])
        if not is_in.all():
            bad = int(numpy.flatnonzero(~is_in)[0])
            raise nixlNotFoundError(
                f"descriptor {bad}, {int(lasts[bad]) - int(begins[bad])} bytes at {int(begins[bad]):#x} of device "
                f"{int(devices[bad])}, is not in one memory that {whose} has registered and told of: register it, "
                "then hand the metadata over again"
            )


class Side:
    """The descriptors of one side, of which transfers take some by their numbers. Runs stay runs: a pool of pages is
    one row, however many pages it has."""

    def __init__(self, rows: Array, regions: Regions, whose: str) -> None:
        """`rows` are `[count, 3]`: address, bytes, device; or `[count, 5]`, with the stride from one block to the next
        and the number of blocks."""
        # Copies: what was checked is what is moved, whatever becomes of the caller's array.
        self._addresses, self._lengths = rows[:, 0].copy(), rows[:, 1].copy()
        self._has_runs = rows.shape[1] == 5
        if not self._has_runs:
            self.count = len(rows)
            regions.require(self._addresses, self._addresses + self._lengths, rows[:, 2], whose)
            return
        counts = rows[:, 4]
        self._strides = rows[:, 3].copy()
        if len(rows) and (not counts.all() or int(counts.max()) >= 2**40):
            raise nixlInvalidParamError("a run of no descriptors, or of too many")
        most = numpy.iinfo(numpy.uint64).max
        with numpy.errstate(divide="ignore"):
            room = (most - self._addresses - self._lengths) // numpy.maximum(self._strides, 1)
        is_far = (self._strides > 0) & (counts - 1 > room)
        ends = self._addresses + self._lengths + (counts - 1) * self._strides
        # One that ends beyond all addresses is in no memory.
        regions.require(self._addresses, numpy.where(is_far, most, ends), rows[:, 2], whose)
        self._firsts = numpy.concatenate([[0], numpy.cumsum(counts.astype(numpy.int64))])
        self.count = int(self._firsts[-1])
        # Where a run's block 0 of the whole list would be, modulo 2**64: addresses are this and the block's number
        # strides.
        self._bases = self._addresses - self._firsts[:-1].astype(numpy.uint64) * self._strides
        # Of layers with as many pages each, which is usual, a division finds the run.
        self._each = int(counts[0]) if len(rows) and (counts == counts[0]).all() else 0

    def take(self, indices: Any, what: str) -> Tuple[Array, Array]:
        """The addresses and lengths of some of them."""
        chosen = numpy.asarray(indices)
        if chosen.ndim != 1:
            raise nixlInvalidParamError(f"{what} indices in {chosen.ndim} dimensions: give one")
        if len(chosen):
            if chosen.dtype.kind not in "iu":
                raise nixlInvalidParamError(f"{what} indices of {chosen.dtype}: give integers")
            least, most = int(chosen.min()), int(chosen.max())
            if least < 0 or most >= self.count:
                bad = least if least < 0 else most
                raise nixlInvalidParamError(f"{what} index {bad}; there are {self.count} descriptors")
        chosen = chosen.astype(numpy.int64, copy=False)
        if not self._has_runs:
            return self._addresses[chosen], self._lengths[chosen]
        run = chosen // self._each if self._each else numpy.searchsorted(self._firsts, chosen, "right") - 1
        addresses = chosen.astype(numpy.uint64) * self._strides[run]
        addresses += self._bases[run]
        return addresses, self._lengths[run]

    def all(self) -> Tuple[Array, Array]:
        """Of a side without runs."""
        return self._addresses, self._lengths
