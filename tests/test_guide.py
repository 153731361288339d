"""Every Python block of the guides runs, in order, in a real interpreter, and does what is said.

Of what a guide says only sizes and steps are made smaller (`SHRINK`), by settings that it
documents. A small model learns in few steps only at a small model's rate: that of the quick test.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.pages import read_fences
from tests.prepared import data_cache, lay_empty_store

GIVEN_GUIDE = ROOT.parent / "shared" / "guide.md"
OWN_GUIDE = ROOT / "docs" / "guide.md"
EXTRA_IN_ALL = "extra_state.pt"

SHRINK = """
from torch import nn
from svend.pipeline.config import MomentPrecision, WeightPrecision
from svend.pipeline.config import create_quick_test_config as _quick

def shrink(config, ladder=False):
    small, training = _quick(), config.training
    if not ladder:
        config.model = small.model
    training.learning_rate = small.training.learning_rate
    training.max_steps = min(training.max_steps or 16, 16)
    training.batch_size, training.gradient_accumulation_steps = 8, 1
    # XXL's recipe for one card multiplies in bf16, which not every CPU does.
    training.weight_precision = WeightPrecision.FP32
    training.moment_precision = MomentPrecision.FP32
    training.heldout_sequences = 4
    training.save_steps = 16
    training.data.max_seq_length, training.data.num_samples = 64, 200
    training.data.cache_dir = CACHE
    # Benchmarks decide what comes after a rung.
    config.eval_benchmarks = ["accuracy"] if ladder else []
    config.evaluation.problems, config.evaluation.max_new_tokens = 6, 8

def small_model(scale):
    from svend.models.config import TransformerConfig
    from svend.models.transformer import ReasoningTransformer
    return ReasoningTransformer(TransformerConfig(
        name=f"small-{scale.value}", hidden_size=64, num_hidden_layers=2, vocab_size=4096))
