"""Runs epbench and the MPI program in turn and holds what was measured next to each other against the bars. Started by
`run-ep`."""
import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import chart  # noqa: E402

PARTS = ("token", "quantiser", "buffers", "latency", "throughput", "crowded")
HEADER = """Times are us, p50 (p99), of all iterations; a ratio is the median of the rounds' own ratios, and a round has a turn of each
program. floor: the same work with nobody to wait for, by the MPI program (quantiser, scatter, sums), with the same scales
and threads. Open MPI: the better of MPI_Alltoallv and MPI_Isend, with the same outputs."""
# What a process that does not do its part ends in.
FAILURES = (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError)
# Preparing and comparing the largest case takes a minute on a busy machine.
PATIENCE_S = 120
OURS, OWN_FLOOR = "crossdock", "floor of epbench"
MPI = ("openmpi", "openmpi-p2p")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured for `seconds`, in turns of `turn_ms`."""
    mode: str
    ranks: int
    tokens: int
    seconds: float
    turn_ms: int

    def __str__(self):
        return f"{self.mode}, {self.ranks} ranks, {self.tokens} tokens"


# By tokens: seconds and milliseconds of a turn.
TIMES = {1: (3, 30), 16: (4, 30), 128: (9, 60), 1024: (15, 150), 4096: (25, 300)}
CROWDED_TIMES = {128: (25, 250), 1024: (30, 400)}


def cases(options, part):
    times = CROWDED_TIMES if part == "crowded" else TIMES
    tokens = options.tokens or [tokens for tokens in times if tokens <= (128 if options.quick else 4096)]
    for count in tokens:
        # One that is not listed is measured like the next larger one.
        seconds, turn_ms = next((times[known] for known in times if known >= count), times[max(times)])
        seconds = options.seconds or (seconds / 4 if options.quick else seconds)
        yield Case("throughput" if part == "throughput" else "latency", 8 if part == "crowded" else 2, count,
                   seconds, turn_ms)


class Turns:
    """A program that measures when told to, and is quiet in between."""

    def __init__(self, command, names, **more):
        self.names = names
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=dict(os.environ, **more))
        self.said = []
        self.reader = threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def hear(self):
        line = []
        reader = threading.Thread(target=lambda: line.extend([self.process.stdout.readline()]), daemon=True)
        reader.start()
        reader.join(PATIENCE_S)
        if not line or not line[0]:
            if not reader.is_alive():
                self.reader.join(1)
            why = "".join(self.said).strip().splitlines()
            raise RuntimeError(why[-1] if why else f"silent for {PATIENCE_S} s, or ended")
        return json.loads(line[0])

    def turn(self, name, turn_ms):
        """Of each iteration the times of dispatch, what is made for it included, and of combine."""
        print(self.names[name], turn_ms, file=self.process.stdin, flush=True)
        times = self.hear()
        made = times.get("quantise_us", [0] * len(times["dispatch_us"]))
        return [(dispatch + more, combine)
                for dispatch, more, combine in zip(times["dispatch_us"], made, times["combine_us"])]

    def verified(self):
        self.process.stdin.close()
        return self.hear()["verified"]

    def close(self):
        # mpirun ends its ranks when it is asked to end.
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def problem(options):
    return ["--routing", options.routing, "--hidden", options.hidden, "--experts", options.experts, "--topk", options.topk,
            "--scales", options.scales]


def start_ours(options, case):
    command = [options.epbench, "--mode", case.mode, "--ranks", case.ranks, "--tokens", case.tokens] + problem(options)
    return Turns(command + ["--turns", "--verify"], {OURS: "ours", OWN_FLOOR: "floor"})


def start_theirs(options, case):
    command = ["mpirun.openmpi", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1", "--mca", "btl", "vader,self"]
    # Ranks that wait must not keep others from their processor.
    if case.ranks > len(os.sched_getaffinity(0)):
        command += ["--mca", "mpi_yield_when_idle", "1"]
    command += ["-n", case.ranks, options.mpi, "--modes", case.mode, "--tokens", case.tokens] + problem(options)
    command += ["--parts", "mpi,window,floor", "--turns", 1]
    return Turns(command, {name: name for name in (*MPI, "window", "floor")}, OMPI_ALLOW_RUN_AS_ROOT="1",
                 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")


def take_turns(options, case):
    """By program, a list of rounds, each with the times of its iterations."""
    programs = []
    try:
        programs.append(start_ours(options, case))
        if options.mpi:
            programs.append(start_theirs(options, case))
        for program in programs:
            program.hear()
        turns = [(program, name) for program in programs for name in program.names]
        rounds = {name: [] for _, name in turns}
        end = time.monotonic() + case.seconds
        while time.monotonic() < end or len(rounds[OURS]) < LEAST_ROUNDS:
            # Nobody always follows the same one.
            first = len(rounds[OURS]) % len(turns)
            for program, name in turns[first:] + turns[:first]:
                rounds[name].append(program.turn(name, case.turn_ms))
        is_right = [program.verified() for program in programs]
    finally:
        for program in programs:
            program.close()
    return rounds, all(is_right)


LEAST_ROUNDS = 3


class Measured:
    """What the turns of a case came to."""

    def __init__(self, case, rounds, verified):
        self.case, self.rounds, self.verified, self.load = case, rounds, verified, os.getloadavg()[0]

    def has(self, name):
        return name in self.rounds

    def times(self, name, part=sum):
        return sorted(part(one) for turn in self.rounds[name] for one in turn)

    def p50(self, name):
        return quantile(self.times(name), 0.5)

    def p99(self, name):
        return quantile(self.times(name), 0.99)

    def ratio(self, name, other):
        """Of the time of one to that of another."""
        middle = lambda turn: statistics.median(map(sum, turn))  # noqa: E731
        return statistics.median(middle(one) / middle(two) for one, two in zip(self.rounds[name], self.rounds[other]))

    def mpi(self):
        return min((name for name in MPI if self.has(name)), key=self.p50)

    def line(self, name):
        line = {"bench": "compare-ep", "mode": self.case.mode, "ranks": self.case.ranks, "tokens": self.case.tokens,
                "program": name}
        for part, of in (("dispatch", lambda one: one[0]), ("combine", lambda one: one[1]), ("both", sum)):
            times = self.times(name, of)
            line |= {f"{part}_us_p50": quantile(times, 0.5), f"{part}_us_p99": quantile(times, 0.99)}
        return line | {"ratio_ours": self.ratio(OURS, name), "iterations": len(times), "rounds": len(self.rounds[name]),
                       "load": self.load, "verified": self.verified}


def quantile(ordered, share):
    """The nearest rank."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


