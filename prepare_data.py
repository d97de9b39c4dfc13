"""
Turn text into token shards that train.py can memory-map.

    python prepare_data.py                                    the Python standard library's source, no network
    python prepare_data.py climbmix --num-shards 8            downloads parquet shards of ClimbMix
    python prepare_data.py fineweb-edu --num-shards 8         the same of FineWeb-Edu
    python prepare_data.py corpus.txt more.jsonl.gz folder    your own .txt, .jsonl, .parquet, .gz, .zst
    python prepare_data.py more.txt --tokenizer data          the same tokens as in data, or in a run's folder

The files that end up in --out (default `data`) are described in dataset.py, which reads them. The same
command again continues after the shards that are finished, repairs what is damaged, and otherwise changes
nothing.

In this file, in this order: making a tokenizer, sources and readers of their formats, documents to shards,
downloads, what an earlier run left in the folder, and the command.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hashlib
import itertools
import json
import os
import re
import stat
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from common import (
    ArgumentParser,
    Unreadable,
    UserError,
    at_least,
    at_most,
    check_new_folder,
    check_regular,
    flag,
    fsync,
    lock,
    open_source,
    publish,
    raise_if_unreadable,
    read_json_lines,
    run_main,
    say,
    sha256_file,
    text_of,
    write_atomic,
    write_json,
)
from dataset import (
    BOS,
    load_shard,
    load_tokenizer,
    open_data,
    save_tokenizer,
    segments,
    shard_dtype,
    token_bytes,
    tokenizer_sha256,
)

# of the files that are read, in any case; .json.gz and .json.zst are JSON lines
SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst",
            ".parquet")
VOCAB_LARGE = 32768  # the default vocabulary
VOCAB_SMALL = 4096  # the default where the source files are smaller than SMALL_SOURCE
SMALL_SOURCE = 100_000_000  # bytes
MAX_VOCAB = 2**24  # no text needs more
TOKENIZER_CHARS = 1_000_000_000  # the tokenizer is trained on at most this much text
SHARD_TOKENS = 100_000_000  # the default size of a shard
VAL_EVERY = 20  # every 20th document is for validation

# How text is cut into words, which no token crosses: the pattern of tiktoken's cl100k_base, except for how
# many digits a token may hold. Small vocabularies have better uses for 1,000 tokens than three digits:
# nanochat measured two to be better by 0.007 bits per byte at depth 12 and 32,768 tokens.
WORDS = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,DIGITS}"
         r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
DIGITS_SMALL = 2  # for vocabularies of up to 65536 tokens
DIGITS_LARGE = 3

# What can be downloaded, by its name on the command line: the repository of Hugging Face's hub, and the
# number of its last file, such as shard_01822.parquet, which is for validation. Both are nanochat's: the
# first its data until March 2026, the second since then.
HUB_DATA = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
}
HUB = "https://huggingface.co"  # HF_ENDPOINT names a mirror
RETRIES = 6  # a download is given up after so many attempts in a row without progress
RETRY_SECONDS = 1.0  # the pause between attempts, doubled with every failure


# -----------------------------------------------------------------------------
# Making a tokenizer

def train_tokenizer(docs, vocab_size, digits):
    """
    Train byte-level BPE on the first TOKENIZER_CHARS characters of docs (an iterable of str). Returns a
    tiktoken.Encoding of vocab_size tokens, <|bos|> being the last; of fewer if the text has nothing left to
    merge. A token holds at most so many digits.
    """
    import rustbpe

    def training_text():
        n_chars = 0
        for doc in docs:
            for segment in segments(doc):
                yield segment
                n_chars += len(segment)
                if n_chars >= TOKENIZER_CHARS:
                    return

    bpe = rustbpe.Tokenizer()
    pattern = WORDS.replace("DIGITS", str(digits))
    bpe.train_from_iterator(training_text(), vocab_size - 1, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    special_tokens = {BOS: len(ranks)}
    return tiktoken.Encoding(
        "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)

def named_tokenizer(name):
    """
    tiktoken's encoding `name` (gpt2, cl100k_base, ..) with <|bos|> added as its last id. Raises UserError
    if tiktoken cannot fetch it.
    """
    try:
        enc = tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:  # requests' exceptions are OSErrors; ValueError is a wrong checksum
        raise UserError(f"tiktoken could not fetch {name} ({e}): "
                        "it needs the network once, or TIKTOKEN_CACHE_DIR") from e
    # tiktoken's README extends encodings through these underscore names: there are no others
    special_tokens = {**enc._special_tokens, BOS: enc.n_vocab}
    return tiktoken.Encoding(
        name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks, special_tokens=special_tokens)


# -----------------------------------------------------------------------------
# Sources, and readers of their formats

def stdlib_files():
    """The .py files of this Python's standard library, sorted, without the packages installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return sorted(path for path in root.rglob("*.py") if not installed & set(path.relative_to(root).parts))

