"""Sets of runs and what they leave: rows that are complete and not written twice, runs that were broken off, the figures; cheaper steps."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import experiments
import ground
import plot
import states
from eval_core import recurrent_losses
from interleave import Schedule, TrainStep
from model import GPT, GPTConfig
from sample import load_checkpoint
from test_cli import HERE, SMALL, TINY, assert_refused, cli, log, shell
from train import make_config, make_optimizers, make_parser, make_plan, parse_args, schedule_at

RUN = "train.py " + " ".join(SMALL) + " --eval-every 0 --eval-tokens 64 --decode-tokens 0 --save-every 5 --keep 1 --lrt {} --num-iterations {}"


@pytest.fixture
def sets(monkeypatch):
    """Sets of this test instead of the real ones."""
    monkeypatch.setattr(experiments, "ROWS", 8)
    def replace(**sets):
        monkeypatch.setattr(experiments, "SETS", sets)
    return replace

# -----------------------------------------------------------------------------
# Plain passes in some of the steps

@pytest.mark.parametrize("start,share,low,high", [(0, 1, 1000, 1000), (0.75, 1, 250, 250), (0, 0.25, 200, 300), (0.5, 0.5, 220, 280), (1, 1, 0, 0), (0, 0, 0, 0)])
def test_which_steps_run_the_schedule(start, share, low, high):
    args, schedule = Namespace(memory_start=start, memory_share=share, deepen=0.125, seed=3), Schedule("refine", refinements=1, forward_passes=1)
    steps = [schedule_at(args, schedule, step, 1000) for step in range(1000)]
    memory = [s.kind == "refine" for s in steps]
    assert low <= sum(memory) <= high and not any(memory[:int(1000 * start)])
    assert all(s.refinements == (1 if step < 875 else 2) for step, s in enumerate(steps) if memory[step])
    assert steps[::-1] == [schedule_at(args, schedule, step, 1000) for step in reversed(range(1000))]  # whatever came before

def test_a_plain_step_is_the_baseline_of_the_same_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, lrt="shared"))
    idx = torch.randint(32, (2, 16))
    loss, means = TrainStep(model, Schedule())(idx, idx, Schedule("plain"))
    assert loss == TrainStep(model, Schedule("plain"))(idx, idx)[0] and means.shape == (1,)
    loss.backward()
    assert model.mem_lambdas.grad is None and model.wte.weight.grad is not None  # optimizers leave the memory alone

def test_mixed_steps_on_one_and_two_processes(data, here):
    for n in (1, 2):
        done = shell(str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={n}", HERE / "train.py", "--data", data, *SMALL, "--name", f"on{n}",
                     "--num-iterations", 12, "--memory-start", 0.25, "--memory-share", 0.5, "--schedule", "refine", "--refinements", 1, "--forward-passes", 1, "--deepen", 0.25, "--eval-every", 9, "--save-every", 9, "--device-batch-size", 4)
        assert done.returncode == 0, done.stderr
        ends = [max(k for k in row["bpb"] if k.startswith("pass")) for row in log(f"runs/on{n}", "eval")]
        kept = [load_checkpoint(path)["schedule"] for path in sorted(Path(f"runs/on{n}").glob("*.pt"))]
        assert ends == ["pass 1", "pass 1", "pass 2"] and [(s["refinements"], s["forward_passes"]) for s in kept] == [(1, 1), (2, 2)]  # scored as the last steps trained
        assert "pass 2" in experiments.finished(f"runs/on{n}")["bpb"]
    one, two = log("runs/on1"), log("runs/on2")
    args, schedule = Namespace(memory_start=0.25, memory_share=0.5, deepen=0.25, seed=0), Schedule("refine", refinements=1, forward_passes=1)
    assert [len(row["passes"]) for row in one] == [len(schedule_at(args, schedule, step, 12).passes(9)) for step in range(12)]
    assert {len(row["passes"]) for row in one} == {1, 2, 3} and max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two)) < 1e-4
    assert_refused(cli("train.py", "--data", data, "--memory-share", 1.5), "--memory-share", "1.5")
    assert_refused(cli("train.py", "--data", data, "--memory-start", -1), "--memory-start", "-1")
    _, half, _ = cli("train.py", *TINY, "--data", data, "--num-iterations", 1000, "--total-batch-size", 512, "--dry-run", "--memory-share", 0.5)
    assert 1.45 < float(half.split(" times those of plain passes")[0].split()[-1]) < 1.55
    assert_refused(cli("train.py", "--data", data, "--deepen", 0.5), "--deepen goes with --schedule refine, not with interleaved")
    parse = ["--depth", "2", "--lrt", "shared", "--num-iterations", "1", "--schedule", "refine", "--refinements", "1", "--forward-passes", "1"]
    costs = [make_plan(make_parser().parse_args([*parse, *extra]), 512, 1, torch.float32).cost for extra in
             (["--deepen", "0"], ["--deepen", "1"], ["--deepen", "0.25", "--memory-start", "0.5"], ["--deepen", "0.5", "--memory-start", "0.75", "--memory-share", "0.5"])]
    assert costs[1] - 1 == pytest.approx(2 * (costs[0] - 1)) and costs[2] == pytest.approx(0.5 + 0.25 * sum(costs[:2])) and costs[3] == pytest.approx(0.875 + 0.125 * costs[1])


def test_what_is_new_in_an_lrt_can_be_trained_otherwise(data):
    def groups(*flags):
        args = make_parser().parse_args(["--depth", "2", "--lrt", "layerwise", *flags])
        model = GPT(make_config(args, 2, 32))
        muon = make_optimizers(model, args, batch_scale=1.0)[1]
        return model.mem_lambdas.tolist(), {id(p): group["lr"] for group in muon.param_groups for p in group["params"]}, model.parameter_groups()
    for flags, c, lr in (([], 0.1, 0.02), (["--memory-init", "1", "--memory-lr", "0.005"], 1.0, 0.005)):
        init, lrs, named = groups(*flags)
        assert init == pytest.approx([c, c]) and len(lrs) == len(named["matrices"]) + len(named["memory projections"])
        assert {lrs[id(p)] for p in named["memory projections"]} == {lr} and {lrs[id(p)] for p in named["matrices"]} == {0.02}
    assert_refused(cli("train.py", "--data", data, "--memory-init", "nan"), "memory_init", "nan")
    assert_refused(cli("train.py", "--data", data, "--memory-lr", "-1"), "--memory-lr", "-1")


# -----------------------------------------------------------------------------
# Sets

@pytest.mark.parametrize("name", experiments.SETS)
def test_every_run_is_a_command_that_its_script_takes(name, monkeypatch):
    for run_name, command in experiments.SETS[name].items():
        script, *flags = command.split()
        monkeypatch.setattr(sys, "argv", [script, *flags])
        if script == "states.py":
            args = states.parse_args()
            assert run_name in (f"{args.task}_none", f"{args.task}_recurrent", f"{args.task}_layerwise_{args.schedule}" + {
                "interleaved": str(args.subsets), "refine": str(args.refinements)}.get(args.schedule, ""))
        elif script == "ground.py":
            args = ground.parse_args()
            assert run_name == f"{args.lrt}_{args.num_iterations}" + "_release_muon" * (args.muon == "release")
        else:
            plan = make_plan(parse_args()[0], 4096, 1, torch.float32)
            assert plan.config.n_embd == (64 if name == "longer" else 128) and plan.micro_steps == 1, run_name

def test_rows_are_complete_written_once_and_drawn(data, here, sets):
    sets(scaling={"none_6": RUN.format("none", 6), "shared_6": RUN.format("shared", 6)},
         cheaper={"forward_6": RUN.format("shared", 6) + " --forward-passes 1 --memory-start 0.5"}, ablation={"shared": RUN.format("shared", 6)})
    common = ["--data", data, "--seeds", 0]
    code, out, err = cli("experiments.py", "scaling", "cheaper", *common, "--jobs", 2)
    assert code == 0 and "3 runs to do, 0 done" in out, out + err
    rows = {row["name"]: row for row in experiments.read_rows("results/scaling.jsonl")}
    assert set(rows) == {"none_6", "shared_6"}
    none, shared, (forward,) = rows["none_6"], rows["shared_6"], experiments.read_rows("results/cheaper.jsonl")
    assert shared["tokens"] == none["tokens"] == none["compute"] == 6 * 512 and shared["compute"] == 2 * shared["tokens"]
    plan = make_plan(make_parser().parse_args(forward["command"].split()[2:]), 512, 1, torch.float32)
    assert forward["flops"] == pytest.approx(plan.flops_per_token * forward["tokens"]) and plot.variant(forward) == "shared --forward-passes 1 --memory-start" and plot.variant(shared) == "shared"
    assert none["bpb"]["merged"] == pytest.approx(none["bpb"]["decode"]) and set(shared["bpb"]) == {"pass 0", "pass 1", "pass 2", "merged", "decode", "no memory"}
    assert len(shared["by_position"]["no memory"]) == 16 and len(shared["learned"]["c"]) == 2 and set(shared["learned"]["gates"]["1"]) == {"local", "memory", "token"}
    assert 0 < shared["copying"]["share"] < 1 and none["copying"]["share"] == shared["copying"]["share"]
    assert [x["passes"][0] is None for x in log("runs/experiments/cheaper/forward_6_s0")] == [False] * 3 + [True] * 3  # no loss, and no NaN in JSON
    assert [x is None for x in forward["curve"][5]] == [False, True, False]
    assert none["curve"][0][2] is None and shared["curve"][0][2] == pytest.approx(none["curve"][0][1], abs=0.1) and len(shared["curve"]) == 6
    # the command in the row is the run: without the runner it gives the same model
    code, _, err = cli("train.py", *shared["command"].split()[2:], "--out", "again")
    assert code == 0, err
    assert [row["loss"] for row in log("again/shared_6_s0")] == [row["loss"] for row in log("runs/experiments/scaling/shared_6_s0")]
    code, out, _ = cli("experiments.py", "scaling", "cheaper", *common)
    assert code == 0 and "0 runs to do, 3 done" in out and len(experiments.read_rows("results/scaling.jsonl")) == 2
    code, out, err = cli("plot.py")
    assert code == 0 and "| shared_6 | 1 |" in out and f"| shared_6 | values | {shared['copying']['without']['values']['repeated']:.3f} |" in out, err
    assert all((here / "results" / f"{name}.png").stat().st_size > 5000 for name in ("scaling", "curves", "learned"))
    _, out, _ = cli("experiments.py", *common, "--list")
    assert [line.startswith("done") for line in out.splitlines()] == [True, True, True, False]

def test_runs_are_read_against_the_baseline_at_as_many_tokens_and_as_much_compute(capsys):
    def row(name, lrt, tokens, compute, flops, bpb):
        return dict(name=name, seed=0, command=f"python train.py --lrt {lrt}", tokens=tokens, compute=compute, flops=flops, bpb=dict(merged=bpb, decode=bpb), train_seconds=60,
                    commit="c", device="d", date="2026-11-21", copying=dict(share=0.1, repeated=2.5, new=5.0))
    scaling = [row("none_500", "none", 100, 100, 1e6, 2.0), row("none_1000", "none", 400, 400, 4e6, 1.8), row("layerwise_500", "layerwise", 100, 200, 4e6, 1.95)]
    assert plot.baseline_at(200, scaling) == pytest.approx(1.9) and plot.baseline_at(400, scaling) == pytest.approx(1.8)  # half way in log tokens
    assert plot.baseline_at(300 * (1 + 1 / 3) + 1e-9, scaling) == pytest.approx(1.8)  # its largest budget, but for rounding
    curved = scaling + [row("none_250", "none", 25, 25, 25e4, 2.4)]  # 2.4, 2.0, 1.8 are on a parabola, in log tokens
    assert [plot.baseline_at(x, curved) for x in (25, 50, 200)] == pytest.approx([2.4, 2.175, 1.875])
    assert plot.baseline_at(50, scaling) is None and plot.baseline_at(800, scaling) is None and plot.baseline_at(100, []) is None
    results = dict(scaling=scaling, ablation=[row("subsets_4", "layerwise", 100, 800, 9e6, 1.96)])
    assert [r["name"] for r in plot.with_beside("ablation", results)] == ["none_500", "layerwise_500", "subsets_4"]
    plot.table("scaling", scaling, scaling)
    plot.table("ablation", results["ablation"], scaling)
    plot.table_copying([row("kv", "shared", 100, 200, 2e6, 1.95) | dict(copying=dict(repeated=x, new=5.0, without=dict(keys=dict(repeated=x + 1, new=5.5)))) for x in (1.0, 2.0)])
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "| -0.0500 | +0.0500 | +0.1500 |" in lines["| layerwise_500"] and "| -0.0400 |  |  |" in lines["| subsets_4"] and "|  |  |  | 2.500 | 5.000 | 1 |" in lines["| none_500"]
    assert "| 2.500 | 5.500 |" in lines["| kv"]  # the last one, without its keys

def test_copying_is_told_from_the_rest():
    idx = torch.tensor([[1, 2, 3, 1, 2, 3, 3], [1, 2, 1, 3, 2, 1, 3]])
    targets = torch.tensor([[2, 3, 1, 2, 3, 3, 1], [2, 1, 3, 2, 1, 3, 0]])
    seen = [[(row[p], to[p]) in list(zip(row, to))[:p] for p in range(7)] for row, to in zip(idx.tolist(), targets.tolist())]
    assert experiments.repeated(idx, targets).tolist() == seen and sum(map(sum, seen)) == 5
    rows = torch.cat([idx, targets[:, -1:]], dim=1)
    again = experiments.repeated(idx, targets)
    for lrt, inject, parts in (("none", "both", []), ("shared", "both", ["keys", "values", "residual"]), ("layerwise", "kv", ["keys 0", "keys 1", "values"]),
                               ("layerwise", "residual", ["residual"])):
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=7, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, lrt=lrt, inject=inject))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        found = experiments.copying(model, rows, batch_size=1)
        def means(of):
            losses = recurrent_losses(of, idx, targets).detach()
            return pytest.approx(dict(repeated=losses[again].mean().item(), new=losses[~again].mean().item()))
        assert {key: found[key] for key in ("repeated", "new")} == means(model) and found["share"] == pytest.approx(again.float().mean().item())
        assert list(found["without"]) == parts and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        for part, theirs in found["without"].items():  # as a model that never had it
            what, _, layer = part.partition(" ")
            off = {"keys": [f"mem_k.{layer or 0}.weight"], "values": [name for name in before if name.startswith("mem_v")], "residual": ["mem_lambdas"]}[what]
            model.load_state_dict(before | {name: torch.zeros_like(before[name]) for name in off})
            assert theirs == means(model) and theirs != {key: found[key] for key in ("repeated", "new")}, (lrt, part)
            model.load_state_dict(before)

def test_rows_leave_a_commit_clean_and_code_does_not(here, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(here / "bench.py"))
    (here / "results").mkdir()
    for name in ("model.py", "results/rows.jsonl"):
        (here / name).write_text("1")
    for words in (["init", "-q"], ["add", "model.py", "results"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], check=True)
    def commit():
        return bench.machine(torch.device("cpu"))["commit"]
    clean = commit()
    (here / "results/rows.jsonl").write_text("2")
    assert commit() == clean and not clean.endswith("-dirty") and clean != "unknown"
    (here / "model.py").write_text("2")
    assert commit() == clean + "-dirty"

def test_a_run_that_was_broken_off_goes_on(data, here, sets):
    sets(scaling={"shared_40": RUN.format("shared", 40)})
    console = here / "runs/experiments/scaling/shared_40_s0.txt"
    def stop_at_step_10():
        deadline = time.time() + 120
        while not (console.exists() and "step 00010/" in console.read_text()) and time.time() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=stop_at_step_10).start()
    code, out, err = cli("experiments.py", "--data", data, "--seeds", 0, "--jobs", 2)  # a thread each
    assert code == 1 and "goes on" in out, out + err
    assert not (here / "results/scaling.jsonl").exists()
    code, out, err = cli("experiments.py", "--data", data, "--seeds", 0, "--jobs", 2)  # a thread each
    assert code == 0, out + err
    row, = experiments.read_rows("results/scaling.jsonl")
    assert row["steps"] == 40 and console.read_text().count("step 00020/") == 1 and len(log("runs/experiments/scaling/shared_40_s0")) == 40

def test_bad_input_of_the_runner(data, here, sets):
    assert_refused(cli("experiments.py", "nonsense"), "nonsense", "scaling")
    assert_refused(cli("experiments.py", "scaling", "--data", "nowhere"), "nowhere", "prepare_data.py")
    assert_refused(cli("experiments.py", "--jobs", 0), "--jobs")
    assert_refused(cli("experiments.py", "scaling", "--only", "shared_7"), "shared_7", "--list")
    assert_refused(cli("plot.py"), "experiments.py")
    sets(scaling={"bad": RUN.format("shared", 5)})
    code, out, _ = cli("experiments.py", "--data", data, "--seeds", 0, "--jobs", 2, "--extra", "--depth 0")
    assert code == 1 and "exit code 2" in out and "--depth" in Path("runs/experiments/scaling/bad_s0.txt").read_text()

def test_rows_of_several_writers_and_after_a_crash(here):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: experiments.append_row("rows.jsonl", {"i": i, "text": "x" * 5000}), range(40)))
    assert sorted(row["i"] for row in experiments.read_rows("rows.jsonl")) == list(range(40))
    os.truncate("rows.jsonl", os.path.getsize("rows.jsonl") - 10)
    experiments.append_row("rows.jsonl", {"i": 40})
    assert len(experiments.read_rows("rows.jsonl")) == 40 and experiments.read_rows("rows.jsonl")[-1] == {"i": 40}

def test_learned_reads_what_the_model_has():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, lrt="layerwise", value_embeds="alternate"))
    idx = torch.randint(32, (2, 16))
    start = experiments.learned(model, idx, idx)
    assert start["c"] == pytest.approx([0.1, 0.1]) and start["gates"] == {0: dict(local=1.0, memory=1.0), 1: dict(local=1.0, memory=1.0, token=1.0)}
    gate = model.h[1].attn.gate.weight
    with torch.no_grad():
        gate[2:4] = 1e4 * torch.randn(2, 16)  # the memory's: all open or shut
    assert experiments.learned(model, idx, idx)["gates"][1]["local"] == 1.0 and 0 <= experiments.learned(model, idx, idx)["gates"][1]["memory"] <= 2


# -----------------------------------------------------------------------------
# The reference job

@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_muon_as_the_release_has_it(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = ground.ReleaseMuon([p], lr=0.1)
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.randn(shape)
        optimizer.step()
        step = (before - p.detach()) / 0.1 / max(1, shape[0] / shape[1]) ** 0.5
        assert step.norm().square() == pytest.approx(min(shape), rel=0.15)  # that of a matrix with singular values 1
        assert torch.linalg.svdvals(step).max() < 1.3 and (step * p.grad).sum() > 0
        rms = step.square().mean(1 if shape[0] >= shape[1] else 0)
        assert rms.max() / rms.min() < 1.01 or before.norm() > 0  # the first mean is the first step's

def test_ground(here, monkeypatch):
    rng = np.random.default_rng(0)
    (here / "reference").mkdir()
    for name, x in (("train", rng.integers(0, 64, 5000)), ("val", rng.integers(0, 64, 2000)), ("token_bytes", np.r_[np.ones(63), 0])):
        np.save(here / "reference" / f"{name}.npy", x.astype(np.uint16))
    flags = [*TINY[:-2], "--source-layer", 1, "--total-batch-size", 256, "--lrt", "layerwise", "--num-iterations", 30, "--reference", "reference"]
    code, out, err = cli("ground.py", *flags)
    assert code == 0 and "layerwise_30 seed 0: BPB pass 0" in out, err
    row, = experiments.read_rows("results/ground.jsonl")
    assert row["tokens"] == 30 * 256 and row["compute"] == 2 * row["tokens"] and json.dumps(row["command"])
    assert row["curve"][-1][1] < row["curve"][0][1] - 0.02 and row["bpb"]["decode"] == pytest.approx(row["bpb"]["merged"], abs=0.1)
    code, out, err = cli("ground.py", *flags)
    assert code == 0 and "has a row" in out and len(experiments.read_rows("results/ground.jsonl")) == 1
    # broken off behind its last step, and gone on with from the last save: the same run, bit for bit
    with monkeypatch.context() as patched:
        patched.setattr(ground, "SAVE_EVERY", 10)
        patched.setattr(ground, "score", lambda *_: sys.exit(7))
        assert cli("ground.py", *flags, "--results", "other")[0] == 7 and (here / "runs/ground/layerwise_30_s0.pt").exists()
    code, out, err = cli("ground.py", *flags, "--results", "other")
    assert code == 0 and "step 00000/" not in out and not (here / "runs/ground/layerwise_30_s0.pt").exists(), err
    again, = experiments.read_rows("other/ground.jsonl")
    assert again["bpb"] == row["bpb"] and again["curve"] == row["curve"]
    steps, step = [], ground.ReleaseMuon.step
    monkeypatch.setattr(ground.ReleaseMuon, "step", lambda self: steps.append([p.shape for p in self.param_groups[0]["params"]]) or step(self))
    code, _, err = cli("ground.py", *flags, "--muon", "release", "--results", "third")
    third, = experiments.read_rows("third/ground.jsonl")
    assert len(steps) == 30 and any(min(shape) < 16 for shape in steps[0])  # the gates are with it, and it moves them
    assert all(gate != 1 for gates in third["learned"]["gates"].values() for gate in gates.values())
    assert code == 0 and third["curve"][0] == row["curve"][0] and third["curve"][-1] != row["curve"][-1], err
    assert third["curve"][-1][1] == pytest.approx(row["curve"][-1][1], abs=0.1)
    assert_refused(cli("ground.py", "--num-iterations", 0), "--num-iterations")
    assert_refused(cli("ground.py", "--reference", "nowhere"), "nowhere", "--reference")
