"""
Timings and counts, measured side by side in one process: the variants take turns, and medians are compared.

    python bench.py decode                                   latency a token of none, shared and layerwise
    python bench.py prefill --checkpoint runs/d4_shared      exact parallel prefill against token by token
    python bench.py step                                     time and memory of a training step, S = 1, 2, 4, 8

Every command prints a table and, with --json FILE, writes the same figures with the machine and the commit.
"""

import json
import multiprocessing
import platform
import statistics
import subprocess
import tempfile
import time
from argparse import BooleanOptionalAction
from datetime import date
from pathlib import Path

import numpy as np
import torch

from eval_core import first_rows
from interleave import Schedule, TrainStep, prefill
from model import GPT, GPTConfig, KVCache
from prepare_data import ArgumentParser, UserError, at_least, check_folder, open_data, run_main, write_atomic
from sample import compute_dtype, find_checkpoint, load_checkpoint, load_model, pick_device
from train import Rows, make_optimizers, make_parser, peak_flops


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

def training_step(args, device, lrt, subsets, recompute):
    """
    One training step of a variant as train.py does it, on random tokens: two functions, the gradients and the update,
    and the FLOPs of the step by count.
    """
    torch.manual_seed(0)
    head_dim, T = 64 if args.width % 128 else 128, args.context[0]
    config = GPTConfig(sequence_len=T, vocab_size=args.vocab_size, n_layer=args.depth, n_head=args.width // head_dim, n_kv_head=args.width // head_dim,
                       n_embd=args.width, window_pattern=args.window_pattern, lrt=lrt)
    with torch.device(device):
        model, idx = GPT(config), torch.randint(args.vocab_size, (args.batch[0], T))
    model.compute_dtype = compute_dtype(device)
    model.recompute = recompute and not args.compile
    schedule = Schedule("plain") if lrt == "none" else Schedule(subsets=subsets)
    step, optimizers = TrainStep(model, schedule), make_optimizers(model, make_parser().parse_args([]), 1.0)
    if args.compile:
        torch._functorch.config.activation_memory_budget = 0.2 if recompute else 1.0
        step = torch.compile(step, dynamic=False)
    def gradients():
        step(idx, idx)[0].backward()
    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return gradients, update, model.flops_per_token(schedule.passes(T), T) * idx.numel()

def resident(what):
    """Memory of this process in bytes, VmRSS now or VmHWM at most so far; 0 where /proc has neither."""
    lines = open("/proc/self/status").read().splitlines() if Path("/proc/self/status").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what)), 0)

