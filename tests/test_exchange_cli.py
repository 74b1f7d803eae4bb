"""`legato import` and `legato export` as a person meets them."""

import pytest
import torch
from small_experiment import write_corpus
from test_export import acts, assert_equal, random_sae
from tiny_models import save_tiny_model

from legato.cli import main
from legato.sae.architectures import HysteresisTopK, TopK
from legato.sae.autoencoder import SparseAutoencoder, export


@pytest.mark.parametrize("to", ["saelens", "dictionary_learning", "sparsify", "safetensors"])
def test_out_and_in_again(tmp_path, capsys, to):
    sae = random_sae("topk")
    sae.save(tmp_path / "mine")
    out = tmp_path / "layers.3" / ("sae.safetensors" if to == "safetensors" else "")
    assert main(["export", str(tmp_path / "mine"), f"--to={to}", f"--out={out}"]) == 0, capsys.readouterr().err
    assert f"saved as {to}: {out}" in capsys.readouterr().out
    assert main(["import", str(out), str(tmp_path / "again")]) == 0
    assert "topk SAE, width 16, 48 latents, on gpt2, layer 3" in capsys.readouterr().out
    back = SparseAutoencoder.load(tmp_path / "again")
    torch.testing.assert_close(back.encode(acts()), sae.encode(acts()), rtol=1e-5, atol=1e-5)
    if to in ("saelens", "safetensors"):
        assert_equal(back, sae)


def test_an_sae_with_state_goes_out_without_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LEGATO_CACHE", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "model", "gpt2", pad_token_id=None)
    W_dec = torch.nn.functional.normalize(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = (W_dec.T.contiguous(), torch.zeros(64), W_dec, torch.zeros(48))
    sae = SparseAutoencoder(*weights, HysteresisTopK(4, release=0.5), {"layer": 2, "model": str(model)})
    sae.save(tmp_path / "held")
    words = ["export", str(tmp_path / "held"), "--to=dictionary_learning", f"--out={tmp_path / 'out'}"]
    assert main(words) == 1
    assert "has no class for a hysteresis_topk SAE" in capsys.readouterr().err
    place = [f"--dataset={write_corpus(tmp_path / 'corpus')}", "--context_length=16", "--rows=8"]
    assert main([*words, "--stateless", *place]) == 0
    shown = capsys.readouterr().out
    assert "L0 4.0 for both" in shown
    assert SparseAutoencoder.load(tmp_path / "out").architecture == TopK(4)


def test_mistakes(tmp_path, capsys):
    export(random_sae("jumprelu"), tmp_path / "sae", to="saelens")

    def error(*words, code=2):
        assert main([str(word) for word in words]) == code
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        return shown

    assert "does not exist" in error("import", tmp_path / "absent", tmp_path / "out")
    assert "--to onnx is unknown: choose one of saelens, " in error("export", tmp_path / "sae", "--to=onnx", "--out=x")
    assert "only topk SAEs" in error("export", tmp_path / "sae", "--to=sparsify", f"--out={tmp_path / 'x'}", code=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    assert "choose another place" in error("import", tmp_path / "sae", tmp_path / "full", code=1)
