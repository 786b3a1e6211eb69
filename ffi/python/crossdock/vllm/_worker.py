"""The workers' side: a node, and the rooms of requests."""

from __future__ import annotations

import itertools
import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Set, Tuple

import numpy

from .._host import bind_host, ports_of
from ..errors import Busy, Error, PageError, Stopped
from ..kinds import By, Outcome, Stage
from ..layout import Parallelism
from ..node import Node
from ..peer import Peer, Source
from ..pool import Pool
from ..room import End, Receiving, Serving
from ._scheduler import Fetch, Serve, release_of
from ._settings import Settings
from ._strips import cache_of, parallelism_of

_log = logging.getLogger("crossdock.vllm")

# Sessions with prefill engines that are kept though nothing is fetched from them: so many, and more as long as others
# may be fetching from here over the same sessions.
_IDLE_PEERS = 64
_MOST_PEERS = 4096
# Loans that are over, of which a step asks whether they are read still.
_ASKED = 16
# Rooms that only tell a prefill engine that its blocks are free: beyond, its lease tells it.
_MOST_LETTING = 1024
# It opens the other end in its next step, if it has not.
_LETTING_SECONDS = 30.0


class _Loan(NamedTuple):
    """Blocks that are served."""

    room: Serving
    blocks: Any
    """An array of their numbers."""


class _Load(NamedTuple):
    room: Receiving
    fetch: Fetch
    addresses: List[str]
    """Of the peers that are read from."""


