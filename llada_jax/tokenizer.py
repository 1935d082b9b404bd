"""Tokenizers of the LLaDA family: SentencePiece and tokenizer.json, special ids, chat template.

    python -m llada_jax.tokenizer train --input='books/*.jsonl.xz' --vocab_size=4096 --out=tokenizer

trains a SentencePiece model that has the special tokens. The ids of special tokens differ between
members of the family. They are always read from files; the code holds no constant id.
"""

import argparse
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import ClassVar

import jinja2
import sentencepiece
import tokenizers
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import sentencepiece_model_pb2

from llada_jax import cli
from llada_jax.files import expand, read_lines, write_whole

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference within a directory

BESIDE = ("tokenizer_config.json", "chat_template.jinja")
_HEADERS = (BOS, START_HEADER, END_HEADER, EOT)  # special tokens of LLaDA's chat template
_MARK = "\ue000"  # of the private use area: no template has it
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]+\|>")

# Tokens that ordinary text must never encode to, whatever type the tokenizer's file gives them.
_SPECIAL = re.compile(r"<\|.+\|>")


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    bos_id, eos_id, mask_id, start_header_id, end_header_id, eot_id: the ids of the special tokens;
        None for those that the tokenizer does not have.
    vocab_size: the largest id that can occur, plus one.
    special_tokens: all special tokens, {name: id}.
    fingerprint: a hash of the vocabulary and the special ids. Tokenizers with equal fingerprints
        encode alike.
    """

    def __init__(
        self,
        backend: "_SentencePiece | _HuggingFace",
        files: dict[str, bytes],
        specials: dict[str, int | None],
        template: "_ChatTemplate | None" = None,
    ):
        self._backend, self._files, self._specials = backend, files, specials
        self.bos_id, self.eos_id, self.mask_id = specials[BOS], specials[EOS], specials[MASK]
        self.start_header_id, self.end_header_id = specials[START_HEADER], specials[END_HEADER]
        self.eot_id = specials[EOT]
        self.vocab_size = 1 + max(
            [backend.max_id, *(i for i in specials.values() if i is not None)]
        )
        digest = hashlib.sha256(json.dumps(specials).encode())
        for name in FILES:
            digest.update(files.get(name, b""))
        self._roles: dict[str, list[int]] = {}
        # Names of special tokens: those of the tokenizer's file, and those of its template.
        names = {*specials, *(template.names if template else ())}
        found = {name: backend.id_of(name) for name in names}
        self.special_tokens = backend.specials | {k: i for k, i in found.items() if i is not None}
        self._template = template
        if template and self._has_headers() and self._is_llada(template):
            self._template = None  # the same ids, without the work of rendering
        if self._template:
            digest.update(self._template.source.encode())
        self.fingerprint = digest.hexdigest()[:16]

    def encode(self, text: str, special: Collection[str] = ()) -> list[int]:
        """Returns the ids of text, without bos or EOS. Other Python threads can run meanwhile.

        special: names of special tokens that become their ids where they stand in the text, but not
            in the messages of `chat_text`. All others are encoded as ordinary characters.
        """
        if not special:
            return self._backend.encode(text)
        ids: list[int] = []
        for k, part in enumerate(_any_of(special).split(text)):
            if k % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._backend.encode(self._unprotected(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids. Special tokens and unknown ids are skipped."""
        specials = set(self._specials.values())
        ids = [int(i) for i in ids]
        return self._backend.decode(
            [i for i in ids if i not in specials and 0 <= i <= self._backend.max_id]
        )

    def runs(self, ids: Iterable[int]) -> list[tuple[str, bool]]:
        """Returns the text of the ids in runs: (text, False), or (a special token's name, True).

        Unknown ids are skipped.
        """
        names = {i: name for name, i in self.special_tokens.items()}
        found: list[tuple[str, bool]] = []
        for is_special, run in itertools.groupby(map(int, ids), lambda i: i in names):
            if is_special:
                found += [(names[i], True) for i in run]
            else:
                found.append((self.decode(run), False))
        return found

    def chat_text(self, messages: Sequence[dict], answer: str = "") -> str:
        """Returns the text of `chat_prompt`, and behind it the beginning of the answer.

        `encode(text, special_tokens)` gives its ids. A name of a special token in a message or in
        the answer has a mark behind its first letter, by which `encode` knows it as text. Raises
        ValueError as `chat_prompt` does.
        """
        contents = [self._protected(message["content"]) for message in messages]
        if self._template:
            text = self._template.text(messages, contents)
        else:
            self._check_headers()
            turns = [
                f"{START_HEADER}{message['role']}{END_HEADER}\n\n{content.strip()}{EOT}"
                for message, content in zip(messages, contents, strict=True)
            ]
            text = f"{BOS}{''.join(turns)}{START_HEADER}assistant{END_HEADER}\n\n"
        return text + self._protected(answer)

    def _protected(self, text: str) -> str:
        names = _any_of(self.special_tokens)
        return names.sub(lambda found: found[0][0] + _MARK + found[0][1:], text)

    def _unprotected(self, text: str) -> str:
        if _MARK not in text:
            return text
        names = _any_of(name[0] + _MARK + name[1:] for name in self.special_tokens)
        return names.sub(lambda found: found[0].replace(_MARK, ""), text)

    def chat_prompt(self, messages: Sequence[dict]) -> list[int]:
        """Returns the ids of a conversation by the chat template, up to the assistant's answer.

        The template is the tokenizer's own (`chat_template` of tokenizer_config.json, or the file
        chat_template.jinja), or LLaDA's. `messages` are dicts with role and content; content that
        looks like a special token stays text. Raises ValueError if the template refuses the
        messages, or if the tokenizer lacks a special token of LLaDA's template.
        """
        if self._template:
            return self._template.encode(messages, self._backend)
        self._check_headers()
        return self._llada_prompt(messages)

    def _check_headers(self):
        if not self._has_headers():
            missing = [name for name in _HEADERS if self._specials[name] is None]
            raise ValueError(
                f"the chat template needs {', '.join(missing)}, which this tokenizer does not have;"
                ' use data.template="plain" or a tokenizer with these tokens'
            )

    def _has_headers(self) -> bool:
        return all(self._specials[name] is not None for name in _HEADERS)

    def _is_llada(self, template: "_ChatTemplate") -> bool:
        """Whether a template gives the ids of LLaDA's for two conversations."""
        turns = [("system", "Be brief."), ("user", " a\n\nb "), ("assistant", "c"), ("user", "d")]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return all(
                template.encode(m, self._backend) == self._llada_prompt(m)
                for m in (messages, messages[1:2])
            )
        except ValueError:
            return False

    def _llada_prompt(self, messages: Sequence[dict]) -> list[int]:
        ids = [self.bos_id]
        for message in messages:
            ids += (
                self._header(message["role"])
                + self.encode("\n\n" + message["content"].strip())
                + [self.eot_id]
            )
        return ids + self._header("assistant") + self.encode("\n\n")

    def _header(self, role: str) -> list[int]:
        if role not in self._roles:
            self._roles[role] = [self.start_header_id, *self.encode(role), self.end_header_id]
        return self._roles[role]

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the tokenizer's files to a directory.

        config.json is not among them. If the mask id was read from it, `load` needs it there too.
        """
        directory = epath.Path(directory)
        for name, content in self._files.items():
            write_whole(directory / name, content)


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
        backend = (_HuggingFace if is_json else _SentencePiece)(content)
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
        template = _ChatTemplate(source, names, str(path.parent))
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


class _ChatTemplate:
    """A chat template: messages to ids, with special tokens from the template alone.

    The template is rendered with a mark in place of each content. Where the mark stands, the
    content is put back as ordinary text, stripped on a side if the template strips there. So a
    content that looks like a special token cannot become one.
    """

    def __init__(self, source: str, names: dict[str, str], where: str):
        self.source, self._names, self._where = source, names, where
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{where}: the chat template is no jinja: {error}") from error

    @property
    def names(self) -> list[str]:
        """The special tokens that are variables of the template."""
        return [name for name in self._names.values() if name]

    def _refuse(self, message: str):
        raise jinja2.TemplateError(message)

    def encode(
        self, messages: Sequence[dict], backend: "_SentencePiece | _HuggingFace"
    ) -> list[int]:
        """The ids of a conversation. Raises ValueError if the template refuses it."""
        contents = [message["content"] for message in messages]
        ids: list[int] = []
        # Special tokens are split off while the marks stand: no content can add one.
        for k, part in enumerate(self._split(self._marked(messages), backend)):
            if k % 2:
                ids.append(backend.id_of(part))
            elif part:
                ids += backend.encode(_filled(part, contents))
        return ids

    def text(self, messages: Sequence[dict], contents: Sequence[str]) -> str:
        """The text of a conversation with these contents. Raises ValueError as `encode` does."""
        return _filled(self._marked(messages), contents)

    def _marked(self, messages: Sequence[dict]) -> str:
        """The text of a conversation with a mark in place of each content."""
        marked = [{**m, "content": f" {_MARK}{i}{_MARK} "} for i, m in enumerate(messages)]
        try:
            return self._template.render(messages=marked, add_generation_prompt=True, **self._names)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self._where}: the chat template refuses: {error}") from error

    def _split(self, text: str, backend) -> list[str]:
        """The text split at its special tokens: text, token, text, ..., token, text."""
        known = {*_SPECIAL_TOKEN.findall(text), *filter(None, self._names.values())}
        known = {token for token in known if backend.id_of(token) is not None}
        return _any_of(known).split(text) if known else [text]


def _filled(text: str, contents: Sequence[str]) -> str:
    """Puts contents in place of their marks, stripped on a side where the template strips."""

    def content(found: re.Match) -> str:
        value = contents[int(found[2])]
        value = value if found[1] else value.lstrip()
        return value if found[3] else value.rstrip()

    return re.sub(f"( ?){_MARK}(\\d+){_MARK}( ?)", content, text)


def _any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern that finds any of the names, the longest first."""
    return _pattern(tuple(sorted(names, key=lambda name: (-len(name), name))))


