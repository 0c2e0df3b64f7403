"""What segmentation.py and detection.py share: the maps of a backbone, scenes that are drawn,
fine-tuning on the pieces of train.py, and the comparison of starting points.
"""

import functools
import hashlib
import math
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

import common
import compare
import data
import train
import transfer
import vit
from data import UserError

# ------------------------------------------------------------------------------------------------
# The backbone.

VIT_STRIDES = (4, 8, 16, 32)  # in pixels, of the maps that are made from a ViT's single map


class Backbone(nn.Module):
    """The model of a checkpoint, which returns maps of growing strides: a list of (B, channels[i],
    S / strides[i], S / strides[i]). settings: see `make_settings`. Raises UserError."""

    def __init__(self, settings):
        super().__init__()
        classes = train.load_checkpoint(settings.finetune)["classes"]
        self.model = train.build_model(settings, len(classes))
        if not settings.scratch:
            train.load_weights(self.model, settings.finetune, classes, new_head=True)
        self.model.head = nn.Identity()  # unused: DDP would wait for its gradient
        with torch.no_grad():
            maps = self(torch.zeros(1, 3, settings.size, settings.size))
        self.channels = [x.shape[1] for x in maps]
        self.strides = [settings.size // x.shape[2] for x in maps]

    def forward(self, images):
        """images: (B, 3, S, S), normalized."""
        if isinstance(self.model, vit.ViT):
            return vit_maps(self.model, images)
        return swin_maps(self.model, images)


def vit_maps(model, images):
    """The patch tokens after the last block as a map, enlarged or max-pooled to four strides."""
    x, _ = model.embed(images)
    for block in model.blocks:
        x, _ = block(x)
    x = model.norm(x)[:, 1:]  # without the class token
    x = rearrange(x, "b (h w) d -> b d h w", h=model.grid_size)
    maps = []
    for stride in VIT_STRIDES:
        size = model.img_size // stride
        if size < model.grid_size:
            maps.append(F.adaptive_max_pool2d(x, size))
        else:
            maps.append(F.interpolate(x, size, mode="bilinear"))
    return maps


def swin_maps(model, images):
    """The tokens after each stage, normalized, as in the detectors of Swin's authors."""
    x, _ = model.embed(images)
    maps = []
    for stage in model.layers:
        for block in stage.blocks:
            x, _ = block(x)
        maps.append(F.layer_norm(x, x.shape[-1:]))
        if stage.downsample is not None:
            x, _ = stage.downsample(x)
    maps[-1] = model.norm(x)
    return [rearrange(x, "b h w d -> b d h w") for x in maps]


# ------------------------------------------------------------------------------------------------
# Built-in scenes, with objects of the second half of the classes; transfer.py trains on the first.

NUM_SCENES = 300  # to train on, and as many to validate on
SCENE_SIZE = 64  # pixels


@functools.cache
def draw_scenes(n, seed):
    return [draw_scene(seed, "scene", i) for i in range(n)]


def draw_scene(*name):
    """A scene of one to four objects of the last five built-in classes.

    name: of the random generator. Returns an image, (3, 64, 64) uint8, and a dict with an entry for
    each visible object: boxes (m, 4) as left, top, right, bottom, labels (m,) from 0, masks (m, 64,
    64) of its visible pixels, and crowd (m,): whether it may be missed, since less than a quarter
    of it is visible.
    """
    rng = data.generator(*name)
    size = SCENE_SIZE
    image = F.interpolate(torch.rand(1, 3, 8, 8, generator=rng), (size, size), mode="bilinear")[0]
    image += 0.05 * torch.randn(image.shape, generator=rng)
    image = (image.clamp(0, 1) * 255).to(torch.uint8)
    objects, labels, masks = data.shapes(40, name)
    count = int(torch.randint(1, 5, (), generator=rng))
    chosen = (labels >= 5).nonzero().flatten()[:count]
    owner = torch.full((size, size), -1)  # the object that each pixel shows; later ones hide others
    side = objects.shape[-1]
    for i in chosen:
        top, left = torch.randint(size - side + 1, (2,), generator=rng).tolist()
        rows, cols = slice(top, top + side), slice(left, left + side)
        image[:, rows, cols] = torch.where(masks[i], objects[i], image[:, rows, cols])
        owner[rows, cols] = torch.where(masks[i], i, owner[rows, cols])
    visible = owner == chosen[:, None, None]  # (count, 64, 64)
    share = visible.sum((1, 2)) / masks[chosen].sum((1, 2))
    seen = share > 0
    boxes = masks_to_boxes(visible[seen])
    boxes[:, 2:] += 1  # the last pixels belong to the box
    return tv_tensors.Image(image), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(size, size)),
        "labels": labels[chosen][seen] - 5,
        "masks": tv_tensors.Mask(visible[seen]),
        "crowd": share[seen] < 0.25,
    }


