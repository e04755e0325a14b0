"""Reading nanochat's own checkpoints.

Owns nanochat's file names and the layout of its optimizer state, and turns both into this
project's names. Must not know jobs, storage or the model class. Files are untrusted: they are
loaded with weights_only, and every shape is checked.

Invariant: what is returned is complete and fits the shape; anything else is refused by name. The
rates in force come from the optimizer state alone, never from meta's user_config, which after a
resume in nanochat holds rates that it didn't use. Layout: nanochat at commit 92d63d4.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract.scaling import param_groups
from trainer.contract.schedule import GroupValues, InForce
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.muon import second_moment_shape

COMPILED_PREFIX = "_orig_mod."  # torch.compile puts it before the names of a wrapped model


class NanochatCheckpointError(Exception):
    """A nanochat checkpoint can't be used; the message says which file and why."""


class NanochatFileMissingError(NanochatCheckpointError):
    """A file of the checkpoint is missing; copy the whole folder, every rank's file included."""


class NanochatFileCorruptError(NanochatCheckpointError):
    """A file of the checkpoint can't be read; it may be the rest of a save that was cut off."""


class NanochatMisfitError(NanochatCheckpointError):
    """The files are readable but don't fit together, or aren't of a model that is supported."""


@dataclass(frozen=True)
class NanochatCheckpoint:
    """One checkpoint, in this project's names.

    step: updates made. weights: by state-dict name. optimizer_state and counters: as
    Optimizer.load_state_tensors and load_counters take them. in_force: the values of the last
    update, step - 1. meta: nanochat's meta file as it is.
    """

    step: int
    shape: ModelShape
    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    counters: dict[str, int]
    in_force: InForce
    meta: dict[str, Any]


def read_nanochat(folder: Path, step: int) -> NanochatCheckpoint:
    """Read `model_`, `meta_` and every `optim_` file of one step from a nanochat folder.

    Raises:
        NanochatFileMissingError: a file isn't there, a rank's optimizer file among them.
        NanochatFileCorruptError: a file can't be parsed.
        NanochatMisfitError: names, shapes, steps or rank shards don't fit together.
    """
    meta = _read_meta(folder / f"meta_{step:06d}.json")
    if meta.get("step") != step:
        raise NanochatMisfitError(f"meta_{step:06d}.json is of step {meta.get('step')}")
    shape = _read_shape(meta)
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
        in_force=layout.in_force(step),
        meta=meta,
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise NanochatFileMissingError(f"{path.name} is missing from {path.parent}")
    return path


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(_existing(path).read_text())
    except ValueError as error:
        raise NanochatFileCorruptError(f"{path.name} isn't JSON: {error}") from error
    if not isinstance(meta, dict):
        raise NanochatFileCorruptError(f"{path.name} isn't a JSON object")
    return meta


def _read_shape(meta: Mapping[str, Any]) -> ModelShape:
    try:
        config = dict(meta["model_config"])
        width, heads = config["n_embd"], config["n_head"]
        shape = ModelShape.build(
            n_layer=config["n_layer"],
            n_head=heads,
            n_kv_head=config["n_kv_head"],
            head_dim=width // heads,
            vocab_size=config["vocab_size"],
            sequence_len=config["sequence_len"],
            # A checkpoint from before windows attends to everything.
            window_pattern=config.get("window_pattern", "L"),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise NanochatMisfitError(f"meta's model_config isn't a GPT's: {error!r}") from error
    if shape.n_embd != width:
        raise NanochatMisfitError(f"meta's n_embd {width} isn't a multiple of n_head {heads}")
    return shape


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
    pattern = re.compile(rf"optim_{step:06d}_rank(\d+)\.pt")
    ranks = {int(m[1]): p for p in folder.glob("optim_*.pt") if (m := pattern.fullmatch(p.name))}
    count = max(ranks, default=0) + 1
    missing = [rank for rank in range(count) if rank not in ranks]
    if missing:
        raise NanochatFileMissingError(f"optim_{step:06d}_rank{missing[0]}.pt is missing")
    return [ranks[rank] for rank in range(count)]


class _Layout:
    """Optimizer state of all ranks, indexed as nanochat's groups number their parameters."""

    def __init__(self, shape: ModelShape, ranks: list[dict[str, Any]]) -> None:
        self._shapes = shape.named_shapes()
        # Only the grouping matters here, and no rate changes it.
        self._groups = param_groups(JobSpec.parse({}), shape)
        try:
            self._settings: list[dict[str, Any]] = ranks[0]["param_groups"]
            self._ranks: list[dict[int, dict[str, Any]]] = [rank["state"] for rank in ranks]
        except KeyError as error:
            raise NanochatMisfitError(f"an optimizer file lacks {error}") from error
        kinds = [(group["kind"], len(group["params"])) for group in self._settings]
        wanted = [(group.kind, len(group.parameters)) for group in self._groups]
        if kinds != wanted:
            raise NanochatMisfitError(f"optimizer groups are {kinds}, the model's are {wanted}")

    def in_force(self, step: int) -> InForce:
        """The values of the last update before the checkpoint of this step."""
        values: dict[str, GroupValues] = {}
        for group, settings in zip(self._groups, self._settings, strict=True):
            muon = group.kind == "muon"
            values[group.name] = GroupValues(
                lr=float(settings["lr"]),
                momentum=float(settings["momentum"] if muon else settings["betas"][0]),
                weight_decay=float(settings["weight_decay"]),
            )
        based = [settings for settings in self._settings if settings["initial_lr"] > 0]
        multiplier = based[0]["lr"] / based[0]["initial_lr"] if based else 0.0
        last = values[self._groups[-1].name]
        return InForce(step - 1, multiplier, last.momentum, last.weight_decay, values)

    def merge(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """State tensors by name, and update counts by group."""
        state: dict[str, Tensor] = {}
        counters: dict[str, int] = {}
        for group, settings in zip(self._groups, self._settings, strict=True):
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
