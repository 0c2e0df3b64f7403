"""Annotated images for segmentation.py and detection.py: scenes of built-in objects, and folders
laid out as VOC, COCO, ADE20K, or plainly. What does not fit ends in one line that names it.
"""

import collections
import functools
import json
import math
import pickle
import sys
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes

from runs import data, script

IGNORED = 255  # in a mask: not labelled


def scenes(n, seed, classes, size=64, most=4):
    """Scenes of one to four objects of the built-in set on a soft ground, some partly hidden by
    others.

    classes: a range of the numbers of `data.SHAPES_CLASSES`; they count from 0 here. Returns n
    pairs of an image, uint8 (3, size, size), and a dict of boxes (objects, 4) as left, top, right,
    bottom, labels (objects,), masks (objects, size, size), of what is seen of each, area (objects,)
    in pixels, ignore (objects,): those of which less than a quarter is seen, as what can't be asked
    for, and crowd (objects,): none.
    """
    g, wanted = data.generator(seed, "scenes", n), n * most
    drawn = data.shapes(2 * wanted * len(data.SHAPES_CLASSES) // len(classes), f"{seed} scenes")
    some = ((drawn[1] >= classes.start) & (drawn[1] < classes.stop)).nonzero()[:wanted, 0]
    objects, kinds, masks = (t[some].unflatten(0, (n, most)) for t in drawn)
    images = F.interpolate(torch.rand(n, 3, 8, 8, generator=g), (size, size), mode="bilinear")
    images = (255 * (images + 0.05 * torch.randn(images.shape, generator=g)).clamp(0, 1)).to(
        torch.uint8
    )
    side, found = objects.shape[-1], []
    counts = torch.randint(1, most + 1, (n,), generator=g).tolist()
    corners = torch.randint(size - side + 1, (n, most, 2), generator=g).tolist()
    for i, count in enumerate(counts):
        owner = torch.full((size, size), -1)
        for k, (y, x) in enumerate(corners[i][:count]):
            place = slice(y, y + side), slice(x, x + side)
            part = images[i][(slice(None), *place)]
            part.copy_(torch.where(masks[i, k], objects[i, k], part))
            owner[place] = torch.where(masks[i, k], k, owner[place])
        seen = owner == torch.arange(count)[:, None, None]
        share = seen.sum((1, 2)) / masks[i, :count].sum((1, 2))
        seen, labels, share = seen[share > 0], kinds[i, :count][share > 0], share[share > 0]
        boxes = masks_to_boxes(seen) + torch.tensor([0.0, 0, 1, 1])  # whose last pixels are inside
        known = {"boxes": boxes, "labels": labels - classes.start, "ignore": share < 0.25}
        known |= {"masks": seen, "area": seen.sum((1, 2)).float(), "crowd": share < 0}
        found.append((images[i].clone(), known))  # a view would be kept with all that it is of
    return found


def scene_sets(args, seed, classes=range(5, 10)):
    """args.scenes scenes to train on, drawn by the seed, and some to validate on, the same for
    all."""
    parts = scenes(args.scenes, seed, classes), scenes(args.val_images or 300, "val", classes)
    return data.Datasets(*map(Records, parts), data.SHAPES_CLASSES[classes.start : classes.stop])


class Records(Dataset):
    """Annotated images: records, or what read(*record) makes of them when it is asked for. They are
    held as one array, which worker processes share (see `data.ImageFiles`)."""

    def __init__(self, records, read=None):
        packed, self.read = [pickle.dumps(record) for record in records], read
        self.bytes = np.frombuffer(b"".join(packed), np.uint8)
        self.ends = np.cumsum([0, *map(len, packed)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        record = pickle.loads(self.bytes[self.ends[i] : self.ends[i + 1]].tobytes())
        return self.read(*record) if self.read else record


def image_of(path, size):
    """The image of a file, uint8 (3, H, W). size: the (W, H) that its annotation has."""
    try:
        image = data.decode(path)
    except OSError as e:
        raise data.UserError(f"{path} can't be read: {e}") from e
    if tuple(size) != (image.shape[2], image.shape[1]):
        here, there = f"{image.shape[2]} x {image.shape[1]} px", f"{size[0]} x {size[1]}"
        raise data.UserError(f"{path} is {here}, its annotation {there}; they must be alike")
    return image


def listed(root, pattern):
    """What the pattern finds below root, in order. Raises UserError where that is nothing."""
    if not (found := sorted(p for p in Path(root).glob(pattern) if p.name[0] != ".")):
        raise data.UserError(f"{root} has no {pattern}; --help tells how a folder may be laid out")
    return found


def once(function, *args):
    """What function(*args) gives, or the UserError that it raises; one process calls it for all."""
    found = [None]
    if script.get_rank() == 0:
        try:
            found = [function(*args)]
        except data.UserError as e:
            found = [e]
    if script.get_world_size() > 1:
        dist.broadcast_object_list(found, device=torch.device("cpu"))
    if isinstance(found[0], data.UserError):
        if script.get_rank() == 0:
            raise found[0]
        sys.exit(2)  # the first process prints the error
    return found[0]


def lines(path):
    return [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]


def one(root, pattern):
    """The only path that the pattern finds below root. Raises UserError where there are more, or
    none."""
    path, *more = listed(root, pattern)
    if more:
        raise data.UserError(f"{root} has {1 + len(more)} files {pattern}; leave one of them")
    return path


def same_classes(train, val, root):
    """Raise UserError for a class that is only in the part to validate on, and where a part has
    none."""
    for some, part in ((train, "train"), (val, "validate")):
        if not some:
            raise data.UserError(f"nothing is labelled in {root} to {part} on")
    if odd := sorted(set(val) - set(train)):
        raise data.UserError(
            f"class {odd[0]!r} is in {root}'s part to validate on, not in that to train on"
        )


# --- Masks, for segmentation.


def open_masks(root):
    """The sets of a folder laid out as VOC, ADE20K or plainly. Every mask is looked at. Raises
    data.UserError."""
    root, parts, seen = Path(root), [], []
    voc = (root / "ImageSets/Segmentation").is_dir()
    ade = not voc and (root / "annotations/training").is_dir()
    for part, long in (("train", "training"), ("val", "validation")):
        images, masks = f"{part}/images", f"{part}/masks"
        if voc:
            images, masks = "JPEGImages", "SegmentationClass"
        elif ade:
            images, masks = f"images/{long}", f"annotations/{long}"
        found = {path.stem: str(path) for path in listed(root, f"{images}/*")}
        stems = lines(one(root, f"ImageSets/Segmentation/{part}.txt")) if voc else found
        if lost := set(stems) - found.keys():
            raise data.UserError(
                f"{root}/{images} has no image {min(lost)}, which ImageSets/Segmentation names"
            )
        pairs, values = [(found[stem], str(root / masks / f"{stem}.png")) for stem in stems], {}
        with ThreadPoolExecutor(script.NUM_CPUS) as pool:
            for (_, mask), some in zip(pairs, pool.map(look, pairs), strict=False):
                values |= {
                    v - ade: mask for v in some if v not in values and v != (0 if ade else IGNORED)
                }
        parts.append(Records([(*pair, ade) for pair in pairs], read_mask))
        seen.append(values)
    train, val = seen
    same_classes(train, train, root)  # is there any?
    last, listing = max(train, default=0), root / "classes.txt"
    named = ade or listing.exists()
    names = [*map(str, range(150 if ade else max([last, *val]) + 1))]
    names = lines(listing) if listing.exists() else names
    if len(train) < 2 or not named and len(train) <= last:
        missing = min(set(range(last + 2)) - train.keys())
        reason = f"{train[last]} has class {last}, but no mask to train on has class {missing}"
        line = f"{reason}: 255 is not labelled, classes count from 0, or {listing} names them, "
        line += "one a line"
        raise data.UserError(line)
    for v, mask in (train | val).items():
        if v >= len(names):
            raise data.UserError(
                f"{mask} has the value {v + ade}, which is no class: there are {len(names)}"
            )
    same_classes([names[v] for v in train], [names[v] for v in val], root)
    return data.Datasets(*parts, names)


def look(pair):
    """The values that a mask has. Raises data.UserError where it does not fit its image or is no
    mask."""
    image, mask = pair
    try:
        with Image.open(image) as file:
            size = (
                file.size[::-1] if file.getexif().get(0x0112, 1) > 4 else file.size
            )  # as it is turned
        with Image.open(
            mask
        ) as file:  # by Pillow: torchvision misreads palettes of less than 8 bits
            if file.mode not in ("1", "L", "P"):
                raise data.UserError(
                    f"{mask} is {file.mode}; a mask has one number a pixel, that of its class"
                )
            if file.size != size:
                raise data.UserError(
                    f"{mask} is of {file.size} px, its image of {size}; they must be alike"
                )
            return np.bincount(np.asarray(file).ravel()).nonzero()[0].tolist()
    except FileNotFoundError as e:
        raise data.UserError(f"{image} has no mask: {mask} is not there") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise data.UserError(
            f"{mask} or its image can't be read: {e}; mend it, or leave it out"
        ) from e


def read_mask(image, mask, ade):
    mask = torch.from_numpy(
        np.array(Image.open(mask), dtype=np.uint8) - np.uint8(ade)
    )  # 0 becomes 255
    return image_of(image, mask.shape[::-1]), {"mask": mask}


def as_masks(sets):
    """Scenes with a mask of classes each, of which 0 is the ground."""
    for part in (sets.train, sets.val):
        part.read = mask_of_scene
    return sets._replace(classes=["ground", *sets.classes])


def mask_of_scene(image, known):
    mask = torch.zeros(image.shape[1:], dtype=torch.uint8)
    for label, seen in zip(known["labels"], known["masks"], strict=False):
        mask[seen] = label + 1
    return image, {"mask": mask}


# --- Boxes, for detection.


def open_boxes(root):
    """The sets of a folder laid out as COCO or as VOC, and whether all objects to train on have
    masks, in polygons. Every annotation is looked at. Raises data.UserError."""
    root = Path(root)
    if (root / "annotations").is_dir():
        files = [one(root, f"annotations/instances_{part}*.json") for part in ("train", "val")]
        parts = [[*of_coco(file, root / file.stem.removeprefix("instances_"))] for file in files]
    elif (root / "ImageSets/Main").is_dir():
        files = [one(root, f"ImageSets/Main/{part}.txt") for part in ("train", "val")]
        parts = [[*of_voc(root, file)] for file in files]
    else:
        raise data.UserError(
            f"{root} is laid out neither as COCO (annotations/) nor as VOC (ImageSets/Main/)"
        )
    for file, records in zip(files, parts, strict=False):
        odd = [
            (record[0], o)
            for record in records
            for o in record[2]
            if not sound(o["box"], record[1])
        ]
        if odd:
            path, o = odd[0]
            line = f"{file}: the box {o['box']} of a {o['name']} in {path} has no area there"
            if 100 * len(odd) > sum(len(objects) for *_, objects in records):
                raise data.UserError(f"{line}; mend it, or take it out")
            script.print0(f"{line}; {len(odd)} such are left out")
            records[:] = [
                (p, size, [o for o in some if sound(o["box"], size)]) for p, size, some in records
            ]
    train, val = ({o["name"]: 0 for *_, objects in records for o in objects} for records in parts)
    same_classes(train, val, root)
    number = {name: i for i, name in enumerate(sorted(train))}
    shapes = [o["shape"] for *_, objects in parts[0] for o in objects if not o["crowd"]]
    masked = all(shape and isinstance(shape, list) for shape in shapes)
    reads = (
        functools.partial(read_boxes, number=number, masked=wanted) for wanted in (masked, False)
    )
    return data.Datasets(*map(Records, parts, reads), [*number]), masked


def sound(box, size):
    """Whether a box is finite and has some area inside an image of that size, (W, H)."""
    left, top, right, bottom = box
    sides = min(right, size[0]) - max(left, 0), min(bottom, size[1]) - max(top, 0)
    return all(map(math.isfinite, box)) and min(sides) > 1e-3


CORNERS = ("xmin", "ymin", "xmax", "ymax")


def of_voc(root, file):
    """Of each image that the file names its path, size, and objects, dicts."""
    images = {path.stem: str(path) for path in listed(root, "JPEGImages/*")}
    for stem in lines(file):
        path, objects = root / "Annotations" / f"{stem}.xml", []
        if stem not in images:
            raise data.UserError(f"{root}/JPEGImages has no image {stem}, which {file} names")
        try:
            tree = xml.etree.ElementTree.parse(path)
            size = [int(tree.find(f"size/{side}").text) for side in ("width", "height")]
            for o in tree.iter("object"):
                name, ignore = o.find("name").text, o.findtext("difficult") == "1"
                left, top, *end = (float(o.find(f"bndbox/{k}").text) for k in CORNERS)
                box = [left - 1, top - 1, *end]  # VOC counts pixels from 1
                known = {"name": name, "box": box, "ignore": ignore, "crowd": False}
                objects.append(known | {"area": None, "shape": None})
        except (OSError, AttributeError, ValueError, xml.etree.ElementTree.ParseError) as e:
            raise data.UserError(
                f"{path} can't be read as an annotation of VOC: {e!r}; mend it"
            ) from e
        yield images[stem], size, objects


def of_coco(file, folder):
    """The same of a file of COCO, whose images are in the folder."""
    try:
        content, of = json.loads(file.read_bytes()), collections.defaultdict(list)
        names = {c["id"]: c["name"] for c in content["categories"]}
        for a in content["annotations"]:
            x, y, w, h = a["bbox"]
            o = {"name": names[a["category_id"]], "box": [x, y, x + w, y + h], "ignore": False}
            o |= {
                "crowd": bool(a.get("iscrowd")),
                "area": a.get("area"),
                "shape": a.get("segmentation"),
            }
            if isinstance(o["shape"], list) and any(len(p) < 6 or len(p) % 2 for p in o["shape"]):
                raise ValueError(f"annotation {a['id']} has a polygon that is none")
            of[a["image_id"]].append(o)
        for image in content["images"]:
            path, size = folder / image["file_name"], (int(image["width"]), int(image["height"]))
            if not path.is_file():
                raise data.UserError(
                    f"{folder} has no image {image['file_name']}, which {file} names"
                )
            yield str(path), size, of[image["id"]]
    except (KeyError, OSError, TypeError, ValueError) as e:
        raise data.UserError(f"{file} can't be read as annotations of COCO: {e!r}; mend it") from e


def read_boxes(path, size, objects, number, masked):
    boxes = torch.tensor([o["box"] for o in objects], dtype=torch.float).view(-1, 4)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor(2 * [*size]))  # what is in the image
    sides = boxes[:, 2:] - boxes[:, :2]
    area = torch.tensor([math.nan if o["area"] is None else o["area"] for o in objects])
    known = {
        "boxes": boxes,
        "labels": torch.tensor([number[o["name"]] for o in objects], dtype=torch.long),
    }
    known |= {
        key: torch.tensor([o[key] for o in objects], dtype=torch.bool)
        for key in ("crowd", "ignore")
    }
    known["area"] = area.where(area.isfinite(), sides.prod(1))
    if masked:
        masks = [torch.zeros(size[::-1], dtype=torch.bool), *(mask_of(o, size) for o in objects)]
        known["masks"] = torch.stack(masks)[1:]
    return image_of(path, size), known


def mask_of(o, size):
    """An object's mask, (H, W) bool, from COCO's polygons; a crowd's, which is run lengths, is left
    empty."""
    canvas = Image.new("1", tuple(size))
    for polygon in o["shape"] if not o["crowd"] else []:
        ImageDraw.Draw(canvas).polygon(polygon, 1)
    return torch.from_numpy(np.array(canvas))
