"""Parts of the GPU report: the card, and one kernel at a time against a reference in fp32."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from svend import cuda
from svend.bench.gpu_report import Findings, NotRunError, Size
from svend.device import (
    DTYPES,
    autocast,
    available_bytes,
    can_compile,
    describe_device,
    resolve_precision,
    synchronize,
)
from svend.errors import ResourceError
from svend.models.attention import attend, lay_out_documents
from svend.models.config import TransformerConfig
from svend.models.float8 import compute_in_float8
from svend.models.loss import summed_linear_cross_entropy
from svend.models.parametrisation import scaling_rules
from svend.models.transformer import Block, rotary_tables
from svend.pipeline.config import Precision
from svend.planning.gpus import bf16_peak_of
from svend.planning.probe import measure_matmul_peak

# Errors are the norm of the difference over the norm of the reference.
BF16_ERROR = 0.02
FP32_ERROR = 1e-3
FLOAT8_ERROR = 0.15  # a product's own is about 0.04: three bits behind the point
LOSS_ERROR = 1e-3
# What must be seen at work, by the kind of device, in the name of a kernel or of what starts it.
ATTENTION_KERNELS = {
    "cuda": ("flash_fwd|_flash_attention_forward", "flash_bwd|_flash_attention_backward"),
    "cpu": ("attend_blockwise$", "attend_blockwise_backward$"),
}
REFERENCE_TOKENS = 4096  # the reference's logits are held whole, in fp32


def nominal_peak(device: torch.device) -> float | None:
    """Return what the card's data sheet promises of bf16 products; None where it is not known."""
    if device.type != "cuda":
        return None
    return bf16_peak_of(cuda.device_name(device))


def check_device(
    device: torch.device, size: Size, findings: Findings,  # noqa: ARG001  (as every part's)
) -> None:
    """Name the card, the software and the peak; expect that they can train at all."""
    findings.note("device", describe_device(device))
    findings.note("torch", torch.__version__)
    findings.note("Python", platform.python_version())
    findings.note("memory available", available_bytes(device) / 1e9, "GB", least=0.5)
    if device.type == "cuda":
        findings.note("CUDA that torch is built for", torch.version.cuda or "none")
        findings.note("driver", cuda.driver_version())
        findings.note("compute capability", "{}.{}".format(*cuda.capability(device)))
        findings.note("memory in all", cuda.total_bytes(device) / 1e9, "GB")
    precision = resolve_precision(Precision.AUTO, device)
    findings.note("precision", precision.value)
    findings.note("compiles", "yes" if can_compile(device) else "no: no compiler or no Python.h")
    peak = measure_matmul_peak(precision, device)
    findings.note("matrix product's peak, measured", peak / 1e12, "TFLOP/s")
    nominal = nominal_peak(device)
    if nominal is None:
        findings.note("matrix product's peak, nominal", "unknown")
        return
    findings.note("matrix product's peak, nominal", nominal / 1e12, "TFLOP/s")
    # More than all of it: the clock or the table is wrong; far less: the card is shared or slowed.
    findings.note("measured over nominal", peak / nominal, least=0.4, most=1.05)


def check_attention(device: torch.device, size: Size, findings: Findings) -> None:
    """Hold attention within documents against a masked softmax in fp32, and name its kernels."""
    shape = TransformerConfig.from_model_config(size.model)
    low = _low_dtype(device)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        drawn = torch.randn(
            size.batch_size, heads, size.length, shape.head_size, generator=generator
        )
        return drawn.to(low).to(device)

    drawn = [draw(shape.heads), draw(shape.kv_heads), draw(shape.kv_heads), draw(shape.heads)]
    documents_BT = several_documents(size.batch_size, size.length)
    layout = lay_out_documents(drawn[0], documents_BT)
    expected = _forward_and_backward(
        lambda q, k, v: masked_attention(q, k, v, documents_BT.to(device)),
        [x.float() for x in drawn],
    )
    for dtype, bound in ((low, BF16_ERROR), (torch.float32, FP32_ERROR)):
        inputs = [x.to(dtype) for x in drawn]

        def run(inputs: list[Tensor] = inputs) -> list[Tensor]:
            return _forward_and_backward(
                lambda q, k, v: attend(q, k, v, layout, 0.0, False), inputs
            )

        for name, own, reference in zip(
            ("output", "query's gradient", "key's gradient", "value's gradient"), run(), expected,
            strict=True,
        ):
            findings.note(f"{name}, {_name(dtype)}: error", relative_error(own, reference),
                          most=bound)
        findings.note(f"forward and backward, {_name(dtype)}",
                      1e3 * fastest(run, device), "ms")
        if dtype is low:
            _note_kernels(run, device, findings)
    findings.note("masked softmax in fp32, forward and backward", 1e3 * fastest(
        lambda: _forward_and_backward(
            lambda q, k, v: masked_attention(q, k, v, documents_BT.to(device)),
            [x.float() for x in drawn],
        ), device), "ms")


