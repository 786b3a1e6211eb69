"""Where a rank's blocks lie, as a layout.

A strip is a run of equal pieces, one for each block: of a layer, or of what a layer keeps of keys, of values, or of one
head. The layout has one layer for each strip, whose page is the piece of a block; a page holds one token, since blocks
are moved whole, and nothing has to be known of their inside. Ranks that share the heads keep the strips of theirs, as
pipeline stages keep layers.
"""

from __future__ import annotations

import hashlib
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Set, Tuple

from ..errors import LayoutError, Unsupported
from ..layout import Layout, LayerBuffer, Parallelism
from ..memory import Memory
from ._settings import Settings


class Strip(NamedTuple):
    """In bytes."""

    address: int
    stride: int
    nbytes: int


class Cache(NamedTuple):
    layout: Layout
    memory: List[Memory]
    strips: int
    """How many this rank has."""
    form: str
    """What has to be the same on both sides, in words."""


def cache_of(kv_caches: Mapping[str, Any], settings: Settings, rank: int) -> Cache:
    """`kv_caches` are the tensors of the layers, on the host. Raises `Unsupported` or `LayoutError`."""
    if not kv_caches:
        raise LayoutError("no KV caches at all", "", 11)
    storages: Dict[int, Tuple[int, Any]] = {}
    rows = []
    seen: Set[int] = set()
    for name, tensor in kv_caches.items():
        if tensor.device.type != "cpu":
            advice = "run vLLM on the CPU as long as there is no CUDA port"
            raise Unsupported(f"the KV cache of {name!r} is on {tensor.device}", advice, 9)
        if tensor.data_ptr() in seen:
            # A layer that uses the cache of another one.
            continue
        seen.add(tensor.data_ptr())
        # PyTorch before 2.0 has the other name.
        storage = getattr(tensor, "untyped_storage", tensor.storage)()
        storages[storage.data_ptr()] = (storage.nbytes(), storage)
        rows.append(_strips_of(name, tensor, settings))
    # Of ranks that share the heads: head after head, so that each rank's are together.
    strips = [row[head] for head in range(len(rows[0])) for row in rows] if settings.splits_heads else sum(rows, [])
    sizes = {strip.nbytes for strip in strips}
    if len(sizes) != 1:
        advice = "models whose layers are alike are moved"
        raise Unsupported(f"blocks of {', '.join(map(str, sorted(sizes)))} bytes", advice, 9)
    places = sorted(storages)
    buffers = [_buffer(strip, places) for strip in strips]
    total = len(strips) if settings.is_mla else len(strips) * settings.tp
    mine = 0 if settings.is_mla else rank * len(strips)
    form = _form(kv_caches, settings, total, strips[0].nbytes)
    layout = Layout(
        _fingerprint(form, kv_caches, settings),
        model_layers=total,
        layers=range(mine, mine + len(strips)),
        kind="mla",
        # Whatever it is: bytes.
        dtype="int8",
        latent_bytes=strips[0].nbytes,
        page_tokens=1,
        pages=settings.blocks,
        buffers=buffers,
        rank=rank,
    )
    memory = [Memory.at(place, *storages[place]) for place in places]
    return Cache(layout, memory, len(strips), form)


def parallelism_of(settings: Settings, strips: int, tp: int) -> Parallelism:
    """How a side with so many ranks spreads the model, where a rank here has so many strips. Raises `LayoutError` if it
    cannot be."""
    if settings.is_mla:
        return Parallelism(model_layers=strips, tp=tp)
    total = strips * settings.tp
    if tp != settings.tp and (not settings.splits_heads or settings.kv_heads % tp):
        raise LayoutError(f"{tp} ranks there and {settings.tp} here", 'set "heterogeneous_tp": true on both sides', 11)
    return Parallelism(model_layers=total, stage_layers=[total // tp] * tp)


def _strips_of(name: str, tensor: Any, settings: Settings) -> List[Strip]:
    shape = tuple(tensor.shape)
    if shape and shape[0] % settings.blocks == 0 and shape[0] > 0:
        return _strips_of_blocks(name, tensor, settings)
    if len(shape) > 1 and shape[0] == 2 and shape[1] % settings.blocks == 0:
        # Keys and values apart.
        return [strip for half in (tensor[0], tensor[1]) for strip in _strips_of_blocks(name, half, settings)]
    raise Unsupported(f"the KV cache of {name!r} has the shape {shape}, and {settings.blocks} blocks", "", 9)


def _strips_of_blocks(name: str, tensor: Any, settings: Settings) -> List[Strip]:
    """Of a tensor whose first dimension are blocks, or equal parts of them."""
    parts = tensor.shape[0] // settings.blocks
    if settings.splits_heads:
        heads = settings.kv_heads // settings.tp
        if tensor.dim() != 4 or tensor.shape[1] != heads or parts != 1:
            raise Unsupported(
                f"the KV cache of {name!r} has the shape {tuple(tensor.shape)}",
                f"heterogeneous_tp needs (blocks, {heads} heads, tokens, bytes), and blocks that kernels take whole",
                9,
            )
    elif _is_dense(tensor[0]):
        return [_strip(name, tensor, parts)]
    elif tensor.dim() < 3:
        raise Unsupported(f"the blocks of {name!r} are not in one piece", "", 9)
    # A head's share of a block is in one piece where the whole block is not.
    for head in range(tensor.shape[1]):
        if not _is_dense(tensor[0, head]):
            advice = "set VLLM_KV_CACHE_LAYOUT=LBHNC"
            raise Unsupported(f"the heads of {name!r} are mixed within a block", advice, 9)
    return [_strip(name, tensor[:, head], parts) for head in range(tensor.shape[1])]


def _strip(name: str, tensor: Any, parts: int) -> Strip:
    item = tensor.element_size()
    nbytes, stride = tensor[0].numel() * item, tensor.stride(0) * item
    if parts > 1 and stride != nbytes:
        raise Unsupported(f"the blocks of {name!r} have {parts} parts that are not side by side", "", 9)
    return Strip(tensor.data_ptr(), stride * parts, nbytes * parts)


def _is_dense(tensor: Any) -> bool:
    """Whether its items fill one piece of memory, in whatever order."""
    expected = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape)):
        if extent == 1:
            continue
        if stride != expected:
            return False
        expected *= extent
    return True


def _buffer(strip: Strip, places: Sequence[int]) -> LayerBuffer:
    region = max(at for at, place in enumerate(places) if place <= strip.address)
    return LayerBuffer(region, strip.address - places[region], strip.stride)


def _form(kv_caches: Mapping[str, Any], settings: Settings, pieces: int, nbytes: int) -> str:
    tensor = next(iter(kv_caches.values()))
    told = f"{len(kv_caches)} tensors of {tensor.dtype}, each block in {pieces} pieces of {nbytes} bytes"
    if settings.splits_heads:
        return told
    # The order of what is in a block.
    order = sorted(range(1, tensor.dim()), key=lambda dim: (-tensor.stride(dim), dim))
    return f"{told}, its dimensions in the order {', '.join(map(str, order))}"


def _fingerprint(form: str, kv_caches: Mapping[str, Any], settings: Settings) -> str:
    """Peers compare it: both sides have the same model, in the same form."""
    facts = (1, *settings.form(form).items(), list(kv_caches))
    return "vllm-" + hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
