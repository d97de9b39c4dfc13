"""
Turn text into token shards that train.py can memory-map.

    python prepare_data.py                                     the Python standard library's source, no network
    python prepare_data.py fineweb-edu --num-shards 8          downloads parquet shards of FineWeb-Edu
    python prepare_data.py corpus.txt more.jsonl.gz folder     your own .txt, .jsonl, .jsonl.gz, .parquet

What ends up in --out (default `data`):

    tokenizer.tiktoken, tokenizer.json    the tokenizer as plain data (see load_tokenizer)
    token_bytes.npy                       int32 (vocab,): bytes of text behind each token, 0 for special tokens
    train_00000.npy .., val_00000.npy ..  flat token ids, every document starts with <|bos|>
    settings.json                         what was asked for, so that a re-run can continue
    meta.json                             what is there, with checksums; written last: no meta.json, not finished

Re-running the same command continues after the shards that are finished.
The other scripts import open_data, load_tokenizer, write_atomic, ArgumentParser and run_main from here.
"""
import argparse
import base64
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

BOS = "<|bos|>"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
VOCAB_LARGE, VOCAB_SMALL = 32768, 4096
SMALL_SOURCE = 100_000_000        # bytes of source files below which VOCAB_SMALL is the default
TOKENIZER_CHARS = 1_000_000_000   # the tokenizer is trained on at most this much text
VAL_EVERY = 20                    # every 20th document is for validation
SEGMENT = 50_000                  # characters handed to tiktoken at once, see segments()
FINEWEB_LAST = 1822               # shard_01822.parquet is the validation shard
RETRIES, RETRY_SECONDS = 6, 1.0   # download attempts in a row without progress; first pause, doubled each time

# -----------------------------------------------------------------------------
# shared by all scripts: errors, the command line, files that are whole or absent

class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do."""

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" tells nobody anything
        return action.help if action.default is None else super()._get_help_string(action)

class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in --help, and errors of one line (exit code 2)."""
    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": HelpFormatter, **kwargs})

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())} (see --help)\n")

def at_least(args, **least):
    """UserError for a flag whose number is below its least value, infinite, nan or huge; None, not given, passes."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < (2**63 if isinstance(value, int) else float("inf")):
            raise UserError(f"--{name.replace('_', '-')} must be a number of at least {low}, not {value}")

def run_main(main):
    """Call main(). A UserError becomes `error: <message>` on stderr and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text that the terminal cannot show is no reason to end
            stream.reconfigure(errors="replace")
    try:
        main()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

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
        cause = e.__context__ if isinstance(e, RuntimeError) else e  # torch.save ends in an error of its own
        if isinstance(cause, OSError):
            raise UserError(f"cannot write {path}: {cause.strerror or cause}") from e
        raise

def lock(folder, what):
    """Create the folder and hold it while the returned file is open: a second process that wants it gets a UserError."""
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

def check_folder(path):
    """UserError if the folder that the file `path` is to be written to does not exist; None passes."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {Path(path).parent}")

def write_json(path, value):
    write_atomic(path, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))

def sha256_file(*paths):
    """Hex sha256 of the files' bytes, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()

# -----------------------------------------------------------------------------
# the tokenizer

def train_tokenizer(docs, vocab_size):
    """
    Byte-level BPE over the first TOKENIZER_CHARS characters of docs (an iterable of str), with <|bos|> as the
    last id. Returns a tiktoken.Encoding of vocab_size tokens, or fewer where the text has nothing left to merge.
    """
    import rustbpe
    def pieces():
        chars = 0
        for piece in (p for doc in docs for p in segments(doc)):
            yield piece
            chars += len(piece)
            if chars >= TOKENIZER_CHARS:
                return
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(pieces(), vocab_size - 1)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tiktoken.Encoding("bpe", pat_str=bpe.get_pattern(), mergeable_ranks=ranks, special_tokens={BOS: len(ranks)})

