"""The causal offset test: hand-worked agreement, models of both kinds of positions, shifts that do not fit."""

import json

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_network, tiny_tokenizer, tiny_tokens

from legato import metrics
from legato.common.errors import UsageError
from legato.data.language_model import LanguageModel
from legato.data.tokens import TokenSet
from legato.evaluation.latents.table import read_features
from legato.evaluation.position.shift_test import Agreement, offset_test
from legato.report.text.latents import offset_lines
from legato.sae.architectures import TopK
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.codes import SparseCodes

D, F = 48, 64


def language_model(architecture, dtype=torch.float32, **overrides):
    return LanguageModel(tiny_network(architecture, **overrides).to(dtype), tiny_tokenizer(), architecture)


def text(rows=5, length=24, doc_BL=None):
    """Rows of one document each that start with BOS."""
    tokens_BL = tiny_tokens(rows, length)
    mask_BL = torch.ones(rows, length, dtype=torch.bool)
    mask_BL[:, 0] = False
    doc_BL = torch.arange(rows)[:, None].expand(rows, length) if doc_BL is None else doc_BL
    return TokenSet(tokens_BL.int(), mask_BL, doc_BL.int(), bos=True)


def random_sae(k=4):
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=-1)
    return SparseAutoencoder(W.T.contiguous(), torch.zeros(F), W, torch.zeros(D), TopK(k))


class Firing:
    """In place of an SAE: latents by rule, and the batches that it was shown."""

    def __init__(self, latent_of):
        self.latent_of = latent_of
        self.seen = []

    def encode_sparse(self, batch):
        self.seen.append(batch)
        B, L = batch.mask_BL.shape
        codes_BLF = torch.zeros(B, L, B * L)
        codes_BLF.scatter_(2, self.latent_of(batch)[..., None], 1.0)
        return SparseCodes.from_dense(codes_BLF * batch.mask_BL[..., None])


