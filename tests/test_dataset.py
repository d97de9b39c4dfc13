"""Prepared data: the tokenizer's files, shards that are whole and belong together, rows in a seeded order."""

import base64
import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, assert_refused, cli, no_open_files

import dataset
from common import Unreadable, UserError
from dataset import (
    BOS,
    OPEN_SHARDS,
    Rows,
    encode_text,
    first_rows,
    load_tokenizer,
    open_data,
    segments,
    token_bytes,
    tokenizer_sha256,
)
from prepare_data import train_tokenizer


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """The corpus of the fixture `data` with 400 tokens in the vocabulary and several training shards."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    flags = ["--vocab-size", 400, "--shard-tokens", 50_000, "--out", out]
    code, _, err = cli("prepare_data.py", data.parent / "text.jsonl", *flags)
    assert code == 0, err
    return out

@pytest.fixture
def copy(prepared, tmp_path):
    """A copy of `prepared` that may be changed."""
    return shutil.copytree(prepared, tmp_path / "copy")

def flip_a_bit(content):
    """The same bytes but for one bit, near the end."""
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


# -----------------------------------------------------------------------------
# The tokenizer's files

def test_tokenizer_round_trip(prepared):
    enc = load_tokenizer(prepared)
    sizes = token_bytes(enc)
    rng = random.Random(2)
    alphabet = [*range(0x3000), 0x1F600, 0x10FFFF]
    texts = [f"{BOS}{BOS} x", "", "\0\x7f\u2028", "e\u0301 \U0001f468\u200d\U0001f469", "\r\n\t  "]
    for _ in range(20):
        texts.append("".join(chr(c) for c in rng.choices(alphabet, k=50)))
    for text in texts:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert enc.encode_single_token(BOS) not in ids
    assert sizes.dtype == np.int32
    assert sizes.shape == (400,)
    assert sizes[399] == 0
    assert (sizes[:399] > 0).all()
    assert np.array_equal(np.load(prepared / "token_bytes.npy"), sizes)

def test_tokenizer_files(prepared):
    ranks = (prepared / "tokenizer.tiktoken").read_bytes()
    spec = (prepared / "tokenizer.json").read_bytes()
    lines = ranks.splitlines()
    assert len(lines) == 399
    assert base64.b64decode(lines[0].split()[0]) == b"\0"
    assert json.loads(spec)["special_tokens"] == {BOS: 399}
    assert tokenizer_sha256(prepared) == hashlib.sha256(ranks + spec).hexdigest()

def test_ids_beyond_all_bounds_and_pipes_are_refused(copy):
    path = copy / "tokenizer.json"
    spec = json.loads(path.read_text())
    path.write_text(json.dumps(spec | dict(special_tokens={BOS: 2**70}, vocab_size=2**70 + 1)))
    with pytest.raises(UserError, match="the tokenizer files in .* are damaged"):
        load_tokenizer(copy)
    for name, load in (("tokenizer.json", load_tokenizer), ("meta.json", open_data),
                       ("train_00000.npy", lambda folder: dataset.load_shard(folder / "train_00000.npy"))):
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(Unreadable, match=f"{name}: it is .*no regular file"):
            load(copy)

def test_damaged_ranks_are_refused(copy):
    path = copy / "tokenizer.tiktoken"
    good = path.read_bytes().splitlines()
    others = [  # enp6eg== is zzzz, which is no token
        good[:5] + [b"AA!= 5"] + good[6:],
        good[:-1] + [good[-2]],
        good[:-1] + [b"enp6eg== 397"],
        good[:-2] + good[-1:],
        [b"enp6eg== 0"] + good[1:],
        good[1:],
        good[:-1],
        [],
        good[:-1] + [b"enp6eg== x"],
        good[:-1] + [b"enp6eg== -1"],
        good[:-1] + [b"enp6eg=="],
    ]
    for lines in others:
        path.write_bytes(b"\n".join(lines) + b"\n")
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(copy)
    path.write_bytes(b"\n".join(good) + b"\n")
    load_tokenizer(copy)

def test_damaged_specification_is_refused(copy):
    path = copy / "tokenizer.json"
    good = json.loads(path.read_text())
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(copy)
    changes = [
        {"pattern": "("},
        {"vocab_size": 401},
        {"special_tokens": {}},
        {"special_tokens": {BOS: "399"}},
        {"special_tokens": {BOS: 5}},
    ]
    for change in changes:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(copy)
    path.unlink()
    with pytest.raises(UserError, match="no tokenizer in .* run `python prepare_data.py"):
        load_tokenizer(copy)


def test_segments_do_not_change_tokens():
    rng = random.Random(1)
    parts = [" ", "  ", " " * 7, "\n", " \n  ", "!\n", "word", "'s", "12345", "...", "中", "é"]
    text = "".join(rng.choice(parts) for _ in range(60_000))
    enc = train_tokenizer([text], 400, 2)  # one that knows runs of spaces
    pieces = list(segments(text, 5000))
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert max(map(len, pieces)) <= 5000
    assert sum((enc.encode_ordinary(piece) for piece in pieces), []) == enc.encode_ordinary(text)

@pytest.mark.parametrize("text", ["", "ab", "x" * 25, " " * 25, "abc d" * 5])
def test_segments_of_short_text(text):
    pieces = list(segments(text, 10))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 10

def test_text_of_any_length_has_tokens():
    """A million spaces are more than tiktoken's regular expression can take at once."""
    enc = train_tokenizer(["a b  c   " * 100], 300, 2)
    text = "a" * 70_000 + " " * 1_000_000 + "\n" * 70_000 + BOS
    ids = encode_text(enc, text)
    assert enc.decode(ids) == text
    assert max(ids) < enc.encode_single_token(BOS)
    assert encode_text(enc, "") == []


