"""`Buffer`: both modes, sizes, and what DeepEP has beside them."""

from __future__ import annotations

from typing import Any, NoReturn, Optional

from ..errors import Unsupported
from ..experts import Group
from ._events import CONFIGURED_RANKS, Config, EventHandle, EventOverlap, aligned, asserted
from ._latency import Latency
from ._normal import Normal
from ._seats import SLOTS


class Buffer(Normal, Latency):
    """One rank's end of DeepEP's calls. All ranks make the same calls in the same order."""

    @staticmethod
    def is_sm90_compiled() -> bool:
        """FP8 is possible."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        asserted(new_num_sms % 2 == 0, f"num_sms is {new_num_sms}, which is odd")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """The memory that calls of such a shape take at most among ranks of one host: a shape has eight slots, in which
        memory is taken as rows arrive, and the caller may hold what eight dispatches gave.

        The normal mode has as many slots for each of its shapes, of `max_tokens_per_rank` tokens: with 4,096 of 7,168
        channels, of 8 ranks, 224 GiB at most, if all tokens of all ranks go to one rank eight times."""
        limits = [num_max_dispatch_tokens_per_rank] * num_ranks
        top_k = min(8, num_experts)
        return aligned(
            Group.needed_bytes(max_tokens=limits, experts=num_experts, top_k=top_k, hidden=hidden, slots=SLOTS)
        )

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        asserted(num_ranks in CONFIGURED_RANKS, f"there is no configuration for {num_ranks} ranks")
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Buffer.get_dispatch_config(num_ranks)

    def get_comm_stream(self) -> NoReturn:
        raise Unsupported("there are no streams", "calls are over when they return", 9)

    def get_local_buffer_tensor(
        self, dtype: Any, size: Optional[Any] = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> NoReturn:
        raise Unsupported("there is no buffer of DeepEP's layout", "memory is taken where rows arrive", 9)
