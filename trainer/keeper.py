"""Ships what a rank wrote last, when the rank can't: it was killed, aborted, or crashed in C++.

A small process beside each rank that sleeps until the rank's end of a pipe closes. It reads the
files that the rank wrote to, which outlive it, and holds them open, so nobody can take them away.

Invariant: the rank never waits for it, and it ends by itself: at once where the rank has shipped
all, and else within KEEP_S of the rank's end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from trainer.output import Tail

KEEP_S = 120.0  # of a store that is away just then
END_S = 5.0
DISMISSED = "dismissed\n"
log = logging.getLogger(__name__)


class Keeper:
    """The rank's side."""

    def __init__(self, files: Sequence[int], **facts: Any) -> None:
        """files: what the rank writes to, to be read. facts: see `note`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.keeper"],
            stdin=subprocess.PIPE,
            bufsize=0,
            pass_fds=files,
            start_new_session=True,  # what ends the rank with its group must not end it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # one that is stopped holds up nobody
        self.note(files=list(files), **facts)

    def note(self, **facts: Any) -> None:
        """What holds from now on; see `ship`. By pipe, not by argv: some are secrets."""
        self._tell(json.dumps(facts) + "\n")

    def dismiss(self) -> None:
        """Nothing is left to ship."""
        self._tell(DISMISSED)
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)  # the first of the two processes, which is long gone

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody ended it: the rank goes on without
            self._process.stdin.write(line.encode())


def keep(files: Sequence[int], **facts: Any) -> Keeper | None:
    """A keeper of these; None without any, or where the box can start no process just now."""
    try:
        return Keeper(files, **facts) if files else None
    except OSError as error:
        log.warning("what this process writes last is lost if it is killed: %s", error)
        return None


def ship(facts: dict[str, Any]) -> None:
    """Store what is left in the files.

    facts: storage (its URI), job, attempt, rank, files, and secrets, which no line may hold;
    sequence, the number of the next piece, and offsets, where in each file it begins.

    Raises:
        StoreError: it could not be stored within KEEP_S.
    """
    from trainer.storage.layout import LogKey
    from trainer.storage.logs import write_piece
    from trainer.storage.object_store import open_store
    from trainer.storage.retry import patiently

    store = open_store(facts["storage"])
    tail = Tail(facts["files"], facts["secrets"], facts["offsets"])
    sequence = facts["sequence"]
    while lines := tail.take(last=True):
        key = LogKey(facts["attempt"], facts["rank"], sequence)
        # Safe to repeat; a piece that the rank stored in its last moment comes again, with more.
        patiently(partial(write_piece, store, facts["job"], key, lines), KEEP_S)
        tail.keep()
        sequence += 1


def main() -> None:
    """Wait for the rank's end."""
    if os.fork():  # nobody's child: Ray ends a worker's children with it
        os._exit(0)
    facts: dict[str, Any] = {}
    for told in sys.stdin:
        if told == DISMISSED:
            return
        facts |= json.loads(told)
    ship(facts)


if __name__ == "__main__":
    main()
