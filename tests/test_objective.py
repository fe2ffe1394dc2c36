"""Losses beyond the interval loss, penalties, augmentation and schedules: against plain restatements of the papers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import verideq
from verideq.box import Box
from verideq.certify import margin_rows
from verideq.certify.backward import crown
from verideq.data import load
from verideq.equilibrium import Auto, Equilibrium, Implicit
from verideq.errors import DivergenceError, RecipeError
from verideq.graph import trace
from verideq.models.zoo import ARCHITECTURES, conv_deq, deq_7, linear_deq
from verideq.training import Trainer
from verideq.training.adjoint import adjoint_margins, adjoint_sum
from verideq.training.augment import augmented
from verideq.training.loss import Pass
from verideq.training.objective import Objective
from verideq.training.penalties import bound_penalty, jacobian_penalty, l1_penalty
from verideq.training.points import attacked, small_box
from verideq.training.recipe import make_recipe
from verideq.training.schedule import rate_at
from verideq.training.tables import AttackTable, AugmentTable

DIGITS = load("digits", "train")
IMAGES, LABELS = DIGITS.scaled(slice(16)), DIGITS.labels[:16]
EPS = 0.03
BOX = Box((IMAGES - EPS).clamp(0, 1), (IMAGES + EPS).clamp(0, 1))
SIZES: dict[str, Any] = {
    "conv-deq": {"width": 5},
    "deq-7": {"width": 3, "units": 9},
    "cerdeq": {"width": 3, "units": 9},
}


def model(name: str = "conv-deq", *, training: bool = True, seed: int = 0, explicit: bool = False) -> nn.Module:
    """Float64 and solved to the last digit, so that gradients can be compared."""
    torch.manual_seed(seed)
    built = ARCHITECTURES[name](DIGITS.input_shape, 10, explicit=explicit, **SIZES.get(name, {"width": 6})).double()
    for module in built.modules():
        if isinstance(module, Equilibrium):
            module.solver, module.gradient = Auto(1e-13), Implicit(Auto(1e-12))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    with torch.no_grad():
        built.train()(IMAGES)
    return built.train(training)


def passed(built: nn.Module, box: Box = BOX) -> tuple[Pass, dict[str, Box]]:
    one = Pass(trace(built))
    one.run(IMAGES)
    return one, one.enclosed(box)


# --- one pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_the_clean_pass_is_the_model_and_moves_its_running_statistics_alike(name: str, training: bool) -> None:
    one, other = model(name, training=training), model(name, training=training)
    assert torch.allclose(Pass(trace(one)).run(IMAGES), other(IMAGES), atol=1e-9)
    for (key, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), atol=1e-12), key


def test_other_points_take_the_statistics_of_the_clean_batch() -> None:
    built = model()
    one = Pass(trace(built))
    outputs = one.run(IMAGES)
    before = {name: t.clone() for name, t in built.state_dict().items()}
    assert torch.equal(one.outputs(IMAGES), outputs)
    found = one.outputs(BOX.lower)
    assert all(torch.equal(t, before[name]) for name, t in built.state_dict().items())
    assert not torch.allclose(found, built(BOX.lower)), "the statistics of another batch are others"


def test_boxes_enclose_what_the_points_of_the_box_give() -> None:
    one, boxes = passed(model("deq-7"))
    features = boxes[one.last.inputs[0]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = BOX.lower + torch.rand(IMAGES.shape, generator=generator, dtype=torch.float64) * BOX.width
        values = {name: value for name, value in _values(one, x).items() if name in boxes}
        for name, value in values.items():
            assert bool((value >= boxes[name].lower - 1e-9).all() and (value <= boxes[name].upper + 1e-9).all()), name
    assert float(features.radius.detach().min()) >= 0


def _values(one: Pass, x: Tensor) -> dict[str, Tensor]:
    values = {"input": x}
    for node in one.graph.nodes:
        values[node.name] = one._value(node, [values[name] for name in node.inputs])
    return values


def test_mixed_precision_stays_near_and_leaves_equilibria_alone() -> None:
    built = model("deq-7").float()
    for module in built.modules():
        if isinstance(module, Equilibrium):
            module.solver, module.gradient = Auto(1e-5), Implicit(Auto(1e-4))
    full, mixed = Pass(trace(built)), Pass(trace(built), mixed=True)
    images = IMAGES.float()
    expected, found = full.run(images), mixed.run(images)
    assert found.dtype is torch.float32
    assert 0 < float((found - expected).detach().abs().max()) < 0.1 * float(expected.detach().abs().max())
    loss = F.cross_entropy(found, LABELS)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in built.parameters() if p.requires_grad)


# --- the adjoint bound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear-deq", "conv-deq", "deq-7", "cerdeq", "7layer"])
def test_the_adjoint_margins_are_those_of_the_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation mode they are those of the method `adjoint` by its first choice of slopes."""
    for module in ("verideq.certify.adjoint", "verideq.training.adjoint"):  # both to the fixed point itself
        monkeypatch.setattr(f"{module}.crown", lambda slopes, **_: crown(slopes, 1e-10, 400))
    built = model(name, training=False)
    one, boxes = passed(built)
    with torch.no_grad():
        mine = adjoint_margins(one, boxes, LABELS, 200)
    others = mine.gather(1, (LABELS[:, None] + 1 + torch.arange(9)) % 10)
    proved = verideq.bound(built, BOX, C=margin_rows(LABELS, 10), method="adjoint").lower
    with torch.no_grad():
        center, radius = one.margins(boxes, LABELS)
    interval = (center - radius).gather(1, (LABELS[:, None] + 1 + torch.arange(9)) % 10)
    assert bool((others <= proved + 1e-7).all())
    best = torch.maximum(others, interval)
    assert float((proved - best).abs().median()) < 1e-6, "the adaptive slopes are the method's first choice"


