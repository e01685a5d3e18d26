"""Load published folders in a fresh process with plain peft and transformers."""

import errno
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.fresh_process import FreshProcess
from support.published_model import TOKENS, open_context, publish_model, write_data
from support.reload_jobs import ReloadJob, reload_folders

from hftl import cli_errors
from hftl.card.snippets import ModelFolder, render_plain_snippet
from hftl.doctor.load_process import prepare_loads
from hftl.finetune.arm import train_arm
from hftl.inference.load_predictor import load
from hftl.models import lora
from hftl.models.features import predict_logits
from hftl.publish import reload_process
from hftl.publish.checks import measure_reload_difference
from hftl.publish.export import rebuild_model
from hftl.publish.reload_process import WaitingReload

pytestmark = pytest.mark.usefixtures("fast_reload")

STRATEGIES = ("head", "partial", "lora", "full")
TEXTS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "albert", "electra", "mpnet",
         "deberta-v2", "modernbert", "nomic_bert")  # fmt: skip
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "starcoder2",
            "modernbert-decoder", "eurobert")  # fmt: skip
IMAGES = ("vit", "vit_mae", "deit", "beit", "dinov2", "dinov2_with_registers", "swin", "clip",
          "siglip", "resnet", "regnet", "convnext", "convnextv2", "siglip2",
          "pvt_v2", "swinv2", "hiera")  # fmt: skip
MASKED = ("bert", "albert", "distilbert", "electra", "modernbert", "deberta-v2", "beit", "swin")
FAST = [
    *((name, False, "classification", "native", "lora") for name in TEXTS + IMAGES[:11]),
    *((name, False, "classification", "native", "lora") for name in ("llama", "gemma2", "hiera")),
    ("llama", True, TOKENS, "native", "lora"),
    ("qwen3", False, "classification", "mean", "lora"),
    ("gemma2", True, "regression", "mean", "full"),
    *((name, False, "classification", "native", s)
      for name in ("bert", "vit") for s in ("head", "partial", "full")),
    *((name, True, "classification", "native", "lora") for name in ("bert", "electra", "beit")),
    *(("bert", False, TOKENS, "native", strategy) for strategy in ("lora", "full")),
    ("bert", True, "classification", "mean", "lora"),
    ("roberta", False, "classification", "mean", "full"),
    ("bert", False, "multi-label", "native", "lora"),
    ("vit", False, "regression", "native", "lora"),
    ("dinov2", False, "interpolated", "native", "lora"),
]  # fmt: skip
"""Architecture, whether from masked pre-training, task, pooling, strategy."""
ALL = [
    *(
        (name, False, "classification", "native", s)
        for name in TEXTS + DECODERS + IMAGES
        for s in STRATEGIES
    ),
    *((name, True, "classification", "native", s) for name in MASKED for s in STRATEGIES),
    *((name, False, TOKENS, "native", s) for name in TEXTS for s in ("head", "lora", "full")),
    *((name, True, "classification", "mean", "lora") for name in TEXTS if name in MASKED),
    ("mpnet", False, "classification", "mean", "full"),
    ("vit", False, "multi-label", "native", "lora"),
    ("vit", False, "interpolated", "native", "full"),
    ("beit", False, "interpolated", "native", "partial"),
]
RARER = {
    "texts": TEXTS[:5], "other texts": TEXTS[5:], "decoders": DECODERS,
    "images": IMAGES[:9], "other images": IMAGES[9:],
}  # fmt: skip
Case = tuple[str, bool, str, str, str]
Tiny = Callable[..., Path]


def publish_case(case: Case, tiny_model: Tiny, folder: Path) -> ReloadJob:
    """Publish a model beside a sample of its logits."""
    name, masked, task, pooling, strategy = case
    folder.mkdir(exist_ok=True)
    data = write_data(name, task, folder)
    context, recipe = open_context(tiny_model(name, masked), folder, pooling, strategy, data)
    sample = publish_model(context, recipe, folder)
    return ReloadJob(folder / "publish", context.source.folder, sample)


