"""What all scripts share: errors, the command line, files that are whole or absent, rows, the machine."""

import errno
import fcntl
import gzip
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import COMMANDS, ROOT, assert_refused, no_open_files, shell

import common
from common import (
    Unreadable,
    UserError,
    append_row,
    at_least,
    at_most,
    lock,
    read_rows,
    refusal,
    write_atomic,
)

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
    assert run("raise SystemError from KeyboardInterrupt()") == (130, "", "")
    for bug in ("raise RuntimeError", "raise SystemError"):
        assert "Traceback" in run(bug)[2]
    assert_refused(run("raise common.UserError('no such\\n file')"), "error: no such file")
    assert_refused(run("bytearray(2**62)"), "out of memory (MemoryError)", "lower the batch size")
    assert_refused(run("import torch; torch.empty(2**60)"), "out of memory", "you tried to allocate")
    assert_refused(run("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried 2.\\nMore')"),
                   "out of memory (CUDA out of memory. Tried 2.)")
    no_threads = f"raise RuntimeError({common.NO_MORE_THREADS!r})"
    assert_refused(run(no_threads), "the system gives this process no more threads", "ulimit -u")
    code, _, err = run("raise RuntimeError('shapes differ')")
    assert (code, err.splitlines()[-1]) == (1, "RuntimeError: shapes differ")
    code, _, err = run("1 / 0")  # a bug shows its traceback
    assert code == 1
    assert err.splitlines()[-1].startswith("ZeroDivisionError")

# a sitecustomize.py: Ctrl-C in the middle of a script's imports
INTERRUPTER = """
import os, signal, sys
class Interrupter:
    @staticmethod
    def find_spec(name, *_):
        if name in ("numpy", "torch"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter)
"""

@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_while_a_script_is_imported(script, here):
    """It ends by that signal, which a shell calls exit code 130, and says nothing."""
    Path("sitecustomize.py").write_text(INTERRUPTER)
    done = shell(script, PYTHONPATH=f"{here}:{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")

def test_ctrl_c_after_the_work(here):
    """While Python clears up, say."""
    Path("script.py").write_text("import atexit, os, signal, common\n"
                                 "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
                                 "common.run_main(lambda: print('done'))\n")
    done = shell(sys.executable, "script.py")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "done\n", "")

def with_streams(main, redirections, **env):
    """
    run_main() of a main function, given as lines of Python, with redirections of bash: the exit code, what
    else there is on stdout, and the stderr. `{run}` is where the process goes in the line of bash.
    """
    Path("script.py").write_text("import os, sys, time, common\ndef main():\n    " + "\n    ".join(main)
                                 + "\ncommon.run_main(main)\n")
    line = redirections.format(run=f"{sys.executable} script.py")
    env = {"PYTHONUNBUFFERED": ""} | env  # as if it were not set
    done = shell("bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}", **env)
    return done.returncode, done.stdout, done.stderr

SLOWLY = "time.sleep(0.2)"  # until the other side of the pipe has gone

@pytest.mark.parametrize("main, redirections, code, words", [
    # a reader that goes away
    ([SLOWLY, "print('x')", "print('y')"], "{run} | true", 1, ""),
    ([SLOWLY, "print('x', end='')"], "{run} | true", 1, ""),
    ([SLOWLY, "print('x', file=sys.stderr)"], "{run} 2>&1 >/dev/null | true", 1, ""),
    ([SLOWLY, "common.ArgumentParser().parse_args(['--help'])"], "{run} | true", 1, ""),
    ([SLOWLY, "raise common.UserError('x')"], "{run} 2>&1 | true", 2, ""),
    ([SLOWLY, "[common.say('x') for _ in range(3)]"], "{run} | true", 0, ""),
    # a full disk
    (["print('x')"], "{run} > /dev/full", 2, "error: cannot write the output: No space left on device\n"),
    (["print('x', end='')"], "{run} > /dev/full", 2, "error: cannot write the output: No space"),
    (["common.say('x')", "raise common.UserError('z')"], "{run} > /dev/full", 2, "error: z\n"),
    # closed
    (["print('x')", "input()"], "{run} <&- >&- 2>&-", 1, ""),
    (["print('x')"], "{run} <&- >&- 2>&-", 0, ""),
    (["common.say('x')", "raise common.UserError('z')"], "{run} >&-", 2, "error: z\n"),
    (["common.say('x')", "raise common.UserError('z')"], "{run} 2>&-", 2, ""),
])
def test_streams_that_are_closed_or_full_or_broken(main, redirections, code, words, here):
    found, _, err = with_streams(main, redirections)
    assert found == code, err
    assert err.startswith(words) and err.count("\n") == words.startswith("error"), err