@pytest.mark.parametrize("name", ["linear-deq", "conv-deq", "deq-7"])
def test_no_point_of_the_box_is_below_the_adjoint_margins(name: str) -> None:
    built = model(name)
    one, boxes = passed(built)
    center, radius = one.margins(boxes, LABELS)
    with torch.no_grad():
        lower = adjoint_margins(one, boxes, LABELS, 5)
        (tight, plain), shift = adjoint_sum(one, boxes, LABELS, center, radius, 5)
        assert torch.allclose(plain.log() + shift, torch.logsumexp(radius - center, 1))
        generator = torch.Generator().manual_seed(1)
        for trial in range(30):
            share = torch.rand(IMAGES.shape, generator=generator, dtype=torch.float64)
            x = BOX.lower + (share.round() if trial % 2 else share) * BOX.width
            f = one.outputs(x)
            margins = f.gather(1, LABELS[:, None]) - f
            assert bool((margins >= lower - 1e-9).all())
            assert bool((torch.logsumexp(-margins, 1) <= tight.log() + shift + 1e-9).all())


def test_gradients_of_the_adjoint_bound_are_its_derivatives_for_fixed_multipliers_of_a_relu_network() -> None:
    """Without an equilibrium nothing is found apart: the derivative is exact, and differences have to agree."""
    built = model("7layer")
    weight = next(p for p in built.parameters() if p.dim() == 4)

    def loss() -> Tensor:
        one, boxes = passed(built)
        return F.cross_entropy(-adjoint_margins(one, boxes, LABELS, 5), LABELS)

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        step = 1e-7
        weight.add_(step * direction)
        after = loss()
        weight.sub_(2 * step * direction)
        slope = (after - loss()) / (2 * step)
    assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_the_adjoint_weight_mixes_and_trains(tmp_path: Path, fused: bool) -> None:
    settings = {"epochs": 2, "natural_epochs": 0, "ramp_epochs": 1, "learning_rate": 1e-2, "eps": "0.05"}
    recipe = make_recipe({"options": {"width": 8}, "adjoint": {"weight": [1.0, 0.5], "fused": fused}, **settings})
    Trainer(recipe, tmp_path, torch.device("cpu"), DIGITS.subset(range(256))).run()


# --- attacked points --------------------------------------------------------------------------------------------------


