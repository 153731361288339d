"""Predicted peak memory beside what PyTorch's memory tracker counts on tensors without storage.

So a scale of any size is checked on a small machine. The model, the loss and the optimizer are the
real ones; moments in int8 and int4 are stand-ins of their size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.weak import WeakIdKeyDictionary

from svend.bench.memory_check import MemoryCheck
from svend.device import autocast
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import (
    ModelConfig,
    ModelScale,
    MomentPrecision,
    Precision,
    TrainingConfig,
    get_model_config,
)
from svend.planning.memory import MOMENT_BYTES, predict_memory
from svend.training.low_memory import prepare_weights
from svend.training.optimizers import build_optimizer

CPU = torch.device("cpu")


class _TotalTracker(MemTracker):  # type: ignore[no-untyped-call]
    """Keeps the peak of all tensors alone; each module's too takes time by the square of layers."""

    def __init__(self) -> None:
        super().__init__()
        self._no_modules: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, self._no_modules
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


def check_scale(scale: ModelScale) -> MemoryCheck:
    """Track a scale with its own settings, as on a card with bf16."""
    training = TrainingConfig(model_scale=scale)
    training.apply_scale_defaults()
    model = get_model_config(scale)
    training = replace(
        training, precision=Precision.BF16,
        data=replace(training.data, max_seq_length=model.max_position_embeddings),
    )
    return check_on_fake_tensors(model, training)


def check_on_fake_tensors(model: ModelConfig, training: TrainingConfig) -> MemoryCheck:
    """Return predicted and tracked peak of a micro-batch of a later step.

    The tracker sees no allocator, no process, and nothing that attention's operator takes inside.
    """
    seen_by_tracker = predict_memory(model, training, 0, kernel_bytes=False)
    return MemoryCheck(model.name, training, seen_by_tracker.tensors, track_peak(model, training))


def track_peak(config: ModelConfig, training: TrainingConfig) -> int:
    """Return the peak of a forward and backward pass and an update, in bytes."""
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    with FakeTensorMode():
        model = _build(config, training)
        optimizer, moments = _optimizer_state(model, training)
        if training.gradient_accumulation_steps == 1:
            model.zero_grad(set_to_none=True)
        tracker = _TotalTracker()
        tracker.track_external(model, *moments, *([optimizer] if optimizer else ()))
        with tracker:
            ids_BT = torch.zeros(training.batch_size, length, dtype=torch.int64)
            with autocast(training.precision, CPU):
                summed = model(ids_BT, ids_BT.clone(), ids_BT.clone())
            summed.backward()
            if optimizer is not None:
                optimizer.step()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return int(peak["Total"])


def _build(config: ModelConfig, training: TrainingConfig) -> ReasoningTransformer:
    model = ReasoningTransformer(TransformerConfig.from_model_config(config))
    prepare_weights(model, training)
    if training.gradient_checkpointing:
        model.checkpoint_blocks(training.gradient_checkpointing_policy)
    return model.train()


def _optimizer_state(
    model: nn.Module, training: TrainingConfig
) -> tuple[torch.optim.Optimizer | None, list[torch.Tensor]]:
    """Return the optimizer with its state, or stand-ins for a state that fake tensors cannot be.

    Leaves a gradient at every parameter, as an earlier micro-batch does.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if training.moment_precision in (MomentPrecision.FP32, MomentPrecision.BF16):
        optimizer = build_optimizer(model, training)
        optimizer.step()
        return optimizer, []
    of_matrix = MOMENT_BYTES[training.moment_precision]
    return None, [
        torch.empty(round(p.numel() * (of_matrix if p.dim() == 2 else 8)), dtype=torch.uint8)
        for p in model.parameters()
    ]
