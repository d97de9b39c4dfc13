"""
The Recurrent Transformer: the authors' numbers (folder PARITY_DIR, default ../shared/parity), the tiled form
against plain autograd over t, the model against a second, slow implementation of the equations, decoding, and
the command lines.
"""

import json
import math
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import PARITY, ROOT, SMALL, assert_refused, cli, log, shell
from test_sample import BOS, toy_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recurrent
from attention import KVBuffer, KVCache
from checkpointing import find_checkpoint, load_checkpoint
from interleave import Schedule, TrainStep, plain, run, sequential
from model import GPT, GPTConfig, norm
from plan import saved_bytes
from recurrent import (
    RecurrentConfig,
    RecurrentGPT,
    block_mask,
    config_from_dict,
    keys_read,
    reference,
    tile,
    tiled,
)
from sample import complete, generate
from test_model import CONFIG, decode, gradients, make, randomize, rms, tokens

FIXTURES = sorted(PARITY.glob("recurrent_block_*.npz"))
VARIANTS = {
    "plain": dict(),
    "one_kv_head": dict(n_kv_head=1),
    "as_many_kv_heads": dict(n_kv_head=4),
    "one_head": dict(n_head=1, n_kv_head=1, n_embd=8),
    "no_value_embeds": dict(value_embeds="none"),
    "alternate": dict(value_embeds="alternate"),
    "windows": dict(window_pattern="SL"),
}


def make_recurrent(seed=0, dtype=torch.float64, **overrides):
    """A tiny RecurrentGPT with every weight random."""
    config = CONFIG | dict(lrt="none", sequence_len=96) | overrides
    torch.manual_seed(seed)
    return randomize(RecurrentGPT(RecurrentConfig(**config)).to(dtype))

def layer_inputs(model, T, B=2):
    """Random x and value embedding of layer 0, and everything of it that gets gradients."""
    g = torch.Generator().manual_seed(T)
    config, dtype = model.config, model.wte.weight.dtype
    x = torch.randn(B, T, config.n_embd, generator=g, dtype=dtype).requires_grad_()
    leaves = [x]
    value_embed = None
    if config.has_value_embed(0):
        width = config.n_kv_head * config.head_dim
        value_embed = torch.randn(B, T, width, generator=g, dtype=dtype).requires_grad_()
        leaves.append(value_embed)
    return x, value_embed, [*leaves, *model.h[0].parameters()]

def layer_arguments(model, x, value_embed):
    """The arguments of tiled() and reference() in layer 0, but for the window; and the layer's window."""
    T = x.size(1)
    *arguments, window = model.h[0].arguments(x, value_embed, (model.cos[:T], model.sin[:T]))
    return arguments, window

def outputs_and_gradients(form, model, T, B=2, window=None):
    """y, k, v of layer 0 by one of the forms, and the gradients of a random sum of them."""
    x, value_embed, leaves = layer_inputs(model, T, B)
    arguments, own_window = layer_arguments(model, x, value_embed)
    outputs = form(*arguments, own_window if window is None else window)
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in outputs)
    return *outputs, *torch.autograd.grad(loss, leaves)

def assert_all_close(results, expected, atol=1e-10):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)

def assert_tiled_is_reference(model, T, B=2, window=None):
    assert_all_close(outputs_and_gradients(tiled, model, T, B, window),
                     outputs_and_gradients(reference, model, T, B, window))


# -----------------------------------------------------------------------------
# The authors' numbers

