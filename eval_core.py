"""
Score a checkpoint: bits per byte (BPB), CORE, samples, stability, or any of them.

    python eval_core.py                                # BPB of the newest run, on the data it was trained on
    python eval_core.py --checkpoint runs/d4_shared --eval bpb,core,sample
    python eval_core.py --eval stability               # does the BPB stay where it is, pass after pass?
    python eval_core.py --text a.txt more.jsonl.gz     # BPB of any text, with the run's own tokenizer
    python eval_core.py --text a.txt --eval tokens --html page.html       # a page: where memory helps
    torchrun --standalone --nproc_per_node=8 eval_core.py --eval core

Bits per byte are measured in two ways. In parallel, as in training: for each pass of the schedule, and
`merged`, where every position is scored by the last pass that computed it. And decoding, as the model
generates, with the exact recurrence: by parallel prefill, and with --referee also token by token. CORE is in
core.py, the page in tokens_page.py.

A text is cut into rows as training data is: its documents stand one behind the other, each with <|bos|> in
front, and are cut every T tokens (T: the context), so a row may begin and end within a document and hold
several. A row has T inputs and T targets; the last target of a row is the first input of the next. So every
token of every document is a target once, and every byte of the text counts once. The last row is filled up
with <|bos|>, which stands for no bytes and does not count. What stands before a row is not seen from it.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import math
from pathlib import Path

from common import (
    ArgumentParser,
    UserError,
    at_least,
    at_most,
    check_command_line,
    check_output,
    end_processes,
    flag,
    init_processes,
    rank_and_world_size,
    run_main,
    write_atomic,
)
from prepare_data import find_files, read_documents

EVALUATIONS = ("bpb", "core", "sample", "stability", "tokens")
MAX_PASSES = 10_000  # of stability
MAX_PASSES_SCORED = 16  # the losses of longer schedules are not shown pass by pass

# -----------------------------------------------------------------------------
# Flags

def parse_args():
    """The command line, checked. Raises UserError."""
    parser = ArgumentParser(
        description="Bits per byte, CORE and samples of a trained run, with the memory that it really has.")
    parser.add_argument("--checkpoint", metavar="PATH",
                        help="run folder or checkpoint file (default: the newest in runs/)")
    parser.add_argument("--eval", default="bpb", metavar="A,B",
                        help=f"what to run: any of {','.join(EVALUATIONS)}")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of the context's length at a time")
    parser.add_argument("--no-memory", action="store_true",
                        help="core, sample: keep the memory at zero, as the authors score")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")

    g = parser.add_argument_group("any text", "in place of prepared data; all of it is scored")
    g.add_argument("--text", nargs="+", metavar="FILE",
                   help="score these files and folders, with the tokenizer of the run: BPB, or tokens: "
                        "a page that shows where memory helps")
    g.add_argument("--text-key", default="text", metavar="NAME",
                   help="what the text is called: key of JSON lines, column of parquet")
    g.add_argument("--html", metavar="FILE", help="tokens: the page to write")
    g.add_argument("--against", metavar="PATH",
                   help="tokens: another run or checkpoint with the same tokenizer to compare with")

    g = parser.add_argument_group("bpb of prepared data")
    g.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    g.add_argument("--split", choices=["train", "val", "both"], default="both", help="which text to score")
    g.add_argument("--rows", type=int, default=256,
                   help="rows of the context's length scored in parallel, per split")
    g.add_argument("--decode-rows", type=int, default=64,
                   help="rows of them scored with the exact recurrence, 0: none")
    g.add_argument("--referee", action="store_true",
                   help="score these token by token, too: the same figure, slowly")

    g = parser.add_argument_group("stability", "of the first --decode-rows rows of the split")
    g.add_argument("--passes", type=int, default=30, metavar="N",
                   help="passes over everything, each with the memories of the one before")

    g = parser.add_argument_group(
        "core",
        "results go to core_<step>.json and .csv in the run folder; "
        "a second call goes on with the tasks that are missing")
    g.add_argument("--bundle", metavar="DIR",
                   help="folder with core.yaml (default: data_core/eval_bundle, downloaded once)")
    g.add_argument("--tasks", metavar="A,B", help="run only these")
    g.add_argument("--max-per-task", type=int, metavar="N",
                   help="run only so many examples of each: an estimate")

    args = parser.parse_args()
    at_least(args, rows=1, decode_rows=0, batch_size=1, max_per_task=1, passes=2)
    at_most(args, passes=MAX_PASSES)
    wanted = set(args.eval.split(","))
    if not wanted <= set(EVALUATIONS):
        raise UserError(f"--eval {args.eval}: choose from {','.join(EVALUATIONS)}")
    if "tokens" in wanted and not (args.text and args.html):
        raise UserError("--eval tokens needs a text, --text FILE, and a page to write, --html FILE")
    if args.text and "stability" in wanted:
        raise UserError("--eval stability is of prepared data: leave --text out")
    check_flags_are_read(parser, args, wanted)
    args.files = find_files(args.text) if args.text else []
    inputs = [*args.files, args.checkpoint, args.against]
    if args.bundle is not None:
        inputs += Path(args.bundle).rglob("*")
    check_output(args, "json", [*inputs, args.html])
    check_output(args, "html", inputs)
    return args

# the flags that each evaluation reads, beside --checkpoint, --eval, --json, --device and --batch-size
READS = {
    "bpb of --data": ("data", "split", "rows", "decode_rows", "referee"),
    "bpb of --text": ("text", "text_key", "referee"),
    "stability": ("data", "split", "decode_rows", "passes"),
    "tokens": ("text", "text_key", "html", "against"),
    "core": ("bundle", "tasks", "max_per_task", "no_memory"),
    "sample": ("no_memory",),
}

def check_flags_are_read(parser, args, wanted):
    """Raise UserError for a flag with another value than its default that no wanted evaluation reads."""
    of_what = "bpb of --text" if args.text else "bpb of --data"
    wanted = {of_what if name == "bpb" else name for name in wanted}
    read = {name for evaluation in wanted for name in READS[evaluation]}
    for name in sorted({name for names in READS.values() for name in names} - read):
        if getattr(args, name) != parser.get_default(name):
            goes_with = ", ".join(evaluation for evaluation, names in READS.items() if name in names)
            raise UserError(f"{flag(name)} goes with {goes_with}, "
                            f"not with {', '.join(sorted(wanted))}: leave it out, or see --eval")
    if args.referee and not args.text and not args.decode_rows:
        raise UserError("--referee is of the rows of --decode-rows, which are none: leave it out")

if __name__ == "__main__":  # --help does not wait for what follows
    check_command_line(parse_args)

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from attention import take
from core import describe_core, evaluate_core, load_tasks
from dataset import BOS, encode_text, first_rows, open_data, token_bytes
from interleave import Schedule, decode_tokens, pass_losses, prefill, run
from sample import complete, encode_prompts, load_run, new_cache
from tokens_page import MAX_TOKENS, make_page, page_data, position_ranges, score_tokens

# -----------------------------------------------------------------------------
# Bits per byte

@torch.no_grad()
def recurrent_losses(model, idx, targets, token_by_token=False, use_memory=True):
    """
    The losses of all tokens with the exact recurrence, as the model decodes: idx, targets (B, T) int64 ->
    (B, T) in nats. By parallel prefill; token_by_token: one forward a token through the same cache, which
    gives the same losses, slowly. use_memory=False decodes with the first memory only, zero by default.
    """
    kv = new_cache(model, *idx.shape)
    if token_by_token:
        hidden = decode_tokens(model, idx, kv)
    else:
        hidden, _, _ = prefill(model, idx, kv, recurrence=use_memory)
    return model.token_loss(hidden, targets)

@torch.no_grad()
def evaluate_bpb(model, rows, token_bytes, schedule, batch_size, decode=False, token_by_token=False,
                 progress=None):
    """
    Bits per byte of rows (N, T+1) int64. token_bytes (V,): how many bytes of text each token stands for. A
    figure is nats / (ln 2 * bytes); targets of zero bytes (BOS) do not count. Returns two dicts:

    - bpb, of floats: `pass 0` (the initialization pass), `pass 1`, and so on for schedules of a few passes,
      each over the positions that it computed; `merged`, each position scored by the last pass that computed
      it; with decode also `decode`, the exact recurrence by parallel prefill, and for an LRT `no memory`, the
      same with the memory at zero; with token_by_token also `token by token`, the exact recurrence so.
    - by_position, of float64 arrays (T,): the bits at each position under each name but those of the passes,
      and under `bytes` how many bytes these bits are of.

    The ranks share the rows. progress: a title for a progress bar.
    """
    device = model.wte.weight.device
    T = rows.size(1) - 1
    token_bytes = torch.as_tensor(token_bytes, dtype=torch.float64)
    passes = schedule.passes(T)
    if schedule.kind not in ("interleaved", "refine", "draft") or len(passes) > MAX_PASSES_SCORED:
        passes = []

    # what is measured: a name, and the positions that have a loss
    positions = {f"pass {i}": computed for i, computed in enumerate(passes)}
    positions["merged"] = range(T)
    if decode:
        positions["decode"] = range(T)
        if model.config.recurrent_memory:
            positions["no memory"] = range(T)
    if token_by_token:
        positions["token by token"] = range(T)

    # sums over the rows of this rank
    rank, world_size = rank_and_world_size()
    mine = rows[rank::world_size]
    nats = torch.zeros(len(positions), T, dtype=torch.float64)
    n_bytes = torch.zeros(1, T, dtype=torch.float64)
    hide_bar = True if rank > 0 or not progress else None  # None: hidden if the output is not a terminal
    for start in tqdm(range(0, len(mine), batch_size), desc=progress, disable=hide_bar, leave=False):
        batch = mine[start:start + batch_size]
        idx = batch[:, :-1].to(device)
        targets = batch[:, 1:].to(device)
        losses_of_passes, _, merged = pass_losses(model, idx, targets, schedule)
        losses = [*losses_of_passes[:len(passes)], merged]  # in the order of `positions`
        if "decode" in positions:
            losses.append(recurrent_losses(model, idx, targets))
        if "no memory" in positions:
            losses.append(recurrent_losses(model, idx, targets, use_memory=False))
        if "token by token" in positions:
            losses.append(recurrent_losses(model, idx, targets, token_by_token=True))
        target_bytes = token_bytes[batch[:, 1:]]
        n_bytes += target_bytes.sum(0)
        nats += (torch.stack(losses).cpu().double() * (target_bytes > 0)).sum(1)

    # sums over all ranks
    if world_size > 1:
        sums = torch.cat([nats, n_bytes]).to(device)
        dist.all_reduce(sums)
        nats, n_bytes = sums[:-1].cpu(), sums[-1:].cpu()

    bits = nats / math.log(2)
    bpb, by_position = {}, {}
    for name, bits_of_name in zip(positions, bits):
        bytes_of_name = take(n_bytes, positions[name]).sum()
        if name.startswith("pass ") and bytes_of_name == 0:
            continue  # it computed no position of a very short text
        bpb[name] = (bits_of_name.sum() / bytes_of_name).item()
        if not name.startswith("pass "):
            by_position[name] = bits_of_name.numpy()
    by_position["bytes"] = n_bytes[0].numpy()
    return bpb, by_position

@torch.no_grad()
def evaluate_stability(model, rows, token_bytes, n_passes, batch_size, progress=None):
    """
    Is what the model decodes a fixed point of its passes? Runs n_passes over all positions of rows (N, T+1)
    int64, each of which reads the memories that the one before has left. Returns a dict: `bpb`, a list with
    that of every pass; `moved`, the root mean square by which its memories differ from those of the pass
    before (memories have RMS 1), None for the first; and `decode`, the BPB with the exact recurrence. The
    ranks share the rows.
    """
    device = model.wte.weight.device
    token_bytes = torch.as_tensor(token_bytes, dtype=torch.float64)
    rank, world_size = rank_and_world_size()
    mine = rows[rank::world_size]
    nats = torch.zeros(n_passes + 1, dtype=torch.float64)  # the last are those of decoding
    squares = torch.zeros(n_passes, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)  # of bytes, and of numbers in memories
    hide_bar = True if rank > 0 or not progress else None
    for start in tqdm(range(0, len(mine), batch_size), desc=progress, disable=hide_bar, leave=False):
        batch = mine[start:start + batch_size]
        idx = batch[:, :-1].to(device)
        targets = batch[:, 1:].to(device)
        target_bytes = token_bytes[batch[:, 1:]]

        def add(i, losses, counted=target_bytes > 0):
            nats[i] += (losses.cpu().double() * counted).sum()

        before = None
        for i, (_, hidden, memories) in enumerate(run(model, idx, [range(idx.size(1))] * n_passes)):
            add(i, model.token_loss(hidden, targets))
            (_, memory), = memories
            if before is not None:
                squares[i] += (memory.float() - before).square().sum().item()
            before = memory.float()
        add(n_passes, recurrent_losses(model, idx, targets))
        counts += torch.tensor([target_bytes.sum().item(), before.numel()], dtype=torch.float64)

    # sums over all ranks
    if world_size > 1:
        sums = torch.cat([nats, squares, counts]).to(device)
        dist.all_reduce(sums)
        nats, squares, counts = sums.cpu().split([n_passes + 1, n_passes, 2])
    *bpb, decode = (nats / math.log(2) / counts[0]).tolist()
    moved = (squares / counts[1]).sqrt().tolist()
    return dict(bpb=bpb, moved=[None, *moved[1:]], decode=decode)

# -----------------------------------------------------------------------------
# What training made of the memory's path

LEARNED_ROWS = 16  # rows that the mean gates are of

@torch.no_grad()
def learned(model, idx):
    """
    The scalars a, b, c of equation (1), a list over layers each; and by layer the gates of equation (2)
    (local, memory, token: those that the model has), their mean over tokens and heads while decoding idx
    (B, T) with the exact recurrence.
    """
    gates = {}

    def keep_gates_of(layer):
        def hook(attention, inputs):
            *_, arguments = attention.project(inputs[0])
            by_kind = 2 * torch.sigmoid(arguments.float()).unflatten(-1, (-1, model.config.n_kv_head))
            gates[layer] = by_kind.mean((0, 1, 3))
        return hook

    hooks = []
    for layer, block in enumerate(model.h):
        if block.attn.gate is not None:
            hooks.append(block.attn.register_forward_pre_hook(keep_gates_of(layer)))
    # what is kept is of prefill's last pass: over all positions, unless it had to end token by token
    prefill(model, idx, new_cache(model, *idx.shape))
    for hook in hooks:
        hook.remove()

    found = {}
    for name, scalars in (("a", model.resid_lambdas), ("b", model.x0_lambdas), ("c", model.mem_lambdas)):
        if scalars is not None:
            found[name] = scalars.tolist()
    kinds = ["local", "memory", "token"] if model.config.kv_memory else ["token"]
    found["gates"] = {layer: dict(zip(kinds, means.tolist())) for layer, means in gates.items()}
    return found

def describe_learned(found):
    """Two lines to show of what learned() found: the scalars and the mean gates, layer by layer."""
    def listed(name, values):
        return f"{name} " + " ".join(f"{x:.2f}" for x in values)

    scalars = [listed(name, found[name]) for name in ("a", "b", "c") if name in found]
    lines = ["learned, by layer: " + ", ".join(scalars)]
    gates = []
    for kind in ("local", "memory", "token"):
        of_kind = [means[kind] for means in found["gates"].values() if kind in means]
        if of_kind:
            gates.append(listed(kind, of_kind))
    if gates:
        lines.append("mean gates: " + ", ".join(gates))
    return lines


# -----------------------------------------------------------------------------
# Any text

def text_rows(tokenizer, files, text_key, T):
    """
    The documents of text files as rows (N, T+1) int64, and how many of the targets are tokens of the text,
    BOS included, before the padding of the last row. See the top of this file. Raises UserError for files
    that cannot be read or hold no text.
    """
    bos = tokenizer.encode_single_token(BOS)
    documents = []
    for path in files:
        for document in read_documents(path, text_key):
            documents.append(np.array([bos, *encode_text(tokenizer, document)]))
    if not documents:
        raise UserError(f"no text in {', '.join(map(str, files))}: every document is blank")
    n_targets = sum(map(len, documents)) - 1
    padding = np.full(-n_targets % T, bos)
    ids = torch.from_numpy(np.concatenate([*documents, padding]))
    return ids.unfold(0, T + 1, T), n_targets


# -----------------------------------------------------------------------------
# The command

PROMPTS = [
    "",
    "The capital of France is",
    "The opposite of hot is",
    "If yesterday was Friday, then tomorrow will be",
]

def print_by_position(by_position, T, print0):
    """Print a table of bits per byte by position: a column for each name, a row for each range of them."""
    names = [name for name in by_position if name != "bytes"]
    print0(f"{'positions':>16} " + "".join(f"{name:>15}" for name in names))
    for first, last in position_ranges(T):
        n_bytes = by_position["bytes"][first:last + 1].sum()
        if n_bytes == 0:  # a text that ends before
            continue
        figures = [f"{by_position[name][first:last + 1].sum() / n_bytes:15.4f}" for name in names]
        print0(f"{f'{first} .. {last}':>16} " + "".join(figures))

def open_run_data(args, path, checkpoint):
    """The data to score, by default what the run was trained on. Raises UserError."""
    folder = args.data or checkpoint["args"].get("data")
    if not folder:
        raise UserError(f"{path} does not say on which data it was trained: name some with --data")
    data = open_data(folder)
    if checkpoint["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise UserError(f"{path.parent} was trained with another tokenizer than that of {data.folder}: "
                        "give the run's own data with --data")
    return data

def check_finite(bpb):
    """Raise UserError for bits per byte, floats, that are no numbers, as of activations that overflow."""
    if not all(map(math.isfinite, bpb)):
        raise UserError("the model's losses are not finite: use an older checkpoint, or train again")

def report_bpb(args, path, checkpoint, model, print0):
    """Print bits per byte of each split, and return them as a dict for --json. Raises UserError."""
    data = open_run_data(args, path, checkpoint)
    schedule = Schedule(**checkpoint["schedule"])
    T = model.config.sequence_len
    results = {}
    for split in ("train", "val") if args.split == "both" else (args.split,):
        rows = first_rows(getattr(data, split), T, args.rows)
        if not len(rows):
            raise UserError(f"{data.folder} has no {split} shard of more than {T} tokens, one row")

        # in parallel
        bpb, by_position = evaluate_bpb(model, rows, data.token_bytes, schedule, args.batch_size,
                                        progress=split)
        check_finite(bpb.values())
        figures = ", ".join(f"{name} {x:.4f}" for name, x in bpb.items())
        print0(f"\n{split}, {len(rows)} rows in parallel: {figures}")
        results[split] = {"rows": len(rows), "bpb": bpb}

        # decoding, of fewer rows
        if args.decode_rows:
            rows = rows[:args.decode_rows]
            bpb, by_position = evaluate_bpb(model, rows, data.token_bytes, schedule, args.batch_size,
                                            decode=True, token_by_token=args.referee,
                                            progress=f"{split}, decoding")
            check_finite(bpb.values())
            figures = ", ".join(f"{name} {x:.4f}" for name, x in bpb.items())
            print0(f"{split}, {len(rows)} rows decoded:     {figures}")
            results[split] |= {"decode_rows": len(rows), "decode_bpb": bpb}

        # by position, of the rows that were scored last
        print_by_position(by_position, T, print0)
        rounded = {name: [round(float(x), 4) for x in column] for name, column in by_position.items()}
        results[split]["by_position"] = rounded
    return results

def report_stability(args, path, checkpoint, model, print0):
    """Print the BPB after one pass, two, .., and while decoding; returns evaluate_stability()'s dict."""
    data = open_run_data(args, path, checkpoint)
    split = "train" if args.split == "train" else "val"
    rows = first_rows(getattr(data, split), model.config.sequence_len, max(args.decode_rows, 1))
    if not len(rows):
        raise UserError(f"{data.folder} has no {split} shard of more than one row of the context")
    found = evaluate_stability(model, rows, data.token_bytes, args.passes, args.batch_size, "stability")
    check_finite([*found["bpb"], found["decode"]])
    print0(f"\n{split}, {len(rows)} rows, pass after pass:\n{'passes':>8} {'bpb':>10} {'memory moved':>14}")
    for i, (bpb, moved) in enumerate(zip(found["bpb"], found["moved"]), 1):
        if i <= 6 or i % 5 == 0 or i == args.passes:
            print0(f"{i:8} {bpb:10.4f} " + ("" if moved is None else f"{moved:14.2e}"))
    print0(f"{'decoding':>8} {found['decode']:10.4f}")
    return found | dict(split=split, rows=len(rows))

