"""What hostile files hold, by name: pickle opcodes, JSON, config values, chat templates, recipes, OpenTAD configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PRIME = (1 << 61) - 1  # whole numbers hash modulo this


def _long(number: int) -> bytes:
    data = number.to_bytes((number.bit_length() + 8) // 8, "little")
    return b"\x8a" + bytes([len(data)]) + data


PICKLES: dict[str, Callable[[], bytes]] = {
    "tuple as a key": lambda: b"}q\x00(" + b"K\x01" * 50_000 + b"tq\x010h\x00(" + b"h\x01N" * 11_000 + b"u",
    "nested tuple as a key": lambda: b"}(N" + b"\x85" * 100_000 + b"Nu",
    "numbers of one hash": lambda: b"}(" + b"".join(_long(_PRIME * (i + 1)) + b"N" for i in range(70_000)) + b"u",
    "sets": lambda: b"\x8f" * 3_000_000,
    "dicts": lambda: b"}" * 1_000_000,
    "a list of dicts": lambda: b"](" + b"}" * 900_000 + b"e",
    "a dict of dicts": lambda: b"}(" + b"".join(b"X\x06\x00\x00\x00%06d}" % i for i in range(80_000)) + b"u",
    "calls": lambda: b"ccollections\nOrderedDict\nq\x00)q\x01" + b"h\x00h\x01R" * 190_000,
    "deep lists": lambda: b"]" * 400_000 + b"a" * 399_999,
    "deep tuples": lambda: b"N" + b"\x85" * 900_000,
    "doubling": lambda: b"]q\x000" + b"".join(b"h%c]h%cah%caq%c0" % (i, i, i, i + 1) for i in range(60)) + b"h\x3c",
    "memo": lambda: b"N" + b"\x94" * 900_000,
    "one long number": lambda: b"\x8b" + (900_000).to_bytes(4, "little") + b"\xff" * 900_000,
    "digits": lambda: b"L" + b"9" * 900_000 + b"L\n",
    "globals": lambda: b"".join(b"c%d\na\n" % i for i in range(90_000)),
    "persistent ids": lambda: b"N" + b"Q" * 900_000,
}

JSON_TEXTS: dict[str, str | bytes | int] = {
    "deep": "[" * 200_000,
    "list": "[]",
    "empty": "",
    "number": "7",
    "text": '"\u202e\x1b[2J"',
    "long number": '{"schema": ' + "9" * 5000 + "}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "brackets": "[" + "[],{}," * 150_000 + "[]]",
    "one name twice": '{"a": 1, "a": 2}',
    "infinity": '{"a": 1e999, "b": NaN}',
    "sparse": 6 << 30,
    "null": "null",
    "surrogates": '{"model_type": "\\ud800", "peft_type": "\\ud800", "weight_map": {"\\ud800": "\\ud800"}}',
    "outside": '{"weight_map": {"a": "../../etc/passwd"}, "auto_map": {"AutoConfig": "x--y.Z"}, "files": {"/x": {}}}',
}

CONFIG_VALUES: list[Any] = [
    None, -1, 0, 10**9, 10**30, 1.5, 1e308, True, "x", "", "9" * 5000, [], [10**9], {}, {"rope_type": ["x"]},
    {"a": {"b": {}}}, "\x1b[2J", [[]], {"factor": 0}, {"quant_method": "bitsandbytes", "load_in_4bit": "x"},
]  # fmt: skip

_GROW = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"
_LONG = "{% set a = 'a' * 1000000 %}"


def _grown(start: str, step: str) -> str:
    return _GROW.replace("START", start).replace("STEP", step)


TEMPLATES = {
    "a text times a number": "{{ 'a' * (10 ** 11) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "printing": "{% for a in range(99999) %}{% for b in range(9999) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
    "doubled text": _grown("'a'", "ns.s + ns.s"),
    "joined text": _grown("'a'", "ns.s ~ ns.s"),
    "nested lists": _grown("[1]", "[ns.s, ns.s]"),
    "nested dicts": _grown("{}", "{'a': ns.s, 'b': ns.s}"),
    "squares": _grown("3", "ns.s * ns.s"),
    "a power": "{{ 10 ** 100000 ** 10 }}",
    "center": "{{ 'a'.center(10 ** 10) }}",
    "center, filter": "{{ 'a' | center(10 ** 10) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width, format": "{{ '{:>10000000000}'.format(1) }}",
    "width of a width": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "width, filter": "{{ '%1000000000d' | format(1) }}",
    "replace": _LONG + "{{ a.replace('a', a) }}",
    "replace, filter": _LONG + "{{ a | replace('a', a) }}",
    "join": _LONG + "{{ a.join(range(9999) | map('string') | list) }}",
    "join, filter": _LONG + "{{ range(9999) | join(a) }}",
    "translate": _LONG + "{{ a.translate({97: a}) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "slices": _LONG
    + "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [a[1:]] %}{% endfor %}",
    "sum of lists": "{{ ([[1]] * 200000) | sum(start=[]) | length }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "indent": "{{ messages | tojson(indent=10 ** 10) }}",
    "lorem ipsum": "{{ lipsum(10 ** 9) }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "deep": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "many loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "not a template": "{{ x.",
    "no such filter": "{{ 1 | nosuch }}",
    "division": "{{ 1 / 0 }}",
    "attributes": "{{ messages.x.y.z }}",
    "code": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "code, cycler": "{{ cycler.__init__.__globals__.os.system('touch executed') }}",
    "control codes": "{{ raise_exception('\x1b[2J\u202e') }}",
}

_MERGES = "a0: &a0 {k0: v}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}], k{i}: v}}\n" for i in range(1, 9)
)
_ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
RECIPES: dict[str, Callable[[], str | bytes]] = {
    "merges": lambda: _MERGES + "model: base\ndata:\n  files: [t.jsonl]\n",
    "aliases": lambda: _ALIASES + "model: *a9\n",
    "itself": lambda: "model: &a [*a]\n",
    "deep": lambda: "model: " + "[" * 5000,
    "chain": lambda: "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
    "base sixty": lambda: "model: " + ":".join(["1"] * 100_000),
    "digits": lambda: "model: " + "9" * 200_000,
    "code": lambda: "model: !!python/object/apply:os.system ['touch executed']\n",
    "odd tags": lambda: "model: !!bool x\n",
    "odd date": lambda: "model: 2000-99-99\n",
    "list as a key": lambda: "? [1, 2]\n: 3\n",
    "not UTF-8": lambda: b"model: \xff\xfe\n",
    "nul": lambda: "model: a\x00b\n",
    "control codes": lambda: 'model: "\\e[2J\\u202e"\n"\\e[2J": 1\n',
    "large": lambda: "data:\n  files:\n" + "".join(f"  - file{i}.jsonl\n" for i in range(50_000)),
    "wrong types": lambda: "model: [1]\ndata: x\ntraining: 7\n",
    "wrong numbers": lambda: "model: base\ndata: {files: [t], length: -1}\ntraining: {updates: .nan, batch: 1e999}\n",
    "config": lambda: (
        "config: {model_type: llama, num_hidden_layers: 1000000000}\ndata: {files: [t]}\ntraining: {updates: 1}\n"
    ),
}

OPENTAD = {
    "code": "__import__('os').system('touch executed')\nopen('executed', 'w')\nmodel = dict(type='x')\n",
    "code in a value": "model = dict(type=__import__('os').system('touch executed'))\n",
    "power": "a = 10 ** 10 ** 10\n",
    "times": "a = [0] * 10 ** 11\nb = 'x' * 10 ** 11\n",
    "range": "a = list(range(10 ** 11))\n",
    "doubling": "a = [0]\n" + "a = a + a\n" * 60,
    "doubled dicts": "a = dict(x=1)\n" + "a = dict(x=a, y=a)\n" * 60,
    "deep": "a = " + "[" * 5000 + "]" * 5000 + "\n",
    "format": "a = f'{1:10000000000}'\n",
    "base is itself": "_base_ = 'config.py'\n",
    "base outside": "_base_ = ['../../../../etc/passwd']\n",
    "nul": "a = 1\x00\n",
    "control codes": "model = dict(type='\\x1b[2J\\u202e')\n",
    "not Python": "model = {\n",
    "long line": "a = " + "+".join(["1"] * 200_000) + "\n",
}
