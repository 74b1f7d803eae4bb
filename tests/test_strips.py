"""What is saved for the feature browser, on cases small enough to check by hand."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import VOCABULARY, tiny_network, tiny_tokenizer

from legato.data.activations import ActivationBatch
from legato.data.language_model import LanguageModel
from legato.evaluation.latents.examples import (
    WINDOW,
    OtherSAE,
    ShownText,
    choose_passages,
    histograms,
    quantised,
    shown,
    write_strips,
    write_text,
)
from legato.evaluation.latents.logits import top_and_bottom_logits
from legato.evaluation.latents.neighbours import coactivation, nearest_directions
from legato.evaluation.sums.code_buffer import CodeBuffer, CodedBatch
from legato.experiment.arms import Arm
from legato.experiment.evaluate import _partners
from legato.sae.codes import SparseCodes
from legato.sae.kernels.pairs import PairsByLatent


def order_of(firings: list[dict[int, float]]) -> PairsByLatent:
    """Per latent {position: activation}."""
    start_F = np.cumsum([0, *map(len, firings)])
    tokens = [token for latent in firings for token in sorted(latent)]
    values = [latent[token] for latent in firings for token in sorted(latent)]
    return PairsByLatent(start_F, np.array(tokens, np.int32), np.array(values, np.float32), np.arange(len(tokens)))


def text_of(rows: int, length: int) -> ShownText:
    shape = (rows, length)
    return ShownText(np.arange(rows * length).reshape(shape) % 7, np.zeros(shape, int), np.ones(shape, bool))


def test_top_passages_are_the_strongest_firings_a_window_apart() -> None:
    firings = {0: 1.0, 10: 3.0, 12: 5.0, 60: 4.0, 101: 2.0, 130: 2.5}  # rows of 100: 101 and 130 lie in the second
    top = choose_passages(order_of([firings, {}]), 100)["top"]
    assert top[0].tolist() == [12, 60, 130, -1, -1]  # 10 and 0 are near 12, 101 is near 130
    assert (top[1] == -1).all()


def test_the_same_place_in_two_contexts_is_two_passages() -> None:
    top = choose_passages(order_of([{9: 1.0, 10: 2.0}]), 10)["top"]
    assert top[0].tolist() == [10, 9, -1, -1, -1]


def test_quantile_passages_stand_at_their_share_of_the_firings() -> None:
    far = {200 * place: 9.0 - place for place in range(9)}  # activations 9..1, each in a context of its own
    quantile = choose_passages(order_of([far]), 200)["quantile"]
    assert quantile[0].tolist() == [1200, -1, -1]  # the 75 % and 50 % firings are among the five strongest


def test_random_passages_are_firings_and_depend_on_the_seed_alone() -> None:
    order = order_of([{64 * place: 1.0 for place in range(100)}])
    first, again, other = (choose_passages(order, 64, seed)["random"] for seed in (0, 0, 1))
    assert np.isin(first, order.token_Q).all()
    assert (np.diff(np.sort(first[0])) >= WINDOW).all()
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_activations_are_kept_in_255ths_of_the_largest_and_never_vanish() -> None:
    largest, values = quantised(order_of([{0: 10.0, 3: 5.0, 4: 0.001}, {}, {2: 2.0}]))
    assert largest.tolist() == [10.0, 0.0, 2.0]
    assert values.tolist() == [255, 128, 1, 255]


def test_histogram_counts_firings_in_sixteenths_of_the_largest() -> None:
    order = order_of([{0: 16.0, 1: 15.5, 2: 0.5, 3: 1.0}, {}])
    counts = histograms(order, quantised(order)[0])
    assert counts[0].tolist() == [1, 1, *[0] * 13, 2]
    assert counts[1].sum() == 0


def test_nearest_directions_leave_out_the_latent_itself_and_the_dead() -> None:
    W_dec = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0], [5.0, 0.1]])
    alive = np.array([True, True, True, False])
    index, cosine = nearest_directions(W_dec, alive, None, k=3)
    assert index.tolist() == [[2, 1, -1], [2, 0, -1], [0, 1, -1], [-1, -1, -1]]
    np.testing.assert_allclose(cosine[0], [0.5**0.5, 0.0, 0.0], atol=1e-6)


def test_nearest_direction_in_another_arm() -> None:
    other = OtherSAE(torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), np.array([True, True, False]))
    index, cosine = nearest_directions(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), np.array([True, True]), other, k=1)
    assert index[:, 0].tolist() == [1, 0]
    np.testing.assert_allclose(cosine[:, 0], [0.5**0.5, 1.0], rtol=1e-6)


def test_latents_that_fire_together_by_share_of_positions() -> None:
    on = [range(0, 10), range(5, 10), range(0, 3), [20, 21]]
    index, jaccard = coactivation(order_of([{t: 1.0 for t in tokens} for tokens in on]), 30, k=3)
    assert index.tolist() == [[1, 2, -1], [0, -1, -1], [0, -1, -1], [-1, -1, -1]]
    np.testing.assert_allclose(jaccard[0], [5 / 10, 3 / 10, 0.0])


def test_many_latents_on_a_token_are_counted_at_every_second_position(monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of([{t: 1.0 for t in range(0, 40)}, {t: 1.0 for t in range(0, 20)}])
    monkeypatch.setattr("legato.evaluation.latents.neighbours.MOST_STEPS", 60)  # of 20 * 4 + 20 = 100
    index, jaccard = coactivation(order, 40, k=1)
    assert index[:, 0].tolist() == [1, 0]
    assert jaccard[0, 0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("architecture", "final_norm"),
    [
        ("gpt2", "transformer.ln_f"),
        ("gemma2", "model.norm"),
        ("opt", "model.decoder.final_layer_norm"),
        ("gpt_neox", "gpt_neox.final_layer_norm"),
    ],
)
def test_promoted_tokens_are_those_of_final_norm_and_unembedding(architecture: str, final_norm: str) -> None:
    network = tiny_network(architecture)
    model = LanguageModel(network, tiny_tokenizer(), "tiny")
    W_dec = torch.randn(70, 48, generator=torch.Generator().manual_seed(2))
    found = top_and_bottom_logits(model, W_dec, torch.arange(3, VOCABULARY), lambda ids: [f"w{i}" for i in ids])
    norm = network.get_submodule(final_norm)
    logits = (norm(W_dec) - norm(torch.zeros(1, 48))) @ network.get_output_embeddings().weight[3:].T
    best = logits.topk(5, dim=1)
    z = (best.values - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True, correction=0)
    assert found.top == [[f"w{i + 3}" for i in row] for row in best.indices.tolist()]
    np.testing.assert_allclose(found.top_z_FK, z, rtol=1e-3, atol=1e-3)
    assert found.bottom == [[f"w{i + 3}" for i in row] for row in logits.topk(3, largest=False).indices.tolist()]


def test_codes_are_shown_up_to_the_limit() -> None:
    codes = SparseCodes(torch.tensor([1, 5, 9]), torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 3.0]), (3, 4, 2))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    batch = ActivationBatch(
        torch.zeros(3, 4, 1), mask, torch.zeros(3, 4, dtype=torch.int32), torch.arange(12).view(3, 4)
    )
    coded = CodedBatch(codes, batch.mask_BL, batch.doc_BL, batch.tokens_BL)
    text, order = shown(CodeBuffer.of([coded, coded], 6), max_tokens=8)
    assert text.tokens_BL.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not text.valid_BL[0, 1]
    assert (order.ptr_F.tolist(), order.token_Q.tolist()) == ([0, 0, 1], [5])  # position 1 does not count


def test_the_table_reads_back_with_empty_rows_for_dead_latents(tmp_path: Path) -> None:
    order = order_of([{0: 4.0, 5: 1.0}, {}])
    other = OtherSAE(torch.eye(2), np.array([True, True]))
    write_strips(tmp_path / "a.parquet", order, text_of(2, 4), torch.eye(2), others={"baseline": other})
    live, dead = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert (live["firings"], live["max_activation"], live["tokens"], live["values"]) == (2, 4.0, [0, 5], [255, 64])
    assert (live["top"], live["match/baseline"], live["match_cosine/baseline"]) == ([0, 5], 0, 1.0)
    assert sum(live["histogram"]) == 2
    assert dead["max_activation"] is dead["match/baseline"] is None
    assert dead["tokens"] == dead["top"] == dead["histogram"] == dead["similar"] == []


def test_texts_no_format_takes_are_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "t.parquet", text_of(1, 7), lambda ids: [f"{i}\ud83d" for i in ids])
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["text"].to_pylist() == [f"{i}?" for i in range(7)]
    assert table.schema.metadata[b"context_length"] == b"7"


def test_every_arm_is_matched_with_its_seeds_baseline() -> None:
    def arm(name: str, role: str, seed: int) -> Arm:
        return Arm(name, name, name, role, seed)

    a, b = arm("a", "baseline", 0), arm("b", "baseline", 1)
    c, d, e = arm("c", "named", 0), arm("d", "named", 0), arm("e", "named", 1)
    assert _partners(e, [a, b, c, d, e]) == ["b"]
    assert _partners(a, [a, b, c, d, e]) == ["c", "d"]
    assert _partners(c, [c, d]) == []