@dataclasses.dataclass
class Bar:
    """A ratio and what it must be. `ours` and `other` are what is shown of both sides."""
    what: str
    ours: str
    other: str
    ratio: float
    least: float | None = None
    most: float | None = None
    verified: bool = True

    def met(self):
        if not self.verified:
            return "WRONG OUTPUTS"
        if self.least is None and self.most is None:
            return "-"
        fits = self.ratio >= self.least if self.least is not None else self.ratio <= self.most
        return "yes" if fits else "NO"

    def bar(self):
        if self.least is not None:
            return f">= {self.least:g}"
        return "-" if self.most is None else f"<= {self.most:g}"

    def line(self):
        return {"bench": "compare-ep-bar", "what": self.what, "ours": self.ours, "other": self.other, "ratio": self.ratio,
                "bar": self.bar(), "met": self.met()}


def bars_of_case(measured):
    case = measured.case

    def bar(what, name, ratio, **limits):
        shown = [f"{measured.p50(one):,.1f} ({measured.p99(one):,.1f})" for one in (OURS, name)]
        return Bar(f"{case}: {what}", *shown, ratio, verified=measured.verified, **limits)

    if not measured.has("floor"):
        return [bar(f"{OWN_FLOOR} / ours", OWN_FLOOR, measured.ratio(OWN_FLOOR, OURS))]
    is_large, mpi = case.tokens >= 128, measured.mpi()
    found = []
    if case.ranks == 2:
        found.append(bar("floor / ours", "floor", measured.ratio("floor", OURS), least=0.7 if is_large else None))
    else:
        spread = {name: measured.p99(name) / measured.p50(name) for name in (OURS, "floor")}
        ratio = spread[OURS] / spread["floor"]
        found.append(bar("p99/p50, ours / floor", "floor", ratio, most=1.5 if is_large else None))
    least = 2 if is_large else 1.5 if case.tokens >= 16 and case.mode == "latency" else None
    found.append(bar(f"{mpi} / ours", mpi, measured.ratio(mpi, OURS), least=least))
    if case.ranks == 2:
        most = 1.1 if case.mode == "latency" and case.tokens >= 16 else None
        found.append(bar("ours / window", "window", measured.ratio(OURS, "window"), most=most))
    return found


