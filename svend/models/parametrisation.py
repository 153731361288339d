"""How init, learning rates and multipliers depend on a model's shape: the only place that says so.

The standard parametrisation scales the init where a branch joins the residual, and nothing else.
CompleteP (Dey et al. 2025, arXiv 2505.01618, with alpha = 1) is the maximal update parametrisation
(Yang et al. 2022, arXiv 2203.03466) with residual branches divided by the depth: activations and
their changes in a step keep their size as width and depth grow, so that the best learning rate of
a small model is that of a large one. docs/parametrisation.md has the table.

Epsilon goes as the gradients that it is added to: a logit is h w / m_N, and a branch enters the
residual divided by m_L, so that gradients are of size 1 / m_N outside the blocks and 1 / (m_N m_L)
within.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor

from svend.models.config import BaseShape, TransformerConfig, feed_forward_width

if TYPE_CHECKING:
    from svend.models.transformer import ReasoningTransformer


class Group(Enum):
    """Parameters that are scaled alike."""

    EMBEDDING = "embedding"
    HIDDEN = "hidden"  # of query, key, value, gate and up: fan-in is the width
    OUTPUT = "output"  # of attention: fan-in is heads times head size
    DOWN = "down"  # fan-in is the feed-forward width
    NORM = "norm"  # gains in the blocks
    FINAL_NORM = "final norm"
    HEAD = "head"


class Rule(Enum):
    """One rule of CompleteP, which `without` takes away; `svend coordcheck --without` names it."""

    HIDDEN_RATE = "hidden-rate"
    HIDDEN_INIT = "hidden-init"
    HIDDEN_DECAY = "hidden-decay"
    DOWN_PROJECTION = "down-projection"
    OUTPUT_PROJECTION = "output-projection"
    RESIDUAL = "residual-multiplier"
    LOGITS = "logit-multiplier"
    ATTENTION = "attention-scale"
    EPSILON = "epsilon"


@dataclass(frozen=True)
class Factors:
    """What an optimizer's settings are multiplied by for a group."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    epsilon: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScalingRules:
    """What a model of one shape is initialised, computed and trained with.

    residual: of what a branch adds. logits: of the logits. attention: of the queries, beside the
    1 / sqrt(head size) of attention itself. init_std: of each group of matrices; base_init_std: the
    same at the base shape, which of the standard parametrisation each shape is. adamw, muon: by
    group, Muon's for the matrices of the blocks.
    """

    residual: float = 1.0
    logits: float = 1.0
    attention: float = 1.0
    init_std: Mapping[Group, float]
    base_init_std: Mapping[Group, float]
    adamw: Mapping[Group, Factors]
    muon: Mapping[Group, Factors]

    def fold(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight of the model with the multiplier of its product in it.

        With all weights folded the model computes the same without any multiplier. The weight
        itself is returned where there is none.
        """
        factor = 1.0
        if name.endswith(("attention.o_proj.weight", "feed_forward.down_proj.weight")):
            factor = self.residual
        elif name.endswith("attention.q_proj.weight"):
            factor = self.attention
        elif name == "head.weight":
            factor = self.logits
        return weight if factor == 1.0 else weight * factor


def fold_multipliers(model: ReasoningTransformer) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's name and its values as a model without multipliers has them, detached.

    One after the other: at any time no more than one copy exists here.
    """
    for name, parameter in model.named_parameters():
        yield name, model.rules.fold(name, parameter.detach())


def group_of(name: str, parameter: Tensor) -> Group:
    """Return the group of a parameter of `ReasoningTransformer`, by its name.

    In a module of another kind, which has the standard parametrisation, matrices count as hidden
    where they lie under `blocks.`, else as an embedding.
    """
    if parameter.dim() < 2:
        return Group.FINAL_NORM if name.startswith("final_norm.") else Group.NORM
    if not name.startswith("blocks."):
        return Group.HEAD if name.startswith("head.") else Group.EMBEDDING
    if name.endswith(".down_proj.weight"):
        return Group.DOWN
    return Group.OUTPUT if name.endswith(".o_proj.weight") else Group.HIDDEN


def scaling_rules(config: TransformerConfig) -> ScalingRules:
    """Return the rules of a shape: CompleteP's where it names a base, else the standard ones."""
    return _standard(config) if config.base is None else _complete_p(config, config.base)


# Gains and other vectors do not decay.
_NO_DECAY = dict.fromkeys((Group.NORM, Group.FINAL_NORM), Factors(weight_decay=0.0))
_MUON_GROUPS = (Group.HIDDEN, Group.OUTPUT, Group.DOWN)
STANDARD_FACTORS: Mapping[Group, Factors] = dict.fromkeys(Group, Factors()) | _NO_DECAY
STANDARD_MUON: Mapping[Group, Factors] = dict.fromkeys(_MUON_GROUPS, Factors())


def _init_std(std: float, depth: int) -> dict[Group, float]:
    """Init smaller by sqrt(2 L) where a branch joins the residual (GPT-2, Radford et al. 2019)."""
    joining_std = std / math.sqrt(2 * depth)
    return dict.fromkeys(Group, std) | {Group.OUTPUT: joining_std, Group.DOWN: joining_std}


def _standard(config: TransformerConfig) -> ScalingRules:
    init_std = _init_std(config.initializer_range, config.num_hidden_layers)
    return ScalingRules(
        init_std=init_std,
        base_init_std=init_std,
        adamw=STANDARD_FACTORS,
        muon=STANDARD_MUON,
    )


def _complete_p(config: TransformerConfig, base: BaseShape) -> ScalingRules:
    """CompleteP: m_N, m_O and m_F are the fan-ins over the base's, m_L the depth over its depth.

    Adam's update of a matrix is nearly of low rank and lines up with its input, so that its rate
    goes with 1 / fan-in. Muon's has the spectral norm 0.2 sqrt(max(rows, columns)) for a rate of 1
    (`muon.py`), and should have sqrt(rows / columns): for rows and columns that grow alike that is
    a rate with 1 / sqrt(m_N), and for the down projection, d x f, with sqrt(d) / f. Decay goes
    against the rate in both, so that what a step takes off a weight stays the same share.

    At the base shape all is as in the standard parametrisation: the init's sqrt(2 L) is of the
    base's depth, a constant, for the residual multiplier sees to the model's own.
    """
    m_n = config.hidden_size / base.width
    m_o = config.heads * config.head_size / base.width
    m_f = config.ffn_size / feed_forward_width(base.width)
    m_l = config.num_hidden_layers / base.depth
    init_std = _init_std(config.initializer_range, base.depth)
    outside, within = Factors(epsilon=1 / m_n), 1 / (m_n * m_l)
    vector = Factors(weight_decay=0.0, epsilon=within)

    def adamw(fan_in: float) -> Factors:
        return Factors(1 / fan_in, fan_in, within)

    def muon(rate: float) -> Factors:
        return Factors(rate, 1 / rate)

    return ScalingRules(
        residual=1 / m_l,
        logits=1 / m_n,
        attention=math.sqrt(base.head_size / config.head_size),
        init_std=init_std | {
            Group.HIDDEN: init_std[Group.HIDDEN] / math.sqrt(m_n),
            Group.OUTPUT: init_std[Group.OUTPUT] / math.sqrt(m_o),
            Group.DOWN: init_std[Group.DOWN] / math.sqrt(m_f),
        },
        base_init_std=init_std,
        adamw={
            Group.EMBEDDING: outside,
            Group.HIDDEN: adamw(m_n),
            Group.OUTPUT: adamw(m_o),
            Group.DOWN: adamw(m_f),
            Group.NORM: vector,
            Group.FINAL_NORM: replace(outside, weight_decay=0.0),
            Group.HEAD: outside,
        },
        muon={
            Group.HIDDEN: muon(1 / math.sqrt(m_n)),
            Group.OUTPUT: muon(1 / math.sqrt(m_o)),
            Group.DOWN: muon(math.sqrt(m_n) / m_f),
        },
    )


_HIDDEN_RULES = {
    Rule.HIDDEN_RATE: "learning_rate", Rule.HIDDEN_DECAY: "weight_decay", Rule.EPSILON: "epsilon",
}
_PROJECTIONS = {Rule.DOWN_PROJECTION: Group.DOWN, Rule.OUTPUT_PROJECTION: Group.OUTPUT}


def without(rules: ScalingRules, rule: Rule) -> ScalingRules:
    """Return the rules with one taken away: what it scales is as in the base model.

    For checks that must notice. A projection's rule is all that scales its matrix.
    """
    if rule is Rule.RESIDUAL:
        return replace(rules, residual=1.0)
    if rule is Rule.LOGITS:
        return replace(rules, logits=1.0)
    if rule is Rule.ATTENTION:
        return replace(rules, attention=1.0)
    if rule is Rule.HIDDEN_INIT:
        return replace(rules, init_std=rules.base_init_std)
    if rule in _PROJECTIONS:
        group = _PROJECTIONS[rule]
        plain = Factors(epsilon=rules.adamw[group].epsilon)
        return replace(
            rules,
            init_std={**rules.init_std, group: rules.base_init_std[group]},
            adamw={**rules.adamw, group: plain},
            muon={**rules.muon, group: plain},
        )
    unscaled = {_HIDDEN_RULES[rule]: 1.0}
    groups = tuple(Group) if rule is Rule.EPSILON else _MUON_GROUPS
    return replace(
        rules,
        adamw={**rules.adamw, **{g: replace(rules.adamw[g], **unscaled) for g in groups}},
        muon={group: replace(factors, **unscaled) for group, factors in rules.muon.items()},
    )
