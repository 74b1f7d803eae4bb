"""Decoder layers of the Llama, Gemma, GPT-2 and GPT-NeoX families on the CPU, about twice as fast as transformers.

transformers spends half its time outside the matrix products: norms in several float32 passes, rotary embeddings, the
activation, a flash attention that is slow at short contexts. Here each is one pass (`fast_kernels`), attention is two
batched products over all heads of a key group, and every core takes some contexts through all layers, so that their
activations stay in its cache.

Shape legend: B rows (contexts), L positions, D width, N flat tokens, H head width, K rotated width, R rows of queries.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from legato.common.hardware import on_each_core
from legato.data import fast_kernels as kernels

TOKENS_A_TASK = 512
MAX_CONTEXT = 2048  # above it the matrix of scores does not fit the caches, and flash attention is faster
_ACTIVATIONS = {"silu": kernels.SILU, "gelu_pytorch_tanh": kernels.GELU_TANH, "gelu_new": kernels.GELU_TANH}
_NO_WINDOW = 2**30
_NO_SOFTCAP = np.float32(0)


@dataclass(frozen=True)
class _RmsNorm:
    """RMS norm; an empty weight means no norm."""

    weight: Any
    eps: np.float32

    @classmethod
    def of(cls, module: Any, offset: float) -> "_RmsNorm":
        if module is None:
            return cls(np.empty(0, np.float32), np.float32(0))
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return cls(module.weight.detach().float().add(offset).numpy(), np.float32(eps))

    def __call__(self, x_ND: Tensor) -> Tensor:
        out_ND = torch.empty_like(x_ND)
        kernels.rms_norm(kernels.as_array(x_ND), self.weight, self.eps, kernels.as_array(out_ND))
        return out_ND

    def add_to(self, residual_ND: Tensor, x_ND: Tensor) -> None:
        """Add norm(x) to the residual, or x where there is no norm."""
        if len(self.weight):
            kernels.add_rms_norm(kernels.as_array(residual_ND), kernels.as_array(x_ND), self.weight, self.eps)
        else:
            residual_ND += x_ND


_NO_NORM = _RmsNorm.of(None, 0)


@dataclass(frozen=True)
class _Attention:
    """Causal attention over heads laid side by side, key heads shared by groups of query heads."""

    head_dim: int
    scale: np.float32
    softcap: np.float32 = _NO_SOFTCAP
    window: int = _NO_WINDOW
    query_norm: _RmsNorm = _NO_NORM
    key_norm: _RmsNorm = _NO_NORM

    def __call__(self, query_N: Tensor, key_N: Tensor, value_N: Tensor, cos_LK: Any, sin_LK: Any) -> Tensor:
        L, H, n_tokens = len(cos_LK), self.head_dim, len(query_N)
        n_groups, per_group = key_N.shape[1] // H, query_N.shape[1] // key_N.shape[1]
        B = n_tokens // L * n_groups
        query_BRH, key_BLH = query_N.new_empty(B, L * per_group, H), key_N.new_empty(B, L, H)
        for heads, norm, n_heads, out in (
            (query_N, self.query_norm, per_group, query_BRH),
            (key_N, self.key_norm, 1, key_BLH),
        ):
            rows = kernels.as_array(out.view(-1, H))
            kernels.arrange_heads(
                kernels.as_array(heads.contiguous()), norm.weight, norm.eps, cos_LK, sin_LK, n_groups, n_heads, rows
            )
        value_BLH = value_N.reshape(-1, L, n_groups, H).transpose(1, 2).reshape(B, L, H)
        scores_BRL = torch.bmm(query_BRH, key_BLH.transpose(1, 2))
        kernels.causal_softmax(
            kernels.as_array(scores_BRL.view(-1, L)), per_group, self.scale, self.softcap, self.window
        )
        mixed = torch.bmm(scores_BRL, value_BLH).view(-1, n_groups, L, per_group * H)
        return mixed.transpose(1, 2).reshape(n_tokens, -1)


class _Layer(Protocol):
    """A decoder layer's modules and constants; the matrices stay the model's own."""

    rope: str

    def __init__(self, layer: Any, config: Any) -> None: ...

    @staticmethod
    def knows(layer: Any, config: Any) -> bool: ...

    def run(self, residual_ND: Tensor, cos_LK: Any, sin_LK: Any) -> None:
        """Add the layer's output to the residual stream; tokens of whole contexts."""


