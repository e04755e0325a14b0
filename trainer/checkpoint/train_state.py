"""All state of a run as named tensors and plain values, and back.

Tensors are whole and named by parameter (`model.<name>`, `optimizer.<name>.<key>`), so any number
of workers can load them; the rest is JSON in the manifest.

Invariant: restoring a snapshot and going on gives the weights that going on without it gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.checkpoint.shares import MODEL, OPTIMIZER
from trainer.contract.schedule import InForce
from trainer.data.loader import START, Position
from trainer.optim import Optimizer


class StateMisfitError(ValueError):
    """A checkpoint's tensors are not those of this model and optimizer."""


@dataclass
class TrainState:
    """What moves besides tensors. step: optimizer steps behind the weights."""

    step: int = 0
    tokens: int = 0  # trained by this job, from its own start
    position: Position = START
    loss_smoothed: float | None = None
    in_force: InForce | None = None  # in the update that made these weights
    validation_bpb: float | None = None
    counters: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "position": self.position.to_dict(),
            "loss_smoothed": self.loss_smoothed,
            "in_force": self.in_force.to_dict() if self.in_force else None,
            "validation_bpb": self.validation_bpb,
            "counters": self.counters,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainState:
        """The inverse; StateMisfitError where a field is missing or malformed."""
        try:
            in_force = data["in_force"]
            return cls(
                step=data["step"],
                tokens=data["tokens"],
                position=Position.from_dict(data["position"]),
                loss_smoothed=data["loss_smoothed"],
                in_force=InForce.from_dict(in_force) if in_force else None,
                validation_bpb=data["validation_bpb"],
                counters=dict(data["counters"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StateMisfitError(f"the checkpoint's state is malformed: {error}") from error


def live_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state that this rank holds by its name, as it is: not copies."""
    found = {f"{MODEL}{name}": tensor.data for name, tensor in model.named_parameters()}
    found.update({f"{OPTIMIZER}{name}": t for name, t in optimizer.state_tensors().items()})
    return found


def restore(
    files: Sequence[Path], state: TrainState, model: nn.Module, optimizer: Optimizer
) -> None:
    """Copy tensors from verified files into place, one at a time: no second copy of the state.

    Raises:
        StateMisfitError: a tensor is missing, unknown or of another shape. Nothing that was
            loaded counts then.
    """
    others = tuple(f"{OPTIMIZER}{name}." for name in optimizer.owner if name not in optimizer.own)
    _fill(live_tensors(model, optimizer), files, passing_over=others)
    optimizer.load_counters(state.counters)


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of verified files by its name, in host memory."""
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def restore_weights(files: Iterable[Path], model: nn.Module) -> None:
    """The same for the weights alone, whatever else the files hold; StateMisfitError."""
    weights = {f"{MODEL}{name}": tensor.data for name, tensor in model.named_parameters()}
    _fill(weights, files, passing_over=(OPTIMIZER,))


@torch.no_grad()
def _fill(
    wanted: Mapping[str, Tensor], files: Iterable[Path], passing_over: tuple[str, ...] = ()
) -> None:
    seen: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(passing_over):
                    continue
                target = wanted.get(name)
                if target is None:
                    raise StateMisfitError(f"{name} is not a tensor of this model")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(target.shape):
                    raise StateMisfitError(f"{name} is {shape}, not {tuple(target.shape)}")
                target.copy_(file.get_tensor(name))
                seen.add(name)
    if missing := wanted.keys() - seen:
        raise StateMisfitError(f"{len(missing)} tensors are missing, such as {min(missing)}")
