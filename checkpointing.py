"""
The run folder: what a run leaves on disk, and how it is found, checked, loaded and taken back to a
checkpoint.

    ckpt_0001000.pt                       a checkpoint after so many steps: a dict with the keys of CHECKPOINT
    ckpt_0001000.share_1.pt               of several processes: what rank 1 holds of the optimizers' states, a
                                          dict with the keys of SHARE; rank 0's is in the checkpoint
    log.jsonl                             JSON lines: the run's id, training steps, evaluations, CORE,
                                          skipped steps, loss spikes
    tokenizer.tiktoken, tokenizer.json    those of the data it was trained on
    core_0001000.json, .csv               CORE, if it was scored (core.py)
    set_aside/                            checkpoints that were newer when the run went back to an older one
"""

import dataclasses
import json
import os
import re
import secrets
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import torch

from common import (
    UserError,
    check_regular,
    compute_dtype,
    from_all_ranks,
    fsync,
    is_in_place,
    is_text,
    is_whole,
    lock,
    publish,
    raise_if_unreadable,
    rank_and_world_size,
    read_rows,
    say,
    unlink,
    write_atomic,
    write_tmp,
    writing,
)
from flags import MOST
from interleave import Schedule
from model import GPTConfig
from recurrent import RecurrentConfig, build_model, config_from_dict
from sharding import load_whole_state_dict

# Of the checkpoint's format. 0: those from before it was counted, which have none. 1: with run_id. 2: with
# commit, save_id and shares, and with the optimizers' states of all ranks but the first in shares. 3: with
# left_out.
VERSION = 3

SET_ASIDE = "set_aside"  # the folder, within that of the run, for checkpoints that nothing looks for any more
MAX_SET_ASIDE = 2  # how many of them stay

# the keys of a checkpoint and their types; Saver and load_checkpoint() both go by it
CHECKPOINT = dict(
    version=int,
    commit=str,  # of the code that wrote it
    model=dict,  # the model's state_dict, float32
    optimizers=list,  # the state_dict of each optimizer, AdamW first, with the state that rank 0 holds
    shares=int,  # in how many files the optimizers' states are, this one included: the number of processes
    step=int,  # optimizer steps done
    rows_seen=int,  # training rows read, over all ranks: the position in the data (dataset.Rows)
    left_out=list,  # the first rows of batches that were left out because of a loss spike, of any row number
    seconds=float,  # time in training steps, over all starts
    config=dict,  # the fields of GPTConfig or RecurrentConfig
    schedule=dict,  # the fields of Schedule, of the last step
    args=dict,  # train.py's flags
    torch_rng=torch.Tensor,  # state of torch's random generator
    tokenizer_sha256=str,  # of the data's tokenizer
    shards_sha256=list,  # of the data's training shards, in order
    run_id=str,  # drawn when the run began; empty for those that began before there were any
    save_id=str,  # drawn for every checkpoint: its files belong together
)

# what older versions do not have, as it was then
OLDER = dict(version=0, run_id="", commit="unknown", shares=1, save_id="", left_out=[])

# the keys of a share
SHARE = dict(version=int, optimizers=list, rank=int, step=int, save_id=str)

CHUNK = 2**20  # bytes that are read at once to compare a checksum


# -----------------------------------------------------------------------------
# Writing checkpoints, while training goes on

