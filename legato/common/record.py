"""Frozen records that pydantic reads and checks: configurations, and the options of commands.

A value of another type or out of its limits is a UsageError of one line, on the command line and in Python alike.
"""

import re
from functools import wraps
from typing import Any, TypeVar

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import dataclass_transform

from legato.common.errors import UsageError

RecordT = TypeVar("RecordT")


@dataclass_transform(frozen_default=True)
def record(cls: type[RecordT]) -> type[RecordT]:
    """Make a frozen dataclass that raises UsageError for values that do not fit its fields, and for unknown names."""
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
    read = made.__init__

    @wraps(read)
    def __init__(self: RecordT, *values: Any, **named: Any) -> None:
        try:
            read(self, *values, **named)
        except ValidationError as error:
            raise UsageError(_told(error, list(fields_of(made)))) from error

    made.__init__ = __init__
    return made


def fields_of(cls: type) -> dict[str, FieldInfo]:
    return vars(cls)["__pydantic_fields__"]


def option(default: Any, text: str, **limits: Any) -> Any:
    """A field with its default (...: required), its line of --help, and limits such as ge=1 and lt=2."""
    return Field(default, description=text, **limits)


def words(text: str, name: str, default: Any = ...) -> Any:
    """A field that is given without a flag. name: what --help calls it."""
    return Field(default, description=text, json_schema_extra={"metavar": name})


def one_of(*choices: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"is unknown: choose one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must be different values, at least one")
    return values


DIFFERENT = AfterValidator(_different)

# A tuple that the command line takes as one word: 0,1,2
COMMAS = BeforeValidator(
    lambda value: [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
)


def as_flag(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _told(error: ValidationError, fields: list[str]) -> str:
    """Tell the first fault: flag, value and what is allowed."""
    fault = error.errors(include_url=False)[0]
    place, value = fault["loc"][0], as_flag(fault["input"])[:200]
    if fault["type"] == "unexpected_keyword_argument":
        return f"unknown option {place}: see --help"
    name = fields[place] if isinstance(place, int) else place
    if fault["type"] == "missing":
        return f"--{name} is missing: see --help"
    said = re.sub(r"^Value error, |^\w+ should(?= )", lambda start: "" if start[0][-1] == " " else "must", fault["msg"])
    return f"--{name} {value if value.strip() else repr(value)} {said}"
