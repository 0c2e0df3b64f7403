"""Images for training: where they come from, and the two halves of augmentation.

Decoding and cropping are irregular, an image at a time, and run on CPU workers; they end in uint8, a
quarter of the bytes to move. Everything else is regular and runs on the device over the whole batch:

    a file -> decode -> random resized crop -> uint8 (3, S, S)                a worker, per image
    uint8 (B, 3, S, S) -> flip -> RandAugment -> normalise -> erase           the device, per batch

Sets of small images are decoded once and live on the device whole. Every random number comes from a generator
named by what it is for: it depends on seed, step and sample, not on workers, processes, device or resuming.
"""

import functools
import hashlib
import itertools
import math
import multiprocessing.queues
import os
import signal
import sys
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DeiT and Swin use
SMALL = 64  # images up to this many pixels a side are small: held whole, augmented lightly
PART = 48  # images that a worker brings at a time: several workers then fill one batch
FORMATS = (*IMG_EXTENSIONS, ".gif", ".jfif")  # files of other names are no images


class Ended(Exception):
    """The run ends here, in one line: what is wrong, what was given, what would be right. A second argument
    is the exit status, 2 if there is none: the user gave what can't be used."""


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


def tell(line, stream="stdout"):
    """Print a line. That nobody can read it is no reason to end a run: a stream that fails is let go."""
    code = getattr(getattr(sys, stream), "encoding", None) or "utf-8"
    try:
        print(line.encode(code, "backslashreplace").decode(code), file=getattr(sys, stream), flush=True)
    except (OSError, ValueError):
        setattr(sys, stream, None)


# --- Sets: anything whose [i] is a uint8 image (3, H, W) and the number of its class.


# classes: their names, by number. flip: whether a mirrored image still shows its class.
Sets = namedtuple("Sets", ["train", "val", "classes", "flip"], defaults=[True])

SHAPES_TRAIN, SHAPES_VAL = 8_000, 2_000
SHAPES = ["plain", "rows", "columns", "rising", "falling", "checks", "dots", "lines", "bars", "rings"]


def shapes(n, seed, size=32):
    """Scenes drawn from the seed alone: one textured object on a cluttered ground. Its texture is its class;
    colours, place and size are chance. Its mask tells how much of it a CutMix image still shows.
    Returns images (n, 3, size, size) uint8, classes (n,) and masks (n, size, size) bool."""
    g = generator(seed, "shapes", n, size)
    rand = lambda *shape, low=0.0, high=1.0: low + (high - low) * torch.rand(n, *shape, generator=g)
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
    wave = lambda t: (t / (size / 6) + rand(1, 1)) % 1 < 0.5
    rows, cols = wave(dy), wave(dx)
    textures = [torch.zeros_like(rows), rows, cols, wave(dx + dy), wave(dx - dy), rows ^ cols, rows & cols]
    textures += [wave(2 * dy), wave(2 * dx), wave(distance)]  # in the order of SHAPES
    texture = torch.stack(textures, dim=1)[torch.arange(n), classes][:, None]  # (n, 1, size, size)
    dark, light = rand(3, 1, 1, high=0.4), rand(3, 1, 1, low=0.6)
    images = torch.where(masks[:, None], torch.where(texture, dark, light), images)
    images += 0.05 * torch.randn(images.shape, generator=g)
    return (images.clamp(0, 1) * 255).to(torch.uint8), classes, masks


# torchvision's sets: what selects the part to train on and the part to validate on.
SPLITS = {
    ("train", True, False): ["CIFAR10", "CIFAR100", "MNIST", "KMNIST", "USPS", "FashionMNIST"],
    ("split", "train", "test"): ["SVHN", "STL10", "GTSRB", "DTD", "Flowers102", "Food101", "StanfordCars"],
    ("split", "trainval", "test"): ["FGVCAircraft", "OxfordIIITPet"],
    ("split", "train", "val"): ["Imagenette"],
}
NAMES = {name.lower(): (name, split) for split, names in SPLITS.items() for name in names}
UNNAMED = {"SVHN": 10, "USPS": 10, "GTSRB": 43, "Flowers102": 102}  # classes of sets that don't name them
ONE_WAY = {"MNIST", "KMNIST", "USPS", "SVHN", "GTSRB"}  # a mirrored image does not show its class any more