class _LlamaLayer:
    """Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3: RMS norms and a gated MLP."""

    def __init__(self, layer: Any, config: Any) -> None:
        name, attention, self.mlp = type(layer).__name__, layer.self_attn, layer.mlp
        self.projections = attention

        def norm(owner: Any, attribute: str) -> _RmsNorm:
            return _RmsNorm.of(getattr(owner, attribute, None), 1.0 if name.startswith("Gemma") else 0.0)

        # Where a layer has four norms, `post_attention_layernorm` is the attention's output norm, else the MLP's input.
        has_output_norms = hasattr(layer, "pre_feedforward_layernorm")
        self.input_norm = norm(layer, "input_layernorm")
        self.attention_output_norm = norm(layer, "post_attention_layernorm" if has_output_norms else "none")
        self.mlp_norm = norm(layer, "pre_feedforward_layernorm" if has_output_norms else "post_attention_layernorm")
        self.mlp_output_norm = norm(layer, "post_feedforward_layernorm")
        self.attention = _Attention(
            head_dim=attention.head_dim,
            scale=np.float32(attention.scaling),
            softcap=np.float32(getattr(attention, "attn_logit_softcapping", None) or 0.0),
            window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or _NO_WINDOW,
            query_norm=norm(attention, "q_norm"),
            key_norm=norm(attention, "k_norm"),
        )
        self.activation = _ACTIVATIONS[_activation_name(config)]
        self.rope = getattr(attention, "layer_type", None) or ""

    @staticmethod
    def knows(layer: Any, config: Any) -> bool:
        return layer.self_attn.is_causal and _activation_name(config) in _ACTIVATIONS

    def run(self, residual_ND: Tensor, cos_LK: Any, sin_LK: Any) -> None:
        project, mlp, x_ND = self.projections, self.mlp, self.input_norm(residual_ND)
        mixed_N = self.attention(project.q_proj(x_ND), project.k_proj(x_ND), project.v_proj(x_ND), cos_LK, sin_LK)
        self.attention_output_norm.add_to(residual_ND, project.o_proj(mixed_N))
        x_ND = self.mlp_norm(residual_ND)
        gate_NI, up_NI = mlp.gate_proj(x_ND), mlp.up_proj(x_ND)
        kernels.gated_activation(kernels.as_array(gate_NI), kernels.as_array(up_NI), *self.activation)
        self.mlp_output_norm.add_to(residual_ND, mlp.down_proj(gate_NI))


class _Gpt2Layer:
    """GPT-2: layer norms, one projection for queries, keys and values, no rotary embedding."""

    rope = ""

    def __init__(self, layer: Any, config: Any) -> None:
        self.layer = layer
        self.attention = _Attention(layer.attn.head_dim, np.float32(layer.attn.scaling))
        self.activation = _ACTIVATIONS.get(_activation_name(config))

    @staticmethod
    def knows(layer: Any, config: Any) -> bool:
        return not config.add_cross_attention

    def run(self, residual_ND: Tensor, cos_LK: Any, sin_LK: Any) -> None:
        layer, mlp = self.layer, self.layer.mlp
        query_N, key_N, value_N = layer.attn.c_attn(layer.ln_1(residual_ND)).chunk(3, dim=1)
        residual_ND += layer.attn.c_proj(self.attention(query_N, key_N, value_N, cos_LK, sin_LK))
        inner_NI = mlp.c_fc(layer.ln_2(residual_ND))
        residual_ND += mlp.c_proj(_activate(inner_NI, self.activation, mlp.act))


