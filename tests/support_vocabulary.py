"""Vocabularies for the tests of text: trained, so that merges matter; and llama.cpp's reading of them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from scarlet_jax.tools.engines import ggml

# Overlapping ones, one that is only text, and names that llama.cpp gives a meaning whatever their type.
SPECIAL = {
    "<|endoftext|>": TokenType.CONTROL,
    "<|im_start|>": TokenType.CONTROL,
    "<|im_end|>": TokenType.CONTROL,
    "<|im": TokenType.CONTROL,
    "ab<|im_start": TokenType.USER_DEFINED,
    "<think>": TokenType.USER_DEFINED,
    "</think>": TokenType.USER_DEFINED,
    "<unknown>": TokenType.UNKNOWN,
    "plain<x>": TokenType.NORMAL,
    "[PAD1]": TokenType.UNUSED,
    "[PAD2]": TokenType.UNUSED,
    "<|fim_prefix|>": TokenType.USER_DEFINED,
    "<|fim_middle|>": TokenType.USER_DEFINED,
    "<|fim_suffix|>": TokenType.USER_DEFINED,
    "<|fim_pad|>": TokenType.USER_DEFINED,
    "<|repo_name|>": TokenType.USER_DEFINED,
    "<|file_sep|>": TokenType.NORMAL,
    "<|eot_id|>": TokenType.CONTROL,
    "<|eom_id|>": TokenType.CONTROL,
    "<|end_of_text|>": TokenType.CONTROL,
    "<é>": TokenType.USER_DEFINED,
    "éé<": TokenType.USER_DEFINED,  # of more bytes than the next, and fewer characters
    "<abc": TokenType.USER_DEFINED,
    "qzxjq": TokenType.NORMAL,  # a word that no merges make
}

# Where tokenizers part company; each is a string that one wrong choice or another gets wrong.
AWKWARD = {
    "empty": "",
    "nothing but spaces": "      ",
    "trailing spaces": "word   ",
    "spaces before a word": "    word",
    "tabs and spaces": "\tif x:\n\t    return  y \n",
    "line ends": "a\r\n\r\nb\n\n\nc\r\rd \r\n e\n \n",
    "spaces before a line end": "a   \n   b",
    "other white space": "a\u00a0b\u2003c\u3000d\u0085e\u2028f\u1680g\u202fh",
    "contractions in any case": "I'm you'RE he'S they'Ve we'lL I'D can'T it's'S it'Sx LL'LLama x'rex 'Sand",
    "long s is no contraction": "x'\u017fy '\u017ft 'L\u017f dog'\u017f",
    "Kelvin sign": "300 \u212a '\u212a",
    "curly apostrophe": "it\u2019s we\u2019ll",
    "digits": "1 12 123 1234 12345 3.14159 1,000,000",
    "digits of other scripts": "٠١٢٣ ०१२ ½ ² Ⅷ ① \U0001d7d9\U0001d7da",
    "a word after a mark": "-word \u0301word !word 1word",
    "combining marks": "e\u0301 n\u0303 a\u0323\u0307 \u0301\u0301 1\u0301 !\u0301",
    "composed and decomposed": "\u00e9 e\u0301 \u1e9b\u0323 \ufb01 \u212b \u00c5 A\u030a",
    "Hangul, both ways": "\ud55c\uae00 \u1112\u1161\u11ab",
    "vowel signs": "नमस्ते हिन्दी สวัสดีครับ ภาษาไทย",
    "right to left": "مرحبا بالعالم שלום \u200f\u200e",
    "Chinese": "你好\uff0c世界\uff01今天是2026年。",
    "emoji": "😀👍🏽👩\u200d👩\u200d👦🏳️\u200d🌈🇫🇷1️⃣",
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe\u2060f\u00adg",
    "control characters": "a\x00b\x01c\x1bd\x7fe",
    "private and unassigned": "\ue000\U000f0000\u0378\U0010ffff",
    "the replacement character": "\ufffd\ufffd",
    "punctuation runs": "...!!! ?!\n --> ==> </div> {{}} // ## $$\r\n",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<think>x</think><|endoftext|>",
    "special tokens that overlap": "ab<|im_start|> <|im<|im_start|>ab<|im_start<|im_end|>",
    "special tokens, nearly": "<|im_start <|imstart|> < |im_end|> <think <|fim_pad|",
    "special token beside text": "x<think>y <think> z\n</think>  w",
    "special tokens of few long characters": "éé<abc <abcéé<abc",
    "a token out of reach": "qzxjq, qzxjqs\nqzxjq",
    "unused and unknown tokens": "[PAD1] <unknown> plain<x> <é>",
    "a very long word": "a" * 500 + "é" * 300,
}

_ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789",
    "àâçèéêëîïôùûü", "αβγδεζηθ", "бвгдежз", "אבגדה", "ابتثج", "कखगघािी", "กขคงั่้", "中文字符", "가나다라",
    "😀😁👩👍🏽", "\u0300\u0301\u0308\u0323", "!?.,;:'\"()[]{}<>|-_=+*/\\@#$%^&~`",
]  # fmt: skip
_GAPS = ["", " ", " ", "\n", "  ", "\r\n", "\t", ", ", "'s ", "'LL ", ". ", "\n\n", "    "]


def _text() -> list[str]:
    """Stretches of made-up text in many scripts, begun and ended anywhere: merges are to cross every boundary.

    A vocabulary that was trained within words could not tell text that is cut into words wrongly.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randint(1, 7))) for _ in range(400)]
    text = "".join(rng.choice(words) + rng.choice(_GAPS) for _ in range(30_000))
    plain = [text for text in AWKWARD.values() if not any(name in text for name in SPECIAL)]
    text += "".join(plain) * 20  # often, so that there are merges at every wrong cut of these
    cuts = itertools.accumulate(iter(lambda: rng.randint(4, 12), None), initial=0)
    bounds = list(itertools.takewhile(lambda cut: cut < len(text), cuts))
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


