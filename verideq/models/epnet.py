"""Energy-based networks that settle into a steady state, to be trained with equilibrium propagation.

The state is a block ``s_n`` a layer, ``s_0 = x`` the clamped input. Neighbouring blocks are coupled both ways by one
kernel, through the *primitive function*

    Φ(x, s; θ) = Σ_n ⟨pool_n(conv_n(s_{n-1}) + b_n), s_n⟩,

and all blocks move at once, from zero: ``s <- σ(∂Φ/∂s)``. A steady state is a stationary point, on the unit box, of the
energy ``‖s‖² / (2 L) - Φ``, with ``L`` the slope of the hard sigmoid ``σ`` (Scellier & Bengio 2017; Laborieux et al.
2021; Mansingh et al. 2024). ``∂Φ/∂s_n`` is what comes from below, plus what the layer above sends back through its
transposed kernel, to where its pooling took it from.

Max pooling sends back to the winner only: the step is then discontinuous where two units tie, and nothing about it can
be certified. Average pooling and strides are linear: with them the net is an `Equilibrium` (`EPNet.certifiable`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from verideq.equilibrium import DEQ, Equilibrium, FeedbackFusion, Gradient, Implicit, Picard
from verideq.equilibrium.dynamics import Injected
from verideq.equilibrium.layer import linear
from verideq.errors import InputError, ModelError, UnknownName
from verideq.graph import Embed, Normalize
from verideq.parametrizations.feedback import scaled_couplings

POOLS = ("max", "average", "stride", "none")
ACTIVATIONS: dict[str, float] = {"hard-sigmoid": 1.0, "half": 0.5}
"""``clip(L a, 0, 1)`` by name: the slope ``L``. ``half`` is what the CIFAR-10 models of the source use."""
READOUTS = ("squared", "cross-entropy")
States = list[Tensor]
"""A block a layer, (batch, channels, height, width) or (batch, units)."""


@dataclass(frozen=True)
class Link:
    """One coupling as it is used: a snapshot of the weights, evaluated once a forward pass.

    Args:
        weight: (out, in, kernel, kernel), or (out, in) of a dense one.
        bias: (out,).
        stride: of the convolution; 2 where an average pooling is folded in.
        padding: likewise.
        pooled: whether a 2×2 max pooling follows.
    """

    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    pooled: bool = False

    def detach(self) -> Link:
        """Without a gradient."""
        return replace(self, weight=self.weight.detach(), bias=self.bias.detach())

    def module(self) -> nn.Conv2d | nn.Linear:
        """The same map as a layer, max pooling apart; the tensors are copied."""
        if self.weight.dim() == 2:
            return linear(self.weight, self.bias)
        outputs, inputs, kernel, _ = self.weight.shape
        layer = nn.Conv2d(inputs, outputs, kernel, self.stride, self.padding)
        layer.weight = nn.Parameter(self.weight.detach().clone())
        layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer

    def up(self, below: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the block below sends up, and the places that max pooling took it from."""
        if self.weight.dim() == 2:
            return F.linear(below.flatten(1), self.weight, self.bias), None
        image = F.conv2d(below, self.weight, self.bias, self.stride, self.padding)
        if not self.pooled:
            return image, None
        pooled, places = F.max_pool2d(image, 2, return_indices=True)
        return pooled, places

    def down(self, above: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
        """What the block above sends back, into a block of this shape."""
        if self.weight.dim() == 2:
            return F.linear(above, self.weight.t()).view(shape)
        side = [n + 2 * self.padding - self.weight.shape[2] + 1 for n in shape[2:]]
        if places is not None:
            above = F.max_unpool2d(above, places, [2, 2], output_size=side)
        rest = [(n - 1) % self.stride for n in side]
        return F.conv_transpose2d(above, self.weight, None, self.stride, self.padding, rest)


def fold(kernel: Tensor) -> Tensor:
    """The kernel of the convolution of stride 2 that is a convolution followed by 2×2 average pooling.

    ``K ⋆ box / 4``, one larger on each axis; the padding stays the same.

    >>> fold(torch.ones(1, 1, 1, 1))
    tensor([[[[0.2500, 0.2500],
              [0.2500, 0.2500]]]])
    """
    wide = F.pad(kernel, (1, 1, 1, 1))
    return (wide[..., 1:, 1:] + wide[..., :-1, 1:] + wide[..., 1:, :-1] + wide[..., :-1, :-1]) / 4


class EPNet(DEQ):
    """An energy-based convolutional network: convolutions, then dense layers, and a readout.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        channels: of the convolutional blocks.
        hidden: units of the dense blocks after them.
        kernel: of the convolutions.
        paddings: one a convolution; empty: ``kernel // 2`` each.
        pool: 2×2 after every convolution: ``max``, ``average``, ``stride`` (a stride of 2 instead) or ``none``.
        first_pool: of the first convolution, whose input gets nothing back; empty: as the others.
        activation: ``hard-sigmoid``, ``clip(a, 0, 1)``, or ``half``, ``clip(a / 2, 0, 1)``.
        readout: ``squared``: the outputs are the last block of the state; ``cross-entropy``: a linear layer reads the
            last block, and sends nothing back.
        free_steps: of the free phase, at the end of which the outputs are read.
        tol: stop earlier where the state of a sample moves by less, relative; 0: never.
        margin: ``m`` of the gauge-constrained couplings, ``L |W| u <= (1-m) u``; 0: free ones.
        mean: normalisation by channel; empty for none.
        std: likewise.

    `forward` gives the outputs at the end of the free phase. Its gradient is that of the unrolled steps
    (backpropagation through time), or implicit where the margin makes the step a contraction. `attack_steps` are the
    numbers of steps whose unrolled gradients attacks try besides: the strongest number is not the largest.

    Raises:
        InputError: sizes that do not fit.
        UnknownName: another pool, activation or readout.

    >>> EPNet((1, 8, 8), 3, channels=(4, 6))(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        *,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (),
        kernel: int = 3,
        paddings: Sequence[int] = (),
        pool: str = "max",
        first_pool: str = "",
        activation: str = "hard-sigmoid",
        readout: str = "squared",
        free_steps: int = 20,
        tol: float = 0.0,
        margin: float = 0.0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        for what, name, known in (("pool", pool, POOLS), ("readout", readout, READOUTS)):
            if name not in known:
                raise UnknownName(what, name, known)
        if activation not in ACTIVATIONS:
            raise UnknownName("activation", activation, tuple(ACTIVATIONS))
        if first_pool not in ("", *POOLS):
            raise UnknownName("first_pool", first_pool, POOLS)
        if len(input_shape) != 3 or not (channels or hidden) or free_steps < 1 or not 0 <= margin < 1:
            raise InputError(
                "an EPNet takes images (channels, height, width), a block or more, 1 or more free_steps and a margin "
                f"in [0, 1); got {tuple(input_shape)}, {(*channels, *hidden)}, {free_steps} and {margin}"
            )
        if margin and pool == "max":
            raise InputError("a margin needs pool average, stride or none: max pooling sends back with jumps")
        paddings = tuple(paddings) or (kernel // 2,) * len(channels)
        if len(paddings) != len(channels):
            raise InputError(f"{len(channels)} convolutions take as many paddings; got {len(paddings)}")
        gradient: Gradient = Implicit(Picard(tol=1e-6, max_steps=500))
        super().__init__(
            Normalize(list(mean), list(std)) if len(mean) else nn.Identity(),
            lambda z, v: z,
            nn.Identity(),
            solver=Picard(tol=tol, max_steps=free_steps),
            gradient=gradient,
        )
        self.input_shape, self.pixel_range = tuple(input_shape), (0.0, 1.0)
        self.slope, self.readout = ACTIVATIONS[activation], readout
        self.margin = margin
        self.pools = tuple((first_pool or pool) if n == 0 else pool for n in range(len(channels)))
        self.paddings = paddings
        self.couplings = nn.ModuleList()
        self.shapes: list[tuple[int, ...]] = []
        inputs, *side = input_shape
        for count, pad, how in zip(channels, paddings, self.pools, strict=True):
            self.couplings.append(nn.Conv2d(inputs, count, kernel, 2 if how == "stride" else 1, pad))
            side = [n + 2 * pad - kernel + 1 for n in side]
            side = side if how == "none" else [(n + 1) // 2 if how == "stride" else n // 2 for n in side]
            if min(side) < 1:
                raise InputError(f"{len(channels)} convolutions shrink {tuple(input_shape)} to nothing")
            self.shapes.append((count, *side))
            inputs = count
        units = [math.prod((inputs, *side)), *hidden, *([classes] if readout == "squared" else [])]
        for below, above in pairwise(units):
            self.couplings.append(nn.Linear(below, above))
            self.shapes.append((above,))
        if readout == "cross-entropy":
            self.classifier = nn.Linear(units[-1], classes)
        if margin and len(self.shapes) < 2:
            raise InputError("a margin needs two blocks or more: one block alone has no feedback")
        for layer in self.couplings:
            if isinstance(layer, nn.Conv2d):  # channels last: max pooling on a CPU is ten times faster so
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)

    # --- the couplings ------------------------------------------------------------------------------------------------

    def snapshot(self) -> list[Link]:
        """The couplings as they act, differentiable: pooling folded where it is linear, scaled where there is a
        margin.
        """
        found: list[Link] = []
        for n, layer in enumerate(self.couplings):
            weight: Tensor = layer.get_parameter("weight")
            bias = layer.get_parameter("bias")
            if isinstance(layer, nn.Linear):
                found.append(Link(weight, bias))
                continue
            how, pad = self.pools[n], self.paddings[n]
            weight = fold(weight) if how == "average" else weight
            found.append(Link(weight, bias, 2 if how in ("average", "stride") else 1, pad, how == "max"))
        if not self.margin:
            return found
        # The first one carries no feedback, and is free.
        kernels, strides = [link.weight for link in found[1:]], [link.stride for link in found[1:]]
        scaled = scaled_couplings(kernels, self.shapes, strides, self.margin)
        return found[:1] + [
            replace(link, weight=weight / self.slope) for link, weight in zip(found[1:], scaled, strict=True)
        ]

    def parts(self) -> Iterator[nn.Module]:
        """The couplings from the input on, and the readout, if there is one: each has a learning rate."""
        yield from self.couplings
        if self.readout == "cross-entropy":
            yield self.classifier

    def drive(self, x: Tensor, couplings: Sequence[Link]) -> Tensor:
        """What the input sends to the first block, (batch, *block); the same in every step."""
        return couplings[0].up(self.stem(x))[0]

    def primitive(self, drive: Tensor, states: States, couplings: Sequence[Link]) -> Tensor:
        """``Φ``, summed over the batch, differentiable in the drive, the states and the couplings."""
        total = (drive * states[0]).sum()
        for coupling, (below, above) in zip(couplings[1:], pairwise(states), strict=True):
            total = total + (coupling.up(below)[0] * above).sum()
        return total

    def pull(self, drive: Tensor, states: States, couplings: Sequence[Link]) -> States:
        """``∂Φ/∂s``, block by block, without autograd."""
        sent = [coupling.up(below) for coupling, below in zip(couplings[1:], states[:-1], strict=True)]
        pulls = [drive, *(image for image, _ in sent)]
        for n, (coupling, (_, places)) in enumerate(zip(couplings[1:], sent, strict=True)):
            pulls[n] = pulls[n] + coupling.down(states[n + 1], places, states[n].shape)
        return pulls

    def rest(self, drive: Tensor) -> States:
        """All blocks at zero."""
        return [drive.new_zeros(len(drive), *shape) for shape in self.shapes]

    def settling(
        self,
        drive: Tensor,
        states: States,
        couplings: Sequence[Link],
        steps: int,
        *,
        beta: float | Tensor = 0.0,
        labels: Tensor | None = None,
    ) -> Iterator[States]:
        """The states of a phase, step by step; nudged towards the labels where there are some.

        With a nudge ``β`` the step is ``s <- σ(∂(Φ - β C)/∂s)``, ``C`` the cost of a sample at its state.

        Args:
            drive: of the input.
            states: to start from.
            couplings: a `snapshot`.
            steps: how many.
            beta: ``β``, of either sign, or one a sample, (batch, 1).
            labels: (batch,).
        """
        for _ in range(steps):
            pulls = self.pull(drive, states, couplings)
            if labels is not None:
                nudge = beta * self._slope_of_cost(states[-1].flatten(1), labels)
                pulls[-1] = pulls[-1] - nudge.view(pulls[-1].shape)
            states = [(p if self.slope == 1 else self.slope * p).clamp(0, 1) for p in pulls]
            yield states

    def phase(
        self,
        drive: Tensor,
        states: States,
        couplings: Sequence[Link],
        steps: int,
        *,
        beta: float | Tensor = 0.0,
        labels: Tensor | None = None,
    ) -> States:
        """The last of the states that `settling` gives."""
        for state in self.settling(drive, states, couplings, steps, beta=beta, labels=labels):
            states = state
        return states

    # --- cost and readout ---------------------------------------------------------------------------------------------

    def read(self, states: States) -> Tensor:
        """The outputs (batch, classes) of a state."""
        if self.readout == "squared":
            return states[-1]
        outputs: Tensor = self.classifier(states[-1].flatten(1))
        return outputs

    def cost(self, states: States, labels: Tensor) -> Tensor:
        """``C``, summed over the batch: half the squared error to the one-hot label, or the cross-entropy."""
        outputs = self.read(states)
        if self.readout == "cross-entropy":
            return F.cross_entropy(outputs, labels, reduction="sum")
        return (outputs - F.one_hot(labels, outputs.shape[1])).square().sum() / 2

    def _slope_of_cost(self, last: Tensor, labels: Tensor) -> Tensor:
        """``∂C/∂s`` at the last block, (batch, units)."""
        if self.readout == "squared":
            return last - F.one_hot(labels, last.shape[1])
        outputs: Tensor = self.classifier(last)
        error = outputs.softmax(1) - F.one_hot(labels, outputs.shape[1])
        return error @ self.classifier.get_parameter("weight")

    @torch.no_grad()
    def curve(self, x: Tensor, labels: Tensor, steps: int) -> Tensor:
        """How many of the predictions are right after each of `steps` steps of the free phase, (steps,)."""
        couplings = self.snapshot()
        drive = self.drive(x, couplings)
        right = [
            (self.read(states).argmax(1) == labels).sum()
            for states in self.settling(drive, self.rest(drive), couplings, steps)
        ]
        return torch.stack(right)

    # --- what can be certified ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def certifiable(self) -> nn.Sequential:
        """The net as supported operations: what the input sends, an `Equilibrium` of all blocks, a linear readout.

        Its outputs are those of the steady state, which the free phase of a net without a margin need not reach. The
        slope of the activation stands in the weights.

        Raises:
            ModelError: max pooling above the first convolution, whose feedback jumps where two units tie; or one block,
                which has no feedback.
        """
        links = self.snapshot()
        if len(links) < 2:
            raise ModelError("one block has no feedback, and is no equilibrium; give the net two blocks or more")
        if any(link.pooled for link in links[1:]):
            raise ModelError(
                "max pooling above the first convolution sends its feedback to the winner, which jumps where two units "
                'tie: no Lipschitz constant, no gauge, no certificate; train with pool = "average" or "stride" '
                '(first_pool = "max" may stay)'
            )
        first, *rest = [
            replace(link, weight=self.slope * link.weight, bias=self.slope * link.bias).module() for link in links
        ]
        layers: list[nn.Module] = [self.stem] if isinstance(self.stem, Normalize) else []
        layers += [nn.Flatten()] if isinstance(first, nn.Linear) else []
        layers += [first, *([nn.MaxPool2d(2)] if links[0].pooled else [])]
        biases = [
            layer.get_parameter("bias").repeat_interleave(math.prod(shape[1:]))
            for layer, shape in zip(rest, self.shapes[1:], strict=True)
        ]
        for layer in rest:
            layer.bias = None  # injected instead
        fusion = FeedbackFusion(self.shapes, rest)
        layers += [Embed(torch.cat(biases)), Equilibrium(fusion, nn.Identity(), "hard-sigmoid")]
        units, last = sum(map(math.prod, self.shapes)), math.prod(self.shapes[-1])
        if self.readout == "squared":
            weight, bias = torch.eye(last, dtype=links[-1].weight.dtype, device=links[-1].weight.device), None
        else:
            weight, bias = (self.classifier.get_parameter(name) for name in ("weight", "bias"))
        layers.append(linear(F.pad(weight, (units - last, 0)), bias))
        model = nn.Sequential(*layers)
        model.input_shape, model.pixel_range = self.input_shape, self.pixel_range  # type: ignore[assignment]  # attributes
        return model.eval()

    # --- a general DEQ ------------------------------------------------------------------------------------------------

    @property
    def free_steps(self) -> int:
        """Of the free phase, at most."""
        return self.solver.max_steps

    @property
    def attack_steps(self) -> tuple[int, ...]:
        """From as many steps as information needs to cross the layers, doubling, below `free_steps`."""
        first = len(self.shapes) + 1
        doubling = (first * 2**k for k in range(self.free_steps.bit_length()))
        return tuple(n for n in doubling if n < self.free_steps)

    def inject(self, x: Tensor) -> Injected:
        return {"v": self.drive(x, self.snapshot())}

    def start(self, injected: Injected) -> Tensor:
        v = injected["v"]
        return v.new_zeros(len(v), sum(map(math.prod, self.shapes)))

    def step(self, z: Tensor, injected: Injected) -> Tensor:
        return self.join(self.phase(injected["v"], self.split(z), self.snapshot(), 1))

    def head(self, z: Tensor, injected: Injected) -> Tensor:
        return self.read(self.split(z))

    def final(self, injected: Injected, gradient: Gradient | None = None) -> Tensor:
        if self.margin or gradient is not None:
            return super().final(injected, gradient)
        if not torch.is_grad_enabled() and self.solver.tol:
            return self.settle(injected)
        v = injected["v"]
        return self.join(self.phase(v, self.rest(v), self.snapshot(), self.free_steps))

    def extra_repr(self) -> str:
        # What a run is told apart by, besides the weights.
        return (
            f"slope={self.slope:g}, readout={self.readout}, pools={self.pools}, free_steps={self.free_steps}, "
            f"tol={self.solver.tol}, margin={self.margin:g}"
        )

    def split(self, z: Tensor) -> States:
        """A flat state, (batch, units), as its blocks."""
        parts = torch.split(z, [math.prod(shape) for shape in self.shapes], 1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, states: States) -> Tensor:
        """The blocks as a flat state."""
        return torch.cat([s.flatten(1) for s in states], 1)


def mnist() -> EPNet:
    """The net of ``recipes/equilibrium-propagation/mnist.toml``, for ``verideq attack verideq.models.epnet:mnist``."""
    return EPNet((1, 28, 28), 10, channels=(32,), kernel=5, free_steps=6)


def mnist_gauge() -> EPNet:
    """The net of ``recipes/equilibrium-propagation/mnist-gauge.toml``, likewise."""
    return EPNet((1, 28, 28), 10, channels=(), hidden=(256,), free_steps=8, pool="none", margin=0.05)


def cifar10() -> EPNet:
    """The EP-CNN of ``recipes/equilibrium-propagation/cifar10.toml``, likewise: the sizes of Laborieux et al."""
    return EPNet(
        (3, 32, 32),
        10,
        channels=(128, 256, 512, 512),
        paddings=(1, 1, 1, 0),
        activation="half",
        readout="cross-entropy",
        free_steps=250,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.6069, 0.5982, 0.603),
    )