def file_mode(path):
    """The mode of what a path leads to, 0 if there is nothing. Raises Unreadable if that cannot be known."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as e:
        raise_if_unreadable(path, e)
        raise

def file_identity(path):
    """What all names of a file have in common, links of both kinds. Raises Unreadable, also if it is gone."""
    try:
        there = os.stat(path)
    except OSError as e:
        raise_if_unreadable(path, e)
        raise
    # not every file system numbers its files, but those with hard links do
    return (there.st_dev, there.st_ino) if there.st_nlink > 1 else os.path.realpath(path)

def is_source(path):
    """Does the name of this file end as those that are read do?"""
    return path.name.lower().endswith(SUFFIXES)

def folder_files(folder):
    """
    The files of a folder that are read, sorted, links followed. Other files are left out, which is said.
    Raises UserError for what should be read and cannot be.
    """
    def fail(e):
        raise_if_unreadable(e.filename, e)

    found, others = [], []
    seen = set()  # a link may lead back
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for path in (Path(root, name) for name in names):
            if not is_source(path):
                others.append(path)
            elif not stat.S_ISREG(file_mode(path)):
                raise UserError(f"{path} is a broken link or no regular file: remove it")
            else:
                found.append(path)
    if not found:
        raise UserError(f"{folder} has no text: expected files ending in {', '.join(SUFFIXES)}")
    if others:
        say(f"{folder}: {len(others)} files skipped that do not end in {', '.join(SUFFIXES)}: "
            f"{', '.join(map(str, sorted(others)[:3]))}{', ..' if len(others) > 3 else ''}")
    return sorted(found)

def find_files(sources):
    """
    The files behind `stdlib` and local paths, in the order given, the files of a folder sorted, each once.
    Raises UserError for a path that cannot be used.
    """
    files = []
    for source in sources:
        path = Path(source)
        mode = file_mode(path)
        if source == "stdlib":
            files += stdlib_files()
        elif stat.S_ISDIR(mode):
            files += folder_files(path)
        elif mode != 0 and not stat.S_ISREG(mode):
            raise UserError(f"{path} is a pipe, a socket or a device, and text is read several times: "
                            "write it into a file first")
        elif mode == 0:
            raise UserError(f"no file or folder {path}: name one, or use stdlib, {', '.join(HUB_DATA)}")
        elif not is_source(path):
            raise UserError(f"cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}")
        elif path.stat().st_size == 0:
            raise UserError(f"{path} is empty: remove it from the command")
        else:
            files.append(path)

    once = {}
    for path in files:
        first = once.setdefault(file_identity(path), path)
        if first is not path:
            say(f"{path} is {first}, which is read already: skipped")
    return list(once.values())

def fingerprint(files):
    """Hex sha256 of the names and contents of files, one after another. Raises Unreadable."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{sha256_file(path)} ".encode() + os.fsencode(path.name) + b"\n")
    return digest.hexdigest()

def read_txt(path):
    """Yield the whole file, which is one document."""
    try:
        with open_source(path) as f:
            text = f.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from e
    if "\0" in text:
        position = text.index("\0")
        raise UserError(f"{path} is not text (NUL at character {position}): is it a binary file?")
    yield text

def read_py(path):
    """Yield a Python file, or nothing: a few of the standard library's own tests are not UTF-8 on purpose."""
    with suppress(UserError):
        yield from read_txt(path)

def read_jsonl(path, text_key):
    """Yield the text under text_key of each line's JSON object, None where it is null."""
    for place, row in read_json_lines(path):
        is_null = isinstance(row, dict) and row.get(text_key, "") is None
        yield None if is_null else text_of(place, row, text_key)

def open_parquet(path, text_key):
    """pyarrow's ParquetFile at path. Raises UserError if it does not open or has no column text_key."""
    import pyarrow.parquet
    try:
        parquet = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise_if_unreadable(path, e)
        raise UserError(f"{path} does not open as parquet ({e}): delete it, then get it again") from e
    names = parquet.schema_arrow.names
    if text_key not in names:
        raise UserError(f"{path} has no column `{text_key}`, only {', '.join(names)}: see --text-key")
    return parquet

def read_parquet(path, text_key):
    """Yield the rows of the column text_key: a str, or None where the row is null."""
    import pyarrow
    try:
        for batch in open_parquet(path, text_key).iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{path}: column `{text_key}` does not hold strings: see --text-key")
                yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise_if_unreadable(path, e)
        raise UserError(f"{path} is damaged ({e}): delete it, then get it again") from e

