"""`enable_cache` on diffusers' real pipeline classes, and other caches beside it: `python -m bench.pipelines`.

    table.py       every pipeline of tests/support/many_pipes.py: what equals the plain one, and what is refused
    checks.py      what is done with each of them
    overhead.py    time, leftovers and lines of code of each method on several models
    rivals.py      the methods, as their users put them on a pipeline
    leftovers.py   whether a call with a method depends on the calls before it
    quality.py     errors of the methods' images on the bundled model, whose weights are trained
    fashion.py     that model as a `DiTPipeline`
"""
