"""
The fast paths of training against their plain definitions: attention over parts against a dense mask, the
fused linear cross-entropy against logits and cross-entropy, recomputed layers against saved ones. float64,
forward and gradients.
"""

import importlib.util
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import attention
import common
import interleave
from attention import KVBuffer, relation
from interleave import Schedule, TrainStep
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# Attention over parts

def schedules(T):
    """Every pattern of writes that a schedule makes."""
    for S in (1, 2, 3, 4, 8):
        yield interleave.interleaved(T, S)
    yield interleave.refine(T, 2)
    yield interleave.interleaved(T, 2) + interleave.interleaved(T, 2)
    for chunk in (1, 3, 4):
        yield interleave.chunked(T, chunk)

def random_qkv(positions, n_head, n_kv_head, d):
    """q, k and v of two sequences at these positions."""
    shapes = [(2, heads, len(positions), d) for heads in (n_head, n_kv_head, n_kv_head)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

def dense_attention(q, k, v, positions, window):
    """Attention of q at `positions` over keys at 0 .. T-1, with a mask and no kernel."""
    repeats = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    query = torch.tensor(positions)[:, None]
    key = torch.arange(k.size(2))
    mask = (key <= query) & (key >= query - window)
    p = torch.where(mask, q @ k.mT / q.size(-1) ** 0.5, -torch.inf).softmax(-1)
    return torch.where(mask, p, 0) @ v

@pytest.mark.parametrize("T", [1, 2, 5, 8, 17, 40])
def test_attention_over_parts_equals_a_dense_mask(T):
    """Full and windowed, odd lengths, grouped queries: outputs and gradients of every pass's q, k and v."""
    torch.manual_seed(0)
    windows = (0, 1, 3, 7, 20, T)
    for passes, window, (n_head, n_kv_head) in itertools.product(schedules(T), windows, ((2, 2), (4, 2))):
        kv = KVBuffer(1)
        k = v = torch.zeros(2, n_kv_head, T, 4, dtype=torch.float64)
        leaves, outputs, expected = [], [], []
        for positions in passes:
            q, new_k, new_v = random_qkv(positions, n_head, n_kv_head, d=4)
            leaves += [q, new_k, new_v]
            outputs.append(kv.attend(0, positions, q, new_k, new_v, window))
            k = k.index_copy(2, torch.tensor(positions), new_k)
            v = v.index_copy(2, torch.tensor(positions), new_v)
            expected.append(dense_attention(q, k, v, positions, window))
        upstream = [torch.randn_like(x) for x in outputs]
        grads, expected_grads = (torch.autograd.grad(out, leaves, upstream, materialize_grads=True)
                                 for out in (outputs, expected))
        for a, b in zip([*outputs, *grads], [*expected, *expected_grads]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def test_relation_equals_its_definition():
    ranges = [range(a, b, step) for step in (1, 2, 3) for a in range(4) for b in range(a + 1, 11)]
    for queries, keys, window in itertools.product(ranges, ranges, (0, 1, 2, 3, 5, 20)):
        pairs = set(itertools.product(range(len(queries)), range(len(keys))))
        seen = {(m, n) for m, n in pairs if queries[m] - window <= keys[n] <= queries[m]}
        found = relation(queries, keys, window)
        if found == "all":
            assert seen == pairs
        elif found == "none":
            assert not seen
        elif found != "mixed":
            shift, back = found
            if back is None:
                back = len(queries)  # reaches every key
            assert seen == {(m, n) for m, n in pairs if m - shift - back <= n <= m - shift}

def test_the_fast_path_is_taken_and_copies_nothing():
    """Subset passes need neither a mask nor a copy: all parts are views of what the passes wrote."""
    def storages(tensors):
        return {x.untyped_storage().data_ptr() for x in tensors}

    T, S = 24, 4
    kv = KVBuffer(1)
    written = []
    for positions in interleave.interleaved(T, S):
        k = torch.randn(1, 2, len(positions), 4)
        written.append(k)
        kv.write(0, positions, k, k)
        for part_positions, _, _ in kv.parts[0]:
            for window in (T, 11):
                assert relation(positions, part_positions, window) != "mixed"
        assert storages(k for _, k, _ in kv.parts[0]) <= storages(written)
    assert len(kv.parts[0]) == S
    assert kv.parts[0][0][1] is written[-1]

def test_kv_buffer_leaves_earlier_writes_alone():
    kv = KVBuffer(1)
    first = torch.randn(1, 2, 7, 4)
    kv.write(0, range(7), first, first)
    before = kv.parts[0]
    later = kv.copy()
    zeros = torch.zeros(1, 2, 3, 4)
    later.write(0, range(1, 7, 2), zeros, zeros)
    assert kv.parts[0] is before and torch.equal(before[0][1], first)
    newest = {positions.start: k for positions, k, _ in later.parts[0]}
    assert (newest[1] == 0).all()
    assert torch.equal(newest[0], first[:, :, ::2])
    with pytest.raises(ValueError, match="takes a piece out"):
        kv.write(0, range(2, 5), first[:, :, :3], first[:, :, :3])


# -----------------------------------------------------------------------------
# CUDA's kernels, without a GPU

def flash_scores(q, k, causal, window):
    """The scores (B, heads, P, n) that the kernels' definitions below are made of."""
    assert not causal or q.size(1) == k.size(1)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    score = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT * q.size(-1) ** -0.5
    if causal:
        seen = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
        if window is not None:
            seen = seen.triu(-window)
        score = score.masked_fill(~seen, -torch.inf)
    return score

def flash(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, window_size_left=None):
    """The definition of aten._flash_attention_forward, as far as we use it: q, k, v are (B, P, heads, d)."""
    assert (max_q, max_k, dropout, debug) == (q.size(1), k.size(1), 0.0, False)
    score = flash_scores(q, k, causal, window_size_left)
    out = score.softmax(-1) @ v.transpose(1, 2).repeat_interleave(q.size(2) // k.size(2), 1)
    unused = torch.zeros(1)
    return out.transpose(1, 2), score.logsumexp(-1), unused, unused, unused

def flash_backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *,
                   window_size_left=None):
    """The same of aten._flash_attention_backward, where out and lse may be those of several parts, merged."""
    assert (max_q, max_k, dropout) == (q.size(1), k.size(1), 0.0)
    assert lse.is_contiguous()
    repeats = q.size(2) // k.size(2)
    p = (flash_scores(q, k, causal, window_size_left) - lse.unsqueeze(-1)).exp()
    delta = (grad * out).sum(-1, keepdim=True).transpose(1, 2)
    q, k, v, grad = (x.transpose(1, 2) for x in (q, k, v, grad))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    ds = p * (grad @ v.mT - delta) * q.size(-1) ** -0.5
    dk, dv = ((x.mT @ y).unflatten(1, (-1, repeats)).sum(2) for x, y in ((ds, q), (p, grad)))
    return tuple(x.transpose(1, 2) for x in (ds @ k, dk, dv))

class FlashByDefinition:
    """In the place of torch.ops.aten."""
    _flash_attention_forward = staticmethod(flash)
    _flash_attention_backward = staticmethod(flash_backward)

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels themselves are run")
@pytest.mark.parametrize("window", [3, 12])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_the_cuda_kernels_take_our_arguments(window, n_kv_head):
    """The CUDA branch runs on fake tensors, which know shapes and dtypes only."""
    with FakeTensorMode(), torch.device("cuda"):
        shapes = [(2, 13, heads, 16) for heads in (4, n_kv_head, n_kv_head)]
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes)
        out, lse, seeds = attention.kernel(q, k, v, True, window)
        assert out.shape == q.shape and out.dtype == q.dtype
        assert lse.shape == (2, 4, 13) and lse.dtype == torch.float32
        grads = attention.kernel_backward(out, out, lse, q, k, v, True, window, seeds)
        assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]

