"""Metadata and descriptor lists as bytes: a form of this library's own, which says its version and is checked to the
last byte. What is damaged, cut short, too long or of another version is refused with `nixlMismatchError`, and nothing
of it is used.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy

from .._host import is_address
from ._bindings import _DList, nixl_mem_t, nixlMismatchError, nixlRegDList, nixlXferDList, notes_of, rows_of

MAX_BYTES = 64 << 20
MAX_NAME_BYTES = 255
MAX_NOTE_BYTES = 4096
VERSION = 1

_METADATA, _XFER_LIST, _REG_LIST = 1, 2, 3
# What it is, its kind, the version, how many bytes follow before the checksum.
_HEAD = struct.Struct("<4sBBHI")
_MAGIC = b"XDNX"
_CHECKSUM_BYTES = 16
_ROW = numpy.dtype("<u8")


@dataclass(frozen=True)
class Metadata:
    """What an agent tells about itself."""

    name: str
    incarnation: bytes
    """16 random bytes: an agent that was restarted has others."""
    address: str
    """Of its endpoint, "ip:port"; empty where the connection is left out."""
    notification_address: str
    regions: numpy.ndarray[Any, Any]
    """[count, 3] numbers: address, bytes, device, of host memory."""
    is_whole: bool = True
    """Whether the regions are all that there are."""

    def to_bytes(self) -> bytes:
        texts = b"".join(_short(text) for text in (self.name, self.address, self.notification_address))
        return _sealed(_METADATA, self.incarnation + bytes([self.is_whole]) + texts + _rows_to_bytes(self.regions))


def metadata_from(data: Any) -> Metadata:
    reader = _Reader(_METADATA, data)
    incarnation, is_whole = reader.take(16), reader.take(1)[0]
    name, address, notification_address = reader.text(), reader.text(), reader.text()
    regions = reader.rows()
    reader.end()
    if is_whole > 1:
        raise nixlMismatchError("metadata that is neither whole nor partial")
    if not name:
        raise nixlMismatchError("metadata without an agent's name")
    if bool(address) != bool(notification_address):
        raise nixlMismatchError("metadata with half of a connection")
    for one in (address, notification_address):
        if one and not is_address(one):
            raise nixlMismatchError(f"metadata with {one!r} for an address")
    if len(regions) and (not regions[:, 1].all() or (regions[:, 0] + regions[:, 1] < regions[:, 0]).any()):
        raise nixlMismatchError("metadata with memory that is empty or ends beyond all addresses")
    return Metadata(name, incarnation, address, notification_address, regions, bool(is_whole))


def list_to_bytes(descs: _DList) -> bytes:
    kind = struct.pack("<B", descs.getType().value)
    if not isinstance(descs, nixlRegDList):
        return _sealed(_XFER_LIST, kind + _rows_to_bytes(rows_of(descs)))
    notes = b"".join(struct.pack("<H", len(note)) + note for note in notes_of(descs))
    return _sealed(_REG_LIST, kind + _rows_to_bytes(rows_of(descs)) + notes)


def list_from(data: Any) -> _DList:
    reader = _Reader(0, data)
    try:
        kind = nixl_mem_t(reader.take(1)[0])
    except ValueError:
        raise nixlMismatchError("descriptors of an unknown kind of memory") from None
    rows = reader.rows()
    if reader.kind == _XFER_LIST:
        reader.end()
        return nixlXferDList(kind, rows)
    notes = [reader.take(reader.number("<H", MAX_NOTE_BYTES)) for _ in range(len(rows))]
    reader.end()
    descs = nixlRegDList(kind, rows)
    notes_of(descs)[:] = notes
    return descs


def _short(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<H", len(data)) + data


def _rows_to_bytes(rows: numpy.ndarray[Any, Any]) -> bytes:
    return struct.pack("<I", len(rows)) + rows.astype(_ROW).tobytes()


def _sealed(kind: int, payload: bytes) -> bytes:
    if len(payload) > MAX_BYTES:
        raise nixlMismatchError(f"{len(payload)} bytes; {MAX_BYTES} are the most")
    whole = _HEAD.pack(_MAGIC, kind, VERSION, 0, len(payload)) + payload
    return whole + hashlib.sha256(whole).digest()[:_CHECKSUM_BYTES]


class _Reader:
    """Takes checked bytes apart."""

    def __init__(self, kind: int, data: Any) -> None:
        try:
            whole = bytes(memoryview(data))
        except TypeError:
            raise TypeError(f"a {type(data).__name__} is no bytes") from None
        if len(whole) < _HEAD.size + _CHECKSUM_BYTES or len(whole) > MAX_BYTES + _HEAD.size + _CHECKSUM_BYTES:
            raise nixlMismatchError(f"{len(whole)} bytes are too few or too many")
        magic, self.kind, version, zero, length = _HEAD.unpack_from(whole)
        if magic != _MAGIC:
            raise nixlMismatchError("these bytes are not from crossdock.nixl: all agents have to use it")
        if version != VERSION or zero:
            raise nixlMismatchError(f"version {version}; this library has {VERSION}: install the same on both sides")
        if length != len(whole) - _HEAD.size - _CHECKSUM_BYTES:
            raise nixlMismatchError(f"{len(whole)} bytes, of {length + _HEAD.size + _CHECKSUM_BYTES}")
        if hashlib.sha256(whole[:-_CHECKSUM_BYTES]).digest()[:_CHECKSUM_BYTES] != whole[-_CHECKSUM_BYTES:]:
            raise nixlMismatchError("the checksum is wrong: the bytes are damaged")
        if self.kind != kind and (kind or self.kind not in (_XFER_LIST, _REG_LIST)):
            raise nixlMismatchError("metadata and descriptors were mixed up")
        self._rest = memoryview(whole)[_HEAD.size : -_CHECKSUM_BYTES]

    def take(self, count: int) -> bytes:
        if count > len(self._rest):
            raise nixlMismatchError("the bytes end too early")
        taken, self._rest = bytes(self._rest[:count]), self._rest[count:]
        return taken

    def number(self, form: str, most: int) -> int:
        number = int(struct.unpack(form, self.take(struct.calcsize(form)))[0])
        if number > most:
            raise nixlMismatchError(f"a length of {number}; {most} are the most")
        return number

    def text(self) -> str:
        try:
            return self.take(self.number("<H", MAX_NAME_BYTES)).decode()
        except UnicodeDecodeError:
            raise nixlMismatchError("a name that is no UTF-8") from None

    def rows(self) -> numpy.ndarray[Any, Any]:
        count = self.number("<I", MAX_BYTES // 24)
        return numpy.frombuffer(self.take(24 * count), _ROW).reshape(count, 3).astype(numpy.uint64)

    def end(self) -> None:
        if len(self._rest):
            raise nixlMismatchError(f"{len(self._rest)} bytes too many")
