"""SAELens' side of Legato's folders: `import legato.interop.saelens`, and `SAE.load_from_disk` opens them all.

Registers the architecture `hysteresis`, which has state along the sequence and so no class in SAELens. Needs sae-lens,
whose import takes seconds: Legato itself reads and writes these folders through saelens_folder.py, without it.

Shape legend: B rows, L positions, D activation width, F latents.
"""

from dataclasses import dataclass

from torch import Tensor

from legato.sae import held

try:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.registry import register_sae_class
except ImportError as error:
    raise ImportError(f"legato.interop.saelens needs SAELens (pip install sae-lens): {error}") from error


@dataclass
class HysteresisSAEConfig(JumpReLUSAEConfig):
    """release: share of the threshold down to which a latent that is on stays on."""

    release: float = 1.0

    @classmethod
    def architecture(cls) -> str:
        return "hysteresis"


class HysteresisSAE(JumpReLUSAE):
    """`legato.SparseAutoencoder` of architecture hysteresis, as SAELens sees it: see `legato.sae.held`.

    The sequence is the dimension before the last: activations [B, L, D], or one sequence [L, D]. SAELens passes no
    mask, so BOS tokens take part; `SparseAutoencoder.encode` takes a mask and document numbers.
    """

    cfg: HysteresisSAEConfig

    def encode(self, x: Tensor) -> Tensor:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(pre * held(pre, self.threshold, self.cfg.release))


register_sae_class("hysteresis", HysteresisSAE, HysteresisSAEConfig)
