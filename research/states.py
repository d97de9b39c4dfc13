"""
State tracking, a task that needs memory: tokens are permutations, and the target at every position is the
product of all tokens so far. The state has to be carried from token to token. A transformer of fixed
depth can carry it only as far as its layers reach (arXiv 2404.08819), and S5 is the hardest case among
finite groups, since it is not solvable.

    python -m research.states --task s5 --lrt layerwise --schedule sequential   an LRT, trained token by token
    python -m research.states --task s5 --lrt layerwise                         trained by interleaved passes
    python -m research.states --task s5 --lrt layerwise --schedule draft --drafts 2 --subsets 8
    python -m research.states --task parity --lrt none                          the baseline
    python -m research.states --task parity --arch recurrent                    the Recurrent Transformer

One command is one run: it trains on sequences of --max-seq-len tokens with train.py's optimizers, then
decodes sequences up to 8 times as long with the exact recurrence, token by token. It prints accuracies
and adds one row to --json FILE; the rows so far are in research/results/states.jsonl.

Every layer sees --window positions back, by default half the training length. Two layers then just cover
the training length, so the baseline lacks nothing there; and beyond it attention never meets a distance
that it was not trained on. Whatever reaches further has to go through recurrence, in all variants alike.
--window 128 is full attention.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import itertools
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, fields

import torch
from tqdm import tqdm

from attention import KVCache, take
from common import (
    ArgumentParser,
    UserError,
    append_row,
    at_least,
    check_folder,
    machine,
    pick_device,
    read_rows,
    run_main,
)
from interleave import Schedule, TrainStep, decode_tokens, run
from model import GPTConfig
from optim import make_optimizers, set_learning_rates
from recipes import OptimizerConfig
from recurrent import RecurrentConfig, build_model

# the tokens of each task: permutations p of 0 .. n-1, where p[i] is where i goes; their products are all
# of S_n
TASKS = {
    "parity": [(0, 1), (1, 0)],  # S2: keep and flip
    "s3": list(itertools.permutations(range(3))),
    "s5": [(1, 0, 2, 3, 4), (1, 2, 3, 4, 0)],  # a swap and a cycle, which generate its 120 elements
}
LENGTHS = (1, 2, 4, 8)  # of scored sequences, times the training length
SCORING_SEED = 2**40  # of the sequences that all runs are scored on
LONGEST_USUAL_RUN = 800  # steps; the name of a longer run says how long
USUAL_LENGTH = 16  # tokens a sequence in training; the name of another run says how many
GRAD_CLIP = 1.0  # largest norm of the gradient, train.py's default


# -----------------------------------------------------------------------------
# The task

class Task:
    """
    A task's elements (the vocabulary, the identity first), the ids of its tokens, and the table of
    products.
    """

    def __init__(self, name):
        n = len(TASKS[name][0])
        self.elements = list(itertools.permutations(range(n)))
        ids = {element: i for i, element in enumerate(self.elements)}
        self.tokens = torch.tensor([ids[token] for token in TASKS[name]])
        table = []
        for p in self.elements:
            table.append([ids[tuple(q[i] for i in p)] for q in self.elements])
        self.table = torch.tensor(table)  # [p, q]: the id of p followed by q

    def batch(self, B, T, generator):
        """
        B random sequences of T tokens, and the product of all tokens so far at each position: two (B, T)
        int64.
        """
        choices = torch.randint(len(self.tokens), (B, T), generator=generator)
        idx = self.tokens[choices]
        targets = torch.empty_like(idx)
        state = torch.zeros(B, dtype=torch.int64)  # the identity
        for t in range(T):
            state = self.table[state, idx[:, t]]
            targets[:, t] = state
        return idx, targets


# -----------------------------------------------------------------------------
# The model

class SameWindow:
    """A configuration in which all layers, the last one too, see `span` positions back."""

    def window(self, layer):
        return min(self.span, self.sequence_len)

@dataclass
class StateConfig(SameWindow, GPTConfig):
    span: int = 8

@dataclass
class RecurrentStateConfig(SameWindow, RecurrentConfig):
    span: int = 8

def make_config(args, vocab_size):
    """The model's configuration. Raises UserError for a model that cannot be built."""
    heads = max(args.width // 32, 1)
    config_class = RecurrentStateConfig if args.arch == "recurrent" else StateConfig
    try:
        return config_class(
            sequence_len=LENGTHS[-1] * args.max_seq_len,
            vocab_size=vocab_size,
            n_layer=args.depth,
            n_head=heads,
            n_kv_head=heads,
            n_embd=args.width,
            lrt=args.lrt,
            inject=args.inject,
            memory="embedding" if args.lrt != "none" and args.schedule == "plain" else "hidden",
            first_memory=args.first_memory,
            span=args.window,
        )
    except ValueError as e:
        raise UserError(e) from e

def make_schedule(args):
    """The passes of a training step. Raises UserError where memory would never reach a token."""
    kind = "plain" if args.lrt == "none" else args.schedule
    if kind == "chunked" and args.chunk >= args.max_seq_len:
        raise UserError(f"--chunk {args.chunk} covers the whole sequence of {args.max_seq_len} tokens: "
                        "memory would never reach a token")
    return Schedule(kind, args.subsets, args.refinements, args.drafts, args.chunk)


# -----------------------------------------------------------------------------
# Training and scoring

def fit(model, schedule, task, args):
    """
    Train on fresh sequences with train.py's recipe. Returns the mean loss in nats of the last tenth of
    the steps. Raises UserError if a loss is not finite.
    """
    device = model.wte.weight.device
    config = OptimizerConfig(matrix_lr=args.matrix_lr, gate_lr=args.matrix_lr)
    optimizers = make_optimizers(model, config)
    train_step = TrainStep(model, schedule)
    generator = torch.Generator().manual_seed(args.seed)
    num_iterations = args.num_iterations
    losses = []
    for step in tqdm(range(num_iterations), unit="step", disable=None, dynamic_ncols=True):
        idx, targets = task.batch(args.batch_size, args.max_seq_len, generator)
        set_learning_rates(optimizers, step, num_iterations, config)
        loss, _ = train_step(idx.to(device), targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"step {step}: the loss is {losses[-1]}: lower --matrix-lr")
        if step % max(num_iterations // 10, 1) == 0:
            tqdm.write(f"step {step:05d}/{num_iterations:05d} | loss: {losses[-1]:.4f}")
    tail = losses[-max(len(losses) // 10, 1):]
    return sum(tail) / len(tail)

@torch.no_grad()
def decode(model, idx):
    """
    Greedy answers (B, T) int64 to tokens idx (B, T), one position after the other with memory carried
    along.
    """
    kv = KVCache(model.config, *idx.shape, idx.device, model.wte.weight.dtype)
    return model.logits(decode_tokens(model, idx, kv)).argmax(-1)

@torch.no_grad()
def answer_in_passes(model, idx, passes):
    """
    Greedy answers (B, T) int64 as the passes of a schedule give them, each position's from the last pass
    over it.
    """
    answers = torch.empty_like(idx)
    for positions, hidden, _ in run(model, idx, passes):
        take(answers, positions).copy_(model.logits(hidden).argmax(-1))
    return answers

def accuracy(right, T):
    """
    right (B, up to 8T) bool -> two dicts by length: the share of sequences right at the `last` position,
    and at all of them (`whole`).
    """
    lengths = [n * T for n in LENGTHS if n * T <= right.size(1)]
    return dict(
        last={length: right[:, length - 1].float().mean().item() for length in lengths},
        whole={length: right[:, :length].all(1).float().mean().item() for length in lengths},
    )

def score(model, schedule, task, args):
    """
    The accuracies of a model, a dict: `decode` with the exact recurrence, at all lengths; `trained` as
    the passes of training answer, at the training length; `no_memory` with memory zero (an LRT's); and
    `by_position`, the share of right answers while decoding.
    """
    T = args.max_seq_len
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(SCORING_SEED)
    idx, targets = task.batch(args.score_rows, LENGTHS[-1] * T, generator)
    idx, targets = idx.to(device), targets.to(device)

    decoded = decode(model, idx) == targets
    trained = answer_in_passes(model, idx[:, :T], schedule.passes(T)) == targets[:, :T]
    scores = dict(decode=accuracy(decoded, T), trained=accuracy(trained, T))
    if model.config.lrt != "none":
        one_pass = [range(idx.size(1))]
        scores["no_memory"] = accuracy(answer_in_passes(model, idx, one_pass) == targets, T)
    scores["by_position"] = [round(share, 4) for share in decoded.float().mean(0).tolist()]
    return scores


# -----------------------------------------------------------------------------
# The command

def parse_args():
    parser = ArgumentParser(
        description="Train on state tracking, and decode sequences longer than those of training.")
    parser.add_argument("--task", choices=list(TASKS), default="s5",
                        help="whose elements are composed; parity is S2")
    parser.add_argument("--arch", choices=["gpt", "recurrent"], default="gpt",
                        help="recurrent: the Recurrent Transformer, without --lrt")
    parser.add_argument("--lrt", choices=["none", "shared", "layerwise"], default="none",
                        help="none: plain GPT; shared, layerwise: LRT")
    parser.add_argument("--first-memory", choices=["zero", "embedding"], default="zero",
                        help="what a token reads where no memory has been computed yet")
    parser.add_argument("--inject", choices=["kv", "residual", "both", "input"], default="both",
                        help="how memory enters a layer")
    kinds = ["interleaved", "refine", "draft", "chunked", "sequential", "plain"]
    parser.add_argument("--schedule", choices=kinds, default="interleaved",
                        help="the passes of a training step, see interleave.py; "
                        "plain with --first-memory embedding is the control, without recurrence")
    parser.add_argument("--subsets", type=int, help="S of interleaved (default 2) and draft (default 1)")
    parser.add_argument("--drafts", type=int, default=1, help="draft: how often memory is handed over first")
    parser.add_argument("--refinements", type=int, default=3, help="refine: K")
    parser.add_argument("--chunk", type=int, default=4, help="chunked: tokens a chunk")
    parser.add_argument("--max-seq-len", type=int, default=USUAL_LENGTH, help="tokens a sequence in training")
    parser.add_argument("--window", type=int,
                        help="how many positions back every layer sees (default: half the training length)")
    parser.add_argument("--depth", type=int, default=2, help="number of layers")
    parser.add_argument("--width", type=int, default=64, help="width, heads of 32")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences a step")
    parser.add_argument("--num-iterations", type=int, default=800, help="optimizer steps")
    parser.add_argument("--matrix-lr", type=float, default=0.01, help="Muon; the other rates are train.py's")
    parser.add_argument("--score-rows", type=int, default=1024, help="sequences scored")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the sequences")
    parser.add_argument("--json", metavar="FILE",
                        help="add the row to this file of JSON lines, unless it is there")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    args = parser.parse_args()
    at_least(args, subsets=1, refinements=1, drafts=1, chunk=1, max_seq_len=2, window=1, depth=1, width=1,
             batch_size=1, num_iterations=1, matrix_lr=0, score_rows=1, seed=0)
    check_folder(args.json)
    if args.window is None:
        args.window = args.max_seq_len // 2
    return args

def run_name(args, schedule):
    """A short name of what is trained and how."""
    if args.arch == "recurrent":
        variant = "recurrent"
    elif args.lrt == "none":
        variant = "none"
    else:
        options = dict(interleaved=schedule.subsets, refine=args.refinements, chunked=args.chunk,
                       draft=f"{args.drafts}_subsets{schedule.subsets}")
        variant = f"{args.lrt}_{schedule.kind}{options.get(schedule.kind, '')}"
    if args.inject != "both":
        variant += f"_{args.inject}"
    if args.first_memory == "embedding":
        variant += "_first_embedding"
    name = f"{args.task}_{variant}"
    if args.num_iterations > LONGEST_USUAL_RUN:
        name += f"_{args.num_iterations}_steps"
    if args.max_seq_len != USUAL_LENGTH:
        name += f"_{args.max_seq_len}_tokens"
    if args.window != args.max_seq_len // 2:
        name += f"_window{args.window}"
    return name

def run_config(args, config, schedule):
    """All that a run depends on, a dict: its row has it, and two runs with the same one are the same run."""
    return dict(
        task=args.task,
        seed=args.seed,
        batch_size=args.batch_size,
        num_iterations=args.num_iterations,
        matrix_lr=args.matrix_lr,
        max_seq_len=args.max_seq_len,
        score_rows=args.score_rows,
        model=asdict(config) | dict(arch=args.arch),  # as in rows from when every GPTConfig had an arch
        schedule=asdict(schedule),
    )

def is_row_of(row, this_run):
    """Is this the row of that run? What is newer than the row had its default in it."""
    model = {field.name: field.default for field in fields(StateConfig)} | row["config"]["model"]
    schedule = asdict(Schedule()) | row["config"]["schedule"]
    schedule.pop("forward_passes", None)  # of older rows, where it is 0
    return row["config"] | dict(model=model, schedule=schedule) == this_run

def print_summary(row, T):
    """Print what a row says of its run: the run in a line, and its accuracies as a table in Markdown."""
    where = [row[key] for key in ("device", "torch", "commit", "date")]
    print(f"{row['name']}, seed {row['seed']} | {row['steps']} steps, {row['tokens']:,} tokens, "
          f"{row['compute']:,.0f} of baseline-equivalent compute, {row['train_seconds']} s | "
          f"loss {row['loss']:.4f} | " + " | ".join(where))
    lengths = [n * T for n in LENGTHS]
    print("| accuracy at length |" + "".join(f" {length} |" for length in lengths))
    print("|---|" + "---:|" * len(lengths))
    for key in ("decode", "no_memory", "trained"):
        for what, by_length in row.get(key, {}).items():
            cells = [f" {by_length[length]:.3f} |" if length in by_length else "  |" for length in lengths]
            print(f"| {key}, {what} |" + "".join(cells))

def main():
    args = parse_args()
    task = Task(args.task)
    schedule = make_schedule(args)
    config = make_config(args, len(task.elements))
    device = pick_device(args.device)
    name = run_name(args, schedule)

    # nothing to do if there is a row of this run
    this_run = run_config(args, config, schedule)
    if args.json and any(is_row_of(row, this_run) for row in read_rows(args.json)):
        print(f"{name}, seed {args.seed}: its row is in {args.json}, nothing to do")
        return

    # train and score
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = build_model(config)
    where = machine(device)
    start = time.perf_counter()
    loss = fit(model, schedule, task, args)
    trained = time.perf_counter()
    scores = score(model, schedule, task, args)
    scored = time.perf_counter()

    # the row
    T = args.max_seq_len
    tokens = args.num_iterations * args.batch_size * T
    row = dict(
        set="states",
        name=name,
        seed=args.seed,
        command=shlex.join(["python", "-m", "research.states", *sys.argv[1:]]),
        **where,
        parameters=model.parameter_counts()["total"],
        steps=args.num_iterations,
        tokens=tokens,
        compute=tokens * schedule.cost(model, T),
        flops=tokens * schedule.flops_per_token(model, T),
        train_seconds=round(trained - start, 1),
        score_seconds=round(scored - trained, 1),
        loss=loss,
        **scores,
        config=this_run,
    )
    print_summary(row, T)
    if args.json:
        append_row(args.json, row)

if __name__ == "__main__":
    run_main(main)
