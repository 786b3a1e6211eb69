"""What a call from Python costs.

    python ffi/python/benches/calls.py [--json]

Measured against two things: an empty call of the same library through cffi (crossdock_abi_version), which is the
floor of every call, and the same call made through cffi directly, with structures that are filled already; what is
above that is this package's. Two nodes of one process are connected; requests name pages of one token each by two
NumPy arrays, or array.array where NumPy is not installed. The caller makes the progress, between what is timed, so
that no other thread is woken inside of it. Of each figure the best of several rounds is told, so that what else runs
on the machine counts for little.
"""

from __future__ import annotations

import array
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Tuple

try:
    import crossdock
except ImportError:
    # Not installed: the one beside this, for which dev.py has made the native part.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import crossdock
from crossdock._abi import ffi, lib
from crossdock._buffers import numbers_of

try:
    import numpy
except ImportError:
    numpy = None  # type: ignore[assignment]

ROUNDS = 7
CALLS = 20_000
PAGES = 8192


def best_ns(call: Callable[[], object], calls: int = CALLS) -> float:
    """Of one call, with the loop that makes it taken off."""
    return max(0.0, min(timed(call, calls) for _ in range(ROUNDS)) - min(timed(nothing, calls) for _ in range(ROUNDS)))


def timed(call: Callable[[], object], calls: int) -> float:
    begun = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - begun) / calls


def nothing() -> None:
    pass


def numbers(seed: int) -> Any:
    shuffled = list(range(2 * PAGES))
    random.Random(seed).shuffle(shuffled)
    return numpy.array(shuffled, dtype=numpy.int64) if numpy else array.array("q", shuffled)


class Worker:
    def __init__(self, name: str) -> None:
        options: Dict[str, Any] = dict(latent_bytes=64, rope_bytes=0, dtype="bf16", page_tokens=1, pages=2 * PAGES)
        self.layout = crossdock.Layout("bench", model_layers=1, kind="mla", **options)
        self.memory = crossdock.Memory(self.layout.region_bytes())
        self.pool = crossdock.Pool(self.layout)
        options = dict(authentication="off", progress="caller")
        self.node = crossdock.Node(name, self.layout, self.memory, self.pool, **options)


def driven(nodes: Iterable[crossdock.Node], is_done: Callable[[], object]) -> None:
    """Makes progress until it is."""
    deadline = time.monotonic() + 20
    while not is_done():
        if time.monotonic() > deadline:
            raise TimeoutError("the nodes do not come on")
        for node in nodes:
            node.progress()


class Burst:
    """Requests of so many pages each, submitted one right after another. Each call's mean is kept where it is the
    best."""

    def __init__(self, prefill: Worker, decode: Worker, peer: crossdock.Peer, size: int, count: int) -> None:
        self.prefill, self.decode, self.peer, self.size = prefill.node, decode.node, peer, size
        of, to = numbers(1), numbers(2)
        self.sources = [of[at * size : (at + 1) * size] for at in range(count)]
        self.targets = [to[at * size : (at + 1) * size] for at in range(count)]
        self.best: Dict[Tuple[str, str], float] = {}
        self.next_room = size << 20

    def rooms(self) -> range:
        first, self.next_room = self.next_room, self.next_room + len(self.sources)
        return range(first, self.next_room)

    def timed(self, name: str, by: str, calls: Callable[[], List[Any]]) -> List[Any]:
        begun = time.perf_counter_ns()
        answers = calls()
        took = (time.perf_counter_ns() - begun) / len(answers)
        self.best[name, by] = min(took, self.best.get((name, by), took))
        return answers

    def by_package(self) -> None:
        size, rooms = self.size, self.rooms()
        receive, send, peer = self.decode.receive, self.prefill.send, self.peer
        to, of = list(zip(rooms, self.targets)), list(zip(rooms, self.sources))
        receiving = self.timed("receive", "package", lambda: [receive(peer, room, size, pages) for room, pages in to])
        sending = self.timed("send", "package", lambda: [send(room, size, pages) for room, pages in of])
        self.timed("layer", "package", lambda: [room.send(0) for room in sending])
        for room in sending:
            room.finish()
        nodes = (self.decode, self.prefill)
        driven(nodes, lambda: all(room.poll() for room in receiving + sending))
        for room in receiving:
            driven(nodes, room._are_pages_home)
        for room in receiving + sending:
            room.poll().check()
            room.close()

    def in_c(self) -> None:
        rooms, node, other = self.rooms(), self.decode._handle, self.prefill._handle
        to = [self.prepared(self.decode, "crossdock_receive_options", *one) for one in zip(rooms, self.targets)]
        of = [self.prepared(self.prefill, "crossdock_send_options", *one) for one in zip(rooms, self.sources)]
        for options, _, _ in to:
            options.sources, options.source_count = self.peer._source, 1
        receive, send, layer, null = lib.crossdock_receive, lib.crossdock_send, lib.crossdock_room_send_layers, ffi.NULL
        answers = self.timed("receive", "c", lambda: [receive(node, options, room) for options, room, _ in to])
        answers += self.timed("send", "c", lambda: [send(other, options, room) for options, room, _ in of])
        receiving, sending = [room[0] for _, room, _ in to], [room[0] for _, room, _ in of]
        answers += self.timed("layer", "c", lambda: [layer(room, 0, 1) for room in sending])
        answers += [lib.crossdock_room_finish(room, null, 0) for room in sending]
        nodes, rooms_open = (self.decode, self.prefill), receiving + sending
        driven(nodes, lambda: not any(lib.crossdock_room_poll(room, null) for room in rooms_open))
        driven(nodes, lambda: not any(lib.crossdock_room_wait_pages(room, 0) for room in receiving))
        answers += [lib.crossdock_room_close(room) for room in rooms_open]
        assert not any(answers), answers

    def prepared(self, node: crossdock.Node, kind: str, room: int, pages: Any) -> Tuple[Any, Any, Any]:
        """The structures of one call, and what they point to."""
        options, entry, handle = ffi.new(kind + " *"), ffi.new("crossdock_page_list *"), ffi.new("crossdock_room *")
        entry.ids, entry.count, entry.id_bytes = kept = numbers_of(pages)
        entry.pool = node._pool
        options.size = ffi.sizeof(kind)
        options.room, options.tokens, options.pages, options.page_lists = room, self.size, entry, 1
        return options, handle, (kept, entry)


