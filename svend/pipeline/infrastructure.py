"""What really breaks runs, tried before one begins: each check does the thing, small."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from svend.data.corpus import Corpus
from svend.data.stream import Batch, BatchStream, PackedSequences
from svend.device import (
    DTYPES,
    autocast,
    can_compile,
    check_float8,
    check_precision,
    describe_device,
    resolve_device,
    resolve_precision,
)
from svend.errors import CheckpointError, DataError, ResourceError, UserError, reason_of
from svend.pipeline.benchmarking import read_questions
from svend.pipeline.checkpoints import CheckpointManager, verify
from svend.pipeline.checkpoints.files import format_bytes
from svend.pipeline.checkpoints.metadata import read_folder
from svend.pipeline.config import Compile, FullDisk, ModelConfig, PipelineConfig
from svend.pipeline.run_data import read_run_data
from svend.planning.plan import check_memory, explain_out_of_memory, is_out_of_memory
from svend.tracking.runs import check_tracking_store
from svend.training.loop import train_steps
from svend.training.state import TrainState, build_state

OVERFIT_STEPS = 8
# One batch, seen again and again, must become this much easier.
OVERFIT_LOSS_RATIO = 0.95
STATE_BYTES_PER_PARAMETER = 12  # fp32 weights and two AdamW moments
ROUND_TRIP_TEXT = "Zoë paid 3,14 € «déjà vu»; 数学 🧮\n\t<|end|> #### 42"


@dataclass(frozen=True)
class CheckResult:
    """One line of the report: what was found, or what is wrong and how to mend it."""

    name: str
    passed: bool
    detail: str


class InfrastructureChecks:
    """The checks of one configuration, in the order in which they build on one another."""

    def __init__(
        self,
        config: PipelineConfig,
        plan_model: Callable[[], ModelConfig],
        build_model: Callable[[torch.device], nn.Module],
    ) -> None:
        self._config = config
        self._plan_model = plan_model
        self._build_model = build_model
        self._device = torch.device("cpu")
        self._corpus: Corpus | None = None
        self._state: TrainState | None = None

    def run(self) -> Iterator[CheckResult]:
        """Yield each check's result as it is found; what builds on a failed one is not run."""
        checks: list[tuple[str, Callable[[], str], str | None]] = [
            ("device", self._check_device, None),
            ("precision", self._check_precision, "device"),
            ("compile", self._check_compile, "device"),
            ("memory", self._check_memory, "device"),
            ("disk", self._check_disk, None),
            ("data", self._check_data, None),
            ("tokenizer", self._check_tokenizer, "data"),
            ("tracking store", check_tracking_store, None),
            ("forward and backward", self._check_step, "memory"),
            ("overfits one batch", self._check_overfit, "forward and backward"),
            ("checkpoint", self._check_checkpoint, "forward and backward"),
        ]
        failed: set[str] = set()
        for name, check, needs in checks:
            if needs in failed or (name == "forward and backward" and "data" in failed):
                failed.add(name)
                yield CheckResult(name, False, f"not run: needs {needs or 'data'}")
                continue
            try:
                result = CheckResult(name, True, check())
            except UserError as error:
                failed.add(name)
                result = CheckResult(name, False, str(error))
            yield result

    def _check_device(self) -> str:
        self._device = resolve_device(self._config.training.device)
        return describe_device(self._device)

    def _check_precision(self) -> str:
        training = self._config.training
        precision = resolve_precision(training.precision, self._device)
        self._config = replace(self._config, training=replace(training, precision=precision))
        check_precision(precision, self._device)
        if self._config.training.float8:
            check_float8(precision, self._device)
        x = torch.randn(64, 64, device=self._device, requires_grad=True)
        with autocast(precision, self._device):
            y = x @ x
        y.float().square().mean().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        if y.dtype is not DTYPES[precision] or not bool(torch.isfinite(x.grad).all()):
            raise ResourceError(
                f"training.precision = {precision.value}: a matrix product came out as {y.dtype} "
                "or not finite; set training.precision=fp32"
            )
        return f"{precision.value} matrix products, forward and backward"

    def _check_compile(self) -> str:
        choice = self._config.training.compile
        possible = can_compile(self._device)
        if choice is Compile.OFF or (choice is Compile.AUTO and not possible):
            return "off" if choice is Compile.OFF else "off: no compiler or no Python.h found"
        if not possible:
            raise ResourceError(
                "training.compile = on: no compiler or no Python.h found; install g++ and Python's "
                "headers, or set training.compile=off"
            )
        x = torch.randn(64, 64, device=self._device)
        try:
            compiled = torch.compile(_gate, dynamic=False)(x)
        except (RuntimeError, OSError) as error:
            raise ResourceError(
                f"torch.compile fails here ({reason_of(error)}); set training.compile=off"
            ) from error
        torch.testing.assert_close(compiled, _gate(x), rtol=1e-4, atol=1e-5)
        return "a compiled function gives the eager result"

    def _check_memory(self) -> str:
        model = self._plan_model()
        memory, available = check_memory(model, self._config.training, self._device)
        return f"about {memory.total / 1e9:.1f} GB needed, {available / 1e9:.1f} GB available"

    def _check_disk(self) -> str:
        return check_disk(self._config, self._plan_model(), None)

    def _check_data(self) -> str:
        read_questions(self._config)
        corpus = self._corpus = read_run_data(self._config, lambda _: None).corpus
        return f"{len(corpus.train):,} train and {len(corpus.heldout):,} held-out documents"

    def _check_tokenizer(self) -> str:
        assert self._corpus is not None
        tokenizer = self._corpus.tokenizer
        back = tokenizer.decode(tokenizer.encode_text(ROUND_TRIP_TEXT))
        if back != ROUND_TRIP_TEXT:
            raise DataError(
                f"the tokenizer ({tokenizer.origin}) turns {ROUND_TRIP_TEXT!r} into {back!r}; use "
                "a byte-level one, or training.data.tokenizer=train"
            )
        return f"{tokenizer.size:,} entries, round trip exact"

    def _check_step(self) -> str:
        training = self._config.training
        assert self._corpus is not None
        sequences = PackedSequences(self._corpus.train, training.data, training.seed)
        stream = _OneBatch(
            sequences, training.batch_size, training.gradient_accumulation_steps
        )
        model = self._build_model(self._device)
        self._state = build_state(model, stream, training, OVERFIT_STEPS, self._device)
        try:
            metrics = next(train_steps(self._state, training, 1))
            loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ResourceError(explain_out_of_memory(
                self._plan_model(), training, self._device, None, error
            )) from error
        if not torch.isfinite(torch.tensor([loss, norm])).all():
            raise ResourceError(
                f"the first step gives loss {loss} and gradient norm {norm}; set "
                "training.precision=fp32 to see whether the precision is at fault"
            )
        return f"loss {loss:.3f}, gradient norm {norm:.3f}"

    def _check_overfit(self) -> str:
        assert self._state is not None
        losses = [float(metrics.loss) for metrics in
                  train_steps(self._state, self._config.training, OVERFIT_STEPS)]
        if losses[-1] > OVERFIT_LOSS_RATIO * losses[0]:
            raise ResourceError(
                f"one batch is not learnt: loss {losses[0]:.3f} to {losses[-1]:.3f} in "
                f"{len(losses)} steps; check training.learning_rate and the model"
            )
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"

    def _check_checkpoint(self) -> str:
        state, parent = self._state, Path(self._config.checkpoint_dir).expanduser()
        assert state is not None
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".check-", dir=parent))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint_dir {parent.absolute()}: cannot be written ({error.strerror}); "
                "choose another"
            ) from None
        try:
            manager = CheckpointManager(folder)
            manager.save(state.model, state.optimizer, state.scheduler, state.step,
                         extra_state=state.extra_state())
            verify(manager.list_checkpoints()[-1])
            saved = {k: v.cpu().clone() for k, v in state.model.state_dict().items()}
            with torch.no_grad():
                for parameter in state.model.parameters():
                    parameter.zero_()
            manager.load_latest(state.model, state.optimizer, state.scheduler)
            for name, tensor in state.model.state_dict().items():
                if not torch.equal(tensor.cpu(), saved[name]):
                    raise CheckpointError(f"{name} comes back from a checkpoint changed")
            size = manager.list_checkpoints()[-1].bytes
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return f"{size / 1e6:.0f} MB saved, verified and loaded back equal"


