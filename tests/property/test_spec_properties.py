"""Any spec survives its plain form and the wire; any garbage is refused as SpecError."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.specs import spec_dict_from_proto, spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from trainer.contract.spec import Anchor, Compile, Compute, Embeddings, JobSpec
from trainer.contract.violations import SpecError

rates = st.floats(0, 1e6)
counts = st.integers(0, 2**31 - 1)


@st.composite
def spec_dicts(draw: st.DrawFn) -> dict[str, Any]:
    seq_len, rows, workers = (draw(st.integers(2, 512)) for _ in range(3))
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "smear_lr")
    optional = {
        "start": {"from": draw(st.sampled_from(["JOB@5", "JOB@latest", "nanochat:/a b@7"]))},
        "optimizer": {name: draw(rates) for name in names} | {"grad_clip_norm": 1.5},
        "compile": draw(st.sampled_from([*Compile, *(f"COMPILE_{c.upper()}" for c in Compile)])),
        "priority": draw(st.integers(-1000, 1000)),
        "preemptible": draw(st.booleans()),
        "deterministic": draw(st.booleans()),
        "precision": {
            "compute": draw(st.sampled_from(Compute)).value,
            "embeddings": draw(st.sampled_from(Embeddings)).value,
        },
        "checkpoint": {"every_steps": draw(counts), "keep_last": draw(st.integers(2, 10_000))},
        "schedule": {
            "num_iterations": draw(st.integers(1, 2**31 - 1)),
            "warmdown_ratio": draw(st.floats(0, 1)),
            "anchor": draw(st.sampled_from([Anchor.HORIZON, Anchor.SEGMENT])).value,
        },
    }
    kept = draw(st.sets(st.sampled_from(sorted(optional))))
    return {
        "model": {"max_seq_len": seq_len, "window_pattern": draw(st.text("SLsl", min_size=1))},
        "batch": {"device_batch_size": rows, "total_batch_size": seq_len * rows * workers},
        "resources": {"workers": {"min": workers, "max": workers + draw(st.integers(0, 9))}},
        "evaluate": {"tokens": seq_len + draw(st.integers(0, 10**6))},
        **{key: optional[key] for key in kept},
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
sections = st.sampled_from(sorted(JobSpec.model_fields))
garbage = st.dictionaries(
    sections | st.text(),
    json_values
    | st.dictionaries(st.sampled_from(["depth", "from", "min", "anchor", "source"]), json_values),
)


@given(spec_dicts())
def test_a_spec_survives_its_plain_form_and_the_wire(data: dict[str, Any]) -> None:
    spec = JobSpec.parse(data)
    assert JobSpec.parse(spec.to_dict()) == spec
    sent = pb.JobSpec.FromString(spec_to_proto(spec).SerializeToString())
    assert JobSpec.parse(spec_dict_from_proto(sent)) == spec


@given(garbage)
def test_garbage_is_a_spec_or_a_spec_error_with_violations(data: dict[str, Any]) -> None:
    try:
        spec = JobSpec.parse(data)
    except SpecError as error:
        refusal = error
    else:
        assert JobSpec.parse(spec.to_dict()) == spec
        return
    assert refusal.violations
    assert all(violation.field and violation.describe() for violation in refusal.violations)


@given(st.dictionaries(st.integers() | st.tuples(st.integers()), st.integers(), min_size=1))
def test_keys_that_are_no_names_are_refused(data: dict[Any, Any]) -> None:
    with pytest.raises(SpecError):
        JobSpec.parse(data)
