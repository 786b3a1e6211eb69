"""What goes wrong, by kind. Every error has a message with the values that it is about, and advice where there is any."""

from __future__ import annotations

from typing import Dict, Type

__all__ = [
    "Abandoned",
    "BadArgument",
    "BadHandle",
    "Busy",
    "DuplicatePage",
    "Error",
    "Exhausted",
    "Finished",
    "Forked",
    "GroupLost",
    "GroupMismatch",
    "InternalError",
    "Late",
    "LayoutError",
    "Lost",
    "NetworkError",
    "NotComplete",
    "NotDelivered",
    "NotMet",
    "OutOfMemory",
    "OutOfOrder",
    "PageAbandoned",
    "PageError",
    "PageInQuarantine",
    "PageInUse",
    "PageOutOfRange",
    "Pending",
    "PortError",
    "Refused",
    "RegistryError",
    "StepLost",
    "Stopped",
    "SystemRefused",
    "TimedOut",
    "UnknownAddress",
    "Unsupported",
    "WrongKind",
]


class Error(RuntimeError):
    """A call has failed. `status` is the number of the C ABI."""

    def __init__(self, message: str, advice: str = "", status: int = 28, is_retryable: bool = False) -> None:
        super().__init__(message, advice, status, is_retryable)
        self.message = message
        self.advice = advice
        self.status = status
        self.is_retryable = is_retryable

    @property
    def status_name(self) -> str:
        """The status as the C ABI names it, as `CROSSDOCK_BUSY`."""
        from ._abi import status_name

        return status_name(self.status)

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message


class Pending(Error):
    """It is not over yet: ask again, or wait."""


class BadHandle(Error):
    """The object is closed."""


class BadArgument(Error, ValueError):
    """An argument makes no sense; the message says which."""


class TimedOut(Error, TimeoutError):
    """The time was over first. Nothing has changed: wait on, or cancel."""


class Busy(Error):
    """A limit is reached, or something is in use: the same call may succeed later."""


class Stopped(Error):
    """The node is closed."""


class Unsupported(Error):
    """This machine, or this library, cannot do it."""


class OutOfMemory(Error):
    """Memory could not be allocated or used."""


class LayoutError(Error, ValueError):
    """The layout is not sound."""


class PortError(Error):
    """A port could not be opened, or does not take the memory."""


class NetworkError(Error):
    """An address cannot be bound, or dialed."""


class SystemRefused(Error):
    """The operating system refused a call."""


class PageError(Error):
    """Pages cannot be had, or not these."""


class Exhausted(PageError):
    """Too few pages are free."""


class PageInUse(PageError):
    """A page is held by somebody already."""


class PageInQuarantine(PageError):
    """A peer can still write a page, though its room is over."""


class PageAbandoned(PageError):
    """A page whose holder was dropped while a peer could write it: it never comes back."""


class PageOutOfRange(PageError):
    """There is no such page."""


class DuplicatePage(PageError):
    """A page is named twice."""


class WrongKind(Error):
    """The call does not fit to the object."""


class OutOfOrder(Error):
    """Tokens are sent in order, each once."""


class NotComplete(Error):
    """A room is finished when everything has been sent, and not before."""


class Finished(Error):
    """The room has been finished, or what was asked for has been taken."""


class Abandoned(Error):
    """The node is gone, and what was waited for with it. Pages that were waited for never come home."""


class Refused(Error):
    """The peer was refused, or will never be reached."""


class RegistryError(Error):
    """The registry could not be asked, or refused."""


class InternalError(Error):
    """A fault of the library: please report it with its message."""


class GroupMismatch(Error):
    """The ranks of a group made different calls: the step is not what any of them meant."""


class StepLost(Error):
    """This rank's step is lost; the next one can be made."""


class GroupLost(Error):
    """This rank is no longer part of its group, or too few ranks are left: meet anew."""


class NotMet(Error):
    """Some ranks of a group were not met in time."""


class UnknownAddress(Error):
    """Bytes that a transfer names are not in one memory that is registered."""


class Late(Error, TimeoutError):
    """The deadline of a transfer passed."""


class Lost(Error):
    """The session with the peer ended; it may come back."""


class NotDelivered(Error):
    """A room has ended without its pages: `End.check` says so."""


class Forked(Error):
    """The object belongs to the process that this one was forked from: its threads and sockets are there."""


BY_STATUS: Dict[int, Type[Error]] = {
    1: Pending,
    2: BadHandle,
    3: BadArgument,
    4: BadArgument,
    6: TimedOut,
    7: Busy,
    8: Stopped,
    9: Unsupported,
    10: OutOfMemory,
    11: LayoutError,
    12: PortError,
    13: NetworkError,
    14: SystemRefused,
    15: Exhausted,
    16: PageInUse,
    17: PageInQuarantine,
    18: PageAbandoned,
    19: PageOutOfRange,
    20: DuplicatePage,
    21: WrongKind,
    22: OutOfOrder,
    23: NotComplete,
    24: Finished,
    25: Abandoned,
    26: Refused,
    27: RegistryError,
    28: InternalError,
    29: GroupMismatch,
    30: StepLost,
    31: GroupLost,
    32: NotMet,
    33: UnknownAddress,
    34: Late,
    35: Lost,
}
