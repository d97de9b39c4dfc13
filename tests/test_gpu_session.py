"""bench.py gpu, research/gpu.py, on a CPU: every part on tiny sizes, and what becomes of parts that fail."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, assert_refused, cli, shell

from research import gpu

# parts that need no data
ALONE = "attention compiled step_d12_none step_d20_cheaper flash profile decode recurrent".split()


def results(folder):
    """What the parts have written, by name."""
    found = {}
    for path in folder.glob("gpu_*.json"):
        result = json.loads(path.read_text())
        found[result["part"]] = result
    return found

def check(result):
    """A part that ended well."""
    assert result["failed"] is None, result["failed"]
    assert {"device", "torch", "commit", "date", "flash", "seconds", "title"} <= set(result)
    assert result["rows"] and all(row.get("ok", True) for row in result["rows"])

def test_parts_without_data(tmp_path):
    args = gpu.parse_args(["--device", "cpu", "--work", str(tmp_path), "--repeats", "2", "--commit", "abc"])
    assert args.tiny and args.out == tmp_path
    for name in ALONE:
        gpu.run_part(args, name)
    found = results(tmp_path)
    assert set(found) == set(ALONE)
    for result in found.values():
        check(result)
        assert result["commit"] == "abc"
    step, = found["step_d12_none"]["rows"]
    assert step["step_ms"] > 0 and step["lrt"] == "none"
    assert {row["implementation"] for row in found["flash"]["rows"]} == {"torch's"}
    compiled, = found["compiled"]["rows"]
    assert compiled["graph_breaks"] == 0 and compiled["graphs"] >= 1

def test_a_wrong_kernel_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("attention.window_mask", lambda n, back, like: like.new_zeros(n, n))
    args = gpu.parse_args(["--device", "cpu", "--work", str(tmp_path)])
    gpu.run_part(args, "attention")
    assert results(tmp_path)["attention"]["failed"] == "1 rows are not ok"  # the one with a window

# parts that fail in all ways; a process of its own imports this file, too
BROKEN = """
import os, time
from research import gpu

def raises(args, device):
    yield dict(a=1)
    raise RuntimeError("CUDA error: an illegal memory access\\nand more")

def dies(args, device):
    yield dict(a=1)
    os._exit(7)

def hangs(args, device):
    yield dict(a=1)
    time.sleep(1000)

def works(args, device):
    yield dict(a=1)

gpu.PART_MINUTES = 1
parts = raises, dies, hangs, works
gpu.PARTS = {part.__name__: gpu.Part(1, "", part) for part in parts}
gpu.PARTS["nanochat"] = gpu.Part(1, "", works)
if __name__ == "__main__":
    gpu.run_main(gpu.main)
"""

@pytest.mark.slow
def test_a_part_that_fails_says_so_and_the_next_one_runs(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)

    def run(*flags):
        command = [sys.executable, script, "--device", "cpu", "--work", tmp_path, *flags]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    done = run()
    assert done.returncode == 2
    # Python itself may have the last word, on what the part that was killed has left
    assert "\nerror: 3 parts failed: raises, dies, hangs; " in f"\n{done.stderr}"
    reasons = {name: result["failed"] for name, result in results(tmp_path).items()}
    assert reasons == dict(
        raises="RuntimeError: CUDA error: an illegal memory access",
        dies="its process ended with exit code 7",
        hangs="stopped after 60 s",
        works=None,
    )
    for result in results(tmp_path).values():
        assert result["rows"] == [dict(a=1)]

    # again: those that failed, and not the one that has a result
    path = tmp_path / "gpu_works.json"
    before = path.stat().st_mtime_ns
    (tmp_path / "gpu_hangs.json").write_text(path.read_text())
    done = run()
    assert "raises, dies; " in done.stderr
    assert path.stat().st_mtime_ns == before

@pytest.mark.slow
def test_every_part_runs(data, tmp_path):
    """By the command itself, on prepared data; nanochat's needs a checkout."""
    done = shell("bench.py", "gpu", "--tiny", "--device", "cpu", "--data", data, "--work", tmp_path,
                 "--repeats", 2)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert set(found) == set(gpu.PARTS) - {"nanochat"}
    for result in found.values():
        check(result)
    assert [row["bpb"]["merged"] > 0 for name in found if name.startswith("train_")
            for row in found[name]["rows"]] == [True] * 3
    assert found["resume"]["rows"][0]["processes"] == 2
    assert found["resume"]["rows"][0]["apart"] == 0
    listed = shell("bench.py", "gpu", "--list", "--device", "cpu", "--work", tmp_path).stdout
    assert listed.count(" done ") == len(found)

@pytest.mark.parametrize("flags, words", [
    ("--data no/folder", ["--data no/folder is no folder"]),
    ("--repeats 1", ["--repeats must be a number of at least 2, not 1"]),
    ("--minutes -1", ["--minutes must be a number of at least 0, not -1.0"]),
])
def test_bad_flags(flags, words, here):
    assert_refused(cli("research.gpu", *flags.split(), "--device", "cpu"), *words)

def test_a_damaged_result(here):
    (here / "gpu_attention.json").write_text("{")
    result = cli("research.gpu", "--device", "cpu", "--work", here)
    assert_refused(result, "gpu_attention.json is damaged", "remove it")
