"""The data path: datasets, decoding, cropping, batches, and augmentation against torchvision's
own operations where it has them."""

import math
import os
import runpy
import shutil
import traceback
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

import data

WHOLE_BATCH = slice(None)


def loader_args(**kwargs):
    usual = {"img_size": 96, "batch_size": 8, "aug_repeats": 1, "seed": 0, "workers": 0}
    return SimpleNamespace(**{**usual, "device": "cpu", **kwargs})


def make_train_loader(dataset, share=WHOLE_BATCH, **kwargs):
    return data.make_train_loader(dataset, loader_args(**kwargs), share)


def assert_equal_batches(a, b):
    for (images, targets), (other_images, other_targets) in zip(a, b, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


# --- Datasets.


def test_shapes_depend_on_the_seed_only_and_the_mask_covers_the_object():
    images, classes, masks = data.shapes(200, seed=3)
    for a, b in zip((images, classes, masks), data.shapes(200, seed=3), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(images, data.shapes(200, seed=4)[0])
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32)
    assert classes.bincount(minlength=10).min() > 0
    area = masks.float().mean((1, 2))
    assert area.min() > 0.1 and area.max() < 0.6
    plain = images[classes == 0].float()  # one colour, and noise
    mask = masks[classes == 0][:, None]
    num_pixels = mask.sum((2, 3), keepdim=True)
    color = (plain * mask).sum((2, 3), keepdim=True) / num_pixels
    deviation = ((plain - color).abs() * mask).sum((2, 3), keepdim=True) / num_pixels
    assert deviation.mean() < 0.06 * 255


def test_torchvision_datasets_are_opened_with_their_own_splits(monkeypatch):
    opened = []

    def make(root, transform, download=False, **split):
        opened.append(split)
        image = TF.to_pil_image(torch.zeros(1, 28, 28, dtype=torch.uint8))  # grayscale
        dataset = TensorDataset(transform(image).expand(4, 3, 28, 28), torch.arange(4))
        dataset.classes = ["0", "1", "2", "3"]
        return dataset

    for class_name, _, _ in data.TORCHVISION_DATASETS.values():
        assert hasattr(torchvision.datasets, class_name)
    monkeypatch.setattr(torchvision.datasets, "MNIST", make)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", make)
    mnist = data.open_datasets("mnist")
    pets = data.open_datasets("oxfordiiitpet")
    assert opened == [{"train": True}, {"train": False}, {"split": "trainval"}, {"split": "test"}]
    assert mnist.classes == ["0", "1", "2", "3"]
    assert mnist.train[0][0].shape == (3, 28, 28) and data.median_size(mnist.train) == 28
    assert not mnist.hflip and pets.hflip and not data.open_datasets("shapes").hflip


def test_missing_torchvision_datasets_are_downloaded(monkeypatch):
    online = True

    def make(root, transform, download=False, **split):
        if not (download and online):
            raise RuntimeError("Dataset not found")
        return TensorDataset(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4))

    monkeypatch.setattr(torchvision.datasets, "Flowers102", make)
    assert len(data.open_datasets("flowers102").train) == 4
    online = False
    with pytest.raises(data.UserError, match="flowers102 in data: Dataset not found"):
        data.open_datasets("flowers102")


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_folder_may_call_its_validation_part(folder, name):
    (folder / "val").rename(folder / name)
    datasets = data.open_datasets(str(folder))
    assert datasets.classes == ["dark", "light"] and datasets.hflip
    assert len(datasets.train) == len(datasets.val) == 24
    assert os.fsdecode(datasets.val.paths[0]) == str(folder / name / "dark" / "00.jpg")
    assert datasets.val.targets.tolist() == [0] * 12 + [1] * 12


def test_a_folder_of_class_folders_is_split_by_the_names_of_its_images(tmp_path, capsys):
    def add_images(prefix):
        for i in range(1000):
            path = tmp_path / "set" / ("cat", "dog")[i % 2] / f"{prefix}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def split():
        datasets = data.open_datasets(str(tmp_path / "set"))
        assert datasets.classes == ["cat", "dog"]
        return set(datasets.train.paths.tolist()), set(datasets.val.paths.tolist())

    add_images("a")
    train, val = split()
    assert not train & val and len(train | val) == 1000 and 70 < len(val) < 130
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}/set has no train/ and val/: {len(val)} ")
    add_images("b")
    shutil.move(tmp_path / "set", tmp_path / "moved")
    (tmp_path / "set").symlink_to("moved")
    more_train, more_val = split()
    assert train < more_train and val < more_val


