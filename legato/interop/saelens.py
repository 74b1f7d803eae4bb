"""SAELens' side of Legato's folders: `import legato.interop.saelens`, and `SAE.load_from_disk` opens them all.

Registers every architecture that SAELens has no class for. Needs sae-lens, whose import takes seconds: Legato itself
reads and writes these folders through formats/saelens.py, without it.

Shape legend: B rows, L positions, D activation width, F latents.
"""

from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from legato.sae.architectures import Architecture, architectures

try:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
    from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
except ImportError as error:
    raise ImportError(f"legato.interop.saelens needs SAELens (pip install sae-lens): {error}") from error


def saelens_classes(kind: type[Architecture]) -> tuple[type, type]:
    """The SAE class of an architecture as SAELens sees it, and its config with the architecture's numbers.

    The sequence is the dimension before the last: activations [B, L, D], or one sequence [L, D]. SAELens passes no
    mask, so BOS tokens take part; `SparseAutoencoder.encode` takes a mask and document numbers. Thresholds follow the
    decoder norms, as a jumprelu's do.
    """
    has_threshold = "threshold" in kind.per_latent
    base: Any = JumpReLUSAE if has_threshold else StandardSAE
    defaults = {f.name: 1 if f.default is MISSING else f.default for f in fields(kind)}  # type: ignore[arg-type]

    class LegatoSAE(base):
        def initialize_weights(self) -> None:
            super().initialize_weights()
            for name in kind.per_latent.keys() - {"threshold"}:
                setattr(self, name, nn.Parameter(torch.zeros_like(self.b_enc)))

        def encode(self, x: Tensor) -> Tensor:
            pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
            return self.hook_sae_acts_post(kind.of(vars(self.cfg), dict(self.named_parameters())).activate(pre))

    LegatoSAE.__name__ = LegatoSAE.__qualname__ = f"{kind.__name__}SAE"
    config = make_dataclass(
        f"{kind.__name__}SAEConfig",
        [(name, number.kind, field(default=defaults[name])) for name, number in kind.numbers.items()],
        bases=(JumpReLUSAEConfig if has_threshold else StandardSAEConfig,),
        namespace={"architecture": classmethod(lambda cls: kind.name)},
    )
    return LegatoSAE, config


def register(kind: type[Architecture]) -> None:
    """Have SAELens open saved SAEs of an architecture, where it does not do so by itself."""
    if kind.name not in SAE_CLASS_REGISTRY:
        register_sae_class(kind.name, *saelens_classes(kind))


for _kind in architectures().values():
    register(_kind)
