"""Runs kvbench and the peers in turn and compares what was measured next to each other. Started by `run`."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading

import chart

HERE = os.path.dirname(os.path.abspath(__file__))
# What each peer can do between two processes of one host.
MEDIA = {"nixl": ("shm", "tcp"), "mooncake": ("tcp",)}
# The kinds of memory over each port, for both libraries the same. What tcp moves nobody maps.
MEMORY = {"shm": ("shared", "private"), "tcp": ("private",)}
HEADER = """Clock: from posting until the initiator knows that all has arrived. Before it, ours opens its rooms and exchanges their
page lists, and the peer builds its request ("peer prepares").
Memory: of the same kind for both. Shared (ours allocated) is a file that ours maps in the other process and writes to;
UCX maps only what it has allocated itself, and gains nothing by it. Private memory nobody can map: ours goes through
process_vm_writev."""
# What a process that does not do its part ends in.
FAILURES = (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError)
# A peer that has said nothing for so long is left out.
PATIENCE_S = 120


class KvbenchFailed(Exception):
    """Ours has no figure, for which no peer is to blame."""


class Peer:
    """A driver of peers.py that measures when told to."""

    def __init__(self, name, python, medium, memory, pool_mib):
        self.name = name
        command = [python, os.path.join(HERE, "peers.py"), name, medium, memory, str(pool_mib)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.said = []
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        try:
            self.version = self.hear()["version"]
        except BaseException:
            self.close()
            raise

    def hear(self):
        line = []
        reader = threading.Thread(target=lambda: line.extend([self.process.stdout.readline()]), daemon=True)
        reader.start()
        reader.join(PATIENCE_S)
        if not line or not line[0]:
            why = "".join(self.said).strip().splitlines()
            raise RuntimeError(why[-1] if why else f"silent for {PATIENCE_S} s, or ended")
        return json.loads(line[0])

    def measure(self, page_bytes, payload_mib):
        print(json.dumps({"page_bytes": page_bytes, "payload_mib": payload_mib}), file=self.process.stdin, flush=True)
        return self.hear()

    def close(self):
        self.process.kill()
        self.process.wait()


def ours(options, port, memory, page_bytes):
    command = [options.kvbench, "--port", port, "--memory", memory, "--page-bytes", str(page_bytes), "--repeats", "1",
               "--verify", "--json", "--pool-mib", str(options.pool_mib), "--payload-mib", str(options.payload_mib),
               "--progress", options.progress]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return json.loads(done.stdout)
    except FAILURES as error:
        raise KvbenchFailed(f"kvbench: {error}") from error


def compare(options, peer, port, memory, page_bytes):
    """One line: medians of the rounds, and the median of the ratios of each round."""
    us, them = [], []
    peer.measure(page_bytes, options.payload_mib)  # touches every page of its lists
    for _ in range(options.rounds):
        us.append(ours(options, port, memory, page_bytes))
        them.append(peer.measure(page_bytes, options.payload_mib))
    median = lambda lines, key: statistics.median(line[key] for line in lines)  # noqa: E731
    line = {
        "bench": "compare", "port": port, "memory": memory, "page_bytes": page_bytes, "peer": peer.name,
        "version": peer.version, "rounds": options.rounds,
        "gb_per_s": median(us, "gb_per_s"), "peer_gb_per_s": median(them, "gb_per_s"),
        "ratio": statistics.median(a["gb_per_s"] / b["gb_per_s"] for a, b in zip(us, them)),
        "cpu_s_per_gb": median(us, "cpu_s_per_gb"), "peer_cpu_s_per_gb": median(them, "cpu_s_per_gb"),
        "peer_prepare_ms": median(them, "prepare_ms"),
        "floor_gb_per_s": median(us, "floor_gb_per_s"), "floor_cpu_s_per_gb": median(us, "floor_cpu_s_per_gb"),
        "load": os.getloadavg()[0],
        "verified": all(line["verified"] for line in us + them),
    }
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}


def main():
    parser = argparse.ArgumentParser(prog="benches/compare/run", description=__doc__)
    parser.add_argument("--kvbench", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--peer", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--ports", default="shm,tcp")
    parser.add_argument("--pages", default="4096,16384,65536", help="page lengths in bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pool-mib", type=int, default=512)
    parser.add_argument("--payload-mib", type=int, default=256)
    parser.add_argument("--progress", default="thread", choices=("thread", "caller"))
    parser.add_argument("--out", type=pathlib.Path, default="target/compare", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print only the JSON lines")
    options = parser.parse_args()
    if unknown := [port for port in options.ports.split(",") if port not in MEMORY]:
        parser.error(f"nothing is measured over {', '.join(unknown)}; over {', '.join(MEMORY)} it is")
    results = Results(options.out)
    failed = False
    for port, memory in ((port, memory) for port in options.ports.split(",") for memory in MEMORY[port]):
        for name, python in (peer.split("=", 1) for peer in options.peer):
            what = f"{name} over {port}, {memory} memory"
            if port not in MEDIA[name]:
                print(f"compare: {name} is not measured over {port}", file=sys.stderr)
                continue
            try:
                peer = Peer(name, python, port, memory, options.pool_mib)
            except FAILURES as error:
                print(f"compare: left out {what}: {error}", file=sys.stderr)
                continue
            try:
                for page_bytes in map(int, options.pages.split(",")):
                    try:
                        results.add(compare(options, peer, port, memory, page_bytes))
                        print(f"compare: {what}, {page_bytes} bytes: done", file=sys.stderr)
                    except KvbenchFailed as error:
                        failed = True
                        print(f"compare: left out {what}, {page_bytes} bytes: {error}", file=sys.stderr)
            except FAILURES as error:
                print(f"compare: left out the rest of {what}: {error}", file=sys.stderr)
            finally:
                peer.close()
    if results.lines:
        results.finish(options.json)
    elif not failed:
        print("compare: no peer could be measured; kvbench alone:", file=sys.stderr)
        for port, memory in ((port, memory) for port in options.ports.split(",") for memory in MEMORY[port]):
            for page_bytes in map(int, options.pages.split(",")):
                try:
                    print(json.dumps(ours(options, port, memory, page_bytes)))
                except KvbenchFailed as error:
                    failed = True
                    print(f"compare: left out {port}, {memory} memory, {page_bytes} bytes: {error}", file=sys.stderr)
    if failed:
        sys.exit(1)


class Results:
    """The lines so far. They are in the folder as soon as they are known: whatever comes after may fail."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []

    def add(self, line):
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "compare.jsonl", "a" if self.lines else "w", encoding="utf-8") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)
        self.lines.append(line)

    def finish(self, only_json):
        written = [self.folder / "compare.jsonl", self.folder / "compare.md"]
        written[1].write_text(table(self.lines), encoding="utf-8")
        try:
            written.append(chart.draw(self.lines, self.folder / "compare.svg"))
        except ImportError as error:
            print(f"compare: no chart: {error}", file=sys.stderr)
        if not only_json:
            print("\n" + table(self.lines))
        print(f"compare: written: {', '.join(map(str, written))}", file=sys.stderr)


def kind(memory):
    return chart.KINDS_OF_MEMORY[memory]


def table(lines):
    """Markdown that can be read as it is."""
    rows = [("port", "memory", "page bytes", "peer", "GB/s", "peer's", "ratio", "floor", "CPU s/GB", "peer's", "floor's",
             "peer prepares, ms", "verified")]
    rows += [(line["port"], kind(line["memory"]), str(line["page_bytes"]), f"{line['peer']} {line['version']}",
              f"{line['gb_per_s']:.2f}", f"{line['peer_gb_per_s']:.2f}", f"{line['ratio']:.2f}",
              f"{line['floor_gb_per_s']:.2f}",
              f"{line['cpu_s_per_gb']:.3f}", f"{line['peer_cpu_s_per_gb']:.3f}", f"{line['floor_cpu_s_per_gb']:.3f}",
              f"{line['peer_prepare_ms']:.1f}", "yes" if line["verified"] else "NO") for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    text.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    text = [HEADER, ""] + text
    if chart.is_busy(lines):
        text += ["", chart.BUSY]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
