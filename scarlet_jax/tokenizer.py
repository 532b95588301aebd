"""Text to token ids and back, with the file's own byte-level BPE vocabulary.

What llama.cpp makes of the same file is the measure: special tokens are cut out first, the longest first,
then each stretch of text is split into words by the file's pre-tokeniser and merged within them, with no
Unicode normalisation before (transformers applies NFC; llama.cpp does not, and neither do we).

Character classes are those of the `tokenizers` library (Unicode 16); llama.cpp's tables are one version
older, so a letter, mark or digit that only Unicode 16 added may be split differently there.

Source: spec section 7.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from absl import logging
from gguf.constants import Keys, TokenType
from tokenizers import models, pre_tokenizers

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import Gguf, Metadata

_KEYS = Keys.Tokenizer


# --- Pre-tokenisers -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How a family of vocabularies splits text into the words within which it merges."""

    words: str  # every match is a word, and so is every stretch between matches
    ignore_merges: bool = False  # a word that is a token is taken whole, whatever the merges would make of it
    adds_bos: bool = False  # unless the file says otherwise


def _gpt4_words(letters: str, digits: str) -> str:
    r"""Contractions, words with one leading mark or space, digits, punctuation, and whitespace by kind.

    The contractions are spelt out, for `(?i:'s)` would match a long s too. A run of spaces leaves its last
    one to the word after it: `\s+(?!\S)`.
    """
    return "|".join(
        (
            r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
            rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+",
            digits,
            rf" ?[^\s{letters}\p{{N}}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


_QWEN2 = PreTokenizer(_gpt4_words(r"\p{L}", r"\p{N}"))
_LLAMA3 = PreTokenizer(_gpt4_words(r"\p{L}", r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)

# By the value of `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "qwen35": PreTokenizer(_gpt4_words(r"\p{L}\p{M}", r"\p{N}")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "lfm2": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "gpt-2": PreTokenizer(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
}


# --- Special tokens -----------------------------------------------------------------------------------------

# Tokens that end a generation: those the metadata names, and, as llama.cpp has it, those of these names.
_END_KEYS = (_KEYS.EOS_ID, _KEYS.EOT_ID, _KEYS.EOM_ID)
_END_NAMES = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
# Fill-in-the-middle tokens that end a file, and so an answer: key, and names to look for without it.
_FILE_END = {
    _KEYS.FIM_PAD_ID: ("<|fim_pad|>",),
    _KEYS.FIM_REP_ID: ("<|fim_repo|>", "<|repo_name|>"),
    _KEYS.FIM_SEP_ID: ("<|file_sep|>",),
}
_FIM_NAMES = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# Control tokens by name, whatever type the file gives them.
_CONTROL_NAMES = frozenset(
    [*_END_NAMES, *(name for names in _FILE_END.values() for name in names), *_FIM_NAMES]
)


class Tokenizer:
    """A byte-level BPE tokenizer, from a file's metadata.

    `tokens` are the V texts as the file spells them, `ids` the way back, `kinds` (V,) their
    `gguf.TokenType`s; `eos_ids` is every token that ends a generation, `eos_id` the one that ends an answer
    or None, `bos_id` the beginning-of-sequence token or None, and `adds_bos` whether texts begin with it.
    """

    def __init__(self, meta: Metadata) -> None:
        """Raises BadInput for a vocabulary that is not byte-level BPE, or is split in an unknown way."""
        model = meta.string(_KEYS.MODEL)
        meta.require(model == "gpt2", _KEYS.MODEL, "'gpt2' (byte-level BPE)")
        pre = meta.string(_KEYS.PRE)
        meta.require(pre in PRE_TOKENIZERS, _KEYS.PRE, f"one of {', '.join(PRE_TOKENIZERS)}")
        self._meta = meta
        self._pre = PRE_TOKENIZERS[pre]
        self.tokens = meta.strings(_KEYS.LIST)
        self.ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))
        self.kinds = self._read_kinds()
        self.bos_id = self._special_id(_KEYS.BOS_ID)
        self.eos_id = self._special_id(_KEYS.EOS_ID)
        self.eos_ids = frozenset(self._end_ids())
        self.adds_bos = bool(meta.integers(_KEYS.ADD_BOS, 1, self._pre.adds_bos)[0])
        if self.adds_bos:
            meta.require(self.bos_id is not None, _KEYS.BOS_ID, "a token, since texts begin with it")

    @classmethod
    def from_gguf(cls, gguf: Gguf) -> Tokenizer:
        """The tokenizer in a file."""
        return cls(gguf.metadata)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text, after the beginning-of-sequence token where the file asks for one (never two).

        `special`: whether the text may spell control tokens such as `<|im_end|>`; False for untrusted text.
        User-defined tokens such as `<think>` are matched in either case. A lone surrogate, which is how
        Python carries a byte that is not UTF-8, becomes U+FFFD.
        """
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        ids: list[int] = []
        for part in self._cut_special(text, special):
            ids.extend([part] if isinstance(part, int) else self._bpe.encode(part).ids)
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. `special`: whether control tokens show."""
        return b"".join(self.piece(id, special) for id in ids).decode("utf-8", "replace")

    def piece(self, id: int, special: bool = True) -> bytes:
        """The bytes that a token stands for; none for an unused one. BadInput if there is no such token."""
        if not 0 <= id < len(self.tokens):
            raise BadInput(f"token {id} is outside the vocabulary, expected 0 to {len(self.tokens) - 1}")
        text, kind = self.tokens[id], self.kinds[id]
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            return text.encode() if special else b""
        if kind == TokenType.USER_DEFINED:
            return text.encode()
        if kind == TokenType.UNUSED:
            return b""
        return b"".join(_BYTE_OF.get(char) or char.encode() for char in text)

    @functools.cached_property
    def _bpe(self) -> tokenizers.Tokenizer:
        """Splitting and merging. Built when first needed: that takes half a second for 250,000 tokens."""
        halves = (merge.partition(" ") for merge in self._meta.strings(_KEYS.MERGES))
        merges = [(left, right) for left, _, right in halves]
        try:
            # Special tokens never reach it, so the library need not know them.
            bpe = tokenizers.Tokenizer(models.BPE(self.ids, merges, ignore_merges=self._pre.ignore_merges))
        except Exception as error:  # the library raises nothing more specific
            self._meta.require(False, _KEYS.MERGES, f"pairs of tokens ({error})")
        words = pre_tokenizers.Split(tokenizers.Regex(self._pre.words), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        return bpe

    @functools.cached_property
    def _special(self) -> list[tuple[str, int]]:
        """Tokens to find in text, (text, id), those of most bytes first."""
        kinds = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        found = np.flatnonzero(np.isin(self.kinds, kinds))
        texts = [(self.tokens[id], int(id)) for id in found if self.tokens[id]]
        return sorted(texts, key=lambda item: -len(item[0].encode()))

    def _cut_special(self, text: str, special: bool) -> list[str | int]:
        """Stretches of text, and ids of special tokens, each cut out everywhere before any shorter one."""
        parts: list[str | int] = [text]
        for token, id in self._special:
            if token in text and (special or self.kinds[id] == TokenType.USER_DEFINED):
                parts = [piece for part in parts for piece in _cut(part, token, id)]
        return [part for part in parts if part != ""]

    def _read_kinds(self) -> np.ndarray:
        kinds = np.array(self._meta.integers(_KEYS.TOKEN_TYPE, len(self.tokens), TokenType.NORMAL))
        kinds[[self.ids[name] for name in _CONTROL_NAMES if name in self.ids]] = TokenType.CONTROL
        return kinds

    def _special_id(self, key: str) -> int | None:
        """A token id in the metadata; None if absent, or if there is no such token (files do carry -1)."""
        if key not in self._meta:
            return None
        id = self._meta.integer(key)
        if 0 <= id < len(self.tokens):
            return id
        logging.warning("%s is %d, outside the vocabulary of %d tokens: ignored", key, id, len(self.tokens))
        return None

    def _end_ids(self) -> Iterator[int]:
        """Every token that ends a generation, as llama.cpp decides it."""
        found = [self._special_id(key) for key in _END_KEYS]
        found += [self.ids.get(name) for name in _END_NAMES]
        for key, names in _FILE_END.items():
            explicit = self._special_id(key)
            named = next((self.ids[name] for name in names if name in self.ids), None)
            found.append(named if explicit is None else explicit)
        return (id for id in found if id is not None)


def _cut(part: str | int, token: str, id: int) -> Iterator[str | int]:
    """`part` with every `token` in it replaced by its id."""
    if isinstance(part, int):
        yield part
        return
    first, *rest = part.split(token)
    yield first
    for text in rest:
        yield id
        yield text


class Detokenizer:
    """Ids to text as they come, never half a character: bytes that may still become one are held back.

    `special`: whether control tokens show.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is certain after one more token, from where the last call left off; often empty."""
        return self._utf8.decode(self._tokenizer.piece(id, self._special))

    def flush(self) -> str:
        """The end of the text: bytes still waiting for the rest of their character are given up as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def held_back(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `markers`."""
    beginnings = (marker[:n] for marker in markers for n in range(1, len(marker)))
    return max((len(part) for part in beginnings if text.endswith(part)), default=0)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's alphabet, character -> byte: printable Latin-1 is itself, the rest counts up from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(byte, byte) for byte in printable] + [(256 + n, byte) for n, byte in enumerate(others)]
    return {chr(char): bytes([byte]) for char, byte in pairs}


_BYTE_OF = _byte_alphabet()
