"""SGLang's own modules, from an installed `sglang` or from its wheel, with light stand-ins for what they import beside
them.

The modules of `sglang.srt.disaggregation`, the environment, the network helpers, the plugins, the service that starts
the bootstrap server, and the wrapper around Mooncake's engine are SGLang's. What would need a GPU's worth of
dependencies is stood in for: the configuration (`runtime_context`), the process groups, tracing, the model's
configuration, Triton; and PyTorch, where none is installed or `CROSSDOCK_SGLANG_TORCH=0`.

`CROSSDOCK_SGLANG_WHEEL` names the wheel, or a folder that it is unpacked to.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any, Optional

from .loading import not_installed, stand_in

WHEEL = "CROSSDOCK_SGLANG_WHEEL"
TORCH = "CROSSDOCK_SGLANG_TORCH"
VERSION = "0.5.23"
_NEEDED = ("zmq", "aiohttp", "requests", "msgspec", "psutil", "prometheus_client", "numpy")
# What is taken of the wheel.
_KEPT = (
    "sglang/srt/disaggregation/",
    "sglang/srt/environ.py",
    "sglang/srt/utils/network.py",
    "sglang/srt/distributed/communication_tags.py",
    "sglang/srt/distributed/device_communicators/mooncake_transfer_engine.py",
    "sglang/srt/arg_groups/choices.py",
    "sglang/srt/managers/disagg_service.py",
    "sglang/srt/plugins/",
)


def why_not() -> Optional[str]:
    """Why SGLang's modules cannot be had here; `None` if they can."""
    missing = not_installed("SGLang", _NEEDED)
    if missing:
        return missing
    if sys.version_info < (3, 10):
        return "SGLang's modules need Python 3.10"
    wheel = os.environ.get(WHEEL)
    if wheel:
        if not os.path.exists(wheel):
            return f"{WHEEL}: {wheel} does not exist"
        lacking = [name for name in _KEPT if os.path.isdir(wheel) and not os.path.exists(os.path.join(wheel, name))]
        return f"{WHEEL}: {wheel} lacks {', '.join(lacking)}" if lacking else None
    try:
        found = importlib.util.find_spec("sglang")
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        return f"sglang is not installed, and {WHEEL} names no wheel: pip download --no-deps sglang=={VERSION}"
    return None


