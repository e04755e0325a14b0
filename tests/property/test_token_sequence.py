"""The tokens a job sees do not depend on interruptions or on how many ranks share a step."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.corpus import reader_of, tokenizer_of, write_corpus
from trainer.data.loader import START, Loader, Position
from trainer.data.tokenizer import Tokenizer
from trainer.storage.binding import DataBinding

T = 12
ROWS = 8
STEPS = 6

words = st.lists(
    st.sampled_from(["alpha", "beta", "the", "of", "12345", "\n\n", "Zeta!"]), max_size=12
)
documents = words.map(" ".join)
groups = st.lists(documents, max_size=4)
shards = st.lists(st.lists(groups, max_size=3), min_size=1, max_size=3)


@contextmanager
def corpus(layout: list[list[list[str]]]) -> Iterator[tuple[DataBinding, Tokenizer, Path]]:
    """These shards, one more that surely has rows, and one to validate on."""
    sure = [[" ".join(["sure"] * 40)]]
    with tempfile.TemporaryDirectory() as folder:
        binding = write_corpus(Path(folder) / "data", [*layout, sure, sure])
        yield binding, tokenizer_of(binding), Path(folder)


def global_rows(
    loaders: list[Loader], device_batch_size: int, steps: int
) -> tuple[list[np.ndarray], Position]:
    """Each step's rows in their order over the ranks, as training consumes them."""
    seen = []
    position = START
    for _ in range(steps):
        batches = [loader.next_step() for loader in loaders]
        assert len({batch.position_after for batch in batches}) == 1
        position = batches[0].position_after
        for micro in zip(*(batch.micro for batch in batches), strict=True):
            for x, y in micro:
                assert len(x) == device_batch_size
                seen.append(np.concatenate([x, y[:, -1:]], axis=1))
    return seen, position


@settings(max_examples=30)
@given(
    layout=shards,
    seed=st.integers(0, 3),
    cuts=st.lists(st.integers(1, STEPS - 1), max_size=3),
    shapes=st.lists(
        st.sampled_from([(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)]), min_size=4, max_size=4
    ),
)
def test_any_interruptions_and_world_sizes_give_the_same_tokens(
    layout: list[list[list[str]]],
    seed: int,
    cuts: list[int],
    shapes: list[tuple[int, int]],
) -> None:
    with corpus(layout) as (binding, tokenizer, folder):

        def run(position: Position, world: int, batch: int, steps: int) -> tuple[bytes, Position]:
            loaders = [
                Loader(
                    reader_of(binding, folder),
                    tokenizer,
                    T=T,
                    rows_per_step=ROWS,
                    device_batch_size=batch,
                    order_seed=seed,
                    rank=rank,
                    world_size=world,
                    position=Position.from_dict(position.to_dict()),
                )
                for rank in range(world)
            ]
            seen, after = global_rows(loaders, batch, steps)
            return np.concatenate(seen).tobytes(), after

        undisturbed, end = run(START, 1, ROWS, STEPS)
        pieces = b""
        position = START
        bounds = [0, *sorted(set(cuts)), STEPS]
        for (world, batch), (first, last) in zip(shapes, itertools.pairwise(bounds), strict=False):
            piece, position = run(position, world, batch, last - first)
            pieces += piece
        assert pieces == undisturbed
        assert position == end
