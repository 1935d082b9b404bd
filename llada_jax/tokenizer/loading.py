"""Opens a tokenizer's files and finds its special tokens and chat template."""

import json
import os

from etils import epath

from llada_jax.tokenizer.backends import HuggingFace, SentencePiece
from llada_jax.tokenizer.encoding import Tokenizer
from llada_jax.tokenizer.special import BOS, END_HEADER, EOS, EOT, FILES, MASK, START_HEADER
from llada_jax.tokenizer.template import ChatTemplate

BESIDE = ("tokenizer_config.json", "chat_template.jinja")


def load(path: str | os.PathLike) -> Tokenizer:
    """Opens tokenizer.json or tokenizer.model (a SentencePiece model), or a directory with one.

    Special tokens are looked up by LLaDA's names, then by the names in tokenizer_config.json, then
    by SentencePiece's own bos and eos. If the mask token has none of these, its id is
    `mask_token_id` of a config.json in the same directory.

    Raises FileNotFoundError if there is no such file, and ValueError if it cannot be read or if
    config.json has another mask id. The message names the path.
    """
    path = epath.Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).exists()]
        if not found:
            raise FileNotFoundError(
                f"{path} holds no {' and no '.join(FILES)}; give a folder with a tokenizer"
            )
        path = found[0]
    elif not path.exists():
        raise FileNotFoundError(
            f"tokenizer {path} does not exist; give a {', a '.join(FILES)} or a folder with one"
        )
    is_json = path.suffix == ".json"
    content = path.read_bytes()
    files = {FILES[0 if is_json else 1]: content}
    for name in BESIDE:
        if (path.parent / name).exists():
            files[name] = (path.parent / name).read_bytes()
    try:
        settings = json.loads(files.get(BESIDE[0], b"{}"))
        named = _named_specials(settings)
        backend = (HuggingFace if is_json else SentencePiece)(content)
    except Exception as e:  # the parsers raise errors of any type
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(
            f"tokenizer {path} cannot be read ({reason}); it must be one of {' or '.join(FILES)}"
        ) from e

    specials = {}
    for name in (BOS, EOS, MASK, START_HEADER, END_HEADER, EOT):
        i = backend.id_of(name)
        if i is None and name in named:
            i = backend.id_of(named[name])
        specials[name] = backend.defaults.get(name) if i is None else i
    config = path.parent / "config.json"
    mask = json.loads(config.read_text()).get("mask_token_id") if config.exists() else None
    if mask is not None and specials[MASK] not in (None, mask):
        raise ValueError(
            f"{config} says mask_token_id={mask}, but {MASK} is {specials[MASK]} in {path};"
            " make the two agree"
        )
    specials[MASK] = mask if specials[MASK] is None else specials[MASK]
    source = _template_source(settings, files)
    template = None
    if source:
        names = {key: named.get(name, "") for name, key in ((BOS, "bos_token"), (EOS, "eos_token"))}
        template = ChatTemplate(source, names, str(path.parent))
    return Tokenizer(backend, files, specials, template)


def _template_source(settings: dict, files: dict[str, bytes]) -> str:
    """The jinja text of the chat template; "" if there is none."""
    if BESIDE[1] in files:
        return files[BESIDE[1]].decode()
    source = settings.get("chat_template") or ""
    if isinstance(source, list):  # several templates by name
        by_name = {entry["name"]: entry["template"] for entry in source}
        source = by_name.get("default", "")
    return source


def _named_specials(config: dict) -> dict[str, str]:
    """Returns {LLaDA's name of a special token: the name that tokenizer_config.json gives it}."""
    found = {}
    for name, key in ((BOS, "bos_token"), (EOS, "eos_token"), (MASK, "mask_token")):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            found[name] = token
    return found
