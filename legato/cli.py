"""The command `legato`: what is done with finished runs and saved SAEs.  legato compare run_1

A subcommand is a record of its options that can be run. Its module is imported when it is called for: `--help` is there
at once.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from legato.common.command_line import CONTEXT, DEBUG, Command, call

COMMANDS = {  # name: (module, its record or command, what it does, as its docstring says)
    "check": ("report.commands", "Check", "Tell whether a run's files are as it wrote them."),
    "compare": ("report.commands", "Compare", "Set methods side by side at the baseline's L0 and FVU."),
    "evaluate": ("experiment.evaluate_saved", "Evaluate", "Judge saved SAEs on a model and a text."),
    "export": ("experiment.exchange", "Export", "Write an SAE in another tool's format."),
    "import": ("experiment.exchange", "Import", "Save another tool's SAE, or one of the hub, as Legato's."),
    "report": ("report.commands", "Report", "Build a run's tables, figures, notes and report again."),
    "run": ("experiment.command", "COMMAND", "Train SAEs on a model's activations, and judge them."),
    "saebench": ("experiment.exchange", "SAEBench", "Run sae-bench itself on a saved SAE."),
    "synthetic": ("synthetic.command", "Synthetic", "Train and judge SAEs where the truth is known."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        found = getattr(import_module(f"legato.{module}"), attribute)
        return found if isinstance(found, click.Command) else Command.of(cmd_name, found)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


_LEGATO = _Commands(
    "legato",
    help="Train SAEs that hold across tokens; judge, compare and report SAEs and runs.",
    params=[DEBUG],
    context_settings=CONTEXT,
    no_args_is_help=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return call(_LEGATO, arguments, "legato")


if __name__ == "__main__":
    sys.exit(main())
