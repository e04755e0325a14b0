"""Packing against the rule written down naively, for any lengths."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.packing import pack


def pack_naively(documents: list[list[int]], width: int) -> list[list[int]]:
    """The rule, word for word, without any index structure."""
    waiting = sorted(range(len(documents)), key=lambda index: (len(documents[index]), index))
    rows = []
    while waiting:
        row: list[int] = []
        while len(row) < width and waiting:
            fitting = [i for i in waiting if len(documents[i]) <= width - len(row)]
            chosen = fitting[-1] if fitting else waiting[0]
            waiting.remove(chosen)
            row += documents[chosen][: width - len(row)]
        if len(row) == width:
            rows.append(row)
    return rows


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 20))
def test_packing_is_the_rule(lengths: list[int], T: int) -> None:
    documents = [[1000 * index + at for at in range(n)] for index, n in enumerate(lengths)]
    rows, report = pack(documents, T)
    assert rows.tolist() == pack_naively(documents, T + 1)
    assert report.tokens == sum(lengths)
    assert report.kept_tokens == rows.size
    assert report.tokens == report.kept_tokens + report.cropped_tokens + report.dropped_tokens
    assert len(set(rows.ravel().tolist())) == rows.size  # no token twice
