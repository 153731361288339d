"""CompleteP: the values of each rule, and what model, optimizer, decoding and export do by them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from svend.errors import ConfigError, UserError
from svend.models.attention import lay_out_documents
from svend.models.config import BaseShape, TransformerConfig
from svend.models.generation import Decoder
from svend.models.huggingface import export_to_huggingface
from svend.models.parametrisation import (
    Factors,
    Group,
    Rule,
    fold_multipliers,
    group_of,
    scaling_rules,
    without,
)
from svend.models.transformer import Attention, ReasoningTransformer, rotary_tables
from svend.pipeline.checkpoints.metadata import MODEL
from svend.pipeline.config import (
    Optimizer,
    Parametrisation,
    PipelineConfig,
    Precision,
    TrainingConfig,
    load_config,
)
from svend.pipeline.run_folder import RunFolder, RunIdentity
from svend.pipeline.run_model import build_model, planned_model
from svend.pipeline.version_files import WEIGHTS, load_version_model, write_weights
from svend.training.loop import train_steps
from svend.training.optimizers import build_optimizer
from svend.training.schedules import learning_rate_factor
from svend.training.state import TrainState, build_state
from tests.conftest import DEBUG_OVERRIDES
from tests.large_weights import large_weights
from tests.test_training import BatchStream, make_sequences, make_training

CPU = torch.device("cpu")
BASE = BaseShape(width=64, depth=2, head_size=16)  # and 192 feed-forward, by default
VOCAB = 53
BASE_SETTINGS: dict[str, Any] = {
    "parametrisation": Parametrisation.COMPLETEP, "base_width": 64, "base_depth": 2,
    "base_head_size": 16,
}


def make_config(
    width: int = 64, depth: int = 2, head_size: int = 16, ffn: int | None = None,
    base: BaseShape | None = BASE,
) -> TransformerConfig:
    return TransformerConfig(
        name="test", hidden_size=width, num_hidden_layers=depth,
        num_attention_heads=width // head_size, num_key_value_heads=width // head_size // 2,
        intermediate_size=ffn or 3 * width, vocab_size=VOCAB, max_position_embeddings=64,
        base=base,
    )


# A model that differs from the base in every size: twice as wide, four times as deep, heads of 32,
# and three times the feed-forward width.
OTHER = make_config(width=128, depth=8, head_size=32, ffn=576)


def test_the_rules_are_the_table() -> None:
    rules = scaling_rules(OTHER)
    m_n, m_f, m_l, std = 2, 3, 4, 0.02
    assert (rules.residual, rules.logits) == (1 / m_l, 1 / m_n)
    assert rules.attention == pytest.approx(math.sqrt(16 / 32))
    within = 1 / (m_n * m_l)
    assert rules.adamw == {
        Group.EMBEDDING: Factors(1, 1, 1 / m_n),
        Group.HIDDEN: Factors(1 / m_n, m_n, within),
        Group.OUTPUT: Factors(1 / m_n, m_n, within),
        Group.DOWN: Factors(1 / m_f, m_f, within),
        Group.NORM: Factors(1, 0, within),
        Group.FINAL_NORM: Factors(1, 0, 1 / m_n),
        Group.HEAD: Factors(1, 1, 1 / m_n),
    }
    root = math.sqrt(m_n)
    assert set(rules.muon) == {Group.HIDDEN, Group.OUTPUT, Group.DOWN}
    for group, rate in (
        (Group.HIDDEN, 1 / root), (Group.OUTPUT, 1 / root), (Group.DOWN, root / m_f),
    ):
        assert rules.muon[group].learning_rate == pytest.approx(rate)
        assert rules.muon[group].weight_decay == pytest.approx(1 / rate)
    assert rules.init_std[Group.EMBEDDING] == rules.init_std[Group.HEAD] == std
    assert rules.init_std[Group.HIDDEN] == pytest.approx(std / root)
    joining_std = std / math.sqrt(2 * BASE.depth)
    assert rules.init_std[Group.OUTPUT] == pytest.approx(joining_std / root)
    assert rules.init_std[Group.DOWN] == pytest.approx(joining_std / math.sqrt(m_f))


def test_at_the_base_shape_a_model_is_the_standard_one() -> None:
    rules = scaling_rules(make_config())
    assert rules == scaling_rules(make_config(base=None))
    assert (rules.residual, rules.logits, rules.attention) == (1, 1, 1)
    assert rules.init_std[Group.HIDDEN] == 0.02
    assert rules.init_std[Group.DOWN] == rules.init_std[Group.OUTPUT] == 0.02 / math.sqrt(4)


def test_every_parameter_has_the_group_that_its_name_says() -> None:
    names = defaultdict(set)
    for name, parameter in ReasoningTransformer(make_config()).named_parameters():
        names[group_of(name, parameter)].add(re.sub(r"^blocks\.\d+\.", "", name))
    assert names == {
        Group.EMBEDDING: {"embedding.weight"},
        Group.HIDDEN: {
            *(f"attention.{name}_proj.weight" for name in "qkv"),
            *(f"feed_forward.{name}_proj.weight" for name in ("gate", "up")),
        },
        Group.OUTPUT: {"attention.o_proj.weight"},
        Group.DOWN: {"feed_forward.down_proj.weight"},
        Group.NORM: {"attention_norm.weight", "feed_forward_norm.weight"},
        Group.FINAL_NORM: {"final_norm.weight"},
        Group.HEAD: {"head.weight"},
    }


def test_weights_are_drawn_with_the_deviation_of_their_group() -> None:
    model = ReasoningTransformer(OTHER)
    model.initialize(0)
    joining_std = 0.02 / math.sqrt(2 * BASE.depth)
    expected = {Group.HIDDEN: 0.02 / math.sqrt(2), Group.OUTPUT: joining_std / math.sqrt(2),
                Group.DOWN: joining_std / math.sqrt(3)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = expected.get(group_of(name, parameter), 0.02)
            error = std / math.sqrt(2 * parameter.numel())
            assert abs(float(parameter.detach().std()) - std) < 5 * error, name


@pytest.mark.parametrize("optimizer", Optimizer)
def test_each_parameter_is_optimized_by_the_factors_of_its_group(optimizer: Optimizer) -> None:
    model = ReasoningTransformer(OTHER)
    training = make_training(
        optimizer=optimizer, learning_rate=0.1, weight_decay=0.3, adam_epsilon=1e-6, **BASE_SETTINGS
    )
    settings = {
        id(p): group for group in build_optimizer(model, training).param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        of_group, used = group_of(name, parameter), settings[id(parameter)]
        by_muon = optimizer is Optimizer.MUON and of_group in model.rules.muon
        factors = (model.rules.muon if by_muon else model.rules.adamw)[of_group]
        assert used["lr"] == pytest.approx(0.1 * factors.learning_rate), name
        assert used["weight_decay"] == pytest.approx(0.3 * factors.weight_decay), name
        assert by_muon or used["eps"] == pytest.approx(1e-6 * factors.epsilon), name


@pytest.mark.parametrize("optimizer", Optimizer)
def test_a_step_takes_the_same_share_off_a_weight_at_every_width(optimizer: Optimizer) -> None:
    """What sees weight decay: nothing in a few steps of training does."""
    training = make_training(
        optimizer=optimizer, learning_rate=0.1, weight_decay=0.3, **BASE_SETTINGS
    )
    for config in (make_config(), OTHER):
        model = ReasoningTransformer(config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        build_optimizer(model, training).step()
        for name, parameter in model.named_parameters():
            kept = 1 - 0.1 * 0.3 if parameter.dim() == 2 else 1.0
            torch.testing.assert_close(parameter.detach(), before[name] * kept, msg=name)
        unruly = without(model.rules, Rule.HIDDEN_DECAY)
        if config is OTHER:
            assert all(
                factors.learning_rate * factors.weight_decay < 0.9
                for group, factors in (unruly.adamw | unruly.muon).items()
                if group in model.rules.muon
            )


def gradient_sizes(width: int, depth: int, seed: int) -> dict[Group, float]:
    model = ReasoningTransformer(make_config(width, depth))
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(VOCAB, (4, 32), generator=generator)
    labels_BT = torch.randint(VOCAB, (4, 32), generator=generator)
    (model(tokens_BT, labels_BT) / labels_BT.numel()).backward()
    squares: dict[Group, list[float]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        squares[group_of(name, parameter)].append(float(parameter.grad.square().mean()))
    return {group: math.sqrt(np.mean(values)) for group, values in squares.items()}


def test_epsilon_goes_as_the_gradients_of_its_group_do() -> None:
    """What sees epsilon: at 1e-8 training does not, the gradients are far above it."""
    for shapes in ([(64, 2), (128, 2), (256, 2)], [(64, 2), (64, 8), (64, 32)]):
        sizes = [gradient_sizes(*shape, seed=0) for shape in shapes]
        grown = np.log2([width * depth for width, depth in shapes])
        epsilons = [scaling_rules(make_config(*shape)).adamw for shape in shapes]
        for group in Group:
            slope = np.polyfit(grown, np.log2([size[group] for size in sizes]), 1)[0]
            rule = np.polyfit(grown, np.log2([e[group].epsilon for e in epsilons]), 1)[0]
            assert slope == pytest.approx(rule, abs=0.2), (group, shapes)
    plain = without(scaling_rules(OTHER), Rule.EPSILON)
    assert {factors.epsilon for factors in plain.adamw.values()} == {1.0}


def test_attention_is_scaled_by_the_base_head_size_over_the_head_size() -> None:
    """What sees attention's scale: the coordinate check does not."""
    config = make_config(width=64, head_size=32, base=BASE)
    torch.manual_seed(0)
    attention = Attention(config, scaling_rules(config))
    x_BTD = torch.randn(1, 12, 64) * 4
    with torch.no_grad():
        tables = rotary_tables(torch.arange(12)[None], 32, config.rope_theta)
        layout = lay_out_documents(torch.zeros(1, 12, dtype=torch.int64), None)
        # Without turning: cosines of 1 and sines of 0.
        still = torch.ones_like(tables[0]), torch.zeros_like(tables[1])
        measured = attention(x_BTD, *still, layout, False)

        def heads(projected: Tensor, count: int) -> Tensor:
            return projected.view(1, 12, count, 32).transpose(1, 2)

        out_BHTS = F.scaled_dot_product_attention(
            heads(attention.q_proj(x_BTD), 2), heads(attention.k_proj(x_BTD), 1),
            heads(attention.v_proj(x_BTD), 1), is_causal=True, enable_gqa=True,
            scale=math.sqrt(16) / 32,
        )
        expected = attention.o_proj(out_BHTS.transpose(1, 2).reshape(1, 12, -1))
        attention.query_factor = without(scaling_rules(config), Rule.ATTENTION).attention
        unscaled = attention(x_BTD, *still, layout, False)
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)
    assert (unscaled - expected).abs().max() > 1e-3


