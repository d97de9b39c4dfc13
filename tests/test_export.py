"""
export.py: what transformers makes of an exported folder is what nanolrt makes of the run. Every variant of
the model has random weights, so that its memory matters.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_refused, cli
from test_recurrent import make_recurrent

import export
from attention import KVCache
from checkpointing import Log, save_checkpoint
from dataset import BOS, encode_text, load_tokenizer, tokenizer_sha256
from interleave import Schedule, decode_tokens
from model import NANOCHAT_BACKBONE
from prepare_data import train_tokenizer
from sample import generate
from test_model import make
from train import make_parser

CONTEXT = 48
CONTROL = dict(first_memory="embedding", memory="embedding")
VARIANTS = {
    "none": dict(lrt="none"),
    "control": CONTROL,
    "both": dict(lrt="shared", inject="both"),
    "kv": dict(lrt="shared", inject="kv", source_layer=0),
    "residual": dict(lrt="layerwise", inject="residual"),
    "layerwise": dict(lrt="layerwise", source_layer=2, first_memory="embedding"),
    "windows": dict(lrt="shared", window_pattern="SSL"),
    "nanochat": dict(lrt="shared", **NANOCHAT_BACKBONE | dict(gate_channels=6)),
    "nanochat control": dict(**CONTROL, **NANOCHAT_BACKBONE | dict(gate_channels=6)),
    "recurrent": None,
}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The library, without a network, and with folders of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TQDM_DISABLE", "1")
        pytest.importorskip("safetensors", reason="extras `export` are not installed")
        yield pytest.importorskip("transformers", reason="extras `export` are not installed")

def save_run(folder, model, data):
    """A run folder with this model as its only checkpoint, as train.py writes it."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.tiktoken", "tokenizer.json"):
        shutil.copy(data / name, folder)
    log = Log(folder, run_id="0123")
    log.add(kind="eval", step=20, bpb={"merged": 2.5, "decode": 2.25})
    flags = "--depth 3 --lrt shared --data /secret --total-batch-size 4096"
    save_checkpoint(
        folder / "ckpt_0000020.pt",
        model=model.state_dict(),
        optimizers=[],
        step=20,
        rows_seen=20,
        seconds=1.0,
        config=dataclasses.asdict(model.config),
        schedule=dataclasses.asdict(Schedule("plain")),
        args=vars(make_parser().parse_args(flags.split())),
        torch_rng=torch.get_rng_state(),
        tokenizer_sha256=tokenizer_sha256(folder),
        shards_sha256=[],
        run_id="0123",
    )
    return folder

def make_variant(name):
    if name == "recurrent":
        return make_recurrent(dtype=torch.float32, vocab_size=512, sequence_len=CONTEXT)
    return make(dtype=torch.float32, vocab_size=512, sequence_len=CONTEXT, **VARIANTS[name])

@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, data, transformers, tmp_path_factory):
    """Our model of a variant, its exported folder, and what transformers makes of that."""
    ours = make_variant(request.param)
    name = f"run_{request.param.replace(' ', '_')}"
    run = save_run(tmp_path_factory.mktemp("runs") / name, ours, data)
    out = tmp_path_factory.mktemp("exports") / name
    code, _, err = cli("export.py", run, out)
    assert code == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    return ours, out, theirs

def our_logits(model, idx):
    """Decoding token by token: (B, T, V)."""
    kv = KVCache(model.config, *idx.shape, idx.device, torch.float32)
    with torch.no_grad():
        return model.logits(decode_tokens(model, idx, kv))

def our_text(model, tokenizer, prompt, n):
    """The token ids of a greedy continuation by sample.py, without the BOS that ends it."""
    made = generate(model, tokenizer, [prompt], n, temperature=0)
    return [token for _, token, _ in made if token is not None]

