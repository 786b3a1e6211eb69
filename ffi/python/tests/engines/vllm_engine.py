"""An engine core of vLLM, whose scheduler, block pool and connector calls are vLLM's own, over a model that computes
nothing: it fills the cache with bytes that tell which token, position, layer and head they are of.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Deque, Dict, List, Optional, Sequence, Set, Tuple

import torch

from . import vllm

_state = importlib.import_module("vllm.distributed.kv_transfer.kv_transfer_state")
_interface = importlib.import_module("vllm.v1.kv_cache_interface")
_outputs = importlib.import_module("vllm.v1.outputs")
_requests = importlib.import_module("vllm.v1.request")
_factory = importlib.import_module(f"{vllm.CONNECTORS}.factory").KVConnectorFactory
_roles = importlib.import_module(f"{vllm.CONNECTORS}.v1.base").KVConnectorRole
_scheduler = importlib.import_module("vllm.v1.core.sched.scheduler").Scheduler
_async_scheduler = importlib.import_module("vllm.v1.core.sched.async_scheduler").AsyncScheduler
_mixin = importlib.import_module("vllm.v1.worker.kv_connector_model_runner_mixin").KVConnectorModelRunnerMixin

_utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
_sha256 = importlib.import_module("vllm.utils.hashing").sha256
_utils.init_none_hash(_sha256)

MOST_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """A small model's cache."""

    layers: int = 3
    heads: int = 4
    block_tokens: int = 4
    head_bytes: int = 16
    blocks: int = 32
    is_mla: bool = False
    order: str = "LBNHC"
    dtype: Any = torch.uint8

    def spec(self, tp: int) -> Any:
        item_bytes = torch.empty(0, dtype=self.dtype).element_size()
        if self.is_mla:
            head_size = 2 * self.head_bytes // item_bytes
            return _interface.MLAAttentionSpec(
                block_size=self.block_tokens, num_kv_heads=1, head_size=head_size, dtype=self.dtype
            )
        head_size = self.head_bytes // item_bytes
        return _interface.FullAttentionSpec(
            block_size=self.block_tokens, num_kv_heads=self.heads // tp, head_size=head_size, dtype=self.dtype
        )

    def config(self, tp: int) -> Any:
        """vLLM's KVCacheConfig."""
        spec, names = self.spec(tp), [f"model.layers.{layer}.attn" for layer in range(self.layers)]
        order = _interface.KVCacheLayout[self.order]
        layer_stride, block_stride = _interface.compute_layout_strides(spec, self.blocks, self.layers, order)[:2]
        tensor = _interface.KVCacheTensor(
            size=spec.page_size_bytes * self.blocks * self.layers,
            layers=names,
            layer_stride=layer_stride,
            block_stride=block_stride,
        )
        group = _interface.KVCacheGroupSpec(names, spec)
        return _interface.KVCacheConfig(num_blocks=self.blocks, kv_cache_tensors=[tensor], kv_cache_groups=[group])

    def caches(self, tp: int) -> Dict[str, torch.Tensor]:
        """A rank's tensors, as vLLM lays them out: [blocks, heads, tokens, items] by layer."""
        config = self.config(tp)
        (tensor,) = config.kv_cache_tensors
        raw = torch.zeros(tensor.size, dtype=torch.int8)
        order = _interface.KVCacheLayout[self.order]
        views = _interface.create_kv_cache_views(raw, self.spec(tp), self.blocks, order, tensor)
        return {name: view.view(torch.uint8) for name, view in zip(tensor.layers, views)}


def config_of(transfer: Any, shape: Shape, tp: int = 1, **parallel: int) -> Any:
    """What of vLLM's configuration its scheduler and a connector look at."""
    sizes = dict(tensor_parallel_size=tp, pipeline_parallel_size=1, decode_context_parallel_size=1)
    return SimpleNamespace(
        kv_transfer_config=transfer,
        scheduler_config=SimpleNamespace(
            max_num_seqs=64,
            max_num_active_seqs=None,
            max_num_scheduled_tokens=None,
            max_num_batched_tokens=64,
            long_prefill_token_threshold=0,
            long_prefill_token_threshold_adaptive=False,
            policy="fcfs",
            watermark=0.0,
            prefill_schedule_interval=1,
            scheduler_reserve_full_isl=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
            disable_hybrid_kv_cache_manager=True,
            is_multimodal_model=False,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            num_gpu_blocks=shape.blocks,
            enable_prefix_caching=True,
            mamba_cache_mode="none",
            enable_mamba_shared_prefix_checkpoint=False,
        ),
        model_config=SimpleNamespace(
            model="a small model",
            use_mla=shape.is_mla,
            get_total_num_kv_heads=lambda: 1 if shape.is_mla else shape.heads,
            uses_mrope=False,
            is_encoder_decoder=False,
            max_model_len=MOST_TOKENS,
            runner_type="generate",
            is_diffusion=False,
            supports_multimodal_inputs=False,
            return_sampling_mask=False,
        ),
        parallel_config=SimpleNamespace(
            **{**sizes, "prefill_context_parallel_size": 1, **parallel}, data_parallel_size=1, data_parallel_index=0
        ),
        observability_config=SimpleNamespace(
            per_request_spec_decode_metrics=None, kv_cache_metrics=False, enable_mfu_metrics=False
        ),
        ec_manager_config=SimpleNamespace(get_encoder_cache_manager_obj=lambda: None),
        aux_output_config=SimpleNamespace(enabled=False),
        lora_config=None,
        kv_events_config=None,
        ec_transfer_config=None,
        speculative_config=None,
        is_mm_encoder_only=False,
        max_concurrent_batches=1,
        max_in_flight_tokens=64,
        num_speculative_tokens=0,
        num_lookahead_tokens=0,
        num_prefill_lookahead_tokens=0,
        num_hash_lookahead_tokens=0,
        use_v2_model_runner=False,
    )