def test_a_closed_stream_is_not_the_next_file_that_is_opened(here):
    main = ["f = open('file', 'w')", "os.write(1, b'noise')", "os.write(2, b'noise')", "f.write('mine')"]
    code, _, err = with_streams(main, "{run} >&- 2>&-")
    assert code == 0, err
    assert Path("file").read_text() == "mine"

def test_files_and_pipes_are_utf_8(here):
    main = ["print('caf\u00e9')", "print(*[common.is_text(input()) for _ in range(2)])"]
    line = "printf 'caf\\xc3\\xa9\\ncaf\\xe9\\n' | {run}; exit"
    assert with_streams(main, line, PYTHONIOENCODING="ascii") == (0, "caf\u00e9\nTrue False\n", "")

def test_a_byte_order_mark_is_no_part_of_what_is_typed(here):
    main = ["print(ascii(input()), ascii(input()))"]
    assert with_streams(main, "printf '\\xef\\xbb\\xbfa\\nb\\n' | {run}; exit") == (0, "'a' 'b'\n", "")

def test_a_log_in_a_file_is_written_line_by_line(here):
    main = ["print('x')", "common.say('y')", "os.kill(os.getpid(), 9)"]
    with_streams(main, "{run} > out.txt")
    assert Path("out.txt").read_text() == "x\ny\n"

