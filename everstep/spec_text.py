"""Specs as people write them: YAML files (JSON is YAML) and `section.field=value` settings.

Owns what a scalar means: only true and false are booleans (on, off, yes and no stay words), 1e-3 is
a number, 010 and 12:30 and dates are not. Knows no field of the spec.

Invariant: text is read whole and unambiguously (no duplicate key, no alias) or refused with the
line.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"


class SpecTextError(ValueError):
    """Text that isn't a spec; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """YAML with fewer surprises."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read here", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.add_constructor(f"{_TAG}int", _int)
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+"
        r"|[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*|\.[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_spec(text: str, name: str) -> dict[str, Any]:
    """The spec in a YAML or JSON text. name says in messages where the text is from.

    Raises:
        SpecTextError: not YAML, or not a mapping of fields.
    """
    if text.lstrip().startswith("{"):  # JSON may be indented by tabs, which YAML refuses
        text = text.replace("\t", " ")
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise SpecTextError(f"{where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise SpecTextError(f"{name}: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise SpecTextError(f"{name}: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecTextError(f"{name}: must be fields and values, as in `model: {{depth: 12}}`")
    return data


def read_scalar(text: str) -> Any:
    """One value by the same rules: a quoted string, or what a plain scalar means."""
    if text[:1] in ("'", '"'):
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise SpecTextError(f"{text}: quotes don't match") from error
        if not isinstance(value, str):
            raise SpecTextError(f"{text}: must be one value")
        return value
    loader = _Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:  # a number of too many digits
        raise SpecTextError(f"{text[:40]}: {error}") from error
    finally:
        loader.dispose()


def read_setting(setting: str) -> dict[str, Any]:
    """`section.field=value` as the part of a spec that it sets."""
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecTextError(f"{setting}: must be section.field=value")
    value = read_scalar(text.strip())
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value
