"""A finished run on a small random model whose corpus and vocabulary are made to break a page, arm names aside."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_experiment import SmallExperiment
from tiny_models import save_tiny_model

# One token each: markup that runs or swallows the rest, both directions, joined and cut emoji, names JavaScript knows.
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--",
    "-->",
    "<img/src=x/onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "</style></title></textarea>",
    "{{7*7}}${7*7}%{x}",
    "&lt;b&gt;&amp;",
    "\u202eright-to-left",
    "\u05d0\u05d1\u05d2\u05d3",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "e\u0301\u0302\u0303\u0304\u0305\u0306",
    "\u200b\ufeff",
    "x" * 400,
    "__proto__",
    "constructor",
    "javascript:alert(1)",
)


def write_hostile_run(folder: Path, *flags: str) -> Path:
    """Train and judge a baseline and a temporal arm on it (seconds); return the run folder."""
    model = save_tiny_model(folder / "model", "gpt2", pad_token_id=None)
    _put_into_vocabulary(model / "tokenizer.json")
    vocabulary = [*HOSTILE, *(f"w{i}" for i in range(3 + len(HOSTILE), 60))]
    rng = np.random.default_rng(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(40):
        repeated = np.repeat(rng.choice(vocabulary, 30), 2)  # so that features have something to hold
        (corpus / f"{number:02d}.txt").write_text(" ".join(repeated), encoding="utf-8")
    out_dir = folder / "run_1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEGATO_CACHE", str(folder / "cache"))
        small = SmallExperiment(model, corpus, out_dir, None)  # type: ignore[arg-type]
        assert small.run("--temporal=legato", *flags) == 0
    return out_dir


def _put_into_vocabulary(path: Path) -> None:
    """Hostile words in place of the first ordinary ones."""
    tokenizer = json.loads(path.read_text())
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    words |= {3 + number: word for number, word in enumerate(HOSTILE)}
    tokenizer["model"]["vocab"] = {word: number for number, word in sorted(words.items())}
    path.write_text(json.dumps(tokenizer))
