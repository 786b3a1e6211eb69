"""A program that was written for `mooncake.engine` runs on crossdock."""

import ctypes
import functools
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from typing import Any
from unittest import mock

from support import TIMEOUT, crossdock, script_environment

from crossdock import mooncake


def engine(protocol: str = "tcp") -> mooncake.TransferEngine:
    made = mooncake.TransferEngine()
    assert made.initialize("127.0.0.1", "P2PHANDSHAKE", protocol, "") == 0
    return made


def session(of: mooncake.TransferEngine) -> str:
    return f"127.0.0.1:{of.get_rpc_port()}"


def buffer(nbytes: int, seed: int = 0) -> "ctypes.Array[ctypes.c_char]":
    made = ctypes.create_string_buffer(nbytes)
    made.raw = bytes((at * 7 + seed) % 251 for at in range(nbytes))
    return made


class Mooncake(unittest.TestCase):
    def setUp(self) -> None:
        self.here, self.there = engine(), engine()
        self.local, self.remote = buffer(1 << 20, 1), buffer(1 << 20, 2)
        self.at = ctypes.addressof(self.local)
        self.there_at = ctypes.addressof(self.remote)
        self.assertEqual(self.here.register_memory(self.at, 1 << 20), 0)
        self.assertEqual(self.there.register_memory(self.there_at, 1 << 20), 0)
        self.peer = session(self.there)

    def tearDown(self) -> None:
        self.here.close()
        self.there.close()

    def test_one_block_goes_there_and_back(self) -> None:
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, self.there_at + 100, 5000), 0)
        self.assertEqual(self.remote.raw[100:5100], self.local.raw[:5000])
        self.assertEqual(self.here.transfer_sync_read(self.peer, self.at + 9000, self.there_at + 100, 5000), 0)
        self.assertEqual(self.local.raw[9000:14000], self.local.raw[:5000])

    def test_pages_of_several_layers_go_in_one_batch(self) -> None:
        pages = [(layer, page) for layer in range(4) for page in (3, 1, 7, 2)]
        sources = [self.at + layer * 65536 + page * 4096 for layer, page in pages]
        targets = [self.there_at + layer * 65536 + (page + 8) * 4096 for layer, page in pages]
        lengths = [4096] * len(pages)
        self.assertEqual(self.here.batch_transfer_sync_write(self.peer, sources, targets, lengths), 0)
        for source, target in zip(sources, targets):
            self.assertEqual(ctypes.string_at(target, 4096), ctypes.string_at(source, 4096))
        self.assertEqual(self.here.batch_transfer_sync_read(self.peer, targets_of(sources), targets, lengths), 0)

    def test_batches_that_are_not_waited_for_have_numbers(self) -> None:
        batches = [
            self.here.batch_transfer_async_write(self.peer, [self.at + at], [self.there_at + at], [4096])
            for at in range(0, 1 << 20, 65536)
        ]
        self.assertEqual(len(set(batches)), 16)
        self.assertTrue(all(batches))
        self.assertEqual(self.here.get_batch_transfer_status(batches), 0)
        self.assertEqual(self.here.get_batch_transfer_status(batches[:1]), -1, "it is forgotten")
        one = self.here.transfer_submit_write(self.peer, self.at, self.there_at, 1 << 20)
        answer = 0
        while answer == 0:
            answer = self.here.transfer_check_status(one)
        self.assertEqual(answer, 1)
        self.assertEqual(self.remote.raw, self.local.raw)
        self.assertEqual(self.here.transfer_check_status(one), -1)

    def test_what_is_not_registered_is_refused(self) -> None:
        other = buffer(4096)
        at = ctypes.addressof(other)
        self.assertEqual(self.here.transfer_sync_write(self.peer, at, self.there_at, 4096), -1)
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, at, 4096), -1)
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, self.there_at, (1 << 20) + 1), -1)
        self.assertEqual(self.here.register_memory(self.at + 5, 10), -1, "it is registered already")
        self.assertEqual(self.here.unregister_memory(at), -1)
        self.assertEqual(self.here.register_memory(1 << 46, 4096), -1, "nothing is there")
        self.assertEqual(self.here.batch_register_memory([at, self.at], [4096, 1]), -1)
        self.assertEqual(self.here.register_memory(at, 4096), 0, "nothing of the failed call is left")
        self.assertEqual(self.there.register_memory(at, 4096), 0)
        # The peer has registered it since it was met.
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, at, 4096), 0)
        self.assertEqual(other.raw, self.local.raw[:4096])
        self.assertEqual(self.there.unregister_memory(at), 0)
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, at, 4096), -1)
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, self.there_at, 4096), 0)

    def test_lists_of_other_lengths_and_notifications_are_refused(self) -> None:
        self.assertEqual(self.here.batch_transfer_sync_write(self.peer, [self.at], [], [1]), -1)
        self.assertEqual(self.here.batch_transfer_async_write(self.peer, [self.at], [], [1]), 0)
        self.assertEqual(self.here.batch_transfer_sync_write(self.peer, [self.at], [self.there_at], [-1]), -1)
        notify = mooncake.TransferNotify("room", "7")
        answer = self.here.transfer_sync(self.peer, self.at, self.there_at, 1, mooncake.Write, notify)
        self.assertEqual((answer, self.there.get_notifies()), (-1, []))

    def test_a_probe_says_whether_a_peer_answers(self) -> None:
        self.assertEqual(self.here.send_probe(self.peer), 0)
        os.environ["MC_TRANSFER_TIMEOUT"] = "5"
        self.addCleanup(os.environ.pop, "MC_TRANSFER_TIMEOUT")
        hasty = engine()
        self.addCleanup(hasty.close)
        hasty._seconds = 0.2
        self.assertEqual(hasty.send_probe("127.0.0.1:1"), -1)
        self.assertEqual(hasty.send_probe("no port"), -1)

    def test_managed_buffers_are_registered(self) -> None:
        one, other = self.here.allocate_managed_buffer(8192), self.there.allocate_managed_buffer(8192)
        self.assertEqual(self.here.write_bytes_to_buffer(one, b"pages" * 100, 500), 0)
        self.assertEqual(self.here.transfer_sync_write(self.peer, one, other, 500), 0)
        self.assertEqual(self.there.read_bytes_from_buffer(other, 500), b"pages" * 100)
        self.assertEqual(self.here.free_managed_buffer(one, 8192), 0)
        self.assertEqual(self.here.transfer_sync_write(self.peer, one, other, 500), -1)

    def test_an_engine_that_is_not_initialized_says_so(self) -> None:
        idle = mooncake.TransferEngine()
        self.assertEqual((idle.register_memory(self.at, 5), idle.send_probe(self.peer)), (-1, -1))
        self.assertEqual(idle.get_rpc_port(), 0)
        self.assertEqual(idle.initialize("127.0.0.1", "P2PHANDSHAKE", "carrier pigeon", ""), -1)
        self.assertEqual(self.here.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""), -1)

    def test_many_threads_share_an_engine(self) -> None:
        failed = []

        def work(thread: int) -> None:
            for turn in range(20):
                at = thread * 65536 + turn * 1024
                if self.here.transfer_sync_write(self.peer, self.at + at, self.there_at + at, 1024):
                    failed.append((thread, turn))

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failed, [])
        self.assertEqual(self.remote.raw[65536 : 65536 + 20480], self.local.raw[65536 : 65536 + 20480])

    def test_a_peer_that_is_gone_fails_transfers(self) -> None:
        self.assertEqual(self.here.send_probe(self.peer), 0)
        self.here._seconds = 0.5
        self.there.close()
        self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, self.there_at, 4096), -1)