def run(command, limit_s=PATIENCE_S):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=limit_s,
                          stdin=subprocess.DEVNULL)
    if done.returncode:
        why = done.stderr.strip().splitlines()
        raise RuntimeError(why[-1] if why else f"ended with {done.returncode}")
    return done.stdout


def bars_of_token(options):
    """One token there and back between two ranks."""
    command = [options.epbench, "--tokens", 1, "--round-trips", "--verify", "--json", "--iterations", 20_000,
               "--seconds", 2 if options.quick else 8] + problem(options)
    line = json.loads(run(command))

    def shown(what):
        return f"{line[f'{what}_us_p50']:.2f} ({line[f'{what}_us_p99']:.2f})"

    verified = line["verified"]
    return [
        Bar("a token there and back, spinning: (step - 2 trips) / the same alone; other: alone + 2 trips", shown("step"),
            f"{shown('alone')} + 2 x {shown('trip')}", line["step_ratio"], most=1.3, verified=verified),
        Bar("the same, who waits sleeps at once: sleeps a step of the rank with most; other: a word there and back, asleep",
            shown("parked_step"), shown("parked_trip"), line["parked_sleeps_mean"], most=1.5, verified=verified),
    ], [line]


def bars_of_quantiser(options):
    """Of the ways that the kernels' benchmark prints, the last is the one with the widest vectors, which is used."""
    found = []
    for place, where in (("hot", "rows in the second-level cache"), ("streamed", "rows streamed from memory")):
        ways = re.findall(rf"^{place} quantise +(\S+) +([\d.]+) +([\d.]+)$", run([options.kernels, "--bench", place, "quantise"]),
                          re.MULTILINE)
        (_, floor, _), (way, rate, ratio) = ways[0], ways[-1]
        found.append(Bar(f"quantiser ({way}), {where}, GB/s: ours / floor", rate, floor, float(ratio), least=0.8))
    return found, []


def bars_of_buffers(options):
    text = run([options.epbench, "--sizes", "--json", "--tokens", 128, "--slots", 2] + problem(options))
    lines = [json.loads(line) for line in text.splitlines()]
    mb = lambda bytes: f"{bytes / 1e6:,.1f}"  # noqa: E731
    return [Bar(f"buffers of a rank of {line['ranks']}, MB: arenas over ports / DeepEP's; on one host {mb(line['mapped_arenas_bytes'])}; outputs {mb(line['outputs_bytes'])} more",
                f"{mb(line['dispatch_arenas_bytes'])} + {mb(line['combine_arenas_bytes'])}", mb(line["deepep_bytes"]),
                line["ratio"], most=0.25) for line in lines], lines


