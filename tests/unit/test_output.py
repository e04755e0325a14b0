"""What a process writes outside its log: shipped, bounded, without secrets, also when it dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trainer import output
from trainer.output import Tail, readable, secrets_of
from trainer.storage.logs import new_pieces, read_piece
from trainer.storage.object_store import LocalObjectStore

JOB = "job1"
SECRET = "hunter2-hunter2"
WAIT_S = 30.0
# A rank as Ray starts it: files of its own as standard output and error, read from their beginning.
RANK = """
import ctypes, faulthandler, json, logging, os, signal, sys, time
from trainer.attempt import AttemptContext, _begin, _ship_logs, run_attempt
from contextlib import ExitStack
from trainer.distributed import World
from trainer.storage.object_store import open_store

storage, end = sys.argv[1:]
faulthandler.enable(2, all_threads=True)
print("before the attempt", flush=True)
where = ("job1", storage, "/nowhere", "host-1", 1)
context = AttemptContext(*where, host_key="ab" * 32, output=(1, 2))
if end == "without a job":
    print(run_attempt(context, World()), flush=True)
    sys.exit()
own_log = _begin(context, World())
if end == "unclaimed":
    ctypes.CDLL(None).dprintf(2, b"CUDA from C, with %s\\n", os.environ["SOME_TOKEN"].encode())
    os.kill(os.getpid(), signal.SIGSEGV)
with ExitStack() as cleanup:
    _ship_logs(context, World(), own_log, open_store(storage), 3, cleanup)
    libc = ctypes.CDLL(None)
    libc.dprintf(2, b"NCCL WARN from C, to descriptor 2\\n")
    libc.dprintf(1, b"a word to descriptor 1, with %s\\n", os.environ["SOME_TOKEN"].encode())
    libc.dprintf(2, b"the host's key is %s\\n", context.host_key.encode())
    logging.getLogger("trainer.loop").info("a logged line")
    logging.getLogger("else").warning("what another library logs")
    if end == "while it ships":
        time.sleep(2.5)
    if end == "stopped":
        time.sleep(600)
    if end != "orderly":
        libc.dprintf(2, b"the last word, no line's end")
        os.kill(os.getpid(), getattr(signal, {"while it ships": "SIGABRT"}.get(end, end)))
"""


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(tmp_path / "bucket")


def texts(store: LocalObjectStore) -> list[str]:
    keys = new_pieces(store, JOB, frozenset())
    assert [key.sequence for key in keys] == list(range(1, len(keys) + 1))
    return [line.text for key in keys for line in read_piece(store, JOB, key)]


def rank(folder: Path, end: str, bucket: Path | None = None) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    with (folder / "out").open("ab") as out, (folder / "err").open("ab") as err:
        return subprocess.Popen(
            [sys.executable, "-c", RANK, f"file:{bucket or folder / 'bucket'}", end],
            stdout=out,
            stderr=err,
            env={**os.environ, "SOME_TOKEN": SECRET},
        )


def keepers() -> list[psutil.Process]:
    """Those of our ranks, by a variable that they alone inherit."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("SOME_TOKEN") == SECRET
            if ours and "trainer.keeper" in process.cmdline():
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize("end", ["SIGABRT", "SIGSEGV", "SIGKILL", "while it ships", "orderly"])
def test_what_a_rank_wrote_is_kept_however_it_ended(
    tmp_path: Path, store: LocalObjectStore, end: str
) -> None:
    process = rank(tmp_path, end)
    status = process.wait(WAIT_S)
    assert status == (0 if end == "orderly" else -getattr(signal, end, signal.SIGABRT))
    wait_until(lambda: not keepers(), "the keeper's end")
    found = texts(store)
    assert found[0] == "before the attempt"
    for said in ("NCCL WARN from C, to descriptor 2", "INFO trainer.loop: a logged line",
                 "what another library logs"):  # fmt: skip
        assert found.count(said) == 1, (said, found)
    if end != "orderly":
        assert any("the last word, no line's end" in text for text in found)
    if end not in ("orderly", "SIGKILL"):
        assert any("Fatal Python error" in text for text in found), "faulthandler's stacks"
        assert any('File "<string>"' in text for text in found)
    everything = "\n".join(found)
    assert "a word to descriptor 1, with ***" in found
    assert SECRET not in everything
    assert "ab" * 32 not in everything
    told = (tmp_path / "out").read_text() + (tmp_path / "err").read_text()
    assert "NCCL WARN" in told, "the files themselves have everything too"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("unclaimed", ["CUDA from C, with ***", "Fatal Python error: Segmentation fault"]),
        ("without a job", ["the attempt failed", "AttemptResult(attempt=0, "]),
    ],
)
def test_of_a_rank_that_never_belonged_to_an_attempt_the_log_says_why(
    tmp_path: Path, store: LocalObjectStore, end: str, said: list[str]
) -> None:
    for count in (1, 2):  # the next try's stands beside it
        began = int(time.time())
        process = rank(tmp_path / str(count), end, tmp_path / "bucket")
        assert process.wait(WAIT_S) == (-signal.SIGSEGV if end == "unclaimed" else 0)
        wait_until(lambda: not keepers(), "the keeper's end")
        keys = new_pieces(store, JOB, frozenset())
        assert len(keys) == count
        assert keys[-1].attempt == 0
        assert began <= keys[-1].sequence <= time.time()
        text = "\n".join(line.text for line in read_piece(store, JOB, keys[-1]))
        for each in ("before the attempt", *said):
            assert each in text
        assert SECRET not in text


