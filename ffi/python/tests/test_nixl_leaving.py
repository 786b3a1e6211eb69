"""NIXL's API over crossdock: memory that a peer which stands still does not let go."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import unittest
from typing import Any, List, Tuple
from unittest import mock

from support import TIMEOUT, Case, crossdock, numpy, script_environment

if numpy is None:
    raise unittest.SkipTest("crossdock.nixl needs NumPy")

from crossdock.nixl import _api, _memory  # noqa: E402
from crossdock.nixl import _bindings as bind  # noqa: E402
from test_nixl import PAGE, PAGES, Agent, setUpModule, tearDownModule  # noqa: E402, F401

# It knows all memory of whoever wrote the metadata to its standard input.
PEER = """
import sys
from crossdock.nixl import nixl_agent

agent = nixl_agent("peer")
other = agent.add_remote_agent(bytes.fromhex(sys.stdin.readline()))
agent.make_connection(other)
print(agent.get_agent_metadata().hex(), flush=True)
sys.stdin.readline()
"""


class Leaving(Case):
    def setUp(self) -> None:
        self.here = Agent(self, "here")
        self.more = numpy.zeros(PAGE, numpy.uint8)
        self.more_descs = self.here.agent.register_memory(self.more)
        for name in ("LEAVE_SECONDS", "AGAIN_SECONDS"):
            self.entered(mock.patch.object(_memory, name, 0.2))

    def halted(self) -> subprocess.Popen[str]:
        """A peer that is connected, and stands still."""
        peer = subprocess.Popen(
            [sys.executable, "-c", PEER],
            env=script_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(peer.__exit__, None, None, None)
        self.addCleanup(peer.kill)
        assert peer.stdin is not None and peer.stdout is not None
        peer.stdin.write(self.here.agent.get_agent_metadata().hex() + "\n")
        peer.stdin.flush()
        self.assertTrue(select.select([peer.stdout], [], [], TIMEOUT)[0], "the peer says nothing")
        self.here.agent.add_remote_agent(bytes.fromhex(peer.stdout.readline()))
        os.kill(peer.pid, signal.SIGSTOP)
        # Its threads may run on for a moment.
        os.waitpid(peer.pid, os.WUNTRACED)
        return peer

    def gone(self, peer: subprocess.Popen[str]) -> None:
        peer.kill()
        peer.wait()

    def registered(self) -> List[int]:
        """Where what peers are told of begins."""
        return [row[0] for row in self.here.agent._opened().memories.regions().rows.tolist()]

    def both(self) -> List[Tuple[int, int, int, str]]:
        return [(self.here.at, PAGES * PAGE, 0, ""), (self.more.ctypes.data, PAGE, 0, "")]

    def is_reached(self) -> bool:
        """Whether somebody who meets the agent now can read its first page."""
        there = Agent(self, "there")
        there.agent.add_remote_agent(self.here.agent.get_agent_metadata())
        try:
            mine, theirs = (there.agent.get_xfer_descs([(at, PAGE, 0)], "DRAM") for at in (there.at, self.here.at))
            handle = there.agent.initialize_xfer("READ", mine, theirs, "here")
        except bind.nixlNotFoundError:
            return False
        state, until = there.agent.transfer(handle), time.monotonic() + TIMEOUT
        while state == "PROC" and time.monotonic() < until:
            state = there.agent.check_xfer_state(handle)
        there.agent.release_xfer_handle(handle)
        return state == "DONE"

    def test_the_same_call_is_made_again_after_the_peer_has_gone(self) -> None:
        peer = self.halted()
        for _ in range(2):
            with self.assertRaisesRegex(bind.nixlNotAllowedError, "ask again"):
                self.here.agent.deregister_memory(self.here.descs)
            self.assertEqual(self.registered(), [self.more.ctypes.data])
            self.assertEqual(self.here.agent.query_memory(self.here.descs, "UCX"), [None])
        self.gone(peer)
        with mock.patch.object(_memory, "LEAVE_SECONDS", TIMEOUT):
            self.here.agent.deregister_memory(self.here.descs)
        with self.assertRaises(bind.nixlNotFoundError):
            self.here.agent.deregister_memory(self.here.descs)
        self.here.agent.register_memory(self.here.descs)
        self.assertTrue(self.is_reached())

    def test_it_is_not_registered_again_before_it_has_left(self) -> None:
        peer = self.halted()
        with self.assertRaises(bind.nixlNotAllowedError):
            self.here.agent.deregister_memory(self.here.descs)
        # As a whole or in part, alone or with others.
        other = numpy.zeros(PAGE, numpy.uint8)
        for at, nbytes in ((self.here.at, PAGES * PAGE), (self.here.at + PAGE, PAGE)):
            with self.assertRaisesRegex(bind.nixlNotAllowedError, "can still reach"):
                self.here.agent.register_memory([(other.ctypes.data, PAGE, 0, ""), (at, nbytes, 0, "")], "DRAM")
        self.assertEqual(self.registered(), [self.more.ctypes.data])
        self.assertFalse(self.is_reached())
        self.gone(peer)
        with mock.patch.object(_memory, "AGAIN_SECONDS", TIMEOUT):
            self.here.agent.register_memory(self.here.descs)
        self.assertTrue(self.is_reached())
        self.here.agent.deregister_memory(self.here.descs)
        self.assertFalse(self.is_reached())

    def test_several_of_which_one_leaves_late(self) -> None:
        agent, memories = self.here.agent, self.here.agent._opened().memories
        agent.register_memory(self.more_descs)
        last = numpy.zeros(PAGE, numpy.uint8)
        agent.register_memory(last)
        asked = [*self.both(), (last.ctypes.data, PAGE, 0, "")]
        late, unregister = {self.here.at}, memories._endpoint.unregister

        def stuck(memory: Any, timeout: float) -> None:
            if memory.address in late:
                raise crossdock.Busy("a peer that stands still", "", 7, True)
            unregister(memory, timeout)

        descs = agent.get_reg_descs(asked, "DRAM")
        with mock.patch.object(memories, "_endpoint", mock.Mock(unregister=stuck)):
            for _ in range(3):
                with self.assertRaises(bind.nixlNotAllowedError) as caught:
                    agent.deregister_memory(descs)
                # The others have left, and what was registered twice was not counted twice.
                self.assertIn(f"{self.here.at:#x}", str(caught.exception))
                self.assertNotIn(f"{last.ctypes.data:#x}", str(caught.exception))
                self.assertEqual(self.registered(), [self.more.ctypes.data])
            late.clear()
            agent.deregister_memory(descs)
        self.assertEqual(self.registered(), [self.more.ctypes.data])
        agent.deregister_memory(self.more_descs)
        self.assertEqual((self.registered(), memories._leaving, memories._memories), ([], {}, {}))

    def test_others_are_answered_meanwhile(self) -> None:
        self.halted()
        agent, failed = self.here.agent, []

        def leave() -> None:
            try:
                agent.deregister_memory(self.here.descs)
            except bind.nixlNotAllowedError as error:
                failed.append(error)

        with mock.patch.object(_memory, "LEAVE_SECONDS", 1.0):
            leaving = threading.Thread(target=leave)
            leaving.start()
            until = time.monotonic() + TIMEOUT
            while self.here.at in self.registered():
                self.assertLess(time.monotonic(), until)
                time.sleep(0.001)
            run = numpy.array([[self.more.ctypes.data, PAGE, 0, PAGE, 1]], numpy.uint64)
            agent.release_dlist_handle(agent.prep_xfer_dlist("", run, "DRAM"))
            agent.get_agent_metadata()
            self.assertEqual(failed, [], "it waited for the one that leaves")
            leaving.join()
        self.assertEqual(len(failed), 1)

    def test_an_agent_is_closed_when_nobody_reaches_its_memory(self) -> None:
        peer = self.halted()
        with mock.patch.object(_api, "CLOSE_SECONDS", 0.1):
            for _ in range(2):
                with self.assertRaises(bind.nixlNotAllowedError) as caught:
                    self.here.agent.close()
                for at, nbytes, _, _ in self.both():
                    self.assertIn(f"{nbytes} bytes at {at:#x}", str(caught.exception))
            with self.assertRaisesRegex(bind.nixlNotAllowedError, "closed"):
                self.here.agent.register_memory(self.here.descs)
        means = self.here.agent._means
        assert means is not None
        endpoint = means.endpoint
        self.assertTrue(endpoint.handle(), "it sees to the peers still")
        self.gone(peer)
        for _ in range(2):
            self.here.agent.close()
        with self.assertRaises(crossdock.BadHandle):
            endpoint.handle()

    def test_an_agent_that_is_dropped_says_what_may_be_written(self) -> None:
        self.halted()
        with self.assertLogs("crossdock.nixl", "ERROR") as logs:
            self.here.agent._drop()
        for at, nbytes, _, _ in self.both():
            self.assertTrue(any(f"{nbytes} bytes at {at:#x}" in line for line in logs.output), logs.output)


if __name__ == "__main__":
    unittest.main()
