"""
Train a Latent Recurrent Transformer, or the plain GPT under it. --depth is the one dial.

    python train.py --depth 4 --lrt shared                                                one process: GPU, Mac or CPU
    torchrun --standalone --nproc_per_node=8 train.py --depth=20 --lrt=shared             one node of 8 GPUs
    python train.py --resume runs/d4_shared                                               go on with a run
    python train.py --name x --resume auto                                                the same command starts and goes on
"""

import dataclasses
import faulthandler
import gc
import json
import math
import os
import signal
import time
import warnings
from argparse import BooleanOptionalAction, Namespace
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from core import describe_core, evaluate_core, load_tasks
from eval_core import evaluate_bpb, first_rows
from interleave import Schedule, TrainStep
from model import GPT, GPTConfig, KVCache
from prepare_data import ArgumentParser, UserError, at_least, lock, open_data, run_main, write_atomic
from sample import complete, compute_dtype, find_checkpoint, join_processes, load_checkpoint, load_weights, pick_device

# peak dense bf16 FLOP/s, for MFU (vendors' data sheets)
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
              "L40S": 362e12, "4090": 165e12, "3090": 71e12}

MAX_SKIPS = 10  # --on-nonfinite skip: so many steps in a row are no accident
TIMEOUT = timedelta(minutes=10)  # of a collective: a process that ends is noticed at once, this is for one that hangs

def peak_flops(device):
    """Peak FLOP/s of a device, None where it is not known."""
    return next((f for name, f in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)), None)

def make_parser():
    parser = ArgumentParser(description="Train a Latent Recurrent Transformer. --depth is the one dial; the rest follows from it.")
    g = parser.add_argument_group("run")
    g.add_argument("--data", default="data", help="folder that prepare_data.py made")
    g.add_argument("--name", metavar="NAME", help="the run's folder is OUT/NAME (default: d<depth>_<lrt>, or d<depth>_recurrent; numbered if it exists)")
    g.add_argument("--out", type=os.path.normpath, default="runs", help="where run folders go")
    g.add_argument("--resume", metavar="PATH", help="run folder or checkpoint to go on with; its flags apply, those given here on top. "
                   "auto: OUT/NAME from its newest checkpoint, or from the start if it has none, so that the same command starts and restarts")
    g.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data")
    g.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    g.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    g.add_argument("--dry-run", action="store_true", help="print the plan, parameters to KV cache, and end: nothing is trained or written")
    g = parser.add_argument_group("model")
    g.add_argument("--arch", choices=["gpt", "recurrent"], default="gpt", help="recurrent: layers attend to keys and values of their own outputs, without --lrt")
    g.add_argument("--depth", type=int, default=20, help="number of layers; width = depth * aspect ratio, up to whole heads")
    g.add_argument("--aspect-ratio", type=int, default=64, help="width per layer")
    g.add_argument("--head-dim", type=int, default=128, help="head size")
    g.add_argument("--n-kv-head", type=int, help="key/value heads, for grouped-query attention (default: as many as query heads)")
    g.add_argument("--max-seq-len", type=int, default=2048, help="context, and tokens a row")
    g.add_argument("--window-pattern", default="SSSL", help="tiled over layers: L full attention, S half the context; the last layer is always L")
    g.add_argument("--value-embeds", choices=["none", "alternate", "all"], default="all", help="which layers have a value embedding")
    g = parser.add_argument_group("latent recurrence")
    g.add_argument("--lrt", choices=["none", "shared", "layerwise"], help="none: plain GPT; shared: one memory projection for all layers; layerwise: one a layer (default: shared, with --arch recurrent none)")
    g.add_argument("--source-layer", type=int, help="memory is read after this layer, 0-based (default: 3/4 of the way up)")
    g.add_argument("--inject", choices=["kv", "residual", "both"], default="both", help="how memory enters a layer")
    g.add_argument("--memory-init", type=float, default=0.1, help="c at the start: how much memory is added to the residual stream")
    g.add_argument("--schedule", choices=["interleaved", "refine", "chunked", "sequential"], default="interleaved", help="the passes of a training step, see interleave.py")
    g.add_argument("--subsets", type=int, default=2, help="interleaved: S; a step costs about two plain passes for any S")
    g.add_argument("--kv-refresh", action="store_true", help="interleaved: renew the memory in keys and values not yet visited, after each pass")
    g.add_argument("--refinements", type=int, default=3, help="refine: K full passes after the first; a step costs 1 + K passes")
    g.add_argument("--chunk", type=int, default=64, help="chunked: tokens a chunk")
    g.add_argument("--detach", action="store_true", help="no gradient from a pass into the ones before it")
    g.add_argument("--forward-passes", type=int, default=0, metavar="N", help="cheaper: the first N passes run forward only, without loss or gradient; those of --schedule refine up to the source layer only")
    g.add_argument("--deepen", type=float, default=0.0, metavar="SHARE", help="refine: this share of the steps, the last ones, refines once more, forward only: decoding hands memory on and on")
    g.add_argument("--memory-start", type=float, default=0.0, help="cheaper: this share of the steps, from the first one on, runs one plain pass")
    g.add_argument("--memory-share", type=float, default=1.0, help="cheaper: after that, the share of the steps, drawn at random, that runs the schedule; the others run one plain pass")
    g.add_argument("--loss-weights", type=float, nargs="+", metavar="W", help="one weight a pass (default: the plain mean); where it is 0, nothing is computed for that loss alone")
    g = parser.add_argument_group("horizon", "the first one given counts")
    g.add_argument("--num-iterations", type=int, help="optimizer steps")
    g.add_argument("--target-flops", type=float, help="as many steps as this many training FLOPs buy")
    g.add_argument("--target-param-data-ratio", type=float, default=10, help="tokens per parameter of the matrices and the head")
    g = parser.add_argument_group("optimization", "matrices: Muon; embeddings, head and scalars: AdamW, all scaled with batch size and width")
    g.add_argument("--total-batch-size", type=int, help="tokens a step (default: from the horizon, 524288 at depth 12)")
    g.add_argument("--device-batch-size", type=int, help="rows a forward and device; lower it when memory runs out (default: the largest of 16, 8, .. that divides, with at most 32768 positions in all passes)")
    g.add_argument("--activation-checkpointing", action="store_true", help="save memory: keep each layer's input only, and run the layer again in the backward")
    g.add_argument("--matrix-lr", type=float, default=0.02, help="Muon")
    g.add_argument("--memory-lr", type=float, help="Muon, memory projections (default: as the matrices)")
    g.add_argument("--embedding-lr", type=float, default=0.3, help="embedding and value embeddings")
    g.add_argument("--head-lr", type=float, default=0.004, help="output head")
    g.add_argument("--gate-lr", type=float, default=0.02, help="gates of keys and values")
    g.add_argument("--scalar-lr", type=float, default=0.5, help="x0 and memory scalars; the residual scalars get a hundredth")
    g.add_argument("--weight-decay", type=float, default=0.2, help="of the matrices, up to depth 12, less for deeper ones; falls to 0 over the run")
    g.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm, 0: no clipping")
    g.add_argument("--on-nonfinite", choices=["stop", "skip"], default="stop",
                   help=f"a step whose loss or gradient is not finite: stop, or leave the weights as they are ({MAX_SKIPS} in a row stop in any case)")
    g.add_argument("--warmup-steps", type=int, default=40, help="steps of linear warm-up")
    g.add_argument("--warmdown-ratio", type=float, default=0.5, help="share of the run over which the learning rates fall linearly")
    g.add_argument("--final-lr-frac", type=float, default=0.0, help="where they end, as a share of where they were")
    g = parser.add_argument_group("evaluation and saving", "in steps; 0: only at the end")
    g.add_argument("--eval-every", type=int, default=250, help="validation BPB")
    g.add_argument("--eval-tokens", type=int, default=2**20, help="tokens scored in parallel")
    g.add_argument("--decode-tokens", type=int, default=2**15, help="tokens decoded one by one with the exact recurrence, 0: none")
    g.add_argument("--core-every", type=int, help="CORE with memory (default: never, as it can take longer than a small run)")
    g.add_argument("--core-bundle", metavar="DIR", help="folder with core.yaml (default: data_core/eval_bundle, downloaded once)")
    g.add_argument("--core-max-per-task", type=int, metavar="N", help="run only so many examples of each task: an estimate")
    g.add_argument("--save-every", type=int, default=1000, help="checkpoint")
    g.add_argument("--keep", type=int, default=2, help="how many checkpoints stay")
    g.add_argument("--log-every", type=int, default=10, help="console line; log.jsonl has every step")
    return parser

