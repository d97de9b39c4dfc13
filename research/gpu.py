"""
Everything that only a GPU can settle, part by part, in order of worth. Whoever has one for an hour runs

    python bench.py gpu                          every part that has no result yet; bench.py calls this file
    python bench.py gpu --minutes 9              the same, in nine minutes: the next call goes on
    python bench.py gpu --only attention step_d12_s2
    python bench.py gpu --nanochat DIR           a checkout of github.com/karpathy/nanochat, to compare with
    python bench.py gpu --list

and commits research/results/gpu_PART.json. No network is needed, and one GPU is enough.

A part is a process of its own, because an illegal access on a GPU takes its process along, and has ten
minutes at most. Its file is written after every row. If it fails, the file says so under `failed`, the next
part begins, and a later call tries it again. Without CUDA, or with --tiny, all parts run on tiny sizes, which
only proves that they run.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

import bench
from attention import KVBuffer
from bench import MIB, Variant
from checkpointing import read_log
from common import (
    ArgumentParser,
    UserError,
    at_least,
    machine,
    peak_flops,
    pick_device,
    run_main,
    say,
    write_json,
)
from core import Task, load_tasks, make_example
from dataset import first_rows, open_data
from interleave import TOLERANCE, Schedule, TrainStep, decode_tokens, prefill
from model import GPTConfig
from recipes import NANOCHAT_BACKBONE
from recurrent import build_model
from sample import load_run, new_cache

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "research" / "results"
PART_MINUTES = 10  # a part may take so long, if there is so much left
GRACE = 120  # seconds for what a stopped part started: train.py saves
TRAINING_FLOPS = 1e17  # of each training run: five minutes at 35 % of an H100

# modules of the standard library whose source is the text of --tiny
TINY_TEXT = "argparse ast calendar configparser csv datetime difflib dis doctest enum".split()


# -----------------------------------------------------------------------------
# Attention: the flash kernels, merged, against the definition in float64

def random_inputs(device, passes, B, H, G, d):
    """For every pass q (B, H, P, d), k and v (B, G, P, d), and a gradient like q: float64 that bf16 holds."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for positions in passes:
        tensors = []
        for heads in (H, G, G, H):
            x = torch.randn(B, heads, len(positions), d, generator=generator)
            tensors.append(x.bfloat16().double().to(device))
        inputs.append(tensors)
    return inputs

def attend_by_store(qkvs, passes, window):
    """What each pass of a training step gets from attention."""
    kv = KVBuffer(1)
    return [kv.attend(0, positions, *qkv, window) for positions, qkv in zip(passes, qkvs)]

def attend_by_definition(qkvs, passes, window):
    """The same from a matrix of all scores; the first pass is over all positions."""
    keys = values = None
    outputs = []
    for positions, (q, k, v) in zip(passes, qkvs):
        where = 2, positions.start, positions.stop, positions.step
        keys = k if keys is None else keys.slice_scatter(k, *where)
        values = v if values is None else values.slice_scatter(v, *where)
        repeats = q.size(1) // k.size(1)
        query = torch.arange(positions.start, positions.stop, positions.step, device=q.device)[:, None]
        key = torch.arange(keys.size(2), device=q.device)
        seen = (key <= query) & (key >= query - window)
        scores = q @ keys.repeat_interleave(repeats, 1).mT * q.size(-1) ** -0.5
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(shares @ values.repeat_interleave(repeats, 1))
    return outputs

def outputs_and_gradients(attend, inputs, passes, window, dtype):
    """Four float64 vectors: the outputs of all passes, and the gradients of all q, of all k, and of all v."""
    qkvs = [[x.to(dtype).requires_grad_() for x in (q, k, v)] for q, k, v, _ in inputs]
    outputs = attend(qkvs, passes, window)
    leaves = [x for qkv in qkvs for x in qkv]
    grads = torch.autograd.grad(outputs, leaves, [grad.to(dtype) for *_, grad in inputs])
    groups = [outputs, grads[0::3], grads[1::3], grads[2::3]]
    return [torch.cat([x.detach().double().flatten() for x in group]) for group in groups]

def relative_error(x, exact):
    return ((x - exact).norm() / exact.norm()).item()

