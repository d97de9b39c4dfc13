"""
What every script needs and none is about: errors in one line, the command line, streams, what the operating
system refuses, files that are whole or absent, locks, JSON lines, devices, the process group, and which
machine this is.

This file imports nothing of ours, and torch only inside the functions that need it: prepare_data.py calls
none of them and starts in a quarter of a second.
"""

import argparse
import contextlib
import errno
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import resource
import signal
import stat
import subprocess
import sys
import zlib
from datetime import date
from pathlib import Path

# -----------------------------------------------------------------------------
# Errors and the command line

class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do about it."""

class Unreadable(UserError):
    """The operating system does not let us read a file now. That says nothing about what it contains."""

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults in --help, but not "(default: None)", which tells nobody anything."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)

class ArgumentParser(argparse.ArgumentParser):
    """
    argparse with the defaults in --help, and with errors of one line and exit code 2. Empty arguments are
    refused, but for flags that are empty by default: an empty name of a folder would mean the current one.
    """

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": HelpFormatter, **kwargs})

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            values = value if isinstance(value, list) else [value]
            if "" in values and self.get_default(name) != "":
                self.error(f"the argument for {name} is empty: was a variable not set?")
        return parsed

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")

def flag(name):
    """
    How the option behind an attribute of the parsed arguments is typed: num_iterations -> --num-iterations.
    """
    return "--" + name.replace("_", "-")

def is_whole(value, low, high):
    """Is this value, from a file, a whole number (no bool, no 1.0) from low to high?"""
    return type(value) is int and low <= value <= high

def at_least(args, **least):
    """
    Check numbers from the command line, or from a checkpoint: at_least(args, depth=1) raises UserError if
    args.depth is no number, below 1, infinite, nan, or too large for 64 bits. None, a flag that was not
    given, passes.
    """
    for name, low in least.items():
        value = getattr(args, name)
        high = 2**63 if isinstance(value, int) else float("inf")
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not low <= value < high:
            too_large = ", which is too large" if isinstance(value, (int, float)) and value >= high else ""
            raise UserError(f"{flag(name)} must be a number of at least {low}, not {value}{too_large}")

def at_most(args, **most):
    """The same for upper bounds, after at_least(): at_most(args, depth=1000)."""
    for name, high in most.items():
        value = getattr(args, name)
        if value is not None and not value <= high:
            raise UserError(f"{flag(name)} must be at most {high}, not {value}")


# -----------------------------------------------------------------------------
# The streams of a script, and how it ends

def prepare_streams():
    """
    Make stdin, stdout and stderr usable, whatever the caller has made of them. Files and pipes get UTF-8 as
    all files of ours, a terminal its own encoding, and a line is written when it is complete, so that a log
    can be followed and is not lost with the process.
    """
    # the number of a closed stream would be given to the next file that is opened, and errors written into it
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")

    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        encoding = stream.encoding if stream.isatty() else "utf-8"
        if stream is sys.stdin:  # what is not text comes in as it does in arguments: see is_text()
            if not stream.isatty():
                encoding = "utf-8-sig"  # a file may begin with a byte order mark
            stream.reconfigure(encoding=encoding, errors="surrogateescape")
        else:  # what a terminal cannot show is no reason to end
            stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)

def flush_streams():
    """
    Write what stdout and stderr still hold. Returns None, or the OSError of what cannot be written, which is
    dropped: Python would complain about it, and end with exit code 120.
    """
    error = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as e:
            error = e
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return error

def say(text, file=None):
    """
    Print a line that tells how the work goes, to stdout or to the stream `file`, above a progress bar if
    there is one. A console that has gone or goes to a full disk is no reason to end the work.
    """
    from tqdm import tqdm
    try:
        tqdm.write(text, file)
    except BrokenPipeError:
        flush_streams()  # nobody will read it any more; a full disk may have room later
    except OSError:
        pass

def say_error(text):
    """Print an error of one line to stderr."""
    with contextlib.suppress(OSError):
        print("error: " + " ".join(text.split()), file=sys.stderr)

NO_MORE_THREADS = "can't start new thread"  # what Python's RuntimeError says

def out_of_memory(error):
    """Does this error say that memory ran out, of the machine or of a GPU? torch has it in its text."""
    texts = ("out of memory", os.strerror(errno.ENOMEM))
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)

def run_main(main):
    """
    Call main() with streams that can be used. A UserError becomes `error: <message>` on stderr and exit code
    2, and so do memory that runs out and output that cannot be written; Ctrl-C is exit code 130; a reader
    that has read enough, as in `| head`, is exit code 1. Before main() and after it, Ctrl-C ends the process
    at once: there is nothing to lose, and Python would only show where it was.
    """
    prepare_streams()
    code = 0
    output_error = None
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # since the first line of the script
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except SystemExit as e:  # --help, and errors of the command line
        code = e.code
    except UserError as e:
        say_error(str(e))
        code = 2
    except KeyboardInterrupt:
        code = 130
    except SystemError as e:  # what a library that is no Python may make of Ctrl-C
        if not isinstance(e.__cause__, KeyboardInterrupt):
            raise
        code = 130
    except (MemoryError, RuntimeError) as e:
        if NO_MORE_THREADS in str(e):
            say_error("the system gives this process no more threads: raise the limit of processes "
                      "(`ulimit -u`, or that of the container) or of memory (`ulimit -v`)")
        elif out_of_memory(e):
            reason = (str(e).strip() or "MemoryError").split("\n")[0]
            say_error(f"out of memory ({reason}): lower the batch size of a device or the size of the model; "
                      "train.py --dry-run says what training needs")
        else:
            raise
        code = 2
    except OSError as e:
        # of files with a name, main() says more; all else is a bug, and shows its traceback
        if not isinstance(e, BrokenPipeError) and e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        output_error = e
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output_error = flush_streams() or output_error
    if output_error and not code:
        code = 1
        if not isinstance(output_error, BrokenPipeError):
            say_error(f"cannot write the output: {output_error.strerror}")
            code = 2
    if code:
        sys.exit(code)

def check_command_line(parse_args):
    """
    Parse the command line of a script whose imports take seconds before it imports them: --help, and flags
    that are wrong, end the process here. Its main() parses again.
    """
    passed = False

    def check():
        nonlocal passed
        parse_args()
        passed = True

    run_main(check)
    if not passed:  # --help
        sys.exit()


# -----------------------------------------------------------------------------
# What the operating system refuses is not what a file contains

# what keeps a file from being opened or read, however whole it is
REFUSALS = (
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,  # a file handle that an NFS server no longer knows
    errno.ETIMEDOUT,
)

def refusal(error):
    """
    What the operating system said when it refused to open or to read a file; None if the error is of
    another kind, so that the content of the file is bad.
    """
    code = None
    if isinstance(error, MemoryError):
        code = errno.ENOMEM
    elif isinstance(error, OSError):
        # gzip's and pyarrow's errors have no number; a seek to where a damaged file points is EINVAL
        code = error.errno if error.errno != errno.EINVAL else None
    elif isinstance(error, RuntimeError):
        # torch has it in its text: "unable to open file <x.pt> in read-only mode: Too many open files (24)"
        code = next((code for code in REFUSALS if os.strerror(code) in str(error)), None)
    if code is None:
        return None
    if code == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"{os.strerror(code)}: the limit of this process is {limit}, raise it with `ulimit -n`"
    return os.strerror(code)

# refusals of which the path is the reason
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)

def raise_if_unreadable(path, error):
    """Raise Unreadable if this error, met while reading `path`, is a refusal of the operating system."""
    reason = refusal(error)
    if reason is None:
        return
    advice = "it may be whole, so make it readable and run the same command again"
    if isinstance(error, OSError) and error.errno in NO_FILE:
        advice = "check its name, and where it leads to if it is a link"
    raise Unreadable(f"cannot read {path} ({reason}): {advice}") from error

def check_regular(*paths):
    """
    Raise Unreadable for one of these that is there and no regular file, of which all files of ours are: to
    open a named pipe would wait for somebody who writes.
    """
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # whoever opens it says so
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise Unreadable(f"cannot read {path}: it is a pipe, a socket or a device, no regular file: "
                             "put the file in its place, or name another one")


# -----------------------------------------------------------------------------
# Files that are whole or absent

# what a file system says of what it does not have: locks on Lustre or some NFS, an fsync of folders on CIFS
NOT_SUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK, errno.ENOTTY)

def fsync(descriptor):
    """Make sure that a file, or a folder's list of names, is on the disk, if the file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in NOT_SUPPORTED:
            raise

