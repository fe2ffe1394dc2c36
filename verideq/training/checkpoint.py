"""Checkpoints of a training run: one safetensors file, replaced in one move."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from verideq.errors import ResumeError

Tensors = dict[str, Tensor]


def write_checkpoint(
    path: Path, model: nn.Module, average: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, meta: dict[str, Any]
) -> None:
    """Write everything that a run goes on from; a reader finds the old file or the new one.

    Args:
        average: of the weights, by their names in the state dict; empty for none.
        meta: JSON-ready.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors.update({f"average/{name}": tensor for name, tensor in average.items()})
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"adam/{index}/{name}": value for name, value in state.items()})
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(stored, metadata={"verideq": json.dumps(meta)}))
    partial.replace(path)


def read_checkpoint(path: Path, wanted: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a checkpoint and its meta data.

    Args:
        wanted: what the meta data have to agree with.

    Raises:
        ResumeError: it is no checkpoint, or one of another run.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            meta = dict(json.loads(handle.metadata()["verideq"]))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{path} is no training checkpoint: {error}; use another --out") from error
    for key, value in wanted.items():
        if meta.get(key) != value:
            raise ResumeError(
                f"{path} was made with another {key.replace('_', ' ')}; repeat its options, or use another --out"
            )
    return tensors, meta


def restore(tensors: Tensors, model: nn.Module, average: Tensors, optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of `write_checkpoint` where they were."""

    def under(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(under("model/"))
    for name, tensor in under("average/").items():
        average[name].copy_(tensor)
    state: dict[int, Tensors] = {}
    for name, tensor in under("adam/").items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
