"""From a `torch.nn` module to a `Graph`, by one conservative symbolic trace.

Whatever is not in the table of operations is refused by its name and place. Nothing is guessed: a subclass of a known
module, a function with an argument that the table does not know, or control flow that depends on data ends the trace.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from verideq.equilibrium import DEQ, Equilibrium
from verideq.errors import UnsupportedOperation
from verideq.graph.graph import INPUT, Graph, Node
from verideq.graph.operations import OPERATIONS, Add, Embed, Normalize, evaluating, operation_of

_TORCH = str(Path(torch.__file__).parent)
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
"""In evaluation mode."""


class _Proxy(fx.Proxy):
    """Records ``a += b`` as what it is; a plain proxy records ``a + b``, and other names of ``a`` keep their value."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Leaves are the modules of torch.nn and verideq's own; a user's modules and containers are looked into."""

    record_stack_traces = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (Equilibrium, Normalize, Add, Embed)) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> Graph:
    """The graph of a model, its modules shared with the model.

    The trace is of evaluation mode; the model's own mode is left as it was.

    Args:
        model: a module of one tensor to one tensor, made of supported operations.

    Raises:
        UnsupportedOperation: an operation that no bound is known for, by name and place, with the list of those that
            are supported.
    """
    if isinstance(model, Graph):
        return model
    with evaluating(model):
        nodes, output = _trace(model, "", INPUT, set())
    return Graph(
        _needed(nodes, output),
        input_shape=getattr(model, "input_shape", None),
        pixel_range=getattr(model, "pixel_range", (0.0, 1.0)),
    )


def unsupported(model: nn.Module) -> list[str]:
    """Everything that keeps a model from being traced, each with its name and place; empty if nothing does."""
    problems: list[str] = []
    if isinstance(model, Graph):
        return problems
    try:
        with evaluating(model):
            _trace(model, "", INPUT, set(), problems)
    except UnsupportedOperation as error:
        problems.append(str(error))
    return problems


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on: it becomes the last one, whatever a forward computes beside it."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _trace(
    model: nn.Module, prefix: str, source: str, names: set[str], problems: list[str] | None = None
) -> tuple[list[Node], str]:
    """The nodes of `model`, which reads `source`; and the name of its output.

    What is not supported is raised, or with a list of `problems` noted there and passed over.
    """
    if prefix and operation_of(model) is not None and getattr(model, "inplace", False):
        raise _overwrites(prefix)
    if isinstance(model, DEQ):
        raise UnsupportedOperation(
            f"{prefix or 'the model'}: {type(model).__name__} is a general DEQ, of which nothing can be certified: its "
            "equilibria are not known to be unique; attack it: verideq attack"
        )
    if isinstance(model, Equilibrium):
        return _equilibrium(model, prefix, source, names, problems)
    if operation_of(model) is not None:
        return _leaf(model, prefix, (source,), names)  # a bare module, with nothing inside to trace
    _refuse_hooks(model, prefix or "the model")
    if type(model) in _IDENTITIES:
        return [], source
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # a user's forward, run on proxies, may raise anything
        raise UnsupportedOperation(
            f"{prefix or 'the model'} ({type(model).__name__}) cannot be traced: {error}. Its forward may use "
            f"supported operations only, and no control flow that depends on data. {_supported()}"
        ) from error
    nodes: list[Node] = []
    values: dict[fx.Node, str] = {}
    memory = _Memory(prefix)
    for item in graph.nodes:
        if item.op == "placeholder":
            if values:
                raise UnsupportedOperation(
                    f"{prefix or 'the model'} takes more than one input ({item.target}); models take one"
                )
            values[item] = source
            memory.add(item, shares=False)
            continue
        if item.op == "output":
            memory.check(item)
            (result,) = item.args
            if result not in values:
                raise UnsupportedOperation(f"{prefix or 'the model'} has to return one tensor; it returns {result}")
            return nodes, values[result]
        if _is_shape(item):
            continue  # read by a view alone, which checks it
        try:
            memory.check(item)
            more, values[item] = _operation(item, model, prefix, values, names, problems)
            memory.add(item, shares=_shares(item, model), overwrites=_in_place(item, model))
            nodes += more
        except UnsupportedOperation as error:
            if problems is None:
                raise
            problems.append(str(error))  # and go on as if it were the identity, to find the next one
            values[item] = next((values[read] for read in item.all_input_nodes if read in values), source)
            memory.add(item, shares=False)
    raise UnsupportedOperation(f"{prefix or 'the model'} returns nothing")