def interleaved_attention(window, n_kv_head):
    """The outputs of all passes of an interleaved step, and the gradients of their inputs."""
    torch.manual_seed(0)
    kv = KVBuffer(1)
    leaves, outputs = [], []
    for positions in interleave.interleaved(13, 2):
        qkv = random_qkv(positions, 4, n_kv_head, d=8)
        leaves += qkv
        outputs.append(kv.attend(0, positions, *qkv, window))
    grads = torch.autograd.grad([x.square().sum() for x in outputs], leaves, materialize_grads=True)
    return *outputs, *grads

@pytest.mark.parametrize("window", [3, 12])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_the_cuda_kernels_are_called_right(window, n_kv_head, monkeypatch):
    """The calls of the CUDA branch, with the kernels' definition in their place, against the CPU branch."""
    expected = interleaved_attention(window, n_kv_head)
    monkeypatch.setattr(attention, "aten", FlashByDefinition)
    monkeypatch.setattr(attention, "on_cuda", lambda q: True)
    for a, b in zip(interleaved_attention(window, n_kv_head), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

@pytest.mark.parametrize("causal, back, pairs", [
    (False, None, 5 * 7), (True, None, 15), (True, 0, 5), (True, 2, 1 + 2 + 3 + 3 + 3), (True, 9, 15)])
def test_the_flops_of_a_flash_call_are_counted(causal, back, pairs):
    """The compiler goes by them where it computes things again."""
    n = 5 if causal else 7
    q, k, v = (torch.empty(2, P, heads, 8, device="meta") for P, heads in ((5, 6), (n, 3), (n, 3)))
    with FlopCounterMode(display=False) as counted:
        torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, 5, n, 0.0, causal, False, window_size_left=back)
    assert counted.get_total_flops() == 4 * 2 * 6 * 8 * pairs

