"""Transformers' models with block-sparse attention equal the same models with eager attention."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
import transformers

from sparse_flash import masks
from sparse_flash.integrations.transformers import LayerPatterns, register
from sparse_flash.integrations.transformers_inputs import LayerInputs

VOCABULARY, TOKENS = 99, 21
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64,
         "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
LLAMA = transformers.LlamaConfig(**GROUPED)
MISTRAL = transformers.MistralConfig(sliding_window=7, **GROUPED)
# One layer with a window, one without.
GEMMA2 = transformers.Gemma2Config(
    head_dim=16, attn_logit_softcapping=None, sliding_window=5, **GROUPED
)
QWEN2 = transformers.Qwen2Config(
    sliding_window=5, use_sliding_window=True, max_window_layers=1, **GROUPED
)
BERT = transformers.BertConfig(**SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
CAUSAL = {"llama": LLAMA, "mistral": MISTRAL, "gemma2": GEMMA2, "qwen2": QWEN2}
ALL = CAUSAL | {"bert": BERT}

IDS = torch.randint(1, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(3, TOKENS, dtype=torch.int64)
LEFT[1, :5] = LEFT[2, :13] = 0
PADDING = {"none": None, "left": LEFT, "right": LEFT.flip(1)}


def make(config, attention="block_sparse", dtype=torch.float32):
    """The same weights for the same config, whatever the attention."""
    torch.manual_seed(0)
    encoder = config.model_type == "bert"
    auto = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    model = auto.from_config(copy.deepcopy(config), attn_implementation=attention)
    return model.to(dtype).eval()


def pair(config, dtype=torch.float32):
    register("block_sparse")
    return make(config, "eager", dtype), make(config, "block_sparse", dtype)


def outputs(model, **inputs):
    with torch.no_grad():
        return model(IDS, **inputs)[0]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ALL)
def test_forward_equals_eager(name, padding):
    mask = PADDING[padding]
    eager, ours = (outputs(model, attention_mask=mask) for model in pair(ALL[name]))
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[real], eager[real], atol=2e-6, rtol=1e-5)
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_bfloat16_is_as_exact_as_eager(name):
    mask = PADDING["right"]
    exact, eager, ours = (
        outputs(model, attention_mask=mask)[mask.bool()].double()
        for model in (make(ALL[name], "eager"), *pair(ALL[name], torch.bfloat16))
    )
    eager, ours = ((out - exact).square().mean().sqrt() for out in (eager, ours))
    assert ours <= 1.2 * eager


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_training_gradients_equal_eagers(name, padding):
    mask = PADDING[padding]
    # Not where a query of padding would count: the one before the first token, too.
    real = torch.ones(3, TOKENS, dtype=torch.bool) if mask is None else mask.cumsum(1) * mask > 1
    gradients = []
    for model in pair(ALL[name]):
        model.train()
        out = model(IDS, attention_mask=mask)[0][real]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    torch.testing.assert_close(*gradients, atol=1e-6 * largest, rtol=1e-4)


def test_gradient_checkpointing():
    _, model = pair(MISTRAL)
    model.train()
    found = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, attention_mask=LEFT, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.activation_checkpointing_enable()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_generate_equals_eager(name, padding, cache):
    """With prompts longer than all windows."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    eager, ours = (
        model.generate(IDS, attention_mask=PADDING[padding], cache_implementation=cache, **options)
        for model in pair(CAUSAL[name])
    )
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(ours.logits, eager.logits, atol=2e-6, rtol=1e-5)


def test_prefill_in_pieces_and_beams():
    eager, ours = pair(MISTRAL)
    for options in ({"prefill_chunk_size": 8}, {"num_beams": 3}, {"use_cache": False}):
        options |= {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        a, b = (m.generate(IDS, attention_mask=LEFT, **options) for m in (eager, ours))
        assert torch.equal(a, b), options


def with_masks(model, chosen):
    """Give the layers of an eager model masks of ones and zeros by hand."""
    for layer, mask in zip(model.model.layers, chosen, strict=True):
        index = torch.arange(TOKENS)

        def replace(module, args, kwargs, mask=mask, index=index):
            shift = (LEFT == 0).sum(1)[:, None, None, None]  # positions count from the first token
            q, kv = index[:, None] - shift, index - shift
            seen = mask(q.clamp(min=0), kv.clamp(min=0)) & (kv >= 0) & (q >= kv)
            bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": bias}

        layer.register_forward_pre_hook(replace, with_kwargs=True)
    return model


STAR = masks.local((3, 0)) | masks.sinks(2)
BUTTERFLY = masks.butterfly(block=4)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (STAR, (STAR, STAR)),
        ("local((3, 0)) | sinks(2)", (STAR, STAR)),
        ({1: BUTTERFLY}, (masks.full(), BUTTERFLY)),
        (lambda module: (STAR, "butterfly(4)")[module.layer_idx], (STAR, BUTTERFLY)),
        (lambda module: None, (masks.full(), masks.full())),
    ],
    ids=["mask", "text", "by layer", "by module", "none"],
)
def test_own_masks_by_layer(given, chosen):
    eager = outputs(with_masks(make(LLAMA, "eager"), chosen), attention_mask=LEFT)
    ours = outputs(make(LLAMA, register("own", given)), attention_mask=LEFT)
    real = LEFT.bool()
    torch.testing.assert_close(ours[real], eager[real], atol=2e-6, rtol=1e-5)


