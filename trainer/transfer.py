"""Checkpoints to and from other programs, as a program: `python -m trainer.transfer`.

The request is one line of JSON on stdin (see Request); the answer is one line, {"files": URIs}, or
{"error": why}. Runs at low priority, with the whole state in memory.

Invariant: an import is one of our checkpoints or none; an export's marker, the file by which its
readers find it, is there only once all of its files are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.assembly import Blueprint
from trainer.checkpoint.nanochat import NanochatCheckpoint, write_nanochat, write_safetensors
from trainer.checkpoint.shares import MODEL, OPTIMIZER
from trainer.checkpoint.train_state import TrainState, read_tensors
from trainer.loop import SMOOTHING
from trainer.program import answer
from trainer.start import download, import_nanochat
from trainer.storage.manifest import CheckpointRef, Manifest
from trainer.storage.object_store import AlreadyExistsError, LocalObjectStore, open_store
from trainer.storage.repository import CheckpointRepository
from trainer.storage.tokenizer_files import PICKLE, write_tokenizer_files

TOKENIZER = "tokenizer/"  # belongs into nanochat's base folder, beside base_checkpoints
NO_FIGURE = sys.float_info.max  # nanochat's is infinite, which is no JSON
# Flags of nanochat's that are fields of a spec; its fine-tuning takes its defaults from them.
FLAGS = {
    "model": ("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern"),
    "batch": ("device_batch_size", "total_batch_size"),
    "optimizer": ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay"),
    "schedule": ("num_iterations", "warmup_steps", "warmdown_ratio", "final_lr_frac"),
}


@dataclass(frozen=True)
class Request:
    """What to bring where. format empty: import the nanochat checkpoint of the job's document.

    folder: an empty one to work in. step None: the newest checkpoint. target: URI of a folder.
    format: nanochat or safetensors.
    """

    storage_uri: str
    folder: str
    job_id: str
    step: int | None = None
    target: str = ""
    format: str = ""


def transfer(request: Request) -> list[str]:
    """Do it; the URIs of the files that were written.

    Raises:
        one of trainer.program's REFUSALS: it can't be done.
    """
    repository = CheckpointRepository(open_store(request.storage_uri), request.job_id)
    folder = Path(request.folder)
    if not request.format:
        import_nanochat(repository, repository.document(), folder, "import")
        return []
    blueprint = Blueprint.read(repository.document(), torch.get_num_threads())
    target = open_store(request.target)

    def write(ref: CheckpointRef) -> list[str]:
        for_nanochat = request.format == "nanochat"
        marker = f"model_{ref.step:06d}.pt" if for_nanochat else "model.safetensors"
        if target.head(marker) is not None:
            raise AlreadyExistsError(f"{target.uri} holds {marker} already: choose another folder")
        manifest = repository.manifest(ref)
        parts = download(repository, ref, manifest, folder / "parts")
        checkpoint = as_nanochats(blueprint, manifest, parts)
        out = folder / "out"
        (out / TOKENIZER).mkdir(parents=True)
        if for_nanochat:
            write_nanochat(checkpoint, blueprint.groups, out)
            (out / TOKENIZER / PICKLE).write_bytes(blueprint.tokenizer.pickled())
            lengths = torch.from_numpy(blueprint.tokenizer.token_bytes())
            torch.save(lengths, out / TOKENIZER / "token_bytes.pt")
        else:
            write_safetensors(checkpoint, out)
            write_tokenizer_files(blueprint.tokenizer.files, LocalObjectStore(out), TOKENIZER)
        files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
        return sorted(files, key=lambda name: (name == marker, name))

    names = repository.read_current(request.step, write)
    for name in names:
        target.put_file(name, folder / "out" / name)
    return [f"{target.uri.rstrip('/')}/{name}" for name in names]


def as_nanochats(
    blueprint: Blueprint, manifest: Manifest, parts: Sequence[Path]
) -> NanochatCheckpoint:
    """A checkpoint of ours as nanochat would have it.

    Its place in the data is exact for what nanochat trained itself, else the epoch's begin:
    nanochat reads in order of name, we draw the order, so no place in one is one in the other.
    """
    state, spec, shape = TrainState.from_dict(manifest.state), blueprint.spec, blueprint.shape
    tensors = read_tensors(parts)
    assert state.in_force is not None, "checkpoints are of a step"
    source, figure, place = blueprint.document.nanochat, manifest.validation_bpb, (0, -1)
    if source is not None and source.step == manifest.step and source.shard >= 0:
        place = (source.shard, source.row_group)
    meta = {
        "step": manifest.step,
        "val_bpb": figure,
        "model_config": {
            "sequence_len": shape.sequence_len,
            "vocab_size": shape.vocab_size,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_kv_head": shape.n_kv_head,
            "n_embd": shape.n_embd,
            "window_pattern": spec.model.window_pattern,
        },
        "user_config": {
            name: getattr(getattr(spec, section), name)
            for section, names in FLAGS.items()
            for name in names
        },
        "device_batch_size": spec.batch.device_batch_size,
        "max_seq_len": spec.model.max_seq_len,
        "total_batch_size": spec.batch.total_batch_size,
        "dataloader_state_dict": {
            "pq_idx": place[0],
            "rg_idx": place[1],
            "epoch": state.position.epoch + 1,
        },
        "loop_state": {
            "min_val_bpb": NO_FIGURE if figure is None else figure,
            "smooth_train_loss": (state.loss_smoothed or 0.0) * (1 - SMOOTHING**manifest.step),
            "total_training_time": 0.0,
        },
    }
    base: Any = manifest.state.get("initial_lr", {})
    return NanochatCheckpoint(
        step=manifest.step,
        shape=shape,
        weights={name: tensors[MODEL + name] for name in shape.named_shapes()},
        optimizer_state={
            name.removeprefix(OPTIMIZER): tensor
            for name, tensor in tensors.items()
            if name.startswith(OPTIMIZER)
        },
        counters=state.counters,
        in_force=state.in_force,
        initial_lr=base,
        meta=meta,
    )


def main() -> None:
    """Answer one request."""
    answer(Request, lambda request: [{"files": transfer(request)}])


if __name__ == "__main__":
    main()
