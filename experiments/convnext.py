"""ConvNeXt, with labels that move beside the tokens: no attention, and the same rule.

Liu et al. 2022, arXiv 2201.03545. Parameters carry the official names, so Meta's files load as they
are.

What mixes tokens here is a convolution of each channel by itself. Labels move by its kernel's
absolute values, averaged over the channels, where an attention is averaged over heads: A is this
one kernel at every place, its weights summing to one over the tokens that are there, and `Y = (Y +
A @ Y) / 2`. Where tokens are merged or pooled, labels are averaged. Copy it with `swin.py` and
`tl_align.py`.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import swin  # noqa: E402
import tl_align  # noqa: E402


def attend(labels, kernel):
    """A @ Y, A what a depthwise convolution moves, without gradient. labels: (B, H, W, K) or None.
    kernel: (C, 1, k, k), k odd. Returns (B, H, W, K)."""
    if labels is None:
        return None
    weights = kernel.detach().abs().mean(0, keepdim=True).to(labels.dtype)  # (1, 1, k, k)
    padding = kernel.shape[-1] // 2
    with torch.autocast(labels.device.type, enabled=False):
        y = rearrange(labels, "b h w k -> (b k) 1 h w")
        inside = F.conv2d(
            torch.ones_like(y[:1]), weights, padding=padding
        )  # no tokens over the border
        y = F.conv2d(y, weights, padding=padding) / inside
    return rearrange(y, "(b k) 1 h w -> b h w k", b=len(labels))


class Block(nn.Module):
    def __init__(self, dim, scale, drop_path=0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), scale))
        self.drop_path = swin.DropPath(drop_path)

    def forward(self, x, labels=None, rand=None):
        """x: (B, H, W, dim). labels: (B, H, W, K) or None. rand: for drop path, (B,)."""
        mixed = self.dwconv(x.movedim(-1, 1)).movedim(1, -1)  # between neighbours
        mixed_labels = attend(labels, self.dwconv.weight)

        # The linear layers act on each token separately: labels are unchanged.
        mixed = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(mixed))))

        x = x + self.drop_path(mixed, rand)
        labels = tl_align.residual(labels, mixed_labels)  # Y = (Y + A @ Y) / 2
        return x, labels


class Down(nn.Sequential):
    """A norm, and a convolution that makes one of 2 x 2 tokens; its label is the mean of theirs."""

    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim, eps=1e-6), nn.Conv2d(dim, 2 * dim, 2, 2))

    def forward(self, x, labels=None):
        x = self[1](self[0](x).movedim(-1, 1)).movedim(1, -1)  # cuts off the border of an odd map
        if labels is not None:
            labels = F.avg_pool2d(labels.movedim(-1, 1), 2).movedim(1, -1)
        return x, labels


class ConvNeXt(nn.Module):
    """dim is the width of a token in the first stage, doubled with each; depths have an entry a
    stage; scale is that of each branch at the start. Else a Swin's settings, methods and errors,
    but that odd maps are rounded down."""

    check_shapes = swin.Swin.check_shapes

    def __init__(
        self,
        dim,
        depths,
        img_size=224,
        patch_size=4,
        num_classes=1000,
        drop_path_rate=0.0,
        scale=1e-6,
    ):
        super().__init__()
        tl_align.check_tiling((img_size, img_size), patch_size)
        self.img_size, self.patch_size, self.depth = img_size, patch_size, sum(depths)
        dims = [dim * 2**i for i in range(len(depths))]
        stem = nn.Sequential(nn.Conv2d(3, dim, patch_size, patch_size), nn.LayerNorm(dim, eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem, *map(Down, dims[:-1])])
        rates = iter(torch.linspace(0, drop_path_rate, self.depth, device="cpu").tolist())
        self.stages = nn.ModuleList()
        for width, depth in zip(dims, depths, strict=True):
            blocks = [Block(width, scale, next(rates)) for _ in range(depth)]
            self.stages.append(nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        # As Meta's starts; narrow layers learn better from torch's own.
        for name, p in self.named_parameters() if dim >= 96 else ():
            if p.dim() > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, images, labels=None, rand=None):
        """As a Swin's, but that the norm comes after the average."""
        x, labels = self.embed(images, labels)
        block_rand = [None] * self.depth if rand is None else rand[:, :, 0].T  # (depth, B)
        i = 0
        for downsample, stage in zip([None, *self.downsample_layers[1:]], self.stages, strict=True):
            if downsample is not None:
                x, labels = downsample(x, labels)
            for block in stage:
                x, labels = block(x, labels, block_rand[i])
                i += 1
        logits = self.head(self.norm(x.mean((1, 2))))
        return logits if labels is None else (logits, labels.mean((1, 2)))

    def embed(self, images, labels=None):
        """The maps of tokens (B, H, W, dim) and of labels (B, H, W, K) before the first block."""
        self.check_shapes(images, labels)
        conv, norm = self.downsample_layers[0]
        height = images.shape[2] // self.patch_size
        labels = None if labels is None else rearrange(labels, "b (h w) k -> b h w k", h=height)
        return norm(conv(images).movedim(1, -1)), labels

    def intermediate_labels(self, images, labels):
        """As a Swin's."""
        x, labels = self.embed(images, labels)
        layers = [labels]
        for downsample, stage in zip([None, *self.downsample_layers[1:]], self.stages, strict=True):
            if downsample is not None:
                x, labels = downsample(x, labels)
            for block in stage:
                x, labels = block(x, labels)
                layers.append(labels)
        return [(y, y.mean((1, 2))) for y in layers]

    def convert_state_dict(self, state):
        """A checkpoint fits as it is."""
        return dict(state)


def convnext_tiny(**kwargs):
    """28.6 million parameters."""
    return ConvNeXt(**{"dim": 96, "depths": (3, 3, 9, 3), **kwargs})


def convnext_small(**kwargs):
    """50.2 million parameters."""
    return ConvNeXt(**{"dim": 96, "depths": (3, 3, 27, 3), **kwargs})


def convnext_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    return ConvNeXt(
        **{"img_size": 32, "patch_size": 2, "dim": 32, "depths": (2, 2), "scale": 1.0, **kwargs}
    )
