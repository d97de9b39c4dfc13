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
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
import yaml
from helpers import ROOT, assert_refused, cli, shell
from test_core import BUNDLE, real
from test_house import rooms_imported
from test_recurrent import make_recurrent

import export
from attention import KVCache
from checkpointing import CHECKPOINT, OLDER, VERSION, Log
from core import Example, evaluate_task, load_tasks, make_example, score
from dataset import BOS, encode_text, load_tokenizer, tokenizer_sha256
from flags import make_parser
from interleave import Schedule, decode_tokens
from prepare_data import train_tokenizer
from recipes import NANOCHAT_BACKBONE
from sample import generate, load_run
from test_model import make

CONTEXT = 48
CONTROL = dict(first_memory="embedding", memory="embedding")
VARIANTS = {
    "none": dict(lrt="none"),
    "control": CONTROL,
    "both": dict(lrt="shared", inject="both"),
    "kv": dict(lrt="shared", inject="kv", source_layer=0),
    "residual": dict(lrt="layerwise", inject="residual"),
    "layerwise": dict(lrt="layerwise", source_layer=2, first_memory="embedding"),
    "input": dict(lrt="shared", inject="input"),
    "some layers": dict(lrt="layerwise", dest_layers=[1, 2]),
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
    flags = "--depth 3 --lrt shared --data /secret --init-from /secret --total-batch-size 4096"
    checkpoint = OLDER | dict(
        version=VERSION,
        model=model.state_dict(),
        optimizers=[],
        step=20,
        rows_seen=20,
        left_out=[],
        seconds=1.0,
        commit="unknown",
        config=dataclasses.asdict(model.config),
        schedule=dataclasses.asdict(Schedule("plain")),
        args=vars(make_parser().parse_args(flags.split())),
        torch_rng=torch.get_rng_state(),
        tokenizer_sha256=tokenizer_sha256(folder),
        shards_sha256=[],
        run_id="0123",
    )
    assert checkpoint.keys() == CHECKPOINT.keys()
    torch.save(checkpoint, folder / "ckpt_0000020.pt")
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
    for i, (row, total) in enumerate(zip(made.sequences, made.sequences_scores)):
        text = row[3 if i < 2 else 0:]
        logits = our_logits(ours, text[None])[0]
        nats = torch.log_softmax(logits[-9:-1], -1).gather(1, text[-8:, None]).sum()
        assert total.item() == pytest.approx(nats.item(), abs=1e-3)
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


# -----------------------------------------------------------------------------
# What is refused

def test_what_the_model_cannot_do_is_refused(data, transformers, tmp_path):
    run = save_run(tmp_path / "run", make_variant("both"), data)
    assert cli("export.py", run, tmp_path / "out")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    idx = random_tokens(2, CONTEXT + 1)

    # the context does not slide; the token behind its last position is still made
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens are more than the context of {CONTEXT}"):
        model(idx)
    options = dict(do_sample=False, eos_token_id=None)
    assert model.generate(idx[:, :40], max_new_tokens=9, **options).shape == (2, CONTEXT + 1)
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        model.generate(idx[:, :40], max_new_tokens=10, **options)

    # padding where it cannot be
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 7:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(idx[:, :10], attention_mask=mask, max_new_tokens=2)
    mask[0] = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="padding before or behind it only"):
        model(idx[:, :10], attention_mask=mask)
    mask[0] = 0
    with pytest.raises(ValueError, match="text in every row"):
        model(idx[:, :10], attention_mask=mask)

    # what would go wrong without a word
    with pytest.raises(ValueError, match="stateful"):
        model.generate(idx[:1, :10], max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(NotImplementedError, match="vocabulary"):
        model.resize_token_embeddings(600)
    with pytest.raises(ValueError, match="inference"):
        model.train()(idx[:, :10], labels=idx[:, :10])

def test_an_export_is_whole_or_absent(data, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    run = save_run(tmp_path / "run", make_variant("none"), data)
    out = tmp_path / "deep" / "out"
    assert_refused(cli("export.py", tmp_path / "nowhere", out), "no such run or checkpoint")
    assert_refused(cli("export.py", run, run), f"{run} exists")
    assert_refused(cli("export.py", run, run / "ckpt_0000020.pt" / "out"), "choose another")
    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli("export.py", run, out)
        patch.setattr(export, "model_card", lambda *args: os.stat(tmp_path / "nothing"))
        assert_refused(cli("export.py", run, out), f"cannot write {out}")
    (run / "tokenizer.json").rename(run / "aside.json")
    assert_refused(cli("export.py", run, out), "no tokenizer in")
    (run / "aside.json").rename(run / "tokenizer.json")
    assert not out.exists() and not list(out.parent.glob("*"))

    code, said, err = cli("export.py", run, out, "--dtype", "bfloat16")
    assert code == 0, err
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert set(before) == {
        "README.md", "attention.py", "config.json", "generation_config.json", "interleave.py", "model.py",
        "model.safetensors", "modeling_nanolrt.py", "recurrent.py", "tokenizer.json", "tokenizer_config.json"}
    assert_refused(cli("export.py", run, out), f"{out} exists")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

def test_a_folder_that_is_in_the_way_is_nobody_elses(data, tmp_path):
    pytest.importorskip("safetensors")
    run = save_run(tmp_path / "run", make_variant("none"), data)
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/mine").write_text("keep")
    assert_refused(cli("export.py", run, tmp_path / "out"), "out.tmp is in the way")
    assert (tmp_path / "out.tmp/mine").read_text() == "keep"

@pytest.mark.parametrize("name, text", [
    ("core_0000020.json", '{"core": "x"}'),
    ("core_0000020.json", '{"core": [1]}'),
    ("log.jsonl", '{"kind": "eval", "step": 20}'),
    ("log.jsonl", '{"kind": "eval", "step": 20, "bpb": {"merged": "x"}}'),
    ("log.jsonl", '{"kind": "eval", "step": 20, "bpb": [1]}'),
])
def test_figures_that_are_none(name, text, data, tmp_path):
    pytest.importorskip("safetensors")
    run = save_run(tmp_path / "run", make_variant("none"), data)
    (run / name).write_text(text)
    assert_refused(cli("export.py", run, tmp_path / "out"), "figures of", "are damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

def test_the_code_of_an_export_is_ours(data, tmp_path):
    """But for its imports: there is no second copy that could become another."""
    for name in export.CODE:
        source = (ROOT / name).read_text()
        exported = export.with_relative_imports(source)
        assert exported.replace("from .", "from ") == source
        ours = rooms_imported(ROOT / name)
        assert ours <= {Path(name).stem for name in export.CODE}, f"{name} needs {ours}: add it to CODE"
        for room in ours:
            assert f"from .{room} import" in exported
            assert f"import {room}" not in exported

def test_the_model_card(data, tmp_path):
    pytest.importorskip("safetensors")
    run = save_run(tmp_path / "run", make_variant("both"), data)
    (run / "core_0000020.json").write_text('{"core": 0.125}')
    assert cli("export.py", run, tmp_path / "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("\npython train.py --init-from RUN --depth 3 --lrt shared --total-batch-size 4096\n",
                  "- trained for 20 steps of 4,096 tokens, 81,920 tokens",
                  "- validation bits per byte: merged 2.5000, decode 2.2500",
                  "- CORE: 0.1250\n", "# run\n", "lrt=shared, 3 layers", f"context of {CONTEXT} tokens"):
        assert words in card, card
    assert "/secret" not in card and str(tmp_path) not in card


# -----------------------------------------------------------------------------
# The tokenizer

HARD_TEXTS = [
    "",
    " ",
    "Hello, world! It's what they've said: we'd rather I'm 'llama, DON'T ſ'ſ",
    "a\u0301e\u0308 \u0301 o\u200d\u0301 नमस्ते ภาษาไทย العَرَبِيَّة",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 é",
    "日本語の文章、漢字とかな。中文，没有空格。한국어 조합형 각",
    "0 12 123 1234567890 ٣٤٥ ⅷ ½ 1,000.00 1e10",
    "tabs\t\tand\r\nlines\n\n\n  \n   indented   \n",
    "\x00\x01\x07\x1b[0m\x7f\x80\x85\xa0\u2028\u2029\ufeff\u180e\u200b\U000e0001",
    "<|bos|>",
    "text<|bos|> that <|endoftext|> spells <|bos|><|bos|>",
    " " * 5000 + "x" + " " * 4999 + "\n" * 3000 + " ",
    "7" * 3000 + "a" * 3000 + "é" * 1000 + "👍" * 500,
    "ababababaababbabababab" * 40,
    "\ud7ff\ue000\U0010ffff",
]

def patterns():
    """How the encodings of tiktoken cut text into words, without their tokens, which are downloads."""
    from tiktoken_ext import openai_public
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data_gym_to_mergeable_bpe_ranks", "load_tiktoken_bpe"):
            patch.setattr(openai_public, name, lambda *args, **options: {})
        for name in ("gpt2", "cl100k_base", "o200k_base"):
            yield name, getattr(openai_public, name)()["pat_str"]

def encodings(data):
    """Encodings by name: that of the tests' data, and one with each pattern of tiktoken's."""
    yield "ours", load_tokenizer(data)
    text = [word for text in HARD_TEXTS for word in [text, "the cat and the hat. "]] * 3
    ranks = train_tokenizer(text, 700, 3)._mergeable_ranks
    for name, pattern in patterns():
        special = {"<|endoftext|>": len(ranks), BOS: len(ranks) + 1}
        yield name, tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

def test_tokens_are_those_of_tiktoken(data):
    """On hard text and on random text, by every pattern that a tokenizer of prepare_data.py can have."""
    tokenizers = pytest.importorskip("tokenizers", reason="extras `export` are not installed")
    rng = random.Random(0)
    alphabets = ["ab", "ab ", "a \n\t\r", "0123456789 a", "aeiou'sdmtlrv SDMTLRVE ſ", "aA éÉ漢👍\u0301"]
    texts = HARD_TEXTS + ["".join(rng.choices(alphabets[i % 6], k=rng.randrange(1, 60))) for i in range(3000)]
    for name, enc in encodings(data):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_json(enc)))
        tokenizer.encode_special_tokens = True
        bos = enc.encode_single_token(BOS)
        for text, encoded in zip(texts, tokenizer.encode_batch(texts)):
            assert encoded.ids == [bos, *encode_text(enc, text)], (name, text)
            assert tokenizer.decode(encoded.ids[1:]) == text, (name, text)

@pytest.mark.slow
def test_every_character_is_cut_as_tiktoken_cuts_it(data):
    """But for letters that one of the two libraries is too old to know."""
    tokenizers = pytest.importorskip("tokenizers", reason="extras `export` are not installed")
    enc = load_tokenizer(data)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_json(enc)))
    characters = [chr(code) for code in range(0x110000) if not 0xd800 <= code < 0xe000]
    differ = []
    for start in range(0, len(characters), 10000):
        block = characters[start:start + 10000]
        texts = [f"a{c}b '{c} 1{c}2 {c}\n" for c in block]
        ours = enc.encode_ordinary_batch(texts, num_threads=1)
        theirs = [encoded.ids for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
        differ += [c for c, a, b in zip(block, ours, theirs) if a != b]
    known = [c for c in differ if unicodedata.category(c) != "Cn"]  # to this Python, too
    assert known == []

def test_the_tokenizer_in_transformers(data, transformers, tmp_path):
    run = save_run(tmp_path / "run", make_variant("none"), data)
    assert cli("export.py", run, tmp_path / "out")[0] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    enc = load_tokenizer(data)
    bos = enc.encode_single_token(BOS)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == bos
    assert tokenizer.model_max_length == CONTEXT and len(tokenizer) == enc.n_vocab
    for text in HARD_TEXTS:
        assert tokenizer(text).input_ids == [bos, *encode_text(enc, text)]
        assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text
    batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, 0] == 0 and batch.attention_mask[:, -1].all()  # on the left
    assert set(batch) == {"input_ids", "attention_mask"}
    saved = tokenizer.save_pretrained(tmp_path / "again")
    assert saved
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again("<|bos|> 1234").input_ids == tokenizer("<|bos|> 1234").input_ids


