"""SAELens' side of Legato's folders: `import legato.interop.saelens`, and `SAE.load_from_disk` opens them all.

Registers Legato's architectures with state along the sequence, for which SAELens has no class. Needs sae-lens,
whose import takes seconds: Legato itself reads and writes these folders through saelens_folder.py, without it.

Shape legend: B rows, L positions, D activation width, F latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from legato.sae.architectures.hysteresis import held
from legato.sae.architectures.hysteresis_topk import held_top
from legato.sae.architectures.persistent import leaked
from legato.sae.architectures.window_topk import held_windows

try:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
    from sae_lens.registry import register_sae_class
except ImportError as error:
    raise ImportError(f"legato.interop.saelens needs SAELens (pip install sae-lens): {error}") from error


def _preactivations(sae: JumpReLUSAE | StandardSAE, x: Tensor) -> Tensor:
    return sae.hook_sae_acts_pre(sae.process_sae_in(x) @ sae.W_enc + sae.b_enc)


@dataclass
class HysteresisSAEConfig(JumpReLUSAEConfig):
    """release: share of the threshold down to which a latent that is on stays on."""

    release: float = 1.0

    @classmethod
    def architecture(cls) -> str:
        return "hysteresis"


class HysteresisSAE(JumpReLUSAE):
    """`legato.SparseAutoencoder` of architecture hysteresis, as SAELens sees it: see
    `legato.sae.architectures.hysteresis.held`.

    The sequence is the dimension before the last: activations [B, L, D], or one sequence [L, D]. SAELens passes no
    mask, so BOS tokens take part; `SparseAutoencoder.encode` takes a mask and document numbers.
    """

    cfg: HysteresisSAEConfig

    def encode(self, x: Tensor) -> Tensor:
        pre = _preactivations(self, x)
        return self.hook_sae_acts_post(pre * held(pre, self.threshold, self.cfg.release))


@dataclass
class HysteresisTopKSAEConfig(StandardSAEConfig):
    """k: active latents per token. release: what was on at the token before counts 1 / release times."""

    k: int = 1
    release: float = 1.0

    @classmethod
    def architecture(cls) -> str:
        return "hysteresis_topk"


class HysteresisTopKSAE(StandardSAE):
    """`legato.SparseAutoencoder` of architecture hysteresis_topk: see
    `legato.sae.architectures.hysteresis_topk.held_top`, and HysteresisSAE."""

    cfg: HysteresisTopKSAEConfig

    def encode(self, x: Tensor) -> Tensor:
        pre = _preactivations(self, x)
        return self.hook_sae_acts_post(pre * held_top(pre, self.cfg.k, self.cfg.release))


@dataclass
class WindowTopKSAEConfig(JumpReLUSAEConfig):
    """window: tokens for which a latent is chosen at once."""

    window: int = 1

    @classmethod
    def architecture(cls) -> str:
        return "window_topk"


class WindowTopKSAE(JumpReLUSAE):
    """`legato.SparseAutoencoder` of architecture window_topk: see `legato.sae.architectures.window_topk.held_windows`,
    and HysteresisSAE."""

    cfg: WindowTopKSAEConfig

    def encode(self, x: Tensor) -> Tensor:
        pre = _preactivations(self, x)
        return self.hook_sae_acts_post(pre * held_windows(pre, self.threshold, self.cfg.window))


@dataclass
class PersistentSAEConfig(JumpReLUSAEConfig):
    """tail: share of a stretch's peak below which its codes are cut."""

    tail: float = 0.0

    @classmethod
    def architecture(cls) -> str:
        return "persistent"


class PersistentSAE(JumpReLUSAE):
    """`legato.SparseAutoencoder` of architecture persistent: see `legato.sae.architectures.persistent.leaked`, and
    HysteresisSAE."""

    cfg: PersistentSAEConfig
    leak: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.leak = nn.Parameter(torch.zeros_like(self.threshold))

    def encode(self, x: Tensor) -> Tensor:
        pre = _preactivations(self, x)
        return self.hook_sae_acts_post(leaked(pre.relu() * (pre > self.threshold), self.leak, self.cfg.tail))


register_sae_class("persistent", PersistentSAE, PersistentSAEConfig)
register_sae_class("hysteresis", HysteresisSAE, HysteresisSAEConfig)
register_sae_class("hysteresis_topk", HysteresisTopKSAE, HysteresisTopKSAEConfig)
register_sae_class("window_topk", WindowTopKSAE, WindowTopKSAEConfig)
