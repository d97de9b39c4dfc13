"""
Train a Latent Recurrent Transformer, or the plain GPT under it. --depth is the one dial.

    python train.py --depth 4 --lrt shared                                      one process: GPU, Mac or CPU
    torchrun --standalone --nproc_per_node=8 train.py --depth=20 --lrt=shared   one node of 8 GPUs
    python train.py --resume runs/d4_shared                                     go on with a run
    python train.py --name x --resume auto                                      start it, or go on with it

From the flags and a recipe, plan.py makes sizes, batch and horizon; optim.py the optimizers; interleave.py
the passes of a step; dataset.py the rows; checkpointing.py the run folder. This file is the flags, the
setup, and the loop.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import faulthandler
import math
import os
import secrets
import time
import warnings
from argparse import BooleanOptionalAction, Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from common import (
    ArgumentParser,
    UserError,
    at_least,
    at_most,
    check_command_line,
    check_new_folder,
    code_commit,
    end_processes,
    flag,
    from_rank_0,
    init_processes,
    is_text,
    peak_flops,
    run_main,
    say,
    side_group,
    training_dtype,
)
from recipes import RECIPES, fill_in

MAX_SKIPS = 10  # --on-nonfinite skip: this many steps in a row are no accident
TIMEOUT = timedelta(minutes=10)  # of a collective, for a process that hangs; one that dies is noticed at once
PATIENCE = timedelta(hours=12)  # with a rank that verifies its share of the data for the first time
COMPILED_MEMORY_BUDGET = 0.2  # --activation-checkpointing with --compile: share of activations that is kept
MAX_PASSES_LOGGED = 16  # the losses of longer schedules, pass by pass, would make log.jsonl large


# -----------------------------------------------------------------------------
# Flags

class RecipeParser(ArgumentParser):
    """A parser of flags, of which those that are not given have the recipe's values."""

    def parse_args(self, *args, **options):
        flags = super().parse_args(*args, **options)
        fill_in(flags)
        return flags

def of_recipe(flag):
    """For the help of a flag: its default in each recipe."""
    values = {name: recipe.value_of(flag) for name, recipe in RECIPES.items()}
    if len(set(values.values())) == 1:
        return f"(default: {values['paper']})"
    return "(default: " + ", ".join(f"{name} {value}" for name, value in values.items()) + ")"

