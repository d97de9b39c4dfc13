"""
The experiments behind README.md: sets of training runs by name, and one row a run in results/SET.jsonl.

    python experiments.py --list                          every run: its command, and whether its row is there
    python experiments.py scaling cheaper --jobs 2        what these sets still lack, two runs at a time
    python experiments.py scaling --seeds 2 --extra="--compile --device cuda"       one more seed; more flags for the runs
    python plot.py                                        figures and tables from results/

Every run is one command line, of train.py, ground.py or states.py, that can be repeated by hand and is part of its row. A row
that is there is not run again; a run that was broken off goes on from its newest checkpoint.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench import machine
from eval_core import evaluate_bpb, first_rows, recurrent_losses
from interleave import Schedule
from prepare_data import ArgumentParser, UserError, at_least, lock, open_data, run_main
from sample import find_checkpoint, load_checkpoint, load_model
from train import make_parser, make_plan, read_log

ROWS = 256  # of the validation text: what every run is scored on
COPYING_ROWS = 128  # of them, for what takes a decoding for each part of the memory

# depth 4, width 128, context 256: what two cores can do, with the recipe that was tuned on ground.py's baseline
SIZE = "train.py --depth 4 --aspect-ratio 32 --head-dim 64 --max-seq-len 256 --window-pattern L --total-batch-size 4096 " \
       "--matrix-lr 0.04 --embedding-lr 0.2 --weight-decay 0 --grad-clip 0 --warmup-steps 0 " \
       "--eval-every 0 --eval-tokens 4096 --decode-tokens 0 --save-every 50 --keep 1"


# -----------------------------------------------------------------------------
# The sets: {set: {name: command without its seed}}, each run once a seed

def ground():
    """The authors' released run, on the same tokens by the same protocol; three seeds decide."""
    runs = {f"{lrt}_{steps}": f"ground.py --lrt {lrt} --num-iterations {steps}" for lrt, steps in (("none", 1000), ("layerwise", 1000), ("none", 2000))}
    return runs | {"none_2000_release_muon": "ground.py --lrt none --num-iterations 2000 --muon release --matrix-lr 0.02"}

def scaling():
    """Can an LRT at R tokens a parameter be read against the baseline at R and at 2R? Steps of 4096 tokens."""
    return {f"{lrt}_{steps}": f"{SIZE} --lrt {lrt} --num-iterations {steps}"
            for steps in (250, 500, 1000, 2000) for lrt in ("none", "shared", "layerwise") if steps < 2000 or lrt == "none"}

def longer():
    """
    scaling() at half the width, 0.46 M parameters in matrices and head, for 10 and 20 tokens a parameter instead of 0.8 to 6.3.
    20 read a text of 5.9 M tokens one and a half times.
    """
    size = SIZE.replace("--aspect-ratio 32 --head-dim 64", "--aspect-ratio 16 --head-dim 32")
    return {f"{lrt}_{ratio}": f"{size} --lrt {lrt} --num-iterations {112 * ratio}" for ratio in (10, 20) for lrt in ("none", "layerwise")}

def ablation(steps=500):
    """
    One change each to the layerwise LRT of scaling(), where memory gains enough to tell them apart: source layer 2 of 0 .. 3,
    injection both, interleaved, S = 2, mean over the passes. S = 1 is refine_1.
    """
    changes = {
        "inject_kv": "--inject kv", "inject_residual": "--inject residual",
        "source_0": "--source-layer 0", "source_1": "--source-layer 1", "source_3": "--source-layer 3",
        "subsets_4": "--subsets 4", "subsets_8": "--subsets 8",
        "kv_refresh": "--kv-refresh",
        "refine_1": "--schedule refine --refinements 1", "refine_3": "--schedule refine --refinements 3",
        "chunked": "--schedule chunked --chunk 64",
        "loss_memory_passes": "--loss-weights 0 1 1", "refine_1_loss_last": "--schedule refine --refinements 1 --loss-weights 0 1",
    }
    return {name: f"{SIZE} --lrt layerwise --num-iterations {steps} {change}" for name, change in changes.items()}

def tuning(steps=500):
    """
    Is it ours, where the shared LRT stays behind? What is new in it, trained otherwise (scalars are b and c, at a rate of
    0.5), and the choices that its one projection may depend on.
    """
    changes = {"memory_lr_0.02": "--memory-lr 0.02", "memory_lr_0.08": "--memory-lr 0.08", "memory_init_0": "--memory-init 0",
               "memory_init_1": "--memory-init 1", "scalar_lr_0.1": "--scalar-lr 0.1", "inject_kv": "--inject kv", "source_3": "--source-layer 3",
               "loss_memory_passes": "--loss-weights 0 1 1"}
    return {name: f"{SIZE} --lrt shared --num-iterations {steps} {change}" for name, change in changes.items()}

