"""
Timings and counts, measured side by side in one process: the variants take turns, and medians are compared.

    python bench.py decode                                   latency a token of none, shared, layerwise and recurrent
    python bench.py prefill --checkpoint runs/d4_shared      exact parallel prefill against token by token
    python bench.py step                                     time and memory of a training step, S = 1, 2, 4, 8
    python bench.py recurrent                                a recurrent layer, tiled and by plain autograd, and a plain layer
    python bench.py core --bundle DIR                        CORE in batches against one example at a time

Every command prints a table and, with --json FILE, writes the same figures with the machine and the commit.
"""

import ctypes
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
import torch.nn.functional as F

from core import batches, load_tasks, make_example, score
from eval_core import first_rows
from attention import KVBuffer
from interleave import Schedule, TrainStep, prefill
from model import GPT, GPTConfig, KVCache
from prepare_data import ArgumentParser, UserError, check_folder, load_tokenizer, open_data, run_main, write_atomic
from recurrent import graphs, keys_read, reference, tiled
from sample import compute_dtype, find_checkpoint, load_checkpoint, load_model, pick_device
from train import Rows, make_optimizers, make_parser, peak_flops, saved_bytes


def machine(device):
    """Where and on what this was measured: a dict of strings."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"], capture_output=True).returncode == 1  # rows that came before are no change
    return dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
                torch=torch.__version__, commit=commit + "-dirty" * changed or "unknown", date=str(date.today()))

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
    for name in ("none", "shared", "layerwise", "recurrent"):
        torch.manual_seed(0)
        kind = dict(arch=name) if name == "recurrent" else dict(lrt=name)
        heads = max(args.width // 64, 1)
        with torch.device(device):
            models[name] = GPT(GPTConfig(sequence_len=max(args.context), vocab_size=args.vocab_size, n_layer=args.depth, n_head=heads,
                                         n_kv_head=heads, n_embd=args.width, **kind))
        models[name].compute_dtype = compute_dtype(device)
    rows = []
    for batch in args.batch:
        for context in args.context:
            steps = {}
            for name, model in models.items():
                kv = KVCache(model.config, batch, context, device, model.compute_dtype, rolling=True)
                for tensor in kv.k + kv.v:
                    tensor.normal_()
                state = dict(token=torch.zeros(batch, 1, dtype=torch.int64, device=device), memory=None)
                def step(model=model, kv=kv, state=state, t=context - 1):
                    hidden, source = model(state["token"], range(t, t + 1), kv, state["memory"])
                    state["memory"] = source if model.config.lrt != "none" else None
                    state["token"] = model.logits(hidden).argmax(-1)
                steps[name] = step
                step(), step()
            times = {name: [] for name in steps}
            for _ in range(args.repeats):  # taking turns: what the machine does beside this hits all of them
                for name, step in steps.items():
                    times[name].append(1000 * clock(device, lambda: [step() for _ in range(args.tokens)]) / args.tokens)
            for name in times:
                quartiles = statistics.quantiles(times[name], n=4)
                ratio = statistics.median(a / b for a, b in zip(times[name], times["none"]))
                rows.append(dict(batch=batch, context=context, model=name, ms_per_token=statistics.median(times[name]),
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
            idx = first_rows(data.val, T, args.batch)[:, :T].to(device)
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
    report(args, device, f"prefill: batch {args.batch}", rows)

def training_step(args, device, lrt, subsets, recompute, forward):
    """
    One training step of a variant as train.py does it, on random tokens: two functions, the gradients and the update,
    and the FLOPs of the step by count.
    """
    torch.manual_seed(0)
    heads, T = max(args.width // (64 if args.width % 128 else 128), 1), args.context
    config = GPTConfig(sequence_len=T, vocab_size=args.vocab_size, n_layer=args.depth, n_head=heads, n_kv_head=heads, n_embd=args.width, window_pattern=args.window_pattern, lrt=lrt)
    with torch.device(device):
        model, idx = GPT(config), torch.randint(args.vocab_size, (args.batch, T))
    model.compute_dtype = compute_dtype(device)
    model.recompute = recompute and not args.compile
    schedule = Schedule("plain") if lrt == "none" else Schedule(subsets=subsets, forward_passes=forward)
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
    return gradients, update, schedule.flops_per_token(model, T) * idx.numel()

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
    Time, memory and FLOPs of a training step: the baseline, shared and layerwise, each S, one with activation
    checkpointing, two whose initialization pass runs forward only: all layers, and, where one pass of everything follows
    (S = 1), those up to the source. On a CPU the variants take turns in one process, and
    peak memory is that of a child process each. A GPU holds one variant at a time (its timings are steady); the baseline
    comes first and last there.
    """
    gpu = device.type == "cuda"
    args.depth = args.depth or (12 if gpu else 4)
    sizes = dict(width=64 * args.depth, vocab_size=32768, context=2048, window_pattern="SSSL", compile=True) if gpu else \
        dict(width=128, vocab_size=4096, context=256, window_pattern="L", compile=False)
    for name, value in sizes.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    few = min(2, max(args.subsets))
    variants = [("none", 1, False, 0), *((lrt, S, False, 0) for lrt in ("shared", "layerwise") for S in args.subsets),
                ("shared", few, True, 0), ("shared", few, False, 1), ("shared", 1, False, 1)]
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
        rows.append(dict(lrt=v[0], S=v[1] if v != base else 0, checkpointing=v[2], forward_passes=v[3], step_ms=1000 * seconds, quartiles=f"{1000 * quartiles[0]:.0f}-{1000 * quartiles[2]:.0f}",
                         over_none=round(ratio, 3), update_ms=1000 * statistics.median(t[1] for t in times[v]), tokens_per_s=round(args.batch * args.context / seconds),
                         peak_MiB=round(memory[v] / 2**20), memory_over_none=round(memory[v] / max(memory[base], 1), 3), TFLOP=flops[v] / 1e12,
                         mfu=f"{100 * flops[v] / seconds / peak:.1f}%" if peak else "?"))
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "shard.npy", np.random.default_rng(0).integers(args.vocab_size, size=10**7).astype(np.uint16))
        data = Rows([np.load(Path(folder) / "shard.npy", mmap_mode="r")], args.context, seed=0)
        loading = statistics.median(clock(device, lambda: data.batch(i * args.batch, args.batch, device)) for i in range(20))
    report(args, device, f"step: depth {args.depth}, width {args.width}, vocabulary {args.vocab_size}, {args.batch} rows of {args.context}, windows {args.window_pattern}, "
           f"{'compiled' if args.compile else 'eager'}; loading a batch {1000 * loading:.2f} ms", rows)

