"""The image is built on a Debian base made here; the quickstart and SLURM's jobs run in it.

A step of its own in continuous integration (``bash tests/run.sh -m container``): building takes
minutes and 12 GB of disk. Debian's ``buildah`` and ``debootstrap``, and for the jobs ``slurm-wlm``,
``munge`` and ``patchelf`` are installed if need be, which takes root and Debian; anywhere else this
is skipped and says so. The base is kept in ``POST_TRAINING_CACHE``; the image is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import slurm_jobs
import speed
import tools
import torch

needs = os.geteuid() == 0 and Path("/etc/debian_version").is_file()
pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not needs, reason="NOT TESTED: building the image needs root on Debian"),
]
RELEASE = "trixie"  # Python 3.13
NOT_STARTED = "sealing memfd copy: Device or resource busy"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# Of Ubuntu 26.04, a release whose files stay: Debian's stable releases have no apptainer.
APPTAINER = (
    "http://archive.ubuntu.com/ubuntu/pool/universe/a/apptainer/apptainer_1.4.5-1_amd64.deb",
    "53a39ecd5c75428b1c852c959373f5bbbaf18152f4513ba7d39ae103d8e53404",
)
# Fixtures: a cluster of two nodes, the repository as a site has it, a tiny model.
cluster, site, model = slurm_jobs.cluster, slurm_jobs.site, slurm_jobs.model


def run(*words: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=speed.scaled(2000),
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-6000:]
    return done


def install_tools(*packages: str) -> None:
    if all(map(shutil.which, packages)):
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", **quiet)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, **quiet)


@pytest.fixture(scope="module")
def cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "post_training"
    folder = Path(os.environ.get("POST_TRAINING_CACHE", default)) / "container"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def base(cache) -> Path:
    """The root folder of a minimal Debian, as a base image has it."""
    install_tools("buildah", "debootstrap")
    folder, done = cache / RELEASE, cache / f"{RELEASE}.done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        run("debootstrap", "--variant=minbase", RELEASE, folder)
        if CERTIFICATES.is_file():
            # A network may have a certificate of its own, which pip must know.
            target = folder / "usr" / "local" / "share" / "ca-certificates" / "host.crt"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CERTIFICATES, target)
        done.touch()
    return folder


@pytest.fixture(scope="module")
def built(base, cache):
    """The image and a container from it; ``run`` starts what ``docker run IMAGE words`` would."""
    store = cache / "storage"
    shutil.rmtree(store, ignore_errors=True)
    temporary = cache / "temporary"
    temporary.mkdir(exist_ok=True)

    def buildah(*words: object, driver: str, code: int = 0):
        places = ("--root", store / driver, "--runroot", store / "run")
        # Only what the build needs of this environment: none of pip's settings.
        variables = {"STORAGE_DRIVER": driver, "BUILDAH_ISOLATION": "chroot"}
        for attempt in range(10):
            try:
                return run(
                    "buildah", *places, *words, code=code, TMPDIR=str(temporary), **variables
                )
            except AssertionError as error:
                # buildah starts itself from a sealed copy in memory, and the kernel refuses the
                # seal (EBUSY) while a page of the copy is still being written. Nothing ran yet.
                if NOT_STARTED not in str(error) or attempt == 9:
                    raise
                time.sleep(1 + attempt)

    driver = "overlay" if works(buildah, "overlay") else "vfs"
    try:
        container = buildah("from", "scratch", driver=driver).stdout.strip()
        buildah("add", "--quiet", container, base, "/", driver=driver)
        buildah("commit", "--quiet", "--rm", container, "base", driver=driver)
        # pip's own index stands for torch's index of CPU builds.
        arguments = ("--build-arg", "BASE_IMAGE=localhost/base", "--build-arg", "TORCH_INDEX=")
        buildah("bud", *arguments, "--tag", "post-training", tools.ROOT, driver=driver)
        container = buildah("from", "post-training", driver=driver).stdout.strip()
        shown = json.loads(
            buildah("inspect", "--type", "image", "post-training", driver=driver).stdout
        )
        config = shown["OCIv1"]["config"]

        def start(*words: object, user: str | None = None, code: int = 0):
            chosen = ("--user", user) if user else ()
            return buildah("run", *chosen, container, "--", *words, driver=driver, code=code)

        yield SimpleNamespace(
            config=config,
            start=start,
            run=lambda *words, code=0: start(*config["Entrypoint"], *words, code=code),
            root=lambda: Path(buildah("mount", container, driver=driver).stdout.strip()),
        )
    finally:
        buildah("rm", "--all", driver=driver)
        shutil.rmtree(store, ignore_errors=True)


def works(buildah, driver: str) -> bool:
    try:
        buildah("rm", buildah("from", "scratch", driver=driver).stdout.strip(), driver=driver)
    except AssertionError:
        return False
    return True


def test_the_image_says_what_it_is_and_runs_as_an_ordinary_user(built):
    assert built.config["Labels"]["org.opencontainers.image.title"] == "post-training"
    assert built.start("id", "-u").stdout.strip() == "1000"
    built.start("test", "-w", "/workspace/nmm-sandbox", code=1)
    built.start("test", "-w", "/workspace/scratch")


def test_it_holds_the_pinned_versions_and_no_tool_of_development(built):
    listed = built.start("python", "-m", "pip", "list", "--format=freeze").stdout.splitlines()
    pins = re.findall(r"^([\w-]+==\S+)", (tools.ROOT / "requirements.txt").read_text(), re.M)
    assert len(pins) > 10
    missing = {pin.lower().replace("_", "-") for pin in pins}
    missing -= {line.lower().replace("_", "-") for line in listed}
    assert not missing
    assert not {"pytest", "ruff", "mypy"} & {line.split("==")[0] for line in listed}
    assert not built.start("find", ".", "-name", "tests", "-o", "-name", ".git").stdout


def test_without_words_it_shows_help(built):
    shown = built.run().stdout
    assert "docker run IMAGE <stage>.sh <conf>" in shown
    assert "convert.sh" in shown


def test_the_doctor_passes_in_it(built):
    shown = built.run("doctor").stdout
    assert "ready: every stage can run" in shown
    assert "3.13" in shown


def test_a_stage_runs_with_its_exit_code(built):
    assert "--calib-size" in built.run("quantize.sh", "--help").stdout
    wrong = built.run("convert.sh", "Qwen/Qwen3-0.6", code=2)
    assert "Did you mean: Qwen/Qwen3-0.6B" in wrong.stderr
    planned = built.run("quantize.sh", "meta-llama/Llama-3.1-405B-Instruct", "--dry-run").stdout
    assert "405,853,388,800" in planned


def test_any_user_can_run_it_and_is_told_where_not_to_write(built):
    """As ``docker run --user`` has it: a number without a name, a home or rights."""
    words = ("bash", "docker/entrypoint.sh")
    shown = built.start(*words, "doctor", user="4321:4321").stdout
    assert "ready: every stage can run" in shown
    words = ("env", "MLM_WORK_DIR=/usr/work", *words, "convert.sh", "Qwen/Qwen3-0.6B")
    text = built.start(*words, user="4321:4321", code=2).stderr
    assert "user 4321 may not write to /usr" in text
    assert '--user "$(id -u):$(id -g)"' in text


def test_a_torch_that_the_base_has_is_never_replaced(built):
    """The image itself becomes the base of a second environment, its torch another version's."""
    site = "/opt/venv/lib/python3.13/site-packages"
    program = f"""
        set -eu
        echo {site} >/usr/lib/python3/dist-packages/base.pth
        mv {site}/torch-2.11.0.dist-info {site}/torch-2.12.0a0.dist-info
        sed -i 's/^Version: 2.11.0/Version: 2.12.0a0/' {site}/torch-2.12.0a0.dist-info/METADATA
        rm -r {site}/accelerate*
        VIRTUAL_ENV=/opt/second bash docker/install.sh
        echo ADDED
        ls /opt/second/lib/python3.13/site-packages
        /opt/second/bin/python -m post_training.doctor
        """
    try:
        shown = built.start("bash", "-c", program, user="root").stdout
    finally:
        built.start("bash", "-c", f"""
            rm -r /usr/lib/python3/dist-packages/base.pth
            mv {site}/torch-2.12.0a0.dist-info {site}/torch-2.11.0.dist-info
            sed -i 's/^Version: 2.12.0a0/Version: 2.11.0/' {site}/torch-2.11.0.dist-info/METADATA
            cp -r /opt/second/lib/python3.13/site-packages/accelerate* {site}
            """, user="root")  # fmt: skip
    added = shown.split("ADDED\n")[1].split("post_training.doctor")[0].split()
    assert "accelerate" in added
    assert not {"torch", "numpy", "triton"} & set(added)
    assert "2.12.0a0 (accepted; measured with 2.11.0)" in shown
    assert "ready: every stage can run" in shown


