"""Two small classifiers of Fashion-MNIST: the judges of the bundled model's samples.

Their features stand in for Inception's in the metrics; their labels tell whether a sample shows the class asked for.
The second, of another architecture and seed, is there to confirm the order that the first finds.
`python -m harmonica_dit.fashion.classifier train NAME` writes the weights of one (fp16) into weights/, and the training
record beside it; `harmonica_dit.evaluate.fashion` then writes what it sees in the real images.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from harmonica_dit.fashion import data
from harmonica_dit.files import load_tensors, replacement, save_tensors

FOLDER = Path(__file__).parent / "weights"
JUDGES = ("plain", "residual")


def weights_of(name: str) -> Path:
    """The file of a bundled classifier."""
    return FOLDER / ("fashion_classifier.safetensors" if name == "plain" else f"fashion_classifier_{name}.safetensors")


def reference_of(name: str) -> Path:
    """The file of the training images' statistics in a bundled classifier's features."""
    return FOLDER / weights_of(name).name.replace("classifier", "reference")


def floor_of(name: str) -> Path:
    """The file of what the test images score in a bundled classifier's eyes."""
    return reference_of(name).with_name(reference_of(name).name.replace("reference", "floor")).with_suffix(".json")


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
                         nn.MaxPool2d(2))


class _Classifier(nn.Module):
    """A body whose parts run one after the other, ending in `num_features` features, and a linear head.

    Spatial features are the first 7 channels of the 7×7 map between the parts, as sFID takes 7 channels of a map of
    Inception's (Nash et al., 2021, arXiv 2103.03841).
    """

    num_features: int
    num_labels, num_spatial = len(data.CLASSES), 7 * 7 * 7
    body: nn.Sequential
    map_after: int  # so many parts of the body

    def features(self, images: Tensor) -> Tensor:
        """[n, F] for images [n, 1, 28, 28] in [-1, 1]."""
        return self.body(images)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [n, F], spatial features [n, 343] and logits [n, 10] for images [n, 1, 28, 28] in [-1, 1].

        Raises:
            ValueError: the images have another shape.
        """
        if images.shape[1:] != (1, 28, 28):
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected [n, 1, 28, 28] as in Fashion-MNIST")
        at_places = self.body[: self.map_after](images)
        features = self.body[self.map_after :](at_places)
        return features, at_places[:, :7].flatten(1), self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] for images [n, 1, 28, 28] in [-1, 1]."""
        return self.head(self.features(images))


class FashionClassifier(_Classifier):
    """Three 3×3 convolutions, a feature vector of 96, a linear head: 0.14 M parameters."""

    name, num_features, map_after = "bundled classifier", 96, 2

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(_convolution(1, 24), _convolution(24, 48), _convolution(48, 96), nn.Flatten(),
                                  nn.Dropout(0.2), nn.Linear(96 * 3 * 3, self.num_features, bias=False),
                                  nn.BatchNorm1d(self.num_features), nn.ReLU())
        self.head = nn.Linear(self.num_features, len(data.CLASSES))


class _Residual(nn.Module):
    """Two 3×3 convolutions of half the size and twice the channels, beside a 1×1 one."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
                                   nn.SiLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.beside = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.inner(x) + self.beside(x))


class ResidualClassifier(_Classifier):
    """Three residual blocks, the mean over the image as a feature vector of 80, a linear head: 0.11 M parameters."""

    name, num_features, map_after = "second bundled classifier", 80, 5

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 20, 3, 1, 1, bias=False), nn.BatchNorm2d(20), nn.SiLU(),
                                  _Residual(20, 20, 2), _Residual(20, 40, 2), _Residual(40, self.num_features, 2),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(self.num_features, len(data.CLASSES))


def make_classifier(name: str) -> FashionClassifier | ResidualClassifier:
    return {"plain": FashionClassifier, "residual": ResidualClassifier}[name]()


def load_classifier(name: str = "plain", path: Path | None = None) -> FashionClassifier | ResidualClassifier:
    """Loads a bundled classifier, or one of its kind at `path`, in float32, frozen and in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is broken, or holds another model.
    """
    path = weights_of(name) if path is None else path
    tensors, _ = load_tensors(path)
    classifier = make_classifier(name)
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} holds no Fashion-MNIST classifier: {error}") from None
    return classifier.eval().requires_grad_(False)


def train(name: str = "plain", folder=data.FOLDER, out: Path | None = None, epochs: int = 8, batch: int = 128,
          lr: float = 4e-3, seed: int = 0) -> dict:
    """Trains a classifier, writes both files, and returns the record with the written file's test accuracy.

    AdamW with a one-cycle rate and label smoothing 0.05. Images are mirrored and moved by up to two pixels at random.
    """
    out = weights_of(name) if out is None else out
    torch.manual_seed(seed)
    images, labels = data.load("train", folder)
    net = make_classifier(name).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02)
    updates = epochs * (len(images) // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.2)
    start, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    for _ in track(range(updates), "training"):
        if len(order) < batch:
            order = torch.randperm(len(images))
        chosen, order = order[:batch], order[batch:]
        loss = F.cross_entropy(net(_augment(images[chosen])), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    save_tensors(out, {name: p.half() if p.is_floating_point() else p for name, p in net.state_dict().items()}, {})

    shipped = load_classifier(name, out)
    with torch.inference_mode():
        test_images, test_labels = data.load("test", folder)
        predicted = torch.cat([shipped(part).argmax(1) for part in test_images.split(1000)])
    record = dict(test_accuracy=(predicted == test_labels).double().mean().item(), measured_on="the fp16 file",
                  parameters=sum(p.numel() for p in net.parameters()), epochs=epochs, batch=batch, lr=lr, seed=seed,
                  torch=torch.__version__, minutes=round((time.monotonic() - start) / 60, 1))
    with replacement(out.with_suffix(".json")) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _augment(images: Tensor) -> Tensor:
    """One mirroring and one shift for the whole batch: cheap, and varied enough over thousands of batches."""
    if torch.rand(()) < 0.5:
        images = images.flip(3)
    down, right = torch.randint(5, (2,)).tolist()
    return F.pad(images, (2, 2, 2, 2), value=-1.0)[:, :, down : down + 28, right : right + 28]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("command", choices=["train"])
    parser.add_argument("name", nargs="?", choices=JUDGES, default="plain")
    parser.add_argument("--folder", default=data.FOLDER, help="folder of the four idx files")
    args = parser.parse_args()
    print(train(args.name, args.folder, seed=JUDGES.index(args.name)))
