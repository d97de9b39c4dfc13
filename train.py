"""
Train a Latent Recurrent Transformer, or the plain GPT under it. --depth is the one dial.

    python train.py --depth 4 --lrt shared                                      one process: GPU, Mac or CPU
    torchrun --standalone --nproc_per_node=8 train.py --depth=20 --lrt=shared   one node of 8 GPUs
    python train.py --resume runs/d4_shared                                     go on with a run
    python train.py --name x --resume auto                                      start it, or go on with it

From the flags (flags.py) and a recipe (recipes.py), plan.py makes sizes, batch and horizon; optim.py the
optimizers; interleave.py the passes of a step; dataset.py the rows; checkpointing.py the run folder. This
file is the setup and the loop.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import faulthandler
import math
import secrets
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from common import check_command_line
from flags import make_parser

if __name__ == "__main__":  # --help, and flags that are wrong, do not wait for what follows
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
    load_checkpoint,
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
from common import (
    UserError,
    check_new_folder,
    code_commit,
    end_processes,
    from_rank_0,
    init_processes,
    peak_flops,
    run_main,
    say,
    side_group,
    training_dtype,
    wait_for_all,
)
from core import describe_core, evaluate_core, load_tasks
from dataset import BOS, Rows, first_rows, open_data, skip_rows
from eval_core import LEARNED_ROWS, describe_learned, evaluate_bpb, learned
from flags import MAX_REWINDS, MAX_SKIPS, check_flags, check_restarts, init_args, resume_args
from interleave import TrainStep
from optim import make_optimizers, set_learning_rates
from plan import describe, dry_run, make_plan
from recurrent import build_model
from sample import complete
from sharding import clip_gradients, shard, share, whole_model, whole_state_dict
from soundness import (
    SPIKE,
    WINDOW,
    GradientChecksums,
    LossSpikes,
    checksum,
    ranks_that_differ,
    suspects,
    use_deterministic_algorithms,
)
from tracking import Tracker, check_tracking
from watchdog import Watchdog

TIMEOUT = timedelta(minutes=10)  # of a collective, for what the watchdog does not time: evaluations, saves
PATIENCE = timedelta(hours=12)  # with a rank that verifies its share of the data for the first time
COMPILED_MEMORY_BUDGET = 0.2  # --activation-checkpointing with --compile: share of activations that is kept
MAX_PASSES_LOGGED = 16  # the losses of longer schedules, pass by pass, would make log.jsonl large


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
        path, checkpoint = newest_checkpoint(args.resume, damaged)
        args = resume_args(parser, path, checkpoint)
    elif args.init_from is not None:
        path, start = newest_checkpoint(args.init_from)
        args = init_args(parser, path, start)
    if args.lrt is None:
        args.lrt = "none" if args.arch == "recurrent" else "shared"
    check_flags(args)
    return args, checkpoint, start


# -----------------------------------------------------------------------------
# Setup

@dataclass
class TrainState:
    """Where training is."""
    step: int = 0  # optimizer steps done
    rows_seen: int = 0  # training rows read, over all ranks
    seconds: float = 0.0  # time in training steps, over all starts
    smooth_loss: float | None = None  # running mean, for the console only
    left_out: list = field(default_factory=list)  # batches that are not read, by their first rows
    rewinds: dict = field(default_factory=dict)  # step of a checkpoint -> how often a spike led back to it
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
    The model, its optimizers, and the training step, compiled and wrapped in DDP, or sharded, as asked: all
    passes of a step are one forward. start: a checkpoint whose weights to begin with. Raises UserError.
    """
    torch.manual_seed(args.seed)
    with torch.device("cpu" if args.shard else device):  # a sharded model is moved unit by unit
        model = build_model(plan.config)
    if start:
        start_from(model, start, args.init_from)
    model.compute_dtype = dtype
    use_compile = device.type == "cuda" and not args.shard if args.compile is None else args.compile
    if args.activation_checkpointing and use_compile:  # the compiler picks what to compute again
        torch._functorch.config.activation_memory_budget = COMPILED_MEMORY_BUDGET
    model.recompute = args.activation_checkpointing and not use_compile

    train_step = TrainStep(model, plan.mix[0][1])
    if args.shard:
        shard(train_step, device)
    optimizers = make_optimizers(model, plan.optimizer, plan.batch_scale, plan.decay_scale,
                                 share=share if args.shard else None)
    if use_compile:
        # One graph. By default Dynamo would cut it up under DDP, to reduce a bucket while the backward still
        # runs; it counts a parameter once for every pass, which makes 202 graphs at depth 20. What is not
        # hidden now is one all-reduce a step, after its last micro-batch.
        torch._dynamo.config.optimize_ddp = False
        # Dynamo compiles what is around the walk of a recurrent layer anew for every layer: they differ in
        # their number, and it gives up on a function after 8 times.
        torch._dynamo.config.recompile_limit = 8 + plan.config.n_layer
        train_step = torch.compile(train_step, dynamic=False)
    if dist.is_initialized() and not args.shard:
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
    return TrainState(checkpoint["step"], checkpoint["rows_seen"], checkpoint["seconds"],
                      left_out=checkpoint["left_out"])

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

