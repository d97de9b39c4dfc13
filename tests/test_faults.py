"""
Days of training, unattended: kills, full disks, lost files, dead processes, several nodes, hostile files; and
that any number of processes trains alike. run() and fork() start train.py in a process forked from one that
has imported everything, which costs a tenth of a command's start.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401 (meta tensors import it: here once, for all the processes)
import torch.distributed as dist
from helpers import ROOT, cli

import checkpointing
import common
import dataset
import optim
import prepare_data
import train
from checkpointing import load_checkpoint, new_run_folder, newest_checkpoint, read_log, read_run_id
from common import UserError
from eval_core import evaluate_bpb
from interleave import Schedule
from model import GPT, GPTConfig

TINY = (
    "--dtype float32 "  # the same on every machine
    "--depth 1 --aspect-ratio 16 --head-dim 8 --max-seq-len 16 --total-batch-size 128 --eval-tokens 112 "
    "--decode-tokens 32 --device cpu --warmup-steps 0 --eval-every 0 --save-every 0"
).split()
TWELVE = [*TINY, "--name", "x", "--num-iterations", 12, "--eval-every", 3, "--save-every", 2]


# -----------------------------------------------------------------------------
# Processes, forked from one that has imported this file

@pytest.fixture(scope="session")
def fork():
    """
    fork(function, *args) starts function(*args) in a process of its own and returns that, a
    multiprocessing.Process.
    """
    environment = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    started = []

    def start(function, *args):
        process = context.Process(target=function, args=args)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.kill()
    os.environ.clear()
    os.environ.update(environment)

def command(out, argv, env=None, prelude=None, *args):
    """
    Run train.py's command line in this process, its stdout and stderr appended to the file `out`, with these
    environment variables on top. prelude(*args) comes first.
    """
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        stream.reconfigure(line_buffering=True)
    os.environ |= env or {}
    sys.argv = ["train.py", *map(str, argv)]
    if prelude:
        prelude(*args)
    common.run_main(train.main)

# Ports below those that the kernel hands out (32768 and up): a group may be given its port long before it
# listens there, and until then a connection of another group must not get it. Each pytest has its own.
PORTS = itertools.count(20000 + os.getpid() % 250 * 50)

def free_port():
    """A port that nothing uses, and that no group was given before."""
    for port in PORTS:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return str(port)

def ranks(world_size):
    """The environment of each process of a group on this machine."""
    group = dict(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [group | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world_size)]

def wait(*processes, seconds=60):
    """The exit codes of processes; None for one that has not ended after so many seconds in all."""
    end = time.time() + seconds
    for process in processes:
        process.join(max(end - time.time(), 0))
    return [process.exitcode for process in processes]

def run(fork, out, *argv, prelude=None, args=(), world_size=1, seconds=120):
    """Run train.py to its end in so many processes: their exit codes, and what all of them printed."""
    out = Path(out).absolute()
    out.unlink(missing_ok=True)
    environments = ranks(world_size) if world_size > 1 else [None]
    processes = [fork(command, out, argv, env, prelude, *args) for env in environments]
    return wait(*processes, seconds=seconds), out.read_text()

def log(folder, kind="train"):
    """The rows of one kind in a run's log, which may be being written."""
    return [row for row in read_log(folder) if row["kind"] == kind]

def losses(folder):
    return [row["loss"] for row in log(folder)]

def numbers(folder):
    """All of a run's log that is computed, and not a time."""
    rows = read_log(folder)
    for row in rows:
        row.pop("dt", None)
        row.pop("run_id", None)
    return rows

def same_bits(path_a, path_b):
    """Are two checkpoints' weights, optimizer states, positions and random states the same?"""
    def equal(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, list):
            return len(x) == len(y) and all(map(equal, x, y))
        if isinstance(x, torch.Tensor):
            return torch.equal(x, y)
        return x == y

    a, b = load_checkpoint(path_a, shares=True), load_checkpoint(path_b, shares=True)
    keys = ("model", "optimizers", "step", "rows_seen", "torch_rng", "config", "schedule")
    return all(equal(a[key], b[key]) for key in keys)

def checkpoints(folder):
    """The names of a run's checkpoints, and of what a kill left of one."""
    return sorted(path.name for path in Path(folder).glob("ckpt*"))

def prepare(source, out, shard_tokens, said=os.devnull):
    """prepare_data.py in this process; what it prints goes to the file `said`."""
    sys.argv = ["prepare_data.py", str(source), "--out", str(out), "--vocab-size", "300",
                "--shard-tokens", str(shard_tokens)]
    with open(said, "w") as f, contextlib.redirect_stdout(f):
        common.run_main(prepare_data.main)

