"""The command line: wrong input is one sentence with exit code 2, no traceback, and nothing half-written."""

import errno
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import get_args

import pandas as pd
import pytest
import torch
import typer
from transformers import BertConfig, BertForMaskedLM

from detransformer import cli
from detransformer.commands import options
from detransformer.commands.serve import _listener, _token
from detransformer.files import atomic_write, repository_root
from detransformer.settings import cache_folder

EXAMPLES = repository_root() / "examples"
SIZES = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, vocab_size=64)


def run_cli(*arguments, **environment):
    command = [sys.executable, "-c", "from detransformer.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def call(capsys, *arguments) -> tuple[int, str]:
    """(exit code, stderr) of the command in this process, which saves the imports."""
    capsys.readouterr()  # what fixtures printed is not the command's
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code, capsys.readouterr().err


def assert_one_sentence(code, stderr, *words):
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert code == 2, stderr
    assert len(lines) == 1 and lines[0].startswith("detransformer: ") and lines[0].endswith("."), stderr
    for word in words:
        assert word in lines[0], stderr


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return tmp_path / "bert"


def test_help_is_fast_and_lists_the_commands():
    start = time.perf_counter()
    done = run_cli("--help")
    assert done.returncode == 0 and time.perf_counter() - start < 2  # under a second on an idle machine
    for command in ("reproduce", "decouple", "figures", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_help_imports_nothing_heavy():
    heavy = {"torch", "pandas", "matplotlib", "transformers"}
    code = f"import sys; from detransformer import cli; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["frobnicate", "--help"]),
        (["figures", "--fast"], ["--fast"]),
        (["figures", "/nowhere/at/all"], ["/nowhere/at/all", "results/quick"]),
        (["reproduce", "--profile", "slow"], ["'slow'", "laptop, paper, quick"]),
        (["reproduce", "--profile", "/nowhere/p.yaml"], ["/nowhere/p.yaml"]),
        (["decouple", "x"], ["--output"]),
        (["decouple", "x", "--output", "y", "--num-divisions", "four"], ["--num-divisions four", "whole number"]),
        (["decouple", "x", "--output", "y", "--num-divisions", "0"], ["--num-divisions 0", "1 or more"]),
        (["decouple", "x", "--output", "y", "--num-original-layers", "-1"], ["--num-original-layers -1"]),
        (["decouple", "x", "--output", "y", "--attention-width", "thin"], ["thin", "full, narrow"]),
        (["decouple", "x", "--output", "y", "--head", "two"], ["two", "masked-lm"]),
        (["bench", "--methods", "tp,magic"], ["magic", "bp+narrow"]),
        (["bench", "--wire", "float8"], ["float8", "int8"]),
        (["bench", "--wire", "int8,nothing=float32"], ["--wire int8,nothing=float32", "bfloat16"]),
        (["bench", "--delay", "-1"], ["--delay -1"]),
        (["bench", "--devices", "0"], ["--devices 0 is out of range; give 1 or more."]),
        (["bench", "--devices", "9"], ["9 devices are more than the 8 that a bench emulates"]),
        (["bench", "--repeats", "2.5"], ["--repeats 2.5 is not a whole number; give 1 or more."]),
        (["bench", "--jitter", "nan"], ["--jitter nan is out of range; give one from 0 to 10000."]),
        (["bench", "--methods", ","], ["--methods is empty"]),
        (["bench", "--bandwidth", "125,x"], ["--bandwidth x is not a number"]),
        (["bench", "--time-scale", "inf"], ["--time-scale inf is out of range; give one from 0.1 to 64."]),
        (["bench", "--delay", "5", "--transport", "loopback"], ["delay and jitter", "leave them out"]),
        (["bench", "--devices", "8", "--methods", "bp+tp", "--transport", "loopback"], ["8 devices", "8 divisions"]),
        (["bench", "--timeline", "/"], ["--timeline /", "file name"]),
        (["bench", "--cluster", "/nowhere/c.yaml"], ["/nowhere/c.yaml", "examples/"]),
        (["bench", "--cluster", EXAMPLES / "four-pis.yaml"], ["lists real hosts", "detransformer run"]),
        (["bench", "--cluster", EXAMPLES / "unequal.yaml", "--delay", "5"], ["--delay 5", "leave one out"]),
        (["plan", "--cluster", EXAMPLES / "unequal.yaml", "--devices", "3"], ["--devices 3", "with --cluster"]),
        (["run", "--cluster", "c", "--model", "m", "--text", "caf\udce9"], [r"--text 'caf\udce9' is not UTF-8 text"]),
        (["plan", "--wire", "float8"], ["--wire float8", "bfloat16"]),
        (["plan", "--bandwidth", "125,500", "--output", "x.json"], ["--output x.json", "several"]),
        (["plan", "--advise", "--output", "x.json"], ["--output x.json", "--advise compares several"]),
        (["plan", "--output", "/proc/plan.json"], ["/proc/plan.json"]),
        (["plan", "--output", "/dev/null/plan.json"], ["/dev/null/plan.json"]),
        (["profile", "--output", "x", "--device", "toaster"], ["--device toaster", "jetson-tx2"]),
    ],
)
def test_wrong_words_are_one_sentence(capsys, arguments, words):
    assert_one_sentence(*call(capsys, *arguments), *words)


