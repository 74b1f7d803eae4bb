"""`legato evaluate`: saved SAEs, whoever trained them, through the whole evaluation of experiment.py.

The folder it writes is a run's: metrics.json, features/, arrays/, redundancy/, eval_results/, notes.txt, report.html.
saes/ holds a copy of each SAE as it was judged.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from legato.common import distributed
from legato.common.command import Interrupts
from legato.common.command_line import Task
from legato.common.errors import LegatoError, UsageError
from legato.common.progress import log, progress_bar
from legato.common.record import option, record, words
from legato.data.documents import load_documents, split_held_out
from legato.data.harvest import harvest
from legato.data.language_model import LanguageModel
from legato.data.model_files import hub_name
from legato.data.store import ActivationStore
from legato.data.tokens import TokenSet, tokenise
from legato.experiment.arms import Arm, seeded
from legato.experiment.checkpoint import DEFAULT_MINUTES, Checkpoint
from legato.experiment.config import SITE, DataConfig, DType, EvaluationConfig, ModelConfig, Name
from legato.experiment.evaluate import Bank, TrainedArm, evaluate_arms
from legato.experiment.inputs import CHARACTERS_PER_TOKEN, Activations, load_model, origin
from legato.report.build import build_outputs
from legato.report.text.arm_table import results_table
from legato.results.integrity import write_checksums
from legato.results.older import older_identities
from legato.results.run_dir import RunDir
from legato.results.saved_run import SavedRun
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.formats.safetensors_file import sha256_of


@dataclass(frozen=True)
class Stated:
    """Facts that are stated about an SAE: its method, if it is that method at another k, and its seed."""

    method: str
    k: float | None = None
    seed: int | None = None
    swept: bool = False


@dataclass(frozen=True)
class EvaluateConfig:
    """Saved SAEs, and the model and text to judge them on.

    saes: where each SAE lies, by name. held_out: the share of the documents that is judged on, as experiment.py holds
    it out; None judges on all documents. sha256: of what lies there, by name. stated: what the command line says of
    an SAE, by name.
    """

    saes: Mapping[str, str]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    held_out: float | None = None
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(controls=()))
    sha256: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, Stated] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For config.yaml. The section `judged` tells that nothing was trained."""
        return {
            "judged": {
                "saes": dict(self.saes),
                "sha256": dict(self.sha256),
                "stated": {name: dataclasses.asdict(stated) for name, stated in self.stated.items()},
            },
            "model": dataclasses.asdict(self.model),
            "data": {
                **{name: getattr(self.data, name) for name in ("dataset", "text_column", "context_length")},
                "held_out": self.held_out,
            },
            "evaluation": {"eval_rows": self.evaluation.eval_rows, "ce_rows": self.evaluation.ce_rows},
        }


def evaluate_saved(config: EvaluateConfig, saes: Mapping[str, SparseAutoencoder], out: str | Path) -> RunDir:
    """Judge SAEs on one layer and site of a model and write the folder; ranks do it together, and the writer writes.

    saes: as opened from config.saes. Parts that an earlier attempt finished in the folder are not done again. Raises
    UsageError where the SAEs do not fit the model or the folder is taken, and LegatoError where one of them cannot be
    judged: the folder then holds the others.
    """
    run = distributed.broadcast_from_rank0(lambda: RunDir.claim(out, config))
    run.settle_machine(config.model.dtype)
    model = load_model(config.model, config.data.context_length, splice=bool(config.evaluation.ce_rows))
    tokens = distributed.broadcast_from_rank0(lambda: read_rows(config, saes, model))
    activations = harvest_rows(config, model, tokens)
    with distributed.held_by_rank0(run.locked(config)):
        checkpoint = Checkpoint(run.checkpoint, minutes=DEFAULT_MINUTES, interrupts=Interrupts())
        checkpoint.start(activations.key, lambda: run.begin(config, activations.provenance))
        bank = _bank(config, saes, run, checkpoint)
        evaluate_arms(config.evaluation, bank, activations, model, run, checkpoint)
        if not distributed.is_rank0():
            return run
        build_outputs(run.root)
        write_checksums(run.root)
        checkpoint.discard()
    if bank.failures:
        reasons = "; ".join(bank.failures.values())
        raise LegatoError(f"{len(bank.failures)} of {len(saes)} SAEs cannot be judged ({reasons}): see {run.root}")
    return run


