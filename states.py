"""
State tracking, a task where memory must matter: tokens are permutations, and the target at every position is the product
of all so far. The state has to be carried from token to token; a transformer of fixed depth can carry it only as far as
its layers reach (arXiv 2404.08819), and S5 is the hard case of all finite groups, since it is not solvable.

    python states.py --task s5 --lrt layerwise --schedule sequential --json results/states.jsonl
    python states.py --task s5 --lrt layerwise                         trained by interleaved passes instead
    python states.py --task parity --lrt none                          the baseline
    python states.py --task parity --arch recurrent                    the Recurrent Transformer

One command is one run: it trains on sequences of --max-seq-len tokens with train.py's optimizers, then decodes sequences
up to 8 times as long with the exact recurrence, token by token, prints accuracies, and adds one row to --json.

Every layer sees --window positions back, half the training length unless told otherwise. Two layers then just cover the
training length, so the baseline lacks nothing there, and beyond it no attention meets a distance that it was not trained
on: whatever goes further has to go through recurrence, in all variants alike. --window 128 is full attention.
"""

import itertools
import math
import shlex
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train
from bench import machine
from experiments import append_row, read_rows
from interleave import TrainStep, run
from model import GPT, GPTConfig, KVCache, take
from prepare_data import ArgumentParser, UserError, at_least, check_folder, run_main
from sample import pick_device

# what the tokens are: permutations of 0 .. n-1, p[i] where i goes. All products of them are the states, all of S_n.
TASKS = {
    "parity": [(0, 1), (1, 0)],  # S2: keep and flip
    "s3": list(itertools.permutations(range(3))),
    "s5": [(1, 0, 2, 3, 4), (1, 2, 3, 4, 0)],  # a swap and a cycle, which generate its 120 elements
}
LENGTHS = (1, 2, 4, 8)  # times the training length
SCORING = 2**40  # the seed of the sequences that all runs are scored on


# -----------------------------------------------------------------------------
# The task

class Task:
    """A task's elements (the vocabulary, the identity first), its tokens' ids, and the table of products."""

    def __init__(self, name):
        n = len(TASKS[name][0])
        self.elements = list(itertools.permutations(range(n)))
        ids = {p: i for i, p in enumerate(self.elements)}
        self.tokens = torch.tensor([ids[p] for p in TASKS[name]])
        self.table = torch.tensor([[ids[tuple(q[i] for i in p)] for q in self.elements] for p in self.elements])  # p first, then q

    def batch(self, B, T, generator):
        """B random sequences of T tokens, and the product of all tokens so far at every position: two (B, T) int64."""
        idx = self.tokens[torch.randint(len(self.tokens), (B, T), generator=generator)]
        targets, state = torch.empty_like(idx), torch.zeros(B, dtype=torch.int64)
        for t in range(T):
            targets[:, t] = state = self.table[state, idx[:, t]]
        return idx, targets

@dataclass
class Config(GPTConfig):
    """A GPTConfig in which all layers, the last one too, see `span` positions back."""
    span: int = 8

    def window(self, layer):
        return min(self.span, self.sequence_len)


# -----------------------------------------------------------------------------
# Training and scoring

