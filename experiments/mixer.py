"""MLP-Mixer, with labels that move beside the tokens: no attention, and the same rule.

Tolstikhin et al. 2021, arXiv 2105.01601. Parameters carry timm's names, so its files load as they are.

    logits = mixer_small()(images)              # as any classifier
    logits, aligned = model(images, labels)     # and the label that arrives where the head reads

What mixes tokens here is an MLP over the positions, the same for every image and every channel,
W2 gelu(W1 x). Its activations differ from channel to channel, where an attention is one matrix for a
head; so labels move by what the weights allow at most: `A = |W2| |W1|`, rows summing to one, without
gradient, and `Y = (Y + A @ Y) / 2` as after an attention. Copy it with `vit.py` and `tl_align.py`.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import tl_align  # noqa: E402
import vit  # noqa: E402


def mlp(width, hidden):
    layers = {"fc1": nn.Linear(width, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, width)}
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = mlp(tokens, dim // 2)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = mlp(dim, 4 * dim)

    def forward(self, x, labels=None, keep=(1, 1)):
        """x: (B, N, dim). labels: (B, N, K). keep: what stochastic depth multiplies the branches with."""
        moved = self.mlp_tokens(self.norm1(x).mT).mT  # from position to position, each channel by itself
        if labels is not None:
            labels = tl_align.align(labels, self.matrix()[None])  # one head
        x = x + keep[0] * moved  # the labels' half of this residual is in `tl_align.align`
        x = x + keep[1] * self.mlp_channels(self.norm2(x))  # token by token: labels stay
        return x, labels

    @torch.no_grad()
    def matrix(self):
        """How much of token j may end in token i, (N, N); rows sum to one."""
        w1, w2 = self.mlp_tokens.fc1.weight.abs(), self.mlp_tokens.fc2.weight.abs()
        with torch.autocast(w1.device.type, enabled=False):  # in bf16 they would not
            a = w2 @ w1
        return a / a.sum(-1, keepdim=True)


class Mixer(vit.ViT):
    """A ViT of average pooling with other blocks, and no position embedding: a token MLP has weights for each
    position, so images are of img_size alone. Settings, methods and errors are a ViT's."""

    def __init__(self, img_size=224, patch_size=16, num_classes=1000, dim=512, depth=8, drop_path=0.0):
        nn.Module.__init__(self)
        if img_size % patch_size:
            raise ValueError(f"patches of {patch_size} px do not tile an image of {img_size} px")
        self.img_size, self.patch_size = img_size, patch_size
        self.depth, self.drop_path, self.pool = depth, drop_path, "avg"
        self.stem = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.blocks = nn.ModuleList(Block(dim, (img_size // patch_size) ** 2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if dim > 128:  # as timm's starts, but for the stem; narrow layers keep torch's own, as in `vit.py`
            for name, p in self.blocks.named_parameters():
                if "mlp" in name:
                    nn.init.xavier_uniform_(p) if p.dim() == 2 else nn.init.normal_(p, std=1e-6)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def features(self, images, *, rand=None):
        """The tokens at the end as a map, (B, dim, H / patch, W / patch), of images of img_size."""
        self._check(images, None)
        x, *_ = self._trunk(images, None, rand)
        return rearrange(x, "b (h w) d -> b d h w", h=self.img_size // self.patch_size)

    def _trunk(self, images, labels, rand=None, rows=None):
        """Tokens at the end, labels after each block, and nothing else: no class token looks."""
        x, layers = rearrange(self.stem(images), "b d h w -> b (h w) d"), [labels]
        for block, keep in zip(self.blocks, self._keep(images, rand)):
            x, labels = block(x, labels, keep)
            layers.append(labels)
        return self.norm(x), layers, None


def mixer_small(**kwargs):
    """18.5 million parameters."""
    return Mixer(**{"dim": 512, "depth": 8, **kwargs})


def mixer_base(**kwargs):
    """59.9 million parameters."""
    return Mixer(**{"dim": 768, "depth": 12, **kwargs})


def mixer_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    return Mixer(**{"img_size": 32, "patch_size": 4, "dim": 64, "depth": 4, **kwargs})
