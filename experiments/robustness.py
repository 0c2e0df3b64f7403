"""What aligned targets do for robustness and calibration (a claim of the paper).

    python experiments/robustness.py                     # trains what is needed, minutes on a CPU
    python experiments/robustness.py --data /imagenet --checkpoints area/best.pt tl_align/best.pt \\
        --folders /imagenet-a /imagenet-r /imagenet-c/fog/3          # the first is the baseline

Top-1 on validation images: as they are; under FGSM and PGD, whose radius, of 255 levels, bounds the
change of each channel; with some of the patches blanked; with Gaussian noise, whose standard
deviation is relative to the range of values; and blurred by a Gaussian, whose standard deviation is
relative to the image's side. Then the expected calibration error (lower is better). --folders has
further images in folders named by class; only the classes that a folder has are answers. ± is half
of a 95 % interval over seeds.
"""

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional as TF

import common
import compare
import data
import train
from data import UserError

BATCH_SIZE = 48  # random starts and masks repeat in every batch, so results depend on it

# ------------------------------------------------------------------------------------------------
# What is done to images, (B, 3, S, S) in [0, 1].


def predict_logits(model, images):
    return model(data.normalize(255 * images))


def attack(model, images, targets, radius, steps):
    """PGD from a random start (Madry et al. 2018); with one step from the image, FGSM (Goodfellow
    et al. 2015). radius: of 255 levels."""
    radius = radius / 255
    step_size = radius if steps == 1 else 2.5 * radius / steps
    attacked = images
    if steps > 1:
        noise = data.uniform(images.shape, "attack").to(images.device)
        attacked = (images + radius * (2 * noise - 1)).clamp(0, 1)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        loss = F.cross_entropy(predict_logits(model, attacked), targets)
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = attacked.detach() + step_size * gradient.sign()
        attacked = attacked.clamp(images - radius, images + radius).clamp(0, 1)
    return attacked


def blank(images, share, patch_size):
    """Fill a share of the patches, chosen at random, with ImageNet's mean colour."""
    grid_size = images.shape[-1] // patch_size
    rand = data.uniform((len(images), grid_size**2), "blank", share)
    is_blank = rand.argsort(1).argsort(1) < share * grid_size**2
    is_blank = is_blank.view(-1, 1, grid_size, grid_size).to(images)
    mean = data.channel_statistics(images.device)[0]
    return torch.lerp(images, mean.expand_as(images), F.interpolate(is_blank, images.shape[-2:]))


def add_noise(images, deviation):
    noise = torch.randn(images.shape, generator=data.generator("noise", deviation))
    return (images + deviation * noise.to(images.device)).clamp(0, 1)


def blur(images, deviation):
    sigma = deviation * images.shape[-1]
    return TF.gaussian_blur(images, [2 * round(2 * sigma) + 1] * 2, [sigma, sigma])


def variants(model, images, targets):
    """The images after everything that is tried, by name."""
    yield "clean", images
    for radius in (1, 4):
        yield f"FGSM {radius}/255", attack(model, images, targets, radius, steps=1)
        yield f"PGD {radius}/255", attack(model, images, targets, radius, steps=10)
    for share in (0.25, 0.5, 0.75):
        yield f"{share:.0%} blanked", blank(images, share, model.patch_size)
    for deviation in (0.1, 0.2):
        yield f"noise {deviation}", add_noise(images, deviation)
    for deviation in (1 / 32, 2 / 32):
        yield f"blur {deviation:.3f}", blur(images, deviation)


# ------------------------------------------------------------------------------------------------
# What is measured, in percent.


def measure_variants(model, dataset, settings):
    """Top-1 of each variant, and the calibration error."""
    loader = data.make_data_loader(data.ValCrops(dataset, settings.img_size), settings, BATCH_SIZE)
    correct = {}
    for images, targets in data.batches_on_device(loader, settings.device):
        for name, changed in variants(model, images / 255, targets):
            with torch.no_grad():
                hits = predict_logits(model, changed).argmax(1) == targets
            correct[name] = correct.get(name, 0) + hits.sum().item()
    results = {name: 100 * count / len(dataset) for name, count in correct.items()}
    logits, targets = common.predict(model, dataset, settings)
    results["calibration error"] = common.calibration_error(logits, targets)
    return results


