"""Moves an LLM's KV-cache pages from prefill to decode workers.

Order of use: a `Layout`, `Memory` for its regions, a `Pool` over its pages, a `Node` over both, a `Peer`, rooms:
`Node.receive` and `Node.send` push, `Node.serve` and `Node.fetch` pull. A room is polled, waited for, or awaited.

`crossdock.experts` sends tokens to their experts and back. An `Endpoint` moves memory by address. `crossdock.mooncake` and
`crossdock.deep_ep` have the names of those libraries.

Everything may be used from any thread. Nothing works in a process that was forked after it was made.
"""

from __future__ import annotations

from . import errors
from ._abi import VERSION as __version__
from ._events import Event
from .errors import *  # noqa: F403
from .kinds import (
    By,
    Dtype,
    EventKind,
    Extent,
    HeadOrder,
    HugePages,
    Kind,
    MemoryKind,
    Outcome,
    Parts,
    Placement,
    Progress,
    Stage,
)
from .endpoint import Endpoint, Transfer
from .layout import Layout, LayerBuffer, Parallelism, Part, Place, SourceRank
from .memory import Memory
from .node import Node, NodeStats
from .peer import Peer, PeerInfo, Source
from .pool import Pages, Pool, PoolStats
from .registry import Registration, Registry, RegistryClient
from .room import End, Receiving, Room, Sending, Serving

__all__ = [
    "By",
    "Dtype",
    "End",
    "Endpoint",
    "Event",
    "EventKind",
    "Extent",
    "HeadOrder",
    "HugePages",
    "Kind",
    "Layout",
    "LayerBuffer",
    "Memory",
    "MemoryKind",
    "Node",
    "NodeStats",
    "Outcome",
    "Pages",
    "Parallelism",
    "Part",
    "Parts",
    "Peer",
    "PeerInfo",
    "Place",
    "Placement",
    "Pool",
    "PoolStats",
    "Progress",
    "Receiving",
    "Registration",
    "Registry",
    "RegistryClient",
    "Room",
    "Sending",
    "Serving",
    "Source",
    "SourceRank",
    "Stage",
    "Transfer",
    "__version__",
    "errors",
]
__all__ += errors.__all__
