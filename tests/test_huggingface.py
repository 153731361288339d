"""What is exported is a Llama that transformers reads, with our logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from svend.data.documents import Role, conversation
from svend.data.tokenizer import train_tokenizer
from svend.models.config import TransformerConfig
from svend.models.generation import Decoder, PlainTurn, Request
from svend.models.huggingface import export_to_huggingface
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.config import Precision


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 32), (12, 3, 8)])
def test_logits_and_greedy_tokens_are_those_of_the_exported_llama(
    tmp_path: Path, heads: int, kv_heads: int, size: int
) -> None:
    torch.manual_seed(0)
    model = ReasoningTransformer(TransformerConfig(
        name="m", hidden_size=heads * size, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=90, max_position_embeddings=128,
        rope_theta=5000.0, initializer_range=0.2,
    )).eval()
    export_to_huggingface(model, None, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens_BT = torch.randint(0, 90, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens_BT), reference(tokens_BT).logits, rtol=1e-4, atol=1e-4
        )
    expected = reference.generate(
        tokens_BT[:1], attention_mask=torch.ones(1, 40, dtype=torch.int64), do_sample=False,
        max_new_tokens=20, min_new_tokens=20, pad_token_id=0,
    )[0, 40:].tolist()
    decoder = Decoder(model, lanes=1, max_length=64, precision=Precision.FP32)
    (completion,) = decoder.generate([Request(tokens_BT[0].tolist(), PlainTurn(20))])
    assert completion.tokens == expected


def test_the_tokenizer_goes_with_it(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        [conversation((Role.USER, "What is 3 * 4?"), (Role.ASSISTANT, "#### 12"))] * 3, 400
    )
    model = ReasoningTransformer(TransformerConfig(
        name="m", hidden_size=32, num_hidden_layers=1, vocab_size=400,
    ))
    export_to_huggingface(model, tokenizer.files(), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("What is 3 * 4?").input_ids == tokenizer.encode_text("What is 3 * 4?")
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.eos_token_id == tokenizer.control_ids["<|end|>"]
