"""Job specs between people (YAML, JSON), the wire, and the validated form.

The one place where a spec's enums are spelled: people write `bf16`, proto JSON COMPUTE_BF16; both
are read everywhere. Imports only the contract.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from everstep.v1 import everstep_pb2 as pb
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError, Violation

# Fields of the spec that are enums on the wire, with their prefix there.
ENUM_FIELDS = {
    ("schedule", "anchor"): "ANCHOR",
    ("precision", "compute"): "COMPUTE",
    ("precision", "embeddings"): "EMBEDDINGS",
    ("compile",): "COMPILE",
}


def spec_to_proto(spec: JobSpec) -> pb.JobSpec:
    """A validated spec on the wire, every field set."""
    return dict_to_proto(spec.to_dict())


def dict_to_proto(data: dict[str, Any]) -> pb.JobSpec:
    """A spec, or the part of one that somebody wrote down, on the wire; absent stays absent.

    Raises:
        SpecError: a field that is unknown, or of a type that the wire can't carry. What it can
            carry but the spec doesn't allow is for `JobSpec.parse`.
    """
    plain = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
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
    try:
        return json_format.ParseDict(plain, pb.JobSpec())
    except json_format.ParseError as error:
        raise SpecError([Violation("spec", data, str(error))]) from error


def spec_dict_from_proto(message: pb.JobSpec) -> dict[str, Any]:
    """What a message sets, as plain values for `JobSpec.parse`; what it doesn't set is absent."""
    plain: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    for path, prefix in ENUM_FIELDS.items():
        holder = plain.get(path[0], {}) if len(path) > 1 else plain
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
