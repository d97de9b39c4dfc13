"""
Where memory helps, token by token: what every token of a text costs a model in several ways (decoding with
its memory, with memory zero, by another run), what it would have predicted there, and one page that shows it.
The command is `eval_core.py --eval tokens`.

The page is tokens_page.html with the figures put into it: one file, which needs no server, no network and no
other script. Edit it like any page: its style and its script are in it.
"""

import codecs
import json
from pathlib import Path

import numpy as np
import torch

from interleave import prefill
from sample import new_cache

TEMPLATE = Path(__file__).resolve().parent / "tokens_page.html"
PLACEHOLDER = "DATA_OF_THE_PAGE"  # stands in the template where the figures go
MAX_TOKENS = 20_000  # on one page: about 3 MB, and a second or two until a browser shows it
TOP = 5  # the likeliest tokens that are kept of every prediction
MAX_LOGITS = 2**24  # that exist at a time


# -----------------------------------------------------------------------------
# Scores of tokens

def earlier_pair(idx, targets):
    """
    Where the pair (idx, target) last stood earlier in its row, so that the target can be copied from there,
    as induction heads do: idx and targets (B, T) int64 -> positions (B, T) int64, -1 where it did not.
    """
    found = []
    for pairs in zip(idx.tolist(), targets.tolist()):
        last = {}  # pair -> where it stood last
        row = []
        for position, pair in enumerate(zip(*pairs)):
            row.append(last.get(pair, -1))
            last[pair] = position
        found.append(row)
    return torch.tensor(found, device=idx.device)

def repeated(idx, targets):
    """Whether the pair (idx, target) stood earlier in its row: idx and targets (B, T) int64 -> bool."""
    return earlier_pair(idx, targets) >= 0

@torch.no_grad()
def score_tokens(model, rows, batch_size, use_memory=True):
    """
    What every target of rows (N, T+1) int64 costs, decoding with the exact recurrence, or with
    use_memory=False with the first memory only, zero by default. Returns three tensors on the CPU: nats
    (N, T) float32; and the TOP likeliest tokens there (N, T, TOP) int64 with their probabilities, float32.
    """
    device = model.wte.weight.device
    top = min(TOP, model.config.vocab_size)
    nats, tokens, probabilities = [], [], []
    for batch in rows.split(batch_size):
        batch = batch.to(device)
        idx = batch[:, :-1]
        hidden, _, _ = prefill(model, idx, new_cache(model, *idx.shape), recurrence=use_memory)
        n = max(MAX_LOGITS // model.config.vocab_size, 1)
        for x, target in zip(hidden.flatten(0, 1).split(n), batch[:, 1:].flatten().split(n)):
            log_p = model.logits(x[None])[0].log_softmax(-1)
            best, best_tokens = log_p.topk(top)
            nats.append(-log_p.gather(1, target[:, None])[:, 0].float().cpu())
            tokens.append(best_tokens.cpu())
            probabilities.append(best.exp().float().cpu())
    shape = len(rows), rows.size(1) - 1
    return (torch.cat(nats).view(shape), torch.cat(tokens).view(*shape, top),
            torch.cat(probabilities).view(*shape, top))

def position_ranges(T):
    """
    Ranges of positions that double, as pairs (first, last): BPB falls with the logarithm of the position.
    """
    edges = [0] + [T >> i for i in range(7, -1, -1) if T >> i]
    return [(low, high - 1) for low, high in zip(edges, edges[1:])]

def summarize(nats, n_bytes, position, again):
    """
    The tables under the text. nats: {way: (n,) float}; n_bytes (n,), of which tokens of 0 bytes (BOS) do not
    count; position (n,), that in the window; again (n,) bool, is its pair repeated(). Returns a list of
    groups, dicts: `name`; `tokens`, how many; `nats` and `bpb`, {way: mean nats a token, bits per byte}.
    """
    text = n_bytes > 0
    groups = [("all tokens", text), ("repeated pairs", text & again), ("new pairs", text & ~again)]
    for first, last in position_ranges(int(position.max()) + 1):
        name = f"position {first}" if first == last else f"positions {first} to {last}"
        groups.append((name, text & (position >= first) & (position <= last)))
    found = []
    for name, chosen in groups:
        if not chosen.any():
            continue
        sums = {way: float(x[chosen].sum(dtype=np.float64)) for way, x in nats.items()}
        bits_per_nat_and_byte = 1 / (np.log(2) * n_bytes[chosen].sum())
        found.append(dict(
            name=name,
            tokens=int(chosen.sum()),
            nats={way: x / int(chosen.sum()) for way, x in sums.items()},
            bpb={way: x * bits_per_nat_and_byte for way, x in sums.items()},
        ))
    return found


# -----------------------------------------------------------------------------
# Tokens as a reader sees them

# what has no shape of its own, in the names of tokens
VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}

