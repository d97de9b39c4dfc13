"""
Timings and counts, measured side by side in one process: the variants take turns, and medians are compared.

    python bench.py decode                                latency a token: none, shared, layerwise, recurrent
    python bench.py prefill --checkpoint runs/d4_shared   exact parallel prefill against token by token
    python bench.py step                                  time and memory of a training step, S = 1, 2, 4, 8
    python bench.py muon                                  a step of our Muon against one of torch's
    python bench.py save                                  what training waits for when it is saved
    python bench.py recurrent                             a recurrent layer, tiled and by plain autograd
    python bench.py core --bundle DIR                     CORE in batches against one example at a time
    python bench.py gpu                                   all that only a GPU can settle: research/gpu.py
    python bench.py peers --nanochat DIR --release DIR    ours beside the peers' own code: research/peers.py

Every other command prints a table and, with --json FILE, writes the same figures with the machine and the
commit.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ctypes
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from attention import KVBuffer, KVCache
from checkpointing import Log, Saver, find_checkpoint, load_checkpoint, load_model
from common import (
    ArgumentParser,
    UserError,
    check_folder,
    compute_dtype,
    flag,
    machine,
    peak_flops,
    pick_device,
    run_main,
    write_json,
)
from core import batches, load_tasks, make_example, score
from dataset import Rows, first_rows, open_data
from interleave import Schedule, TrainStep, decode_tokens, prefill
from model import GPTConfig
from optim import Muon, make_optimizers, product_dtype
from plan import saved_bytes
from recipes import RECIPES
from recurrent import RecurrentConfig, build_model, graphs, keys_read, reference, tiled
from sample import Decoder, load_run, new_cache

MIB = 2**20

# -----------------------------------------------------------------------------
# Measuring and reporting

def clock(device, work):
    """
    Seconds that work() takes, with everything that it leaves in the device's queue. With one thread on a CPU
    they are those of this process, which is what other work on the machine lengthens least.
    """
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if one_thread else time.perf_counter

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = now()
    work()
    wait()
    return now() - start

def take_turns(device, works, repeats):
    """
    Run every function of the dict `works` `repeats` times: the first, the second, .., the first again. So
    whatever else the machine does meanwhile hits all of them. Returns a dict of lists of seconds.
    """
    times = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(device, work))
    return times

def median_ratio(times, base):
    """The median of time over time of the baseline, where the two lists were measured in turns."""
    return statistics.median(a / b for a, b in zip(times, base))

def resident(entry):
    """This process's memory in bytes: entry VmRSS now, VmHWM at most so far. 0 without /proc (not Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(entry):
                return 1024 * int(line.split()[1])
    return 0