def report_text(args, checkpoint, model, tokenizer, print0):
    """Print bits per byte of all files of --text together, and return them as a dict. Raises UserError."""
    rows, n_targets = text_rows(tokenizer, args.files, args.text_key, model.config.sequence_len)
    schedule = Schedule(**checkpoint["schedule"])
    bpb, by_position = evaluate_bpb(model, rows, token_bytes(tokenizer), schedule, args.batch_size,
                                    decode=True, token_by_token=args.referee, progress="text")
    check_finite(bpb.values())
    n_bytes = int(by_position["bytes"].sum())
    figures = ", ".join(f"{name} {x:.4f}" for name, x in bpb.items())
    print0(f"\ntext, {n_bytes} bytes in {len(rows)} rows: {figures}")
    print_by_position(by_position, model.config.sequence_len, print0)
    return {"bytes": n_bytes, "tokens": n_targets, "rows": len(rows), "bpb": bpb}

def load_other(args, checkpoint, model, device):
    """
    What load_run() returns for --against; None without it. Raises UserError if there is nothing that the
    tokens of this model can be compared with.
    """
    if args.against is None:
        if not model.config.recurrent_memory:
            raise UserError("this model has no recurrent memory to leave out: "
                            "give another run to compare it with, --against RUN")
        return None
    other = load_run(args.against, device)
    if other[1]["tokenizer_sha256"] != checkpoint["tokenizer_sha256"]:
        raise UserError(f"{other[0]} has another tokenizer: only runs with the same one can be compared, "
                        "token by token")
    return other