def main() -> None:
    prefill, decode = Worker("prefill"), Worker("decode")
    rows: List[Dict[str, Any]] = []

    def row(call: str, python: float, c: float) -> None:
        rows.append({"call": call, "python_ns": round(python), "c_ns": round(c), "beside_ns": round(python - c)})

    with prefill.node, decode.node:
        peer = decode.node.connect(prefill.node.address)
        nodes = (prefill.node, decode.node)
        driven(nodes, peer.poll)
        floor = best_ns(lib.crossdock_abi_version)
        waiting = decode.node.receive(peer, 1, 8, range(8), deadline=600)
        handle, null = waiting._handle, ffi.NULL
        row("room.poll(), pending", best_ns(waiting.poll), best_ns(lambda: lib.crossdock_room_poll(handle, null)))
        events, count, handle = ffi.new("crossdock_event[64]"), ffi.new("size_t *"), decode.node._handle
        in_c = best_ns(lambda: lib.crossdock_node_poll(handle, events, 64, count))
        row("node.events(), none", best_ns(decode.node.events), in_c)
        waiting.cancel()
        driven(nodes, waiting._are_pages_home)
        waiting.close()
        for size, count, rounds in ((1, 64, 400), (PAGES, 2, 60)):
            burst = Burst(prefill, decode, peer, size, count)
            for number in range(rounds):
                # Whichever comes second finds the caches warm.
                for run in (burst.by_package, burst.in_c) if number % 2 else (burst.in_c, burst.by_package):
                    run()
            for name, call in (("receive", "node.receive()"), ("send", "node.send()"), ("layer", "room.send(layer)")):
                row(f"{call}, {size} page{'s' * (size > 1)}", burst.best[name, "package"], burst.best[name, "c"])
        peer.close()

    about = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "crossdock": crossdock.__version__,
        "page_numbers": "numpy int64" if numpy else "array.array('q')",
        "floor": "crossdock_abi_version through cffi, out of line, ABI mode",
        "floor_ns": round(floor),
    }
    if "--json" in sys.argv[1:]:
        print(json.dumps({**about, "rows": rows}))
        return
    print(f"Python {about['python']}, page numbers: {about['page_numbers']}; an empty call: {about['floor_ns']} ns")
    print(f"{'':<30} {'Python':>10} {'in C':>10} {'beside it':>10}")
    for one in rows:
        figures = (f"{one[column] / 1000:>7.2f} us" for column in ("python_ns", "c_ns", "beside_ns"))
        print(f"{one['call']:<30}", *figures)


main()
