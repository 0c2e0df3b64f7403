"""Mixer, ConvNeXt and video, and rules that weigh what is moved, against independent references."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.io import decode_image

import convnext
import data
import mixer
import rules
import swin
import video
import vit
import weighing

pytestmark = pytest.mark.usefixtures("one_thread")

# Each model with an image size; some whose maps are odd.
MODELS = {
    "mixer": (lambda **k: mixer.Mixer(dim=16, depth=3, **k), (24, 24)),
    "convnext": (lambda **k: convnext.ConvNeXt(dim=16, depths=(2, 2), scale=1.0, **k), (32, 24)),
    "convnext-odd": (lambda **k: convnext.ConvNeXt(dim=16, depths=(2, 2), scale=1.0, **k), (36, 44)),
    "vit": (lambda **k: vit.ViT(dim=32, depth=3, heads=4, **k), (24, 24)),
    "vit-avg": (lambda **k: vit.ViT(dim=32, depth=3, heads=4, pool="avg", **k), (24, 24)),
    "swin": (lambda **k: swin.Swin(dim=16, depths=(2, 2), heads=(2, 4), window=4, **k), (32, 32)),
    "swin-odd": (lambda **k: swin.Swin(dim=16, depths=(2, 2), heads=(2, 4), window=4, **k), (36, 44)),
}
BLOCKS, SMALLER = tuple(weighing.MIX), tuple(weighing.SHRINK)


def setting(name):
    """A model in float64 whose every weight counts, images, and the labels of their patches (B, N, 1)."""
    make, size = MODELS[name]
    torch.manual_seed(1)
    model = make(img_size=24, patch_size=4, num_classes=7).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) / math.sqrt(p.shape[-1]))
    labels = torch.rand(2, (size[0] // 4) * (size[1] // 4), 1).double()
    return model, torch.randn(2, 3, *size).double(), labels


@pytest.fixture(params=["mixer", "convnext", "convnext-odd"])
def new(request):
    return setting(request.param)


def layers_of(model, images):
    """The layers that move tokens, in their order, with the tokens that each is given."""
    seen = []
    moving = [m for m in model.modules() if isinstance(m, BLOCKS + SMALLER)]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))) for m in moving]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


# --- The plain rule: each layer as a matrix, one pair of tokens at a time.


def plain_matrix(layer, x):
    """How much of token j, (N,), ends in token i."""
    if isinstance(layer, mixer.Block):
        w1, w2 = layer.mlp_tokens.fc1.weight, layer.mlp_tokens.fc2.weight
        move = torch.einsum("ih,hj->ijh", w2, w1).abs().sum(-1)
    else:
        at = [(r, c) for r in range(x.shape[1]) for c in range(x.shape[2])]
        if isinstance(layer, convnext.Down):
            places = [(r, c) for r in range(x.shape[1] // 2) for c in range(x.shape[2] // 2)]
            move = [[float((r // 2, c // 2) == place) for r, c in at] for place in places]
        else:
            k = layer.dwconv.weight.abs().mean((0, 1))
            near = lambda dr, dc: k[dr + 3, dc + 3].item() if max(abs(dr), abs(dc)) <= 3 else 0.0
            move = [[near(r - i, c - j) for r, c in at] for i, j in at]
        move = torch.tensor(move, dtype=torch.float64)
    return move / move.sum(1, keepdim=True)


@torch.no_grad()
def test_labels_move_as_the_layers_move_tokens(new):
    model, images, labels = new
    y = labels
    for layer, x in layers_of(model, images):
        moved = plain_matrix(layer, x) @ y
        y = moved if isinstance(layer, SMALLER) else (y + moved) / 2
    torch.testing.assert_close(model(images, labels)[1], y.mean(1), atol=1e-12, rtol=0)


@torch.no_grad()
def test_rows_sum_to_one_in_every_layer_and_an_unmixed_image_stays_so(new):
    model, images, labels = new
    classes = torch.cat([labels / 3, 2 * labels / 3, 1 - labels], dim=-1)
    layers = model.layer_labels(images, classes)
    assert len(layers) == model.depth + 1
    for tokens, read in layers:
        for y in (tokens, read):
            torch.testing.assert_close(y.sum(-1), torch.ones_like(y[..., 0]))
    for share in (0.0, 1.0):
        aligned = model(images, torch.full_like(labels, share))[1]
        torch.testing.assert_close(aligned, torch.full_like(aligned, share), atol=1e-12, rtol=0)


def test_logits_are_the_same_with_labels_and_no_gradient_comes_through_them(new):
    model, images, labels = new
    logits, aligned = model(images, labels)
    assert torch.equal(logits, model(images)) and not aligned.requires_grad and logits.requires_grad


@pytest.mark.parametrize(
    "make, count",
    [
        (mixer.mixer_small, 18_528_264),
        (mixer.mixer_base, 59_880_472),
        (convnext.convnext_tiny, 28_589_128),
        (convnext.convnext_small, 50_223_688),
    ],
)
def test_parameter_counts_are_the_published_ones(make, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer_s16_224", "convnext_tiny"])
def test_logits_equal_timms(name):
    timm, size = pytest.importorskip("timm"), {"img_size": 64} if name.startswith("mixer") else {}
    theirs = timm.create_model(name, num_classes=7, **size).eval()
    ours = (mixer.mixer_small if size else convnext.convnext_tiny)(img_size=64, num_classes=7).eval()
    for p in ours.parameters():
        p.add_(torch.randn(p.shape) / 20)
    state = ours.state_dict()
    if not size:
        state = timm.models.convnext.checkpoint_filter_fn(state, theirs)  # from Meta's names to timm's
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_shapes_that_do_not_fit_are_named(new):
    model, images, labels = new
    with pytest.raises(ValueError, match="images must be"):
        model(images[..., :-1])
    with pytest.raises(ValueError, match="one row for each patch"):
        model(images, labels[:, 1:])
    with pytest.raises(ValueError, match="patches of 5 px do not tile"):
        type(model)(img_size=24, patch_size=5)


# --- The rule of parts: each layer's own code, run on the content of one source.


def changed(module, change, run):
    """run() with a module's output changed."""
    hook = module.register_forward_hook(lambda module, args, output: change(output))
    out = run()
    hook.remove()
    return out


