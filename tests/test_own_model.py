"""A model of the user's: refused in one line before a step is spent on it, or trained as any."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svend.errors import ConfigError
from svend.models.config import TransformerConfig
from svend.models.transformer import ReasoningTransformer
from svend.pipeline import PipelineRunner
from svend.pipeline.config import (
    Compile,
    ModelScale,
    Parallel,
    PipelineConfig,
    create_quick_test_config,
    load_config,
)
from svend.pipeline.own_model import check_model, make_model, own_model_name
from svend.pipeline.run_model import build_model, planned_model
from tests.conftest import Workplace
from tests.in_process import run_here
from tests.refusals import refusal_of

CPU = torch.device("cpu")
VOCABULARY, LENGTH = 64, 32


def config(**training: Any) -> PipelineConfig:
    quick = create_quick_test_config().resolve()
    assert quick.model is not None
    data = replace(quick.training.data, max_seq_length=LENGTH)
    return replace(
        quick, model=replace(quick.model, vocab_size=VOCABULARY),
        training=replace(quick.training, data=data, **training),
    )


class Bigrams(nn.Module):
    """The smallest model that the loop trains; what it does wrong is up to its subclasses."""

    def __init__(self, vocabulary: int = VOCABULARY, positions: int = LENGTH) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 8)
        self.places = nn.Embedding(positions, 8)
        self.head = nn.Linear(8, vocabulary)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        places_TD = self.places(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        logits_BTV: Tensor = self.head(self.table(tokens_BT) + places_TD)
        return logits_BTV

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return summed(self.logits(tokens_BT), labels_BT)


def summed(logits_BTV: Tensor, labels_BT: Tensor, reduction: str = "sum") -> Tensor:
    return F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=-100,
        reduction=reduction,
    )


class Tied(Bigrams):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight


class Buffered(Bigrams):
    """Counts its calls, and drops out: neither may be seen of a check."""

    def __init__(self, vocabulary: int = VOCABULARY, positions: int = LENGTH) -> None:
        super().__init__(vocabulary, positions)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.ones(4), persistent=False)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        if self.training:
            self.seen += 1
        return summed(F.dropout(self.logits(tokens_BT), 0.5, self.training), labels_BT)


class Logits(Bigrams):
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return self.logits(tokens_BT)


class Pair(Bigrams):
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return super().forward(tokens_BT, labels_BT, documents_BT), None


class Mean(Bigrams):
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return summed(self.logits(tokens_BT), labels_BT, "mean")


class LearnsEveryLabel(Bigrams):
    """Takes what is not to be learnt for token 0."""

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return summed(self.logits(tokens_BT), labels_BT.clamp(min=0))


class Detached(Bigrams):
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return super().forward(tokens_BT, labels_BT, documents_BT).detach()


class NotANumber(Bigrams):
    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.head.weight, float("nan"))


class OneArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT


class LacksAnAttribute(Bigrams):
    def forward(self, tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor) -> Any:
        return self.final_norm(self.logits(tokens_BT))


class AsksForValues(Bigrams):
    """Computes rates of its layers by tensors, as many published modules do."""

    def __init__(self) -> None:
        super().__init__()
        # Not linspace, which transformers, once it is imported, has made on the CPU.
        self.rates = [rate.item() for rate in 0.1 * torch.arange(4)]


def frozen() -> nn.Module:
    return Bigrams().requires_grad_(requires_grad=False)


def broken() -> nn.Module:
    raise KeyError("width")


def try_model(make: Callable[[], Any], settings: PipelineConfig) -> nn.Module:
    """Do what a run does with a factory before its first step."""

    def factory(scale: ModelScale) -> nn.Module:
        model: nn.Module = make()
        return model

    planned_model(settings, factory)
    return build_model(settings, factory, CPU, VOCABULARY)


@pytest.mark.parametrize("make", [
    Bigrams, Tied, Buffered, functools.partial(Bigrams, 2 * VOCABULARY, 2 * LENGTH),
])
def test_a_model_that_does_what_the_loop_asks_is_taken(make: Callable[[], Any]) -> None:
    model = try_model(make, config())
    assert model.training


@pytest.mark.parametrize(("make", "says"), [
    (lambda: None, "returned NoneType, no torch.nn.Module"),
    (lambda: Bigrams, "returned Bigrams, no torch.nn.Module"),
    (nn.Identity, "returned a Identity without a parameter to train"),
    (frozen, "returned a Bigrams without a parameter to train"),
    (broken, "fails (KeyError: 'width', test_own_model.py:"),
    (AsksForValues, "compute constants in plain Python, or inside `with torch.device('cpu')`"),
    (Logits, f"of shape (1, {LENGTH}, {VOCABULARY}) for tokens of shape (1, {LENGTH}), not the "
             "summed loss, one number"),
    (Pair, "returned tuple, not the summed loss"),
    (Mean, "must return the loss summed over the labels that are not negative"),
    (LearnsEveryLabel, "must return the loss summed over the labels that are not negative"),
    (Detached, "returned a loss that no weight can learn from"),
    (NotANumber, "has the loss nan before its first step"),
    (OneArgument, "it is called as model(tokens, labels, documents)"),
    (LacksAnAttribute, "has no attribute 'final_norm', test_own_model.py:"),
    (functools.partial(Bigrams, VOCABULARY // 2), "fails on token ids up to 63"),
    (functools.partial(Bigrams, VOCABULARY, LENGTH // 2), f"at {LENGTH} positions"),
])
def test_a_model_that_the_loop_cannot_train_is_refused_in_one_line(
    make: Callable[[], Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        try_model(make, config())
    message = str(caught.value)
    assert message.startswith("model_factory ")
    assert says in message
    assert "\n" not in message


def test_what_is_tried_changes_nothing_of_the_model() -> None:
    settings = config()
    torch.manual_seed(0)
    model = make_model(lambda scale: Buffered(), settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    check_model(model, lambda scale: model, settings, CPU, VOCABULARY)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("setting", "key"), [
    ({"gradient_checkpointing": True}, "training.gradient_checkpointing = true"),
    ({"float8": True}, "training.float8 = true"),
    ({"compile": Compile.ON}, "training.compile = on"),
])
def test_what_only_our_own_transformer_has_is_refused_for_another_module(
    setting: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: .* is a Bigrams; leave it out"):
        try_model(Bigrams, config(**setting))


def test_weights_of_another_module_are_not_divided() -> None:
    settings = config(parallel=Parallel.FSDP)
    with pytest.raises(ConfigError, match=r"parallel = fsdp: .* is a Bigrams; set .*=ddp"):
        build_model(settings, lambda scale: Bigrams(), CPU, 4, mesh=object())  # type: ignore[arg-type]


def named(name: object) -> nn.Module:
    model = Bigrams()
    model.config = TransformerConfig(name="x", hidden_size=64, num_hidden_layers=1)
    object.__setattr__(model.config, "name", name)
    return model


@pytest.mark.parametrize(("model", "name"), [
    (named("mixer"), "mixer"),
    (named("svend-small-125m"), "svend-quick-test"),  # of a scale: that registry is not its own
    (named(7), "svend-quick-test"),
    (Bigrams(), "svend-quick-test"),
])
def test_an_own_model_enters_no_registry_of_a_scale(model: nn.Module, name: str) -> None:
    settings = config()
    assert own_model_name(model, settings) == name
    of_scale = replace(settings, model=replace(settings.model, name="svend-tiny-50m"))  # type: ignore[type-var]
    if name == "svend-quick-test":
        assert own_model_name(model, of_scale) == "custom-tiny"
    with pytest.raises(ConfigError, match="without /, : and @"):
        own_model_name(named("a/b"), settings)


def test_a_factory_is_given_once() -> None:
    settings = load_config({"preset": "quick_test"}, [("model_factory", f"{__name__}:broken")])
    with pytest.raises(ConfigError, match="a function is given too; leave out one"):
        PipelineRunner(settings, model_factory=lambda scale: Bigrams())


@pytest.mark.parametrize(("command", "says"), [
    ("train --model_factory nowhere.py:make", "model_factory = 'nowhere.py:make' cannot be loaded"),
    ("train --model_factory no_such_module:make", "give file.py:function or module:function"),
    ("train --model_factory mixer.py:make", "has no attribute 'make'"),
    ("train --model_factory mixer.py:WIDTH", "WIDTH is int, no function"),
    ("plan --model_factory broken.py:make", "SyntaxError"),
    ("plan --gpu a100-80gb --model_factory mixer.py:make_model", "leave out --gpu"),
    ("ladder --model_factory mixer.py:make_model", "run_progressive"),
    ("sweep --model_factory mixer.py:make_model", "which a factory does not read"),
])
def test_a_reference_that_leads_nowhere_or_a_command_that_takes_none_is_one_line(
    command: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixer.py").write_text("WIDTH = 4\ndef make_model(scale):\n    return None\n")
    (tmp_path / "broken.py").write_text("def make(:\n")
    line = refusal_of(command.split(), tmp_path, capsys)
    assert "model_factory" in line and says in line


def test_a_factory_may_make_our_own_transformer_otherwise() -> None:
    own = TransformerConfig(
        name="own", hidden_size=64, num_hidden_layers=1, vocab_size=VOCABULARY // 2
    )
    with pytest.raises(ConfigError, match="fails on token ids up to 63"):
        try_model(lambda: ReasoningTransformer(own), config())
    enough = replace(own, vocab_size=VOCABULARY)
    settings = config(gradient_checkpointing=True)
    assert isinstance(try_model(lambda: ReasoningTransformer(enough), settings),
                      ReasoningTransformer)


SOURCE = """
import os, signal
from tests.test_own_model import Buffered

