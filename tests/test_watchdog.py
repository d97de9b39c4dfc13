"""
Ranks that die and ranks that hang: who is accused, how soon, with which line, and that nobody is accused who
only waits, compiles, evaluates or saves.
"""

import ctypes
import os
import re
import signal
import socket
import time
from argparse import Namespace
from pathlib import Path

import pytest
import test_faults
import torch
import torch.distributed as dist
from test_faults import TINY, at_step, children, command, log, numbers, ranks, run, same_bits, wait
from test_soundness import bad_batches

import train
import watchdog
from common import UserError
from watchdog import Progress, Rank, Watchdog, hanging

data, fork = test_faults.data, test_faults.fork  # fixtures


# -----------------------------------------------------------------------------
# Who hangs

def seen(count, moved=0, heard=100, timed=True, allowance=50):
    """A rank, as it is seen at second 100."""
    return Rank("host", 1, "", Progress(count, timed=timed, allowance=allowance), moved, heard)

@pytest.mark.parametrize("ranks, accused", [
    ([seen(7), seen(7)], [0, 1]),  # nobody is behind: a GPU, or the network
    ([seen(7), seen(6)], [1]),
    ([seen(7), seen(6), seen(7), seen(6)], [1, 3]),
    ([seen(7), seen(6, moved=60)], []),  # the one that is behind moved a little while ago
    ([seen(7), seen(6, allowance=200)], []),
    ([seen(7), seen(6, timed=False)], []),  # it saves, and the other waits for it
    ([seen(7), seen(7, heard=30)], [1]),  # of those that are behind, the one that is silent
    ([seen(7), seen(9, heard=30)], [0]),
    ([seen(7, heard=30), seen(7, heard=30)], [0, 1]),
    ([], []),
])
def test_who_hangs(ranks, accused):
    assert hanging(dict(enumerate(ranks)), now=100) == accused

def test_ranks_that_have_left_are_not_waited_for():
    gone = seen(3)
    gone.left = 90
    assert hanging({0: gone, 1: seen(7, moved=99)}, now=100) == []

def test_the_allowance_is_learnt_from_steps(monkeypatch):
    """Not from the first of a kind, which may compile, nor from one behind a save; and slowly forgotten."""
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    watch = Watchdog()

    def step(number, seconds, kind="shallow"):
        watch.begin_step(number, kind)
        timed = watch.progress.timed
        clock[0] += seconds
        watch.at("update")
        return timed, watch.progress.allowance

    least = watchdog.LEAST_ALLOWANCE
    assert step(0, 1000) == (False, least)
    assert step(1, 10) == (False, 200)
    assert step(2, 1) == (True, pytest.approx(200, rel=0.01))
    clock[0] += 900
    watch.between("save", 3)
    clock[0] += 1000
    assert not watch.progress.timed
    assert step(3, 500) == (True, pytest.approx(200, rel=0.01))
    assert step(4, 30) == (True, 600)
    assert step(5, 1000, kind="deep") == (False, pytest.approx(600, rel=0.01))
    assert step(6, 1, kind="deep")[0] is False
    for number in range(7, 7 + 3000):
        timed, allowance = step(number, 0.1, kind="deep")
    assert timed and allowance == least


def test_the_error_of_one_rank_is_told_after_a_while():
    """If the others have not found the same one by then: they may wait for it in a collective."""
    watch = Watchdog()
    watch.ranks = {0: seen(7, timed=False), 1: seen(7)}
    watch.ranks[1].left, watch.ranks[1].reason = 90, "a bug"
    verdicts = []
    watch.end = lambda *verdict, **options: verdicts.append(verdict)
    watch.judge(now=90 + 0.9 * watchdog.GRACE)
    assert verdicts == []
    watch.judge(now=90 + 1.1 * watchdog.GRACE)
    assert verdicts == [("rank 1 ended in step 0 (setup): a bug", [1])]

@pytest.mark.parametrize("error, naps", [
    (RuntimeError("Connection closed by peer"), [watchdog.PATIENCE]),
    (UserError("of our own"), []),
    (None, []),
])
def test_an_error_waits_for_the_news_that_explains_it(error, naps, monkeypatch):
    slept = []
    monkeypatch.setattr(watchdog.time, "sleep", slept.append)
    watch = Watchdog()
    watch.active, watch.connections = True, []
    watch.__exit__(error and type(error), error, None)
    assert slept == naps and watch.closed


# -----------------------------------------------------------------------------
# Connections

def test_a_machine_that_is_gone_is_probed_for():
    """Idle or not, its connection ends after three seconds. That it does takes two machines to try."""
    with socket.socket() as s:
        watchdog.Connection(s)
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in [("KEEPIDLE", 1), ("KEEPINTVL", 1), ("KEEPCNT", 3), ("USER_TIMEOUT", 3000)]:
            assert s.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}")) == value

def test_a_stranger_is_turned_away():
    watch = Watchdog()
    watch.token, watch.ranks = "secret", {1: "rank 1"}
    connection = Namespace(number=None)
    for hello in ([], 3, {}, dict(number=1), dict(number=1, token="guess")):
        with pytest.raises(EOFError):
            watch.identify(connection, hello)
    assert watch.identify(connection, dict(number=1, token="secret")) == "rank 1"


