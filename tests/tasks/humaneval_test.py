"""HumanEval: prompts, programs taken from responses, and verdicts.

Truth: invented records by hand; the benchmark's own reference solutions, and mutations of them
against their tests in plain Python.
"""

import concurrent.futures
import gzip
import json

import pytest
from mutants import mutants, plain_verdict

from llada_jax.tasks import humaneval, sandbox
from llada_jax.tasks.programs import code_of, complete
from llada_jax.tasks.sandbox import choice

RECORD = {
    "task_id": "Invented/0",
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef root(x):\n    """ The root '
    'of half of x.\n    >>> root(8)\n    2.0\n    """\n',
    "entry_point": "root",
    "test": "def check(candidate):\n    assert candidate(8) == 2.0\n    assert half(4) == 2\n"
    "    assert candidate(-2) is None\n",
}
BODY = "    if x < 0:\n        return None\n    return math.sqrt(half(x))\n"
WHOLE = "def root(x):\n" + BODY
LOST = "if x < 0:\n    return None\nreturn math.sqrt(half(x))\n"
RIGHT = {
    "body": BODY,
    "body, then prose": BODY + "\nThis function takes the root.",
    "body, then another function": BODY + "\n\ndef other():\n    return 1\n",
    "body, then half a function": BODY + "\n\ndef other(x, y):\n    return (x +",
    "body, then a fence": BODY + "```\nIt works: see `half`.",
    "body in a fence": f"```python\n{BODY}```",
    "first line lost its indentation": BODY.strip(),
    "all lost its indentation": LOST,
    "all lost its indentation, in a fence": f"The body:\n```\n{LOST}```",
    "one line": "return None if x < 0 else math.sqrt(half(x))",
    "one loop, unindented": "while True:\n    return None if x < 0 else math.sqrt(half(x))",
    "a list over lines, unindented": "y = [\n    x,\n]\nreturn None if x < 0 else "
    "math.sqrt(half(*y))",
    "whole function": WHOLE,
    "whole prompt again": RECORD["prompt"] + BODY,
    "prose around a whole function": f"Sure! This is it:\n\n{WHOLE}\nI hope this helps.",
    "fence": f"Here it is:\n\n```python\n{WHOLE}```\n\nDone.",
    "fence without a language": f"```\n{WHOLE}\n```",
    "fence of another name": f"```Python3\n{WHOLE}\n```",
    "fence that is not closed": f"Here:\n```python\n{WHOLE}",
    "fence in a list": "1. So:\n   ```python\n"
    + "".join(f"   {line}\n" for line in WHOLE.splitlines())
    + "   ```\n",
    "several fences": f"Install:\n```bash\npip install x\n```\nCode:\n```python\n{WHOLE}```\n"
    "Use:\n```python\nprint(root(8))\n```",
    "helper first": f"```python\ndef other():\n    pass\n```\n```python\n{WHOLE}```",
    "windows": WHOLE.replace("\n", "\r\n"),
    "tabs": WHOLE.replace("    ", "\t"),
    "indented whole function": "  " + WHOLE.replace("\n", "\n  "),
    "example in the docstring": WHOLE.replace("x):\n", 'x):\n    """\n    ```\n    y\n    ```\n'
    '    """\n', 1),
    "begin and done": f"[BEGIN]\n{WHOLE}[DONE]\nMore text. [BEGIN]",
    "typed": "import typing as t\n" + WHOLE.replace("(x):", "(x: float) -> t.Optional[float]:"),
    "guarded main": WHOLE + "\nif __name__ == '__main__':\n    raise ValueError\n",
    "prints": WHOLE + "\nprint(root(8))\n",
}  # fmt: skip
WRONG = {
    "nothing": "",
    "prose": "I cannot do this.",
    "wrong value": WHOLE.replace("math.sqrt", "abs"),
    "no function": "x = 1",
    "another name": WHOLE.replace("root", "route"),
    "helper lost": "def half(x):\n    return x\n\n" + WHOLE,
    "syntax": "def root(x:\n    return 1",
    "endless": "    while True: pass",
    "early end": "    import os; os._exit(0)",
    "early end, politely": "    raise SystemExit(0)",
    "at the start": "import os; os._exit(0)\n" + WHOLE,
    "in the shape of the tests": BODY + "\ncheck = lambda f: None\nimport sys; sys.exit(0)",
    "null": WHOLE.replace("return", "ret\0urn", 1),
    "surrogate": "\udcff" + WHOLE,
    "an open text that would swallow the tests": "    return 1\nx = '''",
}


@pytest.fixture(autouse=True)
def _protected():
    if sandbox.protection() == "none":
        pytest.skip(choice._reasons())


