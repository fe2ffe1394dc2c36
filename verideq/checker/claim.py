"""What a record claims, and what it suggests: every field and array of the right type, or a rejection.

Of what a record says only the input, the radius, the range, the label, the tolerance and the margin are *statements*.
Boxes, multipliers and the tree of cases are *suggestions*: they are checked, and none is believed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from verideq.checker.arithmetic import Arithmetic, Array, Exact, Float, Interval, Rejected, require
from verideq.checker.files import Blob

VERSION = 1
REFINEMENTS = 500
"""The most refinements of a recomputed box, and iterations of recomputed multipliers, that a record may ask for."""
FIELDS = {
    "version", "model", "index", "label", "eps", "norm", "clip", "scale", "specification", "margin", "tolerance",
    "refinements", "cases", "trees",
}  # fmt: skip
SLOPES = ("adaptive", "zero", "one")


@dataclass(frozen=True)
class Bounding:
    """One use of the dual: which rows are bounded, and where their multipliers come from.

    Args:
        node: whose pre-activations are tightened; ``None`` for the rows of the claim, at the end.
        slopes: how multipliers are recomputed; ``None`` where they are given, or not wanted.
        iterations: of a recomputed equilibrium.
        empty: instead of the rows, that no input satisfies the splits of the case.
        units: (rows,) of the pre-activations: ``i`` for the lower bound of unit ``i``, ``-1 - i`` for the upper one.
        multipliers: by node, (rows, *state).
        quadratic: ``lambda``, ``nu``, ``tau``, ``s``, ``z`` and ``eta`` of the quadratic dual, (rows, ...); or empty.
    """

    node: str | None
    slopes: str | None
    iterations: int
    empty: bool
    units: Array | None
    multipliers: Mapping[str, Array]
    quadratic: Mapping[str, Array]

    @property
    def form(self) -> object:
        """What two boundings have in common that are worked out together."""
        arrays = [(name, array.shape) for name, array in sorted({**self.multipliers, **self.quadratic}.items())]
        rows = None if self.units is None else self.units.shape
        return self.node, self.slopes, self.iterations, self.empty, rows, tuple(arrays)


@dataclass(frozen=True)
class Split:
    """A half of the inputs: those with ``p_unit`` (of the input: ``x_unit``) at most or at least `at`.

    Args:
        node: the name of a ReLU or equilibrium, whose pre-activation is split at 0; or ``"input"``.
        unit: the place in the flattened state.
        at: the threshold.
        above: at least, and not at most.
    """

    node: str
    unit: int
    at: Fraction
    above: bool


@dataclass(frozen=True)
class Case:
    """What is proved of a part of the ball.

    Args:
        claim: that this is a part of.
        splits: that make the part.
        rows: of the specification that are bounded; ``None``: all of them.
        steps: tightenings in order, the bound of the rows last.
        before: a case of tightenings only, of this part or of one around it: its boxes are taken as they are.
    """

    claim: Claim
    splits: tuple[Split, ...]
    rows: tuple[int, ...] | None
    steps: tuple[Bounding, ...]
    before: Case | None = None

    @property
    def tightenings(self) -> tuple[Bounding, ...]:
        """The steps that are about pre-activations."""
        return self.steps if self.steps[-1].node is not None else self.steps[:-1]


@dataclass(frozen=True)
class Claim:
    """The statement of a record: on the ball every row of ``C f - rhs`` is above zero, and not below `margin`.

    Args:
        center: the input, (features), as numbers of the arithmetic below and above it.
        eps: the radius, times `weights` by feature.
        norm: ``linf`` or ``l2``.
        clip: the valid range.
        label: the class whose output exceeds every other one; ``None`` for a linear specification.
        linear: ``C``, (rows, outputs), and ``rhs``, (rows,); ``None`` for a label.
        margin: what is claimed.
        tolerance: how far a deployed solver may stop from the equilibrium, in units of the slack.
        boxes: of equilibria, by node name.
        states: an approximate equilibrium at the centre, by node name.
        refinements: of the boxes that are not given.
        trees: rows and the tree of cases that proves them.
        steps: of every case.
    """

    center: Interval
    eps: Fraction
    norm: str
    weights: Array | None
    clip: tuple[Fraction, Fraction] | None
    label: int | None
    linear: tuple[Array, Array] | None
    margin: Fraction
    tolerance: Fraction
    boxes: Mapping[str, tuple[Array, Array]]
    states: Mapping[str, Array]
    refinements: int
    trees: tuple[tuple[tuple[int, ...] | None, Any], ...]
    steps: tuple[tuple[Bounding, ...], ...]

    def cases(self, rows: int | None) -> Iterator[Case]:
        """The leaves of the trees, which together cover all `rows` of the specification and all of the ball.

        Where the number of rows is not known beforehand only a tree of all rows will do.
        """
        whole = any(wanted is None for wanted, _ in self.trees)
        named = {row for wanted, _ in self.trees for row in wanted or ()}
        known = set(range(rows or 0))
        require(named <= known if whole else rows and named == known, "a row of the specification is not proved")
        used: list[int] = []
        around: dict[tuple[Above, ...], Case] = {}
        for wanted, tree in self.trees:
            for place, above in _leaves(tree, ()):
                used.append(place)
                yield self._case(place, above, wanted, around, leaf=True)
        require(len(set(used)) == len(used), "a case belongs to two leaves")
        used += {way[-1] for way in around if isinstance(way[-1], int)}
        require(sorted(used) == list(range(len(self.steps))), "a case belongs to no leaf, or to two")

    def _case(
        self,
        place: int,
        above: tuple[Above, ...],
        rows: tuple[int, ...] | None,
        around: dict[tuple[Above, ...], Case],
        *,
        leaf: bool,
    ) -> Case:
        """The case at a place of a tree; those above it are shared by all that is below them."""
        require(place < len(self.steps), "a tree names a case that is not there")
        ends = self.steps[place][-1].node is None
        require(ends or not leaf, "the rows of the claim come last")
        require(leaf or not ends, "a case with more below it bounds no rows")
        before = None
        for k in range(len(above) - 1, -1, -1):
            inner = above[k]
            if isinstance(inner, int):
                if above[: k + 1] not in around:
                    around[above[: k + 1]] = self._case(inner, above[:k], None, around, leaf=False)
                before = around[above[: k + 1]]
                break
        splits = tuple(split for split in above if isinstance(split, Split))
        return Case(self, splits, rows, self.steps[place], before)


Above = Split | int
"""What stands above a place in a tree: a split, or the number of a case of tightenings."""


def _leaves(tree: Any, way: tuple[Above, ...]) -> Iterator[tuple[int, tuple[Above, ...]]]:
    """Every leaf's case and what is above it. Both halves of each split are there, so nothing is left out."""
    require(isinstance(tree, dict), "a tree is no object")
    if "case" in tree:
        require(set(tree) <= {"case", "then"}, f"a tree has the fields {sorted(tree)}")
        require(is_count(tree["case"]), "a case is no number")
        if "then" in tree:
            yield from _leaves(tree["then"], (*way, tree["case"]))
        else:
            yield tree["case"], way
        return
    require(set(tree) == {"node", "unit", "at", "below", "above"}, f"a tree has the fields {sorted(tree)}")
    require(isinstance(tree["node"], str) and is_count(tree["unit"]), "a split names no unit")
    at = rational(tree["at"], "the threshold of a split")
    require(at == 0 or tree["node"] == "input", "a pre-activation is split at 0 only")
    for above in (False, True):
        split = Split(tree["node"], tree["unit"], at, above)
        yield from _leaves(tree["above" if above else "below"], (*way, split))


