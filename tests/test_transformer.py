"""The model and its loss against Hugging Face, PyTorch and plain Python."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from svend.data.stream import IGNORE_LABEL, next_token_labels
from svend.models import loss as loss_module
from svend.models.config import TransformerConfig
from svend.models.loss import summed_linear_cross_entropy
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import CheckpointingPolicy
from tests.large_weights import large_weights

VOCAB = 61

# hidden, layers, heads, key/value heads, feed-forward width, rope theta
SHAPES = [
    (32, 2, 4, 2, 48, 10_000.0),
    (32, 1, 4, 1, 24, 500_000.0),
    (48, 3, 3, 3, 40, 10_000.0),
]


def make_config(
    shape: tuple[int, int, int, int, int, float] = SHAPES[0], *, dropout: float = 0.0
) -> TransformerConfig:
    hidden, layers, heads, kv_heads, ffn, theta = shape
    return TransformerConfig(
        name="test", hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=ffn, vocab_size=VOCAB, rope_theta=theta,
        attention_dropout=dropout,
    )


def make_model(config: TransformerConfig | None = None, seed: int = 0) -> ReasoningTransformer:
    return large_weights(config or make_config(), seed)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def hugging_face_name(name: str) -> str:
    replacements = {
        "embedding.": "model.embed_tokens.",
        "blocks.": "model.layers.",
        "attention_norm.": "input_layernorm.",
        "feed_forward_norm.": "post_attention_layernorm.",
        "attention.": "self_attn.",
        "feed_forward.": "mlp.",
        "final_norm.": "model.norm.",
        "head.": "lm_head.",
    }
    for ours, theirs in replacements.items():
        name = name.replace(ours, theirs)
    return name


def same_in_hugging_face(model: ReasoningTransformer) -> LlamaForCausalLM:
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    weights = {hugging_face_name(name): value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 17), (3, 64)])
def test_logits_and_gradients_equal_hugging_face_llama(
    shape: tuple[int, int, int, int, int, float], batch: int, length: int
) -> None:
    model = make_model(make_config(shape))
    twin = same_in_hugging_face(model)
    tokens_BT = random_tokens(batch, length)
    labels_BT = random_tokens(batch, length, seed=1)

    twin_logits_BTV = twin(tokens_BT).logits
    torch.testing.assert_close(model(tokens_BT), twin_logits_BTV, atol=1e-4, rtol=1e-4)

    model(tokens_BT, labels_BT).backward()
    F.cross_entropy(twin_logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum").backward()
    twin_gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        reference = twin_gradients[hugging_face_name(name)]
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(
            parameter.grad / scale, reference / scale, atol=1e-5, rtol=1e-4, msg=name
        )


@settings(max_examples=15, deadline=None)
@given(length=st.integers(2, 24), data=st.data())
def test_changing_a_token_leaves_earlier_logits_and_changes_its_own(
    length: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(1, length - 1))
    model = make_model()
    tokens_BT = random_tokens(1, length)
    changed_BT = tokens_BT.clone()
    changed_BT[0, place] = (tokens_BT[0, place] + 1) % VOCAB
    with torch.no_grad():
        before_BTV, after_BTV = model(tokens_BT), model(changed_BT)
    torch.testing.assert_close(after_BTV[:, :place], before_BTV[:, :place], atol=1e-6, rtol=0)
    assert (after_BTV[:, place] - before_BTV[:, place]).abs().max() > 1e-2
    if place + 1 < length:
        assert (after_BTV[:, -1] - before_BTV[:, -1]).abs().max() > 1e-5


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    padding=st.integers(0, 6),
)
def test_packing_changes_no_documents_logits_or_loss(lengths: list[int], padding: int) -> None:
    model = make_model()
    documents = [random_tokens(length, seed=i) for i, length in enumerate(lengths)]
    tokens_BT = torch.cat([*documents, torch.zeros(padding, dtype=torch.int64)])[None]
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    documents_BT = torch.tensor([numbers + [-1] * padding])
    labels_BT = next_token_labels(tokens_BT, documents_BT)
    with torch.no_grad():
        packed_BTV = model(tokens_BT, documents_BT=documents_BT)
        packed_loss = model(tokens_BT, labels_BT, documents_BT)
        alone_loss = torch.zeros(())
        at = 0
        for tokens_T in documents:
            alone_BTV = model(tokens_T[None])
            part_BTV = packed_BTV[:, at : at + len(tokens_T)]
            torch.testing.assert_close(part_BTV, alone_BTV, atol=1e-4, rtol=1e-4)
            alone_loss += F.cross_entropy(
                alone_BTV[0, :-1], tokens_T[1:], reduction="sum"
            ) if len(tokens_T) > 1 else 0.0
            at += len(tokens_T)
    torch.testing.assert_close(packed_loss, alone_loss, atol=1e-3, rtol=1e-5)


def test_a_document_does_not_see_its_neighbours_in_the_row() -> None:
    model = make_model()
    tokens_BT = random_tokens(1, 12)
    documents_BT = torch.tensor([[0] * 4 + [1] * 5 + [-1] * 3])
    changed_BT = tokens_BT.clone()
    changed_BT[0, :4] = (changed_BT[0, :4] + 7) % VOCAB
    changed_BT[0, 9:] = (changed_BT[0, 9:] + 7) % VOCAB
    with torch.no_grad():
        before_BTV = model(tokens_BT, documents_BT=documents_BT)
        after_BTV = model(changed_BT, documents_BT=documents_BT)
    torch.testing.assert_close(after_BTV[:, 4:9], before_BTV[:, 4:9], atol=1e-6, rtol=0)
    assert before_BTV.isfinite().all()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, second, other = (ReasoningTransformer(make_config()) for _ in range(3))
    torch.manual_seed(1)
    first.initialize(7)
    torch.manual_seed(2)
    second.initialize(7)
    other.initialize(8)
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.dim() < 2 or not torch.equal(a, c), name


def test_initial_standard_deviations_shrink_where_a_branch_joins_the_residual() -> None:
    layers = 5
    model = ReasoningTransformer(make_config((192, layers, 3, 3, 256, 10_000.0)))
    model.initialize(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        joins = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(2 * layers) if joins else 0.02
        standard_error = expected / math.sqrt(2 * parameter.numel())
        assert abs(float(parameter.detach().std()) - expected) < 5 * standard_error, name
        assert abs(float(parameter.detach().mean())) < 5 * expected / math.sqrt(parameter.numel())


def loss_and_gradients(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    upstream: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x_ND, weight_VD = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss = function(x_ND, weight_VD, labels_N)
    (loss * upstream).backward()
    assert x_ND.grad is not None and weight_VD.grad is not None
    return loss.detach(), x_ND.grad, weight_VD.grad


def plain_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(
        F.linear(x_ND, weight_VD), labels_N, ignore_index=IGNORE_LABEL, reduction="sum"
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 23),
    hidden=st.integers(1, 16),
    vocab=st.integers(2, 40),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    upstream=st.sampled_from([1.0, 0.125, -3.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_chunked_loss_and_gradients_equal_cross_entropy(
    rows: int, hidden: int, vocab: int, ignored: float, upstream: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(rows, hidden, generator=generator)
    weight_VD = torch.randn(vocab, hidden, generator=generator)
    labels_N = torch.randint(vocab, (rows,), generator=generator)
    labels_N[torch.rand(rows, generator=generator) < ignored] = IGNORE_LABEL
    reference = loss_and_gradients(plain_cross_entropy, x_ND, weight_VD, labels_N, upstream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_ROWS", 4)
        measured = loss_and_gradients(
            summed_linear_cross_entropy, x_ND, weight_VD, labels_N, upstream
        )
    for ours, theirs in zip(measured, reference, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * max(1.0, abs(upstream)), rtol=2e-5)


def test_the_loss_does_not_depend_on_the_chunk_size() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(2100, 8, generator=generator)
    weight_VD = torch.randn(30, 8, generator=generator)
    labels_N = torch.randint(30, (2100,), generator=generator)
    measured = loss_and_gradients(summed_linear_cross_entropy, x_ND, weight_VD, labels_N, 1.0)
    reference = loss_and_gradients(plain_cross_entropy, x_ND, weight_VD, labels_N, 1.0)
    for ours, theirs in zip(measured, reference, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)


def test_a_loss_without_gradient_equals_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(10, 8, generator=generator)
    weight_VD = torch.randn(30, 8, generator=generator)
    labels_N = torch.randint(30, (10,), generator=generator)
    with torch.no_grad():
        measured = summed_linear_cross_entropy(x_ND, weight_VD, labels_N)
    torch.testing.assert_close(measured, plain_cross_entropy(x_ND, weight_VD, labels_N))


def test_only_the_weight_gets_a_gradient_where_the_hidden_states_need_none() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(10, 8, generator=generator)
    weight_VD = torch.randn(30, 8, generator=generator)
    labels_N = torch.randint(30, (10,), generator=generator)
    _, _, expected_VD = loss_and_gradients(plain_cross_entropy, x_ND, weight_VD, labels_N, 1.0)
    weight_VD.requires_grad_()
    summed_linear_cross_entropy(x_ND, weight_VD, labels_N).backward()
    torch.testing.assert_close(weight_VD.grad, expected_VD, atol=1e-5, rtol=1e-5)


def test_bf16_loss_is_within_a_hundredth_and_gradients_within_two_percent_of_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(64, 32, generator=generator).bfloat16()
    weight_VD = (0.1 * torch.randn(200, 32, generator=generator)).bfloat16().float()
    labels_N = torch.randint(200, (64,), generator=generator)
    upstream = 1 / 64
    measured = loss_and_gradients(summed_linear_cross_entropy, x_ND, weight_VD, labels_N, upstream)
    reference = loss_and_gradients(
        plain_cross_entropy, x_ND.float(), weight_VD, labels_N, upstream
    )
    assert measured[0].dtype is torch.float32
    assert abs(float(measured[0] / reference[0]) - 1) < 0.01
    for ours, theirs in zip(measured[1:], reference[1:], strict=True):
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.02
    assert measured[1].dtype is torch.bfloat16
    assert measured[2].dtype is torch.float32


@pytest.mark.parametrize("tokens", [3, 1000, 16_385])
def test_the_bf16_gradient_is_scaled_by_the_mean_and_not_by_a_rounded_mean(tokens: int) -> None:
    """Rounding 1/tokens to bf16 would scale every gradient below the head by up to 0.4%."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(64, 32, generator=generator).bfloat16()
    weight_VD = torch.randn(200, 32, generator=generator)
    labels_N = torch.randint(200, (64,), generator=generator)
    _, whole_ND, _ = loss_and_gradients(
        summed_linear_cross_entropy, x_ND, weight_VD, labels_N, 1.0
    )
    _, mean_ND, _ = loss_and_gradients(
        summed_linear_cross_entropy, x_ND, weight_VD, labels_N, 1 / tokens
    )
    ratio = float((mean_ND.double() * tokens * whole_ND.double()).sum()
                  / whole_ND.double().square().sum())
    assert abs(ratio - 1) < 3e-4


