"""
CORE: the 22 tasks of DCLM (arXiv 2406.11794), scored with the memory the model really has: prompts go through exact parallel
prefill, and choices continue from the memory that their shared part left. `eval_core.py --eval core` is the command.

Prompts get a BOS token in front. Multiple choice: the choices share a prefix; schema: a suffix; the choice with the lowest mean
loss over the part that differs (multiple choice) or is shared (schema) wins. Language modeling: right when every token of the
continuation is the argmax. Prompts longer than the context keep their last tokens. Centered = (accuracy - baseline) / (1 -
baseline); CORE = mean of the 22 centered accuracies.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import random
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from tqdm import tqdm

from interleave import prefill
from model import KVCache
from prepare_data import UserError, download, lock, sha256_file, write_atomic, write_json


# -----------------------------------------------------------------------------
# The bundle

# the 22 tasks whose mean is the score; a bundle may have fewer, and then there is no CORE
CORE = ("hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa", "commonsense_qa", "piqa",
        "openbook_qa", "lambada_openai", "hellaswag", "winograd", "winogrande", "bigbench_dyck_languages", "agi_eval_lsat_ar",
        "bigbench_cs_algorithms", "bigbench_operators", "bigbench_repeat_copy_logic", "squad", "coqa", "boolq",
        "bigbench_language_identification")
BUNDLE, BUNDLE_URL = Path("data_core/eval_bundle"), "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_BYTES = 2**30  # an archive that claims to unpack to more is not the bundle

@dataclass
class Task:
    name: str
    kind: str  # multiple_choice | schema | language_modeling
    shots: int  # examples in front of each prompt
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing
    sha256: str  # of all that decides the result but the model
    examples: list  # dicts in the established order; their keys are those of KINDS

KINDS = {"multiple_choice": ("query", "choices"), "schema": ("continuation", "context_options"), "language_modeling": ("context", "continuation")}

def unpack(archive, folder):
    """Unpack a zip of the bundle into the new folder, all of it or nothing. UserError for anything but plain files inside it."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as z:
            if sum(info.file_size for info in z.infolist()) > BUNDLE_BYTES:
                raise UserError(f"{archive} unpacks to more than {BUNDLE_BYTES >> 20} MB: it is not the CORE bundle")
            for info in z.infolist():
                target = (tmp / info.filename).resolve()
                if stat.S_ISLNK(info.external_attr >> 16) or "\\" in info.filename or not target.is_relative_to(tmp.resolve()):
                    raise UserError(f"{archive} wants to write {info.filename!r}, outside its folder: nothing was unpacked")
            for info in z.infolist():
                if not info.is_dir():
                    target = tmp / info.filename
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with z.open(info) as source, open(target, "wb") as f:  # compares the checksum at the end
                        shutil.copyfileobj(source, f)
        inside = tmp / "eval_bundle" if (tmp / "eval_bundle").is_dir() else tmp
        if not (inside / "core.yaml").is_file():
            raise UserError(f"{archive} has no core.yaml: it is not the CORE bundle")
        os.replace(inside, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as e:
        raise UserError(f"cannot unpack {archive}: {e}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)

def fetch_bundle(folder=BUNDLE, url=BUNDLE_URL):
    """Download and unpack the bundle, unless it is there; what was begun is continued. Raises UserError."""
    if folder.is_dir():
        return
    def check(path):
        if not zipfile.is_zipfile(path):
            raise UserError("it is not a zip archive")
    with lock(folder.parent, "download of the CORE bundle"):
        archive = download(url, folder.parent / "eval_bundle.zip", check, "a zip archive", "get the bundle elsewhere and give --bundle DIR")
        try:
            unpack(archive, folder)
        finally:
            archive.unlink()

def read_examples(path, kind, shots):
    """The examples of a .jsonl file in the established order. Raises UserError with the line of a bad one."""
    def is_good(x):
        texts = [x[key] for key in KINDS[kind]]
        options = texts.pop() if kind != "language_modeling" else None
        return all(isinstance(text, str) for text in texts + (options or [])) and (options is None or 0 <= x["gold"] < len(options))
    examples = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                examples.append(json.loads(line))
                if not is_good(examples[-1]):
                    raise TypeError
            except (KeyError, TypeError):
                raise UserError(f"{path} line {n}: a {kind} example has {' and '.join(KINDS[kind])}"
                                + (" as text" if kind == "language_modeling" else " as texts, and gold, the number of the right one"))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} line {n}: not valid JSON ({e})")
    if len(examples) <= shots:
        raise UserError(f"{path} has {len(examples)} examples: {shots}-shot prompts need at least {shots + 1}")
    random.Random(1337).shuffle(examples)
    return examples

def load_tasks(bundle=None, names=None):
    """
    The tasks (of these names) that the folder `bundle` has the data of; None: the bundle that was downloaded, or is now,
    by the first process. Raises UserError where it is not whole or names an unknown task.
    """
    if bundle is None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            fetch_bundle()
        if dist.is_initialized():
            dist.barrier()
    bundle, tasks, found = Path(bundle or BUNDLE), [], []
    try:
        listed = yaml.safe_load((bundle / "core.yaml").read_text("utf-8"))["icl_tasks"]
        with open(bundle / "eval_meta_data.csv", newline="", encoding="utf-8") as f:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
        for x in listed:
            path = bundle / "eval_data" / x["dataset_uri"]
            if ".." in path.relative_to(bundle / "eval_data").parts:
                raise ValueError(f"{x['dataset_uri']} is outside the bundle")
            shots, delimiter = int(x["num_fewshot"][0]), x.get("continuation_delimiter", " ")
            if x["icl_task_type"] not in KINDS:
                raise ValueError(f"{x['label']} is a {x['icl_task_type']}, which is none of {', '.join(KINDS)}")
            if path.is_file():
                found.append(x["label"])
            if path.is_file() and (names is None or x["label"] in names):
                sha256 = hashlib.sha256((sha256_file(path) + repr((x["icl_task_type"], shots, delimiter))).encode()).hexdigest()
                tasks.append(Task(x["label"], x["icl_task_type"], shots, delimiter, baselines[x["label"]], sha256,
                                  read_examples(path, x["icl_task_type"], shots)))
    except FileNotFoundError as e:
        raise UserError(f"no CORE bundle in {bundle}: {e.filename} is missing")
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UserError(f"the CORE bundle in {bundle} is damaged: {e!r}")
    unknown = [name for name in names or () if name not in found]
    if unknown or not tasks:
        raise UserError(f"{bundle} has no data for {', '.join(unknown) or 'any task'}; it has {', '.join(found) or 'none'}")
    return tasks


# -----------------------------------------------------------------------------
# From examples to tokens

def render(task, i):
    """
    The prompts of example i, byte for byte those of the established evaluator: one a choice; for language modeling
    [without, with] the continuation. The few-shot examples are drawn from all others, seeded by i.
    """
    x, d = task.examples[i], task.delimiter
    drawn = random.Random(1234 + i).sample(range(len(task.examples) - 1), task.shots)
    shots = [task.examples[k + (k >= i)] for k in drawn]  # numbered without i
    if task.kind == "multiple_choice":
        before = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots) + x["query"] + d
        return [before + choice for choice in x["choices"]]
    if task.kind == "schema":
        before = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        return [f"{before}{option}{d}{x['continuation']}" for option in x["context_options"]]
    before = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots) + x["context"].strip() + d
    return [before.strip(), before + x["continuation"]]