@pytest.fixture(scope="session")
def data(tmp_path_factory, fork):
    """Prepared data: some shards, more and smaller than those of conftest.py, and a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(json.__file__).read_text() + Path(contextlib.__file__).read_text()
    rows = [json.dumps({"text": part}) + "\n" for part in text.split("\n\n")]
    (folder / "text.jsonl").write_text("".join(rows))
    assert wait(fork(prepare, folder / "text.jsonl", folder / "data", 5000)) == [0]
    return folder / "data"

@pytest.fixture(scope="session")
def trained(data, tmp_path_factory, fork):
    """The folder of TWELVE without faults: 12 steps, evaluated every 3 steps and saved every 2."""
    folder = tmp_path_factory.mktemp("trained")
    codes, said = run(fork, folder / "out.txt", "--data", data, *TWELVE, "--out", folder, "--keep", 9)
    assert codes == [0], said
    return folder / "x"

def assert_as_trained(folder, trained):
    """A run that went through faults has the log and the last checkpoint of one that did not."""
    assert numbers(folder) == numbers(trained)
    assert same_bits(f"{folder}/ckpt_0000012.pt", trained / "ckpt_0000012.pt")


# -----------------------------------------------------------------------------
# Killed at any moment

def send_phases(pipe):
    """
    Send a letter at the beginning of each phase: r taking the log back, s a step, e an evaluation, w writing
    a checkpoint; d when that is done.
    """
    def announced(function, letter):
        def wrapped(*args, **kwargs):
            pipe.send_bytes(letter)
            return function(*args, **kwargs)
        return wrapped

    write, publish = checkpointing.write_tmp, checkpointing.publish

    def publish_announced(tmp, path):
        publish(tmp, path)
        pipe.send_bytes(b"d")

    train.rewind = announced(train.rewind, b"r")
    train.set_learning_rates = announced(train.set_learning_rates, b"s")
    train.evaluate_bpb = announced(train.evaluate_bpb, b"e")
    checkpointing.write_tmp = announced(write, b"w")
    checkpointing.publish = publish_announced

def kill_in_phase(fork, flags, phase, nth, delay):
    """
    Start train.py and kill it so many seconds after a phase has begun for the nth time. Returns the phase
    that it was really in.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = fork(command, "cut.txt", flags, None, send_phases, theirs)
    theirs.close()
    seen = 0
    while seen < nth:
        last = ours.recv_bytes().decode()
        if last == phase:
            seen += 1
    time.sleep(delay)
    process.kill()
    assert wait(process) == [-signal.SIGKILL], Path("cut.txt").read_text()[-2000:]
    with contextlib.suppress(EOFError):
        while True:
            last = ours.recv_bytes().decode()
    return last

def test_killed_at_24_random_moments(data, here, fork):
    """
    SIGKILL somewhere within a phase, and the same command again: in the end the log and the checkpoint of one
    long run, bit for bit.
    """
    flags = ["--data", data, *TINY, "--num-iterations", 150, "--eval-every", 3, "--save-every", 2,
             "--resume", "auto"]
    whole = fork(command, "whole.txt", [*flags, "--name", "whole"])
    rng = random.Random(6)
    kills = Counter()  # by phase
    torn = 0
    for phase in rng.sample("rrr" + 7 * "sew", 24):
        nth = 1 if phase == "r" else rng.randint(1, 4)
        killed_in = kill_in_phase(fork, [*flags, "--name", "cut"], phase, nth, rng.uniform(0, 0.002))
        kills[killed_in] += 1
        torn += any(Path("runs/cut").glob("*.tmp"))
    print(f"kills by phase: {dict(kills)}, {torn} of them left a half-written file")
    assert sum(kills.values()) == 24, kills
    assert min(kills[phase] for phase in "sew") >= 3, kills
    assert torn
    assert 20 < len(log("runs/cut")) < 150

    codes, said = run(fork, "cut.txt", *flags, "--name", "cut")
    assert codes == [0], said
    assert wait(whole) == [0]
    assert numbers("runs/cut") == numbers("runs/whole")
    assert len(log("runs/cut")) == 150
    assert len(log("runs/cut", "eval")) == 51
    assert checkpoints("runs/cut") == ["ckpt_0000148.pt", "ckpt_0000150.pt"]  # --keep 2
    for name in checkpoints("runs/cut"):
        assert same_bits(f"runs/cut/{name}", f"runs/whole/{name}")

def test_written_means_on_the_disk(here, monkeypatch):
    """A power cut is not tried: the order of the calls is."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(fd):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def noting_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    common.write_atomic("x", lambda f: f.write(b"x"))
    assert calls == ["file", "rename", "folder"]


# -----------------------------------------------------------------------------
# Damaged checkpoints, and commands that start and go on

class Evil:
    """A pickle of this makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)

def truncate_to(size):
    return lambda path: os.truncate(path, size)

def cut_last_byte(path):
    os.truncate(path, path.stat().st_size - 1)

