"""A process that has SGLang's modules and forks one for each rank: they take longer to import than all tests take."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional

from . import sglang as wheel

_TESTS = Path(__file__).resolve().parents[1]
_MOST_BYTES = 1 << 16


class Nursery:
    """The other end, for tests. It goes when this program goes."""

    _made: Optional[Nursery] = None

    def __init__(self) -> None:
        wheel.unpacked()
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")])
        script = f"from engines.sglang_nursery import main; main({there.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", script],
            # The threads of a library do not survive a fork.
            env={**os.environ, "PYTHONPATH": path, "CROSSDOCK_TEST_SCRIPT": "1", "OPENBLAS_NUM_THREADS": "1"},
            stderr=None if os.environ.get("CROSSDOCK_TEST_STDERR") else subprocess.DEVNULL,
            pass_fds=[there.fileno()],
        )
        there.close()
        self._socket = here

    @classmethod
    def get(cls) -> Nursery:
        if cls._made is None:
            cls._made = cls()
            atexit.register(cls._made.close)
        return cls._made

    def close(self) -> None:
        self._socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def child(self, env: Dict[str, str], timeout: float) -> Child:
        its_input, our_output = os.pipe()
        our_input, its_output = os.pipe()
        self._socket.settimeout(timeout)
        socket.send_fds(self._socket, [json.dumps(env).encode()], [its_input, its_output])
        os.close(its_input)
        os.close(its_output)
        answer = self._socket.recv(_MOST_BYTES)
        if not answer:
            raise AssertionError("the process that forks ranks has ended: CROSSDOCK_TEST_STDERR=1 shows why")
        return Child(int(answer), our_output, our_input)


class Child:
    """A rank's process. It is gone when its output has ended."""

    def __init__(self, pid: int, output: int, given: int) -> None:
        self.pid = pid
        self._output = output
        self._input = given
        self._rest = b""
        self._is_gone = False

    def write(self, line: bytes) -> None:
        view = memoryview(line)
        while view:
            view = view[os.write(self._output, view) :]

    def line(self, timeout: float) -> Optional[bytes]:
        """The next one; `None` if the process has ended."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            got = self._read(deadline - time.monotonic())
            if not got:
                return None
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _read(self, timeout: float) -> bytes:
        if timeout <= 0 or not select.select([self._input], [], [], timeout)[0]:
            raise TimeoutError
        got = os.read(self._input, _MOST_BYTES)
        self._is_gone = not got
        return got

    def kill(self) -> None:
        if not self._is_gone:
            os.kill(self.pid, signal.SIGKILL)
            while self._read(10.0):
                pass

    def close(self) -> None:
        """Ends its input, and waits until it has ended."""
        os.close(self._output)
        deadline = time.monotonic() + 10.0
        try:
            while not self._is_gone:
                self._read(deadline - time.monotonic())
        except TimeoutError:
            self.kill()
        os.close(self._input)


def main(descriptor: int) -> None:
    wheel.prepare()
    for name in ("common.conn", "mooncake.conn", "utils"):
        importlib.import_module(f"sglang.srt.disaggregation.{name}")
    # Nobody waits for the ranks here.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    ours = socket.socket(fileno=descriptor)
    while True:
        env, descriptors, _, _ = socket.recv_fds(ours, _MOST_BYTES, 2)
        if not env:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            _be_a_rank(ours, json.loads(env), *descriptors)
        for one in descriptors:
            os.close(one)
        ours.send(str(pid).encode())


def _be_a_rank(ours: socket.socket, env: Dict[str, str], given: int, output: int) -> Any:
    from .sglang_rank import serve

    ours.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(env)
    try:
        serve(os.fdopen(given), os.fdopen(output, "w"))
    finally:
        # As the scheduler's process ends: with whatever threads SGLang has left.
        os._exit(0)
