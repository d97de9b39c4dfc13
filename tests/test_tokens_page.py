"""The scores of tokens, and the page that shows them: as data, and as Chromium draws it."""

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_refused, cli

import tokens_page
from dataset import BOS, encode_text, load_tokenizer, token_bytes
from eval_core import recurrent_losses
from model import GPT, GPTConfig
from prepare_data import train_tokenizer

# a token that is half a character, newlines, a tab, a tag that must stay text, and what ends a script
HARD = ('Ωμέγα 🙂 漢字\n\n\tx</script><script>document.title = "broken"</script>'
        "<b>&amp;</b>\u2028 the end the end")


def page_json(path):
    """The data in a page."""
    text = Path(path).read_text("utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])

@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the end of the beginning, the beginning of the end"], 270, 2)


# -----------------------------------------------------------------------------
# Scores

def test_scores_are_those_of_decoding(trained_models):
    """The loss token by token, with memory and without; the likeliest tokens, and their probabilities."""
    model = trained_models["layerwise"]
    rows = torch.randint(36, (3, 20), generator=torch.Generator().manual_seed(0))
    idx, targets = rows[:, :-1], rows[:, 1:]
    for use_memory in (True, False):
        nats, tokens, probabilities = tokens_page.score_tokens(model, rows, 2, use_memory=use_memory)
        expected = recurrent_losses(model, idx, targets, token_by_token=use_memory, use_memory=use_memory)
        torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
        assert tokens.shape == probabilities.shape == (3, 19, 5)
        assert (probabilities[..., :-1] >= probabilities[..., 1:]).all()
        # where the target is one of them, its probability says what its loss says
        is_target = tokens == targets[..., None]
        assert is_target.any()
        torch.testing.assert_close(-probabilities[is_target].log(), nats[is_target.any(-1)],
                                   rtol=1e-4, atol=1e-4)
    with_memory, _, _ = tokens_page.score_tokens(model, rows, 3)
    assert (with_memory - nats).abs().max() > 0.01  # the second way was another one

def test_a_vocabulary_smaller_than_five():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=3, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    _, tokens, _ = tokens_page.score_tokens(model, torch.randint(3, (2, 5)), 1)
    assert tokens.shape == (2, 4, 3)

def test_where_a_pair_stood():
    idx = torch.tensor([[1, 2, 3, 1, 2, 3, 3], [1, 2, 1, 3, 2, 1, 3]])
    targets = torch.tensor([[2, 3, 1, 2, 3, 3, 1], [2, 1, 3, 2, 1, 3, 0]])
    assert tokens_page.earlier_pair(idx, targets).tolist() == [
        [-1, -1, -1, 0, 1, -1, 2],
        [-1, -1, -1, -1, 1, 2, -1],
    ]
    # the last of several places
    ones = torch.ones(1, 4, dtype=torch.int64)
    assert tokens_page.earlier_pair(ones, ones).tolist() == [[-1, 0, 1, 2]]

def test_summary():
    nats = dict(memory=np.array([1.0, 2.0, 3.0, 9.0]), other=np.array([2.0, 2.0, 5.0, 9.0]))
    n_bytes = np.array([1, 2, 1, 0])  # the last is BOS and does not count
    again = np.array([False, False, True, True])
    groups = tokens_page.summarize(nats, n_bytes, np.array([0, 1, 0, 1]), again)
    by_name = {group["name"]: group for group in groups}
    assert list(by_name) == ["all tokens", "repeated pairs", "new pairs", "position 0", "position 1"]
    assert [group["tokens"] for group in groups] == [3, 1, 2, 2, 1]
    assert by_name["all tokens"]["nats"] == dict(memory=2.0, other=3.0)
    assert by_name["all tokens"]["bpb"]["memory"] == pytest.approx(6 / 4 / math.log(2))
    assert by_name["repeated pairs"]["nats"] == dict(memory=3.0, other=5.0)
    assert by_name["position 0"]["nats"]["other"] == pytest.approx(3.5)


# -----------------------------------------------------------------------------
# Tokens to text

def test_pieces_are_the_text(tokenizer):
    """Whole characters only, each once, also where a document ends within bytes that are none."""
    bos = tokenizer.encode_single_token(BOS)
    ids = encode_text(tokenizer, HARD)
    assert len(ids) > len(HARD) - 5  # most characters of it are several tokens
    found = tokens_page.pieces(tokenizer, [*ids, bos, *ids], bos)
    assert len(found) == 2 * len(ids) + 1
    assert "".join(found) == HARD + HARD
    assert "\ufffd" not in "".join(found)
    assert "" in found  # the first bytes of a character

@pytest.mark.parametrize("raw, name", [
    (b" the", "␣the"), (b"\n\n", "⏎⏎"), (b"\t\r", "⇥␍"), (b"\xce\xa9", "Ω"), (b"\xf0\x9f", "bytes F0 9F"),
    (b"\x00\xc2\xad", "U+0000U+00AD"), (b"<b>", "<b>"),
])
def test_names_of_tokens(raw, name):
    assert tokens_page.token_name(raw) == name


# -----------------------------------------------------------------------------
# The page

def make_data(tokenizer, text, T=16):
    """The data of a page of this text and a model that was not trained."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=T, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=1, n_kv_head=1,
                          n_embd=16, lrt="shared"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    bos = tokenizer.encode_single_token(BOS)
    ids = [bos, *encode_text(tokenizer, text)]
    n = len(ids) - 1
    ids += [bos] * (-n % T)
    rows = torch.tensor(ids).unfold(0, T + 1, T)
    ways = {
        "memory": tokens_page.score_tokens(model, rows, 64),
        "no memory": tokens_page.score_tokens(model, rows, 64, use_memory=False),
    }
    # a run's folder may be called anything
    about = dict(text=HARD, labels={"memory": "with memory", "no memory": "memory zero"})
    return tokens_page.page_data(tokenizer, rows, n, bos, ways, token_bytes(tokenizer), about)

def test_page_holds_all_tokens_and_nothing_else(tokenizer, here):
    data = make_data(tokenizer, HARD)
    page = tokens_page.make_page(data)
    Path("page.html").write_text(page, "utf-8")
    assert page_json("page.html") == json.loads(json.dumps(data))
    n = len(encode_text(tokenizer, HARD))
    assert len(data["ids"]) == len(data["text"]) == len(data["earlier"]) == n
    assert {len(column) for column in data["nats"].values()} == {n}
    assert {len(top["tokens"]) for top in data["top"].values()} == {5 * n}
    assert data["groups"][0]["tokens"] == n
    # " the end the end": the second one can be copied, from within the window
    assert data["earlier"][-1] >= 0
    for i, earlier in enumerate(data["earlier"]):
        if earlier >= 0:
            assert data["ids"][earlier] == data["ids"][i]
            assert data["ids"][earlier - 1] == data["ids"][i - 1]
            assert earlier // data["window"] == i // data["window"]
    # the text is nowhere but in the data, and the data cannot end their script
    assert page.count("<script") == tokens_page.TEMPLATE.read_text("utf-8").count("<script") == 2
    assert "<b>" not in page.split('id="data"')[1].split("</script>")[0]
    # no server, no other file
    template = tokens_page.TEMPLATE.read_text("utf-8")
    assert not re.search(r"(src|href)\s*=|url\(|https?:|import\s|fetch\(", template)

def test_command(trained, here):
    folder, _ = trained
    run = folder / "runs/d2_shared"
    Path("text.txt").write_text(HARD, "utf-8")
    code, out, err = cli("eval_core.py", "--checkpoint", run, "--text", "text.txt", "--eval", "tokens",
                         "--html", "page.html", "--against", run, "--json", "page.json")
    assert code == 0, err
    data = page_json("page.html")
    assert list(data["nats"]) == ["memory", "no memory", "against"]
    assert data["nats"]["against"] == data["nats"]["memory"]
    assert data["nats"]["no memory"] != data["nats"]["memory"]
    assert data["window"] == 32
    n_bytes = sum(token_bytes(load_tokenizer(run))[data["ids"]])
    assert n_bytes == len(HARD.encode())
    groups = json.loads(Path("page.json").read_text())["tokens"]
    assert groups == data["groups"]
    assert "repeated pairs" in out

def test_long_texts_are_cut(trained, here, monkeypatch):
    monkeypatch.setattr("eval_core.MAX_TOKENS", 40)
    Path("text.txt").write_text("def f(x):\n    return x\n" * 20)
    code, out, err = cli("eval_core.py", "--checkpoint", trained[0] / "runs/d2_shared", "--text", "text.txt",
                         "--eval", "tokens", "--html", "page.html")
    assert code == 0, err
    data = page_json("page.html")
    assert len(data["ids"]) == 40
    assert "the first 40 of" in out and "the first 40 of" in data["about"]["text"]

def test_what_cannot_be_compared(trained, data, here):
    run = trained[0] / "runs/d2_shared"
    Path("a.txt").write_text("text")
    tokens = ["eval_core.py", "--checkpoint", run, "--text", "a.txt", "--eval", "tokens"]
    assert_refused(cli(*tokens), "--html FILE")
    assert_refused(cli(*tokens[:3], "--eval", "tokens", "--html", "x.html"), "--text FILE")
    assert_refused(cli(*tokens[:3], "--html", "x.html"), "--html goes with tokens")
    assert_refused(cli(*tokens, "--html", "nowhere/x.html"), "there is no folder nowhere")
    assert_refused(cli(*tokens, "--html", "x.html", "--against", "nowhere"), "nowhere")
    assert_refused(cli(*tokens[:3], "--text", "a.txt", "--data", data), "--data")
    assert not Path("x.html").exists()

def test_contrast_of_the_colours():
    """Text on the strongest blue and orange, and muted text on the page: 4.5 at least (WCAG 2.1, AA)."""
    style = tokens_page.TEMPLATE.read_text("utf-8")
    roots = re.findall(r":root \{(.*?)\}", style, re.S)
    assert len(roots) == 2  # light and dark

    def luminance(color):
        linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    def contrast(one, other):
        light, dark = sorted([luminance(one), luminance(other)], reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for root in roots:
        colors = {name: np.array(list(map(int, rgb.split()))) / 255
                  for name, rgb in re.findall(r"--(\w+): (\d+ \d+ \d+);", root)}
        strength = float(re.search(r"--strength: ([\d.]+);", root)[1])
        for name in ("saves", "costs"):
            background = strength * colors[name] + (1 - strength) * colors["page"]
            assert contrast(colors["text"], background) >= 4.5, (name, root)
        for background in ("page", "panel"):
            assert contrast(colors["muted"], colors[background]) >= 4.5, (background, root)
            assert contrast(colors["text"], colors[background]) >= 7


# -----------------------------------------------------------------------------
# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# what a script at the end of the page sees of it
PROBE = """<script>
const token = i => document.querySelector(`#text [data-i="${i}"]`);
const panel = () => document.getElementById("panel").textContent;
const seen = {
  title: document.title,
  about: document.getElementById("about").textContent,
  tokens: document.querySelectorAll("#text [data-i]").length,
  text: document.getElementById("text").textContent,
  coloured: document.querySelectorAll("#text .saves, #text .costs").length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  width: innerWidth,
};

// by a tap, by keys from there, by the mouse
token(0).click();
seen.first = panel();
token(0).focus();
token(0).dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
seen.walked = document.activeElement.dataset.i;
token(3).click();
seen.tapped = panel();
token(4).dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
seen.pointed = panel();
seen.reachable = document.querySelectorAll("#text [tabindex]").length;

// the slider, from its one end to the other; and the other comparison
const slider = document.getElementById("slider");
const slide = value => {
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  return getComputedStyle(token(4)).backgroundColor;
};
seen.colours = [slide(-3), slide(4)];
const choices = document.querySelectorAll("#switch input");
if (choices.length) choices[1].click();
seen.lead = document.getElementById("lead").textContent;
seen.tile = document.getElementById("tiles").textContent;
parent.postMessage(JSON.stringify(seen), "*");
</script>"""

# Chromium's windows are no narrower than 500 pixels; a frame can be
FRAME = """<script>onmessage = event => { document.body.dataset.probe = event.data; };</script>
<body><iframe src="probed.html" width="WIDTH" height="800" style="border: 0"></iframe></body>"""

def probe(page, folder, width):
    """What PROBE sees of a page in Chromium, in a frame of this width."""
    (folder / "probed.html").write_text(page + PROBE, "utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
             "--disable-background-networking --disable-component-update --dump-dom "
             "--virtual-time-budget=20000 --window-size=1400,900").split()
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", f"file://{folder / 'frame.html'}"],
        capture_output=True, text=True, timeout=240)
    found = re.search(r'data-probe="(.*?)"', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))

@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_chromium(tokenizer, tmp_path):
    """The hard text is text, nothing is wider than the screen, and all that can be done does something."""
    data = make_data(tokenizer, HARD)
    data["nats"]["against"] = [x + 1 for x in data["nats"]["memory"]]
    data["top"]["against"] = data["top"]["memory"]
    data["about"]["labels"]["against"] = "a worse run"
    for group in data["groups"]:
        group["nats"]["against"] = group["nats"]["memory"] + 1
        group["bpb"]["against"] = 9
    page = tokens_page.make_page(data)
    for width in (400, 1200):
        seen = probe(page, tmp_path, width)
        assert seen["title"] == "Where memory helps"
        assert seen["about"] == HARD
        assert seen["tokens"] == seen["coloured"] == len(data["ids"])
        shown = seen["text"].replace("¦", "").replace("·", "").replace("⏎\n", "\n")
        assert shown == HARD
        assert seen["width"] == width
        assert seen["overflow"] <= 0
        # the first byte of an omega, and then the second
        assert "bytes CE" in seen["first"] and "token 1 of" in seen["first"]
        assert seen["walked"] == "1"
        assert "token 4 of" in seen["tapped"]
        assert "token 5 of" in seen["pointed"]
        assert seen["reachable"] == 1
        assert seen["colours"][0] != seen["colours"][1]
        assert "a worse run" in seen["lead"]
        assert seen["tile"].count("saves 1.00 nats") == 3

@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_ten_thousand_tokens_in_chromium(tokenizer, tmp_path):
    words = " ".join(f"word{i % 97}" for i in range(2500))
    data = make_data(tokenizer, words, T=256)
    assert len(data["ids"]) >= 10_000
    page = tokens_page.make_page(data)
    assert len(page) < 4e6
    seen = probe(page, tmp_path, 1200)
    assert seen["tokens"] == len(data["ids"])  # within probe()'s time
