"""Mixer, ConvNeXt, clips, and other rules for labels, compared with independent references."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange

import convnext
import mixer
import mixing_ratio
import rules
import swin
import tl_align
import train
import video
import vit
from data import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
CONVNEXT = {"embed_dim": 16, "depths": (2, 2), "layer_scale": 1.0}

# A class, its sizes, and an image size. In "odd" maps have odd sides.
MODELS = {
    "mixer": (mixer.Mixer, {"embed_dim": 16, "depth": 3}, (24, 24)),
    "convnext": (convnext.ConvNeXt, CONVNEXT, (32, 24)),
    "convnext-odd": (convnext.ConvNeXt, CONVNEXT, (36, 44)),
    "vit": (vit.ViT, {"embed_dim": 32, "depth": 3, "num_heads": 4}, (24, 24)),
    "swin": (swin.Swin, SWIN, (32, 32)),
    "swin-odd": (swin.Swin, SWIN, (36, 44)),
}


def make(name, **options):
    """A model in float64 with random weights, images, and labels (B, N, 1)."""
    model_class, sizes, size = MODELS[name]
    torch.manual_seed(1)
    model = model_class(img_size=24, patch_size=4, num_classes=7, **sizes, **options)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / math.sqrt(parameter.shape[-1]))
    labels = torch.rand(2, (size[0] // 4) * (size[1] // 4), 1).double()
    return model, torch.randn(2, 3, *size).double(), labels


@pytest.fixture(params=["mixer", "convnext", "convnext-odd"])
def setting(request):
    return make(request.param)


def assert_equal(a, b):
    tolerance = 1e-10 if a.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# --- Mixer and ConvNeXt.


def reference_matrix(layer, size):
    """A, (N, N), entry by entry."""
    if isinstance(layer, mixer.Block):
        w1, w2 = layer.mlp_tokens.fc1.weight, layer.mlp_tokens.fc2.weight
        matrix = torch.einsum("ih,hj->ijh", w2, w1).abs().sum(-1)
    else:
        kernel = layer.dwconv.weight.abs().mean((0, 1))
        places = [(row, col) for row in range(size[0]) for col in range(size[1])]
        matrix = torch.zeros(len(places), len(places), dtype=torch.float64)
        for i, (row, col) in enumerate(places):
            for j, (other_row, other_col) in enumerate(places):
                down, right = other_row - row, other_col - col
                if max(abs(down), abs(right)) <= 3:
                    matrix[i, j] = kernel[3 + down, 3 + right]
    return matrix / matrix.sum(1, keepdim=True)


@torch.no_grad()
def test_labels_follow_the_matrix_of_each_layer(setting):
    model, images, labels = setting
    y = labels.reshape(2, images.shape[2] // 4, -1, 1)  # (B, H, W, 1)
    for layer in rules.layers(model):
        size = y.shape[1:3]
        if isinstance(layer, convnext.Downsample):
            height, width = size[0] // 2, size[1] // 2
            y = y[:, : 2 * height, : 2 * width].reshape(2, height, 2, width, 2, 1).mean((2, 4))
            continue
        moved = reference_matrix(layer, size) @ y.flatten(1, 2)
        y = (y + moved.reshape(y.shape)) / 2
    assert_equal(model(images, labels)[1], y.mean((1, 2)))


@torch.no_grad()
def test_labels_sum_to_one_and_an_unmixed_image_keeps_its_label(setting):
    model, images, labels = setting
    classes = torch.cat([labels / 3, 2 * labels / 3, 1 - labels], dim=-1)
    aligned = model(images, classes)[1]
    assert_equal(aligned.sum(-1), torch.ones_like(aligned[..., 0]))
    for share in (0.0, 1.0):
        aligned = model(images, torch.full_like(labels, share))[1]
        assert_equal(aligned, torch.full_like(aligned, share))


def test_labels_change_no_logits_and_carry_no_gradient(setting):
    model, images, labels = setting
    logits, aligned = model(images, labels)
    assert torch.equal(logits, model(images))
    assert logits.requires_grad and not aligned.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer", "convnext"])
def test_labels_stay_in_float32(name):
    model, images, labels = make(name)
    model, images, labels = model.float(), images.float(), labels.float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(images, torch.ones_like(labels))[1]
    torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-6, rtol=0)


def test_shapes_that_do_not_fit_are_named(setting):
    model, images, labels = setting
    with pytest.raises(ValueError, match="images must be"):
        model(images[..., :-1])
    with pytest.raises(ValueError, match="one row for each patch"):
        model(images, labels[:, 1:])
    with pytest.raises(ValueError, match="patches of 5 px do not tile"):
        type(model)(img_size=24, patch_size=5)


def test_parameter_counts_are_the_published_ones():
    published = {mixer.Mixer: 18_528_264, convnext.ConvNeXt: 28_589_128}
    for make_model, count in published.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in make_model().parameters()) == count


@torch.no_grad()
def test_convnext_equals_torchvisions():
    ours = randomize(convnext.ConvNeXt(num_classes=7))
    theirs = torchvision.models.convnext_tiny(num_classes=7).eval()
    inside = {"0": "dwconv", "2": "norm", "3": "pwconv1", "5": "pwconv2"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        part, *place, kind = name.split(".")
        if part == "classifier":
            own_name = f"{'norm' if place == ['0'] else 'head'}.{kind}"
        elif kind == "layer_scale":
            own_name = f"stages.{int(place[0]) // 2}.{place[1]}.gamma"
        elif "block" in place:
            own_name = f"stages.{int(place[0]) // 2}.{place[1]}.{inside[place[3]]}.{kind}"
        else:
            own_name = f"downsample_layers.{int(place[0]) // 2}.{place[1]}.{kind}"
        state[name] = ours.state_dict()[own_name].reshape(tensor.shape)
    assert len(state) == len(ours.state_dict())
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(images), theirs(images))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer_s16_224", "convnext_tiny"])
def test_logits_equal_timms(name):
    timm = pytest.importorskip("timm")
    if name == "convnext_tiny":
        ours = randomize(convnext.ConvNeXt(num_classes=7))
        theirs = timm.create_model(name, num_classes=7).eval()
        state = timm.models.convnext.checkpoint_filter_fn(ours.state_dict(), theirs)
    else:
        ours = randomize(mixer.Mixer(img_size=64, num_classes=7))
        theirs = timm.create_model(name, num_classes=7, img_size=64).eval()
        state = ours.state_dict()
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


@torch.no_grad()
def randomize(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) / 20)
    return model.eval()


# --- Other rules for labels.


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_rules_leave_no_label_behind(name):
    model, images, labels = make(name)
    assert_equal(rules.align(model, images, labels, rules.paper_rule), model(images, labels)[1])
    for rule in (rules.norm_rule, rules.parts_rule):
        aligned = rules.align(model, images, labels, rule)
        other = rules.align(model, images, 1 - labels, rule)
        assert_equal(aligned + other, torch.ones_like(aligned))
        same = torch.full_like(labels, 0.3)  # Mixup
        assert_equal(rules.align(model, images, same, rule), torch.full_like(aligned, 0.3))
        assert (aligned - model(images, labels)[1]).abs().min() > 1e-4
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(rules.align(model, images, labels, rule), aligned)


@torch.no_grad()
def test_parts_of_an_attention_by_definition():
    model, images, labels = make("vit")
    labels = tl_align.add_class_token(torch.cat([1 - labels, labels], dim=-1))
    x, _ = model.embed(images)
    block = model.blocks[0]
    parts = rules.move_vit(block, x, labels).parts
    q, k, v = block.attn.qkv(block.norm1(x))[0].chunk(3, dim=-1)  # of the first image, (N, 32)
    for i in (0, 5):  # a token
        for source in (0, 1):
            heads = []
            for head in torch.arange(32).split(8):
                weights = (q[i, head] @ k[:, head].T / math.sqrt(8)).softmax(0)
                values = v[:, head] * labels[0, :, source, None]
                heads.append((weights[:, None] * values).sum(0))
            assert_equal(parts[0, i, source], block.attn.proj.weight @ torch.cat(heads))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixer", "convnext", "convnext-odd", "vit", "swin"])
def test_parts_add_up_to_what_a_layer_makes_of_its_tokens(name):
    """Biases are of no source, but for those of an attention's values. Nor is the padding of Swin's
    odd maps, which are left out here."""
    model, images, labels = make(name)
    for layer_name, parameter in model.named_parameters():
        last = ("proj.bias", "fc1.bias", "fc2.bias", "dwconv.bias", "1.bias", "head.bias")
        if layer_name.endswith(last) or layer_name == "norm.bias":
            parameter.zero_()
    x, labels = model.embed(images, torch.cat([1 - labels, labels], dim=-1))
    for layer in rules.layers(model):
        moved = rules.MOVE[type(layer)](layer, x, labels)
        if isinstance(layer, convnext.Block):
            whole = convnext.convolve(layer.dwconv, x)
        elif moved.branch is None:
            whole = layer(x)[0]
        else:
            whole = moved.branch
        assert_equal(moved.parts.sum(-2), whole)
        tokens, updated = layer(x, labels)
        expected = moved.labels if moved.branch is None else (labels + moved.labels) / 2
        assert_equal(updated, expected)
        x, labels = tokens, updated
    if name != "vit":  # up to a factor, ConvNeXt's last norm
        parts = rules.pool(model, x, labels).parts
        assert_equal(F.normalize(parts.sum(1)), F.normalize(model(images)))


def test_rules_of_a_worked_case():
    x = torch.tensor([[3.0, 4.0]])  # a token of length 5
    labels = torch.tensor([[1.0, 0.0]])
    branch = torch.tensor([[0.0, 15.0]])
    parts = torch.tensor([[[0.0, 9.0], [6.0, 0.0]]])  # of two sources
    moved = rules.Moved(branch, torch.tensor([[0.2, 0.8]]), parts)
    assert_equal(rules.paper_rule(x, labels, moved), torch.tensor([[0.6, 0.4]]))
    assert_equal(rules.norm_rule(x, labels, moved), torch.tensor([[0.4, 0.6]]))  # w = 15 / 20
    assert_equal(rules.parts_rule(x, labels, moved), torch.tensor([[0.7, 0.3]]))  # P is 9, 6 / 15
    merged = moved._replace(branch=None)
    assert_equal(rules.norm_rule(x, labels, merged), moved.labels)
    assert_equal(rules.parts_rule(x, labels, merged), torch.tensor([[0.6, 0.4]]))


@torch.no_grad()
def test_rules_that_are_compiled_one_after_another_give_their_own_labels():
    model = vit.ViT(24, 4, embed_dim=32, depth=1, num_heads=4).eval()
    images, labels = torch.randn(2, 3, 24, 24), torch.rand(2, 36, 1)
    compiled = torch.compile(rules.align, backend="eager")
    for rule in rules.RULES.values():
        expected = rules.align(model, images, labels, rule)
        assert_equal(compiled(model, images, labels, rule), expected)


def test_the_target_of_a_run_follows_its_rule():
    model, images, _ = make("convnext")
    targets = torch.tensor([1, 5])
    mask = tl_align.cutmix_mask(torch.rand(2, 3), images.shape[-2:], 4).double()
    args = SimpleNamespace(patch_size=4, smoothing=0.1, rule="parts")
    loss = rules.rule_loss(model, images, targets, mask, None, args)
    mixed, labels = tl_align.mix(images, mask), tl_align.token_labels(mask, 4)
    share = rules.align(model, mixed, labels, rules.parts_rule)
    target = (1 - share) * F.one_hot(targets, 7) + share * F.one_hot(targets.flip(0), 7)
    expected = F.cross_entropy(model(mixed), target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, check_dtype=False)
    assert loss.requires_grad and not share.requires_grad


@torch.no_grad()
def test_the_influence_of_images_whose_mean_is_the_answer():
    images = torch.zeros(10, 3, 32, 32)
    images[0], images[1] = 1, 3
    mask = torch.zeros(10, 1, 32, 32)
    mask[0, :, :8] = 1  # a quarter of the first image
    mixed = tl_align.mix(images, mask)
    others = rules.choose_others(images)
    assert all((other[:2] == 0).all() for other in others)  # none is an image of the mix
    with pytest.raises(UserError, match="there must be 10 validation images"):
        rules.choose_others(images[:8])

    def mean(images):
        return images.mean((2, 3))

    share = mixing_ratio.influence(mean, mixed, mask, others)[0]
    torch.testing.assert_close(share, torch.tensor(3 * 0.25 / (3 * 0.25 + 0.75)))


# --- Clips.


def test_a_tubelet_is_a_patch():
    for k in (0, 5, 37, 63):
        clip = torch.zeros(1, 16, 1, 16, 16)
        frame, row, col = k // 16 * 4, k // 4 % 4 * 4, k % 4 * 4
        clip[:, frame : frame + 4, :, row : row + 4, col : col + 4] = 1
        image = video.lay_out(clip)
        assert image.shape == (1, 1, 64, 64)
        labels = tl_align.token_labels(image, 8)
        assert labels.sum() == 1 and labels.max() == 1


def test_boxes_span_space_and_time_on_the_grid_of_tubelets():
    rand = torch.rand(200, 4)
    mask = video.cutmix_mask(rand)
    labels = tl_align.token_labels(mask, 8)
    assert mask.shape == (200, 1, 64, 64) and set(labels.unique().tolist()) == {0, 1}
    largest = ((1 - rand[:, 0]) ** (1 / 3) * 4).floor() ** 3  # in tubelets; it may be clipped
    num_tubelets = labels.sum((1, 2))
    assert (num_tubelets <= largest).all() and (num_tubelets == largest).any()
    # lambda = 0.87 gives sides of 2 tubelets. The centre is frame 12, row 8, column 4.
    expected = torch.zeros(1, 16, 1, 16, 16)
    expected[:, 8:16, :, 4:12, 0:8] = 1
    box = video.cutmix_mask(torch.tensor([[0.87, 0.8, 0.5, 0.3]]))
    assert torch.equal(box, video.lay_out(expected))


def test_the_class_of_a_clip_is_its_direction():
    images, targets = video.draw_clips(16, 0).tensors
    layout = {"t1": 2, "t2": 2, "f1": 2, "f2": 2, "h": 4, "w": 4}
    clips = rearrange(
        images, "b c (t1 h f1 p) (t2 w f2 q) -> b (t1 t2 f1 f2) c (h p) (w q)", **layout
    )
    assert torch.equal(video.lay_out(clips), images)
    for clip, target in zip(clips, targets, strict=True):
        changes = (clip[1:] != clip[:-1]).any(1)  # (15, 16, 16)
        fits = []
        for step in video.STEPS:
            moved = (clip[1:] == clip[:-1].roll(step, (2, 3))).all(1)
            fits.append(moved[changes].double().mean())
        assert fits.index(max(fits)) == target


def test_the_loss_of_clips_is_that_of_images_with_another_box():
    torch.manual_seed(0)
    model = vit.vit_micro(img_size=64, patch_size=8, num_classes=3)
    images, targets, rand = torch.randn(2, 3, 64, 64), torch.tensor([0, 2]), torch.rand(2, 4, 2)
    args = SimpleNamespace(patch_size=8, smoothing=0.1, targets="tl_align")
    box = video.cutmix_mask(rand[:, :2].flatten(1))
    expected = train.mixed_loss(model, images, targets, box, None, args)
    loss = video.clip_loss(model, images, targets, torch.zeros(2, 1, 64, 64), rand, args)
    torch.testing.assert_close(loss, expected)
    plain = F.cross_entropy(model(images), targets, label_smoothing=0.1)
    torch.testing.assert_close(video.clip_loss(model, images, targets, None, rand, args), plain)


# --- The scripts.


def run(script, monkeypatch, tmp_path, *args):
    """Run a script's main in this process. Returns the results that it wrote."""
    small = ["--seeds", 1, "--jobs", 0, "--device", "cpu", "--passes", 1]
    words = [str(word) for word in (*small, *args)]
    monkeypatch.setattr(sys, "argv", ["script", *words])
    monkeypatch.chdir(tmp_path)
    script.main()
    return (tmp_path / "runs" / "experiments" / f"{script.__name__}.md").read_text()


def test_rules_trains_models_that_are_passed_in(monkeypatch, tmp_path, capsys):
    known = set(train.MODELS)
    args = ["--images", 40, "--batch-size", 20, "--val-images", 20]
    args += ["--models", "mixer_micro", "convnext_micro", "--targets", "parts"]
    text = run(rules, monkeypatch, tmp_path, *args)
    assert text.count("| parts |") == 4 and "error: objects" in text
    assert set(train.MODELS) == known  # whoever imports an experiment gets what train.py has
    assert run(rules, monkeypatch, tmp_path, *args) == text
    assert "0 of 4 runs to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="--models: invalid choice: 'resnet'"):
        run(rules, monkeypatch, tmp_path, "--models", "resnet")


def test_video_trains_and_looks_at_its_models(monkeypatch, tmp_path, capsys):
    args = ["--images", 20, "--batch-size", 10, "--val-images", 20]
    text = run(video, monkeypatch, tmp_path, *args)
    assert text.count("| TL-Align |") == 2 and "| parts |" in text
    assert run(video, monkeypatch, tmp_path, *args) == text
    assert "0 of 3 runs to do" in capsys.readouterr().out
