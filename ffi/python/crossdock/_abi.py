"""The C ABI: its functions, and what every call of them needs."""

from __future__ import annotations

import importlib
import math
import os
import time
from typing import Any, Callable, Optional

from .errors import BY_STATUS, BadArgument, Error, Forked, TimedOut

# Made by maturin, or by dev.py.
_native: Any = importlib.import_module("._native", __package__)
ffi: Any = _native.ffi
lib: Any = _native.lib
NULL: Any = ffi.NULL

OK = 0
PENDING = 1
BAD_HANDLE = 2
BAD_ARGUMENT = 3
BUFFER_TOO_SMALL = 5
TIMED_OUT = 6
BUSY = 7

if lib.crossdock_abi_version() >> 16 != lib.CROSSDOCK_ABI_MAJOR:
    raise ImportError("the shared library of crossdock is of another major version than this package")

VERSION: str = ffi.string(lib.crossdock_version()).decode()

# So long a call of C waits without a look at Python: Ctrl-C, and whether the object has been closed.
_SLICE_MS = 250
_LONGEST_MS = 2**63


class Process:
    """The process that runs, known without a system call. What is made remembers it: in a forked child neither the
    threads of the library nor its locks are what they were."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.look()

    def look(self) -> None:
        self.pid = os.getpid()


process = Process()
os.register_at_fork(after_in_child=process.look)


def forked(what: object) -> Forked:
    name = type(what).__name__
    message = f"this {name} was made in the process that this one was forked from, and works only there"
    return Forked(message, "fork before it is made, or start processes by spawning them", 21)


def status_name(status: int) -> str:
    name: str = ffi.string(lib.crossdock_status_name(status)).decode()
    return name


def failure(status: int) -> Error:
    """The error of the call of this thread that has just answered so."""
    told = made("crossdock_error")
    lib.crossdock_last_error(told)
    if told.status != status:
        # It leaves no words; or what was collected meanwhile has left others.
        return BY_STATUS.get(status, Error)(status_name(status), "", status)
    message, advice = (ffi.string(words).decode() for words in (told.message, told.advice))
    return BY_STATUS.get(status, Error)(message, advice, status, bool(told.is_retryable))


def check(status: int) -> None:
    if status != OK:
        raise failure(status)


def check_closed(status: int) -> None:
    """Of two that close at once, one finds it closed."""
    if status not in (OK, BAD_HANDLE):
        raise failure(status)


def made(name: str) -> Any:
    """A structure that says its size."""
    structure = ffi.new(name + " *")
    structure.size = ffi.sizeof(name)
    return structure


def address_of(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def text_or_null(text: Optional[str]) -> Any:
    return NULL if text is None else ffi.new("char[]", text_bytes(text))


def text_bytes(text: str) -> bytes:
    encoded = text.encode()
    if b"\0" in encoded:
        raise BadArgument(f"{text!r} has a NUL in it", "", 3)
    return encoded


def told_text(call: Callable[..., int], *arguments: Any, capacity: int = 512) -> str:
    """What a function writes into a buffer of chars, however long it is."""
    length = ffi.new("size_t *")
    while True:
        buffer = ffi.new("char[]", capacity)
        status = call(*arguments, buffer, capacity, length)
        if status == OK:
            text: str = ffi.buffer(buffer, length[0])[:].decode()
            return text
        if status != BUFFER_TOO_SMALL:
            raise failure(status)
        capacity = length[0] + 1


def milliseconds(seconds: Optional[float]) -> int:
    """Of an option for which 0 means what is usual: `None` does, and everything else is at least 1."""
    if seconds is None:
        return 0
    if not seconds >= 0:
        raise BadArgument(f"a time of {seconds} seconds", "", 3)
    return max(1, math.ceil(min(seconds * 1000, _LONGEST_MS)))


def waited(call: Callable[..., int], handle: int, *arguments: Any, timeout: Optional[float], what: str) -> None:
    """Waits in `call(handle, timeout_ms, *arguments)`, so that a signal is answered meanwhile. `None` waits for ever."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    left_ms = math.inf if timeout is None else timeout * 1000
    while True:
        status = call(handle, max(0, math.ceil(min(left_ms, _SLICE_MS))), *arguments)
        if status == OK:
            return
        if status != TIMED_OUT:
            raise failure(status)
        left_ms = (deadline - time.monotonic()) * 1000
        if left_ms <= 0:
            raise TimedOut(f"{what} within {timeout} seconds", "", TIMED_OUT, True)