def test_the_quickstart_runs_in_it(built):
    shown = built.run("quickstart.sh").stdout
    assert "The main job, from trained to ready" in shown
    assert "The capital of Arvon is" in shown


@pytest.fixture(scope="module")
def apptainer(base, cache, tmp_path_factory) -> Path:
    """The folder with a real apptainer, which runs on the C library of the base."""
    install_tools("patchelf")
    address, digest = APPTAINER
    package = cache / Path(address).name
    if not package.exists():
        with urllib.request.urlopen(address, timeout=300) as answer:
            package.write_bytes(answer.read())
    assert hashlib.sha256(package.read_bytes()).hexdigest() == digest, f"delete {package}"
    folder = tmp_path_factory.mktemp("apptainer")
    run("dpkg", "-x", package, folder)
    # Its programs look for these beside their own folders.
    for name in ("etc", "var"):
        (folder / name).rename(folder / "usr" / name)
    (folder / "usr" / "lib" / "var").symlink_to("../var")
    libraries = base / "usr" / "lib" / "x86_64-linux-gnu"
    loader = ("--set-interpreter", libraries / "ld-linux-x86-64.so.2")
    path = ("--force-rpath", "--set-rpath", libraries)  # also for the libraries' own libraries
    for program in ("bin/apptainer", "lib/x86_64-linux-gnu/apptainer/bin/starter"):
        run("patchelf", *loader, *path, folder / "usr" / program)
    # Where root itself lacks a capability, as in a container, asking for all of them fails.
    settings = folder / "usr" / "etc" / "apptainer" / "apptainer.conf"
    text = settings.read_text()
    changed = text.replace("root default capabilities = full", "root default capabilities = no")
    assert changed != text
    settings.write_text(changed)
    return folder / "usr" / "bin"


