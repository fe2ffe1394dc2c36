"""The activations of an equilibrium: projections onto an interval that begins at 0.

``σ(a) = min(max(a, 0), ceiling)``: ReLU without a ceiling, the hard sigmoid ``clip(a, 0, 1)`` with one at 1. All of
them are nondecreasing and 1-Lipschitz, which is what the gauge theorem asks for, and being projections gives two things
more that hold for every one of them (docs/theory.md):

* a row may be solved for its own unknown: ``z_i = σ(W_ii z_i + rest_i)`` just where ``z_i = σ(rest_i / (1 - W_ii))``,
  for ``W_ii < 1``: inside the interval they are the same equation, at either end the same inequality;
* ``σ`` is the resolvent of the interval's normal cone, so that splittings (forward-backward, Peaceman-Rachford) apply.

A steeper or flatter slope belongs into the weights: ``clip(a/2, 0, 1)`` of ``W z + v`` is the hard sigmoid of ``W/2 z +
v/2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.box import Box
from verideq.errors import ModelError


@dataclass(frozen=True)
class Activation:
    """``clip(a, 0, ceiling)``, elementwise.

    Args:
        name: in files and messages.
        ceiling: positive; infinite for none.
    """

    name: str
    ceiling: float = math.inf

    def __call__(self, a: Tensor) -> Tensor:
        """Of points. Its derivative is 1 strictly inside, and 0 at the ends and beyond."""
        return F.relu(a) if self.ceiling == math.inf else F.hardtanh(a, 0.0, self.ceiling)

    def parts(self, a: Tensor) -> Tensor:
        """Of points, (1, ...), or of balls, (2, ...): centre and radius of the image of ``center ± radius``."""
        return self(a) if len(a) == 1 else self.pair(*a)

    def pair(self, center: Tensor, radius: Tensor) -> Tensor:
        """Centre and radius over ``center ± radius``, (2, ...), without a difference of ends: a radius far below the
        rounding of its centre keeps its digits.

        Active: as it was. Inactive: zero. Between: ``[0, c + r]``, half of it twice. The same from above, at a ceiling.
        """
        half = (center + radius).mul_(0.5).relu_()
        center, radius = torch.maximum(half, center), torch.minimum(half, radius)
        if self.ceiling == math.inf:
            return torch.stack((center, radius))
        half = ((self.ceiling - center).add_(radius)).mul_(0.5).relu_()
        return torch.stack((torch.minimum(self.ceiling - half, center), torch.minimum(half, radius)))

    def box(self, box: Box) -> Box:
        """Of boxes, exactly."""
        return Box(*(side.clamp(0, self.ceiling) for side in (box.lower, box.upper)))

    def active(self, z: Tensor) -> Tensor:
        """Where the derivative is 1, from the activation's own values."""
        return (z > 0) & (z < self.ceiling)


RELU, HARD_SIGMOID = Activation("relu"), Activation("hard-sigmoid", 1.0)
ACTIVATIONS = {activation.name: activation for activation in (RELU, HARD_SIGMOID)}
"""Every activation by name."""
_RELUS: tuple[object, ...] = (F.relu, torch.relu, torch.relu_, nn.ReLU)


def activation_of(given: Any) -> Activation:
    """The activation that is meant.

    Args:
        given: an `Activation`, its name, or one of torch's: ReLU in any spelling, ``nn.Hardtanh(0, 1)``.

    Raises:
        ModelError: anything else. ``nn.Hardsigmoid`` is another function, ``clip(a/6 + 1/2, 0, 1)``.
    """
    if isinstance(given, Activation) and given == ACTIVATIONS.get(given.name):
        return given
    if isinstance(given, str) and given in ACTIVATIONS:
        return ACTIVATIONS[given]
    if given in _RELUS or type(given) is nn.ReLU:
        return RELU
    if type(given) is nn.Hardtanh and (given.min_val, given.max_val) == (0, 1):
        return HARD_SIGMOID
    hint = ""
    if given is F.hardsigmoid or isinstance(given, nn.Hardsigmoid):
        hint = "; torch's Hardsigmoid is clip(a/6 + 1/2, 0, 1): put the slope and the shift into W and the injection"
    raise ModelError(
        f"the activation of an equilibrium is one of {', '.join(ACTIVATIONS)}, nn.ReLU() or nn.Hardtanh(0, 1); got "
        f"{given!r}{hint}"
    )
