"""The stages of experiment.py, each from its config and what the stage before it gives."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import psutil

from legato.activations import ActivationStore, ActivationStream, Normaliser, harvest
from legato.config import DataConfig, ExperimentConfig
from legato.errors import LegatoError, UsageError
from legato.evaluation.controls import Control, position_shuffled, post_hoc_controls
from legato.evaluation.evaluate import evaluate
from legato.evaluation.features import write_features
from legato.evaluation.judge import Judged
from legato.evaluation.offset import SHIFTS, OffsetResult, offset_test
from legato.evaluation.redundancy import coded, redundancy
from legato.evaluation.redundancy_table import write_redundancy
from legato.evaluation.specialisation import specialise
from legato.hardware import fast_matmul_dtype
from legato.interop.saebench import write_core_file
from legato.language_model import LanguageModel
from legato.recipes import arms, grid_name, is_baseline, recipe
from legato.run_dir import RunDir, environment
from legato.sae import SparseAutoencoder
from legato.text import load_documents, split_held_out
from legato.tokens import TokenSet, tokenise
from legato.tracking import RunLog, progress_bar, say
from legato.train import (
    ArmConfig,
    BankResult,
    NoMemberLeftError,
    SAETrainer,
    TrainBatch,
    TrainConfig,
    bank_bytes,
    train_bank,
)

CALIBRATION_BATCHES = 8
CHARACTERS_PER_TOKEN = 6  # of a hub stream, to be on the safe side: English has some 4.5
BOOTSTRAP_REPLICATES = 200
CONTROL_ROWS = 32
OFFSET_ROWS = 16
CONTROL_KEYS = ("kappa1", "kappa1_excess_within", "ac1", "ac1_excess_within")
DEAD_AFTER_TOKENS, DEAD_AFTER_SHARE = 250_000, 0.02  # silence that makes a latent dead: in tokens, or of a short run
MEMORY_SHARE = 0.6  # of what is free, for training; the rest is left to the store's page cache and to evaluation


@dataclass(frozen=True)
class Text:
    """Disjoint documents as rows of tokens."""

    train: TokenSet
    held_out: TokenSet


@dataclass(frozen=True)
class Activations:
    """Activations of both sides, those to train on stored or computed as they are asked for; n_valid: valid positions
    of one pass over them; provenance says what was read where."""

    train: ActivationStore | ActivationStream
    held_out: ActivationStore
    n_valid: int
    layer: int
    provenance: dict[str, Any]


@dataclass(frozen=True)
class TrainedArm:
    sae: SparseAutoencoder
    training: dict[str, Any]


def load_model(config: ExperimentConfig) -> LanguageModel:
    """The frozen language model, checked against the layer and context asked for."""
    model = LanguageModel.load(config.model.model, dtype=config.model.dtype)
    if config.data.context_length > model.max_context:
        raise UsageError(
            f"--context_length {config.data.context_length} is longer than {model.name} allows ({model.max_context})"
        )
    model.module_path(layer_of(config, model), config.model.site)
    arms(config, model.d_model)  # tells early of arms that cannot be made
    say(f"model: {model.name}, {model.n_layers} layers, width {model.d_model}, {model.dtype}")
    return model


def layer_of(config: ExperimentConfig, model: LanguageModel) -> int:
    return model.n_layers // 2 if config.model.layer is None else config.model.layer


def read_text(config: ExperimentConfig, model: LanguageModel) -> Text:
    """Train and held-out tokens from disjoint documents."""
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
    say(
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
    """Both sides' activations, from the cache where an earlier run left them."""
    layer, site = layer_of(config, model), config.model.site

    def stored(name: str, tokens: TokenSet) -> ActivationStore:
        with progress_bar(name, len(tokens)) as progress:
            return harvest(model, tokens, layer=layer, site=site, progress=progress)

    train: ActivationStore | ActivationStream
    if config.data.store:
        train = stored("harvest", text.train)
        n_valid, n_outliers = train.n_valid, train.n_outliers
    else:  # the same batches, as they are needed; outliers are found as they come
        train = ActivationStream(model, text.train, layer=layer, site=site)
        n_valid, n_outliers = text.train.n_valid, 0
    held_out = stored("harvest held-out", text.held_out)
    n_outliers += held_out.n_outliers
    say(
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
    """Where activations come from, as it is saved with what is made of them."""
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


@dataclass(frozen=True)
class Bank:
    """The trained arms by name, and what became of those that failed, in training or when they were judged."""

    trained: dict[str, TrainedArm]
    failures: dict[str, str]

    def fail(self, name: str, reason: str, run: RunDir) -> None:
        """Move an SAE that cannot be judged to the failed ones, on disk too; a control is only reported."""
        say(f"  dropped {reason}")
        self.failures[name] = reason
        arm = self.trained.pop(name, None)
        if arm is not None:
            run.fail_sae(name, arm.training["training_steps"], reason)


def train_arms(config: ExperimentConfig, activations: Activations, run: RunDir) -> Bank:
    """Train the bank on shared batches and save every SAE; in several passes where it would not fit in memory."""
    training, source = config.training, activations.train
    tokens_per_step = training.batch_rows * activations.n_valid / source.n_rows
    steps = math.ceil(training.tokens / tokens_per_step)
    dead_after = min(DEAD_AFTER_TOKENS, int(DEAD_AFTER_SHARE * training.tokens))
    train_config = TrainConfig(steps=steps, lr=training.lr, dead_after_tokens=dead_after, aux_k=source.d_in // 2)
    normaliser = Normaliser.fit(source)
    passes = split_to_fit(arms(config, source.d_in), source.d_in, training.batch_rows * source.context_length)
    say(
        f"training: {sum(map(len, passes))} SAEs of {training.d_sae:,} latents in {len(passes)} pass(es), "
        f"{steps} steps of {tokens_per_step:,.0f} tokens"
    )
    # Contexts in stored order: the same ones for every arm, whatever the seed.
    calibration = [
        TrainBatch.of(batch, normaliser, fast_matmul_dtype())
        for batch in islice(source.batches(training.batch_rows, seed=None), CALIBRATION_BATCHES)
    ]
    bank = Bank({}, {})
    for members in passes:
        batches = source.batches(training.batch_rows, seed=min(training.seeds), epochs=None, drop_last=True)
        with RunLog(run.log, run.tensorboard) as log, progress_bar("train", steps) as progress:
            try:
                result = train_bank(members, batches, normaliser, train_config, log=log, progress=progress)
            except NoMemberLeftError as error:  # of this pass; the others may be well
                result = BankResult([], error.failed)
        for trainer in result.finished:
            details = {
                **activations.provenance,
                "arm": trainer.arm.name,
                "objective": recipe(trainer.arm),
                "training": {**dataclasses.asdict(train_config), "batch_rows": training.batch_rows},
                "environment": environment(),
            }
            sae = dataclasses.replace(trainer.finish(normaliser, calibration), details=details)
            sae.save(run.sae(trainer.arm.name))
            bank.trained[trainer.arm.name] = TrainedArm(sae, _training_metrics(trainer, activations.n_valid))
        for trainer, reason in result.failed:
            run.write_failure(trainer.arm.name, dict(trainer.parameters.items()), trainer.steps_done, reason)
            bank.failures[trainer.arm.name] = reason
            say(f"  dropped {reason}")
    if not bank.trained:
        raise LegatoError(f"no SAE was trained: {next(iter(bank.failures.values()))}")
    return bank


def split_to_fit(bank: Sequence[ArmConfig], d_in: int, tokens_per_batch: int) -> list[list[ArmConfig]]:
    """The bank in as few passes as fit into 60 % of the free memory; says what it needs."""
    free = psutil.virtual_memory().available
    needs = bank_bytes(bank, d_in, tokens_per_batch)
    say(f"memory: the bank needs {sum(needs) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    passes: list[list[ArmConfig]] = [[]]
    used = 0
    for arm, need in zip(bank, needs, strict=True):
        if need > MEMORY_SHARE * free:
            raise LegatoError(f"{arm.name} needs {need / 2**30:.1f} GiB to train: lower --d_sae or free memory")
        if used + need > MEMORY_SHARE * free:
            passes.append([])
            used = 0
        passes[-1].append(arm)
        used += need
    return passes


def evaluate_arms(
    config: ExperimentConfig,
    bank: Bank,
    activations: Activations,
    model: LanguageModel,
    run: RunDir,
) -> None:
    """Judge every SAE on the held-out side in one pass and save the numbers; what cannot be judged fails."""
    say(f"evaluation: {activations.held_out.n_valid:,} held-out tokens")
    controls = _controls(config, bank, activations)
    judged: dict[str, Judged] = {name: arm.sae for name, arm in bank.trained.items()}
    judged |= {name: control.judged for name, control in controls.items()}
    failures: dict[str, str] = {}
    with progress_bar("evaluate", activations.held_out.n_rows) as progress:
        results = evaluate(
            judged,
            activations.held_out,
            language_model=model if config.evaluation.ce_rows else None,
            layer=activations.layer,
            site=config.model.site,
            ce_rows=config.evaluation.ce_rows,
            bootstrap=BOOTSTRAP_REPLICATES,
            failures=failures,
            progress=progress,
        )
    for name, reason in failures.items():
        bank.fail(name, reason, run)
    if not results:
        raise LegatoError(f"no SAE could be judged: {next(iter(failures.values()))}")
    # The control for persistence that an SAE makes by itself, for the arms that the comparison is about.
    compared = {name: judged[name] for name in results if not _is_grid_member(name, config)}
    without: dict[str, str] = {}
    shuffled_batches = position_shuffled(activations.held_out.batches(CONTROL_ROWS, seed=None))
    control = evaluate(compared, shuffled_batches, failures=without) if compared else {}
    for name, result in control.items():
        shuffled = {"l0": result["core"]["l0"], "fvu": result["core"]["fvu"]}
        shuffled |= {key: result["consistency"][key] for key in CONTROL_KEYS}
        results[name]["consistency"]["position_shuffled"] = shuffled
    for reason in without.values():
        say(f"  no shuffled control of {reason}")
    for name, offset in _offsets(compared, activations, model, config.model.site).items():
        results[name]["offset"] = offset.section
        results[name]["features"]["offset_jaccard"] = offset.jaccard_F
    for name in sorted(compared.keys() & bank.trained.keys()):
        sae = bank.trained[name].sae
        held_out = activations.held_out.batches(CONTROL_ROWS, seed=None)
        redundant = redundancy(coded(sae, held_out), sae.W_dec, decode=partial(_token_strings, model))
        results[name]["redundancy"] = redundant.metrics
        write_redundancy(run.redundancy, name, redundant)
    _add_specialisation({name: results[name] for name in compared if name in bank.trained}, model)
    metrics = {}
    for name, result in results.items():
        if "saebench" in result["core"] and name in bank.trained:
            write_core_file(
                run.eval_results,
                run.release,
                name,
                result,
                model_name=model.name,
                llm_dtype=str(model.dtype).removeprefix("torch."),
                dataset=config.data.dataset,
                context_size=config.data.context_length,
                sae_cfg_dict=json.loads((run.sae(name) / "cfg.json").read_text()),
            )
        result["core"].pop("saebench", None)
        write_features(run.features / f"{name}.parquet", result.pop("features"))
        run.write_arrays(name, result.pop("arrays"))
        training = controls[name].training if name in controls else bank.trained[name].training
        metrics[name] = {**result, "training": training}
    run.write_metrics(metrics)


def _token_strings(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    return [str(model.tokenizer.decode([number])) for number in ids]


def _offsets(
    compared: Mapping[str, Judged], activations: Activations, model: LanguageModel, site: str
) -> dict[str, OffsetResult]:
    """The offset test on the first held-out rows, with the shifts that the model's context has room for."""
    shifts = [shift for shift in SHIFTS if shift <= model.max_context // 2]
    first = next(activations.held_out.batches(OFFSET_ROWS, seed=None))
    tokens = TokenSet(first.tokens_BL, first.mask_BL, first.doc_BL, bos=activations.provenance["bos"])
    if not shifts or not bool(first.mask_BL.any()):
        return {}
    return offset_test(compared, model, tokens, layer=activations.layer, site=site, shifts=shifts, rows=OFFSET_ROWS)


def _add_specialisation(results: Mapping[str, dict[str, Any]], model: LanguageModel) -> None:
    """The kinds of latents of the trained arms, in clusters that they share."""
    if not results:
        return
    recipes: dict[str, list[str]] = {}
    for name in results:
        recipes.setdefault(name.split("_seed")[0], []).append(name)
    specialised = specialise(
        {name: result["features"] for name, result in results.items()},
        next(iter(results.values()))["core"]["tokens"],
        same_recipe=list(recipes.values()),
        decode=lambda token: str(model.tokenizer.decode([token])),
    )
    for name, one in specialised.items():
        results[name]["specialisation"] = one.section
        results[name]["features"] |= one.columns


def _controls(config: ExperimentConfig, bank: Bank, activations: Activations) -> dict[str, Control]:
    """The controls that are made of the baselines, and of plain TopK, without training."""
    bases = {
        name: (arm.sae, int(arm.training["recipe"]["seed"]))
        for name, arm in bank.trained.items()
        if is_baseline(name) or name.split("_seed")[0] == "topk"
    }
    calibration = islice(activations.train.batches(config.training.batch_rows, seed=None), CALIBRATION_BATCHES)
    return post_hoc_controls(
        config.evaluation.controls, bases, list(calibration), k=config.training.k, release=config.arms.release
    )


def _is_grid_member(name: str, config: ExperimentConfig) -> bool:
    return any(name.startswith(f"{grid_name(*point)}") for point in config.arms.grid_points)


def _training_metrics(trainer: SAETrainer, n_valid: int) -> dict[str, Any]:
    if not math.isfinite(trainer.final_loss):
        raise LegatoError(f"{trainer.arm.name}: the final loss is {trainer.final_loss}: training failed")
    return {
        "training_steps": trainer.steps_done,
        "final_loss": trainer.final_loss,
        "tokens": trainer.tokens_seen,
        "epochs": trainer.tokens_seen / n_valid,
        "wall_seconds": trainer.seconds,
        "dead_at_end": int(trainer.dead_F.sum()),
        "recipe": recipe(trainer.arm),
    }
