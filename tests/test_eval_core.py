"""Bits per byte, the command eval_core.py, and what it refuses. CORE is tested in test_core.py."""

import gzip
import importlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, cli

from common import UserError
from conftest import MODULES
from dataset import first_rows, load_tokenizer, open_data, token_bytes
from eval_core import PROMPTS, describe_learned, evaluate_bpb, learned, sample_prompts, text_rows
from interleave import Schedule
from model import GPT, GPTConfig
from sample import encode_prompts


def test_eval_core(trained, here):
    folder, _ = trained
    code, out, err = cli("eval_core.py", "--checkpoint", folder / "runs/d2_shared", "--rows", 8,
                         "--decode-rows", 4, "--referee", "--json", "bpb.json")
    assert code == 0, err
    assert "positions" in out
    assert "16 .. 31" in out
    results = json.loads((here / "bpb.json").read_text())
    for split in ("train", "val"):
        bpb = results[split]["bpb"]
        decoded = results[split]["decode_bpb"]
        assert set(bpb) == {"pass 0", "pass 1", "pass 2", "merged"}
        assert set(decoded) == set(bpb) | {"decode", "no memory", "token by token"}
        assert decoded["decode"] == pytest.approx(decoded["token by token"], rel=1e-5)
        # both have memory zero everywhere
        assert decoded["no memory"] == pytest.approx(decoded["pass 0"], rel=1e-5)
        bits = np.array(results[split]["by_position"]["decode"])
        n_bytes = np.array(results[split]["by_position"]["bytes"])
        assert len(bits) == 32
        assert bits.sum() / n_bytes.sum() == pytest.approx(decoded["decode"], abs=1e-4)

def test_stability_ends_where_decoding_is(trained, here):
    """After as many passes as a row has tokens at the latest; the first pass has no memory."""
    folder, _ = trained
    run = folder / "runs/d2_shared"
    code, out, err = cli("eval_core.py", "--checkpoint", run, "--eval", "bpb,stability", "--split", "val",
                         "--decode-rows", 4, "--batch-size", 3, "--passes", 32, "--json", "out.json")
    assert code == 0, err
    assert "memory moved" in out
    results = json.loads((here / "out.json").read_text())
    found, decoded = results["stability"], results["val"]["decode_bpb"]
    assert len(found["bpb"]) == len(found["moved"]) == 32
    assert found["bpb"][0] == pytest.approx(decoded["pass 0"], rel=1e-6)
    assert found["bpb"][-1] == pytest.approx(decoded["decode"], rel=1e-5)
    assert found["decode"] == pytest.approx(decoded["decode"], rel=1e-6)
    assert found["moved"][0] is None
    assert found["moved"][1] > 0.05 and found["moved"][-1] < 1e-5

    code, out, err = cli("research.plot", "--stability", "out.json", "out.json")
    assert code == 0, err
    assert (here / "stability.png").stat().st_size > 5000

def test_stability_is_refused_without_recurrence(data, here):
    flags = "--lrt none --depth 1 --aspect-ratio 16 --head-dim 16 --max-seq-len 32 --total-batch-size 64"
    brief = "--num-iterations 1 --eval-tokens 64 --decode-tokens 0"
    assert cli("train.py", "--data", data, *flags.split(), *brief.split())[0] == 0
    assert_refused(cli("eval_core.py", "--eval", "stability"), "no recurrence", "leave stability out")
    assert_refused(cli("eval_core.py", "--eval", "stability", "--passes", 1), "--passes must be")

def test_bpb_is_nats_over_bytes():
    """A model that knows nothing: ln(V) nats a token; BOS targets do not count."""
    config = dict(sequence_len=8, vocab_size=16, n_layer=1, n_head=1, n_kv_head=1, n_embd=8, lrt="shared")
    model = GPT(GPTConfig(**config))
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = torch.randint(0, 16, (5, 9))
    n_bytes = torch.arange(16) % 4  # tokens 0, 4, 8, 12 have none
    bytes_of_targets = n_bytes[rows[:, 1:]]
    expected = 4 * (bytes_of_targets > 0).sum() / bytes_of_targets.sum()  # log2(16) bits each
    for batch_size in (1, 2, 5):
        bpb, _ = evaluate_bpb(model, rows, n_bytes, Schedule(), batch_size, decode=True, token_by_token=True)
        for name in ("merged", "decode", "token by token"):
            assert bpb[name] == pytest.approx(expected.item(), rel=1e-6)

