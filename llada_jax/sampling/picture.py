"""Pictures of un-masking: when each token was committed, and how confident the model was.

Both take, for the N tokens of one response: `words`, their texts; `steps` [N], the pass that
committed each (0: given, -1: never); `confidence` [N] at that commit, a number in 0..1 or nan; and
`revocations` [N], how often a token before it was revoked. `Response` has the last three.
"""

import functools
import html
import importlib.util
import io
import itertools
import json
import pathlib
import textwrap
from collections.abc import Callable, Sequence

import numpy as np

from llada_jax.sampling.responses import Response, trim

# Plain JavaScript and no other file, so that the page works without a network.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.9 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
#text {{ white-space: pre-wrap; font-family: ui-monospace, monospace }}
#text span {{ border-radius: 3px; padding: 2px 0 }}
#text .masked {{ color: transparent; background: #8884 }}
#text .new {{ outline: 2px solid }}
#text .revoked {{ text-decoration: underline wavy; text-underline-offset: 4px }}
#bar {{ display: flex; gap: 1em; align-items: center; margin: 1em 0 }}
#bar input {{ flex: 1 }}
</style>
<h1>{title}</h1>
<div id="bar"><button id="play">Pause</button>
<input id="pass" type="range" min="0" max="{passes}" value="0" aria-label="pass">
<output id="count"></output></div>
<div id="text">{words}</div>
<p>Grey is a mask. A colour is the confidence at the commit: red 0, yellow 0.5, green 1. An outline
marks the tokens of this pass. A wavy line marks positions whose first token was revoked.</p>
<script>
const steps = {steps}, confidence = {confidence}, passes = {passes};
const revocations = {revocations};
const words = [...document.querySelectorAll("#text .word")];
const slider = document.getElementById("pass"), play = document.getElementById("play");
let timer = null;
function show() {{
  const now = +slider.value;
  words.forEach((word, i) => {{
    const open = steps[i] < 0 || steps[i] > now, sure = confidence[i];
    word.className = "word" + (open ? " masked" : steps[i] === now && now ? " new" : "");
    if (!open && revocations[i]) word.className += " revoked";
    word.style.background = open || sure === null ? "" : `hsl(${{120 * sure}} 75% 50% / 0.4)`;
    word.title = steps[i] < 1 ? "" : `pass ${{steps[i]}}, confidence ${{sure}}`
      + (revocations[i] ? `, revoked ${{revocations[i]}} times before` : "");
  }});
  document.getElementById("count").value = `pass ${{now}} of ${{passes}}`;
}}
function run(on) {{
  clearInterval(timer);
  play.textContent = on ? "Pause" : "Play";
  timer = on && setInterval(() => {{
    if (+slider.value === passes) return run(false);
    slider.value = +slider.value + 1;
    show();
  }}, Math.max(40, Math.min(400, 8000 / passes)));
}}
play.onclick = () => {{
  const on = play.textContent === "Play";
  if (on && +slider.value === passes) slider.value = 0;
  show();
  run(on);
}};
slider.oninput = () => {{ run(false); show(); }};
show();
run(true);
</script>
</html>
"""


KINDS = ("png", "svg", "pdf")


def renderer(path: str) -> Callable[..., str | bytes]:
    """Returns `animate` for a path that ends in .html, and `draw` for the endings of KINDS.

    Raises ValueError for another ending, and ImportError if `draw` has no matplotlib.
    """
    kind = pathlib.PurePath(path).suffix.removeprefix(".")
    if kind == "html":
        return animate
    if kind not in KINDS:
        raise ValueError(f"picture {path!r} must end in .html, .{', .'.join(KINDS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("pictures need matplotlib: pip install 'llada_jax[plot]', or use .html")
    return functools.partial(draw, kind=kind)


def of_response(
    render: Callable[..., str | bytes],
    response: Response,
    tokenizer,
    prompt: str | Sequence[dict],
    eos_id: int | None,
    eot_id: int | None,
) -> str | bytes:
    """The picture of a response up to its EOS or EoT, by `animate` or `draw`; titled by its prompt.

    `tokenizer` has decode(ids) -> text.
    """
    ids = trim(response.tokens, eos_id, eot_id)
    # A token alone may be no text, so each gets what it adds to the text before it.
    texts = [tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)]
    words = [after[_shared(before, after) :] for before, after in itertools.pairwise(texts)]
    steps, confidence, revocations = (
        x[: len(ids)] for x in (response.steps, response.confidence, response.revocations)
    )
    # A confidence below 0 is minus an entropy, whose exp is between 0 and 1.
    confidence = np.where(confidence < 0, np.exp(confidence), confidence)
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    title = textwrap.shorten(text, 80, placeholder=" ...")
    return render(words, steps, confidence, revocations, title=title)


def _shared(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def animate(
    words: Sequence[str],
    steps: np.ndarray,
    confidence: np.ndarray,
    revocations: np.ndarray | None = None,
    *,
    title: str = "Un-masking",
) -> str:
    """Returns a self-contained HTML page that plays the passes one by one."""
    steps = np.asarray(steps)
    spans = (f'<span class="word">{html.escape(word)}</span>' for word in words)
    sure = [None if np.isnan(c) else round(float(c), 4) for c in confidence]
    return _PAGE.format(
        title=html.escape(title),
        words="".join(spans),
        steps=json.dumps(steps.tolist()),
        confidence=json.dumps(sure),
        revocations=json.dumps([int(n) for n in _counts(revocations, steps)]),
        passes=int(steps.max(initial=0)),
    )


def draw(
    words: Sequence[str],
    steps: np.ndarray,
    confidence: np.ndarray,
    revocations: np.ndarray | None = None,
    *,
    title: str = "Un-masking",
    kind: str = "png",
) -> bytes:
    """Returns a picture of pass against position in the format `kind`, one of KINDS."""
    from matplotlib import figure  # noqa: PLC0415 (only pictures need matplotlib)

    steps, confidence = np.asarray(steps), np.asarray(confidence)
    places = np.flatnonzero(steps > 0)
    plot = figure.Figure(figsize=(min(3 + 0.22 * len(words), 14), 4.2), layout="constrained")
    axes = plot.subplots()
    points = axes.scatter(
        places, steps[places], c=confidence[places], cmap="viridis", vmin=0, vmax=1, s=28
    )
    again = np.flatnonzero(_counts(revocations, steps) > 0)
    if again.size:
        ring = dict(s=90, facecolors="none", edgecolors="tab:red")
        axes.scatter(again, steps[again], **ring, label="an earlier token was revoked")
        plot.legend(loc="outside lower right", frameon=False)
    plot.colorbar(points, ax=axes, label="confidence at the commit")
    if len(words) <= 64:  # more would not be legible
        labels = [word.strip() or repr(word)[1:-1] for word in words]
        axes.set_xticks(range(len(words)), labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set(title=title, xlabel="position in the response", ylabel="pass")
    axes.set_ylim(0, steps.max(initial=0) + 0.5)
    axes.margins(x=0.02)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    content = io.BytesIO()
    plot.savefig(content, dpi=150, format=kind)
    return content.getvalue()


def _counts(revocations: np.ndarray | None, steps: np.ndarray) -> np.ndarray:
    return np.zeros(len(steps), int) if revocations is None else np.asarray(revocations)
