"""The reproduction of the authors' run: their Muon, and the job on a tiny stand-in for their tokens."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, cli

from common import append_row, read_rows
from optim import Muon
from research import reproduction

FLAGS = [*TINY[:-2], "--source-layer", 1, "--total-batch-size", 256, "--lrt", "layerwise",
         "--num-iterations", 30, "--reference", "reference"]
UNFINISHED = Path("runs/reproduction/layerwise_30_s0.pt")


@pytest.fixture
def job(here):
    """The folder `reference` with random tokens."""
    rng = np.random.default_rng(0)
    arrays = dict(
        train=rng.integers(0, 64, 5000),
        val=rng.integers(0, 64, 2000),
        token_bytes=np.r_[np.ones(63), 0],
    )
    (here / "reference").mkdir()
    for name, array in arrays.items():
        np.save(here / "reference" / f"{name}.npy", array.astype(np.uint16))

def run(*flags):
    """Run the job to its end: what it printed."""
    code, out, err = cli("research.reproduction", *FLAGS, *flags)
    assert code == 0, err
    return out

@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_muon_as_the_release_has_it(shape):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = Muon([p], lr=0.1, **reproduction.RELEASE_MUON)
    for _ in range(3):
        before, p.grad = p.detach().clone(), torch.randn(shape)
        optimizer.step()
        step = (before - p.detach()) / 0.1 / max(1, shape[0] / shape[1]) ** 0.5
        assert step.norm().square() == pytest.approx(min(shape), rel=0.15)  # as if all singular values were 1
        assert torch.linalg.svdvals(step).max() < 1.3
        assert (step * p.grad).sum() > 0
        rms = step.square().mean(1 if shape[0] >= shape[1] else 0)
        assert rms.max() / rms.min() < 1.01 or before.norm() > 0  # the first mean is the first step's

def test_the_job(job, monkeypatch):
    out = run()
    assert "layerwise_30 seed 0: BPB pass 0" in out
    row, = read_rows("research/results/reproduction.jsonl")
    assert row["tokens"] == 30 * 256
    assert row["compute"] == 2 * row["tokens"]
    assert row["command"].startswith("python -m research.reproduction ")
    assert row["curve"][-1][1] < row["curve"][0][1] - 0.02
    assert row["bpb"]["decode"] == pytest.approx(row["bpb"]["merged"], abs=0.1)

    # a run that has a row is not run again, also if the row spells its command the old way
    assert "has a row" in run()
    old_command = row["command"].replace("python -m research.reproduction", "python ground.py")
    Path("old").mkdir()
    append_row("old/reproduction.jsonl", row | dict(set="ground", command=old_command))
    assert "has a row" in run("--results", "old")
    for folder in ("research/results", "old"):
        assert len(read_rows(f"{folder}/reproduction.jsonl")) == 1

    # interrupted behind its last step, and gone on with from the last save: the same run, bit for bit
    with monkeypatch.context() as patched:
        patched.setattr(reproduction, "SAVE_EVERY", 10)
        patched.setattr(reproduction, "score", lambda *_: sys.exit(7))
        assert cli("research.reproduction", *FLAGS, "--results", "other")[0] == 7
    assert UNFINISHED.exists()
    assert "step 00000/" not in run("--results", "other")
    assert not UNFINISHED.exists()
    again, = read_rows("other/reproduction.jsonl")
    assert again["bpb"] == row["bpb"]
    assert again["curve"] == row["curve"]

def test_the_job_with_the_muon_of_the_release(job, monkeypatch):
    run()
    row, = read_rows("research/results/reproduction.jsonl")
    shapes = []
    step = Muon.step

    def noting(self):
        shapes.append([p.shape for p in self.param_groups[0]["params"]])
        step(self)

    monkeypatch.setattr(Muon, "step", noting)
    run("--muon", "release", "--results", "third")
    third, = read_rows("third/reproduction.jsonl")
    assert len(shapes) == 30
    # the gates are with it, and it moves them
    assert any(min(shape) < 16 for shape in shapes[0])
    for gates in third["learned"]["gates"].values():
        assert all(gate != 1 for gate in gates.values())
    # the same start, another way, about as far
    assert third["curve"][0] == row["curve"][0]
    assert third["curve"][-1] != row["curve"][-1]
    assert third["curve"][-1][1] == pytest.approx(row["curve"][-1][1], abs=0.1)

def test_bad_flags(here):
    assert_refused(cli("research.reproduction", "--num-iterations", 0), "--num-iterations")
    assert_refused(cli("research.reproduction", "--reference", "nowhere"), "nowhere", "--reference")
