"""`scarlet chat`, with a user who is a script."""

from __future__ import annotations

import argparse
import io
import re
import signal
import sys
from typing import Any

import models
import pytest
from support_fading import Fading, weights
from support_vocabulary import metadata, write

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import read
from scarlet_jax.tokenizer import Tokenizer
from scarlet_jax.tools import chat as command
from scarlet_jax.tools.cli import main

# Thoughts are dropped from what was said before, as Qwen's templates do.
TEMPLATE = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking -}}
{%- endif -%}"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "m.gguf"
    return read(write(path, metadata(), {"tokenizer.chat_template": TEMPLATE}))


class Script:
    """A terminal at which the user says these lines; `log` is all that happens there."""

    interactive = True

    def __init__(self, lines, at_write=lambda: None):
        self.lines = list(lines)
        self.log = []
        self.at_write = at_write

    def read(self):
        return self.lines.pop(0) if self.lines else None

    def say(self, text, style):
        self.log.append(("say", text))

    def write(self, text, style=""):
        self.log.append((style or "plain", text))
        self.at_write()

    def text(self, kind):
        return "".join(text for what, text in self.log if what == kind)


class Parrot(Fading):
    """A model that gives these answers, one after another, and ends each."""

    implementation = "auto"

    def __init__(self, gguf, answers, context_length=400):
        tokenizer = Tokenizer.from_gguf(gguf)
        super().__init__(*weights(len(tokenizer)), context_length, tokenizer=tokenizer, gguf=gguf)
        self.answers = [[*tokenizer.encode(text), tokenizer.eos_id] for text in answers]
        self.prompts = []

    def last_logits(self, tokens, state=None, *, consume=False, positions=None):
        logits, state = super().last_logits(tokens, state, consume=consume, positions=positions)
        self.place = self.place + 1 if consume else 0
        return logits.at[self.answers[len(self.prompts) - 1][self.place]].set(1e6), state


@pytest.fixture
def talk(monkeypatch):
    """Lets a model and a scripted user talk: the terminal, and the conversation."""

    def generate(model, prompt, **options):
        model.prompts.append(prompt)
        return real(model, prompt, **options)

    real = command.generate
    monkeypatch.setattr(command, "generate", generate)

    def talk(model, lines, *, system="", think="auto", thoughts=True, stats=False, at_write=lambda: None):
        terminal: Any = Script(lines, at_write)
        settings = command.Settings(system, think, thoughts, stats)
        conversation = command.Talk(model, settings, {"temperature": 0.0}, terminal)
        conversation.run()
        return terminal, conversation

    return talk


