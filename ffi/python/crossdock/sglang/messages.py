"""What the two sides of a room tell each other beside the pages, over SGLang's control sockets, where anybody can
send."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Dict, List, Optional, Type, TypeVar, Union

# How the types of the fields are written: their annotations are texts.
_KINDS: Dict[str, type] = {"int": int, "str": str, "bool": bool}

Message = TypeVar("Message", bound="_Message")


@dataclass(frozen=True)
class _Message:
    tag: ClassVar[bytes]

    room: int
    use_count: int
    """Which use of the room's number, as the decode engine counts. What comes late is about an earlier one."""

    def to_zmq(self) -> List[bytes]:
        return [self.tag, json.dumps(asdict(self)).encode()]

    @classmethod
    def told(cls: Type[Message], frames: List[bytes]) -> Message:
        """Raises `ValueError` for what is no such message."""
        given: Any = json.loads(frames[1]) if len(frames) == 2 else None
        kinds = {field.name: _KINDS[str(field.type)] for field in fields(cls)}
        if not isinstance(given, dict) or given.keys() != kinds.keys():
            raise ValueError(f"{cls.tag.decode()} with other fields than {', '.join(kinds)}")
        for name, kind in kinds.items():
            # A bool is an int.
            if type(given[name]) is not kind or (kind is int and not 0 <= given[name] < 1 << 64):
                raise ValueError(f"{cls.tag.decode()} with {name} {given[name]!r}")
        return cls(**given)


@dataclass(frozen=True)
class _FromDecode(_Message):
    endpoint: str
    dst_port: int
    """Where the decode rank is told how it went."""

    @property
    def sender(self) -> str:
        return f"{self.endpoint}:{self.dst_port}"


@dataclass(frozen=True)
class RoomOpened(_FromDecode):
    """A decode rank has opened its end of a room; or, as a dummy, it tells a prefill rank that nothing is asked of
    it."""

    tag = b"CROSSDOCK_OPENED"

    rank: int
    """That of its layout."""
    is_dummy: bool
    required_dst_info_num: int
    """How many ranks of the decode side open the room with this prefill rank."""
    pages: int
    """Of the tokens that are to be sent."""
    decode_prefix_len: int
    """Tokens before these, that the decode side has."""

    def is_with(self, other: RoomOpened) -> bool:
        """Whether both can be about one request: of two ranks of an engine, which count alike."""
        alike = (self.use_count, self.required_dst_info_num) == (other.use_count, other.required_dst_info_num)
        return alike and (self.rank != other.rank or self.sender == other.sender)


@dataclass(frozen=True)
class RoomAborted(_FromDecode):
    """A decode rank has failed the request, and why."""

    tag = b"CROSSDOCK_ABORTED"

    reason: str


@dataclass(frozen=True)
class RoomFailed(_Message):
    """A prefill rank has failed the request, and why."""

    tag = b"CROSSDOCK_FAILED"

    rank: int
    """As SGLang numbers the prefill side's."""
    reason: str


_TYPES: Dict[bytes, Any] = {kind.tag: kind for kind in (RoomOpened, RoomAborted, RoomFailed)}


def message_of(frames: List[bytes]) -> Optional[Union[RoomOpened, RoomAborted, RoomFailed]]:
    """`None` for a message of another backend. Raises `ValueError` for one that makes no sense."""
    kind = _TYPES.get(frames[0]) if frames else None
    if kind is None:
        return None
    told: Union[RoomOpened, RoomAborted, RoomFailed] = kind.told(frames)
    return told