def publish(tmp, path):
    """Rename the finished, fsynced file tmp to path, and make the rename itself durable."""
    os.replace(tmp, path)
    try:
        fd = os.open(Path(path).parent, os.O_RDONLY)
    except PermissionError:
        return  # a folder that may be written and not read cannot be synced
    try:
        fsync(fd)
    finally:
        os.close(fd)

def open_special(path):
    """
    What is neither a file nor missing, such as /dev/null, /dev/stdout or a named pipe, opened for writing in
    place; None for what can be replaced. A file that is our own stdout or stderr counts as such.
    """
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return None
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # closed, or no file
            if os.path.samestat(there, os.fstat(stream.fileno())):
                stream.flush()
                return open(os.dup(stream.fileno()), "wb")  # goes on where the stream is
    if stat.S_ISREG(there.st_mode):
        return None
    return open(path, "wb")

@contextlib.contextmanager
def writing(path):
    """Within it, what the file system says of the file `path` becomes a UserError of one line."""
    try:
        yield
    except Exception as e:
        # torch.save hides a full disk behind a RuntimeError of its own
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError):
            reason = cause.strerror or f"{cause}: is the disk full?"  # numpy only counts what was written
            raise UserError(f"cannot write {path}: {reason}") from e
        raise

def write_tmp(path, write):
    """
    Write what write(f) puts into the binary file f to a temporary file beside `path`, down to the disk.
    Returns its path; publish() makes `path` of it. Whatever is raised meanwhile is passed on, and the
    temporary file removed.
    """
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            fsync(f.fileno())
    except BaseException:
        unlink(tmp)
        raise
    return tmp

