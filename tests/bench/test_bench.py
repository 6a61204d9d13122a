"""`nbllm bench` measures what it says, and notices wrong tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbllm import LLM, InvalidRequestError
from nbllm.bench import measure
from nbllm.bench import run as bench
from nbllm.bench.roofline import Ceilings, Costs, ideal_seconds
from nbllm.bench.workloads import SHAPES, WORKLOADS, Workload, make_workload, write_config
from nbllm.config import ModelConfig

MakeCheckpoint = Callable[..., tuple[Path, Any]]


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code, _, result = run_and_print(capsys, *arguments)
    return code, result


def run_and_print(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, list[str], dict[str, Any]]:
    """The exit status, the table, and the last line."""
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    code = bench.run(parser.parse_args([*arguments, "--device", "cpu", "--repeats", "1"]))
    *lines, last = capsys.readouterr().out.splitlines()
    return code, lines, json.loads(last)


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("Qwen3", head_dim=16)[0]


SMALL = ("--num-prompts", "3", "--input-len", "12", "--output-len", "6")


def test_the_last_line_reports_rates_check_and_environment(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run_bench(capsys, "--model", str(folder), "--dtype", "float32", *SMALL)
    assert code == 0
    (measured,) = result["workloads"]
    assert measured["prompt_tokens"] == 36
    assert measured["output_tokens"] == 18
    assert measured["tokens_per_s"] == pytest.approx(18 / measured["seconds"], rel=0.05)
    assert 0 < measured["ttft_s"]["mean"] <= measured["seconds"] * 2
    assert 0 < measured["of_roofline"] < 1 and 0 < measured["prefill_of_roofline"] < 1
    assert 0 < result["load_s"] <= result["import_to_first_token_s"]
    assert measured["check"] == {
        "against": "the same rows scored alone",
        "tokens": 18,
        "equal": 18,
        "mean_gap": 0.0,
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
    (measured,) = result["workloads"]
    assert measured["check"]["equal"] == measured["check"]["tokens"] == 18
    peer = measured["peers"]["transformers"]
    assert peer["equal_tokens"] == 18
    assert peer["ratio"]["tokens_per_s"] > 0


def test_several_workloads_with_sampling_make_one_table(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--temperature", "0.6", "--beside-python", "--max-model-len", "600")
    code, lines, result = run_and_print(
        capsys, "--model", str(folder), *SMALL, *options, "--workload", "nano", "frame"
    )
    assert code == 0
    assert [item["workload"] for item in result["workloads"]] == ["nano", "frame"]
    assert all(item["slowdown_beside_python"] > 0 for item in result["workloads"])
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split(":")[0] for row in rows] == ["| nano", "| frame"]
    assert "rows/s" in rows[1] and "tokens/s" in rows[0]
    assert all("| ok, " in row and "the same rows scored alone" in row for row in rows)


def test_peers_are_timed_without_sampling(folder: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(["--peer", "transformers", "--temperature", "1"])
    with pytest.raises(InvalidRequestError, match="without sampling"):
        bench.run(arguments)


def test_the_ideal_is_what_weights_and_pages_take_to_read(tmp_path: Path) -> None:
    """By hand: Qwen3-0.6B reads 1.19 GB of weights and 112 KiB for each token of the text."""
    config = ModelConfig.from_folder(write_config("qwen3-0.6b", tmp_path))
    costs = Costs.of(config, torch.bfloat16)
    weights = 28 * (1024 * (16 + 16) * 128 + 2048 * 1024 + 3 * 1024 * 3072)
    assert (costs.num_weights, costs.num_head_weights) == (weights, 151936 * 1024)
    assert costs.kv_bytes_per_token == 112 * 1024
    reads_only = Ceilings(bytes_per_s=1e12, flops_per_s=1e30)
    weight_bytes = 2 * (weights + 151936 * 1024)

    def ideal(prompts: list[list[int]], lens: list[int], max_num_seqs: int = 8) -> float:
        workload = Workload("by hand", prompts, lens)
        return ideal_seconds(workload, costs, reads_only, max_num_seqs=max_num_seqs) * 1e12

    assert ideal([[1, 2, 3]], [1]) == pytest.approx(weight_bytes)
    assert ideal([[1, 2, 3]], [3]) == pytest.approx(3 * weight_bytes + (4 + 5) * 112 * 1024)
    two = [[1, 2, 3], [4, 5]]
    assert ideal(two, [2, 2]) == pytest.approx(2 * weight_bytes + (4 + 3) * 112 * 1024)
    assert ideal(two, [2, 2], 1) == pytest.approx(3 * weight_bytes + (4 + 3) * 112 * 1024)
    shared = [[1, 2, 3], [1, 2, 4]]  # two tokens are read once for both
    assert ideal(shared, [2, 2]) == pytest.approx(2 * weight_bytes + (2 + 2 + 2) * 112 * 1024)
    computes_only = Ceilings(bytes_per_s=1e30, flops_per_s=1e12)
    workload = Workload("prefill", [[1, 2, 3, 4]], [1])
    flops = 2 * (4 * weights + 151936 * 1024) + 4 * 10 * 16 * 128 * 28
    assert ideal_seconds(workload, costs, computes_only, max_num_seqs=8) * 1e12 == pytest.approx(
        flops
    )


def test_a_wrong_token_fails_the_check(make_checkpoint: MakeCheckpoint) -> None:
    from nbllm.bench.peer import check_tokens

    folder, model = make_checkpoint("Qwen3", head_dim=16)
    workload = make_workload("batch", num_prompts=2, input_len=9, output_len=5, vocab_size=512)
    with LLM(folder, skip_tokenizer_init=True, device="cpu", dtype="float32") as llm:
        outputs = measure.generate(llm, workload)
        assert check_tokens(model, outputs)["ok"]
        assert measure.check_alone(llm, outputs)["ok"]
        right = outputs[1].outputs[0]
        wrong = [*right.token_ids[:3], (right.token_ids[3] + 1) % 512, right.token_ids[4]]
        outputs[1].outputs[0] = replace(right, token_ids=wrong)
        assert not check_tokens(model, outputs)["ok"]
        assert not measure.check_alone(llm, outputs)["ok"]


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
