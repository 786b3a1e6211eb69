"""Endpoints: memory that comes and goes, and peers that stand still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import unittest

from support import KEY, TIMEOUT, Case, crossdock, script_environment

from crossdock import Endpoint, Memory

# Knows all memory of the endpoint that it is told of.
PEER = f"""
import sys
from support import KEY
from crossdock import Endpoint

with Endpoint("peer", key=KEY, bind="127.0.0.1:0") as endpoint:
    endpoint.write(sys.argv[1], [], [], []).wait({TIMEOUT})
    print("met", flush=True)
    sys.stdin.readline()
"""


class Endpoints(Case):
    def setUp(self) -> None:
        self.here = self.entered(Endpoint("here", key=KEY, bind="127.0.0.1:0"))

    def halted(self) -> subprocess.Popen[str]:
        """A peer that is connected, and stands still."""
        command = [sys.executable, "-c", PEER, self.here.address]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        peer = subprocess.Popen(command, text=True, env=script_environment(), **pipes)
        self.addCleanup(peer.__exit__, None, None, None)
        self.addCleanup(peer.kill)
        assert peer.stdout is not None
        self.assertEqual(peer.stdout.readline(), "met\n")
        os.kill(peer.pid, signal.SIGSTOP)
        # Its threads may run on for a moment.
        os.waitpid(peer.pid, os.WUNTRACED)
        return peer

    def test_taken_back_after_it_has_left_by_itself(self) -> None:
        block = bytearray(4096)
        memory, array = Memory.of(bytearray(4096)), self.here.register(block)
        self.here.register(memory)
        peer = self.halted()
        for one in (memory, array):
            with self.assertRaises(crossdock.TimedOut):
                self.here.unregister(one, timeout=0.1)
        with self.assertRaises(crossdock.Busy):
            memory.close()
        peer.kill()
        until = time.monotonic() + TIMEOUT
        while not memory._is_closed:
            try:
                memory.close()
            except crossdock.Busy:
                self.assertLess(time.monotonic(), until)
                time.sleep(0.005)
        for one in (memory, array):
            self.here.unregister(one)
            with self.assertRaises(crossdock.BadArgument):
                self.here.unregister(one)
        # It is its owner's alone.
        block.append(1)

    def test_registered_again_after_it_has_left_by_itself(self) -> None:
        block = bytearray(4096)
        array = self.here.register(block)
        peer = self.halted()
        with self.assertRaises(crossdock.TimedOut):
            self.here.unregister(array, timeout=0.1)
        with self.assertRaisesRegex(crossdock.BadArgument, "registered"):
            self.here.register(block)
        peer.kill()
        until = time.monotonic() + TIMEOUT
        while True:
            try:
                again = self.here.register(block)
                break
            except crossdock.BadArgument:
                self.assertLess(time.monotonic(), until)
                time.sleep(0.005)
        self.here.unregister(again)
        del array, again
        block.append(1)

    def test_what_was_never_registered(self) -> None:
        with Memory(4096) as memory, self.assertRaises(crossdock.BadArgument):
            self.here.unregister(memory)
        with self.assertRaises(crossdock.BadArgument):
            self.here.unregister(0, timeout=-1)


if __name__ == "__main__":
    unittest.main()
