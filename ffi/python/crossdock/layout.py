"""What is kept of each token, and where each layer's pages lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

from ._abi import check, check_closed, ffi, forked, lib, made, process, text_bytes, text_or_null
from .kinds import Dtype, Extent, HeadOrder, Kind, Parts, Placement, chosen


class LayerBuffer(NamedTuple):
    """Where the pages of one layer are."""

    region: int
    """The number of the memory among those of the node."""
    offset: int
    """Where page 0 begins, from the start of the region."""
    stride_bytes: int
    """From the start of one page to the start of the next."""


class Place(NamedTuple):
    """Where the pages of one layer are, and how long one is."""

    region: int
    offset: int
    stride_bytes: int
    page_bytes: int


class SourceRank(NamedTuple):
    """A rank that brings something."""

    rank: int
    parts: Parts


@dataclass
class Part:
    """Something that is kept in the pages of a pool."""

    name: str
    """Compared with the peer's."""
    layers: Sequence[int]
    """The layers that keep it, in ascending order, numbered as in the model."""
    buffers: Sequence[LayerBuffer]
    """Where the pages of each of them are."""
    head_bytes: int
    """Bytes of one token, or one entry, for one head."""
    heads: int = 1
    """How many heads there are; 1 for what is not split."""
    first_head: int = 0
    """The first one here."""
    local_heads: int = 0
    """How many are here; 0 for all from the first one on."""
    head_order: Union[HeadOrder, str] = HeadOrder.TOKENS_FIRST

    def _as_c(self) -> Tuple[Any, object]:
        if len(self.layers) != len(self.buffers):
            raise ValueError(f"part {self.name!r} has {len(self.layers)} layers and {len(self.buffers)} buffers")
        options = made("crossdock_part_options")
        name = ffi.new("char[]", text_bytes(self.name))
        layers = ffi.new("uint32_t[]", list(self.layers))
        buffers = _buffers(self.buffers)
        options.name, options.layers, options.buffers = name, layers, buffers
        options.layer_count = len(self.layers)
        options.heads, options.first_head, options.local_heads = self.heads, self.first_head, self.local_heads
        options.head_bytes = self.head_bytes
        options.head_order = chosen(HeadOrder, "head_order", self.head_order)
        return options, (name, layers, buffers)


@dataclass
class Parallelism:
    """How one side spreads a model over its ranks."""

    model_layers: int
    tp: int = 1
    """Tensor-parallel ranks."""
    kv_heads: Optional[int] = None
    """How many KV heads the model has; `None` for one whose cache every TP rank keeps whole (MLA)."""
    context: int = 1
    """Context-parallel ranks."""
    interleave: int = 1
    """How many tokens follow each other on one of them."""
    stage_layers: Sequence[int] = ()
    """Pipeline stages: how many layers each has; empty for one stage with all layers."""

    def sources(self, decode: Parallelism, rank: int, *, spread_by: int = 0) -> List[SourceRank]:
        """Which ranks of this prefill side bring what `rank` of the decode side keeps. Where several could, `spread_by`,
        as the room's number, chooses."""
        found, count = self._asked(lib.crossdock_sources, "crossdock_source_rank[]", decode, rank, spread_by)
        return [SourceRank(found[at].rank, Parts(found[at].parts)) for at in range(count)]

    def destinations(self, decode: Parallelism, rank: int, *, spread_by: int = 0) -> List[int]:
        """Which ranks of the decode side need `rank` of this prefill side."""
        found, count = self._asked(lib.crossdock_destinations, "uint32_t[]", decode, rank, spread_by)
        return list(found[0:count])

    def _asked(self, call: Any, kind: str, decode: Parallelism, rank: int, spread_by: int) -> Tuple[Any, int]:
        (here, _keep), (there, _keep_too) = self._as_c(), decode._as_c()
        count = ffi.new("size_t *")
        capacity = 64
        while True:
            found = ffi.new(kind, capacity)
            status = call(here, there, rank, spread_by, found, capacity, count)
            if count[0] <= capacity:
                check(status)
                return found, count[0]
            capacity = count[0]

    def _as_c(self) -> Tuple[Any, object]:
        options = made("crossdock_parallelism")
        options.tp, options.context, options.interleave = self.tp, self.context, self.interleave
        options.kv_heads, options.model_layers = self.kv_heads or 0, self.model_layers
        stages = ffi.new("uint32_t[]", list(self.stage_layers))
        options.stage_layers, options.stages = stages, len(stages)
        return options, stages