def unlink(path):
    """Remove a file, if that can be done."""
    with contextlib.suppress(OSError):
        os.unlink(path)

def write_atomic(path, write):
    """
    Create or replace the file `path` with what write(f) puts into the binary file f, all of it or nothing;
    a link is followed, and what is no file is written in place. Whatever write raises is passed on and the
    temporary file removed; an OSError becomes a UserError.
    """
    with writing(path):
        special = open_special(path)
        if special:
            with special as f:
                write(f)
            return
        target = os.path.realpath(path)
        tmp = write_tmp(target, write)
        try:
            publish(tmp, target)
        except BaseException:
            unlink(tmp)
            raise

def write_json(path, value):
    """Write value as indented JSON, all of it or nothing."""
    write_atomic(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))

def check_folder(path):
    """
    Raise UserError if the file `path` cannot be written later: it is a folder, or the one that it belongs in
    does not exist or may not be written. None passes.
    """
    if path is None:
        return
    path = Path(path)
    target = os.path.realpath(path)
    folder = Path(target).parent
    mode = stat.S_IFREG
    with writing(path):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"cannot write {path}: it is a folder")
        if stat.S_ISSOCK(mode):
            raise UserError(f"cannot write {path}: it is a socket")
        if not folder.is_dir():
            raise UserError(f"cannot write {path}: there is no folder "
                            f"{folder if path.is_symlink() else path.parent}")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(f"{target}.tmp")  # a name that is too long
    if stat.S_ISREG(mode) and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {path.parent} may not be written")

