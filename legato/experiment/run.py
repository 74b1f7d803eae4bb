"""The whole experiment, one call per stage:  legato run --out_dir=run_1   (python experiment.py is the same)"""

from functools import partial

from legato.common import distributed
from legato.common.command import Interrupts
from legato.common.errors import LegatoError
from legato.common.progress import Stopwatch, log
from legato.experiment.arms import planned_arms
from legato.experiment.checkpoint import Checkpoint
from legato.experiment.config import ExperimentConfig, RunOptions
from legato.experiment.estimate import expected_time
from legato.experiment.evaluate import evaluate_arms, post_hoc
from legato.experiment.inputs import harvest_activations, layer_of, load_model, read_text
from legato.experiment.train import train_arms
from legato.report.build import build_outputs
from legato.results.integrity import write_checksums
from legato.results.run_dir import RunDir, write_json
from legato.training.bank import check_shards


@distributed.process_group()
def run_experiment(config: ExperimentConfig, options: RunOptions, interrupts: Interrupts) -> None:
    if options.shard_latents:
        distributed.broadcast_from_rank0(lambda: check_shards(config.training.d_sae))
    run = distributed.broadcast_from_rank0(lambda: RunDir.claim(options.out_dir, config, resume=options.resume))
    run.settle_machine(config.model.dtype)
    watch = Stopwatch(run.read_timings() if run.is_unfinished else {})
    with watch.stage("model"):
        model = load_model(config.model, config.data.context_length, splice=bool(config.evaluation.ce_rows))
        width = model.site(layer_of(config.model, model), config.model.site).width
    planned = planned_arms(config, width)
    with watch.stage("text"):
        text = distributed.broadcast_from_rank0(lambda: read_text(config, model))
        log(expected_time(config, model, text, n_saes=len(planned), width=width))
    with watch.stage("activations"):
        activations = harvest_activations(config, model, text)
    with distributed.held_by_rank0(run.locked(config)):
        checkpoint = Checkpoint(run.checkpoint, minutes=options.checkpoint_minutes, interrupts=interrupts)
        checkpoint.start(activations.key, lambda: run.begin(config, activations.provenance))
        try:
            with watch.stage("training"):
                bank = train_arms(
                    planned,
                    config,
                    activations,
                    run,
                    checkpoint,
                    wandb=options.wandb,
                    shard_latents=options.shard_latents,
                )
            with watch.stage("evaluation"):
                controls = partial(post_hoc, config, bank, activations)
                evaluate_arms(config.evaluation, bank, activations, model, run, checkpoint, controls)
        finally:
            if distributed.is_rank0():
                write_json(run.timings, watch.seconds)
        if not distributed.is_rank0():
            return
        log("report: figures, notes and page")
        outputs = build_outputs(run.root)
        write_checksums(run.root)
        checkpoint.discard()
    log(outputs.notes.read_text())
    log(f"results: {run.root}/  report: {outputs.report}")
    if bank.failures:
        raise LegatoError(f"{len(bank.failures)} arms failed ({', '.join(bank.failures)}): see {run.root}/failed")
