"""Activations that look along the sequence, on dense pre-activations: what a SAE with state does at inference.

Shape legend: [..., L, F] pre-activations of positions L and latents F; mask, doc [..., L].
"""

import torch
from torch import Tensor


def held(
    pre: Tensor, threshold: Tensor, release: float, mask: Tensor | None = None, doc: Tensor | None = None
) -> Tensor:
    """on[..., L, F]: a latent switches on where pre >= threshold (F) and stays on while pre >= release * threshold,
    through the positions of one document.

    On where the last set is at least as recent as the last reset, found with two running maxima. A reset lies before
    the token's own set where a document starts or masked tokens end.
    """
    valid, opens = runs(pre, mask, doc)
    set_on = (pre >= threshold) & valid.unsqueeze(-1)
    reset = (pre < release * threshold) | (opens | ~valid).unsqueeze(-1)
    small = pre.shape[-2] <= torch.iinfo(torch.int16).max
    at = torch.arange(pre.shape[-2], dtype=torch.int16 if small else torch.int32, device=pre.device).unsqueeze(-1)
    never = at.new_tensor(-1)
    last_set = torch.where(set_on, at, never).cummax(-2).values
    last_reset = torch.where(reset, at, never).cummax(-2).values
    return (last_set >= last_reset) & valid.unsqueeze(-1) & (last_set >= 0) & (pre > 0)


def held_top(pre: Tensor, k: int, release: float, mask: Tensor | None = None, doc: Tensor | None = None) -> Tensor:
    """on[..., L, F]: the k largest positive pre-activations of each token, where those of latents that were on at the
    token before, of the same document, count 1 / release times."""
    valid, opens = runs(pre, mask, doc)
    on = torch.zeros_like(pre, dtype=torch.bool)
    before = torch.zeros_like(on[..., 0, :])
    for t in range(pre.shape[-2]):
        before &= ~opens[..., t, None]
        score = torch.where(before, pre[..., t, :] / release, pre[..., t, :])
        best = torch.zeros_like(before).scatter_(-1, score.topk(k, dim=-1, sorted=False).indices, True)
        before = best & (pre[..., t, :] > 0) & valid[..., t, None]
        on[..., t, :] = before
    return on


def held_windows(
    pre: Tensor, threshold: Tensor, window: int, mask: Tensor | None = None, doc: Tensor | None = None
) -> Tensor:
    """on[..., L, F]: positive pre-activations of those (window, latent) cells whose norm sqrt(sum relu(pre)^2) reaches
    the threshold (F); windows of `window` tokens start where a run of a document starts."""
    valid, opens = runs(pre, mask, doc)
    at = torch.arange(pre.shape[-2], device=pre.device).expand(valid.shape)
    start = torch.where(opens & valid, at, torch.zeros_like(at)).cummax(-1).values
    new_window = valid & ((at - start) % window == 0)
    cell = new_window.long().cumsum(-1) * valid  # 0: not valid
    squares = pre.relu().square() * valid.unsqueeze(-1)
    index = cell.unsqueeze(-1).expand(pre.shape)
    norm2 = torch.zeros_like(torch.cat([pre, pre[..., :1, :]], dim=-2)).scatter_add_(-2, index, squares)
    return (norm2.gather(-2, index).sqrt() >= threshold) & (pre > 0) & valid.unsqueeze(-1)


def runs(pre: Tensor, mask: Tensor | None, doc: Tensor | None) -> tuple[Tensor, Tensor]:
    """(valid, opens) [..., L]: which tokens take part, and which start a run of a document."""
    valid = torch.ones(pre.shape[:-1], dtype=torch.bool, device=pre.device) if mask is None else mask
    opens = torch.ones_like(valid)
    opens[..., 1:] = ~valid[..., :-1]
    if doc is not None:
        opens[..., 1:] |= doc[..., 1:] != doc[..., :-1]
    return valid, opens
