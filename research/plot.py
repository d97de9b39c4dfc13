"""
Pictures of runs; and, without a run, those of the rows in research/results/*.jsonl, which experiments.py,
reproduction.py and states.py wrote, with their tables.

    python research/plot.py runs/a runs/b      loss by pass, BPB, norms, lambdas, gates: runs/a/pictures.png
    python -m research.plot                    research/results/*.png and, on the console, the tables of
                                               research/RESULTS.md

Points are means over seeds, error bars the range of the seeds. Compute is baseline-equivalent: tokens
times passes. In the tables, `compute` and `same compute` count a pass as the paper does, `same FLOPs`
counts all FLOPs.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import re
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python research/plot.py`
from checkpointing import read_log  # noqa: E402
from common import ArgumentParser, UserError, check_output, read_rows, run_main, write_atomic  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)
from matplotlib.ticker import LogFormatter  # noqa: E402

SETS = ("reproduction", "scaling", "longer", "cheaper", "ablation", "tuning", "control", "larger", "nanochat",
        "technical", "memory", "warm", "states")

# runs of the set `scaling` that another set is read against
BESIDE = {
    "ablation": ("none_500", "layerwise_500"),
    "tuning": ("none_500", "shared_500"),
    "cheaper": ("none_500", "none_1000", "none_2000", "layerwise_1000"),
    "control": ("none_500", "none_1000", "shared_500", "shared_1000", "layerwise_500", "layerwise_1000"),
}

def own_runs(name, budgets):
    """The runs of a set that experiments.at_equal_flops() made, in the order of WORTH_COLUMNS."""
    prefixes = ("none", "kv", "draft_kv", "draft_zero_kv", "s2_kv")
    return {budget: [f"{name} {prefix}_{budget}" for prefix in prefixes] for budget in budgets}

# What recurrence is worth: for each text and size, as many FLOPs as so many steps of the baseline; and the
# set and the run of each column, or None.
WORTH_COLUMNS = ("baseline", "control", "recurrence on top", "cheaper step, memory zero", "S = 2")
WORTH = {
    "prose, depth 4, width 128": {
        500: ("scaling none_500", "control kv_500", None, "cheaper deepen_390", "scaling layerwise_250"),
        1000: ("scaling none_1000", "control kv_1000", "control draft_kv_860", "cheaper deepen_shared_kv_810",
               "scaling layerwise_500"),
        2000: ("scaling none_2000", "control kv_2000", "control draft_kv_1720",
               "cheaper deepen_shared_kv_1620", "scaling layerwise_1000"),
    },
    "the same, width 64": {
        1120: ("longer none_10", "longer kv_10", "longer draft_kv_10", None, None),
        2240: ("longer none_20", "longer kv_20", "longer draft_kv_20", None, "longer layerwise_10"),
        4480: ("longer none_40", "longer kv_40", "longer draft_kv_40", None, "longer layerwise_20"),
    },
    "the same, nanochat's recipe": own_runs("nanochat", (500, 1000, 2000)),
    "technical text": own_runs("technical", (500, 1000)),
    "prose, depth 6, width 256": own_runs("larger", (500, 1000)),
}

# by variant(); other variants take OTHER_COLORS in turn
COLORS = {
    "none": "tab:gray",
    "shared": "tab:blue",
    "layerwise": "tab:orange",
    "layerwise --deepen 0.25 --forward-passes 1 --schedule refine": "tab:red",
    "shared --deepen 0.25 --forward-passes 1 --inject kv --schedule refine": "navy",
    "shared --first-memory embedding --inject kv --schedule plain": "black",  # the control
}
OTHER_COLORS = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


# -----------------------------------------------------------------------------
# Reading rows

def by_name(rows):
    """{name: its rows, one a seed}, in the order in which the names first appear."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["name"]].append(row)
    return groups

def with_beside(name, results):
    """The rows of a set, behind those of `scaling` that it is read against."""
    beside = [row for row in results["scaling"] if row["name"] in BESIDE.get(name, ())]
    return beside + results[name]