def test_attacked_points_stay_in_the_box_raise_the_loss_and_leave_the_model_alone() -> None:
    built = model()
    graph = trace(built)
    before = {name: t.clone() for name, t in built.state_dict().items()}
    noise = 2 * torch.rand((2, *IMAGES.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    point = attacked(graph, BOX, LABELS, AttackTable(weight=0.5, restarts=2), noise)
    assert bool((point >= BOX.lower).all() and (point <= BOX.upper).all())
    assert all(torch.equal(t, before[name]) for name, t in built.state_dict().items())
    assert built.training and all(p.requires_grad for p in built.parameters())
    built.eval()
    clean, found = (F.cross_entropy(built(x), LABELS, reduction="none").detach() for x in (IMAGES, point))
    assert bool((found >= clean).float().mean() > 0.9)
    assert float(found.mean()) > float(clean.mean()) + 0.01


def test_a_small_box_is_inside_the_ball_and_around_the_point_where_that_fits() -> None:
    inner = small_box(BOX, BOX.center, 0.4)
    assert torch.allclose(inner.radius, 0.4 * BOX.radius)
    assert torch.allclose(inner.center, BOX.center)
    corner = small_box(BOX, BOX.upper, 0.4)
    assert torch.allclose(corner.upper, BOX.upper) and bool((corner.lower >= BOX.lower).all())


def test_the_parts_of_a_loss_are_mixed_as_the_recipe_says() -> None:
    built = model()
    table = {"weight": 0.25, "box": 0.5, "steps": 2}
    recipe = make_recipe({"eps": "0.06", "clean_weight": [1.0, 0.2], "attack": table})
    terms = Objective(recipe, trace(built), (0.0, 1.0))(IMAGES, LABELS, EPS, torch.Generator().manual_seed(0))
    parts = {name: float(value) for name, value in terms.parts.items()}
    assert set(parts) == {"certified", "clean", "attacked"}
    robust = 0.75 * parts["certified"] + 0.25 * parts["attacked"]
    assert float(terms.loss.detach()) == pytest.approx(0.4 * robust + 0.6 * parts["clean"])
    assert parts["attacked"] > parts["clean"]


def test_a_box_of_one_without_weight_is_the_interval_loss() -> None:
    recipe = make_recipe({"eps": "0.06"})
    terms = Objective(recipe, trace(model()), (0.0, 1.0))(IMAGES, LABELS, EPS, torch.Generator())
    one, boxes = passed(model())
    center, radius = one.margins(boxes, LABELS)
    assert float(terms.loss.detach()) == pytest.approx(float(F.cross_entropy(radius - center, LABELS).detach()))
    assert terms.open is not None and terms.growth is not None
    ratio = boxes[one.last.inputs[0]].radius.mean() / BOX.radius.mean()
    assert float(terms.growth) == pytest.approx(float(ratio.detach()))


# --- penalties --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv-deq", "deq-7", "7layer"])
def test_the_bound_penalty_against_the_formula_unit_by_unit(name: str) -> None:
    one, boxes = passed(model(name))
    tau, total, count = 0.5, 0.0, 0
    for node in one.graph.nodes:
        if not isinstance(node.module, (nn.ReLU, Equilibrium)):
            continue
        count += 1
        lower, upper = boxes[node.inputs[0]].lower, boxes[node.inputs[0]].upper
        if isinstance(node.module, Equilibrium):
            W, z = node.module.fusion.weight, boxes[node.name]
            conv = lambda w, x: F.conv2d(x, w, padding=1)  # noqa: E731  # two uses, here alone
            lower = lower + conv(W.clamp(min=0), z.lower) + conv(W.clamp(max=0), z.upper)
            upper = upper + conv(W.clamp(min=0), z.upper) + conv(W.clamp(max=0), z.lower)
        ratio = float((BOX.width.mean() / (upper - lower).mean()).detach())
        total += max(0.0, tau - ratio)
        c = ((lower + upper) / 2).detach()
        for values in (c, (c - c.mean()) ** 2):
            up, down = float(values[lower > 0].sum().abs()), float(values[upper < 0].sum().abs())
            if up and down:
                total += max(0.0, tau - min(up / down, down / up))
    assert count > 0
    assert float(bound_penalty(one, boxes, tau).detach()) == pytest.approx(total / (count * tau), rel=1e-6)


def test_the_bound_penalty_narrows_bounds_when_it_alone_is_minimised() -> None:
    torch.manual_seed(0)
    built = deq_7(DIGITS.input_shape, 10, width=4, units=16).double()
    nn.init.normal_(built[3].weight, 0.0, 0.5)  # wide bounds
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-2)
    values, widths = [], []
    for _ in range(15):
        one, boxes = passed(built)
        value = bound_penalty(one, boxes, 0.5)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
        widths.append(float(boxes[one.last.inputs[0]].radius.detach().mean()))
    assert values[-1] < 0.9 * values[0]
    assert widths[-1] < widths[0]


def test_l1_and_jacobian_penalties_against_their_definitions() -> None:
    built = model()
    one, _ = passed(built)
    layer = built[0]
    weights = [layer.fusion.weight, layer.injection[0].weight, built[-1].weight]
    assert float(l1_penalty(one).detach()) == pytest.approx(sum(float(w.detach().abs().sum()) for w in weights))
    z, W = one.clean["0"], layer.fusion.weight
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(3)).double()
    x = z.detach().requires_grad_()
    image = F.relu(F.conv2d(x, W, padding=1) + one.clean["0.injection.1"])
    (pulled,) = torch.autograd.grad(image, x, v)
    found = jacobian_penalty(one, torch.Generator().manual_seed(3))
    assert float(found.detach()) == pytest.approx(float((pulled**2).mean()), rel=1e-6)
    found.backward()
    assert float(layer.fusion.parametrizations.weight.original.grad.abs().sum()) > 0


