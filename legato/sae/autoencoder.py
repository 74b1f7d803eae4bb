"""The trained SAE: raw activations in, raw activations out.

Shape legend: B rows, L positions, N flat tokens, D width, F latents, P active pairs in token order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from legato.common.errors import LegatoError, UsageError
from legato.common.hardware import fixed_matmul
from legato.data.activations import ActivationBatch, Normaliser
from legato.data.sites import CENTRED
from legato.sae.architectures import Architecture, architecture_named
from legato.sae.architectures.preactivations import Encoder
from legato.sae.codes import SparseCodes
from legato.sae.formats import safetensors_file, sparsify
from legato.sae.formats.detect import read_sae
from legato.sae.formats.dictionary_learning import write_dictionary_learning
from legato.sae.formats.hook_names import layer_and_site
from legato.sae.formats.hub_download import local_copy
from legato.sae.formats.saelens import write_saelens_folder
from legato.sae.formats.weights import SAEWeights, checked_details, without_input_bias

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class SparseAutoencoder:
    """codes = activation(acts @ W_enc + b_enc), reconstruction = codes @ W_dec + b_dec, all in raw activation units.

    W_enc (D, F), b_enc (F), W_dec (F, D) with unit rows where Legato trained it, b_dec (D): float32.
    architecture: what the activation is, with its thresholds and numbers: see sae/architectures. One with state goes
        along the sequence, token after token. Of Gated b_enc is the magnitude's bias.
    details: what made it (objective, model, layer, normaliser, versions); saved as legato.json.

    >>> from legato.sae.architectures import TopK
    >>> sae = SparseAutoencoder(torch.eye(2), torch.zeros(2), torch.eye(2), torch.ones(2), TopK(1))
    >>> sae.encode(torch.tensor([3.0, 1.0])).tolist(), sae(torch.tensor([3.0, 1.0])).tolist()
    ([3.0, 0.0], [4.0, 1.0])
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    architecture: Architecture
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.architecture.tensors().items():
            if tensor is None:
                raise UsageError(f"a {self.architecture.name} SAE without {name}: give the architecture its {name}")
        if self.device.type == "cpu" and not (bool(self.W_dec.any()) and bool(self.W_enc.any())):
            raise LegatoError("the SAE's weights are all zero: it was never trained; train it before using it")

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def to(self, device: torch.device | str) -> "SparseAutoencoder":
        """Return the same SAE with its tensors on that device; `encode` then takes activations there."""
        moved = {name: getattr(self, name).to(device) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        return replace(self, architecture=self.architecture.to(device), **moved)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, acts: Tensor, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
        """Codes [..., L, F] of raw activations [..., L, D]; zero where mask [..., L] is False.

        doc [..., L] matters only to SAEs with state along the sequence. Raises LegatoError on another width, and on
        the CPU on non-finite activations: elsewhere that would wait for the device, and their codes are not finite.
        """
        self._check(acts)
        return self.architecture.encode(acts.to(self.W_enc.dtype) @ self.W_enc, self.b_enc, mask, doc)

    def decode(self, codes: Tensor) -> Tensor:
        """Reconstruction [..., L, D] of codes [..., L, F], in raw activation units."""
        return codes.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def __call__(self, acts: Tensor) -> Tensor:
        return self.decode(self.encode(acts))

    def encode_sparse(self, batch: ActivationBatch) -> SparseCodes:
        """The active pairs of a batch's valid positions; codes are rescaled by their decoder norm.

        On the CPU only candidates are computed exactly where the architecture can tell them (see
        `Architecture.encode_sparse`); on another device all codes are, and the pairs lie there.
        """
        B, L, _ = batch.acts_BLD.shape
        self._check(batch.acts_BLD)
        norm_F, encoder = self.W_dec.norm(dim=-1), Encoder(self.W_enc, self.b_enc, self.b_dec)
        parts = []
        rows_at_once = max(1, _TOKENS_AT_ONCE // L)
        for start in range(0, B, rows_at_once):
            rows = slice(start, start + rows_at_once)
            block = (batch.acts_BLD[rows].float(), batch.mask_BL[rows], batch.doc_BL[rows])
            if self.device.type == "cpu":
                token_P, latent_P, value_P = self.architecture.encode_sparse(encoder, *block)
            else:
                codes_NF = self.encode(*(tensor.to(self.device) for tensor in block)).flatten(0, 1)
                token_P, latent_P = (codes_NF > 0).nonzero(as_tuple=True)
                value_P = codes_NF[token_P, latent_P]
            parts.append((token_P + start * L, latent_P, value_P * norm_F[latent_P]))
        tokens, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
        return SparseCodes(tokens, latents, values, (B, L, self.d_sae))

    def decode_sparse(self, codes: SparseCodes) -> Tensor:
        """Reconstruction [B, L, D] of sparse codes; positions without any code decode to b_dec."""
        B, L, _ = codes.shape
        value_P = codes.value_P / self.W_dec.norm(dim=-1)[codes.latent_P]
        offsets = torch.searchsorted(codes.token_P, torch.arange(B * L, device=codes.token_P.device))
        acts_ND = torch.nn.functional.embedding_bag(
            codes.latent_P, self.W_dec, offsets, mode="sum", per_sample_weights=value_P
        )
        return (acts_ND + self.b_dec).view(B, L, self.d_in)

    def on_raw(self, normaliser: Normaliser) -> "SparseAutoencoder":
        """Return the same SAE for raw activations, where this one takes normalised ones, scale * (x - mean)."""
        mean_D, scale = normaliser.mean_D, normaliser.scale
        shift_F = fixed_matmul(mean_D[None], self.W_enc)[0]
        b_enc, architecture = self.architecture.scaled(self.b_enc, shift_F, scale)
        return replace(self, b_enc=b_enc, b_dec=mean_D + self.b_dec / scale, architecture=architecture)

    def stateless(self, batch: ActivationBatch) -> "SparseAutoencoder":
        """A SAE with the weights of this one and no state along the sequence, for tools that keep no order of tokens.

        topk for hysteresis_topk; else jumprelu, with one factor on all thresholds that gives it the L0 that this SAE
        has on the batch's valid tokens. How far it is from this one there is saved with it, as details["stateless"]:
        the L0, `same_pairs` (token-latent pairs active in both / in either) and the FVU of both.
        Raises UsageError for a SAE without state, LegatoError where thresholds are not positive or nothing fires.
        """
        if not self.architecture.stateful:
            raise UsageError(f"a {self.architecture.name} SAE keeps no state: save it as it is")
        codes_NF = self.encode(batch.acts_BLD, batch.mask_BL, batch.doc_BL)[batch.mask_BL]
        on_NF = codes_NF > 0
        count = int(on_NF.sum())
        if count == 0:
            raise LegatoError("no latent fires on the batch: was the SAE trained?")
        x_ND = batch.acts_BLD[batch.mask_BL].to(self.W_enc.dtype)
        plain = replace(self, architecture=self.architecture.stateless(x_ND @ self.W_enc + self.b_enc, count))
        plain_NF = plain.encode(x_ND)
        power = (x_ND - x_ND.mean(0)).square().sum()
        difference = {
            "of": {"architecture": self.architecture.name, **self.architecture.saved_numbers()},
            "tokens": len(x_ND),
            "l0": count / len(x_ND),
            "same_pairs": float((on_NF & (plain_NF > 0)).sum() / (on_NF | (plain_NF > 0)).sum()),
            "fvu": float((x_ND - plain.decode(plain_NF)).square().sum() / power),
            "fvu_with_state": float((x_ND - self.decode(codes_NF)).square().sum() / power),
        }
        return replace(plain, details={**self.details, "stateless": difference})

    def save(self, path: str | Path) -> Path:
        """Save as a SAELens inference folder with Legato's details beside it (see sae/formats/saelens.py)."""
        details = dict(self.details)
        metadata = {
            "model_name": details.get("model"),
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": details.get("module_path"),
            "context_size": details.get("context_length"),
            "prepend_bos": details.get("bos"),
            "dataset_path": details.get("dataset"),
        }
        return write_saelens_folder(path, self.stored(), metadata=metadata, legato=details)

    def stored(self) -> SAEWeights:
        """Return the content of its file, under the names of SAELens' tensors."""
        architecture = self.architecture
        own = {"W_enc": self.W_enc, architecture.bias: self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        return SAEWeights(
            architecture=architecture.name,
            weights={name: tensor.detach().cpu() for name, tensor in {**own, **architecture.tensors()}.items()},
            apply_b_dec_to_input=False,
            details=dict(self.details),
            numbers=architecture.saved_numbers(),
        )

    @classmethod
    def load(cls, path: str | Path) -> "SparseAutoencoder":
        """Open a saved SAE, Legato's or another tool's: see sae/formats/detect.py for what is recognised, by content.

        path: where it lies, or on the hub: "owner/name" or, of a repository with several, "owner/name/folder".
        Raises UsageError where there is none, LegatoError where it is damaged or cannot be reproduced here.
        """
        stored = read_sae(local_copy(path))
        weights = without_input_bias(stored)
        kind = architecture_named(stored.architecture)
        return cls(
            weights["W_enc"],
            weights[kind.bias],
            weights["W_dec"],
            weights["b_dec"],
            kind.of(stored.numbers, weights),
            details=checked_details(stored.details, what=str(path)),
        )

    def place(self) -> tuple[int, str] | None:
        """(layer, site) that it reads, None where its details do not say; UsageError for a hook that Legato cannot
        read."""
        if (layer := self.details.get("layer")) is not None:
            place = layer, self.details.get("site") or "resid_post"
        elif hook_name := self.details.get("module_path"):  # in the words of the tool that saved it
            place = layer_and_site(hook_name)
        else:
            return None
        is_centred = (self.details.get("processed") or {}).get("center_writing_weights")
        return (place[0], place[1] + CENTRED) if is_centred else place

    def _check(self, acts: Tensor) -> None:
        if acts.shape[-1] != self.d_in:
            raise LegatoError(
                f"activations have width {acts.shape[-1]}, the SAE expects {self.d_in}: wrong model or layer"
            )
        if acts.device.type == "cpu" and not torch.isfinite(acts).all():
            raise LegatoError("activations hold values that are not finite; harvest them again or in float32")


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
        safetensors_file.write_one_file(path, sae.stored())
    else:
        raise UsageError(f"{to!r} is no format to export to: choose one of {', '.join(EXPORT_FORMATS)}")
    return path
