"""
The optimizers of training: Muon for the matrices, AdamW for everything else, their work shared out over the
ranks, and their schedules over the run.

recipes.OptimizerConfig has the choices.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from common import training_dtype

BATCH_AT_DEPTH_12 = 2**19  # tokens a step, at which the learning rates were tuned
BUCKET = 2**25  # parameters of at least this many elements together are sent in one message


# -----------------------------------------------------------------------------
# Parameter groups

def learning_rate_scale(total_batch):
    """What learning rates are multiplied by: the root of the batch over that of depth 12, at least 1."""
    return max(math.sqrt(total_batch / BATCH_AT_DEPTH_12), 1.0)

def weight_decay_scale(config, n_layer, total_batch, growth):
    """
    What the weight decay is multiplied by. By depth: (12 / n_layer)^2, at most 1. By horizon: so that the
    time over which a weight is forgotten, batch / (learning rate * weight decay * tokens of the run), is
    the same share of every run (arXiv 2405.13698). total_batch: tokens a step; growth: the tokens of the run
    over those of depth 12, both of the same number a parameter.
    """
    if config.decay_scaling == "depth":
        return min((12 / n_layer) ** 2, 1.0)
    return total_batch / BATCH_AT_DEPTH_12 / learning_rate_scale(total_batch) / growth

def make_optimizers(model, config, batch_scale=1.0, decay_scale=1.0, share=None):
    """
    The two optimizers of a GPT, (adamw, muon). Learning rates are multiplied by batch_scale, those of
    embeddings and head also by sqrt(768 / n_embd), weight decay by decay_scale. Every group keeps its
    `initial_lr` and, in Muon, `initial_weight_decay`, of which set_learning_rates() makes the current ones.
    In a process group, both are Sharded, or what share(adamw, muon) makes of them.
    """
    groups = model.parameter_groups()
    width_scale = (model.config.n_embd / 768) ** -0.5

    def group(lr, *roles, **options):
        """A group of AdamW with the parameters of some roles; config's options are those of the first."""
        params = [p for role in roles for p in groups[role]]
        return dict(params=params, lr=lr) | options | config.adamw_options.get(roles[0], {})

    # Muon
    matrices = list(groups["matrices"])
    if config.gate_lr is None:
        matrices += groups["gates"]
    memory_lr = config.matrix_lr if config.memory_lr is None else config.memory_lr
    muon_groups = [
        dict(params=matrices, lr=config.matrix_lr * batch_scale),
        dict(params=groups["memory projections"], lr=memory_lr * batch_scale),
    ]

    # AdamW
    embedding_lr = config.embedding_lr * width_scale * batch_scale
    if config.value_embedding_lr_frac is None:
        adamw_groups = [group(embedding_lr, "embedding", "value embeddings")]
    else:
        value_embedding_lr = config.value_embedding_lr_frac * embedding_lr
        adamw_groups = [group(embedding_lr, "embedding"), group(value_embedding_lr, "value embeddings")]
    adamw_groups.append(group(config.head_lr * width_scale * batch_scale, "head"))
    if config.gate_lr is not None:
        adamw_groups.append(group(config.gate_lr * batch_scale, "gates"))
    adamw_groups += [
        group(config.scalar_lr * 0.01 * batch_scale, "residual scalars"),
        group(config.scalar_lr * batch_scale, "x0 scalars", betas=(0.96, 0.95)),
        group(config.scalar_lr * batch_scale, "memory scalars"),
    ]
    if groups["smear"] or groups["backout"]:
        adamw_groups.append(group(config.smear_lr, "smear", "backout"))

    adamw = torch.optim.AdamW(adamw_groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True)
    muon = Muon(muon_groups, weight_decay=config.weight_decay * decay_scale, **config.muon_options)
    if share is not None:
        adamw, muon = share(adamw, muon)
    elif dist.is_initialized():
        adamw = Sharded(adamw, work=torch.numel)
        muon = Sharded(muon, work=lambda p: p.numel() * min(p.shape))
    for optimizer in (adamw, muon):
        for param_group in optimizer.param_groups:
            param_group["initial_lr"] = param_group["lr"]
            param_group["initial_weight_decay"] = param_group["weight_decay"]
    return adamw, muon

