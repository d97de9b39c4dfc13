"""bench.py: every command on tiny sizes, and that it runs the step whose FLOPs it counts."""

import json
from argparse import Namespace

import pytest
import torch
from helpers import assert_refused, cli
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import Variant


def run_bench(*flags):
    """The rows that a command writes to --json."""
    code, _, err = cli("bench.py", *flags, "--repeats", 2, "--json", "bench.json")
    assert code == 0, err
    with open("bench.json") as f:
        result = json.load(f)
    assert {"device", "commit", "date"} <= set(result)
    return result["rows"]

def test_decode(here):
    rows = run_bench("decode", "--depth", 2, "--width", 64, "--vocab-size", 64, "--context", 8, 12,
                     "--batch", 1, 2, "--tokens", 1)
    assert len(rows) == 16
    assert [row["model"] for row in rows[:4]] == ["none", "shared", "layerwise", "recurrent"]
    assert all(row["ms_per_token"] > 0 for row in rows)

def test_prefill(trained, here):
    row, = run_bench("prefill", "--checkpoint", trained[0] / "runs/d2_shared")
    assert row["error"] < 1e-4
    assert row["T"] == 32

def test_step(here):
    rows = run_bench("step", "--depth", 3, "--width", 64, "--vocab-size", 64, "--context", 16, "--batch", 2,
                     "--subsets", 2, "--window-pattern", "SL")
    assert [(row["lrt"], row["S"], row["checkpointing"], row["kind"]) for row in rows] == [
        ("none", 0, False, "interleaved"),
        ("shared", 2, False, "interleaved"),
        ("layerwise", 2, False, "interleaved"),
        ("shared", 2, True, "interleaved"),
        ("shared", 1, False, "draft"),
    ]
    assert all(row["peak_MiB"] > 0 for row in rows)
    none, *others, draft = [row["TFLOP"] for row in rows]
    assert all(1.9 < flops / none < 2.5 for flops in others)
    assert 1.1 < draft / none < 1.5

def test_muon(here):
    rows = run_bench("muon", "--depth", 1, "--width", 16)
    assert [row["muon"] for row in rows] == ["torch's", "ours, bfloat16", "ours, float32"]
    assert all(row["ms"] > 0 for row in rows)

def test_recurrent(here):
    rows = run_bench("recurrent", "--context", 8, 16, "--width", 16, "--reference-up-to", 8)
    assert [(row["T"], row["form"], row["keys_read"]) for row in rows] == [
        (8, "plain", None),
        (8, "tiled", 64),
        (8, "reference", 28),
        (16, "plain", None),
        (16, "tiled", 256),
    ]

def test_the_step_that_is_counted_is_run():
    """
    By PyTorch's own count, which leaves out attention on a CPU, variants are to the baseline as by ours.
    """
    args = Namespace(
        width=64, context=16, depth=3, vocab_size=512, window_pattern="L", batch=16, compile=False)
    variants = [
        Variant("none", 1),
        Variant("shared", 2),
        Variant("layerwise", 4),
        Variant("shared", 2, kind="draft"),
        Variant("layerwise", 1, kind="draft"),
    ]
    ratios = []
    for variant in variants:
        compute_gradients, _, flops = bench.training_step(args, torch.device("cpu"), variant)
        with FlopCounterMode(display=False) as counted:
            compute_gradients()
        ratios.append(counted.get_total_flops() / flops)
    assert ratios == pytest.approx([ratios[0]] * 5, rel=0.02)
    assert 0.9 < ratios[0] <= 1

@pytest.mark.parametrize("flags, words", [
    ("decode --repeats 1", ["--repeats must be at least 2, not 1"]),
    ("step --vocab-size 0", ["--vocab-size must be at least 1, not 0"]),
    ("step --subsets 2 0", ["--subsets must be at least 1, not 0"]),
    ("recurrent --json no/such/file", ["no folder no/such"]),
])
def test_bad_flags(flags, words, here):
    assert_refused(cli("bench.py", *flags.split()), *words)