def named_tokenizer(name):
    """tiktoken's encoding `name` (gpt2, cl100k_base, ..) with <|bos|> added as its last id."""
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"no tokenizer {name!r}: choose bpe or one of {', '.join(tiktoken.list_encoding_names())}")
    try:
        enc = tiktoken.get_encoding(name)
    except (OSError, ValueError) as e:  # requests' exceptions are OSErrors; ValueError is a wrong checksum
        raise UserError(f"tiktoken could not fetch {name} ({e}): it needs the network once, or TIKTOKEN_CACHE_DIR") from e
    # tiktoken's README extends encodings through these underscore names: there are no others
    return tiktoken.Encoding(name, pat_str=enc._pat_str, mergeable_ranks=enc._mergeable_ranks,
                             special_tokens={**enc._special_tokens, BOS: enc.n_vocab})

def save_tokenizer(folder, enc):
    """Write enc as tokenizer.tiktoken (lines of base64 token, space, rank) and tokenizer.json (the rest)."""
    ranks = sorted(enc._mergeable_ranks.items(), key=lambda item: item[1])
    text = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    write_atomic(Path(folder) / "tokenizer.tiktoken", lambda f: f.write(text))
    write_json(Path(folder) / "tokenizer.json", {"name": enc.name, "pattern": enc._pat_str,
               "special_tokens": enc._special_tokens, "mergeable_ranks": len(ranks), "vocab_size": enc.n_vocab})

def load_tokenizer(folder):
    """
    The tiktoken.Encoding saved in folder; enc.encode_single_token("<|bos|>") is its last id. Text from outside
    goes through enc.encode_ordinary. UserError where the two files are missing or damaged.
    """
    folder = Path(folder)
    try:
        lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
        spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        ranks = {}
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        specials = spec["special_tokens"]
        ids, top = sorted([*ranks.values(), *specials.values()]), max(ranks.values())
        whole = (len(ranks) == len(lines) == spec["mergeable_ranks"] and len(set(ids)) == len(ids)
                 # special tokens may leave holes among themselves (cl100k_base does), the merges may not
                 and ids[0] == 0 and top < len(ids) and ids[top] == top
                 and all(bytes([b]) in ranks for b in range(256))
                 and specials[BOS] == ids[-1] == spec["vocab_size"] - 1)
        if not whole:
            raise ValueError("tokens are missing or appear twice")
        return tiktoken.Encoding(spec["name"], pat_str=spec["pattern"], mergeable_ranks=ranks, special_tokens=specials)
    except FileNotFoundError as e:
        raise UserError(f"no tokenizer in {folder}: run `python prepare_data.py --out {folder}` first") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"the tokenizer files in {folder} are damaged ({e}): re-run prepare_data.py") from e

def tokenizer_sha256(folder):
    """Hex sha256 over the two tokenizer files; OSError where one cannot be read."""
    return sha256_file(Path(folder) / "tokenizer.tiktoken", Path(folder) / "tokenizer.json")

def token_bytes(enc):
    """int32 (vocab,): how many bytes of UTF-8 text each token stands for, 0 for special tokens and unused ids."""
    sizes = np.zeros(enc.n_vocab, np.int32)
    for token in enc.token_byte_values():
        sizes[enc.encode_single_token(token)] = len(token)
    return sizes

# -----------------------------------------------------------------------------
# reading documents

