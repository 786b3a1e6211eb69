"""What an agent is made with, and what it hands out."""

from __future__ import annotations

import enum
from typing import Optional, Sequence

from . import _bindings as nixlBind
from ._bindings import DEFAULT_COMM_PORT, nixlInvalidParamError
from ._regions import Side
from ._remotes import Remote
from ._xfer import Xfer

nixl_backend_handle = int


class nixl_thread_sync_t(enum.Enum):
    """How threads share an agent. Here any number of them may, in every mode."""

    NIXL_THREAD_SYNC_NONE = nixlBind.NIXL_THREAD_SYNC_NONE
    NIXL_THREAD_SYNC_STRICT = nixlBind.NIXL_THREAD_SYNC_STRICT
    NIXL_THREAD_SYNC_RW = nixlBind.NIXL_THREAD_SYNC_RW
    NIXL_THREAD_SYNC_DEFAULT = nixlBind.NIXL_THREAD_SYNC_DEFAULT


class nixl_agent_config:
    """What an agent is made of. Threads make progress in any case; a listener is refused when the agent is made."""

    def __init__(
        self,
        enable_prog_thread: bool = True,
        enable_listen_thread: bool = False,
        listen_port: int = DEFAULT_COMM_PORT,
        capture_telemetry: bool = False,
        num_threads: int = 0,
        backends: Sequence[str] = ("UCX",),
        sync_mode: Optional[nixl_thread_sync_t] = None,
    ) -> None:
        if sync_mode is not None and not isinstance(sync_mode, nixl_thread_sync_t):
            raise TypeError(f"sync_mode is a {type(sync_mode).__name__} and not a nixl_thread_sync_t")
        self.backends = list(backends)
        self.enable_pthread = enable_prog_thread
        self.enable_listen = enable_listen_thread
        self.port = listen_port
        self.capture_telemetry = capture_telemetry
        self.num_threads = num_threads
        self.sync_mode = sync_mode


class nixl_prepped_dlist_handle:
    """Descriptors of one side that were checked: transfers take some of them by their numbers."""

    __slots__ = ("_side", "_remote")

    def __init__(self, side: Side, remote: Optional[Remote]) -> None:
        self._side: Optional[Side] = side
        # `None` for this agent's own side.
        self._remote = remote

    def release(self) -> None:
        """Transfers that were made of it stay."""
        self._side = None


class nixl_xfer_handle:
    """A transfer, which is posted, asked for its state, and posted again. One that is dropped goes on to its end."""

    __slots__ = ("_xfer",)

    def __init__(self, xfer: Xfer) -> None:
        self._xfer: Optional[Xfer] = xfer

    def release(self) -> None:
        """Raises `nixlNotAllowedError` while the transfer is under way: it cannot be called back, and ends by its
        deadline."""
        if self._xfer is not None:
            self._xfer.release()
            self._xfer = None


def side_of(handle: nixl_prepped_dlist_handle) -> Side:
    if handle._side is None:
        raise nixlInvalidParamError("the descriptor list was released")
    return handle._side


def remote_of(handle: nixl_prepped_dlist_handle) -> Optional[Remote]:
    return handle._remote


def xfer_of(handle: nixl_xfer_handle) -> Xfer:
    if handle._xfer is None:
        raise nixlInvalidParamError("the handle was released")
    return handle._xfer
