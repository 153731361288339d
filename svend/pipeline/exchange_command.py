"""`svend export` and `svend import`: their options, and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPORT_HELP = """\
example:
  python -m svend export models:/svend-tiny-50m@full --to hf
"""
IMPORT_HELP = """\
config.json, safetensors and tokenizer.json are read; a pickle never is.

examples:
  python -m svend import ../SmolLM2-135M --name smollm2-135m
  python -m svend train --init_from imported/smollm2-135m --data gsm8k
"""


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend export`."""
    parser.add_argument("uri", metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--to", choices=("hf",), default="hf", help="Hugging Face transformers")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="left out: NAME-vVERSION-hf")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--model_factory", metavar="FILE.py:FUNCTION",
                        help="that made the version's model, a ReasoningTransformer")


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `svend import`."""
    parser.add_argument("source", type=Path, metavar="FOLDER", help="of the Llama family")
    parser.add_argument("--name", required=True, metavar="NAME", help="of the model from now on")
    parser.add_argument("--into", type=Path, metavar="PATH", help="left out: imported/NAME")


def run_export(known: argparse.Namespace) -> None:
    """Export a version, and say how to load it."""
    print("starting: loading torch and mlflow", flush=True)
    from svend.pipeline.exchange import export_version

    folder = export_version(known.uri, known.folder, known.dtype, known.model_factory)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"wrote {folder} ({size / 1e6:.0f} MB, {known.dtype}); its weights were read back and are "
        "the version's\n"
        "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    )


def run_import(known: argparse.Namespace) -> None:
    """Import a folder, and say how to train on."""
    print("starting: loading torch and mlflow", flush=True)
    from svend.pipeline.exchange import import_folder

    folder = import_folder(known.source, known.name, known.into)
    print(f"wrote {folder}\ntrain on:  svend train --init_from {folder}")
