"""
Interleaved parallel training and its relatives: every schedule is a list of position sets (ranges), and run() runs any
of them against the model's one forward. A new schedule is one more function that returns a list.

    loss = (L_0 + L_1 + .. ) / number of passes, L_i the mean cross-entropy over the positions that pass i computed  (4)
    memory of a pass = newest m, shifted right by one, at its positions                                              (5)
    keys and values = fresh ones at its own positions, the newest written ones elsewhere                             (6)

Gradients flow from later passes through memory, keys and values into earlier ones (LRT, arXiv 2605.26797).
prefill() runs the same passes without gradients until nothing moves: the exact recurrence of a whole prompt at once.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import KVBuffer, residues, split
from model import take


# -----------------------------------------------------------------------------
# Schedules for a sequence of T tokens

def plain(T):
    """The baseline's one pass, which is also LRT's initialization pass: all positions, memory zero."""
    return [range(T)]

def interleaved(T, subsets=2):
    """Initialize, then refine S disjoint subsets, p mod S = 0, 1, .. S-1, each with the newest memory; the paper's way."""
    return [range(T)] + [range(i, T, subsets) for i in range(min(subsets, T))]

def refine(T, refinements=3):
    """Initialize, then K passes over everything. With K >= T-1 the last pass is the exact recurrence."""
    return [range(T)] * (1 + refinements)

def chunked(T, chunk=64):
    """Contiguous chunks, left to right: memory only crosses a chunk's border; the paper's weak baseline."""
    return [range(start, min(start + chunk, T)) for start in range(0, T, chunk)]

def sequential(T):
    """Token by token: the exact recurrence, differentiable. Slow; the reference for everything else."""
    return [range(t, t + 1) for t in range(T)]