def unpacked() -> Path:
    """The folder that holds `sglang`. A wheel is unpacked once, also for the programs that are started from here on."""
    wheel = os.environ.get(WHEEL)
    if not wheel:
        found = importlib.util.find_spec("sglang")
        assert found is not None and found.submodule_search_locations
        return Path(list(found.submodule_search_locations)[0]).parent
    if os.path.isdir(wheel):
        return Path(wheel)
    folder = tempfile.mkdtemp(prefix="crossdock-sglang-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_KEPT)])
    os.environ[WHEEL] = folder
    return Path(folder)


class Namespace(types.SimpleNamespace):
    """Part of an engine's configuration: what nobody has set is an error, and not a default."""


# What a rank's program sets before SGLang's classes are made.
parallel = Namespace(
    dist_init_addr=None,
    attn_tp_size=1,
    attn_tp_rank=0,
    attn_cp_size=1,
    attn_cp_rank=0,
    attn_dcp_size=1,
    attn_dcp_rank=0,
    attn_dp_size=1,
    attn_dp_rank=0,
    dp_size=1,
    dp_rank=0,
    num_dp_ranks=1,
    pp_size=1,
    pp_rank=0,
    pp_group=None,
    nnodes=1,
    node_rank=0,
    world_group=None,
    load_balance_method="follow_bootstrap_room",
    enable_kv_cache_sharding=False,
    enable_dsa_cache_layer_split=False,
    enable_cp_tp_group_sharing=False,
)
serving = Namespace(host="127.0.0.1", port=30000)
disagg = Namespace(
    disaggregation_bootstrap_port=8998,
    disaggregation_decode_allocation_policy="early",
    disaggregation_mode="null",
    disaggregation_transfer_backend="mooncake",
    disaggregation_ib_device=None,
    enable_pd_role_switch=False,
)
server_args = Namespace(enable_pd_role_switch=False)


def prepare() -> Path:
    """Makes `sglang.srt.disaggregation` importable, and tells the folder that it comes from."""
    folder = unpacked()
    srt = folder / "sglang" / "srt"
    # What SGLang's logging adds.
    logging.Logger.warning_once = logging.Logger.warning  # type: ignore[attr-defined]
    for name in (
        "sglang",
        "sglang.srt",
        "sglang.srt.utils",
        "sglang.srt.distributed",
        "sglang.srt.distributed.device_communicators",
        "sglang.srt.disaggregation",
        "sglang.srt.arg_groups",
        "sglang.srt.managers",
    ):
        stand_in(name, path=folder.joinpath(*name.split(".")))
    if os.environ.get(TORCH) == "0" or importlib.util.find_spec("torch") is None:
        _stand_in_for_torch()
    # Of kernels that pack on a GPU: none is called.
    stand_in("triton", jit=lambda function: function)
    stand_in("triton.language", constexpr=int)
    stand_in("sglang.kernels.ops.memory.ptr_table", make_ptr_table=None)
    usual = lambda **fields: (lambda: Namespace(**fields))  # noqa: E731
    stand_in(
        "sglang.srt.runtime_context",
        get_parallel=lambda: parallel,
        get_serving=lambda: serving,
        get_disagg=lambda: disagg,
        get_observability=usual(enable_trace=False),
        get_device=usual(device="cpu", gpu_id=0),
        get_memory=usual(enable_hierarchical_cache=False, enable_unified_memory=False),
        get_schedule=usual(chunked_prefill_size=8192, max_prefill_tokens=16384),
        get_spec=usual(speculative_algorithm=None),
        get_exec=usual(),
        linear_attn_tp_size=lambda: parallel.attn_tp_size,
        max_prefill_buffer_tokens=lambda: 0,
    )
    stand_in("sglang.srt.server_args", ServerArgs=Namespace)
    stand_in("sglang.srt.configs.model_config", get_dsa_mtp_topk_width=None, is_deepseek_dsa=None)
    stand_in("sglang.srt.mem_cache.page_interleave", get_kv_shard_group=None)
    stand_in(
        "sglang.srt.observability.trace",
        TraceNullContext=_Untraced,
        TraceReqContext=_Untraced,
        trace_set_thread_info=None,
    )
    stages = types.SimpleNamespace(
        MOONCAKE_SEND=None, MOONCAKE_WORKER_SEND=None, MOONCAKE_WORKER_SEND_SESSION=None
    )
    stand_in(
        "sglang.srt.observability.mooncake_trace",
        MooncakeRequestStage=stages,
        mooncake_trace_func=lambda stage: lambda function: function,
        mooncake_trace_slice=None,
    )
    stand_in("sglang.srt.utils.common", ceil_align=lambda n, to: -(-n // to) * to, run_with_deadline=_run)
    utils = sys.modules["sglang.srt.utils"]
    for name, value in dict(
        is_npu=lambda: False, create_device_event=None, create_device_stream=None, device_stream_context=None
    ).items():
        setattr(utils, name, value)
    engine = importlib.import_module("sglang.srt.distributed.device_communicators.mooncake_transfer_engine")
    stand_in(
        "sglang.srt.distributed.parallel_state",
        GroupCoordinator=object,
        get_mooncake_transfer_engine=engine.get_mooncake_transfer_engine,
    )
    assert srt.is_dir(), srt
    return folder


def _stand_in_for_torch() -> None:
    """SGLang's transfer modules ask PyTorch whether something is a tensor, and for their process groups."""
    stand_in("torch", Tensor=type("Tensor", (), {}))
    stand_in("torch.distributed", is_available=lambda: False, is_initialized=lambda: False, ProcessGroup=object)


def _run(function: Any, *, timeout_s: float, what: str) -> Any:
    del timeout_s, what
    return function()


class _Untraced:
    """A request that nobody traces."""

    tracing_enable = False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def copy_for_thread(self) -> _Untraced:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("trace_", "rebuild_", "abort")):
            return lambda *_, **__: None
        raise AttributeError(name)