def peak_of_child(pipe, args, *variant):
    """In a process of its own: the peak resident memory of two steps, above that of torch alone."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # the libraries that every process loads
    before = resident("VmRSS")
    gradients, update, _ = training_step(args, torch.device("cpu"), *variant)
    for _ in range(2):
        gradients(), update()
    pipe.send(resident("VmHWM") - before)

def bench_step(args, device):
    """
    Time, memory and FLOPs of a training step: the baseline, shared and layerwise, each S, and one with activation
    checkpointing. On a CPU the variants take turns in one process, and peak memory is that of a child process each. A GPU
    holds one variant at a time (its timings are steady); the baseline comes first and last there.
    """
    variants = [("none", 1, False)] + [(lrt, S, False) for lrt in ("shared", "layerwise") for S in args.subsets] + [("shared", min(2, max(args.subsets)), True)]
    times, flops, memory = {v: [] for v in variants}, {}, {}
    def measure(variant, gradients, update):
        times[variant].append((clock(device, gradients), clock(device, update)))
    if device.type == "cpu":
        steps = {v: training_step(args, device, *v) for v in variants}
        for v, (gradients, update, flops[v]) in steps.items():
            gradients(), update()
        for _ in range(args.repeats):
            for v, (gradients, update, _) in steps.items():
                measure(v, gradients, update)
        del steps
        for v in variants:
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            child = multiprocessing.get_context("spawn").Process(target=peak_of_child, args=(theirs, args, *v))
            child.start()
            theirs.close()
            memory[v] = ours.recv()
            child.join()
    else:
        for v in variants + variants[:1]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            gradients, update, flops[v] = training_step(args, device, *v)
            for _ in range(3):
                gradients(), update()
            for _ in range(args.repeats):
                measure(v, gradients, update)
            memory[v] = torch.cuda.max_memory_allocated()
            del gradients, update
    base, peak, rows = variants[0], peak_flops(device), []
    total = {v: [sum(t) for t in times[v]] for v in variants}
    for v in variants:
        quartiles = statistics.quantiles(total[v], n=4)
        seconds = statistics.median(total[v])
        ratio = statistics.median(a / b for a, b in zip(total[v], total[base])) if device.type == "cpu" else seconds / statistics.median(total[base])
        rows.append(dict(lrt=v[0], S=v[1] if v != base else 0, checkpointing=v[2], step_ms=1000 * seconds, quartiles=f"{1000 * quartiles[0]:.0f}-{1000 * quartiles[2]:.0f}",
                         over_none=round(ratio, 3), update_ms=1000 * statistics.median(t[1] for t in times[v]), tokens_per_s=round(args.batch[0] * args.context[0] / seconds),
                         peak_MiB=round(memory[v] / 2**20), memory_over_none=round(memory[v] / max(memory[base], 1), 3), TFLOP=flops[v] / 1e12,
                         mfu=f"{100 * flops[v] / seconds / peak:.1f}%" if peak else "?"))
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "shard.npy", np.random.default_rng(0).integers(args.vocab_size, size=10**7).astype(np.uint16))
        data = Rows([np.load(Path(folder) / "shard.npy", mmap_mode="r")], args.context[0], seed=0)
        loading = statistics.median(clock(device, lambda: data.batch(i * args.batch[0], args.batch[0], device)) for i in range(20))
    report(args, device, f"step: depth {args.depth}, width {args.width}, vocabulary {args.vocab_size}, {args.batch[0]} rows of {args.context[0]}, windows {args.window_pattern}, "
           f"{'compiled' if args.compile else 'eager'}; loading a batch {1000 * loading:.2f} ms", rows)

def main():
    parser = ArgumentParser(description="Timings and counts, measured side by side in one process.")
    parser.add_argument("what", choices=["decode", "prefill", "step"], help="decode: latency a token; prefill: parallel against token by token; step: a training step")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each variant, taking turns")
    parser.add_argument("--batch", type=int, nargs="+", help="rows at a time (default: 1 16 for decode, 1 for prefill, 16 for step)")
    parser.add_argument("--depth", type=int, help="decode, step: layers (default: 6; step 4, on a GPU 12)")
    parser.add_argument("--width", type=int, help="decode, step: width, heads of 64, or of 128 if they fit (default: 768; step 128, on a GPU 64 times the depth)")
    parser.add_argument("--vocab-size", type=int, help="decode, step: vocabulary (default: 32768; step on a CPU 4096)")
    parser.add_argument("--context", type=int, nargs="+", help="decode: positions in the cache; step: tokens a row (default: 128 1024; step 256, on a GPU 2048)")
    parser.add_argument("--tokens", type=int, default=8, help="decode: tokens a measurement")
    parser.add_argument("--checkpoint", nargs="+", metavar="PATH", help="prefill: trained runs (default: the newest in runs/)")
    parser.add_argument("--data", metavar="DIR", help="prefill: prepared data (default: what the run was trained on)")
    parser.add_argument("--subsets", type=int, nargs="+", help="subsets a sweep or step (default: 1 2 4; step 1 2 4 8)")
    parser.add_argument("--window-pattern", help="step: as for train.py (default: L, on a GPU SSSL)")
    parser.add_argument("--compile", action=BooleanOptionalAction, help="step: torch.compile (default: on CUDA)")
    args = parser.parse_args()
    device = pick_device(args.device)
    gpu, depth = device.type == "cuda", args.depth or (12 if device.type == "cuda" else 4)
    defaults = {"decode": dict(batch=[1, 16], depth=6, width=768, vocab_size=32768, context=[128, 1024]), "prefill": dict(batch=[1], subsets=[1, 2, 4]),
                "step": dict(batch=[16], depth=depth, width=64 * depth if gpu else 128, vocab_size=32768 if gpu else 4096, context=[2048 if gpu else 256],
                             subsets=[1, 2, 4, 8], window_pattern="SSSL" if gpu else "L", compile=gpu)}[args.what]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    at_least(args, repeats=2, depth=1, width=2, vocab_size=1, tokens=1)
    check_folder(args.json)
    if min((args.batch or [1]) + (args.context or [1]) + (args.subsets or [1])) < 1:
        raise UserError("--batch, --context and --subsets must be at least 1")
    {"decode": bench_decode, "prefill": bench_prefill, "step": bench_step}[args.what](args, device)

if __name__ == "__main__":
    run_main(main)