def _bank(config: EvaluateConfig, saes: Mapping[str, SparseAutoencoder], run: RunDir, checkpoint: Checkpoint) -> Bank:
    """The SAEs, with a copy of each in the run, but for those that an earlier attempt could not judge."""
    failed = checkpoint.progress.failed
    bank = Bank({}, {name: failure["reason"] for name, failure in failed.items()})
    for name, arm in judged_arms(config, saes).items():
        sae = saes[name]
        if name in failed:
            if distributed.is_rank0():  # where that attempt was cut off before it moved it
                run.fail_sae(name, **failed[name])
            continue
        if distributed.is_rank0():
            sae.save(run.sae(name))
        steps = (sae.details.get("training") or {}).get("steps")
        bank.trained[name] = TrainedArm(arm, sae, {"training_steps": steps, "source": config.saes[name]})
    if not bank.trained:
        checkpoint.discard()  # the next attempt begins anew
        raise LegatoError(f"no SAE could be judged: {next(iter(bank.failures.values()))}")
    return bank


def read_rows(config: EvaluateConfig, saes: Mapping[str, SparseAutoencoder], model: LanguageModel) -> TokenSet:
    """The rows to judge on: of all documents, or of those that a run with the same share held out. UsageError where an
    SAE does not fit the model."""
    assert config.model.layer is not None
    width = model.site(config.model.layer, config.model.site).width
    for name, sae in saes.items():
        if sae.d_in != width:
            raise UsageError(
                f"{name} takes activations of width {sae.d_in}, those of {model.name} have {width}: "
                "name the model that it was trained on with --model"
            )
    data, evaluation = config.data, config.evaluation
    wanted = evaluation.eval_rows * data.context_length
    characters = int(CHARACTERS_PER_TOKEN * wanted / (config.held_out or 1))
    found = load_documents(data.dataset, max_stream_characters=characters, text_column=data.text_column)
    documents = list(found) if config.held_out is None else split_held_out(found, config.held_out)[1]
    tokens = tokenise(documents, model.tokenizer, context_length=data.context_length, max_tokens=wanted)
    which = "all of it" if config.held_out is None else f"the {config.held_out:.0%} that training holds out"
    log(f"text: {data.dataset}, {which}: {tokens.n_valid:,} tokens in {len(tokens):,} contexts")
    return tokens


def harvest_rows(config: EvaluateConfig, model: LanguageModel, tokens: TokenSet) -> Activations:
    layer, site = config.model.layer, config.model.site
    assert layer is not None
    with progress_bar("harvest", len(tokens)) as progress:
        store: ActivationStore = harvest(model, tokens, layer=layer, site=site, progress=progress)
    provenance = {
        **origin(model, config.data, layer=layer, site=site, bos=tokens.bos),
        "held_out_tokens": store.n_valid,
        "outliers_masked": store.n_outliers,
    }
    return Activations(store, store, store.n_valid, layer, provenance)


