"""
Days of training, unattended: kills, full disks, lost files, dead processes, several nodes, hostile files; and that any number of
processes trains alike. train() forks a process that has imported everything: a start costs a tenth of a command's.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401 (meta tensors import it: here once, for all the processes)
import torch.distributed as dist
import torch.distributed.optim  # noqa: F401

import prepare_data
import train
from prepare_data import UserError

HERE = Path(__file__).parent
TINY = ("--depth 1 --aspect-ratio 16 --head-dim 8 --max-seq-len 16 --total-batch-size 128 --eval-tokens 112 --decode-tokens 32 "
        "--device cpu --warmup-steps 0 --eval-every 0 --save-every 0").split()
TWELVE = [*TINY, "--name", "x", "--num-iterations", 12, "--eval-every", 3, "--save-every", 2]


# -----------------------------------------------------------------------------
# Processes, forked from one that has imported this file

@pytest.fixture(scope="session")
def fork():
    """fork(function, *args) starts function(*args) in a process of its own and returns that, a multiprocessing.Process."""
    context, before = multiprocessing.get_context("forkserver"), dict(os.environ)
    context.set_forkserver_preload([__name__])
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    started = []
    def fork(function, *args):
        started.append(context.Process(target=function, args=args))
        started[-1].start()
        return started[-1]
    yield fork
    for process in started:
        process.kill()
    os.environ.clear()
    os.environ.update(before)

def command(out, argv, env=None, prelude=None, *args):
    """train.py's command line in this process; what it says goes to the file `out`. prelude(*args) comes first."""
    for i, stream in enumerate((sys.stdout, sys.stderr), 1):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), i)
        stream.reconfigure(line_buffering=True)
    os.environ |= env or {}
    sys.argv = ["train.py", *map(str, argv)]
    if prelude:
        prelude(*args)
    prepare_data.run_main(train.main)

def ranks(world):
    """The environment of each process of a group on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for r in range(world)]

def wait(*processes, seconds=60):
    """Their exit codes."""
    end = time.time() + seconds
    for process in processes:
        process.join(max(end - time.time(), 0))
    return [process.exitcode for process in processes]

def run(fork, out, *argv, prelude=None, args=(), world=1, seconds=120):
    """A whole run: exit codes and what all of its processes said."""
    out = Path(out).absolute()
    out.unlink(missing_ok=True)
    codes = wait(*[fork(command, out, argv, env, prelude, *args) for env in (ranks(world) if world > 1 else [None])], seconds=seconds)
    return codes, out.read_text()

def log(folder, kind="train"):
    return [row for row in train.read_log(Path(folder)) if row["kind"] == kind]

def numbers(folder):
    """All of a run's log that is computed, and not a time."""
    return [{k: v for k, v in row.items() if k != "dt"} for row in train.read_log(Path(folder))]

