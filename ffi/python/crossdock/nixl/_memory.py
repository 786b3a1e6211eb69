"""The memory that an agent has registered."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Dict, List, Optional, Tuple

import numpy

from .. import errors
from .._host import require_host_memory
from ..endpoint import Endpoint
from ..memory import Memory
from ._bindings import (
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlNotFoundError,
    nixlNotSupportedError,
    nixlRegDList,
    rows_of,
)
from ._errors import translated
from ._regions import Regions

_log = logging.getLogger("crossdock.nixl")

Region = Tuple[int, int, int]
"""Address, bytes, device."""

# How long one call waits for a peer that does not answer.
LEAVE_SECONDS = 30.0
# And one that registers what was to leave.
AGAIN_SECONDS = 0.5


class Memories:
    """The same bytes may be registered more than once, and parts of what is registered: the endpoint has them once,
    until the last of them is deregistered. Any thread may ask."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # Held while memory comes or leaves, which takes as long as a peer that does not answer; so whoever only asks
        # needs the other one.
        self._changing = threading.Lock()
        self._memories: Dict[int, Memory] = {}
        # What was asked for in a call that failed, which may be made again. `None` once nobody can reach it any more.
        self._leaving: Dict[Region, Optional[Memory]] = {}
        # Replaced and never changed.
        self._uses: Dict[Region, int] = {}
        self._regions: Optional[Regions] = None
        self._lock = threading.Lock()

    def regions(self) -> Regions:
        with self._lock:
            if self._regions is None:
                self._regions = Regions(numpy.array(list(self._uses), numpy.uint64).reshape(-1, 3))
            return self._regions

    def holds(self, region: Region) -> bool:
        return region in self._uses

    def require(self, regions: List[Region]) -> None:
        uses = self._uses
        for region in regions:
            if region not in uses:
                raise _unknown(region)

    def register(self, regions: List[Region]) -> None:
        """All of them or, with an error, none. `nixlNotAllowedError`: some of the bytes are still leaving."""
        with self._changing:
            done: List[Region] = []
            try:
                for region in regions:
                    self._register(region)
                    done.append(region)
            except Exception:
                try:
                    self._deregister(done, LEAVE_SECONDS)
                except nixlNotAllowedError as error:
                    _log.error("memory whose registration has failed: %s", error)
                raise

    def deregister(self, regions: List[Region]) -> None:
        """Waits until no peer can reach them any more. After `nixlNotAllowedError` they go on leaving, and the same
        call waits on."""
        with self._changing:
            self._deregister(regions, LEAVE_SECONDS)

    def end(self, seconds: float) -> None:
        """As `deregister`, of all there are."""
        with self._changing:
            held = [region for region, uses in self._uses.items() for _ in range(uses)]
            self._deregister([*held, *self._leaving], seconds)

    def _register(self, region: Region) -> None:
        address, nbytes, _ = region
        try:
            require_host_memory(address, nbytes)
        except (OSError, ValueError) as error:
            raise nixlInvalidParamError(str(error)) from None
        for other in [other for other in self._leaving if _overlap(region, other)]:
            if not self._has_left(other, AGAIN_SECONDS):
                raise nixlNotAllowedError(f"{_told([other])} were deregistered, and a peer can still reach them")
        self._leaving.pop(region, None)
        if not any(_is_in(region, other) for other in self._uses):
            overlapping = next((other for other in self._uses if _overlap(region, other)), None)
            if overlapping is not None:
                raise nixlNotSupportedError(
                    f"{_told([region])} overlap {_told([overlapping])} that are registered: register each byte once, "
                    "or the larger piece first"
                )
            try:
                memory = Memory.at(address, nbytes)
                self._endpoint.register(memory)
            except errors.Error as error:
                raise translated(error) from error
            self._memories[address] = memory
        self._replace({**self._uses, region: self._uses.get(region, 0) + 1})

    def _deregister(self, regions: List[Region], seconds: float) -> None:
        before, uses = self._uses, dict(self._uses)
        going = [region for region in self._leaving if region in regions]
        for region in regions:
            if region in self._leaving:
                continue
            if region not in uses:
                raise _unknown(region)
            uses[region] -= 1
            if not uses[region]:
                del uses[region]
                going.append(region)
        for region in going:
            inner = next((other for other in uses if self._has_own(region) and _is_in(other, region)), None)
            if inner is not None:
                raise nixlInvalidParamError(f"{_told([region])} hold {_told([inner])} too: deregister these first")
        for region in going:
            self._leaving.setdefault(region, self._memories.pop(region[0]) if self._has_own(region) else None)
        self._replace(uses)
        until = time.monotonic() + seconds
        stuck = [region for region in going if not self._has_left(region, until - time.monotonic())]
        if stuck:
            # The call has failed: what it has only counted is counted when it is made again.
            kept = {region: before[region] for region in uses}
            self._replace(kept)
            raise nixlNotAllowedError(f"a peer that does not answer can still reach {_told(stuck)}: ask again")
        for region in going:
            del self._leaving[region]

    def _has_own(self, region: Region) -> bool:
        """Whether the endpoint has just that, and not something that it is a part of."""
        memory = self._memories.get(region[0])
        return memory is not None and memory.nbytes == region[1]

    def _has_left(self, region: Region, seconds: float) -> bool:
        memory = self._leaving[region]
        if memory is None:
            return True
        try:
            self._endpoint.unregister(memory, max(0.0, seconds))
            memory.close()
        except (errors.Busy, errors.TimedOut):
            return False
        except errors.Error as error:
            raise translated(error) from error
        self._leaving[region] = None
        return True

    def _replace(self, uses: Dict[Region, int]) -> None:
        with self._lock:
            self._uses, self._regions = uses, None

    def drop(self) -> None:
        """After the endpoint was closed, for whom nobody asks again."""
        for memory in [*self._memories.values(), *self._leaving.values()]:
            if memory is None:
                continue
            try:
                memory.close()
            except errors.Error:
                told = f"{memory.nbytes} bytes at {memory.address:#x}"
                _log.error("a peer that does not answer may still write %s: deregister it before its agent goes", told)
        self._memories, self._leaving = {}, {}
        self._replace({})


def regions_of(descs: nixlRegDList) -> List[Region]:
    rows: Any = rows_of(descs).tolist()
    return [(address, nbytes, device) for address, nbytes, device in rows]


def _is_in(inner: Region, outer: Region) -> bool:
    return outer[0] <= inner[0] and inner[0] + inner[1] <= outer[0] + outer[1] and inner[2] == outer[2]


def _overlap(one: Region, other: Region) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


def _told(regions: List[Region]) -> str:
    return ", ".join(f"{nbytes} bytes at {address:#x} of device {device}" for address, nbytes, device in regions)


def _unknown(region: Region) -> nixlNotFoundError:
    return nixlNotFoundError(f"{_told([region])} are not registered")
