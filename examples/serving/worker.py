"""What prefill and decode ranks have in common: the layout of their share of the cache, its memory, pool and node."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import List, NamedTuple, Optional, Sequence, Type

import numpy

import crossdock
from model import HEAD, KV_HEADS, LATENT, LAYERS, ROPE, Array
from processes import TIMEOUT

PAGES = 128
FLOAT = numpy.dtype(numpy.float32).itemsize
# The sides need not agree on it.
PAGE_TOKENS = {"prefill": 8, "decode": 4}


class Scene(NamedTuple):
    """How the model is served."""

    attention: str
    """Either "gqa" or "mla"."""
    prefill_tp: int
    decode_tp: int

    def parallelism(self, role: str) -> crossdock.Parallelism:
        tp = self.prefill_tp if role == "prefill" else self.decode_tp
        # Without heads, every rank keeps all of the cache.
        return crossdock.Parallelism(LAYERS, tp=tp, kv_heads=KV_HEADS if self.attention == "gqa" else None)


class Job(NamedTuple):
    """A request, as the router tells it to both sides."""

    room: int
    prompt: List[int]
    new_tokens: int


class Worker:
    """One rank. Everything is closed at the end of a `with` block, the last thing first."""

    def __init__(self, role: str, rank: int, scene: Scene, registry: str, key: bytes) -> None:
        self.role, self.rank, self.scene = role, rank, scene
        self.page_tokens = PAGE_TOKENS[role]
        self.tp = scene.parallelism(role).tp
        if scene.attention == "gqa":
            kept = dict(kind="heads", heads=KV_HEADS, head_bytes=HEAD * FLOAT)
        else:
            kept = dict(kind="mla", latent_bytes=LATENT * FLOAT, rope_bytes=ROPE * FLOAT)
        self.layout = crossdock.Layout.of_rank(
            scene.parallelism(role),
            rank,
            f"example-{scene.attention}",
            model_layers=LAYERS,
            dtype="f32",
            page_tokens=self.page_tokens,
            pages=PAGES,
            **kept,
        )
        self.memory = crossdock.Memory(self.layout.region_bytes())
        self.pool = crossdock.Pool(self.layout, allocates=True)
        self.name = f"{role}-{rank}"
        with ExitStack() as opened:
            for one in (self.layout, self.memory, self.pool):
                opened.enter_context(one)
            self.node = opened.enter_context(crossdock.Node(self.name, self.layout, self.memory, self.pool, key=key))
            self.client = opened.enter_context(crossdock.RegistryClient(registry))
            self._opened = opened.pop_all()
        parts = range(2 if scene.attention == "gqa" else 1)
        self.parts = [[self._pages(layer, part) for part in parts] for layer in range(LAYERS)]

    def _pages(self, layer: int, part: int) -> Array:
        """The pages of a layer as an array, `[pages, tokens, width]`, over the very bytes that peers write."""
        place = self.layout.find(layer, part=part)
        token_bytes = place.page_bytes // self.page_tokens
        return numpy.ndarray(
            (PAGES, self.page_tokens, token_bytes // FLOAT),
            numpy.float32,
            self.memory.view,
            place.offset,
            (place.stride_bytes, token_bytes, FLOAT),
        )

    def register(self) -> None:
        """Tells the registry that this rank is there."""
        told = dict(node=self.name, incarnation=self.node.incarnation, role=self.role, address=self.node.address)
        place = dict(group=self.role, tp_rank=self.rank, tp_size=self.tp)
        member = dict(**place, page_tokens=self.page_tokens, dtype="f32", model=self.scene.attention)
        registration = self.client.register({**told, "ttl_ms": 10000, "member": member})
        self._opened.enter_context(registration).wait(TIMEOUT)

    def connect(self, role: str) -> List[crossdock.Peer]:
        """Dials the other side's ranks, once they are registered. By rank."""
        ranks = self.scene.parallelism(role).tp
        found = self.client.find({"group": role}, count=ranks, timeout=TIMEOUT)
        found.sort(key=lambda worker: worker["member"]["tp_rank"])
        peers = [self._opened.enter_context(self.node.connect(worker["address"])) for worker in found]
        for peer in peers:
            peer.wait(TIMEOUT)
        return peers

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._opened.close()


class PagedCache:
    """One request's keys and values in the pages of a worker: the model's cache."""

    def __init__(self, worker: Worker, pages: Sequence[int]) -> None:
        self.parts, self.page_tokens = worker.parts, worker.page_tokens
        self.pages = numpy.array(pages, numpy.int64)

    def add(self, pages: Sequence[int]) -> None:
        self.pages = numpy.append(self.pages, pages)

    def write(self, layer: int, first: int, parts: Sequence[Array]) -> None:
        for pages, rows in zip(self.parts[layer], parts):
            tokens = numpy.arange(first, first + len(rows))
            pages[self.pages[tokens // self.page_tokens], tokens % self.page_tokens] = rows

    def read(self, layer: int, tokens: int) -> List[Array]:
        return [pages[self.pages].reshape(-1, pages.shape[2])[:tokens] for pages in self.parts[layer]]
