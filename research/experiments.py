"""
The experiments behind research/RESULTS.md: named sets of runs, and one row a run in
research/results/SET.jsonl.

    python -m research.experiments --list                     every run: its command, and whether it is done
    python -m research.experiments scaling cheaper --jobs 2   what these sets still lack, two runs at a time
    python -m research.experiments scaling --seeds 2 --extra="--compile --device cuda"
    python -m research.plot                                   figures and tables of the rows

Every run is one command line, of train.py, research.reproduction or research.states, which can be repeated
by hand and is part of its row. A run that has a row is not run again; one that was interrupted goes on from
its newest checkpoint.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpointing import find_checkpoint, load_checkpoint, load_model, read_log
from common import ArgumentParser, UserError, append_row, at_least, lock, machine, read_rows, run_main
from dataset import first_rows, open_data
from eval_core import LEARNED_ROWS, evaluate_bpb, learned, recurrent_losses
from flags import make_parser as make_training_parser
from flags import saved_args
from interleave import Schedule
from plan import make_plan
from tokens_page import repeated

ROOT = Path(__file__).resolve().parent.parent
ROWS = 256  # of the validation text: what every run is scored on
COPYING_ROWS = 128  # of them: for copying(), which decodes them once for each part of the memory's path
BATCH_SIZE = 16  # rows scored at a time

# depth 4, width 128, context 256: what two cores can do, with the recipe that was tuned on the baseline of
# research/reproduction.py
SIZE = (
    "train.py --depth 4 --aspect-ratio 32 --head-dim 64 --max-seq-len 256 --window-pattern L "
    "--total-batch-size 4096 --matrix-lr 0.04 --embedding-lr 0.2 --weight-decay 0 --grad-clip 0 "
    "--warmup-steps 0 --eval-every 0 --eval-tokens 4096 --decode-tokens 0 --save-every 50 --keep 1 "
    "--dtype float32")


# the same size with nanochat's recipe of 2026-07-03 and its own rates, in bf16
NANOCHAT_SIZE = (
    "train.py --recipe nanochat --depth 4 --aspect-ratio 32 --head-dim 64 --max-seq-len 256 "
    "--window-pattern L --total-batch-size 4096 --weight-decay 0 --eval-every 0 --eval-tokens 4096 "
    "--decode-tokens 0 --save-every 50 --keep 1 --dtype bfloat16 --compile")
# depth 6, width 256, otherwise as SIZE, in bf16
LARGER_SIZE = SIZE.replace("--depth 4 --aspect-ratio 32", "--depth 6 --aspect-ratio 42").replace(
    "float32", "bfloat16 --compile")


# -----------------------------------------------------------------------------
# The sets: dicts from the name of a run to its command, without `python` and the seed. Each runs once a seed.

def reproduction():
    """Our code on the job of the authors' released code; on three seeds, as the differences are small."""
    script = "research.reproduction"
    return {
        "none_1000": f"{script} --lrt none --num-iterations 1000",
        "layerwise_1000": f"{script} --lrt layerwise --num-iterations 1000",
        "none_2000": f"{script} --lrt none --num-iterations 2000",
        "none_2000_release_muon":
            f"{script} --lrt none --num-iterations 2000 --muon release --matrix-lr 0.02",
    }

def scaling():
    """Can an LRT at R tokens a parameter be read against the baseline at R and at 2R?"""
    runs = {}
    for steps in (250, 500, 1000):
        for lrt in ("none", "shared", "layerwise"):
            runs[f"{lrt}_{steps}"] = f"{SIZE} --lrt {lrt} --num-iterations {steps}"
    runs["none_2000"] = f"{SIZE} --lrt none --num-iterations 2000"
    return runs

