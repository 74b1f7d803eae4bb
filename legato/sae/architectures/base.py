"""The base of every architecture: one class for its training, its dense and sparse codes, and its part of a file.

Shape legend: B rows, L positions, N flat tokens, D width, F latents, P active pairs by token; [..., L, F] any batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.sae.architectures.forward import Decoding, Forward
from legato.sae.architectures.preactivations import Columns, Encoder, Preactivations, positive
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.pairs import Array, Pairs


class Number(NamedTuple):
    """A number that cfg.json holds of an architecture. fits: whether a value can be used with F latents; problem: what
    is said of one that cannot, with {architecture}, {name} and {value}."""

    kind: type
    fits: Callable[[Any, int], bool]
    problem: str

    def allows(self, value: Any, F: int) -> bool:
        kinds = int if self.kind is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.fits(value, F)


BUDGET = Number(int, lambda k, F: 0 < k <= F, "a {architecture} SAE without a usable {name} ({value!r})")
SHARE = Number(float, lambda share, F: 0 < share <= 1, "{name} must lie above 0 and at most at 1, not at {value!r}")
INNER_SHARE = Number(float, lambda share, F: 0 < share < 1, "{name} must lie between 0 and 1, not at {value!r}")
TOKENS = Number(int, lambda tokens, F: tokens >= 1, "{name} must be a whole number of tokens, not {value!r}")


def tensor() -> Any:
    """The field of a tensor in `per_latent`: only a finished SAE has it."""
    return field(default=None, compare=False)


_ARCHITECTURES: dict[str, type["Architecture"]] = {}


def architectures() -> dict[str, type["Architecture"]]:
    """Return the architectures of saved SAEs, by their name in cfg.json."""
    return {name: cls for name, cls in sorted(_ARCHITECTURES.items()) if cls.is_saved}


def all_architectures() -> dict[str, type["Architecture"]]:
    """With those that only train, and are saved as another."""
    return dict(_ARCHITECTURES)


def architecture_named(name: str) -> type["Architecture"]:
    """UsageError where no saved SAE can be of it."""
    known = architectures()
    if name not in known:
        raise UsageError(f"architecture {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]


class Architecture(ABC):
    """A rule for the active latents of a token and their codes, in training and afterwards.

    A subclass is a frozen dataclass. Its fields are the settings of training (with a default where a saved SAE does not
    know them), the `numbers` that are saved, and the tensors of `per_latent` (`tensor()`). A subclass with a
    `name` can be trained, saved and opened by that name.

    name: in cfg.json. per_latent: the tensors it has beside the weights, with their axes. numbers: those it is saved
    with. lengths: tensors in units of the codes, which a normaliser scales. bias: the name of b_enc in files.
    is_saved: False where training ends in another architecture. stateful: whether codes depend on earlier tokens.
    own_parameters: what it learns per latent; `Preactivations.own` holds their values. own_rate: their learning rate
    over the weights'. holds_l0: whether L0 is near its target from the start; where it is not, its fall is the penalty
    at work.
    """

    name: ClassVar[str]
    per_latent: ClassVar[Mapping[str, str]] = {}
    numbers: ClassVar[Mapping[str, Number]] = {}
    lengths: ClassVar[tuple[str, ...]] = ("threshold",)
    bias: ClassVar[str] = "b_enc"
    is_saved: ClassVar[bool] = True
    stateful: ClassVar[bool] = False
    own_parameters: ClassVar[tuple[str, ...]] = ()
    own_rate: ClassVar[float] = 1.0
    holds_l0: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if name := vars(cls).get("name"):
            _ARCHITECTURES[name] = cls

    # Codes

    @abstractmethod
    def activate(self, pre: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """Codes [..., L, F], none below 0, of pre-activations [..., L, F]; differentiable, on any device.

        mask, doc [..., L]: the tokens that take part, and their documents (None: all, of one document). What it gives
        for the others does not matter.
        """

    def encode(self, product: Tensor, b_enc: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """Codes from acts @ W_enc, 0 where the mask is False; override where b_enc is not all that is added to it."""
        return masked(self.activate(product + b_enc, mask, doc), mask)

    def encode_sparse(self, encoder: Encoder, acts_BLD: Tensor, mask_BL: Tensor, doc_BL: Tensor) -> Columns:
        """(token_P, latent_P, code_P) of the active pairs, on the CPU; override where they can be had without all
        codes: by a matmul in the fast dtype for candidates, which are then computed exactly (`Encoder.centred`)."""
        product = acts_BLD.to(encoder.W_enc.dtype) @ encoder.W_enc
        return positive(self.encode(product, encoder.b_enc, mask_BL, doc_BL).flatten(0, 1))

    # Training

    def forward(self, pre: Preactivations, state: float, progress: float) -> Forward:
        """One forward pass.

        state: what the forward pass of the batch before left (`Forward.state`), 0 at the start. progress: share of the
        training steps done, for what is annealed.

        By default every pre-activation exactly, `encode` with what the architecture has learned so far, and the
        positive codes; the gradient reaches the encoder, its bias and the architecture's own parameters through them,
        by torch's autograd. Costs what a dense step does: N x F x D multiplications more than with a selection of its
        own.
        """
        leaves = {"product": pre.products(), "b_enc": torch.from_numpy(pre.b_enc_F)}
        leaves |= {name: torch.from_numpy(value) for name, value in pre.own.items()}
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
        trained: Any = self._with({name: leaves[name] for name in pre.own})
        with torch.enable_grad():
            product_BLF = leaves["product"].view(-1, pre.layout.length, len(pre.b_enc_F))
            codes_NF = trained.encode(product_BLF, leaves["b_enc"], *pre.layout.rows()).flatten(0, 1)
        token, latent, value = (column.numpy() for column in positive(codes_NF.detach()))
        pairs = kernels.keep(len(pre.x_ND), token.astype(np.int32), latent.astype(np.int32), value, value > 0)
        return _Traced(pairs, 0.0, self, codes_NF, leaves)

    def penalty(self, pairs: Pairs, n_valid: int, d_in: int) -> tuple[float, float]:
        """A loss on the codes and its (constant) derivative by every active code."""
        return 0.0, 0.0

    def initial(self, pre: Preactivations) -> dict[str, Tensor]:
        """Values of `own_parameters`, each (F), before the first step, from that step's pre-activations."""
        return {}

    def inference(self, calibration: Sequence[Preactivations]) -> "Architecture":
        """Return the architecture after training, for the normalised activations of training (see `scaled`).

        By default itself with what it has learned, where `own_parameters` are those of `per_latent`; override where
        something is still to be settled. calibration: pre-activations of the finished weights on a few batches.
        """
        own = calibration[0].own
        return type(self).of(vars(self), {name: torch.from_numpy(own[name]).clone() for name in self.per_latent})

    def scaled(self, b_enc: Tensor, shift_F: Tensor, scale: float) -> tuple[Tensor, "Architecture"]:
        """b_enc and itself for raw activations, where it takes normalised ones, scale * (x - mean): codes and biases
        are lengths and shrink by the scale, and a bias also takes up shift_F = mean @ W_enc."""
        lengths = {name: getattr(self, name) / scale for name in self.lengths if name in self.per_latent}
        return b_enc / scale - shift_F, self._with(lengths)

    def stateless(self, pre_NF: Tensor, count: int) -> "Architecture":
        """Return an architecture without state that has about `count` active pairs on these tokens. By default
        jumprelu, with one factor on all its thresholds. Raises LegatoError."""
        threshold = self.tensors().get("threshold")
        if threshold is None or not bool((threshold > 0).all()):
            raise LegatoError(f"a {self.name} SAE without a positive threshold has no approximation without state")
        factor = (pre_NF / threshold).flatten().topk(count + 1).values[-1].clamp_min(0)
        return architecture_named("jumprelu").of({}, {"threshold": factor * threshold})

    # What is saved

    @classmethod
    def of(cls, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Architecture":
        """From mappings that hold its numbers and tensors by name."""
        fields: dict[str, Any] = {name: numbers[name] for name in cls.numbers}
        return cls(**fields, **{name: tensors[name] for name in cls.per_latent})

    @classmethod
    def shapes(cls) -> dict[str, str]:
        """Axes of all tensors in a file: D the activations' width, F the latents."""
        return {"W_enc": "DF", cls.bias: "F", "W_dec": "FD", "b_dec": "D", **cls.per_latent}

    def saved_numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.numbers}

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.per_latent}

    def settings(self) -> dict[str, Any]:
        """Its class and all fields but tensors, as they are saved beside an arm's results."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.per_latent}  # type: ignore[arg-type]
        return {"type": type(self).__name__, **plain}

    def to(self, device: torch.device | str) -> "Architecture":
        return self._with({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def _with(self, tensors: Mapping[str, Tensor]) -> "Architecture":
        return replace(self, **tensors)  # type: ignore[type-var]  # subclasses are dataclasses


@dataclass(frozen=True)
class _Traced(Forward):
    """Codes that torch's autograd follows. leaves: what they were computed from, by name: product, b_enc, and the
    architecture's own parameters."""

    architecture: Architecture
    codes_NF: Tensor
    leaves: dict[str, Tensor]

    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        token_P, latent_P = self.pairs.token_P, self.pairs.latent_P
        loss, slope = self.architecture.penalty(self.pairs, decoding.n_valid, decoding.x_ND.shape[1])
        by_code_P = np.empty_like(decoding.slope_Q)
        by_code_P[decoding.order.source_Q] = decoding.slope_Q
        by_code_P += decoding.code_gradient(token_P, latent_P) + by_code_P.dtype.type(slope)
        by_code_NF = torch.zeros_like(self.codes_NF)
        by_code_NF[torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long()] = torch.from_numpy(by_code_P)
        slopes = torch.autograd.grad(self.codes_NF, list(self.leaves.values()), by_code_NF, materialize_grads=True)
        by_leaf = dict(zip(self.leaves, slopes, strict=True))
        by_product_NF, bias_F = by_leaf.pop("product"), by_leaf.pop("b_enc")
        for name, gradient_F in by_leaf.items():
            decoding.gradients[name][:] = gradient_F.numpy()
        token, latent = by_product_NF.nonzero(as_tuple=True)
        columns = (token.int().numpy(), latent.int().numpy(), by_product_NF[token, latent].numpy())
        encoder = kernels.keep(len(by_product_NF), *columns, np.ones(len(token), np.bool_))
        return {"sparsity": loss} if slope else {}, decoding.apart(encoder, bias_F.numpy())


class Selecting(Architecture):
    """An architecture whose codes are the pre-activations of selected pairs."""

    @abstractmethod
    def select(self, pre: Preactivations, state: float, progress: float) -> tuple[Pairs, float]:
        """Active pairs and the next state (see `forward`); for most a speed hint, never a result."""

    def forward(self, pre: Preactivations, state: float, progress: float) -> Forward:
        return Selected(*self.select(pre, state, progress), self)


@dataclass(frozen=True)
class Selected(Forward):
    """Codes that are the pre-activations of selected pairs."""

    architecture: Architecture

    def backward(self, decoding: Decoding) -> tuple[dict[str, float], Array]:
        value, slope = self.architecture.penalty(self.pairs, decoding.n_valid, decoding.x_ND.shape[1])
        squared = decoding.through_codes(decoding.slope_Q + decoding.slope_Q.dtype.type(slope))
        return {"sparsity": value} if slope else {}, squared


def masked(codes: Tensor, mask: Tensor | None) -> Tensor:
    return codes if mask is None else codes * mask.unsqueeze(-1)
