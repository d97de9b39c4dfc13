"""
Draw results/*.jsonl, the rows that experiments.py, ground.py and states.py wrote, and print their tables.

    python plot.py                      results/*.png and, on the console, the tables of README.md

Points are means over seeds, error bars the range of the seeds. Compute is baseline-equivalent: tokens times passes.
"""

import re
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

from experiments import read_rows
from prepare_data import ArgumentParser, UserError, run_main

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend is chosen first)

# runs of scaling() that a set is read against
BESIDE = dict(ablation=("none_500", "layerwise_500"), tuning=("none_500", "shared_500"), cheaper=("none_500", "none_1000", "none_2000", "layerwise_1000"))
COLORS = {"none": "tab:gray", "shared": "tab:blue", "layerwise": "tab:orange", "layerwise --deepen 0.25 --forward-passes 1 --schedule refine": "tab:red",
          "shared --deepen 0.25 --forward-passes 1 --inject kv --schedule refine": "navy"}


def by_name(rows):
    """{name: its rows, one a seed}, in the order in which they were first written."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["name"]].append(row)
    return groups

def with_beside(name, results):
    return [row for row in results["scaling"] if row["name"] in BESIDE.get(name, ())] + results[name]

def bpb(row):
    """How the model decodes, the exact recurrence."""
    return row["bpb"]["decode"]

def spread(rows, value=bpb):
    """(mean, lowest, highest) over seeds."""
    values = [value(row) for row in rows]
    return np.mean(values), min(values), max(values)

def errorbar(ax, x, groups, value=bpb, **style):
    mean, low, high = np.array([spread(rows, value) for rows in groups]).T
    ax.errorbar(x, mean, yerr=[mean - low, high - mean], capsize=3, **style)

def variant(row):
    """none | shared | layerwise, and its flags that are not the paper's, if any, from the command; one line for all shares of plain steps."""
    return " ".join([re.search(r"--lrt (\w+)", row["command"])[1], *sorted(re.findall(r"--memory-start|--memory-share|--(?:schedule|forward-passes|loss-weights|deepen|inject) \S+", row["command"]))])

