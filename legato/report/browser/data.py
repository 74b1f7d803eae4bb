"""Data of a run in the feature browser's page: text, feature tables, firings, in a few compact islands.

Each arm comes with every one of its firings on the text shown, so that the page can draw any latent on any passage and
say what else fires there. Where that would be too much for two arms (MOST_BYTES), only firings inside the passages of a
latent or of one that it is the match of are carried, and the page says so. Further arms are added while they fit.

Shape legend: N positions of the text shown, F latents, P firings by latent then position, K entries of a list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from legato.evaluation.latents.examples import QUANTILES, WINDOW
from legato.evaluation.latents.table import read_features
from legato.report.browser.columns import GAIN, HOLD, KAPPA_BEYOND_POSITION, KAPPA_EXCESS, MATCH_COSINE, pack_columns
from legato.report.browser.pack import Pack, gaps
from legato.report.browser.showcase import GOOD_MATCH, showcase
from legato.report.browser.tables import ShownText, StripTable
from legato.report.figures.plot import MissingResult
from legato.report.figures.style import arm_styles, page_colour
from legato.report.page.render import island, packed_json, render
from legato.report.text.verdict import made_by_itself
from legato.results.run_dir import RunDir
from legato.results.saved_run import Arm, SavedRun

MOST_BYTES = 9_500_000  # in the page, all arms together
BYTES_A_FIRING = 1.5  # about
BEFORE = 20  # tokens of a passage that stand before its centre
LEVELS = 32  # of an activation in the page
POSITION_BINS = 16
LOOSE_MATCH = 0.5  # decoder cosine below which two latents are not set beside each other unasked


@dataclass(frozen=True)
class BrowsedArm:
    """Saved data of an arm."""

    arm: Arm
    features: Mapping[str, NDArray[Any]]
    strips: StripTable
    rate_FL: NDArray[np.float32] | None


def browser_islands(run: SavedRun) -> Markup:
    """The islands that browser.js reads. Raises MissingResult where the run saved no passages."""
    paths = RunDir(run.path)
    others = [arm for arm in run.highlighted if arm.role != "baseline"]
    every = []
    for arm in (*filter(None, [run.baseline]), *others):
        strips, features = (folder / f"{arm.name}.parquet" for folder in (paths.strips, paths.features))
        if paths.shown_text.is_file() and strips.is_file() and features.is_file():
            rate_FL = run.arrays(arm.name).get("rate_FL")
            every.append(BrowsedArm(arm, read_features(features), StripTable.read(strips), rate_FL))
    if not every:
        raise MissingResult("the run saved no passages (strips/); run it again with this version of Legato to get them")
    text = ShownText.read(paths.shown_text)
    words, kinds = Words(text), list[str]()
    whole = 4 / 3 * BYTES_A_FIRING * sum(one.strips.token_P.size for one in every[:2]) <= MOST_BYTES
    packs = [pack_arm(one, every, text, words, kinds, whole=True) for one in every[:2]] if whole else []
    if not packs or _page_bytes(packs) > MOST_BYTES:
        whole = False
        packs = [pack_arm(one, every, text, words, kinds, whole=False) for one in every[:2]]
    for one in every[2:]:
        packs.append(pack_arm(one, every, text, words, kinds, whole=whole))
        if _page_bytes(packs) > MOST_BYTES:
            del packs[-1]
            break
    shown = every[: len(packs)]
    styles = arm_styles(run.highlighted)
    colours = {one.arm.name: page_colour(styles[one.arm.name].colour) for one in shown}
    text_pack = Pack()
    text_pack.add_indices("word", words.numbers(text.text_N))
    text_pack.add_indices("doc", np.unique(text.doc_N, return_inverse=True)[1])
    text_pack.add_bytes("valid", text.valid_N)
    meta = {
        "context_length": text.context_length,
        "positions": int(text.token_N.size),
        "tokens": int(text.valid_N.sum()),
        "before": BEFORE,
        "window": WINDOW,
        "quantiles": QUANTILES,
        "levels": LEVELS,
        "whole": whole,
        "loose_match": LOOSE_MATCH,
        "close_match": GOOD_MATCH,
        "text": text_pack.header,
        "arms": [header | {"colour": colours[header["name"]]} for header, _ in packs],
        "left_out": [arm.name for arm in run.trained if arm.name not in colours and arm.role != "grid"],
        "kinds": kinds,
        "showcase": showcase(
            [(one.arm.name, one.features, one.strips) for one in shown], run.baseline.name if run.baseline else None
        ),
        "mechanism": {one.arm.name: made_by_itself([one.arm], [run.baseline])[1] for one in shown if run.baseline},
        "words": words.words,
    }
    islands = {"browser-meta": packed_json(meta), "browser-text": text_pack.packed()}
    islands |= {f"browser-arm-{number}": arm_bytes for number, (_, arm_bytes) in enumerate(packs)}
    return Markup("\n").join(island(name, content) for name, content in islands.items())


def browser_section(run: SavedRun) -> Markup | MissingResult:
    """The browser as one piece of the page, with its own style, scripts and data; MissingResult where the run saved no
    passages, its message a phrase that goes on after "is not in this report: ".

    Raises LegatoError, naming the file, for saved passages that are damaged.
    """
    try:
        return Markup(render("browser.html", islands=browser_islands(run)))
    except MissingResult as missing:
        return missing


class Words:
    """Every string of the page once, numbered as they come."""

    def __init__(self, text: ShownText) -> None:
        self.words: list[str] = []
        self._number: dict[str, int] = {}
        ids, first = np.unique(text.token_N, return_index=True)
        self._of_token = dict(zip(ids.tolist(), text.text_N[first].tolist(), strict=True))

    def numbers(self, strings: Any) -> NDArray[np.int64]:
        """Number the strings of an array, in its shape; -1 for empty ones."""
        found = [self._numbered(string) if string else -1 for string in np.asarray(strings, object).ravel().tolist()]
        return np.array(found, np.int64).reshape(np.shape(strings))

    def of_tokens(self, ids: NDArray[Any]) -> NDArray[np.int64]:
        """Number token ids; -1 for nan and for tokens that the text shown does not have."""
        strings = [self._of_token.get(int(token)) if np.isfinite(token) else None for token in ids.ravel()]
        return self.numbers(np.array(strings, object).reshape(ids.shape))

    def _numbered(self, string: str) -> int:
        number = self._number.setdefault(string, len(self.words))
        if number == len(self.words):
            self.words.append(string)
        return number


def pack_arm(
    one: BrowsedArm, every: Sequence[BrowsedArm], text: ShownText, words: Words, kinds: list[str], *, whole: bool
) -> tuple[dict[str, Any], bytes]:
    """An arm's header for the page and its bytes. every: the arms it may be matched with. kinds: added to."""
    features = dict(one.features)
    matched = {other.arm.name: other for other in every if other.arm.name in one.strips.matches}
    if KAPPA_EXCESS in features and KAPPA_BEYOND_POSITION in features:
        features[HOLD] = np.minimum(features[KAPPA_EXCESS], features[KAPPA_BEYOND_POSITION])
    if one.arm.role != "baseline" and matched:
        features |= _against(one, next(iter(matched.values())))
    kinds += sorted({kind for kind in features.get("cluster_name", ()) if kind is not None} - set(kinds))
    strips = one.strips if whole else one.strips.only(_in_passages(one, matched, text.context_length))
    pack = Pack()
    columns = pack_columns(pack, features, kinds)
    pack.add_indices("count", strips.count_F)
    pack.add_indices("firings", one.strips.count_F)
    pack.add_floats("largest", np.where(one.strips.count_F > 0, one.strips.largest_F, np.nan))
    pack.add_bytes("gaps", gaps(strips.start_F, strips.token_P))
    pack.add_bytes("values", (strips.value_P.astype(np.int64) * LEVELS - 1) // 255)
    for name, centre_FK in strips.centres.items():
        pack.add_indices(name, centre_FK)
    peak_F = strips.histogram_FK.max(1, keepdims=True).clip(1)
    pack.add_bytes("histogram", np.rint(255 * strips.histogram_FK / peak_F))
    if one.rate_FL is not None:
        profile_FK, most_F = _profile(one.rate_FL)
        pack.add_bytes("profile", profile_FK)
        pack.add_floats("profile_top", most_F)
    for name in ("similar", "together"):
        pack.add_indices(name, strips.lists[name])
    pack.add_bytes("similar_share", _share(strips.lists["similar_cosine"]))
    pack.add_bytes("together_share", _share(strips.lists["together_jaccard"]))
    for name in ("promoted", "suppressed"):
        if name in strips.lists:
            pack.add_indices(name, words.numbers(strips.lists[name]))
            pack.add_bytes(f"{name}_z", np.nan_to_num(10 * np.abs(strips.lists[f"{name}_z"])).clip(max=255).round())
    tops = [features[name] for name in ("top_token", "top_token2", "top_token3") if name in features]
    if tops:
        pack.add_indices("top_tokens", words.of_tokens(np.stack(tops, 1)))
    for number, other in enumerate(matched.values()):
        nearest_F, cosine_F = strips.matches[other.arm.name]
        pack.add_indices(f"match{number}", nearest_F)
        pack.add_fixed(f"match_cosine{number}", np.where(nearest_F < 0, np.nan, cosine_F))
    header = {
        "name": one.arm.name,
        "baseline": one.arm.role == "baseline",
        "latents": strips.n_latents,
        "matches": list(matched),
        "columns": columns,
        "arrays": pack.header,
    }
    return header, pack.packed()


def _page_bytes(packs: Sequence[tuple[dict[str, Any], bytes]]) -> int:
    return sum(len(packed) for _, packed in packs) * 4 // 3


def _against(one: BrowsedArm, baseline: BrowsedArm) -> dict[str, NDArray[Any]]:
    """Columns that set a latent beside its match."""
    nearest_F, cosine_F = one.strips.matches[baseline.arm.name]
    found = {MATCH_COSINE: np.where(nearest_F < 0, np.nan, cosine_F)}
    if KAPPA_EXCESS in one.features and KAPPA_EXCESS in baseline.features:
        theirs_F = baseline.features[KAPPA_EXCESS][nearest_F]
        found[GAIN] = np.where(cosine_F < LOOSE_MATCH, np.nan, one.features[KAPPA_EXCESS] - theirs_F)
    return found


def _in_passages(one: BrowsedArm, matched: Mapping[str, BrowsedArm], context_length: int) -> NDArray[np.bool_]:
    """Mark the firings in a passage of their latent, or of a latent of another arm that is matched with it."""
    strips, N = one.strips, context_length
    latent_P = np.repeat(np.arange(strips.n_latents), strips.count_F)
    own: list[tuple[NDArray[Any], Mapping[str, NDArray[np.int32]]]] = [(np.arange(strips.n_latents), strips.centres)]
    own += [
        (other.strips.matches[one.arm.name][0], other.strips.centres)
        for other in matched.values()
        if one.arm.name in other.strips.matches
    ]
    kept = []
    for latent_F, centres in own:
        centre_FK = np.concatenate(list(centres.values()), 1)
        latent_FK = np.broadcast_to(latent_F[:, None], centre_FK.shape)
        shown = (centre_FK >= 0) & (latent_FK >= 0)
        start = np.maximum(centre_FK[shown] - BEFORE, centre_FK[shown] // N * N)
        kept.append(np.stack([latent_FK[shown], start, start + WINDOW]))
    latent_W, start_W, end_W = np.concatenate(kept, 1).astype(np.int64)
    width = int(max(strips.token_P.max(initial=0), end_W.max(initial=0))) + 1
    key_P = latent_P * width + strips.token_P
    first_W, last_W = (np.searchsorted(key_P, latent_W * width + edge) for edge in (start_W, end_W))
    edges = np.bincount(first_W, minlength=key_P.size + 1) - np.bincount(last_W, minlength=key_P.size + 1)
    return np.cumsum(edges)[: key_P.size] > 0


def _profile(rate_FL: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Firing rate over position in POSITION_BINS bins, in 255ths of the latent's largest, and that largest."""
    edges = np.linspace(0, rate_FL.shape[1], min(POSITION_BINS, rate_FL.shape[1]) + 1).astype(int)
    known_L = np.isfinite(rate_FL).sum(0) > 0
    rate_FK = np.stack(
        [
            rate_FL[:, a:b].compress(known_L[a:b], 1).mean(1) if known_L[a:b].any() else np.zeros(len(rate_FL))
            for a, b in pairwise(edges)
        ],
        1,
    )
    most_F = rate_FK.max(1)
    return np.rint(255 * rate_FK / np.where(most_F > 0, most_F, 1)[:, None]), most_F


def _share(values_FK: NDArray[Any]) -> NDArray[np.float64]:
    """Numbers from -1 to 1 in hundredths from 0 to 200."""
    return np.rint(100 * np.nan_to_num(values_FK) + 100).clip(0, 200)
