"""
The two stores of keys and values, and attention over what they hold.

KVCache is the store of inference: the standard cache, preallocated and written in place. KVBuffer is the
store of training: autograd flows through it, so nothing in it is ever overwritten. The protocol that both
follow is KVStore.

In a KVBuffer a layer holds a tuple of disjoint parts (positions, k, v): a range of positions, their keys
and their values. A pass that recomputes a subset puts one part in the place of another and leaves the rest
alone. Nothing is copied, and no mask is needed, because queries a + S*m and keys b + S*n of the same stride
S meet in an ordinary square attention:

    key <= query  <=>  n <= m + floor((a - b) / S)

For residue classes a, b < S this is causal attention (b <= a), or strictly causal attention (b > a), which
is causal attention without the first query. Every part goes through a flash attention kernel of its own,
and the results are merged by the log-sum-exp L of their scores:

    out = sum over parts of exp(L_part - L) * out_part,    L = logsumexp over parts of L_part

In the backward, the kernel of every part is given the merged out and L, from which it computes its own
share of the gradients, as in ring attention (arXiv 2310.01889). So a pass saves q, out, L and its own k and
v; everything else it shares with other passes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def take(x, positions, dim=1):
    """
    x at some positions along dim: a view for a range of positions, a copy for a tensor (P,) int64 of them.
    """
    if isinstance(positions, Tensor):
        return x.index_select(dim, positions)
    index = (slice(None),) * dim + (slice(positions.start, positions.stop, positions.step),)
    return x[index]

def dot_product_attention(q, k, v, mask=None, is_causal=False):
    """
    SDPA of q (B, n_head, P, d) over k, v (B, n_kv_head, n, d): n_head / n_kv_head query heads share a key
    head.
    """
    if q.is_meta:  # plan.py counts what is kept: without a device, SDPA does not choose the kernel of one
        if mask is not None:
            mask = mask.to(q.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)[0]
    grouped = q.size(1) != k.size(1)
    if grouped and q.size(2) == 1:
        # without a grouped kernel: the queries of a key head are like positions that all see the same keys
        y = F.scaled_dot_product_attention(q.view(q.size(0), k.size(1), -1, q.size(3)), k, v, attn_mask=mask)
        return y.view(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

def attention_mask(positions, window, device):
    """
    The attention mask of queries at `positions` over keys 0 .. positions[-1]: a query at p sees the keys
    from p - window to p. Returns (mask (P, keys) bool or None, is_causal, first key), the cheapest form
    that SDPA accepts: None, False means that every query sees all keys from the first key on.
    """
    last = positions[-1]
    if len(positions) == 1:  # a decoding step
        return None, False, max(last - window, 0)
    if positions == range(last + 1) and window >= last:  # a full pass, full attention
        return None, True, 0
    first = max(positions[0] - window, 0)
    query = torch.arange(positions.start, positions.stop, positions.step, device=device)[:, None]
    key = torch.arange(first, last + 1, device=device)[None, :]
    return (key <= query) & (key >= query - window), False, first


# -----------------------------------------------------------------------------
# The stores

class KVStore:
    """
    The protocol of a store, all that model.py knows of one. The keys and values of P positions of a layer
    are tensors (B, n_kv_head, P, d), the queries (B, n_head, P, d); `positions` is the range of the P
    positions. A KVCache also takes a single position as a tensor (1,) int64 on the device: then no number of
    a decoding step is known to Python, and the step can be compiled or captured once for all positions.
    """
    start = None  # (B,) int64: the position where the text of each row starts, after padding; None: all at 0
    first = 0  # the largest start; the row that starts last is the last to reach the end of its context
    local = None  # a list: local_kv() of the first pass of each layer, for GPT.refresh; None: not kept

    def write(self, layer, positions, k, v):
        """Store the keys and values of one layer at `positions`, in place of any that were there."""
        raise NotImplementedError

    def view(self, positions, window):
        """
        What queries at `positions` see of a layer with this window, from `window` positions back up to their
        own, in the form that attend() takes. Computed once for all layers with the same window.
        """
        raise NotImplementedError

    def attend(self, layer, positions, q, k, v, view):
        """
        Write k and v at `positions`, then let every query see the view() of what the layer holds. Returns
        (B, n_head, P, d).
        """
        raise NotImplementedError

    def previous_tokens(self, positions, idx):
        """
        Take note of the tokens idx (B, P) int64 at `positions`. Returns the tokens before them (B, P), -1
        where there is none, at position 0 and where a row starts; None: idx are whole rows, from position 0
        on.
        """
        raise NotImplementedError


class KVBuffer(KVStore):
    """The store of training. Writing makes new parts, and gradients flow through all of them."""

    def __init__(self, n_layer, keep_local=False):
        """keep_local: also keep what the first pass computed without memory, for GPT.refresh."""
        self.parts = [()] * n_layer  # a layer: a tuple of (positions, k, v), the module's docstring
        self.local = [None] * n_layer if keep_local else None

    def write(self, layer, positions, k, v):
        left = split(self.parts[layer], positions, 2)
        # the newest first, because merging starts with the queries' own keys
        self.parts[layer] = ((positions, k, v), *left)

    def view(self, positions, window):
        return window

    def attend(self, layer, positions, q, k, v, window):
        self.write(layer, positions, k, v)
        return attend(q, positions, self.parts[layer], window)

    def previous_tokens(self, positions, idx):
        if positions != range(len(positions)):
            raise ValueError(f"a KVBuffer keeps no tokens: what is before {positions} is not known, "
                             "embed whole rows once for all passes")
        return None

    def copy(self):
        """A store that can be written without changing this one."""
        other = KVBuffer(len(self.parts))
        other.parts = list(self.parts)
        other.local = self.local
        return other

    def detach(self):
        """Cut the gradient between what was written so far and what will read it."""
        for layer, parts in enumerate(self.parts):
            self.parts[layer] = tuple((positions, k.detach(), v.detach()) for positions, k, v in parts)
        if self.local is not None:
            self.local = [[x.detach() for x in local] for local in self.local]


class KVCache(KVStore):
    """
    The store of inference: preallocated tensors (B, n_kv_head, slots, d), written in place, and the tokens.
    length: how many positions it holds. rolling: layers with a window keep only that window, position p in
    slot p mod slots; one position is then written at a time.
    start (B,) int64: rows of different lengths are aligned at their ends, and this is where each begins.
    Rotary embedding is relative, so a row may start anywhere. None: all start at 0.
    """

    def __init__(self, config, batch_size, length, device, dtype, rolling=False, start=None):
        self.length = length
        self.start = start
        if start is not None:
            self.first = int(start.max())
        self.slots = {}  # by window
        self.k = []  # by layer
        self.v = []
        for layer in range(config.n_layer):
            window = config.window(layer)
            self.slots[window] = min(length, window + 1) if rolling else length
            shape = batch_size, config.n_kv_head, self.slots[window], config.head_dim
            self.k.append(torch.zeros(shape, device=device, dtype=dtype))
            self.v.append(torch.zeros(shape, device=device, dtype=dtype))
        self.tokens = torch.full((batch_size, length), -1, device=device)  # by position; noted for smear only

    def write(self, layer, positions, k, v):
        slots = self.k[layer].size(2)
        if isinstance(positions, Tensor):
            slot = positions % slots
            self.k[layer].index_copy_(2, slot, k)
            self.v[layer].index_copy_(2, slot, v)
            return
        if positions[-1] >= slots:  # around the end of a rolling layer
            slot = positions[-1] % slots
            positions = range(slot, slot + 1)
        take(self.k[layer], positions, dim=2).copy_(k)
        take(self.v[layer], positions, dim=2).copy_(v)

    def previous_tokens(self, positions, idx):
        if isinstance(positions, Tensor):
            self.tokens.index_copy_(1, positions, idx)
            index = positions
        else:
            take(self.tokens, positions).copy_(idx)
            index = torch.arange(positions.start, positions.stop, positions.step, device=idx.device)
        start = 0 if self.start is None else self.start[:, None]
        return take(self.tokens, (index - 1).clamp(min=0)).masked_fill(index <= start, -1)

    def view(self, positions, window):
        """
        (mask, is_causal, first slot, end) of the slots that are read: mask (P, n) bool, with `start` (B, 1,
        P, n), or None; see attention_mask().
        """
        slots = self.slots[window]
        if isinstance(positions, Tensor):
            return self.mask(positions, positions, window, range(slots)), False, 0, slots
        rolling = slots < self.length
        last = positions[-1]
        end = min(last + 1, slots)
        if self.start is None:
            mask, is_causal, first = attention_mask(positions, window, self.tokens.device)
            return mask, is_causal, 0 if rolling else first, end  # rolling: it holds nothing but its window
        first = 0 if rolling else max(positions[0] - window, 0)
        query = torch.arange(positions.start, positions.stop, positions.step, device=self.start.device)
        return self.mask(query, last, window, range(first, end)), False, first, end

    def mask(self, query, last, window, slots):
        """
        Which of a range of slots are seen by queries at the positions `query` (P,), the newest position that
        was written being `last`: (P, n) bool, or with `start` (B, 1, P, n).
        """
        slot = torch.arange(slots.start, slots.stop, device=query.device)
        key = last - (last - slot) % self.slots[window]  # the newest positions in these slots
        query = query[:, None]
        seen = (key >= query - window) & (key <= query) & (key >= 0)
        if self.start is not None:
            seen = seen & (key >= self.start[:, None, None])
            seen = (seen | (key == query))[:, None]  # padding sees itself: softmax over nothing would be NaN
        return seen

    def attend(self, layer, positions, q, k, v, view):
        self.write(layer, positions, k, v)
        mask, is_causal, first, end = view
        k = self.k[layer][:, :, first:end]
        v = self.v[layer][:, :, first:end]
        return dot_product_attention(q, k, v, mask, is_causal)

    def copy_from(self, other, n, repeats):
        """Take over positions 0 .. n-1 of a cache that is not rolling, every row `repeats` times."""
        for mine, theirs in zip(self.k + self.v, other.k + other.v):
            kept = torch.arange(max(n - mine.size(2), 0), n, device=mine.device)
            mine[:, :, kept % mine.size(2)] = theirs[:, :, kept].repeat_interleave(repeats, dim=0)
        self.tokens[:, :n] = other.tokens[:, :n].repeat_interleave(repeats, dim=0)

    def select_rows(self, rows):
        """Keep these rows, an int64 tensor (B,) of their numbers, in this order; one may be kept twice."""
        for x in (self.k, self.v):
            for layer, old in enumerate(x):
                x[layer] = old[rows]
        self.tokens = self.tokens[rows]
        if self.start is not None:
            self.start = self.start[rows]
            self.first = int(self.start.max())


# -----------------------------------------------------------------------------
# Parts

def residues(x, step, dim):
    """
    The residue classes x[i::step] along dim for i = 0 .. step-1: a list of views that come from one unbind,
    because its backward is a single stack, where that of slices is a sum of tensors padded with zeros.
    """
    n = x.size(dim)
    if n % step:
        dims_behind = x.dim() - 1 - dim  # F.pad counts from the last dimension
        x = F.pad(x, (0, 0) * dims_behind + (0, -n % step))
    columns = x.unflatten(dim, (-1, step)).unbind(dim + 1)
    return [column.narrow(dim, 0, len(range(i, n, step))) for i, column in enumerate(columns)]

def split(parts, positions, dim):
    """
    What is left of parts (positions, tensors ..) when `positions`, along dim, are taken out: a list of
    parts. If one residue class of a part goes, the others stay as views of it. Raises ValueError where
    anything else would be cut out.
    """
    left = []
    for p, *tensors in parts:
        apart = p[-1] < positions[0] or positions[-1] < p[0]
        never_meet = (p[0] - positions[0]) % math.gcd(p.step, positions.step) != 0
        if apart or never_meet:
            left.append((p, *tensors))
            continue
        covered = p[0] in positions and p[-1] in positions and p.step % positions.step == 0
        if covered:
            continue
        step = max(positions.step // p.step, 1)
        begins_in_p = positions[0] in p and positions[0] - p[0] < positions.step
        if not begins_in_p or positions != p[p.index(positions[0])::step]:
            raise ValueError(f"{positions} takes a piece out of {p}: "
                             "write residue classes of an earlier pass, or all of it")
        classes = zip(*(residues(x, step, dim) for x in tensors))
        for i, views in enumerate(classes):
            kept = p[i::step]
            if kept and kept != positions:
                left.append((kept, *views))
    return left

def relation(queries, keys, window):
    """
    How queries see a part of the keys, both ranges of positions, a query at p seeing keys p - window .. p:
    "none", "all", (shift, back) or "mixed". With (shift, back), query m sees the keys from m - shift - back
    to m - shift; back None means from the first. The first `shift` queries see nothing.
    """
    if keys[0] > queries[-1] or keys[-1] < queries[0] - window:
        return "none"
    if keys[-1] <= queries[0] and keys[0] >= queries[-1] - window:
        return "all"
    step = queries.step
    shift = -((queries.start - keys.start) // step)
    if keys.step != step or shift not in (0, 1) or len(keys) < len(queries) - shift:
        return "mixed"
    back = (window + keys.start - queries.start) // step - shift
    if back < 0:
        return "none"
    reaches_first_key = back >= len(queries) - shift - 1
    return shift, None if reaches_first_key else back


# -----------------------------------------------------------------------------
# Attention over parts

def attend(q, queries, parts, window):
    """
    Attention of q (B, n_head, P, d) at the positions `queries` over parts (positions, k, v), with k and v
    (B, n_kv_head, n, d); each query sees the keys from `window` positions back up to its own. Scale
    1/sqrt(d). Returns (B, n_head, P, d).
    """
    # the parts that any query sees
    relations, positions, ks, vs = [], [], [], []
    for p, k, v in parts:
        seen = relation(queries, p, window)
        if seen != "none":
            relations.append(seen)
            positions.append(p)
            ks.append(k)
            vs.append(v)

    # one part, all of the past: ordinary causal attention
    if relations == [(0, None)]:
        n = len(queries)
        return dot_product_attention(q, ks[0][:, :, :n], vs[0][:, :, :n], is_causal=True)

    has_kernels = q.device.type in ("cpu", "meta") or on_cuda(q)
    if len(queries) == 1 or "mixed" in relations or not has_kernels:
        return attend_dense(q, queries, relations, positions, ks, vs, window)

    # a flash kernel for each part
    kernels = []
    for seen in relations:
        if seen == "all":
            kernels.append((0, None, False))
        else:
            shift, back = seen
            kernels.append((shift, back, True))
    return Merged.apply(q, kernels, *ks, *vs)

def attend_dense(q, queries, relations, positions, ks, vs, window):
    """
    The same over concatenated parts and with a mask: for a single query, odd shapes, and devices without
    kernels.
    """
    mask = None
    if set(relations) != {"all"}:
        query = torch.arange(queries.start, queries.stop, queries.step, device=q.device)[:, None]
        key = torch.cat([torch.arange(p.start, p.stop, p.step, device=q.device) for p in positions])
        mask = (key <= query) & (key >= query - window)
    return dot_product_attention(q, torch.cat(ks, dim=2), torch.cat(vs, dim=2), mask)


class Merged(torch.autograd.Function):
    """
    Attention over several parts, a flash kernel for each, merged by log-sum-exp (see the top of this file).
    """

    @staticmethod
    def forward(ctx, *inputs):
        """
        inputs: q; for each part, (shift, back, causal); the k of all parts; the v of all parts. The first
        part must show every query a key. (The inputs are starred because torch.compile, where no gradient
        is wanted, tells from the number of named arguments whether there is a ctx.)
        """
        q, relations, *kv = inputs
        n = len(relations)
        seeds = []
        for i, (shift, back, causal) in enumerate(relations):
            part = queries_and_keys(shift, causal, q, kv[i], kv[n + i])
            part_out, part_lse, part_seeds = kernel(*part, causal, back)
            seeds += part_seeds
            if i == 0:
                assert shift == 0
                lse = part_lse
                out = part_out if n == 1 else part_out.to(lse.dtype)  # merge in float32 or wider
            else:
                old_lse = lse[:, :, shift:]
                share = torch.sigmoid(part_lse - old_lse)  # exp(L_part) / (exp(L_part) + exp(L_old))
                out[:, :, shift:].lerp_(part_out.to(out.dtype), share.unsqueeze(-1))
                old_lse.copy_(torch.logaddexp(old_lse, part_lse))
        out = out.to(q.dtype)
        ctx.relations = relations
        ctx.save_for_backward(q, out, lse, *kv, *seeds)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        n = len(ctx.relations)
        q, out, lse, *saved = ctx.saved_tensors
        kv, seeds = saved[:2 * n], saved[2 * n:]
        grads = [None] * (2 * n)
        for i, (shift, back, causal) in enumerate(ctx.relations):
            merged = [x[:, :, shift:] for x in (grad, out, lse)]
            part = queries_and_keys(shift, causal, q, kv[i], kv[n + i])
            part_dq, *dkv = kernel_backward(*merged, *part, causal, back, seeds[2 * i:2 * i + 2])
            if i == 0:
                dq = part_dq
            else:
                dq[:, :, shift:] += part_dq
            for j, dx in zip((i, n + i), dkv):
                unseen = kv[j].size(2) - dx.size(2)  # keys behind the last query get no gradient
                grads[j] = F.pad(dx, (0, 0, 0, unseen)) if unseen else dx
        return dq, None, *grads

def queries_and_keys(shift, causal, q, k, v):
    """
    What of q, k and v meets in a part: the square of causal attention, or all keys where all of them are
    seen.
    """
    n = q.size(2) - shift if causal else k.size(2)
    return q[:, :, shift:], k[:, :, :n], v[:, :, :n]


# -----------------------------------------------------------------------------
# The flash kernels that torch has

def on_cuda(q):
    """
    Do CUDA's flash kernels take this? Only in half precision, common.compute_dtype() being bf16 where they
    run, and only heads of a multiple of 8 and at most 256 numbers.
    """
    d = q.size(-1)
    return q.is_cuda and q.dtype == torch.bfloat16 and d % 8 == 0 and d <= 256

def window_mask(n, back, like):
    """The mask of a window, for kernels without one: (n, n), 0 where m - back <= key <= m, -inf elsewhere."""
    ones = torch.ones(n, n, dtype=torch.bool, device=like.device)
    seen = ones.tril() & ones.triu(-back)
    return torch.zeros(n, n, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)

def expand_heads(n_head, k, v):
    """
    k and v (B, n_kv_head, n, d) with every head repeated for its query heads, for kernels without grouped
    queries.
    """
    repeats = n_head // k.size(1)
    if repeats == 1:
        return k, v
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)

def kernel(q, k, v, causal, back):
    """
    torch's flash attention of q (B, n_head, P, d) over k, v (B, n_kv_head, n, d). causal: over the last
    `back` keys and the query's own (back None: over all up to its own). Returns out like q; the log-sum-exp
    L (B, n_head, P) in float32 or wider; and a list of the two random states that CUDA's backward asks for
    (empty on a CPU).
    """
    if on_cuda(q):
        inputs = [x.transpose(1, 2) for x in (q, k, v)]  # (B, P, heads, d)
        out, lse, *seeds, _ = aten._flash_attention_forward(
            *inputs, None, None, q.size(2), k.size(2), 0.0, causal, False, window_size_left=back)
        return out.transpose(1, 2), lse, seeds
    k, v = expand_heads(q.size(1), k, v)
    mask = None if back is None else window_mask(q.size(2), back, q)
    is_causal = causal and mask is None
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
    return out, lse, []

def kernel_backward(grad, out, lse, q, k, v, causal, back, seeds):
    """The backward of kernel(), given the merged out and L: the gradients of q, k and v."""
    if on_cuda(q):
        inputs = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        return [x.transpose(1, 2) for x in cuda_backward(*inputs, lse, causal, back, *seeds)]
    n_kv_head = k.size(1)
    k, v = expand_heads(q.size(1), k, v)
    mask = None if back is None else window_mask(q.size(2), back, q)
    is_causal = causal and mask is None
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask)
    if q.size(1) != n_kv_head:  # the sum over the query heads that share a key head
        dk = dk.unflatten(1, (n_kv_head, -1)).sum(2)
        dv = dv.unflatten(1, (n_kv_head, -1)).sum(2)
    return dq, dk, dv

@torch.library.custom_op("nanolrt::flash_attention_backward", mutates_args=())
def cuda_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                  back: int | None, seed: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    CUDA's kernel_backward(), with heads in dimension 2. It is an operator of its own, into which
    torch.compile does not look, because the kernel takes L for dense without asking for its strides: Inductor
    traces a contiguous() away and afterwards gives L padded ones.
    """
    return aten._flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, q.size(1), k.size(1), 0.0, causal, seed, offset,
        window_size_left=back)

@cuda_backward.register_fake
def _(grad, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

def flash_flops(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, *_, window_size_left=None, **__):
    """
    FLOPs of aten._flash_attention_forward on q (B, P, n_head, d) and k (B, n, n_kv_head, d): two products,
    for the queries and keys that meet.
    """
    B, P, n_head, d = q.shape
    pairs = P * k.size(1)
    if causal:
        pairs = P * (P + 1) // 2
        if window_size_left is not None and window_size_left < P:
            beyond = P - 1 - window_size_left
            pairs -= beyond * (beyond + 1) // 2
    return 4 * B * n_head * d * pairs

# By FLOPs the compiler chooses what it computes again with activation checkpointing. torch's own formula
# takes positions for heads, which makes them so few that every call was.
flop_registry[aten._flash_attention_forward] = flash_flops
