"""Packing: every token once, boundaries marked, no leak between documents."""

import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from legato.common.errors import UsageError
from legato.data.documents import Document, load_documents, split_held_out
from legato.data.tokens import TokenSet, token_strings, tokenise

WORDS = [f"w{number}" for number in range(50)]


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*special.values(), *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token=special.get("unk_token", WORDS[0])))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


FULL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}  # ids 0, 1, 2, 3
W = len(FULL)  # id of the first word


def _documents(*lengths: int) -> list[Document]:
    """Documents of so many words, no two alike in their first word."""
    return [
        Document(" ".join(WORDS[(number + at) % len(WORDS)] for at in range(length)), str(number))
        for number, length in enumerate(lengths)
    ]


def _row_of(tokens: TokenSet, doc: int) -> int:
    return int((tokens.doc_BL == doc).any(dim=1).nonzero()[0])


def test_hand_worked_packing() -> None:
    # Context 6 = BOS + 5. Document 0 (7 words) fills a row and leaves 2; 1 has 2 words, 2 has 4 words.
    # Largest first: 4 opens a row (1 left, too little for a separator and 2), 2 another (3 left), 2 joins it (0 left).
    tokens = tokenise(_documents(7, 2, 4), _tokenizer(**FULL), context_length=6)
    rows = sorted(zip(tokens.tokens_BL.tolist(), tokens.mask_BL.tolist(), tokens.doc_BL.tolist(), strict=True))
    no, yes = False, True
    full = ([1, W, W + 1, W + 2, W + 3, W + 4], [no, yes, yes, yes, yes, yes], [0] * 6)
    alone = ([1, W + 2, W + 3, W + 4, W + 5, 0], [no, yes, yes, yes, yes, no], [2, 2, 2, 2, 2, -1])
    rest_first = ([1, W + 5, W + 6, 1, W + 1, W + 2], [no, yes, yes, no, yes, yes], [0, 0, 0, 1, 1, 1])
    rest_last = ([1, W + 1, W + 2, 1, W + 5, W + 6], [no, yes, yes, no, yes, yes], [1, 1, 1, 0, 0, 0])
    assert rows in (sorted([full, alone, rest_first]), sorted([full, alone, rest_last]))
    assert tokens.tokens_BL.dtype == tokens.doc_BL.dtype == torch.int32
    assert (len(tokens), tokens.context_length, tokens.n_valid, tokens.bos) == (3, 6, 13, True)


