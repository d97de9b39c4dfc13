"""What several test files share: running the scripts as a user does, and reading what they wrote."""

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent.parent
# all scripts that can be run, as shell() takes them: train.py, research.plot, ..
COMMANDS = [path.name for path in sorted(ROOT.glob("*.py")) if "\n    run_main(main)" in path.read_text()]
COMMANDS += [f"research.{path.stem}" for path in sorted(ROOT.glob("research/*.py"))]
PARITY = Path(os.environ.get("PARITY_DIR", ROOT.parent / "shared/parity"))
PARITY_NANOCHAT = Path(os.environ.get("PARITY_NANOCHAT_DIR", ROOT.parent / "shared/parity_nanochat"))

# train.py's flags for a model of two layers that takes seconds to train on a CPU
TINY = "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 32 --window-pattern SL".split()
SMALL = TINY + "--total-batch-size 512 --eval-tokens 2048 --decode-tokens 512".split()
SMALL += "--device cpu --dtype float32".split()  # the same on every machine


def shell(script, *args, **env):
    """Run a script of ours, a module (research.plot) or a command in a process of its own."""
    if script.endswith(".py"):
        command = [sys.executable, ROOT / script, *args]
    elif script.startswith("research."):
        command = [sys.executable, "-m", script, *args]
    else:
        command = [script, *args]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=env)

def cli(script, *args):
    """Run main() of a script, "train.py" or "research.plot", in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            common.run_main(importlib.import_module(script.removesuffix(".py")).main)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return code, out.getvalue(), err.getvalue()

@contextlib.contextmanager
def no_open_files():
    """Within it, no file can be opened: "Too many open files". Holds for root, unlike permissions."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

def log(folder, kind="train"):
    """The rows of one kind in a run's log.jsonl."""
    with open(Path(folder) / "log.jsonl") as f:
        return [row for row in map(json.loads, f) if row["kind"] == kind]

def assert_refused(result, *words):
    """The (exit code, stdout, stderr) of a refusal: exit code 2, one line on stderr, with these words."""
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
