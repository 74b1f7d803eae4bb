"""Files of the section redundancy.

redundancy/<arm>.parquet, a row per pair, strongest first inside each class. Columns:
  latent_a, latent_b      the two latents; of a lead_lag pair, a comes first
  class                   duplicate, position_split, lead_lag or antipodal
  lag                     tokens from a to b: 0, for lead_lag the lag of the largest excess
  c, c_lag0               correlation of f_a(t) and f_b(t + lag); at lag 0
  null, excess            expectation of c when rows are shuffled at fixed position; c less that
  q                       Benjamini and Hochberg's q value of the pair's test (pairs.py); null for antipodal
  cosine                  of the two decoder directions
  overlap                 share of their firings that lie in common position bins, 1 for equal position profiles
  density_a, density_b    firing rates
  group                   redundant group, 0 the largest; null for lead_lag and antipodal pairs
  examples                three contexts; a fires at tokens marked 1, b at tokens marked 2. Strongest pairs only
redundancy/<arm>.npz: the clustered heat map, `latents`, `lags`, `c` and `excess` (see examples.heat_map).
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from legato.evaluation.redundancy.pairs import Redundancy

SCHEMA = pa.schema(
    [
        ("latent_a", pa.int32()),
        ("latent_b", pa.int32()),
        ("class", pa.string()),
        ("lag", pa.int32()),
        *((name, pa.float32()) for name in ("c", "c_lag0", "null", "excess", "q", "cosine", "overlap")),
        ("density_a", pa.float32()),
        ("density_b", pa.float32()),
        ("group", pa.int32()),
        ("examples", pa.list_(pa.string())),
    ]
)


def write_redundancy(folder: str | Path, name: str, result: Redundancy) -> None:
    """Write <name>.parquet and <name>.npz into a folder, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    group_R = result.pairs["group"]
    columns = {**result.pairs, "group": np.where(group_R < 0, np.nan, group_R)}
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in SCHEMA]  # NaN is null
    pq.write_table(pa.table(arrays, schema=SCHEMA), folder / f"{name}.parquet", compression="zstd")
    np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **result.arrays)
