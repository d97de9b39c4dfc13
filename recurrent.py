"""
The layers of the Recurrent Transformer (arXiv 2604.21215) on the same backbone: GPTConfig(arch="recurrent").

In a recurrent layer, position t attends to keys and values made from the layer's own *outputs* at earlier positions, and
to a temporary pair made from its own input. Both pairs take one path, same weights, norm, rotation and value embedding:

    u_t = norm(x_t);  q_t = query(u_t);  k'_t, v'_t = pair(u_t)
    a_t = attention(q_t, {(k_j, v_j): j < t} + {(k'_t, v'_t)})
    h_t = x_t + a_t Wo;  y_t = h_t + relu(norm(h_t) W1)**2 W2;  k_t, v_t = pair(norm(y_t))

q, k' and v' depend on the layer's input alone and are computed for all positions at once. What is left is sequential in
t, in two forms that give the same numbers. reference() is plain autograd over t. tiled() is as exact: once position t is
done, its tile hands the last P finished keys to the next P queries, P the largest power of two that divides t+1,

    t = 0: key 0 -> query 1;  t = 1: keys 0, 1 -> queries 2, 3;  t = 2: key 2 -> query 3;  t = 3: keys 0 .. 3 -> queries 4 .. 7

so every query meets every earlier key exactly once, and T/2 log2 T keys are read instead of T^2/2. The softmax of a query
runs along as (maximum, sum, weighted sum), from its temporary pair on. The backward pass walks the same tiles in reverse,
with probabilities recomputed from the stored log-sum-exp as in flash attention: a layer keeps O(T D). Gradients of the
weights are formed after the walk, one matrix product each.

The walk goes by blocks of BLOCK positions. Tiles smaller than a block lie within one, so that all blocks do the same work on
different tensors: on CUDA, where that is thousands of small kernels, it is one captured graph. Larger tiles come between blocks.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F

from model import Block, norm, rotate

SCRATCH = 2**20  # scores computed at once, 4 MiB of float32: a larger tile is worked off some heads at a time
BLOCK = 64  # positions walked at once, a power of two
GRAPHS = 8  # kinds of blocks kept: forward and backward, with a value embedding and without, training and another batch size


class RecurrentBlock(Block):
    """A recurrent layer with the parameters of a Block; as a Block it computes positions, writes kv, and returns the output."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.window = config.window(layer)

    def pair(self, u, value_embed, rotary):
        """u (B, P, D) -> keys and values (B, G, P, d), rotated and normed."""
        return self.attn.finish_kv(*self.attn.local_kv(u, value_embed), None, rotary)

    def arguments(self, x, value_embed, rotary):
        """What tiled() and reference() take, for all positions of x (B, T, D)."""
        u, attn, mlp = norm(x), self.attn, self.mlp
        pair_rows = [m.weight for m in (attn.c_k, attn.c_v, attn.gate) if m is not None]
        weights = [w.to(x.dtype) for w in (attn.c_proj.weight, torch.cat(pair_rows), mlp.c_fc.weight, mlp.c_proj.weight)]
        return x, attn.query(u, rotary), *self.pair(u, value_embed, rotary), value_embed, rotary, weights, self.window

    def forward(self, x, value_embed, memory_kv, rotary, positions, window, kv):
        """As Block.forward, for one position (decoding) or for all from 0 on. Raises ValueError for any other range."""
        if len(positions) == 1:  # attention finds the temporary pair in the place that the final one takes afterwards
            y = super().forward(x, value_embed, memory_kv, rotary, positions, window, kv)
            k, v = self.pair(norm(y), value_embed, rotary)
        elif positions == range(len(positions)):
            y, k, v = tiled(*self.arguments(x, value_embed, rotary), kv.start)
        else:
            raise ValueError(f"a recurrent layer runs from position 0 on, or one position at a time, not at {positions}")
        kv.write(self.attn.layer, positions, k, v)
        return y


# -----------------------------------------------------------------------------
# The definition

