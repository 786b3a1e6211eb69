"""SGLang's modules that the classes are built over, and whether they are what these were written for."""

from __future__ import annotations

import importlib
from typing import Any, Dict, Sequence

# The version whose modules the tests run.
TESTED = "0.5.23"

conn: Any = importlib.import_module("sglang.srt.disaggregation.common.conn")
environ: Any = importlib.import_module("sglang.srt.environ")
runtime_context: Any = importlib.import_module("sglang.srt.runtime_context")
utils: Any = importlib.import_module("sglang.srt.disaggregation.utils")

_NEEDED: Dict[str, Sequence[str]] = {
    "CommonKVManager": (
        "_handle_node_failure",
        "_make_worker_recv",
        "_on_heartbeat_success",
        "_prefill_unique_rank",
        "_register_topology_row",
        "_room_notify_targets",
        "_send_multipart_locked",
        "_start_heartbeat_checker_thread",
        "apply_prefill_status",
        "conclude_failure",
        "record_failure",
        "resolve_kv_replica_factor",
        "send_kv_status_message",
        "update_status",
    ),
    "CommonKVSender": ("_poll_with_status", "_record_transfer_indices", "abort", "clear", "failure_exception"),
    "CommonKVReceiver": (
        "_clear",
        "_connect_to_bootstrap_server",
        "_poll",
        "_register_kv_args",
        "_send_abort_notification",
        "_send_bootstrap_message",
        "abort",
        "ensure_abort_notified",
        "failure_exception",
        "invalidate_cached_bootstrap_infos",
    ),
    "CommonKVBootstrapServer": ("_handle_route_put", "_handle_route_get"),
}


def check() -> None:
    """Raises `ImportError` where SGLang's classes have lost what is overridden or called here."""
    for kind, names in _NEEDED.items():
        missing = [name for name in names if not hasattr(getattr(conn, kind, None), name)]
        if missing:
            raise ImportError(
                f"SGLang's {kind} has no {', '.join(missing)}: crossdock.sglang was written for SGLang {TESTED}; "
                "another version may run over crossdock.mooncake"
            )


check()