def table(rows):
    """Markdown that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.ljust(width) if at == 0 else cell.rjust(width)
                              for at, (cell, width) in enumerate(zip(row, widths))) + " |" for row in rows]
    text.insert(1, "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|")
    return "\n".join(text)


def text_of(bars, times):
    parts = [HEADER, table([["what", "ours", "other", "ratio", "bar", "met"]] + [
        [bar.what, bar.ours, bar.other, f"{bar.ratio:.3g}", bar.bar(), bar.met()] for bar in bars])]
    if times:
        shown = lambda line, part: f"{line[f'{part}_us_p50']:,.1f} ({line[f'{part}_us_p99']:,.1f})"  # noqa: E731
        parts.append(table([["mode", "ranks", "tokens", "program", "dispatch", "combine", "both", "ours / it", "iterations"]] + [
            [line["mode"], str(line["ranks"]), str(line["tokens"]), line["program"]]
            + [shown(line, part) for part in ("dispatch", "combine", "both")]
            + [f"{line['ratio_ours']:.2f}", str(line["iterations"])] for line in times]))
        if chart.is_busy(times):
            parts.append(chart.BUSY)
    return "\n\n".join(parts) + "\n"


def numbers(value, separated=","):
    return [int(word) for word in value.split(separated)]


def main():
    parser = argparse.ArgumentParser(prog="benches/compare/run-ep", description=__doc__)
    parser.add_argument("--epbench", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--kernels", help=argparse.SUPPRESS)
    parser.add_argument("--mpi", help=argparse.SUPPRESS)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="up to 128 tokens, and a quarter of the time")
    parser.add_argument("--seconds", type=float, help="of the turns of each case, instead of its own")
    parser.add_argument("--within", type=float, default=480, help="seconds after which no case begins that may not end in time")
    parser.add_argument("--tokens", type=numbers, help="instead of 1 to 4096")
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "k-hot", "one-hot", "masked"))
    parser.add_argument("--scales", default="col", choices=("row", "col"))
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print the lines instead of the tables")
    parser.add_argument("--out", type=pathlib.Path, default="target/compare-ep", help="folder of the results")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    bars, times, failed, started = [], [], [], time.monotonic()

    with open(options.out / "ep.jsonl", "w", encoding="utf-8") as file:
        def keep(line):
            line = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}
            print(json.dumps(line), file=file, flush=True)
            if options.json:
                print(json.dumps(line), flush=True)

        def attempt(what, measure):
            try:
                found, lines = measure()
            except FAILURES as error:
                failed.append(what)
                print(f"compare: left out {what}: {error}", file=sys.stderr)
                return
            for line in lines + [bar.line() for bar in found]:
                keep(line)
            bars.extend(found)
            times.extend(line for line in lines if line["bench"] == "compare-ep")
            print(f"compare: {what}: done", file=sys.stderr)

        def measure_case(case):
            # Preparing and comparing take as long as the turns.
            if time.monotonic() - started + 2 * case.seconds > options.within:
                raise RuntimeError(f"the {options.within:g} s are over")
            measured = Measured(case, *take_turns(options, case))
            return bars_of_case(measured), [measured.line(name) for name in measured.rounds]

        for part in parts:
            if part in ("latency", "throughput", "crowded"):
                for case in cases(options, part):
                    attempt(str(case), lambda case=case: measure_case(case))
            elif part == "quantiser" and not options.kernels:
                print("compare: left out quantiser: its benchmark was not built", file=sys.stderr)
            else:
                alone = {"token": bars_of_token, "quantiser": bars_of_quantiser, "buffers": bars_of_buffers}[part]
                attempt(part, lambda alone=alone: alone(options))

    if bars:
        text = text_of(bars, times)
        (options.out / "ep.md").write_text(text, encoding="utf-8")
        if not options.json:
            print(text)
        print(f"compare: written: {options.out / 'ep.jsonl'}, {options.out / 'ep.md'}", file=sys.stderr)
    if times:
        try:
            print(f"compare: written: {chart.draw_steps(times, options.out / 'ep.svg')}", file=sys.stderr)
        except ImportError as error:
            print(f"compare: left out the picture: {error}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
