"""
Numbers that are wrong: loss spikes, which lead back to a checkpoint and past the batches that caused them;
flipped bits, which a step that is run twice shows; and the switch for algorithms that give the same bits.
"""

import math
import os
import random
import signal
from pathlib import Path

import pytest
import test_faults
import test_gpu_path
import torch
from helpers import assert_refused, cli
from test_faults import (
    TINY,
    at_step,
    checkpoints,
    log,
    numbers,
    run,
    same_bits,
)

import soundness
import train
from checkpointing import load_checkpoint
from flags import MAX_REWINDS
from soundness import SPIKE, LossSpikes, checksum, suspects

data, fork, guard = test_faults.data, test_faults.fork, test_gpu_path.guard  # fixtures


# -----------------------------------------------------------------------------
# What is a spike

def test_noise_is_no_spike():
    """10,000 losses that fall, with noise that becomes smaller than a thousandth."""
    rng = random.Random(0)
    spikes = LossSpikes()
    worst = 0
    for step in range(10_000):
        loss = 2 + 4 * math.exp(-step / 300)
        loss *= 1 + max(0.03 * math.exp(-step / 2000), 0.0005) * rng.gauss(0, 1)
        worst = max(worst, spikes.score(loss))
        spikes.add(loss)
    assert 3 < worst < 0.7 * SPIKE

def test_a_jump_is_a_spike():
    """By the deviations of the losses before it, of which some may be spikes themselves."""
    rng = random.Random(0)
    for noise in (0.001, 0.03):
        losses = [3 + noise * rng.gauss(0, 1) for _ in range(100)]
        losses[50:60] = [9.0] * 10
        spikes = LossSpikes(losses)
        deviation = max(noise, soundness.LEAST_DEVIATION * 3)
        assert spikes.score(3 + 0.7 * SPIKE * deviation) < SPIKE < spikes.score(3 + 1.6 * SPIKE * deviation)
        assert spikes.score(1.0) < 0
        assert not spikes.score(math.nan) > SPIKE

def test_a_few_losses_tell_nothing():
    spikes = LossSpikes([3.0] * (soundness.LEAST_LOSSES - 1))
    assert spikes.score(100.0) == 0
    spikes.add(3.0)
    assert spikes.score(100.0) > SPIKE

def test_suspects():
    """The batch with the spike and three before it, none from before the checkpoint."""
    assert suspects(80, 8, first=40) == [56, 64, 72, 80]
    assert suspects(80, 8, first=72) == [72, 80]
    assert suspects(80, 8, first=80) == [80]


# -----------------------------------------------------------------------------
# Back, and past the batches

def bad_batches(bad, actions=None):
    """The loss of these batches, of 8 rows each, is ten times too high, whenever they are read."""
    soundness.LEAST_LOSSES = 8
    rows = set()
    batch = train.Rows.batch
    forward = train.TrainStep.forward

    def noting(self, first, count, device):
        idx, targets = batch(self, first, count, device)
        if first // 8 in bad:
            rows.add(idx.numpy().tobytes())
        return idx, targets

    def too_high(self, idx, *args):
        loss, pass_losses = forward(self, idx, *args)
        return loss * 10 if idx.numpy().tobytes() in rows else loss, pass_losses

    train.Rows.batch = noting
    train.TrainStep.forward = too_high
    at_step(actions or {})

