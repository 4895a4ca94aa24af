"""Training a router: time and peak memory of a trajectory of SDT, ours beside the same loop in plain PyTorch.

    python bench/bench_sdt.py [--model DiT-S/2] [--images 4] [--steps 4] [--rounds 5] [--dtype bfloat16]
                              [--device cpu] [--threads 2]

Candidates:

plain: an eager loop as one would write it: frozen model, teacher without grad, blending and cache by tensor operations.
published: the same as HarmoniCa's code has it: model not frozen, teacher with grad.
ours: `train_trajectory`, on CUDA replayed from graphs that the rounds share, as in a training. ours, eager: without
graphs. ours, checkpointing: with each body recomputed in the backward.

Each round runs every candidate once, in turn; the table has medians of each round's ratio to ours. Seconds are the
processor's where one thread runs on a CPU, which a busy machine disturbs less, else those of a clock on the wall. Peak
memory is that of a process of its own for each candidate, weights included: on a CPU the growth of its resident set
over what it had before the model was made, on CUDA what was allocated. That all of them do the same work is checked:
equal losses.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

import harmonica_kernels as hk
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.sample.trajectory import call
from harmonica_dit.train.sdt import train_trajectory
from harmonica_dit.train.student import Student, new_executor
from harmonica_dit.train.train import checkpointed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.plain_dit import PlainDiT, modulate  # noqa: E402  (the tests' reference model is this benchmark's too)

CANDIDATES = ("plain", "published", "ours", "ours, eager", "ours, checkpointing")
THRESHOLD, BETA = 0.5, 1e-9  # so small that the losses compared are the errors


class Problem:
    """One model with random weights, one batch of noise, one set of scores, for every candidate alike."""

    def __init__(self, args):
        config = CONFIGS[args.model] | dict(input_size=32, in_channels=4)
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(0)
        with self.device:
            self.net = DiT(**config, name=args.model).eval().requires_grad_(False)
        for p in self.net.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
        with torch.device("meta"):
            self.plain = PlainDiT(**config).eval()
        self.plain.load_state_dict(self.net.state_dict(), assign=True)  # one set of weights
        self.flops = count_flops(self.net)
        self.labels = (torch.arange(args.images) % self.net.num_classes).to(self.device)
        self.noise = image_noise(0, 0, args.images, self.net.sample_shape).to(self.device)
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(args.steps, len(self.net.branches), generator=generator)
        # of each candidate, for graphs know the bodies that they were recorded with, and the cache
        self.executors = {name: call if "eager" in name else new_executor(self.net, args.steps) for name in CANDIDATES}
        self.cache = hk.FeatureCache()

    def run(self, candidate: str) -> list[float]:
        """One trajectory; the losses of its iterations."""
        autocast = None if self.args.dtype == "float32" else self.args.dtype
        trajectory = Trajectory(self.net, self.labels, steps=self.args.steps, autocast=autocast)
        if not candidate.startswith("ours"):
            return self.plain_loop(trajectory, published=candidate == "published")
        router = Router(self.logits, self.net.branch_names, self.flops, tuple(trajectory.timesteps),
                        threshold=THRESHOLD).to(self.device)
        optimizer = torch.optim.AdamW(router.parameters(), 1e-2, weight_decay=0)
        ones = torch.ones(max(self.logits.shape), device=self.device)
        trajectory.run = self.executors[candidate]
        with checkpointed(self.net) if "checkpointing" in candidate else nullcontext():
            seen = train_trajectory(router, Student(router, trajectory, self.noise, cache=self.cache), optimizer,
                                    ones[: len(self.logits)], ones[: self.logits.shape[1]], BETA)
        return seen.losses.tolist()

    def plain_loop(self, trajectory: Trajectory, published: bool) -> list[float]:
        rows = [torch.nn.Parameter(row.clone().to(self.device)) for row in self.logits]
        optimizer = torch.optim.AdamW(rows, 1e-2, weight_decay=0)
        weights = [p for name, p in self.plain.named_parameters() if name != "pos_embed"]
        for p in weights:
            p.requires_grad_(published)
        cache, losses = [None] * self.logits.shape[1], []
        with torch.no_grad():
            x = trajectory.advance(self.predict(trajectory, self.noise, 0, None, cache), 0, self.noise)
        for s in range(1, trajectory.steps):
            with torch.set_grad_enabled(published):
                target = self.predict(trajectory, x, s)
            r = rows[s].sigmoid()
            output = self.predict(trajectory, x, s, r, cache)
            loss = (output - target).square().mean() + BETA * r.sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                rows[s].clamp_(-5, 5)
            x = trajectory.advance(output, s, x)
            losses.append(loss.item())
        for p in weights:
            p.requires_grad_(False)
            p.grad = None
        return losses

    def predict(self, trajectory, x, s, r=None, cache=None):
        """The guided output on the first three channels, as the trajectory's own."""
        y = torch.cat([self.labels, torch.full_like(self.labels, self.net.num_classes)])
        t = trajectory.scheduler.timesteps[s].to(self.device).expand(len(y))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.dtype != "float32"):
            out = self.forward(torch.cat([x, x]), t, y, r, cache).float()
        conditional, unconditional = out.chunk(2)
        guided = unconditional[:, :3] + trajectory.model.scale * (conditional[:, :3] - unconditional[:, :3])
        return torch.cat([guided, conditional[:, 3:]], 1)

    def forward(self, x, t, y, r, cache):
        """The plain model's; with a cache, each branch's output is blended with the cached one by r and stored."""
        model = self.plain
        if cache is None:
            return model(x, t, y)
        renewed = [True] * len(cache) if r is None else (r.detach() > THRESHOLD).tolist()
        x, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y)
        for i, block in enumerate(model.blocks):
            rows = block.adaLN_modulation(c).chunk(6, 1)
            for j, (norm, body) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
                k, (shift, scale, gate) = 2 * i + j, rows[3 * j : 3 * j + 3]
                o = body(modulate(norm(x), shift, scale))
                if r is not None:
                    o = r[k] * o + (1 - r[k]) * cache[k]
                x = x + gate[:, None] * o
                if renewed[k]:
                    cache[k] = o.detach()
        x = model.final_layer(x, c)
        B, g, p = x.shape[0], model.grid, model.patch
        return x.reshape(B, g, g, p, p, model.out).permute(0, 5, 1, 3, 2, 4).reshape(B, model.out, g * p, g * p)


