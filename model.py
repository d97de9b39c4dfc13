"""
The Latent Recurrent Transformer (LRT, arXiv 2605.26797) on a nanochat-style GPT backbone, all of it in this file.

A plain GPT computes a high-level hidden state for every token and throws it away. Here the hidden state of token
t-1 after `source_layer`, its memory m_{t-1}, is handed to token t. With norm the parameter-free RMSNorm, D the width,
G the key/value heads, and zero memory before the first token:

    h = norm(embed(token_t));  x0 = h
    per layer l:
      h = a_l * h + b_l * x0 + c_l * m_{t-1}                        (1) residual injection: resid_, x0_, mem_lambdas
      u = norm(h);  g_loc, g_mem, g_tok = 2 * sigmoid(u @ Wg_l)         a gate a head, each (G,)
      q = u @ Wq_l
      k = g_loc * (u @ Wk_l) + g_mem * (m_{t-1} @ Rk)               (2) KV projection of the memory
      v = g_loc * (u @ Wv_l) + g_mem * (m_{t-1} @ Rv) + g_tok * value_embed_l[token_t]
      q, k = norm(rotate(q, t)), norm(rotate(k, t))                     per head
      h = h + attention(q, k, v) @ Wo_l                                 causal, scale 1/sqrt(head size), optional window
      h = h + relu(norm(h) @ W1_l)**2 @ W2_l
    logits = 15 * tanh(norm(h) @ Wu / 15);   m_t = norm(h after the source layer)   (3)

lrt="shared" has one Rk and Rv for all layers, "layerwise" one a layer; "none" is the baseline, with no m, g_loc, g_mem.

There is ONE forward. It computes the positions it is given, writes their fresh keys and values into a store, and
attends to what the store then holds. Training passes, subsets, decoding steps and prefill differ only in the
positions and in the store (attention.KVBuffer: autograd flows through it; KVCache: preallocated, written in place).
Position sets are plain Python ranges: range(T) is a full pass, range(i, T, S) a subset, range(t, t + 1) a decoding
step. Which sets run in which order is interleave.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads: n_head / n_kv_head query heads share one
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers: L sees everything, S half the context; the last layer is L
    value_embeds: str = "all"  # none | alternate (every other layer, the last one included) | all
    lrt: str = "none"  # none: plain GPT | shared: one memory projection for all layers | layerwise: one a layer
    source_layer: int | None = None  # 0-based: memory is read after this block; None: upper-middle, 3/4 of the way up
    inject: str = "both"  # how memory enters: kv | residual | both
    memory_init: float = 0.1  # c of equation (1) at the start
    arch: str = "gpt"  # gpt | recurrent: layers attend to keys and values of their own outputs, see recurrent.py

    def __post_init__(self):
        """Raises ValueError, in one line, for a model that cannot be built."""
        def check(ok, message):
            if not ok:
                raise ValueError(message)
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        check(self.n_embd % self.n_head == 0, f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        check(self.n_embd // self.n_head % 2 == 0, f"head size {self.n_embd // self.n_head} is odd: rotary needs pairs")
        check(self.n_head % self.n_kv_head == 0, f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        check(self.window_pattern and set(self.window_pattern) <= set("SL"),
              f"window_pattern {self.window_pattern!r} must be made of the letters S and L")
        for name, allowed in (("value_embeds", ("none", "alternate", "all")), ("lrt", ("none", "shared", "layerwise")),
                              ("inject", ("kv", "residual", "both")), ("arch", ("gpt", "recurrent"))):
            check(getattr(self, name) in allowed, f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        check(math.isfinite(self.memory_init), f"memory_init must be a number, not {self.memory_init}")
        check(self.arch == "gpt" or self.lrt == "none", f"arch recurrent goes with lrt none, not with {self.lrt}: one recurrence at a time")
        if self.source_layer is None:  # the paper finds an upper-middle layer strongest
            self.source_layer = max(round(0.75 * self.n_layer) - 1, 0)
        check(0 <= self.source_layer < self.n_layer,
              f"source_layer {self.source_layer} is out of range: {self.n_layer} layers are numbered 0 to {self.n_layer - 1}")

    @property
    def label(self):
        """What the scripts call a model of this kind."""
        return f"lrt={self.lrt}" if self.arch == "gpt" else self.arch

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_memory(self):
        """Is memory projected into keys and values?"""
        return self.lrt != "none" and self.inject != "residual"

    @property
    def residual_memory(self):
        """Is memory added to the residual stream?"""
        return self.lrt != "none" and self.inject != "kv"

    def window(self, layer):
        """How many positions back a query of `layer` sees beside its own; sequence_len: everything."""
        letter = "L" if layer == self.n_layer - 1 else self.window_pattern[layer % len(self.window_pattern)]
        return self.sequence_len if letter == "L" else self.sequence_len // 2

    def has_value_embed(self, layer):
        return self.value_embeds == "all" or (self.value_embeds == "alternate" and (self.n_layer - 1 - layer) % 2 == 0)


# -----------------------------------------------------------------------------
# Small parts

def norm(x):
    """RMSNorm over the last axis, no parameters."""
    return F.rms_norm(x, (x.size(-1),))

def rotate(x, cos, sin):
    """
    Rotary embedding of x (B, P, heads, d): halves (a, b) of a head become (a*cos + b*sin, b*cos - a*sin). The tables
    (P, 1, d) hold (cos, cos) and (sin, -sin). Keeps x's dtype.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(x.dtype)