"""

SMALL_MODEL_AND_OPTIMIZER = """
import torch
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.training.optimizers import build_optimizer
model = ReasoningTransformer(TransformerConfig.from_model_config(_quick().model))
optimizer = build_optimizer(model, _quick().training)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
"""

HELDOUT_BATCHES = """
import torch
from svend.data.stream import Batch
eval_dataloader = [Batch.of(torch.randint(0, 4096, (1, 32)), torch.zeros(1, 32, dtype=torch.long))]
"""

TROUBLED_RUN = """
from svend.pipeline import PipelineConfig, PipelineRunner
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import ModelScale
config = _quick()
training = config.training
runner = PipelineRunner(config)
runner.validator.validate_quick(model, loss=200.0, step=7)
manager = CheckpointManager("checkpoints/troubled")
manager.save(model=model, step=7, metrics={"loss": 0.5})
"""

# What a section of the given guide takes for granted. The project's own guide takes nothing.
PRELUDES = {
    "configuration-system": "",
    "validation-gates": SMALL_MODEL_AND_OPTIMIZER + HELDOUT_BATCHES,
    "checkpoint-management": SMALL_MODEL_AND_OPTIMIZER,
    "colab-integration": SMALL_MODEL_AND_OPTIMIZER,
    "troubleshooting": SMALL_MODEL_AND_OPTIMIZER + TROUBLED_RUN,
}

LADDER = "[(r.scale.value, r.success, r.reason) for r in results]"
# What a test asks of the names that a block leaves behind: fact name to expression.
FACTS: dict[str, dict[str, str]] = {
    "given/quick-start/3-progressive-training": {"ladder": LADDER},
    "given/configuration-system/pipelineconfig": {
        "scale": "config.training.model_scale.value", "wandb": "config.training.use_wandb",
        "gates": "config.training.validation_gates", "strict": "config.strict_validation",
        "sources": "config.training.data.sources", "resolved": "bool(config.resolve())",
    },
    "given/configuration-system/using-scale-defaults": {
        "set": "[training.batch_size, training.learning_rate, training.gradient_accumulation_steps]"
    },
    "given/configuration-system/saving-and-loading-configs": {
        "same": "training == config.training"
    },
    "given/validation-gates/manual-validation": {
        "levels": "[v.level.value for v in validator.history]", "passed": "result.passed",
        "failures": "result.failures",
    },
    "given/checkpoint-management/basic-usage": {
        "id": "checkpoint_id", "place": "[step, epoch]",
        "files": "sorted(p.name for p in (manager.output_dir / checkpoint_id).iterdir())",
    },
    "given/checkpoint-management/google-drive-integration-colab": {
        "arrived": "manager.flush()",
        "drive": "sorted(p.name for p in manager.drive_path.glob('step_*'))",
    },
    "given/running-training/custom-model-factory": {
        "run": "(lambda r: [r.success, r.reason, r.registered and r.registered.name])"
               "((shrink(config), runner.run())[1])",
    },
    "given/progressive-scaling/progressive-scaling": {"ladder": LADDER},
    "given/colab-integration/training-with-drive-checkpoints": {
        "result": "[result.success, result.reason]", "where": "str(result.checkpoint_dir)",
    },
    "given/colab-integration/resume-after-timeout": {"step": "step"},
    "given/troubleshooting/out-of-memory": {
        "set": "[training.batch_size, training.gradient_accumulation_steps,"
               " training.gradient_checkpointing, training.model_scale.value]",
        "checks": "training.check()",
    },
    "given/troubleshooting/loss-not-decreasing": {"rate": "training.learning_rate"},
    "given/troubleshooting/validation-failing": {
        "gate": "[g.threshold for g in PipelineRunner(config).validator"
                ".gates[__import__('svend').pipeline.validation.GateLevel.FULL]"
                " if g.name == 'min_accuracy']",
        "strict": "PipelineRunner(config).validator.strict",
    },
    "given/troubleshooting/debug-mode": {
        "set": "[training.max_steps, training.data.sources, training.use_wandb]"
    },
    "own/quick-start/quick-start-2": {"success": "result.success"},
    "own/configuration/configuration-2": {"resolved": "bool(config.resolve())"},
    "own/gates/gates": {"passed": "verdict.passed", "failures": "verdict.failures"},
    "own/gates/gates-2": {"aliases": "list(result.registered.aliases)"},
    "own/checkpoints/checkpoints-2": {
        "drive": "sorted(p.name for p in drive.drive_path.glob('step_*'))",
    },
    "own/running/running": {"success": "result.success", "reason": "result.reason"},
    "own/running/running-2": {"name": "result.registered.name"},
    "own/running/running-3": {"ladder": LADDER},
    "own/running/running-4": {"ladder": LADDER},
    "own/colab/colab": {"where": "str(result.checkpoint_dir)", "success": "result.success"},
    "own/troubleshooting/out-of-memory": {
        "sequences": "[sequences, training.batch_size * training.gradient_accumulation_steps]",
        "checks": "training.check()",
    },
    "own/troubleshooting/debug-mode": {"success": "result.success"},
}

# Runs the blocks of a JSON file, section after section, and writes what became of each.
DRIVER = """
import contextlib, functools, io, json, os, pathlib, sys, traceback
from svend.pipeline import record
from svend.planning import plan
# Dozens of runs in one process: the machine is looked at for the first.
record.installed_packages = functools.cache(record.installed_packages)
plan.measure_matmul_peak = functools.cache(plan.measure_matmul_peak)
blocks, outcomes, section, names = json.load(open(sys.argv[1])), {}, None, {}
home = pathlib.Path.cwd()
for block in blocks:
    if block["section"] != section:
        section = block["section"]
        if not block["keeps_names"] or not names:
            folder = home / section
            folder.mkdir()
            os.chdir(folder)
            names = {"__name__": "__main__", "CACHE": os.environ["DATA_CACHE"]}
            exec(block["prelude"], names)
    out, err, facts, error = io.StringIO(), io.StringIO(), {}, None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(compile(block["source"], block["name"], "exec"), names)
            facts = {name: eval(text, names) for name, text in block["facts"].items()}
    except BaseException:
        error = traceback.format_exc()
    outcomes[block["name"]] = {
        "out": out.getvalue(), "err": err.getvalue(), "facts": facts, "error": error}
pathlib.Path(sys.argv[2]).write_text(json.dumps(outcomes))
"""


@dataclass
class Block:
    """A Python block, with what is needed to run it."""

    name: str
    section: str
    source: str
    prelude: str = ""
    keeps_names: bool = False
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a block printed, what held after it, and the traceback if it raised."""

    out: str
    err: str
    facts: dict[str, Any]
    error: str | None


