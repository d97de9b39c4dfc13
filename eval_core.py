"""
Score a checkpoint: bits per byte, CORE, samples, or any of them.

    python eval_core.py                                # BPB of the newest run, on the data it was trained on
    python eval_core.py --checkpoint runs/d4_shared --eval bpb,core,sample
    torchrun --standalone --nproc_per_node=8 eval_core.py --eval core

Bits per byte come in parallel, as in training (per pass, and merged: every position scored by the last pass that computed
it), and decoding, with the exact recurrence (by parallel prefill; --referee also token by token). CORE is core.py.
"""

import json
import math

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from core import BUNDLE, describe_core, evaluate_core, load_tasks
from interleave import Schedule, pass_losses, prefill
from model import KVCache, take
from prepare_data import ArgumentParser, UserError, at_least, check_folder, load_tokenizer, open_data, run_main, write_atomic
from sample import complete, find_checkpoint, join_processes, load_checkpoint, load_model


# -----------------------------------------------------------------------------
# Bits per byte

def first_rows(shards, T, n):
    """The first n rows (fewer if there are fewer) of T+1 tokens, T apart, of a list of token arrays: (rows, T+1) int64."""
    rows = []
    for shard in shards:
        count = min((len(shard) - 1) // T, n - len(rows))
        rows += [np.asarray(shard[r * T:r * T + T + 1]).astype(np.int64) for r in range(count)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, T + 1, dtype=torch.int64)

@torch.no_grad()
def recurrent_losses(model, idx, targets, token_by_token=False, use_memory=True):
    """
    Losses (B, T) in nats with the exact recurrence, as the model decodes: idx, targets (B, T). By parallel prefill, or
    token by token through the same cache, its referee; use_memory=False decodes with the memory at zero.
    """
    kv = KVCache(model.config, *idx.shape, idx.device, model.compute_dtype or model.wte.weight.dtype)
    if not use_memory:
        return model.token_loss(model(idx, range(idx.size(1)), kv)[0], targets)
    if not token_by_token:
        return model.token_loss(prefill(model, idx, kv)[0], targets)
    memory, losses = None, []
    for t in range(idx.size(1)):
        hidden, source = model(idx[:, t:t + 1], range(t, t + 1), kv, memory)
        memory = source if model.config.lrt != "none" else None
        losses.append(model.token_loss(hidden, targets[:, t:t + 1]))
    return torch.cat(losses, dim=1)

@torch.no_grad()
def evaluate_bpb(model, rows, token_bytes, schedule, batch_size, decode=False, token_by_token=False, progress=None):
    """
    Bits per byte of rows (N, T+1) int64, token_bytes (V,) bytes of each token. Returns
    - bpb: a dict of floats: `pass 0` (initialization), `pass 1`, .. (for schedules of a few passes), each over the
      positions it computed; `merged`; with decode also `decode` (exact recurrence, by parallel prefill) and, for an LRT,
      `no memory` (the same model with memory zero); with token_by_token also that, decode's referee;
    - by_position: bits by position, float64 (T,), of everything but the passes, and `bytes` (T,), how many were predicted.
    BPB = nats / (ln 2 * bytes); targets of zero bytes (BOS) do not count. In train.py under torchrun the ranks share the rows.
    """
    device, T = model.wte.weight.device, rows.size(1) - 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    passes = schedule.passes(T) if schedule.kind in ("interleaved", "refine") else []
    whole = ["merged"] + ["decode"] * decode + ["no memory"] * (decode and model.config.lrt != "none") + ["token by token"] * token_by_token
    names = [f"pass {i}" for i in range(len(passes))] + whole
    nats, n_bytes = torch.zeros(len(names), T, dtype=torch.float64), torch.zeros(1, T, dtype=torch.float64)
    token_bytes, mine = torch.as_tensor(token_bytes, dtype=torch.float64), rows[rank::world]
    for start in tqdm(range(0, len(mine), batch_size), desc=progress, disable=True if rank or not progress else None, leave=False):
        batch = mine[start:start + batch_size]
        idx, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)
        losses, _, merged = pass_losses(model, idx, targets, schedule)
        scored = [*losses[:len(passes)], merged]
        if decode:
            scored.append(recurrent_losses(model, idx, targets))
        if "no memory" in whole:
            scored.append(recurrent_losses(model, idx, targets, use_memory=False))
        if token_by_token:
            scored.append(recurrent_losses(model, idx, targets, token_by_token=True))
        counted = token_bytes[batch[:, 1:]]
        n_bytes += counted.sum(0)
        nats += (torch.stack(scored).cpu().double() * (counted > 0)).sum(1)
    if world > 1:
        total = torch.cat([nats, n_bytes]).to(device)
        dist.all_reduce(total)
        nats, n_bytes = total[:-1].cpu(), total[-1:].cpu()
    bits = nats / math.log(2)
    where = dict(zip(names, passes)) | {name: range(T) for name in whole}
    bpb = {name: (bits[i].sum() / take(n_bytes, positions).sum()).item() for i, (name, positions) in enumerate(where.items())}
    return bpb, {name: bits[names.index(name)].numpy() for name in whole} | {"bytes": n_bytes[0].numpy()}


# -----------------------------------------------------------------------------
# The command

PROMPTS = ["", "The capital of France is", "The opposite of hot is", "If yesterday was Friday, then tomorrow will be"]

