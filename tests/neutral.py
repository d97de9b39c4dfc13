"""
Proves that a change which should change nothing changes nothing, to the last bit.

    python tests/neutral.py record CHECKOUT out.json          before the change, and after it
    python tests/neutral.py compare before.json after.json    exit code 1 if they differ

A recording runs the scripts of the folder CHECKOUT as a user does, on models of two layers, and
keeps what they computed: prepared data, logs, checkpoints, plans, samples, scores, refusals. That
takes about four minutes on two cores. Both recordings must come from one machine and one version of
torch: others round differently. `compare --ignore PATTERN` passes over what is meant to change.

Nothing of the checkout is imported: its modules may be renamed, only the command lines stay. What
needs a GPU or a compiler (bfloat16, --compile, CUDA graphs) is not recorded.
"""

import argparse
import hashlib
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import torch

CORE = Path(__file__).resolve().parents[2] / "shared/core"
CHECKPOINTS = "ckpt_???????.pt"  # without the shares of other processes
CHANGES = ("dt", "seconds", "run_id", "save_id", "commit", "version", "shares")  # from run to run
MODULES = ("argparse", "ast", "calendar", "configparser", "csv", "enum")  # their source is the text

# one step of warm-up: the default is so long that five steps would hardly move a weight
TINY = """--data corpus --depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 32
    --window-pattern SL --total-batch-size 256 --num-iterations 5 --warmup-steps 1 --eval-every 2
    --eval-tokens 512 --decode-tokens 128 --device cpu"""

# train.py's flags after those of TINY, by the name of the run
TRAIN = {
    "none": "--lrt none", "shared": "--lrt shared", "layerwise": "--lrt layerwise",
    "kv": "--inject kv", "residual": "--inject residual", "source-layer-0": "--source-layer 0",
    "grouped": "--n-kv-head 1", "full-window": "--window-pattern L",
    "grouped-layerwise": "--n-kv-head 1 --lrt layerwise --max-seq-len 64",
    "depth-4": "--depth 4 --aspect-ratio 8 --window-pattern SSSL --max-seq-len 64",
    "alternate": "--value-embeds alternate", "no-value-embeds": "--value-embeds none",
    "subsets-1": "--subsets 1", "subsets-3": "--subsets 3",
    "subsets-99": "--subsets 99 --max-seq-len 31 --total-batch-size 248",
    "kv-refresh": "--subsets 3 --kv-refresh",
    "kv-refresh-kv": "--kv-refresh --inject kv --lrt layerwise",
    "detach": "--detach", "loss-weights": "--loss-weights 0 1 2",
    "draft-subsets": "--schedule draft --subsets 2",
    "draft-layerwise": "--schedule draft --subsets 3 --drafts 2 --lrt layerwise --source-layer 0",
    "refine": "--schedule refine --refinements 2",
    "refine-weights": "--schedule refine --refinements 2 --detach --loss-weights 1 1 2",
    "drafts": "--schedule draft --drafts 2 --source-layer 0",
    "draft": "--schedule draft --lrt layerwise",
    "pass-mix": "--schedule draft --first-memory embedding --pass-mix 1 1 1 --inject input",
    "chunked": "--schedule chunked --chunk 7", "sequential": "--schedule sequential",
    "checkpointing": "--activation-checkpointing", "micro-batches": "--device-batch-size 2",
    "optimization": "--grad-clip 0 --warmup-steps 0 --final-lr-frac 0.1 --weight-decay 0.1",
    "default-warmup": "--warmup-steps 40 --seed 3", "skip": "--on-nonfinite skip",
    "memory-rates": "--memory-lr 0.05 --memory-init 0.3 --scalar-lr 0.2",
    "rates": "--matrix-lr 0.03 --embedding-lr 0.2 --head-lr 0.01 --gate-lr 0.05",
    "two-epochs": "--data small --total-batch-size 2048 --num-iterations 18 --eval-every 0",
    "recurrent": "--arch recurrent --window-pattern L",
    "recurrent-window": "--arch recurrent --n-kv-head 1 --value-embeds alternate",
    # more positions than recurrent.py walks at once
    "recurrent-long": "--arch recurrent --max-seq-len 160 --total-batch-size 320",
}
TRAIN_WITH_CORE = "--core-every 3 --core-bundle core --core-max-per-task 2"

