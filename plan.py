"""
From the one dial, --depth, to a whole run: sizes, schedule, batch, horizon, FLOPs and memory, before
anything of that size is allocated. `train.py --dry-run` prints it and ends.
"""

import gc
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from attention import KVCache
from common import PEAK_FLOPS, UserError, from_environment, peak_flops, pick_device, training_dtype
from dataset import Rows, open_data
from interleave import Schedule, TrainStep
from model import GPT, GPTConfig
from optim import BATCH_AT_DEPTH_12, learning_rate_scale, weight_decay_scale
from recipes import RECIPES, OptimizerConfig, make_optimizer_config
from recurrent import RecurrentConfig, build_model

DEFAULT_VOCAB_SIZE = 32768  # what --dry-run assumes where there is no data yet
ASSUMED_GPU = "NVIDIA H100 80GB HBM3"  # of --mfu, where there is none or its peak is not known
MAX_POSITIONS = 2**15  # of a forward, over all passes and rows, for the default device batch
GPU_MEMORY = 80  # GiB, of the GPUs that --dry-run thinks of
DEEPER_SHARE = 0.25  # of the steps of --schedule draft, the last ones, have one draft more
COPY_RATE = 20e9  # bytes a second from a GPU to page-locked memory; PCIe 4 x16 has 31.5e9 on paper
MAX_PASSES_COUNTED = 16  # --dry-run does not count the activations of longer schedules: it would take minutes


# -----------------------------------------------------------------------------
# Model and schedule

def without_recurrence(args):
    """Is this the control: an LRT that only ever reads the previous token's embedding?"""
    return args.lrt != "none" and args.schedule == "plain"

def make_config(args, vocab_size):
    """The model's configuration from train.py's flags. Raises UserError for a model that cannot be built."""
    if without_recurrence(args) and args.first_memory == "zero":
        raise UserError("--schedule plain never computes a memory: "
                        "an LRT needs --first-memory embedding with it")
    n_head = math.ceil(args.depth * args.aspect_ratio / args.head_dim)
    config_class = RecurrentConfig if args.arch == "recurrent" else GPTConfig
    fields = dict(
        sequence_len=args.max_seq_len,
        vocab_size=vocab_size,
        n_layer=args.depth,
        n_head=n_head,
        n_kv_head=n_head if args.n_kv_head is None else args.n_kv_head,
        n_embd=n_head * args.head_dim,
        window_pattern=args.window_pattern,
        value_embeds=args.value_embeds,
        lrt=args.lrt,
        source_layer=args.source_layer,
        inject=args.inject,
        dest_layers=args.dest_layers,
        memory="embedding" if without_recurrence(args) else "hidden",
        first_memory=args.first_memory,
        memory_init=args.memory_init,
    )
    try:
        return config_class(**RECIPES[args.recipe].model | fields)
    except ValueError as e:
        raise UserError(e) from e

def make_schedule(args):
    """
    The schedule of a training step from train.py's flags, checked against the context. Raises UserError.
    """
    try:
        schedule = Schedule(
            kind="plain" if args.lrt == "none" else args.schedule,
            subsets=args.subsets,
            refinements=args.refinements,
            drafts=args.drafts,
            chunk=args.chunk,
            kv_refresh=args.kv_refresh,
            detach=args.detach,
            loss_weights=args.loss_weights,
        )
        schedule.passes(args.max_seq_len)
    except ValueError as e:
        raise UserError(e) from e
    if schedule.kind == "chunked" and args.chunk >= args.max_seq_len:
        raise UserError(f"--chunk {args.chunk} covers the whole context of {args.max_seq_len}: "
                        "memory would never reach a token")
    return schedule

def make_mix(args, schedule):
    """
    What the steps of a run are: a list of (share of the steps, Schedule). With --schedule draft the last
    quarter hands memory over once more, because decoding hands it on and on; with --pass-mix every step draws
    how many passes it has. Raises UserError.
    """
    if args.pass_mix is not None:
        check_pass_mix(args, schedule)
        total = sum(args.pass_mix)
        return [(share / total, replace(schedule, drafts=n)) for n, share in enumerate(args.pass_mix)]
    if schedule.kind == "draft":
        return [(1 - DEEPER_SHARE, schedule), (DEEPER_SHARE, replace(schedule, drafts=schedule.drafts + 1))]
    return [(1.0, schedule)]

