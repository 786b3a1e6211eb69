"""The nodes that a node talks to."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generator, NamedTuple, Optional, Tuple, Union

from ._abi import (
    OK,
    PENDING,
    address_of,
    check_closed,
    failure,
    ffi,
    forked,
    lib,
    made,
    process,
    told_text,
    waited,
)
from ._events import Events, Subject
from .kinds import Parts, chosen

if TYPE_CHECKING:
    from .node import Node

_peer_poll, _peer_wait = lib.crossdock_peer_poll, lib.crossdock_peer_wait


class PeerInfo(NamedTuple):
    """Who answered at a dialed address."""

    number: int
    """The node's number."""
    incarnation: int
    """Which start of the node this is."""
    name: str


class Peer(Subject):
    """A peer of a node. `await peer` waits until one that was dialed has answered."""

    __slots__ = ("_pid", "_node", "_events", "_source", "_source_address", "_info")

    def __init__(self, node: Node, events: Events, handle: int) -> None:
        """For the node."""
        self._handle = handle
        self._pid = process.pid
        self._is_closed = False
        self._waiters = None
        # It is not to be closed by the collector while somebody holds this.
        self._node = node
        self._events = events
        self._info: Optional[PeerInfo] = None
        # Alone as a source, which is what most rooms have.
        self._source = ffi.new("crossdock_source[]", [(handle, 0, 0)])
        self._source_address = address_of(self._source)
        events.peers[handle] = weakref.ref(self)

    def __repr__(self) -> str:
        who = "not yet answered" if self._info is None else f"{self._info.name!r}"
        return f"<Peer of {self._node.name!r}, {who}>"

    def poll(self) -> Optional[PeerInfo]:
        """Who has answered, or `None`. Raises `Refused` if nobody ever will."""
        if self._info is not None:
            return self._info
        if self._pid != process.pid:
            raise forked(self)
        info = made("crossdock_peer_info")
        status = _peer_poll(self._handle, info)
        if status != OK:
            if status == PENDING:
                return None
            raise failure(status)
        self._info = PeerInfo(info.node, info.incarnation, told_text(lib.crossdock_peer_name, self._handle))
        return self._info

    def wait(self, timeout: Optional[float] = None) -> PeerInfo:
        """Who answers, within so many seconds."""
        if self._pid != process.pid:
            raise forked(self)
        info = made("crossdock_peer_info")
        waited(_peer_wait, self._handle, info, timeout=timeout, what="the peer has not answered")
        found = self.poll()
        assert found is not None
        return found

    def __await__(self) -> Generator[Any, None, PeerInfo]:
        return self._events.until(self, self.poll).__await__()

    def close(self) -> None:
        """Ends the session with a dialed peer and dials it no more. A peer that was named by its number is only
        forgotten."""
        if not self._is_closed:
            if self._pid != process.pid:
                raise forked(self)
            self._release()
            self._events.wake_waiters_of(self)

    def _release(self) -> None:
        self._is_closed = True
        self._events.peers.pop(self._handle, None)
        check_closed(lib.crossdock_peer_close(self._handle))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed and self._pid == process.pid:
            self._release()


class Source(NamedTuple):
    """A rank of the prefill side that brings something."""

    peer: Peer
    rank: int = 0
    parts: Union[Parts, str] = Parts.ALL


def sources_of(sources: Any) -> Tuple[Any, int, int]:
    """A C array, its address and how many they are."""
    given = (sources,) if isinstance(sources, Source) else tuple(sources)
    entries = []
    for one in given:
        peer, rank, parts = one if isinstance(one, tuple) else (one, 0, Parts.ALL)
        if peer._pid != process.pid:
            raise forked(peer)
        entries.append((peer._handle, rank, chosen(Parts, "parts", parts)))
    array = ffi.new("crossdock_source[]", entries)
    return array, address_of(array), len(entries)