def peak_bytes(device, work):
    """By how much memory grows at most while work() runs: of the GPU, or on Linux of this process; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system,
        Path("/proc/self/clear_refs").write_text("5")  # and the high-water mark starts again here
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

def bench_recurrent(args, device):
    """
    One layer, forward and backward: a plain one, a recurrent one by tiles, on a GPU captured and uncaptured, and a recurrent one
    by autograd over t. Beside time and memory, how many keys of a head (and as many values) the forward pass reads from memory:
    by tiles, or a row a position; the plain layer's one kernel is not counted.
    """
    batch, rows, dtype, gpu = args.batch, [], compute_dtype(device), device.type == "cuda"
    for T in args.context or [128, 256, 512, 1024] + [2048] * gpu:
        torch.manual_seed(0)
        graphs.clear()  # so that what they keep counts in every row
        heads = max(args.width // 64, 1)
        config = dict(sequence_len=T, vocab_size=1, n_layer=1, n_head=heads, n_kv_head=heads, n_embd=args.width)
        with torch.device(device):
            plain, recurrent = GPT(GPTConfig(**config)), GPT(GPTConfig(**config, arch="recurrent"))
            for p in [*plain.h.parameters(), *recurrent.h.parameters()]:
                torch.nn.init.normal_(p, std=args.width**-0.5)
            x, value_embed = (torch.randn(batch, T, args.width, dtype=dtype).requires_grad_() for _ in range(2))
        rotary = plain.cos[:T], plain.sin[:T]
        forms = {
            "plain": lambda: plain.h[0](x, value_embed, None, rotary, range(T), T, KVBuffer(1)),
            "tiled": lambda: tiled(*recurrent.h[0].arguments(x, value_embed, rotary))[0],
            "uncaptured": lambda: tiled(*recurrent.h[0].arguments(x, value_embed, rotary), capture=False)[0],
            "reference": lambda: reference(*recurrent.h[0].arguments(x, value_embed, rotary))[0],
        }
        if T > args.reference_up_to:
            del forms["reference"]
        if not gpu:
            del forms["uncaptured"]
        def step(form):
            forms[form]().sum().backward()
        read = {"plain": None, "tiled": keys_read(T, T), "uncaptured": keys_read(T, T), "reference": T * (T - 1) // 2}
        memory = {form: [saved_bytes(work, [*plain.parameters(), *recurrent.parameters()]),
                         peak_bytes(device, lambda: [step(form) for _ in range(3 if gpu else 1)])]  # the second captures
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
    path = find_checkpoint(args.checkpoint)
    checkpoint = load_checkpoint(path)
    model, tokenizer, tasks = load_model(checkpoint, device), load_tokenizer(path.parent), load_tasks(args.bundle)
    context, rows, totals = model.config.sequence_len, [], {}
    for task in tasks:
        examples = [make_example(task, i, tokenizer, context) for i in range(min(args.examples, len(task.examples)))]
        for use_memory in (True, False) if model.config.lrt != "none" else (False,):
            def alone():
                found["alone"] = [loss for e in few for loss in one_at_a_time(model, e, use_memory)[0]]
            def batched():
                scored = {e.index: x for batch in batches(examples, args.batch * context)
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
    report(args, device, f"core: {path.parent.name}, context {context}, examples a second, batches of {args.batch} rows", rows)

def main():
    parser = ArgumentParser(description="Timings and counts, measured side by side in one process.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    def command(run, name, about):
        p = commands.add_parser(name, help=about, description=about)
        p.set_defaults(run=run)
        p.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
        p.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
        p.add_argument("--repeats", type=int, default=9, help="measurements of each variant, taking turns")
        return p

    p = command(bench_step, "step", "time and memory of a training step: none, shared and layerwise, S = 1, 2, 4, 8 (defaults: CPU, GPU)")
    p.add_argument("--depth", type=int, help="layers (4, 12)")
    p.add_argument("--width", type=int, help="heads of 128, or of 64 if they do not fit (128, 64 times the depth)")
    p.add_argument("--vocab-size", type=int, help="vocabulary (4096, 32768)")
    p.add_argument("--batch", type=int, default=16, help="rows")
    p.add_argument("--context", type=int, help="tokens a row (256, 2048)")
    p.add_argument("--subsets", type=int, nargs="+", default=[1, 2, 4, 8], help="S")
    p.add_argument("--window-pattern", help="as for train.py (L, SSSL)")
    p.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile (no, yes)")

    p = command(bench_decode, "decode", "latency a token: none, shared, layerwise and recurrent")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows at a time")
    p.add_argument("--depth", type=int, default=6, help="layers")
    p.add_argument("--width", type=int, default=768, help="width, heads of 64")
    p.add_argument("--vocab-size", type=int, default=32768, help="vocabulary")
    p.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="positions in the cache")
    p.add_argument("--tokens", type=int, default=8, help="tokens a measurement")

    p = command(bench_prefill, "prefill", "exact parallel prefill against token by token")
    p.add_argument("--checkpoint", nargs="+", metavar="PATH", help="trained runs (default: the newest in runs/)")
    p.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    p.add_argument("--batch", type=int, default=1, help="rows at a time")
    p.add_argument("--subsets", type=int, nargs="+", default=[1, 2, 4], help="subsets a sweep")

    p = command(bench_core, "core", "CORE in batches against one example at a time")
    p.add_argument("--checkpoint", metavar="PATH", help="trained run (default: the newest in runs/)")
    p.add_argument("--bundle", metavar="DIR", help="folder with core.yaml (default: downloaded once)")
    p.add_argument("--batch", type=int, default=64, help="rows of the context's length at a time")
    p.add_argument("--examples", type=int, default=64, help="examples of each task that go through in batches")
    p.add_argument("--alone", type=int, default=8, help="examples of them that go through one at a time")

    p = command(bench_recurrent, "recurrent", "a layer of the Recurrent Transformer: tiled, by autograd over t, and a plain one")
    p.add_argument("--batch", type=int, default=4, help="rows at a time")
    p.add_argument("--width", type=int, default=128, help="width, heads of 64")
    p.add_argument("--context", type=int, nargs="+", help="tokens a row (128 256 512 1024, and 2048 on a GPU)")
    p.add_argument("--reference-up-to", type=int, default=1024, help="leave out autograd over t for more tokens: its memory grows with their square")

    args, least = parser.parse_args(), dict(repeats=2, width=2)
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            if type(x) is int and x < least.get(name, 1):
                raise UserError(f"--{name.replace('_', '-')} must be at least {least.get(name, 1)}, not {x}")
    check_folder(args.json)
    try:
        args.run(args, pick_device(args.device))
    except ValueError as e:  # sizes of which no model can be built
        raise UserError(e)

if __name__ == "__main__":
    run_main(main)
