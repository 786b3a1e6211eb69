"""Runs kvbench and the peers in turn and compares what was measured next to each other. Started by `run`."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import threading

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
    return {
        "bench": "compare", "port": port, "page_bytes": page_bytes, "peer": peer.name, "version": peer.version,
        "rounds": options.rounds,
        "gb_per_s": median(us, "gb_per_s"), "peer_gb_per_s": median(them, "gb_per_s"),
        "ratio": statistics.median(a["gb_per_s"] / b["gb_per_s"] for a, b in zip(us, them)),
        "cpu_s_per_gb": median(us, "cpu_s_per_gb"), "peer_cpu_s_per_gb": median(them, "cpu_s_per_gb"),
        "load": os.getloadavg()[0],
        "verified": all(line["verified"] for line in us + them),
    }


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
    parser.add_argument("--json", action="store_true", help="only the JSON lines")
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
    if not options.json:
        print(f"{'port':<5}{'page':>7}  {'peer':<24}{'GB/s':>7}{'peer':>7}{'ratio':>8}{'CPU s/GB':>10}{'peer':>8}  verified")
        for line in lines:
            print(f"{line['port']:<5}{line['page_bytes']:>7}  {line['peer'] + ' ' + line['version']:<24}"
                  f"{line['gb_per_s']:>7.2f}{line['peer_gb_per_s']:>7.2f}{line['ratio']:>7.2f}x"
                  f"{line['cpu_s_per_gb']:>10.3f}{line['peer_cpu_s_per_gb']:>8.3f}  {line['verified']}")
        if any(line["load"] > os.cpu_count() for line in lines):
            print("The machine was busy with other work: peers that spin at both ends collapse then; do not cite these.")
        print()
    for line in lines:
        print(json.dumps({key: float(f"{value:.5g}") if isinstance(value, float) else value
                          for key, value in line.items()}))


if __name__ == "__main__":
    main()
