"""Attacks: what shows how much is left between certified and broken."""

from verideq.attacks.apgd import APGD
from verideq.attacks.defences import Defence, EarlyState, EntropyReduction, FinalState, StateEnsemble
from verideq.attacks.fab import FAB
from verideq.attacks.noise import uniform_noise
from verideq.attacks.opened import open_model
from verideq.attacks.pgd import PGD
from verideq.attacks.problem import Attack, Found, Problem
from verideq.attacks.square import Square
from verideq.attacks.suites import SUITES, Stage, Suite, sweep
from verideq.errors import UnknownName

ATTACKS: dict[str, PGD | Suite | None] = {"none": None, **SUITES, "pgd": PGD()}
"""Every attack suite by name."""


def attack_named(name: str) -> PGD | Suite | None:
    """The attack, or `UnknownName` with the list."""
    if name not in ATTACKS:
        raise UnknownName("attack", name, ATTACKS)
    return ATTACKS[name]


__all__ = [
    "APGD",
    "ATTACKS",
    "FAB",
    "PGD",
    "SUITES",
    "Attack",
    "Defence",
    "EarlyState",
    "EntropyReduction",
    "FinalState",
    "Found",
    "Problem",
    "Square",
    "Stage",
    "StateEnsemble",
    "Suite",
    "attack_named",
    "open_model",
    "sweep",
    "uniform_noise",
]
