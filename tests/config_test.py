"""Config sections: keys, defaults, refusals and comments from settings dataclasses."""

import dataclasses

import pytest
from helpers import ROOT, config_of

from configs import base
from llada_jax import config
from llada_jax.config import key
from llada_jax.objectives import OBJECTIVES
from llada_jax.train import settings


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5  # a share
    count: int = 1

    def __post_init__(self):
        config.at_least(self, count=1)


@dataclasses.dataclass(frozen=True)
class Outer:
    # a name
    # of two lines
    name: str = "a"
    inner: Inner = Inner(rate=0.25)
    table: dict = dataclasses.field(default_factory=dict)
    chunk: int = key(0, changes_result=False)  # moves memory
    seed: int = key(7, given=True)

    def __post_init__(self):
        config.one_of(self, name=("", "a", "b"))


def test_a_section_has_the_fields_side_by_side():
    section = config.section(Outer, count=3)
    assert section.to_dict() == {"name": "a", "rate": 0.25, "count": 3, "table": {}, "chunk": 0}
    section.rate = 1  # a whole number serves as a float
    section.table = {"x": 1}
    built = config.build(Outer, section, "config.outer.", seed=9)
    assert built == Outer("a", Inner(1.0, 3), {"x": 1}, 0, 9)
    assert isinstance(built.inner.rate, float) and isinstance(built.table, dict)


def test_a_key_without_a_value_takes_one_of_its_type():
    comment = config.key(None, comment="from elsewhere")
    made = dataclasses.make_dataclass("Made", [("most", int | None, comment)], frozen=True)
    section = config.section(made)
    assert section.most is None and section.get_type("most") is int
    assert config.build(made, section, "").most is None
    section.most = 3
    assert config.build(made, section, "").most == 3
    with pytest.raises(TypeError):
        section.most = "3"
    assert list(config.keys(made)) == [("most", None, "from elsewhere")]


def test_comments_are_those_of_the_source():
    comments = {name: comment for name, _, comment in config.keys(Outer)}
    assert comments["name"] == "a name of two lines" and comments["chunk"] == "moves memory"
    assert comments["rate"] == "a share" and comments["count"] == "" and "seed" not in comments


def test_identity_leaves_out_what_changes_no_result():
    assert config.identity(Outer()) == {
        "name": "a",
        "rate": 0.25,
        "count": 1,
        "table": {},
        "seed": 7,
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "c"}, "config.outer.name='c' is not one of '', a, b"),
        ({"count": 0}, "config.outer.count=0 must be at least 1"),
        ({"rate": float("nan")}, "config.outer.rate=nan is no finite number"),
        ({"rate": float("inf")}, "config.outer.rate=inf is no finite number"),
    ],
)
def test_a_refusal_names_the_key(change, message):
    section = config.section(Outer)
    section.update(change)
    with pytest.raises(ValueError) as error:
        config.build(Outer, section, "config.outer.")
    assert str(error.value) == message


def test_another_type_is_refused():
    section = config.section(Outer).copy_and_resolve_references()
    with section.ignore_type():
        section.count = "3"
    with pytest.raises(ValueError, match="config.outer.count='3' is str, not int"):
        config.build(Outer, section, "config.outer.")


def test_sections_refuse_what_they_do_not_have():
    with pytest.raises(TypeError, match="nothing: no key of"):
        config.section(Outer, nothing=1)
    with pytest.raises(TypeError, match="two settings of one section have a key rate"):
        config.section(Outer, Inner)
    with pytest.raises(AttributeError, match='Did you mean "count"'):
        config.section(Outer).coun = 1


# ---- the keys of an experiment


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_key_has_a_comment_and_is_read(objective):
    c = base.get_config(objective)
    described = settings.describe_keys(c)
    for path in dict(flat(c)):
        (line,) = (x for x in described.splitlines() if x.startswith(f"  {path}="))
        assert line.split("=", 1)[1].count("  "), f"{path} has no comment"
    read = settings.read(c, dry_run=True) if objective != "vrpo" else None
    assert objective == "vrpo" or read.objective is OBJECTIVES[objective]


def flat(c, prefix=""):
    for name in c:
        value = c[name]
        if hasattr(value, "keys") and name != "arch":
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_the_experiments_of_configs_can_be_read(path):
    import importlib

    module = importlib.import_module(f"configs.{path.stem}")
    if path.stem == "base":
        return
    c = module.get_config()
    if not c.init_from and c.objective == "vrpo":  # a model of the user's
        c.init_from = "somewhere"
    assert settings.read(c).run.objective == c.objective


def test_the_keys_of_the_documents_are_those_of_the_code():
    text = (ROOT / "docs" / "training.md").read_text()
    table = text.partition("<!-- keys: begin -->\n")[2].partition("<!-- keys: end -->")[0]
    expected = "\n".join(settings.describe_keys().splitlines()[2:])
    assert table == f"```\n{expected}\n```\n", "python -m llada_jax.train --help has other keys"


def test_what_two_sections_say_must_agree():
    c = config_of({"objective": "sft", "data.heldout": "jsonl:a", "data.holdout": 0.1})
    with pytest.raises(ValueError, match="config.data.heldout=jsonl:a and holdout=0.1 both say"):
        settings.read(c)
