"""Sets of runs and their rows: complete, not written twice, of runs that were interrupted, and drawn."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, assert_refused, cli, log, shell

import train
from checkpointing import find_checkpoint
from common import UserError, flag, read_rows
from eval_core import recurrent_losses
from flags import make_parser
from model import GPT, GPTConfig
from plan import make_plan
from research import experiments, plot, reproduction, states

RUN = " ".join([
    "train.py", *SMALL, "--eval-every 0 --eval-tokens 64 --decode-tokens 0 --save-every 5 --keep 1"])
SMALL_SETS = dict(
    scaling={
        "none_6": f"{RUN} --lrt none --num-iterations 6",
        "shared_6": f"{RUN} --lrt shared --num-iterations 6",
    },
    cheaper={"forward_6": f"{RUN} --lrt shared --num-iterations 6 --schedule draft --subsets 2"},
    ablation={"shared": f"{RUN} --lrt shared --num-iterations 6"},
)


@pytest.fixture
def replace_sets(monkeypatch):
    """A function that puts sets of the test in the place of the real ones."""
    monkeypatch.setattr(experiments, "ROWS", 8)
    return lambda **sets: monkeypatch.setattr(experiments, "SETS", sets)


# -----------------------------------------------------------------------------
# The sets

@pytest.mark.parametrize("name", experiments.SETS)
def test_every_run_is_a_command_that_its_script_takes(name, monkeypatch):
    for run_name, command in experiments.SETS[name].items():
        script, *flags = command.replace("--init-from @base", "").split()  # there is no such run here
        monkeypatch.setattr(sys, "argv", [script, *flags])
        if script == "research.states":
            args = states.parse_args()
            assert run_name == states.run_name(args, states.make_schedule(args))
        elif script == "research.reproduction":
            args = reproduction.parse_args()
            ending = "_release_muon" if args.muon == "release" else ""
            assert run_name == f"{args.lrt}_{args.num_iterations}{ending}"
        else:
            assert script == "train.py"
            plan = make_plan(train.parse_args()[0], 4096, 1, torch.float32)
            assert plan.config.n_embd == {"longer": 64, "larger": 256}.get(name, 128), run_name
            assert plan.micro_steps == 1, run_name

@pytest.mark.parametrize("old, new", [
    ("python ground.py --lrt none --num-iterations 1000 --compile",
     "python -m research.reproduction --lrt none --num-iterations 1000 --compile"),
    ("python ground.py --lrt none --seed 1 --results results",
     "python -m research.reproduction --lrt none --seed 1 --results=research/results"),
    ("python states.py --task s5 --json results/states.jsonl --seed 1",
     "python -m research.states --task s5 --seed 1 --json research/results/states.jsonl"),
    ("python train.py --depth 4 --name 'a b'", "python train.py --depth 4 --name 'a b'"),
])
def test_old_and_new_spelling_of_the_same_run(old, new):
    assert experiments.same_run(old, new)
    assert experiments.same_run(new, old)

@pytest.mark.parametrize("one, other", [
    ("python ground.py --lrt none", "python -m research.reproduction --lrt layerwise"),
    ("python ground.py --lrt none", "python -m research.states --lrt none"),
    ("python ground.py --lrt none", "python ground.py --lrt none --seed 1"),
    ("python train.py --depth 4", "python train.py --depth 5"),
])
def test_different_runs(one, other):
    assert not experiments.same_run(one, other)

def test_all_rows_of_the_reproduction_are_found(here):
    """Their flags, behind the name of the script of today."""
    rows = read_rows(ROOT / "research/results/reproduction.jsonl")
    assert len(rows) >= 10
    for row in rows:
        script, *flags = experiments.script_and_flags(row["command"])
        assert script == "research.reproduction"
        code, out, err = cli("research.reproduction", *flags, "--results", ROOT / "research/results")
        assert code == 0, err
        assert "has a row of python -m research.reproduction" in out


# -----------------------------------------------------------------------------
# Running a set

@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """A folder in which the sets scaling and cheaper of SMALL_SETS have run."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(experiments, "ROWS", 8)
        patch.setattr(experiments, "SETS", SMALL_SETS)
        code, out, err = cli("research.experiments", "scaling", "cheaper", "--data", data, "--seeds", 0,
                             "--jobs", 2)
    assert code == 0, out + err
    assert "3 runs to do, 0 done" in out
    return folder

