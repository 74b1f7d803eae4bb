"""Fill in the templates of this folder (*.txt.j2): they hold the report's sentences, Python works out the numbers.

In a template a blank line ends a paragraph, a line break does not; `{{ x | form(".3f") }}` writes a number.
"""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from legato.results.saved_run import joined


def render(template: str, /, **values: Any) -> str:
    """Fill in `<template>.txt.j2`. Raises LookupError where a value that it names is missing."""
    return _fill_in(_ENVIRONMENT, template, values)


def paragraphs(template: str, /, **values: Any) -> list[str]:
    """Fill in `<template>.txt.j2` and return its paragraphs, a line each; a line break in a value ends none."""
    blocks = re.split(r"\n\s*\n", _fill_in(_ON_ONE_LINE, template, values))
    return [" ".join(block.split()) for block in blocks if block.strip()]


def _fill_in(environment: jinja2.Environment, template: str, values: Mapping[str, Any]) -> str:
    try:
        return environment.get_template(f"{template}.txt.j2").render(values)
    except jinja2.UndefinedError as error:
        raise LookupError(f"{template}.txt.j2: {error}") from error


def form(value: float | None, spec: str, missing: str = "-") -> str:
    """A number by Python's format specification; `missing` where there is none."""
    return missing if value is None else format(value, spec)


def count(tokens: float) -> str:
    """A token count as people write it: 2.4M, 60k, 800."""
    if tokens >= 1e6:
        return f"{tokens / 1e6:.3g}M"
    return f"{tokens / 1e3:.3g}k" if tokens >= 1e3 else f"{tokens:.0f}"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "form": form,
    "count": count,
    "against": lambda pair, spec: f"{form(pair[0], spec)} against {form(pair[1], spec)}",
    "plural": lambda number, noun: f"{number} {noun}{'s' * (number != 1)}",
    "joined": joined,
    "wrap": lambda text: textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False),
    "bullets": lambda lines: "\n".join(
        textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  ") for line in lines
    ),
}
# Names and paths come from outside, and may hold anything.
_ON_ONE_LINE = _ENVIRONMENT.overlay(
    finalize=lambda value: re.sub(r"\s", " ", value) if isinstance(value, str) else value
)
