"""What vLLM calls."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Sequence, Set, Tuple

from ._scheduler import Fetch, Scheduling, Serve
from ._settings import Settings
from ._worker import Working

_base: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")


@dataclass
class CrossdockMetadata(_base.KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers in a step."""

    serves: Dict[str, Serve] = field(default_factory=dict)
    fetches: Dict[str, Fetch] = field(default_factory=dict)


@dataclass
class CrossdockHandshake(_base.KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """What a worker tells its scheduler: the address of its node, and the form of its tensors, in words."""

    address: str
    cache: str


class CrossdockConnector(_base.KVConnectorBase_V1):  # type: ignore[misc]
    """One of the two: the scheduler's, or a worker's."""

    _cache_hit_source = _base.CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = Settings.of(vllm_config, kv_cache_config)
        self._settings = settings
        self._scheduling: Optional[Scheduling] = None
        self._working: Optional[Working] = None
        if role == _base.KVConnectorRole.SCHEDULER:
            self._scheduling = Scheduling(settings)
        else:
            state = importlib.import_module("vllm.distributed.parallel_state")
            self._working = Working(settings, int(state.get_tensor_model_parallel_rank()))

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> Optional[str]:
        """Heads that ranks share in different ways lie apart in each block."""
        transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
        splits = transfer is not None and transfer.get_from_extra_config("heterogeneous_tp", False)
        return "LBHNC" if splits and model is not None and not model.use_mla else None

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """The caches stay where they are: peers reach them."""
        return False

    # The scheduler's.

    def _of_scheduler(self) -> Scheduling:
        if self._scheduling is None:
            raise RuntimeError("this is a worker's connector")
        return self._scheduling

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, CrossdockHandshake]) -> None:
        ranks = sorted(metadata)
        if ranks != list(range(self._settings.tp)):
            raise RuntimeError(f"the workers of ranks {ranks} are there, of {self._settings.tp}")
        caches = sorted({told.cache for told in metadata.values()})
        if len(caches) != 1:
            raise RuntimeError(f"the workers have caches of different forms: {' and '.join(caches)}")
        self._of_scheduler().set_workers([metadata[rank].address for rank in ranks], caches[0])

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[int, bool]:
        return self._of_scheduler().matched(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> Tuple[int, ...]:
        """The only one, whether or not its blocks can be found by their hashes."""
        return (0,)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._of_scheduler().allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> CrossdockMetadata:
        return CrossdockMetadata(*self._of_scheduler().take())

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        return self._of_scheduler().finished(request, block_ids)

    # The workers'.

    def _of_worker(self) -> Working:
        if self._working is None:
            raise RuntimeError("this is the scheduler's connector")
        return self._working

    def register_kv_caches(self, kv_caches: Dict[str, Any]) -> None:
        self._of_worker().register(kv_caches)

    def get_handshake_metadata(self) -> Optional[CrossdockHandshake]:
        told = None if self._working is None else self._working.told
        return None if told is None else CrossdockHandshake(*told)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        self._of_worker().start(metadata.serves, metadata.fetches)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """A request is scheduled when all of its layers are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """The decode side pulls."""

    def wait_for_save(self) -> None:
        """As above."""

    def get_finished(self, finished_req_ids: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        return self._of_worker().finished(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> Set[int]:
        return self._of_worker().take_bad_blocks()

    def shutdown(self) -> None:
        if self._working is not None:
            self._working.close()
