"""
Sample from a trained run, with memory carried from token to token: one forward a token through the KV cache.

    python sample.py                                   # the newest run, from an empty prompt
    python sample.py --checkpoint runs/d4_shared --prompt "The history of" --num-samples 3
"""

import codecs
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache
from prepare_data import ArgumentParser, UserError, at_least, load_tokenizer, run_main


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
    if path.is_file():
        return path
    found = sorted(path.glob("ckpt_*.pt"))
    if not found:
        raise UserError(f"no checkpoint in {path}" if path.is_dir() else f"no such run or checkpoint: {path}")
    return found[-1]

def load_checkpoint(path):
    """The checkpoint at `path`, a dict (train.py's save() says of what), tensors on the CPU. Raises UserError."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["model"], checkpoint["step"], GPTConfig(**checkpoint["config"])
    except Exception as e:  # torch.load has no exception of its own for a damaged file
        reason = str(e).strip().split("\n")[0]
        raise UserError(f"{path} is damaged or no checkpoint of nanolrt ({reason}): use an older one, or train again")
    return checkpoint

def load_model(checkpoint, device):
    """The model of a loaded checkpoint on `device`, bf16 activations where the GPU has them. Raises UserError."""
    config = GPTConfig(**checkpoint["config"])
    with torch.device(device):
        model = GPT(config)
    model.compute_dtype = compute_dtype(device)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as e:
        raise UserError(f"the checkpoint's weights are not of its own configuration: {str(e).split(chr(10))[1].strip()}")
    return model

def pick_device(name=None):
    """The device of this name, or the best there is. Raises UserError if torch does not have it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used here: {str(e).split(chr(10))[0]}")
    return torch.device(name)

def compute_dtype(device):
    """Activations: bf16 on GPUs that have it, fp32 elsewhere; the weights are fp32 everywhere."""
    bf16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


# -----------------------------------------------------------------------------
# Generation

@torch.no_grad()
def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, seed=0, use_memory=True):
    """
    Continue `prompt` (a list of one token id or more) with the exact recurrence: yields one token id after the other,
    at most max_new_tokens, ending where the context ends. Every token is one forward; what the sequence carries is the
    KV cache and one memory vector. temperature 0 is greedy; top_k None samples from the whole vocabulary. The same
    seed gives the same tokens. use_memory=False keeps the memory at zero, for comparison. Raises ValueError for a
    prompt that is empty or longer than the context.
    """
    config, device = model.config, model.wte.weight.device
    if not 1 <= len(prompt) <= config.sequence_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the context is 1 to {config.sequence_len}")
    steps = min(len(prompt) + max_new_tokens - 1, config.sequence_len)
    kv = KVCache(config, 1, steps, device, model.compute_dtype or model.wte.weight.dtype)
    generator = torch.Generator(device).manual_seed(seed)
    memory, recurrent = None, use_memory and config.lrt != "none"
    for t in range(steps):
        if t < len(prompt):
            token = torch.tensor([[prompt[t]]], device=device)
        hidden, source = model(token, range(t, t + 1), kv, memory)
        memory = source if recurrent else None
        if t < len(prompt) - 1:
            continue
        logits = model.logits(hidden)[0, -1]
        if temperature == 0:
            token = logits.argmax()
        else:
            if top_k is not None and top_k < logits.numel():
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
        token = token.view(1, 1)
        yield token.item()

def stream(tokenizer, tokens):
    """Text pieces of a stream of token ids, up to BOS; a character split over tokens comes out whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    bos = tokenizer.encode_single_token("<|bos|>")
    for token in tokens:
        if token == bos:
            break
        yield decoder.decode(tokenizer.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)

def main():
    parser = ArgumentParser(description="Sample from a trained run, with memory carried from token to token.")
    parser.add_argument("--checkpoint", metavar="PATH", help="run folder or checkpoint file (default: the newest in runs/)")
    parser.add_argument("--prompt", default="", help="text to continue; it is always text, also where it spells a special token")
    parser.add_argument("--num-samples", type=int, default=1, help="how many samples, with seeds SEED, SEED+1, ..")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens a sample; it ends earlier at BOS or at the end of the context")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 sharper, 0 greedy")
    parser.add_argument("--top-k", type=int, default=50, help="sample from the k likeliest tokens, 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--no-memory", action="store_true", help="keep the memory at zero, to see what it is worth")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    args = parser.parse_args()
    at_least(args, num_samples=1, max_new_tokens=1, temperature=0, top_k=0)
    path = find_checkpoint(args.checkpoint)
    checkpoint = load_checkpoint(path)
    tokenizer = load_tokenizer(path.parent)
    model = load_model(checkpoint, pick_device(args.device))
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"the tokenizer in {path.parent} has {tokenizer.n_vocab} tokens, the model {model.config.vocab_size}: "
                        "they are not of one run")
    prompt = [tokenizer.encode_single_token("<|bos|>")] + tokenizer.encode_ordinary(args.prompt)
    if len(prompt) > model.config.sequence_len:
        raise UserError(f"the prompt has {len(prompt)} tokens with BOS, the context {model.config.sequence_len}: shorten it")
    print(f"{path}, step {checkpoint['step']}, lrt={model.config.lrt}, memory {'off' if args.no_memory else 'on'}", file=sys.stderr)
    for i in range(args.num_samples):
        print(args.prompt, end="", flush=True)
        for piece in stream(tokenizer, generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k or None,
                                                args.seed + i, not args.no_memory)):
            print(piece, end="", flush=True)
        print("\n" + "-" * 80 if args.num_samples > 1 else "")

if __name__ == "__main__":
    run_main(main)