def transfer_of(role: str, *, policy: str = "fail", **extra: Any) -> Any:
    """vLLM's KVTransferConfig, as `--kv-transfer-config` makes it."""
    kind = importlib.import_module("vllm.config.kv_transfer").KVTransferConfig
    usual = dict(host="127.0.0.1", load_seconds=10, lease_seconds=20)
    return kind(
        kv_connector="CrossdockConnector",
        kv_connector_module_path="crossdock.vllm",
        kv_role=role,
        kv_buffer_device="cpu",
        engine_id=f"{role}-{os.getpid()}",
        kv_load_failure_policy=policy,
        kv_connector_extra_config={**usual, **extra},
    )


def filled(tokens: Sequence[int], first: int, layer: int, heads: range, nbytes: int) -> torch.Tensor:
    """[heads, tokens, bytes]: what the model computes for tokens from this position on. Never 0."""
    ids = torch.tensor(tokens, dtype=torch.int64) * 31 + torch.arange(first, first + len(tokens)) * 7 + layer * 13
    by_head = ids[None, :] + torch.tensor(list(heads), dtype=torch.int64)[:, None] * 5
    return (by_head % 251 + 1).to(torch.uint8)[:, :, None] + (torch.arange(nbytes) % 4).to(torch.uint8)


class Engine:
    """A scheduler and its workers, one node each."""

    def __init__(
        self,
        role: str,
        shape: Shape,
        tp: int = 1,
        *,
        policy: str = "fail",
        is_late: bool = False,
        is_async: bool = False,
        **extra: Any,
    ) -> None:
        """With `is_late` the caches are not registered yet; with `is_async` a step is scheduled before what the last
        one made is known, as vLLM does it if it can."""
        self.shape, self.tp = shape, tp
        transfer = transfer_of(role, policy=policy, **extra)
        config, caches = config_of(transfer, shape, tp), shape.config(tp)
        config.max_concurrent_batches = 2 if is_async else 1
        structured = SimpleNamespace(accept_tokens=lambda *_: True)
        kind = _async_scheduler if is_async else _scheduler
        self.scheduler = kind(config, caches, structured, block_size=shape.block_tokens)
        # Steps whose outputs the scheduler has not seen.
        self._steps: Deque[Tuple[Any, Any]] = collections.deque()
        self._most_steps = config.max_concurrent_batches
        self.workers: List[Any] = []
        self.caches: List[Dict[str, torch.Tensor]] = []
        for vllm.ranks.rank in range(tp):
            self.workers.append(_factory.create_connector(config, _roles.WORKER, caches))
            self.caches.append(shape.caches(tp))
        if not is_late:
            self.register()
        aggregator = importlib.import_module(f"{vllm.CONNECTORS}.utils").KVOutputAggregator
        self._aggregator = aggregator.from_connector(self.scheduler.get_kv_connector(), tp)
        self._hasher = _utils.get_request_block_hasher(shape.block_tokens, _sha256)
        self.requests: Dict[str, Any] = {}
        # What the model knows of each: the prompt, and what it has made.
        self._texts: Dict[str, List[int]] = {}
        # What has come of steps, by request: the tokens, why it is over, what the router is told.
        self.tokens: Dict[str, List[int]] = {}
        self.over: Dict[str, str] = {}
        self.params: Dict[str, Dict[str, Any]] = {}
        self.bad: Set[int] = set()
        # What this engine's workers were to fetch.
        self.fetches: Dict[str, Any] = {}
        # How many tokens of each request this engine has computed.
        self.computed: Dict[str, int] = {}

    def register(self) -> None:
        """As vLLM does it before an engine is ready: the caches, then the handshake."""
        told = {}
        for rank, (worker, tensors) in enumerate(zip(self.workers, self.caches)):
            worker.register_kv_caches({name: tensor.view(self.shape.dtype) for name, tensor in tensors.items()})
            told[0, rank] = pickle.loads(pickle.dumps(worker.get_handshake_metadata()))
        self.scheduler.get_kv_connector().set_xfer_handshake_metadata_pp_aware(told)

    def add(
        self,
        name: str,
        prompt: Sequence[int],
        params: Optional[Dict[str, Any]] = None,
        *,
        most: int = 1,
        skips_cache: bool = False,
    ) -> None:
        sampling = SimpleNamespace(
            max_tokens=most,
            min_tokens=0,
            eos_token_id=None,
            stop_token_ids=(),
            num_logprobs=None,
            repetition_detection=None,
            skip_reading_prefix_cache=skips_cache,
            # It has come as JSON, by way of the router.
            extra_args=None if params is None else {"kv_transfer_params": json.loads(json.dumps(params))},
        )
        request = _requests.Request(name, list(prompt), sampling, None, block_hasher=self._hasher)
        self.requests[name], self._texts[name] = request, list(prompt)
        self.scheduler.add_request(request)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, _requests.RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        scheduled = self.scheduler.schedule()
        # It travels to the workers' processes.
        self.fetches.update(scheduled.kv_connector_metadata.fetches)
        metadata = pickle.dumps(scheduled.kv_connector_metadata)
        outputs = []
        for rank, worker in enumerate(self.workers):
            scheduled.kv_connector_metadata = pickle.loads(metadata)
            setattr(_state, "_KV_CONNECTOR_AGENT", worker)
            with _mixin._get_kv_connector_output(scheduled) as told:
                self._forward(rank, scheduled.num_scheduled_tokens)
            outputs.append(_outputs.ModelRunnerOutput([], {}, kv_connector_output=told))
        setattr(_state, "_KV_CONNECTOR_AGENT", None)
        # The connector's outputs of all workers, on the first one's output.
        output = self._aggregator.aggregate(outputs)
        self.bad |= output.kv_connector_output.invalid_block_ids
        output.req_ids = list(scheduled.num_scheduled_tokens)
        output.req_id_to_index = {name: at for at, name in enumerate(output.req_ids)}
        output.sampled_token_ids = [self._sampled(name) for name in output.req_ids]
        self._steps.append((scheduled, output))
        # As vLLM does it: it waits for no output while there is something to schedule.
        while len(self._steps) == self._most_steps or (self._steps and not scheduled.num_scheduled_tokens):
            self._update(*self._steps.popleft())

    def _update(self, scheduled: Any, output: Any) -> None:
        for told in self.scheduler.update_from_output(scheduled, output).values():
            for one in told.outputs:
                self.tokens.setdefault(one.request_id, []).extend(one.new_token_ids)
                if one.finish_reason is not None:
                    self.over[one.request_id] = str(one.finish_reason)
                if one.kv_transfer_params is not None:
                    self.params[one.request_id] = json.loads(json.dumps(one.kv_transfer_params))

    def _forward(self, rank: int, counts: Dict[str, int]) -> None:
        for name, count in counts.items():
            # The scheduler counts them already.
            first = self.requests[name].num_computed_tokens - count
            tokens, blocks = self._texts[name], self.block_ids(name)
            # As attention reads it.
            assert self.has_cache_of(tokens[:first], blocks, rank), f"{name} without the first {first} tokens"
            for layer in range(self.shape.layers):
                new = tokens[first : first + count]
                written = filled(new, first, layer, self._heads(rank), 2 * self.shape.head_bytes)
                for at in range(count):
                    block, slot = divmod(first + at, self.shape.block_tokens)
                    self._layer(rank, layer)[blocks[block], :, slot] = written[:, at]
            if rank == 0:
                self.computed[name] = self.computed.get(name, 0) + count

    def _sampled(self, name: str) -> List[int]:
        text = self._texts[name]
        if self.requests[name].num_computed_tokens < len(text):
            # Its prompt is not computed to its end.
            return []
        text.append(sum(text) % 997)
        return text[-1:]

    def _heads(self, rank: int) -> range:
        if self.shape.is_mla:
            return range(1)
        heads = self.shape.heads // self.tp
        return range(rank * heads, (rank + 1) * heads)

    def _layer(self, rank: int, layer: int) -> torch.Tensor:
        return self.caches[rank][f"model.layers.{layer}.attn"]

    def block_ids(self, name: str) -> List[int]:
        """Of a request that has any."""
        return list(self.scheduler.kv_cache_manager.get_block_ids(name)[0])

    def has_cache_of(self, tokens: Sequence[int], block_ids: Sequence[int], rank: int) -> bool:
        """Whether these blocks hold what a rank computes for these tokens."""
        ids = list(block_ids)[: -(-len(tokens) // self.shape.block_tokens)]
        for layer in range(self.shape.layers):
            blocks = self._layer(rank, layer)[ids]
            found = blocks.permute(1, 0, 2, 3).reshape(blocks.shape[1], -1, blocks.shape[3])[:, : len(tokens)]
            if not torch.equal(found, filled(tokens, 0, layer, self._heads(rank), 2 * self.shape.head_bytes)):
                return False
        return True

    def is_untouched(self) -> bool:
        return not any(bool(layer.any()) for layers in self.caches for layer in layers.values())

    @property
    def free_blocks(self) -> int:
        """vLLM keeps one of all blocks to itself."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def is_idle(self) -> bool:
        """Whether no request is left, nor a block of one."""
        return not self._steps and not self.scheduler.requests and self.free_blocks == self.shape.blocks - 1

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()