def added(block, x):
    """What a block's first branch adds to its tokens."""
    given = []
    if isinstance(block, convnext.Block):
        return block(x)[0] - x
    hook = block.norm2.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    block(x)
    hook.remove()
    return given[0] - x


def part_of(layer, x, y, less):
    """What a source of share y, (B, ..., 1), of each token brings to each token that the layer gives."""
    if isinstance(layer, (vit.Block, swin.Block)):

        def of(y):
            if isinstance(layer, swin.Block):
                shift = tuple(2 * (layer.shifted and side > 4) for side in x.shape[1:3])
                y = swin.to_windows(y, 4, shift)

            def change(qkv):
                q, k, v = qkv.chunk(3, dim=-1)
                return torch.cat([q, k, less(v) * y], dim=-1)

            return changed(layer.attn.qkv, change, lambda: added(layer, x))

        return of(y) - of(0 * y)
    if isinstance(layer, mixer.Block):
        z, (fc1, _, fc2) = layer.norm1(x), layer.mlp_tokens
        slope = (1 + torch.erf(fc1(z.mT) / math.sqrt(2))) / 2  # (B, dim, hidden)
        return torch.einsum("ih,bch,hj,bjc,bj->bic", fc2.weight, slope, fc1.weight, less(z), y[..., 0])
    if isinstance(layer, convnext.Block):
        of = lambda t: layer.dwconv(t.movedim(-1, 1)).movedim(1, -1)
        return of(less(x) * y) - of(0 * x)
    if isinstance(layer, convnext.Down):
        of = lambda y: changed(layer[0], lambda z: less(z) * y, lambda: layer(x)[0])
        return of(y) - of(0 * y)
    y = F.pad(y, (0, 0, 0, y.shape[2] % 2, 0, y.shape[1] % 2))
    four = torch.cat(
        [y[:, dh::2, dw::2].expand(-1, -1, -1, x.shape[-1]) for dw in (0, 1) for dh in (0, 1)], -1
    )
    return changed(layer.norm, lambda z: less(z) * four, lambda: layer(x)[0])


