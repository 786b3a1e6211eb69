"""What `nixl._api` holds: the agent."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy

from .. import errors
from .._abi import forked, process
from .._host import bind_host, key_of_deployment, ports_of
from ..endpoint import Endpoint
from . import _bindings as nixlBind
from ._absent import Absent
from ._bindings import (
    DEFAULT_COMM_PORT,
    DRAM_SEG,
    _DList,
    nixl_mem_t,
    nixlInvalidParamError,
    nixlNotAllowedError,
    nixlNoTelemetryError,
    nixlNotFoundError,
    nixlNotSupportedError,
    nixlRegDList,
    nixlRemoteDisconnectError,
    nixlXferDList,
    nixlXferTelemetry,
    numbers_of,
    rows_of,
)
from ._config import (
    nixl_agent_config,
    nixl_backend_handle,
    nixl_prepped_dlist_handle,
    nixl_thread_sync_t,
    nixl_xfer_handle,
    remote_of,
    side_of,
    xfer_of,
)
from ._descs import descs_of, kind_of
from ._errors import translated
from ._memory import Memories, regions_of
from ._notify import Notifier
from ._regions import Side
from ._remotes import Remote, Remotes
from ._wire import MAX_NAME_BYTES, Metadata, list_from, list_to_bytes, metadata_from
from ._xfer import Blocks, Finisher, Means, Xfer

__all__ = [
    "DEFAULT_COMM_PORT",
    "nixlBind",
    "nixl_agent",
    "nixl_agent_config",
    "nixl_backend_handle",
    "nixl_prepped_dlist_handle",
    "nixl_thread_sync_t",
    "nixl_xfer_handle",
]

_log = logging.getLogger("crossdock.nixl")

# UCX is the name that programs ask for. There is one transport under all names.
BACKENDS = ("UCX", "CROSSDOCK")
# Of UCX, and without meaning here.
_IGNORED_PARAMS = {"num_threads", "num_workers", "engine_config", "ucx_error_handling_mode"}
_DEVICE_PARAMS = ("device_list", "ucx_devices")

# As long as a peer that is alive takes to let go.
CLOSE_SECONDS = 2.0

_open_agents: weakref.WeakSet[nixl_agent] = weakref.WeakSet()


class nixl_agent(Absent):
    """One process's end. Order of calls: create_backend (unless the configuration names one), register_memory, exchange
    of metadata, prep_xfer_dlist, make_prepped_xfer, transfer, check_xfer_state, release_xfer_handle. Any thread
    may call.
    """

    def __init__(
        self, agent_name: str, nixl_conf: Optional[nixl_agent_config] = None, instantiate_all: bool = False
    ) -> None:
        self._is_closed = True
        if not agent_name:
            raise ValueError("an agent has a name")
        if len(agent_name.encode()) > MAX_NAME_BYTES:
            raise nixlInvalidParamError(f"a name of {len(agent_name.encode())} bytes; {MAX_NAME_BYTES} are the most")
        config = nixl_conf or nixl_agent_config()
        if config.enable_listen:
            raise nixlNotSupportedError(
                "the listener for metadata (enable_listen_thread): hand get_agent_metadata() over by a channel of yours"
            )
        self.name = agent_name
        self.notifs: Dict[str, List[bytes]] = {}
        self.backends: Dict[str, nixl_backend_handle] = {}
        self.backend_options: Dict[str, Dict[str, str]] = {}
        self.plugin_list = list(BACKENDS)
        self._captures = config.capture_telemetry
        self._seconds = max(1.0, float(os.environ.get("CROSSDOCK_NIXL_TIMEOUT", 30)))
        self._incarnation = os.urandom(16)
        self._host, self._key = bind_host(), key_of_deployment()
        # Of the backends, and of `notifs`.
        self._lock = threading.Lock()
        self._remotes = Remotes(agent_name)
        # It must not hold the agent, which nobody could collect then.
        self._notifier = Notifier(agent_name, self._incarnation, self._host, self._key, self._remotes.lose)
        self._finisher = Finisher()
        # With the first backend.
        self._means: Optional[Means] = None
        self._pid = process.pid
        self._is_closed = False
        _open_agents.add(self)
        # All names mean the same transport: more than one of them is no use.
        for backend in self.plugin_list[:1] if instantiate_all and nixl_conf is None else config.backends:
            if backend in self.plugin_list:
                self.create_backend(backend)
            else:
                _log.warning("there is no backend %r: %s", backend, ", ".join(BACKENDS))

    # Backends.

    def get_plugin_list(self) -> List[str]:
        return self.plugin_list

    def get_plugin_mem_types(self, backend: str) -> List[str]:
        return [DRAM_SEG.name] if backend in self.plugin_list else []

    def get_plugin_params(self, backend: str) -> Dict[str, str]:
        return {"device_list": ""} if backend in self.plugin_list else {}

    def get_backend_mem_types(self, backend: str) -> List[str]:
        return [DRAM_SEG.name] if backend in self.backends else []

    def get_backend_params(self, backend: str) -> Dict[str, str]:
        return self.backend_options.get(backend, {})

    def create_backend(self, backend: str, initParams: Optional[Dict[str, str]] = None) -> None:
        """Opens the ports. `device_list` names RDMA devices (`"mlx5_0,mlx5_1:1"`); all are used if it is left out."""
        self._require_here()
        params = dict(initParams or {})
        if backend not in self.plugin_list:
            raise nixlNotFoundError(f"there is no backend {backend!r}: {', '.join(BACKENDS)}")
        unknown = set(params) - _IGNORED_PARAMS - set(_DEVICE_PARAMS)
        if unknown:
            raise nixlInvalidParamError(f"backend {backend!r} has no parameter {sorted(unknown)[0]!r}")
        with self._lock:
            if self._means is not None:
                raise nixlInvalidParamError(f"a backend is there already: {', '.join(self.backends)}")
            devices = next((params[name] for name in _DEVICE_PARAMS if params.get(name)), "")
            bind = f"[{self._host}]:0" if ":" in self._host else f"{self._host}:0"
            try:
                endpoint = Endpoint(self.name, key=self._key, bind=bind, ports=ports_of(devices))
            except errors.Error as error:
                raise translated(error) from error
            memories = Memories(endpoint)
            self._means = Means(endpoint, memories, self._remotes, self._notifier, self._finisher, self._seconds)
            self.backends[backend] = len(self.backends) + 1
            self.backend_options[backend] = params

    # Memory.

    def get_reg_descs(self, descs: Any, mem_type: Optional[str] = None) -> Optional[nixlRegDList]:
        """Of tensors or NumPy arrays, or, with a `mem_type`, of tuples (address, bytes, device, anything) or an array
        `[count, 3]`. `None`, and a log line, where it is none of these."""
        return descs_of(nixlRegDList, descs, mem_type)

    def get_xfer_descs(self, descs: Any, mem_type: Optional[str] = None) -> Optional[nixlXferDList]:
        """As `get_reg_descs`, of tuples (address, bytes, device)."""
        return descs_of(nixlXferDList, descs, mem_type)

    def register_memory(
        self, reg_list: Any, mem_type: Optional[str] = None, backends: Sequence[str] = ()
    ) -> nixlRegDList:
        """Registers memory, which stays where it is until it is deregistered: all of it or, with an error, nothing.
        Peers learn of it by metadata that is made afterwards."""
        descs: nixlRegDList = _required(self.get_reg_descs(reg_list, mem_type), "memory to register")
        _require_dram(descs.getType())
        self._opened(backends).memories.register(regions_of(descs))
        return descs

    def deregister_memory(self, dereg_list: nixlRegDList, backends: Sequence[str] = ()) -> None:
        """Waits until no peer can reach the memory any more. Of a peer that does not answer it raises
        `nixlNotAllowedError` after 30 seconds: the memory goes on leaving, and the same call waits on."""
        descs = _required(self.get_reg_descs(dereg_list), "memory to deregister")
        self._opened(backends).memories.deregister(regions_of(descs))

    def query_memory(
        self, reg_list: Any, backend: str, mem_type: Optional[str] = None
    ) -> List[Optional[Dict[str, str]]]:
        """For each piece of memory what is known of it, or `None` if it is not registered."""
        descs = _required(self.get_reg_descs(reg_list, mem_type), "memory to ask for")
        memories = self._opened([backend]).memories
        return [
            {"address": str(region[0]), "length": str(region[1])} if memories.holds(region) else None
            for region in regions_of(descs)
        ]

    # Metadata.

    def get_agent_metadata(self) -> bytes:
        """Who this agent is, and all that is registered now: peers need it anew after each registration."""
        return self._metadata(self._opened().memories.regions().rows, True, True)

    def get_partial_agent_metadata(
        self, descs: Any, inc_conn_info: bool = False, backends: Sequence[str] = ()
    ) -> bytes:
        """As `get_agent_metadata`, of some memory alone; peers add it to what they know."""
        memories = self._opened(backends).memories
        rows = numpy.zeros((0, 3), numpy.uint64)
        if descs is not None and len(descs):
            given = _required(self.get_reg_descs(descs), "memory to tell of")
            memories.require(regions_of(given))
            rows = rows_of(given)
        return self._metadata(rows, inc_conn_info, False)

    def _metadata(self, rows: Any, has_connection: bool, is_whole: bool) -> bytes:
        endpoint = self._opened().endpoint
        address, notifications = (endpoint.address, self._notifier.address) if has_connection else ("", "")
        return Metadata(self.name, self._incarnation, address, notifications, rows, is_whole).to_bytes()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Takes another agent's metadata in, whole or partial, and tells its name. Of an agent that was restarted the
        old handles are void."""
        self._require_here()
        told = metadata_from(metadata)
        before = self._remotes.add(told)
        if before is not None:
            self._notifier.forget(before)
        return told.name.encode()

    def remove_remote_agent(self, agent: Union[str, bytes]) -> None:
        """Forgets an agent. Handles that were made for it are void."""
        known = self._remotes.remove(_name(agent))
        if known is not None:
            self._notifier.forget(known.peer)

    def check_remote_metadata(self, agent: Union[str, bytes], descs: Optional[nixlXferDList] = None) -> bool:
        """Whether an agent, and memory of it, is known. One that was lost is not: add its metadata again."""
        known = self._remotes.find(_name(agent))
        if known is None:
            return False
        try:
            if descs is not None and len(descs):
                _require_dram(descs.getType())
                Side(rows_of(descs), known.regions, known.peer.name)
        except (nixlNotFoundError, nixlNotSupportedError):
            return False
        return True

    def make_connection(self, remote_agent: Union[str, bytes], backends: Sequence[str] = ()) -> None:
        """Connects, so that the first transfer need not. Raises `nixlRemoteDisconnectError` if the agent does not
        answer."""
        endpoint, remote = self._opened(backends).endpoint, self._remotes.known(_name(remote_agent))
        none = numpy.zeros(0, numpy.uint64)
        try:
            with endpoint.write(remote.address, none, none, none, deadline=self._seconds) as probe:
                probe.wait()
        except errors.Error as error:
            raise nixlRemoteDisconnectError(f"{remote.peer.name!r} at {remote.address}: {error}") from error

    # Transfers.

    def prep_xfer_dlist(
        self,
        agent_name: Union[str, bytes],
        xfer_list: Any,
        mem_type: Optional[str] = None,
        backends: Sequence[str] = (),
    ) -> nixl_prepped_dlist_handle:
        """Checks descriptors: of this agent (`""` or `"NIXL_INIT_AGENT"`), or of another one. Beside what
        `get_xfer_descs` takes, an array `[count, 5]` of runs: address, bytes, device, stride, blocks."""
        name = _name(agent_name)
        self._opened(backends)
        if isinstance(xfer_list, numpy.ndarray) and xfer_list.ndim == 2 and xfer_list.shape[1] == 5:
            if mem_type is None:
                raise ValueError("runs of descriptors say no kind of memory: give mem_type")
            _require_dram(kind_of(mem_type))
            rows = numbers_of(xfer_list, "descriptors")
        else:
            descs = _required(self.get_xfer_descs(xfer_list, mem_type), "descriptors")
            _require_dram(descs.getType())
            rows = rows_of(descs)
        if name in ("", "NIXL_INIT_AGENT"):
            return nixl_prepped_dlist_handle(self._own_side(rows), None)
        remote = self._remotes.known(name)
        return nixl_prepped_dlist_handle(Side(rows, remote.regions, f"agent {name!r}"), remote)

    def make_prepped_xfer(
        self,
        operation: str,
        local_xfer_side: nixl_prepped_dlist_handle,
        local_indices: Any,
        remote_xfer_side: nixl_prepped_dlist_handle,
        remote_indices: Any,
        notif_msg: Union[bytes, str] = b"",
        backends: Sequence[str] = (),
        skip_desc_merge: bool = False,
    ) -> nixl_xfer_handle:
        """A transfer of the descriptors with these numbers, pair by pair. `notif_msg` reaches the other agent once the
        bytes are where they are to be."""
        del skip_desc_merge
        here, there = side_of(local_xfer_side), side_of(remote_xfer_side)
        remote = remote_of(remote_xfer_side)
        if remote_of(local_xfer_side) is not None or remote is None:
            raise nixlInvalidParamError("the first list has to be of this agent, the second of another one")
        local, remotely = here.take(local_indices, "local"), there.take(remote_indices, "remote")
        return self._made(operation, remote, local, remotely, notif_msg, backends)

    def initialize_xfer(
        self,
        operation: str,
        local_descs: nixlXferDList,
        remote_descs: nixlXferDList,
        remote_agent: Union[str, bytes],
        notif_msg: Union[bytes, str] = b"",
        backends: Sequence[str] = (),
    ) -> nixl_xfer_handle:
        """As prep_xfer_dlist of both sides and make_prepped_xfer of all of them."""
        for descs in (local_descs, remote_descs):
            if not isinstance(descs, nixlXferDList):
                raise TypeError(f"a {type(descs).__name__} is no nixlXferDList")
            _require_dram(descs.getType())
        self._opened(backends)
        remote = self._remotes.known(_name(remote_agent))
        local = self._own_side(rows_of(local_descs)).all()
        remotely = Side(rows_of(remote_descs), remote.regions, f"agent {remote.peer.name!r}").all()
        return self._made(operation, remote, local, remotely, notif_msg, backends)

    def _own_side(self, rows: Any) -> Side:
        return Side(rows, self._opened().memories.regions(), "this agent")

    def _made(
        self,
        operation: str,
        remote: Remote,
        local: Tuple[Any, Any],
        remotely: Tuple[Any, Any],
        notif_msg: Union[bytes, str],
        backends: Sequence[str],
    ) -> nixl_xfer_handle:
        (here, lengths), (there, lengths_there) = local, remotely
        if not len(here) or len(here) != len(there):
            raise nixlInvalidParamError(f"{len(here)} descriptors here and {len(there)} there")
        if not numpy.array_equal(lengths, lengths_there):
            bad = int(numpy.flatnonzero(lengths != lengths_there)[0])
            raise nixlInvalidParamError(
                f"descriptor {bad} has {int(lengths[bad])} bytes here and {int(lengths_there[bad])} there"
            )
        blocks = Blocks(here, there, lengths)
        return nixl_xfer_handle(Xfer(self._opened(backends), remote, operation, blocks, _message(notif_msg)))

    def transfer(self, handle: nixl_xfer_handle, notif_msg: Union[bytes, str] = b"") -> str:
        """Posts a transfer: "DONE", "PROC" or "ERR". A handle has one post at a time. One that ended with "ERR" is not
        posted again: what it raises says why."""
        self._require_here()
        return xfer_of(handle).post(_message(notif_msg))

    def check_xfer_state(self, handle: nixl_xfer_handle) -> str:
        """`DONE`: the bytes are there, and the notification is in the other agent's inbox. `ERR`: they are not, the log
        says why, and nothing of it touches this process's memory any more. `PROC`: neither yet."""
        self._require_here()
        return xfer_of(handle).state()

    def get_xfer_telemetry(self, handle: nixl_xfer_handle) -> nixlXferTelemetry:
        """Of a transfer that is done. Raises `nixlNoTelemetryError` if the agent captures none."""
        if not self._captures:
            raise nixlNoTelemetryError("the agent was made without capture_telemetry")
        return xfer_of(handle).telemetry()

    def estimate_xfer_cost(self, req_handle: nixl_xfer_handle) -> Tuple[int, int, str]:
        """Duration and error margin in microseconds, and the method. Nothing is estimated here."""
        xfer_of(req_handle)
        return 0, 0, "UNKNOWN"

    def query_xfer_backend(self, handle: nixl_xfer_handle) -> str:
        xfer_of(handle)
        return next(iter(self.backends))

    def release_xfer_handle(self, handle: nixl_xfer_handle) -> None:
        handle.release()

    def release_dlist_handle(self, handle: nixl_prepped_dlist_handle) -> None:
        handle.release()

    # Notifications.

    def get_new_notifs(self, backends: Sequence[str] = ()) -> Dict[str, List[bytes]]:
        """What has come since the last call, by the names of the agents that sent it, in their order."""
        self._require_here()
        self._require_backends(backends)
        return self._notifier.take()

    def update_notifs(self, backends: Sequence[str] = ()) -> Dict[str, List[bytes]]:
        """Adds what has come to `notifs`, and tells them all."""
        with self._lock:
            for name, messages in self.get_new_notifs(backends).items():
                self.notifs.setdefault(name, []).extend(messages)
            return self.notifs

    def check_remote_xfer_done(
        self,
        remote_agent_name: Union[str, bytes],
        lookup_tag: bytes,
        backends: Sequence[str] = (),
        tag_is_prefix: bool = True,
    ) -> bool:
        """Whether a notification that begins with the tag, or holds it, has come; it is taken out of `notifs`."""
        messages = self.update_notifs(backends).get(_name(remote_agent_name), [])
        with self._lock:
            for at, message in enumerate(messages):
                if message.startswith(lookup_tag) if tag_is_prefix else lookup_tag in message:
                    del messages[at]
                    return True
        return False

    def send_notif(
        self, remote_agent_name: Union[str, bytes], notif_msg: Union[bytes, str], backend: Optional[str] = None
    ) -> None:
        """Queues a notification that belongs to no transfer. Raises where the agent was not to be reached a moment ago;
        what fails later is logged."""
        self._require_here()
        self._require_backends([] if backend is None else [backend])
        peer = self._remotes.known(_name(remote_agent_name)).peer
        self._notifier.send(peer, _message(notif_msg), self._seconds, is_reported=False)

    # Descriptors as bytes.

    def get_serialized_descs(self, descs: _DList) -> bytes:
        return list_to_bytes(descs)

    def deserialize_descs(self, serialized_descs: bytes) -> _DList:
        """Raises `nixlMismatchError` for what `get_serialized_descs` has not made."""
        return list_from(serialized_descs)

    # The end.

    def close(self) -> None:
        """Not one of NIXL's calls: sends what is queued, for a second at most, takes all memory back and says goodbye to
        all peers. Raises `nixlNotAllowedError` while a peer that does not answer can still reach some of the memory:
        nothing but `close` may be called then, which asks again."""
        if self._means is not None and self._pid == process.pid:
            self._hush()
            self._means.memories.end(CLOSE_SECONDS)
        self._drop()

    def _hush(self) -> None:
        self._is_closed = True
        self._finisher.close()
        self._notifier.close()

    def _drop(self) -> None:
        """The end, whoever can reach the memory: for programs that end, and agents that nobody holds."""
        if self._pid != process.pid:
            return
        self._hush()
        if self._means is not None:
            self._means.endpoint.close()
            self._means.memories.drop()

    def __del__(self) -> None:
        try:
            self._drop()
        except Exception:
            # It was never made whole; or at the end of the interpreter there is nobody to tell.
            pass

    def _require_here(self) -> None:
        if self._pid != process.pid:
            raise forked(self)
        if self._is_closed:
            raise nixlNotAllowedError("the agent was closed")

    def _require_backends(self, backends: Sequence[str]) -> None:
        for backend in backends:
            if backend not in self.backends:
                raise nixlNotFoundError(f"backend {backend!r} was not created")

    def _opened(self, backends: Sequence[str] = ()) -> Means:
        self._require_here()
        self._require_backends(backends)
        if self._means is None:
            raise nixlNotFoundError("no backend was created: create_backend('UCX')")
        return self._means


def _require_dram(kind: nixl_mem_t) -> None:
    if kind != DRAM_SEG:
        raise nixlNotSupportedError(f"{kind.name}: host memory (DRAM) alone is moved as long as there is no CUDA port")


def _required(descs: Any, what: str) -> Any:
    if descs is None:
        raise TypeError(
            f"{what}: give tensors, arrays, tuples with a mem_type, or a descriptor list; the log says more"
        )
    return descs


def _name(agent: Union[str, bytes]) -> str:
    return agent.decode() if isinstance(agent, (bytes, bytearray)) else agent


def _message(given: Union[bytes, str]) -> bytes:
    return given.encode() if isinstance(given, str) else bytes(given)


def _close_all() -> None:
    """At the end of the program: what is queued is sent, and peers are told goodbye."""
    for agent in list(_open_agents):
        agent._drop()


atexit.register(_close_all)
