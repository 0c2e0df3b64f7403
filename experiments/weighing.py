"""Labels that weigh what is moved, beside the paper's `Y = (Y + A @ Y) / 2`.

The paper's rule takes attention and skip connection to weigh the same, at every token of every
layer, and an attention's weight to tell how much a token brings. Two rules that measure it instead:

    norm    Y = (1 - w) Y + w A @ Y    with w = |branch| / (|branch| + |x|)
    parts   Y = (1 - w) Y + w P        with P_k = |part_k| / (|part_1| + |part_2| + ...)
                                       and part_k = M (x * Y_k)

The branch is what a layer adds to a token, x the token that it is added to. M is what the layer
does to its tokens, linear in them once its own activations are held fixed: of an attention W_o A
W_v, of a Mixer's token MLP W2 diag(gelu(h) / h) W1, of a depthwise convolution its kernel. So
part_k is what source k brings to a token, and its norm tells how much that is; biases are no
source's, but for that of an attention's values, which moves with them. Where tokens are merged or
pooled nothing is skipped, and Y = P.

A token is not zero where an image shows nothing, so from all of these a reference can be taken away
first: the same token of a blank image, or its mean over the batch. No rule here is part of the
published method.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).parent.parent))
import convnext  # noqa: E402
import mixer  # noqa: E402
import swin  # noqa: E402
import vit  # noqa: E402

# What a reference leaves of tokens (B, ..., dim); "last" is the last image of the batch.
LESS = {
    None: lambda t: t,
    "batch": lambda t: t - t.mean(0, keepdim=True),
    "last": lambda t: t - t[-1:],
}

# --- M, of each kind of layer: of the layer and its tokens a function of Y_k, (B, ..., 1), that
# gives part_k.


def by_attention(block, x, less, class_only=False):
    qkv = block.attn.qkv(block.norm1(x))
    q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=block.attn.num_heads)
    if class_only:
        q = q[:, :, :1]
    attention, v = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1), less(v)

    def heads(y):
        return rearrange(attention @ (v * y[:, None]), "b h n d -> b n (h d)")

    return lambda y: F.linear(heads(y), block.attn.proj.weight)


def by_windows(block, x, less):
    size, window = x.shape[1:3], block.window_size
    shift = block.shift(size)
    bias = block.attn.attention_bias(swin.window_mask(size, window, shift, x.device))
    qkv = block.attn.qkv(swin.window_partition(block.norm1(x), window, shift))
    q, k, v = rearrange(
        qkv, "b w n (three h d) -> three b w h n d", three=3, h=block.attn.num_heads
    )
    attention, v = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1), less(v)

    def part(y):
        moved = attention @ (v * swin.window_partition(y, window, shift)[:, :, None])
        moved = F.linear(rearrange(moved, "b w h n d -> b w n (h d)"), block.attn.proj.weight)
        return swin.window_reverse(moved, window, shift, size)

    return part


def by_token_mlp(block, x, less):
    z, (fc1, _, fc2) = block.norm1(x), block.mlp_tokens
    held, z = torch.special.ndtr(fc1(z.mT)), less(z)  # gelu(h) = h * ndtr(h)
    return lambda y: F.linear(held * F.linear((z * y).mT, fc1.weight), fc2.weight).mT


def by_kernel(block, x, less):
    conv, x = block.dwconv, less(x)

    def move(t):
        return F.conv2d(t.movedim(-1, 1), conv.weight, padding=conv.padding, groups=conv.groups)

    return lambda y: move(x * y).movedim(1, -1)


def by_merging(merging, x, less):
    z = less(merging.norm(swin.merge_tokens(x)))
    return lambda y: merging.reduction(z * swin.merge_tokens(y.expand(x.shape)))


def by_strides(down, x, less):
    z, conv = less(down[0](x)), down[1]
    return lambda y: F.conv2d((z * y).movedim(-1, 1), conv.weight, stride=conv.stride).movedim(
        1, -1
    )


def by_pooling(model, x, less):
    last = isinstance(model, convnext.ConvNeXt)  # its norm comes after the average
    z = less(x if last else model.norm(x)).flatten(1, -2)
    weight = model.head.weight * model.norm.weight if last else model.head.weight

    def centre(t):
        return t - t.mean(-1, keepdim=True) if last else t

    return lambda y: F.linear(centre((z * y.flatten(1, -2)).mean(1)), weight)


MIX = {
    vit.Block: by_attention,
    swin.Block: by_windows,
    mixer.Block: by_token_mlp,
    convnext.Block: by_kernel,
}
SHRINK = {swin.PatchMerging: by_merging, convnext.Down: by_strides}


def norm(t, labels):
    return torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=labels.dtype)


def arrived(part, labels, otherwise):
    """P, (B, ..., K), of labels (B, ..., K) whose tokens `part` moves; otherwise: what it is where
    nothing moves. Where K is one, the rest is another source's."""
    sources = [*labels.split(1, dim=-1)] + [1 - labels] * (labels.shape[-1] == 1)
    norms = torch.cat([norm(part(y), labels) for y in sources], dim=-1)
    shares = F.normalize(norms, p=1, dim=-1)[..., : labels.shape[-1]]
    return torch.where(norms.sum(-1, keepdim=True) > 1e-12, shares, otherwise)