class Working:
    """Called by vLLM's worker, in the thread that steps the model. Rooms make progress in the node's own thread; each
    step asks how they are."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self._settings, self._rank = settings, rank
        self._node: Optional[Node] = None
        self._pool: Optional[Pool] = None
        self._strips = 0
        self._form = ""
        # Those that were used last are last.
        self._peers: Dict[str, Peer] = {}
        # Addresses where the session was lost, never came, or was refused.
        self._doubtful: Set[str] = set()
        self._serving: Dict[str, _Loan] = {}
        # Loans that are over, and that nobody has fetched: a reader that was late may be at their blocks still.
        # Those that were asked last are last.
        self._lingering: Dict[str, Any] = {}
        # By block: how many loans that are served have it, and how many that linger.
        self._serving_of: Any = numpy.zeros(settings.blocks, numpy.int32)
        self._lingering_of: Any = numpy.zeros(settings.blocks, numpy.int32)
        self._loading: Dict[str, _Load] = {}
        # Rooms that only tell a prefill engine that its blocks are free.
        self._letting: List[_Load] = []
        # Answers of requests that have no room, or none any more.
        self._sent: Set[str] = set()
        self._received: Set[str] = set()
        self._bad_blocks: Set[int] = set()

    @property
    def told(self) -> Optional[Tuple[str, str]]:
        """The node's address, and the form of the tensors; `None` until they are registered."""
        return None if self._node is None else (self._node.address, self._form)

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Opens the node over the tensors of all layers."""
        if self._node is not None:
            raise Busy("the KV caches were registered already", "register them once", 7)
        settings = self._settings
        cache = cache_of(kv_caches, settings, self._rank)
        host = settings.host or bind_host()
        pool = Pool(cache.layout)
        self._node = Node(
            f"{settings.engine_id}/{self._rank}",
            cache.layout,
            cache.memory,
            pool,
            key=settings.key,
            authentication="key" if settings.key else "off",
            bind=f"[{host}]:0" if ":" in host else f"{host}:0",
            ports=settings.ports or ports_of(""),
        )
        self._pool, self._strips, self._form = pool, cache.strips, cache.form

    def start(self, serves: Mapping[str, Serve], fetches: Mapping[str, Fetch]) -> None:
        """Begins what the scheduler has said, and does not wait for it."""
        for request, serve in serves.items():
            self._serve(request, serve)
        for request, fetch in fetches.items():
            if fetch.refusal is not None:
                self._failed(request, fetch.blocks, fetch.refusal)
                self._received.add(request)
            else:
                self._fetch(request, fetch)

    def _parallelism(self, tp: int) -> Parallelism:
        return parallelism_of(self._settings, self._strips, tp)

    def _serve(self, request: str, serve: Serve) -> None:
        settings = self._settings
        try:
            node = self._opened()
            mine, theirs = self._parallelism(settings.tp), self._parallelism(settings.decode_tp)
            ranks = mine.destinations(theirs, self._rank, spread_by=serve.room)
            if not ranks:
                # Of a latent that all ranks keep, another one brings it.
                self._sent.add(request)
                return
            blocks = numpy.array(serve.blocks, numpy.int32)
            room = node.serve(serve.room, len(blocks), blocks, ranks=ranks, deadline=settings.lease_seconds)
        except Error as error:
            _log.error("the blocks of request %s are not served: %s", request, error)
            self._sent.add(request)
            return
        self._serving[request] = _Loan(room, blocks)
        self._serving_of[blocks] += 1

    def _fetch(self, request: str, fetch: Fetch) -> None:
        remote, settings = fetch.remote, self._settings
        used: List[str] = []
        try:
            if not fetch.blocks and len(self._letting) >= _MOST_LETTING:
                raise Busy(f"{len(self._letting)} rooms give up blocks already", "the lease of these ends", 7)
            node = self._opened()
            theirs, mine = self._parallelism(len(remote.addresses)), self._parallelism(settings.tp)
            sources = theirs.sources(mine, self._rank, spread_by=remote.room)
            used = [remote.addresses[source.rank] for source in sources]
            peers = [Source(self._peer(address), source.rank, source.parts) for address, source in zip(used, sources)]
            room = node.fetch(
                peers,
                remote.room,
                remote.blocks,
                numpy.array(fetch.blocks, numpy.int32),
                skip_tokens=fetch.skipped,
                deadline=settings.load_seconds if fetch.blocks else min(settings.load_seconds, _LETTING_SECONDS),
            )
        except Error as error:
            if fetch.blocks:
                self._failed(request, fetch.blocks, str(error))
                self._received.add(request)
            else:
                _log.warning("request %s: its prefill engine is not told that it is over: %s", request, error)
            self._doubtful.update(self._peers.keys() & set(used))
            return
        load = _Load(room, fetch, used)
        if fetch.blocks:
            self._loading[request] = load
        else:
            self._letting.append(load)

    def _failed(self, request: str, blocks: List[int], why: str) -> None:
        _log.error("the blocks of request %s were not loaded: %s", request, why)
        self._bad_blocks.update(blocks)

    def finished(self, given_up: Set[str]) -> Tuple[Set[str], Set[str]]:
        """Requests whose blocks nobody fetches any more, and those that have been loaded or never will be. `given_up`
        have finished meanwhile: what they load is of no use."""
        for request in given_up:
            load = self._loading.get(request)
            if load is not None and load.room.poll() is None:
                load.room.cancel()
        self._look_at_loans()
        for request, load in list(self._loading.items()):
            end = load.room.poll()
            # Before nobody else can write its blocks, they are not told to be free.
            if end is None or not load.room.is_home:
                continue
            is_given_up = end.outcome == Outcome.CANCELLED and end.by == By.HERE
            if not end.is_delivered and not is_given_up:
                self._failed(request, load.fetch.blocks, end.message)
            del self._loading[request]
            self._closed(load, end)
            self._received.add(request)
            if is_given_up:
                # Where the other end was not open yet, it has not heard of it.
                self._fetch(request, release_of(load.fetch.remote))
        for load in list(self._letting):
            end = load.room.poll()
            if end is not None:
                self._letting.remove(load)
                self._closed(load, end)
        self._look_at_peers()
        sent, received = self._sent, self._received
        self._sent, self._received = set(), set()
        return sent, received

    def _look_at_loans(self) -> None:
        for request, loan in list(self._serving.items()):
            end = loan.room.poll()
            if end is None:
                continue
            loan.room.close()
            del self._serving[request]
            self._serving_of[loan.blocks] -= 1
            if end.is_delivered:
                # All readers have said so, and that they are done.
                self._sent.add(request)
            else:
                _log.warning("the blocks of request %s were not fetched: %s", request, end.message)
                self._lingering[request] = loan.blocks
                self._lingering_of[loan.blocks] += 1
        for request in list(itertools.islice(self._lingering, _ASKED)):
            blocks = self._lingering.pop(request)
            if self._is_read(blocks):
                self._lingering[request] = blocks
            else:
                self._lingering_of[blocks] -= 1
                self._sent.add(request)

    def _is_read(self, blocks: Any) -> bool:
        """Whether somebody may read a loan that lingers. Its room holds all of its blocks until nobody does: one block
        that no room holds is enough. Those that are served are held anyhow, and those of many loans more likely."""
        own = blocks[self._serving_of[blocks] == 0]
        if not len(own):
            return True
        asked = own[numpy.argmin(self._lingering_of[own])]
        assert self._pool is not None
        try:
            self._pool.adopt([int(asked)]).close()
        except PageError:
            return True
        return False

    def _closed(self, load: _Load, end: End) -> None:
        load.room.close()
        if end.is_delivered:
            self._doubtful.difference_update(load.addresses)
        elif end.outcome in (Outcome.PEER_LOST, Outcome.REFUSED) or end.stage == Stage.SESSION:
            self._doubtful.update(load.addresses)

    def _look_at_peers(self) -> None:
        """Forgets peers that are in doubt, so that they are not dialed for ever, and the oldest ones that are too many.
        The next request dials them anew. A peer may fetch from here over the same session, which ends then: so not as
        long as anything is served."""
        if not self._doubtful and len(self._peers) <= _IDLE_PEERS:
            return
        if self._serving and len(self._peers) <= _MOST_PEERS:
            return
        busy = {address for load in [*self._loading.values(), *self._letting] for address in load.addresses}
        idle = [address for address in self._peers if address not in busy]
        excess = max(0, len(self._peers) - _IDLE_PEERS)
        for address in {*idle[:excess], *self._doubtful.intersection(idle)}:
            self._peers.pop(address).close()
        self._doubtful.intersection_update(busy)

    def take_bad_blocks(self) -> Set[int]:
        """Blocks that were to be loaded and were not, each told once."""
        taken, self._bad_blocks = self._bad_blocks, set()
        return taken

    def close(self) -> None:
        """Ends everything, and says goodbye to all peers."""
        node, self._node = self._node, None
        loads = [*self._loading.values(), *self._letting]
        for room in [*(loan.room for loan in self._serving.values()), *(load.room for load in loads)]:
            room.close()
        for peer in self._peers.values():
            peer.close()
        self._serving, self._lingering, self._loading, self._letting, self._peers = {}, {}, {}, [], {}
        self._doubtful.clear()
        self._serving_of[:] = self._lingering_of[:] = 0
        if node is not None:
            node.close()

    def _opened(self) -> Node:
        if self._node is None:
            raise Stopped("the KV caches of this worker are not registered", "register them before requests come", 8)
        return self._node

    def _peer(self, address: str) -> Peer:
        peer = self._peers.pop(address, None) or self._opened().connect(address)
        self._peers[address] = peer
        return peer
