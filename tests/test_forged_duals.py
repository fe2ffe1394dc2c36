"""Duals, trees of cases and monotone layers in the checker: forged records, exact counterexamples, broken twins.

Networks are written by hand here, in exact arithmetic and as the bytes of a model file, so that nothing of the prover
has to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_forgeries import (
    LEAF,
    STEP,
    TREE,
    Arrays,
    Change,
    Folder,
    Head,
    above_the_least,
    edit_model,
    edited,
    pack,
    rewrite,
    unpack,
)

from verideq import checker as package
from verideq.checker import Checker, Rejected, check, claim, dual, files, layers, proof, quadratic
from verideq.checker import Checker as Program
from verideq.checker.arithmetic import Arithmetic, Exact, Float, Interval, guarded
from verideq.testing.exact import convolution_matrix, equilibrium, relu

FLOAT, EXACT = Float(), Exact()
Numbers = np.ndarray
Draw = np.random.Generator


def frac(array: Any) -> Numbers:
    """Numbers as the fractions that they are."""
    return EXACT.exactly(np.asarray(array, dtype=np.float64))


# --- networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """What is true at an input: values by node, what is before and behind each ReLU, the rows of the claim."""

    values: dict[str, Numbers]
    before: dict[str, Numbers]
    states: dict[str, Numbers]
    rows: Numbers


class Net:
    """A network in exact arithmetic, and its files.

    Args:
        shape: of one input.
    """

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.entries: list[dict[str, Any]] = []
        self.arrays: Arrays = {}
        self.why: Arrays = {}
        self.states: dict[str, tuple[int, ...]] = {"input": shape}
        self.rules: dict[str, Callable[[dict[str, Numbers]], Numbers]] = {}
        self.fusions: dict[str, Numbers] = {}
        self.own: dict[str, Numbers] = {}

    def node(self, name: str, kind: str, inputs: Sequence[str], attributes: Head, **tensors: Any) -> None:
        """An entry of the model file."""
        self.entries.append({
            "name": name, "operation": kind, "inputs": list(inputs), "attributes": attributes,
            "tensors": [key.replace("_", ".") for key in tensors],
        })  # fmt: skip
        for key, value in tensors.items():
            self.arrays[f"{name}/{key.replace('_', '.')}"] = np.asarray(value, dtype=np.float64)

    def linear(self, name: str, source: str, W: Any, b: Any = None) -> Net:
        W, tensors = np.asarray(W, dtype=np.float64), {} if b is None else {"bias": b}
        self.node(name, "linear", [source], described(W), weight=W, **tensors)
        exact, shift = frac(W), frac(np.zeros(len(W)) if b is None else b)
        self.rules[name], self.states[name] = lambda v: exact @ v[source] + shift, (len(W),)
        return self

    def conv(self, name: str, source: str, weight: Any, padding: int, mode: str = "zeros") -> Net:
        weight, shape = np.asarray(weight, dtype=np.float64), self.states[source]
        self.node(name, "conv2d", [source], convolution(weight, padding, mode), weight=weight)
        matrix = convolution_matrix(frac(weight), shape, (padding,) * 4, mode=mode)
        self.rules[name] = lambda v: np.tensordot(matrix, v[source], axes=3)
        self.states[name] = matrix.shape[:3]
        return self

    def relu(self, name: str, source: str) -> Net:
        self.node(name, "relu", [source], {})
        self.rules[name], self.states[name] = lambda v: relu(v[source]), self.states[source]
        return self

    def sum(self, name: str, first: str, second: str) -> Net:
        self.node(name, "add", [first, second], {})
        self.rules[name], self.states[name] = lambda v: v[first] + v[second], self.states[first]
        return self

    def flat(self, name: str, source: str) -> Net:
        self.node(name, "flatten", [source], {})
        self.rules[name], self.states[name] = lambda v: v[source].reshape(-1), (int(np.prod(self.states[source])),)
        return self

    def fused(self, name: str, source: str, W: Any, **why: Any) -> Net:
        """An equilibrium of a matrix, with ``gauge``, or ``m`` and perhaps ``L``."""
        W = np.asarray(W, dtype=np.float64)
        self.own[name] = frac(np.diag(W))
        return self._equilibrium(name, source, frac(W), linear_fusion(W), why, fusion_weight=W)

    def fused_conv(self, name: str, source: str, weight: Any, mode: str, gauge: Any) -> Net:
        """An equilibrium of a convolution that keeps its image."""
        weight = np.asarray(weight, dtype=np.float64)
        padding, shape = weight.shape[2] // 2, self.states[source]
        units = int(np.prod(shape))
        W = convolution_matrix(frac(weight), shape, (padding,) * 4, mode=mode).reshape(units, units)
        fusion = {"operation": "conv2d", "attributes": convolution(weight, padding, mode)}
        taps = weight[np.arange(len(weight)), np.arange(len(weight)), padding, padding]
        self.own[name] = frac(np.broadcast_to(taps[:, None, None], shape)).reshape(-1)
        return self._equilibrium(name, source, W, fusion, {"gauge": gauge}, fusion_weight=weight)

    def mondeq(self, name: str, source: str, A: Any, B: Any, m: float, mode: str = "", **why: Any) -> Net:
        """An equilibrium of ``(1 - m) I - AᵀA + B - Bᵀ``; of convolutions with this padding mode, if there is one."""
        A, B = (np.asarray(factor, dtype=np.float64) for factor in (A, B))
        units, shape = int(np.prod(self.states[source])), self.states[source]
        inside, padding = described(B), A.shape[-1] // 2
        first, second = frac(A), frac(B)
        if mode:
            inside = convolution(A, padding, mode)
            first, second = (
                convolution_matrix(factor, shape, (padding,) * 4, mode=mode).reshape(-1, units)
                for factor in (first, second)
            )
        W = frac(np.eye(units)) * (1 - Fraction(m)) - first.T @ first + second - second.T
        self.own[name] = frac(np.zeros(units)) if mode else np.diag(W)
        fusion = {"operation": "mondeq", "attributes": {
            "m": m, "operation": "conv2d" if mode else "linear", "attributes": inside,
        }}  # fmt: skip
        return self._equilibrium(name, source, W, fusion, why, fusion_A=A, fusion_B=B)

    def _equilibrium(self, name: str, source: str, W: Numbers, fusion: Head, why: Arrays, **tensors: Any) -> Net:
        self.node(name, "equilibrium", [source], {"activation": "relu", "fusion": fusion}, **tensors)
        self.why |= {f"{kind}/{name}": np.asarray(value, dtype=np.float64) for kind, value in why.items()}
        self.fusions[name], self.states[name] = W, self.states[source]
        return self

    @property
    def relaxed(self) -> list[str]:
        """The names of ReLUs and equilibria."""
        return [entry["name"] for entry in self.entries if entry["operation"] in ("relu", "equilibrium")]

    def model(self) -> bytes:
        return pack({"format": 1, "nodes": self.entries, "pixel_range": None}, self.arrays)

    def certificate(self) -> bytes:
        return pack({"version": 1, "model": files.model_hash(files.parse_blob(self.model()))}, self.why)

    def run(self, x: Numbers, drifts: Mapping[str, Numbers] | None = None) -> Point:
        """What is true at an input where equilibria drift so far."""
        values, before, states = {"input": x}, {"input": x}, {}
        for entry in self.entries:
            name, source = entry["name"], entry["inputs"][0]
            v = values[source]
            if name in self.fusions:
                W, own = self.fusions[name], self.own[name]
                z = equilibrium(W, v.reshape(-1))
                # Every row solved for its own unknown.
                before[name] = ((W @ z + v.reshape(-1) - own * z) / (1 - own)).reshape(v.shape)
                assert (relu(before[name]).reshape(-1) == z).all()
                states[name] = z.reshape(v.shape)
                values[name] = states[name] + (drifts[name] if drifts else 0)
            else:
                values[name] = self.rules[name](values)
            if entry["operation"] == "relu":
                before[name], states[name] = v, values[name]
        return Point(values, before, states, values[self.entries[-1]["name"]])


def described(W: Numbers) -> Head:
    return {"in_features": W.shape[1], "out_features": W.shape[0]}


def linear_fusion(W: Numbers) -> Head:
    return {"operation": "linear", "attributes": described(W)}


def convolution(weight: Numbers, padding: int, mode: str) -> Head:
    return {
        "in_channels": weight.shape[1], "out_channels": weight.shape[0], "kernel_size": list(weight.shape[2:]),
        "stride": [1, 1], "padding": [padding, padding], "dilation": [1, 1], "groups": 1, "padding_mode": mode,
    }  # fmt: skip


# --- records ----------------------------------------------------------------------------------------------------------


def stepping(node: str | None = None, slopes: str | None = None, iterations: int = 0, empty: bool = False) -> Head:
    return {"node": node, "slopes": slopes, "iterations": iterations, "empty": empty}


def split(node: str, unit: int, below: Head, above: Head, at: str = "0") -> Head:
    return {"node": node, "unit": unit, "at": at, "below": below, "above": above}


def claimed(net: Net, x: Any, C: Any, rhs: Any, arrays: Mapping[str, Any] | None = None, **fields: Any) -> Folder:
    """A claim about a network, and whatever is to prove it."""
    model = net.model()
    head = {
        "version": 1, "model": files.model_hash(files.parse_blob(model)), "index": 0, "label": None, "eps": "0",
        "norm": "linf", "clip": None, "scale": None, "specification": "linear", "margin": "0", "tolerance": "0",
        "refinements": 10, "cases": [[STEP]], "trees": [TREE], **fields,
    }  # fmt: skip
    numbers = {"input": x, "C": C, "rhs": rhs}
    whole = {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()} | dict(arrays or {})
    return Folder(model, net.certificate(), (pack(head, whole),))


def parts(folder: Folder, calc: Arithmetic) -> Iterator[tuple[int, claim.Case, Any, dual.Scene]]:
    """What is proved of every part of the ball, and what is known there; nothing of the parts that are refused."""
    checker = Checker(folder.model, folder.gauges, exact=isinstance(calc, Exact))
    read = claim.read_claim(files.parse_blob(folder.records[0]), checker.hash, checker.pixels, checker.arithmetic)
    for part in read.cases(len(read.linear[0]) if read.linear else None):
        try:
            with guarded():
                run = proof._Proof(checker.arithmetic, checker.nodes, checker.layer, [part])
                margin = run.run()[0].min()
        except Rejected:
            continue
        if margin == margin:
            yield next(k for k, steps in enumerate(read.steps) if steps is part.steps), part, margin, run.scene


@dataclass(frozen=True)
class Sample:
    """A record, the truth at points of its ball, and what the theorem gives for each case, where that is known."""

    folder: Folder
    points: tuple[Point, ...]
    most: tuple[float, ...] = ()

    def wrong(self, calc: Arithmetic) -> list[str]:
        """What is proved and is not so: boxes that a point leaves, margins above it, parts that are not empty."""
        found = []
        for place, part, margin, scene in parts(self.folder, calc):
            if self.most and margin > self.most[place] + 1e-9 * (1 + abs(self.most[place])):
                found.append(f"{float(margin):.6g} is more than {self.most[place]:.6g}")
            for point in self.points:
                if not inside(part, point):
                    continue
                rows = point.rows if part.rows is None else point.rows[list(part.rows)]
                least = 0 if part.steps[-1].empty else min(rows)
                if margin > least and margin != np.inf:
                    found.append(f"{float(margin):.6g} > {float(least):.6g}")
                for name, known in scene.relaxations.items():
                    boxes = (known.pre, point.before[name]), (known.z, point.states[name])
                    found += [f"{name}: {truth}" for box, truth in boxes if not holds(box, truth)]
                found += [name for name, box in scene.values.items() if not holds(box, point.values[name])]
        return found


def holds(box: Interval, truth: Numbers) -> bool:
    """Whether a value lies in the box of the one case."""
    return bool((box[0][0] <= truth).all() and (truth <= box[1][0]).all())


def inside(part: claim.Case, point: Point) -> bool:
    """Whether a point is in the part of the ball that a case is about."""
    for cut in part.splits:
        value = point.before[cut.node].reshape(-1)[cut.unit]
        if not (value >= cut.at if cut.above else value <= cut.at):
            return False
    return True


def sampled(
    net: Net, draw: Draw, x: Numbers, C: Numbers, rhs: Numbers, arrays: Arrays, *, count: int = 6, **fields: Any
) -> Sample:
    """The record with the truth at its centre, at corners, and within."""
    eps, size = Fraction(fields.get("eps", "0")), x.size
    weights = frac(arrays.get("weights", np.ones(x.shape)))
    points = []
    for k in range(count):
        if fields.get("norm") == "l2":  # along an axis, or along 3, 4, 0, ...
            way = np.zeros(size)
            way[draw.integers(size)] = draw.choice([-1.0, 1.0])
            way = frac(way)
            if size > 1 and k % 2:
                way = frac(draw.permutation([3.0, 4.0] + [0.0] * (size - 2)) * draw.choice([-1, 1], size)) / 5
        else:
            way = frac(draw.choice([-1.0, 1.0], size) if k % 3 else draw.integers(-8, 9, size) / 8)
        if k == 0:
            way = frac(np.zeros(size))
        point = frac(x) + way.reshape(x.shape) * weights * eps
        drifts = {
            name: Fraction(fields["tolerance"]) * frac(net.why[f"gauge/{name}"] * draw.choice([-1, 1], W.shape[:1]))
            for name, W in net.fusions.items()
        } if "tolerance" in fields else None  # fmt: skip
        truth = net.run(point, drifts)
        points.append(replace(truth, rows=frac(C) @ truth.rows - frac(rhs)))
    return Sample(claimed(net, x, C, rhs, arrays, **fields), tuple(points))


# --- random networks and proofs ---------------------------------------------------------------------------------------


def whole(draw: Draw, *shape: int, over: int = 8) -> Numbers:
    return draw.integers(-8, 9, shape) / over


def contracting(draw: Draw, units: int) -> tuple[Numbers, Numbers]:
    """A matrix with a gauge, some with rows that only have one when they are solved for themselves."""
    W = whole(draw, units, units, over=10 * units)
    if draw.integers(2):
        W[np.arange(units), np.arange(units)] = draw.choice([-3.0, -1.0, 0.25], units)
    u = 2.0 ** draw.integers(-2, 3, units)
    return W * u[:, None] / u[None, :], u


def deep_net(draw: Draw) -> Net:
    """ReLUs and equilibria one after another, with a sum around some of them."""
    net = Net(2).linear("a", "input", whole(draw, 3, 2), whole(draw, 3)).relu("r", "a")
    W, u = contracting(draw, 3)
    net.fused("e", "r", W, gauge=u).linear("b", "e", whole(draw, 3, 3), whole(draw, 3)).sum("s", "b", "r")
    W, u = contracting(draw, 3)
    return net.fused("f", "s", W, gauge=u).linear("last", "f", whole(draw, 2, 3), whole(draw, 2))


def convolutional_net(draw: Draw) -> Net:
    """An equilibrium of a convolution over images of 2x3."""
    mode = str(draw.choice(["zeros", "circular", "reflect", "replicate"]))
    net = Net(1, 2, 3).conv("a", "input", whole(draw, 2, 1, 3, 3), 1, mode if mode != "reflect" else "zeros")
    weight = whole(draw, 2, 2, 3, 3, over=200)
    weight[0, 0, 1, 1] = -2.0
    if mode == "reflect":
        net = Net(1, 3, 3).conv("a", "input", whole(draw, 2, 1, 3, 3), 1, mode)
    net.fused_conv("e", "a", weight, mode, np.ones(2)).flat("flat", "e")
    return net.linear("last", "flat", whole(draw, 2, net.states["flat"][0]), whole(draw, 2))


def random_proof(net: Net, draw: Draw, rows: int) -> tuple[Arrays, list[list[Head]], list[Head]]:
    """Tightenings and multipliers, recomputed, given or none, under random splits."""
    arrays: Arrays = {}
    cases: list[list[Head]] = []

    def multipliers(prefix: str, count: int, upto: str | None) -> None:
        names = net.relaxed[: net.relaxed.index(upto) + 1] if upto else net.relaxed
        for name in names:
            if draw.random() < 0.8:
                size = draw.choice([0.25, 1.0, 4.0])
                arrays[f"{prefix}/g/{name}"] = whole(draw, count, *net.states[name]) * size

    def bounding(prefix: str, count: int, node: str | None) -> Head:
        if node is not None:
            size = int(np.prod(net.states[node]))
            arrays[f"{prefix}/units"] = draw.integers(-size, size, count)
        if draw.random() < 0.6:
            return stepping(node, str(draw.choice(["adaptive", "zero", "one"])), int(draw.integers(8)))
        empty = node is None and draw.random() < 0.2
        multipliers(prefix, 1 if empty else count, node)
        return stepping(node, empty=empty)

    def leaf(depth: int) -> Head:
        place, nodes = len(cases), [name for name in net.relaxed if draw.random() < 0.5]
        cases.append([])
        for k, node in enumerate([*nodes, None]):
            cases[place].append(bounding(f"case/{place}/{k}", rows if node is None else 3, node))
        return {"case": place}

    def tree(depth: int) -> Head:
        if depth == 0:
            return leaf(depth)
        node = str(draw.choice([*net.relaxed, "input"]))
        at = "1/2" if node == "input" else "0"
        return split(node, int(draw.integers(np.prod(net.states[node]))), tree(depth - 1), tree(depth - 1), at)

    trees = [{"rows": None, "tree": tree(int(draw.integers(3)))}]
    return arrays, cases, trees


def dual_sample(seed: int) -> Sample:
    draw = np.random.default_rng(seed)
    net = convolutional_net(draw) if seed % 5 == 4 else deep_net(draw)
    arrays, cases, trees = random_proof(net, draw, 2)
    fields: dict[str, Any] = {"cases": cases, "trees": trees}
    fields["eps"] = str(draw.choice(["0", "1/64", "1/4"]))
    if seed % 5 == 1:
        fields["norm"] = "l2"
        if seed % 2:
            arrays["weights"] = draw.choice([0.0, 0.5, 2.0], net.shape)
    if seed % 5 == 2:
        fields["tolerance"] = str(draw.choice(["1/8", "1/100"]))
    x, C, rhs = draw.integers(0, 9, net.shape) / 8, whole(draw, 2, 2), whole(draw, 2)
    return sampled(net, draw, x, C, rhs, arrays, **fields)


# --- the quadratic dual -----------------------------------------------------------------------------------------------


def monotone_net(draw: Draw, kind: str) -> Net:
    """An equilibrium without a gauge between affine maps: of a matrix, or of factors."""
    units, m = int(draw.choice([1, 1, 2, 3, 4])), float(draw.choice([0.3, 1.0, 3.0]))
    A, B = whole(draw, units, units), whole(draw, units, units, over=2)
    net = Net(2)
    if kind == "conv":
        net = Net(1, 1, 3).conv("a", "input", whole(draw, 1, 1, 3, 3), 1, "circular" if draw.integers(2) else "zeros")
        kernels = whole(draw, 1, 1, 3, 3), whole(draw, 1, 1, 3, 3, over=4)
        net.mondeq("e", "a", *kernels, m, mode=str(draw.choice(["circular", "zeros"]))).flat("flat", "e")
        return net.linear("last", "flat", whole(draw, 2, 3), whole(draw, 2))
    net.linear("a", "input", whole(draw, units, 2), whole(draw, units))
    if kind == "factored":
        net.mondeq("e", "a", A, B, m)
    else:
        W = (1 - m) * np.eye(units) - A.T @ A + B - B.T
        # A little less than what the matrix was made for, and its own factor in every other case.
        why: Arrays = {"m": m * (1 - 2.0**-12)}
        if draw.integers(2):
            rest = np.eye(units) - (W + W.T) / 2
            why["L"] = np.linalg.cholesky(rest - m * (1 - 2.0**-14) * np.eye(units))
        net.fused("e", "a", W, **why)
    return net.linear("last", "e", whole(draw, 2, units), whole(draw, 2))


@dataclass(frozen=True)
class Affine:
    """What stands around the one equilibrium, in floats: ``p = W z + U x + b``, outputs ``V z + d``."""

    W: Numbers
    U: Numbers
    b: Numbers
    V: Numbers
    d: Numbers


def around(net: Net) -> Affine:
    """By columns."""
    zero, size = frac(np.zeros(net.shape)), int(np.prod(net.shape))
    v = net.rules["a"]
    shift = v({"input": zero}).reshape(-1)
    U = np.stack([v({"input": frac(e.reshape(net.shape))}).reshape(-1) - shift for e in np.eye(size)], 1)
    last = net.arrays["last/weight"], net.arrays["last/bias"]
    return Affine(net.fusions["e"].astype(float), U.astype(float), shift.astype(float), *last)


def quadratic_arrays(
    net: Net, draw: Draw, x: Numbers, C: Numbers, prefix: str, *, l2: bool, noise: float = 0.0, off: float = 0.0,
    above: Sequence[int] = (), below: Sequence[int] = (),
) -> Arrays:  # fmt: skip
    """Multipliers that are best at the centre, with noise in them, and a point that is so far off."""
    f = around(net)
    units = len(f.W)
    z = equilibrium(net.fusions["e"], frac(f.U) @ frac(x.reshape(-1)) + frac(f.b)).astype(float)
    z[list(below)] = 0.0
    rest, p = np.eye(units) - f.W, f.W @ z + f.U @ x.reshape(-1) + f.b
    found: dict[str, list[Any]] = {name: [] for name in ("lambda", "nu", "tau", "s", "z", "eta")}
    kept = np.array([i not in below for i in range(units)])
    for c in C @ f.V:
        on = (z > 0) & kept
        w = np.zeros(units)
        if on.any():
            w[on] = np.linalg.solve(rest.T[np.ix_(on, on)], c[on])
        tau = np.full(units, 1.0 + np.max(np.maximum(-w, 0)[on] / z[on], initial=0.0))
        tau += noise * draw.random(units)
        w = w + noise * whole(draw, units)
        lam = w + tau * z
        positive = np.array([i not in above for i in range(units)])
        lam = np.where(positive, np.maximum(lam, 0), lam)
        w = lam - tau * z
        slope = c - lam + tau * (z - p) + tau * z + f.W.T @ w
        nu = np.maximum(np.where(on, 0.0, slope), 0) + noise * draw.random(units) * draw.integers(2)
        size = np.linalg.norm(np.diag(tau) @ f.U, 2) ** 2
        s = np.full(1 if l2 else f.U.shape[1], 1.0)
        half = (np.diag(tau) @ rest + rest.T @ np.diag(tau)) / 2
        eta = np.linalg.eigvalsh(half[np.ix_(kept, kept)]).min() if kept.any() else 1.0
        s = s * max(size / (2 * max(eta, 1e-3)), 1e-3) * (1 + noise)
        Q = half - (np.diag(tau) @ f.U / s) @ (np.diag(tau) @ f.U).T / 4
        eta = np.linalg.eigvalsh(Q[np.ix_(kept, kept)]).min() * 0.999 if kept.any() else 1.0
        for name, value in (("lambda", lam), ("nu", nu), ("tau", tau), ("s", s), ("eta", eta)):
            found[name].append(value)
        found["z"].append(np.where(kept, z + off * whole(draw, units), 0.0))
    return {f"{prefix}/q/{name}": np.array(values) for name, values in found.items()}


def quadratic_sample(seed: int) -> Sample:
    draw = np.random.default_rng(1000 + seed)
    net = monotone_net(draw, ("matrix", "factored", "conv")[seed % 3])
    x, C, rhs = draw.integers(0, 9, net.shape) / 8, whole(draw, 2, 2), whole(draw, 2)
    l2, noise, off = bool(draw.integers(2)), float(draw.choice([0.0, 0.0, 0.0, 0.5])), float(draw.integers(2))
    units = int(np.prod(net.states["e"]))
    trees, cases, ways = [TREE], [[STEP]], [{}]
    if draw.integers(2):
        unit = int(draw.integers(units))
        trees = [{"rows": None, "tree": split("e", unit, {"case": 0}, {"case": 1})}]
        cases, ways = [[STEP], [STEP]], [{"below": [unit]}, {"above": [unit]}]
    arrays: Arrays = {}
    for place, way in enumerate(ways):
        arrays |= quadratic_arrays(net, draw, x, C, f"case/{place}/0", l2=l2, noise=noise, off=off, **way)
    eps = str(draw.choice(["0", "1/64", "1/8", "2"]))
    made = sampled(net, draw, x, C, rhs, arrays, norm="l2" if l2 else "linf", eps=eps, cases=cases, trees=trees)
    most = [
        theorem(net, {name: arrays[f"case/{place}/0/q/{name}"] for name in claim.QUADRATIC}, x, Fraction(eps), C, rhs,
                way.get("below", []), l2=l2)
        for place, way in enumerate(ways)
    ]  # fmt: skip
    return replace(made, most=tuple(most))


def theorem(
    net: Net, given: Arrays, x: Numbers, eps: Fraction, C: Numbers, rhs: Numbers, below: Sequence[int], *, l2: bool
) -> float:  # fmt: skip
    """What the quadratic dual gives, from its definition: gradient and curvature are differences of exact values."""
    f, units = around(net), len(net.fusions["e"])
    W, U, b, xc = net.fusions["e"], frac(f.U), frac(f.b), frac(x.reshape(-1))
    unit, kept = frac(np.eye(units)), [i for i in range(units) if i not in below]
    bounds = []
    for k, c in enumerate(frac(C) @ frac(f.V)):
        lam, nu, tau, s = (frac(given[name][k]) for name in ("lambda", "nu", "tau", "s"))

        def least(
            z: Numbers, c: Numbers = c, lam: Numbers = lam, nu: Numbers = nu, tau: Numbers = tau, s: Numbers = s
        ) -> Any:
            away = -(U.T @ (lam - tau * z)) / (2 * s)
            p = W @ z + U @ (xc + away) + b
            room = s[0] * (away @ away - eps**2) if l2 else (s * (away**2 - eps**2)).sum()
            return c @ z + lam @ (p - z) - nu @ z + tau @ (z * (z - p)) + room

        z = frac(given["z"][k])
        value, steps = least(z), [least(z + e) for e in unit]
        gradient = np.array([(steps[i] - least(z - unit[i])) / 2 for i in kept], dtype=float)
        curved = [[least(z + unit[i] + unit[j]) - steps[i] - steps[j] + value for j in kept] for i in kept]
        eta = np.linalg.eigvalsh(np.array(curved, dtype=float) / 2).min() if kept else 1.0
        shift = frac(C)[k] @ frac(f.d) - frac(rhs)[k]
        bounds.append(float(value + shift) - gradient @ gradient / (4 * eta) if eta > 0 else -np.inf)
    return min(bounds)


def monotone_sample(seed: int) -> Sample:
    """The linear dual, or none, over the box around a state of a monotone layer."""
    draw = np.random.default_rng(2000 + seed)
    net = monotone_net(draw, ("matrix", "factored", "conv")[seed % 3])
    x = draw.integers(0, 9, net.shape) / 8
    arrays, cases, trees = random_proof(net, draw, 2)
    near = net.run(frac(x)).states["e"].astype(float) + float(draw.choice([0, 0.01, 1])) * whole(draw, *net.states["e"])
    if draw.integers(3):
        arrays["state/e"] = np.maximum(near, 0)
    C, rhs = whole(draw, 2, 2), whole(draw, 2)
    return sampled(net, draw, x, C, rhs, arrays, eps=str(draw.choice(["0", "1/64"])), cases=cases, trees=trees)


SAMPLES: dict[str, tuple[Callable[[int], Sample], int]] = {
    "dual": (dual_sample, 60), "quadratic": (quadratic_sample, 90), "monotone": (monotone_sample, 45),
}  # fmt: skip


@cache
def samples(kind: str) -> list[Sample]:
    make, count = SAMPLES[kind]
    return [make(seed) for seed in range(count)]


def misled(kind: str, calc: Arithmetic = FLOAT) -> bool:
    """Whether anything is proved that is not so."""
    return any(sample.wrong(calc) for sample in samples(kind))


@pytest.mark.parametrize("calc", [FLOAT, EXACT])
@pytest.mark.parametrize("kind", SAMPLES)
def test_what_is_proved_is_so(kind: str, calc: Arithmetic) -> None:
    proved, some = 0, samples(kind)[:: 1 if calc is FLOAT else 3]
    for sample in some:
        assert sample.wrong(calc) == []
        proved += sum(bool(abs(margin) < 1e4) for _, _, margin, _ in parts(sample.folder, calc))
    assert proved >= 0.7 * len(some)


# --- valid records ----------------------------------------------------------------------------------------------------


def provable(net: Net, x: Any, rows: int, arrays: Arrays, C: Any = None, room: float = 1 / 16, **fields: Any) -> Folder:
    """A claim of these rows, or of random ones, thresholds a little below what is proved."""
    if C is None:
        C = whole(np.random.default_rng(7), rows, net.states[net.entries[-1]["name"]][0])
    found = [margin for _, _, margin, _ in parts(claimed(net, x, C, np.zeros(rows), arrays, **fields), FLOAT)]
    assert len(found) == len(fields["cases"])
    return claimed(net, x, C, np.full(rows, float(min(found)) - room), arrays, **fields)


def switch() -> Net:
    """``relu(x - 1/2) + relu(1/4 - x)``: one of them is zero."""
    net = Net(1).linear("a", "input", [[1.0], [-1.0]], [-0.5, 0.25]).relu("r", "a")
    return net.linear("last", "r", [[1.0, 1.0]], [0.0])


def switched() -> Folder:
    """It is at most 1/2, which no interval shows: halves of both units, and no input is in two of them."""
    tree = split("r", 0, {"case": 0}, split("r", 1, {"case": 1}, {"case": 2}))
    return claimed(
        switch(), [0.5], [[-1.0]], [-0.625], {"case/2/0/g/r": np.array([[-1.0, -1.0]])}, eps="1/2",
        cases=[[STEP], [STEP], [stepping(empty=True)]], trees=[{"rows": None, "tree": tree}],
    )  # fmt: skip


def by_rows() -> Folder:
    """Two rows with a tree each."""
    trees = [{"rows": [0], "tree": LEAF}, {"rows": [1], "tree": {"case": 1}}]
    return claimed(
        switch(), [0.5], [[-1.0], [-1.0]], [-2.0, -3.0], eps="1/2", cases=[[STEP], [STEP]], trees=trees
    )  # fmt: skip


def deep() -> Folder:
    """Tightenings and multipliers in a network of three nodes that are relaxed."""
    draw = np.random.default_rng(3)
    net, prefix = deep_net(draw), "case/0"
    arrays: Arrays = {
        f"{prefix}/0/units": np.array([0, -1]), f"{prefix}/0/g/r": whole(draw, 2, 3),
        f"{prefix}/1/units": np.array([0, 2, -1, -3]),
    }  # fmt: skip
    fields: dict[str, Any] = {"eps": "1/8", "tolerance": "1/1000"}
    cases = [[stepping("r"), stepping("e", "adaptive", 5), stepping(slopes="adaptive", iterations=50)]]
    found = recomputed(provable(net, [0.5, 0.25], 2, arrays, cases=cases, **fields))
    arrays |= {f"{prefix}/2/g/{name}": g for name, g in found.items()}
    arrays[f"{prefix}/2/g/e"] = arrays[f"{prefix}/2/g/e"].astype(np.float32)
    cases = [[*cases[0][:2], STEP]]
    return provable(net, [0.5, 0.25], 2, arrays, room=2.0**-12, cases=cases, **fields)


def recomputed(folder: Folder) -> Arrays:
    """The multipliers that the checker makes for the rows of the claim, by node."""
    found: Arrays = {}
    rule = dual.multipliers

    def kept(calc: Arithmetic, known: dual.Relaxation, q: Interval, step: claim.Bounding) -> Numbers:
        g = rule(calc, known, q, step)
        if step.node is None:
            found["r" if known.layer is None else known.layer.name] = g
        return g

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual, "multipliers", kept)
        list(parts(folder, FLOAT))
    return found


def rotation() -> Net:
    """A monotone layer that no gauge fits; its first unit is about to change at (3/8, 1/8)."""
    net = Net(2).linear("a", "input", np.eye(2), [-2.375, 0.875])
    net.fused("e", "a", [[-0.5, 3.0], [-3.0, -0.5]], m=1.5 * (1 - 2.0**-12))
    return net.linear("last", "e", [[1.0, -1.0], [0.5, 1.0]], [0.25, 0.0])


def bent(norm: str = "linf") -> Folder:
    """The quadratic dual, with both halves of a unit."""
    net, x, draw = rotation(), np.array([0.375, 0.125]), np.random.default_rng(0)
    C = whole(np.random.default_rng(7), 2, 2)
    arrays: Arrays = {}
    for place, way in enumerate(("below", "above")):
        fixed: Any = {way: [0]}
        arrays |= quadratic_arrays(net, draw, x, C, f"case/{place}/0", l2=norm == "l2", **fixed)
    trees = [{"rows": None, "tree": split("e", 0, {"case": 0}, {"case": 1})}]
    return provable(net, x, 2, arrays, norm=norm, eps="1/64", cases=[[STEP], [STEP]], trees=trees)


def boxed() -> Folder:
    """A monotone layer with an approximate equilibrium."""
    net, x = rotation(), [0.375, 0.125]
    state = net.run(frac(x)).states["e"].astype(float) + 2.0**-10
    cases = [[stepping(slopes="adaptive", iterations=3)]]
    # The first row falls with the first unit, which only the state says to be small.
    return provable(net, x, 2, {"state/e": state}, C=[[-1.0, 0.0], [0.5, 0.5]], eps="1/64", cases=cases)


def factors(mode: str = "") -> Net:
    """The same of factors, or of convolutions."""
    draw = np.random.default_rng(5)
    if not mode:
        net = Net(2).linear("a", "input", whole(draw, 3, 2), whole(draw, 3))
        net.mondeq("e", "a", whole(draw, 2, 3), whole(draw, 3, 3), 0.5)
        return net.linear("last", "e", whole(draw, 2, 3), whole(draw, 2))
    net = Net(1, 3, 3).conv("a", "input", whole(draw, 1, 1, 3, 3), 1)
    net.mondeq("e", "a", whole(draw, 1, 1, 3, 3), whole(draw, 1, 1, 3, 3), 0.5, mode=mode).flat("flat", "e")
    return net.linear("last", "flat", whole(draw, 2, 9), whole(draw, 2))


def drifting() -> Folder:
    """A deployed solver that stops early: ``z`` is 1, and what is handed on is within 1/8 of it."""
    net = Net(1).linear("a", "input", [[0.0]], [1.0]).fused("e", "a", [[0.0]], gauge=[1.0])
    net.linear("last", "e", [[1.0]], [0.0])
    return claimed(net, [0.5], [[1.0]], [0.75], tolerance="1/8")


BASES: dict[str, Callable[[], Folder]] = {
    "switch": switched, "rows": by_rows, "deep": deep, "bent": bent, "bent l2": lambda: bent("l2"), "box": boxed,
    "factors": lambda: provable(factors(), [0.5, 0.5], 2, {}, eps="1/64", cases=[[STEP]]),
    "convolutions": lambda: provable(factors("circular"), np.full((1, 3, 3), 0.5), 2, {}, eps="1/64", cases=[[STEP]]),
    "drift": drifting,
}  # fmt: skip


@cache
def base(name: str) -> Folder:
    return BASES[name]()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_what_is_forged_here_was_valid(name: str, exact: bool) -> None:
    assert base(name).accepted(exact=exact)


# --- forged records ---------------------------------------------------------------------------------------------------


def tree_of(tree: Any, *more: Head) -> Change:
    return lambda head, arrays: head.update(trees=[{"rows": None, "tree": tree}, *more])


def array(name: str, value: Any) -> Change:
    return lambda head, arrays: arrays.update({name: value})


def changed(name: str, change: Callable[[Numbers], Any]) -> Change:
    return lambda head, arrays: arrays.update({name: change(arrays[name])})


def step_of(case: int, k: int, **fields: Any) -> Change:
    return lambda head, arrays: head["cases"][case][k].update(fields)


def both(*changes: Change) -> Change:
    def change(head: Head, arrays: Arrays) -> None:
        for one in changes:
            one(head, arrays)

    return change


def dropped(name: str) -> Change:
    return lambda head, arrays: arrays.pop(name)


def put(**fields: Any) -> Change:
    return lambda head, arrays: head.update(fields)


def entry(name: str, place: Any, value: float) -> Change:
    return lambda head, arrays: arrays[name].__setitem__(place, value)


def rows_of(*rows: Any) -> Change:
    return lambda head, arrays: head.update(trees=[{"rows": r, "tree": {"case": k}} for k, r in enumerate(rows)])


G, QUADRATIC = "case/0/2/g/", "case/0/0/q/"
PARTS = sorted(claim.QUADRATIC)
SECOND = split("r", 1, {"case": 1}, {"case": 2})
FORGED: dict[str, tuple[str, Change]] = {
    # trees
    "a missing half": ("switch", tree_of({"node": "r", "unit": 0, "at": "0", "below": {"case": 0}})),
    "one half for the whole": ("switch", both(tree_of({"case": 0}), put(cases=[[STEP]]), dropped("case/2/0/g/r"))),
    "a case for two leaves": ("switch", tree_of(split("r", 0, {"case": 0}, split("r", 1, {"case": 0}, {"case": 2})))),
    "a case of no leaf": ("switch", tree_of(split("r", 0, {"case": 0}, {"case": 1}))),
    "a case too many": ("switch", lambda head, arrays: head["cases"].append([STEP])),
    "a case that is not there": ("switch",
        tree_of(split("r", 0, {"case": 0}, split("r", 1, {"case": 1}, {"case": 3})))),
    "a second tree of the same cases": ("switch", tree_of(split("r", 0, {"case": 0}, SECOND),
        {"rows": [0], "tree": {"case": 0}})),
    "a leaf with more": ("switch", tree_of(split("r", 0, {"case": 0, "x": 1}, SECOND))),
    "another threshold": ("switch", tree_of(split("r", 0, {"case": 0}, SECOND, at="1/8"))),
    "a threshold below": ("switch", tree_of(split("r", 0, {"case": 0}, SECOND, at="-1/8"))),
    "a threshold that is a number": ("switch", tree_of(split("r", 0, {"case": 0}, SECOND, at=0))),
         # type: ignore[arg-type]  # wrong
    "a split of a node that is not there": ("switch", tree_of(split("q", 0, {"case": 0}, SECOND))),
    "a split of a linear node": ("switch", tree_of(split("a", 0, {"case": 0}, SECOND))),
    "a split of no name": ("switch", tree_of(split(0, 0, {"case": 0}, SECOND))),  # type: ignore[arg-type]  # wrong
    "a split of a unit that is not there": ("switch", tree_of(split("r", 2, {"case": 0}, SECOND))),
    "a split of a pixel that is not there": ("switch", tree_of(split("input", 1, {"case": 0}, SECOND))),
    "a split of a negative unit": ("switch", tree_of(split("r", -1, {"case": 0}, SECOND))),
    "a split far outside": ("switch", tree_of(split("input", 0, {"case": 0}, SECOND, at="9"))),
    "a case that is not empty": ("switch",
        both(step_of(0, 0, empty=True), array("case/0/0/g/r", np.full((1, 2), -1.0)))),
    "an empty case without a reason": ("switch", dropped("case/2/0/g/r")),
    "every case said to be empty": ("switch", lambda head,
        arrays: [case[0].update(empty=True) for case in head["cases"]]),
    "an empty case by recomputed slopes": ("switch", both(dropped("case/2/0/g/r"), step_of(2, 0, slopes="one"))),
    "a crossing after a tightening": ("switch", both(
        lambda head, arrays: head["cases"].__setitem__(2, [stepping("r"), STEP]), dropped("case/2/0/g/r"),
        array("case/2/0/g/r", np.array([[0.0, -1.0]])), array("case/2/0/units", np.array([-1])))),
    # rows
    "rows that are not covered": ("rows", rows_of([0], [0])),
    "a row that is not there": ("rows", rows_of([0], [1, 2])),
    "rows twice in a tree": ("rows", rows_of([0, 0], [1])),
    "a row below the first": ("rows", rows_of([0], [1, -1])),
    "one row for all": ("rows", rows_of([1], [1])),
    "all rows and one that is not there": ("rows", rows_of(None, [2])),
    # tightenings and multipliers
    **{f"multipliers of shape {shape}": ("deep", array(G + "e", np.zeros(shape)))
       for shape in ((), (3,), (1, 3), (3, 2), (2, 4), (2, 3, 1), (1, 2, 3), (0, 3))},
    "multipliers of another node's shape": ("switch", array("case/2/0/g/r", np.ones((1, 3)))),
    **{f"multipliers with {value}": ("deep", entry(G + "f", (0, 0), value)) for value in (np.nan, np.inf, -np.inf)},
    "multipliers of whole numbers": ("deep", array(G + "r", np.ones((2, 3), np.int64))),
    "multipliers of bytes": ("deep", array(G + "r", np.ones((2, 3), np.uint8))),
    "multipliers of a linear node": ("deep", array(G + "b", np.zeros((2, 3)))),
    "multipliers of a sum": ("deep", array(G + "s", np.zeros((2, 3)))),
    "multipliers of the input": ("deep", array(G + "input", np.zeros((2, 2)))),
    "multipliers of no node": ("deep", array(G + "x", np.zeros((2, 3)))),
    "multipliers of a node behind": ("deep", array("case/0/0/g/e", np.zeros((2, 3)))),
    "multipliers of a node far behind": ("deep", array("case/0/1/g/f", np.zeros((4, 3)))),
    "multipliers of a case that is not there": ("deep", array("case/1/0/g/r", np.zeros((2, 3)))),
    "multipliers of a step that is not there": ("deep", array("case/0/3/g/r", np.zeros((2, 3)))),
    "an array without a meaning": ("deep", array("case/0/2/h", np.zeros(2))),
    "wild multipliers": ("deep", changed(G + "f", lambda g: g + 1e6)),
    **{f"units {units}": ("deep", array("case/0/1/units", np.array(units)))
       for units in ([3], [-4], [2**63 - 1], [-(2**63)], [[0]], [0.0])},
    "no units": ("deep", dropped("case/0/1/units")),
    "units of no number": ("deep", array("case/0/1/units", np.zeros(0, np.int64))),
    "units of bytes": ("deep", array("case/0/1/units", np.zeros(1, np.uint8))),
    "units of the rows": ("deep", array("case/0/2/units", np.array([0, 1]))),
    **{f"slopes {slopes!r}": ("deep", step_of(0, 1, slopes=slopes)) for slopes in ("best", "", 0, True, ["one"], {})},
    **{f"iterations {count!r}": ("deep", step_of(0, 1, iterations=count)) for count in (501, -1, 1.5, "1", None, True)},
    **{f"a tightening of {node!r}": ("deep", step_of(0, 1, node=node)) for node in (None, "b", "s", "input", "x", 1)},
    "a tightening at the end": ("deep", lambda head, arrays: head["cases"][0].pop()),
    "an empty tightening": ("deep", step_of(0, 1, empty=True)),
    "too many steps": ("deep", lambda head, arrays: head["cases"].__setitem__(0, head["cases"][0] * 200)),
    # a deployed solver that stops early
    "a negative tolerance": ("deep", put(tolerance="-1/1000")),
    "a tolerance that costs the margin": ("deep", put(tolerance="1/2")),
    "a tolerance that the truth does not allow": ("drift", put(tolerance="1/3")),
    "a tolerance without a gauge": ("box", put(tolerance="1/1000000000")),
    "a tolerance of the quadratic dual": ("bent", put(tolerance="1/1000000000")),
    # the quadratic dual
    **{f"{name} of another shape": ("bent", changed(QUADRATIC + name, lambda a: a[:1])) for name in PARTS},
    **{f"{name} with an axis more": ("bent", changed(QUADRATIC + name, lambda a: a[None])) for name in PARTS},
    **{f"no {name}": ("bent", dropped(QUADRATIC + name)) for name in PARTS},
    **{f"{name} with NaN": ("bent", changed(QUADRATIC + name, lambda a: a * np.nan)) for name in PARTS},
    **{f"whole numbers for {name}": ("bent", changed(QUADRATIC + name, lambda a: a.astype(np.int64)))
       for name in PARTS},
    "one more array": ("bent", array(QUADRATIC + "mu", np.zeros((2, 2)))),
    "a negative lambda": ("bent", entry(QUADRATIC + "lambda", (0, 1), -1.0)),
    "a negative lambda of a unit that is off": ("bent", entry(QUADRATIC + "lambda", (0, 0), -1.0)),
    "a negative lambda beside the split": ("bent", entry("case/1/0/q/lambda", (0, 1), -1.0)),
    "a negative nu": ("bent", entry(QUADRATIC + "nu", (0, 0), -1.0)),
    "a negative nu of a unit that is on": ("bent", entry("case/1/0/q/nu", (0, 0), -1.0)),
    "s zero": ("bent", entry(QUADRATIC + "s", (0, 0), 0.0)),
    "s negative": ("bent", changed(QUADRATIC + "s", lambda s: -s)),
    "s negative for l2": ("bent l2", changed(QUADRATIC + "s", lambda s: -s)),
    "s by pixel for l2": ("bent l2", changed(QUADRATIC + "s", lambda s: s.repeat(2, 1))),
    **{f"eta times {factor}": ("bent", changed(QUADRATIC + "eta", lambda a, f=factor: a * f))
       for factor in (0, -1, 1.1, 2, 1e9, 1e300)},
    "tau negative": ("bent", changed(QUADRATIC + "tau", lambda a: -a)),
    "tau zero": ("bent", changed(QUADRATIC + "tau", lambda a: 0 * a)),
    "a point that is on where the unit is off": ("bent", entry(QUADRATIC + "z", (0, 0), 2.0**-10)),
    "a point far away": ("bent", changed("case/1/0/q/z", lambda z: z + 1000.0)),
    "a quadratic dual in a tightening": ("bent", both(
        lambda head, arrays: head["cases"].__setitem__(0, [stepping("e"), STEP]),
        array("case/0/0/units", np.zeros(1, int)))),
    "weights in an l2 ball": ("bent l2", array("weights", np.ones(2))),
    "a quadratic dual of a larger ball": ("bent", put(eps="1/2")),
    "a quadratic dual of another ball": ("bent l2", put(norm="linf")),
    # the box of a monotone layer
    "a state of another shape": ("box", changed("state/e", lambda z: z[:1])),
    "a state with an axis more": ("box", changed("state/e", lambda z: z[None])),
    "a negative state": ("box", changed("state/e", lambda z: -z)),
    "a state with a negative zero unit": ("box", entry("state/e", 0, -5e-324)),
    "a state in float32": ("box", changed("state/e", lambda z: z.astype(np.float32))),
    "a state with NaN": ("box", changed("state/e", lambda z: z * np.nan)),
    "a state far away": ("box", changed("state/e", lambda z: z + 1000.0)),
    "a state of a linear node": ("box", lambda head, arrays: arrays.update({"state/a": arrays.pop("state/e")})),
    "a state of no node": ("box", lambda head, arrays: arrays.update({"state/x": arrays["state/e"]})),
    "a box that is not mapped into itself": ("box", both(
        array("box/e/lower", np.array([2.0, 2.0])), array("box/e/upper", np.array([3.0, 3.0])))),
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", FORGED)
def test_a_forged_dual_is_refused(name: str, exact: bool) -> None:
    assert not accepts(name, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_other_words_for_what_is_so(exact: bool) -> None:
    def free(head: Head, arrays: Arrays) -> None:  # where the unit is on, its lambda may have any sign
        arrays["case/1/0/q/lambda"][:, 0] -= 2.0**-4

    # Multipliers that are not needed; halves of an input; rows in another order; a tolerance that the truth allows.
    other: list[tuple[str, Change]] = [
        ("bent", free),
        ("bent", tree_of(split("input", 0, {"case": 0}, {"case": 1}, at="3/8"))),
        ("switch", array("case/0/0/g/r", np.zeros((1, 2)))),
        ("switch", both(
            tree_of(split("input", 0, split("r", 0, {"case": 0}, SECOND), {"case": 3}, at="3/4")),
            lambda head, arrays: head.update(cases=[*head["cases"], [STEP]]),
        )),
        ("rows", rows_of([1], [0])),
        ("rows", rows_of(None, [1])),
        ("drift", put(tolerance="6/25")),
        ("deep", step_of(0, 2, iterations=7)),
    ]  # fmt: skip
    for name, change in other:
        assert edited(base(name), change).accepted(exact=exact), name


def test_the_order_of_tightenings_of_different_nodes_does_not_matter() -> None:
    def swapped(head: Head, arrays: Arrays) -> None:
        first, second, last = head["cases"][0]
        head["cases"] = [[second, first, last]]
        for name in ("units", "g/r"):
            arrays[f"case/0/x/{name}"] = arrays.pop(f"case/0/0/{name}")
        arrays["case/0/0/units"] = arrays.pop("case/0/1/units")
        for name in ("units", "g/r"):
            arrays[f"case/0/1/{name}"] = arrays.pop(f"case/0/x/{name}")

    folders = base("deep"), edited(base("deep"), swapped)
    first, second = (Checker(f.model, f.gauges).decide(list(f.records)) for f in folders)
    assert first == second and first[0][0]


def test_a_negative_multiplier_of_a_unit_that_is_off_proves_nothing() -> None:
    for g in (-1.0, -1e6):
        assert not off(g).accepted() and not off(g).accepted(exact=True)


def off(g: float) -> Folder:
    """The false claim that ``-relu(x - 2) > 0`` on [0, 1], with the multiplier of an equality."""
    net = Net(1).linear("a", "input", [[1.0]], [-2.0]).relu("r", "a").linear("last", "r", [[1.0]], [0.0])
    return claimed(net, [0.5], [[-1.0]], [-0.0], {"case/0/0/g/r": np.array([[g]])}, eps="1/2")


# --- forged models and model certificates -----------------------------------------------------------------------------


def about(name: str, value: Any) -> Change:
    return lambda head, arrays: arrays.update({name: np.asarray(value)})


WHY: dict[str, tuple[str, Change]] = {
    "nothing": ("box", lambda head, arrays: arrays.clear()),
    "an m that is too large": ("box", about("m/e", 1.5 + 2.0**-20)),
    "an m that is far too large": ("box", about("m/e", 1e300)),
    "an m of zero": ("box", about("m/e", 0.0)),
    "a negative m": ("box", about("m/e", -1.0)),
    "an m of two numbers": ("box", about("m/e", np.ones(2))),
    "an m of no number": ("box", about("m/e", np.zeros(0))),
    "an m in float32": ("box", about("m/e", np.ones(1, np.float32))),
    "an m that is NaN": ("box", about("m/e", np.nan)),
    "an m of another node": ("box", lambda head, arrays: arrays.update({"m/a": arrays.pop("m/e")})),
    "a factor alone": ("box", lambda head, arrays: (arrays.pop("m/e"), arrays.update({"L/e": np.eye(2)}))),
    "a gauge that is none": ("box", lambda head, arrays: (arrays.pop("m/e"), arrays.update({"gauge/e": np.ones(2)}))),
    "a gauge that is none beside an m": ("box", about("gauge/e", np.ones(2))),
    "a factor of zero": ("box", both(about("m/e", 1.51), about("L/e", np.zeros((2, 2))))),
    "a factor that is too large": ("box", about("L/e", 2 * np.eye(2))),
    "a factor of another shape": ("box", about("L/e", np.eye(3))),
    "a factor of one row": ("box", about("L/e", np.zeros((1, 2)))),
    "a factor with NaN": ("box", about("L/e", np.full((2, 2), np.nan))),
    "an array without a meaning": ("box", about("A/e", np.eye(2))),
    "a gauge of factored convolutions": ("convolutions", about("gauge/e", np.ones(1))),
    "a gauge of factors that is none": ("factors", about("gauge/e", np.ones(3))),
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", WHY)
def test_a_forged_model_certificate_is_refused(name: str, exact: bool) -> None:
    folder, change = WHY[name]
    head, arrays = unpack(base(folder).gauges)
    change(head, arrays)
    assert not replace(base(folder), gauges=pack(head, arrays)).accepted(exact=exact)


@pytest.mark.parametrize("exact", [False, True])
def test_other_reasons_why_an_equilibrium_is_unique(exact: bool) -> None:
    for name, change in (
        ("box", about("L/e", np.zeros((2, 2)))),  # the rest is 3/2 of the identity already
        ("box", both(about("m/e", 1.2), about("L/e", 0.5 * np.eye(2)))),
        ("box", about("m/e", [1.4985])),
        ("factors", about("m/e", 9.0)),  # what holds by algebra needs no reason
        ("convolutions", about("L/e", np.eye(2))),
    ):
        head, arrays = unpack(base(name).gauges)
        change(head, arrays)
        assert replace(base(name), gauges=pack(head, arrays)).accepted(exact=exact), change


def fusion(change: Callable[[Head], object]) -> Change:
    return lambda head, arrays: change(head["nodes"][1]["attributes"]["fusion"])


MODELS: dict[str, tuple[str, Change]] = {
    **{f"m = {m!r}": ("factors", fusion(lambda f, m=m: f["attributes"].update(m=m)))  # type: ignore[misc]  # a default
       for m in (0, -1.0, None, "1", [], 10**400, {})},
    "no m": ("factors", fusion(lambda f: f["attributes"].pop("m"))),
    "factors of no operation": ("factors", fusion(lambda f: f["attributes"].pop("operation"))),
    "factors of another operation": ("factors", fusion(lambda f: f["attributes"].update(operation="relu"))),
    "factors that are not described": ("factors", fusion(lambda f: f["attributes"].pop("attributes"))),
    "a fusion without attributes": ("factors", fusion(lambda f: f.pop("attributes"))),
    "a fusion of another operation": ("factors", fusion(lambda f: f.update(operation="lben"))),
    "an A of another width": ("factors", about("e/fusion.A", np.ones((2, 2)))),
    "an A of three axes": ("factors", about("e/fusion.A", np.ones((2, 3, 1)))),
    "a B that is not square": ("factors", about("e/fusion.B", np.ones((2, 3)))),
    "no B": ("factors", lambda head,
        arrays: (arrays.pop("e/fusion.B"), head["nodes"][1]["tensors"].remove("fusion.B"))),
    "a W beside its factors": ("factors", lambda head, arrays: (
        head["nodes"][1]["tensors"].append("fusion.weight"), arrays.update({"e/fusion.weight": np.eye(3)}))),
    "factors of another activation": ("factors", lambda head, arrays: head["nodes"][1]["attributes"].update(
        activation="tanh")),
    **{f"convolutions with {key} = {value!r}": ("convolutions", fusion(
        lambda f, key=key,
        value=value: f["attributes"]["attributes"].update({key: value})))  # type: ignore[misc]  # defaults
       for key, value in (("stride", 2), ("padding", 0), ("padding", 2), ("dilation", 2), ("groups", 2),
                          ("in_channels", 2), ("out_channels", 2), ("kernel_size", 1), ("padding_mode", "wrap"))},
    "a convolution that takes two channels": ("convolutions", lambda head, arrays: (
        fusion(lambda f: f["attributes"]["attributes"].update(in_channels=2))(head, arrays),
        arrays.update({f"e/fusion.{name}": np.ones((1, 2, 3, 3)) for name in "AB"}))),
    "a W that is no square": ("box", about("e/fusion.weight", np.ones((2, 3)))),
    "a W of a convolution": ("box", lambda head, arrays: (
        fusion(lambda f: f.update(operation="conv2d"))(head, arrays),
        arrays.update({"e/fusion.weight": np.ones((2, 2, 1, 1))}))),
}  # fmt: skip


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_forged_fusion_is_refused_even_if_signed(name: str, exact: bool) -> None:
    folder, change = MODELS[name]
    assert edit_model(base(folder), lambda head, arrays: None, sign=True).accepted(exact=exact)
    assert not edit_model(base(folder), change, sign=True).accepted(exact=exact)


def of_images() -> Folder:
    """The false claim that ``z = relu(v / 3)`` exceeds 5/8: a matrix acts on columns, its divisors stand by rows."""
    net = Net(2, 2).fused("e", "input", [[-2.0, 0.0], [0.0, 0.0]], gauge=[1.0, 1.0])
    net.states["e"] = (2, 2)
    net.flat("flat", "e").linear("last", "flat", [[0.0, 0.0, 1.0, 0.0]], [0.0])
    return claimed(net, np.ones((2, 2)), [[1.0]], [0.625])


@pytest.mark.parametrize("exact", [False, True])
def test_a_matrix_that_acts_on_an_image_is_refused(exact: bool) -> None:
    assert of_images().decide(exact=exact)[0][1] == "W of 2 units does not keep the shape (2, 2)"


@pytest.mark.parametrize("exact", [False, True])
def test_convolutions_that_shrink_to_one_pixel_are_refused(exact: bool) -> None:
    # One pixel is broadcast to all: what stands there is a map of states, and not one that is monotone.
    shrunk = fusion(lambda f: f["attributes"]["attributes"].update(padding=[0, 0]))
    (_, reason), = edit_model(base("convolutions"), shrunk, sign=True).decide(exact=exact)  # fmt: skip
    assert reason == "e: W does not keep the shape (1, 3, 3)"


@pytest.mark.parametrize("exact", [False, True])
def test_the_quadratic_dual_takes_a_chain_around_one_equilibrium(exact: bool) -> None:
    draw, x = np.random.default_rng(0), np.array([0.375, 0.125])
    C = whole(np.random.default_rng(7), 1, 2)
    arrays = quadratic_arrays(rotation(), draw, x, C, "case/0/0", l2=False)
    chain = rotation()
    beside = Net(2).linear("a", "input", np.eye(2), [0.0, 0.0]).fused("e", "a", [[0.0, 0.0], [0.0, 0.0]], gauge=[1, 1])
    beside.linear("last", "a", np.eye(2))
    twice = rotation().relu("again", "last")
    assert claimed(chain, x, C, [-9.0], arrays).accepted(exact=exact)
    for net in (beside, twice):
        (_, reason), = claimed(net, x, C, [-9.0], arrays).decide(exact=exact)  # fmt: skip
        assert reason.startswith("the quadratic dual takes a chain")


# --- many at once -----------------------------------------------------------------------------------------------------


def together(kind: str, calc: Arithmetic) -> bool:
    """Whether cases that are worked out together prove what each proves alone, a network of several units and rows."""
    draw = np.random.default_rng(11)
    net = deep_net(draw)
    arrays, cases, trees = {}, [], []
    for place in range(4):
        prefix = f"case/{place}"
        arrays |= {f"{prefix}/0/units": draw.integers(-3, 3, 2), f"{prefix}/0/g/r": whole(draw, 2, 3)}
        arrays |= {f"{prefix}/1/g/{name}": whole(draw, 2, 3) for name in net.relaxed}
        cases.append([stepping("r"), STEP])
    if kind == "recomputed":
        arrays = {name: value for name, value in arrays.items() if "/g/" not in name}
        cases = [[stepping("r", "one", 2), stepping(slopes="adaptive", iterations=3)]] * 4
    halves = (split("input", 1, {"case": k}, {"case": k + 1}, at="1/4") for k in (0, 2))
    tree = split("input", 0, *halves, at="1/2")
    trees = [{"rows": None, "tree": tree}]
    x, C = [0.5, 0.25], whole(draw, 2, 2)
    fields: dict[str, Any] = {"eps": "1/4", "cases": cases, "trees": trees}
    if kind == "l2":
        fields["norm"] = "l2"
        arrays["weights"] = np.array([1.0, 0.5])
    folder = claimed(net, x, C, [0.0, 0.0], arrays, **fields)
    alone = [margin for _, _, margin, _ in parts(folder, calc)]
    checker = Checker(folder.model, folder.gauges, exact=isinstance(calc, Exact))
    read = claim.read_claim(files.parse_blob(folder.records[0]), checker.hash, checker.pixels, checker.arithmetic)
    with guarded():
        found = proof.least_margins(checker.arithmetic, checker.nodes, checker.layer, list(read.cases(2)))
    assert len(alone) == 4 and len(set(alone)) > 1
    return bool(np.allclose(found.astype(float), np.array(alone, dtype=float), rtol=1e-12, atol=1e-300))


@pytest.mark.parametrize("calc", [FLOAT, EXACT])
@pytest.mark.parametrize("kind", ["given", "recomputed", "l2"])
def test_cases_that_are_worked_out_together_are_as_good_as_alone(kind: str, calc: Arithmetic) -> None:
    assert together(kind, calc)


def alike(calc: Arithmetic = FLOAT, numbers: int = quadratic.NUMBERS) -> bool:
    """The same for quadratic duals on parts of a ball, so many numbers at a time."""
    net, draw, x = rotation(), np.random.default_rng(3), np.array([0.375, 0.125])
    arrays: Arrays = {}
    ways: list[dict[str, Sequence[int]]] = [{"below": [0]}, {"above": [0]}]
    for place in range(4):
        arrays |= quadratic_arrays(net, draw, x, whole(draw, 2, 2), f"case/{place}/0", l2=False, **ways[place % 2])
    halves = (split("e", 0, {"case": k}, {"case": k + 1}) for k in (0, 2))
    trees = [{"rows": None, "tree": split("input", 0, *halves, at="3/8")}]
    made = claimed(net, x, whole(draw, 2, 2), [0.0, 0.0], arrays, eps="1/64", cases=[[STEP]] * 4, trees=trees)
    alone = [margin for _, _, margin, _ in parts(made, calc)]
    checker = Checker(made.model, made.gauges, exact=isinstance(calc, Exact))
    read = claim.read_claim(files.parse_blob(made.records[0]), checker.hash, checker.pixels, checker.arithmetic)
    before, quadratic.NUMBERS = quadratic.NUMBERS, numbers
    try:
        with guarded():
            found = proof.least_margins(checker.arithmetic, checker.nodes, checker.layer, list(read.cases(2)))
    except Rejected:
        return False
    finally:
        quadratic.NUMBERS = before
    assert len(set(alone)) == 4
    return bool(np.allclose(found.astype(float), np.array(alone, dtype=float), rtol=1e-12, atol=1e-300))


@pytest.mark.parametrize("calc", [FLOAT, EXACT])
@pytest.mark.parametrize("numbers", [4, quadratic.NUMBERS])
def test_quadratic_duals_that_are_worked_out_together_are_as_good_as_alone(calc: Arithmetic, numbers: int) -> None:
    assert alike(calc, numbers)


# --- pieces, directly -------------------------------------------------------------------------------------------------


def semidefinite(Q: Numbers) -> bool:
    """Whether a symmetric matrix of fractions is, by exact elimination."""
    Q = Q.copy()
    for k in range(len(Q)):
        if Q[k, k] < 0 or (Q[k, k] == 0 and (Q[k, k:] != 0).any()):
            return False
        if Q[k, k] > 0:
            Q[k + 1 :, k + 1 :] = Q[k + 1 :, k + 1 :] - np.outer(Q[k + 1 :, k], Q[k, k + 1 :]) / Q[k, k]
    return True


def overrated() -> bool:
    """Whether a least eigenvalue is taken for more than it is, with whatever factor."""
    for seed in range(60):
        draw = np.random.default_rng(seed)
        size = int(draw.integers(1, 5))
        half = whole(draw, size, size)
        Q = half + half.T + draw.choice([0.0, 4.0]) * np.eye(size)
        L = whole(draw, size, size) if seed % 3 else np.tril(whole(draw, size, size)) * 2.0 ** int(draw.integers(-3, 1))
        wide = np.abs(whole(draw, size, size)) * draw.choice([0.0, 0.0, 0.25])
        wide = (wide + wide.T) / 2
        sign = np.triu(draw.choice([-1.0, 1.0], (size, size)))
        sign = np.triu(sign) + np.triu(sign, 1).T
        for calc in (FLOAT, EXACT):
            interval = calc.exactly(Q - wide), calc.exactly(Q + wide)
            least = layers.least_eigenvalue(calc, interval, calc.exactly(L))
            for member in (Q, Q + wide * sign):
                if not semidefinite(frac(member) - frac(np.eye(size)) * Fraction(least)):
                    return True
    # One side is the identity, the other the matrix of ones, whose least eigenvalue is 0.
    one, nothing = EXACT.exactly(np.ones((2, 2))), EXACT.exactly(np.zeros((2, 2)))
    return bool(layers.least_eigenvalue(EXACT, (frac(np.eye(2)), one), nothing) > 0)


def star(m: float = 0.05) -> bool:
    """Whether a matrix whose symmetric part is indefinite is taken for monotone, its rows being dominant."""
    W = np.zeros((8, 8))
    W[:-1, -1] = 0.9
    W[-1, -1] = 0.89
    calc = EXACT
    node = layers.Node("e", "linear", (), described(W), {"weight": frac(W)})
    rest = frac(np.eye(8)) - (frac(W) + frac(W).T) / 2
    assert not semidefinite(rest)
    try:
        layers.monotone(calc, node, {"m": frac(m), "L": frac(np.zeros((8, 8)))})
    except Rejected:
        return False
    return True


def astray(W: float, state: float, low: float, high: float) -> bool:
    """Whether the box around a state leaves out an equilibrium of ``z = relu(W z + v)``, ``v`` in [low, high]."""
    net = Net(1).fused("e", "input", [[W]], m=(1 - W) * (1 - 2.0**-18))
    checker = Checker(net.model(), net.certificate())
    proved = checker.layer(checker.nodes[0], (1,))
    lo, hi = layers.near(FLOAT, proved, (np.array([[low]]), np.array([[high]])), np.array([[state]]))
    ends = [max(Fraction(v), Fraction(0)) / (1 - Fraction(W)) for v in (low, high)]
    return not (Fraction(lo[0, 0]) <= ends[0] and ends[1] <= Fraction(hi[0, 0]))


@pytest.mark.parametrize("W", [0.5, 0.0, -3.0])
def test_a_state_may_be_anything(W: float) -> None:
    for state in (0.0, 0.25, 1.0, 7.0, 1e6):
        for low, high in ((1.0, 1.0), (-1.0, 1.0), (-2.0, -1.0), (1.0, 3.0), (300.0, 300.0)):
            assert not astray(W, state, low, high)


def test_a_lower_bound_of_the_least_eigenvalue() -> None:
    assert not overrated() and not star()


def test_a_factor_that_is_made_here() -> None:
    Q = np.array([[2.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 2.0]])
    for calc in (FLOAT, EXACT):
        least = layers.least_eigenvalue(calc, (calc.exactly(Q),) * 2, near=0.58)
        assert 0.579 < least <= 2 - 2**0.5
        with pytest.raises(Rejected, match="not as positive as claimed"):
            layers.least_eigenvalue(calc, (calc.exactly(Q),) * 2, near=0.59)


def rounded_in() -> bool:
    """Whether a slope is below its chord, or what a solver hands on may leave its box, by a rounding."""
    draw = np.random.default_rng(0)
    lo, hi = -draw.random((1, 400)), draw.random((1, 400))
    one = np.ones((1, 1))
    known = dual.relax(FLOAT, (lo, hi), (np.zeros_like(hi), hi), (one, one), None, np.full((1, 400), 2.0**-60))
    chord = frac(hi) / (frac(hi) - frac(lo))
    below, above = known.computed(FLOAT)
    drift = Fraction(1, 2**60)
    outside = (frac(below) > -drift) | (frac(above) < frac(hi) + drift)
    return bool((frac(known.slope) < chord).any() or outside.any())


def test_a_slope_is_not_below_its_chord_and_a_drift_is_not_lost() -> None:
    assert not rounded_in()


def too_round(patch: pytest.MonkeyPatch) -> bool:
    """Whether the minimum over a ball is above its value at a point, from whatever tangent."""
    draw = np.random.default_rng(3)

    def anywhere(q: Numbers, *rest: Numbers) -> tuple[Numbers, Numbers]:
        return draw.choice([0.0, 0.25, 1.0, 3.0], len(q)), draw.integers(-16, 17, q.shape) / 8

    patch.setattr(dual, "_tangent", anywhere)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        q, center, weights = whole(rng, 2, 3), whole(rng, 3), rng.choice([0.0, 0.5, 1.0, 2.0], 3)
        record = claimed(
            switch(), center, np.ones((1, 1)), [0.0], {"weights": weights} if seed % 4 else {}, norm="l2", eps="3/4"
        )  # fmt: skip
        weights = weights if seed % 4 else np.ones(3)
        for calc in (FLOAT, EXACT):
            checker = Checker(record.model, record.gauges, exact=calc is EXACT)
            read = claim.read_claim(files.parse_blob(record.records[0]), checker.hash, None, calc)
            box = tuple(np.stack([side] * 2) for side in claim.region(read, calc))
            exact = calc.exactly(q)
            with np.errstate(all="ignore"):
                least = dual.ball(calc, (exact, exact), (box[0], box[1]), [read], 2)
            for way in (*np.eye(3), *-np.eye(3), [0.6, 0.8, 0.0], [0.0, -0.6, 0.8], [-0.8, 0.0, -0.6], [0.0] * 3):
                point = frac(center) + frac(way) * frac(weights) * Fraction(3, 4) * (1 - Fraction(1, 2**40))
                if any(value < Fraction(bound) for value, bound in zip(frac(q) @ point, least, strict=True)):
                    return True
    return False


def test_any_tangent_bounds_a_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not too_round(monkeypatch)


def test_a_ball_of_no_radius() -> None:
    for eps in ("0", "1/2"):
        folder = claimed(switch(), [0.5], [[-1.0]], [-2.0], {"case/0/0/g/r": np.zeros((1, 2))}, norm="l2", eps=eps)
        assert folder.accepted() and folder.accepted(exact=True)


def test_called_by_hand_without_what_is_needed() -> None:
    zero, one = np.zeros((1, 1)), np.ones((1, 1))
    plain = layers.Layer("e", layers.Dense(zero, zero), (one, one))
    with pytest.raises(Rejected, match="e: a box needs a gauge"):
        layers.enclosed(FLOAT, plain, (one, one), None, 0)
    with pytest.raises(Rejected, match="e: it is not monotone"):
        layers.near(FLOAT, plain, (one, one), one)
    read = claim.read_claim(files.parse_blob(drifting().records[0]), Checker(drifting().model, drifting().gauges).hash,
                            None, FLOAT)  # fmt: skip
    case = replace(next(read.cases(1)), claim=replace(read, linear=None))
    with pytest.raises(Rejected, match="neither label nor C"):
        proof.specification(FLOAT, case, 2)
    # A ball that is not empty has a part that is not, so no record comes here.
    assert package._verdict(read, []) == (False, "nothing is claimed of any input", None)


@pytest.mark.parametrize("exact", [False, True])
def test_the_bounds_of_every_row_whatever_is_claimed(exact: bool) -> None:
    def rows(folder: Folder) -> list[Any]:
        return list(Checker(folder.model, folder.gauges, exact=exact).rows(folder.records[0]))

    def margin(folder: Folder) -> float | None:
        ((_, _, proved),) = Checker(folder.model, folder.gauges, exact=exact).decide(list(folder.records))
        return proved

    for name in ("switch", "rows", "deep", "bent"):  # a part that is empty takes nothing from any row
        for claimed_margin in ("0", "9"):
            found = rows(edited(base(name), put(margin=claimed_margin)))
            assert float(min(found)) == margin(base(name)) and len(found) == (1 if name == "switch" else 2)
    for name in ("units [3]", "an empty case without a reason", "a crossing after a tightening", "a negative nu"):
        assert set(rows(forgery(name))) == {-np.inf}
    with pytest.raises(Rejected, match="the blob is shorter"):
        Checker(base("rows").model, base("rows").gauges, exact=exact).rows(b"")


@pytest.mark.parametrize("exact", [False, True])
def test_a_normalisation_of_wrong_shapes_is_refused(exact: bool) -> None:
    for mean, std, accepted in (
        ([0.5], [0.5], True), ([0.5, 0.5], [0.5, 0.5], True), ([0.5], [0.5, 0.5], False),
        ([[0.5]], [[0.5]], False), ([0.5] * 3, [0.5] * 3, False), ([0.5], [0.0], False),
    ):  # fmt: skip
        net = Net(2)
        net.node("n", "normalize", ["input"], {}, mean=mean, std=std)
        net.states["n"] = (2,)
        net.linear("last", "n", np.eye(2), [3.0, 0.0])
        assert claimed(net, [0.5, 0.5], [[1.0, 0.0]], [0.0]).accepted(exact=exact) == accepted


def test_a_record_of_nonsense_in_a_folder(tmp_path: Path) -> None:
    folder = replace(base("rows"), records=(base("rows").records[0], b"nonsense", pack({"label": 1}, {})))
    first, *others = check(folder.write(tmp_path))
    assert first.accepted and first.claim == "sample 0, its C and rhs, linf eps 1/2"
    assert [(other.accepted, other.claim, other.reason != "") for other in others] == [(False, "", True)] * 2


def test_a_margin_that_no_float64_holds() -> None:
    net = Net(1).linear("a", "input", [[1e300]], [0.0]).linear("last", "a", [[1e300]], [0.0])
    folder = claimed(net, [0.5], [[1.0]], [0.0])
    (accepted, _, margin), = Checker(folder.model, folder.gauges, exact=True).decide(list(folder.records))  # fmt: skip
    assert accepted and margin == np.finfo(np.float64).max
    assert not folder.accepted()


# --- broken twins -----------------------------------------------------------------------------------------------------


def tuned(change: Change, *, most: bool = True) -> bool:
    """Whether records changed like this prove what is not so, or more than the theorem gives."""

    def copied(head: Head, arrays: Arrays) -> None:
        for name in [name for name in arrays if name.endswith(("eta", "lambda", "nu", "/z", "/s"))]:
            change({"name": name}, arrays)

    for sample in samples("quadratic"):
        if replace(sample, folder=edited(sample.folder, copied), most=sample.most if most else ()).wrong(FLOAT):
            return True
    return False


def scaled(kind: str, factor: float) -> Change:
    def change(head: Head, arrays: Arrays) -> None:
        if head["name"].endswith(kind):
            arrays[head["name"]] = arrays[head["name"]] * factor

    return change


def accepts(name: str, exact: bool = False) -> bool:
    """Whether a forgery is accepted."""
    return forgery(name).accepted(exact=exact)


def forgery(name: str) -> Folder:
    """A valid record, changed."""
    folder, change = FORGED[name]

    def copied(head: Head, arrays: Arrays) -> None:
        head["cases"] = [[dict(step) for step in case] for case in head["cases"]]
        change(head, arrays)

    return edited(base(folder), copied)


def believes(name: str) -> bool:
    """Whether a forged model certificate is accepted."""
    folder, change = WHY[name]
    head, arrays = unpack(base(folder).gauges)
    change(head, arrays)
    return replace(base(folder), gauges=pack(head, arrays)).accepted(exact=True)


def pooled() -> Folder:
    """The false claim that the larger of two numbers, which may be 3/4, is less than 1/2."""
    net = Net(1, 1, 2)
    net.node("pool", "max_pool2d", ["input"], {"kernel_size": [1, 2]})
    net.flat("flat", "input").states["flat"] = (1,)
    net.entries[-1]["inputs"] = ["pool"]
    net.linear("last", "flat", [[-1.0]], [1.0])
    return claimed(net, np.full((1, 1, 2), 0.5), [[1.0]], [0.5], eps="1/4")


Wrong = Callable[[], bool]
Broken = tuple[Any, str, str, str, Wrong | str]
Scene, Proof = dual.Scene, proof._Proof
TWINS: dict[str, Broken] = {
    # dual
    "no bias": (Scene, "least", "bounds = calc.add(bounds, shift)", "pass", "dual"),
    "no part of a relaxation": (Scene, "least", "bounds = calc.add(bounds, part)", "pass", "dual"),
    "one branch of a sum": (Scene, "least", "calc.add(coefficients[name], q) if name in coefficients else q", "q",
        "dual"),
    "no input": (Scene, "least", 'if "input" in coefficients', "if False", "dual"),
    "multipliers that nothing takes": (Scene, "least", "set(step.multipliers) <= set(self.relaxations)", "True",
        lambda: accepts("multipliers of a linear node")),
    "multipliers that are broadcast": (Scene, "_relaxed", "g.shape[1:] == (rows, *lo.shape[1:])", "True",
        lambda: "multipliers of the shape" not in edited(base("deep"),
        FORGED["multipliers of shape (3, 2)"][1]).decide()[0][1]),
    "an equality of a unit that is off": (Scene, "_relaxed", "np.where(hi <= 0, np.maximum(g, calc.zero), g)", "g",
        "dual"),
    "an equality of a unit that is off, by hand": (Scene, "_relaxed",
        "np.where(hi <= 0, np.maximum(g, calc.zero), g)", "g",
        lambda: off(-1.0).accepted()),
    "no drift": (Scene, "_relaxed", "None if node.name == step.node else known.drift", "None", "dual"),
    "no drift without multipliers": (Scene, "_relaxed", "(-drift, drift)", "(0 * drift, 0 * drift)",
        lambda: accepts("a tolerance that the truth does not allow")),
    "the upper line of a unit that is on": (Scene, "_relaxed", "(g < 0) & known.unstable", "g < 0", "dual"),
    "a charge of the other sign": (Scene, "_relaxed", "calc.subtract(inner(calc, rest, known.z), inner",
        "calc.add(inner(calc, rest, known.z), inner", "dual"),
    "a charge at the other end": (Scene, "_relaxed", "(charged[0], charged[1]), (lo, lo)",
        "(charged[0], charged[1]), (hi, hi)",
        "dual"),
    "no Wᵀ": (Scene, "_relaxed", "rest = calc.add(rest, known.layer.fusion.pull(calc, (g, g)))", "pass", "dual"),
    "W for Wᵀ": (Scene, "_relaxed", "known.layer.fusion.pull", "known.layer.fusion.push", "dual"),
    "no divisor of multipliers": (Scene, "_relaxed", "calc.multiply((g, g), known.divisor)", "(g, g)", "dual"),
    "no drift beside multipliers": (Scene, "_relaxed", "return (g, g), calc.add(bound, away)", "return (g, g), bound",
        "dual"),
    "what was taken is kept": (Scene, "_relaxed", "rest = calc.subtract(q, (on_z[0], on_z[1]))", "rest = q", "dual"),
    "no bound of what is not relaxed": (Scene, "_relaxed",
        "return None, self._ended(node, q, self.values[node.name], rows)",
        "return None, constant(calc, calc.zero, len(q[0]))", lambda: pooled().accepted()),
    "the better of both ends": (Scene, "_over_inputs", "np.maximum(over_box[0], over_ball)",
        "np.maximum(over_box[1], over_ball)",
        "dual"),
    "rows of other cases": (Scene, "_by_row", "np.repeat(x[0], rows, 0)",
        "np.tile(x[0], (rows, *[1] * (x[0].ndim - 1)))",
        lambda: not together("given", FLOAT)),
    "upper ends of other cases": (Scene, "_by_row", "np.repeat(x[1], rows, 0)",
        "np.tile(x[1], (rows, *[1] * (x[1].ndim - 1)))",
        lambda: not together("recomputed", FLOAT)),
    "slopes of other cases": (Scene, "_relaxed", "np.repeat(known.slope, rows, 0)",
        "np.tile(known.slope, (rows, *[1] * (known.slope.ndim - 1)))", lambda: not together("recomputed", FLOAT)),
    "no radius of a ball": (dual, "ball",
        "return calc.subtract(value, calc.multiply((s[:, 0], s[:, 0]), (most, most)))[0]",
        "return value[0]", "ball"),
    "half a radius": (dual, "ball", "radius * radius", "radius * radius / 2", "ball"),
    "a tangent that is level": (dual, "ball", "slope = calc.add(q, inward)", "slope = q", "ball"),
    "a tangent at its own point": (dual, "ball", "beside = calc.subtract(box, (point, point))",
        "beside = (0 * box[0],) * 2", "ball"),
    "a ball without weights": (dual, "ball",
        "off = calc.divide(calc.subtract((point, point), center), (weights, weights))",
        "off = calc.subtract((point, point), center)", "ball"),
    "a slope without weights": (dual, "ball", "calc.divide(off, (weights, weights))", "off", "ball"),
    "half the weights": (dual, "ball", "weights = weights.repeat(rows, 0)", "weights = weights.repeat(rows, 0) / 2",
        "ball"),
    "a slope rounded down": (dual, "relax", "(width, width))[1]", "(width, width))[0]", lambda: rounded_in()),
    "a width rounded up": (dual, "relax", "calc.subtract((top, top), (lo, lo))[0]",
        "calc.subtract((top, top), (lo, lo))[1] * (1 + 1e-15)",
        lambda: rounded_in()),
    "a slope below the chord": (dual, "relax", "np.where(unstable, slope, one), divisor",
        "slope * 0 + one / 4, divisor", "dual"),
    "a box cut too far": (dual, "relax", "np.minimum(z[1], np.maximum(top, calc.zero))",
        "np.minimum(z[1], np.maximum(lo, calc.zero))",
        "dual"),
    "a drift that is handed on to nobody": (dual.Relaxation, "computed",
        "self.z if self.drift is None else calc.add(self.z, (-self.drift, self.drift))", "self.z", "dual"),
    "a drift that is rounded": (dual.Relaxation, "computed", "calc.add(self.z, (-self.drift, self.drift))",
        "(self.z[0] - self.drift, self.z[1] + self.drift)", lambda: rounded_in()),
    # proof
    "halves swapped": (Proof, "_cut", "if split.above", "if not split.above", "dual"),
    "a split of another node": (Proof, "_cut", "if split.node == name", "if True", "dual"),
    "no tolerance": (Proof, "_relu", "drift = calc.multiply((layer.u, layer.u), number(calc, claim.tolerance))[1]",
        "drift = None",
        "dual"),
    "a crossing": (Proof, "_relu", "self.holds & self._ordered(relaxation.pre) & self._ordered(relaxation.z)",
        "self.holds",
        lambda: accepts("a crossing after a tightening")),
    "a crossing of inputs": (Proof, "_forwards", 'self._ordered(values["input"])', "np.ones(len(x[0]), dtype=bool)",
        lambda: far_off().accepted()),
    "a box that does not hold": (Proof, "run", "np.where(self.holds[:, None], ", "np.where(True, ",
        lambda: above_the_least().accepted(exact=True)),
    "upper bounds as lower ones": (Proof, "_tightened", "np.where(below, 1.0, -1.0)", "np.where(below, 1.0, 1.0)",
        "dual"),
    "an upper bound of the other sign": (Proof, "_tightened", "-bounds[~below]", "bounds[~below]", "dual"),
    "no Wᵀ of a tightened row": (Proof, "_tightened", "start[node.name] = known.layer.fusion.pull(calc, (row, row))",
        "pass", "dual"),
    "W for Wᵀ of a tightened row": (Proof, "_tightened", "known.layer.fusion.pull", "known.layer.fusion.push", "dual"),
    "no divisor of a tightened row": (Proof, "_tightened",
        "bounds = calc.divide((bounds, bounds), (divisor[0], divisor[1]))[0]",
        "pass", "dual"),
    "a tightening of other cases": (Proof, "_tightened", "np.arange(count)[:, None], units.shape",
        "0 * np.arange(count)[:, None], units.shape",
        lambda: not together("given", FLOAT)),
    "a tightening beyond the last unit": (Proof, "_tightened", "(units < size).all()", "True",
        lambda: "unit that is not there" not in edited(base("deep"), FORGED["units [3]"][1]).decide()[0][1]),
    "thresholds of the other sign": (Proof, "_specification", "shifts.append(-rhs[chosen])",
        "shifts.append(rhs[chosen])", "dual"),
    "no thresholds": (Proof, "run", "calc.add((bounds, bounds), shift)[0]", "bounds", "dual"),
    "the first row for all": (Proof, "_specification", "list(case.rows)", "[0 for _ in case.rows]",
        lambda: sample_rows()),
    "a split of nothing": (Proof, "_forwards", "{split.node for split in case.splits} <= named | {\"input\"}", "True",
        lambda: edited(base("rows"), split_linear).accepted()),
    "a tightening of nothing": (Proof, "_forwards", "{step.node for step in case.tightenings} <= named", "True",
        lambda: edited(base("deep"),
        both(step_of(0, 1, node="b"), array("case/0/1/units", np.zeros(1, int)))).accepted()),
    "a tolerance of the quadratic dual": (Proof, "_quadratic", " or self.cases[0].claim.tolerance", "",
        lambda: with_gauge("1/100").accepted()),
    "splits of the other half": (Proof, "_quadratic", "fixed[int(split.above), place, split.unit]",
        "fixed[int(not split.above), place, split.unit]",
        "quadratic"),
    "no bias of the outputs": (Proof, "_quadratic", "calc.add((found, found), shift)[0]", "found", "quadratic"),
    "an empty case that may not be": (Program, "_margins", "if not margin > 0", "if False",
        lambda: accepts("an empty case without a reason")),
    # claim
    "a missing half": (claim, "_leaves", "for above in (False, True)", "for above in (False,)",
        lambda: edited(base("switch"), FORGED["a case of no leaf"][1]).accepted() or half().accepted()),
    "rows that nobody proves": (claim.Claim, "cases", "named <= known if whole else rows and named == known", "True",
        lambda: accepts("rows that are not covered")),
    "cases that nobody needs": (claim.Claim, "cases", "sorted(used) == list(range(len(self.steps)))", "True",
        lambda: accepts("a case too many")),
    "a pre-activation at another threshold": (claim, "_leaves", 'at == 0 or tree["node"] == "input"', "True",
        lambda: accepts("a threshold below")),
    "a negative tolerance": (claim, "read_claim", "tolerance >= 0", "True", lambda: accepts("a negative tolerance")),
    "units of the rows": (claim, "_bounding", "(units is None) == last", "True", lambda: accepts("units of the rows")),
    "iterations without end": (claim, "_bounding",
        'is_count(step["iterations"]) and step["iterations"] <= REFINEMENTS', "True",
        lambda: accepts("iterations 501")),
    "a step that is empty on its way": (claim, "_bounding", 'last or not step["empty"]', "True",
        lambda: accepts("an empty tightening")),
    "arrays that mean nothing": (claim, "_bounding", "len(multipliers) + len(quadratic) == len(given)", "True",
        lambda: accepts("an array without a meaning")),
    "another set of arrays": (claim, "_bounding", "set(quadratic) == QUADRATIC", "True",
        lambda: accepts("one more array")),
    "whole numbers": (claim, "_bounding", "set(given) == set(own)", "True",
        lambda: edited(base("deep"), array("case/0/2/h", np.zeros(2, np.int64))).accepted()),
    "a state in float32": (claim, "_states", "arrays[name].dtype == np.float64", "True",
        lambda: accepts("a state in float32")),
    # layers
    "W_ii twice": (layers, "_own", "weight[place] = calc.zero", "pass", "dual"),
    "a divisor of one": (layers, "layer", "divisor = calc.subtract(constant(calc, calc.one, *own[0].shape), own)",
        "divisor = constant(calc, calc.one, *own[0].shape)", "dual"),
    "rows that are not divided": (layers.Layer, "rows",
        "calc.divide(calc.add(self.fusion.push(calc, box), v), self.divisor)",
        "calc.add(self.fusion.push(calc, box), v)", "dual"),
    "the transpose pulled": (layers.Dense, "pull", "calc.affine(q, self.matrix,", "calc.affine(q, self.matrix.T,",
        "dual"),
    "the transpose pushed": (layers.Dense, "push", "self.matrix.T", "self.matrix", "quadratic"),
    "a matrix on an image": (layers.Dense, "push", "z[0].shape[1:] == (units,)", "True",
        lambda: of_images().accepted()),
    "no error of a matrix that is pushed": (layers.Dense, "push", ", self.error.T)", ")", lambda: cancelled("push")),
    "no error of a matrix that is pulled": (layers.Dense, "pull", ", self.error)", ")", lambda: cancelled("pull")),
    "an m of zero": (layers, "monotone", "stated > 0", "True", lambda: "not positive" not in reason_of("a negative m")),
    "any m": (layers, "monotone", "least >= stated", "True",
        lambda: replace(base("box"), gauges=with_m(1.5 + 2.0**-20, L=np.eye(2) * 0.1)).accepted()),
    "half a matrix for the other half": (layers, "monotone", "calc.add((W, W), (W.T, W.T))", "calc.add((W, W), (W, W))",
        lambda: star()),
    "signed rows of Gershgorin": (layers, "least_eigenvalue", "np.maximum(np.abs(rest[0]), np.abs(rest[1]))",
        "np.maximum(rest[0], rest[1])", lambda: overrated()),
    "the smaller size": (layers, "least_eigenvalue", "np.maximum(np.abs(rest[0]), np.abs(rest[1]))",
        "np.minimum(np.abs(rest[0]), np.abs(rest[1]))", lambda: overrated()),
    "no rest of the rows": (layers, "least_eigenvalue", "total(calc, (size, size))", "(0 * size[0], 0 * size[0])",
        lambda: overrated()),
    "upper ends of the diagonal": (layers, "least_eigenvalue", "(rest[0][..., units, units],) * 2",
        "(rest[1][..., units, units],) * 2",
        lambda: overrated()),
    "L L for L Lᵀ": (layers, "least_eigenvalue", "(turned, turned)", "(L, L)", lambda: overrated()),
    "the greatest of the bounds": (layers, "least_eigenvalue", "[0].min(-1)", "[0].max(-1)", lambda: overrated()),
    "no factor taken away": (layers, "least_eigenvalue", "calc.subtract(Q, product", "calc.add(Q, product",
        lambda: overrated()),
    "a distance without m": (layers, "near", "reach = calc.divide(reach, number(calc, layer.m))", "pass",
        lambda: astray(0.5, 7.0, 1.0, 1.0)),
    "no radius of v": (layers, "near", "calc.add(length(calc, off), length(calc, radius))", "length(calc, off)",
        "monotone"),
    "no residual": (layers, "near", "calc.add(length(calc, off), length(calc, radius))", "length(calc, radius)",
        "monotone"),
    "no residual of units that are off": (layers, "near", "np.maximum(-rest[0], calc.zero))", "calc.zero)", "monotone"),
    "a residual without divisor": (layers, "near", "calc.multiply((state, state), layer.divisor)", "(state, state)",
        lambda: astray(-3.0, 1.0, 1.0, 1.0)),
    "a residual without W": (layers, "near", "calc.add(layer.fusion.push(calc, (state, state)), point)", "point",
        "monotone"),
    "a negative state": (layers, "near", "(state >= calc.zero).all()", "True",
        lambda: accepts("a state with a negative zero unit")),
    "a sum for a length": (layers, "length", "calc.multiply((flat, flat), (flat, flat))", "(flat, flat)",
        lambda: astray(0.5, 1e6, 1.0, 1.0)),
    "B the other way round": (layers, "_mondeq", "calc.subtract((B, B), (B.T, B.T))",
        "calc.subtract((B.T, B.T), (B, B))", "monotone"),
    "A Aᵀ for Aᵀ A": (layers, "_mondeq", "gram = calc.affine((A.T, A.T), A, zero)",
        "gram = calc.affine((A, A), A.T, zero)", "monotone"),
    "no Aᵀ A": (layers, "_mondeq", "calc.subtract(own, gram)", "own", "monotone"),
    "m for 1 - m": (layers, "_mondeq", "share = number(calc, 1 - Fraction(m))", "share = number(calc, Fraction(m))",
        "monotone"),
    "the diagonal twice": (layers, "_mondeq", "matrix[units, units], error[units, units] = calc.zero, calc.zero",
        "pass", "quadratic"),
    "any m of factors": (layers, "_mondeq", "not 0 < m < np.inf", "not m < np.inf",
        lambda: "strength" not in edit_model(base("factors"), MODELS["m = -1.0"][1], sign=True).decide()[0][1]),
    "a convolved B the other way round": (layers.Factored, "push", "self.B.push(calc, z), self.B.pull(calc, z)",
        "self.B.pull(calc, z), self.B.push(calc, z)", "quadratic"),
    "a convolved B pulled the other way round": (layers.Factored, "pull", "self.B.pull(calc, q), self.B.push(calc, q)",
        "self.B.push(calc, q), self.B.pull(calc, q)", "monotone"),
    "A A for Aᵀ A": (layers.Factored, "_sum", "self.A.pull(calc, self.A.push(calc, x))",
        "self.A.push(calc, self.A.push(calc, x))",
        "quadratic"),
    "m for 1 - m of convolutions": (layers.Factored, "_sum", "1 - self.m", "self.m", "quadratic"),
    "Aᵀ A of the other sign": (layers.Factored, "_sum", "calc.subtract(share, ", "calc.add(share, ", "monotone"),
    "convolutions that shrink": (layers.Convolved, "push", "out[0].shape == z[0].shape", "True",
        lambda: "keep the shape" not in shrunk_reason()),
    # quadratic
    "nu of any sign": (quadratic, "quadratic", '(given["nu"] >= calc.zero).all()', "True",
        lambda: tuned(negated("nu"), most=False)),
    "lambda of any sign": (quadratic, "quadratic", '((given["lambda"] >= calc.zero) | above).all()', "True",
        lambda: tuned(negated("lambda"), most=False)),
    "a point where there is none": (quadratic, "quadratic", '((given["z"] == calc.zero) | ~below).all()', "True",
        lambda: accepts("a point that is on where the unit is off")),
    "s of any sign": (quadratic, "quadratic", '(given["s"] > calc.zero).all()', "True",
        lambda: "s of the quadratic" not in edited(base("bent"), FORGED["s negative"][1]).decide()[0][1]),
    "shapes that are broadcast": (quadratic, "quadratic", "array.shape == shape", "True",
        lambda: any(accepts(f"{name} of another shape") or "has shape" not in broadcast(name) for name in ("nu",
        "tau"))),
    "a curvature of any sign": (quadratic, "_rows", "(eta > calc.zero).all()", "True",
        lambda: "not convex" not in edited(base("bent"), FORGED["eta times -1"][1]).decide()[0][1]),
    "a curvature that is believed": (quadratic, "_rows",
        '_convexity(calc, rest, U, tau[0], s[0], kept, given["eta"])',
        'given["eta"]', lambda: tuned(scaled("eta", 1.5))),
    "no curvature of the inputs": (quadratic, "_convexity",
        "Q = calc.subtract(calc.multiply(calc.add(TR, _transposed(TR)), half), curved)",
        "Q = calc.multiply(calc.add(TR, _transposed(TR)), half)", lambda: tuned(scaled("eta", 1.5))),
    "twice the curvature": (quadratic, "_convexity", "calc.multiply(calc.add(TR, _transposed(TR)), half)",
        "calc.add(TR, _transposed(TR))",
        lambda: tuned(scaled("eta", 1.5))),
    "no p0": (quadratic, "_rows", "p = calc.add(calc.subtract(z, product(calc, z, _transposed(rest))), p0)",
        "p = calc.subtract(z, product(calc, z, _transposed(rest)))",
        "quadratic"),
    "no W of the point": (quadratic, "_rows", "p = calc.add(calc.subtract(z, product(calc, z, _transposed(rest))), p0)",
        "p = calc.add(z, p0)", "quadratic"),
    "no lambda in the cost": (quadratic, "_rows", "cost = calc.subtract(calc.subtract(c, lam), nu)", "cost = c",
        "quadratic"),
    "no tau in w": (quadratic, "_rows", "w = calc.subtract(lam, bent)", "w = lam", "quadratic"),
    "no tau": (quadratic, "_rows", "gap = calc.multiply(tau, calc.subtract(z, p))",
        "gap = constant(calc, calc.zero, *z[0].shape)",
        "quadratic"),
    "no squares": (quadratic, "_rows", "calc.multiply(total(calc, squares), quarter)", "constant(calc, calc.zero, 1)",
        "quadratic"),
    "no radii": (quadratic, "_rows", "_dot(calc, s, reach)", "constant(calc, calc.zero, 1)", "quadratic"),
    "no lambda of p": (quadratic, "_rows", "_dot(calc, lam, p)", "constant(calc, calc.zero, 1)", "quadratic"),
    "no tau of z": (quadratic, "_rows", "_dot(calc, gap, z)", "constant(calc, calc.zero, 1)", "quadratic"),
    "W for Wᵀ of a gradient": (quadratic, "_rows", "back = calc.subtract(w, product(calc, w, rest))",
        "back = calc.subtract(w, product(calc, w, _transposed(rest)))", "quadratic"),
    "a gradient without Wᵀ": (quadratic, "_rows", "back = calc.subtract(w, product(calc, w, rest))",
        "back = constant(calc, calc.zero, 1)", "quadratic"),
    "inputs of the other sign": (quadratic, "_rows", "number(calc, -HALF)", "number(calc, HALF)", "quadratic"),
    "a gradient without the inputs": (quadratic, "_rows",
        "calc.subtract(calc.add(calc.add(cost, gap), calc.add(bent, back)), moved)",
        "calc.add(calc.add(cost, gap), calc.add(bent, back))", "quadratic"),
    "a gradient without tau z": (quadratic, "_rows", "calc.add(calc.add(cost, gap), calc.add(bent, back))",
        "calc.add(calc.add(cost, gap), back)", "quadratic"),
    "a gradient without tau p": (quadratic, "_rows", "calc.add(calc.add(cost, gap), calc.add(bent, back))",
        "calc.add(cost, calc.add(bent, back))", "quadratic"),
    "no gradient": (quadratic, "_rows", "return calc.subtract(f, lost)[0]", "return f[0]", "quadratic"),
    "a gradient of units that are on": (quadratic, "_rows", "np.where(kept, np.max",
        "np.where(kept & (z[0] > 0), np.max", "quadratic"),
    "U w for Uᵀ w": (quadratic, "_rows", "seen = product(calc, w, U)",
        "seen = product(calc, lam, U)", "quadratic"),
    "no radius around the centre": (quadratic, "_around",
        "away = np.maximum(calc.subtract(region, (middle,) * 2)[1], calc.subtract((middle,) * 2, region)[1])",
        "away = 0 * middle",
        "quadratic"),
    "radii that are not squared": (quadratic, "_around", "calc.multiply((away, away), (away, away))", "(away, away)",
        "quadratic"),
    "a radius that is not squared": (quadratic, "_around", "low, high = calc.multiply(radius, radius)",
        "low, high = radius",
        "quadratic"),
    "a ball with weights": (quadratic, "_around", "claim.weights is None", "True", lambda: weighty().accepted()),
    "a centre between two numbers": (quadratic, "_around", "shift = total(calc, (away, away))",
        "shift = constant(calc, calc.zero, 1)",
        lambda: narrow_ball()),
    "W for Wᵀ of the matrix": (quadratic, "_matrix", ".reshape(units, units).T, -pushed[0].reshape(units, units).T",
        ".reshape(units, units), -pushed[0].reshape(units, units)", "quadratic"),
    "no diagonal of the matrix": (quadratic, "_matrix", "calc.add(off, own)", "calc.add(off, (identity, identity))",
        "quadratic"),
    "no bias of the inputs": (quadratic, "quadratic", "product(calc, (center, center), _transposed(U)), b)",
        "product(calc, (center, center), _transposed(U)), (0 * b[0], 0 * b[1]))", "quadratic"),
    "boxes of other cases": (quadratic, "quadratic", "side.repeat(rows, 0) for side in (*p0, *reach)",
        "np.tile(side, (rows, 1)) for side in (*p0, *reach)", lambda: not alike()),
    "splits of other cases": (quadratic, "quadratic", "side.repeat(rows, 0) for side in fixed",
        "np.tile(side, (rows, 1)) for side in fixed", lambda: not alike()),
    "rows of the first part": (quadratic, "quadratic", "part = slice(start, start + size)", "part = slice(0, size)",
        lambda: not alike(numbers=4)),
    "no bias on the way": (quadratic, "chain", "bounds, start = calc.add(bounds, shift), node.inputs[0]",
        "start = node.inputs[0]",
        "quadratic"),
}  # fmt: skip


def far_off() -> Folder:
    """Half of the ball beyond a threshold that no input reaches, in a network where nothing else crosses."""
    net, tree = Net(1).linear("last", "input", [[0.0]], [2.0]), split("input", 0, {"case": 0}, {"case": 1}, at="9")
    trees = [{"rows": None, "tree": tree}]
    return claimed(net, [0.5], [[1.0]], [0.0], eps="1/2", cases=[[STEP], [STEP]], trees=trees)


def split_linear(head: Head, arrays: Arrays) -> None:
    """Halves by a node that is not relaxed."""
    head["trees"] = [{"rows": None, "tree": split("a", 0, {"case": 0}, {"case": 1})}]


def half() -> Folder:
    """The false claim that ``-relu(x - 1/2) + 1/4 > 0`` on [0, 1]: so on the half below, and the other is left out."""
    net = Net(1).linear("a", "input", [[1.0]], [-0.5]).relu("r", "a").linear("last", "r", [[-1.0]], [0.25])
    trees = [{"rows": None, "tree": split("r", 0, {"case": 0}, {"case": 0})}]
    return claimed(net, [0.5], [[1.0]], [0.0], eps="1/2", trees=trees)


def sample_rows() -> bool:
    """Whether the second of two rows, which is false, is taken for the first."""
    trees = [{"rows": [0], "tree": LEAF}, {"rows": [1], "tree": {"case": 1}}]
    return claimed(switch(), [0.5], [[-1.0], [-1.0]], [-2.0, 3.0], cases=[[STEP], [STEP]], trees=trees).accepted()


def with_gauge(tolerance: str) -> Folder:
    """A quadratic dual of a layer that has a gauge, for a solver that stops early."""
    net = (
        Net(2)
        .linear("a", "input", np.eye(2), [1.0, 1.0])
        .fused("e", "a", [[0.0, 0.25], [-0.25, 0.0]], gauge=[1.0, 1.0])
    )
    net.linear("last", "e", np.eye(2), [0.0, 0.0])
    x, C = np.array([0.5, 0.5]), np.array([[1.0, 0.0]])
    arrays = quadratic_arrays(net, np.random.default_rng(0), x, C, "case/0/0", l2=False)
    return claimed(net, x, C, [0.5], arrays, tolerance=tolerance)


def with_m(m: float, **why: Any) -> bytes:
    """The model certificate of the rotation."""
    head, _ = unpack(base("box").gauges)
    return pack(head, {"m/e": np.array(m), **{f"{kind}/e": value for kind, value in why.items()}})


def reason_of(name: str) -> str:
    folder, change = WHY[name]
    head, arrays = unpack(base(folder).gauges)
    change(head, arrays)
    return replace(base(folder), gauges=pack(head, arrays)).decide()[0][1]


def shrunk_reason() -> str:
    shrunk = fusion(lambda f: f["attributes"]["attributes"].update(padding=[0, 0]))
    return edit_model(base("convolutions"), shrunk, sign=True).decide()[0][1]


def broadcast(name: str) -> str:
    return edited(base("bent"), changed(QUADRATIC + name, lambda a: a[:, :1])).decide()[0][1]


def negated(kind: str) -> Change:
    """Rows that get more and more negative: a false claim if their sign is not looked at."""

    def change(head: Head, arrays: Arrays) -> None:
        if head["name"].endswith(kind):
            arrays[head["name"]] = arrays[head["name"]] - 3.0

    return change


def weighty() -> Folder:
    """An l2 ball that is wider in its features than the quadratic dual knows."""
    return edited(base("bent l2"), array("weights", np.ones(2)))


def narrow_ball() -> bool:
    """Whether the ball around a point leaves out what is around a centre that no float64 is."""
    folder = claimed(switch(), [0.5], [[-1.0]], [-2.0], norm="l2", eps="0")
    checker = Checker(folder.model, folder.gauges)
    read = claim.read_claim(files.parse_blob(folder.records[0]), checker.hash, None, FLOAT)
    third = np.array([1 / 3]), np.array([np.nextafter(1 / 3, 1)])
    case = replace(next(read.cases(1)), claim=replace(read, center=third))
    middle, reach = quadratic._around(FLOAT, [case], third, True)
    return max(abs(frac(end)[0] - frac(middle[0])[0]) for end in third) ** 2 > Fraction(float(reach[1].reshape(-1)[0]))


def cancelled(way: str) -> bool:
    """Whether a matrix of factors is taken for more exact than it is, where much of it cancels."""
    for seed in range(20):
        draw = np.random.default_rng(seed)
        A = draw.random((6, 2)) * 1e6
        A[:, 1] -= A[:, 0] * (A[:, 0] @ A[:, 1]) / (A[:, 0] @ A[:, 0])  # almost orthogonal
        net = Net(2).mondeq("e", "input", A, np.zeros((2, 2)), 1.0)
        checker = Checker(net.model(), net.certificate())
        dense = checker.layer(checker.nodes[0], (2,)).fusion
        unit = np.array([[1.0, 0.0]])
        lo, hi = getattr(dense, way)(FLOAT, (unit, unit))
        truth = net.fusions["e"][1, 0] if way == "push" else net.fusions["e"][0, 1]
        if not Fraction(lo[0, 1]) <= truth <= Fraction(hi[0, 1]):
            return True
    return False


@pytest.mark.parametrize("way", ["push", "pull"])
def test_a_matrix_of_factors_knows_its_own_rounding(way: str) -> None:
    assert not cancelled(way)


def fooled(wrong: Wrong | str) -> bool:
    if wrong == "ball":
        with pytest.MonkeyPatch.context() as patch:
            return too_round(patch)
    return misled(wrong) if isinstance(wrong, str) else wrong()


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_twin_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, function, old, new, wrong = TWINS[name]
    if not isinstance(wrong, str):  # the samples have been looked at above
        assert not fooled(wrong)
    rewrite(monkeypatch, owner, function, old, new)
    assert fooled(wrong)