@pytest.fixture
def in_ran(ran, replace_sets, monkeypatch):
    """The same folder as the working directory, with the same sets."""
    monkeypatch.chdir(ran)
    replace_sets(**SMALL_SETS)
    return ran

def rows_of(set_name):
    return {row["name"]: row for row in read_rows(f"research/results/{set_name}.jsonl")}

def test_rows_are_complete(in_ran):
    rows = rows_of("scaling")
    assert set(rows) == {"none_6", "shared_6"}
    none, shared = rows["none_6"], rows["shared_6"]
    assert shared["tokens"] == none["tokens"] == none["compute"] == 6 * 512
    assert shared["compute"] == 2 * shared["tokens"]
    assert none["bpb"]["merged"] == pytest.approx(none["bpb"]["decode"])
    assert set(shared["bpb"]) == {"pass 0", "pass 1", "pass 2", "merged", "decode", "no memory"}
    assert len(shared["by_position"]["no memory"]) == 16
    assert len(shared["learned"]["c"]) == 2
    assert set(shared["learned"]["gates"]["1"]) == {"local", "memory", "token"}
    assert 0 < shared["copying"]["share"] < 1
    assert none["copying"]["share"] == shared["copying"]["share"]
    assert none["curve"][0][2] is None
    assert shared["curve"][0][2] == pytest.approx(none["curve"][0][1], abs=0.1)
    assert len(shared["curve"]) == 6
    assert plot.variant(shared) == "shared"

def test_the_row_of_a_run_with_a_pass_without_loss(in_ran):
    forward = rows_of("cheaper")["forward_6"]
    flags = forward["command"].split()[2:]
    plan = make_plan(make_parser().parse_args(flags), 512, 1, torch.float32)
    assert forward["flops"] == pytest.approx(plan.flops_per_token * forward["tokens"])
    assert plot.variant(forward) == "shared --schedule draft --subsets 2"
    # no loss, and no NaN in JSON
    logged = log("runs/experiments/cheaper/forward_6_s0")
    assert [row["passes"][0] is None for row in logged] == [True] * 6
    assert [x is None for x in forward["curve"][5]] == [False, True, False]

def test_the_command_in_a_row_is_the_run(in_ran, tmp_path):
    """Without the runner it trains the same model."""
    flags = rows_of("scaling")["shared_6"]["command"].split()[2:]
    code, _, err = cli("train.py", *flags, "--out", tmp_path)
    assert code == 0, err
    again, first = log(tmp_path / "shared_6_s0"), log("runs/experiments/scaling/shared_6_s0")
    assert [row["loss"] for row in again] == [row["loss"] for row in first]

def test_a_run_that_has_a_row_is_not_run_again(in_ran, data):
    code, out, _ = cli("research.experiments", "scaling", "cheaper", "--data", data, "--seeds", 0)
    assert code == 0
    assert "0 runs to do, 3 done" in out
    assert len(read_rows("research/results/scaling.jsonl")) == 2
    _, out, _ = cli("research.experiments", "--data", data, "--seeds", 0, "--list")
    assert [line.startswith("done") for line in out.splitlines()] == [True, True, True, False]

def test_rows_are_drawn(in_ran):
    code, out, err = cli("research.plot")
    assert code == 0, err
    assert "| shared_6 | 1 |" in out
    without_values = rows_of("scaling")["shared_6"]["copying"]["without"]["values"]
    assert f"| shared_6 | values | {without_values['repeated']:.3f} |" in out
    for name in ("scaling", "curves", "learned"):
        assert (in_ran / f"research/results/{name}.png").stat().st_size > 5000