def test_multipliers_are_where_the_rules_say() -> None:
    """The model's logits are those of one without multipliers whose products are scaled by hand."""
    model = large_weights(OTHER)
    rules = model.rules
    plain = ReasoningTransformer(make_config(128, 8, 32, 576, base=None)).eval()
    plain.load_state_dict(model.state_dict())
    hooks: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("q_proj", lambda out: out * rules.attention),
        ("o_proj", lambda out: out * rules.residual),
        ("down_proj", lambda out: out * rules.residual),
    ]
    for name, module in plain.named_modules():
        for suffix, scale in hooks:
            if name.endswith(suffix):
                module.register_forward_hook(lambda _, __, out, scale=scale: scale(out))
    tokens_BT = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(tokens_BT) * rules.logits
        torch.testing.assert_close(model(tokens_BT), expected, rtol=1e-4, atol=1e-4)
        assert (plain(tokens_BT) - expected).abs().max() > 0.1
    labels_BT = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    loss = F.cross_entropy(expected.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens_BT, labels_BT), loss, rtol=1e-4, atol=1e-3)


def test_the_folded_weights_are_those_of_a_llama_with_the_same_logits(tmp_path: Path) -> None:
    model = large_weights(OTHER)
    tokens_BT = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    export_to_huggingface(model, None, tmp_path)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain = ReasoningTransformer(make_config(128, 8, 32, 576, base=None)).eval()
    plain.load_state_dict(dict(fold_multipliers(model)))
    with torch.no_grad():
        expected = model(tokens_BT)
        torch.testing.assert_close(llama(tokens_BT).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(tokens_BT), expected, rtol=1e-4, atol=1e-4)