@dataclass
class Schedule:
    """A schedule and its options, as train.py's flags give them and as a checkpoint keeps them."""
    kind: str = "interleaved"  # plain | interleaved | refine | chunked | sequential
    subsets: int = 2  # interleaved: S
    refinements: int = 3  # refine: K
    chunk: int = 64  # chunked: tokens a chunk
    kv_refresh: bool = False  # interleaved: after each pass, renew the memory term in the keys and values yet to be visited
    detach: bool = False  # no gradient from a pass into the ones before it
    loss_weights: list | None = None  # one weight a pass; None: the plain mean, equation (4)
    forward_passes: int = 0  # this many passes, from the first on, only hand over: no loss of their own and no gradient

    def __post_init__(self):
        """Raises ValueError for a schedule that cannot be run."""
        if self.kind not in ("plain", "interleaved", "refine", "chunked", "sequential"):
            raise ValueError(f"schedule {self.kind!r} is none of plain, interleaved, refine, chunked, sequential")
        for name in ("subsets", "refinements", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.kv_refresh and self.kind != "interleaved":
            raise ValueError(f"kv_refresh goes with the interleaved schedule, not with {self.kind}")
        if self.forward_passes and self.kind not in ("interleaved", "refine"):
            raise ValueError(f"forward_passes goes with the schedules that initialize, interleaved and refine, not with {self.kind}")
        if self.loss_weights and any(self.loss_weights[:self.forward_passes]):
            raise ValueError(f"forward_passes leaves {self.forward_passes} without a gradient: their loss weights must be 0")
        if self.loss_weights is not None and not (min(self.loss_weights) >= 0 and 0 < sum(self.loss_weights) < math.inf):
            raise ValueError("loss weights must be finite, not negative, and not all zero")

    def passes(self, T):
        """The list of ranges for T tokens. Raises ValueError if loss_weights are not as many, or forward_passes too many."""
        if self.kind == "interleaved":
            passes = interleaved(T, self.subsets)
        elif self.kind == "refine":
            passes = refine(T, self.refinements)
        elif self.kind == "chunked":
            passes = chunked(T, self.chunk)
        else:
            passes = sequential(T) if self.kind == "sequential" else plain(T)
        if self.loss_weights is not None and len(self.loss_weights) != len(passes):
            raise ValueError(f"{len(self.loss_weights)} loss weights for {len(passes)} passes")
        if not 0 <= self.forward_passes < len(passes):
            raise ValueError(f"forward_passes must be from 0 to {len(passes) - 1}, one less than the passes, not {self.forward_passes}")
        return passes

    def weights(self, n):
        """The loss weights of n passes, of sum 1."""
        weights = self.loss_weights or [float(i >= self.forward_passes) for i in range(n)]
        return [w / sum(weights) for w in weights]

    def flops_per_token(self, model, T, projections=True):
        """
        Training FLOPs per token of a sequence of T tokens: those of the model's plain pass, times the positions of each pass,
        without what a pass leaves out (the head where it has no loss, layers by top(), the backward, which is two thirds);
        and the memory projections (unless told not to), from the first pass that has memory on, with kv_refresh once more
        after each pass for the positions of every later one.
        """
        passes, total = self.passes(T), 0
        weights = self.weights(len(passes))
        for i, positions in enumerate(passes):
            n_layer = top(model.config, passes, i, weights, self.kv_refresh)
            flops = model.flops_per_token(T, n_layer, head=weights[i] > 0)
            if i > 0 and projections:  # the first pass has memory zero
                entry = 4 if self.detach and i >= self.forward_passes or i == self.forward_passes else 6  # 4: no gradient into the memory
                flops += entry * (1 + i * self.kv_refresh) * sum(m.weight.numel() for m in (*model.mem_k[:n_layer], *model.mem_v[:n_layer]))
            total += len(positions) * flops / (3 if i < self.forward_passes else 1)
        return total / T

    def deeper(self):
        """The same with one refinement more, forward only: a memory that was handed over once more is what the loss is of."""
        weights = self.loss_weights and [0.0, *self.loss_weights]
        return replace(self, refinements=self.refinements + 1, forward_passes=self.forward_passes + 1, loss_weights=weights)

    def cost(self, model, T):
        """
        Baseline-equivalent passes: as the paper counts them, a pass over all positions is one and memory projections are
        not counted; one that leaves something out is its share of a pass's FLOPs.
        """
        return self.flops_per_token(model, T, projections=False) / model.flops_per_token(T)


# -----------------------------------------------------------------------------
# Running them

def newest(parts):
    """The memory of all positions computed so far, (B, n, D), from parts (positions, m) as run() keeps them."""
    memory = parts[0][1].new_zeros(parts[0][1].size(0), max(p[-1] for p, _ in parts) + 1, parts[0][1].size(2))
    for positions, m in parts:
        memory = memory.slice_scatter(m, 1, positions.start, positions.stop, positions.step)
    return memory

def previous(parts, positions):
    """
    Equation (5): m_{p-1} for every p in positions, (B, P, D), from the newest memories, parts (positions, m); zero before
    the first token and where nothing has been computed yet (within a chunk).
    """
    before = int(positions[0] == 0)
    wanted = range(positions[0] + before * positions.step - 1, positions[-1], positions.step)
    end = max(p[-1] for p, _ in parts)
    p, m = next(((p, m) for p, m in parts if wanted and wanted[0] in p and wanted.step % p.step == 0 and p[-1] >= min(wanted[-1], end)), (None, None))
    if p is None:  # in several parts
        m = newest(parts)
        p = range(m.size(1))
    found = m[:, p.index(wanted[0])::wanted.step // p.step][:, :len(wanted)] if wanted else m[:, :0]
    return F.pad(found, (0, 0, before, len(positions) - before - found.size(1)))

def at(x, passes):
    """x (B, T, D) at the positions of each pass: views, taken so that their gradients meet in few sums."""
    ends = [0] + [p.stop for p in passes]
    if ends[-1] == x.size(1) and all(p.start == end and p.step == 1 for p, end in zip(passes, ends)):  # one after another
        return x.split([len(p) for p in passes], dim=1)
    classes = {p.step: residues(x, p.step, 1) for p in passes if p.step > 1}
    return [classes[p.step][p.start] if p.step > 1 else x if len(p) == x.size(1) else take(x, p) for p in passes]

def top(config, passes, i, weights, kv_refresh):
    """
    How many layers pass i has to run: where it has no loss and the next one writes all of its keys and values anew, it
    leaves nothing but memory, and the layers up to the source do.
    """
    again = i + 1 < len(passes) and passes[i + 1] == passes[i]
    return config.source_layer + 1 if again and not weights[i] and not kv_refresh else config.n_layer

def run(model, idx, passes, kv_refresh=False, detach=False, forward_passes=0, weights=None):
    """
    Run a schedule on tokens idx (B, T): for each pass yields its positions, its hidden states (B, P, D), and the newest
    memories of all positions computed so far, as parts (see newest()). Gradients flow from later passes into earlier ones
    through the keys, values and memories, unless detach; not into the first `forward_passes`. Hidden is None for a pass
    whose loss has weight 0, and what only its loss would need is not computed (weights, one a pass; None: all count).
    """
    weights = weights or [1] * len(passes)
    kv_refresh = kv_refresh and model.config.kv_memory  # without projected memory there is nothing to renew
    kv = KVBuffer(model.config.n_layer, keep_local=kv_refresh)
    memories = []  # parts, as the store keeps keys and values
    x0, value_embeds = model.embed(idx)  # once for all passes
    x0, value_embeds = at(x0, passes), [at(x, passes) if x is not None else [None] * len(passes) for x in value_embeds]
    for i, positions in enumerate(passes):
        left = split(memories, positions, 1)
        recurrent = previous(left if positions.step > 1 else memories, positions) if memories and model.config.lrt != "none" else None
        embedded = x0[i], [x[i] for x in value_embeds]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= forward_passes):
            hidden, source = model(take(idx, positions), positions, kv, recurrent, top(model.config, passes, i, weights, kv_refresh), embedded)
        memories = [(positions, source), *left]
        yield positions, hidden if weights[i] else None, memories
        kv = kv.copy()  # a layer that is run again in the backward must find the store as it was
        if detach:
            kv.detach()
            memories = [(p, m.detach()) for p, m in memories]
        if kv_refresh:
            for later in passes[i + 1:]:
                model.refresh(later, kv, previous(memories, later))

# relative change of the memories at which prefill takes them for final: some way above the rounding of one pass
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

@torch.no_grad()
def prefill(model, idx, kv, subsets=2, max_sweeps=24, tolerance=None, first=0, memory=None, ends=None):
    """
    Exact parallel prefill: fill the cache for tokens idx (B, T) as decoding them one by one would, in a few passes.
    The recurrence is a fixed point; sweeps over S interleaved subsets repeat from the latest iterate until no memory
    moves by more than `tolerance` (relative; default: by dtype). A sweep runs the layers up to the source, and starts
    behind the positions that are final: those that stopped moving together with all before them, and S more each time
    in any case. What is not final after max_sweeps is decoded token by token, so the result is never an unconverged
    one. A last full pass computes all layers of all final positions.
    kv: a KVCache that is not rolling, of length first + T at least; its `start` tells rows of different lengths, aligned
    at their ends, apart. subsets: 2 was the fastest at long prompts (bench.py prefill).
    first: how many positions the cache holds already, idx being the next ones, and memory (B, 1, D) that of the last of
    them (None: zero). ends (B,) int64: the position at which each row's text ends; what follows is padding, for which
    nothing waits, and whose memory is zero.
    Returns hidden (B, T, D); the memory of the last position (B, 1, D), None where lrt is none; and the number of sweeps,
    the first included.
    """
    T, config = idx.size(1), model.config
    if config.lrt == "none":
        return model(idx, range(first, first + T), kv)[0], None, 1
    tolerance = TOLERANCE[kv.k[0].dtype] if tolerance is None else tolerance
    p, padding = torch.arange(first, first + T, device=idx.device)[:, None], None
    for outside in (kv.start is not None and p < kv.start[:, None, None], ends is not None and p >= ends[:, None, None]):
        if outside is not False:
            padding = outside if padding is None else padding | outside

    def sweep(positions, memory, n_layer=None):
        """Recompute positions (from `first` on) with this memory: hidden, and the new memory with padding kept at zero."""
        at = range(first + positions.start, first + positions.stop, positions.step)
        hidden, source = model(take(idx, positions), at, kv, memory, n_layer)
        return hidden, source if padding is None else source.masked_fill(take(padding, positions), 0)

    _, source = sweep(range(T), None if memory is None else F.pad(memory, (0, 0, 0, T - 1)), config.source_layer + 1)
    # memory[:, p] is what position p reads, equation (5); memory[:, p + 1] is what it leaves
    memory = torch.cat([torch.zeros_like(source[:, :1]) if memory is None else memory, source], dim=1)
    final, sweeps = 1, 1  # the first token's memory was there from the start
    while final < T and sweeps < max_sweeps:
        moved = memory.new_zeros(T)
        for i in range(final, min(final + subsets, T)):
            positions = range(i, T, subsets)
            _, source = sweep(positions, take(memory, positions), config.source_layer + 1)
            old = take(memory, range(i + 1, T + 1, subsets))
            take(moved, positions, dim=0).copy_((source - old).square().mean(-1).sqrt().amax(0))  # memories have RMS 1
            old.copy_(source)
        moving = (moved > tolerance).nonzero()
        final = min(max(final + subsets, moving[0].item()), T) if len(moving) else T
        sweeps += 1
    hidden, last = sweep(range(final), memory[:, :final])
    done, last = [hidden], last[:, -1:]
    for t in range(final, T):
        hidden, last = sweep(range(t, t + 1), last)
        done.append(hidden)
    return torch.cat(done, dim=1), last, sweeps

class TrainStep(nn.Module):
    """All passes of a training step as one module, for DDP and torch.compile to wrap."""

    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, idx, targets, schedule=None):
        """
        idx, targets (B, T) int64 -> the training loss, equation (4): the mean (or weighted mean) over the passes of the
        mean cross-entropy over the positions each computed; and those means (passes,), detached, NaN where a pass has
        weight 0. Nats. schedule: another one for this step.
        """
        schedule = schedule or self.schedule
        passes = schedule.passes(idx.size(1))
        weights = schedule.weights(len(passes))
        hidden = [hidden for _, hidden, _ in run(self.model, idx, passes, schedule.kv_refresh, schedule.detach, schedule.forward_passes, weights)]
        loss, means = self.model.loss(*zip(*[(x, take(targets, positions), w) for x, positions, w in zip(hidden, passes, weights) if w]))
        means = iter(means)
        return loss, torch.stack([next(means) if w else loss.new_full((), math.nan) for w in weights])

@torch.no_grad()
def pass_losses(model, idx, targets, schedule):
    """
    Losses of every pass and token for evaluation, idx and targets (B, T) int64: losses (passes, B, T) in nats, zero
    where a pass did not compute; mask (passes, T) bool, True where it did; merged (B, T): each position scored by the
    last pass that computed it.
    """
    passes = schedule.passes(idx.size(1))
    losses = torch.zeros(len(passes), *idx.shape, device=idx.device, dtype=torch.promote_types(
        model.compute_dtype or model.wte.weight.dtype, torch.float32))
    mask = torch.zeros(len(passes), idx.size(1), dtype=torch.bool, device=idx.device)
    merged = torch.zeros_like(losses[0])
    for i, (positions, hidden, _) in enumerate(run(model, idx, passes, schedule.kv_refresh)):
        loss = model.token_loss(hidden, take(targets, positions))
        take(losses[i], positions).copy_(loss)
        take(merged, positions).copy_(loss)
        take(mask[i], positions, dim=0).fill_(True)
    return losses, mask, merged
