"""`svend scales`: the ladder as a table."""

from __future__ import annotations

from svend.command import Call, Command, tell_next
from svend.pipeline.config import ModelScale, get_model_config, print_scale_comparison


def _run(call: Call) -> int:
    print_scale_comparison()
    tell_next("plan --scale tiny")
    models = [(scale, get_model_config(scale)) for scale in ModelScale]
    call.answer = {"scales": [
        {
            "scale": scale, "name": model.name, "parameters": model.num_parameters(),
            "hidden_size": model.hidden_size, "layers": model.num_hidden_layers,
            "attention_heads": model.num_attention_heads,
            "key_value_heads": model.num_key_value_heads,
            "feed_forward_size": model.intermediate_size, "vocabulary": model.vocab_size,
            "context_tokens": model.max_position_embeddings,
            "train_memory_gb": model.train_memory_gb,
            "recommended_samples": model.recommended_samples,
        }
        for scale, model in models
    ]}
    return 0


SCALES = Command(
    name="scales",
    summary="print the seven scales",
    description="Print the seven scales, each figure from its configuration.",
    makes="nothing",
    examples=("svend scales", "svend scales --json"),
    answer="scales, each with its name, parameters, shape and memory",
    run=_run,
)