# --- In the place of a model's own rule.


def weigh(model, rule="parts", reference=None, merged=True):
    """Have a model's labels follow a rule, "norm" or "parts", less a reference: None, "batch" (its
    mean) or an image (1, 3, H, W). merged: by parts also where tokens are merged and pooled, and
    not by the mean of labels. `intermediate_labels` follows it in the layers, but for such an
    image, and pools as ever. Returns the handles of the hooks that it takes. Raises ValueError for
    another rule or reference."""
    image, reference = (reference, "last") if torch.is_tensor(reference) else (None, reference)
    if rule not in ("norm", "parts") or reference not in LESS:
        raise ValueError(f"no such rule: {rule!r} less {reference!r}")
    less, merged = LESS[reference], merged and rule == "parts"

    # Looked up for the model at hand: a copy of one, such as its running mean, takes the hooks
    # along.
    def blocks(model):
        return [m for m in model.modules() if type(m) in MIX]

    def note(norm2, args):
        norm2.given = args[0].detach()  # the token and what the layer added

    @torch.no_grad()
    def mixed(block, args, kwargs, output):
        x, labels = (*args, None)[:2]
        after = vars(block.norm2).pop("given") if hasattr(block, "norm2") else output[0]
        if labels is None:
            return None
        out, aligned = output
        here, old = (
            t[:, : aligned.shape[1]] for t in (x, labels)
        )  # a ViT's last block gives one row alone
        added, kept = norm(less(after - here), labels), norm(less(here), labels)
        new = 2 * aligned - old  # `tl_align.residual` went half of the way
        if rule == "parts":
            new = arrived(MIX[type(block)](block, x, less, **kwargs), labels, new)
        return out, torch.lerp(old, new, added / (added + kept).clamp(min=1e-12))

    @torch.no_grad()
    def shrunk(layer, args, output):
        x, labels = args
        if labels is not None:
            return output[0], arrived(SHRINK[type(layer)](layer, x, less), labels, output[1])

    def last(block, args, output):
        block.left = output[0].detach(), output[1]

    def read(model, args, output):
        x, labels = vars(blocks(model)[-1]).pop("left")
        if labels is None:
            return None
        logits, aligned = output
        if merged and not hasattr(model, "cls_token"):
            with torch.no_grad():
                aligned = arrived(by_pooling(model, x, less), labels, aligned)
        images = len(aligned) - (image is not None)
        return logits[:images], aligned[:images]

    def add_image(model, args, kwargs):
        images, labels = (*args, kwargs.get("labels"))[:2]
        if labels is not None:

            def more(t, value):
                return F.pad(t, (0, 0) * (t.dim() - 1) + (0, 1), value=value)

            drawn = {
                k: more(v, 1) for k, v in kwargs.items() if k == "rand" and v is not None
            }  # drops nothing
            return (torch.cat([images, image.to(images)]), more(labels, 0)), drawn

    pre, post = torch.nn.Module.register_forward_pre_hook, torch.nn.Module.register_forward_hook
    handles = [pre(b.norm2, note) for b in blocks(model) if hasattr(b, "norm2")]
    handles += [post(b, mixed, with_kwargs=True) for b in blocks(model)]
    handles += [post(m, shrunk) for m in model.modules() if merged and type(m) in SHRINK]
    handles += [post(blocks(model)[-1], last), post(model, read)]
    return handles if image is None else [*handles, pre(model, add_image, with_kwargs=True)]


@contextlib.contextmanager
def by(model, *args, **kwargs):
    """The same for a while."""
    handles = weigh(model, *args, **kwargs)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
