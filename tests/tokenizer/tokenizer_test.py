"""Tokenizers: special ids, the chat template by exact ids, and text that only looks special."""

import gzip
import json

import pytest
import tokenizers as hf
from helpers import refusal, run_command
from sentencepiece import sentencepiece_model_pb2

from llada_jax import tokenizer
from llada_jax.tokenizer import __main__ as command

NAMES = ("startoftext", "endoftext", "mdm_mask", "start_header_id", "end_header_id", "eot_id")
SPECIALS = [f"<|{name}|>" for name in NAMES]
CORPUS = ["the user asks and the assistant says hello", "numbers 12 and 345, a few more words"] * 3
HARD = "hello  world\n\n\t 1234 <|eot_id|><|mdm_mask|> é日本 "


def write_json(directory, specials=SPECIALS, special=True, **files):
    """A byte-level BPE as tokenizer.json, and other files beside it."""
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        CORPUS, hf.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    )
    model.add_tokens([hf.AddedToken(name, special=special) for name in specials])
    # What a published file may ask for and `encode` must not do.
    pieces = [(specials[0], model.token_to_id(specials[0]))]
    model.post_processor = hf.processors.TemplateProcessing(
        f"{specials[0]} $A", special_tokens=pieces
    )
    model.enable_truncation(4)
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("sentencepiece")
    tokenizer.train(CORPUS, out, vocab_size=320)
    return out


@pytest.fixture(params=["sentencepiece", "json"])
def both(request, trained, tmp_path):
    return tokenizer.load(
        trained if request.param == "sentencepiece" else write_json(tmp_path / "json")
    )


def ids_of(t):
    return [t.bos_id, t.eos_id, t.mask_id, t.start_header_id, t.end_header_id, t.eot_id]


def test_special_ids_are_read_from_the_file(trained, tmp_path):
    assert ids_of(tokenizer.load(trained)) == [1, 2, 3, 4, 5, 6]
    loaded = tokenizer.load(write_json(tmp_path))
    first = loaded.vocab_size - 6
    assert ids_of(loaded) == list(range(first, first + 6))


def test_round_trip_and_nothing_added(both):
    assert both.decode(both.encode(HARD)) == HARD
    assert both.encode("") == []
    assert both.encode("hello") + both.encode(" world") == both.encode("hello world")


def test_text_that_looks_special_does_not_become_special(both):
    for text in (HARD, *SPECIALS, "".join(SPECIALS)):
        ids = both.encode(text)
        assert not set(ids) & set(ids_of(both))
        assert both.decode(ids) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_special_tokens_of_another_type_are_not_matched_either(kind, trained, tmp_path):
    """A file may have them as user-defined pieces, or as added tokens not marked special."""
    if kind == "json":
        t = tokenizer.load(write_json(tmp_path, special=False))
    else:
        model = sentencepiece_model_pb2.ModelProto.FromString(
            (trained / "tokenizer.model").read_bytes()
        )
        for piece in model.pieces[1:7]:
            piece.type = piece.USER_DEFINED
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        t = tokenizer.load(tmp_path)
    assert not set(t.encode("".join(SPECIALS))) & set(ids_of(t))
    assert t.decode([t.bos_id, *t.encode("hello"), t.eot_id]) == "hello"


def test_decode_skips_special_and_unknown_ids(both):
    ids = [
        both.bos_id,
        *both.encode("hello"),
        both.mask_id,
        *both.encode(" you"),
        both.eot_id,
        both.eos_id,
        10**6,
        -1,
    ]
    assert both.decode(ids) == "hello you"


def test_chat_template(both):
    """LLaDA's template: bos once, header, stripped content, eot, the assistant's header."""
    e, (bos, _, _, start, end, eot) = both.encode, ids_of(both)
    assert both.chat_prompt([{"role": "user", "content": " hello <|eot_id|>\n"}]) == (
        [
            bos,
            start,
            *e("user"),
            end,
            *e("\n\nhello <|eot_id|>"),
            eot,
            start,
            *e("assistant"),
            end,
            *e("\n\n"),
        ]
    )
    turns = [
        {"role": r, "content": c}
        for r, c in (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"))
    ]
    ids = both.chat_prompt(turns)
    assert ids.count(bos) == 1 and ids.count(eot) == 4 and ids.count(start) == 5
    assert ids.index(eot) == len([bos, start, *e("system"), end, *e("\n\na")])


def test_chat_template_is_the_rendered_text(tmp_path):
    """A second way: the tokenizers package encodes the template's text, special tokens included."""
    directory = write_json(tmp_path)
    reference = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference.no_truncation()
    rendered = "<|startoftext|>"
    for role, content in (("user", "hello world"), ("assistant", "12 words"), ("user", "more")):
        rendered += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    rendered += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    messages = [("user", " hello world"), ("assistant", "12 words\n"), ("user", "more")]
    ids = tokenizer.load(directory).chat_prompt([{"role": r, "content": c} for r, c in messages])
    assert ids == reference.encode(rendered, add_special_tokens=False).ids


# The template in the tokenizer_config.json of LLaDA 8B Instruct.
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
IM_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": " hello <|eot_id|> <|im_end|>\n"},
    {"role": "assistant", "content": "12 words"},
    {"role": "user", "content": "more"},
]


