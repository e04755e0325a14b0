"""The contract of every object store: memory, local folder, and three S3 servers."""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.contract.conftest import SUITABLE
from tests.fakes.memory_store import MemoryObjectStore
from tests.fakes.unsuitable_stores import (
    ForgetfulStore,
    RangelessStore,
    StaleListStore,
    UnconditionalStore,
)
from tests.servers import S3Server, free_ports
from trainer.storage.object_store import (
    AlreadyExistsError,
    LocalObjectStore,
    NotFoundError,
    ObjectStore,
    StoreError,
    StoreKeyError,
    StoreRefusedError,
    StoreUnavailableError,
    StoreUnsuitableError,
    StoreUriError,
    open_store,
    probe,
)
from trainer.storage.s3 import PART_BYTES

BAD_KEYS = ["", "/a", "a/", "a//b", "../a", "a/../../b", "a/.", ".incoming/a", "a\nb", "a\\b"]


needs_conditional_puts = pytest.mark.parametrize("any_store", SUITABLE, indirect=True)


def keys(store: ObjectStore, prefix: str) -> list[str]:
    return sorted(info.key for info in store.list(prefix))


def test_what_is_put_is_read_back_and_replaced(store: ObjectStore) -> None:
    store.put("a/b", b"first")
    store.put("a/b", b"second")
    assert store.get("a/b") == b"second"
    info = store.head("a/b")
    assert info is not None
    assert (info.key, info.size_bytes) == ("a/b", 6)
    assert abs(info.modified - datetime.now(UTC)) < timedelta(minutes=2)


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert b"".join(store.stream("empty")) == b""
    info = store.head("empty")
    assert info is not None
    assert info.size_bytes == 0


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 4), (3, 8), (5, None), (None, 3), (8, 99), (10, 12), (99, None), (4, 4), (5, 2)],
)
def test_a_range_is_a_slice(store: ObjectStore, start: int | None, end: int | None) -> None:
    content = b"0123456789"
    store.put("digits", content)
    assert store.get("digits", start, end) == content[start:end]


@needs_conditional_puts
def test_a_conditional_put_never_replaces(store: ObjectStore) -> None:
    store.put("once", b"first", if_none_match=True)
    with pytest.raises(AlreadyExistsError):
        store.put("once", b"second", if_none_match=True)
    assert store.get("once") == b"first"


@needs_conditional_puts
def test_a_race_of_conditional_puts_has_one_winner(store: ObjectStore) -> None:
    barrier = threading.Barrier(8)

    def attempt(number: int) -> bool:
        barrier.wait()
        try:
            store.put("race", str(number).encode(), if_none_match=True)
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(attempt, range(8)))
    assert sum(won) == 1
    assert store.get("race") == str(won.index(True)).encode()


@needs_conditional_puts  # and rclone can't delete by the name of a folder
def test_what_is_absent_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    store.put("folder/object", b"x")
    for key in ("nothing", "folder", "folder/object/below"):
        assert store.head(key) is None
        with pytest.raises(NotFoundError):
            store.get(key)
        with pytest.raises(NotFoundError):
            list(store.stream(key))
        with pytest.raises(NotFoundError):
            store.get_file(key, tmp_path / "copy")
        store.delete(key)
    assert not (tmp_path / "copy").exists()
    assert store.get("folder/object") == b"x"


def test_a_listing_is_by_prefix(store: ObjectStore) -> None:
    for key in ("a/b", "a.b", "ab/c/d", "a/b.c", "b", "a-b"):
        store.put(key, b"")
    assert keys(store, "") == ["a-b", "a.b", "a/b", "a/b.c", "ab/c/d", "b"]
    assert keys(store, "a/") == ["a/b", "a/b.c"]
    assert keys(store, "a") == ["a-b", "a.b", "a/b", "a/b.c", "ab/c/d"]
    assert keys(store, "ab/c") == ["ab/c/d"]
    assert keys(store, "nothing/here") == []


