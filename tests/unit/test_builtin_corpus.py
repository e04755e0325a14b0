"""The builtin corpus: prepared once, the same every time, usable as any other source."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes.corpus import reader_of, tokenizer_of
from trainer.data import builtin
from trainer.data.loader import Loader
from trainer.storage.binding import bind


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return builtin.collect()


def test_the_corpus_is_megabytes_of_distinct_text(documents: list[str]) -> None:
    assert len(documents) > 3000
    assert sum(map(len, documents)) > 2_000_000
    assert len(set(documents)) == len(documents)
    assert any('The "if" statement' in text for text in documents)


def test_docstrings_and_comments_are_read_without_running_the_source() -> None:
    source = "\n".join(
        [
            '"""Module text."""',
            "raise SystemExit",
            "# one",
            "#",
            "#  three",
            "if True:",
            "    class A:",
            '        """Class text."""',
            "        def f(self):",
            '            """Method text."""',
        ]
    )
    assert list(builtin._docstrings("m", ast.parse(source))) == [
        "m\n\nModule text.",
        "m.A\n\n    Class text.\n\nm.A.f\n\n    Method text.",
    ]
    assert list(builtin._comments(source)) == ["one\n\n three"]


def test_splitting_loses_nothing_and_is_even() -> None:
    texts = [str(index) * 10 for index in range(10, 99)]
    runs = builtin.split(texts, 4)
    assert [text for run in runs for text in run] == texts
    sizes = [sum(map(len, run)) for run in runs]
    assert max(sizes) - min(sizes) <= 40


def test_preparing_twice_at_once_ends_with_one_corpus(
    tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "collect", lambda: documents[:1200])
    out = f"file:{tmp_path}/out"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: builtin.prepare(out, 300), range(2))
    assert first == second
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert builtin.prepare(out, 300) == first
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (marker,) = (tmp_path / "out").glob("*/corpus.json")
    assert "PSF" in json.loads(marker.read_text())["licence"]

    binding = bind(first.source, first.tokenizer, "last")
    assert len(binding.shards) == builtin.TRAINING_SHARDS
    assert binding.tokenizer.vocab_size == 300
    loader = Loader(
        reader_of(binding, tmp_path / "cache"),
        tokenizer_of(binding),
        T=128,
        rows_per_step=4,
        device_batch_size=4,
        order_seed=0,
    )
    assert loader.next_step().tokens == 512
