"""The job spec: whole with every default, or refused with everything that is wrong."""

from typing import Any

import pytest

from trainer.contract.spec import Anchor, Compile, Compute, Embeddings, JobSpec, Sizing
from trainer.contract.violations import SpecError, Violation


def refused(data: dict[str, Any]) -> dict[str, str]:
    """Field to sentence of every violation."""
    with pytest.raises(SpecError) as caught:
        JobSpec.parse(data)
    return {violation.field: violation.describe() for violation in caught.value.violations}


def test_an_empty_spec_is_d12_on_one_gpu_and_survives_a_round_trip() -> None:
    spec = JobSpec.parse({})
    assert (spec.name, spec.model.n_embd, spec.batch.total_batch_size) == ("d12", 768, 65536)
    assert spec.grad_accum_steps(1) == 4
    plain = spec.to_dict()
    assert JobSpec.parse(plain) == spec
    assert "grad_clip_norm" not in plain["optimizer"]  # off, so absent
    assert "from" not in plain["start"]


def test_every_violation_is_told_at_once_with_its_value() -> None:
    found = refused(
        {
            "name": "no spaces please",
            "model": {"depth": "twelve", "heads": 6},
            "optimizer": {"matrix_lr": -1.0, "scalar_lr": float("nan")},
            "schedule": {"warmdown_ratio": 1.5, "anchor": "middle"},
            "evaluate": {"tokens": 0},
            "wheels": 4,
        }
    )
    assert set(found) == {
        "name",
        "model.depth",
        "model.heads",
        "optimizer.matrix_lr",
        "optimizer.scalar_lr",
        "schedule.warmdown_ratio",
        "schedule.anchor",
        "evaluate.tokens",
        "wheels",
    }
    assert found["model.depth"].startswith("'twelve': ")
    assert "1.5" in found["schedule.warmdown_ratio"]
    assert found["wheels"] == "4: is not a field of the spec"
    assert "horizon, segment, continue" in found["schedule.anchor"]


def test_contradictions_between_valid_sections_are_told_beside_broken_ones() -> None:
    found = refused(
        {
            "sample": {"every": -1},
            "batch": {"device_batch_size": 3},
            "resources": {"workers": {"min": 3, "max": 2}},
            "schedule": {"anchor": "continue"},
            "evaluate": {"tokens": 100},
        }
    )
    assert set(found) == {
        "sample.every",
        "batch.total_batch_size",
        "resources.workers.min",
        "schedule.anchor",
        "evaluate.tokens",
    }


def test_a_batch_that_does_not_divide_names_the_multiple_it_must_be_of() -> None:
    found = refused({"batch": {"total_batch_size": 65537}})
    assert found["batch.total_batch_size"] == (
        "65537: must be a multiple of 16384 tokens (device_batch_size 8 x max_seq_len 2048)"
    )
    workers = refused({"resources": {"workers": {"min": 3, "max": 3}}})
    assert "x workers.min 3" in workers["batch.total_batch_size"]
    none = refused({"resources": {"workers": {"min": 5, "max": 7}}})
    assert none["batch.total_batch_size"] == (
        "65536: no number of workers from 5 to 7 divides its 4 micro-batches of 16384 tokens"
    )


def test_of_a_range_those_numbers_are_possible_that_divide_the_step() -> None:
    def possible(low: int, high: int) -> tuple[int, ...]:
        workers = {"resources": {"workers": {"min": low, "max": high}}}
        batch = {"batch": {"device_batch_size": 1, "total_batch_size": 12 * 2048}}
        return JobSpec.parse({**workers, **batch}).possible_workers

    assert possible(1, 8) == (1, 2, 3, 4, 6)
    assert possible(5, 100_000) == (6, 12), "its least doesn't divide, but another does"
    assert possible(4, 4) == (4,)


@pytest.mark.parametrize("value", [12.0, True, "12", None, [12]])
def test_a_whole_number_is_only_a_whole_number(value: object) -> None:
    assert set(refused({"model": {"depth": value}})) == {"model.depth"}


def test_enums_are_read_as_people_and_as_proto_json_spell_them() -> None:
    people = {
        "schedule": {"anchor": "segment"},
        "precision": {"compute": "fp32", "embeddings": "fp32"},
        "compile": "off",
        "resources": {"workers": {"policy": "grow"}},
    }
    wire = {
        "schedule": {"anchor": "ANCHOR_SEGMENT"},
        "precision": {"compute": "COMPUTE_FP32", "embeddings": "EMBEDDINGS_FP32"},
        "compile": "COMPILE_OFF",
        "resources": {"workers": {"policy": "SIZING_GROW"}},
    }
    spec = JobSpec.parse(people)
    assert spec == JobSpec.parse(wire)
    assert spec.schedule.anchor is Anchor.SEGMENT
    assert spec.precision.compute is Compute.FP32
    assert spec.precision.embeddings is Embeddings.FP32
    assert spec.resources.workers.policy is Sizing.GROW


def test_on_and_off_are_read_as_yaml_1_1_reads_them() -> None:
    assert JobSpec.parse({"compile": True}).compile is Compile.ON
    assert JobSpec.parse({"compile": False}).compile is Compile.OFF


@pytest.mark.parametrize(
    "name",
    ["JOB", "@5", "JOB@", "JOB@-1", "JOB@5x", "JO B@5", "a" * 65 + "@5", "JOB@5\n", "nanochat:@5"],
)
def test_a_start_that_names_no_checkpoint_is_refused(name: str) -> None:
    assert set(refused({"start": {"from": name}})) == {"start.from"}


@pytest.mark.parametrize("name", ["JOB@5", "JOB@latest", "nanochat:/runs/d12@000200"])
def test_a_start_names_a_checkpoint(name: str) -> None:
    assert JobSpec.parse({"start": {"from": name}}).start.from_ == name


@pytest.mark.parametrize("uri", ["corpus", "http://x/y", "file:relative", "s3://", "file:/a\0b"])
def test_data_at_no_address_is_refused(uri: str) -> None:
    found = refused({"data": {"source": uri, "tokenizer": uri}})
    assert set(found) == {"data.source", "data.tokenizer"}


def test_a_violation_quotes_no_more_of_a_value_than_it_must() -> None:
    text = Violation("name", "x" * 10_000, "is too long").describe()
    assert len(text) < 200
    assert text.endswith("...: is too long")