def judged_arms(config: EvaluateConfig, saes: Mapping[str, SparseAutoencoder]) -> dict[str, Arm]:
    """Decide the arm of each SAE: as the command line says, else as it says itself, else a method of its own.

    One of Legato's says its method, k and seed; those of two runs that say the same are methods of their own. The
    baseline is the method `baseline`, else that of the first SAE. An SAE at another k than its method's own belongs to
    the method's sweep where that own SAE is there too. recipe["sources"]: where the SAEs of the method lie, so that
    equal names in two folders are one method only if they are the same SAEs.
    """
    objectives = {name: dict(sae.details.get("objective") or {}) for name, sae in saes.items()}
    older = older_identities({name: {"training": {"recipe": found}} for name, found in objectives.items()})
    said = {}
    for name, found in objectives.items():
        own = {**older[name], **found}
        one = config.stated.get(name) or Stated(own["method"], own.get("k"), swept=own["role"] == "sweep")
        said[name] = dataclasses.replace(one, seed=int(found.get("seed") or 0)) if one.seed is None else one
    alike = Counter(said.values())
    said = {name: one if alike[one] == 1 else Stated(name, seed=one.seed) for name, one in said.items()}
    mains = {one.method for one in said.values() if not one.swept}
    said = {name: one if one.method in mains else Stated(name, one.k, one.seed) for name, one in said.items()}
    first = next(iter(said.values())).method
    baseline = "baseline" if "baseline" in mains else first
    arms = {}
    for name, one in said.items():
        objective, sae = objectives[name], saes[name]
        k = objective.get("k") or getattr(sae.architecture, "k", None) or None if one.k is None else one.k
        sources = sorted(source for other, source in config.saes.items() if said[other].method == one.method)
        recipe = {"architecture": sae.architecture.name, **objective, "d_sae": sae.d_sae, "k": k, "sources": sources}
        role = "sweep" if one.swept else "baseline" if one.method == baseline else "named"
        group = f"{one.method}_k{k:g}" if one.swept else one.method
        arms[name] = Arm(name, group, one.method, role, one.seed or 0, recipe=recipe)
    return arms


SAID = "(default: what the SAE says)"


@record
class Place:
    """The model, its layer and the text whose activations an SAE is given."""

    model: str | None = option(None, f"the language model: a hub id, a local folder, 'demo' {SAID}")
    layer: int | None = option(None, f"decoder layer, from 0 {SAID}", ge=0)
    site: Name | None = option(None, f"{SITE} {SAID}")
    dtype: DType = option("auto", "dtype of the model: auto, bfloat16 or float32")
    dataset: str | None = option(None, "the text: 'demo', a file, a folder, a hub id (default: the SAE's, or demo)")
    text_column: str = option("text", "column that holds the text")
    context_length: int | None = option(None, f"tokens per context {SAID}", ge=8)
    rows: int = option(64, "contexts to use", ge=2)
    held_out: float | None = option(
        None,
        "use the share of documents that experiment.py holds out with this share (default: that of experiment.py where "
        "it trained the SAE on this text, else all documents)",
        gt=0,
        lt=1,
    )

    def opened(
        self, specifications: Sequence[str], *, ce_rows: int = 0
    ) -> tuple[dict[str, SparseAutoencoder], EvaluateConfig]:
        """The SAEs that were asked for, and where they are judged: as asked, else as the SAEs say."""
        found = named(specifications)
        sources = {name: source for name, (source, _) in found.items()}
        saes = {name: SparseAutoencoder.load(source) for name, source in sources.items()}
        details = [sae.details for sae in saes.values()]

        def first(key: str) -> Any:
            return next((each[key] for each in details if each.get(key) is not None), None)

        if self.layer is None and self.site is not None:
            raise UsageError("--site needs the layer too: add --layer")
        layer, site = (self.layer, self.site or "resid_post")
        if layer is None:
            layer, site = _agreed("layer", {name: sae.place() for name, sae in saes.items()})
        model = self.model or _agreed("model", {name: _model_of(sae) for name, sae in saes.items()})
        dataset = self.dataset or first("dataset") or "demo"
        held_out = self.held_out
        if held_out is None and any("objective" in each and each.get("dataset") == dataset for each in details):
            held_out = first("held_out") or DataConfig().held_out
        if held_out is not None and not 0 < held_out < 1:
            raise UsageError(f"--held_out {held_out} is no share of the text: use one between 0 and 1")
        context_length = self.context_length or int(first("context_length") or DataConfig().context_length)
        config = EvaluateConfig(
            sources,
            ModelConfig(model, layer, site, self.dtype),
            DataConfig(dataset, self.text_column, context_length),
            held_out,
            EvaluationConfig(self.rows, ce_rows, controls=()),
            {name: sha256_of(sae.stored()) for name, sae in saes.items()},
            {name: stated for name, (_, stated) in found.items() if stated is not None},
        )
        return saes, config