def check_pass_mix(args, schedule):
    """Raise UserError if --pass-mix does not fit the other flags."""
    if schedule.kind != "draft":
        raise UserError(f"--pass-mix goes with --schedule draft, not with {schedule.kind}")
    if args.first_memory == "zero":
        raise UserError("--pass-mix has steps of one pass, in which all memory is the first memory: "
                        "give --first-memory embedding with it")
    if not (all(share >= 0 for share in args.pass_mix) and 0 < sum(args.pass_mix) < math.inf):
        raise UserError(f"--pass-mix {' '.join(map(str, args.pass_mix))}: "
                        "shares of steps are not negative, finite, and not all 0")


# -----------------------------------------------------------------------------
# The plan

@dataclass
class Plan:
    """A run before anything of its size is allocated."""
    recipe: str  # a key of RECIPES
    config: GPTConfig
    optimizer: OptimizerConfig
    batch_scale: float  # of the learning rates, see learning_rate_scale()
    decay_scale: float  # of the weight decay, see weight_decay_scale()
    mix: list  # (share of the steps, Schedule), see make_mix()
    is_random: bool  # whether every step draws from the mix, or one part of it follows the other
    seed: int  # of the draws
    counts: dict  # parameters by group, see GPT.parameter_counts()
    flops_per_token: float  # training FLOPs, the mean over the steps
    cost: float  # passes a step as the paper counts them, see Schedule.cost(); the mean over the steps
    flops_ratio: float  # flops_per_token over that of one plain pass
    kv_bytes: int  # the KV cache of one sequence that fills the context, as it is decoded
    total_batch: int  # tokens a step, over all ranks
    rows_per_step: int  # sequences a step, over all ranks
    device_batch: int  # sequences a micro-batch on each rank
    micro_steps: int  # micro-batches a step on each rank, whose gradients add up
    num_iterations: int  # optimizer steps

    @property
    def deepest(self):
        """The schedule with the most passes: it decides what fits into memory."""
        return self.mix[-1][1]

    def schedule_at(self, step):
        """What a step runs: the same on every rank, and when the step is run again."""
        where = step / self.num_iterations
        if self.is_random:
            where = np.random.default_rng([self.seed, step]).random()
        for share, schedule in self.mix:
            if where < share:
                return schedule
            where -= share
        return self.deepest

    def scored_schedule(self, step):
        """What a model that has trained so many steps is scored by: its last step, or the deepest drawn."""
        return self.deepest if self.is_random else self.schedule_at(step - 1)

def make_plan(args, vocab_size, world_size, dtype):
    """
    The Plan behind train.py's flags, for this many ranks and activations of this dtype. Raises UserError
    for what does not fit together.
    """
    config = make_config(args, vocab_size)
    mix = make_mix(args, make_schedule(args))
    deepest = mix[-1][1]
    T = args.max_seq_len
    try:
        with torch.device("meta"):  # shapes without storage
            model = build_model(config)
            depth_12 = GPT(GPTConfig(vocab_size=vocab_size, lrt=args.lrt, **RECIPES[args.recipe].model))
    except RuntimeError as e:
        raise UserError(f"no model of width {config.n_embd} can be built ({e})") from e
    counts = model.parameter_counts()

    # FLOPs, the mean over the steps
    flops_per_token = sum(share * schedule.flops_per_token(model, T) for share, schedule in mix)
    cost = sum(share * schedule.cost(model, T) for share, schedule in mix)

    # the batch: tokens a step, then sequences of each rank and micro-batch
    growth = counts["scaling"] / depth_12.parameter_counts()["scaling"]
    total_batch = args.total_batch_size
    if total_batch is None:
        total_batch = automatic_batch(growth, world_size * T)
    if total_batch % (world_size * T):
        raise UserError(f"--total-batch-size {total_batch} is not divisible by {world_size} processes * "
                        f"{T} tokens a row = {world_size * T}")
    rows = total_batch // T // world_size
    device_batch = args.device_batch_size or automatic_device_batch(rows, deepest, T)
    if rows % device_batch:
        raise UserError(f"--device-batch-size {device_batch} does not divide the {rows} rows a step of each "
                        f"process (--total-batch-size {total_batch} / {world_size} processes / {T} tokens)")

    # the horizon
    if args.num_iterations:
        num_iterations = args.num_iterations
    elif args.target_flops:
        num_iterations = max(round(args.target_flops / (flops_per_token * total_batch)), 1)
    else:
        num_iterations = max(round(args.target_param_data_ratio * counts["scaling"] / total_batch), 1)

    optimizer = make_optimizer_config(args)
    kv = KVCache(config, 1, T, "meta", dtype, rolling=True)
    return Plan(
        recipe=args.recipe,
        config=config,
        optimizer=optimizer,
        batch_scale=learning_rate_scale(total_batch),
        decay_scale=weight_decay_scale(optimizer, config.n_layer, total_batch, growth),
        mix=mix,
        is_random=args.pass_mix is not None,
        seed=args.seed,
        counts=counts,
        flops_per_token=flops_per_token,
        cost=cost,
        flops_ratio=flops_per_token / model.flops_per_token(T),
        kv_bytes=sum(x.nbytes for x in kv.k + kv.v),
        total_batch=total_batch,
        rows_per_step=rows * world_size,
        device_batch=device_batch,
        micro_steps=rows // device_batch,
        num_iterations=num_iterations,
    )

