"""The PyTorch benchmark: a plain PyTorch loop of the same VRPO step, timed beside ours on a CPU.

Both use the same weights, pairs and AdamW. The PyTorch loop is plain: each response is a row of its
own, padded to the longest, as is usual in PyTorch trainers. All n draws go through the model at
once. It runs eagerly, with PyTorch's own scaled_dot_product_attention, cross_entropy and fused
AdamW.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from llada_jax.batch import Batch
from llada_jax.benchmark import step
from llada_jax.benchmark.step import Work
from llada_jax.benchmark.torch_model import TorchLLaDA
from llada_jax.objectives import terms
from llada_jax.objectives.preference import Preference
from llada_jax.train.experiment import Experiment
from llada_jax.train.optim import Optimizer


def unpack(batch: Batch, *arrays: jax.Array) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Unpacks packed rows into one padded row for each response, winner before loser.

    Returns (fields, arrays). The fields `tokens`, `response` (the response mask) and `seen` (False
    at padding) are [b, l]. The arrays are given as [n, r, l] and returned as [n, b, l].
    """
    segment_ids = np.asarray(batch.segment_ids)
    places = [
        np.nonzero(row == segment)[0] + i * row.size
        for i, row in enumerate(segment_ids)
        for segment in range(1, row.max() + 1)
    ]
    longest = max(map(len, places))
    index = np.array(
        [np.pad(place, (0, longest - len(place)), constant_values=-1) for place in places]
    )

    def rows(x):
        x = np.asarray(x).reshape(*x.shape[: x.ndim - 2], -1)[..., index]
        return torch.from_numpy(np.where(index < 0, np.zeros((), x.dtype), x))

    fields = {"tokens": rows(batch.tokens).long(), "response": rows(batch.response_mask)}
    return fields | {"seen": torch.from_numpy(index >= 0)}, [rows(x) for x in arrays]


