"""The text that the model learns from: simple stories with facts that hold, questions, and small exercises.

Everything is drawn from a seed out of small sets of words, so that a model of a few million parameters can
learn all of it, and so that what it has to remember is never guessable: who found what where is drawn anew
in every document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


GIRLS = _words("""
Anna Clara Emma Grace Ida Lily Nora Rosa Alice Bella Daisy Ella Fiona Greta Hanna Iris Julia Kate Lena Mary Nina
Olga Paula Ruth Sara Tina Vera Wendy Zoe Molly
""")
BOYS = _words("""
Ben David Finn Hugo Jack Max Oscar Tom Adam Bruno Carl Dan Erik Frank George Henry Ivan Jonas Karl Leo Martin Noah
Otto Paul Robin Simon Theo Victor Walter Peter
""")
NAMES = dict.fromkeys(GIRLS, "She") | dict.fromkeys(BOYS, "He")
PLACES = _words("""
garden kitchen forest market school river village barn beach library field castle harbour mill tower cave valley
meadow bridge church museum station park island cellar attic bakery farm workshop theatre orchard pond lake hill
""")
THINGS = _words("""
ball kite book cup key lamp drum boat hat coin shell bell doll flute violin brush candle mirror hammer ladder spoon
plate kettle pillow blanket button ribbon feather marble whistle trumpet pencil letter map ring watch crown shoe
glove scarf umbrella bottle bucket wheel wagon sledge puppet mask lantern needle
""")
COLOURS = _words("""
red blue green yellow white black brown pink orange purple grey silver golden violet scarlet striped spotted
""")
CONTAINERS = _words("""
box basket bag chest drawer cupboard jar pot barrel crate sack trunk suitcase pocket wardrobe bowl
""")
ANIMALS = _words("""
dog cat duck goat pony rabbit hen frog horse cow pig lamb donkey parrot turtle hedgehog squirrel beaver otter owl
swan eagle monkey tiger lion camel zebra panda kitten spaniel badger robin
""")
MOODS = _words("""
happy proud glad tired hungry sleepy sad angry brave calm cheerful curious excited lonely nervous quiet thirsty
surprised
""")
TIMES = _words("""
morning afternoon evening day night summer winter spring autumn Sunday Monday Friday Saturday
""")
WEATHERS = _words("sunny rainy windy cloudy snowy foggy warm cold stormy bright frosty mild")
MOVES = _words("went walked ran rode hurried wandered strolled marched climbed travelled")
FINDS = _words("found saw noticed discovered spotted")
PUTS = _words("put hid placed kept stored left")
PLAYS = _words("played danced rested sang talked laughed jumped sat")
NUMBERS = _words("""
two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty
""")
KEYS = _words("""
apple pear plum peach lemon cherry grape melon onion carrot bean corn banana berry radish cabbage pepper tomato
potato garlic ginger mango olive almond walnut pumpkin lettuce spinach celery turnip raisin coconut butter cheese
bread honey sugar flour pasta noodle biscuit pancake pudding sausage soup salad jam cream coffee cocoa
""")
WORDS = _words("""
stone star moon cloud rain wind fire sand leaf root wood rope wool silk salt gold snow ice wave storm thunder light
shadow mountain desert ocean planet comet rocket engine hammock iron copper marsh glass paper cotton leather velvet
diamond pearl ruby amber coral ivory clay chalk brick cement tile roof window door floor wall garage street road
path tunnel fence gate corner square circle triangle line point number music song dance story poem picture colour
dream sleep smile secret promise present wish hope friend family doctor teacher farmer sailor pilot baker painter
soldier hunter king queen prince giant dragon wizard ghost bottom ceiling middle finger elbow shoulder knee thumb
breakfast dinner lunch supper holiday birthday weather season minute moment century second journey ticket passport
luggage platform railway airplane helicopter bicycle tractor anchor compass telescope microscope camera magnet
battery computer radio machine factory office hospital hotel restaurant palace temple statue fountain balcony
chimney stairs carpet curtain sofa chair table shelf clock vase medal trophy prize contest winner
champion captain admiral general judge lawyer mayor nurse dentist barber tailor butcher carpenter plumber
mechanic scientist inventor explorer astronaut magician juggler acrobat clown pirate knight archer
emerald sapphire crystal granite pebble gravel canyon glacier volcano jungle prairie swamp waterfall lagoon
""")


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


QUESTIONS = 2  # about a story


def story(rng: Rng, questions: int = QUESTIONS) -> Document:
    """Somebody finds a thing, hides it, is visited; and some of the questions there are about it, in any order."""
    name, friend = _several(rng, list(NAMES), 2)
    who, place, thing = NAMES[name], _pick(rng, PLACES), _pick(rng, THINGS)
    colour, container, mood = _pick(rng, COLOURS), _pick(rng, CONTAINERS), _pick(rng, MOODS)
    animal, other = _several(rng, ANIMALS, 2)
    weather, number = _pick(rng, WEATHERS), _pick(rng, NUMBERS)
    text = f"One {_pick(rng, TIMES)}, {name} {_pick(rng, MOVES)} to the {place}."
    finds = _pick(rng, FINDS)
    facts = [
        (f"Where is the {thing}?", f"In the {container}."),
        (f"What colour is the {thing}?", f"It is {colour}."),
        (f"Who {finds} the {thing}?", f"{name}."),
        (f"Who came with {_a(animal)}?", f"{friend}."),
        (f"Where did {name} go?", f"To the {place}."),
        (f"How was {name}?", f"{mood.capitalize()}."),
    ]
    if rng.random() < 0.3:
        text += f" It was {weather}."
        facts.append(("How was the weather?", f"{weather.capitalize()}."))
    if rng.random() < 0.3:
        text += f" There were {number} {other}s."
        facts.append((f"How many {other}s were there?", f"{number.capitalize()}."))
    text += (
        f" {who} {finds} {_a(colour)} {thing} there. {name} was {mood}."
        f" {who} {_pick(rng, PUTS)} the {thing} in the {container}. Then {friend} came with {_a(animal)}."
    )
    if rng.random() < 0.5:
        text += f' "Where is the {colour} {thing}?" said {friend}. "It is in the {container}," said {name}.'
    else:
        text += f" {friend} looked in the {container} and saw the {colour} {thing}."
    text += f" {name} and {friend} {_pick(rng, PLAYS)} with the {animal} in the {place}. The end.\n"
    chosen = rng.permutation(len(facts))[:questions]
    return (Turn("", text), *(Turn(f"Question: {facts[i][0]}\nAnswer:", f" {facts[i][1]}\n") for i in chosen))


def _a(word: str) -> str:
    """The word behind its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


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


