"""Where is a model that is trained on mixed images better than one that is not?

    python experiments/where_mixing_pays.py --seeds 4              # a scan, hours on a CPU

The built-in images, with fewer images or more passes than in compare.py, with fewer of them mixed,
and with clutter: random colours in blocks of 2 px, which lower the object's contrast. The area
target is held against no mixing seed by seed; ± is half of a 95 % interval over seeds. To measure
all targets in one of these settings, give its flags to compare.py.
"""

import argparse
import itertools

import common
import compare

METHODS = ("no mixing", "area")

# Half of the images are mixed, as train.py's recipe for small datasets has it; all of them in
# compare.py, whose setting is the first but for that.
SETTINGS = [
    {"images": 60, "passes": 100, "mix_prob": 0.5},
    {"images": 60, "passes": 300, "mix_prob": 0.5},
    {"images": 30, "passes": 600, "mix_prob": 0.5},
    {"images": 250, "passes": 80, "mix_prob": 0.5},
    {"images": 60, "passes": 300, "mix_prob": 0.5, "clutter": 0.5},
    {"images": 60, "passes": 300, "mix_prob": 0.5, "clutter": 0.7},
    {"images": 250, "passes": 80, "mix_prob": 0.5, "clutter": 0.5},
    {"images": 60, "passes": 1000, "mix_prob": 0.5},
]


def main():
    parser = compare.make_parser(__doc__)
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    scan = []
    for changes in SETTINGS:
        changed = argparse.Namespace(**{**vars(args), **changes})
        scan.append((changed, compare.make_runs(changed, METHODS)))
    if not args.table:
        runs = [run for _, own in scan for run in own.values()]
        runs.sort(key=lambda run: run.settings.seed)  # seeds are completed one after another
        common.run_all(runs, args.jobs)

    rows = []
    for (changed, runs), model in itertools.product(scan, args.models):
        results = compare.read_results(runs, model, METHODS, args.seeds)
        if not results["area"]:
            continue
        (_, without, _), (_, area, difference) = common.make_rows(
            compare.values_of(results), "no mixing"
        )
        row = [model, changed.images, changed.passes, f"{changed.mix_prob:.0%}"]
        row += [f"{changed.clutter:g}", without, area, difference, len(results["area"])]
        rows.append(row)
    header = ["model", "images", "passes", "mixed", "clutter", "no mixing", "area"]
    text = common.markdown_table([*header, "area - no mixing", "seeds"], rows)
    text += f"\nTop-1 in percent; {args.data}, batches of {args.batch_size}.\n"
    common.write_results("where_mixing_pays", text, args.runs)


if __name__ == "__main__":
    common.main(main)
