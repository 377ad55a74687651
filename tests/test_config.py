"""Configurations: every good one loads, every kind of mistake has its message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from anytimed.config import Config, explain, load
from anytimed.contracts import ConfigError
from anytimed.service.assembly import parts_of
from tests import standin

ROOT = Path(__file__).parent.parent
BAD = sorted((Path(__file__).parent / "configs_bad").glob("*.toml"))
GOOD = sorted((ROOT / "configs").rglob("*.toml"))
QUICKSTART = ROOT / "configs" / "quickstart.toml"


@pytest.mark.parametrize("path", BAD, ids=lambda p: p.stem)
def test_every_mistake_has_its_message(path: Path) -> None:
    expected = path.read_text().splitlines()[0].removeprefix("# expect: ")
    with pytest.raises(ConfigError) as caught:
        parts_of(load(path))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value), "the message names the file"
    assert len(str(caught.value).splitlines()) == 1, "one mistake, one line"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", GOOD, ids=lambda p: p.stem)
def test_every_config_of_the_project_loads(path: Path, tmp_path: Path) -> None:
    load(path)
    parts_of(load(standin.at_home(path, tmp_path)))


def test_there_are_configs() -> None:
    assert GOOD
    assert len(BAD) > 20


def test_the_starter_loads_and_its_commented_lines_are_the_defaults(tmp_path: Path) -> None:
    """Uncommenting a line that shows a default changes nothing."""
    starter = ROOT / "daemon/anytimed/starter.toml"
    plain = load(starter)
    parts_of(plain)
    shows_default = (
        "seed", "device", "threads", "precision", "deterministic", "compile", "prefetch_batches", "discover",
        "fraction", "shuffle_block_sequences", "max_tokens", "record_tokens", "clip_grad_norm", "keep = ", "dtype",
        "delete_after_s", "max_shard_bytes", "drain_s", "every_steps = 10 ", "every_steps = 100 ", "every_s = 300",
        "weight = ",
    )  # fmt: skip
    lines = [
        line.removeprefix("# ") if line.removeprefix("# ").startswith(shows_default) and line.startswith("# ") else line
        for line in starter.read_text().splitlines()
    ]
    changed = tmp_path / "uncommented.toml"
    changed.write_text("\n".join(lines))
    assert changed.read_text().count("\n# ") < starter.read_text().count("\n# ") - 20
    assert load(changed).digest() == plain.digest()


def test_a_config_based_on_another_takes_what_it_does_not_give_itself(tmp_path: Path) -> None:
    below, above = tmp_path / "below" / "base.toml", tmp_path / "above" / "over.toml"
    for path in (below, above):
        path.parent.mkdir()
    below.write_text(QUICKSTART.read_text() + 'storage_options = { key = "planted" }\n')
    above.write_text(
        'based_on = "../below/base.toml"\nwithout = ["exports.storage_options", "data.holdout.fraction", "no.such"]\n'
        '[run]\ndirectory = "elsewhere"\n[data]\ndiscover = { every_s = 3.0 }\n'
    )
    plain, found = load(below), load(above)
    assert found.run.directory == "elsewhere" and found.run.seed == plain.run.seed
    assert found.data.discover.every_s == 3.0 and found.data.batch_size == plain.data.batch_size
    assert found.data.holdout.fraction == 0.01 and found.data.holdout.max_tokens == plain.data.holdout.max_tokens
    assert plain.exports.storage_options and not found.exports.storage_options
    assert found.path == above and found.folder.resolve() == below.parent == plain.folder


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('based_on = "c.toml"', 'based_on: found "c.toml"'),
        ('based_on = "d/../c.toml"', "allowed: another file"),
        ("based_on = 3", "found 3"),
        ('based_on = "c.toml"\nwithout = "x"', 'without "x"'),
        ('based_on = "none.toml"', "none.toml: no such file"),
    ],
)
def test_a_config_based_on_nothing_good_says_so(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.toml")
    assert told in str(caught.value)


def test_several_mistakes_are_all_told(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        (BAD[0].parent / "out_of_range.toml").read_text().replace("sequence_length = 32", "sequence_length = -1")
    )
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_says_how_to_begin(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="anytimed init"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)
def test_a_configuration_comes_back_as_it_was_sent(path: Path) -> None:
    config = load(path)
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config and again.digest() == config.digest()
    assert again.path == config.path.absolute() and again.folder == config.folder.absolute()


def test_configs_are_frozen_and_the_digest_ignores_secrets() -> None:
    config = load(QUICKSTART)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 2  # type: ignore[misc]
    told = config.model_dump()
    told["exports"]["storage_options"] = {"key": "planted"}
    other = Config.model_validate(told)
    assert other.digest() == config.digest()
    assert config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})}).digest() != config.digest()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=8), c, max_size=3),
    )
)
def test_any_value_anywhere_is_an_error_with_a_message(value: object) -> None:
    """Whatever stands where a table or number belongs, the result is a config or lines that name the file."""
    for path in (
        ("data",),
        ("data", "batch_size"),
        ("sources",),
        ("sources", "main"),
        ("exports", "cron"),
        ("commits",),
    ):
        data = load(QUICKSTART).model_dump()
        inner = data
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
        try:
            Config.model_validate(data)
        except ValidationError as error:
            assert explain(error, Config, data, "f.toml").startswith("f.toml:")