def take(x, positions, dim=1):
    """The slice of x at a range of positions: a view."""
    index = (slice(None),) * dim + (slice(positions.start, positions.stop, positions.step),)
    return x[index]

def visible(positions, window, device):
    """
    The attention mask of queries at `positions` over keys 0 .. positions[-1], True where p - window <= key <= p, as
    (mask (P, keys) bool or None, is_causal, first key): the leanest form that SDPA takes.
    """
    last = positions[-1]
    if len(positions) == 1:  # a decoding step sees all the keys it is handed
        return None, False, max(last - window, 0)
    if positions == range(last + 1) and window >= last:
        return None, True, 0
    first = max(positions[0] - window, 0)
    q = torch.arange(positions.start, positions.stop, positions.step, device=device)[:, None]
    k = torch.arange(first, last + 1, device=device)[None, :]
    return (k <= q) & (k >= q - window), False, first

class Linear(nn.Linear):
    """No bias; the fp32 master weight is used in the dtype of the activations."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


# -----------------------------------------------------------------------------
# The key/value store of inference; that of training is attention.KVBuffer. attend() takes the fresh keys and values
# (B, n_kv_head, P, d) of one layer, writes them, and lets the queries (B, n_head, P, d) see all that the layer then holds.

class KVCache:
    """
    Preallocated store for inference, written in place: the standard cache, (B, n_kv_head, length, d) a layer.
    rolling: layers with a window keep only that window, position p in slot p mod size; one position is written a time.
    start (B,) int64: the position at which each row's text starts, for rows of different lengths aligned at their ends
    (rotary embedding is relative, so a row may start anywhere); None: all start at 0.
    """

    def __init__(self, config, batch_size, length, device, dtype, rolling=False, start=None):
        self.length, self.start, self.local, self.masks = length, start, None, {}
        self.first = 0 if start is None else int(start.max())  # rows that start earlier end earlier
        self.size = {w: min(length, w + 1) if rolling else length for w in map(config.window, range(config.n_layer))}
        shapes = [(batch_size, config.n_kv_head, self.size[config.window(l)], config.head_dim) for l in range(config.n_layer)]
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]

    def write(self, layer, positions, k, v):
        if positions[-1] >= self.k[layer].size(2):  # around the end of a rolling layer
            slot = positions[-1] % self.k[layer].size(2)
            positions = range(slot, slot + 1)
        take(self.k[layer], positions, dim=2).copy_(k)
        take(self.v[layer], positions, dim=2).copy_(v)

    def attend(self, layer, positions, q, k, v, window):
        self.write(layer, positions, k, v)
        if (positions, window) not in self.masks:  # one for all layers of a pass
            self.masks = {key: mask for key, mask in self.masks.items() if key[0] == positions}
            self.masks[positions, window] = self.visible(positions, window, q.device)
        mask, is_causal, first = self.masks[positions, window]
        k, v = (x[layer][:, :, first:positions[-1] + 1] for x in (self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))

    def visible(self, positions, window, device):
        """The mask of a pass, as the function above, for what this store holds."""
        size, last = self.size[window], positions[-1]
        if self.start is None:
            mask, is_causal, first = visible(positions, window, device)
            return mask, is_causal, first if size == self.length else 0  # a rolling layer holds nothing but its window
        first = max(positions[0] - window, 0) if size == self.length else 0
        slots = torch.arange(first, min(last + 1, size), device=device)
        k = last - (last - slots) % size if size < self.length else slots
        q = torch.arange(positions.start, positions.stop, positions.step, device=device)[:, None]
        mask = (k <= q) & (k >= q - window) & (k >= self.start[:, None, None]) | (k == q)  # padding sees itself: no empty rows
        return mask[:, None], False, first

    def copy_from(self, other, n, repeats):
        """Take over positions 0 .. n-1 of a cache that is not rolling, every row `repeats` times."""
        for mine, theirs in zip(self.k + self.v, other.k + other.v):
            kept = torch.arange(max(n - mine.size(2), 0), n, device=mine.device)
            mine[:, :, kept % mine.size(2)] = theirs[:, :, kept].repeat_interleave(repeats, dim=0)


# -----------------------------------------------------------------------------
# The model

class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        D, self.layer, self.head_dim = config.n_embd, layer, config.head_dim
        self.n_head, self.n_kv_head, self.kv_memory = config.n_head, config.n_kv_head, config.kv_memory
        self.c_q = Linear(D, D)
        self.c_k = Linear(D, self.n_kv_head * self.head_dim)
        self.c_v = Linear(D, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(D, D)
        # one gate a key/value head for each source of keys and values: local and memory (LRT), token (value embedding)
        n_gates = 2 * config.kv_memory + config.has_value_embed(layer)
        self.gate = Linear(D, n_gates * self.n_kv_head) if n_gates else None

    def local_kv(self, u, value_embed):
        """
        Equation (2) without its memory term, before rotation: u (B, P, D), value_embed (B, P, G*d) or
        None -> k, v (B, P, G, d) and the memory's gate g_mem (B, P, G, 1), None without KV memory.
        """
        heads = u.shape[:2] + (self.n_kv_head, self.head_dim)
        k, v, g_mem = self.c_k(u).view(heads), self.c_v(u).view(heads), None
        if self.gate is not None:
            gates = 2 * torch.sigmoid(self.gate(u)).unsqueeze(-1)
            if self.kv_memory:
                g_loc, g_mem, gates = gates[:, :, :self.n_kv_head], gates[:, :, self.n_kv_head:2 * self.n_kv_head], \
                    gates[:, :, 2 * self.n_kv_head:]
                k, v = g_loc * k, g_loc * v
            if value_embed is not None:
                v = torch.addcmul(v, gates, value_embed.view(heads))
        return k, v, g_mem

    def finish_kv(self, k, v, g_mem, memory_kv, rotary):
        """Add the memory term, rotate and norm: the keys and values to be stored, (B, G, P, d)."""
        if memory_kv is not None:
            k = torch.addcmul(k, g_mem, memory_kv[0].view(k.shape))
            v = torch.addcmul(v, g_mem, memory_kv[1].view(v.shape))
        return norm(rotate(k, *rotary)).transpose(1, 2), v.transpose(1, 2)

    def query(self, u, rotary):
        """u (B, P, D) -> queries (B, H, P, d), rotated and normed."""
        return norm(rotate(self.c_q(u).view(*u.shape[:2], self.n_head, self.head_dim), *rotary)).transpose(1, 2)

    def forward(self, u, value_embed, memory_kv, rotary, positions, window, kv):
        B, P, D = u.shape
        local = self.local_kv(u, value_embed)
        if kv.local is not None and kv.local[self.layer] is None:
            kv.local[self.layer] = local
        y = kv.attend(self.layer, positions, self.query(u, rotary), *self.finish_kv(*local, memory_kv, rotary), window)
        return self.c_proj(y.transpose(1, 2).reshape(B, P, D))

class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())

class Block(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, h, *attn_args):
        h = h + self.attn(norm(h), *attn_args)
        return h + self.mlp(norm(h))

class HeadLoss(torch.autograd.Function):
    """
    Output head, softcap and cross-entropy of all passes, some rows at a time: the logits of a pass never exist at once,
    nor are they computed twice, because the forward goes on to the gradients, of a unit loss, while it has them.
    With t = tanh(x @ W.T / 15), |logit| = |15 t| <= 15, so exp needs no maximum taken off, and d logit / d(x @ W.T) = 1 - t^2.
    """

    @staticmethod
    def rows(x):
        """How many at a time: what stays in a CPU's cache, and what fills a GPU."""
        return 256 if x.device.type == "cpu" else 4096

    @staticmethod
    def forward(ctx, weight, targets, weights, *hidden):
        w, grads, means = weight.to(hidden[0].dtype), [], []
        dw = torch.zeros_like(weight)
        for x, target, scale in zip(hidden, targets, weights):
            x, target, losses = x.flatten(0, 1), target.flatten(), []
            dx = torch.empty_like(x)
            for x_i, y, dx_i in zip(*(z.split(HeadLoss.rows(x)) for z in (x, target, dx))):
                t = F.linear(x_i, w)
                t = t.to(torch.promote_types(t.dtype, torch.float32)).div_(15).tanh_()
                p = (15 * t).exp_()
                total, valid = p.sum(-1, keepdim=True), (y >= 0).unsqueeze(1)
                y = y.clamp(min=0).unsqueeze(1)
                losses.append((total.log() - 15 * t.gather(1, y)) * valid)
                unit = valid.to(p.dtype) * (scale / len(target))
                p.mul_(unit / total).scatter_add_(1, y, -unit)  # d loss / d logits
                p = p.mul_(t.square_().neg_().add_(1)).to(x.dtype)
                torch.mm(p, w, out=dx_i)
                dw += p.T @ x_i
            grads.append(dx)
            means.append(torch.cat(losses).mean())
        means = torch.stack(means)
        ctx.shapes = [x.shape for x in hidden]
        ctx.save_for_backward(dw, *grads)
        ctx.mark_non_differentiable(means)
        return (means * means.new_tensor(weights)).sum(), means

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        dw, *grads = ctx.saved_tensors
        return dw * grad, None, None, *(dx.view(shape) * grad.to(dx.dtype) for dx, shape in zip(grads, ctx.shapes))

