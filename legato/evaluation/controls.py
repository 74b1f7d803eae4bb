"""Controls: what is left of a result when what it claims to measure is taken away.

Shape legend: B rows, L positions, D width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from legato.activations import ActivationBatch


def position_shuffled(batches: Iterable[ActivationBatch], seed: int = 0) -> Iterator[ActivationBatch]:
    """The same activations in another order: the valid positions of each document's stretch inside a row are permuted.

    Nothing of a sequence is left in them, so persistence that an SAE still shows is made by its own mechanism. Special
    tokens and outliers keep their place.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        acts_BLD = batch.acts_BLD.clone()
        for row in range(len(acts_BLD)):
            doc_L, mask_L = batch.doc_BL[row], batch.mask_BL[row]
            for document in doc_L[mask_L].unique():
                places = ((doc_L == document) & mask_L).nonzero().flatten()
                order = torch.randperm(len(places), generator=generator)
                acts_BLD[row, places] = batch.acts_BLD[row, places[order]]
        yield replace(batch, acts_BLD=acts_BLD)
