"""What MLflow loads a registered version by: `mlflow.pyfunc.load_model`, `mlflow models serve`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svend.device import check_precision, resolve_device, resolve_precision
from svend.pipeline.loading import CONFIG_FILE, load_saved_config
from svend.pipeline.version_files import (
    answering_model,
    load_version_model,
    load_version_tokenizer,
)
from svend.serving.command import HERE
from svend.serving.engine import Engine
from svend.serving.openai_chat import Limits, completion, read_request

# Set to "on": calls of Svend's own tools are carried out.
TOOLS_VARIABLE = "SVEND_SERVE_TOOLS"


class ChatModel:
    """Answers chats in the form of OpenAI's completions."""

    def __init__(self, folder: Path, *, tools: bool) -> None:
        config = load_saved_config(folder / CONFIG_FILE, HERE)
        device = resolve_device(config.training.device)
        precision = resolve_precision(config.training.precision, device)
        check_precision(precision, device)
        assert config.model is not None  # set by PipelineConfig.resolve
        self._name = config.model.name
        self._engine = Engine(
            answering_model(load_version_model(folder, config, device), "chat"),
            load_version_tokenizer(folder), precision,
        )
        self._own_tools = self._engine.tool_declarations if tools else None

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Answer one chat for each row of a table with a column `messages`.

        model_input: such a table, which MLflow makes of {"messages": [...], "temperature": ...}
        too. Returns a list of completions. Raises UserError for a chat that is none.
        """
        return [
            self._answer({**{key: value for key, value in row.items() if _is_given(value)},
                          **(params or {})})
            for row in model_input.to_dict(orient="records")
        ]

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        told = {key: _plain(value) for key, value in request.items()}
        asked = read_request(told, Limits(), self._engine.context, self._own_tools)
        return completion(self._engine.submit(asked.chat).result(), self._name)


def _load_pyfunc(path: str) -> ChatModel:
    """Return the model in a version's folder; MLflow calls it by this name."""
    return ChatModel(Path(path), tools=os.environ.get(TOOLS_VARIABLE, "off") == "on")


def _is_given(value: Any) -> bool:
    """Whether a cell of a table holds something: MLflow fills in None or NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """Return MLflow's arrays and numbers of numpy as lists and numbers."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return value