def bpb(row):
    """BPB as the model decodes, with the exact recurrence."""
    return row["bpb"]["decode"]

def spread(rows, value=bpb):
    """(mean, lowest, highest) over seeds."""
    values = [value(row) for row in rows]
    return np.mean(values), min(values), max(values)

# flags of a run that make it another variant, in whose name their value stands
NAMED_FLAGS = (r"--(?:schedule|subsets|drafts|forward-passes|loss-weights|deepen|inject|first-memory) \S+"
               r"|--dest-layers \S+ \S+|--pass-mix(?: [0-9.]+)+")
# and those whose values share a line; train.py has them no more, rows of `cheaper` do
FLAGS_WITHOUT_VALUE = r"--memory-start|--memory-share"

def variant(row):
    """
    --lrt of a row's command, and its other flags that are not the paper's: `none`, `shared --inject kv`,
    ..
    """
    lrt = re.search(r"--lrt (\w+)", row["command"])[1]
    flags = re.findall(f"{FLAGS_WITHOUT_VALUE}|{NAMED_FLAGS}", row["command"])
    return " ".join([lrt, *sorted(flags)])

def label(name):
    return "baseline" if name == "none" else name

def longest_runs(rows):
    """
    {variant: its run of the first seed}, of the largest number of tokens that all variants have a run of.
    """
    tokens = defaultdict(set)
    for row in rows:
        tokens[variant(row)].add(row["tokens"])
    common = set.intersection(*tokens.values())
    found = {}
    for row in rows:
        if common and row["tokens"] == max(common):
            found.setdefault(variant(row), row)
    return found

def baseline_at(tokens, rows):
    """
    BPB of the baseline in rows after so many tokens, None outside of its budgets. Between them: a
    polynomial in log tokens through the budgets (a straight line would lie above the curve, to the
    baseline's disadvantage).
    """
    budgets = []
    for group in by_name(rows).values():
        if variant(group[0]) == "none":
            budgets.append((group[0]["tokens"], spread(group)[0]))
    budgets.sort()
    tokens = round(tokens)  # shares of a pass do not add up to whole tokens in floating point
    if not budgets or not budgets[0][0] <= tokens <= budgets[-1][0]:
        return None
    x, y = np.array(budgets).T
    degree = min(len(x) - 1, 3)
    return np.polyval(np.polyfit(np.log(x / tokens), y, degree), 0)


# -----------------------------------------------------------------------------
# Figures

def errorbar(ax, x, groups, value=bpb, **style):
    """Points at x, the means of groups of rows, with the range of each group."""
    mean, low, high = np.array([spread(rows, value) for rows in groups]).T
    ax.errorbar(x, mean, yerr=[mean - low, high - mean], capsize=3, **style)