def test_own_masks_by_head_and_within_a_window():
    heads = [masks.local((2, 0)), masks.full(), STAR, BUTTERFLY]
    model = make(MISTRAL, register("own", masks.per_head(heads)))
    attention = model.model.layers[0].self_attn
    inputs = LayerInputs(True, 7, 0, None, None, dropped=False)
    q, k, v = (torch.randn(1, h, TOKENS, 16) for h in (4, 2, 2))
    from transformers import AttentionInterface

    out, _ = AttentionInterface()["own"](attention, q, k, v, inputs, scaling=0.3)
    window = masks.local((6, 0))(torch.arange(TOKENS)[:, None], torch.arange(TOKENS))
    seen = torch.stack([m(torch.arange(TOKENS)[:, None], torch.arange(TOKENS)) for m in heads])
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen & window, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, dense.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_an_own_mask_equals_the_whole_sequence(cache):
    model = make(LLAMA, register("own", {0: STAR, 1: BUTTERFLY}))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(
        IDS, attention_mask=LEFT, cache_implementation=cache, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    mask = torch.nn.functional.pad(LEFT, (0, 5), value=1)
    with torch.no_grad():
        whole = model(found.sequences, attention_mask=mask).logits
    steps = torch.stack(found.logits, 1)
    torch.testing.assert_close(steps, whole[:, TOKENS - 1 : -1], atol=2e-6, rtol=1e-5)


def test_a_sliding_cache_takes_masks_of_distances_only():
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    whole, cached = (
        make(MISTRAL, register("own", masks.dilated(2, 2))).generate(IDS, use_cache=use, **options)
        for use in (False, True)
    )
    assert torch.equal(whole, cached)
    model = make(MISTRAL, register("own", STAR))
    with pytest.raises(ValueError, match=r"sinks\(2\).*config.sliding_window=7"):
        model.generate(IDS, **options)
    model.generate(IDS, use_cache=False, **options)


def test_which_masks_depend_on_distances_only():
    near = masks.local(3)
    for mask in (near & ~masks.strided(4), masks.per_head([near, masks.causal(2)]).shift(q=3)):
        assert LayerPatterns(mask).is_shift_invariant
    for mask in (near.through(masks.morton(8, 8)), near | masks.sinks(1), masks.custom(torch.ge)):
        assert not LayerPatterns(mask).is_shift_invariant


def test_compiled_training():
    """No break of the graph; nothing is read on the host."""
    eager, ours = pair(transformers.LlamaConfig(**(GROUPED | {"num_hidden_layers": 1})))
    for mask in (LEFT, None):
        labels = IDS if mask is None else IDS.where(LEFT.cumsum(1) > 1, -100)
        torch._dynamo.reset()
        compiled = torch.compile(ours.train(), backend="aot_eager", fullgraph=True)
        inputs = {"attention_mask": mask, "labels": labels, "use_cache": False}
        loss = compiled(IDS, **inputs).loss
        torch.testing.assert_close(loss, eager.train()(IDS, **inputs).loss)
    packed = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)])[None]
    with pytest.raises(RuntimeError, match="position_ids"):
        compiled(IDS, position_ids=packed, use_cache=False)


def test_encoder_without_masks():
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    register("block_sparse")
    a, b = (
        transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation=name)
        for name in ("eager", "block_sparse")
    )
    b.load_state_dict(a.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(b(pixels)[0], a(pixels)[0], atol=2e-6, rtol=1e-5)


def test_cross_attention():
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
    )  # fmt: skip
    found = []
    for name in ("eager", register("block_sparse"), register("own", STAR)):
        torch.manual_seed(0)
        model = transformers.AutoModelForSeq2SeqLM.from_config(
            copy.deepcopy(config), attn_implementation=name
        ).eval()
        if name == "own":
            with pytest.raises(ValueError, match="config.is_encoder_decoder=True"):
                outputs(model, decoder_input_ids=IDS)
        else:
            inputs = {"decoder_input_ids": IDS[:, :9], "attention_mask": PADDING["right"]}
            found.append(outputs(model, **inputs))
    torch.testing.assert_close(found[1], found[0], atol=2e-6, rtol=1e-5)


