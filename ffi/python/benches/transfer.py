"""A DeepSeek-R1 prompt, moved from Python between two processes of this host, beside what a user would take instead.

    python ffi/python/benches/transfer.py [--rounds 5] [--json] [--install] [--memory private] [--tokens 8192 …]

A prompt of 8,192 tokens at a page size of one token is 499,712 pieces of 1,152 bytes; both sides' pages are permuted
anew for each pass. One pass of each system after the other, round by round, in turning order; every piece is compared
on arrival. Seconds run from the call that submits until the side that submits knows that all pieces have landed. Of
each the median and the least are told, and the median of the ratios within a round; `others` are the cores that
everything else on the machine used meanwhile.

Pools are of the same kind for all: files in memory that other processes may map, or private memory (--memory
private). The peers are NIXL (UCX over shared memory without CMA and without progress threads, its best on two cores;
UCX_TLS and --progress-thread say otherwise) and Mooncake (TCP, all that it has between processes without RDMA).
`--install` has pip put them, once, into CROSSDOCK_COMPARE_CACHE, or crossdock-compare in the user's cache. What is not
there is told and left out; memcpy, the floor, is always there.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from transfer_peers import peers
from transfer_sides import PROGRESS_THREAD, SYSTEMS, Shape, side_of

# Of one pass, or of the start: peers that spin beside other work can be very slow.
LONGEST_S = 300.0
# What is asked of crossdock: so many times as fast as each peer, and so long in the calls that submit.
RATIO, SUBMIT_MS = 3.0, 1.0


# The two processes of a system.


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def be_other(pipe: Any, system: str, shape: Shape) -> None:
    """The side without the clock: the target, or who serves."""
    end_with_parent()
    is_writer = system == "crossdock-pull"
    side = side_of(system, shape, is_writer)
    pipe.send(side.offer())
    side.meet(pipe.recv())
    pipe.send("met")
    while True:
        what, order = pipe.recv()
        if what == "ready":
            pipe.send(side.ready(order))
            # Only while something moves: it would take a core from whoever is measured then.
            while not pipe.poll():
                for _ in range(64):
                    side.progress()
        elif what == "done":
            side.done()
            pipe.send(not side.receives or side.is_right(order))


def be_one(system: str, shape: Shape) -> None:
    """The side with the clock. Answers each number of its input with what that pass came to."""
    end_with_parent()
    # What the libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    child = context.Process(target=be_other, args=(other, system, shape), daemon=True)
    child.start()
    other.close()
    is_writer = system != "crossdock-pull"
    side = side_of(system, shape, is_writer)
    theirs = pipe.recv()
    pipe.send(side.offer())
    side.meet(theirs)
    pipe.recv()

    def ask(what: str, order: int) -> Any:
        pipe.send((what, order))
        return pipe.recv()

    print(json.dumps({"version": side.version()}), file=answers, flush=True)
    for line in sys.stdin:
        order = int(line)
        prepared = side.prepared(order)
        told = ask("ready", order)
        # The scheduler needs a moment to part two processes of which one has woken the other.
        time.sleep(0.05)
        busy, used = -busy_seconds(), -cpu_seconds(os.getpid()) - cpu_seconds(child.pid)
        told.update(side.moved(prepared))
        used += cpu_seconds(os.getpid()) + cpu_seconds(child.pid)
        busy += busy_seconds()
        is_right = ask("done", order) and (not side.receives or side.is_right(order))
        told.update(cpu_seconds=used, others=max(0.0, busy - used) / told["seconds"], is_right=bool(is_right))
        print(json.dumps(told), file=answers, flush=True)
    # The peers' threads do not end by themselves.
    child.kill()
    os._exit(0)


def cpu_seconds(process: Optional[int]) -> float:
    """Of all its threads: its clock is named after it, as clock_getcpuclockid does."""
    assert process is not None
    return time.clock_gettime(~process << 3 | 2)


def busy_seconds() -> float:
    """Of all processors of the machine, by whatever runs there."""
    ticks = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


# All systems in turn.


class Pair:
    def __init__(self, system: str, python: str, environment: Dict[str, str], shape: Shape) -> None:
        self.system = system
        # A file: nobody reads before the end, and a pipe that is full would stop whoever has much to say.
        self.words = None if os.environ.get("CROSSDOCK_BENCH_STDERR") else tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, __file__, "--be", system, json.dumps(shape)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            text=True,
        )
        self.passes: List[Dict[str, Any]] = []
        try:
            self.version = self.answer()["version"]
        except RuntimeError:
            self.end()
            raise

    def answer(self) -> Any:
        assert self.process.stdout is not None
        # One line for each question: none is left in the buffer.
        if not select.select([self.process.stdout], [], [], LONGEST_S)[0]:
            raise RuntimeError(f"no answer within {LONGEST_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            ended, words = self.process.wait(), ""
            if self.words is not None:
                self.words.seek(0)
                words = self.words.read().strip()
            raise RuntimeError(words.splitlines()[-1] if words else f"ended with {ended}")
        return json.loads(line)

    def one(self, order: int) -> Dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        answer: Dict[str, Any] = self.answer()
        if not answer["is_right"]:
            raise RuntimeError("pieces came with other bytes than were sent")
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.words is not None:
            self.words.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--page-tokens", type=int, default=1)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--token-bytes", type=int, default=1152, help="of one layer")
    parser.add_argument("--memory", choices=["shared", "private"], default="shared")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of these")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "crossdock-compare")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("CROSSDOCK_COMPARE_CACHE", default_cache)))
    parser.add_argument("--install", action="store_true", help="the peers, by pip, where they are missing")
    parser.add_argument("--progress-thread", action="store_true", help="NIXL's own, in each of its processes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--be", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be:
        be_one(given.be[0], Shape(*json.loads(given.be[1])))
        return
    shape = Shape(given.tokens, given.page_tokens, given.layers, given.token_bytes, given.memory)
    wanted = given.systems.split(",")
    unknown = set(wanted) - set(SYSTEMS)
    if unknown:
        parser.error(f"no such systems: {sorted(unknown)}")
    # Whole pages are compared.
    is_whole = min(shape[:3]) > 0 and shape.tokens % shape.page_tokens == 0 and shape.page_bytes % 8 == 0
    if not is_whole or shape.token_bytes <= 128 or given.rounds < 1:
        parser.error("a shape that cannot be")

    def say(words: str) -> None:
        print(f"\r{words:<78}", end="", file=sys.stderr, flush=True)

    if given.progress_thread:
        os.environ[PROGRESS_THREAD] = "1"
    needs_peers = any(name.startswith(("nixl", "mooncake")) for name in wanted)
    pythons = peers(given.cache, given.install, say) if needs_peers else {}
    pairs: List[Pair] = []
    try:
        for system in wanted:
            peer = system.split("-")[0]
            if peer in ("nixl", "mooncake") and peer not in pythons:
                continue
            python, environment = pythons.get(peer, (sys.executable, {}))
            say(f"starting {system}")
            try:
                pairs.append(Pair(system, python, environment, shape))
            except RuntimeError as error:
                say(f"{system} is left out: {error}\n")
        measure(pairs, given.rounds, say)
    finally:
        for pair in pairs:
            pair.end()
    report(pairs, shape, given.rounds, given.json)
    measured = {pair.system for pair in pairs if pair.passes}
    if missing := [name for name in wanted if name.startswith("crossdock") and name not in measured]:
        sys.exit(f"not measured: {', '.join(missing)}")


def measure(pairs: List[Pair], rounds: int, say: Callable[[str], None]) -> None:
    order = 0
    for number in range(rounds + 1):
        turned = pairs[number % len(pairs) :] + pairs[: number % len(pairs)] if pairs else []
        for pair in turned:
            order += 1
            say(f"round {number} of {rounds}: {pair.system}")
            try:
                told = pair.one(order)
            except RuntimeError as error:
                say(f"{pair.system} is left out: {error}\n")
                pair.end()
                pairs.remove(pair)
                continue
            if number:
                pair.passes.append(told)
    say("")
    print("\r", end="", file=sys.stderr, flush=True)


def report(pairs: List[Pair], shape: Shape, rounds: int, as_json: bool) -> None:
    about = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "load": os.getloadavg(),
        **shape._asdict(),
        "pieces": shape.layers * shape.moved_pages,
        "piece_bytes": shape.page_bytes,
        "bytes": shape.moved_bytes,
        "rounds": rounds,
    }
    ours = next((pair for pair in pairs if pair.system == "crossdock"), None)
    rows = [row_of(pair, ours, shape) for pair in pairs]
    if as_json:
        print(json.dumps({**about, "systems": rows}))
        return
    print(f"{about['pieces']:,} pieces of {shape.page_bytes:,} bytes, {shape.memory} memory; {rounds} rounds")
    load = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"Python {about['python']}, {about['machine']}, load {load}")
    columns = f"{'ms':>9}{'least':>9}{'GB/s':>8}{'CPU s/GB':>10}{'others':>8}{'submit ms':>11}"
    print(f"{'':<20}{columns}  times ours (range)")
    for row in rows:
        submit = f"{row['submit_ms']:.3f}" if "submit_ms" in row else "-"
        figures = f"{row['ms']:>9.1f}{row['least_ms']:>9.1f}{row['gb_per_s']:>8.2f}{row['cpu_s_per_gb']:>10.2f}"
        ratio = f"{row['ratio']:.2f} ({row['least_ratio']:.2f} to {row['most_ratio']:.2f})" if "ratio" in row else "-"
        print(f"{row['system']:<20}{figures}{row['others']:>8.1f}{submit:>11}  {ratio}")
    for row in rows:
        name = row["system"]
        if "other_submit_ms" in row:
            here, there = row["submit_ms"], row["other_submit_ms"]
            is_met = here + there < SUBMIT_MS
            print(f"{name}: the calls take {here:.3f} ms here and {there:.3f} ms there; {told(is_met)}")
        elif "ratio" in row and name in ("nixl", "nixl-request", "mooncake"):
            print(f"crossdock is {row['ratio']:.1f} times as fast as {name}; {told(row['ratio'] >= RATIO)}")


def row_of(pair: Pair, ours: Optional[Pair], shape: Shape) -> Dict[str, Any]:
    passes = pair.passes
    seconds = [one["seconds"] for one in passes]
    row: Dict[str, Any] = {"system": pair.system, "what": SYSTEMS[pair.system], "version": pair.version}
    row["ms"] = statistics.median(seconds) * 1e3
    row["least_ms"] = min(seconds) * 1e3
    row["gb_per_s"] = shape.moved_bytes / statistics.median(seconds) / 1e9
    row["cpu_s_per_gb"] = statistics.median(one["cpu_seconds"] for one in passes) / shape.moved_bytes * 1e9
    row["others"] = statistics.median(one["others"] for one in passes)
    for name in ("submit_ms", "other_submit_ms"):
        if name in passes[0]:
            row[name] = statistics.median(one[name] for one in passes)
    if ours is not None:
        # Within a round: what else the machine did was then about the same.
        ratios = [theirs / one["seconds"] for theirs, one in zip(seconds, ours.passes)]
        row.update(ratio=statistics.median(ratios), least_ratio=min(ratios), most_ratio=max(ratios))
    row["all_ms"] = [one * 1e3 for one in seconds]
    return row


def told(is_met: bool) -> str:
    return "as asked" if is_met else "NOT as asked"


if __name__ == "__main__":
    main()
