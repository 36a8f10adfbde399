"""`plait`: the verbs, and what happens to errors."""

import sys
import warnings

import typer

from plait.cli import (
    calibrate,
    chat,
    compare,
    debug,
    doctor,
    evaluate,
    explain,
    forward,
    invert,
    merge,
    overlap,
    price,
    runs,
    sample,
    search,
    train,
)
from plait.cli.output import say
from plait.errors import PlaitError

_INTERRUPTED = 130

app = typer.Typer(
    name="plait",
    help="Train, measure and sample large models. Start with: plait train stdlib_demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train_command)
app.command("runs")(runs.runs_command)
app.command("merge")(merge.merge_command)
app.command("evaluate")(evaluate.evaluate_command)
app.command("sample")(sample.sample_command)
app.command("chat")(chat.chat_command)
app.command("explain")(explain.explain_command)
app.command("debug")(debug.debug_command)
app.command("search")(search.search_command)
app.command("overlap")(overlap.overlap_command)
app.command("price")(price.price_command)
app.command("calibrate")(calibrate.calibrate_command)
app.command("compare")(compare.compare_command)
app.command("invert")(invert.invert_command)
app.command("forward")(forward.forward_command)
app.command("doctor")(doctor.doctor_command)


def main() -> None:
    """Run the command line; a user's mistake ends in one clean line and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except PlaitError as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output went away (`plait ... | head`): nothing to say, nobody to tell.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(f"{type(error).__name__}: {place}{error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(_INTERRUPTED)


def _show_warning(message: Warning | str, *_: object) -> None:
    say(f"warning: {message}")


if __name__ == "__main__":
    main()