def same_bits(a, b):
    """Are two checkpoints' weights, optimizer states, positions and random states the same?"""
    def equal(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    a, b = (train.load_checkpoint(path) for path in (a, b))
    return all(equal(a[k], b[k]) for k in ("model", "optimizers", "step", "rows_seen", "torch_rng", "config", "schedule"))

@pytest.fixture(scope="session")
def data(tmp_path_factory, fork):
    """Prepared data: some training shards and one of validation, 300 tokens in the vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(json.__file__).read_text() + Path(contextlib.__file__).read_text()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in text.split("\n\n")))
    assert wait(fork(prepare, folder / "text.jsonl", folder / "data", 5000)) == [0]
    return folder / "data"

def prepare(source, out, shard_tokens, said=os.devnull):
    sys.argv = ["prepare_data.py", str(source), "--out", str(out), "--vocab-size", "300", "--shard-tokens", str(shard_tokens)]
    with open(said, "w") as f, contextlib.redirect_stdout(f):
        prepare_data.run_main(prepare_data.main)

class Evil:
    """A pickle of this makes a folder when it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("pwned",)

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -----------------------------------------------------------------------------
# Killed at any moment

def tell_phases(pipe):
    """Send a letter at the beginning of each phase: r taking the log back, s a step, e an evaluation, w writing a checkpoint, d that done."""
    def told(function, before, after=None, when=lambda *args: True):
        def wrapped(*args, **kwargs):
            if when(*args):
                pipe.send_bytes(before)
            result = function(*args, **kwargs)
            if after and when(*args):
                pipe.send_bytes(after)
            return result
        return wrapped
    train.rewind, train.set_schedule = told(train.rewind, b"r"), told(train.set_schedule, b"s")
    train.evaluate_bpb = told(train.evaluate_bpb, b"e")
    train.write_atomic = told(train.write_atomic, b"w", b"d", lambda path, write: path.suffix == ".pt")

def test_killed_at_24_random_moments(data, here, fork):
    """SIGKILL somewhere within a phase, and the same command again: in the end the log and the checkpoint of one long run, bit for bit."""
    flags = ["--data", data, *TINY, "--num-iterations", 150, "--eval-every", 3, "--save-every", 2, "--resume", "auto"]
    rng, kills, torn = random.Random(6), Counter(), 0
    whole = fork(command, "whole.txt", [*flags, "--name", "whole"])
    for phase in rng.sample("rrr" + 7 * "sew", 24):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = fork(command, "cut.txt", [*flags, "--name", "cut"], None, tell_phases, theirs)
        theirs.close()
        for _ in range(1 if phase == "r" else rng.randint(1, 4)):
            while (last := ours.recv_bytes().decode()) != phase:
                pass
        time.sleep(rng.uniform(0, 0.002))
        process.kill()
        assert wait(process) == [-signal.SIGKILL], Path("cut.txt").read_text()[-2000:]
        with contextlib.suppress(EOFError):
            while True:
                last = ours.recv_bytes().decode()
        kills[last] += 1
        torn += any(Path("runs/cut").glob("*.tmp"))
    print(f"kills by phase: {dict(kills)}, {torn} of them left a half-written file")
    assert sum(kills.values()) == 24 and min(kills[phase] for phase in "sew") >= 3 and torn, (kills, torn)
    assert 20 < len(log("runs/cut")) < 150
    assert run(fork, "cut.txt", *flags, "--name", "cut")[0] == [0] and wait(whole) == [0]
    assert numbers("runs/cut") == numbers("runs/whole") and len(log("runs/cut")) == 150 and len(log("runs/cut", "eval")) == 51
    names = ["ckpt_0000148.pt", "ckpt_0000150.pt"]  # --keep 2
    assert sorted(p.name for p in Path("runs/cut").glob("ckpt*")) == names
    assert all(same_bits(f"runs/cut/{name}", f"runs/whole/{name}") for name in names)

def test_written_means_on_the_disk(here, monkeypatch):
    """A power cut is not tried: the order of the calls is."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    prepare_data.write_atomic("x", lambda f: f.write(b"x"))
    assert calls == ["file", "rename", "folder"]

@pytest.fixture(scope="session")
def trained(data, tmp_path_factory, fork):
    """A folder with runs/x, 12 steps, evaluated every 3 steps and saved every 2: what a run without faults writes."""
    folder = tmp_path_factory.mktemp("trained")
    codes, said = run(fork, folder / "out.txt", "--data", data, *TWELVE, "--out", folder / "runs", "--keep", 9)
    assert codes == [0], said
    return folder

def test_a_damaged_checkpoint_is_passed_over(trained, here, fork, capsys):
    def flip(path):
        """A bit of the first tensor: torch.load would take it."""
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 3] ^= 1
        path.write_bytes(raw)
        train.load_checkpoint(path)
    cut = [lambda path, size=size: os.truncate(path, size) for size in (0, 1, 1000, 50000)]
    for i, damage in enumerate([*cut, lambda path: os.truncate(path, path.stat().st_size - 1), flip, lambda path: torch.save(Evil(), path),
                                lambda path: torch.save({"model": {}}, path)]):
        shutil.copytree(trained / "runs/x", f"runs/{i}")
        newest = Path(f"runs/{i}/ckpt_0000012.pt")
        damage(newest)
        path, checkpoint = train.newest_checkpoint(f"runs/{i}")
        assert path.name == "ckpt_0000010.pt" and checkpoint["step"] == 10
        assert f"warning: {newest} is damaged" in capsys.readouterr().out
        with pytest.raises(UserError, match="damaged"):
            train.newest_checkpoint(newest)  # the one that was asked for
    codes, said = run(fork, "out.txt", "--resume", "runs/5")
    assert codes == [0] and "ckpt_0000012.pt is damaged" in said
    assert numbers("runs/5") == numbers(trained / "runs/x") and same_bits("runs/5/ckpt_0000012.pt", trained / "runs/x/ckpt_0000012.pt")
    for path in Path("runs/0").glob("*.pt"):
        os.truncate(path, 100)
    with pytest.raises(UserError, match="damaged"):  # none is left: not a reason to start from nothing
        train.newest_checkpoint("runs/0")
    assert not Path("pwned").exists()

def test_resume_auto(data, here, monkeypatch):
    """The same command starts and goes on; what would silently train another run is refused."""
    def parse(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data), *map(str, TINY), *argv])
        return train.parse_args()
    args, checkpoint = parse("--resume", "auto", "--out", "./runs/")
    assert checkpoint is None and train.new_run_folder(args) == Path("runs/d1_shared") == train.new_run_folder(args)
    with pytest.raises(UserError, match="no such run"):
        parse("--resume", "runs/nowhere")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match="--max-restarts needs --resume auto"):
        parse()
    parse("--resume", "auto")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        parse("--resume", "auto")


# -----------------------------------------------------------------------------
# Faults

def at_step(steps):
    """Call steps[n]() when step n begins."""
    set_schedule = train.set_schedule
    def wrapped(optimizers, step, *args):
        if step in steps:
            steps[step]()
        return set_schedule(optimizers, step, *args)
    train.set_schedule = wrapped

def poison(bad_steps, bad_rank):
    """The loss of these steps is nan in one process."""
    def patch(step):
        forward, calls = step.forward, iter(range(10**9))
        def wrapped(*args):
            loss, means = forward(*args)
            return (loss * float("nan") if next(calls) in bad_steps and os.environ.get("RANK", "0") == bad_rank else loss), means
        step.forward = wrapped
        return step
    real = train.TrainStep
    train.TrainStep = lambda *args: patch(real(*args))

@pytest.mark.parametrize("world", [1, 2])
def test_steps_that_are_not_finite(world, data, here, fork):
    """Skipped in all processes alike, in the log, and without a trace in weights and optimizers; or stopped, which is the default."""
    flags = ["--data", data, *TINY, "--num-iterations", 8, "--save-every", 1, "--keep", 99]
    codes, said = run(fork, "out.txt", *flags, "--name", "x", "--on-nonfinite", "skip", prelude=poison, args=({2, 3, 5}, str(world - 1)), world=world)
    assert codes == [0] * world, said
    assert [row["step"] for row in log("runs/x", "skip")] == [2, 3, 5] and [row["step"] for row in log("runs/x")] == [0, 1, 4, 6, 7]
    assert "the loss is nan" in log("runs/x", "skip")[0]["reason"] and "warning: 3 steps were skipped" in said
    states = [train.load_checkpoint(f"runs/x/ckpt_{n:07d}.pt") for n in (2, 4, 5)]
    for key in states[0]["model"]:
        assert torch.equal(states[0]["model"][key], states[1]["model"][key])
    assert not torch.equal(states[1]["model"]["lm_head.weight"], states[2]["model"]["lm_head.weight"])
    assert states[1]["optimizers"][0]["state"][0]["step"] == 2
    codes, said = run(fork, "out.txt", *flags, "--name", "y", prelude=poison, args=({2}, str(world - 1)), world=world)
    assert codes == [2] * world and "error: step 2: the loss is nan" in said and "last good checkpoint is runs/y/ckpt_0000002.pt" in said
    if world == 1:
        codes, said = run(fork, "out.txt", *flags, "--name", "z", "--num-iterations", 30, "--on-nonfinite", "skip",
                          prelude=poison, args=(range(4, 99), "0"))
        assert codes == [2] and "error: step 13: the loss is nan" in said and len(log("runs/z", "skip")) == train.MAX_SKIPS - 1

def change_shards(how, folder):
    def truncate():
        for path in folder.glob("train_*.npy"):
            os.truncate(path, 128)
    def rewrite():  # as long as before
        for path in folder.glob("train_*.npy"):
            with open(path, "r+b") as f:
                f.seek(-10, 2)
                f.write(b"0123456789")
    def remove():
        for path in folder.glob(f"{how}_*.npy"):
            path.unlink()
    at_step({5: dict(truncate=truncate, rewrite=rewrite).get(how, remove)})

@pytest.mark.parametrize("how", ["truncate", "rewrite", "train", "val"])
def test_shards_change_under_a_run(how, data, trained, here, fork):
    shutil.copytree(data, "data")
    codes, said = run(fork, "out.txt", *TWELVE, prelude=change_shards, args=(how, Path("data")))
    if how == "val":  # it was read at the start
        assert codes == [0], said
    else:
        assert codes == [2] and said.splitlines()[-1].startswith("error: ") and "data/train_0000" in said and "changed or removed" in said
        codes, said = run(fork, "out.txt", "--resume", "runs/x")
        assert codes == [2] and "data/train_0000" in said.splitlines()[-1]
        shutil.rmtree("data")
        shutil.copytree(data, "data")
        codes, said = run(fork, "out.txt", "--resume", "runs/x")
        assert codes == [0], said
    assert numbers("runs/x") == numbers(trained / "runs/x")

@pytest.mark.parametrize("fault", ["truncated", "missing", "unreadable", "failing"])
def test_validation_shard_that_cannot_be_read(fault, data, here, monkeypatch):
    shutil.copytree(data, "data")
    path = Path("data/val_00000.npy")
    if fault == "truncated":
        os.truncate(path, path.stat().st_size - 2)
    elif fault == "missing":
        path.unlink()
    elif fault == "unreadable":  # for root, too
        path.unlink()
        path.mkdir()
    else:
        def failing(*paths, real=prepare_data.sha256_file):
            if path in paths:
                raise OSError(5, "Input/output error")
            return real(*paths)
        monkeypatch.setattr(prepare_data, "sha256_file", failing)
    with pytest.raises(UserError, match="val_00000.npy"):
        prepare_data.open_data("data")

def fill_disk(begin, end, size):
    """From step `begin` no file can grow beyond `size` bytes, until step `end`."""
    def limit(n):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
    at_step({begin: lambda: limit(size), end: lambda: limit(resource.RLIM_INFINITY)})

def test_full_disk(data, trained, here, fork):
    """Nothing can be written, log and console included, and later there is room again: all is there. Room never comes: the old checkpoints are."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=fill_disk, args=(3, 9, 1))
    assert codes == [0], said
    assert numbers("runs/x") == numbers(trained / "runs/x") and same_bits("runs/x/ckpt_0000012.pt", trained / "runs/x/ckpt_0000012.pt")
    assert {p.name for p in Path("runs/x").glob("ckpt*")} == {"ckpt_0000010.pt", "ckpt_0000012.pt"}
    shutil.rmtree("runs")
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=fill_disk, args=(5, 99, 20000))
    assert codes == [2] and said.count("was not saved: cannot write runs/x/ckpt_") == 4
    assert "warning: step 6 was not saved: cannot write runs/x/ckpt_0000006.pt: File too large; make room; training goes on" in said
    assert said.splitlines()[-1] == "error: step 12 was not saved: cannot write runs/x/ckpt_0000012.pt: File too large; make room, then --resume runs/x"
    assert {p.name for p in Path("runs/x").glob("ckpt*")} == {"ckpt_0000002.pt", "ckpt_0000004.pt"}
    assert run(fork, "out.txt", "--resume", "runs/x")[0] == [0]
    assert numbers("runs/x") == numbers(trained / "runs/x") and same_bits("runs/x/ckpt_0000012.pt", trained / "runs/x/ckpt_0000012.pt")


