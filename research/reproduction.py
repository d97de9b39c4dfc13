"""
The reproduction of a run of the authors' released code: our code on the same tokens, windows and protocol,
compared with its result.

    python -m research.reproduction --lrt none --num-iterations 1000     and 2000; --lrt layerwise; --seed
    0, 1, 2
    python -m research.reproduction --recipe nanochat

../shared/reference has the tokens, the protocol and the results of the released code and of nanochat's:
depth 4, width 128, context 256, random windows of the tokens, no weight decay of the matrices or clipping,
memory from the last layer. Model, training step and optimizers are those of train.py, with train.py's flags;
what was tuned is in TUNED. Each run adds a row to research/results/reproduction.jsonl.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common import UserError, append_row, at_least, machine, read_rows, run_main, write_atomic
from dataset import first_rows
from flags import make_parser
from interleave import TrainStep
from optim import make_optimizers, set_learning_rates
from plan import make_config, make_schedule
from recipes import make_optimizer_config
from recurrent import build_model
from research.experiments import curve, same_run, score

# merged BPB on one seed of the LRT release and of nanochat, by --recipe, --lrt and --num-iterations
REFERENCE = {
    ("paper", "none", 1000): 1.7148,
    ("paper", "none", 2000): 1.6365,
    ("paper", "layerwise", 400): 1.8325,
    ("paper", "layerwise", 1000): 1.6839,
    ("nanochat", "none", 1000): 1.7128,
}
PROTOCOL = dict(
    depth=4, aspect_ratio=32, head_dim=64, max_seq_len=256, window_pattern="L", source_layer=3,
    total_batch_size=4096, num_iterations=1000, weight_decay=0.0, grad_clip=0.0,
)
PAPER = dict(embedding_lr=0.2, warmup_steps=0)  # with --recipe paper
TUNED = dict(matrix_lr=0.04)  # as well; the release has 0.02, with another variant of Muon

SCORED_ROWS = 192  # of the validation tokens
SAVE_EVERY = 200  # steps

# what the released code's Muon has and torch's lacks (see optim.Muon), to see what that is worth
RELEASE_MUON = dict(polar_express=True, beta2=0.95)


# -----------------------------------------------------------------------------
# The job: its tokens, and the state of an unfinished run

def load(folder):
    """Training and validation tokens, and the bytes of each token. Raises UserError."""
    try:
        return [np.load(Path(folder) / f"{name}.npy") for name in ("train", "val", "token_bytes")]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the reference job in {folder} ({e}): "
                        "give its folder with --reference") from e

@dataclasses.dataclass
class State:
    """Where training is."""
    step: int = 0  # steps done
    log: list = dataclasses.field(default_factory=list)  # a row a step, see experiments.curve()
    seconds: float = 0.0  # over all starts

def save(path, command, model, optimizers, state):
    """Write the state of an unfinished run, and the command that it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = dict(
        command=command,
        model=model.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in optimizers],
        **dataclasses.asdict(state),
    )
    write_atomic(path, lambda f: torch.save(saved, f))

def resume(path, command, model, optimizers):
    """
    Load what save() wrote for this command into model and optimizers. Returns the State, a new one if
    none.
    """
    if not path.exists():
        return State()
    saved = torch.load(path, weights_only=True)
    if not same_run(saved["command"], command):
        return State()
    model.load_state_dict(saved["model"])
    for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return State(saved["step"], saved["log"], saved["seconds"])

# -----------------------------------------------------------------------------
# The command

def parse_args():
    """train.py's flags, with the protocol as their defaults, and a few more."""
    parser = make_parser()
    parser.add_argument("--reference", default="../shared/reference",
                        help="folder with train.npy, val.npy and token_bytes.npy")
    parser.add_argument("--muon", choices=["torch", "release"], default="torch",
                        help="release: its variant of Muon, for the gates as well")
    parser.add_argument("--results", default="research/results", help="where reproduction.jsonl is")
    parser.set_defaults(**PROTOCOL)
    args = parser.parse_args()
    if args.recipe == "paper":
        parser.set_defaults(**PAPER, **TUNED)
        args = parser.parse_args()
    elif args.muon == "release":
        raise UserError(f"--muon release goes with --recipe paper, not with {args.recipe}")
    at_least(args, depth=1, num_iterations=1, seed=0, matrix_lr=0)
    if args.lrt is None:
        args.lrt = "none"
    return args

