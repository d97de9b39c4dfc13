"""The optimizers' groups and rates, and how they change over a run: design.md, section 8."""

import pytest
import torch
from helpers import assert_refused, cli

import train
from model import GPT, GPTConfig
from optim import OptimizerConfig, make_optimizers, set_learning_rates
from plan import make_plan

STEPS = 1000


def layerwise_gpt(n_layer):
    """A width of 48 makes sqrt(768 / width) = 4."""
    return GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=48,
                         lrt="layerwise"))

def group_of(optimizers, parameter):
    """The parameter group of one parameter, which is in exactly one."""
    found = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found += [group for p in group["params"] if p is parameter]
    group, = found
    return group

@pytest.mark.parametrize("role, lr, betas", [
    ("embedding", 4 * 0.3, (0.8, 0.95)),
    ("value embeddings", 4 * 0.3, (0.8, 0.95)),
    ("head", 4 * 0.004, (0.8, 0.95)),
    ("gates", 0.02, (0.8, 0.95)),
    ("residual scalars", 0.005, (0.8, 0.95)),
    ("x0 scalars", 0.5, (0.96, 0.95)),
    ("memory scalars", 0.5, (0.8, 0.95)),
    ("matrices", 0.02, None),
    ("memory projections", 0.02, None),
])
def test_rates_of_every_parameter(role, lr, betas):
    """At depth 24, a batch four times 2^19 tokens, and where the multiplier of the rates is 1."""
    model = layerwise_gpt(n_layer=24)
    optimizers = make_optimizers(model, OptimizerConfig(), batch_scale=2.0)
    set_learning_rates(optimizers, 0, STEPS, OptimizerConfig(warmup_steps=0))
    parameters = model.parameter_groups()[role]
    assert parameters
    for parameter in parameters:
        group = group_of(optimizers, parameter)
        assert group["lr"] == pytest.approx(2 * lr)
        if betas is None:
            assert group["weight_decay"] == pytest.approx(0.2 * (12 / 24) ** 2)
            assert group["nesterov"] and group["ns_steps"] == 5
        else:
            assert group["betas"] == betas
            assert group["weight_decay"] == 0 and group["eps"] == 1e-10

def test_weight_decay_does_not_grow_in_shallow_models():
    _, muon = make_optimizers(layerwise_gpt(n_layer=2), OptimizerConfig())
    assert [group["weight_decay"] for group in muon.param_groups] == [0.2, 0.2]

@pytest.mark.parametrize("step, multiplier, momentum, decay", [
    (0, 1 / 41, 0.85, 0.2),  # the first of 40 steps of warm-up
    (19, 20 / 41, 0.85 + 0.1 * 19 / 300, 0.2 * 0.981),
    (40, 1, 0.85 + 0.1 * 40 / 300, 0.2 * 0.96),
    (300, 1, 0.95, 0.2 * 0.7),
    (500, 1, 0.95, 0.2 * 0.5),  # warm-down begins
    (750, 0.5, 0.95, 0.2 * 0.25),
    (999, 1 / 500, 0.95, 0.2 * 0.001),
])
def test_a_run_of_1000_steps(step, multiplier, momentum, decay):
    config = OptimizerConfig()
    adamw, muon = optimizers = make_optimizers(layerwise_gpt(n_layer=2), config)
    assert set_learning_rates(optimizers, step, STEPS, config) == pytest.approx(multiplier)
    for group in adamw.param_groups:
        assert group["lr"] == pytest.approx(multiplier * group["initial_lr"])
        assert group["weight_decay"] == 0
    for group in muon.param_groups:
        assert group["lr"] == pytest.approx(multiplier * 0.02)
        assert group["momentum"] == pytest.approx(momentum)
        assert group["weight_decay"] == pytest.approx(decay)

@pytest.mark.parametrize("options, step, multiplier", [
    (dict(warmup_steps=0), 0, 1),
    (dict(warmdown_ratio=0), 999, 1),
    (dict(final_lr_frac=0.1), 900, 0.2 + 0.8 * 0.1),
    (dict(warmup_steps=999, warmdown_ratio=1), 499, 0.5 * 0.501),  # both at once multiply
])
def test_other_warm_ups_and_warm_downs(options, step, multiplier):
    assert set_learning_rates([], step, STEPS, OptimizerConfig(**options)) == pytest.approx(multiplier)

@pytest.mark.parametrize("flags, memory_init, memory_lr", [
    ([], 0.1, 0.02),
    (["--memory-init", "1", "--memory-lr", "0.005"], 1.0, 0.005),
])
def test_the_memory_can_start_and_train_otherwise(flags, memory_init, memory_lr):
    args = train.make_parser().parse_args(["--depth", "2", "--lrt", "layerwise", *flags])
    plan = make_plan(args, 32, 1, torch.float32)
    model, optimizers, _, _ = train.setup_training(args, plan, torch.device("cpu"), torch.float32)
    groups = model.parameter_groups()
    assert model.mem_lambdas.tolist() == pytest.approx([memory_init, memory_init])
    n_parameters = sum(len(group["params"]) for group in optimizers[1].param_groups)
    assert n_parameters == len(groups["matrices"]) + len(groups["memory projections"])
    for role, lr in (("memory projections", memory_lr), ("matrices", 0.02)):
        assert {group_of(optimizers, p)["initial_lr"] for p in groups[role]} == {lr}

def test_bad_memory_flags(data):
    assert_refused(cli("train.py", "--data", data, "--memory-init", "nan"), "memory_init", "nan")
    assert_refused(cli("train.py", "--data", data, "--memory-lr", "-1"), "--memory-lr", "-1")
