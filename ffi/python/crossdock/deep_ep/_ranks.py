"""A buffer's ranks: how they meet, and which of them are not waited for any more."""

from __future__ import annotations

import sys
from typing import Any, Dict, List, Set, Tuple

from .._host import bind_host, key_of_deployment
from ..errors import BadArgument, BadHandle
from ..experts import Group
from ._events import asserted
from ._seats import SLOTS, Handle, Shape, handle_of
from ._tensors import numbers_of


class Ranks:
    """What both modes need."""

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
    ) -> None:
        del num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric
        if group is None and comm is None:
            raise ValueError("neither a group nor a communicator is given")
        self.group = group
        self._comm = comm
        self.rank: int = comm.Get_rank() if group is None else group.rank()
        self.group_size: int = comm.Get_size() if group is None else group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Any = self
        host, self._key = bind_host(), key_of_deployment()
        self._bind = f"[{host}]:0" if ":" in host else f"{host}:0"
        self._shapes: Dict[Tuple[int, ...], Shape] = {}
        self._masked: Set[int] = set()

    def destroy(self) -> None:
        """Leaves the other ranks. Where a buffer of the latency mode's results is still held, they are told when it is
        not."""
        asserted(self.explicitly_destroy, "the buffer was made without explicitly_destroy")
        shapes, self._shapes, self.runtime = self._shapes, {}, None
        for shape in shapes.values():
            shape.group.close()

    # Masks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Waits for a rank no longer. One that was masked cannot be taken back, and the normal mode is over."""
        self._can_shrink()
        if not 0 <= rank_to_mask < self.group_size or rank_to_mask == self.rank:
            raise BadArgument(f"rank {rank_to_mask} cannot be masked by rank {self.rank} of {self.group_size}", "", 3)
        if not mask:
            raise BadArgument("a masked rank cannot be taken back", "make another buffer with it", 3)
        self._masked.add(rank_to_mask)
        for shape in self._shapes.values():
            shape.group.mark_dead(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Fills an int32 tensor, by rank, with 1 for those that are masked."""
        self._can_shrink()
        masked = self._all_masked()
        told = numbers_of("mask_status", mask_status, (self.group_size,), "int32")
        told[:] = [int(rank in masked) for rank in range(self.group_size)]

    def low_latency_clean_mask_buffer(self) -> None:
        self._can_shrink()
        if self._all_masked():
            raise BadArgument("a masked rank cannot be taken back", "make another buffer with it", 3)

    def _can_shrink(self) -> None:
        asserted(self.enable_shrink, "the buffer was made without enable_shrink")

    def _all_masked(self) -> Set[int]:
        return self._masked.union(*(shape.group.masked() for shape in self._shapes.values()))

    # Within

    def _handle(self, given: Any, is_latency: bool) -> Handle:
        self._is_open()
        handle = handle_of(given, is_latency)
        if handle.shape not in self._shapes.values():
            raise BadArgument("this handle is of another buffer", "give one that this buffer gave", 3)
        return handle

    def _shape(self, limit: int, experts: int, top_k: int, hidden: int, mode: int) -> Shape:
        self._is_open()
        key = (limit, experts, top_k, hidden, mode)
        if key not in self._shapes:
            group = Group(
                self.rank,
                max_tokens=[limit] * self.group_size,
                experts=experts,
                top_k=top_k,
                hidden=hidden,
                slots=SLOTS,
                # Where DeepEP's kernels would trap, no call gives results that lack what a dead rank had to add.
                least_ranks=1 if self.enable_shrink and mode == 1 else self.group_size,
                # As long as DeepEP's kernels wait. A process that has died is missed at once.
                deadline=100.0,
                key=self._key,
                bind=self._bind,
            )
            group.meet(self._all_gather(group.address))
            for masked in self._masked:
                group.mark_dead(masked)
            self._shapes[key] = Shape(group)
        return self._shapes[key]

    def _is_open(self) -> None:
        if self.runtime is None:
            raise BadHandle("the buffer was destroyed", "use it only until then", 2)

    def _all_gather(self, told: Any) -> List[Any]:
        if self.group is None:
            return list(self._comm.allgather(told))
        torch = sys.modules.get("torch")
        if torch is None or not _is_of_torch(torch, self.group):
            return list(self.group.all_gather(told))
        heard: List[Any] = [None] * self.group_size
        torch.distributed.all_gather_object(heard, told, group=self.group)
        return heard


def _is_of_torch(torch: Any, group: Any) -> bool:
    return torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)
