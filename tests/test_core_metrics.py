"""Core metrics: hand-worked numbers, the splice against plain softmaxes, and errors instead of empty results."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from legato import metrics
from legato.common.errors import LegatoError, UsageError
from legato.data.activations import ActivationBatch
from legato.evaluation.core import splice
from legato.evaluation.core.reconstruction import InputSums, ReconstructionSums, SpliceSums, TokenErrors, splice_metrics
from legato.evaluation.core.splice import TokenLosses, splice_losses
from legato.evaluation.latents.table import read_features, write_features
from legato.evaluation.one_pass import evaluate
from legato.evaluation.sae_sums import SAESums
from legato.sae.architectures import TopK
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.codes import SparseCodes

D, F, L, VOCABULARY = 16, 24, 12, 50
BOS, COMMA = 1, 2


def full(acts_BLD):
    return torch.ones(acts_BLD.shape[:2], dtype=torch.bool)


# --- reconstruction ---------------------------------------------------------------------------------------------------


def test_fvu_by_hand():
    # x = 0, 2, 4 (mean 2, spread 8), reconstructed as 0, 2, 2: error 4, fvu 1/2
    acts_BLD = torch.tensor([[[0.0], [2.0], [4.0]]])
    result = metrics.reconstruction(acts_BLD, torch.tensor([[[0.0], [2.0], [2.0]]]), full(acts_BLD))
    assert result["fvu"] == pytest.approx(0.5)
    assert result["explained_variance"] == pytest.approx(0.5)
    # norms out 0 2 2 over in 0 2 4: mean ratio over all tokens (1 + 1/2) / 3; bias 8 / (4 + 8); cosine 1 of the two
    # tokens that are not zero
    assert result["l2_norm_in"] == pytest.approx(2)
    assert result["l2_norm_out"] == pytest.approx(4 / 3)
    assert result["l2_ratio"] == pytest.approx(0.5)
    assert result["relative_reconstruction_bias"] == pytest.approx(2 / 3)
    assert result["cossim"] == pytest.approx(1)
    assert result["mse"] == pytest.approx(4 / 3)


def test_predicting_the_mean_explains_nothing_and_predicting_the_row_mean_explains_nothing_within_rows():
    # rows 0 2 and 10 12: global mean 6, spread 36 + 16 + 16 + 36 = 104; within rows 1 + 1 + 1 + 1 = 4
    acts_BLD = torch.tensor([[[0.0], [2.0]], [[10.0], [12.0]]])
    mean = metrics.reconstruction(acts_BLD, torch.full_like(acts_BLD, 6), full(acts_BLD))
    assert mean["fvu"] == pytest.approx(1)
    assert mean["explained_variance"] == pytest.approx(0)
    row_mean = metrics.reconstruction(acts_BLD, acts_BLD.mean(1, keepdim=True).expand(2, 2, 1), full(acts_BLD))
    assert row_mean["explained_variance"] == pytest.approx(1 - 4 / 104)
    assert row_mean["explained_variance_within_sequence"] == pytest.approx(0)


def test_positions_that_are_not_valid_do_not_count():
    acts_BLD = torch.tensor([[[1e6], [0.0], [2.0]]])
    mask_BL = torch.tensor([[False, True, True]])
    result = metrics.reconstruction(acts_BLD, torch.tensor([[[0.0], [0.0], [1.0]]]), mask_BL)
    assert result["fvu"] == pytest.approx(1 / 2)


def test_a_zero_reconstruction_is_shrunk_to_nothing_and_has_no_direction():
    acts_BLD = torch.tensor([[[1.0, 0], [0, 1]]])
    result = metrics.reconstruction(acts_BLD, torch.zeros_like(acts_BLD), full(acts_BLD))
    assert result["l2_ratio"] == 0
    assert result["cossim"] is None
    assert result["relative_reconstruction_bias"] is None
    assert result["fvu"] == pytest.approx(2)  # sum ||x||^2 = 2 over spread 1: worse than the mean


def test_activations_that_do_not_vary_are_an_error():
    acts_BLD = torch.ones(1, 3, 2)
    with pytest.raises(LegatoError, match="do not vary"):
        metrics.reconstruction(acts_BLD, acts_BLD, full(acts_BLD))


def test_sums_over_two_ranks_are_the_sums_over_one():
    acts_BLD = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    out_BLD, mask_BL = 0.9 * acts_BLD, torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.8

    def sums(rows):
        inputs, outputs = InputSums.zero(3), ReconstructionSums()
        inputs.add(acts_BLD[rows], mask_BL[rows])
        outputs.add(TokenErrors.of(acts_BLD[rows], out_BLD[rows]), mask_BL[rows])
        return inputs, outputs

    for whole, first, second in zip(sums(slice(None)), sums(slice(0, 2)), sums(slice(2, 6)), strict=True):
        first.merge(second)
        for field in dataclasses.fields(whole):
            np.testing.assert_allclose(getattr(first, field.name), getattr(whole, field.name), rtol=1e-12)


# --- sparsity ---------------------------------------------------------------------------------------------------------


def test_sparsity_by_hand():
    # 4 tokens: latent 0 always on with 2, latent 1 once with 6, latent 2 never: l0 5/4, l1 14/4, dense: both alive ones
    codes_BLF = torch.tensor([[[2.0, 6, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]])
    result = metrics.sparsity(codes_BLF, torch.ones(1, 4, dtype=torch.bool))
    assert (result["l0"], result["l1"]) == (1.25, 3.5)
    assert result["frac_alive"] == pytest.approx(2 / 3)
    assert result["alive_judged_on_tokens"] == 4
    assert result["dense"] == 2
    assert result["density_histogram"]["dead"] == 1
    by_edge = dict(
        zip(result["density_histogram"]["log10_edges"], result["density_histogram"]["latents"], strict=False)
    )
    assert by_edge[-0.25] == 1  # rate 1: log10 = 0
    assert by_edge[-0.75] == 1  # rate 1/4: log10 = -0.602


# --- the language model's loss ----------------------------------------------------------------------------------------


class TinyModel:
    """Unembeds a site directly, with the parts of LanguageModel that evaluation uses."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        self.W_VD = torch.randn(VOCABULARY, D, generator=generator).to(dtype)
        self.tokenizer = SimpleNamespace(pad_token_id=None, eos_token_id=BOS, bos_token_id=BOS)
        self.special_token_ids = {BOS}
        self.resumed = 0

    def resume(self, acts_BLD, tokens_BL, layer, site):
        assert acts_BLD.shape[:2] == tokens_BL.shape
        self.resumed += acts_BLD.shape[0]
        return acts_BLD.cumsum(1)  # what is spliced in at one position is felt at later ones

    def unembed(self, hidden_ND, out=None):
        return hidden_ND.to(self.W_VD.dtype) @ self.W_VD.T


