"""Processes that are ranks of something: they gather what all of them say, hear their parent, and never outlive it."""

from __future__ import annotations

import multiprocessing
import traceback
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Type

TIMEOUT = 60.0

# A process that is forked could use nothing that crossdock has made before.
_context = multiprocessing.get_context("spawn")


def received(connection: Connection, whose: str) -> Any:
    if not connection.poll(TIMEOUT):
        raise TimeoutError(f"{whose} has said nothing for {TIMEOUT:.0f} s")
    return connection.recv()


class Ranks:
    """One rank's end of a group, with the calls that DeepEP asks of one."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._others: Dict[int, Connection] = {}

    @classmethod
    def together(cls, size: int) -> List[Ranks]:
        ranks = [cls(rank) for rank in range(size)]
        for low in range(size):
            for high in range(low + 1, size):
                ranks[low]._others[high], ranks[high]._others[low] = _context.Pipe()
        return ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self._others) + 1

    def all_gather(self, told: Any) -> List[Any]:
        """What every rank has told, by rank."""
        heard = {self._rank: told}
        for other, connection in sorted(self._others.items()):
            # The lower one of a pair speaks first, so that two never fill their pipe at once.
            if self._rank < other:
                connection.send(told)
            heard[other] = received(connection, f"rank {other}")
            if self._rank > other:
                connection.send(told)
        return [heard[rank] for rank in range(self.size())]

    def close(self) -> None:
        for connection in self._others.values():
            connection.close()


class Parent:
    """What a process has of its parent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, told: Any) -> None:
        self._connection.send((True, told))

    def receive(self) -> Any:
        return received(self._connection, "the parent")


Work = Callable[..., Any]


def _run(work: Work, ranks: Ranks, connection: Connection, arguments: Any) -> None:
    try:
        connection.send((True, work(ranks, Parent(connection), *arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))


class Processes:
    """Is left with all of them ended."""

    def __init__(self) -> None:
        self._processes: Dict[Connection, Any] = {}

    def start(self, name: str, work: Work, size: int, *arguments: Any) -> None:
        """Runs `work(ranks, parent, *arguments)` in so many processes. What it returns is told to the parent."""
        for ranks in Ranks.together(size):
            here, there = _context.Pipe()
            full_name = f"{name}-{ranks.rank()}"
            process = _context.Process(target=_run, args=(work, ranks, there, arguments), name=full_name, daemon=True)
            self._processes[here] = process
            process.start()
            # Only the processes have them now, so that one that dies is noticed by the others.
            there.close()
            ranks.close()

    def tell(self, told: Any) -> None:
        """Tells all of them."""
        for connection in self._processes:
            connection.send(told)

    def hear(self) -> Dict[str, Any]:
        """What each of them says next, by name. Raises in the words of one that has failed."""
        heard: Dict[str, Any] = {}
        left = dict(self._processes)
        while left:
            ready = wait(list(left), TIMEOUT)
            if not ready:
                names = ", ".join(process.name for process in left.values())
                raise TimeoutError(f"{names}: nothing for {TIMEOUT:.0f} s")
            for connection in ready:
                process = left.pop(connection)
                try:
                    is_good, told = connection.recv()
                except EOFError:
                    process.join(TIMEOUT)
                    raise RuntimeError(f"{process.name} ended with code {process.exitcode}") from None
                if not is_good:
                    raise RuntimeError(f"{process.name} failed:\n{told}")
                heard[process.name] = told
        return heard

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for connection, process in self._processes.items():
            # Those that have told everything end by themselves.
            if kind is None:
                process.join(TIMEOUT)
            if process.pid is not None:
                process.kill()
                process.join()
            connection.close()