class Saver:
    """
    Writes the checkpoints of a run in the background, one at a time. What save() is given is copied out while
    the next forward and backward run, which leave weights and optimizers' states as they are; whoever changes
    them calls wait_for_copy() first. Then a thread writes the copy. Rank 0 writes the checkpoint, the others
    a share each, with their part of the optimizers' states. When all files are on the disk, rank 0 gives the
    checkpoint its name: until then it does not exist, and nothing looks at its shares. All ranks have to make
    the same calls.
    """

    def __init__(self, folder, log, keep, group=None):
        self.folder = Path(folder)
        self.log = log
        self.keep = keep  # how many checkpoints stay
        self.group = group  # a process group that only the thread uses, see common.side_group()
        self.rank, self.world_size = rank_and_world_size()
        self.buffers = {}  # of the copies, on the CPU, by their place in the state: they are used again
        self.stream = None  # of CUDA, beside that of training, on which copies are made
        self.copied = Event()  # is everything copied out?
        self.copied.set()
        self.thread = None  # which copies what is on the CPU, and writes
        self.error = None  # what kept the last checkpoint from being written, a UserError
        self.failure = None  # what should not have happened in the thread, such as another rank's death
        self.good = -1  # checkpoints up to this step were evaluated, or need not be; a newer one may be bad
        self.saved_at = time.monotonic()

    def minutes_over(self, minutes):
        """Is the last save, or the start, so many minutes ago by this process's clock? 0: never."""
        return 0 < 60 * minutes <= time.monotonic() - self.saved_at

    def save(self, optimizers, step, final, **state):
        """
        Begin to copy a checkpoint out and to write it; one that is still being written is waited for. state:
        the rest of CHECKPOINT, of which only rank 0's matters. What keeps it from being written is said as a
        warning, and the next save is the next try. final: there is no next one, so wait, and raise a
        UserError if it was not saved.
        """
        self.wait()
        self.saved_at = time.monotonic()
        error = log_file = None
        if self.rank == 0:
            try:
                self.log.flush()
            except (OSError, UserError) as e:
                error = e
            log_file = self.log.file
        states = [optimizer.state_dict() for optimizer in optimizers]
        if self.rank == 0:
            content = dict(optimizers=states, step=step, shares=self.world_size, **state)
        else:
            content = dict(optimizers=states, step=step, rank=self.rank)
        if torch.cuda.is_initialized():
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
        copies = []  # that the thread makes
        with torch.cuda.stream(self.stream):
            content = copy_out(content, self.buffers, copies)
        self.copied.clear()
        self.thread = Thread(target=self.write, args=(content, copies, error, log_file, final))
        try:
            self.thread.start()
        except RuntimeError:  # the system gives no more threads, and what was trained must not be lost
            self.thread = None
            self.write(content, copies, error, log_file, final)
        if final:
            self.wait()
            if self.error is not None:
                raise UserError(f"{self.error}, then --resume {self.folder}")

    def wait_for_copy(self):
        """Wait until everything is copied out, as one must before changing weights or optimizers' states."""
        self.copied.wait()

    def finish_copy(self, copies):
        """Make copies, pairs of a tensor and what it is to be, and wait for those of the stream."""
        try:
            for buffer, value in copies:
                buffer.copy_(value)
            if self.stream is not None:
                self.stream.synchronize()
        finally:
            self.copied.set()

    def write(self, content, copies, error, log_file, final):
        """
        Write this rank's file of a checkpoint; the thread does that. content: what is in it, once the copies
        are made; error: what is wrong with the log, on rank 0; log_file: its open file.
        """
        step = content["step"]
        path = checkpoint_path(self.folder, step)
        mine = path if self.rank == 0 else share_path(path, self.rank)
        tmp = None

        def sync_log():
            if error is not None:
                raise error
            if log_file is not None:
                fsync(log_file.fileno())  # a checkpoint is never ahead of its log
            return secrets.token_hex(8)

        def write_file():
            nonlocal tmp
            with writing(mine):
                tmp = write_tmp(mine, lambda f: torch.save(content, f))
                if self.rank > 0:
                    publish(tmp, mine)

        def publish_checkpoint():
            if self.rank == 0:
                with writing(path):
                    publish(tmp, path)

        try:
            self.finish_copy(copies)
            # only when all ranks have done one thing do they do the next
            save_ids = self.together(sync_log)
            content |= dict(version=VERSION, save_id=save_ids[0])
            assert content.keys() == (CHECKPOINT if self.rank == 0 else SHARE).keys(), content.keys()
            self.together(write_file)
            self.together(publish_checkpoint)
            self.error = None
        except UserError as e:
            if tmp is not None:  # else a file of that name is not ours
                unlink(tmp)
                unlink(mine)
            self.error = UserError(f"step {step} was not saved: {e}; make room")
            if self.rank == 0 and not final:
                say(f"warning: {self.error}; training goes on, and the next save is the next try")
        except Exception as e:  # wait() raises it
            self.failure = e
        else:
            if self.rank == 0:
                say(f"saved {path}")
                self.remove_old(self.good)

    def together(self, work):
        """
        Call work() on every rank and return what it returned on each, a list. Raises UserError, the same on
        all of them, if it raised something on one.
        """
        error = value = None
        try:
            value = work()
        except Exception as e:
            error = str(e) or repr(e)
        outcomes = from_all_ranks((error, value), self.group)
        for rank, (error, _) in enumerate(outcomes):
            if error is not None:
                raise UserError(error if rank == 0 else f"rank {rank}: {error}")
        return [value for _, value in outcomes]

    def wait(self):
        """Wait until nothing is being written. Raises what should not have happened meanwhile."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            raise self.failure

    def remove_old(self, good):
        """
        Remove all but the newest checkpoints, on rank 0. What cannot be removed now may be at the next save.
        good: all checkpoints up to this step are; the newest of them stays in any case.
        """
        self.good = good
        if self.rank > 0:
            return
        with suppress(OSError, UserError):
            found = list_checkpoints(self.folder)
            known_good = [path for path in found if step_of(path) <= good]
            for path in found[:-self.keep]:
                if path not in known_good[-1:]:
                    remove_checkpoint(path)

def copy_out(value, buffers, copies, place=()):
    """
    A copy of nested dicts and lists, their tensors on the CPU. buffers: the tensors of the last copy, by
    their place, which are written over; what comes from a GPU goes into memory that it can write to by
    itself, and is there when its stream has come so far. What is on the CPU already is added to `copies`, a
    list of pairs (the tensor of the copy, what is to be copied into it), for somebody else to do.
    """
    if isinstance(value, dict):
        return {key: copy_out(x, buffers, copies, (*place, key)) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [copy_out(x, buffers, copies, (*place, i)) for i, x in enumerate(value)]
    if not isinstance(value, torch.Tensor):
        return value
    buffer = buffers.get(place)
    if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
        buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        buffers[place] = buffer
    if value.is_cpu:
        copies.append((buffer, value))
        return buffer
    return buffer.copy_(value, non_blocking=value.is_cuda)

def checkpoint_path(folder, step):
    """Where a checkpoint belongs."""
    return Path(folder) / f"ckpt_{step:07d}.pt"

def share_path(path, rank):
    """Where the share of a rank belongs, beside its checkpoint."""
    return path.with_name(f"{path.stem}.share_{rank}.pt")

def list_shares(path):
    """The shares that lie beside a checkpoint, whether or not it is there."""
    return sorted(path.parent.glob(f"{path.stem}.share_*.pt"))

def remove_checkpoint(path):
    """Remove a checkpoint, then its shares. Raises OSError."""
    shares = list_shares(path)
    path.unlink(missing_ok=True)
    for share in shares:
        share.unlink(missing_ok=True)

def remove_leftovers(folder):
    """Remove what a killed process left of a checkpoint: half-written files, shares without a checkpoint."""
    leftovers = list(folder.glob("ckpt_*.pt.tmp"))
    for share in folder.glob("ckpt_*.share_*.pt"):
        path = share.with_name(share.name.split(".")[0] + ".pt")
        if not path.exists():
            leftovers.append(share)
    for path in leftovers:
        unlink(path)


# -----------------------------------------------------------------------------
# Reading checkpoints

class Damaged(UserError):
    """The content of a checkpoint is bad: only an older one can help."""

def load_checkpoint(path, shares=False, verify=True):
    """
    The checkpoint at `path`, a dict with the keys of CHECKPOINT, its tensors on the CPU. shares: with the
    optimizers' states of all ranks, from the shares beside it. verify: read all of it to compare its
    checksums, which torch.load does not do; else only what is no tensor, for verify_together() to do the
    rest. Nothing in the file is executed. Raises Damaged if its content is damaged or of another program,
    Unreadable if it cannot be read now, and UserError if it is of a newer version.
    """
    path = Path(path)
    checkpoint = read_file(path, verify)
    with judging(path):
        update_schedule(checkpoint["schedule"])
        check_content(checkpoint)
        if step_of(path) not in (None, checkpoint["step"]):
            raise ValueError(f"it is of step {checkpoint['step']}, not of that in its name")
    if not shares:
        return checkpoint
    for rank in range(1, checkpoint["shares"]):
        share_file = share_path(path, rank)
        with judging(path):
            try:
                os.stat(share_file)
            except FileNotFoundError as e:
                raise ValueError(f"{share_file.name} is missing") from e
        share = read_file(share_file, verify)
        with judging(share_file):
            check_types(share, SHARE)
            if share["save_id"] != checkpoint["save_id"] or share["rank"] != rank:
                raise ValueError(f"it does not belong to {path}")
            for whole, part in zip(checkpoint["optimizers"], share["optimizers"], strict=True):
                whole["state"] |= part["state"]
    return checkpoint

@contextmanager
def judging(path):
    """Within it, whatever is raised about the content of a file becomes Damaged, or Unreadable."""
    try:
        yield
    except Exception as e:  # torch.load has no exception of its own for a damaged file
        raise_if_unreadable(path, e)
        reason = str(e).strip().split("\n")[0]
        raise Damaged(f"{path} is damaged or no checkpoint of nanolrt ({reason}): "
                      "use an older one, or train again") from e

def read_file(path, verify):
    """
    What is in a checkpoint or a share, a dict with what older versions do not have. Raises Damaged,
    Unreadable, and UserError if it is of a newer version, which may have other keys.
    """
    if not is_text(str(path)):
        raise UserError(f"torch cannot open {ascii(str(path))}, which is not UTF-8: rename the folder")
    check_regular(path)
    with judging(path):
        compare_checksums([path], tensors=verify)
        content = OLDER | torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if type(content["version"]) is not int or content["version"] < 0:
            raise TypeError(f"version {content['version']!r}")
        newer = content["version"] > VERSION
    if newer:
        raise UserError(f"{path} has version {content['version']} of the checkpoint format, "
                        f"this program reads versions up to {VERSION}: update it")
    return content

def compare_checksums(paths, tensors=True, rank=0, world_size=1):
    """
    Read the records of checkpoint files, several at a time, and compare their checksums. tensors: those of
    tensors, too. Every rank reads its part of them, about as many bytes as the others. Raises ValueError for
    the first record that is not what was written, and what zipfile raises.
    """
    def check(record):
        path, archive, info = record
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{info.filename} is compressed, which torch does not do")
        with archive.open(info) as f:  # raises BadZipFile at the end of a record that is not right
            while f.read(CHUNK):
                pass

    with ExitStack() as stack:
        records = []
        for path in paths:
            archive = stack.enter_context(zipfile.ZipFile(path))
            for info in archive.infolist():
                is_tensor = "/data/" in info.filename
                if tensors or not is_tensor:
                    records.append((path, archive, info))
        records.sort(key=lambda record: record[2].file_size, reverse=True)
        mine = records[rank::world_size]
        if sum(info.file_size for _, _, info in mine) < 64 * CHUNK:  # threads would not pay
            for record in mine:
                check(record)
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(check, mine):
                    pass

def verify_together(path, checkpoint, group=None):
    """
    Compare the checksums of a checkpoint and its shares, every rank a part of them. Returns None, or what is
    wrong with it, a Damaged, the same on all ranks. Raises Unreadable.
    """
    rank, world_size = rank_and_world_size()
    path = Path(path)
    files = [path] + [share_path(path, i) for i in range(1, checkpoint["shares"])]
    error = None
    try:
        with judging(path):
            compare_checksums(files, rank=rank, world_size=world_size)
    except Damaged as e:
        error = str(e)
    errors = [e for e in from_all_ranks(error, group) if e is not None]
    return Damaged(errors[0]) if errors else None

def check_types(content, keys):
    """Raise an exception unless a dict has these keys, with values of these types."""
    for key, kind in keys.items():
        if not has_type(content[key], kind):
            raise TypeError(f"{key} is no {kind.__name__}")

def has_type(value, kind):
    """isinstance, but that True is no number, and a whole number is a float, too."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float and isinstance(value, int):
        return True
    return isinstance(value, kind)

