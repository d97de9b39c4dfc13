"""
Score a checkpoint: bits per byte (BPB), CORE, samples, or any of them.

    python eval_core.py                                # BPB of the newest run, on the data it was trained on
    python eval_core.py --checkpoint runs/d4_shared --eval bpb,core,sample
    torchrun --standalone --nproc_per_node=8 eval_core.py --eval core

Bits per byte are measured in two ways. In parallel, as in training: for each pass of the schedule, and
`merged`, where every position is scored by the last pass that computed it. And decoding, as the model
generates, with the exact recurrence: by parallel prefill, and with --referee also token by token. CORE is in
core.py.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import math

from common import (
    ArgumentParser,
    UserError,
    at_least,
    check_command_line,
    check_folder,
    end_processes,
    init_processes,
    rank_and_world_size,
    run_main,
    write_atomic,
)

# -----------------------------------------------------------------------------
# Flags

def parse_args():
    """The command line, checked. Raises UserError."""
    parser = ArgumentParser(
        description="Bits per byte, CORE and samples of a trained run, with the memory that it really has.")
    parser.add_argument("--checkpoint", metavar="PATH",
                        help="run folder or checkpoint file (default: the newest in runs/)")
    parser.add_argument("--eval", default="bpb", metavar="A,B", help="what to run: any of bpb,core,sample")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of the context's length at a time")
    parser.add_argument("--no-memory", action="store_true",
                        help="core, sample: keep the memory at zero, as the authors score")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")

    g = parser.add_argument_group("bpb")
    g.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    g.add_argument("--split", choices=["train", "val", "both"], default="both", help="which text to score")
    g.add_argument("--rows", type=int, default=256,
                   help="rows of the context's length scored in parallel, per split")
    g.add_argument("--decode-rows", type=int, default=64,
                   help="rows of them scored with the exact recurrence, 0: none")
    g.add_argument("--referee", action="store_true",
                   help="score these token by token, too: the same figure, slowly")

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
    at_least(args, rows=1, decode_rows=0, batch_size=1, max_per_task=1)
    check_folder(args.json)
    if not set(args.eval.split(",")) <= {"bpb", "core", "sample"}:
        raise UserError(f"--eval {args.eval}: choose from bpb,core,sample")
    return args

if __name__ == "__main__":  # --help does not wait for what follows
    check_command_line(parse_args)

import torch
import torch.distributed as dist
from tqdm import tqdm

from attention import take
from core import describe_core, evaluate_core, load_tasks
from dataset import first_rows, open_data
from interleave import Schedule, decode_tokens, pass_losses, prefill
from sample import complete, encode_prompts, load_run, new_cache

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
    passes = schedule.passes(T) if schedule.kind in ("interleaved", "refine") else []

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
        bpb[name] = (bits_of_name.sum() / take(n_bytes, positions[name]).sum()).item()
        if not name.startswith("pass "):
            by_position[name] = bits_of_name.numpy()
    by_position["bytes"] = n_bytes[0].numpy()
    return bpb, by_position


# -----------------------------------------------------------------------------
# The command

PROMPTS = [
    "",
    "The capital of France is",
    "The opposite of hot is",
    "If yesterday was Friday, then tomorrow will be",
]

def print_by_position(by_position, T, print0):
    """
    Print a table of bits per byte by position: a column for each name, a row for each range of positions.
    The ranges double, because BPB falls with the logarithm of the position.
    """
    names = [name for name in by_position if name != "bytes"]
    print0(f"{'positions':>16} " + "".join(f"{name:>15}" for name in names))
    edges = [0] + [T >> i for i in range(7, -1, -1) if T >> i]
    for low, high in zip(edges, edges[1:]):
        n_bytes = by_position["bytes"][low:high].sum()
        figures = [f"{by_position[name][low:high].sum() / n_bytes:15.4f}" for name in names]
        print0(f"{f'{low} .. {high - 1}':>16} " + "".join(figures))

def report_bpb(args, path, checkpoint, model, print0):
    """Print bits per byte of each split, and return them as a dict for --json. Raises UserError."""
    data = open_data(args.data or checkpoint["args"]["data"])
    if checkpoint["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise UserError(f"{path.parent} was trained with another tokenizer than that of {data.folder}: "
                        "give the run's own data with --data")
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
        figures = ", ".join(f"{name} {x:.4f}" for name, x in bpb.items())
        print0(f"\n{split}, {len(rows)} rows in parallel: {figures}")
        results[split] = {"rows": len(rows), "bpb": bpb}

        # decoding, of fewer rows
        if args.decode_rows:
            rows = rows[:args.decode_rows]
            bpb, by_position = evaluate_bpb(model, rows, data.token_bytes, schedule, args.batch_size,
                                            decode=True, token_by_token=args.referee,
                                            progress=f"{split}, decoding")
            figures = ", ".join(f"{name} {x:.4f}" for name, x in bpb.items())
            print0(f"{split}, {len(rows)} rows decoded:     {figures}")
            results[split] |= {"decode_rows": len(rows), "decode_bpb": bpb}

        # by position, of the rows that were scored last
        print_by_position(by_position, T, print0)
        rounded = {name: [round(float(x), 4) for x in column] for name, column in by_position.items()}
        results[split]["by_position"] = rounded
    return results

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
    if "bpb" in wanted:
        results |= report_bpb(args, path, checkpoint, model, print0)
    if "core" in wanted:
        results["core"] = report_core(args, path, checkpoint, model, tokenizer, tasks, print0)
    if "sample" in wanted and rank == 0:
        results["samples"] = report_samples(args, model, tokenizer, encoded, print0)
    if args.json and rank == 0:
        write_atomic(args.json, lambda f: f.write(json.dumps(results, indent=1).encode()))
    end_processes()

if __name__ == "__main__":
    run_main(main)