def stdlib_files():
    """The Python standard library's .py files on this machine, installed packages excluded, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    return sorted(p for p in root.rglob("*.py") if not installed & set(p.relative_to(root).parts))

def find_files(sources):
    """The files behind `stdlib` and local paths, in the order given, folders sorted. UserError for unusable paths."""
    files = []
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            files += stdlib_files()
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not found:
                raise UserError(f"{path} has no text: expected files ending in {', '.join(SUFFIXES)}")
            files += found
        elif not path.is_file():
            raise UserError(f"no file or folder {path}: name one, or use stdlib or fineweb-edu")
        elif not path.name.endswith(SUFFIXES):
            raise UserError(f"cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}")
        elif path.stat().st_size == 0:
            raise UserError(f"{path} is empty: remove it from the command")
        else:
            files.append(path)
    return files

def read_txt(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it first") from e
    if "\0" in text:
        raise UserError(f"{path} is not text (NUL at character {text.index(chr(0))}): is it a binary file?")
    yield text

def read_jsonl(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                text = row["text"] if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise KeyError
                text.encode()  # JSON can spell half a surrogate pair, UTF-8 cannot
            except KeyError as e:
                raise UserError(f'{path} line {number}: no "text" string; expected {{"text": "..."}} on each line') from e
            except UnicodeError as e:
                raise UserError(f"{path} line {number}: not UTF-8 text ({e.reason} at {e.start}): fix or remove it") from e
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} line {number}: not valid JSON ({e}): fix or remove it") from e
            yield text

def open_parquet(path):
    """pyarrow's ParquetFile at path; UserError where it does not open or has no column `text`."""
    import pyarrow.parquet
    try:
        parquet = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path} does not open as parquet ({e}): delete it, then get it again") from e
    if "text" not in parquet.schema_arrow.names:
        raise UserError(f"{path} has no column `text`, only {', '.join(parquet.schema_arrow.names)}")
    return parquet

def read_parquet(path):
    import pyarrow
    try:
        for batch in open_parquet(path).iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise UserError(f"{path}: column `text` does not hold strings")
                yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it, then get it again") from e

def read_documents(path):
    """Yield the documents (str) of one file; blank ones are skipped. UserError names the file and the place."""
    if path.suffix == ".py":
        with contextlib.suppress(UserError):  # the standard library has a few undecodable files, as its own tests
            yield from (text for text in read_txt(path) if text.strip())
        return
    read = {".txt": read_txt, ".parquet": read_parquet}.get(path.suffix, read_jsonl)
    try:
        for text in read(path):
            if text and not text.isspace():
                yield text
    except (OSError, EOFError, zlib.error) as e:  # gzip's and some of pyarrow's errors
        raise UserError(f"cannot read {path} ({e}): is it damaged?") from e