@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_json_lines(name, here):
    """Byte order marks, also where files were joined, blank lines, any ends of lines."""
    raw = b'\xef\xbb\xbf{"a": "caf\xc3\xa9"}\r\n\n \t\n\xef\xbb\xbf\n\xef\xbb\xbf[null]\n3'
    Path(name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert list(common.read_json_lines(name)) == [
        (f"{name} line 1", {"a": "caf\u00e9"}), (f"{name} line 5", [None]), (f"{name} line 6", 3)]

@pytest.mark.parametrize("raw, words", [
    (b'{"a": 1}\n{"a": ', "x.jsonl line 2: not valid JSON"),
    (b"\n" + b"[" * 100_000, "x.jsonl line 2: not valid JSON"),
    (b'{"a": "caf\xe9"}', "x.jsonl line 1: not UTF-8 text .*at 10"),
    (b"\xff\xfe{\x00}\x00", "x.jsonl line 1: not UTF-8 text"),
    (b"\0" * 9, "x.jsonl line 1: not valid JSON"),
])
def test_bad_json_lines(raw, words, here):
    Path("x.jsonl").write_bytes(raw)
    with pytest.raises(UserError, match=words):
        list(common.read_json_lines("x.jsonl"))

@pytest.mark.parametrize("row, words", [
    ({"b": "x"}, 'here: no "a" string; expected {"a": "..."} on each line'),
    ({"a": None}, 'here: no "a" string'),
    (["a"], 'here: no "a" string'),
    ({"a": "\ud800"}, "here: not UTF-8 text .half of a surrogate pair"),
])
def test_rows_without_text(row, words):
    assert common.text_of("here", {"a": "x"}, "a") == "x"
    with pytest.raises(UserError, match=words):
        common.text_of("here", row, "a")

def test_half_surrogates_are_not_text():
    assert common.is_text("caf\u00e9 \U0001f600")
    for value in ("\ud800", "caf\udce9", b"x", None, 3):
        assert not common.is_text(value)

def test_help_shows_defaults():
    done = shell("prepare_data.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "default: data" in done.stdout
    assert "default: None" not in done.stdout

def test_a_script_without_torch_starts_fast():
    done = shell(sys.executable, "-c", "import sys, prepare_data; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr

@pytest.mark.parametrize("argv, words", [
    (["--out", ""], "the argument for out is empty"),
    (["a", ""], "the argument for source is empty"),
    ([""], "the argument for source is empty"),
])
def test_empty_arguments(argv, words, capsys):
    """Of a variable that was not set, say: an empty name must not mean the current folder."""
    parser = common.ArgumentParser()
    parser.add_argument("source", nargs="*")
    parser.add_argument("--out", default="data")
    parser.add_argument("--prompt", default="")
    assert parser.parse_args(["--prompt", ""]).prompt == ""
    with pytest.raises(SystemExit) as e:
        parser.parse_args(argv)
    assert e.value.code == 2
    assert words in capsys.readouterr().err

@pytest.mark.parametrize("value", [0, -1, 2**63, 0.5, float("inf"), float("nan")])
def test_at_least_refuses(value):
    with pytest.raises(UserError, match=f"--num-shards must be a number of at least 1, not {value}"):
        at_least(Namespace(num_shards=value), num_shards=1)

@pytest.mark.parametrize("value", [1, 2**63 - 1, 1.0, 1e300, None])
def test_at_least_passes(value):
    at_least(Namespace(num_shards=value), num_shards=1)


@pytest.mark.parametrize("value", ["3", [], {}])
def test_flags_of_another_type(value):
    """As a checkpoint may hold them."""
    with pytest.raises(UserError, match="--num-shards must be a number"):
        at_least(Namespace(num_shards=value), num_shards=1)

def test_at_most():
    at_most(Namespace(depth=1000, chunk=None), depth=1000, chunk=1)
    with pytest.raises(UserError, match="--depth must be at most 1000, not 1001"):
        at_most(Namespace(depth=1001), depth=1000)


# -----------------------------------------------------------------------------
# What the operating system refuses is not what a file contains

TORCH = "unable to open file <x> in read-only mode: "  # what torch makes of the system's error

@pytest.mark.parametrize("error, words", [
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    (OSError(errno.ESTALE, "x"), os.strerror(errno.ESTALE)),
    (MemoryError(), "Cannot allocate memory"),
    (RuntimeError(TORCH + "Too many open files (24)"), "the limit of this process is"),
    (RuntimeError("DefaultCPUAllocator: Error code 12 (Cannot allocate memory)"), "Cannot allocate memory"),
    (gzip.BadGzipFile("CRC check failed"), None),
    (OSError(errno.EINVAL, "Invalid argument"), None),  # a seek to where damaged content points
    (RuntimeError("PytorchStreamReader failed reading zip archive"), None),
    (EOFError(), None),
    (ValueError("x"), None),
])
def test_refusals(error, words):
    assert refusal(error) is None if words is None else words in refusal(error)

def test_files_that_cannot_be_opened(here):
    (here / "rows.jsonl").write_text("{}")
    for read in (read_rows, common.sha256_file):
        with no_open_files(), pytest.raises(Unreadable, match="rows.jsonl .Too many open files: the limit"):
            read("rows.jsonl")


def test_a_named_pipe_is_not_waited_for(here):
    os.mkfifo("rows.jsonl")
    with pytest.raises(Unreadable, match="rows.jsonl: it is .*no regular file"):
        read_rows("rows.jsonl")

def test_a_file_that_is_not_there_cannot_be_made_readable(here):
    Path("folder").mkdir()
    os.symlink("loop", "loop")
    for name in ("nowhere", "folder", "loop", 300 * "x"):
        with pytest.raises(Unreadable, match=f"cannot read {name} .*: check its name"):
            with common.open_source(name):
                pass


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

def test_links_are_followed_and_what_is_no_file_is_written_in_place(here):
    """/dev/stdout and the like are stood for by nodes of our own: a mistake would replace the real ones."""
    (here / "real").write_text("old")
    (here / "link").symlink_to("real")
    (here / "dangling").symlink_to("new")
    (here / "stdout").symlink_to("/proc/self/fd/1")
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "dangling", "pipe"):
        common.check_folder(name)
        write_atomic(name, lambda f: f.write(b"x"))
    assert Path("real").read_text() == Path("new").read_text() == "x"
    assert os.read(reader, 9) == b"x"
    assert Path("link").is_symlink() and Path("dangling").is_symlink() and Path("pipe").is_fifo()

    # our own stdout goes on after it, whether it is a file or a pipe
    main = ["print('before', end='')", "common.check_folder('stdout')",
            "common.write_atomic('stdout', lambda f: f.write(b' x '))", "print('after')"]
    assert with_streams(main, "{run}") == (0, "before x after\n", "")
    with_streams(main, "{run} > out.txt")
    assert Path("out.txt").read_text() == "before x after\n"
    assert Path("stdout").is_symlink()
    names = ["dangling", "link", "new", "out.txt", "pipe", "real", "script.py", "stdout"]
    assert sorted(os.listdir()) == names

    os.mkdir("folder")
    with pytest.raises(UserError, match="cannot write folder: it is a folder"):
        common.check_folder("folder")
    with pytest.raises(UserError, match="cannot write folder: Is a directory"):
        write_atomic("folder", lambda f: f.write(b"x"))

def test_what_is_no_file_is_not_read(here):
    """A pipe that nobody writes into, or a device without an end, would be read for ever."""
    os.mkfifo("rows.jsonl")
    for path in ("rows.jsonl", "/dev/zero"):
        with pytest.raises(Unreadable, match=f"cannot read {path}: it is a pipe, a socket or a device"):
            read_rows(path)
    assert read_rows("nowhere") == []

def test_a_write_that_numpy_only_counts(here):
    """Its error has no number: "71261 requested and 1436 written"."""
    def write(f):
        raise OSError("9 requested and 3 written")

    with pytest.raises(UserError, match="cannot write x: 9 requested and 3 written: is the disk full?"):
        write_atomic("x", write)
    assert os.listdir() == []

def test_a_current_folder_that_was_removed(here, monkeypatch):
    os.mkdir("gone")
    monkeypatch.chdir("gone")
    os.rmdir(here / "gone")
    with pytest.raises(UserError, match="the folder runs .No such file or directory.: choose"):
        common.check_new_folder("runs")

def test_a_folder_that_may_not_be_written_is_refused_before_the_work(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot write x: the folder . may not be written"):
        common.check_folder("x")

def test_what_can_never_be_written_is_refused_before_the_work(here):
    os.symlink("loop", "loop")
    os.symlink("nowhere/x", "dangling")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket")
    for name, words in (("loop", "Too many levels"), ("dangling", "there is no folder .*/nowhere"),
                        ("socket", "it is a socket"), (252 * "x", "File name too long")):
        with pytest.raises(UserError, match=f"cannot write {name}: {words}"):
            common.check_folder(name)
    common.check_folder(251 * "x")  # and .tmp

def test_an_output_replaces_nothing_that_is_read(here):
    """Nor what runs and data consist of, whichever they are."""
    Path("run").mkdir()
    own = ["ckpt_0000008.pt", "ckpt_0000008.share_1.pt", "log.jsonl", "core_0000008_max3.json", "meta.json",
           "tokenizer.tiktoken", "train_00000.npy", "core.yaml"]
    for name in own:
        common.check_output(Namespace(out=f"run/{name}"), "out")  # there is none yet
        Path("run", name).write_text("keep")
        with pytest.raises(UserError, match=f"--out run/{name} would replace a file of a run"):
            common.check_output(Namespace(out=f"run/{name}"), "out")
    os.symlink("run/log.jsonl", "picture.png")
    with pytest.raises(UserError, match="--png picture.png would replace"):
        common.check_output(Namespace(png="picture.png"), "png")

    # the file that is written first has another name
    Path("text.txt").write_text("keep")
    Path("x.tmp").write_text("keep")
    os.link("text.txt", "hard")
    for out, read in (("text.txt", "text.txt"), ("hard", "text.txt"), ("x", "x.tmp"), ("same", "./same")):
        with pytest.raises(UserError, match=f"--out {out} would replace {read}: choose another name"):
            common.check_output(Namespace(out=out), "out", [None, "nowhere", read])
    os.mkfifo("pipe")  # is written in place
    for out in (None, "pipe", "text.txt"):
        common.check_output(Namespace(out=out), "out", ["pipe", "x.tmp", None])

@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_without_locks_and_without_fsync_of_folders(code, here, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    fsync = os.fsync
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "fsync", lambda n: refuse() if os.path.isdir(f"/proc/self/fd/{n}") else fsync(n))
    lock("folder", "training").close()
    write_atomic("file", lambda f: f.write(b"x"))
    append_row("rows.jsonl", {"i": 1})
    assert Path("file").read_text() == "x"
    assert read_rows("rows.jsonl") == [{"i": 1}]
    assert f"warning: folder/.lock cannot be locked ({os.strerror(code)})" in capsys.readouterr().err

def test_a_disk_that_fails_is_an_error_all_the_same(here, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="cannot write file: Input/output error"):
        write_atomic("file", lambda f: f.write(b"x"))

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

@pytest.mark.parametrize("environment, words", [
    ("RANK=x", "RANK is 'x' in the environment, no number of at least 0: start with torchrun, or unset it"),
    ("RANK= WORLD_SIZE=1", "RANK is '' in the environment"),
    ("RANK=-1 WORLD_SIZE=1", "RANK is '-1' in the environment"),
    ("WORLD_SIZE=x", "WORLD_SIZE is 'x' in the environment"),
    ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE is '0' in the environment, no number of at least 1"),
    ("RANK=2 WORLD_SIZE=2", "RANK is 2 in the environment and WORLD_SIZE is 2"),  # waited for the others
    ("WORLD_SIZE=4", "WORLD_SIZE is 4 in the environment and RANK is not set"),  # read a quarter of the rows
    ("RANK=0", "cannot join the other processes .*: start all of them with torchrun"),
    ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=x", "cannot join the other processes .*'x'"),
    ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999", "cannot join the other processes"),
])
def test_an_environment_that_torchrun_does_not_make(environment, words, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for setting in environment.split(" "):
        monkeypatch.setenv(*setting.split("="))
    with pytest.raises(UserError, match=words):
        common.init_processes("cpu")

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

@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 3090 Ti", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA L40", None),
    ("NVIDIA H20", None),
    ("", None),
])
def test_a_card_has_its_own_peak_or_none(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert common.peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert common.peak_flops(torch.device("cpu")) is None

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
