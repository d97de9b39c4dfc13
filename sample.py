"""
Sample from a trained run, with memory carried from token to token: one forward a token through the KV cache.

    python sample.py                                   # the newest run, from an empty prompt
    python sample.py --checkpoint runs/d4_shared --prompt "The history of" --num-samples 3
"""

import codecs
import json
import os
import sys
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from interleave import Schedule, prefill
from model import GPT, GPTConfig, KVCache
from prepare_data import ArgumentParser, UserError, at_least, check_folder, load_tokenizer, run_main, write_atomic


# -----------------------------------------------------------------------------
# Runs and checkpoints. A run is a folder with ckpt_*.pt, the tokenizer's two files and log.jsonl.

def find_checkpoint(path=None):
    """
    The checkpoint file that `path` means: a file itself, the newest ckpt_*.pt of a run folder, or for None the newest
    of all runs/. Raises UserError where there is none.
    """
    if path is None:
        found = sorted(Path("runs").glob("*/ckpt_*.pt"), key=lambda f: f.stat().st_mtime)
        if not found:
            raise UserError("no run in runs/: train one first, for example with `python train.py --depth 4 --lrt shared`")
        return found[-1]
    path = Path(path)
    try:
        if path.is_file():
            return path
        found = sorted(path.glob("ckpt_*.pt"))
    except OSError as e:
        raise UserError(f"cannot look for a checkpoint in {path}: {e.strerror}")
    if not found:
        raise UserError(f"no checkpoint in {path}" if path.is_dir() else f"no such run or checkpoint: {path}")
    return found[-1]

CHECKPOINT = dict(model=dict, optimizers=list, step=int, rows_seen=int, seconds=float, config=dict, schedule=dict, args=dict,
                  torch_rng=torch.Tensor, tokenizer_sha256=str, shards_sha256=list)  # what train.py's save() puts into a checkpoint

