"""Kernels that start at once: each is forked from one process that has imported what notebooks import.

Importing torch, transformers and scipy takes some seven seconds of a core, which each of sixteen kernels would spend.
Jupyter starts and signals a stand-in (`main`), a process that lives as long as its kernel. Forking is safe, since the
process that forks has one thread.
"""

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache

from detransformer.cluster.line import listen
from detransformer.machine import die_with_parent

INTERRUPT = b"i"  # the stand-in's message; the end of its connection ends the kernel
# Idle threads of a kernel must not spin beside emulated devices.
VARIABLES = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
COMMAND = (sys.executable, "-m", "detransformer.kernels")


@cache
def forking_process() -> tempfile.TemporaryDirectory:
    """Starts the process that forks this one's kernels; returns the folder of its socket."""
    folder = tempfile.TemporaryDirectory(prefix="detransformer-", ignore_cleanup_errors=True)
    # Libraries read these when they are imported. A thread of OpenBLAS would make forking unsafe.
    settings = {"OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with listen(f"{folder.name}/kernels") as listener:
        subprocess.Popen(
            [*COMMAND, "fork", str(listener.fileno())],
            stdin=subprocess.DEVNULL,
            env=os.environ | VARIABLES | settings,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent, which ends its kernels
        )
    return folder


def fork_kernels(listener: socket.socket) -> None:
    """Forks a kernel for each stand-in that connects, until the parent ends."""
    die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for `_mind`
    sys.modules["tqdm.notebook"] = None  # tqdm must draw its bars as text: a saved widget could not be shown

    import ipykernel.kernelapp  # noqa: F401
    import matplotlib.figure  # noqa: F401  not pyplot, which needs a kernel to show its figures
    import scipy.stats  # noqa: F401

    import detransformer.answers  # noqa: F401  with torch, transformers and pandas

    gc.freeze()
    while True:
        stand_in = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _mind(stand_in)
        stand_in.close()


def _mind(stand_in: socket.socket) -> None:
    """Forks the kernel that `stand_in` asks for; ends it with its stand-in, and the stand-in with it."""
    with stand_in.makefile("rb") as asked:
        arguments, variables, folder = json.loads(asked.readline())
    pid = os.fork()
    if pid == 0:
        from ipykernel.kernelapp import launch_new_instance

        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        return launch_new_instance(arguments)
    ended = os.pidfd_open(pid)
    while ended not in select.select([stand_in, ended], [], [])[0]:
        number = signal.SIGINT if stand_in.recv(1) == INTERRUPT else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
        if number == signal.SIGKILL:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        stand_in.send(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def main() -> None:
    """The stand-in of a kernel: `python -m detransformer.kernels SOCKET ARGUMENT...`; or `fork`, with a descriptor."""
    path, *arguments = sys.argv[1:]
    if path == "fork":
        return fork_kernels(socket.socket(fileno=int(arguments[0])))
    die_with_parent()
    with socket.socket(socket.AF_UNIX) as kernel:
        kernel.connect(path)
        signal.signal(signal.SIGINT, lambda number, frame: kernel.send(INTERRUPT))
        kernel.sendall(json.dumps([arguments, dict(os.environ), os.getcwd()]).encode() + b"\n")
        code = kernel.recv(1)
        sys.exit(code[0] if code else 1)


if __name__ == "__main__":
    main()
