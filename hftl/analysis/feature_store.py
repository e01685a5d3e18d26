"""Store the features of rows at every layer and pooling on the disk, each row computed once.

A folder holds the features of one encoder under one encoding, addressed by their content; each
pass adds one part after the other, which is complete or absent. Commands that read the same rows
share them, whatever they compute.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from pydantic import JsonValue

from hftl.analysis.facts import Provenance
from hftl.data.image_inputs import ImageInputs
from hftl.data.rows import Row
from hftl.data.splits import hash_text
from hftl.finetune.context import ExperimentContext
from hftl.models.architecture_spec import TOKEN_CLASSIFICATION
from hftl.models.encoders import build_on_meta, get_encoder_class, get_stock_encoder, get_task_class
from hftl.models.heads import LoadedModel, build_model, get_source_pooling, has_head_bias
from hftl.models.layer_features import TOKEN_POOLING, LayerSite, compute_layer_features
from hftl.runtime.progress import open_bar
from hftl.runtime.row_store import RowStore, evict_unused

PART_ROWS = 1024
"""Rows whose features are held in memory at once, and lost if a pass is interrupted."""
LAYOUT = 3
"""Raised when the same encoder and rows give other features, or they are stored otherwise."""


class FeatureStore:
    """Return features of rows at any layer; those not yet stored are computed, in one pass.

    Args:
        context: the encoder and how it takes rows.
        root: where the features of all encoders are.
    """

    def __init__(self, context: ExperimentContext, root: Path) -> None:
        self._context = context
        self._store = RowStore(root, build_store_key(context))
        self._columns: dict[LayerSite, slice] = {}
        self._built: LoadedModel | None = None
        self._read_columns()

    @property
    def folder(self) -> Path:
        """Return where the features of this encoder are."""
        return self._store.folder

    def compute(self, rows: list[Row]) -> int:
        """Compute the features of rows that are not stored, in one pass, a part at a time.

        Returns:
            How many rows have run.
        """
        contents = {_hash_content(row): row for row in rows}
        if all(key in self._store for key in contents):
            return 0
        name, store = self._context.source.name, self._store
        with store.lock():
            pairs = [(key, row) for key, row in contents.items() if key not in store]
            with open_bar(f"features of {name}", len(pairs)) as advance:
                for start in range(0, len(pairs), PART_ROWS):
                    self._write_part(pairs[start : start + PART_ROWS])
                    advance(min(len(pairs), start + PART_ROWS))
        evict_unused(store.root, [store.folder])
        return len(pairs)

    @property
    def sites(self) -> list[LayerSite]:
        """Return every site of rows that are stored and a head may read, from bottom to top."""
        return sorted(filter(self._is_readable, self._columns))

    def _is_readable(self, site: LayerSite) -> bool:
        """Return whether a head trains there: one of targets needs a bias."""
        context = self._context
        return context.prepared.task != "regression" or has_head_bias(
            context.source, "regression", site.pooling
        )

    @property
    def layers(self) -> int:
        """Return the number of the last layer."""
        return max(site.layer for site in self._columns)

    def count_parameters(self) -> int:
        """Return the parameters of the encoder, counted without its weights where none ran."""
        if self._built is not None:
            return sum(tensor.numel() for tensor in self._built.encoder.parameters())
        source = self._context.source
        kind = get_task_class(source.config, self._context.prepared.task)
        model = build_on_meta(kind or get_encoder_class(source.config), source.config)
        encoder = get_stock_encoder(model, source.architecture_spec)
        return sum(tensor.numel() for tensor in encoder.parameters())

    def find_site(self, pooling: str) -> LayerSite | None:
        """Return the site that a head of this pooling reads; None where its input is not stored.

        The input of a stock class whose pooler is new differs by seed.
        """
        if self._context.prepared.task == "token-classification":
            return LayerSite(self.layers, TOKEN_POOLING)
        site = LayerSite(self.layers, pooling)
        return site if site in self.sites else None

    def get(self, rows: list[Row], site: LayerSite) -> np.ndarray:
        """Return the features at a site, (outputs of all rows, width) float32, row after row."""
        self.compute(rows)
        return self._store.gather([_hash_content(row) for row in rows], self._columns[site])

    def iterate_sites(self, rows: list[Row]) -> Iterator[tuple[LayerSite, np.ndarray]]:
        """Yield every site and the features there, as `get` returns them."""
        self.compute(rows)
        keys = [_hash_content(row) for row in rows]
        for site in self.sites:
            yield site, self._store.gather(keys, self._columns[site])

    def _build_model(self) -> LoadedModel:
        """Return the stock class, where there is one; of texts that of classes, whatever is asked
        of them.

        A class of targets may be one that hftl does not train, and of the same encoder.
        """
        context = self._context
        words = context.prepared.task == TOKEN_CLASSIFICATION
        task = TOKEN_CLASSIFICATION if words else "classification"
        spec = context.source.architecture_spec
        is_image = spec.modality == "image" and not spec.reads_prompt
        pooling = get_source_pooling(context.source) if is_image else "native"
        return build_model(
            context.source, task, pooling, context.num_outputs, context.prepared.names, 0
        )

    def _write_part(self, pairs: list[tuple[bytes, Row]]) -> None:
        context = self._context
        if self._built is None:
            self._built = self._build_model()
            self._built.model.to(context.device)
        encoded = context.encode_rows([row for _, row in pairs])
        widths, features = compute_layer_features(
            self._built, encoded, context.inputs, context.device
        )
        sites: list[JsonValue] = [[*site, width] for site, width in widths.items()]
        with self._store.write_part(sites) as add:
            for (key, _), values in zip(pairs, features, strict=True):
                add(key, values)
        self._read_columns()

    def _read_columns(self) -> None:
        """Read which columns hold which site."""
        start, sites = 0, cast("list[tuple[int, str, int]] | None", self._store.details)
        for layer, pooling, width in sites or ():
            self._columns[LayerSite(layer, pooling)] = slice(start, start + width)
            start += width


def build_store_key(context: ExperimentContext) -> dict[str, JsonValue]:
    """Return all that features depend on but the rows: weights, config, encoding, precision."""
    inputs = context.inputs
    return {
        "weights": context.weights_hash,
        "config": context.config_hash,
        "preprocessing": context.preprocessing_hash,
        "max_length": None if isinstance(inputs, ImageInputs) else inputs.max_length,
        "words": context.prepared.task == "token-classification",
        "precision": "float32",
        "layout": LAYOUT,
    }


def describe_provenance(
    context: ExperimentContext, pooling: str, seeds: Sequence[int]
) -> Provenance:
    """Return what an analysis of a context's rows was computed from."""
    inputs = context.inputs
    return Provenance(
        weights=context.weights_hash,
        config=context.config_hash,
        preprocessing=context.preprocessing_hash,
        max_length=None if isinstance(inputs, ImageInputs) else inputs.max_length,
        pooling=pooling,
        data=context.prepared.facts.fingerprint,
        seeds=[*seeds],
    )


def _hash_content(row: Row) -> bytes:
    """Return the address of a row, 16 bytes: its texts, words or pixels, and not its label."""
    return hash_text("\x1f".join(row.content))
