"""
CORE, the mean over 22 tasks of DCLM (arXiv 2406.11794), scored with the memory that the model really has:
prompts go through exact parallel prefill, and the choices of an example continue from the memory that their
shared beginning left. The command is `eval_core.py --eval core`.

Every prompt starts with BOS. There are three kinds of tasks:

    multiple choice     the choices follow a shared beginning; the one with the lowest mean loss is the answer
    schema              the choices come before a shared end, whose mean loss decides in the same way
    language modeling   the answer is right if every token of the continuation is the argmax

Prompts longer than the context keep their last tokens. The centered accuracy of a task is
(accuracy - baseline) / (1 - baseline), where the baseline is the accuracy of guessing. CORE is the mean of
the 22 centered accuracies.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import random
import reprlib
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import (
    NO_FILE,
    UserError,
    check_folder,
    check_regular,
    from_rank_0,
    is_text,
    is_whole,
    lock,
    open_source,
    raise_if_unreadable,
    rank_and_world_size,
    read_json_lines,
    refusal,
    sha256_file,
    unlink,
    write_atomic,
    write_json,
)
from dataset import BOS, encode_text
from interleave import prefill
from prepare_data import download
from sample import new_cache

# -----------------------------------------------------------------------------
# The bundle

# the 22 tasks whose mean is the score; a bundle may have fewer, and then there is no CORE
CORE = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande",
    "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators",
    "bigbench_repeat_copy_logic", "squad", "coqa", "boolq", "bigbench_language_identification",
)
BUNDLE = Path("data_core/eval_bundle")
BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_RETRIES = 3  # at the start of a command, for which somebody waits: without a network, some seconds
MAX_SHOTS = 1000  # of a task: more is a mistake
BUNDLE_BYTES = 2**30  # an archive that claims to unpack to more is not the bundle

# the kinds of tasks, and what their examples have: two texts for language modeling; otherwise a text, a list
# of texts, and the number of the right one under the key `gold`
KINDS = {
    "multiple_choice": ("query", "choices"),
    "schema": ("continuation", "context_options"),
    "language_modeling": ("context", "continuation"),
}

@dataclass
class Task:
    name: str
    kind: str  # a key of KINDS
    shots: int  # few-shot examples in front of each prompt
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing
    sha256: str  # of everything that decides the result beside the model
    examples: list  # dicts with the keys that KINDS names, in the established order

def check_members(archive, z, folder):
    """Raise UserError unless the open archive z would put nothing but plain files into the folder."""
    if sum(info.file_size for info in z.infolist()) > BUNDLE_BYTES:
        megabytes = BUNDLE_BYTES >> 20
        raise UserError(f"{archive} unpacks to more than {megabytes} MB: it is not the CORE bundle")
    for info in z.infolist():
        is_link = stat.S_ISLNK(info.external_attr >> 16)
        is_inside = (folder / info.filename).resolve().is_relative_to(folder.resolve())
        if is_link or not is_inside or "\\" in info.filename:
            raise UserError(f"{archive} wants to write {info.filename!r}, outside its folder: "
                            "nothing was unpacked")

def unpack(archive, folder):
    """
    Unpack a zip archive of the bundle into the new folder, all of it or nothing. Raises UserError for
    anything but plain files inside it.
    """
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    unlink(tmp)
    try:
        with zipfile.ZipFile(archive) as z:
            check_members(archive, z, tmp)
            for info in z.infolist():
                if info.is_dir():
                    continue
                target = tmp / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with z.open(info) as source, open(target, "wb") as f:  # compares the checksum at the end
                    shutil.copyfileobj(source, f)
        inside = tmp / "eval_bundle" if (tmp / "eval_bundle").is_dir() else tmp
        if not (inside / "core.yaml").is_file():
            raise UserError(f"{archive} has no core.yaml: it is not the CORE bundle")
        os.replace(inside, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as e:
        raise UserError(f"cannot unpack {archive} ({e}): run the same command again, or get the bundle "
                        "elsewhere and name its folder (--bundle or --core-bundle)") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)

def fetch_bundle(folder=BUNDLE, url=BUNDLE_URL):
    """
    Download and unpack the bundle, unless the folder is there. A download that was cut short is continued.
    Raises UserError.
    """
    if folder.is_dir():
        return
    if os.path.lexists(folder):
        raise UserError(f"{folder} is no folder: remove it, or name another one (--bundle or --core-bundle)")

    def check(path):
        with open_source(path) as f:
            if not zipfile.is_zipfile(f):
                raise UserError("it is not a zip archive")

    with lock(folder.parent, "download of the CORE bundle"):
        archive = download(url, folder.parent / "eval_bundle.zip", check, "a zip archive",
                           "get the bundle elsewhere and name its folder (--bundle or --core-bundle)",
                           BUNDLE_RETRIES)
        try:
            unpack(archive, folder)
        except UserError as e:
            # the archive cannot help it if the disk is full, but it can if names in it cannot be
            cannot_be = getattr(e.__cause__, "errno", None) in (*NO_FILE, errno.EEXIST)
            if cannot_be or refusal(e.__cause__) is None:
                archive.unlink(missing_ok=True)
            raise
        archive.unlink()

def check_example(example, kind):
    """
    Raise KeyError or TypeError unless this value, read from JSON, is an example of this kind of task. It has
    two choices or more: a single one is always right.
    """
    texts = [example[key] for key in KINDS[kind]]
    if kind != "language_modeling":
        options = texts.pop()
        if not isinstance(options, list) or len(options) < 2:
            raise TypeError
        if not is_whole(example["gold"], 0, len(options) - 1):
            raise TypeError
        texts += options
    if not all(map(is_text, texts)):
        raise TypeError

def read_examples(path, kind, shots):
    """
    The examples of a .jsonl file, shuffled into the established order. Raises UserError with the line of a
    bad one.
    """
    examples = []
    for place, example in read_json_lines(path):
        try:
            check_example(example, kind)
        except (KeyError, TypeError) as e:
            keys = " and ".join(KINDS[kind])
            has = f"{place}: a {kind} example has {keys}"
            if kind == "language_modeling":
                raise UserError(f"{has} as text") from e
            raise UserError(f"{has} as texts, two or more to choose from, and gold, the number of the right "
                            "one") from e
        examples.append(example)
    if len(examples) <= shots:
        raise UserError(f"{path} has {len(examples)} examples: "
                        f"{shots}-shot prompts need at least {shots + 1}")
    random.Random(1337).shuffle(examples)
    return examples

def read_baselines(path):
    """
    The accuracies of guessing, a dict from the name of a task to a float, of eval_meta_data.csv. Raises
    ValueError, KeyError, TypeError and csv.Error for what is none.
    """
    baselines = {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        for row in csv.DictReader(f):
            name = row["Eval Task"]
            baseline = float(row["Random baseline"]) / 100
            if baselines.setdefault(name, baseline) != baseline:
                raise ValueError(f"{path.name} has two baselines of {name}")
    return baselines

SHORT = reprlib.Repr()  # for messages: a few lines of YAML can be a value of a billion words
SHORT.maxlevel = 2

def check_entry(entry, baselines):
    """Raise an exception unless an entry of core.yaml has the types and values of a task."""
    name, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
    delimiter = entry.get("continuation_delimiter", " ")
    if not is_text(name) or not name.isprintable() or not name.strip():
        raise ValueError(f"the label {SHORT.repr(name)} is no text of one line")
    if not is_text(delimiter):
        raise ValueError(f"{name} has the delimiter {SHORT.repr(delimiter)}, which is no text")
    if not isinstance(shots, list) or len(shots) != 1 or not is_whole(shots[0], 0, MAX_SHOTS):
        raise ValueError(f"{name} has num_fewshot {SHORT.repr(shots)}")
    if not is_text(kind) or kind not in KINDS:
        raise ValueError(f"{name} is a {SHORT.repr(kind)}, which is none of {', '.join(KINDS)}")
    if not is_text(entry["dataset_uri"]):
        raise ValueError(f"{name} has the dataset_uri {SHORT.repr(entry['dataset_uri'])}")
    if name not in baselines:
        raise ValueError(f"eval_meta_data.csv has no {name}")
    if not 0 <= baselines[name] < 1:
        raise ValueError(f"{name} has a random baseline of {100 * baselines[name]} percent")

def load_tasks(bundle=None, names=None):
    """
    The Tasks that the folder `bundle` has the data of, or those of these names. bundle None: the one that was
    downloaded; if there is none, rank 0 downloads it now. Raises UserError if the bundle is damaged or has no
    data for one of the names.
    """
    if bundle is None:
        rank, _ = rank_and_world_size()
        if rank == 0:
            fetch_bundle()
        if dist.is_initialized():
            dist.barrier()
        bundle = BUNDLE
    bundle = Path(bundle)
    data = bundle / "eval_data"
    tasks, available, listed_names = [], [], set()
    check_regular(bundle / "core.yaml", bundle / "eval_meta_data.csv")
    try:
        listed = yaml.safe_load((bundle / "core.yaml").read_text("utf-8"))["icl_tasks"]
        baselines = read_baselines(bundle / "eval_meta_data.csv")
        for entry in listed:
            check_entry(entry, baselines)
            path = data / entry["dataset_uri"]
            if ".." in path.relative_to(data).parts:
                raise ValueError(f"{entry['dataset_uri']} is outside the bundle")
            name = entry["label"]
            kind = entry["icl_task_type"]
            shots, = entry["num_fewshot"]
            delimiter = entry.get("continuation_delimiter", " ")
            if name in listed_names:
                raise ValueError(f"{name} is listed twice")
            listed_names.add(name)
            if not os.path.lexists(path):
                continue
            check_regular(path)
            available.append(name)
            if names is None or name in names:
                settings = repr((kind, shots, delimiter))
                sha256 = hashlib.sha256((sha256_file(path) + settings).encode()).hexdigest()
                examples = read_examples(path, kind, shots)
                tasks.append(Task(name, kind, shots, delimiter, baselines[name], sha256, examples))
    except FileNotFoundError as e:
        raise UserError(f"no CORE bundle in {bundle}: {e.filename} is missing") from e
    except (OSError, yaml.YAMLError, csv.Error, ValueError, LookupError, TypeError, AttributeError,
            RecursionError) as e:
        raise_if_unreadable(getattr(e, "filename", None) or bundle, e)
        what = f"no {e}" if isinstance(e, KeyError) else e
        raise UserError(f"the CORE bundle in {bundle} is damaged ({what}): "
                        "remove it and get it again, or name another one") from e
    unknown = [name for name in names or () if name not in available]
    if unknown or not tasks:
        wanted = ", ".join(unknown) or "any task"
        there = ", ".join(available) or "none"
        raise UserError(f"{bundle} has no data for {wanted}; it has {there}")
    return tasks


# -----------------------------------------------------------------------------
# From examples to tokens

def render(task, i):
    """
    The prompts of example i, byte for byte those of the established evaluator: one a choice; for language
    modeling one without the continuation and one with it. The few-shot examples are drawn from all others,
    seeded by i.
    """
    example = task.examples[i]
    others = task.examples[:i] + task.examples[i + 1:]
    drawn = random.Random(1234 + i).sample(range(len(others)), task.shots)
    shots = [others[k] for k in drawn]
    d = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{before}{example['query']}{d}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        before = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        return [f"{before}{option}{d}{example['continuation']}" for option in example["context_options"]]
    before = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots)
    before += example["context"].strip() + d
    return [before.strip(), before + example["continuation"]]

def last_word_start(text):
    """
    The position of the last space in text that follows a non-space, 0 if there is none. Cutting there changes
    no token, because no token crosses from a non-space to a space (see dataset.segments).
    """
    cut = text.rfind(" ")
    while cut > 0 and text[cut - 1].isspace():
        cut = text.rfind(" ", 0, cut)
    return max(cut, 0)

def encode(tokenizer, prompts):
    """The tokens of each prompt, BOS first: a list of int64 arrays. What they all share is encoded once."""
    shared = os.path.commonprefix(prompts)
    cut = last_word_start(shared)
    head = [tokenizer.encode_single_token(BOS)] + encode_text(tokenizer, shared[:cut])
    return [np.array(head + encode_text(tokenizer, prompt[cut:])) for prompt in prompts]

def common_length(rows):
    """How many tokens the arrays have in common at their beginning."""
    n = min(map(len, rows))
    differ = np.any([row[:n] != rows[0][:n] for row in rows], axis=0)
    return int(differ.argmax()) if differ.any() else n

@dataclass
class Example:
    """An example as the model reads it. Choice c has the tokens prefix + tails[c]."""
    index: int
    gold: int | None  # the right choice; None: language modeling, which has a single row of tokens
    prefix: np.ndarray  # tokens that the choices share, at most up to the first scored one
    tails: list  # an array of at least one token for each choice
    starts: list  # for each choice the position of its first scored token; all behind it are scored, too

    @property
    def length(self):
        """Tokens of the longest choice."""
        return len(self.prefix) + max(map(len, self.tails))

    @property
    def rows(self):
        """All tokens of each choice, a list of arrays."""
        return [np.concatenate([self.prefix, tail]) for tail in self.tails]

def make_example(task, i, tokenizer, context):
    """
    Example i in tokens. Scored is, for multiple choice, what follows the common beginning of the choices; for
    schema, their common end; for language modeling, the continuation; in any case at least one token, even
    where a choice is the beginning of another. Rows longer than the context keep their last tokens, and a
    token that has none before it is not scored. Raises UserError if nothing is left to score.
    """
    rows = encode(tokenizer, render(task, i))

    # where the scored part of each row starts
    if task.kind == "multiple_choice":
        start = min(common_length(rows), min(map(len, rows)) - 1)
        starts = [start] * len(rows)
    elif task.kind == "schema":
        n_scored = max(common_length([row[::-1] for row in rows]), 1)
        starts = [len(row) - n_scored for row in rows]
    else:
        start = min(common_length(rows), len(rows[1]) - 1)
        rows, starts = rows[1:], [start]

    # leave out the first tokens of rows longer than the context
    for c, row in enumerate(rows):
        left_out = max(len(row) - context, 0)
        rows[c] = row[left_out:]
        starts[c] = max(starts[c] - left_out, 1)

    if any(start >= len(row) for row, start in zip(rows, starts)):
        raise UserError(f"{task.name}: an example has no text to score: {json.dumps(task.examples[i])[:200]}")

    # what the choices share; a single row shares nothing
    shared = 0
    if len(rows) > 1:
        shared = min(common_length(rows), min(starts), min(map(len, rows)) - 1)
    gold = None if task.kind == "language_modeling" else task.examples[i]["gold"]
    return Example(i, gold, rows[0][:shared], [row[shared:] for row in rows], starts)


# -----------------------------------------------------------------------------
# Scoring

PREFILL_BLOCK = 256  # positions that go through prefill at once: few keys then lie behind the queries
PREFIX_SPREAD = 8  # tokens by which the lengths of the prefixes in a batch may differ
MAX_LOGITS = 2**24  # numbers that the head may compute at once

# How close two choices, or the two best tokens, may come before rounding could decide, which differs from
# batch to batch.
TIE_MARGIN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}

def batches(examples, budget):
    """
    Yields the examples in batches of similar length, the longest first. A batch has at most `budget`
    positions, counting choices and padding, but at least one example.
    """
    batch, width, n_rows = [], 0, 0
    for e in sorted(examples, key=lambda e: (len(e.prefix), e.length), reverse=True):
        over_budget = max(width, e.length) * (n_rows + len(e.tails)) > budget
        if batch and (over_budget or len(batch[0].prefix) - len(e.prefix) > PREFIX_SPREAD):
            yield batch
            batch, width, n_rows = [], 0, 0
        batch.append(e)
        width = max(width, e.length)
        n_rows += len(e.tails)
    if batch:
        yield batch

def append_tokens(model, idx, kv, use_memory, first=0, memory=None, ends=None):
    """
    Append tokens idx (B, T) to the `first` positions that the cache holds, with the exact recurrence or, with
    use_memory=False, with the first memory only; memory and ends as for interleave.prefill. Returns hidden
    (B, T, D), and the memory that the next position reads (B, 1, D), None for zero.
    """
    done = []
    for start in range(0, idx.size(1), PREFILL_BLOCK):
        block = idx[:, start:start + PREFILL_BLOCK]
        position = first + start
        hidden, memory, _ = prefill(model, block, kv, first=position, memory=memory, ends=ends,
                                    recurrence=use_memory)
        done.append(hidden)
    return torch.cat(done, dim=1), memory

def hidden_states(model, batch, use_memory):
    """
    Run a batch of Examples through the model. Returns hidden (R, n, D), a row for each choice of each
    example, and the position of the first of the n hidden states.

    The tokens that all choices of an example share are processed once; the choices continue from copies of
    that cache. Rows are padded on the right only, so every token has the position that it would have alone.
    """
    device = model.wte.weight.device
    shared = min(len(e.prefix) for e in batch)
    n_choices = torch.tensor([len(e.tails) for e in batch], device=device)
    hidden, memory = [], None

    # what the choices share, a row for each example; its last hidden state predicts their first tokens
    if shared:
        idx = torch.from_numpy(np.stack([e.prefix[:shared] for e in batch])).to(device)
        prefix_kv = new_cache(model, len(batch), shared)
        prefix_hidden, memory = append_tokens(model, idx, prefix_kv, use_memory)
        hidden.append(prefix_hidden[:, -1:].repeat_interleave(n_choices, dim=0))
        if memory is not None:
            memory = memory.repeat_interleave(n_choices, dim=0)

    # the rest, a row for each choice, without the last token, which predicts nothing
    rests = [torch.from_numpy(row[shared:-1]) for e in batch for row in e.rows]
    T = max(map(len, rests))
    if T:
        idx = pad_sequence(rests, batch_first=True).to(device)
        ends = torch.tensor([shared + len(rest) for rest in rests], device=device)
        kv = new_cache(model, len(rests), shared + T)
        if shared:
            kv.copy_from(prefix_kv, shared, n_choices)
        rest_hidden, _ = append_tokens(model, idx, kv, use_memory, shared, memory, ends)
        hidden.append(rest_hidden)
    return torch.cat(hidden, dim=1), max(shared - 1, 0)

def scored_tokens(batch):
    """The row, position and id of every scored token of a batch of Examples: three int64 tensors (N,)."""
    found = []
    row = 0
    for e in batch:
        for tokens, start in zip(e.rows, e.starts):
            for position in range(start, len(tokens)):
                found.append((row, position, tokens[position]))
            row += 1
    return torch.tensor(np.array(found)).unbind(1)

def token_scores(model, hidden, targets):
    """
    For hidden states (N, D) and the tokens that follow them, (N,): the loss of each in nats; 1 if it is the
    argmax, else 0; and the distance of its logit to the best of all other tokens. Three float64 tensors (N,)
    on the CPU.
    """
    losses, is_argmax, margins = [], [], []
    n = max(MAX_LOGITS // model.config.vocab_size, 1)
    for part, target in zip(hidden.split(n), targets.split(n)):
        logits = model.logits(part[None])[0]
        losses.append(F.cross_entropy(logits, target, reduction="none").double())
        is_argmax.append((logits.argmax(1) == target).double())
        own = logits.gather(1, target[:, None])[:, 0]
        best_other = logits.scatter(1, target[:, None], -math.inf).amax(1)
        margins.append((own - best_other).abs().double())
    return torch.cat(losses).cpu(), torch.cat(is_argmax).cpu(), torch.cat(margins).cpu()

class Score(NamedTuple):
    losses: list  # for each choice the mean loss of its scored tokens, in nats
    is_argmax: bool  # whether every scored token of the first choice is the argmax
    margin: float  # the least distance, in logits, of one of these tokens to the best of all others

@torch.no_grad()
def score(model, batch, use_memory=True):
    """A Score for each Example of a batch, with the exact recurrence, or with the memory at zero."""
    hidden, first = hidden_states(model, batch, use_memory)

    # the head, on the hidden states before scored tokens only
    device = hidden.device
    rows, positions, targets = scored_tokens(batch)
    before_scored = hidden[rows.to(device), (positions - 1 - first).to(device)]
    losses, is_argmax, margins = token_scores(model, before_scored, targets.to(device))

    # from tokens to rows; in float64 the mean of equal losses is that loss, however many: ties stay ties
    zeros = torch.zeros(hidden.size(0), dtype=torch.float64)
    losses = zeros.index_add(0, rows, losses) / torch.bincount(rows)
    is_argmax = zeros.scatter_reduce(0, rows, is_argmax, "amin", include_self=False)
    margins = zeros.scatter_reduce(0, rows, margins, "amin", include_self=False)

    # from rows to examples
    scores = []
    row = 0
    for e in batch:
        next_row = row + len(e.tails)
        scores.append(Score(losses[row:next_row].tolist(), bool(is_argmax[row]), margins[row].item()))
        row = next_row
    return scores

def judge(example, scored):
    """
    Whether the model's answer is right, and the margin by which it came out so, given the example's Score.
    The answer is the choice with the lowest loss, the first of equals.
    """
    if example.gold is None:
        return scored.is_argmax, scored.margin
    lowest, *others = sorted(scored.losses)
    margin = others[0] - lowest if others else math.inf
    return scored.losses.index(lowest) == example.gold, margin

def evaluate_task(model, tokenizer, task, indices, budget, use_memory=True, done=lambda n: None):
    """
    Which of these examples of a task the model answers rightly: a dict index -> bool. budget: positions a
    batch; done(n) is called when n more examples are scored. Raises UserError for losses that are not finite.

    Rounding depends on the shapes of a batch. Where it could decide, the example is scored again by itself,
    so the answers are the same for any budget.
    """
    tie_margin = TIE_MARGIN[model.compute_dtype or model.wte.weight.dtype]
    examples = [make_example(task, i, tokenizer, model.config.sequence_len) for i in indices]
    right = {}
    for batch in batches(examples, budget):
        for example, scored in zip(batch, score(model, batch, use_memory)):
            if not all(map(math.isfinite, scored.losses)):
                raise UserError(f"{task.name}: the model's losses are not finite")
            right[example.index], margin = judge(example, scored)
            if margin < tie_margin and len(batch) > 1:
                scored_alone, = score(model, [example], use_memory)
                right[example.index], _ = judge(example, scored_alone)
        done(len(batch))
    return right


# -----------------------------------------------------------------------------
# The whole of CORE

def weights_sha256(model):
    """Hex sha256 of all weights."""
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

FIGURES = ("accuracy", "stderr", "centered", "centered_stderr")  # of a task's result, in the .csv file

def read_finished(path, header, tasks):
    """
    The results of finished tasks, a dict by name, that an earlier call left in the file `path`; {} if there
    are none or they are of another model or other flags than the header's. Tasks whose data have changed are
    left out, and results that do not follow from how many answers were right. Raises Unreadable: results that
    cannot be read now would be written over.
    """
    check_regular(path)
    try:
        kept = json.loads(path.read_text("utf-8"))
        if any(kept[key] != value for key, value in header.items()):
            return {}
        now = {task.name: task for task in tasks}
        finished = {}
        for name, result in kept["tasks"].items():
            of, correct = result["of"], result["correct"]
            n = min(header["max_per_task"] or of, of)
            if not is_whole(correct, 0, n):
                continue
            task = now.get(name)
            if task is None:  # one that is not wanted now, whose results stay
                task = Task(name, result["kind"], result["shots"], "", result["baseline"], result["sha256"],
                            range(of))
            if result == task_result(task, n, correct):
                finished[name] = result
        return finished
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as e:
        raise_if_unreadable(path, e)
        return {}  # a damaged file

def work_per_example(task, context):
    """About how much work an example is: the characters of its prompt, at most those of a full context."""
    some = task.examples[:100]
    characters = sum(len(json.dumps(example)) for example in some) / len(some)
    return min((task.shots + 1) * characters, 4 * context)

def task_result(task, n, correct):
    """What is kept of a task of which `correct` out of n examples were answered rightly."""
    accuracy = correct / n
    stderr = math.sqrt(accuracy * (1 - accuracy) / n)
    return dict(
        kind=task.kind,
        shots=task.shots,
        n=n,
        of=len(task.examples),
        correct=correct,
        accuracy=accuracy,
        stderr=stderr,
        baseline=task.baseline,
        centered=(accuracy - task.baseline) / (1 - task.baseline),
        centered_stderr=stderr / (1 - task.baseline),
        sha256=task.sha256,
    )

def evaluate_core(model, tokenizer, tasks, folder, step, max_per_task=None, use_memory=True, batch_size=16,
                  progress=True):
    """
    CORE of a model on these tasks: a dict with `tasks` (task_result() of each by name), `missing` (the names
    of the tasks without which there is no CORE), `core` and `core_stderr` (None if some are missing), and the
    model's weights_sha256 and the flags. A task that is finished is kept, in folder/core_<step>...json and
    .csv, and not run again for the same weights, data and flags.

    batch_size: rows of the context's length at a time. The ranks share the examples. Raises UserError.
    """
    context = model.config.sequence_len
    device = model.wte.weight.device
    if context < 2:
        raise UserError(f"CORE needs a context of 2 tokens or more, the model has {context}")

    # what is finished already
    rank, world_size = rank_and_world_size()
    name = f"core_{step:07d}"
    if not use_memory:
        name += "_no_memory"
    if max_per_task:
        name += f"_max{max_per_task}"
    path = Path(folder) / f"{name}.json"
    header = dict(
        step=step,
        weights_sha256=weights_sha256(model),
        memory=use_memory and model.config.recurrent_memory,
        max_per_task=max_per_task,
    )
    if rank == 0:
        check_folder(path)
        check_folder(path.with_suffix(".csv"))
    finished = from_rank_0(read_finished(path, header, tasks) if rank == 0 else None, device)

    # how much is left to do, of all ranks and of this one
    todo = [task for task in tasks if task.name not in finished]
    n_examples, mine, work = {}, {}, {}
    for task in todo:
        n = len(task.examples)
        n_examples[task.name] = min(max_per_task or n, n)
        mine[task.name] = range(rank, n_examples[task.name], world_size)
        work[task.name] = work_per_example(task, context)
    total_work = sum(work[task.name] * len(mine[task.name]) for task in todo)

    hide_bar = True if rank > 0 or not progress else None  # None: hidden if the output is not a terminal
    shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=total_work, disable=hide_bar, bar_format=shape, leave=False) as bar:
        def advance(work_each, n):
            bar.update(n * work_each)

        for task in todo:
            bar.set_description(f"CORE {task.name}")
            right = evaluate_task(model, tokenizer, task, mine[task.name], batch_size * context, use_memory,
                                  partial(advance, work[task.name]))
            correct = torch.tensor(sum(right.values()), dtype=torch.int64, device=device)
            if world_size > 1:
                dist.all_reduce(correct)
            finished[task.name] = task_result(task, n_examples[task.name], correct.item())
            if rank == 0:
                write_core(path, header | summarize(finished))
    return header | summarize({task.name: finished[task.name] for task in tasks})

def summarize(tasks):
    """CORE of the results of finished tasks, a dict by name: what evaluate_core() returns of them."""
    missing = [name for name in CORE if name not in tasks]
    core = core_stderr = None
    if not missing:
        core = sum(tasks[name]["centered"] for name in CORE) / len(CORE)
        core_stderr = math.sqrt(sum(tasks[name]["centered_stderr"] ** 2 for name in CORE)) / len(CORE)
    return dict(core=core, core_stderr=core_stderr, missing=missing, tasks=tasks)

def write_core(path, results):
    """Write results to `path`, a .json file, and the figures of each task to a .csv file beside it."""
    rows = [["task", "n", "of", *FIGURES]]
    for name, t in results["tasks"].items():
        rows.append([name, t["n"], t["of"], *(f"{t[key]:.6f}" for key in FIGURES)])
    if not results["missing"]:
        rows.append(["CORE", "", "", "", "", f"{results['core']:.6f}", f"{results['core_stderr']:.6f}"])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    text = table.getvalue()
    write_atomic(path.with_suffix(".csv"), lambda f: f.write(text.encode()))
    write_json(path, results)

def describe_core(results):
    """The line to show: CORE, or why there is none."""
    memory = "with memory" if results["memory"] else "without memory"
    missing = results["missing"]
    if missing:
        return f"{memory}: no CORE, {len(missing)} of its {len(CORE)} tasks did not run: {', '.join(missing)}"
    estimate = ""
    if any(t["n"] < t["of"] for t in results["tasks"].values()):
        estimate = f", an estimate from at most {results['max_per_task']} examples a task"
    return f"{memory}: CORE {results['core']:.4f}{estimate} (standard error {results['core_stderr']:.4f})"
