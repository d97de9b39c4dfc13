"""
The mathematics: fixtures of the authors' implementation (folder PARITY_DIR, default ../shared/parity), equivalence of
schedules with the exact recurrence, causality, gradients. Command lines are in test_cli.py, data in test_data.py.
"""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import interleave
from interleave import Schedule, TrainStep, pass_losses, run
from model import GPT, GPTConfig, KVCache, take, visible

PARITY = Path(os.environ.get("PARITY_DIR", Path(__file__).parent / "../shared/parity"))
FIXTURES = sorted(p for p in PARITY.glob("*.npz") if not p.stem.startswith("recurrent_block"))  # those: test_recurrent.py


def make(seed=0, dtype=torch.float64, **overrides):
    """A tiny model with every weight random: zero gates and projections would hide mistakes."""
    config = dict(sequence_len=32, vocab_size=37, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="L",
                  lrt="shared")
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**config | overrides)).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and name not in ("wte.weight",):
                p.normal_(std=0.7 / math.sqrt(p.size(1)) if "embeds" not in name else 0.3)
            elif p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model

def tokens(T, B=2, seed=0, vocab=37):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (B, T), generator=g), torch.randint(vocab, (B, T), generator=g)

def decode(model, idx):
    """Token by token through the in-place cache: logits (B, T, V) and memory (B, T, D)."""
    kv = KVCache(model.config, idx.size(0), idx.size(1), idx.device, model.wte.weight.dtype)
    memory, logits, memories = None, [], []
    with torch.no_grad():
        for t in range(idx.size(1)):
            hidden, source = model(idx[:, t:t + 1], range(t, t + 1), kv, memory)
            memory = source if model.config.lrt != "none" else None
            logits.append(model.logits(hidden))
            memories.append(source)
    return torch.cat(logits, 1), torch.cat(memories, 1)

def last_pass(model, idx, passes, **options):
    for _, hidden, memories in run(model, idx, passes, **options):
        pass
    return hidden, interleave.newest(memories)


# -----------------------------------------------------------------------------
# Parity with the authors' numbers

