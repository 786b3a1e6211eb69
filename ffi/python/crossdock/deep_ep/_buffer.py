"""`Buffer`: both modes, sizes, and what DeepEP has beside them."""

from __future__ import annotations

from typing import Any, NoReturn, Optional

from ..errors import Unsupported
from ..experts import Group
from ._events import CONFIGURED_RANKS, Config, EventHandle, EventOverlap, aligned, asserted
from ._latency import Latency
from ._normal import Normal


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
        """The memory that calls of such a shape take at most, two of them at a time."""
        limits = [num_max_dispatch_tokens_per_rank] * num_ranks
        top_k = min(8, num_experts)
        return aligned(Group.needed_bytes(max_tokens=limits, experts=num_experts, top_k=top_k, hidden=hidden, slots=2))

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