def test_decoding_has_the_models_logits_and_int8_those_of_the_folded_weights() -> None:
    model = large_weights(OTHER)
    plain = ReasoningTransformer(make_config(128, 8, 32, 576, base=None)).eval()
    plain.load_state_dict(dict(fold_multipliers(model)))
    tokens = torch.randint(VOCAB, (30,), generator=torch.Generator().manual_seed(0)).tolist()

    def score(scored: ReasoningTransformer, int8: bool) -> Tensor:
        decoder = Decoder(scored, lanes=1, max_length=32, precision=Precision.FP32, int8=int8)
        return decoder.score(tokens)

    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0]
    torch.testing.assert_close(score(model, int8=False), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(score(model, int8=True), score(plain, int8=True))


def make_state(training: TrainingConfig, total_steps: int) -> TrainState:
    model = ReasoningTransformer(OTHER)
    model.initialize(0)
    return build_state(model, BatchStream(make_sequences(), 2), training, total_steps, CPU)


@pytest.mark.parametrize("optimizer", Optimizer)
def test_the_schedule_moves_every_groups_own_rate_and_logs_the_configured_one(
    optimizer: Optimizer,
) -> None:
    training = make_training(optimizer=optimizer, **BASE_SETTINGS)
    state = make_state(training, 6)
    own = [group["lr"] for group in build_optimizer(ReasoningTransformer(OTHER), training
                                                    ).param_groups]
    assert len(set(own)) >= 3
    for step, metrics in enumerate(train_steps(state, training, 6)):
        assert metrics.learning_rate == 1e-2 * learning_rate_factor(step, 6, training)
        following = learning_rate_factor(step + 1, 6, training)
        used = [group["lr"] for group in state.optimizer.param_groups]
        assert used == pytest.approx([rate * following for rate in own])


@pytest.mark.parametrize("optimizer", Optimizer)
def test_a_run_goes_on_from_its_states_bit_for_bit(optimizer: Optimizer) -> None:
    training = make_training(optimizer=optimizer, **BASE_SETTINGS)
    whole = make_state(training, 6)
    expected = [float(metrics.loss) for metrics in train_steps(whole, training, 6)]
    stopped = make_state(training, 6)
    losses = [float(metrics.loss) for metrics in train_steps(stopped, training, 3)]
    resumed = make_state(training, 6)
    resumed.model.load_state_dict(stopped.model.state_dict())
    resumed.optimizer.load_state_dict(stopped.optimizer.state_dict())
    resumed.scheduler.load_state_dict(stopped.scheduler.state_dict())
    resumed.load_extra_state(stopped.extra_state())
    losses += [float(metrics.loss) for metrics in train_steps(resumed, training, 6)]
    assert losses == expected


def run_config(**changes: str) -> PipelineConfig:
    overrides = {**DEBUG_OVERRIDES, "training.parametrisation": "completep",
                 "training.base_width": "32", "training.base_depth": "1",
                 "training.base_head_size": "8", **changes}
    return load_config({}, list(overrides.items()))


def test_a_runs_model_and_its_version_have_the_parametrisation_of_the_config(
    tmp_path: Path,
) -> None:
    config = run_config()
    model = build_model(config, None, CPU, 512)
    assert isinstance(model, ReasoningTransformer)
    assert model.rules == scaling_rules(model.config)
    assert (model.rules.residual, model.rules.logits) == (1 / 2, 1 / 2)
    torch.save(model.state_dict(), tmp_path / MODEL)
    write_weights(tmp_path / MODEL, tmp_path / WEIGHTS)
    loaded = load_version_model(tmp_path, config, CPU)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT), model.eval()(tokens_BT))