def cut_tail(docs):
    """Split a list of few documents: (train, val), val being the last 5 % of the characters, cut at a space."""
    train, val = list(docs), []
    want = max(1, sum(map(len, docs)) // VAL_EVERY)
    while train and want > 0:
        doc = train.pop()
        cut = max(0, len(doc) - want)
        if cut > 0:
            space = doc.rfind(" ", max(1, cut - 1000), cut)
            cut = space if space > 0 else cut
            train.append(doc[:cut])
        val.insert(0, doc[cut:])
        want -= len(doc) - cut
    if not train:
        raise UserError("the corpus is too small to give a training and a validation shard: add text")
    return train, val

def split_documents(files, count, split):
    """Yield the documents of split ("train" or "val") out of the `count` documents in files, in order."""
    docs = (doc for path in files for doc in read_documents(path))
    if count < VAL_EVERY:
        yield from cut_tail(list(docs))[split == "val"]
    else:
        yield from (doc for i, doc in enumerate(docs) if (i % VAL_EVERY == VAL_EVERY - 1) == (split == "val"))

# -----------------------------------------------------------------------------
# documents to token shards

def segments(text, size=SEGMENT):
    """
    Cut text into pieces of at most `size` characters, because tiktoken's regex overflows its stack on very long
    runs of spaces and one document may be 100 MB. Cutting before a space that follows a non-space cannot change
    the tokens: no pattern of tiktoken or rustbpe matches across that place. Text without one is cut anywhere.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        low = end - min(1000, size // 2)
        cut = text.rfind(" ", low, end)
        while cut > 0 and text[cut - 1].isspace():
            cut = text.rfind(" ", low, cut)
        cut = cut if cut > 0 else end
        yield text[start:cut]
        start = cut
    yield text[start:]

def shard_dtype(enc):
    return np.dtype("uint16" if enc.n_vocab <= 65536 else "uint32")

def tokenize(enc, docs):
    """Yield (first, chars, ids) for every segment of every document: ids is an array, BOS first where `first`."""
    bos, dtype = enc.encode_single_token(BOS), shard_dtype(enc)
    pieces = ((i == 0, piece) for doc in docs for i, piece in enumerate(segments(doc)))
    while batch := list(itertools.islice(pieces, 512)):
        # encode_ordinary: a document that spells <|bos|> is ordinary text
        batch_ids = enc.encode_ordinary_batch([piece for _, piece in batch], num_threads=os.cpu_count())
        for (first, piece), ids in zip(batch, batch_ids):
            yield first, len(piece), np.array([bos] * first + ids, dtype)

def load_shard(path):
    """The read-only memory map of one shard; UserError where it is missing, truncated or not a token shard."""
    try:
        shard = np.load(path, mmap_mode="r")
        whole = shard.ndim == 1 and len(shard) and path.stat().st_size == shard.offset + shard.nbytes
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: re-run prepare_data.py") from e
    except (OSError, ValueError, EOFError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}): delete it and re-run prepare_data.py") from e
    if not whole:
        raise UserError(f"{path} is damaged (wrong size): delete it and re-run prepare_data.py")
    return shard

def write_shards(out, split, index, docs, enc, limit, bar):
    """
    Tokenize docs() into out/<split>_<index>.npy and on, each closed at the first document end past `limit`
    tokens (None: a single shard). Shards that are already there are kept and their documents skipped.
    """
    def path():
        return out / f"{split}_{index:05d}.npy"
    skip = 0
    while path().exists():
        try:
            skip += np.count_nonzero(load_shard(path()) == enc.encode_single_token(BOS))
        except UserError:
            break  # damaged: written again
        if limit is None:
            return
        index += 1
    buffer, size = [], 0
    for first, chars, ids in tokenize(enc, itertools.islice(docs(), skip, None)):
        if first and limit is not None and size >= limit:
            write_atomic(path(), lambda f: np.save(f, np.concatenate(buffer)))
            buffer, size, index = [], 0, index + 1
        buffer.append(ids)
        size += len(ids)
        bar.update(chars)
    if buffer:
        write_atomic(path(), lambda f: np.save(f, np.concatenate(buffer)))

def describe_shard(path, sizes, bos):
    """meta.json's entry for one shard: counted from the file, so that it is the same however often we resumed."""
    shard, counts = load_shard(path), np.zeros(len(sizes), np.int64)
    for start in range(0, len(shard), 1 << 24):
        counts += np.bincount(shard[start:start + (1 << 24)], minlength=len(sizes))
    return {"file": path.name, "tokens": len(shard), "documents": int(counts[bos]), "bytes": int(counts @ sizes),
            "sha256": sha256_file(path)}

# -----------------------------------------------------------------------------
# FineWeb-Edu

def fetch(url, part, hint):
    """One attempt to append what is missing to the file part; requests.RequestException means: worth another try."""
    import requests
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # sizes must be those of the file
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        code, total = reply.status_code, None
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", reply.headers.get("Content-Range", ""))
        if code == 429 or code >= 500:
            raise requests.HTTPError(f"HTTP {code}", response=reply)
        if code not in (200, 206, 416):
            raise UserError(f"{url}: HTTP {code} {reply.reason}: {hint}")
        if code == 200:  # from the start, asked for or not
            have, total = 0, reply.headers.get("Content-Length")
        elif span and (code == 416 or span[1] == str(have)):
            total = span[2]
        else:
            part.unlink(missing_ok=True)
            raise requests.RequestException(f"HTTP {code} with Content-Range {reply.headers.get('Content-Range')}")
        with open(part, "ab" if have else "wb") as f, tqdm(total=total and int(total), initial=have, unit="B",
                  unit_scale=True, desc=url.rpartition("/")[2], leave=False, disable=None) as bar:
            for chunk in reply.iter_content(1 << 16) if code != 416 else ():  # a drop loses the chunk it falls in
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
        # Hugging Face names the file's sha256 in the redirect to its storage
        tags = [r.headers.get("X-Linked-Etag", "").strip('"') for r in (*reply.history, reply)]
    size = part.stat().st_size
    wrong = next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag) and sha256_file(part) != tag), None)
    if total is not None and size < int(total):
        raise requests.RequestException(f"the connection ended at {size} of {total} bytes")
    if total is not None and size > int(total) or wrong:
        part.unlink()
        raise requests.RequestException("the bytes received do not match the announced size or checksum")

