"""What `make mutants` changes and which tests have to notice: the paths of the tree, all in this one place."""

from typing import NamedTuple

SEED = 1  # of the draw, and of the tests' inputs
INTERPRETED = "kernels/triton_kernels/test_triton_interpreted.py::test_in_the_interpreter"  # the CUDA side, on the CPU
COMPILED = INTERPRETED.replace("test_in_the_interpreter", "test_compiles_for_every_gpu")


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
TRAIN, OPS, TRITON = DIT + "train/", HK + "ops/", HK + "triton_kernels/"
GRAPHS, GATED = HK + "graphs/", HK + "graphs/gated/"
TESTS_OF_TRAIN, TESTS_OF_OPS = "dit/train/", "kernels/ops/"
SDT, ORACLE, IMPORTANCE, TRAINING, WORTH, RECORDED, PIPELINES = (
    f"{TESTS_OF_TRAIN}test_{name}.py" for name in ("sdt", "oracle", "importance", "train", "method", "recorded",
                                                   "train_pipelines"))
METHOD = (SDT, ORACLE, IMPORTANCE, TRAINING, WORTH)
FORWARD = ("kernels/test_forward.py", "kernels/test_cache.py", "kernels/test_cache_setting.py",
           "kernels/test_static_buffers.py", "kernels/test_forward_gradients.py", "kernels/test_forward_input.py",
           "kernels/test_forward_compiled.py", "kernels/graphs/test_captured_caches.py", "dit/models/test_dit.py")
TRUNK = "kernels/test_trunk.py"
RESIDUAL_NORM, BLEND, PLAIN_OPS = (f"{TESTS_OF_OPS}test_{name}.py" for name in
                                   ("residual_norm", "blend_residual_norm", "plain_ops"))
CAPTURED = ("kernels/graphs/test_captured.py", "kernels/graphs/test_captured_caches.py",
            "kernels/graphs/test_recorded_weights.py", "dit/train/test_recorded.py")
WALKED = ("kernels/graphs/gated/test_on_cpu.py", "dit/sample/test_gated_sampling.py",
          "kernels/graphs/gated/test_on_cuda.py")
SAMPLE, SCHEDULERS = "dit/sample/test_sample.py", "dit/sample/test_schedulers.py"