def fixture_model(meta, z):
    """The fixture's model, and our parameter's name for each of the fixture's."""
    c = meta["config"]
    L, V = c["n_layer"], c["vocab_size"]
    lrt = "none" if meta["kind"] == "baseline" else "shared" if meta["tied_projections"] else "layerwise"
    value_layers = {l for l in range(L) if any(f"weight/{stem}.{l}.weight" in z for stem in
                                               ("value_embeds", "interleaved_init_value_embeds"))}
    value_embeds = "none" if not value_layers else "all" if len(value_layers) == L else "alternate"
    model = GPT(GPTConfig(sequence_len=c["sequence_len"], vocab_size=V, n_layer=L, n_head=c["n_head"],
                          n_kv_head=c["n_kv_head"], n_embd=c["n_embd"], window_pattern=c["window_pattern"],
                          value_embeds=value_embeds, lrt=lrt, source_layer=meta.get("source_layer", L - 1)))
    names = {"transformer.wte.weight": "wte.weight", "lm_head.weight": "lm_head.weight",
             "resid_lambdas": "resid_lambdas", "x0_lambdas": "x0_lambdas", "interleaved_lambdas": "mem_lambdas"}
    for l in range(L):
        pair = 0 if lrt == "shared" else l
        names |= {f"transformer.h.{l}.{part}.weight": f"h.{l}.{part}.weight" for part in
                  ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        names |= {f"transformer.h.{l}.attn.{gate}.weight": f"h.{l}.attn.gate.weight" for gate in ("triple_gate", "ve_gate")}
        names |= {f"{stem}.{l}.weight": f"value_embeds.{l}.weight" for stem in
                  ("value_embeds", "interleaved_init_value_embeds")}
        names |= {f"interleaved_key_projections.{l}.W_v.weight": f"mem_k.{pair}.weight",
                  f"interleaved_projections.{l}.W_v.weight": f"mem_v.{pair}.weight"}
    return model, names

@pytest.mark.skipif(not FIXTURES, reason=f"no fixtures in {PARITY} (set PARITY_DIR)")
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_parity(path):
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    model, names = fixture_model(meta, z)
    params = dict(model.named_parameters())
    vocab = meta["config"]["vocab_size"]
    loaded, grads = set(), {}
    with torch.no_grad():
        for key in z.files:
            kind, _, name = key.partition("/")
            if kind in ("weight", "grad"):
                ours = names[name]
                value = torch.from_numpy(z[key])[:vocab] if name.endswith(("wte.weight", "lm_head.weight")) else torch.from_numpy(z[key])
                if kind == "weight":
                    assert params[ours].shape == value.shape, name
                    params[ours].copy_(value)
                    loaded.add(ours)
                else:  # the one shared matrix gets the sum over the layers
                    grads[ours] = value if ours not in grads or meta["kind"] == "baseline" else grads[ours] + value
    assert loaded == set(params), set(params) - loaded

    idx, targets = torch.from_numpy(z["idx"]), torch.from_numpy(z["targets"])
    schedule = Schedule("plain") if meta["kind"] == "baseline" else \
        Schedule("interleaved", subsets=meta["subsets"], kv_refresh=meta["kv_refresh"])
    loss, losses = TrainStep(model, schedule)(idx, targets)
    loss.backward()
    assert abs(loss.item() - z["loss"].item()) < 1e-5
    worst = max(((params[n].grad - g).norm() / g.norm().clamp(min=1e-12)).item() for n, g in grads.items())
    assert set(grads) == set(params) and worst < 1e-5, worst

    if meta["kind"] == "baseline":
        (_, hidden, _), = run(model, idx, interleave.plain(idx.size(1)))
        assert (model.logits(hidden) - torch.from_numpy(z["logits"])[..., :vocab]).abs().max() < 1e-5
        return
    assert np.abs(losses.numpy() - z["pass_losses"]).max() < 1e-5
    token_losses, _, _ = pass_losses(model, idx, targets, schedule)
    assert np.abs(token_losses.numpy() - z["pass_token_losses"]).max() < 1e-5
    with torch.no_grad():
        _, memory = last_pass(model, idx, schedule.passes(idx.size(1)), kv_refresh=schedule.kv_refresh)
    assert np.abs(memory.numpy() - z["memory"]).max() < 1e-5
    logits, memory = decode(model, idx)
    assert np.abs(logits.numpy() - z["sequential_logits"][..., :vocab]).max() < 1e-5
    assert np.abs(memory.numpy() - z["sequential_memory"]).max() < 1e-5


# -----------------------------------------------------------------------------
# Against a second, slow implementation that follows design.md position by position

def reference(model, idx, passes, kv_refresh=False):
    """Equations (1) to (6) for one position at a time: a list with, for each pass, {position: hidden (B, D)}; memories."""
    c, (B, T) = model.config, idx.shape
    G, d, L = c.n_kv_head, c.head_dim, c.n_layer
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    zero = torch.zeros(B, c.n_embd, dtype=torch.float64)
    keys, values, local, memory, out = [{} for _ in range(L)], [{} for _ in range(L)], {}, {}, []

    def rot(x, t):
        theta = t * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
        cos, sin = theta.cos().double(), theta.sin().double()
        a, b = x[..., :d // 2], x[..., d // 2:]
        return torch.cat([a * cos + b * sin, -a * sin + b * cos], -1)

    def store(l, t, k, v):
        keys[l][t], values[l][t] = rms(rot(k, t)), v

    def from_memory(l, m):
        pair = 0 if c.lrt == "shared" else l
        return [(m @ R[pair].weight.T).view(B, G, d) if c.kv_memory else 0 for R in (model.mem_k, model.mem_v)]

    for i, positions in enumerate(passes):
        old = dict(memory)
        previous = {t: old.get(t - 1, zero) for t in range(T)}
        hidden, x0 = {}, {}
        for t in positions:
            x0[t] = hidden[t] = rms(model.wte.weight[idx[:, t]])
        for l, block in enumerate(model.h):
            q = {}
            for t in positions:
                h = model.resid_lambdas[l] * hidden[t] + model.x0_lambdas[l] * x0[t]
                if c.residual_memory:
                    h = h + model.mem_lambdas[l] * previous[t]
                hidden[t], u = h, rms(h)
                k, v = [(u @ W.weight.T).view(B, G, d) for W in (block.attn.c_k, block.attn.c_v)]
                gates = list((2 * torch.sigmoid(u @ block.attn.gate.weight.T)).view(B, -1, G, 1).unbind(1)) \
                    if block.attn.gate is not None else []
                mk, mv = from_memory(l, previous[t])
                g_mem = 0
                if c.kv_memory:
                    g_loc, g_mem = gates.pop(0), gates.pop(0)
                    k, v = g_loc * k, g_loc * v
                if c.has_value_embed(l):
                    v = v + gates.pop(0) * model.value_embeds[str(l)].weight[idx[:, t]].view(B, G, d)
                local.setdefault((l, t), (k, v, g_mem))
                store(l, t, k + g_mem * mk, v + g_mem * mv)
                q[t] = rms(rot((u @ block.attn.c_q.weight.T).view(B, c.n_head, d), t))
            w = c.sequence_len // 2 if c.window_pattern[l % len(c.window_pattern)] == "S" and l < L - 1 else T
            for t in positions:
                seen = range(max(t - w, 0), t + 1)
                K = torch.stack([keys[l][s] for s in seen], 2).repeat_interleave(c.n_head // G, 1)
                V = torch.stack([values[l][s] for s in seen], 2).repeat_interleave(c.n_head // G, 1)
                y = (torch.softmax((K @ q[t][..., None])[..., 0] / d ** 0.5, -1)[..., None] * V).sum(2)
                h = hidden[t] + y.flatten(1) @ block.attn.c_proj.weight.T
                hidden[t] = h + torch.relu(rms(h) @ block.mlp.c_fc.weight.T) ** 2 @ block.mlp.c_proj.weight.T
                if l == c.source_layer and c.lrt != "none":
                    memory[t] = rms(hidden[t])
        out.append({t: rms(h) for t, h in hidden.items()})
        if kv_refresh and memory:
            for t in {t for later in passes[i + 1:] for t in later}:
                for l in range(L):
                    k, v, g_mem = local[l, t]
                    mk, mv = from_memory(l, memory[t - 1] if t else zero)
                    store(l, t, k + g_mem * mk, v + g_mem * mv)
    return out, memory

VARIANTS = {
    "shared": {},
    "layerwise": dict(lrt="layerwise"),
    "none": dict(lrt="none"),
    "none-alternate-mha": dict(lrt="none", value_embeds="alternate", n_kv_head=4),
    "windows": dict(sequence_len=10, window_pattern="SSL", n_layer=4),
    "windows-mqa": dict(sequence_len=10, window_pattern="S", n_kv_head=1, source_layer=0),
    "kv": dict(inject="kv", value_embeds="alternate"),
    "kv-no-value-embeds": dict(inject="kv", value_embeds="none", lrt="layerwise", source_layer=2),
    "residual": dict(inject="residual"),
    "residual-no-value-embeds": dict(inject="residual", value_embeds="none"),
    "one-layer": dict(n_layer=1, n_head=1, n_kv_head=1),
}
SCHEDULES = {
    "plain": Schedule("plain"), "s1": Schedule(subsets=1), "s2": Schedule(), "s3": Schedule(subsets=3),
    "s99": Schedule(subsets=99), "s2-refresh": Schedule(kv_refresh=True), "s3-refresh": Schedule(subsets=3, kv_refresh=True),
    "refine": Schedule("refine", refinements=2), "chunk4": Schedule("chunked", chunk=4),
    "chunk99": Schedule("chunked", chunk=99), "sequential": Schedule("sequential"),
}

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_slow_reference(variant, schedule):
    model, schedule, T = make(**VARIANTS[variant]), SCHEDULES[schedule], 9
    idx, _ = tokens(T)
    passes = schedule.passes(T)
    with torch.no_grad():
        expected, expected_memory = reference(model, idx, passes, schedule.kv_refresh)
        for i, (positions, hidden, memories) in enumerate(run(model, idx, passes, schedule.kv_refresh)):
            assert list(positions) == sorted(expected[i])
            for j, t in enumerate(positions):
                torch.testing.assert_close(hidden[:, j], expected[i][t], rtol=0, atol=1e-10)
        for t, m in expected_memory.items():
            torch.testing.assert_close(interleave.newest(memories)[:, t], m, rtol=0, atol=1e-10)


@pytest.mark.parametrize("passes", [
    [range(9), *interleave.interleaved(9, 2)[1:], *interleave.interleaved(9, 4)[1:], range(9)],  # finer and finer, then all
    [range(9), range(1, 9, 2), range(9), range(0, 9, 2), range(3, 9, 4)], [range(4), range(4, 9), range(9), range(2, 9, 3)]], ids=str)
@pytest.mark.parametrize("variant", ["shared", "windows", "none"])
def test_a_schedule_of_ones_own_equals_slow_reference(variant, passes):
    """Any list of whole passes, chunks and residue classes can be run, also in orders that no schedule here has."""
    model, (idx, _) = make(**VARIANTS[variant]), tokens(9)
    with torch.no_grad():
        expected, expected_memory = reference(model, idx, passes)
        for i, (positions, hidden, memories) in enumerate(run(model, idx, passes)):
            for j, t in enumerate(positions):
                torch.testing.assert_close(hidden[:, j], expected[i][t], rtol=0, atol=1e-10)
        for t, m in expected_memory.items():
            torch.testing.assert_close(interleave.newest(memories)[:, t], m, rtol=0, atol=1e-10)


# -----------------------------------------------------------------------------
# Schedules: what they cover, and what they are equal to

@pytest.mark.parametrize("T", [1, 2, 3, 7, 8])
def test_passes_cover_every_position_once(T):
    for S in (1, 2, 3, 8, 20):
        first, *subsets = interleave.interleaved(T, S)
        assert first == range(T) and len(subsets) == min(S, T)
        assert sorted(p for r in subsets for p in r) == list(range(T))
        assert all(p % S == i for i, r in enumerate(subsets) for p in r)
    for chunk in (1, 2, 3, 20):
        assert [p for r in interleave.chunked(T, chunk) for p in r] == list(range(T))
    assert [list(r) for r in interleave.sequential(T)] == [[t] for t in range(T)]

@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "kv", "residual"])
def test_refine_reaches_the_exact_recurrence(variant):
    """T-1 refinements are the token-by-token result: outputs, and the gradient of the last pass's loss; float64."""
    T, model = 9, make(**VARIANTS[variant])
    idx, targets = tokens(T)
    results = []
    for passes in (interleave.refine(T, T - 1), interleave.sequential(T)):
        model.zero_grad()
        done = [(p, h) for p, h, _ in run(model, idx, passes)]
        hidden = done[-1][1] if passes[-1] == range(T) else torch.cat([h for _, h in done], 1)
        model.token_loss(hidden, targets).mean().backward()
        results.append((hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (h1, g1), (h2, g2) = results
    torch.testing.assert_close(h1, h2, rtol=0, atol=1e-11)
    for name in g1:
        torch.testing.assert_close(g1[name], g2[name], rtol=0, atol=1e-11, msg=name)

def test_refine_is_not_exact_too_early():
    """The test above would pass on a model that ignores memory: on these weights memory matters."""
    T, model = 9, make()
    idx, _ = tokens(T)
    with torch.no_grad():
        exact, _ = last_pass(model, idx, interleave.refine(T, T - 1))
        early, _ = last_pass(model, idx, interleave.refine(T, 1))
        assert (exact - early).abs().max() > 1e-3

@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_through_the_cache_equals_sequential(variant):
    T, model = 10, make(**VARIANTS[variant])
    idx, _ = tokens(T)
    with torch.no_grad():
        done = list(run(model, idx, interleave.sequential(T)))
        logits, memory = decode(model, idx)
        torch.testing.assert_close(logits, model.logits(torch.cat([h for _, h, _ in done], 1)), rtol=0, atol=1e-11)
        torch.testing.assert_close(memory, interleave.newest(done[-1][2]), rtol=0, atol=1e-11)

def test_a_full_pass_fills_the_cache_like_decoding():
    """Without recurrence, prefill through the cache in pieces of any size is the full pass."""
    model = make(lrt="none", sequence_len=10, window_pattern="SL")
    idx, _ = tokens(10)
    with torch.no_grad():
        (_, hidden, _), = run(model, idx, interleave.plain(10))
        kv = KVCache(model.config, 2, 10, "cpu", torch.float64)
        pieces = [model(idx[:, r.start:r.stop], r, kv)[0] for r in (range(4), range(4, 5), range(5, 10))]
        torch.testing.assert_close(torch.cat(pieces, 1), hidden, rtol=0, atol=1e-11)

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "none"])
def test_causality(variant, schedule):
    """Another token at position t moves nothing before t, in any pass, and moves something at t or after."""
    T, model, schedule = 9, make(**VARIANTS[variant]), SCHEDULES[schedule]
    idx, _ = tokens(T)
    with torch.no_grad():
        before = list(run(model, idx, schedule.passes(T), schedule.kv_refresh))
        for t in range(T):
            changed = idx.clone()
            changed[:, t] = (changed[:, t] + 1) % 37
            for (positions, h1, m1), (_, h2, m2) in zip(before, run(model, changed, schedule.passes(T), schedule.kv_refresh)):
                moved = [p for j, p in enumerate(positions) if (h1[:, j] != h2[:, j]).any()]
                assert all(p >= t for p in moved)
                assert t not in positions or t in moved
                assert torch.equal(interleave.newest(m1)[:, :t], interleave.newest(m2)[:, :t])

def test_memory_carries_information_beyond_attention():
    """With a window of one position and one layer only memory can reach further back; zero memory cannot."""
    model = make(sequence_len=2 * 9, window_pattern="S", n_layer=2, source_layer=1, n_head=1, n_kv_head=1)
    model.config.window = lambda layer: 0  # each position sees only itself
    idx, _ = tokens(9)
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 37
    with torch.no_grad():
        a, b = decode(model, idx)[0], decode(model, changed)[0]
        assert (a[:, -1] - b[:, -1]).abs().max() > 1e-9
        (_, a, _), = run(model, idx, interleave.plain(9))
        (_, b, _), = run(model, changed, interleave.plain(9))
        assert torch.equal(a[:, 1:], b[:, 1:])

def test_silenced_lrt_equals_baseline():
    """c = 0, Rk = Rv = 0 and g_loc's gate rows zero: the baseline, whatever the rest."""
    lrt, base = make(lrt="layerwise"), make(lrt="none")
    G = lrt.config.n_kv_head
    with torch.no_grad():
        state = lrt.state_dict()
        for l, block in enumerate(lrt.h):
            block.attn.gate.weight[:G] = 0
            state[f"h.{l}.attn.gate.weight"] = block.attn.gate.weight[2 * G:].clone()
        for R in (*lrt.mem_k, *lrt.mem_v):
            R.weight.zero_()
        lrt.mem_lambdas.zero_()
        base.load_state_dict({k: v for k, v in state.items() if not k.startswith("mem_")})
        idx, _ = tokens(11)
        (_, expected, _), = run(base, idx, interleave.plain(11))
        for positions, hidden, _ in run(lrt, idx, interleave.interleaved(11, 3)):
            torch.testing.assert_close(hidden, expected[:, list(positions)], rtol=0, atol=1e-12)

def test_source_layer_followed_by_identity_blocks():
    """Blocks that do nothing after the source layer: the same memory as from the last layer, hence the same model."""
    early, late = make(n_layer=4, source_layer=1), make(n_layer=4, source_layer=3)
    with torch.no_grad():
        for model in (early, late):
            for l in (2, 3):
                model.h[l].attn.c_proj.weight.zero_()
                model.h[l].mlp.c_proj.weight.zero_()
                model.resid_lambdas[l], model.x0_lambdas[l], model.mem_lambdas[l] = 1, 0, 0
        idx, _ = tokens(9)
        for passes in (interleave.interleaved(9, 2), interleave.sequential(9)):
            a, b = last_pass(early, idx, passes), last_pass(late, idx, passes)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        early.h[2].mlp.c_proj.weight.normal_()  # and when a later block does something, the two differ
        late.h[2].mlp.c_proj.weight.copy_(early.h[2].mlp.c_proj.weight)
        assert (last_pass(early, idx, passes)[0] - last_pass(late, idx, passes)[0]).abs().max() > 1e-3

@pytest.mark.parametrize("n_layer, expected", [(1, 0), (2, 1), (4, 2), (8, 5), (12, 8), (20, 14)])
def test_default_source_layer_is_upper_middle(n_layer, expected):
    assert GPTConfig(n_layer=n_layer).source_layer == expected

def test_merged_loss_is_the_last_pass_that_computed_a_position():
    model, (idx, targets) = make(), tokens(11)
    losses, mask, merged = pass_losses(model, idx, targets, Schedule(subsets=3))
    assert mask.sum(1).tolist() == [11, 4, 4, 3] and mask[1:].sum(0).tolist() == [1] * 11
    assert torch.equal(losses[:, :, ~mask[0]], losses[:, :, ~mask[0]]) and (losses.transpose(1, 2)[~mask] == 0).all()
    torch.testing.assert_close(merged, losses[1:].sum(0))
    total, means = TrainStep(model, Schedule(subsets=3))(idx, targets)
    torch.testing.assert_close(means, losses.sum((1, 2)) / (2 * mask.sum(1)))
    torch.testing.assert_close(total.detach(), means.mean())

def test_loss_weights_and_detach():
    model, (idx, targets) = make(), tokens(6)
    weighted = Schedule("refine", refinements=2, loss_weights=[0.0, 0.0, 2.0])
    assert weighted.deeper() == Schedule("refine", refinements=3, forward_passes=1, loss_weights=[0.0, 0.0, 0.0, 2.0])
    assert Schedule("refine", refinements=1, forward_passes=1).deeper() == Schedule("refine", refinements=2, forward_passes=2)
    loss, means = TrainStep(model, weighted)(idx, targets)
    torch.testing.assert_close(loss.detach(), means[-1])
    loss.backward()
    through = model.mem_v[0].weight.grad.clone()
    model.zero_grad()
    cut, _ = TrainStep(model, dataclasses.replace(weighted, detach=True))(idx, targets)
    cut.backward()
    torch.testing.assert_close(cut, loss)
    assert (through - model.mem_v[0].weight.grad).abs().max() > 1e-6  # the gradient did flow through the passes
    # interleaved: tokens at even positions reach the last subset only through keys, values and memory of earlier passes
    idx, last = torch.arange(6)[None], Schedule(loss_weights=[0.0, 0.0, 1.0])
    for detach in (False, True):
        model.zero_grad()
        TrainStep(model, dataclasses.replace(last, detach=detach))(idx, targets[:1])[0].backward()
        assert (model.wte.weight.grad[0:6:2] == 0).all() == detach and (model.wte.weight.grad[1:6:2] != 0).all()
    with pytest.raises(ValueError, match="2 loss weights for 3 passes"):
        Schedule("refine", refinements=2, loss_weights=[1.0, 1.0]).passes(6)

class FrozenFirst:
    """A model whose first n passes are run by a copy that takes no gradient, of what is looked up for them neither."""
    def __init__(self, model, n):
        self.config, self.embed, self.refresh, self.live, self.frozen = model.config, model.embed, model.refresh, model, [copy.deepcopy(model).requires_grad_(False)] * n
    def __call__(self, *args):
        if not self.frozen:
            return self.live(*args)
        *args, (x0, value_embeds) = args
        return self.frozen.pop()(*args, (x0.detach(), [x if x is None else x.detach() for x in value_embeds]))

@pytest.mark.parametrize("schedule", [Schedule(forward_passes=1), Schedule(subsets=3, kv_refresh=True, forward_passes=1), Schedule(subsets=3, forward_passes=2),
                                      Schedule(subsets=1, kv_refresh=True, forward_passes=1), Schedule("refine", refinements=1, forward_passes=1),
                                      Schedule("refine", refinements=3, forward_passes=2, loss_weights=[0.0, 0.0, 1.0, 3.0])], ids=str)
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "residual"])
def test_passes_that_run_forward_only(variant, schedule):
    """Their own loss does not count, no gradient enters them, all else is as ever; and they leave nothing for the backward."""
    model, (idx, targets), n = make(**VARIANTS[variant]), tokens(9), schedule.forward_passes
    passes = schedule.passes(9)
    weights = schedule.loss_weights or [0.0] * n + [1.0] * (len(passes) - n)
    whole = dataclasses.replace(schedule, forward_passes=0, loss_weights=weights)
    loss, means = TrainStep(model, schedule)(idx, targets)
    expected, expected_means = TrainStep(model, whole)(idx, targets)
    torch.testing.assert_close((loss, means), (expected, expected_means), rtol=0, atol=1e-12, equal_nan=True)
    assert means.isnan().tolist() == [w == 0 for w in weights]
    got = torch.autograd.grad(loss, list(model.parameters()))
    hidden = [hidden for _, hidden, _ in run(FrozenFirst(model, n), idx, passes, schedule.kv_refresh)]
    everything = model.loss(hidden, [take(targets, p) for p in passes], [w / sum(weights) for w in weights])[0]
    torch.testing.assert_close(loss, everything)
    for a, b in zip(got, torch.autograd.grad(everything, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    through = torch.autograd.grad(expected, list(model.parameters()))
    assert max((a - b).abs().max() for a, b in zip(got, through)) > 1e-6  # these passes would have got a gradient
    kept = []
    for s in (schedule, whole):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (x, n.append(x.nbytes))[0], lambda x: x):
            n = []
            TrainStep(model, s)(idx, targets)
            kept.append(sum(n))
    assert kept[0] < 0.8 * kept[1]

@pytest.mark.parametrize("schedule", [Schedule(loss_weights=[0.0, 1.0, 2.0]), Schedule("refine", refinements=2, loss_weights=[0.0, 0.0, 1.0])], ids=str)
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "residual"])
def test_what_a_pass_without_a_loss_leaves_out_changes_nothing(variant, schedule):
    model, (idx, targets) = make(**VARIANTS[variant]), tokens(9)
    passes = schedule.passes(9)
    loss, means = TrainStep(model, schedule)(idx, targets)
    everything, all_means = model.loss([hidden for _, hidden, _ in run(model, idx, passes)], [take(targets, p) for p in passes], schedule.weights(len(passes)))
    torch.testing.assert_close(loss, everything)
    torch.testing.assert_close(means, torch.where(torch.tensor(schedule.loss_weights) > 0, all_means, math.nan), equal_nan=True)
    for a, b in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, everything))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