def make_parser():
    """The flags of train.py, with their defaults."""
    parser = RecipeParser(
        description="Train a Latent Recurrent Transformer. "
        "--depth is the one dial; the rest follows from it.")

    add = parser.add_argument_group("run").add_argument
    add("--recipe", choices=list(RECIPES), default="paper",
        help="backbone, optimizer and schedule: the paper's or nanochat's of 2026-07-03; flags go on top")
    add("--data", default="data", help="folder that prepare_data.py made")
    add("--name", metavar="NAME", help="the run's folder is OUT/NAME "
        "(default: d<depth>_<lrt>, or d<depth>_recurrent; numbered if it exists)")
    add("--out", type=lambda path: path and os.path.normpath(path), default="runs",
        help="where run folders go")
    add("--resume", metavar="PATH", help="run folder or checkpoint to go on with; its flags apply, those "
        "given here on top. auto: OUT/NAME from its newest checkpoint, or from the start if it has none, "
        "so that the same command starts and restarts")
    add("--init-from", metavar="PATH",
        help="run folder or checkpoint whose weights a new run begins with: on other data, for another "
        "horizon, or with --lrt for a plain model, whose memory then starts at zero; the flags of its model "
        "apply, those given here on top")
    add("--seed", type=int, default=0, help="of the weights and of the order of the data")
    add("--device", help="cuda | mps | cpu (default: the best there is)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the activations; weights are float32 (auto: bfloat16 on GPUs and CPUs where it is fast)")
    add("--compile", action=BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--dry-run", action="store_true",
        help="print the plan, parameters to KV cache, and end: nothing is trained or written")
    add("--mfu", type=float, metavar="SHARE",
        help="--dry-run: also predict the time, if the model's FLOPs reach this share of the GPUs' peak")
    add("--dollars-per-hour", type=float, metavar="X", help="--mfu: and the cost, if all GPUs cost so much")

    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=["gpt", "recurrent"], default="gpt",
        help="recurrent: layers attend to keys and values of their own outputs, without --lrt")
    add("--depth", type=int, default=20,
        help="number of layers; width = depth * aspect ratio, up to whole heads")
    add("--aspect-ratio", type=int, default=64, help="width per layer")
    add("--head-dim", type=int, default=128, help="head size")
    add("--n-kv-head", type=int,
        help="key/value heads, for grouped-query attention (default: as many as query heads)")
    add("--max-seq-len", type=int, default=2048, help="context, and tokens a row")
    add("--window-pattern", default="SSSL",
        help="tiled over layers: L full attention, S half the context; the last layer is always L")
    add("--value-embeds", choices=["none", "alternate", "all"],
        help=f"which layers have a value embedding {of_recipe('value_embeds')}")

    add = parser.add_argument_group("latent recurrence").add_argument
    add("--lrt", choices=["none", "shared", "layerwise"],
        help="none: plain GPT; shared: one memory projection for all layers; layerwise: one a layer "
        "(default: shared, with --arch recurrent none)")
    add("--source-layer", type=int,
        help="memory is read after this layer, 0-based (default: 3/4 of the way up)")
    add("--inject", choices=["kv", "residual", "both", "input"], default="both",
        help="how memory enters: keys and values, residual stream, both of every layer; or the input of the "
        "first, by a gate")
    add("--dest-layers", type=int, nargs=2, metavar=("FIRST", "LAST"),
        help="kv, residual, both: memory enters these layers only, 0-based (default: all)")
    add("--first-memory", choices=["zero", "embedding"], default="zero",
        help="what a token reads where no memory has been computed yet: zero, or the embedding of the token "
        "before")
    add("--memory-init", type=float, default=0.1,
        help="c at the start: how much memory is added to the residual stream")
    kinds = ["interleaved", "refine", "draft", "chunked", "sequential", "plain"]
    add("--schedule", choices=kinds, default="interleaved",
        help="the passes of a training step, see interleave.py; plain with --first-memory embedding is the "
        "control: one pass, the same parameters, no recurrence")
    add("--subsets", type=int,
        help="interleaved: S (default 2); a step costs about two plain passes for any S. draft: S of each "
        "sweep but the first (default 1)")
    add("--kv-refresh", action="store_true",
        help="interleaved: renew the memory in keys and values not yet visited, after each pass")
    add("--refinements", type=int, default=3,
        help="refine: K full passes after the first; a step costs 1 + K passes")
    add("--chunk", type=int, default=64, help="chunked: tokens a chunk")
    add("--detach", action="store_true", help="no gradient from a pass into the ones before it")
    add("--drafts", type=int, default=1, metavar="N",
        help="draft: N forward-only passes, up to the source layer, hand memory over before the one that is "
        "trained; one more in the last quarter of the steps")
    add("--pass-mix", type=float, nargs="+", metavar="SHARE",
        help="draft: shares of the steps with one pass, two passes, ..; every step draws its number (0.75 "
        "0.22 0.03: 1.05 times the FLOPs of plain passes or so)")
    add("--loss-weights", type=float, nargs="+", metavar="W",
        help="one weight a pass (default: the plain mean); "
        "where it is 0, nothing is computed for that loss alone")

    add = parser.add_argument_group("horizon", "the first one given counts").add_argument
    add("--num-iterations", type=int, help="optimizer steps")
    add("--target-flops", type=float, help="as many steps as this many training FLOPs buy")
    add("--target-param-data-ratio", type=float,
        help=f"tokens per parameter of the matrices and the head {of_recipe('target_param_data_ratio')}")

    what = "matrices: Muon; embeddings, head and scalars: AdamW, all scaled with batch size and width"
    add = parser.add_argument_group("optimization", what).add_argument
    add("--total-batch-size", type=int, help="tokens a step (default: from the horizon, 524288 at depth 12)")
    add("--device-batch-size", type=int,
        help="rows a forward and device; lower it when memory runs out (default: the largest of 16, 8, .. "
        "that divides, with at most 32768 positions in all passes)")
    add("--activation-checkpointing", action="store_true",
        help="save memory: keep each layer's input only, and run the layer again in the backward")
    add("--matrix-lr", type=float, help=f"Muon {of_recipe('matrix_lr')}")
    add("--memory-lr", type=float, help="Muon, memory projections (default: as the matrices)")
    add("--embedding-lr", type=float,
        help=f"embedding and value embeddings {of_recipe('embedding_lr')}")
    add("--head-lr", type=float, help=f"output head {of_recipe('head_lr')}")
    add("--gate-lr", type=float,
        help=f"gates of keys and values; None: Muon, as the matrices {of_recipe('gate_lr')}")
    add("--scalar-lr", type=float,
        help=f"x0 and memory scalars; the residual scalars get a hundredth {of_recipe('scalar_lr')}")
    add("--weight-decay", type=float,
        help="of the matrices, scaled with depth (nanochat: with batch and horizon); falls to 0 over the run "
        f"{of_recipe('weight_decay')}")
    add("--grad-clip", type=float, help=f"largest gradient norm, 0: no clipping {of_recipe('grad_clip')}")
    add("--on-nonfinite", choices=["stop", "skip"], default="stop",
        help="a step whose loss or gradient is not finite: stop, or leave the weights as they are "
        f"({MAX_SKIPS} in a row stop in any case)")
    add("--warmup-steps", type=int, help=f"steps of linear warm-up {of_recipe('warmup_steps')}")
    add("--warmdown-ratio", type=float,
        help=f"share of the run over which the learning rates fall linearly {of_recipe('warmdown_ratio')}")
    add("--final-lr-frac", type=float,
        help=f"where they end, as a share of where they were {of_recipe('final_lr_frac')}")

    add = parser.add_argument_group("evaluation and saving", "in steps; 0: only at the end").add_argument
    add("--eval-every", type=int, default=250, help="validation BPB")
    add("--eval-tokens", type=int, default=2**20, help="tokens scored in parallel")
    add("--decode-tokens", type=int, default=2**15,
        help="tokens decoded one by one with the exact recurrence, 0: none")
    add("--core-every", type=int,
        help="CORE with memory (default: never, as it can take longer than a small run)")
    add("--core-bundle", metavar="DIR",
        help="folder with core.yaml (default: data_core/eval_bundle, downloaded once)")
    add("--core-max-per-task", type=int, metavar="N",
        help="run only so many examples of each task: an estimate")
    add("--save-every", type=int, default=1000, help="checkpoint")
    add("--save-minutes", type=float, default=0.0, metavar="M",
        help="checkpoint, too, when the last one is so many minutes ago; 0: never for that reason")
    add("--keep", type=int, default=2, help="how many checkpoints stay")
    add("--log-every", type=int, default=10, help="console line; log.jsonl has every step")
    add("--wandb", metavar="PROJECT", help="send every row of log.jsonl to this project of Weights & Biases")
    return parser

