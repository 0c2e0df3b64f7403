"""Swin transformer with token labels.

Swin (Liu et al. 2021, arXiv 2103.14030): attention within windows of 7 x 7 tokens, windows that
are shifted by half their size in every second block, and patch merging, which turns 2 x 2 tokens
into one between stages. Window partition, shift and their reverse apply the same function to
tokens and labels, line under line; patch merging concatenates four tokens and averages their
labels. Parameters have the official names, so Microsoft's and timm's checkpoints load directly:

    model = swin_tiny()
    state = torch.load("swin_tiny_patch4_window7_224.pth")["model"]
    model.load_state_dict(model.convert_state_dict(state))

    logits = model(images)                      # like any classifier
    logits, aligned = model(images, labels)     # also the label of what the classifier reads

Tokens and labels are maps here, (B, H, W, C) and (B, H, W, K). Copy this file with `tl_align.py`.

Images may have any size that the patches tile. Where windows do not tile the map, it is padded.
Here the padding is masked out of the attention, because it has no label; torchvision's and
Microsoft's models let tokens attend to it. So the logits equal theirs where windows fit (224 px)
and differ where they do not (256 px, for example).
"""

import math
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tl_align

# All but cuDNN, whose gradients can be NaN with a bias in bf16 (pytorch issue 196678).
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def window_partition(x, window_size, shift):
    """Pad a map to whole windows, roll it back by the shift, and cut it into windows.

    x: (B, H, W, C), or None if there are no labels. window_size: in tokens. shift: (rows, columns).
    Returns (B, windows, window_size², C), or None.
    """
    if x is None:
        return None
    height, width = x.shape[1:3]
    if height % window_size or width % window_size:
        x = F.pad(x, (0, 0, 0, -width % window_size, 0, -height % window_size))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), dims=(1, 2))
    return rearrange(x, "b (nh h) (nw w) c -> b (nh nw) (h w) c", h=window_size, w=window_size)


def window_reverse(x, window_size, shift, size):
    """Undo `window_partition`.

    x: (B, windows, window_size², C) or None. size: (H, W) of the map. Returns (B, H, W, C) or None.
    """
    if x is None:
        return None
    height, width = size
    windows_down = math.ceil(height / window_size)
    x = rearrange(x, "b (nh nw) (h w) c -> b (nh h) (nw w) c", nh=windows_down, h=window_size)
    if any(shift):
        x = x.roll(shift, dims=(1, 2))
    return x[:, :height, :width]


def window_mask(size, window_size, shift, device=None):
    """The attention mask of the windows of a map of this size.

    After the roll, a window may contain tokens from opposite sides of the map. Number the
    regions that were contiguous before, partition the numbers like the tokens, and mask every
    pair of tokens from different regions. Padding, filled with zeros, is region 0.

    Returns (windows, 1, window_size², window_size²) of 0 and -inf, to be added to the scores,
    or None if no pair is masked.
    """
    height, width = size
    if not any(shift) and height % window_size == 0 and width % window_size == 0:
        return None
    row_region = torch.where(torch.arange(height, device=device) < shift[0], 2, 0)
    col_region = torch.where(torch.arange(width, device=device) < shift[1], 1, 0)
    region = 1 + row_region[:, None] + col_region[None, :]  # (H, W), from 1 to 4
    region = window_partition(region[None, :, :, None], window_size, shift)[0]  # (windows, n, 1)
    is_masked = (region != region.transpose(-2, -1))[:, None]  # (windows, 1, n, n)
    return torch.zeros(is_masked.shape, device=device).masked_fill(is_masked, float("-inf"))


def relative_position_index(window_size, device=None):
    """The row of the bias table for each pair of tokens in a window, (window_size²,
    window_size²)."""
    position = torch.arange(window_size, device=device)
    offset = position[:, None] - position[None, :] + window_size - 1  # (w, w), from 0 to 2 w - 2
    row_offset = rearrange(offset, "r1 r2 -> r1 1 r2 1")
    col_offset = rearrange(offset, "c1 c2 -> 1 c1 1 c2")
    index = row_offset * (2 * window_size - 1) + col_offset  # (w, w, w, w)
    return index.flatten(2).flatten(0, 1)


