"""SAEBench 0.6.0 result files: `<release>_<arm>_eval_results.json` of its `core` evaluation.

Keys, their order and the formulas behind the numbers are SAEBench's (see legato/evaluation/core/saebench.py for where
those differ from Legato's own metrics). Two things are Legato's: the texts are the held-out texts of the run, with BOS
where the tokenizer has one, and KL values are given where SAEBench's softmax would underflow to -1.
"""

import json
import math
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from legato.common.errors import LegatoError
from legato.common.files import write_atomically
from legato.evaluation.core.saebench import ROWS_PER_BATCH, UNDEFINED

_CATEGORIES = (
    "model_behavior_preservation",
    "model_performance_preservation",
    "reconstruction_quality",
    "shrinkage",
    "sparsity",
    "token_stats",
    "misc_metrics",
)
_FEATURE_COLUMNS = (
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
)
_COMPUTED = (
    *("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics"),
    *("featurewise_density_statistics", "featurewise_weight_based_metrics"),
)
_DECIMALS = 10


def core_file_name(release: str, arm: str) -> str:
    return f"{release}_{arm}_eval_results.json".replace("/", "_")


def core_config(
    model_name: str,
    llm_dtype: str,
    dataset: str,
    context_size: int,
    *,
    reconstruction_batches: int,
    sparsity_batches: int,
) -> dict[str, Any]:
    """Build the options of sae-bench's CoreEvalConfig, in its order: all of core's numbers."""
    return {
        "model_name": model_name,
        "llm_dtype": llm_dtype,
        "batch_size_prompts": ROWS_PER_BATCH,
        "n_eval_reconstruction_batches": reconstruction_batches,
        "n_eval_sparsity_variance_batches": sparsity_batches,
        "dataset": dataset,
        "context_size": context_size,
        **{f"compute_{numbers}": True for numbers in _COMPUTED},
        "exclude_special_tokens_from_reconstruction": True,
        "verbose": False,
    }


def write_core_file(
    directory: str | Path,
    release: str,
    arm: str,
    result: Mapping[str, Any],
    *,
    model_name: str,
    llm_dtype: str,
    dataset: str,
    context_size: int,
    sae_cfg_dict: Mapping[str, Any],
) -> Path:
    """Write the file of one SAE and return its path.

    result: what `legato.evaluate` returned for it, with the language model's loss. sae_cfg_dict: its SAELens cfg.
    Raises LegatoError if the loss was not measured: SAEBench's schema has no place for its absence.
    """
    if "saebench" not in result["core"]:
        raise LegatoError("a SAEBench file needs the language model's loss: evaluate with the language model")
    measured = result["core"]["saebench"]
    stats, batch_tokens = measured["token_stats"], context_size * ROWS_PER_BATCH
    content = {
        "eval_type_id": "core",
        "eval_config": core_config(
            model_name,
            llm_dtype,
            dataset,
            context_size,
            reconstruction_batches=math.ceil(stats["total_tokens_eval_reconstruction"] / batch_tokens),
            sparsity_batches=math.ceil(stats["total_tokens_eval_sparsity_variance"] / batch_tokens),
        ),
        "eval_id": str(uuid.uuid4()),
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {category: measured[category] for category in _CATEGORIES},
        "eval_result_details": _details(result["features"]),
        "sae_bench_commit_hash": f"legato {_legato_version()}",
        "sae_lens_id": arm,
        "sae_lens_release_id": release,
        "sae_lens_version": None,
        "sae_cfg_dict": dict(sae_cfg_dict),
        "eval_result_unstructured": {},
    }
    path = Path(directory) / core_file_name(release, arm)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False, default=str).encode())
    return path


def _details(features: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    columns = {name: np.nan_to_num(features[name], nan=UNDEFINED).astype(float).tolist() for name in _FEATURE_COLUMNS}
    return [
        {"index": index, **{name: round(value, _DECIMALS) for name, value in zip(columns, values, strict=True)}}
        for index, values in enumerate(zip(*columns.values(), strict=True))
    ]


def _legato_version() -> str:
    try:
        return version("legato-sae")
    except PackageNotFoundError:
        return "unknown"
