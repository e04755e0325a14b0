"""The optimizer: AdamW and Muon over named parameter groups, with rates that can be read back.

Owns optimizer state and its names, and how values in force reach the kernels. Must not know
schedules (values come in through `apply`), collectives (gradients come in averaged) or storage.
Of several ranks each updates the parameters that it owns and holds their state alone.

Invariant: `read()` returns exactly what the next `step()` uses; a group's lr stays a Python float
all the way, and kernels get scalars in tensors, so a change of rate never recompiles. State is
whole tensors by parameter name, whatever the stacking inside. Formulas: nanochat at commit 92d63d4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from trainer.contract.ownership import owners
from trainer.contract.scaling import ParamGroup
from trainer.contract.schedule import GroupValues, InForce
from trainer.distributed import World
from trainer.muon import muon_update, rate_factor, second_moment_shape

T = TypeVar("T")

# Below this a kernel's compilation costs more than it ever saves.
COMPILE_ELEMENTS = 1 << 14
PIECE_ELEMENTS = 1 << 20  # of which a CPU keeps a copy in its caches
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


class OptimizerStateError(ValueError):
    """Saved optimizer state or values in force don't fit this optimizer's groups."""


class GroupSettings(TypedDict):
    """One parameter group as the kernels see it; momentum is Muon's mu, or betas[0] of AdamW."""

    name: str
    kind: str
    lr: float
    initial_lr: float
    momentum: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    params: list[nn.Parameter]


@dataclass
class _State:
    """What a rank holds of a group: one entry a parameter for AdamW, one stack for all of Muon."""

    names: tuple[str, ...]
    params: list[nn.Parameter]
    first: list[Tensor]
    second: list[Tensor]
    kernel: Any
    updates: int = 0
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def scalar(self, name: str, value: float) -> Tensor:
        """A CPU fp32 scalar tensor of that name, filled with value."""
        if name not in self.scalars:
            self.scalars[name] = torch.zeros((), dtype=torch.float32)
        return self.scalars[name].fill_(value)


