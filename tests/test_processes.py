"""Compare two processes with one: the same rows, gradients, losses, logits, metrics and errors."""

import os
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from support.fresh_process import FreshProcess
from support.two_processes import (
    ADAPTATIONS,
    CASES,
    EVAL_ROWS,
    GLOBAL_BATCH,
    SHARDED,
    STEPS,
    Rows,
    adapt_case,
    build_tiny,
    compute_information,
    get_kind,
    to_bytes,
    train_case,
    unfreeze_gradually,
)

from hftl.finetune.trainable import split_phases
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
Results = dict[Any, Any]


def torchrun(folder: Path, *options: str, environment: Any = os.environ) -> tuple[Any, Any]:
    """Return the results of each of two ranks, and how the launcher ended."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(TESTS / "support" / "two_processes.py"), str(folder), *options,
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
def launched(
    tmp_path_factory: pytest.TempPathFactory, reload_server: FreshProcess
) -> tuple[list[Results], Any]:
    """Run two ranks as a launcher does, forked from a process that has imported the libraries."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    common = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    command = [sys.executable, "-P", str(TESTS / "support" / "two_processes.py"), str(folder)]

    def run_rank(rank: int) -> Any:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return reload_server.run(command, env=common | own)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run_rank, range(2)))
    files = [folder / f"{rank}.pt" for rank in range(2)]
    assert all(file.exists() for file in files), [one.stderr[-3000:] for one in ended]
    return [torch.load(file, weights_only=False) for file in files], ended