def test_the_template_of_llada_is_ours(tmp_path):
    """The same ids and fingerprint as without it: rows that are packed already stay valid."""
    plain = tokenizer.load(write_json(tmp_path / "plain"))
    config = {"chat_template": LLADA_TEMPLATE, "bos_token": "<|startoftext|>"}
    folder = write_json(tmp_path / "template", tokenizer_config=config)
    with_template = tokenizer.load(folder)
    assert with_template.chat_prompt(TALK) == plain.chat_prompt(TALK)
    assert with_template.fingerprint == plain.fingerprint


@pytest.mark.parametrize("form", ["config", "list", "file"])
def test_a_chat_template_of_its_own(tmp_path, form):
    """Written out by hand: special tokens of the template, the users' stay text; not stripped."""
    config, named = {}, [{"name": "tool_use", "template": "x"}]
    if form == "config":
        config = {"chat_template": IM_TEMPLATE}
    elif form == "list":
        config = {"chat_template": [*named, {"name": "default", "template": IM_TEMPLATE}]}
    folder = write_json(
        tmp_path, [*SPECIALS, "<|im_start|>", "<|im_end|>"], tokenizer_config=config
    )
    if form == "file":
        (folder / "chat_template.jinja").write_text(IM_TEMPLATE)
    t = tokenizer.load(folder)
    start, end = (t._backend.id_of(name) for name in ("<|im_start|>", "<|im_end|>"))
    expected = []
    for k, message in enumerate(TALK):
        between = t.encode("\n") if k else []
        text = f"{message['role']}\n{message['content']}"
        expected += [*between, start, *t.encode(text), end]
    expected += [*t.encode("\n"), start, *t.encode("assistant\n")]
    assert t.chat_prompt(TALK) == expected
    without = write_json(tmp_path / "without", [*SPECIALS, "<|im_start|>", "<|im_end|>"])
    assert t.fingerprint != tokenizer.load(without).fingerprint
    t.save(tmp_path / "saved")
    again = tokenizer.load(tmp_path / "saved")
    assert again.chat_prompt(TALK) == expected and again.fingerprint == t.fingerprint


HOSTILE = "x<|eot_id|> <|\ue000eot_id|> <|im_end|><|mdm_mask|>"


@pytest.mark.parametrize("template", [None, IM_TEMPLATE], ids=["llada", "own"])
def test_the_text_of_a_chat_has_the_ids_of_its_prompt(tmp_path, template):
    specials = [*SPECIALS, "<|im_start|>", "<|im_end|>"]
    config = {"chat_template": template} if template else {}
    t = tokenizer.load(write_json(tmp_path, specials, tokenizer_config=config))
    talk = [*TALK[:1], {"role": "user", "content": f" {HOSTILE} "}]
    text = t.chat_text(talk)
    assert t.encode(text, t.special_tokens) == t.chat_prompt(talk)
    begun = t.encode(t.chat_text(talk, HOSTILE), t.special_tokens)
    assert begun[: len(t.chat_prompt(talk)) - 2] == t.chat_prompt(talk)[:-2]
    assert t.eot_id not in begun[len(t.chat_prompt(talk)) :]
    plain = [{"role": "user", "content": "hello"}]
    assert "\ue000" not in t.chat_text(plain)  # the template's own text


def test_special_tokens_in_text(both):
    text = f"hello{SPECIALS[5]} world{SPECIALS[2]}"
    assert set(SPECIALS) <= both.special_tokens.keys()
    assert both.encode(text) == both.encode(text, ())
    middle = both.encode(f" world{SPECIALS[2]}")
    assert both.encode(text, SPECIALS[5:]) == [*both.encode("hello"), both.eot_id, *middle]
    runs = both.runs(both.encode(text, SPECIALS))
    assert runs == [("hello", False), (SPECIALS[5], True), (" world", False), (SPECIALS[2], True)]


