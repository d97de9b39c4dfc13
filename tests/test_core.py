"""
CORE on real data (the folder CORE_DIR, default ../shared/core): prompts byte for byte, predictors whose score
is known beforehand, the exact recurrence, independence of batches and processes. And bundles that are
damaged, hostile or partial.
"""

import csv
import http.server
import json
import os
import random
import re
import stat
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, assert_refused, cli, log, shell
from test_recurrent import make_recurrent

import core
import interleave
import prepare_data
from common import UserError
from core import CORE, batches, common_length, encode, evaluate_task, load_tasks, make_example, render, score
from dataset import load_tokenizer
from model import GPTConfig
from test_model import decode, make

BUNDLE = Path(os.environ.get("CORE_DIR", ROOT.parent / "shared/core"))
real = pytest.mark.skipif(
    not (BUNDLE / "core.yaml").exists(),
    reason=f"no CORE bundle in {BUNDLE} (set CORE_DIR)",
)
NO_TRUNCATION = 10**6  # a context that no prompt fills


@pytest.fixture(scope="session")
def tasks():
    return load_tasks(BUNDLE)

@pytest.fixture(scope="session")
def tokenizer(data):
    return load_tokenizer(data)

def find_task(tasks, name):
    return next(task for task in tasks if task.name == name)

def model_for(tokenizer, dtype=torch.float32, **overrides):
    """A small model with random weights that make a difference, over this tokenizer's vocabulary."""
    config = dict(vocab_size=tokenizer.n_vocab, sequence_len=48, n_layer=2, n_embd=32, n_head=2, n_kv_head=2)
    if overrides.pop("arch", "gpt") == "recurrent":
        return make_recurrent(dtype=dtype, **config | overrides)
    return make(dtype=dtype, **config | overrides)

class Known(torch.nn.Module):
    """
    A predictor in the model's place that has learnt texts by heart: after the beginning of one of them it is
    sure of the next token, otherwise all tokens are alike to it. It keeps the tokens that it has seen in the
    key cache, so it knows no more than what reaches it through prefixes, copies and batches.
    """
    compute_dtype = None
    appends_in_parallel = True

    def __init__(self, vocab_size, context, texts=()):
        """texts: pairs of the tokens and the position from which on it knows them."""
        super().__init__()
        self.config = GPTConfig(sequence_len=context, vocab_size=vocab_size, n_layer=1, n_head=1, n_kv_head=1,
                                n_embd=2, lrt="none")
        self.wte = torch.nn.Embedding(1, 1)
        self.hashes = torch.randint(2**62, (context,), generator=torch.Generator().manual_seed(0))
        self.next_token = {}  # from the hash of a beginning
        for row, start in texts:
            seen = (torch.as_tensor(row) * self.hashes[:len(row)]).cumsum(0).tolist()
            for position in range(start, len(row)):
                self.next_token[seen[position - 1]] = int(row[position])

    def forward(self, idx, positions, kv, memory=None, n_layer=None, embedded=None):
        """The hidden state of a position is the hash of all tokens up to it."""
        as_keys = idx[:, None, :, None].float().expand(-1, 1, -1, 2)
        kv.write(0, positions, as_keys, as_keys)
        end = positions[-1] + 1
        cached = kv.k[0][:, 0, :end, 0].long()
        seen = (cached * self.hashes[:end]).cumsum(1)
        hidden = seen[:, positions.start:, None]
        return hidden, hidden  # as its memory, which nothing reads

    def embed(self, idx, previous=None):
        """It looks nothing up by token."""
        return idx, idx, ()

    def first_memory(self, idx):
        return None

    def logits(self, hidden):
        logits = torch.zeros(*hidden.shape[:2], self.config.vocab_size)
        for position, seen in enumerate(hidden[0, :, 0].tolist()):
            if seen in self.next_token:
                logits[0, position, self.next_token[seen]] = 15
        return logits


# -----------------------------------------------------------------------------
# Prompts

@real
def test_prompts_are_those_of_the_established_evaluator(tasks, tokenizer):
    expected = json.loads((BUNDLE / "prompts.json").read_text("utf-8"))
    found = {task.name: task for task in tasks}
    assert set(expected) == set(found)
    assert len(found) >= 18
    for name, examples in expected.items():
        for example in examples:
            prompts = render(found[name], example["index"])
            assert prompts == example["prompts"], (name, example["index"])
            # and encoding what they share once changes no token
            for row, prompt in zip(encode(tokenizer, prompts), prompts):
                assert row.tolist() == [tokenizer.n_vocab - 1] + tokenizer.encode_ordinary(prompt)

