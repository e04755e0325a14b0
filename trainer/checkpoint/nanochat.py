"""nanochat's own checkpoints, read and written.

Owns nanochat's file names and the layout of its optimizer state, and turns both into this
project's names and back, to the bit. Must not know jobs, storage or the model class. Files are
untrusted: they are loaded with weights_only, and every shape is checked.

Invariant: what is returned is complete and fits the shape; anything else is refused by name. The
rates in force come from the optimizer state alone, never from meta's user_config, which after a
resume in nanochat holds rates that it didn't use. Layout: nanochat at commit 92d63d4.
"""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint.shares import MODEL, OPTIMIZER
from trainer.contract.scaling import ParamGroup
from trainer.contract.schedule import InForce
from trainer.contract.shape import ModelShape
from trainer.muon import POLAR_EXPRESS, second_moment_shape
from trainer.storage.nanochat_files import (
    NanochatFileCorruptError,
    NanochatFileMissingError,
    NanochatMisfitError,
    layout_groups,
    rank_names,
    read_in_force,
    read_meta,
    read_shape,
)

COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it before the names of a wrapped model


@dataclass(frozen=True)
class NanochatCheckpoint:
    """One checkpoint, in this project's names.

    step: updates made. weights: by state-dict name. optimizer_state and counters: as
    Optimizer.load_state_tensors and load_counters take them. in_force: the values of the last
    update, step - 1. initial_lr: by group, what nanochat's schedule multiplies. meta: nanochat's
    meta file as it is.
    """

    step: int
    shape: ModelShape
    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    counters: dict[str, int]
    in_force: InForce
    initial_lr: dict[str, JsonValue]
    meta: dict[str, Any]


def read_nanochat(folder: Path, step: int) -> NanochatCheckpoint:
    """Read `model_`, `meta_` and every `optim_` file of one step from a nanochat folder.

    Raises:
        NanochatFileMissingError: a file isn't there, a rank's optimizer file among them.
        NanochatFileCorruptError: a file can't be parsed.
        NanochatMisfitError: names, shapes, steps or rank shards don't fit together.
    """
    meta = read_meta(_existing(folder / f"meta_{step:06d}.json").read_bytes(), step)
    shape = read_shape(meta)
    ranks = [_load(path) for path in _rank_files(folder, step)]
    weights = _read_weights(folder / f"model_{step:06d}.pt", shape)
    layout = _Layout(shape, ranks)
    state, counters = layout.merge()
    return NanochatCheckpoint(
        step=step,
        shape=shape,
        weights=weights,
        optimizer_state=state,
        counters=counters,
        in_force=read_in_force(layout.settings, shape, step),
        initial_lr=layout.initial_lr(),
        meta=meta,
    )


def write_nanochat(
    checkpoint: NanochatCheckpoint, groups: Sequence[ParamGroup], folder: Path
) -> None:
    """Write the files that read_nanochat reads, of one rank."""
    step = f"{checkpoint.step:06d}"
    state: dict[int, dict[str, Any]] = {}
    settings: list[dict[str, Any]] = []
    first = 0
    for group in groups:
        indices = list(range(first, first + len(group.parameters)))
        settings.append(_settings(checkpoint, group, indices))
        state |= _state(checkpoint, group, indices)
        first += len(indices)
    (folder / f"meta_{step}.json").write_text(json.dumps(checkpoint.meta, indent=2))
    optimizer = {"state": state, "param_groups": settings}
    torch.save(optimizer, folder / f"optim_{step}_rank0.pt")
    torch.save(OrderedDict(checkpoint.weights), folder / f"model_{step}.pt")


