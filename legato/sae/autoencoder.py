"""The trained SAE: raw activations in, raw activations out.

Shape legend: B rows, L positions, N flat tokens, D width, F latents.

Active pairs of a trained SAE with positive thresholds or a budget, without computing every code exactly.

Shape legend: B rows, L positions, N flat tokens, D width, F latents, P pairs in token order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.common.hardware import fast_matmul_dtype, fixed_matmul
from legato.data.activations import ActivationBatch, Normaliser
from legato.sae.architectures import Preactivations, hysteresis_topk, window_topk
from legato.sae.architectures import hysteresis as stateful
from legato.sae.architectures.hysteresis_topk import held_top_pairs
from legato.sae.architectures.persistent import leaked
from legato.sae.architectures.preactivations import Array
from legato.sae.codes import SparseCodes
from legato.sae.formats import safetensors_file as one_file
from legato.sae.formats import sparsify
from legato.sae.formats.detect import read_sae
from legato.sae.formats.dictionary_learning import write_dictionary_learning
from legato.sae.formats.hub_download import local_copy
from legato.sae.formats.saelens import write_saelens_folder
from legato.sae.formats.weights import NUMBERS, WEIGHT_SHAPES, SAEWeights, checked_details, without_input_bias
from legato.sae.kernels import pairs as kernels
from legato.sae.kernels.leak import leak_forward
from legato.sae.segments import Segments

# What each architecture has besides the weights.
_FIELDS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "topk": ("k",),
    "jumprelu": ("threshold",),
    "hysteresis": ("threshold", "release"),
    "hysteresis_topk": ("k", "release"),
    "window_topk": ("threshold", "window"),
    "persistent": ("threshold", "leak", "tail"),
    "gated": ("b_gate", "r_mag"),
}

ARCHITECTURES = tuple(_FIELDS)
_STATEFUL = ("hysteresis", "hysteresis_topk", "window_topk", "persistent")
_STATELESS: dict[str, Any] = dict.fromkeys(("release", "window", "leak", "tail"))
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Nominator:
    """A matmul in the machine's fast dtype nominates pairs within a tenth of their threshold, or of their token's
    budget, and only those are computed exactly, in float32.

    pre = (acts - b_dec) @ W_enc + bias_F, on above threshold_F > 0, or where it is one of the token's k largest (with a
    release: see sparsity.Hysteresis and HysteresisTopK). Code of what is on: pre, or relu(gain_F * pre + offset_F);
    with a leak it enters a state, which is the code (see persistence.carry).
    """

    W_enc_FD: Tensor
    b_dec: Tensor
    bias_F: Tensor
    threshold_F: Tensor | None
    gain_F: Tensor | None = None
    offset_F: Tensor | None = None
    release: float | None = None
    k: int | None = None
    leak_F: Tensor | None = None
    tail: float | None = None

    @cached_property
    def _low_W_enc_FD(self) -> Tensor:
        return self.W_enc_FD.to(fast_matmul_dtype())

    def codes(self, acts_BLD: Tensor, layout: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """(token_P, latent_P, code_P) of the active pairs."""
        x_ND = acts_BLD.flatten(0, 1) - self.b_dec
        low_W_enc_FD = self._low_W_enc_FD
        dtype = low_W_enc_FD.dtype
        pre = Preactivations(
            fixed_matmul(x_ND.to(dtype), low_W_enc_FD.T, self.bias_F.to(dtype)),
            x_ND.numpy(),
            self.W_enc_FD.numpy(),
            self.bias_F.numpy(),
            layout,
        )
        if self.k is not None:
            return _tensors(*held_top_pairs(pre, self.k, self.release or 1.0, _NOMINATED_SHARE)[1:])
        assert self.threshold_F is not None
        threshold_F = self.threshold_F.numpy()
        floor_F = np.float32(_NOMINATED_SHARE * (self.release or 1)) * threshold_F
        token_P, latent_P, value_P = pre.scan_latents(floor_F, 64 * len(x_ND))
        if self.release is not None:
            on_P = pre.critical(token_P, latent_P, value_P / threshold_F[latent_P], self.release) >= 1
        else:
            on_P = value_P > threshold_F[latent_P]
        if self.gain_F is not None and self.offset_F is not None:
            value_P = self.gain_F.numpy()[latent_P] * value_P + self.offset_F.numpy()[latent_P]
            on_P &= value_P > 0
        if self.leak_F is not None and self.tail is not None:
            selected = kernels.keep(len(x_ND), token_P, latent_P, value_P, on_P)
            order = kernels.by_latent(selected, len(threshold_F))
            codes = leak_forward(order, self.leak_F.numpy(), self.tail, layout).pairs(len(x_ND))
            return _tensors(codes.token_P, codes.latent_P, codes.value_P)
        return _tensors(token_P[on_P], latent_P[on_P], value_P[on_P])


@dataclass(frozen=True)
class SparseAutoencoder:
    """codes = activation(acts @ W_enc + b_enc), reconstruction = codes @ W_dec + b_dec, all in raw activation units.

    W_enc (D, F), b_enc (F), W_dec (F, D) with unit rows where Legato trained it, b_dec (D): float32.
    architecture: "standard" (ReLU), "topk" (k), "jumprelu" (threshold (F); a latent fires strictly above it), "gated"
        (b_gate (F), r_mag (F): a latent fires where acts @ W_enc + b_gate > 0, with the code
        relu(exp(r_mag) * (acts @ W_enc) + b_enc)), or one with state along the sequence: "hysteresis" (threshold,
        release: a latent switches on at its threshold and stays on, token after token, down to release times it),
        "hysteresis_topk" (k, release: the k largest, where what was on counts 1 / release times), "window_topk"
        (threshold, window: on in the windows whose norm reaches it) and "persistent" (threshold, leak (F), tail: what a
        jumprelu would give enters a state that leaks; see persistence.leaked); see sparsity.
    details: what made it (objective, model, layer, normaliser, versions); saved as legato.json.
    """

    architecture: str
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    k: int | None = None
    release: float | None = None
    window: int | None = None
    leak: Tensor | None = None
    tail: float | None = None
    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UsageError(f"architecture {self.architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}")
        for name in ("k", "threshold", "release", "window", "leak", "tail", "b_gate", "r_mag"):
            value = getattr(self, name)
            if (name in _FIELDS[self.architecture]) != (value is not None):
                raise UsageError(f"{name} = {value} does not fit architecture {self.architecture!r}")
        if not bool(self.W_dec.any()) or not bool(self.W_enc.any()):
            raise LegatoError("the SAE's weights are all zero: it was never trained; train it before using it")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, acts: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """Codes [..., L, F] of raw activations [..., L, D]; zero where mask [..., L] is False.

        doc [..., L] matters only to SAEs with state along the sequence. Raises LegatoError on another width or on
        non-finite activations.
        """
        self._check(acts)
        pre = acts.to(self.W_enc.dtype) @ self.W_enc
        if self.b_gate is not None and self.r_mag is not None:
            codes = torch.relu(self.r_mag.exp() * pre + self.b_enc) * (pre + self.b_gate > 0)
            return codes if mask is None else codes * mask.unsqueeze(-1)
        pre = pre + self.b_enc
        if self.leak is not None and self.tail is not None and self.threshold is not None:
            return leaked(torch.relu(pre) * (pre > self.threshold), self.leak, self.tail, mask, doc)
        if self.architecture in _STATEFUL:
            return pre * self._on_along_sequence(pre, mask, doc)
        codes = self._activate(pre)
        return codes if mask is None else codes * mask.unsqueeze(-1)

    def _on_along_sequence(self, pre: Tensor, mask: Tensor | None, doc: Tensor | None) -> Tensor:
        if self.architecture == "hysteresis_topk":
            assert self.k is not None
            assert self.release is not None
            return hysteresis_topk.held_top(pre, self.k, self.release, mask, doc)
        assert self.threshold is not None
        if self.architecture == "window_topk":
            assert self.window is not None
            return window_topk.held_windows(pre, self.threshold, self.window, mask, doc)
        assert self.release is not None
        return stateful.held(pre, self.threshold, self.release, mask, doc)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruction [..., L, D] of codes [..., L, F], in raw activation units."""
        return codes @ self.W_dec + self.b_dec

    def __call__(self, acts: Tensor) -> Tensor:
        return self.decode(self.encode(acts))

    def encode_sparse(self, batch: ActivationBatch) -> SparseCodes:
        """The active pairs of a batch's valid positions; codes are rescaled by their decoder norm.

        Where there is a budget, or thresholds are positive, a matmul in the machine's fast dtype nominates pairs and
        only those are computed exactly, in float32.
        """
        B, L, _ = batch.acts_BLD.shape
        self._check(batch.acts_BLD)
        norm_F = self.W_dec.norm(dim=-1)
        nominator = self._nominator()
        parts = []
        rows_at_once = max(1, _TOKENS_AT_ONCE // L)
        for start in range(0, B, rows_at_once):
            rows = slice(start, start + rows_at_once)
            acts_BLD, mask_BL, doc_BL = batch.acts_BLD[rows].float(), batch.mask_BL[rows], batch.doc_BL[rows]
            if nominator is not None:
                token_P, latent_P, value_P = nominator.codes(acts_BLD, Segments.of(mask_BL, doc_BL))
            else:
                token_P, latent_P, value_P = _positive(self.encode(acts_BLD, mask_BL, doc_BL).flatten(0, 1))
            parts.append((token_P + start * L, latent_P, value_P * norm_F[latent_P]))
        tokens, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return SparseCodes(tokens, latents, values, (B, L, self.d_sae))

    def _nominator(self) -> Nominator | None:
        """None where a threshold is not positive, or whole windows decide."""
        # activations less b_dec have smaller numbers, which round less
        centre_F = fixed_matmul(self.b_dec[None], self.W_enc)[0]
        gain_F = offset_F = None
        if self.b_gate is not None and self.r_mag is not None:
            bias_F, gain_F = torch.zeros_like(centre_F), self.r_mag.exp()
            threshold_F: Tensor | None = -centre_F - self.b_gate
            offset_F = gain_F * centre_F + self.b_enc
        elif self.architecture in ("standard", "window_topk"):
            return None
        else:
            bias_F, threshold_F = centre_F + self.b_enc, self.threshold
        if threshold_F is not None and not bool((threshold_F > 0).all()):
            return None
        W_enc_FD = self.W_enc.T.contiguous()
        return Nominator(
            W_enc_FD, self.b_dec, bias_F, threshold_F, gain_F, offset_F, self.release, self.k, self.leak, self.tail
        )

    def decode_sparse(self, codes: SparseCodes) -> Tensor:
        """Reconstruction [B, L, D] of sparse codes; positions without any code decode to b_dec."""
        B, L, _ = codes.shape
        value_P = codes.value_P / self.W_dec.norm(dim=-1)[codes.latent_P]
        offsets = torch.searchsorted(codes.token_P, torch.arange(B * L))
        acts_ND = torch.nn.functional.embedding_bag(
            codes.latent_P, self.W_dec, offsets, mode="sum", per_sample_weights=value_P
        )
        return (acts_ND + self.b_dec).view(B, L, self.d_in)

    def on_raw(self, normaliser: Normaliser) -> "SparseAutoencoder":
        """The same SAE for raw activations, where this one takes normalised ones, scale * (x - mean).

        Codes and biases are lengths and shrink by the scale, thresholds with them; the weights, k, release, window,
        leak, tail and r_mag have no unit. A bias also takes up the mean.
        """
        mean_D, scale = normaliser.mean_D, normaliser.scale
        shift_F = fixed_matmul(mean_D[None], self.W_enc)[0]
        gain = 1.0 if self.r_mag is None else self.r_mag.exp()
        return replace(
            self,
            b_enc=self.b_enc / scale - shift_F * gain,
            b_dec=mean_D + self.b_dec / scale,
            threshold=None if self.threshold is None else self.threshold / scale,
            b_gate=None if self.b_gate is None else self.b_gate / scale - shift_F,
        )

    def stateless(self, batch: ActivationBatch) -> "SparseAutoencoder":
        """A SAE with the weights of this one and no state along the sequence, for tools that keep no order of tokens.

        topk for hysteresis_topk; else jumprelu, with one factor on all thresholds that gives it the L0 that this SAE
        has on the batch's valid tokens. How far it is from this one there is saved with it, as details["stateless"]:
        the L0, `same_pairs` (token-latent pairs active in both / in either) and the FVU of both.
        Raises UsageError for a SAE without state, LegatoError where thresholds are not positive or nothing fires.
        """
        if self.architecture not in _STATEFUL:
            raise UsageError(f"a {self.architecture} SAE keeps no state: save it as it is")
        codes_NF = self.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL)[batch.mask_BL]
        on_NF = codes_NF > 0
        count = int(on_NF.sum())
        if count == 0:
            raise LegatoError("no latent fires on the batch: was the SAE trained?")
        x_ND = batch.acts_BLD[batch.mask_BL].to(self.W_enc.dtype)
        if self.threshold is None:
            plain = replace(self, architecture="topk", **_STATELESS)
        elif bool((self.threshold > 0).all()):
            share_NF = (x_ND @ self.W_enc + self.b_enc) / self.threshold
            factor = share_NF.flatten().topk(count + 1).values[-1].clamp_min(0)
            plain = replace(self, architecture="jumprelu", threshold=factor * self.threshold, **_STATELESS)
        else:
            raise LegatoError("a threshold is not positive: was the SAE trained?")
        plain_NF = plain.encode(x_ND)
        power = (x_ND - x_ND.mean(0)).square().sum()
        difference = {
            "of": {
                "architecture": self.architecture,
                "release": self.release,
                "window": self.window,
                "tail": self.tail,
            },
            "tokens": len(x_ND),
            "l0": count / len(x_ND),
            "same_pairs": float((on_NF & (plain_NF > 0)).sum() / (on_NF | (plain_NF > 0)).sum()),
            "fvu": float((x_ND - plain.decode(plain_NF)).square().sum() / power),
            "fvu_with_state": float((x_ND - self.decode(codes_NF)).square().sum() / power),
        }
        return replace(plain, details={**self.details, "stateless": difference})

    def save(self, path: str | Path) -> Path:
        """Save as a SAELens inference folder with Legato's details beside it (see sae/formats/saelens.py)."""
        details, gated = dict(self.details), self.architecture == "gated"
        return write_saelens_folder(
            path,
            architecture=self.architecture,
            W_enc=self.W_enc,
            W_dec=self.W_dec,
            b_enc=None if gated else self.b_enc,
            b_dec=self.b_dec,
            threshold=self.threshold,
            k=self.k,
            release=self.release,
            window=self.window,
            tail=self.tail,
            leak=self.leak,
            b_gate=self.b_gate,
            b_mag=self.b_enc if gated else None,
            r_mag=self.r_mag,
            apply_b_dec_to_input=False,
            metadata={
                "model_name": details.get("model"),
                "model_class_name": "AutoModelForCausalLM",
                "hook_name": details.get("module_path"),
                "context_size": details.get("context_length"),
                "prepend_bos": details.get("bos"),
                "dataset_path": details.get("dataset"),
            },
            legato=details,
        )

    def stored(self) -> SAEWeights:
        """What a file holds of it, under the names of SAELens' tensors."""
        renamed = {"b_mag": "b_enc"}
        return SAEWeights(
            architecture=self.architecture,
            weights={name: getattr(self, renamed.get(name, name)) for name in WEIGHT_SHAPES[self.architecture]},
            apply_b_dec_to_input=False,
            details=dict(self.details),
            **{name: getattr(self, name) for name in NUMBERS.get(self.architecture, ())},
        )

    @classmethod
    def load(cls, path: str | Path) -> "SparseAutoencoder":
        """Open a saved SAE, Legato's or another tool's: see sae/formats/detect.py for what is recognised, by content.

        path: where it lies, or on the hub: "owner/name" or, of a repository with several, "owner/name/folder".
        Raises UsageError where there is none, LegatoError where it is damaged or cannot be reproduced here.
        """
        stored = read_sae(local_copy(path))
        weights = without_input_bias(stored)
        return cls(
            stored.architecture,
            weights["W_enc"],
            weights["b_mag" if stored.architecture == "gated" else "b_enc"],
            weights["W_dec"],
            weights["b_dec"],
            threshold=weights.get("threshold"),
            k=stored.k,
            release=stored.release,
            window=stored.window,
            leak=weights.get("leak"),
            tail=stored.tail,
            b_gate=weights.get("b_gate"),
            r_mag=weights.get("r_mag"),
            details=checked_details(stored.details, what=str(path)),
        )

    def _activate(self, pre: Tensor) -> Tensor:
        if self.architecture == "jumprelu":
            assert self.threshold is not None
            return torch.relu(pre) * (pre > self.threshold)
        if self.architecture == "topk":
            assert self.k is not None
            top = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, top.indices, top.values.relu())
        return torch.relu(pre)

    def _check(self, acts: Tensor) -> None:
        if acts.shape[-1] != self.d_in:
            raise LegatoError(
                f"activations have width {acts.shape[-1]}, the SAE expects {self.d_in}: wrong model or layer"
            )
        if not torch.isfinite(acts).all():
            raise LegatoError("activations hold values that are not finite; harvest them again or in float32")