def open_sets(name, root="data", seed=0):
    """The sets that `--data` names: "shapes", one of `NAMES` (downloaded to `root` if it is not there), or a
    folder with train/ and val/. Raises Ended for what is unknown, missing or doesn't fit together."""
    if name == "shapes":
        train, val = (shapes(n, s)[:2] for n, s in ((SHAPES_TRAIN, seed), (SHAPES_VAL, "val")))
        return Sets(TensorDataset(*train), TensorDataset(*val), SHAPES, flip=False)
    if name not in NAMES:
        return open_folder(name)
    kind, (key, *parts) = NAMES[name]
    to_rgb = v2.Compose([v2.RGB(), v2.PILToTensor()])
    make = functools.partial(getattr(torchvision.datasets, kind), root, transform=to_rgb)
    try:
        try:  # what is there already; torchvision can no longer fetch all of its sets
            train, val = (make(**{key: part}) for part in parts)
        except (OSError, RuntimeError):  # OSError: USPS's way to say that it is not there
            train, val = (make(**{key: part}, download=True) for part in parts)
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        raise Ended(f"torchvision can't open or fetch {name} in {root}/: {str(e).splitlines()[0]}") from e
    classes = [*map(str, range(UNNAMED[kind]) if kind in UNNAMED else train.classes)]
    return Sets(train, val, classes, kind not in ONE_WAY)


def open_folder(path):
    try:
        train, val = (Folder(os.path.join(path, part)) for part in ("train", "val"))
    except (OSError, ValueError) as e:  # no such folder, none in it, or one without images
        reason = str(e).split("] ")[-1].split(" Supported")[0]
        raise Ended(f"{reason}; --data takes a folder of train/CLASS/ and val/CLASS/, or {[*NAMES]}") from e
    if odd := sorted(set(train.classes) ^ set(val.classes)):
        raise Ended(f"class {odd[0]!r} is in only one of {path}/train and val/; {len(odd)} are so, none must")
    return Sets(train, val, train.classes)


class Folder(torchvision.datasets.ImageFolder):
    """Folders of images, one a class; names that begin with a dot are left out. Samples are one array: to
    read one of a million Python objects writes its reference count, and gives each worker a copy of it."""

    def __init__(self, root):
        others = []  # files without an image's name: `or` appends them
        known = lambda path: path.lower().endswith(FORMATS) or others.append(path)
        shown = lambda path: "/." not in path[len(str(root)) :] and known(path)
        super().__init__(root, loader=decode, is_valid_file=shown)
        self.others = len(others)
        paths = [os.fsencode(path) for path, _ in self.samples]
        self.samples = np.rec.fromarrays([paths, self.targets], names="path,target")
        self.imgs = self.targets = None  # the same once more

    def find_classes(self, root):
        names = [name for name in super().find_classes(root)[0] if name[0] != "."]
        return names, {name: number for number, name in enumerate(names)}


def decode(path):
    """A file's image as uint8 (3, H, W), turned as its EXIF tag says; of an animation the first frame. JPEG
    is read by torchvision, the rest by Pillow, which takes twice the time. Raises what it raises."""
    try:
        content = torch.from_numpy(np.fromfile(path, np.uint8))
        return torchvision.io.decode_jpeg(content, "RGB", apply_exif_orientation=True)
    except RuntimeError:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # 16 bits, which Pillow would cut off at 255; floats fail
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return TF.pil_to_tensor(image.convert("RGB"))


