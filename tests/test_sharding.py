"""
--shard: a model whose weights, gradients and optimizer state are cut up over the processes trains like one
that is whole on each of them; checkpoints of one go on in the other; no process holds more than its share.
"""

import itertools
import os
import shutil
from pathlib import Path

import pytest
import test_faults
import torch
import torch.distributed as dist
from helpers import assert_refused, cli
from test_faults import (
    TINY,
    log,
    losses,
    many,
    numbers,
    products_in_float32,
    ranks,
    run,
    same_bits,
    wait,
)
from test_soundness import bad_batches
from torch.distributed.tensor import DTensor

import plan as plan_room
import train
from checkpointing import list_checkpoints, load_checkpoint, remove_checkpoint
from flags import make_parser
from plan import make_plan, memory_estimate

data, fork = test_faults.data, test_faults.fork  # fixtures

SIX = [*TINY, "--depth", 2, "--num-iterations", 6, "--eval-every", 3, "--save-every", 3, "--keep", 9]
VARIANTS = {
    "shared": "--lrt shared --device-batch-size 1",
    "layerwise": "--lrt layerwise --schedule draft --drafts 2 --subsets 2",
    "refresh": "--lrt shared --subsets 3 --kv-refresh --activation-checkpointing",
    "nanochat": "--recipe nanochat --aspect-ratio 24 --head-dim 12",
    "chunked": "--lrt shared --schedule chunked --chunk 3 --n-kv-head 1",
}
# with each of the other flags that decide what a step does
MORE = {
    "none": "--lrt none --deterministic",
    "embedding": "--lrt shared --schedule plain --first-memory embedding --activation-checkpointing",
    "refine": "--lrt shared --schedule refine --refinements 2 --detach",
    "sequential": "--lrt shared --schedule sequential --eval-every 0",
    "input": "--lrt shared --inject input --schedule draft --first-memory embedding --pass-mix 2 1 1",
    "checked": "--recipe nanochat --aspect-ratio 24 --head-dim 12 --activation-checkpointing --check-every 3",
    "minutes": "--lrt layerwise --save-every 0 --save-minutes 0.00001",
    "init": "--init-from runs/none --lrt shared",
}


def train_all(fork, world_size, *commands, prelude=products_in_float32):
    """Run several command lines of train.py, one after another, in the same processes."""
    out = Path("out.txt").absolute()
    out.unlink(missing_ok=True)
    environments = [ranks(world_size) for _ in commands]
    processes = []
    for rank in range(world_size):
        of_rank = [(argv, env[rank]) for argv, env in zip(commands, environments, strict=True)]
        processes.append(fork(many, out, of_rank, prelude))
    codes = wait(*processes, seconds=300)
    assert codes == [0] * world_size, out.read_text()[-3000:]

def assert_alike(folder_a, folder_b, rel=1e-5):
    """The same losses, gradient norms and scores, up to the order of sums."""
    for kind, names in (("train", ("loss", "norm", "lrm")), ("eval", ("bpb", "decode_rows"))):
        a, b = log(folder_a, kind), log(folder_b, kind)
        assert len(a) == len(b) > 0
        for row_a, row_b in zip(a, b, strict=True):
            for name in names:
                assert row_a[name] == pytest.approx(row_b[name], rel=rel), (row_a, row_b)

