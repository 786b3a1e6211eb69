"""Prefill and decode engines of several ranks, and hand-overs between them, for tests."""

from __future__ import annotations

import tempfile
import time
import unittest
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .sglang_rank import AUX_ROWS, FAILED, SUCCESS, TIMEOUT, WAITING, Rank, free_port, pages, some_pages


class Engine:
    """Ranks that serve a request together. Prefill engines have a bootstrap server, at `address`; the last ones of
    their ranks may be `absent` until `complete`."""

    def __init__(self, role: str, *, port: int = 0, absent: int = 0, **options: Any) -> None:
        port = port or (free_port() if role == "prefill" else 1)
        tp, pp, dp = (options.get(name, 1) for name in ("tp", "pp", "dp"))
        spread = [
            dict(tp_rank=tp_rank, pp_rank=pp_rank, dp_rank=dp_rank)
            for dp_rank in range(dp)
            for pp_rank in range(pp)
            for tp_rank in range(tp)
        ]
        self._meeting = tempfile.TemporaryDirectory()
        options["meeting"] = self._meeting.name
        self._begin = [
            lambda at=at, one=one: Rank(role, port, server=role == "prefill" and not at, **{**options, **one})
            for at, one in enumerate(spread)
        ]
        self._absent = absent
        self.ranks = [self._begin[0]()]
        self.address = self.ranks[0].address
        self._met: List[str] = []

    def ready(self) -> None:
        """The others begin when the bootstrap server is there: SGLang's registration sleeps a second otherwise."""
        self.ranks[0].answer()
        self._begin_until(len(self._begin) - self._absent)

    def complete(self) -> None:
        self._begin_until(len(self._begin))

    def _begin_until(self, count: int) -> None:
        begun = [begin() for begin in self._begin[len(self.ranks) : count]]
        self.ranks += begun
        for rank in begun:
            rank.answer()

    def group(self, dp_rank: int) -> List[Rank]:
        return [rank for rank in self.ranks if rank.options["dp_rank"] == dp_rank]

    def meet(self, address: str) -> None:
        if address not in self._met:
            for rank in self.ranks:
                rank.ask("ensure", address=address)
            self._met.append(address)

    def forget(self, address: str) -> None:
        self._met.remove(address)

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self._meeting.cleanup()


class Request:
    """One hand-over, step by step, as the schedulers make it."""

    numbers = iter(range(1000, 1 << 30))

    def __init__(
        self,
        prefill: Engine,
        decode: Engine,
        count: int,
        *,
        room: Optional[int] = None,
        target: Optional[Sequence[int]] = None,
        prefix: int = 0,
        states: Sequence[Tuple[List[int], List[int]]] = (),
        dp_rank: int = 0,
    ) -> None:
        self.room = next(self.numbers) if room is None else room
        self.address = prefill.address
        self.prefill, self.decode = prefill.group(dp_rank), decode.ranks
        self.engine, self.dp_rank = decode, dp_rank
        self.count, self.prefix, self.states = count, prefix, states
        self.source = some_pages(self.room, count)
        self.target = list(some_pages(self.room + 1, count) if target is None else target)
        self.rows = (self.room % AUX_ROWS, (self.room + 5) % AUX_ROWS)

    def create(self) -> None:
        """Both sides have the request."""
        self.create_prefill()
        self.create_decode()

    def create_prefill(self) -> None:
        for rank in self.prefill:
            rank.ask("new", room=self.room, address=self.address)

    def create_decode(self) -> None:
        self.engine.meet(self.address)
        for rank in self.decode:
            rank.ask("new", room=self.room, address=self.address)

    def handshake(self) -> None:
        for rank in self.decode:
            rank.call(self.room, "init", self.dp_rank)
            self.expect(rank, WAITING)

    def grant(self) -> None:
        """The decode side has pages for it."""
        states = self._rows([target for _, target in self.states])
        for rank in self.decode:
            rank.call(self.room, "send_metadata", pages(self.target), self.rows[1], states, self.prefix)

    def admit(self) -> None:
        """The prefill side begins."""
        for rank in self.prefill:
            self.expect(rank, WAITING)
            assert rank.call(self.room, "pop_decode_prefix_len") == self.prefix
            rank.call(self.room, "init", self.count, self.rows[0])

    def _rows(self, components: Sequence[List[int]]) -> Optional[List[Dict[str, Any]]]:
        """As the scheduler gives them: of Mamba a list of arrays."""
        kinds = [state["type"] for state in self.decode[0].options["states"]]
        return [pages(rows, is_list=kind == "mamba") for rows, kind in zip(components, kinds)] or None

    def send(self, begin: int, end: int) -> None:
        states = self._rows([source for source, _ in self.states]) if end == self.count else None
        for rank in self.prefill:
            rank.call(self.room, "send", pages(self.source[begin:end]), states)

    def send_chunks(self, chunks: Sequence[int]) -> None:
        begin = 0
        for chunk in chunks:
            self.send(begin, begin + chunk)
            begin += chunk

    def opened(self) -> Request:
        """As far as that prefill may send."""
        self.create()
        self.handshake()
        self.grant()
        self.admit()
        return self

    def finished(self) -> None:
        """Every rank of both sides is done, and every byte is right."""
        for rank in [*self.prefill, *self.decode]:
            self.expect(rank, SUCCESS)
        for rank in self.decode:
            moved = dict(sources=self.source, targets=self.target, aux=self.rows, states=self.states)
            rank.ask("expect", **moved)
            wrong = rank.ask("wrong")
            assert not wrong, f"buffers {wrong} of {rank.options}"
        self.clear()

    def clear(self) -> None:
        for rank in [*self.prefill, *self.decode]:
            rank.call(self.room, "clear")

    def run(self, chunks: Optional[Sequence[int]] = None) -> None:
        self.opened()
        self.send_chunks(chunks or [self.count])
        self.finished()

    def expect(self, rank: Rank, status: int) -> None:
        found = rank.wait(self.room, status)
        if found == FAILED != status:
            raise AssertionError(f"room {self.room}: {rank.ask('failure', room=self.room)}")

    def failure(self, rank: Rank) -> str:
        """Why it has failed, and that it stays so."""
        assert rank.wait(self.room) == FAILED
        told: Dict[str, str] = rank.ask("failure", room=self.room)
        assert told["kind"] == "KVTransferError", told
        assert int(rank.call(self.room, "poll")) == FAILED
        return told["reason"]

    def released(self) -> None:
        """The decode side's pages may be used again: waits for it, and clears."""
        for rank in self.decode:
            deadline = time.monotonic() + TIMEOUT
            while not rank.ask("is_safe", room=self.room):
                assert time.monotonic() < deadline, "the pages do not come home"
                time.sleep(0.005)
            rank.call(self.room, "clear")


class Engines(unittest.TestCase):
    """Engines that all tests of a class share, by name."""

    wanted: Dict[str, Dict[str, Any]] = {}
    engines: Dict[str, Engine]

    @classmethod
    def setUpClass(cls) -> None:
        cls.engines = {}
        for name, options in cls.wanted.items():
            cls.engines[name] = Engine(**options)
            cls.addClassCleanup(cls.engines[name].close)
        for engine in cls.engines.values():
            engine.ready()

    def request(self, prefill: str, decode: str, count: int, **options: Any) -> Request:
        return Request(self.engines[prefill], self.engines[decode], count, **options)
