"""Job specs between people (YAML, JSON), the wire, and the validated form.

The one place where a spec's enums are spelled: people write `bf16`, proto JSON COMPUTE_BF16; both
are read everywhere. Imports only the contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf import json_format
from pydantic import ValidationError

from everstep.errors import InvalidSpecError
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError, Violation, from_pydantic

# A validated spec, the part of one that somebody wrote down, or the message itself.
AnySpec = JobSpec | Mapping[str, Any] | pb.JobSpec

# Fields of the spec that are enums on the wire, with their prefix there.
ENUM_FIELDS = {
    ("schedule", "anchor"): "ANCHOR",
    ("precision", "compute"): "COMPUTE",
    ("precision", "embeddings"): "EMBEDDINGS",
    ("compile",): "COMPILE",
    ("resources", "workers", "policy"): "SIZING",
}


def spec_to_proto(spec: JobSpec) -> pb.JobSpec:
    """A validated spec on the wire, every field set."""
    # Quicker than from JSON by far, which a page of jobs notices; nothing is left to be refused.
    return pb.JobSpec(**_with_wire_enums(spec.to_dict()))


def dict_to_proto(data: dict[str, Any]) -> pb.JobSpec:
    """A spec, or the part of one that somebody wrote down, on the wire; absent stays absent.

    Raises:
        SpecError: a field that is unknown, or of a type that the wire can't carry. What it can
            carry but the spec doesn't allow is for `JobSpec.parse`.
    """
    try:
        return json_format.ParseDict(_with_wire_enums(data), pb.JobSpec())
    except json_format.ParseError as error:
        raise SpecError([Violation("spec", data, str(error))]) from error


def _with_wire_enums(data: dict[str, Any]) -> dict[str, Any]:
    """The same with enums spelled as on the wire; data is not altered."""
    plain = _copied(data)
    for path, prefix in ENUM_FIELDS.items():
        holder: Any = plain
        for key in path[:-1]:
            holder = holder.get(key)
            if not isinstance(holder, dict):
                break
        else:
            value = holder.get(path[-1])
            if isinstance(value, bool):
                value = "on" if value else "off"
            if isinstance(value, str) and not value.upper().startswith(prefix + "_"):
                holder[path[-1]] = f"{prefix}_{value.upper()}"
    return plain


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same, section by section, to change."""
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in data.items()}


def spec_dict_from_proto(message: pb.JobSpec) -> dict[str, Any]:
    """What a message sets, as plain values for `JobSpec.parse`; what it doesn't set is absent."""
    plain: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for path, prefix in ENUM_FIELDS.items():
        holder = plain
        for key in path[:-1]:
            holder = holder.get(key, {})
        if holder.get(path[-1]) == f"{prefix}_UNSPECIFIED":
            del holder[path[-1]]
    return plain


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """changes over base, section by section; neither is altered."""
    result = dict(base)
    for key, new in changes.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(new, Mapping)
        result[key] = merged(old, new) if both else new  # type: ignore[arg-type]
    return result


def spec_message(spec: AnySpec, inherit: bool) -> pb.JobSpec:
    """A spec on the wire; InvalidSpecError where that can already be told here."""
    if isinstance(spec, JobSpec):
        return spec_to_proto(spec)
    if isinstance(spec, pb.JobSpec):
        return spec
    try:
        _check(spec, inherit)
        return dict_to_proto(dict(spec))
    except SpecError as error:
        raise InvalidSpecError.of(error) from None


def _check(spec: Mapping[str, Any], inherit: bool) -> None:
    """Refuse what the wire couldn't carry or would change: unknown fields, wrong types, nulls."""
    if not inherit:
        JobSpec.parse(spec)
        return
    # Contradictions between fields can only be told with the parent's values: the service does.
    found = [
        Violation(field, None, "a value of the parent's can be replaced, not taken away")
        for field in _nulls(spec)
    ]
    try:
        JobSpec.model_validate(dict(spec))
    except ValidationError as error:
        found += [item for item in from_pydantic(error) if item.value is not None]
    if found:
        raise SpecError(found)


def _nulls(spec: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in spec.items():
        if value is None:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            yield from _nulls(value, f"{prefix}{key}.")