def test_a_pass_that_only_hands_over_memory_stops_at_the_source():
    """Before another pass over the same positions nothing above the source is run, nor projected; keys and values of others are wanted."""
    model, (idx, targets) = make(lrt="layerwise", n_layer=3, source_layer=1), tokens(9)
    def layers(schedule):
        ran = []
        hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in model.named_modules() if name.startswith(("h.", "mem_k.")) and name.count(".") == 1]
        TrainStep(model, schedule)(idx, targets)
        for hook in hooks:
            hook.remove()
        return [name for name in ran if name.startswith("h")], [name for name in ran if name.startswith("m")]
    whole, memory = ["h.0", "h.1", "h.2"], ["mem_k.0", "mem_k.1", "mem_k.2"]
    assert layers(Schedule("refine", refinements=2, forward_passes=2)) == (whole[:2] * 2 + whole, memory[:2] + memory)
    assert layers(Schedule("refine", refinements=2, forward_passes=1)) == (whole[:2] + whole * 2, memory * 2)
    assert layers(Schedule("refine", refinements=2, loss_weights=[0.0, 0.0, 1.0])) == (whole[:2] * 2 + whole, memory[:2] + memory)
    assert layers(Schedule("refine", refinements=2, loss_weights=[0.0, 1.0, 1.0])) == (whole[:2] + whole * 2, memory * 2)
    assert layers(Schedule("refine", refinements=2)) == layers(Schedule(forward_passes=2)) == (whole * 3, memory * 2)


