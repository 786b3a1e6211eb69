"""crossdock as a transfer backend of SGLang's disaggregated serving: `--disaggregation-transfer-backend crossdock`.

`python -m crossdock.sglang --model-path ... --disaggregation-mode prefill ...` is `python -m sglang.launch_server` with
it, and `install` makes SGLang in this process know it. `CROSSDOCK_KEY` holds the key that all workers share.
docs/sglang.md says what is supported and what is refused.

The classes are over SGLang's own `CommonKV...` ones, which are imported when they are asked for: importing this package
needs no SGLang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .installing import BACKEND, install

if TYPE_CHECKING:
    from .bootstrap import CrossdockKVBootstrapServer
    from .manager import CrossdockKVManager
    from .receiver import CrossdockKVReceiver
    from .sender import CrossdockKVSender

__all__ = [
    "BACKEND",
    "CrossdockKVBootstrapServer",
    "CrossdockKVManager",
    "CrossdockKVReceiver",
    "CrossdockKVSender",
    "install",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import bootstrap, manager, receiver, sender

        for module in (bootstrap, manager, receiver, sender):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
