"""Packing against the rule written down naively, for any lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import pack


def pack_naively(documents: list[list[int]], width: int) -> list[list[int]]:
    """The rule, word for word, without any index structure."""
    documents = [piece for document in documents for piece in cut(document, width)]
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


def cut(document: list[int], width: int) -> list[list[int]]:
    """A long document as rows of its own, each with the first token in front."""
    pieces = [document[:width]]
    rest = document[width:]
    while rest:
        pieces.append([document[0], *rest[: width - 1]])
        rest = rest[width - 1 :]
    return pieces


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 20))
def test_packing_is_the_rule(lengths: list[int], T: int) -> None:
    documents = [[1000 * index + at for at in range(n)] for index, n in enumerate(lengths)]
    rows, report = pack(documents, T)
    assert rows.tolist() == pack_naively(documents, T + 1)
    assert report.tokens == sum(len(p) for d in documents for p in cut(d, T + 1))
    assert report.kept_tokens == rows.size
    assert report.tokens == report.kept_tokens + report.cropped_tokens + report.dropped_tokens
    first = {document[0] for document in documents}
    inner = [token for token in rows.ravel().tolist() if token not in first]
    assert len(set(inner)) == len(inner)  # none twice but those that begin a piece
