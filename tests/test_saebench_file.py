"""The SAEBench file: its keys, its formulas by hand, and what it refuses to be written from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from legato.common.errors import LegatoError
from legato.evaluation.core.reconstruction import TokenErrors
from legato.evaluation.core.saebench import (
    SaeBenchSums,
    batch_spread,
    saebench_features,
    saebench_metrics,
    weight_statistics,
)
from legato.interop.saebench_file import write_core_file
from legato.sae.codes import SparseCodes

# The schema of sae-bench 0.6.0: category -> names, in its order
CATEGORIES = {
    "model_behavior_preservation": ["kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"],
    "model_performance_preservation": [
        "ce_loss_score",
        "ce_loss_with_ablation",
        "ce_loss_with_sae",
        "ce_loss_without_sae",
    ],
    "reconstruction_quality": ["explained_variance", "explained_variance_legacy", "mse", "cossim"],
    "shrinkage": ["l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"],
    "sparsity": ["l0", "l1"],
    "token_stats": ["total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"],
    "misc_metrics": [
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ],
}
DETAIL = [
    "index",
    "feature_density",
    "consistent_activation_heuristic",
    "encoder_bias",
    "encoder_norm",
    "encoder_decoder_cosine_sim",
    "max_decoder_cosine_sim",
    "max_encoder_cosine_sim",
]


def add_reconstruction(sums, acts_BLD, out_BLD):
    mask_BL = torch.ones(acts_BLD.shape[:2], dtype=torch.bool)
    sums.add_reconstruction(TokenErrors.of(acts_BLD, out_BLD), batch_spread(acts_BLD, mask_BL), mask_BL)


def two_tokens():
    """One batch of x = (3, 4) and (0, 1), reconstructed as (3, 0) and (0, 1); latent 0 fires twice with 2."""
    acts_BLD = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    out_BLD = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    codes = SparseCodes.from_dense(torch.tensor([[[2.0, 0.0], [2.0, 0.0]]]))
    sums = SaeBenchSums.zero(2)
    add_reconstruction(sums, acts_BLD, out_BLD)
    sums.add_codes(codes)
    return sums


# W_enc columns (3, 4) and (0, 2); decoder rows (1, 0) and (0, 1)
SAE = SimpleNamespace(W_enc=torch.tensor([[3.0, 0.0], [4.0, 2.0]]), b_enc=torch.tensor([0.5, -1.0]), W_dec=torch.eye(2))


def test_weight_statistics_by_hand():
    weights = weight_statistics(SAE)
    assert weights["encoder_norm"].tolist() == pytest.approx([5, 2])
    assert weights["encoder_bias"].tolist() == [0.5, -1.0]
    # (3, 4)/5 with (1, 0), and (0, 2)/2 with (0, 1); the encoder's columns with each other: 4/5
    assert weights["encoder_decoder_cosine_sim"].tolist() == pytest.approx([0.6, 1.0])
    assert weights["max_encoder_cosine_sim"].tolist() == pytest.approx([0.8, 0.8])
    assert weights["max_decoder_cosine_sim"].tolist() == pytest.approx([0.0, 0.0])


def test_weight_statistics_are_those_of_unit_decoder_rows():
    """Rows of norms 2 and 3 are folded into the encoder; a direction has no norm."""
    longer = SimpleNamespace(W_enc=SAE.W_enc, b_enc=SAE.b_enc, W_dec=torch.diag(torch.tensor([2.0, 3.0])))
    weights, plain = weight_statistics(longer), weight_statistics(SAE)
    assert weights["encoder_norm"].tolist() == pytest.approx([10, 6])
    assert weights["encoder_bias"].tolist() == pytest.approx([1.0, -3.0])
    for name in ("encoder_decoder_cosine_sim", "max_encoder_cosine_sim", "max_decoder_cosine_sim"):
        assert weights[name].tolist() == pytest.approx(plain[name].tolist())


def test_formulas_by_hand():
    sums = two_tokens()
    features = saebench_features(sums, weight_statistics(SAE))
    metrics = saebench_metrics(sums, features, width=2)
    # S = (25 + 1) / 2 = 13, E||e||^2 = 16 / 2 = 8: 1 - 8 / (13 - (13/2)^2) = 1 - 8 / -29.25
    quality = metrics["reconstruction_quality"]
    assert quality["explained_variance"] == pytest.approx(1 + 8 / 29.25)
    # mean (3/2, 5/2), both tokens at squared distance 9/4 + 9/4: mean of 1 - 16/4.5 and 1 - 0
    assert quality["explained_variance_legacy"] == pytest.approx((1 - 16 / 4.5 + 1) / 2)
    # 16 / 2 and 0, divided by the two tokens of the batch, then averaged over two tokens
    assert quality["mse"] == pytest.approx(16 / 2 / 2)
    assert quality["cossim"] == pytest.approx((9 / 15 + 1) / 2)
    assert metrics["shrinkage"] == pytest.approx(
        {"l2_norm_in": 3, "l2_norm_out": 2, "l2_ratio": (3 / 5 + 1) / 2, "relative_reconstruction_bias": 10 / 10}
    )
    assert metrics["sparsity"] == {"l0": 1.0, "l1": 2.0}
    assert features["feature_density"].tolist() == [1.0, 0.0]
    assert features["consistent_activation_heuristic"].tolist() == [2.0, -1.0]
    assert metrics["misc_metrics"] == pytest.approx(
        {
            "freq_over_1_percent": 0.5,
            "freq_over_10_percent": 0.5,
            "normalized_freq_over_1_percent": 1.0,
            "normalized_freq_over_10_percent": 1.0,
            "average_max_encoder_cosine_sim": 0.8,
            "average_max_decoder_cosine_sim": 0.0,
            "frac_alive": 0.5,
        }
    )


def test_batches_of_sixteen_rows_matter():
    # Two batches of 16 one-token rows, x = (1, 1); the first is reconstructed as (3, 0), error 5, the second exactly:
    # mse = (16 * 5/16 + 0) / 32. The bias is the mean of the batches' 9/3 and 2/2, not the ratio of sums 11/5.
    acts_BLD = torch.ones(32, 1, 2)
    out_BLD = torch.cat([torch.tensor([[[3.0, 0.0]]]).expand(16, 1, 2), torch.ones(16, 1, 2)])
    sums = SaeBenchSums.zero(1)
    add_reconstruction(sums, acts_BLD, out_BLD)
    assert sums.mse / sums.tokens == pytest.approx(5 / 32)
    assert sums.batch_bias / sums.batches == pytest.approx(2)


def test_undefined_values_are_minus_one():
    # a reconstruction of zero has no direction
    acts_BLD = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    sums = SaeBenchSums.zero(2)
    add_reconstruction(sums, acts_BLD, torch.zeros_like(acts_BLD))
    metrics = saebench_metrics(sums, saebench_features(sums, weight_statistics(SAE)), width=2)
    assert metrics["reconstruction_quality"]["cossim"] == -1
    assert metrics["shrinkage"]["relative_reconstruction_bias"] == -1
    assert metrics["shrinkage"]["l2_ratio"] == 0
    # 1 - 25/4.5 and 1 - 1/4.5: the negative legacy variance of an untrained SAE
    assert metrics["reconstruction_quality"]["explained_variance_legacy"] == pytest.approx(1 - 13 / 4.5)


def result_of(sums):
    features = saebench_features(sums, weight_statistics(SAE))
    measured = saebench_metrics(sums, features, width=2)
    measured["token_stats"] = {
        "total_tokens_eval_reconstruction": 128 * 40,
        "total_tokens_eval_sparsity_variance": 128 * 100,
    }
    measured["model_behavior_preservation"] = dict.fromkeys(CATEGORIES["model_behavior_preservation"], 0.5)
    measured["model_performance_preservation"] = dict.fromkeys(CATEGORIES["model_performance_preservation"], 2.5)
    return {"core": {"saebench": measured}, "features": features}


def write(tmp_path, result):
    return write_core_file(
        tmp_path / "eval_results",
        "legato_run",
        "window/8",
        result,
        model_name="google/gemma-3-270m",
        llm_dtype="bfloat16",
        dataset="demo",
        context_size=128,
        sae_cfg_dict={"d_in": 2, "d_sae": 2, "architecture": "jumprelu"},
    )


def test_the_file_has_every_key_of_the_schema_in_its_order(tmp_path):
    path = write(tmp_path, result_of(two_tokens()))
    assert path.name == "legato_run_window_8_eval_results.json"
    content = json.loads(path.read_text())
    assert list(content) == [
        "eval_type_id",
        "eval_config",
        "eval_id",
        "datetime_epoch_millis",
        "eval_result_metrics",
        "eval_result_details",
        "sae_bench_commit_hash",
        "sae_lens_id",
        "sae_lens_release_id",
        "sae_lens_version",
        "sae_cfg_dict",
        "eval_result_unstructured",
    ]
    assert content["eval_type_id"] == "core"
    metrics = content["eval_result_metrics"]
    assert {category: list(names) for category, names in metrics.items()} == CATEGORIES
    assert all(isinstance(value, (int, float)) for names in metrics.values() for value in names.values())
    config = content["eval_config"]
    assert (config["batch_size_prompts"], config["context_size"]) == (16, 128)
    assert config["n_eval_reconstruction_batches"] == 3  # 40 rows in batches of 16
    assert config["n_eval_sparsity_variance_batches"] == 7
    assert [list(detail) for detail in content["eval_result_details"]] == [DETAIL, DETAIL]
    assert content["eval_result_details"][1]["consistent_activation_heuristic"] == -1
    assert content["eval_result_unstructured"] == {}


def test_values_that_are_not_numbers_do_not_reach_the_details(tmp_path):
    result = result_of(two_tokens())
    result["features"]["encoder_decoder_cosine_sim"] = np.array([np.nan, 1.0])
    content = json.loads(write(tmp_path, result).read_text())
    assert content["eval_result_details"][0]["encoder_decoder_cosine_sim"] == -1


def test_without_the_language_models_loss_there_is_no_file(tmp_path):
    result = result_of(two_tokens())
    del result["core"]["saebench"]
    with pytest.raises(LegatoError, match="needs the language model's loss"):
        write(tmp_path, result)
    assert not (tmp_path / "eval_results").exists()
