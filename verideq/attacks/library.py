"""AutoAttack as its authors' library has it (`pyautoattack`), for comparison with verideq's own attacks.

verideq has attacks of its own because the library draws the noise of a whole batch from one generator, so that a
sample's result depends on its batch-mates; works in float32, on images in [0, 1] alone; reseeds torch's global
generators; and refuses nothing where there are too few classes for its losses. Here it is run on one sample at a time,
seeded by (seed, sample), which makes it slow and reproducible. What it finds is judged like everything else.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from verideq.attacks.problem import Attack, Found, Problem
from verideq.equilibrium.surrogates import Final
from verideq.errors import InputError

NORMS = {"linf": "Linf", "l2": "L2"}
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


@dataclass(frozen=True)
class AutoAttack(Attack):
    """The library's attacks with the model's own gradients, at its final state.

    Args:
        attacks: of the library.
        queries: of its Square.

    Raises:
        InputError: in a search: the library is not installed, or it cannot attack what is asked.
    """

    attacks: tuple[str, ...] = STANDARD
    queries: int = 5000

    @property
    def name(self) -> str:
        return "AutoAttack"

    def search(self, problem: Problem) -> Found:
        library = _library()
        region = problem.region
        if region.clip != (0.0, 1.0) or region.weights is not None or region.center.dim() != 4:
            raise InputError(
                "pyautoattack attacks images (channels, rows, columns) in [0, 1] with one radius; use the suite "
                "standard"
            )
        found = Found.nothing(problem)
        found.note(region.center, problem.judge(region.center))
        for k in range(len(problem)):
            if problem.stop():
                break
            own = problem[torch.tensor([k])]
            if float(found.margins[k]) < 0 or not region.radii[k]:
                continue
            point = self._one(library, own)
            point = own.region.project(point)
            found.note(point, own.judge(point), torch.tensor([k], device=found.margins.device))
        return found

    def _one(self, library: Any, problem: Problem) -> Tensor:
        """The library's point for one sample."""
        classes = problem.C.shape[2]
        label = int(problem.C[0].sum(0).argmax())
        word = hash((problem.seed, problem.stream, int(problem.indices[0]), Fraction(problem.region.eps))) % 2**31
        state = torch.random.get_rng_state()
        try:
            run = library.AutoAttack(
                _Module(problem),
                attacks=[a for a in self.attacks if classes > 3 or a != "apgd-t"],
                device=problem.region.center.device,
                eps=float(problem.region.eps),
                norm=NORMS[problem.region.norm],
                seed=word,
                version="custom",
            )
            run.apgd.n_restarts = run.fab.n_restarts = 1
            run.apgd_targeted.n_target_classes = run.fab.n_target_classes = min(9, classes - 1)
            run.square.n_queries = self.queries
            run.verbose = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its own checks: ours are in `warnings_of`
                points, _ = run.run_standard_evaluation(
                    problem.region.center.float(), torch.tensor([label], device=problem.region.center.device)
                )
        finally:
            torch.random.set_rng_state(state)
        return torch.as_tensor(points).to(problem.region.center)


class _Module(nn.Module):
    """The model for the library: float32 in and out, with exact gradients."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.surrogate = problem.surrogate if isinstance(problem.surrogate, Final) else Final()

    def forward(self, x: Tensor) -> Tensor:
        dynamics = self.problem.dynamics
        injected = dynamics.inject(x.to(self.problem.region.center))
        return dynamics.head(dynamics.final(injected, self.surrogate.gradient), injected).float()


def _library() -> Any:
    try:
        import pyautoattack
    except ImportError as error:
        raise InputError(
            "AutoAttack needs the package pyautoattack, which is not installed: pip install 'verideq[attacks]', or use "
            "verideq's own attacks (the suite standard)"
        ) from error
    return pyautoattack
