"""A vocabulary for models made here: the real format and special tokens, little knowledge.

Byte-level BPE as Qwen3.5 ships it (spec section 7): 256 byte tokens, merges learnt from the few lines below
(or from the text that a model is trained on), unused `[PADn]` entries up to the size, and the family's special
tokens at the end, at their real ids when the size is the real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from scarlet_jax.errors import BadInput

# How text is cut before merging (tokenizer.ggml.pre = "qwen35").
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_USER_DEFINED = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
]  # fmt: skip
SPECIAL = _CONTROL + _USER_DEFINED
_UNUSED_BEHIND = 250  # entries that the real table has behind its special tokens
SMALLEST = 256 + len(SPECIAL) + 6  # a few merges: llama.cpp refuses a table without

# ChatML with an optional thinking block, as the family's own templates write it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""

# What the merges are learnt from: common words, and a little of what makes tokenizers stumble.
_TEXT = """\
The quick brown fox jumps over the lazy dog, and then the dog jumps over the fox. It was the best of times;
it was the worst of times. There is nothing either good or bad, but thinking makes it so. We'll see what
they've done when they're here: I'm sure it isn't what you'd expect. In the beginning there was the word, and
the word was with the model, and the model was a matrix. One token, two tokens, three tokens: the state of the
attention is the state of the world. def forward(self, x): return self.weight @ x + self.bias  # 1234567890
for (int i = 0; i < n; i++) { printf("%d\\n", values[i]); }    if not x.shape == (3, 4):\t\traise ValueError
Le garçon a mangé une pêche à la crème brûlée; où étaient les élèves? Größe, Straße, überall schöne Äpfel.
¿Dónde está la montaña? El niño soñó con mañana. Привет, мир! Как дела? Это слово, это мир. Γειά σου κόσμε.
你好，世界。今天天气很好。我们在学习语言模型。
日本語の文章です。こんにちは世界。안녕하세요 세계. مرحبا بالعالم
שלום עולם नमस्ते दुनिया। สวัสดีชาวโลก 😀😀🎉👍🏽 — “quotes” … £€¥ ½ ² ≠ ∑
http://example.com/path?query=1&other=2
"""  # noqa: RUF001 (letters that look alike are the point)


def metadata(size: int, texts: Iterable[str] | None = None) -> dict[str, Any]:
    """The `tokenizer.*` keys for a table of `size` entries; BadInput where not even the least fits.

    Merges are learnt from `texts`, by default from the few lines below.
    """
    if size < SMALLEST:
        raise BadInput(f"vocabulary of {size}: expected {SMALLEST} or more: bytes, merges, special tokens")
    tail = min(_UNUSED_BEHIND, (size - SMALLEST) // 4)
    learnt, merges = _learn(size - len(SPECIAL) - tail, [_TEXT] if texts is None else texts)
    tokens = learnt + _padding(len(learnt), size - len(SPECIAL) - tail)
    first_special = len(tokens)
    tokens += SPECIAL
    tokens += _padding(len(tokens), size)
    special = {text: first_special + i for i, text in enumerate(SPECIAL)}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(tokens),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": special["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": special["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _learn(room: int, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """At most `room` tokens by id, and the merges ("a b") that make them."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=room,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [" ".join(pair) for pair in merges]


def _padding(start: int, stop: int) -> list[str]:
    return [f"[PAD{i}]" for i in range(start, stop)]


def _types(tokens: list[str]) -> list[int]:
    known = dict.fromkeys(_CONTROL, gguf.TokenType.CONTROL) | dict.fromkeys(
        _USER_DEFINED, gguf.TokenType.USER_DEFINED
    )

    def kind(text: str) -> int:
        unused = text.startswith("[PAD")
        return int(known.get(text, gguf.TokenType.UNUSED if unused else gguf.TokenType.NORMAL))

    return [kind(text) for text in tokens]
