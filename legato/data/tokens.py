"""Rows of tokens with a mask and document numbers, packed so that no text is lost or repeated.

Shape legend: B rows (contexts), L positions (the context length).
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from legato.common.errors import UsageError
from legato.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_DOCUMENT = -1
_DOCUMENTS_PER_CALL = 64  # a fast tokenizer spreads a batch over its threads


@dataclass(frozen=True)
class TokenSet:
    """Sequence-shaped tokens of a corpus.

    tokens_BL: int32, input ids.
    mask_BL: bool, True where the token is text; False at BOS, separator, pad and any other special token.
    doc_BL: int32, index of the document in the list that was tokenised; -1 on pad. BOS and separators carry the
        document that they open. A document's positions inside a row are contiguous.
    bos: whether every row starts with a BOS token.
    """

    tokens_BL: Tensor
    mask_BL: Tensor
    doc_BL: Tensor
    bos: bool

    @property
    def n_valid(self) -> int:
        """Number of text tokens."""
        return int(self.mask_BL.sum())

    @property
    def context_length(self) -> int:
        return self.tokens_BL.shape[1]

    def __len__(self) -> int:
        return self.tokens_BL.shape[0]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the whole set."""
        digest = hashlib.sha256(f"{tuple(self.tokens_BL.shape)} {self.bos}".encode())
        for tensor in (self.tokens_BL, self.mask_BL, self.doc_BL):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def token_strings(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Return the text of each token by itself; a part of a character is shown as its bytes, such as \\xe4\\xb8."""
    return [
        text if "\ufffd" not in (text := str(tokenizer.decode([number]))) else _bytes_shown(tokenizer, number, text)
        for number in ids
    ]


def _bytes_shown(tokenizer: "PreTrainedTokenizerBase", number: int, text: str) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    piece = str(tokenizer.convert_ids_to_tokens(number))
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return f"\\x{fallback[1].lower()}"
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level vocabularies
    if not all(letter in byte_of for letter in piece):
        return text
    return bytes(byte_of[letter] for letter in piece).decode("utf-8", "backslashreplace")


def tokenise(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    context_length: int,
    max_tokens: int | None = None,
    seed: int = 0,
) -> TokenSet:
    """Tokenise `documents` to rows of `context_length`.

    Each row starts with BOS if the tokenizer has one. A document is cut into full rows; its rest shares a row with the
    rests of others (best fit, largest first), each opened by a separator: BOS, else EOS, else nothing. Every text token
    is in exactly one place. The rows are shuffled too: any first rows are a sample.

    max_tokens: stop after this many text tokens. The documents are drawn in an order shuffled by `seed`, so that a
        part of a corpus is a fair sample of it; the last document may be cut short.
    Raises UsageError for a context with no room for text and for documents without a token.
    """
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    opener = [] if bos is None else [bos]
    separator = opener or ([] if eos is None else [eos])
    room = context_length - len(opener)
    if room < 1:
        raise UsageError(f"a context of {context_length} has no room for text: choose a longer one")
    assert max_tokens is None or max_tokens > 0, max_tokens

    full_rows: list[np.ndarray] = []  # [rows, room] of one document each
    full_docs: list[np.ndarray] = []
    remains: list[tuple[int, np.ndarray]] = []
    for doc, ids in _encoded(list(documents), tokenizer, max_tokens, seed):
        n_full = len(ids) // room
        full_rows.append(ids[: n_full * room].reshape(n_full, room))
        full_docs.append(np.full(n_full, doc, np.int32))
        if len(ids) % room:
            remains.append((doc, ids[n_full * room :]))
    if not full_rows:
        raise UsageError("the documents hold no tokens")

    shared_rows = _best_fit([len(ids) for _, ids in remains], room, len(separator))
    n_full, n_rows = sum(map(len, full_rows)), sum(map(len, full_rows)) + len(shared_rows)
    filler = next(token for token in (pad, bos, eos, 0) if token is not None)
    tokens_BL = np.full((n_rows, context_length), filler, np.int32)
    doc_BL = np.full((n_rows, context_length), PAD_DOCUMENT, np.int32)
    is_text_BL = np.zeros((n_rows, context_length), bool)

    start = len(opener)
    tokens_BL[:, :start] = opener
    tokens_BL[:n_full, start:] = np.concatenate(full_rows)
    doc_BL[:n_full] = np.concatenate(full_docs)[:, None]
    is_text_BL[:n_full, start:] = True
    for row, members in enumerate(shared_rows, start=n_full):
        at = 0
        for number, member in enumerate(members):
            doc, ids = remains[member]
            opened = opener if number == 0 else separator
            text, end = at + len(opened), at + len(opened) + len(ids)
            tokens_BL[row, at:end] = [*opened, *ids]
            doc_BL[row, at:end] = doc
            is_text_BL[row, text:end] = True
            at = end

    # "Unknown" is text, unless it is BOS or EOS too, as in GPT-2.
    special_ids = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - {bos, eos, pad})
    mask_BL = is_text_BL & ~np.isin(tokens_BL, sorted(special_ids))
    order = np.random.default_rng(seed).permutation(n_rows)
    tokens, mask, doc_of = (torch.from_numpy(array[order]) for array in (tokens_BL, mask_BL, doc_BL))
    return TokenSet(tokens, mask, doc_of, bos=bool(opener))


def _encoded(
    documents: list[Document], tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None, seed: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, token ids) of the documents in shuffled order, up to max_tokens, without empty ones."""
    order = np.random.default_rng(seed).permutation(len(documents)).tolist()
    left = max_tokens
    for first in range(0, len(order), _DOCUMENTS_PER_CALL):
        chosen = order[first : first + _DOCUMENTS_PER_CALL]
        texts = [documents[doc].text for doc in chosen]
        encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for doc, ids in zip(chosen, encoding["input_ids"], strict=True):
            ids_of_doc = np.asarray(ids[:left], np.int32)
            if len(ids_of_doc):
                yield doc, ids_of_doc
            if left is not None:
                left -= len(ids_of_doc)
                if left == 0:
                    return


def _best_fit(lengths: list[int], room: int, separator: int) -> list[list[int]]:
    """List the members of each shared row: every piece, largest first, goes to the row with the least room for it.

    A first piece needs its length, a further one its length and a separator.
    """
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(room + 1)]
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        needed = lengths[piece] + separator
        space = next((space for space in range(needed, room + 1) if rows_by_space[space]), None)
        if space is None:
            row, left = len(rows), room - lengths[piece]
            rows.append([])
        else:
            row, left = rows_by_space[space].pop(), space - needed
        rows[row].append(piece)
        rows_by_space[left].append(row)
    return rows