# -----------------------------------------------------------------------------
# Several processes and nodes

def limit_patience(seconds):
    train.TIMEOUT = train.timedelta(seconds=seconds)

@pytest.mark.parametrize("sig, seconds, words", [(signal.SIGKILL, 600, "connection"), (signal.SIGSTOP, 3, "time")])
def test_a_process_that_dies_or_hangs(sig, seconds, words, data, here, fork):
    """The other one ends, and says why."""
    flags = ["--data", data, *TINY, "--num-iterations", 10**6, "--log-every", 1]
    one, two = (fork(command, f"{env['RANK']}.txt", flags, env, limit_patience, seconds) for env in ranks(2))
    while "step 00003/" not in (Path("0.txt").read_text() if Path("0.txt").exists() else ""):
        assert one.is_alive() and two.is_alive()
        time.sleep(0.05)
    os.kill(two.pid, sig)
    before = time.time()
    assert wait(one) not in ([0], [None]) and time.time() - before < 60
    assert words in Path("0.txt").read_text().splitlines()[-1].lower()  # gloo has several ways to say it

def test_nodes_without_a_shared_folder(data, trained, here, fork):
    """One finds the checkpoint, the other does not: refused, not trained apart."""
    shutil.copytree(trained / "runs", "a/runs")
    Path("b").mkdir()
    flags = ["--data", data, *TWELVE, "--resume", "auto"]
    processes = [fork(command, here / f"{name}.txt", flags, env, os.chdir, name) for name, env in zip("ab", ranks(2))]
    assert wait(*processes) == [2, 2]
    assert all("error: the processes found checkpoints of different steps, [0, 12]" in (here / f"{name}.txt").read_text() for name in "ab")

