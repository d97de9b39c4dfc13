"""
Timings and counts, measured side by side in one process: the variants take turns, and medians are compared.

    python bench.py decode                                   latency a token of none, shared and layerwise
    python bench.py prefill --checkpoint runs/d4_shared      exact parallel prefill against token by token
    python bench.py core --bundle DIR                        CORE in batches against one example at a time

Every command prints a table and, with --json FILE, writes the same figures with the machine and the commit.
"""

import json
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

from core import batches, load_tasks, make_example, score
from eval_core import first_rows
from interleave import prefill
from model import GPT, GPTConfig, KVBuffer, KVCache
from prepare_data import ArgumentParser, UserError, at_least, check_folder, load_tokenizer, open_data, run_main, write_atomic
from sample import compute_dtype, find_checkpoint, load_checkpoint, load_model, pick_device


def machine(device):
    """Where and on what this was measured: a dict of strings."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
                torch=torch.__version__, commit=commit.stdout.strip() or "unknown", date=str(date.today()))

def clock(device, work):
    """Seconds that work() takes, the device's queue included."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    t0 = time.perf_counter()
    work()
    sync()
    return time.perf_counter() - t0

def report(args, device, title, rows):
    """Print the rows (dicts with the same keys) as a table, and write them to --json."""
    where = machine(device)
    print(f"{title} | " + " | ".join(where.values()))
    columns = list(rows[0])
    cells = [columns] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for n, row in enumerate(cells):
        print("| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths)) + " |")
        if n == 0:
            print("|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    if args.json:
        write_atomic(args.json, lambda f: f.write(json.dumps(dict(title=title, **where, rows=rows), indent=1).encode()))

@torch.no_grad()
def bench_decode(args, device):
    """Milliseconds a token at a given batch and context: one forward, logits and argmax, on a cache that is full up to there."""
    models = {}
    for lrt in ("none", "shared", "layerwise"):
        torch.manual_seed(0)
        heads = max(args.width // 64, 1)
        with torch.device(device):
            models[lrt] = GPT(GPTConfig(sequence_len=max(args.context), vocab_size=args.vocab_size, n_layer=args.depth, n_head=heads,
                                        n_kv_head=heads, n_embd=args.width, lrt=lrt))
        models[lrt].compute_dtype = compute_dtype(device)
    rows = []
    for batch in args.batch:
        for context in args.context:
            steps = {}
            for lrt, model in models.items():
                kv = KVCache(model.config, batch, context, device, model.compute_dtype, rolling=True)
                for tensor in kv.k + kv.v:
                    tensor.normal_()
                state = dict(token=torch.zeros(batch, 1, dtype=torch.int64, device=device), memory=None)
                def step(model=model, kv=kv, state=state, t=context - 1):
                    hidden, source = model(state["token"], range(t, t + 1), kv, state["memory"])
                    state["memory"] = source if model.config.lrt != "none" else None
                    state["token"] = model.logits(hidden).argmax(-1)
                steps[lrt] = step
                step(), step()
            times = {lrt: [] for lrt in steps}
            for _ in range(args.repeats):  # taking turns: what the machine does beside this hits all of them
                for lrt, step in steps.items():
                    times[lrt].append(1000 * clock(device, lambda: [step() for _ in range(args.tokens)]) / args.tokens)
            for lrt in times:
                quartiles = statistics.quantiles(times[lrt], n=4)
                ratio = statistics.median(a / b for a, b in zip(times[lrt], times["none"]))
                rows.append(dict(batch=batch, context=context, lrt=lrt, ms_per_token=statistics.median(times[lrt]),
                                 quartiles=f"{quartiles[0]:.3f}-{quartiles[2]:.3f}", over_none=round(ratio, 3)))
    report(args, device, f"decode: depth {args.depth}, width {args.width}, vocabulary {args.vocab_size}", rows)

@torch.no_grad()
def bench_prefill(args, device):
    """Sweeps and seconds of exact parallel prefill against token by token on validation text, and how far apart they end."""
    rows = []
    for path in map(find_checkpoint, args.checkpoint or [None]):
        checkpoint = load_checkpoint(path)
        model, data = load_model(checkpoint, device), open_data(args.data or checkpoint["args"]["data"], verify=False)
        config, dtype = model.config, model.compute_dtype or model.wte.weight.dtype
        lengths = [n for n in (128, 256, 512, 1024, 2048, 4096) if n < config.sequence_len] + [config.sequence_len]
        for T in lengths:
            idx = first_rows(data.val, T, args.batch[0])[:, :T].to(device)
            def decode():
                kv, memory = KVCache(config, len(idx), T, device, dtype), None
                for t in range(T):
                    hidden, source = model(idx[:, t:t + 1], range(t, t + 1), kv, memory)
                    memory = source if config.lrt != "none" else None
                return model.logits(hidden)
            def parallel(subsets, result):
                hidden, _, result[subsets] = prefill(model, idx, KVCache(config, len(idx), T, device, dtype), subsets)
                return model.logits(hidden[:, -1:])
            sweeps, exact = {}, decode()
            error = {S: (parallel(S, sweeps) - exact).abs().max().item() for S in args.subsets}
            serial, times = [], {S: [] for S in args.subsets}
            for _ in range(args.repeats):
                serial.append(clock(device, decode))
                for S in args.subsets:
                    times[S].append(clock(device, lambda: parallel(S, sweeps)))
            for S in args.subsets:
                rows.append(dict(run=path.parent.name, T=T, S=S, sweeps=sweeps[S], seconds=statistics.median(times[S]),
                                 token_by_token=statistics.median(serial), error=error[S],
                                 speedup=statistics.median(a / b for a, b in zip(serial, times[S]))))
    report(args, device, f"prefill: batch {args.batch[0]}", rows)

@torch.no_grad()
def one_at_a_time(model, example, use_memory):
    """The field's habit: one forward over all choices of an example, padded on the right, and the losses of all positions."""
    rows = [torch.cat([torch.from_numpy(example.prefix), torch.from_numpy(tail)]) for tail in example.tails]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.wte.weight.device)
    if use_memory:
        kv = KVCache(model.config, *idx.shape, idx.device, model.compute_dtype or model.wte.weight.dtype)
        hidden, _, _ = prefill(model, idx, kv)
    else:
        hidden, _ = model(idx, range(idx.size(1)), KVBuffer(model.config.n_layer))
    logits = model.logits(hidden[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    means = [losses[c, start - 1:len(row) - 1].mean().item() for c, (row, start) in enumerate(zip(rows, example.starts))]
    return means, logits.argmax(-1)

@torch.no_grad()
def bench_core(args, device):
    """
    Examples a second of every CORE task in the bundle, in batches and one at a time, on the same examples and taking turns.
    Tokenizing is not counted on either side. The last rows are all tasks, each weighed with all the examples it has.
    """
    path = find_checkpoint(args.checkpoint and args.checkpoint[0])
    checkpoint = load_checkpoint(path)
    model, tokenizer, tasks = load_model(checkpoint, device), load_tokenizer(path.parent), load_tasks(args.bundle)
    context, rows, totals = model.config.sequence_len, [], {}
    for task in tasks:
        examples = [make_example(task, i, tokenizer, context) for i in range(min(args.examples, len(task.examples)))]
        for use_memory in (True, False) if model.config.lrt != "none" else (False,):
            def alone():
                found["alone"] = [loss for e in few for loss in one_at_a_time(model, e, use_memory)[0]]
            def batched():
                scored = {e.index: x for batch in batches(examples, args.batch[0] * context)
                          for e, x in zip(batch, score(model, batch, use_memory))}
                found["batched"] = [loss for e in few for loss in scored[e.index][0]]
            few, found, times = examples[:args.alone], {}, []
            for _ in range(args.repeats):  # taking turns
                times.append((clock(device, alone) / len(few), clock(device, batched) / len(examples)))
            slow, fast = (statistics.median(x) for x in zip(*times))
            apart = max(abs(a - b) for a, b in zip(*found.values()))
            rows.append(dict(task=task.name, memory=use_memory, one_at_a_time=1 / slow, batched=1 / fast,
                             speedup=statistics.median(a / b for a, b in times), apart=apart))
            n, alone_s, batched_s, most = totals.get(use_memory, (0, 0.0, 0.0, 0.0))
            totals[use_memory] = (n + len(task.examples), alone_s + slow * len(task.examples), batched_s + fast * len(task.examples),
                                  max(most, apart))
    for use_memory, (n, slow, fast, apart) in totals.items():
        rows.append(dict(task="all", memory=use_memory, one_at_a_time=n / slow, batched=n / fast, speedup=slow / fast, apart=apart))
    report(args, device, f"core: {path.parent.name}, context {context}, examples a second, batches of {args.batch[0]} rows", rows)

def main():
    parser = ArgumentParser(description="Timings and counts, measured side by side in one process.")
    parser.add_argument("what", choices=["decode", "prefill", "core"], help="decode: latency a token; prefill: parallel against token by token; core: in batches against one at a time")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each variant, taking turns")
    parser.add_argument("--batch", type=int, nargs="+", help="rows at a time (default: 1 16 for decode, 1 for prefill, 64 of the context's length for core)")
    parser.add_argument("--depth", type=int, default=6, help="decode: layers")
    parser.add_argument("--width", type=int, default=768, help="decode: width, heads of 64")
    parser.add_argument("--vocab-size", type=int, default=32768, help="decode: vocabulary")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="decode: positions in the cache")
    parser.add_argument("--tokens", type=int, default=8, help="decode: tokens a measurement")
    parser.add_argument("--checkpoint", nargs="+", metavar="PATH", help="prefill, core: trained runs, core takes one (default: the newest in runs/)")
    parser.add_argument("--data", metavar="DIR", help="prefill: prepared data (default: what the run was trained on)")
    parser.add_argument("--subsets", type=int, nargs="+", default=[1, 2, 4], help="prefill: subsets a sweep")
    parser.add_argument("--bundle", metavar="DIR", help="core: folder with core.yaml (default: downloaded once)")
    parser.add_argument("--examples", type=int, default=64, help="core: examples of each task that go through in batches")
    parser.add_argument("--alone", type=int, default=8, help="core: examples of them that go through one at a time")
    args = parser.parse_args()
    at_least(args, repeats=2, depth=1, width=2, vocab_size=1, tokens=1, examples=1, alone=1)
    check_folder(args.json)
    args.batch = args.batch or {"decode": [1, 16], "prefill": [1], "core": [64]}[args.what]
    if min(args.batch + args.context + args.subsets) < 1:
        raise UserError("--batch, --context and --subsets must be at least 1")
    device = pick_device(args.device)
    {"decode": bench_decode, "prefill": bench_prefill, "core": bench_core}[args.what](args, device)

if __name__ == "__main__":
    run_main(main)
