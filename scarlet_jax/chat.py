"""Conversations: messages to a prompt by the model's own chat template, and thought told from answer.

Templates are written for transformers' environment, so they get its extras: `raise_exception`,
`strftime_now`, a `tojson` that leaves non-ASCII and HTML alone, `break` and `continue`, `{% generation %}`,
and blocks that take the white space around them along. They come with a file that somebody else made, so
they run in Jinja's sandbox, with an end to how far they can loop and how much they can write.
"""

from __future__ import annotations

import datetime
import itertools
import json
import traceback
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jinja2
from gguf.constants import Keys
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import Gguf
from scarlet_jax.tokenizer import held_back

if TYPE_CHECKING:
    from scarlet_jax.model import Model

Message = Mapping[str, Any]  # `role`, `content`, and perhaps `reasoning_content`, `tool_calls` ...

_LOOP_STEPS = 1_000_000  # of all ranges in one rendering
_LENGTH = 1 << 24  # characters, of the prompt and of anything multiplied


def has_template(gguf: Gguf) -> bool:
    """Whether the file has a chat template."""
    return Keys.Tokenizer.CHAT_TEMPLATE in gguf.metadata


def chat_template(gguf: Gguf, name: str = "default") -> str:
    """The file's chat template, or the one it has under a name; BadInput if there is none."""
    key = Keys.Tokenizer.CHAT_TEMPLATE
    if name != "default":
        key = Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)
    if key not in gguf.metadata:
        raise BadInput(f"{gguf.path}: no chat template (metadata key {key!r})")
    return gguf.metadata.string(key)


def prompt(model: Model, messages: Sequence[Message], **variables: Any) -> str:
    """The prompt for a conversation with a model, by the template in its file: see `render`."""
    tokenizer = model.tokenizer
    for name, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        variables.setdefault(name, "" if id is None else tokenizer.tokens[id])
    return render(chat_template(model.gguf), messages, **variables)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    `variables` are whatever else the template knows, such as `enable_thinking`, `bos_token` or `documents`.
    Raises BadInput, in one line with the template's own line where there is one, for a template that cannot
    be read, refuses the messages, fails, or does not come to an end.
    """
    variables |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    try:
        return _Sandbox().rendered(template, variables)
    except jinja2.TemplateSyntaxError as error:
        raise BadInput(f"chat template, line {error.lineno}: {_one_line(error)}") from error
    except Exception as error:  # a template can raise anything that Python can
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f", line {f.lineno}" for f in reversed(frames) if f.filename == "<template>"), "")
        raise BadInput(f"chat template{line}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationExtension]
        )
        self._steps_left = _LOOP_STEPS
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now, "range": self._range}

    def rendered(self, template: str, variables: Mapping[str, Any]) -> str:
        parts, length = [], 0
        for part in self.from_string(template).generate(variables):
            length += len(part)
            _check_length(length)
            parts.append(part)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Repetition and power, unless what they make is enormous."""
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(count, int) and operator == "*":
                _check_length(len(value) * count)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_length(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        result = range(*bounds)
        self._steps_left -= len(result)
        if self._steps_left < 0:
            raise OverflowError(f"loops for more than {_LOOP_STEPS} steps")
        return result


def _check_length(length: int) -> None:
    if length > _LENGTH:
        raise OverflowError(f"makes something longer than {_LENGTH}")


class _GenerationExtension(Extension):
    """`{% generation %}` marks the assistant's part, for training; here it only groups."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


# --- Thinking -----------------------------------------------------------------------------------------------

OPENING, CLOSING = "<think>", "</think>"

Part = tuple[Literal["thought", "answer"], str]


def opens_thinking(prompt: str) -> bool:
    """Whether the answer to this prompt begins within a thought: templates may write `<think>` themselves."""
    return prompt.rstrip().endswith(OPENING)


def split_thinking(texts: Iterable[str], inside: bool = False) -> Iterator[Part]:
    """Tell thought from answer in text that streams in; `inside`: the prompt has opened a thought already.

    A thought can only come first: a `<think>` in the midst of an answer is part of it. The line ends between
    a thought and its tags, and between it and the answer, belong to neither.
    """
    texts = iter(texts)
    text = ""
    if not inside:
        while OPENING.startswith(text.lstrip()) and (following := next(texts, None)) is not None:
            text += following
        if inside := text.lstrip().startswith(OPENING):
            text = text.lstrip().removeprefix(OPENING)
    if inside:
        text = yield from _thought(text, texts)
        text = _past_line_ends(text, texts)
    for part in itertools.chain([text], texts):
        if part:
            yield "answer", part


def _thought(text: str, more: Iterator[str]) -> Generator[Part, None, str]:
    """The thought that begins with `text`, as it comes; returns what follows its end."""
    text = _past_line_ends(text, more)
    while CLOSING not in text:
        certain = len(text[: len(text) - held_back(text, [CLOSING])].rstrip("\n"))
        if certain:
            yield "thought", text[:certain]
        text = text[certain:]
        following = next(more, None)
        if following is None:
            if text:
                yield "thought", text
            return ""
        text += following
    thought, _, rest = text.partition(CLOSING)
    if thought.rstrip("\n"):
        yield "thought", thought.rstrip("\n")
    return rest


def _past_line_ends(text: str, more: Iterator[str]) -> str:
    """`text` without the line ends it begins with, after as much more as it takes to know."""
    while not text.strip("\n") and (following := next(more, None)) is not None:
        text += following
    return text.lstrip("\n")