def draw_scaling(rows, ax, title):
    """The paper's scaling figure: BPB over compute, one line a variant."""
    lines = defaultdict(list)
    for group in by_name(rows).values():
        lines[variant(group[0])].append(group)
    other_colors = cycle(OTHER_COLORS)
    for name, groups in lines.items():
        groups.sort(key=lambda group: group[0]["compute"])
        compute = [group[0]["compute"] for group in groups]
        color = COLORS[name] if name in COLORS else next(other_colors)
        errorbar(ax, compute, groups, marker="o", label=label(name), color=color)

    ratios = [row["tokens_per_parameter"] for row in rows]
    ax.set(
        xscale="log",
        xlabel="baseline-equivalent compute, million tokens x passes",
        ylabel="validation BPB, decoding",
        title=f"{title}, {min(ratios):.2g} to {max(ratios):.2g} tokens a parameter",
    )
    ticks = sorted({row["compute"] for row in rows if variant(row) == "none"})
    ax.set_xticks(ticks, [f"{x / 1e6:.2g}" for x in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=7 if len(lines) < 7 else 6)

def draw_curves(runs, ax):
    """Training loss over steps, the first pass and those with memory apart."""
    for name, row in sorted(runs.items()):
        step, first, memory = np.array(row["curve"], dtype=float).T
        color = COLORS[name]
        if name == "none":
            ax.plot(step, first, color=color, label="baseline")
        else:
            ax.plot(step, first, color=color, linestyle=":", label=f"{name}, pass without memory")
            ax.plot(step, memory, color=color, label=f"{name}, passes with memory")
    ax.set(xlabel="step", ylabel="training loss, nats a token", yscale="log", title="loss curves, seed 0")
    ax.legend(fontsize=7)

def draw_position(runs, ax):
    """BPB by position in the context, with memory and with memory zero."""
    for name, row in sorted(runs.items()):
        memory_on = row["by_position"]["decode"]
        memory_off = row["by_position"].get("no memory")
        x = np.arange(len(memory_on)) + 0.5
        on_label = "baseline" if name == "none" else f"{name}, memory on"
        ax.plot(x, memory_on, color=COLORS[name], label=on_label)
        if memory_off is not None:
            ax.plot(x, memory_off, color=COLORS[name], linestyle=":", label=f"{name}, memory off")
    ax.set(
        xlabel="position, sixteenths of the context",
        ylabel="validation BPB, decoding",
        title="by position, memory on and off",
    )
    ax.legend(fontsize=7)

def draw_learned(runs, axes):
    """The scalars a, b, c (left) and the mean gates (right) of every layer."""
    left, right = axes
    for name, row in sorted(runs.items()):
        style = dict(color=COLORS[name], marker=".")
        for key, linestyle in (("a", "--"), ("b", ":"), ("c", "-")):
            if key in row["learned"]:
                left.plot(row["learned"][key], linestyle=linestyle, label=f"{key}, {name}", **style)
        for key, linestyle in (("local", "--"), ("memory", "-"), ("token", ":")):
            gates = [gate[key] for gate in row["learned"]["gates"].values() if key in gate]
            if gates:
                right.plot(gates, linestyle=linestyle, label=f"{key}, {name}", **style)
    left.set(xlabel="layer", title="learned a, b, c")
    right.set(xlabel="layer", title="mean gates, decoding")
    for ax in axes:
        ax.locator_params(axis="x", integer=True)
        ax.legend(fontsize=6, ncols=2)

def draw_ablation(results, ax):
    """BPB of every run of the set `ablation`, the best one lowest; black: what it is read against."""
    groups = by_name(with_beside("ablation", results))
    names = sorted(groups, key=lambda name: spread(groups[name])[0])
    for i, name in enumerate(names):
        mean, low, high = spread(groups[name])
        color = "black" if name in BESIDE["ablation"] else "tab:blue"
        ax.errorbar([mean], [i], xerr=[[mean - low], [high - mean]], marker="o", capsize=3, color=color)
    ax.set(
        yticks=range(len(names)),
        yticklabels=names,
        xlabel="validation BPB, decoding",
        title="ablation, one change each",
    )
    ax.tick_params(axis="y", labelsize=7)

def training_length(row):
    """The tokens of a sequence in the training of a row of state tracking: the shortest that is scored."""
    return min(int(length) for length in row["decode"]["last"])

def by_task(rows):
    """Rows of state tracking: {(task, length of training): {variant: its rows, one a seed}}."""
    panels = defaultdict(dict)
    for name, group in by_name(rows).items():
        task, _, variant_name = name.partition("_")
        panels[task, training_length(group[0])][variant_name] = group
    return panels

def draw_states(rows, axes):
    """
    State tracking, one panel a task and length of training, the dashed line: accuracy at the last position
    by length, decoding.
    """
    panels = by_task(rows)
    variants = sorted({name for groups in panels.values() for name in groups})
    colors = plt.get_cmap("tab20").colors
    for ax, ((task, length), groups) in zip(axes, sorted(panels.items())):
        for name, group in sorted(groups.items()):
            color = colors[variants.index(name) % len(colors)]
            draw_accuracy(group, ax, label=label(name.replace("_", " ")), color=color)
        ax.axvline(length, color="black", linestyle="--", linewidth=0.5)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="tokens", ylabel="accuracy at the last one", title=task)
        ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)