def check_compile(device: torch.device, size: Size, findings: Findings) -> None:
    """Compile a block; expect that it gives what it gave, and no more slowly."""
    if not can_compile(device):
        raise ResourceError("no compiler or no Python.h found; install gcc and Python's headers")
    block, run = _block_at_work(device, size)
    expected = run(False)
    eager_seconds = fastest(lambda: run(False), device)
    block.compile(dynamic=False)
    started = time.perf_counter()
    given = run(True)
    synchronize(device)
    findings.note("first step, compiled from nothing", time.perf_counter() - started, "s")
    for name, own, reference in zip(("output", "input's gradient"), given, expected, strict=False):
        findings.note(f"{name}: error", relative_error(own, reference), most=BF16_ERROR)
    worst = max(map(relative_error, given[2:], expected[2:]))
    findings.note("weights' gradients: largest error", worst, most=BF16_ERROR)
    compiled_seconds = fastest(lambda: run(True), device)
    findings.note("a block, not compiled", 1e3 * eager_seconds, "ms")
    findings.note("a block, compiled", 1e3 * compiled_seconds, "ms")
    findings.note("speed-up", eager_seconds / compiled_seconds, "x", least=size.least_speed_up)


def check_loss(device: torch.device, size: Size, findings: Findings) -> None:
    """Hold the head's loss and its gradients, chunk by chunk, against whole logits in fp32."""
    tokens = min(size.batch_size * size.length, REFERENCE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    low = _low_dtype(device)
    x_ND = torch.randn(tokens, size.model.hidden_size, generator=generator).to(low).to(device)
    w_VD = torch.randn(size.model.vocab_size, size.model.hidden_size, generator=generator)
    w_VD = (0.05 * w_VD).to(low).float().to(device)
    labels_N = torch.randint(size.model.vocab_size, (tokens,), generator=generator)
    labels_N[::7] = -100
    labels_N = labels_N.to(device)

    def gradients(
        loss_of: Callable[[Tensor, Tensor], Tensor], x_ND: Tensor
    ) -> tuple[float, Tensor, Tensor]:
        x_ND, weight_VD = x_ND.clone().requires_grad_(), w_VD.clone().requires_grad_()
        loss = loss_of(x_ND, weight_VD)
        loss.backward()  # type: ignore[no-untyped-call]
        assert x_ND.grad is not None and weight_VD.grad is not None
        return float(loss.detach()), x_ND.grad, weight_VD.grad

    loss, grad_x_ND, grad_w_VD = gradients(
        lambda x, w: F.cross_entropy(x @ w.T, labels_N, reduction="sum"), x_ND.float()
    )
    for fused in (False, True) if size.compiles and can_compile(device) else (False,):

        def run(fused: bool = fused) -> tuple[float, Tensor, Tensor]:
            return gradients(
                lambda x, w: summed_linear_cross_entropy(x, w, labels_N, fused), x_ND
            )

        how = "compiled" if fused else "not compiled"
        own_loss, own_x_ND, own_w_VD = run()
        findings.note(f"loss, {how}: error", abs(own_loss / loss - 1), most=LOSS_ERROR)
        findings.note(f"hidden states' gradient, {how}: error",
                      relative_error(own_x_ND, grad_x_ND), most=BF16_ERROR)
        findings.note(f"head's gradient, {how}: error",
                      relative_error(own_w_VD, grad_w_VD), most=BF16_ERROR)
        findings.note(f"forward and backward, {how}", 1e3 * fastest(run, device), "ms")


def check_float8(device: torch.device, size: Size, findings: Findings) -> None:
    """Hold a block that multiplies in float8 against itself in bf16; emulated on a CPU."""
    if device.type == "cuda" and not cuda.multiplies_in_float8(device):
        raise NotRunError(f"{describe_device(device)} does not multiply in float8; an H100 does")
    if importlib.util.find_spec("torchao") is None:
        raise NotRunError("needs torchao; pip install 'svend[float8]'")
    findings.note("torchao", importlib.metadata.version("torchao"))
    emulated = device.type != "cuda"
    size = replace(size, model=size.wide_model)
    findings.note("block of", f"{size.model.name}, {size.batch_size} x {size.length} tokens")
    findings.note("products", "emulated" if emulated else "in float8")
    block, run = _block_at_work(device, size)
    expected = run(False)
    # Compiled they are to be compared: what turns numbers into float8 is slow otherwise.
    compiled = size.compiles and not emulated and can_compile(device)
    if compiled:
        block.compile(dynamic=False)
    bf16_seconds = fastest(lambda: run(compiled), device)
    block, run = _block_at_work(device, size)
    compute_in_float8(block, emulated)
    if compiled:
        block.compile(dynamic=False)
    given = run(compiled)
    findings.note("output: error", relative_error(given[0], expected[0]), most=FLOAT8_ERROR)
    worst = max(map(relative_error, given[1:], expected[1:]))
    findings.note("gradients: largest error", worst, most=FLOAT8_ERROR)
    findings.note("speed-up over bf16", bf16_seconds / fastest(lambda: run(compiled), device), "x",
                  least=None if emulated else size.least_speed_up)


def several_documents(batch_size: int, length: int) -> Tensor:
    """Return document numbers of rows that hold short and long documents, and padding at the end.

    Lengths double along a row, and the rows differ.
    """
    rows = []
    for row in range(batch_size):
        lengths: list[int] = []
        while sum(lengths) < length - 3:
            lengths.append(5 + 3 * row + 2 ** len(lengths))
        numbers = [number for number, count in enumerate(lengths) for _ in range(count)]
        rows.append((numbers[: length - 3] + 3 * [-1])[:length])
    return torch.tensor(rows)


def masked_attention(
    q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, documents_BT: Tensor
) -> Tensor:
    """Return attention as its definition says: all scores, a mask, a softmax."""
    group = q_BHTS.shape[1] // k_BKTS.shape[1]
    k_BHTS, v_BHTS = (x.repeat_interleave(group, dim=1) for x in (k_BKTS, v_BKTS))
    length = q_BHTS.shape[2]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=q_BHTS.device).tril()
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    scores_BHTT = q_BHTS @ k_BHTS.transpose(2, 3) / math.sqrt(q_BHTS.shape[3])
    scores_BHTT = scores_BHTT.masked_fill(~(causal_TT & same_BTT)[:, None], -math.inf)
    return scores_BHTT.softmax(dim=-1) @ v_BHTS