def test_folders_that_are_no_dataset_are_refused(folder, tmp_path):
    def assert_refused(root, *words):
        with pytest.raises(data.UserError) as error:
            data.open_datasets(str(root))
        for word in words:
            assert word in str(error.value)

    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "nowhere", "nowhere", "is no folder", "cifar10")
    assert_refused(tmp_path / "empty", "empty", "two class folders or more", "train/CLASS/")
    (folder / "val" / "grey").mkdir()
    assert_refused(folder, "same classes", "grey is in only one of them")
    (folder / "train" / "grey").mkdir()
    assert_refused(folder, "train/grey has no images", ".jpg")
    shutil.rmtree(folder / "val")
    assert_refused(folder, "has train/ but none of val, valid, validation, test")
    shutil.rmtree(folder / "train" / "grey")
    for class_name in ("dark", "light"):
        for path in sorted((folder / "train" / class_name).iterdir())[1:]:
            path.unlink()
    assert_refused(folder / "train", "too few images to split")
    shutil.rmtree(folder / "train" / "light")
    assert_refused(folder / "train", "two class folders or more")


def test_hidden_files_and_folders_are_ignored(folder):
    for name in (".hidden/00.jpg", "dark/._00.jpg", "light/.checkpoints/00.jpg"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_text("not an image")
    datasets = data.open_datasets(str(folder))
    assert datasets.classes == ["dark", "light"] and len(datasets.train) == 24
    hidden = folder.rename(folder.with_name(".set"))  # the dataset itself may be hidden
    assert len(data.open_datasets(str(hidden)).train) == 24


def test_paths_are_kept_in_an_array_that_workers_share(folder):
    (folder / "train" / "dark" / "00.jpg").rename(folder / "train" / "dark" / "gr\xfc\xdfe.jpg")
    train = data.open_datasets(str(folder)).train
    assert isinstance(train.paths, np.ndarray) and isinstance(train.targets, np.ndarray)
    assert not train.paths.dtype.hasobject
    items = [train[i] for i in range(24)]
    assert [target for _, target in items] == [0] * 12 + [1] * 12
    assert all(image.shape == (3, 32, 40) for image, _ in items)


# --- Decoding.


@pytest.fixture(params=["torchvision", "Pillow"])
def decoder(request, monkeypatch):
    """torchvision with its JPEG decoder, and without."""
    if request.param == "Pillow":
        monkeypatch.setattr(data, "decode_jpeg", None)


def test_files_are_decoded_by_content_and_rotated_by_exif(decoder, tmp_path):
    noise = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    TF.to_pil_image(noise).save(tmp_path / "png.JPEG", format="PNG")
    assert torch.equal(data.decode(tmp_path / "png.JPEG"), noise)
    halves = torch.zeros(3, 20, 30, dtype=torch.uint8)
    halves[:, :10] = 200  # the upper half is bright
    image = TF.to_pil_image(halves)
    exif = image.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    image.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    rotated = data.decode(tmp_path / "rotated.jpg")
    assert (rotated.int() - halves.rot90(-1, (1, 2)).int()).abs().max() < 8
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert (data.decode(tmp_path / "cmyk.jpg").int() - halves.int()).abs().max() < 8
    image.convert("L").save(tmp_path / "gray.jpg", quality=95)
    assert (data.decode(tmp_path / "gray.jpg").int() - halves.int()).abs().max() < 8


def test_jpegs_are_decoded_by_a_torchvision_without_decoders(folder, monkeypatch):
    path = folder / "train" / "dark" / "00.jpg"
    assert data.decode_jpeg is not None
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    decode_with_pillow = runpy.run_path(data.__file__)["decode"]  # imports the file once more
    assert (decode_with_pillow(path).int() - data.decode(path).int()).abs().max() <= 2


@pytest.mark.parametrize("extension", data.IMAGE_EXTENSIONS)
def test_every_listed_format_is_read(tmp_path, extension):
    color = torch.tensor([200, 100, 50], dtype=torch.uint8)
    image = TF.to_pil_image(color.view(3, 1, 1).expand(3, 20, 30))
    options = {}
    if extension == ".pgm":
        image = image.convert("L")
        color = torch.tensor(image.getpixel((0, 0)))
    if extension in (".gif", ".webp"):  # an animation
        options = {"save_all": True, "append_images": [TF.to_pil_image(torch.zeros(3, 20, 30))]}
    if extension == ".jfif":
        options = {"format": "JPEG"}
    image.save(tmp_path / f"x{extension}", **options)
    class_folder = os.fsencode(tmp_path) + b"/set/caf\xe9"  # no valid UTF-8
    os.makedirs(class_folder)
    path = class_folder + b"/\xff\xfe" + extension.upper().encode()
    os.rename(tmp_path / f"x{extension}", path)
    (tmp_path / "set" / "notes.txt").touch()
    root = str(tmp_path / "set")
    ((image, target),) = data.ImageFiles(data.find_images(root, data.find_classes(root)))
    assert image.shape == (3, 20, 30) and target == 0
    assert (image.float().mean((1, 2)) - color).abs().max() < 4


@pytest.mark.parametrize("extension", [".tif", ".pgm", ".png"])
def test_16_bit_images_keep_their_upper_bits(tmp_path, extension):
    path = tmp_path / f"deep{extension}"
    Image.fromarray(np.full((4, 5), 100 * 257, np.uint16)).save(path)
    assert (data.decode(path) == 100).all()


# --- Cropping.


def test_evaluation_crop_is_deits():
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    resized = TF.resize(image, 256, TF.InterpolationMode.BICUBIC)
    assert torch.equal(data.center_crop(image, 224), TF.center_crop(resized, 224))


def test_images_of_extreme_shapes_are_cropped():
    line = torch.randint(0, 256, (3, 2, 50_000), dtype=torch.uint8)  # 20 GB if resized whole
    for image in (line, line.mT):
        assert data.center_crop(image, 224).shape == (3, 224, 224)
        assert data.random_resized_crop(image, 224, (0,)).shape == (3, 224, 224)


def test_random_resized_crop_resizes_a_box_as_torchvision_does(monkeypatch):
    rows, cols = torch.meshgrid(torch.arange(200), torch.arange(250), indexing="ij")
    image = torch.stack([rows, cols, rows ^ cols]).to(torch.uint8)  # a pixel shows its position
    boxes = []
    interpolate = F.interpolate

    def record(box, *args, **kwargs):
        boxes.append(box[0])
        return interpolate(box, *args, **kwargs)

    monkeypatch.setattr(F, "interpolate", record)
    for i in range(20):
        crop = data.random_resized_crop(image, 64, (i,))
        top, left = boxes[-1][:2, 0, 0].tolist()
        height, width = boxes[-1].shape[1:]
        expected = TF.resized_crop(
            image, top, left, height, width, [64, 64], TF.InterpolationMode.BICUBIC
        )
        assert (crop.int() - expected.int()).abs().max() <= 1


def test_random_resized_crops_have_the_reference_distribution(monkeypatch):
    image = torch.zeros(3, 200, 240, dtype=torch.uint8)
    boxes, expected = [], []
    monkeypatch.setattr(data, "resized_crop", lambda image, *box: boxes.append(box[:4]))
    torch.manual_seed(0)
    for i in range(3000):
        data.random_resized_crop(image, 64, (i,))
        reference = torchvision.transforms.RandomResizedCrop
        expected.append(reference.get_params(image, [0.08, 1], [3 / 4, 4 / 3]))
    boxes = torch.tensor(boxes).float()
    expected = torch.tensor(expected).float()
    torch.testing.assert_close(boxes.mean(0), expected.mean(0), atol=3, rtol=0)
    torch.testing.assert_close(boxes.std(0), expected.std(0), atol=3, rtol=0)


def test_padded_random_crop_moves_an_image_by_up_to_an_eighth():
    images = torch.randint(1, 256, (3, 3, 32, 32), dtype=torch.uint8)
    rand = torch.tensor([[0.5, 0.5], [0.0, 0.999], [0.999, 0.0]])
    crops = data.padded_random_crop(images, rand)
    assert torch.equal(crops[0], images[0])
    assert torch.equal(crops[1], F.pad(images[1], (-4, 4, 4, -4)))
    assert torch.equal(crops[2], F.pad(images[2], (4, -4, -4, 4)))


# --- Batches.


@pytest.mark.parametrize("num_images", [1, 2, 7, 1000])
def test_epoch_order_is_a_shuffle(num_images):
    order = data.epoch_order(num_images, 0, 5)
    assert order.sort().values.tolist() == list(range(num_images))
    assert torch.equal(order, data.epoch_order(num_images, 0, 5))


def test_epoch_order_differs_by_epoch_and_seed():
    order = data.epoch_order(1000, 0, 5)
    assert not torch.equal(order, data.epoch_order(1000, 0, 6))
    assert not torch.equal(order, data.epoch_order(1000, 1, 5))


def test_repeated_crops_of_an_image_have_different_partners():
    order = data.epoch_order(3000, 0, 5, repeats=3)
    assert len(order) == 3000
    partners = {}
    for a, b in order.view(-1, 2).tolist():
        partners.setdefault(a, []).append(b)
        partners.setdefault(b, []).append(a)
    assert len(partners) == 1000
    for image, others in partners.items():
        assert len(others) == 3 and len({image, *others}) == 4


def test_repeated_augmentation_decodes_an_image_once_for_its_crops(folder, monkeypatch):
    train = data.open_datasets(str(folder)).train
    decoded = []
    decode = data.decode

    def record(path):
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(data, "decode", record)
    loader = make_train_loader(train, batch_size=12, aug_repeats=3)
    (images, targets), _ = loader  # 24 crops
    assert len(decoded) == len(set(decoded)) == 8
    _, rows = images.flatten(1).unique(dim=0, return_inverse=True)
    assert len(rows.unique()) == 12  # the crops of an image differ


@pytest.mark.parametrize("aug_repeats", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(folder, aug_repeats):
    train = data.open_datasets(str(folder)).train
    loaders = [make_train_loader(train, aug_repeats=aug_repeats, workers=w) for w in (0, 2)]
    for epoch in (0, 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        batches = list(loaders[0])
        assert_equal_batches(batches, loaders[1])
        assert len(batches) == len(loaders[0]) == 3
        for images, targets in batches:
            assert images.shape == (8, 3, 96, 96) and images.dtype == torch.uint8
            assert torch.equal(targets == 0, images.float().mean((1, 2, 3)) < 100)


@pytest.mark.parametrize("kind, img_size", [(data.InMemoryLoader, 32), (data.FileLoader, 96)])
def test_resumed_epoch_and_shares_give_the_same_batches(folder, kind, img_size):
    train = data.open_datasets(str(folder)).train
    loader = make_train_loader(train, img_size=img_size, workers=2)
    assert type(loader) is kind
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    resumed = make_train_loader(train, img_size=img_size)
    resumed.set_epoch(0, first_step=2)
    assert_equal_batches(resumed, epochs[0][2:])
    resumed.set_epoch(1)
    assert_equal_batches(resumed, epochs[1])
    shares = [data.process_share(8, rank, 3) for rank in range(3)]  # 2, 2 and 4 images
    parts = [list(make_train_loader(train, share, img_size=img_size)) for share in shares]
    for batches, expected in zip(zip(*parts, strict=True), epochs[0], strict=True):
        images, targets = zip(*batches, strict=True)
        assert [len(t) for t in targets] == [2, 2, 4]
        assert_equal_batches([(torch.cat(images), torch.cat(targets))], [expected])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("img_size", [32, 96])
def test_validation_loaders_yield_each_image_once_in_order(folder, img_size, world_size):
    val = data.open_datasets(str(folder)).val
    expected = torch.stack([data.center_crop(image, img_size) for image, _ in val])
    for rank in range(world_size):
        args = loader_args(img_size=img_size, workers=rank)
        loader = data.make_val_loader(val, args, rank, world_size)
        for _ in range(2):
            images, targets = zip(*data.batches_on_device(loader, "cpu"), strict=True)
            assert torch.equal(torch.cat(images), expected[rank::world_size])
            assert torch.cat(targets).tolist() == ([0] * 12 + [1] * 12)[rank::world_size]


class BrokenDataset(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.imagez[index], 0


def read_all(part, dataset, workers, img_size=96):
    """Read the batches of an epoch. Returns the error, with its traceback, as text."""
    args = loader_args(workers=workers, img_size=img_size)
    try:
        if part == "train":
            list(data.make_train_loader(dataset, args, WHOLE_BATCH))
        else:
            list(data.batches_on_device(data.make_val_loader(dataset, args), "cpu"))
    except (AttributeError, data.UserError) as error:
        report = traceback.format_exc()
        traceback.clear_frames(error.__traceback__)  # ends the loader and its workers
        return report


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_bug_in_a_dataset_keeps_its_traceback(part, workers):
    report = read_all(part, BrokenDataset(), workers)
    error = "AttributeError: 'BrokenDataset' object has no attribute 'imagez'"
    assert report.strip().endswith(error)
    assert "return self.imagez[index], 0" in report and __file__ in report


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "val"])
def test_file_that_is_no_image_is_named(folder, part, workers):
    path = folder / part / "light" / "00.jpg"
    jpeg = path.read_bytes()
    cases = [(b"text", "cannot identify"), (b"", "cannot identify"), (jpeg[:500], "Truncated")]
    for content, reason in cases:
        path.write_bytes(content)
        datasets = data.open_datasets(str(folder))
        for img_size in (32, 96):
            dataset = datasets.train if part == "train" else datasets.val
            report = read_all(part, dataset, workers, img_size)
            assert f"UserError: cannot decode {path}: " in report and reason in report


# --- Augmentation.


def test_rand_augment_operations_equal_torchvisions():
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    x = TF.gaussian_blur(x, 5)  # smooth, so that interpolation differs little
    magnitude = torch.full((1, 1, 1, 1), 0.9)
    fill = [255 * mean for mean in data.MEAN]
    options = {"interpolation": TF.InterpolationMode.BILINEAR, "fill": fill}
    shear = math.degrees(math.atan(0.27))
    translation = -0.45 * 0.9 * 32
    expected = {
        "autocontrast": TF.autocontrast(x),
        "equalize": TF.equalize(x),
        "invert": TF.invert(x),
        "posterize": TF.posterize(x, 1),
        "solarize": TF.solarize(x, 26),
        "solarize_add": torch.where(x < 128, (x.int() + 99).clamp(max=255), x.int()),
        "saturation": TF.adjust_saturation(x, 1.81),
        "contrast": TF.adjust_contrast(x, 1.81),
        "brightness": TF.adjust_brightness(x, 1.81),
        "sharpness": TF.adjust_sharpness(x, 1.81),
        "rotate": TF.rotate(x, 27, **options),
        "shear_x": TF.affine(x, 0, [0, 0], 1.0, [shear, 0], center=[0, 0], **options),
        "shear_y": TF.affine(x, 0, [0, 0], 1.0, [0, shear], center=[0, 0], **options),
        "translate_x": TF.affine(x, 0, [translation, 0], 1.0, [0, 0], **options),
        "translate_y": TF.affine(x, 0, [0, translation], 1.0, [0, 0], **options),
    }
    assert list(data.RAND_AUGMENT) == list(expected)
    for name, apply in data.RAND_AUGMENT.items():
        augmented = apply(x, magnitude, magnitude)
        assert augmented.dtype == torch.uint8
        difference = (augmented.int() - expected[name].int()).abs().float()
        assert difference.median() <= 1 and difference.mean() < 4, name


def test_augmentation_of_a_batch_is_that_of_its_images():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    rand = data.uniform((64, 16), "test")
    augmented = data.augment(images, rand)
    one_by_one = [data.augment(images[i : i + 1], rand[i : i + 1]) for i in range(64)]
    torch.testing.assert_close(augmented, torch.cat(one_by_one))
    changed = (augmented != data.normalize(images)).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    unchanged = data.augment(images, rand, hflip=False, full=False)
    assert torch.equal(unchanged, data.normalize(images))
    flipped = data.augment(images, rand, hflip=True, full=False)
    is_flipped = (flipped != unchanged).flatten(1).any(1)
    assert 16 < is_flipped.sum() < 48
    assert torch.equal(flipped[is_flipped], unchanged[is_flipped].flip(-1))


def test_normalized_images_have_imagenets_statistics():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    expected = TF.normalize(images / 255, data.MEAN, data.STD)
    torch.testing.assert_close(data.normalize(images), expected)


def test_random_erasing_fills_boxes_of_the_right_size_in_a_quarter_of_the_images():
    rand = data.uniform((2000, 7), "test")
    erased = data.random_erase(torch.zeros(2000, 3, 32, 32), rand)
    area = (erased != 0).any(1).float().mean((1, 2))
    assert 0.22 < (area > 0).float().mean() < 0.28
    assert area[area > 0].min() >= 0.015 and area.max() < 0.36
    assert abs(erased[erased != 0].std() - 1) < 0.05


def test_flat_train_and_val_folders_are_not_taken_for_classes(folder):
    for part in ("train", "val"):
        for path in list((folder / part).rglob("*.jpg")):
            path.rename(folder / part / f"{path.parent.name}{path.name}")
        for name in ("dark", "light"):
            (folder / part / name).rmdir()
    with pytest.raises(data.UserError, match="train has no class folders"):
        data.open_datasets(str(folder))


def test_digest_is_of_relative_names_and_sizes(folder, tmp_path):
    digest = data.open_datasets(str(folder)).digest
    moved = folder.rename(tmp_path / "moved")
    for root in (f"{moved}", f"{moved}/", os.path.relpath(moved)):
        assert data.open_datasets(root).digest == digest
    halves = data.open_datasets(f"{moved}/train").digest  # a folder of class folders
    assert halves == data.open_datasets(f"{moved}/train/").digest != digest
    path = moved / "val" / "dark" / "00.jpg"
    path.write_bytes(path.read_bytes() + b"x")
    assert data.open_datasets(str(moved)).digest != digest
    digests = {data.open_datasets("shapes", seed=seed).digest for seed in (0, 1)}
    assert len(digests) == 2


def test_train_and_val_may_be_in_capitals(folder):
    for name in ("train", "val"):
        (folder / name).rename(folder / name.title())
    datasets = data.open_datasets(str(folder))
    assert datasets.classes == ["dark", "light"] and len(datasets.train) == 24


def test_folder_with_validation_images_only_is_opened_for_evaluation(folder):
    shutil.rmtree(folder / "train")
    datasets = data.open_datasets(str(folder))
    assert len(datasets.train) == 0 and len(datasets.val) == 24
    assert datasets.classes == ["dark", "light"]


def test_folder_that_cannot_be_read_is_one_line(folder, monkeypatch):
    (folder / "train" / "dark" / "link.jpg").symlink_to("/nowhere/x.jpg")
    with pytest.raises(data.UserError, match="cannot read .*link.jpg: No such file"):
        data.open_datasets(str(folder))
    scandir = os.scandir

    def refuse(path):  # as for a user without permission
        if str(path).endswith("light"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.UserError, match="cannot read .*light: Permission denied"):
        data.open_datasets(str(folder))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("extension", ["png", "webp", "jpg"])
def test_damaged_exif_leaves_the_pixels_good(tmp_path, extension):
    image = TF.to_pil_image(torch.full((3, 20, 30), 90, dtype=torch.uint8))
    blocks = [b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"]
    for i, block in enumerate(blocks):
        path = tmp_path / f"{i}.{extension}"
        image.save(path, exif=block)
        assert (data.decode(path).float() - 90).abs().max() < 3


def test_pixels_of_32_bits_are_refused(tmp_path):
    for i, pixels in enumerate([np.ones((4, 5), np.float32), np.full((4, 5), 2**30, np.int32)]):
        path = tmp_path / f"{i}.tif"
        Image.fromarray(pixels).save(path)
        with pytest.raises(data.UserError, match=f"cannot decode .*{i}.tif: pixels of 32 bits"):
            data.decode(path)


def test_missing_image_is_one_line(tmp_path):
    with pytest.raises(data.UserError, match="cannot read .*gone.jpg: No such file"):
        data.decode(tmp_path / "gone.jpg")
