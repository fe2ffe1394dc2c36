"""The model file: one safetensors file, the architecture as JSON in its metadata, no pickle anywhere.

The layout is documented in ``docs/model-file.md``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from verideq.errors import ModelError
from verideq.graph.graph import Graph, Node
from verideq.graph.operations import OPERATIONS, parametrizations_of
from verideq.graph.trace import trace

FORMAT = 1
KEY = "verideq"


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, ...] | None = None,
    pixel_range: tuple[float, float] | None = None,
) -> str:
    """Write a model's graph and its materialised weights to one file, in one move: a reader never sees half of it.

    Args:
        model: a module of supported operations.
        path: ends in ``.safetensors`` by custom.
        input_shape: (*features); ``None``: the model's own attribute, or unknown.
        pixel_range: the valid range of inputs; ``None``: the model's own attribute, or (0, 1).

    Returns:
        the model's hash.

    Raises:
        UnsupportedOperation: the model cannot be traced.
        ModelError: its weights hold NaN or infinity, or are neither float32 nor float64.
    """
    graph = trace(model).check_finite()
    architecture, tensors = describe(graph)
    _check_dtypes(tensors, path)
    if input_shape is not None:
        architecture["input_shape"] = list(input_shape)
    if pixel_range is not None:
        architecture["pixel_range"] = list(pixel_range)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(_encode(architecture, tensors))
    partial.replace(path)
    return _hash(architecture, tensors)


def model_bytes(model: nn.Module) -> bytes:
    """What `save_model` would write."""
    architecture, tensors = describe(trace(model))
    _check_dtypes(tensors, type(model).__name__)
    return _encode(architecture, tensors)


def _encode(architecture: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    data: bytes = save(tensors, metadata={KEY: _canonical(architecture)})
    return data


def load_model(path: str | Path) -> Graph:
    """Read a model file.

    Returns:
        a `Graph` in evaluation mode: a module like any other.

    Raises:
        ModelError: the file is missing, truncated, foreign or a pickle (which is not opened), or its weights hold NaN
            or infinity.
    """
    path = Path(path)
    architecture, tensors = _read(path)
    try:
        nodes = [
            Node(
                node["name"],
                OPERATIONS[node["operation"]].create(
                    node["attributes"], {name: tensors.pop(f"{node['name']}/{name}") for name in node["tensors"]}
                ),
                tuple(node["inputs"]),
            )
            for node in architecture["nodes"]
        ]
        shape, pixels = architecture["input_shape"], architecture["pixel_range"]
        graph = Graph(
            nodes,
            input_shape=None if shape is None else tuple(shape),
            pixel_range=None if pixels is None else (float(pixels[0]), float(pixels[1])),
        )
    except ModelError as error:
        raise ModelError(f"{path} is not a model that this version can read: {error}") from error
    except Exception as error:  # what a damaged description makes torch raise has no common type
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ModelError(f"{path} is not a model that this version can read: {reason}") from error
    if tensors:
        raise ModelError(f"{path} holds tensors that no operation uses: {', '.join(sorted(tensors))}")
    try:
        return graph.check_finite().eval()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def model_hash(model: nn.Module) -> str:
    """SHA-256 over the architecture's JSON and every stored tensor (sorted name, dtype, shape, bytes), as hex."""
    return _hash(*describe(trace(model)))


def describe(graph: Graph) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The architecture, JSON-ready, and the materialised tensors by ``node/name``."""
    nodes, tensors = [], {}
    for node in graph.nodes:
        state = node.operation.state(node.module)
        nodes.append(
            {
                "name": node.name,
                "operation": node.operation.kind,
                "inputs": list(node.inputs),
                "attributes": node.operation.describe(node.module),
                "tensors": sorted(state),
                "parametrizations": parametrizations_of(node.module),
            }
        )
        tensors.update({f"{node.name}/{name}": t.cpu().contiguous().clone() for name, t in state.items()})
    architecture = {
        "format": FORMAT,
        "nodes": nodes,
        "input_shape": None if graph.input_shape is None else list(graph.input_shape),
        "pixel_range": None if graph.pixel_range is None else list(graph.pixel_range),
        "classes": graph.classes,
    }
    # Through JSON once, so that what is hashed is what is written (tuples become lists).
    normal: dict[str, Any] = json.loads(_canonical(architecture))
    return normal, tensors


def _canonical(architecture: dict[str, Any]) -> str:
    return json.dumps(architecture, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash(architecture: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    # Which parametrization the weights came from does not change what the model computes.
    nodes = [{k: v for k, v in node.items() if k != "parametrizations"} for node in architecture["nodes"]]
    digest = hashlib.sha256(_canonical({**architecture, "nodes": nodes}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def refuse_pickle(path: Path) -> None:
    """Refuse a pickle by its first bytes, without opening it as one.

    Raises:
        ModelError: the file is missing, a folder, or a pickle.
    """
    if not path.exists():
        raise ModelError(f"there is no model file {path}")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; give the model file in it")
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    # A safetensors file begins with the length of its header, whose lowest byte may be 0x80 too, and goes on with "{".
    if head.startswith(b"PK\x03\x04") or (head.startswith(b"\x80") and head[8:] != b"{"):
        raise ModelError(
            f"{path} is a pickle, which may run code when it is loaded, and was not opened. Save a model with "
            "verideq.save_model, or pass a state dict by --weights beside a package.module:builder"
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is truncated or no safetensors file: {error}") from error
    if KEY not in metadata:
        raise ModelError(
            f"{path} is a safetensors file, but not a verideq model (no '{KEY}' in its metadata); save one with "
            "verideq.save_model, or pass it by --weights beside a package.module:builder"
        )
    try:
        architecture = json.loads(metadata[KEY])
        version = architecture["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{path}: its architecture cannot be read: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise ModelError(f"{path} has format {version}; this version reads format {FORMAT}: install a newer verideq")
    _check_dtypes(tensors, path)
    return architecture, tensors


def _check_dtypes(tensors: dict[str, Tensor], place: object) -> None:
    for name in sorted(tensors):
        if tensors[name].dtype not in (torch.float32, torch.float64):
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise ModelError(
                f"{place}: the tensor {name} is {dtype}; weights are float32 or float64: model.float() first"
            )