def resident() -> int:
    """Bytes of this process's largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(candidate: str, args) -> int:
    """Bytes that one trajectory takes at most, weights included; in a process of its own."""
    before = resident()
    Problem(args).run(candidate)
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else resident() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(CONFIGS), default="DiT-S/2")
    parser.add_argument("--images", type=int, default=4, help="the model sees twice as many rows")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak", choices=CANDIDATES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak(args.peak, args)))
        return
    peaks = {}
    for candidate in CANDIDATES:
        child = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--peak", candidate], check=True,
                               capture_output=True, text=True)
        peaks[candidate] = json.loads(child.stdout.splitlines()[-1])
    problem, times, losses = Problem(args), [], {}
    clock = time.process_time if (args.device, args.threads) == ("cpu", 1) else time.perf_counter
    for _ in range(args.rounds + 1):
        times.append({})
        for candidate in CANDIDATES:
            start = clock()
            losses[candidate] = torch.tensor(problem.run(candidate))  # on CUDA this waits
            times[-1][candidate] = clock() - start
    tolerance = 1e-2 if args.dtype == "float32" else 0.2
    for candidate in CANDIDATES:
        torch.testing.assert_close(losses[candidate], losses["ours"], rtol=tolerance, atol=0)
    print(f"{args.model}, {2 * args.images} rows, T = {args.steps}, {args.dtype}, {args.device}, {args.threads} "
          f"threads, {args.rounds} interleaved rounds after one of warm-up")
    print(f"  {'':<22}{'seconds':>9}{'time / ours':>13}{'peak GiB':>10}{'ours / peak':>13}")
    for candidate in CANDIDATES:
        ratio = median(row[candidate] / row["ours"] for row in times[1:])
        print(f"  {candidate:<22}{median(row[candidate] for row in times[1:]):>9.2f}{ratio:>13.3f}"
              f"{peaks[candidate] / 2**30:>10.2f}{peaks['ours'] / peaks[candidate]:>13.3f}", flush=True)


if __name__ == "__main__":
    main()
