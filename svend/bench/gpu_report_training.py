"""Parts of the GPU report that train: the same losses everywhere, memory and speed as planned."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svend import cuda
from svend.bench.gpu_report import Findings, NotRunError, Part, Size
from svend.bench.gpu_report_kernels import (
    check_attention,
    check_compile,
    check_device,
    check_float8,
    check_loss,
    nominal_peak,
)
from svend.data.documents import Kind
from svend.data.stream import BatchStream, PackedSequences
from svend.data.token_array import TokenArray
from svend.device import (
    available_bytes,
    can_compile,
    peak_bytes,
    resolve_precision,
    synchronize,
)
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.checkpoints import CheckpointManager
from svend.pipeline.config import (
    Compile,
    DataConfig,
    ModelConfig,
    MomentPrecision,
    Precision,
    TrainingConfig,
    WeightPrecision,
)
from svend.planning.flops import train_flops_per_token
from svend.planning.plan import choose_micro_batch, predict_memory_on
from svend.planning.probe import measure_matmul_peak
from svend.training.loop import train_steps
from svend.training.state import TrainState, build_state

CPU = torch.device("cpu")
SEED = 1
ROWS = 64  # of tokens that are made up
# What losses may differ by, in nats, over the first steps of one run.
FP32_DEVIATION = 2e-3
BF16_DEVIATION = 0.05
LOW_MEMORY_DEVIATION = 0.1
# A step's order of summation differs from run to run on CUDA: a resumed run may be so many times as
# far from one that was not interrupted as another of those is, and by this more.
RESUMED_SPREADS, RESUMED_DEVIATION = 10.0, 1e-4
# The moments' bytes per weight, and what scales and blocks may add.
MOMENT_BYTES = {
    MomentPrecision.FP32: 8.0, MomentPrecision.BF16: 4.0, MomentPrecision.INT8: 2.0,
    MomentPrecision.INT4: 1.0,
}
MOMENT_BYTES_MARGIN = 0.25
MOST_ACCUMULATION = 4  # micro-batches of a timed step


def parts_of(size: Size) -> list[Part]:
    """Return the parts of a report, the cheap and telling ones first."""
    return [
        Part("device", check_device, 20),
        Part("attention", check_attention, 15),
        Part("compile", check_compile, 45),
        Part("loss kernel", check_loss, 30),
        Part("loss parity with the CPU", check_parity, 25),
        Part("save and resume", check_resume, 15),
        Part("low-memory optimizers", check_low_memory, 60),
        Part("float8", check_float8, 75),
        *(
            Part(f"scale {name}", partial(check_scale, name), 25 + model.num_parameters() / 3e8)
            for name, (model, _) in size.scales.items()
        ),
    ]


def check_parity(device: torch.device, size: Size, findings: Findings) -> None:
    """Train from the same weights on the same batches here and on the CPU, in fp32 and in bf16."""
    precision = resolve_precision(Precision.AUTO, device)
    low = precision if device.type == "cuda" else Precision.BF16
    expected = _losses(size, CPU, _small_training(size, Precision.FP32))
    findings.note(f"loss on the CPU in fp32, step 1 and step {size.steps}",
                  f"{expected[0]:.4f} and {expected[-1]:.4f}")
    findings.note("it falls by", float(expected[0] - expected[-1]), "nats", least=0.01)
    for name, bound in ((Precision.FP32, FP32_DEVIATION), (low, BF16_DEVIATION)):
        losses = _losses(size, device, _small_training(size, name))
        findings.note(f"largest deviation, {name.value} on {device.type}",
                      _largest_deviation(losses, expected), "nats", most=bound)


def check_resume(device: torch.device, size: Size, findings: Findings) -> None:
    """Save in the middle of a run and go on from what was read: with all that was there, equally.

    With dropout, which draws random numbers: their state must come back too.
    """
    training = _small_training(size, _low_precision(device))
    half = size.steps // 2
    model = replace(TransformerConfig.from_model_config(size.small_model), attention_dropout=0.1)
    whole, again = (_losses(size, device, training, model) for _ in range(2))
    state = _small_state(size, device, training, model)
    losses = [float(metrics.loss) for metrics in train_steps(state, training, half)]
    with tempfile.TemporaryDirectory() as folder:
        manager = CheckpointManager(folder)
        manager.save(state.model, state.optimizer, state.scheduler, step=state.step,
                     extra_state=state.extra_state(), scaler=state.scaler)
        resumed = _small_state(size, device, training, model)
        torch.manual_seed(SEED + 1)  # not what the run had
        _, _, extra = manager.load_latest(
            resumed.model, resumed.optimizer, resumed.scheduler, resumed.scaler
        )
    resumed.load_extra_state(extra)
    saved, came_back = (list(_tensors(_content(each))) for each in (state, resumed))
    findings.note("tensors that came back", len(came_back), least=len(saved), most=len(saved))
    findings.note("of them not bit for bit", sum(
        not torch.equal(own, other) for own, other in zip(came_back, saved, strict=False)
    ), most=0)
    losses += [float(metrics.loss) for metrics in train_steps(resumed, training, size.steps)]
    spread = _largest_deviation(again, whole)
    findings.note("two runs that were not interrupted: largest deviation", spread, "nats")
    bound = RESUMED_SPREADS * spread + (RESUMED_DEVIATION if device.type == "cuda" else 0.0)
    findings.note("resumed: largest deviation", _largest_deviation(losses, whole), "nats",
                  most=bound)


def check_low_memory(device: torch.device, size: Size, findings: Findings) -> None:
    """Train with weights and moments in fewer bits; hold losses and bytes to account."""
    low = _low_precision(device)
    if low is not Precision.BF16:
        raise NotRunError(f"weights in bf16 are multiplied in bf16, and {device.type} has none")
    plain = _small_training(size, low)
    expected = _losses(size, device, plain)
    compiles = Compile.AUTO if size.compiles else Compile.OFF
    for weights, moments in (
        (WeightPrecision.FP32, MomentPrecision.FP32),
        (WeightPrecision.FP32, MomentPrecision.BF16),
        (WeightPrecision.BF16, MomentPrecision.BF16),
        (WeightPrecision.BF16, MomentPrecision.INT8),
        (WeightPrecision.BF16, MomentPrecision.INT4),
    ):
        training = replace(
            plain, weight_precision=weights, moment_precision=moments, compile=compiles
        )
        state = _small_state(size, device, training)
        losses = [float(metrics.loss) for metrics in train_steps(state, training, size.steps)]
        what = f"weights {weights.value}, moments {moments.value}"
        findings.note(f"{what}: largest deviation", _largest_deviation(losses, expected), "nats",
                      most=LOW_MEMORY_DEVIATION)
        weight = max(state.model.parameters(), key=lambda parameter: parameter.numel())
        expected_bytes = 2 if weights is WeightPrecision.BF16 else 4
        findings.note(f"{what}: bytes of a weight", weight.element_size(), least=expected_bytes,
                      most=expected_bytes)
        findings.note(f"{what}: bytes of its moments", _moment_bytes(state),
                      most=MOMENT_BYTES[moments] + MOMENT_BYTES_MARGIN)


def check_scale(name: str, device: torch.device, size: Size, findings: Findings) -> None:
    """Hold a scale's peak memory against the plan, then time its steps; where it fits.

    The plan counts what is kept uncompiled, and so it is measured; the time is of compiled blocks.
    """
    model, training = size.scales[name]
    training = replace(training, precision=resolve_precision(training.precision, device))
    training = choose_micro_batch(model, training, device)
    training = replace(training, gradient_accumulation_steps=min(
        MOST_ACCUMULATION, training.gradient_accumulation_steps
    ))
    plan, available = predict_memory_on(model, training, device), available_bytes(device)
    if plan.total > available:
        raise NotRunError(f"by the plan it needs {plan.total / 1e9:.1f} GB, and "
                          f"{available / 1e9:.1f} GB are there")
    state = _state_of_scale(model, training, device)
    steps = train_steps(state, training, 2**31)
    next(steps)  # makes the optimizer's state
    with _measured_peak(state) as peak:
        next(steps)
    findings.note("micro-batch", f"{training.batch_size} x {training.data.max_seq_length} tokens, "
                  f"computed again: {_recomputed(training)}")
    findings.note("planned peak of tensors", plan.tensors / 1e9, "GB")
    findings.note("measured peak of tensors", peak["bytes"] / 1e9, "GB")
    findings.note("measured over planned", peak["bytes"] / plan.tensors,
                  least=1 - size.memory_tolerance, most=1 + size.memory_tolerance)
    if device.type == "cuda":
        findings.note("planned in all, with what the allocator cannot use", plan.total / 1e9, "GB")
        findings.note("held by the allocator", cuda.peak_reserved_bytes(device) / 1e9, "GB")
    if size.compiles and can_compile(device):
        assert isinstance(state.model, ReasoningTransformer)
        state.model.compile_blocks()
        started = time.perf_counter()
        next(steps)
        synchronize(device)
        findings.note("first compiled step", time.perf_counter() - started, "s")
    _note_speed(state, steps, model, training, size, findings)


def _recomputed(training: TrainingConfig) -> str:
    policy = training.gradient_checkpointing_policy.value
    return policy if training.gradient_checkpointing else "nothing"


def _note_speed(
    state: TrainState, steps: Iterator[object], model: ModelConfig, training: TrainingConfig,
    size: Size, findings: Findings,
) -> None:
    """Time steps for a while, and say which share of the peak they reach."""
    device, length = state.device, training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    synchronize(device)
    begun, count = time.perf_counter(), 0
    while count < 2 or time.perf_counter() - begun < size.timed_seconds:
        next(steps)
        synchronize(device)
        count += 1
    seconds = (time.perf_counter() - begun) / count
    tokens = training.batch_size * training.gradient_accumulation_steps * length
    rate = tokens / seconds
    flops = rate * train_flops_per_token(model, length)
    findings.note("step timed", f"{training.gradient_accumulation_steps} x {training.batch_size} x "
                                f"{length} tokens, {count} times")
    findings.note("tokens per second", rate)
    findings.note("model FLOPs", flops / 1e12, "TFLOP/s")
    peak = measure_matmul_peak(training.precision, device)
    findings.note("MFU, of the measured peak", flops / peak, least=size.least_peak_share, most=1.0)
    nominal = nominal_peak(device)
    if nominal is None:
        findings.note("MFU, of the nominal peak", "unknown")
    else:
        findings.note("MFU, of the nominal peak", flops / nominal, most=1.0)


@contextmanager
def _measured_peak(state: TrainState) -> Iterator[dict[str, int]]:
    """Have the peak of what is in tensors stand under `bytes` afterwards.

    A CPU's allocator keeps no such count: there each operation is followed.
    """
    measured: dict[str, int] = {}
    if state.device.type == "cuda":
        synchronize(state.device)
        cuda.reset_peak(state.device)
        yield measured
        synchronize(state.device)
        measured["bytes"] = peak_bytes(state.device)
        return
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(state.model, state.optimizer)
    with tracker:
        yield measured
    measured["bytes"] = tracker.get_tracker_snapshot("peak")[state.device]["Total"]


def _state_of_scale(
    model_config: ModelConfig, training: TrainingConfig, device: torch.device
) -> TrainState:
    """Return a state whose weights are drawn where they are: of billions, a CPU's take minutes."""
    with torch.device("meta"):
        model = ReasoningTransformer(TransformerConfig.from_model_config(model_config))
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, 0.0, model.config.initializer_range)
        else:
            nn.init.ones_(parameter)
    if training.gradient_checkpointing:
        model.checkpoint_blocks(training.gradient_checkpointing_policy)
    length = training.data.max_seq_length
    assert length is not None  # set by PipelineConfig.resolve
    sequences = _sequences(model_config.vocab_size, length, ROWS)
    stream = BatchStream(sequences, training.batch_size, training.gradient_accumulation_steps)
    return build_state(model, stream, training, 2**31, device)


