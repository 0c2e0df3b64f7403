"""The Swin transformer, with labels that move through windows, shifts and merging beside the tokens.

Swin (Liu et al. 2021, arXiv 2103.14030): attention within windows of 7 x 7 tokens, the windows shifted
by half their size in every second block, and four tokens merged into one between stages. Whatever
rearranges the tokens rearranges the labels by the same function, called on the next line.
Parameters carry the official names, so Microsoft's files load as they are:

    model = swin_tiny()
    model.load_state_dict(model.adapt(torch.load("swin_tiny_patch4_window7_224.pth")["model"]))

    logits = model(images)                      # as any classifier
    logits, aligned = model(images, labels)     # and the label that arrives where the head reads

Images may have any height and width that the patches tile: maps that windows don't tile are padded.
A padded token is nobody's: no real token attends to it, and it holds no label.

Tokens and labels are maps here, (B, H, W, C) and (B, H, W, K). Copy this file with `tl_align.py`.
"""

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import tl_align


def to_windows(x, window, shift):
    """Cut a map into windows: pad it to whole ones, roll it back by the shift, partition it.

    x: (B, H, W, C), or None where there are no labels. shift: (rows, columns), in tokens.
    Returns (B, windows, window², C), or None.
    """
    if x is None:
        return None
    height, width = x.shape[1:3]
    if height % window or width % window:
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    return rearrange(x, "b (nh h) (nw w) c -> b (nh nw) (h w) c", h=window, w=window)


def from_windows(x, window, shift, size):
    """Undo `to_windows`. x: (B, windows, window², C), size: (H, W). Returns (B, H, W, C)."""
    if x is None:
        return None
    height, width = size
    rows = -(-height // window)
    x = rearrange(x, "b (nh nw) (h w) c -> b (nh h) (nw w) c", nh=rows, h=window)
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return x[:, :height, :width]


def window_mask(size, window, shift, device=None):
    """Which tokens of a window may see each other: those that were neighbours before the shift.

    The roll brings the first rows and columns of the map round to its end, into windows with tokens
    from the far side; and padding is nobody's neighbour. So mark where each token is from, cut the
    marks into windows as the tokens are, and forbid what differs.

    Returns (windows, 1, window², window²), 0 or -inf, to be added to the scores; None where every
    token may see every other.
    """
    height, width = size
    if not (any(shift) or height % window or width % window):
        return None
    rows = torch.arange(height, device=device) < shift[0]
    cols = torch.arange(width, device=device) < shift[1]
    origin = 1 + 2 * rows[:, None] + cols[None, :]  # 1 to 4; padding adds zeros
    origin = to_windows(origin[None, :, :, None], window, shift)[0]  # (windows, window², 1)
    apart = (origin != origin.mT)[:, None]  # (windows, 1, window², window²)
    return torch.zeros(apart.shape, device=device).masked_fill(apart, float("-inf"))


class WindowAttention(nn.Module):
    """Multi-head self-attention within each window, with a learned bias for each relative position.

    Explicit and fused as in `vit.Attention`: fused on CUDA, explicit elsewhere, the same numbers.
    The fused kernels take one axis of heads, so every window brings its own: the bias then needs one
    copy for all images.
    """

    def __init__(self, dim, heads, window, fused=None):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (window², 2)
        offset = at[:, None] - at[None, :] + window - 1  # (window², window², 2), from 0
        index = offset[..., 0] * (2 * window - 1) + offset[..., 1]
        self.register_buffer("relative_position_index", index, persistent=False)

    def project(self, x, mask=None):
        """Queries, keys and values, (B, windows, h, n, d), and what is added to the scores, (1 or windows, h,
        n, n). x: (B, windows, n, dim). mask: as `window_mask` gives it."""
        q, k, v = rearrange(self.qkv(x), "b w n (three h d) -> three b w h n d", three=3, h=self.heads)
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = rearrange(bias, "n m h -> 1 h n m")
        return q, k, v, bias if mask is None else bias + mask.to(bias.dtype)

    def forward(self, x, labels=None, mask=None):
        q, k, v, bias = self.project(x, mask)
        fused = x.is_cuda if self.fused is None else self.fused
        if not fused:
            attention = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1)  # (B, windows, h, n, n)
            x = attention @ v  # (B, windows, h, n, d)
            if labels is not None:
                labels = tl_align.align(labels, attention)
        else:
            windows = x.shape[1]
            q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # (B, windows * h, n, d)
            bias = bias.expand(windows, -1, -1, -1).flatten(0, 1).to(q.dtype)
            x = F.scaled_dot_product_attention(q, k, v, bias).unflatten(1, (windows, self.heads))
            if labels is not None:
                labels = tl_align.align_fused(labels, q, k, bias)
        return self.proj(rearrange(x, "b w h n d -> b w n (h d)")), labels