# the least value of every flag that is a number
LEAST = dict(
    mfu=1e-6, dollars_per_hour=0, seed=0, depth=1, aspect_ratio=1, head_dim=1, max_seq_len=1,
    subsets=1, refinements=1, drafts=1, chunk=1,
    num_iterations=1, target_flops=1, target_param_data_ratio=0,
    total_batch_size=1, device_batch_size=1, grad_clip=0,
    matrix_lr=0, memory_lr=0, embedding_lr=0, head_lr=0, gate_lr=0, scalar_lr=0, weight_decay=0,
    warmup_steps=0, warmdown_ratio=0, final_lr_frac=0,
    eval_every=0, eval_tokens=1, decode_tokens=0, core_every=0, core_max_per_task=1,
    save_every=0, save_minutes=0, keep=1, log_every=1,
)

# the largest value of those with which nothing can be right above it
MOST = dict(
    mfu=1, dollars_per_hour=10**6, depth=1000, head_dim=10**5, max_seq_len=2**24,
    refinements=1000, drafts=1000, num_iterations=10**9, target_flops=1e30, target_param_data_ratio=10**6,
    total_batch_size=2**40, device_batch_size=2**20, warmdown_ratio=1, final_lr_frac=10**6,
    # what float32 holds
    matrix_lr=1e38, memory_lr=1e38, embedding_lr=1e38, head_lr=1e38, gate_lr=1e38, scalar_lr=1e38,
    weight_decay=1e38,
)

# flags that may change when a run is resumed; a change of any other would make it another run
MAY_CHANGE = {
    "resume", "data", "device", "dtype", "compile", "dry_run", "mfu", "dollars_per_hour",
    "device_batch_size", "activation_checkpointing", "on_nonfinite",
    "eval_every", "eval_tokens", "decode_tokens", "core_every", "core_bundle", "core_max_per_task",
    "save_every", "save_minutes", "keep", "log_every", "wandb",
}

# flags that --init-from takes from the run whose weights it begins with
MODEL_FLAGS = (
    "recipe", "arch", "depth", "aspect_ratio", "head_dim", "n_kv_head", "max_seq_len", "window_pattern",
    "value_embeds", "lrt", "source_layer", "inject", "dest_layers", "first_memory",
)

# flags that older checkpoints have and this file no longer knows, with the default that they had
REMOVED_FLAGS = {"memory_start": 0.0, "memory_share": 1.0, "forward_passes": 0, "deepen": 0.0}

# flags that older checkpoints do not have, where their default is not what was done then
NEWER_FLAGS = {"dtype": None}

if __name__ == "__main__":  # --help does not wait for what follows
    check_command_line(make_parser().parse_args)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from checkpointing import (
    Log,
    RunFolder,
    Saver,
    default_name,
    list_checkpoints,
    load_optimizers,
    load_weights,
    new_run_folder,
    newest_checkpoint,
    read_log,
    rewind,
    set_aside,
    start_from,
    step_of,
    verify_together,
)
from core import describe_core, evaluate_core, load_tasks
from dataset import BOS, Rows, first_rows, open_data
from eval_core import LEARNED_ROWS, describe_learned, evaluate_bpb, learned
from interleave import TrainStep
from optim import make_optimizers, set_learning_rates
from plan import describe, dry_run, make_plan
from recurrent import build_model
from sample import complete
from tracking import Tracker, check_tracking

