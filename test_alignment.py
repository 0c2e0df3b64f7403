"""The mathematics of token-label alignment, and both models against independent references.

python -m pytest test_alignment.py
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

import swin
import tl_align
import vit


def small_vit(**kwargs):
    return randomized(vit.ViT, {"img_size": 24, "dim": 32, "depth": 3, "heads": 4, **kwargs})


def small_swin(**kwargs):
    return randomized(swin.Swin, {"dim": 16, "depths": (2, 2), "heads": (2, 4), "window": 4, **kwargs})


def randomized(kind, kwargs):
    """The same weights each time, so large that attention is far from uniform and every bias counts."""
    torch.manual_seed(1)
    model = kind(**{"img_size": 32, "patch_size": 4, "num_classes": 7, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) / math.sqrt(p.shape[-1]))
    return model


# Each model with an image size; the Swins: windows that tile, that need padding, that merge odd maps.
MODELS = {
    "vit": (small_vit, (24, 24)),
    "vit-avg": (lambda **k: small_vit(pool="avg", **k), (24, 24)),
    "swin": (small_swin, (32, 32)),
    "swin-padded": (small_swin, (40, 24)),
    "swin-odd": (small_swin, (36, 44)),
    "swin-one-window": (small_swin, (16, 12)),
}


@pytest.fixture(params=MODELS)
def setting(request):
    """A constructor, images and the labels of their patches (B, N, 1)."""
    make, size = MODELS[request.param]
    torch.manual_seed(0)
    labels = torch.rand(2, (size[0] // 4) * (size[1] // 4), 1)
    return make, torch.randn(2, 3, *size), labels


# --- An independent reference: each layer as a matrix that says how much of token j ends in token i, from
# the tokens' coordinates and the layer's weights, one pair of tokens at a time.


def heads_of(attention, x):
    """Queries and keys (heads, N, d) of one image's tokens (N, C)."""
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    return (t.reshape(len(x), attention.heads, -1).transpose(0, 1) for t in (q, k))