class Layout:
    """Describes one worker's KV cache.

    With `parallelism`, the other options describe the whole model's cache on one worker, of which the layers, heads and
    tokens that `rank` keeps are taken.
    """

    __slots__ = ("_handle", "_pid", "_is_closed", "__weakref__")

    def __init__(
        self,
        model: str,
        *,
        model_layers: int,
        kind: Union[Kind, str],
        dtype: Union[Dtype, str],
        page_tokens: int,
        pages: int,
        layers: Optional[range] = None,
        latent_bytes: int = 0,
        rope_bytes: int = 0,
        heads: int = 0,
        first_head: int = 0,
        local_heads: int = 0,
        head_bytes: int = 0,
        head_order: Union[HeadOrder, str] = HeadOrder.TOKENS_FIRST,
        placement: Union[Placement, str, None] = None,
        region: int = 0,
        buffers: Sequence[LayerBuffer] = (),
        rank: int = 0,
        context_rank: int = 0,
        context_ranks: int = 1,
        context_interleave: int = 1,
        parallelism: Optional[Parallelism] = None,
    ) -> None:
        """`layers` are those of this worker, numbered as in the model; all if left out. MLA has `latent_bytes` and
        `rope_bytes`, those of a token in a layer; heads have `heads`, `head_bytes` (one token's key, and its value, for
        one head) and, where not all are here, `first_head` and `local_heads`. With `buffers`, each layer's pages are where
        these say: first the latents or keys of all layers, then, of a cache with heads, the values."""
        self._is_closed = True
        usual = Placement.BUFFERS if buffers else Placement.LAYER_MAJOR
        options = made("crossdock_layout_options")
        options.model = name = ffi.new("char[]", text_bytes(model))
        options.model_layers = model_layers
        options.kind = chosen(Kind, "kind", kind)
        options.dtype = chosen(Dtype, "dtype", dtype)
        options.page_tokens, options.pages = page_tokens, pages
        if layers is not None:
            options.first_layer, options.layers = run_of("layers", layers)
        options.latent_bytes, options.rope_bytes = latent_bytes, rope_bytes
        options.heads, options.first_head, options.local_heads = heads, first_head, local_heads
        options.head_bytes = head_bytes
        options.head_order = chosen(HeadOrder, "head_order", head_order)
        options.placement = chosen(Placement, "placement", usual if placement is None else placement)
        options.region = region
        options.buffers = places = _buffers(buffers)
        options.buffer_count = len(buffers)
        options.rank = rank
        options.context_rank, options.context_ranks = context_rank, context_ranks
        options.context_interleave = context_interleave
        handle = ffi.new("crossdock_layout *")
        if parallelism is None:
            check(lib.crossdock_layout_create(options, handle))
        else:
            spread, _stages = parallelism._as_c()
            check(lib.crossdock_layout_of_rank(options, spread, rank, handle))
        del name, places
        self._handle: int = handle[0]
        self._pid = process.pid
        self._is_closed = False

    @classmethod
    def of_rank(cls, parallelism: Parallelism, rank: int, model: str, **options: Any) -> Layout:
        """The share of a rank: the options describe the whole model's cache on one worker."""
        return cls(model, parallelism=parallelism, rank=rank, **options)

    def add_part(self, part: Part) -> None:
        """Keeps something more in the pages of the tokens, as the keys of an indexer beside a latent."""
        self._here()
        options, _keep = part._as_c()
        check(lib.crossdock_layout_add_part(self._handle, options))

    def add_pool(
        self,
        name: str,
        *,
        extent: Union[Extent, str],
        pages: int,
        parts: Sequence[Part],
        page_tokens: int = 1,
        window: int = 0,
    ) -> None:
        """Keeps something more in pages of its own: a window of the last tokens, or a state. A room has page numbers for
        each pool, in the order in which they were added, after those of the tokens."""
        self._here()
        options = made("crossdock_cache_pool_options")
        options.name = label = text_or_null(name)
        options.extent = chosen(Extent, "extent", extent)
        options.window, options.page_tokens, options.pages = window, page_tokens, pages
        made_parts = [part._as_c() for part in parts]
        pointers = ffi.new("crossdock_part_options *[]", [part for part, _ in made_parts])
        options.parts, options.part_count = pointers, len(made_parts)
        check(lib.crossdock_layout_add_pool(self._handle, options))
        del label

    def pages_for(self, tokens: int) -> int:
        """How many pages hold what is kept here of a request of so many tokens."""
        self._here()
        pages = ffi.new("uint32_t *")
        check(lib.crossdock_layout_pages_for(self._handle, tokens, pages))
        return int(pages[0])

    def region_bytes(self, region: int = 0) -> int:
        """How many bytes a region needs to hold what the layout places in it; 0 if nothing."""
        self._here()
        found = ffi.new("uint64_t *")
        check(lib.crossdock_layout_region_bytes(self._handle, region, found))
        return int(found[0])

    def find(self, layer: int, *, part: int = 0, pool: int = 0) -> Place:
        """Where the pages of a layer are: of which part (0 is the latent or the keys, 1 the values, then those that were
        added) of which pool."""
        self._here()
        buffer, page_bytes = ffi.new("crossdock_layer_buffer *"), ffi.new("uint64_t *")
        check(lib.crossdock_layout_find(self._handle, pool, part, layer, buffer, page_bytes))
        return Place(buffer.region, buffer.offset, buffer.stride_bytes, page_bytes[0])

    def _info(self) -> Any:
        self._here()
        info = made("crossdock_layout_info")
        check(lib.crossdock_layout_describe(self._handle, info))
        return info

    @property
    def layers(self) -> range:
        """The layers that are here."""
        info = self._info()
        return range(info.first_layer, info.first_layer + info.layers)

    @property
    def page_tokens(self) -> int:
        """How many tokens a page holds."""
        return int(self._info().page_tokens)

    @property
    def pages(self) -> int:
        """How many pages each layer has."""
        return int(self._info().pages)

    @property
    def pools(self) -> int:
        """How many pools of pages there are; the first one holds the tokens."""
        return int(self._info().pools)

    @property
    def regions(self) -> int:
        """How many memories a node needs."""
        return int(self._info().regions)

    @property
    def token_bytes(self) -> int:
        """What one token takes in one layer, in the pages of the tokens."""
        return int(self._info().token_bytes)

    @property
    def page_bytes(self) -> int:
        """What one page takes in one layer."""
        return int(self._info().page_bytes)

    @property
    def rank(self) -> int:
        """The worker's number among those of its side that serve a request together."""
        return int(self._info().rank)

    def _here(self) -> None:
        if self._pid != process.pid:
            raise forked(self)

    def close(self) -> None:
        """Lets the layout go. Nodes that were opened with it keep their own."""
        if not self._is_closed:
            self._here()
            self._is_closed = True
            check_closed(lib.crossdock_layout_close(self._handle))

    def __enter__(self) -> Layout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._is_closed and self._pid == process.pid:
            lib.crossdock_layout_close(self._handle)


def run_of(name: str, numbers: range) -> Tuple[int, int]:
    """The first of the numbers, and how many they are."""
    if numbers.step != 1 or not numbers:
        raise ValueError(f"{name} are {numbers}: give numbers that follow each other, and one at least")
    return numbers.start, len(numbers)


def _buffers(buffers: Sequence[LayerBuffer]) -> Any:
    made_buffers = ffi.new("crossdock_layer_buffer[]", len(buffers))
    for at, (region, offset, stride_bytes) in enumerate(buffers):
        made_buffers[at] = (region, 0, offset, stride_bytes)
    return made_buffers