def measure_difference(job: ReloadJob, waiting: WaitingReload | None = None) -> float:
    """Return what the check of publishing finds."""
    return measure_reload_difference(job.folder, job.base, job.sample, "cpu", waiting)


def list_slow_cases(names: tuple[str, ...]) -> list[Case]:
    """Return the cases of some architectures that `FAST` does not hold."""
    return [case for case in ALL if case[0] in names and case not in FAST]


@pytest.mark.parametrize(
    "cases",
    [FAST, *(pytest.param(list_slow_cases(n), marks=pytest.mark.slow) for n in RARER.values())],
    ids=["usual", *RARER],
)
def test_every_architecture_reloads_to_the_same_logits(
    cases: list[Case], tiny_model: Tiny, tmp_path: Path, reload_server: FreshProcess
) -> None:
    jobs = [publish_case(case, tiny_model, tmp_path / str(n)) for n, case in enumerate(cases)]
    results = reload_folders(jobs, tmp_path, reload_server)
    for case, result in zip(cases, results, strict=True):
        assert not result.hftl_imported and result.largest < 2, case
        assert result.difference <= 1e-5, (case, result)


@pytest.mark.parametrize(
    "case",
    [
        ("bert", True, "classification", "native", "lora"),
        *(pytest.param(case, marks=pytest.mark.slow) for case in (
            ("bert", False, "classification", "mean", "lora"),
            ("vit_mae", False, "classification", "native", "lora"),
        )),
    ],
    ids=lambda case: "-".join(map(str, case)),
)  # fmt: skip
def test_reload_check_runs_in_its_own_process(
    case: Case, tiny_model: Tiny, tmp_path: Path, own_process: None
) -> None:
    waiting = WaitingReload()
    try:
        job = publish_case(case, tiny_model, tmp_path)
        assert waiting.is_waiting
        assert measure_difference(job, waiting) <= 1e-5
        assert not waiting.is_waiting
    finally:
        waiting.close()


@pytest.mark.slow
def test_doctors_process_checks_more_than_one_folder(
    tiny_model: Tiny, tmp_path: Path, own_process: None
) -> None:
    job = publish_case(("bert", False, "classification", "native", "lora"), tiny_model, tmp_path)
    with prepare_loads(True) as process:
        assert process is not None
        for _ in range(2):
            assert measure_difference(job, process) <= 1e-5
            assert process.is_waiting