# ------------------------------------------------------------------------------------------------
# Fine-tuning. For train.py a run is one epoch, whose steps go over the images several times.


def files_digest(root, paths):
    """See `data.files_digest`. Raises UserError if a file that it looks at is missing."""
    try:
        return data.files_digest(str(root), [(str(path), 0) for path in paths])
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def content_digest(path):
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


class Augmented(Dataset):
    """What transform(image, target) makes of a dataset's items, for the keys of
    `data.TrainSampler`. torchvision's transforms draw from torch's global generator, which is
    seeded by the name in the key."""

    def __init__(self, dataset, transform):
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, key):
        place, name = key
        image, target = self.dataset[place % len(self.dataset)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.generator(*name).initial_seed())
            return self.transform(image, target)


class Loader(DataLoader):
    """Training batches for `train.train`, as `data.FileLoader`, with other targets: images (b, 3,
    S, S) uint8, and a list of b targets, dicts of tensors. transform: see `Augmented`."""

    def __init__(self, dataset, settings, share, transform):
        num_places = settings.steps * settings.batch_size
        super().__init__(
            Augmented(dataset, transform),
            batch_sampler=data.TrainSampler(num_places, settings, share),
            num_workers=settings.workers,
            worker_init_fn=data.ignore_signals,
            collate_fn=collate,
        )
        self.settings = settings

    def set_epoch(self, epoch, first_step=0):
        self.batch_sampler.set_epoch(epoch, first_step)

    def __iter__(self):
        device, seed = self.settings.device, self.settings.seed
        for step, (images, targets) in enumerate(super().__iter__(), self.batch_sampler.first_step):
            # Drop path and torchvision's detectors draw from torch's global generators, too.
            torch.manual_seed(data.generator(seed, "step", step, train.get_rank()).initial_seed())
            yield data.to_device(images, device), [to_device(target, device) for target in targets]


def collate(items):
    images, targets = zip(*items, strict=True)
    return torch.stack(images), targets


def to_device(target, device):
    return {name: data.to_device(x, device) for name, x in target.items()}


def finetune(settings, datasets, model, loss, transform, score):
    """Fine-tune the model of a run, from its last checkpoint if there is one, and score it.

    loss: as for `train.train`. score(model, dataset, settings): a dict of results.
    """

    @torch.no_grad()
    def validate(model):
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16):
            return score(model.eval(), datasets.val, settings)

    make_loader = functools.partial(Loader, transform=transform)
    common.train_run(settings, datasets, model, validate, loss=loss, make_loader=make_loader)


# ------------------------------------------------------------------------------------------------
# The experiment.

LARGE_SIZE = 256  # from this size on the recipe is that of large images
MIN_STEPS = 150
MICRO_LR = 2e-3  # of narrow models


def parse_args(doc):
    """The command line. With --data there are no further processes, if not said otherwise. Under
    torchrun this process joins the others. Raises UserError."""
    parser = common.make_parser(doc)
    add = parser.add_argument
    count = train.number(int, 1)
    add("--data", default="scenes", metavar="FOLDER", help="with annotated images [%(default)s]")
    add("--checkpoints", nargs="+", metavar="FILE", help="to start from; the first: the baseline")
    add("--size", type=count, help="of the model's input in pixels [the images', at most 512]")
    add("--steps", type=count, help="of fine-tuning")
    add("--batch-size", type=count)
    add("--lr", type=train.number(float, 1e-12), help="peak learning rate")
    add("--workers", type=train.number(int, 0), default=0, help="for the images of a run [0]")
    args = parser.parse_args()
    if args.data != "scenes" and not args.checkpoints:
        raise UserError("--data needs --checkpoints FILE ..., the models to start from")
    for path in args.checkpoints or []:
        if train.load_checkpoint(path).get("format") != train.FORMAT:
            raise UserError(f"{path} is no checkpoint of this version of train.py")
    if args.size and args.size % 32:
        raise UserError(f"--size must be a multiple of 32, got {args.size}")
    if args.jobs is None and args.data != "scenes":
        args.jobs = 0
    if "RANK" in os.environ:
        train.init_distributed(args, sys.argv[1:])
        args.jobs = 0
    return args


