"""How the command says what it cannot do."""

import typer
from typer.core import TyperGroup


class Commands(TyperGroup):
    """Reports an error in one line on stderr (exit code 2). After Ctrl-C it says how to go on (exit code 130)."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except typer.TyperException as error:  # a misspelt option, a value that does not parse
            message, code = error.format_message(), 2
        except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
            message, code = str(error), 2
        except KeyboardInterrupt as interruption:
            message, code = str(interruption) or "interrupted; the same command starts again", 130
        typer.echo(f"harmonica: {' '.join(message.split())}", err=True)
        raise typer.Exit(code)
