"""The choices that the library knows. Wherever one is taken, its name in small letters does as well."""

from __future__ import annotations

from enum import IntEnum
from typing import Type, TypeVar, Union

from .errors import BadArgument


class Kind(IntEnum):
    """What is kept of a token."""

    MLA = 1
    """Multi-head latent attention: one latent and one rotary key, the same on every TP rank."""
    HEADS = 2
    """Keys and values for each KV head (MHA, GQA, MQA)."""


class Dtype(IntEnum):
    """The numbers of a cache."""

    BF16 = 1
    F16 = 2
    F32 = 3
    FP8_E4M3 = 4
    FP8_E5M2 = 5
    INT8 = 6
    FP8_DS_MLA = 7
    """The packed MLA form: an e4m3 latent, its f32 scales, a bf16 rotary key."""


class HeadOrder(IntEnum):
    """The order within a page."""

    TOKENS_FIRST = 0
    """Token after token, each with all its heads."""
    HEADS_FIRST = 1
    """Head after head, each with all its tokens."""


class Placement(IntEnum):
    """Where the pages of the layers are."""

    LAYER_MAJOR = 0
    """Layer after layer, each with all its pages, without gaps, in one region."""
    PAGE_MAJOR = 1
    """Page after page, each with all its layers, without gaps, in one region."""
    BUFFERS = 2
    """As `buffers` says."""


class Extent(IntEnum):
    """What the pages of a pool hold of a request."""

    ALL_TOKENS = 0
    WINDOW = 1
    """The last tokens, as many as `window` says."""
    ENTRIES = 2
    """Entries of fixed size, which do not grow with the request: a state."""


class Parts(IntEnum):
    """What a source brings."""

    ALL = 0
    """Everything that it keeps."""
    SHARED = 1
    """What the ranks of its side share by heads, and not what each of them keeps whole."""


class HugePages(IntEnum):
    """Whether memory is of huge pages."""

    NEVER = 0
    TRY = 1
    REQUIRE = 2


class MemoryKind(IntEnum):
    """Whose a memory is."""

    SHARED = 1
    """It was allocated by this library: peers on the same host can map it."""
    PRIVATE = 2
    """The caller's own."""


class Progress(IntEnum):
    """Who makes progress."""

    THREAD = 0
    """A thread of the node's own."""
    CALLER = 1
    """The caller, by `Node.progress`."""


class Outcome(IntEnum):
    """How a room ended."""

    DELIVERED = 1
    """All bytes are in the decode side's pages, and both sides may rely on it."""
    CANCELLED = 2
    """A user cancelled it."""
    EXPIRED = 3
    """A deadline passed."""
    PEER_LOST = 4
    """The session with the peer ended."""
    REFUSED = 5
    """The room was never begun."""
    FAILED = 6
    """A rail, a port or the bytes failed."""


class By(IntEnum):
    """Who decided how a room ended."""

    HERE = 1
    PEER = 2


class Stage(IntEnum):
    """How far a room had come."""

    SESSION = 1
    """It waited for a session with the peer."""
    GRANT = 2
    """It waited for the other side of the room."""
    TRANSFER = 3
    """Bytes were moving."""
    CONFIRM = 4
    """All bytes were sent."""
    VERIFY = 5
    """All bytes have landed."""


class EventKind(IntEnum):
    """What has happened."""

    ENDED = 1
    """A room has ended: its `poll` says how."""
    PAGES_HOME = 2
    """All pages of a room that received are home: nobody else can write them any more."""
    PEER = 3
    """A peer that is dialed has answered, or never will."""


Choice = TypeVar("Choice", bound=IntEnum)


def chosen(kind: Type[Choice], name: str, value: Union[Choice, str]) -> int:
    """The number of a choice that was given as such, or by its name."""
    try:
        return int(kind[value.upper()] if isinstance(value, str) else kind(value))
    except (KeyError, ValueError, AttributeError):
        choices = ", ".join(repr(choice.name.lower()) for choice in kind)
        raise BadArgument(f"{name} is {value!r}", f"choose one of {choices}", 3) from None