@pytest.mark.skipif(not FIXTURES, reason=f"no fixtures in {PARITY} (set PARITY_DIR)")
@pytest.mark.parametrize("form", [reference, tiled])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_parity(path, form):
    """No rotary embedding (cos 1, sin 0), no gates; weight_kv_proj is Wk over Wv, as ours."""
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    x = torch.from_numpy(z["x"]).requires_grad_()
    B, T, D = x.shape
    H = meta["heads"]
    names = ("q_proj", "attn_out", "kv_proj", "ff_proj", "ff_out")
    weights = [torch.from_numpy(z[f"weight_{name}"]).requires_grad_() for name in names]
    w_q, _, w_kv, _, _ = weights
    q, k, v = ((norm(x) @ w.t()).view(B, T, H, D // H).transpose(1, 2) for w in (w_q, w_kv[:D], w_kv[D:]))
    if meta["qk_norm"]:
        q, k = norm(q), norm(k)
    rotary = torch.ones(T, 1, D // H), torch.zeros(T, 1, D // H)
    y, _, _ = form(x, q, k, v, None, rotary, weights[1:], T, qk_norm=meta["qk_norm"])
    assert np.abs(y.detach().numpy() - z["out"]).max() < 1e-5
    grads = torch.autograd.grad((y * torch.from_numpy(z["out_weight"])).sum(), [x, *weights])
    for name, grad in zip(("x", *names), grads):
        expected = torch.from_numpy(z[f"grad_{name}"])
        assert (grad - expected).norm() / expected.norm() < 1e-5, name


# -----------------------------------------------------------------------------
# Tiled against plain autograd over t

@pytest.mark.parametrize("variant", VARIANTS)
def test_tiled_is_the_definition(variant):
    """Outputs and every gradient: T = 1 .. 70 over all variants, and around powers of two in each."""
    model = make_recurrent(**VARIANTS[variant])
    n = list(VARIANTS).index(variant)
    for T in {1, 2, 3, 31, 32, 33, 64, *range(1 + n, 71, len(VARIANTS))}:
        assert_tiled_is_reference(model, T, B=1 + T % 3)

@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 8, 31, 32])
def test_tiled_with_a_window(window):
    model = make_recurrent()
    for T in (1, 2, 9, 33, 40):
        assert_tiled_is_reference(model, T, window=window)

def test_tiled_in_pieces(monkeypatch):
    """A tile of more scores than SCRATCH is added some rows at a time, to the same numbers."""
    monkeypatch.setattr(recurrent, "BLOCK", 4)
    monkeypatch.setattr(recurrent, "SCRATCH", 300)
    assert_tiled_is_reference(make_recurrent(), 40, B=3)
    assert_tiled_is_reference(make_recurrent(), 40, window=5)

@pytest.mark.parametrize("qk_norm", [True, False])
def test_gradcheck(qk_norm):
    model = make_recurrent(n_embd=4, n_head=2, n_kv_head=1)
    x, value_embed, _ = layer_inputs(model, 5, B=1)
    (*tensors, rotary, weights), window = layer_arguments(model, x, value_embed)
    leaves = [x.detach().requires_grad_() for x in (*tensors, *weights)]

    def form(x, q, k, v, value_embed, *weights):
        return tiled(x, q, k, v, value_embed, rotary, weights, window, qk_norm=qk_norm)
    assert torch.autograd.gradcheck(form, leaves)

@pytest.mark.parametrize("T,window", [(1, 9), (2, 9), (37, 99), (64, 64), (50, 7), (33, 1), (9, 0)])
def test_tiles_meet_every_pair_once_and_in_time(T, window, monkeypatch):
    """Tiles between blocks of 4 positions, the mask within them."""
    monkeypatch.setattr(recurrent, "BLOCK", 4)
    met = torch.zeros(T, T, dtype=torch.int64)
    for first in range(0, T, 4):
        block = slice(first, min(first + 4, T))
        P = block.stop - first
        met[block, block] = block_mask(P, 1, window, None, torch.ones(()))[0].isfinite().long()
    for t in range(T):
        found = tile(t, T, window)
        if found is not None:
            keys, queries = found
            assert keys.stop == t + 1 == queries.start  # only finished keys, only queries to come
            met[queries, keys] += 1
    i, j = torch.arange(T)[:, None], torch.arange(T)
    within = (j < i) & (j >= i - window)
    assert (met[within] == 1).all() and (met[j >= i] == 0).all() and met.max() <= 1

def test_traffic_and_memory_grow_as_they_should():
    """
    Keys read: at a power of two, 64 a position, and T/2 log2(T/64) in tiles. Kept for the backward: O(T), by
    autograd over t O(T^2).
    """
    for n in (7, 10, 11):
        assert keys_read(2**n, 2**n) == 64 * 2**n + 2**n * (n - 6) // 2
    model = make_recurrent(dtype=torch.float32)

    def kept(form, T):
        x, value_embed, leaves = layer_inputs(model, T)
        def work():
            arguments, window = layer_arguments(model, x, value_embed)
            return form(*arguments, window)
        return saved_bytes(work, leaves)
    assert kept(tiled, 96) < 2.1 * kept(tiled, 48)
    assert kept(reference, 96) > 3 * kept(reference, 48)

def test_the_walk_depends_on_no_value():
    """Forward and backward on tensors without data: no step waits for a number, so a GPU need not wait."""
    with torch.device("meta"):
        config = dict(sequence_len=32, vocab_size=8, n_layer=1, n_head=4, n_kv_head=2, n_embd=16)
        model = RecurrentGPT(RecurrentConfig(**config))
        x = torch.empty(3, 19, 16, requires_grad=True)
        arguments, _ = layer_arguments(model, x, torch.empty(3, 19, 8))
        y, _, _ = tiled(*arguments, 5, torch.zeros(3, dtype=torch.int64))
        y.sum().backward()
    assert x.grad.is_meta and x.grad.shape == x.shape

def test_causality():
    T = 21
    model = make_recurrent(window_pattern="SL", sequence_len=24)

    # a changed token moves all that follows, and nothing before
    idx, _ = tokens(T)
    (_, hidden, _), = run(model, idx, plain(T))
    for p in (0, 1, 7, 15, 16):
        changed = torch.cat([idx[:, :p + 1], (idx[:, p + 1:] + 1) % 37], dim=1)
        (_, other, _), = run(model, changed, plain(T))
        torch.testing.assert_close(other[:, :p + 1], hidden[:, :p + 1], rtol=0, atol=1e-12)
        assert (other[:, p + 1:] - hidden[:, p + 1:]).abs().amin(dim=(0, 2)).max() > 1e-3

    # and so do gradients
    x, value_embed, _ = layer_inputs(model, T)
    arguments, window = layer_arguments(model, x, value_embed)
    y, _, _ = tiled(*arguments, window)
    for p in (0, 7, 16):
        grad, = torch.autograd.grad(y[:, p].sum(), x, retain_graph=True)
        assert (grad[:, p + 1:] == 0).all()
        assert (grad[:, :p + 1].abs().amax(dim=(0, 2)) > 0).all()


# -----------------------------------------------------------------------------
# Captured blocks: on a CPU, with a recorder in the place of CUDA graphs

def storages(tree):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}