def read_blocks(path: Path, guide: str) -> list[Block]:
    """Return a guide's blocks, named by guide, section and nearest heading."""
    blocks: list[Block] = []
    for fence in read_fences(path) if path.is_file() else []:
        if fence.language != "python":
            continue
        section, heading = slug(fence.section), slug(fence.heading)
        name = f"{guide}/{section}/{heading}"
        count = sum(re.sub(r"-\d$", "", b.name) == name or b.name == name for b in blocks)
        name += f"-{count + 1}" if count else ""
        blocks.append(Block(name, section, fence.source))
    return blocks


def slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def prepared(block: Block, guide: str, folder: Path) -> Block:
    """Return the block as it is run here: with svend for src, small, and without Colab."""
    source = re.sub(r"\b(from|import) src\b", r"\1 svend", block.source)
    source = source.replace("/content/", f"{folder}/content/")
    ladder = "run_progressive(" in source
    call = "shrink(config, ladder=True)" if ladder else "shrink(config)"
    source = re.sub(r"^(\s*)(runner = PipelineRunner\()", rf"\1{call}\n\1\2", source, flags=re.M)
    if ladder:
        source = source.replace("PipelineRunner(config)", "PipelineRunner(config, small_model)")
    source = re.sub(r"=(scale_config|base)\.hidden_size", "=64, vocab_size=4096", source)
    source = source.replace("* base.hidden_size", "* 64")
    source = re.sub(r"=(scale_config|base)\.num_hidden_layers", "=2", source)
    source = without_colab(source)
    prelude = SHRINK + (PRELUDES.get(block.section, "") if guide == "given" else "")
    return Block(block.name, block.section, source, prelude, guide == "own",
                 FACTS.get(block.name, {}))


def without_colab(source: str) -> str:
    """Leave out the shell lines and Colab's own module; without CUDA, ask for the CPU's name."""
    kept = [line for line in source.splitlines()
            if not line.startswith(("!", "%", "from google.colab", "drive.mount"))]
    source = "\n".join(kept) + "\n"
    if "torch.cuda.get_device" not in source:
        return source
    asks = "\n".join(f"    {line}" for line in kept if "torch.cuda.get_device" in line)
    rest = "\n".join(line for line in kept if "torch.cuda.get_device" not in line)
    return (f"{rest}\nif torch.cuda.is_available():\n{asks}\nelse:\n"
            "    from svend.device import describe_device\n"
            "    print(f'GPU: none, {describe_device(torch.device(\"cpu\"))}')\n")


GIVEN, OWN = read_blocks(GIVEN_GUIDE, "given"), read_blocks(OWN_GUIDE, "own")


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a block's name to its outcome.

    A guide runs once, in one process, for all of the processes that the tests are spread over.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    @cache
    def run_guide(guide: str) -> dict[str, Outcome]:
        folder = shared / f"guide-{guide}"
        with (shared / f"guide-{guide}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                run_blocks(guide, folder)
        # Each block's test waiting for a guide that hangs would take hours.
        assert (folder / "outcomes.json").is_file(), f"the {guide} guide did not run to its end"
        outcomes = json.loads((folder / "outcomes.json").read_text())
        return {name: Outcome(**values) for name, values in outcomes.items()}

    def run_blocks(guide: str, folder: Path) -> None:
        (folder / "content" / "drive" / "MyDrive").mkdir(parents=True)
        lay_empty_store(folder / "mlflow.db")
        blocks = [prepared(b, guide, folder) for b in (GIVEN if guide == "given" else OWN)]
        (folder / "blocks.json").write_text(json.dumps([asdict(b) for b in blocks]))
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, "blocks.json", str(folder / "outcomes.json")],
            cwd=folder, text=True, timeout=600, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder),
                 "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
                 "WANDB_MODE": "offline", "DATA_CACHE": str(data_cache()), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout

    def of_block(name: str) -> Outcome:
        if name.startswith("given/") and not GIVEN:
            pytest.skip(f"{GIVEN_GUIDE.name} is not there")
        found: Outcome = run_guide(name.partition("/")[0])[name]
        return found

    return of_block


@pytest.mark.parametrize("name", [block.name for block in GIVEN + OWN])
def test_the_block_runs(name: str, outcome: Any) -> None:
    found = outcome(name)
    assert found.error is None, f"{found.error}\n{found.out}\n{found.err}"


