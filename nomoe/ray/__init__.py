"""Corpora on a cluster, with Ray Data (`pip install 'nomoe[ray]'`).

`embed_dataset` embeds files into a folder of shards, the same as `nomoe.embed_corpus` writes on one
machine and with the same manifest, so that either goes on where the other stopped. `EmbedBatch` and
`TokenizeBatch` are for `Dataset.map_batches` in a pipeline of one's own:

    dataset.map_batches(
        nomoe.ray.EmbedBatch,
        fn_constructor_kwargs={"model": "/shared/nomic-embed-text-v2-moe"},
        compute=ray.data.ActorPoolStrategy(size=4),
        num_gpus=1,
        batch_size=4096,
    )
"""

from __future__ import annotations

from .batches import TOKENS_COLUMN, EmbedBatch, TokenizeBatch
from .dataset import embed_dataset

__all__ = ["TOKENS_COLUMN", "EmbedBatch", "TokenizeBatch", "embed_dataset"]