# -----------------------------------------------------------------------------
# Data that is incomplete or does not belong together

def assert_not_opened(folder, *words, verify=False):
    """open_data raises a UserError of one line with these words."""
    with pytest.raises(UserError) as e:
        open_data(folder, verify=verify)
    assert all(str(word) in str(e.value) for word in words), e.value
    assert "\n" not in str(e.value), e.value

def swap_two_tokens(content):
    """A tokenizer.tiktoken that is fine in itself, but not this data's: two tokens have changed places."""
    lines = [line.split() for line in content.splitlines()]
    lines[300][0], lines[301][0] = lines[301][0], lines[300][0]
    return b"\n".join(b" ".join(line) for line in lines) + b"\n"

@pytest.mark.parametrize("name, change, words", [
    ("train_00001.npy", lambda content: content[:-2], ["train_00001.npy", "delete it and re-run"]),
    ("train_00001.npy", lambda content: content[:50], ["train_00001.npy", "delete it and re-run"]),
    ("train_00001.npy", lambda content: b"", ["train_00001.npy", "delete it and re-run"]),
    ("train_00001.npy", lambda content: content + b"x", ["train_00001.npy", "delete it and re-run"]),
    ("val_00000.npy", lambda content: content.replace(b"<u2", b"<i2"), ["val_00000.npy", "int16"]),
    ("token_bytes.npy", flip_a_bit, ["token_bytes.npy", "delete it and re-run"]),
    ("meta.json", lambda content: content[:100], ["meta.json", "delete it and re-run"]),
    ("meta.json", lambda content: b"[]", ["meta.json", "delete it and re-run"]),
    ("meta.json", lambda content: b"{}", ["meta.json", "delete it and re-run"]),
    ("meta.json", lambda content: content.replace(b'"bos_id": 399', b'"bos_id": 398'), ["tokenizer"]),
    ("meta.json", lambda content: content.replace(b': 400,', b': 400.0,'), ["meta.json", "400.0"]),
    ("meta.json", lambda content: content.replace(b'"uint16"', b'"float32"'), ["meta.json", "float32"]),
    ("meta.json", lambda content: content.replace(b'"val_', b'"../val_'), ["meta.json", "../val_00000.npy"]),
    ("meta.json", lambda content: content.replace(b'"totals"', b'"sums"'), ["meta.json", "totals"]),
    ("meta.json", lambda content: re.sub(b'"documents": ', b'"documents": -', content), ["meta.json", "-"]),
    ("tokenizer.tiktoken", swap_two_tokens, ["tokenizer", "re-run"]),
])
def test_changed_files_are_not_opened(name, change, words, copy):
    path = copy / name
    good = path.read_bytes()
    assert change(good) != good
    path.write_bytes(change(good))
    if name.endswith(".npy"):
        words = [path, *words]
    assert_not_opened(copy, *words)
    path.write_bytes(good)
    open_data(copy)

def test_a_shard_in_the_place_of_another_is_not_opened(copy):
    shutil.copy(copy / "train_00000.npy", copy / "val_00000.npy")
    assert_not_opened(copy, copy / "val_00000.npy", "tokens")

