"""
A nanolrt model behind the interface of Hugging Face's transformers:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

export.py copies this file into such a folder, beside model.py, attention.py, interleave.py and recurrent.py
as they were then. The model is theirs; nothing is computed here.

Whole texts go through exact parallel prefill, so their logits are those of the exact recurrence, as if they
were decoded token by token. After that, each token is one forward. The cache carries the keys and values, and
the memory that the next token reads. The context does not slide: what would go beyond it is refused.
"""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from attention import KVCache
from interleave import prefill
from model import GPT, rotary_tables
from recurrent import build_model, config_from_dict

# transformers calls a cache `past_key_values`, and since version 5.2x `cache`
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class NanoLRTConfig(PretrainedConfig):
    """gpt: the fields of GPTConfig or RecurrentConfig, a dict, from which the usual names of sizes come."""
    model_type = "nanolrt"

    def __init__(self, gpt=None, **options):
        self.gpt = gpt or {}
        gpt_config = config_from_dict(self.gpt)
        sizes = dict(
            vocab_size=gpt_config.vocab_size,
            hidden_size=gpt_config.n_embd,
            num_hidden_layers=gpt_config.n_layer,
            num_attention_heads=gpt_config.n_head,
            num_key_value_heads=gpt_config.n_kv_head,
            head_dim=gpt_config.head_dim,
            max_position_embeddings=gpt_config.sequence_len,
        )
        for name, size in sizes.items():
            setattr(self, name, size)
            options.pop(name, None)
        self.use_cache = options.pop("use_cache", True)
        options["tie_word_embeddings"] = False
        super().__init__(**options)


class NanoLRTCache:
    """
    What a batch of sequences carries from token to token: a KVCache, how many positions it holds, and the
    memory that the next one reads, (B, 1, D) or None for zero.
    """
    is_linear = (False,)  # for transformers: this cache has a length
    is_compileable = False

    def __init__(self, kv, length, memory):
        self.kv = kv
        self.length = length
        self.memory = memory
        self.first = 0 if kv.start is None else int(kv.start.min())  # where the longest row starts

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reserve(self, config, n):
        """Make room for n more positions: at least twice the old room, so that moves are few."""
        old = self.kv
        if self.length + n <= old.length:
            return
        batch_size, _, _, _ = old.k[0].shape
        length = max(self.length + n, 2 * old.length)
        self.kv = KVCache(config, batch_size, length, old.k[0].device, old.k[0].dtype, start=old.start)
        self.kv.copy_from(old, self.length, 1)

    def reorder_cache(self, beam_idx):
        """Beam search: go on with these rows, int64 (B,)."""
        rows = beam_idx.to(self.kv.k[0].device)
        self.kv.select_rows(rows)
        if self.memory is not None:
            self.memory = self.memory[rows]


def text_bounds(attention_mask):
    """
    Where the text of each row starts and ends: two tensors (B,) int64, None where no row is padded on that
    side. attention_mask (B, T): 1 for text, 0 for padding. Raises ValueError if a row has no text, or padding
    within it.
    """
    is_text = attention_mask.bool()
    T = is_text.size(1)
    before = (is_text.cumsum(1) == 0).sum(1)
    behind = (is_text.flip(1).cumsum(1) == 0).sum(1)
    if (is_text.sum(1) != T - before - behind).any():
        raise ValueError("attention_mask must have text in every row, and padding before or behind it only")
    start = before if before.any() else None
    ends = T - behind if behind.any() else None
    return start, ends


class NanoLRTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoLRTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["GPT", "RecurrentGPT"]  # one store of keys and values, on one device
    _supports_sdpa = True
    _is_stateful = True  # a memory cannot be taken back: transformers refuses assisted generation

    def __init__(self, config):
        super().__init__(config)
        self.model = build_model(config_from_dict(config.gpt))
        self.post_init()

    def _init_weights(self, module):
        """GPT initializes itself. What a file of weights lacks are the rotary tables."""
        if isinstance(module, GPT):
            for buffer, table in zip((module.cos, module.sin), rotary_tables(module.config)):
                buffer.copy_(table)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward() makes the cache

    def get_input_embeddings(self):
        return self.model.wte

    def get_output_embeddings(self):
        return self.model.lm_head

    def resize_token_embeddings(self, *args, **options):
        raise NotImplementedError("the vocabulary of a nanolrt model cannot be changed: "
                                  "every layer may have a value embedding of its tokens")

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, next_sequence_length=None,
                                      cache_position=None, use_cache=None, logits_to_keep=0, **options):
        """The arguments of forward() for the next step of generate()."""
        if next_sequence_length is None and cache_position is not None:  # of older versions of transformers
            next_sequence_length = len(cache_position)
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache,
                      logits_to_keep=logits_to_keep)
        inputs[CACHE] = options.get(CACHE)
        return inputs

    @torch.no_grad()
    def forward(self, input_ids, attention_mask=None, cache=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, return_dict=None):
        """
        input_ids (B, T) int64: whole texts, or what follows the positions that `cache` holds.
        attention_mask: 1 for text, 0 for padding: (B, T), or with a cache (B, all positions so far).
        cache: of an earlier call; past_key_values is its older name. It is changed in place.
        labels (B, T) int64: the tokens themselves, -100 where there is no loss. They are shifted here.
        use_cache: also return a cache. By default that is done where it can be, which is not with padding
        behind the text, as a text cannot go on behind its padding.
        logits_to_keep: so many last positions have logits, 0: all.

        Returns loss, the mean over the labels in nats, a scalar; logits (B, T, V) float32; and the cache.
        Raises ValueError beyond the context and for padding that cannot be meant.
        """
        if self.training and labels is not None:
            raise ValueError("this class is for inference and its loss has no gradient: call eval(), "
                             "or train with train.py of nanolrt")
        gpt = self.model
        cache = past_key_values if cache is None else cache
        T = input_ids.size(1)
        past = 0 if cache is None else cache.length

        # padding
        start = ends = None
        if attention_mask is not None and cache is None:
            start, ends = text_bounds(attention_mask)
        elif attention_mask is not None and not attention_mask[:, past:].all():
            raise ValueError("no padding can follow the positions of a cache: pad on the left")
        if ends is not None and use_cache:
            raise ValueError("a text cannot go on behind its padding: pad on the left to generate "
                             '(tokenizer.padding_side = "left")')

        # the context
        first = 0 if cache is None else cache.first
        if start is not None:
            first = int(start.min())
        context = gpt.config.sequence_len
        if past + T - first > context:
            raise ValueError(f"{past + T - first} tokens are more than the context of {context}, "
                             "which does not slide: give shorter texts or a lower max_new_tokens")

        # the exact recurrence: of whole texts, of several tokens that follow, or of one
        if cache is None:
            kv = KVCache(gpt.config, *input_ids.shape, input_ids.device, gpt.wte.weight.dtype, start=start)
            hidden, memory, _ = prefill(gpt, input_ids, kv, ends=ends)
            cache = NanoLRTCache(kv, T, memory)
        else:
            cache.reserve(gpt.config, T)
            if T == 1:
                hidden, cache.memory = gpt(input_ids, range(past, past + 1), cache.kv, cache.memory)
            else:
                hidden, cache.memory, _ = prefill(gpt, input_ids, cache.kv, first=past, memory=cache.memory)
            cache.length += T

        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
            loss = gpt.token_loss(hidden[:, :-1], targets).sum() / (targets >= 0).sum()
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = gpt.logits(hidden[:, kept])
        wants_cache = ends is None if use_cache is None else use_cache
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if wants_cache:
            output[CACHE] = cache
        return output if return_dict is not False else output.to_tuple()