def position(x, a, value_embed, cos, sin, w_o, w_kv, w_fc, w_proj, n_kv_head, qk_norm=True):
    """
    What follows attention, every position on its own: x, a (.., D), value_embed (.., G*d) or None, tables (1, d) each
    -> y (.., D), final k, v (.., G, d). Weights are (in, out), w_kv is Wk, Wv and, with value_embed, the gate beside each other.
    """
    h = x + a @ w_o
    y = h + F.relu(norm(h) @ w_fc).square() @ w_proj
    k, v, gate = split_pair(norm(y) @ w_kv, n_kv_head, value_embed is not None)
    k = rotate(k, cos, sin)
    if value_embed is not None:
        v = torch.addcmul(v, 2 * torch.sigmoid(gate), value_embed.view(v.shape))
    return y, norm(k) if qk_norm else k, v

def position_backward(dy, dk, dv, k, r_k, dv_dgate, normed_y, r_y, dhidden, normed_h, r_h, cos, sin, w_o, w_kv, w_fc, w_proj, qk_norm=True):
    """
    position() backwards by hand, for rows (B, D): dy and dk, dv (B, G, d), and what it computed on the way -> da, and the
    gradients of the outputs of Wo, W1, W2 and Wk, Wv, gate. r is of norm(x) = x * r; dv_dgate (B, G, d) and dhidden
    (B, 4D) are derivatives of v in the gate and of relu(..)**2. Tables as position(), weights (out, in).
    """
    dk = rotate(norm_backward(dk, k, r_k) if qk_norm else dk, cos, -sin)
    dpair = [dk.flatten(1), dv.flatten(1)]
    if dv_dgate is not None:
        dpair.append((dv * dv_dgate).sum(-1))
    dpair = torch.cat(dpair, dim=1).to(dy.dtype)
    dy = dy + norm_backward(dpair @ w_kv, normed_y, r_y)
    dhidden = dy @ w_proj * dhidden
    dh = dy + norm_backward(dhidden @ w_fc, normed_h, r_h)
    return dh @ w_o, dh, dhidden, dy, dpair

def norm_backward(dy, y, r):
    """The gradient of x where y = norm(x) = x * r."""
    return torch.addcmul(dy, y, (dy * y).sum(-1, keepdim=True), value=-1 / y.size(-1)) * r

