"""
A thousand kills: runs of tiny models, killed again and again at seeded random moments, and each compared with
the same run that nothing interrupted, to the last bit.

    python tests/soak.py DIR --kills 1000 --seed 1     Ctrl-C stops it, and the same command goes on
    python tests/soak.py DIR --kills 20 --torchrun     restarts by torchrun, which takes longer

A life is one run on 1, 2 or 4 processes: it is started, some or all of its processes are killed with SIGKILL,
and the same command starts it again, some times over, on the same number of processes. Then it trains to
its end, and must have the log, the weights and the optimizers' states of the run that was left alone, and no
other file. What the kills and lives were is in DIR/soak.jsonl; the folder of a life that is not right stays.
test_soak.py lives a few of them.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

from test_faults import TINY, children, command, numbers, ranks, same_bits, wait  # noqa: E402

import checkpointing  # noqa: E402
import train  # noqa: E402
from checkpointing import list_checkpoints  # noqa: E402
from common import append_row, read_rows  # noqa: E402

DATA = ROOT / "tests/checkpoints/data"
PATIENCE = 600  # seconds until a run that was not killed must have ended
KINDS = {  # what is trained, by name; together they have every kind of optimizer state
    "shared": "--lrt shared",
    "layerwise": "--lrt layerwise --recipe nanochat --aspect-ratio 32",
    "baseline": "--lrt none --save-every 1 --keep 1",
}

def flags_of(kind):
    """The command line of a kind of run but for its name: 24 steps, a save every 2, an evaluation every 3."""
    return ["--data", str(DATA), *TINY, "--num-iterations", "24", "--eval-every", "3", "--save-every", "2",
            "--resume", "auto", *KINDS[kind].split()]


# -----------------------------------------------------------------------------
# Processes that say where they are, and are killed there

PHASES = {  # by their letters, the functions at whose beginning they begin
    "l": (train, "verify_together"),  # loading the checkpoint
    "r": (train, "rewind"),  # taking log and folder back to it
    "s": (train, "set_learning_rates"),  # a step
    "e": (train, "evaluate_bpb"),  # an evaluation
    "c": (checkpointing.Saver, "save"),  # copying a checkpoint out
    "w": (checkpointing, "write_tmp"),  # writing it
    "p": (checkpointing, "publish"),  # giving it its name
    "o": (checkpointing, "remove_checkpoint"),  # removing an old one
}

def send_phases(pipe):
    """Send the letter of each phase when it begins, through a multiprocessing.Connection."""
    def announced(function, letter):
        def wrapped(*args, **kwargs):
            pipe.send_bytes(letter.encode())
            return function(*args, **kwargs)
        return wrapped

    for letter, (module, name) in PHASES.items():
        setattr(module, name, announced(getattr(module, name), letter))

def start(fork, folder, flags, world_size):
    """Start a run: its processes, and what each of them sends about its phases."""
    processes, pipes = [], []
    for env in ranks(world_size) if world_size > 1 else [None]:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        processes.append(fork(command, folder / "console.txt", flags, env, send_phases, theirs))
        theirs.close()
        pipes.append(ours)
    return processes, pipes

def kill_somewhere(fork, folder, flags, world_size, rng):
    """
    Start a run, and kill one of its processes or all at a random moment. Returns a dict about it, or None if
    the run had ended by then.
    """
    rank = rng.randrange(world_size)
    phase = rng.choice("lr" + 3 * "sewp" + "co")
    nth = rng.randint(1, 6) if phase == "s" else rng.randint(1, 2)
    delay = rng.choice([0, rng.uniform(0, 0.003), rng.uniform(0, 0.05)])
    all_of_them = rng.random() < 0.5

    processes, pipes = start(fork, folder, flags, world_size)
    with contextlib.suppress(EOFError):  # it has ended
        while nth:
            seen = pipes[rank].recv_bytes().decode()
            nth -= seen == phase
    time.sleep(delay)
    killed = processes if all_of_them else [processes[rank]]
    for process in killed:
        process.kill()
    # those that are left notice it and end by themselves
    codes = wait(*processes, seconds=PATIENCE)
    assert None not in codes, f"a process of {folder} outlives one that was killed: {codes}"
    last = "-"
    with contextlib.suppress(EOFError):
        while True:
            last = pipes[rank].recv_bytes().decode()
    if -signal.SIGKILL not in codes:
        assert set(codes) == {0}, (folder / "console.txt").read_text()[-3000:]
        return None
    return dict(phase=phase if last == "-" else last, rank=rank, world_size=world_size, all=all_of_them)

def kill_under_torchrun(folder, flags, world_size, rng, kills):
    """
    Run under torchrun to the end, while it restarts what is killed: so many times, one of its processes at a
    random moment. Returns a dict about each kill.
    """
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", f"--nproc_per_node={world_size}",
                f"--max-restarts={kills + 1}", "--monitor-interval=0.1"]
    argv = list(map(str, [*torchrun, ROOT / "train.py", *flags]))
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = []
    with open(folder / "console.txt", "ab") as console:
        agent = subprocess.Popen(argv, stdout=console, stderr=console, env=env)
    while len(done) < kills and agent.poll() is None:
        time.sleep(rng.uniform(1, 30))
        with contextlib.suppress(OSError, ValueError):
            pids = children(agent.pid)
            rank = rng.randrange(world_size)
            if len(pids) == world_size:
                os.kill(pids[rank], signal.SIGKILL)
                done.append(dict(phase="torchrun", rank=rank, world_size=world_size, all=False))
    assert agent.wait(PATIENCE) == 0, (folder / "console.txt").read_text()[-3000:]
    return done


# -----------------------------------------------------------------------------
# Lives

def check_files(folder, keep, ended):
    """
    What is in the folder of a run that was killed, or has ended: no more than `keep` checkpoints, one that is
    being written, and one that was there longer.
    """
    names = {path.name for path in folder.iterdir()} - {"console.txt"}
    checkpoints = list_checkpoints(folder)
    assert len(checkpoints) <= keep + (0 if ended else 1), names
    expected = {"log.jsonl", "tokenizer.json", "tokenizer.tiktoken", ".lock"}
    if not ended:
        assert len(names) < 40, names
        return
    for path in checkpoints:
        shares = checkpointing.load_checkpoint(path)["shares"]
        expected |= {path.name} | {checkpointing.share_path(path, rank).name for rank in range(1, shares)}
    assert names == expected, names ^ expected

def reference(fork, folder, kind, world_size):
    """The folder of the run of a kind on so many processes that nothing interrupts, made once."""
    whole = folder / f"whole_{kind}_{world_size}"
    if not (whole / "done").exists():
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir(parents=True)
        flags = [*flags_of(kind), "--out", str(whole), "--name", "run"]
        (whole / "run").mkdir()
        processes, _ = start(fork, whole, flags, world_size)
        codes = wait(*processes, seconds=PATIENCE)
        assert set(codes) == {0}, (whole / "console.txt").read_text()[-3000:]
        (whole / "done").touch()
    return whole / "run"

def live(fork, folder, number, seed, torchrun=False, max_kills=8, world_sizes=(1, 2, 4)):
    """
    One life in folder/life_<number>, decided by seed and number alone: kills, and the comparison in the end.
    Returns a list of dicts, one a kill. Raises AssertionError if anything is not right.
    """
    rng = random.Random(f"{seed} {number}")
    kind = rng.choice(list(KINDS))
    world_size = rng.choice(world_sizes)
    keep = 1 if "--keep 1" in KINDS[kind] else 2
    whole = reference(fork, folder, kind, world_size)
    life = folder / f"life_{number}"
    shutil.rmtree(life, ignore_errors=True)
    life.mkdir()
    run = life / "run"
    flags = [*flags_of(kind), "--out", str(life), "--name", "run"]

    kills = []
    n_kills = rng.randint(1, max_kills)
    if torchrun:
        kills += kill_under_torchrun(life, flags, world_size, rng, n_kills)
    while len(kills) < n_kills and not torchrun:
        killed = kill_somewhere(fork, life, flags, world_size, rng)
        if killed is None:  # it came to its end before
            break
        kills.append(killed)
        if run.exists():
            check_files(run, keep, ended=False)
    processes, _ = start(fork, life, flags, world_size)
    codes = wait(*processes, seconds=PATIENCE)
    said = (life / "console.txt").read_text()
    assert set(codes) == {0}, said[-3000:]

    check_files(run, keep, ended=True)
    assert numbers(run) == numbers(whole)
    assert [path.name for path in list_checkpoints(run)] == [path.name for path in list_checkpoints(whole)]
    for path in list_checkpoints(run):
        assert same_bits(path, whole / path.name), path
    shutil.rmtree(life)
    return kills

@contextlib.contextmanager
def forkserver():
    """fork(function, *args), as the fixture of test_faults.py: starts processes that have imported it all."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    started = []

    def fork(function, *args):
        started[:] = [process for process in started if process.is_alive()]
        process = context.Process(target=function, args=args)
        process.start()
        started.append(process)
        return process

    try:
        yield fork
    finally:
        for process in started:
            process.kill()

def main():
    parser = argparse.ArgumentParser(description="Kill runs at random moments, and compare them to the bit.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=1000, help="stop after so many, in all starts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--torchrun", action="store_true", help="restarts by torchrun")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.folder = args.folder.absolute()
    print(f"seed {args.seed}, in {args.folder}")

    # what earlier starts have done
    record = args.folder / "soak.jsonl"
    rows = [row for row in read_rows(record) if (row["seed"], row["torchrun"]) == (args.seed, args.torchrun)]
    phases = Counter()
    for row in rows:
        phases.update(kill["phase"] for kill in row["kills"])
    number = len(rows)
    with forkserver() as fork, contextlib.suppress(KeyboardInterrupt):
        while sum(phases.values()) < args.kills:
            kills = live(fork, args.folder, number, args.seed, args.torchrun)
            append_row(record, dict(seed=args.seed, torchrun=args.torchrun, life=number, kills=kills))
            phases.update(kill["phase"] for kill in kills)
            number += 1
            print(f"{number} lives, {sum(phases.values())} kills, all as if nothing had happened: "
                  + ", ".join(f"{phase} {n}" for phase, n in sorted(phases.items())), flush=True)

if __name__ == "__main__":
    main()