def report_tokens(args, path, checkpoint, model, tokenizer, other, print0):
    """
    Write the page of --html (see tokens_page.py), print the summary in it, and return it as a list of dicts.
    other: what load_run() returned for --against, or None. Raises UserError.
    """
    # the windows: those of the smaller context, if there are two
    T = model.config.sequence_len
    if other:
        T = min(T, other[3].config.sequence_len)
    rows, n_targets = text_rows(tokenizer, args.files, args.text_key, T)
    about = f"{path}, step {checkpoint['step']}, {model.config.label}"
    if n_targets > MAX_TOKENS:
        rows = rows[:math.ceil(MAX_TOKENS / T)]
        about += f"; the first {MAX_TOKENS} of {n_targets} tokens"
        print0(f"\nthe page has the first {MAX_TOKENS} of {n_targets} tokens")
        n_targets = MAX_TOKENS

    # what is compared with what
    labels = {"memory": "with memory" if model.config.recurrent_memory else "this run"}
    ways = {"memory": score_tokens(model, rows, args.batch_size)}
    if model.config.recurrent_memory:
        is_zero = model.config.first_memory == "zero"
        labels["no memory"] = "memory zero" if is_zero else "the first memory only"
        ways["no memory"] = score_tokens(model, rows, args.batch_size, use_memory=False)
    if other:
        other_path, other_checkpoint, _, other_model = other
        labels["against"] = f"{other_path.absolute().parent.name}, step {other_checkpoint['step']}"
        about += f"; against {other_path}, step {other_checkpoint['step']}, {other_model.config.label}"
        ways["against"] = score_tokens(other_model, rows, args.batch_size)
    if not all(nats.isfinite().all() for nats, _, _ in ways.values()):
        raise UserError("losses are not finite: there is nothing to compare")

    # the page, and its summary
    bos = tokenizer.encode_single_token(BOS)
    data = page_data(tokenizer, rows, n_targets, bos, ways, token_bytes(tokenizer),
                     dict(text=about, labels=labels))
    page = make_page(data).encode()
    write_atomic(args.html, lambda f: f.write(page))
    print0(f"\n{args.html}: {n_targets} tokens, {len(page) / 1e6:.1f} MB")
    print0(f"{'nats a token':>24} {'tokens':>8} " + "".join(f"  {labels[way]:>12}" for way in ways))
    for group in data["groups"]:
        figures = [f"  {group['nats'][way]:{max(len(labels[way]), 12)}.4f}" for way in ways]
        print0(f"{group['name']:>24} {group['tokens']:>8} " + "".join(figures))
    return data["groups"]