@pytest.mark.parametrize("any_store", ["memory", "local", "seaweedfs"], indirect=True)
def test_a_listing_of_many_pages_is_whole(store: ObjectStore) -> None:
    # More than S3's page of 1000, in names and folders whose orders differ.
    names = [f"{group}{number}" for group in ("a/", "a-", "a/b/") for number in range(350)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert keys(store, "a") == sorted(names)
    assert keys(store, "a/") == sorted(name for name in names if name.startswith("a/"))


def test_a_deleted_object_is_gone_and_deleting_again_is_fine(store: ObjectStore) -> None:
    store.put("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    assert store.head("a/b") is None
    assert keys(store, "") == []


def test_files_go_and_come_back_in_parts(store: ObjectStore, tmp_path: Path) -> None:
    content = secrets.token_bytes(1 << 16) * (PART_BYTES // (1 << 16)) + b"a second part"
    (tmp_path / "big").write_bytes(content)
    moved: list[int] = []
    store.put_file("big", tmp_path / "big", moved.append)
    assert sum(moved) == len(content)
    store.get_file("big", tmp_path / "copies" / "big")
    assert (tmp_path / "copies" / "big").read_bytes() == content
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["big"]
    chunks = list(store.stream("big", 1 << 20))
    assert b"".join(chunks) == content
    assert max(map(len, chunks)) <= 1 << 20


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_leaves_its_root_is_refused(store: ObjectStore, key: str) -> None:
    for call in (store.get, store.head, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(StoreUriError):
            call(key)


@needs_conditional_puts
def test_the_probe_passes_and_leaves_nothing(store: ObjectStore) -> None:
    probe(store)
    assert keys(store, "") == []


@pytest.mark.parametrize("any_store", ["rclone"], indirect=True)
def test_the_probe_refuses_a_server_without_conditional_puts(any_store: ObjectStore) -> None:
    with pytest.raises(StoreUnsuitableError, match=r"conditional write \(PUT if-none-match\)"):
        probe(any_store)
    assert keys(any_store, "") == []


@pytest.mark.parametrize(
    ("unsuitable", "lacking"),
    [
        (ForgetfulStore(), "conditional write"),
        (RangelessStore(), "ranged read"),
        (UnconditionalStore(), "conditional write .* failed: NotImplemented"),
        (StaleListStore(), "a listing right after the write"),
    ],
)
def test_the_probe_names_what_a_store_lacks(unsuitable: MemoryObjectStore, lacking: str) -> None:
    with pytest.raises(StoreUnsuitableError, match=lacking):
        probe(unsuitable)
    assert unsuitable.snapshot() == {}


@pytest.mark.parametrize("uri", ["file:relative", "http://x/y", "s3://", "builtin:x", "", "/a"])
def test_an_address_of_no_known_kind_is_refused(uri: str) -> None:
    with pytest.raises(StoreUriError, match="must be"):
        open_store(uri)


def test_an_unreachable_store_answers_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    store = open_store("s3://bucket/prefix")
    begun = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="AWS_ENDPOINT_URL_S3") as caught:
        store.put("a", b"x")
    assert time.monotonic() - begun < 15
    assert "hidden-value" not in str(caught.value)


def test_wrong_keys_and_a_missing_bucket_are_refused_without_showing_keys(
    s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    missing = open_store("s3://no-such-bucket/prefix")
    with pytest.raises(StoreRefusedError, match=r"no-such-bucket.*does not exist"):
        missing.put("a", b"x")
    with pytest.raises(StoreRefusedError, match=r"no-such-bucket.*does not exist"):
        list(missing.list(""))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    stranger = open_store(f"s3://{s3_environment.bucket}/prefix")
    for call in (
        lambda: stranger.get("a"),
        lambda: stranger.head("a"),
        lambda: stranger.put_file("a", tmp_path / "file"),
    ):
        with pytest.raises(StoreRefusedError, match="AWS_SECRET_ACCESS_KEY") as caught:
            call()
        assert "hidden-value" not in str(caught.value)
    with pytest.raises(StoreKeyError):  # waiting is in vain, which no store says by HEAD
        stranger.put("a", b"x")


def test_a_folder_that_cannot_be_written_is_an_error_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = LocalObjectStore(tmp_path / "file" / "below")
    with pytest.raises(StoreError):
        store.put("a", b"x")
