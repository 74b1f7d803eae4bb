"""Folders written by SAELens, training saves and inference saves, opened here."""

import json

import pytest
import torch

from legato.common.errors import LegatoError
from legato.sae.autoencoder import SparseAutoencoder

pytestmark = pytest.mark.filterwarnings("default")  # SAELens and its dependencies warn at import
pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError)

D, F, K = 16, 48, 5
WIDTHS = [12, 24, F]
# Architecture, its own configuration. The threshold of a batch budget is set below, as training sets it.
TRAINED = {
    "standard": {},
    "topk": {"k": K},
    "topk_unscaled": {"k": K, "rescale_acts_by_decoder_norm": False},
    "batchtopk": {"k": float(K)},
    "batchtopk_unscaled": {"k": float(K), "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": {"k": float(K), "matryoshka_widths": WIDTHS},
    "jumprelu": {},
    "gated": {},
}
THRESHOLD = 1.3


def trained(case, **config):
    """SAELens' training class with random weights of decoder norms 0.5 to 1.5."""
    from sae_lens.registry import get_sae_training_class

    sae_class, cfg_class = get_sae_training_class(case.removesuffix("_unscaled"))
    sae = sae_class(cfg_class(d_in=D, d_sae=F, **TRAINED[case], **config))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "blocks.3.hook_resid_post"
    sae.cfg.metadata.context_size = 64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
        sae.W_dec.mul_((0.5 + torch.rand(F, 1, generator=generator)) / sae.W_dec.norm(dim=1, keepdim=True))
    if "batchtopk" in case:
        sae.topk_threshold = torch.tensor(THRESHOLD, dtype=torch.float64)
    return sae


def acts():
    return 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 0.5


def inference_of(sae, folder):
    """What SAELens makes of its training SAE: saved for inference by it, opened by it."""
    from sae_lens import SAE

    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def assert_same(ours, theirs, acts_ND=None):
    acts_ND = acts() if acts_ND is None else acts_ND
    with torch.no_grad():
        codes_NF = theirs.encode(acts_ND)
        recon_ND = theirs.decode(codes_NF)
    codes_NF = codes_NF.to_dense() if codes_NF.is_sparse else codes_NF
    assert 0 < (codes_NF > 0).float().mean() < 0.7
    torch.testing.assert_close(ours.encode(acts_ND), codes_NF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(acts_ND), recon_ND, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("case", TRAINED)
def test_training_and_inference_saves_encode_as_saelens_does_at_inference(tmp_path, case, apply_b_dec_to_input):
    sae = trained(case, apply_b_dec_to_input=apply_b_dec_to_input)
    sae.save_model(tmp_path / "training")
    theirs = inference_of(sae, tmp_path / "inference")
    assert_same(SparseAutoencoder.load(tmp_path / "training"), theirs)
    assert_same(SparseAutoencoder.load(tmp_path / "inference"), theirs)
    assert_same(SparseAutoencoder.load(tmp_path / "training" / "cfg.json"), theirs)


def test_what_the_folder_says_about_the_sae_is_kept(tmp_path):
    sae = trained("matryoshka_batchtopk")
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    for which in ("training", "inference"):
        details = SparseAutoencoder.load(tmp_path / which).details
        source = details["source"]
        assert (details["model"], details["module_path"]) == ("gpt2", "blocks.3.hook_resid_post")
        assert details["context_length"] == 64
        assert (source["format"], source["architecture"]) == ("saelens", "matryoshka_batchtopk")
        assert (source["group_ends"], source["k"]) == (WIDTHS, K)


@pytest.mark.parametrize("case", TRAINED)
def test_checkpoint_with_a_norm_factor_takes_raw_activations(tmp_path, case):
    """SAELens' trainer scales activations until it folds the factor at the end of the run."""
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = trained(case, normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    scaler = ActivationScaler(scaling_factor=0.25)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    theirs, ours = inference_of(sae, tmp_path / "inference"), SparseAutoencoder.load(tmp_path)
    raw_ND = 4 * acts()
    with torch.no_grad():
        codes_NF = theirs.encode(scaler.scale(raw_ND))
        recon_ND = scaler.unscale(theirs.decode(codes_NF))
    torch.testing.assert_close(ours.encode(raw_ND), codes_NF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(raw_ND), recon_ND, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("case", ["standard", "gated", "batchtopk"])
def test_checkpoint_with_whitening_takes_raw_activations(tmp_path, case, apply_b_dec_to_input):
    from sae_lens.training.activation_scaler import ActivationScaler

    raw_ND = acts() @ torch.randn(D, D, generator=torch.Generator().manual_seed(2)) + 3
    scaler = ActivationScaler()
    scaler.estimate_whitening(D, iter([raw_ND] * 2), n_batches_for_norm_estimate=2)
    sae = trained(case, normalize_activations="covariance_whitening", apply_b_dec_to_input=apply_b_dec_to_input)
    sae.save_model(tmp_path)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    theirs, ours = inference_of(sae, tmp_path / "inference"), SparseAutoencoder.load(tmp_path)
    with torch.no_grad():
        codes_NF = theirs.encode(scaler.scale(raw_ND))
        recon_ND = scaler.unscale(theirs.decode(codes_NF))
    torch.testing.assert_close(ours.encode(raw_ND), codes_NF, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(ours(raw_ND), recon_ND, rtol=1e-4, atol=1e-4)


def test_a_normaliser_that_is_not_there_is_asked_for(tmp_path):
    trained("standard", normalize_activations="expected_average_only_in").save_model(tmp_path)
    with pytest.raises(LegatoError, match=r"activation_scaler.json is not beside it.*final save"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None}))
    with pytest.raises(LegatoError, match="no usable scaling_factor"):
        SparseAutoencoder.load(tmp_path)


def test_run_time_normalisation_is_refused(tmp_path):
    trained("standard", normalize_activations="layer_norm").save_model(tmp_path)
    with pytest.raises(LegatoError, match="normalize_activations='layer_norm', which no weights can hold"):
        SparseAutoencoder.load(tmp_path)


def test_a_budget_whose_threshold_was_never_set_is_refused(tmp_path):
    sae = trained("batchtopk")
    sae.topk_threshold = torch.tensor(0.0, dtype=torch.float64)
    sae.save_model(tmp_path)
    with pytest.raises(LegatoError, match="threshold was never set"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize("case", TRAINED)
def test_saelens_opens_what_we_save_of_its_sae(tmp_path, case):
    sae = trained(case)
    sae.save_model(tmp_path / "training")
    from sae_lens import SAE

    SparseAutoencoder.load(tmp_path / "training").save(tmp_path / "ours")
    assert_same(SparseAutoencoder.load(tmp_path / "ours"), SAE.load_from_disk(tmp_path / "ours"))
    assert_same(SparseAutoencoder.load(tmp_path / "ours"), inference_of(sae, tmp_path / "inference"))


@pytest.mark.parametrize("architecture", ["temporal", "matching_pursuit", "transcoder"])
def test_architectures_without_a_counterpart_are_named(tmp_path, architecture):
    trained("standard").save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "architecture": architecture}))
    with pytest.raises(LegatoError, match=f"holds architecture '{architecture}'; can be read: .*standard"):
        SparseAutoencoder.load(tmp_path)


def test_heads_side_by_side(tmp_path):
    """SAELens' hook_z joins the heads, as the site attn_z is read; one head alone is refused."""
    trained("standard").save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    cfg["reshape_activations"] = "hook_z"
    cfg["metadata"] |= {"hook_name": "blocks.3.attn.hook_z", "model_name": "gpt2-small"}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert SparseAutoencoder.load(tmp_path).place() == (3, "attn_z")
    cfg["metadata"]["hook_head_index"] = 2
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(LegatoError, match="reads head 2 alone"):
        SparseAutoencoder.load(tmp_path)
