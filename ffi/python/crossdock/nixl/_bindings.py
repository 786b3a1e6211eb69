"""What `nixl._bindings` holds and programs import of it: exceptions, constants, descriptor lists, telemetry."""

from __future__ import annotations

import enum
from typing import Any, Iterable, Iterator, List, Sequence, Tuple, Union, cast

import numpy

DEFAULT_COMM_PORT = 8888
NIXL_INIT_AGENT = ""
HAVE_UCX_GPU_DEVICE_API = False

# Addresses, lengths, devices.
_COLUMNS = 3


class nixlInvalidParamError(Exception):
    """An argument makes no sense."""


class nixlBackendError(Exception):
    """The transport failed; the text has its words."""


class nixlNotFoundError(Exception):
    """No such agent, backend, or registered memory."""


class nixlMismatchError(Exception):
    """Bytes that were to be metadata or descriptors are damaged, or of another version."""


class nixlNotAllowedError(Exception):
    """Not now: a transfer is under way, or a limit is reached."""


class nixlRepostActiveError(Exception):
    """The handle's last post has not ended."""


class nixlUnknownError(Exception):
    """A fault of this library."""


class nixlNotSupportedError(Exception):
    """NIXL has it and this library does not."""


class nixlRemoteDisconnectError(Exception):
    """The peer is gone, or another one is at its address."""


class nixlCancelledError(Exception):
    """The agent was closed."""


class nixlNotPostedError(Exception):
    """The handle was never posted, or has not ended."""


class nixlNoTelemetryError(Exception):
    """The agent was made without `capture_telemetry`."""


class nixl_mem_t(enum.Enum):
    DRAM_SEG = 0
    VRAM_SEG = 1
    BLK_SEG = 2
    OBJ_SEG = 3
    FILE_SEG = 4


class nixl_xfer_op_t(enum.Enum):
    NIXL_READ = 0
    NIXL_WRITE = 1


class nixl_cost_t(enum.Enum):
    NIXL_COST_ANALYTICAL_BACKEND = 0


class nixl_thread_sync_t(enum.Enum):
    """How threads share an agent. Here any number of them may, in every mode."""

    NIXL_THREAD_SYNC_NONE = 0
    NIXL_THREAD_SYNC_STRICT = 1
    NIXL_THREAD_SYNC_RW = 2
    NIXL_THREAD_SYNC_DEFAULT = 0


class nixl_status_t(enum.IntEnum):
    NIXL_IN_PROG = 1
    NIXL_SUCCESS = 0
    NIXL_ERR_NOT_POSTED = -1
    NIXL_ERR_INVALID_PARAM = -2
    NIXL_ERR_BACKEND = -3
    NIXL_ERR_NOT_FOUND = -4
    NIXL_ERR_MISMATCH = -5
    NIXL_ERR_NOT_ALLOWED = -6
    NIXL_ERR_REPOST_ACTIVE = -7
    NIXL_ERR_UNKNOWN = -8
    NIXL_ERR_NOT_SUPPORTED = -9


DRAM_SEG, VRAM_SEG, BLK_SEG, OBJ_SEG, FILE_SEG = (
    nixl_mem_t.DRAM_SEG,
    nixl_mem_t.VRAM_SEG,
    nixl_mem_t.BLK_SEG,
    nixl_mem_t.OBJ_SEG,
    nixl_mem_t.FILE_SEG,
)
NIXL_READ, NIXL_WRITE = nixl_xfer_op_t.NIXL_READ, nixl_xfer_op_t.NIXL_WRITE
NIXL_COST_ANALYTICAL_BACKEND = nixl_cost_t.NIXL_COST_ANALYTICAL_BACKEND
NIXL_THREAD_SYNC_NONE = nixl_thread_sync_t.NIXL_THREAD_SYNC_NONE
NIXL_THREAD_SYNC_STRICT = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
NIXL_THREAD_SYNC_RW = nixl_thread_sync_t.NIXL_THREAD_SYNC_RW
NIXL_THREAD_SYNC_DEFAULT = nixl_thread_sync_t.NIXL_THREAD_SYNC_DEFAULT
NIXL_IN_PROG, NIXL_SUCCESS = nixl_status_t.NIXL_IN_PROG, nixl_status_t.NIXL_SUCCESS
NIXL_ERR_NOT_POSTED = nixl_status_t.NIXL_ERR_NOT_POSTED
NIXL_ERR_INVALID_PARAM = nixl_status_t.NIXL_ERR_INVALID_PARAM
NIXL_ERR_BACKEND = nixl_status_t.NIXL_ERR_BACKEND
NIXL_ERR_NOT_FOUND = nixl_status_t.NIXL_ERR_NOT_FOUND
NIXL_ERR_MISMATCH = nixl_status_t.NIXL_ERR_MISMATCH
NIXL_ERR_NOT_ALLOWED = nixl_status_t.NIXL_ERR_NOT_ALLOWED
NIXL_ERR_REPOST_ACTIVE = nixl_status_t.NIXL_ERR_REPOST_ACTIVE
NIXL_ERR_UNKNOWN = nixl_status_t.NIXL_ERR_UNKNOWN
NIXL_ERR_NOT_SUPPORTED = nixl_status_t.NIXL_ERR_NOT_SUPPORTED


class nixlXferTelemetry:
    """How a transfer went. Times are in microseconds."""

    def __init__(self, start: int, post: int, whole: int, nbytes: int, count: int) -> None:
        self.startTime = start
        """When it was posted, by the machine's monotonic clock."""
        self.postDuration = post
        """What the call that posted it took."""
        self.xferDuration = whole
        """From the post until the bytes were there."""
        self.totalBytes = nbytes
        self.descCount = count


