"""
The scripts as a user meets them: real command lines on a tiny corpus, resuming, two processes, benches, bad input.
cli() runs a script in this process where starting another would only cost time; shell() starts a real one.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import prepare_data
import sample

HERE = Path(__file__).parent
TINY = ["--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "32", "--window-pattern", "SL"]
SMALL = TINY + ["--total-batch-size", "512", "--eval-tokens", "2048", "--decode-tokens", "512", "--device", "cpu"]


def shell(script, *args, **env):
    command = [sys.executable, HERE / script, *args] if script.endswith(".py") else [script, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)

def cli(script, *args):
    """Run a script's main() here: (exit code, stdout, stderr)."""
    import contextlib
    import io
    out, err = io.StringIO(), io.StringIO()
    argv, handlers = sys.argv, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            prepare_data.run_main(importlib.import_module(script.removesuffix(".py")).main)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, out.getvalue(), err.getvalue()

def log(folder, kind="train"):
    return [x for x in map(json.loads, open(Path(folder) / "log.jsonl")) if x["kind"] == kind]

def assert_refused(result, *words):
    """Exit code 2 and one line on stderr that has these words."""
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


# -----------------------------------------------------------------------------
# The main job

@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder with one trained shared LRT in runs/."""
    folder = tmp_path_factory.mktemp("trained")
    done = shell("train.py", "--data", data, "--out", folder / "runs", "--lrt", "shared", *SMALL, "--num-iterations", 150,
                 "--eval-every", 50, "--save-every", 100)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout

def test_training_end_to_end(trained):
    folder, out = trained
    run = folder / "runs/d2_shared"
    losses = [x["loss"] for x in log(run)]
    assert len(losses) == 150 and losses[0] > 6 and sum(losses[-10:]) / 10 < 4.5
    evals = log(run, "eval")
    assert [x["step"] for x in evals] == [0, 50, 100, 150]
    bpb = [x["bpb"]["merged"] for x in evals]
    assert bpb == sorted(bpb, reverse=True)
    last = evals[-1]["decode_rows"]
    assert abs(last["decode"] - last["merged"]) < 0.02
    assert abs(last["no memory"] - last["decode"]) > 1e-3  # the memory is used; a run of seconds cannot show that it helps
    assert [p.name for p in sorted(run.glob("ckpt*"))] == ["ckpt_0000100.pt", "ckpt_0000150.pt"]
    assert not list(run.glob("*.tmp"))
    for words in ("parameters", "memory from layer 1, interleaved, 3 passes", "tok/sec", "eta", "a sample, memory carried"):
        assert words in out

def test_sampling(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    first = shell("sample.py", "--prompt", "def ", "--max-new-tokens", 30, "--seed", 3)
    assert first.returncode == 0 and first.stdout.startswith("def ") and "memory on" in first.stderr
    code, again, _ = cli("sample.py", "--checkpoint", "runs/d2_shared", "--prompt", "def ", "--max-new-tokens", 30, "--seed", 3, "--device", "cpu")
    assert code == 0 and again == first.stdout
    _, two, _ = cli("sample.py", "--prompt", "def ", "--max-new-tokens", 30, "--seed", 2, "--num-samples", 2)
    assert two.endswith("-" * 80 + "\n" + again)  # seeds 2 and 3
    _, other, _ = cli("sample.py", "--prompt", "def ", "--max-new-tokens", 30, "--seed", 4)
    _, without, _ = cli("sample.py", "--prompt", "def ", "--max-new-tokens", 30, "--seed", 3, "--no-memory")
    assert len({again, other, without}) == 3
    greedy = [cli("sample.py", "--prompt", "def ", "--max-new-tokens", 12, "--temperature", 0, "--seed", s)[1] for s in (1, 2)]
    assert greedy[0] == greedy[1]
    assert cli("sample.py", "--max-new-tokens", 3, "--top-k", 99999)[0] == 0  # above the vocabulary: all of it
    assert cli("sample.py", "--max-new-tokens", 500, "--temperature", "1e-30", "--top-p", 0.5)[0] == 0  # ends where the context ends
    special = cli("sample.py", "--prompt", "<|bos|>", "--max-new-tokens", 1)
    assert special[0] == 0 and special[1].startswith("<|bos|>")  # text, no control token

def test_many_prompts(trained, here):
    run = trained[0] / "runs/d2_shared"
    (here / "prompts.txt").write_text("def \n\nimport os\n")
    (here / "prompts.jsonl").write_text('{"prompt": "def "}\n{"prompt": "import os"}\n')
    flags = ["--checkpoint", run, "--num-samples", 2, "--max-new-tokens", 8, "--top-p", 0.9, "--seed", 5]
    for name in ("prompts.txt", "prompts.jsonl"):
        code, out, err = cli("sample.py", "--prompt-file", name, "--out", name + ".out", *flags)
        assert code == 0 and out == "", err
    rows = [json.loads(line) for line in open("prompts.txt.out")]
    assert rows == [json.loads(line) for line in open("prompts.jsonl.out")]
    assert [(r["prompt"], r["seed"]) for r in rows] == [("def ", 5), ("def ", 6), ("import os", 5), ("import os", 6)]
    code, out, _ = cli("sample.py", "--prompt", "import os", *flags)
    assert out == f"import os{rows[2]['text']}\n{'-' * 80}\nimport os{rows[3]['text']}\n"  # the same alone and in a batch
    (here / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    (here / "empty.txt").write_text("\n")
    (here / "long.txt").write_text("short\n" + "word " * 100 + "\n")
    assert_refused(cli("sample.py", "--prompt-file", "bad.jsonl", *flags), "bad.jsonl line 2")
    assert_refused(cli("sample.py", "--prompt-file", "empty.txt", *flags), "empty.txt has no prompts")
    assert_refused(cli("sample.py", "--prompt-file", "none.txt", *flags), "cannot read none.txt")
    assert_refused(cli("sample.py", "--prompt-file", "long.txt", "--out", "long.out", *flags), "prompt 2 has", "the context 32")
    assert_refused(cli("sample.py", "--prompt-file", "empty.txt", "--interactive", *flags), "--prompt-file goes without")
    assert not (here / "long.out").exists()

def test_interactive(trained):
    """A prompt loop: Ctrl-C goes on, a bad prompt too, Ctrl-D ends it."""
    process = subprocess.Popen([sys.executable, HERE / "sample.py", "--interactive", "--max-new-tokens", "5", "--checkpoint", trained[0] / "runs/d2_shared"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job's children ignore it
    assert process.stdout.read(2) == "> "
    time.sleep(0.5)  # a signal between the prompt and the read would wait for the read
    process.send_signal(signal.SIGINT)
    assert process.stdout.read(3) == "\n> "
    out, _ = process.communicate("def \n" + "word " * 100 + "\nimport\n", timeout=60)
    assert process.returncode == 0 and out.count("\n> ") == 3 and "error: prompt 1 has" in out, out

def test_eval_core(trained, here):
    code, out, err = cli("eval_core.py", "--checkpoint", trained[0] / "runs/d2_shared", "--rows", 8, "--decode-rows", 4, "--referee", "--json", "bpb.json")
    assert code == 0, err
    result = json.loads((here / "bpb.json").read_text())
    for split in ("train", "val"):
        bpb, decoded = result[split]["bpb"], result[split]["decode_bpb"]
        assert set(bpb) == {"pass 0", "pass 1", "pass 2", "merged"} and set(decoded) == set(bpb) | {"decode", "no memory", "token by token"}
        assert decoded["decode"] == pytest.approx(decoded["token by token"], rel=1e-5)
        assert decoded["no memory"] == pytest.approx(decoded["pass 0"], rel=1e-5)  # both have memory zero everywhere
        bits, n = (np.array(result[split]["by_position"][k]) for k in ("decode", "bytes"))
        assert bits.sum() / n.sum() == pytest.approx(decoded["decode"], abs=1e-4) and len(bits) == 32
    assert "positions" in out and "16 .. 31" in out

def test_bpb_is_nats_over_bytes():
    """A model that knows nothing: ln(V) nats a token; BOS targets do not count."""
    from eval_core import evaluate_bpb
    from interleave import Schedule
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(sequence_len=8, vocab_size=16, n_layer=1, n_head=1, n_kv_head=1, n_embd=8, lrt="shared"))
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = torch.randint(0, 16, (5, 9))
    n_bytes = torch.arange(16) % 4  # tokens 0, 4, 8, 12 have none
    targets = rows[:, 1:]
    expected = 4 * (n_bytes[targets] > 0).sum() / n_bytes[targets].sum()  # log2(16) bits each
    for batch_size in (1, 2, 5):
        bpb, _ = evaluate_bpb(model, rows, n_bytes, Schedule(), batch_size, decode=True, token_by_token=True)
        assert all(bpb[name] == pytest.approx(expected.item(), rel=1e-6) for name in ("merged", "decode", "token by token"))

@pytest.mark.parametrize("flags", [
    "--lrt none", "--lrt layerwise --n-kv-head 1 --value-embeds alternate", "--subsets 3 --kv-refresh --inject kv", "--schedule refine --refinements 2 --detach --loss-weights 1 1 2",
    "--schedule chunked --chunk 7 --inject residual", "--schedule sequential --value-embeds none --source-layer 0",
    "--activation-checkpointing --loss-weights 1 2 3", "--lrt layerwise --forward-passes 1", "--schedule refine --refinements 2 --forward-passes 2", "--subsets 1 --device-batch-size 4 --grad-clip 0 --warmup-steps 0 --final-lr-frac 0.1", "--subsets 99 --max-seq-len 31 --total-batch-size 496",
])
def test_every_variant_and_schedule_trains(flags, data, here):
    code, out, err = cli("train.py", "--data", data, *SMALL, "--num-iterations", 3, "--eval-tokens", 256, "--decode-tokens", 64, "--name", "x", *flags.split())
    assert code == 0, err
    assert log("runs/x", "eval")[-1]["bpb"]["merged"] < log("runs/x", "eval")[0]["bpb"]["merged"]
    assert cli("sample.py", "--max-new-tokens", 3)[0] == 0

def test_horizon_and_automatic_batch(data, here):
    for flags, words in ((["--target-param-data-ratio", "0.2"], "0.2 a parameter"), (["--target-flops", "1e9"], "FLOPs")):
        code, out, err = cli("train.py", "--data", data, *SMALL, *flags, "--eval-tokens", 64, "--decode-tokens", 0)
        assert code == 0 and words in out, err
    assert 0.8e9 < float(out.split(" FLOPs")[0].splitlines()[-1]) < 1.2e9  # whole steps
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["d2_shared", "d2_shared_2"]  # nothing is overwritten

def test_compiled_step_is_one_graph_and_the_same(data):
    """What --compile does on CUDA, here without a code generator: no graph break, no recompilation, the same gradients."""
    from interleave import Schedule, TrainStep
    from model import GPT, GPTConfig
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    config = dict(sequence_len=16, vocab_size=32, n_head=2, n_kv_head=1, n_embd=16, window_pattern="SL")
    for lrt, n_layer, schedule in (("shared", 2, Schedule()), ("layerwise", 1, Schedule(subsets=3, kv_refresh=True)), ("shared", 2, Schedule(forward_passes=1)),
                                   ("layerwise", 2, Schedule("refine", refinements=2, forward_passes=2)),
                                   ("shared", 2, Schedule("refine", refinements=1, loss_weights=[0, 1]))):  # the first pass's last layer has no gradient
        torch.manual_seed(0)
        step = TrainStep(GPT(GPTConfig(**config, lrt=lrt, n_layer=n_layer, source_layer=0)), schedule)
        for p in step.parameters():
            torch.nn.init.normal_(p, std=0.2)
        counter = CompileCounterWithBackend("aot_eager_decomp_partition")
        compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
        for seed in range(3):
            idx = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(seed))
            results = []
            for f in (step, compiled):
                step.zero_grad()
                loss, means = f(idx, idx, schedule.deeper() if schedule.kind == "refine" and seed else schedule)
                loss.backward()
                results.append([loss.detach(), means] + [p.grad.clone() for p in step.parameters()])
            for x, y in zip(*results):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, equal_nan=True)  # no loss where the weight is 0
        assert counter.frame_count == 1 + (schedule.kind == "refine")  # deeper: its own graph, once


@pytest.mark.parametrize("what", ["decode --depth 2 --width 64 --vocab-size 64 --context 8 12 --batch 1 2 --tokens 1", "prefill --subsets 1 2",
                                  "step --depth 3 --width 64 --vocab-size 64 --context 16 --batch 2 --subsets 2 --window-pattern SL"])
def test_benches_run(what, trained, here):
    run = ["--checkpoint", trained[0] / "runs/d2_shared"] if "prefill" in what else []
    code, out, err = cli("bench.py", *what.split(), "--repeats", 2, "--json", "bench.json", *run)
    assert code == 0, err
    result = json.loads((here / "bench.json").read_text())
    assert {"device", "commit", "date"} <= set(result) and len(result["rows"]) == {"decode": 16, "prefill": 2, "step": 6}[what.split()[0]]
    if "prefill" in what:
        assert all(row["error"] < 1e-4 and row["T"] == 32 for row in result["rows"])
    if "step" in what:
        *others, forward, refined = result["rows"]
        assert [(row["lrt"], row["S"], row["checkpointing"]) for row in others] == [("none", 0, False), ("shared", 2, False), ("layerwise", 2, False), ("shared", 2, True)]
        assert [(row["S"], row["forward_passes"]) for row in (forward, refined)] == [(2, 1), (1, 1)] and not any(row["forward_passes"] for row in others)
        assert all(row["peak_MiB"] > 0 and 1.9 < row["TFLOP"] / others[0]["TFLOP"] < 2.5 for row in others[1:])
        assert 1.1 < refined["TFLOP"] / others[0]["TFLOP"] < forward["TFLOP"] / others[0]["TFLOP"] < 1.7

def test_the_bench_runs_the_step_that_it_counts():
    """By PyTorch's own count, which leaves out attention on a CPU, variants are to the baseline as by ours."""
    args = Namespace(width=64, context=16, depth=3, vocab_size=512, window_pattern="L", batch=16, compile=False)
    ratios = []
    for variant in [("none", 1, False, 0), ("shared", 2, False, 0), ("layerwise", 4, False, 0), ("shared", 2, False, 1), ("layerwise", 1, False, 1)]:
        gradients, _, flops = bench.training_step(args, torch.device("cpu"), *variant)
        with FlopCounterMode(display=False) as counted:
            gradients()
        ratios.append(counted.get_total_flops() / flops)
    assert ratios == pytest.approx([ratios[0]] * 5, rel=0.02) and 0.9 < ratios[0] <= 1

