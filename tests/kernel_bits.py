"""A process of its own that prints the SHA-256 of what the kernels with the most intricate sums give for fixed
numbers."""

import hashlib
import json

import numpy as np

from legato.evaluation.core import splice
from legato.sae.kernels.gradients import gradients
from legato.sae.kernels.pairs import Groups, PairsByLatent

N, F, ACTIVE = 40, 24, 6
WIDTHS = (13, 48, 97, 320)  # below, at and beyond the unrolled vector loops, with and without a rest
COLUMNS = (37, 64, 3000)


def main() -> None:
    rng = np.random.default_rng(0)
    digests = {}

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def note(name: str, *arrays: np.ndarray | float) -> None:
        digests[name] = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()

    token_Q = np.concatenate([np.sort(rng.permutation(N)[:ACTIVE]) for _ in range(F)]).astype(np.int32)
    order = PairsByLatent(np.arange(0, len(token_Q) + 1, ACTIVE), token_Q, np.abs(drawn(len(token_Q))), token_Q)
    groups, none_F = Groups(np.array([F]), np.ones(1)), np.zeros(F, bool)
    for D in WIDTHS:
        gradient = drawn(F, D), drawn(F, D), drawn(F)
        extra_Q = drawn(len(token_Q))
        squared = gradients(drawn(N, D), drawn(1, N, D), groups, 0.1, drawn(F, D), order, extra_Q, none_F, *gradient)
        note(f"gradients {D}", squared, *gradient)
    for V in COLUMNS:
        clean_NV, logits_NV, exp_NV = drawn(N, V), drawn(N, V), drawn(N, V)
        note(f"exponentials {V}", *splice._exp_rows(clean_NV, exp_NV), exp_NV)
        note(f"comparison {V}", *splice._compare_rows(clean_NV, exp_NV, logits_NV))
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
