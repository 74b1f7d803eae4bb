"""temporal-saes, sparsify and Gemma Scope: not installable here, so their files are laid out as the tools write them.

temporal-saes and sparsify: their saving code. Gemma Scope: its published files. Each `*_encode` states the tool's own
formula. SAEs trained by temporal-saes (commit 8daecb2) and written by sparsify 1.3.0 were opened by hand, too: the
same codes within 2e-5, the same reconstructions, and sparsify opened what was exported for it.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from legato.common.errors import LegatoError, UsageError
from legato.sae.architectures import TopK
from legato.sae.autoencoder import SparseAutoencoder

D, F, K = 16, 48, 5


def tensors():
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    return {
        "W_enc": W_dec.T.contiguous() + 0.1 * torch.randn(D, F, generator=generator),
        "b_enc": 0.3 * torch.randn(F, generator=generator),
        "W_dec": W_dec,
        "b_dec": 0.3 * torch.randn(D, generator=generator),
    }


def acts():
    return 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 0.5


def assert_codes(sae, codes_NF, weights):
    assert 0 < (codes_NF > 0).float().mean() < 0.7
    torch.testing.assert_close(sae.encode(acts()), codes_NF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(acts()), codes_NF @ weights["W_dec"] + weights["b_dec"], rtol=1e-5, atol=1e-5)


def write_temporal_saes(folder, **trainer):
    """`trainer_<i>/` of the fork's train_temporal.py: Matryoshka's buffers, `temporal` in the configuration."""
    folder.mkdir(parents=True)
    config = {
        "trainer_class": "TemporalMatryoshkaBatchTopKTrainer",
        "dict_class": "TemporalMatryoshkaBatchTopKSAE",
        "activation_dim": D,
        "dict_size": F,
        "group_fractions": [0.2, 0.8],
        "group_weights": [0.2, 0.8],
        "group_sizes": [9, 39],
        "k": K,
        "temporal": True,
        "layer": 12,
        "lm_name": "google/gemma-2-2b",
        "submodule_name": None,
        **trainer,
    }
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": {"ctx_len": 256}}))
    weights = tensors()
    state = weights | {
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(1.3),
        "group_sizes": torch.tensor([9, 39]),
    }
    torch.save(state, folder / "ae.pt")
    return weights


def batchtopk_encode(acts_ND, weights, threshold=1.3):
    post_NF = torch.relu((acts_ND - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    return post_NF * (post_NF > threshold)


def test_temporal_saes(tmp_path):
    weights = write_temporal_saes(tmp_path / "trainer_0")
    sae = SparseAutoencoder.load(tmp_path / "trainer_0")
    assert_codes(sae, batchtopk_encode(acts(), weights), weights)
    source = sae.details["source"]
    assert (source["format"], source["group_sizes"]) == ("temporal-saes", [9, 39])
    assert source["trainer"]["group_weights"] == [0.2, 0.8]
    assert (sae.details["model"], sae.details["layer"]) == ("google/gemma-2-2b", 12)
    assert sae.details["context_length"] == 256


def test_groups_that_do_not_add_up_are_refused(tmp_path):
    write_temporal_saes(tmp_path / "t")
    state = torch.load(tmp_path / "t" / "ae.pt", weights_only=True) | {"group_sizes": torch.tensor([9, 40])}
    torch.save(state, tmp_path / "t" / "ae.pt")
    with pytest.raises(LegatoError, match="do not add up to its 48 latents"):
        SparseAutoencoder.load(tmp_path / "t")


def write_sparsify(folder, **cfg):
    """A hookpoint's folder of SparseCoder.save_to_disk, the run's config.json above it."""
    folder.mkdir(parents=True)
    cfg = {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        **cfg,
        "d_in": D,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    (folder.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "ctx_len": 2048}))
    weights = tensors()
    stored = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    save_file(stored, folder / "sae.safetensors")
    return weights


def sparsify_encode(acts_ND, weights):
    pre_NF = torch.relu((acts_ND - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    top = pre_NF.topk(K, dim=-1)
    return torch.zeros_like(pre_NF).scatter_(-1, top.indices, top.values)


@pytest.mark.parametrize("num_latents", [0, F])
def test_sparsify(tmp_path, num_latents):
    folder = tmp_path / "run" / "layers.7.mlp"
    weights = write_sparsify(folder, num_latents=num_latents)
    sae = SparseAutoencoder.load(folder)
    assert_codes(sae, sparsify_encode(acts(), weights), weights)
    assert sae.architecture == TopK(K)
    details = sae.details
    assert (details["model"], details["layer"], details["site"]) == ("EleutherAI/pythia-160m", 7, "mlp")
    assert details["context_length"] == 2048
    with pytest.raises(UsageError, match=r"holds 1 SAE\(s\), name the one to open: .*layers.7.mlp"):
        SparseAutoencoder.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"transcode": True}, "it is a transcoder"),
        ({"skip_connection": True}, "skip connection"),
        ({"activation": "groupmax"}, "'groupmax'; only topk"),
        ({"k": F + 1}, "without a usable k"),
        ({"expansion_factor": 4}, "other sizes than the 16 x 48"),
        ({"num_latents": F - 1}, "other sizes than the 16 x 48"),
    ],
)
def test_what_of_sparsify_is_no_topk_autoencoder_is_refused(tmp_path, cfg, message):
    write_sparsify(tmp_path / "run" / "layers.7", **cfg)
    with pytest.raises(LegatoError, match=message):
        SparseAutoencoder.load(tmp_path / "run" / "layers.7")


def gemma_scope_encode(acts_ND, weights):
    pre_NF = acts_ND @ weights["W_enc"] + weights["b_enc"]
    return (pre_NF > weights["threshold"]) * torch.relu(pre_NF)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_gemma_scope(tmp_path, save):
    folder = tmp_path / "gemma-scope-2b-pt-mlp" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    weights = tensors() | {"threshold": 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(2))}
    save(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    for path in (folder, folder / "params.npz"):
        sae = SparseAutoencoder.load(path)
        assert_codes(sae, gemma_scope_encode(acts(), weights), weights)
        assert torch.equal(sae.b_enc, weights["b_enc"])  # nothing is subtracted from the input
    assert sae.details == {
        "model": "google/gemma-2-2b",
        "layer": 12,
        "site": "mlp_out",
        "source": {"format": "gemma-scope"},
    }


def test_gemma_scope_with_lower_case_names_and_a_scaling_factor(tmp_path):
    weights = tensors() | {"threshold": torch.full((F,), 0.7)}
    lower = {name.replace("W_", "w_"): tensor.numpy() for name, tensor in weights.items()}
    np.savez(tmp_path / "params.npz", **lower, scaling_factor=np.ones(F, np.float32))
    sae = SparseAutoencoder.load(tmp_path)
    assert_codes(sae, gemma_scope_encode(acts(), weights), weights)
    assert sae.details == {"source": {"format": "gemma-scope"}}
    np.savez(tmp_path / "params.npz", **lower, scaling_factor=np.full(F, 2, np.float32))
    with pytest.raises(LegatoError, match="scaling_factor"):
        SparseAutoencoder.load(tmp_path)
