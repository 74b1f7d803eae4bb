"""The feature table: one row per latent, written as features/<arm>.parquet.

Columns. Values that are undefined for a latent (it never fires, or never stops firing) are null.
  latent                          index in the dictionary
  density                         firing rate over valid positions
  mean_activation                 mean code where it fires, rescaled by the decoder norm
  token_mi, token_mi_share        information of firing and the current token's id (nats), Miller-Madow corrected; the
                                  same over the entropy of firing
  token_mi_adjusted               that share beyond chance: 0 for firings shuffled over the text, 1 where the token
                                  decides. Miller-Madow removes little of the bias of rare latents: compare by this
  top_token, top_token2, top_token3, top_token_share
                                  ids of the tokens it fires on most, and the share of its firings on the first
  burstiness                      (sigma - mu) / (sigma + mu) of the gaps between its firings inside a document;
                                  followed by _within_null (firings shuffled inside each document), _excess_within
  ac{lag}, kappa{lag}             autocorrelation of the code, of its on/off indicator, at a lag in tokens;
                                  followed by _within_null, _cross_null, _excess_within, _excess_cross
  half_life, half_life_censored   tokens until the autocorrelation falls below 1/2; True: not within the largest lag
  run_length_ratio                mean run of consecutive firing over its value for independent firing
  switching_ratio                 switches per token over their value for independent firing
  document_eta2                   share of variance between documents, bias-corrected
  eta2, mi                        share of variance explained by position; information of firing and position (nats)
  rate_position0, rate_position1  firing rate at the first two positions of the context
  offset_jaccard                  Jaccard index of the tokens it fires on before and after the largest shift of the
                                  offset test (shift_test.py); null where it fires on neither. Only for compared arms
  feature_density, consistent_activation_heuristic, encoder_bias, encoder_norm, encoder_decoder_cosine_sim,
  max_decoder_cosine_sim, max_encoder_cosine_sim
                                  SAEBench's featurewise statistics, in its definitions
  cluster, cluster_name, map_x, map_y
                                  specialisation (kinds.py): its cluster and place on the map; null where it fires too
                                  rarely. Only for compared arms
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from legato.evaluation.consistency.persistence import consistency_features
from legato.evaluation.latents.burstiness import GapSums, burstiness_features
from legato.evaluation.latents.tokens import TokenCounts, token_features
from legato.evaluation.position.attachment import position_features
from legato.evaluation.sums.accumulators import CodeSums, firing_rate

INTEGERS = ("top_token", "top_token2", "top_token3", "cluster")  # float64 in memory, for NaN; int32 in the table


def code_features(sums: CodeSums, tokens: TokenCounts, gaps: GapSums) -> dict[str, np.ndarray]:
    """Compute the columns that need only codes and tokens; float64, NaN where undefined."""
    count_F = sums.firing.total_F
    mean_F = np.divide(sums.value.total_F, count_F, out=np.full(count_F.size, np.nan), where=count_F > 0)
    return {
        "latent": np.arange(sums.n_latents),
        "density": firing_rate(sums),
        "mean_activation": mean_F,
        **consistency_features(sums),
        **position_features(sums),
        **token_features(tokens),
        **burstiness_features(gaps),
    }


def write_features(path: str | Path, features: Mapping[str, np.ndarray]) -> None:
    """Write the table as parquet: integers as int32, flags as bool, names as strings, the rest as float32.

    NaN and None are null.
    """
    columns = {}
    for name, values_F in features.items():
        if values_F.dtype == np.bool_ or values_F.dtype == object:
            columns[name] = pa.array(values_F)
        elif name in INTEGERS:
            columns[name] = pa.array(values_F, pa.int32(), from_pandas=True)
        elif np.issubdtype(values_F.dtype, np.integer):
            columns[name] = pa.array(values_F.astype(np.int32))
        else:
            columns[name] = pa.array(values_F.astype(np.float32), from_pandas=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_features(path: str | Path) -> dict[str, np.ndarray]:
    """Read the table as written, nulls as NaN, in names as None."""
    table = pq.read_table(path)
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
