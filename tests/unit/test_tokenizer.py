"""Tokenizer files of both formats, nanochat's own encodings, training, and hostile pickles."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from tests.fakes.corpus import TOKENIZER, vectors, write_everstep_tokenizer
from trainer.contract.outcome import Outcome
from trainer.data.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, train_tokenizer
from trainer.failures import outcome_of
from trainer.storage.object_store import NotFoundError, open_store
from trainer.storage.tokenizer_files import (
    BOS,
    TokenizerError,
    TokenizerFiles,
    parse_everstep,
    parse_nanochat,
    read_tokenizer_files,
)


@pytest.fixture(scope="module")
def files() -> TokenizerFiles:
    form, files = read_tokenizer_files(open_store(f"file:{TOKENIZER}"))
    assert form == "nanochat"
    return files


def test_encodings_are_those_of_nanochat(files: TokenizerFiles) -> None:
    recorded = vectors()
    tokenizer = Tokenizer(files)
    for vector in recorded["vectors"]:
        assert tokenizer.encode(vector["text"]) == vector["ids"]
        assert tokenizer.decode(vector["ids"]) == vector["text"]
        assert tokenizer.encode_documents([vector["text"]]) == [[recorded["bos"], *vector["ids"]]]
    assert tokenizer.vocab_size == recorded["n_vocab"]
    np.testing.assert_array_equal(tokenizer.token_bytes(), recorded["token_bytes"]["values"])
    assert tokenizer.token_bytes().dtype == np.int32
    assert recorded["pat_str"] == PATTERN
    assert tuple(recorded["special_tokens"]) == SPECIAL_TOKENS


def test_both_formats_of_a_tokenizer_are_one_tokenizer(
    files: TokenizerFiles, tmp_path: Path
) -> None:
    write_everstep_tokenizer(tmp_path)
    form, ours = read_tokenizer_files(open_store(f"file:{tmp_path}"))
    assert form == "everstep"
    assert ours == files
    assert ours.sha256 == files.sha256
    assert (tmp_path / "ranks.tiktoken").read_bytes() == (TOKENIZER / "ranks.tiktoken").read_bytes()


def test_text_cannot_forge_a_special_token(files: TokenizerFiles) -> None:
    tokenizer = Tokenizer(files)
    (ids,) = tokenizer.encode_documents(["a <|bos|> b"])
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids[1:]) == "a <|bos|> b"


def test_a_document_that_its_library_gives_up_on_is_an_error_with_its_place(
    files: TokenizerFiles,
) -> None:
    # tiktoken ends in a panic of Rust's, which is no Exception: its split pattern backtracks.
    documents = ["fine", "short " + " " * 1_000_000 + "x"]
    words = r"a\.parquet row group 3.* longest document has 1000007 characters.*'short "
    with pytest.raises(TokenizerError, match=words) as failure:
        Tokenizer(files).encode_documents(documents, "a.parquet row group 3")
    assert not isinstance(failure.value.__cause__, Exception)
    assert outcome_of(failure.value) is Outcome.INVALID_JOB


def test_training_gives_a_tokenizer_of_the_size_asked_for() -> None:
    texts = ["the cat sat on the mat", "the dog sat on the log"] * 3
    files = train_tokenizer(texts, 280)
    assert files.vocab_size == 280
    assert train_tokenizer(texts, 280) == files
    tokenizer = Tokenizer(files)
    ids = tokenizer.encode("the cat sat")
    assert len(ids) < len("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat"
    with pytest.raises(TokenizerError, match="at least 265"):
        train_tokenizer(texts, 264)


class Exploit:
    """Runs a command when unpickled by a plain pickle.load."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_no_pickle_executes(tmp_path: Path) -> None:
    hostile = pickle.dumps(Exploit(tmp_path / "made"))
    with pytest.raises(TokenizerError, match="only tiktoken's Encoding"):
        parse_nanochat(hostile)
    assert not (tmp_path / "made").exists()


def test_a_reference_to_a_registered_encoding_is_refused(tmp_path: Path) -> None:
    # tiktoken pickles its own encodings as a name, which would load something from elsewhere.
    by_name = pickle.dumps((TOKENIZER / "tokenizer.pkl").name)
    with pytest.raises(TokenizerError, match="does not hold"):
        parse_nanochat(by_name)
    built = b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b."
    with pytest.raises(TokenizerError, match="does not hold"):
        parse_nanochat(built)


def test_torn_or_foreign_files_are_refused(tmp_path: Path, files: TokenizerFiles) -> None:
    whole = (TOKENIZER / "tokenizer.pkl").read_bytes()
    for torn in (b"", whole[: len(whole) // 2], b"not a pickle", pickle.dumps({"a": 1})):
        with pytest.raises(TokenizerError):
            parse_nanochat(torn)
    description, ranks = files.description(), files.rank_lines()
    for pair in (
        (b"{}", ranks),
        (b"{", ranks),
        (description, b"!!! 0\n"),
        (description, ranks[: ranks.rindex(b"\n", 0, -1)]),
        (description.replace(b'"vocab_size": 768', b'"vocab_size": 9'), ranks),
        (json.dumps({"version": "1.0", "model": {}}).encode(), ranks),  # Hugging Face's
    ):
        with pytest.raises(TokenizerError):
            parse_everstep(*pair)
    with pytest.raises(NotFoundError, match="neither"):
        read_tokenizer_files(open_store(f"file:{tmp_path}"))


def test_a_token_id_outside_the_vocabulary_is_refused(files: TokenizerFiles) -> None:
    far = {**files.special_tokens, BOS: files.vocab_size + 5}
    with pytest.raises(TokenizerError, match="without gap or repetition"):
        TokenizerFiles(files.pattern, files.ranks, far)


def test_tiktoken_itself_agrees_with_what_was_read(files: TokenizerFiles) -> None:
    encoding = tiktoken.Encoding(
        "check",
        pat_str=files.pattern,
        mergeable_ranks=files.ranks,
        special_tokens=files.special_tokens,
    )
    pickled = pickle.dumps(encoding)
    assert parse_nanochat(pickled) == files
