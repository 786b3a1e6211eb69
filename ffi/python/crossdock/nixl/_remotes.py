"""The agents that an agent knows by their metadata."""

from __future__ import annotations

import logging
import threading
from typing import Dict, NamedTuple, Optional

import numpy

from ._bindings import nixlInvalidParamError, nixlNotFoundError, nixlNotSupportedError
from ._notify import Peer
from ._regions import Regions
from ._wire import Metadata

_log = logging.getLogger("crossdock.nixl")


class Remote(NamedTuple):
    """What is known of another agent."""

    peer: Peer
    address: str
    """Of its endpoint."""
    regions: Regions


class Remotes:
    """By name. A new life of an agent takes the place of the one before. Any thread may ask."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._known: Dict[str, Remote] = {}
        self._lock = threading.Lock()

    def add(self, told: Metadata) -> Optional[Peer]:
        """Takes metadata in, whole or partial. The earlier life of that agent, if it is another."""
        if told.name == self._own:
            raise nixlInvalidParamError(f"metadata of an agent with this agent's own name, {told.name!r}")
        with self._lock:
            before = known = self._known.get(told.name)
            if known is not None and known.peer.incarnation != told.incarnation:
                known = None
            if known is None and not told.address:
                raise nixlNotFoundError(f"partial metadata of {told.name!r}, of which no connection is known")
            address, where, rows = told.address, told.notification_address, told.regions
            if known is not None:
                address, where = address or known.address, where or known.peer.address
                if not told.is_whole:
                    rows = numpy.concatenate([known.regions.rows, rows])
            self._known[told.name] = Remote(Peer(told.name, told.incarnation, where), address, Regions(rows))
        return before.peer if before is not None and known is None else None

    def remove(self, name: str) -> Optional[Remote]:
        with self._lock:
            return self._known.pop(name, None)

    def lose(self, peer: Peer) -> None:
        """Forgets an agent that could not be reached, or is another by now: engines ask `check_remote_metadata` after a
        failure, and shake hands again if it is not known any more."""
        with self._lock:
            known = self._known.get(peer.name)
            if known is None or known.peer.incarnation != peer.incarnation:
                return
            del self._known[peer.name]
        _log.warning("agent %r is lost: its metadata has to be added again", peer.name)

    def find(self, name: str) -> Optional[Remote]:
        with self._lock:
            return self._known.get(name)

    def known(self, name: str) -> Remote:
        """Raises `nixlNotFoundError`."""
        if name == self._own:
            raise nixlNotSupportedError(f"transfers of {name!r} with itself: copy the bytes instead")
        remote = self.find(name)
        if remote is None:
            raise nixlNotFoundError(
                f"agent {name!r} is not known: add_remote_agent comes first, and again if it was lost"
            )
        return remote

    def require_current(self, remote: Remote) -> None:
        known = self.find(remote.peer.name)
        if known is None or known.peer.incarnation != remote.peer.incarnation:
            raise nixlNotFoundError(
                f"agent {remote.peer.name!r} was removed, lost or restarted: add its metadata again, make this anew"
            )
