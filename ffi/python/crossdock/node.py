"""One worker: its memory, its peers, its rooms."""

from __future__ import annotations

import atexit
import os
import struct
import warnings
import weakref
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

from ._abi import OK, address_of, check, check_closed, failure, ffi, forked, lib, made, milliseconds, process
from ._abi import text_bytes, text_or_null, told_text
from ._buffers import numbers_of
from ._events import Event, Events
from ._requests import RECEIVE, RECEIVE_BYTES, SEND, SEND_BYTES, PageList, Request
from ._requests import lists_of, receive_packer, request_of, send_packer
from .errors import BadArgument
from .kinds import Progress, chosen
from .layout import Layout, run_of
from .memory import Memory, sweep
from .peer import Peer, Source, sources_of
from .pool import Pages, Pool
from .room import Receiving, Room, Sending, Serving

_receive, _fetch, _send, _serve = lib.crossdock_receive, lib.crossdock_fetch, lib.crossdock_send, lib.crossdock_serve
_send_ahead = lib.crossdock_send_ahead
_pack_receive, _pack_send = receive_packer.into, send_packer.into
_NO_SPIN = 2**64 - 1
_NO_AUX = b""

_open_nodes: weakref.WeakSet[Node] = weakref.WeakSet()


class NodeStats(NamedTuple):
    """What a node has done and what it holds."""

    rooms: int
    """Rooms that are not over in every respect."""
    grants: int
    """Grants given to peers that are not quiescent."""
    sessions: int
    """Sessions that are not over in every respect."""
    delivered: int
    """Rooms that were delivered since the node was opened."""
    undelivered: int
    """Rooms that ended otherwise."""
    arrivals: int
    """Batches that have landed here."""
    sessions_begun: int
    """Sessions that have begun."""