class Optimizer:
    """Runs the groups that `param_groups` of the contract derived on a model's parameters.

    Args:
        model: owner of the parameters; it must be on its device already.
        groups: every parameter in exactly one group.
        compute_dtype: of Muon's orthogonalisation.
        compile: whether the larger kernels go through torch.compile.
        world: whose ranks share the parameters out.

    Attributes:
        owner: the rank that updates each parameter. own: the names of this rank's.

    Raises:
        OptimizerStateError: groups and model don't name the same parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[ParamGroup, ...],
        compute_dtype: torch.dtype,
        compile: bool = False,
        world: World = World(),  # noqa: B008 - frozen
    ) -> None:
        named = dict(model.named_parameters())
        grouped = [name for group in groups for name in group.parameters]
        if sorted(grouped) != sorted(named):
            wrong = sorted(set(grouped) ^ set(named)) or "a parameter in two groups"
            raise OptimizerStateError(f"groups and model differ in {wrong}")
        self._compute_dtype = compute_dtype
        self.param_groups = [_settings(group, named) for group in groups]
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self.owner = owners(groups, shapes, world.size)
        self.own = {name for name, rank in self.owner.items() if rank == world.rank}
        self._named = named
        self._states = [
            _fresh_state(group, {n: named[n] for n in group.parameters if n in self.own}, compile)
            for group in groups
        ]

    def apply(self, values: InForce) -> None:
        """Set what the next step uses. Raises OptimizerStateError if a group has no values."""
        names = {group["name"] for group in self.param_groups}
        if names != set(values.groups):
            raise OptimizerStateError(
                f"values in force and groups differ in {sorted(names ^ set(values.groups))}"
            )
        for group in self.param_groups:
            value = values.groups[group["name"]]
            group["lr"], group["momentum"] = value.lr, value.momentum
            group["weight_decay"] = value.weight_decay
            if group["kind"] == "adamw":
                group["betas"] = (value.momentum, group["betas"][1])

    def read(self) -> dict[str, GroupValues]:
        """What each group would run with now, read from the groups themselves."""
        return {
            group["name"]: GroupValues(
                lr=group["lr"],
                momentum=group["momentum"] if group["kind"] == "muon" else group["betas"][0],
                weight_decay=group["weight_decay"],
            )
            for group in self.param_groups
        }

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter of this rank from its gradient; each must have one."""
        for group, state in zip(self.param_groups, self._states, strict=True):
            state.updates += 1
            if not state.params:
                continue
            if group["kind"] == "muon":
                self._step_muon(group, state)
            else:
                _step_adamw(group, state)

    @property
    def own_parameters(self) -> list[nn.Parameter]:
        """Those that this rank updates, in module order."""
        return [parameter for name, parameter in self._named.items() if name in self.own]

    def owned(self, of: Callable[[nn.Parameter], T | None]) -> list[tuple[T, int]]:
        """Something of each parameter that has it, with the parameter's owner, in module order.

        For collectives: every rank gets them alike.
        """
        each = ((of(parameter), self.owner[name]) for name, parameter in self._named.items())
        return [(found, rank) for found, rank in each if found is not None]

    def zero_grad(self) -> None:
        """Make all gradients zeros where they lie: a fresh one costs a page fault every 4 KB."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()

    def state_tensors(self) -> dict[str, Tensor]:
        """What this rank holds, as whole tensors `<parameter>.<key>`: views, so copy before a step.

        Keys: exp_avg and exp_avg_sq (parameter's dtype and shape) for AdamW; momentum_buffer (shape
        of the parameter) and second_momentum_buffer ([R, 1] or [1, C]) for Muon.
        """
        tensors: dict[str, Tensor] = {}
        for group, state in zip(self.param_groups, self._states, strict=True):
            if not state.params:
                continue
            muon = group["kind"] == "muon"
            first, second = (
                ("momentum_buffer", "second_momentum_buffer") if muon else ("exp_avg", "exp_avg_sq")
            )
            firsts = state.first[0].unbind() if muon else state.first
            seconds = state.second[0].unbind() if muon else state.second
            for name, one, two in zip(state.names, firsts, seconds, strict=True):
                tensors[f"{name}.{first}"] = one
                tensors[f"{name}.{second}"] = two
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved state in place; nothing changes unless all of it fits.

        Raises:
            OptimizerStateError: names or shapes differ from those of state_tensors.
        """
        own = self.state_tensors()
        if own.keys() != tensors.keys():
            raise OptimizerStateError(
                f"optimizer state differs in {sorted(own.keys() ^ tensors.keys())[:5]}"
            )
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                raise OptimizerStateError(
                    f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def counters(self) -> dict[str, int]:
        """Updates made by each group, which bias correction counts."""
        return {
            group["name"]: state.updates
            for group, state in zip(self.param_groups, self._states, strict=True)
        }

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """The inverse of counters. Raises OptimizerStateError when group names differ."""
        if counters.keys() != self.counters().keys():
            raise OptimizerStateError(
                f"update counts differ in {sorted(counters.keys() ^ self.counters().keys())}"
            )
        for group, state in zip(self.param_groups, self._states, strict=True):
            state.updates = counters[group["name"]]

    def _step_muon(self, group: GroupSettings, state: _State) -> None:
        params = state.params
        stack_KRC = state.kernel(
            torch.stack([parameter.data for parameter in params]),
            torch.stack([_gradient(parameter) for parameter in params]),
            state.first[0],
            state.second[0],
            rate=state.scalar("rate", group["lr"] * rate_factor(tuple(params[0].shape))),
            decay=state.scalar("decay", group["weight_decay"]),
            one_minus_momentum=state.scalar("one_minus_momentum", 1.0 - group["momentum"]),
            momentum=state.scalar("momentum", group["momentum"]),
            one_minus_beta2=state.scalar("one_minus_beta2", 1.0 - group["betas"][1]),
            compute_dtype=self._compute_dtype,
            floor=group["eps"],
        )
        torch._foreach_copy_([parameter.data for parameter in params], list(stack_KRC.unbind()))


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    decay: Tensor,
    one_minus_beta1: Tensor,
    one_minus_beta2: Tensor,
    unbias1: Tensor,
    unbias2_root: Tensor,
    eps: Tensor,
) -> None:
    """One AdamW step in place, in fp32 whatever the storage dtypes.

    The scalars are fp32 in tensors. unbias1 is 1 / (1 - beta1^t), unbias2_root the square root of
    1 / (1 - beta2^t). lr * decay is added to the update rather than taken from 1, where a small
    product would be lost to rounding.
    """
    param_f, grad_f, avg_f, sq_f = param.float(), grad.float(), exp_avg.float(), exp_avg_sq.float()
    avg_f = avg_f + (grad_f - avg_f) * one_minus_beta1
    sq_f = sq_f + (grad_f * grad_f - sq_f) * one_minus_beta2
    direction = avg_f * unbias1 / (sq_f.sqrt() * unbias2_root + eps)
    exp_avg.copy_(avg_f)
    exp_avg_sq.copy_(sq_f)
    param.copy_(param_f - lr * (direction + decay * param_f))


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float | None = None,
    world: World = World(),  # noqa: B008 - frozen
) -> Tensor:
    """The global L2 norm of all ranks' gradients, an fp32 scalar on their device.

    With max_norm, gradients are scaled in place so that their norm is at most that; the norm
    returned is the one before. It never waits for the device. parameters: what this rank owns;
    every rank must call it.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [
        torch.linalg.vector_norm(piece, dtype=torch.float32)
        for grad in grads
        for piece in _pieces(grad)
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if norms else world.zero()
    if world.size > 1:
        square = total.square()
        world.sum_([square])
        total = square.sqrt()
    if max_norm is not None:
        scale = (max_norm / (total + CLIP_EPS)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
    return total


def _pieces(grad: Tensor) -> tuple[Tensor, ...]:
    """The gradient, in pieces where its norm in fp32 takes a copy of it in fp32, as on a CPU."""
    if grad.dtype is torch.float32 or grad.device.type != "cpu":
        return (grad,)
    return torch.split(grad.view(-1), PIECE_ELEMENTS)


def _step_adamw(group: GroupSettings, state: _State) -> None:
    beta1, beta2 = group["betas"]
    scalars = {
        "lr": state.scalar("lr", group["lr"]),
        "decay": state.scalar("decay", group["weight_decay"]),
        "one_minus_beta1": state.scalar("one_minus_beta1", 1.0 - beta1),
        "one_minus_beta2": state.scalar("one_minus_beta2", 1.0 - beta2),
        "unbias1": state.scalar("unbias1", 1.0 / (1.0 - beta1**state.updates)),
        "unbias2_root": state.scalar("unbias2_root", (1.0 - beta2**state.updates) ** -0.5),
        "eps": state.scalar("eps", group["eps"]),
    }
    moments = zip(state.params, state.first, state.second, strict=True)
    for parameter, exp_avg, exp_avg_sq in moments:
        state.kernel(parameter.data, _gradient(parameter), exp_avg, exp_avg_sq, **scalars)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "step() needs a gradient of every parameter"
    return parameter.grad


def _settings(group: ParamGroup, named: Mapping[str, nn.Parameter]) -> GroupSettings:
    return GroupSettings(
        name=group.name,
        kind=group.kind,
        lr=group.lr,
        initial_lr=group.lr,
        momentum=group.betas[0],
        weight_decay=group.weight_decay,
        betas=group.betas,
        eps=group.eps,
        params=[named[name] for name in group.parameters],
    )


def _fresh_state(group: ParamGroup, own: Mapping[str, nn.Parameter], compile: bool) -> _State:
    """Zero buffers for the own parameters of a group, and its kernel."""
    names, params = tuple(own), list(own.values())
    kernel: Any = muon_update if group.kind == "muon" else adamw_update
    if compile and sum(parameter.numel() for parameter in params) >= COMPILE_ELEMENTS:
        # A cache of its own: torch's limit on recompilations counts every model in the process.
        # (The option is missing from torch 2.13's type annotations.)
        compiler: Any = torch.compile
        kernel = compiler(kernel, fullgraph=True, dynamic=False, isolate_recompiles=True)
    if group.kind == "adamw":
        averages = [torch.zeros_like(parameter.data) for parameter in params]
        squares = [torch.zeros_like(parameter.data) for parameter in params]
        return _State(names, params, averages, squares, kernel)
    if not params:
        return _State(names, params, [], [], kernel)
    stack = params[0].data.new_zeros((len(params), *group.shape))
    second = params[0].data.new_zeros((len(params), *second_moment_shape(group.shape)))
    return _State(names, params, [stack], [second], kernel)
