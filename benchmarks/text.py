"""The same rows of tokens for every contender: written once by Legato, read without it by the peers.

Shape legend: B rows (contexts), L positions.
"""

from pathlib import Path
from typing import Any

import numpy as np


def write_tokens(path: Path, tokenizer: Any, *, rows: int, context: int) -> None:
    """`rows` contexts of the packaged demo articles, as tokens, mask and document numbers."""
    from legato.data.documents import load_documents
    from legato.data.tokens import tokenise

    tokens = tokenise(load_documents("demo"), tokenizer, context_length=context)
    assert len(tokens) >= rows, f"the demo articles fill {len(tokens)} contexts of {context}: ask for no more rows"
    np.savez(path, tokens=tokens.tokens_BL[:rows], mask=tokens.mask_BL[:rows], doc=tokens.doc_BL[:rows])


def token_array(path: str) -> np.ndarray:
    """tokens_BL, int64."""
    return np.load(path)["tokens"].astype(np.int64)


def token_set(path: str) -> Any:
    """The same as Legato's TokenSet."""
    import torch

    from legato.data.tokens import TokenSet

    with np.load(path) as arrays:
        tokens, mask, doc = (torch.from_numpy(arrays[name]) for name in ("tokens", "mask", "doc"))
    return TokenSet(tokens, mask, doc, bos=not bool(mask[:, 0].any()))


def model_folder(model: str) -> str:
    """What transformers can load: the demo model's converted folder, or the name as given."""
    if model != "demo":
        return model
    from legato.data.gguf import demo_model_folder

    return str(demo_model_folder())