def download(url, path, check, what, hint):
    """
    Fetch the file at url to path, unless it is there. Dropped connections, 429 and 5xx are tried again, continuing by
    HTTP Range; UserError, with the hint, after RETRIES attempts without progress, and at once for a 404 or where
    check(file) raises one because it is not `what`.
    """
    import requests
    if path.exists():
        return path
    part, best, failures = path.with_name(path.name + ".part"), 0, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                fetch(url, part, hint)
                break
            except requests.RequestException as e:
                size = part.stat().st_size if part.exists() else 0
                best, failures = max(best, size), 0 if size > best else failures + 1
                if failures >= RETRIES or isinstance(e, ValueError):  # ValueError: a malformed URL
                    raise UserError(f"cannot download {url} ({e}): {hint}, or re-run the same command to continue") from e
                after = e.response.headers.get("Retry-After", "") if e.response is not None else ""
                pause = min(60, int(after) if after.isdecimal() else RETRY_SECONDS * 2 ** failures)
                print(f"{path.name}: {e}; trying again in {pause:.0f} s", flush=True)
                time.sleep(pause)
        try:
            check(part)
        except UserError as e:
            part.unlink()
            raise UserError(f"what {url} served is not {what}: {hint}") from e
        publish(part, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    return path

# -----------------------------------------------------------------------------
# what the other scripts read

@dataclass
class Data:
    folder: Path
    meta: dict                    # meta.json
    tokenizer: tiktoken.Encoding
    token_bytes: np.ndarray       # int32 (vocab,)
    train: list                   # read-only memory maps of token ids, uint16 or uint32
    val: list

def open_data(folder, verify=True):
    """
    The prepared data in folder as a Data. verify reads every shard once to compare checksums.
    UserError where anything is missing, damaged or does not belong together.
    """
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        state = "unfinished data" if (folder / "settings.json").is_file() else "no prepared data"
        raise UserError(f"{state} in {folder}: run `python prepare_data.py --out {folder}` first")
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        shards = [(split, folder / entry["file"], entry["tokens"], entry["sha256"])
                  for split in ("train", "val") for entry in meta[split]]
        dtype, vocab_size, bos = np.dtype(meta["dtype"]), meta["vocab_size"], meta["bos_id"]
        digest = meta["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{folder / 'meta.json'} is damaged ({e!r}): delete it and re-run prepare_data.py") from e
    enc = load_tokenizer(folder)
    sizes = token_bytes(enc)
    if tokenizer_sha256(folder) != digest or (enc.n_vocab, enc.encode_single_token(BOS)) != (vocab_size, bos):
        raise UserError(f"the tokenizer in {folder} is not the one of its shards: delete {folder} and re-run prepare_data.py")
    if not np.array_equal(load_shard(folder / "token_bytes.npy"), sizes):
        raise UserError(f"{folder / 'token_bytes.npy'} does not match the tokenizer: delete it and re-run prepare_data.py")
    data = Data(folder, meta, enc, sizes, [], [])
    for split, path, tokens, _ in shards:
        shard = load_shard(path)
        if shard.dtype != dtype or len(shard) != tokens:
            raise UserError(f"{path} is damaged ({len(shard)} {shard.dtype} tokens, meta.json says {tokens} {dtype}): "
                            "delete it and re-run prepare_data.py")
        (data.train if split == "train" else data.val).append(shard)
    if verify:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            def digest_of(shard):
                try:
                    return sha256_file(shard[1])
                except OSError as e:
                    raise UserError(f"cannot read {shard[1]} ({e.strerror}): is the disk failing?") from e
            for (_, path, _, expected), found in zip(shards, pool.map(digest_of, shards)):
                if found != expected:
                    raise UserError(f"{path} is damaged (sha256 differs from meta.json): delete it and re-run prepare_data.py")
    return data

# -----------------------------------------------------------------------------
# the command

def check_settings(out, settings):
    """UserError where out holds data of other settings, or data that nobody can tell the settings of."""
    path = out / "settings.json"
    if not path.exists():
        names = [p.name for p in out.iterdir() if re.fullmatch(r"meta\.json|tokenizer\..*|(train|val)_\d+\.npy", p.name)]
        if names:
            raise UserError(f"{out} holds {sorted(names)[0]} but no settings.json: choose another --out or empty it")
        return
    try:
        there = json.loads(path.read_text("utf-8"))
        differ = [f"{key} {there.get(key)} there, {settings.get(key)} now" for key in sorted({*there, *settings})
                  if there.get(key) != settings.get(key)]
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}): delete {out} and re-run prepare_data.py") from e
    if differ:
        raise UserError(f"{out} holds other data ({'; '.join(differ)}): choose another --out or delete {out}")