def draw_accuracy(rows, ax, **style):
    """One run of state tracking: accuracy at the last position by length, over seeds."""
    by_seed = [list(row["decode"]["last"].values()) for row in rows]
    lengths = [int(length) for length in rows[0]["decode"]["last"]]
    mean = np.mean(by_seed, axis=0)
    below, above = mean - np.min(by_seed, axis=0), np.max(by_seed, axis=0) - mean
    ax.errorbar(lengths, mean, yerr=[below, above], marker="o", capsize=3, **style)

def worth(results):
    """
    The runs of WORTH that have rows: {(text, budget): {column of WORTH_COLUMNS: its rows, one a seed}},
    where there is a control.
    """
    found = {}
    for text, budgets in WORTH.items():
        for budget, runs in budgets.items():
            groups = {}
            for column, run in zip(WORTH_COLUMNS, runs):
                name, _, run_name = (run or "").partition(" ")
                rows = [row for row in results.get(name, []) if row["name"] == run_name]
                if rows:
                    groups[column] = rows
            if "control" in groups:
                found[text, budget] = groups
    return found

def draw_worth(results, ax):
    """BPB over the baseline's at as many FLOPs: a point a seed, a column for each text and budget."""
    found = {place: groups for place, groups in worth(results).items() if "baseline" in groups}
    colors = dict(zip(WORTH_COLUMNS[1:], ("black", "tab:red", "tab:blue", "tab:gray")))
    marks = dict(zip(WORTH_COLUMNS[1:], "os^v"))
    for x, groups in enumerate(found.values()):
        baseline, low, high = spread(groups["baseline"])
        ax.bar(x, high - low, 0.8, low - baseline, color="lightgray")  # the baseline's seeds
        for i, (column, color) in enumerate(colors.items()):
            values = [bpb(row) - baseline for row in groups.get(column, [])]
            ax.plot([x + 0.13 * (i - 1.5)] * len(values), values, marks[column], color=color, markersize=5,
                    label=column if x == 0 else None)
    ax.axhline(0, color="gray", linewidth=0.8)
    ax.set_xticks(range(len(found)))
    ax.set_xticklabels([f"{text}\n{budget} steps".replace(", ", "\n") for text, budget in found], fontsize=7)
    ax.set(ylabel="BPB, decoding, over the baseline's at equal FLOPs", title="language: lower is better")
    ax.legend(fontsize=7)

def draw_worth_by_training(results, ax):
    """BPB of recurrence over the control's at as many FLOPs, by the control's tokens a parameter."""
    for (text, _), groups in worth(results).items():
        if "recurrence on top" in groups:
            distance = spread(groups["recurrence on top"])[0] - spread(groups["control"])[0]
            marker = "osD^v"[list(WORTH).index(text)]
            ax.plot(groups["control"][0]["tokens_per_parameter"], distance, marker, color="tab:red")
            ax.plot([], [], marker, color="tab:red", label=text)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))  # each text once
    ax.legend(handles.values(), handles.keys(), fontsize=7)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ax.set(xlabel="tokens a parameter", ylabel="BPB, decoding, over the control's at equal FLOPs",
           title="recurrence on top of the control")

# in the same figure, state tracking: names of S5 runs without "s5_layerwise_"
WORTH_STATES = {
    "none": "baseline",
    "plain_first_embedding": "control",
    "interleaved2": "S = 2",
    "interleaved8": "S = 8",
    "draft2_subsets8": "two sweeps\nof 8",
    "sequential": "exact\nrecurrence",
}

