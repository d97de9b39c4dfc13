"""
Generation equals decoding token by token, whatever the batch and the lengths of the prompts; drawing,
detokenizing, and the command.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_refused, cli, shell
from torch._dynamo.testing import CompileCounterWithBackend

import sample
from attention import KVCache
from checkpointing import load_model
from interleave import plain, prefill, run
from model import GPTConfig, product
from recipes import NANOCHAT_BACKBONE
from recurrent import RecurrentConfig, build_model
from sample import Decoder, IncrementalDetokenizer, complete, generate, read_prompts, sample_next_token
from test_model import CONFIG, decode, make, randomize, tokens

BOS = 36


def toy_tokenizer(words=None):
    """What generation uses of tiktoken.Encoding. Token i is words[i] (default: one letter), 36 is BOS."""
    words = words or [chr(65 + i).encode() for i in range(36)]
    return SimpleNamespace(
        encode_single_token=lambda _: BOS,
        decode_single_token_bytes=lambda i: words[i],
    )


# -----------------------------------------------------------------------------
# Drawing and text

def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])

    def share(temperature=1.0, top_k=None, top_p=None):
        """How often each of the four tokens is drawn."""
        uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0))
        drawn = sample_next_token(logits.expand(4000, 4), uniform, temperature, top_k, top_p)
        return torch.bincount(drawn, minlength=4) / 4000

    def assert_near(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)

    p = torch.softmax(logits[0], -1)
    first_two = torch.tensor([p[0], p[1], 0, 0]) / p[:2].sum()
    assert_near(share(), p)
    assert_near(share(temperature=2.0), torch.softmax(logits[0] / 2, -1))
    assert_near(share(top_k=2), first_two)
    assert_near(share(top_p=0.7), first_two)  # the first one's 0.64 are not enough
    assert share(top_p=0.6)[0] == 1
    assert share(top_p=1e-9)[0] == 1
    assert share(temperature=0)[0] == 1
    assert share(top_k=1)[0] == 1
    for temperature in (1e-35, 1e-38, 1e-45, 1e-300):
        assert share(temperature=temperature)[0] == 1
    assert_near(share(temperature=1e300), torch.full((4,), 0.25))
    assert torch.equal(share(top_k=99, top_p=1.0), share())

def test_text_is_whole_characters_and_ends_before_the_stop_string():
    i_diaeresis = "ï".encode()
    words = [b"na", i_diaeresis[:1], i_diaeresis[1:], b"ve", b" st", b"op", b" sto", b"re"]

    def texts(ids, stop=None):
        """The text that each token makes certain, and the rest if the stop string did not end it."""
        detokenizer = IncrementalDetokenizer(toy_tokenizer(words), stop)
        found = []
        for i in ids:
            found.append(detokenizer.add(i))
            if detokenizer.stopped:
                assert detokenizer.finish() == ""
                return found
        return [*found, detokenizer.finish()]

    assert texts([0, 1, 2, 3]) == ["na", "", "ï", "ve", ""]
    assert texts([0, 1]) == ["na", "", "\ufffd"]  # a cut character is shown as such
    assert texts([0, 4, 5, 3], "stop") == ["na", " ", ""]
    assert texts([0, 6, 7, 4], "stop") == ["na", " ", "store", " ", "st"]  # held back until it is certain


# -----------------------------------------------------------------------------
# Generation

def test_generation_is_the_exact_recurrence(trained_models):
    """Greedy tokens are the argmax of decoding the finished text token by token, up to the context's end."""
    baseline = make(dtype=torch.float32, lrt="none", window_pattern="SL")
    for model in (*trained_models.values(), baseline):
        context = model.config.sequence_len
        prompt = [BOS, 3, 4]
        generated = generate(model, toy_tokenizer(), [prompt], 1000, temperature=0)
        out = [token for _, token, _ in generated if token is not None]
        logits, _ = decode(model, torch.tensor([prompt + out[:-1]]))
        expected = logits[0, len(prompt) - 1:].argmax(-1).tolist()
        assert out == expected[:len(out)]
        assert len(out) > 3
        # it ended with the context, or at a BOS behind the last token
        assert len(out) == context - len(prompt) + 1 or len(out) == len(expected)