def test_the_rank_goes_on_where_somebody_ended_its_keeper(
    tmp_path: Path, store: LocalObjectStore
) -> None:
    process = rank(tmp_path, "stopped")
    wait_until(lambda: "INFO trainer.loop: a logged line" in texts(store), "a piece")
    (keeper,) = keepers()
    keeper.kill()
    keeper.wait(WAIT_S)
    with (tmp_path / "err").open("ab") as err:
        err.write(b"and on it goes\n")
    wait_until(lambda: "and on it goes" in texts(store), "another piece")
    assert process.poll() is None
    process.kill()
    process.wait(WAIT_S)


@pytest.fixture
def written() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def told(tail: Tail, last: bool = False) -> list[str]:
    return [text for _, text in tail.take(last)]


def test_a_line_is_taken_once_it_ends_and_again_until_it_is_safe(written: int) -> None:
    tail = Tail([written])
    os.write(written, b"1700000000.250 INFO a: one\nmore of it\nhal")
    assert tail.take() == [(1700000000.25, "INFO a: one"), (1700000000.25, "more of it")]
    assert told(tail) == ["INFO a: one", "more of it"], "nobody has stored it yet"
    tail.keep()
    assert told(tail) == []
    os.write(written, b"f\n:actor_name:Worker\n")
    assert told(tail) == ["half"]
    tail.keep()
    os.write(written, b"cut")
    assert told(tail) == []
    assert told(tail, last=True) == ["cut"]


def test_a_flood_is_cut_and_says_so(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PIECE_BYTES", 100)
    monkeypatch.setattr(output, "BEHIND_BYTES", 1000)
    tail = Tail([written])
    os.write(written, b"".join(b"line %04d\n" % n for n in range(95)))
    assert told(tail) == [f"line {n:04d}" for n in range(10)], "what waits is shipped in order"
    tail.keep()
    os.write(written, b"".join(b"line %04d\n" % n for n in range(95, 195)))
    assert told(tail) == [
        "(1750 bytes are left out here: more than a log keeps)",
        *(f"line {n:04d}" for n in range(185, 195)),
    ]
    tail.keep()
    assert told(tail) == []
    os.write(written, b"x" * 250)
    assert told(tail) == ["x" * 100], "a line without an end is cut"
    tail.keep()
    monkeypatch.setattr(output, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(output, "THIN_BYTES", 20)
    assert told(tail) == ["x" * 20], "pieces are small once much was written"


def test_a_pipe_is_not_read() -> None:
    ends = os.pipe()
    with tempfile.TemporaryFile() as file:
        assert readable([file.fileno(), ends[1]]) == []
        (again,) = readable([file.fileno()])
    for each in (again, *ends):
        os.close(each)


def test_secrets_are_known_by_the_names_of_variables(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    environment = {
        "AWS_SECRET_ACCESS_KEY": "secret-key",
        "AWS_ACCESS_KEY_ID": "secret-key-id",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere",
        "TOKENIZERS_PARALLELISM": "false",
        "HOME": "/home/somebody",
    }
    assert secrets_of(environment) == ["secret-key-id", "from-a-file", "secret-key"]