def test_text_is_cut_into_rows_as_training_data_is(data, here):
    """The validation document of `data`, read as any text, gives the rows of the validation shard."""
    opened = open_data(data)
    last = importlib.import_module(MODULES[-1]).__file__  # the 20th of 30 documents
    text = Path(last).read_text("utf-8")
    T = 32
    for name, content in (("a.txt", text), ("a.jsonl", json.dumps({"body": text}))):
        Path(name).write_text(content, "utf-8")
        rows, n_targets = text_rows(opened.tokenizer, [Path(name)], "body", T)
        of_shard = first_rows(opened.val, T, math.inf)
        assert len(rows) == len(of_shard) + 1  # the shard's last tokens are no whole row
        assert torch.equal(rows[:-1], of_shard)
        # every byte of the text is a target's, the padding has none
        targets = rows[:, 1:].flatten()
        n_bytes = token_bytes(opened.tokenizer)[targets.numpy()]
        assert n_bytes.sum() == len(text.encode())
        assert n_bytes[n_targets:].sum() == 0

@pytest.mark.parametrize("documents", [["x"], ["two documents", "of which both count: \u00e4\u00f6\u00fc"]])
def test_bpb_of_any_text(trained, here, documents):
    """All bytes count once, however short the text; gzip and several files are one text."""
    folder, _ = trained
    with gzip.open("text.jsonl.gz", "wt", encoding="utf-8") as f:
        for document in documents:
            f.write(json.dumps({"text": document}) + "\n\n" + json.dumps({"text": " "}) + "\n")
    Path("more.txt").write_text("x")
    code, out, err = cli("eval_core.py", "--checkpoint", folder / "runs/d2_shared", "--text", "text.jsonl.gz",
                         "more.txt", "--referee", "--json", "bpb.json")
    assert code == 0, err
    found = json.loads((here / "bpb.json").read_text())["text"]
    assert found["bytes"] == sum(len(document.encode()) for document in documents) + 1
    assert f"{found['bytes']} bytes" in out
    assert {"merged", "decode", "no memory"} <= set(found["bpb"])
    assert all(math.isfinite(x) for x in found["bpb"].values())
    assert found["bpb"]["decode"] == pytest.approx(found["bpb"]["token by token"], rel=1e-5)

def test_no_text(trained, here):
    checkpoint = "--checkpoint", trained[0] / "runs/d2_shared"
    Path("blank.txt").write_text(" \n")
    assert_refused(cli("eval_core.py", *checkpoint, "--text", "blank.txt"), "blank.txt", "blank")
    assert_refused(cli("eval_core.py", *checkpoint, "--text", "nowhere.txt"), "nowhere.txt")
    Path("bad.txt").write_bytes(b"\xff\xfe")
    assert_refused(cli("eval_core.py", *checkpoint, "--text", "bad.txt"), "bad.txt is not UTF-8")

def test_what_was_learned_in_two_lines():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=16, n_layer=2, n_head=1, n_kv_head=1, n_embd=8,
                          lrt="shared", value_embeds="alternate"))
    lines = describe_learned(learned(model, torch.zeros(1, 8, dtype=torch.int64)))
    assert lines == [
        "learned, by layer: a 1.00 1.00, b 0.10 0.10, c 0.10 0.10",
        "mean gates: local 1.00 1.00, memory 1.00 1.00, token 1.00",
    ]
    plain = GPT(GPTConfig(sequence_len=8, vocab_size=16, n_layer=2, n_head=1, n_kv_head=1, n_embd=8,
                          value_embeds="none"))
    lines = describe_learned(learned(plain, torch.zeros(1, 8, dtype=torch.int64)))
    assert lines == ["learned, by layer: a 1.00 1.00, b 0.10 0.10"]

def test_what_cannot_work_is_said_before_the_work(trained, here):
    result = cli("eval_core.py", "--checkpoint", trained[0] / "runs/d2_shared", "--eval", "bpb,core",
                 "--bundle", "nowhere")
    assert_refused(result, "no CORE bundle in nowhere")
    assert "in parallel" not in result[1]