def setup_training(args, vocab_size):
    """The model, its schedule, the training step, the optimizers and their config. Raises UserError."""
    torch.manual_seed(args.seed)
    model = build_model(make_config(args, vocab_size))
    schedule = make_schedule(args)
    train_step = TrainStep(model, schedule)
    if args.compile:
        train_step = torch.compile(train_step, dynamic=False)

    config = make_optimizer_config(args)
    if args.muon == "release":
        config = dataclasses.replace(config, gate_lr=None, muon_options=RELEASE_MUON)
    optimizers = make_optimizers(model, config)
    return model, schedule, train_step, optimizers, config

def main():
    args = parse_args()
    command = shlex.join(["python", "-m", "research.reproduction", *sys.argv[1:]])
    results = Path(args.results) / "reproduction.jsonl"
    if any(same_run(row["command"], command) for row in read_rows(results)):
        print(f"{results} has a row of {command}")
        return
    name = f"{args.lrt}_{args.num_iterations}"
    if args.recipe != "paper":
        name += f"_{args.recipe}"
    if args.muon == "release":
        name += "_release_muon"

    tokens, val, token_bytes = load(args.reference)
    torch.set_num_threads(1)  # as the released code ran; so the sums are the same on any machine of this kind
    model, schedule, train_step, optimizers, config = setup_training(args, len(token_bytes))

    # a new run, or an unfinished one of the same command
    unfinished = Path(args.out) / "reproduction" / f"{name}_s{args.seed}.pt"
    state = resume(unfinished, command, model, optimizers)
    first = state.step
    began = time.time() - state.seconds

    # train on random windows of T+1 tokens
    T, num_iterations = args.max_seq_len, args.num_iterations
    windows_per_step = args.total_batch_size // T
    rng = np.random.default_rng(args.seed)
    for step in range(num_iterations):
        starts = rng.integers(0, len(tokens) - T - 1, windows_per_step)
        if step < first:  # trained on before the run was interrupted
            continue
        state.seconds = time.time() - began
        if step > first and step % SAVE_EVERY == 0:
            save(unfinished, command, model, optimizers, state)

        windows = np.stack([tokens[i:i + T + 1].astype(np.int64) for i in starts])
        batch = torch.from_numpy(windows)
        set_learning_rates(optimizers, step, num_iterations, config)
        loss, passes = train_step(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        state.step = step + 1
        state.log.append(dict(kind="train", step=step, passes=passes.tolist()))
        if step % 50 == 0:
            progress = f"step {step:05d}/{num_iterations:05d} | loss: {loss.item():.4f}"
            print(f"{progress} | {time.time() - began:.0f} s", flush=True)
    state.seconds = time.time() - began

    # score the model and write the row
    tokens_seen = num_iterations * windows_per_step * T
    row = dict(
        set="reproduction",
        name=name,
        seed=args.seed,
        command=command,
        **machine(torch.device("cpu")),
        steps=num_iterations,
        tokens=tokens_seen,
        compute=tokens_seen * schedule.cost(model, T),
        train_seconds=round(state.seconds),
        release=REFERENCE.get((args.recipe, args.lrt, num_iterations)),
        curve=curve(state.log),
        **score(model, first_rows([val], T, SCORED_ROWS), token_bytes, schedule),
    )
    results.parent.mkdir(parents=True, exist_ok=True)
    append_row(results, row)
    unfinished.unlink(missing_ok=True)
    bpb = ", ".join(f"{key} {value:.4f}" for key, value in row["bpb"].items())
    print(f"{name} seed {args.seed}: BPB {bpb}; the reference: {row['release']}")

if __name__ == "__main__":
    run_main(main)
