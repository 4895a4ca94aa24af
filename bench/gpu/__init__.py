"""The parts of bench/gpu.sh: what only a GPU can show. Each is a module with `run(record)`; see `__main__`."""