def test_a_factorys_model_must_be_parametrised_as_the_config_says() -> None:
    config = run_config()
    base = BaseShape.of(config.training)

    def factory(base: BaseShape | None) -> Callable[..., nn.Module]:
        return lambda scale: ReasoningTransformer(
            TransformerConfig(name="own", hidden_size=64, num_hidden_layers=2, base=base)
        )

    planned_model(config, factory(base))
    for wrong in (factory(None), factory(BaseShape(64, 1, 8)), lambda scale: nn.Linear(4, 4)):
        with pytest.raises(ConfigError, match=r"^training\.parametrisation = completep: the fact"):
            planned_model(config, wrong)
    with pytest.raises(ConfigError, match=r"^training\.parametrisation = standard: the fact"):
        planned_model(run_config(**{"training.parametrisation": "standard"}), factory(base))


@pytest.mark.parametrize(("key", "value"), [
    ("training.parametrisation", "standard"), ("training.base_width", "64"),
])
def test_a_run_does_not_go_on_with_another_parametrisation(
    key: str, value: str, tmp_path: Path
) -> None:
    config = run_config(checkpoint_dir=str(tmp_path))
    identity = RunIdentity("id", "uri", "svend", "tiny", "data", "cpu", Precision.FP32, False,
                           "tokenizer")
    folder = RunFolder.create(config, identity)
    folder.check_config(config)
    with pytest.raises(UserError, match=f"^cannot resume .*{key} was .*, now {value}"):
        folder.check_config(run_config(checkpoint_dir=str(tmp_path), **{key: value}))
    folder.release()