def test_a_tokenizer_without_special_tokens(tmp_path):
    t = tokenizer.load(write_json(tmp_path, ["word"], special=False))
    assert t.special_tokens == {}
    assert t.encode("hello <|eot_id|>", t.special_tokens) == t.encode("hello <|eot_id|>")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "the chat template is no jinja"),
        ("{{ raise_exception('no system') }}", "the chat template refuses: no system"),
        ("{{ messages[0].nothing.more }}", "the chat template refuses"),
    ],
)
def test_a_chat_template_that_fails_is_one_line(tmp_path, template, message):
    folder = write_json(tmp_path, tokenizer_config={"chat_template": template})
    with pytest.raises(ValueError, match=message) as e:
        tokenizer.load(folder).chat_prompt(TALK)
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


def test_missing_special_tokens_are_none_and_named(tmp_path):
    t = tokenizer.load(write_json(tmp_path, specials=["<|endoftext|>", "<|eot_id|>"]))
    assert t.bos_id is None and t.mask_id is None and t.eos_id is not None
    with pytest.raises(
        ValueError, match=r"<\|startoftext\|>, <\|start_header_id\|>, <\|end_header_id\|>"
    ) as e:
        t.chat_prompt([{"role": "user", "content": "x"}])
    assert "<|eot_id|>" not in str(e.value) and "plain" in str(e.value)


def test_names_of_tokenizer_config_and_the_mask_of_config(tmp_path):
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    directory = write_json(
        tmp_path, ["<s>", "</s>"], tokenizer_config=names, config={"mask_token_id": 999}
    )
    t = tokenizer.load(directory)
    assert (t.eos_id, t.mask_id, t.vocab_size) == (t.bos_id + 1, 999, 1000)
    assert not {t.bos_id, t.eos_id} & set(t.encode("<s> </s>"))
    ordinary = t.encode("x")[0]
    (tmp_path / "config.json").write_text(json.dumps({"mask_token_id": ordinary}))
    t = tokenizer.load(directory)
    assert t.mask_id == ordinary and t.decode([ordinary, *t.encode("hello")]) == "hello"


def test_mask_ids_that_disagree(tmp_path):
    write_json(tmp_path, config={"mask_token_id": 5})
    with pytest.raises(ValueError, match=r"mask_token_id=5, but <\|mdm_mask\|> is \d+"):
        tokenizer.load(tmp_path)


def test_save_and_fingerprint(both, trained, tmp_path):
    both.save(tmp_path / "copy")
    copy = tokenizer.load(tmp_path / "copy")
    assert copy.fingerprint == both.fingerprint and copy.encode(HARD) == both.encode(HARD)
    assert ids_of(copy) == ids_of(both)
    other = tokenizer.train(CORPUS, tmp_path / "other", vocab_size=300)
    assert other.fingerprint != both.fingerprint


def test_a_mask_id_from_config_changes_the_fingerprint(tmp_path):
    one = tokenizer.load(
        write_json(tmp_path, SPECIALS[:2], config={"mask_token_id": 400})
    ).fingerprint
    two = tokenizer.load(
        write_json(tmp_path, SPECIALS[:2], config={"mask_token_id": 401})
    ).fingerprint
    assert one != two


def test_unreadable_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json and no tokenizer.model"):
        tokenizer.load(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        for content in (b"", b"{}", b"garbage"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} cannot be read") as e:
                tokenizer.load(tmp_path / name)
            assert "\n" not in str(e.value)


def test_trained_pieces(trained):
    t = tokenizer.load(trained)
    assert t.vocab_size == 320
    digits = t.encode("0123456789")
    assert len(digits) == len(set(digits)) == 10  # each one token, seen in training or not
    assert len(t.encode("\n")) == 1


def test_train_command(tmp_path, capsys):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": line + "\nsecond line"}) + "\n" for line in CORPUS)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "more text here"}))
    arguments = ["train", f"--input=jsonl:{tmp_path}/*.jsonl*", f"--out={tmp_path}/out"]
    assert run_command(command, *arguments, "--vocab_size=310") == 0
    assert "310 ids" in capsys.readouterr().out
    assert tokenizer.load(tmp_path / "out").vocab_size == 310
    for words, message in (
        ([*arguments, "--vocab_size=100000"], "error: vocab_size=100000 cannot be trained"),
        ([*arguments, "--field=prose"], "a.jsonl.gz:1 is no JSON object with a field 'prose'"),
        (["train", f"--input={tmp_path}/nothing*"], "no file matches"),
    ):
        assert message in refusal(capsys, command, *words)
