"""State tracking: its targets, decoding against training's passes, and the command as a user runs it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import states
from interleave import Schedule
from model import GPT
from test_cli import assert_refused, cli

TINY = ["--max-seq-len", 4, "--width", 32, "--batch-size", 8, "--num-iterations", 3, "--score-rows", 16, "--device", "cpu"]


def draw(task, B=50, T=20, seed=0):
    return task.batch(B, T, torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("name", states.TASKS)
def test_targets_are_products_of_permutations(name):
    task = states.Task(name)
    n = len(task.elements[0])
    assert sorted(task.elements) == sorted(itertools.permutations(range(n))) and task.elements[0] == tuple(range(n))
    idx, targets = draw(task)
    for row, target in zip(idx.tolist(), targets.tolist()):
        where = list(range(n))  # where each of n things is, moved one token after the other
        for token, state in zip(row, target):
            assert task.elements[token] in states.TASKS[name]
            where = [task.elements[token][i] for i in where]
            assert task.elements[state] == tuple(where)
    reached, edge = set(), {0}  # the tokens generate the whole group
    while edge:
        reached |= edge
        edge = set(task.table[list(edge)][:, task.tokens].flatten().tolist()) - reached
    assert len(reached) == len(task.elements)

def test_parity_is_the_sum_of_bits_and_s5_does_not_commute():
    idx, targets = draw(states.Task("parity"))
    assert torch.equal(targets, idx.cumsum(1) % 2)
    s5 = states.Task("s5")
    assert not torch.equal(s5.table[s5.tokens[0], s5.tokens[1]], s5.table[s5.tokens[1], s5.tokens[0]])
    i = torch.arange(120)
    assert torch.equal(s5.table[s5.table[i[:, None, None], i[None, :, None]], i], s5.table[i[:, None, None], s5.table[i[:, None], i]])

def test_same_seed_same_sequences_and_targets_are_causal():
    task = states.Task("s5")
    idx, targets = draw(task)
    assert all(torch.equal(a, b) for a, b in zip(draw(task), (idx, targets)))
    assert not torch.equal(draw(task, seed=1)[0], idx)
    generator = torch.Generator().manual_seed(0)
    first, second = task.batch(50, 20, generator)[0], task.batch(50, 20, generator)[0]
    assert torch.equal(first, idx) and not torch.equal(second, idx)
    prefix = [states.Task("s5").table.new_zeros(50)]
    for t in range(20):  # each target follows from the one before and its own token
        prefix.append(task.table[prefix[-1], idx[:, t]])
    assert torch.equal(torch.stack(prefix[1:], 1), targets)

@pytest.mark.parametrize("options", [dict(), dict(lrt="layerwise"), dict(arch="recurrent")], ids=str)
def test_decoding_is_what_sequential_training_answers(options):
    torch.manual_seed(0)
    model = GPT(states.Config(sequence_len=24, vocab_size=6, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, span=3, **options)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 4)
    idx, _ = draw(states.Task("s3"), 8, 24)
    kind = "sequential" if model.config.lrt != "none" else "plain"
    assert torch.equal(states.decode(model, idx), states.parallel(model, idx, Schedule(kind).passes(24)))
    if kind == "plain" and model.config.arch == "gpt":  # two layers that look 3 back: nothing that is further away matters
        other = idx.clone()
        other[:, :10] = 5 - other[:, :10]
        assert torch.equal(states.decode(model, idx)[:, 16:], states.decode(model, other)[:, 16:])
        assert not torch.equal(states.decode(model, idx)[:, :16], states.decode(model, other)[:, :16])

def test_accuracy_counts_last_positions_and_whole_sequences():
    right = torch.ones(4, 16, dtype=torch.bool)
    right[0, 0] = right[1, 3] = right[2, 15] = False
    assert states.accuracy(right, 2) == dict(last={2: 1.0, 4: 0.75, 8: 1.0, 16: 0.75}, whole={2: 0.75, 4: 0.5, 8: 0.5, 16: 0.25})
    assert states.accuracy(right[:, :2], 2) == dict(last={2: 1.0}, whole={2: 0.75})

def test_two_commands_share_a_file_and_a_row_is_written_once(here):
    def start(seed):
        command = [sys.executable, Path(states.__file__), "--task", "s3", "--lrt", "shared", *TINY, "--seed", seed, "--json", "rows.jsonl"]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    both = [start(0), start(1)]
    done = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    rows = sorted(map(json.loads, open("rows.jsonl")), key=lambda row: row["seed"])
    assert [row["seed"] for row in rows] == [0, 1] and rows[0]["loss"] != rows[1]["loss"]
    row = rows[0]
    assert row["name"] == "s3_shared_interleaved2" and row["steps"] == 3 and row["tokens"] == 96 and row["compute"] == 192
    assert set(row["decode"]["last"]) == {"4", "8", "16", "32"} and len(row["by_position"]) == 32
    assert "| decode, last |" in done[0][0] and "192 of baseline-equivalent compute" in done[0][0]
    assert set(row["no_memory"]["whole"]) == set(row["decode"]["whole"]) and set(row["trained"]["last"]) == {"4"}
    before = open("rows.jsonl").read()
    code, out, _ = cli(*row["command"].split()[1:])  # as printed: nothing to do
    assert code == 0 and "nothing to do" in out and open("rows.jsonl").read() == before
    os.truncate("rows.jsonl", len(before) - 20)  # cut short by a crash: that row is run again, and its stump stays alone
    code, _, err = cli(*json.loads(before.splitlines()[1])["command"].split()[1:])
    assert code == 0, err
    *_, stump, again = open("rows.jsonl").read().splitlines()
    assert before.splitlines()[1].startswith(stump) and json.loads(again)["loss"] == json.loads(before.splitlines()[1])["loss"]  # the same seed, bit for bit

@pytest.mark.parametrize("flags, words", [
    (["--task", "s7"], ["s7", "parity"]), (["--num-iterations", 0], ["--num-iterations", "at least 1"]), (["--matrix-lr", "nan"], ["--matrix-lr"]),
    (["--arch", "recurrent", "--lrt", "shared"], ["one recurrence at a time"]), (["--lrt", "shared", "--schedule", "chunked", "--chunk", 4], ["--chunk 4"]),
    (["--json", "no/such/rows.jsonl"], ["no folder no/such"]), (["--json", "."], ["."]), (["--device", "tpu"], ["tpu"]), (["--window", 0], ["--window"]),
    (["--matrix-lr", 1e30, "--num-iterations", 50, "--json", "rows.jsonl"], ["loss is nan", "lower --matrix-lr"])], ids=lambda x: "_".join(map(str, x)))
def test_bad_flags_are_one_line(here, flags, words):
    assert_refused(cli("states.py", *TINY, *flags), *words)
    assert not list(here.iterdir())
