# `make demo` and `make test` set up .venv by themselves. They need Python ≥ 3.10, its venv module and headers, and a
# C++ compiler: on Debian and Ubuntu, apt-get install python3-venv python3-dev g++. An existing .venv keeps its Python,
# whatever PYTHON says; to change the Python, remove .venv.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test wheel types mutants interruptions fuzz sanitize soak bench instructions api

demo: $(VENV)/.installed-dit
	$(VENV)/bin/harmonica demo

# More processes than cores take longer where two cores are one core's two threads.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $$(nproc) --maxprocesses 8 --dist loadfile

# What the README types, from the wheel, in a clean environment without a compiler: minutes, and not part of `test`.
wheel:
	bash tests/wheel.sh $(PYTHON)

types: $(VENV)/.installed-dev
	$(VENV)/bin/python -m mypy

# Whether the tests notice single changed lines, see docs/testing.md.
mutants: $(VENV)/.installed-mutants
	$(VENV)/bin/python tests/mutants

# Trainings and comparisons that are killed again and again, see docs/reliability.md.
interruptions: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.interruptions

# What is fast beside its peers, one table and build/bench.json, see docs/performance.md; OPTIONS=--full for more.
bench: $(VENV)/.installed-dev
	@mkdir -p build
	$(VENV)/bin/python -m pytest bench/bench_all.py -q --benchmark-quiet --benchmark-json=build/bench.json $(OPTIONS)

# What the CPU's kernels execute, counted by callgrind and compared with what is kept, see docs/testing.md.
instructions: $(VENV)/.installed-test
	$(VENV)/bin/python -m bench.instructions $(OPTIONS)

# Hostile files and arguments, 70,000 a target: an hour. Of some only, and how often: python -m fuzz --help.
# atheris is built for some Pythons only (3.0.0: 3.11 to 3.13), so no extra names it.
fuzz: $(VENV)/.installed-test
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz

# The kernels' tests under GCC's three sanitizers; and ten thousand forwards whose memory must not grow (soak).
sanitize: $(VENV)/.installed-test
	for kind in address undefined thread; do bash tests/sanitize.sh $$kind || exit 1; done

soak: $(VENV)/.installed-test
	PYTHONPATH=tests $(VENV)/bin/python tests/soak.py

# The reference of the API, from the docstrings, into build/api.
api: $(VENV)/.installed-dev
	$(VENV)/bin/pdoc -d google -o build/api harmonica_kernels harmonica_dit

# The demo installs fewer packages than the tests.
$(VENV)/.installed-%: pyproject.toml constraints.txt setup.py CMakeLists.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'Python 3.10 or newer is needed; name one with `make PYTHON=python3.12 $(MAKECMDGOALS)`' >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo 'No virtual environment could be made in $(VENV): on Debian and Ubuntu, apt-get install python3-venv' >&2; exit 1; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
