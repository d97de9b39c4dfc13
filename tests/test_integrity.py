"""
Flipped bits and cut files: whatever a bit of a run's or a data folder's files becomes, it is refused in one
line, or it does not matter. The short form is a seeded sample; `-m slow` has 10,000 flips and 1,000 cuts.
"""

import random
import shutil
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from helpers import ROOT

from checkpointing import CHECKPOINT, find_checkpoint, load_checkpoint, newest_checkpoint, read_log, rewind
from common import UserError
from dataset import open_data

RUN = ROOT / "tests/checkpoints/v2_two_processes"
DATA = ROOT / "tests/checkpoints/data"


def is_same(x, y):
    """Are two nested dicts and lists of tensors, arrays and values the same, bit for bit?"""
    if type(x) is not type(y):
        return False
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(is_same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(is_same, x, y))
    if isinstance(x, torch.Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, np.ndarray):
        return x.dtype == y.dtype and np.array_equal(x, y)
    return x == y


# -----------------------------------------------------------------------------
# What is read of each file, as training reads it

def read_checkpoint(folder):
    """A checkpoint with its share, as train.py goes on with it and as sample.py loads it."""
    path = find_checkpoint(folder / "ckpt_0000008.pt")
    resumed = load_checkpoint(path, shares=True)
    sampled = load_checkpoint(path)
    return [{key: checkpoint[key] for key in CHECKPOINT} for checkpoint in (resumed, sampled)]

def read_run(folder):
    """The flags and the position of a run, as train.py finds them before any rank has read the tensors."""
    path, checkpoint = newest_checkpoint(folder / "ckpt_0000008.pt")
    names = [key for key in CHECKPOINT if key not in ("model", "optimizers", "torch_rng")]
    return str(path), {name: checkpoint[name] for name in names}

def read_data(folder):
    """What training takes from the data; the counts of documents and bytes in meta.json are for people."""
    data = open_data(folder)
    tokenizer = data.tokenizer
    return dict(
        ranks=tokenizer._mergeable_ranks,
        special_tokens=tokenizer._special_tokens,
        pattern=tokenizer._pat_str,
        token_bytes=np.asarray(data.token_bytes),
        shards=[np.array(shard) for shard in [*data.train, *data.val]],
        checksums=[entry["sha256"] for entry in data.meta["train"]],
        tokenizer_sha256=data.meta["tokenizer_sha256"],
        vocab_size=data.meta["vocab_size"],
    )

def read_run_log(folder):
    """The rows that a run goes on with from step 8."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copy(folder / "log.jsonl", copy)
    with redirect_stdout(StringIO()) as said:
        rewind(copy, 8)
    steps = {row["step"] for row in read_log(copy) if row["kind"] == "train"}
    assert ("lacks" in said.getvalue()) == (steps != set(range(8)))  # steps that are gone are said
    return read_log(folder)

def log_is_harmless(rows, expected):
    """
    Has a damaged log all rows but those next to the damage, or up to where it was cut? Its rows are for
    people: training goes by the checkpoint. The ids of a run and of its checkpoint are compared in any case.
    """
    unchanged = [row for row in expected if row in rows]
    new = [row for row in rows if row not in expected]
    is_beginning = unchanged == expected[:len(unchanged)]
    return len(new) <= 1 and (is_beginning or len(unchanged) >= len(expected) - 2)

READERS = {  # of each file: the reader, and what it must give if it does not refuse
    "ckpt_0000008.pt": (RUN, read_checkpoint, is_same),
    "ckpt_0000008.share_1.pt": (RUN, read_checkpoint, is_same),
    "log.jsonl": (RUN, read_run_log, log_is_harmless),
    "train_00000.npy": (DATA, read_data, is_same),
    "val_00000.npy": (DATA, read_data, is_same),
    "tokenizer.tiktoken": (DATA, read_data, is_same),
    "tokenizer.json": (DATA, read_data, is_same),
    "token_bytes.npy": (DATA, read_data, is_same),
    "meta.json": (DATA, read_data, is_same),
    "verified.jsonl": (DATA, read_data, is_same),
}

def flip(raw, rng):
    """The bytes with one bit flipped."""
    at = rng.randrange(8 * len(raw))
    return raw[:at // 8] + bytes([raw[at // 8] ^ 1 << at % 8]) + raw[at // 8 + 1:]

def cut(raw, rng):
    """The beginning of the bytes."""
    return raw[:rng.randrange(len(raw))]

def outcome(read, harmless, folder, expected):
    """refused or harmless. Raises AssertionError if what is read is another, and whatever is no UserError."""
    try:
        found = read(folder)
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return "refused"
    assert harmless(found, expected)
    return "harmless"

def damage_all(tmp_path, n_flips, n_cuts, seed):
    """Damage the files in turn, one place at a time: a Counter of (file, damage, outcome)."""
    rng = random.Random(seed)
    counts = Counter()
    for name, (folder, read, harmless) in READERS.items():
        copy = tmp_path / f"{name}_damaged"
        shutil.copytree(folder, copy)
        expected = read(copy)  # which writes verified.jsonl, too
        path = copy / name
        whole = path.read_bytes()
        for damage, n in ((flip, n_flips // len(READERS)), (cut, n_cuts // len(READERS))):
            for i in range(n):
                damaged = damage(whole, rng)
                path.write_bytes(damaged)
                try:
                    counts[name, damage.__name__, outcome(read, harmless, copy, expected)] += 1
                except Exception as e:
                    (tmp_path / "damaged").write_bytes(damaged)
                    raise AssertionError(f"{name}, {damage.__name__} {i} of seed {seed}: {e!r}") from e
            path.write_bytes(whole)
    for key, n in sorted(counts.items()):
        print(n, *key)
    return counts

def test_damaged_files_are_refused_or_do_not_matter(tmp_path):
    counts = damage_all(tmp_path, n_flips=400, n_cuts=60, seed=1)
    assert sum(counts.values()) == 460
    # nearly all of a checkpoint and of a shard matters, and a log is never refused
    for name in ("ckpt_0000008.pt", "ckpt_0000008.share_1.pt", "train_00000.npy"):
        assert counts[name, "cut", "refused"] == 6
        assert counts[name, "flip", "refused"] > counts[name, "flip", "harmless"]
    assert counts["log.jsonl", "flip", "refused"] == 0

@pytest.mark.slow
def test_10000_flips_and_1000_cuts(tmp_path):
    counts = damage_all(tmp_path, n_flips=10_000, n_cuts=1000, seed=2)
    assert sum(counts.values()) == 11_000

def test_flags_and_position_are_right_before_the_tensors_are_read(tmp_path):
    """What all ranks go by until they have verified the checkpoint together."""
    rng = random.Random(3)
    copy = tmp_path / "run"
    shutil.copytree(RUN, copy)
    expected = read_run(copy)
    path = copy / "ckpt_0000008.pt"
    whole = path.read_bytes()
    header = whole.index(b"data.pkl")
    end = whole.index(b"PK\x07\x08", header)
    for _ in range(100):
        at = rng.randrange(header, end)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        outcome(read_run, is_same, copy, expected)
