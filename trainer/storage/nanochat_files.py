"""nanochat's checkpoint folders, read without torch: what is there, and the values in force.

Owns the file names, the shape in meta, and what a .pt file says of itself: it is a zip with a
pickle of names, shapes and numbers beside the tensors' bytes, and only that pickle is read, by
ranges. Its unpickler admits torch's rebuild calls as inert stand-ins and OrderedDict, nothing else.

Invariant: rates in force come from the optimizer's state alone, never from meta's user_config,
which after a resume holds rates that nanochat didn't use. Layout: nanochat at commit 92d63d4.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from trainer.contract.scaling import ParamGroup, param_groups
from trainer.contract.schedule import GroupValues, InForce
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.storage.documents import Record
from trainer.storage.object_store import ObjectStore

MAX_PICKLE_BYTES = 64 << 20  # names and numbers; tensors' bytes lie beside it
BLOCK_BYTES = 64 << 10
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
CLAIM_TOLERANCE = 1e-6


class NanochatCheckpointError(Exception):
    """A nanochat checkpoint can't be used; the message says which file and why."""


class NanochatFileMissingError(NanochatCheckpointError):
    """A file of the checkpoint is missing; copy the whole folder, every rank's file included."""


class NanochatFileCorruptError(NanochatCheckpointError):
    """A file of the checkpoint can't be read; it may be the rest of a save that was cut off."""


class NanochatMisfitError(NanochatCheckpointError):
    """The files are readable but don't fit together, or aren't of a model that is supported."""


class NanochatFile(Record):
    """One file as it was at submission."""

    name: str
    size_bytes: int


class NanochatStart(Record):
    """A checkpoint of nanochat's that a job starts from, as it was at submission.

    epoch, shard, row_group: how far nanochat had read, counted from 0, in order of name; what lies
    before and this row group itself are not read again in that epoch.
    """

    uri: str
    step: int = Field(ge=0)
    files: tuple[NanochatFile, ...]
    epoch: int = 0
    shard: int = -1
    row_group: int = -1

    @property
    def name(self) -> str:
        """As start.from names it."""
        return f"nanochat:{self.uri}@{self.step}"


@dataclass(frozen=True)
class NanochatSummary:
    """What can be told before anything is loaded.

    claimed: rates by group that meta says ran. spec: sections of a job's that meta answers.
    """

    start: NanochatStart
    shape: ModelShape
    in_force: InForce
    claimed: dict[str, float]
    spec: dict[str, dict[str, Any]]


class TensorShape(NamedTuple):
    """Stands in for a tensor while a .pt file's pickle is read."""

    size: tuple[int, ...]


def split_name(name: str) -> tuple[str, int]:
    """The folder's URI and the step of `nanochat:<folder or uri>@STEP`; ValueError."""
    folder, _, step = name.removeprefix("nanochat:").rpartition("@")
    return (f"file:{folder}" if folder.startswith("/") else folder), int(step)


def summarise(store: ObjectStore, step: int) -> NanochatSummary:
    """Look at the checkpoint of a step in a folder; reads a few hundred kB.

    Raises:
        NanochatCheckpointError: naming the file that is missing or torn, or what doesn't fit.
    """
    sizes = {info.key: info.size_bytes for info in store.list("") if "/" not in info.key}
    names = [f"meta_{step:06d}.json", f"model_{step:06d}.pt", *rank_names(sizes, step)]
    for name in names:
        if name not in sizes:
            there = sorted({int(m[1]) for key in sizes if (m := _META.fullmatch(key))})
            raise NanochatFileMissingError(
                f"{name} is missing from {store.uri}; there are steps {there[-10:] or 'none'}"
            )
    meta = read_meta(store.get(names[0]), step)
    shape = read_shape(meta)
    weights = read_pt(store, names[1], sizes[names[1]])
    found = {name.removeprefix("_orig_mod."): value for name, value in weights.items()}
    for name, size in shape.named_shapes().items():
        if not isinstance(found.get(name), TensorShape) or found[name].size != size:
            raise NanochatMisfitError(f"{name} in {names[1]} doesn't have the shape {size} of meta")
    settings = [read_pt(store, name, sizes[name]).get("param_groups") for name in names[2:]]
    in_force = read_in_force(settings[0], shape, step)
    reader = meta.get("dataloader_state_dict") or {}
    files = tuple(NanochatFile(name=name, size_bytes=sizes[name]) for name in names)
    try:
        start = NanochatStart(
            uri=store.uri,
            step=step,
            files=files,
            epoch=reader.get("epoch", 1) - 1,
            shard=reader.get("pq_idx", -1),
            row_group=reader.get("rg_idx", -1),
        )
    except (TypeError, ValidationError) as error:
        raise NanochatMisfitError(f"{names[0]}: dataloader_state_dict: {reader!r}") from error
    claimed = _claimed(meta, shape, in_force)
    return NanochatSummary(start, shape, in_force, claimed, _sections(meta, shape))


_META = re.compile(r"meta_(\d{6,})\.json")


def rank_names(names: Mapping[str, Any] | Sequence[str], step: int) -> list[str]:
    """The optimizer files that a step must have: of every rank up to the highest."""
    pattern = re.compile(rf"optim_{step:06d}_rank(\d{{1,6}})\.pt")
    ranks = [int(match[1]) for name in names if (match := pattern.fullmatch(name))]
    return [f"optim_{step:06d}_rank{rank}.pt" for rank in range(max(ranks, default=0) + 1)]


