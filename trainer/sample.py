"""Drawing tokens from a model.

Owns the choice of the next token. Must not know tokenizers or how the model is trained; it needs
only a function from token ids to logits.

Invariant: the tokens depend on weights, prompt and arguments alone; draws happen on the CPU with a
generator of their own, so sampling during training doesn't move any other random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


@torch.inference_mode()
def generate(
    logits: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    context_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_tokens: frozenset[int] = frozenset(),
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Yield new tokens one by one, without the prompt and without the stop token.

    Args:
        logits: from ids [1, T] to fp32 logits [1, T, V], such as GPT.logits.
        prompt: at least one token id.
        context_tokens: the model's sequence_len; of a longer text it sees the last so many tokens.
        temperature: 0 takes the likeliest token; else logits are divided by it before the draw.
        top_k: draw among the so many likeliest only.
        seed: of the draws.
        device: where ids are put, the model's.

    Raises:
        ValueError: an empty prompt, a negative temperature or a top_k below 1.
    """
    if not prompt:
        raise ValueError("prompt must have at least one token")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be >= 0 and top_k {top_k} >= 1")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        ids_1T = torch.tensor([tokens[-context_tokens:]], dtype=torch.long, device=device)
        token = _choose(logits(ids_1T)[0, -1].float().cpu(), temperature, top_k, generator)
        if token in stop_tokens:
            return
        tokens.append(token)
        yield token


def _choose(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < logits_V.numel():
        least = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    odds_V = torch.softmax(logits_V / temperature, dim=-1)
    return int(torch.multinomial(odds_V, 1, generator=generator))