def fit(model, schedule, task, args):
    """Train on fresh sequences with train.py's recipe; the mean loss in nats of the last tenth. Raises UserError if it is not finite."""
    device, generator, losses = model.wte.weight.device, torch.Generator().manual_seed(args.seed), []
    step_loss, optimizers = TrainStep(model, schedule), train.make_optimizers(model, args, batch_scale=1.0)
    for step in tqdm(range(args.num_iterations), unit="step", disable=None, dynamic_ncols=True):
        train.set_schedule(optimizers, step, args.num_iterations, args)
        loss, _ = step_loss(*(x.to(device) for x in task.batch(args.batch_size, args.max_seq_len, generator)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"step {step}: the loss is {losses[-1]}: lower --matrix-lr")
        if step % max(args.num_iterations // 10, 1) == 0:
            tqdm.write(f"step {step:05d}/{args.num_iterations:05d} | loss: {losses[-1]:.4f}")
    tail = losses[-max(len(losses) // 10, 1):]
    return sum(tail) / len(tail)

@torch.no_grad()
def decode(model, idx):
    """Greedy answers (B, T) int64 to tokens idx (B, T), one position after the other with memory carried along."""
    kv, memory, answers = KVCache(model.config, *idx.shape, idx.device, model.wte.weight.dtype), None, []
    for t in range(idx.size(1)):
        hidden, source = model(idx[:, t:t + 1], range(t, t + 1), kv, memory)
        memory = source if model.config.lrt != "none" else None
        answers.append(model.logits(hidden).argmax(-1))
    return torch.cat(answers, dim=1)

@torch.no_grad()
def parallel(model, idx, passes):
    """The same as the passes of a schedule answer, each position by the last pass that computed it."""
    answers = torch.empty_like(idx)
    for positions, hidden, _ in run(model, idx, passes):
        take(answers, positions).copy_(model.logits(hidden).argmax(-1))
    return answers

def accuracy(right, T):
    """right (B, 8T) bool -> the share of sequences right at the last position, and at all of them, by length."""
    return dict(last={n * T: right[:, n * T - 1].float().mean().item() for n in LENGTHS if n * T <= right.size(1)},
                whole={n * T: right[:, :n * T].all(1).float().mean().item() for n in LENGTHS if n * T <= right.size(1)})

def score(model, schedule, task, args):
    """
    A dict of accuracies: `decode` with the exact recurrence at all lengths, `no_memory` with memory zero, `trained` as the
    passes of training answer at the training length; and by_position, that of decoding.
    """
    T, device = args.max_seq_len, model.wte.weight.device
    idx, targets = (x.to(device) for x in task.batch(args.score_rows, LENGTHS[-1] * T, torch.Generator().manual_seed(SCORING)))
    right = decode(model, idx) == targets
    scores = dict(decode=accuracy(right, T), trained=accuracy(parallel(model, idx[:, :T], schedule.passes(T)) == targets[:, :T], T))
    if model.config.lrt != "none":
        scores["no_memory"] = accuracy(parallel(model, idx, [range(idx.size(1))]) == targets, T)
    return scores | dict(by_position=[round(x, 4) for x in right.float().mean(0).tolist()])


# -----------------------------------------------------------------------------
# The command

def variant(config, schedule):
    """A short name of what was trained and how."""
    if config.lrt == "none":
        return "recurrent" if config.arch == "recurrent" else "none"
    option = dict(interleaved=schedule.subsets, refine=schedule.refinements, chunked=schedule.chunk).get(schedule.kind, "")
    return f"{config.lrt}_{schedule.kind}{option}"

def parse_args():
    parser = ArgumentParser(description="Train on state tracking, and decode sequences longer than those of training.")
    parser.add_argument("--task", choices=list(TASKS), default="s5", help="whose elements are composed; parity is S2")
    parser.add_argument("--arch", choices=["gpt", "recurrent"], default="gpt", help="recurrent: the Recurrent Transformer, without --lrt")
    parser.add_argument("--lrt", choices=["none", "shared", "layerwise"], default="none", help="none: plain GPT; shared, layerwise: LRT")
    parser.add_argument("--schedule", choices=["interleaved", "refine", "chunked", "sequential"], default="interleaved", help="the passes of a training step, see interleave.py")
    parser.add_argument("--subsets", type=int, default=2, help="interleaved: S")
    parser.add_argument("--refinements", type=int, default=3, help="refine: K")
    parser.add_argument("--chunk", type=int, default=4, help="chunked: tokens a chunk")
    parser.add_argument("--max-seq-len", type=int, default=16, help="tokens a sequence in training")
    parser.add_argument("--window", type=int, help="how many positions back every layer sees (default: half the training length)")
    parser.add_argument("--depth", type=int, default=2, help="number of layers")
    parser.add_argument("--width", type=int, default=64, help="width, heads of 32")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences a step")
    parser.add_argument("--num-iterations", type=int, default=800, help="optimizer steps")
    parser.add_argument("--matrix-lr", type=float, default=0.01, help="Muon; the other rates are train.py's")
    parser.add_argument("--score-rows", type=int, default=1024, help="sequences scored")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the sequences")
    parser.add_argument("--json", metavar="FILE", help="add the row to this file of JSON lines, unless it is there")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    args = parser.parse_args()
    at_least(args, subsets=1, refinements=1, chunk=1, max_seq_len=2, window=1, depth=1, width=1, batch_size=1, num_iterations=1, matrix_lr=0, score_rows=1, seed=0)
    check_folder(args.json)
    args.window = args.window or args.max_seq_len // 2
    return Namespace(**vars(train.make_parser().parse_args([])) | vars(args) | {"gate_lr": args.matrix_lr})  # all else: the defaults of train.py

def main():
    args = parse_args()
    task, schedule, T, heads = Task(args.task), train.make_schedule(args), args.max_seq_len, max(args.width // 32, 1)
    try:
        config = Config(sequence_len=LENGTHS[-1] * T, vocab_size=len(task.elements), n_layer=args.depth, n_head=heads, n_kv_head=heads,
                        n_embd=args.width, lrt=args.lrt, arch=args.arch, span=args.window)
    except ValueError as e:
        raise UserError(e)
    chosen = dict(task=args.task, seed=args.seed, batch_size=args.batch_size, num_iterations=args.num_iterations, matrix_lr=args.matrix_lr,
                  max_seq_len=T, score_rows=args.score_rows, model=asdict(config), schedule=asdict(schedule))
    name, device = f"{args.task}_{variant(config, schedule)}" + f"_window{args.window}" * (args.window != T // 2), pick_device(args.device)
    if args.json and any(row["config"] == chosen for row in read_rows(args.json)):
        return print(f"{name}, seed {args.seed}: its row is in {args.json}, nothing to do")
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = GPT(config)
    where, tokens, t0 = machine(device), args.num_iterations * args.batch_size * T, time.perf_counter()
    loss = fit(model, schedule, task, args)
    t1 = time.perf_counter()
    scores = score(model, schedule, task, args)
    row = dict(set="states", name=name, seed=args.seed, command=shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), **where,
               parameters=model.parameter_counts()["total"], steps=args.num_iterations, tokens=tokens,
               compute=tokens * schedule.cost(model, T), flops=tokens * schedule.flops_per_token(model, T),
               train_seconds=round(t1 - t0, 1), score_seconds=round(time.perf_counter() - t1, 1), loss=loss, **scores, config=chosen)
    print(f"{name}, seed {args.seed} | {row['steps']} steps, {tokens:,} tokens, {row['compute']:,.0f} of baseline-equivalent compute, "
          f"{row['train_seconds']} s | loss {loss:.4f} | " + " | ".join(where.values()))
    print("| accuracy at length |" + "".join(f" {n * T} |" for n in LENGTHS) + "\n|---|" + "---:|" * len(LENGTHS))
    for key in ("decode", "no_memory", "trained"):
        for what, by_length in row.get(key, {}).items():
            print(f"| {key}, {what} |" + "".join(f" {by_length[n * T]:.3f} |" if n * T in by_length else "  |" for n in LENGTHS))
    if args.json:
        append_row(args.json, row)

if __name__ == "__main__":
    run_main(main)
