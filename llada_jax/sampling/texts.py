"""Responses as texts, which may end at a stop string."""

from collections.abc import Callable, Iterator, Sequence

from llada_jax.sampling.responses import Response, respond, trim


def respond_in_words(
    logits_fn: Callable,
    prompts: Sequence,
    tokenizer,
    *,
    stop: Sequence[str] = (),
    eos_id: int | None = None,
    eot_id: int | None = None,
    **settings,
) -> Iterator[tuple[Response, str]]:
    """Yields the response to each prompt with its text, as soon as it is finished.

    The text ends before EOS, EoT or the first of the strings `stop`. The sampler looks for these
    whenever a row has finished a block. `tokenizer` has decode(ids) -> text. The other arguments
    and the errors are those of `respond`.
    """

    def text_of(tokens) -> str:
        return tokenizer.decode(trim(tokens, eos_id, eot_id))

    def stops(tokens: list[int]) -> bool:
        text = text_of(tokens)
        return any(word in text for word in stop)

    found = respond(
        logits_fn,
        prompts,
        stop=stops if stop else None,
        eos_id=eos_id,
        eot_id=eot_id,
        **settings,
    )
    for response in found:
        yield response, before(text_of(response.tokens), stop)


def before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings `stops`."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
