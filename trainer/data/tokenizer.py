"""Text to token ids and back, by tiktoken, and training of new tokenizers, by rustbpe.

Knows no files: those are `trainer.storage.tokenizer_files`.

Invariant: encoding is a pure function of the tokenizer's content; text that looks like a special
token is encoded as text, so a document can't forge the start of another.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import rustbpe
import tiktoken

from trainer.storage.tokenizer_files import BOS, TokenizerError, TokenizerFiles

# nanochat's (nanochat/tokenizer.py): GPT-4's split, but numbers in runs of at most two digits.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    BOS,
    *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)
BYTE_TOKENS = 256
ENDS = (KeyboardInterrupt, SystemExit, GeneratorExit)  # of the process or a generator


class Tokenizer:
    """Encodes and decodes; safe to use from several threads."""

    def __init__(self, files: TokenizerFiles, threads: int = 1) -> None:
        try:
            self._encoding = tiktoken.Encoding(
                name="everstep",
                pat_str=files.pattern,
                mergeable_ranks=files.ranks,
                special_tokens=files.special_tokens,
            )
        except ValueError as error:
            raise TokenizerError(f"the split pattern can't be used: {error}") from error
        self.files = files
        self._threads = threads
        self.bos_id = files.special_tokens[BOS]
        self.vocab_size = files.vocab_size

    @property
    def sha256(self) -> str:
        """Identity of the content."""
        return self.files.sha256

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without any special token."""
        return self._encoding.encode_ordinary(text)

    def encode_documents(
        self, documents: Sequence[str], where: str = "the text"
    ) -> list[list[int]]:
        """Token ids of each document, <|bos|> in front.

        Raises:
            TokenizerError: naming where they are from, for tiktoken gave up on one of them.
        """
        try:
            encoded = self._encoding.encode_ordinary_batch(
                list(documents), num_threads=self._threads
            )
        except (Exception, *ENDS):
            raise
        except BaseException as error:  # a panic of Rust's: a million spaces in a row
            longest = max(documents, key=len)
            raise TokenizerError(
                f"{where} can't be encoded ({error}); its longest document has {len(longest)} "
                f"characters and begins {longest[:40]!r}"
            ) from error
        for ids in encoded:
            ids.insert(0, self.bos_id)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no whole character become U+FFFD."""
        return self._encoding.decode(list(ids))

    def pickled(self) -> bytes:
        """nanochat's tokenizer.pkl."""
        return pickle.dumps(self._encoding)

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Bytes of text per token [vocab_size]; 0 for special tokens, which are no text."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.files.ranks.items():
            lengths[rank] = len(token)
        return lengths


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TokenizerFiles:
    """Learn byte pairs from text; vocab_size counts the bytes and the special tokens too.

    The result may be smaller where the text has no more pairs to merge.
    """
    least = BYTE_TOKENS + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise TokenizerError(f"vocab_size {vocab_size}: must be at least {least}")
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)
    ranks = {bytes(token): int(rank) for token, rank in trainer.get_mergeable_ranks()}
    special = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
    return TokenizerFiles(PATTERN, ranks, special)
