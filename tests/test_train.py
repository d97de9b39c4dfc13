"""
train.py as a user meets it: real command lines on a tiny corpus, every variant and schedule, stopping and
resuming, two processes, and bad flags. cli() runs it in this process, shell() starts a real one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, assert_refused, cli, log, shell

import common
from checkpointing import find_checkpoint, load_checkpoint
from dataset import Rows
from train import recent_losses

TORCHRUN = Path(sys.executable).parent / "torchrun"


def train(data, *flags):
    """Train a small model, in this process, to the end; what it printed."""
    size = [] if "--resume" in flags else SMALL
    code, out, err = cli("train.py", "--data", data, *size, *flags)
    assert code == 0, err
    return out

def torchrun(n_processes, *flags):
    """train.py in so many processes, to the end."""
    launcher = str(TORCHRUN), "--standalone", f"--nproc_per_node={n_processes}", ROOT / "train.py"
    done = shell(*launcher, *flags)
    assert done.returncode == 0, done.stderr

def start(*flags):
    """train.py in a process of its own; its stdout is a pipe."""
    command = [sys.executable, ROOT / "train.py", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=env)

def losses(folder):
    return [row["loss"] for row in log(folder)]


# -----------------------------------------------------------------------------
# The main job

def test_training_end_to_end(trained):
    folder, out = trained
    run = folder / "runs/d2_shared"
    assert len(losses(run)) == 150
    assert losses(run)[0] > 6
    assert sum(losses(run)[-10:]) / 10 < 4.5

    evals = log(run, "eval")
    assert [row["step"] for row in evals] == [0, 50, 100, 150]
    bpb = [row["bpb"]["merged"] for row in evals]
    assert bpb == sorted(bpb, reverse=True)
    last = evals[-1]["decode_rows"]
    assert abs(last["decode"] - last["merged"]) < 0.02
    # the memory is used; a run of seconds cannot show that it helps
    assert abs(last["no memory"] - last["decode"]) > 1e-3

    # what training made of the memory's path, at every evaluation
    learned = [row["learned"] for row in evals]
    assert learned[0]["c"] == pytest.approx([0.1, 0.1])
    assert learned[0]["gates"]["1"] == dict(local=1.0, memory=1.0, token=1.0)
    assert learned[-1]["c"] != learned[0]["c"]
    assert learned[-1]["gates"]["1"]["memory"] != 1.0
    assert out.count("| learned, by layer: a ") == out.count("| mean gates: local ") == len(evals)
    sample, = log(run, "sample")
    assert sample["step"] == 150
    assert sample["text"] in out

    assert [path.name for path in sorted(run.glob("ckpt*"))] == ["ckpt_0000100.pt", "ckpt_0000150.pt"]
    assert not list(run.glob("*.tmp"))
    for words in ("parameters", "memory from layer 1, interleaved, 3 passes", "tok/sec", "eta",
                  "a sample, memory carried"):
        assert words in out

@pytest.mark.parametrize("flags", [
    "--lrt none",
    "--lrt layerwise --n-kv-head 1 --value-embeds alternate",
    "--lrt layerwise --schedule draft --subsets 2 --dest-layers 1 1",
    "--subsets 3 --kv-refresh --inject kv",
    "--subsets 1 --device-batch-size 4 --grad-clip 0 --warmup-steps 0 --final-lr-frac 0.1",
    "--subsets 99 --max-seq-len 31 --total-batch-size 496",
    "--schedule refine --refinements 2 --detach --loss-weights 1 1 2",
    "--schedule draft --drafts 2 --inject input",
    "--schedule chunked --chunk 7 --inject residual",
    "--schedule sequential --value-embeds none --source-layer 0",
    "--activation-checkpointing --loss-weights 1 2 3",
    "--schedule plain --first-memory embedding --inject kv",
    "--schedule draft --first-memory embedding --pass-mix 1 1 1",
])
def test_every_variant_and_schedule_trains(flags, data, here):
    train(data, "--num-iterations", 3, "--eval-tokens", 256, "--decode-tokens", 64, "--name", "x",
          *flags.split())
    first, *_, last = log("runs/x", "eval")
    assert last["bpb"]["merged"] < first["bpb"]["merged"]
    assert cli("sample.py", "--max-new-tokens", 3)[0] == 0

def test_horizon(data, here):
    """From the parameters, or from FLOPs; a second run gets a folder of its own."""
    brief = "--eval-tokens 64 --decode-tokens 0".split()
    out = train(data, *brief, "--target-param-data-ratio", 0.2)
    assert "0.2 a parameter" in out
    out = train(data, *brief, "--target-flops", 1e9)
    flops = float(out.split(" FLOPs")[0].splitlines()[-1])
    assert 0.8e9 < flops < 1.2e9  # whole steps
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["d2_shared", "d2_shared_2"]

def test_a_run_goes_on_in_its_dtype(data, here, monkeypatch):
    """Whatever is fast on the machine where it is resumed. Runs from before --dtype were float32 on CPUs."""
    train(data, "--num-iterations", 2, "--save-every", 1, "--dtype", "bfloat16", "--name", "x")
    checkpoint = torch.load("runs/x/ckpt_0000001.pt")
    assert checkpoint["args"]["dtype"] == "bfloat16"
    Path("runs/x/ckpt_0000002.pt").unlink()
    train(data, "--resume", "runs/x")
    assert torch.load("runs/x/ckpt_0000002.pt")["args"]["dtype"] == "bfloat16"

    Path("runs/x/ckpt_0000002.pt").unlink()
    del checkpoint["args"]["dtype"]
    torch.save(checkpoint, "runs/x/ckpt_0000001.pt")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    train(data, "--resume", "runs/x")
    assert torch.load("runs/x/ckpt_0000002.pt")["args"]["dtype"] == "float32"

def test_the_last_steps_draft_once_more(data, here):
    """Evaluations and checkpoints go by the schedule of the last step that was trained."""
    train(data, "--num-iterations", 12, "--schedule", "draft", "--eval-every", 9, "--save-every", 9,
          "--name", "x")
    assert [len(row["passes"]) for row in log("runs/x")] == [2] * 9 + [3] * 3

    evaluated_passes = []
    for row in log("runs/x", "eval"):
        evaluated_passes.append([name for name in row["bpb"] if name.startswith("pass")])
    assert [names[-1] for names in evaluated_passes] == ["pass 1", "pass 1", "pass 2"]

    for step, depth in ((9, 1), (12, 2)):
        schedule = load_checkpoint(f"runs/x/ckpt_{step:07d}.pt")["schedule"]
        assert schedule["drafts"] == depth


# -----------------------------------------------------------------------------
# --init-from: a new run with the weights of another

def final_bpb(name):
    return log(f"runs/{name}", "eval")[-1]["bpb"]["merged"]

@pytest.mark.parametrize("flags", [
    "--lrt shared",
    "--lrt layerwise --inject kv --dest-layers 1 1 --schedule draft",
    "--lrt shared --inject input --first-memory embedding",
    "--lrt none --max-seq-len 64 --total-batch-size 512",
])
def test_memory_is_added_to_a_trained_model(flags, data, here):
    """At first it computes what the plain model does; then its new matrices learn."""
    plain = "--lrt none --value-embeds alternate --num-iterations 4 --eval-tokens 256 --decode-tokens 64"
    train(data, *plain.split(), "--name", "plain")
    train(data, "--init-from", "runs/plain", "--num-iterations", 3, "--eval-tokens", 256, "--decode-tokens",
          64, "--name", "x", *flags.split())
    config = load_checkpoint("runs/x/ckpt_0000003.pt")["config"]
    assert config["value_embeds"] == "alternate"  # a flag of the other run
    first, *_, last = log("runs/x", "eval")
    if config["sequence_len"] == 32:
        assert first["bpb"]["merged"] == pytest.approx(final_bpb("plain"), abs=1e-5)
    assert last["bpb"]["merged"] < first["bpb"]["merged"] - 0.005
    weights = load_checkpoint("runs/x/ckpt_0000003.pt")["model"]
    assert all(weights[name].abs().max() > 0 for name in weights if name.startswith("mem_"))

def test_a_run_that_began_with_other_weights_goes_on(data, here):
    """The other run is not read again: it may be gone."""
    brief = ["--eval-tokens", 64, "--decode-tokens", 0]
    train(data, "--lrt", "none", "--num-iterations", 2, *brief, "--name", "plain")
    begin = [*SMALL, "--init-from", "runs/plain", "--lrt", "shared", "--num-iterations", 4, "--save-every", 2,
             *brief, "--resume", "auto"]
    train(data, *begin, "--name", "whole")
    train(data, *begin, "--name", "x")
    Path("runs/x/ckpt_0000004.pt").unlink()
    shutil.rmtree("runs/plain")
    train(data, *begin, "--name", "x")
    ours, theirs = (load_checkpoint(f"runs/{name}/ckpt_0000004.pt")["model"] for name in ("x", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

def test_what_init_from_refuses(data, here):
    train(data, "--num-iterations", 1, "--eval-tokens", 64, "--decode-tokens", 0, "--name", "x")
    for flags, words in [
        ("--lrt none", ["which this model lacks", "memory can be added"]),
        ("--depth 3", ["has no", "leave out the flags"]),
        ("--aspect-ratio 32", ["leave out the flags"]),
        ("--value-embeds none", ["which this model lacks"]),
        ("--resume runs/x", ["--init-from None"]),
    ]:
        refused = cli("train.py", "--data", data, "--init-from", "runs/x", *flags.split())
        assert_refused(refused, *words)
    assert_refused(cli("train.py", "--data", data, "--init-from", "nowhere"), "no such run or checkpoint")
    path = Path("runs/x/ckpt_0000001.pt")
    checkpoint = torch.load(path)
    torch.save(checkpoint | dict(tokenizer_sha256="0" * 64), path)
    refused = cli("train.py", "--data", data, "--init-from", "runs/x")
    assert_refused(refused, "another tokenizer")


# -----------------------------------------------------------------------------
# Two processes, and interruptions (many more in test_faults.py)

TWENTY = [*SMALL, "--num-iterations", 20, "--device-batch-size", 4, "--eval-every", 10, "--save-every", 10]

@pytest.fixture(scope="module")
def on_two(data, tmp_path_factory):
    """The folder of a run of 20 steps on two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    torchrun(2, "--data", data, *TWENTY, "--out", folder, "--name", "x")
    return folder / "x"

