"""Equilibrium propagation: the gradient of a cost at a steady state, from steady states alone.

With ``Ψ(θ, s, β) = Φ(x, s; θ) - β C(s, y; θ)`` and ``s^β`` the steady state under the nudge ``β``,

    dC(s⁰)/dθ = -d/dβ ∂Ψ/∂θ (θ, s^β, β) at β = 0                          (Scellier & Bengio 2017, theorem 1),

so that two phases ``a`` and ``b`` estimate it by ``-[∂Ψ/∂θ(s^a, a) - ∂Ψ/∂θ(s^b, b)] / (a - b)``. The update is local:
in ``Φ`` a kernel meets the two blocks that it couples, and no other. The estimators differ in their phases (Laborieux
et al. 2021):

* ``one-sided``: ``β`` and 0, the free state; its error is of the order of ``β``;
* ``random-sign``: likewise, with ``β`` of a sign drawn for every batch, so that the errors cancel on average;
* ``symmetric``: ``β`` and ``-β``, both from the free state: of the order of ``β²``.

Backpropagation through time (``bptt``), through the steps of the free phase, is what they are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verideq.errors import InputError, UnknownName
from verideq.models.epnet import EPNet, Link, States

ESTIMATORS = ("symmetric", "one-sided", "random-sign", "bptt")


@dataclass(frozen=True)
class Propagation:
    """How the gradient of a batch is estimated.

    Args:
        estimator: of `ESTIMATORS`.
        beta: ``β``, the nudge.
        nudged_steps: of a nudged phase; the free one has those of the net.

    Raises:
        InputError: a nudge or a number of steps that is not positive.
        UnknownName: another estimator.
    """

    estimator: str = "symmetric"
    beta: float = 0.5
    nudged_steps: int = 10

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise UnknownName("estimator", self.estimator, ESTIMATORS)
        if not 0 < self.beta < float("inf") or self.nudged_steps < 1:
            raise InputError(
                f"a nudged phase takes a positive beta and 1 or more nudged_steps; got {self.beta} and "
                f"{self.nudged_steps}"
            )

    def backward(self, net: EPNet, x: Tensor, labels: Tensor, draw: torch.Generator | None = None) -> Settled:
        """Add the estimated gradient of the mean cost to the ``grad`` of the net's parameters.

        Args:
            net: whose free phase starts at zero.
            x: (batch, *features).
            labels: (batch,).
            draw: of the sign of ``random-sign``, on the CPU.

        Returns:
            what the free phase gave.

        >>> net = EPNet((1, 4, 4), 2, channels=(3,))
        >>> _ = Propagation().backward(net, torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 0, 1, 0]))
        >>> net.couplings[0].weight.grad.shape
        torch.Size([3, 1, 3, 3])
        """
        if self.estimator == "bptt":
            return self._through_time(net, x, labels)
        with torch.enable_grad():
            couplings = net.snapshot()
            drive = net.drive(x, couplings)
        free, ((a, at_a), (b, at_b)) = self._phases(net, drive.detach(), couplings, labels, draw)
        with torch.enable_grad():
            change = net.primitive(drive, at_a, couplings) - net.primitive(drive, at_b, couplings)
            if net.readout == "cross-entropy":  # whose own weights stand in C, and nowhere else
                change = change - a * net.cost(at_a, labels) + b * net.cost(at_b, labels)
            (change / ((b - a) * len(x))).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        with torch.no_grad():
            return Settled(net.cost(free, labels) / len(x), net.read(free))

    def slope(self, net: EPNet, x: Tensor, labels: Tensor, draw: torch.Generator | None = None) -> Tensor:
        """The estimated gradient of the cost of every sample with respect to its input, (batch, *features).

        The input is clamped and coupled to the first block alone, so that this is as local as the update of a kernel.
        """
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            couplings = [coupling.detach() for coupling in net.snapshot()]
            drive = net.drive(at, couplings)
            if self.estimator == "bptt":
                value = net.cost(net.phase(drive, net.rest(drive), couplings, net.free_steps), labels)
            else:
                _, ((a, at_a), (b, at_b)) = self._phases(net, drive.detach(), couplings, labels, draw)
                value = (drive * (at_a[0] - at_b[0])).sum() / (b - a)
            (gradient,) = torch.autograd.grad(value, at)
        return gradient

    def adversary(
        self,
        net: EPNet,
        x: Tensor,
        labels: Tensor,
        radius: float,
        draw: torch.Generator,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> Tensor:
        """The inputs moved uphill in an l_inf ball: from a uniform point of it one sign step along `slope`, of five
        quarters of the radius (Wong, Rice & Kolter, ICLR 2020), with no gradient but the propagated one.
        """
        noise = radius * (2 * torch.rand(x.shape, generator=draw) - 1).to(x)
        start = x + noise if clip is None else (x + noise).clamp(*clip)
        moved = start + 1.25 * radius * self.slope(net, start, labels, draw).sign()
        moved = torch.minimum(torch.maximum(moved, x - radius), x + radius)
        return moved if clip is None else moved.clamp(*clip)

    @torch.no_grad()
    def _phases(
        self, net: EPNet, drive: Tensor, couplings: Sequence[Link], labels: Tensor, draw: torch.Generator | None
    ) -> tuple[States, tuple[tuple[float, States], tuple[float, States]]]:
        """The free state, and the two nudges with the states that the estimate is made of."""
        couplings = [coupling.detach() for coupling in couplings]
        free = net.phase(drive, net.rest(drive), couplings, net.free_steps)
        beta = self.beta
        if self.estimator == "random-sign" and bool(torch.rand((), generator=draw) < 0.5):
            beta = -beta
        if self.estimator != "symmetric":
            nudged = net.phase(drive, free, couplings, self.nudged_steps, beta=beta, labels=labels)
            return free, ((beta, nudged), (0.0, free))
        # Both in one batch: the same numbers, in fewer and larger products.
        signs = torch.tensor([beta, -beta], dtype=drive.dtype, device=drive.device).repeat_interleave(len(drive))
        both = net.phase(
            torch.cat((drive, drive)),
            [torch.cat((block, block)) for block in free],
            couplings,
            self.nudged_steps,
            beta=signs[:, None],
            labels=labels.repeat(2),
        )
        up, down = zip(*(block.chunk(2) for block in both), strict=True)
        return free, ((beta, list(up)), (-beta, list(down)))

    def _through_time(self, net: EPNet, x: Tensor, labels: Tensor) -> Settled:
        with torch.enable_grad():
            couplings = net.snapshot()
            drive = net.drive(x, couplings)
            free = net.phase(drive, net.rest(drive), couplings, net.free_steps)
            cost = net.cost(free, labels) / len(x)
            cost.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return Settled(cost.detach(), net.read(free).detach())


@dataclass(frozen=True)
class Settled:
    """The end of a free phase.

    Args:
        cost: the mean of a batch.
        outputs: (batch, classes).
    """

    cost: Tensor
    outputs: Tensor
