"""
The mathematics of model.py and interleave.py, as a specification: the numbers of the authors' implementation
(folder PARITY_DIR, default ../shared/parity) and of nanochat's, with its optimizer (PARITY_NANOCHAT_DIR,
default ../shared/parity_nanochat); a second, slow implementation of the equations, what schedules are equal
to, causality, gradients, sizes. The other tests are in tests/.
"""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import PARITY, PARITY_NANOCHAT

import interleave
import optim
from attention import KVCache, attention_mask, take
from interleave import Schedule, TrainStep, pass_losses, run
from model import GPT, GPTConfig
from recipes import NANOCHAT_BACKBONE, NANOCHAT_OPTIMIZER

FIXTURES = [p for p in sorted(PARITY.glob("*.npz")) if not p.stem.startswith("recurrent_block")]

CONFIG = dict(
    sequence_len=32, vocab_size=37, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="L",
    lrt="shared",
)


def make(seed=0, dtype=torch.float64, **overrides):
    """A tiny GPT with every weight random: zero gates and projections would hide mistakes."""
    torch.manual_seed(seed)
    return randomize(GPT(GPTConfig(**CONFIG | overrides)).to(dtype))

@torch.no_grad()
def randomize(model):
    for name, p in model.named_parameters():
        if "value_embeds" in name:
            p.normal_(std=0.3)
        elif p.ndim == 2 and name != "wte.weight":
            p.normal_(std=0.7 / math.sqrt(p.size(1)))
        elif p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    return model

def tokens(T, B=2, seed=0, vocab=37):
    """Random idx and targets, (B, T) each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (B, T), generator=g), torch.randint(vocab, (B, T), generator=g)

@torch.no_grad()
def decode(model, idx):
    """Token by token through the cache: logits (B, T, V) and memory (B, T, D)."""
    B, T = idx.shape
    kv = KVCache(model.config, B, T, idx.device, model.wte.weight.dtype)
    memory = None
    logits, memories = [], []
    for t in range(T):
        hidden, source = model(idx[:, t:t + 1], range(t, t + 1), kv, memory)
        if model.config.lrt != "none":
            memory = source
        logits.append(model.logits(hidden))
        memories.append(source)
    return torch.cat(logits, 1), torch.cat(memories, 1)

def last_pass(model, idx, passes, **options):
    """The hidden states of the last pass, and the memory of all positions after it."""
    *_, (_, hidden, memories) = run(model, idx, passes, **options)
    return hidden, interleave.newest_memory(memories)

def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


# -----------------------------------------------------------------------------
# Parity with the authors' numbers

def fixture_model(meta, z):
    """The fixture's model, and our parameter's name for each of the fixture's."""
    c = meta["config"]
    L = c["n_layer"]
    if meta["kind"] == "baseline":
        lrt = "none"
    else:
        lrt = "shared" if meta["tied_projections"] else "layerwise"
    stems = ("value_embeds", "interleaved_init_value_embeds")
    value_layers = [l for l in range(L) if any(f"weight/{stem}.{l}.weight" in z for stem in stems)]
    value_embeds = {0: "none", L: "all"}.get(len(value_layers), "alternate")
    model = GPT(GPTConfig(
        sequence_len=c["sequence_len"], vocab_size=c["vocab_size"], n_layer=L, n_head=c["n_head"],
        n_kv_head=c["n_kv_head"], n_embd=c["n_embd"], window_pattern=c["window_pattern"],
        value_embeds=value_embeds, lrt=lrt, source_layer=meta.get("source_layer", L - 1)))

    names = {
        "transformer.wte.weight": "wte.weight",
        "lm_head.weight": "lm_head.weight",
        "resid_lambdas": "resid_lambdas",
        "x0_lambdas": "x0_lambdas",
        "interleaved_lambdas": "mem_lambdas",
    }
    for l in range(L):
        for part in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            names[f"transformer.h.{l}.{part}.weight"] = f"h.{l}.{part}.weight"
        for gate in ("triple_gate", "ve_gate"):
            names[f"transformer.h.{l}.attn.{gate}.weight"] = f"h.{l}.attn.gate.weight"
        for stem in stems:
            names[f"{stem}.{l}.weight"] = f"value_embeds.{l}.weight"
        pair = 0 if lrt == "shared" else l
        names[f"interleaved_key_projections.{l}.W_v.weight"] = f"mem_k.{pair}.weight"
        names[f"interleaved_projections.{l}.W_v.weight"] = f"mem_v.{pair}.weight"
    return model, names

