"""Presets of the experiment: by name, the options that differ from the demo's.

Widths, layers and texts of the larger models are those of published SAEs, so that numbers can be compared.
"""

from typing import Any

_SINGLE: dict[str, Any] = {"ablation": False, "controls": ()}

_PILE: dict[str, Any] = {
    "dataset": "monology/pile-uncopyrighted",
    "corpus_tokens": 20_000_000,  # 20 to 31 GB of stored activations
    "tokens": 100_000_000,
    "d_sae": 16_384,
    "lr": 5e-4,
    "ablation": False,
}
_GEMMA_2_2B: dict[str, Any] = {
    **_PILE,
    "model": "google/gemma-2-2b",
    "corpus_tokens": 50_000_000,
    "tokens": 200_000_000,
    "k": 64,
    "lr": 3e-4,
    "store": False,  # 230 GB otherwise
}

PRESETS: dict[str, dict[str, Any]] = {
    # Meant for 20 minutes on two cores without bfloat16, not yet timed; demo-long is what docs/findings.md measured.
    "demo": {"corpus_tokens": 300_000, "tokens": 600_000, "grid": "2,8,32x0.1,1", "eval_rows": 256},
    "demo-long": {},
    "smoke": {
        "corpus_tokens": 60_000,
        "tokens": 150_000,
        "d_sae": 1024,
        "k": 16,
        "eval_rows": 48,
        "ce_rows": 8,
        "held_out": 0.2,
        "grid": "2,16x0.3",
    },
    "gpt2": {
        "model": "gpt2",
        "dataset": "Skylion007/openwebtext",
        "corpus_tokens": 20_000_000,
        "tokens": 100_000_000,
        "d_sae": 24_576,
        "lr": 5e-4,
    },
    "gemma-2-2b": {**_GEMMA_2_2B, "layer": 12},
    "gemma-2-2b-layer19": {**_GEMMA_2_2B, "layer": 19},
    "gemma-3-270m": {**_PILE, "model": "google/gemma-3-270m", "layer": 9, "lr": 1e-3},
    "pythia-70m": {**_PILE, "model": "EleutherAI/pythia-70m-deduped", "layer": 3},
    "pythia-160m": {**_PILE, "model": "EleutherAI/pythia-160m-deduped", "layer": 8},
    # The founding plan's runs, on the demo.
    "baseline": {"temporal": (), **_SINGLE},
    "window8": {"temporal": ("window_variance",), "window": 8, "coefficient": 0.1, **_SINGLE},
    "window16": {"temporal": ("window_variance",), "window": 16, "coefficient": 0.5, **_SINGLE},
    "position": {"temporal": ("position_penalty",), "coefficient": 0.1, **_SINGLE},
    "monitor": {"temporal": ("window_variance",), "window": 8, "coefficient": 0.0, **_SINGLE},
}
