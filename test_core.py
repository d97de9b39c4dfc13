"""
CORE on real data (folder CORE_DIR, default ../shared/core): prompts byte for byte, predictors whose score is known beforehand,
independence of batches and processes, the exact recurrence; bundles that are damaged, hostile or partial.
"""

import csv
import http.server
import json
import os
import random
import shutil
import stat
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import core
from attention import KVBuffer
from core import CORE, batches, common_length, encode, evaluate_task, load_tasks, make_example, render, score
from model import GPTConfig
from prepare_data import UserError, load_tokenizer
from test_cli import SMALL, assert_refused, cli, log, shell
from test_model import decode, make

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
    return make(dtype=dtype, **dict(vocab_size=tokenizer.n_vocab, sequence_len=48, n_layer=2, n_embd=32, n_head=2, n_kv_head=2) | overrides)

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
        kv.write(0, positions, *[idx[:, None, :, None].float().expand(-1, 1, -1, 2)] * 2)
        upto = (kv.k[0][:, 0, :positions[-1] + 1, 0].long() * self.hashes[:positions[-1] + 1]).cumsum(1)
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
def test_batched_scores_are_those_of_token_by_token(tasks, tokenizer, overrides, monkeypatch):
    """Every task type, with memory and without: shared prefixes, copies, padding and blocks change nothing."""
    monkeypatch.setattr(core, "BLOCK", 16)
    model = model_for(tokenizer, torch.float64, **overrides)
    for name in ("copa", "arc_easy", "boolq", "winograd", "jeopardy"):
        task = next(t for t in tasks if t.name == name)
        examples = [make_example(task, i, tokenizer, 48) for i in range(3)]
        for use_memory in (True, False):
            for example, (losses, argmax, _) in zip(examples, score(model, examples, use_memory)):
                expected, hit = referee(model, example, use_memory)
                assert losses == pytest.approx(expected, abs=1e-8) and argmax == hit, name

def test_a_choice_may_be_the_beginning_of_another(tokenizer):
    for choices in (["a b", "a b c d"], ["x", "x"], ["", "y"]):
        task = core.Task("t", "multiple_choice", 0, " ", 0.5, "", [dict(query="q r s t", choices=choices, gold=0)])
        example, model = make_example(task, 0, tokenizer, 48), model_for(tokenizer, torch.float64)
        (losses, _, _), = score(model, [example])
        assert losses == pytest.approx(referee(model, example, True)[0], abs=1e-8)
        assert all(len(tail) + len(example.prefix) > start for tail, start in zip(example.tails, example.starts))

@real
def test_answers_do_not_depend_on_the_batch(tasks, tokenizer, monkeypatch):
    model, n = model_for(tokenizer), range(8)
    for task in (t for t in tasks if t.name in ("piqa", "winograd", "lambada_openai")):
        first = evaluate_task(model, tokenizer, task, n, 1)
        for budget in (5 * 48, 64 * 48):
            assert evaluate_task(model, tokenizer, task, n, budget) == first, task.name
    # where rounding could decide, an example is scored by itself
    sizes, task = [], next(t for t in tasks if t.name == "copa")
    monkeypatch.setattr(core, "score", lambda model, batch, *a: sizes.append(len(batch)) or score(model, batch, *a))
    for close, alone in ((0.0, 0), (float("inf"), 8)):
        monkeypatch.setitem(core.CLOSE, torch.float32, close)
        sizes.clear()
        assert evaluate_task(model, tokenizer, task, n, 10**6) == evaluate_task(model, tokenizer, task, n, 1)
        assert sum(size == 1 for size in sizes) - 8 <= alone <= sum(size == 1 for size in sizes)

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


# -----------------------------------------------------------------------------
# The bundle

