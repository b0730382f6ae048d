"""The `detransformer` command. Each command parses words and calls the library; heavy modules load when one runs.

`main` is the one place where what a user can set right becomes one sentence on stderr and exit code 2. A notebook that
fails ends with 1, Ctrl-C with 130. `DETRANSFORMER_DEBUG=1` shows the traceback instead.
"""

import errno
import os
import signal
import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

import detransformer
from detransformer.settings import debugging

app = typer.Typer(
    help="DeTransformer, reproduced: decouple Transformers and run them over the devices you have.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def frame(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Say which version this is.")] = False,
) -> None:
    """DeTransformer, reproduced: decouple Transformers and run them over the devices you have."""
    if version:
        print(f"detransformer {detransformer.__version__}")
        raise typer.Exit


# --- Reproduction ------------------------------------------------------------------------------------------------


@app.command()
def reproduce(
    profile: Annotated[str, typer.Option(help="quick, reference, laptop, paper, or a YAML file's path.")] = "quick",
    only: Annotated[list[str] | None, typer.Option(help="Run only this notebook, e.g. 06; may be repeated.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run also what has not changed.")] = False,
    output: Annotated[str | None, typer.Option(help="Folder of the run; results/PROFILE where not given.")] = None,
) -> None:
    """Run the notebooks in order into results/<run>/: tables, figures, executed notebooks, manifest."""
    from detransformer.reproduce import reproduce

    reproduce(profile, only or [], force, output)


@app.command()
def figures(run: Annotated[str, typer.Argument(help="Folder of a run.")] = "results/reference") -> None:
    """Draw a run's figures anew from its saved tables, executing every notebook with nothing measured."""
    from detransformer.reproduce import redraw

    redraw(run)


# --- Models ------------------------------------------------------------------------------------------------------


@app.command()
def decouple(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint, or its name on the Hub.")],
    output: Annotated[str, typer.Option(help="Folder to write the decoupled checkpoint to.")],
    num_original_layers: Annotated[str, typer.Option(help="Nb, the layers that stay original.")] = "4",
    num_divisions: Annotated[str, typer.Option(help="Ndiv, the sub-blocks of a decoupled layer.")] = "4",
    attention_width: Annotated[str, typer.Option(help="full (published) or narrow.")] = "full",
    original_placement: Annotated[
        str, typer.Option(help="Original layers: last of each group (published), first, bottom, middle or top.")
    ] = "last",
    head: Annotated[str, typer.Option(help="auto, base, masked-lm, classification or question-answering.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")] = False,
) -> None:
    """Convert a BERT checkpoint to a decoupled one by slicing its weights."""
    from detransformer.checkpoints import HEADS, decouple_checkpoint
    from detransformer.parse import one_of, whole_number

    decouple_checkpoint(
        checkpoint,
        output,
        whole_number(num_original_layers, "--num-original-layers", 1),
        whole_number(num_divisions, "--num-divisions", 1),
        one_of(attention_width, "--attention-width", ("full", "narrow")),
        one_of(head, "--head", HEADS),
        force,
        original_placement=one_of(
            original_placement, "--original-placement", ("last", "first", "bottom", "middle", "top")
        ),
    )


