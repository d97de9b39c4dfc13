"""
The optimizers of training: Muon for the matrices, AdamW for everything else, and their schedules over the
run.

The recipe is nanochat's at the time when the LRT release forked it; every rate is a field of
OptimizerConfig, and train.py has a flag for each.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist


@dataclass
class OptimizerConfig:
    """Learning rates before they are scaled, and how they change over the run."""
    matrix_lr: float = 0.02  # Muon: the matrices of attention and MLP
    memory_lr: float | None = None  # Muon: the memory projections Rk and Rv; None: as the matrices
    embedding_lr: float = 0.3  # AdamW, like all that follow: token embedding and value embeddings
    head_lr: float = 0.004  # output head
    gate_lr: float = 0.02  # gates of keys and values, too thin for Muon
    scalar_lr: float = 0.5  # b and c of equation (1); a, the residual scalars, gets a hundredth of it
    weight_decay: float = 0.2  # of the matrices, for depths up to 12; falls with depth, and to 0 over the run
    warmup_steps: int = 40  # steps over which the rates rise linearly
    warmdown_ratio: float = 0.5  # share of the run, at its end, over which they fall linearly
    final_lr_frac: float = 0.0  # where they end, as a share of where they were

    @classmethod
    def from_args(cls, args):
        """From the flags of the same names."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

def make_optimizers(model, config, batch_scale=1.0):
    """
    The two optimizers of a GPT, (adamw, muon). All learning rates are multiplied by batch_scale, which is
    the square root of the batch in units of 2^19 tokens; those of embeddings and head also by sqrt(768 /
    n_embd). Every group keeps its `initial_lr` and `initial_weight_decay`, of which set_learning_rates()
    makes the current ones. In a process group, every rank updates its share of the parameters and holds
    only their state (ZeRO stage 1, arXiv 1910.02054), so Muon's orthogonalization is shared out as well.
    """
    groups = model.parameter_groups()
    width_scale = (model.config.n_embd / 768) ** -0.5
    depth_scale = min((12 / model.config.n_layer) ** 2, 1.0)
    memory_lr = config.matrix_lr if config.memory_lr is None else config.memory_lr

    adamw_groups = [
        dict(params=groups["embedding"] + groups["value embeddings"], lr=config.embedding_lr * width_scale),
        dict(params=groups["head"], lr=config.head_lr * width_scale),
        dict(params=groups["gates"], lr=config.gate_lr),
        dict(params=groups["residual scalars"], lr=config.scalar_lr * 0.01),
        dict(params=groups["x0 scalars"], lr=config.scalar_lr, betas=(0.96, 0.95)),
        dict(params=groups["memory scalars"], lr=config.scalar_lr),
    ]
    muon_groups = [
        dict(params=groups["matrices"], lr=config.matrix_lr),
        dict(params=groups["memory projections"], lr=memory_lr),
    ]
    adamw = make_sharded(torch.optim.AdamW, adamw_groups,
                         betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = make_sharded(torch.optim.Muon, muon_groups,
                        momentum=0.95, weight_decay=config.weight_decay * depth_scale)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] * batch_scale
            group["initial_weight_decay"] = group["weight_decay"]
    return adamw, muon

def make_sharded(optimizer_class, groups, **options):
    """
    An optimizer over these parameter groups, its state sharded over the ranks if there is a process
    group.
    """
    if not dist.is_initialized():
        return optimizer_class(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second to import
    return ZeroRedundancyOptimizer(groups, optimizer_class, **options)

def set_learning_rates(optimizers, step, num_iterations, config):
    """
    Set learning rates, momentum and weight decay of this step, in place, from config's warm-up and warm-down.
    Returns the multiplier of the learning rates.
    """
    warmup = min((step + 1) / (config.warmup_steps + 1), 1.0)
    warmdown_steps = config.warmdown_ratio * num_iterations
    left = min((num_iterations - step) / warmdown_steps, 1.0) if warmdown_steps else 1.0
    multiplier = warmup * (left + (1 - left) * config.final_lr_frac)
    momentum = 0.85 + 0.10 * min(step / 300, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            group["weight_decay"] = group["initial_weight_decay"] * (1 - step / num_iterations)
            if "momentum" in group:  # Muon
                group["momentum"] = momentum
    return multiplier
