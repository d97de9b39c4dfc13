"""The tables of research/plot.py; that it draws what experiments.py writes is in test_experiments.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_refused, cli, shell

from common import read_rows
from research import plot
from research.experiments import SETS


def make_row(name, lrt, tokens, compute, flops, bpb):
    return dict(
        name=name,
        seed=0,
        command=f"python train.py --lrt {lrt}",
        tokens=tokens,
        compute=compute,
        flops=flops,
        bpb=dict(merged=bpb, decode=bpb),
        train_seconds=60,
        commit="c",
        device="d",
        date="2026-11-21",
        copying=dict(share=0.1, repeated=2.5, new=5.0),
    )

SCALING = [
    make_row("none_500", "none", 100, 100, 1e6, 2.0),
    make_row("none_1000", "none", 400, 400, 4e6, 1.8),
    make_row("layerwise_500", "layerwise", 100, 200, 4e6, 1.95),
]
ABLATION = [make_row("subsets_4", "layerwise", 100, 800, 9e6, 1.96)]


def printed_lines(capsys):
    """The lines that were printed, by their first cell (of those with equal ones the last)."""
    return {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}

def test_the_baseline_at_as_many_tokens():
    assert plot.baseline_at(200, SCALING) == pytest.approx(1.9)  # half way in log tokens
    assert plot.baseline_at(400, SCALING) == pytest.approx(1.8)
    # its largest budget, but for rounding
    assert plot.baseline_at(300 * (1 + 1 / 3) + 1e-9, SCALING) == pytest.approx(1.8)
    # 2.4, 2.0, 1.8 are on a parabola, in log tokens
    curved = [*SCALING, make_row("none_250", "none", 25, 25, 25e4, 2.4)]
    assert [plot.baseline_at(x, curved) for x in (25, 50, 200)] == pytest.approx([2.4, 2.175, 1.875])
    # outside of its budgets
    assert plot.baseline_at(50, SCALING) is None
    assert plot.baseline_at(800, SCALING) is None
    assert plot.baseline_at(100, []) is None

def test_a_set_is_read_beside_runs_of_another():
    results = dict(scaling=SCALING, ablation=ABLATION)
    names = [row["name"] for row in plot.with_beside("ablation", results)]
    assert names == ["none_500", "layerwise_500", "subsets_4"]

def test_what_recurrence_is_worth(capsys):
    """Against the baseline and the control at as many FLOPs; a text without a control is left out."""
    results = dict(
        nanochat=[make_row(name, "shared", 100, 100, 1e6, bpb)
                  for name, bpb in (("none_500", 2.0), ("kv_500", 1.9), ("draft_kv_500", 1.95))],
        technical=[make_row("none_500", "none", 100, 100, 1e6, 1.7)],
    )
    plot.table_worth(results)
    line = printed_lines(capsys)["| the same, nanochat's recipe"]
    assert line.endswith(" | 500 | 2.0000 | 1.9000 | 1.9500 |  |  | +0.0500 |  |")

def test_runs_of_the_comparison_exist():
    for budgets in plot.WORTH.values():
        for runs in budgets.values():
            for set_name, run in (run.split() for run in runs if run):
                rows = read_rows(ROOT / f"research/results/{set_name}.jsonl")
                assert run in SETS[set_name] or any(row["name"] == run for row in rows), run

def test_table(capsys):
    """Over the baseline at as many tokens, as much compute and as many FLOPs, where there is such a one."""
    plot.table("scaling", SCALING, SCALING)
    plot.table("ablation", ABLATION, SCALING)
    lines = printed_lines(capsys)
    assert "| -0.0500 | +0.0500 | +0.1500 |" in lines["| layerwise_500"]
    assert "| -0.0400 |  |  |" in lines["| subsets_4"]
    assert "|  |  |  | 2.500 | 5.000 | 1 |" in lines["| none_500"]

def test_table_of_copying(capsys):
    rows = []
    for repeated in (1.0, 2.0):
        without = dict(keys=dict(repeated=repeated + 1, new=5.5))
        row = make_row("kv", "shared", 100, 200, 2e6, 1.95)
        rows.append(row | dict(copying=dict(repeated=repeated, new=5.0, without=without)))
    plot.table_copying(rows)
    assert "| 2.500 | 5.500 |" in printed_lines(capsys)["| kv"]  # the last line, without its keys

@pytest.mark.parametrize("command, variant", [
    ("python train.py --depth 4 --lrt shared --seed 0", "shared"),
    ("python train.py --lrt shared --forward-passes 1 --seed 0", "shared --forward-passes 1"),
    # all shares of a flag that is gone are one line
    ("python train.py --lrt shared --forward-passes 1 --memory-start 0.5",
     "shared --forward-passes 1 --memory-start"),
    ("python train.py --lrt shared --schedule draft --pass-mix 0.75 0.25 --inject kv --dest-layers 1 2",
     "shared --dest-layers 1 2 --inject kv --pass-mix 0.75 0.25 --schedule draft"),
    ("python ground.py --lrt none --num-iterations 1000", "none"),
])
def test_variant(command, variant):
    assert plot.variant(dict(command=command)) == variant

def test_rows_of_runs_that_no_set_has_any_more(here):
    """They are drawn and printed with the others."""
    folder = Path("research/results")
    folder.mkdir(parents=True)
    old = make_row("last_50", "layerwise --memory-start 0.5", 200, 300, 4e6, 1.9)
    learned = dict(a=[1.0], b=[0.1], gates={"0": dict(token=1.0)})
    drawn = dict(
        tokens_per_parameter=1.0, curve=[[0, 2.0, None]], by_position=dict(decode=[2.0]), learned=learned)
    for name, rows in (("scaling", SCALING), ("cheaper", [old])):
        for row in rows:
            row = row | drawn
            row["copying"] = row["copying"] | dict(without={})
            with open(folder / f"{name}.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
    code, out, err = cli("research.plot")
    assert code == 0, err
    assert "| last_50 | 1 |" in out
    assert "| +0.1000 |" in out  # over the baseline at as many FLOPs, 400 tokens' worth
    assert (folder / "scaling.png").stat().st_size > 5000

def write_log(folder, learned, passes=(4.0, None)):
    """A log.jsonl as train.py writes it; passes: the losses of the passes, which fall from step to step."""
    Path(folder).mkdir(parents=True)
    rows = [dict(kind="run", step=0, run_id="x")]
    for step in range(30):
        of_passes = None if passes is None else [x and x - 0.1 * step for x in passes]
        rows.append(dict(kind="train", step=step, loss=4 - 0.1 * step, passes=of_passes, norm=1.0, lrm=1.0))
        if step % 10 == 9:
            row = dict(kind="eval", step=step + 1, bpb={"merged": 2.0}, decode_rows={"decode": 1.9})
            rows.append(row | (dict(learned=learned) if learned else {}))
    with open(Path(folder) / "log.jsonl", "w") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))

def drawn_lines(monkeypatch, *args):
    """{title of a panel: {label: y values}} of the picture of runs that a command draws."""
    figures = []
    monkeypatch.setattr(plot.plt.Figure, "tight_layout", lambda figure: figures.append(figure))
    code, out, err = cli("research.plot", *args)
    assert code == 0, err
    return {ax.get_title(): {line.get_label(): list(line.get_ydata()) for line in ax.lines}
            for ax in figures[0].axes}

def test_pictures_of_runs(here, monkeypatch):
    """Every figure of the log is in its panel, under the run's name; what a log does not have is left out."""
    gates = {"1": dict(memory=0.5, local=1.5)}  # layer 0 has none
    write_log("runs/a", dict(a=[1.0, 2.0], c=[0.1, 0.3], gates=gates), passes=(4.0, None, 3.0))
    write_log("runs/b", None, passes=None)
    panels = drawn_lines(monkeypatch, "runs/a", "runs/b", "--png", "both.png")
    assert Path("both.png").stat().st_size > 10_000
    loss = panels["training loss, running mean"]
    assert list(loss) == ["a, pass 0", "a, pass 2", "b, pass 0"]
    assert loss["a, pass 2"] == pytest.approx([3 - 0.1 * step for step in range(30)])
    assert panels["validation"]["a, decoding"] == [1.9] * 3
    assert "a, no memory" not in panels["validation"]
    assert len(panels["norm of the gradient"]) == 2
    lambdas, = [lines for title, lines in panels.items() if title.startswith("learned")]
    assert lambdas == {"a, a": [1.0, 2.0], "a, c": [0.1, 0.3]}
    assert panels["mean gates, decoding"] == {"a, local": [1.5], "a, memory": [0.5]}

    # from anywhere, as a script
    done = shell("research/plot.py", "runs/b")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/b/pictures.png\n"

