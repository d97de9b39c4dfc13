"""prepare_data.py: real files, real command lines, a real (badly behaved) HTTP server."""

import fcntl
import gzip
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import ROOT, assert_refused, cli, no_open_files, shell

import prepare_data
from common import Unreadable, UserError, sha256_file
from dataset import BOS, open_data, save_tokenizer

CORPUS = Path(os.environ.get("CORPUS_DIR", ROOT.parent / "shared/corpus"))
SMALL = ["--vocab-size", "400", "--shard-tokens", "2000"]


# -----------------------------------------------------------------------------
# Helpers

def make_docs(count, seed=0, words=60):
    """Random documents, the same for the same seed. The first one spells special tokens."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 8))) for _ in range(300)]
    ends = ["\n", ".", "\r\n", " ünï 中文 😀"]
    docs = [" ".join(rng.choices(vocabulary, k=words)) + rng.choice(ends) for _ in range(count)]
    docs[0] = f"a document that spells {BOS} and <|endoftext|> is text"
    return docs

def write_jsonl(path, docs, key="text"):
    data = "".join(json.dumps({key: doc}) + "\n" for doc in docs).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path

def write_parquet(path, docs):
    table = pa.table({"id": list(range(len(docs))), "text": pa.array(docs, pa.string())})
    pq.write_table(table, path, row_group_size=16, compression="NONE")
    return path

def prepare(*args, before="", **env):
    """
    The command in a process of its own: (exit code, stdout, stderr). cli() is half a second faster.
    before: Python that is run ahead of it, with prepare_data as p, to shrink constants or to break something.
    """
    if before:
        code = f"import prepare_data as p\n{before}\np.run_main(p.main)"
        done = shell(sys.executable, "-c", code, *args, **env)
    else:
        done = shell("prepare_data.py", *args, **env)
    return done.returncode, done.stdout, done.stderr

def ok(result):
    """The standard output of a command that succeeded."""
    code, out, err = result
    assert code == 0, err
    return out

def no_final_files(out):
    return not out.is_dir() or not [p.name for p in out.iterdir() if p.name not in (".lock", "download")]

def decoded(data, shards):
    """The documents in a list of shards, in order."""
    bos = data.meta["bos_id"]
    tokens = np.concatenate([np.asarray(shard) for shard in shards]).tolist()
    assert tokens[0] == bos
    docs = []
    for token in tokens:
        if token == bos:
            docs.append([])
        else:
            docs[-1].append(token)
    return [data.tokenizer.decode_bytes(doc).decode() for doc in docs]

def all_text(data):
    """Everything in the shards as one string, validation last."""
    return "".join(decoded(data, data.train) + decoded(data, data.val))

def assert_holds(data, docs):
    """The data is of these documents, every 20th of which is for validation."""
    val = docs[19::20]
    train = [doc for i, doc in enumerate(docs) if i % 20 != 19]
    assert decoded(data, data.train) == train
    assert decoded(data, data.val) == val

def contents(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}

def mtimes(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}

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
    said = ok(prepare(source, "--out", out, *SMALL))
    assert f"python train.py --data {out}" in said
    assert "100 documents" in said
    return out

@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


# -----------------------------------------------------------------------------
# What comes out is what went in

@pytest.mark.parametrize("kind", [
    "jsonl", "jsonl.gz", "parquet", "folder", "JSONL", "json.gz", "jsonl.zst", "json.zst"])
def test_round_trip(kind, docs, tmp_path):
    if kind == "folder":  # sorted, other files ignored, blank documents skipped, one .txt is one document
        path = tmp_path / "in"
        (path / "b").mkdir(parents=True)
        for i, doc in enumerate(docs):
            (path / f"{i:03d}.txt").write_bytes(doc.encode())
        (path / "README.md").write_text("not a source")
        (path / "000b.txt").write_text("")
        (path / "000c.txt").write_text(" \n")
    elif kind == "parquet":  # null rows are skipped
        path = write_parquet(tmp_path / "in.parquet", docs[:50] + [None, ""] + docs[50:])
    else:
        path = write_jsonl(tmp_path / f"in.{kind}", docs[:50] + ["", None, "\n "] + docs[50:])
    ok(cli("prepare_data.py", path, "--out", tmp_path / "out", *SMALL))
    data = open_data(tmp_path / "out")
    assert_holds(data, docs)

    # the shards are numbered, memory-mapped, and as meta.json describes them
    train, val = data.meta["train"], data.meta["val"]
    assert len(data.train) > 2
    assert [entry["file"] for entry in train][:2] == ["train_00000.npy", "train_00001.npy"]
    assert [entry["file"] for entry in val] == ["val_00000.npy"]
    bos = data.meta["bos_id"]
    for shard, entry in zip([*data.train, *data.val], train + val):
        assert shard[0] == bos
        assert shard.dtype == np.uint16 == np.dtype(data.meta["dtype"])
        assert isinstance(shard, np.memmap) and not shard.flags.writeable
        assert entry["tokens"] == len(shard)
        assert entry["documents"] == (shard == bos).sum()
        assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / entry["file"]).read_bytes()).hexdigest()
    assert all(2000 <= entry["tokens"] < 3000 for entry in train[:-1])
    assert data.meta["totals"] == {
        "documents": 100,
        "bytes": sum(len(doc.encode()) for doc in docs),
        "tokens": sum(map(len, [*data.train, *data.val])),
    }
    assert data.meta["vocab_size"] == 400 == data.tokenizer.n_vocab
    assert bos == 399

def test_several_sources_keep_their_order(docs, tmp_path):
    paths = [write_jsonl(tmp_path / "z.jsonl", docs[:30]), write_parquet(tmp_path / "a.parquet", docs[30:])]
    ok(cli("prepare_data.py", *paths, "--out", tmp_path / "out", *SMALL))
    assert_holds(open_data(tmp_path / "out"), docs)

def test_compressed_txt_is_one_document(docs, tmp_path):
    text = "".join(docs)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.TXT.zst").write_bytes(pa.compress(text.encode(), codec="zstd", asbytes=True))
    for path in tmp_path.iterdir():
        assert list(prepare_data.read_documents(path, "text")) == [text]

def test_another_key_or_column(docs, tmp_path):
    pq.write_table(pa.table({"content": docs[:50], "text": docs[50:]}), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", docs[50:], key="content")
    ok(cli("prepare_data.py", tmp_path, "--out", tmp_path / "out", "--text-key", "content", *SMALL))
    assert_holds(open_data(tmp_path / "out"), docs)
    again = cli("prepare_data.py", tmp_path / "a.parquet", "--out", tmp_path / "out", *SMALL)
    assert_refused(again, "text_key content there, text now")

def folder_with_links(tmp_path, docs):
    """A folder of four files, one of which is reached by a link; a link back; and other files."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write_jsonl(folder / "a.jsonl", docs[:25])
    write_jsonl(folder / "b.JSONL", docs[25:50])
    write_jsonl(tmp_path / "elsewhere/x.jsonl", docs[50:75])
    write_jsonl(folder / "sub/z.jsonl", docs[75:])
    (folder / "link").symlink_to("../elsewhere")
    (folder / "sub/back").symlink_to("..")
    (folder / "sub/again.jsonl").symlink_to("../a.jsonl")
    for name in ("README.md", "sub/x.json", "sub/y", "sub/z"):
        (folder / name).write_text("not a source")
    return folder