@pytest.mark.parametrize("overrides", [
    pytest.param({}, id="shared"),
    pytest.param(dict(lrt="layerwise", window_pattern="SL"), id="windows"),
    pytest.param(dict(lrt="none"), id="none"),
    pytest.param(dict(first_memory="embedding", memory="embedding"), id="control"),
])
def test_a_sequence_does_not_depend_on_its_batch(overrides):
    model = make(sequence_len=24, dtype=torch.float32, **overrides)
    prompts = [[BOS], [BOS, 5, 6, 7, 8, 9, 10, 11, 12], [BOS, 3], [BOS, *range(23)]]

    def texts(prompts, seed, num_samples=1):
        return complete(model, toy_tokenizer(), prompts, 100, seed=seed, num_samples=num_samples,
                        temperature=1.0, top_k=20, top_p=0.95)

    together = texts(prompts, seed=7, num_samples=3)
    assert len(together) == 12
    for i, prompt in enumerate(prompts):
        for j in range(3):
            assert texts([prompt], seed=7 + j) == [together[3 * i + j]]
    assert together == texts(prompts, seed=7, num_samples=3)
    assert len(set(together[:3])) > 1

def test_the_control_generates_what_its_parallel_pass_predicts():
    """Greedy text: each token is the argmax of one plain pass over all before it, with memory or without."""
    model = make(dtype=torch.float32, sequence_len=24, first_memory="embedding", memory="embedding")
    for use_memory in (True, False):
        tokens = [i for _, i, _ in generate(model, toy_tokenizer(), [[BOS, 3, 5]], 12, temperature=0,
                                            use_memory=use_memory) if i is not None]
        row = [BOS, 3, 5]
        for token in tokens:
            with torch.no_grad():
                (_, hidden, _), = run(model, torch.tensor([row]), plain(len(row)))
            assert model.logits(hidden)[0, -1].argmax() == token
            row.append(token)
        assert len(row) > 6

def test_generation_ends_after_max_new_tokens(trained_models):
    for n in (1, 2, 5):
        out = list(generate(trained_models["shared"], toy_tokenizer(), [[BOS]], n, temperature=1.0))
        assert len(out) <= n + 1
        assert out[-1][1] is None

def test_generation_ends_at_bos():
    """A model that says BOS at once."""
    silent = make(dtype=torch.float32)
    with torch.no_grad():
        hidden, _ = silent(torch.tensor([[1]]), range(1), KVCache(silent.config, 1, 1, "cpu", torch.float32))
        silent.lm_head.weight.zero_()
        silent.lm_head.weight[BOS] = hidden[0, 0]
    assert complete(silent, toy_tokenizer(), [[1]], 10, temperature=0) == [""]

def test_generation_ends_before_the_stop_string(trained_models):
    model = trained_models["shared"]
    whole, = complete(model, toy_tokenizer(), [[BOS, 3]], 30, temperature=0)
    stop = whole[4:6]
    cut, = complete(model, toy_tokenizer(), [[BOS, 3]], 30, temperature=0, stop=stop)
    assert cut == whole[:whole.index(stop)]

@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[1] * 65]],
                         ids=["no prompt", "empty", "one empty", "too long"])
def test_bad_prompts(prompts, trained_models):
    with pytest.raises(ValueError, match="a prompt has 1 to 64"):
        list(generate(trained_models["shared"], toy_tokenizer(), prompts, 5))

STEPS = {
    "shared": {},
    "grouped-windows": dict(lrt="layerwise", window_pattern="SL", n_kv_head=1),
    "none": dict(lrt="none"),
    "control": dict(first_memory="embedding", memory="embedding"),
    "nanochat": dict(**NANOCHAT_BACKBONE, lrt="shared", n_layer=4),
    "recurrent": dict(arch="recurrent", lrt="none", window_pattern="SL"),
}

