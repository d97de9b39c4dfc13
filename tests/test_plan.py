"""The plan of a run before anything of its size is allocated: batch, FLOPs, memory, and --dry-run."""

import gc
import re

import pytest
import torch
from helpers import assert_refused, cli

import plan as plan_module
from flags import make_parser
from interleave import Schedule, TrainStep
from model import GPT
from plan import (
    automatic_batch,
    automatic_device_batch,
    describe_checkpoint,
    make_plan,
    memory_estimate,
    saved_bytes,
)

DRAFT = "--depth 2 --num-iterations 1000 --schedule draft"


def plan_of(flags, vocab_size=512):
    args = make_parser().parse_args(["--lrt", "shared", *flags.split()])
    return make_plan(args, vocab_size, 1, torch.float32)


# -----------------------------------------------------------------------------
# Dry run

def dry_run(*flags):
    code, out, err = cli("train.py", "--dry-run", "--depth", 20, "--lrt", "shared",
                         "--dtype", "float32", *flags)
    assert code == 0, err
    return out

def test_dry_run_needs_no_data_and_writes_nothing(here):
    """The plan of a model far too large for this machine takes seconds."""
    out = dry_run()
    assert not list(here.iterdir())
    for words in (
        "1,320,007,740 parameters",
        "memory projections 3,276,800",
        "interleaved, 3 passes",
        "FLOPs, 2.01 times those of plain passes",
        "1 x 64 x 8",
        "KV cache 262,297,600 bytes",
        "memory a process, bfloat16, 8 rows: weights 4.92 + gradients 4.92 + optimizers 8.36 + activations",
        "checkpoint: 14.25 GB in one file; rank 0 copies 14.25 GB at 20 GB/s",
    ):
        assert words in out, out

def test_a_copy_at_depth_20_on_8_processes_takes_less_than_half_a_second():
    """Rank 0 copies the weights and an eighth of the optimizers' states; the others an eighth."""
    gib = 2**30
    line = describe_checkpoint(dict(weights=4.92 * gib, optimizers=8.36 / 8 * gib), world_size=8)
    assert line.startswith("checkpoint: 14.26 GB in 8 files; rank 0 copies 6.40 GB at 20 GB/s"), line
    assert "which takes 0.32 s beside the next forward and backward" in line

def test_passes_without_a_gradient_leave_room_for_rows(here):
    out = dry_run("--schedule", "draft")
    assert "draft, 2 or 3 passes" in out
    assert "FLOPs, 1.29 times those of plain passes" in out and "1 x 32 x 16" in out, out