# -----------------------------------------------------------------------------
# Far from here

STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True, dtype="auto")
print(model.dtype, model.config.vocab_size, model.config.max_position_embeddings)
inputs = tokenizer(["def ", "import os, s"], return_tensors="pt", padding=True)
made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
for text in tokenizer.batch_decode(made[:, inputs.input_ids.size(1):], skip_special_tokens=True):
    print(repr(text))
model.save_pretrained("again")
tokenizer.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True, dtype=torch.bfloat16)
assert again.model.cos.dtype == torch.float32 and again.dtype == torch.bfloat16
assert again.model.cos.equal(model.model.cos) and again.model.sin.equal(model.model.sin)
difference = (again(inputs.input_ids).logits - model(inputs.input_ids).logits).abs().max().item()
assert difference < 0.2, difference
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(repr(write("def ", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]))
assert "attention" not in sys.modules and "model" not in sys.modules
"""

def test_a_stranger_opens_a_trained_run(trained, transformers, tmp_path):
    """In a folder copied away, in another process, without this repository and without a network."""
    folder, _ = trained
    run = folder / "runs" / "d2_shared"
    assert cli("export.py", run, tmp_path / "out")[0] == 0
    away = tmp_path / "away"
    away.mkdir()
    shutil.move(tmp_path / "out", away / "model")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"), OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    done = subprocess.run([sys.executable, "-c", STRANGER], cwd=away, env=env, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    model, *texts = done.stdout.splitlines()
    assert model == "torch.float32 512 32"
    expected = []
    for prompt in ("def ", "import os, s"):
        code, out, err = cli("sample.py", "--checkpoint", run, "--prompt", prompt, "--temperature", 0,
                             "--max-new-tokens", 8)
        assert code == 0, err
        expected.append(out.removeprefix(prompt).removesuffix("\n"))
    assert texts == [repr(expected[0]), repr(expected[1]), repr(expected[0])]


# -----------------------------------------------------------------------------
# lm-evaluation-harness

TASKS = {  # of hf/lm_eval, with the data of CORE's bundle
    "arc_easy": "world_knowledge/arc_easy.jsonl",
    "boolq": "reading_comprehension/boolq.jsonl",
    "lambada_openai": "language_understanding/lambada_openai.jsonl",
    "winograd": "language_understanding/winograd_wsc.jsonl",
}
N_EXAMPLES = 24  # of each

def small_bundle(folder):
    """A part of CORE's bundle: some examples that are not long, without few-shot examples before them."""
    listed = yaml.safe_load((BUNDLE / "core.yaml").read_text())["icl_tasks"]
    entries = [entry | dict(num_fewshot=[0]) for entry in listed if entry["label"] in TASKS]
    for entry in entries:
        lines = (BUNDLE / "eval_data" / entry["dataset_uri"]).read_text("utf-8").splitlines(keepends=True)
        path = folder / "eval_data" / entry["dataset_uri"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join([line for line in lines if len(line) < 800][:N_EXAMPLES]), "utf-8")
    (folder / "core.yaml").write_text(yaml.safe_dump(dict(icl_tasks=entries)))
    shutil.copy(BUNDLE / "eval_meta_data.csv", folder)
    return folder