def test_the_cuda_backward_gets_a_dense_log_sum_exp(monkeypatch):
    """Its kernel asks for no strides. torch.compile pads L where 5 heads are at 251 positions."""
    monkeypatch.setattr(attention, "aten", FlashByDefinition)
    q, k, v, grad = torch.randn(4, 2, 251, 5, 8, dtype=torch.float64)
    out, lse, *seeds = flash(q, k, v, None, None, 251, 251, 0.0, True, False)[:4]
    padded = torch.full((2 * 1280,), torch.nan, dtype=lse.dtype).as_strided(lse.shape, (1280, 251, 1))
    padded.copy_(lse)
    grads, expected = (attention.cuda_backward(grad, q, k, v, out, x, True, None, *seeds)
                       for x in (padded, lse))
    for a, b in zip(grads, expected):
        assert torch.equal(a, b)

def flash_3_forward(q, k, v, *options):
    """The definition of torch.ops.flash_attn_3.fwd, as far as torch and we use it."""
    *nothing, max_q, max_k = options[:11]
    scale, causal, left, right, chunk, softcap = options[20:26]
    assert (set(nothing), scale, right, chunk, softcap) == ({None}, None, -1, 0, 0.0)
    out, lse, *unused = flash(q, k, v, None, None, max_q, max_k, 0.0, causal, False,
                              window_size_left=None if left == -1 else left)
    return out, lse, *unused[:2]

def flash_3_backward(grad, q, k, v, out, lse, dq, dk, dv, *options):
    """The same of torch.ops.flash_attn_3.bwd."""
    *nothing, max_q, max_k, scale, causal, left, right = options[:10]
    assert (set(nothing), scale, right) == ({None}, None, -1)
    grads = flash_backward(grad, q, k, v, out, lse, None, None, max_q, max_k, 0.0, causal, None, None,
                           window_size_left=None if left == -1 else left)
    for mine, x in zip((dq, dk, dv), grads):
        mine.copy_(x)

@pytest.fixture
def flash_3(monkeypatch):
    """What torch runs in the place of its own kernels where FlashAttention 3 is active."""
    fa3 = pytest.importorskip("torch.nn.attention._fa3")
    monkeypatch.setattr(fa3, "_FA3_CUDA_FWD", flash_3_forward)
    monkeypatch.setattr(fa3, "_FA3_CUDA_BWD", flash_3_backward)
    return fa3