def draw_worth_states(rows, ax):
    """Accuracy at the last position of S5 at four times the training length: a point a seed."""
    groups = by_task(rows).get(("s5", 16), {})
    for steps, offset, mark, color in ((800, -0.1, "o", "black"), (1600, 0.1, "s", "tab:red")):
        suffix = "_1600_steps" if steps == 1600 else ""
        for x, name in enumerate(WORTH_STATES):
            rows = groups.get(f"layerwise_{name}{suffix}") or groups.get(f"{name}{suffix}") or []
            values = [row["decode"]["last"]["64"] for row in rows]
            ax.plot([x + offset] * len(values), values, mark, markersize=5, color=color,
                    label=f"{steps} steps" if x == 0 else None)
    ax.set_xticks(range(len(WORTH_STATES)))
    ax.set_xticklabels(WORTH_STATES.values(), fontsize=7)
    ax.set(ylabel="right at the last of 64 tokens", title="S5, trained on 16 tokens: higher is better")
    ax.legend(fontsize=7)

def draw_figures(results, folder):
    """All figures for which there are rows, as PNG files in the folder."""
    if results["scaling"]:
        names = [name for name in ("scaling", "cheaper", "longer", "control") if results[name]]
        figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4.5), squeeze=False)
        for name, ax in zip(names, axes[0]):
            draw_scaling(with_beside(name, results), ax, name)
        save(figure, folder / "scaling.png")

        runs = longest_runs(results["scaling"])
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
        draw_curves(runs, axes[0])
        draw_position(runs, axes[1])
        save(figure, folder / "curves.png")

        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        draw_learned(runs, axes)
        save(figure, folder / "learned.png")

    if worth(results) and results["states"]:
        figure, axes = plt.subplots(1, 3, figsize=(18, 5), width_ratios=[2, 1, 1])
        draw_worth(results, axes[0])
        draw_worth_by_training(results, axes[1])
        draw_worth_states(results["states"], axes[2])
        save(figure, folder / "worth.png")

    if results["ablation"]:
        figure, ax = plt.subplots(figsize=(7, 5))
        draw_ablation(results, ax)
        save(figure, folder / "ablation.png")

    if results["states"]:
        panels = len(by_task(results["states"]))
        figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), squeeze=False)
        draw_states(results["states"], axes[0])
        save(figure, folder / "states.png")

def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


# -----------------------------------------------------------------------------
# Pictures of runs, from their log.jsonl

LINES = ("-", "--", ":", "-.")  # of the passes, or of what else one run has several of

def smooth(values, window):
    """Running mean over so many values, fewer at the beginning; NaN and None are left out of it."""
    values = np.array(values, dtype=float)  # None becomes NaN
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0))
    counts = np.cumsum(known)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)

