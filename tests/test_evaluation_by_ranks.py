"""Several ranks judge SAEs that are fewer than they: to the last bit what one process says of them."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import differences, path_for_children
from ranks import run_ranks
from small_experiment import write_corpus
from tiny_models import VOCABULARY, save_tiny_model

from legato import cli
from legato.common import distributed
from legato.common.errors import LegatoError
from legato.data.activations import ActivationBatch
from legato.data.language_model import LanguageModel
from legato.evaluation.one_pass import evaluate
from legato.report import build
from legato.sae.architectures import Hysteresis, JumpReLU
from legato.sae.autoencoder import SparseAutoencoder

ROWS, LENGTH, WIDTH, LATENTS = 7, 16, 48, 64
LAYER = 1


@pytest.fixture(scope="module", autouse=True)
def children_find_the_tests():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path_for_children())
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model, a corpus and two SAEs."""
    folder = tmp_path_factory.mktemp("judged")
    save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    write_corpus(folder / "corpus")
    plain().save(folder / "plain")
    held().save(folder / "held")
    return folder


def plain(threshold: float = 2.0) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH, generator=generator), dim=-1)
    above = JumpReLU(threshold=torch.full((LATENTS,), threshold))
    return SparseAutoencoder(W_dec.T.clone(), torch.zeros(LATENTS), W_dec, torch.zeros(WIDTH), above)


def held() -> SparseAutoencoder:
    sae = plain()
    return replace(sae, architecture=Hysteresis(release=0.4, threshold=sae.architecture.threshold))


class Breaking:
    """An SAE whose codes are no numbers from the third batch on."""

    def __init__(self) -> None:
        self.inner = plain()
        self.W_enc, self.b_enc, self.W_dec = self.inner.W_enc, self.inner.b_enc, self.inner.W_dec
        self.decode_sparse = self.inner.decode_sparse

    def encode_sparse(self, batch: ActivationBatch) -> Any:
        codes = self.inner.encode_sparse(batch)
        return replace(codes, value_P=codes.value_P * np.nan) if int(batch.doc_BL.max()) > 4 * ROWS else codes


def batches() -> list[ActivationBatch]:
    """Five, of rows with two documents each; with outliers, which SAEBench counts, and four rows of padding alone."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(5):
        tokens_BL = torch.randint(6, VOCABULARY, (ROWS, LENGTH), generator=generator)
        tokens_BL[:, 0] = 1
        if number == 1:
            tokens_BL[:4] = 0
        mask_BL = tokens_BL > 1
        mask_BL[number, 3] = mask_BL[6, 5] = False
        doc_BL = 2 * (ROWS * number + torch.arange(ROWS)[:, None]) + (torch.arange(LENGTH) > 8)
        acts_BLD = torch.randn(ROWS, LENGTH, WIDTH, generator=generator)
        found.append(ActivationBatch(acts_BLD, mask_BL, doc_BL.int(), tokens_BL))
    return found


def judge_everything(place: Path, out: Path) -> None:
    """What this rank learns of several banks, with errors in their words; one process works alone."""
    with distributed.process_group():
        model = LanguageModel.load(str(place / "model"), dtype="float32")
        together, found = distributed.world_size() > 1, {}

        def judge(case: str, bank: Any, **options: Any) -> None:
            failures: dict[str, str] = {}
            try:
                results = evaluate(
                    bank, batches(), together=together, failures=failures, rows_per_batch=ROWS, **options
                )
            except LegatoError as error:
                results = str(error)
            found[case] = {"results": results, "failures": failures}

        spliced = {"language_model": model, "layer": LAYER}
        broken = {"breaking": Breaking(), "silent": plain(threshold=1e9)}
        judge("one", {"plain": plain()}, ce_rows=23, bootstrap=20, **spliced)
        judge("two", {"plain": plain(), "held": held()}, bootstrap=20)
        judge("failing", {"breaking": Breaking(), "held": held(), "silent": broken["silent"]}, ce_rows=9, **spliced)
        judge("none", broken)
        judge("damaged", {"plain": plain()}, ce_rows=9, **{**spliced, "language_model": NoNumbers(model)})
        (out / f"rank_{distributed.rank()}.pkl").write_bytes(pickle.dumps(found))


class NoNumbers:
    """A language model that gives no finite logits from the sixth row on."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.tokenizer, self.special_token_ids, self.unembed = model.tokenizer, model.special_token_ids, model.unembed

    def resume(self, acts_BLD: torch.Tensor, tokens_BL: torch.Tensor, layer: int, site: str) -> torch.Tensor:
        hidden_BLD = self.model.resume(acts_BLD, tokens_BL, layer, site)
        return hidden_BLD * torch.where((tokens_BL == batches()[0].tokens_BL[5]).all(1), np.nan, 1.0)[:, None, None]


