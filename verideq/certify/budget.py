"""`Budget`: how hard to try."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from verideq.attacks import SUITES, attack_named
from verideq.certify.bound import method_named
from verideq.certify.method import Prepared
from verideq.errors import InputError

LARGE = 2**24
"""Bytes of a record that stays in memory whether anybody wants to keep it or not."""


@dataclass(frozen=True)
class Budget:
    """How hard to try.

    Args:
        method: a bound method, or ``auto``.
        attack: an attack suite, or ``none``.
        max_steps: of the equilibrium solver in a bound.
        timeout: seconds a question: a sample at a radius, or how large its radius is; ``None`` for no limit.
        seed: of the attack's noise.
        radius: look for the largest certified and the smallest attacked radius of each sample too.
        check: have the independent checker accept a certificate of every sample before it is CERTIFIED.
        tolerance: of the solver that will run the model, in units of the slack of each gauge: what it may be off by is
            charged to every margin.
        keep: hand over certificates however large they are.
    """

    method: str = "auto"
    attack: str = "none"
    max_steps: int = 1000
    timeout: float | None = None
    seed: int = 0
    radius: bool = False
    check: bool = True
    tolerance: Fraction = Fraction(0)
    keep: bool = True

    def __post_init__(self) -> None:
        method_named(self.method)
        attack_named(self.attack)
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout {self.timeout} is no time; give a number of seconds above 0")
        if not self.tolerance >= 0:
            raise InputError(f"deployed tolerance {self.tolerance} is negative; give 0 or more")

    def check_for(self, prepared: Prepared) -> None:
        """Refuse a method, or a suite of attacks, that is not for the model.

        Raises:
            InputError: it is not.
        """
        self.methods(prepared)
        suite = SUITES.get(self.attack)
        if suite is not None and suite.looks_inside and not any(True for _ in prepared.graph.equilibria()):
            raise InputError(
                f"attack {self.attack} looks at the states on the way to an equilibrium, and the model has none: use "
                "pgd or standard"
            )

    def kept(self, record: bytes) -> bytes | None:
        """What is handed over of a record that was accepted."""
        return record if self.keep or len(record) < LARGE else None

    def methods(self, prepared: Prepared) -> tuple[str, ...]:
        """The methods to run, cheapest first; ``auto`` takes branch and bound, which has no end, in a time limit."""
        if self.method != "auto":
            prepared.require_method(self.method)
            return (self.method,)
        if prepared.missing:
            return ("interval",)
        last = "branch-and-bound" if self.timeout and prepared.rectified else None
        if prepared.monotone and prepared.rectified:
            return tuple(m for m in ("interval", "quadratic", last) if m)
        # Each of these goes through those before it, and says which of them was enough.
        return "interval", "adjoint", last or "adjoint-ascent"