def draw_run_loss(name, color, steps, ax):
    """The training loss of every pass; of the whole step, if the log does not have its passes."""
    x = [row["step"] for row in steps]
    by_pass = [row["passes"] or [row["loss"]] for row in steps]
    window = max(len(steps) // 50, 1)
    for i in range(max(map(len, by_pass))):
        losses = [losses[i] if i < len(losses) else None for losses in by_pass]
        if any(loss is not None for loss in losses):
            ax.plot(x, smooth(losses, window), LINES[i % len(LINES)], color=color, label=f"{name}, pass {i}")

def draw_run_norm(name, color, steps, ax):
    ax.plot([row["step"] for row in steps], [row["norm"] for row in steps], color=color, label=name)

def draw_run_bpb(name, color, evaluations, ax):
    """Validation BPB: in parallel over all rows; decoding and without memory over the rows of these."""
    x = [row["step"] for row in evaluations]
    places = [("parallel", "bpb", "merged"), ("decoding", "decode_rows", "decode"),
              ("no memory", "decode_rows", "no memory")]
    for line, (what, where, key) in zip(LINES, places):
        values = [row[where].get(key, np.nan) for row in evaluations]
        if np.isfinite(values).any():
            ax.plot(x, values, line, marker=".", color=color, label=f"{name}, {what}")

def draw_run_learned(name, color, evaluations, left, right):
    """The scalars (left) and the mean gates (right) by layer, at the last evaluation that has them."""
    found = [row["learned"] for row in evaluations if "learned" in row]
    if not found:  # a log from before they were in it
        return
    for line, key in zip(LINES, ("a", "b", "c")):
        if key in found[-1]:
            left.plot(found[-1][key], line, marker=".", color=color, label=f"{name}, {key}")
    for line, key in zip(LINES, ("local", "memory", "token")):
        gates = {int(layer): means[key] for layer, means in found[-1]["gates"].items() if key in means}
        if gates:
            layers, values = gates.keys(), gates.values()
            right.plot(list(layers), list(values), line, marker=".", color=color, label=f"{name}, {key}")

def draw_runs(folders, path):
    """
    The log.jsonl of these run folders as one picture, the PNG file `path`. Raises UserError if a folder has
    none.
    """
    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    (loss, bits, norms), (lambdas, gates, rates) = axes
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # sweep_1/a and sweep_2/a
        names = list(map(str, folders))
    for i, (name, folder) in enumerate(zip(names, folders)):
        rows = read_log(folder)
        steps = [row for row in rows if row["kind"] == "train"]
        evaluations = [row for row in rows if row["kind"] == "eval"]
        if not steps:
            raise UserError(f"{folder} has no log.jsonl with training steps: give the folder of a run")
        color = f"C{i % 10}"
        try:
            draw_run_loss(name, color, steps, loss)
            draw_run_norm(name, color, steps, norms)
            draw_run_bpb(name, color, evaluations, bits)
            draw_run_learned(name, color, evaluations, lambdas, gates)
            rates.plot([row["step"] for row in steps], [row["lrm"] for row in steps], color=color, label=name)
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise UserError(f"{folder}/log.jsonl has rows that cannot be drawn ({e!r}): mend it, "
                            "or leave this run out") from e

    loss.set(xlabel="step", ylabel="nats a token", yscale="log", title="training loss, running mean")
    bits.set(xlabel="step", ylabel="bits per byte", title="validation")
    norms.set(xlabel="step", yscale="log", title="norm of the gradient")
    lambdas.set(xlabel="layer", title="learned scalars a (residual), b (x0), c (memory)")
    gates.set(xlabel="layer", title="mean gates, decoding")
    rates.set(xlabel="step", title="learning rates, share of the highest")
    for ax in (lambdas, gates):
        ax.locator_params(axis="x", integer=True)
    for ax in (loss, norms):  # 5, not 5 x 10^0
        ax.yaxis.set_major_formatter(LogFormatter())
        ax.yaxis.set_minor_formatter(LogFormatter())
    for ax in axes.flat:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=7)
        else:
            ax.text(0.5, 0.5, "the log has none", ha="center", transform=ax.transAxes)
    figure.tight_layout()
    write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=110))
    print(path)


# -----------------------------------------------------------------------------
# Tables in Markdown

def print_table(columns, lines, text_columns=1):
    """Print a table of strings; the first text_columns are aligned left, the others, numbers, right."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * text_columns + "---:|" * (len(columns) - text_columns))
    for cells in lines:
        print("| " + " | ".join(cells) + " |")

def millions(n):
    return f"{n / 1e6:.2f} M"

def print_provenance(name, rows):
    """Where and when the rows of a set were made."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    devices = ", ".join(sorted({row["device"] for row in rows}))
    dates = [row["date"] for row in rows]
    first_and_last = " to ".join(sorted({min(dates), max(dates)}))
    print(f"\n{name}: commits {commits}; {devices}; {first_and_last}\n")

