"""
Prepared data as it lies on disk, and the rows and batches that training reads from it.

A data folder, which prepare_data.py makes, holds:

    tokenizer.tiktoken, tokenizer.json    the tokenizer as plain data (see save_tokenizer)
    token_bytes.npy                       int32 (vocab,): bytes of text of each token, 0 for special tokens
    train_00000.npy .., val_00000.npy ..  flat token ids, every document starts with <|bos|>
    settings.json                         the settings of the command, so that a second run can continue
    meta.json                             what is there, with checksums; without it, the data is not finished
    verified.jsonl                        which shards were read whole and found right, so that they are not
                                          read again at every start (see Stamps)

open_data() checks that all of it is there and belongs together. Rows cuts the training shards into numbered
rows of one context's length, in an order that only the seed decides.
"""

import base64
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken

from common import (
    UserError,
    append_row,
    check_regular,
    is_whole,
    raise_if_unreadable,
    read_rows,
    sha256_file,
    write_atomic,
    write_json,
)

BOS = "<|bos|>"
SEGMENT = 50_000  # characters that are handed to tiktoken at once, see segments()
VERIFIED = "verified.jsonl"
OPEN_SHARDS = 8  # memory maps open at a time: each holds one of the files that a process may open, often 1024


# -----------------------------------------------------------------------------
# The tokenizer's files

def save_tokenizer(folder, enc):
    """
    Write a tiktoken.Encoding as tokenizer.tiktoken (a line for each token: base64 of its bytes, space,
    rank) and tokenizer.json (the rest). load_tokenizer reads them.
    """
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    text = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    write_atomic(Path(folder) / "tokenizer.tiktoken", lambda f: f.write(text))
    spec = {
        "name": enc.name,
        "pattern": enc._pat_str,
        "special_tokens": enc._special_tokens,
        "mergeable_ranks": len(ranks),
        "vocab_size": enc.n_vocab,
    }
    write_json(Path(folder) / "tokenizer.json", spec)

def load_tokenizer(folder, repair=None):
    """
    The tiktoken.Encoding saved in folder; enc.encode_single_token("<|bos|>") is its last id. Text from
    outside goes through encode_text(). Raises UserError if the two files are missing or damaged; repair: what
    it says to do about that (default: to prepare the folder's data, again).
    """
    folder = Path(folder)
    repair = repair or f"run `python prepare_data.py --out {folder}`"
    check_regular(folder / "tokenizer.tiktoken", folder / "tokenizer.json")
    try:
        lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
        spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        ranks = {}
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        check_ranks(ranks, len(lines), spec)
        return tiktoken.Encoding(
            spec["name"],
            pat_str=spec["pattern"],
            mergeable_ranks=ranks,
            special_tokens=spec["special_tokens"],
        )
    except FileNotFoundError as e:
        raise UserError(f"no tokenizer in {folder}: {repair}") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        raise_if_unreadable(f"the tokenizer files in {folder}", e)
        raise UserError(f"the tokenizer files in {folder} are damaged ({e}): {repair}") from e

def check_ranks(ranks, n_lines, spec):
    """
    Raise ValueError unless the tokens are all there, and each once. ranks: {token: id} as read from the
    n_lines of tokenizer.tiktoken; spec: tokenizer.json.
    """
    special_tokens = spec["special_tokens"]
    ids = sorted([*ranks.values(), *special_tokens.values()])
    last = max(ranks.values())
    all_lines = len(ranks) == n_lines == spec["mergeable_ranks"]
    ids_differ = len(set(ids)) == len(ids)
    # no id is left out before the last of the ranks; special tokens may leave some out (cl100k_base's do)
    no_holes = ids[0] == 0 and last < len(ids) and ids[last] == last
    all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    bos_is_last = special_tokens[BOS] == ids[-1] == spec["vocab_size"] - 1
    if not (all_lines and ids_differ and no_holes and all_bytes and bos_is_last):
        raise ValueError("tokens are missing or appear twice")

def tokenizer_sha256(folder):
    """Hex sha256 over the two tokenizer files. Raises Unreadable."""
    return sha256_file(Path(folder) / "tokenizer.tiktoken", Path(folder) / "tokenizer.json")