@functools.lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")


def _named_specials(config: dict) -> dict[str, str]:
    """Returns {LLaDA's name of a special token: the name that tokenizer_config.json gives it}."""
    found = {}
    for name, key in ((BOS, "bos_token"), (EOS, "eos_token"), (MASK, "mask_token")):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            found[name] = token
    return found


class _SentencePiece:
    def __init__(self, content: bytes):
        # Make special tokens control pieces, which never match text. User-defined pieces always do.
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        if not model.pieces:
            raise ValueError("it holds no pieces")
        for piece in model.pieces:
            if _SPECIAL.fullmatch(piece.piece):
                piece.type = piece.CONTROL
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=model.SerializeToString()
        )
        self._ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self.max_id = len(model.pieces) - 1
        own = {BOS: self._processor.bos_id(), EOS: self._processor.eos_id()}
        self.defaults = {name: i for name, i in own.items() if i >= 0}
        self.specials = {
            piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == piece.CONTROL
        }

    def id_of(self, name: str) -> int | None:
        return self._ids.get(name)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode_as_ids(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class _HuggingFace:
    defaults: ClassVar[dict[str, int]] = {}

    def __init__(self, content: bytes):
        model = json.loads(content)
        for token in model.get("added_tokens", []):
            token["special"] = token.get("special", False) or bool(
                _SPECIAL.fullmatch(token["content"])
            )
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(model))
        self._tokenizer.encode_special_tokens = True  # encode their names as ordinary text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.max_id = max(vocab.values())
        added = {token["content"] for token in model.get("added_tokens", []) if token["special"]}
        self.specials = {
            name: i for name, i in vocab.items() if name in added or _SPECIAL_TOKEN.fullmatch(name)
        }

    def id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _texts(source: str, field: str, limit: int) -> Iterator[str]:
    """Yields the lines of text files, or of the field `field` of .jsonl files, without newlines."""
    count = 0
    for path in expand(source.removeprefix("jsonl:")):
        is_jsonl = ".jsonl" in path.name
        for number, raw in read_lines(path):
            if limit and count >= limit:
                return
            count += 1
            if is_jsonl:
                try:
                    text = json.loads(raw)[field]
                except (ValueError, KeyError, TypeError) as e:
                    raise ValueError(
                        f"{path}:{number} is no JSON object with a field {field!r}; see --field"
                    ) from e
            else:
                text = raw.decode("utf-8", errors="replace")
            yield from text.splitlines()