def format_of(path):
    """The suffix that says how a file is read once it is decompressed: .py, .txt, .parquet, .jsonl, .json."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return os.path.splitext(name)[1]

def read_documents(path, text_key):
    """
    Yield the documents (str) of one file, without null and blank ones: of JSON lines and parquet the text
    under text_key. A UserError names the file and the place.
    """
    suffix = format_of(path)
    if suffix == ".py":
        texts = read_py(path)
    elif suffix == ".txt":
        texts = read_txt(path)
    elif suffix == ".parquet":
        texts = read_parquet(path, text_key)
    else:
        texts = read_jsonl(path, text_key)
    for text in texts:
        if text and not text.isspace():
            yield text

def cut_tail(docs):
    """
    Split a list of few documents into (train, val): val is the last 5 % of the characters. The document
    that lies on the border is cut at a space. Raises UserError if nothing is left for train.
    """
    train = list(docs)
    val = []
    missing = max(1, sum(map(len, docs)) // VAL_EVERY)  # characters that val still lacks
    while train and missing > 0:
        doc = train.pop()
        cut = max(0, len(doc) - missing)
        if cut > 0:
            space = doc.rfind(" ", max(1, cut - 1000), cut)
            if space > 0:
                cut = space
            train.append(doc[:cut])
        val.insert(0, doc[cut:])
        missing -= len(doc) - cut
    if not train:
        raise UserError("the corpus is too small to give a training and a validation shard: add text")
    return train, val

def split_documents(files, text_key, n_docs, split):
    """Yield those of the n_docs documents in files that belong to split, "train" or "val", in their order."""
    docs = itertools.chain.from_iterable(read_documents(path, text_key) for path in files)
    if n_docs < VAL_EVERY:
        train, val = cut_tail(list(docs))
        yield from train if split == "train" else val
        return
    for i, doc in enumerate(docs):
        belongs_to = "val" if i % VAL_EVERY == VAL_EVERY - 1 else "train"
        if belongs_to == split:
            yield doc


# -----------------------------------------------------------------------------
# Documents to token shards

@dataclass
class Stream:
    """Documents of one split, and the shards that they become."""
    split: str  # "train" or "val"
    first_shard: int  # the number of the first shard
    documents: Callable  # documents() is an iterator over the documents (str), from the first one on
    shard_tokens: int | None  # a shard ends with the document that brings it to so many tokens; None: never

def hub_documents(base_url, text_key, folder, number):
    """Yield the documents of one parquet file of a dataset, downloaded to the folder if it is not there."""
    name = f"shard_{number:05d}.parquet"
    path = download(
        f"{base_url}/{name}",
        folder / name,
        check=partial(open_parquet, text_key=text_key),
        what=f"a parquet file with a column `{text_key}`",
        hint="check --base-url and --num-shards",
    )
    yield from read_documents(path, text_key)

def hub_streams(base_url, text_key, num_shards, last, folder):
    """
    The streams of a dataset in parquet files, each of which becomes one shard; the file with the number
    `last` is for validation. Nothing is downloaded yet.
    """
    documents = partial(hub_documents, base_url.rstrip("/"), text_key, folder)
    streams = [Stream("val", 0, partial(documents, last), shard_tokens=None)]
    for number in range(num_shards):
        streams.append(Stream("train", number, partial(documents, number), shard_tokens=None))
    return streams

def local_streams(files, text_key, shard_tokens, source):
    """
    The streams of local files, and how many characters they have together. All of the files are read once,
    so that bad input is found (UserError) before anything is written.
    """
    n_docs = 0
    n_chars = 0
    for path in tqdm(files, "reading", disable=None):
        for doc in read_documents(path, text_key):
            n_docs += 1
            n_chars += len(doc)
    if n_docs == 0:
        raise UserError(f"no text in {source}: every document is blank")

    documents = partial(split_documents, files, text_key, n_docs)
    train = Stream("train", 0, partial(documents, "train"), shard_tokens)
    val = Stream("val", 0, partial(documents, "val"), shard_tokens)
    # raises UserError if there is too little text for two splits
    if next(train.documents(), None) is None:
        raise UserError(f"{source} changed while it was read: re-run when it does not change any more")
    return [train, val], n_chars

def tokenize(enc, docs):
    """
    Yield (starts_document, n_chars, ids) for every segment of every document: ids is an array of
    shard_dtype(enc), with <|bos|> in front if the segment starts its document.
    """
    bos = enc.encode_single_token(BOS)
    dtype = shard_dtype(enc)

    def document_segments():
        for doc in docs:
            for i, segment in enumerate(segments(doc)):
                yield i == 0, segment

    remaining = document_segments()
    while batch := list(itertools.islice(remaining, 512)):
        # encode_ordinary: a document that spells <|bos|> is ordinary text
        texts = [segment for _, segment in batch]
        batch_ids = enc.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        for (starts_document, segment), ids in zip(batch, batch_ids):
            if starts_document:
                ids = [bos, *ids]
            yield starts_document, len(segment), np.array(ids, dtype)

def check_shard(shard, enc):
    """Raise UserError unless an array, which has no checksum yet, can be a shard made with this tokenizer."""
    begins_document = shard[0] == enc.encode_single_token(BOS)
    if shard.dtype != shard_dtype(enc) or not begins_document or shard.max() >= enc.n_vocab:
        raise UserError("it does not hold documents of this tokenizer")

def write_shards(out, stream, enc, bar):
    """
    Tokenize the documents of a stream into out/<split>_<number>.npy, beginning with number
    stream.first_shard. Shards that are already there are kept and their documents skipped. bar is a tqdm
    that counts characters.
    """
    bos = enc.encode_single_token(BOS)
    number = stream.first_shard

    def shard_path(number):
        return out / f"{stream.split}_{number:05d}.npy"

    def save_shard(number, pieces):
        tokens = np.concatenate(pieces)
        write_atomic(shard_path(number), lambda f: np.save(f, tokens))

    # the shards that an earlier run finished, and how many documents they hold
    skip = 0
    while shard_path(number).exists():
        try:
            shard = load_shard(shard_path(number))
            check_shard(shard, enc)
        except Unreadable:
            raise
        except UserError:
            break  # it is damaged, and written again
        skip += np.count_nonzero(shard == bos)
        if stream.shard_tokens is None:
            return
        number += 1

    # the rest: a new shard begins with a document
    pieces = []
    n_tokens = 0
    for starts_document, n_chars, ids in tokenize(enc, itertools.islice(stream.documents(), skip, None)):
        shard_is_full = stream.shard_tokens is not None and n_tokens >= stream.shard_tokens
        if shard_is_full and starts_document:
            save_shard(number, pieces)
            pieces = []
            n_tokens = 0
            number += 1
        pieces.append(ids)
        n_tokens += len(ids)
        bar.update(n_chars)
    if pieces:
        save_shard(number, pieces)

def shard_files(out, split):
    """The shards of a split in a folder, in the order of their numbers. Other .npy files are not ours."""
    found = [path for path in out.iterdir() if re.fullmatch(rf"{split}_\d{{5,}}\.npy", path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))

def describe_shard(path, token_sizes, bos):
    """
    The entry of one shard in meta.json. It is counted from the file, so that it is the same however often the
    preparation was interrupted. token_sizes: see dataset.token_bytes.
    """
    shard = load_shard(path)
    counts = np.zeros(len(token_sizes), np.int64)  # how often each token occurs
    block = 1 << 24
    for start in range(0, len(shard), block):
        counts += np.bincount(shard[start:start + block], minlength=len(token_sizes))
    return {
        "file": path.name,
        "tokens": len(shard),
        "documents": int(counts[bos]),
        "bytes": int(counts @ token_sizes),
        "sha256": sha256_file(path),
    }

def describe_data(out, source, enc):
    """What meta.json says of the finished folder. Raises UserError if a split has no shard."""
    token_sizes = token_bytes(enc)
    bos = enc.encode_single_token(BOS)
    meta = {
        "source": source,
        "tokenizer": enc.name,
        "vocab_size": enc.n_vocab,
        "bos_id": bos,
        "dtype": str(shard_dtype(enc)),
        "tokenizer_sha256": tokenizer_sha256(out),
    }
    for split in ("train", "val"):
        meta[split] = [describe_shard(path, token_sizes, bos) for path in shard_files(out, split)]
        if not meta[split]:
            raise UserError(f"{source} gives no text for {split}")
    shards = meta["train"] + meta["val"]
    meta["totals"] = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    return meta


# -----------------------------------------------------------------------------
# Downloads

def hub():
    """The address of Hugging Face's hub, or of the mirror that HF_ENDPOINT names."""
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or HUB

