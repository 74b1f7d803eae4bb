"""What the feature browser's page carries: unpacked again, against what the run saved."""

import base64
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from legato.common.errors import LegatoError
from legato.evaluation.latents.examples import OtherSAE, write_strips, write_text
from legato.evaluation.latents.examples import ShownText as TextToSave
from legato.evaluation.latents.logits import TopLogits
from legato.evaluation.latents.table import write_features
from legato.report.browser import data as browser_data
from legato.report.browser.columns import described
from legato.report.browser.data import BrowsedArm, Words, browser_section, pack_arm
from legato.report.browser.pack import Pack, gaps
from legato.report.browser.showcase import showcase
from legato.report.browser.tables import ShownText, StripTable
from legato.report.figures.plot import MissingResult
from legato.results.saved_run import Arm, SavedRun
from legato.sae.kernels.pairs import PairsByLatent

HOSTILE = ["</script><script>alert(1)</script>", "\u202eevil", "🏴\u200d☠️", "x" * 5000, "\n", "<!--", "&amp;", "\x00"]
ROWS, LENGTH, LATENTS = 4, 40, 6


def take_apart(packed: bytes, header: dict[str, Any]) -> dict[str, np.ndarray]:
    """As unpack.js does it."""
    data, at, found = np.frombuffer(gzip.decompress(packed), np.uint8), 0, {}
    for name, entry in header.items():
        width, size = int(entry["kind"][1]), entry["size"]
        planes = data[at : at + width * size].reshape(width, size)
        at += width * size
        word = sum(plane.astype(np.int64) << 8 * place for place, plane in enumerate(planes))
        if entry["kind"] == "f2":
            found[name] = word.astype(np.uint16).view(np.float16).astype(float) * entry["scale"]
        elif entry["kind"] == "i2":
            signed = word.astype(np.uint16).view(np.int16)
            found[name] = np.where(signed == -32768, np.nan, signed * entry["scale"])
        else:
            found[name] = np.where((width > 1) & (word == 256**width - 1), -1, word)
    assert at == data.size
    return found


def ungapped(bytes_of_gaps: np.ndarray, count_F: np.ndarray) -> list[list[int]]:
    numbers, gap, shift = [], 0, 0
    for byte in bytes_of_gaps.tolist():
        gap, shift = gap | (byte & 127) << shift, shift + 7
        if byte < 128:
            numbers.append(gap)
            gap = shift = 0
    parts = np.split(np.array(numbers, int), np.cumsum(count_F)[:-1])
    return [np.cumsum(part).tolist() for part in parts]


