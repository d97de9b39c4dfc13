"""
The Recurrent Transformer: the authors' numbers (folder PARITY_DIR, default ../shared/parity), the tiled form against plain
autograd over t, the model against a second, slow implementation of the equations, decoding, and the command lines.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recurrent
from attention import KVBuffer
from bench import saved_bytes
from interleave import Schedule, TrainStep, plain, run, sequential
from model import GPT, GPTConfig, KVCache, norm
from recurrent import keys_read, reference, tile, tiled
from sample import complete, find_checkpoint, generate, load_checkpoint
from test_cli import HERE, SMALL, assert_refused, cli, log, shell
from test_model import PARITY, decode, make, tokens
from test_sample import BOS, toy_tokenizer

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


def make_recurrent(**overrides):
    return make(**dict(lrt="none", arch="recurrent", sequence_len=96) | overrides)

def layer_inputs(model, T, B=2):
    """Random x and value embedding of layer 0, and everything of it that gets gradients."""
    g = torch.Generator().manual_seed(T)
    config, dtype = model.config, model.wte.weight.dtype
    x = torch.randn(B, T, config.n_embd, generator=g, dtype=dtype).requires_grad_()
    value_embed = torch.randn(B, T, config.n_kv_head * config.head_dim, generator=g, dtype=dtype).requires_grad_() if config.has_value_embed(0) else None
    return x, value_embed, [p for p in (x, value_embed, *model.h[0].parameters()) if p is not None]

def outputs_and_gradients(form, model, T, B=2, window=None):
    """y, k, v of layer 0 by one of the two forms, and the gradients of all its inputs and weights of a random sum of them."""
    x, value_embed, leaves = layer_inputs(model, T, B)
    *arguments, own_window = model.h[0].arguments(x, value_embed, (model.cos[:T], model.sin[:T]))
    outputs = form(*arguments, own_window if window is None else window)
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in outputs)
    return *outputs, *torch.autograd.grad(loss, leaves)

def assert_same(model, T, B=2, window=None, atol=1e-10):
    for a, b in zip(*(outputs_and_gradients(form, model, T, B, window) for form in (tiled, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# -----------------------------------------------------------------------------
# The authors' numbers

@pytest.mark.skipif(not FIXTURES, reason=f"no fixtures in {PARITY} (set PARITY_DIR)")
@pytest.mark.parametrize("form", [reference, tiled])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_parity(path, form):
    """No rotary embedding (cos 1, sin 0), no gates; weight_kv_proj is Wk over Wv, as ours."""
    z = np.load(path)
    meta, x = json.loads(str(z["meta"])), torch.from_numpy(z["x"]).requires_grad_()
    (B, T, D), H = x.shape, meta["heads"]
    names = ("q_proj", "attn_out", "kv_proj", "ff_proj", "ff_out")
    weights = [torch.from_numpy(z[f"weight_{name}"]).requires_grad_() for name in names]
    q, k, v = ((norm(x) @ w.t()).view(B, T, H, D // H).transpose(1, 2) for w in (weights[0], weights[2][:D], weights[2][D:]))
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
    """Outputs and every gradient in float64, T = 1 .. 70 over all variants, each with some lengths around powers of two."""
    model, n = make_recurrent(**VARIANTS[variant]), list(VARIANTS).index(variant)
    for T in {1, 2, 3, 31, 32, 33, 64, *range(1 + n, 71, len(VARIANTS))}:
        assert_same(model, T, B=1 + T % 3)

@pytest.mark.parametrize("window", [0, 1, 2, 3, 7, 8, 31, 32])
def test_tiled_with_a_window(window):
    model = make_recurrent()
    for T in (1, 2, 9, 33, 40):
        assert_same(model, T, window=window)

def test_tiled_in_pieces(monkeypatch):
    """A tile of more scores than SCRATCH is worked off some heads at a time, to the same numbers."""
    monkeypatch.setattr(recurrent, "SCRATCH", 300)
    assert_same(make_recurrent(), 40, B=3)
    assert_same(make_recurrent(), 40, window=5)

def test_gradcheck():
    for options in (dict(), dict(qk_norm=False)):
        model = make_recurrent(n_embd=4, n_head=2, n_kv_head=1)
        x, value_embed, _ = layer_inputs(model, 5, B=1)
        x, q, k, v, value_embed, rotary, weights, window = model.h[0].arguments(x, value_embed, (model.cos[:5], model.sin[:5]))
        leaves = [i.detach().requires_grad_() for i in (x, q, k, v, value_embed, *weights)]
        assert torch.autograd.gradcheck(lambda x, q, k, v, value_embed, *weights: tiled(x, q, k, v, value_embed, rotary, weights, window, **options), leaves)

@pytest.mark.parametrize("T,window", [(1, 9), (2, 9), (37, 99), (64, 64), (50, 7), (33, 1), (9, 0)])
def test_tiles_meet_every_pair_once_and_in_time(T, window):
    met = torch.zeros(T, T, dtype=torch.int64)
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
    """Keys read: T/2 log2 T at a power of two. Kept for the backward pass: O(T), where autograd over t keeps O(T^2)."""
    for n in (7, 10, 11):
        assert keys_read(2**n, 2**n) == 2**n * n // 2
    model = make_recurrent(dtype=torch.float32)
    def kept(form, T):
        x, value_embed, leaves = layer_inputs(model, T)
        return saved_bytes(lambda: form(*model.h[0].arguments(x, value_embed, (model.cos[:T], model.sin[:T]))), leaves)
    assert kept(tiled, 96) < 2.1 * kept(tiled, 48) and kept(reference, 96) > 3 * kept(reference, 48)

def test_the_walk_depends_on_no_value():
    """Forward and backward on tensors without data: no step waits for a number, so that a GPU's queue never runs dry."""
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=32, vocab_size=8, n_layer=1, n_head=4, n_kv_head=2, n_embd=16, arch="recurrent"))
        x, value_embed, start = torch.empty(3, 19, 16, requires_grad=True), torch.empty(3, 19, 8), torch.zeros(3, dtype=torch.int64)
        y, _, _ = tiled(*model.h[0].arguments(x, value_embed, (model.cos[:19], model.sin[:19]))[:-1], 5, start)
        y.sum().backward()
    assert x.grad.is_meta and x.grad.shape == x.shape