def check(tokens: TokenSet, documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> None:
    """All that must hold for any corpus without a token limit."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokens.bos == (bos is not None)
    text_of: dict[int, list[list[int]]] = {}
    for ids, mask, docs in zip(tokens.tokens_BL.tolist(), tokens.mask_BL.tolist(), tokens.doc_BL.tolist(), strict=True):
        if bos is not None:
            assert ids[0] == bos
            assert not mask[0]
        segments = [docs[at] for at in range(len(docs)) if at == 0 or docs[at] != docs[at - 1]]
        assert len(segments) == len(set(segments)), "a document's positions are contiguous in a row"
        assert segments[0] != -1
        assert -1 not in segments[:-1], "pad comes last"
        for doc in segments:
            inside = [at for at in range(len(docs)) if docs[at] == doc]
            if doc == -1:
                assert not any(mask[at] for at in inside)
                continue
            opens = inside[0] > 0 or bos is not None
            separator = bos if bos is not None else eos
            if opens and separator is not None:
                assert ids[inside[0]] == separator
                assert not mask[inside[0]]
                inside = inside[1:]
            assert inside, "no separator without a text after it"
            assert all(mask[at] for at in inside)
            text_of.setdefault(doc, []).append([ids[at] for at in inside])
    for doc, document in enumerate(documents):
        expected = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        room = tokens.context_length - (bos is not None)
        pieces = [expected[at : at + room] for at in range(0, len(expected), room)]
        assert sorted(text_of.get(doc, [])) == sorted(pieces), document.source


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any),
    context_length=st.integers(2, 12),
    special=st.sampled_from([[], ["eos_token"], ["bos_token"], ["bos_token", "eos_token"], list(FULL)]),
    seed=st.integers(0, 3),
)
def test_every_token_once(lengths: list[int], context_length: int, special: list[str], seed: int) -> None:
    tokenizer = _tokenizer(**{name: FULL[name] for name in special})
    documents = _documents(*lengths)
    check(tokenise(documents, tokenizer, context_length=context_length, seed=seed), documents, tokenizer)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), max_tokens=st.integers(1, 400))
def test_token_limit_is_exact(lengths: list[int], max_tokens: int) -> None:
    tokens = tokenise(_documents(*lengths), _tokenizer(**FULL), context_length=8, max_tokens=max_tokens)
    assert tokens.n_valid == min(max_tokens, sum(lengths))


def test_limit_takes_a_shuffled_sample_and_the_seed_decides_which() -> None:
    documents, tokenizer = _documents(*[20] * 100), _tokenizer(**FULL)
    first, again, other = (
        tokenise(documents, tokenizer, context_length=8, max_tokens=400, seed=seed) for seed in (0, 0, 1)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    chosen = first.doc_BL[first.mask_BL].unique()
    assert len(chosen) == 20
    assert chosen.max() > 50, "not simply the first documents"
    everything = [tokenise(documents, tokenizer, context_length=8, seed=seed) for seed in (0, 1)]
    counts = [Counter(tokens.tokens_BL[tokens.mask_BL].tolist()) for tokens in everything]
    assert counts[0] == counts[1]
    assert everything[0].doc_BL[:20].unique().numel() > 10, "the first rows are a sample of all documents"


def test_fingerprint_covers_every_field() -> None:
    tokens = tokenise(_documents(7, 2), _tokenizer(**FULL), context_length=6)
    variants = [
        TokenSet(tokens.tokens_BL + 1, tokens.mask_BL, tokens.doc_BL, True),
        TokenSet(tokens.tokens_BL, ~tokens.mask_BL, tokens.doc_BL, True),
        TokenSet(tokens.tokens_BL, tokens.mask_BL, tokens.doc_BL + 1, True),
        TokenSet(tokens.tokens_BL, tokens.mask_BL, tokens.doc_BL, False),
        TokenSet(tokens.tokens_BL.view(3, -1), tokens.mask_BL.view(3, -1), tokens.doc_BL.view(3, -1), True),
        tokens,
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_special_tokens_written_in_a_text_are_masked_and_unknown_words_are_not() -> None:
    tokens = tokenise([Document("w1 <eos> strange w2", "0")], _tokenizer(**FULL), context_length=6)
    assert tokens.tokens_BL.tolist() == [[1, W + 1, 2, 3, W + 2, 0]]
    assert tokens.mask_BL.tolist() == [[False, True, False, True, True, False]]


def test_no_room_or_no_text() -> None:
    with pytest.raises(UsageError, match="context of 1 has no room"):
        tokenise(_documents(3), _tokenizer(**FULL), context_length=1)
    with pytest.raises(UsageError, match="no tokens"):
        tokenise([Document(" ", "0")], _tokenizer(**FULL), context_length=4)
    with pytest.raises(UsageError, match="no tokens"):
        tokenise([], _tokenizer(**FULL), context_length=4)


def test_gpt2_tokenizer_on_real_text(gpt2_mini: Path, corpora: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_mini)
    documents = list(load_documents(str(corpora / "abc_news.jsonl.gz"), max_documents=400))
    train, held_out = split_held_out(documents, 0.1)
    start = time.monotonic()
    tokens = tokenise(train, tokenizer, context_length=128)
    assert time.monotonic() - start < 10
    check(tokens, train, tokenizer)
    assert (tokens.doc_BL == -1).float().mean() < 0.02, "packing wastes little"
    check(tokenise(held_out, tokenizer, context_length=128), held_out, tokenizer)
    assert not {document.text for document in train} & {document.text for document in held_out}


def test_parts_of_characters_are_shown_as_bytes(gpt2_mini: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_mini)
    text = "The 语言 हिन्दी 🦜 caf\u00e9."
    shown = token_strings(tokenizer, tokenizer(text).input_ids)
    assert not [piece for piece in shown if "\ufffd" in piece]
    assert "\\x" in "".join(shown)
    parts = re.split(r"(\\x[0-9a-f]{2})", "".join(shown))
    raw = [bytes([int(part[2:], 16)]) if part.startswith("\\x") else part.encode() for part in parts]
    assert b"".join(raw).decode() == text


def test_byte_fallback_tokens_are_shown_as_bytes() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            BPE({"<unk>": 0, "<0xE8>": 1, "<0xAF>": 2, "a": 3}, [], unk_token="<unk>", byte_fallback=True)
        )
    )
    tokenizer.backend_tokenizer.decoder = ByteFallback()
    assert token_strings(tokenizer, [1, 2, 3]) == ["\\xe8", "\\xaf", "a"]
