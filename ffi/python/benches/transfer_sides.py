"""What `transfer.py` measures: a prompt's pages, and each system's two sides."""

from __future__ import annotations

import mmap
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, NamedTuple, Tuple

if find_spec("crossdock") is None:
    # Not installed: the one beside this, for which dev.py has made the native part.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import numpy
except ImportError:
    sys.exit("NumPy is needed: pip install numpy")

NIXL, MOONCAKE = "1.5.1", "0.3.13.post1"
SYSTEMS = {
    "crossdock": "a room pushed: send and receive name the pages",
    "crossdock-pull": "a room pulled: fetch names the pages",
    "memcpy": "one thread, within one process: the same pages into one piece for each layer",
    "nixl": "make_prepped_xfer + transfer, all pages described before",
    "nixl-request": "descriptors made for the request, initialize_xfer + transfer",
    "mooncake": "batch_transfer_sync_write, lists made before",
    "crossdock-mooncake": "the same calls of crossdock.mooncake",
}
TIMEOUT = 120.0
# Set for NIXL's processes: it has a thread of its own there.
PROGRESS_THREAD = "CROSSDOCK_BENCH_PROGRESS_THREAD"


class Shape(NamedTuple):
    tokens: int
    page_tokens: int
    layers: int
    token_bytes: int
    memory: str

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes

    @property
    def moved_pages(self) -> int:
        return -(-self.tokens // self.page_tokens)

    @property
    def pages(self) -> int:
        """Of a pool: some more than move."""
        return self.moved_pages + self.moved_pages // 8

    @property
    def nbytes(self) -> int:
        return self.layers * self.pages * self.page_bytes

    @property
    def moved_bytes(self) -> int:
        return self.layers * self.moved_pages * self.page_bytes

    def numbers(self, order: int) -> Tuple[Any, Any]:
        """Which pages move and where to, in a pass: both processes find the same."""
        random = numpy.random.default_rng(order)
        return random.permutation(self.pages)[: self.moved_pages], random.permutation(self.pages)[: self.moved_pages]

    def offsets(self, pages: Any) -> Any:
        """Of each piece in the pool, layer by layer."""
        layers = numpy.arange(self.layers, dtype=numpy.int64)[:, None] * self.pages
        return ((layers + pages) * self.page_bytes).reshape(-1)


class Pool:
    """`[layers, pages, words]`, all present."""

    def __init__(self, shape: Shape, is_source: bool, buffer: Any = None) -> None:
        self.shape = shape
        if buffer is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            file = -1
            if shape.memory == "shared":
                file, flags = os.memfd_create("pool"), mmap.MAP_SHARED
                os.ftruncate(file, shape.nbytes)
            buffer = mmap.mmap(file, shape.nbytes, flags=flags)
        self.buffer = buffer
        flat = numpy.frombuffer(buffer, numpy.uint64)
        self.address = flat.ctypes.data
        self.words = flat.reshape(shape.layers, shape.pages, -1)
        for layer in range(shape.layers):
            self.words[layer] = self.content(layer, numpy.arange(shape.pages)) if is_source else 0

    def content(self, layer: int, pages: Any) -> Any:
        """No two words of a pool are the same: what an earlier pass left is never right."""
        words = self.words.shape[2]
        first = (layer * self.shape.pages + pages.astype(numpy.uint64)) * numpy.uint64(words)
        return (first[:, None] + numpy.arange(words, dtype=numpy.uint64)) * numpy.uint64(0x9E3779B97F4A7C15)

    def is_right(self, order: int) -> bool:
        sources, targets = self.shape.numbers(order)
        layers = range(self.shape.layers)
        return all(bool((self.words[layer, targets] == self.content(layer, sources)).all()) for layer in layers)


class Side:
    """One of a system's two processes. The one that moves holds the clock; pieces arrive at one of them."""

    pool: Pool
    # Whether pieces arrive here.
    receives = False

    def version(self) -> str:
        return ""

    def offer(self) -> Any:
        """What the other needs to know."""
        return None

    def meet(self, offer: Any) -> None:
        pass

    def ready(self, order: int) -> Dict[str, float]:
        """At the side without the clock, before it starts."""
        return {}

    def progress(self) -> None:
        """There, while something moves: most have threads of their own."""
        time.sleep(0.002)

    def done(self) -> None:
        """There, afterwards."""

    def prepared(self, order: int) -> Any:
        """At the side with the clock, before it starts."""

    def moved(self, prepared: Any) -> Dict[str, float]:
        """The pass itself, in seconds, and the milliseconds of the call that submits it."""
        raise NotImplementedError

    def is_right(self, order: int) -> bool:
        return self.pool.is_right(order)


class Crossdock(Side):
    """Rooms of two nodes."""

    def __init__(self, shape: Shape, is_writer: bool, is_pull: bool) -> None:
        import crossdock

        self.shape, self.is_pull, self.receives = shape, is_pull, not is_writer
        self.layout = crossdock.Layout(
            "deepseek-r1",
            model_layers=shape.layers,
            kind="mla",
            latent_bytes=shape.token_bytes - 128,
            rope_bytes=128,
            dtype="bf16",
            page_tokens=shape.page_tokens,
            pages=shape.pages,
        )
        assert self.layout.region_bytes() == shape.nbytes
        if shape.memory == "shared":
            memory = crossdock.Memory(shape.nbytes)
            self.pool = Pool(shape, is_writer, memory.view)
        else:
            self.pool = Pool(shape, is_writer)
            memory = crossdock.Memory.of(self.pool.buffer)
        name = "prefill" if is_writer else "decode"
        pages = crossdock.Pool(self.layout)
        self.node = crossdock.Node(name, self.layout, memory, pages, authentication="off")
        self.room: Any = None

    def offer(self) -> Any:
        return self.node.address

    def meet(self, offer: Any) -> None:
        if self.receives:
            self.peer = self.node.connect(offer)
            self.peer.wait(TIMEOUT)

    def version(self) -> str:
        import crossdock

        return str(crossdock.__version__)

    def ready(self, order: int) -> Dict[str, float]:
        sources, targets = self.shape.numbers(order)
        begin = time.perf_counter()
        if self.is_pull:
            self.room = self.node.serve(order, self.shape.tokens, sources, deadline=TIMEOUT)
        else:
            self.room = self.node.receive(self.peer, order, self.shape.tokens, targets, deadline=TIMEOUT)
        return {"other_submit_ms": (time.perf_counter() - begin) * 1e3}

    def done(self) -> None:
        self.ended(self.room)

    def prepared(self, order: int) -> Any:
        return order, self.shape.numbers(order)

    def moved(self, prepared: Any) -> Dict[str, float]:
        order, (sources, targets) = prepared
        begin = time.perf_counter()
        if self.is_pull:
            room = self.node.fetch(self.peer, order, self.shape.tokens, targets, deadline=TIMEOUT)
        else:
            room = self.node.send(order, self.shape.tokens, sources, deadline=TIMEOUT)
            room.send(range(self.shape.layers))
            room.finish()
        submitted = time.perf_counter()
        room.wait(TIMEOUT).check()
        end = time.perf_counter()
        self.ended(room)
        return {"seconds": end - begin, "submit_ms": (submitted - begin) * 1e3}

    def ended(self, room: Any) -> None:
        room.wait(TIMEOUT).check()
        if hasattr(room, "wait_pages"):
            room.wait_pages(TIMEOUT)
        room.close()


class Nixl(Side):
    """UCX without progress threads and without CMA, its best on two cores, unless the environment says otherwise."""

    def __init__(self, shape: Shape, is_writer: bool, of_request: bool) -> None:
        self.transports = os.environ.setdefault("UCX_TLS", "posix,sysv,self")
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
        os.environ.setdefault("UCX_LOG_LEVEL", "error")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        from nixl._api import nixl_agent, nixl_agent_config

        self.shape, self.of_request, self.receives = shape, of_request, not is_writer
        self.pool = Pool(shape, is_writer)
        name = "writer" if is_writer else "target"
        self.has_thread = bool(os.environ.get(PROGRESS_THREAD))
        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=self.has_thread, backends=[]))
        # UCX does not choose shared memory where it is to handle errors.
        self.agent.create_backend("UCX", {"ucx_error_handling_mode": "none"})
        self.agent.register_memory([(self.pool.address, shape.nbytes, 0, "")], "DRAM")

    def version(self) -> str:
        return f"{NIXL}, UCX_TLS={self.transports}{', progress threads' if self.has_thread else ''}"

    def offer(self) -> Any:
        return self.agent.get_agent_metadata(), self.pool.address

    def meet(self, offer: Any) -> None:
        description, self.other_address = offer
        self.peer = self.agent.add_remote_agent(description)
        self.lists: Any = None

    def progress(self) -> None:
        self.agent.get_new_notifs()

    def rows(self, address: int, offsets: Any) -> Any:
        """Of descriptors, as NIXL takes arrays of them: address, length, device."""
        rows = numpy.zeros((len(offsets), 3), numpy.uint64)
        rows[:, 0], rows[:, 1] = offsets + address, self.shape.page_bytes
        return rows

    def prepared(self, order: int) -> Any:
        sources, targets = self.shape.numbers(order)
        if self.of_request:
            return self.shape.offsets(sources), self.shape.offsets(targets)
        if self.lists is None:
            every = self.shape.offsets(numpy.arange(self.shape.pages))
            here = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", self.rows(self.pool.address, every), "DRAM")
            self.lists = here, self.agent.prep_xfer_dlist(self.peer, self.rows(self.other_address, every), "DRAM")
        numbers = (self.shape.offsets(pages) // self.shape.page_bytes for pages in (sources, targets))
        return [one.astype(numpy.int32) for one in numbers]

    def moved(self, prepared: Any) -> Dict[str, float]:
        agent, (here, there) = self.agent, prepared
        begin = time.perf_counter()
        if self.of_request:
            local = agent.get_xfer_descs(self.rows(self.pool.address, here), "DRAM")
            remote = agent.get_xfer_descs(self.rows(self.other_address, there), "DRAM")
            request = agent.initialize_xfer("WRITE", local, remote, self.peer)
        else:
            request = agent.make_prepped_xfer("WRITE", self.lists[0], here, self.lists[1], there)
        state = agent.transfer(request)
        submitted = time.perf_counter()
        while state == "PROC":
            state = agent.check_xfer_state(request)
        end = time.perf_counter()
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        agent.release_xfer_handle(request)
        return {"seconds": end - begin, "submit_ms": (submitted - begin) * 1e3}


class Mooncake(Side):
    """The batch call, with as many pieces in one as serve it best."""

    def __init__(self, shape: Shape, is_writer: bool, engine: Any, pieces_a_call: int) -> None:
        self.shape, self.pieces_a_call, self.receives = shape, pieces_a_call, not is_writer
        self.pool = Pool(shape, is_writer)
        self.engine = engine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("the engine did not start")
        if self.engine.register_memory(self.pool.address, shape.nbytes) != 0:
            raise RuntimeError("the memory was not registered")

    def version(self) -> str:
        return MOONCAKE

    def offer(self) -> Any:
        return f"127.0.0.1:{self.engine.get_rpc_port()}", self.pool.address

    def meet(self, offer: Any) -> None:
        self.peer, self.other_address = offer

    def prepared(self, order: int) -> Any:
        sources, targets = self.shape.numbers(order)
        here = (self.shape.offsets(sources) + self.pool.address).tolist()
        there = (self.shape.offsets(targets) + self.other_address).tolist()
        step = self.pieces_a_call or len(here)
        parts = [slice(at, at + step) for at in range(0, len(here), step)]
        return [(here[part], there[part], [self.shape.page_bytes] * len(here[part])) for part in parts]

    def moved(self, prepared: Any) -> Dict[str, float]:
        begin = time.perf_counter()
        for here, there, lengths in prepared:
            if self.engine.batch_transfer_sync_write(self.peer, here, there, lengths) != 0:
                raise RuntimeError("a batch was not written")
        return {"seconds": time.perf_counter() - begin}


class Memcpy(Side):
    """The least that any of them does in one thread: each page copied once, and written where the next one is."""

    def __init__(self, shape: Shape, is_one: bool) -> None:
        self.shape, self.receives = shape, is_one
        if is_one:
            self.pool, self.target = Pool(shape, True), Pool(shape, False)

    def version(self) -> str:
        return f"numpy {numpy.__version__}"

    def prepared(self, order: int) -> Any:
        return self.shape.numbers(order)[0]

    def moved(self, prepared: Any) -> Dict[str, float]:
        source, target, count = self.pool.words, self.target.words, self.shape.moved_pages
        begin = time.perf_counter()
        for layer in range(self.shape.layers):
            numpy.take(source[layer], prepared, axis=0, out=target[layer, :count], mode="clip")
        return {"seconds": time.perf_counter() - begin}

    def is_right(self, order: int) -> bool:
        sources, count = self.shape.numbers(order)[0], self.shape.moved_pages
        layers = range(self.shape.layers)
        return all(bool((self.target.words[at, :count] == self.pool.content(at, sources)).all()) for at in layers)


def side_of(system: str, shape: Shape, is_writer: bool) -> Side:
    if system == "memcpy":
        return Memcpy(shape, is_writer)
    if system.startswith("nixl"):
        return Nixl(shape, is_writer, system == "nixl-request")
    if system == "mooncake":
        os.environ.setdefault("MC_TCP_BIND_ADDRESS", "127.0.0.1")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
        from mooncake.engine import TransferEngine

        return Mooncake(shape, is_writer, TransferEngine, 1024)
    if system == "crossdock-mooncake":
        from crossdock.mooncake import TransferEngine as Ours

        return Mooncake(shape, is_writer, Ours, 0)
    return Crossdock(shape, is_writer, system == "crossdock-pull")