def flip_a_bit(path):
    """One of the first tensor: torch.load would take it."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    load_checkpoint(path, verify=False)

def replace_by(value):
    return lambda path: torch.save(value, path)

@pytest.mark.parametrize("damage", [
    truncate_to(0),
    truncate_to(1),
    truncate_to(1000),
    truncate_to(50000),
    cut_last_byte,
    flip_a_bit,
    replace_by(Evil()),
    replace_by({"model": {}}),
])
def test_a_damaged_checkpoint_is_passed_over(damage, trained, here, monkeypatch, capsys):
    def resumed(path):
        """The flags and the checkpoint with which --resume goes on."""
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(path)])
        args, checkpoint, _ = train.parse_args()
        return train.verify_checkpoint(args, checkpoint, group=None)

    shutil.copytree(trained, "run")
    newest = Path("run/ckpt_0000012.pt")
    damage(newest)
    args, checkpoint = resumed("run")
    assert args.resume == "run/ckpt_0000010.pt"
    assert checkpoint["step"] == 10
    assert f"warning: {newest} is damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="damaged"):
        resumed(newest)  # the file itself was asked for
    assert not Path("pwned").exists()

def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(trained, here, fork):
    shutil.copytree(trained, "run")
    flip_a_bit(Path("run/ckpt_0000012.pt"))
    codes, said = run(fork, "out.txt", "--resume", "run")
    assert codes == [0], said
    assert "ckpt_0000012.pt is damaged" in said
    assert_as_trained("run", trained)

def test_a_run_without_a_whole_checkpoint_is_not_started_anew(trained, here):
    shutil.copytree(trained, "run")
    for path in Path("run").glob("*.pt"):
        os.truncate(path, 100)
    with pytest.raises(UserError, match="damaged"):
        newest_checkpoint("run")

def test_resume_auto(data, here, monkeypatch):
    """The same command starts and goes on; what would silently train another run is refused."""
    def parse(*argv):
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(data), *TINY, *argv])
        return train.parse_args()

    args, checkpoint, _ = parse("--resume", "auto", "--out", "./runs/")
    assert checkpoint is None
    for _ in range(2):
        assert new_run_folder(args.out, args.name, "default", exist_ok=True) == Path("runs/d1_shared")
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
# Numbers that are not finite, files that change, disks that are full

def at_step(actions):
    """Call actions[n]() when step n begins."""
    set_learning_rates = train.set_learning_rates

    def wrapped(optimizers, step, *args):
        if step in actions:
            actions[step]()
        return set_learning_rates(optimizers, step, *args)

    train.set_learning_rates = wrapped

def poison(bad_steps, bad_rank):
    """The loss of these steps is nan on one rank."""
    now = -1  # the step
    set_learning_rates = train.set_learning_rates

    def noting(optimizers, step, *args):
        nonlocal now
        now = step
        return set_learning_rates(optimizers, step, *args)

    class Poisoned(train.TrainStep):
        def forward(self, *args):
            loss, pass_losses = super().forward(*args)
            bad = now in bad_steps and os.environ.get("RANK", "0") == bad_rank
            return loss * float("nan") if bad else loss, pass_losses

    train.set_learning_rates = noting
    train.TrainStep = Poisoned

def eight_steps(data):
    return ["--data", data, *TINY, "--num-iterations", 8, "--save-every", 1, "--keep", 99]

@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_are_not_finite_are_skipped(world_size, data, here, fork):
    """By all processes alike, with a row in the log, and without a trace in weights and optimizers."""
    codes, said = run(fork, "out.txt", *eight_steps(data), "--name", "x", "--on-nonfinite", "skip",
                      prelude=poison, args=({2, 3, 5}, str(world_size - 1)), world_size=world_size)
    assert codes == [0] * world_size, said
    assert [row["step"] for row in log("runs/x", "skip")] == [2, 3, 5]
    assert [row["step"] for row in log("runs/x")] == [0, 1, 4, 6, 7]
    assert "the loss is nan" in log("runs/x", "skip")[0]["reason"]
    assert "warning: 3 steps were skipped" in said

    before, after, one_more = (load_checkpoint(f"runs/x/ckpt_{step:07d}.pt") for step in (2, 4, 5))
    for key in before["model"]:
        assert torch.equal(before["model"][key], after["model"][key])
    assert not torch.equal(after["model"]["lm_head.weight"], one_more["model"]["lm_head.weight"])
    assert after["optimizers"][0]["state"][0]["step"] == 2

@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_stops_the_run(world_size, data, here, fork):
    """The default."""
    codes, said = run(fork, "out.txt", *eight_steps(data), "--name", "y",
                      prelude=poison, args=({2}, str(world_size - 1)), world_size=world_size)
    assert codes == [2] * world_size
    assert "error: step 2: the loss is nan" in said
    assert "last good checkpoint is runs/y/ckpt_0000002.pt" in said

def test_ten_skipped_steps_in_a_row_stop_the_run(data, here, fork):
    codes, said = run(fork, "out.txt", *eight_steps(data), "--name", "z", "--num-iterations", 30,
                      "--on-nonfinite", "skip", prelude=poison, args=(range(4, 99), "0"))
    assert codes == [2]
    assert "error: step 13: the loss is nan" in said
    assert len(log("runs/z", "skip")) == train.MAX_SKIPS - 1

def change_shards(how, folder):
    """In step 5, truncate or rewrite the training shards, or remove those of the split `how`."""
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

    changes = dict(truncate=truncate, rewrite=rewrite, train=remove, val=remove)
    at_step({5: changes[how]})

@pytest.mark.parametrize("how", ["truncate", "rewrite", "train"])
def test_training_shards_change_under_a_run(how, data, trained, here, fork):
    shutil.copytree(data, "data")
    codes, said = run(fork, "out.txt", *TWELVE, prelude=change_shards, args=(how, Path("data")))
    assert codes == [2]
    assert said.splitlines()[-1].startswith("error: ")
    assert "data/train_0000" in said and "changed or removed" in said

    codes, said = run(fork, "out.txt", "--resume", "runs/x")
    assert codes == [2]
    assert "data/train_0000" in said.splitlines()[-1]

    shutil.rmtree("data")
    shutil.copytree(data, "data")
    codes, said = run(fork, "out.txt", "--resume", "runs/x")
    assert codes == [0], said
    assert numbers("runs/x") == numbers(trained)

def test_validation_shards_are_read_at_the_start(data, trained, here, fork):
    shutil.copytree(data, "data")
    codes, said = run(fork, "out.txt", *TWELVE, prelude=change_shards, args=("val", Path("data")))
    assert codes == [0], said
    assert not list(Path("data").glob("val_*"))
    assert numbers("runs/x") == numbers(trained)

@pytest.mark.parametrize("fault", ["truncated", "missing", "unreadable", "failing"])
def test_validation_shard_that_cannot_be_read(fault, data, here, monkeypatch):
    shutil.copytree(data, "data")
    path = Path("data/val_00000.npy")

    def failing_open(file, *args, **options):
        if file == path:
            raise OSError(5, "Input/output error")
        return open(file, *args, **options)

    if fault == "truncated":
        os.truncate(path, path.stat().st_size - 2)
    elif fault == "missing":
        path.unlink()
    elif fault == "unreadable":  # for root, too
        path.unlink()
        path.mkdir()
    else:
        monkeypatch.setattr(common, "open", failing_open, raising=False)
    with pytest.raises(UserError, match="val_00000.npy"):
        dataset.open_data("data")

def fill_disk(begin, end, size):
    """From step `begin` no file can grow beyond `size` bytes, until step `end`."""
    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    at_step({begin: lambda: limit(size), end: lambda: limit(resource.RLIM_INFINITY)})

def test_a_disk_that_is_full_for_a_while(data, trained, here, fork):
    """Nothing can be written, log and console included, and later there is room again: all is there."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=fill_disk, args=(3, 9, 1))
    assert codes == [0], said
    assert_as_trained("runs/x", trained)
    assert checkpoints("runs/x") == ["ckpt_0000010.pt", "ckpt_0000012.pt"]