FORTY = [*TINY, "--name", "x", "--num-iterations", 40, "--save-every", 10, "--eval-every", 20, "--keep", 9]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def test_a_spike_leads_back_and_past_its_batches(data, here, fork):
    """
    The fourth batch behind the checkpoint of step 20 is bad: it and the three before it are left out. On one
    and on two processes; and after a kill, before the next checkpoint and behind it, bit for bit.
    """
    flags = ["--data", data, *FORTY, "--on-spike", "rewind", "--resume", "auto"]
    for world_size in (1, 2):
        out = ["--out", f"runs{world_size}"]
        codes, said = run(fork, "out.txt", *flags, *out, prelude=bad_batches, args=({25},),
                          world_size=world_size)
        assert codes == [0] * world_size, said
        assert "warning: step 00025: the loss" in said and "back to" in said
        spike, = log(f"runs{world_size}/x", "spike")
        assert (spike["step"], spike["seen_in_step"], spike["score"] > SPIKE) == (20, 25, True)
        assert spike["left_out"] == [8 * n for n in (22, 23, 24, 25)]
        assert [row["step"] for row in log(f"runs{world_size}/x")] == list(range(40))
        last = load_checkpoint(f"runs{world_size}/x/ckpt_0000040.pt")
        assert last["left_out"] == spike["left_out"] and last["rows_seen"] == 8 * 44
        assert load_checkpoint(f"runs{world_size}/x/ckpt_0000020.pt")["left_out"] == []

    for step in (24, 28, 33):
        out = ["--out", f"runs_{step}"]
        codes, said = run(fork, "out.txt", *flags, *out, prelude=bad_batches, args=({25}, {step: kill}))
        assert codes == [-signal.SIGKILL], said
        codes, said = run(fork, "out.txt", *flags, *out, prelude=bad_batches, args=({25},))
        assert codes == [0], said
        assert numbers(f"runs_{step}/x") == numbers("runs1/x")
        assert same_bits(f"runs_{step}/x/ckpt_0000040.pt", "runs1/x/ckpt_0000040.pt")

def stop():
    os.kill(os.getpid(), signal.SIGTERM)

def test_where_a_run_was_stopped_does_not_matter(data, here, fork):
    """A checkpoint that was written because of that is nothing to go back to."""
    flags = ["--data", data, *FORTY, "--on-spike", "rewind", "--resume", "auto"]
    codes, said = run(fork, "out.txt", *flags, "--out", "whole", prelude=bad_batches, args=({25},))
    assert codes == [0], said
    codes, said = run(fork, "out.txt", *flags, prelude=bad_batches, args=({25}, {23: stop}))
    assert codes == [0] and "ckpt_0000024.pt" in checkpoints("runs/x"), said
    codes, said = run(fork, "out.txt", *flags, prelude=bad_batches, args=({25},))
    assert codes == [0], said
    assert numbers("runs/x") == numbers("whole/x")
    assert len(log("runs/x", "spike")) == 1

def bad_batches_and_a_slow_disk(bad):
    bad_batches(bad)
    test_faults.slow_disk()

def test_a_checkpoint_that_is_being_written_is_waited_for(data, here, fork):
    """The spike comes right behind it: back to it, and not to the one before."""
    flags = ["--data", data, *FORTY, "--num-iterations", 24, "--on-spike", "rewind", "--decode-tokens", 0]
    codes, said = run(fork, "out.txt", *flags, prelude=bad_batches_and_a_slow_disk, args=({20},))
    assert codes == [0], said
    assert [row["step"] for row in log("runs/x", "spike")] == [20]

def test_spikes_are_reported(data, here, fork):
    """The default: nothing else happens. So it is where there is no checkpoint yet."""
    codes, said = run(fork, "out.txt", "--data", data, *FORTY, prelude=bad_batches, args=({25},))
    assert codes == [0], said
    codes, more = run(fork, "out.txt", "--data", data, *FORTY, "--on-spike", "rewind", "--save-every", 0,
                      "--name", "y", prelude=bad_batches, args=({25},))
    assert codes == [0], more
    for text, name in ((said, "x"), (more, "y")):
        assert text.count("warning: step 00025: the loss") == 1 and "back to" not in text
        spike, = log(f"runs/{name}", "spike")
        assert spike["step"] == 25 and spike["score"] > SPIKE
        assert len(log(f"runs/{name}")) == 40

def test_it_goes_back_three_times_at_most(data, here, fork):
    """From one checkpoint: if all batches behind it are bad, it is not the batches."""
    codes, said = run(fork, "out.txt", "--data", data, *FORTY, "--on-spike", "rewind",
                      prelude=bad_batches, args=(range(24, 99),))
    assert codes == [0], said
    assert said.count("back to runs/x/ckpt_0000020.pt") == MAX_REWINDS
    assert [row["step"] for row in log("runs/x")] == list(range(40))


# -----------------------------------------------------------------------------
# Flipped bits

