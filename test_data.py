"""Tests of prepare_data.py: real files, real command lines, a real (badly behaved) HTTP server."""
import base64
import contextlib
import fcntl
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import prepare_data
from prepare_data import BOS, UserError, load_tokenizer, open_data, segments, token_bytes, tokenizer_sha256, write_atomic

HERE = Path(__file__).resolve().parent
CORPUS = Path(os.environ.get("CORPUS_DIR", HERE / ".." / "shared" / "corpus"))

# -----------------------------------------------------------------------------
# helpers

def make_docs(count, seed=0, words=60):
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 8))) for _ in range(300)]
    docs = [" ".join(rng.choices(vocabulary, k=words)) + rng.choice(["\n", ".", "\r\n", " ünï 中文 😀"]) for _ in range(count)]
    docs[0] = f"a document that spells {BOS} and <|endoftext|> is text"
    return docs

def write_jsonl(path, docs):
    data = "".join(json.dumps({"text": doc}) + "\n" for doc in docs).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path

def write_parquet(path, docs):
    pq.write_table(pa.table({"id": list(range(len(docs))), "text": pa.array(docs, pa.string())}), path, row_group_size=16,
                   compression="NONE")
    return path

def prepare(*args, before="", env=None):
    """prepare_data.py in a process of its own; `before` is Python run ahead of it, to shrink constants."""
    code = f"import prepare_data as p\n{before}\np.run_main(p.main)"
    command = ["-c", code] if before else [str(HERE / "prepare_data.py")]
    return subprocess.run([sys.executable, *command, *map(str, args)], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(HERE), **(env or {})})

def prepare_here(*args):
    """The same command line within this process: half a second faster, for the many cases that end early."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["prepare_data.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            prepare_data.run_main(prepare_data.main)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

def ok(result):
    assert result.returncode == 0, result.stderr
    return result

def fails(result, *words):
    """Exit code 2 and one line on stderr that has all the words."""
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: "), result.stderr
    for word in words:
        assert str(word) in result.stderr, (word, result.stderr)

def no_final_files(out):
    return not out.is_dir() or not [p.name for p in out.iterdir() if p.name not in (".lock", "download")]

def decoded(data, shards):
    """The documents in a list of shards, in order."""
    tokens = np.concatenate([np.asarray(shard) for shard in shards]).tolist()
    bos, docs = data.meta["bos_id"], []
    assert tokens[0] == bos
    for token in tokens:
        if token == bos:
            docs.append([])
        else:
            docs[-1].append(token)
    return [data.tokenizer.decode_bytes(doc).decode() for doc in docs]

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

def split(docs):
    return ([d for i, d in enumerate(docs) if i % 20 != 19], [d for i, d in enumerate(docs) if i % 20 == 19])

SMALL = ("--vocab-size", "400", "--shard-tokens", "2000")

@pytest.fixture(scope="module")
def docs():
    return make_docs(100)

@pytest.fixture(scope="module")
def source(tmp_path_factory, docs):
    return write_jsonl(tmp_path_factory.mktemp("source") / "docs.jsonl", docs)

@pytest.fixture(scope="module")
def prepared(tmp_path_factory, source):
    """A finished folder; tests that change it work on a copy."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    result = ok(prepare(source, "--out", out, *SMALL))
    assert f"python train.py --data {out}" in result.stdout and "100 documents" in result.stdout
    return out

@pytest.fixture
def copy(prepared, tmp_path):
    for name, data in contents(prepared).items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    return tmp_path / "copy"

# -----------------------------------------------------------------------------
# what comes out is what went in