def peak_bytes(device, work):
    """
    By how many bytes memory grows at most while work() runs: that of the GPU, or on Linux that of this
    process. None where neither can be measured.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give memory that is free back to the system, ..
        Path("/proc/self/clear_refs").write_text("5")  # .. and start VmHWM again from here
    except (OSError, AttributeError):
        return None
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

def report(args, device, title, rows):
    """Print the rows, dicts with the same keys, as a table in Markdown, and write them to --json."""
    where = machine(device)
    print(f"{title} | " + " | ".join(where.values()))
    table = [list(rows[0])]
    for row in rows:
        table.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*table)]
    for i, cells in enumerate(table):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    if args.json:
        write_json(args.json, dict(title=title, **where, rows=rows))


# -----------------------------------------------------------------------------
# decode: latency of a token

def greedy(logits, uniform):
    """The likeliest token of each row, in the place of sample_next_token."""
    return logits.argmax(-1)

def prepare_decoding(model):
    """The model as load_model() and load_run() give it: its matrices cast and packed."""
    device = model.wte.weight.device
    model.compute_dtype = compute_dtype(device)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(model.compute_dtype)
    model.pack()
    return model

def full_decoder(model, batch, context, tokens, compile):
    """A Decoder in front of the last `tokens` positions of a full cache of `context`."""
    device, dtype = model.wte.weight.device, model.compute_dtype
    kv = KVCache(model.config, batch, context, device, dtype, rolling=True)
    for tensor in kv.k + kv.v:
        tensor.normal_()
    hidden = torch.randn(batch, 1, model.config.n_embd, device=device, dtype=dtype)
    memory = None if model.config.lrt == "none" else hidden
    uniform = torch.zeros(tokens + 1, batch, device=device)
    return Decoder(model, kv, hidden, memory, context - tokens, uniform, greedy, compile=compile)

def decode(decoder, tokens):
    """So many tokens, from the same position on every time."""
    decoder.made = 1
    decoder.index.fill_(1)
    for _ in range(tokens):
        decoder.step()

def seconds_to_read(model, device):
    """
    Seconds that reading every weight of the model's products once takes, the limit of a decoded token: their
    bytes at the rate at which 256 MiB are summed.
    """
    memory = torch.ones(2**26, device=device)
    read = statistics.median(clock(device, memory.sum) for _ in range(7))
    n_bytes = model.parameter_counts()["scaling"] * torch.finfo(model.compute_dtype).bits // 8
    return read * n_bytes / (4 * memory.numel())

def decode_models(args, device):
    """One model of each kind, of the same sizes: a dict by name."""
    heads = max(args.width // 64, 1)
    sizes = dict(
        sequence_len=max(args.context), vocab_size=args.vocab_size, n_layer=args.depth,
        n_head=heads, n_kv_head=heads, n_embd=args.width)
    configs = {lrt: GPTConfig(**sizes, lrt=lrt) for lrt in ("none", "shared", "layerwise")}
    configs["recurrent"] = RecurrentConfig(**sizes)
    models = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        with torch.device(device):
            models[name] = build_model(config)
        prepare_decoding(models[name])
    return models

@torch.inference_mode()
def bench_decode(args, device):
    """
    Milliseconds a token for each batch size and context, on a full cache, and what reading the weights alone
    would take.
    """
    models = decode_models(args, device)
    rows = []
    for batch in args.batch:
        for context in args.context:
            works = {}
            for name, model in models.items():
                decoder = full_decoder(model, batch, context, args.tokens, args.compile)
                works[name] = partial(decode, decoder, args.tokens)
            for work in works.values():
                work()  # warm up, and capture
            times = take_turns(device, works, args.repeats)
            limits = {name: 1000 * seconds_to_read(model, device) for name, model in models.items()}
            for name, seconds in times.items():
                per_token = [1000 * t / args.tokens for t in seconds]
                low, _, high = statistics.quantiles(per_token, n=4)
                rows.append(dict(
                    batch=batch,
                    context=context,
                    model=name,
                    ms_per_token=statistics.median(per_token),
                    quartiles=f"{low:.3f}-{high:.3f}",
                    over_none=round(median_ratio(seconds, times["none"]), 3),
                    reading_weights_ms=limits[name],
                ))
    title = f"decode: depth {args.depth}, width {args.width}, vocabulary {args.vocab_size}"
    return title, rows


# -----------------------------------------------------------------------------
# prefill: parallel against token by token

def token_by_token(model, idx):
    """Logits (B, 1, vocab) behind the last of tokens idx (B, T), decoded one after the other."""
    hidden = decode_tokens(model, idx, new_cache(model, *idx.shape))
    return model.logits(hidden[:, -1:])

def in_parallel(model, idx):
    """The same by parallel prefill, and the number of sweeps that it took."""
    hidden, _, sweeps = prefill(model, idx, new_cache(model, *idx.shape))
    return model.logits(hidden[:, -1:]), sweeps

@torch.no_grad()
def bench_prefill(args, device):
    """
    Sweeps and seconds of exact parallel prefill against decoding token by token, on validation text of
    several lengths, and the largest difference of their logits.
    """
    rows = []
    for run in args.checkpoint or [None]:
        path = find_checkpoint(run)
        checkpoint = load_checkpoint(path)
        model = load_model(checkpoint, device)
        model.pack()
        data = open_data(args.data or checkpoint["args"]["data"], verify=False)
        context = model.config.sequence_len
        lengths = [T for T in (128, 256, 512, 1024, 2048, 4096) if T < context] + [context]
        for T in lengths:
            idx = first_rows(data.val, T, args.batch)[:, :T].to(device)

            # once without the clock: what they compute
            exact = token_by_token(model, idx)
            logits, sweeps = in_parallel(model, idx)

            serial = partial(token_by_token, model, idx)
            works = dict(serial=serial, parallel=partial(in_parallel, model, idx))
            times = take_turns(device, works, args.repeats)
            rows.append(dict(
                run=path.parent.name,
                T=T,
                sweeps=sweeps,
                seconds=statistics.median(times["parallel"]),
                token_by_token=statistics.median(times["serial"]),
                error=(logits - exact).abs().max().item(),
                speedup=median_ratio(times["serial"], times["parallel"]),
            ))
    return f"prefill: batch {args.batch}", rows


# -----------------------------------------------------------------------------
# step: a training step

class Variant(NamedTuple):
    """What a training step is measured with."""
    lrt: str
    subsets: int
    checkpointing: bool = False  # activation checkpointing
    kind: str = "interleaved"  # the schedule's, interleaved or draft
    recipe: str = "paper"  # backbone and optimizer, a key of plan.RECIPES

def training_step(args, device, variant):
    """
    One training step of a variant as train.py does it, on random tokens. Returns two functions, one that
    computes the gradients and one that applies them, and the FLOPs of the step by count.
    """
    # a model and a batch
    torch.manual_seed(0)
    head_dim = 64 if args.width % 128 else 128
    heads = max(args.width // head_dim, 1)
    recipe = RECIPES[variant.recipe]
    config = GPTConfig(
        sequence_len=args.context, vocab_size=args.vocab_size, n_layer=args.depth, n_head=heads,
        n_kv_head=heads, n_embd=args.width, window_pattern=args.window_pattern, lrt=variant.lrt,
        **recipe.model)
    with torch.device(device):
        model = build_model(config)
        idx = torch.randint(args.vocab_size, (args.batch, args.context))
    model.compute_dtype = compute_dtype(device)
    model.recompute = variant.checkpointing and not args.compile

    # its step and its optimizers
    if variant.lrt == "none":
        schedule = Schedule("plain")
    else:
        schedule = Schedule(variant.kind, subsets=variant.subsets)
    step = TrainStep(model, schedule)
    optimizers = make_optimizers(model, recipe.optimizer, batch_scale=1.0)
    if args.compile:
        # the compiler chooses what to compute again; this is the share of activations that it keeps
        torch._functorch.config.activation_memory_budget = 0.2 if variant.checkpointing else 1.0
        step = torch.compile(step, dynamic=False)

    def compute_gradients():
        loss, _ = step(idx, idx)
        loss.backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return compute_gradients, update, schedule.flops_per_token(model, args.context) * idx.numel()

def send_peak_memory(pipe, args, variant):
    """Run in a child process: send the peak resident memory of two steps, above that of torch alone."""
    torch.ones(64, 64) @ torch.ones(64, 64)  # load the libraries that every process loads
    before = resident("VmRSS")
    compute_gradients, update, _ = training_step(args, torch.device("cpu"), variant)
    for _ in range(2):
        compute_gradients()
        update()
    pipe.send(resident("VmHWM") - before)

def peak_memory_in_child(args, variant):
    """Peak resident memory of a variant's step in bytes, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    child = context.Process(target=send_peak_memory, args=(sender, args, variant))
    child.start()
    sender.close()
    peak = receiver.recv()
    child.join()
    return peak