def test_a_disk_that_stays_full(data, trained, here, fork):
    """The old checkpoints are still there, and the run goes on from them when there is room."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=fill_disk, args=(5, 99, 20000))
    assert codes == [2]
    assert said.count("was not saved: cannot write runs/x/ckpt_") == 4
    warning = ("warning: step 6 was not saved: cannot write runs/x/ckpt_0000006.pt: File too large; "
               "make room; training goes on, and the next save is the next try")
    error = ("error: step 12 was not saved: cannot write runs/x/ckpt_0000012.pt: File too large; "
             "make room, then --resume runs/x")
    assert warning in said
    assert said.splitlines()[-1] == error
    assert checkpoints("runs/x") == ["ckpt_0000002.pt", "ckpt_0000004.pt"]

    codes, said = run(fork, "out.txt", "--resume", "runs/x")
    assert codes == [0], said
    assert_as_trained("runs/x", trained)


def at_step_5(action):
    """Of TWELVE, when the checkpoint of step 4, which is written in the background, is there."""
    def act():
        while not Path("runs/x/ckpt_0000004.pt").exists():
            time.sleep(0.01)
        action()

    at_step({5: act})

def full_disk(faults):
    """Of {step: rank}, this rank cannot write its file of the checkpoint of that step."""
    write_tmp = checkpointing.write_tmp

    def failing_write(path, write):
        step = checkpointing.step_of(path.name.split(".")[0] + ".pt")
        if faults.get(step) == int(os.environ["RANK"]):
            raise OSError(28, "No space left on device")
        return write_tmp(path, write)

    checkpointing.write_tmp = failing_write

def test_a_share_that_cannot_be_written(data, here, fork):
    """Then there is no checkpoint, and no part of one, of no rank; the next one is whole."""
    flags = ["--data", data, *TWELVE, "--keep", 9]
    codes, said = run(fork, "out.txt", *flags, prelude=full_disk, args=({4: 1, 6: 0},), world_size=2)
    assert codes == [0, 0], said
    assert said.count("warning: step 4 was not saved: rank 1: cannot write runs/x/ckpt_") == 1
    assert said.count("warning: step 6 was not saved: cannot write runs/x/ckpt_") == 1
    names = [f"ckpt_{step:07d}{end}" for step in (2, 8, 10, 12) for end in (".pt", ".share_1.pt")]
    assert checkpoints("runs/x") == names

    codes, said = run(fork, "out.txt", *flags, "--name", "y", prelude=full_disk, args=({12: 1},),
                      world_size=2)
    assert codes == [2, 2]  # both know it
    assert "error: step 12 was not saved: rank 1: cannot write" in said

def when_rank_0_says(steps):
    """The minutes are over on rank 0 at these steps, on the others at all: their clocks do not matter."""
    calls = itertools.count()

    def minutes_over(self, minutes):
        assert minutes == 0.5
        step = next(calls)
        return step in steps or self.rank > 0

    checkpointing.Saver.minutes_over = minutes_over

@pytest.mark.parametrize("world_size", [1, 2])
def test_saved_by_the_minute(world_size, data, here, fork):
    codes, said = run(fork, "out.txt", "--data", data, *TINY, "--num-iterations", 8, "--save-minutes", 0.5,
                      "--keep", 9, "--name", "x", prelude=when_rank_0_says, args=({2, 3, 6},),
                      world_size=world_size)
    assert codes == [0] * world_size, said
    steps = [checkpointing.step_of(path) for path in checkpointing.list_checkpoints("runs/x")]
    assert steps == [3, 4, 7, 8]

def slow_disk():
    """Every checkpoint takes a second."""
    write_tmp = checkpointing.write_tmp

    def slow_write(path, write):
        time.sleep(1)
        return write_tmp(path, write)

    checkpointing.write_tmp = slow_write

def slow_copy():
    """Every copy takes longer than the forward and backward that run beside it."""
    finish_copy = checkpointing.Saver.finish_copy

    def slow(self, copies):
        time.sleep(0.5)
        finish_copy(self, copies)

    checkpointing.Saver.finish_copy = slow

def test_weights_do_not_change_while_they_are_copied(data, trained, here, fork):
    """A checkpoint has the bits of its step, although training goes on; and so does all of the run."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, "--keep", 9, prelude=slow_copy)
    assert codes == [0], said
    assert numbers("runs/x") == numbers(trained)
    assert checkpoints("runs/x") == checkpoints(trained)
    for name in checkpoints("runs/x"):
        assert same_bits(f"runs/x/{name}", trained / name), name

def stop_in_step_5():
    slow_disk()
    at_step({5: lambda: os.kill(os.getpid(), signal.SIGTERM)})

def test_sigterm_waits_for_the_checkpoint(data, trained, here, fork):
    """On two processes, one of which is stopped, with a disk that is slower than the steps."""
    flags = ["--data", data, *TWELVE]
    environments = ranks(2)
    processes = [fork(command, "0.txt", flags, environments[0], stop_in_step_5),
                 fork(command, "1.txt", flags, environments[1], slow_disk)]
    assert wait(*processes, seconds=120) == [0, 0], Path("0.txt").read_text()
    assert checkpoints("runs/x")[-2:] == ["ckpt_0000006.pt", "ckpt_0000006.share_1.pt"]
    assert not list(Path("runs/x").glob("*.tmp"))

def remove_log():
    os.unlink("runs/x/log.jsonl")

def remove_folder():
    shutil.rmtree("runs")

def move_folder():
    os.rename("runs/x", "runs/y")