def test_choices_are_those_of_the_library():
    """Where its constants load torch, an option names them once more."""
    from detransformer.coformer import aggregator, booster, search
    from detransformer.training.config import PRECISIONS
    from detransformer.training.data import SOURCES

    known = {"--aggregator": aggregator.KINDS, "--rule": booster.RULES, "--targets": booster.TARGETS}
    known |= {"--precision": PRECISIONS, "--source": SOURCES}
    commands = typer.main.get_command(cli.app).commands
    found = {p.opts[0]: p.type_descriptor.choices for name in ("decompose", "calibrate") for p in commands[name].params}
    assert {name: set(found[name]) for name in known} == {name: set(words) for name, words in known.items()}
    assert set(found["--search"]) == set(search.METHODS) - {search.FITTED}


@pytest.mark.slow
def test_bench_prints_a_table_and_a_summary(bert, tmp_path):
    """Over loopback, on another wire: TP, SP and one device stand in float32 beside it."""
    options = ["--bandwidth", "100", "--methods", "bp+auto", "--wire", "int8", "--seq-len", "8", "--repeats", "1"]
    options += ["--devices", "2", "--transport", "loopback", "--num-original-layers", "2"]
    files = ["--output", tmp_path / "rows.csv", "--timeline", tmp_path / "timeline.csv"]
    done = run_cli("bench", "--model", bert, *options, *files, DETRANSFORMER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "rows.csv")
    found = list(zip(rows["method"], rows["wire"], strict=True))
    assert found == [("single", "float32"), ("tp", "float32"), ("sp", "float32"), ("bp+auto", "int8")]
    assert {"rank", "what", "start_s", "stop_s"} <= set(pd.read_csv(tmp_path / "timeline.csv").columns)
    assert "modelled link" in done.stdout and "8 ar" in done.stdout and "over limit" in done.stdout
    assert not (tmp_path / "rows.csv.rows.json").exists()


@pytest.mark.parametrize("how", [["--wire", "float32"], ["--wire", "float32,int8", "--pace", "roofline"]])
def test_plan_of_a_cluster_file(capsys, tmp_path, how):
    """Unequal devices: a row for each set of devices, and why the slow ones take no part; the plan can be kept."""
    options = ["--cluster", str(EXAMPLES / "unequal.yaml"), *how, "--explain", "--output", tmp_path / "p.json"]
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *map(str, options)])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "unequal devices: 2 x Raspberry Pi 4B, Raspberry Pi 4B at 2x speed" in shown and "at 125 Mbps" in shown
    assert "| 0+1+2+3 " in shown and "left out: with " in shown and "Bottleneck: compute" in shown
    from detransformer.parallel.plan import Plan

    plan = Plan.from_dict(json.loads((tmp_path / "p.json").read_text())["plan"])
    assert f"({plan.describe()})" in shown and 3 in plan.device_ids