class Recorder(TorchDispatchMode):
    """A CUDA graph on a CPU: a list of kernels and of the memory they use, without the Python around them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = kernel(*args, **kwargs)
        self.calls.append((kernel, args, kwargs, out))
        return out

    def replay(self):
        for kernel, args, kwargs, out in self.calls:
            again = kernel(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # copy what was computed anew, which is neither a view nor in place
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def external(self):
        """The storages that were there before: what a replay reads of the outside, and may write to it."""
        made, found = set(), set()
        for _, args, kwargs, out in self.calls:
            found |= storages((args, kwargs)) - made
            made |= storages(out) - found
        return found

@pytest.fixture
def recorded(monkeypatch):
    """Blocks of 8 positions, captured by Recorders: their list. All that a graph touches must be its own."""
    recorders = []

    def record(work, device):
        work()  # as the original: once to warm up
        with Recorder() as recorder:
            work()
        recorders.append(recorder)
        return recorder.replay
    monkeypatch.setattr(recurrent, "BLOCK", 8)
    monkeypatch.setattr(recurrent, "GRAPHS", 2)
    monkeypatch.setattr(recurrent, "record", record)
    monkeypatch.setattr(recurrent, "graphs", {})
    monkeypatch.setattr(recurrent, "tiled", captured)  # as the blocks of a model call it
    yield recorders
    for graph in recurrent.graphs.values():
        if graph:
            assert graph.replay.__self__.external() <= storages(graph.own)

captured = partial(tiled, capture=True)

@torch.no_grad()
def change_weights(model):
    """In place, as an optimizer does."""
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))

@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_blocks_are_the_definition(variant, recorded):
    """Outputs and gradients of other inputs, lengths and weights, all through the same two graphs."""
    model = make_recurrent(**VARIANTS[variant])
    for T in (8, 24, 8, 37, 40, 7):
        change_weights(model)
        results = outputs_and_gradients(captured, model, T)
        assert_all_close(results, outputs_and_gradients(reference, model, T))
    assert len(recorded) == 2 and len(recurrent.graphs) == 2

def test_captured_kinds(recorded, monkeypatch):
    """A window within a block or beyond it, padding, keys normed or not; no graph remembers the padding."""
    monkeypatch.setattr(recurrent, "GRAPHS", 16)
    model, T = make_recurrent(), 29
    kinds = [(11, None, True), (3, None, True), (3, None, False), (9, None, True)]
    for window in (3, 9, 0):
        for start in ([0, 0], [3, 12], [28, 1]):
            kinds.append((window, torch.tensor(start), True))
    for window, start, qk_norm in kinds * 2:
        forms = [partial(tiled, start=start, qk_norm=qk_norm, capture=False)]
        if start is None:
            forms.append(partial(reference, qk_norm=qk_norm))
        captured_form = partial(captured, start=start, qk_norm=qk_norm)
        results = outputs_and_gradients(captured_form, model, T, window=window)
        for form in forms:
            assert_all_close(results, outputs_and_gradients(form, model, T, window=window))
    assert len(recorded) == 2 * 6  # a window of 11 and one of 9 are the same to 8 positions

def test_captured_in_any_order(recorded, monkeypatch):
    """Forward twice, then backward in reverse or not at all: nothing that is kept is a graph's own memory."""
    models, idx = [make_recurrent(seed=i) for i in range(2)], tokens(27)
    steps = [TrainStep(model, Schedule("plain")) for model in models]
    with monkeypatch.context() as patched:
        patched.setattr(recurrent, "tiled", lambda *args: reference(*args[:-1]))  # without start
        expected = [gradients(step(*idx)[0], model) for step, model in zip(steps, models)]
    for order in ((0, 1), (1, 0), (1,)):
        losses = [step(*idx)[0] for step in steps]
        with torch.no_grad():  # through the same graph
            steps[0](*tokens(33, seed=9))
        for i in order:
            assert_all_close(gradients(losses[i], models[i]), expected[i])
    assert len(recorded) == 2

