"""Segmentation and detection: measures worked by hand, maps of backbones, the folders that are
read, and fine-tuning."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models.feature_extraction import create_feature_extractor

import common
import data
import dense
import detection
import segmentation
import swin
import train as train_script
import transfer
import vit

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = {"segmentation": segmentation, "detection": detection}
both = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    """Few built-in images, opened anew for each test."""
    monkeypatch.setattr(transfer, "NUM_IMAGES", 40)
    monkeypatch.setattr(dense, "NUM_SCENES", 8)
    monkeypatch.setattr(data, "SHAPES_TRAIN", 200)
    monkeypatch.setattr(data, "SHAPES_VAL", 60)
    openers = (dense.draw_scenes, segmentation.open_folder, detection.open_folder)
    for opener in openers:
        opener.cache_clear()
    yield
    for opener in openers:
        opener.cache_clear()


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint("vit_micro") is the path of a checkpoint of train.py with an untrained model."""

    def write(model):
        args = train_script.parse_args(["--model", model, "--device", "cpu"])
        train_script.fill_defaults(args, 32, 8000)
        state = {"model": train_script.build_model(args, 10).state_dict(), "ema": None}
        classes = data.SHAPES_CLASSES
        path = tmp_path / f"{model}.pt"
        torch.save(
            {"format": train_script.FORMAT, "args": vars(args), "classes": classes, **state}, path
        )
        return str(path)

    return write


@pytest.fixture
def parse(monkeypatch):
    """parse("--size", 96, ...): the command line of both scripts."""

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words), "--device", "cpu"])
        return dense.parse_args("")

    return parse


@pytest.fixture
def settings(parse, checkpoint):
    """settings(script, "vit_micro", "--steps", 4): of a run on scenes from a checkpoint."""

    def make(script, model, *words, datasets=None):
        path = checkpoint(model)
        args = parse("--checkpoints", path, *words)
        datasets = datasets or script.open_datasets("scenes", 0)
        recipes = (script.SMALL, script.LARGE)
        return dense.make_settings(args, recipes, datasets, path, 0)

    return make


# --- Average precision.

A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)
RIGHT, HALF = [100.0] * 3, [51 * 100 / 101] * 3  # of 101 recalls those from 0 to 0.5


def objects(*boxes, labels=None, crowd=()):
    crowd = torch.tensor([i in crowd for i in range(len(boxes))], dtype=torch.bool)
    return {**found(*boxes, labels=labels), "crowd": crowd}


def found(*boxes, labels=None, scores=()):
    labels = torch.tensor(labels or [0] * len(boxes), dtype=torch.long)
    boxes = torch.tensor(boxes, dtype=torch.float).view(-1, 4)
    return {"boxes": boxes, "labels": labels, "scores": torch.tensor(scores, dtype=torch.float)}