@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder"])
def test_round_trip(kind, docs, tmp_path):
    if kind == "folder":  # sorted, other files ignored, blank documents skipped, one .txt is one document
        (tmp_path / "in" / "b").mkdir(parents=True)
        for i, doc in enumerate(docs):
            (tmp_path / "in" / f"{i:03d}.txt").write_bytes(doc.encode())
        (tmp_path / "in" / "README.md").write_text("not a source")
        (tmp_path / "in" / "000b.txt").write_text("")
        (tmp_path / "in" / "000c.txt").write_text(" \n")
        path = tmp_path / "in"
    elif kind == "parquet":  # null rows are skipped
        path = write_parquet(tmp_path / "in.parquet", docs[:50] + [None, ""] + docs[50:])
    else:
        path = write_jsonl(tmp_path / f"in.{kind}", docs[:50] + ["", "\n "] + docs[50:])
    ok(prepare_here(path, "--out", tmp_path / "out", *SMALL))
    data = open_data(tmp_path / "out")
    assert (decoded(data, data.train), decoded(data, data.val)) == split(docs)
    assert len(data.train) > 2 and [e["file"] for e in data.meta["train"]][:2] == ["train_00000.npy", "train_00001.npy"]
    assert [e["file"] for e in data.meta["val"]] == ["val_00000.npy"]
    for shard, entry in zip(data.train + data.val, data.meta["train"] + data.meta["val"]):
        path = tmp_path / "out" / entry["file"]
        assert shard[0] == data.meta["bos_id"] and shard.dtype == np.uint16 == np.dtype(data.meta["dtype"])
        assert isinstance(shard, np.memmap) and not shard.flags.writeable
        assert entry["tokens"] == len(shard) and entry["documents"] == (shard == data.meta["bos_id"]).sum()
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(2000 <= e["tokens"] < 3000 for e in data.meta["train"][:-1])
    assert data.meta["totals"] == {"documents": 100, "bytes": sum(len(d.encode()) for d in docs),
                                   "tokens": sum(map(len, data.train + data.val))}
    assert data.meta["vocab_size"] == 400 == data.tokenizer.n_vocab and data.meta["bos_id"] == 399

def test_several_sources_keep_their_order(docs, tmp_path):
    paths = [write_jsonl(tmp_path / "z.jsonl", docs[:30]), write_parquet(tmp_path / "a.parquet", docs[30:])]
    ok(prepare_here(*paths, "--out", tmp_path / "out", *SMALL))
    data = open_data(tmp_path / "out")
    assert (decoded(data, data.train), decoded(data, data.val)) == split(docs)

def test_single_txt_gives_its_tail_to_validation(tmp_path):
    text = "\r\n".join(make_docs(60)) + "\n"  # line ends are kept as they are
    (tmp_path / "in.txt").write_bytes(text.encode())
    result = ok(prepare(tmp_path / "in.txt", "--out", tmp_path / "out"))
    data = open_data(tmp_path / "out")
    assert "".join(decoded(data, data.train) + decoded(data, data.val)) == text
    assert 0.03 < len(data.val[0]) / (len(data.train[0]) + len(data.val[0])) < 0.07
    # 4096 is the default for little text; this text has fewer, which is said and recorded
    assert "training a tokenizer of 4096" in result.stdout and data.meta["vocab_size"] == data.tokenizer.n_vocab < 4096
    assert f"vocabulary is {data.meta['vocab_size']}" in result.stdout

def test_cut_tail():
    for docs in (["ab"], ["a b c d e f g"], ["x" * 100] * 19, ["x" * 1000, "y", "z"], ["a", "b" * 500]):
        train, val = prepare_data.cut_tail(docs)
        assert "".join(train + val) == "".join(docs) and all(train + val) and train and val
        assert len("".join(val)) <= 1 + 0.05 * len("".join(docs)) + 20
    with pytest.raises(UserError, match="too small"):
        prepare_data.cut_tail(["a"])

def test_stdlib(tmp_path):
    lib = tmp_path / "lib"
    for name, text in {"b.py": "import a\n" * 30, "a/z.py": "x = 'é'\n" * 30, "a/__init__.py": "", "site-packages/no.py": "no = 1\n",
                       "c/dist-packages/no.py": "no = 1\n", "note.txt": "no"}.items():
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        (lib / name).write_text(text, "utf-8")
    (lib / "latin.py").write_bytes(b"# \xe9\n")
    before = f"p.sysconfig.get_path = lambda name: {str(lib)!r}"
    ok(prepare("--out", tmp_path / "out", before=before))  # stdlib is the default source
    data = open_data(tmp_path / "out")
    assert "".join(decoded(data, data.train) + decoded(data, data.val)) == "x = 'é'\n" * 30 + "import a\n" * 30
    assert data.meta["source"] == "stdlib"

def test_real_stdlib_is_found():
    names = [p.name for p in prepare_data.stdlib_files()]
    assert "argparse.py" in names and "tiktoken" not in names and len(names) > 200