class DropPath(nn.Module):
    """Stochastic depth, as in `vit.py`: drop a sample's whole residual branch with probability
    `rate`."""

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


class WindowAttention(nn.Module):
    """Multi-head self-attention within each window, with a learned bias for each relative position.

    Explicit and fused as in `vit.Attention`.
    """

    def __init__(self, dim, num_heads, window_size, fused=None):
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.fused = fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window_size - 1) ** 2, num_heads)
        )

    def forward(self, x, labels=None, mask=None):
        """x: (B, windows, n, dim). labels: (B, windows, n, K) or None. mask: see `window_mask`.
        Returns A @ V after projection, and A @ Y."""
        q, k, v = rearrange(
            self.qkv(x), "b w n (three h d) -> three b w h n d", three=3, h=self.num_heads
        )
        bias = self.attention_bias(mask)  # (1 or windows, h, n, n)
        use_fused = x.is_cuda if self.fused is None else self.fused
        if use_fused:
            # The kernels expect a single axis of heads and one bias for all images, so every
            # window brings its own heads.
            windows = x.shape[1]
            q, k, v = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)  # (B, windows * h, n, d)
            bias = bias.expand(windows, -1, -1, -1).flatten(0, 1).to(q.dtype).contiguous()
            with sdpa_kernel(BACKENDS):
                x = F.scaled_dot_product_attention(q, k, v, bias)  # tokens: A @ V
                labels = tl_align.attend_fused(labels, q, k, bias)  # labels: A @ Y
            x = x.unflatten(1, (windows, self.num_heads))
        else:
            q = q * q.shape[-1] ** -0.5
            attn = (q @ k.transpose(-2, -1) + bias).softmax(-1)  # (B, windows, h, n, n)
            x = attn @ v  # tokens: A @ V
            labels = tl_align.attend(labels, attn)  # labels: A @ Y
        return self.proj(rearrange(x, "b w h n d -> b w n (h d)")), labels

    def attention_bias(self, mask=None):
        """The relative position bias plus the mask, (1 or windows, h, n, n)."""
        table = self.relative_position_bias_table
        bias = table[relative_position_index(self.window_size, table.device)]
        bias = rearrange(bias, "n m h -> 1 h n m")
        return bias if mask is None else bias + mask.to(bias.dtype)


class Block(nn.Module):
    """A transformer layer on windows. shift_size: 0, or window_size // 2 in every second block."""

    def __init__(self, dim, num_heads, window_size, shift_size, drop_path=0.0, fused=None):
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, fused)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x, labels=None, rand=(None, None)):
        """x: (B, H, W, dim). labels: (B, H, W, K) or None. rand: for drop path, (B,) for each
        of the two branches."""
        size = x.shape[1:3]
        shift = self.shift(size)
        mask = window_mask(size, self.window_size, shift, x.device)

        attended = window_partition(self.norm1(x), self.window_size, shift)
        attended_labels = window_partition(labels, self.window_size, shift)
        attended, attended_labels = self.attn(attended, attended_labels, mask)
        attended = window_reverse(attended, self.window_size, shift, size)
        attended_labels = window_reverse(attended_labels, self.window_size, shift, size)

        x = x + self.drop_path(attended, rand[0])
        labels = tl_align.residual(labels, attended_labels)  # Y = (Y + A @ Y) / 2

        x = x + self.drop_path(self.mlp(self.norm2(x)), rand[1])
        # labels are unchanged
        return x, labels

    def shift(self, size):
        """(rows, columns) to shift a map of this size by. A single window is not shifted."""
        height, width = size
        rows = self.shift_size if height > self.window_size else 0
        cols = self.shift_size if width > self.window_size else 0
        return rows, cols


