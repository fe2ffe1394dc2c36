"""Models from the field's checkpoints: MonDEQ (Winston & Kolter, NeurIPS 2020), IBP-MonDEQ (Wei & Kolter, ICLR 2022).

A file is a torch state dict (``.pt``, ``.pth``), opened on the CPU and without running what a pickle may hold; an
``.npz``; or MATLAB's ``.mat``. Neither code stores ``m``, nor how its inputs were normalised: both have to be given.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from verideq.equilibrium import Equilibrium, MonotoneFusion
from verideq.equilibrium.layer import linear
from verideq.equilibrium.monotonicity import proved_m
from verideq.errors import ModelError
from verideq.graph import Normalize

IMAGES: dict[int, tuple[int, ...]] = {784: (1, 28, 28)}
"""Numbers of inputs that stand for an image; any other is a flat vector."""
_NAMES = {
    "U.weight": "U", "U.bias": "b", "A.weight": "A", "B.weight": "B", "W.weight": "W",
    "Wout.weight": "C", "Wout.bias": "c", "u": "b",
}  # fmt: skip
"""What the names in files mean, beside those that mean themselves: ``relu(W z + U x + b)``, then ``C z + c``."""
Normalisation = tuple[float, float]
"""Mean and standard deviation of a pixel."""


def read_mondeq(
    path: Path, m: float | None = None, normalisation: Normalisation | None = None
) -> tuple[nn.Module, str]:
    """A dense MonDEQ with its classifier.

    Args:
        path: with the factors ``A`` and ``B``, or with ``W``; and ``U``, ``b``, ``C``, ``c``. In a state dict
            ``[mon.]linear_module.{U.weight,U.bias,A.weight,B.weight}`` and ``Wout.{weight,bias}``; elsewhere the
            letters themselves (``u`` for ``b`` will do).
        m: the strength of monotonicity that the factors were trained with. With ``W`` alone, what has to be proved.
        normalisation: of the pixels; ``None``: as they are.

    Returns:
        the model, and one line on what is known of its ``W``.

    Raises:
        ModelError: the file cannot be read, lacks or has more than the tensors above, they do not fit, `m` is missing
            or makes no sense, or nothing positive can be proved of a ``W``.
    """
    tensors = _named(path, read_tensors(path))
    wanted = set("UbCc") | ({"W"} if "W" in tensors else {"A", "B"})
    _check_keys(path, "a MonDEQ checkpoint holds A and B (or W), U, b, C, c", wanted, tensors.keys())
    if m is not None and not 0 < m < math.inf:
        raise ModelError(f"m = {m} is no strength of monotonicity; give a positive number")
    try:
        if "A" in tensors and tensors["A"].dim() != 2:
            raise ModelError(f"A is {tuple(tensors['A'].shape)}; convolutional MonDEQs are not read, dense ones are")
        if "W" in tensors:
            fusion, known = _whole(tensors["W"], m)
        elif m is None:
            raise ModelError("the factors A and B make a W only with the m they were trained with; pass --m")
        else:
            fusion, known = MonotoneFusion(tensors["A"], tensors["B"], m), f"I - sym W >= {m:g} by its factors"
        return _model(fusion, [linear(*_affine(tensors, "U", "b"))], _affine(tensors, "C", "c"), normalisation), known
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _whole(W: Tensor, m: float | None) -> tuple[nn.Module, str]:
    """A ``W`` without factors, stored as it is, and what is proved of it."""
    proved, measured = proved_m(W)
    if not proved > 0:
        raise ModelError(
            f"no m > 0 is proved of this W: the smallest eigenvalue of I - sym W is {measured:.6g}. Import the factors "
            "A and B with --m, if there are any"
        )
    if m is not None and proved < m * (1 - 1e-5):
        raise ModelError(
            f"I - sym W >= {m:g} is not so: {proved:.6g} is proved, {measured:.6g} measured; leave --m out"
        )
    return linear(W, None), f"I - sym W >= {proved:.6g}, proved of the stored W"


def read_ibp_mondeq(
    path: Path, m: float | None = None, normalisation: Normalisation | None = None, gamma: float = 3.0
) -> tuple[nn.Module, str]:
    """A dense model of the IBP-MonDEQ paper's code (its ``DEQ_FC``), with the materialised ``W``.

    ``z = relu(W z + relu(BN(U x)) + c)``, ``W = Γ⁻¹ D^-½ M D^-½ Γ`` with ``D = (|M|1 + |M|ᵀ1) / (2 (1-m)) + 1e-8`` and
    ``Γ = (1 - 1/γ) sigmoid(β) + 1/γ``; batch norm, the inner ReLU with ``c``, and ``Γ`` may each be missing.

    Args:
        path: a state dict with ``...linear_module.{U.M,M,bn_U_module,lben_p,U_post_act_bias}`` and ``Wout``; or the
            list that the code saves, whose first entry is one.
        m: as trained, in (0, 1).
        normalisation: of the pixels; ``None``: as they are.
        gamma: the condition number of ``Γ``, 3 by default in that code; read only where there is a ``Γ``.

    Raises:
        ModelError: as `read_mondeq`; or a convolutional model, whose ``W`` is scaled by pixel and is no convolution.
    """
    tensors = read_tensors(path)
    found = sorted(name for name in tensors if name.endswith("linear_module.M.weight"))
    if len(found) != 1:
        raise ModelError(f"{path}: an IBP-MonDEQ checkpoint holds one ...linear_module.M.weight; got {found or 'none'}")
    prefix = found[0].removesuffix("M.weight")
    layer = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    M = layer["M.weight"]
    if M.dim() != 2:
        raise ModelError(
            f"{path}: the W of this model's convolution is scaled pixel by pixel, with other numbers near the border, "
            "and no operator here does that; train it again with verideq.parametrizations.LBEN, which scales by channel"
        )
    norm = [f"bn_U_module.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    outer = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    has_norm = any(name in layer for name in norm)
    needed = {"M.weight", "U.M.weight", "U.M.bias", *(norm if has_norm else ())}
    # The code's M is a Linear with a bias that it never adds.
    spare = {"M.bias", "lben_p", "U_post_act_bias", "bn_U_module.num_batches_tracked"}
    what = "an IBP-MonDEQ checkpoint holds one dense layer and Wout"
    _check_keys(path, f"{what}, as {prefix}*", needed, layer.keys() - spare)
    _check_keys(path, what, {"Wout.weight", "Wout.bias"}, outer.keys())
    if m is None or not 0 < m < 1:
        raise ModelError(f"{path}: M makes a W only with the m in (0, 1) that it was trained with; --m is {m}")
    if not 1 <= gamma < math.inf:
        raise ModelError(f"{path}: the condition number gamma = {gamma} is not 1 or more")
    try:
        U, b = _affine(layer, "U.M.weight", "U.M.bias")
        fusion = linear(_scaled(M, m, layer.get("lben_p"), gamma), None)
        before: list[nn.Module] = [linear(U, b)]
        if has_norm:
            before.append(_batch_norm(len(b), *(layer[name].reshape(-1) for name in norm)))
        if "U_post_act_bias" in layer:
            shift = layer["U_post_act_bias"].reshape(-1)
            if len(shift) != len(b):
                raise ModelError(f"U_post_act_bias has {len(shift)} entries for {len(b)} units")
            before += [nn.ReLU(), Normalize(-shift, torch.ones_like(shift))]
        model = _model(fusion, before, _affine(outer, "Wout.weight", "Wout.bias"), normalisation)
        return model, f"W as trained at m = {m:g}" + (f", gamma = {gamma:g}" if "lben_p" in layer else "")
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _scaled(M: Tensor, m: float, beta: Tensor | None, gamma: float) -> Tensor:
    """``W``, computed in float64 and rounded to the dtype of ``M``."""
    wide = M.to(torch.float64)
    if wide.shape[0] != wide.shape[1]:
        raise ModelError(f"M is {tuple(M.shape)}; W maps a state to a state and is square")
    diagonal = (wide.abs().sum(1) + wide.abs().sum(0)) / (2 * (1 - m)) + 1e-8
    right = left = diagonal.rsqrt()
    if beta is not None:
        if beta.numel() != len(wide):
            raise ModelError(f"lben_p has {beta.numel()} entries for {len(wide)} units")
        scale = (1 - 1 / gamma) * beta.reshape(-1).to(torch.float64).sigmoid() + 1 / gamma
        left, right = left / scale, right * scale
    return (left[:, None] * wide * right).to(M.dtype)


def _batch_norm(units: int, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> nn.BatchNorm1d:
    lengths = sorted({len(t) for t in (weight, bias, mean, variance)})
    if lengths != [units]:
        raise ModelError(f"the batch norm has vectors of {lengths} entries for {units} units")
    module = nn.BatchNorm1d(units, dtype=weight.dtype).eval()
    module.load_state_dict(
        {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}, strict=False
    )
    return module


def _affine(tensors: Mapping[str, Tensor], weight: str, bias: str) -> tuple[Tensor, Tensor]:
    """A matrix and its bias, which a MATLAB file holds as a row or a column."""
    matrix, vector = tensors[weight], tensors[bias].reshape(-1)
    if matrix.dim() != 2 or len(vector) != len(matrix):
        raise ModelError(
            f"{weight} {tuple(matrix.shape)} and {bias} {tuple(tensors[bias].shape)} are no matrix with its bias"
        )
    return matrix, vector


def _model(
    fusion: nn.Module, before: list[nn.Module], last: tuple[Tensor, Tensor], normalisation: Normalisation | None
) -> nn.Module:
    """The whole network, its sizes checked; `before` begins with the linear map of the input."""
    first, units = before[0], fusion.operator().shape[0] if isinstance(fusion, MonotoneFusion) else fusion.in_features
    inputs, given = int(first.in_features), int(first.out_features)  # type: ignore[arg-type]  # a Linear
    if given != units or last[0].shape[1] != units:
        raise ModelError(
            f"the equilibrium has {units} units, its injection gives {given}, the classifier reads {last[0].shape[1]}"
        )
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if normalisation is not None:
        mean, std = (torch.tensor([value], dtype=last[0].dtype) for value in normalisation)
        parts["normalize"] = Normalize(mean, std)
    if inputs in IMAGES:
        parts["flatten"] = nn.Flatten()
    parts["equilibrium"] = Equilibrium(fusion, before[0] if len(before) == 1 else nn.Sequential(*before))
    parts["classifier"] = linear(*last)
    model = nn.Sequential(parts).eval()
    model.input_shape = IMAGES.get(inputs, (inputs,))  # type: ignore[assignment]  # what `save_model` looks for
    # Images have pixels in [0, 1]; of other inputs no range is known.
    model.pixel_range = (0.0, 1.0) if inputs in IMAGES else None  # type: ignore[assignment]  # likewise
    return model


def _check_keys(path: Path, what: str, wanted: Set[str], given: Set[str]) -> None:
    missing, extra = (", ".join(sorted(names)) or "none" for names in (wanted - given, given - wanted))
    if wanted != given:
        raise ModelError(f"{path}: {what}; missing: {missing}; too many: {extra}")


def _named(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the letters of the formula; one that is there under two names has to be the same."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("mon.").removeprefix("linear_module.")
        letter = _NAMES.get(short, short)
        if letter in result and not torch.equal(result[letter], tensor):
            raise ModelError(f"{path}: {name} is there twice, with different numbers")
        result[letter] = tensor
    return result


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every array of a file as a finite tensor on the CPU: float64 if any of them is, else float32.

    Raises:
        ModelError: the file is missing, damaged, of another kind, holds code or objects, or NaN or infinity.
    """
    readers = {".pt": _read_torch, ".pth": _read_torch, ".npz": _read_npz, ".mat": _read_mat}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ModelError(f"{path}: a checkpoint ends in {', '.join(readers)}")
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    try:
        values = {name: torch.as_tensor(value) for name, value in reader(path).items()}
    except Exception as error:  # torch, numpy and scipy raise many types on a damaged or dangerous file
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ModelError(
            f"{path} cannot be read as weights alone, and objects and code are not loaded ({type(error).__name__}: "
            f"{reason})"
        ) from error
    for name, value in values.items():
        if value.is_complex() or not bool(value.isfinite().all()):
            raise ModelError(f"{path}: {name} holds complex numbers, NaN or infinity; weights are finite and real")
    wide = any(value.dtype is torch.float64 for value in values.values())
    return {name: value.to(torch.float64 if wide else torch.float32) for name, value in values.items()}


def _read_torch(path: Path) -> Mapping[str, Any]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, (list, tuple)) and content:
        content = content[0]  # the model's, then the optimiser's
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise TypeError("it is no state dict")
    return content


def _read_npz(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_mat(path: Path) -> Mapping[str, Any]:
    from scipy.io import loadmat  # takes a while, and few need it

    return {name: value for name, value in loadmat(path).items() if not name.startswith("__")}
