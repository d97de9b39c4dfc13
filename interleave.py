"""
Interleaved parallel training and its relatives (LRT, arXiv 2605.26797). Every schedule is a list of passes,
a pass is a range of positions, and run() runs any such list against the model's one forward. A new schedule
is one more function that returns a list.

    loss = mean over the passes of L_i, the mean cross-entropy over the positions that pass i computed   (4)
    memory of a pass = newest m, shifted right by one, at its positions                                  (5)
    keys and values = fresh ones at its own positions, the newest written ones elsewhere                 (6)

Gradients flow from later passes through memory, keys and values into earlier ones. prefill() repeats full
passes without gradients until no memory changes: the exact recurrence of a whole prompt, computed in
parallel.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import KVBuffer, residues, split, take

# -----------------------------------------------------------------------------
# Schedules for a sequence of T tokens

def plain(T):
    """One pass over all positions, with the first memory: the baseline, the control, LRT's initialization."""
    return [range(T)]

def interleaved(T, subsets=2):
    """The paper's way: initialize, then recompute S disjoint subsets, p mod S = 0 .. S-1, with new memory."""
    subsets = min(subsets, T)
    return [range(T)] + [range(i, T, subsets) for i in range(subsets)]

def refine(T, refinements=3):
    """Initialize, then K passes over all positions. With K >= T-1 the last pass is the exact recurrence."""
    return [range(T)] * (1 + refinements)

def draft(T, drafts=1, subsets=1):
    """
    Hand memory over first, then train. The drafts run forward only: one pass over all positions, then sweeps
    of S subsets, as in WhiteMatter (arXiv 2608.18486). One more sweep is what is trained. With S = 1, a sweep
    is one pass over everything. Without drafts, the first pass is what is trained.
    """
    sweep = [range(i, T, subsets) for i in range(min(subsets, T))]
    return [range(T)] + sweep * drafts

def chunked(T, chunk=64):
    """Contiguous chunks, left to right: memory only crosses a chunk's border. The paper's weak baseline."""
    return [range(start, min(start + chunk, T)) for start in range(0, T, chunk)]

def sequential(T):
    """Token by token: the exact recurrence, differentiable. Slow, and the reference for everything else."""
    return [range(t, t + 1) for t in range(T)]

