"""MLP-Mixer with token labels.

Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) has no attention: information moves between tokens
in an MLP over the positions, W2 gelu(W1 x), which is the same for every image and every channel.
Its activations differ from channel to channel, so the labels follow the weights alone: A is
|W2| |W1| with rows scaled to sum to one, and Y = (Y + A @ Y) / 2 as after an attention. The head
reads the average of all tokens, and so does the target.

Parameters have timm's names, so timm's checkpoints load directly. Copy this file with `vit.py` and
`tl_align.py`.
"""

from collections import OrderedDict

import torch
from einops import rearrange
from torch import nn

import tl_align
import vit


class Block(nn.Module):
    """A layer with two MLPs: one over the positions of each channel, one over the channels of each
    token. num_tokens: an MLP over positions is made for this many."""

    def __init__(self, dim, num_tokens):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = mlp(num_tokens, dim // 2)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = mlp(dim, 4 * dim)

    def forward(self, x, labels=None):
        """x: (B, N, dim). labels: (B, N, K) or None."""
        x = x + self.mlp_tokens(self.norm1(x).mT).mT
        matrix = self.mixing_matrix().expand(len(x), 1, -1, -1)  # of a single head
        labels = tl_align.residual(labels, tl_align.attend(labels, matrix))  # Y = (Y + A @ Y) / 2

        x = x + self.mlp_channels(self.norm2(x))
        # The second MLP acts on each token separately: labels are unchanged.
        return x, labels

    @torch.no_grad()
    def mixing_matrix(self):
        """A = |W2| |W1|, (N, N), with rows that sum to one."""
        w1 = self.mlp_tokens.fc1.weight.abs()  # (hidden, N)
        w2 = self.mlp_tokens.fc2.weight.abs()  # (N, hidden)
        with torch.autocast(w1.device.type, enabled=False):
            matrix = w2 @ w1
        return matrix / matrix.sum(1, keepdim=True)


def mlp(width, hidden):
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
    )


class Mixer(nn.Module):
    """An image classifier that can propagate token labels. The default sizes are Mixer-S/16's.

    Arguments and errors as for `vit.ViT`. Initial weights are PyTorch's defaults.
    """

    check_shapes = vit.ViT.check_shapes

    def __init__(self, img_size=224, patch_size=16, num_classes=1000, embed_dim=512, depth=8):
        super().__init__()
        tl_align.check_tiling((img_size, img_size), patch_size)
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size  # patches per side
        self.depth = depth
        patch_conv = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.stem = nn.Sequential(OrderedDict(proj=patch_conv))
        self.blocks = nn.ModuleList(Block(embed_dim, self.grid_size**2) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images, labels=None, rand=None):
        """Class logits and, if labels are given, the mean label of all tokens.

        Arguments, shapes and errors as for `vit.ViT.forward`. rand, which train.py passes, is
        ignored: there is no drop path.
        """
        x, labels = self.embed(images, labels)
        for block in self.blocks:
            x, labels = block(x, labels)
        logits = self.head(self.norm(x).mean(1))
        return logits if labels is None else (logits, labels.mean(1))

    def embed(self, images, labels=None):
        """Tokens (B, N, embed_dim) and their labels (B, N, K) before the first block."""
        self.check_shapes(images, labels)
        return rearrange(self.stem(images), "b d h w -> b (h w) d"), labels


def mixer_micro(**kwargs):
    """0.2 million parameters. Keyword arguments are those of `Mixer`."""
    return Mixer(**{"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, **kwargs})
