"""MATH: the last box of a response, known right and wrong answers, and answers without end."""

import concurrent.futures
import os
import sys
import time

import pytest

from llada_jax.tasks import competition_math
from llada_jax.tasks.competition_math import TASK, last_boxed, score

pytest.importorskip("math_verify")

# The reference answer, then answers that equal it.
RIGHT = {
    r"\frac{1}{2}": [
        r"\frac{1}{2}",
        r"\dfrac{1}{2}",
        r"\frac12",
        "1/2",
        "0.5",
        ".5",
        r"\tfrac{3}{6}",
    ],
    r"-\frac{3}{4}": [r"\frac{-3}{4}", "-3/4", "-0.75", r"-\dfrac34"],
    r"1\frac{1}{2}": [r"\frac32", "1.5"],
    "5": [
        "5",
        "5.",
        " 5 ",
        "5.0",
        "x=5",
        "x = 5",
        r"\text{5}",
        r"\mathbf{5}",
        r"5\text{ cm}",
        "$5$",
    ],
    r"12\text{ cm}": ["12", r"12 \text{ cm}", r"12\,\mathrm{cm}", r"12\text{ centimeters}"],
    r"90^\circ": ["90", r"90^{\circ}", r"90 ^ \circ", r"90\text{ degrees}"],
    r"50\%": ["50", r"50\%", "50%", "0.5"],
    r"\$12.50": ["12.5", r"\$12.50", "12.50"],
    "10,000": ["10000", r"10{,}000", r"10,\!000", "10^4", r"1\times10^4"],
    r"2\sqrt{3}": [r"\sqrt{12}", r"2 \sqrt 3", r"\sqrt{3}\cdot 2"],
    r"\frac{\sqrt{2}}{2}": [r"\frac{1}{\sqrt{2}}", r"\sqrt{2}/2", r"\frac{\sqrt2}2"],
    r"\frac{\pi}{4}": [r"\pi/4", r"\frac14\pi", r"0.25\pi"],
    "[2,5)": ["[2, 5)", r"\left[2,5\right)", r"x \in [2,5)"],
    r"(-\infty,2)\cup(3,\infty)": [r"(-\infty, 2) \cup (3, \infty)"],
    "(3,4)": ["(3, 4)", r"\left(3,4\right)", r"\left( 3, \frac{8}{2} \right)"],
    r"\{1,2,3\}": [r"\{3,2,1\}", "1,2,3", "3, 1, 2", r"1, 2\text{ and }3"],
    "-2,2": [r"\pm 2", r"x=-2\text{ or }x=2", "2,-2"],
    r"\emptyset": [r"\emptyset", r"\{\}"],
    r"\text{Evelyn}": ["Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}", r"\mbox{Evelyn}"],
    r"\text{June 20}": ["June 20", r"\text{June }20", r"\text{June\ 20}"],
    r"\text{even}": ["even", r"\mathrm{even}", r"\text{Even}"],
    r"\text{(C)}": ["C", "(C)", r"\text{C}", r"\textbf{(C)}"],
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": [
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
        r"\begin{pmatrix}1&\frac42\\3&4\end{pmatrix}",
    ],
    "x^2+2x+1": ["(x+1)^2", "1+2x+x^2", "x(x+2)+1"],
    "y=3x-2": ["y = -2 + 3x", "3x-2"],
    "1+2i": ["2i+1"],
    "4:30": ["4:30", r"4\!:\!30"],
    r"\binom{5}{2}": ["10", r"\frac{5!}{2!3!}"],
    "12_7": ["12_{7}", "12_7"],
    "x>3": [r"(3,\infty)", "3<x"],
}
WRONG = {
    r"\frac{1}{2}": [r"\frac{1}{3}", "2", "-0.5", r"\frac{2}{1}", ""],
    "5": ["-5", "6", "5, 6", "50", r"\sqrt{5}", "5x", r"\emptyset", "x+{5", r"\text{five}", "x"],
    "5,6": ["5", "5,6,7", "5,7"],
    "10,000": ["1000", "10", "0"],
    r"90^\circ": [r"60^\circ", "9"],
    r"50\%": ["0.6", "5", "500"],
    r"2\sqrt{3}": [r"3\sqrt{2}", "3.46", r"\sqrt{6}"],
    r"\frac{\pi}{4}": [r"\frac{\pi}{3}", "0.79"],
    "[2,5)": ["(2,5)", "[2,5]", "[2,6)", "2,5"],
    "(3,4)": ["(4,3)", "(3,5)", "(3,4,5)"],
    r"\{1,2,3\}": [r"\{1,2\}", r"\{1,2,4\}"],
    r"\text{Evelyn}": [r"\text{Eve}", "Carla", "E"],
    r"\text{June 20}": [r"\text{June 21}", "20", r"\text{July 20}"],
    r"\text{even}": [r"\text{odd}"],
    r"\text{(C)}": [r"\text{(D)}", "B"],
    r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": [
        r"\begin{pmatrix}1&2\\4&3\end{pmatrix}",
        r"\begin{pmatrix}1&2\end{pmatrix}",
        "10",
    ],
    "x^2+2x+1": ["x^2+2x-1", "(x-1)^2", "x^2"],
    "1+2i": ["1-2i", "3"],
    "4:30": ["4:35"],
    "12_7": ["21_7", "13_7"],
    r"\text{no solution}": ["0"],
}


