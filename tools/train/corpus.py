"""The text that the model learns from: simple stories with facts that hold, questions, and small exercises.

Everything is drawn from a seed out of small sets of words, so that a model of a few million parameters can
learn all of it, and so that what it has to remember is never guessable: who found what where is drawn anew
in every document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

NAMES = {
    "Anna": "She", "Ben": "He", "Clara": "She", "David": "He", "Emma": "She", "Finn": "He", "Grace": "She",
    "Hugo": "He", "Ida": "She", "Jack": "He", "Lily": "She", "Max": "He", "Nora": "She", "Oscar": "He",
    "Rosa": "She", "Tom": "He",
}  # fmt: skip
PLACES = ["garden", "kitchen", "forest", "market", "school", "river", "village", "barn", "beach", "library"]
THINGS = ["ball", "kite", "book", "cup", "key", "lamp", "drum", "boat", "hat", "coin", "shell", "bell"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "pink"]
CONTAINERS = ["box", "basket", "bag", "chest", "drawer", "cupboard"]
ANIMALS = ["dog", "cat", "duck", "goat", "pony", "rabbit", "hen", "frog"]
MOODS = ["happy", "proud", "glad", "tired", "hungry", "sleepy"]
TIMES = ["morning", "afternoon", "evening", "day"]
KEYS = [
    "apple",
    "pear",
    "plum",
    "peach",
    "lemon",
    "cherry",
    "grape",
    "melon",
    "onion",
    "carrot",
    "bean",
    "corn",
]
WORDS = [
    "stone",
    "star",
    "moon",
    "cloud",
    "rain",
    "wind",
    "fire",
    "sand",
    "leaf",
    "root",
    "wood",
    "rope",
    "wool",
    "silk",
    "salt",
    "gold",
]


@dataclasses.dataclass(frozen=True)
class Turn:
    """Something given, and what has to follow: the answer starts where a word of the tokenizer does."""

    prompt: str
    answer: str


Document = tuple[Turn, ...]  # turns that follow each other in one text
Rng = np.random.Generator


def _pick(rng: Rng, words: Sequence[str]) -> str:
    return words[rng.integers(len(words))]


def _several(rng: Rng, words: Sequence[str], count: int) -> list[str]:
    """Different ones, in any order."""
    return [words[i] for i in rng.permutation(len(words))[:count]]


# --- Stories ------------------------------------------------------------------------------------------------


def story(rng: Rng) -> Document:
    """Somebody finds a thing, hides it, is visited; and two questions about it."""
    name, friend = _several(rng, list(NAMES), 2)
    who, place, thing = NAMES[name], _pick(rng, PLACES), _pick(rng, THINGS)
    colour, container, animal = _pick(rng, COLOURS), _pick(rng, CONTAINERS), _pick(rng, ANIMALS)
    mood = _pick(rng, MOODS)
    text = (
        f"One {_pick(rng, TIMES)}, {name} went to the {place}. {who} found a {colour} {thing} there."
        f" {name} was {mood}. {who} put the {thing} in the {container}."
        f" Then {friend} came with a {animal}."
    )
    if rng.random() < 0.5:
        text += f' "Where is the {colour} {thing}?" said {friend}. "It is in the {container}," said {name}.'
    else:
        text += f" {friend} looked in the {container} and saw the {colour} {thing}."
    text += f" {name} and {friend} played with the {animal} in the {place}. The end.\n"
    facts = [
        (f"Where is the {thing}?", f"In the {container}."),
        (f"What colour is the {thing}?", f"It is {colour}."),
        ("Who found it?", f"{name}."),
        (f"Who came with a {animal}?", f"{friend}."),
        (f"Where did {name} go?", f"To the {place}."),
        (f"How was {name}?", f"{mood.capitalize()}."),
    ]
    chosen = rng.permutation(len(facts))[:2]
    return (Turn("", text), *(Turn(f"Question: {facts[i][0]}\nAnswer:", f" {facts[i][1]}\n") for i in chosen))


# --- Exercises ----------------------------------------------------------------------------------------------


def recall(rng: Rng) -> Document:
    """Pairs of a key and a value, and what belongs to some of the keys."""
    count = int(rng.integers(2, 6))
    pairs = list(zip(_several(rng, KEYS, count), _several(rng, WORDS, count), strict=True))
    given = "Remember: " + ", ".join(f"{key} is {value}" for key, value in pairs) + ".\n"
    turns = []
    for i in rng.permutation(count)[:3]:
        key, value = pairs[i]
        turns.append(Turn(f"{'' if turns else given}What is {key}? It is", f" {value}.\n"))
    return tuple(turns)


def copy(rng: Rng) -> Document:
    """A few words, and the same words again."""
    words = " ".join(_pick(rng, WORDS) for _ in range(rng.integers(3, 9)))
    return (Turn(f"Copy: {words}.\nAgain:", f" {words}.\n"),)


def arithmetic(rng: Rng) -> Document:
    """Sums and differences of digits, none below zero."""
    return tuple(_sum(rng) for _ in range(3))


def _sum(rng: Rng) -> Turn:
    a, b = (int(digit) for digit in rng.integers(0, 10, 2))
    if rng.random() < 0.5:
        return Turn(f"{a} + {b} =", f" {a + b}.\n")
    return Turn(f"{max(a, b)} - {min(a, b)} =", f" {max(a, b) - min(a, b)}.\n")


def counting(rng: Rng) -> Document:
    """From one number to another, up or down."""
    start, length = int(rng.integers(0, 20)), int(rng.integers(3, 8))
    numbers = [*range(start, start + length)]
    if rng.random() < 0.5:
        numbers.reverse()
    listed = " ".join(map(str, numbers))
    return (Turn(f"Count from {numbers[0]} to {numbers[-1]}:", f" {listed}.\n"),)


KINDS: dict[str, Callable[[Rng], Document]] = {
    "story": story,
    "recall": recall,
    "copy": copy,
    "arithmetic": arithmetic,
    "counting": counting,
}
# How often each kind is drawn. A story is three to five times as long as an exercise.
SHARES = {"story": 0.2, "recall": 0.3, "copy": 0.15, "arithmetic": 0.2, "counting": 0.15}
CHATS = 0.2  # of the exercises, as a conversation

TRAINING, HELD_OUT = 0, 1  # streams of one seed that have no draws in common


def documents(seed: int, stream: int, part: int = 0, kind: str | None = None) -> Iterator[Document]:
    """Endlessly; the same arguments give the same documents. `part` numbers independent continuations."""
    kinds, shares = list(SHARES), list(SHARES.values())
    rng = np.random.default_rng([seed, stream, part, 1 + kinds.index(kind) if kind else 0])
    while True:
        chosen = kind or kinds[rng.choice(len(kinds), p=shares)]
        document = KINDS[chosen](rng)
        talks = kind is None and chosen != "story" and rng.random() < CHATS
        yield as_chat(document) if talks else document


def as_chat(document: Document) -> Document:
    """The turns as the chat template writes them."""
    return tuple(
        Turn(
            f"<|im_start|>user\n{turn.prompt}<|im_end|>\n<|im_start|>assistant\n",
            f"{turn.answer.rstrip()}<|im_end|>\n",
        )
        for turn in document
    )
