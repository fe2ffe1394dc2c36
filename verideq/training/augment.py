"""Random flips and shifts of training images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from verideq.errors import RecipeError
from verideq.training.tables import AugmentTable


def augmented(
    images: Tensor, table: AugmentTable, draw: torch.Generator, least: float, part: slice, whole: int
) -> Tensor:
    """The images, each flipped and shifted by chance.

    Args:
        images: (batch, channels, height, width).
        table: what may happen.
        draw: on the CPU: what happens does not depend on the device.
        least: the value that ``fill = "zero"`` shifts in.
        part: of the whole batch that these images are: chance is drawn for all of it.
        whole: the size of that batch.

    Raises:
        RecipeError: inputs that are no images.
    """
    if images.dim() != 4:
        raise RecipeError(f"augment: expected images (channels, height, width); got {tuple(images.shape[1:])}")
    height, width = images.shape[2:]
    if table.flip:
        flipped = torch.rand(whole, generator=draw)[part] < 0.5
        images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)
    if not table.shift:
        return images
    pad = (table.shift,) * 4
    wide = F.pad(images, pad, "replicate") if table.fill == "edge" else F.pad(images, pad, value=least)
    down, right = torch.randint(0, 2 * table.shift + 1, (2, whole, 1), generator=draw)[:, part].to(images.device)
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    samples = torch.arange(len(images), device=images.device)
    # Indices of axes that are not neighbours move to the front: (batch, height, width, channels).
    chosen = wide[samples[:, None, None], :, (down + rows)[:, :, None], (right + columns)[:, None, :]]
    return chosen.permute(0, 3, 1, 2).contiguous()
