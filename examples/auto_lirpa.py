"""An equilibrium inside auto_LiRPA: bound a CNN of one's own, train it by those bounds, certify it.

    python examples/auto_lirpa.py

Needs auto_LiRPA (docs/auto-lirpa.md says how to install it). `lirpa.register()` is the only line that is verideq's; all
else is how auto_LiRPA is used on any model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
from torch import Tensor, nn

from verideq import Equilibrium
from verideq.certify import certify, lirpa, margin_rows
from verideq.data import load
from verideq.parametrizations import IBPMonDEQ

EPS = 0.03


class Classifier(nn.Module):
    """A convolution, a convolutional equilibrium, a linear read-out."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, stride=2, padding=1)
        fusion = IBPMonDEQ.apply(nn.Conv2d(channels, channels, 3, padding=1, bias=False), m=0.5)
        self.equilibrium = Equilibrium(fusion, nn.Conv2d(channels, channels, 3, padding=1))
        self.head = nn.Linear(channels * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.equilibrium(F.relu(self.stem(x))), 1))


def margins(bounded: BoundedModule, images: Tensor, labels: Tensor, eps: float, method: str) -> Tensor:
    """Lower bounds of the label's logit minus every other one, (batch, 9)."""
    # The ball, cut to the range of pixels.
    ball = PerturbationLpNorm(norm=math.inf, eps=eps, x_L=(images - eps).clamp(0, 1), x_U=(images + eps).clamp(0, 1))
    C = margin_rows(labels, 10).to(images)
    lower, _ = bounded.compute_bounds(x=(BoundedTensor(images, ball),), C=C, method=method, bound_upper=False)
    return lower


def certified(bounded: BoundedModule, images: Tensor, labels: Tensor, method: str) -> int:
    with torch.no_grad():
        return int((margins(bounded, images, labels, EPS, method) > 0).all(1).sum())


def main() -> None:
    torch.manual_seed(0)
    train, test = load("digits", split="train"), load("digits", split="test")
    images, labels = train.scaled().float(), train.labels
    first, answers = test.scaled(slice(0, 100)).float(), test.labels[:100]

    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(6):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    lirpa.register()
    bounded = BoundedModule(model, images[:1])
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        print(f"trained for accuracy: {method} certified {certified(bounded, first, answers, method)} of 100")

    epochs, count = 2, 0
    steps = epochs * math.ceil(len(labels) / 64)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            count += 1
            eps = EPS * min(1.0, 2 * count / steps)
            lower = margins(bounded, images[batch], labels[batch], eps, "CROWN-IBP")
            # Cross-entropy of the worst logits: the label's own is 0, the others lie below it by their margins.
            worst = torch.cat((torch.zeros_like(lower[:, :1]), -lower), 1)
            optimizer.zero_grad()
            F.cross_entropy(worst, torch.zeros_like(labels[batch])).backward()
            optimizer.step()
    print(f"{epochs} epochs of CROWN-IBP later: CROWN certified {certified(bounded, first, answers, 'CROWN')} of 100")

    # auto_LiRPA does not count rounding. verideq's own verdicts do, and each has a certificate that was checked.
    verdicts = certify(model, test.scaled(slice(0, 100)), answers, str(EPS))
    print(f"verideq: {sum(v.certified for v in verdicts)} of 100 are proved; {verdicts[0]}")


if __name__ == "__main__":
    main()