# what may change from a run to its continuation; anything else would make it another run
MAY_CHANGE = {"resume", "data", "device", "compile", "device_batch_size", "activation_checkpointing", "on_nonfinite", "eval_every", "eval_tokens",
              "decode_tokens", "core_every", "core_bundle", "core_max_per_task", "save_every", "keep", "log_every", "dry_run"}

def parse_args():
    """The flags, and the checkpoint to go on with or None. A resumed run's own flags stand in for the defaults."""
    parser = make_parser()
    args, checkpoint = parser.parse_args(), None
    if args.resume == "auto":
        args.name = args.name or default_name(args)
        folder = Path(args.out) / args.name
        args.resume = str(folder) if any(folder.glob("ckpt_*.pt")) else "auto"
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):  # said now, and not when the first process dies
        if args.resume is None:
            raise UserError("--max-restarts needs --resume auto: without it a restart would not go on with this run")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch issue 135712
            raise UserError("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, and --standalone or --rdzv_backend=c10d: "
                            "otherwise a restart waits for processes that are gone")
    if args.resume not in (None, "auto"):
        path, checkpoint = newest_checkpoint(args.resume)
        before = vars(parser.parse_args([])) | checkpoint["args"] | {"name": path.parent.name, "out": str(path.parent.parent)}
        args = parser.parse_args(namespace=Namespace(**before))  # argparse leaves what is there, unless given
        changed = [k for k, v in before.items() if k not in MAY_CHANGE and v != getattr(args, k)]
        if changed:
            raise UserError(f"{path} was trained with " + ", ".join(f"--{k.replace('_', '-')} {before[k]}" for k in changed)
                            + ": resume without that flag, or start another run")
        args.resume = str(path)
    args.lrt = args.lrt or ("none" if args.arch == "recurrent" else "shared")
    at_least(args, depth=1, subsets=1, refinements=1, chunk=1, seed=0, num_iterations=1, target_flops=1, total_batch_size=1, device_batch_size=1, aspect_ratio=1, head_dim=1,
             matrix_lr=0, memory_lr=0, embedding_lr=0, head_lr=0, gate_lr=0, scalar_lr=0, weight_decay=0, grad_clip=0, warmup_steps=0, warmdown_ratio=0,
             final_lr_frac=0, eval_every=0, eval_tokens=1, decode_tokens=0, core_every=0, core_max_per_task=1, save_every=0, keep=1, log_every=1, target_param_data_ratio=0,
             memory_start=0, memory_share=0, deepen=0, forward_passes=0)
    if args.core_every is None and (args.core_bundle or args.core_max_per_task):
        raise UserError("--core-bundle and --core-max-per-task go with --core-every")
    for name in ("warmdown_ratio", "memory_start", "memory_share", "deepen"):
        if getattr(args, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} must be at most 1, not {getattr(args, name)}")
    return args, checkpoint


