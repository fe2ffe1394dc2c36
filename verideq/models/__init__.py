"""Architectures by name (`zoo`), and the model that comes with the package."""

from pathlib import Path

BUNDLED = Path(__file__).with_name("digits.safetensors")
"""A digits model trained by ``recipes/digits.toml``: what ``verideq certify`` without a model certifies."""

__all__ = ["BUNDLED"]