# the names of what a run, prepared data and the bundle of CORE consist of
OWN_FILES = re.compile(r"ckpt_\d+(\.share_\d+)?\.pt|log\.jsonl|core_\d+.*\.(json|csv)|"
                       r"tokenizer\.(tiktoken|json)|(meta|settings)\.json|verified\.jsonl|"
                       r"token_bytes\.npy|(train|val)_\d+\.npy|core\.yaml|eval_meta_data\.csv")

def check_output(args, name, inputs=()):
    """
    Raise UserError if the file that args has under this name cannot be written later, see check_folder(), or
    if writing it would replace one of the inputs, paths or None, or what a run or a data folder consists of.
    None passes.
    """
    out = getattr(args, name)
    check_folder(out)
    if out is None:
        return
    target = os.path.realpath(out)
    if os.path.exists(target) and not os.path.isfile(target):  # /dev/null
        return
    if os.path.exists(target) and OWN_FILES.fullmatch(os.path.basename(target)):
        raise UserError(f"{flag(name)} {out} would replace a file of a run or of prepared data: "
                        "choose another name")
    for path in inputs:
        # a file is written beside it first, and then renamed
        for written in (target, f"{target}.tmp") if path is not None else ():
            same = os.path.realpath(path) == written
            with contextlib.suppress(OSError):
                same = same or os.path.samefile(path, written)
            if same:
                raise UserError(f"{flag(name)} {out} would replace {path}: choose another name")

def check_new_folder(folder):
    """Raise UserError unless files can be written to this folder later, which may have to be made first."""
    try:
        there = Path(folder).absolute()  # not if the current folder was removed
        while not os.path.lexists(there):  # a link to nowhere is there, and no folder
            there = there.parent
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as e:
        raise UserError(f"cannot write to the folder {folder} ({e.strerror}): choose another --out") from e
    if not usable:
        reason = "may not be written" if there.is_dir() else "is no folder"
        raise UserError(f"cannot write to the folder {folder} ({there} {reason}): choose another --out")

def sha256_file(*paths):
    """Hex sha256 of the bytes of these files, one after another. Raises Unreadable."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as f:
                while chunk := f.read(1 << 20):
                    digest.update(chunk)
        except OSError as e:
            raise_if_unreadable(path, e)
            raise
    return digest.hexdigest()

def flock(f, wait):
    """
    Lock an open file, which closing it undoes. Returns False if another process holds the lock and is not to
    be waited for. A file system without locks gives none, which is said.
    """
    import fcntl
    try:
        fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in NOT_SUPPORTED:
            raise
        warn_unlocked(f.name, e.strerror)
    return True

@functools.lru_cache
def warn_unlocked(name, reason):
    """Say, once, that a file cannot be locked."""
    say(f"warning: {name} cannot be locked ({reason}): let nothing else write there", sys.stderr)

def lock(folder, what):
    """
    Create the folder and hold it for as long as the returned file is open. A second process that wants it
    gets a UserError that says `what` is writing there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        f = open(Path(folder) / ".lock", "w")
        locked = flock(f, wait=False)
    except OSError as e:
        raise UserError(f"cannot write to the folder {folder} ({e.strerror}): choose another --out") from e
    if not locked:
        f.close()
        raise UserError(f"another {what} is writing {folder}: wait for it or choose another folder")
    return f