class PatchMerging(nn.Module):
    """Merge 2 x 2 tokens into one of twice the width. Its label is the mean of their labels."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x, labels=None):
        """x: (B, H, W, dim). labels: (B, H, W, K) or None.
        Returns (B, H / 2, W / 2, 2 dim) and (B, H / 2, W / 2, K), rounded up."""
        x = self.reduction(self.norm(merge_tokens(x)))
        labels = merge_labels(labels)
        return x, labels


def merge_tokens(x):
    """Concatenate the channels of 2 x 2 neighbours: (B, H, W, C) to (B, H / 2, W / 2, 4 C),
    rounded up. A map with an odd side is padded with zeros."""
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    return rearrange(x, "b (h dh) (w dw) c -> b h w (dw dh c)", dh=2, dw=2)


def merge_labels(labels):
    """Average the labels of 2 x 2 neighbours: (B, H, W, K) or None to (B, H / 2, W / 2, K),
    rounded up. At an odd border, ceil_mode averages the tokens that exist: padding has no label."""
    if labels is None:
        return None
    labels = rearrange(labels, "b h w k -> b k h w")
    labels = F.avg_pool2d(labels, 2, ceil_mode=True)
    return rearrange(labels, "b k h w -> b h w k")


class Stage(nn.Module):
    """Blocks on maps of one size, then patch merging (except in the last stage). `Swin.forward`
    runs them; this class gives the parameters their official names."""

    def __init__(self, dim, num_heads, window_size, drop_path_rates, merge, fused=None):
        super().__init__()
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_path_rates):
            shift_size = window_size // 2 if i % 2 == 1 else 0
            self.blocks.append(Block(dim, num_heads, window_size, shift_size, rate, fused))
        self.downsample = PatchMerging(dim) if merge else None


class Swin(nn.Module):
    """An image classifier that can propagate token labels.

    img_size and patch_size are in pixels. embed_dim is the width of a token in the first
    stage, doubled in each of the next ones. depths and num_heads have one entry per stage.
    window_size is in tokens. drop_path_rate is the rate of the last block; it grows linearly
    from 0 in the first. fused: see `WindowAttention`. init_std: standard deviation of the
    initial weights, 0.02 as in Swin; None keeps PyTorch's default, which suits narrow models.

    Images of any size are accepted; img_size is only the size that the model is meant for.
    Raises ValueError if patches do not tile an image of img_size.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=4,
        num_classes=1000,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.0,
        fused=None,
        init_std=0.02,
    ):
        super().__init__()
        tl_align.check_tiling((img_size, img_size), patch_size)
        self.img_size = img_size
        self.patch_size = patch_size
        self.depth = sum(depths)
        patch_conv = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patch_conv, "norm": nn.LayerNorm(embed_dim)})
        rates = [drop_path_rate * i / max(1, self.depth - 1) for i in range(self.depth)]
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            start = sum(depths[:i])
            stage_rates = rates[start : start + depth]
            merge = i < len(depths) - 1
            stage = Stage(embed_dim * 2**i, num_heads[i], window_size, stage_rates, merge, fused)
            self.layers.append(stage)
        last_dim = embed_dim * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(last_dim)
        self.head = nn.Linear(last_dim, num_classes)
        if init_std is not None:
            self.init_weights(init_std)

    def init_weights(self, std):
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # weights of linear layers, and the bias tables
                nn.init.trunc_normal_(parameter, std=std)
            elif name.endswith("bias") and "patch_embed" not in name:
                nn.init.zeros_(parameter)

    def forward(self, images, labels=None, rand=None):
        """Class logits and, if labels are given, the mean label of all tokens.

        images: (B, 3, H, W). labels: (B, N, K), one row for each patch, row by row.
        rand: (B, depth, 2), uniform in [0, 1), the random numbers of drop path; drawn if None.
        Returns (B, num_classes), or that and (B, K). Raises ValueError for any other shape.
        """
        x, labels = self.embed(images, labels)
        if rand is None:
            block_rand = [(None, None)] * self.depth
        else:
            block_rand = rand.permute(1, 2, 0)  # (depth, 2, B)
        i = 0
        for stage in self.layers:
            for block in stage.blocks:
                x, labels = block(x, labels, block_rand[i])
                i += 1
            if stage.downsample is not None:
                x, labels = stage.downsample(x, labels)
        logits = self.head(self.norm(x).mean((1, 2)))
        return logits if labels is None else (logits, labels.mean((1, 2)))

    def embed(self, images, labels=None):
        """Tokens (B, H, W, embed_dim) and their labels (B, H, W, K) before the first block."""
        self.check_shapes(images, labels)
        height = images.shape[2] // self.patch_size
        x = rearrange(self.patch_embed["proj"](images), "b d h w -> b h w d")
        x = self.patch_embed["norm"](x)
        labels = None if labels is None else rearrange(labels, "b (h w) k -> b h w k", h=height)
        return x, labels

    def intermediate_labels(self, images, labels):
        """The labels after the embedding and after every block, for inspection.

        Returns a list of depth + 1 pairs: the labels as a map (B, H, W, K), and their mean (B, K).
        """
        x, labels = self.embed(images, labels)
        layers = [labels]
        for stage in self.layers:
            for block in stage.blocks:
                x, labels = block(x, labels)
                layers.append(labels)
            if stage.downsample is not None:
                x, labels = stage.downsample(x, labels)
        return [(y, y.mean((1, 2))) for y in layers]

    def check_shapes(self, images, labels):
        p = self.patch_size
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % p or images.shape[3] % p:
            expected = f"(B, 3, H, W) with sides that are multiples of {p}"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        batch, num_patches = images.shape[0], images.shape[2] // p * (images.shape[3] // p)
        if labels is not None and (labels.dim() != 3 or labels.shape[:2] != (batch, num_patches)):
            expected = f"({batch}, {num_patches}, K), one row for each patch"
            raise ValueError(f"labels must be {expected}, got {tuple(labels.shape)}")

    def convert_state_dict(self, state):
        """Fit a checkpoint of Microsoft's, of timm's, or of another window size to this model.

        Buffers are dropped, timm's names become Microsoft's, and bias tables are interpolated.
        state: a dict of tensors. Returns a new dict.
        """
        own_state = self.state_dict()
        last_stage = len(self.layers) - 1
        is_timm = any(name.startswith(f"layers.{last_stage}.downsample.") for name in state)
        converted = {}
        for name, tensor in state.items():
            if name.endswith(("relative_position_index", "attn_mask")):
                continue
            if is_timm:
                name = convert_timm_name(name)
            if name.endswith("relative_position_bias_table") and name in own_state:
                tensor = interpolate_bias_table(tensor, len(own_state[name]))
            converted[name] = tensor
        return converted