def many(out, commands, prelude):
    """Several command lines, one after another."""
    if prelude:
        prelude()
    for argv, env in commands:
        command(out, argv, env)

SCHEDULES = {"interleaved": "--schedule interleaved", "kv_refresh": "--subsets 3 --kv-refresh", "refine": "--schedule refine --refinements 2", "forward": "--schedule refine --refinements 2 --forward-passes 2",
             "chunked": "--schedule chunked --chunk 3", "sequential": "--schedule sequential"}
VARIANTS = {"none": "--lrt none", "layerwise": "--lrt layerwise --depth 2"} | {name: f"--lrt shared {flags}" for name, flags in SCHEDULES.items()}

def in_float64():
    torch.set_default_dtype(torch.float64)
    train.compute_dtype = lambda device: torch.float64

def worst_difference(fork, data, names, worlds, *flags, prelude=None):
    """The largest relative difference of a loss of 50 steps to those of the first of `worlds`, by name."""
    processes = []
    for world in worlds:
        commands = [[] for _ in range(world)]
        for name in names:
            argv = ["--data", data, *TINY, "--max-seq-len", 4, "--window-pattern", "SL", "--total-batch-size", 64, "--device-batch-size", 4, "--num-iterations", 50,
                    "--eval-tokens", 8, "--decode-tokens", 0, *VARIANTS[name].split(), *flags, "--name", f"{name}_{world}"]
            for theirs, env in zip(commands, ranks(world)):
                theirs.append((argv, env if world > 1 else {}))
        processes += [fork(many, f"{world}.txt", theirs, prelude) for theirs in commands]
    assert set(wait(*processes, seconds=300)) == {0}, "".join(path.read_text()[-2000:] for path in Path().glob("*.txt"))
    worst = {}
    for name in names:
        one, *more = ([row["loss"] for row in log(f"runs/{name}_{world}")] for world in worlds)
        assert len(one) == 50 and one[-1] < one[0] - 1
        worst[name] = max(abs(a - b) / a for losses in more for a, b in zip(one, losses, strict=True))
    print("largest relative difference of a loss:", {name: f"{x:.1e}" for name, x in worst.items()})
    return worst

