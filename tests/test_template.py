"""Chat templates within bounds: transformers' text for honest ones, one error for those that take time or memory."""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import pytest

from tensorkeep.language.data.chat import Chat
from tensorkeep.language.data.conversations import Conversation
from tensorkeep.language.data.template import Meter, TooMuch, bounded_templates
from tests.counting import calls_at_most
from tests.helpers import refused
from tests.hostile_texts import TEMPLATES
from tests.language_files import CHATML, CONVERSATIONS, TAGGED, THINKING, tokenizer

_HONEST = (
    CHATML,
    THINKING,
    TAGGED,
    "{%- for m in messages %}\n    {{- '%-8s' % m.role + ': ' ~ m['content'][:20] | trim }}\n{% endfor %}  \n",
    "{% macro one(m, n=2) %}{{ (m.role | upper) * n }}{{ m.content.split(' ')[0].replace('W', 'w') }}{% endmacro %}"
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ one(m) }}"
    "{{ [1, 2] | tojson(indent=1) }}{{ dict(a=1).items() | list }}{% if loop.last %}!{% endif %}{% endfor %}",
    "\n{% set ns = namespace(found=[]) %}{% for m in messages | selectattr('role', 'equalto', 'user') %}"
    "{% set ns.found = ns.found + [m.content] %}{% endfor %}{{ ns.found | join('|') }}{{ '{:>4}'.format(2 ** 3) }}\n",
    "{% for a, b in [(1, 2), (3, 4)] recursive %}{{ a + b }}{% if a == 3 %}{{ loop([(5, 6)]) }}{% endif %}{% endfor %}",
)


def _rendered(template: str, messages: Any = None) -> str:
    with bounded_templates():
        text: str = tokenizer(template).apply_chat_template(messages or CONVERSATIONS[1], tokenize=False)
    return text


@pytest.mark.parametrize("template", _HONEST)
def test_an_honest_template_renders_as_transformers_renders_it(template: str) -> None:
    for messages in CONVERSATIONS:
        assert _rendered(template, messages) == tokenizer(template).apply_chat_template(messages, tokenize=False)


def test_transformers_is_itself_again_afterwards() -> None:
    from transformers.utils import chat_template_utils

    before = chat_template_utils._compile_jinja_template
    with pytest.raises(TooMuch):
        _rendered(TEMPLATES["loops"])
    assert chat_template_utils._compile_jinja_template is before
    assert tokenizer("{{ 'a' * 10 }}").apply_chat_template(CONVERSATIONS[0], tokenize=False) == "a" * 10


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "a power"])
def test_a_template_that_does_too_much_or_fails_is_one_error(name: str) -> None:
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own: torch.compile raises it for the whole process
    tracemalloc.start()
    try:
        with refused(None, "the chat template refuses it"):
            Chat(tokenizer(TEMPLATES[name])).render(Conversation(CONVERSATIONS[0]))
        assert tracemalloc.get_traced_memory()[1] < 400_000_000
    finally:
        tracemalloc.stop()
        sys.setrecursionlimit(depth)


def test_steps_are_counted_and_the_clock_is_looked_at() -> None:
    meter = Meter(steps=10)
    with pytest.raises(TooMuch, match="steps"):
        for _ in range(11):
            meter.step()
    now = iter(range(1000))
    late = Meter(clock=lambda: float(next(now)))
    with pytest.raises(TooMuch, match="seconds"):
        for _ in range(64 * 10):
            late.step()


def test_one_list_in_another_counts_as_written_out() -> None:
    meter, value = Meter(), [1]
    with calls_at_most(10_000), pytest.raises(TooMuch, match="letters"):
        for _ in range(60):
            value = meter.weigh([value, value])
