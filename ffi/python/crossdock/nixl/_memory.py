"""The memory that an agent has registered."""

from __future__ import annotations

import logging
import threading
from typing import Any, Dict, List, Optional, Tuple

import numpy

from .. import errors
from .._host import require_host_memory
from ..endpoint import Endpoint
from ..memory import Memory
from ._bindings import nixlInvalidParamError, nixlNotFoundError, nixlNotSupportedError, nixlRegDList, rows_of
from ._errors import translated
from ._regions import Regions

_log = logging.getLogger("crossdock.nixl")

Region = Tuple[int, int, int]
"""Address, bytes, device."""


class Memories:
    """The same bytes may be registered more than once, and parts of what is registered: the endpoint has them once,
    until the last of them is deregistered. Any thread may ask."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._uses: Dict[Region, int] = {}
        self._memories: Dict[int, Memory] = {}
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
        for region in regions:
            if region not in self._uses:
                raise nixlNotFoundError(f"{region[1]} bytes at {region[0]:#x} of device {region[2]} are not registered")

    def register(self, regions: List[Region]) -> None:
        """All of them or, with an error, none."""
        with self._lock:
            done: List[Region] = []
            try:
                for region in regions:
                    self._register(region)
                    done.append(region)
            except Exception:
                for region in reversed(done):
                    self._deregister(region)
                raise
            finally:
                self._regions = None

    def deregister(self, regions: List[Region]) -> None:
        """Waits until no peer can reach them any more."""
        with self._lock:
            self.require(regions)
            try:
                for region in regions:
                    self._deregister(region)
            finally:
                self._regions = None

    def _register(self, region: Region) -> None:
        address, nbytes, _ = region
        try:
            require_host_memory(address, nbytes)
        except (OSError, ValueError) as error:
            raise nixlInvalidParamError(str(error)) from None
        if not any(_is_in(region, other) for other in self._uses):
            other = next((other for other in self._uses if _overlap(region, other)), None)
            if other is not None:
                raise nixlNotSupportedError(
                    f"{nbytes} bytes at {address:#x} overlap the {other[1]} at {other[0]:#x} of device {other[2]} that "
                    "are registered: register each byte once, or the larger piece first"
                )
            try:
                memory = Memory.at(address, nbytes)
                self._endpoint.register(memory)
            except errors.Error as error:
                raise translated(error) from error
            self._memories[address] = memory
        self._uses[region] = self._uses.get(region, 0) + 1

    def _deregister(self, region: Region) -> None:
        uses = self._uses.get(region, 0)
        if uses > 1:
            self._uses[region] = uses - 1
            return
        self.require([region])
        memory = self._memories.get(region[0])
        # Not a part of what the endpoint has, but just that.
        if memory is not None and memory.nbytes == region[1]:
            inner = next((other for other in self._uses if other != region and _is_in(other, region)), None)
            if inner is not None:
                raise nixlInvalidParamError(
                    f"{region[1]} bytes at {region[0]:#x} hold {inner[1]} at {inner[0]:#x} that are registered too: "
                    "deregister these first"
                )
            try:
                self._endpoint.unregister(region[0])
                self._memories.pop(region[0]).close()
            except errors.Error as error:
                raise translated(error) from error
        del self._uses[region]

    def close(self) -> None:
        """After the endpoint was closed."""
        with self._lock:
            for memory in self._memories.values():
                try:
                    memory.close()
                except errors.Error as error:
                    _log.error("close: %s", error)
            self._memories, self._uses, self._regions = {}, {}, None


def regions_of(descs: nixlRegDList) -> List[Region]:
    rows: Any = rows_of(descs).tolist()
    return [(address, nbytes, device) for address, nbytes, device in rows]


def _is_in(inner: Region, outer: Region) -> bool:
    return outer[0] <= inner[0] and inner[0] + inner[1] <= outer[0] + outer[1] and inner[2] == outer[2]


def _overlap(one: Region, other: Region) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]
