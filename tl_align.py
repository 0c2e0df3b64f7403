"""Token-label alignment: propagate CutMix labels through a vision transformer.

CutMix labels a mixed image by area. Inside a transformer that label goes stale: attention moves
content between tokens in every layer, so the token that the classifier reads ends up with a
different share of each image than the area says. TL-Align gives every token a label Y and
updates the labels with the same attention weights A that update the tokens:

    Y = share of the token's pixels from each source           patch embedding
    Y = (Y + A @ Y) / 2                                        attention and its residual
    Y = Y                                                      MLP and LayerNorm: no token mixing
    target = Y of the class token, or the mean of all Y        classification head

    Xiao et al., Token-Label Alignment for Vision Transformers, ICCV 2023, arXiv 2210.06455,
    section 3

Labels have the shape (B, N, K): a row is one token's distribution over K sources or classes and
sums to one. Rows of A sum to one as well, so of two sources the first one's share stays one minus
the second's. Training tracks the second one only (K = 1). No dense target over the classes is
needed: cross-entropy is linear in the target.

This file mixes images and defines the label rules as small functions. `vit.py` and `swin.py`
call each of them on the line below the token operation that it mirrors. Copy this file together
with either one:

    mask = cutmix_mask(torch.rand(len(images), 3), images.shape[-2:], model.patch_size)
    logits, share = model(mix(images, mask), token_labels(mask, model.patch_size))
    loss = mixed_cross_entropy(logits, targets, share, smoothing=0.1)
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

# ------------------------------------------------------------------------------------------------
# Mixing two images. A mix is a mask M: 0 keeps the image's own pixel, 1 takes its partner's.


def partner(x):
    """Swap neighbours in the batch: samples 0 1 2 3 4 5 ... get partners 1 0 3 2 5 4 ...

    Neighbours are paired, instead of flipping the batch, so that splitting a batch between
    pairs (over devices or for gradient accumulation) does not change anyone's partner.

    x: (B, ...). Returns (B, ...). Raises ValueError if B is odd.
    """
    if len(x) % 2:
        raise ValueError(f"images are mixed in pairs: the batch size must be even, got {len(x)}")
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def check_tiling(size, patch_size):
    """Raises ValueError if patches of patch_size pixels do not tile an image of size (H, W)."""
    if size[0] % patch_size or size[1] % patch_size:
        raise ValueError(
            f"patches of {patch_size} px do not tile an image of {size[0]} x {size[1]} px"
        )


def cutmix_mask(rand, size, patch_size=1):
    """One CutMix box per sample, on the patch grid (Yun et al. 2019, arXiv 1905.04899).

    The box covers 1 - lambda of the image. It is clipped at the image border, so use the mean
    of the mask, not lambda, as the mixing ratio.

    rand: (B, 3) in [0, 1]: lambda, and the row and column of the box's centre. Uniform numbers
        give lambda ~ Beta(1, 1); with lambda = 1 nothing is pasted.
    size: (H, W) of the images in pixels. patch_size: in pixels; 1: not aligned with patches.
    Returns (B, 1, H, W) of zeros and ones. Raises ValueError if patches do not tile the image.
    """
    check_tiling(size, patch_size)
    side = (1 - rand[:, :1]).sqrt()  # side of the box, relative to the image, (B, 1)
    inside = []
    for pixels, centre in zip(size, rand[:, 1:].split(1, dim=1), strict=True):
        num_patches = pixels // patch_size
        length = (side * num_patches).floor()  # whole patches, (B, 1)
        start = (centre * num_patches).floor() - (length / 2).floor()
        position = torch.arange(num_patches, device=rand.device)
        covered = (position >= start) & (position < start + length)  # (B, num_patches)
        inside.append(covered.repeat_interleave(patch_size, dim=1))
    rows, cols = inside  # (B, H) and (B, W)
    return (rows[:, None, :, None] & cols[:, None, None, :]).float()


def mixup_mask(rand, size):
    """Mixup as a mask: every pixel has the same share (Zhang et al. 2018, arXiv 1710.09412).

    rand: (B, 3) as for `cutmix_mask`; only the first column, lambda, is used.
    size: (H, W) of the images in pixels. Returns (B, 1, H, W).
    """
    return (1 - rand[:, 0]).view(-1, 1, 1, 1).expand(-1, 1, *size)


def mix(images, mask):
    """x = (1 - M) x1 + M x2 (equation 1 of the paper, with M marking the pasted image).

    images: (B, C, H, W), floating point. mask: (B, 1, H, W). Returns (B, C, H, W).
    """
    return torch.lerp(images, partner(images), mask.to(images.dtype))


# ------------------------------------------------------------------------------------------------
# The label rules. From `add_class_token` on they pass None through, for a pass without labels.


def token_labels(mask, patch_size):
    """Patch embedding: a token's label is the share of its pixels that came from the partner image.

    mask: (B, 1, H, W). Returns (B, N, 1) with N = (H / patch_size) * (W / patch_size), row by row.
    Raises ValueError if patches do not tile the image.
    """
    check_tiling(mask.shape[-2:], patch_size)
    return rearrange(F.avg_pool2d(mask, patch_size), "b 1 h w -> b (h w) 1")


def add_class_token(labels):
    """The class token has no pixels: it starts with the mean of the patch labels, the area ratio.

    labels: (B, N, K) or None. Returns (B, 1 + N, K).
    """
    if labels is None:
        return None
    return torch.cat([labels.mean(1, keepdim=True), labels], dim=1)


def attend(labels, attn):
    """A @ Y: attention moves labels as it moves values.

    A is averaged over the heads, and detached: labels only measure what the layer does.

    labels: (..., N, K) or None. attn: (..., heads, n, N), after the softmax. Returns (..., n, K).
    Raises ValueError for attn of another shape, for example averaged over its heads.
    """
    if labels is None:
        return None
    same_batch = attn.dim() == labels.dim() + 1 and attn.shape[:-3] == labels.shape[:-2]
    if not same_batch or attn.shape[-1] != labels.shape[-2]:
        raise ValueError(
            "attn must be (..., heads, n, N) for labels (..., N, K), "
            f"got {tuple(attn.shape)} for {tuple(labels.shape)}"
        )
    attn = attn.detach().mean(-3).to(labels.dtype)  # (..., n, N)
    if labels.is_meta:  # the meta device has no autocast
        return attn @ labels
    with torch.autocast(labels.device.type, enabled=False):  # keep the labels in float32
        return attn @ labels


def attend_fused(labels, q, k, bias=None):
    """`attend` without forming A: fused attention with the labels in the place of the values.

    labels: (B, N, K), or (B, windows, N, K), or None. q: (B, windows * heads, n, head_dim).
    k: (B, windows * heads, N, head_dim). bias: added to the scores, broadcastable to
    (B, windows * heads, n, N). Returns (B, n, K), or (B, windows, n, K). Raises ValueError if k
    and labels have different numbers of tokens.
    """
    if labels is None:
        return None
    has_windows = labels.dim() == 4
    y = labels if has_windows else labels[:, None]  # (B, windows, N, K)
    num_windows, num_tokens, num_sources = y.shape[1:]
    if k.shape[-2] != num_tokens:
        raise ValueError(f"labels of {num_tokens} tokens do not fit keys {tuple(k.shape)}")
    num_heads = q.shape[1] // num_windows
    # Without a bias the fused kernel is FlashAttention, which requires values as wide as the keys;
    # with a bias another one, to which any multiple of 8 will do. Results can be wrong if heads
    # share memory (pytorch issue 191937): pad the labels with zeros and copy them for every head.
    if bias is None:
        width = max(q.shape[-1], num_sources)
    else:
        width = math.ceil(num_sources / 8) * 8
        bias = bias.detach()
    y = F.pad(y, (0, width - num_sources)).to(q.dtype)
    y = repeat(y, "b windows n k -> b (windows heads) n k", heads=num_heads).contiguous()
    y = F.scaled_dot_product_attention(q.detach(), k.detach(), y, bias)[..., :num_sources]
    y = reduce(
        y.to(labels.dtype), "b (windows heads) n k -> b windows n k", "mean", heads=num_heads
    )
    return y if has_windows else y[:, 0]


def residual(labels, attended):
    """Y = (Y + A @ Y) / 2: the residual connection adds two tokens, so their labels are averaged.

    labels, attended: (..., K), or None. Returns (..., K). Raises ValueError if shapes differ.
    """
    if labels is None:
        return None
    if labels.shape != attended.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit A @ Y {tuple(attended.shape)}")
    return (labels + attended) / 2


def align(labels, attn):
    """`attend` and `residual` in one call, for the attention of another model.

    labels: (..., N, K). attn: (..., heads, N, N), after the softmax. Returns (..., N, K).
    Raises ValueError for attn of another shape, for example averaged over its heads.
    """
    return residual(labels, attend(labels, attn))


# ------------------------------------------------------------------------------------------------
# The loss.


def mixed_cross_entropy(logits, targets, share, smoothing=0.0):
    """Cross-entropy with the soft target (1 - share) * own class + share * partner's class.

    Cross-entropy is linear in the target, so this is the weighted sum of two ordinary ones.

    logits: (B, num_classes). targets: (B,), the images' own classes. share: (B, 1), of the partner.
    smoothing: label smoothing, applied to both. Returns the mean over the batch, a scalar.
    """
    own = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    other = F.cross_entropy(logits, partner(targets), reduction="none", label_smoothing=smoothing)
    return torch.lerp(own, other, share.squeeze(-1).to(own.dtype)).mean()
