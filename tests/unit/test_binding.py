"""Binding data at submit, and noticing that it changed."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fakes.corpus import (
    CORPUS,
    TOKENIZER,
    parquet,
    reader_of,
    write_corpus,
    write_everstep_tokenizer,
)
from trainer.data.shards import ShardFormatError
from trainer.storage import binding, tokenizer_files
from trainer.storage.binding import (
    QUICK_S,
    BindingError,
    DataBinding,
    DataChangedError,
    bind,
    bind_tokenizer,
    list_shards,
    read_bound_tokenizer,
    read_footers,
)
from trainer.storage.object_store import LocalObjectStore, StoreUnavailableError
from trainer.storage.tokenizer_files import TokenizerFiles

SHARDS = [[["one", "two"], ["three"]], [["four"]], [["five"]]]


def test_shards_are_bound_by_name_with_the_last_to_validate() -> None:
    binding = bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "last")
    assert [shard.name for shard in binding.shards] == [
        f"shard_0000{index}.parquet" for index in range(3)
    ]
    assert binding.validation.name == "shard_00003.parquet"
    assert binding.validation.size_bytes == (CORPUS / "shard_00003.parquet").stat().st_size
    assert (binding.tokenizer.format, binding.tokenizer.vocab_size) == ("nanochat", 768)
    assert DataBinding.model_validate_json(binding.model_dump_json()) == binding


def test_a_named_shard_validates_and_does_not_train() -> None:
    binding = bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "shard_00001.parquet")
    assert binding.validation.name == "shard_00001.parquet"
    assert "shard_00001.parquet" not in {shard.name for shard in binding.shards}


def test_a_footer_longer_than_any_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([["x"]]))
    length = binding.MOST_FOOTER_BYTES + 1
    with (tmp_path / "b.parquet").open("wb") as file:  # its bytes are a hole
        file.seek(length + 100)
        file.write(length.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(BindingError, match=r"b\.parquet .* footer is longer"):
        bind(f"file:{tmp_path}", f"file:{TOKENIZER}", "last")


@pytest.mark.parametrize(
    ("files", "validation", "field", "reason"),
    [
        (None, "last", "data.source", "no such folder"),
        ({}, "last", "data.source", "no such folder, or it is empty"),
        ({"a.txt": b"x"}, "last", "data.source", "no .parquet"),
        ({"a.parquet": parquet([["x"]])}, "last", "data.source", "one shard"),
        ({"a.parquet": b"x", "b.parquet": b"y" * 99}, "last", "data.source", "a.parquet is not"),
        (
            {"a.parquet": parquet([["x"]]), "b.parquet": parquet([["x"]])[:-3]},
            "last",
            "data.source",
            "b.parquet is not",
        ),
        (
            {"a.parquet": parquet([["x"]]), "b.parquet": b"PAR1\xff\xff\xff\x7fPAR1"},
            "last",
            "data.source",
            "footer is longer",
        ),
        (
            {"a.parquet": parquet([["x"]]), "b.parquet": parquet([["x"]])},
            "c.parquet",
            "data.validation",
            "not one of the 2 shards",
        ),
    ],
)
def test_what_cannot_be_bound_is_refused_with_field_value_and_reason(
    tmp_path: Path, files: dict[str, bytes] | None, validation: str, field: str, reason: str
) -> None:
    source = tmp_path / "source"
    if files is not None:
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content)
    with pytest.raises(BindingError, match=reason) as caught:
        bind(f"file:{source}", f"file:{TOKENIZER}", validation)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: {caught.value.value!r}: ")


def test_a_missing_tokenizer_and_a_strange_address_name_their_fields(tmp_path: Path) -> None:
    with pytest.raises(BindingError, match=r"data\.tokenizer: .*neither"):
        bind(f"file:{CORPUS}", f"file:{tmp_path}/none", "last")
    with pytest.raises(BindingError, match=r"data\.source: 'builtin:x': must be"):
        bind("builtin:x", f"file:{TOKENIZER}", "last")


def test_a_long_footer_is_read_whole(tmp_path: Path) -> None:
    # Over 64 KiB of column names: more than the first read takes.
    table = pa.table({f"column {'x' * 60} {index}": [1] for index in range(600)})
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(table, tmp_path / name)
    binding = bind(f"file:{tmp_path}", f"file:{TOKENIZER}", "last")
    assert binding.shards[0].footer_sha256 == binding.validation.footer_sha256


def test_where_a_read_is_slow_footers_are_read_beside_one_another() -> None:
    together = threading.Barrier(3)  # the first is read alone, and three are left

    class Far(LocalObjectStore):
        def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
            if key == "shard_00000.parquet":
                time.sleep(2 * QUICK_S)
            else:
                together.wait(timeout=30)
            return super().get(key, start, end)

    store = Far(CORPUS)
    near = bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "last")
    assert read_footers(store, list_shards(store)) == [*near.shards, near.validation]


def test_a_tokenizer_is_parsed_once_for_each_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = []

    def parse(form: str, content: tuple[bytes, ...]) -> TokenizerFiles:
        parsed.append(form)
        return tokenizer_files.parse(form, content)

    folder = tmp_path / "tokenizer"
    write_everstep_tokenizer(folder)
    monkeypatch.setattr(binding, "parse", parse)
    monkeypatch.setattr(binding, "_tokenizers", {})
    first = bind_tokenizer(f"file:{folder}")
    assert bind_tokenizer(f"file:{folder}") == first
    assert parsed == ["everstep"]
    assert bind_tokenizer(f"file:{TOKENIZER}").sha256 == first.sha256
    ranks = folder / "ranks.tiktoken"
    ranks.write_bytes(b"".join(reversed(ranks.read_bytes().splitlines(keepends=True))))
    assert bind_tokenizer(f"file:{folder}").sha256 == first.sha256, "of the content"
    description = folder / "tokenizer.json"
    description.write_bytes(description.read_bytes().replace(b"|bos|", b"|sob|"))
    with pytest.raises(BindingError, match="bos"):
        bind_tokenizer(f"file:{folder}")
    assert parsed == ["everstep", "nanochat", "everstep", "everstep"]


def test_shards_added_later_are_ignored(tmp_path: Path) -> None:
    binding = write_corpus(tmp_path / "data", SHARDS)
    (tmp_path / "data" / "shard_9.parquet").write_bytes(parquet([["new"]]))
    reader = reader_of(binding, tmp_path / "cache")
    each = (*binding.shards, binding.validation)
    assert [reader.texts(shard, 0) for shard in each] == [["one", "two"], ["four"], ["five"]]
    reader.close()


@pytest.mark.parametrize("change", ["vanish", "resize", "rewrite", "tear"])
def test_a_changed_shard_is_refused_before_it_is_read(tmp_path: Path, change: str) -> None:
    binding = write_corpus(tmp_path / "data", SHARDS)
    path = tmp_path / "data" / "shard_1.parquet"
    match change:
        case "vanish":
            path.unlink()
        case "resize":
            path.write_bytes(parquet([["four", "and more"]]))
        case "rewrite":
            path.write_bytes(parquet([["fout"]]))
        case "tear":
            path.write_bytes(b"\0" * path.stat().st_size)
    reader = reader_of(binding, tmp_path / "cache")
    assert reader.texts(binding.shards[0], 1) == ["three"]
    with pytest.raises(DataChangedError, match=r"shard_1.parquet has"):
        reader.texts(binding.shards[1], 0)
    reader.close()


def test_a_shard_without_text_is_refused(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet"):
        (tmp_path / name).write_bytes(parquet([["x"]], column="body"))
    binding = bind(f"file:{tmp_path}", f"file:{TOKENIZER}", "last")
    reader = reader_of(binding, tmp_path / "cache")
    with pytest.raises(ShardFormatError, match=r"a\.parquet has no column 'text'"):
        reader.texts(binding.shards[0], 0)


def test_a_corrupt_page_is_an_error_with_the_row_group(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_corpus(folder, SHARDS)
    raw = bytearray((folder / "shard_0.parquet").read_bytes())
    raw[4:60] = b"\xff" * 56  # page headers, right after the magic
    (folder / "shard_0.parquet").write_bytes(raw)
    binding = bind(f"file:{folder}", f"file:{TOKENIZER}", "last")
    reader = reader_of(binding, tmp_path / "cache")
    with pytest.raises(ShardFormatError, match=r"shard_0\.parquet row group 0"):
        reader.texts(binding.shards[0], 0)
    reader.close()


def test_absent_and_empty_documents_are_left_out(tmp_path: Path) -> None:
    binding = write_corpus(tmp_path / "data", [[["a", None, "", "b"]], [["c"]]])
    reader = reader_of(binding, tmp_path / "cache")
    assert reader.texts(binding.shards[0], 0) == ["a", "b"]
    reader.close()


def test_a_changed_tokenizer_is_refused(tmp_path: Path) -> None:
    binding = bind(f"file:{CORPUS}", f"file:{TOKENIZER}", "last")
    other = binding.tokenizer.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(DataChangedError, match="has changed"):
        read_bound_tokenizer(other)
    gone = binding.tokenizer.model_copy(update={"uri": f"file:{tmp_path}"})
    with pytest.raises(StoreUnavailableError, match="mounted"):
        read_bound_tokenizer(gone)
    (tmp_path / "another").touch()
    with pytest.raises(DataChangedError, match="neither"):
        read_bound_tokenizer(gone)