# Prints where it listens and where its memory begins.
PEER = """
    import ctypes, sys
    from crossdock.mooncake import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    memory = ctypes.create_string_buffer(1 << 20)
    assert engine.register_memory(ctypes.addressof(memory), 1 << 20) == 0
    print(engine.get_rpc_port(), ctypes.addressof(memory), flush=True)
    sys.stdin.readline()
"""


UNREGISTER = crossdock.Endpoint.unregister


class PeersThatStandStill(unittest.TestCase):
    def setUp(self) -> None:
        self.here, self.local = engine(), buffer(1 << 20, 1)
        self.addCleanup(self.here.close)
        self.here._seconds = 0.3
        self.at = ctypes.addressof(self.local)
        self.assertEqual(self.here.register_memory(self.at, 1 << 20), 0)
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        command = [sys.executable, "-c", textwrap.dedent(PEER)]
        pipes.update(text=True, env=script_environment())
        self.process = subprocess.Popen(command, **pipes)
        self.addCleanup(self.process.__exit__, None, None, None)
        self.addCleanup(self.process.kill)
        port, self.there_at = map(int, self.process.stdout.readline().split())
        self.peer = f"127.0.0.1:{port}"
        self.assertEqual(self.here.send_probe(self.peer), 0)
        os.kill(self.process.pid, signal.SIGSTOP)
        # Its threads may run on for a moment.
        os.waitpid(self.process.pid, os.WUNTRACED)

    def test_a_transfer_is_told_to_be_late_once(self) -> None:
        batch = self.here.batch_transfer_async_write(self.peer, [self.at], [self.there_at], [1 << 20])
        begun, answer = time.monotonic(), 0
        with self.assertLogs("crossdock.mooncake", "ERROR") as logs:
            while answer == 0:
                self.assertLess(time.monotonic(), begun + TIMEOUT)
                answer = self.here.transfer_check_status(batch)
                time.sleep(0.005)
        self.assertEqual(answer, -2)
        self.assertIn("may still touch", logs.output[0])
        self.assertEqual(self.here.transfer_check_status(batch), -1, "it is forgotten")

    def test_one_that_is_waited_for_fails_and_the_memory_is_not_free(self) -> None:
        with self.assertLogs("crossdock.mooncake", "ERROR") as logs:
            self.assertEqual(self.here.transfer_sync_write(self.peer, self.at, self.there_at, 1 << 20), -1)
        self.assertIn("may still touch", logs.output[-1])
        with mock.patch.object(crossdock.Endpoint, "unregister", functools.partialmethod(UNREGISTER, timeout=0.1)):
            self.assertEqual(self.here.unregister_memory(self.at), -1)
        self.process.kill()
        self.assertEqual(self.here.unregister_memory(self.at), 0)

    def test_it_is_closed_when_nobody_reaches_its_memory(self) -> None:
        with mock.patch.object(mooncake, "CLOSE_SECONDS", 0.1):
            for _ in range(2):
                with self.assertLogs("crossdock.mooncake", "ERROR") as logs:
                    self.assertEqual(self.here.close(), -1)
                self.assertIn(f"{1 << 20} bytes at {self.at:#x}", logs.output[0])
            self.assertNotEqual(self.here.get_rpc_port(), 0)
        self.process.kill()
        self.process.wait()
        for _ in range(2):
            self.assertEqual(self.here.close(), 0)
        self.assertEqual((self.here.get_rpc_port(), self.here.send_probe(self.peer)), (0, -1))