def test_1_2_and_4_processes_train_alike(data, here, fork):
    """
    50 steps of every variant and schedule in float32; one and two processes need several forwards a step. A gradient's sum depends, in its
    last bit, on its order, and optimizers that normalize amplify what is close to zero (at the full learning rates up to 3e-3
    here): so these are lower. The next test has no such noise.
    """
    lower = "--matrix-lr 0.0005 --embedding-lr 0.01 --scalar-lr 0.005 --warmup-steps 40".split()
    worst = worst_difference(fork, data, VARIANTS, (1, 2, 4), *lower)
    assert max(worst.values()) < 1e-5, worst

def test_processes_train_alike_at_full_learning_rates_in_float64(data, here, fork):
    worst = worst_difference(fork, data, ["none", "layerwise", "refine"], (1, 2), prelude=in_float64)
    assert max(worst.values()) < 1e-9, worst

def test_another_number_of_processes_goes_on(data, here, fork):
    """4 steps on two processes, 4 on one, 4 on four: as 12 on one, in float64."""
    flags = ["--data", data, *TINY, "--num-iterations", 12, "--save-every", 4]
    assert run(fork, "whole.txt", *flags, "--name", "whole", prelude=in_float64)[0] == [0]
    assert run(fork, "out.txt", *flags, "--name", "x", "--keep", 9, prelude=in_float64, world=2)[0] == [0, 0]
    for world, step in ((1, 4), (4, 8)):
        codes, said = run(fork, "out.txt", "--resume", f"runs/x/ckpt_{step:07d}.pt", prelude=in_float64, world=world)
        assert codes == [0] * world, said
    a, b = ([row["loss"] for row in log(f"runs/{name}")] for name in ("whole", "x"))
    assert len(a) == 12 and a == pytest.approx(b, rel=1e-9)

