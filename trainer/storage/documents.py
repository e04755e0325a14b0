"""JSON documents in a bucket: one way to write and read them, strict and reproducible.

Knows no store and no particular document.

Invariant: `decode(encode(document)) == document`, equal documents have equal bytes, and what does
not fit the model whole is refused with the document's name, the field and the reason.
"""

from __future__ import annotations

import hashlib
import json
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

FORMAT_VERSION = 1


class DocumentError(ValueError):
    """A stored document can't be used: torn, edited, or of a newer format."""


class Record(BaseModel):
    """A part of a document: frozen, strict types, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Document(Record):
    """A whole stored object, with the version of its format."""

    error: ClassVar[type[DocumentError]] = DocumentError

    format_version: int = FORMAT_VERSION

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, shortest exact floats."""
        try:
            text = json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False)
        except ValueError as error:
            raise self.error(f"{type(self).__name__} holds a number that JSON has not") from error
        return text.encode() + b"\n"

    @classmethod
    def decode(cls, raw: bytes, name: str) -> Self:
        """Parse strictly; name is said in the error (an object's key or path)."""
        try:
            fields = json.loads(raw)
        except ValueError as error:
            raise cls.error(f"{name} is not JSON: {error}") from error
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise cls.error(
                f"{name} has format_version {version!r}; this Everstep reads {FORMAT_VERSION}"
            )
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise cls.error(f"{name}: {where}: {first['msg']}") from error


def sha256_hex(data: bytes) -> str:
    """The digest form used in every document."""
    return hashlib.sha256(data).hexdigest()