def token_bytes(enc):
    """int32 (vocab,): bytes of UTF-8 text that each token stands for, 0 for special tokens and unused ids."""
    sizes = np.zeros(enc.n_vocab, np.int32)
    for token in enc.token_byte_values():
        sizes[enc.encode_single_token(token)] = len(token)
    return sizes

def segments(text, size=SEGMENT):
    """
    Cut text into segments of at most `size` characters, because tiktoken's regex overflows its stack on
    very long runs of spaces and one document may be 100 MB. Cutting before a space that follows a non-space
    cannot change the tokens: no pattern of tiktoken or rustbpe matches across that place. Text without one
    is cut anywhere.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        # the last such space among the 1000 characters before the end
        lowest = end - min(1000, size // 2)
        cut = text.rfind(" ", lowest, end)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.rfind(" ", lowest, cut)
        if cut <= 0:
            cut = end
        yield text[start:cut]
        start = cut
    yield text[start:]

def encode_text(enc, text):
    """
    The token ids of a text of any length, a list of int, without BOS. All of it is text, also where it spells
    a special token. (Not enc.encode_ordinary, which panics on a million spaces.)
    """
    ids = []
    for segment in segments(text):
        ids += enc.encode_ordinary(segment)
    return ids


# -----------------------------------------------------------------------------
# The shards

def shard_dtype(enc):
    """The smallest dtype that holds every token id."""
    return np.dtype("uint16" if enc.n_vocab <= 65536 else "uint32")

def load_shard(path):
    """The read-only memory map of one shard. Raises UserError if it is missing, truncated or no shard."""
    check_regular(path)
    try:
        shard = np.load(path, mmap_mode="r")
        whole = shard.ndim == 1 and len(shard) and path.stat().st_size == shard.offset + shard.nbytes
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: re-run prepare_data.py") from e
    except Exception as e:  # numpy has none of its own for a damaged header, which it parses as Python
        raise_if_unreadable(path, e)
        raise UserError(f"{path} is damaged ({e}): delete it and re-run prepare_data.py") from e
    if not whole:
        raise UserError(f"{path} is damaged (wrong size): delete it and re-run prepare_data.py")
    return shard

def size_and_mtime(path):
    """Size and time of change of a file, None if it is gone. Raises Unreadable."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise_if_unreadable(path, e)
        raise
    return stat.st_size, stat.st_mtime_ns

class Shards(Sequence):
    """
    The shards of a split as read-only memory maps of token ids. A shard is opened when it is used, and only
    the OPEN_SHARDS that were used last stay open. Using one raises UserError if it is damaged, or if its file
    is no longer what it was at the beginning: reading behind the end of a truncated memory map would kill the
    process.
    """

    def __init__(self, paths):
        self.paths = paths
        self.states = [size_and_mtime(path) for path in paths]
        self.load = lru_cache(OPEN_SHARDS)(load_shard)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        if size_and_mtime(path) != self.states[i]:
            raise UserError(f"{path} was changed or removed while it was in use: "
                            "re-run prepare_data.py, then --resume")
        return self.load(path)

@dataclass
class Data:
    """A data folder, opened."""
    folder: Path
    meta: dict  # meta.json
    tokenizer: tiktoken.Encoding
    token_bytes: np.ndarray  # int32 (vocab,)
    train: Shards  # of token ids, uint16 or uint32
    val: Shards
    stamps: "Stamps"  # of the shards that were verified

class Stamps:
    """
    Which shards were read whole and found right: rows of verified.jsonl in the data folder or, where that may
    not be written, in the run's folder. A row holds for a file of this size and these times; copying it, or
    changing anything about it, makes other times.
    """

    def __init__(self, *folders):
        self.rows = set()  # the lines of verified.jsonl
        self.unwritten = []  # rows that the data folder did not take
        for folder in folders:
            with suppress(UserError):  # what cannot be read is verified again
                self.rows |= {json.dumps(row) for row in read_rows(folder / VERIFIED)}

    def row_of(self, path, sha256, vocab_size):
        """The row of a shard as it is now, which should have this hex sha256. Raises OSError."""
        stat = os.stat(path)
        return [path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256, vocab_size]

    def has(self, path, sha256, vocab_size):
        """Was this shard found right, as it is now?"""
        return json.dumps(self.row_of(path, sha256, vocab_size)) in self.rows

    def add(self, folder, row):
        """Note in a folder that a shard was found right."""
        try:
            append_row(folder / VERIFIED, row)
        except UserError:
            self.unwritten.append(row)

    def write_to(self, folder):
        """Note in a folder what the data folder did not take, if that can be done."""
        rows, self.unwritten = self.unwritten, []
        for row in rows:
            self.add(folder, row)