def is_in_place(f, path):
    """Is an open file still the one at `path`? It is not if somebody moved or removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(f.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


# -----------------------------------------------------------------------------
# Text from outside

@contextlib.contextmanager
def open_source(path):
    """
    A file of somebody else's, opened for reading bytes. One whose name ends in .gz or .zst is decompressed.
    Within it, what the operating system refuses is Unreadable, and damaged compression a UserError.
    """
    suffix = Path(path).suffix.lower()
    try:
        with open(path, "rb") as f:
            if suffix == ".gz":
                f = gzip.open(f)
            elif suffix == ".zst":
                import pyarrow
                f = io.BufferedReader(pyarrow.input_stream(f, compression="zstd"))
            yield f
    except (OSError, EOFError, zlib.error) as e:
        raise_if_unreadable(path, e)
        raise UserError(f"cannot read {path} ({e}): is it damaged?") from e

def read_json_lines(path):
    """
    Yield (place, value) for every line of a file of JSON lines that is not blank: place says "FILE line 7",
    for messages. Byte order marks are left out. Raises UserError for what is not UTF-8 or not JSON.
    """
    with open_source(path) as f:
        for number, line in enumerate(f, 1):
            place = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                value = json.loads(text)
            except UnicodeError as e:
                raise UserError(f"{place}: not UTF-8 text ({e.reason} at {e.start}): fix or remove it") from e
            except (ValueError, RecursionError) as e:
                raise UserError(f"{place}: not valid JSON ({e}): fix or remove it") from e
            yield place, value

def text_of(place, row, key):
    """The text that a value from JSON, an object, has under this key. Raises UserError if it has none."""
    text = row.get(key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{place}: no "{key}" string; expected {{"{key}": "..."}} on each line')
    if not is_text(text):
        raise UserError(f"{place}: not UTF-8 text (half of a surrogate pair): fix or remove it")
    return text

def is_text(value):
    """Is this a str that UTF-8 can spell? Undecodable arguments and "\\ud800" in JSON are half surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


# -----------------------------------------------------------------------------
# Results as JSON lines, one row a line, which several processes may be writing

def read_rows(path):
    """
    The rows of a file of JSON lines that we wrote; [] if there is no such file. A line that a crash cut short
    is left out, where read_json_lines() refuses it. Raises UserError if the file cannot be read.
    """
    check_regular(path)
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise_if_unreadable(path, e)
        raise
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return rows