@dataclasses.dataclass(frozen=True)
class Mix:
    """How often each kind is drawn; of a story, how much its new words count beside an answer, and its questions.

    A story is two to five times as long as an exercise. Half of its text is drawn and cannot be foreseen.
    At most so many questions follow it.
    """

    shares: dict[str, float]
    told: float
    questions: int = QUESTIONS


# Exercises that are soon learnt first; then what takes finding again: who, what and where, all that can be asked.
FIRST = Mix({"story": 0.15, "recall": 0.32, "copy": 0.13, "arithmetic": 0.15, "counting": 0.25}, told=0.4)
LATER = Mix(
    {"story": 0.7, "recall": 0.15, "copy": 0.05, "arithmetic": 0.05, "counting": 0.05}, told=0.05, questions=8
)
CHATS = 0.2  # of the exercises, as a conversation

TRAINING, HELD_OUT = 0, 1  # streams of one seed that have no draws in common


def documents(
    seed: int, stream: int, part: int = 0, kind: str | None = None, mix: Mix = FIRST
) -> Iterator[Document]:
    """Endlessly; the same arguments give the same documents. `part` numbers independent continuations."""
    kinds, shares = list(mix.shares), list(mix.shares.values())
    rng = np.random.default_rng([seed, stream, part, 1 + kinds.index(kind) if kind else 0])
    while True:
        chosen = kind or kinds[rng.choice(len(kinds), p=shares)]
        document = story(rng, mix.questions) if chosen == "story" else KINDS[chosen](rng)
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