def check_meta(meta):
    """Raise ValueError, KeyError or TypeError unless the numbers and names in meta.json can be true."""
    totals = [meta["totals"][key] for key in ("documents", "tokens", "bytes")]
    numbers = [meta["vocab_size"], *totals]
    names = []
    for entry in meta["train"] + meta["val"]:
        numbers += [entry[key] for key in ("documents", "tokens", "bytes")]
        names.append(entry["file"])
    for number in numbers:
        if not is_whole(number, 0, 2**63 - 1):
            raise ValueError(f"{number!r} is no number of anything")
    for name in names:
        if not re.fullmatch(r"(train|val)_\d+\.npy", name):
            raise ValueError(f"{name!r} is no name of a shard")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"dtype {meta['dtype']!r}")

def open_data(folder, verify=True, rank=0, world_size=1, run_folder=None):
    """
    The prepared data in folder as a Data. verify: read every shard once to compare its checksum; every rank
    reads its share of those that were not verified before. run_folder: the run's, which may know of some.
    Raises UserError if anything is missing, damaged, or does not belong together.
    """
    folder = Path(folder)
    stamps = Stamps(*[Path(place) for place in (folder, run_folder) if place is not None])
    check_regular(folder / "meta.json")
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        entries = {}
        for split in ("train", "val"):
            entries[split] = [(folder / x["file"], x["tokens"], x["sha256"]) for x in meta[split]]
        dtype = np.dtype(meta["dtype"])
        vocab_size = meta["vocab_size"]
        bos = meta["bos_id"]
        tokenizer_digest = meta["tokenizer_sha256"]
        check_meta(meta)
    except (FileNotFoundError, NotADirectoryError) as e:
        state = "unfinished data" if (folder / "settings.json").is_file() else "no prepared data"
        raise UserError(f"{state} in {folder}: run `python prepare_data.py --out {folder}` first") from e
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise_if_unreadable(folder / "meta.json", e)
        raise UserError(f"{folder / 'meta.json'} is damaged ({e!r}): "
                        "delete it and re-run prepare_data.py") from e

    # the tokenizer is the one that the shards were made with
    enc = load_tokenizer(folder)
    same_files = tokenizer_sha256(folder) == tokenizer_digest
    if not same_files or enc.n_vocab != vocab_size or enc.encode_single_token(BOS) != bos:
        raise UserError(f"the tokenizer in {folder} is not the one of its shards: "
                        f"delete {folder} and re-run prepare_data.py")
    sizes = token_bytes(enc)
    if not np.array_equal(load_shard(folder / "token_bytes.npy"), sizes):
        raise UserError(f"{folder / 'token_bytes.npy'} does not match the tokenizer: "
                        "delete it and re-run prepare_data.py")

    # the shards are those of meta.json
    shards = {}
    for split in ("train", "val"):
        shards[split] = Shards([path for path, _, _ in entries[split]])
        for shard, (path, n_tokens, _) in zip(shards[split], entries[split]):
            if shard.dtype != dtype or len(shard) != n_tokens:
                found = f"{len(shard)} {shard.dtype} tokens"
                raise UserError(f"{path} is damaged ({found}, meta.json says {n_tokens} {dtype}): "
                                "delete it and re-run prepare_data.py")
    if verify:
        files = [(path, digest) for path, _, digest in entries["train"] + entries["val"]]
        mine = files[rank::world_size]  # first: the other ranks may be noting theirs by now
        verify_shards([file for file in mine if not stamps.has(*file, vocab_size)], vocab_size, stamps)
    return Data(folder, meta, enc, sizes, **shards, stamps=stamps)

