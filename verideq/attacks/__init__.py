"""Attacks: what shows how much is left between certified and broken."""

from verideq.attacks.apgd import APGD
from verideq.attacks.fab import FAB
from verideq.attacks.noise import uniform_noise
from verideq.attacks.pgd import PGD
from verideq.attacks.problem import Attack, Found, Problem
from verideq.attacks.square import Square
from verideq.errors import UnknownName

ATTACKS: dict[str, PGD | None] = {"none": None, "pgd": PGD()}
"""Every attack suite by name."""


def attack_named(name: str) -> PGD | None:
    """The attack, or `UnknownName` with the list."""
    if name not in ATTACKS:
        raise UnknownName("attack", name, ATTACKS)
    return ATTACKS[name]


__all__ = ["APGD", "ATTACKS", "FAB", "PGD", "Attack", "Found", "Problem", "Square", "attack_named", "uniform_noise"]