def note_rows(folder):
    """Write down which rows this process is given, and what is in them."""
    batch = train.Rows.batch
    def wrapped(self, first, count, device):
        idx, targets = batch(self, first, count, device)
        with open(f"{folder}/rows{os.environ['RANK']}.jsonl", "a") as f:
            f.writelines(json.dumps([first + i, idx[i].tolist()]) + "\n" for i in range(count))
        return idx, targets
    train.Rows.batch = wrapped

@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_rows(world, data, here, fork):
    """Every row of an epoch in one process, once; the epoch ends within a step, and the next one begins there."""
    opened = prepare_data.open_data(data)
    per_epoch = train.Rows(opened.train, 128, 0).per_epoch
    steps, batch = per_epoch // 16 + 2, 16
    assert per_epoch % batch
    codes, said = run(fork, "out.txt", "--data", data, *TINY, "--max-seq-len", 128, "--total-batch-size", 128 * batch, "--device-batch-size", 2, "--num-iterations", steps,
                      "--eval-tokens", 128, "--decode-tokens", 0, prelude=note_rows, args=(str(here),), world=world)
    assert codes == [0] * world, said
    theirs = [[json.loads(line) for line in open(f"rows{rank}.jsonl")] for rank in range(world)]
    theirs = [[row for row in rows if row[0] < steps * batch] for rows in theirs]  # the first forward of the step after the last is loaded, too
    assert [len(rows) for rows in theirs] == [steps * batch // world] * world
    rows = dict(row for rows in theirs for row in rows)
    assert sorted(rows) == list(range(steps * batch))
    expected = {tuple(shard[r * 128:r * 128 + 128].tolist()) for shard in opened.train for r in range((len(shard) - 1) // 128)}
    assert {tuple(rows[n]) for n in range(per_epoch)} == expected and len(expected) == per_epoch
    assert len({tuple(rows[n]) for n in range(per_epoch, steps * batch)}) == steps * batch - per_epoch

def evaluate(folder, env):
    """BPB of 7 rows and of 3, of a model that is the same everywhere."""
    os.environ |= env
    if env:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = train.GPT(train.GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, lrt="shared"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows, n_bytes = torch.randint(0, 32, (7, 9)), torch.arange(32) % 5
    found = [train.evaluate_bpb(model, rows[:n], n_bytes, train.Schedule(), 1, decode=True)[0] for n in (7, 3)]
    Path(folder, f"bpb_{env.get('WORLD_SIZE')}_{env.get('RANK')}.json").write_text(json.dumps(found))

def test_evaluation_is_the_same_on_any_number_of_processes(here, fork):
    """Rows that the processes do not divide, fewer than processes among them: the exact sum, in every process."""
    assert wait(*[fork(evaluate, here, env) for world in (2, 4) for env in ranks(world)], fork(evaluate, here, {})) == [0] * 7
    one, *more = (json.loads(path.read_text()) for path in sorted(here.glob("bpb*.json"), reverse=True))  # bpb_None_None first
    assert len(more) == 6 and set(one[0]) >= {"merged", "decode"}
    for other in more:
        for a, b in zip(one, other):
            assert a == pytest.approx(b, rel=1e-13)

def children(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]

def test_two_nodes(data, here, fork):
    """
    Two agents of torchrun, one process each. A process is killed: torchrun starts both again. A node is killed, agent and
    process, and comes back: the same. The log is that of two processes that nobody touched, bit for bit.
    """
    flags = ["--data", data, *TINY, "--num-iterations", 60, "--eval-every", 20, "--save-every", 5, "--resume", "auto"]
    whole = [fork(command, "whole.txt", [*flags, "--name", "whole"], env) for env in ranks(2)]
    port = ranks(1)[0]["MASTER_PORT"]
    agents = []
    def agent():
        with open(f"agent{len(agents)}.txt", "w") as f:
            agents.append(subprocess.Popen(list(map(str, [
                Path(sys.executable).parent / "torchrun", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=5", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
                "--rdzv_id=x", "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1", HERE / "train.py", *flags, "--name", "x"])), stdout=f, stderr=f,
                env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
        return agents[-1]
    def until(steps):
        end = time.time() + 120
        while len(log("runs/x")) < steps:
            assert time.time() < end, "".join(path.read_text()[-3000:] for path in here.glob("agent*.txt"))
            time.sleep(0.02)
    try:
        first = agent()
        while socket.socket().connect_ex(("127.0.0.1", int(port))):  # it hosts the rendezvous, and stays
            time.sleep(0.05)
        second = agent()
        until(12)
        os.kill(children(first.pid)[0], signal.SIGKILL)
        until(32)
        for pid in [second.pid, *children(second.pid)]:
            os.kill(pid, signal.SIGKILL)
        third = agent()
        assert [process.wait(120) for process in (first, third)] == [0, 0], "".join(path.read_text()[-3000:] for path in here.glob("agent*.txt"))
    finally:
        for process in agents:
            for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
    assert wait(*whole) == [0, 0]
    assert "exitcode: -9" in Path("agent0.txt").read_text()  # torchrun gives the reason
    assert numbers("runs/x") == numbers("runs/whole") and same_bits("runs/x/ckpt_0000060.pt", "runs/whole/ckpt_0000060.pt")


# -----------------------------------------------------------------------------
# Data and files from strangers (downloads, bad text and damaged archives are in test_data.py)

def test_three_prepare_data_at_once(data, here, fork):
    """One works, the others are refused, or find it done; the folder is that of one alone."""
    source = data.parent / "text.jsonl"
    processes = [fork(prepare, source, here / "data", 5000, f"{i}.txt") for i in range(3)]
    codes, said = wait(*processes), [Path(f"{i}.txt").read_text() for i in range(3)]
    assert set(codes) <= {0, 2} and sum("training a tokenizer" in text for text in said) == 1
    names = sorted(p.name for p in data.iterdir())
    assert sorted(p.name for p in Path("data").iterdir()) == names
    assert all((data / name).read_bytes() == (here / "data" / name).read_bytes() for name in names)

def test_retry_after(monkeypatch, tmp_path):
    """A server that says how long to wait is given that time, up to a minute."""
    import requests
    slept, attempts = [], iter([("429", "7"), ("503", "3600"), ("503", "")])
    def fetch(url, part, hint):
        for code, after in attempts:
            reply = requests.Response()
            reply.headers["Retry-After"] = after
            raise requests.HTTPError(code, response=reply)
        part.write_bytes(b"x")
    monkeypatch.setattr(prepare_data, "fetch", fetch)
    monkeypatch.setattr(prepare_data.time, "sleep", slept.append)
    prepare_data.download("http://x", tmp_path / "x.parquet", lambda path: None, "a file", "check the URL")
    assert slept == [7, 60, prepare_data.RETRY_SECONDS * 8]

@pytest.mark.parametrize("name", ["tokenizer.tiktoken", "tokenizer.json", "token_bytes.npy", "train_00000.npy", "meta.json"])
def test_hostile_data(name, data, here):
    """A pickle, an array of objects, nesting that overflows a parser: refused in one line, and nothing of it is run."""
    shutil.copytree(data, "data")
    path, meta = Path("data", name), json.loads(Path("data/meta.json").read_text())
    for hostile in (lambda f: np.save(f, np.array([Evil()]), allow_pickle=True), lambda f: np.savez(f, Evil(), allow_pickle=True),
                    lambda f: torch.save(Evil(), f), lambda f: f.write(b"[" * 100_000), lambda f: pickle.dump(Evil(), f)):
        with open(path, "wb") as f:
            hostile(f)
        if name != "meta.json":  # its author gives the matching checksum
            for entry in meta["train"]:
                if entry["file"] == name:
                    entry["sha256"] = prepare_data.sha256_file(path)
            meta["tokenizer_sha256"] = prepare_data.tokenizer_sha256("data")
            Path("data/meta.json").write_text(json.dumps(meta))
        with pytest.raises(UserError) as e:
            prepare_data.open_data("data")
        assert "damaged" in str(e.value) and not Path("pwned").exists()