def test_prompts_of_any_length_have_tokens(tokenizer):
    """A million spaces, which tiktoken cannot take at once, within the shared part and behind it."""
    spaces = " " * 1_000_000
    prompts = [f"a{spaces}b {choice}{spaces}c" for choice in "xy"]
    for row, prompt in zip(encode(tokenizer, prompts), prompts):
        assert tokenizer.decode(row[1:].tolist()) == prompt

@real
def test_what_is_scored(tasks, tokenizer):
    """
    Choices share what comes before the scored tokens (multiple choice) or end in them (schema); a
    continuation is scored whole.
    """
    for task in tasks:
        for i in range(0, len(task.examples), max(len(task.examples) // 10, 1)):
            example = make_example(task, i, tokenizer, NO_TRUNCATION)
            prompts = render(task, i)
            rows = example.rows
            assert [tokenizer.decode(row[1:].tolist()) for row in rows] == prompts[-len(rows):]
            scored = [tokenizer.decode(row[start:].tolist()) for row, start in zip(rows, example.starts)]
            if task.kind == "language_modeling":
                assert prompts[0] + scored[0] == prompts[1]
                assert task.examples[i]["continuation"] in scored[0]
            elif task.kind == "schema":
                assert len(set(scored)) == 1
                assert task.examples[i]["continuation"] in scored[0]
            else:
                assert len(set(example.starts)) == 1
                start = example.starts[0]
                for text, choice in zip(scored, task.examples[i]["choices"]):
                    assert choice.endswith(text) or text.endswith(choice)
                shared = common_length([row[:start + 1] for row in rows])
                assert shared <= start or min(map(len, rows)) == start + 1

@real
def test_truncation_keeps_the_last_tokens(tasks, tokenizer):
    context = 40
    for task in tasks:
        for i in (0, 1):
            whole = make_example(task, i, tokenizer, NO_TRUNCATION)
            cut = make_example(task, i, tokenizer, context)
            for c, long in enumerate(whole.rows):
                assert cut.rows[c].tolist() == long[-context:].tolist()
                assert cut.starts[c] == max(whole.starts[c] - max(len(long) - context, 0), 1)
            assert len(cut.rows) == len(cut.starts) == len(whole.rows)


# -----------------------------------------------------------------------------
# Predictors whose score is known

@real
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_predictor_that_knows_the_answers_scores_one(tasks, tokenizer, batch_size):
    context = 256
    for task in tasks:
        n = min(24, len(task.examples))
        answers = []
        for i in range(n):
            example = make_example(task, i, tokenizer, context)
            gold = example.gold or 0
            answers.append((example.rows[gold], example.starts[gold]))
        model = Known(tokenizer.n_vocab, context, answers)
        right = evaluate_task(model, tokenizer, task, range(n), batch_size * context)
        assert right == dict.fromkeys(range(n), True), task.name

@real
def test_a_constant_predictor_scores_what_counting_says(tasks, tokenizer):
    """All choices are alike to it: it takes the first; a continuation is right if all of it is token 0."""
    context = 128
    for task in tasks:
        n = min(24, len(task.examples))
        right = evaluate_task(Known(tokenizer.n_vocab, context), tokenizer, task, range(n), 16 * context)
        expected = {}
        for i in range(n):
            if task.kind == "language_modeling":  # argmax is token 0
                example = make_example(task, i, tokenizer, context)
                expected[i] = not example.tails[0][example.starts[0]:].any()
            else:
                expected[i] = task.examples[i]["gold"] == 0
        assert right == expected, task.name


# -----------------------------------------------------------------------------
# The recurrence, batches and processes

def score_token_by_token(model, example, use_memory):
    """
    The mean losses of an example's choices, each alone and token by token; and whether the scored tokens of
    the first are the argmax.
    """
    losses, is_argmax = [], []
    for row, start in zip(example.rows, example.starts):
        row = torch.from_numpy(row)[None]
        inputs = row[:, :-1]
        if use_memory:
            logits, _ = decode(model, inputs)
        else:
            with torch.no_grad():
                (_, hidden, _), = interleave.run(model, inputs, interleave.plain(inputs.size(1)))
                logits = model.logits(hidden)
        logits, targets = logits[0, start - 1:], row[0, start:]
        loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
        losses.append(loss.mean().item())
        is_argmax.append(bool((logits.argmax(-1) == targets).all()))
    return losses, is_argmax[0]

@real
@pytest.mark.parametrize("overrides", [
    pytest.param(dict(lrt="shared"), id="shared"),
    pytest.param(dict(lrt="layerwise", window_pattern="SL"), id="windows"),
    pytest.param(dict(lrt="none"), id="none"),
    pytest.param(dict(arch="recurrent"), id="recurrent"),
    pytest.param(dict(lrt="shared", first_memory="embedding"), id="first-embedding"),
    pytest.param(dict(lrt="shared", first_memory="embedding", memory="embedding"), id="control"),
])
def test_batched_scores_are_those_of_token_by_token(tasks, tokenizer, overrides, monkeypatch):
    """In every kind of task, shared prefixes, copies, padding and blocks change nothing."""
    monkeypatch.setattr(core, "PREFILL_BLOCK", 16)
    model = model_for(tokenizer, torch.float64, **overrides)
    for name in ("copa", "arc_easy", "boolq", "winograd", "jeopardy"):
        task = find_task(tasks, name)
        examples = [make_example(task, i, tokenizer, 48) for i in range(3)]
        for use_memory in (True, False):
            for example, scored in zip(examples, score(model, examples, use_memory)):
                losses, is_argmax = score_token_by_token(model, example, use_memory)
                assert scored.losses == pytest.approx(losses, abs=1e-8), name
                assert scored.is_argmax == is_argmax, name

@pytest.mark.parametrize("choices", [["a b", "a b c d"], ["x", "x"], ["", "y"]])
def test_a_choice_may_be_the_beginning_of_another(choices, tokenizer):
    question = dict(query="q r s t", choices=choices, gold=0)
    task = core.Task("t", "multiple_choice", 0, " ", 0.5, "", [question])
    example = make_example(task, 0, tokenizer, 48)
    model = model_for(tokenizer, torch.float64)
    scored, = score(model, [example])
    losses, _ = score_token_by_token(model, example, use_memory=True)
    assert scored.losses == pytest.approx(losses, abs=1e-8)
    assert all(len(row) > start for row, start in zip(example.rows, example.starts))

@real
def test_answers_do_not_depend_on_the_batch(tasks, tokenizer):
    model = model_for(tokenizer)
    for name in ("piqa", "winograd", "lambada_openai"):
        task = find_task(tasks, name)
        alone = evaluate_task(model, tokenizer, task, range(8), 1)
        for budget in (5 * 48, 64 * 48):
            assert evaluate_task(model, tokenizer, task, range(8), budget) == alone, name

@real
@pytest.mark.parametrize("tie_margin, alone", [(0.0, 0), (float("inf"), 8)])
def test_where_rounding_could_decide_an_example_is_alone(tasks, tokenizer, monkeypatch, tie_margin, alone):
    """It is scored again by itself. alone: how many of the 8 examples that are."""
    model = model_for(tokenizer)
    task = find_task(tasks, "copa")
    sizes = []

    def recorded(model, batch, *args):
        sizes.append(len(batch))
        return score(model, batch, *args)

    monkeypatch.setattr(core, "score", recorded)
    monkeypatch.setitem(core.TIE_MARGIN, torch.float32, tie_margin)
    in_batches = evaluate_task(model, tokenizer, task, range(8), 10**6)
    assert in_batches == evaluate_task(model, tokenizer, task, range(8), 1)  # 8 batches of one
    assert sum(size == 1 for size in sizes) - 8 <= alone <= sum(size == 1 for size in sizes)

def test_batches_hold_everything_once_and_keep_the_budget():
    g = random.Random(0)
    examples = []
    for i in range(200):
        prefix = np.zeros(g.randrange(60), int)
        tails = [np.zeros(g.randrange(1, 9), int) for _ in range(g.randrange(1, 5))]
        examples.append(core.Example(i, 0, prefix, tails, [1]))
    for budget in (1, 100, 1000):
        found = list(batches(examples, budget))
        assert sorted(e.index for batch in found for e in batch) == list(range(200))
        for batch in found:
            width = max(len(e.prefix) + max(map(len, e.tails)) for e in batch)
            assert len(batch) == 1 or width * sum(len(e.tails) for e in batch) <= budget
    assert len(found) < 100


# -----------------------------------------------------------------------------
# The bundle

def toy_examples(kind, name, n):
    """n examples of this kind of task, whose texts have the task's name in them."""
    examples = []
    for j in range(n):
        text = f"{name} {j} of {n}"
        if kind == "multiple_choice":
            examples.append(dict(query=text, choices=["yes it is", "no", "maybe"], gold=j % 3))
        elif kind == "schema":
            options = [text, text + " not"]
            examples.append(dict(context_options=options, continuation="and more", gold=j % 2))
        else:
            examples.append(dict(context=text, continuation=str(j)))
    return examples

def write_bundle(folder, n=4, names=CORE, shots=1, **files):
    """A whole bundle of tiny tasks of all three kinds. files: name of a task -> its lines instead."""
    (folder / "eval_data").mkdir(parents=True)
    kinds = list(core.KINDS)
    listed = []
    for i, name in enumerate(names):
        kind = kinds[i % 3]
        lines = files.get(name) or [json.dumps(example) for example in toy_examples(kind, name, n)]
        (folder / f"eval_data/{name}.jsonl").write_text("\n".join(lines) + "\n")
        listed.append(dict(label=name, dataset_uri=f"{name}.jsonl", num_fewshot=[shots], icl_task_type=kind))
    (folder / "core.yaml").write_text(json.dumps(dict(icl_tasks=listed)))  # YAML holds JSON
    baselines = "".join(f"{name},25\n" for name in names)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + baselines)
    return folder

def zipped(path, folder=None, **members):
    """A zip of the folder, below eval_bundle/, and of members: name -> text."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        if folder:
            for file in sorted(folder.rglob("*")):
                z.write(file, f"eval_bundle/{file.relative_to(folder)}")
        for name, text in members.items():
            z.writestr(name, text)
    return path

@pytest.fixture
def server(tmp_path):
    """A web server of the files in tmp_path: its URL, and the list of paths that were requested."""
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            requested.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", requested
        running.shutdown()

def test_the_bundle_is_downloaded_once(tmp_path, server):
    url, requested = server
    bundle = write_bundle(tmp_path / "served")
    zipped(tmp_path / "bundle.zip", bundle)
    folder = tmp_path / "data_core/eval_bundle"
    for _ in range(2):
        core.fetch_bundle(folder, url + "/bundle.zip")
    assert requested.count("/bundle.zip") == 1
    downloaded = load_tasks(folder)
    assert [task.name for task in downloaded] == list(CORE)
    assert [task.examples for task in downloaded] == [task.examples for task in load_tasks(bundle)]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "eval_bundle"]

@pytest.mark.parametrize("name, words", [("page.zip", "not a zip archive"), ("none.zip", "HTTP 404")])
def test_a_bad_download_leaves_nothing(name, words, tmp_path, server):
    url, _ = server
    (tmp_path / "page.zip").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=words + ".*--bundle or --core-bundle"):
        core.fetch_bundle(tmp_path / "other/eval_bundle", f"{url}/{name}")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".lock"]

def test_without_a_network_the_bundle_is_given_up_soon(tmp_path, monkeypatch):
    """Somebody waits for the command to start."""
    slept = []
    monkeypatch.setattr(prepare_data.time, "sleep", slept.append)
    with pytest.raises(UserError, match="cannot download http://127.0.0.1:9.*--bundle or --core-bundle"):
        core.fetch_bundle(tmp_path / "data_core/eval_bundle", "http://127.0.0.1:9/bundle.zip")
    assert 0 < sum(slept) < 10

def test_unpacking_is_safe(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", names=CORE[:3])
    archive = tmp_path / "x.zip"
    inner = tmp_path / "inner"
    inner.mkdir()

    def assert_not_unpacked(words):
        with pytest.raises(UserError, match=words):
            core.unpack(archive, inner / "out")

    # names that lead out of the folder
    for name in ("../evil", str(tmp_path / "evil"), "a/../../evil", "..\\evil"):
        zipped(archive, bundle, **{name: "x"})
        assert_not_unpacked("outside its folder")

    # a symbolic link
    link = zipfile.ZipInfo("eval_bundle/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr(link, "/etc/passwd")
    assert_not_unpacked("outside its folder")

    # another archive, and a damaged one
    zipped(archive, None, readme="nothing")
    assert_not_unpacked("no core.yaml")
    raw = bytearray(zipped(archive, bundle).read_bytes())
    raw[raw.index(b"eval_bundle/core.yaml") + 30] ^= 0xFF
    archive.write_bytes(raw)
    assert_not_unpacked("cannot unpack")

    assert list(inner.iterdir()) == []
    assert not (tmp_path / "evil").exists()
    core.unpack(zipped(archive, bundle), inner / "out")
    assert (inner / "out/core.yaml").read_bytes() == (bundle / "core.yaml").read_bytes()

@pytest.mark.parametrize("names", [["a", "a/b"], [300 * "x"], ["./."]])
def test_an_archive_of_names_that_cannot_be_is_not_kept(names, tmp_path, server):
    """The same command would fail for ever."""
    zipped(tmp_path / "bundle.zip", None, **{"eval_bundle/core.yaml": "", **dict.fromkeys(names, "x")})
    with pytest.raises(UserError, match="cannot unpack .*: run the same command again"):
        core.fetch_bundle(tmp_path / "other/eval_bundle", server[0] + "/bundle.zip")
    assert [path.name for path in (tmp_path / "other").iterdir()] == [".lock"]

def test_what_is_in_the_place_of_the_bundle_is_said_before_the_download(tmp_path, server):
    (tmp_path / "eval_bundle").write_text("keep")
    with pytest.raises(UserError, match="eval_bundle is no folder"):
        core.fetch_bundle(tmp_path / "eval_bundle", server[0] + "/bundle.zip")
    assert server[1] == []
    assert (tmp_path / "eval_bundle").read_text() == "keep"

def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "BUNDLE_BYTES", 10**6)
    archive = zipped(tmp_path / "x.zip", None, zeros="0" * 10**7)
    with pytest.raises(UserError, match="more than 0 MB"):
        core.unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("bad, words", [
    ("{", "line 2: not valid JSON"),
    ('{"query": "q"}', "line 2: a multiple_choice example has query and choices"),
    ("[]", "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 2"),
    ('{"query": "q", "choices": ["a", 3], "gold": 0}', "line 2"),
    ('{"query": "q", "choices": [], "gold": 0}', "line 2"),
    ('{"query": "q", "choices": ["a"], "gold": 0}', "line 2: .*two or more to choose from"),
    ('{"query": "q", "choices": ["a"], "gold": true}', "line 2"),
    ('{"query": "q", "choices": null, "gold": 0}', "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 1.0}', "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": 0.5}', "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": true}', "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": NaN}', "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": "1"}', "line 2"),
    ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "line 2"),
    ('{"query": "q", "choices": ["a", "\\ud800"], "gold": 0}', "line 2"),
])
def test_bad_examples(bad, words, tmp_path):
    name = CORE[0]  # multiple choice
    good = json.dumps(dict(query="q", choices=["a", "b"], gold=1))
    bundle = write_bundle(tmp_path / "b", **{name: [good, bad, good]})
    with pytest.raises(UserError, match=f"{name}.jsonl {words}"):
        load_tasks(bundle)

def test_an_example_without_any_text_is_refused(tokenizer):
    nothing = dict(context="", continuation="")
    task = core.Task("x", "language_modeling", 0, "", 0.0, "", [nothing])
    with pytest.raises(UserError, match="x: an example has no text to score"):
        core.make_example(task, 0, tokenizer, 32)

def test_too_few_examples(tmp_path):
    bundle = write_bundle(tmp_path / "b", shots=4)
    words = f"{CORE[0]}.jsonl has 4 examples: 4-shot prompts need at least 5"
    with pytest.raises(UserError, match=words):
        load_tasks(bundle)

def test_no_bundle(tmp_path):
    with pytest.raises(UserError, match="no CORE bundle in .*core.yaml is missing"):
        load_tasks(tmp_path)

@pytest.mark.parametrize("file, text", [
    ("core.yaml", "a: ["),
    ("core.yaml", "icl_tasks: 3"),
    ("core.yaml", "icl_tasks: [{dataset_uri: ../x, label: x}]"),
    ("core.yaml", "icl_tasks: [{label: x, dataset_uri: x, num_fewshot: [0], icl_task_type: essay}]"),
    ("core.yaml", "[" * 10_000),
    ("eval_meta_data.csv", "x\n1\n"),
    ("eval_meta_data.csv", f"Eval Task,Random baseline\n{CORE[0]},100\n"),
    ("eval_meta_data.csv", f"Eval Task,Random baseline\n{CORE[0]},-1\n"),
    ("eval_meta_data.csv", f"Eval Task,Random baseline\n{CORE[0]},nan\n"),
    ("eval_meta_data.csv", f"Eval Task,Random baseline\n{CORE[0]},\0\n"),
    ("eval_meta_data.csv", f"Eval Task,Random baseline\n{CORE[0]},25\n{CORE[0]},50\n"),
    # a value that would be a billion words, if all of it were looked at or shown
    ("core.yaml", "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{y}: &{y} [{', '.join(10 * [f'*{x}'])}]\n" for x, y in zip("abcdefgh", "bcdefghi"))
        + "icl_tasks: [{label: *i, dataset_uri: x, num_fewshot: [*i], icl_task_type: *i}]"),
    ("core.yaml", "icl_tasks: !!python/object/apply:os.mkdir [pwned]"),
    ("core.yaml", "\0" * 10_000),
])
def test_damaged_bundles(file, text, tmp_path, here):
    bundle = write_bundle(tmp_path / "b")
    (bundle / file).write_text(text)
    with pytest.raises(UserError, match="(?s)is damaged .*: remove it and get it again") as e:
        load_tasks(bundle)
    assert len(str(e.value)) < 1000
    assert not Path("pwned").exists()

def test_byte_order_marks_in_a_bundle(tmp_path):
    bundle = write_bundle(tmp_path / "b")
    before = load_tasks(bundle)
    for name in ("core.yaml", "eval_meta_data.csv", f"eval_data/{CORE[0]}.jsonl"):
        (bundle / name).write_bytes(b"\xef\xbb\xbf" + (bundle / name).read_bytes())
    for task, same in zip(load_tasks(bundle), before, strict=True):
        assert (task.name, task.baseline, task.examples) == (same.name, same.baseline, same.examples)

def test_what_is_no_file_is_not_left_out_of_a_bundle(tmp_path):
    """Only what is not there at all is a task less."""
    path = write_bundle(tmp_path / "b") / f"eval_data/{CORE[0]}.jsonl"
    path.unlink()
    for put_there, words in ((path.mkdir, "Is a directory"), (lambda: os.mkfifo(path), "no regular file"),
                             (lambda: path.symlink_to("nowhere"), "No such file")):
        put_there()
        with pytest.raises(UserError, match=f"{CORE[0]}.jsonl.*{words}"):
            load_tasks(tmp_path / "b")
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "b/core.yaml").unlink()
    os.mkfifo(tmp_path / "b/core.yaml")
    with pytest.raises(UserError, match="core.yaml: it is .*no regular file"):
        load_tasks(tmp_path / "b")

@pytest.mark.parametrize("changes", [
    dict(num_fewshot=[-1]),
    dict(num_fewshot=[1.5]),
    dict(num_fewshot=["1"]),
    dict(num_fewshot=[True]),
    dict(num_fewshot=[10**9]),
    dict(num_fewshot=[]),
    dict(continuation_delimiter=3),
    dict(continuation_delimiter=None),
    dict(label=3),
    dict(label="a\nb"),
    dict(label=" "),
    dict(label="not in the table"),
    dict(num_fewshot=3),
    dict(num_fewshot=[1, 2]),
    dict(icl_task_type=["schema"]),
    dict(label=CORE[1]),
    dict(dataset_uri=3),
])
def test_odd_values_in_a_bundle(changes, tmp_path):
    bundle = write_bundle(tmp_path / "b")
    listed = json.loads((bundle / "core.yaml").read_text())
    listed["icl_tasks"][0] |= changes
    (bundle / "core.yaml").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="is damaged"):
        load_tasks(bundle)

def test_tasks_that_a_bundle_does_not_have(tmp_path):
    bundle = write_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="has no data for nonsense; it has hellaswag_zeroshot"):
        load_tasks(bundle, ["nonsense", "copa"])
    (bundle / "eval_data/copa.jsonl").unlink()  # a task less is no error
    assert [task.name for task in load_tasks(bundle)] == [name for name in CORE if name != "copa"]


# -----------------------------------------------------------------------------
# The command

@pytest.fixture
def run(data, here):
    """A run of three steps."""
    code, _, err = cli("train.py", "--data", data, *SMALL, "--num-iterations", 3, "--eval-every", 0,
                       "--out", ".", "--name", "run")
    assert code == 0, err
    return Path("run")

@pytest.fixture
def scored_tasks(monkeypatch):
    """The tasks that evaluate_core has scored: their `names`. It is interrupted after `stop_at` of them."""
    evaluate = core.evaluate_task
    scored = SimpleNamespace(names=[], stop_at=None)

    def recorded(model, tokenizer, task, *args):
        if len(scored.names) == scored.stop_at:
            raise KeyboardInterrupt
        scored.names.append(task.name)
        return evaluate(model, tokenizer, task, *args)

    monkeypatch.setattr(core, "evaluate_task", recorded)
    return scored

def core_command(run, bundle, *flags):
    """Score CORE of a run: (exit code, stdout, stderr)."""
    return cli("eval_core.py", "--checkpoint", run, "--bundle", bundle, "--device", "cpu",
               "--eval", "core", *flags)

def test_a_whole_bundle_gives_core(run, tmp_path):
    bundle = write_bundle(tmp_path / "b")
    code, out, err = core_command(run, bundle, "--eval", "core,sample", "--json", "all.json")
    assert code == 0, err
    assert "with memory: CORE " in out
    assert "The capital of France is" in out
    results = json.loads((run / "core_0000003.json").read_text())
    assert json.loads(Path("all.json").read_text())["core"] == results
    assert len(results["tasks"]) == 22
    centered = [(t["correct"] / 4 - 0.25) / 0.75 for t in results["tasks"].values()]
    assert results["core"] == pytest.approx(sum(centered) / 22)
    with open(run / "core_0000003.csv") as f:
        rows = list(csv.DictReader(f))
    assert [row["task"] for row in rows] == [*CORE, "CORE"]
    assert float(rows[-1]["centered"]) == pytest.approx(results["core"], abs=1e-6)

def test_names_with_commas_are_one_field_of_the_table(tmp_path):
    result = core.task_result(core.Task('a, "b"', "schema", 0, " ", 0.5, "", [1, 2]), 2, 1)
    core.write_core(tmp_path / "core_1.json", core.summarize({'a, "b"': result}))
    with open(tmp_path / "core_1.csv") as f:
        row, = csv.DictReader(f)
    assert (row["task"], row["n"], row["accuracy"]) == ('a, "b"', "2", "0.500000")

def test_results_that_cannot_be_written_are_said_before_the_work(run, tmp_path, scored_tasks):
    (run / "core_0000003.csv").mkdir()
    assert_refused(core_command(run, write_bundle(tmp_path / "b")), "core_0000003.csv: it is a folder")
    assert scored_tasks.names == []

def test_finished_tasks_are_kept(run, tmp_path, scored_tasks):
    bundle = write_bundle(tmp_path / "b")
    code, first, err = core_command(run, bundle)
    assert code == 0, err
    assert scored_tasks.names == list(CORE)

    # nothing is scored again
    scored_tasks.names.clear()
    code, again, _ = core_command(run, bundle)
    assert code == 0
    assert again == first
    assert scored_tasks.names == []

    # but a task whose data have changed
    file = bundle / "eval_data/copa.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[::-1]))
    assert core_command(run, bundle)[0] == 0
    assert scored_tasks.names == ["copa"]

    # cut short: the tasks before stay
    scored_tasks.names.clear()
    scored_tasks.stop_at = 5
    assert core_command(run, bundle, "--no-memory")[0] == 130
    scored_tasks.stop_at = None
    code, out, _ = core_command(run, bundle, "--no-memory")
    assert code == 0
    assert scored_tasks.names == list(CORE)
    assert "without memory: CORE" in out

    # results that cannot be, of one task: it is done again, and the others are not
    results = run / "core_0000003.json"
    whole = json.loads(results.read_text())
    copa = whole["tasks"]["copa"]
    for changes in (dict(accuracy=0.9), dict(n=0), dict(correct=5), dict(correct=True), dict(stderr=-1),
                    dict(centered=10**400), dict(baseline=0.0), dict(shots=7), dict(of=2)):
        results.write_text(json.dumps(whole | dict(tasks=whole["tasks"] | dict(copa=copa | changes))))
        scored_tasks.names.clear()
        assert core_command(run, bundle)[0] == 0
        assert scored_tasks.names == ["copa"]
        assert json.loads(results.read_text())["tasks"]["copa"] == copa

    # and with another chance of guessing
    table = bundle / "eval_meta_data.csv"
    table.write_text(table.read_text().replace("copa,25", "copa,50"))
    scored_tasks.names.clear()
    assert core_command(run, bundle)[0] == 0
    assert scored_tasks.names == ["copa"]
    table.write_text(table.read_text().replace("copa,50", "copa,25"))

    # a damaged file of results: done again
    no_number = re.sub(r'"centered": [^,]*', '"centered": "x"', results.read_text())
    for damaged in ("{", "[" * 100_000, no_number, no_number.replace('"x"', "NaN")):
        results.write_text(damaged)
        scored_tasks.names.clear()
        assert core_command(run, bundle)[0] == 0
        assert scored_tasks.names == list(CORE)

def test_fewer_examples_are_an_estimate(run, tmp_path):
    """It goes to a file of its own."""
    code, out, _ = core_command(run, write_bundle(tmp_path / "b"), "--max-per-task", 2)
    assert code == 0
    assert "an estimate from at most 2 examples a task (standard error" in out
    assert "2 of 4" in out
    kept = json.loads((run / "core_0000003_max2.json").read_text())
    assert kept["tasks"]["copa"]["n"] == 2

def test_a_partial_bundle_is_no_core(run, tmp_path):
    bundle = write_bundle(tmp_path / "b", names=CORE[:4])
    code, out, _ = core_command(run, bundle)
    assert code == 0
    assert "no CORE, 18 of its 22 tasks did not run: arc_challenge, copa" in out
    assert "arc_easy" in out

    # one of its tasks; the other three are still in the file
    code, out, _ = core_command(run, bundle, "--tasks", "jeopardy")
    assert code == 0
    assert "| jeopardy |" in out
    assert "| arc_easy |" not in out
    assert "21 of its 22" in out
    kept = json.loads((run / "core_0000003.json").read_text())
    assert kept["core"] is None
    assert len(kept["missing"]) == 18
    assert len(kept["tasks"]) == 4

def test_bad_flags(run, tmp_path):
    bundle = write_bundle(tmp_path / "b", names=CORE[:4])
    assert_refused(core_command(run, bundle, "--tasks", "copa"), "no data for copa")
    assert_refused(core_command(run, bundle, "--max-per-task", "0"),
                   "--max-per-task must be a number of at least 1")
    assert_refused(core_command(run, bundle, "--eval", "bpb,cors"), "choose from bpb,core,sample")
    assert_refused(core_command(run, "nowhere"), "no CORE bundle in nowhere")

@real
def test_two_processes_agree_with_one(run):
    flags = ["--checkpoint", run, "--bundle", BUNDLE, "--device", "cpu", "--eval", "core",
             "--tasks", "copa,arc_easy,jeopardy,winograd", "--max-per-task", 9]
    path = run / "core_0000003_max9.json"
    code, out, err = cli("eval_core.py", *flags)
    assert code == 0, err
    results_of_one = path.read_text()
    path.unlink()
    torchrun = str(Path(sys.executable).parent / "torchrun")
    done = shell(torchrun, "--standalone", "--nproc_per_node=2", ROOT / "eval_core.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out
    assert path.read_text() == results_of_one

def test_training_scores_core(data, here, tmp_path):
    bundle = write_bundle(tmp_path / "b", names=CORE[:3])
    flags = ["--data", data, *SMALL, "--num-iterations", 4, "--eval-every", 0, "--name", "x"]
    code, out, err = cli("train.py", *flags, "--core-every", 2, "--core-bundle", bundle)
    assert code == 0, err
    assert "no CORE, 19 of its 22 tasks" in out
    assert [(row["step"], len(row["centered"])) for row in log("runs/x", "core")] == [(2, 3), (4, 3)]
    assert Path("runs/x/core_0000002.json").exists()
    assert Path("runs/x/core_0000004.csv").exists()

    # the same weights: nothing to do
    kept = json.loads(Path("runs/x/core_0000004.json").read_text())
    code, _, err = core_command("runs/x", bundle)
    assert code == 0, err
    assert json.loads(Path("runs/x/core_0000004.json").read_text()) == kept

    assert_refused(cli("train.py", *flags, "--core-bundle", bundle), "go with --core-every")
    assert_refused(cli("train.py", *flags, "--core-every", 0, "--core-bundle", "nowhere"),
                   "no CORE bundle in nowhere")