def config_of(name, **fields):
    return getattr(transformers, f"{name}Config")(**GROUPED, **fields)


SCORES = {
    "softcap": config_of("Gemma2", head_dim=16, attn_logit_softcapping=0.5),
    "sinks": config_of("GptOss", head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    "v_head_dim": transformers.DeepseekV3Config(
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=24,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=2, **(GROUPED | {"num_key_value_heads": 4}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_score_terms_of_models(name):
    eager, ours = pair(SCORES[name])
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        if a.shape == (4,):  # sinks, which begin equal
            a.data.normal_()
            b.data.copy_(a.data)
    found = [outputs(model) for model in (eager, ours)]
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-5)
    if name == "sinks":
        eager, ours = (m(IDS, labels=IDS).loss for m in (eager.train(), ours.train()))
        torch.testing.assert_close(ours, eager)


def test_dropout_while_training():
    model = make(config_of("Llama", attention_dropout=0.5), register("block_sparse")).train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(outputs(model))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-4)


REFUSED = {
    "config.attention_chunk_size=8": (
        config_of("Llama4Text", head_dim=16, attention_chunk_size=8, num_local_experts=2),
        {},
    ),
    "config.output_attentions=True": (LLAMA, {"output_attentions": True}),
    "head_mask": (BERT, {"head_mask": torch.ones(2, 4)}),
    "attention_mask of shape (3, 1, 21, 21)": (
        LLAMA,
        {"attention_mask": torch.ones(3, 1, TOKENS, TOKENS)},
    ),
    "zeros between ones": (LLAMA, {"attention_mask": LEFT + LEFT.flip(1) - 1}),
    "position_ids": (
        LLAMA,
        {"use_cache": False, "position_ids": torch.arange(TOKENS)[None] % 10},
    ),
    "cu_seq_lens_q": (LLAMA, {"cu_seq_lens_q": torch.tensor([0, 10, 21])}),
    "does not call": (
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=1, n_head=4),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message):
    config, inputs = REFUSED[message]
    register("block_sparse")
    model = make(config)
    if message == "zeros between ones":
        inputs = {"attention_mask": torch.ones(3, TOKENS).index_fill(1, torch.tensor([4]), 0)}
    with pytest.raises(ValueError, match=re.escape(message)):
        outputs(model, **inputs)


def test_dropout_is_no_matter_in_evaluation():
    config = config_of("Llama", attention_dropout=0.1)
    eager, ours = (outputs(model) for model in pair(config))
    torch.testing.assert_close(ours, eager, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"name": "sparse_flash"}, ValueError, "'flash'"),
        ({"name": "my-SDPA"}, ValueError, "'sdpa'"),
        ({"name": "me/mask"}, ValueError, "letters"),
        ({"name": 3}, TypeError, "int"),
        ({"mask": 3}, TypeError, "mask is int"),
        ({"mask": {"0": STAR}}, TypeError, "'0'"),
        ({"mask": {-1: STAR}}, ValueError, "-1"),
        ({"mask": {0: 3}}, TypeError, r"mask\[0\] is int"),
        ({"mask": "lokal(3)"}, ValueError, "lokal"),
        ({"mask": lambda q, kv: q >= kv}, TypeError, r"lambda.*\(q, kv\).*masks.custom\(predicate"),
    ],
)
def test_register_refuses(given, error, message):
    with pytest.raises(error, match=message):
        register(**given)


def test_layers_that_do_not_exist_and_wrong_functions():
    with pytest.raises(ValueError, match="layer 2.*config.num_hidden_layers=2"):
        outputs(make(LLAMA, register("own", {2: STAR})))
    with pytest.raises(TypeError, match="for LlamaAttention the function gave int"):
        outputs(make(LLAMA, register("own", lambda module: 3)))


def test_switching_a_model_to_and_fro():
    model = make(LLAMA, "eager")
    found = []
    for name in ("eager", register("block_sparse"), "sdpa", register("own", STAR)):
        model.set_attn_implementation(name)
        found.append(outputs(model))
    for a, b in itertools.pairwise(found[:3]):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(found[3], found[2], atol=1e-4)
