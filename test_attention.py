"""
The fast paths of training against their plain definitions: attention over parts against one dense mask, the fused head
and loss against logits and cross-entropy, recomputed layers against saved ones. float64, forward and gradients.
"""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import attention
import interleave
from attention import KVBuffer, relation
from interleave import Schedule, TrainStep
from model import GPT, GPTConfig

def schedules(T):
    """Every pattern of writes that a schedule makes."""
    yield from (interleave.interleaved(T, S) for S in (1, 2, 3, 4, 8))
    yield interleave.refine(T, 2)
    yield interleave.interleaved(T, 2) + interleave.interleaved(T, 2)
    yield from (interleave.chunked(T, chunk) for chunk in (1, 3, 4))

@pytest.mark.parametrize("T", [1, 2, 5, 8, 17, 40])
def test_attention_over_parts_equals_a_dense_mask(T):
    """Full and windowed, odd lengths, grouped queries: outputs and the gradients of every pass's q, k and v."""
    torch.manual_seed(0)
    for passes, window, (n_head, n_kv_head) in itertools.product(schedules(T), (0, 1, 3, 7, 20, T), ((2, 2), (4, 2))):
        kv, leaves, done, expected = KVBuffer(1), [], [], []
        k = v = torch.zeros(2, n_kv_head, T, 4, dtype=torch.float64)
        for positions in passes:
            q, *new = (torch.randn(2, h, len(positions), 4, dtype=torch.float64, requires_grad=True) for h in (n_head, n_kv_head, n_kv_head))
            leaves += [q, *new]
            done.append(kv.attend(0, positions, q, *new, window))
            where = torch.tensor(positions)
            k, v = (old.index_copy(2, where, x) for old, x in zip((k, v), new))
            key = torch.arange(T)
            mask = (key <= where[:, None]) & (key >= where[:, None] - window)
            full = torch.where(mask, (q @ k.repeat_interleave(n_head // n_kv_head, 1).mT) / 2, -torch.inf).softmax(-1)
            expected.append(torch.where(mask, full, 0) @ v.repeat_interleave(n_head // n_kv_head, 1))
        upstream = [torch.randn_like(x) for x in done]
        grads = [torch.autograd.grad(out, leaves, upstream, materialize_grads=True) for out in (done, expected)]
        for a, b in zip([*done, *grads[0]], [*expected, *grads[1]]):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

def test_relation_equals_its_definition():
    ranges = [range(a, b, step) for step in (1, 2, 3) for a in range(4) for b in range(a + 1, 11)]
    for queries, keys, window in itertools.product(ranges, ranges, (0, 1, 2, 3, 5, 20)):
        seen = {(m, n) for m, q in enumerate(queries) for n, k in enumerate(keys) if q - window <= k <= q}
        r = relation(queries, keys, window)
        everything = {(m, n) for m in range(len(queries)) for n in range(len(keys))}
        if r == "all":
            assert seen == everything
        elif r == "none":
            assert not seen
        elif r != "mixed":
            shift, back = r
            assert seen == {(m, n) for m, n in everything if n <= m - shift and (back is None or n >= m - shift - back)}

def test_the_fast_path_is_taken_and_copies_nothing():
    """Subset passes need neither a mask nor a copy: all parts are views of what the passes wrote."""
    T, S, kv = 24, 4, KVBuffer(1)
    written = []
    for positions in interleave.interleaved(T, S):
        k = torch.randn(1, 2, len(positions), 4)
        written.append(k)
        kv.write(0, positions, k, k)
        relations = [relation(positions, p, window) for p, _, _ in kv.parts[0] for window in (T, 11)]
        assert "mixed" not in relations
        assert {x.untyped_storage().data_ptr() for _, x, _ in kv.parts[0]} <= {x.untyped_storage().data_ptr() for x in written}
    assert len(kv.parts[0]) == S and kv.parts[0][0][1] is written[-1]

def test_kv_buffer_leaves_earlier_writes_alone():
    kv, first = KVBuffer(1), torch.randn(1, 2, 7, 4)
    kv.write(0, range(7), first, first)
    before = kv.parts[0]
    later = kv.copy()
    later.write(0, range(1, 7, 2), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert kv.parts[0] is before and torch.equal(before[0][1], first)
    newest = {p.start: k for p, k, _ in later.parts[0]}
    assert (newest[1] == 0).all() and torch.equal(newest[0], first[:, :, ::2])
    with pytest.raises(ValueError, match="takes a piece out"):
        kv.write(0, range(2, 5), first[:, :, :3], first[:, :, :3])

@pytest.mark.parametrize("rows", [3, 256])
def test_head_loss_equals_cross_entropy(rows, monkeypatch):
    """In pieces of any number of rows, with targets left out and weights: loss, means, and all gradients."""
    monkeypatch.setattr("model.HeadLoss.rows", lambda x: rows)
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=8, vocab_size=37, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)).double()
    torch.nn.init.normal_(model.lm_head.weight, std=2.0)  # far into the softcap
    hidden = [torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 3)]
    targets = [torch.randint(37, (2, n)) for n in (5, 3)]
    targets[0][1, 2] = targets[1][0] = -1
    loss, means = model.loss(hidden, targets, [0.7, 0.3])
    parts = [F.cross_entropy(15 * torch.tanh(model.lm_head(h) / 15).flatten(0, 1), t.flatten(), ignore_index=-1, reduction="sum") / t.numel()
             for h, t in zip(hidden, targets)]
    torch.testing.assert_close(means, torch.stack(parts).detach())
    expected = 0.7 * parts[0] + 0.3 * parts[1]
    torch.testing.assert_close(loss, expected)
    leaves = [*hidden, model.lm_head.weight]
    for a, b in zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.stack([model.token_loss(h, t).mean() for h, t in zip(hidden, targets)]), means)

def small_model(**options):
    torch.manual_seed(0)
    config = dict(sequence_len=12, vocab_size=37, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL", lrt="shared")
    model = GPT(GPTConfig(**config | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model

@pytest.mark.parametrize("schedule", [Schedule("plain"), Schedule(), Schedule(subsets=3, kv_refresh=True), Schedule(subsets=2, detach=True), Schedule(forward_passes=1), Schedule("refine", refinements=2, forward_passes=2),
                                      Schedule("refine", refinements=2), Schedule("chunked", chunk=5), Schedule("sequential")], ids=str)
def test_recomputed_layers_give_the_same_gradients(schedule):
    model, idx, targets = small_model().double(), torch.randint(37, (2, 12)), torch.randint(37, (2, 12))
    results, saved = [], []
    for model.recompute in (False, True):
        model.zero_grad()
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (x, held.setdefault(x.untyped_storage().data_ptr(), x))[0], lambda x: x):
            loss, _ = TrainStep(model, schedule)(idx, targets)
        saved.append(sum(x.untyped_storage().nbytes() for x in held.values()))
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert saved[1] < saved[0]

def test_recomputed_layers_leave_nothing_behind(monkeypatch):
    """What a layer writes when it runs again is gone when the next one does: else its activations would pile up."""
    written, alive, write = [], [], KVBuffer.write
    def watched(self, layer, positions, k, v):
        alive.append(sum(w() is not None for w in written))
        written.append(weakref.ref(k))
        write(self, layer, positions, k, v)
    monkeypatch.setattr(KVBuffer, "write", watched)
    model, idx = small_model(n_layer=6), torch.randint(37, (2, 12))
    model.recompute = True
    loss, _ = TrainStep(model, Schedule())(idx, idx)
    assert max(alive) >= 6
    written.clear(), alive.clear()
    loss.backward()
    assert len(alive) == 18 and max(alive) <= 1

@pytest.mark.parametrize("window", [3, 12])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_the_cuda_kernels_are_called_right(window, n_kv_head, monkeypatch):
    """
    Without a GPU: the CUDA branch runs on fake tensors, which know shapes and dtypes only, and its calls are compared with
    flash attention's definition, written out here, in place of the two kernels.
    """
    if not torch.cuda.is_available():
        with FakeTensorMode(), torch.device("cuda"):
            q, k, v = (torch.empty(2, 13, h, 16, dtype=torch.bfloat16).transpose(1, 2) for h in (4, n_kv_head, n_kv_head))
            out, lse, seeds = attention.kernel(q, k, v, True, window)
            assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (2, 4, 13) and lse.dtype == torch.float32
            grads = attention.kernel_backward(out, out, lse, q, k, v, True, window, seeds)
            assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]

    def flash(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, window_size_left=None):
        assert (max_q, max_k, dropout, debug) == (q.size(1), k.size(1), 0.0, False) and (not causal or max_q == max_k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score = q @ k.repeat_interleave(q.size(1) // k.size(1), 1).mT * q.size(-1) ** -0.5
        if causal:
            ones = torch.ones(max_q, max_k, dtype=torch.bool)
            score = score.masked_fill(~(ones.tril() if window_size_left is None else ones.tril() & ones.triu(-window_size_left)), -torch.inf)
        return (score.softmax(-1) @ v.repeat_interleave(q.size(1) // v.size(1), 1)).transpose(1, 2), score.logsumexp(-1), *[torch.zeros(1)] * 3

    def flash_backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, window_size_left=None):
        args = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            own, own_lse, *_ = flash(*args, cum_q, cum_k, max_q, max_k, dropout, causal, False, window_size_left=window_size_left)
        # with the merged L every probability is exp(own L - L) times the part's own, and delta = sum(grad * merged out)
        weight = (own_lse - lse).exp().detach()
        delta = (grad * (own - out)).sum(-1).transpose(1, 2).detach()
        return torch.autograd.grad([own, own_lse], args, [grad * weight.transpose(1, 2).unsqueeze(-1), weight * delta])

    class Fake:
        _flash_attention_forward, _flash_attention_backward = staticmethod(flash), staticmethod(flash_backward)
    results = []
    for cuda in (False, True):
        torch.manual_seed(0)
        kv, leaves, done = KVBuffer(1), [], []
        if cuda:
            monkeypatch.setattr(attention, "aten", Fake)
            monkeypatch.setattr(attention, "on_cuda", lambda q: True)
        for positions in interleave.interleaved(13, 2):
            new = [torch.randn(2, h, len(positions), 8, dtype=torch.float64, requires_grad=True) for h in (4, n_kv_head, n_kv_head)]
            leaves += new
            done.append(kv.attend(0, positions, *new, window))
        results.append(torch.autograd.grad([x.square().sum() for x in done], leaves, materialize_grads=True) + tuple(done))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
