"""Keys of the bucket and back."""

from __future__ import annotations

import pytest

from trainer.storage import layout


def test_keys_are_those_of_the_design() -> None:
    assert layout.spec_key("J1") == "jobs/J1/spec.json"
    assert layout.claim_key("J1", 12) == "jobs/J1/attempts/12.json"
    assert layout.manifest_key("J1", 200000, 3) == "jobs/J1/checkpoints/0000200000/3/manifest.json"
    assert (
        layout.part_key("J1", 7, 1, layout.part_name(2))
        == "jobs/J1/checkpoints/0000000007/1/part-00000-00002.safetensors"
    )


def test_what_a_key_function_writes_parses_back() -> None:
    assert layout.parse_claim(layout.claim_key("J1", 12)) == layout.ClaimKey("J1", 12)
    assert layout.parse_too_large(layout.too_large_key("J1", 3, 16)) == 16
    assert layout.parse_claim(layout.too_large_key("J1", 3, 16)) is None
    assert layout.parse_too_large(layout.claim_key("J1", 3)) is None
    for file in (layout.MANIFEST, layout.part_name(0), layout.share_name(3)):
        key = layout.checkpoint_prefix("J1", 5, 2) + file
        assert layout.parse_checkpoint(key) == layout.CheckpointKey("J1", 5, 2, file)


@pytest.mark.parametrize(
    "key",
    [
        "jobs/J1/attempts/0.json",
        "jobs/J1/attempts/01.json",
        "jobs/J1/attempts/1.json.tmp",
        "jobs/J1/checkpoints/5/1/manifest.json",
        "jobs/J1/checkpoints/0000000005/0/manifest.json",
        "jobs/J1/checkpoints/0000000005/1/other.json",
        "jobs/J1/checkpoints/0000000005/1/part-..safetensors",
        "x/jobs/J1/attempts/1.json",
        "jobs/J-1/attempts/1.json",
    ],
)
def test_foreign_keys_are_not_ours(key: str) -> None:
    assert layout.parse_claim(key) is None
    assert layout.parse_checkpoint(key) is None


def test_the_order_of_keys_is_the_order_of_steps() -> None:
    steps = [0, 9, 10, 999, 1000, 10**9, layout.MAX_STEP]
    prefixes = [layout.checkpoint_prefix("J", step, 1) for step in steps]
    assert prefixes == sorted(prefixes)
