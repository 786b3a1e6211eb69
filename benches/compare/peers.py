"""Moves scattered pages between two processes with another library, when told to.

    python peers.py nixl|mooncake shm|tcp shared|private POOL_MIB

Says its version, then answers each line {"page_bytes", "payload_mib"} of its input with what one pass came to. As in
kvbench, both pools are permuted, what can be prepared is prepared before the clock starts, which runs from posting until
the initiator knows that all pages have arrived, and the other process then checks every word.
"""
import ctypes
import json
import mmap
import multiprocessing
import os
import signal
import sys
import time
from importlib import metadata

import numpy as np

MIB = 1 << 20


class Pool:
    """Memory of the same kind as kvbench's, whose pages are present: a file that others could map, or private."""

    def __init__(self, memory, mib):
        if memory == "shared":
            file = os.memfd_create("pool")
            os.ftruncate(file, mib * MIB)
            self.mapped = mmap.mmap(file, mib * MIB, flags=mmap.MAP_SHARED)
        else:
            self.mapped = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.words = np.frombuffer(self.mapped, dtype=np.uint64)
        self.words[:] = 0
        self.base, self.bytes = self.words.ctypes.data, mib * MIB

    def pages(self, page_bytes):
        return self.words.reshape(-1, page_bytes // 8)


class Pass:
    """The lists and the content of a pass: both processes make the same of it."""

    def __init__(self, pool, page_bytes, payload_mib, seed):
        slots = pool.bytes // page_bytes
        count = min(payload_mib * MIB // page_bytes, slots)
        random = np.random.default_rng(seed)
        self.source = random.permutation(slots)[:count]
        self.destination = random.permutation(slots)[:count]
        self.page_bytes, self.seed = page_bytes, seed

    def content(self, source):
        words = self.page_bytes // 8
        first = source.astype(np.uint64)[:, None] * np.uint64(words)
        return (first + np.arange(words, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(self.seed)

    def parts(self):
        # A part fits the cache, and the whole needs no second copy of the pool.
        step = max(1, MIB // self.page_bytes)
        for at in range(0, len(self.source), step):
            yield self.source[at:at + step], self.destination[at:at + step]

    def fill(self, pool):
        for source, _ in self.parts():
            pool.pages(self.page_bytes)[source] = self.content(source)

    def is_right(self, pool):
        return all(np.array_equal(pool.pages(self.page_bytes)[destination], self.content(source))
                   for source, destination in self.parts())


class Nixl:
    """UCX without progress threads, which suits two cores best, and over shm without CMA: its best configuration."""

    def __init__(self, name, medium):
        os.environ["UCX_TLS"] = {"shm": "posix,sysv,self", "tcp": "tcp"}[medium]
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
        os.environ.setdefault("UCX_LOG_LEVEL", "error")
        os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
        from nixl._api import nixl_agent, nixl_agent_config
        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
        # UCX's shared memory offers no error handling, and would not be chosen with it.
        handling = {"ucx_error_handling_mode": "none"} if medium == "shm" else {}
        self.agent.create_backend("UCX", handling)
        self.lists = {}

    @staticmethod
    def version():
        return metadata.version("nixl")

    def offer(self, pool):
        self.pool = pool
        self.agent.register_memory([(pool.base, pool.bytes, 0, "")], "DRAM")
        return self.agent.get_agent_metadata(), pool.base

    def meet(self, offer):
        description, self.remote_base = offer
        self.peer = self.agent.add_remote_agent(description)

    def progress(self):
        self.agent.get_new_notifs()

    def describe(self, page_bytes):
        """Describes every page of both pools once: a pass then names pages by number."""
        if page_bytes in self.lists:
            return
        offsets = np.arange(self.pool.bytes // page_bytes, dtype=np.uint64) * np.uint64(page_bytes)

        def rows_from(base):
            rows = np.zeros((len(offsets), 3), dtype=np.uint64)
            rows[:, 0], rows[:, 1] = offsets + np.uint64(base), page_bytes
            return rows

        here = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", rows_from(self.pool.base), "DRAM")
        there = self.agent.prep_xfer_dlist(self.peer, rows_from(self.remote_base), "DRAM")
        self.lists[page_bytes] = here, there

    def prepare(self, page_bytes, source, destination):
        here, there = self.lists[page_bytes]
        return self.agent.make_prepped_xfer("WRITE", here, source.astype(np.int32), there,
                                            destination.astype(np.int32))

    def write(self, request):
        state = self.agent.transfer(request)
        while state == "PROC":
            state = self.agent.check_xfer_state(request)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")

    def release(self, request):
        self.agent.release_xfer_handle(request)


class Mooncake:
    """The transfer engine over TCP, which is all it has between two processes without RDMA."""

    PAGES_A_CALL = 1024

    def __init__(self, _name, _medium):
        os.environ.setdefault("MC_TCP_BIND_ADDRESS", "127.0.0.1")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        os.environ.setdefault("GLOG_minloglevel", "2")
        from mooncake.engine import TransferEngine
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("the engine did not start")

    @staticmethod
    def version():
        return metadata.version("mooncake-transfer-engine-non-cuda")

    def offer(self, pool):
        self.pool = pool
        if self.engine.register_memory(pool.base, pool.bytes) != 0:
            raise RuntimeError("the memory was not registered")
        return f"127.0.0.1:{self.engine.get_rpc_port()}", pool.base

    def meet(self, offer):
        self.peer, self.remote_base = offer

    def progress(self):
        time.sleep(1e-5)  # it has threads of its own

    def describe(self, page_bytes):
        pass

    def prepare(self, page_bytes, source, destination):
        here = (source * page_bytes + self.pool.base).tolist()
        there = (destination * page_bytes + self.remote_base).tolist()
        parts = [slice(at, at + self.PAGES_A_CALL) for at in range(0, len(here), self.PAGES_A_CALL)]
        return [(here[part], there[part], [page_bytes] * len(here[part])) for part in parts]

    def write(self, batches):
        for here, there, lengths in batches:
            if self.engine.batch_transfer_sync_write(self.peer, here, there, lengths) != 0:
                raise RuntimeError("a batch was not written")

    def release(self, batches):
        pass


PEERS = {"nixl": Nixl, "mooncake": Mooncake}


def cpu_s(process):
    """What all threads of a process have used: its clock is named after it, as clock_getcpuclockid does."""
    return time.clock_gettime(~process << 3 | 2)


def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def target(pipe, name, medium, memory, mib):
    end_with_parent()
    peer, pool = PEERS[name]("target", medium), Pool(memory, mib)
    pipe.send(peer.offer(pool))
    peer.meet(pipe.recv())
    while True:
        asked = pipe.recv()
        pipe.send(None if isinstance(asked, str) else Pass(pool, *asked).is_right(pool))
        # Only during a pass: between two of them it would take a core from whoever is measured then.
        while asked == "begin" and not pipe.poll():
            # Looking at the pipe takes longer than a look for messages.
            for _ in range(64):
                peer.progress()


def main():
    end_with_parent()
    name, medium, memory, mib = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    # What the libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    child = context.Process(target=target, args=(other, name, medium, memory, mib), daemon=True)
    child.start()
    other.close()
    peer, pool = PEERS[name]("initiator", medium), Pool(memory, mib)
    ours, theirs = peer.offer(pool), pipe.recv()
    pipe.send(ours)
    peer.meet(theirs)
    say = lambda what: print(json.dumps(what), file=answers, flush=True)  # noqa: E731
    say({"version": peer.version()})

    def ask(what):
        pipe.send(what)
        return pipe.recv()

    for seed, line in enumerate(sys.stdin, 1):
        wanted = json.loads(line)
        asked = (wanted["page_bytes"], wanted["payload_mib"], seed)
        work = Pass(pool, *asked)
        work.fill(pool)
        peer.describe(work.page_bytes)
        begin = time.perf_counter()
        request = peer.prepare(work.page_bytes, work.source, work.destination)
        prepare_s = time.perf_counter() - begin
        ask("begin")
        # It begins to spin on the core of the process that woke it; the scheduler needs a moment to part the two.
        time.sleep(0.05)
        used_s = -cpu_s(os.getpid()) - cpu_s(child.pid)
        begin = time.perf_counter()
        peer.write(request)
        seconds = time.perf_counter() - begin
        used_s += cpu_s(os.getpid()) + cpu_s(child.pid)
        ask("end")
        peer.release(request)
        gb = len(work.source) * work.page_bytes / 1e9
        say({"gb_per_s": gb / seconds, "cpu_s_per_gb": used_s / gb, "prepare_ms": prepare_s * 1e3,
             "verified": bool(ask(asked))})
    os._exit(0)


if __name__ == "__main__":
    main()
