"""
CORE on real data (folder CORE_DIR, default ../shared/core): prompts byte for byte, predictors whose score is known beforehand,
independence of batches and processes, the exact recurrence; bundles that are damaged, hostile or partial.
"""

import csv
import functools
import http.server
import json
import os
import random
import shutil
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import core
import prepare_data
from core import CORE, batches, common_length, encode, evaluate_core, evaluate_task, load_tasks, make_example, render, score
from interleave import prefill
from model import GPT, GPTConfig, KVBuffer, KVCache
from prepare_data import UserError, load_tokenizer
from test_cli import assert_refused, cli, data, here, shell, trained  # noqa: F401 (fixtures)
from test_model import decode, make, tokens

BUNDLE = Path(os.environ.get("CORE_DIR", Path(__file__).parent / "../shared/core"))
real = pytest.mark.skipif(not (BUNDLE / "core.yaml").exists(), reason=f"no CORE bundle in {BUNDLE} (set CORE_DIR)")


@pytest.fixture(scope="session")
def tasks():
    return load_tasks(BUNDLE)

@pytest.fixture(scope="session")
def tokenizer(data):  # noqa: F811
    return load_tokenizer(data)

def model_for(tokenizer, dtype=torch.float32, **overrides):
    """A small LRT with random weights that make a difference, over this tokenizer's vocabulary."""
    return make(dtype=dtype, **dict(vocab_size=tokenizer.n_vocab, sequence_len=96, n_layer=2, n_embd=32, n_head=2, n_kv_head=2) | overrides)

class Known(torch.nn.Module):
    """
    A predictor in the model's place that has learnt texts by heart: after the beginning of one of them it is sure of the
    next token, otherwise all are alike. It keeps the tokens it has seen in the key cache, so it knows no more than what
    reaches it through prefixes, copies and batches.
    """
    compute_dtype = None

    def __init__(self, vocab_size, context, rows=()):
        super().__init__()
        self.config = GPTConfig(sequence_len=context, vocab_size=vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=2, lrt="none")
        self.wte = torch.nn.Embedding(1, 1)
        self.hashes = torch.randint(2**62, (context,), generator=torch.Generator().manual_seed(0))
        self.next = {}
        for row, start in rows:
            seen = (torch.as_tensor(row) * self.hashes[:len(row)]).cumsum(0).tolist()
            self.next |= {seen[p - 1]: int(row[p]) for p in range(start, len(row))}

    def forward(self, idx, positions, kv, memory=None, n_layer=None):
        seen, _ = kv.write(0, positions, *[idx[:, None, :, None].float().expand(-1, 1, -1, 2)] * 2)
        upto = (seen[:, 0, :positions[-1] + 1, 0].long() * self.hashes[:positions[-1] + 1]).cumsum(1)
        return upto[:, positions.start:, None], None

    def logits(self, hidden):
        logits = torch.zeros(*hidden.shape[:2], self.config.vocab_size)
        for p, seen in enumerate(hidden[0, :, 0].tolist()):
            if seen in self.next:
                logits[0, p, self.next[seen]] = 15
        return logits


# -----------------------------------------------------------------------------
# Prompts

@real
def test_prompts_are_those_of_the_established_evaluator(tasks, tokenizer):
    expected = json.loads((BUNDLE / "prompts.json").read_text("utf-8"))
    found = {task.name: task for task in tasks}
    assert set(expected) == set(found) and len(found) >= 18
    for name, examples in expected.items():
        for x in examples:
            prompts = render(found[name], x["index"])
            assert prompts == x["prompts"], (name, x["index"])
            # and encoding what they share once changes no token
            for row, prompt in zip(encode(tokenizer, prompts), prompts):
                assert row.tolist() == [tokenizer.n_vocab - 1] + tokenizer.encode_ordinary(prompt)

