"""Text from a checkpoint's weights, drawn by a child process: the service has no torch.

One request at a time, on the CPU, at low priority: training on the same machine comes first.

Invariant: the child ends with the request, whether it is read to its end, given up or refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass

from service.checkpoints import CheckpointName
from service.children import answers
from service.errors import BusyError, PreconditionError, require
from service.lifecycle import Lifecycle

DEFAULT_TOKENS = 64
MAX_TOKENS = 4096
MAX_TEMPERATURE = 10.0
MAX_PROMPT_CHARS = 100_000
SEEDS = 2**63


@dataclass(frozen=True)
class SampleWish:
    """What to draw; see SampleCheckpointRequest."""

    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    seed: int

    def checked(self) -> SampleWish:
        """Itself; InvalidRequestError naming the field, its value and the bound."""
        chars = len(self.prompt)
        warm = 0 <= self.temperature <= MAX_TEMPERATURE  # a NaN is refused too
        require(
            chars <= MAX_PROMPT_CHARS, f"prompt: {chars} characters: at most {MAX_PROMPT_CHARS}"
        )
        require(
            1 <= self.max_tokens <= MAX_TOKENS, f"max_tokens: {self.max_tokens}: 1 to {MAX_TOKENS}"
        )
        require(warm, f"temperature: {self.temperature}: 0 to {MAX_TEMPERATURE:g}")
        require(self.top_k >= 0, f"top_k: {self.top_k}: at least 0")
        require(0 <= self.seed < SEEDS, f"seed: {self.seed}: at least 0")
        return self


class Sampler:
    """Draws text, one request at a time."""

    def __init__(self, lifecycle: Lifecycle, storage_uri: str) -> None:
        self._lifecycle = lifecycle
        self._storage_uri = storage_uri
        self._turn = asyncio.Lock()

    async def sample(self, checkpoint: str, wish: SampleWish) -> AsyncGenerator[str, None]:
        """The text that JOB@STEP writes, piece by piece.

        Raises:
            InvalidRequestError: a value out of its bounds.
            JobNotFoundError, CheckpointNotFoundError: there is no such checkpoint.
            BusyError: another sample is being drawn.
            PreconditionError: the checkpoint can't be used; says why.
        """
        wish.checked()
        name = CheckpointName.parse(checkpoint)
        await self._lifecycle.require(name)
        if self._turn.locked():
            raise BusyError("another sample is being drawn; try again in a moment")
        async with self._turn:
            request = {"storage_uri": self._storage_uri, **name._asdict(), **asdict(wish)}
            async with contextlib.aclosing(answers("trainer.completion", request)) as told:
                async for answer in told:
                    if "error" in answer:
                        raise PreconditionError(f"{checkpoint}: {answer['error']}")
                    yield answer["text"]