def test_a_folder_is_read_whole(docs, tmp_path):
    """Every file once, those behind links too; what is left out is said."""
    folder = folder_with_links(tmp_path, docs)
    said = ok(cli("prepare_data.py", folder, folder / "b.JSONL", "--out", tmp_path / "out", *SMALL))
    assert_holds(open_data(tmp_path / "out"), docs)
    assert f"{folder}: 4 files skipped that do not end in .txt, " in said
    assert f"{folder}/README.md, {folder}/sub/x.json, {folder}/sub/y, ..\n" in said
    assert f"{folder}/sub/again.jsonl is {folder}/a.jsonl, which is read already: skipped" in said
    assert f"{folder}/b.JSONL is {folder}/b.JSONL, which" in said

    os.link(folder / "a.jsonl", tmp_path / "hard.jsonl")
    files = prepare_data.find_files([folder, tmp_path / "hard.jsonl"])
    assert files == prepare_data.find_files([folder])

def test_a_folder_that_cannot_be_read_whole_is_refused(docs, tmp_path):
    folder = folder_with_links(tmp_path, docs)
    with no_open_files(), pytest.raises(Unreadable, match="cannot read .*/in .Too many open files"):
        prepare_data.find_files([folder])
    (folder / "gone.jsonl").symlink_to("nowhere")
    broken = cli("prepare_data.py", folder, "--out", tmp_path / "out")
    assert_refused(broken, "in/gone.jsonl is a broken link or no regular file")
    (folder / "gone.jsonl").unlink()
    os.mkfifo(folder / "pipe.txt")
    pipe = cli("prepare_data.py", folder, "--out", tmp_path / "out")
    assert_refused(pipe, "pipe.txt is a broken link or no regular file")

def test_single_txt_gives_its_tail_to_validation(tmp_path):
    text = "\r\n".join(make_docs(60)) + "\n"  # line ends are kept as they are
    (tmp_path / "in.txt").write_bytes(text.encode())
    said = ok(prepare(tmp_path / "in.txt", "--out", tmp_path / "out"))
    data = open_data(tmp_path / "out")
    assert all_text(data) == text
    assert 0.03 < len(data.val[0]) / (len(data.train[0]) + len(data.val[0])) < 0.07
    # 4096 is the default for little text; this text has fewer, which is printed and recorded
    assert "training a tokenizer of 4096" in said
    assert data.meta["vocab_size"] == data.tokenizer.n_vocab < 4096
    assert f"vocabulary is {data.meta['vocab_size']}" in said

@pytest.mark.parametrize("docs", [
    ["ab"],
    ["a b c d e f g"],
    ["x" * 100] * 19,
    ["x" * 1000, "y", "z"],
    ["a", "b" * 500],
])
def test_cut_tail(docs):
    train, val = prepare_data.cut_tail(docs)
    assert train and val
    assert all(train + val)
    assert "".join(train + val) == "".join(docs)
    assert len("".join(val)) <= 1 + 0.05 * len("".join(docs)) + 20

def test_cut_tail_of_too_little_text():
    with pytest.raises(UserError, match="too small"):
        prepare_data.cut_tail(["a"])

def test_stdlib(tmp_path):
    lib = tmp_path / "lib"
    files = {
        "b.py": "import a\n" * 30,
        "a/z.py": "x = 'é'\n" * 30,
        "a/__init__.py": "",
        "site-packages/no.py": "no = 1\n",
        "c/dist-packages/no.py": "no = 1\n",
        "note.txt": "no",
    }
    for name, text in files.items():
        (lib / name).parent.mkdir(parents=True, exist_ok=True)
        (lib / name).write_text(text, "utf-8")
    (lib / "latin.py").write_bytes(b"# \xe9\n")
    before = f"p.sysconfig.get_path = lambda name: {str(lib)!r}"
    ok(prepare("--out", tmp_path / "out", before=before))  # stdlib is the default source
    data = open_data(tmp_path / "out")
    assert all_text(data) == "x = 'é'\n" * 30 + "import a\n" * 30
    assert data.meta["source"] == "stdlib"

def test_real_stdlib_is_found():
    names = [p.name for p in prepare_data.stdlib_files()]
    assert "argparse.py" in names
    assert "tiktoken" not in names
    assert len(names) > 200

@pytest.mark.skipif(
    not (CORPUS / "prose.jsonl.gz").exists(), reason=f"no prose.jsonl.gz in {CORPUS} (set CORPUS_DIR)")
