"""What every parametrization shares: registration, the strength `m` and its schedule, arithmetic by unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from verideq.equilibrium import Gauge, operator_of
from verideq.errors import InputError, ParametrizationError

Layer = TypeVar("Layer", bound=nn.Module)


class _Apply:
    """``Class.apply(layer, ...)`` is ``Class.register(layer, ...)``; ``instance.apply(fn)`` is `torch.nn.Module.apply`.

    Without the second half ``model.apply(fn)``, which recurses into parametrizations, would break.
    """

    def __get__(self, instance: nn.Module | None, owner: type[Parametrization]) -> Callable[..., Any]:
        return owner.register if instance is None else nn.Module.apply.__get__(instance, owner)


class Parametrization(nn.Module):
    """A map from free tensors to ``W``, on `torch.nn.utils.parametrize`.

    A subclass has ``forward`` (the layer's free tensor to ``W``), a strict ``right_inverse`` (``W`` to the free tensor,
    or `ParametrizationError`), and a static ``register(layer, ...)`` that puts it on a fresh layer and returns the
    layer. Further free tensors are parameters of the parametrization itself.
    """

    register: Callable[..., nn.Module]
    apply: Any = _Apply()

    def gauge(self) -> Gauge | None:
        """The gauge of the ``W`` that `forward` gives now, where the formula names one; its slack is for the caller to
        check (`Gauge.slack`). ``None``: `verideq.gauge` has to search.
        """
        return None


class Contraction(Parametrization):
    """A class of ``W`` whose gauge has a rate of at most ``1 - m``: what the files of this folder but MonDEQ's hold.

    A subclass writes `forward` and `inverse`; `draw` where the layer's own weight is no good start.

    **Rounding.** ``W`` is what is stored, so `forward` aims at `rate`, which is below ``1 - m`` by more than all the
    roundings of the formula together: the class is not left for ``m → 0`` either.

    Args:
        m: in (0, 1). A buffer: a schedule may assign it (`set_m`).

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """

    m: Tensor

    def __init__(self, m: float) -> None:
        super().__init__()
        self.register_buffer("m", torch.tensor(checked_m(m), dtype=torch.float64))
        self._drawn = False

    def draw(self, weight: Tensor) -> Tensor:
        """The free tensor to start from, given the weight that torch drew for the layer."""
        return weight

    def inverse(self, W: Tensor) -> Tensor:
        """The free tensor with ``forward(inverse(W)) = W`` up to rounding.

        Raises:
            ParametrizationError: `W` is not in the class; the message says why, and what would fit.
        """
        raise NotImplementedError  # abstract: a torch module has no metaclass to say so

    def right_inverse(self, W: Tensor) -> Tensor:
        """`inverse`; while `register` runs, `draw`."""
        return self.draw(W) if self._drawn else self.inverse(W)

    def rate(self, weight: Tensor) -> Tensor:
        """``(1 - m) (1 - safety)``: what rows of a weight of this shape and dtype are made for."""
        return (1 - self.m) * (1 - safety(weight))


def checked_m(m: float) -> float:
    """`m` itself.

    Raises:
        ParametrizationError: it is not in (0, 1).
    """
    if not 0 < m < 1:
        raise ParametrizationError(f"m = {m} is outside (0, 1): 1 - m is the rate at which the layer contracts")
    return float(m)


def annealed_m(m: float, eps: float, final_eps: float, start: float = 0.99) -> float:
    """``m + (start - m) (1 - eps / final_eps)``: from `start` at radius 0 to `m` at the radius trained for.

    Wei & Kolter, Appendix B, use it for their deep models; pass the result to `set_m` before a step.

    Args:
        m: of the finished model.
        eps: the radius of this step.
        final_eps: the radius trained for.
        start: ``m`` at radius 0.

    Raises:
        InputError: `final_eps` is not positive, or `eps` is not between 0 and it.

    >>> [round(annealed_m(0.5, eps, 0.4), 3) for eps in (0.0, 0.2, 0.4)]
    [0.99, 0.745, 0.5]
    """
    if not 0 <= eps <= final_eps or not final_eps > 0:
        raise InputError(f"the radius {eps} of a step lies between 0 and the final one, {final_eps}, which is positive")
    return m + (start - m) * (1 - eps / final_eps)


def set_m(model: nn.Module, m: float) -> None:
    """Give every `Contraction` of a model the strength `m`.

    Raises:
        ParametrizationError: `m` outside (0, 1).
    """
    checked_m(m)
    for module in model.modules():
        if isinstance(module, Contraction):
            module.m.fill_(m)


def check_fusion(layer: nn.Module, name: str) -> Tensor:
    """The weight of a layer that a parametrization can be put on.

    Raises:
        ModelError: the layer is no fusion of an equilibrium.
        ParametrizationError: a grouped convolution, or a weight that is parametrized already.
    """
    operator_of(layer)
    if getattr(layer, "groups", 1) != 1:
        raise ParametrizationError(f"{name} needs groups=1; the convolution has {layer.groups}")
    if parametrize.is_parametrized(layer, "weight"):
        raise ParametrizationError("the weight is parametrized already; remove that parametrization first")
    return cast(Tensor, layer.weight)


def install(layer: Layer, parametrization: Contraction, *, keep: bool = False) -> Layer:
    """Register on the weight of a layer that `check_fusion` accepted.

    Args:
        keep: the layer's weight is a ``W`` to keep; otherwise a fresh one to `draw` from.

    Raises:
        ParametrizationError: a weight to keep that is not in the class.
    """
    parametrization.to(cast(Tensor, layer.weight))
    parametrization._drawn = not keep
    parametrize.register_parametrization(layer, "weight", parametrization)
    parametrization._drawn = False
    return layer


def safety(weight: Tensor) -> float:
    """More than the relative error of a formula that sums a row of `weight` in float64 and multiplies a dozen times.

    A sum of ``n`` terms rounds by less than ``n ε`` (Higham, section 3.1). In float32 alone that would cost a row of a
    thousand a visible share of its size.
    """
    return weight[0].numel() * torch.finfo(torch.float64).eps + 16 * torch.finfo(weight.dtype).eps


def tolerance(weight: Tensor) -> float:
    """Relative, for the question whether a stored ``W`` is in a class that rounding moved it out of."""
    return float(64 * torch.finfo(weight.dtype).eps * len(weight) ** 0.5 + safety(weight))


def positive(sizes: Tensor) -> Tensor:
    """`sizes`, with 1 where they are zero or so small that a division by them could lose its digits."""
    floor = torch.finfo(sizes.dtype).tiny * 2.0**30
    return torch.where(sizes > floor, sizes, torch.ones_like(sizes))


def unit_sums(weight: Tensor) -> Tensor:
    """``|W|`` summed over the taps of a kernel, in float64: (units, units)."""
    return weight.abs().flatten(2).sum(2, dtype=torch.float64).to(weight.dtype) if weight.dim() > 2 else weight.abs()


def row_sums(weight: Tensor) -> Tensor:
    """``|W| 1`` for every unit, (units,), summed in float64."""
    return weight.abs().flatten(1).sum(1, dtype=torch.float64).to(weight.dtype)


def scaled(weight: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """``diag(rows) W diag(columns)``, by channel for a kernel."""
    taps = [1] * (weight.dim() - 2)
    weight = weight * rows.view(-1, 1, *taps)
    return weight if columns is None else weight * columns.view(1, -1, *taps)


def resolvent(sums: Tensor, rate: float) -> Tensor | None:
    """``u = (I - K / rate)⁻¹ 1`` in float64; positive just where ``ρ(K) < rate``, and then ``K u < rate u``.

    Returns:
        ``u``, or ``None`` where it is not positive.
    """
    sums = sums.to(torch.float64)
    identity = torch.eye(len(sums), dtype=sums.dtype, device=sums.device)
    u, info = torch.linalg.solve_ex(identity - sums / rate, sums.new_ones(len(sums)))
    fits = not bool(info) and bool((u.isfinite() & (u > 0)).all())
    return u if fits else None


def estimate_radius(sums: Tensor) -> float:
    """``ρ(K)`` by bisection with `resolvent`, for messages; NaN where ``K`` is not finite."""
    low, high = 0.0, float(sums.sum(1).max())
    if not bool(sums.isfinite().all()):
        return math.nan
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if middle == 0 or resolvent(sums, middle) is None else (low, middle)
    return high


def strength(sums: Tensor, weight: Tensor) -> float:
    """The largest ``m`` for which ``(I - K)⁻¹ 1`` is a gauge of rate ``1 - m``, and room for rounding.

    Args:
        sums: ``K``, (units, units).
        weight: stored, of the shape and dtype that rounding goes by.

    Raises:
        ParametrizationError: ``ρ(K)`` is not below 1.
    """
    u = resolvent(sums, 1.0)
    rate = math.nan if u is None else float((sums.to(torch.float64) @ u / u).max())
    m = 1 - rate - 4 * safety(weight)
    if not m > 0:
        raise ParametrizationError(
            f"the weight has no gauge: the spectral radius is about {estimate_radius(sums):.6g}, and has to be "
            "below 1; use apply, which starts from a weight in the class"
        )
    return m


def fitting_m(rate: float, weight: Tensor) -> str:
    """How a refusal says which `m` a weight of this contraction rate is in the class for."""
    largest = 1 - rate - 2 * safety(weight)
    return f"use an m of at most {largest:.6g}" if largest > 0 else "no m in (0, 1) fits: the weight has no gauge"
