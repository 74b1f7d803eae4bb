"""Decoder layers of the Llama and Gemma families on the CPU, about twice as fast as transformers' own.

transformers spends half its time outside the matrix products: norms in several float32 passes, rotary embeddings, the
activation, a flash attention that is slow at short contexts. Here each is one pass (`fused_kernels`), attention is two
batched products over all heads of a key group, and every core takes contexts of its own through all layers, so that
their activations stay in its cache.

Shape legend: B rows (contexts), L positions, D width, N flat tokens, H head width, R rows of queries.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from legato import fused_kernels as kernels

TOKENS_A_TASK = 512
MAX_CONTEXT = 2048  # beyond it the matrix of scores outgrows the caches, and flash attention is the better way
_POST_NORMS = {"Gemma2DecoderLayer", "Gemma3DecoderLayer"}
_GEMMA = {"GemmaDecoderLayer", *_POST_NORMS}
_KNOWN = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", *_GEMMA}
_ACTIVATIONS = {"silu": kernels.SILU, "gelu_pytorch_tanh": kernels.GELU_TANH}
_NO_WEIGHT = np.empty(0, np.float32)


@dataclass(frozen=True)
class _Norm:
    weight: Any
    eps: np.float32

    @classmethod
    def of(cls, module: nn.Module | None, is_gemma: bool) -> "_Norm":
        """No module gives an empty weight: no norm."""
        if module is None:
            return cls(_NO_WEIGHT, np.float32(0))
        eps: Any = getattr(module, "variance_epsilon", None) or module.eps
        weight: Any = module.weight
        return cls(weight.detach().float().add(1.0 if is_gemma else 0.0).numpy(), np.float32(eps))


@dataclass(frozen=True)
class _Layer:
    """A decoder layer's modules and constants; the matrices stay the model's own."""

    attention: Any
    mlp: Any
    input_norm: _Norm
    attention_output_norm: _Norm
    mlp_norm: _Norm
    mlp_output_norm: _Norm
    query_norm: _Norm
    key_norm: _Norm
    activation: tuple[np.float32, np.float32]
    softcap: np.float32
    window: int
    rope: str

    @classmethod
    def of(cls, layer: Any, config: Any) -> "_Layer":
        kind, attention = type(layer).__name__, layer.self_attn

        def norm(owner: Any, name: str) -> _Norm:
            return _Norm.of(getattr(owner, name, None), kind in _GEMMA)

        has_post_norms = kind in _POST_NORMS
        return cls(
            attention=attention,
            mlp=layer.mlp,
            input_norm=norm(layer, "input_layernorm"),
            attention_output_norm=norm(layer, "post_attention_layernorm" if has_post_norms else "none"),
            mlp_norm=norm(layer, "pre_feedforward_layernorm" if has_post_norms else "post_attention_layernorm"),
            mlp_output_norm=norm(layer, "post_feedforward_layernorm" if has_post_norms else "none"),
            query_norm=norm(attention, "q_norm"),
            key_norm=norm(attention, "k_norm"),
            activation=_ACTIVATIONS[_activation_name(config)],
            softcap=np.float32(getattr(attention, "attn_logit_softcapping", None) or 0.0),
            window=getattr(attention, "sliding_window", getattr(config, "sliding_window", None)) or 2**30,
            rope=getattr(attention, "layer_type", None) or "",
        )

    def run(self, residual_ND: Tensor, ropes: dict[str, tuple[Any, Any]]) -> None:
        """Add to the residual stream what the layer adds; tokens of whole contexts."""
        normed_ND = torch.empty_like(residual_ND)
        _normalise(residual_ND, self.input_norm, normed_ND)
        self._add(residual_ND, self._attend(normed_ND, *ropes[self.rope]), self.attention_output_norm)
        _normalise(residual_ND, self.mlp_norm, normed_ND)
        gate_NI, up_NI = self.mlp.gate_proj(normed_ND), self.mlp.up_proj(normed_ND)
        kernels.gated_activation(kernels.as_array(gate_NI), kernels.as_array(up_NI), *self.activation)
        self._add(residual_ND, self.mlp.down_proj(gate_NI), self.mlp_output_norm)

    def _attend(self, x_ND: Tensor, cos_LH: Any, sin_LH: Any) -> Tensor:
        attention, (L, head_dim) = self.attention, cos_LH.shape
        query_N, key_N, value_N = attention.q_proj(x_ND), attention.k_proj(x_ND), attention.v_proj(x_ND)
        B, n_groups = len(x_ND) // L, key_N.shape[1] // head_dim
        per_group = query_N.shape[1] // key_N.shape[1]
        query_RH = query_N.new_empty(B * n_groups * L * per_group, head_dim)
        key_RH = key_N.new_empty(B * n_groups * L, head_dim)
        for heads, norm, n_heads, out in (
            (query_N, self.query_norm, per_group, query_RH),
            (key_N, self.key_norm, 1, key_RH),
        ):
            kernels.rotate_heads(
                kernels.as_array(heads), norm.weight, norm.eps, cos_LH, sin_LH, n_groups, n_heads, kernels.as_array(out)
            )
        value_GLH = value_N.view(B, L, n_groups, head_dim).transpose(1, 2).reshape(B * n_groups, L, head_dim)
        scores_GRL = torch.bmm(
            query_RH.view(B * n_groups, L * per_group, head_dim), key_RH.view(B * n_groups, L, head_dim).transpose(1, 2)
        )
        kernels.causal_softmax(
            kernels.as_array(scores_GRL.view(-1, L)),
            per_group,
            np.float32(attention.scaling),
            self.softcap,
            self.window,
        )
        mixed = torch.bmm(scores_GRL, value_GLH).view(B, n_groups, L, per_group * head_dim)
        return attention.o_proj(mixed.transpose(1, 2).reshape(len(x_ND), -1))

    @staticmethod
    def _add(residual_ND: Tensor, x_ND: Tensor, output_norm: _Norm) -> None:
        if len(output_norm.weight):
            kernels.add_rms_norm(
                kernels.as_array(residual_ND), kernels.as_array(x_ND), output_norm.weight, output_norm.eps
            )
        else:
            residual_ND += x_ND


class FusedDecoder:
    """The layers of one model; `of` gives None for a model that it does not know."""

    def __init__(self, decoder: Any, layers: Iterable[Any], config: Any) -> None:
        self._rotary = decoder.rotary_emb
        self._layers = [_Layer.of(layer, config) for layer in layers]

    @classmethod
    def of(cls, decoder: Any, layers: Iterable[Any], config: Any) -> "FusedDecoder | None":
        weight = next(decoder.parameters())
        is_known = (
            all(type(layer).__name__ in _KNOWN and layer.self_attn.is_causal for layer in layers)
            and weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and _activation_name(config) in _ACTIVATIONS
        )
        return cls(decoder, layers, config) if is_known else None

    @torch.no_grad()
    def run(self, hidden_BLD: Tensor, first: int, last: int) -> Tensor:
        """hidden_BLD after layer `last`, given those before layer `first`; the input is left as it is.

        Full rows, attended causally from position 0. L at most MAX_CONTEXT.
        """
        _, L, D = hidden_BLD.shape
        ropes = {layer.rope: self._rope(layer.rope, hidden_BLD) for layer in self._layers[first : last + 1]}
        hidden_BLD = hidden_BLD.clone(memory_format=torch.contiguous_format)
        tasks = hidden_BLD.split(max(1, TOKENS_A_TASK // L))

        def through_layers(rows_BLD: Tensor) -> None:
            with torch.no_grad():
                for layer in self._layers[first : last + 1]:
                    layer.run(rows_BLD.view(-1, D), ropes)

        n_threads = min(torch.get_num_threads(), len(tasks))
        if n_threads == 1:
            for task in tasks:
                through_layers(task)
        else:
            list(_workers(torch.get_num_threads()).map(through_layers, tasks))
        return hidden_BLD

    def _rope(self, kind: str, hidden_BLD: Tensor) -> tuple[Any, Any]:
        """cos_LH and sin_LH as the model rounds them, float32."""
        positions = torch.arange(hidden_BLD.shape[1])[None]
        cos, sin = self._rotary(hidden_BLD, positions, *([kind] if hasattr(self._rotary, f"{kind}_inv_freq") else []))
        return cos[0].float().contiguous().numpy(), sin[0].float().contiguous().numpy()


def _normalise(x_ND: Tensor, norm: _Norm, out_ND: Tensor) -> None:
    kernels.rms_norm(kernels.as_array(x_ND), norm.weight, norm.eps, kernels.as_array(out_ND))


def _activation_name(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


@cache
def _workers(n_threads: int) -> ThreadPoolExecutor:
    """That many threads, in each of which torch uses one core only."""
    pool = ThreadPoolExecutor(n_threads, "fused-decoder")
    all_started = Barrier(n_threads)

    def settle() -> None:
        torch.set_num_threads(1)
        all_started.wait()

    for settled in [pool.submit(settle) for _ in range(n_threads)]:
        settled.result()
    torch.set_num_threads(n_threads)  # for threads started later: what the workers set holds for those as well
    return pool