# Merges over cuts that text seldom has, in the byte alphabet: of a long s, "'LL", "!" and a line end.
_RARE = ["Å ¿", "Å¿ y", "L L", "LL a", "! Ċ"]


@functools.cache
def trained() -> tuple[list[str], list[str]]:
    """A byte-level BPE of some 2,500 tokens: the tokens by id, and the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_text(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = dict.fromkeys([*_RARE, *(" ".join(pair) for pair in model["merges"])])
    tokens = dict.fromkeys(sorted(model["vocab"], key=model["vocab"].get))
    return list(tokens | dict.fromkeys(merge.replace(" ", "") for merge in _RARE)), list(merges)


def metadata(pre: str = "qwen35", **changes: Any) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys, without their prefix, of the trained vocabulary and SPECIAL after it."""
    tokens, merges = trained()
    first = len(tokens)
    ids = {name: first + i for i, name in enumerate(SPECIAL)}
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *SPECIAL],
        "token_type": [int(TokenType.NORMAL)] * first + [int(kind) for kind in SPECIAL.values()],
        "merges": merges,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    return {key: value for key, value in (values | changes).items() if value is not None}


_ADD = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


def write(path: Path, values: dict[str, Any], others: dict[str, Any] | None = None) -> Path:
    """A GGUF without tensors, which llama.cpp takes for a vocabulary; `others` are keys in full."""
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_block_count(1)
    writer.add_context_length(128)
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    for key, value in (prefixed | (others or {})).items():
        _ADD[type(value)](writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


class LlamaVocabulary:
    """llama.cpp's own tokenizer over a GGUF's vocabulary."""

    def __init__(self, path: Path) -> None:
        self._lib = ggml.library()
        params = self._lib.llama_model_default_params()
        params.vocab_only = True
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, self._lib.last_error()
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    def encode(self, text: str | bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        raw = text if isinstance(text, bytes) else text.encode()
        room = 3 * len(raw) + 1  # a byte that is no UTF-8 becomes a character of three
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, room, add_special, parse_special)
        assert count >= 0
        return ids[:count]

    def piece(self, id: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        count = self._lib.llama_token_to_piece(self._vocab, id, buffer, 256, 0, special)
        assert count >= 0
        return buffer.raw[:count]

    def ends(self, id: int) -> bool:
        return self._lib.llama_vocab_is_eog(self._vocab, id)


def random_texts(count: int, seed: int) -> list[str]:
    """Strings of awkward characters, special tokens, trained words and any assigned character."""
    rng = random.Random(seed)
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    hot = [*"".join(AWKWARD.values()), *SPECIAL, *_GAPS, "'ll", "'S", "\r\n", "  "]
    words = trained()[0]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(hot)
        return rng.choice(words) if kind < 0.85 else rng.choice(assigned)

    return ["".join(piece() for _ in range(rng.randint(0, 25))) for _ in range(count)]