def _operation(
    item: fx.Node,
    model: nn.Module,
    prefix: str,
    values: dict[fx.Node, str],
    names: set[str],
    problems: list[str] | None,
) -> tuple[list[Node], str]:
    """The nodes of one item of a trace, and the name of its value."""
    if item.op == "call_module":
        child, place = model.get_submodule(str(item.target)), ".".join(filter(None, (prefix, str(item.target))))
        if type(child) in _IDENTITIES:
            _refuse_hooks(child, place)
            return [], _inputs(item, values, place, 1)[0]
        inputs = _inputs(item, values, place, 2 if isinstance(child, Add) else 1)
        if isinstance(child, Equilibrium):
            return _equilibrium(child, place, inputs[0], names, problems)
        return _leaf(child, place, inputs, names)
    module = _function(item) if item.op in ("call_function", "call_method") else None
    if module is None:
        raise _unsupported(item, prefix)
    inputs = _inputs(item, values, prefix, 2 if isinstance(module, Add) else 1)
    return _leaf(module, f"{prefix}.{item.name}" if prefix else item.name, inputs, names)


def _shares(item: fx.Node, model: nn.Module) -> bool:
    """Whether the value may be a view of what the item reads."""
    if item.op == "call_module":
        child = model.get_submodule(str(item.target))
        return type(child) in _IDENTITIES or isinstance(child, nn.Flatten)
    return isinstance(_function(item), nn.Flatten)


