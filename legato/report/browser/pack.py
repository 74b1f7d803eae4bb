"""Arrays as bytes that a browser unpacks: one gzip of planes of bytes, and a table of what lies where.

A plane holds one byte of every number, low bytes first, which gzip packs better than whole numbers. `unpacked` in
unpack.js is the other side. Kinds: u1, u2, u4 unsigned integers, the largest of which stands for none where
`none` asks for it; f2 half-precision floats times a scale; i2 signed integers times a scale, -32768 for none.
"""

import gzip
from typing import Any

import numpy as np
from numpy.typing import NDArray

HALF_TOP = 32768.0  # the largest number of a column as a half-precision float: small ones keep their digits
MANTISSA_BITS_DROPPED = 2  # of 10: three significant digits are left
FIXED_STEP = 1 / 5000


class Pack:
    """Arrays gathered under names. header: what the page needs to take them apart."""

    def __init__(self) -> None:
        self.header: dict[str, dict[str, Any]] = {}
        self._planes: list[bytes] = []

    def add_bytes(self, name: str, values: NDArray[Any]) -> None:
        self._add(name, "u1", values.astype(np.uint8))

    def add_indices(self, name: str, values: NDArray[Any]) -> None:
        """Whole numbers from 0, -1 for none."""
        kind = "u2" if values.max(initial=0) < 0xFFFF else "u4"
        self._add(name, kind, np.where(values < 0, np.iinfo(kind).max, values).astype(kind))

    def add_floats(self, name: str, values: NDArray[Any]) -> None:
        """To three significant digits down to 1e-8 of the largest, nan for none."""
        largest = float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 0.0
        scale = largest / HALF_TOP if largest > 0 else 1.0
        bits = (values / scale).astype(np.float16).view(np.uint16)
        half_step = np.uint16(1 << (MANTISSA_BITS_DROPPED - 1))
        rounded = (bits + half_step) & np.uint16(0xFFFF << MANTISSA_BITS_DROPPED & 0xFFFF)
        self._add(name, "f2", np.where(np.isfinite(values), rounded, 0x7E00).astype(np.uint16), scale=scale)

    def add_fixed(self, name: str, values: NDArray[Any]) -> None:
        """Numbers within 6 of 0, to 1/5000, nan for none."""
        steps = np.rint(np.nan_to_num(values, nan=0.0) / FIXED_STEP).clip(-32767, 32767)
        self._add(name, "i2", np.where(np.isnan(values), -32768, steps).astype(np.int16), scale=FIXED_STEP)

    def packed(self) -> bytes:
        return gzip.compress(b"".join(self._planes), mtime=0)

    def _add(self, name: str, kind: str, values: NDArray[Any], **more: float) -> None:
        self.header[name] = {"kind": kind, "size": values.size, **more}
        as_bytes = np.ascontiguousarray(values).ravel().view(np.uint8).reshape(values.size, values.itemsize)
        self._planes.append(as_bytes.T.tobytes())


def gaps(start_F: NDArray[np.int64], token_P: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Each latent's positions as the distance from the one before (its first: from 0), 7 bits a byte, low bits first,
    the eighth bit set where more follow (LEB128)."""
    gap_P = np.diff(token_P, prepend=0).astype(np.int64)
    first_F = start_F[:-1][np.diff(start_F) > 0]
    gap_P[first_F] = token_P[first_F]
    place = np.arange(5)
    n_bytes = np.maximum((gap_P[:, None] >> 7 * place > 0).sum(1), 1)
    digits = (gap_P[:, None] >> 7 * place) & 127
    digits |= 128 * (place < n_bytes[:, None] - 1)
    return digits[place < n_bytes[:, None]].astype(np.uint8)
