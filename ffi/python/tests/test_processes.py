"""Several processes: hand-overs between two, forks, the end of the interpreter, signals, a peer that stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import unittest
from typing import Any, Tuple

from support import LAYERS, PAGES, TIMEOUT, Case, Worker, crossdock, page_numbers, run_script, script_environment

TOKENS = 100

PREFILL = """
from support import *
worker = Worker("prefill")
worker.fill(11)
print(worker.node.address, flush=True)
rooms = []
for line in sys.stdin:
    kind, room = line.split()
    if kind == "push":
        rooms.append(worker.node.send(int(room), 100, page_numbers(1, 7)))
        rooms[-1].send(range(LAYERS))
        rooms[-1].finish(b"pushed")
    elif kind == "begin":
        rooms.append(worker.node.send(int(room), 100, page_numbers(1, 7)))
        rooms[-1].send(0)
    else:
        rooms.append(worker.node.serve(int(room), 100, page_numbers(1, 7), aux=b"served"))
    print("opened", flush=True)
for room in rooms:
    room.wait(20)
    room.close()
worker.close()
"""


class TwoProcesses(Case):
    def start(self) -> Tuple[Any, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PREFILL],
            env=script_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.addCleanup(process.__exit__, None, None, None)
        self.addCleanup(process.kill)
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    def ask(self, process: Any, what: str) -> None:
        process.stdin.write(what + "\n")
        process.stdin.flush()
        self.assertEqual(process.stdout.readline(), "opened\n")

    def wait_for_arrivals(self, receiving: crossdock.Receiving) -> None:
        begun = time.monotonic()
        while receiving.arrivals == 0:
            self.assertLess(time.monotonic(), begun + TIMEOUT)
            time.sleep(0.001)

    def test_pushed_and_pulled(self) -> None:
        for ports in ("shm,tcp", "tcp"):
            with self.subTest(ports), Worker("decode", ports=ports) as decode, Worker("same") as same:
                same.fill(11)
                process, address = self.start()
                peer = decode.node.connect(address)
                self.assertEqual(peer.wait(TIMEOUT).name, "prefill")
                for room, open_room, kind in ((1, decode.node.receive, "push"), (2, decode.node.fetch, "serve")):
                    decode.fill(room)
                    with open_room(peer, room, TOKENS, page_numbers(room, 7)) as receiving:
                        self.ask(process, f"{kind} {room}")
                        end = receiving.wait(TIMEOUT).check()
                        self.assertIn(end.aux, (b"pushed", b"served"))
                        receiving.wait_pages(TIMEOUT)
                    for layer in range(LAYERS):
                        for source, target in zip(page_numbers(1, 6), page_numbers(room, 6)):
                            self.assertEqual(decode.page(layer, target), same.page(layer, source))
                process.stdin.close()
                self.assertEqual(process.wait(TIMEOUT), 0)
                peer.close()

    def test_a_peer_that_is_killed(self) -> None:
        process, address = self.start()
        with Worker("decode", heartbeat=0.05) as decode:
            peer = decode.node.connect(address)
            with decode.node.receive(peer, 1, TOKENS, range(7)) as receiving:
                self.ask(process, "begin 1")
                self.wait_for_arrivals(receiving)
                process.kill()
                self.assertEqual(receiving.wait(TIMEOUT).outcome, crossdock.Outcome.PEER_LOST)
                receiving.wait_pages(TIMEOUT)
            self.assertEqual(decode.pool.stats().free, PAGES)
            peer.close()

    def test_pages_that_never_come_home(self) -> None:
        """The peer stands still: nobody knows whether it still writes when the node is closed."""
        process, address = self.start()
        with Worker("decode") as decode:
            peer = decode.node.connect(address)
            receiving = decode.node.receive(peer, 1, TOKENS, range(7), deadline=0.5)
            self.ask(process, "begin 1")
            self.wait_for_arrivals(receiving)
            os.kill(process.pid, signal.SIGSTOP)
            # Its threads may run on for a moment.
            os.waitpid(process.pid, os.WUNTRACED)
            self.assertEqual(receiving.wait(TIMEOUT).outcome, crossdock.Outcome.EXPIRED)
            with self.assertRaises(crossdock.TimedOut):
                receiving.wait_pages(0.05)
            self.assertEqual(decode.pool.stats().quarantined, 7)
            with self.assertRaises(crossdock.PageInQuarantine) as caught:
                decode.node.receive(peer, 2, TOKENS, range(7))
            self.assertTrue(caught.exception.is_retryable)
            decode.node.close()
            with self.assertRaises(crossdock.Abandoned):
                receiving.wait_pages(TIMEOUT)
            self.assertEqual(decode.pool.stats().abandoned, 7)
            with crossdock.Node("next", decode.layout, decode.memory, decode.pool, authentication="off") as later:
                nobody = later.connect("127.0.0.1:9")
                with self.assertRaises(crossdock.PageAbandoned):
                    later.receive(nobody, 2, TOKENS, range(7))
                nobody.close()
            os.kill(process.pid, signal.SIGCONT)
            peer.close()
            receiving.close()


class Programs(Case):
    def ran(self, script: str) -> str:
        begun = time.monotonic()
        done = run_script(script)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertLess(time.monotonic() - begun, TIMEOUT)
        return done.stdout

    def test_the_end_of_a_program_with_open_nodes(self) -> None:
        self.ran(
            """
