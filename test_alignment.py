"""Tests of token-label alignment and of both models.

The labels are compared with independent references, and the logits with torchvision's models:

    python -m pytest test_alignment.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange

import swin
import tl_align
import vit


def small_vit(**kwargs):
    settings = {"img_size": 24, "patch_size": 4, "num_classes": 7}
    settings.update({"embed_dim": 32, "depth": 3, "num_heads": 4})
    torch.manual_seed(1)  # the same weights in every call
    return add_noise(vit.ViT(**{**settings, **kwargs}))


def small_swin(**kwargs):
    settings = {"img_size": 32, "patch_size": 4, "num_classes": 7}
    settings.update({"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4})
    torch.manual_seed(1)
    return add_noise(swin.Swin(**{**settings, **kwargs}))


def add_noise(model):
    """Make all parameters large, so that attention is far from uniform and each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / math.sqrt(parameter.shape[-1]))
    return model


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Each model with the size of its images.
CASES = {
    "vit": (small_vit, (24, 24)),
    "swin": (small_swin, (32, 32)),  # windows tile the map
    "swin-padded": (small_swin, (40, 24)),
    "swin-odd": (small_swin, (36, 44)),  # patch merging meets maps with odd sides
    "swin-one-window": (small_swin, (16, 12)),
}


