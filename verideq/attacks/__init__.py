"""Attacks: what shows how much is left between certified and broken."""

from verideq.attacks.noise import uniform_noise
from verideq.attacks.pgd import PGD
from verideq.errors import UnknownName

ATTACKS: dict[str, PGD | None] = {"none": None, "pgd": PGD()}
"""Every attack suite by name."""


def attack_named(name: str) -> PGD | None:
    """The attack, or `UnknownName` with the list."""
    if name not in ATTACKS:
        raise UnknownName("attack", name, ATTACKS)
    return ATTACKS[name]


__all__ = ["ATTACKS", "PGD", "attack_named", "uniform_noise"]
