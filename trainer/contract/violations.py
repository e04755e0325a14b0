"""Why a spec is refused: the field's path, the value found, and the bound with its reason.

One form for what pydantic finds and for what we check ourselves, so that every caller (command
line, gRPC's BadRequest, a log line) shows the same sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

SHOWN_VALUE_CHARS = 120  # a value is quoted up to here


@dataclass(frozen=True)
class Violation:
    """One thing wrong with a spec."""

    field: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.describe()}"

    def describe(self) -> str:
        """The sentence without the field's path: the value, then the reason."""
        if self.value is MISSING:
            return self.reason
        shown = repr(self.value)
        if len(shown) > SHOWN_VALUE_CHARS:
            shown = shown[:SHOWN_VALUE_CHARS] + "..."
        return f"{shown}: {self.reason}"


class _Missing:
    def __repr__(self) -> str:
        return "(not given)"


MISSING = _Missing()


class SpecError(ValueError):
    """A spec to correct and send again; nothing was created. Carries every violation found."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(str(violation) for violation in violations))
        self.violations = tuple(violations)


def from_pydantic(error: ValidationError) -> list[Violation]:
    """Every violation that pydantic found, in the order of the spec's fields."""
    found = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or "spec"
        match item["type"]:
            case "extra_forbidden":
                found.append(Violation(path, item["input"], "is not a field of the spec"))
            case "missing":
                found.append(Violation(path, MISSING, "must be given"))
            case _:
                reason = item["msg"].removeprefix("Value error, ")
                found.append(Violation(path, item["input"], reason[:1].lower() + reason[1:]))
    return found
