"""Packing one row group's documents into rows of tokens, and the order of its rows.

The rule is nanochat's (largest document that fits; when none does, the shortest one cropped) over
the whole row group in place of a running buffer, so that rows depend on nothing before them; and a
document longer than a row goes on in further pieces instead of being cut off, which is where
nearly all the text that nanochat loses is lost (docs/adr/0003).

Invariant: pure functions of their arguments, on any machine and any version of any library: the
shuffle sorts by BLAKE2b digests and uses no library's random numbers.
Shapes: R rows, T tokens of context; a row holds T + 1 tokens, so that targets are inputs shifted.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PackReport:
    """Where a row group's tokens went; tokens = kept + cropped + dropped.

    The first token of a document counts again for each piece that it goes on in.
    """

    tokens: int = 0
    kept_tokens: int = 0
    cropped_tokens: int = 0  # the rest of documents that filled up a row
    dropped_tokens: int = 0  # the last, incomplete row


def pack(documents: Sequence[Sequence[int]], T: int) -> tuple[Rows, PackReport]:
    """Pack tokenized documents into whole rows [R, T + 1], in the order in which they fill.

    A document begins with <|bos|>, and so does every piece of a longer one.
    """
    width = T + 1
    documents = [piece for document in documents for piece in _pieces(document, width)]
    plan, lost = _plan([len(document) for document in documents], width)
    rows = np.empty((len(plan), width), dtype=np.int32)
    for row, members in zip(rows, plan, strict=True):
        at = 0
        for index in members:
            piece = documents[index][: width - at]
            row[at : at + len(piece)] = piece
            at += len(piece)
    return rows, lost


def _pieces(document: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    """A document in pieces of at most width tokens, each with its first token in front."""
    yield document[:width]
    for start in range(width, len(document), width - 1):
        yield [document[0], *document[start : start + width - 1]]


def _plan(lengths: Sequence[int], width: int) -> tuple[list[list[int]], PackReport]:
    """Which documents make up each row; only the last of a row may be cropped.

    O(n log n): documents stand sorted by length, and pointers with path halving lead from any
    place to the nearest unused document at or below it.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    sizes = [lengths[index] for index in order]
    below = list(range(len(order) + 1))  # place p stands at p + 1; 0 means none
    shortest = 0
    left = len(order)
    plan: list[list[int]] = []
    cropped = dropped = 0
    while left:
        members: list[int] = []
        space = width
        while space and left:
            place = _find(below, bisect_right(sizes, space)) - 1
            if place < 0:
                while _find(below, shortest + 1) != shortest + 1:
                    shortest += 1
                place = shortest
            below[place + 1] = place
            left -= 1
            taken = min(space, sizes[place])
            cropped += sizes[place] - taken
            space -= taken
            members.append(order[place])
        if space:
            dropped = width - space
        else:
            plan.append(members)
    total = sum(sizes)
    return plan, PackReport(total, len(plan) * width, cropped, dropped)


def _find(below: list[int], place: int) -> int:
    while below[place] != place:
        below[place] = below[below[place]]
        place = below[place]
    return place


def shuffled(count: int, *key: object) -> list[int]:
    """The numbers 0..count-1 in an order that depends on the key alone, evenly spread."""
    prefix = "\0".join(str(part) for part in key).encode()
    assert b"\0\0" not in prefix, "an empty part would make two keys one"
    base = hashlib.blake2b(prefix, digest_size=16)

    def digest(index: int) -> bytes:
        own = base.copy()
        own.update(b"\0" + str(index).encode())
        return own.digest()

    return sorted(range(count), key=lambda index: (digest(index), index))