class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # dtype of the activations; None: that of the weights
        self.recompute = False  # activation checkpointing: save a layer's input only, and run it again in the backward
        D, L, V, kv_dim = config.n_embd, config.n_layer, config.vocab_size, config.n_kv_head * config.head_dim
        self.wte = nn.Embedding(V, D)
        self.value_embeds = nn.ModuleDict({str(l): nn.Embedding(V, kv_dim) for l in range(L) if config.has_value_embed(l)})
        block = Block
        if config.arch == "recurrent":
            from recurrent import RecurrentBlock as block  # here, as it builds on this file
        self.h = nn.ModuleList(block(config, l) for l in range(L))
        self.lm_head = Linear(D, V)
        # a, b and c of equation (1)
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.full((L,), 0.1))
        self.mem_lambdas = nn.Parameter(torch.full((L,), config.memory_init)) if config.residual_memory else None
        # Rk and Rv of equation (2): one pair in all (shared) or one a layer (layerwise)
        n_pairs = {"none": 0, "shared": 1, "layerwise": L}[config.lrt] * config.kv_memory
        self.mem_k = nn.ModuleList(Linear(D, kv_dim) for _ in range(n_pairs))
        self.mem_v = nn.ModuleList(Linear(D, kv_dim) for _ in range(n_pairs))
        frequencies = 10000.0 ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
        # twice the context: a row that is padded on the left ends further to the right
        angles = torch.outer(torch.arange(2 * config.sequence_len, dtype=torch.float32), frequencies)[:, None]
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)  # (2 * sequence_len, 1, head_dim)
        self.register_buffer("sin", torch.cat([angles.sin(), -angles.sin()], -1), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """As the LRT release: output projections and gates start at zero, so every block starts as the identity."""
        bound = math.sqrt(3 / self.config.n_embd)  # uniform with standard deviation 1/sqrt(D)
        for name, module in self.named_modules():
            if isinstance(module, (Linear, nn.Embedding)):
                if name.endswith(("c_proj", "gate")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.uniform_(module.weight, -bound, bound)
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)

    def memory_kv(self, memory, n_layer):
        """Rk and Rv applied to memory (B, P, D) once a pass, for the first n_layer layers: a list of as many pairs (B, P, G*d)."""
        if memory is None or not self.config.kv_memory:
            return [None] * n_layer
        pairs = [(k(memory), v(memory)) for k, v in list(zip(self.mem_k, self.mem_v))[:n_layer]]
        return pairs if self.config.lrt == "layerwise" else pairs * n_layer

    def embed(self, idx):
        """
        All that is looked up by token: idx (B, P) int64 -> x0 (B, P, D), and a tuple of every layer's value embedding
        (B, P, G*d), None where a layer has none.
        """
        dtype = self.compute_dtype or self.wte.weight.dtype
        value_embeds = (self.value_embeds[str(l)](idx).to(dtype) if self.config.has_value_embed(l) else None for l in range(self.config.n_layer))
        return norm(self.wte(idx).to(dtype)), tuple(value_embeds)

    def forward(self, idx, positions, kv, memory=None, n_layer=None, embedded=None):
        """
        The one forward, equations (1) to (3).
        idx (B, P) int64: the tokens at `positions`, a range of length P within the context.
        kv: KVBuffer or KVCache. Keys and values of `positions` are written; the queries see all positions up to their
        own, so the store must hold those, from earlier calls or from this one.
        memory (B, P, D): m_{t-1} for every t in positions; None: zero, and its projections are not computed.
        n_layer: stop after this many layers, at least up to the source layer; all that memory depends on is done then.
        embedded: embed(idx), where a caller has it from an earlier pass over the same tokens.
        Returns hidden (B, P, D), the normed output of the last layer, to be passed to logits() or token_loss(), and
        source (B, P, D), the memory m_t of every position. Raises ValueError beyond the context.
        """
        config = self.config
        if positions[-1] - kv.first >= config.sequence_len:
            raise ValueError(f"position {positions[-1] - kv.first} is beyond the context of {config.sequence_len} tokens")
        rotary = take(self.cos, positions, dim=0), take(self.sin, positions, dim=0)
        n_layer = n_layer or config.n_layer
        memory_kv = self.memory_kv(memory, n_layer)
        x0, value_embeds = embedded or self.embed(idx)
        abc = [x.to(x0.dtype).unbind() for x in (self.resid_lambdas, self.x0_lambdas, self.mem_lambdas) if x is not None]
        h = x0
        for l in range(n_layer):
            args = l, [x[l] for x in abc], h, x0, value_embeds[l], memory, memory_kv[l], rotary, positions
            if self.recompute and torch.is_grad_enabled():
                stores = [kv]  # the run in the backward gets a copy: what it writes must not stay
                h = checkpoint(lambda *args, stores=stores: self.layer(*args, stores.pop() if stores else kv.copy()), *args, use_reentrant=False)
            else:
                h = self.layer(*args, kv)
            if l == config.source_layer:
                source = norm(h)
        return norm(h), source

    def layer(self, l, abc, h, x0, value_embed, memory, memory_kv, rotary, positions, kv):
        """Equations (1), abc its scalars, and (2) of layer l and the rest of its block: h (B, P, D) -> (B, P, D)."""
        h = torch.addcmul(abc[0] * h, abc[1], x0)
        if memory is not None and self.config.residual_memory:
            h = torch.addcmul(h, abc[2], memory)
        return self.h[l](h, value_embed, memory_kv, rotary, positions, self.config.window(l), kv)

    def refresh(self, positions, kv, memory):
        """
        KV refresh, an option of interleaved training: rewrite the keys and values at `positions` with a new memory (B, P, D), the
        local parts and gates staying those of the first pass over all positions (kv made with keep_local=True).
        """
        rotary = take(self.cos, positions, dim=0), take(self.sin, positions, dim=0)
        for l, (block, memory_kv) in enumerate(zip(self.h, self.memory_kv(memory, self.config.n_layer))):
            local = [take(x, positions) for x in kv.local[l]]
            kv.write(l, positions, *block.attn.finish_kv(*local, memory_kv, rotary))

    def logits(self, hidden):
        """hidden (B, P, D) -> logits (B, P, vocab_size) in float32 (or wider), softly capped at +-15; equation (3)."""
        logits = self.lm_head(hidden)
        return 15 * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / 15)

    def token_loss(self, hidden, targets):
        """Cross-entropy in nats of every position: hidden (B, P, D), targets (B, P) int64 -> (B, P); targets -1 give 0."""
        rows = HeadLoss.rows(hidden)
        losses = [F.cross_entropy(self.logits(x), y, ignore_index=-1, reduction="none")
                  for x, y in zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows))]
        return torch.cat(losses).view(targets.shape)

    def loss(self, hidden, targets, weights):
        """
        The training loss, equation (4): the sum over passes of weights[i] (floats) times the mean cross-entropy of
        hidden[i] (B, P_i, D) against targets[i] (B, P_i) int64 (targets -1 count 0), and these means (passes,), detached. Nats.
        """
        return HeadLoss.apply(self.lm_head.weight, targets, weights, *hidden)

    # -------------------------------------------------------------------------
    # Counting

    def parameter_groups(self):
        """The parameters by role: a dict of lists; every parameter is in exactly one."""
        groups = {
            "embedding": list(self.wte.parameters()),
            "value embeddings": list(self.value_embeds.parameters()),
            "head": list(self.lm_head.parameters()),
            "matrices": [p for n, p in self.h.named_parameters() if "gate" not in n],
            "gates": [p for n, p in self.h.named_parameters() if "gate" in n],
            "memory projections": list(self.mem_k.parameters()) + list(self.mem_v.parameters()),
            "residual scalars": [self.resid_lambdas],
            "x0 scalars": [self.x0_lambdas],
            "memory scalars": [self.mem_lambdas] if self.mem_lambdas is not None else [],
        }
        assert sum(map(len, groups.values())) == len(list(self.parameters()))
        return groups

    def parameter_counts(self):
        """Number of parameters by group, plus `total` and `scaling`: the matrices and head that tokens a parameter count."""
        counts = {name: sum(p.numel() for p in params) for name, params in self.parameter_groups().items()}
        total = sum(counts.values())
        scaling = counts["matrices"] + counts["gates"] + counts["memory projections"] + counts["head"]
        return counts | {"total": total, "scaling": scaling}

    def flops_per_token(self, T=None, n_layer=None, head=True):
        """
        Training FLOPs (forward and backward) per token of one plain pass over T tokens (default: the context), of its first
        n_layer layers (default: all), with or without the head. Schedule.flops_per_token() adds up several passes.
        A matrix entry costs 6 FLOPs a position, and attention 12 * width * keys in the window (PaLM, arXiv 2204.02311,
        appendix B, causality not counted off); a recurrent layer has a second key/value projection, and what its backward
        pass recomputes is not counted.
        """
        T, layers = T or self.config.sequence_len, self.h[:n_layer]
        entries = sum(p.numel() for p in layers.parameters()) + head * self.lm_head.weight.numel()
        if self.config.arch == "recurrent":  # keys, values and their gate, once more from the layer's output
            entries += sum(m.weight.numel() for block in layers for m in (block.attn.c_k, block.attn.c_v, block.attn.gate) if m is not None)
        keys = sum(min(self.config.window(l) + 1, T) for l in range(len(layers)))
        return 6 * entries + 12 * self.config.n_embd * keys
