"""Text from a checkpoint, as a program: `python -m trainer.completion`, a request on stdin.

The request is one line of JSON (see Request); each line of the answer is {"text": piece}, or
{"error": why} and nothing after it. Runs on the CPU in float32, whatever the job trained in, and
reads only the weights, each part's digest verified.

Invariant: the text is a function of checkpoint and request alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.assembly import Blueprint
from trainer.checkpoint.shares import MODEL
from trainer.checkpoint.train_state import restore_weights
from trainer.data.tokenizer import Tokenizer
from trainer.gpt import GPT
from trainer.program import answer
from trainer.sample import generate
from trainer.storage.manifest import CheckpointRef
from trainer.storage.object_store import open_store
from trainer.storage.repository import CheckpointRepository

LONGEST_CHARACTER = 4  # bytes of UTF-8; no token is shorter than one


@dataclass(frozen=True)
class Request:
    """What to draw, from where. step None: the newest checkpoint; top_k 0: off."""

    storage_uri: str
    job_id: str
    step: int | None
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    seed: int


def complete(request: Request) -> Iterator[str]:
    """Yield the text that follows the prompt, in pieces of whole characters.

    Raises:
        one of trainer.program's REFUSALS: the checkpoint or its tokenizer can't be used.
    """
    repository = CheckpointRepository(open_store(request.storage_uri), request.job_id)
    blueprint = Blueprint.read(repository.document(), torch.get_num_threads())
    model = GPT(blueprint.shape, torch.float32, torch.float32)
    repository.read_current(
        request.step, lambda ref: restore_weights(parts_with_weights(repository, ref), model)
    )
    tokenizer = blueprint.tokenizer
    tokens = generate(
        model.logits,
        [tokenizer.bos_id, *tokenizer.encode(request.prompt)],
        request.max_tokens,
        context_tokens=blueprint.shape.sequence_len,
        temperature=request.temperature,
        top_k=request.top_k or None,
        seed=request.seed,
        stop_tokens=frozenset({tokenizer.bos_id}),  # the next document begins
    )
    yield from whole_characters(tokens, tokenizer)


def parts_with_weights(repository: CheckpointRepository, ref: CheckpointRef) -> Iterator[Path]:
    """A copy of each part that may hold weights, verified; gone when the next is asked for."""
    for part in repository.manifest(ref).parts:
        if part.tensors is not None and not any(name.startswith(MODEL) for name in part.tensors):
            continue
        with tempfile.TemporaryDirectory(prefix="everstep-sample-") as folder:
            path = Path(folder) / part.name
            repository.read_part(ref, part, path)
            yield path


def whole_characters(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text of tokens as they come: one that ends within a character waits for the next."""
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd") or len(waiting) >= LONGEST_CHARACTER:
            waiting.clear()
            yield text
    if waiting:
        yield tokenizer.decode(waiting)


def main() -> None:
    """Answer one request."""
    answer(Request, lambda request: ({"text": piece} for piece in complete(request)))


if __name__ == "__main__":
    main()