def run_lm_eval(model, bundle, out):
    """lm_eval's results, and its samples by task: lists of (document, [(log-likelihood, is greedy), ..])."""
    env = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(out / "hf"), OMP_NUM_THREADS="1")
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={model},trust_remote_code=True", "--include_path", ROOT / "hf" / "lm_eval",
               "--tasks", ",".join(f"core_{name}" for name in TASKS), "--device", "cpu", "--batch_size", "8",
               "--output_path", out / "results", "--log_samples"]
    done = subprocess.run(list(map(str, command)), cwd=bundle, env=env, capture_output=True, text=True,
                          timeout=1500)
    assert done.returncode == 0, done.stderr
    results, = (out / "results").rglob("results_*.json")
    samples = {}
    for name in TASKS:
        path, = (out / "results").rglob(f"samples_core_{name}_*.jsonl")
        samples[name] = []
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            answers = [(float(ll), str(greedy) == "True") for (ll, greedy), in row["resps"]]
            samples[name].append((row["doc"], answers))
    return json.loads(results.read_text())["results"], samples

def contexts_of(task, example):
    """What comes before the answer in each prompt of an example, by the files in hf/lm_eval."""
    if task.kind == "schema":
        return example["context_options"]
    if task.kind == "language_modeling":
        return [example["context"].strip()]
    return [f"{example['query']}\nAnswer:"] * len(example["choices"])

