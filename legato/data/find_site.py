"""Find the place that a site's name means in a language model, by what a layer computes on a few tokens.

`attn_out` and `mlp_out` are what a block adds to the residual stream. The module that holds it differs between
architectures (a norm may follow the block, a factor may scale it, the block may add the stream itself), so it is found
by values, and refused where nothing fits to `TOLERANCE`.

Shape legend: B rows (contexts), L positions, D width.
"""

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from legato.common.errors import UsageError
from legato.data.sites import CENTRED, INPUT, SITES, Site, check_finite, given_to, hidden_of, subtracts_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMALISED = re.compile(r"(ln[12])\.hook_normalized")  # in TransformerLens' words: before the norm's gain and bias
TOLERANCE = 1e-5  # of the residual stream's norm, in float32
COARSE_TOLERANCE = 1e-2  # in 16 bits, for layers too large to be copied in float32
COPIED_PARAMETERS = 500_000_000
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|moe|ffn|feed_?forward|experts?|^ff$", re.IGNORECASE)
_PROJECTIONS = ("o_proj", "c_proj", "out_proj", "dense", "wo", "out_lin", "o", "output")  # of the mixed heads
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True)
class LayerTrace:
    """Inputs and outputs of one layer and its modules on a few tokens, in order of their calls.

    inputs, outputs: by path relative to the layer; only tensors as large as the layer's input.
    """

    input: Tensor
    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    modules: dict[str, nn.Module]
    tolerance: float

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether two residual streams are equal, up to rounding, at every token."""
        return bool(((a - b).norm(dim=-1) <= self.tolerance * b.norm(dim=-1)).all())

    def value(self, site: Site) -> Tensor:
        """Return the value of a site of the layer."""
        value = site.scale * (self.outputs[site.path] if site.path else self.output)
        if site.base is None:
            return value
        return value + site.base_sign * (self.inputs[site.base] if site.base else self.input)

    def is_kind(self, path: str, kind: re.Pattern[str]) -> bool:
        """Tell by the names of a module and its class whether it is a norm or, if it is none, of another kind."""
        names = path.rpartition(".")[2], type(self.modules[path]).__name__
        is_norm = any(_NORM.search(name) for name in names)
        return is_norm if kind is _NORM else not is_norm and any(kind.search(name) for name in names)

    def norms_after(self, path: str) -> list[str]:
        """Return the norms that take a module's output."""
        output = self.outputs[path]
        return [norm for norm in self.inputs if self.is_kind(norm, _NORM) and torch.equal(self.inputs[norm], output)]

    def factors(self, total: Tensor, *parts: Tensor) -> list[float] | None:
        """Return the numbers c with total = sum of c * part, where there are such; total is a part of the stream."""
        flat = torch.stack([part.flatten() for part in parts], 1).double()
        solution = torch.linalg.lstsq(flat, total.flatten().double()[:, None]).solution[:, 0]
        error = (total.double() - (flat @ solution).view_as(total)).norm(dim=-1)
        if (error > self.tolerance * self.output.double().norm(dim=-1)).any() or (solution.abs() < 1e-3).any():
            return None
        # Tell 1 from what only rounds to it.
        return [1.0 if abs(c - 1) < 10 * self.tolerance else c for c in solution.tolist()]


