"""Images for training: where they come from, and the two halves of augmentation.

Decoding and cropping are irregular, an image at a time, and run on CPU workers; they end in uint8, a
quarter of the bytes to move. Everything else is regular and runs on the device over the whole batch:

    a file -> decode -> random resized crop -> uint8 (3, S, S)                a worker, per image
    uint8 (B, 3, S, S) -> flip -> RandAugment -> normalise -> erase           the device, per batch

Sets of small images skip the first line: they are decoded once and live on the device whole, where a
padded random crop stands in for the resized one.

Every random number is drawn from a generator named by what it is for, so it depends on the seed, the
step and the sample alone: not on workers or processes, not on the device, not on where a run was resumed.
"""

import difflib
import functools
import hashlib
import itertools
import math
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DeiT and Swin use
SMALL = 64  # images up to this many pixels a side are small: held whole, augmented lightly
PART = 96  # images that a worker brings at a time: several workers then fill one batch


class InputError(ValueError):
    """What the user gave can't be used. The message is one line: what is wrong, what would be right."""


def generator(*name):
    """A random generator of its own for each name, such as (seed, "mix", step)."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(shape, *name):
    """Uniform numbers in [0, 1) from `generator(*name)`, on the CPU: the same for every device."""
    return torch.rand(shape, generator=generator(*name))


def bring(x, device):
    """A copy of a CPU tensor on the device, which is not waited for: pinned memory allows that."""
    if torch.device(device).type == "cuda":
        x = x.contiguous().pin_memory()  # strided, it would be copied into memory that is not pinned
    return x.to(device, non_blocking=True)


def did_you_mean(word, words):
    near = difflib.get_close_matches(word, words)
    return f", did you mean {' or '.join(near)}?" if near else ""


# ---------------------------------------------------------------------------------------------------
# Sets: anything whose [i] is a uint8 image (3, H, W) and the number of its class.


@dataclass
class Sets:
    train: Dataset
    val: Dataset
    classes: list  # names, by number
    flip: bool = True  # whether a mirrored image still shows its class


SHAPES_TRAIN, SHAPES_VAL = 8_000, 2_000
SHAPES = ["plain", "rows", "columns", "rising", "falling", "checks", "dots", "lines", "bars", "rings"]


def shapes(n, seed, size=32):
    """Scenes drawn from the seed alone: one textured object on a cluttered ground.

    The object's kind is its class; its colours, place and size are chance, and so is the ground. The
    mask of the object is known, so it is known as well how much of it a CutMix image still shows.

    Returns images (n, 3, size, size) uint8, classes (n,) and masks (n, size, size) bool.
    """
    g = generator(seed, "shapes", n, size)

    def rand(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    classes = torch.randint(len(SHAPES), (n,), generator=g)

    # The ground: a soft wash of colour and flat boxes.
    images = F.interpolate(rand(3, 4, 4), (size, size), mode="bilinear", align_corners=False)
    for _ in range(3):
        cy, cx = rand(2, 1, 1, high=size).unbind(1)
        h, w = rand(2, 1, 1, low=size / 16, high=size / 6).unbind(1)
        box = ((y - cy).abs() < h) & ((x - cx).abs() < w)  # (n, size, size)
        images = torch.where(box[:, None], rand(3, 1, 1), images)

    # The object: a disc or a square wholly inside the image, textured in two colours that differ.
    radius = rand(1, 1, low=0.25 * size, high=0.375 * size)
    dy, dx = (p - radius - rand(1, 1) * (size - 2 * radius) for p in (y, x))
    distance = (dy**2 + dx**2).sqrt()
    square = torch.maximum(dy.abs(), dx.abs()) < 0.85 * radius
    masks = torch.where(rand(1, 1) < 0.5, square, distance < radius)
    period = size / 6

    def wave(t):
        return (t / period + rand(1, 1)) % 1 < 0.5

    rows, cols = wave(dy), wave(dx)
    textures = [torch.zeros_like(rows), rows, cols, wave(dx + dy), wave(dx - dy), rows ^ cols, rows & cols]
    textures += [wave(2 * dy), wave(2 * dx), wave(distance)]  # in the order of SHAPES
    texture = torch.stack(textures, dim=1)[torch.arange(n), classes][:, None]  # (n, 1, size, size)
    dark, light = rand(3, 1, 1, high=0.4), rand(3, 1, 1, low=0.6)
    images = torch.where(masks[:, None], torch.where(texture, dark, light), images)

    images = images + 0.05 * torch.randn(images.shape, generator=g)
    return (images.clamp(0, 1) * 255).to(torch.uint8), classes, masks


# torchvision's sets: how many classes, what selects the part to train on and the part to validate on
# (`train=` takes a bool, `split=` a word), and whether a mirrored image still shows its class.
TORCHVISION = {
    "CIFAR10": (10, True, False, True),
    "CIFAR100": (100, True, False, True),
    "MNIST": (10, True, False, False),
    "KMNIST": (10, True, False, False),
    "USPS": (10, True, False, False),
    "FashionMNIST": (10, True, False, True),
    "SVHN": (10, "train", "test", False),
    "STL10": (10, "train", "test", True),
    "GTSRB": (43, "train", "test", False),
    "DTD": (47, "train", "test", True),
    "Imagenette": (10, "train", "val", True),
    "Flowers102": (102, "train", "test", True),
    "Food101": (101, "train", "test", True),
    "FGVCAircraft": (100, "trainval", "test", True),
    "OxfordIIITPet": (37, "trainval", "test", True),
    "StanfordCars": (196, "train", "test", True),
}
NAMES = {name.lower(): name for name in TORCHVISION}


def open_sets(name, root="data", seed=0):
    """The sets that `--data` names: "shapes", one of `NAMES` (downloaded to `root` if it is not
    there), or a folder with train/ and val/, each with a folder of images a class.

    Returns Sets. Raises InputError for what is unknown, missing or doesn't fit together.
    """
    if name == "shapes":
        train, val = (shapes(n, s) for n, s in ((SHAPES_TRAIN, seed), (SHAPES_VAL, "val")))
        return Sets(TensorDataset(*train[:2]), TensorDataset(*val[:2]), SHAPES, flip=False)
    if name in NAMES:
        count, *parts, flip = TORCHVISION[NAMES[name]]
        make = functools.partial(getattr(torchvision.datasets, NAMES[name]), root, transform=to_rgb)
        key = "train" if parts[0] is True else "split"
        try:
            try:  # what is there already; torchvision can no longer fetch all of its sets
                train, val = (make(**{key: part}) for part in parts)
            except (OSError, RuntimeError):  # OSError: USPS's way to say that it is not there
                train, val = (make(**{key: part}, download=True) for part in parts)
        except ImportError as e:
            raise InputError(f"torchvision reads {name} with another package: {e}; install it first") from e
        except (OSError, RuntimeError, ValueError) as e:
            reason = str(e).split("\n")[0]
            raise InputError(f"{name} is not in {root}/ and could not be fetched: {reason}") from e
        return Sets(train, val, list(getattr(train, "classes", range(count))), flip)
    return open_folder(Path(name))


def open_folder(path):
    if not path.is_dir():
        sets = ["shapes", *NAMES]
        hint = did_you_mean(str(path).lower(), sets) or f"; sets: {', '.join(sets)}"
        raise InputError(f"no folder or set is called {str(path)!r}{hint}")
    parts = path / "train", path / "val"
    for part in parts:
        if not part.is_dir():
            needed = "train/ and val/, with a folder for each class"
            raise InputError(f"{path} has no folder {part.name}/; it needs {needed}")
    try:
        train, val = (torchvision.datasets.ImageFolder(part, loader=decode) for part in parts)
    except FileNotFoundError as e:  # a class without images, or no class
        raise InputError(str(e).split(" Supported")[0]) from e
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        part, other = ("train", "val") if odd[0] in train.classes else ("val", "train")
        raise InputError(
            f"{path}/{part} has a class {odd[0]!r} that {other}/ lacks ({len(odd)} differ); "
            "both must hold the same folders"
        )
    return Sets(train, val, train.classes)


def decode(path):
    """A file's image as uint8 (3, H, W), whatever its extension says: JPEG (grayscale and CMYK too),
    PNG, WebP or GIF, turned as its EXIF tag says. Raises RuntimeError where it can't be read."""
    image = torchvision.io.decode_image(path, mode="RGB", apply_exif_orientation=True)
    image = TF.to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits a channel
    return image[0] if image.dim() == 4 else image  # the first frame of an animation


