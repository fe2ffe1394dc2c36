"""The operations that a model may be made of: one table that tracing, the model file, `inspect` and the bounds share.

An operation is a `torch.nn` module class with the constructor arguments that fix it and the tensors that it holds. To
add one: a line in `OPERATIONS`, a rule in `verideq.certify.interval`, a case in the conformance suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from verideq.equilibrium import Equilibrium, FeedbackFusion, MonotoneFusion
from verideq.errors import ModelError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Normalize(nn.Module):
    """``(x - mean) / std`` by channel: the first layer of a model whose pixels are normalised.

    Perturbations live in pixel space, so normalisation belongs to the model.

    Args:
        mean: one number a channel (axis 1), or a single one.
        std: likewise, positive.

    Raises:
        ModelError: a `std` that is not positive, or lengths that differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | list[float] | float, std: Tensor | list[float] | float) -> None:
        super().__init__()
        self.register_buffer("mean", _vector(mean))
        self.register_buffer("std", _vector(std))
        if self.mean.shape != self.std.shape or not bool((self.std > 0).all()):
            raise ModelError(
                f"Normalize needs as many means as standard deviations, these positive; got mean {self.mean.tolist()}, "
                f"std {self.std.tolist()}"
            )

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return (x - self.mean.view(shape)) / self.std.view(shape)


def _vector(values: Tensor | list[float] | float) -> Tensor:
    if isinstance(values, Tensor) and values.is_floating_point():
        return values.reshape(-1)
    return torch.as_tensor(values, dtype=torch.get_default_dtype()).reshape(-1)


class Add(nn.Module):
    """``a + b``: a residual connection."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Embed(nn.Module):
    """``(x, rest)``: what is injected into the first block of a flat state, and constants for all others.

    For networks whose blocks are coupled to each other (`verideq.equilibrium.FeedbackFusion`), of which the lowest
    alone reads the input.

    Args:
        rest: (units,), what the other blocks are injected: their biases.

    >>> Embed(torch.tensor([5.0]))(torch.ones(1, 1, 1, 2))
    tensor([[1., 1., 5.]], grad_fn=<CatBackward0>)
    """

    def __init__(self, rest: Tensor) -> None:
        super().__init__()
        if rest.dim() != 1:
            raise ModelError(f"the constants of an Embed are a vector, (units,); got the shape {tuple(rest.shape)}")
        self.rest = nn.Parameter(rest)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.flatten(1), self.rest.expand(len(x), -1)), 1)


@dataclass(frozen=True)
class Operation:
    """One kind of node.

    Args:
        kind: its name in files and messages.
        module: the class; exactly this one, because a subclass may compute something else.
        attributes: constructor arguments, read from the module's attributes of the same name.
        tensors: names of the tensors that define it; a missing one is ``None``.
        build: from attributes and tensors to a module in evaluation mode; the default sets the tensors on
            ``module(**attributes)``.
        refuse: why an instance cannot be used, or an empty string.
    """

    kind: str
    module: type[nn.Module]
    attributes: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module] | None = None
    refuse: Callable[[Any], str] = lambda module: ""

    def describe(self, module: nn.Module) -> dict[str, Any]:
        """The constructor arguments of an instance, JSON-ready."""
        return {name: getattr(module, name) for name in self.attributes}

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of an instance, materialised: parametrizations evaluated, in the stored dtype."""
        with torch.no_grad(), evaluating(module):  # some parametrizations move their weight while they train
            values = {name: getattr(module, name) for name in self.tensors}
        return {name: value.detach() for name, value in values.items() if value is not None}

    def create(self, attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        """An instance from what `describe` and `state` gave.

        Raises:
            ModelError: the arguments do not fit the operation.
        """
        arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items()}
        if set(arguments) != set(self.attributes) or not set(tensors) <= set(self.tensors):
            raise ModelError(
                f"{self.kind} takes the arguments {sorted(self.attributes)} and the tensors {sorted(self.tensors)}; "
                f"got {sorted(arguments)} and {sorted(tensors)}"
            )
        try:
            # On the meta device nothing is allocated or drawn for the tensors that are about to be replaced.
            with torch.device("meta"):
                module = self.build(arguments, tensors) if self.build else self.module(**arguments)
            _set(module, self.tensors, tensors)
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{self.kind} cannot be built from its description: {reason}") from error
        return module.eval()