@torch.no_grad()
def trace_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerTrace:
    """Run a layer on these arguments, in float32 where it is not too large, and keep what its modules take and give."""
    weights = list(layer.parameters())
    is_exact = all(weight.dtype == torch.float32 for weight in weights)
    if not is_exact and sum(weight.numel() for weight in weights) <= COPIED_PARAMETERS:
        layer, is_exact = copy.deepcopy(layer).float(), True
        args, kwargs = _as_float32(args), _as_float32(kwargs)
    x_BLD = given_to(args, kwargs)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            for record, tensor in ((inputs, given), (outputs, hidden_of(output))):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() == x_BLD.numel():
                    record[path] = tensor.detach().float().reshape(x_BLD.shape)

        return hook

    modules = {path: module for path, module in layer.named_modules() if path}
    with ExitStack() as hooks:
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_hook(keep(path), with_kwargs=True))
        y_BLD = hidden_of(layer(*args, **kwargs))
    check_finite(y_BLD)
    return LayerTrace(
        x_BLD.detach().float(),
        y_BLD.detach().float(),
        inputs,
        outputs,
        modules,
        TOLERANCE if is_exact else COARSE_TOLERANCE,
    )


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _as_float32(entry) for key, entry in value.items()}
    return tuple(_as_float32(entry) for entry in value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Blocks:
    """Places where attention and MLP of a layer join the residual stream: sites with paths relative to the layer.

    None where no module holds what the block adds, or there is no such block. attention: path of the attention itself.
    """

    attn_out: Site | None = None
    mlp_out: Site | None = None
    resid_mid: Site | None = None
    attention: str | None = None


def find_blocks(trace: LayerTrace) -> Blocks:
    """Find what attention and MLP add to the stream: one after the other or side by side, normed, scaled or with it."""
    shallow = sorted(trace.outputs, key=lambda path: path.count("."))
    attention = next((path for path in shallow if trace.is_kind(path, _ATTENTION)), None)
    mlps = [path for path in shallow if trace.is_kind(path, _MLP)]
    mixers = [path for path in shallow if path not in mlps and not trace.is_kind(path, _NORM)]
    if attention is not None:
        # A block that adds the stream itself, as BLOOM's do, has its last projection inside.
        mixers = [attention, *trace.norms_after(attention), *(p for p in shallow if p.startswith(f"{attention}."))]
    # The stream between the two is what a norm or the MLP takes.
    between = {path: taken for path, taken in trace.inputs.items() if path in mlps or trace.is_kind(path, _NORM)}
    first, taker = _first(trace, mixers, between, shallow)
    if attention is not None and first is None:
        return Blocks(attention=attention)
    if taker is None:
        stream, base = trace.input, ""
    else:
        stream, base = trace.inputs[taker], taker
    others = [path for path in shallow if first is None or path != first.path]
    alone = first is not None and trace.same(trace.input + trace.value(first), trace.output)
    mlp = None if alone or not (attention or mlps) else _mlp(trace, stream, base, mlps, others)
    if attention is None or first is None:
        return Blocks(mlp_out=mlp)
    mid = None
    if taker is not None and trace.same(stream, trace.value(first) + trace.input):
        mid = replace(first, base="", base_sign=1)
    return Blocks(first, mlp, mid, attention)


def _first(
    trace: LayerTrace, mixers: list[str], between: dict[str, Tensor], shallow: list[str]
) -> tuple[Site | None, str | None]:
    """Return the block that joins the stream first, and the module that takes the stream after it.

    The latter is None where both blocks read the same stream, or where this is the layer's only one.
    """
    for path in mixers:
        for taker, taken in between.items():
            is_later = not trace.same(taken, trace.input)
            if is_later and (c := _joins(trace, taken - trace.input, path, shallow)):
                return Site(path, scale=c), taker
        if c := _joins(trace, trace.output - trace.input, path, shallow):
            return Site(path, scale=c), None
    return None, None


def _joins(trace: LayerTrace, total: Tensor, path: str, shallow: list[str]) -> float | None:
    """Return the factor by which a module's output is part of a sum: alone, or beside that of one other module."""
    if c := trace.factors(total, trace.outputs[path]):
        return c[0]
    for other in shallow:
        is_apart = other.count(".") < 2 and not other.startswith(path) and not path.startswith(other)
        if is_apart and (c := trace.factors(total, trace.outputs[path], trace.outputs[other])):
            return c[0]
    return None


def _mlp(trace: LayerTrace, stream: Tensor, base: str, mlps: list[str], others: list[str]) -> Site | None:
    total = trace.output - stream
    for path in (*mlps, *(norm for mlp in mlps for norm in trace.norms_after(mlp)), *others):
        if c := trace.factors(total, trace.outputs[path]):
            return Site(path, scale=c[0])
    for number, path in enumerate(mlps if base else ()):  # no module holds the sum of routed and shared experts
        for other in mlps[number + 1 :]:
            if not other.startswith(path) and trace.factors(total, trace.outputs[path], trace.outputs[other]):
                return Site("", base=base)
    for path in mlps:  # side by side with attention, or something else joins after it
        for end in (trace.output, *trace.inputs.values()):
            if not trace.same(end, stream) and (factor := _joins(trace, end - stream, path, others)):
                return Site(path, scale=factor)
    return None


def find_site(name: str, layer: int, layer_path: str, model: nn.Module, trace: Callable[[], LayerTrace]) -> Site:
    """Return the site of this name at a layer, with full paths.

    name: one of SITES, `ln1.hook_normalized` or `ln2.hook_normalized`, or the path of a module in the layer or in the
    model, with `:input` for what it takes; with `:centred` less the mean over the width, where the model's norms
    subtract it anyway. trace: traces the layer on a few tokens.
    Raises UsageError for a name that is none of these, and where no module holds what is asked for.
    """
    plain, is_relative = name.removesuffix(CENTRED), True
    if plain == "resid_post":
        found = Site("")
    elif plain == "resid_pre":
        found = Site("", is_input=True)
    elif plain in SITES or NORMALISED.fullmatch(plain):
        found = _named(plain, layer, trace())
    else:
        path = plain.removesuffix(INPUT)
        modules = dict(model.named_modules())
        is_relative = f"{layer_path}.{path}" in modules
        if not path or not (is_relative or path in modules):
            inner = ", ".join(at for at, _ in modules[layer_path].named_children())
            raise UsageError(f"unknown site {name!r}: give {', '.join(SITES)} or the path of a module ({inner}, ...)")
        found = Site(path, is_input=plain.endswith(INPUT))
    centred = name.endswith(CENTRED) and _norms_subtract_means(model.get_submodule(layer_path))
    if not is_relative:
        inside = re.match(re.escape(layer_path.rpartition(".")[0]) + r"\.(\d+)(?:\.|$)", found.path)
        return replace(found, layer=int(inside[1]) if inside else None, centred=centred)

    def full(path: str) -> str:
        return f"{layer_path}.{path}" if path else layer_path

    base = None if found.base is None else full(found.base)
    return replace(found, path=full(found.path), base=base, layer=layer, centred=centred)


def _norms_subtract_means(layer: nn.Module) -> bool:
    norms = [module for path, module in layer.named_modules() if path and _NORM.search(path + type(module).__name__)]
    return bool(norms) and subtracts_mean(norms[0])


def _named(name: str, layer: int, trace: LayerTrace) -> Site:
    blocks = find_blocks(trace)
    modules = ", ".join(path for path in trace.modules if "." not in path)
    if name == "attn_z" and blocks.attention is not None:
        at = trace.modules[blocks.attention]
        mixed = [path for path, _ in at.named_modules() if path and path.rpartition(".")[2] in _PROJECTIONS]
        if mixed:
            return Site(f"{blocks.attention}.{mixed[-1]}", is_input=True)
    norms = [path for path in trace.inputs if trace.is_kind(path, _NORM) and "." not in path]
    if name.startswith("ln1"):
        takes = [path for path in norms if trace.same(trace.inputs[path], trace.input)]
    else:
        mid = None if blocks.resid_mid is None else trace.value(blocks.resid_mid)
        takes = [path for path in norms if mid is not None and trace.same(trace.inputs[path], mid)]
    if NORMALISED.fullmatch(name) and takes:
        return Site(takes[0], is_input=True, normalised=True)
    found = {"attn_out": blocks.attn_out, "mlp_out": blocks.mlp_out, "resid_mid": blocks.resid_mid}.get(name)
    if found is None:
        raise UsageError(
            f"no module of layer {layer} holds its {name} ({modules}): use resid_post or the path of one of its modules"
        )
    return found


def find_layers(model: "PreTrainedModel", n_layers: int, name: str) -> tuple[str, nn.ModuleList, nn.Module]:
    """Find the path and list of the decoder layers, the shallowest of that many modules, and what takes the tokens."""
    text_decoder = model.get_decoder()  # not the encoder of images, which may have as many layers
    for root in (text_decoder, model):
        inside = {id(module) for module in root.modules()} if isinstance(root, nn.Module) else set()
        found = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n_layers and id(module) in inside
        ]
        if found and n_layers > 0:
            break
    else:
        raise UsageError(f"{name} has no list of {n_layers} decoder layers: this architecture is not supported")
    path, layers = min(found, key=lambda item: item[0].count("."))
    owner = path
    while owner and "input_ids" not in signature(model.get_submodule(owner).forward).parameters:
        owner = owner.rpartition(".")[0]
    return path, layers, model.get_submodule(owner)
