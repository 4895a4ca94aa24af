"""A pipeline of diffusers with a cache, beside the same call without.

    python examples/pipeline.py black-forest-labs/FLUX.1-dev "a red cat" --speedup 2
"""

import argparse
import time

import torch
from diffusers import DiffusionPipeline

import harmonica_dit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of a pipeline")
    parser.add_argument("prompt")
    parser.add_argument("--speedup", type=float, default=2.0, help="in FLOPs")
    parser.add_argument("--steps", type=int, default=28)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
    pipe.to("cuda" if cuda else "cpu")

    def call(name: str) -> float:
        start = time.perf_counter()
        image = pipe(args.prompt, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0)).images[0]
        image.save(f"{name}.png")
        return time.perf_counter() - start

    call("uncached")  # the first call is slower than the others
    plain = call("uncached")
    harmonica_dit.enable_cache(pipe, args.speedup)
    call("cached")    # and here the first one looks at the model
    print(f"uncached {plain:.2f} s, cached {call('cached'):.2f} s: look at uncached.png and cached.png")
    print(harmonica_dit.summary(pipe))


if __name__ == "__main__":
    main()