# -----------------------------------------------------------------------------
# Two processes, and interruptions

def test_two_processes_train_like_one(data, here):
    for n in (1, 2):
        done = shell(str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={n}", HERE / "train.py", "--data", data, *SMALL,
                     "--name", f"on{n}", "--num-iterations", 20, "--eval-every", 0, "--device-batch-size", 4)
        assert done.returncode == 0, done.stderr
    one, two = log("runs/on1"), log("runs/on2")
    assert len(one) == 20 and max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two)) < 1e-4
    a, b = (log(f"runs/on{n}", "eval")[-1] for n in (1, 2))
    for where in ("bpb", "decode_rows"):
        assert a[where] == pytest.approx(b[where], abs=1e-4)

def test_a_stopped_run_goes_on_as_if_it_had_not(data, here):
    """SIGTERM at some step: it ends with 0 and says how to go on; then losses and weights are those of one long run, bit for bit."""
    flags = ["--data", data, *SMALL, "--num-iterations", 60, "--eval-every", 20]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    assert shell("train.py", *flags, "--name", "whole").returncode == 0
    process = subprocess.Popen(list(map(str, [sys.executable, HERE / "train.py", *flags, "--name", "cut"])), stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 00010/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "go on with: python train.py --resume runs/cut" in rest
    assert 10 < len(log("runs/cut")) < 60
    done = shell("train.py", "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert [x["loss"] for x in log("runs/cut")] == [x["loss"] for x in log("runs/whole")]
    assert log("runs/cut", "eval") == log("runs/whole", "eval")
    a, b = (sample.load_checkpoint(sample.find_checkpoint(f"runs/{name}")) for name in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])

def test_a_killed_run_goes_on_from_its_last_checkpoint(data, here):
    flags = ["--data", data, *SMALL, "--num-iterations", 40, "--eval-every", 20, "--save-every", 5]
    process = subprocess.Popen(list(map(str, [sys.executable, HERE / "train.py", *flags, "--name", "cut"])), stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        if line.startswith("saved"):
            break
    process.kill()
    process.wait()
    done = shell("train.py", "--resume", "runs/cut")
    assert done.returncode == 0, done.stderr
    assert shell("train.py", *flags, "--name", "whole").returncode == 0
    assert [x["loss"] for x in log("runs/cut")] == [x["loss"] for x in log("runs/whole")]
    code, out, _ = cli("train.py", "--resume", "runs/cut")  # a finished run has nothing left to do
    assert code == 0 and len(log("runs/cut")) == 40

def test_two_processes_resume(data, here):
    """At a step that was evaluated, too: every process must agree on what is left to do. Then like an uninterrupted run."""
    torchrun = str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node=2", HERE / "train.py"
    done = shell(*torchrun, "--data", data, *SMALL, "--num-iterations", 8, "--eval-every", 4, "--save-every", 4, "--name", "x")
    assert done.returncode == 0, done.stderr
    before = log("runs/x"), log("runs/x", "eval")
    Path("runs/x/ckpt_0000008.pt").unlink()
    done = shell(*torchrun, "--resume", "runs/x")
    assert done.returncode == 0, done.stderr
    assert [x["loss"] for x in log("runs/x")] == [x["loss"] for x in before[0]] and log("runs/x", "eval") == before[1]

def test_going_back_to_an_older_checkpoint(data, here):
    """What came after it is done again, not mixed with the new; a log that was cut short is no obstacle."""
    code, _, err = cli("train.py", "--data", data, *SMALL, "--num-iterations", 9, "--eval-every", 3, "--save-every", 3, "--keep", 9, "--name", "x")
    assert code == 0, err
    whole = [x["loss"] for x in log("runs/x")]
    with open("runs/x/log.jsonl", "ab") as f:
        f.write(b'[1]\n\xff\n{"kind": "train", "step": 9, "lo')
    Path("runs/x/ckpt_0000099.pt.tmp").write_bytes(b"killed")
    code, _, err = cli("train.py", "--resume", "runs/x/ckpt_0000003.pt", "--keep", 1)
    assert code == 0, err
    assert [x["loss"] for x in log("runs/x")] == whole and [x["step"] for x in log("runs/x", "eval")] == [0, 3, 6, 9]
    assert [p.name for p in Path("runs/x").glob("ckpt_*")] == ["ckpt_0000009.pt"]
    Path("runs/x/log.jsonl").unlink()
    assert cli("train.py", "--resume", "runs/x")[0] == 0

def test_a_run_is_trained_by_one_at_a_time(trained, here):
    shutil.copytree(trained[0] / "runs/d2_shared", "runs/x")
    held = prepare_data.lock("runs/x", "test")
    assert_refused(cli("train.py", "--resume", "runs/x"), "another training is writing runs/x")
    held.close()
    assert cli("train.py", "--resume", "runs/x")[0] == 0

def test_rows_cover_an_epoch_once_in_any_split(data):
    from train import Rows
    shards = [np.arange(i * 1000, i * 1000 + n, dtype=np.uint16) for i, n in enumerate((5, 103, 64, 8, 200))]
    rows = Rows(shards, 8, seed=1)
    assert rows.per_epoch == 0 + 12 + 7 + 0 + 24
    seen = [[tuple(rows[e * rows.per_epoch + n]) for n in range(rows.per_epoch)] for e in range(2)]
    assert set(seen[0]) == set(seen[1]) and len(set(seen[0])) == rows.per_epoch and seen[0] != seen[1]
    assert all(len(r) == 9 and r[0] % 1000 % 8 == 0 and list(r) == list(range(r[0], r[0] + 9)) for r in seen[0])
    again = Rows(shards, 8, seed=1)
    assert [tuple(again[n]) for n in reversed(range(rows.per_epoch))] == seen[0][::-1]  # any row, in any order
    idx, targets = rows.batch(3, 2, torch.device("cpu"))
    assert idx.tolist() == [list(r[:-1]) for r in seen[0][3:5]] and targets.tolist() == [list(r[1:]) for r in seen[0][3:5]]


def test_a_run_sees_every_row_once(data, here, monkeypatch):
    """Steps and their micro-batches take the rows one after the other, without gaps or repetition."""
    import train
    batch, seen = train.Rows.batch, []
    monkeypatch.setattr(train.Rows, "batch", lambda self, first, count, device: seen.extend(range(first, first + count)) or batch(self, first, count, device))
    code, _, err = cli("train.py", "--data", data, *SMALL, "--num-iterations", 3, "--device-batch-size", 2, "--eval-every", 0)
    assert code == 0 and seen == list(range(3 * 16 + 2)), err  # the first forward of the next step is always loaded

# -----------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing half-written

@pytest.mark.parametrize("flags, words", [
    ("--depth 0", ["--depth must be a number of at least 1, not 0"]),
    ("--subsets 0", ["--subsets must be a number of at least 1"]),
    ("--source-layer 2", ["source_layer 2 is out of range", "0 to 1"]),
    ("--source-layer -1", ["source_layer -1 is out of range"]),
    ("--total-batch-size 500", ["--total-batch-size 500", "not divisible", "32 tokens a row"]),
    ("--total-batch-size 512 --device-batch-size 3", ["--device-batch-size 3", "16 rows"]),
    ("--total-batch-size 33554432", ["training rows of 32 tokens", "less than one batch of 1048576"]),
    ("--max-seq-len 131072 --total-batch-size 131072", ["no validation shard of more than 131072 tokens", "one row"]),
    ("--schedule chunked --chunk 32", ["--chunk 32 covers the whole context"]),
    ("--schedule chunked --kv-refresh", ["kv_refresh goes with the interleaved schedule"]),
    ("--loss-weights 1 2", ["2 loss weights for 3 passes"]),
    ("--forward-passes 1 --loss-weights 1 1 1", ["forward_passes", "must be 0"]), ("--forward-passes 1 --schedule chunked --chunk 8", ["forward_passes goes with", "not with chunked"]),
    ("--forward-passes 3", ["forward_passes must be from 0 to 2", "not 3"]), ("--forward-passes -1", ["--forward-passes must be a number of at least 0"]),
    ("--loss-weights -1 1 1", ["not negative"]),
    ("--n-kv-head 3", ["not divisible by n_kv_head 3"]),
    ("--window-pattern XL", ["letters S and L"]),
    ("--num-iterations 0", ["--num-iterations must be a number of at least 1"]),
    ("--head-dim 0", ["--head-dim must be a number of at least 1"]),
    ("--matrix-lr -1", ["--matrix-lr must be a number of at least 0"]),
    ("--embedding-lr nan", ["--embedding-lr must be a number of at least 0, not nan"]),
    ("--target-flops inf", ["--target-flops must be a number"]),
    ("--seed 99999999999999999999999", ["--seed must be a number"]),
    ("--aspect-ratio 1000000000", ["no model of width 2000000000 can be built"]),
    ("--loss-weights nan 1 1", ["must be finite"]),
    ("--warmdown-ratio 2", ["--warmdown-ratio must be at most 1"]),
    ("--lrt both", ["invalid choice: 'both'"]),
    ("--depth x", ["invalid int value"]),
    ("--unknown", ["unrecognized arguments"]),
    ("--device tpu", ["device 'tpu' cannot be used here"]),
    ("--device meta", ["device 'meta' cannot be used here"]),
    ("--data nowhere", ["no prepared data in nowhere", "prepare_data.py"]),
    ("--resume nowhere", ["no such run or checkpoint: nowhere"]),
])
def test_bad_flags(flags, words, data, here):
    assert_refused(cli("train.py", "--data", data, *SMALL, "--num-iterations", 2, *flags.split()), *words)
    assert not (here / "runs").exists()

def test_no_data_and_no_run(here):
    """A newcomer's first mistakes, in real processes."""
    for script, words in (("train.py", ["no prepared data in data", "prepare_data.py"]), ("sample.py", ["no run in runs/", "train.py"]),
                          ("eval_core.py", ["no run in runs/"])):
        done = shell(script)
        assert_refused((done.returncode, done.stdout, done.stderr), *words)
    assert list(here.iterdir()) == []

def test_damaged_data(data, here):
    def damaged(change):
        shutil.rmtree("data", ignore_errors=True)
        shutil.copytree(data, "data")
        change(Path("data"))
        return cli("train.py", *SMALL, "--num-iterations", 2)
    def flip(path):
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])
    assert_refused(damaged(lambda d: truncate(d / "train_00000.npy")), "train_00000.npy", "prepare_data.py")
    assert_refused(damaged(lambda d: flip(d / "train_00000.npy")), "train_00000.npy", "sha256")
    assert_refused(damaged(lambda d: flip(d / "tokenizer.tiktoken")), "tokenizer")
    assert_refused(damaged(lambda d: (d / "val_00000.npy").unlink()), "val_00000.npy")
    assert_refused(damaged(lambda d: (d / "meta.json").write_text("{")), "meta.json")
    assert not (here / "runs").exists()