def longer():
    """
    scaling() at half the width, 0.46 M parameters in matrices and head, for 10 and 20 tokens a parameter
    instead of 0.8 to 6.3. At 20, a text of 5.9 M tokens is read one and a half times.
    """
    half = SIZE.replace("--aspect-ratio 32 --head-dim 64", "--aspect-ratio 16 --head-dim 32")
    runs = {}
    for ratio in (10, 20):
        for lrt in ("none", "layerwise"):
            runs[f"{lrt}_{ratio}"] = f"{half} --lrt {lrt} --num-iterations {112 * ratio}"

    # the control and recurrence on top of it, see control(), at the FLOPs of the baseline: a step has 1.015
    # and 1.19 times as many
    first = "--first-memory embedding --lrt shared --inject kv"
    runs["none_40"] = f"{half} --lrt none --num-iterations {112 * 40}"
    for ratio in (10, 20, 40):
        runs[f"kv_{ratio}"] = f"{half} {first} --schedule plain --num-iterations {round(112 * ratio / 1.015)}"
        runs[f"draft_kv_{ratio}"] = (
            f"{half} {first} --schedule draft --num-iterations {round(112 * ratio / 1.19)}")
    return runs

def ablation():
    """
    One change each to layerwise_500 of scaling(), where the gain of memory is large enough to tell them
    apart. That run has source layer 2 of 0 .. 3, injects both ways, is interleaved with S = 2, and its
    loss is the mean over the passes. S = 1 is refine_1.
    """
    changes = {
        "inject_kv": "--inject kv",
        "inject_residual": "--inject residual",
        "source_0": "--source-layer 0",
        "source_1": "--source-layer 1",
        "source_3": "--source-layer 3",
        "subsets_4": "--subsets 4",
        "subsets_8": "--subsets 8",
        "kv_refresh": "--kv-refresh",
        "refine_1": "--schedule refine --refinements 1",
        "refine_3": "--schedule refine --refinements 3",
        "chunked": "--schedule chunked --chunk 64",
        "loss_memory_passes": "--loss-weights 0 1 1",
        "refine_1_loss_last": "--schedule refine --refinements 1 --loss-weights 0 1",
    }
    return {name: f"{SIZE} --lrt layerwise --num-iterations 500 {change}" for name, change in changes.items()}

def tuning():
    """
    Is it our training that leaves the shared LRT behind? shared_500 of scaling() with other rates and
    other initial values for what is new in it (the scalars are b and c, at a rate of 0.5), and with the
    choices that its one projection may depend on.
    """
    changes = {
        "memory_lr_0.02": "--memory-lr 0.02",
        "memory_lr_0.08": "--memory-lr 0.08",
        "memory_init_0": "--memory-init 0",
        "memory_init_1": "--memory-init 1",
        "scalar_lr_0.1": "--scalar-lr 0.1",
        "inject_kv": "--inject kv",
        "source_3": "--source-layer 3",
        "loss_memory_passes": "--loss-weights 0 1 1",
    }
    return {name: f"{SIZE} --lrt shared --num-iterations 500 {change}" for name, change in changes.items()}

def cheaper():
    """
    Cheaper training steps: --schedule draft, at the FLOPs of 500, 1000 and 2000 steps of the baseline, and
    with one projection for all layers, into keys and values only, at the FLOPs of 1000 and 2000 steps.

    results/cheaper.jsonl has these rows under the flags that --schedule draft has replaced (--schedule refine
    --refinements 1 --forward-passes 1 --deepen 0.25), and more rows with flags that have left train.py:
    forward_init and forward_refine_K (--forward-passes; commit 7f659ac repeats them); last_25, last_50,
    last_75, mixed_25 and mixed_50 (--memory-start and --memory-share: plain passes in some of the steps;
    commit f91a36d).
    """
    runs = {}
    for steps in (390, 780, 1560):
        runs[f"deepen_{steps}"] = f"{SIZE} --lrt layerwise --num-iterations {steps} --schedule draft"
    for steps in (810, 1620):
        runs[f"deepen_shared_kv_{steps}"] = (
            f"{SIZE} --lrt shared --num-iterations {steps} --schedule draft --inject kv")
    loss_last = "--schedule refine --refinements 1 --loss-weights 0 1"
    runs["refine_1_loss_last"] = f"{SIZE} --lrt layerwise --num-iterations 1000 {loss_last}"
    return runs