def test_agreement_by_hand():
    # Token 0: {0: 3, 1: 4} and {0: 4, 2: 3}: one of three latents; cosine 12 / (5 * 5). Token 1: {2: 1}, {2: 2}: 1, 1.
    # Token 2: silent in both: undefined. Token 3: {0: 1} and nothing: Jaccard 0, no cosine.
    # Latent 0 fires on tokens 0, 3 and on 0: 1/2. Latent 1 on 0 and never: 0. Latent 2 on 1 and on 0, 1: 1/2. Latent 3:
    # never.
    first = torch.tensor([[3.0, 4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])[None]
    second = torch.tensor([[4.0, 0, 3, 0], [0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])[None]
    agreement = Agreement.of(SparseCodes.from_dense(first), SparseCodes.from_dense(second))
    np.testing.assert_allclose(agreement.jaccard_N, [1 / 3, 1, np.nan, 0])
    np.testing.assert_allclose(agreement.cosine_N, [0.48, 1, np.nan, np.nan])
    np.testing.assert_allclose(agreement.jaccard_F, [1 / 2, 0, 1 / 2, np.nan])
    # Without token 0: latents 0 and 1 are left with a firing or none, latent 2 with token 1 alone.
    mask_BL = torch.tensor([[False, True, True, True]])
    jaccard_BL, cosine_BL, jaccard_F = metrics.agreement(first, second, mask_BL)
    np.testing.assert_allclose(jaccard_BL, [[np.nan, 1, np.nan, 0]])
    np.testing.assert_allclose(cosine_BL, [[np.nan, 1, np.nan, np.nan]])
    np.testing.assert_allclose(jaccard_F, [0, np.nan, 1, np.nan])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_shifted_position_ids_do_not_move_a_rotary_model(architecture):
    model = language_model(architecture)
    assert model.positions == "relative"
    section = offset_test({"sae": random_sae()}, model, text(), layer=2)["sae"].section
    still = section["stands_still"]
    assert still["holds"]
    assert 0 < still["movement"] < 1e-5
    for entry in section["position_ids"]:
        assert entry["jaccard"] == pytest.approx(1, abs=0.01)
        assert entry["cosine"] == pytest.approx(1, abs=1e-3)
    assert [entry["shift"] for entry in section["prefix"]] == [1, 8, 32]
    assert all(entry["movement"] > 100 * still["movement"] for entry in section["prefix"])
    assert all(entry["jaccard_null"] < entry["jaccard"] < 1 for entry in section["prefix"])


def test_sixteen_bits_round_within_the_tolerance():
    section = offset_test({"sae": random_sae()}, language_model("llama", torch.bfloat16), text(), layer=2)[
        "sae"
    ].section
    assert section["stands_still"]["holds"]
    assert section["stands_still"]["movement"] > 1e-3  # float32's tolerance would be wrong here


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_learned_positions_move_with_the_position_ids(architecture):
    model = language_model(architecture)
    assert model.positions == "absolute"
    result = offset_test({"sae": random_sae()}, model, text(), layer=2)["sae"]
    assert result.section["stands_still"] is None
    entry = result.section["position_ids"][-1]
    assert entry["movement"] > 0.1
    assert entry["jaccard"] < 0.9
    assert entry["unchanged"] < 1
    # the column is that of the largest shift of position ids
    tokens = text()
    acts = [model.activations(tokens.tokens_BL.long(), 2, first_position=s) for s in (0, 32)]
    on_NF = [(random_sae().encode(x_BLD) > 0)[tokens.mask_BL] for x_BLD in acts]
    both_F, either_F = (on_NF[0] & on_NF[1]).sum(0), (on_NF[0] | on_NF[1]).sum(0)
    np.testing.assert_allclose(result.jaccard_F, np.where(either_F > 0, both_F / either_F.clamp(min=1), np.nan))


def test_a_model_without_position_ids_has_the_prefix_only():
    section = offset_test({"sae": random_sae()}, language_model("bloom"), text(), layer=2)["sae"].section
    assert section["model_positions"] == "fixed"
    assert section["position_ids"] is None
    assert section["stands_still"] is None
    assert section["prefix"][0]["movement"] > 0
    assert len(offset_lines(section)) == 1


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_nothing_moves_at_shift_0(architecture):
    result = offset_test({"sae": random_sae()}, language_model(architecture), text(), layer=2, shifts=[0])["sae"]
    for mode in ("position_ids", "prefix"):
        (entry,) = result.section[mode]
        assert entry["cosine"] == pytest.approx(1)
        assert {**entry, "cosine": None, "jaccard_null": None} == {
            "shift": 0,
            "jaccard": 1,
            "jaccard_null": None,
            "cosine": None,
            "unchanged": 1,
            "movement": 0,
            "variance_moved": 0,
        }
    assert set(result.jaccard_F[np.isfinite(result.jaccard_F)]) == {1.0}


def test_the_null_is_another_token_of_the_same_document():
    # Row 0 holds two documents, the second of a single text token; row 1 one document.
    doc_BL = torch.zeros(2, 12, dtype=torch.int32)
    doc_BL[0, 11], doc_BL[1] = 1, 2
    tokens = text(2, 12, doc_BL)
    by_document = Firing(lambda batch: batch.doc_BL.long())
    by_token = Firing(lambda batch: torch.arange(batch.mask_BL.numel()).view(batch.mask_BL.shape))
    results = offset_test({"doc": by_document, "token": by_token}, language_model("llama"), tokens, layer=1, shifts=[1])
    for name, null in (("doc", 1.0), ("token", 0.0)):
        (entry,) = results[name].section["prefix"]
        assert entry["jaccard"] == entry["cosine"] == entry["unchanged"] == 1
        # The lone token has no other: against nothing its Jaccard is 0, one of 22 text tokens.
        assert entry["jaccard_null"] == pytest.approx(null * 21 / 22)


def test_the_prefix_stands_between_bos_and_the_text():
    model, tokens, sae = language_model("gemma3"), text(), Firing(lambda batch: batch.doc_BL.long())
    offset_test({"sae": sae}, model, tokens, layer=2, shifts=[8])
    own, _, behind = sae.seen  # as it is, by position ids, behind the prefix
    tokens_BL = tokens.tokens_BL.long()
    torch.testing.assert_close(own.acts_BLD, model.activations(tokens_BL, 2))
    # The tiny tokenizer has no line break: the text's most frequent token stands in.
    frequent = tokens_BL[tokens.mask_BL].mode().values
    longer_BL = torch.cat([tokens_BL[:, :1], frequent.expand(5, 8), tokens_BL[:, 1:]], 1)
    torch.testing.assert_close(behind.acts_BLD[:, 1:], model.activations(longer_BL, 2)[:, 9:])
    torch.testing.assert_close(behind.acts_BLD[:, 0], own.acts_BLD[:, 0])


def test_rows_are_cut_to_leave_room_for_the_shift():
    section = offset_test({"sae": random_sae()}, language_model("gpt2"), text(3, 60), layer=1, rows=2)["sae"].section
    assert section["positions"] == 64 - 32
    assert section["rows"] == 2
    assert section["tokens"] == 2 * 31


@pytest.mark.parametrize(("shifts", "message"), [([60], "shift less"), ([], "shifts"), ([-1], "0 or more")])
def test_shifts_that_make_no_sense_are_refused_in_one_line(shifts, message):
    with pytest.raises(UsageError, match=message) as error:
        offset_test({"sae": random_sae()}, language_model("gpt2"), text(), layer=1, shifts=shifts)
    assert "\n" not in str(error.value)


def test_the_lines_say_what_moved_and_when_the_check_fails():
    model = language_model("gpt2")
    section = offset_test({"sae": random_sae()}, model, text(), layer=2)["sae"].section
    ids, prefix = offset_lines(section)
    assert "position ids shifted by 32 tokens" in ids
    assert f"support Jaccard {section['prefix'][-1]['jaccard']:.2f}" in prefix
    model.positions = "relative"  # a model that should stand still, and does not
    section = offset_test({"sae": random_sae()}, model, text(), layer=2)["sae"].section
    assert not section["stands_still"]["holds"]
    assert "MORE THAN ROUNDING" in offset_lines(section)[-1]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"bloom", "opt"}))
