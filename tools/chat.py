"""Talks with a model by its own chat template.

Thoughts are shown dimmed. Ctrl-C stops an answer, not the program; /help lists what else there is to say.
Each turn goes on from the states of the turns before, so that only what is new has to be read.

example: scarlet chat model.gguf
         scarlet chat owner/repo:Q4_K_M --think off --system "Answer in one sentence."
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from scarlet_jax import chat
from scarlet_jax.errors import BadInput
from scarlet_jax.generate import StateCache, Stats, generate, stream_text
from scarlet_jax.model import Model
from scarlet_jax.tools import common

HELP = """\
/reset           begin anew
/system TEXT     begin anew with this instruction; without TEXT, with none
/think on        think before answering; or off; or auto: as the template has it
/thoughts hide   keep thoughts from the screen; or show
/stats on        times and speeds after each answer; or off
/exit            leave; so does Ctrl-D
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""

PROMPT = "\001\033[1;35m\002»\001\033[0m\002 "  # 1 and 2 enclose what takes no room, for readline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    common.add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", default="", help="an instruction for the conversation")
    common.add_think_argument(parser)
    parser.add_argument("--thoughts", choices=("show", "hide"), default="show", help="on the screen (show)")
    common.add_limit_argument(parser, default=-1)
    parser.add_argument("--stats", action="store_true", help="print times and speeds after each answer")
    common.add_sampling_arguments(parser, temperature=0.7, top_k=20, top_p=0.95)  # Qwen's recommendation


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    options = {"max_tokens": common.token_limit(args.n), **common.sampling_options(args)}
    model = common.load_model(args)
    chat.chat_template(model.gguf)  # without one there is nothing to talk by
    terminal = Terminal()
    terminal.say(f"{model.config.name or args.model} · context {model.context_length:,} · /help", "bold")
    settings = Settings(args.system, args.think, args.thoughts == "show", args.stats)
    Talk(model, settings, options, terminal).run()


class Terminal:
    """Lines from the user, and styled text to them; plain where either end is no terminal."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._console = Console(highlight=False, soft_wrap=True)
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[attr-defined]
        if self.interactive:
            with contextlib.suppress(ImportError):  # not on Windows
                importlib.import_module("readline")  # gives `input` line editing and a history

    def read(self) -> str | None:
        """What the user says; None when they have left."""
        lines = []
        try:
            while not lines or lines[-1].endswith("\\"):
                lines.append(input(PROMPT if self.interactive else ""))
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.say("\n/exit or Ctrl-D to leave", "dim")
            return ""
        return "\n".join([*(line.removesuffix("\\") for line in lines[:-1]), lines[-1]])

    def say(self, text: str, style: str) -> None:
        """A line of our own, where somebody is looking."""
        if self.interactive:
            self._console.print(Text(text, style))

    def write(self, text: str, style: str = "") -> None:
        """Text of the model's, as it comes."""
        shown = common.visible(text) if self._console.is_terminal else text
        self._console.print(Text(shown, style), end="")


@dataclasses.dataclass
class Settings:
    """What the user can change as they go."""

    system: str
    think: str
    thoughts: bool
    stats: bool


class Talk:
    """A conversation: what was said, and the states after it. `options` are those of `generate`."""

    def __init__(self, model: Model, settings: Settings, options: dict[str, Any], terminal: Terminal) -> None:
        self.model, self.settings, self.options, self.terminal = model, settings, options, terminal
        self.cache = StateCache()
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Turn by turn, until the user leaves."""
        while (text := self.terminal.read()) is not None:
            if text.strip() in ("/exit", "/quit"):
                return
            if text.startswith("/"):
                self._command(*text.strip().partition(" ")[::2])
            elif text.strip():
                self._turn(text)

    def _command(self, name: str, value: str) -> None:
        match name, value.strip():
            case "/reset", "":
                self.reset()
            case "/system", text:
                self.settings.system = text
                self.reset()
            case "/think", "on" | "off" | "auto" as think:
                self.settings.think = think
            case "/thoughts", "show" | "hide" as thoughts:
                self.settings.thoughts = thoughts == "show"
            case "/stats", "on" | "off" as stats:
                self.settings.stats = stats == "on"
            case "/help", "":
                self.terminal.say(HELP, "dim")
            case _:
                self.terminal.say(f"{name} {value}: no such command; /help lists them", "red")

    def _turn(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        stats = Stats()
        try:
            self.messages = [*messages, self._answer(messages, stats)]
        except KeyboardInterrupt:  # a second one: the model is not coming to an end
            self.terminal.say("stopped", "dim")
        except BadInput as error:
            if not self.terminal.interactive:
                raise
            self.terminal.say(str(error), "red")
        if self.settings.stats:
            common.print_stats(self.model, stats)
        self.terminal.say("", "")

    def _answer(self, messages: list[dict[str, str]], stats: Stats) -> dict[str, str]:
        """Show the answer as it comes; the message that it is."""
        think = common.think_option(self.settings.think)
        text = chat.prompt(self.model, messages, **think)
        prompt = self.model.tokenizer.encode(text)
        said = chat.prompt(self.model, messages, add_generation_prompt=False, **think)
        steady = _agreeing(prompt, self.model.tokenizer.encode(said))
        ids = generate(self.model, prompt, cache=self.cache, steady=steady, stats=stats, **self.options)
        parts = {"thought": "", "answer": ""}
        with _interruptible() as stopped, contextlib.closing(ids):
            wanted = itertools.takewhile(lambda _: not stopped.is_set(), ids)
            texts = stream_text(self.model.tokenizer, wanted)
            texts = common.awaited(texts, f"reading {len(prompt) - self.cache.find(prompt)[0]} tokens")
            for kind, part in chat.split_thinking(texts, chat.opens_thinking(text)):
                self._show(kind, part, parts)
                parts[kind] += part
        self.terminal.write("\n")
        reasoning = {"reasoning_content": parts["thought"]} if parts["thought"] else {}
        return {"role": "assistant", "content": parts["answer"].strip(), **reasoning}

    def _show(self, kind: str, part: str, before: dict[str, str]) -> None:
        if kind == "answer":
            after_thought = before["thought"] and not before["answer"] and self.settings.thoughts
            self.terminal.write("\n\n" + part if after_thought else part)
        elif self.settings.thoughts:
            self.terminal.write(part, "dim italic")
        elif not before["thought"]:
            self.terminal.say("thinking ...", "dim")


def _agreeing(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, and the model stops after a whole token; a second one interrupts for good."""
    stopped = threading.Event()

    def handle(signum: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
