"""YAML and settings as people write them."""

from __future__ import annotations

import pytest

from everstep.spec_text import SpecTextError, read_setting, read_spec
from everstep.specs import merged


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("no", "no"),
        ("1e-3", 0.001),
        ("1E5", 100_000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("300_000", 300_000),
        ("-3", -3),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1'", "1"),
        ("", None),
        ("null", None),
        ("s3://bucket/a", "s3://bucket/a"),
    ],
)
def test_a_scalar_means_the_same_in_a_file_and_in_a_setting(text: str, value: object) -> None:
    in_file = read_spec(f"field: {text}", "x")["field"]
    in_setting = read_setting(f"field={text}")["field"]
    assert (in_file, type(in_file)) == (value, type(value))
    assert (in_setting, type(in_setting)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: 'a' is given twice"),
        ("model: {depth: 1, depth: 2}", "x.yaml:1: 'depth' is given twice"),
        ("a: 1\nb: [1", "x.yaml:2: "),
        ("a: 1\n\tb: 2", "x.yaml:2: "),
        ("- 1", "x.yaml: must be fields and values"),
        ("a: &n {b: *n}", "x.yaml:1: aliases"),
        ("a: !!python/name:os.system x", "x.yaml:1: "),
        ("? [1]\n: 2", "x.yaml:1: a key must be a word"),
        ("\x00", "x.yaml: "),
        ("a: " + "9" * 5000, "x.yaml: "),
    ],
)
def test_what_cannot_be_read_unambiguously_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(SpecTextError) as caught:
        read_spec(text, "x.yaml")
    assert str(caught.value).startswith(words)


def test_an_empty_file_sets_nothing() -> None:
    assert read_spec("# nothing yet\n", "x") == {}


@pytest.mark.parametrize("setting", ["x", "=3", "a..b=1", "a.=1", "a='x"])
def test_a_setting_that_is_none_is_refused(setting: str) -> None:
    with pytest.raises(SpecTextError):
        read_setting(setting)


def test_settings_go_as_deep_as_the_spec() -> None:
    deep = read_setting("resources.workers.min = 2")
    assert deep == {"resources": {"workers": {"min": 2}}}
    base = {"resources": {"workers": {"max": 4}, "gpus_per_worker": 0}, "name": "a"}
    assert merged(base, deep) == {
        "resources": {"workers": {"max": 4, "min": 2}, "gpus_per_worker": 0},
        "name": "a",
    }


def test_json_may_be_indented_by_tabs() -> None:
    assert read_spec('{\n\t"model": {\n\t\t"depth":\t12\n\t}\n}\n', "x") == {"model": {"depth": 12}}
    with pytest.raises(SpecTextError):
        read_spec("model:\n\tdepth: 12\n", "x")
