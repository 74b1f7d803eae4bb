"""Every block of docs/quickstart.md, in its order, on a small model and corpus."""

import re
import shlex

import numpy as np
import pytest
import torch
from small_experiment import ROOT, experiment_main, write_corpus
from tiny_models import save_tiny_model

from legato.cli import main
from legato.sae.kernels.pairs import PairsByLatent
from legato.sae.segments import Segments

# What makes the training block small. Every entry must occur in the page.
SMALLER = {
    "context_length=128": "context_length=16",
    "BatchTopK(32), 4096": "BatchTopK(4), 64",
    "steps=500": "steps=15",
}
SMALL_RUN = "--context_length=16 --held_out=0.3 --tokens=1000 --batch_rows=4 --d_sae=64 --k=4 --eval_rows=8 --ce_rows=2"
SMALL_RUN += " --controls="


def blocks():
    return re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's Python blocks define, after all blocks ran in a folder of their own."""
    folder = tmp_path_factory.mktemp("quickstart")
    save_tiny_model(folder / "my_model", "gpt2", pad_token_id=None)
    write_corpus(folder / "my_texts")
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LEGATO_CACHE", str(folder / "cache"))
        patch.setattr("legato.report.build.write_figures", lambda run: None)  # slow, and tested on their own
        patch.setattr("legato.report.build.write_report", lambda run, _: (run.path / "report.html").write_text(""))
        for language, text in blocks():
            if language == "bash":
                for line in text.splitlines():
                    run(shlex.split(line))
            else:
                for large, small in SMALLER.items():
                    text = text.replace(large, small)
                exec(compile(text, "docs/quickstart.md", "exec"), names)
    return folder, names


def run(words):
    if words[0] == "legato":
        small = ["--rows=8", "--ce_rows=2"] if words[1] == "evaluate" else []
        assert main([*words[1:], *small]) == 0, words
    else:
        assert words[:2] == ["python", "experiment.py"]
        assert experiment_main()([*words[2:], *shlex.split(SMALL_RUN)]) == 0


def test_all_blocks_run_and_leave_what_the_page_says(page):
    folder, names = page
    page_text = (ROOT / "docs" / "quickstart.md").read_text()
    assert all(large in page_text for large in SMALLER)
    for file in (
        "run_1/report.html",
        "run_1/notes.txt",
        "judged/notes.txt",
        "judged/metrics.json",
        "judged/matched.json",
    ):
        assert (folder / file).is_file(), file
    assert names["reconstruction_BLD"].shape == names["acts_BLD"].shape
    assert list(names["saes"]) == ["baseline", "alone"]
    assert len(blocks()) == 5


def test_the_page_s_term_is_its_own_derivative(page):
    """`sparse` is the value of `loss` and its gradient at the active codes, in their order."""
    term = page[1]["Alone"]()
    generator = torch.Generator().manual_seed(0)
    codes_BLF = torch.rand(2, 6, 5, generator=generator) * (torch.rand(2, 6, 5, generator=generator) > 0.5)
    mask_BL = torch.ones(2, 6, dtype=torch.bool)
    mask_BL[0, 0] = False
    doc_BL = torch.tensor([[0, 0, 0, 1, 1, 1], [2] * 6])
    codes_BLF = (codes_BLF * mask_BL[..., None]).requires_grad_()
    value = term.loss(codes_BLF, mask_BL, doc_BL)
    value.backward()
    latent_Q, token_Q = (codes_BLF.detach().flatten(0, 1).T > 0).nonzero(as_tuple=True)
    ptr_F = np.searchsorted(latent_Q.numpy(), np.arange(6))
    value_Q = codes_BLF.detach().flatten(0, 1)[token_Q, latent_Q].numpy()
    order = PairsByLatent(ptr_F, token_Q.numpy(), value_Q, np.arange(len(value_Q)))
    found = term.sparse(order, Segments.of(mask_BL, doc_BL), 0)
    assert found.value == pytest.approx(value.item(), rel=1e-6)
    expected_Q = codes_BLF.grad.flatten(0, 1)[token_Q, latent_Q].numpy()
    assert found.gradient_Q == pytest.approx(expected_Q, rel=1e-5, abs=1e-7)


def test_the_term_is_as_short_as_promised():
    source = next(text for language, text in blocks() if language == "python" and "class Alone" in text)
    body = source[source.index("class Alone") :].strip().splitlines()
    assert len([line for line in body if line.strip()]) <= 20