@pytest.mark.parametrize("flags, words", [
    ("--text a.txt --rows 3", "--rows goes with bpb of --data, not with bpb of --text"),
    ("--text a.txt --split val", "--split goes with"),
    ("--text a.txt --decode-rows 0", "--decode-rows goes with"),
    ("--text a.txt --data data", "--data goes with"),
    ("--text a.txt --eval sample", "--text goes with"),
    ("--text-key body", "--text-key goes with bpb of --text, tokens"),
    ("--html x.html", "--html goes with tokens"),
    ("--against runs/x", "--against goes with tokens"),
    ("--eval stability --rows 3", "--rows goes with"),
    ("--passes 3", "--passes goes with stability"),
    ("--max-per-task 3", "--max-per-task goes with core"),
    ("--bundle x --eval sample", "--bundle goes with core, not with sample"),
    ("--no-memory", "--no-memory goes with core, sample"),
    ("--referee --decode-rows 0", "--referee is of the rows of --decode-rows"),
    ("--eval stability --passes 100000000000", "--passes must be at most 10000"),
])
def test_a_flag_that_nothing_reads_is_refused(flags, words, here):
    Path("a.txt").write_text("text")
    assert_refused(cli("eval_core.py", *flags.split()), words)

def test_an_output_replaces_nothing_that_is_read(trained, here):
    run = Path(shutil.copytree(trained[0] / "runs/d2_shared", "run"))
    bundle = Path("bundle/eval_data")
    bundle.mkdir(parents=True)
    for path in (Path("a.txt"), bundle / "x.jsonl"):
        path.write_text("keep")
    checkpoint = run / "ckpt_0000150.pt"
    before = checkpoint.read_bytes()
    os.link(checkpoint, "mine.pt")
    for flags in (["--json", checkpoint], ["--json", "run/log.jsonl"], ["--text", "a.txt", "--json", "a.txt"],
                  ["--eval", "tokens", "--text", "a.txt", "--html", "a.txt"],
                  ["--eval", "tokens", "--text", "a.txt", "--html", "x", "--json", "x"],
                  ["--eval", "core", "--bundle", "bundle", "--json", bundle / "x.jsonl"],
                  ["--checkpoint", "mine.pt", "--json", "mine.pt"]):
        assert_refused(cli("eval_core.py", "--checkpoint", "run", *flags), "would replace")
    assert checkpoint.read_bytes() == before
    assert Path("a.txt").read_text() == (bundle / "x.jsonl").read_text() == "keep"

def test_losses_that_overflow_are_no_result(trained, here):
    path = Path(shutil.copytree(trained[0] / "runs/d2_shared", "run")) / "ckpt_0000150.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["query_scale"] = 1e300
    torch.save(checkpoint, path)
    Path("a.txt").write_text("some text")
    for flags in (["--split", "val", "--rows", 2, "--decode-rows", 0], ["--text", "a.txt"],
                  ["--eval", "stability", "--decode-rows", 1, "--passes", 2]):
        assert_refused(cli("eval_core.py", "--checkpoint", "run", *flags, "--json", "x.json"), "not finite")
    assert not Path("x.json").exists()

def test_a_run_that_does_not_say_what_it_was_trained_on(trained, here):
    path = Path(shutil.copytree(trained[0] / "runs/d2_shared", "run")) / "ckpt_0000150.pt"
    torch.save(torch.load(path, weights_only=True) | dict(args={}), path)
    assert_refused(cli("eval_core.py", "--checkpoint", "run"), "name some with --data")

def test_samples_need_a_context(trained):
    """Of all the prompts, which a user has not written and cannot shorten."""
    tokenizer = load_tokenizer(trained[0] / "runs/d2_shared")
    needed = max(map(len, encode_prompts(tokenizer, PROMPTS, math.inf)))
    assert needed > 16
    with pytest.raises(UserError, match=f"up to {needed} tokens, the context of this model is {needed - 1}"):
        sample_prompts(tokenizer, needed - 1)
    assert len(sample_prompts(tokenizer, needed)) == len(PROMPTS)

def test_bad_flags(here):
    assert_refused(cli("eval_core.py", "--rows", "0"), "--rows must be a number of at least 1")
    assert_refused(cli("eval_core.py", "--json", "nowhere/x.json"), "there is no folder nowhere")