def compute_gradients(train_step, plan, schedule, batch, batches, watch):
    """
    Forward and backward of a step: the gradients of all micro-batches add up, those of all ranks in the last
    one. batch: the first micro-batch, of which `batches` has the others. Returns the losses of this rank, of
    the step and of every pass, (1 + passes,), and the first micro-batch of the next step.
    """
    losses = 0
    for micro_step in range(plan.micro_steps):
        watch.at("forward")
        idx, targets = batch
        last = micro_step == plan.micro_steps - 1
        with nullcontext() if last or not isinstance(train_step, DDP) else train_step.no_sync():
            loss, pass_losses = train_step(idx, targets, schedule)
            watch.at("backward")
            (loss / plan.micro_steps).backward()
        losses = losses + torch.cat([loss.detach().view(1), pass_losses]) / plan.micro_steps
        watch.at("loading")
        batch = next(batches)  # loaded while a GPU still computes
    return losses, batch

def clear_gradients(optimizers):
    """Before the next backward; those in DDP's buckets stay there."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=not dist.is_initialized())

def compute_gradients_twice(train_step, model, optimizers, plan, schedule, batch, batches, again, watch):
    """
    compute_gradients(), after a first run on the same rows, which `again` has once more. Raises UserError, on
    all ranks, if the two do not agree in every bit.
    """
    with GradientChecksums(model) as first_sums:
        first, _ = compute_gradients(train_step, plan, schedule, next(again), again, watch)
    clear_gradients(optimizers)
    with GradientChecksums(model) as sums:
        losses, batch = compute_gradients(train_step, plan, schedule, batch, batches, watch)
    watch.at("comparison")
    # by their bits, too: the loss of a pass without one is nan, which is not equal to itself
    ranks = ranks_that_differ([int(checksum(first)), *first_sums.tolist()],
                              [int(checksum(losses)), *sums.tolist()])
    if ranks:
        names = ", ".join(map(str, ranks))
        raise UserError(f"step {watch.progress.step}, run twice, gave different bits on rank {names}: "
                        "its GPU, CPU or memory is broken; --resume without that machine")
    return losses, batch

def rewind_target(folder, step, save_every, rewinds):
    """
    The checkpoint to go back to from a loss spike in this step, None if there is none. Only those of
    --save-every count, if there are any: others depend on when a run was stopped.
    """
    paths = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    regular = [path for path in paths if due(save_every, step_of(path))]
    paths = regular or paths
    if not paths or rewinds.get(step_of(paths[-1]), 0) == MAX_REWINDS:
        return None
    return paths[-1]

def report_spike(args, state, saver, log, loss, score):
    """
    Say that a loss is a spike. Returns the checkpoint to go back to, the same on all ranks, None to go on.
    """
    target = None
    if args.on_spike == "rewind":
        saver.wait()  # for the newest one, that may still be being written
        target = from_rank_0(rewind_target(saver.folder, state.step, args.save_every, state.rewinds))
    what = f"step {state.step:05d}: the loss {loss:.4f} is a spike, {score:.0f} deviations above the median"
    if target is None:
        print0(f"warning: {what}")
        log.add(kind="spike", step=state.step, loss=loss, score=score)
    else:
        print0(f"warning: {what}: back to {target}")
    return target

def go_back(path, state, plan, model, optimizers, log, loss, score):
    """
    Take a run back to a checkpoint because of a spike, and leave out the batches that led to it. Returns the
    TrainState, and the last step that was evaluated.
    """
    before = resume(load_checkpoint(path, shares=True), path, model, optimizers)
    left_out = suspects(state.rows_seen, plan.rows_per_step, before.rows_seen)
    before.left_out = sorted({*state.left_out, *left_out})
    before.rewinds = {before.step: state.rewinds.get(before.step, 0) + 1}
    before.rows_seen = skip_rows(before.rows_seen, before.left_out, plan.rows_per_step)
    evaluated = from_rank_0(log.take_back(before.step))
    log.add(kind="spike", step=before.step, loss=loss, score=score, seen_in_step=state.step,
            left_out=before.left_out)
    return before, evaluated

def recent_losses(folder):
    """The losses of the last steps in a run's log, the same list on all ranks."""
    losses = [row.get("loss") for row in read_log(folder) if row["kind"] == "train"]
    # a log that somebody else has written to may have anything there
    return from_rank_0([x for x in losses if isinstance(x, (int, float)) and abs(x) < 1e38][-WINDOW:])

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
           f"| epoch: {state.rows_seen / rows_per_epoch:.2f} "
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

    if args.deterministic:
        use_deterministic_algorithms()
    device, rank, world_size = init_processes(args.device, TIMEOUT)
    if args.check_every and device.type == "cuda" and not args.deterministic:
        raise UserError("--check-every needs --deterministic on a GPU: without it, bits differ by themselves")
    if args.shard and not dist.is_initialized():
        raise UserError("--shard needs several processes: start it with torchrun, or give --no-shard")
    with Watchdog(rank, world_size) as watch:
        train(args, checkpoint, start, device, rank, world_size, watch)
    end_processes()