def check_fields(values, kind):
    """
    Raise TypeError or ValueError unless the values of a dict are such as the fields of the same names of this
    dataclass take. What is too large to be true would build a model, or passes, for hours.
    """
    most = dict(n_layer=MOST["depth"], sequence_len=MOST["max_seq_len"], refinements=MOST["refinements"],
                drafts=MOST["drafts"])
    for field in dataclasses.fields(kind):
        value = values.get(field.name, field.default)
        if not has_type(value, field.type):
            raise TypeError(f"{field.name} is {value!r}")
        if isinstance(value, int) and value > most.get(field.name, 2**31):
            raise ValueError(f"{field.name} is {value}")

def check_content(checkpoint):
    """Raises some exception unless a checkpoint has the keys, types and values that it must have."""
    check_types(checkpoint, CHECKPOINT)
    if not 1 <= checkpoint["shares"] < 2**20:
        raise ValueError(f"it has {checkpoint['shares']} shares")
    for key in ("step", "rows_seen", "seconds"):
        if not 0 <= checkpoint[key] < 2**63:
            raise ValueError(f"{key} is {checkpoint[key]}")
    for name, p in checkpoint["model"].items():
        if not isinstance(p, torch.Tensor) or not p.is_floating_point():
            raise TypeError(f"{name} is no tensor of floating-point numbers")
    data = checkpoint["args"].get("data", "")
    if not isinstance(data, str) or "\0" in data:
        raise ValueError(f"the name of its data is {data!r}")
    # types first: what these two check are values
    kind = GPTConfig if checkpoint["config"].get("arch", "gpt") == "gpt" else RecurrentConfig
    check_fields(checkpoint["config"], kind)
    check_fields(checkpoint["schedule"], Schedule)
    config = config_from_dict(checkpoint["config"])
    schedule = Schedule(**checkpoint["schedule"])
    if schedule.loss_weights is not None:
        schedule.passes(config.sequence_len)  # there must be one for each
    if not all(type(layer) is int for layer in config.dest_layers or ()):
        raise TypeError(f"dest_layers are {config.dest_layers}")

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