@app.command()
def decompose(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a trained classifier: a BERT, GPT-2 or ViT.")],
    cluster: Annotated[str, typer.Option(help="Cluster file: a sub-model is made for each of its devices.")],
    output: Annotated[str, typer.Option(help="Folder to write sub-models, aggregator and plan to.")],
    task: Annotated[
        str | None, typer.Option(help="What it was trained on: CoLA, SST-2, MRPC or MNLI; a ViT: CIFAR-100.")
    ] = None,
    source: Annotated[str, typer.Option(help="Data: auto, mirror, hub or built-in.")] = "auto",
    budget: Annotated[
        str | None, typer.Option(help="Share of the model's FLOPs that a device may spend, such as 0.4.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of each device in MiB; its own where not given.")] = None,
    search: Annotated[str, typer.Option(help="bayesian, random or uniform.")] = "bayesian",
    fill: Annotated[
        bool, typer.Option("--fill/--no-fill", help="Grow what the search found to --budget or --memory, if given.")
    ] = True,
    evaluations: Annotated[str, typer.Option(help="Policies that are tried.")] = "50",
    latency_weight: Annotated[
        str, typer.Option(help="Loss that the whole model's time on the fastest device counts for.")
    ] = "1",
    seq_len: Annotated[str, typer.Option(help="Tokens of a request, where the model reads text.")] = "128",
    train_rows: Annotated[str | None, typer.Option(help="Training samples, at most; all where not given.")] = None,
    steps: Annotated[str, typer.Option(help="Optimizer steps by which each sub-model is calibrated.")] = "2000",
    batch_size: Annotated[str, typer.Option(help="Samples of a step.")] = "64",
    learning_rate: Annotated[str, typer.Option(help="Its peak, of AdamW.")] = "5e-4",
    rule: Annotated[str, typer.Option(help="Sample weights: boosting, published (Eq. 13 as printed) or none.")] = (
        "boosting"
    ),
    targets: Annotated[
        str, typer.Option(help="The model's decisions: hard (Eq. 14), or soft, probabilities.")
    ] = "hard",
    aggregator: Annotated[str, typer.Option(help="coformer, attention, senet, average or majority.")] = "coformer",
    seed: Annotated[str, typer.Option(help="Of policies, order and first weights.")] = "0",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")] = False,
) -> None:
    """Decompose a classifier into a sub-model for each device, calibrate them, and train what joins their answers."""
    from detransformer.coformer.commands import decompose_command

    decompose_command(**locals_without(locals(), "decompose_command"))


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a BERT or decoupled BERT with its masked-LM head.")],
    text: Annotated[list[str] | None, typer.Option(help="Text file or folder of .txt files; may be repeated.")] = None,
    source: Annotated[str, typer.Option(help="Where no --text is given: auto, mirror, hub or built-in.")] = "auto",
    seq_len: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "128",
    max_tokens: Annotated[str, typer.Option(help="Held-out text read, at most.")] = "200000",
    wire: Annotated[str | None, typer.Option(help="Also with messages of four devices in bfloat16 or int8.")] = None,
) -> None:
    """Held-out loss and perplexity of a pre-trained model, e.g. results/reference/models/bert-base-nb4-ndiv4."""
    from detransformer.training.commands import evaluate_command

    evaluate_command(checkpoint, text, source, seq_len, max_tokens, wire)


@app.command()
def calibrate(
    teacher: Annotated[str, typer.Argument(help="Folder of a BERT checkpoint with its masked-LM head and tokenizer.")],
    output: Annotated[str, typer.Argument(help="Folder to write the decoupled and trained model to.")],
    num_original_layers: Annotated[str, typer.Option(help="Nb, the layers that stay original.")] = "4",
    num_divisions: Annotated[str, typer.Option(help="Ndiv, the sub-blocks of a decoupled layer.")] = "4",
    attention_width: Annotated[str, typer.Option(help="full (published) or narrow.")] = "full",
    original_placement: Annotated[
        str, typer.Option(help="Original layers: last of each group (published), first, bottom, middle or top.")
    ] = "last",
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text file (an article a line) or folder of .txt files; may be repeated."),
    ] = None,
    source: Annotated[str, typer.Option(help="Where no --text is given: auto, mirror, hub or built-in.")] = "auto",
    steps: Annotated[str, typer.Option(help="Optimizer steps.")] = "2000",
    batch_size: Annotated[str, typer.Option(help="Sequences of a step.")] = "64",
    seq_len: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "128",
    learning_rate: Annotated[str, typer.Option(help="Its peak, of AdamW.")] = "2e-4",
    ce_weight: Annotated[str, typer.Option(help="Of the masked tokens' cross-entropy.")] = "1",
    kl_weight: Annotated[str, typer.Option(help="Of the divergence from the teacher's probabilities; 0: none.")] = "1",
    hidden_weight: Annotated[str, typer.Option(help="Of the error of the original layers' outputs; 0: none.")] = "1",
    temperature: Annotated[str, typer.Option(help="By which logits are divided in the divergence.")] = "2",
    precision: Annotated[str, typer.Option(help="auto, no (float32), bf16 or bf16-weights.")] = "auto",
    seed: Annotated[str, typer.Option(help="Of the order of text and of masks.")] = "0",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output folder.")] = False,
) -> None:
    """Decouple a BERT checkpoint and train it on, with the original as its teacher; interrupted, it goes on."""
    from detransformer.training.commands import calibrate_command

    calibrate_command(**locals_without(locals(), "calibrate_command"))


