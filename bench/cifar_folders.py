"""CIFAR-100 as folders of pictures, train/<superclass>/<class>/000.png and test/..., for the logs and benches here.

    python bench/cifar_folders.py cifar100                      # all; downloads to --data-root, unless it is there
    python bench/cifar_folders.py cifar20k --per-class 200      # the first 200 training pictures of each class
    python bench/cifar_folders.py health/cifar100 --per-class 100

The test pictures are all there in each. --data cifar100 (torchvision's files) gives the scripts the same pictures in
another order, so other batches.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def write_folders(images, folder, per_class=None):
    """The first pictures of each class of an Images, a folder per label depth, as PNGs. Returns how many."""
    written = {}
    for i, labels in enumerate(images.labels.tolist()):
        place = folder.joinpath(*(names[label] for names, label in zip(images.class_names, labels)))
        count = written.get(place, 0)
        if per_class is None or count < per_class:
            place.mkdir(parents=True, exist_ok=True)
            images.picture(i).save(place / f"{count:03d}.png")
            written[place] = count + 1
    return sum(written.values())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="written here; refused if it is there")
    p.add_argument("--per-class", type=int, help="training pictures of each class; all without it")
    p.add_argument("--data-root", default="data", help="where torchvision's cifar-100-python is, or comes to")
    args = p.parse_args()
    if args.folder.exists():
        p.error(f"{args.folder} is there: give another folder")
    try:
        train, test = common.load_data("cifar100", args.data_root)
    except common.Stop as stop:
        p.error(str(stop))
    print(f"{write_folders(train, args.folder / 'train', args.per_class)} training and "
          f"{write_folders(test, args.folder / 'test')} test pictures in {args.folder}")


if __name__ == "__main__":
    main()