def assert_lm_eval_agrees(run, tmp_path):
    """
    The log-likelihoods are ours in all examples, and CORE's answers follow from lm_eval's figures wherever
    both score the same tokens. lm_eval compares sums over all that follows its context; CORE compares means
    over tokens, of what the choices do not share (schema: of all that they share at their end, which may be
    more than the continuation).
    """
    assert cli("export.py", run, tmp_path / "out")[0] == 0
    bundle = small_bundle(tmp_path / "bundle")
    results, samples = run_lm_eval(tmp_path / "out", bundle, tmp_path)

    _, _, tokenizer, model = load_run(run, torch.device("cpu"))
    context = model.config.sequence_len
    for task in load_tasks(bundle):
        their_answers = {json.dumps(doc, sort_keys=True): answers for doc, answers in samples[task.name]}
        right = evaluate_task(model, tokenizer, task, range(N_EXAMPLES), 16 * context)
        their_right, n_same_tokens = 0, 0
        for i, example in enumerate(task.examples):
            # the log-likelihoods of what lm_eval takes for the answer: all that follows its context
            answers = their_answers[json.dumps(example, sort_keys=True)]
            ours = make_example(task, i, tokenizer, context)
            starts = [1 + len(encode_text(tokenizer, context)) for context in contexts_of(task, example)]
            scored, = score(model, [Example(i, ours.gold, ours.prefix[:0], ours.rows, starts)])
            n_tokens = [len(row) - start for row, start in zip(ours.rows, starts)]
            likelihoods = [likelihood for likelihood, _ in answers]
            for mean, n, likelihood in zip(scored.losses, n_tokens, likelihoods, strict=True):
                assert likelihood == pytest.approx(-mean * n, abs=2e-3), (task.name, example)

            # the answer
            if ours.gold is None:
                (_, is_right), = answers
            else:
                is_right = likelihoods.index(max(likelihoods)) == ours.gold
            their_right += is_right
            if starts == ours.starts:  # CORE's answer is in lm_eval's figures
                means = [likelihood / n for likelihood, n in zip(likelihoods, n_tokens)]
                by_means = is_right if ours.gold is None else means.index(max(means)) == ours.gold
                assert by_means == right[i], (task.name, example)
                n_same_tokens += 1
        assert results[f"core_{task.name}"]["acc,none"] == pytest.approx(their_right / N_EXAMPLES)
        print(f"{task.name}: CORE {sum(right.values())}, lm_eval {their_right} of {N_EXAMPLES}, "
              f"{n_same_tokens} with the same tokens scored")
        if task.kind == "language_modeling":
            assert their_right == sum(right.values()) and n_same_tokens == N_EXAMPLES
        assert n_same_tokens > 0

@pytest.mark.slow
@real
def test_lm_eval_scores_as_our_core(data, tmp_path):
    for name in ("safetensors", "transformers", "lm_eval", "accelerate"):
        pytest.importorskip(name, reason="extras `export` and `eval` are not installed")
    flags = "--depth 2 --aspect-ratio 16 --head-dim 16 --max-seq-len 512 --lrt shared --num-iterations 20 "
    flags += "--total-batch-size 1024 --eval-tokens 1024 --decode-tokens 0 --device cpu --dtype float32"
    done = shell("train.py", "--data", data, "--out", tmp_path / "runs", *flags.split())
    assert done.returncode == 0, done.stderr
    assert_lm_eval_agrees(tmp_path / "runs" / "d2_shared", tmp_path)
