"""
The two recipes, the LRT paper's and nanochat's: backbone, optimizers and flags. They are what a run has where
no flag says otherwise.

This file imports nothing of ours and no torch, because train.py --help prints these values and should not
wait for it.
"""

from dataclasses import dataclass, field, replace

# -----------------------------------------------------------------------------
# Optimizers

@dataclass
class OptimizerConfig:
    """
    Learning rates before they are scaled, how they change over the run, and options of the optimizers. The
    defaults are those of nanochat at the time when the LRT release forked it.
    """
    matrix_lr: float = 0.02  # Muon: the matrices of attention and MLP
    memory_lr: float | None = None  # Muon: the memory projections Rk and Rv; None: as the matrices
    embedding_lr: float = 0.3  # AdamW, like all that follow: token embedding and value embeddings
    value_embedding_lr_frac: float | None = None  # the latter's share of that; None: all of it, in one group
    head_lr: float = 0.004  # output head
    gate_lr: float | None = 0.02  # gates of keys and values, too thin for Muon; None: Muon, with the matrices
    scalar_lr: float = 0.5  # b and c of equation (1); a, the residual scalars, gets a hundredth of it
    smear_lr: float = 0.2  # smear and backout, for any batch
    warmup_steps: int = 40  # steps over which the rates rise linearly
    warmdown_ratio: float = 0.5  # share of the run, at its end, over which they fall linearly
    final_lr_frac: float = 0.0  # where they end, as a share of where they were

    weight_decay: float = 0.2  # of the matrices
    decay_scaling: str = "depth"  # by what weight_decay is scaled: depth | horizon, see weight_decay_scale()
    decay_schedule: str = "linear"  # how it falls to 0 over the run: linear | cosine
    momentum_rise: float = 0.10  # Muon's momentum rises from 0.85 by so much
    momentum_steps: int = 300  # over so many steps
    final_momentum: float | None = None  # where it falls to, as the rates fall; None: it stays

    muon_options: dict = field(default_factory=dict)  # of optim.Muon
    adamw_options: dict = field(default_factory=dict)  # of AdamW, a dict for a role of parameters

    @classmethod
    def from_args(cls, args, recipe):
        """The flags, and what has no flag as in `recipe`, an OptimizerConfig."""
        given = {name: value for name, value in vars(args).items() if name in cls.__dataclass_fields__}
        return replace(recipe, **given)

# nanochat's optimizer of 2026-07-03 (github.com/karpathy/nanochat, commit 92d63d4)
NANOCHAT_OPTIMIZER = OptimizerConfig(
    value_embedding_lr_frac=0.5,
    head_lr=0.008,
    gate_lr=None,
    warmup_steps=39,  # there, the first step at the full rate is one of the 40
    warmdown_ratio=0.65,
    final_lr_frac=0.05,
    weight_decay=0.28,
    decay_scaling="horizon",
    decay_schedule="cosine",
    momentum_rise=0.12,
    momentum_steps=400,
    final_momentum=0.90,
    muon_options=dict(polar_express=True, rescale=True, beta2=0.9, cautious=True),
    adamw_options={
        "embedding": dict(betas=(0.8, 0.995), weight_decay=0.001),
        "value embeddings": dict(betas=(0.8, 0.995), weight_decay=0.01),
        "head": dict(betas=(0.8, 0.96), weight_decay=0.01),
        "residual scalars": dict(weight_decay=0.05),
    },
)


# -----------------------------------------------------------------------------
# Backbones

# the fields in which nanochat's backbone of 2026-07-03 differs (github.com/karpathy/nanochat, commit 92d63d4)
NANOCHAT_BACKBONE = dict(
    short_window="quarter",
    value_embeds="alternate",
    smear=True,
    backout=True,
    gate_channels=12,
    value_gate=3.0,
    query_scale=1.2 * 1.2,  # of queries and of keys there
    rotary_base=100000.0,
    init="nanochat",
)


# -----------------------------------------------------------------------------
# Recipes

@dataclass
class Recipe:
    """What a run has where no flag says otherwise."""
    flags: dict  # values of flags
    model: dict = field(default_factory=dict)  # fields of GPTConfig that are not its defaults
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def value_of(self, flag):
        """The value of a flag that was not given; None if that is no matter of the recipe."""
        if flag in self.flags:
            return self.flags[flag]
        return getattr(self.optimizer, flag, None)

RECIPES = {
    # the LRT paper's: nanochat's at the time when its code was forked
    "paper": Recipe(dict(value_embeds="all", target_param_data_ratio=10.0, grad_clip=1.0)),
    # nanochat's of 2026-07-03
    "nanochat": Recipe(
        flags=dict(value_embeds="alternate", target_param_data_ratio=12.0, grad_clip=0.0),
        model=NANOCHAT_BACKBONE,
        optimizer=NANOCHAT_OPTIMIZER,
    ),
}

def fill_in(args):
    """Give the flags that were not given, None, the values of args.recipe, in place."""
    for name, value in vars(args).items():
        if value is None:
            setattr(args, name, RECIPES[args.recipe].value_of(name))

def make_optimizer_config(args):
    """The optimizers' configuration from train.py's flags and the recipe."""
    return OptimizerConfig.from_args(args, RECIPES[args.recipe].optimizer)