def said(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def test_turns_add_up_and_thoughts_are_told_from_answers(gguf, talk):
    model = Parrot(gguf, ["<think>\nhm\n\nwell\n</think>\n\nHello, you.\n", "Fine"])
    terminal, conversation = talk(model, ["Hi", "  ", "How?"])
    assert said(conversation) == [
        ("user", "Hi"), ("assistant", "Hello, you."), ("user", "How?"), ("assistant", "Fine"),
    ]  # fmt: skip
    assert conversation.messages[1]["reasoning_content"] == "hm\n\nwell"
    assert "reasoning_content" not in conversation.messages[3]
    assert terminal.text("dim italic") == "hm\n\nwell"
    assert terminal.text("plain") == "\n\nHello, you.\n\nFine\n"


def test_a_turn_reads_only_what_is_new(gguf, talk):
    model = Parrot(gguf, ["Hello", "Fine"])
    talk(model, ["Hi", "How?"])
    first, second = model.prompts
    answer = model.answers[0]
    assert second[: len(first)] == first
    read = [token for call in model.calls for token in call]
    assert read == [*first, *answer[:-1], *second[len(first) + len(answer) - 1 :], *model.answers[1][:-1]]


def test_a_turn_after_a_thought_reads_again_from_where_the_template_drops_it(gguf, talk):
    model = Parrot(gguf, ["<think>\nhm\n</think>\n\nHello", "Fine"])
    talk(model, ["Hi", "How?"])
    first, second = model.prompts
    begin = model.tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n")
    after_first = len(first) + len(model.answers[0]) - 1
    read = [token for call in model.calls for token in call]
    assert read[after_first:] == [*second[len(begin) :], *model.answers[1][:-1]]


def test_hidden_thoughts_leave_one_sign(gguf, talk):
    model = Parrot(gguf, ["<think>\nhm hm hm\n</think>\n\nHello"])
    terminal, _ = talk(model, ["Hi"], thoughts=False)
    assert terminal.text("plain") == "Hello\n"
    assert terminal.text("dim italic") == ""
    assert [text for kind, text in terminal.log if kind == "say" and text] == ["thinking ..."]


def test_commands(gguf, talk):
    model = Parrot(gguf, ["a", "b", "c", "d"])
    lines = ["one", "/think off", "two", "/reset", "/think auto", "three", "/system Be brief.", "four"]
    terminal, conversation = talk(model, [*lines, "/nonsense", "/think maybe", "/help", "/exit", "five"])
    prompts = [model.tokenizer.decode(prompt) for prompt in model.prompts]
    begin, answer = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [
        f"{begin}one{answer}",
        f"{begin}one{answer}a<|im_end|>\n{begin}two{answer}<think>\n\n</think>\n\n",
        f"{begin}three{answer}",
        f"<|im_start|>system\nBe brief.<|im_end|>\n{begin}four{answer}",
    ]
    heard = [text for kind, text in terminal.log if kind == "say" and text]
    assert heard[0] == "/nonsense : no such command; /help lists them"
    assert heard[1] == "/think maybe: no such command; /help lists them"
    assert heard[2] == command.HELP
    assert terminal.lines == ["five"]
    assert len(said(conversation)) == 3


def test_the_user_can_switch_thoughts_and_stats(gguf, talk, capsys):
    model = Parrot(gguf, ["<think>a</think>b", "<think>c</think>d", "<think>e</think>f"])
    terminal, _ = talk(model, ["1", "/thoughts hide", "/stats on", "2", "/thoughts show", "/stats off", "3"])
    assert terminal.text("dim italic") == "ae"
    assert re.findall(r"answer \d+ tokens", capsys.readouterr().err) == ["answer 4 tokens"]


def test_ctrl_c_stops_the_answer_and_not_the_program(gguf, talk):
    model = Parrot(gguf, ["abcdefgh " * 20, "Fine"])
    presses = iter([False, False, True])

    def press():
        if next(presses, False):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    terminal, conversation = talk(model, ["Hi", "How?"], at_write=press)
    assert signal.getsignal(signal.SIGINT) is before
    (_, hi), (_, partial), (_, how), (_, fine) = said(conversation)
    assert (hi, how, fine) == ("Hi", "How?", "Fine")
    assert 0 < len(partial) < 20
    assert partial in terminal.text("plain")
    assert model.tokenizer.decode(model.prompts[1]).startswith("<|im_start|>user\nHi<|im_end|>\n")


def test_a_second_ctrl_c_gives_the_turn_up(gguf, talk):
    model = Parrot(gguf, ["abcdefgh " * 20, "Fine"])
    presses = iter([2])

    def press():
        for _ in range(next(presses, 0)):
            signal.raise_signal(signal.SIGINT)

    terminal, conversation = talk(model, ["Hi", "How?"], at_write=press)
    assert ("say", "stopped") in terminal.log
    assert said(conversation) == [("user", "How?"), ("assistant", "Fine")]


def test_a_conversation_that_outgrows_the_context_can_begin_anew(gguf, talk):
    model = Parrot(gguf, ["a", "-", "b"], context_length=60)
    terminal, conversation = talk(model, ["Hi", "x y z " * 60, "/reset", "Hi"])
    complaints = [text for kind, text in terminal.log if kind == "say" and text]
    assert len(complaints) == 1
    assert re.fullmatch(r"prompt: \d+ tokens, expected fewer than the context of 60", complaints[0])
    assert said(conversation)[0] == ("user", "Hi")


def test_a_script_that_goes_wrong_ends_with_an_error(gguf, talk, monkeypatch):
    monkeypatch.setattr(Script, "interactive", False)
    with pytest.raises(BadInput, match="expected fewer than the context"):
        talk(Parrot(gguf, ["a"], context_length=60), ["x y z " * 60])


# --- The terminal, and the whole ----------------------------------------------------------------------------


def pipe(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def test_lines_are_read_to_their_end(monkeypatch):
    pipe(monkeypatch, b"one\ntwo \\\nthree\\\n\nfo\xffur")
    terminal = command.Terminal()
    assert not terminal.interactive
    assert [terminal.read() for _ in range(4)] == ["one", "two \nthree\n", "fo\udcffur", None]


def test_ctrl_c_at_the_prompt_is_an_empty_line(monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    pipe(monkeypatch, b"")
    monkeypatch.setattr("builtins.input", interrupted)
    assert command.Terminal().read() == ""


def test_what_is_written_where_nobody_looks_is_plain(monkeypatch, capsys):
    pipe(monkeypatch, b"")
    terminal = command.Terminal()
    terminal.say("to nobody", "bold")
    terminal.write("a [b]c[/b] :smile: \x1b " + "x" * 300, "dim italic")
    assert capsys.readouterr().out == "a [b]c[/b] :smile: \x1b " + "x" * 300


def test_a_conversation_from_a_file(monkeypatch, capsys):
    pipe(monkeypatch, b"Hi\n/think off\nHow?\n")
    path = str(models.path(models.SHAPES["untied"]))
    assert main(["chat", path, "-n", "3", "--temperature", "0", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    assert len(re.findall(r"answer \d tokens", err)) == 2
    assert "tokens reused" in err


def test_a_model_without_a_template_has_nothing_to_talk_by(monkeypatch, capsys, gguf):
    model = Fading(*weights(9), gguf=argparse.Namespace(metadata={}, path="x.gguf"))
    monkeypatch.setattr("scarlet_jax.tools.common.load_model", lambda args: model)
    assert main(["chat", "x.gguf"]) == 2
    assert capsys.readouterr().err == (
        "scarlet chat: x.gguf: no chat template (metadata key 'tokenizer.chat_template')\n"
    )