def _set(module: nn.Module, names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> None:
    """Replace the module's tensors, checking shapes; a bias that is not given becomes ``None``."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner, value = module.get_submodule(path), tensors.get(name)
        current = getattr(owner, leaf)
        if value is None:
            if current is not None and leaf != "bias":
                raise ValueError(f"{name} is missing")
            setattr(owner, leaf, None)
            continue
        if current is not None and current.shape != value.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(current.shape)}")
        stored = value.clone()
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(stored, requires_grad=False)
        else:
            owner.register_buffer(leaf, stored)


_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _build_normalize(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    return Normalize(tensors["mean"], tensors["std"], **attributes)


def _build_batch_norm(kind: type[nn.Module]) -> Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]:
    def build(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        module = kind(**attributes, affine="weight" in tensors)
        module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device="cpu"))
        return module

    return build


def _refuse_batch_norm(module: nn.BatchNorm2d) -> str:
    return "" if module.running_mean is not None else "it has no running statistics (track_running_stats=False)"


def _refuse_max_pool(module: nn.MaxPool2d) -> str:
    return "it returns indices" if module.return_indices else ""


def _refuse_flatten(module: nn.Flatten) -> str:
    whole = (module.start_dim, module.end_dim) == (1, -1)
    return "" if whole else f"it flattens axes {module.start_dim} to {module.end_dim}; only (1, -1) keeps samples apart"


@dataclass(frozen=True)
class _EquilibriumOperation(Operation):
    """The layer without its injection, which is a part of the graph before it: ``v -> z*``."""

    def describe(self, module: nn.Module) -> dict[str, Any]:
        fusion = module.get_submodule("fusion")
        described = FUSIONS[type_before_parametrizations(fusion)].describe(fusion)
        return {"activation": module.activation.name, "fusion": described}  # type: ignore[union-attr]  # an Equilibrium's

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        fusion = module.get_submodule("fusion")
        state = FUSIONS[type_before_parametrizations(fusion)].state(fusion)
        return {f"fusion.{name}": tensor for name, tensor in state.items()}

    def create(self, attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        # Which tensors there are depends on the fusion, whose builder looks at them.
        return Operation.create(replace(self, tensors=tuple(tensors)), attributes, tensors)


@dataclass(frozen=True)
class Fusion:
    """A kind of ``W``: what stands under ``fusion`` in the description of an equilibrium.

    Args:
        kind: its name in files and messages.
        describe: from an instance to ``{"operation": kind, "attributes": ...}``, JSON-ready.
        tensors: of an instance, by the paths of its own parameters.
        build: from the attributes and tensors to an instance of the right shapes, with just these tensors.
    """

    kind: str
    describe: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any], dict[str, Tensor]]
    build: Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]

    def state(self, fusion: nn.Module) -> dict[str, Tensor]:
        """The tensors of an instance, materialised."""
        with torch.no_grad(), evaluating(fusion):
            return {name: tensor.detach() for name, tensor in self.tensors(fusion).items()}


def _layer_fusion(kind: str) -> Fusion:
    """A fusion that is an operation by itself."""

    def describe(fusion: nn.Module) -> dict[str, Any]:
        return {"operation": kind, "attributes": OPERATIONS[kind].describe(fusion)}

    def build(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
        return OPERATIONS[kind].create(attributes, tensors)

    return Fusion(kind, describe, lambda fusion: {"weight": fusion.weight}, build)


def _describe_mondeq(fusion: MonotoneFusion) -> dict[str, Any]:
    """``m``, and the layer that ``A`` is the weight of; ``B`` has the same kernel, or is square."""
    rows, units, *kernel = fusion.A.shape
    attributes: dict[str, Any]
    if kernel:
        values = (units, rows, tuple(kernel), (1, 1), "same", (1, 1), 1, fusion.padding_mode)
        inner, attributes = "conv2d", dict[str, Any](zip(_CONV, values, strict=True))
    else:
        inner, attributes = "linear", {"in_features": units, "out_features": rows}
    described = {"m": float(fusion.m), "operation": inner, "attributes": attributes}
    return {"operation": "mondeq", "attributes": described}


def _build_mondeq(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    m, inner, given = attributes["m"], attributes["operation"], attributes["attributes"]
    if not isinstance(m, float):
        raise ValueError(f"the m of a factored W is a floating-point number; got {m!r}")
    fusion = MonotoneFusion(tensors["A"], tensors["B"], m, given.get("padding_mode", "zeros"))
    wanted = _describe_mondeq(fusion)["attributes"]
    stated = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if set(attributes) != set(wanted) or inner != wanted["operation"] or stated != wanted["attributes"]:
        raise ValueError(
            f"the factors A {tuple(fusion.A.shape)} and B {tuple(fusion.B.shape)} belong to {wanted['operation']} "
            f"{wanted['attributes']}; the description says {inner} {stated}"
        )
    return fusion


def _describe_feedback(fusion: FeedbackFusion) -> dict[str, Any]:
    """The shapes of the blocks, and the layer of every coupling."""
    couplings = []
    for module in fusion.couplings:
        operation = _BY_CLASS[type_before_parametrizations(module)]
        couplings.append({"operation": operation.kind, "attributes": operation.describe(module)})
    return {"operation": "feedback", "attributes": {"shapes": fusion.shapes, "couplings": couplings}}


def _feedback_tensors(fusion: FeedbackFusion) -> dict[str, Tensor]:
    """The weights that ``W`` is made of, after any scaling of all together."""
    couplings = fusion.operator().couplings
    return {f"couplings.{place}.weight": coupling.weight for place, coupling in enumerate(couplings)}


def _build_feedback(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if set(attributes) != {"shapes", "couplings"}:
        raise ValueError(f"a feedback fusion takes shapes and couplings; got {sorted(attributes)}")
    couplings = []
    for place, described in enumerate(attributes["couplings"]):
        weight = {"weight": tensors[f"couplings.{place}.weight"]}
        couplings.append(OPERATIONS[described["operation"]].create(described["attributes"], weight))
    return FeedbackFusion(attributes["shapes"], couplings)


def _build_equilibrium(attributes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    described = attributes["fusion"]
    known = {fusion.kind: fusion for fusion in FUSIONS.values()}
    if described["operation"] not in known:
        raise ValueError(f"unknown fusion {described['operation']!r}; known: {', '.join(known)}")
    kind = known[described["operation"]]
    stored = {name.removeprefix("fusion."): tensor for name, tensor in tensors.items()}
    fusion = kind.build(described["attributes"], stored)
    if set(stored) != set(kind.tensors(fusion)):
        raise ValueError(
            f"this {kind.kind} fusion has the tensors {sorted(kind.tensors(fusion))}; got {sorted(stored)}"
        )
    return Equilibrium(fusion, nn.Identity(), attributes["activation"])


OPERATIONS: dict[str, Operation] = {
    operation.kind: operation
    for operation in (
        Operation("normalize", Normalize, (), ("mean", "std"), _build_normalize),
        Operation("linear", nn.Linear, ("in_features", "out_features"), ("weight", "bias")),
        Operation("conv2d", nn.Conv2d, _CONV, ("weight", "bias")),
        Operation(
            "batch_norm1d", nn.BatchNorm1d, ("num_features", "eps"), ("weight", "bias", "running_mean", "running_var"),
            _build_batch_norm(nn.BatchNorm1d), _refuse_batch_norm,
        ),
        Operation(
            "batch_norm2d", nn.BatchNorm2d, ("num_features", "eps"), ("weight", "bias", "running_mean", "running_var"),
            _build_batch_norm(nn.BatchNorm2d), _refuse_batch_norm,
        ),
        Operation("relu", nn.ReLU),
        Operation(
            "avg_pool2d", nn.AvgPool2d,
            ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        ),
        Operation("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d, ("output_size",)),
        Operation(
            "max_pool2d", nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
            refuse=_refuse_max_pool,
        ),
        Operation("flatten", nn.Flatten, (), refuse=_refuse_flatten),
        Operation("add", Add),
        Operation("embed", Embed, (), ("rest",), lambda attributes, tensors: Embed(tensors["rest"], **attributes)),
        _EquilibriumOperation(
            "equilibrium", Equilibrium, ("activation", "fusion"), ("fusion.weight", "fusion.A", "fusion.B"),
            _build_equilibrium,
        ),
    )
}  # fmt: skip
"""Every supported operation by kind."""

FUSIONS: dict[type, Fusion] = {
    nn.Linear: _layer_fusion("linear"),
    nn.Conv2d: _layer_fusion("conv2d"),
    MonotoneFusion: Fusion("mondeq", _describe_mondeq, lambda fusion: {"A": fusion.A, "B": fusion.B}, _build_mondeq),
    FeedbackFusion: Fusion("feedback", _describe_feedback, _feedback_tensors, _build_feedback),
}
"""What may stand as ``W``."""

_BY_CLASS: dict[type, Operation] = {operation.module: operation for operation in OPERATIONS.values()}


def operation_of(module: nn.Module) -> Operation | None:
    """The operation that a module is an instance of, parametrized or not."""
    return _BY_CLASS.get(type_before_parametrizations(module))


def parametrizations_of(module: nn.Module) -> list[str]:
    """The class names of the parametrizations of a module or its fusion, for the record in a model file."""
    names: list[str] = []
    for part in module.modules():
        if isinstance(part, MonotoneFusion):
            names.append("MonDEQ")
        if isinstance(part, FeedbackFusion) and part.scaling is not None:
            names.append(type(part.scaling).__name__)
        if is_parametrized(part):
            for chain in part.parametrizations.values():  # type: ignore[operator]  # a ModuleDict there
                names += [type(parametrization).__name__ for parametrization in chain]
    return names
