import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from legato.common.errors import LegatoError, UsageError
from legato.data.activations import ActivationBatch
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.formats.saelens import read_saelens_folder, write_saelens_folder
from legato.sae.formats.weights import SAEWeights

ROOT = Path(__file__).resolve().parents[1]
D, F, K, RELEASE = 24, 80, 6, 0.4
WINDOW = 4
TAIL = 0.05
ARCHITECTURES = (
    "standard",
    "topk",
    "jumprelu",
    "hysteresis",
    "hysteresis_topk",
    "window_topk",
    "persistent",
    "gated",
)


def random_weights(architecture: str) -> dict:
    """Raw-space weights as a folded normaliser leaves them: activations of norm ~6e3 as Gemma's, unit decoder rows."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    W_dec = torch.nn.functional.normalize(randn(F, D), dim=1)
    weights = {"W_dec": W_dec, "W_enc": W_dec.T.clone() + 0.05 * randn(D, F), "b_dec": 500 * randn(D)}
    if architecture == "gated":
        return weights | {"b_gate": 100 * randn(F), "b_mag": 100 * randn(F), "r_mag": 0.1 * randn(F)}
    weights["b_enc"] = 100 * randn(F)
    if architecture in ("topk", "hysteresis_topk"):
        weights["k"] = K
    if architecture in ("jumprelu", "hysteresis", "window_topk", "persistent"):
        weights["threshold"] = 800 + 100 * randn(F)
    if architecture in ("hysteresis", "hysteresis_topk"):
        weights["release"] = RELEASE
    if architecture == "window_topk":
        weights["window"] = WINDOW
    if architecture == "persistent":
        weights |= {"leak": 0.9 * torch.rand(F, generator=generator), "tail": TAIL}
    return weights


def write_folder(path, architecture, weights, *, apply_b_dec_to_input=True, **beside):
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in weights.items() if name not in tensors and value is not None}
    stored = SAEWeights(
        architecture=architecture, weights=tensors, apply_b_dec_to_input=apply_b_dec_to_input, numbers=numbers
    )
    return write_saelens_folder(path, stored, **beside)


def reference_encode(acts_ND, architecture, weights, apply_b_dec_to_input=True):
    centred_ND = acts_ND - weights["b_dec"] if apply_b_dec_to_input else acts_ND
    if architecture == "gated":
        gate_NF = centred_ND @ weights["W_enc"] + weights["b_gate"] > 0
        return gate_NF * torch.relu(centred_ND @ (weights["W_enc"] * weights["r_mag"].exp()) + weights["b_mag"])
    pre_NF = centred_ND @ weights["W_enc"] + weights["b_enc"]
    if architecture == "topk":
        kth_N1 = pre_NF.sort(dim=1, descending=True).values[:, K - 1 : K]
        return torch.where(pre_NF >= kth_N1, pre_NF, 0.0).relu()
    if architecture == "jumprelu":
        return torch.where(pre_NF > weights["threshold"], pre_NF, 0.0).relu()
    if architecture == "hysteresis_topk":  # the rows are one sequence
        codes_NF, on_F = torch.zeros_like(pre_NF), torch.zeros(F, dtype=torch.bool)
        for code_F, pre_F in zip(codes_NF, pre_NF, strict=True):
            score_F = torch.where(on_F, pre_F / RELEASE, pre_F)
            on_F = (score_F >= score_F.sort(descending=True).values[K - 1]) & (pre_F > 0)
            code_F[on_F] = pre_F[on_F]
        return codes_NF
    if architecture == "persistent":  # the rows are one sequence
        codes_NF, state_F, peak_F = torch.zeros_like(pre_NF), torch.zeros(F), torch.zeros(F)
        for code_F, pre_F in zip(codes_NF, pre_NF, strict=True):
            enters_F = pre_F > weights["threshold"]
            state_F = weights["leak"] * state_F + (1 - weights["leak"]) * pre_F * enters_F
            state_F[~enters_F & (state_F < TAIL * peak_F)] = 0
            peak_F = torch.where(state_F > 0, torch.maximum(peak_F, state_F), 0.0)
            code_F[:] = state_F
        return codes_NF
    if architecture == "window_topk":
        codes_NF = pre_NF.relu()
        for start in range(0, len(codes_NF), WINDOW):
            norm_F = codes_NF[start : start + WINDOW].norm(dim=0)
            codes_NF[start : start + WINDOW, norm_F < weights["threshold"]] = 0
        return codes_NF
    if architecture == "hysteresis":  # the rows are one sequence
        codes_NF, on_F = torch.zeros_like(pre_NF), torch.zeros(F, dtype=torch.bool)
        for code_F, pre_F in zip(codes_NF, pre_NF, strict=True):
            on_F = (pre_F >= weights["threshold"]) | (on_F & (pre_F >= RELEASE * weights["threshold"]))
            code_F[on_F] = pre_F[on_F]
        return codes_NF.relu()
    return pre_NF.relu()


def raw_activations(rows=64):
    return 1200 * torch.randn(rows, D, generator=torch.Generator().manual_seed(1)) + 300


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_written_is_read_back(tmp_path, architecture):
    weights = random_weights(architecture)
    write_folder(
        tmp_path / "sae",
        architecture,
        weights,
        metadata={"model_name": "demo", "hook_name": "model.layers.9"},
        legato={"objective": {"temporal": "contrastive"}},
    )
    folder = read_saelens_folder(tmp_path / "sae")
    assert folder.architecture == architecture
    assert folder.numbers == {name: weights.pop(name) for name in folder.numbers}
    assert folder.apply_b_dec_to_input is True
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["hook_name"] == "model.layers.9"
    assert folder.details == {"objective": {"temporal": "contrastive"}}
    assert folder.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(folder.weights[name], value), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]  # no temporary left


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("default")  # SAELens and its dependencies warn at import
def test_saelens_opens_it_and_computes_the_same(tmp_path, architecture, apply_b_dec_to_input):
    SAE = pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError).SAE
    import legato.interop.saelens  # noqa: F401  registers hysteresis

    weights = random_weights(architecture)
    path = write_folder(tmp_path / "sae", architecture, weights, apply_b_dec_to_input=apply_b_dec_to_input)
    sae = SAE.load_from_disk(path)
    acts_ND = raw_activations()
    with torch.no_grad():
        codes_NF = sae.encode(acts_ND)
        recon_ND = sae.decode(codes_NF)
    expected_NF = reference_encode(acts_ND, architecture, weights, apply_b_dec_to_input)
    assert 0 < (expected_NF > 0).float().mean() < 1
    expected_ND = expected_NF @ weights["W_dec"] + weights["b_dec"]
    assert (codes_NF - expected_NF).abs().max() <= 1e-4 * expected_NF.abs().max()
    assert (recon_ND - expected_ND).abs().max() <= 1e-4 * expected_ND.abs().max()
    assert torch.equal(codes_NF > 0, expected_NF > 0)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_legato_opens_it_and_computes_the_same(tmp_path, architecture, apply_b_dec_to_input):
    weights = random_weights(architecture)
    path = write_folder(tmp_path / "sae", architecture, weights, apply_b_dec_to_input=apply_b_dec_to_input)
    sae = SparseAutoencoder.load(SparseAutoencoder.load(path).save(tmp_path / "again"))
    acts_ND = raw_activations()
    expected_NF = reference_encode(acts_ND, architecture, weights, apply_b_dec_to_input)
    atol = 1e-4 * float(expected_NF.max())
    torch.testing.assert_close(sae.encode(acts_ND), expected_NF, rtol=1e-4, atol=atol)
    one_row = [torch.ones(1, len(acts_ND), dtype=torch.bool), *[torch.zeros(1, len(acts_ND), dtype=torch.long)] * 2]
    sparse_NF = sae.encode_sparse(ActivationBatch(acts_ND[None], *one_row)).dense()[0]
    torch.testing.assert_close(sparse_NF, expected_NF, rtol=1e-4, atol=atol)


@pytest.mark.filterwarnings("default")
def test_hysteresis_opens_in_saelens_and_holds_along_each_sequence(tmp_path):
    SAE = pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError).SAE
    import legato.interop.saelens  # noqa: F401

    path = write_folder(tmp_path / "sae", "hysteresis", random_weights("hysteresis"))
    theirs, ours = SAE.load_from_disk(path), SparseAutoencoder.load(path)
    acts_BLD = raw_activations(rows=64).view(4, 16, D)
    with torch.no_grad():
        codes_BLF = theirs.encode(acts_BLD)
        torch.testing.assert_close(theirs(acts_BLD), ours(acts_BLD), rtol=1e-4, atol=1e-2)
    expected_BLF = ours.encode(acts_BLD)
    assert torch.equal(codes_BLF > 0, expected_BLF > 0)
    torch.testing.assert_close(codes_BLF, expected_BLF, rtol=1e-4, atol=1e-2)
    rows_as_one = ours.encode(acts_BLD.flatten(0, 1)).view_as(expected_BLF)
    assert not torch.equal(rows_as_one > 0, expected_BLF > 0)  # so the state does end with the row
    # SAELens' own save keeps it, release included.
    theirs.save_model(tmp_path / "again")
    assert SparseAutoencoder.load(tmp_path / "again").architecture.release == RELEASE
    # The thresholds follow the decoder norms, as a jumprelu's do.
    doubled = SAE.load_from_disk(path)
    doubled.W_dec.data *= 2
    doubled.fold_W_dec_norm()
    with torch.no_grad():
        torch.testing.assert_close(doubled.encode(acts_BLD), 2 * codes_BLF, rtol=1e-4, atol=1e-2)


def test_legato_does_not_import_saelens():
    check = "import sys, legato.experiment.evaluate; sys.exit('sae_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    "architecture",
    ["standard", "topk", "jumprelu", "hysteresis", "hysteresis_topk", "window_topk", "persistent", "gated"],
)
@pytest.mark.filterwarnings("default")
def test_folder_has_exactly_the_keys_saelens_saves(tmp_path, architecture):
    pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError)
    from sae_lens.registry import get_sae_class
    from safetensors.torch import load_file

    import legato.interop.saelens  # noqa: F401

    sae_class, cfg_class = get_sae_class(architecture)
    own_field = {name: value for name, value in random_weights(architecture).items() if not hasattr(value, "shape")}
    theirs = sae_class(cfg_class(d_in=D, d_sae=F, **own_field))
    theirs.save_model(tmp_path / "theirs")
    write_folder(tmp_path / "ours", architecture, random_weights(architecture))
    cfg = {who: json.loads((tmp_path / who / "cfg.json").read_text()) for who in ("theirs", "ours")}
    assert cfg["ours"].keys() == cfg["theirs"].keys()
    stored = {who: load_file(tmp_path / who / "sae_weights.safetensors") for who in ("theirs", "ours")}
    assert {n: (t.shape, t.dtype) for n, t in stored["ours"].items()} == {
        n: (t.shape, t.dtype) for n, t in stored["theirs"].items()
    }


@pytest.mark.filterwarnings("default")
def test_reads_what_saelens_writes_with_decoder_norms_unfolded(tmp_path):
    pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError)
    from sae_lens.registry import get_sae_class

    sae_class, cfg_class = get_sae_class("topk")
    theirs = sae_class(cfg_class(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=True))
    theirs.save_model(tmp_path / "sae")
    folder = read_saelens_folder(tmp_path / "sae")
    acts_ND = raw_activations()
    codes_NF = reference_encode(acts_ND, "topk", folder.weights)
    with torch.no_grad():
        expected_NF = theirs.encode(acts_ND)
        expected_ND = theirs.decode(expected_NF)
    torch.testing.assert_close(codes_NF, expected_NF, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(codes_NF @ folder.weights["W_dec"], expected_ND, rtol=1e-4, atol=1e-2)


def test_saving_again_replaces_the_whole_folder(tmp_path):
    weights = random_weights("standard")
    write_folder(tmp_path / "sae", "standard", weights, legato={"seed": 1})
    weights["b_dec"] = weights["b_dec"] + 1
    write_folder(tmp_path / "sae", "standard", weights)
    folder = read_saelens_folder(tmp_path / "sae")
    assert torch.equal(folder.weights["b_dec"], weights["b_dec"])
    assert folder.details["source"]["format"] == "saelens"
    assert not (tmp_path / "sae" / "legato.json").exists()


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(LegatoError, match="not a SAE folder"):
        write_folder(tmp_path, "standard", random_weights("standard"))
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("standard", {"b_enc": None}, "missing b_enc"),
        ("standard", {"threshold": torch.ones(F)}, "unexpected threshold"),
        ("topk", {"k": None}, "without a usable k"),
        ("hysteresis", {"release": None}, "above 0 and at most at 1"),
        ("hysteresis", {"release": 1.5}, "above 0 and at most at 1"),
        ("hysteresis_topk", {"k": None}, "without a usable k"),
        ("hysteresis_topk", {"k": F + 1}, "without a usable k"),
        ("window_topk", {"window": 0}, "whole number of tokens"),
        ("persistent", {"tail": 1.0}, "between 0 and 1"),
        ("jumprelu", {"b_dec": torch.zeros(D + 1)}, "b_dec has shape"),
        ("jumprelu", {"threshold": torch.full((F,), torch.nan)}, "not finite"),
        ("matching_pursuit", {}, "choose one of"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, architecture, change, message):
    weights = random_weights(architecture) | change
    with pytest.raises(LegatoError, match=message):
        write_folder(tmp_path / "sae", architecture, weights)
    assert list(tmp_path.iterdir()) == []


def edit_cfg(folder, **change):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_folders_that_cannot_be_reproduced_are_refused(tmp_path):
    def fresh(name):
        return write_folder(tmp_path / name, "standard", random_weights("standard"))

    with pytest.raises(UsageError, match=r"no cfg\.json"):
        read_saelens_folder(tmp_path / "absent")
    for change, message in [
        ({"metadata": {}}, "before version 6"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"reshape_activations": "heads"}, "reshape_activations='heads'"),
        ({"architecture": "temporal"}, "architecture 'temporal'"),
        ({"architecture": "topk"}, "without a usable k"),
        ({"architecture": "hysteresis"}, "missing threshold"),
    ]:
        folder = fresh("changed")
        edit_cfg(folder, **change)
        with pytest.raises(LegatoError, match=message):
            read_saelens_folder(folder)
    for release in (None, 0.0, "high", float("nan")):
        folder = write_folder(tmp_path / "h", "hysteresis", random_weights("hysteresis"))
        edit_cfg(folder, release=release)
        with pytest.raises(LegatoError, match="release must lie above 0"):
            read_saelens_folder(folder)
    folder = fresh("cut")
    whole = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LegatoError, match="damaged"):
        read_saelens_folder(folder)
    folder = fresh("wrong")
    save_file({"W_enc": torch.zeros(D, F)}, folder / "sae_weights.safetensors")
    with pytest.raises(LegatoError, match="missing W_dec"):
        read_saelens_folder(folder)