# -----------------------------------------------------------------------------
# Processes that die or hang

PATIENCE = 8.0  # seconds without progress, here: a busy machine may stand still for a while

def quickly():
    """Watch more closely than a training that lasts for days."""
    watchdog.BEAT = 0.1
    watchdog.SILENT = 4.0
    watchdog.LEAST_ALLOWANCE = PATIENCE

def start(fork, data, world_size, prelude, *args):
    """Training without end in so many processes; each has a console of its own, 0.txt, 1.txt, .."""
    flags = ["--data", data, *TINY, "--total-batch-size", 96, "--num-iterations", 10**6, "--log-every", 1]
    processes = []
    for env in ranks(world_size):
        processes.append(fork(command, f"{env['RANK']}.txt", flags, env, prelude, *args))
    console = Path("0.txt")
    end = time.time() + 180
    while not (console.exists() and "step 00004/" in console.read_text()):
        assert time.time() < end and all(process.is_alive() for process in processes), said(world_size)
        time.sleep(0.02)
    return processes

def said(world_size):
    """What all processes have printed."""
    paths = [Path(f"{rank}.txt") for rank in range(world_size)]
    return "".join(path.read_text() for path in paths if path.exists())

@pytest.mark.parametrize("victim, world_size", [(0, 2), (1, 2), (2, 3)])
def test_a_rank_that_dies_is_known_at_once(victim, world_size, data, here, fork):
    processes = start(fork, data, world_size, None)
    processes[victim].kill()
    before = time.time()
    codes = wait(*processes)
    assert time.time() - before < 30  # 4 s here; a collective would wait for 10 minutes
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(world_size)]
    line = rf"^error: rank {victim} died in step \d+ \([a-z]+\); all processes end"
    assert len(re.findall(line, said(world_size), re.MULTILINE)) == 1, said(world_size)

@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_known_and_shows_its_stack(victim, data, here, fork):
    processes = start(fork, data, 2, quickly)
    os.kill(processes[victim].pid, signal.SIGSTOP)
    before = time.time()
    assert wait(*processes)[1 - victim] == 1  # the stopped one is killed, or ends when it is woken up
    assert time.time() - before < PATIENCE + 45
    line = rf"^error: rank {victim} is stopped or stuck outside Python since step \d+ \(\w+\), \d+ s ago; all"
    assert re.search(line, Path(f"{1 - victim}.txt").read_text(), re.MULTILINE), said(2)
    stack = Path(f"{victim}.txt").read_text()
    assert "most recent call first" in stack and 'train.py", line' in stack

def stuck_in_python():
    while True:
        time.sleep(0.01)

def stuck_outside_python():
    """With the interpreter's lock, so that no other thread of the process can run; signals do not end it."""
    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)

def stuck_in_a_collective():
    """It waits for an answer that nobody sends."""
    dist.recv(torch.zeros(1), 0, tag=7)

def get_stuck(how, victim):
    """In step 5, rank `victim` does not get the rows of the next one. A step has 6 of them."""
    quickly()
    if os.environ["RANK"] == str(victim):
        batch = train.Rows.batch

        def stuck(self, first, count, device):
            if first >= 6 * 6:
                how()
            return batch(self, first, count, device)

        train.Rows.batch = stuck

IN_LOADING = r"hangs in step 5 \(loading\) for \d+ s, at dataset.py:\d+ in micro_batches"
# what it reported last may be some steps old
OUTSIDE = r"is stopped or stuck outside Python since step \d \(\w+\), \d+ s ago"

