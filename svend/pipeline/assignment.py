"""What the processes of a run are told before its first step, and what each builds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from svend.data.stream import BatchStream, PackedSequences
from svend.errors import DataError, UserError, one_line
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import PipelineConfig
from svend.pipeline.crew import Crew, Dismissal
from svend.pipeline.own_model import ModelFactory
from svend.pipeline.replica import Replica, take_start
from svend.pipeline.run_data import RunData, read_run_data
from svend.pipeline.run_model import build_model
from svend.training.parallel import Ranks, give_up, shard_mesh
from svend.training.state import TrainState, build_state


@dataclass(frozen=True)
class Assignment:
    """What the first process tells the others of a run before its first step.

    The config as it was resolved on the first's machine. vocabulary: the tokenizer's entries.
    starts: whether weights come from the first.
    question: under which they answer that they are ready.
    """

    config: PipelineConfig
    data_fingerprint: str
    vocabulary: int
    total_steps: int
    compiled: bool
    sharded: bool
    starts: bool
    question: str


def build_replica_state(
    assignment: Assignment, sequences: PackedSequences, model_factory: ModelFactory | None,
    device: torch.device, ranks: Ranks,
) -> TrainState:
    """Return the state before step 1, of which this process holds the whole or a part.

    Each process of the run must call this with the same assignment.
    """
    config, training = assignment.config, assignment.config.training
    mesh = shard_mesh(ranks, device, training.shard_processes) if assignment.sharded else None
    model = build_model(config, model_factory, device, assignment.vocabulary, mesh)
    if assignment.compiled and isinstance(model, ReasoningTransformer):
        model.compile_blocks()
    stream = BatchStream(
        sequences, training.batch_size, training.gradient_accumulation_steps, ranks.rank, ranks.size
    )
    return build_state(model, stream, training, assignment.total_steps, device, ranks)


def assign(
    crew: Crew, assignment: Assignment, sequences: PackedSequences,
    model_factory: ModelFactory | None, device: torch.device,
) -> TrainState:
    """Tell the other processes of the run, and build with them the state before step 1."""
    crew.tell(assignment)
    crew.hear_answers(assignment.question)
    with crew.together():
        return build_replica_state(assignment, sequences, model_factory, device, crew.ranks)


def follow_run(model_factory: ModelFactory | None, device: torch.device, crew: Crew) -> Any:
    """Do a process's share of the run that the first one leads; return how that one ended it."""
    try:
        told = crew.hear()
        if isinstance(told, Assignment):
            return crew.follow(_join_run(told, model_factory, device, crew))
    except Exception as error:
        give_up()
        crew.leave_note(f"{type(error).__name__}: {one_line(error)[:200]}")
        raise
    assert isinstance(told, Dismissal)
    return told.outcome


def _join_run(
    assignment: Assignment, model_factory: ModelFactory | None, device: torch.device, crew: Crew
) -> Replica:
    try:
        data = _same_data(assignment)
    except UserError as error:
        crew.answer(assignment.question, one_line(error))
        raise
    crew.answer(assignment.question, None)
    state = build_replica_state(assignment, data.sequences, model_factory, device, crew.ranks)
    replica = Replica(
        config=assignment.config, device=device, sequences=data.sequences, heldout=data.heldout,
        state=state, total_steps=assignment.total_steps, crew=crew,
    )
    if assignment.starts:
        take_start(replica)
    return replica


def _same_data(assignment: Assignment) -> RunData:
    """Return the data as they are here; raises DataError where they are others."""
    data = read_run_data(assignment.config, lambda _: None)
    fingerprint = data.corpus.fingerprint
    if fingerprint != assignment.data_fingerprint:
        raise DataError(
            f"the data here have the fingerprint {fingerprint[:16]}, those of rank 0 "
            f"{assignment.data_fingerprint[:16]}; give every machine the same files"
        )
    return data
