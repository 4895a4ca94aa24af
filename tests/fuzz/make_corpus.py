"""Makes the files of corpus/: `python -m fuzz.make_corpus`. They are small, and whole."""

import argparse
from pathlib import Path

import torch

from harmonica_dit.costs import Seconds
from harmonica_dit.evaluate.reference import Gaussian, Reference
from harmonica_dit.files import save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import BranchForecaster, TrunkForecaster, taylor
from harmonica_dit.pipelines.conditions import Encoder
from harmonica_dit.pipelines.prompts import Prompts
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule
from harmonica_dit.train.log import COLUMNS

from .files import CORPUS, TARGETS, K, T, net, training

NAMES, FLOPS = tuple(f"blocks.{k // 2}.{('attn', 'mlp')[k % 2]}" for k in range(K)), Flops((3.0, 6.0) * 2, 2.0)
STEPS = (999.0, 666.0, 333.0, 0.0)


def place(target: str, name: str):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    return CORPUS / target / f"{name}{Path(TARGETS[target].file).suffix}"


def main() -> None:
    torch.manual_seed(0)
    table = torch.randn(T, K)
    Router(table, NAMES, FLOPS, STEPS).save(place("router", "plain"))
    Router(table, NAMES, FLOPS, STEPS, extrapolation=torch.rand(T, K), model="tiny", beta=1e-3, seed=1,
           resolution=(4, 4), architecture={"class": "DiT", "K": 4, "D": 8}, recipe="paper").save(
        place("router", "full"))
    some, whole = table > 0, torch.tensor([[True], [False], [True], [False]]).expand(T, K)
    some[0] = True
    Schedule(some, NAMES, FLOPS).save(place("schedule", "plain"))
    Schedule(whole.clone(), NAMES, FLOPS, torch.ones(T, K), "FORA", "tiny", STEPS, 1.5, (4, 4), {"class": "DiT"},
             "ddim", (0, 1, 2)).save(place("schedule", "full"))
    Schedule(whole.clone(), NAMES, FLOPS, runs=(2, 2)).save(place("schedule", "runs"))
    Schedule(whole.clone(), NAMES, FLOPS, forecaster=BranchForecaster(1)).save(place("forecast", "branches"))
    steps = [True, False, True, False]
    Schedule(whole.clone(), NAMES, FLOPS, timesteps=STEPS, scheduler="ddim", forecaster=taylor(steps, 1, 64)).save(
        place("forecast", "taylor"))
    learned = TrunkForecaster(torch.randn(T, 2, 8), torch.randn(T, 2, 8), torch.randn(T, 8), torch.randn(T, 8), 32,
                              "learned")
    Schedule(whole.clone(), NAMES, FLOPS, forecaster=learned).save(place("forecast", "learned"))
    Prompts(("a cat", "a dog"), "tiny", torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.long)).save(
        place("prompts", "two"))
    encoder = Encoder(lambda prompt: None)
    encoder._known = {"a": (torch.ones(1, 2, 4), None, [torch.ones(1, 2), "x"]), "b": {"e": torch.zeros(1, 3)}}
    encoder.save(place("encoded", "two"), {"model": "tiny"})
    save_tensors(place("samples", "two"), {"images": torch.randn(2, *net().sample_shape)}, dict(
        labels=[0, 1], method="a", run="", process=1, seconds=0.5, ran=[[True] * K] * T))
    going_on = training()
    for parameter in going_on.router.parameters():
        parameter.grad = torch.ones_like(parameter)
    going_on.optimizer.step()
    going_on.trajectory = 1
    going_on.save(place("training", "one"), {"seed": 0})
    gaussian = Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), 9)
    Reference(gaussian, gaussian, torch.zeros(4, 3).half(), "0123", "4567").save(place("reference", "small"))
    save_tensors(place("weights", "tiny"), net().state_dict(), {})
    published = {"routers": {f"{i}.prob": row.clone() for i, row in enumerate(table)}, "opt": None}
    torch.save(published, place("published", "plain"))
    torch.save(published | {"args": argparse.Namespace(model="DiT-S/8", image_size=256)}, place("published", "args"))
    Seconds((1e-3,) * K, 2e-3, 1e-4, 1e-3, 1e-4, 7e-3, {"device": "cpu", "batch": 8}).save(place("costs", "four"))
    place("texts", "two").write_text("a cat\n\n  ein Bär, gemalt\n")
    lines = [COLUMNS, *([n, *(0.5 for _ in COLUMNS[1:])] for n in range(3))]
    place("csv", "three").write_text("".join(",".join(map(str, line)) + "\r\n" for line in lines))


if __name__ == "__main__":
    main()
