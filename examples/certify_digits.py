"""Certify the first twenty test digits with the bundled model, and say what was proved of each."""

from __future__ import annotations

from verideq import load_model
from verideq.certify import certify
from verideq.data import load
from verideq.models import BUNDLED


def main() -> None:
    model = load_model(BUNDLED)
    digits = load("digits", split="test")
    images, labels = digits.scaled(slice(0, 20)), digits.labels[:20]
    verdicts = certify(model, images, labels, "0.05", attack="pgd")
    for index, verdict in enumerate(verdicts):
        print(f"{index:>3}  {verdict}")
    proved = sum(verdict.certified for verdict in verdicts)
    survived = sum(verdict.attacked is True for verdict in verdicts)
    print(f"{proved} of {len(verdicts)} certified, {survived} survive the attack")


if __name__ == "__main__":
    main()