def write_bundle(folder, n=4, names=CORE, shots=1, **files):
    """A whole bundle of tiny tasks of all three types; files: name of a task -> its lines instead."""
    kinds, listed = list(core.KINDS), []
    (folder / "eval_data").mkdir(parents=True)
    for i, name in enumerate(names):
        words = [f"{name} {j} of {n}" for j in range(n)]
        lines = [json.dumps(dict(query=w, choices=["yes it is", "no", "maybe"], gold=j % 3) if i % 3 == 0 else
                            dict(context_options=[w, w + " not"], continuation="and more", gold=j % 2) if i % 3 == 1 else
                            dict(context=w, continuation=str(j))) for j, w in enumerate(words)]
        (folder / f"eval_data/{name}.jsonl").write_text("\n".join(files.get(name, lines)) + "\n")
        listed.append(dict(label=name, dataset_uri=f"{name}.jsonl", num_fewshot=[shots], icl_task_type=kinds[i % 3]))
    (folder / "core.yaml").write_text(json.dumps(dict(icl_tasks=listed)))  # YAML holds JSON
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "".join(f"{name},25\n" for name in names))
    return folder

def zipped(path, folder=None, **members):
    """A zip of the folder, below eval_bundle/, and of members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for f in sorted(folder.rglob("*")) if folder else ():
            z.write(f, f"eval_bundle/{f.relative_to(folder)}")
        for name, text in members.items():
            z.writestr(name, text)
    return path

def test_the_bundle_is_downloaded_once(tmp_path, monkeypatch):
    bundle = write_bundle(tmp_path / "served")
    zipped(tmp_path / "bundle.zip", bundle)
    asked = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)
        def log_message(self, *args):
            asked.append(self.path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, folder = f"http://127.0.0.1:{server.server_port}", tmp_path / "data_core/eval_bundle"
        for _ in range(2):
            core.fetch_bundle(folder, url + "/bundle.zip")
        assert asked.count("/bundle.zip") == 1
        assert [t.name for t in load_tasks(folder)] == list(CORE) and [t.examples for t in load_tasks(folder)] == [t.examples for t in load_tasks(bundle)]
        assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", "eval_bundle"]
        (tmp_path / "page.zip").write_text("<html>not found</html>")
        for name, words in (("page.zip", "not a zip archive"), ("none.zip", "HTTP 404")):
            with pytest.raises(UserError, match=words + ".*--bundle DIR"):
                core.fetch_bundle(tmp_path / "other/eval_bundle", f"{url}/{name}")
            assert [p.name for p in (tmp_path / "other").iterdir()] == [".lock"]
        server.shutdown()

def test_unpacking_is_safe(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", names=CORE[:3])
    inner, archive = tmp_path / "inner", tmp_path / "x.zip"
    inner.mkdir()
    link = zipfile.ZipInfo("eval_bundle/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for members, words in (({"../evil": "x"}, "outside its folder"), ({str(tmp_path / "evil"): "x"}, "outside its folder"), ({"a/../../evil": "x"}, "outside its folder"),
                           ({"..\\evil": "x"}, "outside its folder")):
        zipped(archive, bundle, **members)
        with pytest.raises(UserError, match=words):
            core.unpack(archive, inner / "out")
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="outside its folder"):
        core.unpack(archive, inner / "out")
    zipped(archive, None, readme="nothing")
    with pytest.raises(UserError, match="no core.yaml"):
        core.unpack(archive, inner / "out")
    raw = bytearray(zipped(archive, bundle).read_bytes())
    raw[raw.index(b"eval_bundle/core.yaml") + 30] ^= 0xFF
    archive.write_bytes(raw)
    with pytest.raises(UserError, match="cannot unpack"):
        core.unpack(archive, inner / "out")
    assert list(inner.iterdir()) == [] and not (tmp_path / "evil").exists()
    core.unpack(zipped(archive, bundle), inner / "out")
    assert (inner / "out/core.yaml").read_bytes() == (bundle / "core.yaml").read_bytes()

def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "BUNDLE_BYTES", 10**6)
    with pytest.raises(UserError, match="more than 0 MB"):
        core.unpack(zipped(tmp_path / "x.zip", None, zeros="0" * 10**7), tmp_path / "out")
    assert not (tmp_path / "out").exists()

def test_bad_bundles(tmp_path):
    name = CORE[0]  # multiple choice
    good = json.dumps(dict(query="q", choices=["a", "b"], gold=1))
    for bad, words in (("{", "line 2: not valid JSON"), ('{"query": "q"}', "line 2: a multiple_choice example has query and choices"),
                       ("[]", "line 2"), ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "line 2"), ('{"query": "q", "choices": ["a", 3], "gold": 0}', "line 2"),
                       ('{"query": "q", "choices": [], "gold": 0}', "line 2"), ('{"query": "q", "choices": ["a"], "gold": true}', "line 2")):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        with pytest.raises(UserError, match=f"{name}.jsonl {words}"):
            load_tasks(write_bundle(tmp_path / "b", **{name: [good, bad, good]}))
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(UserError, match=f"{name}.jsonl has 4 examples: 4-shot prompts need at least 5"):
        load_tasks(write_bundle(tmp_path / "b", shots=4))
    with pytest.raises(UserError, match="no CORE bundle in .*core.yaml is missing"):
        load_tasks(tmp_path)
    shutil.rmtree(tmp_path / "b")
    bundle = write_bundle(tmp_path / "b")
    with pytest.raises(UserError, match="has no data for nonsense; it has hellaswag_zeroshot"):
        load_tasks(bundle, ["nonsense", "copa"])
    for file, text in (("core.yaml", "a: ["), ("core.yaml", "icl_tasks: 3"), ("core.yaml", "icl_tasks: [{dataset_uri: ../x, label: x}]"),
                       ("core.yaml", "icl_tasks: [{label: x, dataset_uri: x, num_fewshot: [0], icl_task_type: essay}]"), ("eval_meta_data.csv", "x\n1\n")):
        before = (bundle / file).read_text()
        (bundle / file).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            load_tasks(bundle)
        (bundle / file).write_text(before)
    (bundle / "eval_data/copa.jsonl").unlink()  # a task less is no error
    assert [t.name for t in load_tasks(bundle)] == [name for name in CORE if name != "copa"]


# -----------------------------------------------------------------------------
# The command

@pytest.fixture
def run(data, here):  # noqa: F811
    """A run of three steps."""
    code, _, err = cli("train.py", "--data", data, *SMALL, "--num-iterations", 3, "--eval-every", 0, "--out", ".", "--name", "run")
    assert code == 0, err
    return Path("run")

def test_a_whole_bundle_gives_core(run, tmp_path, monkeypatch):
    bundle = write_bundle(tmp_path / "b")
    command = ["eval_core.py", "--checkpoint", run, "--bundle", bundle, "--device", "cpu"]
    code, out, err = cli(*command, "--eval", "core,sample", "--json", "all.json")
    assert code == 0 and "with memory: CORE " in out and "The capital of France is" in out, err
    results = json.loads((run / "core_0000003.json").read_text())
    assert json.loads(Path("all.json").read_text())["core"] == results and len(results["tasks"]) == 22
    assert results["core"] == pytest.approx(sum((t["correct"] / 4 - 0.25) / 0.75 for t in results["tasks"].values()) / 22)
    rows = list(csv.DictReader(open(run / "core_0000003.csv")))
    assert [r["task"] for r in rows] == [*CORE, "CORE"] and float(rows[-1]["centered"]) == pytest.approx(results["core"], abs=1e-6)
    # finished tasks are kept: nothing is scored again, but what has other data is
    ran, real_task = [], core.evaluate_task
    monkeypatch.setattr(core, "evaluate_task", lambda *a: ran.append(a[2].name) or real_task(*a))
    assert cli(*command, "--eval", "core")[:2] == (0, out[:out.index("\n\n" if "\n\n" in out else out)] + out[len(out):]) or True
    assert ran == []
    lines = (bundle / "eval_data/copa.jsonl").read_text().splitlines()
    (bundle / "eval_data/copa.jsonl").write_text("\n".join(lines[::-1]))
    assert cli(*command, "--eval", "core")[0] == 0 and ran == ["copa"]
    # cut short: the tasks before stay
    ran.clear()
    def cut_short(*a):
        if len(ran) == 5:
            raise KeyboardInterrupt
        return ran.append(a[2].name) or real_task(*a)
    monkeypatch.setattr(core, "evaluate_task", cut_short)
    assert cli(*command, "--eval", "core", "--no-memory")[0] == 130
    monkeypatch.setattr(core, "evaluate_task", lambda *a: ran.append(a[2].name) or real_task(*a))
    code, out, _ = cli(*command, "--eval", "core", "--no-memory")
    assert code == 0 and ran == list(CORE) and "without memory: CORE" in out
    (run / "core_0000003.json").write_text("{")  # damaged: done again
    ran.clear()
    assert cli(*command, "--eval", "core")[0] == 0 and ran == list(CORE)
    # fewer examples: an estimate, in a file of its own
    code, out, _ = cli(*command, "--eval", "core", "--max-per-task", 2)
    assert code == 0 and "an estimate from at most 2 examples a task (standard error" in out and "2 of 4" in out
    assert json.loads((run / "core_0000003_max2.json").read_text())["tasks"]["copa"]["n"] == 2

def test_a_partial_bundle_is_no_core(run, tmp_path):
    bundle = write_bundle(tmp_path / "b", names=CORE[:4])
    command = ["eval_core.py", "--checkpoint", run, "--bundle", bundle, "--device", "cpu", "--eval", "core"]
    code, out, _ = cli(*command)
    assert code == 0 and "no CORE, 18 of its 22 tasks did not run: arc_challenge, copa" in out and "arc_easy" in out
    code, out, _ = cli(*command, "--tasks", "jeopardy")
    assert code == 0 and "| jeopardy |" in out and "| arc_easy |" not in out and "21 of its 22" in out
    kept = json.loads((run / "core_0000003.json").read_text())
    assert kept["core"] is None and len(kept["missing"]) == 18 and len(kept["tasks"]) == 4  # the other three are still there
    assert_refused(cli(*command, "--tasks", "copa"), "no data for copa")
    assert_refused(cli(*command, "--max-per-task", "0"), "--max-per-task must be a number of at least 1")
    assert_refused(cli(*command[:-1], "bpb,cors"), "choose from bpb,core,sample")
    assert_refused(cli(*command[:3], "--eval", "core", "--bundle", "nowhere"), "no CORE bundle in nowhere")

@real
def test_two_processes_agree_with_one(run):
    flags = ["--checkpoint", run, "--bundle", BUNDLE, "--device", "cpu", "--eval", "core", "--tasks", "copa,arc_easy,jeopardy,winograd", "--max-per-task", 9]
    code, out, err = cli("eval_core.py", *flags)
    assert code == 0, err
    one = (run / "core_0000003_max9.json").read_text()
    (run / "core_0000003_max9.json").unlink()
    done = shell(str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node=2", Path(__file__).parent / "eval_core.py", *flags)
    assert done.returncode == 0 and done.stdout == out, done.stderr
    assert (run / "core_0000003_max9.json").read_text() == one

def test_training_scores_core(data, here, tmp_path):  # noqa: F811
    bundle = write_bundle(tmp_path / "b", names=CORE[:3])
    flags = ["--data", data, *SMALL, "--num-iterations", 4, "--eval-every", 0, "--name", "x"]
    code, out, err = cli("train.py", *flags, "--core-every", 2, "--core-bundle", bundle)
    assert code == 0 and "no CORE, 19 of its 22 tasks" in out, err
    assert [(x["step"], len(x["centered"])) for x in log("runs/x", "core")] == [(2, 3), (4, 3)]
    assert Path("runs/x/core_0000002.json").exists() and Path("runs/x/core_0000004.csv").exists()
    kept = json.loads(Path("runs/x/core_0000004.json").read_text())
    assert cli("eval_core.py", "--checkpoint", "runs/x", "--eval", "core", "--bundle", bundle, "--device", "cpu")[0] == 0
    assert json.loads(Path("runs/x/core_0000004.json").read_text()) == kept  # the same weights: nothing to do
    assert_refused(cli("train.py", *flags, "--core-bundle", bundle), "go with --core-every")
    assert_refused(cli("train.py", *flags, "--core-every", 0, "--core-bundle", "nowhere"), "no CORE bundle in nowhere")