def report_core(args, path, checkpoint, model, tokenizer, tasks, print0):
    """Print the table of CORE's tasks, and return evaluate_core()'s dict. Raises UserError."""
    results = evaluate_core(model, tokenizer, tasks, path.parent, checkpoint["step"], args.max_per_task,
                            use_memory=not args.no_memory, batch_size=args.batch_size)
    print0("\n| task | shots | n | accuracy | standard error | centered |")
    print0("|---|---:|---:|---:|---:|---:|")
    for name, t in results["tasks"].items():
        n = f"{t['n']} of {t['of']}" if t["n"] < t["of"] else t["n"]
        figures = f"{t['accuracy']:.4f} | {t['stderr']:.4f} | {t['centered']:.4f}"
        print0(f"| {name} | {t['shots']} | {n} | {figures} |")
    print0(describe_core(results))
    return results

def sample_prompts(tokenizer, context):
    """The token ids of PROMPTS, a list of lists. Raises UserError if they do not fit into the context."""
    encoded = encode_prompts(tokenizer, PROMPTS, math.inf)
    longest = max(map(len, encoded))
    if longest > context:
        raise UserError(f"--eval sample has prompts of up to {longest} tokens, the context of this model is "
                        f"{context}: leave sample out")
    return encoded

def report_samples(args, model, tokenizer, encoded, print0):
    """Print greedy continuations of PROMPTS, and return them as a dict from prompt to text."""
    texts = complete(model, tokenizer, encoded, 32, temperature=0, use_memory=not args.no_memory)
    for prompt, text in zip(PROMPTS, texts):
        print0(f"\n{prompt}{text}")
    return dict(zip(PROMPTS, texts))