def step_model(variant):
    """A model whose context ends within the text, and whose windows are shorter than that."""
    config = CONFIG | dict(sequence_len=20) | STEPS[variant]
    make_config = RecurrentConfig if config.get("arch") == "recurrent" else GPTConfig
    torch.manual_seed(0)
    return randomize(build_model(make_config(**config)))

def step_tokens(model, **options):
    """All tokens of a batch of prompts of different lengths, and of each of them alone."""
    prompts = [[BOS, 1, 2, 3, 4, 5, 6, 7, 8], [BOS], [BOS, 5, 6]]
    found = []
    for batch in (prompts, prompts[:1], prompts[1:2]):
        generated = generate(model, toy_tokenizer(), batch, 30, temperature=1.0, top_k=20, top_p=0.95,
                             seed=7, num_samples=2, **options)
        found.append([(i, token) for i, token, _ in generated])
    return found

@pytest.mark.parametrize("variant", STEPS)
def test_a_captured_step_makes_the_same_tokens(variant, monkeypatch):
    """With a recorder in the place of a CUDA graph: what it replays knows neither position nor numbers."""
    from test_recurrent import Recorder  # which imports this file
    recorders = []

    def record(work, device):
        with Recorder() as recorder:  # as the original, the work is done once
            work()
        recorders.append(recorder)
        return recorder.replay

    model = step_model(variant)
    expected = [step_tokens(model, use_memory=use_memory) for use_memory in (True, False)]
    monkeypatch.setattr(sample, "record", record)
    monkeypatch.setattr(sample, "Decoder", partial(Decoder, capture=True))
    assert [step_tokens(model, use_memory=use_memory) for use_memory in (True, False)] == expected
    assert len(recorders) == 6  # one for each batch
    assert max(len(tokens) for tokens in expected[0]) > 60

