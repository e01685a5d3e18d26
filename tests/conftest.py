"""Make tiny random models, tokenizers and tables in memory: no network, no accelerator."""

import csv
import gc
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Beside another process of tests a second thread only stands in its way. Workers of pytest-xdist
# inherit what their parent has set, so that it is 1 for all.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from support.fresh_process import FreshProcess, start_server
from support.tiny import BAD, FILLER, GOOD, SPECIAL, save_tiny, tiny_config, tiny_tokenizer

from hftl.runtime.interruption import NOTICES

__all__ = ["BAD", "FILLER", "GOOD", "SPECIAL", "tiny_config", "tiny_tokenizer"]


def sentences(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Draw distinct sentences with the label that their words express."""
    draw = random.Random(seed)
    labels_by_text: dict[str, str] = {}
    while len(labels_by_text) < rows:
        label = ("negative", "positive")[len(labels_by_text) % 2]
        words = draw.sample(FILLER, 5) + draw.sample(GOOD if label == "positive" else BAD, 2)
        draw.shuffle(words)
        labels_by_text[" ".join(words)] = label
    return list(labels_by_text.items())


def write_csv(path: Path, header: list[str], rows: list[Any]) -> Path:
    """Write the rows as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)
    return path


RELOAD_SERVER = "HFTL_TEST_RELOAD_SERVER"
"""The variable with the address of the server that the workers of pytest-xdist share."""


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures of commands, of publishing and of the doctor.

    The parent of pytest-xdist's workers runs no tests: there the imports of torch would only delay
    the start of its workers. It starts the server of reloads for all of them.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        # Until the first test runs: imports and collection make a million objects that all stay.
        gc.disable()
        for name in ("support.command", "support.publishing", "support.examination"):
            config.pluginmanager.import_plugin(name)
    else:
        server = ExitStack()
        os.environ[RELOAD_SERVER] = server.enter_context(start_server())
        config.add_cleanup(server.close)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return the scheduler of `--dist loadfile`, with files that share fixtures on one worker."""
    from xdist.scheduler import LoadFileScheduling

    class SharedFixtures(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            group = next((names for names in ONE_WORKER if Path(file).stem in names), None)
            return file if group is None else group[0]

    return SharedFixtures(config, log)


ONE_WORKER = (
    # A run to push, a hub, and a process that pushes.
    ("test_canaries", "test_http_retry", "test_hub_errors", "test_pipeline_push", "test_push"),
    # Adapters of every kind, and the bases that they need.
    ("test_doctor", "test_doctor_base", "test_doctor_fix", "test_doctor_hostile",
     "test_doctor_settings"),
)  # fmt: skip
"""Files whose tests share fixtures that take seconds to make."""


@pytest.fixture(scope="module", autouse=True)
def _freeze_imported_objects() -> None:
    """Leave what the imports made out of garbage collections.

    Every training ends with accelerate's gc.collect(), which would walk through all objects of
    torch and transformers: 0.2 s each time.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def reload_server() -> Iterator[FreshProcess]:
    """Return a process that has imported the libraries of the reload check."""
    with ExitStack() as stack:
        address = os.environ.get(RELOAD_SERVER) or stack.enter_context(start_server())
        yield FreshProcess(address)


@pytest.fixture(scope="module")
def fast_reload(reload_server: FreshProcess) -> Iterator[None]:
    """Reload published folders in forks of the server, which saves seconds of imports each."""
    with reload_server.in_use():
        yield


@pytest.fixture(scope="module")
def fewer_folds() -> Iterator[None]:
    """Choose the penalty of probes on two folds in place of five, as test_probe.py does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hftl.analysis.probe.FOLDS", 2)
        yield


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Restore the handlers of notices, which the command line ignores at its end."""
    before = {number: signal.getsignal(number) for number in NOTICES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload as users do, in a process started for it alone."""
    monkeypatch.setattr("hftl.publish.reload_process.subprocess", subprocess)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write 160 labelled sentences."""
    return write_csv(tmp_path / "reviews.csv", ["text", "label"], sentences(160))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `tiny_model(architecture, masked_lm)`, which saves a checkpoint as `save_tiny`."""
    made: dict[tuple[str, bool], Path] = {}

    def make(model_type: str = "bert", masked_lm: bool = False) -> Path:
        if (model_type, masked_lm) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{model_type}-{'mlm' if masked_lm else 'base'}")
            made[model_type, masked_lm] = save_tiny(model_type, folder, masked_lm)
        return made[model_type, masked_lm]

    return make


@pytest.fixture(scope="session")
def bert(tiny_model: Callable[..., Path]) -> Path:
    """Save the tiny BERT of `AutoModel`."""
    return tiny_model("bert")


@pytest.fixture
def recipe_tree(table: Path, tiny_model: Callable[..., Path]) -> dict[str, Any]:
    """Return a small recipe of the tiny BERT and the 160 sentences."""
    return {
        "source": {"model": str(tiny_model())},
        "data": {"train": {"path": str(table)}, "max_length": 16},
        "finetune": {
            "pooling": "mean",
            "training": {"num_train_epochs": 2, "learning_rate": 5e-3, "bf16": False},
        },
        "measure": {
            "seeds": [0, 1],
            "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1},
        },
    }


@pytest.fixture
def recipe_file(recipe_tree: dict[str, Any], tmp_path: Path) -> Path:
    """Write the same recipe to a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_tree), encoding="utf-8")
    return path


def bench_of(recipe: Any) -> Any:
    """Build the context that a run of the recipe would have."""
    from hftl.data.prepare import prepare_data
    from hftl.finetune.build_context import build_context, infer_input_spec
    from hftl.models.source import find_source

    source = find_source(recipe.source)
    return build_context(
        recipe, source, prepare_data(recipe.data, infer_input_spec(source, str(recipe.data.task)))
    )


def make_image_recipe(folder: Path, model: Path, **data: Any) -> Any:
    """Return a recipe of a folder of pictures and an image model."""
    from hftl.config.recipe import Recipe

    return Recipe.parse(
        {"source": {"model": str(model)}, "data": {"train": {"path": str(folder)}, **data}}
    )


def pictures(folder: Path, each: int) -> Path:
    """Save a folder of noisy images, `light` and `dark`, all different."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for label, middle in (("light", 190), ("dark", 60)):
        (folder / label).mkdir(parents=True)
        for number in range(each):
            noise = draw.integers(-50, 50, (36, 40, 3))
            Image.fromarray((middle + noise).astype("uint8")).save(folder / label / f"{number}.png")
    return folder