# saved at half, and resumed from there: flags, and how many processes
RESUMED = {
    "two-processes": ("--lrt shared --device-batch-size 2", 2),
    "two-processes-layerwise": ("--lrt layerwise", 2),
    "one-process": ("--lrt shared", 1),
}

# plans: there is no folder `data`, so these take the default vocabulary
DRY_RUN = [
    "--depth 20 --lrt shared",
    "--depth 12 --lrt layerwise --schedule draft",
    "--depth 4 --arch recurrent",
    "--depth 4 --activation-checkpointing --n-kv-head 1 --target-flops 1e17",
]

# a run, and sample.py's flags
SAMPLE = [
    "shared --prompt 'def ' --seed 3",
    "shared --prompt 'def ' --seed 3 --no-memory",
    "shared --prompt 'def ' --seed 3 --stop e",
    "shared --prompt 'import os' --seed 4 --top-k 5",
    "shared --prompt 'def ' --top-k 0 --top-p 0.7",
    "shared --prompt 'class ' --seed 5 --num-samples 2 --temperature 1.2",
    "shared --prompt 'return' --temperature 0",
    "shared --prompt-file prompts.txt --num-samples 2 --out samples-1.jsonl",
    "layerwise --seed 1",
    "none --seed 3",
    "recurrent-window --prompt 'def ' --seed 3",
    "recurrent-window --prompt-file prompts.txt --num-samples 2 --out samples-2.jsonl",
]

# a run, and eval_core.py's flags; a batch of 3 leaves a smaller one at the end. The prompts of
# --eval sample are longer than the context of most runs
BPB = "--rows 8 --decode-rows 4 --referee"
EVAL = [f"{run} {BPB}" for run in ("shared", "layerwise", "none", "draft", "recurrent-window")] + [
    f"shared {BPB} --batch-size 3 --split val",
    f"depth-4 {BPB} --eval bpb,sample",
    f"recurrent-long {BPB} --eval bpb,sample",
    "depth-4 --eval sample --no-memory",
    "grouped-layerwise --eval sample",
]
# Multiple choice, schema and language modeling; many examples, as only their count is recorded.
# No run with recurrent layers: --eval core fails on those
TASKS = "--eval core --bundle core --max-per-task 40 --tasks arc_easy,copa,winograd,lambada_openai"
EVAL_WITH_CORE = [f"shared {TASKS}", f"shared {TASKS} --no-memory", f"grouped-layerwise {TASKS}"]

REFUSED = [
    "train.py --data corpus --depth 0",
    "train.py --data corpus --depth 2 --source-layer 2",
    "train.py --data corpus --max-seq-len 32 --total-batch-size 500",
    "train.py --data corpus --max-seq-len 32 --schedule chunked --chunk 32",
    "train.py --data corpus --loss-weights 1 2",
    "train.py --data nowhere --lrt both",
    "train.py --data nowhere",
    "sample.py --top-p 0",
    "eval_core.py --checkpoint nowhere",
    "prepare_data.py texts --vocab-size 10",
]


def flatten(value, name):
    """What a nested value holds, a dict path -> text: other text where a single bit differs."""
    if isinstance(value, torch.Tensor):
        kind = f"{value.dtype} {tuple(value.shape)}"
        data = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return {name: f"{kind} {hashlib.sha256(kind.encode() + data).hexdigest()}"}
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value)) or value
    if not isinstance(value, dict) or not value:
        return {name: repr(value)}
    figures = {}
    for key, inner in value.items():
        figures |= flatten(inner, f"{name}/{key}")
    return figures