def hub_url(repository):
    """Where the files of a dataset of the hub are."""
    return f"{hub()}/datasets/{repository}/resolve/main"

def authorization(url):
    """
    The headers that give our token, HF_TOKEN, to the hub, and to nobody else: {} for another address. Raises
    UserError, without the token, if no header can hold it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token or not url.startswith(hub() + "/"):
        return {}
    if not re.fullmatch("[!-~]+", token):
        raise UserError("HF_TOKEN holds characters that no token has: set it again or unset it")
    return {"Authorization": f"Bearer {token}"}

def fetch(url, part, hint):
    """
    One attempt to complete the file `part`, which an earlier attempt may have begun, with what is at url.
    Raises requests.RequestException if another attempt may help, UserError (with the hint) or ValueError if
    none will.
    """
    import requests
    start = part.stat().st_size if part.exists() else 0  # the first byte that we lack
    # without compression: sizes must be those of the file; a redirect to another host takes the token off
    headers = {"Accept-Encoding": "identity"} | authorization(url)
    if start > 0:
        headers["Range"] = f"bytes={start}-"

    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        # refusals, for now and for good
        code = reply.status_code
        if code == 429 or code >= 500:
            raise requests.HTTPError(f"HTTP {code}", response=reply)
        if code in (401, 403):
            hint += ", and HF_TOKEN if the data wants one"
        if code not in (200, 206, 416):
            raise UserError(f"{url}: HTTP {code} {reply.reason}: {hint}")

        # what the reply is: the file from its start, the bytes that we lack, or nothing as we have them all
        content_range = reply.headers.get("Content-Range")
        # group 1: the first byte sent, None if none is; group 2: the size of the whole file
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", content_range or "")
        restarted = code == 200
        continued = code == 206 and span is not None and span[1] == str(start)
        complete = code == 416 and span is not None
        if restarted:
            start = 0
            total = reply.headers.get("Content-Length")
        elif continued or complete:
            total = span[2]
        else:  # a range that does not fit what we have
            part.unlink(missing_ok=True)
            raise requests.RequestException(f"HTTP {code} with Content-Range {content_range}")
        if total is not None:
            total = int(total)

        # receive it
        name = url.rpartition("/")[2]
        bar = tqdm(
            desc=name, total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None)
        with bar, open(part, "ab" if start > 0 else "wb") as f:
            if not complete:
                for chunk in reply.iter_content(1 << 16):  # a lost connection costs the chunk that it cuts
                    f.write(chunk)
                    bar.update(len(chunk))
            f.flush()
            fsync(f.fileno())

        # Hugging Face names the file's sha256 in the redirect to its storage
        tags = [r.headers.get("X-Linked-Etag", "").strip('"') for r in (*reply.history, reply)]

    # compare size and checksum
    size = part.stat().st_size
    if total is not None and size < total:
        raise requests.RequestException(f"the connection ended at {size} of {total} bytes")
    too_long = total is not None and size > total
    damaged = any(re.fullmatch("[0-9a-f]{64}", tag) and sha256_file(part) != tag for tag in tags)
    if too_long or damaged:
        part.unlink()
        raise requests.RequestException("the bytes received do not match the announced size or checksum")

def retry_pause(error, failures):
    """Seconds to wait after an error: what the server wants, else longer with every failure; at most 60."""
    retry_after = ""
    if error.response is not None:
        retry_after = error.response.headers.get("Retry-After", "")
    if retry_after.isdecimal():
        return min(60, int(retry_after[:9]))  # Python refuses to read thousands of digits
    return min(60, RETRY_SECONDS * 2**failures)

def fetch_with_retries(url, part, hint, name, retries):
    """
    Complete the file `part` in as many attempts as it takes. Raises UserError after so many `retries` in a
    row that made no progress. name: of the file, for messages.
    """
    import requests
    largest = 0  # bytes, of all attempts
    failures = 0  # attempts in a row that added nothing to it
    while True:
        try:
            return fetch(url, part, hint)
        except (requests.RequestException, ValueError) as e:
            size = part.stat().st_size if part.exists() else 0
            if size > largest:
                largest = size
                failures = 0
            else:
                failures += 1
            malformed = isinstance(e, ValueError)  # the URL, or a number in the reply
            if malformed or failures >= retries:
                raise UserError(f"cannot download {url} ({e}): {hint}, "
                                "or re-run the same command to continue") from e
            seconds = retry_pause(e, failures)
            say(f"{name}: {e}; trying again in {seconds:.0f} s")
            time.sleep(seconds)

def download(url, path, check, what, hint, retries=RETRIES):
    """
    Download the file at url to path, unless it is there, and return path. Lost connections, HTTP 429 and
    5xx are tried again and continue where they stopped. check(file) raises UserError if the file is not
    `what`. Raises UserError, with the hint, if the server refuses (404), after `retries` attempts in a row
    without progress, and if the file fails the check.
    """
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_with_retries(url, part, hint, path.name, retries)
        try:
            check(part)
        except Unreadable:
            raise
        except UserError as e:
            part.unlink()
            raise UserError(f"what {url} served is not {what}: {hint}") from e
        publish(part, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    return path


# -----------------------------------------------------------------------------
# What an earlier run left in the folder

# what was done before there was a flag for it, and what a tokenizer that is not trained leaves open
UNSAID = {"text_key": "text", "digits": 3}

# the settings that are flags
SETTING_FLAGS = {"tokenizer", "vocab_size", "digits", "text_key", "shard_tokens", "base_url"}

def is_source_of_older_version(there, settings, files):
    """
    Were settings that a version before --text-key wrote of these files? Its checksum was of their bytes
    together, without names and borders; those are known of a single file, and of the standard library.
    """
    names_are_known = len(files) == 1 or settings["source"] == "stdlib"
    return names_are_known and there.get("source_sha256") == sha256_file(*files)

def check_settings(out, settings, files):
    """
    Raise UserError if the folder holds data of other settings, or data whose settings are not known. files:
    None for what is downloaded.
    """
    path = out / "settings.json"
    check_regular(path)
    if not path.exists():
        ours = re.compile(r"meta\.json|tokenizer\..*|(train|val)_\d+\.npy")
        names = sorted(p.name for p in out.iterdir() if ours.fullmatch(p.name))
        if names:
            raise UserError(f"{out} holds {names[0]} but no settings.json: choose another --out or empty it")
        return
    now = UNSAID | settings
    try:
        there = json.loads(path.read_text("utf-8"))
        if "text_key" not in there:
            there.pop("num_shards", None)  # of FineWeb-Edu, which can be extended now
            if files is not None and is_source_of_older_version(there, settings, files):
                there["source_sha256"] = now["source_sha256"]
        there = UNSAID | there
        differ = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as e:
        raise_if_unreadable(path, e)
        raise UserError(f"{path} is damaged ({e}): delete {out} and re-run prepare_data.py") from e
    if differ:
        differences = "; ".join(f"{key} {there.get(key)} there, {now.get(key)} now" for key in differ)
        advice = f"choose another --out or delete {out}"
        if SETTING_FLAGS.issuperset(differ) and all(key in there for key in differ):
            flags = " ".join(f"{flag(key)} {there[key]}" for key in differ)
            advice = f"give {flags} to go on with it, or {advice}"
        raise UserError(f"{out} holds other data ({differences}): {advice}")

def finished_data(out):
    """
    The Data in the folder, or None if it is unfinished or damaged, and so is to be made again. Raises
    Unreadable.
    """
    try:
        return open_data(out, verify=False)
    except Unreadable:
        raise
    except UserError:
        return None

def discard_damaged(out):
    """
    Prepare a folder for being completed: remove meta.json and every file that differs from what it recorded.
    Without a tokenizer that can be used, remove all shards, too. What cannot be read now is not damaged: it
    raises Unreadable.
    """
    # what meta.json recorded, if it can be read
    try:
        meta = json.loads((out / "meta.json").read_text("utf-8"))
        recorded = {shard["file"]: shard["sha256"] for split in ("train", "val") for shard in meta[split]}
        recorded_tokenizer = meta["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        if not isinstance(e, FileNotFoundError):
            raise_if_unreadable(out / "meta.json", e)
        recorded = None
        recorded_tokenizer = None

    # the tokenizer
    try:
        load_tokenizer(out)
        usable = recorded_tokenizer in (None, tokenizer_sha256(out))
    except Unreadable:
        raise
    except UserError:
        usable = False
    if not usable:
        for name in ("tokenizer.tiktoken", "tokenizer.json"):
            (out / name).unlink(missing_ok=True)

    # the shards
    for path in shard_files(out, "train") + shard_files(out, "val"):
        if not usable:
            path.unlink()
        elif recorded is not None and recorded.get(path.name) != sha256_file(path):
            path.unlink()
    (out / "meta.json").unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# The command

def parse_args():
    parser = ArgumentParser(description="Turn text into tokens for train.py.")
    parser.add_argument("source", nargs="*", default=["stdlib"],
                        help=f"stdlib, {', '.join(HUB_DATA)}, or files and folders: {' '.join(SUFFIXES)}")
    parser.add_argument("--text-key", metavar="NAME",
                        help="what the text is called: key of JSON lines, column of parquet (default: text)")
    parser.add_argument("--out", default="data", help="folder to write")
    parser.add_argument("--tokenizer", default="bpe",
                        help="bpe: train one on this text; a folder of data or of a run: the one that is "
                             "there; or a tiktoken encoding such as gpt2")
    parser.add_argument("--vocab-size", type=int,
                        help=f"tokens of the trained tokenizer, {BOS} included (default: {VOCAB_LARGE}, or "
                             f"{VOCAB_SMALL} where the files are under {SMALL_SOURCE // 10**6} MB)")
    parser.add_argument("--digits", type=int, choices=[1, 2, 3],
                        help="digits in a token of the trained tokenizer at most (default: 2, "
                             "3 for a vocabulary of more than 65536)")
    parser.add_argument("--shard-tokens", type=int,
                        help=f"tokens a shard (default: {SHARD_TOKENS}; of a download: one parquet file)")
    parser.add_argument("--num-shards", type=int,
                        help=f"{', '.join(HUB_DATA)}: training files to download, about 55 M tokens each "
                             "(default: 8)")
    parser.add_argument("--base-url", metavar="URL",
                        help=f"{', '.join(HUB_DATA)}: where shard_00000.parquet and the others are (default: "
                             f"karpathy's repository at {HUB}, or at HF_ENDPOINT, with HF_TOKEN)")
    args = parser.parse_args()

    # the tokenizer
    names = ["bpe", *tiktoken.list_encoding_names()]
    args.tokenizer_folder = None
    if args.tokenizer not in names and stat.S_ISDIR(file_mode(args.tokenizer)):
        args.tokenizer_folder = Path(args.tokenizer)
    elif args.tokenizer not in names:
        raise UserError(f"no tokenizer {args.tokenizer!r}: name a folder that has one, "
                        f"or choose one of {', '.join(names)}")
    for name in ("vocab_size", "digits"):
        if getattr(args, name) is not None and args.tokenizer != "bpe":
            raise UserError(f"{flag(name)} is for a trained tokenizer, {args.tokenizer} has its own: "
                            "leave one of the two out")
    if args.vocab_size is not None and args.vocab_size <= 257:
        raise UserError(f"--vocab-size {args.vocab_size} is too small: "
                        f"256 bytes and {BOS} take 257, use 258 or more")

    # sources and shards
    at_least(args, shard_tokens=1)
    at_most(args, vocab_size=MAX_VOCAB)
    for name in HUB_DATA:
        if name in args.source and len(args.source) > 1:
            raise UserError(f"{name} cannot be mixed with other sources: prepare it into its own --out")
    downloaded = args.source[0] in HUB_DATA
    for name in ("num_shards", "base_url"):
        if not downloaded and getattr(args, name) is not None:
            raise UserError(f"{flag(name)} is for {' and '.join(HUB_DATA)} only: leave it out")
    if downloaded and args.shard_tokens is not None:
        raise UserError(f"--shard-tokens is not for {args.source[0]}, whose files are the shards: "
                        "leave it out")
    if args.num_shards is None:
        args.num_shards = 8
    if args.shard_tokens is None:
        args.shard_tokens = SHARD_TOKENS
    if downloaded:
        _, last = HUB_DATA[args.source[0]]
        if not 1 <= args.num_shards <= last:
            raise UserError(f"--num-shards must be from 1 to {last}")
    return args

def choose_text_key(args, files):
    """
    The value of --text-key, which is "text" if it was not given. Raises UserError if it was, and no file has
    keys or columns. files: None for what is downloaded.
    """
    if args.text_key is None:
        return "text"
    if files is not None and all(format_of(path) in (".py", ".txt") for path in files):
        raise UserError("--text-key is for JSON lines and parquet, which none of the files is: leave it out")
    return args.text_key

def digits_of(args, vocab_size):
    """How many digits a token of the trained tokenizer may hold."""
    if args.digits is not None:
        return args.digits
    return DIGITS_SMALL if vocab_size <= 65536 else DIGITS_LARGE

def make_settings(args, files, vocab_size):
    """
    What settings.json says: runs with equal settings make the same data. files: None for what is downloaded.
    """
    settings = {"source": " ".join(args.source), "text_key": args.text_key}
    if args.tokenizer_folder is None:
        settings["tokenizer"] = args.tokenizer
    else:  # wherever it is
        load_tokenizer(args.tokenizer_folder, "name a folder that prepare_data.py or train.py made")
        settings["tokenizer_sha256"] = tokenizer_sha256(args.tokenizer_folder)
    if args.tokenizer == "bpe":
        settings["vocab_size"] = vocab_size
        settings["digits"] = digits_of(args, vocab_size)
    if files is None:
        # a mirror, HF_ENDPOINT, has the same data; --num-shards is left out: more can be added later
        repository, _ = HUB_DATA[args.source[0]]
        settings["base_url"] = args.base_url or f"{HUB}/datasets/{repository}/resolve/main"
        return settings
    settings["shard_tokens"] = args.shard_tokens
    settings["source_sha256"] = fingerprint(files)
    return settings

def make_tokenizer(args, vocab_size, streams):
    """The tokenizer that --tokenizer means, trained on the streams for train if it is bpe."""
    if args.tokenizer_folder is not None:
        return load_tokenizer(args.tokenizer_folder)
    if args.tokenizer != "bpe":
        return named_tokenizer(args.tokenizer)
    note = " (the default; see --vocab-size)" if args.vocab_size is None else ""
    say(f"training a tokenizer of {vocab_size} tokens{note}")
    train_streams = (stream for stream in streams if stream.split == "train")
    docs = itertools.chain.from_iterable(stream.documents() for stream in train_streams)
    enc = train_tokenizer(docs, vocab_size, digits_of(args, vocab_size))

    # little text gives fewer tokens, which is an error only if the size was chosen by the user
    refused = args.vocab_size is not None and enc.n_vocab < vocab_size
    if refused or enc.n_vocab < 258:
        raise UserError(f"this text gives a vocabulary of only {enc.n_vocab} tokens: "
                        "add text or lower --vocab-size")
    if enc.n_vocab < vocab_size:
        say(f"the text gives only {enc.n_vocab} tokens: the vocabulary is {enc.n_vocab}, not {vocab_size}")
    return enc

def copy_tokenizer(folder, out):
    """Copy the tokenizer's two files byte for byte: a run knows its tokenizer by their checksum."""
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        raw = (folder / name).read_bytes()
        write_atomic(out / name, lambda f, raw=raw: f.write(raw))

