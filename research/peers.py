"""
Ours beside the peers' own code, measured in turns: nanochat, and the release of the LRT's authors.

    git clone https://github.com/karpathy/nanochat
    git clone https://github.com/OoDBag/Latent_recurrent_transformer
    python bench.py peers --nanochat nanochat --release Latent_recurrent_transformer

bench.py calls this file. Every contestant is a process of its own, because both peers call their package
nanochat. While one works, the others wait. Both wall time and CPU time are measured: on a busy machine the
second is the one to compare. The update of a peer's optimizer is compiled by torch in the first step, which
is not measured and takes a minute.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import (
    Variant,
    check_sizes,
    decode,
    full_decoder,
    median_ratio,
    prepare_decoding,
    report,
    training_step,
)
from common import ArgumentParser, UserError, check_folder, run_main
from model import NANOCHAT_BACKBONE, GPTConfig
from recurrent import build_model


class Contestant(NamedTuple):
    """What is measured against others of its group, of which the first is ours."""
    group: str
    name: str
    make: Callable  # args -> a dict of functions, the works that are timed, in their order


# -----------------------------------------------------------------------------
# The training step: gradients, then the update, on random tokens

def our_step(lrt, recipe, args):
    gradients, update, _ = training_step(args, torch.device("cpu"), Variant(lrt, 2, recipe=recipe))
    return dict(gradients=gradients, update=update)

def peer_step(model, loss_of, args):
    """The works of a peer's model: its own initialization, loss and optimizer."""
    torch.manual_seed(0)
    model.init_weights()
    optimizer = model.setup_optimizer()
    idx = torch.randint(args.vocab_size, (args.batch, args.context))

    def update():
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return dict(gradients=lambda: loss_of(idx).backward(), update=update)