@pytest.mark.skipif(not FIXTURES, reason=f"no fixtures in {PARITY} (set PARITY_DIR)")
@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.stem)
def test_parity(path):
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    model, names = fixture_model(meta, z)
    params = dict(model.named_parameters())
    vocab = meta["config"]["vocab_size"]
    is_baseline = meta["kind"] == "baseline"

    # weights go into the model; gradients are kept under our names
    loaded, expected_grads = set(), {}
    for key in z.files:
        kind, _, name = key.partition("/")
        if kind not in ("weight", "grad"):
            continue
        ours = names[name]
        value = torch.from_numpy(z[key])
        if name.endswith(("wte.weight", "lm_head.weight")):
            value = value[:vocab]  # the authors pad the vocabulary
        if kind == "weight":
            assert params[ours].shape == value.shape, name
            params[ours].data.copy_(value)
            loaded.add(ours)
        elif ours in expected_grads and not is_baseline:  # the shared matrix gets the sum over the layers
            expected_grads[ours] = expected_grads[ours] + value
        else:
            expected_grads[ours] = value
    assert loaded == set(params), set(params) - loaded

    # the training loss and its gradients
    idx, targets = torch.from_numpy(z["idx"]), torch.from_numpy(z["targets"])
    if is_baseline:
        schedule = Schedule("plain")
    else:
        schedule = Schedule("interleaved", subsets=meta["subsets"], kv_refresh=meta["kv_refresh"])
    loss, losses = TrainStep(model, schedule)(idx, targets)
    loss.backward()
    assert abs(loss.item() - z["loss"].item()) < 1e-5
    assert set(expected_grads) == set(params)
    for name, expected in expected_grads.items():
        error = (params[name].grad - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-5, (name, error)

    if is_baseline:
        (_, hidden, _), = run(model, idx, interleave.plain(idx.size(1)))
        assert (model.logits(hidden) - torch.from_numpy(z["logits"])[..., :vocab]).abs().max() < 1e-5
        return

    # every pass, every token, the memory
    assert np.abs(losses.numpy() - z["pass_losses"]).max() < 1e-5
    token_losses, _, _ = pass_losses(model, idx, targets, schedule)
    assert np.abs(token_losses.numpy() - z["pass_token_losses"]).max() < 1e-5
    with torch.no_grad():
        _, memory = last_pass(model, idx, schedule.passes(idx.size(1)), kv_refresh=schedule.kv_refresh)
    assert np.abs(memory.numpy() - z["memory"]).max() < 1e-5

    # decoding
    logits, memory = decode(model, idx)
    assert np.abs(logits.numpy() - z["sequential_logits"][..., :vocab]).max() < 1e-5
    assert np.abs(memory.numpy() - z["sequential_memory"]).max() < 1e-5

NANOCHAT_FIXTURES = sorted(PARITY_NANOCHAT.glob("*.npz"))

def our_name(nanochats):
    """Our name of a parameter of nanochat's."""
    return nanochats.replace("transformer.", "").replace("ve_gate", "gate")

@pytest.mark.skipif(not NANOCHAT_FIXTURES,
                    reason=f"no fixtures in {PARITY_NANOCHAT} (set PARITY_NANOCHAT_DIR)")
@pytest.mark.parametrize("path", NANOCHAT_FIXTURES, ids=lambda p: p.stem)
def test_parity_with_nanochat(path, monkeypatch):
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    vocab = meta["config"]["vocab_size"]
    model = GPT(GPTConfig(**meta["config"], **NANOCHAT_BACKBONE))
    params = dict(model.named_parameters())

    def values(kind):
        """The fixture's arrays of a kind, by our names; it pads the vocabulary."""
        found = {}
        for key in z.files:
            if key.startswith(f"{kind}/"):
                name = our_name(key.removeprefix(f"{kind}/"))
                value = torch.from_numpy(z[key])
                found[name] = value[:vocab] if name in ("wte.weight", "lm_head.weight") else value
        assert found.keys() == params.keys()
        return found

    for name, value in values("weight").items():
        assert params[name].shape == value.shape, name
        params[name].data.copy_(value)
    assert [model.config.window(l) for l in range(model.config.n_layer)] == meta["windows"]

    idx, targets = (torch.from_numpy(z[name]).long() for name in ("idx", "targets"))
    step = TrainStep(model, Schedule("plain"))
    if meta["kind"] == "nanochat":  # the backbone
        loss, _ = step(idx, targets)
        loss.backward()
        assert abs(loss.item() - z["loss"].item()) < 1e-5
        for name, expected in values("grad").items():
            assert (params[name].grad - expected).norm() < 1e-5 * expected.norm(), name
        (_, hidden, _), = run(model, idx, interleave.plain(idx.size(1)))
        assert (model.logits(hidden) - torch.from_numpy(z["logits"])[..., :vocab]).abs().max() < 1e-5
    elif meta["kind"] == "nanochat_optimizer":  # its optimizer, a few steps on one batch
        monkeypatch.setattr(optim, "product_dtype", lambda p: torch.float32)
        optimizers = optim.make_optimizers(model, NANOCHAT_OPTIMIZER)
        assert_same_groups(optimizers, params, meta["groups"])
        losses = []
        for multiplier, momentum in zip(meta["multipliers"], meta["momenta"], strict=True):
            loss, _ = step(idx, targets)
            losses.append(loss.item())
            loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = multiplier * group["initial_lr"]
                    if "momentum" in group:
                        group["momentum"] = momentum
                optimizer.step()
                optimizer.zero_grad()
        assert losses == pytest.approx(z["losses"].tolist(), rel=1e-5)
        for name, after in values("after").items():
            assert (params[name] - after).norm() < 5e-4 * after.norm(), name
    else:
        pytest.fail(f"a fixture of an unknown kind: {meta['kind']}")

def assert_same_groups(optimizers, params, expected):
    """Rates, betas, eps and weight decay of every parameter are those of nanochat's groups."""
    ours = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            ours.update({p: group for p in group["params"]})
    assert ours.keys() == set(params.values())
    for group in expected:
        for name in group["params"]:
            mine = ours[params[our_name(name)]]
            for key in ("initial_lr", "betas", "eps", "weight_decay", "beta2"):
                if key in group:
                    assert mine[key] == pytest.approx(group[key]), (name, key)

# -----------------------------------------------------------------------------
# Against a second, slow implementation that follows the equations position by position

def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()

def rotated(x, t):
    """x (.., d) at position t. The angles are float32, as in model.py."""
    d = x.size(-1)
    theta = t * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    cos, sin = theta.cos().double(), theta.sin().double()
    a, b = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([a * cos + b * sin, -a * sin + b * cos], -1)

def reference(model, idx, passes, kv_refresh=False):
    """Equations (1) to (6): for each pass, {position: hidden (B, D)}; and in the end, {position: memory}."""
    c = model.config
    B, T = idx.shape
    H, G, d, L = c.n_head, c.n_kv_head, c.head_dim, c.n_layer
    first, last = c.dest_layers or (0, L - 1)
    zero = torch.zeros(B, c.n_embd, dtype=torch.float64)
    keys, values = [{} for _ in range(L)], [{} for _ in range(L)]  # by layer and position
    local = {}  # by (layer, position): k and v without memory, and the memory's gate, of the first pass
    memory = {}  # by position
    if c.first_memory == "embedding":
        memory = {t: rms(model.wte.weight[idx[:, t]]) for t in range(T)}
    out = []

    def store(l, t, k, v, g_mem, m):
        """Equation (2): the memory term is added to the local parts."""
        pair = 0 if c.lrt == "shared" else l - first
        if c.kv_memory and first <= l <= last:
            k = k + g_mem * (m @ model.mem_k[pair].weight.T).view(B, G, d)
            v = v + g_mem * (m @ model.mem_v[pair].weight.T).view(B, G, d)
        keys[l][t], values[l][t] = rms(rotated(k, t)), v

    for i, positions in enumerate(passes):
        # equation (5): what the earlier passes have left
        previous = {t: memory.get(t - 1, zero) for t in range(T)}
        memory = dict(memory)
        x0 = {t: rms(model.wte.weight[idx[:, t]]) for t in positions}
        if c.input_memory:
            for t, e in x0.items():
                gate = torch.sigmoid(e @ model.mem_input_gate.weight.T)
                x0[t] = e + gate * (previous[t] @ model.mem_input.weight.T)
        hidden = dict(x0)
        for l, block in enumerate(model.h):
            queries = {}
            for t in positions:
                # equation (1)
                h = model.resid_lambdas[l] * hidden[t] + model.x0_lambdas[l] * x0[t]
                if c.residual_memory and first <= l <= last:
                    h = h + model.mem_lambdas[l] * previous[t]
                hidden[t] = h
                # equation (2)
                u = rms(h)
                k = (u @ block.attn.c_k.weight.T).view(B, G, d)
                v = (u @ block.attn.c_v.weight.T).view(B, G, d)
                gates = []
                if block.attn.gate is not None:
                    gates = 2 * torch.sigmoid(u @ block.attn.gate.weight.T)
                    gates = list(gates.view(B, -1, G, 1).unbind(1))
                g_mem = 0
                if c.kv_memory and first <= l <= last:
                    g_loc, g_mem = gates.pop(0), gates.pop(0)
                    k, v = g_loc * k, g_loc * v
                if c.has_value_embed(l):
                    value_embed = model.value_embeds[str(l)].weight[idx[:, t]].view(B, G, d)
                    v = v + gates.pop(0) * value_embed
                local.setdefault((l, t), (k, v, g_mem))
                store(l, t, k, v, g_mem, previous[t])
                queries[t] = rms(rotated((u @ block.attn.c_q.weight.T).view(B, H, d), t))

            # attention over fresh and old keys, equation (6); MLP
            is_short = c.window_pattern[l % len(c.window_pattern)] == "S" and l < L - 1
            window = c.sequence_len // 2 if is_short else T
            for t in positions:
                seen = range(max(t - window, 0), t + 1)
                K = torch.stack([keys[l][s] for s in seen], 2).repeat_interleave(H // G, 1)
                V = torch.stack([values[l][s] for s in seen], 2).repeat_interleave(H // G, 1)
                p = torch.softmax((K @ queries[t][..., None])[..., 0] / d ** 0.5, -1)
                y = (p[..., None] * V).sum(2)
                h = hidden[t] + y.flatten(1) @ block.attn.c_proj.weight.T
                activation = torch.relu(rms(h) @ block.mlp.c_fc.weight.T) ** 2
                hidden[t] = h + activation @ block.mlp.c_proj.weight.T
                if l == c.source_layer and c.recurrent_memory:
                    memory[t] = rms(hidden[t])  # equation (3)
        out.append({t: rms(h) for t, h in hidden.items()})

        # KV refresh: the memory term anew at the positions of all later passes
        if kv_refresh and memory:
            for t in {t for later in passes[i + 1:] for t in later}:
                for l in range(L):
                    store(l, t, *local[l, t], memory[t - 1] if t else zero)
    return out, memory

@torch.no_grad()
def assert_equals_reference(model, passes, kv_refresh=False):
    idx, _ = tokens(9)
    expected, expected_memory = reference(model, idx, passes, kv_refresh)
    done = list(run(model, idx, passes, kv_refresh))
    for (positions, hidden, _), expected_hidden in zip(done, expected, strict=True):
        assert list(positions) == sorted(expected_hidden)
        for j, t in enumerate(positions):
            torch.testing.assert_close(hidden[:, j], expected_hidden[t], rtol=0, atol=1e-10)
    _, _, memories = done[-1]
    memory = interleave.newest_memory(memories)
    for t, m in expected_memory.items():
        torch.testing.assert_close(memory[:, t], m, rtol=0, atol=1e-10)

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
    "first-embedding": dict(first_memory="embedding"),
    "first-embedding-windows": dict(first_memory="embedding", lrt="layerwise", sequence_len=10,
                                    window_pattern="SSL", n_layer=4),
    "control": dict(first_memory="embedding", memory="embedding"),
    "one-layer": dict(n_layer=1, n_head=1, n_kv_head=1),
    "input": dict(inject="input"),
    "input-first-embedding": dict(inject="input", first_memory="embedding"),
    "dest": dict(lrt="layerwise", n_layer=4, dest_layers=[1, 2]),
    "dest-shared-kv": dict(inject="kv", dest_layers=[2, 2], source_layer=0),
}
SCHEDULES = {
    "plain": Schedule("plain"),
    "s1": Schedule(subsets=1),
    "s2": Schedule(),
    "s3": Schedule(subsets=3),
    "s99": Schedule(subsets=99),
    "s2-refresh": Schedule(kv_refresh=True),
    "s3-refresh": Schedule(subsets=3, kv_refresh=True),
    "refine": Schedule("refine", refinements=2),
    "draft-sweeps": Schedule("draft", drafts=2, subsets=3),
    "chunk4": Schedule("chunked", chunk=4),
    "chunk99": Schedule("chunked", chunk=99),
    "sequential": Schedule("sequential"),
}

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_slow_reference(variant, schedule):
    schedule = SCHEDULES[schedule]
    assert_equals_reference(make(**VARIANTS[variant]), schedule.passes(9), schedule.kv_refresh)

OWN_SCHEDULES = [
    # finer and finer, then all
    [range(9), *interleave.interleaved(9, 2)[1:], *interleave.interleaved(9, 4)[1:], range(9)],
    [range(9), range(1, 9, 2), range(9), range(0, 9, 2), range(3, 9, 4)],
    [range(4), range(4, 9), range(9), range(2, 9, 3)],
]

@pytest.mark.parametrize("passes", OWN_SCHEDULES, ids=str)
@pytest.mark.parametrize("variant", ["shared", "windows", "none"])
def test_a_schedule_of_ones_own_equals_slow_reference(variant, passes):
    """Any list of whole passes, chunks and residue classes can be run, in any order."""
    assert_equals_reference(make(**VARIANTS[variant]), passes)


# -----------------------------------------------------------------------------
# Schedules: what they cover, and what they are equal to

@pytest.mark.parametrize("T", [1, 2, 3, 7, 8])
def test_passes_cover_every_position_once(T):
    for S in (1, 2, 3, 8, 20):
        first, *subsets = interleave.interleaved(T, S)
        assert first == range(T) and len(subsets) == min(S, T)
        assert sorted(p for subset in subsets for p in subset) == list(range(T))
        assert all(p % S == i for i, subset in enumerate(subsets) for p in subset)
    for chunk in (1, 2, 3, 20):
        assert [p for positions in interleave.chunked(T, chunk) for p in positions] == list(range(T))
    assert [list(positions) for positions in interleave.sequential(T)] == [[t] for t in range(T)]

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sequence_of_one_token(schedule):
    """Nothing precedes it, so its loss is the same in every pass."""
    model = make()
    idx, targets = tokens(1)
    (_, hidden, _), = run(model, idx, interleave.plain(1))
    expected = model.token_loss(hidden, targets).mean()
    _, means = TrainStep(model, SCHEDULES[schedule])(idx, targets)
    means = means[~means.isnan()]  # those of the passes that have a loss
    assert len(means) > 0
    torch.testing.assert_close(means, expected.detach().expand_as(means), rtol=0, atol=1e-12)

@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "kv", "residual", "first-embedding"])
def test_refine_reaches_the_exact_recurrence(variant):
    """T-1 refinements are the token-by-token result: outputs, and gradients of the last pass's loss."""
    T = 9
    model = make(**VARIANTS[variant])
    idx, targets = tokens(T)
    refined = [hidden for _, hidden, _ in run(model, idx, interleave.refine(T, T - 1))][-1]
    exact = torch.cat([hidden for _, hidden, _ in run(model, idx, interleave.sequential(T))], 1)
    torch.testing.assert_close(refined, exact, rtol=0, atol=1e-11)
    refined_grads = gradients(model.token_loss(refined, targets).mean(), model)
    exact_grads = gradients(model.token_loss(exact, targets).mean(), model)
    for (name, _), a, b in zip(model.named_parameters(), refined_grads, exact_grads):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)

