"""Our own training loop as a contestant: the same stream, step and optimizer as in a run."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import torch

from svend.bench.spec import Contestant, Spec
from svend.data.documents import Kind
from svend.data.stream import BatchStream, PackedSequences
from svend.data.token_array import TokenArray
from svend.device import keep_freed_memory
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import DataConfig, Precision, TrainingConfig
from svend.training.loop import train_steps
from svend.training.state import build_state

ROWS = 512  # of random tokens, where there are no documents


def svend_compiled(spec: Spec) -> Contestant:
    """Blocks compiled, as in a run that is long enough."""
    return _svend(spec, compiled=True)


def svend_eager(spec: Spec) -> Contestant:
    """Not compiled, as in a short run."""
    return _svend(spec, compiled=False)


def _svend(spec: Spec, *, compiled: bool) -> Contestant:
    keep_freed_memory()
    data = DataConfig(sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=spec.length)
    training = TrainingConfig(
        batch_size=spec.batch_size, gradient_accumulation_steps=1, precision=Precision.BF16,
        data=data, seed=spec.seed,
    )
    sequences = PackedSequences(_tokens(spec), data, spec.seed)
    model = ReasoningTransformer(TransformerConfig(
        name="bench", hidden_size=spec.hidden_size, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        intermediate_size=spec.intermediate_size, vocab_size=spec.vocab_size,
        max_position_embeddings=max(spec.length, 2048),
    ))
    if compiled:
        model.compile_blocks()
    stream = BatchStream(sequences, spec.batch_size)
    state = build_state(model, stream, training, sys.maxsize, torch.device(spec.device))
    # A second stream looks at what the first hands to the loop.
    watched = BatchStream(sequences, spec.batch_size)
    steps = train_steps(state, training, sys.maxsize)

    def step() -> int:
        useful = int((next(watched).documents_BT >= 0).sum())
        next(steps)
        return useful

    return Contestant(sum(p.numel() for p in model.parameters()), step)


def _tokens(spec: Spec) -> TokenArray:
    if spec.documents is None:
        generator = np.random.default_rng(spec.seed)
        rows = generator.integers(0, spec.vocab_size, (ROWS, spec.length)).astype(np.uint16)
        pieces = list(rows)
    else:
        with np.load(spec.documents) as file:
            tokens, offsets = file["tokens"], file["offsets"]
        pieces = [tokens[a:b][: spec.length] for a, b in itertools.pairwise(offsets)]
    return TokenArray.of("train", pieces, [Kind.GENERAL] * len(pieces))