def attention_numerics(args, device):
    """
    Relative errors of outputs and gradients, beside those of the definition computed in the same dtype: a
    kernel has no reason to be much further off than that.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = [  # T, S, window, heads, key/value heads, head size
        (2048, 2, 2048, 6, 6, 128),
        (2048, 2, 1024, 6, 6, 128),
        (2048, 8, 1024, 6, 6, 128),
        (251, 3, 251, 5, 5, 128),
        (1000, 3, 300, 5, 5, 128),
        (1999, 2, 700, 4, 2, 64),
        (777, 4, 1, 4, 1, 256),
        (130, 2, 65, 3, 3, 8),
    ]
    if args.tiny:
        cases = [(51, 3, 51, 2, 1, 8), (40, 2, 7, 2, 2, 8)]
    for T, S, window, H, G, d in cases:
        passes = Schedule(subsets=S).passes(T)
        inputs = random_inputs(device, passes, 2, H, G, d)
        exact = outputs_and_gradients(attend_by_definition, inputs, passes, window, torch.float64)
        merged = outputs_and_gradients(attend_by_store, inputs, passes, window, dtype)
        plain = outputs_and_gradients(attend_by_definition, inputs, passes, window, dtype)
        errors = [relative_error(*pair) for pair in zip(merged, exact)]
        errors_of_definition = [relative_error(*pair) for pair in zip(plain, exact)]
        names = "out", "dq", "dk", "dv"
        yield dict(
            T=T, S=S, window=window, heads=H, kv_heads=G, head_dim=d, dtype=str(dtype)[6:],
            errors=dict(zip(names, errors)),
            errors_of_definition=dict(zip(names, errors_of_definition)),
            ok=all(error < 3 * other for error, other in zip(errors, errors_of_definition)),
        )

def attention_speed(args, device):
    """
    Attention of one layer of depth 20, forward and backward, by each implementation that torch has here: of a
    plain pass, and of an interleaved step. FLOPs are those of the scores that causality and the window leave.
    """
    B, T, H, d = (1, 64, 2, 8) if args.tiny else (8, 2048, 10, 128)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    implementations = [flash_implementation()]
    if implementations != ["torch's"]:
        implementations.append("torch's")
    for implementation in implementations:
        if len(implementations) == 2 and implementation == "torch's":
            torch.nn.attention.restore_flash_attention_impl()
        for window in (T, T // 2):
            for schedule in (Schedule("plain"), Schedule()):
                passes = schedule.passes(T)
                inputs = random_inputs(device, passes, B, H, H, d)
                qkvs = [[x.to(dtype).requires_grad_() for x in qkv] for *qkv, _ in inputs]
                grads = [grad.to(dtype) for *_, grad in inputs]

                def work():
                    outputs = attend_by_store(qkvs, passes, window)  # noqa: B023
                    torch.autograd.backward(outputs, grads)  # noqa: B023

                work()
                seconds = statistics.median(bench.clock(device, work) for _ in range(args.repeats))
                scores = sum(map(len, passes)) / T * sum(min(t, window) + 1 for t in range(T))
                tflop = 3.5 * 4 * B * H * d * scores / 1e12  # a backward is two and a half forwards
                yield dict(implementation=implementation, window=window, schedule=schedule.kind,
                           ms=1000 * seconds, TFLOP=tflop, TFLOP_per_s=tflop / seconds)

def flash_implementation():
    """What torch's flash attention operators run."""
    return torch.nn.attention.current_flash_attention_impl() or "torch's"


# -----------------------------------------------------------------------------
# A training step: compiled against eager, its time, its kernels

def gradients(step, idx):
    """The loss, and the gradients of all parameters, a dict by name."""
    for p in step.parameters():
        p.grad = None
    loss, _ = step(idx, idx)
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in step.named_parameters() if p.grad is not None}

def largest_error(grads, exact):
    """The largest relative error of a gradient, and whose it is."""
    errors = {name: relative_error(grads[name], x) for name, x in exact.items() if x.norm() > 0}
    worst = max(errors, key=errors.get)
    return errors[worst], worst.removeprefix("_orig_mod.")