def summary(data, state):
    """Print what a data folder holds and what to do with it next."""
    totals = data.meta["totals"]
    val_tokens = sum(map(len, data.val))
    text_tokens = max(totals["tokens"] - totals["documents"], 1)  # without <|bos|>
    say(f"{data.folder}: {state}. {totals['documents']:,} documents, {totals['tokens']:,} tokens "
        f"({val_tokens:,} for validation), vocabulary {data.meta['vocab_size']:,}, "
        f"{totals['bytes'] / text_tokens:.2f} bytes per token")
    say(f"next: python train.py --data {data.folder}")

def main():
    args = parse_args()
    out = Path(args.out)
    check_new_folder(out)

    # sources and settings
    downloaded = args.source[0] in HUB_DATA
    files = None if downloaded else find_files(args.source)
    args.text_key = choose_text_key(args, files)
    small = not downloaded and sum(path.stat().st_size for path in files) < SMALL_SOURCE
    vocab_size = args.vocab_size
    if vocab_size is None:
        vocab_size = VOCAB_SMALL if small else VOCAB_LARGE
    settings = make_settings(args, files, vocab_size)

    with lock(out, "prepare_data.py"):
        # an earlier run of the same settings: keep what it finished
        check_settings(out, settings, files)
        data = finished_data(out)
        if data is not None and (not downloaded or len(data.train) >= args.num_shards):
            summary(data, "already complete")
            return
        discard_damaged(out)

        # sources to streams of documents
        if downloaded:
            repository, last = HUB_DATA[args.source[0]]
            base_url = args.base_url or hub_url(repository)
            streams = hub_streams(base_url, args.text_key, args.num_shards, last, out / "download")
            n_chars = None  # unknown until everything is downloaded
        else:
            streams, n_chars = local_streams(files, args.text_key, args.shard_tokens, settings["source"])

        # the tokenizer
        if (out / "tokenizer.json").exists():
            enc = load_tokenizer(out)
        else:
            enc = make_tokenizer(args, vocab_size, streams)
        sizes = token_bytes(enc)
        write_json(out / "settings.json", settings)
        if args.tokenizer_folder is not None:
            copy_tokenizer(args.tokenizer_folder, out)
        else:
            save_tokenizer(out, enc)
        write_atomic(out / "token_bytes.npy", lambda f: np.save(f, sizes))

        # streams to shards
        with tqdm(total=n_chars, unit="char", unit_scale=True, desc="tokenizing", disable=None) as bar:
            for stream in streams:
                write_shards(out, stream, enc, bar)

        # without settings.json, nothing goes on with shards of which nobody knows what they hold
        if not downloaded and fingerprint(files) != settings["source_sha256"]:
            (out / "settings.json").unlink()
            raise UserError(f"{settings['source']} changed while it was read: delete {out} and re-run")

        # meta.json comes last: with it, the data is finished
        write_json(out / "meta.json", describe_data(out, settings["source"], enc))
        summary(open_data(out, verify=False), "done")

if __name__ == "__main__":
    run_main(main)
