"""Short measurements on this machine, by which a run's time is predicted."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from svend.device import DTYPES, autocast, synchronize
from svend.models.attention import lay_out_documents
from svend.models.config import TransformerConfig
from svend.models.float8 import compute_in_float8
from svend.models.loss import summed_linear_cross_entropy
from svend.models.parametrisation import scaling_rules
from svend.models.transformer import Block, rotary_tables
from svend.pipeline.config import ModelConfig, Precision, TrainingConfig

LONGEST_PROBE_SECONDS = 2.0


def measure_matmul_peak(precision: Precision, device: torch.device) -> float:
    """Return the fastest rate of a large square matrix product, in FLOPs per second.

    One factor is transposed, as in a linear layer.
    """
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(DTYPES[precision])
    out = torch.empty_like(a)
    seconds = _fastest(lambda: torch.matmul(a, a.T, out=out), device, repeats=8)
    return 2 * size**3 / seconds


def measure_micro_batch_seconds(
    model: ModelConfig, training: TrainingConfig, device: torch.device
) -> tuple[float, float]:
    """Return predicted seconds of a micro-batch (forward and backward) and of an update.

    One block and the head are run at the real shape, uncompiled, and scaled to the whole model.
    """
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    shape = TransformerConfig.from_model_config(model)
    dtype = DTYPES[training.precision]
    batch = training.batch_size
    with device:
        block = Block(shape, scaling_rules(shape))
        x_BTD = torch.randn(batch, length, model.hidden_size, dtype=dtype, requires_grad=True)
        positions_BT = torch.arange(length).expand(batch, length)
        tables = rotary_tables(positions_BT, model.head_size, model.rope_theta)
        layout = lay_out_documents(torch.zeros(batch, length, dtype=torch.int64), None)
        # Small, as a real head is: large logits underflow, and subnormal numbers are slow.
        head_VD = (0.02 * torch.randn(model.vocab_size, model.hidden_size)).requires_grad_()
        labels_N = torch.zeros(batch * length, dtype=torch.int64)
    cos_B1TS, sin_B1TS = (table.to(dtype) for table in tables)
    if training.float8:
        compute_in_float8(block)
    if training.gradient_checkpointing:
        block.checkpointing = training.gradient_checkpointing_policy
    optimizer = torch.optim.AdamW(block.parameters(), fused=True)

    def run_block() -> None:
        with autocast(training.precision, device):
            out_BTD = block(x_BTD, cos_B1TS, sin_B1TS, layout, False)
        out_BTD.backward(torch.ones_like(out_BTD))

    def run_head() -> None:
        with autocast(training.precision, device):
            loss = summed_linear_cross_entropy(x_BTD.flatten(0, 1), head_VD, labels_N)
        loss.backward()  # type: ignore[no-untyped-call]

    block_seconds = _fastest(run_block, device, repeats=2)
    head_seconds = _fastest(run_head, device, repeats=1)  # the longest of the three
    block_parameters = model.num_block_parameters() / model.num_hidden_layers
    update_seconds = _fastest(optimizer.step, device, repeats=2)
    return (
        model.num_hidden_layers * block_seconds + head_seconds,
        update_seconds * model.num_parameters() / block_parameters,
    )


def _fastest(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the least time of several runs, after one that warms up.

    Where a run takes seconds, warming up matters little, and fewer are made.
    """
    times: list[float] = []
    while len(times) <= repeats and sum(times) < LONGEST_PROBE_SECONDS:
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)