@pytest.mark.skipif(not (CORPUS / "prose.jsonl.gz").exists(), reason=f"no prose.jsonl.gz in {CORPUS} (set CORPUS_DIR)")
def test_real_prose(tmp_path):
    with gzip.open(CORPUS / "prose.jsonl.gz", "rt", encoding="utf-8") as f:
        docs = [json.loads(line)["text"] for _, line in zip(range(300), f)]
    ok(prepare(write_jsonl(tmp_path / "in.jsonl.gz", docs), "--out", tmp_path / "out", "--vocab-size", "2048"))
    data = open_data(tmp_path / "out")
    assert (decoded(data, data.train), decoded(data, data.val)) == split(docs)
    totals = data.meta["totals"]
    assert totals["bytes"] == sum(len(doc.encode()) for doc in docs) and 2.5 < totals["bytes"] / totals["tokens"] < 4.5

def test_giant_single_line(tmp_path):
    line = " ".join(make_docs(60)).replace("\n", " ")
    text = (line * (1 + 3_000_000 // len(line)))[:3_000_000] + " " * 1_100_000 + "x" * 900_000  # 1e6 spaces crash tiktoken unsplit
    (tmp_path / "in.txt").write_bytes(text.encode())
    ok(prepare(tmp_path / "in.txt", "--out", tmp_path / "out", "--vocab-size", "400"))
    data = open_data(tmp_path / "out")
    assert "".join(decoded(data, data.train) + decoded(data, data.val)) == text
    assert int(data.token_bytes[data.train[0]].sum()) + int(data.token_bytes[data.val[0]].sum()) == len(text.encode())

def test_segments_do_not_change_tokens():
    rng = random.Random(1)
    text = "".join(rng.choice([" ", "  ", " " * 7, "\n", " \n  ", "!\n", "word", "'s", "12345", "...", "中", "é"]) for _ in range(60_000))
    enc = prepare_data.train_tokenizer([text], 400)  # one that knows runs of spaces
    pieces = list(segments(text, 5000))
    assert "".join(pieces) == text and len(pieces) > 20 and max(map(len, pieces)) <= 5000
    assert sum((enc.encode_ordinary(piece) for piece in pieces), []) == enc.encode_ordinary(text)
    for text in ("", "ab", "x" * 25, " " * 25, "abc d" * 5):
        assert "".join(segments(text, 10)) == text and max(map(len, segments(text, 10))) <= 10

# -----------------------------------------------------------------------------
# the tokenizer

def test_tokenizer_round_trip(prepared):
    enc = load_tokenizer(prepared)
    sizes, rng = token_bytes(enc), random.Random(2)
    texts = [f"{BOS}{BOS} x", "", "\0\x7f\u2028", "e\u0301 \U0001f468\u200d\U0001f469", "\r\n\t  "]
    texts += ["".join(chr(c) for c in rng.choices([c for c in range(0x3000)] + [0x1F600, 0x10FFFF], k=50)) for _ in range(20)]
    for text in texts:
        ids = enc.encode_ordinary(text)
        assert enc.decode(ids) == text and sizes[ids].sum() == len(text.encode())
        assert enc.encode_single_token(BOS) not in ids
    assert sizes.dtype == np.int32 and sizes.shape == (400,) and sizes[399] == 0 and (sizes[:399] > 0).all()
    assert np.array_equal(np.load(prepared / "token_bytes.npy"), sizes)

def test_tokenizer_files(prepared, copy):
    lines = (prepared / "tokenizer.tiktoken").read_bytes().splitlines()
    spec = json.loads((prepared / "tokenizer.json").read_text())
    assert len(lines) == 399 and base64.b64decode(lines[0].split()[0]) == b"\0" and spec["special_tokens"] == {BOS: 399}
    assert tokenizer_sha256(prepared) == hashlib.sha256(
        (prepared / "tokenizer.tiktoken").read_bytes() + (prepared / "tokenizer.json").read_bytes()).hexdigest()
    def tiktoken_file(lines):
        (copy / "tokenizer.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    for bad in (lines[:5] + [b"AA!= 5"] + lines[6:], lines[:-1] + [lines[-2]], lines[:-1] + [b"enp6eg== 397"], lines[:-2] + lines[-1:],
                [b"enp6eg== 0"] + lines[1:], lines[1:], lines[:-1], [], lines[:-1] + [b"enp6eg== x"], lines[:-1] + [b"enp6eg== -1"], lines[:-1] + [b"enp6eg=="]):
        tiktoken_file(bad)
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(copy)
    tiktoken_file(lines)
    load_tokenizer(copy)
    for bad in ("{", "[]", "{}", json.dumps({**spec, "pattern": "("}), json.dumps({**spec, "vocab_size": 401}),
                json.dumps({**spec, "special_tokens": {}}), json.dumps({**spec, "special_tokens": {BOS: "399"}}),
                json.dumps({**spec, "special_tokens": {BOS: 5}})):
        (copy / "tokenizer.json").write_text(bad)
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer in .* run `python prepare_data.py"):
        load_tokenizer(copy)

FAKE = '''
import requests
from tiktoken_ext.openai_public import r50k_pat_str
def fake():  # like p50k_base: a special token sits in a hole of the ranks
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 257, b"abc": 258}
    return {"name": "fake", "pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 256}}
def wide():
    return {**fake(), "name": "wide", "special_tokens": {"<|endoftext|>": 256, "<|last|>": 65535}}
def offline():
    raise requests.ConnectionError("no route\\nto host")
ENCODING_CONSTRUCTORS = {"fake": fake, "wide": wide, "offline": offline}
'''

def test_named_tokenizers(source, docs, tmp_path):
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "fake_encodings.py").write_text(FAKE)
    env = {"PYTHONPATH": f"{HERE}:{tmp_path}"}
    for name, bos, dtype in (("fake", 259, np.uint16), ("wide", 65536, np.uint32)):
        out = tmp_path / name
        ok(prepare(source, "--out", out, "--tokenizer", name, env=env))
        data = open_data(out)  # this process does not know the encoding: the two files are enough
        assert (decoded(data, data.train), decoded(data, data.val)) == split(docs)
        assert data.meta["bos_id"] == bos and data.meta["vocab_size"] == bos + 1 == len(data.token_bytes)
        assert data.train[0].dtype == dtype and data.meta["tokenizer"] == name
        assert data.tokenizer.encode_single_token("<|endoftext|>") == 256 and data.token_bytes[256] == 0
        assert data.token_bytes[258] == 3 and 256 not in data.train[0]
    fails(prepare(source, "--out", tmp_path / "off", "--tokenizer", "offline", env=env), "offline", "network")
    fails(prepare(source, "--out", tmp_path / "off", "--tokenizer", "nonesuch", env=env), "nonesuch", "gpt2")
    fails(prepare(source, "--out", tmp_path / "off", "--tokenizer", "fake", "--vocab-size", "300", env=env), "--vocab-size")
    (tmp_path / "tiny.txt").write_text("a")
    fails(prepare(tmp_path / "tiny.txt", "--out", tmp_path / "off", "--tokenizer", "fake", env=env), "too small")
    assert no_final_files(tmp_path / "off")

# -----------------------------------------------------------------------------
# the same command again

def test_two_runs_are_identical(prepared, source, tmp_path):
    ok(prepare(source, "--out", tmp_path / "again", *SMALL))
    assert contents(tmp_path / "again") == contents(prepared)

def test_finished_run_writes_nothing(source, copy):
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir() if p.name != ".lock"}
    result = ok(prepare(source, "--out", copy, *SMALL))
    assert "already complete" in result.stdout
    assert {p.name: p.stat().st_mtime_ns for p in copy.iterdir() if p.name != ".lock"} == before

@pytest.mark.parametrize("names", [["meta.json", "val_00000.npy"], ["meta.json"], ["train_00001.npy"], ["tokenizer.json"],
                                   ["token_bytes.npy", "meta.json", "train_00000.npy"]])
def test_deleted_files_come_back(names, prepared, source, copy):
    for name in names:
        (copy / name).unlink()
    kept = (copy / "train_00000.npy").stat().st_mtime_ns if names[0] == "meta.json" else None
    ok(prepare(source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)
    if kept:
        assert (copy / "train_00000.npy").stat().st_mtime_ns == kept  # finished shards are not made again

def test_damaged_files_are_repaired(prepared, source, copy):
    shard = bytearray((copy / "train_00000.npy").read_bytes())
    shard[-2] ^= 1
    (copy / "train_00000.npy").write_bytes(shard)
    (copy / "val_00000.npy").write_bytes((copy / "val_00000.npy").read_bytes()[:-1])  # what makes it not complete
    (copy / "token_bytes.npy").write_bytes(b"")
    ok(prepare(source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)
    for path in (copy / "meta.json", copy / "train_00001.npy"):  # truncated, and no record left of it
        path.write_bytes(path.read_bytes()[:-10])
    ok(prepare(source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)

@pytest.mark.parametrize("nth", [1, 3, 7, 11, 16])
def test_killed_run_continues(nth, prepared, source, tmp_path):
    """SIGKILL just before the nth file or folder would be flushed: at every stage the next run makes the same folder."""
    before = f"""
import os, signal, itertools
count, fsync = itertools.count(1), os.fsync
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL) if next(count) == {nth} else fsync(fd)"""
    out = tmp_path / "out"
    assert prepare(source, "--out", out, *SMALL, before=before).returncode == -signal.SIGKILL
    assert not (out / "meta.json").exists()
    with pytest.raises(UserError, match="run `python prepare_data.py"):
        open_data(out)
    ok(prepare(source, "--out", out, *SMALL))
    assert contents(out) == contents(prepared)

def test_other_settings_are_refused(source, docs, copy, tmp_path):
    before = contents(copy)
    fails(prepare_here(source, "--out", copy, "--vocab-size", "401", "--shard-tokens", "2000"), copy, "vocab_size 400 there, 401 now", "delete")
    fails(prepare_here(source, "--out", copy, "--vocab-size", "400"), "shard_tokens")
    fails(prepare_here("fineweb-edu", "--out", copy), "source")
    assert contents(copy) == before
    other = write_jsonl(tmp_path / "docs.jsonl", docs)
    ok(prepare_here(other, "--out", tmp_path / "out", *SMALL))
    write_jsonl(other, docs[:-1] + ["changed"])  # the same command line, but the file is another
    fails(prepare_here(other, "--out", tmp_path / "out", *SMALL), "source_sha256")
    (copy / "settings.json").unlink()
    fails(prepare_here(source, "--out", copy, *SMALL), "settings.json", "choose another --out")

def test_lock(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        fails(prepare(source, "--out", out, *SMALL), out, "another prepare_data.py")
        assert no_final_files(out)
    ok(prepare(source, "--out", out, *SMALL))

# -----------------------------------------------------------------------------
# bad input

def damaged_gzip(path):
    write_jsonl(path, make_docs(200))
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])

def latin_table(path):
    pq.write_table(pa.table({"text": pa.array([b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)}), path)

def binary_table(path):
    pq.write_table(pa.table({"text": [1, 2, 3]}), path)

BAD = {  # file name: (how to make it, words the message must have)
    "missing.txt": (lambda p: None, ["missing.txt", "no file"]),
    "empty.txt": (lambda p: p.write_text(""), ["empty.txt", "is empty"]),
    "empty.jsonl": (lambda p: p.write_text(""), ["empty.jsonl", "is empty"]),
    "blank.txt": (lambda p: p.write_text(" \n"), ["blank.txt", "blank"]),
    "latin.txt": (lambda p: p.write_bytes(b"caf\xe9 " * 50), ["latin.txt", "byte 3"]),
    "nul.txt": (lambda p: p.write_bytes(b"abc\0def" * 50), ["nul.txt", "NUL"]),
    "broken.jsonl": (lambda p: p.write_text('{"text": "a b"}\n\n{"text": \n'), ["broken.jsonl line 3", "JSON"]),
    "deep.jsonl": (lambda p: p.write_text("[" * 100_000), ["deep.jsonl line 1", "JSON"]),
    "notext.jsonl": (lambda p: p.write_text('{"text": "a b"}\n{"txt": "c"}\n'), ["notext.jsonl line 2", '"text"']),
    "null.jsonl": (lambda p: p.write_text('{"text": null}\n'), ["null.jsonl line 1", '"text"']),
    "list.jsonl": (lambda p: p.write_text('["text"]\n'), ["list.jsonl line 1", '"text"']),
    "latin.jsonl": (lambda p: p.write_bytes(b'{"text": "a b"}\n{"text": "\xe9"}\n'), ["latin.jsonl line 2", "UTF-8"]),
    "half.jsonl": (lambda p: p.write_text('{"text": "a \\ud800 b"}\n'), ["half.jsonl line 1", "UTF-8"]),
    "notes.md": (lambda p: p.write_text("text"), ["notes.md", ".jsonl"]),
    "folder": (lambda p: (p.mkdir(), (p / "x.md").write_text("x")), ["folder", ".jsonl"]),
    "tiny.txt": (lambda p: p.write_text("a"), ["too small"]),
    "half.jsonl.gz": (damaged_gzip, ["half.jsonl.gz", "damaged"]),
    "not.jsonl.gz": (lambda p: p.write_bytes(b"not gzip at all"), ["not.jsonl.gz", "damaged"]),
    "not.parquet": (lambda p: p.write_bytes(b"PAR1 not parquet at all PAR1"), ["not.parquet", "parquet"]),
    "column.parquet": (lambda p: pq.write_table(pa.table({"body": ["x"]}), p), ["column.parquet", "`text`", "body"]),
    "latin.parquet": (latin_table, ["latin.parquet", "damaged"]),
    "type.parquet": (binary_table, ["type.parquet", "strings"]),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_source(name, tmp_path):
    make, words = BAD[name]
    make(tmp_path / name)
    run = prepare if name in ("latin.txt", "half.jsonl.gz", "not.parquet") else prepare_here
    fails(run(tmp_path / name, "--out", tmp_path / "out", "--vocab-size", "300"), *words)
    assert no_final_files(tmp_path / "out")

def test_damaged_parquet_pages(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", make_docs(100))
    data = bytearray(path.read_bytes())
    data[len(data) // 4:len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    fails(prepare_here(path, "--out", tmp_path / "out"), "in.parquet", "damaged")
    assert no_final_files(tmp_path / "out")

@pytest.mark.parametrize("args, words", [
    (["--vocab-size", "257"], ["--vocab-size 257", "too small"]),
    (["--vocab-size", "many"], ["--vocab-size", "--help"]),
    (["--vocab-size", "50000"], ["vocabulary of only", "lower --vocab-size"]),
    (["--shard-tokens", "0"], ["--shard-tokens"]),
    (["--num-shards", "3"], ["--num-shards"]),
    (["--num-shards", "1823", "fineweb-edu"], ["1822"]),
    (["fineweb-edu"], ["cannot be mixed"]),
    (["--nonsense"], ["--nonsense", "--help"]),
])
def test_bad_arguments(args, words, source, tmp_path):
    fails(prepare_here(*args, *([source] if args != ["--num-shards", "1823", "fineweb-edu"] else []), "--out", tmp_path / "out"), *words)
    assert no_final_files(tmp_path / "out")

def test_bad_out(source, tmp_path):
    (tmp_path / "file").write_text("precious")
    fails(prepare_here(source, "--out", tmp_path / "file", *SMALL), tmp_path / "file", "choose another --out")
    fails(prepare_here(source, "--out", tmp_path / "file" / "below", *SMALL), "choose another --out")
    fails(prepare_here(source, "--out", "/proc/nanolrt", *SMALL), "/proc/nanolrt", "choose another --out")
    assert (tmp_path / "file").read_text() == "precious"

def test_disk_full(source, tmp_path):
    before = "import numpy as np\ndef full(f, array): f.write(b'half'); raise OSError(28, 'No space left on device')\nnp.save = full"
    fails(prepare(source, "--out", tmp_path / "out", *SMALL, before=before), "token_bytes.npy", "No space left")
    assert not list((tmp_path / "out").glob("*.npy*"))

def test_help_and_interrupt(source, tmp_path):
    help = ok(prepare("--help")).stdout
    assert "default: data" in help and "default: None" not in help
    result = prepare(source, "--out", tmp_path / "out", before="def stop(*a): raise KeyboardInterrupt\np.train_tokenizer = stop")
    assert result.returncode == 130 and result.stderr == ""
    assert prepare(source, before="def bug(): 1 / 0\np.main = bug").stderr.splitlines()[-1].startswith("ZeroDivisionError")

def test_write_atomic(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda f: f.write(b"old"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    def fail(f):
        f.write(b"new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "no" / "file", fail)

# -----------------------------------------------------------------------------
# open_data

def test_open_data_refuses(copy, tmp_path):
    def refused(*words, verify=False):
        with pytest.raises(UserError) as e:
            open_data(copy, verify=verify)
        assert all(str(word) in str(e.value) for word in words) and "\n" not in str(e.value), e.value
    def changed(name, change, *words, verify=False):
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(change(good))
        refused(*words, verify=verify)
        (copy / name).write_bytes(good)
        open_data(copy)
    flip = lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    changed("train_00001.npy", lambda data: data[:-2], copy / "train_00001.npy", "delete it and re-run")
    changed("train_00001.npy", lambda data: data[:50], copy / "train_00001.npy", "delete it and re-run")
    changed("train_00001.npy", lambda data: b"", copy / "train_00001.npy", "delete it and re-run")
    changed("train_00001.npy", lambda data: data + b"x", copy / "train_00001.npy", "delete it and re-run")
    changed("val_00000.npy", lambda data: (copy / "train_00000.npy").read_bytes(), copy / "val_00000.npy", "tokens")
    changed("val_00000.npy", lambda data: data.replace(b"<u2", b"<i2"), copy / "val_00000.npy", "int16")
    changed("train_00000.npy", flip, copy / "train_00000.npy", "sha256", "delete it and re-run", verify=True)
    changed("token_bytes.npy", flip, copy / "token_bytes.npy", "delete it and re-run")
    changed("meta.json", lambda data: data[:100], "meta.json", "delete it and re-run")
    changed("meta.json", lambda data: b"[]", "meta.json", "delete it and re-run")
    changed("meta.json", lambda data: b"{}", "meta.json", "delete it and re-run")
    changed("meta.json", lambda data: data.replace(b'"bos_id": 399', b'"bos_id": 398'), "tokenizer")
    # a tokenizer that is fine in itself, but not this data's: two tokens have changed places
    def swap(data):
        lines = [line.split() for line in data.splitlines()]
        lines[300][0], lines[301][0] = lines[301][0], lines[300][0]
        return b"\n".join(b" ".join(line) for line in lines) + b"\n"
    changed("tokenizer.tiktoken", swap, "tokenizer", "re-run")
    flipped = flip((copy / "train_00000.npy").read_bytes())
    (copy / "train_00000.npy").write_bytes(flipped)
    open_data(copy, verify=False)  # not looked at: that is what verify is for
    (copy / "train_00000.npy").unlink()
    refused(copy / "train_00000.npy", "missing", "re-run")
    (copy / "meta.json").unlink()
    refused("unfinished", f"run `python prepare_data.py --out {copy}`")
    with pytest.raises(UserError, match="no prepared data in .* run `python prepare_data.py --out"):
        open_data(tmp_path / "nowhere")

# -----------------------------------------------------------------------------
# downloads

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.plan says how each of the next requests goes wrong, after that all goes well."""
    def log_message(self, *args):
        pass

    def do_GET(self):
        data, plan = self.server.files.get(self.path), self.server.plan
        how = plan.pop(0) if plan else "ok"
        start = self.headers.get("Range", "")
        self.server.log.append((self.path, start))
        start = int(start.removeprefix("bytes=").rstrip("-")) if start and "norange" not in how else 0
        if data is None or how.isdigit():
            self.send_response(int(how) if how.isdigit() else 404)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        body = data[start:]
        if how == "half":  # half a file that claims to be whole
            body = body[:len(body) // 2]
        self.send_response(206 if start else 200)
        if start:
            shift = 7 if how == "shifted" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(data) - 1}/{len(data)}")
        if how != "nolength":
            self.send_header("Content-Length", str(len(body)))
        if how == "flip":
            body = body[:len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1:]
        if self.server.etag:
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        self.wfile.write(body[:len(body) * 2 // 3] if "drop" in how else body)

@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "RETRY_SECONDS", 0.001)
    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.plan, server.log, server.etag, server.docs, server.files = [], [], False, {}, {}
        for i, number in enumerate((0, 1, 1822)):
            server.docs[number] = make_docs(40, seed=number, words=1500)
            path = write_parquet(tmp_path / "served" / f"shard_{number:05d}.parquet", server.docs[number])
            server.files[f"/{path.name}"] = path.read_bytes()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

def get(server, tmp_path):
    path = tmp_path / "download" / "shard_00000.parquet"
    prepare_data.download(f"{server.url}/{path.name}", path, prepare_data.open_parquet, "a parquet file", "check --base-url")
    assert path.read_bytes() == server.files[f"/{path.name}"] and not list(path.parent.glob("*.part"))
    return [span for _, span in server.log]

@pytest.mark.parametrize("plan, requests", [
    ([], 1),
    (["drop"], 2),
    (["drop"] * 4, 5),
    (["429", "503", "500"], 4),
    (["drop", "503", "drop"], 4),
    (["drop", "norange"], 2),                  # a whole file instead of its rest: start over
    (["drop", "norange drop", "drop"], 4),
    (["drop", "half"], 3),                     # less than the rest: continue again
    (["drop", "shifted"], 3),                  # the wrong rest: start over
    (["nolength"], 1),
    (["503"] * 5, 6),                          # one less than RETRIES
])
def test_download_survives(plan, requests, server, tmp_path):
    server.plan = list(plan)
    spans = get(server, tmp_path)
    assert len(spans) == requests
    if plan == ["drop"]:
        assert spans[0] == "" and spans[1].startswith("bytes=")  # continued, not started over

def test_download_continues_a_part_from_an_earlier_run(server, tmp_path):
    data = server.files["/shard_00000.parquet"]
    part = tmp_path / "download" / "shard_00000.parquet.part"
    for there, first in ((data[:1000], "bytes=1000-"), (data, f"bytes={len(data)}-"), (data + b"too long", f"bytes={len(data) + 8}-")):
        (tmp_path / "download").mkdir(exist_ok=True)
        (tmp_path / "download" / "shard_00000.parquet").unlink(missing_ok=True)
        part.write_bytes(there)
        server.log.clear()
        assert get(server, tmp_path)[0] == first

def test_download_compares_checksums(server, tmp_path):
    server.etag, server.plan = True, ["flip"]
    assert len(get(server, tmp_path)) == 2

@pytest.mark.parametrize("plan, words, requests", [
    (["404"], ["HTTP 404", "--base-url"], 1),
    (["403"], ["HTTP 403"], 1),
    (["503"] * 50, ["HTTP 503", "re-run the same command"], 6),
    (["half"], ["not a parquet file"], 1),
    (["norange drop"] * 50, ["re-run the same command"], 7),  # always the same bytes: no progress
])
def test_download_gives_up(plan, words, requests, server, tmp_path):
    server.plan = list(plan)
    with pytest.raises(UserError) as e:
        get(server, tmp_path)
    assert all(word in str(e.value) for word in words), e.value
    assert len(server.log) == requests and not (tmp_path / "download" / "shard_00000.parquet").exists()

def test_fineweb(server, tmp_path):
    args = ("fineweb-edu", "--num-shards", "2", "--base-url", server.url, "--vocab-size", "400", "--out", tmp_path / "out")
    quick = "p.RETRY_SECONDS = 0.001"
    held_back = server.files.pop("/shard_00001.parquet")
    fails(prepare(*args, before=quick), "shard_00001.parquet", "HTTP 404")
    assert no_final_files(tmp_path / "out")
    server.files["/shard_00001.parquet"] = held_back
    server.plan = ["drop", "503", "drop"]
    ok(prepare(*args, before=quick))
    data = open_data(tmp_path / "out")
    assert [decoded(data, [shard]) for shard in data.train + data.val] == [server.docs[n] for n in (0, 1, 1822)]
    assert {p.name for p in (tmp_path / "out" / "download").iterdir()} == {name[1:] for name in server.files}
    # a lost shard is made again from the kept download, and the others are not touched
    before, requests = contents(tmp_path / "out"), len(server.log)
    for name in ("meta.json", "train_00000.npy"):
        (tmp_path / "out" / name).unlink()
    kept = (tmp_path / "out" / "train_00001.npy").stat().st_mtime_ns
    ok(prepare(*args, before=quick))
    assert contents(tmp_path / "out") == before and len(server.log) == requests
    assert (tmp_path / "out" / "train_00001.npy").stat().st_mtime_ns == kept

def test_fineweb_can_be_extended(server, tmp_path):
    def args(n):
        return "fineweb-edu", "--num-shards", n, "--base-url", server.url, "--vocab-size", "400", "--out", tmp_path / "out"
    ok(prepare_here(*args("1")))
    before = contents(tmp_path / "out")
    ok(prepare_here(*args("2")))
    after = contents(tmp_path / "out")
    assert len(open_data(tmp_path / "out").train) == 2
    assert all(after[name] == before[name] for name in before if name != "meta.json")
    ok(prepare_here(*args("1")))  # more than enough is there
    assert contents(tmp_path / "out") == after

def test_fineweb_without_validation_text(server, tmp_path):
    server.files["/shard_01822.parquet"] = write_parquet(tmp_path / "blank.parquet", [None, " "]).read_bytes()
    fails(prepare_here("fineweb-edu", "--num-shards", "1", "--base-url", server.url, "--vocab-size", "300", "--out", tmp_path / "out"),
          "no text for val")
    assert not (tmp_path / "out" / "meta.json").exists()

def test_nobody_listens(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data.time, "sleep", lambda seconds: 1 / 0)  # a malformed address is not tried again
        fails(prepare_here("fineweb-edu", "--base-url", "not-a-url", "--out", tmp_path / "out"), "not-a-url", "--base-url")
    fails(prepare("fineweb-edu", "--base-url", "http://127.0.0.1:9", "--out", tmp_path / "out", before="p.RETRY_SECONDS = 0.001"),
          "cannot download http://127.0.0.1:9/shard_")
    assert no_final_files(tmp_path / "out")
