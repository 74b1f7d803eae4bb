"""Published SAEs, laid out as they are published; codes and reconstructions by each tool's own formula in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_model

from legato.cli import main
from legato.common.errors import LegatoError, UsageError
from legato.sae.autoencoder import SparseAutoencoder

D, F, K = 16, 48, 5
DOUBLE = torch.float64


def tensors(d_in: int = D, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(F, d_in, generator=generator), dim=1)
    return {
        "W_enc": W_dec.T.contiguous() + 0.1 * torch.randn(d_in, F, generator=generator),
        "b_enc": 0.3 * torch.randn(F, generator=generator),
        "W_dec": W_dec * (0.5 + torch.rand(F, 1, generator=generator)),
        "b_dec": 0.3 * torch.randn(d_in, generator=generator),
        "threshold": 0.3 + torch.rand(F, generator=generator),
    }


def acts(d_in: int = D) -> torch.Tensor:
    return 2 * torch.randn(200, d_in, generator=torch.Generator().manual_seed(1)) + 0.5


def assert_is(sae: SparseAutoencoder, codes_NF: torch.Tensor, reconstruction_ND: torch.Tensor) -> None:
    assert 0 < (codes_NF != 0).double().mean() < 0.7
    torch.testing.assert_close(sae.encode(acts()).double(), codes_NF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(acts()).double(), reconstruction_ND, rtol=1e-5, atol=1e-5)


def jumprelu(x_ND: torch.Tensor, w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    w = {name: tensor.double() for name, tensor in w.items()}
    pre_NF = x_ND.double() @ w["W_enc"] + w["b_enc"]
    codes_NF = torch.where(pre_NF > w["threshold"], pre_NF, 0)
    return codes_NF, codes_NF @ w["W_dec"] + w["b_dec"]


def on_words(folder: Path) -> list[str]:
    """Options of `legato evaluate` for a small text of the tiny models' words."""
    (folder / "corpus.txt").write_text(" ".join(f"w{3 + number * 7 % 90}" for number in range(3000)))
    return ["--dataset", str(folder / "corpus.txt"), "--context_length=16", "--rows=40", "--ce_rows=2"]


