"""What `make mutants` changes and which tests have to notice: the paths of the tree, all in this one place."""

from typing import NamedTuple

SEED = 1  # of the draw, and of the tests' inputs
MAY_BE_MISSING = ("train/test_oracle.py", "train/test_method.py")  # tests in the making
INTERPRETED = "kernels/test_triton_interpreted.py::test_in_the_interpreter"  # the ops' CUDA side, on the CPU


class Part(NamedTuple):
    """A part of the tree, from whose lines so many changes are drawn.

    tests: for each of its files those under tests/ that run against a change in it, the quickest and nearest first.
    """

    name: str
    draws: int
    tests: dict[str, tuple[str, ...]]


class Named(NamedTuple):
    """A change that is always made: the line `old`, which the file has to have exactly once, becomes `new`."""

    what: str
    part: str
    file: str
    old: str
    new: str


HK, DIT = "harmonica_kernels/", "python/harmonica_dit/"
TRAIN, OPS, GATED = DIT + "train/", HK + "ops/", HK + "gated/"
METHOD = ("train/test_sdt.py", "train/test_oracle.py", "train/test_importance.py", "train/test_train.py",
          "train/test_method.py")
FORWARD = ("test_forward.py", "test_graph.py", "test_dit.py")
KERNELS = ("kernels/test_residual_norm.py", "kernels/test_blend_residual_norm.py", "kernels/test_extension.py")
WALKED = ("gated/test_gated_walk.py", "gated/test_gated_sampling.py", "gated/test_gated_cuda.py")

PARTS = (
    Part("train", 30, {
        TRAIN + "budget.py": ("train/test_budget.py", *METHOD),
        TRAIN + "checkpoint.py": ("train/test_train.py",),
        TRAIN + "importance.py": ("train/test_importance.py", "train/test_oracle.py", "train/test_train.py",
                                  "train/test_method.py"),
        TRAIN + "log.py": ("train/test_train.py",),
        TRAIN + "sdt.py": METHOD,
        TRAIN + "settings.py": ("train/test_train.py", "train/test_pipelines.py"),
        TRAIN + "train.py": (*METHOD, "train/test_recorded.py", "train/test_pipelines.py"),
        TRAIN + "walk.py": (*METHOD, "train/test_recorded.py"),
    }),
    Part("forward and cache", 14, {
        HK + "forward.py": FORWARD,
        HK + "cache.py": FORWARD,
    }),
    Part("schedule and router", 16, {
        DIT + "schedule.py": ("test_schedule.py", "test_router.py", "test_sample.py"),
        DIT + "router.py": ("test_router.py", "train/test_sdt.py", "evaluate/test_pictures.py", "test_cli.py"),
    }),
    Part("sample", 14, {
        DIT + "sample/sampling.py": ("test_sample.py",),
        DIT + "sample/schedulers.py": ("test_schedulers.py", "test_sample.py"),
        DIT + "sample/trajectory.py": ("test_schedulers.py", "gated/test_gated_sampling.py", "test_sample.py"),
    }),
    Part("evaluate", 10, {
        DIT + "evaluate/metrics.py": ("evaluate/test_metrics.py", "evaluate/test_compare.py"),
        DIT + "evaluate/compare.py": ("evaluate/test_compare.py",),
    }),
    Part("ops", 20, {
        OPS + "_arguments.py": (*KERNELS, "kernels/test_plain_ops.py", INTERPRETED),
        OPS + "bias_gelu.py": ("kernels/test_plain_ops.py", INTERPRETED),
        OPS + "blend_residual_norm.py": ("kernels/test_blend_residual_norm.py", INTERPRETED),
        OPS + "cache_commit.py": ("kernels/test_plain_ops.py", INTERPRETED),
        OPS + "guided_step.py": ("kernels/test_plain_ops.py", INTERPRETED),
        OPS + "reference.py": ("kernels/test_plain_ops.py", *KERNELS),
        OPS + "residual_norm.py": ("kernels/test_residual_norm.py", INTERPRETED),
    }),
    Part("gated", 14, {
        GATED + "plan.py": WALKED,
        GATED + "walk.py": WALKED,
        GATED + "pieces.py": (*WALKED, "gated/test_gated_norm.py"),
    }),
)

NAMED = (
    Named("λ replaced by ones", "train", TRAIN + "train.py",
          'training.importance = normalised(_finite(found, "λ", n))',
          "training.importance = torch.ones_like(found)"),
    Named("costs ignored", "train", TRAIN + "train.py",
          'costs = torch.tensor(router.flops.branches if settings.costs == "flops" else [1.0] * len(router.branches))',
          "costs = torch.tensor([1.0] * len(router.branches))"),
    Named("compare ignored", "train", TRAIN + "train.py",
          'channels=net.sample_shape[0] if settings.compare == "noise" else None)',
          "channels=None)"),
    Named("Adam's eps as usual", "train", TRAIN + "train.py",
          "optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], settings.lr, eps=1e-16,",
          "optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], settings.lr, eps=1e-8,"),
    Named("initial logits a tenth", "train", TRAIN + "train.py",
          "logits = torch.randn(T, K, generator=generator).clamp(-LIMIT, LIMIT)",
          "logits = 0.1 * torch.randn(T, K, generator=generator).clamp(-LIMIT, LIMIT)"),
    Named("λ refreshed by trajectories", "train", TRAIN + "train.py",
          "if n == 0 or n * T // C > (n - 1) * T // C:",
          "if n % C == 0:"),
    Named("no update", "train", TRAIN + "sdt.py",
          "optimizer.step()",
          "pass"),
)