def plain_losses(model, clean_BLD, spliced_BLD, tokens_BL, counted_BL):
    clean, spliced = (
        model.unembed(acts_BLD.cumsum(1)[counted_BL]).double().log_softmax(-1) for acts_BLD in (clean_BLD, spliced_BLD)
    )
    target_N = tokens_BL.roll(-1, 1)[counted_BL]
    return -spliced.gather(1, target_N[:, None])[:, 0], (clean.exp() * (clean - spliced)).sum(-1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_equal_plain_softmaxes(dtype, fused, monkeypatch):
    monkeypatch.setattr(splice, "_is_fused", lambda logits_NV: fused)  # not fused: as on a GPU
    generator = torch.Generator().manual_seed(0)
    model = TinyModel(dtype)
    acts_BLD = torch.randn(20, L, D, generator=generator).to(dtype)
    tokens_BL = torch.randint(0, VOCABULARY, (20, L), generator=generator)
    counted_BL = torch.rand(20, L, generator=generator) < 0.8
    spliced = {"near": (acts_BLD * 0.9).to(dtype), "zero": torch.zeros_like(acts_BLD)}
    clean, losses = splice_losses(model, acts_BLD, tokens_BL, spliced, counted_BL, layer=0, site="resid_post")
    assert clean.ce_N.size > 128  # more than one chunk of tokens
    expected_ce, expected_kl = plain_losses(model, acts_BLD, acts_BLD, tokens_BL, counted_BL)
    np.testing.assert_allclose(clean.ce_N, expected_ce, rtol=1e-5, atol=1e-5)
    for name, spliced_BLD in spliced.items():
        expected_ce, expected_kl = plain_losses(model, acts_BLD, spliced_BLD, tokens_BL, counted_BL)
        np.testing.assert_allclose(losses[name].ce_N, expected_ce, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(losses[name].kl_N, expected_kl, rtol=1e-5, atol=1e-5)
    # zeros give the uniform distribution: every token costs ln 50
    np.testing.assert_allclose(losses["zero"].ce_N, math.log(VOCABULARY), rtol=1e-6)


def test_a_vocabulary_longer_than_a_block_with_extreme_logits():
    # 3,000 logits, one of them 80 above the rest at each end: exp must neither overflow nor lose the tail
    logits_NV = torch.zeros(2, 3000)
    logits_NV[0, 2999] = 80.0
    logits_NV[1] = -200.0
    logits_NV[1, 1500] = -280.0
    model = SimpleNamespace(resume=lambda acts, *_: acts, unembed=lambda hidden_ND, out=None: hidden_ND @ logits_NV)
    acts_BLD = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    tokens_BL = torch.tensor([[0, 0, 1500]])
    counted_BL = torch.tensor([[True, True, False]])
    clean, _ = splice_losses(model, acts_BLD, tokens_BL, {}, counted_BL, layer=0, site="resid_post")
    # 80 + ln(1 + 2999 e^-80) - 0, and ln 2999 + 80 for the one that is 80 below the others
    assert clean.ce_N.tolist() == pytest.approx([80.0, math.log(2999) + 80.0], rel=1e-6)


def test_a_loss_that_is_not_finite_is_an_error():
    model = TinyModel()
    acts_BLD = torch.ones(1, 3, D)
    spliced = {"broken": acts_BLD * math.nan}
    with pytest.raises(LegatoError, match="not finite for broken"):
        splice_losses(model, acts_BLD, torch.zeros(1, 3).long(), spliced, full(acts_BLD), layer=0, site="resid_post")


# --- the whole pass ---------------------------------------------------------------------------------------------------


def sae(k=4, seed=0):
    W_FD = torch.nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(seed)), dim=1)
    return SparseAutoencoder(W_FD.T.clone(), torch.zeros(F), W_FD.clone(), torch.zeros(D), TopK(k))