from support import *
import threading
prefill, decode = Worker("prefill"), Worker("decode")
registry = crossdock.Registry()
client = crossdock.RegistryClient(registry.address)
mine = dict(node="decode", incarnation=5, role="decode", address=decode.node.address, ttl_ms=10000)
registration = client.register(mine)
registration.wait(20)
peer = decode.node.connect(prefill.node.address)
peer.wait(20)
receiving = decode.node.receive(peer, 1, 100, range(7))
def listen():
    try:
        while True:
            decode.node.wait()
    except crossdock.Stopped:
        pass
waiting = threading.Thread(target=receiving.wait, daemon=True)
listening = threading.Thread(target=listen, daemon=True)
waiting.start()
listening.start()
"""
        )
        self.ran(
            """
from support import *
import asyncio
prefill, decode = Worker("prefill"), Worker("decode")
peer = decode.node.connect(prefill.node.address)
async def main():
    await peer
    receiving = decode.node.receive(peer, 1, 100, range(7), deadline=0.05)
    await receiving
    asyncio.ensure_future(decode.node.wait_events())
asyncio.run(main())
sys.exit(0)
"""
        )

    def test_fork(self) -> None:
        told = self.ran(
            """
from support import *
import asyncio, gc, warnings
# Python itself warns of a fork where there are threads.
warnings.simplefilter("ignore", DeprecationWarning)
worker = Worker("parent")
peer = worker.node.connect("127.0.0.1:9")
receiving = worker.node.receive(peer, 1, 100, range(7))
pages = crossdock.Pool(4, allocates=True).take(2)
registry = crossdock.Registry()
child = os.fork()
if child == 0:
    calls = [
        lambda: worker.node.receive(peer, 2, 100, range(7)), lambda: worker.node.send(2, 100, range(7)),
        lambda: worker.node.connect("127.0.0.1:9"), worker.node.events, worker.node.wait, worker.node.stats,
        worker.node.fileno, worker.node.close, peer.poll, peer.wait, peer.close, receiving.poll, receiving.wait,
        receiving.wait_pages, receiving.cancel, receiving.close, worker.pool.stats, worker.pool.close, worker.layout.close,
        worker.memory[0].close, lambda: worker.memory[0].view, lambda: pages.ids, pages.close, registry.close,
        lambda: asyncio.run(worker.node.wait_events()), lambda: worker.layout.pages,
    ]
    for at, call in enumerate(calls):
        try:
            call()
            print("call", at, "went through", flush=True)
        except crossdock.Forked as error:
            assert "forked" in str(error) and error.advice, error
    del calls, worker, peer, receiving, pages, registry
    gc.collect()
    # What the child makes itself is its own.
    crossdock.Pool(4).close()
    print("child", flush=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
receiving.cancel()
print(receiving.wait(20).outcome.name)
for one in (receiving, peer, pages, registry, worker):
    one.close()
"""
        )
        self.assertEqual(told.split(), ["child", "CANCELLED"])

    def test_ctrl_c(self) -> None:
        for wait in (
            "receiving.wait()",
            "receiving.wait_pages()",
            "peer.wait()",
            "[worker.node.wait() for _ in range(9)]",
        ):
            with self.subTest(wait):
                told = self.ran(
                    f"""
from support import *
import signal, threading
# What starts programs in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
worker = Worker("worker")
peer = worker.node.connect("127.0.0.1:9")
receiving = worker.node.receive(peer, 1, 100, range(7))
threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted")
receiving.close()
peer.close()
"""
                )
                self.assertEqual(told, "interrupted\n")


if __name__ == "__main__":
    unittest.main()
