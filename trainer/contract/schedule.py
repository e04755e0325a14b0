"""Which learning rate, momentum and weight decay are in force at which step.

Owns the three anchors of a schedule and the record of the values in force, which checkpoints carry
and which a continuing job starts from. Knows nothing of torch; pure functions of the step.

Invariant: `Schedule.at(step)` depends on its arguments alone, so an interrupted job that comes back
gets the values that it would have had. Formulas: nanochat at commit 92d63d4; segment and continue
are this project's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from trainer.contract.scaling import ParamGroup
from trainer.contract.spec import Anchor, ScheduleSpec

MOMENTUM_START = 0.85
MOMENTUM_PEAK = 0.97
MOMENTUM_END = 0.90
MOMENTUM_WARMUP_STEPS = 400


@dataclass(frozen=True)
class GroupValues:
    """What one optimizer group runs with; momentum is Muon's mu, or betas[0] of AdamW."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class InForce:
    """The values applied in the update of one step.

    momentum and weight_decay are Muon's, absolute. decay_multiplier is weight_decay as a fraction
    of the derived base; None where the base isn't known (a checkpoint of another trainer).
    """

    step: int
    lr_multiplier: float
    momentum: float
    weight_decay: float
    groups: dict[str, GroupValues]
    decay_multiplier: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats survive the round trip to the last bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of to_dict; KeyError or TypeError when fields are missing or unknown."""
        groups = {name: GroupValues(**values) for name, values in data["groups"].items()}
        return cls(**{**data, "groups": groups})


class Schedule:
    """The values of every step from start_step to spec.num_iterations.

    Args:
        spec: horizon and shape of the schedule.
        groups: the job's groups with their derived base values.
        start_step: the first step that this job trains.
        parent: the values in force at start_step - 1; the continue anchor needs it.

    Raises:
        ValueError: for the continue anchor without a parent.
    """

    def __init__(
        self,
        spec: ScheduleSpec,
        groups: tuple[ParamGroup, ...],
        start_step: int = 0,
        parent: InForce | None = None,
    ) -> None:
        if spec.anchor is Anchor.CONTINUE and parent is None:
            raise ValueError("schedule.anchor continue needs the values in force at the parent")
        self._spec = spec
        self._groups = groups
        self._start = start_step
        self._parent = parent if spec.anchor is Anchor.CONTINUE else None
        self._origin = start_step if spec.anchor is Anchor.SEGMENT else 0
        self._length = max(spec.num_iterations - self._origin, 1)
        self._warmdown = round(spec.warmdown_ratio * self._length)
        self._base_decay = next((g.weight_decay for g in groups if g.kind == "muon"), 0.0)

    def lr_multiplier(self, step: int) -> float:
        """The factor of every group's base learning rate at an absolute step."""
        spec = self._spec
        if self._parent is not None:
            return self._line(step, self._parent.lr_multiplier, spec.final_lr_frac)
        local = step - self._origin
        if local < spec.warmup_steps:
            return (local + 1) / spec.warmup_steps
        if local <= self._length - self._warmdown or self._warmdown == 0:
            return 1.0
        left = self._left(step)
        return left + (1 - left) * spec.final_lr_frac

    def momentum(self, step: int) -> float:
        """Muon's momentum; its warm-up goes by absolute step, since the buffer stays warm."""
        if self._parent is not None:
            return self._line(step, self._parent.momentum, MOMENTUM_END)
        if step < MOMENTUM_WARMUP_STEPS:
            done = step / MOMENTUM_WARMUP_STEPS
            return MOMENTUM_START * (1 - done) + MOMENTUM_PEAK * done
        if self._warmdown == 0 or step - self._origin < self._length - self._warmdown:
            return MOMENTUM_PEAK
        # In nanochat's order of operations, as in _cosine: equal to the last digit.
        begin = self._length - self._warmdown
        done = min((step - self._origin - begin) / self._warmdown, 1.0)
        return MOMENTUM_PEAK * (1 - done) + MOMENTUM_END * done

    def weight_decay(self, step: int) -> float:
        """Muon's absolute weight decay."""
        if self._parent is None:
            return self._base_decay * self._cosine(step)
        if self._parent.decay_multiplier is not None:
            # By the multiplier, as the rates: a decay asked for anew takes effect at once.
            return self._base_decay * self._line(step, self._parent.decay_multiplier, 0.0)
        return self._line(step, self._parent.weight_decay, 0.0)

    def at(self, step: int) -> InForce:
        """All values in force in the update of an absolute step."""
        multiplier, momentum = self.lr_multiplier(step), self.momentum(step)
        decay = self.weight_decay(step)
        values = {
            group.name: GroupValues(
                lr=group.lr * multiplier,
                momentum=momentum if group.kind == "muon" else group.betas[0],
                weight_decay=decay if group.kind == "muon" else group.weight_decay,
            )
            for group in self._groups
        }
        return InForce(step, multiplier, momentum, decay, values, self._decay_multiplier(step))

    def _decay_multiplier(self, step: int) -> float | None:
        if self._parent is None:
            return self._cosine(step)
        if self._parent.decay_multiplier is not None:
            return self._line(step, self._parent.decay_multiplier, 0.0)
        return self.weight_decay(step) / self._base_decay if self._base_decay > 0 else None

    def _cosine(self, step: int) -> float:
        local = min(step - self._origin, self._length)
        return 0.5 * (1.0 + math.cos(math.pi * local / self._length))

    def _left(self, step: int) -> float:
        """The fraction of the warmdown still ahead; 0 at the horizon and past it."""
        return max(self._spec.num_iterations - step, 0) / self._warmdown

    def _line(self, step: int, start: float, end: float) -> float:
        """From start at the parent's last step to end at the horizon."""
        last = self._start - 1
        done = min((step - last) / max(self._spec.num_iterations - last, 1), 1.0)
        return start + (end - start) * done