@pytest.mark.parametrize("how, words", [
    (stuck_in_python, IN_LOADING),
    (stuck_outside_python, OUTSIDE),
    (stuck_in_a_collective, IN_LOADING),
])
def test_a_stuck_rank_is_known_with_its_place(how, words, data, here, fork):
    """The others wait for it in the exchange of gradients, and are not accused."""
    processes = start(fork, data, 3, get_stuck, how, 1)
    before = time.time()
    codes = wait(*processes)
    assert time.time() - before < PATIENCE + 45
    assert codes == [1, -signal.SIGKILL if how is stuck_outside_python else 1, 1]
    errors = [line for line in said(3).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.fullmatch(f"error: rank 1 {words}; all processes end, go on with --resume", errors[0]), errors
    assert f" in {how.__name__}\n" in Path("1.txt").read_text()
    assert "most recent call first" not in Path("0.txt").read_text() + Path("2.txt").read_text()

def fail_alone(victim):
    """Step 5 raises a bug's error on one rank."""
    def fail():
        raise ValueError("a bug on one rank")

    if os.environ["RANK"] == str(victim):
        at_step({5: fail})

@pytest.mark.parametrize("victim", [0, 1])
def test_the_error_of_one_rank_is_what_is_said(victim, data, here, fork):
    codes = wait(*start(fork, data, 2, fail_alone, victim), seconds=60)
    assert codes == [1, 1]
    other = Path(f"{1 - victim}.txt").read_text().splitlines()
    assert "ValueError: a bug on one rank" in Path(f"{victim}.txt").read_text()
    assert any(line.startswith(f"error: rank {victim} ") for line in other) or "Connection" in other[-1]


# -----------------------------------------------------------------------------
# No false alarm

def take_long():
    """The first step, evaluations and checkpoints take far longer than a rank may hang, on one rank only."""
    quickly()
    nap = 1.5 * PATIENCE

    def slowed(function, rank):
        def wrapped(*args, **options):
            if os.environ["RANK"] == rank:
                time.sleep(nap)
            return function(*args, **options)
        return wrapped

    train.Saver.save = slowed(train.Saver.save, "0")
    train.evaluate_bpb = slowed(train.evaluate_bpb, "1")
    if os.environ["RANK"] == "1":
        forward = train.TrainStep.forward

        def compiling(self, *args):
            time.sleep(nap)
            train.TrainStep.forward = forward
            return forward(self, *args)

        train.TrainStep.forward = compiling

@pytest.mark.slow
def test_what_may_take_long_is_no_hang(data, here, fork):
    codes, text = run(fork, "out.txt", "--data", data, *TINY, "--num-iterations", 12, "--save-every", 6,
                      "--eval-every", 6, "--decode-tokens", 0, prelude=take_long, world_size=2)
    assert codes == [0, 0], text
    assert "hangs" not in text


def note_places():
    """Write down where the watchdog thinks that a rank is when something begins that may take long."""
    note = Watchdog.note
    watch = None

    def noting(self, *args, **options):
        nonlocal watch
        watch = self
        note(self, *args, **options)

    def noted(function):
        def wrapped(*args, **options):
            with open("places.txt", "a") as f:
                print(watch.progress.place, watch.progress.timed, file=f)
            return function(*args, **options)
        return wrapped

    Watchdog.note = noting
    train.Saver.save = noted(train.Saver.save)
    train.Saver.wait_for_copy = noted(train.Saver.wait_for_copy)
    train.go_back = noted(train.go_back)
    train.evaluate = noted(train.evaluate)
    train.evaluate_tasks = noted(lambda *args: {})
    train.load_tasks = lambda folder: ["a task"]
    bad_batches({14})

def test_what_may_take_long_is_said(data, here, fork):
    """By the training loop, so that it is not timed."""
    flags = ["--num-iterations", 16, "--save-every", 12, "--eval-every", 16, "--core-every", 16,
             "--on-spike", "rewind", "--decode-tokens", 0]
    codes, text = run(fork, "out.txt", "--data", data, *TINY, *flags, prelude=note_places)
    assert codes == [0], text
    places = Path("places.txt").read_text().splitlines()
    assert places == [f"{place} False" for place in
                      ("evaluation", "save", "copy", "rewind", "save", "evaluation", "CORE")]

def test_a_machine_that_stands_still_is_no_hang(data, here, fork):
    """All ranks stop for longer than one may hang, and go on: the first that wakes up accuses nobody."""
    processes = start(fork, data, 2, quickly)
    for sig in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.kill(process.pid, sig)
        if sig == signal.SIGSTOP:
            time.sleep(2 * PATIENCE)
    before = len(log("runs/d1_shared"))
    end = time.time() + 120
    while len(log("runs/d1_shared")) < before + 20:
        assert time.time() < end and all(process.is_alive() for process in processes), said(2)
        time.sleep(0.05)


# -----------------------------------------------------------------------------
# torchrun

@pytest.mark.slow
def test_torchrun_goes_on_behind_a_hang(data, here, fork):
    """A rank is stopped: both processes end, torchrun starts them again, and the log is that of one run."""
    flags = ["--data", data, *TINY, "--num-iterations", 60, "--eval-every", 20, "--save-every", 5,
             "--resume", "auto"]
    whole = [fork(command, "whole.txt", [*flags, "--name", "whole"], env) for env in ranks(2)]
    assert wait(*whole) == [0, 0]

    Path("quick.py").write_text("import runpy, sys, watchdog, test_watchdog\ntest_watchdog.quickly()\n"
                                f"sys.argv[0] = '{test_faults.ROOT}/train.py'\n"
                                "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    agent = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=2", "quick.py", *flags,
                     "--name", "x")
    try:
        end = time.time() + 300
        while len(log("runs/x")) < 12:
            assert time.time() < end and agent.poll() is None, Path("agent.txt").read_text()
            time.sleep(0.02)
        os.kill(children(agent.pid)[1], signal.SIGSTOP)
        assert agent.wait(400) == 0, Path("agent.txt").read_text()
    finally:
        agent.kill()
    assert re.search(r"error: rank \d is stopped or stuck outside", Path("agent.txt").read_text())
    assert numbers("runs/x") == numbers("runs/whole")
    assert same_bits("runs/x/ckpt_0000060.pt", "runs/whole/ckpt_0000060.pt")

def torchrun(*argv):
    """torchrun in a process of its own, which writes to agent.txt."""
    import subprocess
    import sys
    launcher = Path(sys.executable).parent / "torchrun"
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open("agent.txt", "w") as f:
        return subprocess.Popen(list(map(str, [launcher, *argv])), stdout=f, stderr=f, env=env)
