"""The charts of comparisons: GB/s and CPU seconds a GB by page length, for each library, medium and kind of memory; and the
time of a step of experts by tokens, for each program."""
import os
import statistics

BUSY = "The machine was busy with other work: peers that spin at both ends collapse then; do not cite these."
COLOURS = {"crossdock": "#1b6ca8", "nixl": "#76a832", "mooncake": "#d0803a"}
FLOOR_COLOUR = "#333333"
# Of each program: its name, colour and stroke.
STEPS = {"crossdock": ("crossdock", COLOURS["crossdock"], "-"), "floor": ("floor: nobody waits", FLOOR_COLOUR, "--"),
         "floor of epbench": ("floor of epbench", "#999999", "--"), "window": ("direct stores", "#8a5aa8", "-"),
         "openmpi": ("Open MPI, MPI_Alltoallv", "#d0803a", "-"), "openmpi-p2p": ("Open MPI, MPI_Isend", "#c0392b", "-")}
KINDS_OF_MEMORY = {"shared": "shared (ours allocated)", "private": "private"}
# What is drawn: the key of ours, its peer's and the floor's, and the axis.
KINDS = (("gb_per_s", "GB/s (more is better)"), ("cpu_s_per_gb", "CPU s/GB, both sides (less is better)"))


def in_our_style():
    import matplotlib
    matplotlib.use("svg")
    # Text stays text, and the same results give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "crossdock", "font.size": 9,
                                "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot
    return pyplot


def draw(lines, path):
    """Writes an SVG; fails with ImportError where there is no matplotlib."""
    pyplot = in_our_style()
    groups = list(dict.fromkeys((line["port"], line["memory"]) for line in lines))
    figure, axes = pyplot.subplots(len(KINDS), len(groups), squeeze=False, layout="constrained",
                                   figsize=(1 + 4 * len(groups), 3.2 * len(KINDS)))
    for row, (key, label) in zip(axes, KINDS):
        for axis, (port, memory) in zip(row, groups):
            bars(axis, [line for line in lines if (line["port"], line["memory"]) == (port, memory)], key)
            axis.set_title(f"{port}, memory {KINDS_OF_MEMORY[memory]}")
        row[0].set_ylabel(label)
    return finish(pyplot, figure, axes, lines, path, "crossdock beside other libraries")


def finish(pyplot, figure, axes, lines, path, title):
    handles = {label: handle for row in axes for axis in row
               for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    if is_busy(lines):
        figure.suptitle(BUSY, color="firebrick", fontsize=8)
    figure.savefig(path, metadata={"Date": None, "Title": title})
    pyplot.close(figure)
    return path


def draw_steps(lines, path):
    """Dispatch and combine together by tokens of a rank: p50, and above it as far as p99."""
    pyplot = in_our_style()
    from matplotlib.ticker import ScalarFormatter

    groups = list(dict.fromkeys((line["mode"], line["ranks"]) for line in lines))
    figure, axes = pyplot.subplots(1, len(groups), squeeze=False, layout="constrained",
                                   figsize=(1 + 4 * len(groups), 4))
    for axis, (mode, ranks) in zip(axes[0], groups):
        of_group = [line for line in lines if (line["mode"], line["ranks"]) == (mode, ranks)]
        for program in dict.fromkeys(line["program"] for line in of_group):
            steps(axis, [line for line in of_group if line["program"] == program], program)
        axis.set_title(f"{mode}, {ranks} ranks")
        axis.set(xscale="log", yscale="log", xlabel="tokens a rank")
        axis.set_xticks(sorted({line["tokens"] for line in of_group}))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.grid(alpha=0.3, linewidth=0.5)
    axes[0][0].set_ylabel("us, dispatch and combine, p50 to p99 (less is better)")
    return finish(pyplot, figure, axes, lines, path, "crossdock: tokens to their experts and back")


def steps(axis, lines, program):
    name, colour, style = STEPS.get(program, (program, "#888888", ":"))
    lines = sorted(lines, key=lambda line: line["tokens"])
    tokens = [line["tokens"] for line in lines]
    p50, p99 = ([line[f"both_us_{share}"] for line in lines] for share in ("p50", "p99"))
    axis.plot(tokens, p50, style, color=colour, label=name, marker="o", markersize=3, linewidth=1.4)
    axis.fill_between(tokens, p50, p99, color=colour, alpha=0.12, linewidth=0)


def bars(axis, lines, key):
    """A group for each page length: ours, then the peers; the floor is a stroke over the group."""
    pages = sorted({line["page_bytes"] for line in lines})
    peers = list(dict.fromkeys((line["peer"], line["version"]) for line in lines))
    width = 0.8 / (1 + len(peers))
    for place, (name, version) in enumerate([("crossdock", "")] + peers):
        of_peer = "" if name == "crossdock" else "peer_"
        shown = [(at, middle(lines, page, of_peer + key, name if of_peer else None)) for at, page in enumerate(pages)]
        shown = [(at, value) for at, value in shown if value is not None]
        drawn = axis.bar([at + (place - len(peers) / 2) * width for at, _ in shown], [value for _, value in shown],
                         width * 0.92, color=COLOURS[name], label=f"{name} {version}".strip())
        axis.bar_label(drawn, fmt="{:.2g}", fontsize=7, padding=1)
    floor = [middle(lines, page, "floor_" + key) for page in pages]
    axis.hlines(floor, [at - 0.45 for at in range(len(pages))], [at + 0.45 for at in range(len(pages))],
                colors=FLOOR_COLOUR, linestyles="dashed", linewidth=1, label="floor: the best bare means")
    axis.set_xticks(range(len(pages)), [length(page) for page in pages])
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)


def middle(lines, page, key, peer=None):
    """Ours and the floor were measured next to each peer: the median of those."""
    values = [line[key] for line in lines if line["page_bytes"] == page and peer in (None, line["peer"])]
    return statistics.median(values) if values else None


def length(page_bytes):
    return f"{page_bytes // 1024} KiB" if page_bytes % 1024 == 0 else f"{page_bytes:,} B"


def is_busy(lines):
    return any(line["load"] > os.cpu_count() for line in lines)
