"""One spec in three forms: DESIGN's YAML block, everstep.v1.JobSpec, and the validated one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pydantic import BaseModel

from everstep.specs import ENUM_FIELDS, dict_to_proto, spec_dict_from_proto, spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError

ROOT = Path(__file__).parents[2]
PROTO = (ROOT / "proto/everstep/v1/everstep.proto").read_text()
# The block of the design that defines the spec, as it stands there.
DESIGN_BLOCK = """
name: d12-continue
model:    {depth: 12, aspect_ratio: 64, head_dim: 128, max_seq_len: 2048, window_pattern: L}
data:     {source: s3://corpus/climbmix, tokenizer: s3://corpus/tokenizer, validation: last, order_seed: 0}
batch:    {device_batch_size: 8, total_batch_size: 65536}
optimizer: {embedding_lr: 0.018, unembedding_lr: 0.00048, matrix_lr: 0.0012, scalar_lr: 0.03, smear_lr: 0.2, weight_decay: 0.28}
schedule: {num_iterations: 300000, warmup_steps: 0, warmdown_ratio: 0.0, final_lr_frac: 0.05, anchor: horizon}
start:    {init_seed: 42}
guards:   {max_lr_jump: 2.0, allow_lr_jump: false}
evaluate: {every: 250, tokens: 41943040}
sample:   {every: 2000}
checkpoint: {every_steps: 1000, every_s: 900, keep_last: 3, keep_every_steps: 10000, keep_best: true}
resources: {workers: {min: 1, max: 1, policy: fixed, cooldown_s: 300}, gpus_per_worker: 1, cpus_per_worker: 2, wait_for_nodes: false}
precision: {compute: bf16, embeddings: compute}
compile: auto
deterministic: true
priority: 0
preemptible: false
"""  # noqa: E501
# Fields without a value of their own: their comments say what stands for them.
WORDED = {
    "model.n_kv_head",
    "model.vocab_size",
    "optimizer.grad_clip_norm",
    "start.from",
    "resources.gpu_type",
}


def proto_fields(message: Descriptor, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            yield from proto_fields(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def model_fields(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from model_fields(inner, f"{path}.")
        else:
            yield path


def leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def documented_defaults() -> dict[str, str]:
    """Path to the `Default:` of each field's comment in the .proto."""
    found: dict[str, str] = {}
    for path, field in proto_fields(pb.JobSpec.DESCRIPTOR):
        body = re.search(rf"^message {field.containing_type.name} {{\n(.*?)^}}", PROTO, re.M | re.S)
        assert body is not None
        line = re.search(
            rf"((?:^  //.*\n)+)^  (?:optional )?[\w.]+ {field.name} = \d+;", body[1], re.M
        )
        assert line is not None, path
        text = " ".join(part.strip().removeprefix("//") for part in line[1].splitlines())
        if default := re.search(r"Default: (.+?)\.?\s*$", text):
            found[path] = default[1]
    return found


def test_the_three_forms_have_the_same_fields() -> None:
    wire = {path for path, _ in proto_fields(pb.JobSpec.DESCRIPTOR)}
    assert wire == set(model_fields(JobSpec))
    assert wire - WORDED == {path for path, _ in leaves(yaml.safe_load(DESIGN_BLOCK))}


def test_the_design_block_is_what_an_empty_spec_means() -> None:
    block = yaml.safe_load(DESIGN_BLOCK)
    assert JobSpec.parse({**block, "name": "d12"}) == JobSpec.parse({})


def test_the_proto_documents_the_defaults_that_apply() -> None:
    documented = documented_defaults()
    for path, value in leaves(JobSpec.parse({}).to_dict()):
        said = documented[path]
        if isinstance(value, bool):
            assert said == str(value).lower(), path
        elif isinstance(value, int | float):
            assert float(said) == value, path
        else:
            assert said == value, path


def test_every_enum_field_of_the_wire_is_spelled_for_people() -> None:
    enums = {
        path for path, field in proto_fields(pb.JobSpec.DESCRIPTOR) if field.enum_type is not None
    }
    assert enums == {".".join(path) for path in ENUM_FIELDS}


def test_every_field_is_optional_so_that_absent_is_not_zero() -> None:
    assert all(field.has_presence for _, field in proto_fields(pb.JobSpec.DESCRIPTOR))
    assert spec_dict_from_proto(pb.JobSpec()) == {}
    said = pb.JobSpec(schedule=pb.ScheduleSpec(warmup_steps=0), deterministic=False)
    assert spec_dict_from_proto(said) == {"schedule": {"warmup_steps": 0}, "deterministic": False}


def test_a_part_of_a_spec_stays_a_part_on_the_wire() -> None:
    part = {"optimizer": {"matrix_lr": 0.5}, "compile": "off", "start": {"from": "JOB@7"}}
    plain = spec_dict_from_proto(dict_to_proto(part))
    assert plain == {**part, "compile": "COMPILE_OFF"}


def test_doubles_are_the_same_to_the_last_bit() -> None:
    spec = JobSpec.parse({"optimizer": {"matrix_lr": 0.1 + 0.2, "scalar_lr": 5e-324}})
    assert JobSpec.parse(spec_dict_from_proto(spec_to_proto(spec))) == spec


@pytest.mark.parametrize(
    "message",
    [
        pb.JobSpec(compile=99),  # type: ignore[arg-type]
        pb.JobSpec(optimizer=pb.OptimizerSpec(matrix_lr=float("inf"))),
        pb.JobSpec(optimizer=pb.OptimizerSpec(matrix_lr=float("nan"))),
    ],
)
def test_what_the_wire_carries_but_the_spec_does_not_allow_is_refused(message: pb.JobSpec) -> None:
    with pytest.raises(SpecError):
        JobSpec.parse(spec_dict_from_proto(message))


@pytest.mark.parametrize("data", [{"depht": 1}, {"model": {"depth": "x"}}, {"compile": "maybe"}])
def test_what_the_wire_can_not_carry_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        dict_to_proto(data)