def vit_reference(model, images, labels):
    inputs, out = block_inputs(model, images), []
    for image in range(len(images)):
        y = labels[image]
        if model.pool == "cls":
            y = torch.cat([y.mean(0, keepdim=True), y])
        for block, x in zip(model.blocks, inputs):
            q, k = heads_of(block.attn, block.norm1(x[image]))
            n, d = q.shape[1:]
            scores = torch.einsum("hid,hjd->hij", q, k) / math.sqrt(d)
            move = (scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(0)
            y = (torch.eye(n).to(y) @ y + move @ y) / 2
        out.append(y[0] if model.pool == "cls" else y.mean(0))
    return torch.stack(out)


def swin_reference(model, images, labels):
    inputs = iter(block_inputs(model, images))
    size = [side // model.patch_size for side in images.shape[2:]]
    y = labels
    for stage in model.layers:
        for i, block in enumerate(stage.blocks):
            x = next(inputs)
            assert list(x.shape[1:3]) == size
            move = swin_matrix(block, x, size, shifted=i % 2 == 1)  # (B, N, N)
            y = (y + move @ y) / 2
        if stage.downsample is not None:
            y = torch.einsum("ij,bjk->bik", merge_matrix(size).to(y), y)
            size = [(side + 1) // 2 for side in size]
    return y.mean(1)


def swin_matrix(block, x, size, shifted):
    w, table = block.window, block.attn.relative_position_bias_table
    shift = [w // 2 if shifted and side > w else 0 for side in size]
    at = [(r, c) for r in range(size[0]) for c in range(size[1])]
    # Token (r, c) stands in window (r - shift) // w of the shifted grid; what is shifted over the border
    # shares a window with no one but its like, which floor division of negative numbers says by itself.
    window = [tuple((p - s) // w for p, s in zip(rc, shift)) for rc in at]
    n = len(at)
    allowed = torch.tensor([[window[i] == window[j] for j in range(n)] for i in range(n)])
    offset = [[(at[i][0] - at[j][0], at[i][1] - at[j][1]) for j in range(n)] for i in range(n)]
    index = torch.tensor(
        [
            [
                (dr + w - 1) * (2 * w - 1) + dc + w - 1 if allowed[i][j] else 0
                for j, (dr, dc) in enumerate(row)
            ]
            for i, row in enumerate(offset)
        ]
    )
    moves = []
    for image in x:
        q, k = heads_of(block.attn, block.norm1(image.reshape(n, -1)))
        scores = torch.einsum("hid,hjd->hij", q, k) / math.sqrt(q.shape[-1])
        weights = (scores + table[index].permute(2, 0, 1)).exp() * allowed
        moves.append((weights / weights.sum(-1, keepdim=True)).mean(0))
    return torch.stack(moves)


def merge_matrix(size):
    rows, cols = [(side + 1) // 2 for side in size]
    matrix = torch.zeros(rows * cols, size[0] * size[1])
    for r in range(size[0]):
        for c in range(size[1]):
            matrix[r // 2 * cols + c // 2, r * size[1] + c] = 1
    return matrix / matrix.sum(1, keepdim=True)


def blocks_of(model):
    return [m for m in model.modules() if type(m).__name__ == "Block"]


def block_inputs(model, images):
    seen = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in blocks_of(model)]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_labels_move_as_the_layers_move_tokens(setting, fused):
    make, images, labels = setting
    model = make(fused=fused).double()
    images, labels = images.double(), labels.double()
    reference = vit_reference if isinstance(model, vit.ViT) else swin_reference
    _, aligned = model(images, labels)
    expected = reference(model, images, labels)
    torch.testing.assert_close(aligned, expected, atol=1e-6, rtol=0)
    assert (aligned - labels.mean(1)).abs().max() > 1e-3  # and they do move


# --- Facts of the rules.


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_one_share_a_token_equals_dense_class_labels(setting, fused):
    make, images, share = setting
    model = make(fused=fused)
    own, other = F.one_hot(torch.tensor([[3, 1], [0, 4]]), 20).float().unbind(1)
    dense = (1 - share) * own[:, None] + share * other[:, None]  # (B, N, 20): wider than a head
    aligned, dense_aligned = model(images, share)[1], model(images, dense)[1]
    expected = (1 - aligned) * own + aligned * other
    torch.testing.assert_close(dense_aligned, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_sum_to_one_in_every_layer(setting):
    make, images, share = setting
    labels = torch.cat([1 - share, 0.3 * share, 0.7 * share], dim=-1)
    for label_map, read in make().layer_labels(images, labels):
        for y in (label_map, read):
            torch.testing.assert_close(y.sum(-1), torch.ones(y.shape[:-1]))
            assert y.min() >= 0


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 1.0, 0.37], ids=["unmixed", "all of the other", "mixup"])
def test_a_share_that_is_the_same_everywhere_stays_as_it_is(setting, share):
    make, images, labels = setting
    _, aligned = make()(images, torch.full_like(labels, share))
    torch.testing.assert_close(aligned, torch.full((2, 1), share), atol=1e-6, rtol=0)


@torch.no_grad()
def test_logits_are_the_same_with_and_without_labels(setting):
    make, images, labels = setting
    for fused in (False, True):
        model = make(fused=fused)
        assert torch.equal(model(images), model(images, labels)[0])


def test_no_gradient_reaches_the_network_through_labels(setting):
    make, images, labels = setting
    for kwargs in ({"fused": False}, {"fused": True}):
        _, aligned = make(**kwargs)(images, labels)
        assert not aligned.requires_grad


@torch.no_grad()
def test_explicit_and_fused_attention_agree(setting):
    make, images, labels = setting
    for a, b in zip(make(fused=False)(images, labels), make(fused=True)(images, labels)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_explicit_and_fused_agree_under_bf16_within_its_error(setting):
    make, images, labels = setting
    with torch.autocast("cpu", torch.bfloat16):
        explicit, fused = (make(fused=f)(images, labels) for f in (False, True))
    exact = make()(images, labels)
    for a, b, c in zip(explicit, fused, exact):
        error = max((a.float() - c).abs().max(), (b.float() - c).abs().max(), 2**-8 * c.abs().max())
        assert error < 0.06 * c.abs().max()  # 8 bits of mantissa, through a few layers
        assert (a.float() - b.float()).abs().max() <= 2 * error
    assert explicit[1].dtype == fused[1].dtype == torch.float32  # labels keep their precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_models_and_mixing_work_in_other_precisions(setting, fused, dtype):
    make, images, _ = setting
    model, images = make(fused=fused, drop_path=0.1).to(dtype).train(), images.to(dtype)
    mask = tl_align.cutmix_mask(torch.rand(2, 3), images.shape[-2:], 4)
    logits, aligned = model(tl_align.mix(images, mask), tl_align.token_labels(mask, 4))
    loss = tl_align.mixed_cross_entropy(logits, torch.tensor([1, 2]), aligned)
    assert logits.dtype == loss.dtype == dtype and logits.isfinite().all() and aligned.isfinite().all()
    loss.backward()


def test_gradients_of_explicit_and_fused_attention_agree(setting):
    make, images, labels = setting
    grads = []
    for fused in (False, True):
        model = make(fused=fused)
        logits, aligned = model(images, labels)
        tl_align.mixed_cross_entropy(logits, torch.tensor([1, 2]), aligned).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_cross_entropies_equal_the_dense_soft_target(smoothing):
    logits, targets, share = torch.randn(8, 10), torch.randint(10, (8,)), torch.rand(8, 1)
    one_hot = F.one_hot(targets, 10).float()
    dense = (1 - share) * one_hot + share * tl_align.partner(one_hot)
    expected = F.cross_entropy(logits, dense, label_smoothing=smoothing)
    torch.testing.assert_close(tl_align.mixed_cross_entropy(logits, targets, share, smoothing), expected)


def test_transmix_is_the_last_attention_over_the_mask_averaged_with_the_area():
    torch.manual_seed(0)
    model, images, labels = small_vit(), torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1)
    logits, looks = model(images, looks=True)
    share = tl_align.transmix(labels, looks)
    assert torch.equal(logits, model(images)) and not share.requires_grad
    x = block_inputs(model, images)[-1]
    for image in range(2):
        q, k = heads_of(model.blocks[-1].attn, model.blocks[-1].norm1(x[image]))
        weights = (q[:, 0, None] * k / math.sqrt(k.shape[-1])).sum(-1).softmax(-1).mean(0)[1:]
        seen = (weights * labels[image, :, 0]).sum() / weights.sum()
        torch.testing.assert_close(share[image, 0], (seen + labels[image].mean()) / 2)
    with pytest.raises(ValueError, match='pool="avg" has none'):
        small_vit(pool="avg")(images, looks=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_last_block_of_the_class_token_alone_gives_what_the_whole_block_gives(fused, monkeypatch):
    torch.manual_seed(0)
    images, labels, targets = torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1), torch.tensor([1, 2])
    model = small_vit(fused=fused, drop_path=0.3).double().train()
    rand, forward, found = torch.rand(2, model.depth, 2), vit.Block.forward, []
    for block in (forward, lambda self, x, y, keep, rows: forward(self, x, y, keep)):
        monkeypatch.setattr(vit.Block, "forward", block)
        model.zero_grad()
        logits, aligned = model(images.double(), labels.double(), rand=rand)
        tl_align.mixed_cross_entropy(logits, targets, aligned).backward()
        found.append([logits, aligned, *(p.grad.clone() for p in model.parameters())])
    for alone, whole in zip(*found, strict=True):
        torch.testing.assert_close(alone, whole)
    model.eval()
    _, aligned = model(images.double(), labels.double())
    torch.testing.assert_close(model.layer_labels(images.double(), labels.double())[-1][1], aligned)


# --- Mixing.


def test_partners_are_mutual_and_survive_cutting_the_batch_between_pairs():
    x = torch.arange(8)
    assert tl_align.partner(x).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert torch.equal(tl_align.partner(x), torch.cat([tl_align.partner(x[:2]), tl_align.partner(x[2:])]))
    with pytest.raises(ValueError, match="even, got 3"):
        tl_align.partner(x[:3])


def test_cutmix_pastes_boxes_that_lie_on_the_grid_of_patches():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 24, 32)
    mask = tl_align.cutmix_mask(torch.rand(64, 3), (24, 32), patch_size=4)
    labels = tl_align.token_labels(mask, 4)
    assert set(labels.unique().tolist()) == {0.0, 1.0}  # no patch is cut through
    for m in mask[:, 0].bool():  # one box: the product of its rows and its columns
        assert torch.equal(m, m.any(1)[:, None] & m.any(0)[None, :])
    mixed, pasted = tl_align.mix(images, mask), mask.bool().expand(-1, 3, -1, -1)
    assert torch.equal(mixed[pasted], tl_align.partner(images)[pasted])
    assert torch.equal(mixed[~pasted], images[~pasted])
    torch.testing.assert_close(labels.mean((1, 2)), mask.mean((1, 2, 3)))
    assert 0.2 < mask.mean() < 0.5  # E = 1/2, less what the border cuts off


def test_first_labels_are_the_share_of_the_pixels_of_each_patch():
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :3, 4:] = 1  # three rows of the upper middle and upper right patch
    assert tl_align.token_labels(mask, 4).flatten().tolist() == [0, 0.75, 0.75, 0, 0, 0]
    with pytest.raises(ValueError, match="patches of 5 px do not tile an image of 8 x 12 px"):
        tl_align.token_labels(mask, 5)


def test_mixup_is_a_mask_that_is_the_same_everywhere():
    images, rand = torch.randn(2, 3, 8, 8), torch.tensor([[0.7, 0, 0], [0.2, 0, 0]])
    mixed = tl_align.mix(images, tl_align.mixup_mask(rand, (8, 8)))
    torch.testing.assert_close(mixed[0], 0.7 * images[0] + 0.3 * images[1])
    torch.testing.assert_close(mixed[1], 0.2 * images[1] + 0.8 * images[0])


# --- The models are the published ones.


@torch.no_grad()
def test_vit_equals_torchvisions():
    theirs = torchvision.models.vit_b_16(num_classes=10).eval()
    torch.nn.init.normal_(theirs.heads.head.weight, std=0.02)
    names = [
        ("conv_proj", "patch_embed.proj"),
        ("class_token", "cls_token"),
        ("encoder.pos_embedding", "pos_embed"),
        ("encoder.layers.encoder_layer_", "blocks."),
        ("ln_1", "norm1"),
        ("ln_2", "norm2"),
        ("self_attention.in_proj_", "attn.qkv."),
        ("self_attention.out_proj", "attn.proj"),
        ("mlp.0", "mlp.fc1"),
        ("mlp.3", "mlp.fc2"),
        ("encoder.ln", "norm"),
        ("heads.head", "head"),
    ]
    assert_same_logits(vit.deit_base(num_classes=10).eval(), theirs, names)


@torch.no_grad()
def test_swin_equals_torchvisions():
    theirs = torchvision.models.swin_t(num_classes=10).eval()
    names = [("features.0.0", "patch_embed.proj"), ("features.0.2", "patch_embed.norm")]
    names += [(f"features.{2 * i + 1}.", f"layers.{i}.blocks.") for i in range(4)]
    names += [(f"features.{2 * i + 2}.", f"layers.{i}.downsample.") for i in range(3)]
    names += [("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")]
    for name, p in theirs.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(p)
    ours = swin.swin_tiny(num_classes=10).eval()
    assert_same_logits(ours, theirs, names)  # their index buffers are left out by adapt
    images, maps = torch.randn(1, 3, 224, 224), [f"features.{i}" for i in (1, 3, 5)] + ["norm"]
    theirs = create_feature_extractor(theirs, maps)(images)
    for map, name in zip(ours.features(images), maps, strict=True):
        torch.testing.assert_close(map.movedim(1, -1), theirs[name], atol=1e-4, rtol=1e-4)


def assert_same_logits(ours, theirs, names):
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        state[key] = value
    ours.load_state_dict(ours.adapt(state))
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=0)


SIZES = {
    vit.deit_tiny: 5.7,
    vit.deit_small: 22.1,
    vit.deit_base: 86.6,
    swin.swin_tiny: 28.3,
    swin.swin_small: 49.6,
    swin.swin_base: 87.8,
}


@pytest.mark.parametrize("make", SIZES, ids=lambda make: make.__name__)
def test_parameter_counts_are_the_published_ones(make):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in make().parameters()) / 1e6, 1) == SIZES[make]


BLOCK = """norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight
    norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias""".split()
ENDS = "patch_embed.proj.weight patch_embed.proj.bias norm.weight norm.bias head.weight head.bias".split()


def test_official_sizes_start_as_published_and_narrow_ones_as_torch_starts_its_layers():
    tiny, micro = vit.deit_tiny(), vit.vit_micro()
    for model, std in ((tiny, 0.02), (micro, 64**-0.5 / 3**0.5), (swin.swin_tiny(), 0.02)):
        first = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
        assert first.weight.std().item() == pytest.approx(std, rel=0.03)
    assert tiny.pos_embed.std().item() == pytest.approx(0.02, rel=0.02) and tiny.head.bias.eq(0).all()
    grid = micro.pos_embed[0, 1:].unflatten(0, (8, 8)).detach()  # sines and cosines of row and column
    expected = [math.sin(3), math.sin(5), math.cos(3), math.cos(5)]
    assert grid[3, 5, ::16].tolist() == pytest.approx(expected) and micro.pos_embed.requires_grad


def test_parameter_names_are_those_of_deit():
    names = [*ENDS, "cls_token", "pos_embed"] + [f"blocks.{i}.{k}" for i in range(12) for k in BLOCK]
    assert sorted(vit.deit_tiny().state_dict()) == sorted(names)


def test_parameter_names_are_those_of_microsofts_swin_and_its_buffers_are_ignored():
    names = [*ENDS, "patch_embed.norm.weight", "patch_embed.norm.bias"]
    for i, depth in enumerate((2, 2, 6, 2)):
        keys = [*BLOCK, "attn.relative_position_bias_table"]
        names += [f"layers.{i}.blocks.{j}.{k}" for j in range(depth) for k in keys]
        if i < 3:
            names += [f"layers.{i}.downsample.{k}" for k in ("norm.weight", "norm.bias", "reduction.weight")]
    model = swin.swin_tiny()
    state = model.state_dict()
    assert sorted(state) == sorted(names)
    buffers = {
        "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
    }
    model.load_state_dict(model.adapt({**state, **buffers}))


def test_timms_names_of_swin_are_those_of_microsofts_with_merging_at_the_start_of_a_stage():
    model = swin.swin_micro()
    theirs = {
        k.replace("layers.0.downsample", "layers.1.downsample"): v for k, v in model.state_dict().items()
    }
    theirs = {k.replace("head.", "head.fc."): v for k, v in theirs.items()}
    assert "layers.1.downsample.reduction.weight" in theirs
    adapted = model.adapt(theirs)
    assert adapted.keys() == model.state_dict().keys()
    assert all(torch.equal(adapted[k], v) for k, v in model.state_dict().items())


def test_positions_are_resized_for_another_image_size():
    state = small_vit().state_dict()
    larger = small_vit(img_size=48)
    larger.load_state_dict(larger.adapt(state))
    torch.testing.assert_close(larger.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert small_vit().adapt(state)["pos_embed"] is state["pos_embed"]  # the same size: untouched
    distilled = {"pos_embed": torch.zeros(1, 38, 32)}  # two extra tokens: another model, left as it is
    assert larger.adapt(distilled)["pos_embed"] is distilled["pos_embed"]
    wider = small_swin(window=6)
    wider.load_state_dict(wider.adapt(small_swin().state_dict()))


@pytest.mark.parametrize("pool", ["cls", "avg"])
@torch.no_grad()
def test_a_vits_features_are_its_last_tokens_as_a_map_of_any_size(pool):
    model, images = small_vit(pool=pool).eval(), torch.randn(2, 3, 24, 24)
    tokens = []
    model.norm.register_forward_hook(lambda module, args, output: tokens.append(output))
    logits, map = model(images), model.features(images)
    assert map.shape == (2, 32, 6, 6)
    torch.testing.assert_close(map.flatten(2).mT, tokens[1][:, pool == "cls" :])
    read = map.mean((2, 3)) if pool == "avg" else tokens[1][:, 0]
    torch.testing.assert_close(model.head(read), logits)
    larger = small_vit(img_size=48, pool=pool).eval()
    larger.load_state_dict(larger.adapt(model.state_dict()))
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(model.features(images), larger.features(images))
    assert model.features(images[..., :20]).shape == (2, 32, 12, 5)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(2, 3, 48, 30\)"):
        model.features(images[..., :30])


def test_swins_features_are_of_any_size_and_the_last_is_what_the_head_averages():
    model, images = small_swin().eval(), torch.randn(2, 3, 40, 28)
    maps = model.features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 10, 7), (2, 32, 5, 4)]
    torch.testing.assert_close(model.head(maps[-1].mean((2, 3))), model(images))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(2, 3, 40, 30\)"):
        model.features(torch.zeros(2, 3, 40, 30))


