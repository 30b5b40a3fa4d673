"""Put a mask into a Hugging Face model, train a step, and generate with it.

    pip install 'sparse-flash[transformers]'
    python examples/transformers_generate.py

The model is tiny and random, so that nothing is downloaded. For a real one:
`AutoModelForCausalLM.from_pretrained("...", attn_implementation=name)`.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sparse_flash import masks
from sparse_flash.integrations.transformers import register


def main() -> None:
    """One layer with a window and sinks, one with butterfly blocks; the others stay causal."""
    torch.manual_seed(0)
    name = register(
        "block_sparse",
        mask={
            0: masks.local((63, 0)) | masks.sinks(4),
            1: masks.butterfly(block=32) | masks.local((31, 0)),
        },
    )
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    ids = torch.randint(1, 128, (2, 256))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, :100] = 0  # padding on the left
    loss = model(
        ids, attention_mask=attention_mask, labels=ids.where(attention_mask > 0, -100)
    ).loss
    loss.backward()
    print(f"loss {loss.item():.3f}")

    found = model.eval().generate(
        ids, attention_mask=attention_mask, max_new_tokens=8, do_sample=False
    )
    print(f"generated {found[:, 256:].tolist()}")


if __name__ == "__main__":
    main()