class _Memory:
    """Which values of a trace share memory: in single assignment nothing may read what was overwritten.

    Args:
        prefix: the place of the traced module; inside another one, its input is not its own to overwrite.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.owner: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()

    def check(self, item: fx.Node) -> None:
        """Refuse an item that reads an overwritten value."""
        if not self.stale.isdisjoint(item.all_input_nodes):
            raise _overwrites(self.prefix, _where(item))

    def add(self, item: fx.Node, *, shares: bool, overwrites: bool = False) -> None:
        """Note a new value; `shares`: it may be a view of the first value that it reads."""
        if not (shares or overwrites):
            self.owner[item] = item
            return
        owner = self.owner[item] = self.owner[item.all_input_nodes[0]]
        if overwrites:
            if owner.op == "placeholder" and self.prefix:
                raise _overwrites(self.prefix, _where(item))
            self.stale |= {value for value, of in self.owner.items() if of is owner and value is not item}


def _overwrites(prefix: str, where: str = "") -> UnsupportedOperation:
    return UnsupportedOperation(
        f"{prefix or 'the model'}: a value is read after an operation has overwritten it in place{where}, which is not "
        f"supported; use inplace=False, or a = a + b. {_supported()}"
    )


def _in_place(item: fx.Node, model: nn.Module) -> bool:
    if item.op == "call_module":
        return bool(getattr(model.get_submodule(str(item.target)), "inplace", False))
    if item.target is F.relu:
        return bool((*item.args, item.kwargs.get("inplace", False))[1])
    return item.target in (operator.iadd, torch.relu_, "relu_", "add_")


def _refuse_hooks(module: nn.Module, place: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise UnsupportedOperation(
            f"{place}: {type(module).__name__} is not supported here: it has forward hooks or a replaced forward, "
            f"which may compute anything. {_supported()}"
        )


def _leaf(module: nn.Module, place: str, inputs: tuple[str, ...], names: set[str]) -> tuple[list[Node], str]:
    operation = operation_of(module)
    if operation is None:
        raise UnsupportedOperation(f"{place}: {type(module).__name__} is not supported. {_supported()}")
    _refuse_hooks(module, place or "the model")
    refused = operation.refuse(module)
    if refused:
        raise UnsupportedOperation(
            f"{place or 'the model'}: {operation.kind} is not supported here: {refused}. {_supported()}"
        )
    name, count = place or operation.kind, 1
    while name in names or name == INPUT:
        count += 1
        name = f"{place or operation.kind}@{count}"
    names.add(name)
    return [Node(name, module, inputs)], name


def _equilibrium(
    layer: Equilibrium, place: str, source: str, names: set[str], problems: list[str] | None
) -> tuple[list[Node], str]:
    """The nodes of the injection, then the equilibrium itself, which reads ``v``."""
    place = place or "equilibrium"
    before, v = _trace(layer.injection, f"{place}.injection", source, names, problems)
    after, name = _leaf(layer, place, (v,), names)
    return before + after, name


def _inputs(item: fx.Node, values: dict[fx.Node, str], place: str, count: int) -> tuple[str, ...]:
    tensors = [argument for argument in item.args if isinstance(argument, fx.Node) and argument in values]
    # Further arguments of a function (a flatten's axes) were read by `_function`.
    extra = item.op == "call_module" and (len(item.args) != count or item.kwargs)
    if len(tensors) != count or extra:
        raise _unsupported(item, place)
    return tuple(values[tensor] for tensor in tensors)


def _is_shape(item: fx.Node) -> bool:
    """Whether a node is a size of a tensor that only goes into a view: ``x.size(0)``, ``x.shape[0]``."""
    if item.op == "call_method" and item.target == "size":
        return True
    if item.op == "call_function" and item.target is getattr and item.args[1] == "shape":
        return True
    source = item.args[0] if item.args else None
    return (
        item.op == "call_function"
        and item.target is operator.getitem
        and isinstance(source, fx.Node)
        and _is_shape(source)
    )


def _is_batch_size(value: object) -> bool:
    if not isinstance(value, fx.Node) or not _is_shape(value):
        return False
    if value.target == "size":
        return value.args[1:] == (0,)
    # Of the whole shape: x.shape[1:][0] is no batch.
    whole = isinstance(value.args[0], fx.Node) and value.args[0].target in (getattr, "size")
    return bool(value.target is operator.getitem and value.args[1] == 0 and whole)


def _arguments(item: fx.Node, **defaults: Any) -> dict[str, Any] | None:
    """The arguments after the tensor by name, or ``None`` if one is not among `defaults`."""
    given = dict(zip(defaults, item.args[1:], strict=False)) | dict(item.kwargs)
    if (
        len(item.args) - 1 > len(defaults)
        or not set(given) <= set(defaults)
        or any(isinstance(v, fx.Node) for v in given.values())
    ):
        return None
    return defaults | given


def _relu(item: fx.Node) -> nn.Module | None:
    return None if _arguments(item, inplace=False) is None else nn.ReLU()


def _flatten(item: fx.Node) -> nn.Module | None:
    arguments = _arguments(item, start_dim=0, end_dim=-1)
    return None if arguments is None else nn.Flatten(**arguments)


def _view(item: fx.Node) -> nn.Module | None:
    """``x.view(x.size(0), -1)`` and its relatives."""
    sizes = item.args[1] if len(item.args) == 2 and isinstance(item.args[1], (tuple, list)) else item.args[1:]
    keeps = len(sizes) == 2 and _is_batch_size(sizes[0]) and sizes[1] == -1
    return nn.Flatten() if keeps else None


def _add(item: fx.Node) -> nn.Module | None:
    return Add() if len(item.args) == 2 and not item.kwargs else None


def _avg_pool(item: fx.Node) -> nn.Module | None:
    arguments = _arguments(
        item, kernel_size=None, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
    )
    return None if arguments is None else nn.AvgPool2d(**arguments)


def _max_pool(item: fx.Node) -> nn.Module | None:
    arguments = _arguments(
        item, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
    )
    return None if arguments is None else nn.MaxPool2d(**arguments)


def _adaptive(item: fx.Node) -> nn.Module | None:
    arguments = _arguments(item, output_size=None)
    return None if arguments is None else nn.AdaptiveAvgPool2d(**arguments)


_FUNCTIONS: dict[object, Callable[[fx.Node], nn.Module | None]] = {
    F.relu: _relu, torch.relu: _relu, torch.relu_: _relu, "relu": _relu, "relu_": _relu,
    torch.flatten: _flatten, "flatten": _flatten,
    "view": _view, "reshape": _view, torch.reshape: _view,
    operator.add: _add, operator.iadd: _add, torch.add: _add, "add": _add, "add_": _add,
    F.avg_pool2d: _avg_pool, F.max_pool2d: _max_pool, torch.max_pool2d: _max_pool, F.adaptive_avg_pool2d: _adaptive,
}  # fmt: skip


def _function(item: fx.Node) -> nn.Module | None:
    """The module that does what a function call does, or ``None``."""
    reader = _FUNCTIONS.get(item.target)
    return None if reader is None else reader(item)


def _supported() -> str:
    return f"Supported: {', '.join(OPERATIONS)}."


def _unsupported(item: fx.Node, prefix: str) -> UnsupportedOperation:
    name = item.target if isinstance(item.target, str) else getattr(item.target, "__name__", str(item.target))
    where = _where(item)
    if item.op == "get_attr":
        name = f"the bare parameter {name}"
    arguments = ", ".join(str(argument) for argument in item.args)
    hint = _INSTEAD.get(name.lstrip("i"), "")
    return UnsupportedOperation(
        f"{prefix or 'the model'}: {name}({arguments}) is not supported{where}. {hint}{_supported()}"
    )


_NORMALISE = "To shift and scale the input use verideq.Normalize. "
_INSTEAD = {
    "sub": _NORMALISE,
    "truediv": _NORMALISE,
    "mul": _NORMALISE,
    "add": "An add takes two values of one shape; a constant belongs into a bias. ",
    "mean": "For the mean over an image use adaptive_avg_pool2d(x, 1). ",
    "softmax": "Leave it out: it does not change which output is the largest. ",
    "log_softmax": "Leave it out: it does not change which output is the largest. ",
}
"""What to write instead of an operation that is refused."""


def _where(item: fx.Node) -> str:
    """The last line of the user's own code that led to a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (.+)\n\s*(.*)', item.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    if not own:
        return ""
    file, line, _, code = own[-1]
    return f", at {Path(file).name}:{line}, `{code}`"
