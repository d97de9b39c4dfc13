"""
The run folder: what a run leaves on disk, and how it is found, checked, loaded and taken back to a
checkpoint.

    ckpt_0001000.pt                       a checkpoint after so many steps: a dict with the keys of CHECKPOINT
    log.jsonl                             JSON lines: the run's id, training steps, evaluations, CORE,
                                          skipped steps
    tokenizer.tiktoken, tokenizer.json    those of the data it was trained on
    core_0001000.json, .csv               CORE, if it was scored (core.py)
    set_aside/                            checkpoints that were newer when the run went back to an older one
"""

import json
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from common import (
    UserError,
    compute_dtype,
    fsync,
    is_in_place,
    is_text,
    is_whole,
    lock,
    raise_if_unreadable,
    read_rows,
    say,
    write_atomic,
)
from interleave import Schedule
from recurrent import build_model, config_from_dict

VERSION = 1  # of the checkpoint's format; checkpoints from before it was counted have none and are version 0

SET_ASIDE = "set_aside"  # the folder, within that of the run, for checkpoints that nothing looks for any more
MAX_SET_ASIDE = 2  # how many of them stay

# the keys of a checkpoint and their types; save_checkpoint() and load_checkpoint() both go by it
CHECKPOINT = dict(
    version=int,
    model=dict,  # the model's state_dict, float32
    optimizers=list,  # the state_dict of each optimizer, AdamW first, with the state of all ranks
    step=int,  # optimizer steps done
    rows_seen=int,  # training rows read, over all ranks: the position in the data (dataset.Rows)
    seconds=float,  # time in training steps, over all starts
    config=dict,  # the fields of GPTConfig or RecurrentConfig
    schedule=dict,  # the fields of Schedule, of the last step
    args=dict,  # train.py's flags
    torch_rng=torch.Tensor,  # state of torch's random generator
    tokenizer_sha256=str,  # of the data's tokenizer
    shards_sha256=list,  # of the data's training shards, in order
    run_id=str,  # drawn when the run began; empty for those that began before there were any
)


# -----------------------------------------------------------------------------
# Checkpoints

class Damaged(UserError):
    """The content of a checkpoint is bad: only an older one can help."""

def save_checkpoint(path, **state):
    """
    Write a checkpoint with exactly the keys of CHECKPOINT, whole or not at all. Raises UserError (disk
    full).
    """
    checkpoint = dict(version=VERSION, **state)
    assert checkpoint.keys() == CHECKPOINT.keys(), checkpoint.keys() ^ CHECKPOINT.keys()
    write_atomic(path, lambda f: torch.save(checkpoint, f))

