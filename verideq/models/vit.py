"""`ViT`: a vision transformer (Dosovitskiy et al., ICLR 2021), the third model that an `EPNet` is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from verideq.errors import InputError
from verideq.graph import Normalize


class ViT(nn.Module):
    """Patches as tokens, layers of self-attention with the norms first, and a linear layer that reads the class token.

    Nothing of it can be certified here: it is attacked as it stands. Mansingh et al. take 7 layers, 12 heads and
    patches of 4×4.

    Args:
        input_shape: (channels, height, width).
        classes: outputs.
        layers: of attention.
        heads: a layer.
        width: of a token, a multiple of `heads`.
        patch: side of a patch, which divides the image.
        expansion: of the dense layers between.
        dropout: in training.
        mean: normalisation by channel; empty for none.
        std: likewise.

    Raises:
        InputError: sizes that do not fit.

    >>> ViT((1, 8, 8), 3, width=8, heads=2)(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        *,
        layers: int = 3,
        heads: int = 4,
        width: int = 64,
        patch: int = 4,
        expansion: int = 2,
        dropout: float = 0.0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
    ) -> None:
        super().__init__()
        sizes = (layers, heads, width, patch, expansion)
        if len(input_shape) != 3 or min(sizes) < 1 or width % heads or any(n % patch for n in input_shape[1:]):
            raise InputError(
                f"a ViT takes images whose sides are multiples of the patch, and a width that is one of the heads; got "
                f"{tuple(input_shape)}, patch {patch}, width {width}, heads {heads}, layers {layers}"
            )
        tokens = (input_shape[1] // patch) * (input_shape[2] // patch)
        self.stem = Normalize(list(mean), list(std)) if len(mean) else nn.Identity()
        self.patches = nn.Conv2d(input_shape[0], width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, tokens + 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, expansion * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)
        self.input_shape, self.pixel_range = tuple(input_shape), (0.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.stem(x)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(tokens), -1, -1), tokens), 1) + self.places
        for layer in self.layers:
            tokens = layer(tokens)
        outputs: Tensor = self.classifier(self.norm(tokens[:, 0]))
        return outputs