PARTS = (
    Part("train", 30, {
        TRAIN + "budget.py": (TESTS_OF_TRAIN + "test_budget.py", *METHOD),
        TRAIN + "checkpoint.py": (TRAINING,),
        TRAIN + "frozen_model.py": (SDT, RECORDED, PIPELINES),
        TRAIN + "importance.py": (IMPORTANCE, ORACLE, TRAINING, WORTH),
        TRAIN + "log.py": (TESTS_OF_TRAIN + "test_log.py", TRAINING),
        TRAIN + "recipes.py": (TESTS_OF_TRAIN + "test_recipes.py",),
        TRAIN + "sdt.py": METHOD,
        TRAIN + "settings.py": (TRAINING, PIPELINES),
        TRAIN + "start.py": (*METHOD, PIPELINES),
        TRAIN + "student.py": (*METHOD, RECORDED),
        TRAIN + "train.py": (*METHOD, RECORDED, PIPELINES),
    }),
    Part("training a forecaster", 12, {TRAIN + file: (TESTS_OF_TRAIN + "test_train_forecaster.py",) for file in (
        "forecaster.py", "targets.py", "unrolled.py")}),
    Part("forward and cache", 14, {
        HK + "forward.py": (*FORWARD, TRUNK),
        HK + "cache.py": FORWARD,
        HK + "checks.py": (*FORWARD, TRUNK),
        HK + "trunk.py": (TRUNK, "dit/pipelines/adapters/test_trunk_forecast.py"),
    }),
    Part("schedule and router", 16, {
        DIT + "forecaster.py": ("dit/test_forecaster.py",),
        DIT + "resample.py": ("dit/test_resample.py",),
        DIT + "schedule.py": ("dit/test_schedule.py", "dit/test_forecaster.py", "dit/test_router.py", SAMPLE),
        DIT + "validate.py": ("dit/test_schedule.py", "dit/test_router.py", TRAINING),
        DIT + "router.py": ("dit/test_router.py", TESTS_OF_TRAIN + "test_recipes.py", SDT,
                            "dit/evaluate/test_pictures.py", "dit/test_cli.py"),
    }),
    Part("sample", 14, {
        DIT + "sample/sampling.py": (SAMPLE,),
        DIT + "sample/schedulers.py": (SCHEDULERS, SAMPLE),
        DIT + "sample/trajectory.py": (SCHEDULERS, "dit/sample/test_halves.py", "dit/sample/test_gated_sampling.py",
                                         SAMPLE),
    }),
    Part("evaluate", 10, {
        DIT + "evaluate/metrics.py": ("dit/evaluate/test_metrics.py", "dit/evaluate/test_compare.py"),
        DIT + "evaluate/compare.py": ("dit/evaluate/test_compare.py",),
        DIT + "evaluate/samples.py": ("dit/evaluate/test_samples.py", "dit/evaluate/test_compare.py"),
    }),
    Part("ops", 20, {
        OPS + "_arguments.py": (RESIDUAL_NORM, BLEND, PLAIN_OPS, "kernels/test_extension.py", INTERPRETED),
        OPS + "bias_gelu.py": (PLAIN_OPS, INTERPRETED),
        OPS + "blend_residual_norm.py": (BLEND, INTERPRETED),
        OPS + "cache_commit.py": (PLAIN_OPS, INTERPRETED),
        OPS + "guided_step.py": (PLAIN_OPS, INTERPRETED),
        OPS + "reference.py": (PLAIN_OPS, RESIDUAL_NORM, BLEND),
        OPS + "residual_norm.py": (RESIDUAL_NORM, INTERPRETED),
    }),
    Part("captured graphs", 14, {
        GRAPHS + "__init__.py": CAPTURED,
        GRAPHS + "captured.py": CAPTURED,
        GRAPHS + "keys.py": CAPTURED,
        GRAPHS + "recording.py": ("kernels/graphs/test_recording.py",),
        GRAPHS + "weights.py": ("kernels/graphs/test_recorded_weights.py",),
    }),
    Part("Triton", 8, {TRITON + file: (INTERPRETED, COMPILED) for file in (
        "bias_gelu.py", "cache_commit.py", "guided_step.py", "residual_norm.py", "residual_norm_backward.py")}),
    Part("gated", 18, {
        GATED + "plan.py": WALKED,
        GATED + "norm.py": (*WALKED, "kernels/graphs/gated/test_gated_norm.py"),
        GATED + "executor.py": WALKED,
        GATED + "on_cpu.py": WALKED,
        GATED + "on_cuda.py": ("kernels/graphs/gated/test_on_cuda.py",),
        GATED + "parts.py": (*WALKED, "kernels/graphs/gated/test_gated_norm.py"),
    }),
)

NAMED = (
    Named("λ replaced by ones", "train", TRAIN + "train.py",
          'training.importance = _check_finite(found, "λ", n)',
          "training.importance = torch.ones_like(found)"),
    Named("costs ignored", "train", TRAIN + "train.py",
          'c = torch.tensor([1.0] * len(router.branches) if settings.costs == "ones" else costs.branches)',
          "c = torch.tensor([1.0] * len(router.branches))"),
    Named("compare ignored", "train", TRAIN + "train.py",
          'channels=net.sample_shape[0] if settings.compare == "noise" else None)',
          "channels=None)"),
    Named("Adam's eps as usual", "train", TRAIN + "start.py",
          "optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], settings.lr, "
          "eps=settings.eps,",
          "optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], settings.lr, eps=1e-8,"),
    Named("initial logits a tenth", "train", TRAIN + "start.py",
          "logits = torch.randn(T, K, generator=generator).clamp(-LIMIT, LIMIT)",
          "logits = 0.1 * torch.randn(T, K, generator=generator).clamp(-LIMIT, LIMIT)"),
    Named("λ refreshed by trajectories", "train", TRAIN + "train.py",
          "if n == refreshed:",
          "if n % settings.refresh == 0:"),
    Named("no update", "train", TRAIN + "sdt.py",
          "optimizer.step()",
          "pass"),
)
