"""What programs that answer one request of the service have in common.

A request is one line of JSON on stdin. Each line of stdout is an answer; {"error": why} is the
last one, and means that the request can't be met. Any other error is ours, and ends the program.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from trainer.checkpoint.train_state import StateMisfitError
from trainer.storage.binding import BindingError, DataChangedError
from trainer.storage.documents import DocumentError
from trainer.storage.object_store import StoreError
from trainer.storage.repository import CorruptCheckpointError
from trainer.storage.tokenizer_files import TokenizerError

R = TypeVar("R")

NICENESS = 10  # training on this machine comes first
REFUSALS = (
    BindingError, CorruptCheckpointError, DataChangedError, DocumentError, StateMisfitError,
    StoreError, TokenizerError,
)  # fmt: skip


def answer(kind: Callable[..., R], work: Callable[[R], Iterable[Mapping[str, object]]]) -> None:
    """Read a request's fields into a kind, and print what work makes of it as it comes."""
    os.nice(NICENESS)
    request = kind(**json.loads(sys.stdin.readline()))
    try:
        for line in work(request):
            print(json.dumps(line), flush=True)
    except REFUSALS as error:
        print(json.dumps({"error": str(error)}), flush=True)