def is_count(value: object) -> bool:
    """Whether it is an integer, 0 or more."""
    return type(value) is int and value >= 0


def read_claim(record: Blob, model: str, pixels: tuple[Fraction, Fraction] | None, arithmetic: Arithmetic) -> Claim:
    """The claim of a record, every field of the right type and for the model with this hash and pixel range."""
    head = dict(record.head)
    require(set(head) == FIELDS, f"the record has the fields {sorted(head)}")
    require(type(head["version"]) is int and head["version"] == VERSION, f"version {head['version']!r} is not known")
    require(head["model"] == model, "the record is about another model")
    require(head["norm"] in ("linf", "l2"), f"the norm {head['norm']!r} is not known")
    require(head["specification"] in ("label", "linear"), "the specification is not known")
    by_label = head["specification"] == "label"
    require(
        (type(head["label"]) is int and head["label"] >= 0) if by_label else head["label"] is None, "the label is wrong"
    )
    require(type(head["refinements"]) is int and 0 <= head["refinements"] <= REFINEMENTS, "too many refinements")
    require(type(head["index"]) is int and head["index"] >= 0, "the index is wrong")
    eps, margin = rational(head["eps"], "eps"), rational(head["margin"], "margin")
    require(eps >= 0, "eps is negative")
    require(margin >= 0, "the claimed margin is negative")
    clip = head["clip"]
    if clip is not None:
        require(isinstance(clip, list) and len(clip) == 2, "the clip is no range")
        clip = (rational(clip[0], "clip"), rational(clip[1], "clip"))
        require(clip[0] <= clip[1], "the clip is no range")
        # A narrower clip would claim less than it seems to; none at all claims more.
        whole = pixels is not None and clip[0] <= pixels[0] and pixels[1] <= clip[1]
        require(whole, "the clip cuts off pixels that the model allows")
    arrays = dict(record.arrays)
    center = _center(arrays.pop("input", None), head["scale"], arithmetic)
    weights = arrays.pop("weights", None)
    if weights is not None:
        require(weights.dtype == np.float64 and weights.shape == center[0].shape, "the weights do not fit the input")
        require((weights >= 0).all(), "a weight is negative")
        weights = arithmetic.exactly(weights)
    linear = None if by_label else _linear(arrays.pop("C", None), arrays.pop("rhs", None), arithmetic)
    tolerance = rational(head["tolerance"], "the tolerance")
    require(tolerance >= 0, "the tolerance is negative")
    require(isinstance(head["cases"], list) and isinstance(head["trees"], list), "the cases and trees are no lists")
    steps = tuple(_steps(place, case, arrays, arithmetic) for place, case in enumerate(head["cases"]))
    boxes, states = _boxes(arrays, arithmetic), _states(arrays, arithmetic)
    require(not arrays, f"the array {min(arrays, default='')} has no meaning")
    return Claim(
        center, eps, head["norm"], weights, clip, head["label"], linear, margin, tolerance, boxes, states,
        head["refinements"], tuple(_tree(entry) for entry in head["trees"]), steps,
    )  # fmt: skip


