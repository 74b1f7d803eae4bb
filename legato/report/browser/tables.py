"""The saved passages (evaluation/latents/examples.py) as arrays, as the feature browser reads them.

Shape legend: N positions of the text shown, F latents, P firings by latent then position, K entries of a list.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from legato.common.errors import LegatoError


@dataclass(frozen=True)
class ShownText:
    """token_N: input ids. text_N: each token as a string. doc_N: document, -1 on padding. valid_N: what counts."""

    token_N: NDArray[np.int32]
    text_N: NDArray[np.object_]
    doc_N: NDArray[np.int32]
    valid_N: NDArray[np.bool_]
    context_length: int

    @classmethod
    def read(cls, path: Path) -> "ShownText":
        """Raises LegatoError where the file is damaged."""
        with _blaming(path):
            table = pq.read_table(path)
            token_N, text_N, doc_N, valid_N = (table[name].to_numpy() for name in ("token", "text", "doc", "valid"))
            text = cls(token_N, text_N, doc_N, valid_N, int(table.schema.metadata[b"context_length"]))
        return text


@dataclass(frozen=True)
class StripTable:
    """One arm's passages.

    start_F, token_P, value_P: its firings, in 255ths of largest_F. centres: {top, quantile, random: (F, K)}, positions,
    -1 past the last. histogram_FK: firings by bin. lists: the other list columns as (F, K), padded with -1, nan or "".
    matches: per other arm the nearest latent (F), -1 for none, and its cosine (F).
    """

    start_F: NDArray[np.int64]
    token_P: NDArray[np.int32]
    value_P: NDArray[np.uint8]
    largest_F: NDArray[np.float32]
    centres: Mapping[str, NDArray[np.int32]]
    histogram_FK: NDArray[np.int32]
    lists: Mapping[str, NDArray[Any]]
    matches: Mapping[str, tuple[NDArray[np.int32], NDArray[np.float32]]]

    @classmethod
    def read(cls, path: Path) -> "StripTable":
        """Raises LegatoError where the file is damaged."""
        with _blaming(path):
            table = pq.read_table(path).combine_chunks()
            columns = {name: _whole(table[name]) for name in table.column_names}
            others = [name.removeprefix("match/") for name in columns if name.startswith("match/")]
            lists = ("similar", "together", "promoted", "suppressed")
            names = [n for name in lists for n in columns if n == name or n.startswith(f"{name}_")]

            def filled(name: str, filler: int) -> NDArray[Any]:
                return columns[name].fill_null(filler).to_numpy(zero_copy_only=False)

            strips = cls(
                columns["tokens"].offsets.to_numpy().astype(np.int64),
                columns["tokens"].flatten().to_numpy(),
                columns["values"].flatten().to_numpy(),
                filled("max_activation", 0),
                {name: _padded(columns[name]) for name in ("top", "quantile", "random")},
                np.maximum(_padded(columns["histogram"]), 0),
                {name: _padded(columns[name]) for name in names},
                {other: (filled(f"match/{other}", -1), filled(f"match_cosine/{other}", 0)) for other in others},
            )
        return strips

    @property
    def n_latents(self) -> int:
        return self.largest_F.size

    @property
    def count_F(self) -> NDArray[np.int64]:
        return np.diff(self.start_F)

    def only(self, keep_P: NDArray[np.bool_]) -> "StripTable":
        """With some of the firings."""
        latent_P = np.repeat(np.arange(self.n_latents), self.count_F)
        start_F = np.concatenate([[0], np.cumsum(np.bincount(latent_P[keep_P], minlength=self.n_latents))])
        return replace(self, start_F=start_F, token_P=self.token_P[keep_P], value_P=self.value_P[keep_P])


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise LegatoError(f"{path} is damaged ({str(error).splitlines()[0]}): run the evaluation again") from error


def _whole(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _padded(column: Any) -> NDArray[Any]:
    """A list column as (F, longest list), padded with -1, nan or an empty string."""
    offsets = column.offsets.to_numpy()
    flat = column.flatten()
    size_F = np.diff(offsets)
    filler: Any = "" if pa.types.is_string(flat.type) else np.nan if pa.types.is_floating(flat.type) else -1
    values = flat.to_numpy(zero_copy_only=False)
    padded_FK = np.full((size_F.size, max(1, size_F.max(initial=0))), filler, values.dtype)
    padded_FK[np.arange(padded_FK.shape[1]) < size_F[:, None]] = values
    return padded_FK