def targets_of(sources: "list[int]") -> "list[int]":
    return [source + 512 * 1024 for source in sources]


PROGRAM = """
    import ctypes, sys
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    memory = ctypes.create_string_buffer(65536)
    assert engine.register_memory(ctypes.addressof(memory), 65536) == 0
    print(engine.get_rpc_port(), ctypes.addressof(memory), flush=True)
    peer, at = sys.stdin.readline().split()
    if peer != "-":
        memory.raw = b"from the prefill side".ljust(65536, b".")
        assert engine.transfer_sync_write(peer, ctypes.addressof(memory), int(at), 65536) == 0
    sys.stdin.readline()
    print(memory.raw.rstrip(b".").decode().strip(chr(0)), flush=True)
"""


class Programs(unittest.TestCase):
    def test_two_programs_run_unchanged(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "program.py")
            with open(path, "w") as file:
                file.write(textwrap.dedent(PROGRAM))
            root = os.path.dirname(os.path.dirname(crossdock.__file__))
            environment = {**os.environ, "PYTHONPATH": root, "CROSSDOCK_KEY": "a key of this test alone"}
            command = [sys.executable, "-m", "crossdock.mooncake", path]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
            decode, prefill = (subprocess.Popen(command, **pipes) for _ in range(2))  # type: ignore[call-overload]
            try:
                port, at = decode.stdout.readline().split()
                prefill.stdout.readline()
                prefill.stdin.write(f"127.0.0.1:{port} {at}\n\n")
                prefill.stdin.flush()
                self.assertEqual(prefill.stdout.readline().strip(), "from the prefill side")
                decode.stdin.write("- -\n\n")
                decode.stdin.flush()
                self.assertEqual(decode.stdout.readline().strip(), "from the prefill side")
                self.assertEqual((prefill.wait(30), decode.wait(30)), (0, 0))
            finally:
                for process in (decode, prefill):
                    process.kill()
                    process.communicate()


if __name__ == "__main__":
    unittest.main()
