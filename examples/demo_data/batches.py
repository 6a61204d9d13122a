"""From documents to packed rows of token ids, on all cores, the same for the same seed."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from demo_data import corpus

_SHARD = 50_000  # documents; fixed, so that the data don't depend on the number of cores


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows of whole documents, one after the other.

    Attributes:
        token_ids: [rows, length] uint16, 0 where a row is not full.
        trained: [rows, length] bool: the model has to predict this token.
        starts: [rows, length] bool: a document (or the unused rest of a row) begins here.
    """

    token_ids: npt.NDArray[np.uint16]
    trained: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.bool_]


def pack_documents(
    tokenizer_file: Path, *, seed: int, num_documents: int, length: int, num_workers: int
) -> Packed:
    """Write, tokenize and pack documents."""
    shards = range((num_documents + _SHARD - 1) // _SHARD)
    make = partial(_pack_shard, str(tokenizer_file), seed, length)
    with ProcessPoolExecutor(num_workers) as pool:
        packed = list(pool.map(make, shards))
    return Packed(
        np.concatenate([part.token_ids for part in packed]),
        np.concatenate([part.trained for part in packed]),
        np.concatenate([part.starts for part in packed]),
    )


def _pack_shard(tokenizer_file: str, seed: int, length: int, shard: int) -> Packed:
    rng = Random(f"{seed}/{shard}")
    tokenizer = Tokenizer.from_file(tokenizer_file)
    documents = [corpus.document(rng) for _ in range(_SHARD)]
    # Prompt and answer are encoded apart, because in use the prompt's tokens are fixed first.
    texts = [part for turns in documents for turn in turns for part in (turn.prompt, turn.answer)]
    encoded = iter(tokenizer.encode_batch_fast(texts))
    pieces = []
    for turns in documents:
        ids: list[int] = []
        trained: list[bool] = []
        for _ in turns:
            prompt, answer = next(encoded).ids, next(encoded).ids
            ids += prompt + answer
            trained += [False] * len(prompt) + [True] * len(answer)
        if ids:
            pieces.append((ids[:length], trained[:length]))
    return _fill(pieces, length)


def _fill(pieces: list[tuple[list[int], list[bool]]], length: int) -> Packed:
    rows: list[list[tuple[list[int], list[bool]]]] = [[]]
    used = 0
    for piece in pieces:
        if used + len(piece[0]) > length:
            rows.append([])
            used = 0
        rows[-1].append(piece)
        used += len(piece[0])
    shape = (len(rows), length)
    packed = Packed(np.zeros(shape, np.uint16), np.zeros(shape, bool), np.zeros(shape, bool))
    for row, content in enumerate(rows):
        column = 0
        for ids, trained in content:
            end = column + len(ids)
            packed.token_ids[row, column:end] = ids
            packed.trained[row, column:end] = trained
            packed.starts[row, column] = True
            packed.trained[row, column] = False  # nothing comes before it
            column = end
        if column < length:
            packed.starts[row, column] = True
    return packed