CASES = {
    "the object": ([found(A, scores=[0.3])], [objects(A)], RIGHT),
    "one of two": ([found(A, scores=[0.3])], [objects(A, B)], HALF),
    "right at the second place": ([found(FAR, A, scores=[0.9, 0.3])], [objects(A)], [50.0] * 3),
    "found twice": ([found(A, A, scores=[0.9, 0.8])], [objects(A)], RIGHT),
    "60 % of it": ([found((0, 0, 10, 6), scores=[0.9])], [objects(A)], [30.0, 100.0, 0.0]),
    "another class": ([found(A, scores=[0.9], labels=[1])], [objects(A)], [0.0] * 3),
    "a crowd is many": (
        [found(A, FAR, FAR, scores=[0.3, 0.9, 0.8])],
        [objects(A, FAR, crowd=[1])],
        RIGHT,
    ),
    "inside a crowd": (
        [found((50, 50, 52, 52), A, scores=[0.9, 0.3])],
        [objects(A, FAR, crowd=[1])],
        RIGHT,
    ),
    "an object before a crowd": (
        [found((0, 0, 10, 9.2), scores=[0.9])],
        [objects(A, (0, 0, 10, 9.2), crowd=[1])],
        [90.0, 100.0, 100.0],
    ),
    "an image without objects": (
        [found(scores=[]), found(A, scores=[0.5])],
        [objects(), objects(A)],
        RIGHT,
    ),
    "wrong in another image": (
        [found(A, scores=[0.9]), found(A, scores=[0.5])],
        [objects(), objects(A)],
        [50.0] * 3,
    ),
    "a tie, wrong first": (
        [found(A, scores=[0.5]), found(A, scores=[0.5])],
        [objects(), objects(A)],
        [50.0] * 3,
    ),
    "a tie, right first": (
        [found(A, scores=[0.5]), found(A, scores=[0.5])],
        [objects(A), objects()],
        RIGHT,
    ),
    "nothing found": ([found(scores=[])], [objects(A)], [0.0] * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_average_precision_by_hand(case):
    results, targets, expected = CASES[case]
    pairs = list(zip(results, targets, strict=True))
    result = detection.average_precision(pairs, num_classes=2)
    assert list(result) == ["AP", "AP50", "AP75"]
    assert list(result.values()) == pytest.approx(expected)


def test_average_precision_takes_the_best_hundred_and_is_nan_without_objects():
    many = found(*[FAR] * 100, A, scores=[0.9] * 100 + [0.8])
    assert detection.average_precision([(many, objects(A))], 1)["AP"] == 0
    nothing = [(found(A, scores=[0.5]), objects())]
    assert np.isnan(detection.average_precision(nothing, 1)["AP"])


# --- Intersection over union.


def test_mean_iou_by_hand():
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 0, 1, 0], [0, 2, 1, 2]])
    matrix = segmentation.confusion(predicted, mask, 4)
    assert matrix.tolist() == [[3, 0, 1, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]
    result = segmentation.summarize(matrix)  # class 2 is only predicted, class 3 is nowhere
    assert result["miou"] == pytest.approx(100 * (3 / 5 + 2 / 3 + 0) / 3)
    assert result["accuracy"] == pytest.approx(100 * 5 / 7)


# --- Models.


@pytest.mark.parametrize("model, strides", [("vit_micro", [4, 8, 16, 32]), ("swin_micro", [2, 4])])
def test_maps_have_growing_strides_and_every_parameter_gets_a_gradient(settings, model, strides):
    backbone = dense.Backbone(settings(segmentation, model, "--size", 96))
    maps = backbone(torch.randn(2, 3, 96, 96))
    assert backbone.strides == strides
    for x, channels, stride in zip(maps, backbone.channels, strides, strict=True):
        assert x.shape == (2, channels, 96 // stride, 96 // stride)
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())  # DDP would wait for it


def small_model(kind, **options):
    """The same weights in every call, all of them large."""
    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 4, "num_classes": 7, **options}
    if kind is vit.ViT:
        sizes |= {"embed_dim": 32, "depth": 3, "num_heads": 4}
    else:
        sizes |= {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = kind(**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def test_maps_of_a_vit_are_its_last_tokens():
    model, images = small_model(vit.ViT), torch.randn(2, 3, 32, 32)
    tokens = []
    hook = model.norm.register_forward_hook(lambda module, args, output: tokens.append(output))
    maps = dense.vit_maps(model, images)
    hook.remove()
    torch.testing.assert_close(model.head(tokens[0][:, 0]), model(images))
    torch.testing.assert_close(maps[0].flatten(2).mT, tokens[0][:, 1:])
    torch.testing.assert_close(maps[3], maps[0].amax((2, 3), keepdim=True))  # one for 32 x 32 px


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 40])
def test_the_last_map_of_a_swin_is_what_its_head_averages(size):
    model, images = small_model(swin.Swin), torch.randn(4, 3, size, size)
    maps = dense.swin_maps(model, images)
    assert [tuple(x.shape) for x in maps] == [
        (4, 16, size // 4, size // 4),
        (4, 32, size // 8, size // 8),
    ]
    torch.testing.assert_close(model.head(maps[-1].mean((2, 3))), model(images))
    dropping = small_model(swin.Swin, drop_path_rate=0.5).train()
    torch.manual_seed(2)
    maps = dense.swin_maps(dropping, images)
    torch.manual_seed(2)
    torch.testing.assert_close(dropping.head(maps[-1].mean((2, 3))), dropping(images))


@torch.no_grad()
def test_maps_of_a_swin_equal_torchvisions():
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
    images = torch.randn(1, 3, 224, 224)
    layers = ["features.1", "features.3", "features.5", "norm"]
    expected = create_feature_extractor(theirs, layers)(images)
    maps = dense.swin_maps(ours, images)
    for x, layer in zip(maps, layers, strict=True):
        y = expected[layer]
        if layer != "norm":
            y = nn.functional.layer_norm(y, y.shape[-1:])
        torch.testing.assert_close(x.movedim(1, -1), y, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_images_of_any_size_are_segmented_by_crops(settings):
    args = settings(segmentation, "vit_micro")
    model = segmentation.Segmenter(args, 3).eval()
    nn.init.zeros_(model.head.classifier.bias)
    image = torch.randint(256, (3, 64, 150), dtype=torch.uint8)
    assert segmentation.predict(model, image[:, :45], 64).shape == (45, 150)
    expected = model(data.normalize(image[None, :, :, :64]))[0].argmax(0)
    assert len(expected.unique()) > 1
    assert torch.equal(segmentation.predict(model, image[:, :, :64], 64), expected)  # one crop
    assert segmentation.crop_starts(150, 64) == [0, 42, 84, 86]


@torch.no_grad()
def test_detections_under_bf16_keep_their_precision(settings):
    args = settings(detection, "swin_micro")
    model = detection.Detector(args, 5, has_masks=True)
    image, target = dense.draw_scene(0)
    images = data.normalize(image[None])
    with torch.autocast("cpu", torch.bfloat16):
        loss = detection.loss(model, images, [target], None, None, args)
        (result,) = model.eval()(images)
    assert loss.isfinite() and loss.dtype == result["boxes"].dtype == torch.float
    assert not torch.equal(result["boxes"], result["boxes"].bfloat16().float())


def test_images_without_objects_or_labels_train(settings):
    image, target = dense.draw_scene(0)
    images = data.normalize(torch.stack([image, image]))
    args = settings(segmentation, "vit_micro")
    unlabelled = {"mask": torch.full((64, 64), 255, dtype=torch.uint8)}
    model = segmentation.Segmenter(args, 3)
    assert segmentation.loss(model, images, [unlabelled] * 2, None, None, args) == 0
    args = settings(detection, "vit_micro")
    model = detection.Detector(args, 5, has_masks=True)
    hidden = {**target, "crowd": torch.ones_like(target["crowd"])}
    no_area = {**target, "boxes": 0 * target["boxes"]}
    losses = []
    for same in (hidden, no_area, {name: x[:0] for name, x in target.items()}):
        torch.manual_seed(0)  # of the boxes that are sampled
        losses.append(detection.loss(model, images, [same] * 2, None, None, args))
    losses[0].backward()
    assert losses[0].isfinite() and losses[0] == losses[1] == losses[2]


# --- Data.


def test_boxes_of_scenes_are_those_of_the_visible_pixels():
    num_hidden = 0
    for i in range(40):
        image, target = dense.draw_scene("test", i)
        assert torch.equal(image, dense.draw_scene("test", i)[0])
        assert image.shape == (3, 64, 64) and 1 <= len(target["boxes"]) <= 4
        assert target["masks"].sum(0).max() <= 1  # a pixel shows one object
        assert 0 <= target["labels"].min() and target["labels"].max() < 5
        boxes = target["boxes"].int().tolist()
        for (left, top, right, bottom), mask in zip(boxes, target["masks"], strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum()
            assert mask[top, left:right].any() and mask[bottom - 1, left:right].any()
            assert mask[top:bottom, left].any() and mask[top:bottom, right - 1].any()
        num_hidden += int(target["crowd"].sum())
    assert num_hidden


def write_image(path, size=(50, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def write_mask(path, values, size=(50, 40), palette=False):
    """A PNG of four stripes of these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.repeat(np.array(values, dtype=np.uint8), size[1] // 4)
    image = Image.fromarray(np.tile(rows[:, None], size[0]), "P" if palette else "L")
    if palette:
        image.putpalette([value for value in range(256) for _ in range(3)])
    image.save(path)


LAYOUTS = {
    "plain": ("{part}/images", "{part}/masks", [0, 1, 2, 255]),
    "ADE20K": ("images/{part}ing", "annotations/{part}ing", [1, 2, 3, 0]),
    "VOC": ("JPEGImages", "SegmentationClass", [0, 1, 2, 255]),
}


@pytest.fixture(params=LAYOUTS)
def masks(tmp_path, request):
    """A folder in each layout, with an image a part, and the path of a mask to train on."""
    root = tmp_path / "set"
    images, folder, values = LAYOUTS[request.param]
    base = root / "VOCdevkit" / "VOC2012" if request.param == "VOC" else root
    for part in ("train", "val"):
        name = "validat" + "{}" if part == "val" and request.param == "ADE20K" else part
        name = name.replace("{}", "")
        for pattern, write, end in ((images, write_image, "jpg"), (folder, None, "png")):
            path = base / pattern.format(part=name).replace("validating", "validation")
            path = path / f"{part}0.{end}"
            if write is None:
                write_mask(path, values, palette=request.param == "VOC")
            else:
                write(path)
        listing = base / "ImageSets" / "Segmentation" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(f"{part}0\n")
    (root / "classes.txt").write_text("road\nsky\ntree\n")
    return root, request.param, base / folder.format(part="train") / "train0.png"


def test_folders_of_masks_are_read_in_each_layout(masks):
    root, layout, _ = masks
    datasets = segmentation.open_datasets(str(root), 0)
    assert len(datasets.train) == len(datasets.val) == 1
    assert len(datasets.classes) == {"plain": 3, "ADE20K": 150, "VOC": 21}[layout]
    for dataset in datasets[:2]:
        image, target = dataset[0]
        assert image.shape == (3, 40, 50) and image.dtype == target["mask"].dtype == torch.uint8
        assert target["mask"][::10, 7].tolist() == [0, 1, 2, 255]


def test_masks_that_cannot_be_used_are_named(masks):
    root, layout, path = masks
    dataset = segmentation.open_datasets(str(root), 0).train

    def assert_refused(words):
        with pytest.raises(data.UserError, match=f"{path} {words}"):
            dataset[0]

    write_mask(path, [0, 1, 2, 254])
    last = {"plain": 2, "ADE20K": 150, "VOC": 20}[layout]
    assert_refused(f"has class 254, but the last one is {last}")
    write_mask(path, [0, 1, 2, 1], size=(40, 40))
    assert_refused("must have 8 bits for each pixel of .*train0.jpg")
    Image.new("RGB", (50, 40)).save(path)
    assert_refused("must have 8 bits for each pixel")
    path.write_bytes(b"no image")
    assert_refused("cannot be read")
    path.unlink()
    assert_refused("cannot be read")


def coco(root, part, *annotations, classes=("cat", "dog")):
    """Two images and a file of annotations; those lack what is the same for all."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 8)]
    for image in images:
        write_image(root / f"{part}2017" / image["file_name"])
    square = {"image_id": 7, "category_id": 90, "bbox": [2, 2, 10, 10]}
    square["segmentation"] = [[2, 2, 12, 2, 12, 12, 2, 12]]
    annotations = [{"id": i, **square, **a} for i, a in enumerate(annotations)]
    categories = [{"id": id, "name": name} for id, name in zip((90, 3), classes, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{part}2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_cocos_boxes_masks_and_crowds(tmp_path):
    crowd = {"iscrowd": 1, "segmentation": {"counts": [2000], "size": [40, 50]}, "category_id": 3}
    coco(tmp_path, "train", {}, crowd)
    path = coco(tmp_path, "val", {"segmentation": None})
    datasets = detection.open_datasets(str(tmp_path), 0)
    assert datasets.classes == ["dog", "cat"] and len(datasets.train) == 2
    image, target = datasets.train[0]
    assert image.shape == (3, 40, 50) and target["boxes"].tolist() == [[2, 2, 12, 12]] * 2
    assert target["labels"].tolist() == [1, 0] and target["crowd"].tolist() == [False, True]
    assert 90 <= target["masks"][0].sum() <= 130 and target["masks"][1].sum() == 0
    assert datasets.train[1][1]["masks"].shape == (0, 40, 50)  # an image without objects
    assert "masks" not in datasets.val[0][1]

    coco(tmp_path, "val", {"segmentation": None, "bbox": [2, 3, 10, 10]})  # of the same length
    detection.open_folder.cache_clear()
    assert detection.open_datasets(str(tmp_path), 0).digest != datasets.digest

    (tmp_path / "val2017" / "7.jpg").unlink()
    with pytest.raises(data.UserError, match="cannot read .*val2017/7.jpg"):
        datasets.val[0]
    for wrong in ({"bbox": [1, 2]}, {"category_id": 5}):
        coco(tmp_path, "val", wrong)
        assert_not_opened(tmp_path, f"{path} is no file of COCO's annotations: .*annotation 0")
    path.write_text("[]")
    assert_not_opened(tmp_path, f"{path} is no file of COCO's annotations")
    coco(tmp_path, "val", {}, classes=("cat", "cow"))
    assert_not_opened(tmp_path, "must have the same categories")
    path.unlink()
    assert_not_opened(tmp_path, r"must have one file annotations/instances_val\*.json or val.json")


def assert_not_opened(root, words):
    detection.open_folder.cache_clear()
    with pytest.raises(data.UserError, match=words):
        detection.open_datasets(str(root), 0)


# --- Settings.


@both
@pytest.mark.parametrize("size", [64, 96, 512])
def test_warmup_takes_at_most_a_tenth_of_the_steps(settings, script, size):
    args = settings(script, "vit_micro", "--size", size)
    peak = max(range(args.steps), key=lambda step: train_script.lr_at(step, args, args.steps))
    assert 0 < peak <= args.steps / 10 + 1
    assert train_script.lr_at(peak, args, args.steps) == pytest.approx(args.lr, rel=0.1)


@both
def test_width_and_recipe_follow_the_size(settings, script):
    small, large = (settings(script, "vit_micro", "--size", size) for size in (96, 512))
    assert small.width == script.SMALL["width"] < script.LARGE["width"] == large.width
    assert small.lr == large.lr == dense.MICRO_LR
    assert settings(script, "deit_tiny", "--size", 512).lr == script.LARGE["lr"]


def test_every_flag_changes_what_is_done_with_a_folder(parse, settings, capsys, tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val"):
        for i in range(20):
            write_image(root / part / "images" / f"{i}.jpg")
            write_mask(root / part / "masks" / f"{i}.png", [0, 1, 0, 1])
    (root / "classes.txt").write_text("road\nsky\n")
    datasets = segmentation.open_datasets(str(root), 0)
    options = {"--size": 64, "--steps": 7, "--batch-size": 4, "--lr": 0.5, "--workers": 1}
    default = vars(settings(segmentation, "vit_micro", datasets=datasets))
    for flag, value in options.items():
        name = flag.strip("-").replace("-", "_")
        changed = settings(segmentation, "vit_micro", flag, value, datasets=datasets)
        assert vars(changed)[name] == value != default[name]
    with pytest.raises(SystemExit):
        parse("--help")
    flags = set(re.findall("--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    others = {"--data", "--checkpoints", "--seeds", "--jobs", "--device", "--runs"}
    assert flags == options.keys() | others


def test_flags_that_contradict_each_other_are_refused(parse, settings, tmp_path):
    with pytest.raises(data.UserError, match="--data needs --checkpoints FILE"):
        parse("--data", "somewhere")
    torch.save({"model": vit.vit_micro().state_dict()}, tmp_path / "foreign.pt")
    with pytest.raises(data.UserError, match="foreign.pt is no checkpoint of this version"):
        parse("--checkpoints", tmp_path / "foreign.pt")
    with pytest.raises(data.UserError, match="--size must be a multiple of 32, got 100"):
        parse("--size", 100)
    with pytest.raises(data.UserError, match="--batch-size must be even"):
        settings(segmentation, "vit_micro", "--batch-size", 5)
    with pytest.raises(data.UserError, match="has no images; --help says"):
        segmentation.open_datasets(str(tmp_path), 0)
    (tmp_path / "VOCdevkit").mkdir()
    segmentation.open_folder.cache_clear()
    with pytest.raises(data.UserError, match="is no VOC 2012: Dataset not found"):
        segmentation.open_datasets(str(tmp_path), 0)


# --- Fine-tuning.


@both
def test_each_start_of_each_model_is_fine_tuned_once(script, monkeypatch, tmp_path, capsys):
    words = ["--steps", "2", "--batch-size", "4", "--seeds", "1", "--jobs", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["script", *words, "--runs", str(tmp_path)])
    script.main()
    table = (tmp_path / f"{script.__name__}.md").read_text()
    starts = ["area", "TL-Align", "from scratch"]
    expected = [[model, start] for model in ("vit_micro", "swin_micro") for start in starts]
    assert [row.strip("| ").split(" | ")[:2] for row in table.splitlines()[2:8]] == expected
    assert "6 of 6 runs to do" in capsys.readouterr().out
    script.main()
    assert (tmp_path / f"{script.__name__}.md").read_text() == table
    assert "0 of 6 runs to do" in capsys.readouterr().out


class CalledFunctions(TorchFunctionMode):
    """Records the names of the functions of torch that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


def test_a_step_of_segmentation_does_not_wait_for_the_device(settings):
    args = settings(segmentation, "vit_micro")
    datasets = segmentation.open_datasets("scenes", 0)
    trainer = train_script.Trainer(args, segmentation.Segmenter(args, 6), segmentation.loss)
    transform = segmentation.make_transform(args)
    images, targets = next(iter(dense.Loader(datasets.train, args, trainer.share, transform)))
    trainer.train_step(images, targets, step=0, lr=0.1)  # the first one fills caches
    with CalledFunctions() as called:
        trainer.train_step(images, targets, step=1, lr=0.1)
    waiting = {"tensor", "as_tensor", "item", "tolist", "cpu", "numpy", "nonzero", "masked_select"}
    assert "batch_norm" in called.names
    assert not called.names & (waiting | {"__bool__", "__float__", "__int__", "__index__"})


def test_a_run_that_was_stopped_ends_with_the_same_weights(settings, tmp_path, monkeypatch):
    datasets = detection.open_datasets("scenes", 0)
    args = settings(detection, "vit_micro", "--steps", 4, "--batch-size", 2)
    step = train_script.Trainer.train_step

    def tune(out):
        args.out = str(tmp_path / out)
        model = detection.Detector(args, 5, has_masks=True)
        transform = detection.make_transform(args)
        dense.finetune(args, datasets, model, detection.loss, transform, lambda *_: {"AP": 1.0})
        return torch.load(tmp_path / out / "last.pt", weights_only=True)

    def stop(trainer, images, targets, number, lr):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, images, targets, number, lr)

    whole = tune("whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_script.Trainer, "train_step", stop)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            tune("stopped")
    stopped = tune("stopped")
    assert stopped["progress"]["step"] == 4
    for name, weight in whole["model"].items():
        assert torch.equal(weight, stopped["model"][name]), name
    args.lr = 1.0
    with pytest.raises(data.UserError, match=r"--lr 0.002 \(now 1.0\)"):
        tune("stopped")


def write_masks(root):
    for part in ("train", "val"):
        for i in range(4):
            write_image(root / part / "images" / f"{i}.jpg")
            write_mask(root / part / "masks" / f"{i}.png", [0, 1, 0, 1])
    (root / "classes.txt").write_text("road\nsky\n")


def start_script(start, script, num_processes, checkpoint, *words):
    words = ["--checkpoints", checkpoint, "--device", "cpu", "--seeds", "1", *words]
    path = Path(dense.__file__).with_name(f"{script}.py")
    return start(num_processes, *words, script=path)


def test_processes_share_a_fine_tuning(start, tmp_path, checkpoint):
    write_masks(tmp_path / "set")
    words = ["--data", "set", "--size", 64, "--steps", 2, "--batch-size", 4, "--runs", "runs"]
    run = start_script(start, "segmentation", 2, checkpoint("swin_micro"), *words)
    assert run.wait(timeout=120) == 0, run.log.read_text()
    assert "| swin_micro |" in (tmp_path / "runs" / "segmentation.md").read_text()


@pytest.mark.parametrize("jobs", [0, 1])
def test_ctrl_c_ends_a_run_whose_workers_are_starting(start, tmp_path, checkpoint, jobs):
    write_masks(tmp_path / "set")
    words = ["--data", "set", "--size", 64, "--steps", 10_000, "--batch-size", 4, "--runs", "runs"]
    words += ["--workers", 1, "--jobs", jobs]
    run = start_script(start, "segmentation", 1, checkpoint("vit_micro"), *words)
    while not list(tmp_path.glob("runs/*/*/config.json")):  # written before workers start
        assert run.poll() is None, run.log.read_text()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(timeout=60) == 130, run.log.read_text()
    assert run.log.read_text().endswith("stopped: the same command continues\n")
    assert "Traceback" not in run.log.read_text()


def test_a_file_that_a_worker_cannot_use_ends_the_run_in_one_line(
    tmp_path, checkpoint, monkeypatch, capsys
):
    root = tmp_path / "set"
    write_masks(root)
    (root / "train" / "masks" / "1.png").write_bytes(b"no image")
    words = ["--data", root, "--checkpoints", checkpoint("vit_micro"), "--size", 64]
    words += ["--batch-size", 4, "--workers", 1, "--jobs", 0, "--runs", tmp_path / "runs"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        common.main(segmentation.main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {root}/train/masks/1.png cannot be read")


def test_other_images_and_other_weights_are_not_taken_for_done(
    tmp_path, checkpoint, monkeypatch, capsys
):
    root, path = tmp_path / "set", checkpoint("vit_micro")
    write_masks(root)
    words = ["--data", root, "--checkpoints", path, "--size", 64, "--steps", 1, "--seeds", 1]
    words += ["--batch-size", 4, "--jobs", 0, "--runs", tmp_path / "runs", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    segmentation.main()
    saved = torch.load(path, weights_only=True)
    saved["model"]["norm.bias"] += 1
    torch.save(saved, path)
    segmentation.main()
    assert capsys.readouterr().out.count("1 of 1 runs to do") == 2
    with (root / "train" / "masks" / "1.png").open("ab") as mask:
        mask.write(b"other")
    segmentation.open_folder.cache_clear()
    segmentation.main()
    assert "1 of 1 runs to do" in capsys.readouterr().out
    segmentation.main()
    assert "0 of 1 runs to do" in capsys.readouterr().out