def measure_steps_on_cpu(args, device, variants):
    """
    All variants in one process, taking turns, and the memory of each in a child process. Returns three dicts
    by variant: (seconds of the gradients, seconds of the update) of every repeat; FLOPs; bytes of memory.
    """
    works, flops = {}, {}
    for variant in variants:
        compute_gradients, update, flops[variant] = training_step(args, device, variant)
        compute_gradients()
        update()
        works[variant, "gradients"] = compute_gradients
        works[variant, "update"] = update
    seconds = take_turns(device, works, args.repeats)
    times = {v: list(zip(seconds[v, "gradients"], seconds[v, "update"])) for v in variants}

    del works, compute_gradients, update  # the models, before the child processes need memory
    memory = {variant: peak_memory_in_child(args, variant) for variant in variants}
    return times, flops, memory

def measure_steps_on_gpu(args, device, variants):
    """
    The same three dicts on a GPU, which holds one variant at a time; its timings are steady. The baseline
    comes first and last.
    """
    times, flops, memory = {variant: [] for variant in variants}, {}, {}
    for variant in [*variants, variants[0]]:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        compute_gradients, update, flops[variant] = training_step(args, device, variant)
        for _ in range(3):
            compute_gradients()
            update()
        for _ in range(args.repeats):
            times[variant].append((clock(device, compute_gradients), clock(device, update)))
        memory[variant] = torch.cuda.max_memory_allocated()
        del compute_gradients, update
    return times, flops, memory

