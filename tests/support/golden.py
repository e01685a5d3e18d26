"""Run three recipes and write the hashes of what they leave, to compare before and after a change.

    python -m tests.support.golden FOLDER                    # runs; writes FOLDER/golden.json
    python -m tests.support.golden FOLDER --against OTHER    # and names what differs from OTHER

The hashes hold for one machine and one set of packages: a change that should alter nothing a user
sees is checked by a run before it and one after it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))

from conftest import pictures, sentences, write_csv  # noqa: E402
from support.tiny import save_tiny  # noqa: E402

DEMO = "demo"
VARYING = ("environment", "timings")
COMMANDS = ("", "run", "init", "check", "adapt", "finetune", "measure", "predict", "card",
            "publish", "doctor", "compare", "schema")  # fmt: skip


def write_recipes(folder: Path) -> dict[str, Path]:
    """Write a tiny recipe of texts and one of pictures, each through every phase."""
    save_tiny("bert", folder / "bert", masked=True)
    save_tiny("vit_mae", folder / "vit_mae")
    write_csv(folder / "reviews.csv", ["text", "label"], sentences(160))
    write_csv(folder / "general.csv", ["text", "label"], sentences(80, seed=9))
    pictures(folder / "pictures", 40)
    training = {"num_train_epochs": 1, "learning_rate": 5e-3, "bf16": False}
    shared = {
        "retain": {"kl": {"weight": 0.3}},
        "measure": {
            "seeds": [0, 1], "arms": ["scratch", "head", "gradual", "source"],
            "scratch": {"learning_rates": [1e-3, 3e-3], "epochs_factor": 1},
        },
    }  # fmt: skip
    adapt = {"method": "lora", "lora": {"r": 2}, "training": training}
    text = {
        "source": {"model": "bert", "published_as": "somebody/tiny-bert", "revision": "0" * 40},
        "data": {"train": {"path": "reviews.csv"}, "general": {"path": "general.csv"},
                 "max_length": 16},
        "adapt": {"objective": "mlm", **adapt},
        "finetune": {"pooling": "mean", "lora": {"r": 2}, "training": training},
    }  # fmt: skip
    image = {
        "source": {"model": "vit_mae", "published_as": "somebody/tiny-vit", "revision": "0" * 40},
        "data": {"train": {"path": "pictures"}},
        "adapt": {"objective": "mae", **adapt},
        "finetune": {"strategy": "partial", "blocks": 1, "training": training},
    }
    paths = {}
    for name, tree in (("text", text), ("image", image)):
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(tree | shared), encoding="utf-8")
    return paths


def run(folder: Path, *words: str) -> str:
    """Run the command line in a folder and return its output."""
    command = [sys.executable, "-m", "hftl", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 9):
        raise SystemExit(f"{' '.join(words)} exited with {done.returncode}: {done.stderr}")
    return done.stdout


def collect_hashes(name: str, output: Path) -> dict[str, str]:
    """Return the hash of every file of a run that two identical runs share."""
    hashes = {}
    kinds = ("*.parquet", "*.safetensors", "README.md", "adapter_config.json", "config.json")
    for path in sorted(path for kind in kinds for path in output.rglob(kind)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        hashes[f"{name}/{path.relative_to(output)}"] = digest
    record: dict[str, Any] = json.loads((output / "record.json").read_text("utf-8"))
    shared = {key: value for key, value in record.items() if key not in VARYING}
    for key, value in shared.items():
        text = json.dumps(value, sort_keys=True)
        hashes[f"{name}/record.json/{key}"] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def make_golden(folder: Path, demo: bool) -> dict[str, str]:
    """Run everything below a folder and return the hashes by file, and by key of the record."""
    folder.mkdir(parents=True, exist_ok=True)
    recipes = write_recipes(folder)
    hashes = {}
    for command in COMMANDS:
        text = run(folder, *command.split(), "--help")
        hashes[f"help/{command or 'hftl'}"] = hashlib.sha256(text.encode()).hexdigest()
    if demo:
        assets = TESTS.parent / "benchmarks" / "assets.py"
        subprocess.run([sys.executable, assets, "movies"], cwd=folder, check=True)
        recipes[DEMO] = TESTS.parent / "recipes" / "movies-minilm" / "lora.yaml"
    for name, path in recipes.items():
        print(f"running {name}", flush=True)
        seeds = ["measure.seeds=[0]"] if name == DEMO else []
        run(folder, "run", str(path), *seeds, "--output", f"run-{name}")
        hashes |= collect_hashes(name, folder / f"run-{name}")
    return hashes


def main() -> None:
    """Run, write the hashes, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, help="the folder of an earlier call")
    parser.add_argument("--no-demo", action="store_true", help="the tiny recipes only")
    given = parser.parse_args()
    hashes = make_golden(given.folder.resolve(), not given.no_demo)
    (given.folder / "golden.json").write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    if given.against is not None:
        before = json.loads((given.against / "golden.json").read_text("utf-8"))
        if given.no_demo:
            before = {k: v for k, v in before.items() if not k.startswith(DEMO)}
        changed = sorted(k for k in before.keys() | hashes.keys() if before.get(k) != hashes.get(k))
        print("\n".join(["differs:", *changed]) if changed else f"all {len(hashes)} hashes agree")
        raise SystemExit(bool(changed))


if __name__ == "__main__":
    main()