class Block(nn.Module):
    def __init__(self, dim, heads, window, shifted, fused=None):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, fused)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )

    def forward(self, x, labels=None, keep=(1, 1)):
        """keep: what stochastic depth (Huang et al. 2016) multiplies the two branches with."""
        size, window, shift = x.shape[1:3], self.window, self.shift(x)
        mask = window_mask(size, window, shift, x.device)
        moved = to_windows(self.norm1(x), window, shift)
        labels = to_windows(labels, window, shift)
        moved, labels = self.attn(moved, labels, mask)  # tokens and labels move together
        moved = from_windows(moved, window, shift, size)
        labels = from_windows(labels, window, shift, size)

        x = x + keep[0] * moved  # the labels' half of this residual is in `tl_align.align`
        x = x + keep[1] * self.mlp(self.norm2(x))  # token by token: labels stay
        return x, labels

    def shift(self, x):
        """Of the windows of a map, in tokens; one of a single window has nothing to shift to."""
        return tuple(self.window // 2 if self.shifted and n > self.window else 0 for n in x.shape[1:3])


class PatchMerging(nn.Module):
    """Each 2 x 2 tokens become one of twice the width; its label is the mean of theirs."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def gather(self, x):
        """The channels of each 2 x 2 tokens beside each other: (B, H, W, C) to (B, H / 2, W / 2, 4 C)."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        return rearrange(x, "b (h dh) (w dw) c -> b h w (dw dh c)", dh=2, dw=2)

    def forward(self, x, labels=None):
        x = self.gather(x)
        if labels is not None:  # ceil_mode: at an odd border, the mean of the tokens that are there
            labels = F.avg_pool2d(rearrange(labels, "b h w k -> b k h w"), 2, ceil_mode=True)
            labels = rearrange(labels, "b k h w -> b h w k")
        return self.reduction(self.norm(x)), labels


class Stage(nn.Module):
    def __init__(self, dim, depth, heads, window, merge, fused=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window, i % 2 == 1, fused) for i in range(depth))
        self.downsample = PatchMerging(dim) if merge else None


