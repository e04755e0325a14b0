"""One file brought into the service's store: announced, sent where it is missing, acknowledged.

Knows the channel (connection.py) and nothing of commands. The service decides what it takes.

Invariant: the file is read, and its bytes are sent, only as far as the service wants them.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterator
from pathlib import Path

from everstep.connection import Connection
from everstep.v1 import everstep_pb2 as pb

UPLOAD_BYTES = 1 << 20  # in one message


def upload(
    connection: Connection,
    path: Path,
    folder: str,
    overwrite: bool,
    progress: Callable[[int], None],
) -> str:
    """Store a file in a data folder; its URI. See Client.put_file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        header = pb.FileHeader(
            folder=folder,
            name=path.name,
            size_bytes=path.stat().st_size,
            sha256=sha256,
            overwrite=overwrite,
        )
        answered = queue.SimpleQueue[bool]()

        def requests() -> Iterator[pb.PutFileRequest]:
            yield pb.PutFileRequest(file=header)
            if answered.get():
                file.seek(0)
                while data := file.read(UPLOAD_BYTES):
                    yield pb.PutFileRequest(data=data)

        uri = ""
        try:
            for answer in connection.stream("PutFile", requests()):
                answered.put(not answer.present)
                uri = answer.uri
                progress(header.size_bytes if answer.present else answer.stored_bytes)
        finally:
            answered.put(False)  # whoever waits for an answer waits no longer
    return uri
