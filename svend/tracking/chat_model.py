"""How MLflow loads a version as a model that answers chats: a loader of the package, no pickle."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from mlflow.models import Model, ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA

from svend import __version__

LOADER = "svend.serving.pyfunc"
PACKAGES = ("mlflow", "numpy", "omegaconf", "safetensors", "tokenizers", "torch")


def describe_model(folder: Path, model_id: str, run_id: str) -> list[Path]:
    """Write MLmodel and requirements.txt into a folder; return their paths."""
    requirements = folder / "requirements.txt"
    pins = "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in PACKAGES)
    requirements.write_text(f"# beside Svend {__version__}, whose loader reads the files\n{pins}",
                            encoding="utf-8")
    model = Model(
        run_id=run_id, model_id=model_id,
        signature=ModelSignature(CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA),
        metadata={"task": "llm/v1/chat"},
    )
    # By hand, for mlflow.pyfunc takes a second to import and nothing else of it is needed.
    model.add_flavor(
        "python_function", loader_module=LOADER, python_version=platform.python_version(), env={}
    )
    described = folder / "MLmodel"
    model.save(described)
    return [described, requirements]
