"""A rank's node, and the peers that it dials."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from itertools import islice
from typing import Any, Dict, List, Optional, Tuple

from .._host import key_of_deployment, ports_of
from ..errors import BadArgument, Busy
from ..layout import Layout
from ..node import Node
from ..peer import Peer
from ..pool import Pool
from ..room import Receiving
from .cache import MAX_FRAME_BYTES, Cache

_log = logging.getLogger("crossdock.sglang")

PeerKey = Tuple[str, int, int]

# With each room that is cleared, so many of those that wait the longest are asked, too: few requests are asked for by
# number, and none is kept for ever.
_ASKED_BESIDE = 2


class Worker:
    """Opens the node once it is known what heads the model has: on the prefill side at once, on the decode side with
    the first prefill rank that is met, because SGLang's decode side does not say."""

    def __init__(self, name: str, cache: Cache, local_ip: str, devices: Optional[str]) -> None:
        self.cache = cache
        self._name = name
        self._bind = f"[{local_ip}]:0" if ":" in local_ip else f"{local_ip}:0"
        self._ports = os.environ.get("CROSSDOCK_PORTS") or ports_of(devices or "")
        self._lock = threading.Lock()
        self._node: Optional[Node] = None
        self._layout: Optional[Layout] = None
        self._pools: List[Pool] = []
        self._form: Any = None
        # By bootstrap server, data-parallel rank and rank: where they are dialed.
        self._peers: Dict[PeerKey, Tuple[str, Peer]] = {}
        # By number: rooms of cleared requests, whose pages are not home yet.
        self._draining: OrderedDict[int, List[Receiving]] = OrderedDict()

    @property
    def node(self) -> Node:
        assert self._node is not None, "opened first"
        return self._node

    @property
    def layers(self) -> range:
        assert self._layout is not None, "opened first"
        return self._layout.layers

    def open(self, heads: int, head_bytes: int, first_layer: int) -> Node:
        """The node, of a model with so many KV heads of so many bytes; 0 and the bytes of a latent for MLA."""
        form = (heads, head_bytes, first_layer)
        with self._lock:
            if self._node is None:
                layout, pools = self.cache.layout(*form)
                key = key_of_deployment()
                self._node = Node(
                    self._name,
                    layout,
                    self.cache.memories,
                    pools,
                    key=key,
                    authentication="off" if key is None else "key",
                    bind=self._bind,
                    ports=self._ports,
                    max_frame_bytes=MAX_FRAME_BYTES,
                )
                self._layout, self._pools, self._form = layout, pools, form
            elif form != self._form:
                raise BadArgument(
                    f"a model of {heads} KV heads of {head_bytes} bytes from layer {first_layer}",
                    f"the first prefill rank that was met had {self._form}: all serve the same model",
                    3,
                )
            return self._node

    def peer(self, key: PeerKey, address: str) -> Peer:
        """The rank, which is dialed at its address. If it was another's before, that one is gone."""
        with self._lock:
            assert self._node is not None, "opened first"
            known = self._peers.get(key)
            if known is not None and known[0] == address:
                return known[1]
            peer = self._node.connect(address)
            self._peers[key] = (address, peer)
        if known is not None:
            known[1].close()
        return peer

    def forget(self, bootstrap_addr: str) -> None:
        """The prefill server is gone: its ranks are dialed no more, and rooms with them end."""
        with self._lock:
            gone = [self._peers.pop(key) for key in list(self._peers) if key[0] == bootstrap_addr]
        for _, peer in gone:
            peer.close()

    def is_home(self, number: int) -> bool:
        """Whether nobody else can write the pages of what was cleared of a room. Looks at that room alone: the scheduler
        asks for each request that it holds, in each of its steps."""
        with self._lock:
            return self._are_home(number)

    def drain(self, number: int, room: Receiving) -> None:
        """Keeps a room that is cleared until its pages are home."""
        with self._lock:
            self._draining.setdefault(number, []).append(room)
            for asked in [number, *list(islice(self._draining, _ASKED_BESIDE))]:
                if not self._are_home(asked):
                    self._draining.move_to_end(asked)

    def _are_home(self, number: int) -> bool:
        rooms = self._draining.get(number, [])
        for room in [room for room in rooms if room.is_home]:
            room.close()
            rooms.remove(room)
        if not rooms:
            self._draining.pop(number, None)
        return not rooms

    def close(self) -> None:
        with self._lock:
            for _, peer in self._peers.values():
                peer.close()
            self._peers.clear()
            for rooms in self._draining.values():
                for room in rooms:
                    room.close()
            self._draining.clear()
            node, self._node = self._node, None
        if node is not None:
            node.close()
        try:
            self.cache.close()
        except Busy as error:
            _log.warning("a peer that does not answer can reach the KV cache still: %s", error)