def islands(markup: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """meta, the text's arrays, and the arrays of each arm by name."""
    packed = {
        name: base64.b64decode(content)
        for name, content in re.findall(r'id="(browser-[^"]+)">([^<]*)</script>', markup)
    }
    meta = json.loads(gzip.decompress(packed["browser-meta"]))
    arms = {
        arm["name"]: take_apart(packed[f"browser-arm-{number}"], arm["arrays"])
        for number, arm in enumerate(meta["arms"])
    }
    return meta, take_apart(packed["browser-text"], meta["text"]), arms


def some_order(seed: int) -> PairsByLatent:
    rng = np.random.default_rng(seed)
    tokens = [np.flatnonzero(rng.random(ROWS * LENGTH) < 0.3) for _ in range(LATENTS - 1)]
    start_F = np.cumsum([0, *map(len, tokens), 0])  # the last latent is dead
    token_P = np.concatenate(tokens).astype(np.int32)
    values_P = rng.uniform(1, 50, token_P.size).astype(np.float32)
    return PairsByLatent(start_F, token_P, values_P, np.arange(token_P.size))


def some_features(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns = {
        name: rng.uniform(-0.2, 0.9, LATENTS)
        for name in ("kappa1", "kappa1_within_null", "kappa1_cross_null", "kappa1_excess_cross", "eta2", "half_life")
    }
    columns["kappa1_excess_within"] = columns["kappa1"] - columns["kappa1_within_null"]
    columns["density"] = rng.uniform(1e-5, 0.3, LATENTS)
    columns["density"][-1] = 0
    columns["eta2"][-1] = np.nan
    names = np.array(["token", "passage", "token", None, "phrase", None], object)
    return {
        "latent": np.arange(LATENTS),
        **columns,
        "top_token": np.arange(LATENTS).astype(float),
        "cluster_name": names,
    }


def save_run(folder: Path, arms: tuple[str, ...] = ("baseline", "legato")) -> SavedRun:
    """A run with passages, whose text is as hostile as text gets."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({arm: {"core": {}} for arm in arms}))
    shape = (ROWS, LENGTH)
    text = TextToSave(
        np.arange(ROWS * LENGTH).reshape(shape) % len(HOSTILE), np.zeros(shape, int), np.ones(shape, bool)
    )
    write_text(folder / "strips/tokens.parquet", text, lambda ids: [HOSTILE[i] for i in ids])
    W_dec = {arm: torch.randn(LATENTS, 8, generator=torch.Generator().manual_seed(n)) for n, arm in enumerate(arms)}
    alive = np.arange(LATENTS) < LATENTS - 1
    z = np.ones((LATENTS, 2), np.float32)
    for number, arm in enumerate(arms):
        partners = [other for other in arms if other != arm and "baseline" in (arm, other)]
        write_features(folder / f"features/{arm}.parquet", some_features(number))
        write_strips(
            folder / f"strips/{arm}.parquet",
            some_order(number),
            text,
            W_dec[arm],
            others={other: OtherSAE(W_dec[other], alive) for other in partners},
            logits=TopLogits([HOSTILE[:2]] * LATENTS, 2 * z, [HOSTILE[2:4]] * LATENTS, -3 * z),
        )
    return SavedRun.open(folder)


def test_numbers_come_back_within_what_they_were_packed_to() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([10 ** rng.uniform(-5, 3, 500), -(10 ** rng.uniform(-3, 3, 50)), [np.nan, 0.0]])
    pack = Pack()
    pack.add_floats("f", values)
    pack.add_fixed("i", np.array([0.1234, -1.0, np.nan]))
    pack.add_indices("u", np.array([0, 5, -1]))
    pack.add_indices("w", np.array([70_000, -1]))
    pack.add_bytes("b", np.array([0, 255]))
    found = take_apart(pack.packed(), pack.header)
    np.testing.assert_allclose(found["f"], values, rtol=4e-3, equal_nan=True)
    np.testing.assert_allclose(found["i"], [0.1234, -1.0, np.nan], atol=1e-4, equal_nan=True)
    assert (found["u"].tolist(), found["w"].tolist(), found["b"].tolist()) == ([0, 5, -1], [70_000, -1], [0, 255])


def test_columns_without_a_number_can_be_packed() -> None:
    pack = Pack()
    pack.add_floats("nothing", np.full(3, np.nan))
    pack.add_floats("zero", np.zeros(3))
    found = take_apart(pack.packed(), pack.header)
    assert np.isnan(found["nothing"]).all()
    assert (found["zero"] == 0).all()


def test_positions_come_back_from_their_gaps() -> None:
    firings = [[0, 1, 130, 65_535], [], [7], [16_384]]
    start = np.cumsum([0, *map(len, firings)])
    packed = gaps(start, np.concatenate([np.array(one, np.int32) for one in firings]))
    assert packed.tolist()[:4] == [0, 1, 129, 1]  # 129 = 1 + 128: one of 128 more follows
    assert ungapped(packed, np.diff(start)) == firings


def test_the_page_carries_every_firing_and_every_column(tmp_path: Path) -> None:
    run = save_run(tmp_path)
    section = browser_section(run)
    assert not isinstance(section, MissingResult)
    meta, text, arms = islands(section)
    assert meta["whole"]
    assert [arm["name"] for arm in meta["arms"]] == ["baseline", "legato"]
    words = meta["words"]
    assert [words[word] for word in text["word"][: len(HOSTILE)]] == HOSTILE
    for number, name in enumerate(("baseline", "legato")):
        order, features, arrays = some_order(number), some_features(number), arms[name]
        saved = [part.tolist() for part in np.split(order.token_Q, order.ptr_F[1:-1])]
        assert ungapped(arrays["gaps"], arrays["count"]) == saved
        largest = np.repeat(arrays["largest"], arrays["count"])
        np.testing.assert_allclose((arrays["values"] + 1) / 32 * largest, order.value_Q, atol=50 / 32 + 0.1)
        np.testing.assert_allclose(arrays["density"], features["density"], rtol=4e-3)
        np.testing.assert_allclose(arrays["kappa1"], features["kappa1"], atol=2e-4)
        assert np.isnan(arrays["eta2"][-1])
        assert "kappa1_excess_within" not in arrays
        made = {column["name"]: column.get("less") for column in meta["arms"][number]["columns"]}
        assert made["kappa1_excess_within"] == ["kappa1", "kappa1_within_null"]
        hold = np.minimum(features["kappa1_excess_within"], features["kappa1_excess_cross"])
        np.testing.assert_allclose(arrays["kappa1_hold"], hold, atol=2e-4)
        kinds = [None if kind < 0 else meta["kinds"][kind] for kind in arrays["cluster_name"]]
        assert kinds == features["cluster_name"].tolist()
        assert [words[word] for word in arrays["promoted"][:2]] == HOSTILE[:2]
        assert arrays["suppressed_z"][0] == 30
        assert words[arrays["top_tokens"][3]] == HOSTILE[3]


def test_a_latents_gain_is_over_its_match_if_that_is_like_it(tmp_path: Path) -> None:
    meta, _, arms = islands(str(browser_section(save_run(tmp_path))))
    match, cosine = arms["legato"]["match0"], arms["legato"]["match_cosine0"]
    own, theirs = some_features(1)["kappa1_excess_within"], some_features(0)["kappa1_excess_within"]
    expected = np.where(cosine >= 0.5, own - theirs[match], np.nan)
    assert 0 < np.isfinite(expected).sum() < LATENTS - 1
    np.testing.assert_allclose(arms["legato"]["kappa1_gain"], expected, atol=2e-4)
    assert match[-1] == -1
    assert "kappa1_gain" not in arms["baseline"]
    assert meta["loose_match"] == 0.5


def test_no_string_of_the_corpus_stands_in_the_markup(tmp_path: Path) -> None:
    section = str(browser_section(save_run(tmp_path)))
    assert not any(piece in section for piece in HOSTILE if len(piece) > 1 and piece != "<!--")
    assert section.count("<!--") == 0
    assert section.lower().count("<script") == section.lower().count("</script")


def test_what_is_too_large_carries_the_passages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path, ("baseline", "legato", "tsae"))
    whole = islands(str(browser_section(run)))
    monkeypatch.setattr(browser_data, "MOST_BYTES", 1)
    monkeypatch.setattr(browser_data, "WINDOW", 4)
    monkeypatch.setattr(browser_data, "BEFORE", 1)
    meta, _, arms = islands(str(browser_section(run)))
    assert not meta["whole"]
    assert (list(arms), meta["left_out"]) == (["baseline", "legato"], ["tsae"])
    table = StripTable.read(tmp_path / "strips/legato.parquet")
    base = StripTable.read(tmp_path / "strips/baseline.parquet")
    for latent in range(LATENTS):
        every, kept = (
            set(ungapped(one[2]["legato"]["gaps"], one[2]["legato"]["count"])[latent]) for one in (whole, (0, 0, arms))
        )
        shown = {c for centres in table.centres.values() for c in centres[latent] if c >= 0}
        matched = np.flatnonzero(base.matches["legato"][0] == latent)
        shown |= {c for centres in base.centres.values() for c in centres[matched].ravel() if c >= 0}
        near = {c + d for c in shown for d in (-1, 0, 1, 2) if c + d >= c // LENGTH * LENGTH}
        near |= {c + 3 for c in shown if c % LENGTH == 0}
        assert kept == every & near
        assert arms["legato"]["firings"][latent] == len(every)


def test_more_arms_are_added_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path, ("baseline", "legato", "tsae", "topk"))
    assert len(islands(str(browser_section(run)))[2]) == 4
    sizes = [len(base64.b64decode(x)) for x in re.findall(r'id="browser-arm-\d">([^<]*)<', str(browser_section(run)))]
    monkeypatch.setattr(browser_data, "MOST_BYTES", sum(sizes[:3]) * 4 // 3)
    meta, _, arms = islands(str(browser_section(run)))
    assert meta["whole"]
    assert (len(arms), meta["left_out"]) == (3, ["topk"])
    assert set(meta["mechanism"]) == set(arms)
    assert "mechanism" in meta["mechanism"]["legato"]


def test_a_run_without_passages_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"baseline": {"core": {}}}))
    missing = browser_section(SavedRun.open(tmp_path))
    assert isinstance(missing, MissingResult)
    assert "run it again" in str(missing)


def test_one_arm_is_enough(tmp_path: Path) -> None:
    meta, _, arms = islands(str(browser_section(save_run(tmp_path, ("legato",)))))
    assert (list(arms), meta["showcase"]) == (["legato"], [])


@pytest.mark.parametrize("name", ["strips/tokens.parquet", "strips/legato.parquet"])
def test_damaged_passages_are_named(tmp_path: Path, name: str) -> None:
    run = save_run(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(LegatoError, match=re.escape(name)):
        browser_section(run)


def table_of(counts: list[int], matches: dict[str, tuple[list[int], list[float]]]) -> StripTable:
    start_F = np.cumsum([0, *counts])
    centres = {name: np.arange(len(counts))[:, None] * 100 + number for number, name in enumerate(("top", "random"))}
    found = {name: (np.array(i, np.int32), np.array(c, np.float32)) for name, (i, c) in matches.items()}
    empty = np.zeros(start_F[-1])
    return StripTable(start_F, empty, empty, np.ones(len(counts)), centres, np.zeros((len(counts), 16)), {}, found)


def test_the_showcase_keeps_to_its_rule() -> None:
    matches = {"baseline": ([0, 1, 2, 3, 0], [0.9, 0.8, 0.95, 0.9, 0.5])}
    arm = ({"kappa1_excess_within": np.array([0.5, 0.2, 0.9, 0.4, 1.0])}, table_of([30, 30, 5, 30, 30], matches))
    base = (
        {"kappa1_excess_within": np.array([0.1, 0.3, 0.0, 0.4, 0.0])},
        table_of([30] * 5, {"legato": matches["baseline"]}),
    )
    (found,) = showcase([("baseline", *base), ("legato", *arm)], "baseline")
    assert (found["arm"], found["other"], found["pairs"]) == ("legato", "baseline", 3)  # 2 is rare, 4 is no good match
    assert found["gains"] == [[0, 0, 0.4, 0]]
    assert found["losses"] == [[1, 1, -0.1, 100]]
    assert sorted(item[0] for item in found["random"]) == [0, 1, 3]
    assert all(centre % 100 == 1 for *_, centre in found["random"])  # passages drawn at random, not the strongest
    assert (found["median"], found["share"]) == (0.0, pytest.approx(1 / 3))


def test_columns_are_described() -> None:
    assert described("kappa16_excess_within") == {
        "name": "kappa16_excess_within",
        "heading": "kappa 16 excess",
        "meaning": "autocorrelation of firing, Cohen's kappa, 16 tokens apart over its value when tokens are shuffled "
        "inside each document",
    }
    assert described("some_new_column")["heading"] == "some new column"


def test_two_arms_of_16k_latents_fit(tmp_path: Path) -> None:
    """35k tokens at an L0 of 32, every column random: nothing repeats that packing could make use of."""
    rng = np.random.default_rng(0)
    F, N = 16_384, 280 * 128
    count_F = rng.multinomial(32 * N, rng.dirichlet(np.full(F, 0.3))).clip(1, N // 3)
    token_P = np.concatenate([np.sort(rng.choice(N, count, replace=False)) for count in count_F]).astype(np.int32)
    start_F = np.concatenate([[0], np.cumsum(count_F)])
    first_F = start_F[:-1, None] + rng.integers(0, count_F[:, None], (F, 12))
    ids_FK = rng.integers(0, F, (F, 5)).astype(np.int32)
    words = np.array([f"word{i}" for i in range(30_000)], object)
    lists = {"similar": ids_FK, "together": ids_FK, "promoted": words[rng.integers(0, 30_000, (F, 5))]}
    lists |= {"suppressed": words[rng.integers(0, 30_000, (F, 3))], "suppressed_z": rng.normal(0, 4, (F, 3))}
    lists |= {f"{name}_{kind}": rng.random((F, 5)) for name, kind in (("similar", "cosine"), ("together", "jaccard"))}
    strips = StripTable(
        start_F,
        token_P,
        rng.integers(1, 256, token_P.size).astype(np.uint8),
        rng.random(F).astype(np.float32) * 100,
        {
            name: token_P[first_F[:, part]]
            for name, part in (("top", slice(5)), ("quantile", slice(5, 8)), ("random", slice(8, 12)))
        },
        rng.integers(0, 50, (F, 16)).astype(np.int32),
        lists | {"promoted_z": rng.normal(0, 4, (F, 5))},
        {"legato": (ids_FK[:, 0], rng.random(F).astype(np.float32))},
    )
    lagged = [
        f"{m}{lag}{end}"
        for m in ("ac", "kappa")
        for lag in (1, 2, 4, 8, 16, 32, 64)
        for end in ("", "_within_null", "_cross_null")
    ]
    columns = {name: rng.normal(0, 0.1, F) for name in (*lagged, *(f"other{i}" for i in range(25)))}
    arm = Arm("baseline", "baseline", {}, "baseline", "baseline")
    one = BrowsedArm(arm, columns, strips, rng.random((F, 128)).astype(np.float32))
    other = replace(one, arm=Arm("legato", "named", {}, "legato", "legato"))
    text = ShownText(rng.integers(0, 9000, N), words[np.arange(N) % 30_000], np.zeros(N, int), np.ones(N, bool), 128)
    _, packed = pack_arm(one, [one, other], text, Words(text), [], whole=False)
    assert len(packed) * 4 / 3 < 5_200_000  # a real arm of that size takes 3.4 MB