@pytest.fixture(scope="module")
def scratch(model, tmp_path_factory) -> Path:
    """The one folder besides the repository that jobs in a container see; a space in its name."""
    folder = tmp_path_factory.mktemp("user") / "my scratch"
    shutil.copytree(model, folder)
    tools.write_conversations(folder / "chat.jsonl")
    return folder


@pytest.fixture(scope="module")
def submit(built, apptainer, cluster, site, scratch):
    """Submits a stage over two nodes with TP=2, to run in the image; returns the job's number."""
    root = built.root()

    def start(name: str, *words: str, **more: str) -> str:
        environment = slurm_jobs.variables(
            cluster, scratch, scratch / name, TP="2", USER_FSW=str(scratch),
            CONTAINER_IMAGE=str(root), CONTAINER_RUNTIME="apptainer",
            # A folder does not say where the image has its Python, as an image built from it does.
            CONTAINER_PYTHON="/opt/venv/bin/python",
            # The site's files are links to these.
            CONTAINER_MOUNTS=f"{tools.ROOT}:{tools.ROOT}",
            # None of the machine's home and temporary folder.
            APPTAINER_CONTAIN="1", **more,
        )  # fmt: skip
        environment["PATH"] = f"{apptainer}:{environment['PATH']}"
        environment["PYTHONPATH"] = "/nowhere"
        line = ("bash", site / "slurm" / "sbatch.sh", "--nodes=2", f"--output={name}.log", *words)
        text = slurm_jobs.submit(*line, environment=environment, cwd=scratch.parent)
        return slurm_jobs.number(text)

    return start


