"""The suite on other Pythons, each in an environment of its own: `nox`, or `nox -s tests-3.12 -- tests/kernels`."""

import nox

nox.options.default_venv_backend = "uv|venv"  # uv fetches a Python that is not there
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@nox.session(python=PYTHONS)
def tests(session):
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "loadfile", *session.posargs,
                env={"OMP_NUM_THREADS": "1"})