def draw(response: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes n draws for responses [b, l]. Returns masked [n, b, l] and weights [n, b, l].

    The weights are those of equation 15: L / l if l of the L response tokens are masked.
    """
    lengths = response.sum(-1)
    counts = (torch.rand(n, len(lengths)) * lengths).floor().long() + 1
    scores = torch.rand(n, *response.shape).masked_fill(~response, 2.0)
    masked = scores.argsort(-1).argsort(-1) < counts[..., None]
    return masked, (lengths / counts)[..., None] * masked


def preference_loss(model, reference, rows, masked, weights, settings: Preference) -> torch.Tensor:
    """Returns the loss of a batch: equations 6 and 8 with shared noise, plus the SFT term."""
    n, b, length = masked.shape
    tokens = rows["tokens"].expand(n, b, length).reshape(-1, length)
    inputs = tokens.masked_fill(masked.reshape(-1, length), model.config.mask_token_id)
    mask = None
    if not rows["seen"].all():
        mask = rows["seen"].repeat(n, 1)[:, None, None, :]

    def elbos(net):
        logps = -F.cross_entropy(
            net(inputs, mask).flatten(0, 1), tokens.flatten(), reduction="none"
        )
        return (weights * logps.view(n, b, length)).sum(-1).mean(0)

    policy = elbos(model)
    with torch.no_grad():
        frozen = elbos(reference)
    score = settings.beta * ((policy - frozen)[0::2] - (policy - frozen)[1::2])
    preference = -F.logsigmoid(score).mean()
    winner = (-policy / rows["response"].sum(-1))[0::2].mean()
    return preference + settings.sft_weight * winner


class TorchStep:
    """The body of the PyTorch loop: models, optimiser and settings."""

    def __init__(self, o: Optimizer, params, reference, settings: Preference):
        self.model, self.reference = (
            TorchLLaDA(*params),
            TorchLLaDA(*reference).requires_grad_(False),
        )
        self.settings = settings
        scales = [p for p in self.model.parameters() if p.ndim == 1]
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        groups = [
            {"params": matrices, "weight_decay": o.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=o.peak, betas=(o.b1, o.b2), eps=o.eps, fused=True
        )
        self.clip_norm = o.clip_norm

    def __call__(self, rows):
        """Does one update with new noise and returns the loss."""
        noise = draw(rows["response"], self.settings.scheme.n)
        loss = preference_loss(self.model, self.reference, rows, *noise, self.settings)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()


def check_same(plan, work: Work, torch_step: TorchStep, update) -> dict[str, float]:
    """Compares loss and gradient norm of both programs on the same masks; returns all four numbers.

    The masks are those that `update`, our compiled step, draws. The reference differs from the
    policy here, since otherwise every score would be 0 for any noise. Raises ValueError if the
    relative difference exceeds 1e-4 (loss) or 1e-3 (gradient norm).
    """
    reference = jax.tree.map(lambda x: 1.05 * x, work.frozen)
    _, metrics = update(
        jax.tree.map(jnp.copy, work.state), work.batch, reference
    )  # the state is donated
    settings = plan.settings
    drawn = terms.draw(work.batch, settings.scheme, seed=settings.seed, stream=settings.stream)
    rows, noise = unpack(work.batch, drawn.masked, drawn.weights)
    frozen = TorchLLaDA(plan.model.config, jax.device_get(reference))
    loss = preference_loss(torch_step.model, frozen, rows, *noise, settings)
    gradient = torch.autograd.grad(loss, list(torch_step.model.parameters()))
    found = {
        "loss_jax": float(metrics["loss"]),
        "loss_torch": loss.item(),
        "grad_norm_jax": float(metrics["grad_norm"]),
        "grad_norm_torch": torch.nn.utils.get_total_norm(gradient).item(),
    }
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        if not np.isclose(found[f"{name}_torch"], found[f"{name}_jax"], rtol=tolerance, atol=0):
            raise ValueError(
                f"the two programs do not compute the same {name} on the same masks: {found}"
            )
    return found


def check_supported(plan: Experiment):
    """Raises ValueError for what the PyTorch loop does not do.

    The loop takes all draws at once, whatever vrpo.mc_chunk says.
    """
    if plan.objective.name != "vrpo":
        raise ValueError(
            f"the PyTorch loop does not do objective={plan.objective.name!r}: set vrpo"
        )
    v = plan.settings
    wanted = {
        "vrpo.kind": (v.kind, "sigmoid"),
        "vrpo.label_smoothing": (v.label_smoothing, 0.0),
        "vrpo.share_noise": (v.share_noise, True),
        "vrpo.n_yt": (v.scheme.n_yt, 1),
        "vrpo.times": (v.scheme.times, "iid"),
        "vrpo.masks": (v.scheme.masks, "exact"),
        "vrpo.weights": (v.scheme.weights, "plain"),
        "vrpo.reference": (plan.reference.reference, "model"),
        "vrpo.reference_dtype": (plan.reference_dtype.name, "float32"),
        "optimizer.accumulate": (plan.optimizer.accumulate, 1),
        "model.dtype": (jnp.dtype(plan.model.dtype).name, "float32"),
        "model.param_dtype": (jnp.dtype(plan.model.param_dtype).name, "float32"),
    }
    wrong = {name: pair for name, pair in wanted.items() if pair[0] != pair[1]}
    if wrong:
        found = ", ".join(f"{name}={value!r}" for name, (value, _) in wrong.items())
        need = ", ".join(f"{name}={built!r}" for name, (_, built) in wrong.items())
        raise ValueError(f"the PyTorch loop does not do {found}: set {need}")


def run(config, workdir: str, count: int) -> dict:
    """Times our step and PyTorch's in turns, on one CPU device.

    `count` is the number of timed turns. It prints a summary and returns the results for the JSON
    file. Raises ValueError if the config or the devices do not allow the comparison, or if the two
    programs do not agree.
    """
    device = jax.devices()[0]
    if device.platform != "cpu" or jax.device_count() > 1:
        found = f"{jax.device_count()} x {device.device_kind}"
        raise ValueError(f"{found}: the comparison is on one CPU device, set JAX_PLATFORMS=cpu")
    plan = step.prepare(config, workdir)
    check_supported(plan)
    with plan.parallel.use():
        work = step.make_work(plan)
        torch_step = TorchStep(
            plan.optimizer,
            (plan.model.config, jax.device_get(work.state.params)),
            (plan.model.config, jax.device_get(work.frozen)),
            plan.settings,
        )
        compiled, compile_seconds = step.compile_step(plan, work)
        same = check_same(plan, work, torch_step, compiled)
        rows, _ = unpack(work.batch)
        ours, theirs = [], []
        for turn in range(count + 2):
            (seconds,), _ = step.time_steps(compiled, work, 1, warmup=0)
            start = time.perf_counter()
            torch_step(rows)
            if turn >= 2:
                ours.append(seconds)
                theirs.append(time.perf_counter() - start)
    result = {
        "config": config.to_dict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "jax": jax.__version__,
        **same,
        "compile_seconds": compile_seconds,
        "jax_seconds_all": ours,
        "torch_seconds_all": theirs,
        "jax_seconds": statistics.median(ours),
        "torch_seconds": statistics.median(theirs),
        "ratio": statistics.median(theirs) / statistics.median(ours),
    }
    for name, seconds in (("ours", ours), ("PyTorch", theirs)):
        spread = f"{min(seconds):.4g} to {max(seconds):.4g}"
        print(
            f"{name:<15} {statistics.median(seconds):.4g} s a step"
            f" (median of {count}, in turns; {spread})"
        )
    norms = f"{same['grad_norm_jax']:.6f} and {same['grad_norm_torch']:.6f}"
    print(
        f"same masks      loss {same['loss_jax']:.6f} and {same['loss_torch']:.6f},"
        f" norm of the gradient {norms}"
    )
    print(
        f"ratio           {result['ratio']:.2f} times PyTorch's speed ({result['threads']} threads)"
    )
    return result