def main():
    args = parse_args()
    device, rank, _ = init_processes(args.device)
    print0 = print if rank == 0 else lambda *_: None
    path, checkpoint, tokenizer, model = load_run(args.checkpoint, device)
    print0(f"{path}, step {checkpoint['step']}, {model.config.label}, {checkpoint['schedule']['kind']}, "
           f"context {model.config.sequence_len}")

    results = {"checkpoint": str(path), "step": checkpoint["step"]}
    wanted = args.eval.split(",")
    # what cannot work is said before the work
    if "core" in wanted:
        tasks = load_tasks(args.bundle, None if args.tasks is None else args.tasks.split(","))
    if "sample" in wanted:
        encoded = sample_prompts(tokenizer, model.config.sequence_len)
    if "stability" in wanted and not model.config.recurrent_memory:
        raise UserError(f"{path} has no recurrence ({model.config.label}), so one pass is all there is: "
                        "leave stability out")
    other = None
    if "tokens" in wanted:
        other = load_other(args, checkpoint, model, device)
    if "bpb" in wanted and args.text:
        results["text"] = report_text(args, checkpoint, model, tokenizer, print0)
    elif "bpb" in wanted:
        results |= report_bpb(args, path, checkpoint, model, print0)
    if "stability" in wanted:
        results["stability"] = report_stability(args, path, checkpoint, model, print0)
    if "tokens" in wanted and rank == 0:
        results["tokens"] = report_tokens(args, path, checkpoint, model, tokenizer, other, print0)
    if "core" in wanted:
        results["core"] = report_core(args, path, checkpoint, model, tokenizer, tasks, print0)
    if "sample" in wanted and rank == 0:
        results["samples"] = report_samples(args, model, tokenizer, encoded, print0)
    if args.json and rank == 0:
        write_atomic(args.json, lambda f: f.write(json.dumps(results, indent=1).encode()))
    end_processes()

if __name__ == "__main__":
    run_main(main)
