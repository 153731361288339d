"""The README: its commands hold, and its tour runs as it is pasted, made smaller by settings."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import signal
import subprocess
import time
import urllib.request

import pytest
import yaml

from svend.cli import parse
from tests.conftest import ROOT, Workplace
from tests.pages import read_fences
from tests.servers import free_port
from tests.test_commands import load_configuration_of

README = ROOT / "README.md"
[TOUR] = [fence.source.splitlines() for fence in read_fences(README) if fence.section == "The tour"]
# TINY as it is, on less data and for fewer steps: still enough for its STANDARD gates.
TINY = (
    "--training.max_steps 40 --training.batch_size 2 --training.save_steps 20 "
    "--data.max_seq_length 128 --data.num_samples 400 --training.heldout_sequences 8 "
    "--evaluation.problems 2 --evaluation.max_new_tokens 8"
)
SMALLER = {
    "train": TINY,
    "evaluate": "--evaluation.problems 2 --evaluation.max_new_tokens 8",
    "sweep": "--sweep.trials 3 --sweep.steps 16 --sweep.report_steps 4 --sweep.confirm.top 1 "
             "--sweep.confirm.second_width {} --sweep.settings.data.num_samples 200",
    "ladder": "--ladder.end small --ladder.tokens_per_parameter null --training.max_steps 40 "
              "--ladder.trend.hold_above 9 --ladder.trend.stop_above 9 "
              "--ladder.trend.early_stop_above 9 --ladder.trend.investigate_below -0.9 "
              "--training.heldout_sequences 8 --data.max_seq_length 64 --data.num_samples 150 --model.vocab_size 320 "
              "--evaluation.problems 2 --evaluation.max_new_tokens 8 --health.every_steps null",
}


def commands_in(line: str) -> list[str]:
    """Return the commands of a line, without what is said of them."""
    return [part.strip() for part in line.split("  #", maxsplit=1)[0].split(";")]


def lines_with_commands() -> list[str]:
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"^ *((?:timeout .*|svend |mlflow run ).*)$", text, re.M)
    inline = re.findall(r"`(svend [a-z][^`]*|mlflow run [^`]*)`", text)
    return [command for line in (*found, *inline) for command in commands_in(line)
            if "COMMAND" not in command]


@pytest.mark.parametrize("command", lines_with_commands())
def test_a_command_of_the_readme_holds(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["mlflow", "run"]:
        project = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
        given = dict(itertools.pairwise(words))
        entry = project["entry_points"][given.get("-e", "main")]
        pairs = [word.split("=", 1) for flag, word in itertools.pairwise(words)
                 if flag == "-P"]
        filled = {name: str(of.get("default", "")) for name, of in entry["parameters"].items()}
        filled |= {key: value for key, value in pairs if key in filled}
        others = "".join(f" --{key} {value}" for key, value in pairs if key not in filled)
        command = entry["command"].format(**filled) + others
        words = shlex.split(command)
    call = parse(words[words.index("svend") + 1:])
    load_configuration_of(call)


def test_the_tour_has_ten_lines_that_name_every_station() -> None:
    commands = [command for line in TOUR[1:] for command in commands_in(line)]
    assert len(TOUR) == 11  # the first makes the environment's commands known
    for station in ("sweep", "train", "ladder", "evaluate", "promote", "compare", "plan", "export",
                    "serve", "train --resume"):
        assert [command for command in commands if f"svend {station}" in command], station


@pytest.mark.slow
def test_the_tour_runs_as_it_is_pasted(workplace: Workplace) -> None:
    for line in TOUR[1:]:
        for command in commands_in(line):
            name = shlex.split(command.partition("svend ")[2])[0]
            smaller = f"{command} {SMALLER.get(name, '')}"
            if command.startswith("timeout"):
                interrupt(workplace, smaller.partition(" svend ")[2])
            elif name == "serve":
                serve(workplace, smaller)
            else:
                done = workplace.run(["bash", "-c", smaller])
                assert done.returncode == 0, f"{smaller}\n{done.stdout}"
    assert (workplace.folder / "comparison" / "comparison.html").exists()
    [exported] = workplace.folder.glob("svend-tiny-50m-v*-hf")
    assert (exported / "model.safetensors").exists()
    ends = [json.loads(path.read_text())["finished"]
            for path in workplace.checkpoints.glob("svend*/run.json")]
    assert ends == [True, True]


def interrupt(workplace: Workplace, options: str) -> None:
    """Do what `timeout -s INT` does, once training has begun."""
    started = workplace.start(["bash", "-c", f"exec svend {options}"])
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith("step "):
            started.send_signal(signal.SIGINT)
            break
    told, _ = started.communicate(timeout=120)
    assert started.returncode == 130, told


def serve(workplace: Workplace, command: str) -> None:
    """Ask the server once, and end it as Ctrl-C does."""
    port = free_port()
    server = workplace.start(["bash", "-c", f"exec {command} --port {port}"])
    deadline_seconds = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                assert answer.status == 200
                break
        except OSError:
            assert server.poll() is None, server.communicate()[0]
            assert time.monotonic() < deadline_seconds
            time.sleep(0.5)
    server.send_signal(signal.SIGINT)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        raise
