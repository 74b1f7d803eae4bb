import torch

from legato.activations import ActivationBatch
from legato.evaluation.controls import position_shuffled


def test_documents_keep_their_activations_and_lose_their_order():
    L = 40
    acts_BLD = torch.arange(2 * L, dtype=torch.float32).view(2, L, 1)
    mask_BL = torch.ones(2, L, dtype=torch.bool)
    mask_BL[:, [0, 7]] = False
    doc_BL = (torch.arange(L) // 25).expand(2, L)
    batch = ActivationBatch(acts_BLD, mask_BL, doc_BL, torch.zeros(2, L, dtype=torch.int64))
    [shuffled] = position_shuffled([batch], seed=3)
    assert torch.equal(shuffled.acts_BLD[~mask_BL], acts_BLD[~mask_BL])
    assert not torch.equal(shuffled.acts_BLD, acts_BLD)
    for row in range(2):
        for document in (0, 1):
            places = (doc_BL[row] == document) & mask_BL[row]
            assert torch.equal(shuffled.acts_BLD[row, places].sort(0).values, acts_BLD[row, places])
    [again] = position_shuffled([batch], seed=3)
    assert torch.equal(again.acts_BLD, shuffled.acts_BLD)