def test_causality():
    model, T = make_recurrent(window_pattern="SL", sequence_len=24), 21
    idx, _ = tokens(T)
    (_, hidden, _), = run(model, idx, plain(T))
    for p in (0, 1, 7, 15, 16):
        changed = torch.cat([idx[:, :p + 1], (idx[:, p + 1:] + 1) % 37], dim=1)
        (_, other, _), = run(model, changed, plain(T))
        torch.testing.assert_close(other[:, :p + 1], hidden[:, :p + 1], rtol=0, atol=1e-12)
        assert (other[:, p + 1:] - hidden[:, p + 1:]).abs().amin(dim=(0, 2)).max() > 1e-3
    x, value_embed, _ = layer_inputs(model, T)
    y, _, _ = tiled(*model.h[0].arguments(x, value_embed, (model.cos[:T], model.sin[:T])))
    for p in (0, 7, 16):
        grad, = torch.autograd.grad(y[:, p].sum(), x, retain_graph=True)
        assert (grad[:, p + 1:] == 0).all() and (grad[:, :p + 1].abs().amax(dim=(0, 2)) > 0).all()


# -----------------------------------------------------------------------------
# Captured blocks: on a CPU with a recorder in the place of CUDA graphs

def storages(tree):
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}

class Recorder(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: a list of kernels and of the memory they read and write, without the Python around them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        out = kernel(*args, **(kwargs or {}))
        self.calls.append((kernel, args, kwargs or {}, out))
        return out

    def replay(self):
        for kernel, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(kernel(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
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
    """Blocks of 8 positions, captured by a Recorder; yields what is recorded. All a graph touches must be its own."""
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
    monkeypatch.setattr(recurrent, "tiled", partial(tiled, capture=True))  # as the blocks of a model call it
    yield recorders
    for graph in filter(None, recurrent.graphs.values()):
        assert graph.replay.__self__.external() <= storages(graph.own)

def shift(*modules):
    """As an optimizer, in place."""
    with torch.no_grad():
        for p in (p for m in modules for p in m.parameters()):
            p.add_(0.1 * torch.randn_like(p))

@pytest.mark.parametrize("variant", VARIANTS)
def test_captured_blocks_are_the_definition(variant, recorded):
    """Outputs and gradients of replays: other inputs, other lengths, other weights, another layer, all through the same two graphs."""
    model, captured = make_recurrent(**VARIANTS[variant]), partial(tiled, capture=True)
    for T in (8, 24, 8, 37, 40, 7):
        shift(model)
        for a, b in zip(*(outputs_and_gradients(form, model, T) for form in (captured, reference)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert len(recorded) == 2 and len(recurrent.graphs) == 2

def test_captured_kinds(recorded, monkeypatch):
    """A window within a block or beyond it, with padding or without, keys normed or not; a graph does not remember where rows started."""
    monkeypatch.setattr(recurrent, "GRAPHS", 16)
    model, T, starts = make_recurrent(), 29, [torch.tensor(i) for i in ([0, 0], [3, 12], [28, 1])]
    for window, start, qk_norm in [(11, None, True), (3, None, True), (3, None, False), (9, None, True), *((w, s, True) for w in (3, 9, 0) for s in starts)] * 2:
        forms = [partial(tiled, start=start, qk_norm=qk_norm, capture=on) for on in (True, False)]
        forms += [partial(reference, qk_norm=qk_norm)] * (start is None)
        captured, *others = (outputs_and_gradients(form, model, T, window=window) for form in forms)
        for other in others:
            for x, y in zip(captured, other, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert len(recorded) == 2 * 6  # a window of 11 and one of 9 are the same to 8 positions

def test_captured_in_any_order(recorded, monkeypatch):
    """Forward twice, then backward in reverse or not at all: nothing that is kept is a graph's own memory. no_grad is the same graph."""
    models, idx = [make_recurrent(seed=i) for i in range(2)], tokens(27)
    steps = [TrainStep(m, Schedule("plain")) for m in models]
    def gradients(i, loss):
        return torch.autograd.grad(loss, list(models[i].parameters()))
    with monkeypatch.context() as patched:
        patched.setattr(recurrent, "tiled", lambda *args: reference(*args[:-1]))  # no start
        expected = [gradients(i, step(*idx)[0]) for i, step in enumerate(steps)]
    for order in ((0, 1), (1, 0), (1,)):
        losses = [step(*idx)[0] for step in steps]
        with torch.no_grad():
            steps[0](*tokens(33, seed=9))
        for i in order:
            for a, b in zip(gradients(i, losses[i]), expected[i], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert len(recorded) == 2

def test_captured_training_is_the_same(recorded, monkeypatch):
    """Steps of an optimizer, layers with and without a window, with activation checkpointing and without."""
    runs = []
    for form, recompute in ((tiled, False), (partial(tiled, capture=True), False), (partial(tiled, capture=True), True)):
        monkeypatch.setattr(recurrent, "tiled", form)
        model = make_recurrent(window_pattern="SL")
        model.recompute = recompute
        step, optimizer = TrainStep(model, Schedule("plain")), torch.optim.SGD(model.parameters(), lr=0.1)
        runs.append([])
        for i in range(4):
            loss, _ = step(*tokens(27, seed=i))
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            runs[-1].append(loss.item())
    assert runs[0] == pytest.approx(runs[1], abs=1e-10) and runs[0] == pytest.approx(runs[2], abs=1e-10)
    assert len(recorded) == 2  # one forward and one backward for all layers

def test_what_is_captured_and_kept(recorded):
    """Nothing of a kind that comes once, or of less than a block; of the others the last GRAPHS."""
    model = make_recurrent()
    def forward(T, B):
        with torch.no_grad():
            x, value_embed, _ = layer_inputs(model, T, B)
            recurrent.tiled(*model.h[0].arguments(x, value_embed, (model.cos[:T], model.sin[:T])))
        return len(recorded)
    assert [forward(T, 1) for T in (7, 7, 7, 8, 7)] == [0] * 5
    assert [forward(T, B) for T, B in ((30, 1), (8, 1), (9, 2), (17, 2), (8, 1), (8, 2))] == [1, 1, 1, 2, 2, 2]
    assert [forward(8, B) for B in (3, 3, 2, 3, 1, 1)] == [2, 3, 3, 3, 3, 4]  # 1 had to go for 3, and 2 for 1
    assert len(recurrent.graphs) == 2

def test_captured_walk_launches_little(monkeypatch):
    """Forward and backward, with all that is not the walk, a few operations a position are left of about a hundred."""
    monkeypatch.setattr(recurrent, "graphs", {})
    monkeypatch.setattr(recurrent, "record", lambda work, device: lambda: None)
    model, T = make_recurrent(sequence_len=128), 128
    def launches():
        with Recorder() as recorder:
            outputs_and_gradients(partial(tiled, capture=True), model, T)
        return sum(not kernel.is_view for kernel, *_ in recorder.calls)
    first, _, third = (launches() for _ in range(3))  # the first has not captured yet, the second does
    assert first > 90 * T and third < 4 * T

def test_failed_capture_is_one_warning(recorded, monkeypatch):
    """As if memory had run out: the same numbers, and no second try."""
    tries = []
    def record(work, device):
        tries.append(device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB.\nAnd so on.")
    monkeypatch.setattr(recurrent, "record", record)
    model = make_recurrent(n_layer=3)
    step = TrainStep(model, Schedule("plain"))
    with pytest.warns(RuntimeWarning, match="without a CUDA graph, and slower: CUDA out of memory. Tried to allocate 2 MiB.$") as warned:
        losses = [step(*tokens(20))[0] for _ in range(3)]
        torch.autograd.grad(sum(losses), list(model.parameters()))
    assert losses[0] == losses[1] == losses[2] and len(tries) == len(warned) == 2  # forward and backward

def test_a_cpu_captures_nothing(monkeypatch):
    monkeypatch.setattr(recurrent, "record", None)
    monkeypatch.setattr(recurrent, "BLOCK", 4)
    model = make_recurrent()
    for _ in range(3):
        TrainStep(model, Schedule("plain"))(*tokens(20))[0].backward()
    assert not recurrent.graphs

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; what CUDA graphs record is tested on a CPU above")
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_captured_on_a_gpu(dtype, tolerance, recompute, monkeypatch, device="cuda"):
    """Losses and gradients of some steps through real graphs, on autograd's thread too, and the weights they lead to, against none."""
    monkeypatch.setattr(recurrent, "graphs", {})
    runs = []
    for device, capture in [(device, True), (device, False)] + [("cpu", False)] * (dtype == torch.float64):
        monkeypatch.setattr(recurrent, "tiled", partial(tiled, capture=capture))
        model = make_recurrent(sequence_len=256, window_pattern="SL", dtype=torch.promote_types(dtype, torch.float32)).to(device)
        model.compute_dtype, model.recompute, results = dtype, recompute, []
        step, optimizer = TrainStep(model, Schedule("plain")), torch.optim.SGD(model.parameters(), lr=0.01)
        def loss(T, B, seed):
            return step(*(x.to(device) for x in tokens(T, B, seed)))[0]
        for i, T in enumerate((256, 256, 200, 64, 150)):
            losses = [loss(T, 2, seed) for seed in (i, 100 + i)]
            for x in reversed(losses):
                x.backward()
            with torch.no_grad():
                losses.append(loss(T, 5, i))
            results += [*(x.detach() for x in losses), *(p.grad.clone() for p in model.parameters())]
            optimizer.step(), optimizer.zero_grad()
        runs.append([x.detach().cpu() for x in (*results, *model.parameters())])
    assert sum(isinstance(graph, recurrent.Graph) for graph in recurrent.graphs.values()) == 3  # forward, backward, forward of 5 rows
    for captured, *others in zip(*runs, strict=True):
        for x in others:
            assert (captured - x).norm() <= tolerance * x.norm()


# -----------------------------------------------------------------------------
# The model

def by_the_equations(model, idx):
    """design.md, section 7, for one sequence and one position after the other, with nothing of model.py but the weights: logits."""
    c = model.config
    H, G, d = c.n_head, c.n_kv_head, c.head_dim
    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    def rotated(x, t):
        cos, sin = model.cos[t, 0, :d // 2], model.sin[t, 0, :d // 2]
        a, b = x[..., :d // 2], x[..., d // 2:]
        return rms(torch.cat([a * cos + b * sin, -a * sin + b * cos], dim=-1))
    x0 = rms(model.wte.weight[idx])
    h = list(x0)
    for l, block in enumerate(model.h):
        attn, keys, values = block.attn, [], []
        def pair(u, t):
            k, v = rotated((attn.c_k.weight @ u).view(G, d), t), (attn.c_v.weight @ u).view(G, d)
            if c.has_value_embed(l):
                v = v + 2 * torch.sigmoid(attn.gate.weight @ u)[:, None] * model.value_embeds[str(l)].weight[idx[t]].view(G, d)
            return k, v
        for t in range(len(idx)):
            x = model.resid_lambdas[l] * h[t] + model.x0_lambdas[l] * x0[t]
            u = rms(x)
            q, (k, v) = rotated((attn.c_q.weight @ u).view(H, d), t), pair(u, t)
            first = max(t - c.window(l), 0)
            k, v = torch.stack([*keys[first:], k]), torch.stack([*values[first:], v])  # the temporary pair is the last
            a = [torch.softmax(k[:, i * G // H] @ q[i] / math.sqrt(d), 0) @ v[:, i * G // H] for i in range(H)]
            x = x + attn.c_proj.weight @ torch.cat(a)
            h[t] = x + block.mlp.c_proj.weight @ F.relu(block.mlp.c_fc.weight @ rms(x)).square()
            k, v = pair(rms(h[t]), t)
            keys.append(k), values.append(v)
    return 15 * torch.tanh(rms(torch.stack(h)) @ model.lm_head.weight.t() / 15)

@pytest.mark.parametrize("variant", VARIANTS)
def test_model_is_the_equations(variant):
    """Training forward, decoding, and the gradients of both, against the slow implementation."""
    model = make_recurrent(**dict(sequence_len=16) | VARIANTS[variant])
    idx, targets = tokens(13)
    expected = torch.stack([by_the_equations(model, row) for row in idx])
    (_, hidden, _), = run(model, idx, plain(13))
    torch.testing.assert_close(model.logits(hidden), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(decode(model, idx)[0], expected, rtol=0, atol=1e-10)
    losses = [F.cross_entropy(expected.flatten(0, 1), targets.flatten()), TrainStep(model, Schedule("plain"))(idx, targets)[0],
              model.token_loss(torch.cat([h for _, h, _ in run(model, idx, sequential(13))], 1), targets).mean()]
    slow, *ours = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for grads in ours:
        for a, b in zip(grads, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

def test_the_recurrence_is_one():
    """The same weights as a plain GPT give something else."""
    model, idx = make_recurrent(), tokens(20)[0]
    other = make(lrt="none", sequence_len=96)
    other.load_state_dict(model.state_dict())
    (_, a, _), (_, b, _) = (*run(model, idx, plain(20)), *run(other, idx, plain(20)))
    assert (a[:, :1] - b[:, :1]).abs().max() < 1e-12 and (a[:, 1:] - b[:, 1:]).abs().max() > 0.1

def test_prompts_of_different_lengths():
    """Rows aligned at their ends, through the training forward and on by decoding: as if each were alone, final pairs in the cache."""
    model, T, lengths = make_recurrent(sequence_len=16, window_pattern="SL"), 12, [12, 1, 5, 11]
    rows = [tokens(n + 2, B=1, seed=n)[0][0] for n in lengths]
    idx = torch.stack([torch.cat([torch.full((T - n,), 5), row]) for n, row in zip(lengths, rows)])
    start = torch.tensor([T - n for n in lengths])
    whole, rolling = KVCache(model.config, 4, T, "cpu", torch.float64, start=start), KVCache(model.config, 4, 14, "cpu", torch.float64, True, start)
    with torch.no_grad():
        hidden = [model(idx[:, :T], range(T), whole)[0]]
        rolling.copy_from(whole, T, 1)
        hidden += [model(idx[:, t:t + 1], range(t, t + 1), rolling)[0] for t in (T, T + 1)]
        logits = model.logits(torch.cat(hidden, 1))
        for i, (n, row) in enumerate(zip(lengths, rows)):  # rotary tables are float32: no closer than that
            torch.testing.assert_close(logits[i, T - n:], decode(model, row[None])[0][0], rtol=0, atol=2e-6)

def test_generation():
    """Greedy tokens are those of the training forward, to the end of the context; a sequence does not depend on its batch."""
    model = make_recurrent(sequence_len=24, dtype=torch.float32, window_pattern="SL")
    prompts = [[BOS], [BOS, 5, 6, 7, 8, 9, 10, 11, 12], [BOS, 3], [BOS, *range(23)]]
    for prompt in prompts[:3]:
        out = [t for _, t, _ in generate(model, toy_tokenizer(), [prompt], 100, temperature=0) if t is not None]
        with torch.no_grad():
            (_, hidden, _), = run(model, torch.tensor([prompt + out[:-1]]), plain(len(prompt) + len(out) - 1))
        assert out == model.logits(hidden)[0, len(prompt) - 1:].argmax(-1).tolist() and len(out) > 3
    options = dict(temperature=1.0, top_k=20)
    together = complete(model, toy_tokenizer(), prompts, 100, num_samples=2, seed=7, **options)
    for i, prompt in enumerate(prompts):
        for j in range(2):
            assert complete(model, toy_tokenizer(), [prompt], 100, seed=7 + j, **options) == [together[2 * i + j]]

def test_what_is_refused():
    with pytest.raises(ValueError, match="arch recurrent goes with lrt none, not with shared"):
        GPTConfig(arch="recurrent", lrt="shared")
    with pytest.raises(ValueError, match="arch 'x' is none of gpt, recurrent"):
        GPTConfig(arch="x")
    model, kv = make_recurrent(), KVBuffer(3)
    model(tokens(4)[0], range(4), kv)
    for positions in (range(4, 8), range(0, 8, 2)):
        with pytest.raises(ValueError, match="from position 0 on, or one position at a time"):
            model(tokens(4)[0], positions, kv)

def test_bfloat16_activations():
    """Weights stay float32; the running softmax and the sums of gradients do, too."""
    losses, grads = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_recurrent(dtype=torch.float32)
        model.compute_dtype = dtype
        loss, _ = TrainStep(model, Schedule("plain"))(*tokens(40))
        losses.append(loss.item())
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert abs(losses[0] - losses[1]) < 0.05 * losses[0]
    assert F.cosine_similarity(*grads, dim=0) > 0.98

def test_compiled_step_is_the_same():
    """torch.compile goes around the walk over positions, not into it."""
    torch._dynamo.reset()
    model = make_recurrent(dtype=torch.float32)
    step = TrainStep(model, Schedule("plain"))
    compiled = torch.compile(step, backend="eager", dynamic=False)
    idx, targets = tokens(40)
    a, b = (torch.autograd.grad(s(idx, targets)[0], list(model.parameters())) for s in (step, compiled))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)

def test_flops_count_the_second_projection():
    same = dict(sequence_len=64, vocab_size=100, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    for value_embeds in ("none", "all"):
        plain, recurrent = (GPT(GPTConfig(**same, value_embeds=value_embeds, arch=arch)) for arch in ("gpt", "recurrent"))
        gates = sum(p.numel() for name, p in plain.named_parameters() if "gate" in name)
        assert bool(gates) == (value_embeds == "all")
        assert recurrent.flops_per_token() - plain.flops_per_token() == 6 * (2 * 2 * 32 * 16 + gates)  # two layers, Wk and Wv, and their gates


# -----------------------------------------------------------------------------
# The command lines

def test_train_evaluate_sample_resume(data, here):
    flags = ["--data", data, *SMALL, "--arch", "recurrent", "--num-iterations", 30, "--eval-every", 15]
    done = shell("train.py", *flags, "--name", "whole")
    assert done.returncode == 0 and "recurrent" in done.stdout, done.stderr
    assert sum(x["loss"] for x in log("runs/whole")[-5:]) / 5 < 5.8 < log("runs/whole")[0]["loss"]
    last = log("runs/whole", "eval")[-1]["decode_rows"]
    assert last["decode"] == pytest.approx(last["merged"], rel=1e-5)

    code, _, err = cli("eval_core.py", "--checkpoint", "runs/whole", "--rows", 4, "--decode-rows", 2, "--referee", "--split", "val", "--json", "bpb.json")
    assert code == 0, err
    bpb = json.loads((here / "bpb.json").read_text())["val"]["decode_bpb"]
    assert bpb["decode"] == pytest.approx(bpb["token by token"], rel=1e-5)
    (here / "prompts.txt").write_text("def \nimport os, sys\n")
    done = shell("sample.py", "--checkpoint", "runs/whole", "--prompt-file", "prompts.txt", "--max-new-tokens", 6, "--seed", 3)
    assert done.returncode == 0, done.stderr
    alone = cli("sample.py", "--checkpoint", "runs/whole", "--prompt", "def ", "--max-new-tokens", 6, "--seed", 3)[1]
    assert alone == "def " + json.loads(done.stdout.splitlines()[0])["text"] + "\n"

    process = subprocess.Popen(list(map(str, [sys.executable, HERE / "train.py", *flags, "--name", "cut"])), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 00010/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    assert process.wait() == 0 and 10 < len(log("runs/cut")) < 30
    code, _, err = cli("train.py", "--resume", "runs/cut")
    assert code == 0, err
    assert [x["loss"] for x in log("runs/cut")] == [x["loss"] for x in log("runs/whole")]
    a, b = (load_checkpoint(find_checkpoint(f"runs/{name}"))["model"] for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_dry_run_and_refusals(data, here):
    """The KV cache of a shallow wide model is smaller at about the same parameters; nothing is written."""
    flags = ["--data", data, *SMALL, "--num-iterations", 5, "--dry-run", "--window-pattern", "L"]
    sizes = []
    for model in (["--lrt", "none", "--depth", 4, "--aspect-ratio", 16], ["--arch", "recurrent", "--depth", 2, "--aspect-ratio", 40]):
        code, out, err = cli("train.py", *flags, *model)
        assert code == 0 and "parameters" in out and "5 steps" in out and "FLOPs" in out, err
        sizes.append(int(out.split("KV cache ")[1].split()[0].replace(",", "")))
    assert sizes == [4 * 2 * 32 * 64 * 4, 2 * 2 * 32 * 80 * 4] and not Path("runs").exists()
    assert_refused(cli("train.py", *flags, "--arch", "recurrent", "--lrt", "shared"), "recurrent goes with lrt none")
    assert cli("train.py", "--data", data, *SMALL, "--arch", "recurrent", "--num-iterations", 1)[0] == 0
    assert_refused(cli("train.py", "--resume", "runs/d2_recurrent", "--arch", "gpt"), "was trained with --arch recurrent")
    path = find_checkpoint("runs/d2_recurrent")
    checkpoint = load_checkpoint(path)
    del checkpoint["args"]["arch"]  # a run from before the flag existed: it was a gpt
    torch.save(checkpoint, "old.pt")
    assert_refused(cli("train.py", "--resume", "old.pt", "--arch", "recurrent"), "was trained with --arch gpt")

def test_bench(here):
    code, out, err = cli("bench.py", "recurrent", "--context", 8, 16, "--width", 16, "--repeats", 2, "--reference-up-to", 8, "--json", "bench.json")
    assert code == 0, err
    rows = json.loads((here / "bench.json").read_text())["rows"]
    assert [(r["T"], r["form"], r["keys_read"]) for r in rows] == [(8, "plain", None), (8, "tiled", 12), (8, "reference", 28), (16, "plain", None), (16, "tiled", 32)]