@real
def test_what_is_scored(tasks, tokenizer):
    """Choices share what comes before the scored tokens (multiple choice) or end in them (schema); the continuation is scored whole."""
    for task in tasks:
        for i in range(0, len(task.examples), max(len(task.examples) // 10, 1)):
            e, prompts = make_example(task, i, tokenizer, 10**6), render(task, i)
            rows = [np.concatenate([e.prefix, tail]) for tail in e.tails]
            scored = [tokenizer.decode(row[start:].tolist()) for row, start in zip(rows, e.starts)]
            assert [tokenizer.decode(row[1:].tolist()) for row in rows] == prompts[-len(rows):]
            if task.kind == "language_modeling":
                assert prompts[0] + scored[0] == prompts[1] and task.examples[i]["continuation"] in scored[0]
            elif task.kind == "schema":
                assert len(set(scored)) == 1 and task.examples[i]["continuation"] in scored[0]
            else:
                assert len(set(e.starts)) == 1 and all(choice.endswith(text) or text.endswith(choice) for text, choice in
                                                       zip(scored, task.examples[i]["choices"]))
                assert common_length([row[:start + 1] for row, start in zip(rows, e.starts)]) <= e.starts[0] or min(map(len, rows)) == e.starts[0] + 1

@real
def test_truncation_keeps_the_last_tokens(tasks, tokenizer):
    for task in tasks:
        for i in (0, 1):
            whole, context = make_example(task, i, tokenizer, 10**6), 40
            cut = make_example(task, i, tokenizer, context)
            for tail, start, long_tail, long_start in zip(cut.tails, cut.starts, whole.tails, whole.starts):
                row, long = np.concatenate([cut.prefix, tail]), np.concatenate([whole.prefix, long_tail])
                assert row.tolist() == long[-context:].tolist()
                assert start == max(long_start - max(len(long) - context, 0), 1)


# -----------------------------------------------------------------------------
# Predictors whose score is known

@real
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_predictor_that_knows_the_answers_scores_one(tasks, tokenizer, batch_size):
    context, most = 256, 24
    for task in tasks:
        n = min(most, len(task.examples))
        examples = [make_example(task, i, tokenizer, context) for i in range(n)]
        gold = [(np.concatenate([e.prefix, e.tails[e.gold or 0]]), e.starts[e.gold or 0]) for e in examples]
        right = evaluate_task(Known(tokenizer.n_vocab, context, gold), tokenizer, task, range(n), batch_size * context)
        assert right == dict.fromkeys(range(n), True), task.name

@real
def test_a_constant_predictor_scores_what_counting_says(tasks, tokenizer):
    """All choices are alike to it: the first one is taken, and no continuation is certain."""
    for task in tasks:
        n = min(24, len(task.examples))
        right = evaluate_task(Known(tokenizer.n_vocab, 128), tokenizer, task, range(n), 16 * 128)
        expected = {i: task.kind != "language_modeling" and task.examples[i]["gold"] == 0 for i in range(n)}
        if task.kind == "language_modeling":  # argmax is token 0
            examples = [make_example(task, i, tokenizer, 128) for i in range(n)]
            expected = {e.index: not e.tails[0][e.starts[0]:].any() for e in examples}
        assert right == expected, task.name


# -----------------------------------------------------------------------------
# The recurrence, batches and processes

def referee(model, example, use_memory):
    """The mean losses of an example's choices, each alone, token by token; and whether the first one's tokens are the argmax."""
    losses = []
    for tail, start in zip(example.tails, example.starts):
        row = torch.from_numpy(np.concatenate([example.prefix, tail]))[None]
        if use_memory:
            logits, _ = decode(model, row[:, :-1])
        else:
            with torch.no_grad():
                logits = model.logits(model(row[:, :-1], range(row.size(1) - 1), KVBuffer(model.config.n_layer))[0])
        loss = torch.nn.functional.cross_entropy(logits[0, start - 1:].double(), row[0, start:], reduction="none")
        losses.append(loss.mean().item())
        if not losses[1:]:
            argmax = bool((logits[0, start - 1:].argmax(-1) == row[0, start:]).all())
    return losses, argmax

@real
@pytest.mark.parametrize("overrides", [dict(lrt="shared"), dict(lrt="layerwise", window_pattern="SL"), dict(lrt="none")], ids=["shared", "windows", "none"])
def test_batched_scores_are_those_of_token_by_token(tasks, tokenizer, overrides):
    """Every task type, with memory and without: shared prefixes, copies, padding and blocks change nothing."""
    model = model_for(tokenizer, torch.float64, **overrides)
    for name in ("copa", "arc_easy", "piqa", "boolq", "winograd", "jeopardy", "lambada_openai"):
        task = next(t for t in tasks if t.name == name)
        examples = [make_example(task, i, tokenizer, 96) for i in range(3)]
        for use_memory in (True, False):
            for example, (losses, argmax, _) in zip(examples, score(model, examples, use_memory)):
                expected, hit = referee(model, example, use_memory)
                assert losses == pytest.approx(expected, abs=1e-8) and argmax == hit, name

def test_a_choice_may_be_the_beginning_of_another(tokenizer):
    for choices in (["a b", "a b c d"], ["x", "x"], ["", "y"]):
        task = core.Task("t", "multiple_choice", 0, " ", 0.5, "", [dict(query="q r s t", choices=choices, gold=0)])
        example, model = make_example(task, 0, tokenizer, 96), model_for(tokenizer, torch.float64)
        (losses, _, _), = score(model, [example])
        assert losses == pytest.approx(referee(model, example, True)[0], abs=1e-8)
        assert all(len(tail) + len(example.prefix) > start for tail, start in zip(example.tails, example.starts))

@real
def test_answers_do_not_depend_on_the_batch(tasks, tokenizer, monkeypatch):
    model = model_for(tokenizer)
    again = []
    for task in tasks:
        n = range(min(12, len(task.examples)))
        first = evaluate_task(model, tokenizer, task, n, 1)
        for budget in (7 * 96, 64 * 96):
            assert evaluate_task(model, tokenizer, task, n, budget) == first, task.name
    # where rounding could decide, the example is scored by itself
    monkeypatch.setitem(core.CLOSE, torch.float32, math_inf := float("inf"))
    calls, task = [], tasks[-1]
    monkeypatch.setattr(core, "score", lambda model, batch, *a: calls.append(len(batch)) or score(model, batch, *a))
    evaluate_task(model, tokenizer, task, range(6), 10**6)
    assert calls.count(1) >= 6 - calls.count(0) - 1 and math_inf

def test_batches_hold_everything_once_and_keep_the_budget(tokenizer):
    g = random.Random(0)
    examples = [core.Example(i, 0, np.zeros(g.randrange(60), int), [np.zeros(g.randrange(1, 9), int) for _ in range(g.randrange(1, 5))], [1]) for i in range(200)]
    for budget in (1, 100, 1000):
        found = list(batches(examples, budget))
        assert sorted(e.index for batch in found for e in batch) == list(range(200))
        for batch in found:
            width = max(len(e.prefix) + max(map(len, e.tails)) for e in batch)
            assert len(batch) == 1 or width * sum(len(e.tails) for e in batch) <= budget
    assert len(found) < 100