def assert_same_form(a, b):
    """
    Two checkpoints have the same keys, shapes, dtypes and options, and the same matrices within 1e-3. At the
    start, gradients of scalars are little but rounding: that of backout is 5e-12, still a step of AdamW.
    """
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys()
        for key in a:
            assert_same_form(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_form(x, y)
    elif isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if a.dim() > 1:
            assert (a.float() - b.float()).norm() <= 1e-3 * a.float().norm()
    else:
        assert a == pytest.approx(b)

@pytest.mark.parametrize("world_size, names", [
    (2, list(VARIANTS)),
    (4, ["nanochat"]),
    pytest.param(2, list(MORE), marks=pytest.mark.slow),
])
def test_sharded_and_whole_models_train_alike(world_size, names, data, here, fork):
    """Losses, gradient norms, evaluations; and what is saved."""
    commands = []
    for name in names:
        flags = ["--data", data, *SIX, *(VARIANTS | MORE)[name].split()]
        commands += [[*flags, "--name", name], [*flags, "--name", f"{name}_sharded", "--shard"]]
    train_all(fork, world_size, *commands)
    for name in names:
        assert_alike(f"runs/{name}", f"runs/{name}_sharded")
        whole = load_checkpoint(f"runs/{name}/ckpt_0000006.pt", shares=True)
        sharded = load_checkpoint(f"runs/{name}_sharded/ckpt_0000006.pt", shares=True)
        for key in ("model", "optimizers", "config", "rows_seen"):
            assert_same_form(whole[key], sharded[key])

def test_checkpoints_interchange(data, here, fork):
    """
    Sharded on two processes, whole on four, sharded on four, and so on: each goes on with what another one
    saved. A sharded run that goes on sharded is the uninterrupted one, bit for bit.
    """
    flags = ["--data", data, *SIX]
    train_all(fork, 2, [*flags, "--name", "whole"], [*flags, "--name", "sharded", "--shard"])
    for name, source, world_size, more in [
        ("a", "sharded", 2, ["--no-shard"]),
        ("b", "whole", 2, ["--shard"]),
        ("c", "sharded", 4, ["--shard"]),
        ("d", "sharded", 2, []),
    ]:
        copy_first_half(source, name)
        train_all(fork, world_size, ["--resume", f"runs/{name}", *more])
        assert_alike("runs/whole", f"runs/{name}")
    assert numbers("runs/d") == numbers("runs/sharded")
    assert same_bits("runs/d/ckpt_0000006.pt", "runs/sharded/ckpt_0000006.pt")
    assert load_checkpoint("runs/a/ckpt_0000006.pt")["args"]["shard"] is False

def a_bad_batch():
    products_in_float32()
    bad_batches({10})

def test_going_back_from_a_spike(data, here, fork):
    """To the same checkpoint, past the same batches."""
    flags = ["--data", data, *SIX, "--num-iterations", 14, "--save-every", 4, "--on-spike", "rewind"]
    train_all(fork, 2, [*flags, "--name", "whole"], [*flags, "--name", "sharded", "--shard"],
              prelude=a_bad_batch)
    assert_alike("runs/whole", "runs/sharded")
    for name in ("whole", "sharded"):
        spike, = log(f"runs/{name}", "spike")
        assert (spike["step"], spike["seen_in_step"], spike["left_out"]) == (8, 10, [64, 72, 80])

def a_wrong_loss():
    """On rank 1, in the second run of step 3: steps 0 and 3 take two forwards each."""
    forward = train.TrainStep.forward
    calls = itertools.count(1)

    def wrong(self, *args):
        loss, pass_losses = forward(self, *args)
        return loss * (1 + 2**-20 * (next(calls) == 6 and os.environ["RANK"] == "1")), pass_losses

    train.TrainStep.forward = wrong

def test_a_wrong_number_is_caught(data, here, fork):
    """By --check-every; the gradients that the ranks have in the end differ on all of them."""
    codes, said = run(fork, "out.txt", "--data", data, *SIX, "--shard", "--check-every", 3,
                      prelude=a_wrong_loss, world_size=2)
    assert codes == [2, 2], said
    assert "error: step 3, run twice, gave different bits on rank 0, 1: " in said

def copy_first_half(source, name):
    """A run as it was after step 3."""
    shutil.copytree(f"runs/{source}", f"runs/{name}")
    remove_checkpoint(Path(f"runs/{name}/ckpt_0000006.pt"))
    assert [path.name for path in list_checkpoints(f"runs/{name}")] == ["ckpt_0000003.pt"]

def test_in_bf16(data, here, fork):
    """Layers are sent in bf16, in which they compute anyway; gradients add up in float32."""
    flags = ["--data", data, *SIX, "--dtype", "bfloat16"]
    train_all(fork, 2, [*flags, "--name", "whole"], [*flags, "--name", "sharded", "--shard"])
    assert losses("runs/whole") == pytest.approx(losses("runs/sharded"), rel=2e-3)
    assert losses("runs/whole")[-1] < losses("runs/whole")[0] - 0.02

def forward_and_backward(env, dtype):
    """
    A sharded model and its optimizers after a backward, in this process of a group. Behind a forward, layers
    and embeddings are taken apart.
    """
    os.environ |= env
    dist.init_process_group("gloo")
    flags = "--depth 2 --aspect-ratio 32 --head-dim 16 --max-seq-len 32 --total-batch-size 128 --shard"
    args = make_parser().parse_args([*flags.split(), "--lrt", "shared", "--num-iterations", "1"])
    plan = make_plan(args, 64, dist.get_world_size(), dtype)
    model, optimizers, step = train.setup_training(args, plan, torch.device("cpu"), dtype)
    idx = torch.full((1, 32), int(env["RANK"]))
    loss, _ = step(idx, idx, None)
    assert all(isinstance(p, DTensor) for p in [*model.h.parameters(), model.wte.weight])
    loss.backward()
    return model, optimizers

def look_at_gradients(env):
    """The mean over ranks of what is bf16 on each of them has more bits."""
    model, _ = forward_and_backward(env, torch.bfloat16)
    grad = model.h[1].mlp.c_proj.weight.grad.to_local()
    assert grad.dtype == torch.float32 and grad.any()
    assert not torch.equal(grad, grad.bfloat16().float())
    dist.barrier()

def test_gradients_add_up_in_float32(here, fork):
    assert wait(*[fork(look_at_gradients, env) for env in ranks(2)]) == [0] * 2

def count_bytes(folder, env):
    """After a step: the bytes of weights, gradients and optimizer state on this rank; parameters in all."""
    model, optimizers = forward_and_backward(env, torch.float32)
    held = 0
    for p in model.parameters():
        held += p.to_local().nbytes + p.grad.to_local().nbytes
    for optimizer in optimizers:
        optimizer.step()
        for tensors in optimizer.optimizer.state.values():
            held += sum(x.nbytes for x in tensors.values())
    for stand_in in optimizers[1].stand_ins:
        assert stand_in.numel() == 0 and stand_in.grad is None
    total = sum(p.numel() for p in model.parameters())
    Path(folder, f"held_{env['RANK']}").write_text(f"{held} {total}")
    dist.barrier()

def test_a_process_holds_its_share(here, fork):
    """Weights and gradients 8 bytes a parameter, AdamW's state 8, Muon's 4: 12 to 16 over the processes."""
    assert wait(*[fork(count_bytes, here, env) for env in ranks(4)]) == [0] * 4
    for rank in range(4):
        held, total = map(int, (here / f"held_{rank}").read_text().split())
        assert 12 * total / 4 * 0.8 < held < 16 * total / 4 * 1.1

@pytest.mark.parametrize("flags, words", [
    ("--shard", "--shard needs several processes"),
    ("--shard --arch recurrent", "--shard does not go with --arch recurrent"),
    ("--shard --compile", "--shard does not go with --compile"),
    ("--shard --loss-weights 0 1 1", "--shard needs a loss in every pass"),
])
def test_what_does_not_go_with_it(flags, words, data, here):
    assert_refused(cli("train.py", "--data", data, *TINY, *flags.split()), words)
    assert not Path("runs").exists()


# -----------------------------------------------------------------------------
# What fits

FLAGS = "--depth 4 --lrt shared --max-seq-len 64 --total-batch-size 512 --num-iterations 1".split()

def test_the_estimate_of_memory():
    """The shards are an eighth; what is put together at a time is small beside the model."""
    plan = make_plan(make_parser().parse_args(FLAGS), 32768, 8, torch.bfloat16)
    whole = memory_estimate(plan, 8, torch.bfloat16, False)
    sharded = memory_estimate(plan, 8, torch.bfloat16, False, shard=True)
    total = plan.counts["total"]
    assert whole["weights"] == whole["gradients"] == 4 * total
    assert sharded["weights"] == sharded["gradients"] == 4 * total // 8
    assert sharded["optimizers"] == whole["optimizers"]
    assert 8 * plan.counts["head"] < sharded["put together"] < 4 * total
    # without a copy of the layers in bf16 for every pass
    layers = plan.counts["matrices"] + plan.counts["gates"]
    assert whole["activations"] - sharded["activations"] == pytest.approx(3 * 2 * layers, rel=0.05)
    assert sum(sharded.values()) < sum(whole.values())

@pytest.mark.parametrize("gib, answer", [
    (9, "it fits in 9 GiB"),
    (0.5, "it does not fit in 0.5 GiB, --shard does"),
    (0.1, "it does not fit in 0.1 GiB, with --shard neither"),
])
def test_dry_run_says_what_fits(gib, answer, here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(plan_room, "GPU_MEMORY", gib)
    code, out, err = cli("train.py", "--dry-run", *FLAGS, "--device", "cpu", "--dtype", "bfloat16")
    assert code == 0, err
    assert "memory a process with --shard, bfloat16, 1 rows: weights" in out
    assert any(line.startswith(answer) for line in out.splitlines()), out
