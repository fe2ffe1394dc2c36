"""An explicit network as one equilibrium: Wei & Kolter, ICLR 2022, Proposition 3.7."""

from __future__ import annotations

import copy
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from verideq.equilibrium import Equilibrium
from verideq.errors import ModelError
from verideq.graph import Normalize

_BEFORE = (nn.Flatten, Normalize)


def from_feedforward(model: nn.Sequential) -> nn.Sequential:
    """One equilibrium and a linear layer that compute what a ReLU network computes.

    **Proposition 3.7.** The hidden layers ``z_1 = relu(A_1 x + b_1)``, ``z_i = relu(A_i z_{i-1} + b_i)`` together are
    the equilibrium of ``z = relu(W z + U x + b)``, where ``W`` has ``A_2, ..., A_L`` below its block diagonal, ``U``
    has ``A_1`` in its first block of rows, and ``b`` stacks the biases. ``W`` is nilpotent, so ``ρ(|W|) = 0``: it is in
    the class of Theorem 3.3 (`verideq.parametrizations.LBEN`), whatever the ``A_i``; a gauge is ``u_1 = 1``, ``u_i = 1
    + |A_i| u_{i-1}``, which `verideq.gauge` finds while its entries stay below ``10^12`` or so; and plain iteration is
    exact after ``L`` steps. Widths may differ, and there are biases, unlike in the paper.

    Args:
        model: `Flatten` and `Normalize`, in any number; then `Linear` and `ReLU` in turns, the first a `Linear`, with
            one `ReLU` at least.

    Returns:
        a new `Sequential`: copies of what comes before, an `Equilibrium` with a plain `Linear` of the stored weights,
        and a `Linear` that reads the last block: the network's own last layer, or the identity where it ends in a
        `ReLU`.

    Raises:
        ModelError: another module, or another order.

    >>> net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> x = torch.randn(7, 3)
    >>> bool(torch.allclose(from_feedforward(net)(x), net(x), atol=1e-5))
    True
    """
    if not isinstance(model, nn.Sequential):
        raise ModelError(f"a feed-forward network is given as a Sequential; got {type(model).__name__}")
    modules = list(model)
    before = list(takewhile(lambda module: isinstance(module, _BEFORE), modules))
    layers, last = _layers(modules[len(before) :])
    sizes = [layer.out_features for layer in layers]
    weight = layers[0].weight.detach()
    fusion = nn.Linear(sum(sizes), sum(sizes), bias=False, dtype=weight.dtype, device=weight.device)
    injection = nn.Linear(layers[0].in_features, sum(sizes), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        fusion.weight.zero_()
        injection.weight.zero_()[: sizes[0]] = weight
        injection.bias.copy_(torch.cat([_bias(layer) for layer in layers]))
        start = 0
        for layer, previous in zip(layers[1:], sizes, strict=False):
            rows = slice(start + previous, start + previous + layer.out_features)
            fusion.weight[rows, start : start + previous] = layer.weight
            start += previous
        output = nn.Linear(sum(sizes), last.out_features if last is not None else sizes[-1]).to(weight)
        output.weight.zero_()[:, -sizes[-1] :] = torch.eye(sizes[-1]).to(weight) if last is None else last.weight
        output.bias.copy_(torch.zeros_like(output.bias) if last is None else _bias(last))
    return nn.Sequential(*copy.deepcopy(before), Equilibrium(fusion, injection), output).train(model.training)


def _layers(modules: list[nn.Module]) -> tuple[list[nn.Linear], nn.Linear | None]:
    """The linear layers that a ReLU follows, and the last one if none does."""
    linears: list[nn.Linear] = []
    for place, module in enumerate(modules):
        wanted = nn.ReLU if place % 2 else nn.Linear
        if type_before_parametrizations(module) is not wanted:
            raise ModelError(
                f"module {place} after the first layers is {type(module).__name__}, and {wanted.__name__} is needed: "
                "a feed-forward network is Linear and ReLU in turns, after any Flatten and Normalize"
            )
        if isinstance(module, nn.Linear):
            linears.append(module)
    if len(modules) < 2:
        raise ModelError("the network has no hidden layer: a Linear with a ReLU behind it is the least")
    return (linears, None) if len(modules) % 2 == 0 else (linears[:-1], linears[-1])


def _bias(layer: nn.Linear) -> Tensor:
    weight: Tensor = layer.weight
    return weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
