"""
The Recurrent Transformer (arXiv 2604.21215) on the same backbone: its layer, and the GPT made of such layers.

In a recurrent layer, position t attends to keys and values made from the layer's own *outputs* at earlier
positions, and to a temporary pair of key and value made from its own input. Both pairs are made the same way,
with the same weights, norm, rotation and value embedding:

    u_t = norm(x_t);  q_t = query(u_t);  k'_t, v'_t = pair(u_t)
    a_t = attention(q_t, {(k_j, v_j): j < t} + {(k'_t, v'_t)})
    h_t = x_t + a_t Wo;  y_t = h_t + relu(norm(h_t) W1)**2 W2;  k_t, v_t = pair(norm(y_t))

q, k' and v' depend on the layer's input alone and are computed for all positions at once. The rest is
sequential in t. It has two forms that give the same numbers: reference() is plain autograd over t, tiled() is
the form to train with. It walks by blocks of BLOCK positions. Within a block, each position attends to those
before it. Once a block is done, position t its last, and with P the largest power of two that divides t+1,
its tile adds the last P finished keys to the softmax of the next P queries. In blocks of one position:

    t = 0: key 0 -> query 1;               t = 1: keys 0, 1 -> queries 2, 3;
    t = 2: key 2 -> query 3;               t = 3: keys 0 .. 3 -> queries 4 .. 7;   and so on,

so every query meets every earlier key exactly once, and of the order of T log T keys are read where one query
after the other would read T^2/2. The softmax of a query is a running one, as in flash attention: a maximum, a
sum and an accumulator, which start with its temporary pair. When its block comes, all that it has seen so far
is one more key, with the log-sum-exp for its score and the mean of the values for its value. The backward
walks the same blocks and tiles in reverse order and recomputes the probabilities from the stored log-sum-exp,
so that a layer keeps O(T D). The gradients of the weights are computed after the walk, by one matrix product
each.

What a position does is a chain of some thirty operations on one row a sequence, so that a small model
spends its time on calling them. They are therefore as few as possible: norms are applied behind the matrix
product that follows them, and results are written where they belong. On CUDA, where this work is thousands of
small kernels, a block is captured as a CUDA graph: all blocks do the same work on different tensors.

Shapes are written with B sequences, T positions, D = n_embd, H query heads, G key/value heads, d = D / H.
"""

import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from attention import dot_product_attention
from model import GPT, Block, GPTConfig, norm, rotate

SCRATCH = 2**20  # scores computed at once, 4 MiB of float32: a larger tile is added some rows at a time
BLOCK = 64  # positions walked at once, a power of two
GRAPHS = 8  # kinds of blocks kept: forward or backward, with or without value embedding, two batch sizes


# -----------------------------------------------------------------------------
# The model

@dataclass
class RecurrentConfig(GPTConfig):
    """The configuration of a RecurrentGPT: a GPT's with lrt none, as there is one recurrence at a time."""
    arch: str = "recurrent"  # in a checkpoint, tells this configuration from that of a GPT

    def __post_init__(self):
        super().__post_init__()
        if self.arch != "recurrent":
            raise ValueError(f"arch {self.arch!r} is none of gpt, recurrent")
        if self.lrt != "none":
            raise ValueError(f"arch recurrent goes with lrt none, not with {self.lrt}: "
                             "one recurrence at a time")
        if (self.gate_channels, self.value_gate, self.query_scale) != (None, 2.0, 1.0):
            raise ValueError("arch recurrent goes with the paper's gates and queries, not with nanochat's: "
                             "choose recipe paper")

    @property
    def label(self):
        return "recurrent"