def test_every_fact_is_asked_of_a_block_that_exists() -> None:
    present = {block.name for block in GIVEN + OWN}
    assert {name for name in FACTS if GIVEN or name.startswith("own/")} <= present


def test_the_infrastructure_of_the_quick_test_is_ready(outcome: Any) -> None:
    for name in ("given/quick-start/1-validate-infrastructure", "own/quick-start/quick-start"):
        assert "Ready for training!" in outcome(name).out
        assert "FAIL" not in outcome(name).out


def test_the_tiny_test_trains(outcome: Any) -> None:
    out = outcome("given/quick-start/2-test-at-tiny-scale").out
    assert re.search(r"Tiny model trained successfully! Loss: \d+\.\d{4}", out)


@pytest.mark.parametrize("name", [
    "given/quick-start/3-progressive-training", "given/progressive-scaling/progressive-scaling",
    "own/running/running-3",
])
def test_a_strict_ladder_stops_after_the_first_rung_for_what_it_cannot_do(
    name: str, outcome: Any
) -> None:
    [(scale, success, reason)] = outcome(name).facts["ladder"]
    assert (scale, success) == ("tiny", False)
    assert reason.startswith("FULL gate failed at step 16: min_accuracy: ")
    assert "must be accuracy > 0.1" in reason


def test_a_ladder_that_is_not_strict_goes_on(outcome: Any) -> None:
    ladder = outcome("own/running/running-4").facts["ladder"]
    assert ladder == [["tiny", True, None], ["small", True, None]]


def test_the_results_of_a_ladder_print_a_line_per_rung(outcome: Any) -> None:
    out = outcome("given/progressive-scaling/progressive-scaling").out
    assert re.search(r"^tiny: FAIL \(loss=\d+\.\d{4}\)$", out, flags=re.M)


def test_a_scale_says_its_name_and_sizes(outcome: Any) -> None:
    out = outcome("given/model-scales/getting-scale-configuration").out
    assert out.splitlines() == ["Name: svend-medium-500m", "Parameters: 503M",
                                "Hidden size: 1024", "Recommended samples: 20000"]


def test_the_scales_print_as_the_guide_shows_them(outcome: Any) -> None:
    out = outcome("given/model-scales/print-all-scales").out
    assert out in GIVEN_GUIDE.read_text(encoding="utf-8")
    assert len(out.splitlines()) == 13


def test_a_config_holds_what_it_was_given(outcome: Any) -> None:
    facts = outcome("given/configuration-system/pipelineconfig").facts
    assert facts == {
        "scale": "medium", "wandb": True, "strict": True, "sources": ["openmath", "slimorca"],
        "gates": {"min_accuracy": 0.2, "max_loss": 5.0, "min_tool_accuracy": 0.5},
        "resolved": True,
    }


def test_scale_defaults_are_applied_and_a_saved_config_comes_back_the_same(outcome: Any) -> None:
    section = "given/configuration-system"
    assert outcome(f"{section}/using-scale-defaults").facts["set"] == [2, 2.5e-4, 8]
    assert outcome(f"{section}/saving-and-loading-configs").facts["same"] is True
    assert outcome("own/configuration/configuration-3").out == "True\n"


def test_an_unknown_key_is_named(outcome: Any) -> None:
    out = outcome("own/configuration/configuration").out.splitlines()
    assert out[0] == "0.0001 1024"
    assert "training.learning_rat" in out[1]


def test_quick_passes_and_full_names_what_was_not_measured(outcome: Any) -> None:
    found = outcome("given/validation-gates/manual-validation")
    assert found.facts["levels"] == ["quick", "full"]
    assert found.out.startswith("QUICK gate at step 1000: PASS")
    assert found.facts["passed"] is False
    assert found.facts["failures"] == [
        "min_accuracy: accuracy was not measured", "tool_accuracy: tool_accuracy was not measured",
        "chemistry_accuracy: chemistry_accuracy was not measured",
    ]


def test_a_custom_gate_fails_on_its_own_metric(outcome: Any) -> None:
    facts = outcome("own/gates/gates").facts
    assert facts["passed"] is False
    assert facts["failures"] == ["chemistry: 0.55, must be chemistry_accuracy >= 0.6"]


def test_a_failed_gate_that_is_not_strict_is_recorded_and_earns_no_alias(outcome: Any) -> None:
    found = outcome("own/gates/gates-2")
    assert found.facts["aliases"] == ["quick"]
    assert "FAIL  perplexity" in found.out