def test_a_flipped_bit_is_found_by_verifying(copy):
    path = copy / "train_00000.npy"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    open_data(copy, verify=False)  # which reads no shard
    assert_not_opened(copy, path, "sha256", "delete it and re-run", verify=True)

def test_tokens_beyond_the_vocabulary_are_found_by_verifying(copy):
    """A shard that has its checksum: a model has no embedding for them."""
    path = copy / "train_00001.npy"
    shard = np.load(path)
    shard[100] = 400  # the vocabulary
    np.save(path, shard)
    meta = json.loads((copy / "meta.json").read_text())
    meta["train"][1]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "meta.json").write_text(json.dumps(meta))
    assert_not_opened(copy, path, "has the token 400, the vocabulary is only 400", verify=True)

@pytest.fixture
def hashed(monkeypatch):
    """The names of the shards that are read to compare their checksums, in this order."""
    names = []
    sha256_file = dataset.sha256_file

    def noting(*paths):
        if paths[0].suffix == ".npy":
            names.append(paths[0].name)
        return sha256_file(*paths)

    monkeypatch.setattr(dataset, "sha256_file", noting)
    return names

def test_every_shard_is_verified_by_one_rank(copy, hashed):
    shares = []
    for rank in range(3):
        open_data(copy, rank=rank, world_size=3)
        shares.append(hashed.copy())
        hashed.clear()
    assert sorted(sum(shares, [])) == sorted(path.name for path in copy.glob("*_0*.npy"))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

def test_a_shard_is_verified_once(copy, hashed):
    """And again when anything about its file is different, or what meta.json says of it."""
    open_data(copy)
    assert len(hashed) == len(set(hashed)) == len(list(copy.glob("*_0*.npy"))) > 2
    hashed.clear()
    open_data(copy)
    assert hashed == []

    # the same size and the same time of change, with other bytes
    path = copy / "train_00001.npy"
    whole, stat = path.read_bytes(), path.stat()
    path.write_bytes(flip_a_bit(whole))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert_not_opened(copy, path, "sha256", verify=True)
    path.write_bytes(whole)
    hashed.clear()
    open_data(copy)
    assert hashed == ["train_00001.npy"]

    meta = json.loads((copy / "meta.json").read_text())
    meta["train"][0]["sha256"] = "0" * 64
    (copy / "meta.json").write_text(json.dumps(meta))
    assert_not_opened(copy, "train_00000.npy", "sha256", verify=True)

def test_a_shard_that_changes_while_it_is_read_is_read_again(copy, hashed, monkeypatch):
    """What was read need not be what is there now."""
    sha256_file = dataset.sha256_file

    def changing(*paths):
        digest = sha256_file(*paths)
        os.utime(paths[0])
        return digest

    monkeypatch.setattr(dataset, "sha256_file", changing)
    open_data(copy)
    monkeypatch.setattr(dataset, "sha256_file", sha256_file)
    n_shards = len(hashed)
    open_data(copy)
    assert len(hashed) == 2 * n_shards

def test_what_was_verified_is_noted_in_the_run_where_the_data_may_not_be_written(copy, tmp_path, hashed):
    """Here because verified.jsonl is a folder, which holds for root, too. What is damaged is never noted."""
    (copy / "verified.jsonl").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    data = open_data(copy, run_folder=run)
    n_shards = len(hashed)
    data.stamps.write_to(run)
    hashed.clear()
    open_data(copy, run_folder=run)
    assert hashed == []
    open_data(copy)
    assert len(hashed) == n_shards

    with open(run / "verified.jsonl", "a") as f:
        f.write('[1, {"a": 2}]\n3\n{"file": 1}\n["trai')  # rows of nobody
    hashed.clear()
    open_data(copy, run_folder=run)
    assert hashed == []

def test_ranks_that_start_at_different_times_verify_all_shards(copy, hashed):
    """Each its own share, whatever the others have noted by then."""
    for rank in (1, 0, 2):
        open_data(copy, rank=rank, world_size=3)
    assert sorted(hashed) == sorted(path.name for path in copy.glob("*_0*.npy"))

def test_missing_files_are_not_opened(copy, tmp_path):
    (copy / "train_00000.npy").unlink()
    assert_not_opened(copy, copy / "train_00000.npy", "missing", "re-run")
    (copy / "meta.json").unlink()
    assert_not_opened(copy, "unfinished", f"run `python prepare_data.py --out {copy}`")
    with pytest.raises(UserError, match="no prepared data in .* run `python prepare_data.py --out"):
        open_data(tmp_path / "nowhere")

