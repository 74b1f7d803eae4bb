"""Inputs of an experiment: model, text, activations and their origin."""

from dataclasses import dataclass
from typing import Any

from legato.common import distributed
from legato.common.errors import UsageError
from legato.common.progress import log, progress_bar
from legato.data.activations import ActivationStream
from legato.data.documents import load_documents, split_held_out
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.store import ActivationStore
from legato.data.tokens import TokenSet, tokenise
from legato.experiment.config import DataConfig, ExperimentConfig, ModelConfig

CHARACTERS_PER_TOKEN = 6  # of a hub stream, with a margin: English has some 4.5


@dataclass(frozen=True)
class Text:
    """Disjoint documents as rows of tokens."""

    train: TokenSet
    held_out: TokenSet


@dataclass(frozen=True)
class Activations:
    """Activations of both sides; those to train on are stored or computed on demand. n_valid: valid positions of one
    pass over them; provenance: their origin."""

    train: ActivationStore | ActivationStream
    held_out: ActivationStore
    n_valid: int
    layer: int
    provenance: dict[str, Any]

    @property
    def key(self) -> str:
        """Key of all that determines the activations of both sides."""
        train = self.train.key() if isinstance(self.train, ActivationStream) else self.train.key
        return f"{train} {self.held_out.key}"


def load_model(config: ModelConfig, context_length: int, *, splice: bool) -> LanguageModel:
    """Load the frozen language model and try on a few tokens what it is needed for; splice: also to replace the site.

    Raises UsageError for an unknown layer or site, for a shorter context and for what the model cannot do.
    """
    with distributed.one_first():  # which downloads or converts it
        model = LanguageModel.load(config.model, dtype=config.dtype)
    if context_length > model.max_context:
        raise UsageError(f"--context_length {context_length} is longer than {model.name} allows ({model.max_context})")
    model.check(layer_of(config, model), config.site, splice=splice)
    log(f"model: {model.name}, {model.n_layers} layers, width {model.d_model}, {model.dtype}")
    return model


def layer_of(config: ModelConfig, model: LanguageModel) -> int:
    return model.n_layers // 2 if config.layer is None else config.layer


def read_text(config: ExperimentConfig, model: LanguageModel) -> Text:
    """Tokenise train and held-out text from disjoint documents."""
    data = config.data
    characters = CHARACTERS_PER_TOKEN * data.corpus_tokens / (1 - data.held_out)
    documents = load_documents(data.dataset, max_stream_characters=int(characters), text_column=data.text_column)
    train, held_out = split_held_out(documents, data.held_out)
    if not train or not held_out:
        raise UsageError(f"{data.dataset} has too few documents to hold {data.held_out:.0%} out: give more text")
    held_out_tokens = config.evaluation.eval_rows * data.context_length
    text = Text(
        tokenise(train, model.tokenizer, context_length=data.context_length, max_tokens=data.corpus_tokens),
        tokenise(held_out, model.tokenizer, context_length=data.context_length, max_tokens=held_out_tokens),
    )
    log(
        f"text: {data.dataset}, {text.train.n_valid:,} tokens in {len(text.train):,} contexts to train on, "
        f"{text.held_out.n_valid:,} in {len(text.held_out):,} held out"
    )
    if len(text.train) < config.training.batch_rows:
        raise UsageError(
            f"{data.dataset} gives {len(text.train)} contexts, fewer than one batch of {config.training.batch_rows}: "
            "give more text or lower --batch_rows"
        )
    return text


def harvest_activations(config: ExperimentConfig, model: LanguageModel, text: Text) -> Activations:
    """Harvest both sides' activations, or take them from the cache of an earlier run."""
    layer, site = layer_of(config.model, model), config.model.site

    def stored(name: str, tokens: TokenSet) -> ActivationStore:
        with progress_bar(name, len(tokens)) as progress:
            return harvest(model, tokens, layer=layer, site=site, progress=progress)

    train: ActivationStore | ActivationStream
    if config.data.store:
        train = stored("harvest", text.train)
        n_valid, n_outliers = train.n_valid, train.n_outliers
    else:  # the same batches on demand; outliers are found with each batch
        train = ActivationStream(model, text.train, layer=layer, site=site)
        n_valid, n_outliers = text.train.n_valid, 0
    held_out = stored("harvest held-out", text.held_out)
    n_outliers += held_out.n_outliers
    log(
        f"activations: {model.module_path(layer, site)}, {n_valid:,} valid positions, {n_outliers} outliers masked"
        + ("" if config.data.store else " on the held-out side; those to train on are computed as training goes")
    )
    provenance = {
        **origin(model, config.data, layer=layer, site=site, bos=text.train.bos),
        "held_out": config.data.held_out,
        "corpus_tokens": n_valid,
        "held_out_tokens": held_out.n_valid,
        "outliers_masked": n_outliers,
    }
    return Activations(train, held_out, n_valid, layer, provenance)


def origin(model: LanguageModel, data: DataConfig, *, layer: int, site: str, bos: bool) -> dict[str, Any]:
    """Describe the origin of activations, to be saved with the SAEs and their results."""
    return {
        "model": model.name,
        "layer": layer,
        "site": site,
        "module_path": model.module_path(layer, site),
        "dtype": str(model.dtype),
        "dataset": data.dataset,
        "context_length": data.context_length,
        "bos": bos,
    }