@pytest.mark.parametrize("action", [remove_log, remove_folder, move_folder])
def test_the_run_folder_is_removed_or_moved(action, data, trained, here, fork):
    """It is put back at the next save, with the whole log, its tokenizer, and its lock; which is said."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=at_step_5, args=(action,))
    assert codes == [0], said
    assert said.count("warning: runs/x/log.jsonl was moved or removed: it was written again") == 1
    assert_as_trained("runs/x", trained)
    for name in ("tokenizer.json", "tokenizer.tiktoken", ".lock"):
        assert Path("runs/x", name).exists()
    codes, said = run(fork, "out.txt", "--resume", "runs/x")
    assert codes == [0], said

def other_run_in_its_place():
    shutil.rmtree("runs/x")
    Path("runs/x").mkdir()
    Path("runs/x/log.jsonl").write_text('{"kind": "run", "step": 0, "run_id": "another"}\n')

def training_in_its_place():
    """What the lock is held for."""
    shutil.rmtree("runs/x")
    training_in_its_place.lock = common.lock("runs/x", "test")

@pytest.mark.parametrize("action, words", [
    (other_run_in_its_place, "runs/x is the folder of another run now"),
    (training_in_its_place, "another training is writing runs/x"),
])
def test_another_run_takes_the_place_of_the_folder(action, words, data, here, fork):
    """Nothing of it is touched."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=at_step_5, args=(action,))
    assert codes == [2], said
    assert words in said.splitlines()[-1]
    assert checkpoints("runs/x") == []

def test_a_checkpoint_of_another_run_is_not_gone_on_with(data, trained, here, fork):
    """Under the right name, with the right step, and even of the same flags but for the seed."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, "--seed", 1)
    assert codes == [0], said
    shutil.copy(trained / "ckpt_0000012.pt", "runs/x")
    before = {path.name: path.read_bytes() for path in Path("runs/x").iterdir()}
    for path in ("runs/x", "runs/x/ckpt_0000012.pt"):
        codes, said = run(fork, "out.txt", "--resume", path)
        assert codes == [2]
        assert "ckpt_0000012.pt is of another run than the log beside it" in said
    assert {path.name: path.read_bytes() for path in Path("runs/x").iterdir()} == before

    # in a folder of its own it is gone on with, and begins the log of its run
    Path("y").mkdir()
    os.rename("runs/x/ckpt_0000012.pt", "y/ckpt_0000012.pt")
    codes, said = run(fork, "out.txt", "--resume", "y")
    assert codes == [0], said
    assert read_run_id("y") == read_run_id(trained) != read_run_id("runs/x")

def test_a_run_from_before_there_were_ids(data, trained, here, fork):
    shutil.copytree(trained, "run")
    Path("run/ckpt_0000012.pt").unlink()
    for path in Path("run").glob("*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["run_id"]
        torch.save(checkpoint, path)
    lines = Path("run/log.jsonl").read_text().splitlines(keepends=True)
    Path("run/log.jsonl").write_text("".join(lines[1:]))
    codes, said = run(fork, "out.txt", "--resume", "run")
    assert codes == [0], said
    assert numbers("run") == numbers(trained)[1:]
    assert read_run_id("run") is None


def die_in_evaluation(step):
    """SIGKILL in the evaluation of this step, when its checkpoint is there: it is written meanwhile."""
    def die(*args, **options):
        end = time.time() + 60
        while not Path(f"runs/x/ckpt_{step:07d}.pt").exists() and time.time() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    at_step({step - 1: lambda: setattr(train, "evaluate_bpb", die)})

def diverge_in_evaluation(step):
    """The evaluation of this step gives nan."""
    evaluate_bpb = train.evaluate_bpb

    def nan(*args, **options):
        bpb, by_position = evaluate_bpb(*args, **options)
        return bpb | {"merged": float("nan")}, by_position

    at_step({step - 1: lambda: setattr(train, "evaluate_bpb", nan)})

@pytest.mark.parametrize("step", [6, 12])
def test_a_run_is_saved_before_it_is_evaluated(step, data, trained, here, fork):
    """
    Or while it is, but not after it. What dies in an evaluation goes on from that step, and evaluates it
    once.
    """
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, prelude=die_in_evaluation, args=(step,))
    assert codes == [-signal.SIGKILL], said
    assert checkpoints("runs/x")[-1] == f"ckpt_{step:07d}.pt"
    for _ in range(2):  # the second time, it is at its end and has all evaluations
        codes, said = run(fork, "out.txt", "--resume", "runs/x")
        assert codes == [0], said
    assert_as_trained("runs/x", trained)
    assert [row["step"] for row in log("runs/x", "eval")] == [0, 3, 6, 9, 12]
    assert checkpoints("runs/x") == ["ckpt_0000010.pt", "ckpt_0000012.pt"]

def test_a_checkpoint_whose_evaluation_is_not_finite_is_not_the_newest(data, here, fork):
    """And the one before it is still there, whatever --keep is."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, "--keep", 1,
                      prelude=diverge_in_evaluation, args=(6,))
    assert codes == [2], said
    assert "error: step 6: the validation BPB is nan; the last good checkpoint is runs/x/ckpt_0000004" in said
    assert checkpoints("runs/x") == ["ckpt_0000004.pt"]
    assert checkpoints("runs/x/set_aside") == ["ckpt_0000006.pt"]


# -----------------------------------------------------------------------------
# Several processes and nodes

def late_for_the_others(folder, env):
    """Rank 1 verifies its data for longer than a collective may take."""
    os.environ |= env
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    group, patient_group = common.side_group(timedelta(seconds=5)), common.side_group(train.PATIENCE)
    if env["RANK"] == "1":
        time.sleep(7)
    common.wait_for_all(patient_group)
    assert common.from_all_ranks(env["RANK"], group) == ["0", "1"]

def test_ranks_wait_for_one_that_verifies_its_data(here, fork):
    assert wait(*[fork(late_for_the_others, here, env) for env in ranks(2)]) == [0, 0]

