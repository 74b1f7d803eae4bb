"""Nested groups of latents, by their share of the dictionary."""


def leading_count(n_latents: int, fraction: float) -> int:
    """Number of latents in the leading fraction, rounded down as temporal-saes sizes its first group; at least 1.

    >>> leading_count(4096, 0.2)
    819
    """
    return max(1, int(fraction * n_latents))
