"""A model of one's own: write it, train it by any means, save it, look inside, certify it.

    python examples/own_model.py [FOLDER]

The model is an ordinary `torch.nn.Module`. Its only unusual layer is `Equilibrium`, whose weight `IBPMonDEQ` keeps in
the class of matrices that interval bounds can handle. The training is plain: no bound enters it, which is why only
small radii are certified. Recipes (docs/training.md) train for the bound.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq import Equilibrium, Normalize, gauge, load_model, save_model
from verideq.certify import certify
from verideq.data import load
from verideq.parametrizations import IBPMonDEQ


class Classifier(nn.Module):
    """A convolution, an equilibrium around which its input is added again, and a linear read-out."""

    input_shape = (1, 8, 8)  # recorded in the model file
    pixel_range = (0.0, 1.0)

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.normalize = Normalize(0.3, 0.38)
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        fusion = IBPMonDEQ.apply(nn.Conv2d(channels, channels, 3, padding=1, bias=False), m=0.5)
        self.equilibrium = Equilibrium(fusion, nn.Conv2d(channels, channels, 3, padding=1))
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(channels * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.stem(self.normalize(x)))
        features = features + self.equilibrium(features)
        return self.head(torch.flatten(self.pool(features), 1))


def train(model: nn.Module, epochs: int = 3) -> None:
    digits = load("digits", split="train")
    images, labels = digits.scaled().float(), digits.labels
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = Classifier()
    train(model)

    path = folder / "own.safetensors"
    print(f"hash {save_model(model, path)}")

    graph = load_model(path)
    for node in graph.nodes:
        print(f"{node.name:<24} {node.operation.kind:<12} reads {', '.join(node.inputs)}")
    for name, layer in graph.equilibria():
        found = gauge(layer)
        slack = float(found.slack(layer).min())
        print(f"{name}: contraction rate at most {found.rate(layer):.4f}, smallest slack {slack:.4f}")

    digits = load("digits", split="test")
    for eps in ("0.001", "0.01"):
        verdicts = certify(graph, digits.scaled(slice(0, 50)), digits.labels[:50], eps)
        right = sum(v.prediction == v.label for v in verdicts)
        print(f"eps {eps}: {right} of 50 right, {sum(v.certified for v in verdicts)} certified")
    print(f"the first: {verdicts[0]}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
