"""What a process writes, read back from the files that it writes to, and what must not be told.

Light: the keeper waits with nothing else loaded. Knows nothing of stores.

Invariant: a secret that is known here is never in a line, and a piece is bounded: what a process
writes faster than that is left out in the middle, and a line says how much.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PIECE_BYTES = 256 << 10  # of each file at once
BEHIND_BYTES = 4 << 20  # past it what waits is left out, up to the newest piece
# Past so much of a file pieces are small: a program that floods its log for days fills no bucket.
WHOLE_BYTES = 64 << 20
THIN_BYTES = 4 << 10
SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SECRET_CHARACTERS = 8  # anything shorter is a setting, and taking it out would garble the log
STAMP = re.compile(r"(\d{10}\.\d{3}) ")  # before a line that Python logged: when, since the epoch
RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")  # marks for its own reader
HIDDEN = "***"


class Tail:
    """Reads files from where it stands. Not for two threads at once."""

    def __init__(
        self, files: Sequence[int], secrets: Iterable[str] = (), offsets: Iterable[int] = ()
    ) -> None:
        """files: descriptors that can be read. offsets: where to begin, in bytes; else at 0."""
        self._files = files
        self._secrets = tuple(filter(None, secrets))
        self.offsets = list(offsets) or [0] * len(files)
        self._read = list(self.offsets)
        self._taken: list[tuple[float, str]] = []

    def take(self, last: bool = False) -> list[tuple[float, str]]:
        """The next lines with their times; the same until `keep`, for they may be stored already.

        last: a line that doesn't end yet never will.
        """
        if not self._taken:
            files = range(len(self._files))
            self._taken = [line for index in files for line in self._lines_of(index, last)]
        return self._taken

    def keep(self) -> None:
        """What was taken is safe: go on behind it."""
        self.offsets = list(self._read)
        self._taken = []

    def _lines_of(self, index: int, last: bool) -> list[tuple[float, str]]:
        begin = self.offsets[index]
        waiting = os.fstat(self._files[index]).st_size - begin
        most = PIECE_BYTES if begin < WHOLE_BYTES else THIN_BYTES
        left_out = waiting - most if waiting > BEHIND_BYTES else 0
        raw = os.pread(self._files[index], most, begin + left_out)
        if not last or waiting > most:  # a line that is longer than a piece is cut
            raw = raw[: raw.rfind(b"\n") + 1] or (raw if len(raw) == most else b"")
        self._read[index] = begin + left_out + len(raw)
        text = raw.decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        at, found = time.time(), []
        if left_out:
            found.append((at, f"({left_out} bytes are left out here: more than a log keeps)"))
        for line in text.splitlines():
            if match := STAMP.match(line):
                at = float(match[1])
            if not line.startswith(RAYS_OWN):
                found.append((at, line[match.end() :] if match else line))
        return found


def readable(files: Sequence[int]) -> list[int]:
    """Descriptors to read what is written to these; none where one of them is no file."""
    if not all(stat.S_ISREG(os.fstat(each).st_mode) for each in files):
        return []
    return [os.open(f"/proc/self/fd/{each}", os.O_RDONLY) for each in files]


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """The values that a log must not hold, by the names of variables, and from files they name."""
    found = set()
    for name, value in environment.items():
        if SECRET_NAME.search(name):
            with contextlib.suppress(OSError, ValueError):
                named = name.endswith(("_PATH", "_FILE"))
                found.add(Path(value).read_text().strip() if named else value)
    # The longest first: one may be part of another.
    return sorted((each for each in found if len(each) >= SECRET_CHARACTERS), key=len, reverse=True)