def test_what_train_py_hands_on(data, here, monkeypatch):
    """
    Ranks that verify their data are waited for in a group that is patient, the thread that saves has one of
    its own, the run's folder is told what the data's does not take, and checkpoints have the commit.
    """
    shutil.copytree(data, "data", ignore=shutil.ignore_patterns("verified.jsonl"))
    Path("data/verified.jsonl").mkdir()
    waited, groups = [], []

    class NotingSaver(checkpointing.Saver):
        def __init__(self, folder, log, keep, group):
            super().__init__(folder, log, keep)
            groups.append(group)

    monkeypatch.setattr(train, "side_group", lambda timeout: timeout)
    monkeypatch.setattr(train, "wait_for_all", waited.append)
    monkeypatch.setattr(train, "Saver", NotingSaver)
    monkeypatch.setattr(train, "code_commit", lambda: "0123abc")
    code, _, err = cli("train.py", "--data", "data", *TINY, "--num-iterations", 1, "--name", "x")
    assert code == 0, err
    assert waited == [train.PATIENCE] and train.PATIENCE > 10 * train.TIMEOUT
    assert groups == [train.TIMEOUT]
    noted = Path("runs/x/verified.jsonl").read_text()
    assert noted.count(".npy") == len(list(data.glob("*_0*.npy")))
    assert load_checkpoint("runs/x/ckpt_0000001.pt")["commit"] == "0123abc"

def limit_patience(seconds):
    train.TIMEOUT = timedelta(seconds=seconds)

@pytest.mark.parametrize("sig, seconds, words", [
    (signal.SIGKILL, 600, "rank 1 died in step"),
    (signal.SIGSTOP, 3, "time"),
])
def test_a_process_that_dies_or_hangs(sig, seconds, words, data, here, fork):
    """
    The other one ends, and says why. seconds: what a collective may take; where the watchdog does not time a
    rank, that is all there is (test_watchdog.py has the rest).
    """
    flags = ["--data", data, *TINY, "--num-iterations", 10**6, "--log-every", 1]
    processes = []
    for env in ranks(2):
        processes.append(fork(command, f"{env['RANK']}.txt", flags, env, limit_patience, seconds))
    one, two = processes
    console = Path("0.txt")
    while not (console.exists() and "step 00003/" in console.read_text()):
        assert one.is_alive() and two.is_alive()
        time.sleep(0.05)

    os.kill(two.pid, sig)
    before = time.time()
    assert wait(one) not in ([0], [None])
    assert time.time() - before < 60
    assert words in console.read_text().splitlines()[-1].lower()  # gloo has several ways to say it

def test_nodes_without_a_shared_folder(data, trained, here, fork):
    """One finds the checkpoint, the other does not: refused, not trained apart."""
    shutil.copytree(trained, "a/runs/x")
    Path("b").mkdir()
    flags = ["--data", data, *TWELVE, "--resume", "auto"]
    processes = []
    for node, env in zip("ab", ranks(2), strict=True):
        processes.append(fork(command, here / f"{node}.txt", flags, env, os.chdir, node))
    assert wait(*processes) == [2, 2]
    for node in "ab":
        said = (here / f"{node}.txt").read_text()
        assert "error: the processes found checkpoints of different steps, [0, 12]" in said

VARIANTS = {
    "none": "--lrt none",
    "layerwise": "--lrt layerwise --depth 2",
    "interleaved": "--lrt shared --schedule interleaved",
    "kv_refresh": "--lrt shared --subsets 3 --kv-refresh",
    "refine": "--lrt shared --schedule refine --refinements 2",
    "draft": "--lrt shared --schedule draft",
    "pass_mix": "--lrt shared --schedule draft --first-memory embedding --pass-mix 2 1 1",
    "chunked": "--lrt shared --schedule chunked --chunk 3",
    "sequential": "--lrt shared --schedule sequential",
}

def many(out, commands, prelude):
    """Several command lines of train.py in this process, one after another: (argv, environment) each."""
    if prelude:
        prelude()
    for argv, env in commands:
        command(out, argv, env)

def products_in_float32():
    """Of Muon, as on a CPU without bf16 instructions."""
    optim.product_dtype = lambda p: torch.float32

def in_float64():
    torch.set_default_dtype(torch.float64)
    train.training_dtype = lambda device, name: torch.float64

def worst_difference(fork, data, names, world_sizes, prelude):
    """
    Train some of VARIANTS for 50 steps on 1, 2, .. processes. The largest relative difference of a loss to
    that of the first of world_sizes, by name.
    """
    fifty = ["--data", data, *TINY, "--max-seq-len", 4, "--window-pattern", "SL", "--total-batch-size", 64,
             "--device-batch-size", 4, "--num-iterations", 50, "--eval-tokens", 8, "--decode-tokens", 0]
    processes = []
    for world_size in world_sizes:
        commands = [[] for _ in range(world_size)]  # of each rank
        for name in names:
            argv = [*fifty, *VARIANTS[name].split(), "--name", f"{name}_{world_size}"]
            for of_rank, env in zip(commands, ranks(world_size), strict=True):
                of_rank.append((argv, env if world_size > 1 else {}))
        for of_rank in commands:
            processes.append(fork(many, f"{world_size}.txt", of_rank, prelude))
    codes = wait(*processes, seconds=300)
    assert set(codes) == {0}, "".join(path.read_text()[-2000:] for path in Path().glob("*.txt"))

    worst = {}
    for name in names:
        first, *others = (losses(f"runs/{name}_{world_size}") for world_size in world_sizes)
        assert len(first) == 50
        assert first[-1] < first[0] - 1
        worst[name] = max(abs(a - b) / a for other in others for a, b in zip(first, other, strict=True))
    print("largest relative difference of a loss:", {name: f"{x:.1e}" for name, x in worst.items()})
    return worst

