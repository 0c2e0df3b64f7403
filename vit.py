"""The vision transformer, with labels that move beside the tokens.

ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) in the sizes of DeiT (Touvron et al. 2021, arXiv
2012.12877). Parameters carry the official names, so DeiT's and timm's files load as they are:

    model = deit_small()
    model.load_state_dict(model.adapt(torch.load("deit_small_patch16_224.pth")["model"]))

    logits = model(images)                      # as any classifier
    logits, aligned = model(images, labels)     # and the label that arrives where the head reads

The lines that concern labels stand beside the lines that they mirror and call the rules in
`tl_align.py`; copy the two files together.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import tl_align


class Attention(nn.Module):
    """Multi-head self-attention: the one place where content moves from token to token.

    The explicit form is the definition; the fused one gives the same up to rounding, and under bf16 rounds
    the labels that an attention moves to bf16 too. `fused=None` takes it on CUDA, so that no N x N matrix
    is stored for the backward pass, and the explicit form elsewhere: there the labels reuse the matrix
    that the tokens made, where the fused form computes it again for them (`experiments/cost.py`).
    """

    def __init__(self, dim, heads, fused=None):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, labels=None, rows=None):
        """x: (B, N, dim). labels: (B, N, K). rows: of how many tokens, from the first, the outcome is
        wanted; None for all. Returns (B, rows, dim) and (B, rows, K)."""
        q, k, v = self.project(x, rows)
        fused = x.is_cuda if self.fused is None else self.fused
        if not fused:
            attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, h, rows, N)
            x = attention @ v  # (B, h, rows, d)
            if labels is not None:
                labels = tl_align.align(labels, attention)
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # (B, h, rows, d)
            if labels is not None:
                labels = tl_align.align_fused(labels, q, k)
        return self.proj(rearrange(x, "b h n d -> b n (h d)")), labels

    def project(self, x, rows=None):
        """Queries of the first rows, (B, h, rows, d), keys and values of all, (B, h, N, d)."""
        if rows is None:
            return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        w, b, dim = self.qkv.weight, self.qkv.bias, x.shape[-1]
        q, kv = F.linear(x[:, :rows], w[:dim], b[:dim]), F.linear(x, w[dim:], b[dim:])
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return q, k, v

    @torch.no_grad()
    def class_attention(self, x):
        """How much the class token looks at each patch, averaged over heads: (B, N - 1)."""
        q, k, _ = self.project(x, rows=1)
        attention = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, h, 1, N)
        return attention[:, :, 0, 1:].mean(1)


class Block(nn.Module):
    def __init__(self, dim, heads, fused=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )

    def forward(self, x, labels=None, keep=(1, 1), rows=None):
        """keep: what stochastic depth (Huang et al. 2016) multiplies the two branches with. rows: how many
        tokens, from the first, are read after this block; None for all."""
        moved, labels = self.attn(self.norm1(x), labels, rows)  # tokens and labels move together
        x = x[:, :rows] + keep[0] * moved  # the labels' half of this residual is in `tl_align.align`
        x = x + keep[1] * self.mlp(self.norm2(x))  # token by token: labels stay
        return x, labels


def waves(side, dim):
    """Where each of side x side patches is, row by row: sines and cosines of its row and column, (N, dim)."""
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2)
    angle = (at[:, :, None] * 1e4 ** -torch.arange(0, 1, 4 / dim)).flatten(1)  # (N, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]


def resize_positions(embedding, size, extra):
    """Position embeddings (1, extra + N, dim) of a square grid fitted to one of size (rows, columns), bicubic
    as DeiT does it. The first `extra`, a class token's, stay, as does what is of this size or not square."""
    token, grid = embedding.tensor_split([extra], dim=1)
    side = round(grid.shape[1] ** 0.5)
    if side**2 != grid.shape[1] or size == (side, side):
        return embedding
    grid = rearrange(grid, "1 (h w) d -> 1 d h w", h=side).float()
    grid = F.interpolate(grid, size, mode="bicubic", align_corners=False)
    return torch.cat([token, rearrange(grid, "1 d h w -> 1 (h w) d").to(token.dtype)], dim=1)


