"""Everything before step 1: what can be checked is checked, and what a run needs is built."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from svend.data.corpus import Corpus
from svend.device import (
    check_float8,
    check_precision,
    describe_device,
    keep_freed_memory,
    resolve_device,
    resolve_precision,
    return_freed_memory,
)
from svend.errors import ConfigError
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.assignment import Assignment, assign
from svend.pipeline.benchmarking import Question, read_questions
from svend.pipeline.checkpoints import CheckpointManager, DriveCheckpointManager
from svend.pipeline.checkpoints.drive import default_cache_dir, is_on_google_drive
from svend.pipeline.config import ModelConfig, PipelineConfig, Precision
from svend.pipeline.console import say
from svend.pipeline.crew import Crew
from svend.pipeline.hyperparameters import (
    HYPERPARAMETERS,
    Carried,
    Hyperparameters,
    carry,
    fetch_hyperparameters,
    locate_hyperparameters,
    read_hyperparameters,
)
from svend.pipeline.infrastructure import check_disk
from svend.pipeline.init_from import StartingPoint, find_starting_point
from svend.pipeline.own_model import FACTORY_FILE, ModelFactory, factory_source, source_digest
from svend.pipeline.record import record_hyperparameters, record_inputs
from svend.pipeline.replica import Replica, load_state, take_start
from svend.pipeline.run_data import read_run_data, steps_over
from svend.pipeline.run_folder import RunFolder, RunIdentity
from svend.pipeline.run_model import planned_model, registered_name
from svend.pipeline.schema import to_tree
from svend.pipeline.validation import Gates, Measurement, ValidationResult
from svend.planning.memory import MemoryPlan
from svend.planning.plan import (
    RunPlan,
    check_memory,
    choose_micro_batch,
    decide_shards,
    plan_run,
)
from svend.planning.search import differences
from svend.ranks import Place
from svend.tracking.run import TrackedRun
from svend.tracking.runs import MAX_TAG_LENGTH
from svend.training.profiling import name_compiled_kernels

FORCED_TAG = "svend.forced_resume"
# What training waits for.
PARTS = ("evaluating", "saving", "tracking", "data", "branches")


@dataclass(frozen=True)
class Saving:
    """A checkpoint on its way to the disk, or there, and what was decided on its weights."""

    checkpoint_id: Future[str] | str
    step: int
    verdicts: tuple[ValidationResult, ...]
    stall_seconds: float

    @property
    def done(self) -> bool:
        return isinstance(self.checkpoint_id, str) or self.checkpoint_id.done()


@dataclass(kw_only=True)
class Job(Replica):
    """What one run works with, from its plan to its end: the first process's replica, and more."""

    corpus: Corpus
    plan: RunPlan
    model_name: str
    tracked: TrackedRun
    folder: RunFolder
    manager: CheckpointManager
    questions: list[Question]
    started_seconds: float
    evaluated_step: int = -1
    saved_step: int = 0
    saving: Saving | None = None
    first_loss: float = math.nan
    final_loss: float = math.nan
    start_seconds: float = math.nan
    full_verdict: ValidationResult | None = None
    # What benchmarks last measured.
    measured: Mapping[str, Measurement] = field(default_factory=dict)
    carried: list[Carried] = field(default_factory=list)
    spent_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextlib.contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Count the time of the context as spent on a part of PARTS, and not on training."""
        started_seconds = time.perf_counter()
        try:
            yield
        finally:
            self.spent_seconds[part] += time.perf_counter() - started_seconds


def prepare_job(
    config: PipelineConfig,
    tracked: TrackedRun,
    folder: RunFolder | None,
    model_factory: ModelFactory | None,
    gates: Gates,
    console: Console,
    crew: Crew,
    *,
    force: bool,
) -> Job:
    """Check everything that can be checked before step 1, and build what the run needs.

    crew: the processes of the run, which hear here what it is. force: go on with a run although it
    would be another one, and put that on record.
    """
    resumed, as_written, model_config = folder, config, planned_model(config, model_factory)
    _mirror_to_wandb(tracked, config, console)
    keep_freed_memory()
    means = _choose_means(
        config, model_config, folder, crew.ranks.place, own_model=model_factory is not None
    )
    cut = ", ".join(differences(config.training, means.config.training))
    config, device = means.config, means.device
    if cut:
        console.print(f"micro-batches: the same step by {cut}, for the GPU can hold it; "
                      "training.micro_batch=fixed leaves it as it is set", soft_wrap=True)
    check_disk(config, model_config, None if folder is None else folder.path)
    found = _find_hyperparameters(config, folder)
    source = factory_source(config)
    questions = read_questions(config)
    data = read_run_data(config, lambda text: console.print(f"data: {text}"))
    corpus = data.corpus
    if folder is not None and not force:
        folder.check_machine(
            corpus.fingerprint, corpus.tokenizer.sha256, device.type, source_digest(source)
        )
    total_steps = config.training.max_steps or steps_over(data.sequences, config.training)
    training, carried = carry(found, config, total_steps) if found else (config.training, [])
    config = replace(config, training=training)
    plan = plan_run(training, model_config, total_steps, means.memory, device, means.compiled)
    return_freed_memory()
    manager = None if folder is None else _checkpoint_manager(config, folder)
    start = None
    if config.init_from and (manager is None or not manager.list_checkpoints()):
        start = _find_start(config.init_from, config, corpus, tracked)
    if plan.compile and training.profile:
        name_compiled_kernels()
    state = assign(crew, Assignment(
        config, corpus.fingerprint, corpus.tokenizer.size, total_steps, plan.compile,
        means.shards > 1, start is not None, secrets.token_hex(8),
    ), data.sequences, model_factory, device)
    weights = None if start is None else start.weights_for(state.model)
    # Measured by the first process while the others wait: together they are as many times as fast.
    plan = replace(
        plan, parameters=sum(p.numel() for p in state.model.parameters()),
        compile=plan.compile and isinstance(state.model, ReasoningTransformer),
        peak_flops=plan.peak_flops * crew.size, seconds=plan.seconds / crew.size,
    )
    if folder is None:
        record_inputs(
            tracked, config, gates, corpus, data.sequences, plan, describe_device(device)
        )
        record_hyperparameters(tracked, found, carried)
        folder = _begin_folder(tracked, as_written, config, corpus, plan, device, found, source)
        tracked.spool_to(folder.spool_path, lambda line: say(console, line))
    job = Job(
        config=config, device=device, corpus=corpus, sequences=data.sequences,
        heldout=data.heldout, plan=plan, state=state, total_steps=total_steps, crew=crew,
        model_name=registered_name(config, state.model, model_factory), tracked=tracked,
        folder=folder, manager=manager or _checkpoint_manager(config, folder),
        questions=questions, started_seconds=time.monotonic(), carried=carried,
    )
    tracked.set_tags({"svend.processes": job.sharing or "1"})
    if weights is not None:
        job.start = weights
        with crew.together():
            take_start(job)
    if resumed is not None:
        _go_on(job, as_written, console)
    return job


@dataclass(frozen=True)
class _Means:
    """What a run is trained with; compiled: whether to, where that is decided."""

    config: PipelineConfig
    device: torch.device
    shards: int
    memory: tuple[MemoryPlan, int]
    compiled: bool | None


def _choose_means(
    config: PipelineConfig, model_config: ModelConfig, folder: RunFolder | None, place: Place,
    *, own_model: bool,
) -> _Means:
    """Choose device, precision, sharing and how a step is cut.

    Raises UserError for what they cannot do or hold.
    """
    device = resolve_device(config.training.device)
    precision, compiled = _choices_of(folder, config)
    training = replace(config.training, precision=resolve_precision(precision, device))
    config = replace(config, training=training)
    shards = decide_shards(model_config, training, device, place)
    if not own_model:  # of another the plan knows too little to spend what is left
        training = choose_micro_batch(model_config, training, device, place, shards)
        config = replace(config, training=training)
    _check_means(config, device, place, shards)
    memory = check_memory(model_config, training, device, place, shards)
    return _Means(config, device, shards, memory, compiled)


def _find_start(
    place: str, config: PipelineConfig, corpus: Corpus, tracked: TrackedRun
) -> StartingPoint:
    """Return the weights to begin with, checked against the config, and put them on record."""
    start = find_starting_point(place)
    start.check(config, corpus.tokenizer)
    tracked.set_tags({"svend.init_from": start.place, "svend.init_sha256": start.sha256})
    return start


def _begin_folder(
    tracked: TrackedRun, as_written: PipelineConfig, config: PipelineConfig, corpus: Corpus,
    plan: RunPlan, device: torch.device, found: Hyperparameters | None, source: str | None,
) -> RunFolder:
    """Begin the folder of a new run; found and source are texts that it keeps, where there are any.
    """
    training = config.training
    files = {HYPERPARAMETERS: found.to_yaml()} if found else {}
    if source is not None:
        tracked.log_text(source, FACTORY_FILE)
        files[FACTORY_FILE] = source
    return RunFolder.create(as_written, RunIdentity(
        tracked.run_id, tracked.tracking_uri, training.experiment_name,
        training.model_scale.value, corpus.fingerprint, device.type, training.precision,
        plan.compile, corpus.tokenizer.sha256, model_factory_sha256=source_digest(source),
    ), files)


def _check_means(
    config: PipelineConfig, device: torch.device, place: Place, shards: int
) -> None:
    """Raise UserError for what the device cannot do, or the processes of the run cannot share."""
    training = config.training
    check_precision(training.precision, device)
    if training.float8:
        check_float8(training.precision, device)
    sequences = training.batch_size * training.gradient_accumulation_steps
    if sequences < place.size:
        raise ConfigError(
            f"training.batch_size x training.gradient_accumulation_steps = {sequences}: the "
            f"{place.size} processes of the run share the sequences of a step; raise "
            "training.gradient_accumulation_steps, or start fewer"
        )
    if shards == 1:
        return
    if config.checkpoint_cache_dir or is_on_google_drive(Path(config.checkpoint_dir).expanduser()):
        raise ConfigError(
            f"checkpoint_dir = {config.checkpoint_dir}: {shards} processes write their parts of a "
            "checkpoint straight into it; choose a folder that all see, without "
            "checkpoint_cache_dir, or set training.parallel=ddp"
        )
    for key, refused, instead in (
        ("precision", training.precision is Precision.FP16, "bf16 or fp32"),
        ("float8", training.float8, "false"),
    ):
        if refused:
            value = getattr(training, key)
            raise ConfigError(
                f"training.{key} = {getattr(value, 'value', value)}: is not for weights that "
                f"{shards} processes divide among them; set it to {instead}, or "
                "training.parallel=ddp"
            )


def _choices_of(folder: RunFolder | None, config: PipelineConfig) -> tuple[Precision, bool | None]:
    """Return the precision, and whether to compile if that is decided.

    What was chosen for a run stays, unless it is forced to go on with another setting.
    """
    precision = config.training.precision
    if folder is None:
        return precision, None
    changed, identity = folder.changed_settings(config), folder.identity
    return (
        precision if "training.precision" in changed else identity.precision,
        None if "training.compile" in changed else identity.compiled,
    )


def _record_forced(job: Job, config: PipelineConfig, console: Console) -> None:
    """Put on record what a forced resumption finds otherwise than the run was begun with."""
    folder, corpus, device = job.folder, job.corpus, job.device.type
    factory_sha256 = source_digest(factory_source(config))
    differences = [
        *folder.config_differences(config),
        *folder.machine_differences(
            corpus.fingerprint, corpus.tokenizer.sha256, device, factory_sha256
        ),
    ]
    if differences:
        folder.force(
            differences, config, job.state.step, data_fingerprint=corpus.fingerprint,
            tokenizer_sha256=corpus.tokenizer.sha256, device=device,
            model_factory_sha256=factory_sha256,
            precision=job.config.training.precision, compiled=job.plan.compile,
        )
        job.tracked.set_tags({FORCED_TAG: "; ".join(folder.identity.forced)[:MAX_TAG_LENGTH]})
    for difference in differences:
        say(console, f"warning: forced to go on although {difference}")


def _go_on(job: Job, config: PipelineConfig, console: Console) -> None:
    """Bring the job to where its newest checkpoint is, if it has one."""
    state, tracked = job.state, job.tracked
    if job.manager.list_checkpoints():
        job.call(load_state, job.manager.find_latest().path)
        job.saved_step = state.step
    # Steps between the checkpoint and a kill are trained again, to the same values.
    tracked.go_on_from(state.step)
    _record_forced(job, config, console)
    say(console, f"resuming run {tracked.run_id} from step {state.step}")


def _mirror_to_wandb(tracked: TrackedRun, config: PipelineConfig, console: Console) -> None:
    if config.training.use_wandb:
        project, folder = config.training.wandb_project, Path(config.checkpoint_dir).expanduser()
        place = tracked.mirror_to_wandb(project, to_tree(config), folder)
        console.print(f"W&B: {place}", soft_wrap=True)


def _find_hyperparameters(
    config: PipelineConfig, folder: RunFolder | None
) -> Hyperparameters | None:
    """Return what the config names; a resumed run keeps what it began with."""
    if config.hparams is None:
        return None
    if folder is not None:
        return read_hyperparameters(folder.path / HYPERPARAMETERS)
    recipe = config.training.data.recipe
    return fetch_hyperparameters(locate_hyperparameters(config.hparams, recipe))


def _checkpoint_manager(config: PipelineConfig, folder: RunFolder) -> CheckpointManager:
    limit, cache_dir = config.training.save_total_limit, config.checkpoint_cache_dir
    on_full_disk = config.training.on_full_disk
    if cache_dir is None and not is_on_google_drive(folder.path):
        return CheckpointManager(folder.path, limit, on_full_disk=on_full_disk)
    # By the run too: a folder may have been deleted, and its name be another run's now.
    name = f"{folder.path.name}-{folder.identity.run_id}"
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return DriveCheckpointManager(folder.path, cache / name, limit, on_full_disk=on_full_disk)
