"""The whole experiment, one call per stage:  python experiment.py --out_dir=run_1"""

import sys

from legato.comparison import write_matched
from legato.config import parse
from legato.errors import LegatoError, UsageError
from legato.experiment import ExperimentConfig, evaluate_arms, harvest_activations, load_model, read_text, train_arms
from legato.hardware import keep_freed_memory
from legato.notes import write_final_info, write_notes
from legato.report.ablation_table import write_ablation
from legato.report.figures import write_figures
from legato.report.html import write_report
from legato.run_dir import RunDir
from legato.tracking import say


def run_experiment(config: ExperimentConfig, out_dir: str) -> None:
    run = RunDir.claim(out_dir, config)
    model = load_model(config)
    text = read_text(config, model)
    activations = harvest_activations(config, model, text)
    run.begin(config, activations.provenance)
    bank = train_arms(config, activations, run)
    evaluate_arms(config, bank, activations, model, run)
    write_ablation(run.root)
    write_matched(run.root)
    write_figures(run.root)
    notes = write_notes(run.root)
    report = write_report(run.root)
    write_final_info(run.root)
    say(notes.read_text())
    say(f"results: {run.root}/  report: {report}")
    if bank.failures:
        raise LegatoError(f"{len(bank.failures)} arms failed ({', '.join(bank.failures)}): see {run.root}/failed")


def main(arguments: list[str]) -> int:
    try:
        config, out_dir, debug = parse(arguments)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep_freed_memory()
    try:
        run_experiment(config, out_dir)
    except LegatoError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where the harvest stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
