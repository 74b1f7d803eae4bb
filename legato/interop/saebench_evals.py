"""Start sae-bench's evaluations other than `core`, after a check of what each needs.

They load the language model themselves, by a name that TransformerLens knows, and data sets from the hub.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from legato.common.errors import LegatoError, UsageError, one_line

_BIOS, _REVIEWS = "LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"
_PROBED = (
    *(f"LabHC/bias_in_bios_class_set{number}" for number in (1, 2, 3)),
    *(_REVIEWS, f"{_REVIEWS}_sentiment", "codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl"),
)
KEY = "OPENAI_API_KEY"
FORGET_CORPUS = Path("sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl")


@dataclass(frozen=True)
class Needs:
    """Needs of an evaluation. module: of sae_bench.evals. datasets: hub ids it reads. options: of its config. key: it
    asks OpenAI. forget_corpus: it reads FORGET_CORPUS."""

    module: str
    config: str
    datasets: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    key: bool = False
    forget_corpus: bool = False


EVALS = {
    "absorption": Needs("absorption", "AbsorptionEvalConfig"),
    "autointerp": Needs("autointerp", "AutoInterpEvalConfig", ("monology/pile-uncopyrighted",), key=True),
    "scr": Needs("scr_and_tpp", "ScrAndTppEvalConfig", (_BIOS, _REVIEWS), (("perform_scr", True),)),
    "tpp": Needs("scr_and_tpp", "ScrAndTppEvalConfig", (_BIOS, _REVIEWS), (("perform_scr", False),)),
    "sparse_probing": Needs("sparse_probing", "SparseProbingEvalConfig", _PROBED),
    "unlearning": Needs(
        "unlearning", "UnlearningEvalConfig", ("cais/wmdp", "cais/mmlu", "wikitext"), forget_corpus=True
    ),
}


def check_needs(name: str, model_name: str, has_dataset: Callable[[str], str | None]) -> None:
    """Raise UsageError, in one line, for the first need of an evaluation that is absent.

    has_dataset: returns the reason why a data set is not available; None where it is.
    """
    needs = EVALS[name]
    if needs.key and not os.environ.get(KEY):
        raise UsageError(f"{name} asks OpenAI for explanations: set {KEY}")
    if needs.forget_corpus and "it" not in model_name.split("-"):
        raise UsageError(f"{name} needs an instruction-tuned model such as gemma-2-2b-it, not {model_name}")
    if needs.forget_corpus and not FORGET_CORPUS.is_file():
        raise UsageError(
            f"{name} needs the corpus to forget at {FORGET_CORPUS} of the current folder: ask for access to "
            "cais/wmdp-bio-forget-corpus on the hub and put it there"
        )
    for dataset in needs.datasets:
        if reason := has_dataset(dataset):
            raise UsageError(f"{name} needs the data set {dataset} from the hub, which is not available ({reason})")


def start(name: str, wrapped: Any, sae_name: str, model_name: str, out: str | Path) -> Path:
    """Run one evaluation on a wrapped SAE; sae-bench writes its file in `out`, which is returned.

    Raises UsageError for an absent need, LegatoError for a failure inside.
    """
    check_model(model_name)
    check_needs(name, model_name, dataset_absence)
    needs = EVALS[name]
    config_class = getattr(import_module(f"sae_bench.evals.{needs.module}.eval_config"), needs.config)
    from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE, LLM_NAME_TO_DTYPE

    config = config_class(model_name=model_name, **dict(needs.options))
    config.llm_batch_size = LLM_NAME_TO_BATCH_SIZE.get(model_name, 32)
    config.llm_dtype = LLM_NAME_TO_DTYPE.get(model_name, "float32")
    arguments = {"api_key": os.environ[KEY]} if needs.key else {}
    run_eval = import_module(f"sae_bench.evals.{needs.module}.main").run_eval
    Path(out).mkdir(parents=True, exist_ok=True)
    try:
        run_eval(config, [(sae_name, wrapped)], "cpu", str(out), force_rerun=True, **arguments)
    except Exception as error:  # sae-bench raises any kind
        raise LegatoError(f"sae-bench's {name} failed: {one_line(error)}") from error
    return Path(out)


def check_model(model_name: str) -> None:
    """Raise UsageError for a model that TransformerLens does not know or that is not available."""
    from transformer_lens.loading_from_pretrained import get_official_model_name
    from transformers import AutoConfig

    try:
        official = get_official_model_name(model_name)
    except ValueError as error:
        raise UsageError(
            f"sae-bench opens models by TransformerLens' names, and {model_name} is none: only core takes a folder"
        ) from error
    try:
        AutoConfig.from_pretrained(official)
    except Exception as error:  # transformers raises a dozen kinds
        raise UsageError(f"sae-bench needs the model {official}, which is not available ({one_line(error)})") from error


def dataset_absence(dataset: str) -> str | None:
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(dataset, *(("wmdp-bio",) if dataset == "cais/wmdp" else ()))
    except Exception as error:  # datasets raises as many
        return one_line(error)
    return None
