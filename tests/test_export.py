"""SAEs written in other tools' formats: read back here, and opened by SAELens and dictionary_learning themselves."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from legato.common.errors import LegatoError
from legato.sae.architectures import TopK, architecture_named
from legato.sae.autoencoder import EXPORT_FORMATS, SparseAutoencoder, export

D, F, K = 16, 48, 5
DETAILS = {"model": "gpt2", "layer": 3, "site": "resid_post", "context_length": 64, "objective": {"seed": 2}}
PLAIN = ("standard", "topk", "jumprelu", "gated")
STATEFUL = ("hysteresis", "hysteresis_topk", "window_topk", "persistent")
OWN = {
    "standard": {},
    "topk": {"k": K},
    "jumprelu": {"threshold": 1.3},
    "gated": {"b_gate": -1.0, "r_mag": 0.1},
    "hysteresis": {"threshold": 1.3, "release": 0.5},
    "hysteresis_topk": {"k": K, "release": 0.5},
    "window_topk": {"threshold": 1.3, "window": 4},
    "persistent": {"threshold": 1.3, "leak": 0.5, "tail": 0.05},
}
PER_LATENT = ("threshold", "leak", "b_gate", "r_mag")


def random_sae(architecture, *, unit_rows=True, details=DETAILS, **change):
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    W_dec = W_dec if unit_rows else W_dec * (0.5 + torch.rand(F, 1, generator=generator))
    own = {
        name: value * (0.5 + torch.rand(F, generator=generator)) if name in PER_LATENT else value
        for name, value in OWN[architecture].items()
    }
    return SparseAutoencoder(
        W_dec.T.contiguous() + 0.1 * torch.randn(D, F, generator=generator),
        0.3 * torch.randn(F, generator=generator),
        W_dec,
        0.3 * torch.randn(D, generator=generator),
        architecture_named(architecture)(**own | change),
        details,
    )


def acts():
    return 2 * torch.randn(6, 32, D, generator=torch.Generator().manual_seed(1)) + 0.5


def assert_same_codes(sae, encode, decode):
    codes_BLF = sae.encode(acts())
    assert 0 < (codes_BLF > 0).float().mean() < 0.9
    with torch.no_grad():
        torch.testing.assert_close(encode(acts()), codes_BLF, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decode(codes_BLF), sae.decode(codes_BLF), rtol=1e-5, atol=1e-5)


def assert_equal(one, other):
    assert (one.architecture, one.details) == (other.architecture, other.details)
    tensors, theirs = one.stored().weights, other.stored().weights
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("to", ["saelens", "safetensors"])
@pytest.mark.parametrize("architecture", PLAIN + STATEFUL)
def test_our_own_formats_hold_every_sae_to_the_bit(tmp_path, architecture, to):
    sae = random_sae(architecture)
    path = export(sae, tmp_path / "sae.safetensors", to=to)
    assert_equal(SparseAutoencoder.load(path), sae)
    assert_equal(SparseAutoencoder.load(export(sae, path, to=to)), sae)  # again, in its own place


def test_one_file_is_a_plain_safetensors_file(tmp_path):
    path = export(random_sae("jumprelu"), tmp_path / "sae.safetensors", to="safetensors")
    assert load_file(path).keys() == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["legato"])["architecture"] == "jumprelu"
    save_file({"W_enc": torch.rand(D, F)}, path, metadata={"legato": "{}"})
    with pytest.raises(LegatoError, match="header does not say what SAE it is"):
        SparseAutoencoder.load(path)


@pytest.mark.parametrize("architecture", PLAIN)
def test_dictionary_learning_and_back(tmp_path, architecture):
    """To the bit where the class takes its input as it is; else b_dec goes through a bias, which is rounded twice."""
    sae = random_sae(architecture)
    back = SparseAutoencoder.load(export(sae, tmp_path / "run", to="dictionary_learning"))
    if architecture == "jumprelu":
        assert_equal(back, sae)
    assert (back.architecture, back.details) == (sae.architecture, sae.details)
    assert torch.equal(back.W_enc, sae.W_enc)
    assert torch.equal(back.W_dec, sae.W_dec)
    for name, bias in sae.stored().weights.items():
        if name in ("b_enc", "b_mag", "b_gate"):
            torch.testing.assert_close(back.stored().weights[name], bias, rtol=0, atol=3e-7)
    assert_same_codes(sae, back.encode, back.decode)


def test_sparsify_and_back(tmp_path):
    sae = random_sae("topk")
    folder = export(sae, tmp_path / "run" / "layers.3", to="sparsify")
    back = SparseAutoencoder.load(folder)
    assert (back.architecture, back.details) == (TopK(K), DETAILS)
    assert_same_codes(sae, back.encode, back.decode)
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["d_in"], cfg["num_latents"], cfg["k"], cfg["transcode"]) == (D, F, K, False)
    stored = load_file(folder / "sae.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "encoder.weight": (F, D),
        "encoder.bias": (F,),
        "W_dec": (F, D),
        "b_dec": (D,),
    }


@pytest.mark.parametrize(
    ("architecture", "to", "message"),
    [
        *((name, "dictionary_learning", f"no class for a {name} SAE.*export to saelens") for name in STATEFUL),
        ("jumprelu", "sparsify", "only topk SAEs and this one is jumprelu"),
        ("hysteresis_topk", "sparsify", "only topk SAEs and this one is hysteresis_topk"),
        ("topk", "onnx", "choose one of saelens, dictionary_learning, sparsify, safetensors"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path, architecture, to, message):
    with pytest.raises(LegatoError, match=message):
        export(random_sae(architecture), tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", EXPORT_FORMATS)
def test_nothing_but_an_sae_is_replaced(tmp_path, to):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LegatoError, match=r"choose another place|give it a name"):
        export(random_sae("topk"), tmp_path, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    save_file({"lm_head": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(LegatoError, match="choose another place"):
        export(random_sae("topk"), tmp_path / "model.safetensors", to=to)
    assert load_file(tmp_path / "model.safetensors").keys() == {"lm_head"}


needs_dictionary_learning = pytest.mark.filterwarnings("default")  # its dependencies warn at import


def opened_by_dictionary_learning(folder):
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed", exc_type=ImportError)
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder), device="cpu")


@needs_dictionary_learning
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("architecture", PLAIN)
def test_dictionary_learning_opens_it_and_computes_the_same(tmp_path, architecture, unit_rows):
    sae = random_sae(architecture, unit_rows=unit_rows)
    theirs, config = opened_by_dictionary_learning(export(sae, tmp_path / "run", to="dictionary_learning"))
    assert_same_codes(sae, theirs.encode, theirs.decode)
    assert (config["trainer"]["lm_name"], config["trainer"]["layer"]) == ("gpt2", 3)
    assert (config["trainer"]["activation_dim"], config["trainer"]["dict_size"]) == (D, F)
    if architecture == "standard":
        assert type(theirs).__name__ == ("AutoEncoder" if unit_rows else "AutoEncoderNew")


@needs_dictionary_learning
@pytest.mark.parametrize(
    ("source", "dict_class"),
    [
        ({"format": "dictionary_learning", "k": K}, "BatchTopKSAE"),
        ({"format": "temporal-saes", "k": K, "group_sizes": [12, 36]}, "MatryoshkaBatchTopKSAE"),
        ({"format": "saelens", "k": float(K), "group_ends": [12, F]}, "MatryoshkaBatchTopKSAE"),
        ({"format": "saelens", "k": 4.5}, "JumpReluAutoEncoder"),  # their k is a whole number
    ],
)
def test_a_batch_budget_goes_back_to_its_class(tmp_path, source, dict_class):
    sae = random_sae("jumprelu", threshold=torch.full((F,), 1.3), details={"source": source})
    folder = export(sae, tmp_path / "run", to="dictionary_learning")
    theirs, config = opened_by_dictionary_learning(folder)
    assert (type(theirs).__name__, config["trainer"]["dict_class"]) == (dict_class, dict_class)
    assert_same_codes(sae, theirs.encode, theirs.decode)
    assert_same_codes(sae, SparseAutoencoder.load(folder).encode, sae.decode)
    if dict_class.startswith("Matryoshka"):
        assert theirs.group_sizes.tolist() == [12, 36]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("architecture", PLAIN + STATEFUL)
def test_saelens_opens_it_and_computes_the_same(tmp_path, architecture):
    SAE = pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError).SAE
    import legato.interop.saelens  # noqa: F401  registers the architectures with state

    sae = random_sae(architecture)
    theirs = SAE.load_from_disk(export(sae, tmp_path / "sae", to="saelens"))
    assert_same_codes(sae, theirs.encode, theirs.decode)
