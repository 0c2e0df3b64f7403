"""ConvNeXt with token labels.

ConvNeXt (Liu et al. 2022, arXiv 2201.03545) has no attention: information moves between tokens in a
depthwise convolution, one kernel for each channel. The labels are convolved with the kernels'
absolute values, averaged over the channels, as an attention is averaged over heads. Scaled to sum
to one over the positions inside the image, these weights are A, and Y = (Y + A @ Y) / 2. Where
tokens are merged or pooled, labels are averaged.

Tokens and labels are maps here, as in `swin.py`: (B, H, W, C) and (B, H, W, K). Parameters have the
official names, so Meta's checkpoints load directly. Copy this file with `swin.py` and
`tl_align.py`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import swin
import tl_align


def attend(labels, kernel):
    """A @ Y, where A is what a depthwise convolution moves between tokens. Without gradient.

    labels: (B, H, W, K) or None. kernel: (C, 1, k, k) with an odd k. Returns (B, H, W, K).
    """
    if labels is None:
        return None
    weights = kernel.detach().abs().mean(0, keepdim=True).to(labels.dtype)  # (1, 1, k, k)
    padding = kernel.shape[-1] // 2
    y = rearrange(labels, "b h w k -> (b k) 1 h w")
    with torch.autocast(labels.device.type, enabled=False):  # keep the labels in float32
        moved = F.conv2d(y, weights, padding=padding)
        total = F.conv2d(torch.ones_like(y[:1]), weights, padding=padding)  # less at the border
    return rearrange(moved / total, "(b k) 1 h w -> b h w k", b=len(labels))


class Block(nn.Module):
    """A depthwise convolution, then an MLP, in one residual branch. layer_scale: the initial
    weight of the branch."""

    def __init__(self, dim, layer_scale):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, labels=None):
        """x: (B, H, W, dim). labels: (B, H, W, K) or None."""
        x = x + self.branch(x)
        labels = tl_align.residual(labels, attend(labels, self.dwconv.weight))
        return x, labels

    def branch(self, x):
        x = convolve(self.dwconv, x)  # moves information between tokens
        x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))  # acts on each token separately
        return self.gamma * x


def convolve(conv, x):
    """Apply a convolution to a map with channels last, (B, H, W, C)."""
    return rearrange(conv(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")


class Downsample(nn.Sequential):
    """Merge 2 x 2 tokens into one of twice the width. Its label is the mean of their labels."""

    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim, eps=1e-6), nn.Conv2d(dim, 2 * dim, 2, stride=2))

    def forward(self, x, labels=None):
        """x: (B, H, W, dim). labels: (B, H, W, K) or None.
        Returns (B, H / 2, W / 2, 2 dim) and (B, H / 2, W / 2, K), rounded down."""
        norm, conv = self
        x = convolve(conv, norm(x))
        if labels is not None:
            labels = F.avg_pool2d(rearrange(labels, "b h w k -> b k h w"), 2)
            labels = rearrange(labels, "b k h w -> b h w k")
        return x, labels


class ConvNeXt(nn.Module):
    """An image classifier that can propagate token labels. The default sizes are ConvNeXt-T's.

    embed_dim is the width of a token in the first stage, doubled in each of the next ones. depths
    has one entry per stage. layer_scale: see `Block`. The other arguments and the errors are those
    of `swin.Swin`. Initial weights are PyTorch's defaults.
    """

    check_shapes = swin.Swin.check_shapes

    def __init__(
        self,
        img_size=224,
        patch_size=4,
        num_classes=1000,
        embed_dim=96,
        depths=(3, 3, 9, 3),
        layer_scale=1e-6,
    ):
        super().__init__()
        tl_align.check_tiling((img_size, img_size), patch_size)
        self.img_size = img_size
        self.patch_size = patch_size
        self.depth = sum(depths)
        patch_conv = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        stem = nn.Sequential(patch_conv, nn.LayerNorm(embed_dim, eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            if i > 0:
                self.downsample_layers.append(Downsample(dim // 2))
            self.stages.append(nn.ModuleList(Block(dim, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images, labels=None, rand=None):
        """Class logits and, if labels are given, the mean label of all tokens.

        Arguments, shapes and errors as for `swin.Swin.forward`. rand, which train.py passes, is
        ignored: there is no drop path.
        """
        x, labels = self.embed(images, labels)
        for layer in self.layers():
            x, labels = layer(x, labels)
        logits = self.head(self.norm(x.mean((1, 2))))
        return logits if labels is None else (logits, labels.mean((1, 2)))

    def layers(self):
        """A list of all blocks and of what downsamples between stages, in their order."""
        layers = [*self.stages[0]]
        for downsample, blocks in zip(self.downsample_layers[1:], self.stages[1:], strict=True):
            layers += [downsample, *blocks]
        return layers

    def embed(self, images, labels=None):
        """Tokens (B, H, W, embed_dim) and their labels (B, H, W, K) before the first block."""
        self.check_shapes(images, labels)
        height = images.shape[2] // self.patch_size
        patch_conv, norm = self.downsample_layers[0]
        x = norm(rearrange(patch_conv(images), "b d h w -> b h w d"))
        labels = None if labels is None else rearrange(labels, "b (h w) k -> b h w k", h=height)
        return x, labels


def convnext_micro(**kwargs):
    """0.1 million parameters. Keyword arguments are those of `ConvNeXt`."""
    micro = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2)}
    return ConvNeXt(**{**micro, "layer_scale": 1.0, **kwargs})
