"""
Can the numbers of a run be trusted? Three questions, each with a flag of train.py:

    --on-spike        A loss far above those before it: a bad batch, or weights that were led astray by one.
    --check-every     A flipped bit: a step is run twice, and hardware that works computes the same bits.
    --deterministic   The same bits from the same command on the same hardware, a GPU included.
"""

import os
import statistics
from collections import deque

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common import rank_and_world_size

WINDOW = 128  # losses that a new one is compared with
LEAST_LOSSES = 32  # with fewer than so many nothing is called a spike
SPIKE = 10.0  # robust standard deviations above the median
LEAST_DEVIATION = 0.005  # the standard deviation is taken for at least this share of the median
SUSPECTS = 4  # batches that are left out: the one with the spike, and those before it that led to it


# -----------------------------------------------------------------------------
# Spikes of the loss

class LossSpikes:
    """
    How far a loss lies above the recent ones, in standard deviations: those of the median and the median
    absolute deviation, which a few wild losses do not move.
    """

    def __init__(self, losses=()):
        self.recent = deque(losses, maxlen=WINDOW)

    def score(self, loss):
        """The robust z-score of a loss, 0 as long as there is too little to compare with."""
        if len(self.recent) < LEAST_LOSSES:
            return 0.0
        median = statistics.median(self.recent)
        deviation = 1.4826 * statistics.median(abs(x - median) for x in self.recent)  # exact for normal ones
        return (loss - median) / max(deviation, LEAST_DEVIATION * abs(median))

    def add(self, loss):
        self.recent.append(loss)

def suspects(rows_seen, rows_per_step, first):
    """
    The batches to leave out if that which begins with row rows_seen has a spike: the first rows of it and of
    those before it, back to row `first`.
    """
    earliest = max(first, rows_seen - (SUSPECTS - 1) * rows_per_step)
    return list(range(earliest, rows_seen + 1, rows_per_step))


# -----------------------------------------------------------------------------
# Flipped bits

def checksum(x):
    """A number, an int64 tensor, that changes if a bit of the tensor x flips: the sum of its words."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(words).sum(dtype=torch.int64)

class GradientChecksums:
    """
    Within `with GradientChecksums(model) as sums`, what every backward computes for every parameter is added
    up, before the ranks exchange it: so what differs tells the rank. The gradients of a sharded model do not
    exist before that; there it is what this rank has of them in the end.
    """

    def __init__(self, model):
        self.parameters = list(model.parameters())
        self.sums = [0] * len(self.parameters)

    def __enter__(self):
        self.hooks = []
        for i, p in enumerate(self.parameters):
            if not isinstance(p, DTensor):
                self.hooks.append(p.register_hook(lambda grad, i=i: self.add(i, grad)))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        for i, p in enumerate(self.parameters):
            if isinstance(p, DTensor) and p.grad is not None:
                self.add(i, p.grad.to_local())

    def add(self, i, grad):
        self.sums[i] = 3 * self.sums[i] + checksum(grad)  # in the order of the micro-batches

    def tolist(self):
        return [int(x) for x in self.sums]

def ranks_that_differ(first, second):
    """The ranks on which the numbers of two runs of a step differ, the same list on all of them."""
    _, world_size = rank_and_world_size()
    found = [first != second]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, first != second)
    return [rank for rank, differs in enumerate(found) if differs]


# -----------------------------------------------------------------------------
# The same bits

def use_deterministic_algorithms():
    """
    Let torch use only algorithms that give the same bits every time, and raise where it has none. That goes
    for the flash attention kernels that attention.py calls, too, which look at this switch themselves. To be
    called before CUDA starts, because cuBLAS reads its setting then.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