def test_damaged_data(data, here):
    """What a user of train.py sees of it; no run begins."""
    def damaged(change):
        shutil.rmtree("data", ignore_errors=True)
        shutil.copytree(data, "data")
        change(Path("data"))
        return cli("train.py", *SMALL, "--num-iterations", 2)

    def flip(path):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    truncated = damaged(lambda folder: truncate(folder / "train_00000.npy"))
    assert_refused(truncated, "train_00000.npy", "prepare_data.py")
    flipped = damaged(lambda folder: flip(folder / "train_00000.npy"))
    assert_refused(flipped, "train_00000.npy", "sha256")
    assert_refused(damaged(lambda folder: flip(folder / "tokenizer.tiktoken")), "tokenizer")
    assert_refused(damaged(lambda folder: (folder / "val_00000.npy").unlink()), "val_00000.npy")
    assert_refused(damaged(lambda folder: (folder / "meta.json").write_text("{")), "meta.json")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "tokenizer.tiktoken", "token_bytes.npy",
                                  "train_00000.npy", "val_00000.npy"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, copy):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(Unreadable, match=f"cannot read .*{name}: it is a pipe, a socket or a device"):
        open_data(copy)


# -----------------------------------------------------------------------------
# Shards

@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    """The corpus of the fixture `data` in several times as many shards as may be open."""
    out = tmp_path_factory.mktemp("many") / "data"
    flags = ["--vocab-size", 400, "--shard-tokens", 1000, "--out", out]
    code, _, err = cli("prepare_data.py", data.parent / "text.jsonl", *flags)
    assert code == 0, err
    return out

def open_shards(folder):
    """How many shards of this folder this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})

def test_few_shards_are_open_at_a_time(many):
    """A set may have more files than a process may open. Rows are read all the same, in any order."""
    data = open_data(many)
    assert len(data.train) > 2 * OPEN_SHARDS
    whole = Rows([np.load(path) for path in data.train.paths], 8, seed=1)
    rows = Rows(data.train, 8, seed=1)
    assert rows.per_epoch == whole.per_epoch
    for n in random.Random(1).sample(range(2 * rows.per_epoch), 300):
        assert (rows[n] == whole[n]).all()
        assert open_shards(many) <= 2 * OPEN_SHARDS  # those of train and those of val
    assert len(os.listdir("/proc/self/fd")) < 100

def test_shards_that_cannot_be_opened_now(many):
    data = open_data(many)
    with no_open_files(), pytest.raises(Unreadable, match="npy .Too many open files: the limit"):
        for shard in data.train:
            assert len(shard)


# -----------------------------------------------------------------------------
# Rows

def make_shards(lengths):
    """Shards in which every token tells its shard and its place: shard i holds i*1000, i*1000 + 1, .."""
    return [np.arange(i * 1000, i * 1000 + length, dtype=np.uint16) for i, length in enumerate(lengths)]

def test_rows_cover_an_epoch_once_in_any_split():
    shards = make_shards([5, 103, 64, 8, 200])
    rows = Rows(shards, 8, seed=1)
    assert rows.per_epoch == 0 + 12 + 7 + 0 + 24

    # two epochs have the same rows in different orders
    first, second = [
        [tuple(rows[epoch * rows.per_epoch + n]) for n in range(rows.per_epoch)] for epoch in range(2)
    ]
    assert set(first) == set(second)
    assert len(set(first)) == rows.per_epoch
    assert first != second
    for row in first:
        assert len(row) == 9
        assert row[0] % 1000 % 8 == 0
        assert list(row) == list(range(row[0], row[0] + 9))

    # any row can be read, in any order
    again = Rows(shards, 8, seed=1)
    assert [tuple(again[n]) for n in reversed(range(rows.per_epoch))] == first[::-1]
    idx, targets = rows.batch(3, 2, torch.device("cpu"))
    assert idx.tolist() == [list(row[:-1]) for row in first[3:5]]
    assert targets.tolist() == [list(row[1:]) for row in first[3:5]]

def test_first_rows():
    shards = make_shards([5, 20, 8, 40])
    rows = first_rows(shards, 8, 4)
    assert rows.dtype == torch.int64
    assert rows[:, 0].tolist() == [1000, 1008, 3000, 3008]
    assert (rows == rows[:, :1] + torch.arange(9)).all()
    assert first_rows(shards, 8, 100).shape == (6, 9)
    assert first_rows(shards, 64, 4).shape == (0, 65)
