"""The command `megatron-exp`: all subcommands, and the rule for exit codes."""

import logging
import sys
import warnings
from typing import NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from megatron_exp import __version__
from megatron_exp.cli import convert, cpdt, data, look, os_errors, publish, run, submit
from megatron_exp.errors import UserError
from megatron_exp.parallel.launched import read_launcher

EXIT_USER_ERROR = 2

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="megatron-exp",
    help="Many controlled pretraining experiments in one training run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _module in (data, run, cpdt, publish, convert, look, submit):
    _module.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megatron-exp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Also show debugging messages."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version and stop."),
) -> None:
    console = Console(stderr=True)
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False, markup=False) if console.is_terminal else logging.StreamHandler()
    )
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(message)s", handlers=[handler])
    _quieten_libraries()


def _quieten_libraries() -> None:
    """Keep libraries' advice about themselves out of the log; what a missing optional part means is said by `doctor` and in run.json."""
    for name in ("matplotlib", "numba", "torch", "asyncio", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")


def entry(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 the user's mistake (one paragraph), 75 requeue, 1 our bug or the machine's (traceback).

    What the system refuses of a path counts as the user's mistake, but not in one process of several: a scheduler starts those again, perhaps on a
    node whose disks are in order.
    """
    try:
        app(arguments)
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        text = os_errors.mistake(error)
        if text is None or read_launcher().world_size > 1:
            raise
        logger.debug("Where it happened:", exc_info=error)
        _refuse(text)


def _refuse(text: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)
    sys.exit(EXIT_USER_ERROR)