@pytest.mark.slow
def test_bench_of_a_cluster_file(bert, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "emulated: true\nlink: {bandwidth_mbps: 80}\n"
        "devices: [{device: rpi4b}, {device: rpi4b, speed: 2, bandwidth_mbps: 40}]"
    )
    options = ["--cluster", tmp_path / "c.yaml", "--methods", "tp", "--seq-len", "8", "--repeats", "1"]
    options += ["--transport", "loopback", "--num-original-layers", "2", "--output", tmp_path / "rows.csv"]
    options += ["--time-scale", "1"]
    done = run_cli("bench", "--model", bert, *options, DETRANSFORMER_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    (row,) = pd.read_csv(tmp_path / "rows.csv").to_dict("records")
    assert (row["bandwidth_mbps"], row["num_devices"]) == (80, 2)
    assert row["device"] == "Raspberry Pi 4B, Raspberry Pi 4B at 2x speed on a 0.5x link (emulated)"


def test_summary_of_a_bench():
    """Speedups over float32 rows; the fastest row is named where it is not BP+Auto."""
    from detransformer.commands.bench import summary_lines

    def row(method, wire, latency_s, **fields):
        common = dict(plan="p", bandwidth_mbps=125.0, limit_s=0.5, valid=True)
        error = dict(max_abs_error=1e-6, relative_error=1e-7)
        return common | error | dict(method=method, wire=wire, latency_s=latency_s, over_limit=latency_s / 0.5) | fields

    rows = [row("tp", "float32", 2.0), row("tp", "int8", 0.9), row("sp", "float32", 1.5), row("bp+auto", "int8", 0.8)]
    (line,) = summary_lines(pd.DataFrame(rows))
    assert "0.800 s, 2.50x faster than TP and 1.88x faster than SP" in line
    assert "1.60 times the limit" in line and "fastest of 4 rows" in line
    (line,) = summary_lines(pd.DataFrame([*rows, row("ulysses", "int8", 0.7)]))
    assert "ulysses (int8) is faster, 0.700 s" in line
    assert "fastest" in summary_lines(pd.DataFrame([*rows, row("ulysses", "int8", 0.7, valid=False)]))[0]


def test_a_real_process_prints_no_traceback_unless_asked():
    done = run_cli("figures", "/nowhere/at/all")
    assert_one_sentence(done.returncode, done.stderr, "/nowhere/at/all")
    assert done.stdout == ""
    debug = run_cli("figures", "/nowhere/at/all", DETRANSFORMER_DEBUG="1")
    assert "Traceback" in debug.stderr and debug.returncode == 1


# --- The surroundings ---------------------------------------------------------------------------------------------


def path_options() -> list:
    """(command, option, its parser) of every option and argument that is a path."""
    found = []
    for command in cli.app.registered_commands:
        for name, parameter in inspect.signature(command.callback).parameters.items():
            kind, info = get_args(parameter.annotation)
            if "Path" in str(kind):
                found.append((command.callback.__name__, name, info.parser))
    return found


def test_every_path_knows_the_home_folder():
    assert len(path_options()) > 15
    for command, name, parser in path_options():
        assert parser in (options.path, options.file_to_write), f"{command}: {name}"


def test_a_tilde_that_no_shell_expanded_is_the_home_folder(capsys, bert, tmp_path, monkeypatch):
    """As in --output=~/x, in quotes, in a Makefile; and never a folder named ~."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, stderr = call(capsys, "decouple", "~/bert", "--output=~/out", "--num-original-layers", 2)
    assert code == 0 and (tmp_path / "out" / "config.json").is_file(), stderr
    for words in (["~/bert", "--output=~nobody-of-this-name/out"], ["~nobody-of-this-name/bert", "--output=out"]):
        assert_one_sentence(*call(capsys, "decouple", *words), "~nobody-of-this-name", "write the whole path")
    assert_one_sentence(*call(capsys, "plan", "--cluster=~/c.yaml"), f"{tmp_path}/c.yaml does not exist")
    monkeypatch.setenv("DETRANSFORMER_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
    assert list((tmp_path / "here").iterdir()) == []


def test_what_another_launcher_left_is_not_used(capsys, monkeypatch):
    """Of torchrun, MPI or accelerate: accelerate would wait for that job's other processes."""
    left = {"WORLD_SIZE": "8", "RANK": "5", "MASTER_ADDR": "10.1.2.3", "TORCHELASTIC_RUN_ID": "x", "PMI_SIZE": "1"}
    for name, value in (left | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}).items():
        monkeypatch.setenv(name, value)
    code, stderr = call(capsys, "--version")
    assert code == 0 and stderr == "detransformer: WORLD_SIZE=8 of another launcher is not used: this is one process.\n"
    assert not {*left, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"} & set(os.environ)
    assert call(capsys, "--version") == (0, "")


def run_in_shell(command: str, **environment) -> subprocess.CompletedProcess:
    """`detransformer` as a shell's script calls it, `$D` in `command`."""
    environment = os.environ | {"D": f"{sys.executable} -m detransformer.cli"} | environment
    shell = ["bash", "-o", "pipefail", "-c", command]
    return subprocess.run(shell, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    "command, code, words",
    [
        ("$D --help >&-", 0, ""),
        ("$D --help <&- >&- 2>&-", 0, ""),
        ("$D figures /nowhere/at/all >&-", 2, "/nowhere/at/all"),
        ("(sleep 1; $D --help) | true", 1, ""),
        ("$D --help >/dev/full", 2, "disk is full"),
        ("unset HOME; $D --version", 0, ""),
        ("TMPDIR=/nowhere $D --version", 0, ""),
        ("OMP_NUM_THREADS=many COLUMNS=x LC_ALL=C $D --version", 0, ""),
    ],
)
def test_streams_and_variables_are_as_they_come(command, code, words):
    done = run_in_shell(command)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert len(done.stderr.splitlines()) == bool(words)


def test_an_encoding_that_lacks_a_letter_is_no_fault():
    done = run_cli("doctor", PYTHONIOENCODING="ascii", DETRANSFORMER_DATA="/nowhere/中")
    assert done.returncode == 0 and "/nowhere/\\u4e2d" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "closed")], ids=["TERM", "HUP"]
)
def test_a_signal_is_a_sentence_and_an_exit_code(number, code, word, tmp_path):
    """While it waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "c.yaml")
    command = [sys.executable, "-m", "detransformer.cli", "plan", "--cluster", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "c.yaml", "w"):  # waits until it is read
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.count("\n")) == (code, 1) and word in stderr, stderr


def test_a_long_temporary_folder_leaves_room_for_the_names_of_sockets(capsys, monkeypatch, tmp_path):
    (tmp_path / ("x" * 90)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 90)))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert call(capsys, "--version")[0] == 0
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert call(capsys, "--version")[0] == 0
    assert tempfile.gettempdir() == (str(tmp_path) if len(str(tmp_path)) <= cli.MAX_TEMPORARY else "/tmp")


def test_an_address_or_port_that_cannot_be_had_is_named():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        for address, port in (("127.0.0.1", taken), ("192.0.2.1", 0), ("no-such-host.invalid", 0), ("x" * 70, 0)):
            with pytest.raises(ValueError, match=f"cannot listen at {address} port {port} .*choose another --listen"):
                _listener(address, port)


def test_a_token_of_the_environment_is_checked_like_one_of_a_file(monkeypatch):
    for wrong in ("short", "ü" * 20, " " * 20):
        monkeypatch.setenv("DETRANSFORMER_TOKEN", wrong)
        with pytest.raises(ValueError, match="DETRANSFORMER_TOKEN has .* characters; give 16 or more, all ASCII"):
            _token(None)
    monkeypatch.setenv("DETRANSFORMER_TOKEN", f"{'t' * 20}\r\n")
    assert _token(None) == "t" * 20


# --- decouple -----------------------------------------------------------------------------------------------------


def test_decouple_writes_a_checkpoint_that_loads(bert, tmp_path):
    out = tmp_path / "decoupled"
    done = run_cli("decouple", bert, "--output", out, "--num-original-layers", "2", "--num-divisions", "4")
    assert done.returncode == 0, done.stderr
    assert "DecoupledBertForMaskedLM (Nb=2, Ndiv=4, full attention)" in done.stdout
    assert (out / "vocab.txt").read_text() == "[PAD]\n[UNK]\n" and (out / "model.safetensors").is_file()
    from detransformer.models import DecoupledBertForMaskedLM

    model = DecoupledBertForMaskedLM.from_pretrained(out)
    assert (model.config.num_original_layers, model.config.num_divisions) == (2, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bert", "decoupled"]


def test_decouple_refuses_an_existing_output_unless_forced(capsys, bert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    options = ["decouple", bert, "--output", tmp_path / "out", "--num-original-layers", 2]
    assert_one_sentence(*call(capsys, *options), "exists already", "--force")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    code, _ = call(capsys, *options, "--force")
    assert code == 0 and (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "mine.txt").exists()
    assert_one_sentence(*call(capsys, "decouple", bert, "--output", bert, "--force"), "the checkpoint itself")


@pytest.mark.parametrize("size, words", [(None, ["has no weights", "model.safetensors"]), (9999, ["cannot be read"])])
def test_nothing_is_half_written_of_a_checkpoint_that_is_not_whole(capsys, bert, tmp_path, size, words):
    """test_opening has all that may be wrong."""
    weights = bert / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if size:
        weights.write_bytes(data[:size])
    result = call(capsys, "decouple", bert, "--output", tmp_path / "out", "--num-original-layers", 2)
    assert_one_sentence(*result, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["bert"]


def test_a_name_the_hub_cannot_give_offline(capsys, tmp_path, monkeypatch):
    done = run_cli("decouple", "no-such/model", "--output", tmp_path / "out", HF_HOME=str(tmp_path / "hf"))
    assert_one_sentence(done.returncode, done.stderr, "no-such/model", "connection")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 kB of which a page is left; skipped where mounting is not permitted."""
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_decouple_onto_a_full_disk(bert, full_disk):
    done = run_cli("decouple", bert, "--output", full_disk / "out", "--num-original-layers", "2")
    assert_one_sentence(done.returncode, done.stderr, "disk is full")
    assert list(full_disk.iterdir()) == []


