"""How the command says what it cannot do: in one line, with options as they are typed."""

import os
import re
import threading
from contextlib import contextmanager, nullcontext

import typer
from typer.core import TyperGroup

from .launcher import started

# arguments whose options are called otherwise
ALIASES = {"name": "--model", "net": "--model", "embeddings": "--prompts", "weights": "--inception",
           "order": "--forecast"}
OUT_OF_MEMORY = "out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED"


class Commands(TyperGroup):
    """Reports an error in one line on stderr (exit code 2). After Ctrl-C it says how to go on (exit code 130)."""

    def invoke(self, context):
        try:
            with _ranks() if started() > 1 else nullcontext(), without_writing_errors_of_threads():
                return super().invoke(context)
        except typer.TyperException as error:  # a misspelt option, a value that does not parse
            message, code = error.format_message(), 2
        except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
            message, code = as_typed(reason(error), self.options(context)), 2
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
                raise
            message, code = "out of memory: take a smaller --batch", 2
        except KeyboardInterrupt as interruption:
            message = as_typed(str(interruption), self.options(context)) \
                or "interrupted; the same command starts again"
            code = 130
        who = f"rank {os.environ['RANK']}: " if started() > 1 else ""
        typer.echo(f"harmonica: {who}{' '.join(message.split())}", err=True)
        raise typer.Exit(code)

    def options(self, context) -> dict[str, str]:
        """The invoked command's options by the arguments that they become."""
        command = self.commands.get(context.invoked_subcommand or "")
        return {} if command is None else {option.name: max(option.opts, key=len) for option in command.params
                                           if option.opts[0].startswith("-")}


@contextmanager
def without_writing_errors_of_threads():
    """What TensorBoard's thread cannot write is raised in the main one again, which says it."""
    hook = threading.excepthook
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else hook(error)
    try:
        yield
    finally:
        threading.excepthook = hook


def _ranks():
    from .ranks import launched  # with PyTorch, for which help does not wait

    return launched()


def reason(error: Exception) -> str:
    """An error's message, without the number that the system gives to it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def as_typed(message: str, options: dict[str, str]) -> str:
    """An error's message that names arguments of Python, with the options in their place.

    Arguments stand at its beginning, before a colon, or anywhere before an equals sign: "steps: got 0", "vae=".
    """
    known = options | {name: option for name, option in ALIASES.items() if option in options.values()}
    option = lambda found: known.get(found[0], found[0])
    head = re.match(r"(\w+(, \w+)*): ", message)
    if head:
        message = re.sub(r"\w+", option, head[0]) + message[head.end():]
    return re.sub(r"(?<![\w./-])\w+(?==)", option, message)