def encode(tokenizer, prompts):
    """Tokens of each prompt, BOS first, as int64 arrays; what the prompts share is encoded once."""
    shared = os.path.commonprefix(prompts)
    cut = shared.rfind(" ")  # no token crosses from a non-space to a space: see prepare_data.segments
    while cut > 0 and shared[cut - 1].isspace():
        cut = shared.rfind(" ", 0, cut)
    cut = max(cut, 0)
    head = [tokenizer.encode_single_token("<|bos|>")] + tokenizer.encode_ordinary(shared[:cut])
    return [np.array(head + tokenizer.encode_ordinary(prompt[cut:])) for prompt in prompts]

def common_length(rows):
    """How many tokens the arrays have in common at their beginning."""
    n = min(map(len, rows))
    differ = np.any([row[:n] != rows[0][:n] for row in rows], axis=0)
    return int(differ.argmax()) if differ.any() else n

@dataclass
class Example:
    """An example as the model reads it: the tokens of choice c are prefix + tails[c]."""
    index: int
    gold: int | None  # the right choice; None: language modeling, which has one row
    prefix: np.ndarray  # what the choices share, up to the first scored token at most
    tails: list  # an array a choice, at least one token each
    starts: list  # for each choice, the position of the first token that is scored; all behind it are

def make_example(task, i, tokenizer, context):
    """
    Example i in tokens. Multiple choice scores what follows the choices' common beginning, schema their common end,
    language modeling the continuation; at least one token, also where a choice is the beginning of another. Rows beyond
    the context keep their last tokens, and what has no token before it is not scored.
    """
    rows = encode(tokenizer, render(task, i))
    if task.kind == "schema":
        suffix = common_length([row[::-1] for row in rows])
        starts = [len(row) - max(suffix, 1) for row in rows]
    else:
        starts = [min(common_length(rows), min(map(len, rows)) - 1)] * len(rows)
    if task.kind == "language_modeling":
        rows, starts = rows[1:], [min(common_length(rows), len(rows[1]) - 1)]
    starts = [max(start - max(len(row) - context, 0), 1) for row, start in zip(rows, starts)]
    rows = [row[-context:] for row in rows]
    shared = min(common_length(rows), min(starts), min(map(len, rows)) - 1) if len(rows) > 1 else 0
    return Example(i, task.examples[i].get("gold") if task.kind != "language_modeling" else None,
                   rows[0][:shared], [row[shared:] for row in rows], starts)