class ViT(nn.Module):
    """img_size and patch_size are in pixels, dim is the width of a token, drop_path the rate of the
    last block (it grows from 0). pool is what the head reads: "cls", the class token, or "avg", the
    mean of all patches, and then there is no class token. fused: see `Attention`.

    Raises ValueError when patches do not tile the image.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        num_classes=1000,
        dim=192,
        depth=12,
        heads=3,
        drop_path=0.0,
        pool="cls",
        fused=None,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"patches of {patch_size} px do not tile an image of {img_size} px")
        if pool not in ("cls", "avg"):
            raise ValueError(f'pool is "cls" or "avg", got {pool!r}')
        self.img_size, self.patch_size = img_size, patch_size
        self.depth, self.drop_path, self.pool = depth, drop_path, pool
        tokens = (img_size // patch_size) ** 2 + (pool == "cls")
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        if pool == "cls":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, fused) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        wide = dim > 128  # as DeiT starts; narrow layers want larger weights, and keep torch's own
        for name, p in self.named_parameters():
            if name.endswith("_token") or name == "pos_embed" or (wide and p.dim() == 2):
                nn.init.trunc_normal_(p, std=0.02)
            elif wide and name.endswith("bias") and "patch_embed" not in name:
                nn.init.zeros_(p)
        if not wide:
            self.pos_embed.data[0, pool == "cls" :] = waves(img_size // patch_size, dim)

    def forward(self, images, labels=None, *, looks=False, rand=None):
        """Logits, and where labels are given the label of what the head reads.

        images: (B, 3, img_size, img_size). labels: (B, N, K), of each patch, row by row.
        looks: give instead how much the class token looks at each patch in the last block, (B, N).
        rand: (B, depth, 2), uniform in [0, 1): which branches drop path drops in training, for
        callers whose runs must repeat; drawn here if None.
        Returns (B, num_classes), or that and (B, K). Raises ValueError for any other shape.
        """
        self._check(images, labels)
        x, layers, before = self._trunk(images, labels, rand, rows=1 if self.pool == "cls" else None)
        logits = self.head(self._read(x))
        if looks:
            if self.pool != "cls":
                raise ValueError('there is no class token to look: pool="avg" has none')
            last = self.blocks[-1]
            return logits, last.attn.class_attention(last.norm1(before))
        return logits if labels is None else (logits, self._read(layers[-1]))

    def layer_labels(self, images, labels):
        """The labels after the embedding and after each block, for pictures and experiments: a list
        of depth + 1 pairs, the patches' labels as a map (B, H, W, K) and, (B, K), the label that the
        head would find if it read there."""
        side, extra = self.img_size // self.patch_size, self.pool == "cls"
        self._check(images, labels)
        _, layers, _ = self._trunk(images, labels)
        return [(rearrange(y[:, extra:], "b (h w) k -> b h w k", h=side), self._read(y)) for y in layers]

    def features(self, images, *, rand=None):
        """The patches' tokens at the end as a map, for dense prediction: (B, dim, H / patch, W / patch).

        images: (B, 3, H, W), of any sides that patches tile; position embeddings are resized to them.
        rand: as in `forward`. Raises ValueError where patches do not tile the images.
        """
        if images.dim() != 4 or images.shape[1] != 3 or any(n % self.patch_size for n in images.shape[2:]):
            expected = f"(B, 3, H, W) with sides that are multiples of {self.patch_size}"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        size, extra = tuple(n // self.patch_size for n in images.shape[2:]), int(self.pool == "cls")
        positions = resize_positions(self.pos_embed, size, extra)
        x, _, _ = self._trunk(images, None, rand, positions=positions)
        return rearrange(x[:, extra:], "b (h w) d -> b d h w", h=size[0])

    def _read(self, x):
        """What the head sees of tokens or labels (B, N, ...)."""
        return x[:, 0] if self.pool == "cls" else x.mean(1)

    def _trunk(self, images, labels, rand=None, rows=None, positions=None):
        """Tokens at the end, labels after each block, and the tokens before the last block, which computes
        nothing but the first rows of tokens: a class token is all that its head reads."""
        x, y = rearrange(self.patch_embed(images), "b d h w -> b (h w) d"), labels
        if self.pool == "cls":
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            y = y if y is None else tl_align.add_class_token(y)
        x = x + (self.pos_embed if positions is None else positions)
        layers = [y]
        for block, keep in zip(self.blocks, self._keep(images, rand)):
            before = x
            x, y = block(x, y, keep, rows if block is self.blocks[-1] else None)
            layers.append(y)
        return self.norm(x), layers, before

    def _keep(self, images, rand):
        """What drop path multiplies each block's two branches with: 0 or 1 / (1 - rate), (B, 1, 1)."""
        if not self.training or self.drop_path == 0:
            return [(1, 1)] * self.depth
        if rand is None:
            rand = torch.rand(images.shape[0], self.depth, 2, device=images.device)
        rate = torch.linspace(0, self.drop_path, self.depth, device=images.device)[:, None]
        return rearrange(((rand >= rate) / (1 - rate)).to(images.dtype), "b depth two -> depth two b 1 1")

    def _check(self, images, labels):
        if images.shape[1:] != (3, self.img_size, self.img_size):
            expected = f"(B, 3, {self.img_size}, {self.img_size})"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        batch, tokens = images.shape[0], (self.img_size // self.patch_size) ** 2
        if labels is not None and (labels.dim() != 3 or labels.shape[:2] != (batch, tokens)):
            expected = f"({batch}, {tokens}, K), one row for each patch"
            raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")

    def adapt(self, state):
        """A checkpoint of another image size, fitted to this model's: the position embedding is
        resized, bicubic as DeiT does it. state: a dict of tensors. Returns a new one."""
        state = dict(state)
        if "pos_embed" in state:
            size = (self.img_size // self.patch_size,) * 2
            state["pos_embed"] = resize_positions(state["pos_embed"], size, int(self.pool == "cls"))
        return state


def deit_tiny(**kwargs):
    """5.7 million parameters."""
    return ViT(**{"dim": 192, "depth": 12, "heads": 3, **kwargs})


def deit_small(**kwargs):
    """22.1 million parameters."""
    return ViT(**{"dim": 384, "depth": 12, "heads": 6, **kwargs})


def deit_base(**kwargs):
    """86.6 million parameters."""
    return ViT(**{"dim": 768, "depth": 12, "heads": 12, **kwargs})


def vit_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    return ViT(**{"img_size": 32, "patch_size": 4, "dim": 64, "depth": 4, "heads": 2, **kwargs})
