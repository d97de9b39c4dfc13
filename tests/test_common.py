"""What all scripts share: errors, the command line, files that are whole or absent, rows, the machine."""

import os
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_refused, shell

import common
from common import UserError, append_row, at_least, lock, read_rows, write_atomic

# -----------------------------------------------------------------------------
# Errors and the command line

def run(main):
    """run_main() of a main function, given as the line of Python in it: (exit code, stdout, stderr)."""
    code = f"import common\ndef main():\n    {main}\ncommon.run_main(main)"
    done = shell(sys.executable, "-c", code)
    return done.returncode, done.stdout, done.stderr

def test_how_a_script_ends():
    assert run("print('done')") == (0, "done\n", "")
    assert run("raise KeyboardInterrupt") == (130, "", "")
    assert_refused(run("raise common.UserError('no such\\n file')"), "error: no such file")
    code, _, err = run("1 / 0")  # a bug shows its traceback
    assert code == 1
    assert err.splitlines()[-1].startswith("ZeroDivisionError")

def test_help_shows_defaults():
    done = shell("prepare_data.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "default: data" in done.stdout
    assert "default: None" not in done.stdout

def test_a_script_without_torch_starts_fast():
    done = shell(sys.executable, "-c", "import sys, prepare_data; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr

@pytest.mark.parametrize("value", [0, -1, 2**63, 0.5, float("inf"), float("nan")])
def test_at_least_refuses(value):
    with pytest.raises(UserError, match=f"--num-shards must be a number of at least 1, not {value}"):
        at_least(Namespace(num_shards=value), num_shards=1)

@pytest.mark.parametrize("value", [1, 2**63 - 1, 1.0, 1e300, None])
def test_at_least_passes(value):
    at_least(Namespace(num_shards=value), num_shards=1)


# -----------------------------------------------------------------------------
# Files

def test_write_atomic(tmp_path):
    def fail(f):
        f.write(b"new")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_atomic(path, lambda f: f.write(b"old"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "no" / "file", fail)

def test_lock(tmp_path):
    folder = tmp_path / "new" / "folder"
    held = lock(folder, "training")
    with pytest.raises(UserError, match=f"another training is writing {folder}"):
        lock(folder, "training")
    held.close()
    lock(folder, "training").close()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="choose another --out"):
        lock(tmp_path / "file", "training")

def test_rows_of_several_writers_and_after_a_crash(here):
    def write(i):
        append_row("rows.jsonl", {"i": i, "text": "x" * 5000})

    assert read_rows("rows.jsonl") == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    assert sorted(row["i"] for row in read_rows("rows.jsonl")) == list(range(40))

    # the last row is cut short, and the next one begins a new line all the same
    os.truncate("rows.jsonl", os.path.getsize("rows.jsonl") - 10)
    append_row("rows.jsonl", {"i": 40})
    rows = read_rows("rows.jsonl")
    assert len(rows) == 40
    assert rows[-1] == {"i": 40}


# -----------------------------------------------------------------------------
# Devices, on a machine that pretends to have 8 GPUs

@pytest.fixture
def gpus(monkeypatch):
    """What the process does to its GPUs, in order."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set {device}"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: calls.append(f"allocate on {device}"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, device_id, **_: calls.append(f"{backend} on {device_id}"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls

@pytest.mark.parametrize("name, device", [(None, "cuda:0"), ("cuda", "cuda:0"), ("cuda:2", "cuda:2")])
def test_one_process_has_a_device_with_an_index(name, device, gpus):
    """torch.cuda.set_device() takes no other."""
    assert common.init_processes(name) == (torch.device(device), 0, 1)
    assert gpus == [f"set {device}", f"allocate on {device}"]

@pytest.mark.parametrize("name", [None, "cuda", "cuda:2"])
def test_every_process_of_a_node_has_its_own_gpu_first(name, gpus, monkeypatch):
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert common.init_processes(name) == (torch.device("cuda:3"), 11, 16)
    assert gpus == ["set cuda:3", "allocate on cuda:3", "nccl on cuda:3"]

def test_more_processes_than_gpus(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(UserError, match="cuda:8 does not exist, this machine has 8 GPUs; lower --nproc"):
        common.init_processes()
    assert gpus == []


# -----------------------------------------------------------------------------
# The machine

def test_rows_leave_a_commit_clean_and_code_does_not(here, monkeypatch):
    """In a repository of its own, which machine() finds beside common.py."""
    monkeypatch.setattr(common, "__file__", str(here / "common.py"))
    code = here / "model.py"
    rows = here / "research/results/rows.jsonl"
    rows.parent.mkdir(parents=True)
    code.write_text("1")
    rows.write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "model.py", "research"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *words], check=True)

    def commit():
        return common.machine(torch.device("cpu"))["commit"]

    clean = commit()
    assert not clean.endswith("-dirty")
    assert clean != "unknown"
    rows.write_text("2")
    assert commit() == clean
    code.write_text("2")
    assert commit() == clean + "-dirty"