def _small_training(size: Size, precision: Precision) -> TrainingConfig:
    data = DataConfig(
        sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=size.small_length
    )
    return TrainingConfig(
        batch_size=size.small_batch_size, gradient_accumulation_steps=1, precision=precision,
        learning_rate=1e-3, data=data, seed=SEED,
    )


def _small_state(
    size: Size, device: torch.device, training: TrainingConfig,
    shape: TransformerConfig | None = None,
) -> TrainState:
    """Return the state before step 1, the same on every device."""
    torch.manual_seed(SEED)
    model = ReasoningTransformer(shape or TransformerConfig.from_model_config(size.small_model))
    model.initialize(SEED)
    sequences = _sequences(size.small_model.vocab_size, size.small_length, ROWS)
    stream = BatchStream(sequences, training.batch_size)
    return build_state(model, stream, training, size.steps, device)


def _losses(
    size: Size, device: torch.device, training: TrainingConfig,
    shape: TransformerConfig | None = None,
) -> list[float]:
    """Train the small model, and return the loss of each step."""
    state = _small_state(size, device, training, shape)
    return [float(metrics.loss) for metrics in train_steps(state, training, size.steps)]


def _sequences(vocab_size: int, length: int, rows: int) -> PackedSequences:
    """Return rows of one document each, whose next token mostly follows from the last."""
    generator = np.random.default_rng(SEED)
    tokens_RT = generator.integers(0, vocab_size, (rows, length))
    follows_RT = generator.random((rows, length)) < 0.9
    for place in range(1, length):
        following_R = (5 * tokens_RT[:, place - 1] + 3) % vocab_size
        tokens_RT[:, place] = np.where(follows_RT[:, place], following_R, tokens_RT[:, place])
    part = TokenArray.of("train", list(tokens_RT.astype(np.uint16)), [Kind.GENERAL] * rows)
    data = DataConfig(sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=length)
    return PackedSequences(part, data, SEED)


def _low_precision(device: torch.device) -> Precision:
    on_cuda = device.type == "cuda"
    return resolve_precision(Precision.AUTO, device) if on_cuda else Precision.BF16


def _largest_deviation(losses: list[float], expected: list[float]) -> float:
    return float(np.abs(np.subtract(losses, expected)).max())


def _moment_bytes(state: TrainState) -> float:
    """Return what the moments of the largest weight take, in bytes per entry of it."""
    weights = [p for group in state.optimizer.param_groups for p in group["params"]]
    index = max(range(len(weights)), key=lambda i: weights[i].numel())
    held = state.optimizer.state_dict()["state"][index]
    held_bytes = sum(int(t.nbytes) for t in _tensors(held) if t.dim() > 0)
    return held_bytes / int(weights[index].numel())


def _content(state: TrainState) -> dict[str, Any]:
    """Return all that a checkpoint is to bring back."""
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict()["state"],
        "extra": state.extra_state(),
    }


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for key in tree:
            yield from _tensors(tree[key])
    elif isinstance(tree, list | tuple):
        for entry in tree:
            yield from _tensors(entry)