def write_gemma_scope_2(folder: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    lower = {name.replace("W_", "w_"): tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
    save_file(lower, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


GEMMA_SCOPE_2 = {
    "architecture": "jump_relu",
    "model_name": "google/gemma-v3-270m-pt",
    "hf_hook_point_in": "model.layers.9.output",
    "hf_hook_point_out": "model.layers.9.output",  # of an SAE the same, of a transcoder another
    "width": 48,
    "l0": 60,
    "type": "sae",
}


@pytest.mark.parametrize("config", [{}, GEMMA_SCOPE_2])
def test_gemma_scope_2(tmp_path, config):
    place = tmp_path / "gemma-scope-2-270m-pt" / "resid_post" / "layer_9_width_16k_l0_medium"
    weights = tensors()
    folder = write_gemma_scope_2(place, weights, **config)
    for path in (folder, folder / "params.safetensors"):
        sae = SparseAutoencoder.load(path)
        assert_is(sae, *jumprelu(acts(), weights))
        assert (sae.details["model"], sae.place()) == ("google/gemma-3-270m", (9, "resid_post"))
    assert sae.details["source"]["format"] == "gemma-scope-2"


@pytest.mark.parametrize(
    ("name", "hook", "place"),
    [
        ("attn_out", "model.layers.4.self_attn.o_proj.input", (4, "self_attn.o_proj:input")),
        ("mlp_out_all", "model.layers.4.post_feedforward_layernorm.output", (4, "post_feedforward_layernorm")),
    ],
)
def test_other_places_of_gemma_scope_2(tmp_path, name, hook, place):
    for parent, config in (("with", {"architecture": "jump_relu", "hf_hook_point_in": hook}), ("without", {})):
        root = tmp_path / parent / "gemma-scope-2-1b-it" / name / "layer_4_width_16k_l0_small"
        sae = SparseAutoencoder.load(write_gemma_scope_2(root, tensors(), **config))
        assert (sae.place(), sae.details["model"]) == (place, "google/gemma-3-1b-it")


def test_transcoders_are_refused(tmp_path):
    out = {"hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output"}
    folder = write_gemma_scope_2(tmp_path / "a", tensors(), **GEMMA_SCOPE_2 | out)
    with pytest.raises(LegatoError, match="is a transcoder, which reads one place and writes another"):
        SparseAutoencoder.load(folder)


def test_a_file_in_a_hub_cache_finds_its_siblings(tmp_path):
    """In the cache of the hub's client every file is a link to a file that is named by its content."""
    written = write_gemma_scope_2(tmp_path / "written", tensors(), **GEMMA_SCOPE_2)
    blobs = tmp_path / "models--google--gemma-scope-2-270m-pt" / "blobs"
    snapshot = blobs.parent / "snapshots" / "abc" / "resid_post" / "layer_9_width_16k_l0_medium"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(written.iterdir()):
        file.rename(blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(blobs / f"{number:064x}")
    for path in (snapshot, snapshot / "params.safetensors"):
        assert SparseAutoencoder.load(path).place() == (9, "resid_post")


def write_llama_scope(folder: Path, weights: dict[str, torch.Tensor], norm: float, **config: object) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    linear = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        "decoder.bias": weights["b_dec"],
    }
    save_file(linear, folder / "checkpoints" / "final.safetensors")
    said = {
        "hook_point_in": "blocks.19.hook_resid_post",
        "hook_point_out": "blocks.19.hook_resid_post",
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.53,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "top_k": 50,
    }
    (folder / "hyperparams.json").write_text(json.dumps(said | config))
    return folder


@pytest.mark.parametrize("includes_norm", [True, False])
def test_llama_scope(tmp_path, includes_norm):
    weights, norm = tensors(), 9.0
    folder = write_llama_scope(
        tmp_path / "Llama3_1-8B-Base-L19R-8x", weights, norm, sparsity_include_decoder_norm=includes_norm
    )
    w = {name: tensor.double() for name, tensor in weights.items()}
    factor = D**0.5 / norm
    pre_NF = (acts().double() * factor) @ w["W_enc"] + w["b_enc"]
    score_NF = pre_NF / factor * (w["W_dec"].norm(dim=1) if includes_norm else 1)  # in units of the raw activations
    codes_NF = torch.where(score_NF > 0.53, pre_NF, 0)
    for path in (folder, folder / "checkpoints" / "final.safetensors"):
        sae = SparseAutoencoder.load(path)
        assert_is(sae, codes_NF, (codes_NF @ w["W_dec"] + w["b_dec"]) / factor)
    assert (sae.details["model"], sae.place()) == ("meta-llama/Llama-3.1-8B", (19, "resid_post"))
    (folder / "hyperparams.json").write_text(
        json.dumps({"norm_activation": "dataset-wise", "hook_point_in": "blocks.1.hook_resid_post"})
    )
    with pytest.raises(LegatoError, match="does not say dataset_average_activation_norm"):
        SparseAutoencoder.load(folder)


def topk(pre_NF: torch.Tensor, k: int) -> torch.Tensor:
    top = pre_NF.topk(k, dim=1)
    return torch.zeros_like(pre_NF).scatter(1, top.indices, top.values.relu())


def test_qwen_scope(tmp_path):
    weights = tensors()
    folder = tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
    folder.mkdir()
    state = {"W_enc": weights["W_enc"].T.contiguous(), "W_dec": weights["W_dec"].T.contiguous()}
    torch.save(state | {name: weights[name] for name in ("b_enc", "b_dec")}, folder / "layer7.sae.pt")
    sae = SparseAutoencoder.load(folder / "layer7.sae.pt")
    w = {name: tensor.double() for name, tensor in weights.items()}
    codes_NF = topk(acts().double() @ w["W_enc"] + w["b_enc"], K)
    assert_is(sae, codes_NF, codes_NF @ w["W_dec"] + w["b_dec"])
    assert (sae.details["model"], sae.place()) == ("Qwen/Qwen3-1.7B-Base", (7, "resid_post"))
    (folder / "layer7.sae.pt").rename(tmp_path / "layer7.sae.pt")
    with pytest.raises(UsageError, match="k is in the name of Qwen-Scope's folder"):
        SparseAutoencoder.load(tmp_path / "layer7.sae.pt")


def goodfire(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "encoder_linear.weight": weights["W_enc"].T.contiguous(),
        "encoder_linear.bias": weights["b_enc"],
        "decoder_linear.weight": weights["W_dec"].T.contiguous(),
        "decoder_linear.bias": weights["b_dec"],
    }


@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_goodfire(tmp_path, suffix):
    weights = tensors()
    path = tmp_path / f"Llama-3.1-8B-Instruct-SAE-l19.{suffix}"
    torch.save(goodfire(weights), path)
    sae = SparseAutoencoder.load(path)
    w = {name: tensor.double() for name, tensor in weights.items()}
    codes_NF = (acts().double() @ w["W_enc"] + w["b_enc"]).relu()
    assert_is(sae, codes_NF, codes_NF @ w["W_dec"] + w["b_dec"])
    assert (sae.details["model"], sae.place()) == ("meta-llama/Llama-3.1-8B-Instruct", (19, "resid_post"))


def test_signed_codes_are_two_latents(tmp_path):
    """SAELens' AbsTopK: the k largest magnitudes with their signs; latent F + f is f below 0."""
    weights = {name: tensor for name, tensor in tensors().items() if name != "threshold"}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    cfg = {"architecture": "abstopk", "k": K, "d_in": D, "d_sae": F, "dtype": "float32", "apply_b_dec_to_input": True}
    cfg |= {"rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": "6.54.0"}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    sae = SparseAutoencoder.load(tmp_path)
    w = {name: tensor.double() for name, tensor in weights.items()}
    pre_NF = (acts().double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    top = pre_NF.abs().topk(K, dim=1).indices
    signed_NF = torch.zeros_like(pre_NF).scatter(1, top, pre_NF.gather(1, top))
    assert_is(sae, torch.cat([signed_NF.relu(), (-signed_NF).relu()], 1), signed_NF @ w["W_dec"] + w["b_dec"])
    codes = sae.encode(acts())
    assert ((codes > 0).sum(1) == K).all()
    torch.testing.assert_close(codes.sum(1).double(), signed_NF.abs().sum(1), rtol=1e-5, atol=1e-5)


def test_old_and_prefixed_state_dicts_of_dictionary_learning(tmp_path):
    weights = tensors()
    old = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        "b_dec": weights["b_dec"],
    }
    w = {name: tensor.double() for name, tensor in weights.items()}
    codes_NF = topk(((acts().double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), K)
    config = {"trainer": {"dict_class": "AutoEncoderTopK", "k": K, "layer": 3, "lm_name": "gpt2"}}
    for prefix in ("", "_orig_mod.", "module._orig_mod."):
        folder = tmp_path / f"trainer_{len(prefix)}"
        folder.mkdir()
        torch.save({prefix + name: tensor for name, tensor in old.items()}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps(config))
        assert_is(SparseAutoencoder.load(folder), codes_NF, codes_NF @ w["W_dec"] + w["b_dec"])


def test_trained_on_centred_activations(tmp_path, capsys):
    """TransformerLens' center_writing_weights: the SAE is given activations less their mean over the width."""
    model = save_tiny_model(tmp_path / "model", "gpt2")
    identity, centring = torch.eye(48), torch.eye(48) - 1 / 48
    weights = {
        "W_enc": torch.cat([identity, -identity], 1),
        "b_enc": torch.zeros(96),
        "W_dec": torch.cat([centring, -centring]),
        "b_dec": torch.zeros(48),
    }
    found = {}
    for is_centred in (True, False):
        folder = tmp_path / f"sae_{is_centred}"
        folder.mkdir()
        save_file(weights, folder / "sae_weights.safetensors")
        kwargs = {"center_writing_weights": True} if is_centred else {}
        metadata = {"sae_lens_version": "6.54.0", "model_name": str(model), "hook_name": "blocks.2.hook_resid_post"}
        cfg = {"architecture": "standard", "d_in": 48, "d_sae": 96, "dtype": "float32", "apply_b_dec_to_input": False}
        cfg["metadata"] = metadata | {"model_from_pretrained_kwargs": kwargs}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        out = tmp_path / f"out_{is_centred}"
        assert main(["evaluate", f"mine={folder}", *on_words(tmp_path), "--out", str(out)]) == 0, (
            capsys.readouterr().err
        )
        found[is_centred] = json.loads((out / "metrics.json").read_text())["mine"]["core"]
    assert found[True]["fvu"] < 1e-6 < 1e-3 < found[False]["fvu"]
    assert found[True]["ce_loss_with_sae"] == pytest.approx(found[True]["ce_loss_without_sae"], abs=1e-4)


def test_several_formats_in_one_table(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", "gemma3")
    for seed, weights in enumerate([tensors(48, 0), tensors(48, 1)]):
        write_gemma_scope_2(tmp_path / f"scope_{seed}", weights, **GEMMA_SCOPE_2)
    torch.save(goodfire(tensors(48, 2)), tmp_path / "goodfire.pth")
    saes = [f"one={tmp_path}/scope_0", f"two={tmp_path}/scope_1", f"three={tmp_path}/goodfire.pth"]
    place = ["--model", str(model), "--layer", "2", "--out", str(tmp_path / "out")]
    assert main(["evaluate", *saes, *place, *on_words(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("one", "two", "three"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()).keys() == {"one", "two", "three"}