# --- Cluster -----------------------------------------------------------------------------------------------------

Model = Annotated[
    str, typer.Option(help="bert-base, bert-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a checkpoint folder.")
]
Cluster = Annotated[
    str | None, typer.Option(help="Cluster file (examples/) instead of --devices, --device and --bandwidth.")
]
Devices = Annotated[str | None, typer.Option(help="How many devices, all alike; 4 where not given.")]
Bandwidth = Annotated[
    str | None,
    typer.Option(help="Link rate in Mbps, several separated by commas; that of --cluster, or 125, where not given."),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Preset: rpi4b, jetson-nano, jetson-tx2, jetson-orin-nano; rpi4b where not given."),
]
Layers = Annotated[str, typer.Option(help="Nb of the decoupled model.")]
Divisions = Annotated[str, typer.Option(help="Ndiv of the decoupled model.")]
Width = Annotated[str, typer.Option(help="full (published) or narrow.")]
Tokens = Annotated[str, typer.Option(help="Tokens of a request.")]
Batch = Annotated[str, typer.Option(help="Sequences of a request.")]
Wires = Annotated[str, typer.Option(help="Number formats that messages may have: some of float32,bfloat16,int8.")]
Pace = Annotated[
    str,
    typer.Option(
        help="How long a share of a layer takes: measured (as efficient as such shares were on a core), or "
        "roofline (as its operations and bytes say)."
    ),
]
Memory = Annotated[str | None, typer.Option(help="Budget of each device in MiB; its own memory where not given.")]


@app.command()
def bench(
    model: Model = "bert-base",
    cluster: Cluster = None,
    devices: Devices = None,
    bandwidth: Bandwidth = None,
    methods: Annotated[
        str,
        typer.Option(
            help="all, or some of single,dp,pp,tp,sp,ulysses,galaxy,dtensor,auto,bp+tp,bp+sp,bp+allgather,bp+ulysses,"
            "bp+heads,bp+paper,bp+auto,bp+narrow."
        ),
    ] = "single,tp,sp,ulysses,bp+tp,bp+sp,bp+allgather,bp+paper,bp+auto",
    repeats: Annotated[str, typer.Option(help="Measured requests a row.")] = "5",
    output: Annotated[str | None, typer.Option(help="CSV file to save the rows to.")] = None,
    timeline: Annotated[str | None, typer.Option(help="CSV file to save what each device did when to.")] = None,
    num_original_layers: Layers = "4",
    num_divisions: Divisions = "4",
    attention_width: Width = "full",
    seq_len: Tokens = "128",
    batch_size: Batch = "1",
    device: Preset = None,
    wire: Annotated[str, typer.Option(help="Number format of messages: float32, bfloat16 or int8.")] = "float32",
    delay: Annotated[
        str | None, typer.Option(help="One-way delay between devices in ms, where the kernel has netem.")
    ] = None,
    jitter: Annotated[str | None, typer.Option(help="How far a packet's delay may lie from it, in ms.")] = None,
    memory: Memory = None,
    transport: Annotated[str, typer.Option(help="auto, namespaces or loopback.")] = "auto",
    time_scale: Annotated[str, typer.Option(help="auto, or how many times slower all runs.")] = "auto",
    pace: Pace = "measured",
) -> None:
    """Measure methods on emulated devices: one row a method and bandwidth."""
    from detransformer.cluster.commands import bench_command

    bench_command(**locals_without(locals(), "bench_command"))


