"""What a row asks for, made of forward hooks on the plain model."""

from support.generic_models import values


class Oracle:
    """Computes everything and puts, by forward hooks, what a row asks for in place of the branches' outputs.

    Keeps each branch's outputs by step, so it knows nothing of slots or of single-stream blocks' other modules.
    """

    def __init__(self, transformer, names):
        self.transformer, self.names, self.stored = transformer, names, [[] for _ in names]

    def __call__(self, arguments, decide):
        """decide(k, fresh, [previous, latest]) -> (the output to go on with, whether to store it)."""
        handles, new = [], [[] for _ in self.names]
        stores = [True] * len(self.names)

        def hook(k):
            def put(module, args, output):
                call = len(new[k])
                o, stores[k] = decide(k, output, [outputs[call] for outputs in self.stored[k][-2:]])
                new[k].append(o)
                return o
            return put

        try:
            for k, name in enumerate(self.names):
                handles.append(self.transformer.get_submodule(name).register_forward_hook(hook(k)))
            result = values(self.transformer(**arguments))
        finally:
            for handle in handles:
                handle.remove()
        for k, outputs in enumerate(new):
            if stores[k]:
                self.stored[k].append(outputs)
        return result


def over(f, *outputs):
    if isinstance(outputs[0], (tuple, list)):
        return tuple(None if parts[0] is None else f(*parts) for parts in zip(*outputs))
    return f(*outputs)


def forecast(e, previous, latest):
    return over(lambda now, before: (1 + e) * now - e * before, latest, previous)
