"""NIXL's API over crossdock: descriptors, metadata, transfers, and what goes wrong."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import random
import re
import sys
import time
import unittest
from typing import Any, Dict, Tuple
from unittest import mock

from support import SOURCE, TIMEOUT, Case, numpy, torch

if numpy is None:
    raise unittest.SkipTest("crossdock.nixl needs NumPy")

from crossdock import nixl  # noqa: E402
from crossdock.nixl import _bindings as bind  # noqa: E402
from crossdock.nixl import _wire  # noqa: E402
from crossdock.nixl._config import side_of  # noqa: E402

PAGE = 256
PAGES = 64
PAGE_OF_DOCS = SOURCE.parents[1] / "docs" / "nixl.md"


def setUpModule() -> None:
    os.environ.update(
        CROSSDOCK_KEY="a key of these tests alone", CROSSDOCK_HOST="127.0.0.1", CROSSDOCK_NIXL_TIMEOUT="10"
    )
    # What is expected to fail says so.
    logging.getLogger("crossdock.nixl").setLevel(logging.CRITICAL)


def tearDownModule() -> None:
    for name in ("CROSSDOCK_KEY", "CROSSDOCK_HOST", "CROSSDOCK_NIXL_TIMEOUT"):
        del os.environ[name]
    logging.getLogger("crossdock.nixl").setLevel(logging.NOTSET)


class Agent:
    """An agent with a pool of pages."""

    def __init__(self, test: Case, name: str, **options: Any) -> None:
        self.agent = nixl.nixl_agent(name, nixl.nixl_agent_config(capture_telemetry=True, **options))
        test.addCleanup(self.agent.close)
        self.memory = numpy.zeros((PAGES, PAGE), numpy.uint8)
        self.at = self.memory.ctypes.data
        self.descs = self.agent.register_memory([(self.at, PAGES * PAGE, 0, "")], "DRAM")
        # One run, and one row a page.
        self.run = numpy.array([[self.at, PAGE, 0, PAGE, PAGES]], numpy.uint64)
        self.rows = numpy.array([[self.at + page * PAGE, PAGE, 0] for page in range(PAGES)], numpy.uint64)


class Pair(Case):
    """Two agents that know each other."""

    def setUp(self) -> None:
        self.here, self.there = Agent(self, "here"), Agent(self, "there")
        self.here.memory[:] = numpy.arange(PAGES * PAGE).reshape(PAGES, PAGE) % 251
        self.here.agent.add_remote_agent(self.there.agent.get_agent_metadata())
        self.there.agent.add_remote_agent(self.here.agent.get_agent_metadata())

    def sides(self) -> Tuple[Any, Any]:
        local = self.here.agent.prep_xfer_dlist("NIXL_INIT_AGENT", self.here.run, "DRAM")
        return local, self.here.agent.prep_xfer_dlist("there", self.there.rows, "DRAM")

    def made(self, operation: str = "WRITE", message: bytes = b"", pages: Any = range(PAGES)) -> Any:
        local, remote = self.sides()
        numbers = numpy.array(pages, numpy.int32)
        return self.here.agent.make_prepped_xfer(operation, local, numbers, remote, numbers[::-1], message)

    def ended(self, handle: Any, state: str = "") -> str:
        """How it ends; `state` is what `transfer` has answered."""
        begun = time.monotonic()
        while state in ("", "PROC"):
            state = self.here.agent.check_xfer_state(handle)
            self.assertLess(time.monotonic(), begun + TIMEOUT)
            time.sleep(0.0005)
        return state

    def done(self, handle: Any, message: bytes = b"") -> None:
        self.assertEqual(self.ended(handle, self.here.agent.transfer(handle, message)), "DONE")


class Agents(Pair):
    def test_pages_in_any_order(self) -> None:
        handle = self.made()
        with self.assertRaises(bind.nixlNotPostedError):
            self.here.agent.check_xfer_state(handle)
        self.done(handle)
        self.assertTrue((self.there.memory == self.here.memory[::-1]).all())
        told = self.here.agent.get_xfer_telemetry(handle)
        self.assertEqual((told.totalBytes, told.descCount), (PAGES * PAGE, PAGES))
        self.assertGreater(told.xferDuration, 0)
        self.there.memory[:] = 7
        self.done(self.made("READ", pages=[3, 5]))
        self.assertTrue((self.here.memory[[3, 5]] == 7).all())
        self.assertFalse((self.here.memory[4] == 7).all())

    def test_a_handle_is_posted_again_and_again(self) -> None:
        handle = self.made(message=b"first")
        for turn in range(20):
            self.here.memory[:] = turn
            self.done(handle, b"" if turn < 10 else b"again")
            # The notification is there with the state, and the bytes with the notification.
            expected = b"first" if turn < 10 else b"again"
            self.assertEqual(self.there.agent.get_new_notifs(), {"here": [expected]})
            self.assertTrue((self.there.memory == turn).all())
        self.here.agent.release_xfer_handle(handle)
        self.here.agent.release_xfer_handle(handle)
        with self.assertRaises(bind.nixlInvalidParamError):
            self.here.agent.transfer(handle)

    def test_one_post_at_a_time(self) -> None:
        held = self.there.agent._notifier
        handle = self.made(message=b"held back")
        # The receiver does not come to read what arrives.
        with held.changed:
            state = self.here.agent.transfer(handle)
            self.assertEqual(state, "PROC")
            with self.assertRaises(bind.nixlRepostActiveError):
                self.here.agent.transfer(handle)
            with self.assertRaises(bind.nixlNotAllowedError):
                self.here.agent.release_xfer_handle(handle)
            self.assertEqual(self.here.agent.check_xfer_state(handle), "PROC")
        self.assertEqual(self.ended(handle), "DONE")
        handle.release()

    def test_lists_of_both_sides_at_once(self) -> None:
        here, there = self.here.agent, self.there.agent
        local = here.get_xfer_descs([(self.here.at, 300, 0), (self.here.at + 1024, 0, 0)], "DRAM")
        remote = here.get_xfer_descs([(self.there.at + 7, 300, 0), (self.there.at, 0, 0)], "DRAM")
        handle = here.initialize_xfer("WRITE", local, remote, b"there", "as text")
        self.done(handle)
        self.assertEqual(self.there.memory.reshape(-1)[7:307].tolist(), self.here.memory.reshape(-1)[:300].tolist())
        self.assertTrue(there.check_remote_xfer_done(b"here", b"as"))
        self.assertFalse(there.check_remote_xfer_done("here", b"as"))

    def test_what_programs_describe_memory_by(self) -> None:
        agent = self.here.agent
        rows = agent.get_reg_descs([(4096, 10, 0, "meta"), (8192, 20, 1, b"\xff")], "DRAM")
        self.assertEqual((rows[0], rows[1]), ((4096, 10, 0, b"meta"), (8192, 20, 1, b"\xff")))
        moved = rows.trim()
        self.assertEqual((moved.descCount(), moved[1], moved.index((8192, 20, 1))), (2, (8192, 20, 1), 1))
        moved.append((1, 2, 3))
        moved.remDesc(0)
        self.assertEqual(list(moved), [(8192, 20, 1), (1, 2, 3)])
        with self.assertLogs("crossdock.nixl", "ERROR"):
            self.assertIsNone(agent.get_xfer_descs(rows))
            self.assertIsNone(agent.get_xfer_descs([(1, 2)], "DRAM"))
            self.assertIsNone(agent.get_xfer_descs([(1, 2, 3)]))
            self.assertIsNone(agent.get_xfer_descs(self.here.rows))
            self.assertIsNone(agent.get_xfer_descs(numpy.zeros((2, 4), numpy.uint64), "DRAM"))
            self.assertIsNone(agent.get_reg_descs(self.here.memory[:, ::2]))
            with self.assertRaises(TypeError):
                agent.register_memory([(1, 2, 3)], "DRAM")
        array = agent.get_xfer_descs([self.here.memory, self.here.memory[1]])
        self.assertEqual(array[1], (self.here.at + PAGE, PAGE, 0))
        for nothing in ([], numpy.zeros((0, 3), numpy.uint64)):
            with self.assertRaises(bind.nixlInvalidParamError):
                agent.register_memory(nothing, "DRAM")
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.get_xfer_descs([(-1, 2, 3)], "DRAM")
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.get_xfer_descs([(1, 2, 3)], "TAPE")
        if torch is None:
            print("torch is not installed: tensors are not described", file=sys.stderr)
            return
        tensor = torch.zeros(4, 8, dtype=torch.int16)
        self.assertEqual(agent.get_reg_descs(tensor)[0], (tensor.data_ptr(), 64, 0, b""))
        self.assertEqual(agent.get_xfer_descs([tensor, tensor[1]])[1], (tensor[1].data_ptr(), 16, 0))
        with self.assertLogs("crossdock.nixl", "ERROR"):
            self.assertIsNone(agent.get_xfer_descs(tensor.t()))
        with agent_memory(agent, tensor):
            self.assertEqual(agent.query_memory(tensor, "UCX")[0]["length"], "64")

    def test_descriptors_as_bytes(self) -> None:
        agent = self.here.agent
        for descs in (
            agent.get_xfer_descs(self.here.rows, "DRAM"),
            agent.get_reg_descs([(4096, 10, 0, "meta"), (8192, 20, 1, b"\xff")], "DRAM"),
            bind.nixlXferDList(bind.VRAM_SEG),
        ):
            self.assertEqual(agent.deserialize_descs(agent.get_serialized_descs(descs)), descs)
            self.assertEqual(pickle.loads(pickle.dumps(descs)), descs)
        with self.assertRaises(bind.nixlMismatchError):
            agent.deserialize_descs(pickle.dumps(self.here.rows))
        with self.assertRaises(bind.nixlMismatchError):
            agent.deserialize_descs(agent.get_agent_metadata())

    def test_bytes_that_are_damaged(self) -> None:
        agent, noise = self.here.agent, random.Random(7)
        wholes = [
            self.there.agent.get_agent_metadata(),
            agent.get_serialized_descs(agent.get_reg_descs([(4096, 10, 0, "meta")], "DRAM")),
        ]
        for whole, taken in zip(wholes, (agent.add_remote_agent, agent.deserialize_descs)):
            for _ in range(400):
                damaged = bytearray(whole)
                kind = noise.randrange(3)
                if kind == 0:
                    damaged[noise.randrange(len(damaged))] ^= 1 << noise.randrange(8)
                elif kind == 1:
                    del damaged[noise.randrange(len(damaged)) :]
                else:
                    damaged += noise.randbytes(noise.randrange(1, 40))
                with self.assertRaises(bind.nixlMismatchError):
                    taken(bytes(damaged))
            # With a checksum that is right, the rest is looked at just so: it is refused, or makes sense.
            payload = whole[_wire._HEAD.size : -16]
            refused = 0
            for _ in range(400):
                damaged = bytearray(payload)
                for _ in range(noise.randrange(1, 4)):
                    damaged[noise.randrange(len(damaged))] = noise.randrange(256)
                del damaged[noise.randrange(len(damaged) // 2, len(damaged) + 1) :]
                try:
                    taken(_wire._sealed(whole[4], bytes(damaged)))
                except (bind.nixlMismatchError, bind.nixlInvalidParamError, bind.nixlNotFoundError):
                    refused += 1
            self.assertGreater(refused, 100)
        with self.assertRaises(TypeError):
            agent.add_remote_agent("text")

    def test_memory_that_is_registered_later(self) -> None:
        here, there = self.here.agent, self.there.agent
        more = numpy.zeros(4096, numpy.uint8)
        remote = here.get_xfer_descs([(more.ctypes.data, 16, 0)], "DRAM")
        there.register_memory(more)
        self.assertTrue(here.check_remote_metadata("there"))
        self.assertFalse(here.check_remote_metadata("there", remote))
        with self.assertRaises(bind.nixlNotFoundError):
            here.prep_xfer_dlist("there", remote)
        here.add_remote_agent(there.get_agent_metadata())
        self.assertTrue(here.check_remote_metadata("there", remote))
        # What was made before goes on.
        self.done(self.made())

    def test_metadata_in_parts(self) -> None:
        here, there = self.here.agent, self.there.agent
        here.remove_remote_agent("there")
        here.remove_remote_agent("there")
        pages = there.get_reg_descs([(self.there.at, PAGES * PAGE, 0, "")], "DRAM")
        with self.assertRaises(bind.nixlNotFoundError):
            here.add_remote_agent(there.get_partial_agent_metadata(pages))
        here.add_remote_agent(there.get_partial_agent_metadata([], inc_conn_info=True))
        with self.assertRaises(bind.nixlNotFoundError):
            self.sides()
        here.send_notif("there", b"one can talk already")
        here.add_remote_agent(there.get_partial_agent_metadata(pages))
        self.done(self.made())
        with self.assertRaises(bind.nixlNotFoundError):
            there.get_partial_agent_metadata(there.get_reg_descs([(5, 5, 0, "")], "DRAM"))

    def test_registering_twice_and_in_parts(self) -> None:
        agent = self.here.agent
        part = agent.register_memory([(self.here.at + 100, 100, 0, "")], "DRAM")
        again = agent.register_memory(self.here.descs)
        with self.assertRaises(bind.nixlInvalidParamError):
            for _ in range(2):
                agent.deregister_memory(again)
        agent.deregister_memory(part)
        self.done(self.made())
        # Once it was taken back above.
        agent.deregister_memory(again)
        with self.assertRaises(bind.nixlNotFoundError):
            agent.deregister_memory(again)
        with self.assertRaises(bind.nixlNotFoundError):
            self.made()
        with self.assertRaises(bind.nixlNotSupportedError):
            agent.register_memory([(self.here.at, 100, 0, ""), (self.here.at + 50, 100, 0, "")], "DRAM")
        # Another device's number, for the same bytes.
        with self.assertRaises(bind.nixlNotSupportedError):
            agent.register_memory([(self.here.at, 100, 0, ""), (self.here.at, 100, 1, "")], "DRAM")
        # All or nothing.
        self.assertEqual(len(agent._opened().memories.regions().rows), 0)
        for address, nbytes in ((8, 100), (self.here.at, 0)):
            with self.assertRaises(bind.nixlInvalidParamError):
                agent.register_memory([(self.here.at, 100, 0, ""), (address, nbytes, 0, "")], "DRAM")
            self.assertEqual(len(agent._opened().memories.regions().rows), 0)
        self.assertEqual(agent.query_memory(again, "UCX"), [None])

    def test_runs_of_any_lengths(self) -> None:
        noise = random.Random(3)
        memory = numpy.zeros(100000, numpy.uint8)
        at = memory.ctypes.data
        self.here.agent.register_memory(memory)
        for turn in range(40):
            runs, blocks = [], []
            each = noise.choice((0, 7))
            for _ in range(noise.randrange(1, 6)):
                begin, nbytes, stride = noise.randrange(1000), noise.randrange(50), noise.choice((0, 64, 100))
                count = each or noise.randrange(1, 90)
                runs.append((at + begin, nbytes, 0, stride, count))
                blocks += [(at + begin + number * stride, nbytes) for number in range(count)]
            array = numpy.array(runs, numpy.uint64)
            side = side_of(self.here.agent.prep_xfer_dlist("", array, "DRAM"))
            # What was checked stays, whatever becomes of the array.
            array[:] = 0
            chosen = [noise.randrange(len(blocks)) for _ in range(50)]
            kind = noise.choice((numpy.int32, numpy.int64, numpy.uint64, numpy.uint16))
            addresses, lengths = side.take(numpy.array(chosen, kind), "local")
            self.assertEqual(list(zip(addresses.tolist(), lengths.tolist())), [blocks[number] for number in chosen])

    def test_wrong_arguments(self) -> None:
        agent = self.here.agent
        local, remote = self.sides()
        for wrong in (
            ("WRITE", local, [PAGES], remote, [0]),
            ("WRITE", local, [-1], remote, [0]),
            ("WRITE", local, [0, 1], remote, [0]),
            ("WRITE", local, [], remote, []),
            ("WRITE", local, [[0]], remote, [[0]]),
            ("WRITE", local, numpy.zeros(1), remote, [0]),
            ("WRITE", remote, [0], local, [0]),
            ("FLY", local, [0], remote, [0]),
        ):
            with self.subTest(wrong[0], indices=wrong[2]), self.assertRaises(bind.nixlInvalidParamError):
                agent.make_prepped_xfer(*wrong)
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.make_prepped_xfer("WRITE", local, [0], remote, [0], bytes((1 << 20) + 1))
        with self.assertRaises(bind.nixlNotFoundError):
            agent.make_prepped_xfer("WRITE", local, [0], remote, [0], backends=["GDS"])
        short = agent.prep_xfer_dlist("there", [(self.there.at, 10, 0)], "DRAM")
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.make_prepped_xfer("WRITE", local, [0], short, [0])
        agent.release_dlist_handle(short)
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.make_prepped_xfer("WRITE", local, [0], short, [0])
        most = 2**64 - 1
        for run in (
            [self.here.at, PAGE, 0, PAGE, PAGES + 1],
            [self.here.at, PAGE, 0, most // 4, 5],
            [self.here.at, PAGE, 0, most, 2],
            [self.here.at, most, 0, PAGE, 1],
            [self.here.at, PAGE, 1, PAGE, 1],
            [self.here.at - 1, PAGE, 0, PAGE, 1],
        ):
            with self.subTest(run=run), self.assertRaises(bind.nixlNotFoundError):
                agent.prep_xfer_dlist("", numpy.array([run], numpy.uint64), "DRAM")
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.prep_xfer_dlist("", numpy.array([[self.here.at, PAGE, 0, PAGE, 0]], numpy.uint64), "DRAM")
        with self.assertRaises(ValueError):
            agent.prep_xfer_dlist("", self.here.run)
        for unknown in (lambda: agent.make_connection("nobody"), lambda: agent.send_notif("nobody", b"x")):
            with self.assertRaises(bind.nixlNotFoundError):
                unknown()
        with self.assertRaises(TypeError):
            nixl.nixl_agent_config(sync_mode=1)
        with self.assertRaises(ValueError):
            nixl.nixl_agent("")

    def test_what_is_refused_by_name(self) -> None:
        agent = self.here.agent
        for call in (
            lambda: agent.register_memory([(self.here.at, 10, 0, "")], "VRAM"),
            lambda: agent.prep_xfer_dlist("there", self.there.run, "VRAM"),
            lambda: agent.prep_xfer_dlist("here", self.here.run, "DRAM"),
            lambda: agent.prep_mem_view(None),
        ):
            with self.assertRaises(bind.nixlNotSupportedError):
                call()
        with self.assertRaises(bind.nixlNotFoundError):
            agent.create_backend("GDS")
        with self.assertRaises(bind.nixlInvalidParamError):
            agent.create_backend("UCX")
        later = nixl.nixl_agent("later", nixl.nixl_agent_config(backends=[]))
        self.addCleanup(later.close)
        with self.assertRaises(bind.nixlNotFoundError):
            later.get_agent_metadata()
        with self.assertRaises(bind.nixlInvalidParamError):
            later.create_backend("UCX", {"speed": "light"})
        later.create_backend("UCX", {"num_threads": "8"})
        self.assertEqual(
            (later.get_plugin_list(), later.get_backend_mem_types("UCX")), (["UCX", "CROSSDOCK"], ["DRAM_SEG"])
        )
        with self.assertRaises(bind.nixlNoTelemetryError):
            later.get_xfer_telemetry(self.made())


@unittest.skipUnless(PAGE_OF_DOCS.is_file(), "the page is not beside the package")
class Page(unittest.TestCase):
    def test_every_block_runs(self) -> None:
        text = PAGE_OF_DOCS.read_text(encoding="utf-8")
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        self.assertEqual(len(blocks), 2)
        told = io.StringIO()
        names: Dict[str, Any] = {"__name__": "page"}
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(told):
            try:
                for block in blocks:
                    exec(compile(block, str(PAGE_OF_DOCS), "exec"), names)
            finally:
                for name in [name for name in sys.modules if name.partition(".")[0] == "nixl"]:
                    del sys.modules[name]
        self.assertEqual(told.getvalue(), "{'decode': [b'request-7:1']} 12288\n")
        for agent in names["agents"]:
            agent.close()


class agent_memory:
    """Registered for a while."""

    def __init__(self, agent: Any, memory: Any) -> None:
        self._agent, self._descs = agent, agent.register_memory(memory)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._agent.deregister_memory(self._descs)


if __name__ == "__main__":
    unittest.main()