def control():
    """
    What is recurrence worth beyond a memory that costs one pass? The control reads the previous token's
    embedding by the same path (--first-memory embedding --schedule plain).
    - kv_STEPS, layerwise_STEPS: the control, with one projection for all layers into keys and values only,
      and with one a layer.
    - s2_kv_STEPS: the paper's schedule with that first memory.

    results/control.jsonl also has rows of draft_kv_STEPS: recurrence on top of it. The first pass reads that
    memory, runs forward only and up to the source layer, and hands its own memory to a second pass, which
    has the loss. That is --schedule draft without the second draft of its last quarter: commit 7f659ac
    repeats them. draft_kv_430, 860 and 1720 have the FLOPs of 500, 1000 and 2000 steps of the control.
    """
    first = "--first-memory embedding"
    shared_kv = "--lrt shared --inject kv"

    def run(steps, flags):
        return f"{SIZE} --num-iterations {steps} {first} {flags}"

    runs = {}
    for steps in (500, 1000, 2000):
        runs[f"kv_{steps}"] = run(steps, f"{shared_kv} --schedule plain")
    for steps in (250, 500, 1000):
        runs[f"s2_kv_{steps}"] = run(steps, shared_kv)
    for steps in (500, 1000):
        runs[f"layerwise_{steps}"] = run(steps, "--lrt layerwise --schedule plain")
    return runs

def at_equal_flops(size, budgets):
    """
    The baseline, the control and recurrence at the FLOPs of so many steps of the baseline: the control with
    one projection, into keys and values; on top of its memory --schedule draft and the paper's schedule; and
    --schedule draft with first memory zero.
    """
    shared_kv = "--lrt shared --inject kv"
    first = "--first-memory embedding"
    variants = {  # the FLOPs of a step over the baseline's, and flags
        "none": (1, "--lrt none"),
        "kv": (1.02, f"{shared_kv} {first} --schedule plain"),
        "draft_kv": (1.25, f"{shared_kv} {first} --schedule draft"),
        "s2_kv": (2.04, f"{shared_kv} {first}"),
        "draft_zero_kv": (1.25, f"{shared_kv} --schedule draft"),
    }
    runs = {}
    for budget in budgets:
        for name, (cost, flags) in variants.items():
            runs[f"{name}_{budget}"] = f"{size} {flags} --num-iterations {round(budget / cost)}"
    return runs

def larger():
    """control() at depth 6 and width 256, at equal FLOPs; a name says of how many steps of the baseline."""
    return at_equal_flops(LARGER_SIZE, [500, 1000])

def nanochat():
    """control() with nanochat's recipe, at equal FLOPs; a name says of how many steps of the baseline."""
    return at_equal_flops(NANOCHAT_SIZE, [500, 1000, 2000])

def technical():
    """
    control() on another text, at equal FLOPs: run it with --data FOLDER, that prepare_data.py made of
    ../shared/corpus/technical.jsonl.gz with the same flags as of the prose.
    """
    return at_equal_flops(SIZE, [500, 1000])

def memory():
    """
    What might make recurrence worth more than the control, after 500 steps: all read the control's memory
    first. The paper's injection and others, random numbers of passes, sweeps of subsets as drafts.
    """
    first = f"{SIZE} --num-iterations 500 --first-memory embedding"
    mix = "--schedule draft --pass-mix 0.75 0.22 0.03"
    return {
        "draft_kv": f"{first} --lrt shared --inject kv --schedule draft",
        "mix_kv": f"{first} --lrt shared --inject kv {mix}",
        "mix_both": f"{first} --lrt shared --inject both {mix}",
        "mix_layerwise": f"{first} --lrt layerwise --inject both {mix}",
        "mix_input": f"{first} --lrt shared --inject input {mix}",
        "draft_input": f"{first} --lrt shared --inject input --schedule draft",
        "control_input": f"{first} --lrt shared --inject input --schedule plain",
        "mix_kv_lower": f"{first} --lrt shared --inject kv --dest-layers 0 1 {mix}",
        "mix_kv_upper": f"{first} --lrt shared --inject kv --dest-layers 1 3 {mix}",
        "sweeps_8_kv": f"{first} --lrt shared --inject kv --schedule draft --subsets 8",
    }