def _tree(entry: Any) -> tuple[tuple[int, ...] | None, Any]:
    require(isinstance(entry, dict) and set(entry) == {"rows", "tree"}, "a tree has other fields than rows and tree")
    rows = entry["rows"]
    if rows is None:
        return None, entry["tree"]
    whole = isinstance(rows, list) and rows and all(is_count(row) for row in rows) and len(set(rows)) == len(rows)
    require(whole, "the rows of a tree are no list of different numbers")
    return tuple(rows), entry["tree"]


def _steps(place: int, case: Any, arrays: dict[str, Array], arithmetic: Arithmetic) -> tuple[Bounding, ...]:
    require(isinstance(case, list) and 0 < len(case) <= REFINEMENTS, "a case is no list of steps")
    return tuple(
        _bounding(f"case/{place}/{k}/", step, arrays, arithmetic, end=k == len(case) - 1) for k, step in enumerate(case)
    )


def _bounding(prefix: str, step: Any, arrays: dict[str, Array], arithmetic: Arithmetic, *, end: bool) -> Bounding:
    """A step and its arrays, which are taken out of `arrays`."""
    fields = {"node", "slopes", "iterations", "empty"}
    require(isinstance(step, dict) and set(step) == fields, "a step has other fields")
    last = end and step["node"] is None
    require((step["node"] is None) if last else isinstance(step["node"], str), "the rows of the claim come last")
    require(step["slopes"] is None or step["slopes"] in SLOPES, f"the slopes {step['slopes']!r} are not known")
    require(is_count(step["iterations"]) and step["iterations"] <= REFINEMENTS, "too many iterations")
    require(type(step["empty"]) is bool and (last or not step["empty"]), "only a case can be empty")
    own = {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}
    units = own.pop("units", None)
    require((units is None) == last, "the units are of a tightening, and only of one")
    require(units is None or (units.dtype == np.int64 and units.ndim == 1 and len(units)), "the units are no numbers")
    given = {name: arithmetic.exactly(array) for name, array in own.items() if array.dtype.kind == "f"}
    require(set(given) == set(own), "a multiplier is no floating-point number")
    multipliers = {k.removeprefix("g/"): array for k, array in given.items() if k.startswith("g/")}
    quadratic = {k.removeprefix("q/"): array for k, array in given.items() if k.startswith("q/")}
    require(len(multipliers) + len(quadratic) == len(given), "an array of a step has no meaning")
    require(not quadratic or (last and set(quadratic) == QUADRATIC), "the quadratic dual has other arrays")
    return Bounding(step["node"], step["slopes"], step["iterations"], step["empty"], units, multipliers, quadratic)


QUADRATIC = {"lambda", "nu", "tau", "s", "z", "eta"}


def rational(text: Any, what: str) -> Fraction:
    """A fraction from ``"8/255"``: digits, one slash, nothing else."""
    value = _fraction(text) if isinstance(text, str) and len(text) <= 2000 else None
    if value is None:
        raise Rejected(f"{what} is no fraction")
    return value