# -----------------------------------------------------------------------------
# The command line, and the run to go on with

def parse_args(damaged=()):
    """
    The flags, the checkpoint to go on with or None, and the checkpoint to begin a new run with or None.
    damaged: checkpoints that are passed over. Raises UserError.
    """
    parser = make_parser()
    args = parser.parse_args()
    checkpoint = start = None
    if args.resume == "auto":
        args.name = args.name or default_name(args)
        folder = Path(args.out) / args.name
        if list_checkpoints(folder):
            args.resume = str(folder)
    check_restarts(args)
    if args.resume not in (None, "auto"):
        args, checkpoint = resume_args(parser, args.resume, damaged)
    elif args.init_from is not None:
        args, start = init_args(parser, args.init_from)
    if args.lrt is None:
        args.lrt = "none" if args.arch == "recurrent" else "shared"
    at_least(args, **LEAST)
    at_most(args, **MOST)
    if not is_text(args.out + (args.name or "")):
        raise UserError("torch cannot open checkpoints in a folder whose name is not UTF-8: "
                        "choose another --out or --name")
    if args.core_every is None and (args.core_bundle or args.core_max_per_task):
        raise UserError("--core-bundle and --core-max-per-task go with --core-every")
    if args.mfu is not None and not args.dry_run:
        raise UserError("--mfu goes with --dry-run: a run measures it")
    if args.dollars_per_hour is not None and args.mfu is None:
        raise UserError("--dollars-per-hour goes with --mfu: a cost needs a time")
    if args.core_every is not None and args.max_seq_len < 2:
        raise UserError("CORE needs a context of 2 tokens or more: raise --max-seq-len")
    return args, checkpoint, start

def check_restarts(args):
    """Under torchrun --max-restarts, refuse now what would only fail when the first process has died."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return
    if args.resume is None:
        raise UserError("--max-restarts needs --resume auto: "
                        "without it a restart would not go on with this run")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch issue 135712
        raise UserError("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, "
                        "and --standalone or --rdzv_backend=c10d: "
                        "otherwise a restart waits for processes that are gone")

def saved_args(parser, checkpoint, path):
    """
    The flags that a checkpoint was trained with, a dict; flags that are newer than it have their defaults,
    or what NEWER_FLAGS says.
    Raises UserError if it used a flag that this version no longer has.
    """
    args = vars(parser.parse_args([])) | NEWER_FLAGS
    for name, value in checkpoint["args"].items():
        if name in args:
            args[name] = value
        elif name not in REMOVED_FLAGS or value != REMOVED_FLAGS[name]:
            raise UserError(f"{path} was trained with {flag(str(name))} {value}, "
                            "which train.py no longer has: "
                            "use the version of nanolrt that trained it, or start another run")
    return args

def resume_args(parser, path, damaged=()):
    """
    The flags of the run that is resumed, those of this command line on top, and its checkpoint. Raises
    UserError if a flag that may not change would change, because that would be another run.
    """
    path, checkpoint = newest_checkpoint(path, damaged)
    before = saved_args(parser, checkpoint, path)
    before |= {"name": path.parent.name, "out": str(path.parent.parent)}
    args = parser.parse_args(namespace=Namespace(**before))  # argparse keeps what is not given here
    if args.resume == "auto":  # OUT/NAME is this folder, however it is spelled: --name sweep/a, for one
        args.name, args.out = before["name"], before["out"]
    changed = [name for name in before if name not in MAY_CHANGE and before[name] != getattr(args, name)]
    if changed:
        trained_with = ", ".join(f"{flag(name)} {before[name]}" for name in changed)
        raise UserError(f"{path} was trained with {trained_with}: "
                        "resume without that flag, or start another run")
    args.resume = str(path)
    return args, checkpoint

def init_args(parser, path):
    """
    The flags of a run that begins with the weights of another, and the checkpoint that has them: what makes
    the model is as it was there, this command line on top. Raises UserError.
    """
    path, checkpoint = newest_checkpoint(path)
    before = saved_args(parser, checkpoint, path)
    args = parser.parse_args(namespace=Namespace(**{name: before[name] for name in MODEL_FLAGS}))
    return args, checkpoint


# -----------------------------------------------------------------------------
# Setup

@dataclass
class TrainState:
    """Where training is."""
    step: int = 0  # optimizer steps done
    rows_seen: int = 0  # training rows read, over all ranks
    seconds: float = 0.0  # time in training steps, over all starts
    smooth_loss: float | None = None  # running mean, for the console only
    skipped: int = 0  # steps in a row whose loss or gradient was not finite

def print0(text):
    """Say it on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        say(text)

