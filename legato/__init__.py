"""Legato: sparse autoencoders whose features hold across the tokens of a text, and the instrument that judges them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