# -----------------------------------------------------------------------------
# Masks, gradients, dtypes

def test_visible_equals_its_definition():
    for positions in (range(1), range(7), range(3, 4), range(3, 7), range(0, 8, 2), range(1, 8, 3), range(5, 8, 9)):
        for window in (0, 1, 3, 6, 7, 100):
            mask, is_causal, first = visible(positions, window, "cpu")
            keys = list(range(first, positions[-1] + 1))
            for i, p in enumerate(positions):
                seen = {k for j, k in enumerate(keys) if (mask[i, j] if mask is not None else not is_causal or j <= i)}
                assert seen == {k for k in range(p + 1) if k >= p - window}, (positions, window, p)

@pytest.mark.parametrize("schedule", ["s2", "s3", "s2-refresh", "refine", "chunk4", "sequential"])
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows"])
def test_gradcheck(variant, schedule):
    """Autograd through buffer, memory and passes against finite differences, in random directions of all weights."""
    T = 5
    model = make(**{**VARIANTS[variant], "sequence_len": 6, "n_layer": 2, "n_embd": 16, "vocab_size": 11, "source_layer": 0})
    idx, targets = tokens(T, vocab=11)
    step = TrainStep(model, SCHEDULES[schedule])
    params = list(model.parameters())
    torch.manual_seed(1)
    directions = [[torch.randn_like(p) for p in params] for _ in range(3)]

    def along(*eps):
        moved = {f"model.{n}": p.detach() + sum(e * d[i] for e, d in zip(eps, directions))
                 for i, (n, p) in enumerate(model.named_parameters())}
        return torch.func.functional_call(step, moved, (idx, targets))[0]
    zeros = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in directions]
    assert torch.autograd.gradcheck(along, zeros, eps=1e-6, atol=1e-6)

