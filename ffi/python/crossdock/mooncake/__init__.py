"""The names, arguments and return codes of Mooncake's `mooncake.engine`, over crossdock.

A program that says `from mooncake.engine import TransferEngine` runs with `from crossdock.mooncake import TransferEngine`
instead; or unchanged, after `crossdock.mooncake.install()`, which makes `mooncake.engine` mean this module. `python -m
crossdock.mooncake program.py ...`, or `-m MODULE ...`, does that for a program and its child processes; so does the folder that
`python -m crossdock.mooncake --path` prints, in front of PYTHONPATH.

What is different, because nothing here knows what Mooncake's metadata server does: peers are always named by `"ip:port"`,
as with `P2PHANDSHAKE`. Host memory alone is registered as long as there is no CUDA port. Notifications are not carried:
`get_notifies` has none, and a transfer that is to bring one fails. `CROSSDOCK_KEY` holds the key that all processes share;
without it anybody who can reach a process may write its registered memory, as with Mooncake.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import sys
import threading
import time
import types
from typing import Dict, List, NamedTuple, Optional, Sequence

from .._host import key_of_deployment, rdma_devices, require_host_memory
from ..endpoint import Endpoint, Transfer
from ..errors import Busy, Error, Late, TimedOut
from ..kinds import MemoryKind
from ..memory import Memory
from ._names import bind_of, peer_of, ports_for

_log = logging.getLogger("crossdock.mooncake")

# How long `close` waits for a peer that does not answer.
CLOSE_SECONDS = 2.0

SUPPORT_EFA = SUPPORT_HIP = SUPPORT_MNNVL = SUPPORT_INTRA_NVLINK = SUPPORT_CUDA = False


class TransferOpcode(enum.IntEnum):
    """Which way bytes move."""

    Read = 0
    Write = 1


Read, Write = TransferOpcode.Read, TransferOpcode.Write


class TransferNotify:
    """What a transfer would tell the peer."""

    def __init__(self, name: str = "", msg: str = "") -> None:
        self.name = name
        self.msg = msg


class _Batch(NamedTuple):
    transfer: Transfer
    settle_by: float
    """When a failure is told though the peer may still touch this process's memory: after the transfer's time twice."""


class TransferEngine:
    """One process's end: initialize, register memory, transfer. Calls answer 0 for success and do not raise.

    A failure is told when nothing of the transfer can touch this process's memory any more; of a peer that stands
    still, after the transfer's time once more, and the log says so. Such memory is free once `unregister_memory` has
    answered 0.
    """

    TransferOpcode = TransferOpcode

    def __init__(self) -> None:
        # As Mooncake reads it: at least 5 seconds.
        self._seconds = max(5.0, float(os.environ.get("MC_TRANSFER_TIMEOUT", 30)))
        self._endpoint: Optional[Endpoint] = None
        self._lock = threading.Lock()
        self._memories: Dict[int, Memory] = {}
        self._batches: Dict[int, _Batch] = {}
        self._next_batch = 1

    def initialize(self, local_hostname: str, metadata_server: str, protocol: str, device_name: Optional[str]) -> int:
        """Opens the ports of a protocol (`"rdma"`, `"tcp"`) at this host's address. -1 if that cannot be."""
        if metadata_server != "P2PHANDSHAKE":
            _log.warning("metadata server %r is not asked: peers are named by ip:port", metadata_server)
        try:
            endpoint = Endpoint(
                f"{local_hostname}-{os.getpid()}",
                key=key_of_deployment(),
                bind=bind_of(local_hostname),
                ports=ports_for(protocol, device_name or ""),
            )
        except (Error, OSError, ValueError) as error:
            _log.error("initialize: %s", error)
            return -1
        with self._lock:
            if self._endpoint is not None:
                endpoint.close()
                _log.error("initialize: this engine is initialized already")
                return -1
            self._endpoint = endpoint
        return 0

    def initialize_ext(
        self, local_hostname: str, metadata_server: str, protocol: str, device_name: Optional[str], metadata_type: str
    ) -> int:
        del metadata_type
        return self.initialize(local_hostname, metadata_server, protocol, device_name)

    def get_rpc_port(self) -> int:
        """The port of `"ip:port"`, by which peers name this process."""
        return 0 if self._endpoint is None else int(self._endpoint.address.rpartition(":")[2])

    def register_memory(self, buffer_addr: int, capacity: int, location: str = "*") -> int:
        """Registers memory of this process, which stays where it is until it is unregistered. 0, or -1."""
        del location
        return self.batch_register_memory([buffer_addr], [capacity])

    def unregister_memory(self, buffer_addr: int) -> int:
        return self.batch_unregister_memory([buffer_addr])

    def batch_register_memory(
        self, buffer_addresses: Sequence[int], capacities: Sequence[int], location: str = "*"
    ) -> int:
        """All of them or, with -1, none."""
        del location
        registered: List[int] = []
        try:
            if len(buffer_addresses) != len(capacities):
                raise ValueError(f"{len(buffer_addresses)} addresses and {len(capacities)} capacities")
            for address, nbytes in zip(buffer_addresses, capacities):
                self._register(int(address), int(nbytes))
                registered.append(int(address))
        except (Error, OSError, ValueError) as error:
            _log.error("register_memory: %s", error)
            self.batch_unregister_memory(registered)
            return -1
        return 0

    def _register(self, address: int, nbytes: int) -> None:
        require_host_memory(address, nbytes)
        memory = Memory.at(address, nbytes)
        self._opened().register(memory)
        with self._lock:
            self._memories[address] = memory

    def batch_unregister_memory(self, buffer_addresses: Sequence[int]) -> int:
        """Waits until nobody can reach them any more. 0, or -1 if that is not so of some of them; where a peer does not
        answer for 30 seconds, ask again."""
        failed = 0
        for address in buffer_addresses:
            try:
                self._opened().unregister(int(address))
                with self._lock:
                    memory = self._memories.pop(int(address), None)
                if memory is not None:
                    memory.close()
            except (Error, KeyError, ValueError) as error:
                _log.error("unregister_memory: %s", error)
                failed = -1
        return failed

    def transfer_sync_write(
        self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int, transport_hint: str = ""
    ) -> int:
        """Writes to the peer, and waits. 0, or -1."""
        return self.transfer_sync(target_hostname, buffer, peer_buffer_address, length, Write)

    def transfer_sync_read(
        self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int, transport_hint: str = ""
    ) -> int:
        """Reads from the peer, and waits. 0, or -1."""
        return self.transfer_sync(target_hostname, buffer, peer_buffer_address, length, Read)

    def transfer_sync(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        opcode: int,
        notify: Optional[TransferNotify] = None,
        transport_hint: str = "",
    ) -> int:
        return self.batch_transfer_sync(target_hostname, [buffer], [peer_buffer_address], [length], opcode, notify)

    def batch_transfer_sync_write(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Writes blocks to the peer, and waits for all of them. 0, or -1."""
        return self.batch_transfer_sync(target_hostname, buffers, peer_buffer_addresses, lengths, Write)

    def batch_transfer_sync_read(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        return self.batch_transfer_sync(target_hostname, buffers, peer_buffer_addresses, lengths, Read)

    def batch_transfer_sync(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        opcode: int,
        notify: Optional[TransferNotify] = None,
        transport_hint: str = "",
    ) -> int:
        if notify is not None:
            _log.error("transfer: notifications are not carried")
            return -1
        begun = self._begin(target_hostname, buffers, peer_buffer_addresses, lengths, opcode)
        return -1 if begun is None else self._finish(begun)

    def batch_transfer_async_write(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Begins to write, and gives the batch's number; 0 if it was not begun."""
        return self.batch_transfer_async(target_hostname, buffers, peer_buffer_addresses, lengths, Write)

    def batch_transfer_async_read(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        return self.batch_transfer_async(target_hostname, buffers, peer_buffer_addresses, lengths, Read)

    def batch_transfer_async(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        opcode: int,
        transport_hint: str = "",
    ) -> int:
        begun = self._begin(target_hostname, buffers, peer_buffer_addresses, lengths, opcode)
        if begun is None:
            return 0
        with self._lock:
            batch = self._next_batch
            self._next_batch += 1
            self._batches[batch] = begun
        return batch

    def get_batch_transfer_status(self, batch_ids: Sequence[int]) -> int:
        """Waits until all of them have ended: 0, or -1 if one has failed. They are forgotten with that."""
        failed = 0
        for batch in batch_ids:
            with self._lock:
                begun = self._batches.pop(batch, None)
            if begun is None or self._finish(begun) != 0:
                failed = -1
        return failed

    def transfer_submit_write(
        self, target_hostname: str, buffer: int, peer_buffer_address: int, length: int, transport_hint: str = ""
    ) -> int:
        """Begins to write, and gives the batch's number; -1 if it was not begun."""
        return self.batch_transfer_async(target_hostname, [buffer], [peer_buffer_address], [length], Write) or -1

    def transfer_check_status(self, batch_id: int) -> int:
        """1 when it is done, 0 while it is not, -1 if it has failed, -2 if its time is over. It is forgotten with the first
        answer but 0."""
        # One thread asks about it at a time: it is put back while it is under way.
        with self._lock:
            begun = self._batches.pop(batch_id, None)
        if begun is None:
            return -1
        answer = 1
        try:
            is_over = begun.transfer.poll()
        except Error as error:
            answer, is_over = -2 if isinstance(error, Late) else -1, _is_settled(begun, 0)
            if is_over:
                _log.error("transfer: %s", error)
        if not is_over:
            with self._lock:
                self._batches[batch_id] = begun
            return 0
        begun.transfer.close()
        return answer

    def send_probe(self, peer_server_name: str) -> int:
        """0 if the peer answers."""
        return self.batch_transfer_sync(peer_server_name, [], [], [], Write)

    def get_notifies(self) -> List[TransferNotify]:
        return []

    def get_local_topology(self, device_name: Optional[str] = None) -> str:
        """Which devices are near to which memory, as JSON in Mooncake's form; here, one entry for all memory."""
        devices = [name for name in (device_name or "").split(",") if name] or rdma_devices()
        return json.dumps({"cpu:0": [devices, []]})

    def allocate_managed_buffer(self, length: int) -> int:
        """Memory that peers on this host can map, registered; its address, or 0."""
        try:
            memory = Memory(length)
            self._opened().register(memory)
        except (Error, ValueError) as error:
            _log.error("allocate_managed_buffer: %s", error)
            return 0
        with self._lock:
            self._memories[memory.address] = memory
        return memory.address

    def free_managed_buffer(self, buffer_addr: int, length: int) -> int:
        del length
        return self.unregister_memory(buffer_addr)

    def write_bytes_to_buffer(self, dest_address: int, src_ptr: bytes, length: int) -> int:
        from .._abi import ffi

        ffi.memmove(ffi.cast("char *", dest_address), src_ptr, length)
        return 0

    def read_bytes_from_buffer(self, source_address: int, length: int) -> bytes:
        from .._abi import ffi

        return bytes(ffi.buffer(ffi.cast("char *", source_address), length))

    def get_engine(self) -> TransferEngine:
        return self

    def close(self) -> int:
        """Not one of Mooncake's calls: takes all memory back and says goodbye to all peers. 0, or -1 while a peer that
        does not answer can still reach memory that was registered, which the log names: call it again."""
        until, failed = time.monotonic() + CLOSE_SECONDS, 0
        with self._lock:
            endpoint, memories = self._endpoint, dict(self._memories)
        for address, memory in memories.items():
            # What was allocated here stays mapped as long as anybody reaches it.
            if endpoint is None or memory.kind != MemoryKind.PRIVATE:
                continue
            try:
                endpoint.unregister(address, max(0.0, until - time.monotonic()))
                memory.close()
            except (Busy, TimedOut):
                _log.error("close: a peer can still reach %d bytes at %#x", memory.nbytes, address)
                failed = -1
                continue
            except Error:
                # Another thread takes it back too.
                pass
            with self._lock:
                self._memories.pop(address, None)
        if not failed:
            self._drop()
        return failed

    def _drop(self) -> None:
        with self._lock:
            endpoint, self._endpoint = self._endpoint, None
            memories, self._memories = self._memories, {}
        if endpoint is not None:
            endpoint.close()
        for memory in memories.values():
            try:
                memory.close()
            except Error as error:
                _log.error("%d bytes at %#x: %s", memory.nbytes, memory.address, error)

    def __del__(self) -> None:
        try:
            self._drop()
        except Exception:
            # At the end of the interpreter there is nobody to tell.
            pass

    def _opened(self) -> Endpoint:
        if self._endpoint is None:
            raise ValueError("the engine is not initialized")
        return self._endpoint

    def _begin(
        self,
        target: str,
        buffers: Sequence[int],
        peers: Sequence[int],
        lengths: Sequence[int],
        opcode: int,
    ) -> Optional[_Batch]:
        """`None` if it was not begun: the log says why."""
        try:
            endpoint = self._opened()
            begin = endpoint.write if opcode == Write else endpoint.read
            # As Mooncake counts: its time, and a second for each GiB.
            seconds = self._seconds + float(sum(lengths)) / 2**30
            transfer = begin(peer_of(target), buffers, peers, lengths, deadline=seconds)
        except (Error, OSError, ValueError, OverflowError) as error:
            _log.error("transfer to %s: %s", target, error)
            return None
        return _Batch(transfer, time.monotonic() + 2 * seconds)

    def _finish(self, begun: _Batch) -> int:
        failed = 0
        try:
            begun.transfer.wait()
        except Error as error:
            _log.error("transfer: %s", error)
            _is_settled(begun, max(0.0, begun.settle_by - time.monotonic()))
            failed = -1
        begun.transfer.close()
        return failed


def _is_settled(begun: _Batch, seconds: float) -> bool:
    """Whether a failure may be told: Mooncake's callers use the memory again then."""
    try:
        begun.transfer.wait_quiet(seconds)
    except TimedOut:
        if time.monotonic() < begun.settle_by:
            return False
        _log.error("a failed transfer may still touch this process's memory, until that is unregistered")
    except Error:
        # Nobody will ever know more.
        pass
    return True


def alias_path() -> str:
    """A folder for PYTHONPATH, in which `mooncake.engine` is this module."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "alias")


def install() -> None:
    """Makes `mooncake.engine` mean this module, for the programs of this process that import it from now on."""
    package = sys.modules.get("mooncake") or types.ModuleType("mooncake")
    if not hasattr(package, "__path__"):
        package.__path__ = []
    setattr(package, "engine", sys.modules[__name__])
    sys.modules["mooncake"] = package
    sys.modules["mooncake.engine"] = sys.modules[__name__]