@dataclass
class Schedule:
    """A schedule and its options, as train.py's flags give them and as a checkpoint keeps them."""
    kind: str = "interleaved"  # plain | interleaved | refine | draft | chunked | sequential
    subsets: int | None = None  # interleaved, draft: S; None: 2, and 1 for draft
    refinements: int = 3  # refine: K
    drafts: int = 1  # draft: how often memory is handed over before the passes that are trained
    chunk: int = 64  # chunked: tokens a chunk
    kv_refresh: bool = False  # interleaved: after each pass, renew the memory term where later passes go
    detach: bool = False  # no gradient from a pass into the ones before it
    loss_weights: list | None = None  # one weight a pass; None: the plain mean, equation (4)

    def __post_init__(self):
        """Raises ValueError for a schedule that cannot be run."""
        kinds = ("plain", "interleaved", "refine", "draft", "chunked", "sequential")
        if self.kind not in kinds:
            raise ValueError(f"schedule {self.kind!r} is none of {', '.join(kinds)}")
        if self.subsets is None:
            self.subsets = 1 if self.kind == "draft" else 2
        for name, least in (("subsets", 1), ("refinements", 1), ("drafts", 0), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.kv_refresh and self.kind != "interleaved":
            raise ValueError(f"kv_refresh goes with the interleaved schedule, not with {self.kind}")
        if self.loss_weights is not None:
            if self.kind == "draft":
                raise ValueError("loss weights do not go with draft: its drafts have no loss")
            if min(self.loss_weights) < 0 or not 0 < sum(self.loss_weights) < math.inf:
                raise ValueError("loss weights must be finite, not negative, and not all zero")

    def passes(self, T):
        """The ranges for T tokens. Raises ValueError if there is not one loss weight for each."""
        if self.kind == "plain":
            passes = plain(T)
        elif self.kind == "interleaved":
            passes = interleaved(T, self.subsets)
        elif self.kind == "refine":
            passes = refine(T, self.refinements)
        elif self.kind == "draft":
            passes = draft(T, self.drafts, self.subsets)
        elif self.kind == "chunked":
            passes = chunked(T, self.chunk)
        else:
            passes = sequential(T)
        if self.loss_weights is not None and len(self.loss_weights) != len(passes):
            raise ValueError(f"{len(self.loss_weights)} loss weights for {len(passes)} passes")
        return passes

    def forward_passes(self, T):
        """How many of the passes for T tokens, from the first on, have no loss and no gradient."""
        if self.kind != "draft" or self.drafts == 0:
            return 0
        return 1 + min(self.subsets, T) * (self.drafts - 1)

    def weights(self, T):
        """The loss weights of the passes for T tokens, of sum 1."""
        weights = self.loss_weights
        if weights is None:
            forward_passes = self.forward_passes(T)
            weights = [0.0] * forward_passes + [1.0] * (len(self.passes(T)) - forward_passes)
        total = sum(weights)
        return [w / total for w in weights]

    def flops_per_token(self, model, T, projections=True):
        """
        Training FLOPs per token of a sequence of T tokens: for every pass, those of the model's plain pass
        times the pass's positions, less what it leaves out: the output head where it has no loss, layers by
        layers_needed(), and in a forward-only pass the backward, which is two thirds. projections: with the
        memory projections.
        """
        passes = self.passes(T)
        weights = self.weights(T)
        forward_passes = self.forward_passes(T)
        needed = layers_needed(model.config, passes, weights, self.kv_refresh)
        total = 0
        for i, positions in enumerate(passes):
            forward_only = i < forward_passes
            flops = model.flops_per_token(T, needed[i], head=weights[i] > 0)
            if projections and (i > 0 or model.config.first_memory != "zero"):
                # a matrix entry and a position: forward, gradient of the weight, gradient of the memory
                per_entry = 2 + 2 + 2
                memory_is_forward_only = i > 0 and i == forward_passes
                memory_is_detached = i > 0 and self.detach and not forward_only
                if memory_is_forward_only or memory_is_detached:
                    per_entry -= 2
                if self.kv_refresh:  # each of the i earlier passes has renewed the memory term here
                    per_entry *= 1 + i
                projections_run = model.memory_projections(needed[i])
                flops += per_entry * sum(m.weight.numel() for m in projections_run)
            total += len(positions) * flops / (3 if forward_only else 1)
        return total / T

    def cost(self, model, T):
        """
        Baseline-equivalent passes, as the paper counts them: a pass over all positions is one, one that
        leaves something out is its share of the FLOPs, and memory projections are not counted.
        """
        return self.flops_per_token(model, T, projections=False) / model.flops_per_token(T)


# -----------------------------------------------------------------------------
# The newest memories, kept as disjoint parts (positions, m (B, P, D)), like the keys and values of a KVBuffer

def newest_memory(parts):
    """The memories of all positions computed so far, (B, n, D); zero where none has been computed."""
    n = max(positions[-1] for positions, _ in parts) + 1
    _, first = parts[0]
    memory = first.new_zeros(first.size(0), n, first.size(2))
    for positions, m in parts:
        memory = memory.slice_scatter(m, 1, positions.start, positions.stop, positions.step)
    return memory

def part_of(parts, wanted):
    """
    The part that holds the memories at the positions `wanted`, as many of them as have been computed; if
    they are spread over several parts, all of them put together.
    """
    newest = max(positions[-1] for positions, _ in parts)
    for positions, m in parts:
        same_residue = wanted[0] in positions and wanted.step % positions.step == 0
        if same_residue and positions[-1] >= min(wanted[-1], newest):
            return positions, m
    memory = newest_memory(parts)
    return range(memory.size(1)), memory

def previous_memory(parts, positions, first_memory=None):
    """
    Equation (5): the newest m_{p-1} for every p in positions, (B, P, D). Before the first token it is zero.
    Where none has been computed yet (in a first pass, within a chunk) it is taken from first_memory
    (B, T, D), and zero without that; None if it is zero everywhere.
    """
    wanted = range(positions[0] - 1, positions[-1], positions.step)
    if positions[0] == 0:
        wanted = wanted[1:]  # there is nothing before the first token
    if not parts and first_memory is None:
        return None
    if parts and wanted:
        available, m = part_of(parts, wanted)
        found = m[:, available.index(wanted[0])::wanted.step // available.step][:, :len(wanted)]
    else:
        m = first_memory if first_memory is not None else parts[0][1]
        found = m[:, :0]
    missing = wanted[found.size(1):]
    if missing and first_memory is not None:
        found = torch.cat([found, take(first_memory, missing)], dim=1)
    zeros_before = len(positions) - len(wanted)
    zeros_behind = len(wanted) - found.size(1)
    return F.pad(found, (0, 0, zeros_before, zeros_behind))


# -----------------------------------------------------------------------------
# Running a schedule

def gather_positions(x, passes):
    """
    x (B, T, D) at the positions of each pass: a list of views, taken so that their gradients meet in few
    sums.
    """
    ends = [0] + [positions.stop for positions in passes]
    consecutive = all(p.start == end and p.step == 1 for p, end in zip(passes, ends))
    if consecutive and ends[-1] == x.size(1):
        return x.split([len(positions) for positions in passes], dim=1)
    classes = {positions.step: residues(x, positions.step, 1) for positions in passes if positions.step > 1}
    views = []
    for positions in passes:
        if positions.step > 1:
            views.append(classes[positions.step][positions.start])
        elif len(positions) == x.size(1):
            views.append(x)
        else:
            views.append(take(x, positions))
    return views

def layers_needed(config, passes, weights, kv_refresh):
    """
    How many layers each pass has to run, a list. If a pass has no loss, and the next pass with all layers
    writes all keys and values anew, it leaves nothing but memory, which is complete after the source layer.
    """
    everything = range(max(positions[-1] for positions in passes) + 1)
    needed = [config.n_layer] * len(passes)
    next_with_all_layers = len(passes) - 1
    for i in reversed(range(len(passes) - 1)):
        overwritten = passes[next_with_all_layers] == everything
        if overwritten and not weights[i] and not kv_refresh:
            needed[i] = config.source_layer + 1
        else:
            next_with_all_layers = i
    return needed

def run(model, idx, passes, kv_refresh=False, detach=False, forward_passes=0, weights=None):
    """
    Run a schedule on tokens idx (B, T). For each pass, yields its positions, its hidden states (B, P, D),
    and the newest memories of all positions computed so far, as parts (see newest_memory()). Gradients flow
    from later passes into earlier ones through keys, values and memories, except with detach, and never
    into the first `forward_passes`. weights: one loss weight a pass; where it is 0, hidden is None, and
    what only the loss would need is not computed. None: all passes count.
    """
    config = model.config
    if weights is None:
        weights = [1] * len(passes)
    kv_refresh = kv_refresh and config.kv_memory  # without projected memory there is nothing to renew
    needed = layers_needed(config, passes, weights, kv_refresh)
    kv = KVBuffer(config.n_layer, keep_local=kv_refresh)
    memories = []

    # what is looked up by token, once for all passes
    embedding, x0, value_embeds = model.embed(idx)
    first_memory = embedding if config.first_memory == "embedding" else None
    embedding = gather_positions(embedding, passes)
    x0 = gather_positions(x0, passes)
    gathered = []
    for x in value_embeds:
        gathered.append([None] * len(passes) if x is None else gather_positions(x, passes))

    for i, positions in enumerate(passes):
        # the memory that this pass reads
        left = split(memories, positions, 1)
        memory = None
        if config.lrt != "none":
            is_subset = positions.step > 1 and left  # it reads memories at positions that it leaves alone
            memory = previous_memory(left if is_subset else memories, positions, first_memory)

        # the pass
        embedded = embedding[i], x0[i], [x[i] for x in gathered]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= forward_passes):
            hidden, source = model(take(idx, positions), positions, kv, memory, needed[i], embedded)
        memories = [(positions, source), *left]
        yield positions, hidden if weights[i] else None, memories

        # what the next pass reads
        kv = kv.copy()  # a layer that is run again in the backward must find the store as it was
        if detach:
            kv.detach()
            memories = [(positions, m.detach()) for positions, m in memories]
        if kv_refresh:
            for later in passes[i + 1:]:
                model.refresh(later, kv, previous_memory(memories, later))

class TrainStep(nn.Module):
    """All passes of a training step as one module, for DDP and torch.compile to wrap."""

    def __init__(self, model, schedule):
        super().__init__()
        self.model = model
        self.schedule = schedule

    def forward(self, idx, targets, schedule=None):
        """
        idx, targets (B, T) int64 -> the training loss, equation (4) with the schedule's loss weights, and
        the mean cross-entropy of each pass over the positions it computed: (passes,), detached, NaN where
        its weight is 0. Nats. schedule: another one for this step.
        """
        if schedule is None:
            schedule = self.schedule
        T = idx.size(1)
        passes = schedule.passes(T)
        weights = schedule.weights(T)
        options = schedule.kv_refresh, schedule.detach, schedule.forward_passes(T), weights
        hidden = [hidden for _, hidden, _ in run(self.model, idx, passes, *options)]

        # the loss of the passes that have one
        counted = [i for i, weight in enumerate(weights) if weight]
        loss, counted_means = self.model.loss(
            [hidden[i] for i in counted],
            [take(targets, passes[i]) for i in counted],
            [weights[i] for i in counted],
        )
        means = [loss.new_full((), math.nan)] * len(passes)
        for i, mean in zip(counted, counted_means):
            means[i] = mean
        return loss, torch.stack(means)

@torch.no_grad()
def pass_losses(model, idx, targets, schedule):
    """
    The losses of every pass and token, for evaluation. idx and targets (B, T) int64 -> losses (passes, B,
    T) in nats, zero where a pass did not compute; mask (passes, T) bool, True where it did; merged (B, T):
    each position scored by the last pass that computed it.
    """
    B, T = idx.shape
    passes = schedule.passes(T)
    dtype = torch.promote_types(model.compute_dtype or model.wte.weight.dtype, torch.float32)
    losses = torch.zeros(len(passes), B, T, device=idx.device, dtype=dtype)
    mask = torch.zeros(len(passes), T, dtype=torch.bool, device=idx.device)
    merged = torch.zeros(B, T, device=idx.device, dtype=dtype)
    for i, (positions, hidden, _) in enumerate(run(model, idx, passes, schedule.kv_refresh)):
        loss = model.token_loss(hidden, take(targets, positions))
        take(losses[i], positions).copy_(loss)
        take(merged, positions).copy_(loss)
        take(mask[i], positions, dim=0).fill_(True)
    return losses, mask, merged


# -----------------------------------------------------------------------------
# Exact parallel prefill

# prefill takes a memory for final when it moves by less, relative to its size: above the rounding of a pass
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
CONTRACTION = 10  # by which a sweep reduces what memories of trained models move, about (research/SPEED.md)

@torch.no_grad()
def decode_tokens(model, idx, kv):
    """
    The exact recurrence as a model decodes, one forward a token: idx (B, T) -> hidden (B, T, D). The referee
    of prefill(), which gives the same much faster.
    """
    memory, done = None, []
    for t in range(idx.size(1)):
        hidden, memory = model(idx[:, t:t + 1], range(t, t + 1), kv, memory)
        done.append(hidden)
    return torch.cat(done, dim=1)

@torch.no_grad()
def prefill(model, idx, kv, max_sweeps=24, tolerance=None, first=0, memory=None, ends=None, recurrence=True):
    """
    Fill the cache for tokens idx (B, T) exactly as decoding them one by one would, in a few passes.

    The recurrence is a fixed point. Sweeps over all positions, each with the memories that the one before has
    left, are repeated until no memory moves by more than `tolerance` (relative; None: by dtype). A sweep runs
    the layers up to the source, or all layers if it is likely to be the last. Settled are the positions that
    stopped moving together with all before them, at least one more each time, because position t is exact
    after t + 1 sweeps. What is not settled after max_sweeps is decoded token by token, so the result is never
    an unconverged one.

    kv: a KVCache that is not rolling, of length first + T at least. It may have a `start` for each row.
    first: how many positions the cache holds already, idx being the next ones.
    memory: that of the last of these positions, (B, 1, D); None: zero.
    ends: (B,) int64, the position at which the text of each row ends; what follows is padding, for which
    nothing waits, and whose memory is zero.
    recurrence: False stops after the first pass, to see what the model is worth without what follows.

    Returns hidden (B, T, D); the memory that the next position reads (B, 1, D), None for zero; and the
    number of sweeps, the first included.
    """
    config = model.config
    T = idx.size(1)
    if tolerance is None:
        tolerance = TOLERANCE[kv.k[0].dtype]

    # the positions (B, T, 1) that are padding, before the text of a row or behind it
    position = torch.arange(first, first + T, device=idx.device)[:, None]
    padding = None
    if kv.start is not None:
        padding = position < kv.start[:, None, None]
    if ends is not None:
        behind = position >= ends[:, None, None]
        padding = behind if padding is None else padding | behind

    # what is looked up by token, once for all sweeps
    previous = kv.previous_tokens(range(first, first + T), idx) if config.smear else None
    embedding, x0, value_embeds = model.embed(idx, previous)

    def compute(positions, memory, n_layer=None):
        """
        Recompute positions, counted from `first` on, with this memory: hidden, and the new memory, 0 at
        padding.
        """
        embedded = take(embedding, positions), take(x0, positions), \
            [None if x is None else take(x, positions) for x in value_embeds]
        shifted = range(first + positions.start, first + positions.stop)
        hidden, source = model(take(idx, positions), shifted, kv, memory, n_layer, embedded)
        if padding is not None:
            source = source.masked_fill(take(padding, positions), 0)
        return hidden, source

    # what the first pass reads: behind `memory`, the first memories of these tokens, or zeros
    first_memory = model.first_memory(idx)
    if first_memory is not None:
        if padding is not None:
            first_memory = first_memory.masked_fill(padding, 0)
        if memory is None:
            memory = torch.zeros_like(first_memory[:, :1])
        read = torch.cat([memory, first_memory[:, :-1]], dim=1)
    elif memory is not None:
        read = F.pad(memory, (0, 0, 0, T - 1))
    else:
        read = None
    if not (recurrence and config.recurrent_memory):  # then the first pass is all there is
        if first > 0 and not model.appends_in_parallel:
            hidden = torch.cat([compute(range(t, t + 1), None)[0] for t in range(T)], dim=1)
        else:
            hidden, _ = compute(range(T), read)
        return hidden, None if first_memory is None else first_memory[:, -1:], 1
    if T == 1:  # it reads what the position before has left
        hidden, source = compute(range(1), read)
        return hidden, source, 1

    # The first sweep. Position p reads memories[:, p], equation (5), and leaves memories[:, p + 1].
    source_layers = config.source_layer + 1
    _, source = compute(range(T), read, source_layers)
    if memory is None:
        memory = torch.zeros_like(source[:, :1])
    memories = torch.cat([memory, source], dim=1)

    sweeps = 1
    settled = 1  # the first token has read its memory already
    may_be_last = settled == T - 1
    while sweeps < max_sweeps and settled < T:
        # A sweep from the first position on needs no mask, which saves more than a few settled positions
        # cost, and the last one computes what is returned.
        begin = 0 if may_be_last or settled < T // 4 else settled
        positions = range(begin, T)
        hidden, source = compute(positions, take(memories, positions), None if may_be_last else source_layers)
        sweeps += 1
        old = memories[:, begin + 1:]
        moved = (source - old).square().mean(-1).sqrt().amax(0)  # memories have RMS 1
        old.copy_(source)

        # positions that read what was settled are settled now
        if may_be_last and settled == T - 1:
            return hidden, source[:, -1:], sweeps
        moving = (moved > tolerance).nonzero()
        if len(moving) == 0:
            if may_be_last:
                return hidden, source[:, -1:], sweeps
            settled = T
        else:
            settled = min(max(settled + 1, begin + moving[0].item()), T)
        may_be_last = settled >= T - 1 or moved.max().item() <= CONTRACTION * tolerance

    # it did not converge: all layers of the settled positions, then token by token
    hidden, source = compute(range(settled), memories[:, :settled])
    done = [hidden]
    memory = source[:, -1:]
    for t in range(settled, T):
        hidden, memory = compute(range(t, t + 1), memory)
        done.append(hidden)
    return torch.cat(done, dim=1), memory, sweeps
