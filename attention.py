"""
Attention over keys and values that several passes have written, for training.

What a layer holds is a tuple of disjoint parts (positions, k, v): a range of positions, their keys and values. A pass
that recomputes a subset puts one part in the place of another and leaves the rest alone: nothing is copied, and no mask
is needed, because queries a + S*m and keys b + S*n of the same stride meet in an ordinary square attention:

    key <= query  <=>  n <= m + floor((a - b) / S)

which for residue classes a, b < S is causal (b <= a), or strictly causal (b > a): causal without the first query. Each
part goes through a flash kernel of its own, and the results merge by the log-sum-exp of their scores, L:

    out = sum over parts of exp(L_part - L) * out_part,    L = logsumexp over parts of L_part

In the backward every part's kernel is handed the merged out and L, from which it computes its own share of the gradients,
as in ring attention (arXiv 2310.01889). So a pass saves q, out, L and its own k and v; all else it shares with other passes.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


class KVBuffer:
    """Functional store for training: writing makes new parts, and gradients flow through all of them."""

    def __init__(self, n_layer, keep_local=False):
        """keep_local: also keep what the first pass computed without memory in each layer, for GPT.refresh."""
        self.parts = [()] * n_layer
        self.local = [None] * n_layer if keep_local else None
        self.first, self.start = 0, None  # where text starts: rows are not padded

    def write(self, layer, positions, k, v):
        """Keys and values (B, n_kv_head, P, d) of one layer at `positions`, in place of any that were there."""
        left = split(self.parts[layer], positions, 2)
        self.parts[layer] = ((positions, k, v), *left)  # the newest first: merging starts with the queries' own keys

    def attend(self, layer, positions, q, k, v, window):
        """Write, then attend: q (B, n_head, P, d) over all keys from window positions back up to their own -> like q."""
        self.write(layer, positions, k, v)
        return attend(q, positions, self.parts[layer], window)

    def copy(self):
        """A store that can be written without changing this one."""
        other = KVBuffer(len(self.parts))
        other.parts, other.local = list(self.parts), self.local
        return other

    def detach(self):
        """Cut the gradient between what was written so far and what will read it."""
        self.parts = [tuple((p, k.detach(), v.detach()) for p, k, v in parts) for parts in self.parts]
        if self.local is not None:
            self.local = [[x.detach() for x in local] for local in self.local]

def residues(x, step, dim):
    """x[i::step] along dim for i = 0 .. step-1: views from one unbind, whose backward is one stack and no sum of padded slices."""
    n = x.size(dim)
    whole = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, -n % step)) if n % step else x
    return [c.narrow(dim, 0, len(range(i, n, step))) for i, c in enumerate(whole.unflatten(dim, (-1, step)).unbind(dim + 1))]

def split(parts, positions, dim):
    """
    What is left of parts (positions, tensors ..) when `positions`, along dim, are taken out: a list of parts. One residue
    class of a part goes, the others stay as views of it. Raises ValueError for a piece of a part in any other pattern.
    """
    left = []
    for p, *x in parts:
        if p[-1] < positions[0] or positions[-1] < p[0] or (p[0] - positions[0]) % math.gcd(p.step, positions.step):
            left.append((p, *x))  # apart
        elif p[0] in positions and p[-1] in positions and p.step % positions.step == 0:
            continue  # covered
        elif positions[0] in p and positions == p[p.index(positions[0])::max(positions.step // p.step, 1)] and positions[0] - p[0] < positions.step:
            step = positions.step // p.step
            classes = zip(*(residues(tensor, step, dim) for tensor in x))
            left += [(p[i::step], *c) for i, c in enumerate(classes) if p[i::step] != positions and p[i::step]]
        else:
            raise ValueError(f"{positions} takes a piece out of {p}: write residue classes of an earlier pass, or all of it")
    return left

def relation(queries, keys, window):
    """
    How queries see a part of the keys, both ranges of positions, p - window <= key <= p: "none", "all", (shift, back) or
    "mixed". (shift, back): query m sees keys m - shift - back .. m - shift, back None: from the first; the first `shift`
    queries see nothing.
    """
    if keys[0] > queries[-1] or keys[-1] < queries[0] - window:
        return "none"
    if keys[-1] <= queries[0] and keys[0] >= queries[-1] - window:
        return "all"
    step, shift = queries.step, -((queries.start - keys.start) // queries.step)
    if keys.step != step or shift not in (0, 1) or len(keys) < len(queries) - shift:
        return "mixed"
    back = (window + keys.start - queries.start) // step - shift
    return "none" if back < 0 else (shift, back if back < len(queries) - shift - 1 else None)

def attend(q, queries, parts, window):
    """
    Attention of q (B, n_head, P, d) at `queries` over parts (positions, k, v) with k, v (B, n_kv_head, n, d), each query
    seeing the keys from `window` positions back up to its own. Scale 1/sqrt(d). Returns (B, n_head, P, d).
    """
    seen = [(relation(queries, p, window), p, k, v) for p, k, v in parts]
    relations, positions, k, v = zip(*[part for part in seen if part[0] != "none"])
    gqa = q.size(1) != k[0].size(1)
    if relations == ((0, None),):
        return F.scaled_dot_product_attention(q, k[0][:, :, :len(queries)], v[0][:, :, :len(queries)], is_causal=True, enable_gqa=gqa)
    if len(queries) > 1 and "mixed" not in relations and (q.device.type == "cpu" or on_cuda(q)):
        return Merged.apply(q, [(0, None, False) if r == "all" else (*r, True) for r in relations], *k, *v)
    return dense(q, queries, relations, positions, k, v, window)

def dense(q, queries, relations, positions, k, v, window):
    """The same over one concatenated store with a mask: for a single query, odd shapes, and devices without the kernels."""
    mask = None
    if set(relations) != {"all"}:
        at = [torch.arange(p.start, p.stop, p.step, device=q.device) for p in (queries, *positions)]
        query, key = at[0][:, None], torch.cat(at[1:])
        mask = (key <= query) & (key >= query - window)
    return F.scaled_dot_product_attention(q, torch.cat(k, dim=2), torch.cat(v, dim=2), attn_mask=mask, enable_gqa=q.size(1) != k[0].size(1))


class Merged(torch.autograd.Function):
    """Attention over several parts, each by a flash kernel, merged by log-sum-exp (the module's docstring)."""

    @staticmethod
    def forward(ctx, *inputs):
        """
        inputs: q; relations, a (shift, back, causal) a part; all k, all v. The first part must show every query a key.
        (Starred, because torch.compile, where no gradient is wanted, counts the names to tell whether there is a ctx.)
        """
        q, relations, *kv = inputs
        n, seeds = len(relations), []
        for i, (shift, back, causal) in enumerate(relations):
            new, new_lse, seed = kernel(*cut(shift, causal, q, kv[i], kv[n + i]), causal, back)
            seeds += seed
            if i == 0:
                assert shift == 0
                out, lse = (new, new_lse) if n == 1 else (new.to(new_lse.dtype), new_lse)  # merge in float32 or wider
            else:
                old = lse[:, :, shift:]
                out[:, :, shift:].lerp_(new.to(out.dtype), torch.sigmoid(new_lse - old).unsqueeze(-1))
                old.copy_(torch.logaddexp(old, new_lse))
        out = out.to(q.dtype)
        ctx.relations = relations
        ctx.save_for_backward(q, out, lse, *kv, *seeds)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        n = len(ctx.relations)
        q, out, lse, *saved = ctx.saved_tensors
        kv, seeds, grads = saved[:2 * n], saved[2 * n:], [None] * (2 * n)
        for i, (shift, back, causal) in enumerate(ctx.relations):
            rows = [x[:, :, shift:] for x in (grad, out, lse)]
            new, *dkv = kernel_backward(*rows, *cut(shift, causal, q, kv[i], kv[n + i]), causal, back, seeds[2 * i:2 * i + 2])
            if i == 0:
                dq = new
            else:
                dq[:, :, shift:] += new
            for j, dx in zip((i, n + i), dkv):  # keys behind the last query get nothing
                grads[j] = F.pad(dx, (0, 0, 0, kv[j].size(2) - dx.size(2))) if dx.size(2) < kv[j].size(2) else dx
        return dq, None, *grads

def on_cuda(q):
    """Can CUDA's flash kernels take this? They know half precision only; sample.compute_dtype() picks bf16 where they run."""
    return q.is_cuda and q.dtype == torch.bfloat16

def cut(shift, causal, q, k, v):
    """The square of queries and keys that meet in a part; where all is seen, all."""
    n = q.size(2) - shift if causal else k.size(2)
    return q[:, :, shift:], k[:, :, :n], v[:, :, :n]

def band(n, back, like):
    """The mask of a window for kernels without one: (n, n), 0 where m - back <= key <= m and -inf elsewhere."""
    ones = torch.ones(n, n, dtype=torch.bool, device=like.device)
    return torch.zeros(n, n, dtype=like.dtype, device=like.device).masked_fill_(~(ones.tril() & ones.triu(-back)), -torch.inf)

def kernel(q, k, v, causal, back):
    """
    torch's flash attention of q (B, n_head, P, d), k, v (B, n_kv_head, n, d), over the last `back` keys and the query's own
    (None: all): out like q, L (B, n_head, P) in float32 or wider, and the random state that CUDA's backward asks for.
    """
    if on_cuda(q):
        out, lse, *seeds, _ = aten._flash_attention_forward(*(x.transpose(1, 2) for x in (q, k, v)), None, None, q.size(2), k.size(2),
                                                            0.0, causal, False, window_size_left=back)
        return out.transpose(1, 2), lse, seeds
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v)) if q.size(1) != k.size(1) else (k, v)
    mask = None if back is None else band(q.size(2), back, q)
    return *aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal and mask is None, attn_mask=mask), []

def kernel_backward(grad, out, lse, q, k, v, causal, back, seeds):
    """Its backward, given the merged out and L: the gradients of q, k and v."""
    if on_cuda(q):
        args = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        grads = aten._flash_attention_backward(*args, lse.contiguous(), None, None, q.size(2), k.size(2), 0.0, causal, *seeds, window_size_left=back)
        return [x.transpose(1, 2) for x in grads]
    heads = k.size(1)
    k, v = (x.repeat_interleave(q.size(1) // heads, dim=1) for x in (k, v)) if q.size(1) != heads else (k, v)
    mask = None if back is None else band(q.size(2), back, q)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal and mask is None, attn_mask=mask)
    if q.size(1) != heads:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv
