"""Specialisation: planted kinds are found and named, no structure is called none, too few latents are said to be."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from legato.evaluation.latents.table import read_features, write_features
from legato.evaluation.specialisation.clustering import Candidate, Scaler, agreement, choose, cluster
from legato.evaluation.specialisation.descriptors import name_of
from legato.evaluation.specialisation.kinds import specialise
from legato.report.text.latents import specialisation_lines

N_TOKENS = 100_000
# density, kappa1, kappa4, kappa16, half-life, eta2, token mi, document eta2, burstiness, magnitude
KINDS = {
    "token": (0.003, 0.02, 0.01, 0.00, 0.6, 0.00, 0.90, 0.01, 0.0, 2.0),
    "positional": (0.010, 0.02, 0.01, 0.01, 0.7, 0.80, 0.20, 0.03, -0.3, 8.0),
    "phrase": (0.005, 0.60, 0.10, 0.01, 2.5, 0.01, 0.30, 0.05, 0.3, 3.0),
    "passage": (0.015, 0.80, 0.70, 0.40, 20.0, 0.02, 0.10, 0.60, 0.1, 2.5),
    "dense": (0.400, 0.30, 0.25, 0.03, 1.5, 0.05, 0.05, 0.10, -0.1, 20.0),
}
COLUMNS = (
    "density", "kappa1", "kappa4", "kappa16", "half_life", "eta2", "token_mi_adjusted", "document_eta2",
    "burstiness_excess_within", "mean_activation",
)  # fmt: skip


def table_of(values_FX):
    """A feature table; its last columns hold the tokens of the examples."""
    table = {name: np.array(values_FX[:, x], np.float64) for x, name in enumerate(COLUMNS)}
    F = len(values_FX)
    table["top_token"] = np.arange(F, dtype=np.float64)
    table["top_token2"] = np.arange(F, dtype=np.float64) + 1
    table["top_token3"] = np.full(F, np.nan)
    table["top_token_share"] = np.full(F, 0.5)
    return table


def planted(per_kind=60, seed=0):
    """(table, index into KINDS of each latent): every descriptor within some 5 % of its kind's."""
    rng = np.random.default_rng(seed)
    truth_F = np.repeat(np.arange(len(KINDS)), per_kind)
    centre_FX = np.array(list(KINDS.values()))[truth_F]
    noise_FX = rng.normal(0, 0.05, centre_FX.shape)
    return table_of(centre_FX * (1 + noise_FX) + 0.002 * noise_FX), truth_F


def unstructured(F=600, seed=0):
    rng = np.random.default_rng(seed)
    z_FX = rng.normal(size=(F, len(COLUMNS)))
    values_FX = 0.3 + 0.05 * z_FX
    values_FX[:, 0] = 10 ** (-2 + 0.2 * z_FX[:, 0])
    return table_of(values_FX)


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


# --- planted kinds ----------------------------------------------------------------------------------------------------


def test_planted_kinds_are_found_and_named():
    table, truth_F = planted()
    result = specialise({"sae": table}, N_TOKENS)["sae"]
    section = result.section
    assert section["k"] == 5
    assert adjusted_rand_score(truth_F, result.columns["cluster"].astype(int)) == pytest.approx(1)
    assert result.columns["cluster_name"].tolist() == np.array(list(KINDS))[truth_F].tolist()
    assert section["silhouette"] > 0.7 > 0.3 > section["silhouette_null"]
    assert section["ari"]["bootstrap"] > 0.98
    assert section["ari"]["clusterer_seeds"] == pytest.approx(1)
    assert section["ari"]["sae_seeds"] is None
    assert {name: share["latents"] for name, share in section["by_name"].items()} == {
        **dict.fromkeys(KINDS, 60),
        "unspecific": 0,
    }
    assert section["by_latent"] == section["by_name"]
    # density-weighted: .4 of .003 + .010 + .005 + .015 + .4 = .433, up to the noise
    assert section["by_name"]["dense"]["share_of_firing"] == pytest.approx(0.4 / 0.433, abs=0.01)
    dense = next(one for one in section["clusters"] if one["name"] == "dense")
    assert dense["centroid"]["kappa1"] == pytest.approx(0.3, abs=0.01)
    assert dense["centroid"]["log10_density"] == pytest.approx(math.log10(0.4), abs=0.01)
    assert [truth_F[one["latent"]] for one in dense["examples"]] == [4] * 5
    json.dumps(section, allow_nan=False)


def test_kinds_lie_apart_on_the_map_which_is_the_same_every_time():
    table, truth_F = planted()
    one, again = (specialise({"sae": table}, N_TOKENS, seed=3)["sae"] for _ in range(2))
    assert one.section == again.section
    for name in ("cluster", "map_x", "map_y"):
        np.testing.assert_array_equal(one.columns[name], again.columns[name])
    xy_F2 = np.column_stack([one.columns["map_x"], one.columns["map_y"]])
    centres = np.array([xy_F2[truth_F == kind].mean(0) for kind in range(5)])
    spread = max(xy_F2[truth_F == kind].std() - centres[kind].std() for kind in range(5))
    nearest = min(np.linalg.norm(centres[a] - centres[b]) for a in range(5) for b in range(a))
    assert nearest > 2 * spread


def test_two_saes_share_their_clusters_so_shares_compare():
    few, many = planted(40, seed=1), planted(80, seed=2)
    phrases = many[1] != 2  # the second SAE has no phrase latents
    tables = {"a": few[0], "b": {name: values_F[phrases] for name, values_F in many[0].items()}}
    results = specialise(tables, N_TOKENS, same_recipe=[["a", "b", "not judged"], ["a"]])
    a, b = (results[name].section for name in "ab")
    assert a["k"] == b["k"] == 5
    assert [one["name"] for one in a["clusters"]] == [one["name"] for one in b["clusters"]]
    assert a["by_name"]["phrase"]["share_of_latents"] == pytest.approx(1 / 5)
    assert b["by_name"]["phrase"]["latents"] == 0
    empty = next(one for one in b["clusters"] if one["name"] == "phrase")
    assert (empty["centroid"], empty["examples"]) == (None, [])
    assert -1 <= a["ari"]["sae_seeds"] <= 1


def test_saes_of_one_recipe_agree():
    tables = {"s": planted(seed=1)[0], "s_seed1": planted(seed=2)[0]}
    section = specialise(tables, N_TOKENS, same_recipe=[list(tables)])["s"].section
    assert section["ari"]["sae_seeds"] > 0.98


def test_agreement_is_about_the_same_values_not_only_the_same_groups():
    rng = np.random.default_rng(0)
    first_MX, second_MX = (
        np.repeat([[0.0, 1], [8, 1], [0, 9], [8, 9]], 30, axis=0) + rng.normal(0, 0.1, (120, 2)) for _ in range(2)
    )
    assert agreement(first_MX, second_MX, 4) == pytest.approx(1)
    # a hundred further on, all latents of one lie in a single cluster of the other: ARI 0
    assert agreement(first_MX, second_MX + 100, 4) == pytest.approx(0)


def test_examples_show_their_tokens():
    section = specialise({"sae": planted()[0]}, N_TOKENS, decode=lambda token: f"<{token}>")["sae"].section
    example = section["clusters"][0]["examples"][0]
    latent = example["latent"]
    assert example["tokens"] == [f"<{latent}>", f"<{latent + 1}>"]
    assert example["top_token_share"] == 0.5


# --- the naming rule --------------------------------------------------------------------------------------------------


def test_the_rule_that_names():
    token = {"log10_density": -2.5, "eta2": 0.0, "kappa16": 0.0, "kappa1": 0.05, "token_mi": 0.6}
    assert name_of(token) == "token"
    assert name_of(token | {"token_mi": 0.24}) == "unspecific"
    assert name_of(token | {"kappa1": 0.2}) == "phrase"
    assert name_of(token | {"kappa1": 0.2, "kappa16": 0.05}) == "passage"
    assert name_of(token | {"kappa16": 0.05, "eta2": 0.1}) == "positional"
    assert name_of(token | {"eta2": 0.1, "log10_density": math.log10(0.11)}) == "dense"
    assert name_of({"kappa1": 0.3}) == "phrase"  # what a short context leaves undefined decides nothing
    assert name_of({}) == "unspecific"