@lru_cache(4096)
def _fraction(text: str) -> Fraction | None:
    """The records of a run have most of their numbers in common."""
    top, slash, bottom = text.partition("/")
    unsigned = top.removeprefix("-")
    whole = unsigned.isascii() and unsigned.isdigit()
    whole = whole and (not slash or (bottom.isascii() and bottom.isdigit() and int(bottom) > 0))
    return Fraction(int(top), int(bottom or 1)) if whole else None


def _center(stored: Array | None, scale: Any, arithmetic: Arithmetic) -> Interval:
    require(stored is not None and stored.ndim >= 1, "the record has no input")
    array: Array = stored
    if scale is None:
        require(array.dtype == np.float64, "an input without a scale is float64")
        exact = arithmetic.exactly(array)
        return exact, exact
    require(array.dtype == np.uint8, "an input with a scale is uint8")
    low, high = _bytes(isinstance(arithmetic, Float), rational(scale, "scale"))
    return low[array], high[array]


@lru_cache(16)
def _bytes(rounded: bool, unit: Fraction) -> Interval:
    """What every byte stands for."""
    arithmetic = Float() if rounded else Exact()
    table = [arithmetic.rational(value * unit) for value in range(256)]
    sides: list[Array] = [np.array([entry[side] for entry in table], dtype=arithmetic.kind) for side in (0, 1)]
    return sides[0], sides[1]


def _linear(C: Array | None, rhs: Array | None, arithmetic: Arithmetic) -> tuple[Array, Array]:
    if C is None or rhs is None:
        raise Rejected("the record has no C, or no rhs")
    require(
        C.dtype == rhs.dtype == np.float64 and C.ndim == 2 and len(C) > 0 and rhs.shape == C.shape[:1],
        "C and rhs differ",
    )
    return arithmetic.exactly(C), arithmetic.exactly(rhs)


def _boxes(arrays: dict[str, Array], arithmetic: Arithmetic) -> dict[str, tuple[Array, Array]]:
    """The boxes by node, taken out of `arrays`."""
    found: dict[str, tuple[Array, Array]] = {}
    for name in sorted(arrays):
        node, _, side = name.removeprefix("box/").rpartition("/")
        if not name.startswith("box/") or side not in ("lower", "upper") or name not in arrays:
            continue
        lower, upper = (arrays.pop(f"box/{node}/{end}", None) for end in ("lower", "upper"))
        if lower is None or upper is None:
            raise Rejected(f"half of the box of {node} is missing")
        require(
            lower.dtype == upper.dtype == np.float64 and lower.shape == upper.shape, f"the box of {node} has two shapes"
        )
        found[node] = arithmetic.exactly(lower), arithmetic.exactly(upper)
    return found


def _states(arrays: dict[str, Array], arithmetic: Arithmetic) -> dict[str, Array]:
    """The approximate equilibria by node, taken out of `arrays`."""
    names = [name for name in sorted(arrays) if name.startswith("state/")]
    require(all(arrays[name].dtype == np.float64 for name in names), "a state is not float64")
    return {name.removeprefix("state/"): arithmetic.exactly(arrays.pop(name)) for name in names}


def regions(claims: Sequence[Claim], arithmetic: Arithmetic) -> Interval:
    """`region` of each claim, (claims, *features): at once where only the inputs differ."""
    first = claims[0]
    if any((c.eps, c.clip) != (first.eps, first.clip) or c.weights is not None for c in claims):
        boxes = [region(claim, arithmetic) for claim in claims]
        return np.stack([lo for lo, _ in boxes]), np.stack([hi for _, hi in boxes])
    centers = [claim.center for claim in claims]
    whole = np.stack([lo for lo, _ in centers]), np.stack([hi for _, hi in centers])
    return region(replace(first, center=whole), arithmetic)


def region(claim: Claim, arithmetic: Arithmetic) -> Interval:
    """The smallest interval of inputs that is sure to hold the ball, cut to the clip."""
    eps = arithmetic.rational(claim.eps)
    shape = claim.center[0].shape
    reach = tuple(np.full(shape, side, dtype=claim.center[0].dtype) for side in eps)
    if claim.weights is not None:
        reach = arithmetic.multiply((reach[0], reach[1]), (claim.weights, claim.weights))
    lo = arithmetic.subtract(claim.center, (reach[1], reach[1]))[0]
    hi = arithmetic.add(claim.center, (reach[1], reach[1]))[1]
    if claim.clip is not None:
        low, high = arithmetic.rational(claim.clip[0]), arithmetic.rational(claim.clip[1])
        inside = (claim.center[1] >= low[0]).all() and (claim.center[0] <= high[1]).all()
        require(inside, "the input lies outside the clip")
        lo, hi = np.maximum(lo, low[0]), np.minimum(hi, high[1])
    return lo, hi
