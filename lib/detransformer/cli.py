"""The `detransformer` command: its subcommands and exit codes.

`main` alone turns an error that the user can correct into one sentence on stderr and exit code 2. A failed notebook or
a closed pipe ends with 1, a signal with 128 plus its number. `DETRANSFORMER_DEBUG=1` shows the traceback instead.
"""

import errno
import os
import signal
import sys
import tempfile
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

import detransformer
from detransformer.commands import options
from detransformer.commands.bench import bench
from detransformer.commands.calibrate import calibrate
from detransformer.commands.decompose import decompose
from detransformer.commands.decouple import decouple
from detransformer.commands.plan import plan, profile
from detransformer.commands.reproduce import doctor, figures, reproduce
from detransformer.commands.run import run
from detransformer.commands.serve import serve
from detransformer.settings import debugging, leave_group

MAX_TEMPORARY = 48  # bytes of the temporary folder's path
ENDS = {129: "its terminal was closed", 130: "interrupted", 143: "terminated"}

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.callback(invoke_without_command=True)
def frame(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")] = False,
) -> None:
    """DeTransformer, reproduced: decouple Transformers and run them over the devices you have."""
    if version:
        print(f"detransformer {detransformer.__version__}")
        raise typer.Exit


for command in (reproduce, figures, decouple, decompose, calibrate, bench, run, serve, plan, profile, doctor):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits.

    Exit codes: 0 for success, 2 for a user error (one sentence), 1 for a failed notebook, 130 for Ctrl-C, 143 for
    SIGTERM, 129 for a closed terminal.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    _unwind_on_signals()
    if left := leave_group():
        print(f"detransformer: {left} of another launcher is not used: this is one process.", file=sys.stderr)
    try:
        _shorten_temporary_folder()
        command = typer.main.get_command(app)
        code = command.main(arguments or ["--help"], prog_name="detransformer", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:  # from a signal, or from typer if nobody reads stdout
        code = end.code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _stdout_is_read():
            sys.exit(1)
        if debugging():
            raise
        code, message = explain(error)
        if message is None:
            raise
        print(f"detransformer: {message}", file=sys.stderr)
    if code in ENDS:
        print(f"detransformer: {ENDS[code]}; what was finished is kept.", file=sys.stderr)
    _stdout_is_read()
    sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Replaces a closed stdin, stdout or stderr by /dev/null; stdout escapes characters that its encoding lacks."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _shorten_temporary_folder() -> None:
    """Uses /tmp if the temporary folder's path is long: it holds workers' sockets, whose paths have 107 bytes."""
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPORARY:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"


def _unwind_on_signals() -> None:
    """Makes a terminated run unwind like an interrupted one, which removes its temporary files and namespaces.

    Children that a library forks (pyroute2 also terminates them) inherit the handler and must not clean up for us.
    """
    owner = os.getpid()

    def unwind(number, frame):
        sys.exit(128 + number) if os.getpid() == owner else os._exit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        signal.signal(signal.SIGHUP, unwind)


def _stdout_is_read() -> bool:
    """Flushes stdout; if nobody reads it, /dev/null replaces it for Python's last flush, and the result is False."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return False
    return True


def explain(error: Exception) -> tuple[int, str | None]:
    """(exit code, sentence) for an error that a user can correct; (1, None) for a bug."""
    if is_disk_full(error):
        place = f" while writing {error.filename}" if getattr(error, "filename", None) else ""
        return 2, f"The disk is full{place}; free some space or write elsewhere (no partial file was left)."
    if isinstance(error, typer.BadParameter) and (found := options.sentence(error)):
        return 2, _sentence(found)
    if isinstance(error, TyperException):
        words = _sentence(error.format_message()).rstrip(".")
        context = getattr(error, "ctx", None)
        return 2, f"{words}; see `{context.command_path if context else 'detransformer'} --help`."
    if isinstance(error, Abort):
        return 130, "stopped."
    # by name: their modules are imported on demand
    if any(kind.__name__ in ("NotebookFailed", "DeviceError") for kind in type(error).__mro__):
        return 1, str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return 2, f"{error.filename} does not exist; check the path."
    if isinstance(error, PermissionError) and error.filename:
        return 2, f"you may not read or write {error.filename}; choose another place or change its permissions."
    if isinstance(error, OSError) and error.errno and error.filename:
        return 2, f"{error.filename}: {error.strerror}; choose another path."
    if isinstance(error, (ValueError, OSError)):
        return 2, _sentence(str(error))
    return 1, None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one of its causes, is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # safetensors' and torch's writers
            return True
        error = error.__cause__ or error.__context__
    return False


def _sentence(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
