"""The peers: Hugging Face's Llama in three settings, and litgpt in its own.

All train the model of the spec with bf16 matrix products, fp32 weights, AdamW and clipping at 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svend.bench.spec import Contestant, Spec

IGNORE_LABEL = -100
MAX_GRADIENT_NORM = 1.0
LEARNING_RATE = 1e-4
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


def batches(spec: Spec) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield tokens, labels (as tokens, -100 for none) and how many tokens are not padding."""
    generator = np.random.default_rng(spec.seed)
    if spec.documents is None:
        shape = (spec.batch_size, spec.length)
        for _ in count():
            tokens_BT = torch.from_numpy(generator.integers(0, spec.vocab_size, shape))
            yield tokens_BT, tokens_BT, tokens_BT.numel()
    with np.load(Path(spec.documents or "")) as file:
        tokens, offsets = file["tokens"].astype(np.int64), file["offsets"]
    for _ in count():
        chosen = generator.integers(0, len(offsets) - 1, spec.padded_batch_size)
        rows = [tokens[offsets[i] : offsets[i + 1]][: spec.length] for i in chosen]
        longest = max(len(row) for row in rows)
        tokens_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels_BT = torch.full((len(rows), longest), IGNORE_LABEL)
        for place, row in enumerate(rows):
            tokens_BT[place, : len(row)] = labels_BT[place, : len(row)] = torch.from_numpy(row)
        yield tokens_BT, labels_BT, sum(len(row) for row in rows)


def hugging_face_stock(spec: Spec) -> Contestant:
    """As `Trainer` runs it with bf16=True: eager, autocast, fused AdamW."""
    return _hugging_face(spec, compiled=False)


def hugging_face_compiled(spec: Spec) -> Contestant:
    """The fastest found: compiled whole, autocast, freed memory kept by the allocator."""
    _keep_freed_memory()
    return _hugging_face(spec, compiled=True)


def hugging_face_master(spec: Spec) -> Contestant:
    """bf16 weights with an fp32 master copy, compiled, freed memory kept by the allocator."""
    _keep_freed_memory()
    return _hugging_face(spec, compiled=True, master=True)


def _hugging_face(spec: Spec, *, compiled: bool, master: bool = False) -> Contestant:
    import transformers

    library: Any = transformers  # its own annotations do not admit what its documents show
    torch.manual_seed(spec.seed)
    model = library.LlamaForCausalLM(library.LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size, num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        max_position_embeddings=max(spec.length, 2048), tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False,
    )).to(spec.device)
    if master:
        model = model.bfloat16()
    # Padded batches change their length from step to step.
    run = torch.compile(model, dynamic=spec.documents is not None) if compiled else model
    stream, update = batches(spec), _updater(model, master)

    def step() -> int:
        tokens_BT, labels_BT, useful = next(stream)
        mask_BT = None if spec.documents is None else (labels_BT != IGNORE_LABEL).to(spec.device)
        with torch.autocast(spec.device, torch.bfloat16, enabled=not master):
            loss = run(input_ids=tokens_BT.to(spec.device), labels=labels_BT.to(spec.device),
                       attention_mask=mask_BT).loss
        loss.backward()
        update()
        return useful

    return Contestant(_count(model), step)


def litgpt_own(spec: Spec) -> Contestant:
    """litgpt as its `pretrain` runs it: Fabric in bf16-mixed, compiled, chunked cross-entropy."""
    import lightning
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy, get_default_supported_precision

    accelerator = "gpu" if spec.device == "cuda" else "cpu"
    fabric = lightning.Fabric(accelerator=accelerator, devices=1,
                              precision=get_default_supported_precision(training=True))
    fabric.seed_everything(spec.seed)
    config = Config(
        name="peer", n_layer=spec.layers, n_embd=spec.hidden_size, n_head=spec.heads,
        n_query_groups=spec.kv_heads, intermediate_size=spec.intermediate_size,
        padded_vocab_size=spec.vocab_size, vocab_size=spec.vocab_size, block_size=spec.length,
        bias=False, lm_head_bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        parallel_residual=False, rotary_percentage=1.0,
    )
    model = GPT(config)
    parameters = _count(model)
    compiled: Any = fabric.setup(torch.compile(model, dynamic=spec.documents is not None))
    optimizer: Any = fabric.setup_optimizers(
        torch.optim.AdamW(compiled.parameters(), lr=LEARNING_RATE, fused=True)
    )
    stream = batches(spec)

    def step() -> int:
        tokens_BT, labels_BT, useful = next(stream)
        logits_BTV = compiled(tokens_BT.to(spec.device)[:, :-1])
        loss = chunked_cross_entropy(logits_BTV, labels_BT.to(spec.device)[:, 1:],
                                     ignore_index=IGNORE_LABEL)
        fabric.backward(loss)
        fabric.clip_gradients(compiled, optimizer, max_norm=MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return useful

    return Contestant(parameters, step)


def _updater(model: nn.Module, master: bool) -> Callable[[], None]:
    """Return what clips the gradients and applies them, to an fp32 copy where there is one."""
    weights = list(model.parameters())
    owned = [w.detach().float() for w in weights] if master else weights
    optimizer = torch.optim.AdamW(owned, lr=LEARNING_RATE, fused=True)

    def update() -> None:
        if master:
            for copy, weight in zip(owned, weights, strict=True):
                copy.grad = None if weight.grad is None else weight.grad.float()
        torch.nn.utils.clip_grad_norm_(owned, MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if master:
            with torch.no_grad():
                for copy, weight in zip(owned, weights, strict=True):
                    weight.copy_(copy)
                    weight.grad = None

    return update


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _keep_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