def test_atomic_write_onto_a_full_disk_keeps_the_old_file(full_disk):
    with atomic_write(full_disk / "table.csv") as file:
        file.write("old\n")
    with pytest.raises(OSError) as caught, atomic_write(full_disk / "table.csv") as file:
        file.write("x" * 200_000)
    assert caught.value.errno == errno.ENOSPC and cli.is_disk_full(caught.value)
    assert (full_disk / "table.csv").read_text() == "old\n" and len(list(full_disk.iterdir())) == 1


def test_a_full_disk_anywhere_below_is_recognised(capsys, monkeypatch, tmp_path):
    """Where mounting is not permitted, the same error raised by the writer."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    assert_one_sentence(*call(capsys, "plan", "--output", tmp_path / "plan.json"), "disk is full", "free some space")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_and_defects_are_told_apart(capsys, monkeypatch):
    monkeypatch.setattr("detransformer.doctor.examine", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    code, stderr = call(capsys, "doctor")
    assert code == 130 and "interrupted" in stderr and "Traceback" not in stderr
    monkeypatch.setattr("detransformer.doctor.examine", lambda: (_ for _ in ()).throw(TypeError("ours")))
    with pytest.raises(TypeError, match="ours"):  # a defect of ours keeps its traceback
        cli.main(["doctor"])


def test_doctor_speaks_plainly(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DETRANSFORMER_DATA", "/nowhere/data")
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor"])
    output = capsys.readouterr().out
    assert end.value.code == 0
    for name in ("Python", "Packages", "Notebooks", "Processor", "Memory", "Disk", "GPU", "Emulated cluster"):
        assert f"{name} " in output
    assert "DETRANSFORMER_DATA names /nowhere/data, which is not a folder" in output
    assert "HF_HUB_OFFLINE is set" in output and "built-in corpus" in output


def test_doctor_says_what_to_do_about_a_wrong_version(monkeypatch, tmp_path):
    from detransformer import doctor

    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\ndependencies = ["torch==1.0.0", "nothere==1.*"]\n')
    finding = doctor.packages(tmp_path)
    assert finding.state == "missing" and "pinned ==1.0.0" in finding.found and "make install" in finding.remedy
    assert "Fix this before" in doctor.report([finding]) and "Packages" in doctor.report([finding])
