"""speedrun.sh: the whole way with tiny settings, on a CPU; stopped half-way, and done again."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, TINY
from test_core import BUNDLE, real


def speedrun(folder, **env):
    """The script in a process of its own: (exit code, stdout, stderr). Its sizes are those of a toy."""
    source = folder / "text.txt"
    if not source.exists():
        source.write_text("".join(f"{n} times {n} is {n * n}, and what of it?\n" for n in range(4000)))
    size = [*TINY, "--num-iterations", 4, "--total-batch-size", 512, "--device", "cpu", "--dtype", "float32"]
    settings = dict(
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
        GPUS="2",
        SIZE=" ".join(map(str, size)),
        TRAINING="--eval-tokens 1024 --decode-tokens 0",
        SOURCE=f"{source} --vocab-size 300",
        EVALUATION="--eval core,bpb --split val --rows 4 --decode-rows 2 --device cpu "
                   f"--bundle {BUNDLE} --tasks copa,winograd --max-per-task 4",
        DATA=str(folder / "data"),
        RUNS=str(folder / "runs"),
    )
    done = subprocess.run(["bash", ROOT / "speedrun.sh"], capture_output=True, text=True, timeout=1500,
                          env=os.environ | settings | env)
    return done.returncode, done.stdout, done.stderr

def test_the_plan_comes_first_and_needs_nothing(tmp_path):
    code, out, err = speedrun(tmp_path, PLAN_ONLY="1", MODELS="control", SIZE="--depth 2 --device cpu")
    assert code == 0, err
    assert "== the plan of control: --lrt shared --inject kv" in out
    assert "at 40 % of the peak of 2 x NVIDIA H100" in out and "dollars at 24 an hour" in out
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}

    code, _, err = speedrun(tmp_path, PLAN_ONLY="1", MODELS="another")
    assert code == 2
    assert err == "error: no model 'another': MODELS is made of baseline, control, lrt\n"

@pytest.mark.slow
@real
def test_the_whole_way(tmp_path):
    code, out, err = speedrun(tmp_path)
    assert code == 0, err
    steps = [out.index(f"== {step}") for step in ("the plan of baseline", "data: ", "training: baseline",
                                                  "scores: baseline", "training: lrt", "to GPT-2's CORE")]
    assert steps == sorted(steps)
    for model in ("baseline", "control", "lrt"):
        results = json.loads((tmp_path / "runs" / model / "results.json").read_text())
        assert set(results["core"]["tasks"]) == {"copa", "winograd"}
        assert f"{model}: no CORE, BPB {results['val']['bpb']['merged']:.4f}, 0.00 hours" in out
        assert (tmp_path / "runs" / model / "ckpt_0000004.pt").exists()

    # again: nothing is done twice; what is missing is done, from where it stopped
    def times():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*") if path.name != ".lock"}

    before = times()
    code, again, err = speedrun(tmp_path)
    assert code == 0, err
    assert times() == before
    assert "== training" not in again and "already complete" in again
    assert again.splitlines()[-3:] == out.splitlines()[-3:]

    (tmp_path / "runs" / "lrt" / "results.json").unlink()
    code, again, err = speedrun(tmp_path, MODELS="lrt")
    assert code == 0, err
    trained = tmp_path / "runs" / "lrt" / "ckpt_0000004.pt"
    assert trained.stat().st_mtime_ns == before[trained]
    assert again.splitlines()[-1] == out.splitlines()[-1]
