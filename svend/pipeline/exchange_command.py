"""`svend export` and `svend import`: to Hugging Face and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.command import Call, Command, tell, tell_loading, tell_next


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--to", choices=("hf",), default="hf", metavar="FORM",
                        help="hf: Hugging Face transformers, the only one (default: hf)")
    parser.add_argument("--folder", type=Path, metavar="PATH",
                        help="to be made (default: NAME-vVERSION-hf)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", metavar="DTYPE",
                        help="of the weights: fp32 or bf16 (default: fp32)")
    parser.add_argument("--model_factory", metavar="FILE.py:FUNCTION",
                        help="that made the version's model, a ReasoningTransformer")


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER", help="of the Llama family")
    parser.add_argument("--name", required=True, metavar="NAME", help="of the model from now on")
    parser.add_argument("--into", type=Path, metavar="PATH",
                        help="to be made (default: imported/NAME)")


def _run_export(call: Call) -> int:
    known = call.options
    tell_loading("torch and mlflow")
    from svend.pipeline.exchange import export_version

    tell(f"export: {known.uri} in {known.dtype}, written and then read back")
    folder = export_version(known.uri, known.folder, known.dtype, known.model_factory)
    size = sum(path.stat().st_size for path in folder.iterdir())
    call.answer = {"folder": folder.absolute(), "bytes": size, "dtype": known.dtype}
    tell(
        f"wrote {folder} ({size / 1e6:.0f} MB, {known.dtype}); its weights were read back and are "
        "the version's\n"
        "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )
    return 0


def _run_import(call: Call) -> int:
    known = call.options
    tell_loading("torch and mlflow")
    from svend.pipeline.exchange import import_folder

    tell(f"import: {known.source} as {known.name}")
    folder = import_folder(known.source, known.name, known.into)
    call.answer = {"folder": folder.absolute(), "name": known.name}
    tell(f"wrote {folder}")
    tell_next(f"train --init_from {folder}")
    return 0


EXPORT = Command(
    name="export",
    summary="write a version for other libraries",
    description="Write a version of the registry as a folder that transformers reads. It appears "
    "whole or not at all, and its weights are read back and compared.",
    makes="a folder with config.json, safetensors, the tokenizer and a model card",
    examples=(
        "svend export models:/svend-tiny-50m@standard --to hf",
        "svend export models:/svend-tiny-50m@standard --folder exported --dtype bf16",
    ),
    answer="folder, bytes, dtype",
    add_options=_add_export_options,
    run=_run_export,
)
IMPORT = Command(
    name="import",
    summary="make a start of a Hugging Face folder",
    description="Make a checkpoint to begin a run with of a Llama-family folder. config.json, "
    "safetensors and tokenizer.json are read; a pickle never is.",
    makes="a folder with a checkpoint, for --init_from",
    examples=(
        "svend import exported --name my-start",
        "svend import ../SmolLM2-135M --name smollm2-135m",
    ),
    answer="folder, name",
    add_options=_add_import_options,
    run=_run_import,
)
