"""The documents of a bucket: exact there and back, strict about what they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.checkpoints import JOB, MOMENT, manifest_for, ref_to
from trainer.storage.documents import DocumentError
from trainer.storage.manifest import Claim, JobDocument, Manifest, ManifestError, Part

PART = Part(name="part-00000.safetensors", size_bytes=3, sha256="a" * 64, tensors=("w",))
MANIFEST = manifest_for(ref_to(7), [PART], bpb=0.1 + 0.2)


def test_a_manifest_comes_back_equal_and_to_the_digit() -> None:
    raw = MANIFEST.encode()
    again = Manifest.decode(raw, "m")
    assert again == MANIFEST
    assert again.encode() == raw
    assert again.validation_bpb == 0.1 + 0.2
    assert str(again.ref) == "JOB@7"


def test_other_documents_come_back_equal() -> None:
    claim = Claim(attempt=2, start=ref_to(5), host="h", nonce="n", created_at=MOMENT)
    assert Claim.decode(claim.encode(), "c") == claim
    job = JobDocument(job_id=JOB, spec={"name": "x", "model": {"depth": 4}}, created_at=MOMENT)
    assert JobDocument.decode(job.encode(), "j") == job


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update(values)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (change(format_version=2), "format_version 2"),
        (lambda fields: fields.pop("format_version"), "format_version None"),
        (change(step="7"), "step"),
        (change(step=-1), "step"),
        (change(surprise=1), "surprise"),
        (lambda fields: fields.pop("parts"), "parts"),
        (change(parts=[]), "parts"),
        (lambda fields: fields["parts"].append(fields["parts"][0]), "one name"),
        (lambda fields: fields["parts"][0].update(name="../x"), "part-00000"),
        (lambda fields: fields["parts"][0].update(sha256="A" * 64), "sha256"),
        (change(created_at="2026-01-02T03:04:05"), "created_at"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    edit: Callable[[dict[str, Any]], None], said: str
) -> None:
    fields = json.loads(MANIFEST.encode())
    edit(fields)
    with pytest.raises(ManifestError, match=said):
        Manifest.decode(json.dumps(fields).encode(), "jobs/J/manifest.json")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", MANIFEST.encode()[:-20]])
def test_a_torn_manifest_is_refused_by_name(raw: bytes) -> None:
    with pytest.raises(ManifestError, match=r"the/key"):
        Manifest.decode(raw, "the/key")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_has_not_is_never_written(number: float) -> None:
    with pytest.raises(DocumentError):
        MANIFEST.model_copy(update={"state": {"loss": number}}).encode()


def test_a_part_describes_its_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    part = Part.of_file(tmp_path / "f", "part-00000.safetensors")
    assert part.size_bytes == 3
    assert part.sha256.startswith("ba7816bf")