class Recorder:
    """Runs a checkout's scripts in a folder of its own. runs: for each, a dict of its figures."""

    def __init__(self, checkout, folder):
        self.checkout, self.folder, self.runs = checkout.resolve(), folder, {}

    def call(self, name, script, flags, processes=1):
        """Run a script: its exit code and what it prints. Returns the figures, to be added to."""
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
        command = [sys.executable, *(torchrun if processes > 1 else []), self.checkout / script]
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads may sum in another order
        done = subprocess.run(command + shlex.split(flags), cwd=self.folder, env=env,
                              capture_output=True, timeout=600)
        figures = self.runs[name] = {"exit code": str(done.returncode)}
        if done.returncode:  # the last line alone: those of a traceback name the checkout
            figures["stderr"] = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        said = done.stdout.decode("utf-8", "backslashreplace")
        said = re.sub(r" \| dt: .*", "", said)  # how long a step took, and what follows from it
        said = re.sub(r"(?m)^saved .*\n", "", said)  # when a checkpoint is written, in the background
        figures |= flatten(said.split("\n"), "stdout")
        return figures

    def prepare(self, source, out, flags):
        """Prepare data: every byte of it."""
        figures = self.call(f"prepare {out}", "prepare_data.py", f"{source} --out {out} {flags}")
        for path in sorted((self.folder / out).glob("[!.]*")):
            figures[f"file/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()

    def train(self, what, name, flags, processes=1):
        """Train the run `name`: its log and its last checkpoint, but for times and what is drawn anew."""
        figures = self.call(what, "train.py", flags, processes)
        folder = self.folder / "runs" / name
        figures |= flatten(sorted(path.name for path in folder.glob("[!.]*")), "files")
        for log in folder.glob("log.jsonl"):
            for i, row in enumerate(map(json.loads, log.read_text().splitlines())):
                figures |= flatten({k: v for k, v in row.items() if k not in CHANGES}, f"log/{i}")
        for path in sorted(folder.glob(CHECKPOINTS))[-1:]:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for share in sorted(folder.glob(f"{path.stem}.share_*.pt")):  # of the other processes
                parts = torch.load(share, map_location="cpu", weights_only=True)["optimizers"]
                for whole, part in zip(state["optimizers"], parts, strict=True):
                    whole["state"] |= part["state"]
            figures |= flatten({k: v for k, v in state.items() if k not in CHANGES}, "checkpoint")

    def train_and_resume(self, name, flags, processes):
        """Six steps, and again from the third one on, as if the run had been killed after it."""
        flags = f"{TINY} --name {name} --num-iterations 6 --save-every 3 {flags}"
        self.train(f"train {name}", name, flags, processes)
        folder = self.folder / "runs" / name
        for path in sorted(folder.glob(CHECKPOINTS))[1:]:
            for file in folder.glob(f"{path.stem}.*"):
                file.unlink()
        self.train(f"resume {name}", name, f"--resume runs/{name}", processes)

    def use(self, script, line):
        """Sample from a run, or score it: what is printed, and the file that a last flag names."""
        figures = self.call(f"{script} {line}", script, f"--device cpu --checkpoint runs/{line}")
        out = self.folder / shlex.split(line)[-1]
        if out.suffix == ".json" and out.exists():
            figures |= flatten(json.loads(out.read_text("utf-8")), "json")
        elif out.is_file():
            figures |= flatten(out.read_text("utf-8").split("\n"), "out")

    def write_texts(self):
        """What there is to prepare and to continue."""
        sources = [Path(importlib.import_module(name).__file__).read_text() for name in MODULES]
        rows = [json.dumps({"text": x}) + "\n" for text in sources for x in text.split("\n\n\n")]
        (self.folder / "corpus.jsonl").write_text("".join(rows))
        (self.folder / "texts").mkdir()
        (self.folder / "texts/a.txt").write_text(sources[2][:6000])
        (self.folder / "texts/b.jsonl").write_text("".join(rows[:9]))
        (self.folder / "prompts.txt").write_text("def \nimport os, sys\nclass A:\n")

    def record(self, core):
        """All runs, two at a time. core: the folder of the CORE bundle, or None."""
        self.write_texts()
        if core:  # checkpoints keep its path: one that says nothing of this machine
            (self.folder / "core").symlink_to(core.resolve())
        train = TRAIN | {"core": TRAIN_WITH_CORE} if core else TRAIN
        score = EVAL + EVAL_WITH_CORE if core else EVAL
        data = [(self.prepare, "corpus.jsonl", "corpus", "--vocab-size 400 --shard-tokens 20000"),
                (self.prepare, "texts", "small", "--vocab-size 300")]
        # the longest first
        runs = [(self.train_and_resume, name, *how) for name, how in RESUMED.items()]
        runs += [(self.call, f"plan {flags}", "train.py", f"--dry-run --device cpu {flags}")
                 for flags in DRY_RUN]
        runs += [(self.train, f"train {name}", name, f"{TINY} --name {name} {flags}")
                 for name, flags in train.items()]
        uses = [(self.use, "eval_core.py", f"{line} --json scores-{i}.json")
                for i, line in enumerate(score)]
        uses += [(self.use, "sample.py", line) for line in SAMPLE]
        uses += [(self.call, f"refused {line}", *line.split(maxsplit=1)) for line in REFUSED]
        with ThreadPoolExecutor(2) as pool:
            for stage in (data, runs, uses):  # each needs what the one before it wrote
                for job in [pool.submit(*what) for what in stage]:
                    job.result()  # raises what the job raised


def record(args):
    """The command `record`: the figures to args.out; 1 if a run failed that should not."""
    began, core = time.time(), args.core if (args.core / "core.yaml").is_file() else None
    if core is None:
        print(f"no CORE bundle in {args.core}, see --core: CORE is left out")
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(args.checkout, Path(folder))
        recorder.record(core)
    # a difference here comes first and explains all others
    runs = {"machine": {"python": platform.python_version(), "torch": torch.__version__,
                        "processor": torch.backends.cpu.get_cpu_capability()}}
    runs |= sorted(recorder.runs.items())
    args.out.write_text(json.dumps(runs, indent=1))
    failed = [name for name in runs if "stderr" in runs[name] and not name.startswith("refused")]
    for name in failed:
        print(f"{name}: {runs[name]['stderr']}")
    n = sum(map(len, runs.values()))
    print(f"{n} figures of {len(runs)} runs in {time.time() - began:.0f} s: {args.out}")
    return 1 if failed else 0


def read(path, ignore):
    """The figures of a recording by their full names, but for those that match a pattern."""
    figures = {}
    for run, of_run in json.loads(path.read_text()).items():
        figures |= {f"{run}/{name}": text for name, text in of_run.items()}
    return {name: text for name, text in figures.items()
            if not any(fnmatchcase(name, pattern) for pattern in ignore)}


def compare(args):
    """The command `compare`: every difference on a line; 1 if there is one."""
    before, after = read(args.before, args.ignore), read(args.after, args.ignore)
    names = before | after
    different = [name for name in names if before.get(name) != after.get(name)]
    for name in different:
        print(f"{name}: {before.get(name, 'nothing')} -> {after.get(name, 'nothing')}")
    runs = {name.partition("/")[0] for name in names}
    if different:
        runs_different = {name.partition("/")[0] for name in different}
        print(f"{len(different)} of {len(names)} figures differ, in {len(runs_different)} runs")
        return 1
    print(f"{len(names)} figures of {len(runs)} runs are the same, to the last bit")
    return 0


def main():
    parser = argparse.ArgumentParser(description="Record what a checkout computes, and compare.")
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("record", help="run a checkout, write what it computed")
    p.add_argument("checkout", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--core", type=Path, default=CORE, help="the CORE bundle (%(default)s)")
    p.set_defaults(command=record)
    p = commands.add_parser("compare", help="print what differs between two recordings")
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--ignore", metavar="PATTERN", action="append", default=[],
                   help="pass over these figures, as in '*/config/arch'; may be repeated")
    p.set_defaults(command=compare)
    args = parser.parse_args()
    sys.exit(args.command(args))


if __name__ == "__main__":
    main()