def _positive(codes_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token_P, latent_P, code_P) of the positive codes."""
    N = len(codes_NF)
    token_P, latent_P = kernels.scan(codes_NF.numpy(), np.ones(N, np.bool_), np.zeros(N, np.float32), 64 * N)
    token, latent = torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long()
    return token, latent, codes_NF[token, latent]


EXPORT_FORMATS = ("saelens", "dictionary_learning", "sparsify", "safetensors")


def export(sae: "SparseAutoencoder", path: str | Path, to: str) -> Path:
    """Write an SAE in a format of EXPORT_FORMATS; return its path.

    saelens: any SAE, those with state for SAELens with `import legato.interop.saelens`. dictionary_learning: any
    without state. sparsify: topk. safetensors: any, one file for `SparseAutoencoder.load`. What is there already is
    replaced where it is an SAE of that format, else refused.
    Raises UsageError for another format, LegatoError where the format cannot hold the SAE.
    """
    path = Path(path)
    if to == "saelens":
        return sae.save(path)
    if to == "dictionary_learning":
        write_dictionary_learning(path, sae.stored())
    elif to == "sparsify":
        sparsify.write_sparsify(path, sae.stored())
    elif to == "safetensors":
        one_file.write_one_file(path, sae.stored())
    else:
        raise UsageError(f"{to!r} is no format to export to: choose one of {', '.join(EXPORT_FORMATS)}")
    return path


_NOMINATED_SHARE = 0.9


def _tensors(token_P: Array, latent_P: Array, value_P: Array) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(token_P).long(), torch.from_numpy(latent_P).long(), torch.from_numpy(value_P)
