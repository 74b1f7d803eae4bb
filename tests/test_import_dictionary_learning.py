"""Runs written by dictionary_learning: its trainers' configurations and classes, saved as its training loop does."""

import json

import pytest
import torch

from legato.common.errors import LegatoError, UsageError
from legato.sae.autoencoder import SparseAutoencoder

pytestmark = pytest.mark.filterwarnings("default")  # its dependencies warn at import
pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed", exc_type=ImportError)

D, F, K = 16, 48, 5
THRESHOLD = 1.3
CLASSES = (
    "AutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)


def trainer_of(dict_class):
    """The library's trainer that makes that class, so that config.json is the one it writes."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    base = {
        "steps": 10,
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "gpt2",
        "device": "cpu",
        "submodule_name": "resid_post_layer_3",
        "warmup_steps": 1,
    }
    if dict_class == "AutoEncoder":
        return StandardTrainer(**base, sparsity_warmup_steps=1, lr=1e-3)
    if dict_class == "GatedAutoEncoder":
        return GatedSAETrainer(**base, sparsity_warmup_steps=1, lr=1e-3)
    if dict_class == "JumpReluAutoEncoder":
        return JumpReluTrainer(**base, sparsity_warmup_steps=1)
    if dict_class == "MatryoshkaBatchTopKSAE":
        return MatryoshkaBatchTopKTrainer(**base, k=K, group_fractions=[0.25, 0.75])
    return {"AutoEncoderTopK": TopKTrainer, "BatchTopKSAE": BatchTopKTrainer}[dict_class](**base, k=K)


def write_run(folder, dict_class, *, threshold=THRESHOLD, unit_rows=True, norm_factor=None):
    """trainer_<i>/ as training.py's trainSAE writes it, with random weights; returns the trainer."""
    trainer = trainer_of(dict_class)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.ae.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name == "threshold":
                parameter.abs_()
        decoder_DF = trainer.ae.W_dec.T if hasattr(trainer.ae, "W_dec") else trainer.ae.decoder.weight
        if unit_rows:
            decoder_DF.div_(decoder_DF.norm(dim=0))
    if dict_class.endswith(("TopK", "TopKSAE")):
        trainer.ae.threshold = torch.tensor(threshold)
    if norm_factor is not None:
        trainer.ae.scale_biases(norm_factor)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {"ctx_len": 64}}, indent=4))
    torch.save({name: tensor.cpu() for name, tensor in trainer.ae.state_dict().items()}, folder / "ae.pt")
    return trainer


def acts():
    return 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 0.5


def opened_by_the_library(folder):
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder), device="cpu")[0]


def assert_same(ours, theirs, scale=1.0):
    acts_ND = scale * acts()
    with torch.no_grad():
        codes_NF = theirs.encode(acts_ND)
        recon_ND = theirs.decode(codes_NF)
    assert 0 < (codes_NF > 0).float().mean() < 0.7
    torch.testing.assert_close(ours.encode(acts_ND), codes_NF, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(ours(acts_ND), recon_ND, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("dict_class", CLASSES)
def test_encodes_and_decodes_as_the_library(tmp_path, dict_class):
    folder = tmp_path / "trainer_0"
    write_run(folder, dict_class)
    theirs = opened_by_the_library(folder)
    ours = SparseAutoencoder.load(folder)
    assert_same(ours, theirs)
    assert_same(SparseAutoencoder.load(ours.save(tmp_path / "again")), theirs)
    source = ours.details["source"]
    assert (ours.details["model"], ours.details["layer"], ours.details["site"]) == ("gpt2", 3, "resid_post")
    assert ours.details["context_length"] == 64
    assert (source["format"], source["dict_class"]) == ("dictionary_learning", dict_class)
    if dict_class == "MatryoshkaBatchTopKSAE":
        assert (source["group_sizes"], source["k"]) == ([12, 36], K)


@pytest.mark.parametrize("dict_class", CLASSES)
def test_activations_normalised_in_training_are_raw_here(tmp_path, dict_class):
    """scale_biases folds the norm factor, as training.py does before it saves: codes grow with the activations."""
    write_run(tmp_path / "trainer_0", dict_class, norm_factor=1000.0)
    assert_same(SparseAutoencoder.load(tmp_path / "trainer_0"), opened_by_the_library(tmp_path / "trainer_0"), 1000.0)


def test_an_autoencoder_with_other_decoder_norms_is_normalised_as_the_library_does(tmp_path):
    write_run(tmp_path / "trainer_0", "AutoEncoder", unit_rows=False)
    ours = SparseAutoencoder.load(tmp_path / "trainer_0")
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(F))
    assert_same(ours, opened_by_the_library(tmp_path / "trainer_0"))


@pytest.mark.parametrize("dict_class", CLASSES)
def test_checkpoints_find_the_config_above_them(tmp_path, dict_class):
    folder = tmp_path / "trainer_0"
    write_run(folder, dict_class)
    (folder / "checkpoints").mkdir()
    checkpoint = (folder / "ae.pt").rename(folder / "checkpoints" / "ae_100.pt")
    ours = SparseAutoencoder.load(checkpoint)
    (folder / "checkpoints" / "ae_100.pt").rename(folder / "ae.pt")
    assert_same(ours, opened_by_the_library(folder))


@pytest.mark.parametrize("dict_class", CLASSES)
def test_without_a_config_the_tensors_say_the_class_where_they_can(tmp_path, dict_class):
    folder = tmp_path / "trainer_0"
    write_run(folder, dict_class)
    theirs = opened_by_the_library(folder)
    (folder / "config.json").unlink()
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE"):  # the same tensors, other codes
        with pytest.raises(UsageError, match=r"may be a TopK or a BatchTopK SAE: put the run's config.json"):
            SparseAutoencoder.load(folder)
    else:
        assert_same(SparseAutoencoder.load(folder), theirs)


@pytest.mark.parametrize("dict_class", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_refused(tmp_path, dict_class):
    write_run(tmp_path / "trainer_0", dict_class, threshold=-1.0)
    with pytest.raises(LegatoError, match="threshold was never set"):
        SparseAutoencoder.load(tmp_path / "trainer_0")


def test_topk_does_not_need_its_threshold(tmp_path):
    write_run(tmp_path / "trainer_0", "AutoEncoderTopK", threshold=-1.0)
    assert_same(SparseAutoencoder.load(tmp_path / "trainer_0"), opened_by_the_library(tmp_path / "trainer_0"))


def test_config_and_tensors_of_two_runs_are_told_apart(tmp_path):
    for name, dict_class in (("a", "AutoEncoderTopK"), ("b", "GatedAutoEncoder")):
        write_run(tmp_path / name, dict_class)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["trainer"]["k"] = K + 1
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LegatoError, match=r"has k = 5, its config.json k = 6"):
        SparseAutoencoder.load(tmp_path / "a")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LegatoError, match=r"is not the AutoEncoderTopK its config.json names"):
        SparseAutoencoder.load(tmp_path / "b")


def test_a_run_of_several_trainers_is_listed(tmp_path):
    for i, dict_class in enumerate(CLASSES[:2]):
        write_run(tmp_path / f"trainer_{i}", dict_class)
    with pytest.raises(UsageError, match=r"holds 2 SAE\(s\), name the one to open: .*trainer_0, .*trainer_1"):
        SparseAutoencoder.load(tmp_path)
