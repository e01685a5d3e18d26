"""Pictures as the encoder sees them: resized and cropped once, kept as bytes in one file."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from hftl.data.decode import content
from hftl.data.image import canvas, light, normaliser, target_size
from hftl.data.load import Row, read_table, table_folder
from hftl.data.pictures import opened
from hftl.data.text import Encoded, with_labels
from hftl.errors import DataError
from hftl.progress import open_bar
from hftl.record import fingerprint
from hftl.sections.data import Data

PIXELS = "pixels.npy"
KEYS = "keys.json"


@dataclass(frozen=True)
class ImageInputs:
    """What an encoder of images takes: pixels as the source's own processor makes them.

    Args:
        data: the recipe's section, where the pictures are found again.
        processor: the source's image processor, at the size asked.
        arguments: what the model's forward takes besides pixels.
        patch: the side of the encoder's patch, in pixels.
    """

    data: Data
    processor: Any
    arguments: dict[str, Any]
    patch: int
    _known: dict[str, np.ndarray] = field(default_factory=dict)
    _normalise: Callable[[Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_normalise", normaliser(self.processor))

    def encode(self, rows: list[Row]) -> list[Encoded]:
        """Each row's picture, resized and cropped: (3, height, width) uint8.

        Raises:
            DataError: if a picture that is not stored cannot be read any more.
        """
        missing = [row for row in rows if row.content[0] not in self._known]
        for row, found in self.made(missing, lambda image: canvas(self.processor, image)):
            self._known[row.content[0]] = found
        return [{"pixel_values": self._known[row.content[0]]} for row in rows]

    def known(self, name: str) -> np.ndarray:
        """The stored pixels of the picture of this hash: (3, height, width) uint8."""
        return self._known[name]

    def length(self, encoded: Encoded) -> int:
        """Patches of a picture: what its forward pass costs."""
        return (target_size(self.processor) // self.patch) ** 2

    def collate(self, rows: list[Encoded]) -> dict[str, Any]:
        """float32 pixels (batch, 3, height, width), normalised; labels as in `TextInputs`."""
        stacked = torch.stack([as_tensor(row["pixel_values"]) for row in rows])
        return with_labels({"pixel_values": self._normalise(stacked), **self.arguments}, rows)

    def outputs(self, values: Tensor, rows: list[Encoded]) -> list[Tensor]:
        """The values (batch, width) row by row, each (1, width)."""
        return list(values.split(1))

    def save(self, folder: Path) -> None:
        """Writes the processor, at the size asked."""
        self.processor.save_pretrained(folder)

    def facts(self, rows: list[Row]) -> dict[str, float]:
        """Median side in pixels, share of pictures enlarged, share of long narrow ones."""
        sizes = np.array([row.size for row in rows], dtype=float)
        side = target_size(self.processor)
        ratio = sizes.max(1) / sizes.min(1)
        return {
            "median_side": float(np.median(sizes.min(1))),
            "image_size": side,
            "enlarged": float(np.mean(sizes.max(1) < side)),
            "elongated": float(np.mean(ratio > 2)),
        }

    def originals(self, rows: list[Row]) -> list[Image]:
        """The pictures themselves, as they were decoded.

        Raises:
            DataError: if one cannot be read any more.
        """
        found = {row.content[0]: image for row, image in self.made(rows, lambda image: image)}
        return [found[row.content[0]] for row in rows]

    def use(self, folder: Path) -> None:
        """Takes the pixels that `write` left in a folder; they stay on the disk until read."""
        self._known.update(stored(folder))

    def made(self, rows: list[Row], work: Callable[[Image], Any]) -> Iterator[tuple[Row, Any]]:
        """What `work` makes of each row's picture, table by table.

        Raises:
            DataError: if a row's table no longer holds its picture at its place.
        """
        for name in sorted({row.table for row in rows}):
            table = getattr(self.data, name)
            wanted = {row.index: row for row in rows if row.table == name}
            _, raws = read_table(table, name, "image")
            raws = (raw for raw in raws if raw.index in wanted)
            folder = table_folder(table, name)
            found = opened(
                raws, table.image, folder, self.data.max_pixels,
                lambda image: (content(image), work(image)),
            )  # fmt: skip
            for raw, (seen, made) in found:
                row = wanted.pop(raw.index)
                if seen != row.content[0]:
                    raise DataError(f"{raw.where} is another picture now", "Put the data back")
                yield row, made
            if wanted:
                gone = next(iter(wanted.values()))
                raise DataError(f"{gone.where} is no longer there", "Put the data back")


def depends_on(inputs: ImageInputs, rows: Iterable[Row]) -> dict[str, Any]:
    """What a folder of pixels depends on: the pictures, and how they are resized and cropped."""
    return {
        "pictures": fingerprint(sorted({row.content[0] for row in rows})),
        "processor": fingerprint(inputs.processor.to_dict()),
    }


def write(inputs: ImageInputs, rows: list[Row], folder: Path) -> None:
    """Resizes every row's picture once and writes them as one array of bytes.

    Raises:
        DataError: if a picture cannot be read any more.
    """
    distinct = list({row.content[0]: row for row in rows}.values())
    side = target_size(inputs.processor)
    made = np.lib.format.open_memmap(
        folder / PIXELS, "w+", dtype=np.uint8, shape=(len(distinct), 3, side, side)
    )
    places = {row.content[0]: number for number, row in enumerate(distinct)}
    with open_bar("pictures", len(distinct)) as advance:
        found = inputs.made(distinct, lambda image: canvas(inputs.processor, image))
        for number, (row, pixels) in enumerate(found, 1):
            made[places[row.content[0]]] = pixels
            advance(number)
    made.flush()
    (folder / KEYS).write_text(json.dumps(list(places)), encoding="utf-8")


def stored(folder: Path) -> dict[str, np.ndarray]:
    """What `write` left in a folder, by the pictures' hashes; it stays on the disk until read."""
    keys = json.loads((folder / KEYS).read_text(encoding="utf-8"))
    return dict(zip(keys, np.load(folder / PIXELS, mmap_mode="r"), strict=True))


def augment(encoded: Encoded, seed: int, epoch: int, key: bytes) -> Encoded:
    """The same picture, a little different in every epoch: a function of its arguments alone."""
    return encoded | {"pixel_values": light(as_tensor(encoded["pixel_values"]), seed, epoch, key)}


def as_tensor(pixels: np.ndarray | Tensor) -> Tensor:
    """The pixels as a tensor; a copy where they are the store's, which is read only."""
    return pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
