"""Datasets and augmentation.

Decoding and cropping are irregular work on single images and run in CPU worker processes. They
end in uint8, a quarter of the bytes of float32. Everything else runs on the device on whole
batches:

    file -> decode -> random resized crop -> uint8 (3, S, S)                 a worker, per image
    uint8 (B, 3, S, S) -> flip -> RandAugment -> normalize -> erase          the device, per batch

Small training images are decoded once and stay on the device. All random numbers come from
generators that are named after their purpose, such as (seed, "crop", epoch, place). In training
they depend on the seed, the step and the sample only: not on the number of workers or processes,
on the device, or on whether the run was resumed.
"""

import atexit
import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import signal
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

MEAN = (0.485, 0.456, 0.406)  # channel statistics of ImageNet, as DeiT and Swin use them
STD = (0.229, 0.224, 0.225)
SMALL_SIZE = 64  # images of up to this side are kept in memory and augmented lightly
MAX_BYTES_IN_MEMORY = 2**31
VAL_BATCH_SIZE = 256
IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm".split())


class UserError(Exception):
    """A flag, a folder or a file of the user's is unusable. `train.py` prints the message as one
    line, without a traceback, and exits with status 2."""


def generator(*name):
    """A random generator that is seeded by its name, such as (seed, "mix", step)."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(shape, *name):
    """Uniform numbers in [0, 1), drawn on the CPU with `generator(*name)`."""
    return torch.rand(shape, generator=generator(*name))


def beta(alpha, n, *name):
    """(n,) numbers from Beta(alpha, alpha), with a generator of that name, on the CPU."""
    # By numpy, because torch's Beta takes no generator. The seed is that of the named generator.
    rng = np.random.default_rng(generator(*name).initial_seed())
    return torch.from_numpy(rng.beta(alpha, alpha, n)).float()


def to_device(x, device):
    """Copy a CPU tensor to the device without waiting for it, which pinned memory allows."""
    if torch.device(device).type == "cuda":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def print0(line):
    """Print a line on the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------
# Datasets. An item is a uint8 image (3, H, W) and the number of its class.


class Datasets(NamedTuple):
    train: Dataset
    val: Dataset
    classes: list  # class names, in the order of their numbers
    hflip: bool = True  # whether a mirrored image still shows its class
    digest: str = ""  # of the images' names and sizes: a run is resumed only if it is the same


def open_datasets(name, root="data", seed=0):
    """The datasets of `--data`: "shapes", the name of a torchvision dataset, or a folder.

    root: where torchvision's datasets are, or are downloaded to. seed: of the generated images.
    Raises UserError if there is no such dataset.
    """
    if name == "shapes":
        train = TensorDataset(*shapes(SHAPES_TRAIN, seed)[:2])
        val = TensorDataset(*shapes(SHAPES_VAL, "val")[:2])
        return Datasets(train, val, SHAPES_CLASSES, hflip=False, digest=f"shapes {seed}")
    if name in TORCHVISION_DATASETS:
        return open_torchvision(name, root)
    try:
        return open_folder(name)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


SHAPES_TRAIN = 8_000  # images
SHAPES_VAL = 2_000
SHAPES_CLASSES = "plain rows columns rising falling checks dots lines bars rings".split()


