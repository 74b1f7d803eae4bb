"""The fused layers against transformers' own, and their numba kernels against torch."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FUSED, tiny_network, tiny_tokens

from legato.data import fast_kernels as kernels
from legato.data.fast_layers import FusedDecoder


def layers_of(decoder: Any) -> Any:
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("length", [1, 24, 64])
def test_equals_transformers_in_float32(architecture: str, length: int) -> None:
    network = tiny_network(architecture)
    decoder = network.get_decoder()
    fused = FusedDecoder.of(decoder, layers_of(decoder), network.config)
    assert fused is not None
    with torch.no_grad():
        states = decoder(tiny_tokens(5, length), output_hidden_states=True).hidden_states
    for first, last in ((0, 0), (0, 2), (1, 2), (2, 1)):  # the last pair is no layer at all
        hidden = fused.run(states[first], first, last)
        expected = states[last + 1]
        assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_number_of_threads_gives_the_same() -> None:
    network = tiny_network("gemma3")
    fused = FusedDecoder.of(network.model, network.model.layers, network.config)
    hidden = torch.randn(70, 64, 48)
    n_threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(fused.run(hidden, 0, 3))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(*results)


def test_unknown_models_are_left_to_transformers() -> None:
    for network in (tiny_network("bloom"), tiny_network("llama", hidden_act="relu"), tiny_network("llama").half()):
        decoder = network.get_decoder()
        assert FusedDecoder.of(decoder, layers_of(decoder), network.config) is None


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 error and, for bfloat16, one rounding to nearest."""
    rtol = 1e-5 if actual.dtype == torch.float32 else 2**-8
    assert torch.allclose(actual.double(), expected.double(), rtol=rtol, atol=1e-6)


def test_norms(dtype: torch.dtype) -> None:
    x, weight = (100 * torch.randn(7, 33)).to(dtype), torch.randn(33)
    normed = torch.nn.functional.rms_norm(x.float(), (33,), weight, eps=1e-6)
    out, total = torch.empty_like(x), x.flip(0).contiguous()
    kernels.rms_norm(kernels.as_array(x), weight.numpy(), np.float32(1e-6), kernels.as_array(out))
    assert_rounded(out, normed)
    expected = total.float() + normed
    kernels.add_rms_norm(kernels.as_array(total), kernels.as_array(x), weight.numpy(), np.float32(1e-6))
    assert_rounded(total, expected)


@pytest.mark.parametrize(
    ("constants", "activation"),
    [
        (kernels.SILU, torch.nn.functional.silu),
        (kernels.GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations(dtype: torch.dtype, constants: tuple, activation: Any) -> None:
    gate, up = (10 * torch.randn(2, 9, 70)).to(dtype)
    gate[0, :3] = torch.tensor([1e4, -1e4, 0.0])
    activated = gate.clone()
    kernels.activation(kernels.as_array(activated), *constants)
    assert_rounded(activated, activation(gate.double()))
    expected = activation(gate.double()) * up.double()
    kernels.gated_activation(kernels.as_array(gate), kernels.as_array(up), *constants)
    assert_rounded(gate, expected)


@pytest.mark.parametrize(("softcap", "window"), [(0.0, 2**30), (0.0, 3), (1.5, 2**30)])
def test_causal_softmax(dtype: torch.dtype, softcap: float, window: int) -> None:
    scores = (20 * torch.randn(2, 8 * 2, 8)).to(dtype)  # two contexts, eight positions, two heads a group
    x = 0.3 * scores.float()
    x = softcap * torch.tanh(x / softcap) if softcap else x
    query, key = torch.arange(8).repeat_interleave(2)[:, None], torch.arange(8)[None]
    expected = x.masked_fill((key > query) | (key <= query - window), -torch.inf).softmax(-1)
    kernels.causal_softmax(kernels.as_array(scores.view(-1, 8)), 2, np.float32(0.3), np.float32(softcap), window)
    assert_rounded(scores, expected)


def test_softmax_of_scores_far_apart() -> None:
    scores = torch.tensor([[0.0, 0.0], [-3e4, 3e4]])
    kernels.causal_softmax(kernels.as_array(scores), 1, np.float32(1), np.float32(0), 2**30)
    assert torch.allclose(scores, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-20)


def test_stores_round_to_the_nearest_bfloat16_ties_to_even() -> None:
    values = torch.cat([torch.randn(4096), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3.3895e38, 1e-40])])
    out = torch.empty(1, len(values), dtype=torch.bfloat16)
    ones = torch.ones(1, len(values), dtype=torch.float32)
    kernels.rms_norm(ones.numpy(), values.numpy(), np.float32(0), kernels.as_array(out))
    assert torch.equal(out[0], values.bfloat16())