def train(lines: Iterable[str], out: str | os.PathLike, vocab_size: int = 4096) -> Tokenizer:
    """Trains a SentencePiece BPE model with LLaDA's special tokens; writes `out`/tokenizer.model.

    `lines` must not contain newlines; in text, a newline is encoded as its byte. Every digit is a
    token of its own. Text is not normalised and no space is put in front, so that
    decode(encode(text)) == text and encodings can be joined. Characters without a piece fall back
    to bytes. The 7 special tokens (with <unk>) and 256 bytes take the first 263 ids.

    Raises ValueError if vocab_size does not suit the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in lines if line.strip()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=[MASK, START_HEADER, END_HEADER, EOT],
            minloglevel=1,
        )
    except RuntimeError as e:
        # The message begins with a place in SentencePiece's C++ code.
        reason = re.sub(r"^.*\] ", "", str(e).splitlines()[0])
        raise ValueError(f"vocab_size={vocab_size} cannot be trained on this text: {reason}") from e
    directory = epath.Path(out)
    write_whole(directory / FILES[1], model.getvalue())
    return load(directory / FILES[1])


def parser() -> cli.Parser:
    """The flags of the command."""
    parser = cli.Parser("tokenizer", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a SentencePiece model")
    command.add_argument(
        "--input", required=True, help="text or .jsonl files, a path or a glob (.gz .xz .bz2 too)"
    )
    command.add_argument(
        "--field", default="text", help="the field to read of .jsonl files (default: text)"
    )
    command.add_argument("--vocab_size", type=int, default=4096, help="ids of the new tokenizer")
    command.add_argument("--out", default="tokenizer", help="folder for tokenizer.model")
    command.add_argument(
        "--limit", type=int, default=0, help="lines of the input files to read (0: all)"
    )
    return parser


def main(args: argparse.Namespace):
    """Does what the flags say."""
    tokenizer = train(_texts(args.input, args.field, args.limit), args.out, args.vocab_size)
    print(f"{args.out}/{FILES[1]}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