class _DList:
    """Descriptors of memory of one kind: rows of address, length in bytes and device."""

    def __init__(self, type: nixl_mem_t, descs: Union[numpy.ndarray[Any, Any], Sequence[Tuple[Any, ...]], int] = 0):
        if not isinstance(type, nixl_mem_t):
            raise TypeError(f"{type!r} is no kind of memory")
        self._type = type
        # A number is how long it is to be, which is nothing to a list that grows.
        self._set([] if isinstance(descs, int) else descs)

    def _set(self, descs: Any) -> None:
        self._rows = _rows_of(descs)

    def getType(self) -> nixl_mem_t:
        return self._type

    def descCount(self) -> int:
        return len(self._rows)

    def isEmpty(self) -> bool:
        return not len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> Tuple[Any, ...]:
        return tuple(int(value) for value in self._rows[self._checked(at)])

    def __setitem__(self, at: int, desc: Tuple[Any, ...]) -> None:
        self._rows[self._checked(at)] = _rows_of([desc])[0]

    def __iter__(self) -> Iterator[Tuple[Any, ...]]:
        return (self[at] for at in range(len(self._rows)))

    def _checked(self, at: int) -> int:
        if not -len(self._rows) <= at < len(self._rows):
            raise IndexError(f"descriptor {at} of {len(self._rows)}")
        return at

    def append(self, desc: Tuple[Any, ...]) -> None:
        self._rows = numpy.concatenate([self._rows, _rows_of([desc])])

    addDesc = append

    def remDesc(self, at: int) -> None:
        self._rows = numpy.delete(self._rows, self._checked(at), axis=0)

    def index(self, desc: Tuple[Any, ...]) -> int:
        """Where a descriptor is in the list, or -1."""
        found = numpy.flatnonzero((self._rows == _rows_of([desc])).all(axis=1))
        return int(found[0]) if len(found) else -1

    def clear(self) -> None:
        self._set([])

    def print(self) -> None:
        print(repr(self))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._type == other._type and numpy.array_equal(self._rows, other._rows)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._type.name}, {len(self._rows)} descriptors>"


class nixlXferDList(_DList):
    """What is to be moved."""


class nixlRegDList(_DList):
    """What is to be registered: each descriptor has bytes of its own beside it, which host memory makes no use of."""

    def _set(self, descs: Any) -> None:
        super()._set(descs)
        self._notes = _notes_of(descs, len(self._rows))

    def __getitem__(self, at: int) -> Tuple[Any, ...]:
        return (*super().__getitem__(at), self._notes[at])

    def __setitem__(self, at: int, desc: Tuple[Any, ...]) -> None:
        super().__setitem__(at, desc)
        self._notes[at] = _notes_of([desc], 1)[0]

    def append(self, desc: Tuple[Any, ...]) -> None:
        super().append(desc)
        self._notes += _notes_of([desc], 1)

    addDesc = append

    def remDesc(self, at: int) -> None:
        super().remDesc(at)
        del self._notes[at]

    def trim(self) -> nixlXferDList:
        """The same memory, to be moved."""
        return nixlXferDList(self._type, self._rows.copy())

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) is True and isinstance(other, nixlRegDList) and self._notes == other._notes


def rows_of(descs: _DList) -> numpy.ndarray[Any, Any]:
    """The rows themselves."""
    return descs._rows


def notes_of(descs: nixlRegDList) -> List[bytes]:
    return descs._notes


def _rows_of(descs: Any) -> numpy.ndarray[Any, Any]:
    if isinstance(descs, numpy.ndarray):
        if descs.ndim != 2 or descs.shape[1] != _COLUMNS:
            raise TypeError(f"descriptors of shape {descs.shape}: give (count, {_COLUMNS})")
        return numbers_of(descs, "descriptors").copy()
    rows = descs if isinstance(descs, list) else list(descs)
    if not rows:
        return numpy.zeros((0, _COLUMNS), numpy.uint64)
    try:
        if all(len(row) == _COLUMNS for row in rows):
            array = numpy.array(rows)
            # Of other numbers NumPy makes something else: those beyond 63 bits beside negative ones, say.
            if array.ndim == 2 and array.dtype.kind in "iu":
                return numbers_of(array, "descriptors")
        values = [[int(value) for value in row[:_COLUMNS]] for row in rows]
        if any(not 0 <= value < 1 << 64 for row in values for value in row):
            raise ValueError("numbers of 64 bits that are not negative are needed")
        return numpy.array(values, numpy.uint64).reshape(-1, _COLUMNS)
    except (OverflowError, ValueError, TypeError) as error:
        raise nixlInvalidParamError(f"descriptors are (address, length, device): {error}") from None


def numbers_of(values: Any, what: str) -> numpy.ndarray[Any, Any]:
    """64-bit numbers that are not negative, as they are where they are such already."""
    array = numpy.asarray(values)
    if not len(array):
        return array.astype(numpy.uint64)
    if array.dtype.kind not in "iu":
        raise nixlInvalidParamError(f"{what} of {array.dtype}: give integers")
    if array.dtype.kind == "i" and int(array.min()) < 0:
        raise nixlInvalidParamError(f"{what}: {int(array.min())} is negative")
    return array.astype(numpy.uint64, copy=False)


def _notes_of(descs: Any, count: int) -> List[bytes]:
    if isinstance(descs, numpy.ndarray):
        return [b""] * count
    found = [row[_COLUMNS] if len(row) > _COLUMNS else b"" for row in cast(Iterable[Any], descs)]
    return [note.encode() if isinstance(note, str) else bytes(note) for note in found]
