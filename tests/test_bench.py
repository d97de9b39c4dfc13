"""bench.py: every command on tiny sizes, and that it runs the step whose FLOPs it counts."""

import json
import math
from argparse import Namespace

import pytest
import torch
from helpers import assert_refused, cli, shell
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import Variant
from model import HAS_ONEDNN


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

def test_save(here):
    rows = run_bench("save", "--depth", 1, "--width", 16, "--vocab-size", 64, "--context", 8)
    assert [row["copied"] for row in rows] == ["never", "before", "beside"]
    assert all(0 <= row["waited_ms"] < row["total_ms"] for row in rows)

def test_recurrent(here):
    rows = run_bench("recurrent", "--context", 8, 16, "--width", 16, "--reference-up-to", 8)
    assert [(row["T"], row["form"], row["keys_read"]) for row in rows] == [
        (8, "plain", None),
        (8, "tiled", 64),
        (8, "reference", 28),
        (16, "plain", None),
        (16, "tiled", 256),
    ]

PEER = """
import torch

class GPTConfig:
    def __init__(self, **fields):
        self.fields = fields

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.fields["n_embd"] == 32 and config.fields["sequence_len"] == 8
        self.wte = torch.nn.Embedding(config.fields["vocab_size"], config.fields["n_embd"])

    def init_weights(self):
        pass

    def setup_optimizer(self):
        return torch.optim.SGD(self.parameters())

    def forward(self, idx, targets):
        assert idx.shape == (2, 8)
        return LOSS
"""

def test_peers(here):
    """Stand-ins for the peers' code, which are no real rivals; one of them cannot be run."""
    for name, loss in (("works", "self.wte(idx).sum()"), ("broken", "self.no_such_thing")):
        (here / name / "nanochat").mkdir(parents=True)
        (here / name / "nanochat/gpt.py").write_text(PEER.replace("LOSS", loss))
    sizes = "--depth 1 --width 32 --vocab-size 16 --batch 2 --context 8 --repeats 2 --parts step".split()
    done = shell("bench.py", "peers", "--nanochat", here / "works", *sizes, "--json", here / "peers.json")
    assert done.returncode == 0, done.stderr
    ours, peer = json.loads((here / "peers.json").read_text())["rows"]
    assert [ours["contestant"], peer["contestant"]] == ["ours", "nanochat"]
    assert ours["over_ours"] == 1 and 0 < peer["over_ours"] < 1
    assert 0 < peer["gradients_ms"] + peer["update_ms"] < ours["gradients_ms"]

    refused = shell("bench.py", "peers", "--nanochat", here / "broken", *sizes)
    assert refused.returncode == 2 and refused.stderr.startswith(
        "error: nanochat, nanochat cannot be run: AttributeError: "), refused.stderr
    assert_refused(cli("research.peers", "--release", here), "is no checkout of a peer")
    assert_refused(cli("research.peers"), "give --nanochat or --release")

ENGINE = """
import torch

class KVCache:
    def __init__(self, batch, heads, length, d, n_layer, device, dtype):
        assert (batch, heads, length, d, n_layer) == (2, 1, 12, 32, 1)
        self.k_cache = self.v_cache = torch.zeros(1)
        self.cache_seqlens = torch.zeros(batch)

def sample_next_token(logits, rng, temperature):
    assert logits.shape == (2, 16) and temperature == 0
    return logits.argmax(-1, keepdim=True)
"""

def test_peers_decode(here):
    """A stand-in for nanochat, whose model does nothing: it decodes as many tokens as ours."""
    (here / "nanochat").mkdir()
    gpt = PEER.replace("== 8", "== 12").replace("targets)", "kv_cache)").replace("(2, 8)", "(2, 1)")
    (here / "nanochat/gpt.py").write_text(gpt.replace("LOSS", "torch.zeros(2, 1, 16)"))
    (here / "nanochat/engine.py").write_text(ENGINE)
    sizes = "--depth 1 --width 32 --vocab-size 16 --batch 2 --context 12 --repeats 2 --parts decode".split()
    done = shell("bench.py", "peers", "--nanochat", here, *sizes, "--json", here / "peers.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((here / "peers.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["ours, none", "ours, shared", "nanochat"]
    assert rows[0]["over_ours"] == 1 and rows[1]["over_ours"] > 0
    assert 0 < rows[2]["over_ours"] < 1
    assert_refused(cli("research.peers", "--nanochat", here, "--context", 8), "--context must be more than")

def onednn_flops(x_shape, weight_shape, *_, **options):
    """Of a product of oneDNN, which passes without a gradient use, and which PyTorch does not count."""
    return 2 * math.prod(x_shape) * weight_shape[0]

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
    uncounted = {torch.ops.mkldnn._linear_pointwise: onednn_flops} if HAS_ONEDNN else {}
    ratios = []
    for variant in variants:
        compute_gradients, _, flops = bench.training_step(args, torch.device("cpu"), variant)
        with FlopCounterMode(display=False, custom_mapping=uncounted) as counted:
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
