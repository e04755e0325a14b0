"""`everstep plan` and `submit`, and exit statuses, against scripted answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from everstep.cli.__main__ import run
from everstep.specs import spec_to_proto
from everstep.v1 import everstep_pb2 as pb
from tests.fakes.training_service import Failure, FakeTrainingService, refusal, violations
from trainer.contract.spec import JobSpec

PARENT = "01ABCDEFGHJKMNPQRSTVWXYZ00"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTrainingService]:
    with FakeTrainingService() as fake:
        monkeypatch.setenv("EVERSTEP_ADDRESS", fake.address)
        monkeypatch.setenv("EVERSTEP_TOKEN", "secret")
        monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
        yield fake


def values(group: str, rate: float) -> pb.GroupValues:
    return pb.GroupValues(group=group, learning_rate=rate, momentum=0.95, weight_decay=0.1)


def plan(*, continued: bool = False, refused: bool = False) -> pb.Plan:
    """A plan of one group that the service could have answered."""
    row = pb.RateRow(group="matrix_8x8")
    for step, rate in ((100, 0.02), (199, 0.001)):
        row.points.add(step=step, values=values("matrix_8x8", rate))
    made = pb.Plan(
        spec=spec_to_proto(JobSpec.parse({"name": "tiny"})),
        shape=pb.Shape(n_layer=2, n_embd=64, n_head=2, n_kv_head=1, vocab_size=512),
        parameters=[pb.ParameterCount(kind="wte", count=32_768)],
        parameters_total=32_768,
        flops_per_token=983_328,
        grad_accum_steps=4,
        start_step=100,
        steps=100,
        tokens=6_553_600,
        checkpoint_bytes=1_970_000,
        steps_at_risk=20,
        warnings=["smear is far above"],
    )
    if continued:
        row.parent.CopyFrom(values("matrix_8x8", 0.005))
        row.learning_rate_ratio = 4.0
        made.start.CopyFrom(pb.CheckpointRef(job_id=PARENT, step=100, attempt=1))
    if refused:
        made.refusals.append("matrix_8x8: 0.005 -> 0.02, 4 times (guards.max_lr_jump 2)")
    made.rates.append(row)
    return made


def scripted(service: FakeTrainingService, made: pb.Plan) -> None:
    service.script(
        PlanJob=[pb.PlanJobResponse(plan=made)],
        SubmitJob=[pb.SubmitJobResponse(plan=made, job=pb.Job(id="JOB1", spec=made.spec))],
    )


def sent(service: FakeTrainingService, method: str = "PlanJob") -> pb.JobSpec:
    return service.requests[method][-1].spec


def test_plan_shows_sizes_batches_and_rates(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(service, plan())
    assert run(["plan"]) == 0
    said = capsys.readouterr().out
    for words in (
        "tiny: 2 layers x 64 wide, 2 heads (1 of keys and values), vocabulary 512",
        "32,768 = wte 32,768",
        "983,328 a token",
        "4 micro-batches x 8 rows",
        "100 steps to the horizon 200, 6,553,600 tokens",
        "1.97 MB; a crash costs at most 20 steps",
        "s3://corpus/climbmix, tokenizer s3://corpus/tokenizer; validation shard last, "
        "41,943,040 tokens every 250 steps and at the end",
        "bf16, tables bf16, deterministic; gradients clipped nowhere",
        "warning: smear is far above",
    ):
        assert words in said
    row = next(line.split() for line in said.splitlines() if line.startswith("matrix_8x8"))
    assert row == ["matrix_8x8", "0.02", "0.001", "0.95", "0.1"]


def test_plan_of_a_continuation_shows_old_and_new_and_what_is_refused(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(service, plan(continued=True, refused=True))
    assert run(["plan", "--from", f"{PARENT}@100", "--set", "optimizer.matrix_lr=2e-2"]) == 4
    said = capsys.readouterr().out
    assert f"100 steps from {PARENT}@100 to the horizon 200" in said
    assert "in force at" in said
    row = next(line.split() for line in said.splitlines() if line.startswith("matrix_8x8"))
    assert row == ["matrix_8x8", "0.005", "0.02", "x", "4", "0.001", "0.95", "0.1"]
    assert "refused: matrix_8x8: 0.005 -> 0.02" in said
    request = service.requests["PlanJob"][0]
    assert request.inherit
    assert getattr(request.spec.start, "from") == f"{PARENT}@100"
    assert request.spec.optimizer.matrix_lr == 0.02
    assert not request.spec.optimizer.HasField("scalar_lr")


def test_a_plan_of_a_range_lists_the_numbers_of_workers_that_can_be(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan()
    made.spec.resources.workers.MergeFrom(pb.WorkersSpec(min=1, max=3, policy=pb.SIZING_GROW))
    made.workers.add(workers=1, grad_accum_steps=4)
    made.workers.add(workers=2, grad_accum_steps=2)
    scripted(service, made)
    assert run(["plan"]) == 0
    said = capsys.readouterr().out
    assert "1 to 3, grow; workers x micro-batches: 1 x 4, 2 x 2" in said


def test_json_is_the_message_and_its_spec_goes_back_in(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = JobSpec.parse(
        {"compile": "on", "precision": {"compute": "fp32"}, "schedule": {"final_lr_frac": 1e-5}}
    )
    job = pb.Job(id="JOB1", spec=spec_to_proto(spec), state=pb.JOB_STATE_QUEUED)
    service.script(GetJob=[pb.GetJobResponse(job=job)])
    scripted(service, plan())
    assert run(["get", "JOB1", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["step"], shown["attempts"]) == ("JOB_STATE_QUEUED", 0, [])
    file = tmp_path / "again.json"
    file.write_text(json.dumps(shown["spec"]))
    assert run(["plan", str(file), "-o", "json"]) == 0
    assert sent(service) == job.spec
    assert json.loads(capsys.readouterr().out)["flops_per_token"] == "983328"


def test_a_yaml_file_and_settings_over_it(service: FakeTrainingService, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("compile: off\nmodel: {depth: 4}\noptimizer: {matrix_lr: 1e-3}\n")
    scripted(service, plan())
    settings = ["--set", "model.depth=8", "--set", "resources.gpus_per_worker=0", "--name", "new"]
    assert run(["plan", str(file), *settings]) == 0
    spec = sent(service)
    assert (spec.name, spec.model.depth, spec.compile) == ("new", 8, pb.COMPILE_OFF)
    assert (spec.optimizer.matrix_lr, spec.resources.gpus_per_worker) == (0.001, 0)
    assert not service.requests["PlanJob"][0].inherit


def test_every_violation_is_printed_on_a_line_whoever_found_it(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    service.script(PlanJob=[violations(("a.b", "1: too low"), ("c", "2: too high"))])
    assert run(["plan"]) == 2
    assert capsys.readouterr().err == "a.b: 1: too low\nc: 2: too high\n"
    assert run(["plan", "--set", "optimizer.matrix_rl=1", "--set", "modle.depth=3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "optimizer.matrix_rl: 1: is not a field of the spec",
        "modle: {'depth': 3}: is not a field of the spec",
    ]
    assert len(service.requests["PlanJob"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "missing.yaml"], "missing.yaml"),
        (["plan", "--set", "x"], "section.field=value"),
        (["plan", "--nanochat", "--depht=3 --depth=x"], "--depht"),
        (["plan", "--offline", "--from", "J@1", "--set", "start=J@1"], "start: 'J@1'"),
        (["plan", "--offline", "--from", "J@1", "--set", "model.depth="], "not taken away"),
        (["submit", "--nanochat-dir"], "requires an argument"),
        (["list", "--state", "LOST"], "LOST"),
        (["watch", "J", "--cursor", "-1"], "-1"),
        (["watch", "J", "--cursor", str(2**63)], "--cursor"),
        (["update", "J", "--priority", str(-(2**31))], "--priority"),
        (["update", "J", "--keep-last", str(2**31)], "--keep-last"),
        (["logs", "J", "--attempt", str(2**31)], "--attempt"),
        (["metrics", "J", "--to-step", str(2**31)], "--to-step"),
        (["sample", "J@1", "--tokens", str(2**31)], "--tokens"),
        (["sample", "J@1", "--seed", str(2**63)], "--seed"),
        (["nonsense"], "nonsense"),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("name: a\nname: b\n")
    assert run(["plan", str(file)]) == 2
    assert f"{file}:2: 'name' is given twice" in capsys.readouterr().err
    file.write_bytes(b"name: \xff\n")
    assert run(["plan", str(file)]) == 2
    assert "can't be read" in capsys.readouterr().err
    assert run(["plan", str(file), "--nanochat", ""]) == 2
    assert "not both" in capsys.readouterr().err


def test_nanochat_flags_with_its_base_folder(
    service: FakeTrainingService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(service, plan())
    flags = "--depth=4 --num-iterations=10 --total-batch-size=65536 --run=x --save-every=5"
    assert run(["plan", "--nanochat", flags, "--nanochat-dir", str(tmp_path)]) == 0
    spec = sent(service)
    assert (spec.model.depth, spec.model.window_pattern) == (4, "SSSL")
    assert spec.data.source == f"file:{tmp_path}/base_data_climbmix"
    assert spec.data.tokenizer == f"file:{tmp_path}/tokenizer"
    assert "--run: " in capsys.readouterr().err
    (tmp_path / "base_data").mkdir()
    own = ["--set", "data.tokenizer=builtin:x"]
    assert run(["plan", "--nanochat-dir", str(tmp_path), *own]) == 0
    assert sent(service).data.source == f"file:{tmp_path}/base_data"
    assert sent(service).data.tokenizer == "builtin:x"


def test_a_continuation_keeps_its_data_whatever_nanochats_variable_says(
    service: FakeTrainingService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(service, plan())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run(["plan", "--from", f"{PARENT}@16"]) == 0
    assert not sent(service).HasField("data")
    assert run(["plan", "--from", f"{PARENT}@16", "--nanochat-dir", str(tmp_path)]) == 0
    assert sent(service).data.source == f"file:{tmp_path}/base_data_climbmix"
    assert run(["plan"]) == 0
    assert sent(service).data.source == f"file:{tmp_path}/base_data_climbmix"


def test_a_nanochat_checkpoint_has_no_spec_to_inherit(service: FakeTrainingService) -> None:
    scripted(service, plan())
    assert run(["plan", "--from", "nanochat:/nc/base_checkpoints/d12@16"]) == 0
    assert not service.requests["PlanJob"][0].inherit


def test_a_nanochat_command_line_over_a_job_says_whose_values_are_left(
    service: FakeTrainingService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(service, plan())
    words = ["plan", "--from", f"{PARENT}@16", "--nanochat-dir", str(tmp_path), "--nanochat"]
    assert run([*words, "--depth=4"]) == 0
    assert service.requests["PlanJob"][0].inherit
    assert "nanochat's defaults, not that job's values" in capsys.readouterr().err
    assert run([*words, "--depth=4 --resume-from-step=8"]) == 2
    assert "--from or --resume-from-step, not both" in capsys.readouterr().err


def test_submit_ends_with_the_job_id(
    service: FakeTrainingService, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(service, plan())
    assert run(["submit", "--request-id", "r1"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "JOB1"
    assert "FLOPs" not in said
    assert service.requests["SubmitJob"][0].request_id == "r1"
    service.script(SubmitJob=[pb.SubmitJobResponse(job=pb.Job(id="JOB1"))])
    assert run(["submit", "--request-id", "r1"]) == 0
    assert capsys.readouterr().out == "JOB1\n"


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (refusal(grpc.StatusCode.FAILED_PRECONDITION, "LEARNING_RATE_JUMP"), 4),
        (refusal(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED"), 4),
        (refusal(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"), 4),
        (refusal(grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"), 4),
        (Failure(grpc.StatusCode.NOT_FOUND), 4),
        (Failure(grpc.StatusCode.DEADLINE_EXCEEDED), 3),
        (Failure(grpc.StatusCode.INTERNAL), 3),
        (Failure(grpc.StatusCode.INVALID_ARGUMENT), 2),
    ],
)
def test_each_error_has_its_exit_status_and_one_line(
    service: FakeTrainingService,
    capsys: pytest.CaptureFixture[str],
    failure: Failure,
    status: int,
) -> None:
    service.script(SubmitJob=[failure])
    assert run(["submit"]) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_no_service_at_all_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EVERSTEP_ADDRESS", raising=False)
    monkeypatch.setenv("EVERSTEP_STATE", str(tmp_path))
    assert run(["list"]) == 3
    assert "everstep serve" in capsys.readouterr().err