def load_checkpoint(path, verify=False):
    """
    The checkpoint at `path`, a dict with the keys of CHECKPOINT, its tensors on the CPU. verify: read all
    of it to compare its checksums, which torch.load does not do. Nothing in the file is executed. Raises
    Damaged if its content is damaged or of another program, Unreadable if it cannot be read now, and
    UserError if it is of a newer version.
    """
    if not is_text(str(path)):
        raise UserError(f"torch cannot open {ascii(str(path))}, which is not UTF-8: rename the folder")
    try:
        if verify:
            with zipfile.ZipFile(path) as z:
                damaged = z.testzip()
            if damaged:
                raise ValueError(f"{damaged} does not match its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint.setdefault("version", 0)
        checkpoint.setdefault("run_id", "")
        newer = checkpoint["version"] > VERSION
        if not newer:  # a newer version may have other keys
            update_schedule(checkpoint["schedule"])
            check_content(checkpoint)
            if step_of(path) not in (None, checkpoint["step"]):
                raise ValueError(f"it is of step {checkpoint['step']}, not of that in its name")
    except Exception as e:  # torch.load has no exception of its own for a damaged file
        raise_if_unreadable(path, e)
        reason = str(e).strip().split("\n")[0]
        raise Damaged(f"{path} is damaged or no checkpoint of nanolrt ({reason}): "
                      "use an older one, or train again") from e
    if newer:
        raise UserError(f"{path} has version {checkpoint['version']} of the checkpoint format, "
                        f"this program reads versions up to {VERSION}: update it")
    return checkpoint

def check_content(checkpoint):
    """Raises some exception unless a checkpoint has the keys, types and values that it must have."""
    for key, kind in CHECKPOINT.items():
        if not isinstance(checkpoint[key], kind):
            raise TypeError(f"{key} is no {kind.__name__}")
    for key in ("step", "rows_seen", "seconds"):
        if not 0 <= checkpoint[key] < 2**63:
            raise ValueError(f"{key} is {checkpoint[key]}")
    config_from_dict(checkpoint["config"])
    Schedule(**checkpoint["schedule"])

def update_schedule(schedule):
    """
    Bring the schedule of a checkpoint from before 2026-11-26 up to date, in place: forward-only passes had a
    number of their own, and what is called draft today was a refine schedule with as many of them.
    """
    forward_passes = schedule.pop("forward_passes", 0)
    if schedule["kind"] == "refine" and forward_passes == schedule["refinements"]:
        schedule |= dict(kind="draft", drafts=forward_passes, subsets=1, loss_weights=None)

def step_of(path):
    """The step in the name of a checkpoint, an int; None if it is not the name of one."""
    name = re.fullmatch(r"ckpt_(\d+)\.pt", Path(path).name)
    return int(name[1]) if name else None

def list_folder(folder):
    """
    The paths in a folder; [] if there is no such folder. Raises Unreadable, where Path.glob would find
    nothing.
    """
    try:
        return list(Path(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise_if_unreadable(folder, e)
        raise

def list_checkpoints(folder):
    """The checkpoints in a run folder, the newest last; not those that were set aside. Raises Unreadable."""
    return sorted((path for path in list_folder(folder) if step_of(path) is not None), key=step_of)

def changed_at(path):
    """When a file was last changed, in seconds; 0 if it is gone, as one that a run just removed (--keep)."""
    try:
        return os.path.getmtime(path)
    except FileNotFoundError:
        return 0
    except OSError as e:
        raise_if_unreadable(path, e)
        raise

def find_checkpoint(path=None):
    """
    The checkpoint file that `path` means: a file itself, the newest ckpt_*.pt of a run folder, or for
    None the newest of all runs/. Raises UserError if there is none.
    """
    if path is None:
        found = [file for folder in list_folder("runs") for file in list_checkpoints(folder)]
        found.sort(key=changed_at)
        if not found:
            raise UserError("no run in runs/: train one first, "
                            "for example with `python train.py --depth 4 --lrt shared`")
        return found[-1]
    path = Path(path)
    try:
        if path.is_file():
            return path
    except OSError as e:
        raise_if_unreadable(path, e)
        raise
    found = list_checkpoints(path)
    if not found:
        raise UserError(f"no checkpoint in {path}" if path.is_dir() else f"no such run or checkpoint: {path}")
    return found[-1]

def newest_checkpoint(path):
    """
    (path, checkpoint) of the file `path`, or of the newest checkpoint in the run folder `path` that is
    whole: damaged ones are passed over with a warning. Raises UserError if there is none, if it is of another
    run than the log beside it, and for one that cannot be read now or is of a newer version: it may be whole,
    and an older one would take its place.
    """
    newest = find_checkpoint(path)
    folder = newest.absolute().parent
    if folder.name == SET_ASIDE:
        raise UserError(f"{newest} was set aside: move it to {folder.parent} to go on with it")
    if Path(path).is_file():
        checkpoint = load_checkpoint(newest, verify=True)
        check_same_run(newest, checkpoint)
        return newest, checkpoint
    error = None
    for candidate in reversed(list_checkpoints(newest.parent)):
        try:
            checkpoint = load_checkpoint(candidate, verify=True)
        except Damaged as e:
            error = e
            say(f"warning: {e}")
        else:
            check_same_run(candidate, checkpoint)
            return candidate, checkpoint
    raise error

def check_same_run(path, checkpoint):
    """
    Raise UserError if a checkpoint lies beside the log of another run. That somebody put it there cannot be
    an accident, so it is neither gone on with nor passed over.
    """
    there = read_run_id(path.parent)
    if there is not None and there != checkpoint["run_id"]:
        raise UserError(f"{path} is of another run than the log beside it: move it out of {path.parent}, "
                        "or into a folder of its own to go on with it")


# -----------------------------------------------------------------------------
# From a checkpoint to a model

def load_weights(model, checkpoint):
    """Put a checkpoint's weights into a model. Raises UserError if they are those of another model."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError) as e:
        reason = str(e).split("\n")[-1].strip()
        raise UserError(f"the checkpoint's weights are not of its own configuration: {reason}") from e

# parameters that a model may have beyond those of the checkpoint it starts from
MEMORY_PARAMETERS = ("mem_k.", "mem_v.", "mem_lambdas", "mem_input", ".attn.gate.")

@torch.no_grad()
def start_from(model, checkpoint, path):
    """
    Begin with the weights of a checkpoint (--init-from). Memory may be new in the model: its projections and
    c are zero then, and its gates in their middle, so that at first it computes what the checkpoint does.
    Raises UserError if the two differ in anything else.
    """
    weights = checkpoint["model"]
    too_many = sorted(weights.keys() - dict(model.named_parameters()).keys())
    if too_many:
        raise UserError(f"{path} has {too_many[0]}, which this model lacks: leave out the flags that make "
                        "another model of it (memory can be added, not taken away)")
    for name, p in model.named_parameters():
        old = weights.get(name)
        if old is not None and old.shape == p.shape:
            p.copy_(old)
        elif old is None and any(part in name for part in MEMORY_PARAMETERS):
            p.zero_()
        elif old is not None and ".attn.gate." in name and len(old) < len(p):
            p.zero_()
            p[-len(old):] = old  # those of memory stand before those of the value embedding
        else:
            raise UserError(f"{path} has no {name} of the shape {tuple(p.shape)}: "
                            "leave out the flags that make another model of it")

def load_optimizers(optimizers, checkpoint, path):
    """Put a checkpoint's optimizer states into the optimizers. Raises UserError if they do not fit."""
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"the optimizer state of {path} does not fit its model ({e}): "
                        "use an older checkpoint, or train again") from e

def load_model(checkpoint, device):
    """
    The model of a loaded checkpoint on `device`, for inference: its matrices are in the dtype of the
    activations, bf16 where the GPU has it. Raises UserError.
    """
    with torch.device(device):
        model = build_model(config_from_dict(checkpoint["config"]))
    model.compute_dtype = compute_dtype(device)
    load_weights(model, checkpoint)
    for module in model.modules():  # once instead of at every token; rotary tables and scalars stay in fp32
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(model.compute_dtype)
    return model


# -----------------------------------------------------------------------------
# The run folder

def default_name(args):
    """The name of a run that was given none: d<depth>_<lrt>, or d<depth>_recurrent."""
    if args.arch == "recurrent":
        return f"d{args.depth}_recurrent"
    return f"d{args.depth}_{args.lrt or 'shared'}"

def new_run_folder(out, name, default, exist_ok=False):
    """
    Make out/name, or out/default, numbered if it exists, if name is None. Returns its path. exist_ok: a
    folder that is there may be used, as by a run that ended before its first checkpoint. Raises UserError
    if the name is taken.
    """
    for i in range(1, 10000):
        folder = Path(out) / (name or default)
        if i > 1:
            folder = folder.with_name(f"{folder.name}_{i}")
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
            return folder
        except FileExistsError as e:
            if name and not folder.is_dir():
                raise UserError(f"{folder} is no folder: give another --name") from e
            if name:
                raise UserError(f"{folder} exists: go on with it by --resume {folder}, "
                                "or give another --name") from e
        except OSError as e:
            raise UserError(f"cannot make {folder}: {e.strerror}") from e

class RunFolder:
    """The folder of a run that is being trained: locked, and with the files of its tokenizer."""

    def __init__(self, path, files):
        self.path = Path(path)
        self.files = files  # the bytes of files that belong there, by their names
        self.lock = None

    def hold(self):
        """
        Make the folder, lock it, and write its files; again, if somebody has moved or removed it since then.
        Raises UserError.
        """
        if self.lock is not None and is_in_place(self.lock, self.path / ".lock"):
            return
        self.lock = lock(self.path, "training")
        for name, raw in self.files.items():
            write_atomic(self.path / name, lambda f, raw=raw: f.write(raw))

class Log:
    """
    log.jsonl of a run, open for appending on rank 0; on other ranks it takes rows and writes nothing. What a
    full disk does not take is tried again with the next row. The first row has the run's id. A log that
    somebody moves or removes, with its folder perhaps, is put back by flush(): the open file still has it.
    Every row is handed on to the tracker, if there is one.
    """

    def __init__(self, folder, rank=0, run_id="", run_folder=None):
        self.path = Path(folder) / "log.jsonl"
        self.run_id = run_id
        self.run_folder = run_folder  # a RunFolder, which goes on holding the folder
        self.file = open(self.path, "a+b", buffering=0) if rank == 0 else None
        self.unwritten = b""
        self.tracker = None  # a tracking.Tracker
        if rank == 0 and run_id and read_run_id(folder) is None:
            self.add(kind="run", step=0, run_id=run_id)

    def add(self, **row):
        """Append one row."""
        if self.file is None:
            return
        self.unwritten += json.dumps(row).encode() + b"\n"
        with suppress(OSError):
            self.write()
        if self.tracker is not None:
            self.tracker.add(row)

    def put_back(self):
        """
        Write the log again if it is no longer in its place. Raises UserError, also if the folder is that of
        another run now.
        """
        if is_in_place(self.file, self.path):
            return
        if self.run_folder is not None:
            self.run_folder.hold()
        if read_run_id(self.path.parent) not in (None, self.run_id):
            raise UserError(f"{self.path.parent} is the folder of another run now")
        rows = os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0)
        write_atomic(self.path, lambda f: f.write(rows))
        self.file = open(self.path, "a+b", buffering=0)
        say(f"warning: {self.path} was moved or removed: it was written again")

    def flush(self):
        """Write what is not written yet. Raises OSError if the disk is full, and what put_back() raises."""
        self.put_back()
        self.write()

    def write(self):
        """Write what is not written yet into the open file, wherever that is. Raises OSError."""
        while self.unwritten:
            written = self.file.write(self.unwritten)
            self.unwritten = self.unwritten[written:]

    def sync(self):
        """Make sure that all rows are on the disk. Raises OSError, and what put_back() raises."""
        self.flush()
        fsync(self.file.fileno())

def read_log(folder):
    """
    The rows of a run's log.jsonl. Lines that a crash or a full disk cut short, or that are no rows of ours,
    are left out.
    """
    rows = []
    for row in read_rows(Path(folder) / "log.jsonl"):
        if isinstance(row, dict) and is_whole(row.get("step"), 0, 2**63 - 1) and "kind" in row:
            rows.append(row)
    return rows

def read_run_id(folder):
    """The id of the run whose log.jsonl is in the folder; None without one, or from before there were ids."""
    for row in read_log(folder):
        if row["kind"] == "run":
            return row.get("run_id")
    return None

def set_aside(paths):
    """
    Move checkpoints, oldest first, into the folder set_aside/ beside them, of which only the last
    MAX_SET_ASIDE stay. Raises UserError.
    """
    for path in paths:
        folder = path.parent / SET_ASIDE
        try:
            folder.mkdir(exist_ok=True)
            os.replace(path, folder / path.name)
        except OSError as e:
            raise UserError(f"cannot move {path} into {folder} ({e.strerror}): "
                            "make that a folder that may be written") from e
        say(f"{path} was set aside, into {folder}")
        # the time of the last change of a file's name
        moved = sorted(list_checkpoints(folder), key=lambda path: path.stat().st_ctime_ns)
        with suppress(OSError):
            for old in moved[:-MAX_SET_ASIDE]:
                old.unlink()

def rewind(folder, step):
    """
    Take the run back to `step`: what came later, in the log and as checkpoints, is about to be done
    again. Newer checkpoints are set aside. Returns the last step that was evaluated, -1 if none was.
    """
    # the checkpoints first: a log that is ahead of them is taken back by the next start, one behind is not
    set_aside([path for path in list_checkpoints(folder) if step_of(path) > step])
    for path in folder.glob("ckpt_*.pt.tmp"):
        with suppress(OSError):
            path.unlink()
    kept = []
    for row in read_log(folder):
        # an evaluation at `step` is of the checkpoint's weights, the training step of that number follows it
        if row["step"] < step or (row["step"] == step and row["kind"] == "eval"):
            kept.append(row)
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    write_atomic(folder / "log.jsonl", lambda f: f.write(lines.encode()))
    return max((row["step"] for row in kept if row["kind"] == "eval"), default=-1)
