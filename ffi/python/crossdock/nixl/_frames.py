"""What two agents say to each other on a connection for notifications.

The receiver begins, with 16 random bytes. The sender's hello follows, then the receiver's welcome, then frames one way
and acknowledgements the other. Each ends with a code of 16 bytes, which only one who has the key can make, and only for
this connection: both sides' random bytes are in it. Without a key the codes are zeros, and anybody may speak.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import os
import struct
from typing import Callable, NamedTuple, Optional, Tuple

from ._wire import MAX_NAME_BYTES

MESSAGE_BYTES = 1 << 20
# Of a frame, once it has begun.
FRAME_SECONDS = 30.0

_MAGIC = b"XDN1"
_RANDOM_BYTES = 16
_CODE_BYTES = 16
# The sender's incarnation, whom it means, its random bytes, how long its name is.
_HELLO = struct.Struct("<16s16s16sH")
# The receiver's incarnation, and the last number that it has of this sender.
_WELCOME = struct.Struct("<16sQ")
# The message's number, how many milliseconds the sender waits for it still, how many bytes it has.
_FRAME = struct.Struct("<QII")
_ACK = struct.Struct("<Q")


class Stranger(Exception):
    """Who is there is not who was meant, or says what makes no sense."""


class Codes:
    """The codes of one connection."""

    def __init__(self, key: Optional[bytes], receivers: bytes, senders: bytes) -> None:
        """The random bytes of both sides."""
        self._key = None if key is None else hmac.digest(key, b"crossdock.nixl" + receivers + senders, "sha256")

    def sealed(self, label: bytes, data: bytes) -> bytes:
        return data + self._of(label, data)

    def opened(self, label: bytes, data: bytes) -> bytes:
        inner = data[:-_CODE_BYTES]
        if not hmac.compare_digest(data[-_CODE_BYTES:], self._of(label, inner)):
            raise Stranger("the peer does not have the same key")
        return inner

    def _of(self, label: bytes, data: bytes) -> bytes:
        # What one side says is nothing that the other could have said.
        return bytes(_CODE_BYTES) if self._key is None else hmac.digest(self._key, label + data, "sha256")[:_CODE_BYTES]


class Sender(NamedTuple):
    """Who has connected."""

    name: str
    incarnation: bytes
    codes: Codes


async def admit(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    key: Optional[bytes],
    incarnation: bytes,
    last_of: Callable[[bytes], int],
) -> Sender:
    """The receiver's part. Raises `Stranger`."""
    mine = os.urandom(_RANDOM_BYTES)
    writer.write(_MAGIC + mine)
    magic = await reader.readexactly(len(_MAGIC))
    if magic != _MAGIC:
        raise Stranger("it is no agent of crossdock.nixl")
    head = await reader.readexactly(_HELLO.size)
    theirs, whom, random, length = _HELLO.unpack(head)
    if not 0 < length <= MAX_NAME_BYTES:
        raise Stranger(f"an agent whose name has {length} bytes")
    codes = Codes(key, mine, random)
    name = codes.opened(b"hello", head + await reader.readexactly(length + _CODE_BYTES))[_HELLO.size :]
    writer.write(codes.sealed(b"welcome", _WELCOME.pack(incarnation, last_of(theirs))))
    if whom != incarnation:
        # It learns so by the welcome; there is nothing to take from it.
        await writer.drain()
        raise Stranger("it means an agent that was here before")
    try:
        return Sender(name.decode(), theirs, codes)
    except UnicodeDecodeError:
        raise Stranger("an agent whose name is no UTF-8") from None


async def introduce(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    key: Optional[bytes],
    name: str,
    incarnation: bytes,
    whom: bytes,
) -> Tuple[Codes, int]:
    """The sender's part: the connection's codes, and the last number that the receiver has. Raises `Stranger`."""
    begin = await reader.readexactly(len(_MAGIC) + _RANDOM_BYTES)
    if begin[: len(_MAGIC)] != _MAGIC:
        raise Stranger("no agent of crossdock.nixl is there")
    mine, called = os.urandom(_RANDOM_BYTES), name.encode()
    codes = Codes(key, begin[len(_MAGIC) :], mine)
    hello = codes.sealed(b"hello", _HELLO.pack(incarnation, whom, mine, len(called)) + called)
    writer.write(_MAGIC + hello)
    welcome = codes.opened(b"welcome", await reader.readexactly(_WELCOME.size + _CODE_BYTES))
    theirs, last = _WELCOME.unpack(welcome)
    if theirs != whom:
        raise Stranger("another agent is there now: it was restarted, its metadata has to be handed over again")
    return codes, int(last)


def frame(codes: Codes, number: int, seconds: float, message: bytes) -> bytes:
    # Rounded up: the sender is to be the first who gives up, and to say why.
    left = min(max(0, math.ceil(1000 * seconds)), 0xFFFFFFFF)
    return codes.sealed(b"frame", _FRAME.pack(number, left, len(message)) + message)


async def read_frame(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codes: Codes
) -> Tuple[int, float, bytes]:
    """A message's number, how many seconds its sender waits for it still, and the message."""
    head = await reader.readexactly(_FRAME.size)
    number, left, length = _FRAME.unpack(head)
    if length > MESSAGE_BYTES:
        raise Stranger(f"a notification of {length} bytes")
    # It costs less than `wait_for`, which makes a task.
    timer = asyncio.get_running_loop().call_later(FRAME_SECONDS, writer.transport.abort)
    try:
        rest = await reader.readexactly(length + _CODE_BYTES)
    finally:
        timer.cancel()
    return number, left / 1000, codes.opened(b"frame", head + rest)[_FRAME.size :]


def acknowledgement(codes: Codes, number: int) -> bytes:
    return codes.sealed(b"ack", _ACK.pack(number))


async def read_acknowledgement(reader: asyncio.StreamReader, codes: Codes) -> int:
    answer = codes.opened(b"ack", await reader.readexactly(_ACK.size + _CODE_BYTES))
    return int(_ACK.unpack(answer)[0])