def test_bf16_activations_are_close_to_fp32():
    model, (idx, targets) = make(dtype=torch.float32), tokens(16)
    expected, _ = TrainStep(model, Schedule())(idx, targets)
    model.compute_dtype = torch.bfloat16
    loss, _ = TrainStep(model, Schedule())(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < 0.03
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())

def test_training_lowers_the_loss():
    """Every variant and schedule learns a fixed batch by heart."""
    for lrt, schedule in (("none", Schedule("plain")), ("shared", Schedule()), ("layerwise", Schedule("refine")),
                          ("shared", Schedule("chunked", chunk=4))):
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=12, vocab_size=37, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, lrt=lrt))
        step, (idx, targets) = TrainStep(model, schedule), tokens(12)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(60):
            loss, means = step(idx, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(means)
        assert (losses[0] - math.log(37)).abs().max() < 0.01  # an untrained model knows nothing
        assert losses[-1].max() < 0.5, losses[-1]

def test_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_kv_head=2, n_embd=128, vocab_size=512, lrt="layerwise"))
    for name, p in model.named_parameters():
        if name.endswith(("c_proj.weight", "gate.weight")):
            assert not p.any(), name
        elif p.ndim == 2:
            std = {"wte.weight": 1.0, "lm_head.weight": 0.001}.get(name, 128 ** -0.5)
            assert abs(p.std().item() / std - 1) < 0.02, name
    assert torch.equal(model.mem_lambdas, torch.full((2,), 0.1)) and torch.equal(model.resid_lambdas, torch.ones(2))