def set_learning_rates(optimizers, step, num_iterations, config):
    """
    Set learning rates and, of Muon, momentum and weight decay of this step, in place, from config's
    schedules. Returns the multiplier of the learning rates.
    """
    # the rates
    warmup = min((step + 1) / (config.warmup_steps + 1), 1.0)
    warmdown_steps = config.warmdown_ratio * num_iterations
    left = min((num_iterations - step) / warmdown_steps, 1.0) if warmdown_steps else 1.0
    multiplier = warmup * (left + (1 - left) * config.final_lr_frac)

    # Muon's momentum and weight decay
    momentum = 0.85 + config.momentum_rise * min(step / config.momentum_steps, 1.0)
    if config.final_momentum is not None and step >= config.momentum_steps:
        momentum = left * momentum + (1 - left) * config.final_momentum
    if config.decay_schedule == "linear":
        decay = 1 - step / num_iterations
    else:
        decay = (1 + math.cos(math.pi * step / num_iterations)) / 2

    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if "momentum" in group:  # Muon
                group["momentum"] = momentum
                group["weight_decay"] = group["initial_weight_decay"] * decay
    return multiplier


# -----------------------------------------------------------------------------
# Muon

# Coefficients of five steps X <- a X + (b XX' + c (XX')^2) X, which bring singular values up to 1 close to 1.
# Those of Keller Jordan's Muon (kellerjordan.github.io/posts/muon) end within 0.7 and 1.2:
QUINTIC = [(3.4445, -4.7750, 2.0315)] * 5
# Polar Express, arXiv 2505.16932, each step the best after those before it:
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]

def product_dtype(p):
    """
    The dtype in which matrices like p are multiplied: its own, but bf16 for float32 where that is fast.
    """
    return training_dtype(p.device) if p.dtype == torch.float32 else p.dtype

def norms(x):
    """The Frobenius norms of matrices (.., m, n), (.., 1, 1)."""
    return x.norm(dim=(-2, -1), keepdim=True)