def cases(table):
    return [(wanted, found) for wanted, answers in table.items() for found in answers]


@pytest.mark.parametrize(("wanted", "found"), cases(RIGHT))
def test_right(wanted, found):
    record = {"problem": "?", "solution": rf"Not \boxed{{7}}: $\boxed{{{wanted}}}$."}
    assert score(record, rf"Perhaps \boxed{{77}}. No: $\boxed{{{found}}}$.") == 1.0


@pytest.mark.parametrize(("wanted", "found"), cases(WRONG))
def test_wrong(wanted, found):
    assert score({"problem": "?", "answer": wanted}, rf"So $\boxed{{{found}}}$.") == 0.0


def test_without_a_box():
    for text in ("The answer is 5.", "", r"\boxed{5", r"\boxed", "{5}"):
        assert score({"problem": "?", "answer": "5"}, text) == 0.0, text


def test_a_record_without_an_answer():
    for record in ({"problem": "?"}, {"problem": "?", "solution": "It is 5."}):
        with pytest.raises(ValueError, match="neither an answer nor a solution"):
            score(record, r"\boxed{5}")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and $\boxed{2}$.", "2"),
        (r"\boxed{\frac{1}{2}} and \boxed{3", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, {2}\}}", r"\{1, {2}\}"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"} \fbox {5} {", "5"),
        (r"\boxed{4} and $\boxed 5$.", "5"),
        (r"\boxed{}", ""),
        (r"\boxedx{3}", None),
        (r"\boxed{3", None),
    ],
)
def test_the_last_complete_box(text, found):
    assert last_boxed(text) == found


def test_long_texts_are_read_in_one_pass():
    start = time.process_time()
    for text in ("\\boxed{" * 10**5, "\\boxed " * 10**5, "{" * 10**6, "\\boxed{" + " " * 10**6):
        assert last_boxed(text) is None
    assert time.process_time() - start < 20  # a second pass for every box takes hours


def test_prompts():
    shots = [{"problem": "1+1?", "solution": r"\boxed{2}"}]
    chat = TASK.prompt({"problem": "2+2?"}, shots, "chat")
    assert [turn["role"] for turn in chat] == ["user", "assistant", "user"]
    assert chat[1]["content"] == r"\boxed{2}" and chat[2]["content"].startswith("2+2?\n")
    assert chat[2]["content"].endswith(r"\boxed{}.")
    plain = TASK.prompt({"problem": "2+2?"}, shots, "plain")
    assert plain == (
        "Problem:\n1+1?\n\nSolution: \\boxed{2}\n\nProblem:\n2+2?\n\nSolution:"
    )  # fmt: skip
    assert TASK.prompt({"problem": "2+2?"}, [], "plain") == "Problem:\n2+2?\n\nSolution:"


def test_from_many_threads():
    pairs = [(str(n), str(n + n % 2) + ".0") for n in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda p: score({"answer": p[0]}, rf"\boxed{{{p[1]}}}"), pairs))
    assert found == [float(n % 2 == 0) for n in range(40)]


def test_another_process_has_a_worker_of_its_own(monkeypatch):
    assert score({"answer": "5"}, r"\boxed{5.0}") == 1.0
    first = competition_math._workers[os.getpid()]
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert score({"answer": "5"}, r"\boxed{5.0}") == 1.0
    assert competition_math._workers.pop(-1) is not first


def test_a_worker_that_was_killed_is_started_again():
    assert score({"answer": "5"}, r"\boxed{5.0}") == 1.0
    worker = competition_math._workers[os.getpid()]
    worker.kill()
    worker.wait()
    assert score({"answer": "5"}, r"\boxed{5.0}") == 1.0


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(competition_math, "_workers", {})
    monkeypatch.setattr(competition_math.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'llada_jax\[evaluate\]'"):
        score({"answer": "5"}, r"\boxed{5.0}")


def test_a_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr(competition_math, "_workers", {})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1 at its start"):
        score({"answer": "5"}, r"\boxed{5.0}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", ["9^{9^{9^{9}}}", "1+" * 50_000 + "1", "(" * 10**5 + ")" * 10**5, "9" * 10**5]
)
def test_an_answer_without_end(answer):
    start = time.time()
    assert score({"answer": "5"}, rf"\boxed{{{answer}}}") == 0.0
    assert time.time() - start < 120  # 10 seconds of computing, on a busy machine
    assert score({"answer": "5"}, r"\boxed{5.0}") == 1.0


@pytest.mark.slow
def test_a_worker_that_is_killed_over_an_answer_gives_no_verdict():
    score({"answer": "5"}, r"\boxed{5.0}")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waits = pool.submit(score, {"answer": "5"}, r"\boxed{9^{9^{9^{9}}}}")
        time.sleep(1)
        competition_math._workers[os.getpid()].kill()
        with pytest.raises(RuntimeError, match="was killed"):
            waits.result()