def check_same_tokenizer(data, checkpoint, path):
    """Raise UserError unless the data has the tokenizer that the checkpoint was trained with."""
    if checkpoint["tokenizer_sha256"] != data.meta["tokenizer_sha256"]:
        raise UserError(f"{data.folder} has another tokenizer than {path} was trained with: "
                        "give that run's --data")

def check_same_data(data, checkpoint, path):
    """Raise UserError unless the data is what the checkpoint was trained on."""
    check_same_tokenizer(data, checkpoint, path)
    if checkpoint["shards_sha256"] != [shard["sha256"] for shard in data.meta["train"]]:
        raise UserError(f"{data.folder} has other training shards than {path} was trained on: "
                        "give that run's --data")

def make_rows(data, plan, args):
    """The training rows and the validation rows, (N, T+1) int64. Raises UserError if there are too few."""
    T = plan.config.sequence_len
    rows = Rows(data.train, T, args.seed)
    val_rows = first_rows(data.val, T, max(args.eval_tokens // T, 1))
    if rows.per_epoch < plan.rows_per_step:
        raise UserError(f"{data.folder} has {rows.per_epoch} training rows of {T} tokens, "
                        f"less than one batch of {plan.rows_per_step}: "
                        "lower --total-batch-size or --max-seq-len, or prepare more text")
    if not len(val_rows):
        raise UserError(f"{data.folder} has no validation shard of more than {T} tokens, one row: "
                        "lower --max-seq-len or prepare more text")
    return rows, val_rows

def setup_training(args, plan, device, dtype, start=None):
    """
    The model, its optimizers, and the training step, compiled and wrapped in DDP as asked: all passes of a
    step are one forward. start: a checkpoint whose weights to begin with. Raises UserError.
    """
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = build_model(plan.config)
    if start:
        start_from(model, start, args.init_from)
    model.compute_dtype = dtype
    use_compile = device.type == "cuda" if args.compile is None else args.compile
    if args.activation_checkpointing and use_compile:  # the compiler picks what to compute again
        torch._functorch.config.activation_memory_budget = COMPILED_MEMORY_BUDGET
    model.recompute = args.activation_checkpointing and not use_compile

    optimizers = make_optimizers(model, plan.optimizer, plan.batch_scale, plan.decay_scale)

    train_step = TrainStep(model, plan.mix[0][1])
    if use_compile:
        # One graph. By default Dynamo would cut it up under DDP, to reduce a bucket while the backward still
        # runs; it counts a parameter once for every pass, which makes 202 graphs at depth 20. What is not
        # hidden now is one all-reduce a step, after its last micro-batch.
        torch._dynamo.config.optimize_ddp = False
        # Dynamo compiles what is around the walk of a recurrent layer anew for every layer: they differ in
        # their number, and it gives up on a function after 8 times.
        torch._dynamo.config.recompile_limit = 8 + plan.config.n_layer
        train_step = torch.compile(train_step, dynamic=False)
    if dist.is_initialized():
        # the gradients are views of DDP's buckets, from the start and for good: there is no second copy
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        # torch 2.11 does not have the new name of this option yet
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        device_ids = [device.index] if device.type == "cuda" else None
        train_step = DDP(train_step, device_ids=device_ids, broadcast_buffers=False,
                         gradient_as_bucket_view=True)
    return model, optimizers, train_step

def settle_buckets(train_step, batch, schedule, optimizers):
    """
    Run one micro-batch, and forget its gradients. After its first backward, DDP puts the gradients into its
    buckets in another order, and on more than two ranks the order of a sum depends on where it stands there.
    When that is done before the first step, a run that goes on computes the same bits as one that was not
    interrupted. schedule: that of the run's first step.
    """
    loss, _ = train_step(*batch, schedule)
    loss.backward()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)

def verify_checkpoint(args, checkpoint, group):
    """
    Read the whole checkpoint that a run goes on with, every rank a part of it. Returns the flags and the
    checkpoint: those of the one before it if it is damaged. Raises UserError if it was named itself, or if no
    other one is whole.
    """
    damaged = []
    while checkpoint is not None:
        error = verify_together(args.resume, checkpoint, group)
        if error is None:
            break
        damaged.append(Path(args.resume))
        print0(f"warning: {error}")
        args, checkpoint, _ = parse_args(damaged)
        if Path(args.resume) in damaged:
            raise error
    return args, checkpoint

def resume(checkpoint, path, model, optimizers):
    """
    Put a checkpoint into model, optimizers and random generator; returns the TrainState. Raises
    UserError.
    """
    torch.set_rng_state(checkpoint["torch_rng"])
    load_weights(model, checkpoint)
    load_optimizers(optimizers, checkpoint, path)
    return TrainState(checkpoint["step"], checkpoint["rows_seen"], checkpoint["seconds"])

def check_same_step(step, out):
    """Raise UserError unless all ranks found the checkpoint of the same step."""
    if not dist.is_initialized():
        return
    steps = [None] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise UserError(f"the processes found checkpoints of different steps, {sorted(set(steps))}: "
                        f"{out} must be one folder, shared by all nodes")

class StopRequest:
    """Ctrl-C and SIGTERM ask to finish the step, save, and end; a second one ends at once."""

    def __init__(self):
        self.made = False
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, self.handle)

    def handle(self, *_):
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        print0("stopping after this step (once more: at once, without saving)")