def test_refine_is_not_exact_too_early():
    """The test above would pass on a model that ignores memory: on these weights memory matters."""
    T = 9
    model = make()
    idx, _ = tokens(T)
    with torch.no_grad():
        exact, _ = last_pass(model, idx, interleave.refine(T, T - 1))
        early, _ = last_pass(model, idx, interleave.refine(T, 1))
    assert (exact - early).abs().max() > 1e-3

@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_through_the_cache_equals_sequential(variant):
    T = 10
    model = make(**VARIANTS[variant])
    idx, _ = tokens(T)
    logits, memory = decode(model, idx)
    with torch.no_grad():
        done = list(run(model, idx, interleave.sequential(T)))
        expected = model.logits(torch.cat([hidden for _, hidden, _ in done], 1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(memory, interleave.newest_memory(done[-1][2]), rtol=0, atol=1e-11)

@pytest.mark.parametrize("options", [{}, dict(inject="kv"), dict(lrt="layerwise", inject="residual")])
def test_the_control_is_exact_in_one_pass(options):
    """Its memory is known in advance: one parallel pass is what it decodes, a second one changes nothing."""
    model = make(**VARIANTS["control"], **options)
    idx, _ = tokens(10)
    logits, memory = decode(model, idx)
    with torch.no_grad():
        once, source = last_pass(model, idx, interleave.plain(10))
        again, _ = last_pass(model, idx, interleave.refine(10, 1))
        _, x0, _ = model.embed(idx)
    torch.testing.assert_close(model.logits(once), logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(once, again, rtol=0, atol=1e-11)
    assert torch.equal(memory, x0) and torch.equal(source, x0)

@torch.no_grad()
def test_the_control_reaches_one_token_back():
    """If each position sees only itself, memory brings in the token before, and nothing further back."""
    model = make(**VARIANTS["control"], sequence_len=2 * 9, window_pattern="S")
    model.config.window = lambda layer: 0
    idx, _ = tokens(9)
    changed = idx.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 37
    moved = (decode(model, idx)[0] != decode(model, changed)[0]).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [3, 4]

@torch.no_grad()
def test_a_full_pass_fills_the_cache_like_decoding():
    """Without recurrence, prefill through the cache in pieces of any size is the full pass."""
    model = make(lrt="none", sequence_len=10, window_pattern="SL")
    idx, _ = tokens(10)
    (_, expected, _), = run(model, idx, interleave.plain(10))
    kv = KVCache(model.config, 2, 10, "cpu", torch.float64)
    hidden = [model(take(idx, piece), piece, kv)[0] for piece in (range(4), range(4, 5), range(5, 10))]
    torch.testing.assert_close(torch.cat(hidden, 1), expected, rtol=0, atol=1e-11)

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "none", "first-embedding", "control"])
@torch.no_grad()
def test_causality(variant, schedule):
    """Another token at position t moves nothing before t, in any pass, and moves something at t or after."""
    T = 9
    model = make(**VARIANTS[variant])
    schedule = SCHEDULES[schedule]
    idx, _ = tokens(T)
    before = list(run(model, idx, schedule.passes(T), schedule.kv_refresh))
    for t in range(T):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = run(model, changed, schedule.passes(T), schedule.kv_refresh)
        for (positions, h1, m1), (_, h2, m2) in zip(before, after):
            moved = [p for j, p in enumerate(positions) if (h1[:, j] != h2[:, j]).any()]
            assert all(p >= t for p in moved)
            assert t not in positions or t in moved
            assert torch.equal(interleave.newest_memory(m1)[:, :t], interleave.newest_memory(m2)[:, :t])

@torch.no_grad()
def test_memory_carries_information_beyond_attention():
    """If each position sees only itself, only memory can reach further back; zero memory cannot."""
    model = make(sequence_len=2 * 9, window_pattern="S", n_layer=2, source_layer=1, n_head=1, n_kv_head=1)
    model.config.window = lambda layer: 0
    idx, _ = tokens(9)
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 37
    a, _ = decode(model, idx)
    b, _ = decode(model, changed)
    assert (a[:, -1] - b[:, -1]).abs().max() > 1e-9
    (_, a, _), = run(model, idx, interleave.plain(9))
    (_, b, _), = run(model, changed, interleave.plain(9))
    assert torch.equal(a[:, 1:], b[:, 1:])

@torch.no_grad()
def test_silenced_lrt_equals_baseline():
    """c = 0, Rk = Rv = 0 and g_loc's gate rows zero: the baseline, whatever the rest."""
    lrt, base = make(lrt="layerwise"), make(lrt="none")
    G = lrt.config.n_kv_head
    state = lrt.state_dict()
    for l, block in enumerate(lrt.h):
        block.attn.gate.weight[:G] = 0
        state[f"h.{l}.attn.gate.weight"] = block.attn.gate.weight[2 * G:].clone()
    for R in (*lrt.mem_k, *lrt.mem_v):
        R.weight.zero_()
    lrt.mem_lambdas.zero_()
    base.load_state_dict({name: value for name, value in state.items() if not name.startswith("mem_")})
    idx, _ = tokens(11)
    (_, expected, _), = run(base, idx, interleave.plain(11))
    for positions, hidden, _ in run(lrt, idx, interleave.interleaved(11, 3)):
        torch.testing.assert_close(hidden, expected[:, list(positions)], rtol=0, atol=1e-12)

@torch.no_grad()
def test_source_layer_followed_by_identity_blocks():
    """If blocks do nothing after the source layer, its memory is that of the last layer."""
    early, late = make(n_layer=4, source_layer=1), make(n_layer=4, source_layer=3)
    for model in (early, late):
        for l in (2, 3):
            model.h[l].attn.c_proj.weight.zero_()
            model.h[l].mlp.c_proj.weight.zero_()
            model.resid_lambdas[l] = 1
            model.x0_lambdas[l] = 0
            model.mem_lambdas[l] = 0
    idx, _ = tokens(9)
    for passes in (interleave.interleaved(9, 2), interleave.sequential(9)):
        a, b = last_pass(early, idx, passes), last_pass(late, idx, passes)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    # and when a later block does something, the two differ
    early.h[2].mlp.c_proj.weight.normal_()
    late.h[2].mlp.c_proj.weight.copy_(early.h[2].mlp.c_proj.weight)
    a, _ = last_pass(early, idx, interleave.sequential(9))
    b, _ = last_pass(late, idx, interleave.sequential(9))
    assert (a - b).abs().max() > 1e-3

@pytest.mark.parametrize("n_layer, expected", [(1, 0), (2, 1), (4, 2), (8, 5), (12, 8), (20, 14)])
def test_default_source_layer_is_upper_middle(n_layer, expected):
    assert GPTConfig(n_layer=n_layer).source_layer == expected

def test_merged_loss_is_the_last_pass_that_computed_a_position():
    model, (idx, targets) = make(), tokens(11)
    losses, mask, merged = pass_losses(model, idx, targets, Schedule(subsets=3))
    assert mask.sum(1).tolist() == [11, 4, 4, 3]
    assert mask[1:].sum(0).tolist() == [1] * 11
    assert torch.equal(losses[:, :, ~mask[0]], losses[:, :, ~mask[0]])
    assert (losses.transpose(1, 2)[~mask] == 0).all()
    torch.testing.assert_close(merged, losses[1:].sum(0))
    total, means = TrainStep(model, Schedule(subsets=3))(idx, targets)
    torch.testing.assert_close(means, losses.sum((1, 2)) / (2 * mask.sum(1)))
    torch.testing.assert_close(total.detach(), means.mean())


# -----------------------------------------------------------------------------
# Options of schedules: loss weights, detach, passes without a loss or without a gradient

def test_drafts_run_forward_only_before_what_is_trained():
    everything, halves = range(6), [range(0, 6, 2), range(1, 6, 2)]
    for schedule, passes, forward_passes in [
        (Schedule("draft", drafts=0), [everything], 0),
        (Schedule("draft"), [everything] * 2, 1),
        (Schedule("draft", drafts=3), [everything] * 4, 3),
        (Schedule("draft", drafts=1, subsets=2), [everything, *halves], 1),
        (Schedule("draft", drafts=2, subsets=2), [everything, *halves, *halves], 3),
    ]:
        assert schedule.passes(6) == passes
        assert schedule.forward_passes(6) == forward_passes
        trained = len(passes) - forward_passes
        assert schedule.weights(6) == [0] * forward_passes + [1 / trained] * trained

def test_loss_weights_and_detach():
    model, (idx, targets) = make(), tokens(6)
    weighted = Schedule("refine", refinements=2, loss_weights=[0.0, 0.0, 2.0])
    loss, means = TrainStep(model, weighted)(idx, targets)
    torch.testing.assert_close(loss.detach(), means[-1])
    loss.backward()
    through = model.mem_v[0].weight.grad.clone()
    model.zero_grad()
    cut, _ = TrainStep(model, dataclasses.replace(weighted, detach=True))(idx, targets)
    cut.backward()
    torch.testing.assert_close(cut, loss)
    assert (through - model.mem_v[0].weight.grad).abs().max() > 1e-6  # gradient did flow through the passes

    # interleaved: tokens at even positions reach the last subset only through what earlier passes left
    idx = torch.arange(6)[None]
    last = Schedule(loss_weights=[0.0, 0.0, 1.0])
    for detach in (False, True):
        model.zero_grad()
        loss, _ = TrainStep(model, dataclasses.replace(last, detach=detach))(idx, targets[:1])
        loss.backward()
        assert (model.wte.weight.grad[0:6:2] == 0).all() == detach
        assert (model.wte.weight.grad[1:6:2] != 0).all()

    with pytest.raises(ValueError, match="2 loss weights for 3 passes"):
        Schedule("refine", refinements=2, loss_weights=[1.0, 1.0]).passes(6)

class SamePasses(Schedule):
    """The passes of a draft over subsets, as an interleaved schedule: all of them take a gradient."""

    def __init__(self, subsets, sweeps, **options):
        super().__init__("interleaved", subsets=subsets, **options)
        self.sweeps = sweeps

    def passes(self, T):
        return interleave.draft(T, self.sweeps, self.subsets)

class FrozenFirst:
    """A model whose first n passes take no gradient, nor does what is looked up for them."""

    def __init__(self, model, n):
        self.config = model.config
        self.embed = model.embed
        self.refresh = model.refresh
        self.live = model
        self.frozen = [copy.deepcopy(model).requires_grad_(False)] * n

    def __call__(self, *args):
        if not self.frozen:
            return self.live(*args)
        *args, (embedding, x0, value_embeds) = args
        value_embeds = [None if x is None else x.detach() for x in value_embeds]
        return self.frozen.pop()(*args, (embedding.detach(), x0.detach(), value_embeds))

def bytes_saved_by_autograd(model, schedule, idx, targets):
    sizes = []
    def pack(x):
        sizes.append(x.nbytes)
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        TrainStep(model, schedule)(idx, targets)
    return sum(sizes)

DRAFTS = [
    Schedule("draft"),
    Schedule("draft", drafts=3),
    Schedule("draft", subsets=2),
    Schedule("draft", drafts=2, subsets=3),
    Schedule("draft", drafts=2, subsets=4),
]

@pytest.mark.parametrize("schedule", DRAFTS, ids=str)
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "residual", "input", "dest"])
def test_passes_that_run_forward_only(variant, schedule):
    """Their loss does not count, no gradient enters them, and they keep nothing for the backward."""
    model, (idx, targets) = make(**VARIANTS[variant]), tokens(9)
    passes, n, weights = schedule.passes(9), schedule.forward_passes(9), schedule.weights(9)
    # the same passes with gradients
    if schedule.subsets == 1:
        whole = Schedule("refine", refinements=schedule.drafts, loss_weights=weights)
    else:
        whole = SamePasses(schedule.subsets, schedule.drafts, loss_weights=weights)
    assert whole.passes(9) == passes

    # the same losses as with gradients, where there are any
    loss, means = TrainStep(model, schedule)(idx, targets)
    whole_loss, whole_means = TrainStep(model, whole)(idx, targets)
    torch.testing.assert_close((loss, means), (whole_loss, whole_means), rtol=0, atol=1e-12, equal_nan=True)
    assert means.isnan().tolist() == [w == 0 for w in weights]

    # the gradients of a model whose first passes are frozen
    hidden = [hidden for _, hidden, _ in run(FrozenFirst(model, n), idx, passes)]
    expected, _ = model.loss(hidden, [take(targets, positions) for positions in passes], weights)
    torch.testing.assert_close(loss, expected)
    got = gradients(loss, model)
    for a, b in zip(got, gradients(expected, model)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    # these passes would have had a gradient
    assert max((a - b).abs().max() for a, b in zip(got, gradients(whole_loss, model))) > 1e-6

    kept, kept_whole = (bytes_saved_by_autograd(model, s, idx, targets) for s in (schedule, whole))
    assert kept < 0.8 * kept_whole

WITHOUT_A_LOSS = [
    Schedule(loss_weights=[0.0, 1.0, 2.0]),
    Schedule("refine", refinements=2, loss_weights=[0.0, 0.0, 1.0]),
]

@pytest.mark.parametrize("schedule", WITHOUT_A_LOSS, ids=str)
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows", "residual"])
def test_what_a_pass_without_a_loss_leaves_out_changes_nothing(variant, schedule):
    model, (idx, targets) = make(**VARIANTS[variant]), tokens(9)
    passes = schedule.passes(9)
    loss, means = TrainStep(model, schedule)(idx, targets)
    hidden = [hidden for _, hidden, _ in run(model, idx, passes)]
    pass_targets = [take(targets, positions) for positions in passes]
    expected, expected_means = model.loss(hidden, pass_targets, schedule.weights(9))
    torch.testing.assert_close(loss, expected)
    has_loss = torch.tensor(schedule.loss_weights) > 0
    torch.testing.assert_close(means, torch.where(has_loss, expected_means, math.nan), equal_nan=True)
    for a, b in zip(gradients(loss, model), gradients(expected, model)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

def test_a_pass_that_only_hands_over_memory_stops_at_the_source():
    """
    Before another pass over the same positions nothing above the source layer is run, nor projected. Before
    any other pass its keys and values are needed.
    """
    model, (idx, targets) = make(lrt="layerwise", n_layer=3, source_layer=1), tokens(9)

    def modules_run(kind, schedule):
        """The names of the modules `kind`.0, `kind`.1, .. in the order in which a training step runs them."""
        ran = []
        hooks = []
        for name, module in getattr(model, kind).named_children():
            def record(*_, name=f"{kind}.{name}"):
                ran.append(name)
            hooks.append(module.register_forward_hook(record))
        TrainStep(model, schedule)(idx, targets)
        for hook in hooks:
            hook.remove()
        return ran

    whole, memory = ["h.0", "h.1", "h.2"], ["mem_k.0", "mem_k.1", "mem_k.2"]
    all_count = Schedule("refine", refinements=2)
    for schedule, layers, projections in [
        (all_count, whole * 3, memory * 2),
        (Schedule("draft", drafts=2), whole[:2] * 2 + whole, memory[:2] + memory),
        (Schedule("draft", drafts=2, subsets=2), whole * 5, memory * 4),
        (dataclasses.replace(all_count, loss_weights=[0, 1, 1]), whole[:2] + whole * 2, memory * 2),
        (dataclasses.replace(all_count, loss_weights=[0, 0, 1]), whole[:2] * 2 + whole, memory[:2] + memory),
    ]:
        assert modules_run("h", schedule) == layers
        assert modules_run("mem_k", schedule) == projections


# -----------------------------------------------------------------------------
# Masks, gradients, dtypes

def test_attention_mask_equals_its_definition():
    all_positions = [
        range(1), range(7), range(3, 4), range(3, 7), range(0, 8, 2), range(1, 8, 3), range(5, 8, 9),
    ]
    for positions in all_positions:
        for window in (0, 1, 3, 6, 7, 100):
            mask, is_causal, first = attention_mask(positions, window, "cpu")
            keys = range(first, positions[-1] + 1)
            if mask is None:
                mask = torch.ones(len(positions), len(keys), dtype=torch.bool)
                if is_causal:
                    mask = mask.tril()
            for i, p in enumerate(positions):
                seen = {k for j, k in enumerate(keys) if mask[i, j]}
                assert seen == {k for k in range(p + 1) if k >= p - window}, (positions, window, p)

@pytest.mark.parametrize("schedule", ["s2", "s3", "s2-refresh", "refine", "chunk4", "sequential"])
@pytest.mark.parametrize("variant", ["shared", "layerwise", "windows"])
def test_gradcheck(variant, schedule):
    """Autograd through all passes against finite differences, in random directions of all weights."""
    tiny = dict(sequence_len=6, n_layer=2, n_embd=16, vocab_size=11, source_layer=0)
    model = make(**VARIANTS[variant] | tiny)
    idx, targets = tokens(5, vocab=11)
    step = TrainStep(model, SCHEDULES[schedule])
    torch.manual_seed(1)
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(3)]

    def along(*eps):
        moved = {}
        for i, (name, p) in enumerate(step.named_parameters()):
            moved[name] = p.detach() + sum(e * direction[i] for e, direction in zip(eps, directions))
        return torch.func.functional_call(step, moved, (idx, targets))[0]

    zeros = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in directions]
    assert torch.autograd.gradcheck(along, zeros, eps=1e-6, atol=1e-6)

