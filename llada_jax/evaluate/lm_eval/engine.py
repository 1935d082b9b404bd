"""A model with its tokenizer that answers the harness's requests, on all devices of all hosts."""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import llada_jax
from llada_jax import likelihood, metrics, sampling
from llada_jax.checkpoints import hashing, loading
from llada_jax.evaluate.lm_eval import generation
from llada_jax.evaluate.lm_eval.texts import Texts
from llada_jax.parallel import mesh as mesh_lib

ESTIMATORS: dict[str, dict[str, Any]] = {
    "published": {"mc_num": 128, "times": "official"},
    "unbiased": {"mc_num": 128},
    "few": dict(likelihood.FEW_DRAWS),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a model in the harness, beside those of the sampler.

    model, dtype, quantize: as for `checkpoints.loading.open_model`.
    batch_size: rows in one model call, a multiple of the parts into which devices split rows.
    max_length: tokens of a request; by default those that the model takes.
    estimator: of the likelihood, a name in ESTIMATORS. mc_num: its draws; None takes its own.
    check_greedy: whether to find out if greedy decoding writes an answer. Otherwise no answer
        counts as greedy.
    add_bos_token: puts BOS before every prompt.
    published: ids and texts as LLaDA's eval_llada.py makes them (see `Texts`).
    data_parallel, fsdp, tensor: how all devices split the rows, the parameters and rows, and the
        heads and the MLP (`parallel.mesh.of_rows`).
    """

    model: str
    dtype: str | None = None
    quantize: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    estimator: str = "unbiased"
    mc_num: int | None = None
    check_greedy: bool = True
    add_bos_token: bool = False
    published: bool = False
    data_parallel: int = -1
    fsdp: int = 1
    tensor: int = 1
    seed: int = 0


class Engine:
    """The methods get requests as lists [..., number]; `number` is that of their random draws.

    They call report(index, result) for each request as soon as its result is known. With several
    hosts, all call the same methods with the same requests.

    sampler: settings of `sampling.generate`; cfg_scale is that of the likelihood too.
    Raises ValueError for impossible settings.
    """

    def __init__(self, options: Options, sampler: dict[str, Any]):
        self.options, self.sampler = options, sampler
        split = (options.data_parallel, options.fsdp, options.tensor)
        self._mesh = mesh_lib.of_rows(options.batch_size, *split)
        self._estimator = _estimator(options)
        self._logits_fn, config, self.tokenizer = loading.open_model(
            options.model, options.dtype, options.quantize, self._mesh
        )
        # All hosts compute it; `about` is for the first one alone.
        self._fingerprint = hashing.fingerprint(self._logits_fn.args[0]["params"])
        self._ids = loading.special_ids(config, self.tokenizer)
        self._key = jax.random.key(options.seed)
        self.texts = Texts(
            self.tokenizer,
            _length(options.max_length, config.max_sequence_length),
            self._ids["eos_id"],
            _bos(options, self.tokenizer),
            options.published,
        )
        self._check(generation.settings_of({}, sampler)[1])

    def about(self) -> dict[str, Any]:
        """All settings, versions and fingerprints, for the record of a run."""
        return {
            "llada_jax": llada_jax.__version__,
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
            "model_fingerprint": self._fingerprint,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "settings": dataclasses.asdict(self.options) | self._estimator | self.sampler,
        }

    def loglikelihood(self, work: list, report: Callable):
        """Reports (log-likelihood in nats, is greedy) of each [context, continuation, number].

        An empty continuation has (0.0, True).
        """
        pairs = [self.texts.pair(context, text) for context, text, _ in work]
        scored = [i for i, (_, answer) in enumerate(pairs) if answer]
        for i in sorted(set(range(len(work))) - set(scored)):
            report(i, (0.0, True))
        pairs = [pairs[i] for i in scored]
        greedy = np.zeros(len(pairs), bool)
        if self.options.check_greedy:
            with self._devices() as rows:
                greedy = likelihood.are_greedy(
                    self._logits_fn,
                    *_columns(pairs),
                    mask_id=self._ids["mask_id"],
                    batch_size=self.options.batch_size,
                    cfg_scale=self.sampler.get("cfg_scale", 0.0),
                    row_sharding=rows,
                )

        def found(k, value):
            report(scored[k], (value, bool(greedy[k])))

        self._estimate(pairs, [work[i][-1] for i in scored], found)

    def loglikelihood_rolling(self, work: list, report: Callable):
        """Reports the log-likelihood in nats of each [text, number].

        Windows of half of max_length are predicted from as many tokens before them.
        """
        half = max(1, self.texts.max_length // 2)
        prefix = [] if self.texts.bos_id is None else [self.texts.bos_id]
        pairs: list[tuple[list[int], list[int]]] = []
        text_of: list[int] = []
        numbers: list[int] = []
        for i, (text, number) in enumerate(work):
            tokens = self.texts.encode(text)
            windows = likelihood.windows(tokens, window=half, context=half, prefix=prefix)
            for k, pair in enumerate(zip(*windows, strict=True)):
                pairs.append(pair)
                text_of.append(i)
                numbers.append(draws_of([number], k))
        sums, left = np.zeros(len(work)), np.bincount(text_of, minlength=len(work))

        def found(k, value):
            i = text_of[k]
            sums[i] += value
            left[i] -= 1
            if not left[i]:
                report(i, float(sums[i]))

        for i in np.flatnonzero(left == 0):
            report(int(i), 0.0)
        self._estimate(pairs, numbers, found)

    def generate_until(self, work: list, report: Callable):
        """Reports the response to each [context, gen_kwargs, number]."""
        groups: dict[str, list[int]] = {}
        for i, (_, given, _) in enumerate(work):
            groups.setdefault(json.dumps(given, sort_keys=True), []).append(i)
        asked = {key: generation.settings_of(json.loads(key), self.sampler) for key in groups}
        for _, settings in asked.values():  # before any work is done
            self._check(settings)
        with self._devices() as rows, _progress(len(work)) as advance:
            for key, members in groups.items():
                for k, text in self._responses([work[i] for i in members], *asked[key], rows):
                    report(members[k], text)
                    advance(1)

    def _responses(self, work: list, until: list[str], settings: dict, rows):
        """Yields (index, text) of the responses to requests with the same settings."""
        length = settings["gen_length"]
        prompts = [
            self.texts.fit(self.texts.encode(context), length, f"gen_length={length}")
            for context, *_ in work
        ]
        responses = sampling.respond(
            self._logits_fn,
            prompts,
            batch_size=self.options.batch_size,
            key=self._key,
            row_ids=[number for *_, number in work],
            stop=lambda tokens: self.texts.stops(tokens, until),
            row_sharding=rows,
            **self._ids,
            **settings,
        )
        for response in responses:
            yield response.index, self.texts.said(response.tokens, until)

    def _estimate(self, pairs: Sequence, numbers: list[int], found: Callable):
        """Calls found(index, log-likelihood) for each (prompt, answer)."""
        with self._devices() as rows, _progress(len(pairs)) as advance:

            def report(at, values):
                for k, value in zip(at, values, strict=True):
                    found(int(k), float(value))
                advance(len(at))

            likelihood.log_likelihoods(
                self._key,
                self._logits_fn,
                *_columns(pairs),
                mask_id=self._ids["mask_id"],
                batch_size=self.options.batch_size,
                cfg_scale=self.sampler.get("cfg_scale", 0.0),
                request_ids=numbers,
                row_sharding=rows,
                report=report,
                **self._estimator,
            )

    @contextlib.contextmanager
    def _devices(self):
        """Context that yields how rows are split over the devices, None for one device."""
        if self._mesh is None:
            yield None
            return
        with mesh_lib.use(self._mesh):
            yield mesh_lib.rows(self._mesh)

    def _check(self, settings: dict):
        generation.check(settings, self._ids)


def draws_of(name: list, repeat: int) -> int:
    """The number of the random draws of what has a name, for its n-th repeat."""
    return zlib.crc32(json.dumps([*name, repeat]).encode()) & 0x7FFFFFFF


@contextlib.contextmanager
def _progress(total: int):
    """Context that yields a function, which takes how many more requests are done."""
    done = 0
    with metrics.Progress(total, unit="request", show=()) as progress:

        def advance(count: int):
            nonlocal done
            done += count
            progress.update(done)

        yield advance


def _columns(pairs: Sequence) -> tuple[list, list]:
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def _estimator(options: Options) -> dict[str, Any]:
    if options.estimator not in ESTIMATORS:
        raise ValueError(f"estimator={options.estimator!r} is not one of {', '.join(ESTIMATORS)}")
    found = dict(ESTIMATORS[options.estimator])
    found["mc_num"] = options.mc_num or found["mc_num"]
    if options.estimator == "published" and found["mc_num"] % options.batch_size:
        raise ValueError(
            f"mc_num={found['mc_num']} is no multiple of batch_size={options.batch_size}, which "
            "the published estimator needs"
        )
    return found


def _length(asked: int | None, most: int) -> int:
    if asked is not None and not 1 <= asked <= most:
        raise ValueError(f"max_length={asked} is not between 1 and the {most} of the model")
    return asked or most


def _bos(options: Options, tokenizer) -> int | None:
    if options.add_bos_token and tokenizer.bos_id is None:
        raise ValueError(f"add_bos_token: the tokenizer of {options.model} has no BOS")
    return tokenizer.bos_id if options.add_bos_token else None
