"""Segmentation and detection: measures worked by hand, the folders that they read, and how they
fine-tune."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import Here
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import annotated
import convnext
import data
import dense
import detection
import runs
import segmentation
import swin
import train as script
import vit

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(runs.__file__).parent


@pytest.fixture
def checkpoint(tmp_path):
    """Checkpoints as train.py leaves them, of untrained models: checkpoint("vit_micro") gives a
    path."""

    def write(model):
        s = script.parse_args(["--model", model, "--device", "cpu"])
        script.fill_defaults(s, 32, 8000)
        torch.manual_seed(0)
        path = tmp_path / f"{model}.pt"
        torch.save({"model": script.build_model(s, 10).state_dict(), "args": vars(s)}, path)
        return str(path)

    return write


# --- Average precision.


def boxes(*edges, labels=None, scores=None, crowd=(), ignore=()):
    """What is known of an image, or found in it, if scores are given."""
    found = {"boxes": torch.tensor(edges, dtype=torch.float).view(-1, 4)}
    found["labels"] = torch.tensor(labels or [0] * len(edges), dtype=torch.long)
    if scores is not None:
        return found | {"scores": torch.tensor(scores, dtype=torch.float)}
    sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
    flags = {
        k: torch.tensor([i in v for i in range(len(edges))], dtype=torch.bool)
        for k, v in FLAGS(crowd, ignore)
    }
    return found | flags | {"area": sides.prod(1)}


def FLAGS(crowd, ignore):
    return (("crowd", crowd), ("ignore", ignore))


A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)
RIGHT, HALF = [100.0] * 3, [51 * 100 / 101] * 3  # of 101 recalls those from 0 to 0.5


@pytest.mark.parametrize(
    "found, known, expected",
    [
        ([boxes(A, scores=[0.3])], [boxes(A)], RIGHT),
        ([boxes(A, scores=[0.3])], [boxes(A, B)], HALF),
        ([boxes(FAR, A, scores=[0.9, 0.3])], [boxes(A)], [50.0] * 3),  # right at the second place
        (
            [boxes(A, A, scores=[0.9, 0.8])],
            [boxes(A)],
            RIGHT,
        ),  # what is found twice comes too late to harm
        (
            [boxes((0, 0, 10, 6), scores=[0.9])],
            [boxes(A)],
            [30.0, 100.0, 0.0],
        ),  # 0.6 of it: 0.5, 0.55, 0.6
        ([boxes(A, scores=[0.9], labels=[1])], [boxes(A)], [0.0] * 3),
        ([boxes(A, FAR, scores=[0.3, 0.9])], [boxes(A, FAR, ignore=[1])], RIGHT),
        (
            [boxes(A, FAR, FAR, scores=[0.3, 0.9, 0.8])],
            [boxes(A, FAR, ignore=[1])],
            [50.0] * 3,
        ),  # it is one
        (
            [boxes(A, FAR, FAR, scores=[0.3, 0.9, 0.8])],
            [boxes(A, FAR, crowd=[1])],
            RIGHT,
        ),  # a crowd is many
        (
            [boxes((50, 50, 52, 52), A, scores=[0.9, 0.3])],
            [boxes(A, FAR, crowd=[1])],
            RIGHT,
        ),  # inside it
        ([boxes(scores=[]), boxes(A, scores=[0.5])], [boxes(), boxes(A)], RIGHT),
        ([boxes(A, scores=[0.9]), boxes(A, scores=[0.5])], [boxes(), boxes(A)], [50.0] * 3),
        (
            [boxes(A, scores=[0.5]), boxes(A, scores=[0.5])],
            [boxes(), boxes(A)],
            [50.0] * 3,
        ),  # a tie: in order
        ([boxes(A, scores=[0.5]), boxes(A, scores=[0.5])], [boxes(A), boxes()], RIGHT),
        ([boxes(scores=[])], [boxes(A)], [0.0] * 3),
    ],
)
def test_average_precision_by_hand(found, known, expected):
    result = detection.average_precision(found, known, 2)
    assert [result[k] for k in ("AP", "AP50", "AP75", "AP small")] == pytest.approx(
        [*expected, expected[0]]
    )
    assert np.isnan(result["AP medium"]) and np.isnan(result["AP large"])


def test_average_precision_by_size_leaves_other_sizes_out_and_classes_without_objects_too():
    large = (0, 0, 100, 100)
    found = [boxes(large, (200, 0, 250, 50), scores=[0.5, 0.9])]
    result = detection.average_precision(found, [boxes(large, FAR)], 3)
    assert result["AP large"] == pytest.approx(
        100
    )  # what is found of medium size is not wrong there
    assert result["AP small"] == 0 and np.isnan(result["AP medium"])
    assert np.isnan(detection.average_precision([boxes(scores=[])], [boxes()], 3)["AP"])


# --- Intersection over union.


def test_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]], dtype=torch.uint8)
    said = torch.tensor([[0, 0, 1, 0], [0, 2, 1, 2]])
    matrix = segmentation.confusion(said, truth, 4)
    assert matrix.tolist() == [[3, 0, 1, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]
    found = segmentation.scores(matrix)  # class 2 is said, and wrong; class 3 is nowhere
    assert found["miou"] == pytest.approx(100 * (3 / 5 + 2 / 3 + 0) / 3)
    assert found["accuracy"] == pytest.approx(100 * 5 / 7)


# --- Models.


def test_batch_norm_is_torchs_and_takes_a_single_value():
    ours, theirs = segmentation.BatchNorm(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 6, requires_grad=True)
    for _ in range(2):
        a, b = (norm(x * 2 + 3) for norm in (ours, theirs))
        torch.testing.assert_close(a, b)
        gradients = [torch.autograd.grad(y.square().sum() + y[0].sum(), x)[0] for y in (a, b)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        ours.state_dict(), {**theirs.state_dict(), "num_batches_tracked": torch.tensor(0)}
    )
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert segmentation.BatchNorm(3)(torch.randn(1, 3, 1, 1)).eq(0).all()


@pytest.mark.parametrize("model, strides", [("vit_micro", [4, 8, 16, 32]), ("swin_micro", [2, 4])])
def test_levels_are_maps_of_growing_strides(checkpoint, model, strides):
    levels = dense.Levels(
        argparse.Namespace(init=checkpoint(model), load=True, backbone=None, seed=0)
    )
    assert levels.strides == strides
    maps = levels(torch.randn(2, 3, 64, 96))
    sizes = [
        (2, c, 64 // stride, 96 // stride)
        for c, stride in zip(levels.channels, strides, strict=False)
    ]
    assert [tuple(m.shape) for m in maps] == sizes
    for p in levels.parameters():  # under DDP a parameter without a gradient would be waited for
        p.grad = None
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in levels.parameters())


@torch.no_grad()
def test_an_image_is_segmented_whole_or_by_crops_at_any_size(checkpoint):
    settings = segmentation.SMALL | {
        "init": checkpoint("swin_micro"),
        "load": True,
        "backbone": None,
    }
    s = argparse.Namespace(**settings, seed=0, device="cpu")
    model, image = (
        segmentation.Segmenter(s, 3).eval(),
        torch.randint(256, (3, 45, 100), dtype=torch.uint8),
    )
    for s.slide in (False, True):
        assert segmentation.predict(model, image, s).shape == (45, 100)
    square = image[:, :, :45]  # one crop is the whole
    both = [
        segmentation.predict(model, square, argparse.Namespace(**vars(s) | {"slide": v}))
        for v in (0, 1)
    ]
    assert torch.equal(*both)
    s.size = 63
    with pytest.raises(
        data.UserError, match="--size must be a multiple of the 2 px of a patch, got 63"
    ):
        segmentation.Segmenter(s, 3)


def small_model(kind, **options):
    """The same weights in every call, all of them large."""
    torch.manual_seed(1)
    sizes = {"img_size": 24, "patch_size": 4, "num_classes": 7}
    if kind is vit.ViT:
        sizes |= {"embed_dim": 32, "depth": 3, "num_heads": 4}
    else:
        sizes |= {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = kind(**(sizes | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def test_a_vits_features_are_its_last_tokens_as_a_map_of_any_size():
    model, images = small_model(vit.ViT), torch.randn(2, 3, 24, 24)
    tokens = []

    def keep(module, args, output):
        tokens.append(output)

    hook = model.norm.register_forward_hook(keep)
    map = dense.features(model, images)
    hook.remove()
    assert map.shape == (2, 32, 6, 6)
    torch.testing.assert_close(map.flatten(2).mT, tokens[0][:, 1:])
    torch.testing.assert_close(
        model.head(tokens[0][:, 0]), model(images)
    )  # beside them, its own class token
    larger = small_model(vit.ViT, img_size=48)
    larger.load_state_dict(larger.convert_state_dict(model.state_dict()))
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(dense.features(model, images), dense.features(larger, images))
    assert dense.features(model, images[..., :20]).shape == (2, 32, 12, 5)
    with pytest.raises(ValueError, match=r"multiples of 4, got \(2, 3, 48, 30\)"):
        dense.features(model, images[..., :30])


def test_swins_features_are_of_any_size_and_the_last_is_what_the_head_averages():
    model, images = small_model(swin.Swin), torch.randn(2, 3, 40, 28)
    maps = dense.features(model, images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 10, 7), (2, 32, 5, 4)]
    torch.testing.assert_close(model.head(maps[-1].mean((2, 3))), model(images))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(2, 3, 40, 30\)"):
        dense.features(model, torch.zeros(2, 3, 40, 30))


def test_convnexts_features_are_those_that_the_head_averages():
    torch.manual_seed(0)
    model, images = convnext.convnext_micro().eval(), torch.randn(2, 3, 40, 28)
    maps = dense.features(model, images)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 20, 14), (2, 64, 10, 7)]
    inputs = []

    def keep(module, args):
        inputs.append(args[0])

    hook = model.norm.register_forward_pre_hook(keep)
    model(images)  # averages, then norms
    dense.features(model, images)  # norms the map
    hook.remove()
    torch.testing.assert_close(inputs[1].mean((1, 2)), inputs[0])
    torch.testing.assert_close(model.norm(inputs[1]).movedim(-1, 1), maps[-1])


@torch.no_grad()
@pytest.mark.parametrize("kind", [vit.ViT, swin.Swin])
def test_features_drop_the_same_branches_as_the_model(kind):
    model, images = small_model(kind, drop_path_rate=0.5).train(), torch.randn(4, 3, 24, 24)
    rand = torch.rand(4, model.depth, 2)
    maps = dense.features(model, images, rand)
    if kind is swin.Swin:
        torch.testing.assert_close(model.head(maps[-1].mean((2, 3))), model(images, rand=rand))
    assert torch.equal(maps[-1], dense.features(model, images, rand)[-1])
    assert not torch.equal(maps[-1], dense.features(model, images, 0 * rand)[-1])


@torch.no_grad()
def test_swins_features_equal_torchvisions():
    theirs = torchvision.models.swin_t(num_classes=10).eval()
    names = [("features.0.0", "patch_embed.proj"), ("features.0.2", "patch_embed.norm")]
    names += [(f"features.{2 * i + 1}.", f"layers.{i}.blocks.") for i in range(4)]
    names += [(f"features.{2 * i + 2}.", f"layers.{i}.downsample.") for i in range(3)]
    names += [("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2")]
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        state[key] = value
    ours = swin.swin_tiny(num_classes=10).eval()
    ours.load_state_dict(ours.convert_state_dict(state))
    images, maps = torch.randn(1, 3, 224, 224), [f"features.{i}" for i in (1, 3, 5)] + ["norm"]
    theirs = create_feature_extractor(theirs, maps)(images)
    for map, name in zip(dense.features(ours, images), maps, strict=True):
        torch.testing.assert_close(map.movedim(1, -1), theirs[name], atol=1e-4, rtol=1e-4)


# --- Scenes and folders.


def test_scenes_are_drawn_from_the_seed_and_boxes_are_those_of_what_is_seen():
    some, again = (annotated.scenes(40, 3, range(5, 10)) for _ in range(2))
    hidden = 0
    for (image, known), (other, _) in zip(some, again, strict=False):
        assert torch.equal(image, other) and image.shape == (3, 64, 64)
        assert (
            1 <= len(known["boxes"]) <= 4 and known["masks"].sum(0).max() <= 1
        )  # a pixel is of one object
        for (left, top, right, bottom), mask in zip(
            known["boxes"].int().tolist(), known["masks"], strict=False
        ):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top, left:right].any() and mask[bottom - 1, left:right].any()
            assert mask[top:bottom, left].any() and mask[top:bottom, right - 1].any()
        assert known["labels"].max() < 5 and torch.equal(
            known["area"], known["masks"].sum((1, 2)).float()
        )
        hidden += int(known["ignore"].sum())
    assert hidden


def picture(path, size=(50, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def mask(path, values, size=(50, 40), palette=False):
    """A PNG of stripes of these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.repeat(np.array(values, dtype=np.uint8), -(-size[1] // len(values)))[: size[1]]
    image = Image.fromarray(np.tile(rows[:, None], size[0]), "P" if palette else "L")
    if palette:
        image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    image.save(path, bits=2) if palette else image.save(path)


@pytest.fixture(params=["plain", "ade20k", "voc"])
def masks(tmp_path, request):
    """A folder in each layout, of two images a part, and (train, val) paths of its masks."""
    root, layout, paths = tmp_path / "set", request.param, []
    for part, long in (("train", "training"), ("val", "validation")):
        images, folder = {
            "plain": (root / part / "images", root / part / "masks"),
            "ade20k": (root / "images" / long, root / "annotations" / long),
            "voc": (root / "JPEGImages", root / "SegmentationClass"),
        }[layout]
        for i in range(2):
            picture(images / f"{part}{i}.jpg", seed=i)
            values = [0, 1, 2, 1] if layout == "voc" else [0, 1, 2, 255]
            values = [(v + 1) % 256 for v in values] if layout == "ade20k" else values
            mask(folder / f"{part}{i}.png", values, palette=layout == "voc")
            paths.append(folder / f"{part}{i}.png")
        if layout == "voc":
            listing = root / "ImageSets" / "Segmentation" / f"{part}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text(f"{part}0\n{part}1\n")
    return root, layout, paths


def test_folders_of_masks_are_read_in_each_layout(masks):
    root, layout, _ = masks
    sets = annotated.open_masks(root)
    assert len(sets.train) == len(sets.val) == 2 and len(sets.classes) == (
        150 if layout == "ade20k" else 3
    )
    image, known = sets.train[1]
    assert image.shape == (3, 40, 50) and image.dtype == known["mask"].dtype == torch.uint8
    last = 1 if layout == "voc" else 255
    assert known["mask"][:, 7].tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [last] * 10


def test_masks_that_do_not_fit_are_named_with_the_remedy(masks):
    root, layout, (first, second, val, _) = masks
    more = int(layout == "ade20k")

    def refused(match, path, *values, **options):
        before = path.read_bytes()
        mask(path, values, **options)
        with pytest.raises(data.UserError, match=match):
            annotated.open_masks(root)
        path.write_bytes(before)

    refused(f"{first} is of .*; they must be alike", first, 0, 1, 2, size=(40, 50))
    refused("class '3' is in .*'s part to validate on, not in", val, more, 3 + more, 2 + more)
    if layout == "ade20k":
        refused(f"{second} has the value 151, which is no class: there are 150", second, 1, 151)
    else:
        refused(
            f"{second} has class 9, but no mask to train on has class 3: .* count from 0", second, 9
        )
        mask(second, [0, 255])
        refused(
            "has class 0, but no mask to train on has class 1: 255 is not labelled", first, 0, 255
        )
        mask(second, [0, 1, 2])
        (root / "classes.txt").write_text("ground\nroad\n")
        mask(second, [0, 255])
        refused("has class 0, but no mask to train on has class 1", first, 0, 255)  # named or not
        mask(second, [0, 1])
        refused("has the value 2, which is no class: there are 2", first, 0, 1, 2)
    Image.new("RGB", (50, 40)).save(first)
    with pytest.raises(data.UserError, match=f"{first} is RGB; a mask has one number a pixel"):
        annotated.open_masks(root)
    first.write_bytes(b"no image")
    with pytest.raises(data.UserError, match=f"{first} or its image can't be read"):
        annotated.open_masks(root)
    first.unlink()
    with pytest.raises(data.UserError, match=f"has no mask: {first} is not there"):
        annotated.open_masks(root)


def test_missing_parts_of_a_layout_are_named(tmp_path, masks):
    with pytest.raises(data.UserError, match=r"has no train/images/\*; --help tells how"):
        annotated.open_masks(tmp_path)
    root, layout, _ = masks
    if layout == "voc":
        (root / "ImageSets/Segmentation/train.txt").write_text("train0\nelsewhere\n")
        with pytest.raises(data.UserError, match="JPEGImages has no image elsewhere, which"):
            annotated.open_masks(root)
        (root / "ImageSets/Segmentation/train.txt").unlink()
        with pytest.raises(data.UserError, match="has no ImageSets/Segmentation/train.txt"):
            annotated.open_masks(root)
    with pytest.raises(data.UserError, match="laid out neither as COCO"):
        annotated.open_boxes(tmp_path)


OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"
CORNERS = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"


def voc(root, part, stem, *objects, size=(50, 40)):
    """An image and its XML. objects: name, difficult, and corners that count pixels from 1."""
    picture(root / "JPEGImages" / f"{stem}.jpg", size=(50, 40))
    path = root / "Annotations" / f"{stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = "".join(
        OBJECT.format(name, hard, CORNERS.format(*edges)) for name, hard, edges in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    path.write_text(f"<annotation>{sides}{found}</annotation>")
    listing = root / "ImageSets" / "Main" / f"{part}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("a") as file:
        file.write(f"{stem}\n")


def test_vocs_boxes_count_pixels_from_one(tmp_path):
    voc(tmp_path, "train", "a", ("cat", 0, (5, 5, 5, 9)), ("ant", 1, (1, 1, 50, 40)))
    voc(tmp_path, "train", "empty")
    voc(tmp_path, "val", "b", ("cat", 0, (1, 1, 2, 2)))
    sets, masks = annotated.open_boxes(tmp_path)
    assert sets.classes == ["ant", "cat"] and not masks
    _, known = sets.train[0]
    assert known["boxes"].tolist() == [[4, 4, 5, 9], [0, 0, 50, 40]] and known[
        "labels"
    ].tolist() == [1, 0]
    assert known["ignore"].tolist() == [False, True] and known["area"].tolist() == [5, 2000]
    assert sets.train[1][1]["boxes"].shape == (0, 4)

    voc(tmp_path, "val", "c", ("dog", 0, (1, 1, 9, 9)))
    with pytest.raises(
        data.UserError, match="class 'dog' is in .* validate on, not in that to train on"
    ):
        annotated.open_boxes(tmp_path)
    for edges in ((9, 1, 7, 9), (1, "nan", 9, 9)):
        voc(tmp_path, "train", "d", ("dog", 0, edges))
        with pytest.raises(
            data.UserError, match="the box .* of a dog in .*d.jpg has no area there; mend it"
        ):
            annotated.open_boxes(tmp_path)
    voc(tmp_path, "train", "d", ("dog", 0, (1, 1, 9, 9)), size=(40, 50))
    with pytest.raises(
        data.UserError, match="d.jpg is 50 x 40 px, its annotation 40 x 50; they must be alike"
    ):
        annotated.open_boxes(tmp_path)[0].train[2]
    (tmp_path / "Annotations" / "d.xml").unlink()
    with pytest.raises(data.UserError, match="d.xml can't be read as an annotation of VOC"):
        annotated.open_boxes(tmp_path)


def coco(root, part, *annotations):
    """Two images and a file of annotations: dicts that lack what is the same for all."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 50, "height": 40} for i in (7, 8)]
    for image in images:
        picture(root / f"{part}2017" / image["file_name"])
    square = {
        "image_id": 7,
        "category_id": 90,
        "iscrowd": 0,
        "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]],
    }
    annotations = [
        {"id": i, **square, "bbox": [2, 2, 10, 10], **a} for i, a in enumerate(annotations)
    ]
    names = [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}]
    path = root / "annotations" / f"instances_{part}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}))
    return path


def test_cocos_boxes_masks_and_crowds(tmp_path):
    crowd = {
        "iscrowd": 1,
        "segmentation": {"counts": [2000], "size": [40, 50]},
        "category_id": 3,
        "area": 9.5,
    }
    coco(tmp_path, "train", {}, crowd)
    path = coco(tmp_path, "val", {"category_id": 3})
    sets, masks = annotated.open_boxes(tmp_path)
    assert masks and sets.classes == ["cat", "dog"] and len(sets.train) == 2
    _, known = sets.train[0]
    assert known["boxes"].tolist() == [[2, 2, 12, 12]] * 2 and known["crowd"].tolist() == [
        False,
        True,
    ]
    assert known["area"].tolist() == [100, 9.5] and 90 <= known["masks"][0].sum() <= 130
    assert sets.train[1][1]["masks"].shape == (0, 40, 50)  # an image without objects

    (tmp_path / "val2017" / "8.jpg").unlink()
    with pytest.raises(
        data.UserError, match="val2017 has no image 8.jpg, which .*instances_val2017.json names"
    ):
        annotated.open_boxes(tmp_path)
    coco(tmp_path, "val", {"bbox": [2, 2, 0, 5]})
    with pytest.raises(data.UserError, match=f"{path}: the box .* of a cat in .* has no area"):
        annotated.open_boxes(tmp_path)
    wrongs = (
        {"segmentation": [2, 2, 12, 2, 12, 12]},
        {"segmentation": [[2, 2, 12, 2, 12]]},
        {"bbox": [1, 2]},
    )
    for wrong in wrongs:
        coco(tmp_path, "val", wrong)
        with pytest.raises(data.UserError, match=f"{path} can't be read as annotations of COCO"):
            annotated.open_boxes(tmp_path)
    coco(tmp_path, "val")
    with pytest.raises(data.UserError, match="nothing is labelled in .* to validate on"):
        annotated.open_boxes(tmp_path)
    path.write_text("[]")
    with pytest.raises(data.UserError, match=f"{path} can't be read as annotations of COCO"):
        annotated.open_boxes(tmp_path)


# --- Fine-tuning.

TINY = ["--scenes", 8, "--val-images", 3, "--tune-steps", 3, "--tune-batch-size", 4]
TINY += ["--seeds", 1, "--device", "cpu"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an experiment's main in this process and a folder of its own. Gives its Markdown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", Here)

    def main(experiment, *args):
        monkeypatch.setattr(sys, "argv", [experiment.__name__, *map(str, [*TINY, *args])])
        experiment.main()
        assert Path(f"runs/experiments/{experiment.__name__}.svg").read_text().endswith("</svg>\n")
        assert Path(f"runs/experiments/{experiment.__name__}.png").stat().st_size > 10_000
        return Path(f"runs/experiments/{experiment.__name__}.md").read_text()

    return main


@pytest.mark.parametrize("experiment", [segmentation, detection], ids=["segmentation", "detection"])
def test_each_start_of_each_model_is_fine_tuned(run, monkeypatch, experiment):
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    monkeypatch.setattr(data, "SHAPES_VAL", 60)
    table = run(experiment, "--images", 40, "--passes", 1).splitlines()[2:8]
    starts = [
        (model, start)
        for model in ("vit_micro", "swin_micro")
        for start in ("from scratch", "area", "TL-Align")
    ]
    assert [tuple(row.split(" | ")[:2]) for row in table] == [
        ("| " + model, start) for model, start in starts
    ]


@pytest.mark.parametrize("experiment", [segmentation, detection], ids=["segmentation", "detection"])
def test_two_processes_come_to_the_same_numbers_as_one(
    run, start, tmp_path, checkpoint, experiment
):
    args = [*TINY, "--checkpoints", checkpoint("vit_micro"), "--scenes", 6]
    two = start(2, *args, "--runs", "two", script=FOLDER / f"{experiment.__name__}.py")
    run(experiment, *args)
    assert two.wait() == 0, two.log.read_text()
    one, other = (next(tmp_path.glob(f"{name}/**/last.pt")) for name in ("runs/experiments", "two"))
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    torch.testing.assert_close(a["model"], b["model"], atol=2e-4, rtol=1e-3)
    a, b = (
        json.loads(path.with_name("result.json").read_bytes())["found"] for path in (one, other)
    )
    assert a == pytest.approx(b, abs=0.5, nan_ok=True)


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path, checkpoint, capsys):
    sets = annotated.as_masks(annotated.scene_sets(argparse.Namespace(scenes=6, val_images=1), 0))
    settings = segmentation.SMALL | {
        "init": checkpoint("vit_micro"),
        "load": True,
        "backbone": None,
        "steps": 4,
    }
    settings |= {"seed": 0, "device": "cpu", "workers": 0, "batch_size": 2, "eval": None}
    read = []

    def fit(out, at=None):
        s = argparse.Namespace(**settings, out=str(tmp_path / out))
        change = segmentation.crops(s)

        def transform(*item):
            read.append(1)
            if len(read) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return change(*item)

        dense.fit(s, segmentation.Segmenter(s, 6), transform, sets, lambda *_: {"miou": 1.0})
        return torch.load(tmp_path / out / "last.pt", weights_only=True)

    whole = fit("whole")
    read.clear()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        fit("stopped", at=4)
    assert "stopped after step 2; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "result.json").exists()
    stopped = fit("stopped")
    assert stopped["step"] == 4 and all(
        torch.equal(v, stopped["model"][k]) for k, v in whole["model"].items()
    )
    settings["lr"] = 1.0
    with pytest.raises(data.UserError, match="holds another run: lr is 0.001 there, 1.0 here"):
        fit("whole")


def test_images_without_objects_or_labels_train(checkpoint):
    settings = {"init": checkpoint("vit_micro"), "load": True, "backbone": None, "seed": 0}
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    s = argparse.Namespace(**segmentation.SMALL | settings)
    unlabelled = {"mask": torch.full((64, 64), 255, dtype=torch.uint8)}
    ((loss, count),) = segmentation.Segmenter(s, 3)([image], [unlabelled], [(0, "a")])
    assert loss == 0 and count == 0
    s = argparse.Namespace(**detection.SMALL | settings)
    (scene, known), *_ = annotated.scenes(1, 0, range(5))
    nothing = {k: v[:0] for k, v in known.items()}
    item = detection.prepared(s)(image, nothing)
    losses = detection.Detector(s, 5)([item[0]], [item[1]], [(0, "a")])
    assert len(losses) == 5 and all(loss.isfinite() for loss, _ in losses)
    sum(loss for loss, _ in losses).backward()


def test_bf16_and_what_detection_finds(checkpoint):
    settings = {"init": checkpoint("swin_micro"), "load": True, "backbone": None, "seed": 0}
    s = argparse.Namespace(**detection.SMALL | settings)
    (scene, known), *_ = annotated.scenes(1, 0, range(5))
    model, item = detection.Detector(s, 5), detection.prepared(s)(scene, known)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([item[0]], [item[1]], [(0, "a")])
        with torch.no_grad():
            found = detection.predict(model.eval(), scene)
    assert all(loss.dtype == torch.float and loss.isfinite() for loss, _ in losses)
    assert found["boxes"].dtype == torch.float
    assert np.isfinite(detection.average_precision([found], [known], 5)["AP"])


def test_an_image_that_a_worker_cannot_read_ends_the_run_in_one_line(tmp_path, checkpoint):
    for part, size in (("train", (40, 50)), ("val", (50, 40))):
        voc(tmp_path / "set", part, part, ("cat", 0, (1, 1, 20, 20)), size=size)
    sets, masks = annotated.open_boxes(tmp_path / "set")
    settings = {"init": checkpoint("vit_micro"), "load": True, "backbone": None, "masks": masks}
    settings |= {
        "seed": 0,
        "device": "cpu",
        "workers": 2,
        "batch_size": 2,
        "out": str(tmp_path / "run"),
    }
    line = r"^\S*train.jpg is 50 x 40 px, its annotation 40 x 50; they must be alike$"
    with pytest.raises(data.UserError, match=line):
        detection.tune(argparse.Namespace(**detection.SMALL | settings), sets)


def test_results_are_those_of_the_same_settings_and_checkpoint(run, checkpoint):
    args = ["--checkpoints", checkpoint("vit_micro")]
    run(segmentation, *args)
    with pytest.raises(data.UserError, match="holds another run: images is"):
        run(segmentation, *args, "--val-images", 2)
    saved = torch.load(args[1], weights_only=True)
    saved["model"]["norm.bias"] += 1
    torch.save(saved, args[1])
    dense.digest.cache_clear()  # as in a new process
    with pytest.raises(data.UserError, match="holds another run: digest is"):
        run(segmentation, *args)


def test_what_cannot_be_started_from_is_refused(run, tmp_path, checkpoint):
    with pytest.raises(data.UserError, match="--data somewhere asks for --checkpoints FILE"):
        run(segmentation, "--data", "somewhere")
    with pytest.raises(data.UserError, match="is of another model"):
        run(segmentation, "--checkpoints", checkpoint("swin_micro"), "--model", "vit_micro")
    torch.save(vit.vit_micro().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(
        data.UserError, match="plain.pt does not tell what model it is; give --model"
    ):
        run(segmentation, "--checkpoints", tmp_path / "plain.pt")
    with pytest.raises(data.UserError, match="nowhere.pt can't be read"):
        run(detection, "--checkpoints", "nowhere.pt")
