"""A nanochat command line, as it stands, turned into a job spec.

Owns nanochat's flags, its defaults and what its -1 stands for (nanochat at commit 92d63d4; the
formulas are in trainer.contract.scaling). Knows nothing of files: folders are only named.

Invariant: every flag is taken over, named in a note, or refused; none is dropped without a word.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from trainer.contract.scaling import (
    TARGET_PARAM_DATA_RATIO,
    auto_total_batch_size,
    iterations_for,
)
from trainer.contract.shape import ModelShape
from trainer.contract.spec import ModelSpec
from trainer.contract.violations import MISSING, SpecError, Violation, from_pydantic

VOCAB_SIZE = 32_768  # what nanochat's own tokenizer script makes
DATA_FOLDERS = ("base_data_climbmix", "base_data")  # nanochat's, the newest first
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINT_FOLDER = "base_checkpoints"
SMEAR_LR = 0.2  # fixed in nanochat's code
LARGEST = 1e30  # a bound that keeps the arithmetic finite

Text = Callable[[str], Any]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(text)
    return value


# Flags that are fields of the spec: the field, its type, nanochat's default.
FIELDS: dict[str, tuple[str, Text, Any]] = {
    "depth": ("model.depth", int, 20),
    "aspect-ratio": ("model.aspect_ratio", int, 64),
    "head-dim": ("model.head_dim", int, 128),
    "max-seq-len": ("model.max_seq_len", int, 2048),
    "window-pattern": ("model.window_pattern", str, "SSSL"),
    "device-batch-size": ("batch.device_batch_size", int, 32),
    "embedding-lr": ("optimizer.embedding_lr", _finite, 0.3),
    "unembedding-lr": ("optimizer.unembedding_lr", _finite, 0.008),
    "matrix-lr": ("optimizer.matrix_lr", _finite, 0.02),
    "scalar-lr": ("optimizer.scalar_lr", _finite, 0.5),
    "weight-decay": ("optimizer.weight_decay", _finite, 0.28),
    "warmup-steps": ("schedule.warmup_steps", int, 40),
    "warmdown-ratio": ("schedule.warmdown_ratio", _finite, 0.65),
    "final-lr-frac": ("schedule.final_lr_frac", _finite, 0.05),
    "eval-tokens": ("evaluate.tokens", int, 80 * 524_288),
}
# Flags that other fields follow from.
DERIVING: dict[str, tuple[Text, Any]] = {
    "num-iterations": (int, -1),
    "total-batch-size": (int, -1),
    "target-flops": (_finite, -1.0),
    "target-param-data-ratio": (_finite, TARGET_PARAM_DATA_RATIO),
    "eval-every": (int, 250),
    "sample-every": (int, 2000),
    "save-every": (int, -1),
    "resume-from-step": (int, -1),
    "model-tag": (str, None),
}
# Flags that mean nothing here, and what to know about it.
NOTED: dict[str, str] = {
    "run": "runs aren't logged to wandb; metrics are at the service's /metrics",
    "device-type": "the device follows from resources.gpus_per_worker (0: CPU)",
    "fp8": "there is no fp8 here: it trains in precision.compute, bf16 by default",
    "fp8-recipe": "there is no fp8 here",
    "core-metric-every": "the CORE metric isn't evaluated here",
    "core-metric-max-per-task": "the CORE metric isn't evaluated here",
}
SWITCHES = frozenset({"fp8"})  # flags without a value


@dataclass(frozen=True)
class Translation:
    """A spec (a part of one, for Client) and what to know about how it came about."""

    spec: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def data_fields(base_folder: str, data_folder: str = DATA_FOLDERS[0]) -> dict[str, str]:
    """The spec's data section for nanochat's base folder, an absolute path."""
    return {
        "source": _file_uri(base_folder, data_folder),
        "tokenizer": _file_uri(base_folder, TOKENIZER_FOLDER),
    }


def translate(
    command: str, base_folder: str | None = None, vocab_size: int | None = None
) -> Translation:
    """The spec that a nanochat command line asks for.

    command may be the flags alone or the whole line (python or torchrun, -m scripts.base_train).
    base_folder is nanochat's base folder, for --resume-from-step; vocab_size is the tokenizer's,
    for what follows from it (default: nanochat's 32768, which the spec then insists on).

    Raises:
        SpecError: unknown flags and bad values, each named.
    """
    words, workers = _flag_words(command)
    given, found = _parse(words)
    values = {name: default for name, (_, _, default) in FIELDS.items()}
    values |= {name: default for name, (_, default) in DERIVING.items()}
    values |= given
    notes = [f"--{name}: {NOTED[name]}" for name in given if name in NOTED]
    spec: dict[str, Any] = {"optimizer": {"smear_lr": SMEAR_LR}}
    for name, (path, _, _) in FIELDS.items():
        section, _, key = path.partition(".")
        spec.setdefault(section, {})[key] = values[name]
    if workers is not None:
        spec["resources"] = {"workers": {"min": workers, "max": workers}}
    spec["name"] = values["model-tag"] or f"d{values['depth']}"
    if not found:
        found += _derive(spec, values, vocab_size, notes)
        notes += _unused(given, values)
        _clocks(spec, values, notes)
        found += _start(spec, values, base_folder)
    if found:
        raise SpecError(found)
    return Translation(spec, notes)


def _flag_words(command: str) -> tuple[list[str], int | None]:
    """The flags of the command line, and the number of workers where torchrun gives one."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise SpecError([Violation("--nanochat", command, str(error).lower())]) from None
    workers = None
    script = next((i for i, word in enumerate(words) if "base_train" in word), None)
    if script is not None and not words[script].startswith("--"):
        for i, word in enumerate(words[:script]):
            name, equals, value = word.lstrip("-").replace("-", "_").partition("=")
            if name == "nproc_per_node":
                value = value if equals else words[i + 1]
                if not value.isdecimal() or not 0 < int(value) < 10**6:
                    reason = "must be a number of workers"
                    raise SpecError([Violation("--nproc_per_node", value, reason)])
                workers = int(value)
        words = words[script + 1 :]
    return [word for word in words if word != "--"], workers


def _parse(words: list[str]) -> tuple[dict[str, Any], list[Violation]]:
    given: dict[str, Any] = {}
    found: list[Violation] = []
    rest = list(words)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        name = flag.removeprefix("--")
        if not flag.startswith("--") or (kind := _kind(name)) is None:
            found.append(Violation(flag, text or MISSING, "is not a flag of nanochat's base_train"))
            if flag.startswith("--") and not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        if name in SWITCHES:
            given[name] = True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                found.append(Violation(flag, MISSING, "needs a value"))
                continue
            text = rest.pop(0)
        try:
            given[name] = kind(text)
        except ValueError:
            wanted = {int: "a whole number", _finite: "a number"}.get(kind, "a value")
            found.append(Violation(flag, text[:40], f"must be {wanted}"))
    return given, found


def _kind(name: str) -> Text | None:
    if name in FIELDS:
        return FIELDS[name][1]
    if name in DERIVING:
        return DERIVING[name][0]
    return str if name in NOTED else None


def _derive(
    spec: dict[str, Any], values: Mapping[str, Any], vocab_size: int | None, notes: list[str]
) -> list[Violation]:
    """total_batch_size and num_iterations, where the command line leaves them to nanochat."""
    batch, steps = values["total-batch-size"], values["num-iterations"]
    spec["batch"]["total_batch_size"], spec["schedule"]["num_iterations"] = batch, steps
    if batch != -1 and steps != -1:
        return []
    try:
        model = ModelSpec.model_validate(spec["model"])
    except ValidationError as error:
        flags = {path: name for name, (path, _, _) in FIELDS.items()}
        return [
            Violation(f"--{flags[f'model.{found.field}']}", found.value, found.reason)
            for found in from_pydantic(error)
        ]
    ratio, flops = values["target-param-data-ratio"], values["target-flops"]
    vocab = vocab_size or VOCAB_SIZE
    if ratio * ModelShape.of(model, vocab).scaling_params < 1:
        reason = "must be above 0, and give at least one token"
        return [Violation("--target-param-data-ratio", ratio, reason)]
    if batch == -1:
        batch = auto_total_batch_size(model, vocab, ratio)
        notes.append(f"--total-batch-size: {batch:,} tokens follow from the model's size")
    if batch < 1:
        return [Violation("--total-batch-size", batch, "must be at least 1, or -1")]
    if steps == -1:
        shape = ModelShape.of(model, vocab)
        steps = iterations_for(shape, batch, target_flops=flops if flops > 0 else None, ratio=ratio)
        source = f"--target-flops {flops:g}" if flops > 0 else f"{ratio:g} tokens a parameter"
        notes.append(f"--num-iterations: {steps:,} steps follow from {source}")
    if vocab_size is None:
        notes.append(f"the above holds for a vocabulary of {vocab:,}, which the spec insists on")
    spec["model"]["vocab_size"] = vocab
    spec["batch"]["total_batch_size"], spec["schedule"]["num_iterations"] = batch, steps
    return []


def _unused(given: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What nanochat takes and doesn't look at either, since another flag comes first."""
    steps, batch = values["num-iterations"] != -1, values["total-batch-size"] != -1
    flops = values["target-flops"] > 0
    beside = {"target-flops": steps, "target-param-data-ratio": batch and (steps or flops)}
    return [
        f"--{name}: not used: steps and batch follow from other flags"
        for name, unused in beside.items()
        if unused and name in given
    ]


def _clocks(spec: dict[str, Any], values: Mapping[str, Any], notes: list[str]) -> None:
    """How often to validate, sample and save; nanochat's -1 is never."""
    spec["evaluate"]["every"] = max(values["eval-every"], 0)
    spec["sample"] = {"every": max(values["sample-every"], 0)}
    if values["eval-every"] <= 0:
        notes.append("--eval-every: the last step is always validated")
    save = values["save-every"]
    if save > 0:
        spec["checkpoint"] = {"every_steps": save, "keep_every_steps": save}
    else:
        notes.append("--save-every: checkpoints are also taken on the way (section checkpoint)")


def _start(
    spec: dict[str, Any], values: Mapping[str, Any], base_folder: str | None
) -> list[Violation]:
    step = values["resume-from-step"]
    if step == -1:
        return []
    if step < 0:
        return [Violation("--resume-from-step", step, "must be a step, or -1")]
    if base_folder is None:
        reason = "needs nanochat's base folder (--nanochat-dir), where the checkpoint lies"
        return [Violation("--resume-from-step", step, reason)]
    tag = values["model-tag"] or f"d{values['depth']}"
    folder = PurePosixPath(base_folder) / CHECKPOINT_FOLDER / tag
    spec["start"] = {"from": f"nanochat:{folder}@{step}"}
    return []


def _file_uri(base_folder: str, name: str) -> str:
    return f"file:{PurePosixPath(base_folder) / name}"
