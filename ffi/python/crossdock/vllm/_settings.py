"""What of vLLM's configuration matters here, and what is refused."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional, Union

from ..errors import BadArgument, Unsupported

_log = logging.getLogger("crossdock.vllm")

# Every token's keys and values are kept, in blocks of one size. So vLLM also describes windows of which it keeps all
# tokens.
_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")

_OPTIONS = {"decode_tp", "heterogeneous_tp", "lease_seconds", "load_seconds", "host", "ports"}

Form = Dict[str, Union[str, int, bool]]
"""By name, what has to be the same on both sides."""


@dataclass(frozen=True)
class Settings:
    """Of one engine."""

    engine_id: str
    vllm: str
    """Its version."""
    model: str
    dtype: str
    block_tokens: int
    blocks: int
    tp: int
    is_mla: bool
    kv_heads: int
    """Of the whole model."""
    splits_heads: bool
    """Whether the other side may have another number of tensor-parallel ranks."""
    decode_tp: int
    """How many the decode side has."""
    lease_seconds: float
    load_seconds: float
    host: Optional[str]
    ports: Optional[str]
    key: Optional[bytes]

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any) -> Settings:
        """Raises `Unsupported` for what this connector does not move, and `BadArgument` for options that make no
        sense."""
        parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
        for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            size = int(getattr(parallel, name, 1))
            if size != 1:
                raise Unsupported(f"{name} is {size}", "this connector needs 1: use tensor parallelism", 9)
        # Such drafters want the last tokens of a prompt from the decode side.
        lookahead = int(getattr(vllm_config, "num_prefill_lookahead_tokens", 0))
        if lookahead > 1:
            raise Unsupported(f"a drafter that looks {lookahead} tokens ahead", "use one with a single module", 9)
        spec = _only_spec(kv_cache_config)
        model, extra = vllm_config.model_config, transfer.get_from_extra_config
        tp, is_mla = int(parallel.tensor_parallel_size), bool(model.use_mla)
        unknown = set(transfer.kv_connector_extra_config) - _OPTIONS
        if unknown:
            _log.warning("kv_connector_extra_config has %s, which mean nothing here", ", ".join(sorted(unknown)))
        splits_heads = _flag("heterogeneous_tp", extra("heterogeneous_tp", False)) and not is_mla
        decode_tp = _whole("decode_tp", extra("decode_tp", tp))
        kv_heads = int(model.get_total_num_kv_heads())
        if decode_tp != tp and not (splits_heads or is_mla):
            advice = 'set "heterogeneous_tp": true on both sides'
            raise BadArgument(f"decode_tp is {decode_tp}, and tensor_parallel_size {tp}", advice, 3)
        for ranks in (tp, decode_tp):
            if splits_heads and kv_heads % ranks:
                advice = "heterogeneous_tp needs whole heads on each rank"
                raise Unsupported(f"{kv_heads} KV heads over {ranks} ranks", advice, 9)
        key = os.environ.get("CROSSDOCK_KEY")
        if not key:
            _log.warning("CROSSDOCK_KEY is not set: anybody who can reach this worker may fetch blocks that it serves")
        return cls(
            engine_id=str(transfer.engine_id),
            vllm=str(getattr(importlib.import_module("vllm"), "__version__", "")),
            model=str(model.model),
            dtype=f"{vllm_config.cache_config.cache_dtype} {getattr(spec, 'dtype', '')}",
            block_tokens=int(spec.block_size),
            blocks=int(kv_cache_config.num_blocks),
            tp=tp,
            is_mla=is_mla,
            kv_heads=kv_heads,
            splits_heads=splits_heads,
            decode_tp=decode_tp,
            lease_seconds=_seconds("lease_seconds", extra("lease_seconds", 120)),
            load_seconds=_seconds("load_seconds", extra("load_seconds", 60)),
            host=_text("host", extra("host", None), "give an IP address of this machine"),
            ports=_text("ports", extra("ports", None), 'name them, as "verbs,tcp"'),
            key=key.encode() if key else None,
        )

    def form(self, cache: str) -> Form:
        """With what the workers tell of their tensors."""
        return {
            "vllm": self.vllm,
            "model": self.model,
            "dtype": self.dtype,
            "block_tokens": self.block_tokens,
            "kv_heads": self.kv_heads,
            "is_mla": self.is_mla,
            "heterogeneous_tp": self.splits_heads,
            "cache": cache,
        }


def _only_spec(kv_cache_config: Any) -> Any:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        advice = "models with one kind of attention alone are moved"
        raise Unsupported(f"{len(groups)} groups of KV caches (a hybrid model)", advice, 9)
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ not in _SPECS:
        raise Unsupported(f"a KV cache of {type(spec).__name__}", f"there are {' and '.join(_SPECS)}", 9)
    return spec


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadArgument(f"{name} is {value!r}", "give true or false", 3)
    return value


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BadArgument(f"{name} is {value!r}", "give a number of ranks", 3)
    return value


def _seconds(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86400:
        raise BadArgument(f"{name} is {value!r}", "give seconds, up to a day", 3)
    return float(value)


def _text(name: str, value: Any, advice: str) -> Optional[str]:
    if value is not None and not isinstance(value, str):
        raise BadArgument(f"{name} is {value!r}", advice, 3)
    return value
