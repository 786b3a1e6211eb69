"""SGLang's description of a rank's cache, `KVArgs`, as crossdock's layout, memories and pools."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

from .._abi import ffi
from .._host import require_host_memory
from ..errors import Unsupported
from ..kinds import Dtype
from ..layout import LayerBuffer, Layout, Parallelism, Part
from ..memory import Memory
from ..pool import Pool

# A rank of one pipeline stage does not know how many layers the others have.
MODEL_LAYERS = 1024
# Tensor-parallel ranks, and stages, that another engine may tell of.
_MOST_RANKS = 4096

# Of a control message, on both sides: it takes a list of the pages of a request, 4 bytes each, or its metadata.
MAX_FRAME_BYTES = 16 << 20
# Which leaves this for what else is in it.
_LONGEST_LIST_BYTES = MAX_FRAME_BYTES - 1024

# Components of a request's state whose rows, or pages, correspond one to one in their order.
STATES = frozenset(
    [
        "block_scale",
        "block_scale_swa",
        "c128_state",
        "dsa",
        "mamba",
        "minimax_dense_kv",
        "minimax_index_k",
        "qsa_compressed",
        "qsa_pending",
        "request_row",
        "swa",
        "swa_ring",
    ]
)

_DTYPES = {
    "bf16": Dtype.BF16,
    "bfloat16": Dtype.BF16,
    "float16": Dtype.F16,
    "fp16": Dtype.F16,
    "half": Dtype.F16,
    "float32": Dtype.F32,
    "fp8_e4m3": Dtype.FP8_E4M3,
    "float8_e4m3fn": Dtype.FP8_E4M3,
    "fp8_e5m2": Dtype.FP8_E5M2,
    "float8_e5m2": Dtype.FP8_E5M2,
}


@dataclass(frozen=True)
class Rank:
    """Where a rank is among those of its engine that serve a request together, and how they spread it."""

    tp: int
    tp_rank: int
    pp: int = 1
    pp_rank: int = 0

    @property
    def number(self) -> int:
        """As the layout counts them."""
        return self.pp_rank * self.tp + self.tp_rank


@dataclass(frozen=True)
class Geometry:
    """What a rank keeps of the model, as its peers are told."""

    dtype: str
    page_tokens: int
    first_layer: int
    layers: int
    page_bytes: int
    """Of a layer's page, in the pages of the latents, or of the keys."""
    heads: int
    """KV heads of the model; 0 for MLA, 1 for a cache of heads whose number this side does not know."""
    local_heads: int
    order: str
    """Within a page of keys or values: "nhd" is token after token, each with its heads."""
    draft: List[int]
    """Bytes of a page in each buffer of a draft model's, which shares the page numbers."""
    states: List[List[Any]]
    """For each component of the state, its type and the bytes of each tensor's row."""
    swa_order: Optional[str]
    """As `order`, of the pages of a sliding window, if its heads are those of the cache; or `None`."""

    @property
    def token_head_bytes(self) -> int:
        """Of one token in one layer: for one head, or the latent."""
        return self.page_bytes // (self.page_tokens * max(1, self.local_heads))

    def told(self) -> Dict[str, Any]:
        return asdict(self)

    def is_split(self, nth: int) -> bool:
        """Whether a component of the state is split by heads. Others are kept whole, or their ranks are split alike."""
        return nth < len(self.states) and self.states[nth][0] == "swa" and self.swa_order is not None

    def spread(self, heads: int, tp: int) -> List[List[Any]]:
        """The state as a rank of so many has it of a model with so many KV heads: of what is split, the bytes for one
        head."""
        local = max(1, heads // tp)
        return [
            [kind, [item / local for item in lens] if self.is_split(nth) else lens]
            for nth, (kind, lens) in enumerate(self.states)
        ]


class Cache:
    """The buffers of a rank."""

    def __init__(self, args: Any, rank: Rank, is_mla: bool, order: str = "nhd") -> None:
        """Raises `Unsupported`, by name, for a cache of a form that cannot be described."""
        self.args = args
        self.rank = rank
        self.is_mla = is_mla
        self._check()
        item = args.kv_item_lens[0]
        self.pages = args.kv_data_lens[0] // item
        self._target = len(args.kv_data_ptrs) - int(getattr(args, "num_draft_entries", 0) or 0)
        self.geometry = Geometry(
            dtype=str(args.kv_cache_dtype_str),
            page_tokens=args.page_size,
            first_layer=int(getattr(args, "prefill_start_layer", 0) or 0) if rank.pp > 1 else 0,
            layers=self._target if is_mla else self._target // 2,
            page_bytes=item,
            heads=0 if is_mla else int(getattr(args, "total_kv_head_num", 0) or 1),
            local_heads=0 if is_mla else int(getattr(args, "kv_head_num", 0) or 0),
            order="nhd" if is_mla else order,
            draft=list(args.kv_item_lens[self._target :]),
            states=[
                [_name(kind), list(lens)]
                for kind, lens in zip(getattr(args, "state_types", []), getattr(args, "state_item_lens", []))
            ],
            swa_order=None if is_mla else getattr(args, "swa_kv_cache_layout", None),
        )
        self._regions: List[Tuple[int, int]] = []
        for address, nbytes in self._ranges():
            if (address, nbytes) not in self._regions:
                self._regions.append((address, nbytes))
        # Now, and not when the first peer comes: what is no host memory is refused while the engine starts.
        for address, nbytes in self._regions:
            _require_host_memory(address, nbytes)
        self.memories = [Memory.at(address, nbytes) for address, nbytes in self._regions]
        self._aux = list(zip(args.aux_data_ptrs, args.aux_item_lens, args.aux_data_lens))
        self.aux_bytes = sum(args.aux_item_lens)
        self._require_frames()

    def _check(self) -> None:
        args = self.args
        items, lens, pointers = args.kv_item_lens, args.kv_data_lens, args.kv_data_ptrs
        draft = int(getattr(args, "num_draft_entries", 0) or 0)
        if not len(pointers) == len(lens) == len(items) or not 0 <= draft < len(pointers):
            raise _refused(
                f"{len(pointers)} buffers ({draft} of a draft model), {len(lens)} lengths, {len(items)} page lengths"
            )
        for what in ("is_hybrid_mla_backend", "mla_compression_ratios", "host_kv_data_ptrs"):
            if getattr(args, what, None):
                raise _refused(f"KVArgs.{what}", "no such cache is supported")
        target = items[: len(items) - draft]
        if len({*target}) != 1:
            raise _refused(f"buffers with pages of {sorted({*target})} bytes", "they are alike: no V unlike K")
        for item, nbytes in zip(items, lens):
            if item <= 0 or item % args.page_size or nbytes != item * (lens[0] // items[0]) or not nbytes:
                raise _refused(
                    f"pages of {item} bytes for {args.page_size} tokens in {nbytes} bytes",
                    f"each buffer has the pages of the first one, which has {lens[0]} bytes",
                )
        if not self.is_mla and len(target) % 2:
            raise _refused(f"{len(target)} buffers of keys and values", "there is a value buffer for each of keys")
        if draft and self.rank.pp > 1:
            raise _refused(f"a draft model's cache ({draft} buffers) with pipeline parallelism")
        for kind in getattr(args, "state_types", []):
            if _name(kind) not in STATES:
                raise _refused(f"state of type {_name(kind)!r}", f"supported are {', '.join(sorted(STATES))}")

    def _require_frames(self) -> None:
        """What one request may have fits into a message: no more than everything that is here."""
        numbers = self.pages
        states = zip(getattr(self.args, "state_data_lens", []), getattr(self.args, "state_item_lens", []))
        for nth, (lens, items) in enumerate(states):
            rows = [nbytes // item for nbytes, item in zip(lens, items) if nbytes and item > 0]
            numbers += min(rows, default=0) * self._entries(nth)
        most = _LONGEST_LIST_BYTES // 4
        if numbers > most:
            raise _refused(f"a cache of {numbers} pages and rows", f"at most {most}: use larger pages (--page-size)")
        if self.aux_bytes > _LONGEST_LIST_BYTES:
            raise _refused(f"{self.aux_bytes} bytes of metadata a request", f"at most {_LONGEST_LIST_BYTES}")

    def _ranges(self) -> List[Tuple[int, int]]:
        args = self.args
        found = list(zip(args.kv_data_ptrs, args.kv_data_lens))
        for pointers, lens in zip(getattr(args, "state_data_ptrs", []), getattr(args, "state_data_lens", [])):
            found += [one for one in zip(pointers, lens) if one[1]]
        return found

    def layout(self, heads: int, head_bytes: int, peer_first_layer: int = 0) -> Tuple[Layout, List[Pool]]:
        """The layout, of a model with so many KV heads of so many bytes (0 and those of the latent for MLA), and a pool
        for each of its pools."""
        args, geometry = self.args, self.geometry
        first = geometry.first_layer or peer_first_layer
        layers = range(first, first + geometry.layers)
        item = geometry.page_bytes
        buffers = [
            LayerBuffer(self._regions.index((address, nbytes)), 0, item)
            for address, nbytes in zip(args.kv_data_ptrs[: self._target], args.kv_data_lens)
        ]
        usual: Dict[str, Any] = dict(
            model_layers=MODEL_LAYERS,
            dtype=_DTYPES.get(geometry.dtype, Dtype.INT8),
            page_tokens=geometry.page_tokens,
            pages=self.pages,
            layers=layers,
            buffers=buffers,
            rank=self.rank.number,
        )
        name = f"sglang, {geometry.dtype}"
        if self.is_mla:
            layout = Layout(name, kind="mla", latent_bytes=head_bytes, **usual)
        else:
            share = self._share(heads)
            if share["local_heads"] * head_bytes * geometry.page_tokens != item:
                raise _refused(
                    f"pages of {item} bytes, of {geometry.page_tokens} tokens with heads of {head_bytes} bytes",
                    f"rank {self.rank.tp_rank} of {self.rank.tp} keeps {share['local_heads']} of {heads} heads",
                )
            layout = Layout(
                name,
                kind="heads",
                head_bytes=head_bytes,
                # Others put head after head, too, whatever they do within one.
                head_order="tokens_first" if geometry.order == "nhd" else "heads_first",
                **share,
                **usual,
            )
        begin = self._target
        draft = zip(args.kv_data_ptrs[begin:], args.kv_data_lens[begin:], args.kv_item_lens[begin:])
        for part in self._parts("draft", draft, first, geometry.page_tokens, {}):
            layout.add_part(part)
        pools = [Pool(self.pages)]
        for nth, (kind, _) in enumerate(geometry.states):
            entries, parts = self._state(nth, first, self._share(heads) if geometry.is_split(nth) else {})
            layout.add_pool(f"{nth}.{kind}", extent="entries", pages=entries, parts=parts)
            pools.append(Pool(entries))
        return layout, pools

    def _state(self, nth: int, first_layer: int, share: Dict[str, Any]) -> Tuple[int, List[Part]]:
        """How many entries each tensor of a component has, and what they are."""
        args, kind = self.args, self.geometry.states[nth][0]
        pieces = share.get("local_heads", 1)
        tensors = [
            (address, nbytes, item // self._entries(nth))
            for address, nbytes, item in zip(
                args.state_data_ptrs[nth], args.state_data_lens[nth], args.state_item_lens[nth]
            )
            # Others are of layers that share another's.
            if nbytes
        ]
        lengths = sorted({entry for _, _, entry in tensors})
        if not lengths or any(entry <= 0 or entry % pieces for entry in lengths):
            raise _refused(f"state of type {kind!r} with entries of {lengths} bytes for {pieces} heads")
        parts = self._parts(f"{nth}.{kind}", tensors, first_layer, pieces, share)
        return min(nbytes // entry for _, nbytes, entry in tensors), parts

    def _share(self, heads: int) -> Dict[str, Any]:
        """Which of the model's heads are here."""
        tp = self.rank.tp
        return dict(heads=heads, first_head=self.rank.tp_rank * heads // tp, local_heads=max(1, heads // tp))

    def _entries(self, nth: int) -> int:
        """How many entries a row of a component has: pages in which heads follow each other within each token are cut
        into their tokens."""
        is_cut = self.geometry.is_split(nth) and self.geometry.swa_order == "nhd"
        return self.geometry.page_tokens if is_cut else 1

    def entries(self, nth: int, rows: Any) -> Any:
        """The entries of rows of a component, as an array of numbers. SGLang gives an array, a list of arrays, or
        nothing."""
        numpy: Any = importlib.import_module("numpy")
        count, numbers = self._entries(nth), numpy.asarray(() if rows is None else rows, "int32").reshape(-1)
        if count == 1:
            return numbers
        return (numbers[:, None] * count + numpy.arange(count, dtype="int32")).reshape(-1)

    def _parts(
        self,
        name: str,
        tensors: Iterable[Tuple[int, int, int]],
        first_layer: int,
        pieces: int,
        share: Dict[str, Any],
    ) -> List[Part]:
        """Tensors that follow each other and have entries of the same length, in so many pieces, are one part."""
        parts: List[Part] = []
        for address, nbytes, entry in tensors:
            place = LayerBuffer(self._regions.index((address, nbytes)), 0, entry)
            piece = entry // pieces
            if not parts or parts[-1].head_bytes != piece or len(parts[-1].layers) == self.geometry.layers:
                parts.append(Part(f"{name}.{len(parts)}", [], [], piece, **share))
            last = parts[-1]
            layers = [*last.layers, first_layer + len(last.layers)]
            parts[-1] = replace(last, layers=layers, buffers=[*last.buffers, place])
        return parts

    def aux(self, index: int) -> bytes:
        """A row of the metadata buffers."""
        return b"".join(bytes(ffi.buffer(ffi.cast("char *", self._row(at, index)), at[1])) for at in self._aux)

    def put_aux(self, index: int, row: bytes) -> None:
        begin = 0
        for at in self._aux:
            ffi.memmove(ffi.cast("char *", self._row(at, index)), row[begin : begin + at[1]], at[1])
            begin += at[1]

    def _row(self, at: Tuple[int, int, int], index: int) -> int:
        pointer, item, nbytes = at
        if not 0 <= index or (index + 1) * item > nbytes:
            raise ValueError(f"metadata row {index}: there are {nbytes // item}")
        return pointer + index * item

    def close(self) -> None:
        for memory in self.memories:
            memory.close()


def sources_of(
    prefill: Sequence[Rank], stages: Sequence[int], heads: int, decode: Rank, room: int
) -> List[Tuple[int, Any]]:
    """Which of the prefill ranks that SGLang pairs with a decode rank bring what it keeps, as numbers of their layouts,
    and which parts. `stages` are the layers of the prefill side's stages, or of the one that is met. Where several
    bring the same, the room's number chooses."""
    tp = prefill[0].tp
    has_stages = len(stages) > 1
    there = Parallelism(sum(stages), tp=tp, kv_heads=heads or None, stage_layers=stages if has_stages else ())
    here = Parallelism(sum(stages), tp=decode.tp, kv_heads=heads or None)
    paired = sorted({one.tp_rank for one in prefill})
    # Alike are those with the same heads, which follow each other; the library chooses by their number among these.
    alike = tp if not heads else max(1, tp // heads)
    wanted = paired[room % len(paired)]
    found = there.sources(here, decode.tp_rank, spread_by=(wanted - decode.tp_rank) % alike)
    # A decode stage meets the same stage of the other side.
    offset = 0 if has_stages else prefill[0].pp_rank * tp
    return [(source.rank + offset, source.parts) for source in found]


def _name(state_type: Any) -> str:
    return str(getattr(state_type, "value", state_type))


def _refused(what: str, why: str = "") -> Unsupported:
    return Unsupported(f"crossdock.sglang does not take {what}", why or "see docs/sglang.md", 9)


def _require_host_memory(address: int, nbytes: int) -> None:
    try:
        require_host_memory(address, nbytes)
    except OSError as error:
        raise Unsupported(
            f"KV buffers in GPU memory: {error.strerror or error}",
            "there is no CUDA port yet: run SGLang with --device cpu",
            9,
        ) from None


def rank_of(told: Any) -> Rank:
    """Raises `ValueError` for what no rank tells of itself."""
    rank = Rank(**_checked(Rank, told))
    if not (rank.tp_rank < rank.tp <= _MOST_RANKS and rank.pp_rank < rank.pp <= _MOST_RANKS):
        raise ValueError(f"a prefill rank tells what makes no sense: {rank}")
    return rank


def geometry_of(told: Any) -> Geometry:
    """Raises `ValueError` for what no rank tells of its cache."""
    geometry = Geometry(**_checked(Geometry, told))
    if not (geometry.page_tokens and geometry.page_bytes and 0 < geometry.layers <= MODEL_LAYERS):
        raise ValueError(
            f"a prefill rank tells what makes no sense: {geometry.layers} layers, with pages of {geometry.page_tokens} "
            f"tokens in {geometry.page_bytes} bytes"
        )
    return geometry


def _checked(kind: Any, told: Any) -> Dict[str, Any]:
    """What another program tells, if it has the fields and their types."""
    types = {field.name: str(field.type) for field in fields(kind)}
    if not isinstance(told, dict) or told.keys() != types.keys():
        raise ValueError(
            f"a prefill rank tells what makes no sense: {kind.__name__} with other fields than {', '.join(types)}"
        )
    for name, form in types.items():
        if not _FORMS[form](told[name]):
            raise ValueError(
                f"a prefill rank tells what makes no sense: {kind.__name__} with {name} {repr(told[name])[:80]}"
            )
    return told


def _is_number(told: Any) -> bool:
    # A bool is an int.
    return type(told) is int and 0 <= told < 1 << 48


def _are_numbers(told: Any) -> bool:
    return isinstance(told, list) and all(map(_is_number, told))


def _are_states(told: Any) -> bool:
    return isinstance(told, list) and all(
        isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and _are_numbers(one[1]) for one in told
    )


# How the types of the fields are written: their annotations are texts.
_FORMS: Dict[str, Callable[[Any], bool]] = {
    "int": _is_number,
    "str": lambda told: isinstance(told, str),
    "Optional[str]": lambda told: told is None or isinstance(told, str),
    "List[int]": _are_numbers,
    "List[List[Any]]": _are_states,
}


def mismatch(here: Geometry, here_rank: Rank, there: Geometry, there_rank: Rank) -> Optional[str]:
    """Why a decode rank cannot take what a prefill rank keeps; `None` if it can."""
    # The decode side does not say how many heads the model has.
    heads = there.heads
    for what, (theirs, mine) in {
        "dtype": (there.dtype, here.dtype),
        "tokens a page": (there.page_tokens, here.page_tokens),
        "order within a page": (there.order, here.order),
        "a draft model's pages": (there.draft, here.draft),
        "order within a page of the sliding window": (there.swa_order, here.swa_order),
        "state": (there.spread(heads, there_rank.tp), here.spread(heads, here_rank.tp)),
    }.items():
        if mine != theirs:
            return f"{what}: {theirs} on the prefill side, and {mine} here"
    if bool(here.heads) != bool(there.heads):
        return "one side keeps latents (MLA), and the other heads"
    if not here.heads and here.page_bytes != there.page_bytes:
        return f"pages of {there.page_bytes} bytes on the prefill side, and of {here.page_bytes} here"
    if here_rank.pp == there_rank.pp and here.layers != there.layers:
        return f"{there.layers} layers on the prefill side, and {here.layers} here"
    return None