def to_rgb(image):
    return TF.pil_to_tensor(image.convert("RGB"))


def native_size(dataset):
    """The side of the images in pixels if they are all small, else 224: eight are looked at."""
    look = Crops(dataset, 224)
    side = max(max(look.read(i * (len(dataset) - 1) // 7)[0].shape) for i in range(8))
    return side if side <= SMALL else 224


# ---------------------------------------------------------------------------------------------------
# The workers' half: decode and crop.


def random_resized_crop(image, size, g):
    """A box of 8 to 100 % of the image and 3/4 to 4/3 in shape, resized to (3, size, size)
    (Szegedy et al. 2015, as torchvision's transform of that name draws it)."""
    height, width = image.shape[-2:]
    for area, shape, top, left in torch.rand(10, 4, generator=g).tolist():
        area, ratio = height * width * (0.08 + 0.92 * area), (4 / 3) ** (2 * shape - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
            break
    else:  # a very long image: the largest box of an allowed shape, from its middle
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    # Of boxes whose channels are last in memory, as decoding leaves them, resizing takes half the time.
    box = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    return F.interpolate(box, (size, size), mode="bicubic", antialias=True)[0]


def center_crop(image, size):
    """DeiT's evaluation crop: the shorter side to size / 0.875, bicubic, and the middle of that.
    Of a small image the shorter side is kept whole, at size."""
    short = size if size <= SMALL else int(size / 0.875)
    image = TF.resize(image, [short], TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, [size, size])


class Crops(Dataset):
    """What a worker runs. A key is (index, names): an image's number, and a generator's name for each
    crop wanted of it, none for the evaluation crop. An item is crops, class, names and what failed to
    decode."""

    def __init__(self, dataset, size):
        self.dataset, self.size = dataset, size

    def __getitem__(self, key):
        return self.__getitems__([key])[0]

    def __getitems__(self, keys):
        """The items of a list of keys. Eight images are decoded, then these eight are cropped: a core is
        faster when it does one kind of work for a while."""
        items = []
        for start in range(0, len(keys), 8):
            some = keys[start : start + 8]
            decoded = [self.read(index) for index, _ in some]
            for (_, names), (image, target, bad) in zip(some, decoded):
                crops = [random_resized_crop(image, self.size, generator(*name)) for name in names]
                items.append((crops or [center_crop(image, self.size)], int(target), names, bad))
        return items

    def read(self, index):
        """The image, or the next one that can be read, its class and the names of those that failed; black
        where more than one in a hundred do, which ends the run (see `Stream`)."""
        n, bad = len(self.dataset), []
        for i in range(index, index + n // 100 + 2):
            try:
                return *self.dataset[i % n], bad
            except (RuntimeError, OSError, ValueError):
                samples = getattr(self.dataset, "samples", None)
                bad.append(str(samples[i % n][0]) if samples else f"image {i % n}")
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, bad


def collate(items):
    """A batch of crops in the order of their places, whichever images they share, with their classes and
    what failed to decode. Evaluation crops stay as they come. In memory channels are last, as in a crop:
    to put them first costs less on the device."""
    placed = [
        (names[i][-1] if names else 0, crop, target)
        for crops, target, names, _ in items
        for i, crop in enumerate(crops)
    ]
    placed.sort(key=lambda entry: entry[0])
    _, images, targets = zip(*placed)
    images = torch.stack([crop.movedim(0, -1) for crop in images]).movedim(-1, 1)
    return images, torch.tensor(targets), [name for item in items for name in item[3]]


def epoch_order(n, seed, epoch, repeats=1):
    """Which image stands at each of the n places of an epoch.

    With repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335) an epoch takes n / repeats of
    the images, each `repeats` times at near places, so that one decode serves all its crops: a b a b
    a b, c d c d c d. Neighbours, which mixing pairs, are always different images.
    """
    place = torch.arange(n)
    image = place // (2 * repeats) * 2 + place % 2
    return torch.randperm(n, generator=generator(seed, "order", epoch))[image]


class Stream:
    """Batches of a set that is read from files: workers decode and crop, ahead of the device.

    batch_size: images a step, of all processes together. rows: which of them are this process's, from
    and to. repeats: crops of an image in an epoch. Images that can't be decoded are named, replaced by
    the next and counted in `bad`; InputError is raised when they are more than one in a hundred."""

    def __init__(self, dataset, size, batch_size, rows=None, seed=0, device="cpu", workers=0, repeats=1):
        self.dataset, self.size, self.batch_size, self.seed = dataset, size, batch_size, seed
        self.first, self.end = rows or (0, batch_size)
        self.device, self.workers, self.repeats = torch.device(device), workers, repeats
        self.steps = len(dataset) // batch_size  # an epoch's; what doesn't fill a batch is left out
        self.bad = set()

    def epoch(self, epoch, skip=0):
        """Training batches from step `skip` on: (rows, 3, size, size) uint8 and (rows,), on the device."""
        parts = self._load(self._keys(epoch, skip))
        for _ in range(skip, self.steps):
            images, targets = zip(*itertools.islice(parts, math.ceil((self.end - self.first) / PART)))
            yield torch.cat(images), torch.cat(targets)

    def whole(self, first=0, every=1):
        """Each image once, in order, as batches of evaluation crops; or every n-th from the first."""
        keys = [(i, ()) for i in range(first, len(self.dataset), every)]
        return self._load(keys[i : i + PART] for i in range(0, len(keys), PART))

    def _keys(self, epoch, skip):
        order = epoch_order(len(self.dataset), self.seed, epoch, self.repeats).tolist()
        for start in range(skip * self.batch_size, self.steps * self.batch_size, self.batch_size):
            rows = range(start + self.first, start + self.end)
            for part in (rows[i : i + PART] for i in range(0, len(rows), PART)):
                crops = {}  # of each image, the generator's name for each place it stands at
                for place in part:
                    crops.setdefault(order[place], []).append((self.seed, "crop", epoch, place))
                yield list(crops.items())

    def _load(self, parts):
        loader = DataLoader(
            Crops(self.dataset, self.size),
            batch_sampler=parts,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals,
        )
        for images, targets, bad in loader:
            self._report(bad)
            images = images.to(self.device, non_blocking=True).contiguous()  # channels first again
            yield images, targets.to(self.device, non_blocking=True)

    def _report(self, bad):
        for name in sorted(set(bad) - self.bad):
            print(f"cannot decode {name}: the next image takes its place", flush=True)
        self.bad.update(bad)
        if len(self.bad) > len(self.dataset) / 100:
            raise InputError(
                f"{len(self.bad)} of {len(self.dataset)} images cannot be decoded, more than "
                f"one in a hundred; one is {min(self.bad)}"
            )


def leave_signals(worker):
    """A signal to the whole group of processes is for the training script to answer, not a worker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Memory:
    """The same batches of a set of small images, which is decoded once and held on the device.
    A padded random crop (He et al. 2016) takes the place of the resized one."""

    def __init__(self, stream):
        self.stream, self.steps, self.bad = stream, stream.steps, stream.bad
        images, targets = zip(*stream.whole())
        self.images, self.targets = torch.cat(images), torch.cat(targets)

    def epoch(self, epoch, skip=0):
        s, n = self.stream, self.stream.batch_size
        order = epoch_order(len(self.images), s.seed, epoch).to(s.device)
        pad = s.size // 8
        padded = F.pad(self.images, (pad, pad, pad, pad))
        at = torch.arange(s.size, device=s.device)
        for step in range(skip, self.steps):
            i = order[step * n + s.first : step * n + s.end]
            corner = uniform((n, 2), s.seed, "crop", epoch, step)[s.first : s.end] * (2 * pad + 1)
            rows, cols = (bring(corner, s.device).long()[:, :, None] + at).unbind(1)  # (rows, size)
            images = padded[i[:, None, None], :, rows[:, :, None], cols[:, None, :]]
            yield images.permute(0, 3, 1, 2), self.targets[i]

    def whole(self, first=0, every=1):
        return zip(self.images[first::every].split(1000), self.targets[first::every].split(1000))


def fits_memory(n, size):
    """Whether n images of this side in pixels are held on the device: small ones, of 2 GiB at most."""
    return size <= SMALL and n * 3 * size**2 <= 2**31


def load(dataset, size, *args, **kwargs):
    """A set's batches, as `Stream` or as `Memory`: whichever fits. Arguments as for `Stream`."""
    stream = Stream(dataset, size, *args, **kwargs)
    return Memory(stream) if fits_memory(len(dataset), size) else stream


# ---------------------------------------------------------------------------------------------------
# The device's half: whole batches, grouped by operation.


def augment(images, rand, flip=True, full=True):
    """From uint8 crops to the model's input.

    images: (B, 3, S, S) uint8. rand: (B, 16), uniform, on the CPU: the sizes of the groups are counted
    there, so that the device, which gets the same numbers, need not be waited for. flip: mirror half
    of the images. full: RandAugment and erasing too. Returns (B, 3, S, S) float, normalised.
    """
    r = bring(rand, images.device)
    if flip:
        images = torch.where(r[:, 0].view(-1, 1, 1, 1) < 0.5, images.flip(-1), images)
    if full:
        for k in (slice(1, 5), slice(5, 9)):
            counts = operation(rand[:, k]).bincount(minlength=len(RAND_AUGMENT) + 1)
            images = rand_augment(images, r[:, k], counts.tolist())
    images = normalize(images)
    return random_erase(images, r[:, 9:], int((rand[:, 9] < ERASED).sum())) if full else images


@functools.cache
def channels(device):
    """MEAN and STD as (2, 3, 1, 1), brought to the device once: a copy a step would wait for it."""
    return torch.tensor([MEAN, STD]).view(2, 3, 1, 1).to(device)


@functools.cache
def noise_field(side, device):
    """One field of normal noise (3, side, side) that erasing rolls by chance for each image: a draw a
    pixel would depend on the device."""
    return torch.randn(3, side, side, generator=generator("erase")).to(device)


def normalize(images):
    """uint8 (B, 3, S, S) to floats of mean 0 and deviation 1, by the channel statistics of ImageNet."""
    mean, std = channels(images.device)
    return (images.float() / 255 - mean) / std


def blend(images, other, strength):
    """PIL's ImageEnhance: strength 0 is `other`, 1 the image, more than 1 overshoots."""
    return torch.lerp(other.float(), images.float(), strength).round().clamp(0, 255).to(torch.uint8)


def smooth(images):
    """PIL's smoothing filter: each pixel five times and its eight neighbours once; the border stays."""
    inner = images[..., 1:-1, 1:-1].float()
    images = images.clone()
    images[..., 1:-1, 1:-1] = ((9 * F.avg_pool2d(images.float(), 3, 1) + 4 * inner) / 13).round()
    return images


def warp(images, s, a, b, tx, c, d, ty):
    """Read each pixel (x, y) at (a x + b y + tx, c x + d y + ty), in units of half the image from its
    centre, bilinear; outside lies the mean colour. Each number is (B, 1, 1, 1), as s is, or plain."""
    numbers = (n if torch.is_tensor(n) else torch.full_like(s, n) for n in (a, b, tx, c, d, ty))
    matrix = torch.stack([*numbers], dim=-1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    fill = channels(images.device)[0] * 255
    warped = F.grid_sample(images.float() - fill, grid, align_corners=False) + fill
    return warped.round().clamp(0, 255).to(torch.uint8)


# The fifteen operations of RandAugment in their increasing form, as timm's "rand-m9-mstd0.5-inc1" has
# them. x: (B, 3, S, S) uint8; m: how much, from 0 to 1, (B, 1, 1, 1); s: m with a random sign.
RAND_AUGMENT = [
    lambda x, m, s: TF.autocontrast(x),
    lambda x, m, s: TF.equalize(x),
    lambda x, m, s: TF.invert(x),
    lambda x, m, s: x & (256 - 2 ** (4 + (4 * m).long())).to(torch.uint8),  # posterize
    lambda x, m, s: torch.where(x >= 256 - (256 * m).long(), 255 - x, x),  # solarize
    lambda x, m, s: torch.where(x < 128, (x + (110 * m).long()).clamp(max=255).to(torch.uint8), x),
    lambda x, m, s: blend(x, TF.adjust_saturation(x, 0), 1 + 0.9 * s),
    lambda x, m, s: blend(x, TF.adjust_contrast(x, 0), 1 + 0.9 * s),
    lambda x, m, s: blend(x, torch.zeros_like(x), 1 + 0.9 * s),  # brightness
    lambda x, m, s: blend(x, smooth(x), 1 + 0.9 * s),  # sharpness
    lambda x, m, s: warp(x, s, (r := s * math.pi / 6).cos(), -r.sin(), 0, r.sin(), r.cos(), 0),
    lambda x, m, s: warp(x, s, 1, 0.3 * s, 0.3 * s, 0, 1, 0),  # shear along x
    lambda x, m, s: warp(x, s, 1, 0, 0, 0.3 * s, 1, 0.3 * s),  # shear along y
    lambda x, m, s: warp(x, s, 1, 0, 0.9 * s, 0, 1, 0),  # shift along x
    lambda x, m, s: warp(x, s, 1, 0, 0, 0, 1, 0.9 * s),  # shift along y
]


def operation(rand):
    """Which of the operations each image gets: every second image one of them, the others none."""
    none = len(RAND_AUGMENT)
    return (rand[:, 0] * none).long().masked_fill(rand[:, 1] < 0.5, none)


def rand_augment(images, rand, counts):
    """One of the two operations of RandAugment (Cubuk et al. 2020, arXiv 1909.13719) that DeiT applies,
    each to half of the images, at magnitude 9 of 10 with a deviation of 0.5.

    images: (B, 3, S, S) uint8. rand: (B, 4), uniform, where the images are. counts: how many images
    get each operation. Returns the shape of images.
    """
    m = 0.9 + 0.05 * math.sqrt(2) * torch.erfinv(2 * rand[:, 2].clamp(1e-6, 1 - 1e-6) - 1)
    m = m.clamp(0, 1).view(-1, 1, 1, 1)
    s = torch.where(rand[:, 3].view(-1, 1, 1, 1) < 0.5, m, -m)
    images, by_operation = images.clone(), operation(rand).argsort(stable=True)
    for apply, i in zip(RAND_AUGMENT, by_operation.split(counts)):
        if len(i):
            images[i] = apply(images[i], m[i], s[i])
    return images


ERASED = 0.25  # of the images


def random_erase(images, rand, count):
    """Fill a box with noise in a quarter of the images (Zhong et al. 2020, arXiv 1708.04896), as DeiT
    does: 2 to 33 % of the area, 0.3 to 3.3 in shape, normal noise for each pixel.

    images: (B, 3, S, S), normalised. rand: (B, 7), uniform, where the images are. count: how many of
    its first column are below a quarter. Returns the shape of images.
    """
    i = (rand[:, 0] >= ERASED).int().argsort(stable=True)[:count]
    side = images.shape[-1]
    area, shape, top, left, dy, dx = rand[i, 1:].unbind(1)
    area, ratio = 0.02 + area * (1 / 3 - 0.02), 0.3 ** (2 * shape - 1)
    at = torch.arange(side, device=images.device)
    within, rolled = [], []
    for length, start, shift in (((area * ratio).sqrt(), top, dy), ((area / ratio).sqrt(), left, dx)):
        length = (length * side).round().clamp(max=side - 1)
        start = (start * (side - length + 1)).floor()[:, None]
        within.append((at >= start) & (at < start + length[:, None]))  # (erased, side)
        rolled.append(((shift * side).long()[:, None] + at) % side)
    (rows, cols), (y, x) = within, rolled
    box = rows[:, None, :, None] & cols[:, None, None, :]
    noise = noise_field(side, images.device)[:, y[:, :, None], x[:, None, :]]  # (3, erased, side, side)
    images = images.clone()
    images[i] = torch.where(box, noise.transpose(0, 1), images[i])
    return images
