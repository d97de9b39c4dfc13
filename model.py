"""
The Latent Recurrent Transformer (LRT, arXiv 2605.26797) on a nanochat-style GPT backbone.

A plain GPT computes a high-level hidden state for every token and then throws it away. Here the hidden state
of token t-1 after `source_layer`, its memory m_{t-1}, is handed to token t. With norm the parameter-free
RMSNorm, D the width, G the key/value heads, and zero memory before the first token:

    h = norm(embed(token_t));  x0 = h
    per layer l:
      h = a_l * h + b_l * x0 + c_l * m_{t-1}                    (1) residual injection of the memory
      u = norm(h);  g_loc, g_mem, g_tok = 2 * sigmoid(u @ Wg_l)     a gate for each key/value head, (G,) each
      q = u @ Wq_l
      k = g_loc * (u @ Wk_l) + g_mem * (m_{t-1} @ Rk)           (2) KV projection of the memory
      v = g_loc * (u @ Wv_l) + g_mem * (m_{t-1} @ Rv) + g_tok * value_embed_l[token_t]
      q, k = norm(rotate(q, t)), norm(rotate(k, t))                 per head
      h = h + attention(q, k, v) @ Wo_l                             causal, scale 1/sqrt(d), optional window
      h = h + relu(norm(h) @ W1_l)**2 @ W2_l
    logits = 15 * tanh(norm(h) @ Wu / 15);   m_t = norm(h after the source layer)   (3)

lrt="shared" has one Rk and one Rv for all layers, "layerwise" one of each per layer. lrt="none" is the
baseline, without m, g_loc and g_mem. memory="embedding" is the control: it hands on norm(embed(token_t))
instead of m_t, so it has the same parameters and the same path, and no recurrence. inject="input" adds memory
to the input instead, as full-bandwidth transformers do (arXiv 2608.08888):

    x0 = norm(embed(token_t)) + sigmoid(norm(embed(token_t)) @ Wg) * (m_{t-1} @ Wu)

This is the backbone of the LRT release. nanochat, which that was forked from, has moved on:
NANOCHAT_BACKBONE in recipes.py has the choices of its code of 2026-07-03. Memory enters either backbone the
same way. What differs in form, with e_t = norm(embed(token_t)), scalars s and r, and h_mid = h after layer
L // 2:

    x0 = e_t + s * sigmoid(e_t[:24] @ Ws) * e_{t-1}               smear
    g_loc, g_mem, g_tok = 2, 2, 3 * sigmoid(u[:12] @ Wg_l)        narrow gates, g_tok on every other layer
    h = h + attention(1.2 * q, 1.2 * k, v) @ Wo_l
    logits = 15 * tanh(norm(h - r * h_mid) @ Wu / 15)             backout

There is ONE forward. It computes the positions it is given, writes their fresh keys and values into a store,
and attends to what the store then holds. A training pass, a subset of it, a decoding step and a prefill
differ only in the positions and in the store (attention.py). Positions are plain Python ranges: range(T) is
a full pass, range(i, T, S) one of S subsets, range(t, t + 1) a decoding step. Which of them are run, and in
which order, is the subject of interleave.py.

Shapes are written with B sequences, P positions, D = n_embd, H = n_head, G = n_kv_head, d = D / H.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from attention import take

SMEAR_CHANNELS = 24  # of an embedding are read by the gate of smear
HAS_ONEDNN = torch.backends.mkldnn.is_available()


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads: n_head / n_kv_head query heads share one
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers: S sees a part of the context, L and the last all
    short_window: str = "half"  # what S sees: half the context | quarter (up to a multiple of 128 positions)
    value_embeds: str = "all"  # none | alternate (every other layer, the last one included) | all
    lrt: str = "none"  # none: plain GPT | shared: one memory projection for all | layerwise: one a layer
    source_layer: int | None = None  # 0-based: memory is read after this layer; None: 3/4 of the way up
    inject: str = "both"  # how memory enters: kv | residual | both | input
    dest_layers: list | None = None  # [first, last] layer that memory enters by kv or residual; None: all
    memory: str = "hidden"  # what is handed on: hidden (m_t of equation 3) | embedding (x0_t: no recurrence)
    first_memory: str = "zero"  # what is read before any pass has computed it: zero | embedding (x0_{t-1})
    memory_init: float = 0.1  # c of equation (1) at the start
    smear: bool = False  # add a gated part of the previous token's embedding to that of each token
    backout: bool = False  # take a part of the middle layer's output off that of the last
    gate_channels: int | None = None  # gates read so many channels of their input; None: all
    value_gate: float = 2.0  # the largest value of g_tok
    query_scale: float = 1.0  # queries are multiplied by it after their norm
    rotary_base: float = 10000.0
    init: str = "release"  # initial values: release | nanochat, see GPT.init_weights

    def __post_init__(self):
        """Raises ValueError, in one line, for a model that cannot be built."""
        def check(ok, message):
            if not ok:
                raise ValueError(message)

        def check_choice(name, *choices):
            value = getattr(self, name)
            check(value in choices, f"{name} {value!r} is none of {', '.join(choices)}")

        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            value = getattr(self, name)
            check(value >= 1, f"{name} must be at least 1, not {value}")
        check(self.n_embd % self.n_head == 0,
              f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        check(self.head_dim % 2 == 0, f"head size {self.head_dim} is odd: rotary needs pairs")
        check(self.n_head % self.n_kv_head == 0,
              f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        check(self.window_pattern and set(self.window_pattern) <= set("SL"),
              f"window_pattern {self.window_pattern!r} must be made of the letters S and L")
        check_choice("short_window", "half", "quarter")
        check_choice("value_embeds", "none", "alternate", "all")
        check_choice("lrt", "none", "shared", "layerwise")
        check_choice("inject", "kv", "residual", "both", "input")
        check_choice("memory", "hidden", "embedding")
        check_choice("first_memory", "zero", "embedding")
        check(self.first_memory == "zero" or self.lrt != "none", "first_memory embedding goes with an LRT")
        check(self.memory == "hidden" or self.first_memory == "embedding",
              "memory embedding goes with first_memory embedding: there is no other memory to begin with")
        check(math.isfinite(self.memory_init), f"memory_init must be a number, not {self.memory_init}")
        check(abs(self.memory_init) <= 1e6, f"memory_init {self.memory_init} is larger than 1000000")
        check_choice("init", "release", "nanochat")
        check(not self.smear or self.n_embd >= SMEAR_CHANNELS,
              f"smear reads {SMEAR_CHANNELS} channels, n_embd is only {self.n_embd}")
        if self.gate_channels is not None:
            check(1 <= self.gate_channels <= self.n_embd,
                  f"gate_channels {self.gate_channels} is out of range: n_embd is {self.n_embd}")
        for name in ("value_gate", "query_scale", "rotary_base"):
            value = getattr(self, name)
            check(0 < value < math.inf, f"{name} must be a positive number, not {value}")
        if self.source_layer is None:  # the paper finds an upper-middle layer strongest
            self.source_layer = max(round(0.75 * self.n_layer) - 1, 0)
        check(0 <= self.source_layer < self.n_layer,
              f"source_layer {self.source_layer} is out of range: "
              f"{self.n_layer} layers are numbered 0 to {self.n_layer - 1}")
        if self.dest_layers is not None:
            check(self.lrt != "none", "dest_layers go with an LRT")
            check(self.inject != "input", "dest_layers do not go with inject input: it is below all layers")
            first, last = self.dest_layers
            check(0 <= first <= last < self.n_layer,
                  f"dest_layers {first} {last} are no range of the layers 0 to {self.n_layer - 1}")

    @property
    def label(self):
        """What the scripts call a model of this kind."""
        return f"lrt={self.lrt}" if self.memory == "hidden" else f"lrt={self.lrt} without recurrence"

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def recurrent_memory(self):
        """Does a token's memory depend on the memory of the token before it?"""
        return self.lrt != "none" and self.memory == "hidden"

    @property
    def kv_memory(self):
        """Is memory projected into keys and values?"""
        return self.lrt != "none" and self.inject in ("kv", "both")

    @property
    def residual_memory(self):
        """Is memory added to the residual stream?"""
        return self.lrt != "none" and self.inject in ("residual", "both")

    @property
    def input_memory(self):
        """Is memory added to the input of the first layer?"""
        return self.lrt != "none" and self.inject == "input"

    @property
    def memory_layers(self):
        """The range of layers that memory enters by keys and values or by the residual stream."""
        if self.dest_layers is None:
            return range(self.n_layer)
        first, last = self.dest_layers
        return range(first, last + 1)

    def window(self, layer):
        """How many positions back a query of `layer` sees beside its own; sequence_len means all of them."""
        if layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return self.sequence_len
        if self.short_window == "half":
            return self.sequence_len // 2
        quarter = math.ceil(self.sequence_len / 4 / 128) * 128
        return min(quarter, self.sequence_len)

    def has_value_embed(self, layer):
        if self.value_embeds == "alternate":
            return (self.n_layer - 1 - layer) % 2 == 0
        return self.value_embeds == "all"


