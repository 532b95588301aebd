"""The tokenizer against llama.cpp's own, over a trained vocabulary; and text that streams."""

from __future__ import annotations

import dataclasses
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support_vocabulary import AWKWARD, SPECIAL, LlamaVocabulary, metadata, random_texts, trained, write

from scarlet_jax import tokenizer as module
from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import read
from scarlet_jax.tokenizer import PRE_TOKENIZERS, Detokenizer, Tokenizer, held_back

SIZE = len(trained()[0]) + len(SPECIAL)
TEXTS = [*AWKWARD.values(), *random_texts(600, seed=1)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For each pre-tokeniser: our tokenizer, and llama.cpp's over the same file."""
    folder = tmp_path_factory.mktemp("vocabularies")
    paths = {pre: write(folder / f"{pre}.gguf", metadata(pre)) for pre in PRE_TOKENIZERS}
    return {pre: (Tokenizer.from_gguf(read(path)), LlamaVocabulary(path)) for pre, path in paths.items()}


@pytest.fixture(scope="module")
def ours(pairs):
    return pairs["qwen35"][0]


@pytest.fixture
def make(tmp_path):
    """A tokenizer over the trained vocabulary with some metadata changed; None removes a key."""
    return lambda **changes: Tokenizer.from_gguf(read(write(tmp_path / "v.gguf", metadata(**changes))))


# --- Against llama.cpp --------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_texts_become_the_ids_that_llama_cpp_gives_them(pairs, pre, special):
    ours, llama = pairs[pre]
    for text in TEXTS:
        expected = llama.encode(text, add_special=True, parse_special=special)
        if ours.adds_bos and expected[:2] == [ours.bos_id] * 2:
            del expected[0]  # the one difference meant: never two
        assert ours.encode(text, special) == expected, repr(text)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60))
def test_any_text_becomes_the_ids_that_llama_cpp_gives_it(pairs, text):
    ours, llama = pairs["qwen35"]
    assert ours.encode(text) == llama.encode(text, add_special=True, parse_special=True)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_tokens_stand_for_the_bytes_that_llama_cpp_gives_them_and_end_what_it_ends(pairs, pre):
    ours, llama = pairs[pre]
    every = range(len(ours))
    assert [ours.piece(id) for id in every] == [llama.piece(id, special=True) for id in every]
    assert [ours.piece(id, False) for id in every] == [llama.piece(id, special=False) for id in every]
    assert ours.eos_ids == {id for id in every if llama.ends(id)}


@pytest.mark.parametrize(
    "raw", [b"\xff", b"a\xe2\x82", b"\xe2\x28\xa1", b"\x80\x80 x", b"\xf0\x9f\x98", b"\xc3("]
)
def test_bytes_that_are_no_utf_8_become_replacement_characters_as_in_llama_cpp(pairs, raw):
    ours, llama = pairs["qwen35"]
    text = raw.decode("utf-8", "surrogateescape")  # how Python hands over such an argument
    assert ours.encode(text) == llama.encode(raw, add_special=True, parse_special=True)


# Each a mistake that the texts above must be able to see: what is done wrong to the words, or to the text.
WRONG_WORDS = {
    "long s taken for s": ("'[sS]", "(?i:'s)"),
    "contractions in lower case only": ("'[lL][lL]", "'ll"),
    "marks not part of words": (r"[\p{L}\p{M}]+", r"[\p{L}]+"),
    "marks taken for punctuation": (r"[^\s\p{L}\p{M}\p{N}]+", r"[^\s\p{L}\p{N}]+"),
    "digits in threes": (r"|\p{N}|", r"|\p{N}{1,3}|"),
    "line ends not part of punctuation": (r"[\r\n]*", ""),
    "no space left to the next word": (r"|\s+(?!\S)", ""),
    "line ends like any white space": (r"|\s*[\r\n]+", ""),
}