# -----------------------------------------------------------------------------
# From the dial to a model, a schedule and its optimizers

def make_config(args, depth, vocab_size):
    """The model at this depth. Raises UserError for one that cannot be built."""
    n_head = -(-depth * args.aspect_ratio // args.head_dim)
    try:
        return GPTConfig(sequence_len=args.max_seq_len, vocab_size=vocab_size, n_layer=depth, n_head=n_head,
                         n_kv_head=n_head if args.n_kv_head is None else args.n_kv_head, n_embd=n_head * args.head_dim,
                         window_pattern=args.window_pattern, value_embeds=args.value_embeds, lrt=args.lrt,
                         source_layer=args.source_layer, inject=args.inject, memory_init=args.memory_init, arch=args.arch)
    except ValueError as e:
        raise UserError(e)

def make_schedule(args):
    """The schedule of a training step, checked against the sequence length. Raises UserError."""
    try:
        schedule = Schedule("plain" if args.lrt == "none" else args.schedule, args.subsets, args.refinements, args.chunk,
                            args.kv_refresh, args.detach, args.loss_weights, args.forward_passes)
        schedule.passes(args.max_seq_len)
    except ValueError as e:
        raise UserError(e)
    if schedule.kind == "chunked" and args.chunk >= args.max_seq_len:
        raise UserError(f"--chunk {args.chunk} covers the whole context of {args.max_seq_len}: memory would never reach a token")
    if args.deepen and schedule.kind != "refine":
        raise UserError(f"--deepen goes with --schedule refine, not with {schedule.kind}")
    return schedule

def make_optimizers(model, args, batch_scale):
    """
    Muon for the matrices and memory projections, AdamW for everything else, as in nanochat. Learning rates grow
    with the square root of the batch above 2^19 tokens; those of AdamW's matrices shrink with the square root of the
    width. Every group keeps its `initial_lr`; set_schedule() makes the current lr of it. In several processes each
    updates its share of the parameters and holds their state alone (ZeRO stage 1), Muon's orthogonalization included.
    """
    def make(optimizer, params, **defaults):
        if dist.is_initialized():
            from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import
            return ZeroRedundancyOptimizer(params, optimizer, **defaults)
        return optimizer(params, **defaults)

    groups = model.parameter_groups()
    width_scale = (model.config.n_embd / 768) ** -0.5
    adamw = make(torch.optim.AdamW, [
        dict(params=groups["embedding"] + groups["value embeddings"], lr=args.embedding_lr * width_scale),
        dict(params=groups["head"], lr=args.head_lr * width_scale),
        dict(params=groups["gates"], lr=args.gate_lr),  # too thin for Muon
        dict(params=groups["residual scalars"], lr=args.scalar_lr * 0.01),
        dict(params=groups["x0 scalars"], lr=args.scalar_lr, betas=(0.96, 0.95)),
        dict(params=groups["memory scalars"], lr=args.scalar_lr),
    ], betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = make(torch.optim.Muon, [
        dict(params=groups["matrices"], lr=args.matrix_lr),
        dict(params=groups["memory projections"], lr=args.matrix_lr if args.memory_lr is None else args.memory_lr),
    ], momentum=0.95, weight_decay=args.weight_decay * min((12 / model.config.n_layer) ** 2, 1.0))
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] * batch_scale
            group["initial_weight_decay"] = group["weight_decay"]
    return adamw, muon

def set_schedule(optimizers, step, num_iterations, args):
    """Learning rates, momentum and weight decay of this step, in place; returns the learning rates' multiplier."""
    warmdown = args.warmdown_ratio * num_iterations
    up = min((step + 1) / (args.warmup_steps + 1), 1.0)
    left = min((num_iterations - step) / warmdown, 1.0) if warmdown else 1.0
    multiplier = up * (left + (1 - left) * args.final_lr_frac)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            group["weight_decay"] = group["initial_weight_decay"] * (1 - step / num_iterations)
            if "momentum" in group:
                group["momentum"] = 0.85 + 0.10 * min(step / 300, 1.0)
    return multiplier

def deepened(args, schedule, step, num_iterations):
    """The schedule of this step, if it is one with memory: what a model that was trained up to it is scored with, too."""
    return schedule.deeper() if step >= (1 - args.deepen) * num_iterations else schedule

def schedule_at(args, schedule, step, num_iterations):
    """What this step runs: the schedule, one refinement more, or one plain pass. Every process, and a resumed run, says the same."""
    if step < args.memory_start * num_iterations or np.random.default_rng((args.seed, step)).random() >= args.memory_share:
        return Schedule("plain")
    return deepened(args, schedule, step, num_iterations)


@dataclass
class Plan:
    """A run before anything of its size is allocated."""
    config: GPTConfig
    schedule: Schedule
    counts: dict  # parameters by group
    flops_per_token: float  # the mean over the steps
    cost: float  # passes, as the paper counts them: Schedule.cost(), the mean over the steps
    flops_ratio: float  # flops_per_token over that of one plain pass
    kv_bytes: int  # the KV cache of one sequence that fills the context, as it is decoded
    total_batch: int  # tokens a step
    rows_per_step: int
    device_batch: int  # rows a forward and device
    micro_steps: int  # forwards a step and device
    num_iterations: int

def make_plan(args, vocab_size, world, dtype):
    """From the flags to sizes, batch and horizon; dtype: of the activations. Raises UserError for what does not fit together."""
    config, schedule, T = make_config(args, args.depth, vocab_size), make_schedule(args), args.max_seq_len
    try:
        with torch.device("meta"):  # shapes without storage
            model, depth_12 = GPT(config), GPT(GPTConfig(vocab_size=vocab_size, lrt=args.lrt))
    except RuntimeError as e:
        raise UserError(f"no model of width {config.n_embd} can be built ({e})")
    counts, with_memory, deep = model.parameter_counts(), (1 - args.memory_start) * args.memory_share, min(args.deepen, 1 - args.memory_start) * args.memory_share
    shares = [(1 - with_memory, Schedule("plain")), (with_memory - deep, schedule), *([(deep, schedule.deeper())] if deep else [])]  # of the steps
    flops_per_token = sum(share * s.flops_per_token(model, T) for share, s in shares)
    cost = sum(share * s.cost(model, T) for share, s in shares)
    kv = KVCache(config, 1, T, "meta", dtype, rolling=True)
    total_batch = args.total_batch_size
    if total_batch is None:  # nanochat's rule: tokens^0.383, from 2^19 at depth 12 (Power Lines, arXiv 2505.13738)
        ideal = 2**19 * (counts["scaling"] / depth_12.parameter_counts()["scaling"]) ** 0.383
        rows = max(2 ** round(math.log2(ideal)) // (world * T), 1)
        total_batch = (rows if rows < 16 else rows // 16 * 16) * world * T  # whole forwards of 16 rows
    if total_batch % (world * T):
        raise UserError(f"--total-batch-size {total_batch} is not divisible by {world} processes * {T} tokens a row = {world * T}")
    rows = total_batch // T // world
    positions = sum(map(len, schedule.passes(T)[schedule.forward_passes:]))  # of a row, all passes that keep activations
    device_batch = args.device_batch_size or max(b for b in (16, 8, 4, 2, 1) if rows % b == 0 and (b * positions <= 2**15 or b == 1))
    if rows % device_batch:
        raise UserError(f"--device-batch-size {device_batch} does not divide the {rows} rows a step of each process "
                        f"(--total-batch-size {total_batch} / {world} processes / {T} tokens)")
    if args.num_iterations:
        num_iterations = args.num_iterations
    elif args.target_flops:
        num_iterations = max(round(args.target_flops / (flops_per_token * total_batch)), 1)
    else:
        num_iterations = max(round(args.target_param_data_ratio * counts["scaling"] / total_batch), 1)
    return Plan(config, schedule, counts, flops_per_token, cost, flops_per_token / model.flops_per_token(T),
                sum(x.nbytes for x in kv.k + kv.v), total_batch, rows * world, device_batch, rows // device_batch, num_iterations)

def describe(plan, world, device, dtype, rows_per_epoch):
    """The plan in lines, for --dry-run and for the start of a run. rows_per_epoch: None if there is no data yet."""
    config, schedule, counts, T = plan.config, plan.schedule, plan.counts, plan.config.sequence_len
    tokens = plan.num_iterations * plan.total_batch
    return [
        f"{counts['total']:,} parameters (" + ", ".join(f"{k} {v:,}" for k, v in counts.items() if v and k not in ("total", "scaling")) + ")",
        f"{world} x {device}, {str(dtype)[6:]} | depth {config.n_layer}, width {config.n_embd}, {config.n_head} heads, {config.label}"
        + (f", memory from layer {config.source_layer}, {schedule.kind}, {len(schedule.passes(T))} passes" if config.lrt != "none" else ""),
        f"{plan.num_iterations} steps of {plan.total_batch:,} tokens ({plan.rows_per_step} rows of {T}: {world} x {plan.micro_steps} x {plan.device_batch}) = "
        f"{tokens:,} tokens, {tokens / counts['scaling']:.1f} a parameter" + (f", {plan.num_iterations * plan.rows_per_step / rows_per_epoch:.2f} epochs" if rows_per_epoch else ""),
        f"{tokens * plan.flops_per_token:.2e} FLOPs, {plan.flops_ratio:.2f} times those of plain passes over the same tokens "
        f"({tokens * plan.cost:,.0f} tokens of baseline-equivalent compute); "
        f"KV cache {plan.kv_bytes:,} bytes a sequence of {T} tokens",
    ]

def saved_bytes(work, parameters):
    """What work(), a forward pass, leaves for its backward: bytes of all new storages that autograd or Python holds, parameters not."""
    def tensors():
        return [x for x in gc.get_objects() if type(x) in (torch.Tensor, FakeTensor)]
    others = tensors()  # kept, so that none of their addresses is given to another
    before, held = {x.untyped_storage()._cdata for x in [*others, *parameters]}, {}
    def keep(x):
        held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = work()  # noqa: F841 (alive, and so are the storages, until they are counted)
    gc.collect()
    for x in tensors():
        keep(x)
    return sum(n for storage, n in held.items() if storage not in before)

def memory(plan, world, dtype, recompute):
    """
    Bytes that one process needs at least, a dict: weights, gradients and optimizer state in float32, the state shared by
    all processes, and what the forward of a device batch in this dtype keeps for its backward, counted on tensors without
    storage. That is without compilation, which keeps less; long schedules and recurrent layers are not counted.
    """
    total, T = plan.counts["total"], plan.config.sequence_len
    muon = plan.counts["matrices"] + plan.counts["memory projections"]  # one momentum each, AdamW keeps two
    parts = dict(weights=4 * total, gradients=4 * total, optimizers=(8 * total - 4 * muon) // world)
    if plan.config.arch == "gpt" and len(plan.schedule.passes(T)) <= 16:
        with FakeTensorMode():
            model, idx = GPT(plan.config), torch.zeros(plan.device_batch, T, dtype=torch.int64)
            model.compute_dtype, model.recompute = dtype, recompute
            parts["activations"] = saved_bytes(lambda: TrainStep(model, plan.schedule)(idx, idx), model.parameters())
    return parts

def dry_run(args):
    """Print the plan and end: no model is built, no data needed (the default vocabulary is assumed then)."""
    device, world = pick_device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    dtype, data = compute_dtype(device), open_data(args.data, verify=False) if Path(args.data).exists() else None
    plan = make_plan(args, data.meta["vocab_size"] if data else 32768, world, dtype)
    print("\n".join(describe(plan, world, device, dtype, Rows(data.train, args.max_seq_len, args.seed).per_epoch if data else None)))
    for dtype in {dtype: 0, torch.bfloat16: 0}:  # that of a GPU, too
        parts = memory(plan, world, dtype, args.activation_checkpointing)
        print(f"memory a process, {str(dtype)[6:]}, {plan.device_batch} rows: " + " + ".join(f"{name} {n / 2**30:.2f}" for name, n in parts.items())
              + f" = {sum(parts.values()) / 2**30:.2f} GiB")

# -----------------------------------------------------------------------------
# Data: rows of T+1 tokens, T apart, in an order that only the seed decides

def stamp(shard):
    """Size and time of change of a memory-mapped shard's file; None if it is gone, or if there is no file."""
    with suppress(FileNotFoundError):
        if isinstance(shard, np.memmap):
            return (stat := os.stat(shard.filename)).st_size, stat.st_mtime_ns

class Rows:
    """
    The training rows, numbered 0, 1, 2, .. without end. An epoch goes through the shards in a random order, and
    through the rows of each in a random order; both depend on seed and epoch alone. So a step's rows are the same for
    any number of processes, and a row number is all that a resumed run needs.
    """

    def __init__(self, shards, T, seed):
        self.shards, self.T, self.seed = shards, T, seed
        self.stamps = [stamp(shard) for shard in shards]
        self.counts = np.array([max(len(shard) - 1, 0) // T for shard in shards])
        self.per_epoch = int(self.counts.sum())
        self.orders = {}

    def order(self, epoch, shard=-1):
        """The order of an epoch's shards, or of the rows within one of them."""
        if (epoch, shard) not in self.orders:
            if shard >= 0:  # only the current shard's is kept: some million rows each
                self.orders = {key: value for key, value in self.orders.items() if key[1] < 0}
            n = self.counts[shard] if shard >= 0 else len(self.shards)
            self.orders[epoch, shard] = np.random.default_rng((self.seed, epoch, shard + 1)).permutation(n)
        return self.orders[epoch, shard]

    def __getitem__(self, n):
        """Row n: (T+1,) int64. Raises UserError for a shard that is not as it was: behind the end of a truncated one, SIGBUS kills."""
        epoch, n = divmod(n, self.per_epoch)
        for shard in self.order(epoch):
            if n < self.counts[shard]:
                if stamp(self.shards[shard]) != self.stamps[shard]:
                    raise UserError(f"{self.shards[shard].filename} was changed or removed while it was in use: re-run prepare_data.py, then --resume")
                start = self.order(epoch, shard)[n] * self.T
                return self.shards[shard][start:start + self.T + 1].astype(np.int64)
            n -= self.counts[shard]

    def batch(self, first, count, device):
        """Rows first .. first+count-1 as inputs and targets, each (count, T) int64, on their way to the device: nobody waits."""
        rows = torch.from_numpy(np.stack([self[n] for n in range(first, first + count)]))
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=device.type == "cuda")
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# -----------------------------------------------------------------------------
# The run folder

def default_name(args):
    return f"d{args.depth}_{args.arch if args.arch != 'gpt' else args.lrt or 'shared'}"

def new_run_folder(args):
    """Make the run's folder, numbered if it exists and no name was asked for. Raises UserError if the name is taken."""
    name = args.name or default_name(args)
    for i in range(1, 10000):
        folder = Path(args.out) / (name if i == 1 else f"{name}_{i}")
        try:
            folder.mkdir(parents=True, exist_ok=args.resume == "auto")  # it ended before its first checkpoint
            return folder
        except FileExistsError:
            if args.name:
                raise UserError(f"{folder} exists: go on with it by --resume {folder}, or give another --name")
        except OSError as e:
            raise UserError(f"cannot make {folder}: {e.strerror}")

def newest_checkpoint(path):
    """
    (path, checkpoint) of the file that is meant, or of the newest in a run folder that is whole: damaged ones are passed
    over, saying so. Raises UserError where there is none.
    """
    newest = find_checkpoint(path)
    for path in [newest] if Path(path).is_file() else sorted(newest.parent.glob("ckpt_*.pt"), reverse=True):
        try:
            return path, load_checkpoint(path, verify=True)
        except UserError as e:
            error = e
            print(f"warning: {e}", flush=True)
    raise error

def read_log(folder):
    """The rows of log.jsonl; lines that a crash or a full disk cut short are left out."""
    rows = []
    if (folder / "log.jsonl").exists():
        for line in (folder / "log.jsonl").read_text("utf-8", "replace").splitlines():
            try:
                row = json.loads(line)
                row["step"], row["kind"]
                rows.append(row)
            except (ValueError, KeyError, TypeError):
                pass
    return rows

def rewind(folder, step):
    """
    Take the run back to `step`: what came later, in the log and as checkpoints, is about to be done again. Returns the
    last step that was evaluated, -1 if none.
    """
    # an evaluation at `step` came before the checkpoint, the training step of that number after it
    rows = [x for x in read_log(folder) if x["step"] < step or (x["step"] == step and x["kind"] == "eval")]
    write_atomic(folder / "log.jsonl", lambda f: f.write("".join(json.dumps(x) + "\n" for x in rows).encode()))
    for path in folder.glob("ckpt_*.pt*"):
        if path.suffix == ".tmp" or int(path.stem.split("_")[1]) > step:
            path.unlink()
    return max([x["step"] for x in rows if x["kind"] == "eval"], default=-1)

def load_state(checkpoint, path, model, optimizers):
    """Weights and optimizer state of a checkpoint. Raises UserError if they are of another model."""
    load_weights(model, checkpoint)
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"the optimizer state of {path} does not fit its model ({e}): use an older checkpoint, or train again")


# -----------------------------------------------------------------------------
# Training

def main():
    args, checkpoint = parse_args()
    if args.dry_run:
        return dry_run(args)

    # device and processes
    device, rank, world = join_processes(args.device, TIMEOUT)
    ddp = dist.is_initialized()
    master = rank == 0

    def say(text):
        if master:
            with suppress(OSError):  # a console that goes to a full disk is no reason to end
                tqdm.write(text)

    # data and plan
    data = open_data(args.data, verify=master)  # one process reads every byte, the others trust it
    shards_sha256 = [shard["sha256"] for shard in data.meta["train"]]
    if checkpoint and checkpoint["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise UserError(f"{data.folder} has another tokenizer than {args.resume} was trained with: give that run's --data")
    if checkpoint and checkpoint["shards_sha256"] != shards_sha256:
        raise UserError(f"{data.folder} has other training shards than {args.resume} was trained on: give that run's --data")
    dtype = compute_dtype(device)
    plan, T = make_plan(args, data.meta["vocab_size"], world, dtype), args.max_seq_len
    args.total_batch_size, args.num_iterations = plan.total_batch, plan.num_iterations  # a continuation keeps them
    config, schedule, num_iterations = plan.config, plan.schedule, plan.num_iterations
    rows, val_rows = Rows(data.train, T, args.seed), first_rows(data.val, T, max(args.eval_tokens // T, 1))
    if rows.per_epoch < plan.rows_per_step:
        raise UserError(f"{data.folder} has {rows.per_epoch} training rows of {T} tokens, less than one batch of {plan.rows_per_step}: "
                        "lower --total-batch-size or --max-seq-len, or prepare more text")
    if not len(val_rows):
        raise UserError(f"{data.folder} has no validation shard of more than {T} tokens, one row: lower --max-seq-len or prepare more text")

    tasks = load_tasks(args.core_bundle) if args.core_every is not None else []
    lines = describe(plan, world, device, dtype, rows.per_epoch)

    # the model, its optimizers, and what DDP and torch.compile wrap: all passes of a step are one forward
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = GPT(config)
    model.compute_dtype = dtype
    use_compile = device.type == "cuda" if args.compile is None else args.compile
    if args.activation_checkpointing and use_compile:  # the compiler picks what to run again
        torch._functorch.config.activation_memory_budget = 0.2
    model.recompute = args.activation_checkpointing and not use_compile
    optimizers = make_optimizers(model, args, batch_scale=max(math.sqrt(plan.total_batch / 2**19), 1.0))
    train_step = TrainStep(model, schedule)
    train_step = torch.compile(train_step, dynamic=False) if use_compile else train_step
    if ddp:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its new name is not in torch 2.11
        train_step = DDP(train_step, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False,
                         find_unused_parameters=args.memory_start > 0 or args.memory_share < 1)  # those of the memory, in plain steps

    # a new run, or an old one taken back to its checkpoint
    step, rows_seen, seconds, evaluated, folder = 0, 0, 0.0, -1, None
    if checkpoint:
        folder, step, rows_seen, seconds = Path(args.out) / args.name, *(checkpoint[k] for k in ("step", "rows_seen", "seconds"))
        torch.set_rng_state(checkpoint["torch_rng"])
        load_state(checkpoint, args.resume, model, optimizers)
        del checkpoint
    start = step
    if ddp:
        starts = [None] * world
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise UserError(f"the processes found checkpoints of different steps, {sorted(set(starts))}: {args.out} must be one folder, shared by all nodes")
    if master:
        folder = folder or new_run_folder(args)
        held = lock(folder, "training")  # noqa: F841 (open, and so locked, until main ends)
        evaluated = rewind(folder, step if start else -1)
        for name in ("tokenizer.tiktoken", "tokenizer.json"):
            write_atomic(folder / name, lambda f: f.write((data.folder / name).read_bytes()))
        log, unwritten = open(folder / "log.jsonl", "ab", buffering=0), b""
    if ddp:  # the master's word is everybody's
        told = [folder, evaluated]
        dist.broadcast_object_list(told)
        folder, evaluated = told

    say(f"{folder}: " + "\n".join(lines))
    peak = peak_flops(device)

    def record(**row):
        """A line of log.jsonl. What a full disk does not take is kept, and tried again with the next line."""
        nonlocal unwritten
        if master:
            unwritten += json.dumps(row).encode() + b"\n"
            with suppress(OSError):
                unwritten = unwritten[log.write(unwritten):]

    def trained():
        """The schedule of the step before this one."""
        return deepened(args, schedule, step - 1, num_iterations)

    def save():
        """
        The log and the checkpoint of this step, and only the newest few kept. A disk that is full now may have room at
        the next one: a warning. Raises UserError where there will be no next one.
        """
        nonlocal unwritten
        path = folder / f"ckpt_{step:07d}.pt"
        for optimizer in optimizers if ddp else ():
            optimizer.consolidate_state_dict()  # every process hands its share to the master
        if master:
            state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step, rows_seen=rows_seen, seconds=seconds,
                         config=dataclasses.asdict(config), schedule=dataclasses.asdict(trained()), args=vars(args), torch_rng=torch.get_rng_state(),
                         tokenizer_sha256=data.meta["tokenizer_sha256"], shards_sha256=shards_sha256)
            try:
                while unwritten:
                    unwritten = unwritten[log.write(unwritten):]
                os.fsync(log.fileno())  # a checkpoint is never ahead of its log
                write_atomic(path, lambda f: torch.save(state, f))
            except (OSError, UserError) as e:
                what = f"step {step} was not saved: {e}; make room"
                if last or stopping:
                    raise UserError(f"{what}, then --resume {folder}") from e
                return say(f"warning: {what}; training goes on, and the next save is the next try")
            for old in sorted(folder.glob("ckpt_*.pt"))[:-args.keep]:
                old.unlink(missing_ok=True)
        say(f"saved {path}")

    def not_finite(what):
        kept = sorted(folder.glob("ckpt_*.pt"))
        return UserError(f"step {step}: {what}; stopped before anything was saved; " + (
            f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet")
            + ": lower --matrix-lr, --embedding-lr, --head-lr or --scalar-lr")

    def evaluate():
        """Validation BPB in parallel and, on fewer rows, decoding; console and log. Raises UserError if not finite."""
        bpb, _ = evaluate_bpb(model, val_rows, data.token_bytes, trained(), plan.device_batch, progress="validation")
        if not math.isfinite(bpb["merged"]):
            raise not_finite(f"the validation BPB is {bpb['merged']}")
        fewer, decoded = val_rows[:args.decode_tokens // T], {}
        if len(fewer):
            decoded, _ = evaluate_bpb(model, fewer, data.token_bytes, trained(), plan.device_batch, decode=True, progress="decoding")
        say(f"step {step:05d} | val bpb: " + ", ".join(f"{k} {v:.4f}" for k, v in bpb.items())
            + (f" | on {len(fewer)} rows: " + ", ".join(f"{k} {decoded[k]:.4f}" for k in ("merged", "decode", "no memory") if k in decoded) if decoded else ""))
        record(kind="eval", step=step, tokens=step * plan.total_batch, bpb=bpb, decode_rows=decoded)

    def evaluate_on_tasks():
        """CORE, or what the bundle has of it; console, log and the files that evaluate_core keeps."""
        results = evaluate_core(model, data.tokenizer, tasks, folder, step, args.core_max_per_task, batch_size=plan.device_batch)
        say(f"step {step:05d} | " + ", ".join(f"{name} {t['centered']:.3f}" for name, t in results["tasks"].items()) + f" | {describe_core(results)}")
        record(kind="core", step=step, core=results["core"], centered={name: t["centered"] for name, t in results["tasks"].items()})

    asked = []  # signals that asked to stop: finish the step, save, end
    def ask_to_stop(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        say("stopping after this step (once more: at once, without saving)")
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, ask_to_stop)

    bar = tqdm(total=num_iterations, initial=step, unit="step", disable=None if master else True, dynamic_ncols=True)
    def load(first, i):
        """This process's rows of forward i of the step that begins at row `first`; the steps follow each other."""
        return rows.batch(first + (i * world + rank) * plan.device_batch, plan.device_batch, device)

    smooth, stopping, skips, batch = None, False, 0, load(rows_seen, 0)
    while True:
        last = step >= num_iterations
        if step > evaluated and (last or (args.eval_every and step % args.eval_every == 0 and not stopping)):
            evaluate()
        if step > start and (last or stopping or (args.save_every and step % args.save_every == 0)):
            save()
        if tasks and step > 0 and (last or (args.core_every and step % args.core_every == 0 and not stopping)):
            evaluate_on_tasks()  # after save(): it may take long
        if last or stopping:
            break

        # one step: gradients of all rows, then the optimizers
        t0 = time.perf_counter()
        multiplier, losses = set_schedule(optimizers, step, num_iterations, args), 0
        now = schedule_at(args, schedule, step, num_iterations)
        for i in range(plan.micro_steps):
            idx, targets = batch
            with train_step.no_sync() if ddp and i < plan.micro_steps - 1 else nullcontext():  # gradients meet once a step
                loss, pass_means = train_step(idx, targets, now)
                (loss / plan.micro_steps).backward()
            losses = losses + torch.cat([loss.detach().view(1), pass_means]) / plan.micro_steps
            batch = load(rows_seen, i + 1)  # while a GPU is still at work on this one
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        state = torch.cat([losses, norm.view(1), losses.new_tensor([float(bool(asked))])])
        if ddp:  # every process must see the same, a request to stop above all
            dist.all_reduce(state)
            state /= world
        *losses, norm, stop_votes = state.tolist()
        stopping = stop_votes > 0
        finite = math.isfinite(losses[0]) and math.isfinite(norm)
        skips = 0 if finite else skips + 1  # in a row
        if not finite:
            what = f"the loss is {losses[0]}, the gradient's norm {norm}"
            if args.on_nonfinite == "stop" or skips == MAX_SKIPS:
                raise not_finite(what)
            say(f"step {step:05d}: skipped, {what}")
            record(kind="skip", step=step, reason=what)
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        dt = time.perf_counter() - t0
        seconds += dt
        rate = plan.total_batch / dt
        if finite:
            smooth = losses[0] if smooth is None else 0.9 * smooth + 0.1 * losses[0]
            record(kind="train", step=step, loss=losses[0], passes=[x if math.isfinite(x) else None for x in losses[1:]] if len(losses) <= 17 else None, norm=norm, lrm=multiplier, dt=dt)
        if finite and (step % args.log_every == 0 or step == num_iterations - 1):
            mfu = f" | mfu: {100 * plan.flops_per_token * rate / (peak * world):.1f}%" if peak else ""
            eta = seconds / (step + 1) * (num_iterations - step - 1)
            say(f"step {step:05d}/{num_iterations:05d} ({100 * step / num_iterations:.1f}%) | loss: {smooth:.4f} | norm: {norm:.2f} | lrm: {multiplier:.2f} | "
                f"dt: {1000 * dt:.0f}ms | tok/sec: {rate:,.0f}{mfu} | epoch: {step * plan.rows_per_step / rows.per_epoch:.2f} | "
                f"total time: {seconds / 60:.1f}m | eta: {eta / 60:.1f}m")
        step, rows_seen = step + 1, rows_seen + plan.rows_per_step
        bar.update()
    bar.close()

    skipped = sum(row["kind"] == "skip" for row in read_log(folder)) if master else 0
    if skipped:
        say(f"warning: {skipped} steps were skipped, see {folder / 'log.jsonl'}")
    if not last:
        say(f"stopped at step {step}; go on with: python train.py --resume {folder}")
    elif master:
        bos = data.tokenizer.encode_single_token("<|bos|>")
        text, = complete(model, data.tokenizer, [[bos]], 128, temperature=0.8, top_k=50)
        say(f"a sample, memory carried from token to token:\n{text}\nmore with: python sample.py --checkpoint {folder}")
    if ddp:
        dist.barrier()
        dist.destroy_process_group()

if __name__ == "__main__":
    faulthandler.enable()  # a bus error or segmentation fault says where
    run_main(main)
