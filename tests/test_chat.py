"""Chat templates against transformers' own rendering, their limits, and thought told from answer."""

from __future__ import annotations

import datetime
import random

import pytest
from support_vocabulary import metadata, write

from scarlet_jax.chat import chat_template, opens_thinking, render, split_thinking
from scarlet_jax.errors import BadInput
from scarlet_jax.gguf import read

MESSAGES = [
    {"role": "system", "content": "Be brief. <b>&amp;</b>"},
    {"role": "user", "content": "  Grüße, 世界! \n"},
    {"role": "assistant", "content": "Hi", "reasoning_content": "They greet."},
    {"role": "tool", "content": '{"a": 1}'},
    {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image"}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"ä": ["<", 1.5, None, True]}}}]

# What the templates in circulation do, a piece of it each.
TEMPLATES = {
    "blocks take white space along": """
        {%- for message in messages %}
            {%- if loop.first %}
                {{ bos_token }}
            {% endif %}
        {{ message.role }}
    {% endfor %}
    end
    """,
    "macros and namespaces": """
        {%- set count = namespace(images=0) %}
        {%- macro parts(content, number) %}
            {%- if content is string %}{{- content }}
            {%- elif content is iterable and content is not mapping %}
                {%- for item in content %}
                    {%- if item.type == 'image' %}
                        {%- set count.images = count.images + 1 %}{{- '[' ~ count.images ~ ']' }}
                    {%- else %}{{- item.text }}{%- endif %}
                {%- endfor %}
            {%- endif %}
        {%- endmacro %}
        {%- for message in messages %}{{- parts(message.content, true)|trim }};{%- endfor %}""",
    "looking back and ahead": """
        {%- for message in messages[::-1] -%}
            {{ loop.index0 }}{{ messages|length - 1 - loop.index0 }}
            {%- if loop.previtem is defined and loop.previtem.role != 'tool' %}p{% endif %}
            {%- if not loop.last and loop.nextitem.role == 'tool' %}n{% endif %}
        {%- endfor %}""",
    "tools": "{% for tool in tools or [] %}{{ tool | tojson }}\n{{ tool | tojson(indent=2) }}{% endfor %}",
    "json options": "{{ tools | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
    "no tools": "{% if tools %}T{% elif tools is none %}none{% endif %}",
    "strings": """
        {%- set text = '<think>a</think>\\n\\nb'.split('</think>') -%}
        {{ text[0].split('<think>')[-1].lstrip('\\n') }}|{{ text[-1].lstrip('\\n') }}|
        {{- 'abc'.startswith('a') and 'abc'.endswith('c') }}|{{ ' x ' | trim }}|{{ 'x' | upper }}""",
    "items of a mapping": "{% for k, v in messages[1]|items %}{{ k }}={{ v | string }};{% endfor %}",
    "loops that break": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if m.role == 'tool' %}{% break %}{% endif %}{% endfor %}",
    "what training marks": "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.role }}"
    "{% endgeneration %}{% endfor %}{{ x }}",
    "undefined is empty": "[{{ nothing }}]{{ messages[0].nothing }}{% if nothing is defined %}d{% endif %}",
    "thinking switched": "{% if enable_thinking is defined and enable_thinking is false %}no{% endif %}",
    "the generation prompt": "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "ranges": "{% for i in range(3) %}{{ i * 2 }}{{ '-' * i }}{{ 2 ** i }}{% endfor %}",
    "the date": "{{ strftime_now('%Y-%m-%d') }}",
    "HTML is left alone": "{{ messages[0].content }}{{ messages[0].content | tojson }}",
}
VARIABLES = [{}, {"tools": TOOLS, "enable_thinking": False}, {"add_generation_prompt": False}]


@pytest.mark.parametrize("variables", VARIABLES, ids=["bare", "tools", "no prompt"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(template, variables):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    variables = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>", **variables}
    [expected], _ = utils.render_jinja_template([MESSAGES], chat_template=template, **variables)
    assert render(template, MESSAGES, **variables) == expected


def test_the_date_is_todays():
    assert render("{{ strftime_now('%d %b %Y') }}", []) == datetime.datetime.now().strftime("%d %b %Y")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only\n user') }}", "chat template, line 1: Only user"),
        ("a\nb {% if %}", r"chat template, line 2: Expected an expression"),
        ("a\n{{ x.y.z }}", r"chat template, line 2: 'x' is undefined"),
        ("a\n\n{{ 1 / 0 }}", r"chat template, line 3: division by zero"),
        ("{{ messages | tojson }}{{ nothing | tojson }}", "chat template, line 1: .* not JSON serializable"),
        ("{{ messages[7].role }}", "chat template, line 1: list object has no element 7"),
        ("{{ messages.append(1) }}", "chat template, line 1: .* is not safely callable|access to attribute"),
        ("{{ ''.__class__.__mro__ }}", "chat template, line 1: access to attribute '__class__'"),
        ("{% include 'x' %}", "chat template, line 1: no loader"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "chat template, line 1: .*recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "loops for more than 1000000 steps"),
        (
            "{% for i in range(2000) %}{% for j in range(2000) %}{% endfor %}{% endfor %}",
            "loops for more than",
        ),
        ("{{ 'x' * 10**10 }}", "makes something longer than 16777216"),
        ("{{ [0] * 10**10 }}", "makes something longer than 16777216"),
        ("{{ 10**10 * 'x' }}", "makes something longer than 16777216"),
        ("{{ 9 ** (9 ** 9) }}", "makes something longer than 16777216"),
        ("{% for i in range(1000000) %}{{ 'x' * 100 }}{% endfor %}", "makes something longer than 16777216"),
    ],
)
def test_a_template_that_fails_or_runs_wild_is_refused_in_one_line(template, message):
    with pytest.raises(BadInput, match=message) as error:
        render(template, [{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


def test_the_loop_budget_is_each_renderings_own():
    template = "{% for i in range(900000) %}{% endfor %}done"
    assert [render(template, []) for _ in range(2)] == ["done", "done"]


def test_templates_come_from_the_file_by_name(tmp_path):
    path = write(
        tmp_path / "m.gguf", metadata(), {"tokenizer.chat_template": "A", "tokenizer.chat_template.rag": "B"}
    )
    file = read(path)
    assert (chat_template(file), chat_template(file, "rag")) == ("A", "B")
    with pytest.raises(
        BadInput, match=r"m.gguf: no chat template \(metadata key 'tokenizer.chat_template.x'\)"
    ):
        chat_template(file, "x")


# --- Thinking -----------------------------------------------------------------------------------------------


def split(texts, inside=False):
    parts = list(split_thinking(texts, inside))
    assert all(text for _, text in parts)
    kinds = [kind for kind, _ in parts]
    assert kinds == sorted(kinds, reverse=True)  # thought, then answer
    return tuple("".join(text for kind, text in parts if kind == wanted) for wanted in ("thought", "answer"))


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("plain", False, ("", "plain")),
        ("\n plain\n", False, ("", "\n plain\n")),
        ("<think>\nWell.\n\nSo.\n</think>\n\nYes.\n", False, ("Well.\n\nSo.", "Yes.\n")),
        ("\n\n<think>Well.</think>Yes.", False, ("Well.", "Yes.")),
        ("Well.\n</think>\n\nYes.", True, ("Well.", "Yes.")),
        ("\nWell.", True, ("Well.", "")),
        ("\n</think>\n\nYes.", True, ("", "Yes.")),
        ("Well </thi nk> </think", True, ("Well </thi nk> </think", "")),
        ("<think>", False, ("", "")),
        ("<thin", False, ("", "<thin")),
        ("<b>Yes</b>", False, ("", "<b>Yes</b>")),
        ("Write <think>x</think> so.", False, ("", "Write <think>x</think> so.")),
        ("<think>a</think>b<think>c</think>d", False, ("a", "b<think>c</think>d")),
        ("a <think> b</think>c", True, ("a <think> b", "c")),
        ("", False, ("", "")),
        ("", True, ("", "")),
    ],
)
def test_thought_is_told_from_answer_however_the_text_is_cut(text, inside, expected):
    assert split([text], inside) == expected
    assert split(list(text), inside) == expected
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert split(pieces, inside) == expected


def test_parts_come_as_soon_as_they_are_certain():
    asked = []

    def texts():
        for text in ["<th", "ink>", "a", "b</", "x", "c</think>d", "e"]:
            asked.append(text)
            yield text

    seen = [(part, asked[-1]) for part in split_thinking(texts())]
    assert seen == [
        (("thought", "a"), "a"),
        (("thought", "b"), "b</"),
        (("thought", "</x"), "x"),
        (("thought", "c"), "c</think>d"),
        (("answer", "d"), "c</think>d"),
        (("answer", "e"), "e"),
    ]


def test_a_prompt_may_open_the_thought():
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thinking("<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n")