def gradients_of(
    model: ReasoningTransformer, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor | None
) -> list[Tensor]:
    model.zero_grad()
    model(tokens_BT, labels_BT, documents_BT).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("policy", CheckpointingPolicy)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_recomputes_blocks_and_gives_the_same_gradients(
    dropout: float, policy: CheckpointingPolicy
) -> None:
    model = make_model(make_config(dropout=dropout)).train()
    tokens_BT, labels_BT = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    documents_BT = torch.tensor([[0] * 9 + [1] * 7, [0] * 4 + [1] * 10 + [-1] * 2])
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.blocks[0].attention.register_forward_hook(count)
    torch.manual_seed(3)
    plain = gradients_of(model, tokens_BT, labels_BT, documents_BT)
    assert calls == 1
    model.checkpoint_blocks(policy)
    torch.manual_seed(3)
    checkpointed = gradients_of(model, tokens_BT, labels_BT, documents_BT)
    assert calls == 3
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


def test_selective_checkpointing_computes_no_matrix_product_again() -> None:
    model = make_model(make_config()).train()
    tokens_BT, labels_BT = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    documents_BT = torch.zeros(2, 16, dtype=torch.int64)
    flops = {}
    for policy in (None, *CheckpointingPolicy):
        model.checkpoint_blocks(policy)
        with FlopCounterMode(display=False) as counter:
            gradients_of(model, tokens_BT, labels_BT, documents_BT)
        flops[policy] = counter.get_total_flops()
    assert flops[CheckpointingPolicy.SELECTIVE] == flops[None] < flops[CheckpointingPolicy.FULL]


