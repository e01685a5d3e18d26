"""Two processes against one: the same rows, gradients, losses, logits, metrics and errors."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from two_processes import (
    ADAPTATIONS,
    CASES,
    GLOBAL_BATCH,
    SHARDED,
    Rows,
    adaptation,
    bytes_of,
    information,
    kind_of,
    outcome,
    tiny,
    unfrozen,
)

from hftl.finetune.gradual import split_phases
from hftl.runtime.distributed import (
    broadcast_from_main,
    close_process_group,
    gather_values,
    get_rank,
    get_world_size,
    is_main,
)

TESTS = Path(__file__).parent
RECIPES = TESTS.parent / "recipes" / "accelerate"


def torchrun(folder: Path, *options: str, environment: Any = os.environ) -> tuple[list[Any], Any]:
    """What each of two ranks saw, and how the launcher ended."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(TESTS / "two_processes.py"), str(folder), *options,
    ]  # fmt: skip
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        command, env={**environment, **settings}, capture_output=True, text=True, timeout=300
    )
    files = [folder / f"{i}.pt" for i in range(2)]
    assert all(path.exists() for path in files), ended.stderr[-4000:]
    return [torch.load(path, weights_only=False) for path in files], ended


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Any]:
    return torchrun(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def ranks(told: Any) -> list[dict[str, Any]]:
    return told[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The same trainings in this one process."""
    assert get_world_size() == 1
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[Any, Any] = {name: outcome(name, folder) for name in CASES}
    found |= {names: adaptation(*names, folder) for names in ADAPTATIONS}
    found["information"] = information()
    found["unfrozen"] = unfrozen(folder, None, dropout=0.0)
    torch.set_num_threads(threads)
    return found


def micro_batches(name: str, seen: list[list[bytes]], processes: int) -> list[list[bytes]]:
    """One rank's rows of each step."""
    accumulated = CASES[name].get("accumulated", 1) if processes > 1 else 1
    steps: list[list[bytes]] = []
    in_epoch = -(-CASES[name]["rows"] // (GLOBAL_BATCH // accumulated))
    for start in range(0, len(seen), in_epoch):
        epoch = seen[start : start + in_epoch]
        for i in range(0, len(epoch), accumulated):
            steps.append(sum(epoch[i : i + accumulated], []))
    return steps


@pytest.mark.parametrize("name", CASES)
def test_every_step_holds_the_rows_of_one_process_and_none_twice(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    one = micro_batches(name, alone[name]["seen"], 1)
    parts = [micro_batches(name, found[name]["seen"], 2) for found in ranks]
    assert len(one) == len(parts[0]) == len(parts[1]) == CASES[name].get("steps", 50)
    for whole, *shares in zip(one, *parts, strict=True):
        assert Counter(whole) == Counter(sum(shares, []))
        assert abs(len(shares[0]) - len(shares[1])) <= CASES[name].get("accumulated", 1)
    in_epoch = -(-CASES[name]["rows"] // GLOBAL_BATCH)
    first = Counter(sum(one[:in_epoch], []))
    kind = kind_of(name)
    key = "pixel_values" if kind == "image" else "input_ids"
    assert first == Counter(bytes_of(row[key]) for row in Rows(kind, CASES[name]["rows"]).rows)
    if "accumulated" not in CASES[name]:
        assert one == [first + second for first, second in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_first_gradients_agree(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = alone[name]["gradients"]
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for found in ranks:
        assert found[name]["gradients"].keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(found[name]["gradients"][key], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_final_logits_agree(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in ranks:
        assert len(found[name]["losses"]) == CASES[name].get("steps", 50)
        # Relative for one target of -100, whose squared error is four digits long.
        assert found[name]["losses"] == pytest.approx(alone[name]["losses"], abs=1e-5, rel=1e-6)
        for mine, expected in zip(found[name]["logits"], alone[name]["logits"], strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=0)
    assert alone[name]["losses"][0] != pytest.approx(alone[name]["losses"][-1], abs=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_counts_every_row_once(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = alone[name]["evaluations"]
    assert expected[0]["eval_rows"] == 13
    for found in ranks:
        assert len(found[name]["evaluations"]) == len(expected)
        for mine, one in zip(found[name]["evaluations"], expected, strict=True):
            assert mine == pytest.approx(one, abs=2e-4, rel=1e-5)
            assert mine["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_weights_and_keep_the_same_best_ones(
    name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    first, second = (found[name] for found in ranks)
    assert first["best"] == second["best"] and first["best"][0] == alone[name]["best"][0]
    for key in ("state", "restored"):
        assert first[key].keys() == second[key].keys() == alone[name][key].keys()
        assert all(torch.equal(first[key][k], second[key][k]) for k in first[key])
    assert first["finds_unused"] is False
    assert first["again"] == second["again"] == pytest.approx(first["best"][1], abs=1e-7)


@pytest.mark.parametrize("names", ADAPTATIONS, ids=str)
def test_an_adaptation_ends_with_the_same_weights_and_history(
    names: tuple[str, str], ranks: list[dict[Any, Any]], alone: dict[Any, Any]
) -> None:
    one = alone[names]
    assert one["told"]["kept"] == "adapted" and one["told"]["steps"] == 9
    losses = [seen["target"] for seen in one["told"]["history"]]
    assert len(losses) == 4 and losses[0] - losses[-1] > 1e-3
    for found in ranks:
        told, state = found[names]["told"], found[names]["state"]
        for mine, expected in zip(told["history"], one["told"]["history"], strict=True):
            assert mine == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert {**told, "history": 0} == {**one["told"], "history": 0}
        assert state.keys() == one["state"].keys()
        for key, tensor in one["state"].items():
            torch.testing.assert_close(state[key], tensor, atol=1e-6, rtol=0)
    first, second = (found[names]["state"] for found in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", ["features", "exact", "sampled", "empirical"])
def test_processes_share_the_rows_that_the_fisher_information_is_of(
    kind: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    one, scale = alone["information"][kind]
    (first, one_scale), (second, other_scale) = (found["information"][kind] for found in ranks)
    assert one_scale == other_scale == pytest.approx(scale, rel=1e-5)
    assert first.keys() == second.keys() == one.keys()
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4)


def test_an_adaptation_goes_on_as_if_it_had_not_been_stopped(ranks: list[dict[str, Any]]) -> None:
    assert [found["resumed"] for found in ranks] == [True, True]


def test_gradual_unfreezing_changes_the_same_and_ends_the_same(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    one = alone["unfrozen"]
    parts = split_phases(tiny("pooled", "gradual"))
    assert one["changed"] == [*parts, parts[-1]] and len(parts) == 4 and one["epochs"] == 5
    for found in (told["unfrozen"] for told in ranks):
        assert found["changed"] == one["changed"] and found["epochs"] == 5
        assert found["finds_unused"] == [False] * 5
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-5)
        for key, tensor in one["state"].items():
            torch.testing.assert_close(found["state"][key], tensor, atol=1e-4, rtol=0)
    first, second = (told["unfrozen"]["state"] for told in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_gradual_unfreezing_goes_on_from_the_phase_it_was_stopped_in(
    ranks: list[dict[str, Any]],
) -> None:
    assert [found["goes_on"] for found in ranks] == [[4, 3, 1]] * 2


def test_a_loss_that_breaks_on_one_rank_stops_all(ranks: list[dict[str, Any]]) -> None:
    assert [found["broken"].split(". ")[0] for found in ranks] == ["the loss is nan at step 2"] * 2


def test_share_and_gather(ranks: list[dict[str, Any]]) -> None:
    assert [found["shared"] for found in ranks] == [{"by": 0}] * 2
    assert [found["alone"] for found in ranks] == [([0], [5, 6, 7])] * 2
    assert [found["mine"] for found in ranks] == [[5, 7], [6]]
    assert [found["first"] for found in ranks] == [0, 1]
    assert [found["gathered"] for found in ranks] == [[{"rank": 0}, {"rank": 1}]] * 2


def test_an_error_of_rank_0_is_raised_on_all_and_marked_on_the_others(
    ranks: list[dict[str, Any]],
) -> None:
    main, other = (found["raised"] for found in ranks)
    assert main == [
        ("DataError", "no rows. Add some", False),
        ("FileNotFoundError", "[Errno 2] gone: 'a'", False),
        ("Odd", "ab", False),
    ]
    assert other == [(*main[0][:2], True), (*main[1][:2], True), ("RuntimeError", "Odd: ab", True)]


def test_the_launcher_ends_after_the_report_without_a_warning(told: Any) -> None:
    _, ended = told
    assert ended.returncode != 0
    assert ended.stdout.count("reports:") == 1
    assert "rank 0 reports: the last error" in ended.stdout
    for noise in ("destroy_process_group", "find_unused_parameters", "Warning: [", "ProcessGroup"):
        assert noise not in ended.stderr
    # The launcher may end the process that has nothing to report before it ends by itself.
    assert ended.stderr.count("exitcode  : 3") >= 1


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (get_rank(), get_world_size(), is_main()) == (0, 1, True)
    unpicklable = lambda: 3  # noqa: E731
    assert broadcast_from_main(lambda: unpicklable) is unpicklable and gather_values(
        unpicklable
    ) == [unpicklable]
    close_process_group()
    assert not torch.distributed.is_initialized()


def test_importing_processes_does_not_import_torch() -> None:
    code = (
        "import sys, hftl.runtime.distributed as p; "
        "p.broadcast_from_main(int); p.close_process_group(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def launch_environment(name: str, *flags: str) -> tuple[Any, dict[str, str]]:
    """What accelerate's own launcher makes of a configuration file."""
    given = ["--config_file", str(RECIPES / name), *flags, "-m", "hftl", "run", "RECIPE"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    return args, prepare_multi_gpu_env(args)


@pytest.mark.slow
def test_sharded_processes_agree_with_one(alone: dict[str, Any], tmp_path: Path) -> None:
    """FSDP on CPUs, where accelerate's check for a GPU is lifted."""
    _, environment = launch_environment("fsdp.yaml")
    ranks, ended = torchrun(tmp_path, "sharded", environment=environment)
    assert ended.returncode == 0
    for found in ranks:
        for name in SHARDED:
            mine, one = found[name], alone[name]
            assert mine["shards"] > 0 and one["shards"] == 0
            assert mine["losses"] == pytest.approx(one["losses"], abs=1e-5)
            assert mine["best"][0] == one["best"][0]
            assert mine["again"] == pytest.approx(mine["best"][1], abs=1e-7)
            for key, atol in (("gradients", 1e-6), ("state", 1e-4), ("restored", 1e-4)):
                assert mine[key].keys() == one[key].keys()
                for k, tensor in one[key].items():
                    if key == "gradients" or not k.endswith("key.bias"):
                        torch.testing.assert_close(mine[key][k], tensor, atol=atol, rtol=0)
        assert found["on_cpu"].startswith("the launcher asks for FSDP")


def test_accelerate_reads_the_configurations() -> None:
    files = {path.stem: load_config_from_file(str(path)) for path in RECIPES.glob("*.yaml")}
    found = {
        name: (str(file.distributed_type.value), file.num_machines, file.num_processes)
        for name, file in files.items()
    }
    assert found == {
        "single_gpu": ("NO", 1, 1),
        "multi_gpu": ("MULTI_GPU", 1, 2),
        "multi_node": ("MULTI_GPU", 2, 16),
        "fsdp": ("FSDP", 1, 2),
    }
    assert all(file.mixed_precision == "no" and not file.use_cpu for file in files.values())
    for path in RECIPES.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert f"--config_file recipes/accelerate/{path.name}" in text
        assert "-m hftl run RECIPE" in text
    assert "share" in (RECIPES / "multi_node.yaml").read_text(encoding="utf-8")


def test_the_launcher_makes_of_them_what_they_say() -> None:
    args, environment = launch_environment("multi_gpu.yaml", "--num_processes", "8")
    assert args.nproc_per_node == "8" and "ACCELERATE_USE_FSDP" not in environment
    args, _ = launch_environment(
        "multi_node.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"
    )
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert args.rdzv_endpoint == "10.0.0.1:29500"
    _, environment = launch_environment("fsdp.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
