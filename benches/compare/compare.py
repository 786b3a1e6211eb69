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
# A peer that has said nothing for so long is left out.
PATIENCE_S = 120


class Peer:
    """A driver of peers.py that measures when told to."""

    def __init__(self, name, python, medium, pool_mib):
        self.name = name
        command = [python, os.path.join(HERE, "peers.py"), name, medium, str(pool_mib)]
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


def ours(options, port, page_bytes):
    command = [options.kvbench, "--port", port, "--page-bytes", str(page_bytes), "--repeats", "1", "--verify", "--json",
               "--pool-mib", str(options.pool_mib), "--payload-mib", str(options.payload_mib),
               "--progress", options.progress]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise SystemExit(f"compare: kvbench failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def compare(options, peer, port, page_bytes):
    """One line: medians of the rounds, and the median of the ratios of each round."""
    us, them = [], []
    peer.measure(page_bytes, options.payload_mib)  # touches every page of its lists
    for _ in range(options.rounds):
        us.append(ours(options, port, page_bytes))
        them.append(peer.measure(page_bytes, options.payload_mib))
    median = lambda lines, key: statistics.median(line[key] for line in lines)  # noqa: E731
    line = {
        "bench": "compare", "port": port, "page_bytes": page_bytes, "peer": peer.name, "version": peer.version,
        "rounds": options.rounds,
        "gb_per_s": median(us, "gb_per_s"), "peer_gb_per_s": median(them, "gb_per_s"),
        "ratio": statistics.median(a["gb_per_s"] / b["gb_per_s"] for a, b in zip(us, them)),
        "cpu_s_per_gb": median(us, "cpu_s_per_gb"), "peer_cpu_s_per_gb": median(them, "cpu_s_per_gb"),
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
    lines = []
    for port in options.ports.split(","):
        for name, python in (peer.split("=", 1) for peer in options.peer):
            if port not in MEDIA[name]:
                print(f"compare: {name} is not measured over {port}", file=sys.stderr)
                continue
            try:
                peer = Peer(name, python, port, options.pool_mib)
            except RuntimeError as error:
                print(f"compare: left out {name} over {port}: {error}", file=sys.stderr)
                continue
            try:
                for page_bytes in map(int, options.pages.split(",")):
                    lines.append(compare(options, peer, port, page_bytes))
                    print(f"compare: {name} over {port}, {page_bytes} bytes: done", file=sys.stderr)
            except RuntimeError as error:
                print(f"compare: left out the rest of {name} over {port}: {error}", file=sys.stderr)
            finally:
                peer.close()
    if not lines:
        print("compare: no peer could be measured; kvbench alone:", file=sys.stderr)
        for port in options.ports.split(","):
            for page_bytes in map(int, options.pages.split(",")):
                print(json.dumps(ours(options, port, page_bytes)))
        return
    for line in lines:
        print(json.dumps(line))
    options.out.mkdir(parents=True, exist_ok=True)
    written = [options.out / "compare.jsonl", options.out / "compare.md"]
    written[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    written[1].write_text(table(lines))
    try:
        written.append(chart.draw(lines, options.out / "compare.svg"))
    except ImportError as error:
        print(f"compare: no chart: {error}", file=sys.stderr)
    if not options.json:
        print("\n" + table(lines))
    print(f"compare: written: {', '.join(map(str, written))}", file=sys.stderr)


def table(lines):
    """Markdown that can be read as it is."""
    rows = [("port", "page bytes", "peer", "GB/s", "peer's", "ratio", "floor", "CPU s/GB", "peer's", "floor's", "verified")]
    rows += [(line["port"], str(line["page_bytes"]), f"{line['peer']} {line['version']}",
              f"{line['gb_per_s']:.2f}", f"{line['peer_gb_per_s']:.2f}", f"{line['ratio']:.2f}",
              f"{line['floor_gb_per_s']:.2f}",
              f"{line['cpu_s_per_gb']:.3f}", f"{line['peer_cpu_s_per_gb']:.3f}", f"{line['floor_cpu_s_per_gb']:.3f}",
              "yes" if line["verified"] else "NO") for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    text.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    if chart.is_busy(lines):
        text += ["", chart.BUSY]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
