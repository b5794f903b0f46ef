"""The image is built, on a Debian base made here, and the quickstart runs in it.

A step of its own in continuous integration (``bash tests/run.sh -m container``): building takes
minutes and 12 GB of disk. Debian's ``buildah`` and ``debootstrap`` are installed if need be, which
takes root and Debian; anywhere else this is skipped and says so. The base is
kept in ``POST_TRAINING_CACHE``; the image is not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tools

needs = os.geteuid() == 0 and Path("/etc/debian_version").is_file()
pytestmark = [
    pytest.mark.container,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not needs, reason="NOT TESTED: building the image needs root on Debian"),
]
RELEASE = "trixie"  # Python 3.13
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def run(*words: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=2000,
    )
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-6000:]
    return done


def install_tools() -> None:
    if all(map(shutil.which, ("buildah", "debootstrap"))):
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", **quiet)
    packages = ("buildah", "debootstrap")
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
    install_tools()
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
        return run("buildah", *places, *words, code=code, TMPDIR=str(temporary), **variables)

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
