"""
Sample from a trained run. The memory is carried from token to token, and each token is one forward through
the KV cache.

    python sample.py                                   # the newest run, from an empty prompt
    python sample.py --checkpoint runs/d4_shared --prompt "The history of" --num-samples 3
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import codecs
import io
import json
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

from common import (
    ArgumentParser,
    UserError,
    at_least,
    at_most,
    check_command_line,
    check_output,
    is_text,
    pick_device,
    read_json_lines,
    run_main,
    say,
    text_of,
    write_atomic,
)

MAX_SAMPLES = 10**6  # of a prompt; all of them are one batch

# -----------------------------------------------------------------------------
# Flags

def parse_args():
    """The command line, checked. Raises UserError."""
    parser = ArgumentParser(
        description="Sample from a trained run, with memory carried from token to token.")
    parser.add_argument("--checkpoint", metavar="PATH",
                        help="run folder or checkpoint file (default: the newest in runs/)")
    parser.add_argument("--prompt", default="",
                        help="text to continue; always text, also where it spells a special token; "
                             "empty: from nothing")
    parser.add_argument("--prompt-file", metavar="FILE",
                        help='many prompts, one a line, or .jsonl with {"prompt": ..}; '
                             "processed as one batch")
    parser.add_argument("--out", metavar="FILE",
                        help="write JSON lines {prompt, seed, text} here instead of streaming")
    parser.add_argument("--interactive", action="store_true",
                        help="a prompt loop: Ctrl-C ends a text, Ctrl-D quits")
    parser.add_argument("--num-samples", type=int, default=1,
                        help="samples a prompt, with seeds SEED, SEED+1, ..")
    parser.add_argument("--max-new-tokens", type=int, default=256,
                        help="tokens a sample; it ends earlier at BOS, at --stop, "
                             "and where the context ends (it does not slide)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1 sharper, 0 greedy")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest tokens, 0: from all")
    parser.add_argument("--top-p", type=float,
                        help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--stop", metavar="TEXT", help="end a sample before this text")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")
    parser.add_argument("--no-memory", action="store_true",
                        help="keep the memory at zero, to see what it is worth")
    parser.add_argument("--compile", action="store_true",
                        help="compile the step of a token first: takes half a minute, pays for long texts")
    parser.add_argument("--device", help="cuda | mps | cpu (default: the best there is)")
    args = parser.parse_args()
    at_least(args, num_samples=1, max_new_tokens=1, temperature=0, top_k=0, seed=0)
    at_most(args, num_samples=MAX_SAMPLES)
    check_output(args, "out", [args.prompt_file, args.checkpoint])
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    if args.stop is not None and not is_text(args.stop):
        raise UserError(f"--stop is not UTF-8 text: {ascii(args.stop)}")
    if args.prompt_file is not None and (args.prompt or args.interactive):
        raise UserError("--prompt-file goes without --prompt and --interactive")
    if args.interactive and (args.prompt or args.out or args.num_samples > 1):
        raise UserError("--interactive goes without --prompt, --out and --num-samples: type the prompts")
    if args.interactive and args.compile:
        raise UserError("--interactive goes without --compile: every text would be compiled anew")
    return args

if __name__ == "__main__":  # --help does not wait for what follows
    check_command_line(parse_args)

import torch

from attention import KVCache
from checkpointing import find_checkpoint, load_checkpoint, load_model
from dataset import BOS, encode_text, load_tokenizer, tokenizer_sha256
from interleave import prefill
from prepare_data import format_of, read_txt
from recurrent import record

# -----------------------------------------------------------------------------
# From a run to a model, from text to tokens and back

def load_run(path, device):
    """
    Load the run or checkpoint that `path` means (None: the newest in runs/). Returns the path of the
    checkpoint file, the checkpoint (a dict, see checkpointing.CHECKPOINT), its tokenizer, and its model on
    the device. Raises UserError.
    """
    path = find_checkpoint(path)
    checkpoint = load_checkpoint(path)
    data = checkpoint["args"].get("data")
    repair = f"copy tokenizer.tiktoken and tokenizer.json there from the data that it was trained on ({data})"
    tokenizer = load_tokenizer(path.parent, repair)
    if tokenizer_sha256(path.parent) != checkpoint["tokenizer_sha256"]:
        raise UserError(f"the tokenizer in {path.parent} is not the one of {path.name}: {repair}")
    model = load_model(checkpoint, device)
    model.pack()
    if tokenizer.n_vocab != model.config.vocab_size:
        raise UserError(f"the tokenizer in {path.parent} has {tokenizer.n_vocab} tokens, "
                        f"the model {model.config.vocab_size}: they are not of one run")
    return path, checkpoint, tokenizer, model

def encode_prompts(tokenizer, prompts, context):
    """
    The token ids of each text, with BOS in front: a list of lists. All of it is text, also where it spells a
    special token. Raises UserError if one is not text that UTF-8 can spell, or does not fit into the context
    (in tokens).
    """
    bos = tokenizer.encode_single_token(BOS)
    for n, prompt in enumerate(prompts, 1):
        if not is_text(prompt):
            raise UserError(f"prompt {n} is not UTF-8 text: {ascii(prompt)}")
    encoded = [[bos, *encode_text(tokenizer, prompt)] for prompt in prompts]
    for n, tokens in enumerate(encoded, 1):
        if len(tokens) > context:
            raise UserError(f"prompt {n} has {len(tokens)} tokens with BOS, "
                            f"the context {context}: shorten it")
    return encoded

class IncrementalDetokenizer:
    """
    Turns the tokens of one sequence into text as they come. A character that is split over tokens comes out
    whole, and text that may be the beginning of the stop string is held back until that is certain.
    """

    def __init__(self, tokenizer, stop=None):
        self.tokenizer = tokenizer
        self.stop = stop  # the text that ends the sequence; None or "": nothing does
        self.stopped = False  # whether the stop string was reached
        self.held = ""  # the text held back
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        """The text that this token makes certain; it may be empty. Sets `stopped` at the stop string."""
        try:
            raw = self.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # some encodings leave ids unused
            raw = b""
        self.held += self.decoder.decode(raw)
        if self.stop and self.stop in self.held:
            self.stopped = True
            return self.before_stop()
        certain = len(self.held) - self.possible_stop()
        text = self.held[:certain]
        self.held = self.held[certain:]
        return text

    def finish(self):
        """The last of the text, at the end of the sequence: what was held back, up to the stop string."""
        if self.stopped:
            return ""
        self.held += self.decoder.decode(b"", final=True)
        return self.before_stop()

    def before_stop(self):
        """The held text up to the stop string, if that is in it."""
        return self.held.partition(self.stop)[0] if self.stop else self.held

    def possible_stop(self):
        """The length of the longest end of the held text that the stop string may begin with."""
        if self.stop:
            for n in range(min(len(self.stop) - 1, len(self.held)), 0, -1):
                if self.stop.startswith(self.held[-n:]):
                    return n
        return 0


# -----------------------------------------------------------------------------
# Generation

def sample_next_token(logits, uniform, temperature, top_k, top_p):
    """
    Draw one token from each row of logits (N, V): (N,) int64. Row i uses the uniform random number uniform[i]
    and does not depend on the other rows. Only the top_k likeliest tokens are kept (None or 0: all), and of
    these only the likeliest that together reach the probability top_p (None: all).
    Temperature 0 takes the argmax and uses no random number, and so does one that float32 rounds to 0.
    """
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)

    # the top_k tokens, likeliest first, and their cumulative probabilities
    vocab_size = logits.size(-1)
    k = min(top_k, vocab_size) if top_k else vocab_size
    values, tokens = logits.float().topk(k, dim=-1)
    cumulative = torch.softmax((values - values[:, :1]) / temperature, dim=-1).cumsum(-1)

    # the probability of what is kept: up to and with the token that reaches top_p
    kept = cumulative[:, -1:]
    if top_p is not None:
        last_kept = torch.searchsorted(cumulative, torch.full_like(kept, top_p)).clamp(max=k - 1)
        kept = cumulative.gather(1, last_kept)

    # invert the cumulative distribution at a uniform number
    choice = torch.searchsorted(cumulative, uniform[:, None] * kept, right=True).clamp(max=k - 1)
    return tokens.gather(1, choice)[:, 0]

def new_cache(model, batch_size, length, **options):
    """An empty KVCache for a model, on its device and in the dtype of its activations."""
    dtype = model.compute_dtype or model.wte.weight.dtype
    return KVCache(model.config, batch_size, length, model.wte.weight.device, dtype, **options)

def prefill_prompts(model, prompts, pad_token, num_samples, max_new_tokens, use_memory):
    """
    Process the prompts (lists of token ids) at once, each once for all of its samples. Their rows are aligned
    at their ends: the shorter ones are padded on the left with pad_token, which no other token attends to.
    Returns, with num_samples rows a prompt: the hidden states of the last tokens (N, 1, D), their memory
    (N, 1, D), None without one, and a cache with room for max_new_tokens more.
    """
    device = model.wte.weight.device
    T = max(map(len, prompts))
    padding = [T - len(prompt) for prompt in prompts]
    rows = [[pad_token] * n + list(prompt) for n, prompt in zip(padding, prompts)]
    idx = torch.tensor(rows, device=device)
    start = torch.tensor(padding, device=device) if any(padding) else None

    prompt_kv = new_cache(model, len(prompts), T, start=start)
    hidden, memory, _ = prefill(model, idx, prompt_kv, recurrence=use_memory)

    # a row for each sample; in layers that have a window this cache keeps only that window
    if start is not None:
        start = start.repeat_interleave(num_samples)
    length = T + max_new_tokens - 1  # the last new token is not fed to the model
    kv = new_cache(model, len(prompts) * num_samples, length, rolling=True, start=start)
    kv.copy_from(prompt_kv, T, num_samples)
    hidden = hidden[:, -1:].repeat_interleave(num_samples, dim=0)
    if memory is not None:
        memory = memory.repeat_interleave(num_samples, dim=0)
    return hidden, memory, kv

class Decoder:
    """
    Decodes N sequences, all by one token at a time. What changes from token to token lies in tensors that
    stay in their places on the device, down to the position and the random numbers. So a step is the same
    work every time, which can be compiled, and which on CUDA is captured as a CUDA graph: a thousand kernels,
    launched at once. Otherwise Python knows the position, and attention reads no more of the cache than it.
    """

    def __init__(self, model, kv, hidden, memory, first, uniform, draw, use_memory=True, compile=False,
                 capture=None):
        """
        kv: the cache of what was processed, of which hidden (N, 1, D) and memory (N, 1, D) or None are the
        last position's; first: the next position; uniform (n, N): random numbers for n tokens a sequence;
        draw(logits, uniform): as sample_next_token; compile: it takes half a minute, and saves a third of the
        time of a step on a CPU (research/SPEED.md); capture: None means on CUDA.
        """
        self.model = model
        self.kv = kv
        self.memory = memory
        self.uniform = uniform
        self.draw = draw
        self.use_memory = use_memory
        self.first = first
        self.work = None  # a step whose numbers are all on the device; None: Python walks over the layers
        if compile:
            self.work = torch.compile(self.forward_on_device, dynamic=False, fullgraph=True)
        self.capture = model.wte.weight.is_cuda if capture is None else capture
        self.made = 1  # tokens a sequence so far
        self.index = torch.ones(1, dtype=torch.int64, device=hidden.device)  # the same, on the device
        self.tokens = draw(model.logits(hidden)[:, -1], uniform[0])  # (N,), the newest

    def forward(self, positions, uniform):
        """Feed the newest tokens at `positions`, one position, and draw the next ones."""
        idx = self.tokens[:, None]
        hidden, source = self.model(idx, positions, self.kv, self.memory)
        if self.memory is not None:
            self.memory.copy_(source if self.use_memory else self.model.first_memory(idx))
        self.tokens.copy_(self.draw(self.model.logits(hidden)[:, -1], uniform))

    def forward_on_device(self):
        """The same, with all numbers that Python knew on the device."""
        self.forward(self.first - 1 + self.index, self.uniform.index_select(0, self.index)[0])
        self.index.add_(1)

    def step(self):
        """The next token of every sequence: `tokens` (N,), overwritten by the next step."""
        position = self.first - 1 + self.made
        if self.capture:
            self.work = record(self.work or self.forward_on_device, self.tokens.device)  # which runs it once
            self.capture = False
        elif self.work is not None:
            self.work()
        else:
            self.forward(range(position, position + 1), self.uniform[self.made])
        self.made += 1
        return self.tokens

@torch.inference_mode()
def generate(model, tokenizer, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=0,
             num_samples=1, stop=None, use_memory=True, compile=False):
    """
    Continue prompts (lists of at least one token id, of any lengths) with the exact recurrence, num_samples
    times each. Yields (sequence, token, text) as the tokens are made. `sequence` numbers the samples of the
    first prompt, then those of the second, and so on. `text` is what the token makes certain, an empty string
    at times.

    A sequence ends at BOS, at the stop string (neither is part of the text), after max_new_tokens, or at the
    end of the context, which does not slide, because positions beyond it were never trained. Its last item
    has the token None and what text remains.

    temperature, top_k and top_p are those of sample_next_token. Sample i of any prompt draws from its own
    generator, seeded seed + i, so it does not depend on what else is in the batch.

    interleave.prefill processes all prompts at once; then each token is one forward. A sequence carries the
    standard KV cache and one memory vector. compile: as for Decoder. use_memory=False keeps to the first
    memory, zero by default, for comparison. Raises ValueError for a prompt that is empty or longer than the
    context.
    """
    context = model.config.sequence_len
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) < 1 or max(lengths) > context:
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        raise ValueError(f"prompts of {shortest} to {longest} tokens; a prompt has 1 to {context}")

    # for each sequence: the tokens it may still take, its text
    bos = tokenizer.encode_single_token(BOS)
    remaining, detokenizers = [], []
    for length in lengths:
        for _ in range(num_samples):
            # the token after the last position of the context is made, too, though never fed to the model
            remaining.append(min(max_new_tokens, context - length + 1))
            detokenizers.append(IncrementalDetokenizer(tokenizer, stop))

    # the prompts; random numbers, which lie on the device before they are needed
    steps = max(remaining)
    hidden, memory, kv = prefill_prompts(model, prompts, bos, num_samples, steps, use_memory)
    uniform = torch.empty(steps, num_samples)
    for i in range(num_samples):
        uniform[:, i] = torch.rand(steps, generator=torch.Generator().manual_seed(seed + i))
    uniform = uniform.repeat(1, len(prompts)).to(hidden.device)
    draw = partial(sample_next_token, temperature=temperature, top_k=top_k, top_p=top_p)
    decoder = Decoder(model, kv, hidden, memory, max(lengths), uniform, draw, use_memory, compile)

    while True:
        # detokenize and yield, leaving out the sequences that have ended
        for i, token in enumerate(decoder.tokens.tolist()):
            if remaining[i] == 0:
                continue
            remaining[i] -= 1
            if token == bos:
                remaining[i] = 0
            else:
                yield i, token, detokenizers[i].add(token)
                if detokenizers[i].stopped:
                    remaining[i] = 0
            if remaining[i] == 0:
                yield i, None, detokenizers[i].finish()
        if not any(remaining):
            return
        decoder.step()

def complete(*args, **options):
    """The finished texts of generate(), which takes the same arguments: a list of str, one a sequence."""
    texts = defaultdict(str)
    for i, _, text in generate(*args, **options):
        texts[i] += text
    return [texts[i] for i in sorted(texts)]


# -----------------------------------------------------------------------------
# The command

def read_prompts(path):
    """
    The prompts of a text file, one a line, or of JSON lines with a key `prompt`; the names of files say which
    as those of prepare_data.py's sources do. Raises UserError.
    """
    if format_of(path) in (".jsonl", ".json"):
        prompts = [text_of(place, row, "prompt") for place, row in read_json_lines(path)]
    else:
        text, = read_txt(path)
        lines = io.StringIO(text, newline=None)  # any ends of lines
        # files that were put together have byte order marks within them
        lines = [line.removesuffix("\n").removeprefix("\ufeff") for line in lines]
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts

def interact(model, tokenizer, options):
    """A prompt loop that streams: Ctrl-C ends a text, Ctrl-D the loop. options: those of generate()."""
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
            encoded = encode_prompts(tokenizer, [prompt], model.config.sequence_len)
            for _, _, text in generate(model, tokenizer, encoded, **options):
                print(text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except UserError as e:
            print(f"error: {e}")

def sample_batch(model, tokenizer, prompts, encoded, num_samples, options, out):
    """Sample all prompts as one batch. Write a JSON line for each text to the file `out` (None: print)."""
    texts = complete(model, tokenizer, encoded, num_samples=num_samples, **options)
    lines = ""
    for n, text in enumerate(texts):
        prompt, i = divmod(n, num_samples)
        row = dict(prompt=prompts[prompt], seed=options["seed"] + i, text=text)
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    if out:
        write_atomic(out, lambda f: f.write(lines.encode()))
    else:
        print(lines, end="")

def stream(model, tokenizer, prompt, encoded, num_samples, options):
    """Print the first sample of a prompt as it comes, then the others, which are made in the same batch."""
    texts = defaultdict(str)
    print(prompt, end="", flush=True)
    for i, _, text in generate(model, tokenizer, encoded, num_samples=num_samples, **options):
        if i == 0:
            print(text, end="", flush=True)
        texts[i] += text
    print()
    for i in range(1, num_samples):
        print("-" * 80)
        print(prompt + texts[i])

def main():
    args = parse_args()
    from_file = args.prompt_file is not None
    prompts = read_prompts(Path(args.prompt_file)) if from_file else [args.prompt]
    path, checkpoint, tokenizer, model = load_run(args.checkpoint, pick_device(args.device))
    encoded = encode_prompts(tokenizer, prompts, model.config.sequence_len)
    memory = "off" if args.no_memory else "on"
    say(f"{path}, step {checkpoint['step']}, {model.config.label}, memory {memory}", sys.stderr)

    options = dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        use_memory=not args.no_memory,
        compile=args.compile,
    )
    if args.interactive:
        interact(model, tokenizer, options)
    elif args.out or from_file:
        sample_batch(model, tokenizer, prompts, encoded, args.num_samples, options, args.out)
    else:
        stream(model, tokenizer, args.prompt, encoded, args.num_samples, options)

if __name__ == "__main__":
    run_main(main)
