"""Classifiers by name for adversarial and plain training: general DEQs, and explicit networks to compare them with."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from verideq.errors import UnknownName
from verideq.models.convnet import ConvNet
from verideq.models.mdeq import DENSE, SIZES, general_named
from verideq.models.vit import ViT

EXPLICIT: dict[str, Callable[..., nn.Module]] = {"convnet": ConvNet, "vit": ViT}
"""Networks without an equilibrium."""


def classifier_named(name: str, input_shape: tuple[int, ...], classes: int, **options: object) -> nn.Module:
    """A classifier by name: of `EXPLICIT`, or a general DEQ.

    Raises:
        UnknownName: another name.
        TypeError: an option that the architecture does not have.
    """
    if name in EXPLICIT:
        return EXPLICIT[name](input_shape, classes, **options)
    if name not in (*DENSE, *SIZES):
        raise UnknownName("architecture", name, (*EXPLICIT, *DENSE, *SIZES))
    return general_named(name, input_shape, classes, **options)
