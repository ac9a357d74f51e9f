"""A file of embeddings: Parquet, a row for each, and in its metadata their provenance (what they were made of)."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from clipfh import UserError
from clipfh.storage import store
from clipfh.storage.store import Folder

PROVENANCE = "clipfh"


def write(file: Folder, rows: pa.Table, embedding: Tensor, provenance: str) -> None:
    """Write the file, whole or not at all.

    Args:
        file: the file; an existing one is replaced.
        rows: N rows that say what each embedding is of.
        embedding: (N, D) float32.
        provenance: what the embeddings were made of.
    """
    vectors = pa.FixedSizeListArray.from_arrays(embedding.numpy().ravel(), embedding.shape[1])
    table = rows.append_column("embedding", vectors).replace_schema_metadata({PROVENANCE: provenance})
    file.parent.make()
    file.write_table("", table, compression="none", use_dictionary=False)


def read_provenance(file: Folder) -> str | None:
    """The provenance of a file of embeddings; None where it is another kind of file. UserError: can't be read."""
    try:
        provenance = (store.open_parquet(file).schema_arrow.metadata or {}).get(PROVENANCE.encode())
    except pa.ArrowException as error:
        raise _unreadable(file, error) from error
    return provenance.decode() if provenance is not None else None


def read(file: Folder) -> tuple[pa.Table, Tensor]:
    """The rows, without their embeddings, and the embeddings (N, D). UserError: can't be read."""
    try:
        table = (pq.ParquetFile(file, memory_map=True) if file.is_local else store.open_parquet(file)).read()
    except pa.ArrowException as error:
        raise _unreadable(file, error) from error
    vectors = table["embedding"].combine_chunks()
    embedding = torch.from_numpy(vectors.flatten().to_numpy().reshape(len(vectors), -1).copy())
    return table.drop_columns("embedding"), embedding


def _unreadable(file: Folder, error: Exception) -> UserError:
    return UserError(f"{file}: can't be read as embeddings ({error}): name another file, or delete it and embed again")