def report_bpb(args, path, checkpoint, model, say):
    """Print bits per byte of each split and return them, a dict to be written as JSON. Raises UserError."""
    data = open_data(args.data or checkpoint["args"]["data"])
    if checkpoint["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise UserError(f"{path.parent} was trained with another tokenizer than that of {data.folder}: "
                        "give the run's own data with --data")
    schedule, T, results = Schedule(**checkpoint["schedule"]), model.config.sequence_len, {}
    for split in ("train", "val") if args.split == "both" else (args.split,):
        rows = first_rows(getattr(data, split), T, args.rows)
        if not len(rows):
            raise UserError(f"{data.folder} has no {split} shard of more than {T} tokens, one row")
        bpb, at = evaluate_bpb(model, rows, data.token_bytes, schedule, args.batch_size, progress=split)
        say(f"\n{split}, {len(rows)} rows in parallel: " + ", ".join(f"{name} {x:.4f}" for name, x in bpb.items()))
        results[split] = {"rows": len(rows), "bpb": bpb}
        if args.decode_rows:
            rows = rows[:args.decode_rows]
            bpb, at = evaluate_bpb(model, rows, data.token_bytes, schedule, args.batch_size, True, args.referee, f"{split}, decoding")
            results[split] |= {"decode_rows": len(rows), "decode_bpb": bpb}
            say(f"{split}, {len(rows)} rows decoded:     " + ", ".join(f"{name} {x:.4f}" for name, x in bpb.items()))
        edges = [0] + [T >> i for i in range(7, -1, -1) if T >> i]  # doubling: BPB falls with the logarithm of the position
        columns = [name for name in at if name != "bytes"]
        say(f"{'positions':>16} " + "".join(f"{name:>15}" for name in columns))
        for lo, hi in zip(edges, edges[1:]):
            say(f"{f'{lo} .. {hi - 1}':>16} " + "".join(f"{at[name][lo:hi].sum() / at['bytes'][lo:hi].sum():15.4f}" for name in columns))
        results[split]["by_position"] = {name: [round(float(v), 4) for v in x] for name, x in at.items()}
    return results

def report_core(args, path, checkpoint, model, tokenizer, say):
    """Print the table of CORE's tasks and return evaluate_core()'s dict."""
    tasks = load_tasks(args.bundle, args.tasks and args.tasks.split(","))
    results = evaluate_core(model, tokenizer, tasks, path.parent, checkpoint["step"], args.max_per_task, not args.no_memory, args.batch_size)
    say("\n| task | shots | n | accuracy | standard error | centered |\n|---|---:|---:|---:|---:|---:|")
    for name, t in results["tasks"].items():
        of = f" of {t['of']}" if t["n"] < t["of"] else ""
        say(f"| {name} | {t['shots']} | {t['n']}{of} | {t['accuracy']:.4f} | {t['stderr']:.4f} | {t['centered']:.4f} |")
    say(describe_core(results))
    return results

def report_samples(args, model, tokenizer, say):
    """Print and return greedy continuations of a few prompts."""
    bos = tokenizer.encode_single_token("<|bos|>")
    texts = complete(model, tokenizer, [[bos] + tokenizer.encode_ordinary(p) for p in PROMPTS], 32, temperature=0, use_memory=not args.no_memory)
    for prompt, text in zip(PROMPTS, texts):
        say(f"\n{prompt}{text}")
    return dict(zip(PROMPTS, texts))

def main():
    parser = ArgumentParser(description="Bits per byte, CORE and samples of a trained run, with the memory that it really has.")
    parser.add_argument("--checkpoint", metavar="PATH", help="run folder or checkpoint file (default: the newest in runs/)")
    parser.add_argument("--eval", default="bpb", metavar="A,B", help="what to run: any of bpb,core,sample")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of the context's length at a time")
    parser.add_argument("--no-memory", action="store_true", help="core, sample: keep the memory at zero, as the authors score")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    g = parser.add_argument_group("bpb")
    g.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    g.add_argument("--split", choices=["train", "val", "both"], default="both", help="which text to score")
    g.add_argument("--rows", type=int, default=256, help="rows of the context's length scored in parallel, per split")
    g.add_argument("--decode-rows", type=int, default=64, help="rows of them scored with the exact recurrence, 0: none")
    g.add_argument("--referee", action="store_true", help="score these token by token, too: the same figure, slowly")
    g = parser.add_argument_group("core", "results go to core_<step>.json and .csv in the run folder; a second call goes on with the tasks that are missing")
    g.add_argument("--bundle", metavar="DIR", help=f"folder with core.yaml (default: {BUNDLE}, downloaded once)")
    g.add_argument("--tasks", metavar="A,B", help="run only these")
    g.add_argument("--max-per-task", type=int, metavar="N", help="run only so many examples of each: an estimate")
    args = parser.parse_args()
    at_least(args, rows=1, decode_rows=0, batch_size=1, max_per_task=1)
    check_folder(args.json)
    wanted = args.eval.split(",")
    if not set(wanted) <= {"bpb", "core", "sample"}:
        raise UserError(f"--eval {args.eval}: choose from bpb,core,sample")
    path = find_checkpoint(args.checkpoint)
    checkpoint = load_checkpoint(path)
    tokenizer = load_tokenizer(path.parent)
    device, rank, _ = join_processes(args.device)
    say = print if rank == 0 else lambda *_: None
    model = load_model(checkpoint, device)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"the tokenizer in {path.parent} has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}: "
                        "they are not of one run")
    say(f"{path}, step {checkpoint['step']}, {model.config.label}, {checkpoint['schedule']['kind']}, context {model.config.sequence_len}")
    results = {"checkpoint": str(path), "step": checkpoint["step"]}
    if "bpb" in wanted:
        results |= report_bpb(args, path, checkpoint, model, say)
    if "core" in wanted:
        results["core"] = report_core(args, path, checkpoint, model, tokenizer, say)
    if "sample" in wanted and rank == 0:
        results["samples"] = report_samples(args, model, tokenizer, say)
    if args.json and rank == 0:
        write_atomic(args.json, lambda f: f.write(json.dumps(results, indent=1).encode()))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main)
