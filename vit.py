"""Vision transformer (ViT) with token labels.

ViT (Dosovitskiy et al. 2021, arXiv 2010.11929) in the sizes of DeiT (Touvron et al. 2021, arXiv
2012.12877). Parameters have the official names, so DeiT's and timm's checkpoints load directly:

    model = deit_small()
    model.load_state_dict(model.convert_state_dict(torch.load("deit_small_patch16_224.pth")["model"]))

    logits = model(images)                      # like any classifier
    logits, aligned = model(images, labels)     # also the label of what the classifier reads

Every label update is on the line below the token update that it mirrors and calls a rule of
`tl_align.py`; copy the two files together. The logits are those of the published models.
Unlike a textbook ViT, the last block computes the class token only: the head reads nothing else.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tl_align

# All but cuDNN, whose gradients can be NaN in bf16 (github.com/NVIDIA/cudnn-frontend/issues/160).
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): drop a sample's whole residual
    branch with probability `rate` during training, and scale it by 1 / (1 - rate) otherwise."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x, rand=None):
        """x: (B, ...). rand: (B,), uniform in [0, 1), for reproducible runs; drawn here if None."""
        if not self.training or self.rate == 0:
            return x
        if rand is None:
            rand = torch.rand(x.shape[0], device=x.device)
        scale = (rand >= self.rate) / (1 - self.rate)  # (B,)
        return x * scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class Attention(nn.Module):
    """Multi-head self-attention, the only place where information moves between tokens.

    There are two implementations. Explicit attention forms the matrix A and reuses it for the
    labels. Fused attention never stores A: it calls `scaled_dot_product_attention` a second
    time with the labels as values. Under bf16 the fused version rounds the labels to bf16.

    fused: True, False, or None for fused attention on CUDA and explicit attention elsewhere.
    """

    def __init__(self, dim, num_heads, fused=None):
        super().__init__()
        self.num_heads = num_heads
        self.fused = fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, labels=None, class_only=False):
        """x: (B, N, dim). labels: (B, N, K) or None. Returns A @ V after projection, and A @ Y.

        class_only: compute the first row of A only, and return (B, 1, dim) and (B, 1, K). A
        single row is small, so it is always formed.
        """
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        if class_only:
            q = q[:, :, :1]
        use_fused = x.is_cuda if self.fused is None else self.fused
        if use_fused and not class_only:
            with sdpa_kernel(BACKENDS):
                x = F.scaled_dot_product_attention(q, k, v)  # tokens: A @ V, (B, h, N, d)
                labels = tl_align.attend_fused(labels, q, k)  # labels: A @ Y
        else:
            q = q * q.shape[-1] ** -0.5
            attn = (q @ k.transpose(-2, -1)).softmax(-1)  # (B, h, N or 1, N)
            x = attn @ v  # tokens: A @ V
            labels = tl_align.attend(labels, attn)  # labels: A @ Y
        return self.proj(rearrange(x, "b h n d -> b n (h d)")), labels


class Block(nn.Module):
    """A transformer layer with LayerNorm before each branch: attention, then an MLP."""

    def __init__(self, dim, num_heads, drop_path=0.0, fused=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x, labels=None, rand=(None, None), class_only=False):
        """x: (B, N, dim). labels: (B, N, K) or None. rand: for drop path, (B,) for each of the
        two branches. class_only: return the class token only, (B, 1, dim) and (B, 1, K)."""
        attended, attended_labels = self.attn(self.norm1(x), labels, class_only)
        if class_only:
            x = x[:, :1]
            labels = None if labels is None else labels[:, :1]

        x = x + self.drop_path(attended, rand[0])
        labels = tl_align.residual(labels, attended_labels)  # Y = (Y + A @ Y) / 2

        x = x + self.drop_path(self.mlp(self.norm2(x)), rand[1])
        # The MLP acts on each token separately: labels are unchanged.
        return x, labels


class ViT(nn.Module):
    """An image classifier that can propagate token labels.

    img_size and patch_size are in pixels. drop_path_rate is the rate of the last block; it
    grows linearly from 0 in the first. fused: see `Attention`. init_std: standard deviation of
    the initial weights, 0.02 as in DeiT; None keeps PyTorch's default and starts the position
    embedding with sines and cosines, from which narrow models learn faster.

    Raises ValueError if patches do not tile the image.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        num_classes=1000,
        embed_dim=192,
        depth=12,
        num_heads=3,
        drop_path_rate=0.0,
        fused=None,
        init_std=0.02,
    ):
        super().__init__()
        tl_align.check_tiling((img_size, img_size), patch_size)
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size  # patches per side
        self.depth = depth
        patch_conv = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patch_conv))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, fused) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.init_weights(init_std)

    @torch.no_grad()
    def init_weights(self, std):
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if std is None:
            self.pos_embed[0, 1:] = posemb_sincos_2d(self.grid_size, self.pos_embed.shape[-1])
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, images, labels=None, rand=None):
        """Class logits and, if labels are given, the label of the class token.

        images: (B, 3, img_size, img_size). labels: (B, N, K), one row for each patch, row by row.
        rand: (B, depth, 2), uniform in [0, 1), the random numbers of drop path; drawn if None.
        Returns (B, num_classes), or that and (B, K). Raises ValueError for any other shape.
        """
        x, labels = self.embed(images, labels)
        if rand is None:
            block_rand = [(None, None)] * self.depth
        else:
            block_rand = rand.permute(1, 2, 0)  # (depth, 2, B)
        for i, block in enumerate(self.blocks):
            is_last = i == self.depth - 1  # the head reads the class token only
            x, labels = block(x, labels, block_rand[i], class_only=is_last)
        logits = self.head(self.norm(x[:, 0]))
        return logits if labels is None else (logits, labels[:, 0])

    def embed(self, images, labels=None):
        """Tokens (B, 1 + N, embed_dim) and their labels (B, 1 + N, K) before the first block."""
        self.check_shapes(images, labels)
        x = rearrange(self.patch_embed(images), "b d h w -> b (h w) d")
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        labels = tl_align.add_class_token(labels)
        return x + self.pos_embed, labels

    def intermediate_labels(self, images, labels):
        """The labels after the embedding and after every block, for inspection.

        Returns a list of depth + 1 pairs: the patches' labels as a map (B, H, W, K), and the
        class token's label (B, K).
        """
        x, labels = self.embed(images, labels)
        layers = [labels]
        for block in self.blocks:
            x, labels = block(x, labels)
            layers.append(labels)
        return [
            (rearrange(y[:, 1:], "b (h w) k -> b h w k", h=self.grid_size), y[:, 0]) for y in layers
        ]

    def check_shapes(self, images, labels):
        if images.shape[1:] != (3, self.img_size, self.img_size):
            expected = f"(B, 3, {self.img_size}, {self.img_size})"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        batch, num_patches = images.shape[0], self.grid_size**2
        if labels is not None and (labels.dim() != 3 or labels.shape[:2] != (batch, num_patches)):
            expected = f"({batch}, {num_patches}, K), one row for each patch"
            raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")

    def convert_state_dict(self, state):
        """Fit a checkpoint of another image size: the position embedding is interpolated.

        state: a dict of tensors with the official names. Returns a new dict.
        """
        state = dict(state)
        if "pos_embed" in state:
            state["pos_embed"] = interpolate_pos_embed(
                state["pos_embed"], (self.grid_size, self.grid_size)
            )
        return state