class _NeoxLayer:
    """Pythia: layer norms, queries, keys and values interleaved by head, the MLP beside the attention or after it."""

    rope = ""

    def __init__(self, layer: Any, config: Any) -> None:
        self.layer = layer
        self.attention = _Attention(layer.attention.head_size, np.float32(layer.attention.scaling))
        self.activation = _ACTIVATIONS.get(_activation_name(config))

    @staticmethod
    def knows(layer: Any, config: Any) -> bool:
        return True

    def run(self, residual_ND: Tensor, cos_LK: Any, sin_LK: Any) -> None:
        layer, mlp, H = self.layer, self.layer.mlp, self.attention.head_dim
        heads_NC3H = layer.attention.query_key_value(layer.input_layernorm(residual_ND)).view(
            len(residual_ND), -1, 3, H
        )
        query_N, key_N, value_N = (heads.flatten(1) for heads in heads_NC3H.unbind(2))
        attention_ND = layer.attention.dense(self.attention(query_N, key_N, value_N, cos_LK, sin_LK))
        if not layer.use_parallel_residual:
            residual_ND += attention_ND
        inner_NI = mlp.dense_h_to_4h(layer.post_attention_layernorm(residual_ND))
        if layer.use_parallel_residual:
            residual_ND += attention_ND
        residual_ND += mlp.dense_4h_to_h(_activate(inner_NI, self.activation, mlp.act))


_KINDS: dict[str, type[_Layer]] = {
    "GPT2Block": _Gpt2Layer,
    "GPTNeoXLayer": _NeoxLayer,
    **dict.fromkeys(
        [f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")],
        _LlamaLayer,
    ),
}


class FusedDecoder:
    """The layers of one model; `of` returns None for an unknown model."""

    def __init__(self, decoder: Any, layers: Iterable[Any], config: Any) -> None:
        self._rotary = getattr(decoder, "rotary_emb", None)
        self._layers = [_KINDS[type(layer).__name__](layer, config) for layer in layers]

    @classmethod
    def of(cls, decoder: Any, layers: Iterable[Any], config: Any) -> "FusedDecoder | None":
        weight = next(decoder.parameters())
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        if not all((kind := _KINDS.get(type(layer).__name__)) and kind.knows(layer, config) for layer in layers):
            return None
        return cls(decoder, layers, config)

    @torch.no_grad()
    def run(self, hidden_BLD: Tensor, first: int, last: int, *, first_position: int = 0) -> Tensor:
        """Compute hidden_BLD after layer `last` from those before layer `first`; the input is not changed.

        Full rows, attended causally; their first token has position id `first_position`. L at most MAX_CONTEXT.
        """
        _, L, D = hidden_BLD.shape
        layers = self._layers[first : last + 1]
        ropes = {layer.rope: self._rope(layer.rope, hidden_BLD, first_position) for layer in layers}
        hidden_BLD = hidden_BLD.clone(memory_format=torch.contiguous_format)
        tasks = hidden_BLD.split(max(1, TOKENS_A_TASK // L))

        def through_layers(rows_BLD: Tensor) -> None:
            with torch.no_grad():
                for layer in layers:
                    layer.run(rows_BLD.view(-1, D), *ropes[layer.rope])

        on_each_core(through_layers, tasks)
        return hidden_BLD

    def _rope(self, kind: str, hidden_BLD: Tensor, first_position: int) -> tuple[Any, Any]:
        """Return cos_LK and sin_LK as the model rounds them, float32; K is 0 without rotary embeddings."""
        L = hidden_BLD.shape[1]
        if self._rotary is None:
            return np.empty((L, 0), np.float32), np.empty((L, 0), np.float32)
        of_kind = [kind] if hasattr(self._rotary, f"{kind}_inv_freq") else []
        cos, sin = self._rotary(hidden_BLD, first_position + torch.arange(L)[None], *of_kind)
        return cos[0].float().contiguous().numpy(), sin[0].float().contiguous().numpy()


def _activate(x_NI: Tensor, constants: tuple[np.float32, np.float32] | None, module: nn.Module) -> Tensor:
    """Apply the activation, in place where there is a kernel for it."""
    if constants is None:
        return module(x_NI)
    kernels.activation(kernels.as_array(x_NI), *constants)
    return x_NI


def _activation_name(config: Any) -> str:
    return (
        getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or config.activation_function
    )