# -----------------------------------------------------------------------------
# Sizes

def test_shared_memory_is_a_third_of_a_percent_at_depth_20():
    counts = {}
    with torch.device("meta"):
        for lrt in ("none", "shared"):
            counts[lrt] = GPT(GPTConfig(n_layer=20, n_head=10, n_kv_head=10, n_embd=1280, lrt=lrt)).parameter_counts()
    share = counts["shared"]["total"] / counts["none"]["total"] - 1
    print(f"depth 20: {counts['none']['total']:,} parameters; --lrt=shared adds {share:.3%}")
    assert 1.25e9 < counts["none"]["total"] < 1.35e9 and 0.0025 < share < 0.0035

def test_flops_count_the_passes():
    model = make(lrt="none", window_pattern="L")
    counts, config, T = model.parameter_counts(), model.config, 32
    base = 6 * counts["scaling"] + 12 * config.n_layer * config.n_embd * T
    assert model.flops_per_token() == base
    lrt = make(lrt="shared", window_pattern="L")
    gates = lrt.parameter_counts()["gates"] - counts["gates"]
    memory = lrt.parameter_counts()["memory projections"]
    assert lrt.flops_per_token() == base + 6 * gates
    def flops(schedule):
        return schedule.flops_per_token(lrt, T)
    for S in (1, 2, 5):
        assert flops(Schedule(subsets=S)) == pytest.approx(2 * (base + 6 * gates) + 6 * memory)
    assert flops(Schedule(kv_refresh=True)) == pytest.approx(2 * (base + 6 * gates) + 6 * memory * (1 + 1 / 2 + 2 / 2))
    assert flops(Schedule("refine", refinements=3)) == pytest.approx(4 * (base + 6 * gates) + 18 * memory)
    assert [s.cost(lrt, T) for s in (Schedule(), Schedule("plain"), Schedule("sequential"), Schedule("refine", refinements=3))] == [2, 1, 1, 4]
    # forward only: a third, without the head, and before another pass over everything up to the source layer, 1 of 0 .. 2
    body = base + 6 * gates - 6 * counts["head"]
    assert flops(Schedule(subsets=4, forward_passes=1)) == pytest.approx(body / 3 + base + 6 * gates + memory * (4 / 4 + 6 * 3 / 4))  # memory of a forward-only pass takes no gradient
    lower = 6 * sum(p.numel() for p in lrt.h[:2].parameters()) + 12 * 2 * config.n_embd * T
    refined = Schedule("refine", refinements=2, forward_passes=2)
    assert flops(refined) == pytest.approx(2 * lower / 3 + base + 6 * gates + memory * (6 / 3 + 4))
    assert flops(Schedule(detach=True)) == pytest.approx(flops(Schedule()) - 2 * memory)
    last = Schedule("refine", refinements=1, loss_weights=[0.0, 1.0])
    assert flops(last) == pytest.approx(lower + base + 6 * gates + 6 * memory) and flops(Schedule(loss_weights=[0.0, 1.0, 1.0])) == pytest.approx(flops(Schedule()) - 6 * counts["head"])
    assert refined.cost(lrt, T) == pytest.approx(1 + 2 * lower / 3 / (base + 6 * gates))
    layerwise = make(lrt="layerwise", window_pattern="L")
    assert refined.flops_per_token(layerwise, T) - refined.flops_per_token(layerwise, T, projections=False) == pytest.approx(memory * (2 * 6 / 3 + 3 * 4))

@pytest.mark.parametrize("bad, message", [
    (dict(n_layer=0), "n_layer must be at least 1"), (dict(source_layer=12), "source_layer 12 is out of range"),
    (dict(source_layer=-1), "source_layer -1 is out of range"), (dict(n_head=5), "not divisible by n_head 5"),
    (dict(n_kv_head=4), "not divisible by n_kv_head 4"), (dict(window_pattern="SX"), "window_pattern 'SX'"),
    (dict(window_pattern=""), "window_pattern"), (dict(lrt="both"), "lrt 'both'"), (dict(inject="x"), "inject 'x'"),
    (dict(n_embd=6, n_head=2, n_kv_head=2), "is odd"),
])
def test_bad_config_is_one_clear_line(bad, message):
    with pytest.raises(ValueError, match=message) as e:
        GPTConfig(**bad)
    assert "\n" not in str(e.value)

def test_beyond_the_context_raises():
    model, (idx, _) = make(sequence_len=8), tokens(9)
    with pytest.raises(ValueError, match="beyond the context of 8 tokens"):
        list(run(model, idx, interleave.plain(9)))