def test_a_job_in_a_container_runs_in_both_launch_styles(submit, cluster, scratch):
    words = ("quantize.sh", "org/name", "FP8_DEFAULT_CFG", "--calib-dataset-path-or-name",
             f"{scratch}/text.jsonl", "--calib-size", "4", "--skip-generate")  # fmt: skip
    styles = {"torchrun": "", "tasks": "python"}
    jobs = [submit(name, *words, LAUNCH_SCRIPT=style) for name, style in styles.items()]
    for job in jobs:
        log = slurm_jobs.finished(cluster, job)
        assert "started on node[1-2]" in log
        assert "2 processes on CPU: TP=2" in log
    first, second = (slurm_jobs.weights(scratch / name / "org" / "name_quant") for name in styles)
    assert first.keys() == second.keys()
    assert any("amax" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_tasks_in_a_container_see(submit, cluster, scratch):
    # Task 1 ends well; task 0 ends after it, with the code of a lost rank.
    ends = "((SLURM_PROCID)) && exit; sleep 2; exit 69"
    program = f"bash -c 'env -0 >\"$MLM_WORK_DIR.$SLURM_PROCID\"; {ends}'"
    job = submit("seen", "convert.sh", "org/name", LAUNCH_SCRIPT=program, HF_TOKEN=slurm_jobs.TOKEN)
    log = slurm_jobs.finished(cluster, job, "FAILED")
    assert "FAILED with exit code 69" in log
    assert slurm_jobs.TOKEN not in log
    for rank in (0, 1):
        text = (scratch / f"seen.{rank}").read_text()
        seen = dict(line.split("=", 1) for line in text.split("\0") if line)
        assert seen["HF_TOKEN"] == slurm_jobs.TOKEN
        assert (seen["TP"], seen["SLURM_NODEID"], seen["SLURM_STEP_NUM_TASKS"]) == (
            "2", str(rank), "2",
        )  # fmt: skip
        assert seen["PWD"] == "/workspace/nmm-sandbox"
        assert "PYTHONPATH" not in seen


def test_training_in_a_container_is_saved_at_a_signal_and_goes_on(submit, cluster, scratch):
    from post_training.training import metrics as training_metrics
    from post_training.training import run_folder

    flags = (
        f"--fp32 --finetune-data-files '{scratch}/chat.jsonl' --seq-length 64 --train-iters 12 "
        "--global-batch-size 2 --log-interval 1 --eval-interval 20 --draft-vocab-size 64"
    )
    words = ("eagle3.sh", "org/name")
    job = submit("training", *words, MLM_EXTRA_ARGS=flags, MLM_REQUEUE="1")
    metrics = scratch / "training" / "org" / "name-Eagle3" / run_folder.FOLDER

    def iterations() -> list[int]:
        if not (metrics / "metrics.jsonl").is_file():
            return []
        lines = training_metrics.read(metrics)
        return [line["iteration"] for line in lines if line["kind"] == "train"]

    log = scratch.parent / "training.log"
    end = time.monotonic() + speed.scaled(180)
    while len(iterations()) < 3:
        assert time.monotonic() < end, log.read_text()
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
        time.sleep(0.1)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    slurm_jobs.wait_for_restart(cluster, job, 1, log)
    text = slurm_jobs.finished(cluster, job)
    assert "queued again" in text and "resuming after iteration" in text
    assert iterations() == list(range(1, 13))