@pytest.mark.parametrize("make, size", MODELS.values(), ids=MODELS)
def test_shapes_that_do_not_fit_are_named(make, size):
    model, images = make(), torch.randn(2, 3, *size)
    tokens = size[0] // 4 * (size[1] // 4)
    with pytest.raises(ValueError, match=rf"\(2, {tokens}, K\).*got \(2, {tokens + 1}, 1\)"):
        model(images, torch.rand(2, tokens + 1, 1))
    with pytest.raises(ValueError, match=r"\(B, 3, .*got \(2, 3, 30, 30\)"):
        model(torch.randn(2, 3, 30, 30))
    with pytest.raises(ValueError, match="patches of 5 px do not tile an image of 24 px"):
        make(img_size=24, patch_size=5)


def test_drop_path_drops_whole_branches_and_keeps_their_mean():
    for make, images in ((small_vit, torch.randn(4, 3, 24, 24)), (small_swin, torch.randn(4, 3, 32, 32))):
        model = make(drop_path=0.5)
        rand = torch.ones(4, model.depth, 2)
        rand[0] = 0.0  # the first sample loses every branch that can be lost
        kept = model.train()(images, rand=rand)
        alone = model(images[:1], rand=rand[:1])
        torch.testing.assert_close(kept[:1], alone)  # a sample's draw is its own
        gains = model._keep(images, rand)  # (depth, 2, B, ...)
        rates = torch.linspace(0, 0.5, model.depth)
        torch.testing.assert_close(gains[:, 0, 1].flatten(), 1 / (1 - rates))
        assert gains[1:, :, 0].abs().max() == 0
        assert torch.equal(model.eval()(images, rand=rand), model(images))