def test_damaged_checkpoints(trained, data, here):
    def with_checkpoint(change):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(trained[0] / "runs/d2_shared", "run")
        change(sample.find_checkpoint("run"))
        return [cli("sample.py", "--checkpoint", "run"), cli("eval_core.py", "--checkpoint", "run"), cli("train.py", "--resume", "run/ckpt_0000150.pt")]
    def edit(path, **changes):
        state = torch.load(path, weights_only=True)
        torch.save(state | changes, path)
    for size in (0, 100, 100000):
        for result in with_checkpoint(lambda p: p.write_bytes(p.read_bytes()[:size])):
            assert_refused(result, "ckpt_0000150.pt is damaged")
    for result in with_checkpoint(lambda p: torch.save({"weights": torch.zeros(3)}, p)):
        assert_refused(result, "is damaged or no checkpoint of nanolrt")
    config = sample.load_checkpoint(sample.find_checkpoint(trained[0] / "runs/d2_shared"))["config"]
    for odd in (dict(args=[]), dict(step="4"), dict(optimizers={}), dict(schedule={"kind": "x"}), dict(config={"n_embd": 5})):
        for result in with_checkpoint(lambda p: edit(p, **odd)):
            assert_refused(result, "is damaged or no checkpoint of nanolrt")
    assert_refused(with_checkpoint(lambda p: edit(p, optimizers=[{}, {}]))[2], "the optimizer state of run")
    assert_refused(with_checkpoint(lambda p: edit(p, optimizers=[]))[2], "the optimizer state of run")
    for result in with_checkpoint(lambda p: edit(p, config=config | {"n_embd": 48, "n_head": 3, "n_kv_head": 3}))[:2]:
        assert_refused(result, "not of its own configuration")
    for result in with_checkpoint(lambda p: edit(p, model={})):
        assert_refused(result, "not of its own configuration")
    (here / "empty").mkdir()
    assert_refused(cli("sample.py", "--checkpoint", "empty"), "no checkpoint in empty")
    assert_refused(cli("sample.py", "--checkpoint", "nowhere"), "no such run or checkpoint: nowhere")

