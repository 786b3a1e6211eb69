"""Ranks that are threads, as a group that can all-gather, and what they send."""

from __future__ import annotations

import os
import threading
from typing import Any, Callable, List
from unittest import mock

from support import numpy

RANKS, EXPERTS, TOP_K, HIDDEN = 4, 16, 4, 256
ENVIRONMENT = {"CROSSDOCK_KEY": "a key of these tests alone", "CROSSDOCK_HOST": "127.0.0.1"}


class Ranks:
    """Ranks that are threads, as a group that can all-gather."""

    def __init__(self, ranks: int) -> None:
        self.told: List[Any] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def of(self, rank: int) -> "Rank":
        return Rank(self, rank)


class Rank:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self._rank = ranks, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self.ranks.told)

    def all_gather(self, told: Any) -> List[Any]:
        self.ranks.told[self._rank] = told
        self.ranks.barrier.wait()
        heard = list(self.ranks.told)
        self.ranks.barrier.wait()
        return heard


def on_every_rank(work: Callable[[Any, int], None], ranks: int = RANKS, **options: Any) -> None:
    from crossdock.deep_ep import Buffer

    group, failed = Ranks(ranks), []

    def run(rank: int) -> None:
        try:
            buffer = Buffer(group.of(rank), explicitly_destroy=True, **options)
            work(buffer, rank)
            group.barrier.wait()
            buffer.destroy()
        except BaseException as error:
            failed.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    with mock.patch.dict(os.environ, ENVIRONMENT):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in sorted(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error


class Communicator:
    """As mpi4py's."""

    def __init__(self, rank: Rank) -> None:
        self.Get_rank, self.Get_size, self.allgather = rank.rank, rank.size, rank.all_gather


def layout_of(buffer: Any, chosen: Any) -> Any:
    """By the names of `dispatch`."""
    per_rank, per_node, per_expert, is_in, _ = buffer.get_dispatch_layout(chosen, EXPERTS)
    told = dict(num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, num_tokens_per_expert=per_expert)
    return dict(told, is_token_in_rank=is_in)


def to_bf16(values: Any) -> Any:
    """Bits; exact for the small integers that are used here."""
    return (numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)


def to_f32(bits: Any) -> Any:
    return (numpy.asarray(bits).astype(numpy.uint32) << 16).view(numpy.float32)


def choices_of(rank: int, tokens: int, seed: int = 0) -> Any:
    random = numpy.random.default_rng(1000 * seed + rank)
    chosen = numpy.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :TOP_K].astype(numpy.int64)
    chosen[random.random((tokens, TOP_K)) < 0.1] = -1
    return chosen