def test_bf16_activations_are_close_to_fp32():
    model, (idx, targets) = make(dtype=torch.float32), tokens(16)
    expected, _ = TrainStep(model, Schedule())(idx, targets)
    model.compute_dtype = torch.bfloat16
    loss, _ = TrainStep(model, Schedule())(idx, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 0.03
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())

LEARNERS = [
    ("none", Schedule("plain")),
    ("shared", Schedule()),
    ("layerwise", Schedule("refine")),
    ("shared", Schedule("chunked", chunk=4)),
]

def test_training_lowers_the_loss():
    """Every variant and schedule learns a fixed batch by heart."""
    for lrt, schedule in LEARNERS:
        torch.manual_seed(0)
        config = dict(sequence_len=12, vocab_size=37, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
        model = GPT(GPTConfig(**config, lrt=lrt))
        step = TrainStep(model, schedule)
        idx, targets = tokens(12)
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
    assert torch.equal(model.mem_lambdas, torch.full((2,), 0.1))
    assert torch.equal(model.resid_lambdas, torch.ones(2))


# -----------------------------------------------------------------------------
# Sizes

def test_shared_memory_is_a_third_of_a_percent_at_depth_20():
    totals = {}
    for lrt in ("none", "shared"):
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=20, n_head=10, n_kv_head=10, n_embd=1280, lrt=lrt))
        totals[lrt] = model.parameter_counts()["total"]
    share = totals["shared"] / totals["none"] - 1
    print(f"depth 20: {totals['none']:,} parameters; --lrt=shared adds {share:.3%}")
    assert 1.25e9 < totals["none"] < 1.35e9
    assert 0.0025 < share < 0.0035