def inverse_rms(x):
    """r of norm(x) = x * r, which rms_norm computes in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps).to(x.dtype)

def split_pair(pair, n_kv_head, gated):
    """Columns of Wk, Wv and the gate: pair (.., 2*G*d [+ G]) -> views k, v (.., G, d) and gate (.., G, 1) or None."""
    G = n_kv_head
    width = (pair.size(-1) - G * gated) // 2
    k, v, gate = pair.split((width, width, G * gated), dim=-1)
    return k.unflatten(-1, (G, -1)), v.unflatten(-1, (G, -1)), gate[..., None] if gated else None

def reference(x, q, k, v, value_embed, rotary, weights, window, qk_norm=True):
    """The definition, by autograd over t; what it keeps grows with T^2. Arguments and results are those of tiled()."""
    (B, G, T, _), (cos, sin) = k.shape, rotary
    weights = [w.t() for w in weights]
    ys, ks, vs = [], [], []
    for t in range(T):
        seen_k, seen_v = (torch.cat([*final[max(t - window, 0):], temporary[:, :, t:t + 1]], dim=2) for final, temporary in ((ks, k), (vs, v)))
        a = F.scaled_dot_product_attention(q[:, :, t:t + 1], seen_k, seen_v, enable_gqa=q.size(1) != G)
        y, k_t, v_t = position(x[:, t], a.reshape(B, -1), None if value_embed is None else value_embed[:, t], cos[t], sin[t], *weights, G, qk_norm)
        ys.append(y), ks.append(k_t[:, :, None]), vs.append(v_t[:, :, None])
    return torch.stack(ys, dim=1), torch.cat(ks, dim=2), torch.cat(vs, dim=2)


# -----------------------------------------------------------------------------
# The tiled form

def tile(t, T, window):
    """
    The tile behind position t of T: keys and queries, two slices, none of them empty, or None. A window of w lets
    query p see keys p-w .. p.
    """
    P = (t + 1) & -(t + 1)
    keys, queries = slice(t + 1 - min(P, window), t + 1), slice(t + 1, min(t + 1 + min(P, window), T))
    return (keys, queries) if window and queries.start < queries.stop else None

def keys_read(T, window):
    """How many keys (and as many values) of a head the forward walk reads: about T/2 log2 T, where one row a position is T^2/2."""
    tiles = filter(None, (tile(t, T, window) for t in range(T)))
    return sum(keys.stop - keys.start for keys, _ in tiles)

@torch.compiler.disable  # nobody wants T steps unrolled in one graph
def tiled(x, q, k, v, value_embed, rotary, weights, window, start=None, qk_norm=True, capture=None):
    """
    One recurrent layer over positions 0 .. T-1, differentiable once.
    x (B, T, D): its input. q (B, H, T, d), k, v (B, G, T, d): queries and temporary pairs, rotated and normed.
    value_embed (B, T, G*d) or None; rotary: two tables (T, 1, d); qk_norm=False leaves the final keys unnormed.
    weights, (out, in) each: Wo, Wk over Wv over the gate (the gate with value_embed only), W1, W2.
    start (B,) int64: keys before it are padding, which no query sees but its own; None: no padding.
    capture: walk whole blocks as CUDA graphs, to the same numbers; None: on CUDA.
    Returns y (B, T, D) and the final k, v (B, G, T, d).
    """
    capture = x.is_cuda if capture is None else capture
    return Tiled.apply(window, start, qk_norm, capture, x, q, k, v, value_embed, *rotary, *weights)

class Tiled(torch.autograd.Function):
    """
    tiled(). Inside, all tensors have their positions in dimension 1: queries are (N, T*R, d), pairs (N, T, d), with N = B*G
    rows, each with its R = H/G queries a position.
    """

    @staticmethod
    def forward(ctx, window, start, qk_norm, capture, x, q, k, v, value_embed, cos, sin, *weights):
        (B, G, T, d), R, wide = k.shape, q.size(1) // k.size(1), torch.promote_types(x.dtype, torch.float32)
        q = q.unflatten(1, (G, R)).transpose(2, 3).reshape(B * G, T * R, d) * d**-0.5
        k, v = k.reshape(B * G, T, d), v.reshape(B * G, T, d)
        padding = None if start is None else (torch.arange(T, device=x.device) < start[:, None]).repeat_interleave(G, dim=0)
        # the running softmax of every query: maximum, sum and weighted sum so far, which is the temporary pair
        top = (q * k.repeat_interleave(R, dim=1)).sum(-1, dtype=wide)
        total, mixed = torch.ones_like(top), v.to(wide).repeat_interleave(R, dim=1)
        a, y, final_k, final_v = torch.empty_like(x), torch.empty_like(x), torch.empty_like(k), torch.empty_like(v)
        read = x, value_embed, cos.transpose(0, 1), sin.transpose(0, 1), padding, q, mixed
        walk = by_blocks(walk_forward, [w.t().contiguous() for w in weights], read, (top, total, a, y, final_k, final_v), window, qk_norm, capture)
        for block in range(0, T, BLOCK):
            walk(block)
            pass_on(min(block + BLOCK, T) - 1, q, final_k, final_v, padding, window, top, total, mixed)
        ctx.options = window, qk_norm, capture
        ctx.save_for_backward(x, q, k, v, value_embed, cos, sin, padding, a, top.add_(total.log_()), y, final_k, final_v, *weights)
        return y, final_k.view(B, G, T, d), final_v.view(B, G, T, d)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_k, grad_v):
        x, q, k, v, value_embed, cos, sin, padding, a, lse, y, final_k, final_v, *weights = ctx.saved_tensors
        (B, G, T, d), R, wide, gated = grad_k.shape, q.size(1) // k.size(1), lse.dtype, value_embed is not None
        (window, qk_norm, capture), (w_o, w_kv, w_fc, _) = ctx.options, weights
        # position() over again, for all positions at once
        h = x + a @ w_o.t()
        normed_h, normed_y = norm(h), norm(y)
        hidden = F.relu(normed_h @ w_fc.t())
        pair = normed_y @ w_kv.t()
        local_k, _, gate = split_pair(pair, G, gated)
        gate = torch.sigmoid(gate) if gated else None
        dv_dgate = 2 * gate * (1 - gate) * value_embed.unflatten(-1, (G, d)) if gated else None
        # gradients: of the output of every matrix, to be multiplied with its input after the walk; of pairs and queries
        dh, dhidden, dy, dpair = sent = [torch.empty_like(i) for i in (h, hidden, y, pair)]
        dk, dv = (grad.reshape(k.shape).to(wide, copy=True) for grad in (grad_k, grad_v))
        da, dq, delta = torch.empty_like(q), torch.zeros_like(q, dtype=wide), torch.empty_like(lse)
        kept = dv_dgate, normed_y, inverse_rms(y), 2 * hidden, normed_h, inverse_rms(h), cos.transpose(0, 1), sin.transpose(0, 1)
        read = grad_y, a, q, lse, final_k, final_v, padding, dk, inverse_rms(rotate(local_k, cos, sin)), *kept
        walk = by_blocks(walk_backward, weights, read, (da, delta, dq, dv, *sent), window, qk_norm, capture)
        for block in reversed(range(0, T, BLOCK)):
            pass_back(min(block + BLOCK, T) - 1, q, final_k, final_v, padding, window, lse, da, delta, dq, dk, dv)
            walk(block)
        # the temporary pairs, then the weights
        per_query = [i.repeat_interleave(R, dim=1) for i in (k, v)]
        p = torch.exp((q * per_query[0]).sum(-1, dtype=wide) - lse)[..., None]
        ds = p * ((da * per_query[1]).sum(-1, dtype=wide) - delta)[..., None]
        dq = (torch.addcmul(dq, ds, per_query[0]) * d**-0.5).view(B, G, T, R, d).transpose(2, 3).reshape(B, G * R, T, d)
        dk, dv_temporary = ((i * j).unflatten(1, (T, R)).sum(2).view(B, G, T, d) for i, j in ((ds, q), (p, da)))
        dvalue_embed = (2 * gate * dv.view(B, G, T, d).transpose(1, 2)).flatten(2) if gated else None
        products = ((dh, a), (dpair, normed_y), (dhidden, normed_h), (dy, hidden.square()))
        return None, None, None, None, dh, dq, dk, dv_temporary, dvalue_embed, None, None, *(g.flatten(0, 1).t() @ i.flatten(0, 1) for g, i in products)

# The two walks over the P positions of a block: tensors (.., P or P*R, ..), of which they overwrite the second group and may
# use up the first. They allocate and compute, and wait for no number: a CUDA graph may record them.

def walk_forward(weights, read, updated, window, qk_norm):
    """Every position of a block and the tiles within. mixed and updated go on from the larger tiles; weights are (in, out)."""
    x, value_embed, cos, sin, padding, q, mixed = read
    top, total, a, y, final_k, final_v = updated
    B, G, R = len(x), len(q) // len(x), q.size(1) // x.size(1)
    pairs = (i.unflatten(0, (B, G)).transpose(1, 2) for i in (final_k, final_v))
    for t, (x_t, value_embed_t, cos_t, sin_t, a_t, *stores) in enumerate(by_position(x, value_embed, cos, sin, a, y, *pairs)):
        now = slice(t * R, t * R + R)
        a_t.copy_((mixed[:, now] / total[:, now, None]).view(B, -1))
        for store, new in zip(stores, position(x_t, a_t, value_embed_t, cos_t, sin_t, *weights, G, qk_norm)):
            store.copy_(new)
        pass_on(t, q, final_k, final_v, padding, window, top, total, mixed)

def walk_backward(weights, read, updated, window, qk_norm):
    """The same in reverse. dk, dq and dv go on from the larger tiles."""
    grad_y, a, q, lse, final_k, final_v, padding, dk, r_k, *kept = read
    da, delta, dq, dv, *sent = updated
    (B, P, _), G, R = a.shape, len(q) // len(a), q.size(1) // a.size(1)
    heads = (i.unflatten(0, (B, G)).transpose(1, 2) for i in (dk, dv, final_k))
    here, stores = by_position(grad_y, *heads, r_k, *kept), by_position(*sent)
    for t in reversed(range(P)):
        pass_back(t, q, final_k, final_v, padding, window, lse, da, delta, dq, dk, dv)
        da_t, *new = position_backward(*here[t], *weights, qk_norm)  # dk and dv are complete
        for store, gradient in zip(stores[t], new):
            store.copy_(gradient)
        now = slice(t * R, t * R + R)
        da[:, now] = da_t.view(-1, R, da.size(-1))
        delta[:, now] = (da_t * a[:, t]).view(-1, R, da.size(-1)).sum(-1)

def pass_on(t, q, k, v, padding, window, top, total, mixed):
    """The tile behind position t: its keys are done, and the running softmax of its queries takes them in."""
    for rows, keys, queries in parts(t, q, k, window):
        s = scores(q, k, rows, keys, queries, padding, window)
        old, n, o = top[rows, queries], total[rows, queries], mixed[rows, queries]
        new = torch.maximum(old, s.amax(-1))
        p, decay = s.sub_(new[..., None]).exp_(), torch.exp(old - new)
        torch.addcmul(p.sum(-1), n, decay, out=n)
        torch.addcmul(torch.bmm(p.to(v.dtype), v[rows, keys]), o, decay[..., None], out=o)
        old.copy_(new)

def pass_back(t, q, k, v, padding, window, lse, da, delta, dq, dk, dv):
    """The same tile backwards: its queries are done, and what they send to its keys is added."""
    for rows, keys, queries in parts(t, q, k, window):
        p = scores(q, k, rows, keys, queries, padding, window).sub_(lse[rows, queries, None]).exp_()
        ds = torch.bmm(da[rows, queries], v[rows, keys].mT).sub_(delta[rows, queries, None]).mul_(p).to(q.dtype)
        dq[rows, queries] += torch.bmm(ds, k[rows, keys])
        dk[rows, keys] += torch.bmm(ds.mT, q[rows, queries])
        dv[rows, keys] += torch.bmm(p.to(q.dtype).mT, da[rows, queries])

def by_position(*tensors):
    """A list of tuples: each tensor's view at position 0, 1, .. of dimension 1; None stays."""
    P = tensors[0].size(1)
    return list(zip(*([None] * P if x is None else x.unbind(1) for x in tensors)))