def batches(n=3, rows=4, outlier=False):
    """BOS at position 0, the last two positions of every row of another document, and, if asked for, one outlier."""
    for number in range(n):
        generator = torch.Generator().manual_seed(number)
        acts_BLD = torch.randn(rows, L, D, generator=generator)
        tokens_BL = torch.randint(3, VOCABULARY, (rows, L), generator=generator)
        tokens_BL[:, 0] = BOS
        mask_BL = tokens_BL != BOS
        if outlier and number == 0:
            acts_BLD[1, 5] *= 40
            mask_BL[1, 5] = False
        doc_BL = (torch.arange(L) >= L - 2).int() + 2 * (torch.arange(rows)[:, None] + rows * number).int()
        yield ActivationBatch(acts_BLD, mask_BL, doc_BL, tokens_BL)


def assert_plain(tree):
    """Only finite plain numbers, strings, None, lists and dicts: what metrics.json may hold."""
    json.dumps(tree, allow_nan=False)


def test_a_bank_gives_each_sae_what_it_gets_alone():
    bank = {"small": sae(k=3), "large": sae(k=8)}
    model = TinyModel()
    together = evaluate(bank, batches(), language_model=model, layer=0, ce_rows=6, lags=(1, 2, 4))
    # one clean pass, one ablation and one splice per SAE over six rows
    assert model.resumed == 6 * (1 + 1 + len(bank))
    for name, one in bank.items():
        alone = evaluate(one, batches(), language_model=TinyModel(), layer=0, ce_rows=6, lags=(1, 2, 4))
        for part in ("core", "consistency", "position"):
            assert_plain(alone[part])
            assert together[name][part] == alone[part]
    assert together["small"]["core"]["l0"] < together["large"]["core"]["l0"]


class Source:
    """All rows as a store hands them out."""

    def __init__(self):
        self.all = list(batches())

    def batches(self, rows_per_batch, *, seed):
        assert seed is None
        whole = {
            field.name: torch.cat([getattr(batch, field.name) for batch in self.all])
            for field in dataclasses.fields(ActivationBatch)
        }
        for start in range(0, len(whole["mask_BL"]), rows_per_batch):
            yield ActivationBatch(**{name: part[start : start + rows_per_batch] for name, part in whole.items()})


def test_how_rows_are_batched_does_not_matter_but_to_saebench():
    seen = []
    together = evaluate(sae(), Source(), language_model=TinyModel(), layer=0, ce_rows=7, lags=(1, 2))
    apart = evaluate(
        sae(), Source(), language_model=TinyModel(), layer=0, ce_rows=7, lags=(1, 2), rows_per_batch=5,
        progress=seen.append,
    )  # fmt: skip
    assert seen == [5, 10, 12, 13]  # rows, then the SAE
    for part in ("core", "consistency", "position"):
        for key, value in together[part].items():
            if isinstance(value, float):
                # The model's float32 logits round by how many rows it is given.
                assert apart[part][key] == pytest.approx(value, rel=1e-7), key
    np.testing.assert_allclose(apart["features"]["ac1"], together["features"]["ac1"], rtol=1e-9)
    np.testing.assert_array_equal(apart["arrays"]["position_matrix"], together["arrays"]["position_matrix"])