def test_a_checkpoint_runs_no_code(here):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("pwned",)
    (here / "run").mkdir()
    torch.save({"model": Evil(), "step": 1}, "run/ckpt_0000001.pt")
    assert_refused(cli("sample.py", "--checkpoint", "run"), "is damaged or no checkpoint")
    assert not (here / "pwned").exists()

def test_a_run_is_not_resumed_as_another(trained, data, here):
    shutil.copytree(trained[0] / "runs/d2_shared", "run")
    assert_refused(cli("train.py", "--resume", "run", "--depth", 3), "was trained with --depth 2")
    assert_refused(cli("train.py", "--resume", "run", "--lrt", "none", "--seed", 1), "--lrt shared", "--seed 0")
    assert_refused(cli("train.py", "--data", data, *SMALL, "--out", ".", "--name", "run"), "run exists", "--resume run")
    assert_refused(cli("train.py", "--resume", "run", "--name", "other"), "--name run")
    shutil.copytree(data, "shorter")
    meta = json.loads(Path("shorter/meta.json").read_text())
    np.save("shorter/train_00000.npy", np.load("shorter/train_00000.npy")[:20000])
    meta["train"][0] |= {"tokens": 20000, "sha256": prepare_data.sha256_file("shorter/train_00000.npy")}
    Path("shorter/meta.json").write_text(json.dumps(meta))
    assert_refused(cli("train.py", "--resume", "run", "--data", "shorter"), "other training shards")
    (here / "text.txt").write_text(Path(json.__file__).read_text() * 3)
    assert cli("prepare_data.py", "text.txt", "--vocab-size", 300, "--out", "other")[0] == 0
    assert_refused(cli("train.py", "--resume", "run", "--data", "other"), "another tokenizer")
    assert_refused(cli("eval_core.py", "--checkpoint", "run", "--data", "other"), "another tokenizer")