def test_running_means():
    assert plot.smooth([1, 2, 3, 4], 2) == pytest.approx([1, 1.5, 2.5, 3.5])
    means = plot.smooth([None, 2, None, 4, None, None], 2)
    assert np.isnan(means[0]) and np.isnan(means[5])
    assert means[1:5] == pytest.approx([2, 2, 4, 4])

def test_runs_that_cannot_be_drawn(here):
    Path("empty").mkdir()
    assert_refused(cli("research.plot", "empty"), "empty has no log.jsonl")
    assert_refused(cli("research.plot", "nowhere", "--png", "x.png"), "nowhere has no log.jsonl")
    assert_refused(cli("research.plot", "empty", "--png", "nowhere/x.png"), "there is no folder nowhere")
    assert_refused(cli("research.plot", "--png", "x.png"), "name one")
    assert not Path("x.png").exists()
    Path("odd").mkdir()
    Path("odd/log.jsonl").write_text('{"kind": "train", "step": 0, "loss": "x"}\n')
    assert_refused(cli("research.plot", "odd"), "odd/log.jsonl has rows that cannot be drawn")
    before = Path("odd/log.jsonl").read_text()
    assert_refused(cli("research.plot", "odd", "--png", "odd/log.jsonl"), "would replace")
    odd = dict(checkpoint="a/b", stability=dict(bpb=["x"], moved=[], decode=1))
    Path("odd.json").write_text(json.dumps(odd))
    assert_refused(cli("research.plot", "--stability", "odd.json"), "odd.json has no results of")
    assert_refused(cli("research.plot", "--stability", "odd.json", "--png", "odd.json"), "would replace")
    assert Path("odd/log.jsonl").read_text() == before
    assert not Path("stability.png").exists()

def test_no_rows(here):
    assert_refused(cli("research.plot"), "research.experiments")
