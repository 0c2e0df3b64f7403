"""MLP-Mixer, with labels that move beside the tokens: no attention, and the same rule.

Tolstikhin et al. 2021, arXiv 2105.01601. Parameters carry timm's names, so its files load as they
are.

    logits = mixer_small()(images)              # as any classifier
    logits, aligned = model(images, labels)     # and the label that arrives where the head reads

What mixes tokens here is an MLP over the positions, the same for every image and every channel, W2
gelu(W1 x). Its activations differ from channel to channel, where an attention is one matrix for a
head; so labels move by what the weights allow at most: `A = |W2| |W1|`, rows summing to one,
without gradient, and `Y = (Y + A @ Y) / 2` as after an attention. Copy it with `vit.py` and
`tl_align.py`.
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
    def __init__(self, dim, tokens, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_tokens = mlp(tokens, dim // 2)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_channels = mlp(dim, 4 * dim)
        self.drop_path = vit.DropPath(drop_path)

    def forward(self, x, labels=None, rand=(None, None)):
        """x: (B, N, dim). labels: (B, N, K) or None. rand: for drop path, (B,) for each of the two
        branches."""
        mixed = self.mlp_tokens(self.norm1(x).mT).mT  # between positions, each channel by itself
        mixed_labels = tl_align.attend(labels, self.matrix()[None])  # as of one head

        x = x + self.drop_path(mixed, rand[0])
        labels = tl_align.residual(labels, mixed_labels)  # Y = (Y + A @ Y) / 2

        x = x + self.drop_path(self.mlp_channels(self.norm2(x)), rand[1])
        # The second MLP acts on each token separately: labels are unchanged.
        return x, labels

    @torch.no_grad()
    def matrix(self):
        """How much of token j may end in token i, (N, N); rows sum to one."""
        w1, w2 = self.mlp_tokens.fc1.weight.abs(), self.mlp_tokens.fc2.weight.abs()
        with torch.autocast(w1.device.type, enabled=False):  # in bf16 they would not
            a = w2 @ w1
        return a / a.sum(-1, keepdim=True)


class Mixer(nn.Module):
    """No position embedding: a token MLP has weights for each position, so images are of img_size
    alone. The head reads the average of all tokens. Settings, methods and errors are a ViT's."""

    check_shapes = vit.ViT.check_shapes

    def __init__(
        self, img_size=224, patch_size=16, num_classes=1000, dim=512, depth=8, drop_path_rate=0.0
    ):
        super().__init__()
        tl_align.check_tiling((img_size, img_size), patch_size)
        self.img_size, self.patch_size, self.depth = img_size, patch_size, depth
        self.grid_size = img_size // patch_size
        self.stem = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(dim, self.grid_size**2, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if (
            dim > 128
        ):  # as timm's starts, but for the stem; narrow layers learn better from torch's own
            for name, p in self.blocks.named_parameters():
                if "mlp" in name:
                    nn.init.xavier_uniform_(p) if p.dim() == 2 else nn.init.normal_(p, std=1e-6)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images, labels=None, rand=None):
        """As a ViT's, but the label is the mean of all tokens' labels."""
        x, labels = self.embed(images, labels)
        if rand is None:
            block_rand = [(None, None)] * self.depth
        else:
            block_rand = rand.permute(1, 2, 0)  # (depth, 2, B)
        for i, block in enumerate(self.blocks):
            x, labels = block(x, labels, block_rand[i])
        logits = self.head(self.norm(x).mean(1))
        return logits if labels is None else (logits, labels.mean(1))

    def embed(self, images, labels=None):
        """Tokens (B, N, dim) and their labels (B, N, K) before the first block."""
        self.check_shapes(images, labels)
        return rearrange(self.stem(images), "b d h w -> b (h w) d"), labels

    def intermediate_labels(self, images, labels):
        """As a ViT's, with the mean of all labels in the place of the class token's."""
        x, labels = self.embed(images, labels)
        layers = [labels]
        for block in self.blocks:
            x, labels = block(x, labels)
            layers.append(labels)
        side = self.grid_size
        return [(rearrange(y, "b (h w) k -> b h w k", h=side), y.mean(1)) for y in layers]

    def convert_state_dict(self, state):
        """A checkpoint fits as it is."""
        return dict(state)


def mixer_small(**kwargs):
    """18.5 million parameters."""
    return Mixer(**{"dim": 512, "depth": 8, **kwargs})


def mixer_base(**kwargs):
    """59.9 million parameters."""
    return Mixer(**{"dim": 768, "depth": 12, **kwargs})


def mixer_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    return Mixer(**{"img_size": 32, "patch_size": 4, "dim": 64, "depth": 4, **kwargs})
