"""The stack of docker-compose.yml, in its CPU form, used and broken from outside.

One stack and one long job for all tests, in the order written: each leaves the job training.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from everstep import Client
from everstep.errors import InvalidSpecError, ServiceUnreachableError
from everstep.v1 import everstep_pb2 as pb
from tests.e2e.box import JOB, Box, goes_on, newest_attempt, wait_for_checkpoint, wait_until

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
# Panels that stay empty here, and where they are filled.
MAY_BE_EMPTY = (
    *("everstep_mfu_ratio", "everstep_gpu_"),  # need a card: tests/integration/test_panels.py
    "everstep_rank_busy_seconds",  # of a job of several workers: tests/e2e/test_further_boxes.py
)


@pytest.fixture
def client(box: Box) -> Iterator[Client]:
    with box.client() as client:
        yield client


@pytest.fixture(scope="module")
def job_id(box: Box) -> str:
    """A job that trains and has committed a checkpoint to SeaweedFS."""
    with box.client() as client:
        job_id = client.submit(JOB).job.id
        wait_for_checkpoint(client, job_id, 0)
    return job_id


def test_readmes_first_job_trains(box: Box) -> None:
    with box.client() as client:
        (first,) = client.list()
        assert first.spec.name == "first-light"
        wait_until(lambda: client.get(first.id).step > 0, "its first step")
        client.cancel(first.id)


def test_a_change_of_code_alone_leaves_the_layers_below_it(box: Box) -> None:
    before, image = layers(box), box.image("{{.Id}}")
    with (box.clone / "service/settings.py").open("a") as source:
        source.write("# another\n")
    try:
        box.compose("build")
        after = layers(box)
    finally:
        box.run("git", "checkout", "--quiet", "service/settings.py")
        box.run("docker", "tag", image, "everstep:local")
    assert before != after
    assert after[:3] == before[:3], "the base, the system's packages, the dependencies"
    assert len(after) == len(before) > 3


def layers(box: Box) -> list[str]:
    """The image's, from the base up."""
    found: list[str] = json.loads(box.image("{{json .RootFS.Layers}}"))
    return found


def test_only_loopback_is_published(box: Box, job_id: str) -> None:
    containers = box.compose("ps", "--quiet").split()
    described = json.loads(box.run("docker", "inspect", *containers))
    published = [
        binding["HostIp"]
        for container in described
        for bindings in container["HostConfig"]["PortBindings"].values()
        for binding in bindings
    ]
    assert set(published) == {"127.0.0.1"}


def test_secrets_are_the_owners_alone_and_not_in_the_image(box: Box) -> None:
    folder = box.clone / ".everstep/compose"
    assert folder.stat().st_mode & 0o077 == 0
    image = box.run("docker", "image", "inspect", "everstep:local")
    history = box.run("docker", "history", "--no-trunc", "everstep:local")
    for line in (folder / "service.env").read_text().split():
        assert line.split("=")[1] not in image + history
    assert json.loads(image)[0]["Config"]["User"] == "10001:10001"