def load_checkpoint(path, verify=False):
    """
    The checkpoint at `path`, the dict of CHECKPOINT's keys and types, tensors on the CPU. verify reads all of it to
    compare checksums, which torch.load does not. Raises UserError.
    """
    try:
        if verify and (bad := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{bad} does not match its checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key, kind in CHECKPOINT.items():
            if not isinstance(checkpoint[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        GPTConfig(**checkpoint["config"]), Schedule(**checkpoint["schedule"])
    except Exception as e:  # torch.load has no exception of its own for a damaged file
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"{path} is damaged or no checkpoint of nanolrt ({reason}): use an older one, or train again")
    return checkpoint

def load_weights(model, checkpoint):
    """Put a checkpoint's weights into a model. Raises UserError if they are of another one."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, AttributeError, TypeError) as e:
        raise UserError(f"the checkpoint's weights are not of its own configuration: {str(e).split(chr(10))[-1].strip()}")

def load_model(checkpoint, device):
    """The model of a loaded checkpoint on `device`, bf16 activations where the GPU has them. Raises UserError."""
    with torch.device(device):
        model = GPT(GPTConfig(**checkpoint["config"]))
    model.compute_dtype = compute_dtype(device)
    load_weights(model, checkpoint)
    for module in model.modules():  # once, not at every token; tables and scalars stay as they are
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.to(model.compute_dtype)
    return model

def pick_device(name=None):
    """The device of this name, or the best there is. Raises UserError if torch does not have it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("choose cuda, mps or cpu")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used here: {str(e).split(chr(10))[0]}")
    return torch.device(name)

def join_processes(name=None, timeout=None):
    """
    Under torchrun, join its processes: this one's device (as pick_device, one GPU each), its rank and how many there
    are; 0 and 1 without torchrun. timeout: a timedelta, of a collective. Raises UserError.
    """
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(name)
    if device.type == "cuda":
        if "RANK" in os.environ:
            device = torch.device("cuda", local_rank)
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"{device} does not exist: this machine has {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return device, rank, world

def compute_dtype(device):
    """Activations: bf16 on GPUs that have it, fp32 elsewhere; the weights are fp32 everywhere."""
    bf16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


# -----------------------------------------------------------------------------
# Generation

def draw(logits, generators, temperature, top_k, top_p):
    """
    One token of each row of logits (N, V): (N,) int64. Row i uses one uniform number of generators[i] and nothing of
    the other rows. Tokens are ordered by probability; the first top_k of them that reach mass top_p are kept.
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)), dim=-1)
    mass = torch.softmax((values - values[:, :1]) / temperature, dim=-1).cumsum(-1)
    last = mass.size(1) - 1
    kept = mass[:, last:]
    if top_p is not None:  # the token that carries the mass to top_p is the last one kept
        kept = mass.gather(1, torch.searchsorted(mass, torch.full_like(kept, top_p)).clamp(max=last))
    u = torch.stack([torch.rand((), generator=g) for g in generators]).to(mass.device)[:, None]
    picked = torch.searchsorted(mass, u * kept, right=True).clamp(max=last)
    return tokens.gather(1, picked)[:, 0]

class Pieces:
    """The text of one sequence, token by token: characters split over tokens come out whole, and a stop string ends it."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.held = tokenizer, stop, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """The text that this token makes certain, and whether the stop string is reached; None ends the sequence."""
        final = token is None
        try:
            raw = b"" if final else self.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # some encodings leave ids unused
            raw = b""
        self.held += self.decoder.decode(raw, final)
        if self.stop and self.stop in self.held:
            return self.held[:self.held.index(self.stop)], True
        hold = 0  # the longest end that may be the beginning of the stop string
        if self.stop and not final:
            hold = next((n for n in range(min(len(self.stop) - 1, len(self.held)), 0, -1) if self.stop.startswith(self.held[-n:])), 0)
        text, self.held = self.held[:len(self.held) - hold], self.held[len(self.held) - hold:]
        return text, False

@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0, num_samples=1,
             stop=None, use_memory=True):
    """
    Continue prompts (lists of one token id or more, of any lengths) with the exact recurrence, num_samples times each.
    Yields (sequence, token, text) as they come; sequence counts samples within prompts. The text of a token is what it
    makes certain: it may be empty, and the last piece comes with token None when the sequence ends: at BOS, at the stop
    string (neither is part of the text), after max_new_tokens, or with the context, which does not slide: positions
    beyond it were never trained. temperature 0 is greedy; top_k and top_p None keep everything.
    All prompts are processed at once by interleave.prefill and once for all samples; then each token is one forward.
    What a sequence carries is the standard KV cache (only the window in layers that have one) and one memory vector.
    Sample i of any prompt draws from its own generator seeded seed + i, so it does not depend on what else is in the
    batch. use_memory=False keeps the memory at zero, for comparison. Raises ValueError for a bad prompt.
    """
    config, device, bos = model.config, model.wte.weight.device, tokenizer.encode_single_token("<|bos|>")
    lengths = [len(p) for p in prompts]
    if not prompts or not 1 <= min(lengths) <= max(lengths) <= config.sequence_len:
        raise ValueError(f"prompts of {min(lengths, default=0)} to {max(lengths, default=0)} tokens; a prompt has 1 to {config.sequence_len}")
    # rows are aligned at their ends; the shorter ones are padded with BOS that nobody sees
    T, dtype = max(lengths), model.compute_dtype or model.wte.weight.dtype
    idx = torch.tensor([[bos] * (T - len(p)) + list(p) for p in prompts], device=device)
    start = torch.tensor([T - n for n in lengths], device=device) if min(lengths) < T else None
    prompt_kv = KVCache(config, len(prompts), T, device, dtype, start=start)
    if use_memory:
        hidden, memory, _ = prefill(model, idx, prompt_kv)
    else:
        hidden, memory = model(idx, range(T), prompt_kv)[0], None
    rows = len(prompts) * num_samples
    left = [min(max_new_tokens, config.sequence_len - n + 1) for n in lengths for _ in range(num_samples)]
    kv = KVCache(config, rows, T + max(left) - 1, device, dtype, rolling=True,
                 start=None if start is None else start.repeat_interleave(num_samples))
    kv.copy_from(prompt_kv, T, num_samples)
    hidden = hidden[:, -1:].repeat_interleave(num_samples, dim=0)
    memory = None if memory is None else memory.repeat_interleave(num_samples, dim=0)
    generators = [torch.Generator().manual_seed(seed + i) for _ in prompts for i in range(num_samples)]
    pieces = [Pieces(tokenizer, stop) for _ in range(rows)]
    for t in range(T, T + max(left)):
        tokens = draw(model.logits(hidden)[:, -1], generators, temperature, top_k, top_p)
        for i, token in enumerate(tokens.tolist()):
            if left[i] == 0:
                continue
            text, stopped = pieces[i].add(token) if token != bos else ("", True)
            left[i] = 0 if stopped else left[i] - 1
            if token != bos:
                yield i, token, text
            if left[i] == 0:
                yield i, None, "" if stopped and token != bos else pieces[i].add(None)[0]
        if not any(left):
            return
        hidden, source = model(tokens[:, None], range(t, t + 1), kv, memory)
        memory = source if use_memory and config.lrt != "none" else None

def complete(*args, **options):
    """The finished texts of generate(): a list, one a sequence."""
    texts = {}
    for i, _, text in generate(*args, **options):
        texts[i] = texts.get(i, "") + text
    return [texts[i] for i in sorted(texts)]


# -----------------------------------------------------------------------------
# The command

def interact(sample):
    """A prompt loop that streams: Ctrl-C ends a text, Ctrl-D the loop."""
    while True:
        try:
            prompt = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        try:
            for _, _, text in sample(prompt):
                print(text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as e:
            print(f"error: {e}")

def read_prompts(path):
    """The prompts of a text file, one a line, or of a .jsonl file with a key `prompt`. Raises UserError."""
    try:
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8 text'}")
    if path.suffix == ".jsonl":
        for n, line in enumerate(lines):
            try:
                lines[n] = json.loads(line)["prompt"]
                lines[n].encode()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f'{path} line {n + 1}: expected {{"prompt": "text"}}')
    if not lines:
        raise UserError(f"{path} has no prompts")
    return lines

def main():
    parser = ArgumentParser(description="Sample from a trained run, with memory carried from token to token.")
    parser.add_argument("--checkpoint", metavar="PATH", help="run folder or checkpoint file (default: the newest in runs/)")
    parser.add_argument("--prompt", default="", help="text to continue; always text, also where it spells a special token; empty: from nothing")
    parser.add_argument("--prompt-file", metavar="FILE", help="many prompts, one a line, or .jsonl with {\"prompt\": ..}; processed as one batch")
    parser.add_argument("--out", metavar="FILE", help="write JSON lines {prompt, seed, text} here instead of streaming")
    parser.add_argument("--interactive", action="store_true", help="a prompt loop: Ctrl-C ends a text, Ctrl-D quits")
    parser.add_argument("--num-samples", type=int, default=1, help="samples a prompt, with seeds SEED, SEED+1, ..")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens a sample; it ends earlier at BOS, at --stop, and where the context ends (it does not slide)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 sharper, 0 greedy")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens, 0: from all")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--stop", metavar="TEXT", help="end a sample before this text")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--no-memory", action="store_true", help="keep the memory at zero, to see what it is worth")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    args = parser.parse_args()
    at_least(args, num_samples=1, max_new_tokens=1, temperature=0, top_k=0, seed=0)
    check_folder(args.out)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    prompts = [args.prompt]
    if args.prompt_file:
        if args.prompt or args.interactive:
            raise UserError("--prompt-file goes without --prompt and --interactive")
        prompts = read_prompts(Path(args.prompt_file))
    path = find_checkpoint(args.checkpoint)
    checkpoint = load_checkpoint(path)
    tokenizer = load_tokenizer(path.parent)
    model = load_model(checkpoint, pick_device(args.device))
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"the tokenizer in {path.parent} has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}: "
                        "they are not of one run")
    def encode(prompts):
        encoded = [[tokenizer.encode_single_token("<|bos|>")] + tokenizer.encode_ordinary(p) for p in prompts]
        for n, tokens in enumerate(encoded, 1):
            if len(tokens) > model.config.sequence_len:
                raise UserError(f"prompt {n} has {len(tokens)} tokens with BOS, the context {model.config.sequence_len}: shorten it")
        return encoded

    def sample(make, encoded, num_samples):
        return make(model, tokenizer, encoded, args.max_new_tokens, args.temperature, args.top_k or None, args.top_p, args.seed,
                    num_samples, args.stop, not args.no_memory)

    encoded = encode(prompts)
    print(f"{path}, step {checkpoint['step']}, {model.config.label}, memory {'off' if args.no_memory else 'on'}", file=sys.stderr)
    if args.interactive:
        interact(lambda prompt: sample(generate, encode([prompt]), 1))
    elif args.out or args.prompt_file:
        texts = sample(complete, encoded, args.num_samples)
        rows = [dict(prompt=p, seed=args.seed + i, text=texts[n * args.num_samples + i]) for n, p in enumerate(prompts) for i in range(args.num_samples)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if args.out:
            write_atomic(args.out, lambda f: f.write(lines.encode()))
        else:
            print(lines, end="")
    else:  # the first sample streams, the others, made beside it in one batch, follow
        others = {}
        print(args.prompt, end="", flush=True)
        for i, _, text in sample(generate, encoded, args.num_samples):
            if i == 0:
                print(text, end="", flush=True)
            others[i] = others.get(i, "") + text
        print()
        for i in range(1, args.num_samples):
            print("-" * 80 + f"\n{args.prompt}{others[i]}")

if __name__ == "__main__":
    run_main(main)