def shapes(n, seed, size=32):
    """Generated images: one textured object on a cluttered background. The texture is the class;
    colours, position and size are random. The object's mask is known, and so is how much of it a
    mixed image still shows.

    Returns images (n, 3, size, size) uint8, classes (n,) and masks (n, size, size) bool.
    """
    g = generator(seed, "shapes", n, size)

    def rand(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    classes = torch.randint(len(SHAPES_CLASSES), (n,), generator=g)

    # The background: a smooth colour gradient and three boxes.
    images = F.interpolate(rand(3, 4, 4), (size, size), mode="bilinear", align_corners=False)
    for _ in range(3):
        center_y, center_x = rand(2, 1, 1, high=size).unbind(1)
        height, width = rand(2, 1, 1, low=size / 16, high=size / 6).unbind(1)
        box = ((y - center_y).abs() < height) & ((x - center_x).abs() < width)
        images = torch.where(box[:, None], rand(3, 1, 1), images)

    # The object: a disc or a square inside the image, textured in a dark and a light colour.
    radius = rand(1, 1, low=0.25 * size, high=0.375 * size)
    dy = y - radius - rand(1, 1) * (size - 2 * radius)  # (n, size, size), from the object's centre
    dx = x - radius - rand(1, 1) * (size - 2 * radius)
    distance = (dy**2 + dx**2).sqrt()
    square = torch.maximum(dy.abs(), dx.abs()) < 0.85 * radius
    masks = torch.where(rand(1, 1) < 0.5, square, distance < radius)

    def stripes(position):
        return (position / (size / 6) + rand(1, 1)) % 1 < 0.5

    rows = stripes(dy)
    cols = stripes(dx)
    textures = [torch.zeros_like(rows), rows, cols, stripes(dx + dy), stripes(dx - dy)]
    textures += [rows ^ cols, rows & cols, stripes(2 * dy), stripes(2 * dx), stripes(distance)]
    texture = torch.stack(textures, dim=1)[torch.arange(n), classes][:, None]  # (n, 1, size, size)
    dark = rand(3, 1, 1, high=0.4)
    light = rand(3, 1, 1, low=0.6)
    images = torch.where(masks[:, None], torch.where(texture, dark, light), images)
    images += 0.05 * torch.randn(images.shape, generator=g)
    return (images.clamp(0, 1) * 255).to(torch.uint8), classes, masks


# The class in torchvision.datasets, and what selects its training and its validation images.
TORCHVISION_DATASETS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "stanfordcars": ("StanfordCars", {"split": "train"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
}


def open_torchvision(name, root):
    """One of TORCHVISION_DATASETS, downloaded to root if it is not there."""
    class_name, train_split, val_split = TORCHVISION_DATASETS[name]
    make = getattr(torchvision.datasets, class_name)
    options = {"root": root, "transform": v2.Compose([v2.RGB(), v2.PILToTensor()])}
    try:
        try:  # without downloading: torchvision can no longer download all of its datasets
            train = make(**options, **train_split)
            val = make(**options, **val_split)
        except RuntimeError:
            train = make(**options, **train_split, download=True)
            val = make(**options, **val_split, download=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"torchvision cannot open or download {name} in {root}: {error}") from error
    # Older releases of torchvision do not name the classes of Flowers102.
    classes = getattr(train, "classes", range(102))
    return Datasets(train, val, [str(c) for c in classes], hflip=name != "mnist", digest=name)


VAL_FOLDERS = ["val", "valid", "validation", "test"]


def open_folder(root):
    """A folder with train/ and val/ (or another of VAL_FOLDERS), each with a folder of images per
    class; or a folder of class folders, of which about every tenth image is used for validation.
    With val/ alone there are no training images. Hidden files and folders are ignored. Raises
    UserError if there are no such folders, OSError if one cannot be read."""
    if not os.path.isdir(root):
        known = ", ".join(["shapes", *TORCHVISION_DATASETS])
        raise UserError(f"--data {root!r} is no folder, and none of {known}")
    folders = {name.lower(): os.path.join(root, name) for name in find_classes(root)}
    train_root = folders.get("train", "")  # "" if there is none
    val_root = next((folders[name] for name in VAL_FOLDERS if name in folders), "")
    train_classes = find_classes(train_root)
    val_classes = find_classes(val_root)
    has_both = train_root and val_root
    if not has_both and not train_classes and not val_classes:
        return split_folder(root)  # a class itself may be called train or val
    if not val_root:
        raise UserError(f"{root} has train/ but none of {', '.join(VAL_FOLDERS)}")
    if train_root and not train_classes:
        raise UserError(f"{train_root} has no class folders: expected {train_root}/CLASS/")
    unmatched = sorted(set(train_classes) ^ set(val_classes))
    if train_root and unmatched:
        raise UserError(
            f"{train_root} and {val_root} must have the same classes: "
            f"{', '.join(unmatched)} is in only one of them"
        )
    train = find_images(train_root, train_classes)
    val = find_images(val_root, val_classes)
    digest = files_digest(root, train + val)
    return Datasets(ImageFiles(train), ImageFiles(val), val_classes, digest=digest)


def split_folder(root):
    """A folder of class folders. The split depends on the images' names only, so an image stays
    on its side when others are added."""
    classes = find_classes(root)
    if len(classes) < 2:
        raise UserError(f"{root} needs train/CLASS/ and val/CLASS/, or two class folders or more")
    train, val = [], []
    for path, target in find_images(root, classes):
        name = os.fsencode(os.path.relpath(path, root))
        in_val = hashlib.blake2b(name, digest_size=8).digest()[0] % 10 == 0
        (val if in_val else train).append((path, target))
    if not train or not val:
        raise UserError(f"{root} has too few images to split them into train/ and val/")
    print0(f"{root} has no train/ and val/: {len(val)} images, by their names, are for validation")
    digest = files_digest(root, train + val)
    return Datasets(ImageFiles(train), ImageFiles(val), classes, digest=digest)


def find_classes(root):
    """The names of the folders in root, sorted; none if root is no folder."""
    if not os.path.isdir(root):
        return []
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def find_images(root, classes):
    """(path, class number) of every image in the class folders, at any depth."""
    samples = []
    for target, class_name in enumerate(classes):
        class_root = os.path.join(root, class_name)
        num_before = len(samples)
        # Without onerror, a folder that cannot be read would count as empty.
        walk = os.walk(class_root, onerror=raise_error, followlinks=True)
        for folder, subfolders, files in walk:
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for file in sorted(files):
                if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith("."):
                    samples.append((os.path.join(folder, file), target))
        if len(samples) == num_before:
            raise UserError(f"{class_root} has no images ({', '.join(IMAGE_EXTENSIONS)})")
    return samples


def raise_error(error):
    raise error


def files_digest(root, samples):
    """A digest of the files' names, relative to root, and of their sizes; of a large dataset, of
    some ten thousand of the sizes."""
    digest = hashlib.blake2b(digest_size=8)
    step = len(samples) // 10_000 + 1
    for i, (path, _) in enumerate(samples):
        name = path.removeprefix(root).strip("/")  # os.path.relpath takes a minute for ImageNet
        size = os.path.getsize(path) if i % step == 0 else 0
        digest.update(os.fsencode(f"{name} {size}\n"))
    return digest.hexdigest()


class ImageFiles(Dataset):
    """Images that are decoded when they are read. samples: a list of (path, class number)."""

    def __init__(self, samples):
        # Arrays, because a forked worker shares their memory. Reading a list of a million Python
        # objects writes to their reference counts, which copies the list into every worker.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.targets = np.array([target for _, target in samples])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return decode(os.fsdecode(self.paths[index])), int(self.targets[index])


# torchvision's JPEG decoder takes half of Pillow's time. Later releases may not have it.
decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)


def decode(path):
    """The image in a file, uint8 (3, H, W), rotated according to EXIF; the first frame of an
    animation. Raises UserError, with the decoder's reason, if the file is not an image."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    is_jpeg = content[:2].tobytes() == b"\xff\xd8"  # whatever the file's name
    if is_jpeg and decode_jpeg is not None:
        try:
            content = torch.from_numpy(content)
            return decode_jpeg(content, "RGB", apply_exif_orientation=True)
        except RuntimeError:
            pass  # Pillow knows more kinds of JPEG, or has a better reason
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # the exceptions of Pillow's decoders have no common class
        raise UserError(f"cannot decode {path}: {error}") from error
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # others have 16 bits
        raise UserError(
            f"cannot decode {path}: pixels of 32 bits (mode {image.mode}) have no range"
        )
    with contextlib.suppress(Exception):  # a damaged EXIF block beside good pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, of which Pillow's conversion keeps the lower ones
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return TF.pil_to_tensor(image.convert("RGB"))


def median_size(dataset):
    """The median of the shorter side of a few of the dataset's images, in pixels."""
    indices = torch.linspace(0, len(dataset) - 1, 9).long().tolist()
    return sorted(min(dataset[i][0].shape[1:]) for i in indices)[4]


# ------------------------------------------------------------------------------------------------
# Cropping, in the workers.


def random_resized_crop(image, size, rng_name):
    """A crop of 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3, resized to
    (3, size, size) (Szegedy et al. 2015, drawn as in torchvision's transform).

    image: (3, H, W) uint8. rng_name: name of the crop's random generator.
    """
    height, width = image.shape[1:]
    for u in uniform((10, 4), *rng_name).tolist():
        area = height * width * (0.08 + 0.92 * u[0])
        ratio = (4 / 3) ** (2 * u[1] - 1)
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(u[2] * (height - h + 1))
            left = int(u[3] * (width - w + 1))
            return resized_crop(image, top, left, h, w, size)
    # An image of an extreme shape: the largest crop of an allowed aspect ratio, from its centre.
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return resized_crop(image, (height - h) // 2, (width - w) // 2, h, w, size)


def resized_crop(image, top, left, height, width, size):
    """Crop a box, in pixels, and resize it to (3, size, size), bicubic with antialiasing."""
    # Resizing takes half the time if channels come last in memory, as the decoder leaves them.
    box = image[None, :, top : top + height, left : left + width]
    box = box.contiguous(memory_format=torch.channels_last)
    return F.interpolate(box, (size, size), mode="bicubic", antialias=True)[0]


def center_crop(image, size):
    """DeiT's evaluation crop (3, size, size): resize the shorter side to size / 0.875 and crop
    the centre; small images are resized to size."""
    shorter = size if size <= SMALL_SIZE else int(size / 0.875)
    # Images of extreme shapes are cut first: resized as a whole, they may not fit in memory.
    height, width = image.shape[1:]
    longest = 4 * min(height, width)
    image = TF.center_crop(image, [min(height, longest), min(width, longest)])
    return TF.center_crop(TF.resize(image, [shorter], TF.InterpolationMode.BICUBIC), [size, size])


class TrainCrops(Dataset):
    """Random crops, channels last, and their classes. A key is the index of an image and the name
    of the crop's random generator."""

    def __init__(self, dataset, img_size):
        self.dataset = dataset
        self.img_size = img_size
        self.recent = {}  # the last four images: repeated augmentation crops them several times

    def __getitem__(self, key):
        index, rng_name = key
        if index not in self.recent:
            if len(self.recent) == 4:
                del self.recent[next(iter(self.recent))]  # the oldest
            self.recent[index] = self.dataset[index]
        image, target = self.recent[index]
        return random_resized_crop(image, self.img_size, rng_name).movedim(0, -1), target


class ValCrops(Dataset):
    """Evaluation crops, channels last, and their classes."""

    def __init__(self, dataset, img_size):
        self.dataset = dataset
        self.img_size = img_size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        return center_crop(image, self.img_size).movedim(0, -1), target


# ------------------------------------------------------------------------------------------------
# Batches.

# The order of the crops of four images: the neighbours, 0 and 1, 2 and 3, change every time.
REPEAT_ORDER = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2]])


