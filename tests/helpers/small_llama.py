"""Small random Llamas of transformers, with tokenizers of several kinds."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
WORDS = ["some text and more of it. some text", "another line\n  of text"]


def byte_level(template=None):
    """A tokenizer of bytes and a few words; ``template`` says what it adds to a text."""
    text = tokenizers.Tokenizer(models.BPE())
    text.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text.decoder = decoders.ByteLevel()
    text.train_from_iterator(
        WORDS * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=MARKS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if template is not None:
        ids = [(mark, number) for number, mark in enumerate(MARKS)]
        text.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return text


def spaced(template=None):
    """A tokenizer like Llama 2's, whose words carry the space before them."""
    letters = "abcdefghijklmnopqrstuvwxyz.\n\u2581"
    byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
    pieces = ["<unk>", *MARKS, *byte_pieces, *letters, "so", "me", "some", "\u2581some", "or", "re"]
    merges = [("s", "o"), ("m", "e"), ("so", "me"), ("\u2581", "some"), ("o", "r"), ("r", "e")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    text = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    text.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    text.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    text.add_special_tokens(MARKS)
    if template is not None:
        ids = [(mark, vocabulary[mark]) for mark in MARKS]
        text.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return text


BOTH = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
KINDS: dict[str, Any] = {
    "prepends BOS": (byte_level, "<s> $A", BOTH, {}),
    "appends EOS": (byte_level, "$A </s>", BOTH, {}),
    "prepends and appends": (byte_level, "<s> $A </s>", BOTH, {}),
    "adds nothing": (byte_level, None, BOTH, {}),
    "no BOS": (byte_level, None, {"eos_token": "</s>", "pad_token": "<pad>"}, {}),
    "chat": (byte_level, None, CHAT, {"eos_token_id": [1, 3]}),
    "set by a setting": (byte_level, None, {**BOTH, "add_bos_token": True}, {}),
    "words with spaces": (spaced, "<s> $A", BOTH, {}),
}


def make_llama(folder, kind, ends=()):
    """Save a small random Llama; ``ends`` are further ids that end its texts."""
    make, template, names, generation = KINDS[kind]
    text = make(template)
    folder.mkdir()
    text.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(len(kind))
    config = transformers.LlamaConfig(
        vocab_size=-(-text.get_vocab_size() // 64) * 64 + 64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=text.token_to_id(names.get("bos_token", names["eos_token"])),
        eos_token_id=text.token_to_id(names["eos_token"]),
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    stops = generation.get("eos_token_id", [config.eos_token_id])
    model.generation_config.eos_token_id = [*stops, *ends]
    model.save_pretrained(folder)
    return folder