@app.command()
def run(
    cluster: Annotated[str, typer.Option(help="Cluster file; examples/ has some to begin with.")],
    model: Annotated[str, typer.Option(help="Folder of the checkpoint, on every host a copy of its own.")],
    host: Annotated[
        str | None, typer.Option(help="Which device of the file this host is; by its addresses where not given.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="What the model is asked; needs a tokenizer in its folder.")] = None,
    image: Annotated[str | None, typer.Option(help="What an ensemble of `decompose` looks at: a picture file.")] = None,
    context: Annotated[str | None, typer.Option(help="The passage that a question is about.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Instead of a text so many random tokens; 128 by default.")] = None,
    method: Annotated[
        str,
        typer.Option(help="auto (the fastest plan of all), or one by name: single, tp, sp, bp+tp, bp+paper, ..."),
    ] = "auto",
    plan: Annotated[str | None, typer.Option(help="JSON file with the plan, of `plan --output`.")] = None,
    wire: Wires = "float32",
    memory: Memory = None,
    repeats: Annotated[str, typer.Option(help="Measured requests.")] = "5",
    new_tokens: Annotated[str, typer.Option(help="Tokens by which a GPT-2 goes on.")] = "64",
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the whole model on the first device (or this machine).")
    ] = False,
    output: Annotated[str | None, typer.Option(help="JSON file for answer, latency and plan (first device).")] = None,
    wait: Annotated[str, typer.Option(help="Seconds to wait for the other hosts.")] = "120",
    threads: Annotated[
        str | None, typer.Option(help="Of each device's compute; all cores of a host, 1 where emulated, by default.")
    ] = None,
    transport: Annotated[str, typer.Option(help="Emulated only: auto, namespaces or loopback.")] = "auto",
    time_scale: Annotated[str, typer.Option(help="Emulated only: auto, or how many times slower all runs.")] = "auto",
) -> None:
    """Answer a request over a cluster's devices: start the same command on every host of the file.

    The order does not matter. The first device of the file decides what is asked and how it is planned, and prints the
    answer; the others wait for it. If a host does not come or is lost, all end with one sentence that names it. Of a
    file with `emulated: true` all devices are processes of this machine, and the command is started once.
    """
    from detransformer.cluster.run import run_command

    run_command(**locals_without(locals(), "run_command"), run_ensemble=_run_ensemble)


def _run_ensemble(*arguments) -> dict:
    from detransformer.coformer.ensemble_requests import run_emulated  # late: it loads torch

    return run_emulated(*arguments)


@app.command()
def serve(
    cluster: Annotated[str, typer.Option(help="Cluster file; examples/ has some to begin with.")],
    model: Annotated[str, typer.Option(help="Folder of the checkpoint, on every host a copy of its own.")],
    host: Annotated[
        str | None, typer.Option(help="Which device of the file this host is; by its addresses where not given.")
    ] = None,
    listen: Annotated[str, typer.Option(help="Address of the HTTP server, on the file's first device.")] = "127.0.0.1",
    port: Annotated[str, typer.Option(help="Its port.")] = "8000",
    token_file: Annotated[
        str | None,
        typer.Option(help="File with the token that requests show; DETRANSFORMER_TOKEN, or a new one, by default."),
    ] = None,
    secret_file: Annotated[
        str | None, typer.Option(help="Real hosts: file with the secret of the cluster, the same on all.")
    ] = None,
    method: Annotated[str, typer.Option(help="auto (the fastest plan of all), or one by name, as of run.")] = "auto",
    plan: Annotated[str | None, typer.Option(help="JSON file with the plan, of `plan --output`.")] = None,
    seq_len: Annotated[str, typer.Option(help="Tokens of a usual request, which is planned for.")] = "128",
    queue: Annotated[str, typer.Option(help="Requests that wait at most; further ones are refused with 503.")] = "64",
    batch: Annotated[str, typer.Option(help="Requests answered together, at most.")] = "8",
    threads: Annotated[
        str | None, typer.Option(help="Of each device's compute; all cores of a host, 1 where emulated, by default.")
    ] = None,
    time_scale: Annotated[str, typer.Option(help="Emulated only: how many times slower all runs.")] = "1",
) -> None:
    """Serve a model over HTTP on a cluster's devices; what comes and goes among them is planned around.

    On real hosts the same command is started on every one. The first device of the file has the HTTP server; while it
    is there, every request that was accepted is answered, by the devices that are left.
    """
    from detransformer.service.commands import serve_command

    serve_command(**locals_without(locals(), "serve_command"))


@app.command()
def plan(
    model: Model = "bert-base",
    cluster: Cluster = None,
    devices: Devices = None,
    bandwidth: Bandwidth = None,
    memory: Memory = None,
    profile: Annotated[str | None, typer.Option(help="File made by `detransformer profile`.")] = None,
    device: Preset = None,
    num_original_layers: Layers = "4",
    num_divisions: Divisions = "4",
    attention_width: Width = "full",
    seq_len: Tokens = "128",
    batch_size: Batch = "1",
    wire: Wires = "float32",
    explain: Annotated[bool, typer.Option("--explain", help="Say why this plan, and what limits it.")] = False,
    output: Annotated[str | None, typer.Option(help="JSON file to save the chosen plan to.")] = None,
    pace: Pace = "measured",
) -> None:
    """Predict every plan for a model on a cluster and say which is chosen."""
    from detransformer.cluster.commands import plan_command

    plan_command(**locals_without(locals(), "plan_command"))


@app.command()
def profile(
    output: Annotated[str, typer.Option(help="JSON file to save the profile to.")],
    model: Model = "bert-base",
    cluster: Cluster = None,
    devices: Devices = None,
    bandwidth: Bandwidth = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="host (measured, the default) or a preset: rpi4b, jetson-nano, jetson-tx2, jetson-orin-nano."
        ),
    ] = None,
    num_original_layers: Layers = "4",
    num_divisions: Divisions = "4",
    attention_width: Width = "full",
) -> None:
    """Measure what the planner needs: operations on this host and collectives over the links."""
    from detransformer.cluster.commands import profile_command

    profile_command(**locals_without(locals(), "profile_command"))