def table(name, rows, baseline):
    """
    A set of language models, means over seeds: BPB parallel and decoding, and how far apart the seeds
    are; decoding minus the BPB that the baseline (rows of another set, or []) has with as many tokens, as
    much compute as the paper counts it, and as many FLOPs; and the loss of tokens that can be copied from
    the context and of the others.
    """
    baseline_flops_per_token = None
    for row in baseline:
        if variant(row) == "none":
            baseline_flops_per_token = row["flops"] / row["tokens"]
            break
    columns = [
        "run", "seeds", "tokens", "compute",
        "first pass", "merged", "decoding", "range of seeds", "no memory",
        "over baseline, same tokens", "same compute", "same FLOPs",
        "nats, repeated pairs", "new pairs", "minutes",
    ]
    lines = []
    for run, group in by_name(rows).items():
        lines.append([run, *table_cells(group, baseline, baseline_flops_per_token)])
    print_provenance(name, rows)
    print_table(columns, lines)

def table_cells(rows, baseline, baseline_flops_per_token):
    """
    The cells of table() for the rows of one run, one a seed; a cell is empty where a run has no such
    figure.
    """
    first = rows[0]
    decoding, low, high = spread(rows)
    compute = np.mean([row["compute"] for row in rows])

    def mean_bpb(key):
        if key not in first["bpb"]:
            return ""
        return f"{np.mean([row['bpb'][key] for row in rows]):.4f}"

    def over_baseline(tokens):
        there = baseline_at(tokens, baseline)
        if not there or variant(first) == "none":
            return ""
        return f"{decoding - there:+.4f}"

    def mean_nats(key):
        if not all("copying" in row for row in rows):  # the oldest rows
            return ""
        return f"{np.mean([row['copying'][key] for row in rows]):.3f}"

    over_at_same_flops = ""
    if baseline_flops_per_token:
        over_at_same_flops = over_baseline(first["flops"] / baseline_flops_per_token)
    minutes = np.mean([row["train_seconds"] for row in rows]) / 60
    return [
        str(len(rows)),
        millions(first["tokens"]),
        millions(compute),
        mean_bpb("pass 0"),
        mean_bpb("merged"),
        f"{decoding:.4f}",
        f"{high - low:.4f}",
        mean_bpb("no memory"),
        over_baseline(first["tokens"]),
        over_baseline(compute),
        over_at_same_flops,
        mean_nats("repeated"),
        mean_nats("new"),
        f"{minutes:.0f}",
    ]

def table_copying(rows):
    """
    Nats of a token that can be copied from its context and of one that cannot, for the whole model and
    without each part of the memory's path; means over seeds.
    """
    lines = []
    for run, group in by_name(rows).items():
        losses = {"": [row["copying"] for row in group]}  # by the part that is left out
        for part in group[0]["copying"]["without"]:
            losses[part] = [row["copying"]["without"][part] for row in group]
        for part, by_seed in losses.items():
            means = [np.mean([loss[key] for loss in by_seed]) for key in ("repeated", "new")]
            lines.append([run, part, *(f"{mean:.3f}" for mean in means)])
    print()
    print_table(["run", "without", "nats, repeated pairs", "new pairs"], lines, text_columns=2)

def table_states(name, rows):
    """
    State tracking, means over seeds: accuracy at the last position by length, and that of whole sequences
    of the training length, decoding and as the passes of training answer.
    """
    lengths = list(rows[0]["decode"]["last"])
    shortest, longest = lengths[0], lengths[-1]
    columns = ["run", "seeds", "compute"]
    columns += [f"last of {length}" for length in lengths]
    columns += [f"{longest}, memory off", f"all {shortest}", f"all {shortest}, passes of training"]
    # where to find these accuracies in a row
    places = [("decode", "last", length) for length in lengths]
    places += [("no_memory", "last", longest), ("decode", "whole", shortest), ("trained", "whole", shortest)]

    lines = []
    for run, group in sorted(by_name(rows).items()):
        cells = [run, str(len(group)), millions(group[0]["compute"])]
        for key, what, length in places:
            if key in group[0]:
                cells.append(f"{np.mean([row[key][what][length] for row in group]):.3f}")
            else:
                cells.append("")
        lines.append(cells)
    print_provenance(name, rows)
    print_table(columns, lines)