def test_a_run_that_was_interrupted_goes_on(data, here, replace_sets):
    replace_sets(scaling={"shared_40": f"{RUN} --lrt shared --num-iterations 40"})
    results = Path("research/results/scaling.jsonl")
    console = here / "runs/experiments/scaling/shared_40_s0.txt"

    def stop_at_step_10():
        deadline = time.time() + 120
        while time.time() < deadline:
            if console.exists() and "step 00010/" in console.read_text():
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    flags = ["--data", data, "--seeds", 0, "--jobs", 2]  # a thread each
    threading.Thread(target=stop_at_step_10).start()
    code, out, err = cli("research.experiments", *flags)
    assert code == 1, out + err
    assert "goes on" in out
    assert not results.exists()

    code, out, err = cli("research.experiments", *flags)
    assert code == 0, out + err
    row, = read_rows(results)
    assert row["steps"] == 40
    assert console.read_text().count("step 00020/") == 1
    assert len(log("runs/experiments/scaling/shared_40_s0")) == 40

@pytest.mark.parametrize("flags, words", [
    ("nonsense", ["nonsense", "scaling"]),
    ("scaling --data nowhere", ["nowhere", "prepare_data.py"]),
    ("--jobs 0", ["--jobs"]),
    ("scaling --only shared_7", ["shared_7", "--list"]),
])
def test_bad_flags(flags, words, here):
    assert_refused(cli("research.experiments", *flags.split()), *words)

def test_a_run_that_fails(data, here, replace_sets):
    replace_sets(scaling={"bad": f"{RUN} --lrt shared --num-iterations 5"})
    code, out, _ = cli("research.experiments", "--data", data, "--seeds", 0, "--jobs", 2,
                       "--extra", "--depth 0")
    assert code == 1
    assert "exit code 2" in out
    assert "--depth" in Path("runs/experiments/scaling/bad_s0.txt").read_text()


# -----------------------------------------------------------------------------
# Scoring

def test_a_deepened_run_is_scored_by_its_last_steps(data, here, monkeypatch):
    """Whether it was trained in one process or in two."""
    monkeypatch.setattr(experiments, "ROWS", 8)
    torchrun = str(Path(sys.executable).parent / "torchrun")
    flags = ["--schedule", "draft", "--num-iterations", 12, "--device-batch-size", 4]
    for n in (1, 2):
        done = shell(torchrun, "--standalone", f"--nproc_per_node={n}", ROOT / "train.py",
                     "--data", data, *SMALL, "--name", f"on{n}", *flags)
        assert done.returncode == 0, done.stderr
        assert "pass 2" in experiments.finished(f"runs/on{n}")["bpb"]
    one, two = log("runs/on1"), log("runs/on2")
    assert [len(row["passes"]) for row in one] == [2] * 9 + [3] * 3
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4

def edit_args(folder, **args):
    """Change the flags in a run's checkpoint."""
    path = find_checkpoint(folder)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"] |= args
    torch.save(checkpoint, path)

def test_runs_with_flags_that_left_are_scored_where_they_had_no_effect(data, here, monkeypatch):
    monkeypatch.setattr(experiments, "ROWS", 8)
    assert cli("train.py", "--data", data, *SMALL, "--num-iterations", 1, "--name", "x")[0] == 0
    row = experiments.finished("runs/x")
    edit_args("runs/x", memory_start=0.0, memory_share=1.0)
    assert experiments.finished("runs/x") == row
    for name, used, without_effect in (("memory_share", 0.5, 1.0), ("memory_start", 0.25, 0.0)):
        edit_args("runs/x", **{name: used})
        with pytest.raises(UserError, match=f"{flag(name)} {used}, which train.py no longer has"):
            experiments.finished("runs/x")
        edit_args("runs/x", **{name: without_effect})
    edit_args("runs/x", never_known=1)
    with pytest.raises(UserError, match="--never-known 1"):
        experiments.finished("runs/x")

