"""Real models and data for demos and benchmarks, built from ordinary package downloads.

    python benchmarks/assets.py movies bbc            # into assets/
    python benchmarks/assets.py vit --into /some/dir

Each downloaded package and each product is checked against a sha256. A product is built aside and
renamed, so it is complete or absent; one that is there and unchanged is left alone.
The four sets of sentences are from Hutto & Gilbert, "VADER", ICWSM 2014: cite them when used.
The addresses are those that usaddress (MIT, Atlanta Journal Constitution and DataMade) learns from.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from asset_efficientnet import build_efficientnet
from asset_image import build_clipart, build_fashion
from asset_package import (
    BBC,
    CLIPART,
    EFFICIENTNET,
    FASHION,
    FOCUS,
    MANIFEST,
    SMOLLM2,
    USADDRESS,
    VADER,
    AssetError,
    check_hash,
    download_package,
    hash_path,
    list_hashes,
)  # fmt: skip
from asset_smollm2 import build_smollm2
from asset_text import build_addresses, build_bbc, build_sentences
from asset_vit import build_vit


class Asset(NamedTuple):
    """Describe an asset and the package that it is built from."""

    about: str
    package: str
    build: Callable[[Path, Path], None]  # build(downloaded package, product)
    product: str
    sha256: str | None  # None: the bytes depend on library versions, so a manifest is written
    needs: tuple[str, ...] = ()  # distributions that `build` imports


# fmt: off
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
    "editorials": Asset("5 190 sentences of editorials, neutral ones among them", VADER,
        partial(build_sentences, "nytEditorialSnippets", document=True, neutral=True),
        "editorials/editorials.csv",
        "65897997659ca37ce2da0322a14483000e33e825aeba3a505a79cbb7adeee2f8"),
    "bbc": Asset("2 225 news articles in five topics", BBC, build_bbc, "bbc",
        "d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8"),
    "addresses": Asset("1 513 postal addresses of the USA, every word tagged", USADDRESS,
        build_addresses, "addresses/addresses.jsonl",
        "859e89cee6df12e175248206653e1b56dabe0bb1464189f137eb3d22d0ad91d5"),
    "vit": Asset("a DINOv2-small image encoder, fine-tuned for saliency", FOCUS, build_vit,
        "vit-dinov2-small", None, ("onnx", "torch", "transformers", "safetensors")),
    "efficientnet": Asset("EfficientNet-Lite0, a convolutional image encoder", EFFICIENTNET,
        build_efficientnet, "efficientnet-lite0", None,
        ("timm", "torch", "torchvision", "safetensors")),
    "smollm2": Asset("SmolLM2-135M-Instruct, a decoder, from its 4-bit weights", SMOLLM2,
        build_smollm2, "smollm2", None, ("gguf", "torch", "transformers", "safetensors")),
    "fashion": Asset("60 000 + 10 000 grey 28x28 photographs of ten garments", FASHION,
        build_fashion, "fashion", None, ("pyarrow", "pillow")),
    "clipart": Asset("1 616 drawings in six categories, decompression bombs included", CLIPART,
        build_clipart, "clipart",
        "23d603ca3bc871fc34cb096af31bcfdc120368810a79f94104f92e43d776faee"),
}
# fmt: on


def is_installed(asset: Asset, product: Path) -> bool:
    """Return whether the product is complete and unchanged."""
    if asset.sha256:
        return product.exists() and hash_path(product) == asset.sha256
    manifest = product / MANIFEST
    return manifest.is_file() and manifest.read_text(encoding="utf-8") == list_hashes(product)


def install_asset(asset: Asset, into: Path, work: Path) -> None:
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
    package = download_package(asset.package, work)
    made, old, product = (root / asset.product for root in (work / "made", work / "old", into))
    made.parent.mkdir(parents=True, exist_ok=True)
    asset.build(package, made)
    if asset.sha256:
        check_hash(made, asset.sha256)
    else:
        (made / MANIFEST).write_text(list_hashes(made), encoding="utf-8")
    product.parent.mkdir(parents=True, exist_ok=True)
    if product.exists():  # damaged; a folder cannot be renamed onto one that holds files
        old.parent.mkdir(parents=True, exist_ok=True)
        product.rename(old)
    made.rename(product)


def build_all(names: Sequence[str], into: Path) -> None:
    """Build what is missing or damaged, with a line each; raise AssetError as `install` does."""
    missing = []
    for name in names:
        if is_installed(ASSETS[name], into / ASSETS[name].product):
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
                install_asset(ASSETS[name], into, Path(work))
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
        print(*(f"{name:12} {asset.about}" for name, asset in ASSETS.items()), sep="\n")
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