def test_attention_dropout_acts_in_training_only() -> None:
    model = make_model(make_config(dropout=0.5))
    tokens_BT = random_tokens(1, 16)
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(tokens_BT), model(tokens_BT))
        model.train()
        assert not torch.equal(model(tokens_BT), model(tokens_BT))


def test_autocast_keeps_the_loss_in_fp32_and_near_the_fp32_loss() -> None:
    model = ReasoningTransformer(make_config())
    model.initialize(0)
    tokens_BT, labels_BT = random_tokens(2, 32), random_tokens(2, 32, seed=1)
    exact = model(tokens_BT, labels_BT)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens_BT, labels_BT)
        assert model(tokens_BT).dtype is torch.bfloat16
    assert rounded.dtype is torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of token ids and of document numbers, padding (-1) anywhere it may stand."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    cells = st.lists(st.integers(0, 50), min_size=length, max_size=length)
    numbers = st.lists(st.integers(-1, 3), min_size=length, max_size=length).map(
        lambda row: sorted(row, key=lambda n: n if n >= 0 else 99)
    )
    tokens = [draw(cells) for _ in range(batch)]
    return tokens, [draw(numbers) for _ in range(batch)]


@settings(max_examples=100, deadline=None)
@given(rows=packed_rows())
def test_labels_are_the_next_token_of_the_same_document(
    rows: tuple[list[list[int]], list[list[int]]],
) -> None:
    tokens, documents = rows
    expected = []
    for row, numbers in zip(tokens, documents, strict=True):
        labels = []
        for place, number in enumerate(numbers):
            last = place + 1 == len(row)
            if last or number == -1 or numbers[place + 1] != number:
                labels.append(IGNORE_LABEL)
            else:
                labels.append(row[place + 1])
        expected.append(labels)
    tokens_BT, documents_BT = torch.tensor(tokens), torch.tensor(documents)
    assert next_token_labels(tokens_BT, documents_BT).tolist() == expected
    assert tokens_BT.tolist() == tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_agree_with_eager_ones() -> None:
    model = make_model().train()
    tokens_BT, labels_BT = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    documents_BT = torch.tensor([[0] * 9 + [1] * 7, [0] * 4 + [1] * 10 + [-1] * 2])
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    assert list(compiled.state_dict()) == list(model.state_dict())
    expected = gradients_of(model, tokens_BT, labels_BT, documents_BT)
    measured = gradients_of(compiled, tokens_BT, labels_BT, documents_BT)
    for a, b in zip(expected, measured, strict=True):
        scale = float(a.abs().max()) + 1e-6
        torch.testing.assert_close(b / scale, a / scale, atol=1e-4, rtol=1e-4)