def read_meta(raw: bytes, step: int) -> dict[str, Any]:
    """nanochat's meta file."""
    name = f"meta_{step:06d}.json"
    try:
        meta = json.loads(raw)
    except ValueError as error:
        raise NanochatFileCorruptError(f"{name} isn't JSON: {error}") from error
    if not isinstance(meta, dict):
        raise NanochatFileCorruptError(f"{name} isn't a JSON object")
    if meta.get("step") != step:
        raise NanochatMisfitError(f"{name} is of step {meta.get('step')}")
    return meta


def read_shape(meta: Mapping[str, Any]) -> ModelShape:
    """The model that meta describes."""
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


def layout_groups(settings: Any, shape: ModelShape) -> tuple[ParamGroup, ...]:
    """Our groups, which nanochat's param_groups must match one by one."""
    groups = param_groups(JobSpec.parse({}), shape)  # only the grouping matters: no rate changes it
    try:
        kinds = [(group["kind"], len(group["params"])) for group in settings]
    except (KeyError, TypeError) as error:
        raise NanochatMisfitError(
            f"an optimizer file has no usable param_groups: {error}"
        ) from error
    wanted = [(group.kind, len(group.parameters)) for group in groups]
    if kinds != wanted:
        raise NanochatMisfitError(f"optimizer groups are {kinds}, the model's are {wanted}")
    return groups


def read_in_force(settings: Any, shape: ModelShape, step: int) -> InForce:
    """The values of the last update before the checkpoint of this step."""
    values: dict[str, GroupValues] = {}
    try:
        for group, own in zip(layout_groups(settings, shape), settings, strict=True):
            momentum = own["momentum"] if group.kind == "muon" else own["betas"][0]
            numbers = (float(own["lr"]), float(momentum), float(own["weight_decay"]))
            values[group.name] = GroupValues(*numbers)
        based = [own for own in settings if own["initial_lr"] > 0]
        multiplier = based[0]["lr"] / based[0]["initial_lr"] if based else 0.0
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise NanochatMisfitError(f"an optimizer file's param_groups lack {error}") from error
    last = list(values.values())[-1]
    return InForce(step - 1, multiplier, last.momentum, last.weight_decay, values)


def read_pt(store: ObjectStore, name: str, size_bytes: int) -> dict[str, Any]:
    """What a .pt file holds, tensors as their shapes; NanochatFileCorruptError."""
    try:
        reader = io.BufferedReader(_Ranged(store, name, size_bytes), BLOCK_BYTES)
        with zipfile.ZipFile(reader) as archive:
            inside = next(each for each in archive.infolist() if each.filename.endswith("data.pkl"))
            if inside.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"{inside.file_size} bytes of names and numbers")
            found = _Unpickler(io.BytesIO(archive.read(inside))).load()
    except Exception as error:  # a hostile or torn file can fail in any way
        raise NanochatFileCorruptError(f"{name} can't be read, it may be torn: {error}") from error
    if not isinstance(found, dict):
        raise NanochatFileCorruptError(f"{name} holds no state dict")
    return found


def _claimed(meta: Mapping[str, Any], shape: ModelShape, in_force: InForce) -> dict[str, float]:
    """Rates that user_config implies, where they aren't the ones in force."""
    config = meta.get("user_config") or {}
    try:
        rates = {name: float(config[name]) for name in RATES}
        batch = {"total_batch_size": meta["total_batch_size"], "device_batch_size": 1}
        model = {"max_seq_len": shape.sequence_len}
        evaluate = {"tokens": shape.sequence_len}
        told = {"optimizer": rates, "batch": batch, "model": model, "evaluate": evaluate}
        groups = param_groups(JobSpec.parse(told), shape)
    except (KeyError, TypeError, ValueError):
        return {}  # notes that can't be read claim nothing
    claims = {group.name: group.lr * in_force.lr_multiplier for group in groups}
    return {
        name: rate
        for name, rate in claims.items()
        if name != "smear" and abs(rate - in_force.groups[name].lr) > CLAIM_TOLERANCE * rate
    }


def _sections(meta: Mapping[str, Any], shape: ModelShape) -> dict[str, dict[str, Any]]:
    """Model and batch as a job's spec names them."""
    config = meta.get("user_config")
    ratio = config.get("aspect_ratio") if isinstance(config, dict) else None
    model = {
        "depth": shape.n_layer,
        # Any ratio that gives this width will do for the shape; the decay's scaling asks for it.
        "aspect_ratio": ratio if type(ratio) is int else shape.n_embd // shape.n_layer,
        "head_dim": shape.head_dim,
        "max_seq_len": shape.sequence_len,
        "window_pattern": meta["model_config"].get("window_pattern", "L"),
        "n_kv_head": shape.n_kv_head,
    }
    names = ("device_batch_size", "total_batch_size")
    return {"model": model, "batch": {n: meta[n] for n in names if type(meta.get(n)) is int}}


class _Ranged(io.RawIOBase):
    """An object of a store as a file that is read where it is looked at."""

    def __init__(self, store: ObjectStore, key: str, size_bytes: int) -> None:
        self._store, self._key, self._size, self._at = store, key, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._store.get(self._key, self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Unpickler(pickle.Unpickler):
    """Builds containers and numbers; everything else is refused or a stand-in."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module_name == "torch" and re.fullmatch("[A-Z][A-Za-z0-9]*Storage", global_name):
            return global_name
        raise pickle.UnpicklingError(f"asks for {module_name}.{global_name}, which is not admitted")

    def persistent_load(self, _pid: Any) -> None:
        return None  # a tensor's bytes, which are not wanted


class _Rebuild:
    """torch's call that makes a tensor: here, its shape."""

    __slots__ = ()

    def __call__(self, _storage: Any, _offset: Any, size: Any, *_: Any) -> TensorShape:
        return TensorShape(tuple(size))
