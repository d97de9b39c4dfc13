"""Weights & Biases: what is handed on, that a resumed run is the same, and that no failure ends training."""

import importlib.util
import json
import math
import struct
from pathlib import Path

import pytest
from helpers import SMALL, assert_refused, cli, log, shell

from checkpointing import Log
from tracking import Tracker, metrics

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


class FakeRun:
    """What Tracker uses of a run of wandb."""

    def __init__(self, error=None):
        self.error = error
        self.logged = []

    def log(self, found):
        if self.error:
            raise self.error
        self.logged.append(found)

def tracker_of(run):
    tracker = Tracker.__new__(Tracker)
    tracker.run = run
    return tracker


def test_metrics_are_the_numbers_of_a_row():
    learned = dict(c=[0.1, 0.2], gates={0: {"memory": 1.0}})
    row = dict(kind="eval", step=7, bpb={"merged": 1.5}, learned=learned, reason="text",
               passes=[None, 2.0, math.nan])
    assert metrics(row) == {
        "step": 7,
        "eval/bpb/merged": 1.5,
        "eval/learned/c/0": 0.1,
        "eval/learned/c/1": 0.2,
        "eval/learned/gates/0/memory": 1.0,
        "eval/passes/1": 2.0,
    }

def test_the_log_hands_its_rows_on(here):
    run_log = Log(here)
    run_log.add(kind="train", step=0, loss=3.0)
    run_log.tracker = tracker_of(FakeRun())
    run_log.add(kind="train", step=1, loss=2.0)
    assert run_log.tracker.run.logged == [{"step": 1, "train/loss": 2.0}]
    assert [row["step"] for row in log(here)] == [0, 1]
    # another rank has no run, and hands nothing on
    other = Log(here, rank=1)
    other.tracker = tracker_of(FakeRun())
    other.add(kind="train", step=2, loss=2.0)
    assert other.tracker.run.logged == []

def test_a_failure_is_said_once(here, capsys):
    run_log = Log(here)
    run_log.tracker = tracker_of(FakeRun(ConnectionError("no route\nto host")))
    for step in range(3):
        run_log.add(kind="train", step=step, loss=2.0)
    assert len(log(here)) == 3
    out = capsys.readouterr().out
    assert out.count("warning: wandb failed (ConnectionError: no route)") == 1

def test_wandb_is_missed_before_the_work(data, here, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # its import fails
    result = cli("train.py", "--data", data, *SMALL, "--num-iterations", 1, "--wandb", "x")
    assert_refused(result, "pip install wandb")
    assert not Path("runs").exists()
    assert cli("train.py", *SMALL, "--num-iterations", 1, "--wandb", "x", "--dry-run")[0] == 0

@needs_wandb
def test_a_key_that_cannot_be_one(data, here):
    """It is said before the work, without a network."""
    done = shell("train.py", "--data", data, *SMALL, "--num-iterations", 1, "--wandb", "x",
                 WANDB_MODE="online", WANDB_API_KEY="short", WANDB_SILENT="true")
    assert done.returncode == 2
    assert done.stderr.strip().split("\n")[-1].startswith("error: wandb does not know who you are")
    assert not Path("runs").exists()

def offline_runs(folder):
    return sorted(Path(folder, "wandb").glob("offline-run-*"))

def records(folder):
    """
    All that wandb wrote of an offline run: config, history, and so on. The file is a LevelDB log behind 7
    bytes of its own: blocks of 32 KB, records in parts, each behind a checksum, its length and its type.
    """
    from wandb.proto import wandb_internal_pb2
    raw = next(Path(folder).glob("*.wandb")).read_bytes()
    found = []
    position, part = 7, b""
    while position + 7 <= len(raw):
        if position % 32768 > 32768 - 7:  # no header fits into the rest of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", raw, position + 4)
        part += raw[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found

def history(folder):
    """The rows that were handed on: a list of {metric: value}."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                row[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            rows.append(row)
    return rows

@needs_wandb
def test_offline_run_and_its_resumption(data, here):
    """Everything in log.jsonl is in wandb's files; the resumed run has the same id, and goes on."""
    flags = ["--data", data, *SMALL, "--name", "x", "--eval-every", 4, "--save-every", 2, "--wandb", "w"]
    env = dict(WANDB_MODE="offline", WANDB_SILENT="true")
    done = shell("train.py", *flags, "--num-iterations", 6, **env)
    assert done.returncode == 0, done.stderr
    first, = offline_runs("runs/x")
    run_id = log("runs/x", "run")[0]["run_id"]
    assert first.name.endswith(run_id)
    rows = history(first)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(6))
    losses = [row["loss"] for row in log("runs/x")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == losses
    evaluations = [row for row in rows if "eval/bpb/merged" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 6]
    assert evaluations[-1]["eval/decode_rows/decode"] == log("runs/x", "eval")[-1]["decode_rows"]["decode"]
    assert "eval/learned/c/1" in evaluations[0]
    assert "eval/learned/gates/0/memory" in evaluations[0]
    assert any("sample" in key for row in rows for key in row)
    configs = [r for r in records(first) if r.WhichOneof("record_type") == "run"]
    keys = {item.key for item in configs[0].run.config.update}
    assert {"matrix_lr", "n_layer", "num_iterations"} <= keys

    # from step 4 on again; the flag is the run's own and need not be given
    done = shell("train.py", "--resume", "runs/x/ckpt_0000004.pt", **env)
    assert done.returncode == 0, done.stderr
    second = offline_runs("runs/x")[-1]
    assert second != first
    assert second.name.endswith(run_id)
    assert [row["step"] for row in history(second) if "train/loss" in row] == [4, 5]
    assert [row["step"] for row in log("runs/x")] == list(range(6))