def epoch_order(num_images, seed, epoch, repeats=1):
    """The image at each of the num_images places of an epoch, a shuffle.

    With repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335) an epoch takes num_images /
    repeats of the images, and crops each of them several times: a b c d, a c b d, a d b c. The
    crops of an image are near each other, so that it is decoded once, and have different
    neighbours, with which they are mixed.
    """
    place = torch.arange(num_images)
    group = place // (4 * repeats)  # of four images
    repeat = place % (4 * repeats) // 4  # how often the group was cropped before
    image = 4 * group + REPEAT_ORDER[repeat % len(REPEAT_ORDER), place % 4]
    return torch.randperm(num_images, generator=generator(seed, "order", epoch))[image]


def process_share(batch_size, rank, world_size):
    """The slice of every batch that a process trains on. Batches are cut between pairs, because
    neighbours are mixed."""
    pairs = batch_size // 2
    return slice(2 * (pairs * rank // world_size), 2 * (pairs * (rank + 1) // world_size))


class TrainSampler(Sampler):
    """The keys for `TrainCrops` of a process's share of every batch of an epoch. Images that do
    not fill a batch are left out."""

    def __init__(self, num_images, args, share):
        self.num_images = num_images
        self.args = args
        self.share = share
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self):
        return self.num_images // self.args.batch_size

    def __iter__(self):
        args = self.args
        order = epoch_order(self.num_images, args.seed, self.epoch, args.aug_repeats).tolist()
        for step in range(self.first_step, len(self)):
            places = range(step * args.batch_size, (step + 1) * args.batch_size)[self.share]
            yield [(order[place], (args.seed, "crop", self.epoch, place)) for place in places]


class FileLoader:
    """Training batches of images that worker processes decode and crop.

    args: img_size, batch_size, aug_repeats, seed, workers and device are used. share: the slice
    of each batch that this process trains on. Iterating gives (images, targets), uint8 (b, 3, S,
    S) and (b,), on the device. Raises UserError for an image that cannot be decoded.
    """

    def __init__(self, dataset, args, share):
        self.sampler = TrainSampler(len(dataset), args, share)
        crops = TrainCrops(dataset, args.img_size)
        self.loader = make_data_loader(crops, args, batch_sampler=self.sampler)
        self.device = args.device

    def set_epoch(self, epoch, first_step=0):
        """Choose the epoch that the next iteration gives, from a step on."""
        self.sampler.set_epoch(epoch, first_step)

    def __len__(self):
        """Steps per epoch."""
        return len(self.sampler)

    def __iter__(self):
        return batches_on_device(self.loader, self.device)


class InMemoryLoader:
    """Training batches of small images that are decoded once and stay on the device. They are
    padded by an eighth of their size and cropped at random (He et al. 2016). Used like
    `FileLoader`."""

    def __init__(self, dataset, args, share):
        loader = make_data_loader(ValCrops(dataset, args.img_size), args, VAL_BATCH_SIZE)
        images, targets = zip(*batches_on_device(loader, args.device), strict=True)
        self.images = torch.cat(images)
        self.targets = torch.cat(targets)
        self.args = args
        self.share = share
        self.set_epoch(0)

    def set_epoch(self, epoch, first_step=0):
        self.epoch = epoch
        self.first_step = first_step

    def __len__(self):
        return len(self.images) // self.args.batch_size

    def __iter__(self):
        args = self.args
        order = epoch_order(len(self.images), args.seed, self.epoch, args.aug_repeats)
        order = to_device(order, args.device)
        for step in range(self.first_step, len(self)):
            index = order[step * args.batch_size : (step + 1) * args.batch_size][self.share]
            rand = uniform((args.batch_size, 2), args.seed, "crop", self.epoch, step)[self.share]
            rand = to_device(rand, args.device)
            yield padded_random_crop(self.images[index], rand), self.targets[index]


def padded_random_crop(images, rand):
    """Pad images by an eighth of their size and crop them back. images: (B, 3, S, S).
    rand: (B, 2), uniform, the row and the column of the crop. Returns (B, 3, S, S)."""
    size = images.shape[-1]
    pad = size // 8
    padded = F.pad(images, (pad, pad, pad, pad)).movedim(1, -1)
    corner = (rand * (2 * pad + 1)).long()
    rows = corner[:, 0, None] + torch.arange(size, device=images.device)  # (B, S)
    cols = corner[:, 1, None] + torch.arange(size, device=images.device)
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    crops = padded[sample, rows[:, :, None], cols[:, None, :]]  # (B, S, S, 3)
    return crops.movedim(-1, 1).contiguous()


def make_train_loader(dataset, args, share):
    """An `InMemoryLoader` for small images, else a `FileLoader`; arguments as there."""
    if fits_in_memory(dataset, args.img_size):
        return InMemoryLoader(dataset, args, share)
    return FileLoader(dataset, args, share)


def fits_in_memory(dataset, img_size):
    return img_size <= SMALL_SIZE and 3 * img_size**2 * len(dataset) <= MAX_BYTES_IN_MEMORY


def make_val_loader(dataset, args, rank=0, world_size=1):
    """Batches of evaluation crops for `batches_on_device`: every world_size-th image from the
    rank-th on, so that each image is evaluated by one process. Small images are kept."""
    crops = Subset(ValCrops(dataset, args.img_size), range(rank, len(dataset), world_size))
    loader = make_data_loader(crops, args, VAL_BATCH_SIZE)
    return list(loader) if fits_in_memory(dataset, args.img_size) else loader


def make_data_loader(dataset, args, batch_size=1, batch_sampler=None):
    return DataLoader(
        dataset,
        batch_size,
        batch_sampler=batch_sampler,
        num_workers=args.workers,
        pin_memory=torch.device(args.device).type == "cuda",
        persistent_workers=args.workers > 0,
        worker_init_fn=ignore_signals,
    )


def batches_on_device(loader, device):
    """The batches (images, targets) of a loader on the device. Until here crops have their
    channels last, as resizing leaves them: transposing whole batches is faster."""
    for images, targets in loader:
        images = images.to(device, non_blocking=True).movedim(-1, 1).contiguous()
        yield images, targets.to(device, non_blocking=True)


def ignore_signals(worker_id):
    """Signals to a whole process group, such as Ctrl-C, are for the training script, which needs
    its workers until it has saved a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """At exit multiprocessing would end daemons by SIGTERM, which workers ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports killed workers
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


# ------------------------------------------------------------------------------------------------
# Augmentation of whole batches, on the device.


def augment(images, rand, hflip=True, full=True):
    """From uint8 crops (B, 3, S, S) to the model's input, float32 of the same shape.

    rand: (B, 16), uniform in [0, 1), on the CPU. Column 0 is for the flip, 1 to 4 and 5 to 8 are
        for the two operations of RandAugment, and 9 to 15 for erasing. They select images on the
        CPU, because the device would have to be waited for to learn how many are selected.
    hflip: mirror half of the images. full: also apply RandAugment and random erasing.
    """
    if hflip:
        mirrored = to_device(rand[:, 0] < 0.5, images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if full:
        images = rand_augment_operation(images, rand[:, 1:5])
        images = rand_augment_operation(images, rand[:, 5:9])
    images = normalize(images)
    if full:
        images = random_erase(images, rand[:, 9:])
    return images


@functools.cache
def channel_statistics(device):
    """MEAN and STD on the device, (3, 1, 1) each; cached, because a copy would wait for it."""
    return torch.tensor([MEAN, STD], device=device).view(2, 3, 1, 1).unbind(0)


def normalize(images):
    """uint8 (B, 3, S, S) to float32, normalized by ImageNet's statistics."""
    mean, std = channel_statistics(images.device)
    return (images.float() / 255 - mean) / std


def rand_augment_operation(images, rand):
    """One of the two operations per image of RandAugment (Cubuk et al. 2020, arXiv 1909.13719),
    as in timm's "rand-m9-mstd0.5-inc1": applied to half of the images, with magnitude 9 of 10 and
    a standard deviation of 0.5.

    images: (B, 3, S, S) uint8. rand: (B, 4), uniform, on the CPU. Returns uint8.
    """
    num_operations = len(RAND_AUGMENT)
    operation = (rand[:, 0] * num_operations).long()
    operation[rand[:, 1] < 0.5] = num_operations  # none
    magnitude = (0.9 + 0.05 * torch.special.ndtri(rand[:, 2])).clamp(0, 1)
    signed = torch.where(rand[:, 3] < 0.5, magnitude, -magnitude)

    counts = operation.bincount(minlength=num_operations + 1).tolist()
    groups = to_device(operation.argsort(stable=True), images.device).split(counts)
    magnitude = to_device(magnitude.view(-1, 1, 1, 1), images.device)
    signed = to_device(signed.view(-1, 1, 1, 1), images.device)
    images = images.clone()
    for apply, group in zip(RAND_AUGMENT.values(), groups[:-1], strict=True):
        if len(group):
            images[group] = apply(images[group], magnitude[group], signed[group])
    return images


# The operations by name. x: images (B, 3, S, S) uint8. m: their magnitudes, from 0 to 1, (B, 1,
# 1, 1). s: the magnitudes with a random sign.
RAND_AUGMENT = {
    "autocontrast": lambda x, m, s: TF.autocontrast(x),
    "equalize": lambda x, m, s: TF.equalize(x),
    "invert": lambda x, m, s: 255 - x,
    "posterize": lambda x, m, s: x & (256 - 2 ** (4 + (4 * m).long())).to(torch.uint8),
    "solarize": lambda x, m, s: torch.where(x >= 256 - (256 * m).long(), 255 - x, x),
    "solarize_add": lambda x, m, s: torch.where(x < 128, brighten(x, 110 * m), x),
    "saturation": lambda x, m, s: blend(TF.adjust_saturation(x, 0), x, s),
    "contrast": lambda x, m, s: blend(TF.adjust_contrast(x, 0), x, s),
    "brightness": lambda x, m, s: blend(torch.zeros_like(x), x, s),
    "sharpness": lambda x, m, s: blend(smooth(x), x, s),
    "rotate": lambda x, m, s: rotate(x, s * math.pi / 6),
    "shear_x": lambda x, m, s: warp(x, xy=0.3 * s, dx=0.3 * s),  # around the upper left corner
    "shear_y": lambda x, m, s: warp(x, yx=0.3 * s, dy=0.3 * s),
    "translate_x": lambda x, m, s: warp(x, dx=0.9 * s),  # by up to 45 % of the width
    "translate_y": lambda x, m, s: warp(x, dy=0.9 * s),
}


def brighten(images, amount):
    return (images + amount.long()).clamp(max=255).to(torch.uint8)


def blend(start, images, signed):
    """Pillow's ImageEnhance: a strength of 0 gives `start`, 1 the image, and 2 exaggerates."""
    blended = torch.lerp(start.float(), images.float(), 1 + 0.9 * signed)
    return blended.round().clamp(0, 255).to(torch.uint8)


def smooth(images):
    """Pillow's smoothing filter: weights of 1 around a centre of 5; the border stays as it is."""
    inner = images[..., 1:-1, 1:-1]
    change = (F.avg_pool2d(images.float(), 3, stride=1) - inner) * 9 / 13
    return images + F.pad(change, (1, 1, 1, 1))


def rotate(images, angle):
    return warp(images, xx=angle.cos(), xy=-angle.sin(), yx=angle.sin(), yy=angle.cos())


def warp(images, xx=1.0, xy=0.0, dx=0.0, yx=0.0, yy=1.0, dy=0.0):
    """Read every pixel (x, y) at (xx x + xy y + dx, yx x + yy y + dy), bilinear; outside is
    ImageNet's mean colour. Coordinates are relative to the centre, in units of half the image.
    Each coefficient is a number or (B, 1, 1, 1)."""
    matrix = torch.empty(len(images), 6, device=images.device)
    for column, coefficient in enumerate([xx, xy, dx, yx, yy, dy]):
        if torch.is_tensor(coefficient):
            coefficient = coefficient.flatten()
        matrix[:, column] = coefficient
    grid = F.affine_grid(matrix.view(-1, 2, 3), images.shape, align_corners=False)
    fill = 255 * channel_statistics(images.device)[0]
    warped = F.grid_sample(images.float() - fill, grid, align_corners=False) + fill
    return warped.round().clamp(0, 255).to(torch.uint8)


def random_erase(images, rand):
    """Fill a box with noise in a quarter of the images (Zhong et al. 2020, arXiv 1708.04896), as
    DeiT does: 2 to 33 % of the area, aspect ratio 0.3 to 3.3. DeiT draws new normal noise for
    every image; here one pattern is rolled by a random offset, so that it is the same on every
    device.

    images: (B, 3, S, S), normalized. rand: (B, 7), uniform, on the CPU.
    """
    size = images.shape[-1]
    erased = (rand[:, 0] < 0.25).nonzero().flatten()
    rand = rand[erased]
    area = 0.02 + rand[:, 1] * (1 / 3 - 0.02)
    ratio = 0.3 ** (2 * rand[:, 2] - 1)
    sides = torch.stack([area * ratio, area / ratio], dim=1).sqrt()  # (n, 2): height and width
    sides = (sides * size).round().clamp(max=size - 1)
    start = (rand[:, 3:5] * (size - sides + 1)).floor()
    position = torch.arange(size)
    inside = (position >= start[..., None]) & (position < (start + sides)[..., None])  # (n, 2, S)
    inside = to_device(inside, images.device)
    box = inside[:, None, 0, :, None] & inside[:, None, 1, None, :]  # (n, 1, S, S)

    offset = (rand[:, 5:7] * size).long()
    rolled = to_device((offset[..., None] + position) % size, images.device)  # (n, 2, S)
    noise = erasing_noise(size, images.device)
    noise = noise[:, rolled[:, 0, :, None], rolled[:, 1, None, :]].movedim(0, 1)  # (n, 3, S, S)

    erased = to_device(erased, images.device)
    images = images.clone()
    images[erased] = torch.where(box, noise, images[erased])
    return images


@functools.cache
def erasing_noise(size, device):
    """Normal noise (3, size, size), drawn on the CPU, so that it is the same on every device."""
    return torch.randn(3, size, size, generator=generator("erase")).to(device)