def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(data, here):
    result = cli("train.py", "--data", data, *SMALL, "--num-iterations", 40, "--save-every", 1, "--eval-every", 0, "--embedding-lr", "1e38", "--name", "x")
    assert_refused(result, "the last good checkpoint is runs/x/ckpt_", "--matrix-lr")
    assert all(np.isfinite(x["loss"]) for x in log("runs/x"))
    last = int(sorted(p.stem for p in Path("runs/x").glob("ckpt_*.pt"))[-1].split("_")[1])
    assert last == len(log("runs/x"))  # the weights that the last finite step left

def test_bad_sampling_flags(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    assert_refused(cli("sample.py", "--temperature", "-1"), "--temperature must be a number of at least 0")
    assert_refused(cli("sample.py", "--temperature", "nan"), "--temperature must be a number of at least 0")
    assert_refused(cli("sample.py", "--temperature", "inf"), "--temperature must be a number of at least 0")
    assert_refused(cli("sample.py", "--top-k", "-1"), "--top-k must be a number of at least 0")
    assert_refused(cli("sample.py", "--top-p", "0"), "--top-p must be above 0")
    assert_refused(cli("sample.py", "--max-new-tokens", "0"), "--max-new-tokens must be a number of at least 1")
    assert_refused(cli("sample.py", "--num-samples", "0"), "--num-samples must be a number of at least 1")
    assert_refused(cli("sample.py", "--prompt", "word " * 100), "prompt 1 has", "the context 32")
    assert_refused(cli("eval_core.py", "--rows", "0"), "--rows must be a number of at least 1")
    assert_refused(cli("eval_core.py", "--json", "nowhere/x.json"), "there is no folder nowhere")

# -----------------------------------------------------------------------------
# The plan

def test_dry_run_needs_no_data_and_writes_nothing(here):
    """The plan of a model far too large for this machine, in seconds; 8 processes share the optimizer's state."""
    code, out, err = cli("train.py", "--dry-run", "--depth", 20, "--lrt", "shared")
    assert code == 0 and not list(here.iterdir()), err
    for words in ("1,320,007,740 parameters", "memory projections 3,276,800", "interleaved, 3 passes", "FLOPs, 2.01 times those of plain passes", "1 x 64 x 8",
                  "KV cache 262,297,600 bytes", "memory a process, bfloat16, 8 rows: weights 4.92 + gradients 4.92 + optimizers 8.36 + activations"):
        assert words in out, out
    code, out, err = cli("train.py", "--dry-run", "--depth", 20, "--lrt", "shared", "--forward-passes", 1)  # what keeps no activations leaves room for rows
    assert code == 0 and "FLOPs, 1.31 times those of plain passes" in out and "1 x 32 x 16" in out, out + err

def test_dry_run_counts_what_a_step_keeps():
    """The estimate, on tensors without storage, is what autograd and the store really hold after a forward."""
    import gc
    import train
    from interleave import TrainStep
    from model import GPT
    args = train.make_parser().parse_args(["--depth", "2", "--aspect-ratio", "32", "--head-dim", "16", "--max-seq-len", "64", "--num-iterations", "1",
                                           "--total-batch-size", "256", "--lrt", "shared"])
    plan = train.make_plan(args, 64, 1, torch.float32)
    for recompute in (False, True):
        counted = train.memory(plan, 1, torch.float32, recompute)["activations"]
        model, idx = GPT(plan.config), torch.zeros(plan.device_batch, 64, dtype=torch.int64)
        model.recompute = recompute
        gc.collect()
        real = train.saved_bytes(lambda: TrainStep(model, plan.schedule)(idx, idx), model.parameters())
        assert real > 10**6 and abs(counted - real) < 256  # but for a few numbers
