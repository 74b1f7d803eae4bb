"""experiment.py on a small random model and a small random corpus, run inside the test's own process."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, save_tiny_model

from legato.sae.partition import Partition
from legato.training.step import Parameters

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("metrics.json", "final_info.json", "notes.txt", "report.html", "saes", "eval_results", "features")


def experiment_main() -> Callable[[list[str]], int]:
    return script_main("experiment")


def script_main(name: str) -> Callable[[list[str]], int]:
    """`main` of a script beside the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@dataclass
class SmallExperiment:
    """A model folder, a corpus, and a short command line for them; the arms are up to the test."""

    model: Path
    corpus: Path
    out_dir: Path
    capture: pytest.CaptureFixture[str]

    def run(self, *flags: str) -> int:
        return experiment_main()(self.flags(*flags))

    def flags(self, *flags: str) -> list[str]:
        options = {
            "model": self.model,
            "dataset": self.corpus,
            "out_dir": self.out_dir,
            "context_length": 16,
            "held_out": 0.3,
            "tokens": 1000,
            "batch_rows": 4,
            "d_sae": 64,
            "k": 4,
            "eval_rows": 8,
            "ce_rows": 2,
            "temporal": "",
            "controls": "",
        }
        return [*(f"--{key}={value}" for key, value in options.items()), "--no-ablation", *flags]

    def error(self, *flags: str, code: int = 2) -> str:
        """The one line on stderr of a run that must fail with `code`."""
        assert self.run(*flags) == code
        shown = self.capture.readouterr().err
        assert shown.startswith("error: "), shown
        assert shown.count("\n") == 1, shown
        assert "Traceback" not in shown
        return shown

    def results(self) -> list[str]:
        """What of a run's results lies in out_dir."""
        return [name for name in RESULTS if (self.out_dir / name).exists()]


def write_corpus(path: Path, documents: int = 40) -> Path:
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, 60)) for _ in range(documents)]
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:02d}.txt").write_text(text)
    return path


def small_experiment(folder: Path, capture: pytest.CaptureFixture[str]) -> SmallExperiment:
    # Without a pad token of its own, as GPT-2 is: transformers would warn of padding that Legato masks by itself.
    model = save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    return SmallExperiment(model, write_corpus(folder / "corpus"), folder / "run_1", capture)


def without_pages(patch: pytest.MonkeyPatch) -> None:
    """experiment.py leaves out the figures and report.html, which take most of a small run's time."""
    for writer in ("write_figures", "write_report"):
        patch.setattr(f"legato.report.build.{writer}", lambda run, *_: run.path)


def zero_parameters(d_in: int, d_sae: int, seed: int, partition: Partition) -> Parameters:
    """In place of `Parameters.initial`: weights that no gradient reaches."""
    return Parameters(torch.zeros(d_sae, d_in), torch.zeros(d_sae), torch.zeros(d_sae, d_in), torch.zeros(d_in))