def newest_checkpoint(path, damaged=()):
    """
    (path, checkpoint) of the file `path`, or of the newest checkpoint in the run folder `path` that is
    whole, as far as can be seen without reading its tensors: verify_together() does that. Damaged ones are
    passed over with a warning, and those that are known to be, the paths in `damaged`. Raises UserError if
    there is none, if it is of another run than the log beside it, and for one that cannot be read now or is
    of a newer version: it may be whole, and an older one would take its place.
    """
    newest = find_checkpoint(path)
    folder = newest.absolute().parent
    if folder.name == SET_ASIDE:
        raise UserError(f"{newest} was set aside: move it to {folder.parent} to go on with it")
    if Path(path).is_file():
        checkpoint = load_checkpoint(newest, shares=True, verify=False)
        check_same_run(newest, checkpoint)
        return newest, checkpoint
    error = UserError(f"no checkpoint in {path} is whole: train again")
    for candidate in reversed(list_checkpoints(newest.parent)):
        if candidate in damaged:
            continue
        try:
            checkpoint = load_checkpoint(candidate, shares=True, verify=False)
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
        load_whole_state_dict(model, checkpoint["model"])
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
    activations, bf16 where the GPU has it. Raises UserError, also for weights that are no finite numbers: a
    run that has diverged computes nonsense.
    """
    with torch.device(device):
        model = build_model(config_from_dict(checkpoint["config"]))
    model.compute_dtype = compute_dtype(device)
    load_weights(model, checkpoint)
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise UserError(f"{name} of the checkpoint after step {checkpoint['step']} is not finite: "
                            "use an older one, or train again")
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

    def take_back(self, step):
        """
        Take the run's folder back to `step`, see rewind(), and go on with the log of that. Returns the last
        step that was evaluated, on rank 0; -1 on others, where nothing happens. Raises UserError.
        """
        if self.file is None:
            return -1
        try:
            self.sync()
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}; make room, then --resume") from e
        evaluated = rewind(self.path.parent, step)
        self.file = open(self.path, "a+b", buffering=0)
        return evaluated

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
            for file in [*list_shares(path), path]:  # where it is, its shares are
                os.replace(file, folder / file.name)
        except OSError as e:
            raise UserError(f"cannot move {path} into {folder} ({e.strerror}): "
                            "make that a folder that may be written") from e
        say(f"{path} was set aside, into {folder}")
        # the time of the last change of a file's name
        moved = sorted(list_checkpoints(folder), key=lambda path: path.stat().st_ctime_ns)
        with suppress(OSError):
            for old in moved[:-MAX_SET_ASIDE]:
                remove_checkpoint(old)

def rewind(folder, step):
    """
    Take the run back to `step`: what came later, in the log and as checkpoints, is about to be done
    again. Newer checkpoints are set aside. Returns the last step that was evaluated, -1 if none was.
    """
    # the checkpoints first: a log that is ahead of them is taken back by the next start, one behind is not
    set_aside([path for path in list_checkpoints(folder) if step_of(path) > step])
    remove_leftovers(folder)
    kept = []
    for row in read_log(folder):
        # an evaluation at `step` is of the checkpoint's weights, the training step of that number follows it
        if row["step"] < step or (row["step"] == step and row["kind"] == "eval"):
            kept.append(row)
    in_log = {row["step"] for row in kept if row["kind"] in ("train", "skip")}
    if len(in_log) < step:
        say(f"warning: {folder / 'log.jsonl'} lacks {step - len(in_log)} of {step} steps: "
            "it was cut or damaged, or begins later")
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    write_atomic(folder / "log.jsonl", lambda f: f.write(lines.encode()))
    return max((row["step"] for row in kept if row["kind"] == "eval"), default=-1)
