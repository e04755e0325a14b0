"""Shards read from S3 through the cache are those read in place."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from tests.fakes.corpus import CORPUS, TOKENIZER, parquet, reader_of
from tests.servers import S3Server
from trainer.storage.binding import DataChangedError, bind
from trainer.storage.object_store import open_store


def cached(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*.parquet"))


def test_a_shard_from_s3_is_cached_verified_and_evicted(
    s3_environment: S3Server, tmp_path: Path
) -> None:
    uri = f"s3://{s3_environment.bucket}/data/{secrets.token_hex(6)}"
    store = open_store(uri)
    for path in CORPUS.glob("*.parquet"):
        store.put_file(path.name, path)
    local = bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "last")
    binding = bind(uri, f"file:{TOKENIZER}", "last")
    assert binding.shards == local.shards

    cache = tmp_path / "cache"
    reader = reader_of(binding, cache)
    in_place = reader_of(local, cache)
    shard, other = binding.shards[:2]
    assert reader.texts(shard, 2) == in_place.texts(shard, 2)
    (file,) = cached(cache)

    # A cached file that was damaged is fetched again, not trusted.
    file.write_bytes(b"damaged")
    again = reader_of(binding, cache)
    assert again.texts(shard, 2) == in_place.texts(shard, 2)
    assert file.stat().st_size == shard.size_bytes

    again._cache_bytes = shard.size_bytes + 1
    again.texts(other, 0)
    assert [path.name.endswith(other.name) for path in cached(cache)] == [True]

    store.put(shard.name, parquet([["changed"]]))
    with pytest.raises(DataChangedError, match="shard_00000"):
        again.texts(shard, 0)
    store.delete(shard.name)
    with pytest.raises(DataChangedError, match="vanished"):
        reader_of(binding, tmp_path / "other").texts(shard, 0)
    for each in (reader, in_place, again):
        each.close()


def test_damage_that_a_footer_does_not_show_is_found_at_the_next_reading(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in CORPUS.glob("*.parquet"):
        (data / path.name).write_bytes(path.read_bytes())
    binding = bind(f"file:{data}", f"file:{TOKENIZER}", "last")
    shard = binding.shards[0]
    first = reader_of(binding, tmp_path / "cache")
    first.texts(shard, 0)
    first.close()
    path = data / shard.name
    whole = bytearray(path.read_bytes())
    whole[100] ^= 1  # in a page, far before the footer
    path.write_bytes(whole)
    reader = reader_of(binding, tmp_path / "cache")
    with pytest.raises(DataChangedError, match="content is not what was first read"):
        reader.texts(shard, 0)
    whole[100] ^= 1
    path.write_bytes(whole)
    reader.texts(shard, 0)
    reader.close()