def test_penalties_fall_away_with_the_ramp_and_by_chance() -> None:
    graph = trace(model())
    recipe = make_recipe({"eps": "0.03", "penalty": {"bounds": 0.5}})
    at = [Objective(recipe, graph, (0.0, 1.0))(IMAGES, LABELS, eps, torch.Generator()) for eps in (0.0, 0.01, 0.03)]
    assert ["penalty" in terms.parts for terms in at] == [True, True, False]
    recipe = make_recipe({"penalty": {"jacobian": 1.0, "jacobian_share": 0.5}})
    draws = [torch.Generator().manual_seed(seed) for seed in range(40)]
    drawn = ["penalty" in Objective(recipe, graph, (0.0, 1.0))(IMAGES, LABELS, 0.0, draw).parts for draw in draws]
    assert 10 < sum(drawn) < 30


# --- augmentation and schedules ---------------------------------------------------------------------------------------


def test_every_augmented_image_is_a_shift_or_a_flipped_shift_and_all_of_them_occur() -> None:
    images = torch.rand(400, 2, 3, 4, generator=torch.Generator().manual_seed(0))[:1].expand(400, -1, -1, -1)
    table = AugmentTable(flip=True, shift=1)
    found = augmented(images, table, torch.Generator().manual_seed(5), 0.0, slice(None), 400)
    seen = set()
    for flip, down, right in itertools.product((False, True), range(3), range(3)):
        wide = F.pad(images[:1].flip(3) if flip else images[:1], (1, 1, 1, 1), "replicate")
        expected = wide[0, :, down : down + 3, right : right + 4]
        seen |= set((found == expected).flatten(1).all(1).nonzero().flatten().tolist())
        assert bool((found == expected).flatten(1).all(1).any()), (flip, down, right)
    assert seen == set(range(400))


def test_augmentation_is_shared_out_with_the_batch() -> None:
    images = torch.rand(8, 1, 5, 5)
    table = AugmentTable(flip=True, shift=2, fill="zero")
    whole = augmented(images, table, torch.Generator().manual_seed(1), 0.0, slice(0, 8), 8)
    part = augmented(images[4:], table, torch.Generator().manual_seed(1), 0.0, slice(4, 8), 8)
    assert torch.equal(whole[4:], part)
    with pytest.raises(RecipeError, match=r"augment: expected images .* got \(5,\)"):
        augmented(torch.rand(8, 5), table, torch.Generator(), 0.0, slice(0, 8), 8)