def compiled_gradients(args, device):
    """
    The loss and the gradients of a compiled step and of an eager one, in the dtype of training, each against
    an eager one in float32; graphs and graph breaks. Among the sizes are those at which Inductor pads what
    attention reads.
    """
    cases = [  # T, schedule, fields of GPTConfig
        (2048, Schedule(), dict(lrt="shared")),
        (1000, Schedule(subsets=3), dict(lrt="layerwise")),
        (502, Schedule(), dict(lrt="shared", n_kv_head=1)),
        (1000, Schedule("draft"), dict(lrt="shared", inject="kv")),
        (502, Schedule(kv_refresh=True), dict(lrt="shared", first_memory="embedding")),
        (1000, Schedule(), dict(lrt="shared", **NANOCHAT_BACKBONE)),
        (1999, Schedule("plain"), dict(lrt="none")),
    ]
    sizes = dict(vocab_size=4096, n_layer=3, n_head=5, n_kv_head=5, n_embd=640, window_pattern="SSL")
    if args.tiny:
        cases = [(24, Schedule(), dict(lrt="shared"))]
        sizes = dict(vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for T, schedule, fields in cases:
        torch.manual_seed(0)
        with torch.device(device):
            model = build_model(GPTConfig(sequence_len=T, **sizes | fields))
            for matrix in model.parameters():
                if matrix.dim() == 2:  # with the initial values most gradients are zero
                    torch.nn.init.normal_(matrix, std=sizes["n_embd"] ** -0.5)
            idx = torch.randint(sizes["vocab_size"], (2, T))
        step = TrainStep(model, schedule)
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(step, backend="aot_eager" if args.tiny else "inductor", dynamic=False)

        exact_loss, exact = gradients(step, idx)
        model.compute_dtype = dtype
        eager_loss, eager = gradients(step, idx)
        loss, grads = gradients(compiled, idx)
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
        eager_error, _ = largest_error(eager, exact)
        error, worst = largest_error(grads, exact)
        yield dict(
            T=T, schedule=schedule.kind, passes=len(schedule.passes(T)), model=str(fields),
            loss=exact_loss, eager_loss=eager_loss, compiled_loss=loss,
            eager_error=eager_error, compiled_error=error, worst=worst,
            graphs=counters["stats"]["unique_graphs"], graph_breaks=sum(counters["graph_break"].values()),
            ok=error < 2 * eager_error + 1e-5,
        )

def step_flags(args, depth):
    """The flags of `bench.py step` for the training step at a depth, and how many rows fit."""
    rows = 16 if depth <= 12 else 8
    flags = f"step --depth {depth} --width {64 * depth} --vocab-size 32768 --context 2048 --batch {rows} " \
        "--window-pattern SSSL --compile"
    if args.tiny:
        flags = "step --depth 2 --width 32 --vocab-size 64 --context 32 --batch 2 --window-pattern SL " \
            "--no-compile"
    return bench.make_parser().parse_args(flags.split())

def time_step(compute_gradients, update, flops, tokens, args, device):
    """Time, memory and MFU of a step given as two functions, with the time that the first one takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step():
        compute_gradients()
        update()

    first = bench.clock(device, step)
    for _ in range(2):
        step()
    times = []
    for _ in range(args.repeats):
        times.append((bench.clock(device, compute_gradients), bench.clock(device, update)))
    whole = [sum(pair) for pair in times]
    seconds = statistics.median(whole)
    low, _, high = statistics.quantiles(whole, n=4)
    peak = peak_flops(device)
    return dict(
        first_step_s=round(first, 1),
        step_ms=1000 * seconds,
        quartiles=f"{1000 * low:.1f}-{1000 * high:.1f}",
        update_ms=1000 * statistics.median(update for _, update in times),
        tokens_per_s=round(tokens / seconds),
        TFLOP=flops / 1e12,
        mfu=flops / seconds / peak if peak else None,
        peak_MiB=round(torch.cuda.max_memory_allocated() / MIB) if device.type == "cuda" else None,
    )

def step_speed(args, device, depth, variant):
    """A training step of a variant at a depth: forward, backward and update."""
    flags = step_flags(args, depth)
    work = bench.training_step(flags, device, variant)
    row = dict(depth=flags.depth, rows=flags.batch, T=flags.context, **variant._asdict())
    yield row | time_step(*work, flags.batch * flags.context, args, device)

def nanochat_step(flags, device):
    """A step of nanochat's, as bench.training_step() has ours: from its code, which is on the path."""
    import nanochat.gpt
    heads = max(flags.width // 128, 1)
    config = nanochat.gpt.GPTConfig(
        sequence_len=flags.context, vocab_size=flags.vocab_size, n_layer=flags.depth, n_head=heads,
        n_kv_head=heads, n_embd=flags.width, window_pattern=flags.window_pattern)
    with torch.device("meta"):
        model = nanochat.gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    step = torch.compile(model, dynamic=False) if flags.compile else model
    idx = torch.randint(flags.vocab_size, (flags.batch, flags.context), device=device)

    def compute_gradients():
        step(idx, idx).backward()

    def update():
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return compute_gradients, update, model.estimate_flops() * idx.numel()

def nanochat_speed(args, device):
    """
    nanochat's own step, and ours of the same backbone and optimizer. Without FlashAttention 3 nanochat has no
    kernel for windows, so that both are measured with full attention, too.
    """
    sys.path.insert(0, args.nanochat)
    from nanochat.flash_attention import USE_FA3
    flags = step_flags(args, 12)
    for pattern in ("L", flags.window_pattern):
        flags.window_pattern = pattern
        about = dict(depth=flags.depth, rows=flags.batch, T=flags.context, windows=pattern)
        tokens = flags.batch * flags.context
        theirs = nanochat_step(flags, device)
        row = dict(code="nanochat", flash_attention_3=USE_FA3)
        yield row | about | time_step(*theirs, tokens, args, device)
        ours = bench.training_step(flags, device, Variant("none", 1, recipe="nanochat"))
        yield dict(code="nanolrt") | about | time_step(*ours, tokens, args, device)

def step_profile(args, device, depth):
    """Where the time of a training step goes: its largest kernels, for the baseline and for S = 2."""
    for variant in (Variant("none", 1), Variant("shared", 2)):
        flags = step_flags(args, depth)
        compute_gradients, update, _ = bench.training_step(flags, device, variant)
        for _ in range(3):
            compute_gradients()
            update()
        with torch.profiler.profile() as profiled:
            compute_gradients()
            update()
            bench.clock(device, lambda: None)
        on_gpu = device.type == "cuda"
        events = []
        for event in profiled.key_averages():
            time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
            if is_kernel == on_gpu:
                events.append((time_us / 1000, event.count, event.key))
        total = sum(ms for ms, _, _ in events)
        for ms, count, name in sorted(events, reverse=True)[:30]:
            yield dict(lrt=variant.lrt, kernel=name[:120], calls=count, ms=round(ms, 3), share=ms / total)
        calls = sum(count for _, count, _ in events)
        yield dict(lrt=variant.lrt, kernel="all", calls=calls, ms=round(total, 3), share=1.0)


# -----------------------------------------------------------------------------
# What bench.py has a command for

def command(args, device, flags, tiny_flags):
    """The rows of a command of bench.py."""
    flags = tiny_flags if args.tiny else flags
    namespace = bench.make_parser().parse_args(f"{flags} --repeats {args.repeats}".split())
    _, rows = namespace.run(namespace, device)
    yield from rows


# -----------------------------------------------------------------------------
# Runs of train.py

def run_script(*command):
    """Run a script of ours, its output on the console. Raises UserError with its last line if it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        last_line = (done.stderr.strip() or "nothing on stderr").split("\n")[-1]
        raise UserError(f"{command[0]} ended with exit code {done.returncode}: {last_line}")

def prepared_data(args):
    """The folder of --data, or one that is prepared now, from Python's standard library."""
    if args.data:
        return Path(args.data).resolve()
    folder = args.work / "data"
    if not (folder / "meta.json").exists():
        args.work.mkdir(parents=True, exist_ok=True)
        sources = ["stdlib"]
        if args.tiny:
            sources = [args.work / "text.jsonl", "--vocab-size", 512]
            library = Path(os.__file__).parent
            texts = [(library / f"{name}.py").read_text("utf-8") for name in TINY_TEXT]
            sources[0].write_text("".join(json.dumps(dict(text=text)) + "\n" for text in 3 * texts), "utf-8")
        run_script("prepare_data.py", *sources, "--out", folder)
    return folder

def training_flags(args, name, flags):
    """The flags of train.py for a run of this name in the work folder."""
    where = ["--data", prepared_data(args), "--out", args.work, "--name", name]
    if args.device:
        where += ["--device", args.device]
    return [*where, *flags.split()]

TINY_RUN = "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 32 --total-batch-size 512 " \
    "--eval-tokens 2048 --decode-tokens 256"

def training_run(args, device, name, flags):
    """
    A run at depth 12 with its validation BPB. All have the same training FLOPs. One that was stopped goes on
    where it stopped, if its checkpoint is still there.
    """
    size = "--depth 12 --total-batch-size 131072 --eval-every 0 --eval-tokens 1048576 " \
        f"--decode-tokens 32768 --target-flops {TRAINING_FLOPS}"
    if args.tiny:
        size = f"{TINY_RUN} --target-flops 2e9"
    run_script("train.py", *training_flags(args, name, f"{size} {flags}"), "--resume", "auto")
    rows = read_log(args.work / name)
    steps = [row for row in rows if row["kind"] == "train"]
    final = [row for row in rows if row["kind"] == "eval"][-1]
    tail = steps[-max(len(steps) // 20, 1):]
    yield dict(
        command=f"train.py {size} {flags}",
        steps=len(steps), tokens=final["tokens"], bpb=final["bpb"], decoded=final["decode_rows"],
        last_loss=statistics.mean(row["loss"] for row in tail),
        step_ms=1000 * statistics.median(row["dt"] for row in steps),
        seconds=sum(row["dt"] for row in steps),
    )

def resumed_run(args, device):
    """
    A run of 20 steps, and the same gone on with from its checkpoint at step 10: on two GPUs, or on two
    processes of a CPU, or on the one GPU there is.
    """
    processes = 2 if device.type == "cpu" or torch.cuda.device_count() > 1 else 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py"]
    size = "--depth 4 --max-seq-len 1024 --total-batch-size 65536 --eval-tokens 65536 --decode-tokens 0"
    if args.tiny:
        size = TINY_RUN
    schedule = "--num-iterations 20 --save-every 10 --keep 9 --eval-every 0"
    flags = training_flags(args, "whole", f"{size} {schedule}")
    folders = [args.work / "whole", args.work / "resumed"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    run_script(*torchrun, *flags)
    shutil.copytree(*folders)
    run_script(*torchrun, "--resume", folders[1] / "ckpt_0000010.pt")
    losses = []
    for folder in folders:
        rows = read_log(folder)
        losses.append([row["loss"] for row in rows if row["kind"] == "train" and row["step"] >= 10])
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    yield dict(processes=processes, losses=losses[0], resumed=losses[1], apart=apart, ok=apart < 0.02)


# -----------------------------------------------------------------------------
# Inference in bf16, of a model that was trained here

def trained_model(args, device):
    """What load_run() returns for a small LRT that learns to use its memory, and some rows of its text."""
    flags = "--depth 6 --max-seq-len 512 --total-batch-size 16384 --num-iterations 600 --eval-every 0 " \
        "--eval-tokens 65536 --decode-tokens 0"
    if args.tiny:
        flags = f"{TINY_RUN} --num-iterations 20 --eval-every 0"
    run_script("train.py", *training_flags(args, "small", flags), "--resume", "auto")
    _, _, tokenizer, model = load_run(args.work / "small", device)
    data = open_data(prepared_data(args), verify=False)
    return tokenizer, model, first_rows(data.val, model.config.sequence_len, 8).to(device)

@torch.no_grad()
def prefill_tolerance(args, device):
    """
    Exact parallel prefill for several tolerances: the sweeps it takes, how far its hidden states (of RMS 1)
    are off those of decoding token by token in the same dtype, and the mean loss. The first rows are decoding
    itself.
    """
    _, model, rows = trained_model(args, device)
    idx, targets = rows[:, :-1], rows[:, 1:]
    dtype = model.compute_dtype
    model.compute_dtype = torch.float32
    exact = decode_tokens(model, idx, new_cache(model, *idx.shape))
    loss = model.token_loss(exact, targets).mean().item()
    yield dict(what="token by token", dtype="float32", off_float32=0.0, loss=loss)
    model.compute_dtype = dtype
    decoded = decode_tokens(model, idx, new_cache(model, *idx.shape))

    def compared(hidden, **about):
        return dict(
            dtype=str(dtype)[6:],
            off_float32=(hidden.float() - exact).square().mean().sqrt().item(),
            off_decoding=(hidden.float() - decoded.float()).square().mean().sqrt().item(),
            loss=model.token_loss(hidden, targets).mean().item(),
        ) | about

    yield compared(decoded, what="token by token")
    default = TOLERANCE[dtype]
    for tolerance in [4 * default, 2 * default, default, default / 2, default / 4]:
        hidden, _, sweeps = prefill(model, idx, new_cache(model, *idx.shape), tolerance=tolerance)
        yield compared(hidden, what="prefill", tolerance=tolerance, sweeps=sweeps)

def next_text_task(tokenizer, rows):
    """A task made of text: which of four pieces goes on with this one?"""
    half = rows.size(1) // 2
    texts = [tokenizer.decode(row.tolist()) for row in rows[:, :half].cpu()]
    ends = [tokenizer.decode(row.tolist()) for row in rows[:, half:half + half // 4].cpu()]
    examples = []
    for i, text in enumerate(texts):
        choices = [ends[(i + k) % len(ends)] for k in range(4)]
        examples.append(dict(query=text, choices=choices, gold=0))
    return Task("next text", "multiple_choice", 0, "", 0.25, "", examples)

@torch.no_grad()
def core_tolerance(args, device):
    """
    The losses of CORE's choices in the dtype of inference, in large batches and in small ones, against
    float32: the largest difference, and how many examples get another answer. Without --bundle, a task made
    of text.
    """
    tokenizer, model, rows = trained_model(args, device)
    tasks = load_tasks(args.bundle) if args.bundle else [next_text_task(tokenizer, rows)]
    T = model.config.sequence_len
    dtype = model.compute_dtype
    for task in tasks:
        if task.kind == "language_modeling":
            continue
        n = min(32, len(task.examples))
        examples = [make_example(task, i, tokenizer, T) for i in range(n)]
        model.compute_dtype = torch.float32
        exact = bench.score_in_batches(model, examples, True, 16 * T)
        exact_answers = answers(examples, exact)
        model.compute_dtype = dtype
        for batch in (1, 64):
            losses = bench.score_in_batches(model, examples, True, batch * T)
            apart = max(abs(a - b) for a, b in zip(losses, exact))
            others = sum(a != b for a, b in zip(answers(examples, losses), exact_answers))
            yield dict(task=task.name, dtype=str(dtype)[6:], batch=batch, examples=n, apart=apart,
                       other_answers=others)

def answers(examples, losses):
    """The likeliest choice of each example, given the losses of all choices one behind the other."""
    chosen, first = [], 0
    for example in examples:
        own = losses[first:first + len(example.tails)]
        chosen.append(own.index(min(own)))
        first += len(own)
    return chosen


# -----------------------------------------------------------------------------
# The parts, in order of worth

class Part(NamedTuple):
    minutes: float  # that it takes on an H100, by estimate: it does not begin with less left
    title: str
    rows: Callable  # (args, device) -> an iterator of rows

def step_part(depth, minutes, lrt="shared", subsets=2, **options):
    """Time and memory of a training step."""
    rows = partial(step_speed, depth=depth, variant=Variant(lrt, subsets, **options))
    return Part(minutes, f"a training step at depth {depth}", rows)

def training_part(name, flags):
    """A training run of depth 12."""
    return Part(9, f"a short training run at depth 12: {name}", partial(training_run, name=name, flags=flags))

def decode_part(how, option=""):
    """Latency of a token."""
    rows = partial(
        command, flags=f"decode --depth 12 --width 768 --context 128 2048 --batch 1 16 --tokens 32 {option}",
        tiny_flags="decode --depth 2 --width 64 --vocab-size 64 --context 8 --batch 1 --tokens 1")
    return Part(5, f"latency of a token at depth 12, the step {how}", rows)

RECIPE = "--lrt shared --inject kv --schedule draft"

PARTS = {
    "attention": Part(2, "merged attention against float64", attention_numerics),
    "compiled": Part(6, "the compiled step against the eager one", compiled_gradients),
    "step_d12_none": step_part(12, 2, "none", 1),
    "step_d12_s2": step_part(12, 4),
    "step_d12_cheaper": step_part(12, 3, subsets=1, kind="draft"),
    "flash": Part(2, "attention alone", attention_speed),
    "step_d20_none": step_part(20, 3, "none", 1),
    "step_d20_s2": step_part(20, 7),
    "step_d20_cheaper": step_part(20, 5, subsets=1, kind="draft"),
    "nanochat": Part(6, "nanochat's own training step, and ours", nanochat_speed),
    "profile": Part(6, "the kernels of a training step", partial(step_profile, depth=12)),
    "train_baseline": training_part("baseline", "--lrt none"),
    "train_control": training_part("control", "--lrt shared --schedule plain --first-memory embedding"),
    "train_recipe": training_part("recipe", RECIPE),
    "prefill": Part(4, "prefill in bf16", prefill_tolerance),
    "core": Part(4, "CORE in bf16", core_tolerance),
    "decode": decode_part("captured"),
    "decode_compiled": decode_part("compiled", "--compile"),
    "recurrent": Part(6, "a recurrent layer, captured and not", partial(
        command, flags="recurrent --width 768 --batch 8 --context 512 2048 --reference-up-to 1",
        tiny_flags="recurrent --width 64 --batch 1 --context 128 --reference-up-to 1")),
    "resume": Part(3, "a run, and the same one resumed", resumed_run),
    "step_d20_s2_recomputed": step_part(20, 9, checkpointing=True),
    "step_d12_s1": step_part(12, 3, subsets=1),
    "step_d12_s4": step_part(12, 5, subsets=4),
    "step_d12_s8": step_part(12, 9, subsets=8),
    "step_d12_layerwise": step_part(12, 4, "layerwise"),
    "step_d20_s1": step_part(20, 6, subsets=1),
    "step_d20_s4": step_part(20, 9, subsets=4),
    "step_d20_s8": step_part(20, 9, subsets=8),
}

def result_file(args, name):
    return Path(args.out) / f"gpu_{name}.json"

def read_result(args, name):
    """What a part has written, None if it has not begun."""
    try:
        return json.loads(result_file(args, name).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{result_file(args, name)} is damaged ({e}): remove it") from e

def begin_part(args, name):
    """The work of a part's process: a group of its own, so that what it starts can be stopped with it."""
    os.setpgid(0, 0)
    run_part(args, name)

def run_part(args, name):
    """Run a part in this process, and write its file after every row."""
    part = PARTS[name]
    result = dict(part=name, title=part.title, tiny=args.tiny, failed="it did not end")
    start = time.monotonic()

    def write(**more):
        result.update(seconds=round(time.monotonic() - start, 1), **more)
        write_json(result_file(args, name), result)

    try:
        write()
        device = pick_device(args.device)
        write(**machine(device), flash=flash_implementation(), rows=[])
        if args.commit:
            result["commit"] = args.commit
        for row in part.rows(args, device):
            say("  " + ", ".join(f"{key} {show(value)}" for key, value in row.items()))
            result["rows"].append(row)
            write()
        wrong = [row for row in result["rows"] if not row.get("ok", True)]
        write(failed=f"{len(wrong)} rows are not ok" if wrong else None)
    except Exception as e:
        traceback.print_exc()
        reason = str(e).strip().split("\n")[0]
        write(failed=f"{type(e).__name__}: {reason}"[:500])

def show(value):
    """A value of a row, for the console."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {show(x)}" for key, x in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

def stop(process):
    """End a part and what it has started: train.py saves first."""
    group = process.pid
    for sig, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5)):
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                if sig is not None:
                    os.killpg(group, sig)
                    sig = None
                process.join(0.2)
                os.killpg(group, 0)  # raises when nobody is left
        except ProcessLookupError:
            break
    process.kill()  # it may not have got as far as to have a group of its own
    process.join()

def run_all(args, names):
    """Run parts one after the other, as long as there is time. Returns the names of those that failed."""
    deadline = time.monotonic() + 60 * args.minutes
    failed = []
    for name in names:
        left = deadline - time.monotonic()
        if left < 60 * PARTS[name].minutes and not args.tiny:
            say(f"{name}: left for the next call, it may take {PARTS[name].minutes} minutes")
            continue
        say(f"{name}: {PARTS[name].title}")
        limit = min(60 * PART_MINUTES, left)
        result_file(args, name).unlink(missing_ok=True)
        process = multiprocessing.get_context("spawn").Process(target=begin_part, args=(args, name))
        process.start()
        try:
            process.join(limit)
        finally:  # Ctrl-C, too
            if process.exitcode is None:
                stop(process)
        result = read_result(args, name) or dict(part=name)
        if result.get("failed", True):
            if process.exitcode == -signal.SIGTERM:
                result["failed"] = f"stopped after {limit:.0f} s"
            elif process.exitcode:
                result["failed"] = f"its process ended with exit code {process.exitcode}"
            write_json(result_file(args, name), result)
            say(f"{name}: FAILED, {result['failed']}")
            failed.append(name)
    return failed


# -----------------------------------------------------------------------------
# The command

def make_parser():
    parser = ArgumentParser(prog="bench.py gpu", description="Everything that only a GPU can settle.")
    add = parser.add_argument
    add("--only", nargs="+", choices=list(PARTS), metavar="PART",
        help="these parts, again if they have a result")
    add("--list", action="store_true", help="print the parts and which have a result")
    add("--minutes", type=float, default=180, help="no part begins that might take longer than what is left")
    add("--out", metavar="DIR", help="folder of the results (default: research/results; --tiny: --work)")
    add("--work", metavar="DIR", help="folder of data and runs (default: runs_gpu, runs_gpu_tiny)")
    add("--data", metavar="DIR", help="prepared data (default: Python's standard library, prepared now)")
    add("--bundle", metavar="DIR", help="CORE's folder with core.yaml (default: a task made of text)")
    add("--nanochat", metavar="DIR", help="a checkout of nanochat; without it that part is left out")
    add("--commit", help="what to note as the commit, where there is no git")
    add("--device", help="cuda | mps | cpu (default: the best there is)")
    add("--repeats", type=int, default=9, help="measurements of each time")
    add("--tiny", action="store_true", help="tiny sizes, as without CUDA: only to see that every part runs")
    return parser

def parse_args(argv=None):
    """The command line, checked and filled in. Raises UserError."""
    args = make_parser().parse_args(argv)
    at_least(args, repeats=2, minutes=0)
    device = pick_device(args.device)
    args.tiny = args.tiny or device.type != "cuda"
    args.work = Path(args.work or ROOT / ("runs_gpu_tiny" if args.tiny else "runs_gpu")).resolve()
    args.out = Path(args.out or (args.work if args.tiny else RESULTS)).resolve()
    for name in ("data", "bundle", "nanochat"):
        folder = getattr(args, name)
        if folder is not None:
            if not Path(folder).is_dir():
                raise UserError(f"--{name} {folder} is no folder")
            setattr(args, name, str(Path(folder).resolve()))
    return args

def main(argv=None):
    args = parse_args(argv)
    results = {name: read_result(args, name) for name in PARTS}
    done = [name for name, result in results.items() if result and not result.get("failed", True)]
    if args.list:
        for name, part in PARTS.items():
            state = "done" if name in done else "failed" if results[name] else "open"
            print(f"{name:24} {state:7} {part.title}")
        return

    # those that have no result come first, then those that failed
    names = args.only
    if names is None:
        begun = [name for name in PARTS if results[name] and name not in done]
        names = [name for name in PARTS if not results[name]] + begun
        if not args.nanochat:
            names.remove("nanochat")
            say("nanochat: left out, it needs --nanochat DIR")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = run_all(args, names)
    if failed:
        raise UserError(f"{len(failed)} parts failed: {', '.join(failed)}; their files in {args.out} say why")

if __name__ == "__main__":
    run_main(main)