def draw_scaling(rows, ax, title):
    """The paper's scaling figure: one line a variant."""
    lines = defaultdict(list)
    for group in by_name(rows).values():
        lines[variant(group[0])].append(group)
    others = cycle(["tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan"])
    for name, groups in lines.items():
        groups.sort(key=lambda group: group[0]["compute"])
        errorbar(ax, [group[0]["compute"] for group in groups], groups, marker="o", label="baseline" if name == "none" else name,
                 color=COLORS.get(name) or next(others))
    ratios = [row["tokens_per_parameter"] for row in rows]
    ax.set(xscale="log", xlabel="baseline-equivalent compute, million tokens x passes", ylabel="validation BPB, decoding",
           title=f"{title}, {min(ratios):.2g} to {max(ratios):.2g} tokens a parameter")
    ticks = sorted({row["compute"] for row in rows if variant(row) == "none"})
    ax.set_xticks(ticks, [f"{x / 1e6:.2g}" for x in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=7 if len(lines) < 7 else 6)

def largest(rows):
    """The run of each variant with the most tokens, of those that all variants have; the first seed."""
    common = set.intersection(*({r["tokens"] for r in rows if variant(r) == v} for v in {variant(r) for r in rows}))
    return {variant(r): r for r in reversed(rows) if r["tokens"] == max(common)} if common else {}

def draw_curves(results, ax):
    for name, row in sorted(largest(results["scaling"]).items()):
        step, first, memory = np.array(row["curve"], dtype=float).T
        ax.plot(step, first, color=COLORS[name], linestyle=":" if name != "none" else "-", label="baseline" if name == "none" else f"{name}, pass without memory")
        if name != "none":
            ax.plot(step, memory, color=COLORS[name], label=f"{name}, passes with memory")
    ax.set(xlabel="step", ylabel="training loss, nats a token", yscale="log", title="loss curves, seed 0")
    ax.legend(fontsize=7)

def draw_position(results, ax):
    for name, row in sorted(largest(results["scaling"]).items()):
        n = len(row["by_position"]["decode"])
        x = np.arange(n) + 0.5
        ax.plot(x, row["by_position"]["decode"], color=COLORS[name], label="baseline" if name == "none" else f"{name}, memory on")
        if "no memory" in row["by_position"]:
            ax.plot(x, row["by_position"]["no memory"], color=COLORS[name], linestyle=":", label=f"{name}, memory off")
    ax.set(xlabel="position, sixteenths of the context", ylabel="validation BPB, decoding", title="by position, memory on and off")
    ax.legend(fontsize=7)

def draw_learned(results, axes):
    for name, row in sorted(largest(results["scaling"]).items()):
        for key in "abc":
            if key in row["learned"]:
                axes[0].plot(row["learned"][key], color=COLORS[name], linestyle={"a": "--", "b": ":", "c": "-"}[key], marker=".", label=f"{key}, {name}")
        for key, style in (("local", "--"), ("memory", "-"), ("token", ":")):
            gates = [gate[key] for gate in row["learned"]["gates"].values() if key in gate]
            if gates:
                axes[1].plot(gates, color=COLORS[name], linestyle=style, marker=".", label=f"{key}, {name}")
    for ax, title in zip(axes, ("learned a, b, c", "mean gates, decoding")):
        ax.set(xlabel="layer", title=title)
        ax.locator_params(axis="x", integer=True)
        ax.legend(fontsize=6, ncols=2)

def draw_ablation(results, ax):
    groups = sorted(by_name(with_beside("ablation", results)).items(), key=lambda item: spread(item[1])[0])
    for i, (name, rows) in enumerate(groups):
        mean, low, high = spread(rows)
        ax.errorbar([mean], [i], xerr=[[mean - low], [high - mean]], marker="o", capsize=3, color="tab:blue" if name not in BESIDE["ablation"] else "black")
    ax.set(yticks=range(len(groups)), yticklabels=[name for name, _ in groups], xlabel="validation BPB, decoding", title="ablation, one change each")
    ax.tick_params(axis="y", labelsize=7)

def draw_states(results, axes):
    """Accuracy at the last position by length, as the model decodes; the dashed line is the length of training."""
    tasks = defaultdict(list)
    for name, rows in by_name(results["states"]).items():
        tasks[name.partition("_")[0]].append((name.partition("_")[2], rows))
    variants = sorted({name for groups in tasks.values() for name, _ in groups})
    for ax, (task, groups) in zip(axes, sorted(tasks.items())):
        for name, rows in sorted(groups, key=lambda group: group[0]):
            lengths = [int(n) for n in rows[0]["decode"]["last"]]
            mean, low, high = np.array([spread(rows, lambda row: row["decode"]["last"][str(n)]) for n in lengths]).T  # noqa: B023
            ax.errorbar(lengths, mean, yerr=[mean - low, high - mean], marker="o", capsize=3, color=f"C{variants.index(name)}",
                        label="baseline" if name == "none" else name.replace("_", " "))
        ax.axvline(lengths[0], color="black", linestyle="--", linewidth=0.5)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="tokens", ylabel="accuracy at the last one", title=task)
        ax.legend(fontsize=6)

def provenance(name, rows):
    """Where and when the rows of a set were made."""
    return "; ".join([f"{name}: commits {', '.join(sorted({row['commit'] for row in rows}))}", ", ".join(sorted({row["device"] for row in rows})),
                      " to ".join(sorted({min(row["date"] for row in rows), max(row["date"] for row in rows)}))])

def baseline_at(tokens, rows):
    """
    BPB of the baseline in rows after so many tokens: between its budgets, by a polynomial in log tokens through them (a
    straight line would lie above the curve, to the baseline's disadvantage); None outside of them.
    """
    budgets = sorted((rows[0]["tokens"], spread(rows)[0]) for rows in by_name(rows).values() if variant(rows[0]) == "none")
    tokens = round(tokens)  # shares of a pass do not add up to whole tokens in floating point
    if not budgets or not budgets[0][0] <= tokens <= budgets[-1][0]:
        return None
    x, y = np.array(budgets).T
    return np.polyval(np.polyfit(np.log(x / tokens), y, min(len(x) - 1, 3)), 0)

