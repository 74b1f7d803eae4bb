"""The failure this project began with: an SAE that was never trained, evaluated and written down as a result
(training_steps 0, explained_variance -0.785, NaN). Whatever leads there must end in an error and leave no result."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_experiment import zero_parameters

from legato.common.errors import LegatoError
from legato.common.hardware import fast_matmul_dtype
from legato.data.activations import ActivationBatch
from legato.evaluation.one_pass import evaluate
from legato.results.run_dir import RunDir
from legato.sae.architectures import BatchTopK, Hysteresis, ReLU, TopK
from legato.sae.autoencoder import SparseAutoencoder
from legato.training.bank import train_bank
from legato.training.config import SAEConfig, TrainConfig
from legato.training.step import Parameters, TrainBatch, Workspace
from legato.training.trainer import SAETrainer

B, L, D, F = 4, 8, 16, 32
SPARSITIES = [BatchTopK(4), TopK(4), Hysteresis(4), ReLU(1.0)]


def batch_of(acts_BLD, *, valid=True) -> ActivationBatch:
    mask_BL = torch.full((B, L), valid)
    doc_BL = torch.arange(B, dtype=torch.int32)[:, None].expand(B, L)
    return ActivationBatch(acts_BLD, mask_BL, doc_BL, torch.ones(B, L, dtype=torch.long))


def random_batch(**changes) -> ActivationBatch:
    return batch_of(torch.randn(B, L, D, generator=torch.Generator().manual_seed(0)), **changes)


def random_sae(**changes) -> SparseAutoencoder:
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(1)), dim=1)
    parts = {"W_enc": W_dec.T, "b_enc": torch.zeros(F), "W_dec": W_dec, "b_dec": torch.zeros(D)}
    return SparseAutoencoder(**parts | changes, architecture=ReLU())


class Identity:
    mean_D, scale = torch.zeros(D), 1.0

    def apply(self, acts):
        return acts


# Weights that are zero


def test_an_experiment_from_zero_weights(small, monkeypatch):
    monkeypatch.setattr(Parameters, "initial", zero_parameters)
    assert "no latent fires at step 0" in small.error("--temporal=hysteresis,contrastive", code=1)
    assert small.results() == []


@pytest.mark.parametrize("sparsity", SPARSITIES, ids=lambda sparsity: type(sparsity).__name__)
def test_training_from_zero_weights(sparsity, monkeypatch):
    monkeypatch.setattr(Parameters, "initial", zero_parameters)
    with pytest.raises(LegatoError, match="no latent fires at step 0"):
        train_bank(
            [SAEConfig("arm", sparsity, F)], [random_batch()] * 3, Identity(), TrainConfig(steps=3), log=lambda _: None
        )


@pytest.mark.parametrize("zero", ["W_enc", "W_dec"])
def test_an_sae_of_zero_weights_cannot_be_made_or_opened(zero, tmp_path):
    with pytest.raises(LegatoError, match="never trained"):
        random_sae(**{zero: torch.zeros(F, D) if zero == "W_dec" else torch.zeros(D, F)})
    path = random_sae().save(tmp_path / "sae")
    weights = load_file(path / "sae_weights.safetensors")
    save_file(weights | {zero: torch.zeros_like(weights[zero])}, path / "sae_weights.safetensors")
    with pytest.raises(LegatoError, match="is damaged"):
        SparseAutoencoder.load(path)
    (path / "legato.json").unlink()  # as another tool would have saved it
    with pytest.raises(LegatoError, match="never trained"):
        SparseAutoencoder.load(path)


def test_an_sae_whose_output_is_always_zero_gets_no_numbers():
    silent = random_sae(b_enc=torch.full((F,), -1e6))
    with pytest.raises(LegatoError, match="no latent fires on any of 32 tokens"):
        evaluate(silent, [random_batch()])


# Zero steps


def test_zero_steps(small):
    with pytest.raises(LegatoError, match="0 training steps would leave the SAE untrained"):
        TrainConfig(steps=0)
    trainer = SAETrainer(SAEConfig("arm", BatchTopK(4), F), TrainConfig(steps=1), D, Workspace())
    calibration = [TrainBatch.of(random_batch(), Identity(), fast_matmul_dtype())]
    with pytest.raises(LegatoError, match="0 training steps were taken"):
        trainer.finish(Identity(), calibration)
    assert "--tokens 0 must be greater than or equal to 1" in small.error("--tokens=0")
    assert not small.out_dir.exists()


def test_activations_that_run_out():
    with pytest.raises(LegatoError, match="ran out after 2 of 3 steps"):
        train_bank(
            [SAEConfig("arm", BatchTopK(4), F)], [random_batch()] * 2, Identity(), TrainConfig(steps=3), log=lambda _: 0
        )


# Activations that are not numbers


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_whose_activations_are_not_finite(small, value):
    weights = load_file(small.model / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.1.mlp.c_fc.bias"))
    weights[name][3] = value
    save_file(weights, small.model / "model.safetensors", {"format": "pt"})
    assert "not finite" in small.error(code=1)
    assert not small.out_dir.exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_activation_that_is_not_finite(value):
    acts_BLD = random_batch().acts_BLD
    acts_BLD[1, 2, 3] = value
    bad = batch_of(acts_BLD)
    with pytest.raises(LegatoError, match="not finite"):
        TrainBatch.of(bad, Identity(), fast_matmul_dtype())
    with pytest.raises(LegatoError, match="not finite"):
        random_sae().encode(acts_BLD)
    with pytest.raises(LegatoError, match="not finite"):
        evaluate(random_sae(), [random_batch(), bad])


def test_a_number_that_is_not_finite_is_never_saved(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(LegatoError, match=r"not finite \(baseline\.core\.cossim\)"):
        run.write_metrics({"baseline": {"core": {"fvu": 0.2, "cossim": math.nan}}})
    assert list(tmp_path.iterdir()) == []


# Text of nothing but special tokens


def test_a_corpus_of_nothing_but_bos(small):
    for number, path in enumerate(sorted(small.corpus.iterdir())):
        path.write_text("<bos> " * (20 + number))
    assert "no text: every token is BOS" in small.error(code=1)
    assert not small.out_dir.exists()


def test_held_out_text_of_nothing_but_bos(small, monkeypatch):
    import legato.experiment.inputs
    from legato.data.documents import Document

    def split(documents, fraction):
        return list(documents), [Document("<bos> " * 40, "held-out")]

    monkeypatch.setattr(legato.experiment.inputs, "split_held_out", split)
    assert "no text: every token is BOS" in small.error(code=1)
    assert not small.out_dir.exists()


def test_a_batch_without_a_valid_token():
    nothing = random_batch(valid=False)
    with pytest.raises(LegatoError, match="no valid token"):
        TrainBatch.of(nothing, Identity(), fast_matmul_dtype())
    with pytest.raises(LegatoError, match="no position is valid"):
        evaluate(random_sae(), [nothing])


# And the same command with nothing wrong


@pytest.mark.usefixtures("no_pages")
def test_the_same_experiment_without_the_fault(small):
    assert small.run("--temporal=hysteresis,contrastive") == 0
    metrics = json.loads((small.out_dir / "metrics.json").read_text())
    assert list(metrics) == ["baseline", "hysteresis", "contrastive"]
    for groups in metrics.values():
        assert groups["training"]["training_steps"] == 17
        assert 0 < groups["core"]["fvu"] < 1
        assert groups["core"]["l0"] > 0