def test_flops_count_the_passes():
    T = 32
    # a plain pass: 6 a parameter that multiplies, 12 * width a key
    none = make(lrt="none", window_pattern="L")
    counts, config = none.parameter_counts(), none.config
    plain = 6 * counts["scaling"] + 12 * config.n_layer * config.n_embd * T
    assert none.flops_per_token() == plain
    lrt = make(lrt="shared", window_pattern="L")
    memory = lrt.parameter_counts()["memory projections"]
    plain += 6 * (lrt.parameter_counts()["gates"] - counts["gates"])
    assert lrt.flops_per_token() == plain

    def assert_flops(schedule, expected):
        assert schedule.flops_per_token(lrt, T) == pytest.approx(expected)

    # several passes: all positions once more, and the memory projections from the second pass on
    for S in (1, 2, 5):
        assert_flops(Schedule(subsets=S), 2 * plain + 6 * memory)
    assert_flops(Schedule(kv_refresh=True), 2 * plain + 6 * memory * (1 + 1 / 2 + 2 / 2))
    assert_flops(Schedule("refine", refinements=3), 4 * plain + 18 * memory)
    for schedule, cost in [(Schedule(), 2), (Schedule("plain"), 1), (Schedule("sequential"), 1),
                           (Schedule("refine", refinements=3), 4)]:
        assert schedule.cost(lrt, T) == cost

    # forward only: a third, without the head; the memory of a forward-only pass takes no gradient
    body = plain - 6 * counts["head"]
    drafted = Schedule("draft", subsets=4)
    assert_flops(drafted, body / 3 + plain + memory * (4 / 4 + 6 * 3 / 4))
    more = dataclasses.replace(drafted, drafts=2)
    assert_flops(more, 2 * body / 3 + plain + memory * (6 / 3 + 4 / 4 + 6 * 3 / 4))

    # before another pass over everything, only up to the source layer, which is 1 of 0 .. 2
    lower = 6 * sum(p.numel() for p in lrt.h[:2].parameters()) + 12 * 2 * config.n_embd * T
    refined = Schedule("draft", drafts=2)
    assert_flops(refined, 2 * lower / 3 + plain + memory * (6 / 3 + 4))
    assert refined.cost(lrt, T) == pytest.approx(1 + 2 * lower / 3 / plain)
    layerwise = make(lrt="layerwise", window_pattern="L")
    without = refined.flops_per_token(layerwise, T, projections=False)
    expected = memory * (2 * 6 / 3 + 3 * 4)
    assert refined.flops_per_token(layerwise, T) - without == pytest.approx(expected)

    # the first memory is projected, too, and its gradient goes into the embedding
    control = make(**VARIANTS["control"], window_pattern="L")
    assert Schedule("plain").flops_per_token(control, T) == plain + 6 * memory
    first = make(first_memory="embedding", window_pattern="L")
    flops = Schedule("draft").flops_per_token(first, T)
    assert flops == pytest.approx(lower / 3 + plain + memory * (6 / 3 + 4))

    # detached memory, passes without a loss
    interleaved_flops = Schedule().flops_per_token(lrt, T)
    assert_flops(Schedule(detach=True), interleaved_flops - 2 * memory)
    assert_flops(Schedule("refine", refinements=1, loss_weights=[0.0, 1.0]), lower + plain + 6 * memory)
    assert_flops(Schedule(loss_weights=[0.0, 1.0, 1.0]), interleaved_flops - 6 * counts["head"])