def train(args, checkpoint, start, device, rank, world_size, watch):
    """
    A run from its setup to its last words, by the flags. checkpoint: to go on with; start: of another run,
    whose weights to begin with; both may be None. Raises UserError.
    """
    # the checkpoint and the data
    group, patient_group = side_group(TIMEOUT), side_group(PATIENCE)  # for what goes on beside training
    check_same_step(checkpoint["step"] if checkpoint else 0, args.out)
    args, checkpoint = verify_checkpoint(args, checkpoint, group)
    dtype = training_dtype(device, args.dtype)
    args.dtype = str(dtype)[6:]  # a resumed run goes on in it
    run_folder = Path(args.out, args.name) if args.name else None
    data = open_data(args.data, rank=rank, world_size=world_size, run_folder=run_folder)
    wait_for_all(patient_group)  # reading shards for the first time may take longer than a collective waits
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
    spikes = LossSpikes(recent_losses(folder))

    def read_rows():
        """The micro-batches of this rank from where training is."""
        return rows.micro_batches(state.rows_seen, plan.device_batch, rank, world_size, device,
                                  state.left_out, plan.rows_per_step)

    minutes_over = False  # whether rank 0's clock says that it is time to save
    batches = read_rows()
    batch = next(batches)
    if isinstance(train_step, DDP):
        settle_buckets(train_step, batch, plan.schedule_at(0), optimizers)
    bar = tqdm(total=plan.num_iterations, initial=state.step, unit="step", dynamic_ncols=True,
               disable=None if rank == 0 else True)
    while True:
        # once in a while: save, in the background, and what may take long: evaluate, score CORE
        finished = state.step >= plan.num_iterations
        save_due = finished or stopping or minutes_over or due(args.save_every, state.step)
        save_now = save_due and state.step > began
        if save_now:
            watch.between("save", state.step)
            saver.save(
                optimizers, state.step, final=finished or stopping,
                model=whole_state_dict(model),
                rows_seen=state.rows_seen,
                left_out=state.left_out,
                seconds=state.seconds,
                torch_rng=torch.get_rng_state(),
                schedule=dataclasses.asdict(plan.scored_schedule(state.step)),
                **checkpoint_header)
        if state.step > evaluated and (finished or (due(args.eval_every, state.step) and not stopping)):
            watch.between("evaluation", state.step)
            figures = evaluate(whole_model(model), val_rows, data, plan, args, saver, state.step)
            log.add(kind="eval", step=state.step, **figures)
        if save_now or state.step == began:  # not before: an evaluation may find that the newest is no good
            saver.remove_old(good=state.step)
        if tasks and state.step > 0 and (finished or (due(args.core_every, state.step) and not stopping)):
            watch.between("CORE", state.step)
            core = evaluate_tasks(whole_model(model), data.tokenizer, tasks, folder, state.step,
                                  args.core_max_per_task, plan.device_batch)
            log.add(kind="core", step=state.step, **core)
        if finished or stopping:
            break

        # forward and backward
        t0 = time.perf_counter()
        multiplier = set_learning_rates(optimizers, state.step, plan.num_iterations, plan.optimizer)
        schedule = plan.schedule_at(state.step)
        watch.begin_step(state.step, str(schedule))
        if due(args.check_every, state.step):
            losses, batch = compute_gradients_twice(train_step, model, optimizers, plan, schedule, batch,
                                                    batches, read_rows(), watch)
        else:
            losses, batch = compute_gradients(train_step, plan, schedule, batch, batches, watch)

        # clip; all ranks act on the same numbers, a request to stop and rank 0's clock among them
        watch.at("exchange")
        norm = clip_gradients(model, args.grad_clip or math.inf)
        votes = [float(stop.made), float(rank == 0 and saver.minutes_over(args.save_minutes))]
        figures = torch.cat([losses, norm.view(1), losses.new_tensor(votes)])
        *losses, norm, stop_votes, save_votes = mean_over_ranks(figures).tolist()
        stopping, minutes_over = stop_votes > 0, save_votes > 0

        # a loss spike: go on, or back
        finite = math.isfinite(losses[0]) and math.isfinite(norm)
        score = spikes.score(losses[0])
        if finite and score > SPIKE:
            target = report_spike(args, state, saver, log, losses[0], score)
            if target is not None:
                watch.between("rewind", state.step)
                state, evaluated = go_back(target, state, plan, model, optimizers, log, losses[0], score)
                began = state.step  # which is saved already
                clear_gradients(optimizers)
                spikes = LossSpikes(recent_losses(folder))
                batches = read_rows()
                batch = next(batches)
                bar.reset()
                bar.update(state.step)
                continue

        # step, unless a number is not finite; what is being saved has to be copied out by then
        if save_now:
            watch.between("copy", state.step)
            saver.wait_for_copy()
        watch.at("update")
        if finite:
            state.skipped = 0
            for optimizer in optimizers:
                optimizer.step()
        else:
            skip_step(f"the loss is {losses[0]}, the gradient's norm {norm}", args, state, saver, log)
        clear_gradients(optimizers)

        # log
        dt = time.perf_counter() - t0
        state.seconds += dt
        if finite:
            spikes.add(losses[0])
            log_step(args, state, plan, log, losses, norm, multiplier, dt, rows.per_epoch, peak)
        state.step += 1
        state.rows_seen = skip_rows(state.rows_seen + plan.rows_per_step, state.left_out, plan.rows_per_step)
        bar.update()

    watch.close()
    bar.close()
    model = whole_model(model)
    if rank == 0:
        try:
            log.sync()
        except OSError as e:
            raise UserError(f"cannot write {folder / 'log.jsonl'}: {e.strerror}; "
                            f"make room, then --resume {folder}") from e
        finish(finished, model, data.tokenizer, folder, state, log)

if __name__ == "__main__":
    faulthandler.enable(2)  # a bus error or a segmentation fault says where
    run_main(main)