def append_row(path, row):
    """Add one line to a file of JSON lines, all of it or nothing. Raises UserError if that cannot be done."""
    try:
        with open(path, "a+b", buffering=0) as f:
            flock(f, wait=True)
            end = f.seek(0, os.SEEK_END)
            line = json.dumps(row).encode() + b"\n"
            if end > 0 and os.pread(f.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # a crash left the last line without its end
            if f.write(line) < len(line):
                f.truncate(end)
                raise UserError(f"cannot write {path}: the disk is full")
            fsync(f.fileno())
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
            device = torch.device("cuda", environment_number("LOCAL_RANK", device.index or 0))
            n_gpus = torch.cuda.device_count()
            if device.index >= n_gpus:
                raise RuntimeError(f"{device} does not exist, this machine has {n_gpus} GPUs; "
                                   "lower --nproc_per_node")
            torch.cuda.set_device(device)  # before anything is allocated, which would else be on GPU 0
            use_flash_attention_3(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).split("\n")[0]
        raise UserError(f"device {name!r} cannot be used here: {reason}") from e
    return device

def use_flash_attention_3(device):
    """
    Let torch's flash attention operators run FlashAttention 3, if it is installed (flash_attn_interface) and
    the GPU is of the kind that it is written for, Hopper. Without it they run torch's own kernels.
    """
    import torch
    from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls
    if importlib.util.find_spec("flash_attn_interface") is None:
        return
    if torch.cuda.get_device_capability(device) != (9, 0) or "FA3" not in list_flash_attention_impls():
        return
    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as e:  # built for another torch
        reason = str(e).strip().split("\n")[0]
        say(f"warning: FlashAttention 3 does not load, so torch's own kernels run: {reason}", sys.stderr)

def compute_dtype(device):
    """The dtype of inference: bf16 on GPUs that have it, fp32 elsewhere, so that every CPU scores alike."""
    import torch
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32

def training_dtype(device, name="auto"):
    """
    The dtype of activations while training; weights are fp32 in any case. auto: bf16 where it is fast, on
    GPUs and CPUs that have it, fp32 elsewhere. name None: that of runs from before there was a choice.
    """
    import torch
    if name not in ("auto", None):
        return getattr(torch, name)
    if name == "auto" and torch.device(device).type == "cpu":
        # twice as fast as fp32 on CPUs with such instructions, 20 times as slow on others (research/SPEED.md)
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        kernels = torch.backends.cpu.get_cpu_capability()  # AVX2 if ATEN_CPU_CAPABILITY=avx2 says so
        return torch.bfloat16 if has_bf16 and kernels == "AVX512" else torch.float32
    return compute_dtype(device)

def environment_number(name, default, least=0):
    """A whole number that torchrun puts into the environment. Raises UserError if it is none."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
        raise UserError(f"{name} is {value!r} in the environment, no number of at least {least}: "
                        "start with torchrun, or unset it")
    return int(value)

def init_processes(device_name=None, timeout=None):
    """
    Join the process group if torchrun started this process. Returns this process's device (see
    pick_device), its rank, and the world size: 0 and 1 without torchrun. timeout: how long a collective may
    take, a timedelta. Raises UserError if there is no such device, and if the environment is not torchrun's.
    """
    import torch
    import torch.distributed as dist
    rank = environment_number("RANK", 0)
    world_size = environment_number("WORLD_SIZE", 1, least=1)
    if world_size > 1 and "RANK" not in os.environ:  # the rows of the others would not be read
        raise UserError(f"WORLD_SIZE is {world_size} in the environment and RANK is not set: "
                        "start with torchrun, or unset it")
    if rank >= world_size:
        raise UserError(f"RANK is {rank} in the environment and WORLD_SIZE is {world_size}: "
                        "start with torchrun, or unset both")
    device = pick_device(device_name)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        try:
            # with its device, NCCL connects right away, and no collective has to guess it
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout,
                                    device_id=device if on_gpu else None)
        except (ValueError, dist.DistError) as e:  # of variables of the environment, or a port in use
            reason = str(e).strip().split("\n")[0]
            raise UserError(f"cannot join the other processes ({reason}): "
                            "start all of them with torchrun") from e
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

def from_all_ranks(value, group=None):
    """
    What each rank gives, anything that can be pickled: a list, in the order of the ranks. group: another
    process group than that of training.
    """
    import torch.distributed as dist
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values

def side_group(timeout):
    """
    A second process group of all ranks, over gloo, for what goes on beside training, in another thread or
    before it begins; None without a process group. timeout: how long a collective of it may take, a
    timedelta.
    """
    import torch.distributed as dist
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timeout)

def wait_for_all(group):
    """Wait until all ranks have come here, as long as the group's timeout allows; then leave the group."""
    import torch.distributed as dist
    if group is not None:
        dist.barrier(group)
        dist.destroy_process_group(group)

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

# Peak dense bf16 FLOP/s, for the model FLOPs utilization, by the whole name that torch gives a GPU: other
# cards have that name and more words, such as PCIe, NVL, Laptop GPU, Ti, D, or MIG for a slice. From NVIDIA's
# data sheets (H100, H200, GH200, A100, L40S, HGX B200) and white papers (Ada, GA102: bf16 with fp32
# accumulation). Where a data sheet has a figure "with sparsity", this is half of it.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989e12,  # SXM
    "NVIDIA H800 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}

def peak_flops(device):
    """Peak FLOP/s of a device, None if it is not known."""
    import torch
    if device.type != "cuda":
        return None
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device))

def cpu_name():
    """The CPU's name, from /proc/cpuinfo where there is one."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()

def code_commit():
    """The commit of this code, with "-dirty" if it was changed since then; "unknown" outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
        # rows that earlier runs wrote are no change of the code
        diff = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!research/results"]
        changed = subprocess.run(diff, capture_output=True).returncode == 1
    except OSError:  # there is no git
        return "unknown"
    if changed:
        commit += "-dirty"
    return commit or "unknown"

def machine(device):
    """Where and on what something was measured: device, torch, commit and date, a dict of strings."""
    import torch
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return dict(device=name, torch=torch.__version__, commit=code_commit(), date=str(date.today()))
