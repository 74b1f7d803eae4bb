"""Bootstrap over documents: equal to the metrics on copies of documents, paired by seed, wider with fewer of them."""

import numpy as np
import pytest
import torch

from legato.evaluation.consistency.bootstrap import _weighted_means, bootstrap_documents, document_means, intervals
from legato.evaluation.consistency.groups import add_intervals, dictionary_parts
from legato.evaluation.consistency.persistence import consistency_metrics
from legato.evaluation.sums.accumulators import CodeSums
from legato.evaluation.sums.code_buffer import CodeBuffer, CodedBatch
from legato.evaluation.sums.lag_pairs import LagPairs, pairs_by_latent
from legato.sae.codes import SparseCodes


def rows_of_one_document(B=12, L=9, F=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes_BLF = torch.relu(torch.randn(B, L, F, generator=generator).cumsum(1) - 0.5)
    mask_BL = torch.rand(B, L, generator=generator) < 0.85
    doc_BL = (torch.arange(B) // 2 * 3)[:, None].expand(B, L).int()  # two rows a document
    return codes_BLF * mask_BL[..., None], mask_BL, doc_BL


def keep(codes_BLF, mask_BL, doc_BL):
    kept = CodeBuffer(max_rows=10_000)
    kept.add(CodedBatch(SparseCodes.from_dense(codes_BLF), mask_BL, doc_BL, torch.zeros_like(doc_BL)))
    return kept


def plain(codes_BLF, mask_BL, doc_BL, lag):
    layout = LagPairs.of(mask_BL, doc_BL, (lag,))
    sums = CodeSums.zero(codes_BLF.shape[2], codes_BLF.shape[1], (lag,))
    sums.add(layout, pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout))
    metrics = consistency_metrics(sums)
    return {
        f"{name}{lag}_excess_{null}": metrics[f"{name}_excess_{null}"][0]
        for name in ("ac", "kappa")
        for null in ("within", "cross")
    }


@pytest.mark.parametrize("lag", [1, 3])
def test_a_weight_is_worth_as_many_copies_of_the_document(lag):
    codes_BLF, mask_BL, doc_BL = rows_of_one_document()
    documents, document_N = np.unique(doc_BL.numpy().ravel(), return_inverse=True)
    weights = np.array([[1.0, 2], [1, 0], [1, 3], [1, 1], [1, 0], [1, 1]])
    means = _weighted_means(keep(codes_BLF, mask_BL, doc_BL), lag, weights, document_N)
    for r in range(2):
        copies = [b for b in range(12) for _ in range(int(weights[b // 2, r]))]
        # copies of a document are documents of their own
        own_doc_BL = torch.arange(len(copies))[:, None].expand(-1, 9)
        expected = plain(codes_BLF[copies], mask_BL[copies], own_doc_BL, lag)
        assert {name: values_R[r] for name, values_R in means.items()} == pytest.approx(expected, rel=1e-9)
    assert documents.size == 6


def test_documents_that_share_a_row_are_drawn_apart():
    # a row of two documents, one of them drawn twice and the other not at all, is two rows with the other masked
    codes_BLF, mask_BL, _ = rows_of_one_document(B=4)
    doc_BL = torch.tensor([[0] * 4 + [1] * 5, [2] * 9, [3] * 9, [4] * 9])
    document_N = doc_BL.numpy().ravel()
    weights = np.array([[0.0], [2], [1], [1], [1]])
    means = _weighted_means(keep(codes_BLF, mask_BL, doc_BL), 1, weights, document_N)
    rows = [0, 0, 1, 2, 3]
    mask = mask_BL[rows] & torch.tensor([[False] * 4 + [True] * 5] * 2 + [[True] * 9] * 3)
    expected = plain(codes_BLF[rows] * mask[..., None], mask, doc_BL[rows], 1)
    assert {name: values_R[0] for name, values_R in means.items()} == pytest.approx(expected, rel=1e-9)


def test_replicates_depend_on_the_seed_only_and_pair_saes():
    codes_BLF, mask_BL, doc_BL = rows_of_one_document(B=40)
    first = bootstrap_documents(keep(codes_BLF, mask_BL, doc_BL), replicates=50, seed=3)
    again = bootstrap_documents(keep(codes_BLF, mask_BL, doc_BL), replicates=50, seed=3)
    louder = bootstrap_documents(keep(4 * codes_BLF, mask_BL, doc_BL), replicates=50, seed=3)
    other = bootstrap_documents(keep(codes_BLF, mask_BL, doc_BL), replicates=50, seed=4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name], louder[name])  # same documents, and scale does not matter
        assert (first[name] != other[name]).any()


def test_intervals_cover_the_estimate_and_narrow_with_more_documents():
    widths = []
    for B in (24, 240):
        data = rows_of_one_document(B=B)
        kept = keep(*data)
        interval = intervals(bootstrap_documents(kept, replicates=300), document_means(kept))
        estimate = plain(*data, lag=1)
        low, high = interval["kappa1_excess_cross"]
        assert low < estimate["kappa1_excess_cross"] < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]  # theory: 1 / sqrt(10)


def test_a_population_is_what_its_latents_alone_would_be():
    codes_BLF, mask_BL, doc_BL = rows_of_one_document()
    parts = {"one": [1], "rest": [0, 2, 3, 4], "nobody": []}
    masks = {name: np.isin(np.arange(5), latents) for name, latents in parts.items()}
    found = bootstrap_documents(keep(codes_BLF, mask_BL, doc_BL), replicates=20, populations=masks)
    everything = bootstrap_documents(keep(codes_BLF, mask_BL, doc_BL), replicates=20)
    for name in ("one", "rest"):
        alone = bootstrap_documents(keep(codes_BLF[..., parts[name]], mask_BL, doc_BL), replicates=20)
        for statistic, values_R in alone.items():
            np.testing.assert_allclose(found[f"{name}/{statistic}"], values_R, rtol=1e-12)
    for statistic, values_R in everything.items():
        np.testing.assert_array_equal(found[statistic], values_R)
        # all five fire in every replicate: their mean is 1/5 of the one and 4/5 of the rest
        mixed_R = (found[f"one/{statistic}"] + 4 * found[f"rest/{statistic}"]) / 5
        np.testing.assert_allclose(values_R, mixed_R, rtol=1e-12)
        assert np.isnan(found[f"nobody/{statistic}"]).all()


def test_a_statistic_without_a_value_has_no_interval():
    always_on = keep(torch.ones(2, 4, 1), torch.ones(2, 4, dtype=torch.bool), torch.tensor([[0] * 4, [1] * 4]))
    replicates = bootstrap_documents(always_on, replicates=5)
    assert set(intervals(replicates, document_means(always_on)).values()) == {None}


def test_a_latent_absent_from_a_replicate_is_left_out_of_its_mean():
    # the only latent fires in document 0 alone: replicates without it have no value
    codes_BLF = torch.zeros(3, 6, 1)
    codes_BLF[0, 2:4] = 1
    mask_BL, doc_BL = torch.ones(3, 6, dtype=torch.bool), torch.arange(3)[:, None].expand(3, 6)
    means = _weighted_means(
        keep(codes_BLF, mask_BL, doc_BL), 1, np.array([[1.0, 0], [1, 2], [1, 1]]), doc_BL.numpy().ravel()
    )
    assert np.isfinite(means["kappa1_excess_within"]).tolist() == [True, False]


def test_every_bin_and_group_has_its_interval_and_its_replicates():
    codes_BLF, mask_BL, doc_BL = rows_of_one_document(B=40, F=10)
    codes_BLF[:, :, 7] *= torch.arange(40)[:, None] % 13 == 0  # a rarer latent, in the bin from .01 to .1
    layout = LagPairs.of(mask_BL, doc_BL, (1,))
    sums = CodeSums.zero(10, 9, (1,))
    sums.add(layout, pairs_by_latent(SparseCodes.from_dense(codes_BLF), layout))
    section = consistency_metrics(sums)
    objective = {"d_sae": 10, "groups": [[0.2, 0.2], [1.0, 0.8]], "terms": [{"slow_fraction": 0.5}]}
    drawn = add_intervals(section, keep(codes_BLF, mask_BL, doc_BL), sums, objective, replicates=40)

    assert [row["group"] for row in section["by_group"]] == [[0, 1], [2, 4], [5, 9]]
    weights = [row["latents"] * row["kappa1_excess_within"] for row in section["by_group"]]
    assert sum(weights) / 10 == pytest.approx(section["kappa1_excess_within"])
    for row in (*section["by_group"], *section["by_rate_bin"][-2:], section):
        low, high = row["interval95"]["ac1_excess_cross"]
        assert low < row.get("ac1_excess_cross", row.get("ac_excess_cross", [None])[0]) < high
    assert section["by_rate_bin"][0]["interval95"]["kappa1_excess_within"] is None  # no latent is that rare
    one, nine = (drawn[f"{key}/kappa1_excess_within"] for key in ("0.01-0.1", "0.1-1"))
    both = np.where(np.isnan(one), nine, (one + 9 * nine) / 10)  # it is absent from some replicates
    np.testing.assert_allclose(drawn["kappa1_excess_within"], both, rtol=1e-9)
    assert {"latents 2 to 4/0.1-1/ac1_excess_within", "latents 5 to 9/ac1_excess_cross"} < drawn.keys()


def test_an_ordinary_sae_has_no_groups():
    assert dictionary_parts({}) == {}
    assert dictionary_parts({"d_sae": 10, "groups": [[1.0, 1.0]], "terms": [{"slow_fraction": 1.0}]}) == {}


def test_intervals_lie_about_the_mean_wherever_the_replicates_lie():
    replicates = {"kappa1_excess_within": np.array([0.1, 0.2, 0.3])}  # about .2, by quantiles .105 to .295
    found = intervals(replicates, {"kappa1_excess_within": 0.5})
    np.testing.assert_allclose(found["kappa1_excess_within"], [0.405, 0.595])