def test_another_process_checks_in_place_of_one_that_was_killed(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = reload_process.subprocess
    monkeypatch.setattr(reload_process, "subprocess", subprocess)
    waiting = WaitingReload()
    waiting.close()
    assert not waiting.is_waiting
    monkeypatch.setattr(reload_process, "subprocess", fast)
    case = ("bert", False, "classification", "mean", "head")
    job = publish_case(case, tiny_model, tmp_path)
    assert measure_difference(job, waiting) <= 1e-5


def test_process_that_cannot_be_started_is_reported_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(reload_process, "WaitingReload", WaitingReload)
    monkeypatch.setattr(reload_process, "subprocess", subprocess)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with reload_process.prepare_reload(is_needed=True) as waiting:
        assert waiting is None
    with pytest.raises(BlockingIOError) as caught:
        reload_process.run_reload_check([])
    assert cli_errors.report_unexpected_error(caught.value, debug=False) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert "no more processes" in line and "ulimit -a" in line and "bug" not in line


def test_untrained_pooler_that_is_not_saved_is_noticed(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stock peft does not save the new pooler of a masked-LM checkpoint.
    add_lora = lora.add_lora
    monkeypatch.setattr(
        "hftl.finetune.trainable.add_lora",
        lambda model, architecture, config, fresh: add_lora(
            model, architecture, config, [name for name in fresh if "pooler" not in name]
        ),
    )
    case = ("bert", True, "classification", "native", "lora")
    job = publish_case(case, tiny_model, tmp_path)
    assert measure_difference(job) > 1e-2


@pytest.mark.parametrize("pooling", ["mean", "native"])
def test_configs_name_no_local_path_and_modules_in_one_order(
    pooling: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    publish_model(*open_context(tiny_model("bert"), tmp_path, pooling, "lora"), tmp_path)
    for path in (tmp_path / "publish").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path.parent) not in text and str(tiny_model("bert")) not in text, path.name
    # peft holds them as a set, whose order is another in each process.
    targets = json.loads((tmp_path / "publish" / "adapter_config.json").read_text())[
        "target_modules"
    ]
    # Of a pooled model it is a pattern of whole paths.
    names = targets.split(".(")[-1].rstrip(")").split("|") if isinstance(targets, str) else targets
    assert len(names) > 2 and names == sorted(names)


def test_arm_trained_in_bf16_predicts_in_fp32(tiny_model: Tiny, tmp_path: Path) -> None:
    # The logits that are measured are those of the weights that are published.
    context, recipe = open_context(tiny_model(), tmp_path, "mean", "lora")
    training = recipe.finetune.training | {"bf16": True, "num_train_epochs": 1}
    finetune = recipe.finetune.model_copy(update={"training": training})
    outcome = train_arm(context, finetune, 0)
    save_file(outcome.weights, tmp_path / "weights.safetensors")
    model = rebuild_model(context, finetune, 0, tmp_path / "weights.safetensors")
    rows = context.encode_rows(context.prepared.rows["test"])
    again = predict_logits(model, rows, context.inputs, "cpu")
    np.testing.assert_allclose(outcome.logits["test"], again, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "strategy", "base"),
    [("mean", "lora", "its folder"), ("native", "lora", "its folder"),
     ("native", "lora", "of the adapter's config"), ("native", "full", "none")],
)  # fmt: skip
def test_plain_snippet_of_the_card_prints_the_logits(
    pooling: str, strategy: str, base: str, tiny_model: Tiny, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    case = ("bert", True, "classification", pooling, strategy)
    job = publish_case(case, tiny_model, tmp_path)
    folder, base_folder = job.folder, job.base
    sample: dict[str, Any] = json.loads(job.sample.read_text())
    if base == "of the adapter's config":
        file = folder / "adapter_config.json"
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(base_folder)}
        file.write_text(json.dumps(settings))
    named = str(base_folder) if base == "its folder" else "org/base"
    # Words beyond the cut change nothing, as they did not for the figures.
    predictor = load(folder, base=base_folder if strategy == "lora" else None)
    cut = predictor.inputs.max_length  # pyright: ignore
    text = " ".join(sample["texts"][0][0].split() * cut)
    (expected,) = predictor.predict([text])
    place, adapter = str(folder), strategy == "lora"
    code = render_plain_snippet(
        ModelFolder(
            place, named, None, pooling, 2, adapter, "text", json.dumps(text), max_tokens=cut
        )
    )
    torch.manual_seed(5)
    exec(compile(code, "card", "exec"), {"__name__": "card"})  # noqa: S102
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", printed)]
    shares = torch.tensor(numbers).softmax(0).tolist()
    np.testing.assert_allclose(shares, list(expected["scores"].values()), atol=2e-4)


def test_native_adapter_loads_with_auto_peft(tiny_model: Tiny, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    context, recipe = open_context(tiny_model("bert", True), tmp_path, "native", "lora")
    sample = json.loads(publish_model(context, recipe, tmp_path).read_text())
    file = tmp_path / "publish" / "adapter_config.json"
    base = {"base_model_name_or_path": str(context.source.folder)}
    file.write_text(json.dumps(json.loads(file.read_text()) | base))
    torch.manual_seed(5)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(file.parent, num_labels=2)
    rows = context.encode_rows(context.prepared.rows["test"])
    logits = predict_logits(loaded, rows, context.inputs, "cpu")[: len(sample["logits"])]
    np.testing.assert_allclose(logits, sample["logits"], atol=1e-5)