def peer_sizes(args):
    """The fields that the configurations of both peers share."""
    heads = max(args.width // (64 if args.width % 128 else 128), 1)
    return dict(sequence_len=args.context, vocab_size=args.vocab_size, n_layer=args.depth, n_head=heads,
                n_kv_head=heads, n_embd=args.width, window_pattern=args.window_pattern)

def nanochat_step(args):
    sys.path.insert(0, args.nanochat)
    from nanochat.gpt import GPT, GPTConfig
    model = GPT(GPTConfig(**peer_sizes(args)))
    return peer_step(model, lambda idx: model(idx, idx), args)

def release_step(interleaved, args):
    sys.path.insert(0, args.release)
    from nanochat.gpt import GPT, GPTConfig
    # as in the paper: value embeddings on every layer, gates that read all of their input
    options = dict(ve_every_layer=True, ve_gate_channels=0, use_interleaved=interleaved)
    model = GPT(GPTConfig(**peer_sizes(args), **options))

    def loss_of(idx):
        if interleaved:
            return model.forward_interleaved_train(idx, idx)["loss"]
        return model(idx, idx)[0]
    return peer_step(model, loss_of, args)

def step_contestants(args):
    contestants = []
    if args.nanochat:
        contestants += [
            Contestant("nanochat", "ours", partial(our_step, "none", "nanochat")),
            Contestant("nanochat", "nanochat", nanochat_step),
        ]
    if args.release:
        contestants += [
            Contestant("baseline", "ours", partial(our_step, "none", "paper")),
            Contestant("baseline", "the release", partial(release_step, False)),
            Contestant("S = 2", "ours, layerwise", partial(our_step, "layerwise", "paper")),
            Contestant("S = 2", "ours, shared", partial(our_step, "shared", "paper")),
            Contestant("S = 2", "the release", partial(release_step, True)),
        ]
    return contestants


# -----------------------------------------------------------------------------
# Decoding: greedy tokens, one at a time, behind a cache that is full but for them

DECODED = 8  # tokens a measurement

def our_decode(lrt, args):
    """On nanochat's backbone: windows of the paper's are twice as long."""
    config = GPTConfig(**peer_sizes(args), **NANOCHAT_BACKBONE, lrt=lrt)
    model = prepare_decoding(build_model(config))
    decoder = full_decoder(model, args.batch, args.context, DECODED, compile=False)
    return dict(decode=torch.inference_mode()(partial(decode, decoder, DECODED)))

def nanochat_decode(args):
    """By nanochat's own model, cache and sampling."""
    sys.path.insert(0, args.nanochat)
    from nanochat import engine, gpt
    torch.manual_seed(0)
    sizes = peer_sizes(args)
    model = gpt.GPT(gpt.GPTConfig(**sizes))
    model.init_weights()
    heads = sizes["n_head"]
    d = args.width // heads
    kv = engine.KVCache(args.batch, heads, args.context, d, args.depth, "cpu", torch.float32)
    kv.k_cache.normal_()
    kv.v_cache.normal_()

    @torch.inference_mode()
    def work():
        tokens = torch.zeros(args.batch, 1, dtype=torch.int64)
        kv.cache_seqlens.fill_(args.context - DECODED)
        for _ in range(DECODED):
            logits = model(tokens, kv_cache=kv)
            tokens = engine.sample_next_token(logits[:, -1], None, temperature=0.0)
    return dict(decode=work)

def decode_contestants(args):
    if not args.nanochat:
        return []
    return [
        Contestant("decoding", "ours, none", partial(our_decode, "none")),
        Contestant("decoding", "ours, shared", partial(our_decode, "shared")),
        Contestant("decoding", "nanochat", nanochat_decode),
    ]

# A part is a function of args that returns its contestants. Another one is another entry here.
PARTS = dict(step=step_contestants, decode=decode_contestants)


# -----------------------------------------------------------------------------
# Processes that take turns

def serve(pipe, make, args):
    """A contestant's process: make its works, then run one whenever its name comes, and send the seconds."""
    torch.set_num_threads(args.threads)
    try:
        works = make(args)
        for work in works.values():  # once without the clock
            work()
    except Exception as e:  # a peer may fail in any way: the parent says so in one line
        pipe.send(f"{type(e).__name__}: {e}")
        return
    pipe.send(list(works))
    while (name := pipe.recv()) is not None:
        wall, cpu = time.perf_counter(), time.process_time()
        works[name]()
        pipe.send((time.perf_counter() - wall, time.process_time() - cpu))

def receive(pipe, contestant):
    """What a contestant's process sends. Raises UserError if it has failed."""
    try:
        answer = pipe.recv()
    except EOFError as e:
        raise UserError(f"{contestant.group}, {contestant.name}: its process has ended") from e
    if isinstance(answer, str):
        first_line = answer.splitlines()[0]
        raise UserError(f"{contestant.group}, {contestant.name} cannot be run: {first_line}")
    return answer

def measure(contestants, args):
    """
    Run the works of all contestants in turns. Returns for each contestant a dict: name of the work -> list
    of (wall, CPU) seconds.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for contestant in contestants:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, contestant.make, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(pipe)
            processes.append(process)
            names = receive(pipe, contestant)  # one after the other: they would share the cores
        times = [{name: [] for name in names} for _ in contestants]
        for _ in range(args.repeats):
            for contestant, pipe, mine in zip(contestants, pipes, times):
                for name in mine:
                    pipe.send(name)
                    mine[name].append(receive(pipe, contestant))
        for pipe in pipes:
            pipe.send(None)
    finally:
        for process in processes:
            process.join(timeout=5)
            process.terminate()
    return times

def rows_of(part, contestants, times):
    """A row for each contestant: milliseconds of every work and of all, and how they are to ours."""
    totals = []  # seconds of CPU of every repeat
    for mine in times:
        totals.append([sum(cpu for _, cpu in works) for works in zip(*mine.values())])
    rows = []
    ours = {}
    for contestant, mine, total in zip(contestants, times, totals):
        ours.setdefault(contestant.group, total)
        wall = [sum(wall for wall, _ in works) for works in zip(*mine.values())]
        low, _, high = statistics.quantiles(total, n=4)
        row = dict(part=part, against=contestant.group, contestant=contestant.name)
        for name, seconds in mine.items():
            row[f"{name}_ms"] = 1000 * statistics.median(cpu for _, cpu in seconds)
        rows.append(row | dict(
            cpu_ms=1000 * statistics.median(total),
            quartiles=f"{1000 * low:.0f}-{1000 * high:.0f}",
            wall_ms=1000 * statistics.median(wall),
            over_ours=round(median_ratio(total, ours[contestant.group]), 3),
        ))
    return rows


# -----------------------------------------------------------------------------
# The command

def parse_args():
    """The command line, checked. Raises UserError."""
    parser = ArgumentParser(
        prog="bench.py peers", description="Ours beside the peers' own code, in processes that take turns.")
    parser.add_argument("--nanochat", metavar="DIR", help="a checkout of github.com/karpathy/nanochat")
    parser.add_argument("--release", metavar="DIR",
                        help="a checkout of github.com/OoDBag/Latent_recurrent_transformer")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS),
                        help="what to measure")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--width", type=int, default=128, help="heads of 128, or of 64 if they do not fit")
    parser.add_argument("--vocab-size", type=int, default=4096, help="vocabulary")
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--context", type=int, default=256, help="tokens a row")
    parser.add_argument("--window-pattern", default="L", help="as for train.py")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each, taking turns")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
    args = parser.parse_args()
    args.compile = False
    check_sizes(args)
    check_folder(args.json)
    if "decode" in args.parts and args.context <= DECODED:
        raise UserError(f"--context must be more than the {DECODED} tokens that are decoded")
    if not args.nanochat and not args.release:
        raise UserError("give --nanochat or --release, a checkout of their code")
    for folder in (args.nanochat, args.release):
        if folder and not (Path(folder) / "nanochat/gpt.py").is_file():
            raise UserError(f"{folder} has no nanochat/gpt.py: it is no checkout of a peer")
    return args

def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for part in args.parts:
        contestants = PARTS[part](args)
        rows += rows_of(part, contestants, measure(contestants, args))
    columns = dict.fromkeys(name for row in rows for name in row)  # a part has works of its own
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    title = (f"peers: depth {args.depth}, width {args.width}, vocabulary {args.vocab_size}, "
             f"{args.batch} rows of {args.context}, float32")
    report(args, torch.device("cpu"), title, rows)

if __name__ == "__main__":
    run_main(main)