@pytest.mark.parametrize("window", [3, 12])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flash_attention_3_is_called_right(window, n_kv_head, flash_3, monkeypatch):
    """As above, by way of what torch makes of our calls."""
    expected = interleaved_attention(window, n_kv_head)
    for check in ("_fa3_forward_support_error", "_fa3_backward_support_error"):
        monkeypatch.setattr(flash_3, check, lambda *_: None)
    monkeypatch.setattr(attention, "on_cuda", lambda q: True)
    monkeypatch.setattr(attention, "aten", SimpleNamespace(
        _flash_attention_forward=flash_3._fa3_flash_attention_forward_impl_default,
        _flash_attention_backward=flash_3._fa3_flash_attention_backward_impl))
    for a, b in zip(interleaved_attention(window, n_kv_head), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels themselves are run")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_attention_3_takes_our_arguments(head_dim, flash_3, monkeypatch):
    """torch refuses what its kernels do not support, and says why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash_3, "_get_device_major", lambda device: 9)
    with FakeTensorMode(), torch.device("cuda"):
        q, k, v = (torch.empty(2, 13, 4, head_dim, dtype=torch.bfloat16) for _ in range(3))
        lse = torch.empty(2, 4, 13)
        assert flash_3._fa3_forward_support_error(q, k, v, 0.0, False, *[None] * 6) is None
        assert flash_3._fa3_backward_support_error(q, q, k, v, q, lse, 0.0, None, 3, None) is None

@pytest.mark.parametrize("capability, installed, active", [
    ((9, 0), True, ["FA3"]), ((8, 0), True, []), ((10, 0), True, []), ((9, 0), False, [])])
def test_flash_attention_3_is_used_on_hopper_if_it_is_there(capability, installed, active, monkeypatch):
    activated = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3", "FA4"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    common.use_flash_attention_3(torch.device("cuda", 0))
    assert activated == active

def test_a_flash_attention_3_that_does_not_load_is_not_used(monkeypatch, capsys):
    def fail(name):
        raise ImportError("undefined symbol: x\nmore")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    monkeypatch.setattr(torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    common.use_flash_attention_3(torch.device("cuda", 0))
    warning = capsys.readouterr().err
    assert "undefined symbol: x" in warning and "more" not in warning and warning.count("\n") == 1

@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels themselves are run")
@pytest.mark.parametrize("d, way", [(8, "flash"), (256, "flash"), (12, "dense"), (264, "dense")])
def test_heads_that_flash_does_not_take_are_dense_on_cuda(d, way, monkeypatch):
    monkeypatch.setattr(attention.Merged, "apply", lambda *_: "flash")
    monkeypatch.setattr(attention, "attend_dense", lambda *_: "dense")
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 4, 13, d, dtype=torch.bfloat16)
        assert KVBuffer(1).attend(0, range(13), x, x, x, window=3) == way


# -----------------------------------------------------------------------------
# The fused linear cross-entropy, and recomputed layers

@pytest.mark.parametrize("rows", [3, 256])
def test_fused_linear_cross_entropy(rows, monkeypatch):
    """In chunks of any size, with targets left out and weights: loss, means, and all gradients."""
    monkeypatch.setattr("model.FusedLinearCrossEntropy.chunk_size", lambda x: rows)
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=8, vocab_size=37, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    model = GPT(config).double()
    torch.nn.init.normal_(model.lm_head.weight, std=2.0)  # far into the softcap
    hidden = [torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 3)]
    targets = [torch.randint(37, (2, n)) for n in (5, 3)]
    targets[0][1, 2] = targets[1][0] = -1
    loss, means = model.loss(hidden, targets, [0.7, 0.3])

    expected_means = []
    for h, t in zip(hidden, targets):
        logits = 15 * torch.tanh(model.lm_head(h) / 15)
        total = F.cross_entropy(logits.flatten(0, 1), t.flatten(), ignore_index=-1, reduction="sum")
        expected_means.append(total / t.numel())
    expected = 0.7 * expected_means[0] + 0.3 * expected_means[1]
    torch.testing.assert_close(means, torch.stack(expected_means).detach())
    torch.testing.assert_close(loss, expected)
    leaves = [*hidden, model.lm_head.weight]
    for a, b in zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

    # compiled, the same to the bit in another form
    compiled_form = []
    for compiling in (True, False):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        compiled_form.append(torch.autograd.grad(model.loss(hidden, targets, [0.7, 0.3])[0], leaves))
    for a, b in zip(*compiled_form):
        assert torch.equal(a, b)

    token_losses = [model.token_loss(h, t) for h, t in zip(hidden, targets)]
    torch.testing.assert_close(torch.stack([x.mean() for x in token_losses]), means)

def small_model(**overrides):
    torch.manual_seed(0)
    config = dict(sequence_len=12, vocab_size=37, n_layer=3, n_head=4, n_kv_head=2, n_embd=32,
                  window_pattern="SL", lrt="shared")
    model = GPT(GPTConfig(**config | overrides))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model

RECOMPUTED = [
    Schedule("plain"),
    Schedule(),
    Schedule(subsets=3, kv_refresh=True),
    Schedule(subsets=2, detach=True),
    Schedule("draft", subsets=2),
    Schedule("draft", drafts=2),
    Schedule("refine", refinements=2),
    Schedule("chunked", chunk=5),
    Schedule("sequential"),
]

@pytest.mark.parametrize("schedule", RECOMPUTED, ids=str)
def test_recomputed_layers_give_the_same_gradients(schedule):
    model = small_model().double()
    idx, targets = torch.randint(37, (2, 12)), torch.randint(37, (2, 12))

    def step(recompute):
        """The loss and the gradients, and how many bytes autograd saved for them."""
        model.recompute = recompute
        model.zero_grad()
        held = {}  # kept alive, so that no address is used twice
        def pack(x):
            held[x.untyped_storage().data_ptr()] = x
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _ = TrainStep(model, schedule)(idx, targets)
        saved = sum(x.untyped_storage().nbytes() for x in held.values())
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], saved

    expected, saved_without = step(recompute=False)
    results, saved = step(recompute=True)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert saved < saved_without

def test_recomputed_layers_leave_nothing_behind(monkeypatch):
    """What a layer writes when it runs again is freed before the next one runs: activations do not add up."""
    write = KVBuffer.write
    written = []  # weak references to the keys of every write
    alive = []  # how many of them were alive at each write

    def watched_write(self, layer, positions, k, v):
        alive.append(sum(reference() is not None for reference in written))
        written.append(weakref.ref(k))
        write(self, layer, positions, k, v)

    monkeypatch.setattr(KVBuffer, "write", watched_write)
    model = small_model(n_layer=6)
    model.recompute = True
    idx = torch.randint(37, (2, 12))
    loss, _ = TrainStep(model, Schedule())(idx, idx)
    assert max(alive) >= 6
    written.clear()
    alive.clear()
    loss.backward()
    assert len(alive) == 18 and max(alive) <= 1