# -----------------------------------------------------------------------------
# Scoring

BLOCK = 256  # positions that prefill works on at once: a query attends to few keys behind it then
SPREAD = 8  # tokens by which the shared prefixes of a batch may differ
# how close two choices, or the two best tokens, may come before rounding, which differs from batch to batch, could decide
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}

def batches(examples, budget):
    """
    The examples in batches of like length, longest first: at most `budget` positions (one example at least), choices
    and padding counted.
    """
    batch, width, rows = [], 0, 0
    for e in sorted(examples, key=lambda e: (len(e.prefix), max(map(len, e.tails))), reverse=True):
        length = len(e.prefix) + max(map(len, e.tails))
        if batch and (max(width, length) * (rows + len(e.tails)) > budget or len(batch[0].prefix) - len(e.prefix) > SPREAD):
            yield batch
            batch, width, rows = [], 0, 0
        batch.append(e)
        width, rows = max(width, length), rows + len(e.tails)
    if batch:
        yield batch

def read(model, idx, kv, use_memory, first=0, memory=None, ends=None):
    """
    Append tokens idx (B, T) to the `first` positions in the cache, with the exact recurrence or memory zero; memory and
    ends as for interleave.prefill. Returns hidden (B, T, D) and the memory of the last position (B, 1, D) or None.
    """
    done = []
    for t in range(0, idx.size(1), BLOCK):
        block, at = idx[:, t:t + BLOCK], first + t
        if use_memory:
            hidden, memory, _ = prefill(model, block, kv, first=at, memory=memory, ends=ends)
        else:
            hidden, _ = model(block, range(at, at + block.size(1)), kv)
        done.append(hidden)
    return torch.cat(done, dim=1), memory

