"""State tracking: its targets, decoding against the passes of training, and the command as a user runs it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_refused, cli

from common import read_rows
from interleave import Schedule
from recurrent import build_model
from research import states

SMALLEST = ["--max-seq-len", 4, "--width", 32, "--batch-size", 8, "--num-iterations", 3, "--score-rows", 16,
            "--device", "cpu"]


# -----------------------------------------------------------------------------
# The task

def draw(task, B=50, T=20, seed=0):
    return task.batch(B, T, torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("name", states.TASKS)
def test_targets_are_products_of_permutations(name):
    task = states.Task(name)
    n = len(task.elements[0])
    assert sorted(task.elements) == sorted(itertools.permutations(range(n)))
    assert task.elements[0] == tuple(range(n))
    idx, targets = draw(task)
    for row, target in zip(idx.tolist(), targets.tolist()):
        where = list(range(n))  # where each of n things is, moved one token after the other
        for token, state in zip(row, target):
            assert task.elements[token] in states.TASKS[name]
            where = [task.elements[token][i] for i in where]
            assert task.elements[state] == tuple(where)

@pytest.mark.parametrize("name", states.TASKS)
def test_the_tokens_generate_the_whole_group(name):
    task = states.Task(name)
    reached, edge = set(), {0}
    while edge:
        reached |= edge
        products = task.table[list(edge)][:, task.tokens]
        edge = set(products.flatten().tolist()) - reached
    assert len(reached) == len(task.elements)

def test_parity_is_the_sum_of_bits():
    idx, targets = draw(states.Task("parity"))
    assert torch.equal(targets, idx.cumsum(1) % 2)

def test_s5_is_associative_and_does_not_commute():
    s5 = states.Task("s5")
    swap, cycle = s5.tokens
    assert not torch.equal(s5.table[swap, cycle], s5.table[cycle, swap])
    i = torch.arange(120)
    left_first = s5.table[s5.table[i[:, None, None], i[None, :, None]], i]
    right_first = s5.table[i[:, None, None], s5.table[i[:, None], i]]
    assert torch.equal(left_first, right_first)

def test_same_seed_same_sequences():
    task = states.Task("s5")
    idx, targets = draw(task)
    same_idx, same_targets = draw(task)
    assert torch.equal(same_idx, idx)
    assert torch.equal(same_targets, targets)
    assert not torch.equal(draw(task, seed=1)[0], idx)
    generator = torch.Generator().manual_seed(0)
    first, second = task.batch(50, 20, generator)[0], task.batch(50, 20, generator)[0]
    assert torch.equal(first, idx)
    assert not torch.equal(second, idx)

def test_each_target_follows_from_the_one_before_and_its_own_token():
    task = states.Task("s5")
    idx, targets = draw(task)
    state = torch.zeros(50, dtype=torch.int64)
    for t in range(20):
        state = task.table[state, idx[:, t]]
        assert torch.equal(targets[:, t], state)


# -----------------------------------------------------------------------------
# Decoding and scoring

def random_model(config_class, **options):
    """In float64, with a window of 3 in both layers."""
    torch.manual_seed(0)
    config = config_class(
        sequence_len=24, vocab_size=6, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, span=3, **options)
    model = build_model(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 4)
    return model

@pytest.mark.parametrize("config_class, options, kind", [
    (states.StateConfig, dict(), "plain"),
    (states.StateConfig, dict(lrt="layerwise"), "sequential"),
    (states.RecurrentStateConfig, dict(), "plain"),
], ids=["none", "layerwise", "recurrent"])
def test_decoding_is_what_sequential_training_answers(config_class, options, kind):
    model = random_model(config_class, **options)
    idx, _ = draw(states.Task("s3"), 8, 24)
    trained = states.answer_in_passes(model, idx, Schedule(kind).passes(24))
    assert torch.equal(states.decode(model, idx), trained)

def test_two_layers_that_look_3_back_see_nothing_further_away():
    model = random_model(states.StateConfig)
    idx, _ = draw(states.Task("s3"), 8, 24)
    other = idx.clone()
    other[:, :10] = 5 - other[:, :10]
    answers, other_answers = states.decode(model, idx), states.decode(model, other)
    assert torch.equal(answers[:, 16:], other_answers[:, 16:])
    assert not torch.equal(answers[:, :16], other_answers[:, :16])

def test_accuracy_counts_last_positions_and_whole_sequences():
    right = torch.ones(4, 16, dtype=torch.bool)
    right[0, 0] = right[1, 3] = right[2, 15] = False
    assert states.accuracy(right, 2) == dict(
        last={2: 1.0, 4: 0.75, 8: 1.0, 16: 0.75}, whole={2: 0.75, 4: 0.5, 8: 0.5, 16: 0.25})
    assert states.accuracy(right[:, :2], 2) == dict(last={2: 1.0}, whole={2: 0.75})


# -----------------------------------------------------------------------------
# The command

def start(seed):
    command = [sys.executable, "-m", "research.states", "--task", "s3", "--lrt", "shared", *SMALLEST,
               "--seed", seed, "--json", "rows.jsonl"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

def repeat(row):
    """Run the command of a row again: (exit code, stdout, stderr)."""
    python, m, script, *flags = row["command"].split()
    assert (python, m, script) == ("python", "-m", "research.states")
    return cli(script, *flags)

def test_two_commands_share_a_file_and_a_row_is_written_once(here):
    both = [start(0), start(1)]
    done = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], done
    out = done[0][0]
    assert "| decode, last |" in out
    assert "192 of baseline-equivalent compute" in out

    rows = sorted(read_rows("rows.jsonl"), key=lambda row: row["seed"])
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["loss"] != rows[1]["loss"]
    row = rows[0]
    assert row["name"] == "s3_shared_interleaved2_4_tokens"
    assert (row["steps"], row["tokens"], row["compute"]) == (3, 96, 192)
    assert set(row["decode"]["last"]) == {"4", "8", "16", "32"}
    assert len(row["by_position"]) == 32
    assert set(row["no_memory"]["whole"]) == set(row["decode"]["whole"])
    assert set(row["trained"]["last"]) == {"4"}

    # the same command again: nothing to do
    before = Path("rows.jsonl").read_text()
    code, out, _ = repeat(row)
    assert code == 0
    assert "nothing to do" in out
    assert Path("rows.jsonl").read_text() == before

    # a row that a crash cut short: its run is done again, bit for bit, and its stump stays a line of its own
    cut_line = before.splitlines()[1]
    os.truncate("rows.jsonl", len(before) - 20)
    code, _, err = repeat(json.loads(cut_line))
    assert code == 0, err
    *_, stump, again = Path("rows.jsonl").read_text().splitlines()
    assert cut_line.startswith(stump)
    assert json.loads(again)["loss"] == json.loads(cut_line)["loss"]

def test_runs_of_old_rows_are_not_run_again(monkeypatch):
    """Rows from when the script was states.py and every configuration had an `arch`."""
    rows = read_rows(ROOT / "research/results/states.jsonl")
    assert len(rows) >= 32
    for row in rows:
        script, *flags = row["command"].split()[1:]
        if script == "states.py":
            flags = flags[:flags.index("--json")]
            monkeypatch.setattr(sys, "argv", [script, *flags])
            args = states.parse_args()
            schedule = states.make_schedule(args)
            config = states.make_config(args, len(states.Task(args.task).elements))
            assert states.is_row_of(row, states.run_config(args, config, schedule))
            assert states.run_name(args, schedule) == row["name"]

@pytest.mark.parametrize("flags, words", [
    ("--task s7", ["s7", "parity"]),
    ("--num-iterations 0", ["--num-iterations", "at least 1"]),
    ("--matrix-lr nan", ["--matrix-lr"]),
    ("--arch recurrent --lrt shared", ["one recurrence at a time"]),
    ("--lrt shared --schedule chunked --chunk 4", ["--chunk 4"]),
    ("--json no/such/rows.jsonl", ["no folder no/such"]),
    ("--json .", ["."]),
    ("--device tpu", ["tpu"]),
    ("--window 0", ["--window"]),
    ("--matrix-lr 1e30 --num-iterations 50 --json rows.jsonl", ["loss is nan", "lower --matrix-lr"]),
])
def test_bad_flags_are_one_line(here, flags, words):
    assert_refused(cli("research.states", *SMALLEST, *flags.split()), *words)
    assert not list(here.iterdir())
