"""TransMix, the usual comparison: the label of a mix follows the class token's last attention.

Chen et al. 2022, arXiv 2111.09833. `transmix_loss` is a loss for `train.train`, in the place of
`train.mixed_loss`. It reads the attention by a hook, so the model must not be compiled.
"""

import contextlib

import torch
from einops import rearrange

import tl_align


def transmix(labels, attention):
    """TransMix's target: the patch labels, weighted by the class token's attention in the last
    layer, and averaged with the area, as in the authors' code. It knows where the head looks, but
    assumes that every token still holds what it held at the input.

    labels: (B, N, K), as `tl_align.token_labels` gives them. attention: (B, N), of the class token
    to the patches, averaged over the heads. Returns (B, K).
    """
    weights = attention / attention.sum(-1, keepdim=True)
    attended = torch.einsum("bn,bnk->bk", weights.to(labels.dtype), labels)
    return (labels.mean(1) + attended) / 2


@torch.no_grad()
def class_attention(attn, x):
    """The class token's attention to the patches, averaged over the heads, (B, N).

    attn: a `vit.Attention`. x: its input, (B, 1 + N, dim).
    """
    q, k, _ = rearrange(attn.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attn.num_heads)
    weights = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)  # (B, h, 1, 1 + N)
    return weights[:, :, 0, 1:].mean(1)


@contextlib.contextmanager
def record_class_attention(model):
    """A list to which every forward pass of a ViT appends `class_attention` of its last block.
    model: a `vit.ViT`, or one that is wrapped by DistributedDataParallel."""
    recorded = []

    def record(attn, args):
        recorded.append(class_attention(attn, args[0]))

    raw_model = getattr(model, "module", model)
    hook = raw_model.blocks[-1].attn.register_forward_pre_hook(record)
    try:
        yield recorded
    finally:
        hook.remove()


def transmix_loss(model, images, targets, mask, rand, args):
    """The loss of a mixed batch with TransMix's target. Arguments as for `train.mixed_loss`."""
    with record_class_attention(model) as attention:
        logits = model(tl_align.mix(images, mask), rand=rand)
    labels = tl_align.token_labels(mask, args.patch_size)
    share = transmix(labels, attention[0])
    return tl_align.mixed_cross_entropy(logits.float(), targets, share, args.smoothing)