@torch.no_grad()
def score(model, batch, use_memory=True):
    """
    Score a batch of Examples: for every one, (losses, argmax, margin): the mean loss of each choice over its scored tokens, a
    list of floats in nats; whether each scored token of the first choice was the argmax; and the least distance, in logits,
    of one of them to the best of all other tokens.
    The tokens that all choices of an example share are processed once; the choices continue from a copy of that cache. Rows
    are padded on the right only, so every token has the position it would have alone. The head runs on scored positions.
    """
    config, device, dtype = model.config, model.wte.weight.device, model.compute_dtype or model.wte.weight.dtype
    shared = min(len(e.prefix) for e in batch)
    rests = [np.concatenate([e.prefix[shared:], tail]) for e in batch for tail in e.tails]
    repeats = torch.tensor([len(e.tails) for e in batch], device=device)
    T = max(map(len, rests)) - 1  # the last token predicts nothing
    hidden, memory = [], None
    if shared:
        prefix_kv = KVCache(config, len(batch), shared, device, dtype)
        idx = torch.from_numpy(np.stack([e.prefix[:shared] for e in batch])).to(device)
        through, memory = read(model, idx, prefix_kv, use_memory)
        hidden.append(through[:, -1:].repeat_interleave(repeats, dim=0))
        memory = None if memory is None else memory.repeat_interleave(repeats, dim=0)
    if T:
        idx, ends = torch.zeros(len(rests), T, dtype=torch.int64), torch.tensor([shared + len(rest) - 1 for rest in rests])
        for row, rest in zip(idx, rests):
            row[:len(rest) - 1] = torch.from_numpy(rest[:-1])
        kv = KVCache(config, len(rests), shared + T, device, dtype)
        if shared:
            kv.copy_from(prefix_kv, shared, repeats)
        hidden.append(read(model, idx.to(device), kv, use_memory, shared, memory, ends.to(device))[0])
    hidden = torch.cat(hidden, dim=1)  # of positions first, first + 1, ..
    first = max(shared - 1, 0)

    starts = [start for e in batch for start in e.starts]
    places = [(row, p - 1 - first, rest[p - shared]) for row, (rest, start) in enumerate(zip(rests, starts))
              for p in range(start, shared + len(rest))]
    rows, columns, targets = torch.tensor(np.array(places), device=device).unbind(1)
    loss, argmax, margin = [], [], []
    for places in torch.arange(len(rows), device=device).split(max(2**24 // config.vocab_size, 1)):
        logits = model.logits(hidden[rows[places], columns[places]][None])[0]
        target = targets[places, None]
        loss.append(F.cross_entropy(logits, target[:, 0], reduction="none").double())
        right = logits.gather(1, target)[:, 0]
        argmax.append((logits.argmax(1) == target[:, 0]).double())
        margin.append((right - logits.scatter(1, target, -math.inf).amax(1)).abs().double())
    # in float64 the mean of equal losses is that loss, however many: ties stay ties
    rows, zeros = rows.cpu(), torch.zeros(len(rests), dtype=torch.float64)
    losses = (zeros.index_add(0, rows, torch.cat(loss).cpu()) / torch.bincount(rows)).split(repeats.tolist())
    argmax, margin = (zeros.scatter_reduce(0, rows, torch.cat(x).cpu(), "amin", include_self=False) for x in (argmax, margin))
    heads = repeats.cumsum(0).cpu() - repeats.cpu()
    return [(x.tolist(), bool(hit), near) for x, hit, near in zip(losses, argmax[heads].tolist(), margin[heads].tolist())]

def answer(example, losses, argmax, margin):
    """(is the answer right, by how much it was decided): the choice with the lowest loss, the first of equals."""
    if example.gold is None:
        return argmax, margin
    best, second = sorted(losses)[:2] if len(losses) > 1 else (losses[0], math.inf)
    return losses.index(best) == example.gold, second - best

def evaluate_task(model, tokenizer, task, indices, budget, use_memory=True, done=lambda n: None):
    """
    Which of these examples are answered rightly: a dict index -> bool. budget: positions a batch; done(n) is called when
    n more are. Rounding depends on the shapes of a batch; where it could decide, the example is scored again by itself, so
    the answers are the same for any budget.
    """
    right, close = {}, CLOSE[model.compute_dtype or model.wte.weight.dtype]
    for batch in batches([make_example(task, i, tokenizer, model.config.sequence_len) for i in indices], budget):
        for example, scored in zip(batch, score(model, batch, use_memory)):
            if not all(map(math.isfinite, scored[0])):
                raise UserError(f"{task.name}: the model's losses are not finite")
            right[example.index], decided = answer(example, *scored)
            if decided < close and len(batch) > 1:
                right[example.index], _ = answer(example, *score(model, [example], use_memory)[0])
        done(len(batch))
    return right

def weights_sha256(model):
    """Hex sha256 of all weights."""
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

def evaluate_core(model, tokenizer, tasks, folder, step, max_per_task=None, use_memory=True, batch_size=16, progress=True):
    """
    CORE of a model on these tasks: a dict with `tasks` (accuracy, centered, stderr of both, n of all), `missing` (the tasks
    without which there is no CORE), `core` and `core_stderr` (None if some are). Tasks are kept when they are finished, in
    folder/core_<step>...json and .csv, and not run again for the same weights, data and flags.
    batch_size: rows of the context's length at a time. Under torchrun the processes share the examples.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    name = f"core_{step:07d}" + ("" if use_memory else "_no_memory") + (f"_max{max_per_task}" if max_per_task else "")
    path, context, device = Path(folder) / f"{name}.json", model.config.sequence_len, model.wte.weight.device
    if context < 2:
        raise UserError(f"CORE needs a context of 2 tokens or more, the model has {context}")
    header = dict(step=step, weights_sha256=weights_sha256(model), memory=use_memory and model.config.lrt != "none", max_per_task=max_per_task)
    finished = {}
    if rank == 0 and path.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: from the beginning
            kept = json.loads(path.read_text("utf-8"))
            if all(kept[key] == header[key] for key in header):
                changed = [task.name for task in tasks if kept["tasks"].get(task.name, {}).get("sha256") != task.sha256]
                finished = {name: t for name, t in kept["tasks"].items() if name not in changed}
    if world > 1:
        told = [finished]
        dist.broadcast_object_list(told, device=device)
        finished, = told
    todo = [task for task in tasks if task.name not in finished]
    n = {task.name: min(max_per_task or len(task.examples), len(task.examples)) for task in todo}
    # an example's work: characters of its prompt, as many as the context could hold
    work = {t.name: min((t.shots + 1) * sum(len(json.dumps(x)) for x in t.examples[:100]) / len(t.examples[:100]), 4 * context) for t in todo}
    with tqdm(total=sum(work[t.name] * len(range(rank, n[t.name], world)) for t in todo), disable=True if rank or not progress else None,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", leave=False) as bar:
        for task in todo:
            bar.set_description(f"CORE {task.name}")
            right = evaluate_task(model, tokenizer, task, range(rank, n[task.name], world), batch_size * context, use_memory,
                                  lambda k: bar.update(k * work[task.name]))
            correct = torch.tensor(sum(right.values()), dtype=torch.int64, device=device)
            if world > 1:
                dist.all_reduce(correct)
            accuracy = correct.item() / n[task.name]
            stderr = math.sqrt(accuracy * (1 - accuracy) / n[task.name])
            finished[task.name] = dict(
                kind=task.kind, shots=task.shots, n=n[task.name], of=len(task.examples), correct=correct.item(), accuracy=accuracy,
                stderr=stderr, baseline=task.baseline, centered=(accuracy - task.baseline) / (1 - task.baseline),
                centered_stderr=stderr / (1 - task.baseline), sha256=task.sha256)
            if rank == 0:
                write_core(path, header | total(finished))
    return header | total({task.name: finished[task.name] for task in tasks})

def total(tasks):
    """CORE of finished tasks, or which are missing: what evaluate_core returns of them."""
    missing = [name for name in CORE if name not in tasks]
    core = None if missing else sum(tasks[name]["centered"] for name in CORE) / len(CORE)
    stderr = None if missing else math.sqrt(sum(tasks[name]["centered_stderr"] ** 2 for name in CORE)) / len(CORE)
    return dict(core=core, core_stderr=stderr, missing=missing, tasks=tasks)

def write_core(path, results):
    """Write results to path, .json, and its figures beside it as .csv."""
    lines = ["task,n,of,accuracy,stderr,centered,centered_stderr"]
    lines += [f"{name},{t['n']},{t['of']},{t['accuracy']:.6f},{t['stderr']:.6f},{t['centered']:.6f},{t['centered_stderr']:.6f}"
              for name, t in results["tasks"].items()]
    if not results["missing"]:
        lines.append(f"CORE,,,,,{results['core']:.6f},{results['core_stderr']:.6f}")
    write_atomic(path.with_suffix(".csv"), lambda f: f.write(("\n".join(lines) + "\n").encode()))
    write_json(path, results)

def describe_core(results):
    """The line to show: CORE, or why there is none."""
    memory = "with memory" if results["memory"] else "without memory"
    if results["missing"]:
        return f"{memory}: no CORE, {len(results['missing'])} of its {len(CORE)} tasks did not run: {', '.join(results['missing'])}"
    estimate = any(t["n"] < t["of"] for t in results["tasks"].values())
    return f"{memory}: CORE {results['core']:.4f}" + (f", an estimate from at most {results['max_per_task']} examples a task" if estimate else "") \
        + f" (standard error {results['core_stderr']:.4f})"