def test_1_2_and_4_processes_train_alike(data, here, fork):
    """
    50 steps of every variant and schedule in float32, at the full learning rates; one and two processes need
    several micro-batches a step. A gradient's sum depends, in its last bit, on its order; optimizers that
    normalize amplify that where it is close to zero, to 3e-6 of a loss here. Muon's products are in float32:
    in bf16 that last bit can become one of bf16, and the losses are up to 1e-2 apart.
    """
    variants = [name for name in VARIANTS if name != "pass_mix"]  # 2e-5 apart, in float64 as close as all
    worst = worst_difference(fork, data, variants, (1, 2, 4), prelude=products_in_float32)
    assert max(worst.values()) < 1e-5, worst

def test_processes_train_alike_at_full_learning_rates_in_float64(data, here, fork):
    variants = ["none", "layerwise", "refine", "pass_mix"]
    worst = worst_difference(fork, data, variants, (1, 2), prelude=in_float64)
    assert max(worst.values()) < 1e-9, worst

def test_another_number_of_processes_goes_on(data, here, fork):
    """4 steps on two processes, 4 on one, 4 on four: as 12 on one, in float64."""
    flags = ["--data", data, *TINY, "--num-iterations", 12, "--save-every", 4]
    codes, said = run(fork, "whole.txt", *flags, "--name", "whole", prelude=in_float64)
    assert codes == [0], said
    codes, said = run(fork, "out.txt", *flags, "--name", "x", "--keep", 9, prelude=in_float64, world_size=2)
    assert codes == [0, 0], said
    for world_size, step in ((1, 4), (4, 8)):
        codes, said = run(fork, "out.txt", "--resume", f"runs/x/ckpt_{step:07d}.pt",
                          prelude=in_float64, world_size=world_size)
        assert codes == [0] * world_size, said
    assert len(losses("runs/whole")) == 12
    assert losses("runs/whole") == pytest.approx(losses("runs/x"), rel=1e-9)

def test_four_processes_go_on_bit_for_bit(data, here, fork):
    """
    On more than two, the order of a gradient's sum depends on its place in DDP's buckets, which are put into
    another order after the first backward of a process.
    """
    flags = ["--data", data, *TINY, "--num-iterations", 6, "--save-every", 2, "--keep", 9]
    codes, said = run(fork, "out.txt", *flags, "--name", "whole", world_size=4)
    assert codes == [0] * 4, said
    Path("runs/x").mkdir()
    for path in Path("runs/whole").iterdir():
        if not re.match("ckpt_000000[46]", path.name):
            shutil.copy(path, "runs/x")
    codes, said = run(fork, "out.txt", "--resume", "runs/x", world_size=4)
    assert codes == [0] * 4, said
    assert numbers("runs/x") == numbers("runs/whole")
    assert same_bits("runs/x/ckpt_0000006.pt", "runs/whole/ckpt_0000006.pt")

def note_rows(folder):
    """Write down which rows this process is given, and what is in them."""
    batch = dataset.Rows.batch

    def noting(self, first, count, device):
        idx, targets = batch(self, first, count, device)
        with open(f"{folder}/rows{os.environ['RANK']}.jsonl", "a") as f:
            for i in range(count):
                f.write(json.dumps([first + i, idx[i].tolist()]) + "\n")
        return idx, targets

    dataset.Rows.batch = noting