class RecurrentBlock(Block):
    """
    A recurrent layer. Its parameters, and the arguments and results of its forward, are those of a Block.
    """

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.window = config.window(layer)

    def pair(self, u, value_embed, rotary):
        """u (B, P, D) -> keys and values (B, G, P, d), rotated and normed."""
        _, k, v, gates = self.attn.project(u)
        return self.attn.finish_kv(*self.attn.local_kv(k, v, gates, value_embed), None, rotary)

    def arguments(self, x, value_embed, rotary):
        """The arguments of tiled() and reference() for the layer's input x (B, T, D)."""
        attn, mlp = self.attn, self.mlp
        u = norm(x)
        pair_weights = [attn.c_k.weight, attn.c_v.weight]
        if attn.gate is not None:
            pair_weights.append(attn.gate.weight)
        weights = [attn.c_proj.weight, torch.cat(pair_weights), mlp.c_fc.weight, mlp.c_proj.weight]
        weights = [w.to(x.dtype) for w in weights]
        q, k, v, gates = attn.project(u)
        q = attn.query(q, rotary)
        k, v = attn.finish_kv(*attn.local_kv(k, v, gates, value_embed), None, rotary)
        return x, q, k, v, value_embed, rotary, weights, self.window

    def forward(self, x, value_embed, memory_kv, rotary, positions, view, kv):
        """As Block.forward, for one position (decoding) or for all from 0 on. Raises ValueError otherwise."""
        if len(positions) == 1:
            # attention finds the temporary pair in the place that the final one takes afterwards
            y = super().forward(x, value_embed, memory_kv, rotary, positions, view, kv)
            k, v = self.pair(norm(y), value_embed, rotary)
        elif positions == range(len(positions)):
            y, k, v = tiled(*self.arguments(x, value_embed, rotary), kv.start)
        else:
            raise ValueError("a recurrent layer runs from position 0 on, or one position at a time, "
                             f"not at {positions}")
        kv.write(self.attn.layer, positions, k, v)
        return y

class RecurrentGPT(GPT):
    block_class = RecurrentBlock
    appends_in_parallel = False  # a recurrent layer runs from position 0 on, or one position at a time

    def flops_per_token(self, T=None, n_layer=None, head=True):
        """
        As GPT.flops_per_token. A recurrent layer projects keys, values and their gate a second time, from
        its output; what its backward recomputes is not counted.
        """
        flops = super().flops_per_token(T, n_layer, head)
        for block in self.h[:n_layer]:
            for matrix in (block.attn.c_k, block.attn.c_v, block.attn.gate):
                if matrix is not None:
                    flops += 6 * matrix.weight.numel()
        return flops

def build_model(config):
    """The model of a configuration: a RecurrentGPT for a RecurrentConfig, a GPT for a GPTConfig."""
    return RecurrentGPT(config) if isinstance(config, RecurrentConfig) else GPT(config)

def config_from_dict(fields):
    """
    The GPTConfig or RecurrentConfig of a checkpoint's dict. The key `arch` tells them apart; it is missing,
    or "gpt" in older checkpoints, for a GPTConfig. Raises ValueError or TypeError for a dict that is no
    configuration.
    """
    if fields.get("arch", "gpt") != "gpt":
        return RecurrentConfig(**fields)
    return GPTConfig(**{name: value for name, value in fields.items() if name != "arch"})


# -----------------------------------------------------------------------------
# The definition

def position(x, a, value_embed, cos, sin, w_o, w_kv, w_fc, w_proj, n_kv_head, qk_norm=True):
    """
    What follows attention, for every position on its own. x, a (.., D); value_embed (.., G*d) or None;
    tables (1, d) each. The weights are (in, out): Wo; Wk, Wv and, with value_embed, the gate beside each
    other; W1; W2. Returns y (.., D) and the final k, v (.., G, d).
    """
    h = x + a @ w_o
    y = h + F.relu(norm(h) @ w_fc).square() @ w_proj
    k, v, gate = split_pair(norm(y) @ w_kv, n_kv_head, value_embed is not None)
    k = rotate(k, cos, sin)
    if value_embed is not None:
        v = torch.addcmul(v, 2 * torch.sigmoid(gate), value_embed.view(v.shape))
    return y, norm(k) if qk_norm else k, v

def split_pair(pair, n_kv_head, gated):
    """
    The outputs of Wk, Wv and the gate, pair (.., 2*G*d [+ G]) -> k, v (.., G, d), gate (.., G, 1) or None:
    views.
    """
    n_gates = n_kv_head if gated else 0
    width = (pair.size(-1) - n_gates) // 2
    k, v, gate = pair.split((width, width, n_gates), dim=-1)
    k = k.unflatten(-1, (n_kv_head, -1))
    v = v.unflatten(-1, (n_kv_head, -1))
    return k, v, gate[..., None] if gated else None