def posemb_sincos_2d(grid_size, dim):
    """Sine and cosine position embedding of a square grid, (grid_size², dim), row by row.
    Raises ValueError if dim is not a multiple of 4."""
    if dim % 4:
        raise ValueError(f"the embedding dimension must be a multiple of 4, got {dim}")
    rows, cols = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    row_angle = rows.flatten()[:, None] * frequency  # (N, dim / 4)
    col_angle = cols.flatten()[:, None] * frequency
    return torch.cat([row_angle.sin(), col_angle.sin(), row_angle.cos(), col_angle.cos()], dim=1)


def interpolate_pos_embed(pos_embed, size):
    """Resize the position embedding of a square grid with bicubic interpolation, as DeiT does.

    pos_embed: (1, 1 + N, dim); the class token's embedding comes first and is kept. size: the
    new grid's (rows, columns). Returns (1, 1 + rows * columns, dim), or pos_embed itself if its
    grid already has this size, or is not square (a model with other extra tokens).
    """
    class_token, grid = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    if side**2 != grid.shape[1] or tuple(size) == (side, side):
        return pos_embed
    grid = rearrange(grid, "1 (h w) d -> 1 d h w", h=side).float()
    grid = F.interpolate(grid, tuple(size), mode="bicubic", align_corners=False)
    grid = rearrange(grid, "1 d h w -> 1 (h w) d").to(pos_embed.dtype)
    return torch.cat([class_token, grid], dim=1)


# Keyword arguments replace these sizes and are otherwise those of `ViT`.


def deit_tiny(**kwargs):
    """5.7 million parameters."""
    return ViT(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


def deit_small(**kwargs):
    """22.1 million parameters."""
    return ViT(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


def deit_base(**kwargs):
    """86.6 million parameters."""
    return ViT(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def vit_micro(**kwargs):
    """0.2 million parameters, small enough to train on a laptop's CPU."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}
    return ViT(**{**sizes, "init_std": None, **kwargs})