def verify_shards(files, vocab_size, stamps):
    """
    Read shards once, several at a time. files: pairs of a path and the hex sha256 that it should have;
    stamps: where those that are right are noted. Raises UserError if it differs, if a token id is not below
    vocab_size, or if a shard cannot be read.
    """
    def verify(file):
        path, expected = file
        row = stamps.row_of(path, expected, vocab_size)  # before it is read: a change makes other times
        if sha256_file(path) != expected:
            raise UserError(f"{path} is damaged (sha256 differs from meta.json): "
                            "delete it and re-run prepare_data.py")
        largest = load_shard(path).max()  # from the system's cache, in a tenth of the time of the checksum
        if largest >= vocab_size:
            raise UserError(f"{path} has the token {largest}, the vocabulary is only {vocab_size}: "
                            "delete it and meta.json, and re-run prepare_data.py")
        stamps.add(path.parent, row)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(verify, files):
            pass


# -----------------------------------------------------------------------------
# Rows of T+1 tokens, T apart: T inputs and T targets

def first_rows(shards, T, n):
    """
    The first n rows of a sequence of token arrays, in their order: a tensor (rows, T+1) int64. There are
    fewer than n if the shards do not hold as many.
    """
    import torch
    rows = []
    for shard in shards:
        if len(rows) >= n:
            break
        count = min((len(shard) - 1) // T, n - len(rows))
        for i in range(count):
            rows.append(np.asarray(shard[i * T:i * T + T + 1]).astype(np.int64))
    if not rows:
        return torch.zeros(0, T + 1, dtype=torch.int64)
    return torch.from_numpy(np.stack(rows))

def skip_rows(first, left_out, rows_per_step):
    """The first row, from `first` on, where no batch begins that is left out."""
    while first in left_out:
        first += rows_per_step
    return first

class Rows:
    """
    The training rows, numbered 0, 1, 2, .. without end. An epoch goes through the shards in a random order,
    and through the rows of each in a random order; both depend on seed and epoch alone. So a step reads the
    same rows for any number of processes, and a row number is all that a resumed run needs.
    """

    def __init__(self, shards, T, seed):
        self.shards = shards  # a sequence of arrays of token ids, usually Shards
        self.T = T
        self.seed = seed
        self.counts = np.array([max(len(shard) - 1, 0) // T for shard in shards])  # rows of each shard
        self.per_epoch = int(self.counts.sum())
        self.shard_orders = {}  # epoch -> a permutation of the shards
        self.row_orders = {}  # (epoch, shard) -> a permutation of its rows, for the shard in use

    def shard_order(self, epoch):
        """The order of an epoch's shards: (shards,) int64."""
        if epoch not in self.shard_orders:
            rng = np.random.default_rng((self.seed, epoch, 0))
            self.shard_orders[epoch] = rng.permutation(len(self.shards))
        return self.shard_orders[epoch]

    def row_order(self, epoch, shard):
        """The order of the rows within one of an epoch's shards: (rows,) int64."""
        if (epoch, shard) not in self.row_orders:
            rng = np.random.default_rng((self.seed, epoch, shard + 1))
            # it has millions of entries, so only that of the shard in use is kept
            self.row_orders = {(epoch, shard): rng.permutation(self.counts[shard])}
        return self.row_orders[epoch, shard]

    def __getitem__(self, n):
        """Row n: (T+1,) int64. Raises UserError if its shard has changed since training began."""
        epoch, n = divmod(n, self.per_epoch)
        for shard in self.shard_order(epoch):
            if n >= self.counts[shard]:
                n -= self.counts[shard]
                continue
            tokens = self.shards[shard]
            start = self.row_order(epoch, shard)[n] * self.T
            return tokens[start:start + self.T + 1].astype(np.int64)

    def batch(self, first, count, device):
        """
        Rows first .. first+count-1 as inputs and targets, each (count, T) int64 on the device. On CUDA the
        copy is asynchronous.
        """
        import torch
        rows = torch.from_numpy(np.stack([self[n] for n in range(first, first + count)]))
        cuda = device.type == "cuda"
        if cuda:
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=cuda)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def micro_batches(self, first, count, rank, world_size, device, left_out=(), rows_per_step=0):
        """
        Without end, this rank's micro-batches of `count` rows, from row `first` on: (inputs, targets) as
        batch() gives them. The ranks take turns, so together they read every row once. left_out: the first
        rows of batches, of rows_per_step rows, that are not read.
        """
        while True:
            first = skip_rows(first, left_out, rows_per_step)
            yield self.batch(first + rank * count, count, device)
            first += world_size * count