def token_bytes_of(tokenizer, token):
    """The bytes of a token; none where an encoding leaves the id unused."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""

def token_name(raw):
    """How a token is called: its text, with spaces and newlines made visible; bytes in hex if it is none."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:  # a part of a character
        return "bytes " + raw.hex(" ").upper()
    name = ""
    for character in text:
        if character in VISIBLE:
            name += VISIBLE[character]
        elif character.isprintable():
            name += character
        else:
            name += f"U+{ord(character):04X}"
    return name

def pieces(tokenizer, ids, bos):
    """
    The text that each token adds: a list of str, as long as ids. A character that is split over tokens is
    that of the last of them; the others add "". BOS, which begins another document, adds "".
    """
    found = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if token == bos:
            decoder.reset()
            found.append("")
        else:
            found.append(decoder.decode(token_bytes_of(tokenizer, token)))
    return found


# -----------------------------------------------------------------------------
# The page

def page_data(tokenizer, rows, n_tokens, bos, ways, n_bytes, about):
    """
    All figures of the page, as JSON takes them. rows (N, T+1) int64, T apart, of which the first n_tokens
    targets are text and the rest is padding; ways: {name: what score_tokens() returned}, `memory` the first;
    n_bytes (V,): bytes of each token; about: what else the page says, a dict of str.
    """
    N, T = len(rows), rows.size(1) - 1
    ids = rows[:, 1:].flatten()[:n_tokens]
    earlier = earlier_pair(rows[:, :-1], rows[:, 1:])
    starts = torch.arange(N)[:, None] * T
    # counted from the first token of the text on, not from that of the row
    earlier = torch.where(earlier >= 0, earlier + starts, -1).flatten()[:n_tokens]

    nats = {way: x.flatten()[:n_tokens].numpy() for way, (x, _, _) in ways.items()}
    position = np.arange(n_tokens) % T
    groups = summarize(nats, np.asarray(n_bytes)[ids.numpy()], position, earlier.numpy() >= 0)

    top, used = {}, set(ids.tolist())
    for way, (_, tokens, probabilities) in ways.items():
        tokens = tokens.flatten(0, 1)[:n_tokens]
        per_mille = (1000 * probabilities.flatten(0, 1)[:n_tokens]).round().int()
        top[way] = dict(tokens=tokens.flatten().tolist(), per_mille=per_mille.flatten().tolist())
        used |= set(tokens.flatten().tolist())

    names = {}
    for token in sorted(used):
        names[token] = "end of document" if token == bos else token_name(token_bytes_of(tokenizer, token))
    return dict(
        about=about,
        window=T,
        bos=bos,
        top_size=next(iter(ways.values()))[1].size(-1),
        names=names,
        ids=ids.tolist(),
        text=pieces(tokenizer, ids.tolist(), bos),
        earlier=earlier.tolist(),
        nats={way: [round(float(x), 3) for x in column] for way, column in nats.items()},
        top=top,
        groups=groups,
    )

def make_page(data):
    """The page, a str: the template with the data in it, spelled so that no text can end the script tag."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    before, after = TEMPLATE.read_text("utf-8").split(PLACEHOLDER)
    return before + text + after
