"""Writes and reads between registered memories, by address, without pages or rooms."""

from __future__ import annotations

from array import array
from typing import Any, Dict, Optional, Sequence, Tuple, Union, cast

from ._abi import BAD_ARGUMENT, OK, PENDING, check, failure, ffi, forked, lib, made, milliseconds, process, text_bytes
from ._abi import text_or_null, told_text, waited
from .errors import BadArgument, BadHandle, Busy
from .memory import Memory

Numbers = Union[Sequence[int], Any]
"""`[count]` numbers: a list, or an array of 64-bit integers (NumPy, array.array), which is passed as it is."""

_poll = lib.crossdock_transfer_poll


class Transfer:
    """A transfer that was begun. One that is closed goes on to its end."""

    __slots__ = ("_handle", "_pid")

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._pid = process.pid

    def poll(self) -> bool:
        """Whether all bytes are there. Raises what it failed with."""
        status = _poll(self.handle())
        if status == OK:
            return True
        if status == PENDING:
            return False
        raise failure(status)

    def wait(self, timeout: Optional[float] = None) -> None:
        """Until all bytes are there: `UnknownAddress`, `Late`, `Lost` or `Refused` say why they are not. A transfer has a
        deadline of its own, by which it has ended."""
        waited(lib.crossdock_transfer_wait, self.handle(), timeout=timeout, what="the transfer did not end")

    def wait_quiet(self, timeout: Optional[float] = None) -> None:
        """Until nothing of it can touch this process's memory any more: with its end, if that was good; after a fault
        later."""
        waited(lib.crossdock_transfer_wait_quiet, self.handle(), timeout=timeout, what="the transfer moves still")

    def handle(self) -> int:
        if self._pid != process.pid:
            raise forked(self)
        if not self._handle:
            raise BadHandle("the transfer was closed", "use it only until then", 2)
        return self._handle

    def close(self) -> None:
        if self._handle and self._pid == process.pid:
            handle, self._handle = self._handle, 0
            lib.crossdock_transfer_close(handle)

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Endpoint:
    """One process's end. Whoever connects may write and read all memory that is registered, as long as the session lasts.

    `key` is what all endpoints share, at least 16 bytes; `None` lets anybody in.
    """

    __slots__ = ("_handle", "_pid", "_memories", "address", "__weakref__")

    def __init__(
        self,
        name: str,
        *,
        key: Optional[bytes],
        bind: Optional[str] = None,
        advertise: Optional[str] = None,
        ports: Optional[str] = None,
        lanes_per_rail: int = 0,
        copy_threads: int = 0,
        heartbeat: Optional[float] = None,
        heartbeats_missed: int = 0,
        max_transfers: int = 0,
    ) -> None:
        self._handle = 0
        options = made("crossdock_endpoint_options")
        options.name = called = text_or_null(name)
        options.authentication = (
            lib.CROSSDOCK_AUTHENTICATION_OFF if key is None else lib.CROSSDOCK_AUTHENTICATION_KEY
        )
        if key is not None:
            options.key = secret = ffi.new("uint8_t[]", key)
            options.key_bytes = len(key)
        options.bind = where = text_or_null(bind)
        options.advertise = told = text_or_null(advertise)
        options.ports = chosen = text_or_null(ports)
        options.lanes_per_rail = lanes_per_rail
        options.copy_threads = copy_threads
        options.heartbeat_ms = milliseconds(heartbeat)
        options.heartbeats_missed = heartbeats_missed
        options.max_transfers = max_transfers
        handle = ffi.new("crossdock_endpoint *")
        check(lib.crossdock_endpoint_open(options, handle))
        del called, where, told, chosen
        self._handle = handle[0]
        self._pid = process.pid
        self._memories: Dict[int, Tuple[Memory, bool]] = {}
        self.address: str = told_text(lib.crossdock_endpoint_address, self._handle)
        """What peers dial: `"ip:port"`."""

    def register(self, memory: Union[Memory, Any], timeout: float = 30.0) -> Memory:
        """Registers a `Memory`, or an array, which is kept until it is unregistered."""
        mine = memory if isinstance(memory, Memory) else Memory.of(memory)
        check(lib.crossdock_endpoint_register(self.handle(), mine.handle(), milliseconds(timeout)))
        self._memories[mine.address] = (mine, mine is not memory)
        return mine

    def unregister(self, memory: Union[Memory, int], timeout: float = 60.0) -> None:
        """Takes memory back, by itself or by where it begins, and waits until nobody can reach it through this endpoint
        any more. Sessions of peers that were told of it begin anew without it. With `TimedOut`, or with `Busy` of a
        peer that can still reach it after 30 seconds, it goes on leaving: ask again."""
        address = memory.address if isinstance(memory, Memory) else memory
        status = lib.crossdock_endpoint_unregister(self.handle(), address, milliseconds(timeout))
        # What was registered here and is not known any more has left after a call that was over before.
        if status != BAD_ARGUMENT or address not in self._memories:
            check(status)
        mine, is_own = self._memories.pop(address, (None, False))
        if mine is not None and is_own:
            mine.close()

    def write(self, peer: str, local: Numbers, remote: Numbers, nbytes: Numbers, deadline: float = 30.0) -> Transfer:
        """Begins to write blocks to the peer at `"ip:port"`: `[count]` addresses here, `[count]` there, and `[count]`
        lengths. None at all is a probe."""
        return self._begin(lib.CROSSDOCK_WRITE, peer, local, remote, nbytes, deadline)

    def read(self, peer: str, local: Numbers, remote: Numbers, nbytes: Numbers, deadline: float = 30.0) -> Transfer:
        """Begins to read blocks of the peer into addresses here."""
        return self._begin(lib.CROSSDOCK_READ, peer, local, remote, nbytes, deadline)

    def _begin(
        self, direction: int, peer: str, local: Numbers, remote: Numbers, nbytes: Numbers, deadline: float
    ) -> Transfer:
        here, there, long = _numbers(local), _numbers(remote), _numbers(nbytes)
        count = len(here)
        if len(there) != count or len(long) != count:
            raise BadArgument(f"{count} addresses here, {len(there)} there, and {len(long)} lengths", "", 3)
        options = made("crossdock_transfer_options")
        options.peer = who = ffi.new("char[]", text_bytes(peer))
        options.local, options.remote, options.bytes = here, there, long
        options.count = count
        options.deadline_ms = milliseconds(deadline)
        options.direction = direction
        handle = ffi.new("crossdock_transfer *")
        check(lib.crossdock_transfer_begin(self.handle(), options, handle))
        del who
        return Transfer(handle[0])

    def handle(self) -> int:
        if self._handle and self._pid != process.pid:
            raise forked(self)
        if not self._handle:
            raise BadHandle("the endpoint was closed", "use it only until then", 2)
        return self._handle

    def close(self) -> None:
        """Says goodbye to all peers; transfers that are under way end with `Abandoned`."""
        if self._handle and self._pid == process.pid:
            handle, self._handle = self._handle, 0
            lib.crossdock_endpoint_close(handle)
            memories, self._memories = self._memories, {}
            for mine, is_own in memories.values():
                if is_own:
                    try:
                        mine.close()
                    except Busy:
                        # A peer that does not answer can reach it still: it is kept until it cannot.
                        pass

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _numbers(given: Numbers) -> Any:
    """As C reads them. Arrays of 64-bit integers are passed as they are."""
    try:
        view = memoryview(cast(Any, given))
    except TypeError:
        return ffi.from_buffer("uint64_t[]", array("Q", given))
    if view.format in ("Q", "L", "q", "l") and view.itemsize == 8 and view.c_contiguous:
        return ffi.from_buffer("uint64_t[]", view)
    return ffi.from_buffer("uint64_t[]", array("Q", view.tolist()))