def test_captured_training_is_the_same(recorded, monkeypatch):
    """Steps of an optimizer, layers with and without a window, with activation checkpointing and without."""
    def train(form, recompute):
        monkeypatch.setattr(recurrent, "tiled", form)
        model = make_recurrent(window_pattern="SL")
        model.recompute = recompute
        step = TrainStep(model, Schedule("plain"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for i in range(4):
            loss, _ = step(*tokens(27, seed=i))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = train(tiled, recompute=False)
    assert train(captured, recompute=False) == pytest.approx(expected, abs=1e-10)
    assert train(captured, recompute=True) == pytest.approx(expected, abs=1e-10)
    assert len(recorded) == 2  # one forward and one backward for all layers

def test_what_is_captured_and_kept(recorded):
    """Nothing of a kind that comes once, or of less than a block; of the others the last GRAPHS."""
    model = make_recurrent()

    @torch.no_grad()
    def recorded_after(T, B):
        x, value_embed, _ = layer_inputs(model, T, B)
        arguments, window = layer_arguments(model, x, value_embed)
        captured(*arguments, window)
        return len(recorded)
    assert [recorded_after(T, 1) for T in (7, 7, 7, 8, 7)] == [0] * 5
    calls = [(30, 1), (8, 1), (9, 2), (17, 2), (8, 1), (8, 2)]
    assert [recorded_after(T, B) for T, B in calls] == [1, 1, 1, 2, 2, 2]
    # B = 1 has to go for 3, and 2 for 1
    assert [recorded_after(8, B) for B in (3, 3, 2, 3, 1, 1)] == [2, 3, 3, 3, 3, 4]
    assert len(recurrent.graphs) == 2

def test_captured_walk_launches_little(monkeypatch):
    """Forward and backward, with all that is not the walk: a few operations a position instead of 60."""
    monkeypatch.setattr(recurrent, "graphs", {})
    monkeypatch.setattr(recurrent, "record", lambda work, device: lambda: None)
    model, T = make_recurrent(sequence_len=128), 128

    def launches():
        with Recorder() as recorder:
            outputs_and_gradients(captured, model, T)
        return sum(not kernel.is_view for kernel, *_ in recorder.calls)
    first, _, third = (launches() for _ in range(3))  # the first has not captured yet, the second does
    assert 60 * T < first < 65 * T and third < 4 * T

def test_failed_capture_is_one_warning(recorded, monkeypatch):
    """As if memory had run out: the same numbers, and no second try."""
    tries = []
    def record(work, device):
        tries.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nAnd so on.")
    monkeypatch.setattr(recurrent, "record", record)
    model = make_recurrent(n_layer=3)
    step = TrainStep(model, Schedule("plain"))
    words = "without a CUDA graph, and slower: CUDA out of memory. Tried to allocate 2 MiB.$"
    with pytest.warns(RuntimeWarning, match=words) as warned:
        losses = [step(*tokens(20))[0] for _ in range(3)]
        gradients(sum(losses), model)
    assert losses[0] == losses[1] == losses[2]
    assert len(tries) == len(warned) == 2  # forward and backward

def test_a_cpu_captures_nothing(monkeypatch):
    monkeypatch.setattr(recurrent, "record", None)
    monkeypatch.setattr(recurrent, "BLOCK", 4)
    model = make_recurrent()
    for _ in range(3):
        loss, _ = TrainStep(model, Schedule("plain"))(*tokens(20))
        loss.backward()
    assert not recurrent.graphs

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; on a CPU, see the tests above")
@pytest.mark.parametrize("dtype,tolerance", [
    (torch.float64, 1e-10),
    (torch.float32, 1e-3),
    (torch.bfloat16, 0.2),
])
@pytest.mark.parametrize("recompute", [False, True])
def test_captured_on_a_gpu(dtype, tolerance, recompute, monkeypatch):
    """Some steps through real graphs, on autograd's thread too, against none: losses, gradients, weights."""
    monkeypatch.setattr(recurrent, "graphs", {})

    def train(device, capture):
        monkeypatch.setattr(recurrent, "tiled", partial(tiled, capture=capture))
        weight_dtype = torch.promote_types(dtype, torch.float32)
        model = make_recurrent(sequence_len=256, window_pattern="SL", dtype=weight_dtype).to(device)
        model.compute_dtype = dtype
        model.recompute = recompute
        step = TrainStep(model, Schedule("plain"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def loss(T, B, seed):
            idx, targets = tokens(T, B, seed)
            return step(idx.to(device), targets.to(device))[0]

        results = []
        for i, T in enumerate((256, 256, 200, 64, 150)):
            losses = [loss(T, 2, seed) for seed in (i, 100 + i)]
            for x in reversed(losses):
                x.backward()
            with torch.no_grad():
                losses.append(loss(T, 5, i))
            results += [x.detach() for x in losses]
            results += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        results += [p.detach() for p in model.parameters()]
        return [x.cpu() for x in results]

    results = train("cuda", capture=True)
    others = [train("cuda", capture=False)]
    if dtype == torch.float64:
        others.append(train("cpu", capture=False))
    # forward, backward, forward of 5 rows
    assert sum(isinstance(graph, recurrent.Graph) for graph in recurrent.graphs.values()) == 3
    for other in others:
        for a, b in zip(results, other, strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


# -----------------------------------------------------------------------------
# The model

def by_the_equations(model, idx):
    """The equations of recurrent.py for one sequence idx (T,), position by position: logits (T, V)."""
    c = model.config
    H, G, d = c.n_head, c.n_kv_head, c.head_dim

    def rotate_and_norm(x, t):
        cos, sin = model.cos[t, 0, :d // 2], model.sin[t, 0, :d // 2]
        a, b = x[..., :d // 2], x[..., d // 2:]
        return rms(torch.cat([a * cos + b * sin, -a * sin + b * cos], dim=-1))

    def pair(l, u, t):
        attn = model.h[l].attn
        k = rotate_and_norm((attn.c_k.weight @ u).view(G, d), t)
        v = (attn.c_v.weight @ u).view(G, d)
        if c.has_value_embed(l):
            gate = 2 * torch.sigmoid(attn.gate.weight @ u)[:, None]
            v = v + gate * model.value_embeds[str(l)].weight[idx[t]].view(G, d)
        return k, v

    x0 = rms(model.wte.weight[idx])
    h = list(x0)
    for l, block in enumerate(model.h):
        keys, values = [], []  # final
        for t in range(len(idx)):
            x = model.resid_lambdas[l] * h[t] + model.x0_lambdas[l] * x0[t]
            u = rms(x)
            q = rotate_and_norm((block.attn.c_q.weight @ u).view(H, d), t)
            k, v = pair(l, u, t)  # temporary
            first = max(t - c.window(l), 0)
            k, v = torch.stack([*keys[first:], k]), torch.stack([*values[first:], v])
            heads = []
            for i in range(H):
                g = i * G // H
                p = torch.softmax(k[:, g] @ q[i] / math.sqrt(d), 0)
                heads.append(p @ v[:, g])
            x = x + block.attn.c_proj.weight @ torch.cat(heads)
            h[t] = x + block.mlp.c_proj.weight @ F.relu(block.mlp.c_fc.weight @ rms(x)).square()
            k, v = pair(l, rms(h[t]), t)
            keys.append(k)
            values.append(v)
    return 15 * torch.tanh(rms(torch.stack(h)) @ model.lm_head.weight.t() / 15)

@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_the_equations(variant):
    """Training forward, decoding, and the gradients of both, against the slow implementation."""
    T = 13
    model = make_recurrent(**dict(sequence_len=16) | VARIANTS[variant])
    idx, targets = tokens(T)
    expected = torch.stack([by_the_equations(model, row) for row in idx])
    (_, hidden, _), = run(model, idx, plain(T))
    torch.testing.assert_close(model.logits(hidden), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(decode(model, idx)[0], expected, rtol=0, atol=1e-10)

    expected_grads = gradients(F.cross_entropy(expected.flatten(0, 1), targets.flatten()), model)
    loss, _ = TrainStep(model, Schedule("plain"))(idx, targets)
    assert_all_close(gradients(loss, model), expected_grads)
    token_by_token = torch.cat([hidden for _, hidden, _ in run(model, idx, sequential(T))], 1)
    loss = model.token_loss(token_by_token, targets).mean()
    assert_all_close(gradients(loss, model), expected_grads)

def test_the_recurrence_is_one():
    """The same weights as a plain GPT give something else, except at the first position."""
    model, (idx, _) = make_recurrent(), tokens(20)
    other = make(lrt="none", sequence_len=96)
    other.load_state_dict(model.state_dict())
    (_, a, _), = run(model, idx, plain(20))
    (_, b, _), = run(other, idx, plain(20))
    assert (a[:, :1] - b[:, :1]).abs().max() < 1e-12
    assert (a[:, 1:] - b[:, 1:]).abs().max() > 0.1

@torch.no_grad()
def test_prompts_of_different_lengths():
    """Rows aligned at their ends, by the training forward and on by decoding: as if each were alone."""
    T, lengths = 12, [12, 1, 5, 11]
    model = make_recurrent(sequence_len=16, window_pattern="SL")
    rows = [tokens(n + 2, B=1, seed=n)[0][0] for n in lengths]
    idx = torch.stack([torch.cat([torch.full((T - n,), 5), row]) for n, row in zip(lengths, rows)])
    start = torch.tensor([T - n for n in lengths])
    whole = KVCache(model.config, 4, T, "cpu", torch.float64, start=start)
    rolling = KVCache(model.config, 4, 14, "cpu", torch.float64, rolling=True, start=start)
    hidden = [model(idx[:, :T], range(T), whole)[0]]
    rolling.copy_from(whole, T, 1)  # final pairs
    for t in (T, T + 1):
        hidden.append(model(idx[:, t:t + 1], range(t, t + 1), rolling)[0])
    logits = model.logits(torch.cat(hidden, 1))
    for i, (n, row) in enumerate(zip(lengths, rows)):
        expected, _ = decode(model, row[None])
        # not closer: the rotary tables are float32
        torch.testing.assert_close(logits[i, T - n:], expected[0], rtol=0, atol=2e-6)

def test_generation():
    """Greedy tokens are those of the training forward; what is sampled does not depend on the batch."""
    model = make_recurrent(sequence_len=24, dtype=torch.float32, window_pattern="SL")
    prompts = [[BOS], [BOS, 5, 6, 7, 8, 9, 10, 11, 12], [BOS, 3], [BOS, *range(23)]]
    for prompt in prompts[:3]:
        generated = generate(model, toy_tokenizer(), [prompt], 100, temperature=0)
        out = [token for _, token, _ in generated if token is not None]
        idx = torch.tensor([prompt + out[:-1]])
        with torch.no_grad():
            (_, hidden, _), = run(model, idx, plain(idx.size(1)))
        assert out == model.logits(hidden)[0, len(prompt) - 1:].argmax(-1).tolist()
        assert len(out) > 3
    options = dict(temperature=1.0, top_k=20)
    together = complete(model, toy_tokenizer(), prompts, 100, num_samples=2, seed=7, **options)
    for i, prompt in enumerate(prompts):
        for j in range(2):
            alone = complete(model, toy_tokenizer(), [prompt], 100, seed=7 + j, **options)
            assert alone == [together[2 * i + j]]

def test_what_is_refused():
    with pytest.raises(ValueError, match="arch recurrent goes with lrt none, not with shared"):
        RecurrentConfig(lrt="shared")
    with pytest.raises(ValueError, match="arch 'x' is none of gpt, recurrent"):
        config_from_dict(dict(arch="x"))
    model, kv = make_recurrent(), KVBuffer(3)
    idx, _ = tokens(4)
    model(idx, range(4), kv)
    for positions in (range(4, 8), range(0, 8, 2)):
        with pytest.raises(ValueError, match="from position 0 on, or one position at a time"):
            model(idx, positions, kv)

def test_bfloat16_activations():
    """Weights stay float32; the running softmax and the sums of gradients do, too."""
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_recurrent(dtype=torch.float32)
        model.compute_dtype = dtype
        loss, _ = TrainStep(model, Schedule("plain"))(*tokens(40))
        losses.append(loss.item())
        grads.append(torch.cat([g.flatten() for g in gradients(loss, model)]))
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]
    assert F.cosine_similarity(*grads, dim=0) > 0.98

def test_compiled_step_is_the_same():
    """torch.compile goes around the walk over positions, not into it."""
    torch._dynamo.reset()
    model = make_recurrent(dtype=torch.float32)
    step = TrainStep(model, Schedule("plain"))
    compiled = torch.compile(step, backend="eager", dynamic=False)
    idx, targets = tokens(40)
    expected = gradients(step(idx, targets)[0], model)
    for a, b in zip(gradients(compiled(idx, targets)[0], model), expected):
        torch.testing.assert_close(a, b)

@pytest.mark.parametrize("value_embeds", ["none", "all"])
def test_flops_count_the_second_projection(value_embeds):
    config = dict(sequence_len=64, vocab_size=100, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
                  value_embeds=value_embeds)
    plain_gpt, recurrent_gpt = GPT(GPTConfig(**config)), RecurrentGPT(RecurrentConfig(**config))
    gates = plain_gpt.parameter_counts()["gates"]
    assert bool(gates) == (value_embeds == "all")
    second = 6 * (2 * 2 * 32 * 16 + gates)  # two layers, Wk and Wv, and their gates
    assert recurrent_gpt.flops_per_token() - plain_gpt.flops_per_token() == second


# -----------------------------------------------------------------------------
# The command lines

def test_train_evaluate_sample_resume(data, here):
    flags = ["--data", data, *SMALL, "--arch", "recurrent", "--num-iterations", 30, "--eval-every", 15]
    done = shell("train.py", *flags, "--name", "whole")
    assert done.returncode == 0 and "recurrent" in done.stdout, done.stderr
    losses = [row["loss"] for row in log("runs/whole")]
    assert sum(losses[-5:]) / 5 < 5.8 < losses[0]
    last = log("runs/whole", "eval")[-1]["decode_rows"]
    assert last["decode"] == pytest.approx(last["merged"], rel=1e-5)

    # evaluation
    code, _, err = cli("eval_core.py", "--checkpoint", "runs/whole", "--rows", 4, "--decode-rows", 2,
                       "--referee", "--split", "val", "--json", "bpb.json")
    assert code == 0, err
    bpb = json.loads((here / "bpb.json").read_text())["val"]["decode_bpb"]
    assert bpb["decode"] == pytest.approx(bpb["token by token"], rel=1e-5)

    # generation: a prompt in a batch, and alone
    options = ["--checkpoint", "runs/whole", "--max-new-tokens", 6, "--seed", 3]
    (here / "prompts.txt").write_text("def \nimport os, sys\n")
    done = shell("sample.py", *options, "--prompt-file", "prompts.txt")
    assert done.returncode == 0, done.stderr
    _, alone, _ = cli("sample.py", *options, "--prompt", "def ")
    assert alone == "def " + json.loads(done.stdout.splitlines()[0])["text"] + "\n"

    # a run that is stopped and resumed is the whole one
    command = [sys.executable, ROOT / "train.py", *flags, "--name", "cut"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 00010/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait() == 0
    assert 10 < len(log("runs/cut")) < 30
    code, _, err = cli("train.py", "--resume", "runs/cut")
    assert code == 0, err
    assert [row["loss"] for row in log("runs/cut")] == losses
    whole, cut = (load_checkpoint(find_checkpoint(f"runs/{name}"))["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)

def test_dry_run_and_refusals(data, here):
    """The KV cache of a shallow wide model is smaller at about the same parameters; nothing is written."""
    flags = ["--data", data, *SMALL, "--num-iterations", 5, "--dry-run", "--window-pattern", "L"]
    deep = ["--lrt", "none", "--depth", 4, "--aspect-ratio", 16]
    shallow = ["--arch", "recurrent", "--depth", 2, "--aspect-ratio", 40]
    sizes = []
    for model in (deep, shallow):
        code, out, err = cli("train.py", *flags, *model)
        assert code == 0 and "parameters" in out and "5 steps" in out and "FLOPs" in out, err
        sizes.append(int(out.split("KV cache ")[1].split()[0].replace(",", "")))
    assert sizes == [4 * 2 * 32 * 64 * 4, 2 * 2 * 32 * 80 * 4]
    assert not Path("runs").exists()

    result = cli("train.py", *flags, "--arch", "recurrent", "--lrt", "shared")
    assert_refused(result, "recurrent goes with lrt none")
    assert cli("train.py", "--data", data, *SMALL, "--arch", "recurrent", "--num-iterations", 1)[0] == 0
    result = cli("train.py", "--resume", "runs/d2_recurrent", "--arch", "gpt")
    assert_refused(result, "was trained with --arch recurrent")
    checkpoint = load_checkpoint(find_checkpoint("runs/d2_recurrent"))
    del checkpoint["args"]["arch"]  # a run from before the flag existed: it was a gpt
    torch.save(checkpoint, "old.pt")
    result = cli("train.py", "--resume", "old.pt", "--arch", "recurrent")
    assert_refused(result, "was trained with --arch gpt")
