"""Token-label alignment: train a vision transformer on the label that arrives where it reads.

CutMix pastes a box of one image into another and labels the mix by area. Inside a transformer that
label goes stale: attention moves content between tokens at every layer, so what the head finally
reads holds another share of each image than the area says. TL-Align gives every token a label Y and
moves the labels with the very attention A that moves the tokens:

    Y = share of the token's pixels that came from each source        patch embedding
    Y = (Y + A @ Y) / 2                                               attention and its residual
    Y = Y                                                             MLP, norm: they mix no tokens
    target = Y where the head reads: the class token, or the mean of all tokens

    Xiao et al., Token-Label Alignment for Vision Transformers, ICCV 2023, arXiv 2210.06455, section 3

Labels are (B, N, K): each row is a token's mix of K sources or classes and sums to one. Rows of A sum
to one as well, so with two sources the share of the second says everything, and K = 1 is exact; that
is what training uses. Nor is a dense target needed: cross-entropy is linear in the target.

This file mixes images and holds the rules as small functions. `vit.py` and `swin.py` call them beside
the token operations that they mirror. To use it elsewhere, copy it together with either of the two:

    mask = cutmix_mask(torch.rand(len(images), 3), images.shape[-2:], model.patch_size)
    logits, share = model(mix(images, mask), token_labels(mask, model.patch_size))
    loss = mixed_cross_entropy(logits, targets, share, smoothing=0.1)
"""

import torch
import torch.nn.functional as F

# --- Mixing two images. A mix is a mask: 0 keeps the image's own pixel, 1 takes its partner's.


def partner(x):
    """Each sample's partner: the other one of two neighbours in the batch, 1 0 3 2 5 4 ...

    Pairs, and not a roll of the whole batch, so that a batch can be cut anywhere between two pairs
    (over devices, or for gradient accumulation) and every sample still finds the same partner.

    x: (B, ...). Returns (B, ...). Raises ValueError when B is odd.
    """
    if len(x) % 2:
        raise ValueError(f"mixing takes images two by two: the batch must be even, got {len(x)}")
    return x.unflatten(0, (-1, 2)).roll(1, dims=1).flatten(0, 1)


def cutmix_mask(rand, size, patch_size=1):
    """One box a sample, its sides on the grid of patches (Yun et al. 2019, arXiv 1905.04899).

    The box covers 1 - lambda of the image, lambda ~ Beta(1, 1), wherever its centre falls; what
    reaches over the border is cut off, and the mean of the mask is the area that remains.

    rand: (B, 3), uniform in [0, 1): lambda and the centre's row and column.
    size: (H, W) of the images in pixels. patch_size: side of a patch in pixels, 1 for any pixel.
    Returns (B, 1, H, W) of zeros and ones. Raises ValueError when patches do not tile the image.
    """
    _check_tiling(size, patch_size)
    cut = (1 - rand[:, :1]).sqrt()  # the box's side as a share of the image's, (B, 1)
    inside = []
    for pixels, centre in zip(size, rand[:, 1:].split(1, dim=1)):
        n = pixels // patch_size
        length = (cut * n).floor()
        start = (centre * n).floor() - (length / 2).floor()
        i = torch.arange(n, device=rand.device)
        within = (i >= start) & (i < start + length)  # (B, n)
        inside.append(within.repeat_interleave(patch_size, dim=1))
    rows, cols = inside
    return (rows[:, None, :, None] & cols[:, None, None, :]).float()


def mixup_mask(rand, size):
    """Mixup as a mask: every pixel has the same share (Zhang et al. 2018, arXiv 1710.09412).

    rand: (B, 3) as for `cutmix_mask`; only lambda ~ Beta(1, 1) is used. Returns (B, 1, H, W).
    """
    return (1 - rand[:, 0]).view(-1, 1, 1, 1).expand(-1, 1, *size)


def mix(images, mask):
    """x = (1 - M) x1 + M x2 (equation 1 of the paper, with M on the pasted image).

    images: (B, C, H, W), floating point. mask: (B, 1, H, W). Returns (B, C, H, W).
    """
    return torch.lerp(images, partner(images), mask.to(images.dtype))


# --- Labels on their way through the network.


def token_labels(mask, patch_size):
    """The first label of each token: the share of its pixels that came from the partner.

    mask: (B, 1, H, W). Returns (B, N, 1) with N = (H / patch_size) * (W / patch_size), row by row.
    Raises ValueError when patches do not tile the image.
    """
    _check_tiling(mask.shape[-2:], patch_size)
    return F.avg_pool2d(mask, patch_size).flatten(2).mT


def add_class_token(labels):
    """The class token has no pixels: it starts with the mean of all patches, CutMix's area share.

    labels: (B, N, K). Returns (B, 1 + N, K).
    """
    return torch.cat([labels.mean(1, keepdim=True), labels], dim=1)


