"""Records: what their values may be, and the one line of an error, for flags and for Python's arguments alike."""

from pathlib import Path
from typing import Annotated

import pytest

from legato.common.command import Interrupts
from legato.common.command_line import Command, Task, call
from legato.common.errors import UsageError
from legato.common.record import COMMAS, DIFFERENT, one_of, option, record, words


@record
class Settings(Task):
    """Say what was asked for."""

    size: int = option(3, "how many", ge=1)
    share: float = option(0.5, "of what", gt=0, lt=1)
    name: str = option("demo", "of it", min_length=1)
    kind: Annotated[str, one_of("a", "b")] = option("a", "a or b")
    seeds: Annotated[tuple[int, ...], COMMAS, DIFFERENT] = option((0, 1), "one each")
    keep: bool = option(True, "or not")

    def run(self, interrupts: Interrupts) -> None:
        print(self)


@record
class More(Settings):
    """Say more."""

    runs: tuple[Path, ...] = words("folders", "RUN")
    to: str = option(..., "where to")
    size: int = option(5, "how many", ge=2)


@pytest.mark.parametrize(
    ("values", "named", "message"),
    [
        ((0,), {}, "--size 0 must be greater than or equal to 1"),
        ((), {"size": "1.5"}, "--size 1.5 must be a valid integer, unable to parse string as an integer"),
        ((), {"size": 1.5}, "--size 1.5 must be a valid integer, got a number with a fractional part"),
        ((3, 1), {}, "--share 1 must be less than 1"),
        ((), {"share": float("nan")}, "--share nan must be a finite number"),
        ((), {"name": ""}, "--name '' must have at least 1 character"),
        ((), {"name": 3}, "--name 3 must be a valid string"),
        ((), {"kind": "{c}\n"}, "--kind {c}\\n is unknown: choose one of a, b"),
        ((), {"seeds": "0,x"}, "--seeds x must be a valid integer, unable to parse string as an integer"),
        ((), {"seeds": (1, 1)}, "--seeds 1,1 must be different values, at least one"),
        ((), {"sise": 3}, "unknown option sise: see --help"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(values, named, message):
    with pytest.raises(UsageError) as raised:
        Settings(*values, **named)
    assert str(raised.value) == message


def test_a_record_of_a_record_has_its_own_limits_and_the_other_s():
    made = More(runs=["a"], to="b", seeds="2,3")
    assert (made.size, made.seeds, made.runs) == (5, (2, 3), (Path("a"),))
    for values, message in (({"size": 1}, "equal to 2"), ({"share": 0}, "greater than 0"), ({"to": None}, "--to None")):
        with pytest.raises(UsageError, match=message):
            More(**{"runs": ["a"], "to": "b", **values})
    with pytest.raises(UsageError, match="--runs is missing"):
        More(to="b")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("a b --to=c --seeds=5 --no-keep --size=1_000", 0, "size=1000"),
        ("a --to c --size 7 --size=8 b", 0, "size=8"),
        ("a --to=c --seeds= ", 2, "error: --seeds '' must be different values, at least one\n"),
        ("a", 2, "error: Missing option '--to': see more --help\n"),
        ("--to=c", 2, "error: Missing argument 'RUN...': see more --help\n"),
        ("a --to", 2, "error: Option '--to' requires an argument: see more --help\n"),
        ("a --to=c --siz=3", 2, "error: No such option"),
        ("a --to=c --keep=no", 2, "error: Option '--keep' does not take a value: see more --help\n"),
    ],
)
def test_a_command_line_becomes_a_record(line, code, said, capsys):
    assert call(Command.of("more", More), line.split(), "more") == code
    shown = capsys.readouterr()
    assert said in (shown.err if code else shown.out)
    assert code == 0 or shown.out == ""


def test_help_says_what_every_field_says(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert call(Command.of("more", More), ["-h"], "more") == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  Say more.",
        "",
        "Options:",
        "  RUN...              folders (required)",
        "  --size SIZE         how many (default: 5)",
        "  --share SHARE       of what (default: 0.5)",
        "  --name NAME         of it (default: demo)",
        "  --kind KIND         a or b (default: a)",
        "  --seeds SEEDS       one each (default: 0,1)",
        "  --keep / --no-keep  or not",
        "  --to TO             where to (required)",
        "",
        "Help:",
        "  --debug     show the traceback of an error",
        "  -h, --help  Show this message and exit.",
    ]
