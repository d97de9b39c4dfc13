"""
The command line of train.py: its flags, the values that they may have, and what becomes of them when a run is
resumed or begins with the weights of another.

This file imports no torch, because train.py --help should not wait for it.
"""

import os
from argparse import BooleanOptionalAction, Namespace

from common import ArgumentParser, UserError, at_least, at_most, environment_number, flag, is_text
from recipes import RECIPES, fill_in

MAX_SKIPS = 10  # --on-nonfinite skip: this many steps in a row are no accident
MAX_REWINDS = 3  # --on-spike rewind: so often from one checkpoint


# -----------------------------------------------------------------------------
# The flags

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
    add("--shard", action=BooleanOptionalAction, default=False,
        help="cut up weights, gradients and optimizer state over the processes, for models too large for one "
        "GPU otherwise (--dry-run says); not compiled")
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
    add("--on-spike", choices=["report", "rewind"], default="report",
        help="a loss far above those before it: say so, or also go back to the last checkpoint and leave out "
        f"the batches that led to it (at most {MAX_REWINDS} times from a checkpoint)")
    add("--check-every", type=int, default=0, metavar="N",
        help="run one step in N twice and compare all bits, to find hardware that computes wrongly; 0: never")
    add("--deterministic", action=BooleanOptionalAction, default=False,
        help="the same bits every time on the same hardware, a GPU included")
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
    warmup_steps=0, warmdown_ratio=0, final_lr_frac=0, check_every=0,
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
    "device_batch_size", "activation_checkpointing", "shard", "on_nonfinite",
    "on_spike", "check_every", "deterministic",
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


# -----------------------------------------------------------------------------
# What goes together

def check_flags(args):
    """Raise UserError for values that cannot be, and for flags that do not go together."""
    at_least(args, **LEAST)
    at_most(args, **MOST)
    if not is_text(args.out + (args.name or "")):
        raise UserError("torch cannot open checkpoints in a folder whose name is not UTF-8: "
                        "choose another --out or --name")
    check_shard(args)
    if args.core_every is None and (args.core_bundle or args.core_max_per_task):
        raise UserError("--core-bundle and --core-max-per-task go with --core-every")
    if args.mfu is not None and not args.dry_run:
        raise UserError("--mfu goes with --dry-run: a run measures it")
    if args.dollars_per_hour is not None and args.mfu is None:
        raise UserError("--dollars-per-hour goes with --mfu: a cost needs a time")
    if args.core_every is not None and args.max_seq_len < 2:
        raise UserError("CORE needs a context of 2 tokens or more: raise --max-seq-len")

def check_shard(args):
    """Raise UserError for what does not go with --shard."""
    if not args.shard:
        return
    if args.arch == "recurrent":
        raise UserError("--shard does not go with --arch recurrent: its layers keep their weights at hand")
    if args.compile:
        raise UserError("--shard does not go with --compile: its layers are put together and taken apart "
                        "between what would be compiled")
    if args.loss_weights is not None and 0 in args.loss_weights:
        raise UserError("--shard needs a loss in every pass that has a gradient: the last layer of a pass "
                        "without one would not be put together for the backward")

def check_restarts(args):
    """Under torchrun --max-restarts, refuse now what would only fail when the first process has died."""
    if environment_number("TORCHELASTIC_MAX_RESTARTS", 0) == 0:
        return
    if args.resume is None:
        raise UserError("--max-restarts needs --resume auto: "
                        "without it a restart would not go on with this run")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # pytorch issue 135712
        raise UserError("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, "
                        "and --standalone or --rdzv_backend=c10d: "
                        "otherwise a restart waits for processes that are gone")


# -----------------------------------------------------------------------------
# The flags of a checkpoint

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

def resume_args(parser, path, checkpoint):
    """
    The flags of the run that is resumed from this checkpoint, those of this command line on top. Raises
    UserError if a flag that may not change would change, because that would be another run.
    """
    before = saved_args(parser, checkpoint, path)
    folder = path.parent if path.parent.name else path.absolute().parent  # that of a bare file name is .
    before |= {"name": folder.name, "out": str(folder.parent)}
    args = parser.parse_args(namespace=Namespace(**before))  # argparse keeps what is not given here
    if args.resume == "auto":  # OUT/NAME is this folder, however it is spelled: --name sweep/a, for one
        args.name, args.out = before["name"], before["out"]
    changed = [name for name in before if name not in MAY_CHANGE and before[name] != getattr(args, name)]
    if changed:
        trained_with = ", ".join(f"{flag(name)} {before[name]}" for name in changed)
        raise UserError(f"{path} was trained with {trained_with}: "
                        "resume without that flag, or start another run")
    args.resume = str(path)
    return args

def init_args(parser, path, checkpoint):
    """
    The flags of a run that begins with the weights of this checkpoint: what makes the model is as it was
    there, this command line on top. Raises UserError.
    """
    before = saved_args(parser, checkpoint, path)
    return parser.parse_args(namespace=Namespace(**{name: before[name] for name in MODEL_FLAGS}))