def cheaper(steps=1000):
    """
    Plain passes in some of the steps, the first ones or any at random; and passes that run forward only: the first of an
    interleaved step, and all but the last of a step of K refinements, which then need no layer above the source; or with a
    gradient, without the loss. deepen: with one refinement more in the last quarter of the steps, at the FLOPs of half, as
    many and twice as many steps of the baseline; of twice as many are the other longer runs, too. shared_kv: the same with
    one projection for all layers, into keys and values.
    """
    def base(n=steps, lrt="layerwise"):
        return f"{SIZE} --lrt {lrt} --num-iterations {n}"
    def refine(K, n=steps, lrt="layerwise"):
        return f"{base(n, lrt)} --schedule refine --refinements {K} --forward-passes {K}"
    return {f"last_{100 - start}": f"{base()} --memory-start {start / 100:g}" for start in (75, 50, 25)} \
        | {f"mixed_{share}": f"{base()} --memory-share {share / 100:g}" for share in (25, 50)} \
        | {"forward_init": f"{base()} --forward-passes 1", f"forward_init_{3 * steps // 2}": f"{base(3 * steps // 2)} --forward-passes 1"} \
        | {f"forward_refine_{K}": refine(K) for K in (1, 2)} | {f"forward_refine_1_{8 * steps // 5}": refine(1, 8 * steps // 5)} \
        | {f"deepen_{n}": f"{refine(1, n)} --deepen 0.25" for n in (39 * steps // 100, 39 * steps // 50, 39 * steps // 25)} \
        | {f"deepen_shared_kv_{n}": f"{refine(1, n, 'shared')} --deepen 0.25 --inject kv" for n in (81 * steps // 100, 81 * steps // 50)} \
        | {"refine_1_loss_last": f"{base()} --schedule refine --refinements 1 --loss-weights 0 1"}

def states():
    """State tracking beyond the lengths of training."""
    variants = {"none": "", "recurrent": "--arch recurrent", "layerwise_sequential": "--lrt layerwise --schedule sequential"} \
        | {f"layerwise_interleaved{S}": f"--lrt layerwise --subsets {S}" for S in (2, 4, 8)} \
        | {f"layerwise_refine{K}": f"--lrt layerwise --schedule refine --refinements {K}" for K in (1, 3)}
    return {f"{task}_{name}": f"states.py --task {task} --num-iterations {steps} {flags}".strip()
            for task, steps in (("parity", 300), ("s5", 800)) for name, flags in variants.items()}

SETS = {"ground": ground(), "scaling": scaling(), "longer": longer(), "cheaper": cheaper(), "ablation": ablation(), "tuning": tuning(), "states": states()}


# -----------------------------------------------------------------------------
# From a run to its row

@torch.no_grad()
def learned(model, idx, targets):
    """
    What training made of the memory's path, by layer: a, b, c of equation (1); the mean gates of equation (2) over tokens
    and heads while decoding idx (B, T) with the exact recurrence: local, memory, token (those that the model has).
    """
    gates = {}
    def keep(layer):
        def hook(module, args, out):
            gates[layer] = 2 * torch.sigmoid(out.float()).unflatten(-1, (-1, model.config.n_kv_head)).mean((0, 1, 3))
        return hook
    hooks = [block.attn.gate.register_forward_hook(keep(layer)) for layer, block in enumerate(model.h) if block.attn.gate is not None]
    recurrent_losses(model, idx, targets)  # what is kept is of the last pass: over all positions, unless prefill had to end token by token
    for hook in hooks:
        hook.remove()
    names = ["local", "memory"] * model.config.kv_memory + ["token"]
    scalars = dict(a=model.resid_lambdas, b=model.x0_lambdas, c=model.mem_lambdas)
    return {name: x.tolist() for name, x in scalars.items() if x is not None} \
        | {"gates": {layer: dict(zip(names, x.tolist())) for layer, x in gates.items()}}

def repeated(idx, targets):
    """Where the pair (idx, target) stood in the row before, and the target can be copied from there, as induction heads do: (B, T) bool."""
    pairs = idx * (targets.max() + 1) + targets
    return (pairs[:, :, None] == pairs[:, None, :]).tril(-1).any(-1)

@torch.no_grad()
def copying(model, rows, batch_size=16):
    """
    Mean nats of a token of rows (N, T+1), decoding with the exact recurrence, of pairs that are repeated() and of new ones;
    the share of the former; and the same two means without each part of the memory's path: what it adds to the keys (a
    layer at a time where each has its own projection), to the values, to the residual stream.
    """
    batches = [(batch[:, :-1], batch[:, 1:]) for batch in rows.to(model.wte.weight.device).split(batch_size)]
    again = torch.cat([repeated(*batch) for batch in batches])
    def means():
        nats = torch.cat([recurrent_losses(model, *batch) for batch in batches])
        return dict(repeated=nats[again].mean().item(), new=nats[~again].mean().item())
    parts = {f"keys {layer}" if len(model.mem_k) > 1 else "keys": [k.weight] for layer, k in enumerate(model.mem_k)}
    if model.config.kv_memory:
        parts["values"] = [v.weight for v in model.mem_v]
    if model.config.residual_memory:
        parts["residual"] = [model.mem_lambdas]
    found = means() | dict(share=again.float().mean().item(), without={})
    for name, weights in parts.items():
        kept = [w.clone() for w in weights]
        for w in weights:
            w.zero_()
        found["without"][name] = means()
        for w, k in zip(weights, kept):
            w.copy_(k)
    return found

def score(model, rows, token_bytes, schedule, buckets=16):
    """
    Rows (N, T+1) in parallel and with the exact recurrence: `bpb` as evaluate_bpb gives it, `by_position` the same in
    `buckets` equal stretches of the context, `copying` as above, and what was learned.
    """
    bpb, at = evaluate_bpb(model, rows, token_bytes, schedule, 16, decode=True)
    stretches = {name: x.reshape(buckets, -1).sum(1) for name, x in at.items()}
    n_bytes = stretches.pop("bytes")
    few = rows[:16].to(model.wte.weight.device)
    return dict(bpb=bpb, by_position={name: (x / n_bytes).round(4).tolist() for name, x in stretches.items()}, copying=copying(model, rows[:COPYING_ROWS]),
                learned=learned(model, few[:, :-1], few[:, 1:]))

def curve(log, points=40):
    """
    Training loss from a log's rows, averaged over stretches of steps: [first step, the first pass, the mean of the passes
    with memory], None where there was none, or no loss.
    """
    def mean(x):
        x = np.array(x, dtype=float)  # None becomes NaN
        return x[np.isfinite(x)].mean() if np.isfinite(x).any() else None
    rows = [(x["step"], x["passes"][0], mean(x["passes"][1:])) for x in log if x["kind"] == "train" and x["passes"]]
    parts = np.array_split(np.array(rows, dtype=object), min(points, len(rows))) if rows else []
    return [[part[0, 0], *(x if x is None else round(x, 4) for x in (mean(part[:, 1]), mean(part[:, 2])))] for part in parts]

def finished(folder):
    """The row of a finished run of train.py. compute: baseline-equivalent tokens, as Schedule.cost() counts; flops: all of them."""
    checkpoint = load_checkpoint(find_checkpoint(folder))
    args, data = checkpoint["args"], open_data(checkpoint["args"]["data"], verify=False)
    plan, T, steps = make_plan(Namespace(**vars(make_parser().parse_args([])) | args), data.meta["vocab_size"], 1, torch.float32), args["max_seq_len"], checkpoint["step"]
    model = load_model(checkpoint, torch.device(args["device"] or "cpu"))
    tokens, counts = steps * args["total_batch_size"], plan.counts
    return dict(steps=steps, tokens=tokens, compute=tokens * plan.cost, flops=tokens * plan.flops_per_token, tokens_per_parameter=tokens / counts["scaling"],
                parameters=counts["total"], train_seconds=round(checkpoint["seconds"]), curve=curve(read_log(Path(folder))),
                **score(model, first_rows(data.val, T, ROWS), data.token_bytes, Schedule(**checkpoint["schedule"])))


# -----------------------------------------------------------------------------
# Running them

@dataclass
class Run:
    set: str
    name: str
    seed: int
    words: list  # script and flags

    def command(self, args, extra=()):
        """What a reader would type."""
        script, *flags = [*self.words, "--seed", str(self.seed), *extra]
        where = {"train.py": ["--data", args.data, "--out", f"{args.out}/{self.set}", "--name", f"{self.name}_s{self.seed}", "--resume", "auto"],
                 "ground.py": ["--results", args.results], "states.py": ["--json", f"{args.results}/states.jsonl"]}
        return [script, *flags, *where[script]]

def read_rows(path):
    """The rows of a file of JSON lines; [] where there is none, and without what a crash cut short. Raises UserError."""
    try:
        lines, rows = Path(path).read_text("utf-8", "replace").splitlines(), []
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}")
    for line in lines:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows

def append_row(path, row):
    """Add a line to a file of JSON lines that other processes may be adding to: all of it or nothing. Raises UserError."""
    try:
        with open(path, "a+b", buffering=0) as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            end = f.seek(0, os.SEEK_END)
            cut = end > 0 and os.pread(f.fileno(), 1, end - 1) != b"\n"  # a line that a crash left without its end
            line = b"\n" * cut + json.dumps(row).encode() + b"\n"
            if f.write(line) < len(line):
                f.truncate(end)
                raise UserError(f"cannot write {path}: the disk is full")
            os.fsync(f.fileno())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}")

def run(one, args, extra, where, running):
    """Train, score and write the row. Returns an error in words, or None."""
    command, folder = one.command(args, extra), Path(args.out) / one.set / f"{one.name}_s{one.seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    with open(f"{folder}.txt", "ab") as console:
        process = subprocess.Popen([sys.executable, str(Path(__file__).parent / command[0]), *command[1:]], stdout=console, stderr=console,
                                   env=os.environ | {"OMP_NUM_THREADS": str(threads)}, start_new_session=True)  # Ctrl-C reaches it through stop() alone
        running.append(process)
        code = process.wait()
    if code or command[0] != "train.py":  # the others write their own row
        return f"exit code {code}, see {folder}.txt" if code else None
    row = finished(folder)
    if row["steps"] < load_checkpoint(find_checkpoint(folder))["args"]["num_iterations"]:
        return "stopped; the same command goes on"
    append_row(Path(args.results) / f"{one.set}.jsonl", dict(set=one.set, name=one.name, seed=one.seed, command=shlex.join(["python", *command]), **where) | row)

def main():
    parser = ArgumentParser(description="Run what is missing of named sets of training runs; one row a run in RESULTS/SET.jsonl.")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"any of {', '.join(SETS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="one run each; all runs of the first seed come first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only the runs of these names")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time; they share the cores")
    parser.add_argument("--data", default="data", help="folder that prepare_data.py made")
    parser.add_argument("--out", default="runs/experiments", help="where run folders go")
    parser.add_argument("--results", default="results", help="where rows go")
    parser.add_argument("--extra", default="", metavar="FLAGS", help="more flags of train.py for every run, after its own")
    parser.add_argument("--list", action="store_true", help="print every run and its command, and end")
    args = parser.parse_args()
    extra = shlex.split(args.extra)
    at_least(args, jobs=1)
    unknown = [name for name in args.sets if name not in SETS]
    if unknown:
        raise UserError(f"there is no set {unknown[0]}: choose from {', '.join(SETS)}")
    done = {name: {(row["name"], row["seed"]) for row in read_rows(Path(args.results) / f"{name}.jsonl")} for name in SETS}
    runs = [Run(set_name, name, seed, command.split()) for seed in args.seeds for set_name in args.sets or SETS for name, command in SETS[set_name].items()
            if not args.only or name in args.only]
    if not runs:
        raise UserError(f"no run is called {' or '.join(args.only)}: see --list")
    if args.list:
        for one in runs:
            print(f"{'done' if (one.name, one.seed) in done[one.set] else '    '} {shlex.join(['python', *one.command(args, extra)])}")
        return
    if any(one.words[0] == "train.py" for one in runs):
        open_data(args.data)
    Path(args.results).mkdir(parents=True, exist_ok=True)
    held = lock(args.out, "experiment")  # noqa: F841
    todo, running, failed, stopped = [one for one in runs if (one.name, one.seed) not in done[one.set]], [], [], []
    torch.set_num_threads(max((os.cpu_count() or 1) // args.jobs, 1))
    where = machine(torch.device(extra[extra.index("--device") + 1] if "--device" in extra else "cpu"))

    def stop(*_):
        """Nothing new is started; what runs saves itself."""
        stopped.append(True)
        for process in running:
            if process.poll() is None:
                process.terminate()
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, stop)

    def work(one):
        if stopped:
            return
        t0 = time.time()
        try:
            error = run(one, args, extra, where, running)
        except UserError as e:
            error = str(e)
        failed.extend([one] * bool(error))
        print(f"{one.set} {one.name} seed {one.seed}: {error or f'done in {(time.time() - t0) / 60:.0f} min'}", flush=True)

    print(f"{len(todo)} runs to do, {len(runs) - len(todo)} done", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))
    if failed:
        sys.exit(1)

if __name__ == "__main__":
    run_main(main)