def discard_damaged(out):
    """Before repairing a finished folder: drop every file that differs from meta.json, and meta.json itself."""
    try:
        meta = json.loads((out / "meta.json").read_text("utf-8"))
        keep = {entry["file"]: entry["sha256"] for split in ("train", "val") for entry in meta[split]}
        digest = meta["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        keep, digest = None, None  # no record to compare with
    try:
        load_tokenizer(out)
        usable = digest in (None, tokenizer_sha256(out))
    except UserError:
        usable = False
    for path in out.glob("*_[0-9]*.npy"):
        if not usable or keep is not None and keep.get(path.name) != sha256_file(path):
            path.unlink()
    for name in ["meta.json"] + ([] if usable else ["tokenizer.tiktoken", "tokenizer.json"]):
        (out / name).unlink(missing_ok=True)

def parse_args():
    parser = ArgumentParser(description="Turn text into tokens for train.py.")
    parser.add_argument("source", nargs="*", default=["stdlib"], help="stdlib, fineweb-edu, or files and folders: " + " ".join(SUFFIXES))
    parser.add_argument("--out", default="data", help="folder to write")
    parser.add_argument("--tokenizer", default="bpe", help="bpe: train one on this text; or a tiktoken encoding such as gpt2")
    parser.add_argument("--vocab-size", type=int, help=f"tokens of the trained tokenizer, {BOS} included (default: {VOCAB_LARGE}, "
                        f"or {VOCAB_SMALL} where the files are under {SMALL_SOURCE // 10**6} MB)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens a shard; fineweb-edu: one shard a parquet file")
    parser.add_argument("--num-shards", type=int, help="fineweb-edu: training files to download, about 55 M tokens each (default: 8)")
    parser.add_argument("--base-url", default="https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main",
                        help="fineweb-edu: where shard_00000.parquet and the others are")
    args = parser.parse_args()
    if args.vocab_size is not None and args.tokenizer != "bpe":
        raise UserError(f"--vocab-size is for a trained tokenizer, {args.tokenizer} has its own: leave one of the two out")
    if args.vocab_size is not None and args.vocab_size <= 257:
        raise UserError(f"--vocab-size {args.vocab_size} is too small: 256 bytes and {BOS} take 257, use 258 or more")
    at_least(args, shard_tokens=1)
    if "fineweb-edu" in args.source and len(args.source) > 1:
        raise UserError("fineweb-edu cannot be mixed with other sources: prepare it into its own --out")
    if "fineweb-edu" not in args.source and args.num_shards is not None:
        raise UserError("--num-shards is for fineweb-edu only: leave it out")
    args.num_shards = 8 if args.num_shards is None else args.num_shards
    if not 1 <= args.num_shards <= FINEWEB_LAST:
        raise UserError(f"--num-shards must be from 1 to {FINEWEB_LAST}")
    return args

def main():
    args = parse_args()
    out = Path(args.out)
    fineweb = args.source == ["fineweb-edu"]
    files = [] if fineweb else find_files(args.source)
    small = not fineweb and sum(path.stat().st_size for path in files) < SMALL_SOURCE
    vocab_size = args.vocab_size or (VOCAB_SMALL if small else VOCAB_LARGE)

    # settings.json decides whether a re-run means the same data
    settings = {"source": " ".join(args.source), "tokenizer": args.tokenizer}
    if args.tokenizer == "bpe":
        settings["vocab_size"] = vocab_size
    if fineweb:  # not --num-shards: more can be added later
        settings |= {"base_url": args.base_url}
    else:
        try:
            settings |= {"shard_tokens": args.shard_tokens, "source_sha256": sha256_file(*files)}
        except OSError as e:
            raise UserError(f"cannot read {e.filename}: {e.strerror}") from e

    with lock(out, "prepare_data.py"):
        check_settings(out, settings)
        try:
            data = open_data(out, verify=False)
            if not fineweb or len(data.train) >= args.num_shards:
                summary(data, "already complete")
                return
        except UserError:
            pass  # unfinished or damaged
        discard_damaged(out)

        # streams: (split, index of its first shard, function giving its documents, tokens a shard)
        if fineweb:
            def stream(number):
                name = f"shard_{number:05d}.parquet"
                yield from read_documents(download(f"{args.base_url}/{name}", out / "download" / name, open_parquet,
                                                   "a parquet file with a column `text`", "check --base-url and --num-shards"))
            streams = [("val", 0, partial(stream, FINEWEB_LAST), None)]
            streams += [("train", i, partial(stream, i), None) for i in range(args.num_shards)]
            total = None
        else:
            # one look at everything before anything is written: bad input is found here
            lengths = [len(doc) for path in tqdm(files, "reading", disable=None) for doc in read_documents(path)]
            if not lengths:
                raise UserError(f"no text in {settings['source']}: every document is blank")
            streams = [(split, 0, partial(split_documents, files, len(lengths), split), args.shard_tokens)
                       for split in ("train", "val")]
            total = sum(lengths)
            next(streams[0][2]())  # raises where there is too little to split

        if (out / "tokenizer.json").exists():
            enc = load_tokenizer(out)
        elif args.tokenizer != "bpe":
            enc = named_tokenizer(args.tokenizer)
        else:
            print(f"training a tokenizer of {vocab_size} tokens" + ("" if args.vocab_size else " (the default; see --vocab-size)"))
            enc = train_tokenizer((doc for split, _, docs, _ in streams if split == "train" for doc in docs()), vocab_size)
            if enc.n_vocab < 258 or args.vocab_size and enc.n_vocab < vocab_size:
                raise UserError(f"this text gives a vocabulary of only {enc.n_vocab} tokens: add text or lower --vocab-size")
            if enc.n_vocab < vocab_size:
                print(f"the text gives only {enc.n_vocab} tokens: the vocabulary is {enc.n_vocab}, not {vocab_size}")

        sizes, bos = token_bytes(enc), enc.encode_single_token(BOS)
        write_json(out / "settings.json", settings)
        save_tokenizer(out, enc)
        write_atomic(out / "token_bytes.npy", lambda f: np.save(f, sizes))
        with tqdm(total=total, unit="char", unit_scale=True, desc="tokenizing", disable=None) as bar:
            for split, index, docs, limit in streams:
                write_shards(out, split, index, docs, enc, limit, bar)

        meta = {"source": settings["source"], "tokenizer": enc.name, "vocab_size": enc.n_vocab, "bos_id": bos,
                "dtype": str(shard_dtype(enc)), "tokenizer_sha256": tokenizer_sha256(out)}
        for split in ("train", "val"):
            meta[split] = [describe_shard(path, sizes, bos) for path in sorted(out.glob(f"{split}_?????.npy"))]
            if not meta[split]:
                raise UserError(f"{settings['source']} gives no text for {split}")
        meta["totals"] = {key: sum(e[key] for e in meta["train"] + meta["val"]) for key in ("documents", "tokens", "bytes")}
        write_json(out / "meta.json", meta)
        summary(open_data(out, verify=False), "done")

def summary(data, state):
    documents, tokens, size = (data.meta["totals"][key] for key in ("documents", "tokens", "bytes"))
    print(f"{data.folder}: {state}. {documents:,} documents, {tokens:,} tokens ({sum(map(len, data.val)):,} for validation), "
          f"vocabulary {data.meta['vocab_size']:,}, {size / (tokens - documents):.2f} bytes per token")
    print(f"next: python train.py --data {data.folder}")

if __name__ == "__main__":
    run_main(main)