@pytest.mark.parametrize("parametrisation", ["standard", "completep"])
def test_init_std_is_that_of_the_first_weights_by_the_rules(parametrisation: str) -> None:
    def weights(std: str) -> dict[str, Tensor]:
        config = run_config(**{
            "training.parametrisation": parametrisation, "training.init_std": std,
        })
        return build_model(config, None, CPU, VOCAB).state_dict()

    small, large = weights("0.02"), weights("0.05")
    matrices = [name for name, weight in small.items() if weight.dim() == 2]
    assert len(matrices) > 10
    for name in matrices:
        torch.testing.assert_close(large[name], 2.5 * small[name])
    assert all(torch.equal(large[name], small[name]) for name in small.keys() - set(matrices))


def test_init_std_is_not_left_unsaid_where_a_factory_draws_the_weights() -> None:
    config = run_config(**{"training.init_std": "0.05"})

    def factory(std: float) -> Callable[..., nn.Module]:
        return lambda scale: ReasoningTransformer(
            dataclasses.replace(make_config(base=BaseShape.of(config.training)),
                                initializer_range=std)
        )

    with pytest.raises(ConfigError, match=r"^training\.init_std = 0\.05: .* with 0\.02; give its"):
        planned_model(config, factory(0.02))
    assert planned_model(config, factory(0.05)).hidden_size == 64


@pytest.mark.parametrize("name", ["base_width", "base_depth", "base_head_size"])
def test_a_base_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^training\.{name} = 0: must be 1 or more"):
        load_config({}, [(f"training.{name}", "0")])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_compute_the_same() -> None:
    tokens_BT = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (False, True):
        model = large_weights(OTHER).train()
        if compiled:
            model.compile_blocks()
        model(tokens_BT, tokens_BT.roll(-1, 1)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for eager, fused in zip(*gradients, strict=True):
        assert eager is not None and fused is not None
        scale = float(eager.abs().max()) + 1e-6
        torch.testing.assert_close(fused / scale, eager / scale, atol=1e-4, rtol=1e-4)