def test_dry_run_predicts_time_and_cost(here, monkeypatch):
    """FLOPs over the GPUs' peak, of which a share is reached; without a GPU it is an H100's."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = "--depth 4 --num-iterations 999999 --schedule plain --first-memory embedding --device cpu".split()
    out = dry_run(*flags, "--mfu", 0.4, "--dollars-per-hour", 24)
    flops = re.search(r"(\S+) FLOPs, ", out)[1]
    assert "at 40 % of the peak of 8 x NVIDIA H100 80GB HBM3" in out, out
    hours, dollars = re.search(r"(\S+) hours of training .* (\S+) dollars at 24 an hour", out).groups()
    assert float(hours) == pytest.approx(float(flops) / (8 * 989e12 * 0.4) / 3600, rel=0.01)
    assert float(dollars) == pytest.approx(24 * float(hours), rel=0.01)
    assert "dollars" not in dry_run(*flags, "--mfu", 0.4)
    assert "hours" not in dry_run(*flags)
    assert_refused(cli("train.py", "--mfu", 0.4), "--mfu goes with --dry-run")
    assert_refused(cli("train.py", "--dry-run", "--dollars-per-hour", 24), "goes with --mfu")
    for mfu in (0, 1.5, "nan"):
        assert_refused(cli("train.py", "--dry-run", "--mfu", mfu), "--mfu must be")

@pytest.mark.parametrize("flags", ["", "--n-kv-head 2", "--schedule chunked --chunk 24",
                                   "--schedule draft"])
@pytest.mark.parametrize("recompute", [False, True])
def test_dry_run_counts_what_a_step_keeps(flags, recompute):
    """The estimate, on the meta device, is what autograd and the store really hold after a forward."""
    plan = plan_of("--depth 2 --aspect-ratio 32 --head-dim 16 --max-seq-len 64 "
                   "--num-iterations 1 --total-batch-size 256 " + flags, vocab_size=64)
    counted = memory_estimate(plan, 1, torch.float32, recompute)["activations"]

    model = GPT(plan.config)
    model.recompute = recompute
    idx = torch.zeros(plan.device_batch, 64, dtype=torch.int64)
    gc.collect()
    real = saved_bytes(lambda: TrainStep(model, plan.deepest)(idx, idx), model.parameters())
    assert real > 5 * 10**5
    assert abs(counted - real) < 256  # but for a few numbers

@pytest.mark.parametrize("flags", [
    "--window-pattern L",
    "--window-pattern SSL --subsets 3",
    "--window-pattern L --source-layer 0",
    "--window-pattern SL --source-layer 28 --schedule draft",
    "--window-pattern S --schedule refine --refinements 1 --loss-weights 0 1",
    "--recipe nanochat --window-pattern L --activation-checkpointing",
])
def test_a_deep_model_is_counted_in_shallow_ones(flags, monkeypatch):
    """The extrapolation is the count of all layers, to the byte."""
    plan = plan_of("--depth 29 --aspect-ratio 1 --head-dim 16 --max-seq-len 16 "
                   "--num-iterations 1 --total-batch-size 16 " + flags, vocab_size=16)
    recompute = "checkpointing" in flags
    arguments = plan.deepest, plan.device_batch, torch.bfloat16, recompute
    of_all_layers = plan_module.count_activations(plan.config, *arguments)
    depths = []

    def count(config, *arguments):
        depths.append(config.n_layer)
        return of_shallow(config, *arguments)

    of_shallow = plan_module.count_activations
    monkeypatch.setattr(plan_module, "count_activations", count)
    assert plan_module.activation_bytes(plan, torch.bfloat16, recompute) == of_all_layers
    assert len(depths) > 1 and sum(depths) < 60 and max(depths) < 29

def test_optimizer_state_is_shared_by_the_ranks():
    plan = plan_of("--depth 2 --num-iterations 1")
    one, eight = (memory_estimate(plan, world_size, torch.float32, False) for world_size in (1, 8))
    assert eight["optimizers"] == one["optimizers"] // 8
    assert eight["weights"] == one["weights"] == 4 * plan.counts["total"]

def test_gradients_of_a_micro_batch_come_beside_those_they_are_added_to():
    """As many as the activations that they replace do not make room for."""
    flags = "--depth 2 --max-seq-len 64 --num-iterations 1 --total-batch-size 64"
    plan = plan_of(flags, vocab_size=32768)
    one, two = (memory_estimate(plan, world_size, torch.float32, False) for world_size in (1, 2))
    assert "new gradients" not in one
    assert two["new gradients"] == two["gradients"] - two["activations"] > 0

    flags = flags.replace("batch-size 64", "batch-size 128 --device-batch-size 1")
    assert memory_estimate(plan_of(flags, vocab_size=32768), 1, torch.float32, False) == two | {
        "optimizers": one["optimizers"]}


# -----------------------------------------------------------------------------
# The batch

@pytest.mark.parametrize("growth, unit, tokens", [
    (1, 2048, 2**19),  # depth 12, one rank
    (1, 8 * 2048, 2**19),
    (2 ** (9.6 / 0.383), 2048, 2 ** (19 + 10)),  # rounded to a power of two
    (2 ** (10.4 / 0.383), 2048, 2 ** (19 + 10)),
    (1, 3 * 2048, 80 * 3 * 2048),  # 85 sequences on each of three ranks, down to a multiple of 16
    (1, 2**17, 4 * 2**17),  # fewer than 16
    (1e-9, 2048, 2048),  # one sequence at the least
])
def test_automatic_batch(growth, unit, tokens):
    assert automatic_batch(growth, unit) == tokens

@pytest.mark.parametrize("rows, schedule, T, device_batch", [
    (64, Schedule("plain"), 2048, 16),
    (64, Schedule("plain"), 16, 16),  # never more
    (64, Schedule("interleaved"), 2048, 8),  # two passes' worth of positions
    (64, Schedule("draft", drafts=2), 2048, 16),  # a draft keeps nothing
    (64, Schedule("draft", drafts=2, subsets=2), 2048, 16),
    (64, Schedule("refine", refinements=3), 2048, 4),
    (12, Schedule("plain"), 2048, 4),  # it divides the rows
    (7, Schedule("plain"), 2048, 1),
    (64, Schedule("plain"), 2**16, 1),  # one, even if it is too large
])
def test_automatic_device_batch(rows, schedule, T, device_batch):
    assert automatic_device_batch(rows, schedule, T) == device_batch


# -----------------------------------------------------------------------------
# Steps that are not all alike

def test_the_last_quarter_has_one_draft_more():
    plan = plan_of(DRAFT)
    assert [plan.schedule_at(step).drafts for step in range(1000)] == [1] * 750 + [2] * 250
    assert [plan.scored_schedule(step).drafts for step in (1, 750, 751, 1000)] == [1, 1, 2, 2]

def test_pass_mix_draws_the_passes_of_every_step():
    """From the seed and the step alone, so that all ranks, and a run that goes on, draw the same."""
    flags = f"{DRAFT} --first-memory embedding --pass-mix"

    def drawn(more):
        plan = plan_of(f"{flags} {more}")
        return [plan.schedule_at(step).drafts for step in range(1000)]

    draws = drawn("0.75 0.22 0.03")
    assert draws == drawn("75 22 3")
    assert draws != drawn("0.75 0.22 0.03 --seed 1")
    for n, share in enumerate((0.75, 0.22, 0.03)):
        assert draws.count(n) / 1000 == pytest.approx(share, abs=0.04)
    assert set(drawn("0 1")) == {1}
    assert plan_of(f"{flags} 0.75 0.22 0.03").scored_schedule(1).drafts == 2

def test_the_cost_is_the_mean_over_the_steps():
    mix = f"{DRAFT} --first-memory embedding --pass-mix"
    one, two, three = (plan_of(f"{mix} {shares}") for shares in ("1", "0 1", "0 0 1"))
    assert one.cost == 1
    assert three.cost - 1 == pytest.approx(2 * (two.cost - 1))
    mixed = plan_of(f"{mix} 0.75 0.22 0.03")
    assert mixed.cost == pytest.approx(0.75 * one.cost + 0.22 * two.cost + 0.03 * three.cost)
    flops = 0.75 * one.flops_per_token + 0.22 * two.flops_per_token + 0.03 * three.flops_per_token
    assert mixed.flops_per_token == pytest.approx(flops)
    quarter = plan_of(f"{DRAFT} --first-memory embedding")
    assert quarter.cost == pytest.approx(0.75 * two.cost + 0.25 * three.cost)
