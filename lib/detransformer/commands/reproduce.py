"""`detransformer reproduce`, `figures` and `doctor`: the notebooks, and what this machine can do."""

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
    force: Annotated[bool, typer.Option("--force", help="Run also what has not changed.")] = False,
    output: Annotated[
        Path | None, typer.Option(parser=options.path, help="Folder of the run; results/PROFILE where not given.")
    ] = None,
) -> None:
    """Run the notebooks in order into results/<run>/: tables, figures, executed notebooks, manifest."""
    from detransformer.reproduce import reproduce

    reproduce(profile, only or [], force, output)


def figures(
    run: Annotated[str, typer.Argument(parser=with_home, help="Folder of a run.")] = "results/reference",
) -> None:
    """Draw a run's figures anew from its saved tables, executing every notebook with nothing measured."""
    from detransformer.reproduce import redraw

    redraw(run)


def doctor() -> None:
    """Say what this machine can do, and what to do about what it cannot."""
    from detransformer.doctor import examine, report

    print(report(examine()))