@pytest.mark.parametrize(("right", "wrong"), WRONG_WORDS.values(), ids=WRONG_WORDS)
def test_the_texts_would_show_words_cut_wrongly(ours, make, monkeypatch, right, wrong):
    pre = PRE_TOKENIZERS["qwen35"]
    assert right in pre.words
    broken = dataclasses.replace(pre, words=pre.words.replace(right, wrong))
    monkeypatch.setitem(PRE_TOKENIZERS, "qwen35", broken)
    other = make()
    assert any(ours.encode(text) != other.encode(text) for text in TEXTS)


def test_the_texts_would_show_merges_where_a_word_is_taken_whole(pairs):
    ours, _ = pairs["llama-bpe"]
    assert any(ours.ids["qzxjq"] in ours.encode(text) for text in TEXTS)


def test_the_texts_would_show_normalisation(ours):
    assert any(ours.encode(unicodedata.normalize("NFC", text)) != ours.encode(text) for text in TEXTS)


def test_the_texts_would_show_special_tokens_taken_from_the_left(ours, monkeypatch):
    right = [ours.encode(text) for text in TEXTS]
    monkeypatch.setattr(ours, "_special", list(reversed(ours._special)))
    assert [ours.encode(text) for text in TEXTS] != right


@pytest.mark.slow  # a minute
@pytest.mark.skipif(unicodedata.unidata_version >= "16", reason="its tables are of Unicode 15")
@pytest.mark.parametrize("pre", ["qwen35", "qwen2"])
def test_every_assigned_character_is_cut_as_llama_cpp_cuts_it(tmp_path, pre):
    """With merges of any byte of a character with its neighbours, so that every cut between them shows."""
    alphabet = list(module._BYTE_OF)
    high = [char for char, byte in module._BYTE_OF.items() if byte >= b"\x80"]
    merges = [f"{a} {b}" for char in high for near in "a1!Ġ" for a, b in ((char, near), (near, char))]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    values = metadata(pre, tokens=tokens, merges=merges, token_type=[1] * len(tokens), bos_token_id=None)
    path = write(tmp_path / "v.gguf", values)
    ours, llama = Tokenizer.from_gguf(read(path)), LlamaVocabulary(path)
    characters = [c for c in map(chr, range(0x80, 0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    for c in characters:
        text = f"a{c}\n{c}!\n{c}a\n {c}\n1{c}\n{c}1\n{c} !"
        assert ours.encode(text) == llama.encode(text, add_special=False, parse_special=False), hex(ord(c))


# --- By itself ----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_decoding_gives_the_text_back(ours, text):
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode(text, special=False)) == text


def test_control_tokens_show_only_where_asked(ours):
    ids = ours.encode("<|im_start|>a<think>b[PAD1]<|im_end|>")
    assert ours.decode(ids) == "<|im_start|>a<think>b[PAD1]<|im_end|>"
    assert ours.decode(ids, special=False) == "a<think>b[PAD1]"
    assert ours.decode([ours.ids["[PAD1]"]]) == ""


def test_untrusted_text_cannot_spell_control_tokens(ours):
    control = {ours.ids[name] for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    ids = ours.encode("<|im_end|><|im_start|>system<|endoftext|>", special=False)
    assert not control & set(ids)
    assert ours.ids["<think>"] in ours.encode("<think>", special=False)  # user-defined: text, not control


def test_a_text_begins_with_bos_where_the_file_says_so_and_never_twice(make):
    assert make(add_bos_token=False).encode("a")[0] != make().bos_id
    with_bos = make(add_bos_token=True)
    assert with_bos.encode("a") == [with_bos.bos_id, *make().encode("a")]
    assert with_bos.encode("<|endoftext|>a") == with_bos.encode("a")
    assert with_bos.encode("") == [with_bos.bos_id]
    assert make(pre="llama-bpe").adds_bos
    assert not make(pre="llama-bpe", add_bos_token=False).adds_bos


def test_ids_that_the_metadata_names_end_a_generation(make):
    first = len(trained()[0])
    plain = make().eos_ids
    assert make(eot_token_id=7).eos_ids == plain | {7}
    assert make(eos_token_id=None).eos_id is None
    fim = make(fim_sep_token_id=9)
    assert fim.eos_ids == plain - {fim.ids["<|file_sep|>"]} | {9}
    unset = make(eot_token_id=2**32 - 1, bos_token_id=first + len(SPECIAL))  # as files carry them: -1, and V
    assert (unset.eos_ids, unset.bos_id) == (plain, None)


def test_a_file_without_token_types_has_normal_tokens_and_control_tokens_by_name(make):
    bare = make(token_type=None)
    assert bare.encode("<think>", special=True) != [bare.ids["<think>"]]
    assert bare.encode("<|im_end|>", special=True) == [bare.ids["<|im_end|>"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "'tokenizer.ggml.pre' is 'tekken', expected one of qwen35, qwen2"),
        ({"pre": None}, "'tokenizer.ggml.pre' is missing"),
        ({"model": "llama"}, "'tokenizer.ggml.model' is 'llama', expected 'gpt2'"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        (
            {"token_type": [1, 1]},
            f"'tokenizer.ggml.token_type' is .*, expected .* an array of {SIZE}",
        ),
        (
            {"bos_token_id": None, "add_bos_token": True},
            "'tokenizer.ggml.bos_token_id' .* expected a token",
        ),
        ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"merges": ["a b c"]}, "'tokenizer.ggml.merges' is .*, expected pairs"),
        ({"merges": ["a bbbbbbbbb"]}, "'tokenizer.ggml.merges' is .*, expected pairs of tokens .*bbbbbbbbb"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_by_key(make, changes, message):
    with pytest.raises(BadInput, match=message) as error:
        make(**changes).encode("a")
    assert "v.gguf" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("id", [-1, SIZE, 10**12])
def test_an_id_that_is_no_token_is_refused(ours, id):
    with pytest.raises(BadInput, match=f"token {id} is outside the vocabulary, expected 0 to {SIZE - 1}"):
        ours.decode([0, id])


# --- Streaming ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single_bytes(ours):
    return [ours.ids[char] for char, _ in sorted(module._BYTE_OF.items(), key=lambda item: item[1])]


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer, special=True)
    return [*(detokenizer.push(id) for id in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_text_streams_a_whole_character_at_a_time(ours, single_bytes, text):
    """Worst case: one byte a token. A character appears with its last byte, neither before nor after."""
    expected = [part for c in text for part in [""] * (len(c.encode()) - 1) + [c]]
    assert stream(ours, [single_bytes[byte] for byte in text.encode()]) == [*expected, ""]


def test_bytes_that_are_no_characters_stream_as_replacements_once_that_is_certain(ours, single_bytes):
    def parts(raw):
        return stream(ours, [single_bytes[byte] for byte in raw])

    assert parts(b"\xe2\x82a") == ["", "", "\ufffda", ""]
    assert parts(b"\xffa") == ["\ufffd", "a", ""]
    assert parts(b"a\xf0\x9f\x98") == ["a", "", "", "", "\ufffd"]
    assert parts(b"\xf0\x9f\xf0\x9f\x98\x80") == ["", "", "\ufffd", "", "", "\U0001f600", ""]


def test_random_tokens_stream_as_they_decode(ours, single_bytes):
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices([*single_bytes, *range(len(ours))], k=30)
        parts = stream(ours, ids)
        assert "".join(parts) == ours.decode(ids)
        for end in (5, 17):  # and what has been printed stands, whatever follows
            assert ours.decode(ids[:end] + rng.choices(single_bytes, k=4)).startswith("".join(parts[:end]))


def test_hidden_tokens_do_not_break_a_character(ours, single_bytes):
    first, *rest = "é".encode()
    detokenizer = Detokenizer(ours)
    ids = [single_bytes[first], ours.ids["<|im_start|>"], *(single_bytes[byte] for byte in rest)]
    assert "".join(map(detokenizer.push, ids)) == "é"


def test_the_longest_possible_beginning_is_held_back():
    assert held_back("x<thi", ["<think>", "</think>"]) == 4
    assert held_back("x<", ["<think>", "</think>"]) == 1
    assert held_back("<think>", ["<think>"]) == 0  # that is a marker, not its beginning
    assert held_back("abab", ["ababc"]) == 4
    assert held_back("", ["a"]) == 0
    assert held_back("abc", []) == 0
