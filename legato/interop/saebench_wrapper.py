"""Legato's SAEs inside sae-bench 0.6, which runs unmodified: a BaseSAE, and its `core` on any model and text.

sae-bench pins older versions of what Legato needs too; give both an environment of their own
(`pip install legato-sae sae-bench`). Import this module only there.

Shape legend: B rows, L positions, D width, F latents.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from torch import Tensor, nn

from legato.common.errors import UsageError
from legato.data.language_model import LanguageModel
from legato.data.tokens import TokenSet
from legato.evaluation.core.saebench import ROWS_PER_BATCH
from legato.interop.saebench_file import core_config, core_file_name
from legato.sae.autoencoder import SparseAutoencoder


class LegatoSAE(BaseSAE):
    """Any SAE that Legato opens, with unit decoder rows as sae-bench wants them.

    An SAE with state along the sequence reads activations [B, L, D] in order. Documents and special tokens are known
    after `follow`; without it a row is one document. Activations [N, D] have no order: each starts anew.
    """

    def __init__(self, sae: SparseAutoencoder, model_name: str, layer: int, hook_name: str | None = None) -> None:
        """Wrap an SAE. hook_name: None for TransformerLens' name of the layer's resid_post, for most of sae-bench."""
        cpu = torch.device("cpu")
        super().__init__(sae.d_in, sae.d_sae, model_name, layer, cpu, torch.float32, hook_name)
        norm_F = sae.W_dec.norm(dim=-1)
        norm_F = torch.where(norm_F > 0, norm_F, 1.0)
        self.W_enc.data, self.b_enc.data = sae.W_enc * norm_F, sae.b_enc * norm_F
        self.W_dec.data, self.b_dec.data = sae.W_dec / norm_F[:, None], sae.b_dec.clone()
        self.norm_F = nn.Parameter(norm_F, requires_grad=False)
        self.requires_grad_(False)
        self._sae = sae
        self._tokens_BL: Tensor | None = None
        self._special: tuple[int, ...] = ()
        self.cfg.architecture = sae.architecture.name
        self.cfg.architecture_str = sae.architecture.name  # type: ignore[attr-defined]  # core asks for it, the class lacks it

    def follow(self, model: nn.Module, special: Sequence[int]) -> None:
        """Take documents from the rows that `model` reads from now on: special tokens end them."""
        self._special = tuple(special)

        def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            tokens = arguments[0] if arguments else named.get("input_ids", named.get("input"))
            self._tokens_BL = tokens if isinstance(tokens, Tensor) else None

        model.register_forward_pre_hook(note, with_kwargs=True)

    def encode(self, x: Tensor) -> Tensor:
        """Encode raw activations [B, L, D] or [N, D] to codes [..., F], rescaled by the decoder norms."""
        acts = x.to("cpu", torch.float32)
        loose = acts.ndim == 2
        codes = self._sae.encode(acts[:, None])[:, 0] if loose else self._sae.encode(acts, *self._layout(acts))
        return (codes.to(x.device) * self.norm_F.to(x.device)).to(x.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec.to(feature_acts) + self.b_dec.to(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def _layout(self, acts_BLD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (mask_BL, doc_BL) of the last rows read, if their shape is that of the activations."""
        tokens_BL = self._tokens_BL
        if tokens_BL is None or tokens_BL.shape != acts_BLD.shape[:2]:
            return None, None
        special_BL = torch.isin(tokens_BL.cpu().long(), torch.tensor(self._special, dtype=torch.long))
        return ~special_BL, special_BL.int().cumsum(1).int()


def run_core(
    sae: SparseAutoencoder,
    model: LanguageModel,
    tokens: TokenSet,
    *,
    layer: int,
    site: str,
    out: str | Path,
    release: str,
    name: str,
    dataset: str,
) -> Path:
    """Run sae-bench's `core` on these rows; return the file that it wrote, `<release>_<name>_eval_results.json`.

    Whole batches of 16 rows count. Raises UsageError where there is none.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")
    from datasets import Dataset
    from sae_bench.evals.core import main as core
    from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_bench_version, get_sae_lens_version
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activations_store import ActivationsStore

    n_batches = len(tokens) // ROWS_PER_BATCH
    if n_batches == 0:
        raise UsageError(
            f"{dataset} gives {len(tokens)} contexts, sae-bench counts in batches of {ROWS_PER_BATCH}: add text"
        )
    hook_name, at = model.module_path(layer, site), model.site(layer, site)
    if hook_name != at.path:
        raise UsageError(f"sae-bench reads outputs of modules, and {site} is {hook_name}: use another site")
    dtype = str(model.dtype).removeprefix("torch.")
    special = {model.tokenizer.pad_token_id, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id} - {None}
    wrapped = LegatoSAE(sae, model.name, layer, hook_name)
    wrapped.cfg.dtype = dtype
    wrapped.follow(model.model, sorted(special))
    hooked = HookedProxyLM(model.model, model.tokenizer, hook_names=[hook_name])
    store = ActivationsStore(
        model=hooked,
        dataset=Dataset.from_dict({"tokens": tokens.tokens_BL[: n_batches * ROWS_PER_BATCH].numpy()}),
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=tokens.context_length,
        d_in=sae.d_in,
        n_batches_in_buffer=1,
        total_training_tokens=len(tokens),
        store_batch_size_prompts=ROWS_PER_BATCH,
        train_batch_size_tokens=4096,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=dtype,
    )
    config = core.CoreEvalConfig(
        **core_config(
            model.name,
            dtype,
            dataset,
            tokens.context_length,
            reconstruction_batches=n_batches,
            sparsity_batches=n_batches,
        )
    )
    metrics, features = core.run_evals(wrapped, store, hooked, config, ignore_tokens=special)
    metrics["misc_metrics"] = core.calculate_misc_metrics(features)
    result = {"sae_set": release, "sae_id": name, "eval_cfg": config, "metrics": metrics, "feature_metrics": features}
    path = Path(out) / core_file_name(release, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    core.save_single_eval_result(
        core.replace_nans_with_negative_one(result),
        get_eval_uuid(),
        get_sae_lens_version(),
        get_sae_bench_version(),
        str(path),
        wrapped,
    )
    return path