def write_safetensors(checkpoint: NanochatCheckpoint, folder: Path) -> None:
    """Write weights and optimizer state by name, and what meta says of the model as a config."""
    save_file(checkpoint.weights, folder / "model.safetensors")
    save_file(checkpoint.optimizer_state, folder / "optimizer.safetensors")
    config = {"model_type": "nanochat", "step": checkpoint.step, **checkpoint.meta["model_config"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _settings(checkpoint: NanochatCheckpoint, group: ParamGroup, params: list[int]) -> Any:
    values = checkpoint.in_force.groups[group.name]
    muon = {"momentum": values.momentum, "ns_steps": len(POLAR_EXPRESS), "beta2": group.betas[1]}
    adamw = {"betas": (values.momentum, group.betas[1]), "eps": group.eps}
    return {
        "kind": group.kind,
        "lr": values.lr,
        **(muon if group.kind == "muon" else adamw),
        "weight_decay": values.weight_decay,
        "initial_lr": checkpoint.initial_lr.get(group.name, group.lr),
        "params": params,
    }


def _state(checkpoint: NanochatCheckpoint, group: ParamGroup, params: list[int]) -> Any:
    """By number of the parameter; a Muon group's is one stack, at its first."""
    tensors, names = checkpoint.optimizer_state, group.parameters
    if group.kind == "muon":
        keys = ("momentum_buffer", "second_momentum_buffer")
        return {params[0]: {k: torch.stack([tensors[f"{n}.{k}"] for n in names]) for k in keys}}
    return {
        number: {
            "step": checkpoint.counters[group.name],
            "exp_avg": tensors[f"{name}.exp_avg"],
            "exp_avg_sq": tensors[f"{name}.exp_avg_sq"],
        }
        for number, name in zip(params, names, strict=True)
    }


def write_tensors(checkpoint: NanochatCheckpoint, path: Path) -> list[str]:
    """Write weights and optimizer state as a part of one of our checkpoints; the names inside."""
    tensors = {f"{MODEL}{name}": each for name, each in checkpoint.weights.items()}
    tensors |= {f"{OPTIMIZER}{name}": each for name, each in checkpoint.optimizer_state.items()}
    # Merged members are views of one stack, which the format doesn't take.
    save_file({name: each.clone() for name, each in tensors.items()}, path)
    return sorted(tensors)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NanochatFileMissingError(f"{path.name} is missing from {path.parent}")
    return path


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(_existing(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise NanochatFileCorruptError(f"{path.name} can't be read: {error}") from error
    if not isinstance(loaded, dict):
        raise NanochatFileCorruptError(f"{path.name} holds no state dict")
    return loaded


def _read_weights(path: Path, shape: ModelShape) -> dict[str, Tensor]:
    weights = {name.removeprefix(COMPILED_PREFIX): value for name, value in _load(path).items()}
    wanted = shape.named_shapes()
    if weights.keys() != wanted.keys():
        raise NanochatMisfitError(
            f"{path.name} and meta differ in {sorted(weights.keys() ^ wanted.keys())[:5]}"
        )
    for name, size in wanted.items():
        if tuple(weights[name].shape) != size:
            raise NanochatMisfitError(
                f"{name} in {path.name} has shape {tuple(weights[name].shape)}, meta says {size}"
            )
    return {name: weights[name] for name in wanted}


def _rank_files(folder: Path, step: int) -> list[Path]:
    names = rank_names([path.name for path in folder.iterdir()], step)
    return [_existing(folder / name) for name in names]


class _Layout:
    """Optimizer state of all ranks, indexed as nanochat's groups number their parameters."""

    def __init__(self, shape: ModelShape, ranks: list[dict[str, Any]]) -> None:
        self._shapes = shape.named_shapes()
        try:
            self.settings: list[dict[str, Any]] = ranks[0]["param_groups"]
            self._ranks: list[dict[int, dict[str, Any]]] = [rank["state"] for rank in ranks]
        except KeyError as error:
            raise NanochatMisfitError(f"an optimizer file lacks {error}") from error
        self._groups = layout_groups(self.settings, shape)

    def merge(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """State tensors by name, and update counts by group."""
        state: dict[str, Tensor] = {}
        counters: dict[str, int] = {}
        for group, settings in zip(self._groups, self.settings, strict=True):
            indices = settings["params"]
            if group.kind == "muon":
                self._merge_muon(group.parameters, group.shape, indices[0], state)
            else:
                for name, index in zip(group.parameters, indices, strict=True):
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[f"{name}.{key}"] = self._merge_adamw(name, index, key)
                    counters[group.name] = self._count(index)
        updates = max(counters.values())
        counters |= {group.name: updates for group in self._groups if group.kind == "muon"}
        return state, counters

    def initial_lr(self) -> dict[str, JsonValue]:
        """Base rates by group."""
        named = zip(self._groups, self.settings, strict=True)
        return {group.name: settings["initial_lr"] for group, settings in named}

    def _shards(self, index: int, key: str) -> list[Tensor]:
        shards = [rank[index][key] for rank in self._ranks if key in rank.get(index, {})]
        if not shards:
            raise NanochatMisfitError(f"no optimizer file has {key} of parameter {index}")
        return shards

    def _count(self, index: int) -> int:
        return max(int(rank[index]["step"]) for rank in self._ranks if index in rank)

    def _merge_adamw(self, name: str, index: int, key: str) -> Tensor:
        """Small tensors are whole on every rank; large ones are sliced by rows, in rank order."""
        shards, size = self._shards(index, key), self._shapes[name]
        if tuple(shards[0].shape) == size:
            return shards[0]
        if len(shards) == len(self._ranks) and all(s.shape[1:] == size[1:] for s in shards):
            whole = torch.cat(shards)
            if tuple(whole.shape) == size:
                return whole
        raise self._misfit(f"{name}.{key}", shards, size)

    def _merge_muon(
        self, names: tuple[str, ...], size: tuple[int, ...], index: int, state: dict[str, Tensor]
    ) -> None:
        """The stack is sliced by members over ranks; the last slices may be padded or absent."""
        for key, one in (
            ("momentum_buffer", size),
            ("second_momentum_buffer", second_moment_shape(size)),
        ):
            shards = self._shards(index, key)
            share = -(-len(names) // len(self._ranks))
            fits = all(tuple(shard.shape[1:]) == one for shard in shards)
            if not fits or any(len(shard) != share for shard in shards[:-1]):
                raise self._misfit(f"{names[0]}.{key}", shards, (len(names), *one))
            whole = torch.cat(shards)
            # More than padding left over means files of another run; less, a missing rank.
            if not len(names) <= len(whole) < len(names) + share * len(self._ranks):
                raise self._misfit(f"{names[0]}.{key}", shards, (len(names), *one))
            for name, member in zip(names, whole[: len(names)].unbind(), strict=True):
                state[f"{name}.{key}"] = member

    def _misfit(self, name: str, shards: list[Tensor], size: tuple[int, ...]) -> Exception:
        found = [tuple(shard.shape) for shard in shards]
        return NanochatMisfitError(
            f"optimizer state {name} of {len(self._ranks)} rank file(s) is {found}; whole it is "
            f"{size}: a rank's file may be missing"
        )
