"""
Turn a trained run into a folder that Hugging Face's transformers opens, and so lm-evaluation-harness, too.

    python export.py runs/d4_shared exported

    tokenizer = AutoTokenizer.from_pretrained("exported", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)

The folder holds the weights, the tokenizer in the format of the library `tokenizers`, and the code of the
model: hf/modeling_nanolrt.py and the files of ours that it needs, with their imports made relative. It needs
neither this repository nor a network, and nothing in it changes when the repository does.
"""

import signal

if __name__ == "__main__":  # until run_main() begins, Ctrl-C ends the process at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import torch

from checkpointing import read_log
from common import ArgumentParser, UserError, check_new_folder, check_regular, flag, run_main, say
from dataset import BOS
from flags import MAY_CHANGE, REMOVED_FLAGS, make_parser
from sample import load_run

HERE = Path(__file__).resolve().parent
# the code of the model, the class of transformers first
CODE = ["hf/modeling_nanolrt.py", "attention.py", "model.py", "interleave.py", "recurrent.py"]

# -----------------------------------------------------------------------------
# The tokenizer, in the format of the library `tokenizers`

def byte_characters():
    """How GPT-2, and the library after it, spell the 256 bytes: a list of characters that can be seen."""
    characters = []
    n_invisible = 0
    for byte in range(256):
        is_visible = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        characters.append(chr(byte if is_visible else 256 + n_invisible))
        n_invisible += not is_visible
    return characters

def merges_of(ranks):
    """
    The merges, pairs of tokens as bytes, behind tiktoken's ranks {token: id}, the first one first. tiktoken
    merges any two neighbours that together are a token, whichever of its pairs they are, so all pairs of a
    token are merges; the library would only know those that are listed.
    """
    merges = []
    for token in sorted(ranks, key=ranks.get):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((left, right))
    return merges

def pattern_for_oniguruma(pattern):
    """
    The pattern that cuts text into words, for the regular expressions of the library (Oniguruma's, in Ruby's
    syntax). In those of tiktoken's encodings two things are written otherwise: {1,3}+ is possessive there and
    a repetition here, and $ is the end of the text there and of any line here.
    """
    pattern = re.sub(r"(\\p\{\w+\}\{\d+,\d+\})\+", r"(?>\1)", pattern)
    return re.sub(r"\$", r"\\z", pattern)

def tokenizer_json(enc):
    """tokenizer.json of a tiktoken.Encoding, a dict: the same tokens, with BOS put in front of a text."""
    characters = byte_characters()

    def spell(token):
        return "".join(characters[byte] for byte in token)

    ranks = enc._mergeable_ranks  # tiktoken's README extends encodings through these underscore names
    added = []
    for token, number in sorted(enc._special_tokens.items(), key=lambda item: item[1]):
        added.append({"id": number, "content": token, "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True})
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    text, second_text = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern_for_oniguruma(enc._pat_str)},
             "behavior": "Isolated", "invert": False}
    bos_id = enc.encode_single_token(BOS)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, second_text],
            "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is this token, whatever the merges make of it
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": [[spell(left), spell(right)] for left, right in merges_of(ranks)],
        },
    }

def tokenizer_config(context):
    """tokenizer_config.json, a dict."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": BOS,  # it begins a document, so a text ends where the model gives it
        "pad_token": BOS,
        "model_max_length": context,
        "padding_side": "left",
        "split_special_tokens": True,  # a text that spells a special token is text, as everywhere in nanolrt
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


# -----------------------------------------------------------------------------
# Configuration, code and model card

def model_config(checkpoint, bos, dtype):
    """config.json, a dict."""
    return {
        "architectures": ["NanoLRTForCausalLM"],
        "model_type": "nanolrt",
        "auto_map": {
            "AutoConfig": "modeling_nanolrt.NanoLRTConfig",
            "AutoModelForCausalLM": "modeling_nanolrt.NanoLRTForCausalLM",
        },
        "gpt": checkpoint["config"],
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": bos,
        "dtype": dtype,
    }

def with_relative_imports(source):
    """Python source in which our own modules are imported as neighbours: `from .model import GPT`."""
    names = "|".join(Path(name).stem for name in CODE)
    return re.sub(rf"^from ({names}) import", r"from .\1 import", source, flags=re.MULTILINE)

def training_command(checkpoint):
    """
    The command that trained a checkpoint: the flags that are not its recipe's defaults. What is left out are
    names and places, which are nobody's business, and flags that change neither the model nor what it has
    seen.
    """
    args = checkpoint["args"]
    recipe = args.get("recipe", "paper")  # older checkpoints have none: there was only this one
    defaults = vars(make_parser().parse_args(["--recipe", recipe]))
    defaults["recipe"] = make_parser().get_default("recipe")
    words = []
    for name, value in args.items():
        default = defaults.get(name, REMOVED_FLAGS.get(name))
        if value == default or name in MAY_CHANGE | {"name", "out"}:
            continue
        words.append(flag(name))
        if name == "init_from":
            words.append("RUN")
        elif isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return "python train.py " + shlex.join(words)

def core_of(path, step, rows):
    """CORE of a run's checkpoint at `path`: from core_<step>.json beside it, else its log's rows; or None."""
    results = path.parent / f"core_{step:07d}.json"
    check_regular(results)
    try:
        return json.loads(results.read_text("utf-8"))["core"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        scores = [row.get("core") for row in rows if row["kind"] == "core" and row["step"] == step]
        return scores[-1] if scores else None

def figures(path, checkpoint):
    """What is known of a run's checkpoint, lines of text: its tokens, and what it scored."""
    step = checkpoint["step"]
    lines = []
    batch = checkpoint["args"].get("total_batch_size")
    if batch:
        lines.append(f"trained for {step} steps of {batch:,} tokens, {step * batch:,} tokens")
    rows = read_log(path.parent)
    evaluations = [row for row in rows if row["kind"] == "eval" and row["step"] == step]
    if evaluations:
        bpb = evaluations[-1]["bpb"]
        named = ", ".join(f"{name} {x:.4f}" for name, x in bpb.items() if math.isfinite(x))
        lines.append(f"validation bits per byte: {named}")
    core = core_of(path, step, rows)
    if core is not None:
        lines.append(f"CORE: {core:.4f}")
    return lines

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [nanolrt, latent-recurrent-transformer]
---