@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_rows(world_size, data, here, fork):
    """
    Every row of an epoch in one process, once; the epoch ends within a step, and the next one begins there.
    """
    T = 128
    batch = 16  # rows a step
    shards = dataset.open_data(data).train
    per_epoch = dataset.Rows(shards, T, 0).per_epoch
    steps = per_epoch // batch + 2
    assert per_epoch % batch
    flags = ["--data", data, *TINY, "--max-seq-len", T, "--total-batch-size", T * batch,
             "--device-batch-size", 2, "--num-iterations", steps, "--eval-tokens", T, "--decode-tokens", 0]
    codes, said = run(fork, "out.txt", *flags, prelude=note_rows, args=(here,), world_size=world_size)
    assert codes == [0] * world_size, said

    rows = {}
    for rank in range(world_size):
        lines = Path(f"rows{rank}.jsonl").read_text().splitlines()
        # the first micro-batch of the step after the last is loaded, too
        of_rank = [(n, tuple(tokens)) for n, tokens in map(json.loads, lines) if n < steps * batch]
        assert len(of_rank) == steps * batch // world_size
        rows |= dict(of_rank)
    assert sorted(rows) == list(range(steps * batch))

    expected = set()
    for shard in shards:
        for r in range((len(shard) - 1) // T):
            expected.add(tuple(shard[r * T:r * T + T].tolist()))
    assert len(expected) == per_epoch
    assert {rows[n] for n in range(per_epoch)} == expected
    assert len({rows[n] for n in range(per_epoch, steps * batch)}) == steps * batch - per_epoch

def evaluate(folder, env):
    """BPB of 7 rows and of 3, of a model that is the same everywhere."""
    os.environ |= env
    if env:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_kv_head=2, n_embd=16,
                          lrt="shared"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    rows = torch.randint(0, 32, (7, 9))
    n_bytes = torch.arange(32) % 5
    found = [evaluate_bpb(model, rows[:n], n_bytes, Schedule(), 1, decode=True)[0] for n in (7, 3)]
    path = Path(folder, f"bpb_{env.get('WORLD_SIZE')}_{env.get('RANK')}.json")
    path.write_text(json.dumps(found))

def test_evaluation_is_the_same_on_any_number_of_processes(here, fork):
    """
    Rows that the processes do not divide, fewer than processes among them: the exact sum, in every process.
    """
    environments = [{}, *ranks(2), *ranks(4)]
    assert wait(*[fork(evaluate, here, env) for env in environments]) == [0] * 7
    one = json.loads((here / "bpb_None_None.json").read_text())
    assert set(one[0]) >= {"merged", "decode"}
    paths = list(here.glob("bpb_[24]_*.json"))
    assert len(paths) == 6
    for path in paths:
        for alone, shared in zip(one, json.loads(path.read_text()), strict=True):
            assert alone == pytest.approx(shared, rel=1e-13)

def children(pid):
    """The ids of a process's children."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found

class Nodes:
    """Agents of torchrun, one process each, that train together; their consoles are agent0.txt, .."""

    def __init__(self, flags):
        self.flags = flags
        self.port = ranks(1)[0]["MASTER_PORT"]
        self.agents = []

    def start(self):
        """Start one more agent: a subprocess.Popen."""
        torchrun = [
            Path(sys.executable).parent / "torchrun",
            "--nnodes=2",
            "--nproc_per_node=1",
            "--max-restarts=5",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint=127.0.0.1:{self.port}",
            "--rdzv_id=x",
            "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1",
        ]
        argv = list(map(str, [*torchrun, ROOT / "train.py", *self.flags]))
        env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(f"agent{len(self.agents)}.txt", "w") as f:
            self.agents.append(subprocess.Popen(argv, stdout=f, stderr=f, env=env))
        return self.agents[-1]

    def start_host(self):
        """Start the agent that hosts the rendezvous, and so has to stay; wait until it does."""
        agent = self.start()
        while socket.socket().connect_ex(("127.0.0.1", int(self.port))):
            time.sleep(0.05)
        return agent

    def consoles(self):
        return "".join(path.read_text()[-3000:] for path in Path().glob("agent*.txt"))

    def kill_all(self):
        for agent in self.agents:
            if agent.poll() is None:
                for pid in [*children(agent.pid), agent.pid]:
                    os.kill(pid, signal.SIGKILL)

def test_two_nodes(data, here, fork):
    """
    Two agents of torchrun, one process each. A process is killed: torchrun starts both again. A node is
    killed, agent and process, and comes back: the same. The log is that of two processes that nobody touched,
    bit for bit.
    """
    flags = ["--data", data, *TINY, "--num-iterations", 60, "--eval-every", 20, "--save-every", 5,
             "--resume", "auto"]
    whole = [fork(command, "whole.txt", [*flags, "--name", "whole"], env) for env in ranks(2)]
    nodes = Nodes([*flags, "--name", "x"])

    def until(steps):
        end = time.time() + 120
        while len(log("runs/x")) < steps:
            assert time.time() < end, nodes.consoles()
            time.sleep(0.02)

    try:
        first = nodes.start_host()
        second = nodes.start()
        until(12)
        os.kill(children(first.pid)[0], signal.SIGKILL)
        until(32)
        for pid in [second.pid, *children(second.pid)]:
            os.kill(pid, signal.SIGKILL)
        third = nodes.start()
        assert [agent.wait(120) for agent in (first, third)] == [0, 0], nodes.consoles()
    finally:
        nodes.kill_all()
    assert wait(*whole) == [0, 0]
    assert "exitcode: -9" in Path("agent0.txt").read_text()  # torchrun gives the reason
    assert numbers("runs/x") == numbers("runs/whole")
    assert same_bits("runs/x/ckpt_0000060.pt", "runs/whole/ckpt_0000060.pt")


# -----------------------------------------------------------------------------
# Data and files from strangers (downloads, bad text and damaged archives are in test_prepare_data.py)

def test_three_prepare_data_at_once(data, here, fork):
    """One works, the others are refused, or find it done; the folder is that of one alone."""
    source = data.parent / "text.jsonl"
    processes = [fork(prepare, source, here / "data", 5000, f"{i}.txt") for i in range(3)]
    assert set(wait(*processes)) <= {0, 2}
    said = [Path(f"{i}.txt").read_text() for i in range(3)]
    assert sum("training a tokenizer" in text for text in said) == 1
    names = sorted(path.name for path in data.iterdir() if path.name != "verified.jsonl")
    assert sorted(path.name for path in Path("data").iterdir()) == names
    for name in names:
        assert (data / name).read_bytes() == (here / "data" / name).read_bytes()

def test_retry_after(monkeypatch, tmp_path):
    """A server that says how long to wait is given that time, up to a minute."""
    import requests
    slept = []
    # status and Retry-After
    attempts = iter([("429", "7"), ("503", "3600"), ("503", ""), ("429", "9" * 5000)])

    def fetch(url, part, hint):
        for code, after in attempts:
            reply = requests.Response()
            reply.headers["Retry-After"] = after
            raise requests.HTTPError(code, response=reply)
        part.write_bytes(b"x")

    monkeypatch.setattr(prepare_data, "fetch", fetch)
    monkeypatch.setattr(prepare_data.time, "sleep", slept.append)
    prepare_data.download("http://x", tmp_path / "x.parquet", lambda path: None, "a file", "check the URL")
    assert slept == [7, 60, prepare_data.RETRY_SECONDS * 8, 60]

HOSTILE = {
    "an array of objects": lambda f: np.save(f, np.array([Evil()]), allow_pickle=True),
    "an archive of objects": lambda f: np.savez(f, Evil(), allow_pickle=True),
    "a file of torch": lambda f: torch.save(Evil(), f),
    "nesting that overflows a parser": lambda f: f.write(b"[" * 100_000),
    "a pickle": lambda f: pickle.dump(Evil(), f),
}

@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", [
    "tokenizer.tiktoken",
    "tokenizer.json",
    "token_bytes.npy",
    "train_00000.npy",
    "meta.json",
])
def test_hostile_data(name, write, data, here):
    """Refused in one line, and nothing of it is run."""
    shutil.copytree(data, "data")
    path = Path("data", name)
    with open(path, "wb") as f:
        write(f)
    if name != "meta.json":  # its author gives the matching checksum
        meta = json.loads(Path("data/meta.json").read_text())
        for entry in meta["train"]:
            if entry["file"] == name:
                entry["sha256"] = common.sha256_file(path)
        meta["tokenizer_sha256"] = dataset.tokenizer_sha256("data")
        Path("data/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError) as e:
        dataset.open_data("data")
    assert "damaged" in str(e.value)
    assert not Path("pwned").exists()
