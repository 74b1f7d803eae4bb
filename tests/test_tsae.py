"""The published T-SAE objective on fixed tensors."""

import math

import pytest
import torch
from published_tsae import tsae_objective

from legato.training.losses import TsaeContrastive

# Two tokens (2, 1) and (1, 3) with the earlier tokens (1, 0) and (2, 0). Latent 0 (group 0: a fifth of five latents)
# reads and writes x0; 1 reads x1 and writes -x1; 2 reads a tenth of x0 + x1 and writes x1; 3 and 4 never fire.
PAIRS = torch.tensor([[[2.0, 1.0], [1.0, 0.0]], [[1.0, 3.0], [2.0, 0.0]]], dtype=torch.float64)
W_ENC = torch.tensor([[1, 0], [0, 1], [0.1, 0.1], [0, 0], [0, 0]], dtype=torch.float64)
W_DEC = torch.tensor([[1, 0], [0, -1], [0, 1], [1, 0], [1, 0]], dtype=torch.float64)
B_ENC = torch.tensor([0, 0, 0, -1, -1], dtype=torch.float64)
B_DEC = torch.zeros(2, dtype=torch.float64)


def objective(k: int, **options) -> dict[str, float]:
    terms = tsae_objective(PAIRS, W_ENC, B_ENC, W_DEC, B_DEC, k=k, **options)
    return {name: float(value) for name, value in terms.items()}


def test_objective_by_hand():
    # k = 2: the four largest of the tokens' codes are 2, 1, 1, 3 of latents 0 and 1.
    # Group 0 reconstructs (2, 0), (1, 0): squared errors 1, 9, mean 5, times .2 = 1. Both groups (2, -1), (1, -3): 4,
    # 36, mean 20, times .8 = 16. Their mean: 8.5.
    # Group 0's codes are 2, 1, before 1, 2: logits (2 4; 1 2). Rows: log(1 + e^2), log(1 + 1/e); columns the same.
    # The residual is (0, 2), (0, 6), its variance 4; latent 2's .3, .4 leave 1.7 and 5.6: mean 17.125. 17.125 / 4 / 32.
    dead_F = torch.tensor([False, False, True, False, False])
    assert objective(2, dead_F=dead_F) == {
        "reconstruction": pytest.approx(8.5),
        "contrastive": pytest.approx(0.1 * (math.log1p(math.exp(2)) + math.log1p(math.exp(-1))) / 2),
        "auxiliary": pytest.approx(17.125 / 4 / 32),
    }


def test_batch_top_k_spends_the_budget_over_the_batch():
    # k = 1: of the tokens' codes 2 (latent 0) and 3 (latent 1) stay; of the earlier tokens' 1 and 2 (latent 0).
    # Group 0: (2, 0), (0, 0): errors 1, 10, mean 5.5, times .2 = 1.1. Both: (2, 0), (0, -3): 1, 37, mean 19, times .8
    # = 15.2. Their mean: 8.15. Logits (2 4; 0 0). Rows: log(1 + e^2), log 2; columns (2; 0) with target 2, (4; 0) with
    # target 0: log(1 + e^-2), log(1 + e^4).
    entropies = (math.log1p(math.exp(2)), math.log(2), math.log1p(math.exp(-2)), math.log1p(math.exp(4)))
    assert objective(1) == {
        "reconstruction": pytest.approx(8.15),
        "contrastive": pytest.approx(0.1 * sum(entropies) / 4),
        "auxiliary": 0.0,
    }


def test_a_bias_moves_encoder_and_decoder():
    shift = torch.tensor([5.0, -7.0], dtype=torch.float64)
    shifted = tsae_objective(PAIRS + shift, W_ENC, B_ENC, W_DEC, shift, k=1)
    assert {name: float(value) for name, value in shifted.items()} == pytest.approx(objective(1))


def test_residual_without_variance_leaves_no_auxiliary_loss():
    perfect = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0], [1, 0]], dtype=torch.float64)
    dead_F = torch.tensor([False, False, False, True, True])  # dead and silent: 0 / 0
    terms = tsae_objective(PAIRS, W_ENC, B_ENC, perfect, B_DEC, k=2, dead_F=dead_F)
    assert float(terms["auxiliary"]) == 0.0


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_training_term_is_the_objectives_contrastive_part(scale):
    # Rows of two tokens: the second can only be drawn with the first. On codes scaled by s the temperature is s^2.
    generator = torch.Generator().manual_seed(0)
    A, D, F = 12, 6, 20
    x_A2D = torch.randn(A, 2, D, generator=generator, dtype=torch.float64)
    W_FD = torch.randn(F, D, generator=generator, dtype=torch.float64)
    W_FD = torch.nn.functional.normalize(W_FD, dim=-1)
    b_F, b_D = torch.zeros(F, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    expected = tsae_objective(x_A2D, W_FD, b_F, W_FD, b_D, k=F)["contrastive"]
    codes_BLF = scale * (x_A2D.flip(1) @ W_FD.T).relu()
    mask_BL, doc_BL = torch.ones(A, 2, dtype=torch.bool), torch.arange(A)[:, None].expand(A, 2)
    term = TsaeContrastive(temperature=scale**2)
    torch.testing.assert_close(term.coefficient * term.loss(codes_BLF, mask_BL, doc_BL), expected)
