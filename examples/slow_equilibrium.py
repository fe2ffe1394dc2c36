"""An equilibrium that converges slowly, and a proof that is none: why a certifier may not trust its solver.

One unit, ``z = relu(0.99 z + x)``, and the question whether ``105 - z > 0`` for every ``x`` in [0.9, 1.1]. The
equilibrium is ``z = 100 x``, so that the answer is no: at ``x = 1.1`` it is 110. An iteration from 0 that stops when a
step changes ``z`` by less than a thousandth has by then covered nine tenths of the way.

verideq solves a row for its own unknown, which settles the single unit at once. So that its solver has work to do as
well, it is also shown a ring of four units, each of which reads 0.99 times the one before: the same equilibrium four
times over. docs/not-a-proof.md has six cases more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from verideq import Equilibrium, Region, bound
from verideq.certify import certify

QUESTION = torch.tensor([[1.0]])  # the model's only output has to be positive


class Ring(nn.Sequential):
    """``105 - mean(z)``, ``z_i = relu(0.99 z_(i-1) + x)``."""

    pixel_range = None  # the input is no pixel: it has no valid range

    def __init__(self, units: int) -> None:
        fusion, injection = nn.Linear(units, units, bias=False), nn.Linear(1, units, bias=False)
        super().__init__(Equilibrium(fusion, injection), nn.Linear(units, 1))
        self.load_state_dict(
            {
                "0.fusion.weight": 0.99 * torch.eye(units).roll(1, 0),
                "0.injection.weight": torch.ones(units, 1),
                "1.weight": torch.full((1, units), -1 / units),
                "1.bias": torch.tensor([105.0]),
            }
        )


def naive_upper_end(x: Tensor, tol: float) -> tuple[float, int]:
    """The largest z by plain iteration, as a certifier has it that believes its solver; and the steps."""
    z, steps = torch.zeros_like(x), 0
    while True:
        z, last, steps = torch.relu(0.99 * z + x), z, steps + 1
        if (z - last).abs() <= tol * z.abs():
            return float(z), steps


def main() -> None:
    for tol in (1e-2, 1e-3, 1e-4):
        z, steps = naive_upper_end(torch.tensor(1.1), tol)
        answer = "certified" if z < 105 else "not certified"
        print(f"naive, tolerance {tol:g}: z <= {z:.3f} after {steps} steps, margin {105 - z:+.3f}: {answer}")
    print("truth: at x = 1.1 the margin is -5")

    x = torch.tensor([[1.0]])
    region = Region(x, "0.1", clip=None)
    for units in (1, 4):
        for max_steps in (1, 1000):
            box = bound(Ring(units), region, C=QUESTION, max_steps=max_steps)
            ends = f"[{float(box.lower):+.4f}, {float(box.upper):+.4f}]"
            print(f"verideq, {units} unit(s), at most {max_steps} steps: margin in {ends}")
        (verdict,) = certify(Ring(units), x, None, "0.1", C=QUESTION, attack="pgd")
        assert verdict.witness is not None
        print(f"verideq, {units} unit(s): {verdict}; witness x = {float(verdict.witness[0])!r}")


if __name__ == "__main__":
    main()
