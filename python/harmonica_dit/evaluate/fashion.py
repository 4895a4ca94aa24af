"""What judges the bundled model's samples: its classifiers, what they see in the real images, and what these score.

`python -m harmonica_dit.evaluate.fashion NAME` writes the two files of a classifier into the folder of its weights: the
statistics of the 60,000 training images, and the floor, what the 10,000 test images score. Both are shipped, so that
judging needs no data set.
"""

import argparse
import json

from harmonica_dit.fashion import data
from harmonica_dit.fashion.classifier import JUDGES, floor_of, load_classifier, reference_of

from .metrics import Judge, cached_floor
from .reference import cached_reference, data_checksum

BATCH = 500


def fashion_judge(name: str = "plain") -> Judge:
    """A judge of the bundled model's samples, see `harmonica_dit.fashion.classifier.JUDGES`."""
    return Judge(load_classifier(name), reference_of(name))


def fashion_floor(name: str = "plain") -> dict[str, float | None]:
    """What the 10,000 test images score, see `cached_floor`."""
    return json.loads(floor_of(name).read_text())["scores"]


def write(name: str, folder=data.FOLDER) -> dict[str, float | None]:
    """Writes a classifier's reference and floor where they are not those of the images in `folder`; returns the floor.
    """
    classifier = load_classifier(name)
    train, test = (data_checksum(data.files(split, folder)) for split in ("train", "test"))
    images, _ = data.load("train", folder)
    reference = cached_reference(reference_of(name), classifier, images.split(BATCH), train)
    batches = zip(*(part.split(BATCH) for part in data.load("test", folder)))
    return cached_floor(floor_of(name), classifier, reference, batches, test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("name", choices=JUDGES)
    parser.add_argument("--folder", default=data.FOLDER, help="folder of the four idx files")
    args = parser.parse_args()
    print(json.dumps(write(args.name, args.folder), indent=1))
