"""Drawing tokens, and bits per byte."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trainer.evaluate import EvaluationSums, bits_per_byte, evaluate
from trainer.sample import generate

VOCAB = 20


def echo(idx_BT: Tensor) -> Tensor:
    """A model whose likeliest next token is the last one plus 1, its neighbours less likely."""
    distance = (torch.arange(VOCAB) - (idx_BT[..., None] + 1) % VOCAB).abs()
    return -distance.float()


def draw(**options: object) -> list[int]:
    return list(generate(echo, [3], 30, context_tokens=8, **options))  # type: ignore[arg-type]


def test_greedy_takes_the_likeliest() -> None:
    assert draw()[:4] == [4, 5, 6, 7]


def test_draws_follow_the_seed_alone() -> None:
    first = draw(temperature=1.5, seed=1)
    torch.manual_seed(5)
    assert draw(temperature=1.5, seed=1) == first
    assert draw(temperature=1.5, seed=2) != first


def test_sampling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw(temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_top_k_of_one_is_greedy_and_low_temperature_nearly() -> None:
    assert draw(temperature=2.0, top_k=1) == draw()
    assert draw(temperature=0.01) == draw()


def test_top_k_never_draws_beyond_the_k_likeliest() -> None:
    tokens = [3, *draw(temperature=5.0, top_k=3)]
    steps = [(b - a - 1) for a, b in pairwise(tokens) if 1 < a < 17]
    assert set(steps) <= {-1, 0, 1}
    assert len(set(steps)) > 1


def test_a_stop_token_ends_the_text_and_is_left_out() -> None:
    assert draw(stop_tokens=frozenset({7})) == [4, 5, 6]


def test_context_is_the_last_tokens_only() -> None:
    seen: list[int] = []

    def watching(idx_BT: Tensor) -> Tensor:
        seen.append(idx_BT.size(1))
        return echo(idx_BT)

    list(generate(watching, [1, 2, 3], 5, context_tokens=4))
    assert seen == [3, 4, 4, 4, 4]


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        draw(**options)
    with pytest.raises(ValueError, match="prompt"):
        list(generate(echo, [], 1, context_tokens=4))


def nats(_: Tensor, targets_BT: Tensor) -> Tensor:
    return targets_BT.float() * 0.5


def test_only_targets_with_bytes_count() -> None:
    token_bytes_V = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    y_BT = torch.tensor([[0, 1, 2, 3, -1]], dtype=torch.int32)
    sums = evaluate(nats, [(y_BT, y_BT)], token_bytes_V)
    assert sums == EvaluationSums(nats=3.0, bytes=6)
    assert sums.bits_per_byte == pytest.approx(3.0 / (math.log(2) * 6))


def test_sums_of_two_halves_are_the_sums_of_the_whole() -> None:
    token_bytes_V = torch.arange(8)
    y_BT = torch.randint(0, 8, (4, 16), generator=torch.Generator().manual_seed(0))
    halves = [evaluate(nats, [(part, part)], token_bytes_V) for part in y_BT.split(2)]
    assert halves[0] + halves[1] == evaluate(nats, [(y_BT, y_BT)], token_bytes_V)


def test_no_bytes_at_all_is_refused_rather_than_infinite() -> None:
    with pytest.raises(ValueError, match="evaluate more"):
        bits_per_byte(1.0, 0)