def test_real_prose(tmp_path):
    with gzip.open(CORPUS / "prose.jsonl.gz", "rt", encoding="utf-8") as f:
        docs = [json.loads(line)["text"] for _, line in zip(range(300), f)]
    source = write_jsonl(tmp_path / "in.jsonl.gz", docs)
    ok(prepare(source, "--out", tmp_path / "out", "--vocab-size", "2048"))
    data = open_data(tmp_path / "out")
    assert_holds(data, docs)
    totals = data.meta["totals"]
    assert totals["bytes"] == sum(len(doc.encode()) for doc in docs)
    assert 2.5 < totals["bytes"] / totals["tokens"] < 4.5

def test_giant_single_line(tmp_path):
    line = " ".join(make_docs(60)).replace("\n", " ")
    repeated = (line * (1 + 3_000_000 // len(line)))[:3_000_000]
    text = repeated + " " * 1_100_000 + "x" * 900_000  # 1e6 spaces crash tiktoken unless they are cut
    (tmp_path / "in.txt").write_bytes(text.encode())
    ok(prepare(tmp_path / "in.txt", "--out", tmp_path / "out", "--vocab-size", "400"))
    data = open_data(tmp_path / "out")
    assert all_text(data) == text
    train_bytes = int(data.token_bytes[data.train[0]].sum())
    val_bytes = int(data.token_bytes[data.val[0]].sum())
    assert train_bytes + val_bytes == len(text.encode())

# encodings that tiktoken finds as a plugin: like p50k_base, a special token sits in a hole of the ranks
ENCODINGS = '''
import requests
from tiktoken_ext.openai_public import r50k_pat_str
def fake():
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 257, b"abc": 258}
    special_tokens = {"<|endoftext|>": 256}
    return dict(name="fake", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special_tokens)
def wide():
    return {**fake(), "name": "wide", "special_tokens": {"<|endoftext|>": 256, "<|last|>": 65535}}
def offline():
    raise requests.ConnectionError("no route\\nto host")
ENCODING_CONSTRUCTORS = {"fake": fake, "wide": wide, "offline": offline}
'''

@pytest.fixture
def with_encodings(tmp_path):
    """The environment of a process that knows the encodings fake, wide and offline."""
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "fake_encodings.py").write_text(ENCODINGS)
    return {"PYTHONPATH": f"{ROOT}:{tmp_path}"}

@pytest.mark.parametrize("name, bos, dtype", [("fake", 259, np.uint16), ("wide", 65536, np.uint32)])
def test_named_tokenizers(name, bos, dtype, source, docs, with_encodings, tmp_path):
    ok(prepare(source, "--out", tmp_path / "out", "--tokenizer", name, **with_encodings))
    data = open_data(tmp_path / "out")  # this process does not know the encoding: the two files are enough
    assert_holds(data, docs)
    assert data.meta["tokenizer"] == name
    assert data.meta["bos_id"] == bos
    assert data.meta["vocab_size"] == bos + 1 == len(data.token_bytes)
    assert data.train[0].dtype == dtype
    assert data.tokenizer.encode_single_token("<|endoftext|>") == 256
    assert data.token_bytes[256] == 0
    assert data.token_bytes[258] == 3
    assert 256 not in data.train[0]

def test_named_tokenizers_that_cannot_be_used(source, with_encodings, tmp_path):
    out = ["--out", tmp_path / "out"]
    off = prepare(source, *out, "--tokenizer", "offline", **with_encodings)
    assert_refused(off, "offline", "network")
    unknown = prepare(source, *out, "--tokenizer", "nonesuch", **with_encodings)
    assert_refused(unknown, "nonesuch", "gpt2")
    of_its_own_size = prepare(source, *out, "--tokenizer", "fake", "--vocab-size", "300", **with_encodings)
    assert_refused(of_its_own_size, "--vocab-size")
    (tmp_path / "tiny.txt").write_text("a")
    assert_refused(prepare(tmp_path / "tiny.txt", *out, "--tokenizer", "fake", **with_encodings), "too small")
    assert no_final_files(tmp_path / "out")


# -----------------------------------------------------------------------------
# The same command again

def test_two_runs_are_identical(prepared, source, tmp_path):
    ok(prepare(source, "--out", tmp_path / "again", *SMALL))
    assert contents(tmp_path / "again") == contents(prepared)

def test_finished_run_writes_nothing(source, copy):
    before = mtimes(copy)
    said = ok(prepare(source, "--out", copy, *SMALL))
    assert "already complete" in said
    assert mtimes(copy) == before

@pytest.mark.parametrize("names", [
    ["meta.json", "val_00000.npy"],
    ["meta.json"],
    ["train_00001.npy"],
    ["tokenizer.json"],
    ["token_bytes.npy", "meta.json", "train_00000.npy"],
])
def test_deleted_files_come_back(names, prepared, source, copy):
    for name in names:
        (copy / name).unlink()
    before = mtimes(copy)
    ok(prepare(source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)
    if names[0] == "meta.json":  # finished shards are not made again
        assert mtimes(copy)["train_00000.npy"] == before["train_00000.npy"]

def test_damaged_files_are_repaired(prepared, source, copy):
    shard = bytearray((copy / "train_00000.npy").read_bytes())
    shard[-2] ^= 1
    (copy / "train_00000.npy").write_bytes(shard)
    val = (copy / "val_00000.npy").read_bytes()
    (copy / "val_00000.npy").write_bytes(val[:-1])  # what makes the data not complete
    (copy / "token_bytes.npy").write_bytes(b"")
    ok(prepare(source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)
    for path in (copy / "meta.json", copy / "train_00001.npy"):  # truncated, and no record left of it
        path.write_bytes(path.read_bytes()[:-10])
    ok(prepare(source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)

def test_what_cannot_be_read_now_is_not_removed(copy, source):
    before = contents(copy)
    for use in (prepare_data.finished_data, prepare_data.discard_damaged):
        with no_open_files(), pytest.raises(Unreadable, match="Too many open files"):
            use(copy)
    with no_open_files(), pytest.raises(Unreadable, match="docs.jsonl .Too many open files"):
        next(prepare_data.read_documents(source, "text"))
    assert contents(copy) == before

@pytest.mark.parametrize("array", [
    np.zeros(500),
    np.full(500, -1),
    np.full(500, 60000, np.uint16),
    np.zeros(500, np.uint16),  # begins with no document
], ids=["float", "negative", "too large", "no document"])
def test_damaged_shards_of_an_unfinished_run_are_written_again(array, prepared, source, copy):
    (copy / "meta.json").unlink()
    np.save(copy / "train_00001.npy", array)
    ok(cli("prepare_data.py", source, "--out", copy, *SMALL))
    assert contents(copy) == contents(prepared)

def test_files_of_others_stay(source, tmp_path):
    names = ["embeddings_1.npy", "train_1_of_2.npy"]
    for name in names:
        np.save(tmp_path / name, np.arange(3))
    ok(cli("prepare_data.py", source, "--out", tmp_path, *SMALL))
    assert all((tmp_path / name).exists() for name in names)

def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    names = ["train_00002.npy", "train_99999.npy", "train_100000.npy"]
    for name in [*names, "val_00001.npy"]:
        (tmp_path / name).touch()
    assert [path.name for path in prepare_data.shard_files(tmp_path, "train")] == names

@pytest.mark.parametrize("name", ["settings.json", "meta.json"])
def test_deeply_nested_json_is_damaged(name, source, copy):
    (copy / name).write_text("[" * 100_000)
    result = cli("prepare_data.py", source, "--out", copy, *SMALL)
    if name == "settings.json":
        assert_refused(result, "settings.json is damaged")
    else:
        ok(result)

@pytest.mark.parametrize("nth", [1, 3, 7, 11, 16])
def test_killed_run_continues(nth, prepared, source, tmp_path):
    """SIGKILL just before the nth file or folder would be flushed: the next run makes the same folder."""
    before = f"""
import itertools, os, signal
count = itertools.count(1)
fsync = os.fsync
def fsync_or_die(fd):
    if next(count) == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)
os.fsync = fsync_or_die"""
    out = tmp_path / "out"
    code, _, _ = prepare(source, "--out", out, *SMALL, before=before)
    assert code == -signal.SIGKILL
    assert not (out / "meta.json").exists()
    with pytest.raises(UserError, match="run `python prepare_data.py"):
        open_data(out)
    ok(prepare(source, "--out", out, *SMALL))
    assert contents(out) == contents(prepared)

def test_other_settings_are_refused(source, docs, copy, tmp_path):
    def again(source, out, *flags):
        return cli("prepare_data.py", source, "--out", out, *flags)

    before = contents(copy)
    other_vocabulary = again(source, copy, "--vocab-size", "401", "--shard-tokens", "2000")
    assert_refused(other_vocabulary, str(copy), "vocab_size 400 there, 401 now",
                   "give --vocab-size 400 to go on with it", "delete")
    assert_refused(again(source, copy, "--vocab-size", "400"), "shard_tokens")
    assert_refused(again("fineweb-edu", copy), "source")
    assert contents(copy) == before

    other = write_jsonl(tmp_path / "docs.jsonl", docs)
    ok(again(other, tmp_path / "out", *SMALL))
    write_jsonl(other, docs[:-1] + ["changed"])  # the same command line, but the file is another
    assert_refused(again(other, tmp_path / "out", *SMALL), "source_sha256")

    (copy / "settings.json").unlink()
    assert_refused(again(source, copy, *SMALL), "settings.json", "choose another --out")

def test_settings_from_before_there_was_a_flag_for_digits(source, tmp_path):
    out = tmp_path / "out"
    ok(cli("prepare_data.py", source, "--out", out, "--digits", 3, *SMALL))
    settings = json.loads((out / "settings.json").read_text())
    del settings["digits"], settings["text_key"]
    (out / "settings.json").write_text(json.dumps(settings))
    assert "already complete" in ok(cli("prepare_data.py", source, "--out", out, "--digits", 3, *SMALL))
    assert_refused(cli("prepare_data.py", source, "--out", out, *SMALL), "digits 3 there, 2 now",
                   "give --digits 3 to go on with it")

def old_settings(out, files):
    """Make settings.json what was written before there was --text-key."""
    settings = json.loads((out / "settings.json").read_text())
    del settings["digits"], settings["text_key"]
    settings["source_sha256"] = sha256_file(*files)
    (out / "settings.json").write_text(json.dumps(settings))

@pytest.mark.parametrize("source", ["stdlib", "a.txt", "a.txt b.txt", "folder"])
def test_data_of_an_older_version(source, docs, here, monkeypatch):
    """Its fingerprint had no names and borders of files: known of one file, and of the standard library."""
    for name in ("a.txt", "b.txt", "lib/a.py", "lib/b.py", "folder/a.txt", "folder/b.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("\n".join(docs[:50]))
    monkeypatch.setattr(prepare_data.sysconfig, "get_path", lambda name: "lib")
    command = ["prepare_data.py", *source.split(), "--out", "out", "--digits", 3, *SMALL]
    ok(cli(*command))
    files = prepare_data.find_files(source.split())
    old_settings(Path("out"), files)
    if source in ("stdlib", "a.txt"):
        assert "already complete" in ok(cli(*command))
    else:
        assert_refused(cli(*command), "source_sha256", "choose another --out or delete out")
    files[0].write_text("other text " * 1000)
    assert_refused(cli(*command), "source_sha256", "choose another --out or delete out")

@pytest.mark.parametrize("flags, longest", [
    ([], 2), (["--digits", "1"], 1), (["--digits", "3"], 3), (["--vocab-size", "65537"], 3)])
def test_digits_in_a_token(flags, longest, monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--vocab-size", "300", *flags])
    args = prepare_data.parse_args()
    digits = prepare_data.digits_of(args, args.vocab_size)
    text = "in 1984, 1984 and 19841984 people " * 20
    enc = prepare_data.train_tokenizer([text], 300, digits)
    tokens = [token.decode() for token in enc.token_byte_values() if token.isdigit()]
    assert max(map(len, tokens)) == longest
    assert enc.decode(enc.encode_ordinary(text)) == text

def test_a_source_that_changes_while_it_is_read(docs, tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "docs.jsonl", docs)
    before = source.read_bytes()

    def save_and_change_source(folder, enc):
        save_tokenizer(folder, enc)
        write_jsonl(source, docs[::-1])

    monkeypatch.setattr(prepare_data, "save_tokenizer", save_and_change_source)
    command = ("prepare_data.py", source, "--out", tmp_path / "out", *SMALL)
    assert_refused(cli(*command), "changed while it was read", "delete")
    assert not (tmp_path / "out/meta.json").exists()

    # emptied after it was read for the first time
    def read_and_empty(*args):
        yield from read_documents(*args)
        source.write_bytes(b"")

    read_documents = prepare_data.read_documents
    monkeypatch.setattr(prepare_data, "read_documents", read_and_empty)
    emptied = cli("prepare_data.py", source, "--out", tmp_path / "emptied", *SMALL)
    assert_refused(emptied, "changed while it was read")

    # nor does the old source go on with these shards
    monkeypatch.undo()
    source.write_bytes(before)
    assert_refused(cli(*command), "no settings.json")

def test_the_same_bytes_in_other_files_are_other_data(docs, tmp_path):
    """The name says how a file is read, and its end is the end of a document."""
    def again():
        return cli("prepare_data.py", folder, "--out", tmp_path / "out", "--vocab-size", "300")

    folder = tmp_path / "in"
    folder.mkdir()
    whole = write_jsonl(folder / "a.txt", docs)
    ok(again())
    whole.rename(folder / "a.jsonl")
    assert_refused(again(), "source_sha256")
    (folder / "a.jsonl").rename(whole)
    assert "already complete" in ok(again())
    raw = whole.read_bytes()
    whole.write_bytes(raw[:500])
    (folder / "b.txt").write_bytes(raw[500:])
    assert_refused(again(), "source_sha256")

def test_a_folder_is_written_by_one_at_a_time(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert_refused(prepare(source, "--out", out, *SMALL), str(out), "another prepare_data.py")
        assert no_final_files(out)
    ok(prepare(source, "--out", out, *SMALL))


# -----------------------------------------------------------------------------
# Bad input: one clear line, exit code 2, nothing half-written

def folder_without_text(path):
    path.mkdir()
    (path / "x.md").write_text("x")

def damaged_gzip(path):
    write_jsonl(path, make_docs(200))
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])

def damaged_zst(path):
    write_jsonl(path, make_docs(200))
    os.truncate(path, path.stat().st_size // 2)

def latin_table(path):
    texts = pa.array([b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), path)

def table_without_text(path):
    pq.write_table(pa.table({"body": ["x"]}), path)

def table_of_numbers(path):
    pq.write_table(pa.table({"text": [1, 2, 3]}), path)

def test_a_download_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch):
    def refuse(path):
        raise Unreadable("too many open files")

    monkeypatch.setattr(prepare_data, "fetch", lambda url, part, hint: part.write_bytes(b"x"))
    path = tmp_path / "x.parquet"
    with pytest.raises(Unreadable):
        prepare_data.download("http://x", path, refuse, "a file", "check the URL")
    prepare_data.download("http://x", path, lambda part: None, "a file", "check the URL")
    assert path.read_bytes() == b"x"

BAD = {  # file name: (its contents or how to make it, words the message must have)
    "missing.txt": (None, ["missing.txt", "no file"]),
    "empty.txt": ("", ["empty.txt", "is empty"]),
    "pipe.txt": (os.mkfifo, ["pipe.txt is a pipe, a socket or a device", "write it into a file first"]),
    "empty.jsonl": ("", ["empty.jsonl", "is empty"]),
    "blank.txt": (" \n", ["blank.txt", "blank"]),
    "latin.txt": (b"caf\xe9 " * 50, ["latin.txt", "byte 3"]),
    "nul.txt": (b"abc\0def" * 50, ["nul.txt", "NUL"]),
    "broken.jsonl": ('{"text": "a b"}\n\n{"text": \n', ["broken.jsonl line 3", "JSON"]),
    "deep.jsonl": ("[" * 100_000, ["deep.jsonl line 1", "JSON"]),
    "notext.jsonl": ('{"text": "a b"}\n{"txt": "c"}\n', ["notext.jsonl line 2", '"text"']),
    "null.jsonl": ('{"text": null}\n', ["null.jsonl", "every document is blank"]),
    "half.jsonl.zst": (damaged_zst, ["half.jsonl.zst", "damaged"]),
    "not.txt.zst": (b"not zst at all", ["not.txt.zst", "damaged"]),
    "list.jsonl": ('["text"]\n', ["list.jsonl line 1", '"text"']),
    "latin.jsonl": (b'{"text": "a b"}\n{"text": "\xe9"}\n', ["latin.jsonl line 2", "UTF-8"]),
    "half.jsonl": ('{"text": "a \\ud800 b"}\n', ["half.jsonl line 1", "UTF-8"]),
    "notes.md": ("text", ["notes.md", ".jsonl"]),
    "folder": (folder_without_text, ["folder", ".jsonl"]),
    "tiny.txt": ("a", ["too small"]),
    "half.jsonl.gz": (damaged_gzip, ["half.jsonl.gz", "damaged"]),
    "not.jsonl.gz": (b"not gzip at all", ["not.jsonl.gz", "damaged"]),
    "not.parquet": (b"PAR1 not parquet at all PAR1", ["not.parquet", "parquet"]),
    "column.parquet": (table_without_text, ["column.parquet", "`text`", "body"]),
    "latin.parquet": (latin_table, ["latin.parquet", "damaged"]),
    "type.parquet": (table_of_numbers, ["type.parquet", "strings"]),
}

@pytest.mark.parametrize("name", BAD)
def test_bad_source(name, tmp_path):
    what, words = BAD[name]
    path = tmp_path / name
    if callable(what):
        what(path)
    elif what is not None:
        path.write_bytes(what if isinstance(what, bytes) else what.encode())
    args = [path, "--out", tmp_path / "out", "--vocab-size", "300"]
    if name in ("latin.txt", "half.jsonl.gz", "not.parquet"):
        result = prepare(*args)
    else:
        result = cli("prepare_data.py", *args)
    assert_refused(result, *words)
    assert no_final_files(tmp_path / "out")

def test_damaged_parquet_pages(tmp_path):
    path = write_parquet(tmp_path / "in.parquet", make_docs(100))
    data = bytearray(path.read_bytes())
    start, end = len(data) // 4, len(data) // 2
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    assert_refused(cli("prepare_data.py", path, "--out", tmp_path / "out"), "in.parquet", "damaged")
    assert no_final_files(tmp_path / "out")

@pytest.mark.parametrize("args, words", [
    ("SOURCE --vocab-size 257", ["--vocab-size 257", "too small"]),
    ("SOURCE --vocab-size many", ["--vocab-size", "--help"]),
    ("SOURCE --vocab-size 50000", ["vocabulary of only", "lower --vocab-size"]),
    ("SOURCE --vocab-size 99999999999", ["--vocab-size must be at most 16777216"]),
    ("nowhere.txt --tokenizer gpt5", ["no tokenizer 'gpt5'", "gpt2"]),  # before any file is read
    ("SOURCE --shard-tokens 0", ["--shard-tokens"]),
    ("SOURCE --num-shards 3", ["--num-shards"]),
    # flags that would not do anything
    ("SOURCE --base-url http://127.0.0.1:9", ["--base-url is for fineweb-edu and climbmix only"]),
    ("fineweb-edu --shard-tokens 1000", ["--shard-tokens is not for fineweb-edu"]),
    ("stdlib --text-key text", ["--text-key is for JSON lines and parquet"]),
    ("fineweb-edu --num-shards 1823", ["1822"]),
    ("fineweb-edu SOURCE", ["fineweb-edu cannot be mixed"]),
    ("SOURCE climbmix", ["climbmix cannot be mixed"]),
    ("climbmix --num-shards 6543", ["6542"]),
    ("SOURCE --tokenizer .", ["no tokenizer in .", "name a folder"]),
    ("SOURCE --tokenizer . --vocab-size 400", ["--vocab-size is for a trained tokenizer"]),
    ("SOURCE --nonsense", ["--nonsense", "--help"]),
    ("fineweb-edu --base-url http://" + "a" * 300 + ".org", ["cannot download", "--base-url"]),
])
def test_bad_arguments(args, words, source, tmp_path):
    args = [source if arg == "SOURCE" else arg for arg in args.split()]
    assert_refused(cli("prepare_data.py", *args, "--out", tmp_path / "out"), *words)
    assert no_final_files(tmp_path / "out")

def test_bad_out(source, tmp_path):
    def to(out):
        return cli("prepare_data.py", source, "--out", out, *SMALL)

    file = tmp_path / "file"
    file.write_text("precious")
    assert_refused(to(file), str(file), "choose another --out")
    assert_refused(to(file / "below"), "choose another --out")
    before_any_source = cli("prepare_data.py", tmp_path / "nowhere.txt", "--out", file / "below")
    assert_refused(before_any_source, f"{file} is no folder", "choose another --out")
    assert_refused(to("/proc/nanolrt"), "/proc/nanolrt", "choose another --out")
    assert file.read_text() == "precious"

def test_disk_full(source, tmp_path):
    before = """
import numpy as np
def full(f, array):
    f.write(b'half')
    raise OSError(28, 'No space left on device')
np.save = full"""
    result = prepare(source, "--out", tmp_path / "out", *SMALL, before=before)
    assert_refused(result, "token_bytes.npy", "No space left")
    assert not list((tmp_path / "out").glob("*.npy*"))

def test_interrupt(source, tmp_path):
    before = """
def stop(*args):
    raise KeyboardInterrupt
p.train_tokenizer = stop"""
    code, _, err = prepare(source, "--out", tmp_path / "out", before=before)
    assert code == 130
    assert err == ""

def test_a_bug_shows_its_traceback(source):
    before = """
def bug():
    1 / 0
p.main = bug"""
    _, _, err = prepare(source, before=before)
    assert err.splitlines()[-1].startswith("ZeroDivisionError")


def test_a_tokenizer_is_reused(source, prepared, docs, tmp_path, monkeypatch):
    """From the folder of other data: the same files, wherever that folder is, and the text as its tokens."""
    monkeypatch.setattr(prepare_data, "train_tokenizer", lambda *args: 1 / 0)
    others = write_jsonl(tmp_path / "others.jsonl", make_docs(60, seed=9))
    out = tmp_path / "out"
    args = [others, "--out", out, "--tokenizer"]
    ok(cli("prepare_data.py", *args, prepared))
    data = open_data(out)
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        assert (out / name).read_bytes() == (prepared / name).read_bytes()
    assert_holds(data, make_docs(60, seed=9))

    # the same tokenizer elsewhere is the same; another one is not
    before = contents(out)
    ok(cli("prepare_data.py", *args, shutil.copytree(prepared, tmp_path / "copy")))
    assert contents(out) == before
    assert_refused(cli("prepare_data.py", others, "--out", out), "holds other data")
    spec = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    spec["name"] = "another"
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(spec))
    assert_refused(cli("prepare_data.py", *args, tmp_path / "copy"), "holds other data", "tokenizer_sha256")
    (tmp_path / "copy" / "tokenizer.tiktoken").write_text("damaged")
    assert_refused(cli("prepare_data.py", *args, tmp_path / "copy"), "damaged")
    assert contents(out) == before

# -----------------------------------------------------------------------------
# Downloads

class Handler(http.server.BaseHTTPRequestHandler):
    """
    Serves server.files. server.plan says how each of the next requests goes wrong; after that all goes well.
    server.log has (path, Range header) of every request, server.tokens its Authorization header or None.
    server.redirect: where the same files are, instead of here.
    """

    def log_message(self, *args):
        pass

    def reply(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self):
        data = self.server.files.get(self.path)
        how = self.server.plan.pop(0) if self.server.plan else "ok"
        wanted = self.headers.get("Range", "")
        self.server.log.append((self.path, wanted))
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.redirect:
            return self.reply(302, Location=self.server.redirect + self.path)
        start = 0
        if wanted and "norange" not in how:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))

        # replies without a file
        if how.isdigit():
            return self.reply(int(how), Retry_After="0")
        if data is None:
            return self.reply(404, Retry_After="0")
        if start >= len(data):
            return self.reply(416, Content_Range=f"bytes */{len(data)}")

        # the file, or its bytes from `start` on
        body = data[start:]
        headers = {}
        if how == "half":  # half a file that claims to be whole
            body = body[:len(body) // 2]
        if start:
            shift = 7 if how == "shifted" else 0
            headers["Content_Range"] = f"bytes {start + shift}-{len(data) - 1}/{len(data)}"
        if how != "nolength":
            headers["Content_Length"] = str(len(body))
        if how == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1:]
        if self.server.etag:
            headers["X_Linked_Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        self.reply(206 if start else 200, **headers)
        if "drop" in how:
            body = body[:len(body) * 2 // 3]
        self.wfile.write(body)

@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "RETRY_SECONDS", 0.001)
    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.plan = []
        server.log = []
        server.tokens = []
        server.redirect = None
        server.etag = False
        server.docs = {}
        server.files = {}
        for number in (0, 1, 1822):
            server.docs[number] = make_docs(40, seed=number, words=1500)
            path = write_parquet(tmp_path / "served" / f"shard_{number:05d}.parquet", server.docs[number])
            server.files[f"/{path.name}"] = path.read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

def get(server, tmp_path):
    """Download a file of the server and compare it. The Range headers of the requests that this took."""
    path = tmp_path / "download" / "shard_00000.parquet"
    url = f"{server.url}/{path.name}"
    check = partial(prepare_data.open_parquet, text_key="text")
    prepare_data.download(url, path, check, "a parquet file", "check --base-url")
    assert path.read_bytes() == server.files[f"/{path.name}"]
    assert not list(path.parent.glob("*.part"))
    return [wanted for _, wanted in server.log]

@pytest.mark.parametrize("plan, requests", [
    ([], 1),
    (["drop"], 2),
    (["drop"] * 4, 5),
    (["429", "503", "500"], 4),
    (["drop", "503", "drop"], 4),
    (["drop", "norange"], 2),  # a whole file instead of its rest: start over
    (["drop", "norange drop", "drop"], 4),
    (["drop", "half"], 3),  # less than the rest: continue again
    (["drop", "shifted"], 3),  # the wrong rest: start over
    (["nolength"], 1),
    (["503"] * 5, 6),  # one less than RETRIES
])
def test_download_survives(plan, requests, server, tmp_path):
    server.plan = list(plan)
    ranges = get(server, tmp_path)
    assert len(ranges) == requests
    if plan == ["drop"]:  # continued, not started over
        assert ranges[0] == ""
        assert ranges[1].startswith("bytes=")

def test_download_continues_a_part_from_an_earlier_run(server, tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    data = server.files["/shard_00000.parquet"]
    for there in (data[:1000], data, data + b"too long"):
        (folder / "shard_00000.parquet").unlink(missing_ok=True)
        (folder / "shard_00000.parquet.part").write_bytes(there)
        server.log.clear()
        assert get(server, tmp_path)[0] == f"bytes={len(there)}-"

def test_download_compares_checksums(server, tmp_path):
    server.etag = True
    server.plan = ["flip"]
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
    assert len(server.log) == requests
    assert not (tmp_path / "download" / "shard_00000.parquet").exists()

def fineweb(server, out, num_shards):
    """The arguments that prepare FineWeb-Edu from the test's server."""
    return ["fineweb-edu", "--num-shards", num_shards, "--base-url", server.url, "--vocab-size", "400",
            "--out", out]

def test_fineweb(server, tmp_path):
    out = tmp_path / "out"
    args = fineweb(server, out, 2)
    quick = "p.RETRY_SECONDS = 0.001"
    held_back = server.files.pop("/shard_00001.parquet")
    assert_refused(prepare(*args, before=quick), "shard_00001.parquet", "HTTP 404")
    assert no_final_files(out)

    server.files["/shard_00001.parquet"] = held_back
    server.plan = ["drop", "503", "drop"]
    ok(prepare(*args, before=quick))
    data = open_data(out)
    for shard, number in zip([*data.train, *data.val], (0, 1, 1822), strict=True):
        assert decoded(data, [shard]) == server.docs[number]
    assert {p.name for p in (out / "download").iterdir()} == {name[1:] for name in server.files}

    # a lost shard is made again from the kept download, and the others are not touched
    before = contents(out)
    requests = len(server.log)
    for name in ("meta.json", "train_00000.npy"):
        (out / name).unlink()
    kept = (out / "train_00001.npy").stat().st_mtime_ns
    ok(prepare(*args, before=quick))
    assert contents(out) == before
    assert len(server.log) == requests
    assert (out / "train_00001.npy").stat().st_mtime_ns == kept

def test_fineweb_can_be_extended(server, tmp_path):
    out = tmp_path / "out"
    ok(cli("prepare_data.py", *fineweb(server, out, 1)))
    before = contents(out)
    ok(cli("prepare_data.py", *fineweb(server, out, 2)))
    after = contents(out)
    assert len(open_data(out).train) == 2
    (out / "verified.jsonl").unlink()  # open_data() notes there what it has read
    assert all(after[name] == before[name] for name in before if name != "meta.json")
    ok(cli("prepare_data.py", *fineweb(server, out, 1)))  # more than enough is there
    assert contents(out) == after

def test_fineweb_without_validation_text(server, tmp_path):
    blank = write_parquet(tmp_path / "blank.parquet", [None, " "])
    server.files["/shard_01822.parquet"] = blank.read_bytes()
    result = cli("prepare_data.py", *fineweb(server, tmp_path / "out", 1))
    assert_refused(result, "no text for val")
    assert not (tmp_path / "out" / "meta.json").exists()

def hub_path(repository):
    return f"/datasets/{repository}/resolve/main"

def serve_hub(server, repository, numbers, last):
    """Let the server be the hub, with these training files of a repository and the one for validation."""
    places = dict(zip([*numbers, last], (0, 1, 1822)))
    for number, served in places.items():
        path = f"{hub_path(repository)}/shard_{number:05d}.parquet"
        server.files[path] = server.files[f"/shard_{served:05d}.parquet"]

def test_climbmix_from_the_hub(server, tmp_path, monkeypatch):
    """HF_ENDPOINT is asked for the files that nanochat's code names; a mirror makes the same data."""
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    serve_hub(server, "karpathy/climbmix-400b-shuffle", [0, 1], 6542)
    args = ["climbmix", "--num-shards", 2, "--vocab-size", 400, "--out", tmp_path / "out"]
    ok(cli("prepare_data.py", *args))
    data = open_data(tmp_path / "out")
    for shard, served in zip([*data.train, *data.val], (0, 1, 1822), strict=True):
        assert decoded(data, [shard]) == server.docs[served]
    assert set(server.tokens) == {None}

    # the same data from another place, and other data from the same place
    requests = len(server.log)
    monkeypatch.delenv("HF_ENDPOINT")
    assert "already complete" in ok(cli("prepare_data.py", *args))
    assert len(server.log) == requests
    other = cli("prepare_data.py", "fineweb-edu", *args[1:])
    assert_refused(other, "holds other data", "source climbmix there, fineweb-edu now")

def test_the_token_goes_to_the_hub_and_nowhere_else(server, tmp_path, monkeypatch):
    """Not to another host that the hub redirects to, not to another address, and into no message."""
    repository = "karpathy/climbmix-400b-shuffle"
    serve_hub(server, repository, [0, 1], 6542)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    args = ["climbmix", "--num-shards", 1, "--vocab-size", 400]
    shown = ok(cli("prepare_data.py", *args, "--out", tmp_path / "hub"))
    assert set(server.tokens) == {"Bearer hf_secret"}
    assert "hf_secret" not in shown

    # redirected, as the hub does, to another host: this server by another name
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as storage:
        storage.plan, storage.log, storage.tokens, storage.etag = [], [], [], False
        storage.redirect = None
        storage.files = server.files
        threading.Thread(target=storage.serve_forever, daemon=True).start()
        server.redirect = f"http://localhost:{storage.server_port}"
        server.tokens.clear()
        ok(cli("prepare_data.py", *args, "--out", tmp_path / "redirected"))
        storage.shutdown()
    server.redirect = None
    assert set(server.tokens) == {"Bearer hf_secret"}
    assert set(storage.tokens) == {None} and len(storage.tokens) == 2

    # another address than the hub's, even one that begins like it
    localhost = server.url.replace("127.0.0.1", "localhost")
    for base_url in (localhost, f"{server.url}@localhost", server.url[:-1]):
        assert prepare_data.authorization(f"{base_url}/shard_00000.parquet") == {}
    server.tokens.clear()
    base_url = localhost + hub_path(repository)
    ok(cli("prepare_data.py", *args, "--out", tmp_path / "elsewhere", "--base-url", base_url))
    assert set(server.tokens) == {None}

    # a refusal speaks of the token, without it
    server.plan = ["401"]
    refused = cli("prepare_data.py", *args, "--out", tmp_path / "refused")
    assert_refused(refused, "HTTP 401", "HF_TOKEN")
    assert "hf_secret" not in refused[2]
    monkeypatch.setenv("HF_TOKEN", "hf_secret\nX-Other: 1")
    refused = cli("prepare_data.py", *args, "--out", tmp_path / "refused")
    assert_refused(refused, "HF_TOKEN")
    assert "hf_secret" not in refused[2]

def test_a_slash_at_the_end_of_an_address(tmp_path, monkeypatch):
    def refuse(url, *args, **kwargs):
        raise UserError(url)

    monkeypatch.setattr(prepare_data, "download", refuse)
    stream = prepare_data.hub_streams("http://x/", "text", 1, 1, tmp_path)[0]
    with pytest.raises(UserError, match="^http://x/shard_00001.parquet$"):
        next(stream.documents())

def test_nobody_listens(tmp_path, monkeypatch):
    args = ["fineweb-edu", "--out", tmp_path / "out", "--base-url"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data.time, "sleep", lambda seconds: 1 / 0)  # a malformed address is not retried
        assert_refused(cli("prepare_data.py", *args, "not-a-url"), "not-a-url", "--base-url")
    result = prepare(*args, "http://127.0.0.1:9", before="p.RETRY_SECONDS = 0.001")
    assert_refused(result, "cannot download http://127.0.0.1:9/shard_")
    assert no_final_files(tmp_path / "out")