def seconds_to_load(args, device):
    """Seconds that loading a batch from a shard on disk takes, the median of 20."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.npy"
        tokens = np.random.default_rng(0).integers(args.vocab_size, size=10**7)
        np.save(path, tokens.astype(np.uint16))
        data = Rows([np.load(path, mmap_mode="r")], args.context, seed=0)
        loads = [partial(data.batch, i * args.batch, args.batch, device) for i in range(20)]
        return statistics.median(clock(device, load) for load in loads)

def bench_step(args, device):
    """
    Time, memory and FLOPs of a training step: the baseline; shared and layerwise with each S; one with
    activation checkpointing; and two whose first pass runs forward only. With S = 1, where a pass over all
    positions follows, that first pass ends at the source layer.
    """
    gpu = device.type == "cuda"

    # sizes that were not given
    if args.depth is None:
        args.depth = 12 if gpu else 4
    if gpu:
        sizes = dict(
            width=64 * args.depth, vocab_size=32768, context=2048, window_pattern="SSSL", compile=True)
    else:
        sizes = dict(width=128, vocab_size=4096, context=256, window_pattern="L", compile=False)
    for name, size in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, size)

    baseline = Variant("none", subsets=1)
    few = min(2, max(args.subsets))
    variants = [baseline]
    for lrt in ("shared", "layerwise"):
        variants += [Variant(lrt, S) for S in args.subsets]
    variants.append(Variant("shared", few, checkpointing=True))
    variants.append(Variant("shared", 1, kind="draft"))

    measure = measure_steps_on_gpu if gpu else measure_steps_on_cpu
    times, flops, memory = measure(args, device, variants)

    peak = peak_flops(device)
    whole_steps = {v: [gradients + update for gradients, update in times[v]] for v in variants}
    base_seconds = statistics.median(whole_steps[baseline])
    rows = []
    for v in variants:
        low, _, high = statistics.quantiles(whole_steps[v], n=4)
        seconds = statistics.median(whole_steps[v])
        if gpu:
            over_none = seconds / base_seconds
        else:
            over_none = median_ratio(whole_steps[v], whole_steps[baseline])
        rows.append(dict(
            lrt=v.lrt,
            S=0 if v == baseline else v.subsets,
            checkpointing=v.checkpointing,
            kind=v.kind,
            step_ms=1000 * seconds,
            quartiles=f"{1000 * low:.0f}-{1000 * high:.0f}",
            over_none=round(over_none, 3),
            update_ms=1000 * statistics.median(update for _, update in times[v]),
            tokens_per_s=round(args.batch * args.context / seconds),
            peak_MiB=round(memory[v] / MIB),
            memory_over_none=round(memory[v] / max(memory[baseline], 1), 3),
            TFLOP=flops[v] / 1e12,
            mfu=f"{100 * flops[v] / seconds / peak:.1f}%" if peak else "?",
        ))

    compiled = "compiled" if args.compile else "eager"
    title = (
        f"step: depth {args.depth}, width {args.width}, vocabulary {args.vocab_size}, {args.batch} rows of "
        f"{args.context}, windows {args.window_pattern}, {compiled}; "
        f"loading a batch {1000 * seconds_to_load(args, device):.2f} ms")
    return title, rows


# -----------------------------------------------------------------------------
# muon: a step of the optimizer alone

def bench_muon(args, device):
    """
    Milliseconds of a step of torch's Muon, and of ours with its products in bf16 and in float32, for the
    matrices of a baseline.
    """
    D = args.width
    shapes = args.depth * [(D, D), (D, D), (D, D), (D, D), (4 * D, D), (D, 4 * D)]
    makers = {"torch's": torch.optim.Muon}
    for dtype in (torch.bfloat16, torch.float32):
        makers[f"ours, {str(dtype)[6:]}"] = partial(Muon, dtype=dtype)
    works = {}
    for name, make in makers.items():
        matrices = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        works[name] = make(matrices, lr=0.02).step
        works[name]()  # its state
    times = take_turns(device, works, args.repeats)

    rows = []
    for name, seconds in times.items():
        low, _, high = statistics.quantiles(seconds, n=4)
        rows.append(dict(
            muon=name,
            ms=1000 * statistics.median(seconds),
            quartiles=f"{1000 * low:.1f}-{1000 * high:.1f}",
            times_as_fast=round(median_ratio(times["torch's"], seconds), 2),
        ))
    kernels = torch.backends.cpu.get_cpu_capability()
    default = str(product_dtype(torch.empty(0, device=device)))[6:]
    return f"muon: depth {args.depth}, width {D}, {kernels} kernels, default {default}", rows


# -----------------------------------------------------------------------------
# save: what training waits for

class CopyOnly(Saver):
    """A Saver without a disk: training waits for the copy alone."""

    def write(self, content, copies, *_):
        self.finish_copy(copies)

def bench_save(args, device):
    """
    Milliseconds by the clock that training waits for a checkpoint to be copied out, before the next forward
    and backward, or beside them as train.py does it; and those of all, with the CPU time of this process.
    """
    torch.manual_seed(0)
    heads = max(args.width // 64, 1)
    config = GPTConfig(
        sequence_len=args.context, vocab_size=args.vocab_size, n_layer=args.depth, n_head=heads,
        n_kv_head=heads, n_embd=args.width, lrt="shared")
    with torch.device(device):
        model = build_model(config)
        idx = torch.randint(args.vocab_size, (args.batch, args.context))
    model.compute_dtype = compute_dtype(device)
    step = TrainStep(model, Schedule())
    optimizers = make_optimizers(model, RECIPES["paper"].optimizer)

    def compute_gradients():
        loss, _ = step(idx, idx)
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()  # waits for a GPU

    def save_and_compute(when):
        start, cpu_start = time.perf_counter(), time.process_time()
        if when != "never":
            saver.save(optimizers, step=1, final=False, model=model.state_dict())
        if when == "before":
            saver.wait_for_copy()
        saved = time.perf_counter()
        compute_gradients()
        computed = time.perf_counter()
        saver.wait_for_copy()
        end = time.perf_counter()
        saver.wait()
        return saved - start + end - computed, end - start, time.process_time() - cpu_start

    # the states of the optimizers, and the memory of the copy
    compute_gradients()
    for optimizer in optimizers:
        optimizer.step()
    measured = {"never": [], "before": [], "beside": []}
    with tempfile.TemporaryDirectory() as folder:
        saver = CopyOnly(folder, Log(folder), keep=1)
        save_and_compute("before")
        for _ in range(args.repeats):
            for when, rows in measured.items():
                rows.append(save_and_compute(when))
    gigabytes = sum(buffer.nbytes for buffer in saver.buffers.values()) / 1e9

    rows = []
    for when, figures in measured.items():
        waited, total, cpu = (1000 * statistics.median(column) for column in zip(*figures))
        rows.append(dict(copied=when, waited_ms=waited, total_ms=total, cpu_ms=cpu))
    tokens = args.batch * args.context
    sizes = f"depth {args.depth}, width {args.width}, {gigabytes:.2f} GB, steps of {tokens} tokens"
    return f"save: {sizes}", rows


# -----------------------------------------------------------------------------
# recurrent: one layer of the Recurrent Transformer

def layer_forms(args, device, T):
    """
    One layer's forward pass over T tokens in each of its forms, a dict of functions; how many keys of a head
    each reads from memory; and the parameters.
    """
    # a plain and a recurrent model of one layer, and inputs for that layer
    torch.manual_seed(0)
    heads = max(args.width // 64, 1)
    sizes = dict(
        sequence_len=T, vocab_size=1, n_layer=1, n_head=heads, n_kv_head=heads, n_embd=args.width)
    with torch.device(device):
        plain = build_model(GPTConfig(**sizes))
        recurrent = build_model(RecurrentConfig(**sizes))
        for parameter in [*plain.h.parameters(), *recurrent.h.parameters()]:
            torch.nn.init.normal_(parameter, std=args.width**-0.5)
        shape, dtype = (args.batch, T, args.width), compute_dtype(device)
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        value_embed = torch.randn(shape, dtype=dtype).requires_grad_()
    rotary = plain.cos[:T], plain.sin[:T]
    plain_layer, recurrent_layer = plain.h[0], recurrent.h[0]

    def run_plain():
        return plain_layer(x, value_embed, None, rotary, range(T), T, KVBuffer(1))

    def run_tiled(**options):
        return tiled(*recurrent_layer.arguments(x, value_embed, rotary), **options)[0]

    def run_reference():
        return reference(*recurrent_layer.arguments(x, value_embed, rotary))[0]

    forms = {"plain": run_plain, "tiled": run_tiled}
    if device.type == "cuda":
        forms["uncaptured"] = partial(run_tiled, capture=False)
    if T <= args.reference_up_to:
        forms["reference"] = run_reference
    read = {
        "plain": None,  # one kernel: not counted
        "tiled": keys_read(T, T),
        "uncaptured": keys_read(T, T),
        "reference": T * (T - 1) // 2,
    }
    return forms, read, [*plain.parameters(), *recurrent.parameters()]

def forward_and_backward(form, times=1):
    for _ in range(times):
        form().sum().backward()

def bench_recurrent(args, device):
    """
    One layer, forward and backward: a plain one; a recurrent one by tiles, on a GPU with and without capture
    as CUDA graphs; and a recurrent one by autograd over t. Beside time and memory, how many keys of a head
    (and as many values) the forward pass reads from memory: tiles, or one row a position.
    """
    gpu = device.type == "cuda"
    contexts = args.context or [128, 256, 512, 1024]
    if gpu and not args.context:
        contexts.append(2048)
    rows = []
    for T in contexts:
        graphs.clear()  # so that every T counts the memory of its own graphs
        forms, read, parameters = layer_forms(args, device, T)

        # memory first; on a GPU the second of three steps captures the graphs
        saved, peak = {}, {}
        for name, form in forms.items():
            saved[name] = saved_bytes(form, parameters)
            peak[name] = peak_bytes(device, partial(forward_and_backward, form, times=3 if gpu else 1))

        works = {name: partial(forward_and_backward, form) for name, form in forms.items()}
        times = take_turns(device, works, args.repeats)
        for name in forms:
            rows.append(dict(
                T=T,
                form=name,
                ms=1000 * statistics.median(times[name]),
                over_plain=median_ratio(times[name], times["plain"]),
                saved_mib=round(saved[name] / MIB, 1),
                peak_mib=None if peak[name] is None else round(peak[name] / MIB, 1),
                keys_read=read[name],
            ))
    title = f"recurrent: one layer of width {args.width}, batch {args.batch}, forward and backward"
    return title, rows


# -----------------------------------------------------------------------------
# core: CORE in batches

@torch.no_grad()
def score_alone(model, example, use_memory):
    """
    Score an example as most evaluators do: one forward over all its choices, padded on the right, and the
    losses of all positions. Returns the mean loss of each choice over its scored tokens.
    """
    rows = []
    for tail in example.tails:
        rows.append(torch.cat([torch.from_numpy(example.prefix), torch.from_numpy(tail)]))
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.wte.weight.device)
    if use_memory:
        hidden, _, _ = prefill(model, idx, new_cache(model, *idx.shape))
    else:
        hidden, _ = model(idx, range(idx.size(1)), KVBuffer(model.config.n_layer))
    logits = model.logits(hidden[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    logits.argmax(-1)  # an evaluator needs it, too: its time counts
    means = []
    for choice, (row, start) in enumerate(zip(rows, example.starts)):
        means.append(losses[choice, start - 1:len(row) - 1].mean().item())
    return means

def score_all_alone(model, examples, use_memory):
    """The losses of all choices of these examples, one example at a time."""
    losses = []
    for example in examples:
        losses += score_alone(model, example, use_memory)
    return losses

def score_in_batches(model, examples, use_memory, budget):
    """The losses of all choices of these examples, in batches of at most `budget` positions."""
    by_index = {}
    for batch in batches(examples, budget):
        for example, (losses, _, _) in zip(batch, score(model, batch, use_memory)):
            by_index[example.index] = losses
    in_order = []
    for example in examples:
        in_order += by_index[example.index]
    return in_order

@torch.no_grad()
def bench_core(args, device):
    """
    Examples a second of every CORE task in the bundle, in batches and one at a time, on the same examples
    and in turns. Tokenizing is not counted on either side. The last rows are all tasks, each weighted by the
    number of its examples.
    """
    path, _, tokenizer, model = load_run(args.checkpoint, device)
    context = model.config.sequence_len
    budget = args.batch * context
    with_and_without = (False,) if model.config.lrt == "none" else (True, False)

    rows = []
    totals = {m: dict(examples=0, alone=0.0, batched=0.0, apart=0.0) for m in with_and_without}
    for task in load_tasks(args.bundle):
        n = min(args.examples, len(task.examples))
        examples = [make_example(task, i, tokenizer, context) for i in range(n)]
        few = examples[:args.alone]
        for use_memory in with_and_without:
            alone = partial(score_all_alone, model, few, use_memory)
            batched = partial(score_in_batches, model, examples, use_memory, budget)
            seconds = take_turns(device, dict(alone=alone, batched=batched), args.repeats)
            per_example_alone = [t / len(few) for t in seconds["alone"]]
            per_example_batched = [t / len(examples) for t in seconds["batched"]]
            slow = statistics.median(per_example_alone)
            fast = statistics.median(per_example_batched)
            # the examples that went through one at a time are the first of those in batches
            apart = max(abs(a - b) for a, b in zip(alone(), batched()))
            rows.append(dict(
                task=task.name,
                memory=use_memory,
                one_at_a_time=1 / slow,
                batched=1 / fast,
                speedup=median_ratio(per_example_alone, per_example_batched),
                apart=apart,
            ))
            total = totals[use_memory]
            total["examples"] += len(task.examples)
            total["alone"] += slow * len(task.examples)
            total["batched"] += fast * len(task.examples)
            total["apart"] = max(total["apart"], apart)

    for use_memory, total in totals.items():
        rows.append(dict(
            task="all",
            memory=use_memory,
            one_at_a_time=total["examples"] / total["alone"],
            batched=total["examples"] / total["batched"],
            speedup=total["alone"] / total["batched"],
            apart=total["apart"],
        ))
    title = f"core: {path.parent.name}, context {context}, examples a second, batches of {args.batch} rows"
    return title, rows


# -----------------------------------------------------------------------------
# The command

def make_parser():
    parser = ArgumentParser(description="Timings and counts, measured side by side in one process.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")

    def command(run, name, about):
        p = commands.add_parser(name, help=about, description=about)
        p.set_defaults(run=run)
        p.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
        p.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
        p.add_argument("--repeats", type=int, default=9, help="measurements of each variant, taking turns")
        return p

    p = command(bench_step, "step",
                "time and memory of a training step: none, shared and layerwise, S = 1, 2, 4, 8 "
                "(defaults: CPU, GPU)")
    p.add_argument("--depth", type=int, help="layers (4, 12)")
    p.add_argument("--width", type=int,
                   help="heads of 128, or of 64 if they do not fit (128, 64 times the depth)")
    p.add_argument("--vocab-size", type=int, help="vocabulary (4096, 32768)")
    p.add_argument("--batch", type=int, default=16, help="rows")
    p.add_argument("--context", type=int, help="tokens a row (256, 2048)")
    p.add_argument("--subsets", type=int, nargs="+", default=[1, 2, 4, 8], help="S")
    p.add_argument("--window-pattern", help="as for train.py (L, SSSL)")
    p.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile (no, yes)")

    p = command(bench_muon, "muon", "a step of our Muon against one of torch's, without a model")
    p.add_argument("--depth", type=int, default=4, help="layers")
    p.add_argument("--width", type=int, default=128, help="width")

    p = command(bench_save, "save", "what training waits for when a checkpoint is copied out")
    p.add_argument("--depth", type=int, default=4, help="layers")
    p.add_argument("--width", type=int, default=128, help="width, heads of 64")
    p.add_argument("--vocab-size", type=int, default=4096, help="vocabulary")
    p.add_argument("--batch", type=int, default=2, help="rows")
    p.add_argument("--context", type=int, default=256, help="tokens a row")

    p = command(bench_decode, "decode", "latency a token: none, shared, layerwise and recurrent")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows at a time")
    p.add_argument("--depth", type=int, default=6, help="layers")
    p.add_argument("--width", type=int, default=768, help="width, heads of 64")
    p.add_argument("--vocab-size", type=int, default=32768, help="vocabulary")
    p.add_argument("--context", type=int, nargs="+", default=[128, 1024], help="positions in the cache")
    p.add_argument("--tokens", type=int, default=8, help="tokens a measurement")
    p.add_argument("--compile", action="store_true", help="compile our step, as sample.py --compile does")

    p = command(bench_prefill, "prefill", "exact parallel prefill against token by token")
    p.add_argument("--checkpoint", nargs="+", metavar="PATH",
                   help="trained runs (default: the newest in runs/)")
    p.add_argument("--data", metavar="DIR", help="prepared data (default: what the run was trained on)")
    p.add_argument("--batch", type=int, default=1, help="rows at a time")

    p = command(bench_core, "core", "CORE in batches against one example at a time")
    p.add_argument("--checkpoint", metavar="PATH", help="trained run (default: the newest in runs/)")
    p.add_argument("--bundle", metavar="DIR", help="folder with core.yaml (default: downloaded once)")
    p.add_argument("--batch", type=int, default=64, help="rows of the context's length at a time")
    p.add_argument("--examples", type=int, default=64,
                   help="examples of each task that go through in batches")
    p.add_argument("--alone", type=int, default=8, help="examples of them that go through one at a time")

    p = command(bench_recurrent, "recurrent",
                "a layer of the Recurrent Transformer: tiled, by autograd over t, and a plain one")
    p.add_argument("--batch", type=int, default=4, help="rows at a time")
    p.add_argument("--width", type=int, default=128, help="width, heads of 64")
    p.add_argument("--context", type=int, nargs="+",
                   help="tokens a row (128 256 512 1024, and 2048 on a GPU)")
    p.add_argument("--reference-up-to", type=int, default=1024,
                   help="leave out autograd over t for more tokens: its memory grows with their square")

    commands.add_parser("gpu", help="all that only a GPU can settle, as python -m research.gpu")
    commands.add_parser("peers", help="ours beside nanochat's and the release's own code, as research.peers")
    return parser

def check_sizes(args):
    """
    Raise UserError for a number below 1; below 2 for the repeats, of which there are quartiles, and for the
    width, as rotary embedding rotates pairs.
    """
    least = dict(repeats=2, width=2)
    for name, value in vars(args).items():
        low = least.get(name, 1)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number < low:  # a bool is no number here
                raise UserError(f"{flag(name)} must be at least {low}, not {number}")

def main():
    if sys.argv[1:2] in (["gpu"], ["peers"]):  # rooms of their own, above this one
        research = [sys.executable, "-m", f"research.{sys.argv[1]}", *sys.argv[2:]]
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        sys.exit(subprocess.call(research, env=os.environ | {"PYTHONPATH": path}))
    args = make_parser().parse_args()
    check_sizes(args)
    check_folder(args.json)
    try:
        device = pick_device(args.device)
        title, rows = args.run(args, device)
        report(args, device, title, rows)
    except ValueError as e:  # sizes of which no model can be built
        raise UserError(e) from e

if __name__ == "__main__":
    run_main(main)
