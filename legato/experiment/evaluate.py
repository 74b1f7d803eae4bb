"""Evaluation stage of experiment.py, and the bank of trained arms that it takes."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch

from legato.common import distributed
from legato.common.errors import LegatoError
from legato.common.progress import log, progress_bar
from legato.data.activations import position_shuffled
from legato.data.language_model import LanguageModel
from legato.data.tokens import TokenSet, token_strings
from legato.evaluation.controls import Control, post_hoc_control
from legato.evaluation.latents.examples import shown, write_strips, write_text
from legato.evaluation.latents.logits import top_and_bottom_logits
from legato.evaluation.latents.neighbours import OtherSAE
from legato.evaluation.latents.table import write_features
from legato.evaluation.one_pass import evaluate
from legato.evaluation.position.shift_test import SHIFTS, offset_test
from legato.evaluation.redundancy.pairs import redundancy
from legato.evaluation.redundancy.table import write_redundancy
from legato.evaluation.sums.code_buffer import CodeBuffer, coded
from legato.experiment.arms import Arm, seeded
from legato.experiment.checkpoint import Checkpoint
from legato.experiment.config import EvaluationConfig, ExperimentConfig
from legato.experiment.inputs import Activations
from legato.interop.saebench_file import write_core_file
from legato.results.run_dir import RunDir
from legato.sae.autoencoder import SparseAutoencoder
from legato.sae.protocol import EvaluableSAE

T = TypeVar("T")
CALIBRATION_BATCHES = 8
BOOTSTRAP_REPLICATES = 200
CONTROL_ROWS = 32
REDUNDANCY_ROWS = 1024
OFFSET_ROWS = 16
VOCABULARY_ROWS = 16_384  # contexts of the training text whose tokens can be promoted ones
CONTROL_KEYS = ("kappa1", "kappa1_excess_within", "ac1", "ac1_excess_within")


@dataclass(frozen=True)
class TrainedArm:
    """A trained arm. training: its section of metrics.json, without the recipe, which `arm` holds."""

    arm: Arm
    sae: SparseAutoencoder
    training: dict[str, Any]


@dataclass(frozen=True)
class Bank:
    """The trained arms by name, and the reason for each that failed, in training or evaluation."""

    trained: dict[str, TrainedArm]
    failures: dict[str, str]

    def fail(self, failures: Mapping[str, str], run: RunDir, checkpoint: Checkpoint) -> None:
        """Move SAEs that cannot be judged to the failed ones, on disk too; only report a control."""
        checkpoint.finish_evaluation(failures)
        for name, reason in failures.items():
            log(f"  dropped {reason}")
            self.failures[name] = reason
            arm = self.trained.pop(name, None)
            if arm is not None and distributed.is_rank0():
                run.fail_sae(name, arm.training["training_steps"], reason)


def evaluate_arms(
    config: EvaluationConfig,
    bank: Bank,
    activations: Activations,
    model: LanguageModel,
    run: RunDir,
    checkpoint: Checkpoint,
    controls: Callable[[], Mapping[str, tuple[Arm, Control]]] = dict,
) -> None:
    """Judge every SAE on the held-out side in one pass and save the numbers; an SAE that cannot be judged fails.

    Several ranks judge a share each, or all together where there are fewer SAEs than ranks; the writer saves.
    controls: rows that were not trained, by name. Parts that an earlier attempt finished come from the checkpoint;
    nothing is done if all are finished.
    """
    if checkpoint.progress.evaluated:
        return
    log(f"evaluation: {activations.held_out.n_valid:,} held-out tokens")
    untrained = controls()
    arms = {name: trained.arm for name, trained in bank.trained.items()}
    arms |= {name: arm for name, (arm, _) in untrained.items()}
    judged: dict[str, EvaluableSAE] = {name: trained.sae for name, trained in bank.trained.items()}
    judged |= {name: control.judged for name, (_, control) in untrained.items()}
    found = checkpoint.part("judged", lambda: _judged(judged, activations, model, config.ce_rows))
    results, failures = found["results"], found["failures"]
    if not results:
        bank.fail(failures, run, checkpoint)
        raise LegatoError(f"no SAE could be judged: {next(iter(failures.values()))}")
    # What follows is for the arms that the comparison is about.
    compared = {name: judged[name] for name in results if arms[name].role != "grid"}
    for name, shuffled in checkpoint.part("shuffled", lambda: _shuffled(compared, activations)).items():
        results[name]["consistency"]["position_shuffled"] = shuffled
    for name, offset in checkpoint.part("offset", lambda: _offsets(compared, activations, model)).items():
        results[name]["offset"] = offset["section"]
        results[name]["features"]["offset_jaccard"] = offset["jaccard_F"]
    firing = {name: results[name]["features"]["density"] > 0 for name in sorted(compared.keys() & bank.trained.keys())}
    for name, section in _redundancies(firing, bank, activations, model, run, checkpoint).items():
        results[name]["redundancy"] = section
    if not distributed.is_rank0():
        return
    _add_specialisation({arms[name]: results[name] for name in compared if name in bank.trained}, model)
    training = {name: trained.training for name, trained in bank.trained.items()}
    training |= {name: control.training for name, (_, control) in untrained.items()}
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
                dataset=activations.provenance["dataset"],
                context_size=activations.provenance["context_length"],
                sae_cfg_dict=json.loads((run.sae(name) / "cfg.json").read_text()),
            )
        result["core"].pop("saebench", None)
        write_features(run.features / f"{name}.parquet", result.pop("features"))
        run.write_arrays(name, result.pop("arrays"))
        metrics[name] = {**result, "training": {**training[name], "recipe": arms[name].saved()}}
    run.write_metrics(metrics)
    bank.fail(failures, run, checkpoint)


def _judged(
    saes: Mapping[str, EvaluableSAE], activations: Activations, model: LanguageModel, ce_rows: int
) -> dict[str, Any]:
    """Judge SAEs in one pass over the held-out side; return {"results", "failures"}, each by name."""
    failures: dict[str, str] = {}
    own, together = _divided(saes)
    with progress_bar("evaluate", activations.held_out.n_rows + len(own)) as progress:
        results = own and evaluate(
            own,
            activations.held_out,
            language_model=model if ce_rows else None,
            layer=activations.layer,
            site=activations.provenance["site"],
            ce_rows=ce_rows,
            bootstrap=BOOTSTRAP_REPLICATES,
            together=together,
            failures=failures,
            progress=progress,
        )
    ranks = distributed.gather_dicts({"results": results, "failures": failures})
    in_order = {name: ranks["results"][name] for name in saes if name in ranks["results"]}
    return {"results": in_order, "failures": ranks["failures"]}


def _redundancies(
    firing: Mapping[str, Any],
    bank: Bank,
    activations: Activations,
    model: LanguageModel,
    run: RunDir,
    checkpoint: Checkpoint,
) -> dict[str, dict[str, Any]]:
    """Make the section `redundancy` of each SAE, on one rank, and write its tables and the files for the report's
    feature browser, from the same codes. firing: latents that fire, [F] by name."""
    vocabulary_V = torch.unique(activations.train.first_tokens(VOCABULARY_ROWS))
    arms = [bank.trained[name].arm for name in firing]
    others = {name: OtherSAE(bank.trained[name].sae.W_dec, fires_F) for name, fires_F in firing.items()}

    decode = partial(token_strings, model.tokenizer)

    def section(name: str) -> dict[str, Any]:
        sae, partners = bank.trained[name].sae, _partners(bank.trained[name].arm, arms)
        kept = CodeBuffer.of(coded(sae, activations.held_out.batches(CONTROL_ROWS, seed=None)), REDUNDANCY_ROWS)
        redundant = redundancy(kept, sae.W_dec, decode=decode)
        write_redundancy(run.redundancy, name, redundant)
        text, order = shown(kept)
        if distributed.is_rank0() and not run.shown_text.is_file():
            write_text(run.shown_text, text, decode)
        logits = None  # only directions of the residual stream have some
        if sae.d_in == model.d_model and model.can_unembed:
            logits = top_and_bottom_logits(model, sae.W_dec, vocabulary_V, decode)
        matched = {partner: others[partner] for partner in partners}
        write_strips(run.strips / f"{name}.parquet", order, text, sae.W_dec, others=matched, logits=logits)
        return redundant.metrics

    own: dict[str, dict[str, Any]] = {}
    with progress_bar("redundancy and passages", len(_own(others))) as progress:
        for done, name in enumerate(_own(others), 1):
            own[name] = checkpoint.part(f"redundancy_{name}", partial(section, name), alone=True)
            progress(done)
    return distributed.gather_dicts(own)


def _own(members: Mapping[str, T]) -> dict[str, T]:
    """Return this rank's share."""
    return {name: members[name] for name in distributed.shard(list(members))}