def reference(x, q, k, v, value_embed, rotary, weights, window, qk_norm=True):
    """
    The definition, by autograd over t. What it keeps grows with T^2. Arguments and results are those of
    tiled().
    """
    B, G, T, _ = k.shape
    cos, sin = rotary
    weights = [w.t() for w in weights]
    ys, ks, vs = [], [], []  # final, of the positions so far
    for t in range(T):
        first = max(t - window, 0)
        seen_k = torch.cat([*ks[first:], k[:, :, t:t + 1]], dim=2)
        seen_v = torch.cat([*vs[first:], v[:, :, t:t + 1]], dim=2)
        a = dot_product_attention(q[:, :, t:t + 1], seen_k, seen_v).reshape(B, -1)
        value_embed_t = None if value_embed is None else value_embed[:, t]
        y, k_t, v_t = position(x[:, t], a, value_embed_t, cos[t], sin[t], *weights, G, qk_norm)
        ys.append(y)
        ks.append(k_t[:, :, None])
        vs.append(v_t[:, :, None])
    return torch.stack(ys, dim=1), torch.cat(ks, dim=2), torch.cat(vs, dim=2)


# -----------------------------------------------------------------------------
# The tiled form

def tile(t, T, window):
    """
    The tile of position t of T: its keys and its queries, two slices of positions, or None if there are
    none, as within a block. A window of w lets query p see keys p-w .. p.
    """
    P = (t + 1) & -(t + 1)  # the largest power of two that divides t + 1
    if P < BLOCK:
        return None
    n = min(P, window)
    keys = slice(t + 1 - n, t + 1)
    queries = slice(t + 1, min(t + 1 + n, T))
    return (keys, queries) if queries.start < queries.stop else None

def keys_read(T, window):
    """
    How many keys (and as many values) of a head the forward reads. Without a window these are BLOCK for
    every position, and about T/2 log2(T / BLOCK) in tiles.
    """
    total = 0
    for t in range(T):
        first = t - t % BLOCK
        total += min(BLOCK, T - first)  # all of the block, with those to come masked
        found = tile(t, T, window)
        if found is not None:
            keys, _ = found
            total += keys.stop - keys.start
    return total

@torch._disable_dynamo  # torch.compile would unroll T steps into one graph
def tiled(x, q, k, v, value_embed, rotary, weights, window, start=None, qk_norm=True, capture=None):
    """
    One recurrent layer over positions 0 .. T-1, differentiable once.
    x (B, T, D): its input.
    q (B, H, T, d), k and v (B, G, T, d): queries and temporary pairs, rotated and normed.
    value_embed: (B, T, G*d) or None. rotary: two tables (T, 1, d).
    weights, (out, in) each: Wo; Wk, Wv and, with value_embed, the gate below each other; W1; W2.
    window: how many positions back a query sees.
    start (B,) int64: keys before it are padding, which no query sees but its own; None: no padding.
    qk_norm: norm the final keys.
    capture: walk whole blocks as CUDA graphs, to the same numbers; None: on CUDA.
    Returns y (B, T, D) and the final k, v (B, G, T, d).
    """
    if capture is None:
        capture = x.is_cuda
    return Tiled.apply(window, start, qk_norm, capture, x, q, k, v, value_embed, *rotary, *weights)

