"""Places in a language model that can be read and replaced, through hooks on its modules.

Shape legend: B rows (contexts), L positions, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from legato.common.errors import LegatoError, UsageError

SITES = ("resid_post", "attn_out", "mlp_out", "resid_pre", "resid_mid", "attn_z")
CENTRED, INPUT = ":centred", ":input"


@dataclass(frozen=True)
class Site:
    """A place to read: value = scale * t + base_sign * (input of the module `base`), then centred or normalised.

    t: the output of the module at `path`, or its input. layer: decoder layer that `path` lies in; None outside of them.
    centred: each token less its mean over the width. normalised: each token normalised as the norm at `path` does,
    before gain and bias. width, dtype: of the value.
    """

    path: str
    layer: int | None = None
    is_input: bool = False
    scale: float = 1.0
    base: str | None = None
    base_sign: int = -1
    centred: bool = False
    normalised: bool = False
    width: int = 0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """Return the path where the module's output is what is read, else what else is done: no tool takes one for the
        other."""
        scaled = "" if self.scale == 1 else f" * {self.scale:g}"
        base = "" if self.base is None else f" {'+' if self.base_sign > 0 else '-'} {self.base}{INPUT}"
        ending = (CENTRED if self.centred else "") + (":normalised" if self.normalised else "")
        return self.path + (INPUT if self.is_input else "") + scaled + base + ending

    @contextmanager
    def reading(self, model: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Give the value to `take` on every pass inside the block."""
        module, base = model.get_submodule(self.path), _Input()

        def read(hidden: Tensor) -> Tensor:
            value = hidden if self.scale == 1 else hidden * self.scale
            if self.base is not None:
                value = value + self.base_sign * base.value.view_as(value)
            if self.normalised:
                value = _normalised(module, value)
            if self.centred:
                value = value - value.mean(-1, keepdim=True)
            take(value)
            return hidden

        with base.kept(model, self.base), _replaced(module, self.is_input, read):
            yield

    @contextmanager
    def splicing(self, model: nn.Module, value_BLD: Tensor) -> Iterator[None]:
        """Put value_BLD in the place of the value on every pass inside the block.

        Raises UsageError where the value cannot be put back: gain and bias come after a normalised one.
        """
        if self.normalised:
            raise UsageError(f"{self} before gain and bias cannot be replaced: give --ce_rows 0 to leave the loss out")
        base = _Input()

        def put(hidden: Tensor) -> Tensor:
            value = value_BLD if self.base is None else value_BLD - self.base_sign * base.value.view_as(value_BLD)
            return (value if self.scale == 1 else value / self.scale).to(hidden.dtype).view_as(hidden)

        with base.kept(model, self.base), _replaced(model.get_submodule(self.path), self.is_input, put):
            yield


class _Input:
    """The last input of a module."""

    value: Tensor

    @contextmanager
    def kept(self, model: nn.Module, path: str | None) -> Iterator[None]:
        if path is None:
            yield
            return

        def keep(hidden: Tensor) -> Tensor:
            self.value = hidden
            return hidden

        with _replaced(model.get_submodule(path), True, keep):
            yield


@contextmanager
def _replaced(module: nn.Module, is_input: bool, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put change(hidden) in the place of a module's hidden input or output."""

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(_module: nn.Module, _args: object, output: Any) -> Any:
        return type(output)((change(output[0]), *output[1:])) if isinstance(output, (tuple, list)) else change(output)

    hook = (
        module.register_forward_pre_hook(before, with_kwargs=True) if is_input else module.register_forward_hook(after)
    )
    with hook:  # which its end removes
        yield


def check_finite(values: Tensor) -> None:
    """Raise LegatoError for activations, or norms of them, that are not finite."""
    if not torch.isfinite(values).all():
        raise LegatoError("the model's activations are not finite: load it in float32 (--dtype float32)")


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states of a module's output, which may be a tuple or a list that starts with them."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _normalised(norm: nn.Module, value: Tensor) -> Tensor:
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    x = value.float()
    if subtracts_mean(norm):
        x = x - x.mean(-1, keepdim=True)
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).to(value.dtype)


def subtracts_mean(norm: nn.Module) -> bool:
    """Tell a LayerNorm from an RMSNorm: adding a constant to its input changes nothing."""
    weight = next(norm.parameters(), None)
    x_D = torch.arange(len(weight) if weight is not None else 8, dtype=torch.float32).cos()
    x_D = x_D if weight is None else x_D.to(weight.device, weight.dtype)
    return bool(torch.allclose(norm.forward(x_D).float(), norm.forward(x_D + 1).float(), atol=0.05))
