"""The data of a run: its corpus, packed into the sequences that it trains on and is measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svend.data.corpus import Corpus, build_corpus
from svend.data.stream import PackedSequences
from svend.data.tokenised import Progress
from svend.pipeline.benchmarking import evaluation_sets
from svend.pipeline.config import PipelineConfig, TrainingConfig


@dataclass(frozen=True)
class RunData:
    """What a run trains on, and is measured on."""

    corpus: Corpus
    sequences: PackedSequences
    heldout: PackedSequences


def read_run_data(config: PipelineConfig, report: Progress) -> RunData:
    """Return the data of a resolved configuration, tokenised unless they were before.

    report: is told what is done meanwhile.
    """
    assert config.model is not None  # set by PipelineConfig.resolve
    training = config.training
    corpus = build_corpus(
        training.data, config.model.vocab_size, training.data_seed, report, evaluation_sets(config)
    )
    return RunData(
        corpus,
        PackedSequences(corpus.train, training.data, training.seed),
        PackedSequences(corpus.heldout, training.data, training.data_seed),
    )


def steps_over(sequences: PackedSequences, training: TrainingConfig) -> int:
    """Return the steps that the wanted epochs over the data take."""
    sequences_per_step = training.batch_size * training.gradient_accumulation_steps
    return math.ceil(training.num_epochs * len(sequences) / sequences_per_step)