def random_tokens(B, T, seed=0):
    return torch.randint(511, (B, T), generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# The model

def test_logits_are_those_of_decoding(exported):
    """Of whole texts, of texts with padding on either side, and where a text goes on from a cache."""
    ours, _, theirs = exported
    idx = random_tokens(2, CONTEXT)
    expected = our_logits(ours, idx)
    out = theirs(idx)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(expected[:, 1:], expected[:, :-1], atol=1e-2)
    torch.testing.assert_close(theirs(idx, logits_to_keep=3).logits, out.logits[:, -3:], atol=1e-5, rtol=0)

    # padding: row 0 has 30 tokens, row 1 has 40
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, 30:] = 0
    right = theirs(idx[:, :40], attention_mask=mask)
    assert right[1:] == ()  # no cache: nothing can follow padding
    torch.testing.assert_close(right.logits[0, :30], expected[0, :30], atol=1e-4, rtol=0)
    torch.testing.assert_close(right.logits[1], expected[1, :40], atol=1e-4, rtol=0)
    left_idx = torch.stack([torch.cat([idx[0, 30:40], idx[0, :30]]), idx[1, :40]])
    left = theirs(left_idx, attention_mask=mask.flip(1))
    torch.testing.assert_close(left.logits[0, 10:], expected[0, :30], atol=1e-4, rtol=0)
    torch.testing.assert_close(left.logits[1], expected[1, :40], atol=1e-4, rtol=0)

    # a cache, continued by several tokens and by one
    out = theirs(idx[:, :20])
    for start, end in ((20, 33), (33, 34), (34, 35), (35, CONTEXT)):
        out = theirs(idx[:, start:end], past_key_values=out[-1])
        torch.testing.assert_close(out.logits, expected[:, start:end], atol=1e-4, rtol=0)

def test_the_loss_is_shifted_and_ignores_what_has_no_label(exported):
    ours, _, theirs = exported
    idx = random_tokens(2, 20)
    logits = our_logits(ours, idx)
    labels = idx.clone()
    labels[0, :7] = -100
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    out = theirs(idx, labels=labels)
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert theirs(idx, labels=labels, return_dict=False)[0].item() == out.loss.item()

def test_greedy_text_is_that_of_sample_py(exported, data):
    """Token by token, of prompts of different lengths, each alone and as one batch padded on the left."""
    ours, out, theirs = exported
    tokenizer = load_tokenizer(data)
    bos = tokenizer.encode_single_token(BOS)
    prompts = [[bos], [bos, 5, 6, 7, 8, 9], [bos, *random_tokens(1, 20)[0].tolist()]]
    texts = [our_text(ours, tokenizer, prompt, 25) for prompt in prompts]
    assert max(map(len, texts)) > 10

    def without_end(ids):
        return ids[:ids.index(bos)] if bos in ids else ids

    for prompt, text in zip(prompts, texts):
        made = theirs.generate(torch.tensor([prompt]), max_new_tokens=25, do_sample=False)
        assert without_end(made[0, len(prompt):].tolist()) == text
    width = max(map(len, prompts))
    idx = torch.tensor([[bos] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = theirs.generate(idx, attention_mask=mask, max_new_tokens=25, do_sample=False)
    assert [without_end(row) for row in made[:, width:].tolist()] == texts
    without_cache = theirs.generate(idx, attention_mask=mask, max_new_tokens=6, do_sample=False,
                                    use_cache=False)
    assert without_cache[:, width:].tolist() == made[:, width:width + 6].tolist()

def test_beam_search_carries_every_beam_its_own_memory(exported):
    """The score of each beam is that of its whole text, and beams with a cache are those without one."""
    ours, _, theirs = exported
    idx = random_tokens(2, 6, seed=3)
    mask = torch.ones_like(idx)
    mask[0, :3] = 0
    options = dict(attention_mask=mask, max_new_tokens=8, num_beams=4, num_return_sequences=2,
                   do_sample=False, length_penalty=0.0, eos_token_id=None, return_dict_in_generate=True,
                   output_scores=True)
    made = theirs.generate(idx, **options)
    for i, (row, score) in enumerate(zip(made.sequences, made.sequences_scores)):
        text = row[3 if i < 2 else 0:]
        logits = our_logits(ours, text[None])[0]
        nats = torch.log_softmax(logits[-9:-1], -1).gather(1, text[-8:, None]).sum()
        assert score.item() == pytest.approx(nats.item(), abs=1e-3)
    again = theirs.generate(idx, use_cache=False, **options)
    assert again.sequences.equal(made.sequences)

def test_sampling_follows_the_distribution(exported):
    ours, _, theirs = exported
    prompt = random_tokens(1, 5, seed=4)
    torch.manual_seed(0)
    made = theirs.generate(prompt, max_new_tokens=2, do_sample=True, num_return_sequences=2000, top_k=2)
    first = made[:, 5]
    probabilities, tokens = our_logits(ours, prompt)[0, -1].topk(2)
    expected = torch.softmax(probabilities, 0)
    assert set(first.tolist()) <= set(tokens.tolist())
    assert (first == tokens[0]).float().mean().item() == pytest.approx(expected[0].item(), abs=0.05)
    # the second token follows the first one, row by row
    for token in tokens:
        second = made[first == token][:, 6]
        if len(second) and token != theirs.generation_config.eos_token_id:
            best = our_logits(ours, torch.cat([prompt, token.view(1, 1)], 1))[0, -1].topk(2).indices
            assert set(second.tolist()) <= set(best.tolist())
