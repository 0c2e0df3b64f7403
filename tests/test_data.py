"""The two halves of the data path, against torchvision's own operations where it has them."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import functional as TF

import data


def settings(**kwargs):
    usual = {
        "img_size": 96,
        "batch_size": 8,
        "seed": 0,
        "device": "cpu",
        "workers": 0,
        "repeats": 1,
        "epochs": 3,
    }
    return SimpleNamespace(**{**usual, **kwargs})


def test_shapes_are_drawn_from_the_seed_alone_and_the_mask_is_the_object():
    images, classes, masks = data.shapes(200, seed=3)
    again = data.shapes(200, seed=3)
    assert all(torch.equal(a, b) for a, b in zip((images, classes, masks), again))
    assert not torch.equal(images, data.shapes(200, seed=4)[0])
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32)
    assert classes.bincount(minlength=10).min() > 0
    area = masks.float().mean((1, 2))
    assert area.min() > 0.1 and area.max() < 0.6
    plain = images[classes == 0].float(), masks[classes == 0][:, None]
    inside = (plain[0] * plain[1]).sum((2, 3), keepdim=True) / plain[1].sum((2, 3), keepdim=True)
    spread = ((plain[0] - inside).abs() * plain[1]).sum((2, 3)) / plain[1].sum((2, 3))
    assert spread.mean() < 0.06 * 255  # one colour and the grain: the mask covers nothing else


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epochs_order_is_a_shuffle_and_neighbours_are_different_images(repeats):
    order = data.epoch_order(3000, 0, 5, repeats)
    counts = order.bincount()
    assert counts[counts > 0].float().mean() == repeats
    pairs = order.view(-1, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert torch.equal(order, data.epoch_order(3000, 0, 5, repeats))
    assert not torch.equal(order, data.epoch_order(3000, 0, 6, repeats))


@pytest.mark.parametrize("repeats", [1, 3])
def test_batches_do_not_depend_on_the_workers(folder, repeats):
    sets = data.open_sets(str(folder))
    streams = [data.Stream(sets, settings(workers=workers, repeats=repeats)) for workers in (0, 2)]
    for (x, t), (y, u) in zip(*(s.epoch(1) for s in streams), strict=True):
        assert x.shape == (8, 3, 96, 96) and x.dtype == torch.uint8
        assert torch.equal(x, y) and torch.equal(t, u)
    dark = x.float().mean((1, 2, 3)) < 100
    assert torch.equal(dark, t == 0)  # crops and classes belong together
    for stream in streams:
        stream.close()


def test_repeated_augmentation_decodes_an_image_once_for_its_crops_in_a_batch(folder):
    sets = data.open_sets(str(folder))
    read = []
    load = sets.train.loader
    sets.train.loader = lambda path: read.append(path) or load(path)
    batches = list(data.Stream(sets, settings(batch_size=12, repeats=3)).epoch(0))
    assert len(batches) == 2 and len(read) == 8 and len(set(read)) == 8  # 24 crops


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_from_epoch_to_evaluation_to_epoch_in_one_loader(folder, workers, monkeypatch):
    sets, loaders = data.open_sets(str(folder)), []
    make = data.DataLoader
    monkeypatch.setattr(
        data, "DataLoader", lambda *args, **kwargs: loaders.append(1) or make(*args, **kwargs)
    )
    stream, share = data.Stream(sets, settings(workers=workers), share=slice(1, None, 2)), []
    for epoch, skip in ((0, 3), (1, 0), (2, 0)):  # resumed after the last step, before the evaluation
        images = [x for x, _ in stream.epoch(epoch, skip)]
        again = [x for x, _ in data.Stream(sets, settings()).epoch(epoch, skip)]
        assert len(images) == 3 - skip and all(torch.equal(a, b) for a, b in zip(images, again))
        share.append(torch.cat([t for _, t in stream.whole()]))
        assert share[-1].tolist() == [0] * 6 + [1] * 6
    assert len(loaders) == 1 + 2  # the second and third `again` decode, the first has no step to
    stream.close()


@pytest.mark.parametrize("size", [32, 96])
def test_whole_gives_every_image_once_in_order(folder, size):
    batches = data.batches(data.open_sets(str(folder)), settings(img_size=size, batch_size=10))
    assert type(batches) is (data.Memory if size == 32 else data.Stream)
    images, targets = zip(*batches.whole())
    assert torch.cat(images).shape == (24, 3, size, size)
    assert torch.cat(targets).tolist() == [0] * 12 + [1] * 12


def test_names_that_begin_with_a_dot_are_no_images_and_no_classes(folder):
    for name in (".hidden/00.jpg", "dark/._00.jpg", "light/.checkpoints/00.jpg"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_text("not an image")
    sets = data.open_sets(str(folder))
    assert sets.classes == ["dark", "light"] and len(sets.train) == 24
    (folder / "val").rename(folder / ".val")
    hidden = data.Folder(folder / ".val")  # what leads to a set may be hidden
    assert hidden.classes == sets.classes and len(hidden) == 24


def test_the_paths_of_a_folder_are_one_array(folder):
    (folder / "train" / "dark" / "00.jpg").rename(folder / "train" / "dark" / "gr\xfc\xdfe.jpg")
    train = data.open_sets(str(folder)).train
    assert isinstance(train.samples, np.ndarray) and train.imgs is train.targets is None
    assert len(train) == 24 and [int(train[i][1]) for i in (0, 11, 12, 23)] == [0, 0, 1, 1]
    assert all(train[i][0].shape == (3, 32, 40) for i in range(24))


def test_the_evaluation_crop_is_deits():
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    theirs = TF.center_crop(TF.resize(image, 256, TF.InterpolationMode.BICUBIC), 224)
    assert torch.equal(data.center_crop(image, 224), theirs)
    line = torch.randint(0, 256, (3, 2, 50_000), dtype=torch.uint8)  # 20 GB, were it resized whole
    assert data.center_crop(line, 224).shape == data.center_crop(line.mT, 224).shape == (3, 224, 224)


def test_a_random_resized_crop_is_a_box_of_the_image_as_torchvision_resizes_it(monkeypatch):
    rows, cols = torch.meshgrid(torch.arange(200), torch.arange(250), indexing="ij")
    image = torch.stack([rows, cols, rows ^ cols]).to(torch.uint8)  # each pixel tells where it is from
    boxes, resize = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *a, **k: boxes.append(x[0]) or resize(x, *a, **k))
    for i in range(20):
        crop = data.random_resized_crop(image, 64, (i,))
        (top, left), size = boxes[-1][:2, 0, 0].tolist(), boxes[-1].shape[1:]
        theirs = TF.resized_crop(image, top, left, *size, [64, 64], TF.InterpolationMode.BICUBIC)
        assert (crop.int() - theirs.int()).abs().max() <= 1


def test_random_resized_crops_have_the_reference_distribution():
    boxes = []
    for i in range(2000):  # a ramp tells where the box was and how large
        ramp = torch.arange(200).expand(3, 200, 200).to(torch.uint8)
        crop = data.random_resized_crop(ramp, 64, (i,)).float()
        boxes.append(crop[0, 0, -1] - crop[0, 0, 0])
    torch.manual_seed(0)
    reference = []
    for _ in range(2000):
        *_, width = torchvision.transforms.RandomResizedCrop.get_params(ramp, [0.08, 1], [3 / 4, 4 / 3])
        reference.append(width)
    ours, theirs = torch.stack(boxes), torch.tensor(reference).float()
    assert abs(ours.mean() - theirs.mean()) < 3 and abs(ours.std() - theirs.std()) < 3


def test_files_are_read_by_what_they_hold_and_not_by_their_name(tmp_path):
    noise = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    TF.to_pil_image(noise).save(tmp_path / "a.JPEG", format="PNG")
    assert torch.equal(data.decode(tmp_path / "a.JPEG"), noise)
    colour = torch.tensor([200.0, 100, 50])
    smooth = TF.to_pil_image(colour.to(torch.uint8).view(3, 1, 1).expand(3, 20, 30))
    smooth.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    smooth.convert("L").save(tmp_path / "gray.jpg", quality=95)
    exif = smooth.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    smooth.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert (data.decode(tmp_path / "cmyk.jpg").float().mean((1, 2)) - colour).abs().max() < 6
    assert data.decode(tmp_path / "gray.jpg").shape == (3, 20, 30)
    assert data.decode(tmp_path / "turned.jpg").shape == (3, 30, 20)


@pytest.mark.parametrize("kind", ["jpg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"])
def test_every_format_that_is_looked_for_is_read(tmp_path, kind):
    colour = torch.tensor([100, 100, 100] if kind == "pgm" else [200, 100, 50], dtype=torch.uint8)
    image = TF.to_pil_image(colour.view(3, 1, 1).expand(3, 20, 30)).convert("L" if kind == "pgm" else "RGB")
    more = {"save_all": True, "append_images": [image.rotate(90)]} if kind in ("gif", "webp") else {}
    for part in ("train", "val"):  # a class whose name is no text
        at = os.fsencode(tmp_path) + b"/set/" + part.encode() + b"/caf\xe9"
        os.makedirs(at)
        image.save(tmp_path / f"x.{kind}", **more, **({"format": "JPEG"} if kind == "jfif" else {}))
        os.rename(tmp_path / f"x.{kind}", at + b"/\xff\xfe." + kind.upper().encode())
        (tmp_path / "set" / part / "Thumbs.db").write_text("beside the classes")
    with open(at + b"/notes.txt", "w") as file:
        file.write("among the images")
    sets = data.open_sets(str(tmp_path / "set"))
    assert (sets.train.others, sets.val.others) == (0, 1) and len(sets.train) == 1
    ((images, _),) = data.Stream(sets, settings(batch_size=1)).whole()
    assert images.shape == (1, 3, 96, 96) and (images[0].float().mean((1, 2)) - colour).abs().max() < 4


@pytest.mark.parametrize("kind", ["tif", "pgm", "png"])
def test_images_of_16_bits_keep_their_upper_eight(tmp_path, kind):
    Image.fromarray(np.full((4, 5), 100 * 257, np.uint16)).save(tmp_path / f"deep.{kind}")
    assert (data.decode(tmp_path / f"deep.{kind}") == 100).all()


def test_every_operation_of_rand_augment_equals_torchvisions():
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    x = TF.gaussian_blur(x, 5)  # smooth, so that interpolation differs little
    m = torch.full((1, 1, 1, 1), 0.9)
    fill = [255 * c for c in data.MEAN]
    geometry = {"interpolation": TF.InterpolationMode.BILINEAR, "fill": fill}
    shear = math.degrees(math.atan(0.27))
    expected = [
        TF.autocontrast(x),
        TF.equalize(x),
        TF.invert(x),
        TF.posterize(x, 1),
        TF.solarize(x, 26),
        torch.where(x < 128, (x.int() + 99).clamp(max=255), x.int()).to(torch.uint8),
        TF.adjust_saturation(x, 1.81),
        TF.adjust_contrast(x, 1.81),
        TF.adjust_brightness(x, 1.81),
        TF.adjust_sharpness(x, 1.81),
        TF.rotate(x, 27, **geometry),
        TF.affine(x, 0, [0, 0], 1.0, [shear, 0], center=[0, 0], **geometry),
        TF.affine(x, 0, [0, 0], 1.0, [0, shear], center=[0, 0], **geometry),
        TF.affine(x, 0, [-0.45 * 0.9 * 32, 0], 1.0, [0, 0], **geometry),
        TF.affine(x, 0, [0, -0.45 * 0.9 * 32], 1.0, [0, 0], **geometry),
    ]
    for i, (apply, theirs) in enumerate(zip(data.RAND_AUGMENT, expected, strict=True)):
        difference = (apply(x, m, m).int() - theirs.int()).abs().float()
        assert difference.median() <= 1 and difference.mean() < 4, f"operation {i}"


def test_augmentation_of_a_batch_is_that_of_its_samples():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    rand = data.uniform((64, 16), "test")
    together = data.augment(images, rand)
    alone = torch.cat([data.augment(x[None], r[None]) for x, r in zip(images, rand)])
    torch.testing.assert_close(together, alone)
    changed = (together != data.normalize(images)).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    light = data.augment(images, rand, flip=False, full=False)
    assert torch.equal(light, data.normalize(images))


def test_erasing_fills_boxes_of_the_right_size_in_a_quarter_of_the_images():
    rand = data.uniform((2000, 7), "test")
    erased = data.random_erase(torch.zeros(2000, 3, 32, 32), rand, rand)
    area = (erased != 0).any(1).float().mean((1, 2))
    assert 0.22 < (area > 0).float().mean() < 0.28
    assert area[area > 0].min() >= 0.015 and area.max() < 0.36
    assert abs(erased[erased != 0].std() - 1) < 0.05


def test_torchvisions_sets_are_opened_with_the_splits_that_they_have(monkeypatch):
    made = []

    def make(root, transform, download=False, **part):
        made.append(part)
        image = TF.to_pil_image(torch.zeros(1, 28, 28, dtype=torch.uint8))  # grayscale
        made_of = TensorDataset(transform(image).expand(4, 3, 28, 28), torch.arange(4))
        made_of.classes = [*"0123"]
        return made_of

    for name, _ in data.NAMES.values():
        assert hasattr(torchvision.datasets, name)
    monkeypatch.setattr(torchvision.datasets, "MNIST", make)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", make)
    mnist, pets = data.open_sets("mnist"), data.open_sets("oxfordiiitpet")
    assert made == [{"train": True}, {"train": False}, {"split": "trainval"}, {"split": "test"}]
    assert len(mnist.classes) == 4 and not mnist.flip and pets.flip
    assert mnist.train[0][0].shape == (3, 28, 28) and data.native_size(mnist.train) == 28


@pytest.mark.parametrize("missing", [RuntimeError, FileNotFoundError])  # USPS says the latter
def test_torchvisions_sets_are_fetched_where_they_are_missing(monkeypatch, missing):
    def make(root, transform, download=False, **part):
        if not download:
            raise missing("Dataset not found")
        return TensorDataset(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4))

    monkeypatch.setattr(torchvision.datasets, "USPS", make)
    assert len(data.open_sets("usps").train) == 4