def table(name, rows, baseline):
    """
    A set as a table in Markdown: means over seeds, how far apart the seeds are, decoding minus the baseline's BPB at as many
    tokens, at as much compute as the paper counts it and at as many FLOPs, and the loss of a token that can be copied from its context and of one that cannot.
    """
    print(f"\n{provenance(name, rows)}\n")
    print("| run | seeds | tokens | compute | first pass | merged | decoding | range of seeds | no memory | over baseline, same tokens | same compute | same FLOPs | nats, repeated pairs | new pairs | minutes |")
    print("|---|" + "---:|" * 14)
    a_token = next((row["flops"] / row["tokens"] for row in baseline if variant(row) == "none"), None)  # of the baseline
    for run, rows in by_name(rows).items():
        def mean(key):
            return f"{np.mean([row['bpb'][key] for row in rows]):.4f}" if key in rows[0]["bpb"] else ""
        def over(tokens):
            there = baseline_at(tokens, baseline)
            return f"{decoding - there:+.4f}" if there and variant(rows[0]) != "none" else ""
        def nats(key):
            return f"{np.mean([row['copying'][key] for row in rows]):.3f}" if all("copying" in row for row in rows) else ""  # the first rows have none
        decoding, low, high = spread(rows)
        tokens, compute = rows[0]["tokens"], np.mean([row["compute"] for row in rows])
        print(f"| {run} | {len(rows)} | {tokens / 1e6:.2f} M | {compute / 1e6:.2f} M | {mean('pass 0')} | {mean('merged')} | {decoding:.4f} | {high - low:.4f} | "
              f"{mean('no memory')} | {over(tokens)} | {over(compute)} | {over(rows[0]['flops'] / a_token) if a_token else ''} | {nats('repeated')} | {nats('new')} | {np.mean([row['train_seconds'] for row in rows]) / 60:.0f} |")

def table_copying(rows):
    """Nats of a token that can be copied from its context and of one that cannot, whole and without each part of the memory's path; means over seeds."""
    print("\n| run | without | nats, repeated pairs | new pairs |\n|---|---|---:|---:|")
    for run, group in by_name(rows).items():
        for part in [None, *group[0]["copying"]["without"]]:
            found = [row["copying"]["without"][part] if part else row["copying"] for row in group]
            print(f"| {run} | {part or ''} | " + " | ".join(f"{np.mean([x[key] for x in found]):.3f}" for key in ("repeated", "new")) + " |")

def table_states(name, rows):
    """Accuracies: of the last position by length, and of whole sequences of the training length, decoding and as the passes of training answer."""
    print(f"\n{provenance(name, rows)}\n")
    lengths = list(rows[0]["decode"]["last"])
    print("| run | seeds | compute |" + "".join(f" last of {n} |" for n in lengths) + f" {lengths[-1]}, memory off | all {lengths[0]} | all {lengths[0]}, passes of training |")
    print("|---|---:|---:|" + "---:|" * (len(lengths) + 3))
    for run, group in sorted(by_name(rows).items()):
        def cell(key, what, n):
            return f"{np.mean([row[key][what][n] for row in group]):.3f}" if key in group[0] else ""  # noqa: B023
        cells = [cell("decode", "last", n) for n in lengths] + [cell("no_memory", "last", lengths[-1]), cell("decode", "whole", lengths[0]), cell("trained", "whole", lengths[0])]
        print(f"| {run} | {len(group)} | {group[0]['compute'] / 1e6:.2f} M | " + " | ".join(cells) + " |")

def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)

def main():
    parser = ArgumentParser(description="Draw results/*.jsonl and print their tables.")
    parser.add_argument("--results", default="results", help="folder with the rows; the figures go there, too")
    args = parser.parse_args()
    folder = Path(args.results)
    results = {name: read_rows(folder / f"{name}.jsonl") for name in ("ground", "scaling", "longer", "cheaper", "ablation", "tuning", "states")}
    if not any(results.values()):
        raise UserError(f"{folder} has no rows: run `python experiments.py` first")
    if results["scaling"]:
        panels = [name for name in ("scaling", "cheaper", "longer") if results[name]]
        figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
        for name, ax in zip(panels, axes[0]):
            draw_scaling(with_beside(name, results), ax, name)
        save(figure, folder / "scaling.png")
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
        draw_curves(results, axes[0])
        draw_position(results, axes[1])
        save(figure, folder / "curves.png")
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        draw_learned(results, axes)
        save(figure, folder / "learned.png")
    if results["ablation"]:
        figure, ax = plt.subplots(figsize=(7, 5))
        draw_ablation(results, ax)
        save(figure, folder / "ablation.png")
    if results["states"]:
        tasks = {row["name"].partition("_")[0] for row in results["states"]}
        figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
        draw_states(results, axes[0])
        save(figure, folder / "states.png")
    for name, rows in results.items():
        if rows:
            rows = with_beside(name, results)
            baseline = [] if name == "ground" else results["longer" if name == "longer" else "scaling"]
            table_states(name, rows) if name == "states" else table(name, rows, baseline)
        if name in ("scaling", "tuning"):
            table_copying([row for row in results[name] if "copying" in row])

if __name__ == "__main__":
    run_main(main)
