"""vLLM's own modules for the tests, out of its published wheel: those named below, from the folder that
CROSSDOCK_VLLM_WHEEL names. What they import besides is stood in for, by modules in which every name is an empty class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import pickle
import sys
import types
from collections.abc import Sequence as AbstractSequence
from types import SimpleNamespace
from typing import Any, Dict, Iterator, Optional, Sequence

from .loading import not_installed

CONNECTORS = "vllm.distributed.kv_transfer.kv_connector"
# All that is needed of the wheel.
MODULES = tuple(
    f"{CONNECTORS}.base {CONNECTORS}.factory {CONNECTORS}.utils "
    f"{CONNECTORS}.v1 {CONNECTORS}.v1.base {CONNECTORS}.v1.metrics "
    "vllm.config.kv_transfer vllm.distributed.kv_transfer vllm.distributed.kv_transfer.kv_transfer_state "
    "vllm.utils vllm.utils.func_utils vllm.utils.math_utils "
    "vllm.v1.core.block_pool vllm.v1.core.encoder_cache_manager vllm.v1.core.kv_cache_coordinator "
    "vllm.v1.core.kv_cache_manager vllm.v1.core.kv_cache_metrics vllm.v1.core.kv_cache_utils "
    "vllm.v1.core.sched.async_scheduler vllm.v1.core.sched.interface vllm.v1.core.sched.output "
    "vllm.v1.core.sched.request_queue vllm.v1.core.sched.scheduler vllm.v1.core.sched.utils "
    "vllm.v1.core.single_type_kv_cache_manager "
    "vllm.v1.engine vllm.v1.kv_cache_interface vllm.v1.kv_cache_layout vllm.v1.kv_cache_spec_registry "
    "vllm.v1.metrics.cache_hit_source vllm.v1.metrics.stats vllm.v1.outputs vllm.v1.request "
    "vllm.v1.worker.kv_connector_model_runner_mixin".split()
)

# What a worker's connector asks for, set before it is made.
ranks = SimpleNamespace(rank=0)


class _Nothing(type):
    def __getattr__(cls, name: str) -> Any:
        """An enumeration's members, and the like."""
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Standin(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Nothing(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, wheel: str) -> None:
        self._wheel = wheel
        self._names = _standins()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] != "vllm":
            return None
        place = os.path.join(self._wheel, *fullname.split("."))
        if fullname not in MODULES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if os.path.isfile(f"{place}.py"):
            return importlib.util.spec_from_file_location(fullname, f"{place}.py")
        package = os.path.join(place, "__init__.py")
        return importlib.util.spec_from_file_location(fullname, package, submodule_search_locations=[place])

    def create_module(self, spec: Any) -> Any:
        made = _Standin(spec.name)
        for name, value in self._names.get(spec.name, {}).items():
            setattr(made, name, value)
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


class _ConstantList(AbstractSequence):  # type: ignore[type-arg]
    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __getitem__(self, at: Any) -> Any:
        return self._items[at]

    def __len__(self) -> int:
        return len(self._items)

    def copy(self) -> Any:
        return list(self._items)

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


@contextlib.contextmanager
def _nothing(*_: object, **__: object) -> Iterator[None]:
    yield


class _Log(logging.Logger):
    """vLLM's has more methods."""

    def _once(self, message: str, *arguments: Any, **_: Any) -> None:
        self.debug(message, *arguments)

    info_once = warning_once = debug_once = _once


def _logger(name: str) -> logging.Logger:
    made = _Log(name)
    # What goes wrong on purpose is not told.
    made.addHandler(logging.NullHandler())
    return made


def _standins() -> Dict[str, Dict[str, Any]]:
    """What stand-ins have beside empty classes, by module."""
    import torch

    def sha256(value: Any) -> bytes:
        return hashlib.sha256(pickle.dumps(value)).digest()

    def item_bytes(dtype: Any) -> int:
        return int(torch.empty(0, dtype=dtype).element_size())

    return {
        "vllm": {"__version__": "0.33.0"},
        "vllm.config.utils": {"config": dataclasses.dataclass},
        "vllm.distributed.kv_events": {
            "EventPublisherFactory": SimpleNamespace(create=lambda *_: SimpleNamespace(shutdown=lambda: None))
        },
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: ranks.rank},
        "vllm.forward_context": {"get_forward_context": lambda: None, "set_forward_context": _nothing},
        "vllm.logger": {"init_logger": _logger},
        "vllm.multimodal.utils": {"strip_covered_mm_data": lambda features, *_, **__: features},
        "vllm.platforms": {
            "current_platform": SimpleNamespace(
                device_type="cpu", is_xpu=lambda: False, register_custom_kv_cache_specs=lambda _: None
            )
        },
        "vllm.utils.hashing": {"safe_hash": hashlib.sha256, "sha256": sha256},
        "vllm.utils.torch_utils": {"PIN_MEMORY": False, "get_dtype_size": item_bytes},
        "vllm.v1.structured_output.request": {
            "StructuredOutputRequest": SimpleNamespace(from_sampling_params=lambda _: None)
        },
        "vllm.v1.utils": {"ConstantList": _ConstantList, "record_function_or_nullcontext": _nothing},
    }


def load() -> Optional[str]:
    """Makes vLLM's modules importable. Why they are not, if they are not."""
    wheel = os.environ.get("CROSSDOCK_VLLM_WHEEL")
    if not wheel:
        return "CROSSDOCK_VLLM_WHEEL names no folder with vLLM's wheel"
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        missing = not_installed("vLLM", ("torch", "msgspec"))
        if missing:
            return missing
        sys.meta_path.insert(0, _Finder(wheel))
    try:
        for name in MODULES:
            importlib.import_module(name)
    except (ImportError, AttributeError, TypeError, SyntaxError, OSError) as error:
        return f"vLLM's modules cannot be imported: {error!r}"
    return None