@pytest.mark.parametrize("site", ["resid_post", "attn_out"])
def test_shifted_positions_are_those_of_transformers(architecture, site):
    model, tokens_BL = language_model(architecture), tiny_tokens()
    seen = []
    module = model.model.get_submodule(model.module_path(2, site))
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model.model(tokens_BL, position_ids=torch.arange(9, 33)[None], use_cache=False)
    handle.remove()
    torch.testing.assert_close(model.activations(tokens_BL, 2, site, first_position=9), seen[0], rtol=1e-4, atol=1e-4)
    again = model.activations(tokens_BL, 2, site)  # no trace of the shift is left
    assert not torch.equal(again, seen[0])
    torch.testing.assert_close(again, language_model(architecture).activations(tokens_BL, 2, site))


def test_positions_beyond_the_context_are_refused():
    with pytest.raises(UsageError, match="64 positions, not 65"):
        language_model("llama").activations(tiny_tokens(), 1, first_position=41)
    with pytest.raises(UsageError, match="no position ids"):
        language_model("bloom").activations(tiny_tokens(), 1, first_position=1)


def test_a_trained_gpt2_moves(gpt2_mini):
    model = LanguageModel.load(str(gpt2_mini), dtype="float32")
    sentence = model.tokenizer("The history of the city begins with a small settlement on the river.")["input_ids"]
    tokens_BL = torch.tensor([sentence])
    mask_BL, doc_BL = torch.ones_like(tokens_BL, dtype=torch.bool), torch.zeros_like(tokens_BL)
    tokens = TokenSet(tokens_BL.int(), mask_BL, doc_BL.int(), bos=False)
    sae = Firing(lambda batch: batch.doc_BL.long())
    section = offset_test({"sae": sae}, model, tokens, layer=2)["sae"].section
    assert section["model_positions"] == "absolute"
    assert section["position_ids"][-1]["movement"] > 0.02


@pytest.mark.usefixtures("no_pages")
def test_an_experiment_saves_the_test_of_the_arms_it_compares(small):
    assert small.run("--temporal=hysteresis", "--ablation", "--grid=2x0.1") == 0
    metrics = json.loads((small.out_dir / "metrics.json").read_text())
    assert {name for name in metrics if "offset" in metrics[name]} == {"baseline", "hysteresis"}
    section = metrics["hysteresis"]["offset"]
    assert [entry["shift"] for entry in section["position_ids"]] == [1, 8, 32]
    jaccard_F = read_features(small.out_dir / "features" / "hysteresis.parquet")["offset_jaccard"]
    fires_F = np.isfinite(jaccard_F)
    assert fires_F.any()
    unchanged = np.mean(jaccard_F[fires_F] == 1)
    assert section["position_ids"][-1]["unchanged"] == pytest.approx(unchanged)
