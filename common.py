"""
What every script needs and none is about: errors in one line, the command line, files that are whole or
absent, locks, JSON lines, devices, the process group, and which machine this is.

This file imports nothing of ours, and torch only inside the functions that need it: prepare_data.py calls
none of them and starts in a quarter of a second.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

# -----------------------------------------------------------------------------
# Errors and the command line

class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do about it."""

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults in --help, but not "(default: None)", which tells nobody anything."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

class ArgumentParser(argparse.ArgumentParser):
    """argparse with the defaults in --help, and with errors of one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": HelpFormatter, **kwargs})

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")

def flag(name):
    """
    How the option behind an attribute of the parsed arguments is typed: num_iterations -> --num-iterations.
    """
    return "--" + name.replace("_", "-")

def at_least(args, **least):
    """
    Check numbers from the command line: at_least(args, depth=1) raises UserError if args.depth is below 1,
    infinite, nan, or too large for 64 bits. None, a flag that was not given, passes.
    """
    for name, low in least.items():
        value = getattr(args, name)
        high = 2**63 if isinstance(value, int) else float("inf")
        if value is not None and not low <= value < high:
            raise UserError(f"{flag(name)} must be a number of at least {low}, not {value}")

def run_main(main):
    """Call main(). A UserError becomes `error: <message>` on stderr and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal cannot show is no reason to end
            stream.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# -----------------------------------------------------------------------------
# Files that are whole or absent

def publish(tmp, path):
    """Rename the finished, fsynced file tmp to path, and make the rename itself durable."""
    os.replace(tmp, path)
    fd = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

def write_atomic(path, write):
    """
    Create or replace the file `path` with what write(f) puts into the binary file f, all of it or nothing.
    Whatever write raises is passed on and the temporary file removed; an OSError becomes a UserError.
    """
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        publish(tmp, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        # torch.save hides a full disk behind a RuntimeError of its own
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError):
            raise UserError(f"cannot write {path}: {cause.strerror or cause}") from e
        raise

def write_json(path, value):
    """Write value as indented JSON, all of it or nothing."""
    write_atomic(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))

def check_folder(path):
    """Raise UserError if the folder that the file `path` is to be written to does not exist. None passes."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {Path(path).parent}")

def sha256_file(*paths):
    """Hex sha256 of the bytes of these files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()

def lock(folder, what):
    """
    Create the folder and hold it for as long as the returned file is open. A second process that wants it
    gets a UserError that says `what` is writing there.
    """
    import fcntl
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        f = open(Path(folder) / ".lock", "w")
    except OSError as e:
        raise UserError(f"cannot write to the folder {folder} ({e.strerror}): choose another --out") from e
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        f.close()
        raise UserError(f"another {what} is writing {folder}: wait for it or choose another folder") from e
    return f


# -----------------------------------------------------------------------------
# Results as JSON lines, one row a line, which several processes may be writing

def read_rows(path):
    """
    The rows of a file of JSON lines; [] if there is no such file. A line that a crash cut short is left out.
    Raises UserError if the file cannot be read.
    """
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows

def append_row(path, row):
    """Add one line to a file of JSON lines, all of it or nothing. Raises UserError if that cannot be done."""
    import fcntl
    try:
        with open(path, "a+b", buffering=0) as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            end = f.seek(0, os.SEEK_END)
            line = json.dumps(row).encode() + b"\n"
            if end > 0 and os.pread(f.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # a crash left the last line without its end
            if f.write(line) < len(line):
                f.truncate(end)
                raise UserError(f"cannot write {path}: the disk is full")
            os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e


# -----------------------------------------------------------------------------
# Devices and the process group

def pick_device(name=None):
    """
    The device of this name, or the best there is. Under torchrun every process of a node has its own GPU.
    Raises UserError if torch cannot use it.
    """
    import torch
    if name is None:
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("choose cuda, mps or cpu")
        if device.type == "cuda" and torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            n_gpus = torch.cuda.device_count()
            if device.index >= n_gpus:
                raise RuntimeError(f"{device} does not exist, this machine has {n_gpus} GPUs; "
                                   "lower --nproc_per_node")
            torch.cuda.set_device(device)  # before anything is allocated, which would else be on GPU 0
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"device {name!r} cannot be used here: {reason}") from e
    return device

def compute_dtype(device):
    """The dtype of activations: bf16 on GPUs that have it, fp32 elsewhere. Weights are fp32 everywhere."""
    import torch
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32

def init_processes(device_name=None, timeout=None):
    """
    Join the process group if torchrun started this process. Returns this process's device (see
    pick_device), its rank, and the world size: 0 and 1 without torchrun. timeout: how long a collective may
    take, a timedelta. Raises UserError if there is no such device.
    """
    import torch
    import torch.distributed as dist
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        # with its device, NCCL connects right away, and no collective has to guess it
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout,
                                device_id=device if on_gpu else None)
    return device, rank, world_size

def end_processes():
    """Wait for the other processes and leave the process group, if there is one."""
    import torch.distributed as dist
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

def rank_and_world_size():
    """This process's rank and the world size; (0, 1) without a process group."""
    import torch.distributed as dist
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()

def from_rank_0(value, device=None):
    """
    Broadcast rank 0's value, anything that can be pickled, and return it; the other ranks' values are
    ignored. device: the GPU that NCCL sends it through.
    """
    import torch.distributed as dist
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, device=device)
    return values[0]


# -----------------------------------------------------------------------------
# The machine

# peak dense bf16 FLOP/s, for the model FLOPs utilization, from the vendors' data sheets
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}

def peak_flops(device):
    """Peak FLOP/s of a device, None if it is not known."""
    import torch
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu, flops in PEAK_FLOPS.items():
            if gpu in name:
                return flops
    return None

def cpu_name():
    """The CPU's name, from /proc/cpuinfo where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()

def machine(device):
    """Where and on what something was measured: device, torch, commit and date, a dict of strings."""
    import torch
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    # rows that earlier runs wrote are no change of the code
    diff = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!research/results"]
    if subprocess.run(diff, capture_output=True).returncode == 1:
        commit += "-dirty"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return dict(device=name, torch=torch.__version__, commit=commit or "unknown", date=str(date.today()))
