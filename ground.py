"""
The ground under every comparison: the authors' released code on a small, exactly repeatable job, and ours on the same job.

    python ground.py --lrt none --num-iterations 1000            and 2000; --lrt layerwise; --seed 0, 1, 2

../shared/reference holds the tokens, the protocol and the release's results: depth 4, width 128, context 256, random windows
of the tokens, no warm-up, decay or clipping, memory from the last layer. This is train.py's model, step and optimizers with
train.py's flags, under that protocol; what was tuned is in OURS. Each run adds a row to results/ground.jsonl.
"""

import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench import machine
from eval_core import first_rows
from experiments import append_row, curve, read_rows, score
from interleave import TrainStep
from model import GPT
from prepare_data import UserError, at_least, run_main, write_atomic
from train import make_config, make_optimizers, make_parser, make_schedule, set_schedule

RELEASE = {("none", 1000): 1.7148, ("none", 2000): 1.6365, ("layerwise", 1000): 1.6839, ("layerwise", 400): 1.8325}  # BPB, merged, one seed
PROTOCOL = dict(depth=4, aspect_ratio=32, head_dim=64, max_seq_len=256, window_pattern="L", source_layer=3, total_batch_size=4096,
                embedding_lr=0.2, weight_decay=0.0, grad_clip=0.0, warmup_steps=0, num_iterations=1000)
OURS = dict(matrix_lr=0.04)  # the release has 0.02, with another variant of Muon

SAVE_EVERY = 200  # steps

# five steps of X <- a X + (b XX' + c (XX')^2) X bring singular values close to 1: Polar Express, arXiv 2505.16932
POLAR_EXPRESS = [(8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                 (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                 (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]

class ReleaseMuon(torch.optim.Optimizer):
    """
    What the release's Muon has and torch's lacks, to see what that is worth; train.py has torch's. The orthogonalization is Polar
    Express; then every row (of a wide matrix: column) is divided by the root of the running mean of its squares, and the
    update scaled to the norm it had (NorMuon, arXiv 2510.05491). No weight decay.
    """
    def __init__(self, params, lr, momentum=0.95, beta2=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                tall, state = p.size(0) >= p.size(1), self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"]).bfloat16()  # Nesterov
                x = x.T if tall else x
                x = x / (1.02 * x.norm() + 1e-6)
                for a, b, c in POLAR_EXPRESS:
                    xx = x @ x.T
                    x = a * x + (b * xx + c * xx @ xx) @ x
                x = (x.T if tall else x).float()
                square = x.square().mean(1 if tall else 0, keepdim=True)
                mean = state.setdefault("square", torch.zeros_like(square)).lerp_(square, 1 - group["beta2"])
                normalized = x * mean.clamp_min(1e-10).rsqrt()
                p.add_(normalized, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5 * (x.norm() / normalized.norm().clamp_min(1e-10)).item())

def load(folder):
    """Training and validation tokens, and the bytes of each token. Raises UserError."""
    try:
        return [np.load(Path(folder) / f"{name}.npy") for name in ("train", "val", "token_bytes")]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the reference job in {folder} ({e}): give its folder with --reference")

def parse_args():
    """train.py's flags with the protocol as their defaults, and its own."""
    parser = make_parser()
    parser.add_argument("--reference", default="../shared/reference", help="folder with train.npy, val.npy and token_bytes.npy")
    parser.add_argument("--muon", choices=["torch", "release"], default="torch", help="release: its variant of Muon, for the gates as well")
    parser.add_argument("--results", default="results", help="where ground.jsonl is")
    parser.set_defaults(**PROTOCOL, **OURS)
    args = parser.parse_args()
    at_least(args, depth=1, num_iterations=1, seed=0, matrix_lr=0)
    args.lrt = args.lrt or "none"
    args.gate_lr = args.gate_lr if args.muon == "torch" else 0.0  # Muon's there
    return args

def main():
    args = parse_args()
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    if any(row["command"] == command for row in read_rows(Path(args.results) / "ground.jsonl")):
        return print(f"{args.results}/ground.jsonl has a row of {command}")
    tokens, val, token_bytes = load(args.reference)
    T, rows = args.max_seq_len, args.total_batch_size // args.max_seq_len
    torch.set_num_threads(1)  # as the release ran, and the sums come out the same on any machine of this kind
    torch.manual_seed(args.seed)
    model = GPT(make_config(args, args.depth, len(token_bytes)))
    schedule, steps = make_schedule(args), args.num_iterations
    optimizers = make_optimizers(model, args, batch_scale=1.0)
    if args.muon == "release":
        groups = model.parameter_groups()
        optimizers = optimizers[0], ReleaseMuon(groups["matrices"] + groups["memory projections"] + groups["gates"], args.matrix_lr)
        for group in optimizers[1].param_groups:
            group |= dict(initial_lr=group["lr"], initial_weight_decay=0.0)
    step_module = TrainStep(model, schedule)
    step_module = torch.compile(step_module, dynamic=False) if args.compile else step_module
    name = f"{args.lrt}_{steps}" + "_release_muon" * (args.muon == "release")
    saved = Path(args.out) / "ground" / f"{name}_s{args.seed}.pt"
    start, log, seconds = 0, [], 0.0
    if saved.exists() and (state := torch.load(saved, weights_only=True))["command"] == command:  # broken off: go on
        model.load_state_dict(state["model"])
        for optimizer, x in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(x)
        start, log, seconds = state["step"], state["log"], state["seconds"]
    rng, t0 = np.random.default_rng(args.seed), time.time() - seconds
    for step in range(steps):
        starts = rng.integers(0, len(tokens) - T - 1, rows)
        if step < start:
            continue
        if step > start and step % SAVE_EVERY == 0:
            saved.parent.mkdir(parents=True, exist_ok=True)
            state = dict(command=command, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step, log=log, seconds=time.time() - t0)
            write_atomic(saved, lambda f: torch.save(state, f))
        batch = torch.from_numpy(np.stack([tokens[i:i + T + 1].astype(np.int64) for i in starts]))
        set_schedule(optimizers, step, steps, args)
        loss, passes = step_module(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)  # after both: the release's Muon has the gates, too
        log.append(dict(kind="train", step=step, passes=passes.tolist()))
        if step % 50 == 0:
            print(f"step {step:05d}/{steps:05d} | loss: {loss.item():.4f} | {time.time() - t0:.0f} s", flush=True)
    seconds = time.time() - t0
    row = dict(set="ground", name=name, seed=args.seed, command=command, **machine(torch.device("cpu")), steps=steps,
               tokens=steps * rows * T, compute=steps * rows * T * schedule.cost(model, T), train_seconds=round(seconds), release=RELEASE.get((args.lrt, steps)),
               curve=curve(log), **score(model, first_rows([val], T, 192), token_bytes, schedule))
    Path(args.results).mkdir(exist_ok=True)
    append_row(Path(args.results) / "ground.jsonl", row)
    saved.unlink(missing_ok=True)
    print(f"{name} seed {args.seed}: BPB " + ", ".join(f"{name} {x:.4f}" for name, x in row["bpb"].items()) + f"; the release: {row['release']}")

if __name__ == "__main__":
    run_main(main)