def warm():
    """
    Memory added to a trained baseline, `base`, at the FLOPs of 250 more of its steps: none at all, the
    control, and recurrence on top of it. @base is the folder of that run, of the same seed.
    """
    shared_kv = "--lrt shared --inject kv --first-memory embedding"
    runs = {"base": f"{SIZE} --lrt none --num-iterations 500"}
    for name, steps, flags in (
        ("none", 250, "--lrt none"),
        ("kv", 245, f"{shared_kv} --schedule plain"),
        ("draft_kv", 200, f"{shared_kv} --schedule draft"),
    ):
        runs[f"{name}_{steps}"] = f"{SIZE} --init-from @base --num-iterations {steps} {flags}"
    return runs

def states():
    """State tracking beyond the lengths of training, see research/states.py."""
    variants = {
        "none": "",
        "recurrent": "--arch recurrent",
        "layerwise_sequential": "--lrt layerwise --schedule sequential",
        "layerwise_interleaved2": "--lrt layerwise --subsets 2",
        "layerwise_interleaved4": "--lrt layerwise --subsets 4",
        "layerwise_interleaved8": "--lrt layerwise --subsets 8",
        "layerwise_refine1": "--lrt layerwise --schedule refine --refinements 1",
        "layerwise_refine3": "--lrt layerwise --schedule refine --refinements 3",
        # the control, see control()
        "layerwise_plain_first_embedding": "--lrt layerwise --schedule plain --first-memory embedding",
    }
    runs = {}
    for task, steps in (("parity", 300), ("s5", 800)):
        for name, flags in variants.items():
            command = f"research.states --task {task} --num-iterations {steps} {flags}"
            runs[f"{task}_{name}"] = command.strip()

    # two sweeps of eight subsets, of which the first runs forward only; and trained for longer
    longer = "research.states --task s5 --num-iterations 1600 --lrt layerwise"
    draft = "--schedule draft --drafts 2 --subsets 8"
    usual = longer.replace("1600", "800")
    runs["s5_layerwise_draft2_subsets8"] = f"{usual} {draft}"
    runs["s5_layerwise_draft2_subsets8_1600_steps"] = f"{longer} {draft}"
    runs["s5_layerwise_interleaved8_1600_steps"] = f"{longer} --subsets 8"
    runs["s5_layerwise_sequential_1600_steps"] = f"{longer} --schedule sequential"
    runs["s5_layerwise_draft1_subsets8_1600_steps"] = f"{longer} --schedule draft --drafts 1 --subsets 8"
    runs["s5_layerwise_plain_first_embedding_1600_steps"] = (
        f"{longer} --schedule plain --first-memory embedding")
    runs["s5_none_1600_steps"] = "research.states --task s5 --num-iterations 1600 --lrt none"
    runs["parity_layerwise_draft2_subsets8"] = (
        f"research.states --task parity --num-iterations 300 --lrt layerwise {draft}")

    # rows of 32 tokens, so that two sweeps hand memory over less often than the exact recurrence does
    for name, schedule in {
        "draft2_subsets4": "--schedule draft --drafts 2 --subsets 4",
        "draft2_subsets8": draft,
        "interleaved8": "--subsets 8",
        "sequential": "--schedule sequential",
    }.items():
        runs[f"s5_layerwise_{name}_1600_steps_32_tokens_window8"] = (
            f"{longer} --max-seq-len 32 --window 8 {schedule}")
    return runs

SETS = {
    "reproduction": reproduction(),
    "scaling": scaling(),
    "longer": longer(),
    "cheaper": cheaper(),
    "ablation": ablation(),
    "tuning": tuning(),
    "control": control(),
    "larger": larger(),
    "nanochat": nanochat(),
    "technical": technical(),
    "memory": memory(),
    "warm": warm(),
    "states": states(),
}