# -----------------------------------------------------------------------------
# The layers

def norm(x):
    """RMSNorm over the last axis, without parameters."""
    return F.rms_norm(x, (x.size(-1),))

def rotate(x, cos, sin):
    """
    Rotary embedding of x (B, P, heads, d), in x's dtype: the halves (a, b) of a head become
    (a*cos + b*sin, b*cos - a*sin). The tables (P, 1, d) hold (cos, cos) and (sin, -sin).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(x.dtype)

def product(x, weight):
    """x (.., n_in) times the transposed weight (n_out, n_in): (.., n_out)."""
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if HAS_ONEDNN and is_plain and x.device.type == "cpu" and x.dtype == torch.float32:
        # oneDNN's products of some rows are faster than BLAS's, which torch prefers, but slower to begin, and
        # very slow with a part of the rows of packed weights. Inductor only takes its own calls of it.
        n_rows = x.numel() // x.size(-1)
        is_dense = weight.is_contiguous() or weight.t().is_contiguous()
        if n_rows > 2 and n_rows * weight.numel() >= 2**22 and is_dense:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)

def rotary_tables(config):
    """
    What rotate() multiplies with, (cos, cos) and (sin, -sin) at every position: two tensors (2 *
    sequence_len, 1, d) float32, because a row that is padded on its left ends beyond the context.
    """
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = config.rotary_base ** (-channels / config.head_dim)
    positions = torch.arange(2 * config.sequence_len, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)[:, None]
    cos = torch.cat([angles.cos(), angles.cos()], -1)
    sin = torch.cat([angles.sin(), -angles.sin()], -1)
    return cos, sin

class Linear(nn.Linear):
    """
    A matrix without bias. Its float32 master weight is cast to the dtype of the activations at every use.
    """

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return product(x, self.weight.to(x.dtype))

@torch.no_grad()
def pack(linears):
    """
    Put the weights of several Linears that read the same input below each other: (sum of n_out, n_in). Their
    own weights become views of it. One that reads only the first channels gets zeros for the others.
    On a CPU the numbers of a column lie side by side, because a product with a single row, a decoded token's,
    then takes half the time.
    """
    weights = [linear.weight for linear in linears]
    n_out = [weight.size(0) for weight in weights]
    n_in = max(weight.size(1) for weight in weights)
    if weights[0].device.type == "cpu":
        packed = weights[0].new_zeros(n_in, sum(n_out)).t()
    else:
        packed = weights[0].new_zeros(sum(n_out), n_in)
    for linear, rows in zip(linears, packed.split(n_out)):
        view = rows[:, :linear.weight.size(1)]
        view.copy_(linear.weight)
        linear.weight.data = view
    return packed

class Attention(nn.Module):

    def __init__(self, config, layer):
        super().__init__()
        D = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.kv_memory = config.kv_memory and layer in config.memory_layers
        self.gate_channels = config.gate_channels
        self.value_gate = config.value_gate
        self.query_scale = config.query_scale
        self.c_q = Linear(D, D)
        self.c_k = Linear(D, self.n_kv_head * self.head_dim)
        self.c_v = Linear(D, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(D, D)
        # a gate for each key/value head and each source of k and v: local and memory, value embedding
        n_gates = 0
        if self.kv_memory:
            n_gates += 2
        if config.has_value_embed(layer):
            n_gates += 1
        self.gate = Linear(self.gate_channels or D, n_gates * self.n_kv_head) if n_gates else None
        self.packed = None  # for inference: the weights of project() below each other, see GPT.pack

    def project(self, u):
        """
        All that is computed from u (B, P, D) by matrices: the queries (B, P, D), keys and values (B, P, G*d),
        and the arguments of the gates (B, P, n_gates * G), None without gates.
        """
        if self.packed is None:
            gates = None
            if self.gate is not None:
                gates = self.gate(u if self.gate_channels is None else u[:, :, :self.gate_channels])
            return self.c_q(u), self.c_k(u), self.c_v(u), gates
        outputs = product(u, self.packed.to(u.dtype)).split(self.widths, dim=-1)
        return outputs if self.gate is not None else (*outputs, None)

    def pack(self):
        """Lay out the weights for inference: project() is one product from now on."""
        linears = [self.c_q, self.c_k, self.c_v]
        if self.gate is not None:
            linears.append(self.gate)
        self.packed = pack(linears)
        self.widths = [linear.out_features for linear in linears]

    def local_kv(self, k, v, gates, value_embed):
        """
        Equation (2) without its memory term, before rotation. k, v and gates as project() returns them,
        value_embed (B, P, G*d) or None.
        Returns k, v (B, P, G, d), and the gate of the memory g_mem (B, P, G, 1) or None without KV memory.
        """
        G = self.n_kv_head
        heads = k.shape[:2] + (G, self.head_dim)
        k = k.view(heads)
        v = v.view(heads)
        g_mem = None
        if gates is not None:
            gates = torch.sigmoid(gates).unsqueeze(-1)  # (B, P, n_gates * G, 1)
            if self.kv_memory:
                g_loc, g_mem = (2 * gates[:, :, :2 * G]).chunk(2, dim=2)
                gates = gates[:, :, 2 * G:]
                k = g_loc * k
                v = g_loc * v
            if value_embed is not None:
                v = torch.addcmul(v, self.value_gate * gates, value_embed.view(heads))
        return k, v, g_mem

    def finish_kv(self, k, v, g_mem, memory_kv, rotary):
        """
        Add the memory term of equation (2), if memory_kv is a pair (B, P, G*d), to what local_kv() returned;
        rotate and norm. Returns the keys and values to be stored, (B, G, P, d).
        """
        if memory_kv is not None:
            memory_k, memory_v = memory_kv
            k = torch.addcmul(k, g_mem, memory_k.view(k.shape))
            v = torch.addcmul(v, g_mem, memory_v.view(v.shape))
        return norm(rotate(k, *rotary)).transpose(1, 2), v.transpose(1, 2)

    def query(self, q, rotary):
        """q (B, P, D) -> queries (B, H, P, d), rotated, normed and scaled."""
        B, P, _ = q.shape
        q = q.view(B, P, self.n_head, self.head_dim)
        q = norm(rotate(q, *rotary)).transpose(1, 2)
        return q if self.query_scale == 1 else self.query_scale * q

    def forward(self, u, value_embed, memory_kv, rotary, positions, view, kv):
        """u (B, P, D) -> (B, P, D). The other arguments are those of Block.forward."""
        B, P, D = u.shape
        q, k, v, gates = self.project(u)
        local = self.local_kv(k, v, gates, value_embed)
        if kv.local is not None and kv.local[self.layer] is None:  # the first pass keeps it for GPT.refresh
            kv.local[self.layer] = local
        q = self.query(q, rotary)
        k, v = self.finish_kv(*local, memory_kv, rotary)
        y = kv.attend(self.layer, positions, q, k, v, view)
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

    def forward(self, h, value_embed, memory_kv, rotary, positions, view, kv):
        """
        One layer without its residual injection: h (B, P, D) -> (B, P, D).
        value_embed (B, P, G*d) or None; memory_kv: the memory projected by Rk and Rv, a pair (B, P, G*d), or
        None; rotary: the tables (P, 1, d) of cos and sin; positions: a range of length P; kv: the store
        (attention.KVStore), which is read and written; view: kv.view() of the positions.
        """
        h = h + self.attn(norm(h), value_embed, memory_kv, rotary, positions, view, kv)
        return h + self.mlp(norm(h))


# -----------------------------------------------------------------------------
# The loss

class FusedLinearCrossEntropy(torch.autograd.Function):
    """
    Output head, softcap and cross-entropy of all passes in one function, a chunk of rows at a time. The
    logits of a pass never exist all at once, and they are not computed twice, because the forward also
    computes the gradients of a unit loss while it has them. With t = tanh(x @ Wu / 15) a logit is 15 t, and
    |15 t| <= 15, so that exp needs no maximum subtracted; its derivative is d logit / d(x @ Wu) = 1 - t^2.
    """

    @staticmethod
    def chunk_size(x):
        """Rows at a time: on a CPU what stays in its cache, on a GPU what fills it."""
        return 256 if x.device.type == "cpu" else 4096

    @staticmethod
    def forward(ctx, weight, targets, weights, *hidden):
        """
        weight (V, D): the output head. For each pass: targets (B, P) int64, of which -1 counts as loss 0; its
        weight, a float; hidden (B, P, D). Returns the weighted sum of the passes' mean losses, and these
        means (passes,), which take no gradient.
        """
        w = weight.to(hidden[0].dtype)
        dw = torch.zeros_like(weight)
        dhidden = []
        means = []
        for x, target, pass_weight in zip(hidden, targets, weights):
            x = x.flatten(0, 1)
            target = target.flatten()
            dx = torch.empty_like(x)
            losses = []
            chunk_size = FusedLinearCrossEntropy.chunk_size(x)
            for x_i, y, dx_i in zip(x.split(chunk_size), target.split(chunk_size), dx.split(chunk_size)):
                # the loss of these rows, -log softmax(logits)[y]
                t = F.linear(x_i, w)
                t = t.to(torch.promote_types(t.dtype, torch.float32)).div_(15).tanh_()
                p = (15 * t).exp_()
                total = p.sum(-1, keepdim=True)
                valid = (y >= 0).unsqueeze(1)
                y = y.clamp(min=0).unsqueeze(1)
                losses.append((total.log() - 15 * t.gather(1, y)) * valid)
                # its gradient: first in the logits, (softmax - one hot) / rows, then in x @ Wu
                scale = valid.to(p.dtype) * (pass_weight / len(target))
                p.mul_(scale / total)
                if torch.compiler.is_compiling():  # fused; a scatter would have p written out
                    is_target = torch.arange(p.size(1), device=p.device) == y
                    p = torch.where(is_target, p - scale, p)
                else:
                    p.scatter_add_(1, y, -scale)
                p = p.mul_(t.square_().neg_().add_(1)).to(x.dtype)
                torch.mm(p, w, out=dx_i)
                dw += p.T @ x_i
            dhidden.append(dx)
            means.append(torch.cat(losses).mean())
        means = torch.stack(means)
        ctx.shapes = [x.shape for x in hidden]
        ctx.save_for_backward(dw, *dhidden)
        ctx.mark_non_differentiable(means)
        return (means * means.new_tensor(weights)).sum(), means

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        dw, *dhidden = ctx.saved_tensors
        dhidden = [dx.view(shape) * grad.to(dx.dtype) for dx, shape in zip(dhidden, ctx.shapes)]
        return dw * grad, None, None, *dhidden


# -----------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    block_class = Block  # what a layer is made of; a subclass may have another
    appends_in_parallel = True  # whether a pass over several positions may begin behind position 0

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compute_dtype = None  # dtype of the activations; None: that of the weights
        self.recompute = False  # activation checkpointing: keep a layer's inputs, and run it again later
        D, L, V = config.n_embd, config.n_layer, config.vocab_size
        kv_dim = config.n_kv_head * config.head_dim

        # embeddings, layers, output head
        self.wte = nn.Embedding(V, D)
        self.value_embeds = nn.ModuleDict()
        for l in range(L):
            if config.has_value_embed(l):
                self.value_embeds[str(l)] = nn.Embedding(V, kv_dim)
        self.h = nn.ModuleList(self.block_class(config, l) for l in range(L))
        self.lm_head = Linear(D, V)

        # a, b and c of equation (1)
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.full((L,), 0.1))
        self.mem_lambdas = None
        if config.residual_memory:
            self.mem_lambdas = nn.Parameter(torch.full((L,), config.memory_init))

        self.smear_gate = Linear(SMEAR_CHANNELS, 1) if config.smear else None
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2)) if config.backout else None

        # Rk and Rv of equation (2), Wu and Wg of the fused input
        n_pairs = 0
        if config.kv_memory:
            n_pairs = 1 if config.lrt == "shared" else len(config.memory_layers)
        self.mem_k = nn.ModuleList(Linear(D, kv_dim) for _ in range(n_pairs))
        self.mem_v = nn.ModuleList(Linear(D, kv_dim) for _ in range(n_pairs))
        self.packed_memory = None  # for inference: Rk and Rv of all layers below each other, see pack()
        self.mem_input = Linear(D, D) if config.input_memory else None
        self.mem_input_gate = Linear(D, D) if config.input_memory else None

        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        As in the LRT release: output projections and gates start at zero, so every block starts as the
        identity. nanochat has smaller embeddings and MLPs, gates a little above their middle, and scalars
        that fall with depth.
        """
        bound = math.sqrt(3 / self.config.n_embd)  # uniform with standard deviation 1/sqrt(D)
        for name, module in self.named_modules():
            if isinstance(module, (Linear, nn.Embedding)):
                if name.endswith(("c_proj", "gate", "mem_input")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.uniform_(module.weight, -bound, bound)
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        if self.config.init == "nanochat":
            self.wte.weight.mul_(0.8)
            for block in self.h:
                block.mlp.c_fc.weight.mul_(0.4)
            for name, p in self.named_parameters():
                if name.endswith("gate.weight"):
                    nn.init.uniform_(p, 0.0, 0.02)
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, self.config.n_layer))
            self.x0_lambdas.copy_(torch.linspace(0.2, 0.05, self.config.n_layer))

    def pack(self):
        """
        Lay out the weights for inference, once they are loaded and on their device: fewer and faster
        products, and the same numbers but for their rounding. The parameters become views of what is packed.
        """
        for block in self.h:
            block.attn.pack()
        if self.config.kv_memory:
            pairs = zip(self.mem_k, self.mem_v)
            self.packed_memory = pack([linear for pair in pairs for linear in pair])
        for module in self.modules():
            is_packed = module.weight.stride(0) == 1 if isinstance(module, Linear) else True
            if not is_packed:
                pack([module])

    # -------------------------------------------------------------------------
    # The forward

    def token_embedding(self, idx):
        """norm(embed(token)) of tokens idx (B, P): (B, P, D)."""
        return norm(self.wte(idx).to(self.compute_dtype or self.wte.weight.dtype))

    def smeared(self, embedding, previous):
        """
        x0 (B, P, D) with smear: to every token's embedding (B, P, D), a part of that of the token before it
        is added. previous (B, P) int64: these tokens, -1 for none; None: the embeddings are those of whole
        rows, from position 0 on.
        """
        if previous is None:
            before = F.pad(embedding[:, :-1], (0, 0, 1, 0))
        else:
            before = self.token_embedding(previous.clamp(min=0))
            before = before.masked_fill((previous < 0).unsqueeze(-1), 0)
        gate = torch.sigmoid(self.smear_gate(embedding[:, :, :SMEAR_CHANNELS]))
        return torch.addcmul(embedding, self.smear_lambda.to(gate.dtype) * gate, before)

    def embed(self, idx, previous=None):
        """
        All that is looked up by token: idx (B, P) int64 -> the tokens' embeddings (B, P, D), x0 (B, P, D),
        which is the same without smear, and a tuple of every layer's value embedding (B, P, G*d), None where
        a layer has none. previous: the tokens before, as for smeared().
        """
        embedding = self.token_embedding(idx)
        x0 = self.smeared(embedding, previous) if self.config.smear else embedding
        value_embeds = []
        for l in range(self.config.n_layer):
            has_one = self.config.has_value_embed(l)
            value_embeds.append(self.value_embeds[str(l)](idx).to(x0.dtype) if has_one else None)
        return embedding, x0, tuple(value_embeds)

    def first_memory(self, idx):
        """
        What tokens idx (B, P) hand on before a pass has computed their memory: their embeddings (B, P, D),
        or None for zero.
        """
        return None if self.config.first_memory == "zero" else self.token_embedding(idx)

    def project_memory(self, memory, n_layer):
        """
        Rk and Rv of the first n_layer layers applied to memory (B, P, D): a list of as many pairs (B, P,
        G*d), None for a layer that memory does not enter by keys and values.
        """
        pairs = [None] * n_layer
        if memory is None or not self.config.kv_memory:
            return pairs
        layers = self.config.memory_layers
        n = len(layers[:max(n_layer - layers.start, 0)])  # of them are run
        n_pairs = min(n, 1) if self.config.lrt == "shared" else n
        if self.packed_memory is None:
            projected = [(self.mem_k[i](memory), self.mem_v[i](memory)) for i in range(n_pairs)]
        else:
            kv_dim = self.mem_k[0].out_features
            weight = self.packed_memory[:2 * n_pairs * kv_dim].to(memory.dtype)
            outputs = product(memory, weight).split(kv_dim, dim=-1)
            projected = list(zip(outputs[::2], outputs[1::2]))
        pairs[layers.start:layers.start + n] = projected * n if self.config.lrt == "shared" else projected
        return pairs

    def memory_projections(self, n_layer):
        """The matrices that are applied to a memory in a pass through the first n_layer layers."""
        if self.config.input_memory:
            return [self.mem_input, self.mem_input_gate]
        n_pairs = max(n_layer - self.config.memory_layers.start, 0)
        return [*self.mem_k[:n_pairs], *self.mem_v[:n_pairs]]

    def forward(self, idx, positions, kv, memory=None, n_layer=None, embedded=None):
        """
        The one forward, equations (1) to (3).
        idx (B, P) int64: the tokens at `positions`, a range of length P within the context, or in a decoding
        step with a KVCache a tensor (1,) int64, whose caller sees to it that it is within the context.
        kv: KVBuffer or KVCache. The keys and values of `positions` are written; the queries see all
        positions up to their own, so the store must hold those, from earlier calls or from this one.
        memory (B, P, D): m_{t-1} for every t in positions; None: zero, and its projections are not computed.
        n_layer: stop after this many layers, at least up to the source layer; None: run all.
        embedded: embed(idx), if the caller has it from an earlier pass over the same tokens.
        Returns hidden (B, P, D), the normed output of the last layer, for logits(), token_loss() or loss(),
        and source (B, P, D), the memory m_t of every position. Raises ValueError beyond the context.
        """
        config = self.config
        if isinstance(positions, range) and positions[-1] - kv.first >= config.sequence_len:
            last = positions[-1] - kv.first
            raise ValueError(f"position {last} is beyond the context of {config.sequence_len} tokens")
        if n_layer is None:
            n_layer = config.n_layer
        rotary = take(self.cos, positions, dim=0), take(self.sin, positions, dim=0)
        windows = [config.window(l) for l in range(n_layer)]
        views = {window: kv.view(positions, window) for window in set(windows)}
        memory_kv = self.project_memory(memory, n_layer)
        if embedded is None:
            previous = kv.previous_tokens(positions, idx) if config.smear else None
            embedded = self.embed(idx, previous)
        embedding, x0, value_embeds = embedded
        if memory is not None and config.input_memory:
            gate = torch.sigmoid(self.mem_input_gate(embedding))
            x0 = torch.addcmul(x0, gate, self.mem_input(memory))

        # a, b and c of equation (1): one unbind each, whose backward is one stack
        resid_lambdas = self.resid_lambdas.to(x0.dtype).unbind()
        x0_lambdas = self.x0_lambdas.to(x0.dtype).unbind()
        if self.mem_lambdas is not None:
            mem_lambdas = self.mem_lambdas.to(x0.dtype).unbind()
        else:
            mem_lambdas = [None] * n_layer

        run_layer = self.recomputed_layer if self.recompute and torch.is_grad_enabled() else self.layer
        h = x0
        for l in range(n_layer):
            lambdas = resid_lambdas[l], x0_lambdas[l], mem_lambdas[l]
            h = run_layer(l, kv, h=h, x0=x0, value_embed=value_embeds[l], memory=memory,
                          memory_kv=memory_kv[l], lambdas=lambdas, rotary=rotary, positions=positions,
                          view=views[windows[l]])
            if l == config.source_layer:
                source = norm(h)
            if l == config.n_layer // 2:
                middle = h
        if config.backout and n_layer == config.n_layer:
            h = torch.addcmul(h, self.backout_lambda.to(h.dtype), middle, value=-1)
        return norm(h), source if config.memory == "hidden" else embedding

    def layer(self, l, kv, h, x0, value_embed, memory, memory_kv, lambdas, rotary, positions, view):
        """Layer l: equation (1), with lambdas its a, b and c, and the block. h (B, P, D) -> (B, P, D)."""
        a, b, c = lambdas
        h = torch.addcmul(a * h, b, x0)
        if memory is not None and self.config.residual_memory and l in self.config.memory_layers:
            h = torch.addcmul(h, c, memory)
        return self.h[l](h, value_embed, memory_kv, rotary, positions, view, kv)

    def recomputed_layer(self, l, kv, **inputs):
        """layer() with activation checkpointing: only its inputs are kept, and the backward runs it again."""
        first_run = True

        def run(**inputs):
            # The second run, in the backward, must see what the first one saw, and write into a copy of the
            # store: in the store itself, what it writes would outlive its use.
            nonlocal first_run
            store = kv if first_run else kv.copy()
            first_run = False
            return self.layer(l, store, **inputs)

        return checkpoint(run, use_reentrant=False, **inputs)

    def refresh(self, positions, kv, memory):
        """
        KV refresh, an option of interleaved training: rewrite the keys and values at `positions` with a new
        memory (B, P, D). Their local parts and gates stay those of the first pass, which was over all
        positions (the store was made with keep_local=True).
        """
        rotary = take(self.cos, positions, dim=0), take(self.sin, positions, dim=0)
        memory_kv = self.project_memory(memory, self.config.n_layer)
        for l in self.config.memory_layers:
            local = [take(x, positions) for x in kv.local[l]]
            kv.write(l, positions, *self.h[l].attn.finish_kv(*local, memory_kv[l], rotary))

    # -------------------------------------------------------------------------
    # Logits and losses

    def logits(self, hidden):
        """hidden (B, P, D) -> logits (B, P, V) in float32 or wider, softly capped at +-15; equation (3)."""
        logits = self.lm_head(hidden)
        return 15 * logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(15).tanh_()

    def token_loss(self, hidden, targets):
        """
        Cross-entropy of every position in nats: hidden (B, P, D), targets (B, P) int64 -> (B, P); target -1
        gives 0.
        """
        chunk_size = FusedLinearCrossEntropy.chunk_size(hidden)
        losses = []
        for x, y in zip(hidden.flatten(0, 1).split(chunk_size), targets.flatten().split(chunk_size)):
            losses.append(F.cross_entropy(self.logits(x), y, ignore_index=-1, reduction="none"))
        return torch.cat(losses).view(targets.shape)

    def loss(self, hidden, targets, weights):
        """
        The training loss, equation (4) of interleave.py: the sum over passes i of weights[i], a float,
        times the mean cross-entropy of hidden[i] (B, P_i, D) against targets[i] (B, P_i) int64, where
        target -1 counts as 0. Returns the loss and the means (passes,), detached. Nats.
        """
        return FusedLinearCrossEntropy.apply(self.lm_head.weight, targets, weights, *hidden)

    # -------------------------------------------------------------------------
    # Counting

    def parameter_groups(self):
        """The parameters by role: a dict of lists; every parameter is in exactly one."""
        projections = []
        for module in (self.mem_k, self.mem_v, self.mem_input, self.mem_input_gate):
            if module is not None:
                projections += module.parameters()
        groups = {
            "embedding": list(self.wte.parameters()),
            "value embeddings": list(self.value_embeds.parameters()),
            "head": list(self.lm_head.parameters()),
            "matrices": [p for name, p in self.h.named_parameters() if "gate" not in name],
            "gates": [p for name, p in self.h.named_parameters() if "gate" in name],
            "memory projections": projections,
            "residual scalars": [self.resid_lambdas],
            "x0 scalars": [self.x0_lambdas],
            "memory scalars": [self.mem_lambdas] if self.mem_lambdas is not None else [],
            "smear": [*self.smear_gate.parameters(), self.smear_lambda] if self.config.smear else [],
            "backout": [self.backout_lambda] if self.config.backout else [],
        }
        assert sum(map(len, groups.values())) == len(list(self.parameters()))
        return groups

    def parameter_counts(self):
        """
        The number of parameters by role, their `total`, and `scaling`: those counted in tokens per parameter.
        """
        counts = {name: sum(p.numel() for p in params) for name, params in self.parameter_groups().items()}
        total = sum(counts.values())
        scaling = counts["matrices"] + counts["gates"] + counts["memory projections"] + counts["head"]
        return counts | {"total": total, "scaling": scaling}

    def flops_per_token(self, T=None, n_layer=None, head=True):
        """
        Training FLOPs, forward and backward, per token of one plain pass over T tokens (default: the
        context) through the first n_layer layers (default: all), with or without the output head.
        Schedule.flops_per_token() adds up the passes of a step. A matrix entry costs 6 FLOPs a position,
        and attention 12 * D for each key in the window (PaLM, arXiv 2204.02311, appendix B; causality is
        not taken off). Smear's gate, a few numbers, is left out like all scalars.
        """
        if T is None:
            T = self.config.sequence_len
        layers = self.h[:n_layer]
        entries = sum(p.numel() for p in layers.parameters())
        if head:
            entries += self.lm_head.weight.numel()
        keys = sum(min(self.config.window(l) + 1, T) for l in range(len(layers)))
        return 6 * entries + 12 * self.config.n_embd * keys