def test_a_checkpoint_has_the_files_that_were_given_and_comes_back(outcome: Any) -> None:
    found = outcome("given/checkpoint-management/basic-usage")
    assert found.facts == {
        "id": "step_00001000", "place": [1000, 0],
        "files": [EXTRA_IN_ALL, "metadata.json", "model.pt", "optimizer.pt", "scheduler.pt"],
    }
    assert "step_00001000" in found.out
    out = outcome("own/checkpoints/checkpoints").out
    assert out.startswith("2000 1000\n")
    assert re.search(r"step_00001000 .* best$", out, flags=re.M)


def test_a_checkpoint_arrives_on_the_drive(outcome: Any) -> None:
    found = outcome("given/checkpoint-management/google-drive-integration-colab")
    assert found.facts == {"arrived": True, "drive": ["step_00001000"]}
    assert outcome("own/checkpoints/checkpoints-2").facts["drive"] == ["step_00003000"]


def test_a_single_scale_trains(outcome: Any) -> None:
    out = outcome("given/running-training/single-scale-training").out
    assert "Success: True" in out
    assert re.search(r"Final loss: \d+\.\d{4}", out)
    assert re.search(r"Training time: 0\.0\d hours", out)
    facts = outcome("own/running/running").facts
    assert facts == {"success": True, "reason": None}
    assert outcome("own/quick-start/quick-start-2").facts["success"] is True


def test_a_model_of_ones_own_trains_and_registers_under_its_own_name(outcome: Any) -> None:
    run = outcome("given/running-training/custom-model-factory").facts["run"]
    assert run == [True, None, "custom-medium"]
    assert outcome("own/running/running-2").facts["name"] == "wide-tiny"


def test_a_run_on_colab_keeps_its_checkpoints_on_the_drive_and_resumes(outcome: Any) -> None:
    training = outcome("given/colab-integration/training-with-drive-checkpoints").facts
    assert training["result"] == [True, None]
    assert training["where"].endswith("/MyDrive/svend-checkpoints/svend-colab")
    resumed = outcome("given/colab-integration/resume-after-timeout")
    assert resumed.facts["step"] == 16
    assert "Resuming from step 16" in resumed.out
    assert outcome("own/colab/colab").facts["where"].endswith("/svend-checkpoints/svend-colab")


def test_the_device_is_named(outcome: Any) -> None:
    assert outcome("given/colab-integration/setup-notebook").out.startswith("GPU: ")


def test_the_recipes_against_full_memory_make_a_valid_config(outcome: Any) -> None:
    given = outcome("given/troubleshooting/out-of-memory").facts
    assert given["set"] == [1, 32, True, "large"]
    before, after = outcome("own/troubleshooting/out-of-memory").facts["sequences"]
    assert before == after == 16


def test_the_learning_rate_can_be_set_by_hand_after_the_scale_defaults(outcome: Any) -> None:
    assert outcome("given/troubleshooting/loss-not-decreasing").facts["rate"] == 5e-5


def test_loosened_gates_reach_the_validator(outcome: Any) -> None:
    found = outcome("given/troubleshooting/validation-failing")
    assert "QUICK gate at step 7: FAIL" in found.out
    assert found.facts == {"gate": [0.05], "strict": False}


def test_checkpoints_are_listed_with_step_and_loss(outcome: Any) -> None:
    out = outcome("given/troubleshooting/checkpoint-not-loading").out
    assert out.splitlines()[-1] == "step_00000007: step=7, loss=0.5"
    out = outcome("own/troubleshooting/checkpoint-not-loading").out
    assert out.splitlines()[-1] == "step_00002000: step=2000, loss=0.7"


def test_debug_mode_runs_one_source(outcome: Any) -> None:
    facts = outcome("given/troubleshooting/debug-mode").facts
    assert facts["set"] == [100, ["slimorca"], False]
    found = outcome("own/troubleshooting/debug-mode")
    assert found.facts["success"] is True
    assert "gym_general" in found.out
    assert "gym_reasoning" not in found.out


def test_debug_logging_shows_lines_of_svend(outcome: Any) -> None:
    assert re.search(r"^DEBUG:svend\.", outcome("own/troubleshooting/debug-mode").err, flags=re.M)
