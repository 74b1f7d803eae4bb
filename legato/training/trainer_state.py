"""The tensors of one SAE in training, on the disk: a folder that one rank writes, or several in blocks of latents, and
that any number of ranks opens.

The format is the safetensors one of torch.distributed.checkpoint: a block carries its place in the whole in its file's
header. Nothing is unpickled: the index of that package's own format is a pickle, and neither written nor read.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from legato.common import distributed
from legato.common.checksummed import write_tensors
from legato.sae.partition import Partition, Sharded
from legato.training.step import PER_LATENT


def write_trainer_state(
    folder: Path, tensors: Mapping[str, Tensor], partition: Partition, n_latents: int
) -> list[Path]:
    """Write what `SAETrainer.tensors` gives; the files that this rank wrote.

    All ranks that have a share call it. Raises OSError and SafetensorError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(partition, Sharded):
        return _write_blocks(folder, tensors, partition, n_latents)
    if partition.rank > 0:
        return []
    return [write_tensors(folder / "whole.safetensors", tensors)]


def _write_blocks(folder: Path, tensors: Mapping[str, Tensor], partition: Sharded, n_latents: int) -> list[Path]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    blocks = {name: _block(tensor, n_latents) if _divided(name) else tensor for name, tensor in tensors.items()}
    files = {name: number for number, name in enumerate(blocks, start=1)}  # a file each: one at a time is in memory
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        with distributed.rank_errors():
            dcp.save(blocks, storage_writer=writer)
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    return sorted(folder.glob(f"shard-{partition.rank + 1:05d}-*.safetensors"))


def read_trainer_state(folder: Path, partition: Partition, n_latents: int) -> dict[str, Tensor]:
    """Read what `write_trainer_state` was given, or this rank's share of it; the files are known to be sound."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader, held = HuggingFaceStorageReader(str(folder)), partition.local(n_latents)
    tensors: dict[str, Tensor] = {}
    into: dict[str, Tensor] = {}
    for name, stored in sorted(reader.read_metadata().state_dict_metadata.items()):
        assert isinstance(stored, TensorStorageMetadata), name
        in_blocks = isinstance(partition, Sharded) and _divided(name)
        size = (held.stop - held.start, *stored.size[1:]) if in_blocks else stored.size
        tensors[name] = torch.empty(size, dtype=stored.properties.dtype)
        into[name] = _block(tensors[name], n_latents) if in_blocks else tensors[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # every rank reads for itself
        dcp.load(into, storage_reader=reader, no_dist=True)
    return tensors


def _divided(name: str) -> bool:
    """Tell if a tensor named as in `SAETrainer.tensors` is divided over the ranks."""
    return name.rpartition(".")[2] in PER_LATENT


def _block(rows: Tensor, n_latents: int) -> Tensor:
    """A tensor with a row per latent, of which each rank has its own."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    whole = torch.empty(n_latents, *rows.shape[1:], device="meta")
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
