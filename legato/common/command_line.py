"""The words of a command line, taken apart by click, become the fields of records.

A command's options are its records' fields, with the help and the default of each.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import click
from pydantic.fields import FieldInfo

from legato.common.command import Interrupts, run_command
from legato.common.errors import UsageError
from legato.common.record import as_flag, fields_of


class Task(ABC):
    """A command with its options. go_on: what to do after a failure that was not the command's fault."""

    go_on: ClassVar[str] = ""

    @abstractmethod
    def run(self, interrupts: Interrupts) -> None: ...


DEBUG = click.Option(["--debug"], is_flag=True, expose_value=False, help="show the traceback of an error")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Command(click.Command):
    """Makes a task of the options that were given. records: by the title of their options in --help."""

    def __init__(self, name: str, text: str, make: Callable[..., Task], records: Mapping[str, type]) -> None:
        self.records = records
        fields = {key: field for each in records.values() for key, field in fields_of(each).items()}
        super().__init__(
            name,
            params=[DEBUG, *(_parameter(key, field) for key, field in fields.items())],
            callback=lambda **given: make(**{key: value for key, value in given.items() if value not in (None, ())}),
            help=text,
            context_settings=CONTEXT,
        )

    @classmethod
    def of(cls, name: str, task: type[Task]) -> "Command":
        """The command of a record that is a task, with its docstring as help."""
        return cls(name, task.__doc__ or "", task, {"Options": task})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params = {param.name: param for param in self.get_params(ctx)}
        for title, each in self.records.items():
            fields = fields_of(each)
            rows = [params.pop(key) for key in sorted(fields, key=lambda key: not fields[key].json_schema_extra)]
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (
                            (param.get_help_record(ctx) or [param.make_metavar(ctx)])[0],
                            _help_line(fields[str(param.name)]),
                        )
                        for param in rows
                    ]
                )
        with formatter.section("Help"):
            formatter.write_dl([record for param in params.values() if (record := param.get_help_record(ctx))])


def _parameter(key: str, field: FieldInfo) -> click.Parameter:
    if isinstance(field.json_schema_extra, dict):
        several = str(field.annotation).startswith("tuple")
        metavar = f"{field.json_schema_extra['metavar']}{'...' if several else ''}"
        return click.Argument([key], nargs=-1 if several else 1, required=field.is_required(), metavar=metavar)
    if field.annotation is bool:
        return click.Option([f"--{key}/--no-{key}" if field.default else f"--{key}"], is_flag=True, default=None)
    return click.Option([f"--{key}"], required=field.is_required(), metavar=key.upper())


def _help_line(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required():
        return f"{text} (required)"
    if field.annotation is bool or field.default in (None, "", ()):
        return text
    return f"{text} (default: {as_flag(field.default)})"


def call(command: click.Command, arguments: Sequence[str] | None, program: str) -> int:
    """Do what a command line asks for: 0 where it went well, 1 where it failed, 2 where it was called wrongly."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        task = command.main(given, program, standalone_mode=False)
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else program
        return _refused(f"{error.format_message().rstrip('.')}: see {path} --help")
    except UsageError as error:
        return _refused(str(error))
    if isinstance(task, int):  # --help
        return task
    return run_command(task.run, debug="--debug" in given, go_on=task.go_on)


def _refused(text: str) -> int:
    from legato.common.distributed import is_rank0  # and with it torch

    if is_rank0():
        print(f"error: {text}", file=sys.stderr)
    return 2
