"""Any command line and any spec gives a plan or a refusal by name; values are finite."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from everstep.nanochat_flags import DERIVING, FIELDS, NOTED, translate
from everstep.plans import plan_to_proto
from tests.property.test_spec_properties import spec_dicts
from trainer.contract.devices import find_device
from trainer.contract.plan import Surroundings, make_plan
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError

flags = st.sampled_from([*FIELDS, *DERIVING, *NOTED, "depht", ""])
values = (
    st.integers(-2, 70_000).map(str)
    | st.floats(-1, 2).map(str)
    | st.sampled_from(["", "L", "SSSL", "nan", "1e400", "x y"])
)
words = st.tuples(flags, st.sampled_from(["=", " "]), values).map(lambda w: f"--{''.join(w)}")


@example("--target-param-data-ratio=5e-26", None)
@given(st.lists(words, max_size=8).map(" ".join), st.sampled_from([None, "/nc"]))
@settings(max_examples=250)
def test_any_command_line_is_a_plan_or_a_refusal_by_name(line: str, base: str | None) -> None:
    try:
        spec = JobSpec.parse(translate(line, base).spec)
        if spec.model.depth <= 64:
            make_plan(spec, spec.model.vocab_size or 32_768)
    except SpecError as error:
        refusal = error
    else:
        return
    assert refusal.violations
    assert all(each.field and each.reason for each in refusal.violations)


@given(spec_dicts())
@settings(max_examples=250)
def test_any_spec_plans_to_finite_figures(data: dict[str, Any]) -> None:
    data = {**data, "start": {}}
    spec = JobSpec.parse(data)
    plan = make_plan(spec, 512, where=Surroundings(find_device("RTX 4070")))
    made = plan_to_proto(plan)
    assert made.memory.peak_bytes > 0
    for row in made.rates:
        for point in row.points:
            value = point.values
            for figure in (value.learning_rate, value.momentum, value.weight_decay):
                assert math.isfinite(figure)
                assert figure >= 0
