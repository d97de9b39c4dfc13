"""
Timings and counts, measured side by side in one process: the variants take turns, and medians are compared.

    python bench.py decode                                   latency a token of none, shared and layerwise
    python bench.py prefill --checkpoint runs/d4_shared      exact parallel prefill against token by token
    python bench.py recurrent                                a recurrent layer, tiled and by plain autograd, and a plain layer

Every command prints a table and, with --json FILE, writes the same figures with the machine and the commit.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

import torch

from eval_core import first_rows
from interleave import prefill
from model import GPT, GPTConfig, KVBuffer, KVCache, visible
from prepare_data import ArgumentParser, UserError, at_least, check_folder, open_data, run_main, write_atomic
from recurrent import keys_read, reference, tiled
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

def saved_bytes(work, parameters):
    """What autograd keeps from a forward pass, work(), for the backward: bytes of all storages, but not the parameters'."""
    held, own = {}, {p.untyped_storage().data_ptr() for p in parameters}
    def keep(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = work()  # noqa: F841 (alive, and so are the storages, until they are counted)
    return sum(n for pointer, n in held.items() if pointer not in own)

def peak_bytes(device, work):
    """By how much memory grows at most while work() runs: of the GPU, or on Linux of this process; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    def kilobytes(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system,
        Path("/proc/self/clear_refs").write_text("5")  # and the high-water mark starts again here
    except (OSError, AttributeError):
        return None
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)

def bench_recurrent(args, device):
    """
    One layer, forward and backward: a plain one, a recurrent one by tiles, and a recurrent one by autograd over t. Beside
    time and memory, how many keys of a head (and as many values) the forward pass reads from memory: by tiles, or a row a
    position; the plain layer's one kernel is not counted.
    """
    batch, rows, dtype = args.batch[0], [], compute_dtype(device)
    for T in args.context:
        torch.manual_seed(0)
        heads = max(args.width // 64, 1)
        config = dict(sequence_len=T, vocab_size=1, n_layer=1, n_head=heads, n_kv_head=heads, n_embd=args.width)
        with torch.device(device):
            plain, recurrent = GPT(GPTConfig(**config)), GPT(GPTConfig(**config, arch="recurrent"))
            for p in [*plain.h.parameters(), *recurrent.h.parameters()]:
                torch.nn.init.normal_(p, std=args.width**-0.5)
            x, value_embed = (torch.randn(batch, T, args.width, dtype=dtype).requires_grad_() for _ in range(2))
        rotary = plain.cos[:T], plain.sin[:T]
        forms = {
            "plain": lambda: plain.h[0](x, value_embed, None, rotary, range(T), visible(range(T), T, device), KVBuffer(1)),
            "tiled": lambda: tiled(*recurrent.h[0].arguments(x, value_embed, rotary))[0],
            "reference": lambda: reference(*recurrent.h[0].arguments(x, value_embed, rotary))[0],
        }
        if T > args.reference_up_to:
            del forms["reference"]
        def step(form):
            forms[form]().sum().backward()
        read = {"plain": None, "tiled": keys_read(T, T), "reference": T * (T - 1) // 2}
        memory = {form: [saved_bytes(work, [*plain.parameters(), *recurrent.parameters()]), peak_bytes(device, lambda: step(form))]
                  for form, work in forms.items()}
        times = {form: [] for form in forms}
        for _ in range(args.repeats):
            for form in forms:
                times[form].append(1000 * clock(device, lambda: step(form)))
        for form in forms:
            saved, peak = (None if n is None else round(n / 2**20, 1) for n in memory[form])
            rows.append(dict(T=T, form=form, ms=statistics.median(times[form]), over_plain=statistics.median(
                a / b for a, b in zip(times[form], times["plain"])), saved_mib=saved, peak_mib=peak, keys_read=read[form]))
    report(args, device, f"recurrent: one layer of width {args.width}, batch {batch}, forward and backward", rows)

def main():
    parser = ArgumentParser(description="Timings and counts, measured side by side in one process.")
    parser.add_argument("what", choices=["decode", "prefill", "recurrent"], help="decode: latency a token; prefill: parallel against token by token; recurrent: a layer, tiled and not")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each variant, taking turns")
    parser.add_argument("--batch", type=int, nargs="+", help="rows at a time (default: 1 16 for decode, 1 for prefill, 4 for recurrent)")
    parser.add_argument("--depth", type=int, default=6, help="decode: layers")
    parser.add_argument("--width", type=int, help="decode, recurrent: width, heads of 64 (default: 768 for decode, 128 for recurrent)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="decode: vocabulary")
    parser.add_argument("--context", type=int, nargs="+", help="decode: positions in the cache (default: 128 1024); recurrent: tokens (default: 128 256 512 1024)")
    parser.add_argument("--reference-up-to", type=int, default=1024, help="recurrent: leave out autograd over t for more tokens, its memory grows with their square")
    parser.add_argument("--tokens", type=int, default=8, help="decode: tokens a measurement")
    parser.add_argument("--checkpoint", nargs="+", metavar="PATH", help="prefill: trained runs (default: the newest in runs/)")
    parser.add_argument("--data", metavar="DIR", help="prefill: prepared data (default: what the run was trained on)")
    parser.add_argument("--subsets", type=int, nargs="+", default=[1, 2, 4], help="prefill: subsets a sweep")
    args = parser.parse_args()
    at_least(args, repeats=2, depth=1, width=2, vocab_size=1, tokens=1)
    check_folder(args.json)
    args.batch = args.batch or {"decode": [1, 16], "prefill": [1], "recurrent": [4]}[args.what]
    args.width = args.width or (128 if args.what == "recurrent" else 768)
    args.context = args.context or ([128, 256, 512, 1024] if args.what == "recurrent" else [128, 1024])
    if min(args.batch + args.context + args.subsets) < 1:
        raise UserError("--batch, --context and --subsets must be at least 1")
    device = pick_device(args.device)
    {"decode": bench_decode, "prefill": bench_prefill, "recurrent": bench_recurrent}[args.what](args, device)

if __name__ == "__main__":
    run_main(main)
