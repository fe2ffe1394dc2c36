"""verideq: formal verification of implicit layers.

A deep equilibrium model ends in a fixed point ``z* = σ(W z* + U x + b)``. verideq trains such models so that they can
be certified, certifies them, and attacks them to show what lies between "certified" and "broken".

The names below load when they are first used (PEP 562), so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Box": "verideq.box",
    "Region": "verideq.region",
    "Status": "verideq.status",
    "Convergence": "verideq.status",
    "Equilibrium": "verideq.equilibrium",
    "Gauge": "verideq.equilibrium",
    "Solution": "verideq.equilibrium",
    "gauge": "verideq.equilibrium",
    "solve": "verideq.equilibrium",
    "Normalize": "verideq.graph",
    "save_model": "verideq.graph",
    "load_model": "verideq.graph",
    "bound": "verideq.certify",
    "Verdict": "verideq.certify",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from verideq.box import Box as Box
    from verideq.certify import Verdict as Verdict
    from verideq.certify import bound as bound
    from verideq.equilibrium import Equilibrium as Equilibrium
    from verideq.equilibrium import Gauge as Gauge
    from verideq.equilibrium import Solution as Solution
    from verideq.equilibrium import gauge as gauge
    from verideq.equilibrium import solve as solve
    from verideq.graph import Normalize as Normalize
    from verideq.graph import load_model as load_model
    from verideq.graph import save_model as save_model
    from verideq.region import Region as Region
    from verideq.status import Convergence as Convergence
    from verideq.status import Status as Status


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'verideq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