class Swin(nn.Module):
    """patch_size is in pixels; dim the width of a token in the first stage, doubled with each;
    depths and heads have an entry a stage; window is in tokens; drop_path the rate of the last block
    (it grows from 0). img_size, in pixels, is only a size to expect: maps of any size are taken.
    fused: see `WindowAttention`.

    Raises ValueError when patches do not tile an image of img_size.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=4,
        num_classes=1000,
        dim=96,
        depths=(2, 2, 6, 2),
        heads=(3, 6, 12, 24),
        window=7,
        drop_path=0.0,
        fused=None,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"patches of {patch_size} px do not tile an image of {img_size} px")
        self.img_size, self.patch_size = img_size, patch_size
        self.depth, self.drop_path = sum(depths), drop_path
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, dim, patch_size, patch_size), "norm": nn.LayerNorm(dim)}
        )
        last = len(depths) - 1
        self.layers = nn.ModuleList(
            Stage(dim * 2**i, depths[i], heads[i], window, i < last, fused) for i in range(len(depths))
        )
        self.norm = nn.LayerNorm(dim * 2**last)
        self.head = nn.Linear(dim * 2**last, num_classes)
        wide = dim >= 96  # as Swin starts; narrow layers want larger weights, and keep torch's own
        for name, p in self.named_parameters():
            if wide and p.dim() == 2:
                nn.init.trunc_normal_(p, std=0.02)
            elif wide and name.endswith("bias") and "patch_embed.proj" not in name:
                nn.init.zeros_(p)

    def forward(self, images, labels=None, *, rand=None):
        """Logits, and where labels are given the mean of all labels at the end, as the head reads it.

        images: (B, 3, H, W). labels: (B, N, K), of each patch, row by row.
        rand: (B, depth, 2), uniform in [0, 1): which branches drop path drops in training, for
        callers whose runs must repeat; drawn here if None.
        Returns (B, num_classes), or that and (B, K). Raises ValueError for any other shape.
        """
        x, layers, _ = self._trunk(images, labels, rand)
        logits = self.head(x.mean((1, 2)))
        return logits if labels is None else (logits, layers[-1].mean((1, 2)))

    def layer_labels(self, images, labels):
        """The labels after the embedding and after each block, for pictures and experiments: a list
        of depth + 1 pairs, the labels as a map (B, H, W, K) and, (B, K), the label that the head would
        find if it read there."""
        _, layers, _ = self._trunk(images, labels)
        return [(y, y.mean((1, 2))) for y in layers]

    def features(self, images, *, rand=None):
        """The map at the end of each stage, for dense prediction: a list of (B, C, H, W), C doubled and H and
        W halved, odd ones rounded up, from one to the next; the last after the final norm.

        images: (B, 3, H, W), of any sides that patches tile. rand: as in `forward`. Raises ValueError
        where patches do not tile the images.
        """
        x, _, maps = self._trunk(images, None, rand)
        return [rearrange(m, "b h w c -> b c h w") for m in (*maps[:-1], x)]

    def _trunk(self, images, labels, rand=None):
        """Tokens at the end, labels after each block, and the tokens at the end of each stage."""
        self._check(images, labels)
        height = images.shape[2] // self.patch_size
        x = rearrange(self.patch_embed["proj"](images), "b d h w -> b h w d")
        x = self.patch_embed["norm"](x)
        y = labels if labels is None else rearrange(labels, "b (h w) k -> b h w k", h=height)
        layers, maps, keep = [y], [], iter(self._keep(images, rand))
        for stage in self.layers:
            for block in stage.blocks:
                x, y = block(x, y, next(keep))
                layers.append(y)
            maps.append(x)
            if stage.downsample is not None:
                x, y = stage.downsample(x, y)
        return self.norm(x), layers, maps

    def _keep(self, images, rand):
        """What drop path multiplies each block's two branches with: 0 or 1 / (1 - rate), (B, 1, 1, 1)."""
        if not self.training or self.drop_path == 0:
            return [(1, 1)] * self.depth
        if rand is None:
            rand = torch.rand(images.shape[0], self.depth, 2, device=images.device)
        rate = torch.linspace(0, self.drop_path, self.depth, device=images.device)[:, None]
        return rearrange(((rand >= rate) / (1 - rate)).to(images.dtype), "b depth two -> depth two b 1 1 1")

    def _check(self, images, labels):
        p = self.patch_size
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % p or images.shape[3] % p:
            expected = f"(B, 3, H, W) with sides that are multiples of {p}"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        batch, tokens = images.shape[0], images.shape[2] // p * (images.shape[3] // p)
        if labels is not None and (labels.dim() != 3 or labels.shape[:2] != (batch, tokens)):
            expected = f"({batch}, {tokens}, K), one row for each patch"
            raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")

    def adapt(self, state):
        """A checkpoint of Microsoft's, of timm's, or of other windows, fitted to this model: index and mask
        buffers go, names become Microsoft's, and bias tables are resized, bicubic as their code does it.
        state: a dict of tensors. Returns a new one."""
        state = {k: v for k, v in state.items() if not k.endswith(("_index", "attn_mask"))}
        if any(k.startswith(f"layers.{len(self.layers) - 1}.downsample") for k in state):  # timm's
            before = lambda m: f"layers.{int(m[1]) - 1}.downsample"  # at the end of a stage, not at its start
            rename = lambda k: re.sub(r"layers\.(\d+)\.downsample", before, k).replace("head.fc.", "head.")
            state = {rename(k): v for k, v in state.items()}
        for name, table in self.state_dict().items():
            old = state.get(name)
            if name.endswith("bias_table") and old is not None and len(old) != len(table):
                side, new = round(len(old) ** 0.5), round(len(table) ** 0.5)
                grid = rearrange(old, "(h w) heads -> 1 heads h w", h=side)
                grid = F.interpolate(grid.float(), (new, new), mode="bicubic", align_corners=False)
                state[name] = rearrange(grid, "1 heads h w -> (h w) heads").to(old.dtype)
        return state


def swin_tiny(**kwargs):
    """28.3 million parameters."""
    return Swin(**{"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), **kwargs})


def swin_small(**kwargs):
    """49.6 million parameters."""
    return Swin(**{"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), **kwargs})


def swin_base(**kwargs):
    """87.8 million parameters."""
    return Swin(**{"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), **kwargs})


def swin_micro(**kwargs):
    """Small enough to train on a laptop's CPU."""
    micro = {"img_size": 32, "patch_size": 2, "dim": 32, "depths": (2, 2), "heads": (1, 2), "window": 4}
    return Swin(**{**micro, **kwargs})