class Stopped(Buffered):
    def forward(self, tokens_BT, labels_BT, documents_BT):
        loss = super().forward(tokens_BT, labels_BT, documents_BT)
        if self.training and int(self.seen) == int(os.environ.get("STOP_AT_CALL", "0")):
            os.kill(os.getpid(), signal.SIGINT)
        return loss

def make_model(scale):
    return Stopped(512, 64)
"""


def train_own(place: Workplace, name: str, *options: str) -> str:
    """Train the model above on the command line; return what was said."""
    done = run_here(place, place.train_command(
        "--model_factory", str(place.folder / "own.py:make_model"), *options,
        model__name=name, model__vocab_size="512", data__max_seq_length="64",
        training__experiment_name=name, training__max_steps="24", training__save_steps="8",
    ))
    return f"{done.returncode}: {done.stdout}"


@pytest.mark.slow
def test_a_run_of_an_own_model_goes_on_to_the_same_weights_and_only_with_the_same_code(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = workplace.folder / "own.py"
    source.write_text(SOURCE)
    whole = train_own(workplace, "whole")
    assert whole.startswith("0: ") and "registered   whole version 1" in whole
    monkeypatch.setenv("STOP_AT_CALL", "13")
    assert "interrupted by SIGINT at step 13" in train_own(workplace, "stopped")
    monkeypatch.delenv("STOP_AT_CALL")
    source.write_text(SOURCE + "# changed\n")
    refused = train_own(workplace, "stopped", "--resume")
    assert refused.startswith("1: ") and "the model factory's file was" in refused
    source.write_text(SOURCE)
    resumed = train_own(workplace, "stopped", "--resume")
    assert resumed.startswith("0: ") and "from step 13" in resumed
    weights = [
        torch.load(workplace.checkpoints / name / "step_00000024" / "model.pt", weights_only=True)
        for name in ("whole", "stopped")
    ]
    assert weights[0].keys() == weights[1].keys() and "seen" in weights[0]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (workplace.checkpoints / "whole" / "model_factory.py").read_text() == SOURCE
