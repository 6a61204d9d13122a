"""OPT and GPT-2 give the tokens that transformers gives, from old and new checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nbllm import LLM, InvalidRequestError, PromptTooLongError, SamplingParams

OPT = {"ffn_dim": 96, "init_std": 0.2, "max_position_embeddings": 128}
EAGER = {"attn_implementation": "eager"}  # transformers 4 heeds the scales only there
GPT2 = {"n_inner": 96, "max_position_embeddings": 128}

# One line each: test id, class prefix in transformers, configuration.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("opt", "OPT", OPT | {"tie_word_embeddings": True}),
    ("opt-untied", "OPT", OPT),
    ("opt-350m", "OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt-no-bias", "OPT", OPT | {"enable_bias": False}),
    ("opt-bare-norms", "OPT", OPT | {"layer_norm_elementwise_affine": False}),
    ("opt-old", "OPT", OPT | {"_remove_final_layer_norm": True, "activation_function": "gelu"}),
    ("gpt2", "GPT2", GPT2 | {"tie_word_embeddings": True}),
    ("gpt2-untied", "GPT2", GPT2 | {"activation_function": "relu"}),
    ("gpt2-scales", "GPT2", GPT2 | EAGER | {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2-no-scale", "GPT2", GPT2 | EAGER | {"scale_attn_weights": False}),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


@pytest.fixture
def options(device: str) -> dict[str, Any]:
    return {"skip_tokenizer_init": True, "dtype": "float32", "device": device}


def random_prompts(lens: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 512, (n,), generator=generator).tolist() for n in lens]


@pytest.mark.parametrize(("name", "prefix", "config"), CASES, ids=[case[0] for case in CASES])
def test_greedy_tokens_equal_those_of_transformers(
    make_checkpoint: Callable[..., Any],
    check_greedy_tokens: Callable[..., None],
    name: str,
    prefix: str,
    config: dict[str, Any],
) -> None:
    if name == "opt-bare-norms" and transformers.__version__ < "5":
        pytest.skip("transformers 4 can't build it")
    folder, model = make_checkpoint(prefix, **config)
    check_greedy_tokens(folder, model)


@pytest.mark.parametrize(("prefix", "config"), [("OPT", OPT), ("GPT2", GPT2)])
def test_preempted_sequences_come_to_the_same_tokens(
    make_checkpoint: Callable[..., Any],
    generate_greedily: Callable[..., list[int]],
    options: dict[str, Any],
    prefix: str,
    config: dict[str, Any],
) -> None:
    folder, model = make_checkpoint(prefix, **config)
    prompts = random_prompts((40,) * 6, seed=2)
    with LLM(folder, block_size=8, num_gpu_blocks_override=16, max_model_len=96, **options) as llm:
        llm._thread._engine.check_integrity = True
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.get_metrics()["num_preemptions"] > 0
    references = [generate_greedily(model, prompt) for prompt in prompts]
    assert [o.outputs[0].token_ids for o in outputs] == references


@pytest.mark.parametrize(("prefix", "config"), [("OPT", OPT), ("GPT2", GPT2)])
def test_the_last_position_can_be_used_and_not_more(
    make_checkpoint: Callable[..., Any],
    generate_greedily: Callable[..., list[int]],
    options: dict[str, Any],
    prefix: str,
    config: dict[str, Any],
) -> None:
    folder, model = make_checkpoint(prefix, **config)
    [prompt] = random_prompts((120,))
    with LLM(folder, **options) as llm:
        assert llm.config.max_model_len == 128
        with pytest.warns(UserWarning, match="max_model_len"):
            output = llm.generate(prompt, GREEDY)[0].outputs[0]
        assert output.token_ids == generate_greedily(model, prompt, 8)
        assert output.finish_reason == "length"
        with pytest.raises(PromptTooLongError):
            llm.generate(prompt + prompt[:8], GREEDY)
    with pytest.raises(InvalidRequestError, match="learned positions for 128 tokens") as info:
        LLM(folder, max_model_len=129, **options)
    assert info.value.parameter == "max_model_len"


def rewrite(folder: Path, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a checkpoint with other tensor names."""
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(change(load_file(folder / "model.safetensors")), target / "model.safetensors")
    return target


def test_names_of_the_original_opt_checkpoint_are_read(
    make_checkpoint: Callable[..., Any],
    generate_greedily: Callable[..., list[int]],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder, model = make_checkpoint("OPT", **OPT, tie_word_embeddings=True)

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        assert all(name.startswith("model.decoder.") for name in tensors)
        renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        embedding = renamed["decoder.embed_tokens.weight"]
        return renamed | {"lm_head.weight": embedding.clone()}  # tied, and stored all the same

    [prompt] = random_prompts((20,))
    with LLM(rewrite(folder, tmp_path, change), **options) as llm:
        output = llm.generate(prompt, GREEDY)[0].outputs[0]
    assert output.token_ids == generate_greedily(model, prompt)


def test_names_and_mask_buffers_of_the_original_gpt2_checkpoint_are_read(
    make_checkpoint: Callable[..., Any],
    generate_greedily: Callable[..., list[int]],
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder, model = make_checkpoint("GPT2", **GPT2, tie_word_embeddings=True)

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        assert all(name.startswith("transformer.") for name in tensors)
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        for layer in range(3):
            mask = torch.ones(1, 1, 128, 128).tril()
            renamed[f"h.{layer}.attn.bias"] = mask
            renamed[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return renamed

    [prompt] = random_prompts((20,))
    with LLM(rewrite(folder, tmp_path, change), **options) as llm:
        output = llm.generate(prompt, GREEDY)[0].outputs[0]
    assert output.token_ids == generate_greedily(model, prompt)


@pytest.mark.parametrize("name", ["opt-350m", "gpt2"])
def test_logprobs_equal_those_of_transformers_and_do_not_depend_on_the_batch(
    make_checkpoint: Callable[..., Any], options: dict[str, Any], name: str
) -> None:
    [(prefix, config)] = [case[1:] for case in CASES if case[0] == name]
    folder, model = make_checkpoint(prefix, **config)
    prompts = random_prompts((9, 30, 17, 64))
    params = GREEDY.clone()
    params.logprobs, params.prompt_logprobs = 1, 1
    with LLM(folder, batch_invariant=True, max_num_batched_tokens=64, **options) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        for prompt, output in zip(prompts, together, strict=True):
            alone = llm.generate(prompt, params)[0]
            assert alone.outputs[0].logprobs == output.outputs[0].logprobs
            assert alone.prompt_logprobs == output.prompt_logprobs
            text = prompt + output.outputs[0].token_ids
            with torch.inference_mode():
                expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
            entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            got = [entry[token].logprob for entry, token in zip(entries, text[1:], strict=True)]
            torch.testing.assert_close(
                torch.tensor(got),
                expected[torch.arange(len(text) - 1), text[1:]],
                rtol=0,
                atol=1e-4,
            )
