"""Two steps of the real loop in a process of its own, which says what memory they took."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import psutil
import torch

from svend.bench.memory import Combination, Freed
from svend.data.documents import Kind
from svend.data.stream import BatchStream, PackedSequences
from svend.data.token_array import TokenArray
from svend.device import M_TRIM_THRESHOLD, keep_freed_memory
from svend.errors import UserError
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import ModelConfig, TrainingConfig, get_model_config
from svend.training.loop import train_steps
from svend.training.state import TrainState, build_state

STEPS = 2  # in the second the optimizer's state is there from the start
M_MMAP_THRESHOLD = -3  # glibc's <malloc.h>
MAPPED_BYTES = 2**17  # glibc's first threshold, which otherwise rises with what is freed


def main(combination_json: str, freed: str) -> None:
    """Train; print as JSON what the process held before, and at its peak."""
    combination = Combination(**json.loads(combination_json))
    training = combination.training()
    model = get_model_config(training.model_scale)
    if Freed(freed) is Freed.KEPT:
        keep_freed_memory()
    else:
        _map_each_tensor()
    process_bytes = psutil.Process().memory_info().rss
    state = build_fresh_state(model, training)
    for _ in train_steps(state, training, STEPS):
        pass
    print(json.dumps({"process_bytes": process_bytes, "peak_bytes": _peak_bytes()}))


def _map_each_tensor() -> None:
    """Have glibc map each large tensor by itself, and unmap it when it is freed.

    Then the most that the process held is the most that its tensors took at once.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        raise UserError("bench memory: needs a malloc that can be told to unmap; use glibc's")
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, MAPPED_BYTES)


def build_fresh_state(model_config: ModelConfig, training: TrainingConfig) -> TrainState:
    """Return the state before step 1, with as many rows of random tokens as the steps take."""
    length = training.data.max_seq_length
    assert length is not None  # set by Combination
    rows = STEPS * training.batch_size * training.gradient_accumulation_steps
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, (rows, length))
    array = TokenArray.of("train", list(tokens.astype(np.uint16)), [Kind.GENERAL] * rows)
    sequences = PackedSequences(array, training.data, training.seed)
    model = ReasoningTransformer(TransformerConfig.from_model_config(model_config))
    if training.gradient_checkpointing:
        model.checkpoint_blocks(training.gradient_checkpointing_policy)
    stream = BatchStream(sequences, training.batch_size, training.gradient_accumulation_steps)
    return build_state(model, stream, training, STEPS, torch.device("cpu"))


def _peak_bytes() -> int:
    """Return the most memory that was held; not by getrusage, which counts the parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