def orthogonalize(x, polar_express=False):
    """Matrices x (.., m, n) with their singular values brought close to 1."""
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    if polar_express:
        x = x / (1.01 * norms(x) + 1e-6)
    else:
        x = x / norms(x).clamp_min(1e-7)
    for a, b, c in POLAR_EXPRESS if polar_express else QUINTIC:
        xx = x @ x.mT
        polynomial = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """
    Nesterov momentum, orthogonalized. By default it computes what torch.optim.Muon does, but all matrices of
    a shape in a group together, in batched products, and in product_dtype(). Options, for each group:

    polar_express: other coefficients of the orthogonalization
    rescale: rows brought to their mean norm before it (MuonEq, arXiv 2603.28254), and the whole to the norm
        of an orthogonal matrix behind it (Muon+, arXiv 2602.21545)
    beta2: rows (columns of a wide matrix) are divided by the root of the running mean of their squares, with
        the norm of the whole kept (NorMuon, arXiv 2510.05491)
    cautious: weight decay only where it and the update agree in sign (arXiv 2510.12402)

    nanochat has all four, the LRT release polar_express and beta2. A state_dict of torch.optim.Muon can be
    loaded.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0,
                 polar_express=False, rescale=False, beta2=None, cautious=False, dtype=None):
        self.dtype = dtype  # of the products; None: product_dtype()
        super().__init__(params, dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay,
            polar_express=polar_express, rescale=rescale, beta2=beta2, cautious=cautious))

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("polar_express", "rescale", "beta2", "cautious"):  # torch.optim.Muon has none
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """One step of parameters of one shape (m, n)."""
        m, n = params[0].shape
        dtype = self.dtype or product_dtype(params[0])
        updates = []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum_buffer"]
            buffer.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(buffer, group["momentum"]).to(dtype))  # Nesterov
        x = torch.stack(updates)

        if group["rescale"]:
            rows = x.norm(dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-6)
            x = x * (norms(x.float()) / m ** 0.5 / rows).to(dtype)
        x = orthogonalize(x, group["polar_express"]).to(params[0].dtype)
        if group["rescale"]:
            x = x * (min(m, n) ** 0.5 / norms(x).clamp_min(1e-6))
        if group["beta2"] is not None:
            x = self.normalize_variance(x, params, group["beta2"])

        lr = group["lr"] * max(1, m / n) ** 0.5
        for p, update in zip(params, x):
            if group["cautious"]:
                p.sub_(lr * (update + group["weight_decay"] * p * (update * p >= 0)))
            else:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=lr)

    def normalize_variance(self, x, params, beta2):
        """NorMuon's step behind the orthogonalization, for the updates x (N, m, n) of N parameters."""
        squares = x.square().mean(-1 if x.size(-2) >= x.size(-1) else -2, keepdim=True)
        means = []
        for p, square in zip(params, squares):
            mean = self.state[p].setdefault("mean_square", torch.zeros_like(square))
            means.append(mean.lerp_(square, 1 - beta2))
        normalized = x * torch.stack(means).clamp_min(1e-10).rsqrt()
        return normalized * (norms(x) / norms(normalized).clamp_min(1e-10))


# -----------------------------------------------------------------------------
# Several processes

def owners(work, world_size):
    """The rank that each piece of work goes to: the largest first, to the rank that has the least by then."""
    owner, load = [0] * len(work), [0] * world_size
    for i in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        owner[i] = min(range(world_size), key=load.__getitem__)
        load[owner[i]] += work[i]
    return owner

def broadcast(tensors, source):
    """Give all ranks the values that rank `source` has in these tensors, in few large messages."""
    bucket, size = [], 0
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        size += tensor.numel()
        if size < BUCKET and i < len(tensors) - 1:
            continue
        flat = torch.cat([x.flatten() for x in bucket])
        dist.broadcast(flat, source)
        for x, values in zip(bucket, flat.split([x.numel() for x in bucket])):
            x.copy_(values.view_as(x))
        bucket, size = [], 0

class Sharded:
    """
    An optimizer whose work is shared out over the ranks (ZeRO stage 1, arXiv 1910.02054). Each rank updates
    its share of the parameters, whole ones, and holds only their state; then it sends them to the others.
    work(p): how much work a parameter is, so that all shares are about the same.
    """

    def __init__(self, optimizer, work):
        self.optimizer = optimizer
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.owner = owners([work(p) for p in self.params], self.world_size)

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self):
        """Update all parameters, those of other ranks by what they send."""
        others = {}
        for p, owner in zip(self.params, self.owner):
            if owner != self.rank:
                others[p] = p.grad
                p.grad = None  # so the optimizer leaves it alone
        self.optimizer.step()
        for p, grad in others.items():
            p.grad = grad  # which may be a view of DDP's buckets, and stays one
        for rank in range(self.world_size):
            broadcast([p for p, owner in zip(self.params, self.owner) if owner == rank], rank)

    def state_dict(self):
        """
        This rank's share: the state_dict of the optimizer in one process, but with the state of this rank's
        parameters only. The states of all ranks together are that of one process.
        """
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        """Load this rank's share of the state_dict of all. Raises ValueError if it does not fit."""
        state = state_dict["state"]
        mine = [i for i, owner in enumerate(self.owner) if owner == self.rank and i in state]
        self.optimizer.load_state_dict(state_dict | {"state": {i: state[i] for i in mine}})
