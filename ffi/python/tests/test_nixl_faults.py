"""NIXL's API over crossdock: what goes wrong, and many threads."""

from __future__ import annotations

import gc
import os
import threading
import time
import unittest
from typing import Any, List
from unittest import mock

from support import TIMEOUT, numpy, run_script

if numpy is None:
    raise unittest.SkipTest("crossdock.nixl needs NumPy")

from crossdock.nixl import _bindings as bind  # noqa: E402
from crossdock.nixl import nixl_agent  # noqa: E402
from crossdock.nixl._xfer import Finisher  # noqa: E402
from test_nixl import Agent, Pair, setUpModule, tearDownModule  # noqa: E402, F401


class Faults(Pair):
    def test_memory_that_the_peer_has_taken_back(self) -> None:
        handle = self.made(message=b"never")
        self.there.agent.deregister_memory(self.there.descs)
        with self.assertLogs("crossdock.nixl", "ERROR") as logs:
            self.assertEqual(self.ended(handle, self.here.agent.transfer(handle)), "ERR")
        self.assertIn("registered", logs.output[0])
        # It stays what it is, and says why.
        self.assertEqual(self.here.agent.check_xfer_state(handle), "ERR")
        with self.assertRaisesRegex(bind.nixlNotFoundError, "registered"):
            self.here.agent.transfer(handle)
        self.assertEqual(self.there.agent.get_new_notifs(), {})
        handle.release()
        # It is the memory that was lost, not the agent.
        self.assertTrue(self.here.agent.check_remote_metadata("there"))
        self.here.agent.send_notif("there", b"one can talk")

    def test_an_agent_that_is_removed_or_restarted(self) -> None:
        handle, sides = self.made(), self.sides()
        self.here.agent.remove_remote_agent(b"there")
        for call in (
            lambda: self.here.agent.transfer(handle),
            lambda: self.here.agent.make_prepped_xfer("WRITE", sides[0], [0], sides[1], [0]),
            self.sides,
        ):
            with self.assertRaises(bind.nixlNotFoundError):
                call()
        self.here.agent.add_remote_agent(self.there.agent.get_agent_metadata())
        self.done(self.made(message=b"known again"))
        self.assertEqual(self.there.agent.get_new_notifs(), {"here": [b"known again"]})
        sides = self.sides()
        again = Agent(self, "there")
        self.assertEqual(self.here.agent.add_remote_agent(again.agent.get_agent_metadata()), b"there")
        with self.assertRaises(bind.nixlNotFoundError):
            self.here.agent.make_prepped_xfer("WRITE", sides[0], [0], sides[1], [0])
        self.there = again
        self.done(self.made(message=b"to the new one"))
        self.assertEqual(again.agent.get_new_notifs(), {"here": [b"to the new one"]})

    def test_a_peer_that_is_gone(self) -> None:
        os.environ["CROSSDOCK_NIXL_TIMEOUT"] = "1"
        self.addCleanup(os.environ.update, CROSSDOCK_NIXL_TIMEOUT="10")
        self.here = Agent(self, "hasty")
        metadata = self.there.agent.get_agent_metadata()
        self.here.agent.add_remote_agent(metadata)
        handle = self.made()
        self.done(handle)
        self.there.agent.close()
        with self.assertLogs("crossdock.nixl", "ERROR"):
            self.assertEqual(self.ended(handle, self.here.agent.transfer(handle)), "ERR")
        # It is lost, and not known any more.
        self.assertFalse(self.here.agent.check_remote_metadata("there"))
        with self.assertRaises(bind.nixlNotFoundError):
            self.here.agent.send_notif("there", b"x")
        self.here.agent.add_remote_agent(metadata)
        with self.assertRaises(bind.nixlRemoteDisconnectError):
            self.here.agent.make_connection("there")
        with self.assertRaises(bind.nixlNotAllowedError):
            self.there.agent.get_new_notifs()

    def test_a_transfer_that_nobody_asks_about_tells_the_peer(self) -> None:
        self.here.agent.transfer(self.made(message=b"unasked"))
        begun, came = time.monotonic(), {}
        while not came:
            came = self.there.agent.get_new_notifs()
            self.assertLess(time.monotonic(), begun + TIMEOUT)
            time.sleep(0.001)
        self.assertEqual(came, {"here": [b"unasked"]})
        self.assertTrue((self.there.memory == self.here.memory[::-1]).all())

    def test_one_that_is_posted_again_while_others_are_looked_at(self) -> None:
        finisher, again, asked = Finisher(), threading.Event(), threading.Event()

        def first(seconds: float) -> bool:
            if again.is_set():
                asked.set()
            return True

        def second(seconds: float) -> bool:
            if not again.is_set():
                again.set()
                finisher.add(one)
            return True

        one, other = mock.Mock(wait=first), mock.Mock(wait=second)
        self.addCleanup(finisher.close)
        with finisher._changed:
            finisher.add(one)
            finisher.add(other)
        self.assertTrue(asked.wait(TIMEOUT / 4), "it is forgotten")

    def test_many_threads_share_an_agent(self) -> None:
        failed: List[Any] = []

        def work(thread: int) -> None:
            try:
                pages = numpy.arange(thread * 8, thread * 8 + 8)
                for turn in range(20):
                    local, remote = self.sides()
                    message = b"%d:%d" % (thread, turn)
                    handle = self.here.agent.make_prepped_xfer("WRITE", local, pages, remote, pages, message)
                    self.done(handle)
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failed, [])
        self.assertTrue((self.there.memory == self.here.memory).all())
        self.assertEqual(len(set(self.there.agent.get_new_notifs()["here"])), 160)

    def test_memory_that_was_taken_back_here(self) -> None:
        handle = self.made("READ", message=b"never")
        self.here.agent.deregister_memory(self.here.descs)
        with self.assertLogs("crossdock.nixl", "ERROR"):
            self.assertEqual(self.ended(handle, self.here.agent.transfer(handle)), "ERR")
        with self.assertRaises(bind.nixlNotFoundError):
            self.made("READ")
        self.here.agent.register_memory(self.here.descs)
        self.done(self.made("READ", message=b"now"))
        self.assertEqual(self.there.agent.get_new_notifs(), {"here": [b"now"]})

    def test_an_agent_that_nobody_holds_ends(self) -> None:
        def threads() -> List[threading.Thread]:
            return [thread for thread in threading.enumerate() if thread.name.startswith("crossdock-nixl")]

        before = len(threads())
        agent = nixl_agent("brief")
        agent.add_remote_agent(self.there.agent.get_agent_metadata())
        agent.send_notif("there", b"hello")
        self.assertGreater(len(threads()), before)
        del agent
        gc.collect()
        self.assertEqual(len(threads()), before)
        self.assertEqual(self.there.agent.get_new_notifs(), {"brief": [b"hello"]})

    def test_a_forked_process_is_told(self) -> None:
        done = run_script("""
            import os
            import crossdock
            from crossdock.nixl import nixl_agent
            os.environ["CROSSDOCK_HOST"] = "127.0.0.1"
            agent = nixl_agent("parent")
            child = os.fork()
            if not child:
                try:
                    agent.get_new_notifs()
                except crossdock.Forked:
                    agent.close()
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            assert agent.get_new_notifs() == {}
            """.replace("\n            ", "\n"))
        self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main()