def automatic_batch(growth, unit):
    """
    Tokens a step, a multiple of `unit`, one sequence on each rank. nanochat's rule: the batch grows with
    the training tokens, and so with the parameters, to the power 0.383, from 2^19 at depth 12 (Power
    Lines, arXiv 2505.13738). growth: parameters over those of depth 12.
    """
    ideal = BATCH_AT_DEPTH_12 * growth ** 0.383
    rows = max(2 ** round(math.log2(ideal)) // unit, 1)
    if rows >= 16:
        rows = rows // 16 * 16  # whole micro-batches of 16 sequences
    return rows * unit

def automatic_device_batch(rows, schedule, T):
    """
    The largest micro-batch that divides `rows`, the sequences of a rank, and whose activations are not
    too many.
    """
    passes = schedule.passes(T)[schedule.forward_passes(T):]  # those that keep activations for the backward
    positions = sum(map(len, passes))
    for size in (16, 8, 4, 2):
        if rows % size == 0 and size * positions <= MAX_POSITIONS:
            return size
    return 1

def predict_time(plan, world_size, device, mfu, dollars_per_hour=None):
    """
    How long the training steps of a plan take on this many GPUs, a line of text. mfu: the share of a GPU's
    peak FLOP/s that the model's FLOPs reach; research/SPEED.md and log.jsonl have measured ones. A GPU that
    is not here, or not known, is taken for ASSUMED_GPU. dollars_per_hour: the price of all of them together;
    None: without the cost.
    """
    peak = peak_flops(device)
    gpu = torch.cuda.get_device_name(device) if peak else ASSUMED_GPU
    peak = peak or PEAK_FLOPS[ASSUMED_GPU]
    flops = plan.num_iterations * plan.total_batch * plan.flops_per_token
    hours = flops / (world_size * peak * mfu) / 3600
    line = (f"at {100 * mfu:g} % of the peak of {world_size} x {gpu}: {hours:.2f} hours of training steps, "
            "without evaluation and compilation")
    if dollars_per_hour is not None:
        line += f", {hours * dollars_per_hour:.2f} dollars at {dollars_per_hour:g} an hour"
    return line

def describe(plan, world_size, device, dtype, rows_per_epoch, mfu=None, dollars_per_hour=None):
    """
    The plan in lines of text. rows_per_epoch: sequences in the training shards, None if there is no data
    yet. mfu: also say how long it takes, see predict_time().
    """
    config, schedule, counts = plan.config, plan.mix[0][1], plan.counts
    T = config.sequence_len
    tokens = plan.num_iterations * plan.total_batch
    groups = [f"{name} {n:,}" for name, n in counts.items() if n and name not in ("total", "scaling")]
    parameters = f"{counts['total']:,} parameters ({', '.join(groups)})"

    model = (f"{world_size} x {device}, {str(dtype)[6:]} | depth {config.n_layer}, width {config.n_embd}, "
             f"{config.n_head} heads, {config.label}")
    if config.recurrent_memory:
        passes = " or ".join(str(len(schedule.passes(T))) for _, schedule in plan.mix)
        model += f", memory from layer {config.source_layer}, {schedule.kind}, {passes} passes"
    if plan.recipe != "paper":
        model += f", recipe {plan.recipe}"
    if config.first_memory == "embedding":
        model += ", first memory from the previous token's embedding"

    horizon = (f"{plan.num_iterations} steps of {plan.total_batch:,} tokens "
               f"({plan.rows_per_step} rows of {T}: {world_size} x {plan.micro_steps} x {plan.device_batch}) "
               f"= {tokens:,} tokens, "
               f"{tokens / counts['scaling']:.1f} a parameter")
    if rows_per_epoch:
        horizon += f", {plan.num_iterations * plan.rows_per_step / rows_per_epoch:.2f} epochs"

    flops = (f"{tokens * plan.flops_per_token:.2e} FLOPs, {plan.flops_ratio:.2f} times those of plain passes "
             f"over the same tokens ({tokens * plan.cost:,.0f} tokens of baseline-equivalent compute); "
             f"KV cache {plan.kv_bytes:,} bytes a sequence of {T} tokens")
    lines = [parameters, model, horizon, flops]
    if mfu is not None:
        lines.append(predict_time(plan, world_size, device, mfu, dollars_per_hour))
    return lines


# -----------------------------------------------------------------------------
# Memory

def saved_bytes(work, parameters):
    """
    Bytes that work(), a forward pass, leaves in memory for its backward: all new storages that autograd
    or Python holds when it is done, those of `parameters` left out. Tensors may be on the meta device.
    """
    def live_tensors():
        return [x for x in gc.get_objects() if type(x) is torch.Tensor]

    def address(x):
        return x.untyped_storage()._cdata

    others = live_tensors()  # kept alive until the end, so that none of their addresses is used again
    before = {address(x) for x in [*others, *parameters]}
    sizes = {}  # address -> bytes

    def count(x):
        sizes[address(x)] = x.untyped_storage().nbytes()
        return x

    gc.freeze()  # what there was before is not looked through again
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = work()  # noqa: F841 (keeps the graph, and so its storages, alive until they are counted)
        gc.collect()
        for x in live_tensors():
            count(x)
    finally:
        gc.unfreeze()
    return sum(n for storage, n in sizes.items() if storage not in before)

def put_together_bytes(model, dtype):
    """
    Bytes of whole weights and gradients that --shard has at a time, see sharding.py: what is put together all
    along, and of the largest unit the weights, those of the next one, and the gradients. Layers are in dtype.
    """
    def n_parameters(module):
        return sum(p.numel() for p in module.parameters())

    embeddings = [model.wte, *model.value_embeds.values()]
    units = [dtype.itemsize * n_parameters(block) for block in model.h]
    units += [4 * n_parameters(embedding) for embedding in embeddings]
    rest = n_parameters(model) - sum(map(n_parameters, [*model.h, *embeddings]))
    return 8 * rest + 3 * max(units)

def count_activations(config, schedule, rows, dtype, recompute, shard=False):
    """What activation_bytes() returns, for `rows` sequences, by running all layers of this GPTConfig."""
    with torch.device("meta"):
        model = build_model(config)
        model.compute_dtype = dtype
        model.recompute = recompute
        if shard:  # the layers are in the dtype in which they are sent
            for module in model.h.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    module.register_parameter(name, torch.nn.Parameter(torch.empty_like(p, dtype=dtype)))
        step = TrainStep(model, schedule)
        idx = torch.zeros(rows, config.sequence_len, dtype=torch.int64)
        return saved_bytes(lambda: step(idx, idx), model.parameters())

def activation_bytes(plan, dtype, recompute, shard=False):
    """
    Bytes of the activations in this dtype that the forward of a micro-batch keeps for its backward. Layers
    come in periods, of which each keeps as much as any other on its side of the source layer. So a deep
    model is counted in three shallow ones: one without these periods, and one with one more on each side.
    """
    config = plan.config
    period = len(config.window_pattern)
    if config.value_embeds == "alternate":
        period = math.lcm(period, 2)
    below = config.source_layer + 1
    above = config.n_layer - below
    few_below = min(below, below % period + max(period, 2))
    few_above = min(above, above % period + max(period, 2))

    def count(below, above):
        shallow = replace(config, n_layer=below + above, source_layer=below - 1)
        return count_activations(shallow, plan.deepest, plan.device_batch, dtype, recompute, shard)

    if config.n_layer <= 3 * (few_below + few_above):  # three counts would not be faster
        return count(below, above)
    few = count(few_below, few_above)
    total = few
    if below > few_below:
        period_below = count(few_below + period, few_above) - few
        total += (below - few_below) // period * period_below
    if above > few_above:
        period_above = count(few_below, few_above + period) - few
        total += (above - few_above) // period * period_above
    return total

def memory_estimate(plan, world_size, dtype, recompute, shard=False):
    """
    Bytes that one process needs at least, a dict by kind: weights, gradients and optimizer state in
    float32, the state shared by all ranks, and the activations that the forward of a micro-batch keeps
    for its backward, counted on the meta device in this dtype. That is without compilation, which keeps
    less. The activations of long schedules and of the Recurrent Transformer are not counted. Under DDP the
    gradients are its buckets. Where those of a micro-batch are added to them, there are two of each for a
    moment; a compiled backward returns all of them at once, and frees the activations meanwhile. shard: with
    --shard.
    """
    total, T = plan.counts["total"], plan.config.sequence_len
    muon = plan.counts["matrices"] + plan.counts["memory projections"]
    if plan.optimizer.gate_lr is None:
        muon += plan.counts["gates"]
    adamw = total - muon
    parts = dict(
        weights=4 * total,
        gradients=4 * total,
        optimizers=(8 * adamw + 4 * muon) // world_size,  # AdamW keeps two moments, Muon one
    )
    if shard:
        parts["weights"] //= world_size
        parts["gradients"] //= world_size
        with torch.device("meta"):
            parts["put together"] = put_together_bytes(build_model(plan.config), dtype)
    recurrent = isinstance(plan.config, RecurrentConfig)
    if not recurrent and len(plan.deepest.passes(T)) <= MAX_PASSES_COUNTED:
        parts["activations"] = activation_bytes(plan, dtype, recompute, shard)
    new_gradients = 4 * total - parts.get("activations", 0)
    if not shard and (world_size > 1 or plan.micro_steps > 1) and new_gradients > 0:
        parts["new gradients"] = new_gradients
    return parts

def describe_checkpoint(parts, world_size):
    """
    What saving costs, a line of text: the size of a checkpoint, and how long training stands still while rank
    0, which has the weights and its share of the optimizers' states, copies them out (checkpointing.Saver).
    parts: see memory_estimate().
    """
    copied = parts["weights"] + parts["optimizers"]
    whole = parts["weights"] + world_size * parts["optimizers"]
    files = "one file" if world_size == 1 else f"{world_size} files"
    return (f"checkpoint: {whole / 1e9:.2f} GB in {files}; a save stops training for "
            f"{copied / COPY_RATE:.2f} s, in which rank 0 copies {copied / 1e9:.2f} GB "
            f"at {COPY_RATE / 1e9:.0f} GB/s into as much memory of the host")

def dry_run(args):
    """
    Print the plan and the memory it needs. No model is built; without data the default vocabulary is
    assumed.
    """
    device = pick_device(args.device)
    dtype = training_dtype(device, args.dtype)
    world_size = from_environment("WORLD_SIZE", 1, least=1)
    vocab_size = DEFAULT_VOCAB_SIZE
    rows_per_epoch = None
    if Path(args.data).exists():
        data = open_data(args.data, verify=False)
        vocab_size = data.meta["vocab_size"]
        rows_per_epoch = Rows(data.train, args.max_seq_len, args.seed).per_epoch
    plan = make_plan(args, vocab_size, world_size, dtype)
    lines = describe(plan, world_size, device, dtype, rows_per_epoch, args.mfu, args.dollars_per_hour)
    print("\n".join(lines))

    dtypes = [dtype] if dtype == torch.bfloat16 else [dtype, torch.bfloat16]  # as on a GPU, too
    ways = [False, True] if world_size > 1 and args.arch == "gpt" else [False]
    for activation_dtype in dtypes:
        needed = []
        for shard in ways:
            parts = memory_estimate(plan, world_size, activation_dtype, args.activation_checkpointing, shard)
            if not shard:
                whole_parts = parts
            needed.append(sum(parts.values()) / 2**30)
            terms = " + ".join(f"{name} {n / 2**30:.2f}" for name, n in parts.items())
            print(f"memory a process{' with --shard' if shard else ''}, {str(activation_dtype)[6:]}, "
                  f"{plan.device_batch} rows: {terms} = {needed[-1]:.2f} GiB")
        if len(ways) == 2:
            print(what_fits(*needed))
    print(describe_checkpoint(whole_parts, world_size))

def what_fits(whole, sharded):
    """A line about the GiB that a process needs without and with --shard."""
    room = f"{GPU_MEMORY} GiB"
    if whole <= GPU_MEMORY:
        return f"it fits in {room}"
    if sharded <= GPU_MEMORY:
        return f"it does not fit in {room}, --shard does"
    return f"it does not fit in {room}, with --shard neither: lower --device-batch-size, take more processes"