@pytest.mark.parametrize("form", RIGHT)
def test_right(form):
    assert humaneval.score(RECORD, RIGHT[form]) == 1.0


@pytest.mark.parametrize("form", WRONG)
def test_wrong(form, monkeypatch):
    if form == "endless":
        monkeypatch.setattr(humaneval, "TIMEOUT", 0.5)
    assert humaneval.score(RECORD, WRONG[form]) == 0.0


def test_programs_by_hand():
    prompt = "import re\ndef f(x):\n"
    assert complete(prompt, "    return x", "f") == "import re\ndef f(x):\n    return x"
    assert complete(prompt, "def f(y):\n    return y", "f") == "import re\ndef f(y):\n    return y"
    assert complete(prompt, "  if x:\n    y()\n", "f") == prompt + "  if x:\n    y()"
    assert complete(prompt, "if x:\n    y()\n  z()", "f") == prompt + "  if x:\n    y()\n  z()"
    assert code_of("a\n```\nb\n```\nc\n```\ndef g(): 1\n```", ["f"]) == "def g(): 1\n"
    assert code_of("Text\n```\nx = 1\n```", ["f"]) == "x = 1\n"


def test_prompt():
    text = "Complete the following python code:\n" + RECORD["prompt"]
    assert humaneval.TASK.prompt(RECORD, (), "chat") == [{"role": "user", "content": text}]
    assert humaneval.TASK.prompt(RECORD, (), "plain") == RECORD["prompt"]


def test_settings_are_the_published_ones():
    """Truth: the authors' configuration files and tables."""
    found = {
        name: (dict(s.sampler), s.template, s.shots, dict(s.published))
        for name, s in humaneval.TASK.settings.items()
    }
    assert found == {
        "llada15": (
            {"gen_length": 512, "block_length": 32, "confidence_eos_eot_inf": True},
            *("chat", 0, {"LLaDA 1.5": 52.4}),
        ),
        "instruct": (
            {"gen_length": 512, "block_length": 512, "logits_eos_inf": True},
            *("chat", 0, {"LLaDA 8B Instruct": 49.4}),
        ),
        "base": (
            {"gen_length": 1024, "block_length": 1024},
            *("plain", 0, {"LLaDA 8B Base": 35.4}),
        ),
    }
    assert humaneval.TASK.settings["base"].stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def test_nothing_runs_without_protection(monkeypatch):
    monkeypatch.setattr(choice, "PROTECTIONS", ())
    with pytest.raises(ValueError, match=r"^line 3: .*without protection"):
        humaneval.TASK.judge("line 3", RECORD, BODY)
    assert humaneval.TASK.judge("line 3", RECORD, BODY, unsafe=True) == {"score": 1.0}


@pytest.fixture
def records(shared):
    with gzip.open(shared / "data" / "benchmarks" / "humaneval.jsonl.gz") as f:
        return [json.loads(line) for line in f]


def score_all(score, cases):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda case: score(*case), cases))


def forms(record):
    body = record["canonical_solution"]
    whole = record["prompt"] + body
    return {
        "body": body,
        "body, first line stripped": body.strip(),
        "body in a fence": f"```python\n{body}```\n",
        "body, then prose": body + "\n\nThis solves it.",
        "whole": whole,
        "whole in a fence, prose around": f"Sure:\n```python\n{whole}\n```\nIt prints\n```\n1\n```",
    }


@pytest.mark.slow
def test_reference_solutions_pass_in_every_form(records):
    assert len(records) == 164
    cases = [(r, form, text) for r in records for form, text in forms(r).items()]
    scores = score_all(lambda r, form, text: humaneval.score(r, text), cases)
    failed = [
        (r["task_id"], form) for (r, form, _), s in zip(cases, scores, strict=True) if s != 1.0
    ]
    assert not failed


@pytest.mark.slow
def test_mutations_are_judged_as_plain_python_judges_them(records, monkeypatch):
    seconds = 4.0
    monkeypatch.setattr(humaneval, "TIMEOUT", seconds)
    cases = [
        (r, text)
        for r in records
        for _, text in mutants(r["prompt"] + r["canonical_solution"], r["entry_point"])
    ]

    def judge(record, text):
        tests = f"\n{record['test']}\ncheck({record['entry_point']})\n"
        ours = humaneval.score(record, f"Here:\n```python\n{text}\n```\n")
        return record["task_id"], ours, float(plain_verdict(text + tests, seconds))

    verdicts = score_all(judge, cases)
    assert not [v for v in verdicts if v[1] != v[2]]
    wrong = sum(ours == 0.0 for _, ours, _ in verdicts)
    print(f"{len(verdicts)} mutations, {wrong} wrong by their tests")
    assert wrong >= 300