# -----------------------------------------------------------------------------
# From a model to the scores in its row

@torch.no_grad()
def copying(model, rows, batch_size=BATCH_SIZE):
    """
    Mean nats a token of rows (N, T+1), decoding with the exact recurrence: `repeated` over tokens whose
    pair is repeated(), `new` over the others; and `share`, that of the former. `without` has the two
    means without each part of the memory's path: what memory adds to the keys (a layer at a time where
    each has its own projection), to the values, to the residual stream.
    """
    batches = []
    for batch in rows.to(model.wte.weight.device).split(batch_size):
        batches.append((batch[:, :-1], batch[:, 1:]))
    again = torch.cat([repeated(idx, targets) for idx, targets in batches])

    def means():
        nats = torch.cat([recurrent_losses(model, idx, targets) for idx, targets in batches])
        return dict(repeated=nats[again].mean().item(), new=nats[~again].mean().item())

    # the weights of each part
    parts = {}
    for layer, projection in enumerate(model.mem_k):
        layer += model.config.memory_layers.start
        name = f"keys {layer}" if len(model.mem_k) > 1 else "keys"
        parts[name] = [projection.weight]
    if model.config.kv_memory:
        parts["values"] = [projection.weight for projection in model.mem_v]
    if model.config.residual_memory:
        parts["residual"] = [model.mem_lambdas]
    if model.config.input_memory:
        parts["input"] = [model.mem_input.weight]

    # the whole model, then with one part at zero
    found = means() | dict(share=again.float().mean().item(), without={})
    for name, weights in parts.items():
        saved = [weight.clone() for weight in weights]
        for weight in weights:
            weight.zero_()
        found["without"][name] = means()
        for weight, value in zip(weights, saved):
            weight.copy_(value)
    return found

def score(model, rows, token_bytes, schedule, buckets=16):
    """
    Score rows (N, T+1) int64: `bpb`, in parallel and with the exact recurrence, see evaluate_bpb();
    `by_position`, the same in `buckets` equal stretches of the context; and what copying() and learned()
    return.
    """
    bpb, bits = evaluate_bpb(model, rows, token_bytes, schedule, BATCH_SIZE, decode=True)
    stretches = {name: x.reshape(buckets, -1).sum(1) for name, x in bits.items()}
    n_bytes = stretches.pop("bytes")
    few = rows[:LEARNED_ROWS].to(model.wte.weight.device)
    return dict(
        bpb=bpb,
        by_position={name: (x / n_bytes).round(4).tolist() for name, x in stretches.items()},
        copying=copying(model, rows[:COPYING_ROWS]),
        learned=learned(model, few[:, :-1]),
    )

def mean_or_none(values):
    """The mean of those values that are finite numbers; None if there are none."""
    values = np.array(values, dtype=float)  # None becomes NaN
    values = values[np.isfinite(values)]
    return values.mean() if len(values) else None

def curve(log, points=40):
    """
    The training loss of a log's rows in at most so many stretches of steps, a list of [first step, loss
    of the first pass, mean loss of the later passes, which have memory]. None: there was no such pass, or
    it had no loss.
    """
    steps = [row for row in log if row["kind"] == "train" and row["passes"]]
    if not steps:
        return []
    stretches = []
    for part in np.array_split(np.array(steps, dtype=object), min(points, len(steps))):
        first = mean_or_none([row["passes"][0] for row in part])
        later = mean_or_none([mean_or_none(row["passes"][1:]) for row in part])
        means = [None if mean is None else round(mean, 4) for mean in (first, later)]
        stretches.append([part[0]["step"], *means])
    return stretches