def table_worth(results):
    """BPB of decoding at equal FLOPs, each seed, and recurrence over the control."""
    lines = []
    for (text, budget), groups in worth(results).items():
        cells = [text, str(budget)]
        for column in WORTH_COLUMNS:
            cells.append(", ".join(f"{bpb(row):.4f}" for row in groups.get(column, [])))
        over = ""
        if "control" in groups and "recurrence on top" in groups:
            over = f"{spread(groups['recurrence on top'])[0] - spread(groups['control'])[0]:+.4f}"
        per_parameter = groups["control"][0].get("tokens_per_parameter")
        lines.append([*cells, over, f"{per_parameter:.2g}" if per_parameter else ""])
    print("\nworth, at equal FLOPs\n")
    columns = ["text", "steps of the baseline", *WORTH_COLUMNS, "recurrence on top, over the control",
               "tokens a parameter"]
    print_table(columns, lines)

def print_tables(results):
    """The tables of all sets that have rows."""
    table_worth(results)
    for name, rows in results.items():
        if not rows:
            continue
        if name == "states":
            for length in sorted({training_length(row) for row in rows}):
                table_states(name, [row for row in rows if training_length(row) == length])
        elif name == "reproduction":  # of other text: no other set is its baseline
            table(name, rows, baseline=[])
        elif name in ("longer", "larger", "nanochat", "technical", "warm"):  # they have their own baselines
            table(name, rows, baseline=rows)
        else:
            table(name, with_beside(name, results), baseline=results["scaling"])
        if name in ("scaling", "tuning"):
            table_copying([row for row in rows if "copying" in row])

def draw_stability(paths, png):
    """What `eval_core.py --eval stability --json FILE` wrote: BPB and memory, pass after pass."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for path in paths:
        try:
            results = json.loads(Path(path).read_text("utf-8"))
            found, name = results["stability"], Path(results["checkpoint"]).parent.name
            passes = range(1, len(found["bpb"]) + 1)
            left.plot(passes, [bpb - found["decode"] for bpb in found["bpb"]], label=name)
            right.plot(passes[1:], found["moved"][1:], label=name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{path} has no results of --eval stability ({e}): "
                            "write it with eval_core.py --eval stability --json") from e
    left.set(xscale="log", xlabel="passes", ylabel="BPB over that of decoding")
    left.axhline(0, color="gray", linewidth=0.5)
    left.legend()
    right.set(xscale="log", yscale="log", xlabel="passes", ylabel="memory moved, of its size")
    write_atomic(png, lambda f: figure.savefig(f, format="png", dpi=110))
    plt.close(figure)
    print(f"wrote {png}")

def main():
    parser = ArgumentParser(
        description="Draw runs, or the rows of RESULTS/*.jsonl, whose tables are printed, too.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, drawn in one picture")
    parser.add_argument("--png", metavar="FILE",
                        help="the picture of runs (default: pictures.png in the first one's folder), or of "
                        "--stability (default: stability.png)")
    parser.add_argument("--stability", nargs="+", metavar="FILE",
                        help="results of eval_core.py --eval stability --json, drawn in one picture")
    parser.add_argument("--results", default="research/results",
                        help="folder with the rows; the figures go there, too")
    args = parser.parse_args()
    if args.png and not (args.runs or args.stability):
        raise UserError("--png is for the picture of runs or of --stability: name one")
    if args.stability:
        args.png = args.png or "stability.png"
        check_output(args, "png", args.stability)
        draw_stability(args.stability, args.png)
        return
    if args.runs:
        args.png = args.png or Path(args.runs[0]) / "pictures.png"
        check_output(args, "png")
        draw_runs([Path(run) for run in args.runs], args.png)
        return
    folder = Path(args.results)
    results = {name: read_rows(folder / f"{name}.jsonl") for name in SETS}
    if not any(results.values()):
        raise UserError(f"{folder} has no rows: run `python -m research.experiments` first")
    draw_figures(results, folder)
    print_tables(results)

if __name__ == "__main__":
    run_main(main)