def measure_folder(model, folder, classes, settings):
    """Top-1 of the images in a folder, among the classes that it has. Raises UserError."""
    names = [name for name in data.find_classes(folder) if name in classes]
    if not names:
        raise UserError(f"{folder} has no folder named by a class, such as {classes[0]!r}")
    dataset = data.ImageFiles(data.find_images(folder, names))
    logits, targets = common.predict(model, dataset, settings)
    numbers = torch.tensor([classes.index(name) for name in names], device=logits.device)
    return 100 * (logits[:, numbers].argmax(1) == targets).float().mean().item()


def measure(settings, checkpoint, args):
    """Everything of one checkpoint, a dict by name."""
    print(f"measuring {checkpoint}", flush=True)
    datasets = compare.open_images(args.data, args.clutter)
    chosen = common.choose(datasets.val, args.eval_images, "val")
    dataset = Subset(datasets.val, chosen)
    model = train.build_model(settings, len(datasets.classes))
    train.load_weights(model, checkpoint, datasets.classes)
    model.to(settings.device).eval().requires_grad_(False)
    results = measure_variants(model, dataset, settings)
    for folder in args.folders:
        results[folder] = measure_folder(model, folder, datasets.classes, settings)
    return results


def measure_trained(args):
    """Train models, and measure them: {model: {method: [a dict for each seed]}}."""
    runs = compare.make_runs(args, compare.PAIR)
    common.run_all(compare.train_run, runs.values(), args.jobs)
    results = {model: {method: [] for method in compare.PAIR} for model in args.models}
    for (model, method, _), settings in runs.items():
        results[model][method].append(measure(settings, f"{settings.out}/last.pt", args))
    return results


def measure_checkpoints(args):
    """The same of --checkpoints, as if each were a method."""
    val = compare.open_images(args.data, args.clutter).val
    results = {}
    for path in args.checkpoints:
        argv = ["--eval", path, "--data", args.data, "--device", args.device]
        settings = train.parse_args(argv)
        train.fill_defaults(settings, data.median_size(val), len(val))
        results[path] = [measure(settings, path, args)]
    return {"checkpoints": results}


def make_table(model, results):
    """results: {method: [a dict for each seed]}, the baseline first."""
    baseline, *others = results
    rows = []
    for name in results[baseline][0]:
        values = {method: [seed[name] for seed in seeds] for method, seeds in results.items()}
        differences = [common.show_difference(values[m], values[baseline]) for m in others]
        rows.append([name, *map(common.show, values.values()), *differences])
    header = [f"{model}, percent", *results, *[f"{method} - {baseline}" for method in others]]
    return common.markdown_table(header, rows)


def main():
    parser = compare.make_parser(__doc__)
    add = parser.add_argument
    add("--checkpoints", nargs="+", metavar="FILE", help="measure these; then nothing is trained")
    add("--folders", nargs="+", default=[], metavar="FOLDER", help="of further images")
    count_or_all = train.number(int, 0)
    add("--eval-images", type=count_or_all, default=500, help="to validate on; 0: all [500]")
    args = parser.parse_args()
    num_images = len(compare.open_images(args.data, args.clutter).val)
    args.eval_images = min(args.eval_images or num_images, num_images)
    results = measure_checkpoints(args) if args.checkpoints else measure_trained(args)
    text = "".join(make_table(model, methods) + "\n" for model, methods in results.items())
    text += f"{args.eval_images} validation images. "
    text += "" if args.checkpoints else common.describe(args)
    common.write_results("robustness", text + "\n", args.runs)


if __name__ == "__main__":
    common.main(main)