@record
class Evaluate(Place, Task):
    """Judge saved SAEs on a model and a text."""

    saes: tuple[str, ...] = words(
        "saved SAEs of any format that legato reads; the first is what the others are compared with. NAME:k16 says "
        "that an SAE is NAME at another sparsity, NAME:seed1 another seed",
        "[NAME=]SAE",
    )
    rows: int = option(512, "contexts to use", ge=2)
    ce_rows: int = option(24, "contexts for the language model's loss; 0: none", ge=0)
    out: Path | None = option(None, "new folder for the results (default: judged_<name>)")

    go_on: ClassVar[str] = "the same command goes on where it stopped"

    @distributed.process_group()
    def run(self, interrupts: Interrupts) -> None:
        saes, config = distributed.rank0_first(lambda: self.opened(self.saes, ce_rows=self.ce_rows))
        out = self.out or Path(f"judged_{next(iter(saes))}")
        try:
            run = evaluate_saved(config, saes, out)
        finally:
            if distributed.is_rank0() and (out / "notes.txt").is_file():
                print(f"\n{results_table(SavedRun.open(out))}")
        log(f"\nresults: {run.root}/  report: {run.root / 'report.html'}")


def named(specifications: Sequence[str]) -> dict[str, tuple[str, Stated | None]]:
    """Read specifications: the place of each SAE and the facts stated about it, by name.

    NAME=SAE, NAME:k16=SAE for the method NAME at another sparsity, NAME:seed1=SAE for another seed of it; or SAE, whose
    name is the last part of where it lies, with as many parts before it as tell them apart.
    """
    given = [_split(specification) for specification in specifications]
    for depth in range(1, 5):
        names = [name or "_".join(Path(source).parts[-depth:]) for name, source, _ in given]
        if len(set(names)) == len(names):
            break
    else:
        raise UsageError(
            "two SAEs have the same name: name them, as in first=folder/a second=folder/b, or mine=folder/a "
            "mine:seed1=folder/b"
        )
    if bad := [name for name in names if not name.replace("-", "").replace("_", "").replace(".", "").isalnum()]:
        raise UsageError(f"{bad[0]!r} cannot name an SAE: use letters, digits, '_', '-' and '.', as in mine=folder/a")
    return {name: (source, stated) for name, (_, source, stated) in zip(names, given, strict=True)}


_FACTS = re.compile(r"(?P<method>[^:]*)(:k(?P<k>\d+(\.\d+)?))?(:seed(?P<seed>\d+))?")


def _split(specification: str) -> tuple[str, str, Stated | None]:
    """(its name, where it lies, what is said of it), the name empty where none is given."""
    said, equals, source = specification.partition("=")
    if not equals or os.path.exists(specification):  # unlike Path's, False for a name that is too long
        said, source = "", specification
    if not source:
        raise UsageError(f"{specification!r} names no SAE: give its folder or file")
    path = os.path.expanduser(source)
    source = os.path.realpath(path) if os.path.exists(path) else source
    facts = _FACTS.fullmatch(said)
    if facts is None:
        raise UsageError(f"{said!r} is not NAME, NAME:k16, NAME:seed1 or NAME:k16:seed1")
    if not said:
        return "", source, None
    method, k, seed = facts["method"], facts["k"], facts["seed"]
    stated = Stated(method, None if k is None else float(k), None if seed is None else int(seed), swept=k is not None)
    return seeded(f"{method}_k{k}" if k else method, int(seed or 0), first=0), source, stated


def _model_of(sae: SparseAutoencoder) -> str | None:
    """Return the model that an SAE states, by its hub id where it states a short name."""
    model = sae.details.get("model")
    return model if model is None or os.path.exists(model) else hub_name(model)


def _agreed(what: str, said: Mapping[str, Any]) -> Any:
    """Return the value that all SAEs state. UsageError where one states none, or they differ."""
    (first, value), *others = said.items()
    for name, other in said.items():
        if other is None:
            raise UsageError(f"{name} does not say which {what} it reads: add --{what}")
    for name, other in others:
        if other != value:
            raise UsageError(f"{first} reads {_shown(value)}, {name} {_shown(other)}: judge them one at a time")
    return value


def _shown(value: Any) -> str:
    return f"layer {value[0]} ({value[1]})" if isinstance(value, tuple) else str(value)
