"""The model `llada_jax` of the lm-evaluation-harness."""

import collections
import dataclasses
import json
from typing import Any

from absl import logging
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from llada_jax.evaluate.lm_eval.engine import Engine, Options, draws_of
from llada_jax.parallel.agree import from_first


@register_model("llada_jax")
class LladaJax(LM):
    """A model of this library, split over all devices of all hosts.

    The arguments are the fields of `Options`, and settings of `sampling.generate`.

    Several hosts: only process 0 gives this model to the harness. The others call `serve`, and
    process 0 calls `close` at the end.

    Raises ValueError for impossible settings.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int | str = Options.batch_size,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        for name, value in (("max_batch_size", max_batch_size), ("device", device)):
            if value is not None:
                raise ValueError(f"{name}={value}: leave it; JAX has its own, JAX_PLATFORMS")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size={batch_size} must be a whole number, at least 1")
        names = {field.name for field in dataclasses.fields(Options)}
        own = {name: value for name, value in settings.items() if name in names}
        sampler = {name: value for name, value in settings.items() if name not in names}
        self._engine = Engine(Options(model, batch_size=int(batch_size), **own), sampler)

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        """The (log-likelihood in nats, is greedy) of the continuation of each request.

        The choices of one document have the same random draws.
        """
        return self._together("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        """The log-likelihood of each text, in nats."""
        return self._together("loglikelihood_rolling", requests)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        """The response to each context, up to its end and its stop strings."""
        return self._together("generate_until", requests)

    def apply_chat_template(self, chat_history: list, add_generation_prompt: bool = True) -> str:
        """The text of a conversation up to the answer, or up to the end of its last message.

        Special tokens that the messages name stay text (see `Tokenizer.chat_text`).
        """
        words = self._engine.tokenizer
        if add_generation_prompt:
            return words.chat_text(chat_history)
        return words.chat_text(chat_history[:-1], chat_history[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template by an example, for the harness's records; a model has one only."""
        if isinstance(chat_template, str):
            raise ValueError(f"chat_template={chat_template!r}: a model has one: give True")
        example = [{"role": role, "content": f"({role})"} for role in ("user", "assistant", "user")]
        return self.apply_chat_template(example) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer in the names of the harness's caches."""
        return f"llada_jax-{self._engine.tokenizer.fingerprint}"

    def get_model_info(self) -> dict:
        """What the harness writes into its results: settings, versions, fingerprints."""
        return self._engine.about() | {"prompts_cut": self._engine.texts.cut}

    def serve(self):
        """Does what process 0 asks for, on all other processes, until it calls `close`."""
        while asked := json.loads(from_first(b"")):
            kind, work = asked
            getattr(self._engine, kind)(work, lambda index, result: None)

    def close(self):
        """Ends `serve` on the other processes."""
        from_first(b"null")

    def _together(self, kind: str, requests: list) -> list:
        """Does the work of requests on all hosts."""
        found: list = [None] * len(requests)
        work = _numbered(requests)
        from_first(json.dumps([kind, work]).encode())
        cut = self._engine.texts.cut

        def report(index, result):
            found[index] = result
            arguments = requests[index].args
            if kind != "generate_until" or not arguments[1].get("do_sample"):
                self.cache_hook.add_partial(kind, arguments, result)

        getattr(self._engine, kind)(work, report)
        cut = self._engine.texts.cut - cut
        if cut:
            longest = self._engine.texts.max_length
            logging.warning(
                "%d of %d prompts are cut from the left to the %d tokens of the model",
                *(cut, len(work), longest),
            )
        return found


def _numbered(requests: list) -> list[list]:
    """The arguments of requests, and the number of their random draws.

    Choices of one document draw alike, repeats of a request draw anew.
    """
    seen: collections.Counter = collections.Counter()
    work = []
    for request in requests:
        name = [request.task_name, request.doc_id]
        name = list(request.args) if None in name else name
        request_is = json.dumps([name, request.args])
        work.append([*request.args, draws_of(name, seen[request_is])])
        seen[request_is] += 1
    return work