# --- no structure, and how k is chosen --------------------------------------------------------------------------------


def test_without_structure_the_silhouette_is_about_that_of_permuted_columns():
    section = specialise({"sae": unstructured()}, N_TOKENS)["sae"].section
    assert section["silhouette"] == pytest.approx(section["silhouette_null"], abs=0.02)
    assert section["ari"]["bootstrap"] < 0.6
    assert [one["k"] for one in section["by_k"]] == list(range(2, 11))
    assert all(-1 <= one["ari"] <= 1 and -1 <= one["silhouette"] <= 1 for one in section["by_k"])
    assert section["ari"]["bootstrap_min"] <= section["ari"]["bootstrap"]
    assert "a continuum more than groups" in specialisation_lines(section)[2]


def test_k_is_the_smallest_stable_one_that_is_nearly_the_best():
    def candidates(*rows):
        return [Candidate(k, silhouette, 0.1, ari) for k, silhouette, ari in rows]

    assert choose(candidates((2, 0.9, 1.0), (4, 0.3, 0.9), (5, 0.5, 0.9), (6, 0.51, 0.9))) == 5
    assert choose(candidates((4, 0.3, 0.9), (5, 0.5, 0.7))) == 4  # 5 is not stable
    assert choose(candidates((4, 0.3, 0.1), (5, 0.5, 0.7))) == 5  # nothing is
    assert choose(candidates((4, 0.05, 0.9), (5, 0.06, 0.9))) == 5  # all below the null: the best of them


def test_standardisation_by_hand():
    # 1 2 3 4 100: median 3, quartiles 2 and 4: (x - 3) / (2 / 1.349), the outlier clipped to 3; a column whose middle
    # half is equal is measured by its standard deviation, 0.4; a constant one stays 0
    values_MX = np.array([[1, 0, 7], [2, 0, 7], [3, 0, 7], [4, 0, 7], [100, 1, 7]], np.float64)
    scaled_MX = Scaler.fit(values_MX).apply(values_MX)
    np.testing.assert_allclose(scaled_MX[:, 0], [-1.349, -0.6745, 0, 0.6745, 3])
    np.testing.assert_allclose(scaled_MX[:, 1], [0, 0, 0, 0, 2.5])
    np.testing.assert_allclose(scaled_MX[:, 2], 0)


def test_all_latents_are_assigned_where_only_some_are_fitted(monkeypatch):
    monkeypatch.setattr("legato.evaluation.specialisation.kinds.FIT_LATENTS", 150)
    table, truth_F = planted()
    result = specialise({"sae": table}, N_TOKENS)["sae"]
    assert result.section["fitted_on"]["latents"] == 150
    assert adjusted_rand_score(truth_F, result.columns["cluster"].astype(int)) == pytest.approx(1)


def test_the_largest_cluster_comes_first():
    rng = np.random.default_rng(0)
    centre = np.repeat([0.0, 5, 10, 15], [20, 80, 40, 60])
    values_MX = np.column_stack([centre, -centre]) + rng.normal(0, 0.1, (200, 2))
    clustering = cluster(values_MX)
    assert np.bincount(clustering.predict(values_MX)).tolist() == [80, 60, 40, 20]


# --- what cannot be clustered -----------------------------------------------------------------------------------------


def test_latents_that_are_silent_rare_or_always_on_stay_out():
    table, _ = planted()
    table["density"][:10] = 0
    table["density"][10:20] = 19 / N_TOKENS  # 20 firings are asked for
    table["density"][20:30] = 20 / N_TOKENS
    table["kappa1"][30:32] = np.nan  # always on
    table["burstiness_excess_within"][40:45] = np.nan  # never twice in a document
    result = specialise({"sae": table}, N_TOKENS)["sae"]
    outside_F = np.isnan(result.columns["cluster"])
    assert np.flatnonzero(outside_F).tolist() == [*range(20), 30, 31]
    assert all(name is None for name in result.columns["cluster_name"][outside_F])
    assert (result.section["latents"], result.section["left_out"]) == (278, 12)  # ten of the 22 never fire
    assert np.isnan(result.columns["map_x"]).tolist() == outside_F.tolist()


