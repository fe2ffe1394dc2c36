"""What every parametrization shares: `apply` on the class registers it, `apply` on an instance stays torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class _Apply:
    """``Class.apply(layer, ...)`` is ``Class.register(layer, ...)``; ``instance.apply(fn)`` is `torch.nn.Module.apply`.

    Without the second half ``model.apply(fn)``, which recurses into parametrizations, would break.
    """

    def __get__(self, instance: nn.Module | None, owner: type[Parametrization]) -> Callable[..., Any]:
        return owner.register if instance is None else nn.Module.apply.__get__(instance, owner)


class Parametrization(nn.Module):
    """A map from free tensors to ``W``, on `torch.nn.utils.parametrize`.

    A subclass has ``forward`` (free tensors to ``W``), a strict ``right_inverse`` (``W`` to free tensors, or
    `ParametrizationError`), and a static ``register(layer, ...)`` that puts it on a fresh layer and returns the layer.
    """

    register: Callable[..., nn.Module]
    apply: Any = _Apply()