def test_learning_rates() -> None:
    common = {"peak": 0.8, "epochs": 10, "decay_epochs": (4, 6), "factor": 0.5}
    steps = [rate_at(e, schedule="steps", warmup=0, **common) for e in (0, 3.99, 4, 5.5, 6, 9)]
    assert steps == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2, 0.2])
    cosine = [rate_at(e, schedule="cosine", warmup=2, **common) for e in (0, 1, 2, 4, 6, 8, 10)]
    half = [0.4 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert cosine == pytest.approx([0, 0.4, *half])


# --- the run ----------------------------------------------------------------------------------------------------------


def run(folder: Path, **settings: Any) -> Trainer:
    base = {"options": {"width": 8}, "epochs": 2, "natural_epochs": 0, "ramp_epochs": 1, "learning_rate": 1e-2}
    trainer = Trainer(make_recipe(base | settings), folder, torch.device("cpu"), DIGITS.subset(range(256)))
    trainer.run()
    return trainer


def test_the_average_of_the_weights_is_what_is_stored_and_it_is_no_last_iterate(tmp_path: Path) -> None:
    plain, averaged = run(tmp_path / "plain"), run(tmp_path / "average", average=0.9)
    stored = [verideq.load_model(t.folder / "model.safetensors").nodes[-1].module.weight for t in (plain, averaged)]
    assert not torch.equal(*stored)
    last = plain.model.state_dict()["2.weight"]
    assert torch.equal(averaged.model.state_dict()["2.weight"], last), "averaging does not change the path"
    assert torch.equal(stored[0], last) and torch.equal(stored[1], averaged.average["2.weight"])


def test_validation_samples_are_held_out_and_measured(tmp_path: Path) -> None:
    trainer = run(tmp_path, validation={"samples": 56, "seed": 3, "eps": "0.01"}, options={"width": 24}, epochs=3)
    assert (len(trainer.data), len(trainer.held_out or ())) == (200, 56)
    every = torch.cat((trainer.data.images, trainer.held_out.images)).flatten(1).double().sum(1)  # type: ignore[union-attr]  # it is there
    assert torch.equal(every.sort().values, DIGITS.images[:256].flatten(1).double().sum(1).sort().values)
    stored = verideq.load_model(tmp_path / "model.safetensors")
    images, labels = trainer.held_out.scaled(), trainer.held_out.labels  # type: ignore[union-attr]  # likewise
    with torch.no_grad():
        wrong = stored(images.float()).argmax(1) != labels
    box = Box((images - 0.01).clamp(0, 1), (images + 0.01).clamp(0, 1))
    proved = (verideq.bound(stored, box, C=margin_rows(labels, 10)).lower > 0).all(1)
    last = trainer.validate()
    assert last["validation_error"] == pytest.approx(float(wrong.double().mean()))
    assert last["validation_interval_error"] == pytest.approx(1 - float(proved.double().mean()), abs=2 / 56)


def test_more_samples_to_hold_out_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"validation.samples: expected fewer than the 256 there are; got 256"):
        run(tmp_path, validation={"samples": 256})


def test_divergence_names_epoch_step_layer_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe({"options": {"width": 4}, "epochs": 3, "ramp_epochs": 1})
    trainer = Trainer(recipe, tmp_path, torch.device("cpu"), DIGITS.subset(range(256)))
    step_of = Objective.__call__
    steps = 0

    def poisoned(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            with torch.no_grad():
                trainer.model[2].weight[1, 0] = torch.nan
        return step_of(*arguments)

    monkeypatch.setattr(Objective, "__call__", poisoned)
    with pytest.raises(
        DivergenceError, match=r"epoch 2, step 2 of 4 .*the clean values of 2 are not finite; lower .*is from before"
    ):
        trainer.run()


def test_an_equilibrium_that_is_not_found_is_divergence_too(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"step 1 of 4 .*: 1: the equilibrium did not converge .*raise options.m"):
        run(tmp_path, max_steps=1, tol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "phantom"},
        {"solver": "anderson"},
        {"solver": "picard", "backward_steps": 2},
        {"precision": "mixed"},
        {"schedule": "cosine", "warmup_epochs": 0.5, "weight_decay": 1e-2},
        {"attack": {"box": 0.4, "steps": 1}},
        {"attack": {"weight": 0.5, "steps": 1, "reach": 2.0}},
        {"penalty": {"bounds": 0.5, "l1": 1e-6, "jacobian": 0.1}},
        {"explicit": True},
        {"explicit": True, "constrained": True},
        {"architecture": "conv-deq", "augment": {"flip": True, "shift": 1}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_knob_trains_and_the_loss_falls(tmp_path: Path, settings: dict[str, Any]) -> None:
    run(tmp_path, epochs=6, ramp_epochs=0, eps="0.01", initialisation="torch", learning_rate=2e-2, **settings)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["clean_loss"] < 0.95 * records[0]["clean_loss"]
    assert [*records[0]] == (tmp_path / "log.csv").read_text().splitlines()[0].split(",")


def test_twins_have_no_equilibrium() -> None:
    for make in (linear_deq, conv_deq):
        assert not list(trace(make(DIGITS.input_shape, 10, explicit=True, width=4)).equilibria())
