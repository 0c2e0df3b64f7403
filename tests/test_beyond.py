"""Mixer, ConvNeXt and video, and rules that weigh what is moved, against independent references."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.io import decode_image

import convnext
import data
import dense
import mixer
import rules
import runs
import swin
import train as script
import video
import vit
import weighing

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
# Each model with an image size; some whose maps are odd.
MODELS = {
    "mixer": (lambda **k: mixer.Mixer(dim=16, depth=3, **k), (24, 24)),
    "convnext": (lambda **k: convnext.ConvNeXt(dim=16, depths=(2, 2), scale=1.0, **k), (32, 24)),
    "convnext-odd": (
        lambda **k: convnext.ConvNeXt(dim=16, depths=(2, 2), scale=1.0, **k),
        (36, 44),
    ),
    "vit": (lambda **k: vit.ViT(embed_dim=32, depth=3, num_heads=4, **k), (24, 24)),
    "swin": (lambda **k: swin.Swin(**SWIN, **k), (32, 32)),
    "swin-odd": (lambda **k: swin.Swin(**SWIN, **k), (36, 44)),
}
BLOCKS, SMALLER = tuple(weighing.MIX), tuple(weighing.SHRINK)


def setting(name, **options):
    """A model in float64 whose every weight counts, images, and the labels of their patches (B, N,
    1)."""
    make, size = MODELS[name]
    torch.manual_seed(1)
    model = make(img_size=24, patch_size=4, num_classes=7, **options).double().eval()
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

            def near(dr, dc):
                return k[dr + 3, dc + 3].item() if max(abs(dr), abs(dc)) <= 3 else 0.0

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
    layers = model.intermediate_labels(images, classes)
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
def test_convnext_equals_torchvisions_by_metas_names():
    ours, theirs = (
        convnext.convnext_tiny(num_classes=7).eval(),
        torchvision.models.convnext_tiny(num_classes=7),
    )
    for p in ours.parameters():
        p.add_(torch.randn(p.shape) / 20)
    inside = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2", "layer_scale": "gamma"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        part, *place, kind = name.split(".")
        if part == "classifier":
            mine = f"{'norm' if place == ['0'] else 'head'}.{kind}"
        elif "block" in place:
            mine = f"stages.{int(place[0]) // 2}.{place[1]}.{inside[place[3]]}.{kind}"
        elif kind == "layer_scale":
            mine = f"stages.{int(place[0]) // 2}.{place[1]}.gamma"
        else:
            mine = f"downsample_layers.{int(place[0]) // 2}.{place[1]}.{kind}"
        state[name] = ours.state_dict()[mine].reshape(tensor.shape)
    assert len(state) == len(ours.state_dict())
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images), theirs.eval()(images))
    sizes = [tuple(m.shape[1:]) for m in dense.features(ours, torch.randn(1, 3, 36, 64))]
    assert sizes == [(96, 9, 16), (192, 4, 8), (384, 2, 4), (768, 1, 2)]


def test_mixers_names_are_timms():
    def linear(name):
        return [f"{name}.weight", f"{name}.bias"]

    layers = [
        "norm1",
        "mlp_tokens.fc1",
        "mlp_tokens.fc2",
        "norm2",
        "mlp_channels.fc1",
        "mlp_channels.fc2",
    ]
    names = [
        "stem.proj",
        *(f"blocks.{i}.{layer}" for i in range(4) for layer in layers),
        "norm",
        "head",
    ]
    assert [*mixer.mixer_micro().state_dict()] == sum(map(linear, names), [])


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer_s16_224", "convnext_tiny"])
def test_logits_equal_timms(name):
    timm, size = pytest.importorskip("timm"), {"img_size": 64} if name.startswith("mixer") else {}
    theirs = timm.create_model(name, num_classes=7, **size).eval()
    ours = (mixer.mixer_small if size else convnext.convnext_tiny)(
        img_size=64, num_classes=7
    ).eval()
    for p in ours.parameters():
        p.add_(torch.randn(p.shape) / 20)
    state = ours.state_dict()
    if not size:
        state = timm.models.convnext.checkpoint_filter_fn(
            state, theirs
        )  # from Meta's names to timm's
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer", "convnext", "convnext-odd"])
def test_drop_path_drops_branches_and_labels_keep_their_sum_under_bf16(name):
    model, images, labels = setting(name, drop_path_rate=0.5)
    model, images, labels = model.float().train(), images.float(), labels.float()
    drop = model(
        images, rand=torch.zeros(2, model.depth, 2)
    )  # all but the first block's, whose rate is 0
    for block in [m for m in model.modules() if isinstance(m, BLOCKS)][1:]:
        for p in block.parameters():
            p.add_(1)
    assert torch.equal(drop, model(images, rand=torch.zeros(2, model.depth, 2)))
    assert not torch.equal(drop, model(images, rand=torch.ones(2, model.depth, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(images, torch.ones_like(labels))[1]
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-6, rtol=0)


def test_shapes_that_do_not_fit_are_named(new):
    model, images, labels = new
    with pytest.raises(ValueError, match="images must be"):
        model(images[..., :-1])
    with pytest.raises(ValueError, match="one row for each patch"):
        model(images, labels[:, 1:])
    depths = {"depths": (2,)} if isinstance(model, convnext.ConvNeXt) else {}
    with pytest.raises(ValueError, match="patches of 5 px do not tile"):
        type(model)(img_size=24, patch_size=5, dim=16, **depths)


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
    """What a source of share y, (B, ..., 1), of each token brings to each token that the layer
    gives."""
    if isinstance(layer, (vit.Block, swin.Block)):

        def of(y):
            if isinstance(layer, swin.Block):
                shift = tuple(2 * (layer.shift_size > 0 and side > 4) for side in x.shape[1:3])
                y = swin.window_partition(y, 4, shift)

            def change(qkv):
                q, k, v = qkv.chunk(3, dim=-1)
                return torch.cat([q, k, less(v) * y], dim=-1)

            return changed(layer.attn.qkv, change, lambda: added(layer, x))

        return of(y) - of(0 * y)
    if isinstance(layer, mixer.Block):
        z, (fc1, _, fc2) = layer.norm1(x), layer.mlp_tokens
        slope = (1 + torch.erf(fc1(z.mT) / math.sqrt(2))) / 2  # (B, dim, hidden)
        return torch.einsum(
            "ih,bch,hj,bjc,bj->bic", fc2.weight, slope, fc1.weight, less(z), y[..., 0]
        )
    if isinstance(layer, convnext.Block):

        def of(t):
            return layer.dwconv(t.movedim(-1, 1)).movedim(1, -1)

        return of(less(x) * y) - of(0 * x)
    if isinstance(layer, convnext.Down):

        def of(y):
            return changed(layer[0], lambda z: less(z) * y, lambda: layer(x)[0])

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
    if isinstance(model, vit.ViT):
        return y[:, 0]
    x = layer(x)[0]
    z = less(x if isinstance(model, convnext.ConvNeXt) else model.norm(x))
    pooled = [(z * share).flatten(1, -2).mean(1) for share in (y, 1 - y)]
    if isinstance(model, convnext.ConvNeXt):
        pooled = [(t - t.mean(-1, keepdim=True)) * model.norm.weight for t in pooled]
    return shares([t @ model.head.weight.T for t in pooled])


@torch.no_grad()
@pytest.mark.parametrize("reference", [None, "batch", "an image"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_are_what_the_layers_move_of_each_source(name, reference):
    model, images, labels = setting(name)
    shown, given = images, labels
    less = (lambda t: t - t.mean(0)) if reference == "batch" else (lambda t: t)
    if reference == "an image":
        reference, less = torch.randn(1, *images.shape[1:]), lambda t: t - t[-1]
        shown, given = torch.cat([images, reference]), torch.cat([labels, labels[:1]])
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
    with weighing.by(model, "parts", torch.zeros_like(images[:1])):
        logits, aligned = model(images, labels)
    assert not aligned.requires_grad
    for a, b in zip(
        own, torch.autograd.grad(logits.square().sum(), [*model.parameters()]), strict=False
    ):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_a_blank_image_is_no_image_of_the_batch_and_where_nothing_moves_labels_are_as_before():
    model, images, labels = setting("mixer")
    rand = torch.rand(2, model.depth, 2).double()
    with weighing.by(model, "parts", torch.zeros_like(images[:1])):
        first = model(images, labels=labels)
        assert torch.equal(first[1], model(images, labels, rand=rand)[1]) and len(first[0]) == 2
        assert len(model(images)) == 2 and len(model(images, None)) == 2
    model.head.weight.zero_()
    both = torch.cat([1 - labels, labels], dim=-1)
    with weighing.by(model, "parts"):
        torch.testing.assert_close(model(images, both)[1].sum(1), torch.ones(2).double())
    assert not [
        m for m in model.modules() if {"given", "left"} & vars(m).keys()
    ]  # nothing is left behind
    with pytest.raises(ValueError, match="no such rule: 'part' less None"):
        weighing.weigh(model, "part")


def test_a_run_by_parts_is_trained_on_what_the_rule_says():
    torch.manual_seed(0)
    images, labels, said = torch.randn(2, 3, 32, 32), torch.rand(2, 64, 1), []
    for method in ("TL-Align", "TL-Align, norm", "TL-Align, parts"):
        s = script.parse_args([])
        vars(s).update(runs.METHODS[method])
        said.append(script.build_model(script.fill_defaults(s, 32, 1000), 10)(images, labels)[1])
    torch.manual_seed(0)
    model = vit.vit_micro(num_classes=10)
    for mine, rule in zip(said[1:], ("norm", "parts"), strict=False):
        with weighing.by(model, rule):
            assert torch.equal(mine, model(images, labels)[1])
    assert not torch.equal(said[0], said[1]) and not torch.equal(said[1], said[2])


# --- What they are held against.


class Mean(torch.nn.Module):
    """Answers with the mean of all pixels: what each source is worth is known."""

    def forward(self, images, labels=None):
        logits = images.mean((2, 3))
        return logits if labels is None else (logits, labels.mean(1))


@torch.no_grad()
def test_the_other_images_of_a_truth_are_of_no_mix(monkeypatch):
    monkeypatch.setattr(rules, "RULES", {"TL-Align": lambda model, mean: contextlib.nullcontext()})
    s = SimpleNamespace(model="swin_micro", patch_size=4, img_size=32, device="cpu")
    images = torch.zeros(10, 3, 32, 32)
    images[0], images[1] = 1, 3  # all other mixes are of nothing
    mixed, owners, labels = rules.mixes(images, s, 2)
    (said, true), area = rules.look(Mean(), images, mixed, owners, labels, s), owners[0, 1].mean()
    assert 0 < area < 1
    torch.testing.assert_close(said["area"][0], area)
    torch.testing.assert_close(said["TL-Align"][0], area)
    torch.testing.assert_close(true["others"][0], 3 * area / (3 * area + (1 - area)))
    low = 0.4  # the mean of all, in place of a source
    expected = (3 - low) * area / ((3 - low) * area + (1 - low) * (1 - area))
    torch.testing.assert_close(true["mean patch"][0], expected)


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
    box = video.token_labels(video.cutmix_mask(eighth, (8, 32, 32), 8), 8).unflatten(1, (4, 4, 4))[
        0, ..., 0
    ]
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
    layers = model.intermediate_labels(clips, labels)
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
    for clip, name in zip(clips, (video.DIRECTIONS[t] for t in targets), strict=False):
        if name in moves:
            still, fits = (clip[1:] == clip[:-1]).all(1), {}  # the ground
            for by in moves.values():
                moved = (clip[1:] == clip[:-1].roll(by, (2, 3))).all(1)
                fits[by] = moved[~still].double().mean()
            assert max(fits, key=fits.get) == moves[name]


def test_the_loss_of_mixed_clips_is_that_of_their_shares():
    torch.manual_seed(0)
    model, clips, targets = (
        video.video_micro(num_classes=3),
        torch.randn(2, 8, 3, 32, 32),
        torch.tensor([0, 2]),
    )
    mask = video.cutmix_mask(torch.rand(2, 4), (8, 32, 32), 8)
    mixed, labels = torch.where(mask > 0, clips.flip(0), clips), video.token_labels(mask, 8)
    logits, aligned = model(mixed, labels)
    one_hot = F.one_hot(targets, 3).float()
    s = SimpleNamespace(patch_size=8, smoothing=0.1)
    for s.targets, share in (("area", mask.mean((1, 2, 3, 4))[:, None]), ("tl_align", aligned)):
        target = (1 - share) * one_hot + share * one_hot.flip(0)
        expected = F.cross_entropy(logits, target, label_smoothing=0.1)
        torch.testing.assert_close(video.loss(model, clips, targets, mask, None, s), expected)
    plain = F.cross_entropy(model(clips), targets, label_smoothing=0.1)
    torch.testing.assert_close(video.loss(model, clips, targets, None, None, s), plain)


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
    with pytest.raises(data.UserError, match=r"0\.pt holds no clip, a uint8 tensor \(T, 3, H, W\)"):
        here(video, *few, "--clips", tmp_path / "clips")
    with pytest.raises(data.UserError, match="--clips takes a folder of train/CLASS"):
        here(video, *few, "--clips", tmp_path / "none")


def test_rules_are_held_against_the_truth_of_three_sources(here):
    _, text = here(rules, "--models", "vit_micro", "--mixes", 18, "--sources", 3)
    assert "18 mixes" in text and text.count("| parts |") == 1 and "truth: objects" in text
