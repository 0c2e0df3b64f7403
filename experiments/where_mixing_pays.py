"""Where is a model that is trained on mixed images better than one that is not?

    python experiments/where_mixing_pays.py --seeds 4              # a scan, hours on a CPU

The built-in images, with fewer images or more passes than in compare.py, with fewer of them mixed,
and with clutter: random colors in blocks of 2 px, which lower the object's contrast. The area
target is held against no mixing seed by seed; ± is half of a 95 % interval over seeds. To measure
all targets in one of these settings, give its flags to compare.py.
"""

import argparse
import statistics

import common
import compare

METHODS = ("no mixing", "area")

# What differs from the setting of compare.py: 60 images, 100 passes, all mixed, no clutter.
SETTINGS = [
    {},
    {"mix_prob": 0.5},
    {"passes": 300},
    {"passes": 300, "mix_prob": 0.5},
    {"images": 30, "passes": 300, "mix_prob": 0.5},
    {"images": 250, "passes": 80, "mix_prob": 0.5},
    {"clutter": 0.5},
    {"clutter": 0.5, "mix_prob": 0.5},
    {"clutter": 0.5, "passes": 300, "mix_prob": 0.5},
    {"clutter": 0.5, "images": 250, "passes": 80, "mix_prob": 0.5},
]


def main():
    parser = compare.make_parser(__doc__)
    args = parser.parse_args()
    scan = []
    for changes in SETTINGS:
        changed = argparse.Namespace(**{**vars(args), **changes})
        scan.append((changed, compare.make_jobs(changed, METHODS)))
    jobs = [job for _, own in scan for job in own.values()]
    jobs.sort(key=lambda job: job[1].seed)  # so that seeds are completed one after another
    common.run_jobs(compare.train_job, jobs, args.jobs, compare.is_done)

    rows = []
    for changed, own in scan:
        for model in args.models:
            top1 = {}
            for method in METHODS:
                top1[method] = [compare.read_top1(own[model, method, s]) for s in range(args.seeds)]
            row = [model, changed.images, changed.passes, f"{changed.mix_prob:.0%}"]
            row += [f"{changed.clutter:g}"]
            row += [f"{statistics.fmean(values):.2f}" for values in top1.values()]
            rows.append([*row, common.show_difference(top1["area"], top1["no mixing"])])
    header = ["model", "images", "passes", "mixed", "clutter", "no mixing", "area"]
    text = common.markdown_table([*header, "area - no mixing"], rows)
    text += f"\nTop-1 in percent, {args.seeds} seeds; {args.data}, batches of {args.batch_size}.\n"
    common.write_results("where_mixing_pays", text, args.runs)


if __name__ == "__main__":
    common.main(main)