def align(labels, attention):
    """Y = (Y + A @ Y) / 2: labels follow the tokens through one attention and its residual.

    A is averaged over the heads, since each head moves its own slice of the channels, and halved with
    the residual, which keeps what the token held before. It is a measurement of what the layer does:
    no gradient flows back through it.

    labels: (..., N, K). attention: (..., heads, n, N), after the softmax, of the first n tokens: all of
    them, or those that are read further on. Returns (..., n, K).
    """
    a = attention.detach().mean(-3).to(labels.dtype)  # (..., n, N)
    with torch.autocast(labels.device.type, enabled=False):  # bf16 would round the labels each layer
        return (labels[..., : a.shape[-2], :] + a @ labels) / 2


def align_fused(labels, q, k, bias=None):
    """`align` for fused attention: A @ Y is attention with Y in the place of the values.

    The N x N matrix is never stored. Labels are as wide as the heads, the rest filled with zeros: the
    fused kernels ask for values as wide as the keys.

    labels: (B, N, K), or (B, windows, N, K). q: (B, windows * heads, n, head_dim), k likewise with N.
    bias: added to the scores, broadcast to (B, windows * heads, n, N). Returns (..., n, K).
    """
    if bias is not None:
        bias = bias.detach()
    windows = labels.shape[1] if labels.dim() == 4 else 1
    heads = q.shape[1] // windows
    y = F.pad(labels, (0, max(0, q.shape[-1] - labels.shape[-1]))).to(q.dtype)
    y = y.reshape(len(y), windows, 1, *y.shape[-2:])
    # A copy for each head: a kernel may err where heads share their memory (pytorch issue 191937).
    y = y.repeat(1, 1, heads, 1, 1).flatten(1, 2)
    moved = F.scaled_dot_product_attention(q.detach(), k.detach(), y, bias)
    moved = moved[..., : labels.shape[-1]].unflatten(1, (windows, heads)).mean(2, dtype=labels.dtype)
    labels = labels[..., : q.shape[-2], :]
    return (labels + moved.reshape(labels.shape)) / 2


def transmix(labels, attention):
    """TransMix's target, the usual comparison (Chen et al. 2022, arXiv 2111.09833).

    The class token's attention in the last layer weighs the first labels: it sees where the head
    looks, but takes every token to hold still what it held at the input. Averaged with the area, as
    the authors' code does.

    labels: (B, N, K), as `token_labels` gives them. attention: (B, N), of the class token over the
    patches, averaged over heads. Returns (B, K).
    """
    weights = attention / attention.sum(-1, keepdim=True)
    return (labels.mean(1) + torch.einsum("bn,bnk->bk", weights.to(labels.dtype), labels)) / 2


# --- The loss.


def mixed_cross_entropy(logits, targets, share, smoothing=0.0):
    """Soft-target cross-entropy of a mix of two: the share-weighted sum of two ordinary ones.

    logits: (B, classes). targets: (B,), each image's own class. share: (B, 1), of the partner.
    smoothing: label smoothing, of both. Returns the mean over the batch.
    """
    own, other = (
        F.cross_entropy(logits, t, reduction="none", label_smoothing=smoothing)
        for t in (targets, partner(targets))
    )
    return torch.lerp(own, other, share.squeeze(-1).to(own.dtype)).mean()


def mixed_loss(model, images, targets, rand, patch_size, mixing="cutmix", label="tl_align", smoothing=0.1):
    """The loss of a training step: mix a batch, run the model, and label each mix in one of three ways.

    images: (B, 3, H, W), normalised. targets: (B,). rand: (B, 3 + 2 * depth), uniform in [0, 1): three
    columns for mixing, the others for drop path. mixing: "cutmix", "mixup" or "none". label: "area" is
    the baseline; "transmix" needs a class token. Returns a scalar.
    """
    drop = rand[:, 3:].unflatten(1, (-1, 2))  # (B, depth, 2)
    if mixing == "none":
        return F.cross_entropy(model(images, rand=drop), targets, label_smoothing=smoothing)
    box, size = rand[:, :3], images.shape[-2:]
    mask = cutmix_mask(box, size, patch_size) if mixing == "cutmix" else mixup_mask(box, size)
    mixed, labels = mix(images, mask), token_labels(mask, patch_size)
    if label == "area":
        logits, share = model(mixed, rand=drop), mask.mean((2, 3))
    elif label == "transmix":
        logits, looks = model(mixed, rand=drop, looks=True)
        share = transmix(labels, looks)
    else:
        logits, share = model(mixed, labels, rand=drop)
    return mixed_cross_entropy(logits, targets, share, smoothing)


def _check_tiling(size, patch_size):
    if any(pixels % patch_size for pixels in size):
        raise ValueError(f"patches of {patch_size} px do not tile an image of {size[0]} x {size[1]} px")