def find_starts(args):
    """The checkpoints to start from, {(model, start): a path for each seed}. The first start of a
    model is the baseline. Without --checkpoints they are those of transfer.py, trained here."""
    if args.checkpoints:
        return {("", path): [path] * args.seeds for path in args.checkpoints}
    first_args = transfer.make_parser("").parse_args(["--device", args.device, "--runs", args.runs])
    starts = {}
    runs = []
    for model in first_args.models:
        for method in compare.PAIR:
            starts[model, method] = []
            for seed in range(args.seeds):
                run = transfer.make_first_run(first_args, model, method, seed)
                starts[model, method].append(f"{run.out}/last.pt")
                runs.append(run)
        # Their weights are not loaded: they only say which model to build.
        starts[model, "from scratch"] = starts[model, "area"]
    common.run_all(transfer.train_run, runs, args.jobs)
    if train.get_world_size() > 1:
        dist.barrier()  # the first process writes the checkpoints
    return starts


def make_settings(args, recipes, datasets, checkpoint, seed, scratch=False):
    """The settings of a run: train.py's, and size, steps, and what else is in the recipe.

    recipes: for small and for large images. scratch: whether to keep the initial weights, and take
    only the kind of the model from the checkpoint.
    """
    num_images = len(datasets.train)
    argv = ["--eval", checkpoint, "--seed", str(seed), "--device", args.device]
    settings = train.parse_args(argv)  # with the settings of the checkpoint's model
    settings.eval = None
    settings.finetune = str(Path(checkpoint).resolve())
    settings.finetune_digest = content_digest(checkpoint)
    settings.scratch = scratch
    settings.data = args.data
    settings.workers = args.workers
    settings.size = args.size or max(32, min(data.median_size(datasets.train), 512) // 32 * 32)
    small, large = recipes
    vars(settings).update(large if settings.size >= LARGE_SIZE else small)
    if settings.model.endswith("micro"):
        settings.lr = MICRO_LR
    settings.lr = args.lr or settings.lr
    settings.batch_size = args.batch_size or settings.batch_size
    steps = math.ceil(settings.passes * num_images / settings.batch_size)
    settings.steps = args.steps or max(MIN_STEPS, steps)
    settings.epochs = 1
    settings.warmup_epochs = min(settings.warmup_steps / settings.steps, 0.1)
    vars(settings).update(mix="none", augment="light", hflip=False)  # see `Augmented`
    vars(settings).update(aug_repeats=1, clip_grad=0.0, compile=False)
    train.fill_defaults(settings, settings.size, num_images)
    if not settings.model.startswith("swin"):
        settings.img_size = settings.size  # the position embedding is resized
    if settings.batch_size % 2 or settings.batch_size < 2 * train.get_world_size():
        raise UserError("--batch-size must be even, and at least two for each process")
    return settings


def run(name, args, recipes, open_datasets, train_run, measures):
    """Fine-tune from each starting point, and write the table.

    open_datasets(folder, seed): of --data, or scenes. train_run(settings): does a run. measures:
    {key of its result: title}; the first one is compared with the baseline, seed by seed.
    """
    starts = find_starts(args)
    runs = {}
    for (model, start), checkpoints in starts.items():
        for seed, checkpoint in enumerate(checkpoints):
            label = f"{model}-{start}"
            if args.checkpoints:
                label = f"{Path(start).resolve().parent.name}-{Path(start).stem}"
            datasets = open_datasets(args.data, seed)
            scratch = start == "from scratch"
            settings = make_settings(args, recipes, datasets, checkpoint, seed, scratch)
            common.set_folder(settings, datasets, args.runs, f"{name}-{label}")
            runs[model, start, seed] = settings
    common.run_all(train_run, runs.values(), args.jobs)
    if train.get_rank() != 0:
        return
    rows = []
    for model in dict.fromkeys(model for model, _ in starts):
        names = [start for other, start in starts if other == model]
        rows += make_rows(runs, model, names, measures, args.seeds)
    first, *others = measures.values()
    header = ["model", "start", first, "difference to the baseline", *others]
    text = common.markdown_table(header, rows)
    text += f"\n{settings.steps} steps of {settings.batch_size} images of {settings.size} px; "
    text += f"{len(datasets.train)} images to train on, {len(datasets.val)} to validate; "
    text += f"{args.seeds} seed(s), ± is half of a 95 % interval of paired differences.\n"
    common.write_results(name, text, args.runs)


def make_rows(runs, model, starts, measures, num_seeds):
    """A row for each start of a model: means over seeds, and the difference to the first start."""
    first, *others = [common.read_results(runs, model, starts, num_seeds, key) for key in measures]
    rows = common.make_rows(first, starts[0])
    for row in rows:
        start = row[0]
        row.insert(0, runs[model, start, 0].model)
        row += [f"{statistics.fmean(values[start]):.2f}" for values in others]
    return rows
