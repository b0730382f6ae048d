"""`detransformer reproduce`, `figures` and `doctor`: run the notebooks, redraw a run, check this machine."""

from pathlib import Path
from typing import Annotated

import typer

from detransformer.commands import options
from detransformer.files import with_home


def reproduce(
    profile: Annotated[
        str, typer.Option(parser=with_home, help="quick, reference, laptop, paper, or a YAML file's path.")
    ] = "quick",
    only: Annotated[list[str] | None, typer.Option(help="Run only this notebook, e.g. 06; may be repeated.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Rerun unchanged notebooks, too.")] = False,
    output: Annotated[
        Path | None, typer.Option(parser=options.path, help="Folder of the run; default: results/PROFILE.")
    ] = None,
) -> None:
    """Run the notebooks in order into results/<run>/: tables, figures, executed notebooks, manifest."""
    from detransformer.reproduce import reproduce

    reproduce(profile, only or [], force, output)


def figures(
    run: Annotated[str, typer.Argument(parser=with_home, help="Folder of a run.")] = "results/reference",
    only: Annotated[list[str] | None, typer.Option(help="Draw only this notebook, e.g. 06; may be repeated.")] = None,
) -> None:
    """Redraw a run's figures from its saved tables: executes its notebooks without measuring."""
    from detransformer.reproduce import redraw

    redraw(run, only or [])


def doctor() -> None:
    """Check what this machine can do, and name a remedy for each limit."""
    from detransformer.doctor import examine, report

    print(report(examine()))
