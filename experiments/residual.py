"""A residual that is measured: labels that weigh attention and skip connection by what each brings.

The paper's `Y = (Y + A @ Y) / 2` says that the two weigh the same, at every token of every layer. Here

    Y = (1 - w) Y + w A @ Y        with w = |branch| / (|branch| + |x|),

the norms of what an attention adds to a token and of the token that it is added to. It is no part of the
published method, and nearer to the truth of `mixing_ratio.py`, at least in a ViT.
"""

import contextlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import swin  # noqa: E402
import vit  # noqa: E402


def weigh(labels, aligned, x, branch):
    """labels, aligned: (..., N, K), before and after `tl_align.align`. x, branch: (..., N, dim), the tokens
    and what the attention adds to them. Returns (..., N, K)."""
    x, branch = (
        torch.linalg.vector_norm(t.detach(), dim=-1, keepdim=True, dtype=labels.dtype) for t in (x, branch)
    )
    return labels + (aligned - labels) * (2 * branch / (branch + x))  # `align` went half of the way


def weigh_by_norm(model):
    """Have the blocks of a ViT or Swin do so. Returns the handles of the hooks that it takes."""

    def summed(norm, args):
        norm.given = args[0].detach()  # the token and what the attention added

    def measured(block, args, output):
        x, labels, *_ = args
        if labels is None:
            return None
        out, aligned = output  # a ViT's last block gives its first row alone
        x, labels = x[:, : aligned.shape[1]], labels[:, : aligned.shape[1]]
        return out, weigh(labels, aligned, x, block.norm2.given - x)

    blocks = [block for block in model.modules() if isinstance(block, (vit.Block, swin.Block))]
    handles = [block.norm2.register_forward_pre_hook(summed) for block in blocks]
    return handles + [block.register_forward_hook(measured) for block in blocks]


def built_by(build):
    """`train.build`, with such blocks where a run's settings have a residual."""

    def built(s, classes):
        model = build(s, classes)
        if "residual" in s:
            weigh_by_norm(model)
        return model

    return built


@contextlib.contextmanager
def by_norm(model):
    """The same for a while."""
    handles = weigh_by_norm(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
