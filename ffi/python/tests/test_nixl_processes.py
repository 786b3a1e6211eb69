"""A program that was written for NIXL, unchanged, in processes of its own: it shakes hands as vLLM's workers do."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import unittest
from typing import Any, Dict, List, Tuple
from unittest import mock

from support import TIMEOUT, Case, crossdock, numpy

if numpy is None:
    raise unittest.SkipTest("crossdock.nixl needs NumPy")

from crossdock import nixl  # noqa: E402
from crossdock.nixl import __main__ as command  # noqa: E402

# Runs with NIXL's own package just so. The side channel is a pipe: `answer` prints what a handshake tells, `meet` takes
# the other side's. The prefill side never meets: as in vLLM, it hears from agents that it does not know.
PROGRAM = """
    import sys, time
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config

    LAYERS, PAGES, PAGE = 3, 256, 512
    agent = nixl_agent(sys.argv[1], nixl_agent_config(num_threads=2, capture_telemetry=True))
    cache = np.zeros((LAYERS, PAGES, PAGE), np.uint8)
    layers = [cache[layer].ctypes.data for layer in range(LAYERS)]
    descs = agent.get_reg_descs([(base, PAGES * PAGE, 0, "") for base in layers], "DRAM")
    agent.register_memory(descs, backends=["UCX"])
    handles = {}

    def runs(bases):
        return np.array([(base, PAGE, 0, PAGE, PAGES) for base in bases], np.uint64)

    def numbers(seed, count):
        pages = np.random.default_rng(seed).permutation(PAGES)[:count]
        return (np.arange(LAYERS)[:, None] * PAGES + pages).reshape(-1).astype(np.int32)

    def answer():
        return agent.get_agent_metadata().hex() + "," + ",".join(map(str, layers))

    def meet(told):
        global peer, local, remote
        metadata, *bases = told.split(",")
        peer = agent.add_remote_agent(bytes.fromhex(metadata))
        local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", runs(layers), "DRAM")
        remote = agent.prep_xfer_dlist(peer, runs(map(int, bases)), "DRAM")
        return peer.decode()

    def post(name, operation, mine, theirs, count, message):
        count = int(count)
        handle = agent.make_prepped_xfer(
            operation, local, numbers(int(mine), count), remote, numbers(int(theirs), count), notif_msg=message.encode()
        )
        handles[name] = handle
        return agent.transfer(handle)

    def finish(name):
        handle, state = handles[name], "PROC"
        while state == "PROC":
            state = agent.check_xfer_state(handle)
            time.sleep(0.001)
        if state == "DONE":
            told = agent.get_xfer_telemetry(handle)
            state += f" {told.totalBytes} {told.xferDuration > 0}"
        agent.release_xfer_handle(handles.pop(name))
        return state

    def notifs(count):
        found = {}
        while sum(map(len, found.values())) < int(count):
            for name, messages in agent.get_new_notifs().items():
                found.setdefault(name, []).extend(message.decode() for message in messages)
            time.sleep(0.001)
        return sorted(found.items())

    def until(last):
        found = []
        while last not in found:
            for messages in agent.get_new_notifs().values():
                found += [message.decode() for message in messages]
            time.sleep(0.001)
        return " ".join(found)

    def send(*messages):
        for message in messages:
            agent.send_notif(peer, notif_msg=message.encode())

    def fill(factor):
        cache[:] = (np.arange(cache.size).reshape(cache.shape) * int(factor)) % 251

    def digest(seed, count):
        import hashlib
        return hashlib.sha256(cache.reshape(-1, PAGE)[numbers(int(seed), int(count))].tobytes()).hexdigest()

    def known():
        return agent.check_remote_metadata(peer)

    def sleep_and_wake():
        agent.deregister_memory(descs)
        agent.register_memory(descs, backends=["UCX"])

    def over():
        agent.release_dlist_handle(local)
        agent.release_dlist_handle(remote)
        agent.remove_remote_agent(peer)
        agent.deregister_memory(descs)

    for line in sys.stdin:
        name, *words = line.split()
        try:
            print(globals()[name](*words), flush=True)
        except Exception as error:
            print("raised", type(error).__name__, flush=True)