def shares(parts):
    sizes = [part.norm(dim=-1, keepdim=True) for part in parts]
    return sizes[0] / (sizes[0] + sizes[1])


def parts_reference(model, images, labels, less):
    y = labels
    for layer, x in layers_of(model, images):
        if x.dim() == 4:
            y = y.reshape(*x.shape[:3], 1) if y.dim() == 3 else y
        elif y.shape[1] < x.shape[1]:
            y = torch.cat([y.mean(1, keepdim=True), y], dim=1)
        arrived = shares([part_of(layer, x, share, less) for share in (y, 1 - y)])
        if isinstance(layer, BLOCKS):
            size = [less(t).norm(dim=-1, keepdim=True) for t in (added(layer, x), x)]
            w = size[0] / (size[0] + size[1])
            arrived = torch.where(w.isnan(), y, (1 - w) * y + w * arrived)
        y = arrived
    if getattr(model, "pool", "avg") == "cls":
        return y[:, 0]
    x = layer(x)[0]
    z = less(x if isinstance(model, convnext.ConvNeXt) else model.norm(x))
    pooled = [(z * share).flatten(1, -2).mean(1) for share in (y, 1 - y)]
    if isinstance(model, convnext.ConvNeXt):
        pooled = [(t - t.mean(-1, keepdim=True)) * model.norm.weight for t in pooled]
    return shares([t @ model.head.weight.T for t in pooled])


@torch.no_grad()
@pytest.mark.parametrize("reference", weighing.LESS)
@pytest.mark.parametrize("name", MODELS)
def test_parts_are_what_the_layers_move_of_each_source(name, reference):
    model, images, labels = setting(name)
    shown, given, less = images, labels, weighing.LESS[reference]
    if reference == "blank":
        shown, given = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (images, labels))
    expected = parts_reference(model, shown, given, less)[:2]
    with weighing.by(model, "parts", reference):
        logits, aligned = model(images, labels)
        both = model(images, torch.cat([1 - labels, labels], dim=-1))[1]
        whole = model(images, torch.ones_like(labels))[1]
    torch.testing.assert_close(aligned, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(both, torch.cat([1 - aligned, aligned], dim=-1), atol=1e-10, rtol=0)
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-12, rtol=0)
    torch.testing.assert_close(logits, model(images))
    assert not torch.equal(aligned, model(images, labels)[1])  # the model's own rule is back


@pytest.mark.parametrize("name", ["vit", "swin", "mixer", "convnext"])
def test_a_rule_changes_no_gradient(name):
    model, images, labels = setting(name)
    own = torch.autograd.grad(model(images, labels)[0].square().sum(), [*model.parameters()])
    with weighing.by(model, "parts", "blank"):
        logits, aligned = model(images, labels)
    assert not aligned.requires_grad
    for a, b in zip(own, torch.autograd.grad(logits.square().sum(), [*model.parameters()])):
        torch.testing.assert_close(a, b)


# --- Video.


def test_boxes_of_space_and_time_lie_on_the_grid_of_tubelets():
    rand = torch.rand(200, 4)
    mask = video.cutmix_mask(rand, (8, 32, 32), 8)
    assert mask.shape == (200, 8, 1, 32, 32)
    tokens = video.token_labels(mask, 8)
    assert tokens.shape == (200, 4 * 4 * 4, 1) and set(tokens.unique().tolist()) == {0, 1}
    tokens = tokens.unflatten(1, (4, 4, 4))[..., 0]  # (B, times, rows, columns)
    sides = ((1 - rand[:, 0]) ** (1 / 3) * 4).floor()
    for axis in (1, 2, 3):
        length = tokens.amax([a for a in (1, 2, 3) if a != axis]).sum(1)  # of the box, in tubelets
        assert (length <= sides).all() and (length == sides)[sides < 2].any()
    eighth = torch.tensor([[0.87, 0.8, 0.5, 0.3]])  # lambda, and the centre's row, column and time
    box = video.token_labels(video.cutmix_mask(eighth, (8, 32, 32), 8), 8).unflatten(1, (4, 4, 4))[0, ..., 0]
    assert box.sum() == 2**3 and box[0:2, 2:4, 1:3].all()