def _divided(members: Mapping[str, T]) -> tuple[dict[str, T], bool]:
    """Return the members that this rank judges, and True if all ranks judge them together."""
    together = len(members) < distributed.world_size()
    return dict(members) if together else _own(members), together


def _shuffled(compared: Mapping[str, EvaluableSAE], activations: Activations) -> dict[str, dict[str, float]]:
    """Measure persistence on activations in shuffled order, for the SAEs that still fire there."""
    failures: dict[str, str] = {}
    batches = position_shuffled(activations.held_out.batches(CONTROL_ROWS, seed=None))
    own, together = _divided(compared)
    with progress_bar("in shuffled order", activations.held_out.n_rows + len(own)) as progress:
        found = evaluate(own, batches, together=together, failures=failures, progress=progress) if own else {}
    for reason in distributed.gather_dicts(failures).values():
        log(f"  no shuffled control of {reason}")
    shuffled = {
        name: {
            "l0": result["core"]["l0"],
            "fvu": result["core"]["fvu"],
            **{key: result["consistency"][key] for key in CONTROL_KEYS},
        }
        for name, result in found.items()
    }
    return distributed.gather_dicts(shuffled)


def _partners(arm: Arm, arms: Iterable[Arm]) -> list[str]:
    """List the arms of its seed to match an arm's latents with: the baseline, or for the baseline all others."""
    others = [other for other in arms if other.seed == arm.seed and other.name != arm.name]
    return sorted(other.name for other in others if "baseline" in (arm.role, other.role))