def parts(t, q, k, window):
    """The tile behind position t as a list of (rows, keys, queries * R): all rows, or as many as have SCRATCH scores."""
    (N, T, _), R = k.shape, q.size(1) // k.size(1)
    found = tile(t, T, window)
    if found is None:
        return []
    keys, queries = found
    n = max(SCRATCH // ((queries.stop - queries.start) * R * (keys.stop - keys.start)), 1)
    return [(slice(row, row + n), keys, slice(queries.start * R, queries.stop * R)) for row in range(0, N, n)]

def scores(q, k, rows, keys, queries, padding, window):
    """q k of a part, (rows, queries * R, keys), in float32 at least; -inf beyond the window and at padding (N, T)."""
    s = torch.bmm(q[rows, queries], k[rows, keys].mT).to(torch.promote_types(q.dtype, torch.float32))
    R = q.size(1) // k.size(1)
    hidden = None if padding is None else padding[rows, None, keys]
    if queries.stop // R - 1 - keys.start > window:
        p, j = (torch.arange(i.start, i.stop, device=q.device) for i in (queries, keys))
        beyond = j < p[:, None] // R - window
        hidden = beyond if hidden is None else hidden | beyond
    return s if hidden is None else s.masked_fill_(hidden, -torch.inf)


# -----------------------------------------------------------------------------
# Blocks, and their capture. A graph of all T positions would have 10^5 nodes and be another one for every T; torch.compile
# would have thousands of operations to trace and to generate code for, tiles of every size among them.

def by_blocks(walk, weights, read, updated, window, qk_norm, capture):
    """
    A function of the first position of a block that walks it: one of the walks above on the block's part of the tensors of
    read and updated, (.., T * n, ..) with n rows a position. With capture, whole blocks go through a Graph.
    """
    T, options = read[0].size(1), (min(window, BLOCK), qk_norm)
    def cut(first):
        rows = [(x, 0 if x is None else x.size(1) // T) for x in (*read, *updated)]
        parts = [None if x is None else x[:, first * n:(first + BLOCK) * n] for x, n in rows]
        return parts[:len(read)], parts[len(read):]
    graph = graph_of(walk, weights, *cut(0), options) if capture and T >= BLOCK else None
    def run(first):
        if graph and first + BLOCK <= T:
            graph.run(*cut(first))
        else:
            walk(weights, *cut(first), *options)
    return run

graphs = {}  # by kind of block, the least recently used first: a Graph; None: walked once so far; False: capture failed

def graph_of(walk, weights, read, updated, options):
    """
    The Graph of this kind of block, with these weights, if there is one: a kind is captured when a second layer or step comes
    with it, and if that fails (out of memory), a warning says so and it is walked as on a CPU.
    """
    key = walk, options, *(None if x is None else (x.shape, x.dtype, x.device) for x in (*weights, *read, *updated))
    seen, graph = key in graphs, graphs.pop(key, None)
    if seen and graph is None:
        try:
            graph = Graph(walk, weights, read, updated, options)
        except RuntimeError as e:
            warnings.warn("recurrent layers run without a CUDA graph, and slower: " + str(e).partition("\n")[0], RuntimeWarning)
            graph = False
    graphs[key] = graph
    if len(graphs) > GRAPHS:
        del graphs[next(iter(graphs))]
    if graph:
        copy(graph.own[0], weights)
    return graph

class Graph:
    """
    walk() over a block, recorded once on tensors of its own and replayed for every block of the same shapes: of all layers,
    whatever T, in training, evaluation and recomputation. It keeps the weights of one layer and BLOCK positions, and
    nothing outlives a run: what goes in and out is copied. Weights are, too: a layer casts and concatenates them anew every
    time, so they have no address that lasts, and a copy costs what one of T positions reads. Runs are to be on one stream.
    """

    def __init__(self, walk, weights, read, updated, options):
        self.own = [[None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in group] for group in (weights, read, updated)]
        self.replay = record(lambda: walk(*self.own, *options), weights[0].device)

    def run(self, read, updated):
        copy(self.own[1], read), copy(self.own[2], updated)
        self.replay()
        copy(updated, self.own[2])

def copy(to, tensors):
    for mine, x in zip(to, tensors):
        if x is not None:
            mine.copy_(x)

def record(work, device):
    """
    work() as a CUDA graph: a function that launches the same kernels on the same memory again. The backward pass runs on
    autograd's thread, maybe while NCCL's watches: hence thread_local. What work() allocates is some MiB, so every graph
    has a memory pool of its own.
    """
    graph, stream, caller = torch.cuda.CUDAGraph(), side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):  # leaves the stream also where a failed capture would not
        work()  # once outside: kernels are loaded, and cuBLAS has its workspace for this thread and stream, not in the pool
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    caller.wait_stream(stream)
    return graph.replay

@cache
def side_stream(device):
    return torch.cuda.Stream(device)
