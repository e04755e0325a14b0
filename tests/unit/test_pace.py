"""Which rank the others wait for."""

from __future__ import annotations

import pytest
import torch

from trainer import pace
from trainer.distributed import World
from trainer.pace import SLOW_RATIO, WINDOW_STEPS, Pace

CPU = torch.device("cpu")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Pace:
    monkeypatch.setattr(World, "gather", lambda self, value: ["one", "two", "three"])
    return Pace(World(0, 3, 0), CPU)


def test_a_slow_rank_is_told_once_by_its_box_and_again_after_it_was_well(three: Pace) -> None:
    slow = 1.01 * SLOW_RATIO

    def told(seconds: list[float]) -> list[str]:
        return [words for _ in range(WINDOW_STEPS) for words in three.judge(seconds)]

    assert told([1.0, 1.1, 1.2]) == []
    (words,) = told([1.0, slow, 1.0])
    assert words.startswith("rank 1 on two holds up the others: 1.52 s of work")
    assert told([1.0, slow, 1.0]) == []
    assert told([1.0, 1.0, 1.0]) == []
    assert len(told([1.0, slow, 1.0])) == 1


def test_a_single_slow_step_is_nobodys_fault(three: Pace) -> None:
    for step in range(3 * WINDOW_STEPS):
        assert three.judge([1.0, 60.0 if step % WINDOW_STEPS == 0 else 1.0, 1.0]) == []


def test_of_two_the_slower_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: ["one", "two"])
    two = Pace(World(0, 2, 0), CPU)
    (words,) = [w for _ in range(WINDOW_STEPS) for w in two.judge([3.0, 1.0])]
    assert words.startswith("rank 0 on one")


def test_work_counts_from_the_data_to_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    clock = Pace(World(), CPU)
    clock.begin(0.5)
    assert clock.last_s == 0.0
    now[0] += 2.0
    clock.end()
    now[0] += 7.0  # the update, and waiting for others
    clock.begin(0.0)
    assert clock.last_s == pytest.approx(2.5)