def test_a_checksum_sees_every_bit():
    generator = torch.Generator().manual_seed(0)
    for dtype, integers in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32),
                            (torch.float64, torch.int64)):
        x = torch.randn(5, 3, generator=generator).to(dtype)
        before = checksum(x)
        for bit in range(8 * dtype.itemsize):
            flipped = x.clone()
            word = 1 << bit if bit < 8 * dtype.itemsize - 1 else -1 << bit
            flipped.view(integers)[2, 1] ^= word
            assert checksum(flipped) != before, (dtype, bit)
        assert checksum(x.T) == checksum(x)
        assert checksum(x[:0]) == 0

def flip_in_backward(rank, nth):
    """On one rank, the lowest bit of one gradient flips in the nth backward."""
    setup_training = train.setup_training
    calls = [0]

    def flip(grad):
        calls[0] += 1
        if calls[0] == nth:
            grad = grad.clone()
            grad.view(torch.int32)[1, 2] ^= 1
        return grad

    def set_up(*args):
        model, *others = setup_training(*args)
        if os.environ.get("RANK", "0") == rank:
            model.h[0].mlp.c_proj.weight.register_hook(flip)
        return model, *others

    train.setup_training = set_up

TWELVE = [*TINY, "--num-iterations", 12, "--save-every", 6, "--keep", 9, "--name", "x"]

@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_are_run_twice_change_nothing(world_size, data, here, fork):
    """On hardware that works; with several micro-batches a step, and with a pass whose loss is nan."""
    flags = ["--data", data, *TWELVE, "--device-batch-size", 2, "--schedule", "draft"]
    for out, more in (("once", []), ("twice", ["--check-every", 2])):
        codes, said = run(fork, "out.txt", *flags, "--out", out, *more, world_size=world_size)
        assert codes == [0] * world_size, said
    assert numbers("once/x") == numbers("twice/x")
    assert same_bits("once/x/ckpt_0000012.pt", "twice/x/ckpt_0000012.pt")

@pytest.mark.parametrize("world_size, rank, nth", [
    (1, "0", 5),  # steps 0 and 4 take two backwards each: 1 and 2, 6 and 7
    (1, "0", 6),
    (1, "0", 7),
    (2, "1", 7),  # DDP has one more, before all steps
])
def test_a_flipped_bit_is_caught(world_size, rank, nth, data, here, fork):
    """In either run of the step, on the rank where it was; not in the steps between."""
    codes, said = run(fork, "out.txt", "--data", data, *TWELVE, "--check-every", 4,
                      prelude=flip_in_backward, args=(rank, nth), world_size=world_size)
    if nth == 5:
        assert codes == [0], said
        return
    assert codes == [2] * world_size, said
    assert f"error: step 4, run twice, gave different bits on rank {rank}: its GPU, CPU or memory" in said
    assert [row["step"] for row in log("runs/x")] == [0, 1, 2, 3]

def test_a_gpu_needs_deterministic(data, here, monkeypatch):
    monkeypatch.setattr(train, "init_processes", lambda *args: (torch.device("cuda"), 0, 1))
    result = cli("train.py", "--data", data, *TINY, "--check-every", 4)
    assert_refused(result, "--check-every needs --deterministic on a GPU")

def test_bad_flags(data, here):
    assert_refused(cli("train.py", "--data", data, *TINY, "--check-every", -1), "--check-every must be")


# -----------------------------------------------------------------------------
# The same bits

def note_switches():
    """Write down, in step 1, what torch and cuBLAS are told."""
    def note():
        switches = torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]
        Path("switches.txt").write_text(str(switches))

    at_step({1: note})

def test_deterministic(data, here, fork):
    """The switches are on, and on a CPU, the bits are those without them."""
    flags = ["--data", data, *TWELVE]
    codes, said = run(fork, "out.txt", *flags, "--out", "usual")
    assert codes == [0], said
    codes, said = run(fork, "out.txt", *flags, "--deterministic", prelude=note_switches)
    assert codes == [0], said
    assert Path("switches.txt").read_text() == "(True, ':4096:8')"
    assert numbers("runs/x") == numbers("usual/x")
    assert same_bits("runs/x/ckpt_0000012.pt", "usual/x/ckpt_0000012.pt")

def test_no_operation_without_a_deterministic_algorithm(guard):
    """Of those that a step runs on a GPU: torch's own list of them is compared with what is called there."""
    test_gpu_path.fake(guard, "deterministic")