def tiny_model(**options):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, **options)
    return GPT(config)

COPIED_IDX = torch.tensor([[1, 2, 3, 1, 2, 3, 3], [1, 2, 1, 3, 2, 1, 3]])
COPIED_TARGETS = torch.tensor([[2, 3, 1, 2, 3, 3, 1], [2, 1, 3, 2, 1, 3, 0]])

def test_repeated_pairs():
    seen = []
    for row, targets in zip(COPIED_IDX.tolist(), COPIED_TARGETS.tolist()):
        pairs = list(zip(row, targets))
        seen.append([pairs[p] in pairs[:p] for p in range(7)])
    assert experiments.repeated(COPIED_IDX, COPIED_TARGETS).tolist() == seen
    assert sum(map(sum, seen)) == 5

@pytest.mark.parametrize("lrt, inject, parts", [
    ("none", "both", []),
    ("shared", "both", ["keys", "values", "residual"]),
    ("layerwise", "kv", ["keys 0", "keys 1", "values"]),
    ("layerwise", "residual", ["residual"]),
])
def test_copying(lrt, inject, parts):
    model = tiny_model(sequence_len=7, lrt=lrt, inject=inject)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rows = torch.cat([COPIED_IDX, COPIED_TARGETS[:, -1:]], dim=1)
    again = experiments.repeated(COPIED_IDX, COPIED_TARGETS)

    def means():
        losses = recurrent_losses(model, COPIED_IDX, COPIED_TARGETS).detach()
        return pytest.approx(dict(repeated=losses[again].mean().item(), new=losses[~again].mean().item()))

    # the whole model, which is left as it was
    found = experiments.copying(model, rows, batch_size=1)
    whole = {key: found[key] for key in ("repeated", "new")}
    assert whole == means()
    assert found["share"] == pytest.approx(again.float().mean().item())
    assert list(found["without"]) == parts
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])

    # without a part: as a model that never had it
    for part, losses in found["without"].items():
        kind, _, layer = part.partition(" ")
        off = {
            "keys": [f"mem_k.{layer or 0}.weight"],
            "values": [name for name in before if name.startswith("mem_v")],
            "residual": ["mem_lambdas"],
        }
        zeros = {name: torch.zeros_like(before[name]) for name in off[kind]}
        model.load_state_dict(before | zeros)
        assert losses == means(), part
        assert losses != whole, part
        model.load_state_dict(before)

def test_learned_reads_what_the_model_has():
    model = tiny_model(sequence_len=16, lrt="layerwise", value_embeds="alternate")
    idx = torch.randint(32, (2, 16))
    start = experiments.learned(model, idx)
    assert start["c"] == pytest.approx([0.1, 0.1])
    assert start["gates"] == {0: dict(local=1.0, memory=1.0), 1: dict(local=1.0, memory=1.0, token=1.0)}
    gate = model.h[1].attn.gate.weight
    with torch.no_grad():
        gate[2:4] = 1e4 * torch.randn(2, 16)  # the memory's: all open or shut
    gates = experiments.learned(model, idx)["gates"][1]
    assert gates["local"] == 1.0
    assert 0 <= gates["memory"] <= 2

def test_a_run_may_begin_with_the_model_of_another(replace_sets, monkeypatch):
    replace_sets(warm={"base": f"{RUN} --lrt none", "more": f"{RUN} --lrt none --init-from @base"})
    monkeypatch.setattr(sys, "argv", ["experiments.py", "warm", "--seeds", "3", "--out", "runs"])
    args = experiments.make_parser().parse_args()
    base, more = [run.command(args) for run in experiments.make_runs(args)]
    folder = f"{base[base.index('--out') + 1]}/{base[base.index('--name') + 1]}"
    assert more[more.index("--init-from") + 1] == folder == "runs/warm/base_s3"