def locals_without(values: dict, name: str) -> dict:
    """A command's own arguments: its locals but the function it imports."""
    return {key: value for key, value in values.items() if key != name}


# --- This machine ------------------------------------------------------------------------------------------------


@app.command()
def doctor() -> None:
    """Say what this machine can do, and what to do about what it cannot."""
    from detransformer.doctor import examine, report

    print(report(examine()))


# --- The frame ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a user error in one sentence, 1 a failed notebook, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    owner = os.getpid()

    def unwind(*_):
        # A terminated run unwinds like an interrupted one, so that its temporary files and namespaces go. Children that
        # a library forks (pyroute2 does, and terminates them) inherit this handler and must not clean up for us.
        sys.exit(143) if os.getpid() == owner else os._exit(143)

    signal.signal(signal.SIGTERM, unwind)
    try:
        command = typer.main.get_command(app)
        code = command.main(arguments or ["--help"], prog_name="detransformer", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debugging():
            raise
        code, message = explain(error, arguments)
        if message is None:
            raise
        print(f"detransformer: {message}", file=sys.stderr)
    if code == 130:
        print("detransformer: interrupted; what was finished is kept.", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception, arguments: list[str]) -> tuple[int, str | None]:
    """(exit code, sentence) for an error a user can do something about; (1, None) for a defect of ours."""
    if is_disk_full(error):
        place = f" while writing {error.filename}" if getattr(error, "filename", None) else ""
        return 2, f"The disk is full{place}; free some space or write elsewhere (nothing half-written was left)."
    if isinstance(error, TyperException):
        return (
            2,
            f"{_sentence(error.format_message()).rstrip('.')}; see `detransformer {_command_of(arguments)}--help`.",
        )
    if isinstance(error, Abort):
        return 130, "stopped."
    # by name: their modules are loaded only where they are needed
    if any(kind.__name__ in ("NotebookFailed", "DeviceError") for kind in type(error).__mro__):
        return 1, str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return 2, f"{error.filename} does not exist; check the path."
    if isinstance(error, PermissionError) and error.filename:
        return (
            2,
            f"{error.filename} may not be read or written by you; choose another place or change its permissions.",
        )
    if isinstance(error, OSError) and error.errno and error.filename:
        return 2, f"{error.filename}: {error.strerror}; choose another path."
    if isinstance(error, (ValueError, OSError)):
        return 2, _sentence(str(error))
    return 1, None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one it came from, is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # as safetensors' and torch's own writers say it
            return True
        error = error.__cause__ or error.__context__
    return False


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _command_of(arguments: list[str]) -> str:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    return "".join(f"{word} " for word in arguments[:1] if word in names)


if __name__ == "__main__":
    main()