def native_size(dataset):
    """The side of the images in pixels if they are all small, else 224: eight are looked at."""
    look = Crops(Sets(dataset, dataset, []), 224)
    side = max(max(look.read("train", i * (len(dataset) - 1) // 7)[0].shape) for i in range(8))
    return side if side <= SMALL else 224


# --- The workers' half: decode and crop.


def random_resized_crop(image, size, name):
    """A box of 8 to 100 % of the image and 3/4 to 4/3 in shape, by the generator of that name, resized to
    (3, size, size) (Szegedy et al. 2015, as torchvision's transform draws it)."""
    height, width = image.shape[-2:]
    for area, shape, top, left in uniform((10, 4), *name).tolist():
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
    """DeiT's evaluation crop: the shorter side to size / 0.875, of small images to size, and the middle."""
    short = size if size <= SMALL else int(size / 0.875)
    most = 4 * min(image.shape[-2:])  # of a very long image, resized whole, memory could be too small
    image = TF.center_crop(image, [min(side, most) for side in image.shape[-2:]])
    return TF.center_crop(TF.resize(image, [short], TF.InterpolationMode.BICUBIC), [size, size])


class Crops(Dataset):
    """What a worker runs. A key is (part, index, name): "train" or "val", an image's number in it, and the
    name of a random crop's generator, or None for the evaluation crop. An item is the crop, its class, the
    part, and what the image is called if it can't be decoded, else "": then the next one takes its place."""

    def __init__(self, sets, size):
        self.sets, self.size = sets, size

    def __getitem__(self, key):
        part, index, name = key
        image, target, failed = self.read(part, index)
        crop = random_resized_crop(image, self.size, name) if name else center_crop(image, self.size)
        return crop.movedim(0, -1), target, part, failed  # as it lies in memory: batches are made faster so

    @functools.lru_cache(2)  # repeated augmentation crops two images in turn
    def read(self, part, index):
        dataset, failed = getattr(self.sets, part), ""
        for i in range(index, index + len(dataset) // 100 + 2):  # more failures end the run, see `Stream`
            try:
                image, target = dataset[i % len(dataset)]
                return image, int(target), failed
            except Exception:  # whatever a damaged file makes of a decoder
                files = getattr(dataset, "samples", None)
                failed = failed or (os.fsdecode(files[i][0]) if files is not None else f"image {i} of {part}")
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, failed


def epoch_order(n, seed, epoch, repeats=1):
    """Which image stands at each of the n places of an epoch. With repeated augmentation (Hoffer et al. 2020,
    arXiv 1901.09335) it takes n / repeats of the images, each at near places, so that one decode serves all
    its crops: a b a b a b, c d c d c d. Neighbours, which mixing pairs, are always different images."""
    place = torch.arange(n)
    image = place // (2 * repeats) * 2 + place % 2
    return torch.randperm(n, generator=generator(seed, "order", epoch))[image]


class Stream:
    """The batches of a run over sets that are read from files. Workers, started once, decode and crop all
    that is left of the run in its order, ahead of the device: the next epoch while one is evaluated. `epoch`
    and `whole` take turns. s: settings of the run. rows, share: slices, of which images of a batch and of the
    set to validate on are this process's. What can't be decoded is named, kept in `bad` and replaced."""

    def __init__(self, sets, s, rows=slice(None), share=slice(None)):
        self.sets, self.s, self.rows, self.share = sets, s, rows, share
        self.steps = len(sets.train) // s.batch_size  # of an epoch; what doesn't fill a batch is left out
        self.bad, self.parts = {"train": set(), "val": set()}, None

    def epoch(self, epoch, skip=0):
        """Training batches from step `skip` on: (rows, 3, S, S) uint8 and (rows,), on the device."""
        self.parts = self.parts or self.load(self.keys(epoch, skip))
        count = math.ceil(len(range(self.s.batch_size)[self.rows]) / PART)
        batches = (zip(*itertools.islice(self.parts, count)) for _ in range(skip, self.steps))
        return ((torch.cat(images), torch.cat(targets)) for images, targets in batches)

    def whole(self):
        """This process's images to validate on, in order, as batches of evaluation crops."""
        keys = [("val", i, None) for i in range(len(self.sets.val))[self.share]]
        return itertools.islice(self.parts, math.ceil(len(keys) / PART)) if self.parts else self.load([keys])

    def close(self):
        """End the workers of a run that may not be over: by SIGTERM they would take their time."""
        if self.parts:
            self.parts.close()

    def keys(self, epoch, skip):
        """Of each batch from this step of this epoch on, of all images to validate on, and so forth."""
        n, s = self.s.batch_size, self.s
        for epoch in range(epoch, s.epochs):
            order = epoch_order(len(self.sets.train), s.seed, epoch, s.repeats)
            for step in range(skip, self.steps):
                places = range(step * n, (step + 1) * n)[self.rows]
                yield [("train", order[place].item(), (s.seed, "crop", epoch, place)) for place in places]
            yield [("val", i, None) for i in range(len(self.sets.val))[self.share]]
            skip = 0

    def load(self, keys):
        """What lists of keys ask for, in parts: (n, 3, S, S) uint8 and (n,), on the device."""
        lists = (some[i : i + PART] for some in keys for i in range(0, len(some), PART))
        options = {"num_workers": self.s.workers, "pin_memory": self.s.device == "cuda"}
        options |= {"batch_sampler": lists, "worker_init_fn": begin_worker}
        try:
            loaded = iter(DataLoader(Crops(self.sets, self.s.img_size), **options))
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise a worker's end within a step
            for images, targets, parts, failed in loaded:
                for part, name in {(p, f) for p, f in zip(parts, failed) if f and f not in self.bad[p]}:
                    tell(f"cannot decode {name}: the next image takes its place")
                    self.bad[part].add(name)
                    if (count := len(self.bad[part])) > (n := len(getattr(self.sets, part))) / 100:
                        raise Ended(f"{count} of {n} images cannot be decoded, more than one in a hundred")
                images, targets = (t.to(self.s.device, non_blocking=True) for t in (images, targets))
                yield images.movedim(-1, 1).contiguous(), targets
        except (EOFError, OSError, RuntimeError) as e:  # a worker was killed, or lacks memory or files
            if "CUDA" in str(e) or not self.s.workers:  # of the device, or no worker's
                raise
            sys.unraisablehook = lambda error: None  # torch fails to end workers if it failed to start one
            for worker in multiprocessing.active_children():
                worker.kill()
            line = f"the workers bring no more images: {(str(e) or repr(e)).splitlines()[-1]}"
            raise Ended(f"{line}; fewer --workers or more shared memory (--shm-size) may help", 1) from e


def begin_worker(_):
    """A signal to all processes is for the training script to answer; SIGTERM gives it half a minute. A part
    that can't be sent ends the worker, which is noticed: it would be waited for."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda queue, e, part: os._exit(1)


class Memory(Stream):
    """The same of small images, decoded once and held, padded and cropped on the device (He et al. 2016)."""

    train = functools.cached_property(lambda self: self.decoded("train"))
    val = functools.cached_property(lambda self: self.decoded("val"))

    def decoded(self, part):
        keys = [(part, i, None) for i in range(len(getattr(self.sets, part)))]
        return [torch.cat(tensors) for tensors in zip(*self.load([keys]))]

    def epoch(self, epoch, skip=0):
        (images, targets), s, n, pad = self.train, self.s, self.s.batch_size, self.s.img_size // 8
        order = epoch_order(len(images), s.seed, epoch, s.repeats).to(s.device)
        crops = F.pad(images, (pad,) * 4).unfold(2, s.img_size, 1).unfold(3, s.img_size, 1)  # all, a view
        for step in range(skip, self.steps):
            i = order[step * n : (step + 1) * n][self.rows]
            corner = uniform((n, 2), s.seed, "crop", epoch, step)[self.rows] * (2 * pad + 1)
            top, left = bring(corner, s.device).long().unbind(1)
            yield crops[i, :, top, left], targets[i]

    def whole(self):
        return zip(*(t[self.share].split(1000) for t in self.val))


def batches(sets, s, *slices):
    """`Memory` for a training set of small images, of 2 GiB at most, else `Stream`; arguments as there."""
    held = s.img_size <= SMALL and 3 * s.img_size**2 * len(sets.train) <= 2**31
    return (Memory if held else Stream)(sets, s, *slices)


# --- The device's half: whole batches, grouped by operation.


def augment(images, rand, flip=True, full=True):
    """From uint8 crops (B, 3, S, S) to the model's input, floats of the same shape.
    rand: (B, 16), uniform, on the CPU: the sizes of groups are counted there, so that the device, which gets
    the same numbers, need not be waited for. flip: mirror half of them. full: RandAugment and erasing."""
    r = bring(rand, images.device)
    if flip:
        images = torch.where(r[:, 0].view(-1, 1, 1, 1) < 0.5, images.flip(-1), images)
    if full:
        for k in (slice(1, 5), slice(5, 9)):
            images = rand_augment(images, rand[:, k], r[:, k])
    images = normalize(images)
    return random_erase(images, rand[:, 9:], r[:, 9:]) if full else images


@functools.cache
def constants(side, device):
    """MEAN and STD, (3, 1, 1) each, and normal noise (3, side, side) that erasing rolls: drawn on the CPU, as
    devices differ, and brought to the device once, as a copy a step would wait for it."""
    noise = torch.randn(3, side, side, generator=generator("erase"))
    return [t.to(device) for t in (*torch.tensor([MEAN, STD]).view(2, 3, 1, 1), noise)]


def normalize(images):
    """uint8 (B, 3, S, S) to floats of mean 0 and deviation 1, by the channel statistics of ImageNet."""
    mean, std, _ = constants(1, images.device)
    return (images.float() / 255 - mean) / std


def blend(images, other, strength):
    """PIL's ImageEnhance: strength 0 is `other`, 1 the image, more than 1 overshoots."""
    return torch.lerp(other.float(), images.float(), strength).round().clamp(0, 255).to(torch.uint8)


def warp(images, s, a, b, tx, c, d, ty):
    """Read each pixel (x, y) at (a x + b y + tx, c x + d y + ty), in units of half the image from its
    centre, bilinear; outside lies the mean colour. Each number is (B, 1, 1, 1), as s is, or plain."""
    numbers = (n if torch.is_tensor(n) else torch.full_like(s, n) for n in (a, b, tx, c, d, ty))
    matrix = torch.stack([*numbers], dim=-1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    fill = constants(images.shape[-1], images.device)[0] * 255
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
    lambda x, m, s: blend(  # sharpness: PIL smooths by (9 mean + 4 x) / 13, and leaves the border
        x, x + F.pad(F.avg_pool2d(x.float(), 3, 1) - x[..., 1:-1, 1:-1], (1,) * 4), 1 + 8.1 / 13 * s
    ),
    lambda x, m, s: warp(x, s, (r := s * math.pi / 6).cos(), -r.sin(), 0, r.sin(), r.cos(), 0),
    lambda x, m, s: warp(x, s, 1, 0.3 * s, 0.3 * s, 0, 1, 0),  # shear along x
    lambda x, m, s: warp(x, s, 1, 0, 0, 0.3 * s, 1, 0.3 * s),  # shear along y
    lambda x, m, s: warp(x, s, 1, 0, 0.9 * s, 0, 1, 0),  # shift along x
    lambda x, m, s: warp(x, s, 1, 0, 0, 0, 1, 0.9 * s),  # shift along y
]


def rand_augment(images, rand, r):
    """One of the two operations of RandAugment (Cubuk et al. 2020, arXiv 1909.13719) that DeiT applies, each
    to half of the images, at magnitude 9 of 10 with a deviation of 0.5.
    images: (B, 3, S, S) uint8. rand, r: (B, 4), uniform, the same numbers on the CPU and where images are."""
    none = len(RAND_AUGMENT)
    which, counted = ((t[:, 0] * none).long().masked_fill(t[:, 1] < 0.5, none) for t in (r, rand))
    m = (0.9 + 0.05 * torch.special.ndtri(r[:, 2])).clamp(0, 1).view(-1, 1, 1, 1)
    s = torch.where(r[:, 3].view(-1, 1, 1, 1) < 0.5, m, -m)
    groups = which.argsort(stable=True).split(counted.bincount(minlength=none + 1).tolist())
    images = images.clone()
    for apply, i in zip(RAND_AUGMENT, groups):
        if len(i):
            images[i] = apply(images[i], m[i], s[i])
    return images


def random_erase(images, rand, r):
    """Fill a box with noise in a quarter of the images (Zhong et al. 2020, arXiv 1708.04896), as DeiT does:
    2 to 33 % of the area, 0.3 to 3.3 in shape, normal noise for each pixel.
    images: (B, 3, S, S), normalised. rand, r: (B, 7), as for `rand_augment`."""
    side, count = images.shape[-1], int((rand[:, 0] < 0.25).sum())
    i = (r[:, 0] >= 0.25).int().argsort(stable=True)[:count]
    area, ratio = 0.02 + r[i, 1] * (1 / 3 - 0.02), 0.3 ** (2 * r[i, 2] - 1)
    size = torch.stack([area * ratio, area / ratio], dim=1).sqrt()
    size = (size * side).round().clamp(max=side - 1)  # (erased, 2): height and width
    start, at = (r[i, 3:5] * (side - size + 1)).floor(), torch.arange(side, device=images.device)
    rows, cols = ((at >= start[..., None]) & (at < (start + size)[..., None])).unbind(1)  # (erased, side)
    y, x = (((r[i, 5:] * side).long()[..., None] + at) % side).unbind(1)
    noise = constants(side, images.device)[2][:, y[:, :, None], x[:, None, :]]  # (3, erased, side, side)
    images = images.clone()
    images[i] = torch.where(rows[:, None, :, None] & cols[:, None, None, :], noise.transpose(0, 1), images[i])
    return images