class Node:
    """Opens the ports, registers the memory, begins to listen and starts to make progress."""

    __slots__ = (
        "_handle",
        "_pid",
        "_is_closed",
        "_events",
        "_memories",
        "_pools",
        "_has_one_pool",
        "_pool",
        "_receives",
        "_sends",
        "name",
        "address",
        "ports",
        "number",
        "incarnation",
        "__weakref__",
    )

    def __init__(
        self,
        name: str,
        layout: Layout,
        memory: Union[Memory, Sequence[Memory]],
        pools: Union[Pool, Sequence[Pool]],
        *,
        key: Optional[bytes] = None,
        authentication: str = "key",
        number: int = 0,
        progress: Union[Progress, str] = Progress.THREAD,
        bind: Optional[str] = None,
        advertise: Optional[str] = None,
        ports: Union[str, Sequence[str], None] = None,
        flight_folder: Union[str, os.PathLike[str], None] = None,
        verify_one_in: int = 0,
        lanes_per_rail: int = 0,
        spin: Optional[float] = None,
        heartbeat: Optional[float] = None,
        warm_up_grace: Optional[float] = None,
        handshake_timeout: Optional[float] = None,
        drain_timeout: Optional[float] = None,
        heartbeats_missed: int = 0,
        copy_threads: int = 0,
        max_sessions: int = 0,
        max_rooms: int = 0,
        max_grants: int = 0,
        max_commands: int = 0,
        max_frame_bytes: int = 0,
    ) -> None:
        """`memory` is that of the regions that the layout names, and `pools` are those of its pages, in the order of the
        layout's pools. All nodes share `key`, at least 16 bytes, better 32 random ones; with
        `authentication="off"` anybody who can reach the node may connect. `number` is the same over restarts; 0 chooses
        one at random. Peers dial `bind` ("ip:port", "127.0.0.1:0" if left out; port 0 takes any free one) or `advertise`.
        `ports` are "shm", "tcp", "verbs" or "verbs:DEVICE" in the order of preference, "shm,tcp" if left out. The flight
        recorder writes to `flight_folder` when a room fails. Of the rooms that this side receives, one in `verify_one_in`
        is verified by checksums; 0 verifies none. Times are in seconds; `None` and 0 are what is usual, but a `spin` of 0
        does not spin at all."""
        self._is_closed = True
        memories = (memory,) if isinstance(memory, Memory) else tuple(memory)
        given = (pools,) if isinstance(pools, Pool) else tuple(pools)
        if len(given) != layout.pools:
            raise BadArgument(f"{len(given)} pools; the layout has {layout.pools}", "give one for each", 3)
        options = made("crossdock_node_options")
        options.name = label = ffi.new("char[]", text_bytes(name))
        options.number = number
        options.layout = layout._handle
        handles = ffi.new("crossdock_memory[]", [one.handle() for one in memories])
        options.memory, options.memory_count = handles, len(memories)
        if authentication not in ("key", "off") or (authentication == "key") != (key is not None):
            raise BadArgument('a node has a key, or none and authentication="off"', "share a key of 32 random bytes", 3)
        options.authentication = 1 if key is not None else 2
        options.progress = chosen(Progress, "progress", progress)
        secret = ffi.NULL if key is None else ffi.from_buffer("uint8_t[]", key)
        options.key, options.key_bytes = secret, 0 if key is None else len(key)
        kept = [label, handles, secret]
        texts = {
            "bind": bind,
            "advertise": advertise,
            "ports": ports if ports is None or isinstance(ports, str) else ",".join(ports),
            "flight_folder": None if flight_folder is None else os.fsdecode(flight_folder),
        }
        for field, value in texts.items():
            kept.append(text_or_null(value))
            setattr(options, field, kept[-1])
        options.verify_one_in, options.lanes_per_rail = verify_one_in, lanes_per_rail
        if spin is not None:
            options.spin_us = max(1, round(spin * 1e6)) if spin > 0 else _NO_SPIN
        options.heartbeat_ms = milliseconds(heartbeat)
        options.warm_up_grace_ms = milliseconds(warm_up_grace)
        options.handshake_timeout_ms = milliseconds(handshake_timeout)
        options.drain_timeout_ms = milliseconds(drain_timeout)
        options.heartbeats_missed, options.copy_threads = heartbeats_missed, copy_threads
        options.max_sessions, options.max_rooms, options.max_grants = max_sessions, max_rooms, max_grants
        options.max_commands, options.max_frame_bytes = max_commands, max_frame_bytes
        handle = ffi.new("crossdock_node *")
        check(lib.crossdock_node_open(options, handle))
        self._handle: int = handle[0]
        self._pid = process.pid
        self._is_closed = False
        self._memories = memories
        self._events = Events(self._handle)
        self._pools: Tuple[Pool, ...] = given
        self._has_one_pool = len(given) == 1
        # Its first.
        self._pool = given[0]._handle
        # What calls have made and others use again: as many as there are at once.
        self._receives: List[Request] = []
        self._sends: List[Request] = []
        self.name = name
        self.address = told_text(lib.crossdock_node_address, self._handle)
        """What peers dial, "ip:port"."""
        self.ports: List[str] = told_text(lib.crossdock_node_ports, self._handle).split(",")
        """The kinds of the ports that were opened, in their order."""
        numbers = ffi.new("uint64_t[2]")
        check(lib.crossdock_node_identity(self._handle, numbers, numbers + 1))
        self.number: int = numbers[0]
        self.incarnation: int = numbers[1]
        """Which start of the node this is."""
        _open_nodes.add(self)

    def connect(self, address: str) -> Peer:
        """Dials a peer ("ip:port"; names are to be resolved before), now and whenever the session with it is lost. Returns
        at once: rooms may be opened before it has answered, which `Peer.wait` tells."""
        self._here()
        return self._peer(lib.crossdock_connect, ffi.new("char[]", text_bytes(address)))

    def peer_by_number(self, number: int) -> Peer:
        """Names a peer that dials this node, by its node number."""
        self._here()
        return self._peer(lib.crossdock_peer_by_number, number)

    def _peer(self, call: Any, whom: Any) -> Peer:
        handle = ffi.new("crossdock_peer *")
        # So that its event finds it.
        with self._events.lock:
            check(call(self._handle, whom, handle))
            return Peer(self, self._events, handle[0])

    def receive(
        self,
        sources: Union[Peer, Source, Sequence[Union[Peer, Source]]],
        room: int,
        tokens: int,
        pages: PageList,
        *,
        more_pages: Sequence[PageList] = (),
        use_count: int = 0,
        skip_tokens: int = 0,
        layers: Optional[range] = None,
        deadline: Optional[float] = None,
        tag: object = None,
    ) -> Receiving:
        """Opens the decode end of a push: the prefill side writes into the pages.

        `room` is the router's number for the request, and `use_count` which use of that number. `pages` are for what moves
        of the request's `tokens`: `Pages`, or page numbers in a buffer of 4 or 8-byte integers, a tensor, or a sequence.
        `more_pages` are those of the pools that were added to the layout. `skip_tokens` are those of a prefix that is here
        already. `layers` are those that the sources bring, where that is not all that this node keeps. The room ends after
        `deadline` seconds at the latest, 30 if left out.
        """
        return self._decode(
            _receive, sources, room, tokens, pages, more_pages, use_count, skip_tokens, layers, deadline, tag
        )

    def fetch(
        self,
        sources: Union[Peer, Source, Sequence[Union[Peer, Source]]],
        room: int,
        tokens: int,
        pages: PageList,
        *,
        more_pages: Sequence[PageList] = (),
        use_count: int = 0,
        skip_tokens: int = 0,
        layers: Optional[range] = None,
        deadline: Optional[float] = None,
        tag: object = None,
    ) -> Receiving:
        """Opens the decode end of a pull: this side reads from the pages that the prefill side serves. As `receive`."""
        return self._decode(
            _fetch, sources, room, tokens, pages, more_pages, use_count, skip_tokens, layers, deadline, tag
        )

    def _decode(
        self,
        call: Any,
        sources: Any,
        number: int,
        tokens: int,
        pages: Any,
        more_pages: Sequence[Any],
        use_count: int,
        skip_tokens: int,
        layers: Optional[range],
        deadline: Optional[float],
        tag: object,
    ) -> Receiving:
        if self._pid != process.pid:
            raise forked(self)
        try:
            request = self._receives.pop()
        except IndexError:
            request = request_of(RECEIVE, RECEIVE_BYTES)
        options, buffer, entry, list_address, handle = request
        # What the structures point to.
        kept: object
        kept_sources: object
        if isinstance(sources, Peer):
            if sources._pid != process.pid:
                raise forked(sources)
            kept_sources, source_address, source_count = sources, sources._source_address, 1
        else:
            kept_sources, source_address, source_count = sources_of(sources)
        is_plain = self._has_one_pool and not more_pages and not isinstance(pages, Pages)
        if is_plain:
            kept, count, id_bytes = numbers_of(pages)
            list_count = 1
        else:
            kept, list_address, list_count = lists_of(self._pools, pages, more_pages)
            count = id_bytes = 0
        first_layer, layer_count = (0, 0) if layers is None else run_of("layers", layers)
        deadline_ms = 0 if deadline is None else milliseconds(deadline)
        room = Receiving(self, number, tag)
        try:
            _pack_receive(
                buffer,
                0,
                self._pool,
                0,
                0,
                count,
                id_bytes,
                0,
                RECEIVE_BYTES,
                source_address,
                source_count,
                number,
                use_count,
                tokens,
                skip_tokens,
                first_layer,
                layer_count,
                0,
                list_address,
                list_count,
                deadline_ms,
                room._key,
            )
        except struct.error:
            room._is_closed = True
            given = dict(room=number, use_count=use_count, tokens=tokens, skip_tokens=skip_tokens)
            raise receive_packer.refused(first_layer=first_layer, layers=layer_count, **given) from None
        if is_plain:
            entry.ids = kept
        status = call(self._handle, options, handle)
        if status != OK:
            room._is_closed = True
            raise failure(status)
        room._handle = handle[0]
        self._receives.append(request)
        if not is_plain:
            # The library has consumed their handles.
            for one in (pages, *more_pages):
                if isinstance(one, Pages):
                    one._is_closed = True
        return room

    def send(
        self,
        room: int,
        tokens: int,
        pages: PageList,
        *,
        more_pages: Sequence[PageList] = (),
        ranks: Optional[Sequence[int]] = None,
        use_count: int = 0,
        deadline: Optional[float] = None,
        tag: object = None,
    ) -> Sending:
        """Opens the prefill end of a push: layers are sent by `Sending.send` as they are computed, then
        `Sending.finish` finishes it.

        `pages` are those of the request, from the first token on; `ranks` those of the decode side that take their shares,
        rank 0 alone if left out. The rest is as for `receive`.
        """
        opened = Sending(self, room, tag)
        self._offer(_send, opened, tokens, pages, more_pages, ranks, use_count, _NO_AUX, deadline)
        return opened

    def send_ahead(
        self,
        room: int,
        tokens: int,
        pages: PageList = (),
        *,
        more_pages: Sequence[PageList] = (),
        ranks: Optional[Sequence[int]] = None,
        use_count: int = 0,
        deadline: Optional[float] = None,
        tag: object = None,
    ) -> Sending:
        """As `send`, before all pages are known: these are the first ones, or none, and `Sending.add_pages` adds the others
        before their tokens are sent. So a prompt that is computed in chunks is sent in chunks."""
        opened = Sending(self, room, tag)
        more_pages = more_pages or [()] * (len(self._pools) - 1)
        self._offer(_send_ahead, opened, tokens, pages, more_pages, ranks, use_count, _NO_AUX, deadline)
        return opened

    def serve(
        self,
        room: int,
        tokens: int,
        pages: PageList,
        *,
        more_pages: Sequence[PageList] = (),
        ranks: Optional[Sequence[int]] = None,
        use_count: int = 0,
        aux: Any = _NO_AUX,
        deadline: Optional[float] = None,
        tag: object = None,
    ) -> Serving:
        """Opens the prefill end of a pull: pages that are filled, for the peer that asks for the room to read. It is handed
        `aux`, a buffer, with the bytes. The rest is as for `send`."""
        opened = Serving(self, room, tag)
        self._offer(_serve, opened, tokens, pages, more_pages, ranks, use_count, aux, deadline)
        return opened

    def _offer(
        self,
        call: Any,
        room: Room,
        tokens: int,
        pages: Any,
        more_pages: Sequence[Any],
        ranks: Optional[Sequence[int]],
        use_count: int,
        aux: Any,
        deadline: Optional[float],
    ) -> None:
        room._is_closed = True
        if self._pid != process.pid:
            raise forked(self)
        try:
            request = self._sends.pop()
        except IndexError:
            request = request_of(SEND, SEND_BYTES)
        options, buffer, entry, list_address, handle = request
        # What the structures point to.
        kept: object
        is_plain = self._has_one_pool and not more_pages and not isinstance(pages, Pages)
        if is_plain:
            kept, count, id_bytes = numbers_of(pages)
            list_count = 1
        else:
            kept, list_address, list_count = lists_of(self._pools, pages, more_pages)
            count = id_bytes = 0
        rank_address = rank_count = aux_address = aux_bytes = 0
        if ranks is not None:
            kept_ranks = ffi.new("uint32_t[]", list(ranks))
            rank_address, rank_count = address_of(kept_ranks), len(kept_ranks)
        if aux is not _NO_AUX:
            kept_aux = ffi.from_buffer("uint8_t[]", aux)
            aux_address, aux_bytes = address_of(kept_aux), len(kept_aux)
        try:
            _pack_send(
                buffer,
                0,
                self._pool,
                0,
                0,
                count,
                id_bytes,
                0,
                SEND_BYTES,
                rank_address,
                rank_count,
                room.number,
                use_count,
                tokens,
                list_address,
                list_count,
                aux_address,
                aux_bytes,
                0 if deadline is None else milliseconds(deadline),
                room._key,
            )
        except struct.error:
            raise send_packer.refused(room=room.number, use_count=use_count, tokens=tokens) from None
        if is_plain:
            entry.ids = kept
        # An event may find it before the call has returned.
        room._is_closed = False
        status = call(self._handle, options, handle)
        if status != OK:
            room._is_closed = True
            raise failure(status)
        room._handle = handle[0]
        self._sends.append(request)

    def events(self, most: int = 64) -> List[Event]:
        """Takes what has happened since it was asked last, oldest first. Each event is told once."""
        return self._events.take(most)

    def wait(self, timeout: Optional[float] = None, most: int = 64) -> List[Event]:
        """As `events`, and waits for the first one, so many seconds."""
        return self._events.wait(most, timeout)

    async def wait_events(self, most: int = 64) -> List[Event]:
        """As `wait`, for coroutines."""
        return await self._events.until_some(most)

    def fileno(self) -> int:
        """The node's one event descriptor, for poll or epoll: readable while `events` would tell something. It belongs to
        the node: do not read from it, nor close it. Where coroutines wait, it is theirs."""
        self._here()
        return self._events.descriptor()

    def progress(self) -> bool:
        """Of a node that the caller drives: makes progress, and never blocks. Tells whether something happened, so that
        more may be waiting."""
        self._here()
        is_active = ffi.new("uint32_t *")
        check(lib.crossdock_node_progress(self._handle, is_active))
        return bool(is_active[0])

    def park(self, longest: float) -> None:
        """Of a node that the caller drives: sleeps until there is progress to make, for no longer than so many seconds."""
        self._here()
        check(lib.crossdock_node_park(self._handle, milliseconds(longest)))

    def stats(self, timeout: float = 5.0) -> NodeStats:
        """What the node has done and what it holds. The progress loop is asked: whoever drives it is not to wait here."""
        self._here()
        stats = made("crossdock_node_stats")
        check(lib.crossdock_node_get_stats(self._handle, milliseconds(timeout), stats))
        return NodeStats(*(getattr(stats, name) for name in NodeStats._fields))

    def write_flight(self, path: Union[str, os.PathLike[str]], timeout: float = 5.0) -> None:
        """Writes down what the flight recorder holds, as a file for `crossdock timeline`."""
        self._here()
        label = ffi.new("char[]", text_bytes(os.fsdecode(path)))
        check(lib.crossdock_node_write_flight(self._handle, label, milliseconds(timeout)))

    def _here(self) -> None:
        if self._pid != process.pid:
            raise forked(self)

    def __repr__(self) -> str:
        return f"<Node {self.name!r} at {self.address}{', closed' if self._is_closed else ''}>"

    def close(self) -> None:
        """Says goodbye to all peers and ends the node's rooms, each with `Outcome.PEER_LOST`. Rooms and peers can still be
        asked how they ended."""
        if self._is_closed:
            return
        self._here()
        self._is_closed = True
        _open_nodes.discard(self)
        self._events.closing()
        try:
            check_closed(lib.crossdock_node_close(self._handle))
        finally:
            self._events.closed()
            self._memories = ()
            sweep()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed and self._pid == process.pid:
            warnings.warn(f"node {self.name!r} was dropped, and so closed", ResourceWarning, source=self)
            self.close()


def _close_all() -> None:
    """At the end of the program: peers are told goodbye, and no thread of the library outlives the interpreter."""
    for node in list(_open_nodes):
        if node._pid == process.pid:
            node.close()


atexit.register(_close_all)