@pytest.mark.parametrize(
    "make, size, fused, backend",
    [
        (small_vit, 24, False, "inductor"),
        (small_vit, 24, True, "aot_eager"),  # without kernels, which take long to build
        (small_swin, 32, False, "aot_eager"),
        (small_swin, 32, True, "aot_eager"),
    ],
    ids=["vit", "vit-fused", "swin", "swin-fused"],
)
def test_a_training_step_with_alignment_compiles_without_graph_breaks(make, size, fused, backend):
    model = make(drop_path=0.2, fused=fused).train()
    images, labels = torch.randn(4, 3, size, size), torch.rand(4, (size // 4) ** 2, 1)
    rand, targets, grads = torch.rand(4, model.depth, 2), torch.tensor([1, 2, 3, 4]), []
    for step in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        logits, aligned = step(images, labels, rand=rand)
        tl_align.mixed_cross_entropy(logits, targets, aligned).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make, size", [MODELS["vit"], MODELS["swin-odd"]], ids=["vit", "swin"])
def test_models_are_exported_and_traced_for_batches_of_any_size(make, size):
    model, images = make().eval(), torch.randn(3, 3, *size)
    labels = torch.rand(3, size[0] // 4 * (size[1] // 4), 1)
    batch = {0: torch.export.Dim("batch", max=4096)}  # without an end, torch 2.6 finds no largest batch
    exported = torch.export.export(model, (images, labels), dynamic_shapes=(batch, batch)).module()
    for few in (1, 2, 3):
        for a, b in zip(model(images[:few], labels[:few]), exported(images[:few], labels[:few])):
            torch.testing.assert_close(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that images of another size may take another path
        warnings.filterwarnings("error", ".*Using len", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images[:2]), model(images[:2]))