def open_run_folder(args, step, run_id, data, rank):
    """
    Make the run's folder, or take it back to the checkpoint of this step. Rank 0 does it, holds the folder,
    and writes the log. Returns the folder, the log, and the last step that was evaluated (-1: none).
    """
    folder = run_folder = None
    evaluated = -1
    if rank == 0:
        if step > 0:
            folder = Path(args.out) / args.name
        else:
            may_exist = args.resume == "auto"  # it may have ended before its first checkpoint
            folder = new_run_folder(args.out, args.name, default_name(args), exist_ok=may_exist)
        names = ("tokenizer.tiktoken", "tokenizer.json")
        run_folder = RunFolder(folder, {name: (data.folder / name).read_bytes() for name in names})
        run_folder.hold()
        evaluated = rewind(folder, step if step > 0 else -1)
    folder, evaluated = from_rank_0((folder, evaluated))
    return folder, Log(folder, rank, run_id, run_folder), evaluated


# -----------------------------------------------------------------------------
# What the loop does once in a while

def due(every, step):
    """Is something that happens every so many steps due at this one? 0: only at the end."""
    return every > 0 and step % every == 0

def evaluate(model, val_rows, data, plan, args, saver, step):
    """
    Bits per byte of the validation rows in parallel and, on the first of them, decoding, and what training
    has made of the memory's path: prints them and returns what goes into the log (see evaluate_bpb and
    learned). Raises UserError if they are not finite.
    """
    schedule = plan.scored_schedule(step)
    bpb, _ = evaluate_bpb(model, val_rows, data.token_bytes, schedule, plan.device_batch,
                          progress="validation")
    if not math.isfinite(bpb["merged"]):
        saver.wait()
        if saver.rank == 0:
            set_aside([path for path in list_checkpoints(saver.folder) if step_of(path) == step])
        raise not_finite(f"the validation BPB is {bpb['merged']}", saver, step)
    line = f"step {step:05d} | val bpb: " + ", ".join(f"{name} {x:.4f}" for name, x in bpb.items())
    decode_rows = val_rows[:args.decode_tokens // plan.config.sequence_len]
    decoded = {}
    if len(decode_rows):
        decoded, _ = evaluate_bpb(model, decode_rows, data.token_bytes, schedule, plan.device_batch,
                                  decode=True, progress="decoding")
        names = [name for name in ("merged", "decode", "no memory") if name in decoded]
        shown = ", ".join(f"{name} {decoded[name]:.4f}" for name in names)
        line += f" | on {len(decode_rows)} rows: {shown}"
    print0(line)
    few = val_rows[:min(LEARNED_ROWS, plan.device_batch), :-1].to(model.wte.weight.device)
    scalars_and_gates = learned(model, few)
    for line in describe_learned(scalars_and_gates):
        print0(f"step {step:05d} | {line}")
    tokens = step * plan.total_batch
    return dict(tokens=tokens, bpb=bpb, decode_rows=decoded, learned=scalars_and_gates)

def evaluate_tasks(model, tokenizer, tasks, folder, step, max_per_task, batch_size):
    """
    CORE, or what the bundle has of it: prints it and returns what goes into the log (see evaluate_core).
    """
    results = evaluate_core(model, tokenizer, tasks, folder, step, max_per_task, batch_size=batch_size)
    centered = {name: task["centered"] for name, task in results["tasks"].items()}
    shown = ", ".join(f"{name} {x:.3f}" for name, x in centered.items())
    print0(f"step {step:05d} | {shown} | {describe_core(results)}")
    return dict(core=results["core"], centered=centered)

def not_finite(what, saver, step):
    """The error that ends a run whose numbers are not finite."""
    saver.wait()
    kept = list_checkpoints(saver.folder)
    last_good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"
    return UserError(f"step {step}: {what}; {last_good}: "
                     "lower --matrix-lr, --embedding-lr, --head-lr or --scalar-lr")

def mean_over_ranks(x):
    """The mean of a tensor over all ranks, the same bits in each of them."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

def skip_step(what, args, state, saver, log):
    """A step whose numbers are not finite: leave it out, or end the run with a UserError."""
    state.skipped += 1
    if args.on_nonfinite == "stop" or state.skipped == MAX_SKIPS:
        raise not_finite(what, saver, state.step)
    print0(f"step {state.step:05d}: skipped, {what}")
    log.add(kind="skip", step=state.step, reason=what)

def log_step(args, state, plan, log, losses, norm, multiplier, dt, rows_per_epoch, peak):
    """
    Log a training step, every --log-every steps on the console as well. losses: the training loss and
    that of every pass, in nats; peak: FLOP/s of all devices together, None if it is not known.
    """
    loss, *by_pass = losses
    if len(by_pass) > MAX_PASSES_LOGGED:
        by_pass = None
    else:
        by_pass = [x if math.isfinite(x) else None for x in by_pass]  # a pass without a loss has nan
    log.add(kind="train", step=state.step, loss=loss, passes=by_pass, norm=norm, lrm=multiplier, dt=dt)

    state.smooth_loss = loss if state.smooth_loss is None else 0.9 * state.smooth_loss + 0.1 * loss
    step, num_iterations = state.step, plan.num_iterations
    if not (due(args.log_every, step) or step == num_iterations - 1):
        return
    rate = plan.total_batch / dt
    mfu = f" | mfu: {100 * plan.flops_per_token * rate / peak:.1f}%" if peak else ""
    eta = state.seconds / (step + 1) * (num_iterations - step - 1)
    print0(f"step {step:05d}/{num_iterations:05d} ({100 * step / num_iterations:.1f}%) "
           f"| loss: {state.smooth_loss:.4f} | norm: {norm:.2f} | lrm: {multiplier:.2f} "
           f"| dt: {1000 * dt:.0f}ms | tok/sec: {rate:,.0f}{mfu} "
           f"| epoch: {step * plan.rows_per_step / rows_per_epoch:.2f} "
           f"| total time: {state.seconds / 60:.1f}m | eta: {eta / 60:.1f}m")

def finish(finished, model, tokenizer, folder, state, log):
    """
    The last words of a run, on rank 0: how to go on with it, or a sample of its text, which the log has, too.
    """
    skipped = sum(row["kind"] == "skip" for row in read_log(folder))
    if skipped:
        print0(f"warning: {skipped} steps were skipped, see {folder / 'log.jsonl'}")
    if not finished:
        print0(f"stopped at step {state.step}; go on with: python train.py --resume {folder}")
        return
    bos = tokenizer.encode_single_token(BOS)
    text, = complete(model, tokenizer, [[bos]], 128, temperature=0.8, top_k=50)
    log.add(kind="sample", step=state.step, text=text)
    print0(f"a sample, memory carried from token to token:\n{text}\n"
           f"more with: python sample.py --checkpoint {folder}")


# -----------------------------------------------------------------------------
# Training

def main():
    args, checkpoint, start = parse_args()
    if args.dry_run:
        dry_run(args)
        return
    check_new_folder(args.out)
    check_tracking(args.wandb)

    # device, process group, data
    device, rank, world_size = init_processes(args.device, TIMEOUT)
    group = side_group(TIMEOUT)  # of what goes on beside training
    args, checkpoint = verify_checkpoint(args, checkpoint, group)
    dtype = training_dtype(device, args.dtype)
    args.dtype = str(dtype)[6:]  # a resumed run goes on in it
    run_folder = Path(args.out, args.name) if args.name else None
    data = open_data(args.data, rank=rank, world_size=world_size, run_folder=run_folder)
    if group is not None:  # shards that are read for the first time may take longer than a collective waits
        dist.monitored_barrier(group, timeout=PATIENCE)
    if checkpoint:
        check_same_data(data, checkpoint, args.resume)
    if start:
        check_same_tokenizer(data, start, args.init_from)

    # the plan; a resumed run keeps the batch and the horizon that were chosen here
    plan = make_plan(args, data.meta["vocab_size"], world_size, dtype)
    args.total_batch_size, args.num_iterations = plan.total_batch, plan.num_iterations
    rows, val_rows = make_rows(data, plan, args)
    tasks = load_tasks(args.core_bundle) if args.core_every is not None else []
    peak = peak_flops(device)
    if peak:
        peak *= world_size

    # model, optimizers, and the state of a resumed run
    model, optimizers, train_step = setup_training(args, plan, device, dtype, start)
    state = resume(checkpoint, args.resume, model, optimizers) if checkpoint else TrainState()
    run_id = checkpoint["run_id"] if checkpoint else secrets.token_hex(8)
    del checkpoint, start
    check_same_step(state.step, args.out)
    began = state.step

    # the run folder
    folder, log, evaluated = open_run_folder(args, state.step, run_id, data, rank)
    data.stamps.write_to(folder)
    print0(f"{folder}: " + "\n".join(describe(plan, world_size, device, dtype, rows.per_epoch)))
    saver = Saver(folder, log, args.keep, group)
    checkpoint_header = dict(
        commit=code_commit(),
        config=dataclasses.asdict(plan.config),
        args=vars(args),
        tokenizer_sha256=data.meta["tokenizer_sha256"],
        shards_sha256=[shard["sha256"] for shard in data.meta["train"]],
        run_id=run_id,
    )
    if args.wandb and rank == 0:
        log.tracker = Tracker(args.wandb, folder, run_id, vars(args) | checkpoint_header["config"])

    stop = StopRequest()
    stopping = False  # whether a rank was asked to stop
    minutes_over = False  # whether rank 0's clock says that it is time to save
    batches = rows.micro_batches(state.rows_seen, plan.device_batch, rank, world_size, device)
    batch = next(batches)
    if dist.is_initialized():
        settle_buckets(train_step, batch, plan.schedule_at(0), optimizers)
    bar = tqdm(total=plan.num_iterations, initial=state.step, unit="step", dynamic_ncols=True,
               disable=None if rank == 0 else True)
    while True:
        # once in a while: save, which goes on in the background, and what may take long: evaluate, score CORE
        finished = state.step >= plan.num_iterations
        save_due = finished or stopping or minutes_over or due(args.save_every, state.step)
        save_now = save_due and state.step > began
        if save_now:
            saver.save(
                optimizers, state.step, final=finished or stopping,
                model=model.state_dict(),
                rows_seen=state.rows_seen,
                seconds=state.seconds,
                torch_rng=torch.get_rng_state(),
                schedule=dataclasses.asdict(plan.scored_schedule(state.step)),
                **checkpoint_header)
        if state.step > evaluated and (finished or (due(args.eval_every, state.step) and not stopping)):
            figures = evaluate(model, val_rows, data, plan, args, saver, state.step)
            log.add(kind="eval", step=state.step, **figures)
        if save_now or state.step == began:  # not before: an evaluation may find that the newest is no good
            saver.remove_old(good=state.step)
        if tasks and state.step > 0 and (finished or (due(args.core_every, state.step) and not stopping)):
            core = evaluate_tasks(model, data.tokenizer, tasks, folder, state.step, args.core_max_per_task,
                                  plan.device_batch)
            log.add(kind="core", step=state.step, **core)
        if finished or stopping:
            break

        # forward and backward: the gradients of all micro-batches add up, those of all ranks in the last one
        t0 = time.perf_counter()
        multiplier = set_learning_rates(optimizers, state.step, plan.num_iterations, plan.optimizer)
        schedule = plan.schedule_at(state.step)
        losses = 0
        for micro_step in range(plan.micro_steps):
            idx, targets = batch
            last = micro_step == plan.micro_steps - 1
            with nullcontext() if last or not dist.is_initialized() else train_step.no_sync():
                loss, pass_losses = train_step(idx, targets, schedule)
                (loss / plan.micro_steps).backward()
            losses = losses + torch.cat([loss.detach().view(1), pass_losses]) / plan.micro_steps
            batch = next(batches)  # loaded while a GPU still computes

        # clip; all ranks act on the same numbers, a request to stop and rank 0's clock among them
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        votes = [float(stop.made), float(rank == 0 and saver.minutes_over(args.save_minutes))]
        figures = torch.cat([losses, norm.view(1), losses.new_tensor(votes)])
        *losses, norm, stop_votes, save_votes = mean_over_ranks(figures).tolist()
        stopping, minutes_over = stop_votes > 0, save_votes > 0

        # step, unless a number is not finite
        finite = math.isfinite(losses[0]) and math.isfinite(norm)
        if finite:
            state.skipped = 0
            for optimizer in optimizers:
                optimizer.step()
        else:
            skip_step(f"the loss is {losses[0]}, the gradient's norm {norm}", args, state, saver, log)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=not dist.is_initialized())  # those in DDP's buckets stay there

        # log
        dt = time.perf_counter() - t0
        state.seconds += dt
        if finite:
            log_step(args, state, plan, log, losses, norm, multiplier, dt, rows.per_epoch, peak)
        state.step += 1
        state.rows_seen += plan.rows_per_step
        bar.update()

    bar.close()
    if rank == 0:
        try:
            log.sync()
        except OSError as e:
            raise UserError(f"cannot write {folder / 'log.jsonl'}: {e.strerror}; "
                            f"make room, then --resume {folder}") from e
        finish(finished, model, data.tokenizer, folder, state, log)
    end_processes()

if __name__ == "__main__":
    faulthandler.enable(2)  # a bus error or a segmentation fault says where
    run_main(main)
