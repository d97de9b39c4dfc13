"""
Exact parallel prefill equals decoding token by token, whatever the weights, the batch and the lengths; the
rolling cache; the compiled training step. What schedules are equal to is in test_model.py.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attention import KVCache
from interleave import Schedule, TrainStep, interleaved, plain, prefill, run
from model import GPT, GPTConfig
from test_model import VARIANTS, decode, make, tokens


def test_more_subsets_than_tokens():
    """They are as many subsets as tokens, and no step is wider: tensors are padded to it."""
    passes = interleaved(5, 10**11)
    assert passes == interleaved(5, 5)
    assert max(positions.step for positions in passes) == 5

@torch.no_grad()
def adversarial(dtype=torch.float64, strength=3.0, **overrides):
    """A model with large c, Rk and Rv, where the fixed point is far from contracting."""
    model = make(dtype=dtype, sequence_len=64, **overrides)
    for R in (*model.mem_k, *model.mem_v):
        R.weight.mul_(strength)
    if model.mem_lambdas is not None:
        model.mem_lambdas.mul_(strength).add_(strength)
    return model

def new_cache(model, B, length, **options):
    return KVCache(model.config, B, length, "cpu", model.wte.weight.dtype, **options)


# -----------------------------------------------------------------------------
# Prefill

@torch.no_grad()
def assert_exact(model, T, subsets, atol, **options):
    """Prefill of T tokens leaves what decoding them leaves. Returns the number of sweeps."""
    idx, _ = tokens(T)
    logits, memory = decode(model, idx)
    kv = new_cache(model, 2, T + 1)
    hidden, last, sweeps = prefill(model, idx, kv, subsets, **options)
    torch.testing.assert_close(model.logits(hidden), logits, rtol=0, atol=atol)
    if model.config.lrt != "none":
        torch.testing.assert_close(last, memory[:, -1:], rtol=0, atol=atol)
    if T < model.config.sequence_len:  # the cache is what decoding would have left: the next token agrees
        longer = torch.cat([idx, idx[:, :1]], 1)
        expected, _ = decode(model, longer)
        hidden, _ = model(longer[:, T:], range(T, T + 1), kv, last)
        torch.testing.assert_close(model.logits(hidden), expected[:, T:], rtol=0, atol=atol)
    return sweeps

@pytest.mark.parametrize("T", [1, 2, 3, 9])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_is_exact(variant, T):
    model = make(**VARIANTS[variant])
    for subsets in (1, 2, 3, 20):
        assert_exact(model, T, subsets, atol=1e-10)

@pytest.mark.parametrize("T", [1, 3, 40, 64])
@pytest.mark.parametrize("lrt", ["shared", "layerwise"])
def test_prefill_on_trained_weights_takes_a_few_sweeps(trained_models, lrt, T):
    """float32, up to the full context: within 1e-4, and far from T sweeps."""
    model = trained_models[lrt]
    for subsets in (1, 2, 4):
        assert assert_exact(model, T, subsets, atol=1e-4) <= 12
    assert assert_exact(model.double(), T, 1, atol=1e-9) <= 24
    model.float()

ADVERSARIAL = {
    "shared": {},
    "layerwise": dict(lrt="layerwise"),
    "residual": dict(inject="residual"),
    "kv": dict(inject="kv", window_pattern="S"),
    "first-embedding": dict(first_memory="embedding"),
}

@pytest.mark.parametrize("variant", ADVERSARIAL)
def test_prefill_on_adversarial_weights(variant):
    """Where sweeps do not converge, the result is finished token by token, never returned as it is."""
    model = adversarial(**ADVERSARIAL[variant])
    for options in (dict(), dict(max_sweeps=3), dict(max_sweeps=1)):
        for subsets in (1, 4):
            assert_exact(model, 40, subsets, atol=1e-7, **options)

@pytest.mark.parametrize("lrt", ["shared", "layerwise"])
def test_prefill_on_adversarial_weights_in_float32(lrt):
    """Up to the full context, through the token-by-token end as well."""
    for T in (1, 2, 40, 64):
        assert_exact(adversarial(torch.float32, lrt=lrt), T, 2, atol=1e-4)

@torch.no_grad()
def test_without_recurrence_prefill_is_the_first_pass():
    """In pieces as well: the first memory crosses from one to the next."""
    for variant in ("shared", "first-embedding", "control", "none"):
        model = make(**VARIANTS[variant])
        idx, _ = tokens(9)
        (_, expected, _), = run(model, idx, plain(9))
        kv, memory, done = new_cache(model, 2, 9), None, []
        for piece in (range(4), range(4, 5), range(5, 9)):
            hidden, memory, sweeps = prefill(model, idx[:, piece.start:piece.stop], kv, first=piece.start,
                                             memory=memory, recurrence=False)
            done.append(hidden)
            assert sweeps == 1
        torch.testing.assert_close(torch.cat(done, 1), expected, rtol=0, atol=1e-11)

def test_adversarial_weights_are_adversarial():
    """The tests above would prove little if these converged at once."""
    model = adversarial()
    idx, _ = tokens(40)
    _, _, sweeps = prefill(model, idx, new_cache(model, 2, 40), subsets=1, max_sweeps=99)
    assert sweeps == 40  # every sweep makes final no more than the one position that it must

PADDED = {
    "shared": {},
    "first-embedding": dict(first_memory="embedding"),
    "control": dict(first_memory="embedding", memory="embedding", window_pattern="SL"),
    "layerwise-windows": dict(lrt="layerwise", window_pattern="SL"),
    "none-windows": dict(lrt="none", window_pattern="SL"),
}

@pytest.mark.parametrize("variant", PADDED)
@pytest.mark.parametrize("max_sweeps", [24, 2])
@torch.no_grad()
def test_prefill_of_prompts_of_different_lengths(variant, max_sweeps):
    """Rows aligned at their ends: each as if it were alone, in the cache too, whatever token padding is."""
    T, lengths = 12, [12, 1, 5, 11]
    model = make(sequence_len=T, **PADDED[variant])
    rows = [tokens(n, B=1, seed=n)[0][0] for n in lengths]
    for pad in (0, 5):
        idx = torch.stack([torch.cat([torch.full((T - len(row),), pad), row]) for row in rows])
        start = torch.tensor([T - n for n in lengths])
        kv = new_cache(model, 4, T, start=start)
        hidden, memory, _ = prefill(model, idx, kv, max_sweeps=max_sweeps)
        for i, row in enumerate(rows):
            expected_logits, expected_memory = decode(model, row[None])
            logits = model.logits(hidden[i:i + 1, T - len(row):])
            # not closer: the rotary tables are float32, and a row elsewhere reads other entries of them
            torch.testing.assert_close(logits, expected_logits, rtol=0, atol=2e-6)
            if memory is not None:
                torch.testing.assert_close(memory[i:i + 1], expected_memory[:, -1:], rtol=0, atol=2e-6)

CONTINUED = {
    "shared": {},
    "first-embedding": dict(first_memory="embedding"),
    "control": dict(first_memory="embedding", memory="embedding", window_pattern="SL"),
    "windows": dict(lrt="layerwise", window_pattern="SL"),
    "none": dict(lrt="none"),
}

@pytest.mark.parametrize("variant", CONTINUED)
@pytest.mark.parametrize("max_sweeps", [24, 2])
@torch.no_grad()
def test_prefill_goes_on_behind_what_the_cache_holds(variant, max_sweeps):
    """In pieces, then in copies of the cache with rows of different ends: as decoding each by itself."""
    first, lengths = 7, [5, 9, 1]
    model = make(sequence_len=16, **CONTINUED[variant])
    idx, _ = tokens(first, B=1)

    # the shared beginning, in pieces
    kv = new_cache(model, 1, first)
    memory = None
    for piece in (range(4), range(4, 5), range(5, 7)):
        _, memory, _ = prefill(model, idx[:, piece.start:piece.stop], kv, max_sweeps=max_sweeps,
                               first=piece.start, memory=memory)
    copies = new_cache(model, 3, 16)
    copies.copy_from(kv, first, 3)
    if memory is not None:
        memory = memory.expand(3, -1, -1)

    # three ways on
    rests = [tokens(n, B=1, seed=n)[0][0] for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rests, batch_first=True, padding_value=5)
    ends = torch.tensor([first + n for n in lengths])
    hidden, _, _ = prefill(model, padded, copies, max_sweeps=max_sweeps,
                           first=first, memory=memory, ends=ends)
    for i, rest in enumerate(rests):
        expected, _ = decode(model, torch.cat([idx[0], rest])[None])
        logits = model.logits(hidden[i:i + 1, :lengths[i]])
        torch.testing.assert_close(logits, expected[:, first:], rtol=0, atol=1e-9)

def test_nothing_waits_for_padding():
    """Rows that end early converge early, whatever stands behind their ends."""
    model = adversarial()
    idx, _ = tokens(40)
    sweeps = []
    for ends in (None, torch.tensor([6, 3])):
        kv = new_cache(model, 2, 40)
        sweeps.append(prefill(model, idx, kv, subsets=1, max_sweeps=99, ends=ends)[2])
    assert sweeps[0] == 40 and sweeps[1] <= 8


# -----------------------------------------------------------------------------
# The rolling cache, and the compiled step

@torch.no_grad()
def test_rolling_cache_keeps_only_the_window_and_decodes_the_same():
    model = make(sequence_len=16, window_pattern="SSL", n_layer=4)
    idx, _ = tokens(16)
    full, rolling = new_cache(model, 2, 16), new_cache(model, 2, 16, rolling=True)
    assert [k.size(2) for k in rolling.k] == [9, 9, 16, 16]
    assert [k.size(2) for k in full.k] == [16] * 4
    memory = rolling_memory = None
    for t in range(16):
        now = range(t, t + 1)
        expected, memory = model(idx[:, t:t + 1], now, full, memory)
        hidden, rolling_memory = model(idx[:, t:t + 1], now, rolling, rolling_memory)
        torch.testing.assert_close(expected, hidden, rtol=0, atol=1e-12)
        if t == 12:  # a rolling cache that takes over in the middle, every row twice
            taken = new_cache(model, 4, 16, rolling=True)
            taken.copy_from(full, 13, 2)
            next_idx = idx[:, 13:14].repeat_interleave(2, 0)
            again, _ = model(next_idx, range(13, 14), taken, memory.repeat_interleave(2, 0))
        if t == 13:
            torch.testing.assert_close(again[::2], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(again[1::2], expected, rtol=0, atol=1e-12)

COMPILED = {
    "control": (dict(lrt="shared", n_layer=2, first_memory="embedding", memory="embedding"),
                Schedule("plain")),
    "first-embedding": (dict(lrt="shared", n_layer=2, first_memory="embedding"),
                        Schedule("draft", subsets=2)),
    "shared": (dict(lrt="shared", n_layer=2), Schedule()),
    "refresh": (dict(lrt="layerwise", n_layer=1), Schedule(subsets=3, kv_refresh=True)),
    "draft-subsets": (dict(lrt="shared", n_layer=2), Schedule("draft", subsets=2)),
    "drafts": (dict(lrt="layerwise", n_layer=2, dest_layers=[1, 1]), Schedule("draft", drafts=2)),
    "input": (dict(lrt="shared", n_layer=2, inject="input"), Schedule("draft")),
    # the first pass's last layer has no gradient
    "no-loss": (dict(lrt="shared", n_layer=2), Schedule("refine", refinements=1, loss_weights=[0, 1])),
}

@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_step_is_one_graph_and_the_same(variant):
    """What --compile does on CUDA, here without a code generator: no graph break, no recompilation."""
    overrides, schedule = COMPILED[variant]
    torch._dynamo.reset()
    torch.manual_seed(0)
    step = TrainStep(GPT(GPTConfig(sequence_len=16, vocab_size=32, n_head=2, n_kv_head=1, n_embd=16,
                                   window_pattern="SL", source_layer=0, **overrides)), schedule)
    for p in step.parameters():
        torch.nn.init.normal_(p, std=0.2)
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        idx = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(seed))
        current = schedule
        if schedule.kind == "draft" and seed > 0:
            current = replace(schedule, drafts=schedule.drafts + 1)
        results = []
        for f in (step, compiled):
            step.zero_grad()
            loss, means = f(idx, idx, current)
            loss.backward()
            results.append([loss.detach(), means] + [p.grad.clone() for p in step.parameters()])
        for x, y in zip(*results):  # means are NaN where the weight is 0
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, equal_nan=True)
    is_deepened = schedule.kind == "draft"  # a graph of its own, once
    assert counter.frame_count == (2 if is_deepened else 1)