def _offsets(
    compared: Mapping[str, EvaluableSAE], activations: Activations, model: LanguageModel
) -> dict[str, dict[str, Any]]:
    """Run the offset test on the first held-out rows, with the shifts that the model's context has room for."""
    shifts = [shift for shift in SHIFTS if shift <= model.max_context // 2]
    first = next(activations.held_out.batches(OFFSET_ROWS, seed=None))
    tokens = TokenSet(first.tokens_BL, first.mask_BL, first.doc_BL, bos=activations.provenance["bos"])
    own = _own(compared)
    log("  offset test: the same text at other positions")
    if not shifts or not bool(first.mask_BL.any()):
        return {}
    found = own and offset_test(
        own,
        model,
        tokens,
        layer=activations.layer,
        site=activations.provenance["site"],
        shifts=shifts,
        rows=OFFSET_ROWS,
    )
    return distributed.gather_dicts({name: vars(result) for name, result in found.items()})


def _add_specialisation(results: Mapping[Arm, dict[str, Any]], model: LanguageModel) -> None:
    """Add the kinds of latents of the trained arms, in clusters that they share."""
    if not results:
        return
    # scikit-learn takes a second that --help need not wait
    from legato.evaluation.specialisation.kinds import specialise

    recipes: dict[str, list[str]] = {}
    for arm in results:
        recipes.setdefault(arm.group, []).append(arm.name)
    specialised = specialise(
        {arm.name: result["features"] for arm, result in results.items()},
        next(iter(results.values()))["core"]["tokens"],
        same_recipe=list(recipes.values()),
        decode=lambda token: token_strings(model.tokenizer, [token])[0],
    )
    for arm, result in results.items():
        result["specialisation"] = specialised[arm.name].section
        result["features"] |= specialised[arm.name].columns


def post_hoc(config: ExperimentConfig, bank: Bank, activations: Activations) -> dict[str, tuple[Arm, Control]]:
    """Make the controls of the baselines, and of plain TopK, without training; return them by name."""
    bases = {
        trained.arm: trained.sae
        for trained in bank.trained.values()
        if trained.arm.role == "baseline" or (trained.arm.method == "topk" and trained.arm.role != "sweep")
    }
    calibration = list(islice(activations.train.batches(config.training.batch_rows, seed=None), CALIBRATION_BATCHES))
    k, release, first = config.training.k, config.arms.release, config.training.seeds[0]
    found = {}
    for kind in config.evaluation.controls:
        for base, sae in bases.items():
            control = post_hoc_control(kind, sae, calibration, k=k, release=release)
            if control is None:
                continue
            group = f"{base.group}_{kind}"
            recipe = {"k": k, "d_sae": sae.d_sae}
            arm = Arm(seeded(group, base.seed, first), group, group, "control", base.seed, recipe=recipe)
            training = {"post_hoc": {"of": base.name, **control.training["post_hoc"]}}
            found[arm.name] = (arm, replace(control, training=training))
    return found