def test_killed_service_leaves_the_job_training(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    box.kill("service")
    after = wait_for_checkpoint(client, job_id, before.step)
    assert len(after.attempts) == len(before.attempts), "the job was in no need of the service"


def test_crashed_service_comes_back_by_itself(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    crash(box, "service")
    after = wait_for_checkpoint(client, job_id, before.step)
    assert len(after.attempts) == len(before.attempts)


def crash(box: Box, service: str) -> None:
    """End what runs in a container; the restart policy, nobody else, starts it again."""
    before = box.restarts(service)
    box.crash(service)
    wait_until(lambda: box.restarts(service) > before, f"the restart of {service}")


def test_killed_head_costs_the_steps_since_the_last_checkpoint(
    box: Box, client: Client, job_id: str
) -> None:
    before = client.get(job_id)
    box.kill("ray-head")
    after = wait_for_checkpoint(client, job_id, client.get(job_id).step)
    assert len(after.attempts) > len(before.attempts)
    assert newest_attempt(after).start_step >= before.checkpoint.step


def test_crashed_head_comes_back_by_itself_and_so_does_the_job(
    box: Box, client: Client, job_id: str
) -> None:
    before = client.get(job_id)
    crash(box, "ray-head")
    after = wait_for_checkpoint(client, job_id, client.get(job_id).step)
    assert len(after.attempts) > len(before.attempts)
    assert newest_attempt(after).start_step >= before.checkpoint.step


def test_killed_store_delays_checkpoints_only(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    box.kill("seaweedfs")
    after = wait_for_checkpoint(client, job_id, before.step)
    assert len(after.attempts) == len(before.attempts), "storage trouble never stops training"


def test_uploads_that_broke_off_go_by_the_runbooks_command(box: Box, job_id: str) -> None:
    keys = box.clone / ".everstep" / "compose" / "storage.env"
    key, secret = (line.partition("=")[2] for line in keys.read_text().split())
    store = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{box.ports['EVERSTEP_S3_PORT']}",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name="us-east-1",
    )
    name = {"Bucket": "everstep", "Key": f"jobs/{job_id}/broke-off"}
    begun = store.create_multipart_upload(**name)
    store.upload_part(**name, UploadId=begun["UploadId"], PartNumber=1, Body=b"part")

    def there() -> bool:
        uploads = store.list_multipart_uploads(Bucket="everstep").get("Uploads", [])
        return name["Key"] in {each["Key"] for each in uploads}

    assert there()
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    (command,) = re.findall("`(docker compose .*clean.uploads.*)`", runbook)
    box.run("sh", "-c", command)
    assert there(), "it is of today"

    def gone() -> bool:
        box.run("sh", "-c", command.replace("24h", "1s"))
        return not there()

    wait_until(gone, "its end")


def test_kernels_are_compiled_once_and_lie_in_the_volume(box: Box, client: Client) -> None:
    often = {"every_steps": 10, "every_s": 0}
    spec = {**JOB, "name": "compiled", "compile": "on", "checkpoint": often}
    compiled = client.submit(spec).job.id
    reached = wait_for_checkpoint(client, compiled, 0)
    made = kernels(box)
    assert made
    client.pause(compiled)
    client.resume(compiled)
    wait_until(lambda: len(client.get(compiled).attempts) == 2, "its second attempt")
    again = newest_attempt(client.get(compiled))
    assert again.start_step >= reached.step
    wait_for_checkpoint(client, compiled, again.start_step)
    client.cancel(compiled)
    assert kernels(box) == made, "the second attempt compiled nothing"
    container = box.compose("ps", "--quiet", "ray-head").strip()
    (mounted,) = json.loads(box.run("docker", "inspect", container))
    kinds = {each["Destination"]: each["Type"] for each in mounted["Mounts"]}
    assert kinds["/cache"] == "volume"


def kernels(box: Box) -> set[str]:
    """The libraries that torch.compile built, with when."""
    found = ("find", "/cache/inductor", "-name", "*.so", "-printf", "%p %T@\\n")
    return set(box.compose("exec", "-T", "ray-head", *found).splitlines())


def test_a_loss_that_is_no_number_fails_the_job_and_fires_its_alert(
    box: Box, client: Client
) -> None:
    wild = {**JOB, "name": "wild", "optimizer": {"smear_lr": 1e6, "scalar_lr": 1e6}}
    wild_id = client.submit(wild).job.id
    states = [r.event.state for r in client.watch(wild_id) if r.HasField("event")]
    assert states[-1] == pb.JOB_STATE_FAILED
    assert client.get(wild_id).reason.startswith("NOT_FINITE")
    alert = f'ALERTS{{alertname="EverstepLossNotFinite",alertstate="firing",job_id="{wild_id}"}}'
    wait_until(lambda: box.query(alert), "the alert in Prometheus")


def test_prometheus_has_the_run_and_every_panel_shows_something(box: Box, job_id: str) -> None:
    def scraped() -> bool:
        return bool(box.query(f'everstep_validation_bits_per_byte{{job_id="{job_id}"}}'))

    wait_until(scraped, "the job's series in Prometheus")
    # The store was killed a moment ago: the last scrape may have missed it.
    wait_until(
        lambda: [sample["value"][1] for sample in box.query("up")] == ["1", "1"], "both targets"
    )
    assert {rule["health"] for rule in box.rules()} <= {"ok", "unknown"}
    firing = [rule["name"] for rule in box.rules() if rule.get("state") == "firing"]
    assert firing == ["EverstepLossNotFinite"], "of the job before"
    asked = sorted({each for path in DASHBOARDS for each in expressions(path)})
    assert asked
    # SeaweedFS says only once a minute how full its disk is.
    wait_until(lambda: not empty(box, asked), "something on every panel")


def empty(box: Box, asked: list[str]) -> list[str]:
    """The expressions without an answer that should have one."""
    found = []
    for expression in asked:
        plain = expression.replace("$__rate_interval", "5m").replace("$job", ".*")
        if not box.query(plain) and not any(name in expression for name in MAY_BE_EMPTY):
            found.append(expression)
    return found


def expressions(path: Path) -> Iterator[str]:
    """Every query of a dashboard: panels' and annotations'."""
    dashboard = json.loads(path.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["expr"]


def test_grpcurls_examples_work_as_they_are_written(box: Box, job_id: str) -> None:
    grpcurl(box, job_id, tls=False)


def test_job_goes_on_after_stop_and_up_without_losing_a_step(
    box: Box, client: Client, job_id: str
) -> None:
    before = client.get(job_id)
    box.compose("stop")
    box.compose("up", "--detach", "--wait", "--wait-timeout", "240")
    goes_on(box, job_id, before)


def test_job_goes_on_after_a_reboot_and_over_tls(box: Box, client: Client, job_id: str) -> None:
    before = client.get(job_id)
    # Docker tells all containers at once, each with its own grace, when the box goes down.
    box.run("docker", "stop", *box.compose("ps", "--quiet").split())
    elsewhere = {"EVERSTEP_BIND": "0.0.0.0", "EVERSTEP_NAMES": box.gateway()}
    box.environment |= {"EVERSTEP_TLS": "yes", **elsewhere}
    box.run("make", "up")
    assert client_certificate(box).exists()
    goes_on(box, job_id, before)
    with box.client() as trusting:
        assert trusting.get(job_id).state == pb.JOB_STATE_RUNNING
    with (
        Client(trusting.address, "no token", ca_cert=None) as plain,
        pytest.raises(ServiceUnreachableError),
    ):
        plain.get(job_id)


def client_certificate(box: Box) -> Path:
    """What `make up` tells clients to trust."""
    folder = box.clone / ".everstep/compose"
    return Path(folder / json.loads((folder / "service.json").read_text())["ca_cert"])


def test_the_port_is_reached_from_elsewhere_by_tls_and_token(box: Box, job_id: str) -> None:
    """From a container that is none of the stack's, by the box's own address."""
    token = (box.clone / ".everstep/compose/token").read_text().strip()
    trusted = {"EVERSTEP_CA_CERT": "/tls/server.crt"}
    assert job_id in box.from_elsewhere({**trusted, "EVERSTEP_TOKEN": token}, "get", job_id)
    for less, words in (
        ({**trusted, "EVERSTEP_TOKEN": "guessed"}, "token"),
        (trusted, "token"),
        ({"EVERSTEP_TOKEN": token}, "no service answers"),
    ):
        said = box.from_elsewhere(less, "get", job_id)
        assert words in said, (less.keys(), said)
        assert job_id not in said


def test_a_foreign_client_submits_watches_and_cancels_by_reflection(box: Box) -> None:
    box.environment["BUF"] = str(Path(sys.executable).with_name("buf"))
    spec = {**JOB, "name": "by-hand", "precision": {"compute": "COMPUTE_FP32"}}
    submitted = box.run("examples/buf-curl", "SubmitJob", json.dumps({"spec": spec}))
    named = json.dumps({"job_id": json.loads(submitted)["job"]["id"]})
    with subprocess.Popen(
        ["examples/buf-curl", "WatchJob", named],
        cwd=box.clone,
        env=box.environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as watch:
        assert watch.stdout is not None
        assert any('"point"' in line for line in watch.stdout), "it is told while the job trains"
        cancelled = json.loads(box.run("examples/buf-curl", "CancelJob", named))
        assert cancelled["job"]["state"] == "JOB_STATE_CANCELLED"
        rest = watch.stdout.read()
        assert watch.wait(60) == 0
    assert '"state": "JOB_STATE_CANCELLED"' in rest[rest.rindex('"event"') :]


def test_grpcurls_examples_work_with_tls(box: Box, job_id: str) -> None:
    grpcurl(box, job_id, tls=True)


def grpcurl(box: Box, job_id: str, tls: bool) -> None:
    """The commands of examples/README.md against this stack, with TLS as it says there."""
    text = (box.clone / "examples/README.md").read_text()
    (commands,) = [each for each in text.split("```\n")[1::2] if "grpcurl" in each]
    for written, here in (
        (".everstep/token", ".everstep/compose/token"),
        ("01J...", job_id),
        ("127.0.0.1:7070", f"127.0.0.1:{box.ports['EVERSTEP_PORT']}"),
        *([("-plaintext", "-cacert .everstep/compose/tls/server.crt")] if tls else []),
    ):
        assert written in commands
        commands = commands.replace(written, here)
    said = box.run("bash", "-euc", commands)
    assert "rpc WatchJob" in said
    assert f'"id": "{job_id}"' in said


def test_nanochats_folder_trains_as_it_stands(box: Box) -> None:
    small = "--depth=2 --aspect-ratio=32 --head-dim=16 --max-seq-len=64 --window-pattern=L"
    flags = f"{small} --device-batch-size=4 --total-batch-size=256 --num-iterations=20"
    own = ("optimizer.smear_lr=0.01", "evaluate.tokens=1024", "precision.compute=fp32")
    own += ("sample.every=0", "resources.gpus_per_worker=0", "resources.cpus_per_worker=1")
    settings = [word for each in own for word in ("--set", each)]
    where = ("--nanochat-dir", str(box.data))
    said = box.run("everstep", "submit", "--nanochat", flags, *where, *settings, "--wait")
    assert "SUCCEEDED" in said


def test_data_is_brought_and_trains(box: Box, client: Client) -> None:
    printed = box.run("everstep", "data", "put", str(box.data), "--name", "brought", "-o", "json")
    spec = {**JOB, "data": json.loads(printed), "schedule": {"num_iterations": 20}}
    made = client.submit(spec)
    assert made.plan.shape.vocab_size == 768
    states = [record.event.state for record in client.watch(made.job.id)]
    assert states[-1] == pb.JOB_STATE_SUCCEEDED


def test_a_checkpoint_writes_and_no_other_folder_is_read(
    box: Box, client: Client, job_id: str
) -> None:
    assert "".join(client.sample(f"{job_id}@latest", "The ", max_tokens=4, temperature=1.0))
    with pytest.raises(InvalidSpecError, match=f"must lie in {box.data}"):
        client.plan({**JOB, "data": {"source": "file:/etc", "tokenizer": "file:/run/secrets"}})


def test_the_doctor_says_what_the_containers_have(box: Box) -> None:
    said = box.compose("exec", "-T", "ray-head", "everstep", "doctor")
    for check in ("versions", "store", "ray", "clock"):
        assert f"ok       {check}: " in said, said
    assert "ok       encryption: " in box.compose("exec", "-T", "service", "everstep", "doctor")


def test_job_ends_with_a_checkpoint_that_another_continues(client: Client, job_id: str) -> None:
    last = client.cancel(job_id).job
    assert last.state == pb.JOB_STATE_CANCELLED
    step = last.checkpoint.step
    spec = {"start": {"from": f"{job_id}@{step}"}, "schedule": {"num_iterations": step + 20}}
    child = client.submit(spec, inherit=True).job.id
    states = [record.event.state for record in client.watch(child) if record.HasField("event")]
    assert states[-1] == pb.JOB_STATE_SUCCEEDED


def test_down_with_volumes_leaves_nothing(box: Box) -> None:
    box.compose("down", "--volumes")
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        assert box.leftovers(*kind) == ""
