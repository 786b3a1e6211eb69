"""An engine in a process of its own, which steps all the time, takes commands, and says what has come of requests. Such
processes are forked off one that has imported everything, and has no node.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any, Dict, Optional, Sequence, Set
from unittest import mock

import torch

from .vllm_case import Engine, Shape

_context: Any = multiprocessing.get_context("forkserver")


class Process:
    """An engine, seen by the test that has started it."""

    def __init__(self, environment: Dict[str, str], role: str, shape: Shape, tp: int = 1, **options: Any) -> None:
        _context.set_forkserver_preload([__name__])
        self._pipe, theirs = _context.Pipe()
        key = environment["CROSSDOCK_KEY"]
        self.process = _context.Process(target=run, args=(theirs, key, role, shape, tp, options), daemon=True)
        # Of the process that all others are forked off, if this is the first.
        with mock.patch.dict("os.environ", environment):
            self.process.start()
        theirs.close()
        self._kept: Dict[str, Dict[str, Any]] = {}

    def add(self, name: str, prompt: Sequence[int], params: Any = None, most: int = 1) -> None:
        self._pipe.send((name, list(prompt), params, most))

    def heard(self, name: str, timeout: float) -> Dict[str, Any]:
        """What it says of a request that is over."""
        deadline = time.monotonic() + timeout
        while name not in self._kept:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"nothing is said of {name}")
            told = self._pipe.recv()
            self._kept[told.pop("name")] = told
        return self._kept.pop(name)

    def is_idle(self, timeout: float) -> bool:
        """Whether it has no request, and no block of one."""
        self._pipe.send(None)
        return bool(self.heard("", timeout)["is_idle"])

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self._pipe.close()


def run(pipe: Any, key: str, role: str, shape: Shape, tp: int, options: Dict[str, Any]) -> None:
    """The process."""
    os.environ["CROSSDOCK_KEY"] = key
    torch.set_num_threads(1)
    engine = Engine(role, shape, tp, **options)
    said: Set[str] = set()
    while True:
        while pipe.poll():
            command: Optional[Any] = pipe.recv()
            if command is None:
                pipe.send(dict(name="", is_idle=engine.is_idle()))
            else:
                name, prompt, params, most = command
                engine.add(name, prompt, params, most=most)
        engine.step()
        for name in engine.over.keys() - said:
            said.add(name)
            pipe.send(
                dict(
                    name=name,
                    over=engine.over[name],
                    tokens=engine.tokens.get(name, []),
                    params=engine.params.get(name),
                    computed=engine.computed.get(name, 0),
                )
            )
        time.sleep(0.001)