def relative_error(own: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    difference = own.double() - reference.double()
    return float(difference.norm() / reference.double().norm())


def fastest(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the least seconds of a few runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _forward_and_backward(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """Return the output, and the gradients of query, key and value by that of the output."""
    *leaves, grad_BHTS = (x.detach().clone() for x in inputs)
    out_BHTS = function(*(leaf.requires_grad_() for leaf in leaves))
    out_BHTS.backward(grad_BHTS)  # type: ignore[no-untyped-call]
    return [out_BHTS.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _note_kernels(
    run: Callable[[], object], device: torch.device, findings: Findings
) -> None:
    """Say which kernels attention runs, and expect those of flash attention among them."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    names = {event.key for event in profiler.key_averages()}
    wanted = ATTENTION_KERNELS[device.type]
    seen = [sorted(name for name in names if re.search(pattern, name)) for pattern in wanted]
    told = "; ".join(name[:80] for found in seen for name in found)
    findings.note("kernels", told or "none of those expected")
    findings.note(f"kinds of kernels at work, of {len(wanted)}", sum(map(bool, seen)),
                  least=len(wanted))


def _block_at_work(
    device: torch.device, size: Size
) -> tuple[Block, Callable[[bool], list[Tensor]]]:
    """Return a block, the same at each call, and what runs it forward and backward.

    That gives its output, its input's gradient and its weights' gradients.
    """
    shape = TransformerConfig.from_model_config(size.model)
    block = Block(shape, scaling_rules(shape))
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5, generator=generator)
    block.to(device)
    low = _low_dtype(device)
    batch, length = size.batch_size, size.length
    x_BTD = torch.randn(batch, length, shape.hidden_size, generator=generator).to(low).to(device)
    grad_BTD = torch.randn(x_BTD.shape, generator=generator).to(low).to(device)
    documents_BT = several_documents(batch, length)
    layout = lay_out_documents(x_BTD, documents_BT)
    positions_BT = torch.arange(length, device=device) - layout.starts_BT
    tables = rotary_tables(positions_BT, shape.head_size, shape.rope_theta)
    cos_B1TS, sin_B1TS = (table.to(low) for table in tables)
    precision = next(name for name, dtype in DTYPES.items() if dtype is low)

    def run(fused: bool) -> list[Tensor]:
        input_BTD = x_BTD.clone().requires_grad_()
        block.zero_grad()
        with autocast(precision, device):
            out_BTD = block(input_BTD, cos_B1TS, sin_B1TS, layout, fused)
        out_BTD.backward(grad_BTD)
        return [out_BTD.detach(), *_gradients([input_BTD, *block.parameters()])]

    return block, run


def _gradients(leaves: list[Tensor]) -> Iterator[Tensor]:
    for leaf in leaves:
        assert leaf.grad is not None
        yield leaf.grad.clone()


def _low_dtype(device: torch.device) -> torch.dtype:
    """The low precision that is trained in; on a CPU bf16, whether it is fast there or not."""
    precision = resolve_precision(Precision.AUTO, device)
    return torch.bfloat16 if device.type == "cpu" else DTYPES[precision]


def _name(dtype: torch.dtype) -> str:
    return next(precision.value for precision, own in DTYPES.items() if own is dtype)