def learned(n_ranks: int, place: Path, folder: Path) -> list[Any]:
    folder.mkdir(exist_ok=True)
    run_ranks(n_ranks, judge_everything, place, folder, folder=folder)
    return [bits(pickle.loads((folder / f"rank_{rank}.pkl").read_bytes())) for rank in range(n_ranks)]


def bits(tree: Any) -> Any:
    """The tree with every number as the bytes that it is."""
    if isinstance(tree, dict):
        return {key: bits(entry) for key, entry in tree.items()}
    if isinstance(tree, list):
        return [bits(entry) for entry in tree]
    if isinstance(tree, np.ndarray):
        return f"{tree.dtype} {tree.shape} {tree.tobytes().hex()}"
    return tree.hex() if isinstance(tree, float) else tree


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> Any:
    return learned(1, place, tmp_path_factory.mktemp("alone"))[0]


def test_one_process_judges_what_can_be_judged(alone):
    assert alone["one"]["results"]["plain"]["core"]["ce_tokens"] > 0
    assert alone["two"]["results"].keys() == {"plain", "held"}
    assert alone["failing"]["results"].keys() == {"held"}
    assert alone["failing"]["failures"].keys() == alone["none"]["failures"].keys() == {"breaking", "silent"}
    assert "codes hold values that are not finite" in alone["none"]["failures"]["breaking"]
    assert alone["damaged"]["results"].startswith("the language model's loss is not finite for the clean model")


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_ranks_say_what_one_process_says(n_ranks, alone, place, tmp_path):
    for rank in learned(n_ranks, place, tmp_path):
        assert differences(rank, alone) == []


def judge_saved(place: Path, out: Path) -> int:
    os.environ["LEGATO_CACHE"] = str(out / "cache")
    for writer in ("write_figures", "write_report"):
        vars(build)[writer] = lambda *_: None
    options = {"model": place / "model", "layer": LAYER, "dataset": place / "corpus", "out": out / "judged"}
    options |= {"rows": 40, "ce_rows": 10, "context_length": 16}
    return cli.main(["evaluate", str(place / "plain"), *(f"--{key}={value}" for key, value in options.items())])


def test_ranks_judge_one_saved_sae(place, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(1, judge_saved, place, one, folder=one)
    run_ranks(2, judge_saved, place, two, folder=two)
    assert "metrics.json" in files(one / "judged")
    assert differences(files(two / "judged"), files(one / "judged")) == []
    assert (two / "rank_0.txt").read_text().count("results: ") == 1
    assert (two / "rank_1.txt").read_text() == ""


def files(folder: Path) -> dict[str, Any]:
    """What a judged folder holds, but for the time it was made at and the threads it was made with."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*.*")
        if path.name != "checksums.json"
    }
    found["config.yaml"] = [line for line in found["config.yaml"].splitlines() if b"threads:" not in line]
    for name in [name for name in found if name.startswith("eval_results/")]:
        found[name] = json.loads(found[name])
        del found[name]["eval_id"], found[name]["datetime_epoch_millis"]
    return found