class Tiled(torch.autograd.Function):
    """
    tiled(). Inside, all tensors have their positions in dimension 1. There are N = B*G rows, one for each
    key/value head, with its R = H/G queries a position: queries are (N, T*R, d), keys and values (N, T, d).
    """

    @staticmethod
    def forward(ctx, window, start, qk_norm, capture, x, q, k, v, value_embed, cos, sin, *weights):
        B, G, T, d = k.shape
        R = q.size(1) // G
        wide = torch.promote_types(x.dtype, torch.float32)
        q = q.unflatten(1, (G, R)).transpose(2, 3).reshape(B * G, T * R, d) * d**-0.5
        k = k.reshape(B * G, T, d)
        v = v.reshape(B * G, T, d)
        padding = None
        if start is not None:
            padding = (torch.arange(T, device=x.device) < start[:, None]).repeat_interleave(G, dim=0)

        # the running softmax of every query starts with its temporary pair
        row_max = (q * k.repeat_interleave(R, dim=1)).sum(-1, dtype=wide)
        row_sum = torch.ones_like(row_max)
        accumulator = v.to(wide).repeat_interleave(R, dim=1)

        # the walk: a block, then the tile that its last position completes
        a, y, lse = torch.empty_like(x), torch.empty_like(x), torch.empty_like(row_max)
        final_k, final_v = torch.empty_like(k), torch.empty_like(v)
        tables = cos.transpose(0, 1), sin.transpose(0, 1)
        read = x, value_embed, *tables, padding, q, row_max, row_sum, accumulator
        updated = a, y, final_k, final_v, lse
        walk = by_blocks(walk_forward, weights, read, updated, window, qk_norm, capture)
        for block in range(0, T, BLOCK):
            walk(block)
            last = min(block + BLOCK, T) - 1
            add_tile(last, q, final_k, final_v, padding, window, row_max, row_sum, accumulator)

        ctx.options = window, qk_norm, capture
        ctx.save_for_backward(
            x, q, k, v, value_embed, cos, sin, padding, a, lse, y, final_k, final_v, *weights)
        return y, final_k.view(B, G, T, d), final_v.view(B, G, T, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_k, grad_v):
        window, qk_norm, capture = ctx.options
        x, q, k, v, value_embed, cos, sin, padding, *saved = ctx.saved_tensors
        a, lse, y, final_k, final_v, *weights = saved
        w_o, w_kv, w_fc, _ = weights
        B, G, T, d = grad_k.shape
        R = q.size(1) // k.size(1)
        wide = lse.dtype
        gated = value_embed is not None

        # position() over again, for all positions at once
        h = x + a @ w_o.t()
        normed_h, normed_y = norm(h), norm(y)
        hidden = F.relu(normed_h @ w_fc.t())
        pair = normed_y @ w_kv.t()
        local_k, _, gate = split_pair(pair, G, gated)
        dv_dgate = None
        if gated:
            gate = torch.sigmoid(gate)
            dv_dgate = 2 * gate * (1 - gate) * value_embed.unflatten(-1, (G, d))

        # the gradients that the walk computes: of the output of each matrix, of a, and of q, k and v
        output_grads = [torch.empty_like(output) for output in (h, hidden, y, pair)]
        da = torch.empty_like(q)
        dq = torch.zeros_like(q, dtype=wide)
        dk = grad_k.reshape(k.shape).to(wide, copy=True)
        dv = grad_v.reshape(k.shape).to(wide, copy=True)
        delta = torch.empty_like(lse)  # sum(da * a), as in flash attention

        # factors of the norms, and of the rotation of keys, which their norm follows
        r_y, r_h = inverse_rms(y), inverse_rms(h)
        tables = cos.transpose(0, 1), -sin.transpose(0, 1)
        if qk_norm:
            r_k = inverse_rms(rotate(local_k, cos, sin))
            tables = cos * r_k, -sin * r_k

        # the walk in reverse: the tile that the last position of a block completes, then the block
        for_positions = dv_dgate, normed_y, r_y, 2 * hidden, normed_h, r_h, *tables
        read = grad_y, a, q, lse, final_k, final_v, padding, dk, dv, *for_positions
        updated = da, delta, dq, *output_grads
        transposed_weights = [w.t().contiguous() for w in weights]
        walk = by_blocks(walk_backward, transposed_weights, read, updated, window, qk_norm, capture)
        for block in reversed(range(0, T, BLOCK)):
            last = min(block + BLOCK, T) - 1
            add_tile_backward(last, q, final_k, final_v, padding, window, lse, da, delta, dq, dk, dv)
            walk(block)

        # the temporary pairs
        k, v = k.repeat_interleave(R, dim=1), v.repeat_interleave(R, dim=1)
        p = torch.exp((q * k).sum(-1, dtype=wide) - lse)[..., None]
        ds = p * ((da * v).sum(-1, dtype=wide) - delta)[..., None]
        dq = torch.addcmul(dq, ds, k) * d**-0.5
        dq = dq.view(B, G, T, R, d).transpose(2, 3).reshape(B, G * R, T, d)
        dk_temporary = (ds * q).unflatten(1, (T, R)).sum(2).view(B, G, T, d)
        dv_temporary = (p * da).unflatten(1, (T, R)).sum(2).view(B, G, T, d)
        dh, dhidden, dy, dpair = output_grads
        dvalue_embed = None
        if gated:
            _, dv, _ = split_pair(dpair, G, gated)
            dvalue_embed = (2 * gate * dv).flatten(2)

        # the weights: the gradient of a matrix's output times its input
        products = (dh, a), (dpair, normed_y), (dhidden, normed_h), (dy, hidden.square())
        dweights = [grad.flatten(0, 1).t() @ inputs.flatten(0, 1) for grad, inputs in products]
        return (None, None, None, None,  # window, start, qk_norm, capture
                dh, dq, dk_temporary, dv_temporary, dvalue_embed, None, None, *dweights)

