"""`nbllm bench` measures what it says, and notices wrong tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbllm import LLM
from nbllm.bench import run as bench
from nbllm.bench.workloads import SHAPES, WORKLOADS, make_workload, write_config
from nbllm.config import ModelConfig

MakeCheckpoint = Callable[..., tuple[Path, Any]]


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    code = bench.run(parser.parse_args([*arguments, "--device", "cpu", "--repeats", "1"]))
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("Qwen3", head_dim=16)[0]


SMALL = ("--num-prompts", "3", "--input-len", "12", "--output-len", "6")


def test_the_last_line_reports_rates_check_and_environment(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run_bench(capsys, "--model", str(folder), "--dtype", "float32", *SMALL)
    assert code == 0
    assert result["prompt_tokens"] == 36
    assert result["output_tokens"] == 18
    assert result["tokens_per_s"] == pytest.approx(18 / result["seconds"], rel=0.05)
    assert 0 < result["ttft_s"]["mean"] <= result["seconds"] * 2
    assert 0 < result["load_s"] <= result["import_to_first_token_s"]
    assert result["check"] == {
        "against": "the same rows alone",
        "rows": 3,
        "equal": 3,
        "widest_gap": 0.0,
        "ok": True,
    }
    assert result["versions"]["torch"]


def test_the_peer_agrees_on_every_token_and_is_timed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(folder), "--dtype", "float32", "--peer", "transformers")
    code, result = run_bench(capsys, *arguments, *SMALL)
    assert code == 0
    assert result["check"]["equal"] == result["check"]["tokens"] == 18
    peer = result["peers"]["transformers"]
    assert peer["equal_tokens"] == 18
    assert peer["ratio"]["tokens_per_s"] > 0


def test_a_wrong_token_fails_the_check(make_checkpoint: MakeCheckpoint) -> None:
    from nbllm.bench.peer import check_tokens

    folder, model = make_checkpoint("Qwen3", head_dim=16)
    workload = make_workload("batch", num_prompts=2, input_len=9, output_len=5, vocab_size=512)
    with LLM(folder, skip_tokenizer_init=True, device="cpu", dtype="float32") as llm:
        outputs = bench._generate(llm, workload)
        assert check_tokens(model, outputs)["ok"]
        assert bench._check_alone(llm, outputs)["ok"]
        right = outputs[1].outputs[0]
        wrong = [*right.token_ids[:3], (right.token_ids[3] + 1) % 512, right.token_ids[4]]
        outputs[1].outputs[0] = replace(right, token_ids=wrong)
        assert not check_tokens(model, outputs)["ok"]
        assert not bench._check_alone(llm, outputs)["ok"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_every_time_and_fits_its_vocabulary(name: str) -> None:
    first = make_workload(name, num_prompts=5, input_len=120, output_len=110, vocab_size=300)
    assert first == make_workload(
        name, num_prompts=5, input_len=120, output_len=110, vocab_size=300
    )
    assert len(first.prompts) == len(first.output_lens) == 5
    assert max(token for prompt in first.prompts for token in prompt) < 300


def test_rows_of_the_frame_share_their_first_tokens() -> None:
    prompts = make_workload("frame", num_prompts=3).prompts
    assert prompts[0][:512] == prompts[1][:512] == prompts[2][:512]
    assert prompts[0][512:] != prompts[1][512:]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_are_configurations_that_the_engine_reads(shape: str, tmp_path: Path) -> None:
    config = ModelConfig.from_folder(write_config(shape, tmp_path / shape))
    assert config.num_layers == SHAPES[shape]["num_hidden_layers"]


def test_an_unknown_workload_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="single"):
        make_workload("marathon")
