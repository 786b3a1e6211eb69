"""What DeepEP gives for calls that may go on, its tuning, and what it asserts."""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Tuple

from ..errors import BadArgument

CONFIGURED_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
_ALIGNMENT = 128


class Misused(BadArgument, AssertionError):
    """A call that DeepEP asserts against."""


def asserted(is_so: bool, words: str) -> None:
    if not is_so:
        raise Misused(words, "", 3)


class EventHandle:
    """An event that has happened."""

    def current_stream_wait(self) -> None:
        pass


class EventOverlap:
    """What DeepEP gives for a call that may go on; here it is over."""

    def __init__(self, event: Optional[EventHandle] = None, extra_tensors: Optional[Tuple[Any, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self._releases = False
        self._hooks: List[Callable[[], None]] = []

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        self._hooks.append(hook)

    def current_stream_wait(self, release_handle: bool = False) -> None:
        asserted(self.event is not None, "the call was made without async_finish")
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook()
        if release_handle:
            self.event = self.extra_tensors = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._releases = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: object) -> None:
        if self.event is not None:
            self.current_stream_wait(self._releases)


def event_of(async_finish: bool) -> EventOverlap:
    return EventOverlap(EventHandle() if async_finish else None)


class Config:
    """DeepEP's tuning of its kernels, which means nothing here."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        asserted(num_sms % 2 == 0, f"num_sms is {num_sms}, which is odd")
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return aligned(self.num_max_nvl_chunked_recv_tokens * hidden_bytes * num_ranks)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return aligned(self.num_max_rdma_chunked_recv_tokens * hidden_bytes * num_ranks) if num_ranks > 8 else 0


def aligned(nbytes: int) -> int:
    """Programs check that sizes are so."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