def test_two_processes_train_like_one(data, here, on_two):
    torchrun(1, "--data", data, *TWENTY, "--name", "on_one")
    assert len(losses(on_two)) == 20
    for one, two in zip(losses("runs/on_one"), losses(on_two), strict=True):
        assert abs(one - two) < 1e-4
    one, two = (log(folder, "eval")[-1] for folder in ("runs/on_one", on_two))
    for where in ("bpb", "decode_rows"):
        assert one[where] == pytest.approx(two[where], abs=1e-4)

def test_two_processes_resume(here, on_two):
    """
    At a step that was evaluated, too, where all ranks must agree on what is left to do. Then the run is like
    one that was not interrupted.
    """
    shutil.copytree(on_two, "runs/x")
    Path("runs/x/ckpt_0000020.pt").unlink()
    torchrun(2, "--resume", "runs/x")
    assert losses("runs/x") == losses(on_two)
    assert log("runs/x", "eval") == log(on_two, "eval")

SIXTY = [*SMALL, "--num-iterations", 60, "--eval-every", 20]

@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run of 60 steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = shell("train.py", "--data", data, *SIXTY, "--out", folder, "--name", "x")
    assert done.returncode == 0, done.stderr
    return folder / "x"

def test_a_stopped_run_goes_on_as_if_it_had_not(data, here, whole):
    """
    SIGTERM at some step: it ends with 0 and says how to go on; then losses and weights are those of one long
    run, bit for bit.
    """
    process = start("--data", data, *SIXTY, "--name", "cut")
    for line in process.stdout:
        if line.startswith("step 00010/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0
    assert "go on with: python train.py --resume runs/cut" in rest
    assert 10 < len(losses("runs/cut")) < 60

    done = shell("train.py", "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert losses("runs/cut") == losses(whole)
    assert log("runs/cut", "eval") == log(whole, "eval")
    ours, theirs = (load_checkpoint(find_checkpoint(folder))["model"] for folder in ("runs/cut", whole))
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert torch.equal(weights, theirs[name]), name

def test_a_killed_run_goes_on_from_its_last_checkpoint(data, here, whole):
    process = start("--data", data, *SIXTY, "--save-every", 5, "--name", "cut")
    for line in process.stdout:
        if line.startswith("saved"):
            break
    process.kill()
    process.wait()
    done = shell("train.py", "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert losses("runs/cut") == losses(whole)

    # a finished run has nothing left to do
    code, _, err = cli("train.py", "--resume", "runs/cut")
    assert code == 0, err
    assert len(losses("runs/cut")) == 60

def test_a_run_is_trained_by_one_at_a_time(trained, here):
    shutil.copytree(trained[0] / "runs/d2_shared", "runs/x")
    held = common.lock("runs/x", "test")
    assert_refused(cli("train.py", "--resume", "runs/x"), "another training is writing runs/x")
    held.close()
    assert cli("train.py", "--resume", "runs/x")[0] == 0

def test_a_run_sees_every_row_once(data, here, monkeypatch):
    """Steps and their micro-batches take the rows one after the other, without gaps or repetition."""
    seen = []
    batch = Rows.batch

    def noting(self, first, count, device):
        seen.extend(range(first, first + count))
        return batch(self, first, count, device)

    monkeypatch.setattr(Rows, "batch", noting)
    train(data, "--num-iterations", 3, "--device-batch-size", 2, "--eval-every", 0)
    assert seen == list(range(3 * 16 + 2))  # the first micro-batch of the next step is always loaded


# -----------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing half-written

@pytest.mark.parametrize("flags, words", [
    # numbers
    ("--depth 0", ["--depth must be a number of at least 1, not 0"]),
    ("--depth x", ["invalid int value"]),
    ("--subsets 0", ["--subsets must be a number of at least 1"]),
    ("--num-iterations 0", ["--num-iterations must be a number of at least 1"]),
    ("--head-dim 0", ["--head-dim must be a number of at least 1"]),
    ("--matrix-lr -1", ["--matrix-lr must be a number of at least 0"]),
    ("--embedding-lr nan", ["--embedding-lr must be a number of at least 0, not nan"]),
    ("--target-flops inf", ["--target-flops must be a number"]),
    ("--seed 99999999999999999999999", ["--seed must be a number"]),
    ("--warmdown-ratio 2", ["--warmdown-ratio must be at most 1"]),
    ("--depth 1000000000", ["--depth must be at most 1000"]),
    ("--head-dim 1000000000000", ["--head-dim must be at most 100000"]),
    ("--refinements 1000000000 --schedule refine", ["--refinements must be at most 1000"]),
    ("--target-flops 1e300", ["--target-flops must be at most 1e+30"]),
    ("--max-seq-len 0", ["--max-seq-len must be a number of at least 1"]),
    ("--memory-init nan", ["memory_init must be a number, not nan"]),
    ("--memory-init=-1e308", ["memory_init -1e+308 is larger than 1000000"]),
    ("--matrix-lr 1e308", ["--matrix-lr must be at most 1e+38"]),
    ("--final-lr-frac 1e308", ["--final-lr-frac must be at most 1000000"]),
    # the model
    ("--lrt both", ["invalid choice: 'both'"]),
    ("--source-layer 2", ["source_layer 2 is out of range", "0 to 1"]),
    ("--source-layer -1", ["source_layer -1 is out of range"]),
    ("--n-kv-head 3", ["not divisible by n_kv_head 3"]),
    ("--window-pattern XL", ["letters S and L"]),
    ("--aspect-ratio 1000000000", ["no model of width 2000000000 can be built"]),
    # the schedule
    ("--schedule chunked --chunk 32", ["--chunk 32 covers the whole context"]),
    ("--schedule chunked --kv-refresh", ["kv_refresh goes with the interleaved schedule"]),
    ("--loss-weights 1 2", ["2 loss weights for 3 passes"]),
    ("--schedule plain --lrt shared", ["--schedule plain", "--first-memory embedding"]),
    ("--lrt none --first-memory embedding", ["first_memory embedding goes with an LRT"]),
    ("--loss-weights -1 1 1", ["not negative"]),
    ("--loss-weights nan 1 1", ["must be finite"]),
    ("--drafts 0", ["--drafts must be a number of at least 1"]),
    ("--schedule draft --loss-weights 1 1", ["loss weights do not go with draft"]),
    ("--pass-mix 1 1", ["--pass-mix goes with --schedule draft, not with interleaved"]),
    ("--schedule draft --pass-mix 1 1", ["--first-memory embedding"]),
    ("--schedule draft --first-memory embedding --pass-mix 1 -1", ["--pass-mix 1.0 -1.0", "not negative"]),
    ("--schedule draft --first-memory embedding --pass-mix 0 0", ["not all 0"]),
    ("--schedule draft --first-memory embedding --pass-mix 1 nan", ["--pass-mix 1.0 nan"]),
    ("--dest-layers 1 2", ["dest_layers 1 2 are no range of the layers 0 to 1"]),
    ("--dest-layers 0 1 --inject input", ["dest_layers do not go with inject input"]),
    # batch and data
    ("--total-batch-size 500", ["--total-batch-size 500", "not divisible", "32 tokens a row"]),
    ("--total-batch-size 512 --device-batch-size 3", ["--device-batch-size 3", "16 rows"]),
    ("--total-batch-size 33554432", ["training rows of 32 tokens", "less than one batch of 1048576"]),
    ("--max-seq-len 131072 --total-batch-size 131072",
     ["no validation shard of more than 131072 tokens", "one row"]),
    ("--data nowhere", ["no prepared data in nowhere", "prepare_data.py"]),
    ("--data nowhere --name caf\udce9", ["not UTF-8", "--name"]),
    ("--data nowhere --out /dev/null/x", ["/dev/null is no folder"]),  # before any data is read
    ("--data nowhere --out link", ["link is no folder"]),  # a link to nowhere
    # the rest
    ("--unknown", ["unrecognized arguments"]),
    ("--out=", ["the argument for out is empty"]),
    ("--device tpu", ["device 'tpu' cannot be used here"]),
    ("--device meta", ["device 'meta' cannot be used here"]),
    ("--resume nowhere", ["no such run or checkpoint: nowhere"]),
])
def test_bad_flags(flags, words, data, here):
    (here / "link").symlink_to("nowhere")
    assert_refused(cli("train.py", "--data", data, *SMALL, "--num-iterations", 2, *flags.split()), *words)
    assert not (here / "runs").exists()

def test_a_horizon_that_resume_would_refuse(data, here):
    for flags in (["--target-flops", "1e30"], ["--target-param-data-ratio", "1e6", "--depth", "40"]):
        result = cli("train.py", "--data", data, *SMALL, *flags)
        assert_refused(result, "the horizon is ", " steps, at most 1000000000 can be: lower --target-flops")
    assert not (here / "runs").exists()

def test_losses_in_a_log_that_are_none(here):
    """A log may be edited: a spike is compared with the numbers that are there."""
    losses = ['"loss": 3.5', '"lost": 1', '"loss": null', '"loss": "x"', '"loss": [1]', '"loss": NaN',
              f'"loss": {10**400}', '"loss": 3']
    Path("log.jsonl").write_text("".join(f'{{"kind": "train", "step": 1, {x}}}\n' for x in losses))
    assert recent_losses(here) == [3.5, 3]

@pytest.mark.parametrize("script, words", [
    ("train.py", ["no prepared data in data", "prepare_data.py"]),
    ("sample.py", ["no run in runs/", "train.py"]),
    ("eval_core.py", ["no run in runs/"]),
])
def test_no_data_and_no_run(script, words, here):
    """A newcomer's first mistakes, in real processes."""
    done = shell(script)
    assert_refused((done.returncode, done.stdout, done.stderr), *words)
    assert list(here.iterdir()) == []

def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(data, here):
    result = cli("train.py", "--data", data, *SMALL, "--num-iterations", 40, "--save-every", 1,
                 "--eval-every", 0, "--embedding-lr", "1e38", "--name", "x")
    assert_refused(result, "the last good checkpoint is runs/x/ckpt_", "--matrix-lr")
    assert all(map(np.isfinite, losses("runs/x")))
    last = load_checkpoint(find_checkpoint("runs/x"))["step"]
    assert last == len(losses("runs/x"))  # the weights that the last finite step left


# -----------------------------------------------------------------------------
# A run is not resumed as another

@pytest.fixture
def run(trained, here):
    """A copy of the trained run, as the folder `run`."""
    shutil.copytree(trained[0] / "runs/d2_shared", "run")
    return "run"

@pytest.mark.parametrize("name", ["sweep/a", "a/", "./a", "../a"])
def test_the_same_command_goes_on_with_a_name_of_several_parts(name, data, here):
    command = ["train.py", "--data", data, *SMALL, "--name", name, "--num-iterations", 1, "--resume", "auto"]
    for _ in range(2):
        code, _, err = cli(*command)
        assert code == 0, err
    assert_refused(cli(*command, "--seed", 1), "was trained with --seed 0")

def test_flags_of_another_run(run, data):
    assert_refused(cli("train.py", "--resume", run, "--depth", 3), "was trained with --depth 2")
    assert_refused(cli("train.py", "--resume", run, "--lrt", "none", "--seed", 1), "--lrt shared", "--seed 0")
    assert_refused(cli("train.py", "--resume", run, "--name", "other"), "--name run")
    taken = cli("train.py", "--data", data, *SMALL, "--out", ".", "--name", run)
    assert_refused(taken, "run exists", "--resume run")

def test_other_training_shards(run, data):
    shutil.copytree(data, "shorter")
    shard = Path("shorter/train_00000.npy")
    np.save(shard, np.load(shard)[:20000])
    meta = json.loads(Path("shorter/meta.json").read_text())
    meta["train"][0] |= {"tokens": 20000, "sha256": common.sha256_file(shard)}
    Path("shorter/meta.json").write_text(json.dumps(meta))
    assert_refused(cli("train.py", "--resume", run, "--data", "shorter"), "other training shards")

def test_another_tokenizer(run, here):
    (here / "text.txt").write_text(Path(json.__file__).read_text() * 3)
    assert cli("prepare_data.py", "text.txt", "--vocab-size", 300, "--out", "other")[0] == 0
    assert_refused(cli("train.py", "--resume", run, "--data", "other"), "another tokenizer")
    assert_refused(cli("eval_core.py", "--checkpoint", run, "--data", "other"), "another tokenizer")

def edit_args(folder, **flags):
    """Add flags to the args of a run's newest checkpoint, as another version of train.py would have."""
    path = find_checkpoint(folder)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["args"] |= flags
    torch.save(checkpoint, path)

@pytest.mark.parametrize("flags, words", [
    (dict(dropout=0.1), "--dropout 0.1"),  # never known
    (dict(memory_start=0.25), "--memory-start 0.25"),  # known once, and used
    (dict(memory_start=0.0, memory_share=0.5), "--memory-share 0.5"),
])
def test_flags_that_train_py_does_not_know(flags, words, run):
    edit_args(run, **flags)
    assert_refused(cli("train.py", "--resume", run), f"was trained with {words}", "no longer has")

def test_removed_flags_at_their_default_are_no_obstacle(run):
    edit_args(run, memory_start=0.0, memory_share=1.0)
    code, _, err = cli("train.py", "--resume", run)
    assert code == 0 and err == "", err
