"""A nanochat command line becomes the spec that nanochat would have run."""

from __future__ import annotations

import pytest

from everstep.nanochat_flags import data_fields, translate
from everstep.specs import dict_to_proto
from trainer.contract.scaling import auto_total_batch_size, iterations_for
from trainer.contract.shape import ModelShape
from trainer.contract.spec import JobSpec
from trainer.contract.violations import SpecError

USERS_OWN = (
    "python -m scripts.base_train --depth=12 --window-pattern L --device-batch-size=8 "
    "--total-batch-size=65536 --num-iterations 100000 --embedding-lr=0.018 "
    "--unembedding-lr=0.00048 --matrix-lr=0.0012 --scalar-lr=0.03 --warmup-steps=0 "
    "--warmdown-ratio=0.0 --save-every=5000 --model-tag=mine"
)


def refused(command: str, **options: str) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        translate(command, **options)
    return {violation.field: violation.describe() for violation in caught.value.violations}


def test_flags_that_are_left_out_take_nanochats_defaults() -> None:
    spec = JobSpec.parse(translate("").spec)
    assert (spec.name, spec.model.depth, spec.model.window_pattern) == ("d20", 20, "SSSL")
    assert (spec.batch.device_batch_size, spec.batch.total_batch_size) == (32, 1 << 20)
    rates = spec.optimizer
    assert (rates.embedding_lr, rates.unembedding_lr) == (0.3, 0.008)
    assert (rates.matrix_lr, rates.scalar_lr, rates.smear_lr) == (0.02, 0.5, 0.2)
    assert (spec.schedule.warmup_steps, spec.schedule.warmdown_ratio) == (40, 0.65)
    assert (spec.evaluate.every, spec.evaluate.tokens) == (250, 80 * 524_288)
    assert spec.sample.every == 2000


def test_batch_and_steps_are_derived_as_nanochat_does() -> None:
    spec = JobSpec.parse(translate("--depth=16 --target-param-data-ratio=8").spec)
    shape = ModelShape.of(spec.model, 32_768)
    batch = auto_total_batch_size(spec.model, 32_768, 8.0)
    assert spec.batch.total_batch_size == batch
    assert spec.schedule.num_iterations == iterations_for(shape, batch, ratio=8.0)
    by_flops = JobSpec.parse(translate("--depth=16 --target-flops=1e19").spec)
    wanted = round(1e19 / (shape.flops_per_token * by_flops.batch.total_batch_size))
    assert by_flops.schedule.num_iterations == wanted


def test_what_follows_from_a_vocabulary_insists_on_it() -> None:
    assert translate("--depth=4").spec["model"]["vocab_size"] == 32_768
    assert translate("--depth=4", vocab_size=512).spec["model"]["vocab_size"] == 512
    told = "--depth=4 --num-iterations=10 --total-batch-size=65536"
    assert "vocab_size" not in translate(told).spec["model"]


def test_a_users_own_command_line_is_taken_over_whole() -> None:
    made = translate(USERS_OWN)
    spec = JobSpec.parse(made.spec)
    assert spec.name == "mine"
    assert (spec.optimizer.matrix_lr, spec.optimizer.scalar_lr) == (0.0012, 0.03)
    assert (spec.schedule.num_iterations, spec.schedule.warmdown_ratio) == (100_000, 0.0)
    assert (spec.checkpoint.every_steps, spec.checkpoint.keep_every_steps) == (5000, 5000)
    assert made.notes == []
    dict_to_proto(made.spec)


def test_torchrun_tells_the_number_of_workers() -> None:
    line = "OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node={} -m scripts.base_train -- "
    spec = translate(line.format(8) + "--depth=4").spec
    assert spec["resources"]["workers"] == {"min": 8, "max": 8}
    assert "--nproc_per_node" in refused(line.format("gpu"))


def test_resuming_names_nanochats_checkpoint() -> None:
    flags = "--depth=12 --resume-from-step=16"
    assert translate(flags, "/nc").spec["start"] == {"from": "nanochat:/nc/base_checkpoints/d12@16"}
    tagged = translate(f"{flags} --model-tag=x", "/nc").spec
    assert tagged["start"]["from"] == "nanochat:/nc/base_checkpoints/x@16"
    assert "--nanochat-dir" in refused(flags)["--resume-from-step"]


def test_flags_without_a_meaning_here_are_noted() -> None:
    made = translate("--run=x --fp8 --device-type=cpu --core-metric-every 100 --num-iterations=3")
    for flag in ("--run", "--fp8", "--device-type", "--core-metric-every"):
        assert any(note.startswith(f"{flag}:") for note in made.notes)


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("--num-iterations=5 --target-flops=1e15", ["target-flops"]),
        ("--num-iterations=5 --target-param-data-ratio=9", []),  # the batch follows from it
        (
            "--num-iterations=5 --total-batch-size=65536 --target-param-data-ratio=9",
            ["target-param-data-ratio"],
        ),
        (
            "--target-flops=1e18 --total-batch-size=65536 --target-param-data-ratio=9",
            ["target-param-data-ratio"],
        ),
        ("--target-param-data-ratio=9 --total-batch-size=65536", []),
    ],
)
def test_a_flag_that_another_one_overrules_is_noted(command: str, unused: list[str]) -> None:
    notes = translate(f"--depth=4 {command}").notes
    assert [note.split(":")[0][2:] for note in notes if "not used" in note] == unused


def test_every_bad_flag_is_refused_by_name() -> None:
    found = refused("--depht=3 --depth=x --matrix-lr=nan --scalar-lr --run")
    assert list(found) == ["--depht", "--depth", "--matrix-lr", "--scalar-lr", "--run"]
    assert found["--depth"] == "'x': must be a whole number"
    assert "not a flag" in found["--depht"]


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("'unbalanced", "--nanochat"),
        ("--depth=0", "--depth"),
        ("--window-pattern=XY", "--window-pattern"),
        ("--total-batch-size=0", "--total-batch-size"),
        ("--target-param-data-ratio=0", "--target-param-data-ratio"),
        ("--resume-from-step=-5", "--resume-from-step"),
        ("--target-flops=1e300", "--target-flops"),
    ],
)
def test_impossible_values_are_refused(command: str, flag: str) -> None:
    assert flag in refused(command, base_folder="/nc")


def test_the_base_folder_gives_data_and_tokenizer() -> None:
    assert data_fields("/home/me/nanochat") == {
        "source": "file:/home/me/nanochat/base_data_climbmix",
        "tokenizer": "file:/home/me/nanochat/tokenizer",
    }
