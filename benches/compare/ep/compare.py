"""Runs epbench and the MPI program in turn and compares what was measured next to each other. Started by `run-ep`."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

PEERS = ("openmpi", "window", "floor")
# The least is what a busy machine disturbs least.
FIGURES = ("p50", "min")
FIGURE_NAMES = {"p50": "p50", "min": "least"}
PARTS = ("dispatch", "combine", "both")
HEADER = """Times are the {figure} of dispatch and of combine, and their sum, in us: medians of {rounds} round(s). The three ratios are of
dispatch, combine, and both: medians of the rounds' own ratios of ours to the other's; above 1 ours takes longer.
Floor: the same work with nobody to wait for, by epbench in the same run as ours; floor in C: by the MPI program, its
quantiser, its scatter (of scales by row) and its sums timed apart, each at its best."""
# What a process that does not do its part ends in.
FAILURES = (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError)


def run(command, limit_s, **more):
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL,
                          env=dict(os.environ, **more))
    if done.returncode:
        why = done.stderr.strip().splitlines()
        raise RuntimeError(why[-1] if why else f"ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def ours(options, mode, ranks, tokens):
    command = [options.epbench, "--mode", mode, "--ranks", ranks, "--tokens", tokens, "--routing", options.routing,
               "--hidden", options.hidden, "--experts", options.experts, "--topk", options.topk,
               "--scales", options.scales, "--iterations", options.iterations, "--seconds", options.seconds,
               "--verify", "--json"]
    return run([str(word) for word in command], options.limit)[0]


def theirs(options, mode, ranks, tokens):
    """Figures by peer."""
    crowded = ranks > len(os.sched_getaffinity(0))
    parts = ",".join("mpi" if peer == "openmpi" else peer for peer in options.peers.split(","))
    command = ["mpirun.openmpi", "--oversubscribe", "--bind-to", "none", "--mca", "pml", "ob1", "--mca", "btl", "vader,self"]
    # Ranks that wait must not keep others from their processor.
    command += ["--mca", "mpi_yield_when_idle", "1"] if crowded else []
    command += ["-n", ranks, options.mpi, "--modes", mode, "--tokens", tokens, "--routing", options.routing,
                "--hidden", options.hidden, "--experts", options.experts, "--topk", options.topk,
                "--scales", options.scales, "--iters", options.iterations, "--budget", options.seconds, "--parts", parts, "--extra", 1]
    lines = run([str(word) for word in command], options.limit, OMPI_ALLOW_RUN_AS_ROOT="1",
                OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    if not lines:
        raise RuntimeError("it has measured nothing: too little memory")
    found = {}
    for line in lines:
        if line["mode"] == mode:
            found[line["peer"]] = line
        else:
            # The quantiser's own line comes after the floor's.
            for figure in FIGURES:
                found["floor"][f"dispatch_us_{figure}"] += line[f"dispatch_us_{figure}"]
    return found


def part_us(line, part, figure):
    """Of dispatch, combine, or both."""
    parts = ("dispatch", "combine") if part == "both" else (part,)
    return sum(line[f"{part}_us_{figure}"] for part in parts)


def compare(options, mode, ranks, tokens):
    """One line: medians of the rounds, and the medians of their ratios."""
    us, them = [], []
    for _ in range(options.rounds):
        us.append(ours(options, mode, ranks, tokens))
        if options.mpi:
            them.append(theirs(options, mode, ranks, tokens))
    def us_of(one, part):
        return part_us(one, part, options.figure)

    def floor_us(one, part):
        return us_of({key.removeprefix("floor_"): value for key, value in one.items() if key.startswith("floor_")}, part)

    line = {"bench": "compare-ep", "mode": mode, "ranks": ranks, "tokens": tokens, "routing": options.routing,
            "rounds": options.rounds, "figure": options.figure}
    for part in PARTS:
        line[f"{part}_us"] = statistics.median(us_of(one, part) for one in us)
        line[f"floor_{part}_us"] = statistics.median(floor_us(one, part) for one in us)
        line[f"ratio_floor_{part}"] = statistics.median(us_of(one, part) / floor_us(one, part) for one in us)
    verified = us
    for peer in PEERS if them else ():
        if peer not in them[0]:
            continue
        lines = [found[peer] for found in them]
        verified = verified + lines
        name = "floor_in_c" if peer == "floor" else peer
        for part in PARTS:
            line[f"{name}_{part}_us"] = statistics.median(us_of(one, part) for one in lines)
            line[f"ratio_{name}_{part}"] = statistics.median(us_of(a, part) / us_of(b, part) for a, b in zip(us, lines))
    line["load"] = os.getloadavg()[0]
    line["verified"] = all(line["verified"] for line in verified)
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in line.items()}


def table(lines, rounds):
    """Markdown that can be read as it is."""
    others = [("floor", "floor"), ("Open MPI", "openmpi"), ("window", "window"), ("floor in C", "floor_in_c")]
    others = [(title, name) for title, name in others if any(f"{name}_both_us" in line for line in lines)]
    head = ["mode", "ranks", "tokens", "dispatch", "combine", "both"]
    head += [cell for title, _ in others for cell in (title, f"ours / {title}")] + ["verified"]
    rows = [head]
    for line in lines:
        row = [line["mode"], str(line["ranks"]), str(line["tokens"]), f"{line['dispatch_us']:.1f}",
               f"{line['combine_us']:.1f}", f"{line['both_us']:.1f}"]
        for _, name in others:
            is_there = f"{name}_both_us" in line
            ratios = " ".join(f"{line.get(f'ratio_{name}_{part}', 0):.2f}" for part in PARTS)
            row += [f"{line[f'{name}_both_us']:.1f}", ratios] if is_there else ["-", "-"]
        rows.append(row + ["yes" if line["verified"] else "NO"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    text.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join([HEADER.format(rounds=rounds, figure=FIGURE_NAMES[lines[0]["figure"]]), ""] + text) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="benches/compare/run-ep", description=__doc__)
    parser.add_argument("--epbench", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--mpi", help=argparse.SUPPRESS)
    parser.add_argument("--modes", default="latency,throughput")
    parser.add_argument("--ranks", default="2,8")
    parser.add_argument("--tokens", default="1,16,128,1024,4096")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "k-hot", "one-hot", "masked"))
    parser.add_argument("--scales", default="col", choices=("row", "col"))
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figure", default="p50", choices=FIGURES)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1, help="about as long each of them measures")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a process is given up")
    parser.add_argument("--out", type=pathlib.Path, default="target/compare-ep", help="folder of the results")
    options = parser.parse_args()
    if unknown := [peer for peer in options.peers.split(",") if peer not in PEERS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PEERS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    lines, failed = [], False
    with open(options.out / "ep.jsonl", "w", encoding="utf-8") as file:
        for mode in options.modes.split(","):
            for ranks in map(int, options.ranks.split(",")):
                for tokens in map(int, options.tokens.split(",")):
                    what = f"{mode}, {ranks} ranks, {tokens} tokens"
                    try:
                        line = compare(options, mode, ranks, tokens)
                    except FAILURES as error:
                        failed = True
                        print(f"compare: left out {what}: {error}", file=sys.stderr)
                        continue
                    lines.append(line)
                    print(json.dumps(line), file=file, flush=True)
                    print(f"compare: {what}: done", file=sys.stderr)
    if lines:
        (options.out / "ep.md").write_text(table(lines, options.rounds), encoding="utf-8")
        print(table(lines, options.rounds))
        print(f"compare: written: {options.out / 'ep.jsonl'}, {options.out / 'ep.md'}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