def convert_timm_name(name):
    """timm merges patches at the start of a stage, Microsoft at the end of the one before."""
    match = re.match(r"layers\.(\d+)\.downsample\.(.*)", name)
    if match:
        return f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
    return name.replace("head.fc.", "head.")


def interpolate_bias_table(table, length):
    """Resize a relative position bias table with bicubic interpolation, as Microsoft's code does.

    table: ((2 w - 1)², heads) of a window size w. length: (2 w - 1)² of the new window size.
    Returns (length, heads).
    """
    if len(table) == length:
        return table
    old_side, new_side = round(len(table) ** 0.5), round(length**0.5)
    grid = rearrange(table, "(h w) heads -> 1 heads h w", h=old_side).float()
    grid = F.interpolate(grid, (new_side, new_side), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 heads h w -> (h w) heads").to(table.dtype)


# Keyword arguments replace these sizes and are otherwise those of `Swin`.


def swin_tiny(**kwargs):
    """28.3 million parameters."""
    return Swin(**{"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), **kwargs})


def swin_small(**kwargs):
    """49.6 million parameters."""
    return Swin(**{"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), **kwargs})


def swin_base(**kwargs):
    """87.8 million parameters."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return Swin(**{**sizes, **kwargs})


def swin_micro(**kwargs):
    """0.1 million parameters, small enough to train on a laptop's CPU."""
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2)}
    sizes.update({"num_heads": (1, 2), "window_size": 4})
    return Swin(**{**sizes, "init_std": None, **kwargs})