def check_disk(config: PipelineConfig, model: ModelConfig, run_folder: Path | None) -> str:
    """Say what room the checkpoints of a run need and have.

    run_folder: of a run that is resumed, whose checkpoints have their room. Raises ResourceError
    if there is too little.
    """
    cache = config.checkpoint_cache_dir
    folder = Path(cache or config.checkpoint_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    # Those that are kept, the best, and the one being written; pruned, the last stays of the first.
    prunes = config.training.on_full_disk is FullDisk.PRUNE
    copies = 3 if prunes else config.training.save_total_limit + 2
    needed = copies * STATE_BYTES_PER_PARAMETER * model.num_parameters()
    if run_folder is not None:
        needed -= sum(checkpoint.bytes for checkpoint in read_folder(run_folder)[0])
    if needed > free:
        raise ResourceError(
            f"{folder}: {copies} checkpoints need {format_bytes(needed)} more, "
            f"{format_bytes(free)} are free, {format_bytes(needed - free)} are missing; make room, "
            "lower training.save_total_limit, set training.on_full_disk=prune or another "
            "checkpoint_dir"
        )
    return f"{format_bytes(needed)} for checkpoints, {format_bytes(free)} free"


class _OneBatch(BatchStream):
    """The first batch again and again."""

    _batch: Batch | None = None

    def __next__(self) -> Batch:
        if self._batch is None:
            self._batch = super().__next__()
            self.load_state_dict({"next_sequence": 0})
        return self._batch


def _gate(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) * x.square().mean(-1, keepdim=True)