@pytest.fixture(scope="module")
def ranks(launched: Any) -> list[Results]:
    return launched[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run the same trainings in this one process."""
    assert get_world_size() == 1
    folder = tmp_path_factory.mktemp("one")
    results: Results = {name: train_case(name, folder) for name in CASES}
    results |= {names: adapt_case(*names, folder) for names in ADAPTATIONS}
    results["information"] = compute_information()
    results["unfrozen"] = unfreeze_gradually(folder, None, dropout=0.0)
    return results


def assert_equal_ranks(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def assert_close(state: Any, expected: dict[str, torch.Tensor], atol: float) -> None:
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, atol=atol, rtol=0)


def join_micro_batches(name: str, seen: list[list[bytes]], processes: int) -> list[list[bytes]]:
    """Return one rank's rows of each step."""
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
    name: str, ranks: list[Results], single: Results
) -> None:
    one = join_micro_batches(name, single[name]["seen"], 1)
    parts = [join_micro_batches(name, rank[name]["seen"], 2) for rank in ranks]
    assert len(one) == len(parts[0]) == len(parts[1]) == STEPS
    for whole, *shares in zip(one, *parts, strict=True):
        assert Counter(whole) == Counter(sum(shares, []))
        assert abs(len(shares[0]) - len(shares[1])) <= CASES[name].get("accumulated", 1)
    in_epoch = -(-CASES[name]["rows"] // GLOBAL_BATCH)
    kind = get_kind(name)
    key = "pixel_values" if kind == "image" else "input_ids"
    rows = Rows(kind, CASES[name]["rows"]).rows
    assert Counter(sum(one[:in_epoch], [])) == Counter(to_bytes(row[key]) for row in rows)
    if "accumulated" not in CASES[name]:
        assert one == [first + second for first, second in zip(*parts, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_first_gradients_losses_and_final_logits_agree(
    name: str, ranks: list[Results], single: Results
) -> None:
    one = single[name]
    assert max(gradient.abs().max() for gradient in one["gradients"].values()) > 1e-2
    assert one["losses"][0] != pytest.approx(one["losses"][-1], abs=1e-3)
    for rank in (results[name] for results in ranks):
        assert_close(rank["gradients"], one["gradients"], atol=1e-6)
        assert len(rank["losses"]) == STEPS
        # Relative for one target of -100, whose squared error is four digits long.
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-5, rel=1e-6)
        for logits, expected in zip(rank["logits"], one["logits"], strict=True):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_evaluation_counts_every_row_once(name: str, ranks: list[Results], single: Results) -> None:
    expected = single[name]["evaluations"]
    assert len(expected) == 4 and expected[0]["eval_rows"] == EVAL_ROWS
    for rank in ranks:
        for evaluation, one in zip(rank[name]["evaluations"], expected, strict=True):
            assert evaluation == pytest.approx(one, abs=2e-4, rel=1e-5)
            assert evaluation["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_weights_and_restore_the_same_best_ones(
    name: str, ranks: list[Results], single: Results
) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["best"] == second["best"] and first["best"][0] == single[name]["best"][0]
    for key in ("state", "restored"):
        assert_equal_ranks(first[key], second[key])
        assert first[key].keys() == single[name][key].keys()
    assert first["finds_unused"] is False
    assert first["again"] == second["again"] == pytest.approx(first["best"][1], abs=1e-7)


@pytest.mark.parametrize("names", ADAPTATIONS, ids=str)
def test_adaptation_ends_with_the_same_weights_and_history(
    names: tuple[str, str], ranks: list[Results], single: Results
) -> None:
    expected, weights = single[names]
    assert expected["kept"] == "adapted" and expected["steps"] == 9
    losses = [evaluation["target"] for evaluation in expected["history"]]
    assert len(losses) == 4 and losses[0] - losses[-1] > 1e-3
    for facts, state in (rank[names] for rank in ranks):
        for evaluation, one in zip(facts["history"], expected["history"], strict=True):
            assert dict(evaluation) == pytest.approx(dict(one), rel=1e-6, abs=1e-6)
        changes = {"history": []}
        assert facts.model_copy(update=changes) == expected.model_copy(update=changes)
        assert_close(state, weights, atol=1e-6)
    assert_equal_ranks(*(rank[names][1] for rank in ranks))


@pytest.mark.parametrize("kind", ["features", "exact", "sampled", "empirical"])
def test_processes_share_the_rows_of_the_fisher_information(
    kind: str, ranks: list[Results], single: Results
) -> None:
    one, scale = single["information"][kind]
    (first, one_scale), (second, other_scale) = (rank["information"][kind] for rank in ranks)
    assert one_scale == other_scale == pytest.approx(scale, rel=1e-5)
    assert_equal_ranks(first, second)
    for name, tensor in one.items():
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4)


def test_stopped_adaptation_reaches_the_same_weights(ranks: list[Results]) -> None:
    assert [rank["resumed"] for rank in ranks] == [True, True]


def test_signal_to_one_rank_stops_both_after_a_checkpoint_that_ends_the_same(
    ranks: list[Results],
) -> None:
    assert [rank["resumed training"] for rank in ranks] == [True, True]


def test_gradual_unfreezing_changes_the_same_and_ends_the_same(
    ranks: list[Results], single: Results
) -> None:
    one = single["unfrozen"]
    parts = split_phases(build_tiny("pooled", "gradual"))
    assert one["changed"] == [*parts, parts[-1]] and len(parts) == 4 and one["epochs"] == 5
    for rank in (results["unfrozen"] for results in ranks):
        assert rank["changed"] == one["changed"] and rank["epochs"] == 5
        assert rank["finds_unused"] == [False] * 5
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert_close(rank["state"], one["state"], atol=1e-4)
    assert_equal_ranks(*(rank["unfrozen"]["state"] for rank in ranks))


def test_gradual_unfreezing_resumes_in_the_phase_of_the_stop(ranks: list[Results]) -> None:
    assert [rank["resumed phases"] for rank in ranks] == [3, 3]


def test_processes_share_the_states_of_frozen_blocks(ranks: list[Results]) -> None:
    for rank in ranks:
        stored, run = rank["frozen always"], rank["frozen never"]
        assert stored["passed over"] == [True] * 12 and run["passed over"] == [False] * 12
        for one, other in zip(stored["history"], run["history"], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        np.testing.assert_allclose(stored["logits"], run["logits"], atol=1e-3)
    assert ranks[0]["frozen always"]["history"] == ranks[1]["frozen always"]["history"]


def test_nan_loss_on_one_rank_stops_all(ranks: list[Results]) -> None:
    assert [rank["broken"].split(". ")[0] for rank in ranks] == ["the loss is nan at step 2"] * 2


def test_memory_that_runs_out_on_one_rank_changes_no_step(ranks: list[Results]) -> None:
    """Cut all ranks' micro-batches; the parameters are those of the same steps uncut.

    The last micro-batch of an epoch has three parts on one rank and two on the other.
    """
    for case, scarce in (("text-full", "scarce"), ("accumulated-full", "scarcer")):
        assert_equal_ranks(*(rank[scarce] for rank in ranks))
        assert_close(ranks[0][scarce], ranks[0][case]["state"], atol=1e-5)


def test_ranks_evaluate_with_the_same_running_statistics(ranks: list[Results]) -> None:
    for first, second in zip(*(rank["norms"] for rank in ranks), strict=True):
        assert_equal_ranks(first, second)
    moved = [statistics["norm.running_mean"] for statistics in ranks[0]["norms"]]
    assert not torch.equal(*moved) and all(mean.abs().min() > 0 for mean in moved)


def test_values_are_broadcast_sharded_and_gathered(ranks: list[Results]) -> None:
    assert [rank["shared"] for rank in ranks] == [{"by": 0}] * 2
    assert [rank["on main alone"] for rank in ranks] == [([0], [5, 6, 7])] * 2
    assert [rank["shard"] for rank in ranks] == [[5, 7], [6]]
    assert [rank["first"] for rank in ranks] == [0, 1]
    assert [rank["gathered"] for rank in ranks] == [[{"rank": 0}, {"rank": 1}]] * 2


def test_files_that_processes_report_by_are_removed_at_the_end(ranks: list[Results]) -> None:
    assert [rank["beats"] for rank in ranks] == [[[".tmp-beats", "0", "1"], []]] * 2


def test_error_of_rank_0_is_raised_on_all_and_marked_on_the_others(ranks: list[Results]) -> None:
    main, other = (rank["raised"] for rank in ranks)
    assert main == [
        ("DataError", "no rows. Add some", False),
        ("FileNotFoundError", "[Errno 2] gone: 'a'", False),
        ("Unpicklable", "ab", False),
    ]
    assert other == [
        (*main[0][:2], True), (*main[1][:2], True), ("RuntimeError", "Unpicklable: ab", True),
    ]  # fmt: skip


def test_ranks_end_after_the_report_without_a_warning(launched: Any) -> None:
    _, ended = launched
    assert [rank.returncode for rank in ended] == [3, 3]
    assert "".join(rank.stdout for rank in ended).count("reports:") == 1
    assert "rank 0 reports: the last error" in ended[0].stdout
    for noise in ("destroy_process_group", "find_unused_parameters", "Warning: [", "ProcessGroup"):
        assert all(noise not in rank.stderr for rank in ended)


@pytest.mark.slow  # A launcher starts the ranks; without one they end as the test above says.
def test_launcher_ends_after_the_report_without_a_warning(tmp_path: Path) -> None:
    _, ended = torchrun(tmp_path)
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
    assert broadcast_from_main(lambda: unpicklable) is unpicklable
    assert gather_values(unpicklable) == [unpicklable]
    close_process_group()
    assert not torch.distributed.is_initialized()


def test_importing_the_collectives_does_not_import_torch() -> None:
    code = (
        "import sys, hftl.runtime.distributed as p; "
        "p.broadcast_from_main(int); p.close_process_group(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def read_launch_settings(name: str, *flags: str) -> tuple[Any, dict[str, str]]:
    """Return the arguments and environment that accelerate's launcher makes of a configuration."""
    words = ["--config_file", str(RECIPES / name), *flags, "-m", "hftl", "run", "RECIPE"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return args, prepare_multi_gpu_env(args)


@pytest.mark.slow
def test_sharded_processes_agree_with_one(single: Results, tmp_path: Path) -> None:
    """Compare FSDP on CPUs, where accelerate's check for a GPU is lifted."""
    _, environment = read_launch_settings("fsdp.yaml")
    ranks, ended = torchrun(tmp_path, "sharded", environment=environment)
    assert ended.returncode == 0
    for rank in ranks:
        assert rank["on_cpu"].startswith("the launcher asks for FSDP")
        for name in SHARDED:
            two, one = rank[name], single[name]
            assert two["shards"] > 0 and one["shards"] == 0
            assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
            assert two["best"][0] == one["best"][0]
            assert two["again"] == pytest.approx(two["best"][1], abs=1e-7)
            assert_close(two["gradients"], one["gradients"], atol=1e-6)
            for key in ("state", "restored"):
                assert two[key].keys() == one[key].keys()
                for k in one[key]:
                    if not k.endswith("key.bias"):  # Its true gradient is zero: all is rounding.
                        torch.testing.assert_close(two[key][k], one[key][k], atol=1e-4, rtol=0)


def test_accelerate_reads_the_configurations() -> None:
    files = {path.stem: load_config_from_file(str(path)) for path in RECIPES.glob("*.yaml")}
    assert {
        name: (str(file.distributed_type.value), file.num_machines, file.num_processes)
        for name, file in files.items()
    } == {
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


def test_the_launcher_follows_the_configurations() -> None:
    args, environment = read_launch_settings("multi_gpu.yaml", "--num_processes", "8")
    assert args.nproc_per_node == "8" and "ACCELERATE_USE_FSDP" not in environment
    args, _ = read_launch_settings(
        "multi_node.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"
    )
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "2", 1)
    assert args.rdzv_endpoint == "10.0.0.1:29500"
    _, environment = read_launch_settings("fsdp.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