def test_losses_count_at_valid_positions_whose_next_token_is_text_of_the_same_document():
    result = evaluate(sae(), batches(n=1, rows=4), language_model=TinyModel(), layer=0)
    # positions 1..11 are valid; 9 ends the first document and 11 the row: 9 of 12 positions in each of 4 rows
    assert result["core"]["ce_tokens"] == 4 * 9
    assert result["core"]["tokens"] == 4 * 11
    core = result["core"]
    expected = (core["ce_loss_with_ablation"] - core["ce_loss_with_sae"]) / (
        core["ce_loss_with_ablation"] - core["ce_loss_without_sae"]
    )
    assert core["ce_loss_score"] == pytest.approx(expected)


def test_splicing_keeps_special_tokens_and_outliers_but_saebench_reconstructs_outliers():
    model = TinyModel()
    batch = next(batches(outlier=True))
    one = sae()
    result = evaluate(one, [batch], language_model=model, layer=0)
    out_BLD = one(batch.acts_BLD)
    ours_BLD = torch.where(batch.mask_BL[..., None], out_BLD, batch.acts_BLD)
    is_text_BL = batch.tokens_BL != BOS
    theirs_BLD = torch.where(is_text_BL[..., None], out_BLD, batch.acts_BLD)
    next_BL = torch.zeros_like(is_text_BL)
    next_BL[:, :-1] = batch.doc_BL[:, 1:] == batch.doc_BL[:, :-1]
    for spliced_BLD, counted_BL, core in (
        (ours_BLD, batch.mask_BL & next_BL, result["core"]),
        (
            theirs_BLD,
            is_text_BL & (torch.arange(L) < L - 1),
            result["core"]["saebench"]["model_performance_preservation"],
        ),
    ):
        ce_N, _ = plain_losses(model, batch.acts_BLD, spliced_BLD, batch.tokens_BL, counted_BL)
        assert core["ce_loss_with_sae"] == pytest.approx(ce_N.mean().item(), rel=1e-5)
    # SAEBench's divergence also counts the last position of a row, which has no next token
    _, kl_N = plain_losses(model, batch.acts_BLD, theirs_BLD, batch.tokens_BL, is_text_BL)
    kl = result["core"]["saebench"]["model_behavior_preservation"]["kl_div_with_sae"]
    assert kl == pytest.approx(kl_N.mean().item(), rel=1e-5)


def test_only_the_first_rows_are_spliced():
    model = TinyModel()
    few = evaluate(sae(), batches(), language_model=model, layer=0, ce_rows=5)
    assert model.resumed == 5 * 3
    assert few["core"]["saebench"]["token_stats"] == {
        "total_tokens_eval_reconstruction": 5 * L,
        "total_tokens_eval_sparsity_variance": 12 * L,
    }


def test_the_feature_table_survives_a_round_trip(tmp_path):
    result = evaluate(sae(k=1), batches(n=1, rows=1))
    features = result["features"]
    assert np.isnan(features["ac1"]).any()  # with so little text some latent never fires
    write_features(tmp_path / "features" / "arm.parquet", features)
    table = read_features(tmp_path / "features" / "arm.parquet")
    assert list(table) == list(features)
    assert table["latent"].tolist() == list(range(F))
    assert table["half_life_censored"].dtype == bool
    for name, values_F in features.items():
        np.testing.assert_allclose(table[name].astype(float), values_F.astype(float), rtol=1e-6, err_msg=name)


def test_arrays_have_the_shapes_they_are_documented_with():
    arrays = evaluate(sae(), batches())["arrays"]
    assert arrays["position_matrix"].shape == (L, L)
    assert arrays["rate_FL"].shape == (F, L)
    assert np.isnan(arrays["rate_FL"][:, 0]).all()  # BOS
    assert arrays["tokens_L"].tolist() == [0, *[12] * (L - 1)]


