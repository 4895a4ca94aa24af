"""The bundled example: a small DiT on Fashion-MNIST, with its weights, its routers and its training.

    data.py        the images
    recipe.py      the model's training
    classifier.py  the classifier that judges samples, and its training
    weights/ routers/ curve.json   made by these and by bench/curve.py
"""

from pathlib import Path

FASHION = dict(input_size=28, patch_size=4, in_channels=1, hidden_size=128, depth=8, num_heads=4, num_classes=10,
               learn_sigma=False)
FASHION_WEIGHTS = Path(__file__).parent / "weights" / "fashion_dit.safetensors"
CURVE = Path(__file__).parent / "curve.json"  # written by bench/curve.py

__all__ = ["CURVE", "FASHION", "FASHION_WEIGHTS"]