def test_a_lag_longer_than_the_context_is_left_out_of_the_descriptors():
    table, truth_F = planted()
    table["kappa16"][:] = np.nan
    result = specialise({"sae": table}, N_TOKENS)["sae"]
    assert result.section["undefined_descriptors"] == ["kappa16"]
    assert "kappa16" not in result.section["clusters"][0]["centroid"]
    assert adjusted_rand_score(truth_F, result.columns["cluster"].astype(int)) == pytest.approx(1)


@pytest.mark.parametrize("case", ["few", "silent", "alike", "unmeasured"])
def test_too_few_latents_give_a_note_and_no_clusters(case):
    table, _ = planted(per_kind=6 if case == "few" else 20)
    tables = {"sae": table}
    if case == "silent":
        table["density"][:] = 0
        for name in COLUMNS[1:]:
            table[name][:] = np.nan
    if case == "alike":
        for name in COLUMNS:
            table[name][:] = table[name][0]
    if case == "unmeasured":
        table["density"][:60] = 0
        del table["kappa16"]
    for name, result in specialise(tables, N_TOKENS).items():
        assert "judge on more text" in result.section["note"]
        assert result.section["clusters"] == []
        assert specialisation_lines(result.section) == [f"Kinds of latents: {result.section['note']}."]
        assert np.isnan(result.columns["cluster"]).all()
        assert result.columns["map_x"].shape == tables[name]["density"].shape
        json.dumps(result.section, allow_nan=False)


def test_an_sae_with_too_few_latents_does_not_keep_the_others_from_clusters():
    tables = {"sae": planted()[0], "collapsed": planted(per_kind=2)[0]}
    results = specialise(tables, N_TOKENS, same_recipe=[list(tables)])
    alone = specialise({"sae": tables["sae"]}, N_TOKENS)["sae"]
    assert results["sae"].section == alone.section
    assert results["collapsed"].section["note"].startswith("no clusters: 10 latents fire 20 times")


# --- what is written --------------------------------------------------------------------------------------------------


def test_columns_are_written_with_nulls(tmp_path):
    table, _ = planted()
    table["density"][:3] = 0
    table["top_token"][:3] = np.nan
    result = specialise({"sae": table}, N_TOKENS)["sae"]
    write_features(tmp_path / "sae.parquet", {**table, **result.columns})
    read = read_features(tmp_path / "sae.parquet")
    np.testing.assert_array_equal(read["cluster"], result.columns["cluster"])
    np.testing.assert_array_equal(read["top_token"], table["top_token"])
    assert read["cluster_name"].tolist() == result.columns["cluster_name"].tolist()
    np.testing.assert_allclose(read["map_x"], result.columns["map_x"], rtol=1e-6)


def test_the_section_in_words():
    tables = {"s": planted(seed=1)[0], "s_seed1": planted(seed=2)[0]}
    section = specialise(tables, N_TOKENS, same_recipe=[list(tables)])["s"].section
    first, second, third = specialisation_lines(section)
    assert first.startswith("Kinds of latents (300 that fire 20 times or more, 100% of all firing)")
    assert "phrase 20.0%" in first
    assert "unspecific" not in first
    assert "phrase 20.0%" in second
    assert third.startswith("5 clusters, silhouette 0.")
    assert "groups apart" in third
    assert "between SAEs of different seeds" in third
    assert all(not isinstance(leaf, float) or math.isfinite(leaf) for leaf in leaves(section))


def test_a_run_saves_the_kinds_of_its_latents(small):
    assert small.run("--eval_rows=64", "--k=8", "--held_out=0.5") == 0
    section = json.loads((small.out_dir / "metrics.json").read_text())["baseline"]["specialisation"]
    table = read_features(small.out_dir / "features" / "baseline.parquet")
    assert section["note"] is None
    assert section["latents"] == np.isfinite(table["cluster"]).sum() >= 50
    assert section["undefined_descriptors"] == ["kappa16"]  # contexts of 16 tokens
    assert all(len(one["tokens"]) == 3 for kind in section["clusters"] for one in kind["examples"])