def finished(folder):
    """
    The row of a finished run of train.py, without what names it. compute: baseline-equivalent tokens, as
    Schedule.cost() counts them; flops: training FLOPs, by count.
    """
    path = find_checkpoint(folder)
    checkpoint = load_checkpoint(path)
    args = argparse.Namespace(**saved_args(make_training_parser(), checkpoint, path))
    data = open_data(args.data, verify=False)
    plan = make_plan(args, data.meta["vocab_size"], 1, torch.float32)
    model = load_model(checkpoint, torch.device(args.device or "cpu"))
    rows = first_rows(data.val, args.max_seq_len, ROWS)
    tokens = checkpoint["step"] * args.total_batch_size
    return dict(
        steps=checkpoint["step"],
        tokens=tokens,
        compute=tokens * plan.cost,
        flops=tokens * plan.flops_per_token,
        tokens_per_parameter=tokens / plan.counts["scaling"],
        parameters=plan.counts["total"],
        train_seconds=round(checkpoint["seconds"]),
        curve=curve(read_log(folder)),
        **score(model, rows, data.token_bytes, Schedule(**checkpoint["schedule"])),
    )


# -----------------------------------------------------------------------------
# Commands

# rows from before 2026-11-25 have the names of the time when the research scripts lay at the top
NAMES_TODAY = {"ground.py": "research.reproduction", "states.py": "research.states"}

def same_run(command, other):
    """
    Do two command lines run the same? They may spell a script as it was called then or as it is called
    today. Where the row is written (--results, --json) is no part of the run.
    """
    return script_and_flags(command) == script_and_flags(other)

def script_and_flags(command):
    """What a row's command line runs, a list of words: the script, by its name of today, and its flags."""
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--results")
    where.add_argument("--json")
    _, words = where.parse_known_args(shlex.split(command)[1:])  # the first word is python
    if words[0] == "-m":
        words = words[1:]
    script, *flags = words
    return [NAMES_TODAY.get(script, script), *flags]

@dataclass
class Run:
    """A run of a set, with one seed."""
    set: str
    name: str
    seed: int
    script: str  # train.py, research.reproduction or research.states
    flags: list

    def command(self, args, extra=()):
        """The words that a reader types behind `python`. extra: more flags."""
        flags = [*self.flags, "--seed", str(self.seed), *extra]
        if self.script == "train.py":
            # @NAME: the folder of another run of the set
            flags = [f"{args.out}/{self.set}/{word[1:]}_s{self.seed}" if word[0] == "@" else word
                     for word in flags]
            folder = ["--out", f"{args.out}/{self.set}", "--name", f"{self.name}_s{self.seed}"]
            return ["train.py", *flags, "--data", args.data, *folder, "--resume", "auto"]
        if self.script == "research.reproduction":
            return ["-m", self.script, *flags, "--results", args.results]
        return ["-m", self.script, *flags, "--json", f"{args.results}/{self.set}.jsonl"]

def make_runs(args):
    """The runs that the command line asks for, all runs of the first seed first. Raises UserError."""
    unknown = [name for name in args.sets if name not in SETS]
    if unknown:
        raise UserError(f"there is no set {unknown[0]}: choose from {', '.join(SETS)}")
    runs = []
    for seed in args.seeds:
        for set_name in args.sets or SETS:
            for name, command in SETS[set_name].items():
                if not args.only or name in args.only:
                    script, *flags = command.split()
                    runs.append(Run(set_name, name, seed, script, flags))
    if not runs:
        raise UserError(f"no run is called {' or '.join(args.only)}: see --list")
    return runs

def rows_path(args, set_name):
    return Path(args.results) / f"{set_name}.jsonl"


# -----------------------------------------------------------------------------
# Running them