@pytest.mark.parametrize("bad, message", [
    (dict(n_layer=0), "n_layer must be at least 1"),
    (dict(source_layer=12), "source_layer 12 is out of range"),
    (dict(source_layer=-1), "source_layer -1 is out of range"),
    (dict(n_head=5), "not divisible by n_head 5"),
    (dict(n_kv_head=4), "not divisible by n_kv_head 4"),
    (dict(window_pattern="SX"), "window_pattern 'SX'"),
    (dict(window_pattern=""), "window_pattern"),
    (dict(lrt="both"), "lrt 'both'"),
    (dict(inject="x"), "inject 'x'"),
    (dict(memory="x"), "memory 'x'"),
    (dict(first_memory="x"), "first_memory 'x'"),
    (dict(first_memory="embedding"), "first_memory embedding goes with an LRT"),
    (dict(dest_layers=[1, 2]), "dest_layers go with an LRT"),
    (dict(lrt="shared", dest_layers=[2, 12]), "dest_layers 2 12 are no range of the layers 0 to 11"),
    (dict(lrt="shared", dest_layers=[2, 1]), "dest_layers 2 1 are no range"),
    (dict(lrt="shared", inject="input", dest_layers=[1, 2]), "do not go with inject input"),
    (dict(lrt="shared", memory="embedding"), "memory embedding goes with first_memory embedding"),
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
