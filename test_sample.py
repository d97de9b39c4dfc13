"""
Exact parallel prefill and generation: equal to decoding token by token, whatever the weights, the batch and the lengths.
"""

from types import SimpleNamespace

import pytest
import torch

from interleave import prefill
from model import GPT, GPTConfig, KVCache
from sample import Pieces, complete, draw, generate, load_model
from test_model import VARIANTS, decode, make, tokens

BOS = 36


def toy_tokenizer(words=None):
    """The few methods of tiktoken.Encoding that generation uses: token i is words[i] (default: one letter), 36 is BOS."""
    words = words or [chr(65 + i).encode() for i in range(36)]
    return SimpleNamespace(encode_single_token=lambda _: BOS, decode_single_token_bytes=lambda i: words[i])

def adversarial(dtype=torch.float64, strength=3.0, **overrides):
    """Weights with large c, Rk and Rv, where the fixed point is far from contracting."""
    model = make(dtype=dtype, sequence_len=64, **overrides)
    with torch.no_grad():
        for R in (*model.mem_k, *model.mem_v):
            R.weight.mul_(strength)
        if model.mem_lambdas is not None:
            model.mem_lambdas.mul_(strength).add_(strength)
    return model

@pytest.fixture(scope="module")
def trained():
    """A small LRT of each variant that has learnt to continue sequences: memory is used, and its weights are not random."""
    models = {}
    for lrt in ("shared", "layerwise"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=64, vocab_size=37, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, lrt=lrt, window_pattern="SL"))
        from interleave import Schedule, TrainStep
        step, optimizer = TrainStep(model, Schedule()), torch.optim.AdamW(model.parameters(), lr=1e-2)
        g = torch.Generator().manual_seed(1)
        for _ in range(80):
            idx = (torch.randint(7, (8, 65), generator=g).cumsum(1) * torch.randint(1, 4, (8, 1), generator=g)) % 36
            loss, _ = step(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        models[lrt] = model
    return models


# -----------------------------------------------------------------------------
# Prefill

def assert_exact(model, T, subsets, atol, **options):
    idx, _ = tokens(T)
    dtype = model.wte.weight.dtype
    logits, memory = decode(model, idx)
    kv = KVCache(model.config, 2, T + 1, "cpu", dtype)
    with torch.no_grad():
        hidden, last, sweeps = prefill(model, idx, kv, subsets, **options)
        torch.testing.assert_close(model.logits(hidden), logits, rtol=0, atol=atol)
        if model.config.lrt != "none":
            torch.testing.assert_close(last, memory[:, -1:], rtol=0, atol=atol)
        if T < model.config.sequence_len:  # and the cache is the one that decoding would have left: the next token agrees
            following = torch.cat([idx, idx[:, :1]], 1)
            expected, _ = decode(model, following)
            hidden, _ = model(following[:, T:], range(T, T + 1), kv, last)
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
def test_prefill_on_trained_weights_takes_a_few_sweeps(trained, lrt, T):
    """float32, up to the full context: within 1e-4, and far from T sweeps."""
    for subsets in (1, 2, 4):
        sweeps = assert_exact(trained[lrt], T, subsets, atol=1e-4)
        assert sweeps <= 12
    assert assert_exact(trained[lrt].double(), T, 1, atol=1e-9) <= 24
    trained[lrt].float()

@pytest.mark.parametrize("overrides", [{}, dict(lrt="layerwise"), dict(inject="residual"), dict(inject="kv", window_pattern="S")],
                         ids=["shared", "layerwise", "residual", "kv"])
def test_prefill_on_adversarial_weights(overrides):
    """Where sweeps do not converge the result is finished token by token, never returned as it is."""
    model = adversarial(**overrides)
    for options in (dict(), dict(max_sweeps=3), dict(max_sweeps=1)):
        for subsets in (1, 4):
            assert_exact(model, 40, subsets, atol=1e-7, **options)

@pytest.mark.parametrize("lrt", ["shared", "layerwise"])
def test_prefill_on_adversarial_weights_in_float32(lrt):
    """Up to the full context, through the token-by-token end as well."""
    for T in (1, 2, 40, 64):
        assert_exact(adversarial(torch.float32, lrt=lrt), T, 2, atol=1e-4)

def test_adversarial_weights_are_adversarial():
    """The test above would prove little if these converged at once."""
    idx, _ = tokens(40)
    model = adversarial()
    kv = KVCache(model.config, 2, 40, "cpu", torch.float64)
    assert prefill(model, idx, kv, subsets=1, max_sweeps=99)[2] == 40  # no more than the one position a sweep that is sure

@pytest.mark.parametrize("overrides", [{}, dict(lrt="layerwise", window_pattern="SL"), dict(lrt="none", window_pattern="SL")],
                         ids=["shared", "layerwise-windows", "none-windows"])
@pytest.mark.parametrize("max_sweeps", [24, 2])
def test_prefill_of_prompts_of_different_lengths(overrides, max_sweeps):
    """Rows aligned at their ends: every row as if it were alone, in the cache too, however padding is filled."""
    model, T, lengths = make(sequence_len=12, **overrides), 12, [12, 1, 5, 11]
    rows = [tokens(n, B=1, seed=n)[0][0] for n in lengths]
    for pad in (0, 5):
        idx = torch.stack([torch.cat([torch.full((T - len(r),), pad), r]) for r in rows])
        start = torch.tensor([T - n for n in lengths])
        kv = KVCache(model.config, 4, T, "cpu", torch.float64, start=start)
        with torch.no_grad():
            hidden, memory, _ = prefill(model, idx, kv, max_sweeps=max_sweeps)
            for i, row in enumerate(rows):
                logits, expected = decode(model, row[None])
                # not closer: the rotary tables are float32, and a row elsewhere reads other entries of them
                torch.testing.assert_close(model.logits(hidden[i:i + 1, T - len(row):]), logits, rtol=0, atol=2e-6)
                if memory is not None:
                    torch.testing.assert_close(memory[i:i + 1], expected[:, -1:], rtol=0, atol=2e-6)

@pytest.mark.parametrize("overrides", [{}, dict(lrt="layerwise", window_pattern="SL"), dict(lrt="none")], ids=["shared", "windows", "none"])
@pytest.mark.parametrize("max_sweeps", [24, 2])
def test_prefill_goes_on_behind_what_the_cache_holds(overrides, max_sweeps):
    """In pieces, then from copies of the cache with rows that end at different places: as decoding each row by itself."""
    model, first, lengths = make(sequence_len=16, **overrides), 7, [5, 9, 1]
    idx, _ = tokens(first, B=1)
    rows = [torch.cat([idx[0], tokens(n, B=1, seed=n)[0][0]]) for n in lengths]
    kv, copies, memory = KVCache(model.config, 1, first, "cpu", torch.float64), KVCache(model.config, 3, 16, "cpu", torch.float64), None
    with torch.no_grad():
        for piece in (range(4), range(4, 5), range(5, 7)):
            _, memory, _ = prefill(model, idx[:, piece.start:piece.stop], kv, max_sweeps=max_sweeps, first=piece.start, memory=memory)
        copies.copy_from(kv, first, 3)
        padded = torch.nn.utils.rnn.pad_sequence([row[first:] for row in rows], batch_first=True, padding_value=5)
        ends = torch.tensor([first + n for n in lengths])
        hidden, _, sweeps = prefill(model, padded, copies, max_sweeps=max_sweeps, first=first, ends=ends,
                                    memory=None if memory is None else memory.expand(3, -1, -1))
        for i, row in enumerate(rows):
            expected, _ = decode(model, row[None])
            torch.testing.assert_close(model.logits(hidden[i:i + 1, :lengths[i]]), expected[:, first:], rtol=0, atol=1e-9)

def test_nothing_waits_for_padding():
    """Rows that end early converge early, whatever stands behind their ends."""
    model = adversarial()
    idx, _ = tokens(40)
    sweeps = [prefill(model, idx, KVCache(model.config, 2, 40, "cpu", torch.float64), subsets=1, max_sweeps=99, ends=ends)[2]
              for ends in (None, torch.tensor([6, 3]))]
    assert sweeps[0] == 40 and sweeps[1] <= 8

def test_rolling_cache_keeps_only_the_window_and_decodes_the_same():
    model = make(sequence_len=16, window_pattern="SSL", n_layer=4)
    idx, _ = tokens(16)
    full, rolling = (KVCache(model.config, 2, 16, "cpu", torch.float64, rolling=r) for r in (False, True))
    assert [k.size(2) for k in rolling.k] == [9, 9, 16, 16] and [k.size(2) for k in full.k] == [16] * 4
    with torch.no_grad():
        memories = [None, None]
        for t in range(16):
            (a, m1), (b, m2) = (model(idx[:, t:t + 1], range(t, t + 1), kv, m) for kv, m in zip((full, rolling), memories))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            memories = [m1, m2]
            if t == 12:  # a rolling cache taken over in the middle
                taken = KVCache(model.config, 4, 16, "cpu", torch.float64, rolling=True)
                taken.copy_from(full, 13, 2)
                again, _ = model(idx[:, 13:14].repeat_interleave(2, 0), range(13, 14), taken, m1.repeat_interleave(2, 0))
            if t == 13:
                torch.testing.assert_close(again[::2], a, rtol=0, atol=1e-12)
                torch.testing.assert_close(again[1::2], a, rtol=0, atol=1e-12)


# -----------------------------------------------------------------------------
# Drawing and text

def test_draw_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    def share(**options):
        g = [torch.Generator().manual_seed(i) for i in range(4000)]
        picked = draw(logits.expand(4000, 4), g, **{"temperature": 1.0, "top_k": None, "top_p": None} | options)
        return torch.bincount(picked, minlength=4) / 4000
    p = torch.softmax(logits[0], -1)
    torch.testing.assert_close(share(), p, rtol=0, atol=0.03)
    torch.testing.assert_close(share(temperature=2.0), torch.softmax(logits[0] / 2, -1), rtol=0, atol=0.03)
    torch.testing.assert_close(share(top_k=2), torch.tensor([p[0], p[1], 0, 0]) / p[:2].sum(), rtol=0, atol=0.03)
    torch.testing.assert_close(share(top_p=0.7), torch.tensor([p[0], p[1], 0, 0]) / p[:2].sum(), rtol=0, atol=0.03)  # 0.64 is not enough
    assert share(top_p=0.6)[0] == 1 and share(top_p=1e-9)[0] == 1 and share(temperature=0)[0] == 1 and share(top_k=1)[0] == 1
    assert share(temperature=1e-35)[0] == 1
    assert torch.equal(share(top_k=99, top_p=1.0), share())

def test_text_is_whole_characters_and_ends_before_the_stop_string():
    words = [b"na", "ï".encode()[:1], "ï".encode()[1:], b"ve", b" st", b"op", b" sto", b"re"]
    def text(ids, stop=None):
        pieces, out = Pieces(toy_tokenizer(words), stop), []
        for i in [*ids, None]:
            piece, stopped = pieces.add(i)
            out.append(piece)
            if stopped:
                break
        return out
    assert text([0, 1, 2, 3]) == ["na", "", "ï", "ve", ""]
    assert text([0, 1]) == ["na", "", "\ufffd"]  # a cut character is shown as such
    assert text([0, 4, 5, 3], "stop") == ["na", " ", ""]
    assert text([0, 6, 7, 4], "stop") == ["na", " ", "store", " ", "st"]  # held back until it is certain

def test_generation_is_the_exact_recurrence(trained):
    """Greedy tokens are the argmax of decoding the finished text token by token, to the end of the context."""
    for model in (*trained.values(), make(dtype=torch.float32, lrt="none", window_pattern="SL")):
        context, prompt = model.config.sequence_len, [BOS, 3, 4]
        out = [t for _, t, _ in generate(model, toy_tokenizer(), [prompt], 1000, temperature=0) if t is not None]
        logits, _ = decode(model, torch.tensor([prompt + out[:-1]]))
        expected = logits[0, len(prompt) - 1:].argmax(-1).tolist()
        assert out == expected[:len(out)] and len(out) > 3
        assert len(out) == context - len(prompt) + 1 or len(out) == len(expected)  # the context, or BOS after it

@pytest.mark.parametrize("overrides", [{}, dict(lrt="layerwise", window_pattern="SL"), dict(lrt="none")], ids=["shared", "windows", "none"])
def test_a_sequence_does_not_depend_on_its_batch(overrides):
    model = make(sequence_len=24, dtype=torch.float32, **overrides)
    prompts = [[BOS], [BOS, 5, 6, 7, 8, 9, 10, 11, 12], [BOS, 3], [BOS, *range(23)]]
    options = dict(temperature=1.0, top_k=20, top_p=0.95)
    together = complete(model, toy_tokenizer(), prompts, 100, num_samples=3, seed=7, **options)
    assert len(together) == 12
    for i, prompt in enumerate(prompts):
        for j in range(3):
            assert complete(model, toy_tokenizer(), [prompt], 100, seed=7 + j, **options) == [together[3 * i + j]]
    assert together == complete(model, toy_tokenizer(), prompts, 100, num_samples=3, seed=7, **options)
    assert len(set(together[:3])) > 1

def test_generation_ends(trained):
    model = trained["shared"]
    for n in (1, 2, 5):
        out = list(generate(model, toy_tokenizer(), [[BOS]], n, temperature=1.0))
        assert len(out) <= n + 1 and out[-1][1] is None
    with torch.no_grad():  # a model that says BOS at once
        silent = make(dtype=torch.float32)
        hidden, _ = silent(torch.tensor([[1]]), range(1), KVCache(silent.config, 1, 1, "cpu", torch.float32))
        silent.lm_head.weight.zero_()
        silent.lm_head.weight[BOS] = hidden[0, 0]
    assert complete(silent, toy_tokenizer(), [[1]], 10, temperature=0) == [""]
    for bad in ([], [[]], [[1], []], [[1] * 65]):
        with pytest.raises(ValueError, match="a prompt has 1 to 64"):
            list(generate(model, toy_tokenizer(), bad, 5))
    whole, = complete(model, toy_tokenizer(), [[BOS, 3]], 30, temperature=0)
    cut, = complete(model, toy_tokenizer(), [[BOS, 3]], 30, temperature=0, stop=whole[4:6])
    assert cut == whole[:whole.index(whole[4:6])]

def test_samples_share_one_prefill_and_a_token_is_one_forward(trained, monkeypatch):
    model, calls = trained["shared"], []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, idx, *a, **k: calls.append(tuple(idx.shape)) or forward(self, idx, *a, **k))
    out = list(generate(model, toy_tokenizer(), [[BOS, 1, 2, 3, 4]] * 2, 6, temperature=1.0, num_samples=3, seed=1))
    prefills, steps = [c for c in calls if c[1] > 1], [c for c in calls if c == (6, 1)]
    assert all(c[0] == 2 for c in prefills) and len(calls) - len(steps) <= 12
    assert len(steps) <= 5 and len(out) <= 6 * 7

def test_weights_loaded_in_bf16_are_those_cast_at_every_use(monkeypatch):
    """A GPU with bf16 gets its weights in bf16 when a run is loaded: bit for bit what casting them at every token gives."""
    from dataclasses import asdict
    model = make(dtype=torch.float32, lrt="layerwise", window_pattern="SL")
    model.compute_dtype, (idx, _) = torch.bfloat16, tokens(9)
    checkpoint = dict(model=model.state_dict(), config=asdict(model.config))
    monkeypatch.setattr("sample.compute_dtype", lambda device: torch.bfloat16)
    loaded = load_model(checkpoint, torch.device("cpu"))
    assert loaded.h[0].mlp.c_fc.weight.dtype == torch.bfloat16 and loaded.cos.dtype == loaded.resid_lambdas.dtype == torch.float32
    results = []
    for m in (model, loaded):
        kv = KVCache(m.config, 2, 9, "cpu", torch.bfloat16)
        hidden, memory, _ = prefill(m, idx, kv)
        results.append((m.logits(hidden), memory))
    assert all(torch.equal(a, b) for a, b in zip(*results))