class Runner:
    """Runs commands, some at a time, scores what they trained, and writes rows."""

    def __init__(self, args, extra):
        self.args = args
        self.extra = extra
        self.threads = max((os.cpu_count() or 1) // args.jobs, 1)  # of each run
        torch.set_num_threads(self.threads)
        device = extra[extra.index("--device") + 1] if "--device" in extra else "cpu"
        self.machine = machine(torch.device(device))
        self.processes = []  # all that were started
        self.failed = []  # runs
        self.stopping = False

    def stop(self, *_):
        """Handle a signal: start nothing new, and end the running processes, which save themselves."""
        self.stopping = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def run_all(self, runs):
        """Run these runs, as many at a time as there are jobs."""
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, self.stop)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            list(pool.map(self.run, runs))

    def run(self, run):
        """Run one run, unless a signal came, and say how it ended."""
        if self.stopping:
            return
        start = time.time()
        try:
            error = self.train_and_score(run)
        except UserError as e:
            error = str(e)
        if error:
            self.failed.append(run)
            outcome = error
        else:
            outcome = f"done in {(time.time() - start) / 60:.0f} min"
        print(f"{run.set} {run.name} seed {run.seed}: {outcome}", flush=True)

    def train_and_score(self, run):
        """Train, score and write the row. Returns what went wrong in words, or None. Raises UserError."""
        command = run.command(self.args, self.extra)
        folder = Path(self.args.out) / run.set / f"{run.name}_s{run.seed}"
        console = Path(f"{folder}.txt")
        exit_code = self.execute(command, console)
        if exit_code:
            return f"exit code {exit_code}, see {console}"
        if run.script != "train.py":  # the others write their rows themselves
            return None

        row = finished(folder)
        num_iterations = load_checkpoint(find_checkpoint(folder))["args"]["num_iterations"]
        if row["steps"] < num_iterations:
            return "stopped; the same command goes on"
        named = dict(set=run.set, name=run.name, seed=run.seed, command=shlex.join(["python", *command]))
        append_row(rows_path(self.args, run.set), named | self.machine | row)
        return None

    def execute(self, command, console):
        """Run `python COMMAND`, its output appended to the file `console`. Returns the exit code."""
        if command[0] == "train.py":
            command = [str(ROOT / "train.py"), *command[1:]]
        python_path = str(ROOT)  # where `python -m research.NAME` finds it
        if "PYTHONPATH" in os.environ:
            python_path += os.pathsep + os.environ["PYTHONPATH"]
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": python_path}
        console.parent.mkdir(parents=True, exist_ok=True)
        with open(console, "ab") as f:
            # a session of its own, so that Ctrl-C reaches the process through stop() alone
            process = subprocess.Popen(
                [sys.executable, *command], stdout=f, stderr=f, env=env, start_new_session=True)
            self.processes.append(process)
            return process.wait()

def make_parser():
    parser = ArgumentParser(
        description="Run what is missing of named sets of runs; one row a run in RESULTS/SET.jsonl.")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"any of {', '.join(SETS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N",
                        help="one run each; all runs of the first seed come first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the runs of these names")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time; they share the cores")
    parser.add_argument("--data", default="data", help="folder that prepare_data.py made")
    parser.add_argument("--out", default="runs/experiments", help="where run folders go")
    parser.add_argument("--results", default="research/results", help="where rows go")
    parser.add_argument("--extra", default="", metavar="FLAGS",
                        help="more flags of train.py for every run, after its own")
    parser.add_argument("--list", action="store_true", help="print every run and its command, and end")
    return parser

def main():
    args = make_parser().parse_args()
    extra = shlex.split(args.extra)
    at_least(args, jobs=1)
    runs = make_runs(args)

    # which of them have a row
    have_rows = set()
    for set_name in SETS:
        for row in read_rows(rows_path(args, set_name)):
            have_rows.add((set_name, row["name"], row["seed"]))
    missing = [run for run in runs if (run.set, run.name, run.seed) not in have_rows]

    if args.list:
        for run in runs:
            mark = "    " if run in missing else "done"
            print(f"{mark} {shlex.join(['python', *run.command(args, extra)])}")
        return

    # run the others
    if any(run.script == "train.py" for run in runs):
        open_data(args.data)
    Path(args.results).mkdir(parents=True, exist_ok=True)
    held = lock(args.out, "experiment")  # noqa: F841 (locked for as long as it is open)
    runner = Runner(args, extra)
    print(f"{len(missing)} runs to do, {len(runs) - len(missing)} done", flush=True)
    runner.run_all(missing)
    if runner.failed:
        sys.exit(1)

if __name__ == "__main__":
    run_main(main)