@pytest.mark.parametrize("variant", STEPS)
def test_a_compiled_step_makes_the_same_tokens(variant, monkeypatch):
    """One graph for all positions, without a break or a recompilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counter, **options))
    model = step_model(variant)
    expected = step_tokens(model)
    assert step_tokens(model, compile=True) == expected
    assert counter.frame_count == 3  # one for each batch

def test_random_numbers_do_not_depend_on_how_many_there_are(trained_models):
    """A longer text begins with the shorter one of the same seed."""
    model = trained_models["shared"]
    short, = complete(model, toy_tokenizer(), [[BOS, 3]], 7, seed=1)
    long, = complete(model, toy_tokenizer(), [[BOS, 3]], 40, seed=1)
    assert long.startswith(short) and len(short) > 2

@pytest.mark.parametrize("variant", STEPS)
def test_packed_weights_are_the_same_weights(variant, monkeypatch):
    """Packed for inference: the same parameters by name and value, in no more memory, and the same text."""
    model = step_model(variant).double()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    idx, _ = tokens(12)
    logits, memory = decode(model, idx)
    text = step_tokens(model)

    model.pack()
    assert model.state_dict().keys() == state.keys()
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name]), name
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in model.parameters()}
    padding = 0  # gates that read a few channels only have zeros for the others
    for block in model.h:
        if block.attn.gate is not None:
            padding += block.attn.packed[0].numel() * block.attn.gate.out_features
            padding -= block.attn.gate.weight.numel()
        assert block.attn.packed.data_ptr() == block.attn.c_q.weight.data_ptr()
    n_bytes = 8 * sum(x.numel() for x in state.values())
    assert sum(storage.nbytes() for storage in storages.values()) == n_bytes + 8 * padding

    again, memory_again = decode(model, idx)
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(memory_again, memory, rtol=0, atol=1e-12)
    assert step_tokens(model) == text

    # one product for q, k, v and the gates, and one for all of Rk and Rv
    products = []
    monkeypatch.setattr("model.product", lambda x, w: products.append(w) or F.linear(x, w))
    kv = KVCache(model.config, 2, 1, "cpu", torch.float64)
    memory = None if model.config.lrt == "none" else memory[:, :1]
    with torch.no_grad():
        model(idx[:, :1], range(1), kv, memory)
    a_layer = 5 if variant == "recurrent" else 4  # it projects its output, too
    others = (model.config.lrt != "none") + model.config.smear
    assert len(products) == a_layer * model.config.n_layer + others

@pytest.mark.parametrize("rows", [1, 2, 3, 64])
def test_products_do_not_depend_on_who_computes_them(rows):
    """oneDNN where it is faster: several rows, no gradient, and not a part of the rows of packed weights."""
    from test_recurrent import Recorder  # which imports this file
    torch.manual_seed(0)
    x = torch.randn(rows, 1, 768)
    weight = torch.randn(2048, 768)
    in_columns = weight.t().contiguous().t()
    for w, is_dense in ((weight, True), (in_columns, True), (in_columns[:1024], False)):
        with torch.no_grad(), Recorder() as recorder:
            y = product(x, w)
        kernels = {str(kernel) for kernel, *_ in recorder.calls}
        by_onednn = torch.backends.mkldnn.is_available() and is_dense and rows > 2
        assert ("mkldnn._linear_pointwise.default" in kernels) == by_onednn
        torch.testing.assert_close(y.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-3)

    graphs = []  # Inductor refuses calls of oneDNN that are not its own
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(product, backend=lambda graph, inputs: graphs.append(graph.code) or graph)
        torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
    assert len(graphs) == 1 and "mkldnn" not in graphs[0]

    w = weight.requires_grad_()
    product(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x.sum((0, 1)).expand(2048, -1), rtol=1e-4, atol=1e-4)

def test_samples_share_one_prefill_and_a_token_is_one_forward(trained_models, monkeypatch):
    model = trained_models["shared"]
    forward = type(model).forward
    shapes = []

    def recorded(self, idx, *args, **kwargs):
        shapes.append(tuple(idx.shape))
        return forward(self, idx, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", recorded)
    prompts = [[BOS, 1, 2, 3, 4]] * 2
    out = list(generate(model, toy_tokenizer(), prompts, 6, temperature=1.0, num_samples=3, seed=1))
    prefills = [shape for shape in shapes if shape[1] > 1]
    steps = [shape for shape in shapes if shape == (6, 1)]
    assert all(rows == 2 for rows, _ in prefills)
    assert len(shapes) - len(steps) <= 12
    assert len(steps) <= 5
    assert len(out) <= 6 * 7

def test_weights_loaded_in_bf16_are_those_cast_at_every_use(monkeypatch):
    """Where the GPU has bf16, a run's weights are cast once, when it is loaded: bit for bit the same."""
    model = make(dtype=torch.float32, lrt="layerwise", window_pattern="SL")
    model.compute_dtype = torch.bfloat16
    checkpoint = dict(model=model.state_dict(), config=asdict(model.config))
    monkeypatch.setattr("checkpointing.compute_dtype", lambda device: torch.bfloat16)
    loaded = load_model(checkpoint, torch.device("cpu"))
    assert loaded.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert loaded.cos.dtype == torch.float32
    assert loaded.resid_lambdas.dtype == torch.float32

    idx, _ = tokens(9)
    logits, memories = [], []
    for m in (model, loaded):
        kv = KVCache(m.config, 2, 9, "cpu", torch.bfloat16)
        hidden, memory, _ = prefill(m, idx, kv)
        logits.append(m.logits(hidden))
        memories.append(memory)
    assert torch.equal(*logits)
    assert torch.equal(*memories)


# -----------------------------------------------------------------------------
# The command