@torch.no_grad()
def test_a_tubelets_label_stands_where_its_token_stands():
    model = video.video_micro(num_classes=3).eval()
    for k in (0, 5, 63):
        clip = torch.zeros(1, 8, 3, 32, 32)
        t, h, w = k // 16 * 2, k // 4 % 4 * 8, k % 4 * 8
        clip[:, t : t + 2, :, h : h + 8, w : w + 8] = 1
        tokens = (model.patch_embed(clip) - model.patch_embed(0 * clip)).abs().sum(1).flatten()
        assert tokens.nonzero().tolist() == [[k]]
        assert video.token_labels(clip[:, :, :1], 8)[0, :, 0].nonzero().tolist() == [[k]]
    mask = video.cutmix_mask(torch.rand(2, 4), (8, 32, 32), 8)
    clips, labels = torch.randn(2, 8, 3, 32, 32), video.token_labels(mask, 8)
    layers = model.layer_labels(clips, labels)
    torch.testing.assert_close(layers[0][0].flatten(1, 3), labels)
    torch.testing.assert_close(layers[-1][1], model(clips, labels)[1])
    with pytest.raises(ValueError, match="clips must be"):
        model(clips[:, 1:])
    with pytest.raises(ValueError, match="one row for each tubelet"):
        model(clips, labels[:, 1:])


def test_a_built_in_clip_moves_in_the_direction_that_is_its_class():
    clips, targets = video.drawn(24, 0)
    assert clips.shape == (24, 8, 3, 32, 32) and targets.max() < len(video.DIRECTIONS)
    moves = {"up": (-2, 0), "right": (0, 2), "down left": (2, -2)}
    for clip, name in zip(clips, (video.DIRECTIONS[t] for t in targets)):
        if name in moves:
            still, fits = (clip[1:] == clip[:-1]).all(1), {}  # the ground
            for by in moves.values():
                moved = (clip[1:] == clip[:-1].roll(by, (2, 3))).all(1)
                fits[by] = moved[~still].double().mean()
            assert max(fits, key=fits.get) == moves[name]


def test_video_trains_on_its_own_clips_and_on_a_folder_of_them(here, tmp_path):
    few = ["--images", 20, "--val-images", 20, "--passes", 1, "--batch-size", 10, "--mixes", 10]
    out, text = here(video, *few)
    assert "train: 3 to do of 3" in out and text.count("| TL-Align |") == 2
    assert decode_image(tmp_path / "runs" / "experiments" / "video.png").float().std() > 30
    for part in ("train", "val"):
        for name, level in (("dark", 20), ("light", 200)):
            (tmp_path / "clips" / part / name).mkdir(parents=True)
            for i in range(10):
                clip = torch.full((11, 3, 40, 50), level + i, dtype=torch.uint8)
                torch.save(clip, tmp_path / "clips" / part / name / f"{i}.pt")
    out, text = here(video, *few, "--clips", tmp_path / "clips")
    assert "train: 3 to do of 3" in out and "20 clips to validate on" in text
    torch.save(torch.zeros(11, 40, 50), tmp_path / "clips" / "train" / "dark" / "0.pt")
    with pytest.raises(data.Ended, match=r"0\.pt holds no clip, a uint8 tensor \(T, 3, H, W\)"):
        here(video, *few, "--clips", tmp_path / "clips")
    with pytest.raises(data.Ended, match="--clips takes a folder of train/CLASS"):
        here(video, *few, "--clips", tmp_path / "none")


def test_rules_are_held_against_the_truth_of_three_sources(here):
    _, text = here(rules, "--models", "vit_micro", "--mixes", 18, "--sources", 3)
    assert "18 mixes" in text and text.count("| parts |") == 1 and "truth: objects" in text