@pytest.fixture(params=CASES)
def case(request):
    """A function that builds the model, two images, and their patch labels (2, N, 1)."""
    build_model, (height, width) = CASES[request.param]
    images = torch.randn(2, 3, height, width)
    labels = torch.rand(2, (height // 4) * (width // 4), 1)
    return build_model, images, labels


# ------------------------------------------------------------------------------------------------
# Independent references: one attention matrix per block and image, computed from the tokens that
# enter the block, from its weights, and from the positions of the tokens.


def find_blocks(model):
    return [m for m in model.modules() if isinstance(m, (vit.Block, swin.Block))]


def record_block_inputs(model, images):
    """The tokens that enter each block."""
    inputs = []

    def record(block, args):
        inputs.append(args[0])

    hooks = [block.register_forward_pre_hook(record) for block in find_blocks(model)]
    model(images)
    for hook in hooks:
        hook.remove()
    return inputs


def queries_and_keys(block, x):
    """One image's tokens (N, dim) to queries and keys (heads, N, head_dim)."""
    q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    num_heads = block.attn.num_heads
    q = q.reshape(len(x), num_heads, -1).transpose(0, 1)
    k = k.reshape(len(x), num_heads, -1).transpose(0, 1)
    return q, k


def vit_attention_matrix(block, x):
    """x: (N, dim), one image. Returns A, averaged over the heads, (N, N)."""
    q, k = queries_and_keys(block, x)
    scores = torch.einsum("hid,hjd->hij", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp()
    return (weights / weights.sum(-1, keepdim=True)).mean(0)


def vit_reference_labels(model, images, labels):
    inputs = record_block_inputs(model, images)
    class_labels = []
    for image in range(len(images)):
        y = torch.cat([labels[image].mean(0, keepdim=True), labels[image]])
        for block, x in zip(model.blocks, inputs, strict=True):
            y = (y + vit_attention_matrix(block, x[image]) @ y) / 2
        class_labels.append(y[0])
    return torch.stack(class_labels)


def swin_attention_matrix(block, x, is_shifted):
    """x: (H, W, dim), one image. Returns A, averaged over the heads, (H * W, H * W)."""
    height, width = x.shape[:2]
    w = block.window_size
    row_shift = w // 2 if is_shifted and height > w else 0
    col_shift = w // 2 if is_shifted and width > w else 0
    q, k = queries_and_keys(block, x.flatten(0, 1))
    weights = torch.zeros(block.attn.num_heads, height * width, height * width, dtype=x.dtype)
    for i in range(height * width):
        for j in range(height * width):
            row_i, col_i = divmod(i, width)
            row_j, col_j = divmod(j, width)
            # Shifted windows start at -w + shift, shift, w + shift, ... No window wraps around.
            same_row = (row_i - row_shift) // w == (row_j - row_shift) // w
            same_col = (col_i - col_shift) // w == (col_j - col_shift) // w
            if same_row and same_col:
                index = (row_i - row_j + w - 1) * (2 * w - 1) + (col_i - col_j + w - 1)
                score = (q[:, i] * k[:, j]).sum(-1) / math.sqrt(q.shape[-1])
                score = score + block.attn.relative_position_bias_table[index]
                weights[:, i, j] = score.exp()
    return (weights / weights.sum(-1, keepdim=True)).mean(0)


def merge_matrix(height, width):
    """The matrix that averages 2 x 2 neighbours, or those of them that exist."""
    new_height = math.ceil(height / 2)
    new_width = math.ceil(width / 2)
    matrix = torch.zeros(new_height * new_width, height * width, dtype=torch.float64)
    for row in range(height):
        for col in range(width):
            matrix[row // 2 * new_width + col // 2, row * width + col] = 1
    return matrix / matrix.sum(1, keepdim=True)


def swin_reference_labels(model, images, labels):
    inputs = record_block_inputs(model, images)
    mean_labels = []
    for image in range(len(images)):
        block_inputs = iter(inputs)
        y = labels[image]
        for stage in model.layers:
            for i, block in enumerate(stage.blocks):
                x = next(block_inputs)[image]
                y = (y + swin_attention_matrix(block, x, is_shifted=i % 2 == 1) @ y) / 2
            if stage.downsample is not None:
                y = merge_matrix(*x.shape[:2]) @ y
        mean_labels.append(y.mean(0))
    return torch.stack(mean_labels)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_labels_match_token_by_token_reference(case, fused):
    build_model, images, labels = case
    model = build_model(fused=fused).double()
    images = images.double()
    labels = labels.double()
    if isinstance(model, vit.ViT):
        expected = vit_reference_labels(model, images, labels)
    else:
        expected = swin_reference_labels(model, images, labels)
    _, aligned = model(images, labels)
    torch.testing.assert_close(aligned, expected, atol=1e-10, rtol=0)
    assert (aligned - labels.mean(1)).abs().max() > 1e-3  # alignment does change the labels


def authors_loss(model, images, mask, targets, smoothing):
    """The rule of the authors' code (github.com/Euphoria16/TL-Align): dense smoothed labels, which
    every block updates, and soft-target cross-entropy with the class token's label."""
    num_classes = model.head.out_features
    off_value = smoothing / num_classes
    on_value = 1 - smoothing + off_value
    first = torch.full((len(images), num_classes), off_value, dtype=images.dtype)
    first.scatter_(1, targets[:, None], on_value)
    second = tl_align.partner(first)

    is_pasted = mask[:, 0, :: model.patch_size, :: model.patch_size].flatten(1).bool()  # (B, N)
    area = mask.mean((1, 2, 3))[:, None]
    patch_labels = torch.where(is_pasted[:, :, None], second[:, None], first[:, None])
    class_label = (1 - area) * first + area * second
    labels = torch.cat([class_label[:, None], patch_labels], dim=1)  # (B, 1 + N, num_classes)

    x = model.patch_embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(images), -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        qkv = block.attn.qkv(block.norm1(x))
        q, k, v = rearrange(qkv, "b n (c h d) -> c b h n d", c=3, h=block.attn.num_heads)
        scale = q.shape[-1] ** -0.5
        attn = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)
        labels = (attn.detach().mean(1) @ labels + labels) / 2
        x = x + block.attn.proj(rearrange(attn @ v, "b h n d -> b n (h d)"))
        x = x + block.mlp(block.norm2(x))
    log_probabilities = model.head(model.norm(x)[:, 0]).log_softmax(-1)
    return -(labels[:, 0] * log_probabilities).sum(-1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradients_match_the_authors_rule(fused, smoothing):
    model = small_vit(fused=fused).double()
    images = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    targets = torch.tensor([3, 1, 0, 6])
    rand = torch.tensor([[0.5, 0.4, 0.5], [0.3, 0.0, 0.9], [0.8, 0.6, 0.1], [0.1, 0.5, 0.5]])
    mask = tl_align.cutmix_mask(rand.double(), (24, 24), model.patch_size).double()
    images = tl_align.mix(images, mask)

    logits, share = model(images, tl_align.token_labels(mask, model.patch_size))
    loss = tl_align.mixed_cross_entropy(logits, targets, share, smoothing)
    expected_loss = authors_loss(model, images, mask, targets, smoothing)
    torch.testing.assert_close(loss, expected_loss)

    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected_gradients = torch.autograd.grad(expected_loss, list(model.parameters()))
    torch.testing.assert_close(gradients, expected_gradients)


# ------------------------------------------------------------------------------------------------
# The label rules.


def test_align_of_two_tokens_matches_a_calculation_by_hand():
    labels = torch.tensor([[[0.0], [1.0]]])
    first_head = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    second_head = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    attn = torch.stack([first_head, second_head])[None]  # on average [[0.25, 0.75], [0.75, 0.25]]
    assert tl_align.attend(labels, attn).flatten().tolist() == [0.75, 0.25]
    assert tl_align.align(labels, attn).flatten().tolist() == [0.375, 0.625]


def test_class_token_starts_with_the_mean_of_the_patch_labels():
    labels = torch.tensor([[[0.0], [1.0], [1.0], [1.0]]])
    assert tl_align.add_class_token(labels).flatten().tolist() == [0.75, 0, 1, 1, 1]


def test_rules_pass_none_through():
    attn = torch.rand(2, 4, 5, 5)
    q = torch.rand(2, 4, 5, 8)
    assert tl_align.add_class_token(None) is None
    assert tl_align.attend(None, attn) is None
    assert tl_align.attend_fused(None, q, q) is None
    assert tl_align.residual(None, None) is None
    assert tl_align.align(None, attn) is None
    assert swin.window_partition(None, 4, (0, 0)) is None
    assert swin.window_reverse(None, 4, (0, 0), (8, 8)) is None
    assert swin.merge_labels(None) is None


def test_attention_of_another_shape_is_refused():
    x, labels = torch.randn(4, 6, 16), torch.rand(4, 6, 1)
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    _, attn = attention(x, x, x, average_attn_weights=False)
    tl_align.align(labels, attn)
    tl_align.align(labels[0], attn[0])  # of one image
    averaged = attn.mean(1)  # which MultiheadAttention returns by default
    for wrong in (averaged, averaged[0], attn.flatten(0, 1), attn[:2], attn[..., :5]):
        with pytest.raises(ValueError, match="attn must be .*heads"):
            tl_align.align(labels, wrong)
    with pytest.raises(ValueError, match="do not fit A @ Y"):
        tl_align.align(labels, attn[:, :, :1])  # one query only
    q = k = torch.randn(4, 2, 6, 8)
    tl_align.attend_fused(labels, q, k)
    for wrong in (k.transpose(1, 2), k[:, :, :5]):
        with pytest.raises(ValueError, match="labels of 6 tokens do not fit keys"):
            tl_align.attend_fused(labels, q, wrong)
    for wrong in (k.flatten(0, 1), k[:2]):
        with pytest.raises(RuntimeError):
            tl_align.attend_fused(labels, wrong, wrong)


def test_attend_keeps_labels_in_float32_under_autocast():
    labels = torch.rand(2, 5, 1)
    attn = torch.rand(2, 4, 5, 5).softmax(-1)
    expected = tl_align.attend(labels, attn)
    with torch.autocast("cpu", torch.bfloat16):
        attended = tl_align.attend(labels, attn)
    assert attended.dtype == torch.float32
    torch.testing.assert_close(attended, expected)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_one_share_per_token_equals_dense_class_labels(case, fused):
    build_model, images, share = case
    model = build_model(fused=fused)
    first = F.one_hot(torch.tensor([3, 0]), 20).float()  # more classes than a head has channels
    second = F.one_hot(torch.tensor([1, 4]), 20).float()
    dense_labels = (1 - share) * first[:, None] + share * second[:, None]  # (B, N, 20)
    _, aligned = model(images, share)
    _, dense_aligned = model(images, dense_labels)
    expected = (1 - aligned) * first + aligned * second
    torch.testing.assert_close(dense_aligned, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_rows_sum_to_one_in_every_layer(case, fused):
    build_model, images, share = case
    labels = torch.cat([1 - share, 0.3 * share, 0.7 * share], dim=-1)
    layers = build_model(fused=fused).intermediate_labels(images, labels)
    for label_map, pooled_label in layers:
        torch.testing.assert_close(label_map.sum(-1), torch.ones(label_map.shape[:-1]))
        torch.testing.assert_close(pooled_label.sum(-1), torch.ones(2))
        assert label_map.min() >= 0
        assert pooled_label.min() >= 0


@torch.no_grad()
def test_intermediate_labels_start_with_the_given_and_end_with_the_aligned_labels(case):
    build_model, images, labels = case
    model = build_model()
    layers = model.intermediate_labels(images, labels)
    _, aligned = model(images, labels)
    assert len(layers) == model.depth + 1
    first_map, first_label = layers[0]
    assert torch.equal(first_map.flatten(1, 2), labels)
    torch.testing.assert_close(first_label, labels.mean(1))
    torch.testing.assert_close(layers[-1][1], aligned)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 1.0, 0.37], ids=["unmixed", "all-partner", "mixup"])
def test_equal_labels_stay_unchanged(case, share):
    build_model, images, labels = case
    _, aligned = build_model()(images, torch.full_like(labels, share))
    torch.testing.assert_close(aligned, torch.full((2, 1), share), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_logits_do_not_depend_on_labels(case, fused):
    build_model, images, labels = case
    model = build_model(fused=fused)
    logits, _ = model(images, labels)
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize("fused", [False, True])
def test_aligned_labels_carry_no_gradient(case, fused):
    build_model, images, labels = case
    logits, aligned = build_model(fused=fused)(images, labels)
    assert logits.requires_grad
    assert not aligned.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_cross_entropy_equals_cross_entropy_with_the_dense_target(smoothing):
    logits = torch.randn(8, 10)
    targets = torch.randint(10, (8,))
    share = torch.rand(8, 1)
    one_hot = F.one_hot(targets, 10).float()
    dense_target = (1 - share) * one_hot + share * tl_align.partner(one_hot)
    expected = F.cross_entropy(logits, dense_target, label_smoothing=smoothing)
    loss = tl_align.mixed_cross_entropy(logits, targets, share, smoothing)
    torch.testing.assert_close(loss, expected)


# ------------------------------------------------------------------------------------------------
# Explicit and fused attention, precision, compilation.


def loss_gradients(model, images, labels, rand=None):
    """The gradients of the loss with aligned labels, as one vector."""
    model.zero_grad()
    logits, aligned = model(images, labels, rand=rand)
    targets = torch.arange(len(images))
    tl_align.mixed_cross_entropy(logits, targets, aligned).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_explicit_and_fused_attention_agree(case):
    build_model, images, labels = case
    explicit = build_model(fused=False)
    fused = build_model(fused=True)
    with torch.no_grad():
        outputs = explicit(images, labels)
        torch.testing.assert_close(fused(images, labels), outputs, atol=1e-5, rtol=1e-5)
    gradients = loss_gradients(explicit, images, labels)
    fused_gradients = loss_gradients(fused, images, labels)
    torch.testing.assert_close(fused_gradients, gradients, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_bf16_results_are_close_to_float32(case, fused):
    build_model, images, labels = case
    model = build_model(fused=fused)
    exact_logits, exact_aligned = model(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits, aligned = model(images, labels)
    assert aligned.dtype == torch.float32
    # bf16 has 8 bits of precision, and its errors add up over the layers.
    logits_error = (logits.float() - exact_logits).abs().max()
    assert logits_error < 0.06 * exact_logits.abs().max()
    assert (aligned - exact_aligned).abs().max() < 0.06 * exact_aligned.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_models_and_mixing_work_in_other_precisions(case, fused, dtype):
    build_model, images, _ = case
    model = build_model(fused=fused, drop_path_rate=0.1).to(dtype).train()
    images = images.to(dtype)
    mask = tl_align.cutmix_mask(torch.rand(2, 3), images.shape[-2:], 4)
    logits, aligned = model(tl_align.mix(images, mask), tl_align.token_labels(mask, 4))
    loss = tl_align.mixed_cross_entropy(logits, torch.tensor([1, 2]), aligned)
    loss.backward()
    assert logits.dtype == dtype
    assert loss.dtype == dtype
    assert logits.isfinite().all()
    assert aligned.isfinite().all()


def record_attention_calls(monkeypatch):
    """Returns a list to which every call of fused attention adds its arguments, and whether the
    cuDNN kernel is allowed."""
    calls = []
    original = F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None):
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        calls.append({"query": query, "value": value, "bias": attn_mask, "cudnn": cudnn})
        return original(query, key, value, attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


@torch.no_grad()
def test_fused_attention_of_the_vit_never_has_a_query_of_length_one(monkeypatch):
    model = small_vit(fused=True)
    calls = record_attention_calls(monkeypatch)
    model(torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1))
    query_lengths = [call["query"].shape[-2] for call in calls]
    assert query_lengths == [37, 37, 37, 37]  # tokens and labels in every block but the last


@torch.no_grad()
@pytest.mark.parametrize("img_size, window_size", [(224, 7), (384, 12)])
def test_bias_of_fused_attention_is_contiguous_in_every_stage(img_size, window_size, monkeypatch):
    model = swin.Swin(
        img_size=img_size,
        embed_dim=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 2),
        window_size=window_size,
        fused=True,
    )
    calls = record_attention_calls(monkeypatch)
    num_patches = (img_size // 4) ** 2
    model(torch.randn(1, 3, img_size, img_size), torch.rand(1, num_patches, 1))
    assert len(calls) == 2 * model.depth  # tokens and labels
    for call in calls:
        assert call["bias"].is_contiguous()
        assert call["bias"].stride(-1) == 1


@torch.no_grad()
@pytest.mark.parametrize("num_sources", [1, 20])
def test_fused_labels_are_as_wide_as_the_kernels_require(monkeypatch, num_sources):
    calls = record_attention_calls(monkeypatch)
    small_vit(fused=True, num_heads=2)(  # heads 16 wide
        torch.randn(2, 3, 24, 24), torch.rand(2, 36, num_sources)
    )
    widths = {call["value"].shape[-1] for call in calls[1::2]}
    assert widths == {16 if num_sources == 1 else 20}
    calls.clear()
    small_swin(fused=True, embed_dim=32)(torch.randn(2, 3, 32, 32), torch.rand(2, 64, num_sources))
    assert all(call["query"].shape[-1] == 16 for call in calls)
    widths = {call["value"].shape[-1] for call in calls[1::2]}
    assert widths == {8 if num_sources == 1 else 24}


@torch.no_grad()
def test_fused_labels_are_copied_for_every_head(monkeypatch):
    # Kernels may be wrong if heads share memory: github.com/pytorch/pytorch/issues/191937.
    model = small_vit(fused=True)
    calls = record_attention_calls(monkeypatch)
    model(torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1))
    label_calls = calls[1::2]
    assert len(label_calls) == 2
    for call in label_calls:
        assert call["value"].is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("build_model", [small_vit, small_swin])
def test_attention_is_computed_without_the_cudnn_kernel(build_model, monkeypatch):
    # Its gradients can be NaN: NVIDIA/cudnn-frontend issue 160, pytorch issue 196678.
    model = build_model(fused=True)
    calls = record_attention_calls(monkeypatch)
    num_patches = (model.img_size // 4) ** 2
    images = torch.randn(2, 3, model.img_size, model.img_size)
    model(images, torch.rand(2, num_patches, 1))
    assert calls and not any(call["cudnn"] for call in calls)


@pytest.mark.parametrize(
    "build_model, img_size, fused", [(small_vit, 24, False), (small_swin, 32, True)]
)
def test_training_step_compiles_without_graph_breaks(build_model, img_size, fused):
    model = build_model(drop_path_rate=0.2, fused=fused).train()
    images = torch.randn(4, 3, img_size, img_size)
    labels = torch.rand(4, (img_size // 4) ** 2, 1)
    rand = torch.rand(4, model.depth, 2)
    expected = loss_gradients(model, images, labels, rand)
    # This backend traces the forward and the backward pass, but generates no code, which is slow.
    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = loss_gradients(compiled_model, images, labels, rand)
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------
# The class-only last block, windows, drop path, and wrong shapes.


def forward_with_full_last_block(model, images, labels, rand):
    x, labels = model.embed(images, labels)
    for i, block in enumerate(model.blocks):
        x, labels = block(x, labels, (rand[:, i, 0], rand[:, i, 1]))
    return model.head(model.norm(x[:, 0])), labels[:, 0]


@pytest.mark.parametrize("fused", [False, True])
def test_class_only_last_block_matches_full_block(fused):
    model = small_vit(fused=fused, drop_path_rate=0.3).double().train()
    images = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    labels = torch.rand(4, 36, 1, dtype=torch.float64)
    rand = torch.rand(4, model.depth, 2)
    targets = torch.tensor([1, 2, 3, 4])
    parameters = list(model.parameters())

    logits, aligned = model(images, labels, rand)
    expected_logits, expected_aligned = forward_with_full_last_block(model, images, labels, rand)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(aligned, expected_aligned)

    gradients = torch.autograd.grad(F.cross_entropy(logits, targets), parameters)
    expected_loss = F.cross_entropy(expected_logits, targets)
    expected_gradients = torch.autograd.grad(expected_loss, parameters)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("size", [(8, 12), (7, 10)], ids=["tiled", "padded"])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (2, 0)])
def test_window_reverse_undoes_window_partition(size, shift):
    x = torch.randn(2, *size, 5)
    windows = swin.window_partition(x, 4, shift)
    assert windows.shape == (2, 6, 16, 5)
    assert torch.equal(swin.window_reverse(windows, 4, shift, size), x)


@pytest.mark.parametrize("module", [vit, swin], ids=["vit", "swin"])
def test_drop_path_drops_a_whole_sample_or_scales_it(module):
    drop_path = module.DropPath(0.25)
    x = torch.randn(4, 3, 2)
    rand = torch.tensor([0.0, 0.24, 0.25, 0.99])
    expected = torch.stack([0 * x[0], 0 * x[1], x[2] / 0.75, x[3] / 0.75])
    torch.testing.assert_close(drop_path(x, rand), expected)
    torch.testing.assert_close(drop_path(x[1:], rand[1:]), expected[1:])  # whatever the batch
    assert torch.equal(module.DropPath(0.0)(x, rand), x)
    assert torch.equal(drop_path.eval()(x, rand), x)


@pytest.mark.parametrize("module", [vit, swin], ids=["vit", "swin"])
def test_drop_path_draws_one_number_per_sample(module):
    x = module.DropPath(0.25)(torch.ones(10_000, 3, 2)).flatten(1)
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert (x[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert x.mean().item() == pytest.approx(1, abs=0.02)


@torch.no_grad()
@pytest.mark.parametrize("build_model, img_size", [(small_vit, 24), (small_swin, 32)])
def test_models_drop_the_branches_that_rand_selects(build_model, img_size):
    images = torch.randn(4, 3, img_size, img_size)
    model = build_model(drop_path_rate=0.5).train()
    rand = torch.rand(4, model.depth, 2)
    logits = model(images, rand=rand)
    for sample in range(4):
        # The same model without drop path, the last layer of each branch scaled instead.
        scaled_model = build_model()
        for i, block in enumerate(find_blocks(scaled_model)):
            rate = 0.5 * i / (model.depth - 1)
            for branch, last_layer in enumerate([block.attn.proj, block.mlp.fc2]):
                scale = 0 if rand[sample, i, branch] < rate else 1 / (1 - rate)
                last_layer.weight.mul_(scale)
                last_layer.bias.mul_(scale)
        expected = scaled_model(images[sample : sample + 1])
        torch.testing.assert_close(logits[sample : sample + 1], expected, atol=1e-5, rtol=1e-5)
    model.eval()
    assert torch.equal(model(images, rand=rand), model(images))


@pytest.mark.parametrize("build_model, size", CASES.values(), ids=CASES)
def test_wrong_shapes_raise_an_error_that_names_the_expected_shape(build_model, size):
    model = build_model()
    images = torch.randn(2, 3, *size)
    num_patches = size[0] // 4 * (size[1] // 4)
    with pytest.raises(
        ValueError, match=rf"\(2, {num_patches}, K\).*got \(2, {num_patches + 1}, 1\)"
    ):
        model(images, torch.rand(2, num_patches + 1, 1))
    with pytest.raises(ValueError, match=rf"\(2, {num_patches}, K\).*got \(2, {num_patches}\)"):
        model(images, torch.rand(2, num_patches))
    with pytest.raises(ValueError, match=r"\(B, 3, .*got \(2, 3, 30, 30\)"):
        model(torch.randn(2, 3, 30, 30))
    with pytest.raises(ValueError, match="patches of 5 px do not tile an image of 24 x 24 px"):
        build_model(img_size=24, patch_size=5)


# ------------------------------------------------------------------------------------------------
# Mixing.


def test_partners_are_neighbours_and_mutual():
    x = torch.arange(8)
    assert tl_align.partner(x).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert torch.equal(tl_align.partner(tl_align.partner(x)), x)
    with pytest.raises(ValueError, match="even, got 3"):
        tl_align.partner(x[:3])


def test_splitting_a_batch_between_pairs_keeps_the_partners():
    x = torch.arange(8)
    parts = [tl_align.partner(x[:2]), tl_align.partner(x[2:])]
    assert torch.equal(torch.cat(parts), tl_align.partner(x))


def test_cutmix_box_covers_one_minus_lambda_and_is_clipped_at_the_border():
    rand = torch.tensor([[0.75, 0.5, 0.5], [0.75, 0.0, 0.99], [1.0, 0.5, 0.5], [0.0, 0.5, 0.5]])
    expected = torch.zeros(4, 1, 8, 8)
    expected[0, 0, 2:6, 2:6] = 1  # half the side, a quarter of the image
    expected[1, 0, :2, 5:] = 1  # clipped at the top right corner
    expected[3] = 1  # lambda = 0: the whole image. lambda = 1 pastes nothing.
    assert torch.equal(tl_align.cutmix_mask(rand, (8, 8)), expected)


def test_cutmix_boxes_are_aligned_with_the_patch_grid():
    mask = tl_align.cutmix_mask(torch.rand(64, 3), (24, 32), patch_size=4)
    labels = tl_align.token_labels(mask, 4)
    assert set(labels.unique().tolist()) == {0.0, 1.0}  # no patch is cut through
    torch.testing.assert_close(labels.mean((1, 2)), mask.mean((1, 2, 3)))
    for sample in mask[:, 0].bool():
        rows = sample.any(dim=1)
        cols = sample.any(dim=0)
        assert torch.equal(sample, rows[:, None] & cols[None, :])  # a single rectangle
    assert 0.2 < mask.mean() < 0.5  # 1/2 on average, minus the clipped parts


def test_mix_pastes_the_partners_pixels_where_the_mask_is_one():
    images = torch.randn(8, 3, 24, 32)
    mask = tl_align.cutmix_mask(torch.rand(8, 3), (24, 32))
    is_pasted = mask.bool().expand(-1, 3, -1, -1)
    expected = torch.where(is_pasted, tl_align.partner(images), images)
    assert torch.equal(tl_align.mix(images, mask), expected)


def test_mixup_blends_every_pixel_with_the_same_share():
    images = torch.randn(2, 3, 8, 8)
    rand = torch.tensor([[0.7, 0, 0], [0.2, 0, 0]])
    mixed = tl_align.mix(images, tl_align.mixup_mask(rand, (8, 8)))
    torch.testing.assert_close(mixed[0], 0.7 * images[0] + 0.3 * images[1])
    torch.testing.assert_close(mixed[1], 0.2 * images[1] + 0.8 * images[0])


def test_token_labels_are_the_share_of_pasted_pixels_in_each_patch():
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :3, 4:] = 1  # three rows of the upper middle and the upper right patch
    assert tl_align.token_labels(mask, 4).flatten().tolist() == [0, 0.75, 0.75, 0, 0, 0]
    with pytest.raises(ValueError, match="patches of 5 px do not tile an image of 8 x 12 px"):
        tl_align.token_labels(mask, 5)


# ------------------------------------------------------------------------------------------------
# The models are the published ones.

TORCHVISION_VIT_NAMES = {
    "conv_proj": "patch_embed.proj",
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "encoder.ln": "norm",
    "heads.head": "head",
}

TORCHVISION_SWIN_NAMES = {
    "features.0.0": "patch_embed.proj",
    "features.0.2": "patch_embed.norm",
    "features.1.": "layers.0.blocks.",
    "features.2.": "layers.0.downsample.",
    "features.3.": "layers.1.blocks.",
    "features.4.": "layers.1.downsample.",
    "features.5.": "layers.2.blocks.",
    "features.6.": "layers.2.downsample.",
    "features.7.": "layers.3.blocks.",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def load_torchvision_weights(model, torchvision_model, new_names):
    state = {}
    for name, tensor in torchvision_model.state_dict().items():
        for old, new in new_names.items():
            name = name.replace(old, new)
        state[name] = tensor
    model.load_state_dict(model.convert_state_dict(state))


@torch.no_grad()
def test_vit_equals_torchvision():
    torchvision_model = torchvision.models.vit_b_16(num_classes=10).eval()
    torch.nn.init.normal_(torchvision_model.heads.head.weight, std=0.02)  # it is zero at first
    model = vit.deit_base(num_classes=10, init_std=None).eval()
    load_torchvision_weights(model, torchvision_model, TORCHVISION_VIT_NAMES)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(images), torchvision_model(images), atol=1e-4, rtol=0)


def build_swin_and_torchvision_swin():
    """Both with the same random weights."""
    torchvision_model = torchvision.models.swin_t(num_classes=10).eval()
    for name, parameter in torchvision_model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter)
    model = swin.swin_tiny(num_classes=10, init_std=None).eval()
    load_torchvision_weights(model, torchvision_model, TORCHVISION_SWIN_NAMES)
    return model, torchvision_model


@torch.no_grad()
def test_swin_equals_torchvision_at_224_px_but_not_at_256_px_where_it_masks_padding():
    model, torchvision_model = build_swin_and_torchvision_swin()
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(images), torchvision_model(images), atol=1e-4, rtol=0)
    images = torch.randn(2, 3, 256, 256)
    assert (model(images) - torchvision_model(images)).abs().max() > 1e-2


@torch.no_grad()
def test_first_swin_block_differs_from_torchvision_only_in_windows_with_padding():
    model, torchvision_model = build_swin_and_torchvision_swin()
    images = torch.randn(2, 3, 256, 256)
    x, _ = model.embed(images)
    x, _ = model.layers[0].blocks[0](x)
    torchvision_x = torchvision_model.features[0](images)
    torchvision_x = torchvision_model.features[1][0](torchvision_x)
    # Nine windows of 7 tokens cover 63 rows and columns of the 64 x 64 map. The last row and the
    # last column share their windows with padding.
    difference = (x - torchvision_x).abs().amax(-1)  # (B, 64, 64)
    assert difference[:, :63, :63].max() < 1e-4
    assert difference[:, 63].min() > 1e-3
    assert difference[:, :, 63].min() > 1e-3


MILLIONS_OF_PARAMETERS = {
    vit.deit_tiny: 5.7,
    vit.deit_small: 22.1,
    vit.deit_base: 86.6,
    swin.swin_tiny: 28.3,
    swin.swin_small: 49.6,
    swin.swin_base: 87.8,
}


@pytest.mark.parametrize("build_model", MILLIONS_OF_PARAMETERS)
def test_parameter_counts_are_the_published_ones(build_model):
    with torch.device("meta"):
        model = build_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == MILLIONS_OF_PARAMETERS[build_model]


@pytest.mark.parametrize("build_model", [vit.deit_tiny, swin.swin_tiny])
def test_official_models_start_with_weights_of_std_0_02_and_biases_of_zero(build_model):
    model = build_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert module.bias is None or module.bias.eq(0).all()
    if isinstance(model, vit.ViT):
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("build_model", [vit.vit_micro, swin.swin_micro])
def test_micro_models_keep_the_initialisation_of_pytorch(build_model):
    for module in build_model().modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5  # weights and biases are uniform in (-bound, bound)
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert module.bias is None or module.bias.abs().max() > 0


def test_vit_micro_starts_with_a_sine_cosine_position_embedding_and_trains_it():
    pos_embed = vit.vit_micro().pos_embed
    assert pos_embed.requires_grad
    grid = pos_embed.detach()[0, 1:].unflatten(0, (8, 8))
    expected = [math.sin(3), math.sin(5), math.cos(3), math.cos(5)]  # of the row and the column
    assert grid[3, 5, ::16].tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------
# Checkpoints.


def weights_and_biases(layers):
    names = []
    for layer in layers:
        names += [f"{layer}.weight", f"{layer}.bias"]
    return names


BLOCK_NAMES = weights_and_biases(["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
OUTER_NAMES = weights_and_biases(["patch_embed.proj", "norm", "head"])


def test_vit_has_the_parameter_names_of_deit():
    expected = [*OUTER_NAMES, "cls_token", "pos_embed"]
    for i in range(12):
        expected += [f"blocks.{i}.{name}" for name in BLOCK_NAMES]
    assert sorted(vit.deit_tiny().state_dict()) == sorted(expected)


def test_swin_has_the_parameter_names_of_microsoft():
    expected = [*OUTER_NAMES, "patch_embed.norm.weight", "patch_embed.norm.bias"]
    for i, depth in enumerate([2, 2, 6, 2]):
        for j in range(depth):
            expected += [f"layers.{i}.blocks.{j}.{name}" for name in BLOCK_NAMES]
            expected.append(f"layers.{i}.blocks.{j}.attn.relative_position_bias_table")
    for i in range(3):
        for name in ("norm.weight", "norm.bias", "reduction.weight"):
            expected.append(f"layers.{i}.downsample.{name}")
    assert sorted(swin.swin_tiny().state_dict()) == sorted(expected)


def test_swin_ignores_the_buffers_in_microsofts_checkpoints():
    model = swin.swin_micro()
    state = model.state_dict()
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    model.load_state_dict(model.convert_state_dict(state))


def test_swin_converts_timms_parameter_names():
    model = swin.swin_micro()
    state = model.state_dict()
    timm_state = {}
    for name, tensor in state.items():
        name = name.replace("layers.0.downsample.", "layers.1.downsample.")
        name = name.replace("head.", "head.fc.")
        timm_state[name] = tensor
    assert "layers.1.downsample.reduction.weight" in timm_state
    converted = model.convert_state_dict(timm_state)
    assert converted.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(converted[name], tensor)


def test_vit_loads_checkpoints_of_another_image_size():
    state = small_vit().state_dict()
    larger_model = small_vit(img_size=48)
    larger_model.load_state_dict(larger_model.convert_state_dict(state))
    assert torch.equal(larger_model.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert small_vit().convert_state_dict(state)["pos_embed"] is state["pos_embed"]


def test_position_embedding_of_a_model_with_extra_tokens_is_unchanged():
    pos_embed = torch.zeros(1, 2 + 36, 32)  # a class and a distillation token
    converted = small_vit(img_size=48).convert_state_dict({"pos_embed": pos_embed})
    assert converted["pos_embed"] is pos_embed


def test_interpolated_position_embedding_keeps_rows_and_columns_apart():
    rows, cols = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    grid = torch.stack([rows, cols], dim=-1)  # (6, 6, 2)
    pos_embed = torch.cat([torch.zeros(1, 2), grid.flatten(0, 1)])[None]
    resized = vit.interpolate_pos_embed(pos_embed, (9, 12))[0, 1:].unflatten(0, (9, 12))
    row_channel = resized[:, :, 0]
    col_channel = resized[:, :, 1]
    torch.testing.assert_close(row_channel, row_channel[:, :1].expand(9, 12))
    torch.testing.assert_close(col_channel, col_channel[:1].expand(9, 12))
    assert (row_channel.diff(dim=0) > 0).all()
    assert (col_channel.diff(dim=1) > 0).all()


def test_swin_loads_checkpoints_of_another_window_size():
    table = torch.arange(7.0)[:, None].expand(7, 7).flatten()[:, None]  # the row offset, one head
    resized = swin.interpolate_bias_table(table, 11**2).unflatten(0, (11, 11))[..., 0]
    torch.testing.assert_close(resized, resized[:, :1].expand(11, 11))
    assert (resized.diff(dim=0) > 0).all()

    model = small_swin(window_size=6)
    model.load_state_dict(model.convert_state_dict(small_swin().state_dict()))
