"""Files that are not what they seem: nothing of them runs, and one line says what is wrong."""

import pickle
import zipfile

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from legato.common.errors import LegatoError, UsageError
from legato.sae.autoencoder import SparseAutoencoder

D, F = 4, 8


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def jumprelu():
    return {
        "W_enc": torch.rand(D, F),
        "b_enc": torch.rand(F),
        "W_dec": torch.rand(F, D),
        "b_dec": torch.rand(D),
        "threshold": torch.rand(F),
    }


def refused(path, message, error=LegatoError):
    with pytest.raises(error, match=message) as raised:
        SparseAutoencoder.load(path)
    text = str(raised.value)
    assert str(path) in text
    assert "\n" not in text


def test_state_dict_that_holds_code(tmp_path):
    torch.save({**jumprelu(), "extra": Touch(tmp_path / "ran")}, tmp_path / "ae.pt")
    refused(tmp_path / "ae.pt", "holds more than tensors and was not opened")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    refused(tmp_path / "old.pt", "not in torch.save's zip format")
    torch.save(jumprelu(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "legacy.pt", "not in torch.save's zip format")
    assert not (tmp_path / "ran").exists()


def test_npz_that_holds_objects(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in jumprelu().items()}
    arrays["threshold"] = np.array([Touch(tmp_path / "ran")] * F, dtype=object)
    np.savez(tmp_path / "params.npz", **arrays)
    refused(tmp_path / "params.npz", "is damaged: Object arrays cannot be loaded")
    assert not (tmp_path / "ran").exists()


def test_a_tensor_larger_than_its_bytes(tmp_path):
    """One stored number, read as 2^40 through a stride of 0."""
    torch.save(jumprelu() | {"W_enc": torch.rand(1).expand(2**20, 2**20)}, tmp_path / "ae.pt")
    refused(tmp_path / "ae.pt", r"needs 4096\.0 GiB and .* GiB are free: open it on a larger machine")


def test_archives_that_unpack_to_more_than_the_memory(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "params.npz", **{n: np.zeros_like(t) for n, t in jumprelu().items()})
    torch.save(jumprelu(), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "ae.pt", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    refused(tmp_path / "ae.pt", "is compressed, which torch.save never does")
    memory = type("Memory", (), {"available": 100})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    refused(tmp_path / "params.npz", "open it on a larger machine")


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae.safetensors", "sae_weights.safetensors"])
def test_cut_files(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(jumprelu(), path)
    elif name.endswith(".npz"):
        np.savez(path, **{n: t.numpy() for n, t in jumprelu().items()})
    else:
        save_file(jumprelu(), path)
        (tmp_path / "cfg.json").write_text('{"architecture": "jumprelu", "metadata": {"sae_lens_version": "6.54.0"}}')
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "is damaged|not in torch.save's zip format")


def test_state_dicts_of_something_else(tmp_path):
    torch.save({"model": jumprelu()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "is not a state dict of tensors")
    torch.save({"lm_head.weight": torch.rand(3, 3)}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", r"no SAE of dictionary_learning \(it has lm_head.weight\)")
    torch.save(jumprelu() | {"W_dec": torch.rand(F, D + 1)}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", r"W_dec has shape \(8, 5\), expected \(8, 4\)")
    torch.save(jumprelu() | {"b_enc": torch.full((F,), torch.nan)}, tmp_path / "d.pt")
    refused(tmp_path / "d.pt", "b_enc holds values that are not finite")
    torch.save(jumprelu() | {"b_dec": torch.zeros(D).to_sparse()}, tmp_path / "e.pt")
    refused(tmp_path / "e.pt", "b_dec is not a dense tensor")


@pytest.mark.parametrize("content", ["[1]", "{", "\x00", '{"a": ' * 100_000])
def test_broken_configurations(tmp_path, content):
    torch.save(jumprelu(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LegatoError, match=r"config\.json is damaged"):
        SparseAutoencoder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": ["a"], "k": {}}, "buffer": 3}')
    refused(tmp_path / "ae.pt", r"holds a \['a'\]; can be read: AutoEncoder")


def test_places_without_an_sae(tmp_path):
    refused(tmp_path / "absent", "does not exist", UsageError)
    refused(tmp_path, "holds no SAE; can be read: a SAELens folder", UsageError)
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "model.safetensors", "is damaged")
    save_file({"lm_head.weight": torch.rand(3, 3)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "is no file of an SAE that can be read", UsageError)