def test_the_bootstrap_gives_intervals_around_the_means():
    result = evaluate(sae(), batches(n=8), bootstrap=100)
    interval = result["consistency"]["interval95"]
    for name in ("ac1_excess_within", "ac1_excess_cross", "kappa1_excess_within", "kappa1_excess_cross"):
        low, high = interval[name]
        assert low < result["consistency"][name] < high
        assert result["arrays"][f"bootstrap_{name}"].shape == (100,)
    assert (interval["rows"], interval["replicates"]) == (32, 100)
    assert_plain(result["consistency"])


def test_the_sums_about_a_wide_sae_are_small():
    # 65,536 latents, 128 positions, 7 lags, float64: two signals of (2 + 128 + 4 * 7) numbers a latent, and 11 more.
    # Codes, tokens and rows come in batches, so this does not grow with the text, but for 16 bytes a (latent, token).
    judge = SAESums.zero(65_536, 128, (1, 2, 4, 8, 16, 32, 64))
    n_bytes = sum(values.nbytes for values in arrays_of(judge))
    assert n_bytes == pytest.approx(65_536 * 8 * (2 * (2 + 128 + 28) + 11), rel=1e-3)
    assert n_bytes < 0.17 * 2**30


def arrays_of(sums):
    for value in vars(sums).values():
        if isinstance(value, np.ndarray):
            yield value
        elif hasattr(value, "__dict__"):
            yield from arrays_of(value)


def test_splice_scores_by_hand():
    # Clean loss 2, spliced 3, ablated 6: (6 - 3) / (6 - 2). KL .5 of 2: (2 - .5) / 2. Two tokens count for the loss,
    # the first one alone for the divergence.
    losses = [TokenLosses(np.full(2, ce), np.array([kl, 99.0])) for ce, kl in ((2.0, 0.0), (3.0, 0.5), (6.0, 2.0))]
    sums = SpliceSums()
    sums.add(*losses, np.array([True, True]), np.array([True, False]))
    result = splice_metrics(sums)
    assert (result["ce_loss_without_sae"], result["ce_loss_with_sae"], result["ce_loss_with_ablation"]) == (2, 3, 6)
    assert result["ce_loss_score"] == pytest.approx(3 / 4)
    assert result["kl_div_score"] == pytest.approx(3 / 4)
    assert result["ce_tokens"] == 2


def test_splice_scores_without_a_gap_or_a_token_are_no_numbers():
    same = TokenLosses(np.full(1, 2.0), np.zeros(1))
    sums = SpliceSums()
    sums.add(same, same, same, np.array([True]), np.array([True]))
    assert splice_metrics(sums)["ce_loss_score"] is None
    assert splice_metrics(sums)["kl_div_score"] is None
    with pytest.raises(LegatoError, match="no token"):
        splice_metrics(SpliceSums())


class Broken:
    """An SAE whose codes or reconstructions are what a failed training leaves behind."""

    def __init__(self, codes=lambda codes: codes, out=lambda out: out):
        self.inner, self.codes, self.out = sae(), codes, out
        self.W_enc, self.b_enc, self.W_dec = self.inner.W_enc, self.inner.b_enc, self.inner.W_dec

    def encode_sparse(self, batch):
        return self.codes(self.inner.encode_sparse(batch))

    def decode_sparse(self, codes):
        return self.out(self.inner.decode_sparse(codes))


def nothing(codes):
    return SparseCodes(codes.token_P[:0], codes.latent_P[:0], codes.value_P[:0], codes.shape)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Broken(codes=nothing), "arm: no latent fires on any of 132 tokens"),
        (Broken(codes=lambda c: dataclasses.replace(c, value_P=c.value_P * math.nan)), "arm: codes hold values"),
        (Broken(out=lambda out: out * math.nan), "arm: the SAE's reconstruction is not finite"),
    ],
)
def test_an_sae_that_gives_nothing_is_an_error_not_a_result(broken, message):
    with pytest.raises(LegatoError, match=message):
        evaluate({"arm": broken}, batches())


def test_activations_that_cannot_be_judged_are_an_error():
    masked = (dataclasses.replace(batch, mask_BL=batch.mask_BL & False) for batch in batches())
    with pytest.raises(LegatoError, match="no position is valid"):
        evaluate(sae(), masked)
    broken = (dataclasses.replace(batch, acts_BLD=batch.acts_BLD * math.nan) for batch in batches())
    with pytest.raises(LegatoError, match="not finite"):
        evaluate(sae(), broken)
    with pytest.raises(LegatoError, match="no activations"):
        evaluate(sae(), [])
    with pytest.raises(UsageError, match="which layer"):
        evaluate(sae(), batches(), language_model=TinyModel())
    with pytest.raises(UsageError, match="no SAE"):
        evaluate({}, batches())
