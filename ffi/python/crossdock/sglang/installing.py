"""Makes SGLang know the backend."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

BACKEND = "crossdock"


def install() -> None:
    """Adds `crossdock` to SGLang's transfer backends in this process: to the choices of the command line, to
    `TransferBackend`, and to what `get_kv_class` finds. It may be called again, and before or after SGLang's modules
    are imported. It is what the entry point group `sglang.srt.plugins` expects of a plugin."""
    try:
        utils = importlib.import_module("sglang.srt.disaggregation.utils")
    except ImportError as error:
        raise ImportError(
            f"crossdock.sglang is a transfer backend of SGLang, and SGLang cannot be imported here: {error}"
        ) from error
    _add_choice()
    if BACKEND in utils.TransferBackend._value2member_map_:
        return
    _add_member(utils.TransferBackend)
    usual = utils.get_kv_class

    def get_kv_class(transfer_backend: Any, class_type: Any) -> Any:
        if transfer_backend.value != BACKEND:
            return usual(transfer_backend, class_type)
        return _class_of(class_type)

    # Modules that were imported before have the function by its name.
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and getattr(module, "get_kv_class", None) is usual:
            setattr(module, "get_kv_class", get_kv_class)


def _class_of(class_type: Any) -> Any:
    from . import bootstrap, manager, receiver, sender

    if class_type.value == "kvargs":
        return importlib.import_module("sglang.srt.disaggregation.base").KVArgs
    return {
        "manager": manager.CrossdockKVManager,
        "sender": sender.CrossdockKVSender,
        "receiver": receiver.CrossdockKVReceiver,
        "bootstrap_server": bootstrap.CrossdockKVBootstrapServer,
    }[class_type.value]


def _add_choice() -> None:
    """To `--disaggregation-transfer-backend`."""
    name = "sglang.srt.arg_groups.choices"
    try:
        if importlib.util.find_spec(name) is None:
            return
    except ImportError:
        return
    choices = importlib.import_module(name)
    if BACKEND not in choices.DISAGG_TRANSFER_BACKEND_CHOICES:
        choices.add_disagg_transfer_backend_choices([BACKEND])


def _add_member(backends: Any) -> None:
    """An enumeration is closed, and whoever has imported it has this very one: so the member is put where it looks."""
    member = object.__new__(backends)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    member.__objclass__ = backends
    member._sort_order_ = len(backends._member_names_)
    backends._member_names_.append(member._name_)
    backends._member_map_[member._name_] = member
    backends._value2member_map_[BACKEND] = member
    type.__setattr__(backends, member._name_, member)