"""
BYTES = 3 * 512


class Program:
    """One of the processes."""

    def __init__(self, test: Case, command: List[str], environment: Dict[str, str], folder: str) -> None:
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        test.addCleanup(self.process.__exit__, None, None, None)
        test.addCleanup(self.process.kill)

    def say(self, *words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
            raise AssertionError("the program says nothing")
        return self.process.stdout.readline().strip()

    def ask(self, *words: Any) -> str:
        self.say(*words)
        return self.hear()

    def move(self, operation: str, mine: int, theirs: int, count: int, message: str) -> str:
        posted = self.ask("post", "one", operation, mine, theirs, count, message)
        return self.ask("finish", "one") if posted in ("PROC", "DONE") else posted


class Programs(Case):
    def setUp(self) -> None:
        folder = self.entered(tempfile.TemporaryDirectory())
        self.path = os.path.join(folder, "program.py")
        with open(self.path, "w") as file:
            file.write(textwrap.dedent(PROGRAM))

    def environment(self, **more: str) -> Dict[str, str]:
        root = os.path.dirname(os.path.dirname(crossdock.__file__))
        shared = {"CROSSDOCK_KEY": "a key of this test alone", "CROSSDOCK_HOST": "127.0.0.1", "PYTHONPATH": root}
        return {**os.environ, **shared, **more}

    def program(self, name: str, way: str = "path", **more: str) -> Program:
        """In each way that the module knows."""
        environment = self.environment(**more)
        line = {
            "path": [sys.executable, "-m", "crossdock.nixl", self.path],
            "module": [sys.executable, "-m", "crossdock.nixl", "-m", "program"],
            "alias": [sys.executable, self.path],
        }[way]
        if way == "alias":
            environment["PYTHONPATH"] += os.pathsep + nixl.alias_path()
        return Program(self, [*line, name], environment, os.path.dirname(self.path))

    def pair(self, **more: str) -> Tuple[Program, Program]:
        prefill, decode = self.program("prefill", **more), self.program("decode", "alias", **more)
        self.assertEqual(decode.ask("meet", prefill.ask("answer")), "prefill")
        return prefill, decode

    def test_a_handshake_reads_writes_and_the_end(self) -> None:
        prefill, decode = self.pair()
        prefill.ask("fill", 3)
        # Pulled by whom the prefill side does not know: it learns by the notification that it may free its pages.
        self.assertEqual(decode.move("READ", 1, 2, 100, "req-1:1"), f"DONE {100 * BYTES} True")
        self.assertEqual(prefill.ask("notifs", 1), "[('decode', ['req-1:1'])]")
        self.assertEqual(decode.ask("digest", 1, 100), prefill.ask("digest", 2, 100))
        # Heartbeats and a full prefix hit keep their order, among several reads.
        decode.ask("send", "HB:a", "HB:b", "req-2:1")
        self.assertEqual(prefill.ask("notifs", 3), "[('decode', ['HB:a', 'HB:b', 'req-2:1'])]")
        # Pushed: the bytes are there with the notification.
        decode.ask("meet", prefill.ask("answer"))
        prefill.ask("meet", decode.ask("answer"))
        prefill.ask("fill", 7)
        self.assertEqual(prefill.move("WRITE", 3, 4, 256, "req-3:1"), f"DONE {256 * BYTES} True")
        self.assertEqual(decode.ask("notifs", 1), "[('prefill', ['req-3:1'])]")
        self.assertEqual(decode.ask("digest", 4, 256), prefill.ask("digest", 3, 256))
        # Memory is given back, registered again, and told of anew.
        prefill.ask("sleep_and_wake")
        decode.ask("meet", prefill.ask("answer"))
        self.assertEqual(decode.move("READ", 5, 6, 50, "req-4:1"), f"DONE {50 * BYTES} True")
        self.assertEqual(decode.ask("digest", 5, 50), prefill.ask("digest", 6, 50))
        for program in (decode, prefill):
            self.assertEqual(program.ask("over"), "None")
            self.assertEqual(program.ask("post", "a", "READ", 1, 1, 1, "late"), "raised nixlInvalidParamError")
            program.process.stdin.close()  # type: ignore[union-attr]
            self.assertEqual(program.process.wait(TIMEOUT), 0)

    def test_a_peer_that_is_killed_in_the_middle(self) -> None:
        prefill, decode = self.pair(CROSSDOCK_NIXL_TIMEOUT="5")
        self.assertEqual(decode.move("READ", 1, 1, 10, "before"), f"DONE {10 * BYTES} True")
        os.kill(prefill.process.pid, signal.SIGSTOP)
        # Its threads may run on for a moment.
        os.waitpid(prefill.process.pid, os.WUNTRACED)
        for name, operation in (("a", "READ"), ("b", "WRITE")):
            self.assertEqual(decode.ask("post", name, operation, 1, 2, 256, "during"), "PROC")
        prefill.process.kill()
        prefill.process.wait()
        self.assertEqual([decode.ask("finish", name) for name in "ab"], ["ERR", "ERR"])
        # As NIXL does it: whoever was lost is not known any more, until its metadata comes again.
        self.assertEqual(decode.ask("known"), "False")
        self.assertEqual(decode.ask("post", "c", "READ", 1, 2, 1, "after"), "raised nixlNotFoundError")
        self.assertEqual(decode.ask("send", "after"), "raised nixlNotFoundError")
        again = self.program("prefill", "module")
        decode.ask("meet", again.ask("answer"))
        again.ask("fill", 5)
        self.assertEqual(decode.move("READ", 1, 2, 10, "again"), f"DONE {10 * BYTES} True")
        self.assertEqual(again.ask("notifs", 1), "[('decode', ['again'])]")
        self.assertEqual(decode.ask("digest", 1, 10), again.ask("digest", 2, 10))

    def test_a_peer_that_stands_still(self) -> None:
        prefill, decode = self.pair(CROSSDOCK_NIXL_TIMEOUT="1")
        self.assertEqual(decode.move("WRITE", 1, 1, 256, "before"), f"DONE {256 * BYTES} True")
        os.kill(prefill.process.pid, signal.SIGSTOP)
        # Its threads may run on for a moment.
        os.waitpid(prefill.process.pid, os.WUNTRACED)
        # Or with a handle that is not released as long as the peer may still touch the memory.
        self.assertIn(decode.move("WRITE", 1, 2, 256, "while"), ("ERR", "raised nixlNotAllowedError"))
        os.kill(prefill.process.pid, signal.SIGCONT)
        decode.ask("meet", prefill.ask("answer"))
        self.assertEqual(decode.move("WRITE", 1, 4, 256, "later"), f"DONE {256 * BYTES} True")
        # What it was not heard to have got, it may have got.
        self.assertIn(prefill.ask("until", "later"), ("before later", "before while later"))
        self.assertEqual(decode.ask("digest", 1, 256), prefill.ask("digest", 4, 256))

    def test_what_the_command_takes(self) -> None:
        for arguments in ([], ["-m"]):
            with (
                mock.patch.object(sys, "argv", ["crossdock.nixl", *arguments]),
                self.assertRaisesRegex(SystemExit, "usage"),
            ):
                command.main()
        told = io.StringIO()
        with mock.patch.object(sys, "argv", ["crossdock.nixl", "--path"]), contextlib.redirect_stdout(told):
            command.main()
        self.assertEqual(os.listdir(told.getvalue().strip()), ["nixl"])


if __name__ == "__main__":
    unittest.main()