# {name}

A language model trained with nanolrt, the Latent Recurrent Transformer (arXiv 2605.26797) as flat scripts:
{label}, {n_layer} layers of width {n_embd}, {parameters:,} parameters, a context of {context} tokens, a
vocabulary of {vocab_size}. Its weights are in {dtype}.

{figures}

## Use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)  # it reads the configuration
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer(["The history of"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```

- A text begins with `{bos}`, which the tokenizer puts there, and ends where the model gives it. Text that
  spells it is text.
- Logits of whole texts are those of decoding token by token. The cache carries the memory.
- Batches are padded on the left to generate. Prompt and new tokens must fit into the context.
- The loss has no gradient here: nanolrt trains.

```
lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks arc_easy
```

## How it was trained

```
{command}
```

From step {step} of the run. The tokenizer has the sha256 {tokenizer_sha256}.
"""

def model_card(path, checkpoint, model, dtype):
    """README.md of the folder: what the model is, how it is used, its figures and the command of its run."""
    config = model.config
    try:
        lines = figures(path, checkpoint)
        command = training_command(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the flags or figures of {path.parent} are damaged ({e!r}): mend or move away its "
                        "log.jsonl and core_*.json, or use another checkpoint") from e
    return CARD.format(
        name=path.absolute().parent.name,
        label=config.label,
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        parameters=sum(p.numel() for p in model.parameters()),
        context=config.sequence_len,
        vocab_size=config.vocab_size,
        dtype=dtype,
        figures="\n".join(f"- {line}" for line in lines),
        bos=BOS,
        command=command,
        step=checkpoint["step"],
        tokenizer_sha256=checkpoint["tokenizer_sha256"],
    )


# -----------------------------------------------------------------------------
# The folder

def write_folder(folder, path, checkpoint, tokenizer, model, dtype):
    """Write all files of an export into the new folder. Raises OSError, or SafetensorError of a full disk."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True)
    weights = {}
    for name, p in model.state_dict().items():
        weights[f"model.{name}"] = p.to(getattr(torch, dtype)).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    bos = tokenizer.encode_single_token(BOS)
    generation = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos}
    settings = {
        "config.json": model_config(checkpoint, bos, dtype),
        "generation_config.json": generation,
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(model.config.sequence_len),
    }
    for name, value in settings.items():
        text = json.dumps(value, indent=None if name == "tokenizer.json" else 1, ensure_ascii=False)
        (folder / name).write_text(text + "\n", "utf-8")
    for name in CODE:
        source = (HERE / name).read_text("utf-8")
        (folder / Path(name).name).write_text(with_relative_imports(source), "utf-8")
    (folder / "README.md").write_text(model_card(path, checkpoint, model, dtype), "utf-8")

def export(run, out, dtype):
    """
    Make the folder `out` from a run or a checkpoint, all of it or nothing. dtype: that of the weights, a
    name. Raises UserError if there is no such run, if `out` exists, or if it cannot be written.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise UserError(f"{out} exists: remove it or choose another folder")
    check_new_folder(out)
    try:
        from safetensors import SafetensorError
    except ImportError as e:
        raise UserError('export.py needs safetensors: pip install -e ".[export]"') from e
    path, checkpoint, tokenizer, model = load_run(run, torch.device("cpu"))

    tmp = out.with_name(out.name + ".tmp")
    if os.path.lexists(tmp):  # it may be anybody's
        raise UserError(f"{tmp} is in the way, perhaps of an export that was killed: remove it")
    try:
        write_folder(tmp, path, checkpoint, tokenizer, model, dtype)
        os.rename(tmp, out)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise UserError(f"cannot write {out}: {reason}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return path

def main():
    parser = ArgumentParser(description="Turn a trained run into a folder that transformers opens.")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint file")
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of the weights")
    args = parser.parse_args()
    path = export(args.run, args.out, args.dtype)
    say(f"{args.out}: made from {path}. Open it with "
        f"AutoModelForCausalLM.from_pretrained({args.out!r}, trust_remote_code=True)")

if __name__ == "__main__":
    run_main(main)