# The two walks over the P positions of a block. Their tensors have P or P*R rows in dimension 1; those of
# `updated` are overwritten, those of `read` may be used up. They only allocate and compute, and no step
# depends on a computed value, so that a CUDA graph may record them. Attention within a block is computed in
# float32 at least.

def walk_forward(weights, read, updated, window, qk_norm):
    """
    Every position of a block. The running softmax row_max, row_sum, accumulator holds what tiles have added
    so far. Weights are (out, in): the products with few rows are faster if what is added up is contiguous.
    """
    x, value_embed, cos, sin, padding, q, row_max, row_sum, accumulator = read
    a, y, final_k, final_v, lse = updated
    w_o, w_kv, w_fc, w_proj = (w.t() for w in weights)
    B, P, D = x.shape
    N, _, d = q.shape
    G, R = N // B, q.size(1) // P
    wide = accumulator.dtype
    least = root_of_eps(wide, x.device)

    # what is before the block counts as one key: number 0, of which the score is known
    scores_before = row_max + row_sum.log()
    values_before = accumulator / row_sum[..., None]
    mask = block_mask(P, R, window, padding, lse)
    mask = torch.cat([scores_before[..., None], mask.expand(N, -1, -1)], dim=2)
    queries = q.to(wide)
    keys, values = queries.new_zeros(N, 1 + P, d), queries.new_zeros(N, P, d)

    # the tensors of each position
    queries_at, masks_at, values_before_at = (i.split(R, dim=1) for i in (queries, mask, values_before))
    keys_at, values_at = (i.unflatten(0, (B, G)).unbind(2) for i in (keys[:, 1:], values))  # (B, G, d)
    pairs = x.new_empty(P, B, w_kv.size(1))
    k, v, gates = split_pair(pairs, G, value_embed is not None)
    pairs_at, k_at, v_at = pairs.unbind(), k.unbind(), v.unbind()
    twice_value_embed = None
    if value_embed is not None:
        twice_value_embed = 2 * value_embed.unflatten(-1, (G, d))
        gates_at = gates.unbind()
    at = by_position(x, cos, sin, a, y, twice_value_embed)

    keys_mt = keys.mT
    for t, (x_t, cos_t, sin_t, a_t, y_t, twice_value_embed_t) in enumerate(at):
        # attention
        p = torch.bmm(queries_at[t], keys_mt).add_(masks_at[t]).softmax(-1)
        p_before, p = p.split((1, P), dim=2)
        a_t.copy_(torch.bmm(p, values).addcmul_(p_before, values_before_at[t]).view(B, D))
        # norm(h) @ w_fc = h @ w_fc / rms, and relu(..)**2 takes the square of that factor
        h = torch.addmm(x_t, a_t, w_o)
        hidden = torch.mm(h, w_fc).relu_().square_()
        torch.addcdiv(h, torch.mm(hidden, w_proj), rms(h, least).square_(), out=y_t)
        # the final pair
        torch.div(torch.mm(y_t, w_kv), rms(y_t, least), out=pairs_at[t])
        k = k_at[t]
        k = torch.addcmul(k * cos_t, k.roll(d // 2, -1), sin_t)
        if qk_norm:
            torch.div(k, rms(k, least), out=keys_at[t])
        else:
            keys_at[t].copy_(k)
        if value_embed is None:
            values_at[t].copy_(v_at[t])
        else:
            torch.addcmul(v_at[t], gates_at[t].sigmoid(), twice_value_embed_t, out=values_at[t])

    final_k.copy_(keys[:, 1:])
    final_v.copy_(values)
    torch.logsumexp(torch.baddbmm(mask, queries, keys.mT), -1, out=lse)

def walk_backward(weights, read, updated, window, qk_norm):
    """
    The same in reverse, by hand: the gradients of a, of the keys and values, and of the outputs of Wo, W1, W2
    and (Wk, Wv, gate). dk, dq and dv hold what larger tiles have added so far. dv_dgate (B, P, G, d) is the
    derivative of v in the gate's output, dsquare (B, P, 4D) that of relu(..)**2 in its argument, and r are
    the factors of norm(x) = x * r. The tables turn the gradient of a final key into that of Wk's output,
    but for the projection of its norm. Weights are (in, out), again for the sake of these products.
    """
    grad_y, a, q, lse, final_k, final_v, padding, dk, dv, dv_dgate, *for_mlp, cos, sin = read
    da, delta, dq, dh, dhidden, dy, dpair = updated
    w_o, w_kv, w_fc, w_proj = (w.t() for w in weights)
    B, P, D = a.shape
    N, _, d = q.shape
    G, R = N // B, q.size(1) // P
    wide = lse.dtype

    # within the block: the probabilities, and room for the gradients of the scores, both (N, P*R, P)
    queries, keys, values = q.to(wide), final_k.to(wide), final_v.to(wide)
    mask = block_mask(P, R, window, padding, lse)
    p = torch.baddbmm(mask - lse[..., None], queries, keys.mT).exp_()
    ds = torch.zeros_like(p)
    da_wide = torch.zeros_like(queries)

    # the tensors of each position
    by_query = [i.split(R, dim=1) for i in (p, ds, da_wide, rows_of(a, G, R).to(wide), delta[..., None])]
    by_key = [i.split(1, dim=1) for i in (p.mT, ds.mT, dk, dv)]
    dk_out, dv_out, dgates_out = split_pair(dpair, G, dv_dgate is not None)
    ks = final_k.unflatten(0, (B, G)).transpose(1, 2)
    at = by_position(
        grad_y, ks, dv_dgate, *for_mlp, cos, sin, dh, dhidden, dy, dpair, dk_out, dv_out, dgates_out)

    for t in reversed(range(P)):
        p_of_query, ds_of_query, da_t, a_t, delta_t = (i[t] for i in by_query)
        p_of_key, ds_of_key, dk_t, dv_t = (i[t] for i in by_key)
        (grad_y_t, k_t, dv_dgate_t, normed_y, r_y, dsquare, normed_h, r_h, cos_t, sin_t,
         dh_t, dhidden_t, dy_t, dpair_t, dk_out_t, dv_out_t, dgate_out_t) = at[t]
        # the final pair: what later queries of the block add
        dk_t = torch.baddbmm(dk_t, ds_of_key, queries).view(B, G, d)
        dv_t = torch.baddbmm(dv_t, p_of_key, da_wide).view(B, G, d)
        if qk_norm:
            dk_t = along(dk_t, k_t)
        torch.addcmul(dk_t * cos_t, dk_t.roll(d // 2, -1), sin_t, out=dk_out_t)
        dv_out_t.copy_(dv_t)
        if dv_dgate_t is not None:
            torch.sum(dv_t * dv_dgate_t, -1, keepdim=True, out=dgate_out_t)
        # MLP and Wo
        torch.addcmul(grad_y_t, along(torch.mm(dpair_t, w_kv), normed_y), r_y, out=dy_t)
        torch.mul(torch.mm(dy_t, w_proj), dsquare, out=dhidden_t)
        torch.addcmul(dy_t, along(torch.mm(dhidden_t, w_fc), normed_h), r_h, out=dh_t)
        da_t.copy_(torch.mm(dh_t, w_o).view(N, R, d))
        # the query
        torch.sum(da_t * a_t, -1, keepdim=True, out=delta_t)
        torch.mul(torch.baddbmm(delta_t, da_t, values.mT, beta=-1), p_of_query, out=ds_of_query)

    da.copy_(da_wide)
    dq.baddbmm_(ds, keys)

def block_mask(P, R, window, padding, like):
    """
    What is added to the scores of a block's P*R queries and P keys: 0 where a key is before the query, within
    the window, and no padding (N, P), -inf elsewhere; (1 or N, P*R, P), of the dtype and device of `like`.
    """
    query = torch.arange(P * R, device=like.device)[:, None] // R
    key = torch.arange(P, device=like.device)
    hidden = ((key >= query) | (key < query - window))[None]
    if padding is not None:
        hidden = hidden | padding[:, None]
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)

def rows_of(x, G, R):
    """x (B, P, G*R*d) as the rows of queries, (B*G, P*R, d)."""
    B, P, _ = x.shape
    return x.view(B, P, G, R, -1).transpose(1, 2).reshape(B * G, P * R, -1)

def rms(x, root_of_eps):
    """The root of the mean of the squares of x (.., n), and eps, of which the root is given: (.., 1)."""
    n = x.size(-1)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=root_of_eps.dtype)
    return length.mul_(n**-0.5).hypot_(root_of_eps)

def inverse_rms(x):
    """r of norm(x) = x * r. Like rms_norm, it is computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return rms(x, root_of_eps(wide, x.device)).reciprocal_().to(x.dtype)

def root_of_eps(dtype, device):
    """The root of the eps of rms_norm in this dtype, a tensor of one number."""
    return torch.full((), torch.finfo(dtype).eps**0.5, dtype=dtype, device=device)

def along(dy, y):
    """The gradient of x where y = norm(x) = x * r, but for the factor r."""
    return torch.addcmul(dy, y, (dy * y).sum(-1, keepdim=True), value=-1 / y.size(-1))

def add_tile(t, q, k, v, padding, window, row_max, row_sum, accumulator):
    """Add the tile of position t to the running softmax of its queries: its keys are final."""
    for rows, keys, queries in tile_pieces(t, q, k, window):
        s = scores(q, k, rows, keys, queries, padding, window)
        old_max = row_max[rows, queries]
        old_sum = row_sum[rows, queries]
        old_accumulator = accumulator[rows, queries]
        new_max = torch.maximum(old_max, s.amax(-1))
        p = s.sub_(new_max[..., None]).exp_()
        decay = torch.exp(old_max - new_max)
        torch.addcmul(p.sum(-1), old_sum, decay, out=old_sum)
        weighted_v = torch.bmm(p.to(v.dtype), v[rows, keys])
        torch.addcmul(weighted_v, old_accumulator, decay[..., None], out=old_accumulator)
        old_max.copy_(new_max)

def add_tile_backward(t, q, k, v, padding, window, lse, da, delta, dq, dk, dv):
    """The backward of add_tile: da of its queries is final. Adds to dq, and to dk and dv of its keys."""
    for rows, keys, queries in tile_pieces(t, q, k, window):
        p = scores(q, k, rows, keys, queries, padding, window).sub_(lse[rows, queries, None]).exp_()
        dp = torch.bmm(da[rows, queries], v[rows, keys].mT)
        ds = dp.sub_(delta[rows, queries, None]).mul_(p).to(q.dtype)
        dq[rows, queries] += torch.bmm(ds, k[rows, keys])
        dk[rows, keys] += torch.bmm(ds.mT, q[rows, queries])
        dv[rows, keys] += torch.bmm(p.to(q.dtype).mT, da[rows, queries])

def by_position(*tensors):
    """
    A list with, for each position, the tuple of the tensors' views at it (dimension 1). None stays None.
    """
    P = tensors[0].size(1)
    views = [[None] * P if x is None else x.unbind(1) for x in tensors]
    return list(zip(*views))

def tile_pieces(t, q, k, window):
    """
    The tile of position t in pieces of at most SCRATCH scores: a list of three slices, rows of dimension 0,
    keys and queries of dimension 1 (in q, with its R queries a position).
    """
    N, T, _ = k.shape
    R = q.size(1) // T
    found = tile(t, T, window)
    if found is None:
        return []
    keys, queries = found
    queries = slice(queries.start * R, queries.stop * R)
    scores_a_row = (queries.stop - queries.start) * (keys.stop - keys.start)
    n = max(SCRATCH // scores_a_row, 1)
    return [(slice(row, row + n), keys, queries) for row in range(0, N, n)]

def scores(q, k, rows, keys, queries, padding, window):
    """
    The scores of a piece, (rows, queries, keys), in float32 at least; -inf beyond the window and at padding
    (N, T).
    """
    s = torch.bmm(q[rows, queries], k[rows, keys].mT).to(torch.promote_types(q.dtype, torch.float32))
    R = q.size(1) // k.size(1)
    hidden = None if padding is None else padding[rows, None, keys]
    last_query = queries.stop // R - 1
    if last_query - keys.start > window:
        query = torch.arange(queries.start, queries.stop, device=q.device)[:, None] // R
        key = torch.arange(keys.start, keys.stop, device=q.device)
        beyond = key < query - window
        hidden = beyond if hidden is None else hidden | beyond
    return s if hidden is None else s.masked_fill_(hidden, -torch.inf)


# -----------------------------------------------------------------------------
# Blocks, and their capture as CUDA graphs. A graph of all T positions would have 10^5 nodes and be another
# one for every T. torch.compile would have to trace and generate code for thousands of operations.

def by_blocks(walk, weights, read, updated, window, qk_norm, capture):
    """
    A function that walks the block which begins at a given position: it calls `walk`, one of the walks
    above, on the block's slices of the tensors of read and updated, (.., T * n, ..) with n rows a position
    in dimension 1. With capture, whole blocks are replayed by a Graph.
    """
    T = read[0].size(1)
    options = min(window, BLOCK), qk_norm

    def cut(first, tensors):
        pieces = []
        for x in tensors:
            if x is not None:
                n = x.size(1) // T
                x = x[:, first * n:(first + BLOCK) * n]
            pieces.append(x)
        return pieces

    graph = None
    if capture and T >= BLOCK:
        graph = graph_of(walk, weights, cut(0, read), cut(0, updated), options)

    def run(first):
        is_whole = first + BLOCK <= T
        if graph and is_whole:
            graph.run(cut(first, read), cut(first, updated))
        else:
            walk(weights, cut(first, read), cut(first, updated), *options)
    return run

# by kind of block, the least recently used first: a Graph; None: walked once so far; False: capture failed
graphs = {}

def graph_of(walk, weights, read, updated, options):
    """
    The Graph of this kind of block, loaded with these weights, or a false value if there is none. A kind is
    captured when it comes for the second time, from another layer or step. If that fails (out of memory),
    there is a warning, and the kind is walked as on a CPU from then on.
    """
    shapes = [None if x is None else (x.shape, x.dtype, x.device) for x in (*weights, *read, *updated)]
    key = walk, options, *shapes
    seen = key in graphs
    graph = graphs.pop(key, None)
    if seen and graph is None:
        try:
            graph = Graph(walk, weights, read, updated, options)
        except RuntimeError as e:
            reason = str(e).partition("\n")[0]
            message = f"recurrent layers run without a CUDA graph, and slower: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            graph = False
    graphs[key] = graph
    if len(graphs) > GRAPHS:
        least_recently_used = next(iter(graphs))
        del graphs[least_recently_used]
    if graph:
        copy_tensors(graph.own[0], weights)
    return graph

class Graph:
    """
    A walk over a block, recorded once on tensors of its own and replayed for every block of the same
    shapes: of all layers and any T, in training, evaluation and recomputation. Its tensors are the weights
    of one layer and BLOCK positions; what goes in and out is copied, so nothing outlives a run. Weights are
    copied as well, because a layer casts and concatenates them anew every time and they have no lasting
    address; it costs what one of the T positions reads. All runs must be on one stream.
    """

    def __init__(self, walk, weights, read, updated, options):
        self.own = []  # weights, read, updated
        for tensors in (weights, read, updated):
            own = []
            for x in tensors:
                if x is not None:
                    x = torch.empty_like(x, memory_format=torch.contiguous_format)
                own.append(x)
            self.own.append(own)
        self.replay = record(lambda: walk(*self.own, *options), weights[0].device)

    def run(self, read, updated):
        _, own_read, own_updated = self.own
        copy_tensors(own_read, read)
        copy_tensors(own_updated, updated)
        self.replay()
        copy_tensors(updated, own_updated)

def copy_tensors(to, tensors):
    """Copy every tensor into its counterpart; None stays None."""
    for mine, x in zip(to, tensors):
        if x is not None:
            mine.copy_(x)

def record(work, device):
    """
    work() as a CUDA graph: a function that launches the same kernels on the same memory again. The capture is
    thread_local because the backward runs on autograd's thread, maybe while NCCL's thread is at work. What
    work() allocates is some MiB, so every graph has a memory pool of its own.
    """
    graph = torch.cuda.CUDAGraph()
    stream = side_stream(device)
    caller = torch.cuda.current_stream(device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):  # this leaves the stream even if the capture fails
        # Once outside of the capture: kernels are loaded, and cuBLAS gets its workspace for this thread and
        # stream, which would otherwise come from the graph's pool.
        work()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    caller.wait_stream(stream)
    return graph.replay

@cache
def side_stream(device):
    """A stream to capture on, one for each device."""
    return torch.cuda.Stream(device)
