"""ConvNeXt, with labels that move beside the tokens: no attention, and the same rule.

Liu et al. 2022, arXiv 2201.03545. Parameters carry the official names, so Meta's files load as they are.

What mixes tokens here is a convolution of each channel by itself. Labels move by its kernel's absolute
values, averaged over the channels, where an attention is averaged over heads: A is this one kernel at
every place, its weights summing to one over the tokens that are there, and `Y = (Y + A @ Y) / 2`. Where
tokens are merged or pooled, labels are averaged. Copy it with `swin.py` and `tl_align.py`.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import swin  # noqa: E402


def align(labels, kernel):
    """Y = (Y + A @ Y) / 2, A what a depthwise convolution moves, without gradient. labels: (B, H, W, K).
    kernel: (C, 1, k, k), k odd. Returns (B, H, W, K)."""
    weights = kernel.detach().abs().mean(0, keepdim=True).to(labels.dtype)  # (1, 1, k, k)
    with torch.autocast(labels.device.type, enabled=False):
        y = rearrange(labels, "b h w k -> (b k) 1 h w")
        around = lambda t: F.conv2d(t, weights, padding=kernel.shape[-1] // 2)
        moved = around(y) / around(torch.ones_like(y[:1]))  # over the border there is nothing
    return (labels + rearrange(moved, "(b k) 1 h w -> b h w k", b=len(labels))) / 2


class Block(nn.Module):
    def __init__(self, dim, scale):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x, labels=None, keep=1):
        """x: (B, H, W, dim). labels: (B, H, W, K). keep: what stochastic depth multiplies the branch with."""
        moved = self.dwconv(x.movedim(-1, 1)).movedim(1, -1)  # from neighbour to neighbour
        if labels is not None:
            labels = align(labels, self.dwconv.weight)
        moved = self.pwconv2(F.gelu(self.pwconv1(self.norm(moved))))  # token by token: labels stay
        return x + keep * self.gamma * moved, labels  # the labels' half of this residual is in `align`


class Down(nn.Sequential):
    """A norm, and a convolution that makes one of 2 x 2 tokens; its label is the mean of theirs."""

    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim, eps=1e-6), nn.Conv2d(dim, 2 * dim, 2, 2))

    def forward(self, x, labels=None):
        x = self[1](self[0](x).movedim(-1, 1)).movedim(1, -1)  # cuts off the border of an odd map
        return x, labels if labels is None else F.avg_pool2d(labels.movedim(-1, 1), 2).movedim(1, -1)


class ConvNeXt(swin.Swin):
    """dim is the width of a token in the first stage, doubled with each; depths have an entry a stage; scale
    is that of each branch at the start. Else a Swin's settings, methods and errors, but that odd maps are
    rounded down."""

    adapt = staticmethod(dict)  # a checkpoint fits as it is

    def __init__(self, dim, depths, img_size=224, patch_size=4, num_classes=1000, drop_path=0.0, scale=1e-6):
        nn.Module.__init__(self)
        if img_size % patch_size:
            raise ValueError(f"patches of {patch_size} px do not tile an image of {img_size} px")
        self.img_size, self.patch_size = img_size, patch_size
        self.depth, self.drop_path = sum(depths), drop_path
        dims = [dim * 2**i for i in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(3, dim, patch_size, patch_size), nn.LayerNorm(dim, eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem, *map(Down, dims[:-1])])
        blocks = lambda dim, depth: nn.ModuleList(Block(dim, scale) for _ in range(depth))
        self.stages = nn.ModuleList(map(blocks, dims, depths))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        # As Meta's starts; narrow layers keep torch's own, as in `swin.py`.
        for name, p in self.named_parameters() if dim >= 96 else ():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, images, labels=None, *, rand=None):
        """As a Swin's, but that the norm comes after the average."""
        x, layers, _ = self._trunk(images, labels, rand)
        logits = self.head(self.norm(x.mean((1, 2))))
        return logits if labels is None else (logits, layers[-1].mean((1, 2)))

    def features(self, images, *, rand=None):
        """As a Swin's."""
        x, _, maps = self._trunk(images, None, rand)
        return [m.movedim(-1, 1) for m in (*maps[:-1], self.norm(x))]

    def _trunk(self, images, labels, rand=None):
        """The last map, labels after each block, and the map at the end of each stage."""
        self._check(images, labels)
        stem, height = self.downsample_layers[0], images.shape[2] // self.patch_size
        x = stem[1](stem[0](images).movedim(1, -1))
        y = labels if labels is None else rearrange(labels, "b (h w) k -> b h w k", h=height)
        layers, maps, keep = [y], [], iter(self._keep(images, rand))
        for i, stage in enumerate(self.stages):
            if i > 0:
                x, y = self.downsample_layers[i](x, y)
            for block in stage:
                x, y = block(x, y, next(keep)[0])
                layers.append(y)
            maps.append(x)
        return x, layers, maps


def convnext_tiny(**kwargs):
    """28.6 million parameters."""
    return ConvNeXt(**{"dim": 96, "depths": (3, 3, 9, 3), **kwargs})


def convnext_small(**kwargs):
    """50.2 million parameters."""
    return ConvNeXt(**{"dim": 96, "depths": (3, 3, 27, 3), **kwargs})


def convnext_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    return ConvNeXt(**{"img_size": 32, "patch_size": 2, "dim": 32, "depths": (2, 2), "scale": 1.0, **kwargs})