def test_sampling(trained, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(folder)

    def sample(*flags):
        code, out, err = cli("sample.py", *flags)
        assert code == 0, err
        return out

    # the same seed gives the same text, in another process and among several samples, too
    prompt = ["--prompt", "def ", "--max-new-tokens", 30]
    first = shell("sample.py", *prompt, "--seed", 3)
    assert first.returncode == 0
    assert first.stdout.startswith("def ")
    assert "memory on" in first.stderr
    again = sample("--checkpoint", "runs/d2_shared", *prompt, "--seed", 3, "--device", "cpu")
    assert again == first.stdout
    two = sample(*prompt, "--seed", 2, "--num-samples", 2)
    assert two.endswith("-" * 80 + "\n" + again)  # seeds 2 and 3

    # another seed or no memory gives another text, and greedy samples do not depend on the seed
    other = sample(*prompt, "--seed", 4)
    without = sample(*prompt, "--seed", 3, "--no-memory")
    assert len({again, other, without}) == 3
    greedy = ["--prompt", "def ", "--max-new-tokens", 12, "--temperature", 0]
    assert sample(*greedy, "--seed", 1) == sample(*greedy, "--seed", 2)

    # flags at their limits
    sample("--max-new-tokens", 3, "--top-k", 99999)  # above the vocabulary: all of it
    sample("--max-new-tokens", 500, "--temperature", "1e-30", "--top-p", 0.5)  # ends where the context ends
    special = sample("--prompt", "<|bos|>", "--max-new-tokens", 1)
    assert special.startswith("<|bos|>")  # text, no control token

def test_many_prompts(trained, here):
    folder, _ = trained
    (here / "prompts.txt").write_text("def \n\nimport os\n")
    (here / "prompts.jsonl").write_text('{"prompt": "def "}\n{"prompt": "import os"}\n')
    flags = ["--checkpoint", folder / "runs/d2_shared", "--num-samples", 2, "--max-new-tokens", 8,
             "--top-p", 0.9, "--seed", 5]
    written = []
    for name in ("prompts.txt", "prompts.jsonl"):
        code, out, err = cli("sample.py", "--prompt-file", name, "--out", name + ".out", *flags)
        assert code == 0, err
        assert out == ""
        written.append([json.loads(line) for line in open(name + ".out")])
    rows = written[0]
    assert rows == written[1]
    expected = [("def ", 5), ("def ", 6), ("import os", 5), ("import os", 6)]
    assert [(row["prompt"], row["seed"]) for row in rows] == expected
    code, out, _ = cli("sample.py", "--prompt", "import os", *flags)
    # the same alone and in a batch
    assert out == f"import os{rows[2]['text']}\n{'-' * 80}\nimport os{rows[3]['text']}\n"

@pytest.mark.parametrize("name, raw", [
    ("x.txt", b"\xef\xbb\xbfdef \r\n\r\nimport os\r\n"),
    ("x.jsonl", b'\xef\xbb\xbf{"prompt": "def "}\r\n\n{"prompt": "import os"}'),
    ("X.JSONL", b'{"prompt": "def "}\n{"prompt": "import os"}\n'),
    ("x.txt", b"def \n\xef\xbb\xbfimport os\n"),  # two files put together
    ("x.json.gz", gzip.compress(b'{"prompt": "def "}\n{"prompt": "import os"}\n')),
    ("x", b"def \nimport os"),
    ("x.jsonl.gz", gzip.compress(b'{"prompt": "def "}\n{"prompt": "import os"}\n')),
])
def test_prompts_are_what_the_file_says(name, raw, here):
    Path(name).write_bytes(raw)
    assert read_prompts(Path(name)) == ["def ", "import os"]

def test_bad_prompt_files(trained, here):
    folder, _ = trained

    def refused(name, *flags):
        return cli("sample.py", "--prompt-file", name, "--checkpoint", folder / "runs/d2_shared", *flags)

    (here / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    (here / "null.jsonl").write_text('{"prompt": "x"}\n{"prompt": null}\n')
    (here / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (here / "latin.txt").write_bytes(b"caf\xe9\n")
    (here / "empty.txt").write_text("\n")
    (here / "long.txt").write_text("short\n" + "word " * 100 + "\n")
    assert_refused(refused("bad.jsonl"), "bad.jsonl line 2")
    assert_refused(refused("null.jsonl"), "null.jsonl line 2", '"prompt"')
    assert_refused(refused("half.jsonl"), "half.jsonl line 1", "surrogate")
    assert_refused(refused("latin.txt"), "latin.txt", "not UTF-8 text (byte 3)")
    (here / "wide.txt").write_bytes("def \n".encode("utf-16-le"))
    assert_refused(refused("wide.txt"), "wide.txt is not text (NUL at character 1)")
    assert_refused(refused("empty.txt"), "empty.txt has no prompts")
    assert_refused(refused("none.txt"), "cannot read none.txt")
    (here / "spaces.txt").write_text("x" + " " * 1_000_000 + "x\n")  # tiktoken panics on them in one piece
    assert_refused(refused("spaces.txt"), "prompt 1 has", "the context 32")
    assert_refused(refused("long.txt", "--out", "long.out"), "prompt 2 has", "the context 32")
    assert_refused(refused("empty.txt", "--interactive"), "--prompt-file goes without")
    assert not (here / "long.out").exists()

def test_a_run_without_its_own_tokenizer(data, trained, here):
    """Preparing data into the run's folder would not help: it needs the files that it was trained with."""
    def refused(*words):
        assert_refused(cli("sample.py", "--checkpoint", "run"), "run", *words,
                       "copy tokenizer.tiktoken and tokenizer.json there from the data", str(data))

    shutil.copytree(trained[0] / "runs/d2_shared", "run")
    path = Path("run/tokenizer.json")
    whole = path.read_text()
    path.write_text(whole[:-9])
    refused("are damaged")
    path.write_text(whole.replace("bpe", "other"))
    refused("is not the one of ckpt_0000150.pt")
    path.unlink()
    refused("no tokenizer in run")

@pytest.mark.parametrize("out", ["prompts.txt", "link", "run/ckpt_0000150.pt", "run/tokenizer.json",
                                 "run/log.jsonl"])
def test_out_replaces_no_input(out, trained, here):
    folder, _ = trained
    shutil.copytree(folder / "runs/d2_shared", "run")
    Path("prompts.txt").write_text("def \n")
    Path("link").symlink_to("prompts.txt")
    before = Path(out).read_bytes()
    result = cli("sample.py", "--checkpoint", "run", "--prompt-file", "prompts.txt", "--out", out)
    assert_refused(result, f"--out {out} would replace")
    assert Path(out).read_bytes() == before

def test_interactive(trained):
    """A prompt loop: after Ctrl-C it goes on, after a bad prompt too, and Ctrl-D ends it."""
    folder, _ = trained
    command = [sys.executable, ROOT / "sample.py", "--interactive", "--max-new-tokens", "5",
               "--checkpoint", folder / "runs/d2_shared"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # children of a job in the background ignore this signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.read(2) == "> "
    time.sleep(0.5)  # a signal between the prompt and the read would wait for the read
    process.send_signal(signal.SIGINT)
    assert process.stdout.read(3) == "\n> "
    out, _ = process.communicate("def \n" + "word " * 100 + "\nimport\n", timeout=60)
    assert process.returncode == 0
    assert out.count("\n> ") == 3, out
    assert "error: prompt 1 has" in out, out

@pytest.mark.parametrize("flags, words", [
    (["--temperature", "-1"], ["--temperature must be a number of at least 0"]),
    (["--temperature", "nan"], ["--temperature must be a number of at least 0"]),
    (["--temperature", "inf"], ["--temperature must be a number of at least 0"]),
    (["--top-k", "-1"], ["--top-k must be a number of at least 0"]),
    (["--top-p", "0"], ["--top-p must be above 0"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens must be a number of at least 1"]),
    (["--num-samples", "0"], ["--num-samples must be a number of at least 1"]),
    (["--prompt", "word " * 100], ["prompt 1 has", "the context 32"]),
    (["--stop", "\udce9"], ["--stop is not UTF-8 text: '\\udce9'"]),
    (["--prompt-file", ""], ["the argument for prompt_file is empty"]),
    (["--interactive", "--prompt", "x"], ["--interactive goes without"]),
    (["--interactive", "--out", "x"], ["--interactive goes without"]),
    (["--interactive", "--num-samples", "2"], ["--interactive goes without"]),
    (["--interactive", "--compile"], ["--interactive goes without --compile"]),
    (["--prompt", "caf\udce9"], ["prompt 1 is not UTF-8 text: 'caf\\udce9'"]),
])
def test_bad_flags(flags, words, trained, monkeypatch):
    folder, _ = trained
    monkeypatch.chdir(folder)
    assert_refused(cli("sample.py", *flags), *words)
